"""A drawn moving scene: for the demonstration and the tests, without any video."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lit_cli.errors import InputError
from lit_patchnerf.video import VideoFacts, write_video

__all__ = ["SyntheticVideo"]

_Field = NDArray[np.floating]
_MIN_SIDE = 8


@dataclass(frozen=True)
class SyntheticVideo:
    """Textured shapes that drift and turn over a slowly changing gradient.

    Discs, rectangles, stars and rings swing about a place of their own, each with stripes or checks that turn with it.
    Edges are smooth over a pixel, so that a shape moves by parts of one. The scene is drawn in units of the frame:
    another size or number of frames shows the same scene, finer or slower.

    Args:
        frames: Number of frames, at least 2.
        height: Pixels, at least 8.
        width: Pixels, at least 8.
        shapes: Number of shapes.
        texture: Contrast of their stripes and checks, 0 to 1.
        fps: Frames per second.
        seed: Of everything random.

    Raises:
        InputError: a value is out of range.

    Example:
        >>> scene = SyntheticVideo(frames=4, height=32, width=48)
        >>> video = scene.draw()
        >>> video.shape, video.dtype, scene.facts().count
        ((4, 32, 48, 3), dtype('uint8'), 4)
    """

    frames: int = 32
    height: int = 96
    width: int = 192
    shapes: int = 7
    texture: float = 0.5
    fps: float = 24.0
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"frames": 2, "height": _MIN_SIDE, "width": _MIN_SIDE, "shapes": 0, "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise InputError(f"synthetic video: {name} is {getattr(self, name)}, expected {low} or more")
        if not 0 <= self.texture <= 1:
            raise InputError(f"synthetic video: texture is {self.texture}, expected 0 to 1")
        if not 0 < self.fps < math.inf:
            raise InputError(f"synthetic video: fps is {self.fps}, expected a positive number")

    def draw(self) -> NDArray[np.uint8]:
        """All frames (T, H, W, 3) uint8 RGB."""
        out = np.empty((self.frames, self.height, self.width, 3), np.uint8)
        rng = np.random.default_rng(self.seed)
        background = _Background(rng)
        # Shapes with a later number lie in front; each draws from a generator of its own, so that one more shape leaves
        # the others as they are.
        shapes = [_Shape(np.random.default_rng([self.seed, i + 1]), i, self.texture) for i in range(self.shapes)]
        unit = 1 / self.height  # frames are one unit high
        y = (np.arange(self.height, dtype=np.float32)[:, None] + 0.5) * unit
        x = (np.arange(self.width, dtype=np.float32)[None, :] + 0.5) * unit
        for t in range(self.frames):
            time = t / (self.frames - 1)
            canvas = background.draw(y, x, self.width * unit, time)
            for shape in shapes:
                shape.draw(canvas, y, x, self.width * unit, unit, time)
            out[t] = np.rint(np.clip(canvas, 0, 1) * 255).astype(np.uint8)
        return out

    def facts(self) -> VideoFacts:
        """What a reader would find; the digest is that of the arguments."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return VideoFacts("synthetic", (self.height, self.width), self.frames, self.fps, digest)

    def write(self, path: str | Path) -> Path:
        """Write the scene as an mp4, which is lossy, and give its path."""
        return write_video(path, self.draw(), self.fps)


class _Background:
    """A gradient between two colours that turns a little, under a broad ripple."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.colours = rng.uniform(0.15, 0.75, (2, 3)).astype(np.float32)
        self.angle, self.turn = rng.uniform(0, 2 * math.pi), rng.uniform(-0.6, 0.6)
        self.ripple = rng.uniform(3, 6, 2)
        self.drift = rng.uniform(-0.5, 0.5, 2)

    def draw(self, y: _Field, x: _Field, width: float, time: float) -> _Field:
        """(H, W, 3), a new array."""
        angle = self.angle + self.turn * time
        along = (x - width / 2) * np.float32(math.cos(angle) / max(1.0, width)) + (y - 0.5) * np.float32(
            math.sin(angle)
        )
        waves = np.sin((y - self.drift[0] * time) * np.float32(self.ripple[0])) * np.sin(
            (x - self.drift[1] * time) * np.float32(self.ripple[1])
        )
        share = np.clip(0.5 + along + 0.12 * waves, 0, 1).astype(np.float32)[..., None]
        return self.colours[0] * (1 - share) + self.colours[1] * share


class _Shape:
    """A shape that swings about its home and turns at an even rate."""

    def __init__(self, rng: np.random.Generator, number: int, texture: float) -> None:
        self.home = rng.uniform(0.15, 0.85, 2)  # of the frame's height and width
        self.reach = rng.uniform(0.08, 0.3, 2)
        self.phase = rng.uniform(0, 2 * math.pi, 2)
        self.speed = rng.uniform(0.4, 1.1, 2) * 2 * math.pi
        self.radius = rng.uniform(0.09, 0.2)
        self.aspect = rng.uniform(0.55, 0.9)
        self.angle, self.turn = rng.uniform(0, 2 * math.pi), rng.uniform(-1.5, 1.5) * math.pi
        self.colours = rng.uniform(0.05, 0.95, (2, 3)).astype(np.float32)
        self.colours[1] = self.colours[0] + texture * (self.colours[1] - self.colours[0])
        self.stripes = rng.uniform(2.5, 5) * math.pi / self.radius
        self.checked = bool(rng.integers(2))
        self.distance = (_disc, _rectangle, _star, _ring)[number % 4]

    def draw(self, canvas: _Field, y: _Field, x: _Field, width: float, unit: float, time: float) -> None:
        """Blend the shape into (H, W, 3), only where it can be."""
        middle = self.home + self.reach * np.sin(self.phase + self.speed * time)
        cy, cx = float(middle[0]), float(middle[1]) * width
        around = self.radius * 1.05 + unit
        rows = slice(*np.searchsorted(y[:, 0], (cy - around, cy + around)))
        cols = slice(*np.searchsorted(x[0], (cx - around, cx + around)))
        dy, dx = y[rows] - np.float32(cy), x[:, cols] - np.float32(cx)
        angle = self.angle + self.turn * time
        cos, sin = math.cos(angle), math.sin(angle)
        v, u = dy * cos - dx * sin, dx * cos + dy * sin  # the shape's own axes
        cover = np.clip(0.5 - self.distance(v, u, self.radius, self.aspect) / unit, 0, 1)[..., None]
        wave = np.sin(u * np.float32(self.stripes))
        if self.checked:
            wave = wave * np.sin(v * np.float32(self.stripes))
        share = (0.5 + 0.5 * wave)[..., None]
        paint = self.colours[0] * (1 - share) + self.colours[1] * share
        part = canvas[rows, cols]
        part += (paint - part) * cover.astype(np.float32)


# Distances to the outline in units of the frame's height, negative inside; near the outline they are nearly exact.


def _disc(v: _Field, u: _Field, radius: float, aspect: float) -> _Field:
    return np.hypot(v, u) - np.float32(radius)


def _rectangle(v: _Field, u: _Field, radius: float, aspect: float) -> _Field:
    # Its corners lie within the radius.
    half = radius / math.hypot(1, aspect)
    return np.maximum(np.abs(u) - np.float32(half), np.abs(v) - np.float32(half * aspect))


def _star(v: _Field, u: _Field, radius: float, aspect: float) -> _Field:
    swing = 0.5 * (1 - aspect)
    outline = radius * (1 - swing + swing * np.cos(5 * np.arctan2(v, u)))
    return np.hypot(v, u) - outline.astype(np.float32)


def _ring(v: _Field, u: _Field, radius: float, aspect: float) -> _Field:
    middle, half = radius * (1 + 0.5 * aspect) / 2, radius * (1 - 0.5 * aspect) / 2
    return np.abs(np.hypot(v, u) - np.float32(middle)) - np.float32(half)
