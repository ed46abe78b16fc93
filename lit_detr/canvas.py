"""Scenes made of other frames, with exact boxes: crowded ones for dense detection, large ones for tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_cli.errors import InputError
from lit_detr.samples import DetectionSample

__all__ = ["Canvas", "dense_composite", "grid_canvas"]

_RIM = 2  # pixels around a box that show its background
_TRIES = 30  # places per box wanted
_VISIBLE = 0.08  # least share of a box that its object must cover to be pasted

_Boxes = NDArray[np.float32]
_Image = NDArray[np.uint8]


class _Cut(NamedTuple):
    """An object without its background: (C, H, W) changes of the grey value, and its box in them."""

    change: NDArray[np.float32]
    box: NDArray[np.float64]


class Canvas(NamedTuple):
    """A picture made of others.

    Attributes:
        image: (C, H, W).
        boxes: (N, 4) float32 x1 y1 x2 y2 in its pixels.
        labels: (N,) int64.
    """

    image: _Image
    boxes: _Boxes
    labels: NDArray[np.int64]

    def sample(self, name: str, image_id: int = 0, group: str = "") -> DetectionSample:
        """Its annotation as that of a data set."""
        area = (self.boxes[:, 2:] - self.boxes[:, :2]).prod(1)
        size = self.image.shape[1], self.image.shape[2]
        crowd = np.zeros(len(self.boxes), bool)
        return DetectionSample(name, Path(), self.boxes, self.labels, area, crowd, size, image_id, group or name)


def grid_canvas(
    images: Sequence[_Image], samples: Sequence[DetectionSample], columns: int = 12, rows: int = 8
) -> Canvas:
    """Lay frames side by side: 12 x 8 of 320 x 256 pixels are 3840 x 2048.

    Args:
        images: (C, H, W) each, all of one size, row by row; from the first again where they are fewer than places.
        samples: What is on each. Boxes of crowds are left out.
        columns: Frames next to each other.
        rows: Frames below each other.

    Raises:
        InputError: No frame, frames of several sizes, or another number of samples.

    Example:
        >>> from lit_detr.synthetic import SyntheticDetections
        >>> data = SyntheticDetections(num_train=2, num_val=0, num_test=0, size=(48, 64))
        >>> samples = data.read().splits["train"]
        >>> grid_canvas([data.image(s.name) for s in samples], samples, columns=2, rows=1).image.shape
        (3, 48, 128)
    """
    channels, height, width = _check(images, samples)
    if min(columns, rows) < 1:
        raise InputError(f"grid: {columns} columns and {rows} rows, expected 1 or more")
    canvas = np.empty((channels, rows * height, columns * width), np.uint8)
    boxes: list[_Boxes] = []
    labels: list[NDArray[np.int64]] = []
    for place in range(rows * columns):
        image, sample = images[place % len(images)], samples[place % len(images)]
        y, x = (place // columns) * height, (place % columns) * width
        canvas[:, y : y + height, x : x + width] = image
        boxes.append(sample.boxes[~sample.crowd] + np.array([x, y, x, y], np.float32))
        labels.append(sample.labels[~sample.crowd])
    return Canvas(canvas, np.concatenate(boxes).astype(np.float32), np.concatenate(labels))


def dense_composite(
    images: Sequence[_Image],
    samples: Sequence[DetectionSample],
    boxes: int,
    seed: int,
    *,
    columns: int = 2,
    rows: int = 2,
    sides: tuple[float, float] = (8.0, 25.0),
    gap: int = 1,
) -> Canvas:
    """A crowded scene: frames side by side, and their objects pasted wherever nothing is.

    Objects keep their size and are mirrored at random. An object is what differs from the background around its box;
    the difference is added to the new background, and only where enough of it can be seen there.

    Args:
        images: (C, H, W) each, all of one size: background and source of the crops.
        samples: What is on each.
        boxes: Number of boxes to reach; fewer come out where there is no room, and never fewer than the frames have.
        seed: Of all that is drawn: the frames, the objects, their places.
        columns: Frames next to each other.
        rows: Frames below each other.
        sides: Range of the longer side of pasted objects in pixels.
        gap: Pixels between an object, with its rim of two pixels, and everything else.

    Raises:
        InputError: As `grid_canvas`; or no object within `sides` stands out from its background.
    """
    _, height, width = _check(images, samples)
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(images), columns * rows, replace=len(images) < columns * rows)
    scene = grid_canvas([images[i] for i in chosen], [samples[i] for i in chosen], columns, rows)
    cuts = [
        (cut, int(label))
        for image, sample in zip(images, samples, strict=True)
        for box, label, crowd in zip(sample.boxes.tolist(), sample.labels, sample.crowd, strict=True)
        if not crowd and sides[0] <= max(box[2] - box[0], box[3] - box[1]) <= sides[1] and (cut := _cut(image, box))
    ]
    if not cuts:
        raise InputError(f"composite: no object with a longer side of {sides[0]:g} to {sides[1]:g} px stands out")
    canvas, found, labels = scene.image, scene.boxes.tolist(), scene.labels.tolist()
    taken = np.zeros(canvas.shape[1:], bool)
    for place, i in enumerate(chosen):  # crowds too: nothing is pasted over them
        y, x = (place // columns) * height, (place % columns) * width
        for x1, y1, x2, y2 in samples[i].boxes.tolist():
            top, left = y + max(0, math.floor(y1) - gap), x + max(0, math.floor(x1) - gap)
            taken[top : y + math.ceil(y2) + gap, left : x + math.ceil(x2) + gap] = True
    for _ in range(_TRIES * boxes):
        if len(found) >= boxes:
            break
        cut, label = cuts[int(rng.integers(len(cuts)))]
        change, box = cut
        if rng.random() < 0.5:
            change, box = change[:, :, ::-1], box.copy()
            box[[0, 2]] = change.shape[2] - box[[2, 0]]
        h, w = change.shape[1:]
        y, x = (int(rng.integers(0, side - s + 1)) for side, s in zip(canvas.shape[1:], (h, w), strict=True))
        if taken[max(0, y - gap) : y + h + gap, max(0, x - gap) : x + w + gap].any():
            continue
        under = canvas[:, y : y + h, x : x + w]
        after = np.clip(np.rint(under + change), 0, 255)
        if np.abs(after - under).sum() < np.abs(change).sum() / 2:  # bright on bright: it would not be seen
            continue
        under[:] = after.astype(np.uint8)
        taken[y : y + h, x : x + w] = True
        found.append((box + np.array([x, y, x, y])).tolist())
        labels.append(label)
    return Canvas(canvas, np.array(found, np.float32).reshape(-1, 4), np.array(labels, np.int64))


def _cut(image: _Image, box: Sequence[float]) -> _Cut | None:
    """Take an object out of its frame: what differs from the median of a rim by more than the rim's own spread.

    The background stays behind, or else the edge of the crop would give the box away. None where the object does not
    stand out from the background, or reaches the edge of the frame.
    """
    _, height, width = image.shape
    x1, y1, x2, y2 = box
    left, top, right, bottom = (
        math.floor(x1) - _RIM,
        math.floor(y1) - _RIM,
        math.ceil(x2) + _RIM,
        math.ceil(y2) + _RIM,
    )
    if left < 0 or top < 0 or right > width or bottom > height:
        return None
    crop = image[:, top:bottom, left:right].astype(np.float32)
    rim = np.ones(crop.shape[1:], bool)
    rim[_RIM:-_RIM, _RIM:-_RIM] = False
    middle = np.median(crop[:, rim], axis=1)[:, None, None]
    change = crop - middle
    spread = 1.5 * float(np.median(np.abs(change[:, rim]))) + 2
    share = np.clip(np.abs(change).max(0) / spread / 2 - 1, 0, 1)  # nothing below two spreads, all above four
    share[rim] = 0
    if share.sum() < _VISIBLE * (x2 - x1) * (y2 - y1):
        return None
    return _Cut(change * share, np.array([x1 - left, y1 - top, x2 - left, y2 - top]))


def _check(images: Sequence[_Image], samples: Sequence[DetectionSample]) -> tuple[int, int, int]:
    shapes = {image.shape for image in images}
    if len(shapes) != 1 or len(images) != len(samples):
        raise InputError(
            f"canvas: {len(images)} frames of {len(shapes)} sizes and {len(samples)} samples, expected one sample each "
            "and frames of one size"
        )
    channels, height, width = shapes.pop()
    return channels, height, width
