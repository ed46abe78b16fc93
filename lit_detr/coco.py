"""The COCO protocol: evaluation through faster-coco-eval, and its matching in numpy for what that library keeps inside.

An image is evaluated class by class: detections in falling order of score each take the free box of largest overlap at
or above a threshold. Boxes of a crowd, and boxes outside the range of areas that is looked at, are ignored: a detection
that takes one is neither right nor wrong, and neither is one that takes nothing and is itself outside the range.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_cli.errors import InputError

__all__ = [
    "IOU_THRESHOLDS",
    "RECALLS",
    "Evaluation",
    "ImageResult",
    "Matches",
    "evaluate",
    "greedy_match",
    "iou_matrix",
    "match_image",
    "require_evaluator",
]

IOU_THRESHOLDS: NDArray[np.float64] = np.linspace(0.5, 0.95, 10)
RECALLS: NDArray[np.float64] = np.linspace(0.0, 1.0, 101)
_ALL = (0.0, 1e10)

_Floats = NDArray[np.float64]
_Bools = NDArray[np.bool_]
Range = tuple[float, float]


class ImageResult(NamedTuple):
    """What was found in an image and what is there; boxes are x1 y1 x2 y2 in pixels.

    Attributes:
        image_id: Identifies the image.
        boxes: (D, 4) float64, found.
        scores: (D,) float64.
        labels: (D,) int64 class indices.
        true_boxes: (G, 4) float64, annotated.
        true_labels: (G,) int64.
        area: (G,) float64 as annotated.
        crowd: (G,) bool.
    """

    image_id: int
    boxes: _Floats
    scores: _Floats
    labels: NDArray[np.int64]
    true_boxes: _Floats
    true_labels: NDArray[np.int64]
    area: _Floats
    crowd: _Bools


class Evaluation(NamedTuple):
    """Accumulated figures; -1 where there is nothing to find.

    Attributes:
        precision: (10 IoU thresholds, 101 recalls, classes, ranges, limits).
        recall: (10 IoU thresholds, classes, ranges, limits).
    """

    precision: _Floats
    recall: _Floats


class Matches(NamedTuple):
    """The detections of one class in one image, highest score first.

    Attributes:
        order: (D,) their places among the image's detections.
        taken: (T, D) place of the box that each takes among the image's boxes, -1 without.
        ignored: (T, D) bool: neither right nor wrong.
        positives: Boxes that were to be found.
    """

    order: NDArray[np.int64]
    taken: NDArray[np.int64]
    ignored: _Bools
    positives: int


def require_evaluator() -> None:
    """Find out before a run, not at its first validation.

    Raises:
        InputError: faster-coco-eval is not installed.
    """
    if importlib.util.find_spec("faster_coco_eval") is None:
        raise InputError("detection metrics: the package faster-coco-eval is missing, expected 1.7 or newer")


def evaluate(
    results: Sequence[ImageResult], num_classes: int, ranges: Sequence[Range], max_detections: Sequence[int]
) -> Evaluation:
    """Evaluate all ranges of areas and all limits in one pass.

    Matching once with the largest limit serves the smaller ones too: detections are matched in the order of their
    scores, so that the first hundred match as if the others were not there.

    Args:
        results: Images, each once; their order decides between equal scores.
        num_classes: Classes are 0 to `num_classes` - 1.
        ranges: Lower and upper bound of the annotated area, both inclusive as in COCO.
        max_detections: Detections per image and class that count, ascending.
    """
    if not results:
        shape = (num_classes, len(ranges), len(max_detections))
        return Evaluation(np.full((10, 101, *shape), -1.0), np.full((10, *shape), -1.0))
    with _no_collection():
        return _evaluate(results, num_classes, ranges, max_detections)


def _evaluate(
    results: Sequence[ImageResult], num_classes: int, ranges: Sequence[Range], max_detections: Sequence[int]
) -> Evaluation:
    from faster_coco_eval import COCO, COCOeval_faster

    images = [{"id": i} for i in range(len(results))]
    categories = [{"id": k} for k in range(num_classes)]
    truth: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for i, result in enumerate(results):
        # Numbers begin with 1: 0 would say "not matched". Areas of detections are those of their boxes.
        there = zip(*_rows(result.true_boxes, result.true_labels, result.area, result.crowd), strict=True)
        truth += [
            {"id": n, "image_id": i, "category_id": label, "bbox": box, "area": area, "iscrowd": int(crowd)}
            for n, (box, label, area, crowd) in enumerate(there, start=len(truth) + 1)
        ]
        got = zip(*_rows(result.boxes, result.labels, result.scores), strict=True)
        found += [
            {"id": n, "image_id": i, "category_id": label, "bbox": box, "score": score, "area": box[2] * box[3]}
            for n, (box, label, score) in enumerate(got, start=len(found) + 1)
        ]
    sets = [COCO({"images": images, "categories": categories, "annotations": rows}) for rows in (truth, found)]
    evaluator = COCOeval_faster(*sets, iouType="bbox", print_function=_silent)
    evaluator.params.areaRng = [list(bounds) for bounds in ranges]
    evaluator.params.areaRngLbl = [str(i) for i in range(len(ranges))]
    evaluator.params.maxDets = list(max_detections)
    evaluator.evaluate()
    evaluator.accumulate()
    return Evaluation(np.asarray(evaluator.eval["precision"]), np.asarray(evaluator.eval["recall"]))


@contextmanager
def _no_collection() -> Iterator[None]:
    """A dictionary per detection: looking for cycles among them again and again takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _silent(*_: object) -> None:
    pass


def _rows(boxes: _Floats, *columns: NDArray[Any]) -> list[list[Any]]:
    """Plain numbers: boxes as x y w h, then the columns."""
    size = np.maximum(boxes[:, 2:] - boxes[:, :2], 0)
    return [np.concatenate([boxes[:, :2], size], 1).tolist(), *(column.tolist() for column in columns)]


# Matching


def iou_matrix(boxes: NDArray[Any], others: NDArray[Any], crowd: _Bools | None = None) -> _Floats:
    """Intersection over union, 0 where both are of no size.

    Args:
        boxes: (D, 4) x1 y1 x2 y2.
        others: (G, 4).
        crowd: (G,) where the union is the first box alone, so that any part of a crowd matches it.

    Returns:
        (D, G).

    Example:
        >>> iou_matrix(np.array([[0, 0, 2, 2]]), np.array([[0, 0, 2, 1], [1, 1, 3, 3]])).round(3)
        array([[0.5  , 0.143]])
    """
    boxes, others = boxes.astype(np.float64), others.astype(np.float64)
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = np.maximum(high - low, 0).prod(-1)
    own, other = (np.maximum(b[:, 2:] - b[:, :2], 0).prod(-1) for b in (boxes, others))
    union = own[:, None] + other[None] - shared
    if crowd is not None:
        union = np.where(crowd[None], own[:, None], union)
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def greedy_match(
    iou: _Floats, thresholds: NDArray[np.floating[Any]], ignore: _Bools, crowd: _Bools
) -> NDArray[np.int64]:
    """Give each detection a box, at each threshold on its own.

    Args:
        iou: (D, G), detections in falling order of score.
        thresholds: (T,) least overlap.
        ignore: (G,) boxes that are taken only where no other is left.
        crowd: (G,) boxes that several detections may take; they are ignored as well.

    Returns:
        (T, D) index of the box taken, -1 without.

    Example:
        >>> iou = np.array([[0.6, 0.8], [0.9, 0.7]])
        >>> no = np.zeros(2, bool)
        >>> greedy_match(iou, np.array([0.5, 0.75]), no, no)
        array([[1, 0],
               [1, 0]])
    """
    count, boxes = iou.shape
    result = np.full((len(thresholds), count), -1, np.int64)
    if not boxes:
        return result
    least = np.minimum(thresholds, 1 - 1e-10)[:, None]
    free = np.ones((len(thresholds), boxes), bool)
    rows = np.arange(len(thresholds))
    regular = ~(ignore | crowd)
    for d in np.flatnonzero(iou.max(1) >= least.min()):
        possible = (iou[d] >= least) & free
        preferred = possible & regular
        possible = np.where(preferred.any(1, keepdims=True), preferred, possible)
        # Of equal overlaps the last, as in COCO: argmax over the reversed row.
        best = boxes - 1 - np.where(possible, iou[d], -1.0)[:, ::-1].argmax(1)
        hit = possible[rows, best]
        result[hit, d] = best[hit]
        free[rows[hit], best[hit]] = crowd[best[hit]]
    return result


def match_image(
    result: ImageResult,
    label: int,
    bounds: Range = _ALL,
    thresholds: NDArray[np.floating[Any]] = IOU_THRESHOLDS,
    max_detections: int | None = None,
) -> Matches:
    """Match the detections of one class in one image.

    Args:
        result: The image.
        label: The class.
        bounds: Range of areas, both ends inclusive.
        thresholds: (T,) of the overlap.
        max_detections: How many of the highest scores take part, by default all.
    """
    mine, true = np.flatnonzero(result.labels == label), np.flatnonzero(result.true_labels == label)
    order = mine[np.argsort(-result.scores[mine], kind="stable")][:max_detections]
    area, crowd = result.area[true], result.crowd[true]
    ignore = crowd | (area < bounds[0]) | (area > bounds[1])
    places = greedy_match(iou_matrix(result.boxes[order], result.true_boxes[true], crowd), thresholds, ignore, crowd)
    size = result.boxes[order]
    own = np.maximum(size[:, 2:] - size[:, :2], 0).prod(1)
    outside = (own < bounds[0]) | (own > bounds[1])
    none = places < 0
    if len(true):
        ignored = np.where(none, outside[None], ignore[places])
        taken = np.where(none, -1, true[places])
    else:
        ignored, taken = np.broadcast_to(outside[None], places.shape).copy(), places
    return Matches(order, taken, ignored, int((~ignore).sum()))
