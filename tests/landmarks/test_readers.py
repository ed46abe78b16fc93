from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from lit_landmarks.readers import (
    ISBI2015_NAMES,
    CocoKeypoints,
    Isbi2015,
    KaggleCsv,
    LandmarkCsv,
    detect_format,
    make_reader,
)
from lit_landmarks.samples import LandmarkSample, LandmarkTable, as_spacing, find_images, image_size
from tests.helpers.errors import refused
from tests.landmarks.layouts import (
    coco,
    doctor_points,
    write_coco,
    write_csv,
    write_image,
    write_isbi,
    write_kaggle,
    write_table,
)


def sizes(table: LandmarkTable) -> dict[str, int]:
    return {split: len(samples) for split, samples in table.splits.items()}


# ---- Samples ---------------------------------------------------------------------------------------------------------


def sample_of(path: Path) -> LandmarkSample:
    return LandmarkSample(path, path.stem, np.zeros((1, 2)), None)


def test_read_image_converts_between_grey_and_rgb(tmp_path: Path) -> None:
    bgr = np.zeros((3, 4, 3), np.uint8)
    bgr[..., 2] = 200
    cv2.imwrite(str(tmp_path / "red.png"), bgr)
    write_image(tmp_path / "grey.bmp", (3, 4), value=77)
    red = sample_of(tmp_path / "red.png").read_image(3)
    assert red.shape == (3, 3, 4)
    assert red[:, 0, 0].tolist() == [200, 0, 0]
    assert sample_of(tmp_path / "red.png").read_image(1)[0, 0, 0] in (59, 60)  # 0.299 * 200
    assert sample_of(tmp_path / "grey.bmp").read_image(3)[:, 1, 1].tolist() == [77, 77, 77]
    assert sample_of(tmp_path / "grey.bmp").read_image(1).shape == (1, 3, 4)
    assert image_size(tmp_path / "grey.bmp") == (4, 3)


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_read_image_maps_the_bits_in_use_to_8(tmp_path: Path, bits: int) -> None:
    largest = 2**bits - 1
    cv2.imwrite(str(tmp_path / "deep.png"), np.array([[0, largest // 2, largest]], np.uint16))
    for channels in (1, 3):
        assert sample_of(tmp_path / "deep.png").read_image(channels)[0].tolist() == [[0, 127, 255]]


def test_read_image_keeps_the_stored_grid(tmp_path: Path) -> None:
    """An EXIF orientation of 6 makes viewers turn the picture; the points count stored pixels."""
    ok, data = cv2.imencode(".jpg", np.zeros((8, 16), np.uint8))
    assert ok
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    jpeg = bytes(data)
    tagged = jpeg[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + jpeg[2:]
    (tmp_path / "a.jpg").write_bytes(tagged)
    turned = cv2.imread(str(tmp_path / "a.jpg"))
    assert turned is not None
    assert turned.shape[:2] == (16, 8)  # the tag is really there
    assert sample_of(tmp_path / "a.jpg").read_image(1).shape == (1, 8, 16)


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_bytes(b"no image")
    whole = write_image(tmp_path / "whole.png", (64, 64)).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    for name in ("empty.png", "text.png", "half.png"):
        refused(lambda name=name: sample_of(tmp_path / name).read_image(1), name, "damaged or no image")
    refused(lambda: sample_of(tmp_path / "absent.png").read_image(1), "absent.png", "cannot read")
    refused(lambda: sample_of(tmp_path / "absent.png").stamp(), "absent.png", "cannot read")
    refused(lambda: sample_of(tmp_path / "whole.png").read_image(4), "channels is 4")
    cv2.imwrite(str(tmp_path / "float.tif"), np.zeros((4, 4), np.float32))
    refused(lambda: sample_of(tmp_path / "float.tif").read_image(1), "float.tif", "float32")


def test_stamp_changes_with_the_file(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png")
    stamp = sample_of(path).stamp()
    assert stamp == sample_of(path).stamp()
    assert str(path) in stamp
    os.utime(path, ns=(1, 1))
    assert sample_of(path).stamp() != stamp


def test_a_sample_without_a_file_says_what_is_to_do() -> None:
    sample = LandmarkSample(None, "made", np.zeros((1, 2)), None)
    with pytest.raises(TypeError, match="overrides read_image"):
        sample.read_image(1)
    with pytest.raises(TypeError, match="overrides stamp"):
        sample.stamp()


def test_find_images(tmp_path: Path) -> None:
    for name in ("10.png", "2.PNG", "1.bmp", "._2.png", "a.webp"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "folder.png").mkdir()
    assert [p.name for p in find_images(tmp_path)] == ["1.bmp", "2.PNG", "10.png", "a.webp"]
    refused(lambda: find_images(tmp_path / "folder.png"), "folder.png", "no image", ".png")
    refused(lambda: find_images(tmp_path / "absent"), "absent", "no such folder")


@pytest.mark.parametrize("value", [0, -0.1, 10, float("nan"), float("inf"), "wide", (0.1,), (0.1, 0.1, 0.1), (0.1, 0)])
def test_spacing_out_of_range(value: Any) -> None:
    refused(lambda: as_spacing(value, "pixel_size"), "pixel_size: pixel size is", "below 10")


def test_spacing_is_one_number_or_two() -> None:
    assert as_spacing([0.1, 0.2], "") == (0.1, 0.2)
    assert as_spacing(np.float32(0.5).item(), "") == (0.5, 0.5)
    assert as_spacing(None, "") is None


def test_table_checks_what_every_reader_promises() -> None:
    def sample(name: str, count: int = 1) -> LandmarkSample:
        return LandmarkSample(None, name, np.zeros((count, 2)), None)

    refused(lambda: LandmarkTable({}, ("a",)), "no split")
    refused(lambda: LandmarkTable({"train": []}, ("a",)), "'train' is empty")
    refused(lambda: LandmarkTable({"train": [sample("1"), sample("1")]}, ("a",)), "'train'", "'1'")
    refused(lambda: LandmarkTable({"train": [sample("1", 2)]}, ("a",)), "1: 2 landmarks, expected 1")
    refused(lambda: LandmarkTable({"train": [sample("1", 2)]}, ("a", "a")), "'a'")
    refused(lambda: LandmarkSample(None, "1", np.zeros(2), None), "1: points have shape (2,)")
    LandmarkTable({"train": [sample("1")], "test": [sample("1")]}, ("a",))  # the same name in two splits is fine


# ---- ISBI 2015 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("annotations", ["AnnotationsByMD", "", "AnnotationsByMD/AnnotationsByMD"])
@pytest.mark.parametrize("images", ["RawImage", "RawImage/RawImage", ""])
def test_isbi_nestings(tmp_path: Path, annotations: str, images: str) -> None:
    write_isbi(tmp_path, annotations=annotations, images=images)
    table = make_reader("auto", tmp_path).read()
    assert sizes(table) == {"train": 2, "test1": 1}
    assert table.landmark_names == ISBI2015_NAMES
    assert table.num_landmarks == 19
    sample = table.splits["train"][1]
    assert sample.name == "002"
    assert sample.path == tmp_path / images / "TrainingData" / "002.png"
    # By hand: junior (0 + 2/4, 1) and senior (2, 2), hence (1.25, 1.5), which is not rounded.
    assert sample.points[0].tolist() == [1.25, 1.5]
    assert sample.spacing is None


@pytest.mark.parametrize("suffix", [".bmp", ".jpg", ".webp"])
def test_isbi_takes_any_image_type_and_split(tmp_path: Path, suffix: str) -> None:
    write_isbi(tmp_path, suffix=suffix, splits={"TrainingData": ["001"], "Test2Data": ["301", "302"]})
    assert sizes(Isbi2015(tmp_path).read()) == {"train": 1, "test2": 2}


@pytest.mark.parametrize("annotator", ["junior", "senior"])
def test_isbi_one_doctor(tmp_path: Path, annotator: Any) -> None:
    write_isbi(tmp_path, doctors=[annotator])  # the other one is not needed
    sample = Isbi2015(tmp_path, annotator).read().splits["test1"][0]
    np.testing.assert_array_equal(sample.points, doctor_points("151", annotator))


def test_isbi_spacing_is_known_for_the_official_size_only(tmp_path: Path) -> None:
    write_isbi(tmp_path, splits={"TrainingData": ["001"]}, size=(2400, 1935))
    assert Isbi2015(tmp_path).read().splits["train"][0].spacing == (0.1, 0.1)
    assert Isbi2015(tmp_path, pixel_size=0.2).read().splits["train"][0].spacing == (0.2, 0.2)
    assert Isbi2015(tmp_path, pixel_size=(0.2, 0.3)).read().splits["train"][0].spacing == (0.2, 0.3)


def test_isbi_refuses(tmp_path: Path) -> None:
    root = write_isbi(tmp_path / "set")
    reader = Isbi2015(root)
    text = root / "AnnotationsByMD" / "400_senior" / "001.txt"
    lines = text.read_text().splitlines()

    def with_lines(new: list[str], *parts: str) -> None:
        text.write_text("\n".join(new))
        refused(reader.read, str(text), *parts)

    with_lines(lines[:10], "10 lines x,y, expected 19")
    with_lines([*lines[:4], "12,abc", *lines[5:]], "line 5", "y is 'abc'")
    with_lines([*lines[:4], "12,nan", *lines[5:]], "line 5", "y is 'nan'")
    with_lines([*lines[:4], "12,2000000", *lines[5:]], "line 5", "'2000000'", "at most 1000000")
    with_lines([*lines[:4], "12", *lines[5:]], "line 5", "'12' after 4 points")
    with_lines([*lines[:19], "12,13"], "20 lines x,y, expected 19")
    text.write_bytes(b"\xff\xfe1,2")
    refused(reader.read, str(text), "UTF-8")
    text.unlink()
    refused(reader.read, str(text), "missing annotation", "001.png")
    text.write_text("\ufeff" + "\r\n".join([*lines[:19], "", "0", ""]))  # a BOM and Windows line ends are fine
    reader.read()
    refused(Isbi2015(root, pixel_size=0).read, "pixel_size")
    refused(Isbi2015(root, "average").read, "'average'", "mean, junior or senior")  # type: ignore[arg-type]
    refused(Isbi2015(tmp_path / "absent").read, "absent", "no such folder")
    (root / "AnnotationsByMD" / "400_junior").rename(root / "elsewhere")
    refused(reader.read, str(root), "400_junior")
    (tmp_path / "bare" / "400_junior").mkdir(parents=True)
    (tmp_path / "bare" / "400_senior").mkdir()
    refused(Isbi2015(tmp_path / "bare").read, "TrainingData, Test1Data, Test2Data", "RawImage/RawImage")
    (tmp_path / "bare" / "RawImage" / "TrainingData").mkdir(parents=True)
    refused(Isbi2015(tmp_path / "bare").read, "TrainingData", "no image")


def test_isbi_refuses_two_images_of_one_name(tmp_path: Path) -> None:
    write_isbi(tmp_path)
    write_image(tmp_path / "RawImage" / "TrainingData" / "001.bmp")
    refused(Isbi2015(tmp_path).read, "'001'", "001.bmp", "001.png")


# ---- Flat tables of the challenge ------------------------------------------------------------------------------------


def test_kaggle(tmp_path: Path) -> None:
    write_kaggle(tmp_path)
    table = make_reader("auto", tmp_path, pixel_size=0.1).read()
    assert sizes(table) == {"train": 2, "test1": 1}
    assert table.landmark_names == ISBI2015_NAMES
    sample = table.splits["train"][1]
    assert (sample.name, sample.spacing) == ("002", (0.1, 0.1))
    assert sample.path == tmp_path / "cepha400" / "cepha400" / "002.png"
    assert sample.points[0].tolist() == [1.25, 1.5]
    senior = KaggleCsv(tmp_path, "senior").read().splits["train"][1]
    np.testing.assert_array_equal(senior.points, doctor_points("002", "senior"))
    assert senior.spacing is None


def test_kaggle_images_may_have_another_type_or_folder(tmp_path: Path) -> None:
    write_kaggle(tmp_path, splits={"train": ["001"], "test1": ["002"]}, images="jpg")
    table = tmp_path / "train_senior.csv"
    table.write_text(table.read_text().replace("001.png", r"C:\ceph\001.bmp"))
    write_image(tmp_path / "other" / "002.png")
    write_image(tmp_path / "test1" / "002.png")
    splits = KaggleCsv(tmp_path, "senior").read().splits
    assert splits["train"][0].path == tmp_path / "jpg" / "001.png"
    assert splits["test1"][0].path == tmp_path / "test1" / "002.png"  # of three, the one in the split's folder
    (tmp_path / "test1" / "002.png").unlink()
    refused(KaggleCsv(tmp_path, "senior").read, "test1_senior.csv, line 2", "ambiguous")


def test_kaggle_refuses(tmp_path: Path) -> None:
    write_kaggle(tmp_path, splits={"train": ["001", "002"]})
    junior, senior = tmp_path / "train_junior.csv", tmp_path / "train_senior.csv"
    text = senior.read_text()

    def with_text(new: str, *parts: str) -> None:
        senior.write_text(new)
        refused(KaggleCsv(tmp_path).read, str(senior), *parts)

    with_text(text.replace("001.png", "003.png"), "'001.png' is not in both tables")
    with_text(text.replace("image_path", "name"), "columns are name, x1", "image_path")
    with_text(text.replace("y19", "y18"), "line 1", "'y18'")
    with_text(text.replace("x2,y2", "y2,x2"), "x and y in turn")
    with_text(text.replace("2.0,", "two,", 1), "line 2", "'two'")
    with_text(text.replace("2.0,", ",", 1), "line 2", "both or neither")
    with_text(text.replace("002.png", "001.png"), "line 3", "'001.png' stands also in", "line 2")
    with_text(text.replace("2.0,", "", 1), "line 2: 38 cells, expected 39")
    with_text(text.splitlines()[0], "no row")
    with_text(text + '"open', "line 4", "comma-separated")
    columns = text.splitlines()[0].rpartition(",")[0]
    with_text(f"{columns}\n{','.join(['001.png', *['1'] * 37])}\n", "37 columns beside image_path")
    senior.unlink()
    refused(KaggleCsv(tmp_path).read, "no train_senior.csv", "'mean'")
    KaggleCsv(tmp_path, "junior").read()
    junior.unlink()
    refused(KaggleCsv(tmp_path).read, str(tmp_path), "train_senior.csv")


# ---- General tables --------------------------------------------------------------------------------------------------


def test_csv_of_one_table(tmp_path: Path) -> None:
    table = make_reader("auto", write_csv(tmp_path), pixel_size=0.3).read()
    assert sizes(table) == {"train": 2}
    assert table.landmark_names == ("p1", "p2")
    first, second = table.splits["train"]
    assert first.points.tolist() == [[1.5, 2.0], [3.0, 4.25]]
    assert first.spacing == (0.1, 0.1)  # the column wins over the argument
    assert second.spacing == (0.125, 0.125)
    assert second.points[0].tolist() == [5.0, 6.0]
    assert np.isnan(second.points[1]).all()
    assert (second.name, second.path) == ("002", tmp_path / "images" / "002.png")


def test_csv_of_the_2024_challenge(tmp_path: Path) -> None:
    header = ["image file", "spacing(mm)", "p1x", "p1y"]
    write_csv(tmp_path, header=header, rows=[["1.bmp", "0.096", 3, 4], ["2.bmp", "", 5, 6]])
    samples = LandmarkCsv(tmp_path, pixel_size=(0.1, 0.2)).read().splits["train"]
    assert [s.spacing for s in samples] == [(0.096, 0.096), (0.1, 0.2)]  # the argument fills gaps
    assert LandmarkCsv(tmp_path).read().splits["train"][1].spacing is None


def test_csv_with_splits_names_and_two_spacings(tmp_path: Path) -> None:
    header = ["Filename", "split", "age", "pixel_size_x", "pixel_size_y", "sella_x", "Gonion left_y", "sella_y"]
    header.append("Gonion left_x")
    rows = [
        ["a.png", "train", "12", 0.1, 0.2, 1, 4, 2, 3],
        ["b.png", "Validation", "", "", "", 5, "nan", 6, ""],
        ["c.png", "test1", "9", 0.3, 0.3, -7, 8, 9, 1e5],
    ]
    write_csv(tmp_path, header=header, rows=rows, table="points.csv")
    table = LandmarkCsv(tmp_path / "points.csv").read()
    assert sizes(table) == {"train": 1, "val": 1, "test1": 1}
    assert table.landmark_names == ("sella", "Gonion left")
    a, b, c = (table.splits[s][0] for s in ("train", "val", "test1"))
    assert a.points.tolist() == [[1, 2], [3, 4]]
    assert (a.spacing, b.spacing) == ((0.1, 0.2), None)
    assert b.points[0].tolist() == [5, 6]
    assert np.isnan(b.points[1]).all()
    assert c.points.tolist() == [[-7, 9], [1e5, 8]]  # outside the image is allowed


def test_csv_per_split_takes_each_image_from_its_own_folder(tmp_path: Path) -> None:
    header = ["image", "p1x", "p1y"]
    for split in ("train", "val", "test"):
        write_csv(tmp_path, header=header, rows=[["1.png", 1, 2]], table=f"{split}.csv", images=f"{split}/img")
    table = make_reader("auto", tmp_path).read()
    for split in ("train", "val", "test"):
        assert [s.path for s in table.splits[split]] == [tmp_path / split / "img" / "1.png"]
    (tmp_path / "val" / "img" / "1.png").unlink()
    write_image(tmp_path / "val" / "img" / "2.png")
    refused(LandmarkCsv(tmp_path).read, "val.csv, line 2", "'1.png' not found")  # never the one of train/


def test_csv_of_one_folder_for_all_splits(tmp_path: Path) -> None:
    header = ["image", "p1x", "p1y"]
    write_csv(tmp_path, header=header, rows=[["1.png", 1, 2]], table="train.csv", images="train")
    write_csv(tmp_path, header=header, rows=[["2.png", 1, 2]], table="val.csv", images="train")
    assert sizes(LandmarkCsv(tmp_path).read()) == {"train": 1, "val": 1}


def test_csv_names_stay_unique(tmp_path: Path) -> None:
    rows = [["anna/ceph.png", 1, 2], ["bea\\ceph.png", 3, 4]]
    write_image(tmp_path / "images" / "bea" / "ceph.png")
    write_csv(tmp_path, header=["file", "p1x", "p1y"], rows=rows[:1])
    write_table(tmp_path / "labels.csv", ["file", "p1x", "p1y"], rows)
    samples = LandmarkCsv(tmp_path).read().splits["train"]
    assert [s.name for s in samples] == ["anna/ceph.png", "bea/ceph.png"]
    assert samples[1].path == tmp_path / "images" / "bea" / "ceph.png"


def test_images_behind_a_link_are_found(tmp_path: Path) -> None:
    write_image(tmp_path / "store" / "1.png")
    root = tmp_path / "set"
    write_table(root / "labels.csv", ["file", "p1x", "p1y"], [["1.png", 1, 2]])
    (root / "images").symlink_to(tmp_path / "store")
    (root / "circle").symlink_to(root)
    assert LandmarkCsv(root).read().splits["train"][0].path == root / "images" / "1.png"


@pytest.mark.parametrize(
    ("header", "row", "parts"),
    [
        ("name,p1x,p1y", "1.png,1,2", ["no image column", "file, image"]),
        ("file,image,p1x,p1y", "1.png,1.png,1,2", ["image column", "exactly one"]),
        ("file,a,b", "1.png,1,2", ["columns are file, a, b", "p1x, p1y or name_x, name_y"]),
        ("file,p1x,p1y,p2x", "1.png,1,2,3", ["'p2x' has no partner"]),
        ("file,scale,pixel_size,p1x,p1y", "1.png,1,1,1,2", ["pixel size in pixel_size, scale"]),
        ("file,pixel_size_x,p1x,p1y", "1.png,1,1,2", ["pixel size in pixel_size_x"]),
        ("file,scale,p1x,p1y", "1.png,0,1,2", ["line 2", "pixel size is 0.0", "below 10"]),
        ("file,scale,p1x,p1y", "1.png,96,1,2", ["line 2", "pixel size is 96.0"]),
        ("file,scale,p1x,p1y", "1.png,0.1mm,1,2", ["line 2", "scale is '0.1mm'"]),
        ("file,p1x,p1y", "1.png,1,", ["line 2", "both or neither"]),
        ("file,p1x,p1y", "1.png,1,inf", ["line 2", "'inf'"]),
        ("file,p1x,p1y", "1.png,1,-2e6", ["line 2", "'-2e6'"]),
        ("file,p1x,p1y", ",1,2", ["line 2", "file is empty"]),
        ("file,p1x,p1y", "9.png,1,2", ["line 2", "'9.png' not found"]),
        ("file,split,p1x,p1y", "1.png,,1,2", ["line 2", "split is ''"]),
        ("file,p1x,p1y", "1.png,1,2\n1.png,1,2", ["line 3", "'1.png' stands also in", "line 2"]),
        ("file,p1x,p1y", "1.png,1", ["line 2: 2 cells, expected 3"]),
    ],
)
def test_csv_refuses(tmp_path: Path, header: str, row: str, parts: list[str]) -> None:
    write_image(tmp_path / "images" / "1.png")
    (tmp_path / "labels.csv").write_text(f"{header}\n{row}\n")
    refused(LandmarkCsv(tmp_path).read, str(tmp_path / "labels.csv"), *parts)


def test_csv_refuses_tables_that_do_not_fit_together(tmp_path: Path) -> None:
    refused(LandmarkCsv(tmp_path).read, str(tmp_path), "labels.csv", "single csv")
    write_csv(tmp_path, header=["file", "p1x", "p1y"], rows=[["1.png", 1, 2]], table="train.csv")
    write_csv(tmp_path, header=["file", "p2x", "p2y"], rows=[["2.png", 1, 2]], table="val.csv")
    refused(LandmarkCsv(tmp_path).read, "val.csv", "landmarks are p2", "train.csv")
    write_csv(tmp_path, header=["file", "split", "p1x", "p1y"], rows=[["2.png", "train", 1, 2]], table="val.csv")
    refused(LandmarkCsv(tmp_path).read, "val.csv, line 2", "split is 'train', expected val")
    write_csv(tmp_path)
    refused(LandmarkCsv(tmp_path).read, "labels.csv, train.csv, val.csv stand side by side")


# ---- COCO ------------------------------------------------------------------------------------------------------------


def test_coco(tmp_path: Path) -> None:
    write_coco(tmp_path)
    table = make_reader("auto", tmp_path, pixel_size=0.5).read()
    assert table.landmark_names == ("tip", "base")
    a, b = table.splits["train"]
    assert a.points.tolist() == [[1.5, 2], [3, 4]]  # v = 1, occluded but labelled, counts
    assert b.points[0].tolist() == [5, 6]
    assert np.isnan(b.points[1]).all()
    assert (a.name, a.path, a.spacing) == ("a", tmp_path / "images" / "a.png", (0.2, 0.2))


def test_coco_annotations_folder_and_split_folders(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        content = coco({"1.png": (1, 2, 2, 3, 4, 2)})
        write_coco(tmp_path, content, file=f"annotations/person_keypoints_{split}2017.json", images=f"{split}2017")
    table = make_reader("coco", tmp_path, pixel_size=0.5).read()
    for split in ("train", "val", "test"):
        assert [s.path for s in table.splits[split]] == [tmp_path / f"{split}2017" / "1.png"]
        assert table.splits[split][0].spacing == (0.5, 0.5)
    only = CocoKeypoints(tmp_path / "annotations" / "person_keypoints_val2017.json").read()
    assert [s.path for s in only.splits["val"]] == [tmp_path / "val2017" / "1.png"]
    assert only.splits["val"][0].spacing is None


def test_coco_single_file_is_train(tmp_path: Path) -> None:
    write_coco(tmp_path, coco({"1.png": (1, 2, 2, 3, 4, 2)}, pixel_size=[0.1, 0.2]), file="hands.json")
    samples = make_reader("auto", tmp_path).read().splits["train"]
    assert samples[0].spacing == (0.1, 0.2)


def test_coco_refuses(tmp_path: Path) -> None:
    good = coco({"a.png": (1, 2, 2, 3, 4, 2), "b.png": (1, 2, 2, 3, 4, 2)})
    path = tmp_path / "train.json"

    def with_change(change: Callable[[Any], object], *parts: str) -> None:
        content = json.loads(json.dumps(good))
        change(content)
        path.write_text(json.dumps(content))
        refused(CocoKeypoints(tmp_path).read, str(path), *parts)

    refused(CocoKeypoints(tmp_path).read, str(tmp_path), "train.json", "annotations/*train*.json")
    write_coco(tmp_path, good)
    with_change(lambda c: c["annotations"].append(c["annotations"][0]), "image 7 has more than one annotation")
    with_change(lambda c: c["annotations"].pop(), "image b.png: no annotation")
    with_change(lambda c: c["annotations"][0].update(image_id=99), "image_id 99")
    with_change(lambda c: c["annotations"][0].pop("keypoints"), "annotations has no 'keypoints'")
    with_change(lambda c: c["annotations"][0]["keypoints"].pop(), "image a.png: 5 keypoint values, expected 6")
    with_change(lambda c: c["annotations"][0].update(keypoints=None), "image a.png: None keypoint values")
    with_change(lambda c: c["annotations"][0].update(keypoints=[1, 2, 3, 3, 4, 2]), "v of 'tip' is 3")
    with_change(lambda c: c["annotations"][0].update(keypoints=["q", 2, 2, 3, 4, 2]), "x of 'tip' is 'q'")
    with_change(lambda c: c["annotations"][0].update(keypoints=[1, 3e6, 2, 3, 4, 2]), "y of 'tip' is 3000000.0")
    with_change(lambda c: c["images"][0].pop("file_name"), "images has no 'file_name'")
    with_change(lambda c: c["images"][0].update(id=8), "two images have the id 8")
    with_change(lambda c: c["images"][0].update(file_name="z.png"), "image z.png", "not found")
    with_change(lambda c: c["images"][0].update(file_name="b.png"), "'b.png' stands also in")
    with_change(lambda c: c["images"][0].update(spacing=-1), "image a.png", "pixel size is -1")
    with_change(lambda c: c["categories"][0].pop("keypoints"), "0 categories with keypoint names")
    with_change(lambda c: c["categories"].append(c["categories"][0]), "2 categories with keypoint names")
    with_change(lambda c: c.pop("images"), "no entries under 'images'")
    path.write_text('{"images": [\n1,')
    refused(CocoKeypoints(tmp_path).read, str(path), "line 2", "json")
    path.write_text("[]")
    refused(CocoKeypoints(tmp_path).read, str(path), "no entries under 'images'")
    write_coco(tmp_path, good)
    write_coco(tmp_path, coco({"c.png": (1, 2, 2)}, names=["tip"]), file="val.json")
    refused(CocoKeypoints(tmp_path).read, "val.json: landmarks are tip", "train.json")
    write_coco(tmp_path, good, file="train_2.json")
    refused(CocoKeypoints(tmp_path).read, "train.json, train_2.json are all split 'train'")


# ---- Choosing --------------------------------------------------------------------------------------------------------


def test_detect_format(tmp_path: Path) -> None:
    assert detect_format(write_isbi(tmp_path / "isbi")) == "isbi2015"
    assert detect_format(write_kaggle(tmp_path / "kaggle", doctors=["junior"])) == "kaggle_csv"
    assert detect_format(write_csv(tmp_path / "labels")) == "csv"
    assert detect_format(write_csv(tmp_path / "any", table="points.csv")) == "csv"
    assert detect_format(tmp_path / "any" / "points.csv") == "csv"
    assert detect_format(write_coco(tmp_path / "coco")) == "coco"
    assert detect_format(write_coco(tmp_path / "deep", file="annotations/x_val2017.json")) == "coco"
    assert detect_format(tmp_path / "coco" / "train.json") == "coco"
    (tmp_path / "labels" / "spacing.json").write_text("{}")
    assert detect_format(tmp_path / "labels") == "csv"
    write_coco(tmp_path / "labels")
    refused(lambda: detect_format(tmp_path / "labels"), "both csv and json", "format")
    (tmp_path / "nothing").mkdir()
    parts = ("400_junior", "train_senior.csv", "labels.csv", "train.json", "nothing")
    refused(lambda: make_reader("auto", tmp_path / "nothing"), "expected", *parts)
    refused(lambda: detect_format(tmp_path / "absent"), "absent", "no such folder")


def test_make_reader(tmp_path: Path) -> None:
    assert make_reader("isbi2015", tmp_path, "junior", 0.1) == Isbi2015(tmp_path, "junior", 0.1)
    assert make_reader("kaggle_csv", tmp_path, "senior", 0.1) == KaggleCsv(tmp_path, "senior", 0.1)
    assert make_reader("csv", tmp_path, pixel_size=0.1) == LandmarkCsv(tmp_path, 0.1)
    assert make_reader("coco", tmp_path, pixel_size=0.1) == CocoKeypoints(tmp_path, 0.1)
    refused(lambda: make_reader("csv", tmp_path, "junior"), "'junior'", "csv")
    refused(lambda: make_reader("dicom", tmp_path), "'dicom'", "kaggle_csv")  # type: ignore[arg-type]
    refused(lambda: make_reader("coco", tmp_path, "both"), "'both'")  # type: ignore[arg-type]


# ---- The real data set -----------------------------------------------------------------------------------------------


@pytest.mark.data
def test_the_real_set_reproduces_the_two_doctors() -> None:
    root = Path(os.environ.get("LIT_DATA", "")) / "isbi2015"
    if "LIT_DATA" not in os.environ or not root.is_dir():
        pytest.skip("LIT_DATA names no folder with isbi2015")
    tables = {a: make_reader("auto", root, a, pixel_size=0.2).read() for a in ("mean", "junior", "senior")}
    assert sizes(tables["mean"]) == {"train": 150, "test1": 150}
    assert {s.spacing for s in tables["mean"].splits["test1"]} == {(0.2, 0.2)}
    points = {a: np.stack([s.points for s in t.splits["test1"]]) for a, t in tables.items()}

    def distance(a: str, b: str) -> np.ndarray:
        return np.linalg.norm((points[a] - points[b]) * 0.2, axis=-1)

    between = distance("junior", "senior")
    assert between.mean() == pytest.approx(2.363, abs=5e-4)
    # Ties at exactly 2 mm exist, as the labels were integers: hence the tolerance.
    assert 100 * np.mean(between <= 2 + 1e-6) == pytest.approx(55.54, abs=5e-3)
    assert distance("junior", "mean").mean() == pytest.approx(1.182, abs=5e-4)
    image = tables["mean"].splits["test1"][0].read_image(1)
    assert image.shape == (1, 1200, 967)
