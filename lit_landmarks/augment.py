"""Augmentation for X-rays: one batched pass on the device, or albumentations per sample in loader workers.

What is drawn depends on the batch's seed alone, so a resumed run sees the images that the interrupted one would have
seen.
"""

from __future__ import annotations

import math
import os
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lit_landmarks.geometry import flip_permutation, invert_affine, transform_points

if TYPE_CHECKING:
    from collections.abc import Sequence


# Bound on elastic * (elastic_grid - 1): the field's largest slope in a batch stays near half, so that no pixels fold
# over and points can be followed through it.
STEEPEST = 0.05


@dataclass
class Augmentation:
    """Ranges of the random changes. Every range is symmetric around "no change"; 0 switches a change off.

    Args:
        rotation: Degrees.
        scale: Fraction; 0.1 draws factors from 0.9 to 1.1.
        shift: Fraction of the image's width and height.
        brightness: Fraction of full scale.
        contrast: Fraction; 0.2 multiplies by 0.8 to 1.2, so that black padding stays black.
        gamma: Exponent range in powers of two: 0.5 draws from 2^-0.5 to 2^0.5.
        noise: Largest standard deviation of Gaussian noise, as a fraction of full scale.
        cutout: Number of rectangles set to 0 in each image.
        cutout_size: Largest side of a rectangle as a fraction of the image's.
        elastic: Standard deviation of a smooth displacement, as a fraction of the image's width.
        elastic_grid: Control points of that displacement along the shorter side.
        flip: Probability of a left-right flip. Needs `flip_pairs` (which may be empty), since left and right landmarks
            change places.
        probability: Probability that the geometric part is applied to an image at all.
    """

    rotation: float = 10.0
    scale: float = 0.1
    shift: float = 0.04
    brightness: float = 0.1
    contrast: float = 0.2
    gamma: float = 0.3
    noise: float = 0.02
    cutout: int = 0
    cutout_size: float = 0.15
    elastic: float = 0.0
    elastic_grid: int = 5
    flip: float = 0.0
    probability: float = 1.0

    def check(self, num_landmarks: int, flip_pairs: Sequence[Sequence[int]] | None) -> None:
        """Raise `ValueError` with one line if a value makes no sense."""
        for name in ("rotation", "scale", "shift", "brightness", "contrast", "gamma", "noise", "elastic"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.augment.{name}: expected 0 or more, got {getattr(self, name)}")
        for name, limit in (("scale", 0.9), ("flip", 1.0), ("probability", 1.0), ("cutout_size", 1.0)):
            if not 0 <= getattr(self, name) <= limit:
                raise ValueError(f"data.augment.{name}: expected 0 to {limit}, got {getattr(self, name)}")
        for name, least in (("cutout", 0), ("elastic_grid", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"data.augment.{name}: expected {least} or more, got {getattr(self, name)}")
        if self.elastic * (self.elastic_grid - 1) > STEEPEST:
            raise ValueError(
                f"data.augment.elastic: times (elastic_grid - 1) expected at most {STEEPEST}, got {self.elastic} with "
                f"a grid of {self.elastic_grid}: neighbouring pixels would change places"
            )
        if self.flip > 0 and flip_pairs is None:
            raise ValueError(
                "data.augment.flip needs data.flip_pairs: the 0-based pairs that change places, or [] for none"
            )
        if flip_pairs is not None:
            flip_permutation(num_landmarks, [list(p) for p in flip_pairs])


class Augmented(NamedTuple):
    """Result of `augment_batch`."""

    image: Tensor  # (B, C, H, W) float32 in [0, 1]
    points: Tensor  # (B, K, 2) in pixels of the augmented frame
    matrix: Tensor  # (B, 3, 3) frame before to frame after, without the elastic part


def augment_batch(
    images: Tensor, points: Tensor, spec: Augmentation, seed: int, flip_pairs: list[list[int]] | None = None
) -> Augmented:
    """Augment a batch on the device it lies on.

    Args:
        images: (B, C, H, W) uint8.
        points: (B, K, 2) float32 in pixels of the images; NaN stays NaN.
        spec: The ranges.
        seed: Everything drawn follows from it.
        flip_pairs: Landmarks that change places in a flip, 0-based.
    """
    batch, _, height, width = images.shape
    device = images.device
    drawn = _draw(batch, height, width, spec, seed)
    packed = drawn.packed.to(device, non_blocking=True)
    forward, inverse = packed[:, :9].view(-1, 3, 3), packed[:, 9:18].view(-1, 3, 3)
    gamma, contrast, brightness, noise, flipped = packed[:, 18:23].unbind(1)

    rows = torch.arange(height, device=device, dtype=torch.float32)
    columns = torch.arange(width, device=device, dtype=torch.float32)
    a = inverse[:, :2, None, None]
    source_x = a[:, 0, :, :, 0] * columns + a[:, 0, :, :, 1] * rows[:, None] + a[:, 0, :, :, 2]
    source_y = a[:, 1, :, :, 0] * columns + a[:, 1, :, :, 1] * rows[:, None] + a[:, 1, :, :, 2]
    source = torch.stack((source_x, source_y), dim=1)  # (B, 2, H, W)
    moved = transform_points(forward, points)
    if drawn.displacement is not None:
        control = drawn.displacement.to(device, non_blocking=True)
        field = F.interpolate(control, size=(height, width), mode="bicubic", align_corners=True)
        source = source + field
        moved = _invert_displacement(moved, points, inverse, field)
    grid = torch.stack(((2 * source[:, 0] + 1) / width - 1, (2 * source[:, 1] + 1) / height - 1), dim=-1)
    out = F.grid_sample(images.float() / 255, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    def column(values: Tensor) -> Tensor:
        return values.view(-1, 1, 1, 1)

    # Padding stays black: gamma keeps 0, and contrast acts around 0 so that it does too.
    out = out.clamp(0, 1).pow(column(gamma)) * column(contrast)
    out = out + column(brightness) * (out > 0)
    if spec.noise > 0:
        generator = torch.Generator(device).manual_seed(seed)
        out = out + column(noise) * torch.randn(out.shape, generator=generator, device=device)
    if drawn.boxes is not None:
        box = drawn.boxes.to(device, non_blocking=True)  # (B, N, 4) x0 y0 x1 y1
        inside_x = (columns >= box[..., 0:1]) & (columns < box[..., 2:3])
        inside_y = (rows >= box[..., 1:2]) & (rows < box[..., 3:4])
        hole = (inside_y[..., :, None] & inside_x[..., None, :]).any(1, keepdim=True)
        out = out.masked_fill(hole, 0)
    if spec.flip > 0 and flip_pairs:
        order = torch.tensor(flip_permutation(points.shape[1], flip_pairs), device=device)
        moved = torch.where(flipped.view(-1, 1, 1) > 0, moved[:, order], moved)
    return Augmented(out.clamp(0, 1), moved, forward)


class _Draw(NamedTuple):
    packed: Tensor  # (B, 23): forward and inverse matrix, gamma, contrast, brightness, noise, flipped
    displacement: Tensor | None  # (B, 2, gh, gw) input pixels
    boxes: Tensor | None  # (B, N, 4)


def _draw(batch: int, height: int, width: int, spec: Augmentation, seed: int) -> _Draw:
    """All random numbers of a batch, drawn on the CPU so that they are the same on every device."""
    rng = np.random.default_rng(seed)

    def symmetric(limit: float) -> NDArray[np.float64]:
        return rng.uniform(-limit, limit, batch) if limit else np.zeros(batch)

    applied = rng.random(batch) < spec.probability
    angle = np.radians(symmetric(spec.rotation)) * applied
    factor = 1 + symmetric(spec.scale) * applied
    shift_x, shift_y = symmetric(spec.shift) * width * applied, symmetric(spec.shift) * height * applied
    flip = (rng.random(batch) < spec.flip).astype(np.float64)
    sign = 1 - 2 * flip
    cx, cy = (width - 1) / 2, (height - 1) / 2
    cos, sin = factor * np.cos(angle), factor * np.sin(angle)
    forward = np.zeros((batch, 3, 3))
    # centre to origin, mirror x, rotate and scale, back to the centre, shift
    forward[:, 0, 0], forward[:, 0, 1] = cos * sign, -sin
    forward[:, 1, 0], forward[:, 1, 1] = sin * sign, cos
    forward[:, 0, 2] = cx + shift_x - forward[:, 0, 0] * cx - forward[:, 0, 1] * cy
    forward[:, 1, 2] = cy + shift_y - forward[:, 1, 0] * cx - forward[:, 1, 1] * cy
    forward[:, 2, 2] = 1
    inverse = invert_affine(torch.from_numpy(forward)).numpy()
    photometric = np.stack(
        (
            2.0 ** symmetric(spec.gamma),
            1 + symmetric(spec.contrast),
            symmetric(spec.brightness),
            np.abs(symmetric(spec.noise)),
            flip,
        ),
        axis=1,
    )
    packed = np.concatenate((forward.reshape(batch, 9), inverse.reshape(batch, 9), photometric), axis=1)

    displacement = None
    if spec.elastic > 0:
        short = min(height, width)
        shape = (max(2, round(spec.elastic_grid * height / short)), max(2, round(spec.elastic_grid * width / short)))
        field = rng.normal(0, spec.elastic * width, (batch, 2, *shape)) * applied[:, None, None, None]
        displacement = torch.from_numpy(field).float()
    boxes = None
    if spec.cutout > 0:
        centre = rng.random((batch, spec.cutout, 2)) * (width, height)
        half = rng.random((batch, spec.cutout, 2)) * spec.cutout_size * (width, height) / 2
        boxes = torch.from_numpy(np.concatenate((centre - half, centre + half), axis=-1)).float()
    return _Draw(torch.from_numpy(packed).float(), displacement, boxes)


def _invert_displacement(moved: Tensor, points: Tensor, inverse: Tensor, field: Tensor, steps: int = 20) -> Tensor:
    """Where points land under p_in = A^-1 p_out + d(p_out), by fixed-point iteration (d is smooth and small).

    Args:
        moved: (B, K, 2) first guess: the affine part alone.
        points: (B, K, 2) positions before.
        inverse: (B, 3, 3) A^-1.
        field: (B, 2, H, W) displacement d in input pixels, on the output grid.
        steps: Iterations; the error shrinks by the field's slope (about half at the most, see `STEEPEST`) in each.
    """
    height, width = field.shape[-2:]
    extent = torch.tensor((width, height), device=field.device, dtype=field.dtype)
    forward = invert_affine(inverse)
    out = moved
    for _ in range(steps):
        grid = (2 * torch.nan_to_num(out) + 1) / extent - 1
        d = F.grid_sample(field, grid[:, None], mode="bilinear", padding_mode="border", align_corners=False)
        out = transform_points(forward, points - d[:, :, 0].transpose(1, 2))
    return out


class AlbumentationsAugment:
    """The same ranges through albumentations, one sample at a time, for loader workers.

    Args:
        spec: The ranges, without `elastic`: albumentations' own moves the points by whole pixels.
        flip_pairs: As in `augment_batch`.
    """

    def __init__(self, spec: Augmentation, flip_pairs: list[list[int]] | None = None) -> None:
        # Its import asks a server for the newest version, which stalls without a network.
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
        import albumentations as A

        geometric: list[Any] = [
            A.Affine(
                rotate=(-spec.rotation, spec.rotation),
                scale=(1 - spec.scale, 1 + spec.scale),
                translate_percent=(-spec.shift, spec.shift),
                keep_ratio=True,
                p=spec.probability,
            )
        ]
        photometric: list[Any] = [
            A.RandomGamma(gamma_limit=(100 * 2**-spec.gamma, 100 * 2**spec.gamma), p=1.0 if spec.gamma else 0.0),
            A.RandomBrightnessContrast(spec.brightness, spec.contrast, p=1.0),
        ]
        if spec.noise > 0:
            photometric.append(A.GaussNoise(std_range=(0.0, spec.noise), p=1.0))
        if spec.cutout > 0:
            photometric.append(
                A.CoarseDropout(
                    num_holes_range=(spec.cutout, spec.cutout),
                    hole_height_range=(0.01, max(0.02, spec.cutout_size)),
                    hole_width_range=(0.01, max(0.02, spec.cutout_size)),
                    p=1.0,
                )
            )
        self._transform = A.Compose(
            [*geometric, *photometric], keypoint_params=A.KeypointParams(format="xy", remove_invisible=False)
        )
        self._flip = spec.flip
        self._pairs = flip_pairs or []

    def __call__(
        self, image: NDArray[np.uint8], points: NDArray[np.float32], seed: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Augment one (C, H, W) uint8 image with (K, 2) points; NaN points stay NaN."""
        # `set_random_seed` would hand the same seed to every transform, and their draws would go together.
        generator = np.random.default_rng(seed)
        self._transform.set_random_state(generator, random.Random(seed))
        present = np.isfinite(points).all(1)
        out = self._transform(image=np.ascontiguousarray(image.transpose(1, 2, 0)), keypoints=points[present])
        new_image = np.asarray(out["image"]).reshape(*image.shape[1:], -1).transpose(2, 0, 1)
        moved = np.full_like(points, math.nan)
        moved[present] = np.asarray(out["keypoints"], np.float32).reshape(-1, 2)
        if self._flip and generator.random() < self._flip:
            new_image = new_image[:, :, ::-1]
            moved = moved[flip_permutation(len(points), self._pairs)]
            moved[:, 0] = image.shape[2] - 1 - moved[:, 0]
        return np.ascontiguousarray(new_image), moved
