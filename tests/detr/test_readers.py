from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from lit_detr.readers import (
    AiTod,
    Coco,
    PlainText,
    VisDrone,
    Voc,
    Yolo,
    check_size,
    detect_format,
    image_size,
    make_reader,
)
from lit_detr.readers.records import checked_boxes, group_of
from lit_detr.samples import DetectionSample, DetectionTable
from tests.helpers.errors import refused

HEIGHT, WIDTH = 24, 32


def image(path: Path, height: int = HEIGHT, width: int = WIDTH) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.zeros((height, width), np.uint8))
    return path


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def names(table: DetectionTable) -> dict[str, list[str]]:
    return {split: [s.name for s in samples] for split, samples in table.splits.items()}


def same(a: DetectionSample, b: DetectionSample) -> None:
    np.testing.assert_allclose(a.boxes, b.boxes, atol=1e-3)
    np.testing.assert_allclose(a.area, b.area, rtol=1e-3)
    np.testing.assert_array_equal(a.labels, b.labels)
    np.testing.assert_array_equal(a.crowd, b.crowd)
    assert a.size == b.size
    assert a.boxes.dtype == b.boxes.dtype == np.float32


# ---- COCO ------------------------------------------------------------------------------------------------------------


def coco_content(folder: str = "", first: int = 10, **more: Any) -> dict[str, Any]:
    """Two images, the second without objects; categories with a gap."""
    return {
        "images": [
            {"id": first + i, "file_name": f"{folder}v_{i}.png", "width": WIDTH, "height": HEIGHT, "video_id": 5}
            for i in range(2)
        ],
        "annotations": [
            {"id": 1, "image_id": first, "category_id": 7, "bbox": [2, 3, 4.5, 5], "area": 20.0, "iscrowd": 0},
            {"id": 9, "image_id": first, "category_id": 3, "bbox": [0, 0, 32, 24], "iscrowd": 1},
        ],
        "categories": [{"id": 7, "name": "bird"}, {"id": 3, "name": "drone"}],
        **more,
    }


def write_coco(root: Path, **more: Any) -> Path:
    for i in range(2):
        image(root / "train" / f"v_{i}.png")
    write(root / "annotations" / "train.json", coco_content(**more))
    return root


def test_coco(tmp_path: Path) -> None:
    table = make_reader("auto", write_coco(tmp_path)).read()
    assert names(table) == {"train": ["train/v_0", "train/v_1"]}
    assert (table.class_names, table.category_ids) == (["drone", "bird"], [3, 7])
    first, second = table.splits["train"]
    assert first.boxes.tolist() == [[2, 3, 6.5, 8], [0, 0, 32, 24]]
    assert first.labels.tolist() == [1, 0]
    assert first.area.tolist() == [20, 32 * 24]  # as annotated, else of the box
    assert first.crowd.tolist() == [False, True]
    assert (first.size, first.image_id, first.group) == ((24, 32), 10, "train/v_0")
    assert first.image == tmp_path / "train" / "v_0.png"
    assert second.boxes.shape == (0, 4)
    assert (second.labels.dtype, second.crowd.dtype, second.area.dtype) == (np.int64, np.bool_, np.float32)
    groups = {
        g: [s.group for s in make_reader("coco", tmp_path, group=g).read().splits["train"]]
        for g in ("stem", "video_id")
    }
    assert groups == {"stem": ["v", "v"], "video_id": ["5", "5"]}


@pytest.mark.parametrize(
    ("file", "images", "folder"),
    [
        ("annotations/instances_val2017.json", "val2017", ""),
        ("annotations/instances_val.json", "images/val", "clip/"),
        ("annotations/val.json", "images", "val/"),
        ("annotations/val.json", "images/val/images", ""),
        ("instances_val.json", "JPEGImages", ""),
        ("val.json", ".", "deep/er/"),
        ("valid/_annotations.coco.json", "valid", ""),
        ("annotations/val.json", "val", "./"),
    ],
)
def test_coco_finds_files(tmp_path: Path, file: str, images: str, folder: str) -> None:
    for i in range(2):
        image(tmp_path / images / folder / f"v_{i}.png")
    write(tmp_path / file, coco_content(folder))
    assert detect_format(tmp_path) == "coco"
    table = make_reader("auto", tmp_path).read()
    wanted = (Path(images) / folder / "v_0").as_posix()
    assert names(table)["val"][0] == wanted
    named = make_reader("auto", tmp_path, files={"test": file}, images=images).read()
    assert names(named)["test"][0] == wanted


def test_coco_takes_the_image_of_its_own_split(tmp_path: Path) -> None:
    for i, split in enumerate(("train", "val")):
        for k in range(2):
            image(tmp_path / split / f"v_{k}.png")
        write(tmp_path / "annotations" / f"{split}.json", coco_content(first=i))
    write(tmp_path / "annotations" / "trainval.json", "{}")  # both together: not read where they are
    assert names(make_reader("auto", tmp_path).read()) == {s: [f"{s}/v_0", f"{s}/v_1"] for s in ("train", "val")}
    image(tmp_path / "images" / "v_0.png")
    image(tmp_path / "images" / "v_1.png")
    refused(lambda: make_reader("auto", tmp_path, images="images").read(), "images/v_0", "'train'", "'val'")
    refused(lambda: make_reader("auto", tmp_path, images="nowhere").read(), "nowhere")
    write(tmp_path / "annotations" / "instances_train2014.json", "{}")
    refused(lambda: make_reader("auto", tmp_path).read(), "train.json", "instances_train2014.json", "files")


def test_coco_reads_missing_sizes_from_the_images(tmp_path: Path) -> None:
    write_coco(tmp_path, images=[{"id": 10, "file_name": "v_0.png"}])
    assert make_reader("auto", tmp_path).read().splits["train"][0].size == (24, 32)


def row(**more: Any) -> dict[str, Any]:
    return {"id": 1, "image_id": 10, "category_id": 7, "bbox": [1, 1, 4, 4], **more}


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ({"images": [], "annotations": []}, ["'train'", "empty"]),
        ({"images": None}, ["images is None"]),
        ({"images": ["x"]}, ["images[0]"]),
        ({"images": [{"id": 10}]}, ["images id 10", "file_name"]),
        ({"images": [{"id": 10, "file_name": 3}]}, ["images id 10", "file_name"]),
        ({"images": [{"id": "a", "file_name": "v_0.png"}]}, ["images[0]", "id is 'a'"]),
        ({"images": [{"id": 10, "file_name": "w.png"}]}, ["images id 10", "w.png is missing"]),
        ({"images": [{"id": 1, "file_name": "v_0.png"}] * 2}, ["images[1]", "id 1", "second"]),
        ({"images": [{"id": i, "file_name": "v_0.png"} for i in (10, 11)]}, ["train/v_0", "once"]),
        ({"images": [{"id": 10, "file_name": "v_0.png", "width": 0, "height": 3}]}, ["images id 10", "0 x 3"]),
        ({"images": [{"id": 10, "file_name": "v_0.png", "width": "a", "height": 3}]}, ["images id 10", "width"]),
        ({"annotations": []}, ["no box"]),
        ({"annotations": [row(), row()]}, ["annotations[1]", "id 1", "second"]),
        ({"annotations": [row(image_id=3)]}, ["annotations id 1", "image_id 3"]),
        ({"annotations": [row(category_id=4)]}, ["annotations id 1", "category_id 4", "[3, 7]"]),
        ({"annotations": [row(bbox=[1, 2, 3])]}, ["annotations id 1", "bbox"]),
        ({"annotations": [row(bbox="abcd")]}, ["annotations id 1", "bbox"]),
        ({"annotations": [row(bbox=[1, None, 3, 4])]}, ["annotations id 1", "bbox"]),
        ({"annotations": [row(bbox=[1, float("nan"), 3, 4], area=3)]}, ["annotations id 1", "finite"]),
        ({"annotations": [row(bbox=[5, 5, 0, 4])]}, ["train.json", "annotations id 1", "no area"]),
        ({"annotations": [row(bbox=[5, 5, -2, 4])]}, ["annotations id 1", "no area"]),
        ({"annotations": [row(bbox=[-1.1, 5, 5, 4])]}, ["annotations id 1", "-1.1 5 3.9 9", "within 32 x 24"]),
        ({"annotations": [row(bbox=[0, 5, 5, 20.5])]}, ["annotations id 1", "within 32 x 24"]),
        ({"annotations": [row(bbox=[32, 5, 0.9, 4])]}, ["annotations id 1", "not inside"]),
        ({"annotations": [row(area=0)]}, ["annotations id 1", "area is 0"]),
        ({"annotations": [row(area="x")]}, ["annotations id 1", "area"]),
        ({"annotations": [{"id": 1, "image_id": 10, "bbox": [1, 1, 2, 2]}]}, ["annotations id 1", "category_id"]),
        ({"categories": []}, ["class names are missing"]),
        ({"categories": [{"id": 3}]}, ["categories id 3", "name"]),
        ({"categories": [{"id": 3, "name": "a"}, {"id": 4, "name": "a"}]}, ["'a'"]),
        ({"categories": [{"id": 3, "name": "a"}, {"id": 3, "name": "b"}]}, ["categories[1]", "id 3"]),
    ],
)
def test_coco_refusals(tmp_path: Path, more: dict[str, Any], parts: list[str]) -> None:
    root = write_coco(tmp_path, **more)
    refused(lambda: make_reader("coco", root).read(), *parts)


def test_coco_refuses_broken_files_and_splits_that_disagree(tmp_path: Path) -> None:
    write_coco(tmp_path)
    for i in range(2):
        image(tmp_path / "val" / f"v_{i}.png")
    write(tmp_path / "annotations" / "val.json", coco_content(categories=[{"id": 3, "name": "plane"}]))
    refused(lambda: Coco(tmp_path).read(), "val.json", "category id 3", "'plane'", "'drone'")
    write(tmp_path / "annotations" / "val.json", '{"images": [],\n "annotations" []}')
    refused(lambda: Coco(tmp_path).read(), "val.json", "line 2")
    write(tmp_path / "annotations" / "val.json", "[]")
    refused(lambda: Coco(tmp_path).read(), "val.json", "object")
    (tmp_path / "annotations" / "val.json").write_bytes(b"\xff\xfe\x00{")
    refused(lambda: Coco(tmp_path).read(), "val.json", "UTF-8")
    refused(lambda: Coco(tmp_path, files={"val": "gone.json"}).read(), "gone.json", "cannot read")
    refused(
        lambda: make_reader("coco", tmp_path, files={"train": "annotations/train.json"}, group="shot").read(), "shot"
    )
    refused(lambda: Coco(tmp_path / "annotations" / "x").read(), "no such folder")
    (tmp_path / "empty").mkdir()
    refused(lambda: Coco(tmp_path / "empty").read(), "train.json")


def test_boxes_are_fixed_on_request(tmp_path: Path) -> None:
    boxes = [[-0.8, -1, 5, 6], [-5, 4, 10, 10], [30, 20, 10, 10], [40, 4, 3, 3], [5, 5, 0, 3], [1, 1, 2, 2]]
    rows = [row(id=i, bbox=b) for i, b in enumerate(boxes)]
    write_coco(tmp_path, annotations=rows)
    refused(lambda: make_reader("coco", tmp_path).read(), "annotations id 4", "no area", "fix: clip")
    rows[5]["area"] = -3.0
    write_coco(tmp_path, annotations=rows)
    refused(lambda: make_reader("coco", tmp_path).read(), "annotations id 5", "area is -3", "fix: clip")
    with pytest.warns(UserWarning, match="2 boxes without area"):
        table = make_reader("coco", tmp_path, fix="clip").read()
    sample = table.splits["train"][0]
    np.testing.assert_allclose(sample.boxes, [[0, 0, 4.2, 5], [0, 4, 5, 14], [30, 20, 32, 24], [1, 1, 3, 3]], rtol=1e-6)
    assert sample.area.tolist() == [30, 100, 100, 4]
    write_coco(tmp_path, annotations=rows[:1])  # within a pixel: without a word
    assert make_reader("coco", tmp_path).read().splits["train"][0].boxes[0, :2].tolist() == [0, 0]


def test_checked_boxes_equals_a_loop() -> None:
    rng = np.random.default_rng(0)
    boxes = rng.uniform(-10, 60, (500, 4))
    sizes = rng.integers(20, 50, (500, 2))
    inside, keep = checked_boxes(boxes, sizes, "clip", str)
    for (x1, y1, x2, y2), (h, w), found, kept in zip(boxes, sizes, inside, keep, strict=True):
        expected = max(x1, 0), max(y1, 0), min(x2, w), min(y2, h)
        assert kept == (x1 < x2 and y1 < y2 and expected[0] < expected[2] and expected[1] < expected[3])
        if kept:
            np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert checked_boxes(np.zeros((0, 4)), np.zeros((0, 2), np.int64), "none", str)[0].shape == (0, 4)


def test_check_size(tmp_path: Path) -> None:
    sample = make_reader("auto", write_coco(tmp_path)).read().splits["train"][0]
    check_size(sample, (24, 32))
    check_size(DetectionSample(**{**vars(sample), "size": None}), (1, 1))
    refused(lambda: check_size(sample, (32, 24)), "v_0.png", "24 x 32", "32 x 24")


def test_image_size(tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg", "c.webp", "d.bmp", "e.tif"):
        assert image_size(image(tmp_path / name, 5, 7)) == (5, 7)
    deep = tmp_path / "deep.tiff"
    assert cv2.imwrite(str(deep), np.zeros((5, 7, 4), np.uint16))
    assert image_size(deep) == (5, 7)
    refused(lambda: image_size(tmp_path / "none.png"), "none.png")
    refused(lambda: image_size(write(tmp_path / "text.png", "no image")), "text.png", "no image")
    refused(lambda: image_size(write(tmp_path / "empty.png", "")), "empty.png")


def test_group_of() -> None:
    assert group_of("a/b_1.png", "train/a/b_1", "none") == "train/a/b_1"
    assert group_of("a/b_c_1.x.png", "n", "stem") == "a/b_c"
    assert group_of("plain.png", "n", "stem") == "plain"
    assert group_of("noending_3", "n", "stem") == "noending"


# ---- YOLO ------------------------------------------------------------------------------------------------------------


def write_yolo(root: Path, yaml: str | None = "names: [drone, bird]\ntrain: images/train\n") -> Path:
    for i in range(2):
        image(root / "images" / "train" / f"v_{i}.png")
    write(root / "labels" / "train" / "v_0.txt", f"1 {4.25 / 32} {5.5 / 24} {4.5 / 32} {5 / 24}\n\n0 0.5 0.5 1 1\n")
    if yaml is not None:
        write(root / "data.yaml", yaml)
    return root


def test_yolo(tmp_path: Path) -> None:
    table = make_reader("auto", write_yolo(tmp_path)).read()
    assert names(table) == {"train": ["images/train/v_0", "images/train/v_1"]}
    assert (table.class_names, table.category_ids) == (["drone", "bird"], [0, 1])
    first, second = table.splits["train"]
    np.testing.assert_allclose(first.boxes, [[2, 3, 6.5, 8], [0, 0, 32, 24]], atol=1e-5)
    assert first.labels.tolist() == [1, 0]
    np.testing.assert_allclose(first.area, [22.5, 768], rtol=1e-5)
    assert first.size == (24, 32)
    assert (len(second.boxes), second.image_id) == (0, 1)


@pytest.mark.parametrize(
    ("yaml", "split"),
    [
        ("path: .\nnames: {0: drone, 1: bird}\nval: images/train", "val"),
        ("path: /data/of/another/machine\nnc: 2\nnames: [drone, bird]\ntest: images/train", "test"),
        ("names: [drone, bird]\nvalid: ../images/train\ntrain:", "val"),  # as exports have it
        ("names: [drone, bird]\ntrain: [images/train]", "train"),
        ("names: [drone, bird]\ntrain: list.txt", "train"),
        ("names: [drone, bird]\ntrain: images", "train"),
    ],
)
def test_yolo_yaml(tmp_path: Path, yaml: str, split: str) -> None:
    write_yolo(tmp_path, yaml)
    write(tmp_path / "list.txt", "./images/train/v_0.png\n\nimages/train/v_1.png\n")
    table = make_reader("auto", tmp_path / "data.yaml").read()
    assert names(table) == {split: ["images/train/v_0", "images/train/v_1"]}
    assert [len(s.boxes) for s in table.splits[split]] == [2, 0]
    assert Yolo(tmp_path, group="stem").read().splits[split][1].group.endswith("v")


def test_yolo_without_yaml(tmp_path: Path) -> None:
    write_yolo(tmp_path, None)
    assert detect_format(tmp_path) == "yolo"
    refused(lambda: Yolo(tmp_path).read(), "class names are missing")
    assert Yolo(tmp_path, ["drone", "bird"]).read().class_names == ["drone", "bird"]
    write(tmp_path / "classes.txt", "drone\nbird\n")
    assert make_reader("auto", tmp_path).read().class_names == ["drone", "bird"]
    beside = tmp_path / "beside"
    image(beside / "train" / "a.png")
    write(beside / "train" / "a.txt", "0 0.5 0.5 0.5 0.5")
    write(beside / "set.yaml", "names: [x]\ntrain: train")
    assert make_reader("auto", beside).read().splits["train"][0].boxes.tolist() == [[8, 6, 24, 18]]


def test_yolo_keys_with_gaps(tmp_path: Path) -> None:
    write_yolo(tmp_path, "names: {4: bird, 1: drone, 0: 7}\ntrain: images/train")
    write(tmp_path / "labels" / "train" / "v_0.txt", "4 0.5 0.5 0.5 0.5")
    table = Yolo(tmp_path).read()
    assert (table.class_names, table.category_ids) == (["7", "drone", "bird"], [0, 1, 4])
    assert table.splits["train"][0].labels.tolist() == [2]


@pytest.mark.parametrize(
    ("yaml", "parts"),
    [
        ("train: images/train", ["data.yaml", "class names are missing"]),
        ("names: []\ntrain: images/train", ["class names are missing"]),
        ("names: {a: b}\ntrain: images/train", ["'a'"]),
        ("names: [a, a]\ntrain: images/train", ["'a'"]),
        ("names: [a]\nnc: 2\ntrain: images/train", ["nc is 2"]),
        ("names: [a]\ntrain: 3", ["train is 3"]),
        ("names: [a]\npath: 3\ntrain: x", ["path is 3"]),
        ("names: [a]\ntrain: gone", ["gone is missing"]),
        ("names: [a]", ["train and val are missing"]),
        ("names: [a\ntrain: 3", ["line 2"]),
        ("- a", ["mapping"]),
        ("names: [a]\ntrain: images/none", ["no image"]),
        ("names: [drone, bird]\ntrain: list.txt", ["list.txt, line 1", "gone.png"]),
        ("names: [a, b]\ntrain: bare", ["not one label file"]),
    ],
)
def test_yolo_yaml_refusals(tmp_path: Path, yaml: str, parts: list[str]) -> None:
    write_yolo(tmp_path, yaml)
    (tmp_path / "images" / "none").mkdir()
    image(tmp_path / "bare" / "a.png")
    write(tmp_path / "list.txt", "images/gone.png")
    refused(lambda: Yolo(tmp_path).read(), *parts)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("0 0.5 0.5 0.5", ["line 2", "5 numbers"]),
        ("0 0.5 0.5 0.5 0.5 0.9", ["line 2", "5 numbers"]),
        ("a 0.5 0.5 0.5 0.5", ["line 2", "5 numbers"]),
        ("2 0.5 0.5 0.5 0.5", ["line 2", "class 2"]),
        ("0.5 0.5 0.5 0.5 0.5", ["line 2", "class 0.5"]),
        ("nan 0.5 0.5 0.5 0.5", ["line 2", "class nan"]),
        ("0 0.5 0.5 0 0.5", ["line 2", "no area"]),
        ("0 0.9 0.5 0.5 0.5", ["line 2", "within 32 x 24"]),
        ("0 9 9 5 5", ["line 2", "within 32 x 24"]),
        ("0 nan 0.5 0.5 0.5", ["line 2", "finite"]),
    ],
)
def test_yolo_line_refusals(tmp_path: Path, line: str, parts: list[str]) -> None:
    write_yolo(tmp_path)
    write(tmp_path / "labels" / "train" / "v_1.txt", f"0 0.5 0.5 0.5 0.5\n{line}\n")
    refused(lambda: Yolo(tmp_path).read(), "v_1.txt", *parts)


def test_yolo_refuses_labels_without_image(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    write(tmp_path / "labels" / "train" / "classes.txt", "drone")  # of a labelling tool
    Yolo(tmp_path).read()
    write(tmp_path / "labels" / "train" / "w.txt", "")
    refused(lambda: Yolo(tmp_path).read(), "w.txt", "image is missing")
    (tmp_path / "labels" / "train" / "w.txt").unlink()
    write(tmp_path / "images" / "train" / "v_1.png", "no image")
    refused(lambda: Yolo(tmp_path).read(), "v_1.png", "no image")
    image(tmp_path / "images" / "train" / "v_1.png")
    image(tmp_path / "images" / "train" / "v_1.jpg")
    refused(lambda: Yolo(tmp_path).read(), "v_1.", "second image")


# ---- VOC -------------------------------------------------------------------------------------------------------------


def voc(name: str, *objects: str, size: str = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>") -> str:
    return f"<annotation>\n<folder>f</folder><filename>{name}</filename>{size}\n{''.join(objects)}</annotation>"


def thing(name: str, box: str, difficult: str = "") -> str:
    sides = "".join(f"<{s}>{v}</{s}>" for s, v in zip(("xmin", "ymin", "xmax", "ymax"), box.split(), strict=True))
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    return f"<object><name>{name}</name>{difficult}<bndbox>{sides}</bndbox>{part}</object>"


def write_voc(root: Path, *objects: str, **more: str) -> Path:
    for i in range(2):
        image(root / "JPEGImages" / f"v_{i}.png")
    things = objects or (thing("bird", "3 4 6.5 8", "<difficult>1</difficult>"), thing("drone", "1 1 32 24"))
    write(root / "Annotations" / "v_0.xml", voc("v_0.jpg", *things, **more))
    write(root / "Annotations" / "v_1.xml", voc("v_1.png"))
    write(root / "ImageSets" / "Main" / "trainval.txt", "v_0\nv_1\n")
    return root


def test_voc(tmp_path: Path) -> None:
    table = make_reader("auto", write_voc(tmp_path)).read()
    assert names(table) == {"train": ["JPEGImages/v_0", "JPEGImages/v_1"]}
    assert table.class_names == ["bird", "drone"]
    sample = table.splits["train"][0]
    assert sample.boxes.tolist() == [[2, 3, 6.5, 8], [0, 0, 32, 24]]
    assert sample.crowd.tolist() == [True, False]
    assert sample.size == (24, 32)
    assert Voc(tmp_path, difficult="keep").read().splits["train"][0].crowd.tolist() == [False, False]
    assert Voc(tmp_path, ["x", "drone", "bird"], "drop").read().splits["train"][0].labels.tolist() == [1]
    assert [s.group for s in Voc(tmp_path, group="folder").read().splits["train"]] == ["f", "f"]
    assert [s.group for s in Voc(tmp_path, group="stem").read().splits["train"]] == ["v", "v"]
    for split, name in (("train", "v_1"), ("val", "v_0")):
        write(tmp_path / "ImageSets" / "Main" / f"{split}.txt", f"{name}\n")
    assert names(Voc(tmp_path).read()) == {"train": ["JPEGImages/v_1"], "val": ["JPEGImages/v_0"]}
    write(tmp_path / "labels.txt", "drone\nbird\n")
    assert Voc(tmp_path).read().class_names == ["drone", "bird"]


def test_voc_without_lists_or_sizes(tmp_path: Path) -> None:
    write_voc(tmp_path, size="<size><width>0</width><height>0</height></size>")
    (tmp_path / "ImageSets" / "Main" / "trainval.txt").unlink()
    refused(lambda: Voc(tmp_path).read(), "Main", "train.txt")
    (tmp_path / "ImageSets" / "Main").rmdir()
    (tmp_path / "JPEGImages" / "v_1.png").rename(tmp_path / "JPEGImages" / "other.png")
    refused(lambda: Voc(tmp_path).read(), "v_1.xml", "image is missing")
    write(tmp_path / "Annotations" / "v_1.xml", voc("other.png", size=""))
    table = Voc(tmp_path).read()
    assert names(table) == {"train": ["JPEGImages/v_0", "JPEGImages/other"]}
    assert [s.size for s in table.splits["train"]] == [(24, 32)] * 2


@pytest.mark.parametrize(
    ("thing", "parts"),
    [
        (thing("plane", "3 4 6 8"), ["object 1", "'plane'"]),
        (thing("bird", "3 4 a 8"), ["object 1", "xmax", "'a'"]),
        ("<object><name>bird</name></object>", ["object 1", "xmin"]),
        (thing("bird", "3 4 2 8"), ["object 1", "no area"]),
        (thing("bird", "-1 4 6 8"), ["object 1", "-2 3 6 8", "within 32 x 24"]),
        (thing("bird", "3 4 34 8"), ["object 1", "within 32 x 24"]),
        ("<object>\n<name>bird</object>", ["v_0.xml", "line 4", "xml"]),
    ],
)
def test_voc_refusals(tmp_path: Path, thing: str, parts: list[str]) -> None:
    write_voc(tmp_path, thing)
    refused(lambda: Voc(tmp_path, ["bird"]).read(), "v_0.xml", *parts)


def test_voc_refuses_lists_that_do_not_fit(tmp_path: Path) -> None:
    write_voc(tmp_path, thing("bird", "0 4 33 8"))
    assert Voc(tmp_path).read().splits["train"][0].boxes.tolist() == [[0, 3, 32, 8]]  # counted from 0: within a pixel
    for text, parts in (("v_0\nv_7", ["line 2", "v_7.xml"]), ("v_0\n\nv_0", ["line 3", "line 1"]), ("", ["empty"])):
        write(tmp_path / "ImageSets" / "Main" / "trainval.txt", text)
        refused(lambda: Voc(tmp_path).read(), *parts)
    write(tmp_path / "ImageSets" / "Main" / "trainval.txt", "v_0")
    refused(lambda: Voc(tmp_path, group="video").read(), "v_0.xml", "video")
    write(tmp_path / "Annotations" / "v_0.xml", voc("v_0.png", size="<size><width>x</width></size>"))
    refused(lambda: Voc(tmp_path, ["bird"]).read(), "v_0.xml", "size")
    refused(lambda: Voc(tmp_path / "JPEGImages").read(), "Annotations")


# ---- AI-TOD, plain text, VisDrone ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "images"),
    [
        (
            {"train": "aitod_training_v1.json", "val": "aitod_validation_v1.json"},
            {"train": "trainval", "val": "trainval"},
        ),
        (
            {"train": "aitodv2_train.json", "test": "aitodv2_test.json"},
            {"train": "images/train", "test": "images/test"},
        ),
        ({"train": "aitodv2_trainval.json", "test": "aitodv2_test.json"}, {"train": "images/trainval", "test": "test"}),
    ],
)
def test_aitod(tmp_path: Path, files: dict[str, str], images: dict[str, str]) -> None:
    for split, file in files.items():
        for i in range(2):
            image(tmp_path / images[split] / f"{split}v_{i}.png")
        write(tmp_path / "annotations" / file, coco_content(split))
    assert detect_format(tmp_path) == "aitod"
    table = make_reader("auto", tmp_path).read()
    assert names(table) == {s: [f"{images[s]}/{s}v_{i}" for i in range(2)] for s in files}
    both = {"train": f"annotations/{files['train']}"}
    assert list(AiTod(tmp_path, files=both).read().splits) == ["train"]


def write_text(root: Path, text: str, split: str = "train") -> Path:
    for i in range(2):
        image(root / split / "images" / f"v_{i}.png")
    write(root / split / "annotations" / "v_0.txt", text)
    write(root / split / "annotations" / "v_1.txt", "")
    return root


def test_plain_text(tmp_path: Path) -> None:
    write_text(tmp_path, "2 3 6.5 8 wind-mill\n0,0,32,24,ship\n")
    table = make_reader("auto", tmp_path).read()
    assert len(table.class_names) == 8
    sample = table.splits["train"][0]
    assert sample.boxes.tolist() == [[2, 3, 6.5, 8], [0, 0, 32, 24]]
    assert sample.labels.tolist() == [7, 3]
    write_text(tmp_path, "2 3 6.5 8 small bird\n0 0 32 24 ant\n")
    table = PlainText(tmp_path).read()
    assert table.class_names == ["ant", "small bird"]
    assert table.splits["train"][0].labels.tolist() == [1, 0]
    write_text(tmp_path, "2 3 6.5 8 1\n0 0 32 24 a\n")
    table = make_reader("text", tmp_path, class_names=["a", "b"]).read()
    assert table.splits["train"][0].labels.tolist() == [1, 0]
    refused(lambda: make_reader("text", tmp_path, class_names=["a"]).read(), "v_0.txt", "line 1", "'1'")
    write_text(tmp_path, "2 3 6.5 8 1\n")
    refused(lambda: make_reader("text", tmp_path).read(), "class names are missing")
    for line in ("2 3 6 a", "2 3 6 8", "a 3 6 8 x"):
        write_text(tmp_path, f"2 3 6 8 x\n{line}")
        refused(lambda: PlainText(tmp_path).read(), "v_0.txt, line 2", "x1 y1 x2 y2 class")
    write_text(tmp_path, "2 3 6 80 x\n")
    refused(lambda: PlainText(tmp_path).read(), "v_0.txt, line 1", "within")
    (tmp_path / "train" / "annotations" / "v_1.txt").unlink()
    refused(lambda: PlainText(tmp_path).read(), "v_1.png", "v_1.txt")
    refused(lambda: PlainText(tmp_path / "train" / "images").read(), "images with annotations")


def test_visdrone(tmp_path: Path) -> None:
    lines = "2,3,4,5,1,4,0,0\n0,0,10,10,0,0,0,0,\n5,5,3,3,0,10,0,1\n6,6,2,2,1,11,0,0\n"
    for split in ("VisDrone2019-DET-train", "VisDrone2019-DET-test-dev"):
        write_text(tmp_path, lines, split)
    assert detect_format(tmp_path) == "visdrone"
    table = make_reader("auto", tmp_path).read()
    assert names(table) == {
        s: [f"VisDrone2019-DET-{f}/images/v_{i}" for i in (0, 1)] for s, f in (("train", "train"), ("test", "test-dev"))
    }
    assert table.category_ids == [*range(1, 11)]
    assert table.class_names[3] == "car"
    sample = table.splits["test"][0]
    assert sample.boxes[0].tolist() == [2, 3, 6, 8]
    assert sample.labels.tolist() == [3, *range(10), 9, *range(10)]  # an ignored region is one for every class
    assert sample.crowd.tolist() == [False, *[True] * 21]
    assert sample.boxes[[1, 10]].tolist() == [[0, 0, 10, 10]] * 2
    single = write_text(tmp_path / "one", lines, ".")
    assert list(make_reader("auto", single).read().splits) == ["train"]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("2,3,4,5,1,4,0", ["8 numbers"]),
        ("2,3,4,5,1,4,0,x", ["8 numbers"]),
        ("2,3,4,5,1,12,0,0", ["category 12"]),
        ("2,3,0,5,1,4,0,0", ["no area"]),
        ("2,3,4,50,1,4,0,0", ["within"]),
    ],
)
def test_visdrone_refusals(tmp_path: Path, line: str, parts: list[str]) -> None:
    write_text(tmp_path, f"2,3,4,5,1,4,0,0\n{line}\n")
    refused(lambda: VisDrone(tmp_path).read(), "v_0.txt, line 2", *parts)


# ---- All of them -----------------------------------------------------------------------------------------------------


def test_formats_agree(tmp_path: Path) -> None:
    """The same two images in every format."""
    boxes, labels = [[2, 3, 7, 8], [0, 0, 32, 24], [31, 23, 32, 24]], [1, 0, 1]
    rows = [
        {"id": i, "image_id": 10, "category_id": 3 + c, "bbox": [b[0], b[1], b[2] - b[0], b[3] - b[1]]}
        for i, (b, c) in enumerate(zip(boxes, labels, strict=True))
    ]
    kinds = [{"id": 3, "name": "drone"}, {"id": 4, "name": "wing"}]
    write_coco(tmp_path / "coco", annotations=rows, categories=kinds)
    write_yolo(tmp_path / "yolo", "names: [drone, wing]\ntrain: images/train")
    shares = [[(b[0] + b[2]) / 64, (b[1] + b[3]) / 48, (b[2] - b[0]) / 32, (b[3] - b[1]) / 24] for b in boxes]
    text = "\n".join(f"{c} " + " ".join(f"{v:.6f}" for v in s) for c, s in zip(labels, shares, strict=True))
    write(tmp_path / "yolo" / "labels" / "train" / "v_0.txt", text)
    word = ["drone", "wing"]
    pairs = list(zip(boxes, labels, strict=True))
    write_voc(tmp_path / "voc", *(thing(word[c], f"{b[0] + 1} {b[1] + 1} {b[2]} {b[3]}") for b, c in pairs))
    write_text(tmp_path / "text", "\n".join(f"{b[0]} {b[1]} {b[2]} {b[3]} {word[c]}" for b, c in pairs))
    tables = {f: make_reader("auto", tmp_path / f).read() for f in ("coco", "yolo", "voc", "text")}
    for table in tables.values():
        assert table.class_names == word
        for ours, theirs in zip(table.splits["train"], tables["coco"].splits["train"], strict=True):
            same(ours, theirs)


def test_make_reader_refuses_options_that_a_format_lacks(tmp_path: Path) -> None:
    read: list[tuple[Callable[[], object], str]] = [
        (lambda: make_reader("coco", tmp_path, class_names=["a"]), "class_names"),
        (lambda: make_reader("visdrone", tmp_path, class_names=["a"]), "class_names"),
        (lambda: make_reader("yolo", tmp_path, files={"train": "a"}), "files"),
        (lambda: make_reader("voc", tmp_path, images="a"), "images"),
        (lambda: make_reader("yolo", tmp_path, group="video"), "group"),
        (lambda: make_reader("coco", tmp_path, fix="cut"), "fix"),  # type: ignore[arg-type]
        (lambda: make_reader("voc", tmp_path, difficult="x"), "difficult"),  # type: ignore[arg-type]
        (lambda: make_reader("kitti", tmp_path), "kitti"),  # type: ignore[arg-type]
        (lambda: detect_format(tmp_path), "unknown format"),
        (lambda: detect_format(tmp_path / "none"), "no such folder"),
    ]
    for action, part in read:
        refused(action, part)


@pytest.mark.data
def test_drone_ir() -> None:
    root = Path(os.environ.get("LIT_DATA", "")) / "drone_ir"
    if "LIT_DATA" not in os.environ or not root.is_dir():
        pytest.skip("LIT_DATA names no folder with drone_ir")
    assert detect_format(root) == "coco"
    table = make_reader("auto", root, group="stem").read()
    assert (table.class_names, table.category_ids) == (["airplane", "bird", "drone", "helicopter"], [1, 2, 3, 4])
    expected = {"train": (1583, 1660, 190, [388, 395, 682, 195]), "val": (410, 425, 50, [82, 123, 180, 40])}
    for split, (images, count, videos, per_class) in expected.items():
        samples = table.splits[split]
        boxes, labels = np.concatenate([s.boxes for s in samples]), np.concatenate([s.labels for s in samples])
        assert (len(samples), len(boxes), len({s.group for s in samples})) == (images, count, videos)
        assert np.bincount(labels).tolist() == per_class
        assert (boxes[:, 2:] - boxes[:, :2]).min() >= 6 - 1e-4
        assert max(len(s.boxes) for s in samples) <= 6
        assert all(s.size == (256, 320) and len(s.boxes) for s in samples)
        check_size(samples[0], image_size(samples[0].image))
    groups = [{s.group for s in samples} for samples in table.splits.values()]
    assert not groups[0] & groups[1]
    side = {s: np.sqrt(np.concatenate([x.area for x in v])) for s, v in table.splits.items()}
    assert round(float(np.median(side["train"])), 1) == 14.2
    assert round(float(np.median(side["val"])), 1) == 15.0
    ranges = np.histogram(side["val"], [0, 8, 16, 32, 1e9])[0] / 4.25
    np.testing.assert_allclose(ranges, [0.5, 56.9, 40.5, 2.1], atol=0.05)
