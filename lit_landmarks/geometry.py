"""3x3 matrices between pixel grids. Pixel centres are at integers, points are (x, y)."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Letterbox:
    """How an image of one size is fitted, centred and undistorted, into a frame of another.

    Args:
        source: (H, W) of the image.
        target: (H, W) of the frame.
    """

    source: tuple[int, int]
    target: tuple[int, int]

    @property
    def inner(self) -> tuple[int, int]:
        """(H, W) of the resized image inside the frame."""
        scale = min(self.target[0] / self.source[0], self.target[1] / self.source[1])
        return max(1, round(self.source[0] * scale)), max(1, round(self.source[1] * scale))

    @property
    def offset(self) -> tuple[int, int]:
        """(rows, columns) of constant padding before the image."""
        return (self.target[0] - self.inner[0]) // 2, (self.target[1] - self.inner[1]) // 2

    @property
    def matrix(self) -> NDArray[np.float64]:
        """3x3, source pixels to frame pixels, with the rounding to whole pixels, so that its inverse is exact."""
        sy, sx = (i / s for i, s in zip(self.inner, self.source, strict=True))
        oy, ox = self.offset
        return np.array([[sx, 0, 0.5 * sx - 0.5 + ox], [0, sy, 0.5 * sy - 0.5 + oy], [0, 0, 1]], np.float64)

    def apply(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resize a (C, H, W) image into the frame; areas outside are 0."""
        height, width = self.inner
        shrinks = height * width < self.source[0] * self.source[1]
        method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        resized = cv2.resize(np.ascontiguousarray(image.transpose(1, 2, 0)), (width, height), interpolation=method)
        resized = resized.reshape(height, width, -1).transpose(2, 0, 1)
        out = np.zeros((resized.shape[0], *self.target), np.uint8)
        oy, ox = self.offset
        out[:, oy : oy + height, ox : ox + width] = resized
        return out


def transform_points(matrix: Tensor, points: Tensor) -> Tensor:
    """Apply (B, 3, 3) affine matrices to (B, K, 2) points, in the points' dtype."""
    matrix = matrix.to(points.dtype)
    # Written out: matmul would run in half precision under autocast, and K points are too few to care about speed.
    x, y = points[..., 0], points[..., 1]
    a = matrix[:, None]
    return torch.stack(
        (a[..., 0, 0] * x + a[..., 0, 1] * y + a[..., 0, 2], a[..., 1, 0] * x + a[..., 1, 1] * y + a[..., 1, 2]), dim=-1
    )


def invert_affine(matrix: Tensor) -> Tensor:
    """Invert (B, 3, 3) affine matrices in float64, without LAPACK and so without a host synchronisation."""
    m = matrix.double()
    a, b, c, d = m[:, 0, 0], m[:, 0, 1], m[:, 1, 0], m[:, 1, 1]
    det = a * d - b * c
    out = torch.zeros_like(m)
    out[:, 0, 0], out[:, 0, 1], out[:, 1, 0], out[:, 1, 1] = d / det, -b / det, -c / det, a / det
    out[:, 0, 2] = -(out[:, 0, 0] * m[:, 0, 2] + out[:, 0, 1] * m[:, 1, 2])
    out[:, 1, 2] = -(out[:, 1, 0] * m[:, 0, 2] + out[:, 1, 1] * m[:, 1, 2])
    out[:, 2, 2] = 1
    return out


def original_points(points: Tensor, matrix: Tensor) -> Tensor:
    """Frame pixels back to original pixels, float64; the one place where geometry is inverted."""
    return transform_points(invert_affine(matrix), points.double())


def flip_permutation(num_landmarks: int, flip_pairs: list[list[int]]) -> list[int]:
    """The order of landmarks after a left-right flip, from pairs of 0-based indices.

    Raises:
        ValueError: an index is out of range or appears twice.
    """
    order = list(range(num_landmarks))
    seen: set[int] = set()
    for pair in flip_pairs:
        if len(pair) != 2 or not all(0 <= i < num_landmarks for i in pair):
            raise ValueError(f"flip_pairs: expected pairs of indices from 0 to {num_landmarks - 1}, got {pair}")
        if seen & set(pair) or len(set(pair)) < 2:
            raise ValueError(f"flip_pairs: an index appears twice, in {pair}")
        seen |= set(pair)
        a, b = pair
        order[a], order[b] = b, a
    return order
