"""Drawn frames: reproducible, exact boxes, objects that stand out; canvases with exact labels."""

import itertools
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy import ndimage

from lit_cli.errors import InputError
from lit_detr.canvas import Canvas, dense_composite, grid_canvas
from lit_detr.coco import iou_matrix
from lit_detr.samples import DetectionSample
from lit_detr.synthetic import SYNTHETIC_NAMES, SyntheticDetections

SMALL = SyntheticDetections(num_train=6, num_val=3, num_test=2, size=(96, 128))
MANY = SyntheticDetections(num_train=300, num_val=0, num_test=0)


def boxes_of(data, split="train"):
    return np.concatenate([s.boxes for s in data.read().splits[split]])


# ---- frames ---------------------------------------------------------------------------------------------------------


def test_the_table_names_what_can_be_drawn():
    table = SMALL.read()
    assert {k: len(v) for k, v in table.splits.items()} == {"train": 6, "val": 3, "test": 2}
    assert table.class_names == ["cross", "ring", "bar"]
    assert table.category_ids == [1, 2, 3]
    assert replace(SMALL, num_val=0).read().splits.keys() == {"train", "test"}
    for samples in table.splits.values():
        for i, sample in enumerate(samples):
            assert not sample.image.name
            assert sample.image_id == i
            assert sample.size == (96, 128)
            assert sample.boxes.dtype == sample.area.dtype == np.float32
            assert sample.labels.dtype == np.int64
            assert len(sample.boxes) == len(sample.labels) == len(sample.area) == len(sample.crowd)
            assert sample.labels.max(initial=0) < 3
            assert (sample.boxes[:, :2] >= 0).all()
            assert (sample.boxes[:, 2:] <= (128, 96)).all()
            np.testing.assert_allclose(sample.area, (sample.boxes[:, 2:] - sample.boxes[:, :2]).prod(1))
            overlap = iou_matrix(sample.boxes, sample.boxes)
            assert (overlap[~np.eye(len(overlap), dtype=bool)] == 0).all()
    names = [s.name for samples in table.splits.values() for s in samples]
    assert len(set(names)) == 11


def test_a_frame_follows_from_seed_split_and_number_alone():
    same = replace(SMALL, num_train=9, num_val=0)
    assert np.array_equal(SMALL.image("train_0003"), same.image("train_0003"))
    for name in ("boxes", "labels"):
        mine, other = (getattr(d.read().splits["train"][3], name) for d in (SMALL, same))
        assert np.array_equal(mine, other)
    others = SMALL.image("train_0002"), SMALL.image("val_0002"), replace(SMALL, seed=1).image("train_0002")
    assert not any(np.array_equal(a, b) for a, b in itertools.pairwise(others))


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image(channels):
    image = replace(SMALL, channels=channels).image("test_0001")
    assert image.shape == (channels, 96, 128)
    assert image.dtype == np.uint8
    assert (image == image[:1]).all()
    assert 60 < image.mean() < 190
    assert image.flags.c_contiguous


def test_sizes_and_counts_are_those_asked_for():
    boxes = boxes_of(MANY)
    longer = (boxes[:, 2:] - boxes[:, :2]).max(1)
    assert longer.min() > 4.4
    assert longer.max() <= 24.25
    assert 0.05 < (longer < 7.9).mean() < 0.16
    counts = np.array([len(s.boxes) for s in MANY.read().splits["train"]])
    assert 0.01 < (counts == 0).mean() < 0.1
    assert 0.01 < (counts >= 12).mean() < 0.1
    assert np.mean(counts) == pytest.approx(4.6, abs=0.8)
    labels = np.concatenate([s.labels for s in MANY.read().splits["train"]])
    assert (np.bincount(labels, minlength=3) > 0.25 * len(labels)).all()
    assert not len(boxes_of(replace(SMALL, empty=1.0, dense=0.0)))
    assert not len(boxes_of(replace(SMALL, objects=0.0)))


@pytest.mark.parametrize("label", range(len(SYNTHETIC_NAMES)))
def test_boxes_are_the_extent_of_what_is_drawn(label):
    """Without noise and background the grey values say where the object is."""
    data = SyntheticDetections(
        num_train=80, num_val=0, num_test=0, classes=5, objects=1.0, dense=0.0, empty=0.0, noise=0.0
    )
    seen = 0
    for split, number in (("train", i) for i in range(80)):
        _, things = data._things(split, number)
        for thing in (t for t in things if t.label == label):
            frame = np.zeros(data.size, np.float32)
            thing.draw(frame)
            cover = frame / thing.change
            columns, rows = np.flatnonzero(cover.max(0) > 0), np.flatnonzero(cover.max(1) > 0)
            x1, y1, x2, y2 = thing.box
            assert (columns[0], rows[0]) == (int(x1), int(y1))
            assert (columns[-1] + 1, rows[-1] + 1) == (np.ceil(x2), np.ceil(y2))
            assert cover.max() <= 1 + 1e-6
            seen += 1
    assert seen >= 5


def test_a_threshold_finds_most_objects():
    """High contrast: what a person would box is boxed, and little else stands out."""
    found = total = invented = 0
    for sample in MANY.read().splits["train"][:60]:
        frame = MANY.image(sample.name)[0].astype(np.float32)
        away = np.abs(frame - cv2.medianBlur(MANY.image(sample.name)[0], 41)) > 40
        regions, _ = ndimage.label(away, np.ones((3, 3)))
        parts = [s for s in ndimage.find_objects(regions) if min(s[0].stop - s[0].start, s[1].stop - s[1].start) > 1]
        guesses = np.array([(s[1].start, s[0].start, s[1].stop, s[0].stop) for s in parts], float).reshape(-1, 4)
        overlap = iou_matrix(guesses, sample.boxes) if len(guesses) else np.zeros((1, len(sample.boxes)))
        found += (overlap.max(0, initial=0) > 0.5).sum()
        total += len(sample.boxes)
        invented += (overlap.max(1, initial=0) < 0.1).sum()
    assert found > 0.75 * total
    assert invented < 0.5 * total


def test_frames_are_drawn_quickly():
    start = time.process_time()
    for i in range(50):
        MANY.image(f"train_{i:04d}")
    assert time.process_time() - start < 3  # about 0.15 s on one core


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_train": -1}, "frames for train, val and test"),
        ({"num_train": 0, "num_val": 0, "num_test": 0}, "at least one"),
        ({"size": (20, 128)}, "size is"),
        ({"classes": 6}, "classes is 6, expected 1 to 5"),
        ({"seed": -1}, "seed"),
        ({"noise": float("nan")}, "noise"),
        ({"sides": (3.0, 9.0)}, "sides"),
        ({"sides": (8.0, 90.0)}, "sides"),
        ({"contrast": (90.0, 40.0)}, "contrast"),
        ({"empty": 0.7, "dense": 0.6}, "empty"),
    ],
)
def test_wrong_arguments_are_named(change, text):
    with pytest.raises(InputError, match=text) as error:
        replace(SMALL, **change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["train_0006", "train_6", "other_0000", "train_-001", "", "val_00000"])
def test_unknown_frames_are_named(name):
    with pytest.raises(InputError, match="expected one of 6 train_#### or 3 val_#### or 2 test_####"):
        SMALL.image(name)


# ---- canvases -------------------------------------------------------------------------------------------------------


def frames(count=6, **change):
    data = replace(SMALL, num_train=count, **change)
    samples = data.read().splits["train"]
    return [data.image(s.name) for s in samples], samples


def test_a_grid_holds_every_frame_and_its_boxes():
    images, samples = frames()
    crowd = samples[1].crowd.copy()
    crowd[:1] = True
    samples[1] = replace(samples[1], crowd=crowd)
    canvas = grid_canvas(images, samples, columns=4, rows=2)  # the first two come again
    assert canvas.image.shape == (3, 2 * 96, 4 * 128)
    expected = []
    for place in range(8):
        y, x, i = 96 * (place // 4), 128 * (place % 4), place % 6
        assert np.array_equal(canvas.image[:, y : y + 96, x : x + 128], images[i])
        expected += [
            (box + (x, y, x, y)).tolist()  # noqa: RUF005
            for box, c in zip(samples[i].boxes, samples[i].crowd, strict=True)
            if not c
        ]
    np.testing.assert_array_equal(canvas.boxes, np.array(expected, np.float32))
    assert canvas.boxes.dtype == np.float32
    assert len(samples[1].boxes) == 3  # one of them, a crowd, is left out twice
    assert len(canvas.labels) == len(canvas.boxes) == sum(len(samples[p % 6].boxes) for p in range(8)) - 2
    sample = canvas.sample("big", image_id=3)
    assert (sample.name, sample.size, sample.image_id, sample.group) == ("big", (192, 512), 3, "big")
    assert sample.area == pytest.approx((canvas.boxes[:, 2:] - canvas.boxes[:, :2]).prod(1))


def test_a_4k_canvas():
    image, no = np.zeros((1, 256, 320), np.uint8), np.zeros(0)
    sample = DetectionSample(
        "x", Path(), np.zeros((0, 4), np.float32), no.astype(int), no.astype(np.float32), no > 0, None, 0, "x"
    )
    canvas = grid_canvas([image], [sample])
    assert canvas.image.shape == (1, 2048, 3840)
    assert canvas.boxes.shape == (0, 4)


def flat_frames(seed=0, count=4):
    """Frames of one grey value, each with one bright object whose pixels fill its box."""
    rng = np.random.default_rng(seed)
    images, samples = [], []
    for i in range(count):
        image = np.full((3, 96, 128), 40 + 10 * i, np.uint8)
        w, h = rng.integers(8, 20, 2)
        x, y = rng.integers(10, 60, 2)
        image[:, y : y + h, x : x + w] = 150 + i
        box = np.array([[x, y, x + w, y + h]], np.float32)
        label, area, crowd = np.array([i % 3]), np.array([w * h], np.float32), np.zeros(1, bool)
        samples.append(DetectionSample(str(i), Path(), box, label, area, crowd, (96, 128), i, str(i)))
        images.append(image)
    return images, samples


def test_pasted_objects_lie_exactly_in_their_boxes():
    images, samples = flat_frames()
    before = [image.copy() for image in images]
    canvas = dense_composite(images, samples, boxes=40, seed=1, columns=3, rows=2)
    assert canvas.image.shape == (3, 192, 384)
    assert len(canvas.boxes) == len(canvas.labels) == 40
    assert all(np.array_equal(a, b) for a, b in zip(images, before, strict=True))
    bright = canvas.image[0] > 100  # every background is below
    painted = np.zeros_like(bright)
    for x1, y1, x2, y2 in canvas.boxes.astype(int):
        assert bright[y1:y2, x1:x2].all()
        assert not painted[y1:y2, x1:x2].any()
        painted[y1:y2, x1:x2] = True
    assert np.array_equal(bright, painted)  # and nothing beside the boxes
    sizes = {
        (int(b[2] - b[0]), int(b[3] - b[1])): int(n) for s in samples for b, n in zip(s.boxes, s.labels, strict=True)
    }
    for box, label in zip(canvas.boxes, canvas.labels, strict=True):
        assert sizes[(int(box[2] - box[0]), int(box[3] - box[1]))] == label


def test_composites_follow_from_the_seed():
    images, samples = frames(count=12)
    one, same, other = (dense_composite(images, samples, 60, seed) for seed in (3, 3, 4))
    assert np.array_equal(one.image, same.image)
    assert np.array_equal(one.boxes, same.boxes)
    assert not np.array_equal(one.image, other.image)
    assert len(one.boxes) == 60
    overlap = iou_matrix(one.boxes, one.boxes)
    assert (overlap[~np.eye(60, dtype=bool)] == 0).all()


def test_a_composite_stops_where_there_is_no_room():
    images, samples = flat_frames()
    full = dense_composite(images, samples, boxes=3000, seed=0, columns=1, rows=1)
    assert 10 < len(full.boxes) < 60
    assert len(dense_composite(images, samples, boxes=0, seed=0).boxes) == 4


def test_objects_that_do_not_stand_out_are_not_pasted():
    images, samples = flat_frames()
    with pytest.raises(InputError, match="no object with a longer side of 8 to 25 px stands out"):
        dense_composite([np.full_like(i, 90) for i in images], samples, 20, 0)
    with pytest.raises(InputError, match="30 to 40 px"):
        dense_composite(images, samples, 20, 0, sides=(30, 40))


def test_canvases_refuse_frames_that_do_not_fit():
    images, samples = frames(2)
    for wrong in ([], [images[0], images[1][:, :50]]):
        with pytest.raises(InputError, match="frames of"):
            grid_canvas(wrong, samples[: len(wrong)])
    with pytest.raises(InputError, match="one sample each"):
        dense_composite(images, samples[:1], 10, 0)
    with pytest.raises(InputError, match="0 columns"):
        grid_canvas(images, samples, columns=0)


@pytest.mark.data
def test_real_frames_make_crowded_scenes():
    root = Path(os.environ.get("LIT_DATA", "")) / "drone_ir"
    if "LIT_DATA" not in os.environ or not root.is_dir():
        pytest.skip("LIT_DATA names no folder with drone_ir")
    data = json.loads((root / "annotations" / "val.json").read_text())
    images, samples = [], []
    for entry in data["images"][:60]:
        file = next(p for p in (root / entry["file_name"], root / "val" / entry["file_name"]) if p.is_file())
        own = [a for a in data["annotations"] if a["image_id"] == entry["id"]]
        boxes = np.array([a["bbox"] for a in own], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = np.array([a["category_id"] - 1 for a in own])
        area, crowd = (boxes[:, 2:] - boxes[:, :2]).prod(1), np.zeros(len(boxes), bool)
        samples.append(DetectionSample(file.stem, file, boxes, labels, area, crowd, None, entry["id"], file.stem))
        images.append(np.ascontiguousarray(cv2.imread(str(file)).transpose(2, 0, 1)))
    for wanted, columns in ((100, 2), (500, 3)):
        canvas = dense_composite(images, samples, wanted, 0, columns=columns, rows=columns)
        assert isinstance(canvas, Canvas)
        assert len(canvas.boxes) == wanted
        longer = (canvas.boxes[:, 2:] - canvas.boxes[:, :2]).max(1)
        assert 10 < np.median(longer) < 25
    assert grid_canvas(images, samples).image.shape == (3, 2048, 3840)
