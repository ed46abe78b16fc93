"""Drawn cephalograms with exact landmarks: for tests, demonstrations and smoke runs without any data.

A head is a handful of analytic shapes in millimetres. Each shape is evaluated at the centre of every pixel, never
rasterised, and the landmarks are points of the same shapes sent through the same map, so that both agree to rounding.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from lit_cli.errors import InputError
from lit_landmarks.samples import LandmarkSample, LandmarkTable

__all__ = ["SYNTHETIC_NAMES", "SyntheticCephalograms", "SyntheticSample"]

SYNTHETIC_NAMES = (
    "sella",
    "nasion",
    "orbitale",
    "porion",
    "pogonion",
    "menton",
    "gonion",
    "upper_incisor_tip",
)
"""The landmarks that are drawn, in the order of the points."""

_VERSION = 1  # part of the stamp: raise it when the drawing changes, or caches keep the old pixels
_FIELD = (192.0, 240.0)  # mm, width and height of the head's frame, about that of a cephalometric film
_MIN_SIDE = 32

_Field = NDArray[np.floating]  # (H, W), float32 throughout: it halves the time to draw
_Vector = NDArray[np.float64]  # (2,), mm


@dataclass(frozen=True)
class SyntheticCephalograms:
    """A data set of drawn lateral cephalograms, with the interface of the readers.

    Every head differs in its proportions (each bone moves on its own by some millimetres), position, rotation, size,
    exposure, blur and noise. An image depends on the seed, its split and its number alone, so that more images or
    another order of reading leave it as it was.

    Args:
        num_train: Samples of the split `train`; 0 leaves the split out.
        num_test: Samples of the split `test`; 0 leaves the split out.
        size: Height and width in pixels. The spacing follows from it: the whole head always fits.
        num_landmarks: How many of `SYNTHETIC_NAMES` to give, from the first.
        seed: Of everything random.

    Raises:
        InputError: A count or the size is out of range.

    Example:
        >>> table = SyntheticCephalograms(num_train=2, num_test=1, size=(75, 60)).read()
        >>> table.num_landmarks, table.splits["train"][0].spacing
        (8, (3.2, 3.2))
        >>> table.splits["test"][0].read_image(channels=1).shape
        (1, 75, 60)
    """

    num_train: int = 64
    num_test: int = 16
    size: tuple[int, int] = (300, 240)
    num_landmarks: int = len(SYNTHETIC_NAMES)
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.num_train, self.num_test) < 0 or self.num_train + self.num_test == 0:
            raise InputError(
                f"synthetic: {self.num_train} train and {self.num_test} test samples, expected at least one"
            )
        if len(self.size) != 2 or min(self.size) < _MIN_SIDE:
            raise InputError(f"synthetic: size is {self.size}, expected height and width of at least {_MIN_SIDE}")
        if not 1 <= self.num_landmarks <= len(SYNTHETIC_NAMES):
            raise InputError(f"synthetic: num_landmarks is {self.num_landmarks}, expected 1 to {len(SYNTHETIC_NAMES)}")
        if self.seed < 0:
            raise InputError(f"synthetic: seed is {self.seed}, expected 0 or more")

    def read(self) -> LandmarkTable:
        """Compute the landmarks; the images are drawn when a sample is read."""
        height, width = self.size
        spacing = max(_FIELD[0] / width, _FIELD[1] / height)
        splits: dict[str, list[LandmarkSample]] = {}
        for number, (split, count) in enumerate({"train": self.num_train, "test": self.num_test}.items()):
            seeds = [(self.seed, number, i) for i in range(count)]
            points = [_Head.random(seed, self.size, spacing).points()[: self.num_landmarks] for seed in seeds]
            samples: list[LandmarkSample] = [
                SyntheticSample(None, f"{split}_{i:04d}", p, (spacing, spacing), self.size, seed)
                for i, (seed, p) in enumerate(zip(seeds, points, strict=True))
            ]
            if samples:
                splits[split] = samples
        return LandmarkTable(splits, SYNTHETIC_NAMES[: self.num_landmarks])


@dataclass(frozen=True, slots=True, eq=False)
class SyntheticSample(LandmarkSample):
    """A sample that draws its image.

    Args:
        path: None.
        name: Identifies the sample within its split.
        points: (K, 2), as in `LandmarkSample`.
        spacing: mm per pixel along x and y.
        size: Height and width in pixels.
        seed: Numbers that determine the image.

    Example:
        >>> sample = SyntheticCephalograms(num_train=1, num_test=0, size=(40, 32)).read().splits["train"][0]
        >>> sample.stamp()
        'synthetic cephalogram 1|40x32|0.0.0'
    """

    size: tuple[int, int]
    seed: tuple[int, ...]

    def read_image(self, channels: int) -> NDArray[np.uint8]:
        """Draw the image.

        Args:
            channels: 1 for grey, 3 for RGB, which repeats the grey.

        Returns:
            (channels, H, W).
        """
        if channels not in (1, 3):
            raise InputError(f"channels is {channels!r}, expected 1 (grey) or 3 (RGB)")
        assert self.spacing is not None
        image = _Head.random(self.seed, self.size, self.spacing[0]).draw()
        return np.repeat(image[None], channels, axis=0)

    def stamp(self) -> str:
        """Identify the pixels for a cache key: all that they depend on."""
        return f"synthetic cephalogram {_VERSION}|{self.size[0]}x{self.size[1]}|{'.'.join(map(str, self.seed))}"


@dataclass(frozen=True)
class _Head:
    """One head: the anchor points of its bones in mm, its place in the image, and how it was exposed.

    The face looks to the right and y points down, as in an image. Radii and strokes are in mm.
    """

    size: tuple[int, int]
    to_mm: NDArray[np.float64]  # (2, 3): pixel to mm of the head
    sella: _Vector
    nasion: _Vector
    orbit: _Vector  # centre of the orbit's ellipse
    porion: _Vector
    chin: _Vector  # centre of the symphysis' ellipse
    gonion: _Vector
    incisor: _Vector  # tip of the upper incisor
    incisor_axis: float  # radians from the vertical
    nose: float  # mm by which the nose stands out
    exposure: NDArray[np.float64]  # (4,): gamma, gain, sigma of the blur in pixels, sigma of the noise in grey levels
    noise_seed: tuple[int, ...]

    ORBIT = (15.0, 16.0)
    CHIN = (7.0, 11.0)

    @classmethod
    def random(cls, seed: tuple[int, ...], size: tuple[int, int], spacing: float) -> _Head:
        rng = np.random.default_rng(seed)

        def near(x: float, y: float, sd: float = 2.5) -> _Vector:
            # Bounded, so that no bone leaves the image or swallows its neighbour however many heads are drawn.
            return np.array([x, y]) + np.clip(rng.normal(0, sd, 2), -2 * sd, 2 * sd)

        angle, scale = math.radians(rng.uniform(-8, 8)), rng.uniform(0.9, 1.02)
        height, width = size
        # From head to image: turn and scale about the middle of the frame, shift, then mm to pixels. A pixel's centre
        # is at an integer, hence its left edge half a pixel before it.
        turn = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        middle = np.array([width, height]) * spacing / 2 + rng.uniform(-5, 5, 2)
        inverse = np.linalg.inv(turn)
        to_mm = np.empty((2, 3))
        to_mm[:, :2] = inverse * spacing
        to_mm[:, 2] = inverse @ (0.5 * spacing - middle) + np.array(_FIELD) / 2
        return cls(
            size=size,
            to_mm=to_mm,
            sella=near(82, 100),
            nasion=near(140, 94),
            orbit=near(126, 102, 2.0),
            porion=near(58, 118),
            chin=near(128, 192, 3.5),
            gonion=near(72, 170, 3.0),
            incisor=near(140, 164, 2.0),
            incisor_axis=math.radians(rng.uniform(-30, -8)),
            nose=rng.uniform(18, 26),
            exposure=np.array(
                [rng.uniform(0.8, 1.3), rng.uniform(0.85, 1.1), rng.uniform(0.4, 0.8), rng.uniform(2, 5)]
            ),
            noise_seed=(*seed, 1),
        )

    def points(self) -> NDArray[np.float64]:
        """(8, 2) in pixels, in the order of `SYNTHETIC_NAMES`."""
        orbitale = _shift(self.orbit, 0, self.ORBIT[1])
        pogonion, menton = _shift(self.chin, self.CHIN[0], 0), _shift(self.chin, 0, self.CHIN[1])
        mm = np.stack([self.sella, self.nasion, orbitale, self.porion, pogonion, menton, self.gonion, self.incisor])
        return (mm - self.to_mm[:, 2]) @ np.linalg.inv(self.to_mm[:, :2]).T

    def draw(self) -> NDArray[np.uint8]:
        """(H, W)."""
        y, x = np.mgrid[: self.size[0], : self.size[1]].astype(np.float32)
        (xx, xy, x0), (yx, yy, y0) = self.to_mm.tolist()
        pen = _Pen(xx * x + xy * y + x0, yx * x + yy * y + y0)
        light = 0.04 + self._soft_tissue(pen) + self._cranium(pen) + self._spine(pen)
        light += self._face(pen)
        light = np.maximum(light, self._jaw(pen))
        # The teeth and the ear rod absorb nearly everything: what lies before or behind them does not show.
        light = self._opaque(pen, light)
        gamma, gain, blur, noise = self.exposure.tolist()
        image = 235 * np.clip(gain * light, 0, 1) ** gamma
        image = cv2.GaussianBlur(image, (0, 0), blur)
        image += noise * np.random.default_rng(self.noise_seed).standard_normal(image.shape, dtype=np.float32)
        return np.clip(np.rint(image), 0, 255).astype(np.uint8)

    def _soft_tissue(self, pen: _Pen) -> _Field:
        """Face and neck, bounded by the profile x(y) from forehead to throat."""
        nx, ny = self.nasion.tolist()
        cx, cy = _shift(self.chin, self.CHIN[0], 0).tolist()
        lip = self.incisor[0] + 11
        ys = [20, ny - 35, ny - 12, ny + 3, ny + 36, ny + 44, ny + 58, ny + 74, ny + 86, cy - 4, cy + 20, cy + 24, 300]
        xs = [nx - 35, nx + 2, nx + 7, nx + 5, nx + self.nose, nx + 16, lip - 2, lip, lip - 7, cx + 11]
        xs += [cx - 2, cx - 45, cx - 50]
        order = np.argsort(ys, kind="stable")
        level = np.arange(0, 300, 2.0)
        edge = np.interp(level, np.asarray(ys, float)[order], np.asarray(xs, float)[order])
        edge = np.convolve(np.pad(edge, 3, mode="edge"), np.hanning(9)[1:-1] / 4, mode="valid")  # rounds the corners
        profile = np.interp(pen.y, level, edge).astype(np.float32)
        inside = pen.step(profile - pen.x, 1.0) * pen.step(pen.x - 28, 12.0) * pen.step(pen.y - 40, 15.0)
        return 0.16 * inside

    def _cranium(self, pen: _Pen) -> _Field:
        """The vault, an ellipse with a bright rim, and the skull base: a stroke from nasion to sella and one down."""
        centre, radii = np.array([78.0, 72.0]), (68.0, 58.0)
        vault = pen.ellipse(centre, radii)
        # Cut off along the skull base, from above nasion to below porion, so that the rim stays clear of the orbit.
        left, right = _shift(self.porion, -20, 22), _shift(self.nasion, 0, -4)
        above = -pen.beyond(left, right)
        light = (0.26 * pen.step(-vault, 2.0) + 0.32 * pen.stroke(vault, 1.6)) * pen.step(above, 3.0)
        clivus = _path(self.sella, (-5, 8), (-14, 34))
        base = np.stack([_shift(self.sella, 9, -1), _shift(self.nasion, -8, -3)])
        return light + 0.22 * pen.line(clivus, 2.0) + 0.20 * pen.line(base, 1.2)

    def _spine(self, pen: _Pen) -> _Field:
        """Four vertebrae below the skull base, behind the jaw."""
        light = np.zeros_like(pen.x)
        for i in range(4):
            centre = np.array([50.0 - 2.5 * i, 156.0 + 20 * i])
            light += 0.26 * pen.step(-pen.box(centre, (10.0, 7.0), 0.15), 1.0)
        return light

    def _face(self, pen: _Pen) -> _Field:
        """Sella's ring, the two strokes that meet in nasion, the orbit's lower arc and the palate."""
        light = 0.42 * pen.stroke(pen.ellipse(self.sella, (5.0, 5.0)), 1.1)
        light += 0.42 * pen.line(_path(self.nasion, (-1, -34), (3, -14), (0, 0)), 1.3)
        light += 0.42 * pen.line(_path(self.nasion, (0, 0), (9, 15)), 1.3)
        orbit = pen.stroke(pen.ellipse(self.orbit, self.ORBIT), 1.1)
        light += 0.40 * orbit * pen.step(pen.y - float(self.orbit[1]), 3.0)
        palate = _path(self.incisor, (2, -24), (-42, -26))
        return light + 0.28 * pen.line(palate, 1.5)

    def _jaw(self, pen: _Pen) -> _Field:
        """Ramus and lower border, which meet at an angle in gonion, and the symphysis."""
        menton, front = _shift(self.chin, 0, self.CHIN[1]), _shift(self.chin, 2, -self.CHIN[1] - 6)
        outline = np.stack([_shift(self.porion, 8, 8), self.gonion, _shift(menton, -9, -1.5)])
        chin = pen.ellipse(self.chin, self.CHIN)
        body = np.stack([_shift(self.gonion, 9, -8), _shift(self.chin, -4, 0)])
        alveolus = np.stack([front, _shift(self.incisor, -4, 12)])
        light = 0.62 * np.maximum(pen.line(outline, 1.4), pen.stroke(chin, 1.3))
        light = np.maximum(light, 0.40 * pen.step(-chin, 1.0))
        return np.maximum(light, np.maximum(0.36 * pen.line(body, 8.0), 0.42 * pen.line(alveolus, 4.0)))

    def _opaque(self, pen: _Pen, light: _Field) -> _Field:
        """The incisors, whose upper tip is the apex of a wedge, the molars, and the ear rod at porion."""
        axis = np.array([math.sin(-self.incisor_axis), math.cos(self.incisor_axis)])
        upper = pen.wedge(self.incisor, -axis, 22.0, 3.8)
        lower = pen.wedge(_shift(self.incisor, -4, 1.5), np.array([-0.15, 1.0]), 18.0, 3.0)
        light = _cover(light, 0.95, pen.step(upper, 0.5))
        light = _cover(light, 0.75, pen.step(lower, 0.5))
        for i in range(3):
            for side in (-1, 1):
                molar = _shift(self.incisor, -18 - 10 * i, -2 + 6 * side - i)
                light = _cover(light, 0.7, 0.9 * pen.step(-pen.box(molar, (4.4, 5.2), 0.05), 0.8))
        # A clear surrounding, so that the rod stands out whatever else lies there.
        around = np.hypot(*pen.offset(self.porion))
        light = _cover(light, 0.25, pen.step(9.0 - around, 0.8))
        return _cover(light, 0.95, pen.step(3.2 - around, 0.6))


def _shift(point: _Vector, dx: float, dy: float) -> _Vector:
    return point + np.array([dx, dy])


def _path(start: _Vector, *offsets: tuple[float, float]) -> NDArray[np.float64]:
    """(n, 2): points given by their offsets from another."""
    return start + np.array(offsets, dtype=np.float64)


def _cover(light: _Field, brightness: float, mask: _Field) -> _Field:
    return light + (brightness - light) * mask


class _Pen:
    """Shapes as fields over the pixels' positions.

    Args:
        x: (H, W) position of each pixel's centre in mm of the head.
        y: (H, W), likewise.
    """

    def __init__(self, x: _Field, y: _Field) -> None:
        self.x, self.y = x, y

    def offset(self, point: _Vector) -> tuple[_Field, _Field]:
        """Position of the pixels relative to a point."""
        px, py = point.tolist()  # Python's floats leave float32 as it is
        return self.x - px, self.y - py

    @staticmethod
    def step(distance: _Field, softness: float) -> _Field:
        """From 0 to 1 where the distance in mm turns positive, within twice the softness on either side."""
        t = np.clip(0.5 + distance / (4 * softness), 0, 1)
        return t * t * (3 - 2 * t)

    @staticmethod
    def stroke(distance: _Field, width: float) -> _Field:
        """A line with a Gaussian cross-section along distance 0."""
        return np.exp(-0.5 * np.square(distance / width))

    def beyond(self, a: _Vector, b: _Vector) -> _Field:
        """Distance in mm from the line through a and b, positive on its right-hand side (below it, if b is right)."""
        dx, dy = self.offset(a)
        ex, ey = ((b - a) / np.hypot(*(b - a))).tolist()
        return ex * dy - ey * dx

    def ellipse(self, centre: _Vector, radii: tuple[float, float]) -> _Field:
        """Distance in mm to an ellipse, negative inside; exact on it, to first order near it."""
        dx, dy = self.offset(centre)
        u, v = dx / radii[0], dy / radii[1]
        r = np.hypot(u, v)
        slope = np.hypot(u / radii[0], v / radii[1])
        return r * (r - 1) / np.maximum(slope, 1e-6)

    def box(self, centre: _Vector, half: tuple[float, float], angle: float) -> _Field:
        """Distance in mm to a turned rectangle, negative inside."""
        dx, dy = self.offset(centre)
        c, s = math.cos(angle), math.sin(angle)
        return np.maximum(np.abs(c * dx + s * dy) - half[0], np.abs(c * dy - s * dx) - half[1])

    def wedge(self, tip: _Vector, axis: _Vector, length: float, half_width: float) -> _Field:
        """Distance in mm to a triangle that opens from its tip along the axis, positive inside."""
        dx, dy = self.offset(tip)
        ax, ay = (axis / np.hypot(*axis)).tolist()
        along, across = ax * dx + ay * dy, np.abs(ax * dy - ay * dx)
        opening = math.atan2(half_width, length)
        flank = along * math.sin(opening) - across * math.cos(opening)
        return np.minimum(flank, length - along)

    def line(self, vertices: NDArray[np.float64], width: float) -> _Field:
        """A stroke along a polyline (n, 2)."""
        nearest = np.full_like(self.x, np.inf)
        for a, b in itertools.pairwise(vertices):
            dx, dy = self.offset(a)
            ex, ey = (b - a).tolist()
            t = np.clip((dx * ex + dy * ey) / (ex * ex + ey * ey), 0, 1)
            nearest = np.minimum(nearest, np.square(dx - t * ex) + np.square(dy - t * ey))
        return self.stroke(np.sqrt(nearest), width)
