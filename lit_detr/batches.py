"""A batch as the network gets it, with its boxes packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_detr.augment import Boxes
from lit_detr.samples import Targets, pack_targets

__all__ = ["ReadyBatch", "to_targets"]


class ReadyBatch(NamedTuple):
    """What the network gets.

    Attributes:
        image: (B, C, H, W) float32 from 0 to 1.
        mask: (B, H, W) bool, true where the frame is image; None where all of it is.
        targets: Packed boxes; None for images without annotations.
        position: (B,) int64 on the host, in the split.
        seed: What is random in the step follows from it, so that a resumed run takes the same one.
    """

    image: Tensor
    mask: Tensor | None
    targets: Targets | None
    position: Tensor
    seed: int


def to_targets(boxes: Sequence[Boxes], frame: tuple[int, int], device: torch.device) -> Targets:
    """Pack boxes in frame pixels as shares of the frame, and send them without waiting.

    Example:
        >>> import numpy as np
        >>> box = Boxes(np.array([[0, 0, 8, 4]], np.float32), np.array([2]))
        >>> to_targets([box], (8, 16), torch.device("cpu")).boxes[0, 0].tolist()
        [0.25, 0.25, 0.5, 0.5]
    """
    height, width = frame
    shares = []
    for own in boxes:
        b = torch.from_numpy(own.boxes) / torch.tensor([width, height, width, height])
        shares.append(torch.cat([(b[:, :2] + b[:, 2:]) / 2, b[:, 2:] - b[:, :2]], dim=1))
    packed = pack_targets(shares, [torch.from_numpy(own.labels) for own in boxes])
    if device.type == "cuda":  # pinned, or the copy would wait
        pinned = (t.pin_memory() for t in packed[:3])
        packed = Targets(*pinned, packed.counts)  # type: ignore[call-arg]
    return packed.to(device)
