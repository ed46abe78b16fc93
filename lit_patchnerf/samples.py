"""What the data module hands to the module."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["FrameBatch", "MomentBatch", "TrainBatch"]


class TrainBatch(NamedTuple):
    """Samples of K optimizer steps, B each. A sample is a patch, or a frame where `data.sample` says so."""

    indices: Tensor
    """(K, B) int64: patches as of `lit_patchnerf.patches`, or frames"""
    pixels: Tensor
    """(K, B, 3, h, w) uint8"""
    weight: Tensor | None
    """(K, B, 1, h, w) float32, 0 where the mask hides a pixel; None without a mask and padding"""
    embeddings: Tensor | None
    """(K, B, D) float16 of patches, (K, B, rows, cols, D) of frames; None without targets"""

    def head(self, steps: int) -> TrainBatch:
        """The samples of the first steps."""
        return TrainBatch(*(None if x is None else x[:steps] for x in self))  # type: ignore[arg-type]


class FrameBatch(NamedTuple):
    """Whole frames to evaluate on."""

    indices: Tensor
    """(F,) int64 in the video"""
    frames: list[int]
    """the same on the host"""
    pixels: Tensor
    """(F, 3, H, W) uint8, the canvas that patches tile"""
    split: Tensor
    """(F,) int64: 0 trained, 1 unused, 2 held out"""
    hidden: Tensor | None
    """(F, 1, H, W) bool, what the mask hides; None without one"""
    embeddings: Tensor | None
    """(F, rows, cols, D) float16; None without targets"""


class MomentBatch(NamedTuple):
    """Moments to decode, on frames or between them; no pixels are known."""

    times: Tensor
    """(F,) float32, from 0 for the first frame to 1 for the last"""
    numbers: list[float]
    """the same in frames: 12.5 lies between frames 12 and 13"""
