"""Drawn infrared frames with tiny objects: for demonstrations and tests without any data.

Shapes are drawn on a finer grid and averaged down, and a box is the extent of its shape, so that boxes are exact to a
fraction of a pixel however small the object is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from lit_cli.errors import InputError
from lit_detr.samples import DetectionSample, DetectionTable

__all__ = ["SYNTHETIC_NAMES", "SyntheticDetections"]

SYNTHETIC_NAMES = ("cross", "ring", "bar", "wedge", "disc")
"""The shapes that are drawn, in the order of the classes."""

_SPLITS = ("train", "val", "test")
_MIN_SIDE = 48
_LEAST = 5.0  # pixels of the longer side: smaller shapes look alike
_FINE = 4  # samples per pixel along each axis
_GAP = 3.0  # pixels between boxes, so that shapes stay apart
_TRIES = 30

_Field = NDArray[np.float32]
_Image = NDArray[np.uint8]


@dataclass(frozen=True)
class SyntheticDetections:
    """A data set of drawn frames.

    The background is a warm gradient with smooth texture, a few edges and the sensor's noise; objects are brighter or
    darker than what is around them. A frame depends on the seed, its split and its number alone.

    Args:
        num_train: Frames of the split `train`; 0 leaves a split out.
        num_val: Frames of `val`.
        num_test: Frames of `test`.
        size: Height and width in pixels.
        classes: How many of `SYNTHETIC_NAMES`, from the first.
        seed: Of everything random.
        channels: Equal channels of a frame.
        objects: Mean number per frame (Poisson).
        sides: Range of the longer side of an object in pixels.
        very_tiny: Share of objects with a longer side from 5 px to the smaller of `sides`.
        empty: Share of frames without objects.
        dense: Share of frames with five times as many objects, as far as there is room.
        contrast: Range of the difference from the background in grey values.
        noise: Standard deviation of the noise in grey values.

    Raises:
        InputError: An argument is out of range.

    Example:
        >>> data = SyntheticDetections(num_train=4, num_val=2, num_test=0, size=(64, 80))
        >>> [s.name for s in data.read().splits["val"]], data.read().class_names
        (['val_0000', 'val_0001'], ['cross', 'ring', 'bar'])
        >>> data.image("val_0001").shape
        (3, 64, 80)
    """

    num_train: int = 64
    num_val: int = 16
    num_test: int = 16
    size: tuple[int, int] = (160, 192)
    classes: int = 3
    seed: int = 0
    channels: int = 3
    objects: float = 4.0
    sides: tuple[float, float] = (8.0, 24.0)
    very_tiny: float = 0.1
    empty: float = 0.05
    dense: float = 0.05
    contrast: tuple[float, float] = (60.0, 110.0)
    noise: float = 4.0

    def __post_init__(self) -> None:
        counts = self.num_train, self.num_val, self.num_test
        if min(counts) < 0 or not sum(counts):
            raise InputError(f"synthetic: {counts} frames for train, val and test, expected at least one")
        if len(self.size) != 2 or min(self.size) < _MIN_SIDE:
            raise InputError(f"synthetic: size is {self.size}, expected height and width of at least {_MIN_SIDE}")
        if not 1 <= self.classes <= len(SYNTHETIC_NAMES):
            raise InputError(f"synthetic: classes is {self.classes}, expected 1 to {len(SYNTHETIC_NAMES)}")
        if self.seed < 0 or self.channels < 1 or not 0 <= self.noise < math.inf or not 0 <= self.objects < math.inf:
            raise InputError("synthetic: expected seed, noise and objects of 0 or more and channels of 1 or more")
        if not _LEAST <= self.sides[0] <= self.sides[1] <= min(self.size) / 2:
            raise InputError(
                f"synthetic: sides is {self.sides}, expected {_LEAST:g} to half the frame, the smaller first"
            )
        if not 0 <= self.contrast[0] <= self.contrast[1] <= 255:
            raise InputError(f"synthetic: contrast is {self.contrast}, expected 0 to 255, the smaller first")
        if not all(0 <= share <= 1 for share in (self.very_tiny, self.empty, self.dense, self.empty + self.dense)):
            raise InputError("synthetic: expected very_tiny, empty, dense and empty + dense from 0 to 1")

    def read(self) -> DetectionTable:
        """The table of the data set. Its samples have no files: `image` draws them by name."""
        splits = {
            split: [self._sample(split, i) for i in range(count)]
            for split, count in zip(_SPLITS, (self.num_train, self.num_val, self.num_test), strict=True)
            if count
        }
        return DetectionTable(splits, list(SYNTHETIC_NAMES[: self.classes]), list(range(1, self.classes + 1)))

    def image(self, name: str) -> _Image:
        """Draw a frame.

        Returns:
            (channels, H, W).

        Raises:
            InputError: There is none of this name.
        """
        rng, things = self._things(*self._place(name))
        return np.repeat(self._draw(rng, things)[None], self.channels, axis=0)

    def _place(self, name: str) -> tuple[str, int]:
        counts: dict[str, int] = dict(zip(_SPLITS, (self.num_train, self.num_val, self.num_test), strict=True))
        split, _, number = name.rpartition("_")
        if not number.isdecimal() or int(number) >= counts.get(split, 0) or name != f"{split}_{int(number):04d}":
            there = " or ".join(f"{count} {s}_####" for s, count in counts.items() if count)
            raise InputError(f"synthetic: there is no frame {name!r}, expected one of {there}")
        return split, int(number)

    def _sample(self, split: str, number: int) -> DetectionSample:
        _, things = self._things(split, number)
        boxes = np.array([t.box for t in things], np.float32).reshape(-1, 4)
        labels = np.array([t.label for t in things], np.int64)
        name = f"{split}_{number:04d}"
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        return DetectionSample(name, Path(), boxes, labels, area, np.zeros(len(boxes), bool), self.size, number, name)

    def _things(self, split: str, number: int) -> tuple[np.random.Generator, list[_Thing]]:
        """The objects, and the generator that then draws the background."""
        rng = np.random.default_rng((self.seed, _SPLITS.index(split), number))
        kind = rng.random()
        count = 0 if kind < self.empty else int(rng.poisson(self.objects * (5 if kind > 1 - self.dense else 1)))
        if kind >= self.empty and self.objects:
            count = max(count, 1)
        height, width = self.size
        things: list[_Thing] = []
        for _ in range(count):
            low, high = (_LEAST, self.sides[0]) if rng.random() < self.very_tiny else self.sides
            side, label = rng.uniform(low, high), int(rng.integers(self.classes))
            look = rng.uniform(*self.contrast) * (1 if rng.random() < 0.8 else -1), rng.uniform(0, math.tau)
            for _ in range(_TRIES):
                centre = rng.uniform(side, width - side), rng.uniform(side, height - side)
                thing = _Thing.at(label, centre, side, *look)
                if all(_apart(thing.box, other.box) for other in things):
                    things.append(thing)
                    break
        return rng, things

    def _draw(self, rng: np.random.Generator, things: Sequence[_Thing]) -> _Image:
        height, width = self.size
        y, x = np.mgrid[0:height, 0:width].astype(np.float32)
        angle = rng.uniform(0, math.tau)
        ramp = (x * math.cos(angle) + y * math.sin(angle)) / max(height, width)
        frame = rng.uniform(90, 140) + 25 * ramp + 10 * _texture(rng, self.size, 12) + 4 * _texture(rng, self.size, 3)
        # A horizon and a mast: edges longer than any object.
        frame += rng.uniform(-18, 18) * (y > rng.uniform(0.5, 0.9) * height + 6 * np.sin(x / rng.uniform(9, 30)))
        frame += rng.uniform(-15, 15) * (np.abs(x - rng.uniform(0, width) - 0.1 * y) < rng.uniform(1, 2.5))
        for thing in things:
            thing.draw(frame)
        frame = cv2.GaussianBlur(frame, (0, 0), 0.5) + self.noise * rng.standard_normal(self.size, dtype=np.float32)
        return np.clip(np.rint(frame), 0, 255).astype(np.uint8)


def _texture(rng: np.random.Generator, size: tuple[int, int], scale: int) -> _Field:
    """Smooth noise of about unit variance."""
    grid = rng.standard_normal((size[0] // scale + 3, size[1] // scale + 3), dtype=np.float32)
    smooth = cv2.resize(grid, (size[1] + 2 * scale, size[0] + 2 * scale), interpolation=cv2.INTER_CUBIC)
    return np.asarray(smooth[scale:-scale, scale:-scale], np.float32)


def _apart(a: Sequence[float], b: Sequence[float], gap: float = _GAP) -> bool:
    return a[2] + gap <= b[0] or b[2] + gap <= a[0] or a[3] + gap <= b[1] or b[3] + gap <= a[1]


# Shapes in units of half the longer side, within -1 to 1. Each is told by its outline, not by its size.
_SHAPES: dict[str, Callable[[NDArray[Any], NDArray[Any]], NDArray[np.bool_]]] = {
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) < 0.28) & (np.maximum(abs(u), abs(v)) <= 1),
    "ring": lambda u, v: (np.hypot(u, v) <= 1) & (np.hypot(u, v) > 0.55),
    "bar": lambda u, v: (abs(u) <= 1) & (abs(v) <= 0.4),
    "wedge": lambda u, v: (v <= 1) & (abs(u) <= (v + 1) / 2),
    "disc": lambda u, v: np.hypot(u, v) <= 1,
}


class _Thing(NamedTuple):
    """One object.

    Attributes:
        label: Its class.
        box: x1 y1 x2 y2 of the drawn samples.
        change: Of the grey value.
        corner: x and y of the pixel where `cover` begins.
        cover: Share of each pixel that the shape covers.
    """

    label: int
    box: tuple[float, float, float, float]
    change: float
    corner: tuple[int, int]
    cover: _Field

    @classmethod
    def at(cls, label: int, centre: tuple[float, float], side: float, change: float, angle: float) -> _Thing:
        """Draw a shape; only bars turn, in steps that keep them apart from crosses."""
        x0, y0 = (math.floor(c - side / 2) - 1 for c in centre)
        pixels = math.ceil(side) + 3
        fine = (np.arange(pixels * _FINE, dtype=np.float32) + 0.5) / _FINE
        u = np.broadcast_to((fine + x0 - centre[0]) * np.float32(2 / side), (len(fine), len(fine)))
        v = np.broadcast_to(((fine + y0 - centre[1]) * np.float32(2 / side))[:, None], u.shape)
        if SYNTHETIC_NAMES[label] == "bar" and angle > math.pi:
            u, v = v, u
        inside = _SHAPES[SYNTHETIC_NAMES[label]](u, v)
        columns, rows = np.flatnonzero(inside.any(0)), np.flatnonzero(inside.any(1))
        box = (
            x0 + columns[0] / _FINE,
            y0 + rows[0] / _FINE,
            x0 + (columns[-1] + 1) / _FINE,
            y0 + (rows[-1] + 1) / _FINE,
        )
        cover = inside.reshape(pixels, _FINE, pixels, _FINE).mean((1, 3), dtype=np.float32)
        return cls(label, box, change, (x0, y0), cover)

    def draw(self, frame: _Field) -> None:
        x, y = self.corner
        height, width = self.cover.shape
        top, left = max(0, -y), max(0, -x)
        part = frame[y + top : y + height, x + left : x + width]
        part += self.change * self.cover[top : top + part.shape[0], left : left + part.shape[1]]
