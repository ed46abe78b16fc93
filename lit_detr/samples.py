"""The types that everything in this package shares: samples at rest, packed targets, what a network gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["DetectionSample", "DetectionTable", "Output", "Targets", "pack_targets"]

BUCKET = 32  # the packed width is a multiple of it, so that few shapes ever occur


@dataclass(frozen=True)
class DetectionSample:
    """One image and what is on it.

    Attributes:
        name: Unique in its table: the file's path below the root, without suffix.
        image: The file.
        boxes: (N, 4) float32 x1 y1 x2 y2 in pixels of the file; pixel centres are at integers + 0.5 on this scale, so
            that a box over the whole image is 0 0 width height.
        labels: (N,) int64 class indices from 0.
        area: (N,) float32 as annotated: it decides the size range in metrics.
        crowd: (N,) bool; such boxes are neither trained on nor counted as missed.
        size: (height, width) in pixels where the annotation names it, to be checked against the file.
        image_id: As the annotation has it, or the position in the split.
        group: What the image comes from, such as a video: splits and bootstraps keep it together.
    """

    name: str
    image: Path
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    area: NDArray[np.float32]
    crowd: NDArray[np.bool_]
    size: tuple[int, int] | None
    image_id: int
    group: str


@dataclass(frozen=True)
class DetectionTable:
    """A data set.

    Attributes:
        splits: Samples by split: `train`, `val`, `test` as far as they exist.
        class_names: By class index.
        category_ids: What the files call each class, for export in the same format.
    """

    splits: dict[str, list[DetectionSample]]
    class_names: list[str]
    category_ids: list[int] = field(default_factory=list)


class Targets(NamedTuple):
    """The boxes of a batch, packed.

    Attributes:
        boxes: (B, T, 4) float32 centre x, centre y, width, height as shares of the padded image; rows beyond an
            image's count hold a box of no size in the middle.
        labels: (B, T) int64, 0 beyond the number.
        lengths: (B,) int64 on the device, how many rows are boxes.
        counts: The same on the host, so that nobody waits for the device.
    """

    boxes: Tensor
    labels: Tensor
    lengths: Tensor
    counts: list[int]

    @property
    def valid(self) -> Tensor:
        """(B, T) bool."""
        return torch.arange(self.boxes.shape[1], device=self.boxes.device) < self.lengths[:, None]

    def to(self, device: torch.device) -> Targets:
        """Move to a device without waiting."""
        boxes, labels, lengths = (t.to(device, non_blocking=True) for t in self[:3])
        return Targets(boxes, labels, lengths, self.counts)


class Output(NamedTuple):
    """What a network gives in training; evaluation uses the last entry along L of the first two.

    Attributes:
        logits: (L, B, Q, K) of the decoder layers, the last layer last.
        boxes: (L, B, Q, 4) float32 cx cy w h as shares of the padded image.
        encoder_logits: (B, Q, K) of the selected proposals.
        encoder_boxes: (B, Q, 4) float32.
        noise_logits: (L, B, N, K) of the denoising queries, None without.
        noise_boxes: (L, B, N, 4) float32.
        noise_target: (B, N) int64: for each denoising query the row of its box in the targets, -1 where there is none.
        noise_positive: (B, N) bool: whether it is to find that box, or to say that nothing is there.
    """

    logits: Tensor
    boxes: Tensor
    encoder_logits: Tensor
    encoder_boxes: Tensor
    noise_logits: Tensor | None = None
    noise_boxes: Tensor | None = None
    noise_target: Tensor | None = None
    noise_positive: Tensor | None = None


def pack_targets(boxes: Sequence[Tensor], labels: Sequence[Tensor], bucket: int = BUCKET) -> Targets:
    """Pack the boxes of a batch.

    Args:
        boxes: Per image (N, 4) cx cy w h as shares of the padded image.
        labels: Per image (N,) class indices.
        bucket: The width is rounded up to a multiple of it, and at least it.

    Example:
        >>> packed = pack_targets([torch.full((2, 4), 0.5), torch.zeros(0, 4)], [torch.ones(2), torch.zeros(0)])
        >>> packed.boxes.shape, packed.counts, packed.valid.sum(1).tolist()
        (torch.Size([2, 32, 4]), [2, 0], [2, 0])
    """
    counts = [len(b) for b in boxes]
    width = max(bucket, -(-max(counts, default=0) // bucket) * bucket)
    device = boxes[0].device
    out = torch.tensor([0.5, 0.5, 0.0, 0.0], device=device).repeat(len(boxes), width, 1)
    classes = torch.zeros(len(boxes), width, dtype=torch.int64, device=device)
    for i, (b, c) in enumerate(zip(boxes, labels, strict=True)):
        out[i, : len(b)], classes[i, : len(c)] = b, c.long()
    return Targets(out, classes, torch.tensor(counts, device=device), counts)
