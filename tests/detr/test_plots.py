"""Pictures of detections: what is a hit, colours at the right pixels, crops of tiny objects."""

import numpy as np
import pytest

from lit_detr.coco import ImageResult
from lit_detr.plots import COLOURS, Mark, detection_picture, marks
from lit_detr.synthetic import SyntheticDetections

HEADER = 24


def result(found=(), true=(), labels=(), true_labels=(), scores=(), crowd=None):
    boxes = np.array(true, float).reshape(-1, 4)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    crowd = np.zeros(len(boxes), bool) if crowd is None else np.array(crowd)
    ints = (np.array(x, int) for x in (labels, true_labels))
    return ImageResult(
        0, np.array(found, float).reshape(-1, 4), np.array(scores, float), next(ints), boxes, next(ints), area, crowd
    )


A, B, C = (10, 10, 20, 20), (40, 40, 52, 50), (70, 10, 80, 18)


def extent(picture, colour):
    """x1 y1 x2 y2 of all pixels of one colour."""
    rows, columns = np.nonzero((picture == colour).all(-1))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_hits_misses_and_false_alarms():
    scene = result([A, B, C, A], [A, B], [0, 1, 0, 0], [0, 0], [0.9, 0.8, 0.7, 0.95])
    found = [(m.kind, m.box, m.label, m.score) for m in marks(scene)]
    assert found == [
        ("miss", B, 0, None),
        ("false alarm", A, 0, 0.9),  # the second on the same object
        ("false alarm", B, 1, 0.8),  # another class
        ("false alarm", C, 0, 0.7),
        ("hit", A, 0, 0.95),
    ]
    assert marks(scene)[-1].truth == A
    assert [m.kind for m in marks(scene, threshold=0.92)] == ["miss", "hit"]
    moved = result([(14, 10, 24, 20)], [A], [0], [0], [0.9])  # an IoU of 3/7
    assert [m.kind for m in marks(moved)] == ["miss", "false alarm"]
    assert [m.kind for m in marks(moved, iou=0.4)] == ["hit"]


def test_a_crowd_is_neither_missed_nor_found():
    scene = result([A, (12, 12, 18, 18), C], [(0, 0, 30, 30), C], [0, 0, 0], [0, 0], [0.9, 0.8, 0.7], [True, False])
    assert [(m.kind, m.score) for m in marks(scene)] == [("hit", 0.7), ("crowd", None)]


def test_nothing_at_all():
    assert marks(result()) == []
    picture = detection_picture(np.full((1, 64, 80), 90, np.uint8), [])
    assert picture.shape == (HEADER + 512, 640, 3)
    assert (picture[HEADER:] == 90).all()


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("zoom", [1, 4])
def test_frames_lie_around_their_boxes(channels, zoom):
    image = np.full((channels, 60, 100), 40, np.uint8)
    for kind in COLOURS:
        mark = Mark(kind, (30.0, 30.0, 45.0, 40.0), 0, None)
        picture = detection_picture(image, [mark], [""], least_side=60 * zoom, crops=0)
        assert picture.shape == (HEADER + 60 * zoom, 100 * zoom, 3)
        expected = np.array([30, 30, 45, 40]) * zoom + (-3, -3, 3, 3)
        np.testing.assert_array_equal(extent(picture[HEADER:], COLOURS[kind]), expected)
        inside = picture[HEADER + 30 * zoom : HEADER + 40 * zoom, 30 * zoom : 45 * zoom]
        assert (inside == 40).all()  # the object is not painted over
    assert (image == 40).all()


def test_tiny_objects_are_magnified():
    image = np.zeros((3, 96, 96), np.uint8)
    image[:, 40:44, 60:64] = 200
    tiny, large = Mark("hit", (60.0, 40.0, 64.0, 44.0), 0, 0.5), Mark("miss", (2.0, 2.0, 50.0, 50.0), 0, None)
    picture = detection_picture(image, [large, tiny], ["dot"], least_side=384, crops=4)
    side = 96
    assert picture.shape == (HEADER + 384, 384 + side, 3)
    crop = picture[HEADER : HEADER + side, 384:]
    rows, columns = np.nonzero((crop == 200).all(-1))
    assert columns.max() - columns.min() + 1 == pytest.approx(4 * side / 16, abs=1)  # 16 pixels on 96
    assert (columns.mean(), rows.mean()) == pytest.approx((side / 2 - 0.5, side / 2 - 0.5), abs=1)
    assert len(set(map(tuple, picture[HEADER + 2 * side :, 384:].reshape(-1, 3)))) == 1  # no second crop
    assert detection_picture(image, [large], least_side=384).shape == (HEADER + 384, 384, 3)


@pytest.mark.parametrize("box", [(0, 0, 3, 3), (93, 93, 96, 96), (-4, -2, 5, 3), (94, 40, 99, 43), (5, 5, 5, 5)])
def test_boxes_at_the_edge(box):
    image = np.full((1, 96, 96), 7, np.uint8)
    for kind in COLOURS:
        mark = Mark(kind, tuple(map(float, box)), 3, 0.25)
        picture = detection_picture(image, [mark], ["a"], caption="edge")
        assert picture.dtype == np.uint8
        assert (picture == COLOURS[kind]).all(-1).any()


def test_the_header_counts_what_is_known():
    """Boxes whose truth nobody knows are no hits."""
    image = np.zeros((1, 96, 96), np.uint8)
    found = [Mark("found", (10.0, 10.0, 20.0, 20.0), 0, 0.9)]
    header = detection_picture(image, found, known=False)[:HEADER]
    assert (header == COLOURS["found"]).all(-1).any()
    assert not any((header == COLOURS[kind]).all(-1).any() for kind in ("hit", "miss", "false alarm"))
    assert all((detection_picture(image, [])[:HEADER] == COLOURS[kind]).all(-1).any() for kind in ("hit", "miss"))


def test_hundreds_of_boxes():
    data = SyntheticDetections(num_train=1, num_val=0, num_test=0, size=(256, 320), objects=80.0, empty=0.0)
    sample = data.read().splits["train"][0]
    assert len(sample.boxes) > 40
    scene = result(sample.boxes + 0.5, sample.boxes, sample.labels, sample.labels, np.linspace(1, 0, len(sample.boxes)))
    found = marks(scene, threshold=0.5)
    assert {m.kind for m in found} == {"hit", "miss"}
    picture = detection_picture(data.image(sample.name), found, data.read().class_names, caption=sample.name, crops=8)
    assert picture.shape[0] == HEADER + 512
    for kind in ("hit", "miss"):
        assert (picture == COLOURS[kind]).all(-1).sum() > 100
