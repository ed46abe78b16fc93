"""Box formats and how alike two boxes are: IoU, GIoU, NWD.

All functions take boxes of any floating type and calculate in float32, under autocast too (float64 stays float64): in
bfloat16 a coordinate between a half and the whole of a 640 px image moves in steps of 2.5 px. The measures broadcast,
so that boxes of one shape give one value per pair, and the `pairwise_` forms all N x M of them. Nothing waits for the
device.

torchvision has the same measures and the tests compare with them. They are not called here, since its elementwise form
selects by a bool mask, which waits for the device, and adds 1e-7 to every area: of a 2 px box in a 640 px image, as
shares, that is one percent. Its pairwise forms give NaN for two boxes without area.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "cxcywh_to_xyxy",
    "generalised_iou",
    "iou",
    "iou_and_giou",
    "nwd",
    "pairwise_giou",
    "pairwise_iou",
    "pairwise_nwd",
    "to_pixels",
    "xyxy_to_cxcywh",
]

SMALLEST = 1e-12  # area that is divided by at least; as shares of an image, a square of a millionth of its side


def wide(x: Tensor) -> Tensor:
    """The tensor in float32, or in float64 where it is already."""
    return x if x.dtype == torch.float64 else x.float()


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) centre and size to corners, in any unit.

    Example:
        >>> cxcywh_to_xyxy(torch.tensor([5.0, 5.0, 2.0, 4.0]))
        tensor([4., 3., 6., 7.])
    """
    centre, size = wide(boxes).split(2, -1)
    half = size / 2
    return torch.cat((centre - half, centre + half), -1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(..., 4) corners to centre and size, in any unit.

    Example:
        >>> xyxy_to_cxcywh(torch.tensor([4.0, 3.0, 6.0, 7.0]))
        tensor([5., 5., 2., 4.])
    """
    low, high = wide(boxes).split(2, -1)
    return torch.cat(((low + high) / 2, high - low), -1)


def to_pixels(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Shares of an image to pixels of it.

    Args:
        boxes: (..., 4) in either format.
        size: (height, width) of the image in pixels.

    Example:
        >>> to_pixels(torch.tensor([0.5, 0.5, 0.25, 0.1]), (100, 200))
        tensor([100.,  50.,  50.,  10.])
    """
    boxes = wide(boxes)
    # Filled on the device: a tensor made of a list would be copied to it, and that waits.
    scale = torch.empty(4, device=boxes.device, dtype=boxes.dtype)
    scale[0::2].fill_(size[1])
    scale[1::2].fill_(size[0])
    return boxes * scale


def _area(size: Tensor) -> Tensor:
    return size[..., 0] * size[..., 1]


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Areas of intersection and union of (..., 4) corners."""
    both = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp_min(0)
    inter = _area(both)
    return inter, _area(a[..., 2:] - a[..., :2]) + _area(b[..., 2:] - b[..., :2]) - inter


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union.

    Args:
        a: (..., 4) corners, in any unit.
        b: (..., 4) likewise, of a shape that broadcasts with it.

    Returns:
        (...) from 0 to 1; 0 for two boxes without area.

    Example:
        >>> iou(torch.tensor([0.0, 0.0, 2.0, 2.0]), torch.tensor([1.0, 0.0, 3.0, 2.0]))
        tensor(0.3333)
    """
    inter, union = _overlap(wide(a), wide(b))
    return inter / union.clamp_min(SMALLEST)


def iou_and_giou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`iou` and `generalised_iou` in one pass."""
    a, b = wide(a), wide(b)
    inter, union = _overlap(a, b)
    ratio = inter / union.clamp_min(SMALLEST)
    hull = _area(torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2]))
    return ratio, ratio - (hull - union) / hull.clamp_min(SMALLEST)


def generalised_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU minus the share of the common hull that is in neither box.

    Args:
        a: (..., 4) corners, in any unit, x and y independently.
        b: (..., 4) likewise, of a shape that broadcasts with it.

    Returns:
        (...) from -1 to 1.

    Source:
        Rezatofighi et al., arXiv 1902.09630.

    Example:
        >>> generalised_iou(torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([3.0, 0.0, 4.0, 1.0]))
        tensor(-0.5000)
    """
    return iou_and_giou(a, b)[1]


def nwd(a: Tensor, b: Tensor, constant: float) -> Tensor:
    """Normalised Wasserstein distance, which is a likeness: exp(-sqrt(W) / C) with W of the boxes as Gaussians.

    W = dcx² + dcy² + (dw / 2)² + (dh / 2)². It falls smoothly where boxes do not touch, unlike IoU, but depends on the
    unit.

    Args:
        a: (..., 4) centre and size in pixels of the network's input.
        b: (..., 4) likewise, of a shape that broadcasts with it.
        constant: C in the same pixels, about the mean size of an object.

    Returns:
        (...) above 0 to 1. The gradient is 0 where the boxes are equal.

    Source:
        Wang et al., arXiv 2110.13389.

    Example:
        >>> nwd(torch.tensor([0.0, 0.0, 8.0, 8.0]), torch.tensor([3.0, 4.0, 8.0, 8.0]), 5.0)
        tensor(0.3679)
    """
    centre, size = (wide(a) - wide(b)).square().split(2, -1)
    # The square root has no gradient at 0, and infinity times nothing would be NaN.
    distance = (centre + size / 4).sum(-1).clamp_min(SMALLEST).sqrt()
    return torch.exp(distance / -constant)


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """(..., N, M) IoU of every (..., N, 4) with every (..., M, 4) corners."""
    return iou(a.unsqueeze(-2), b.unsqueeze(-3))


def pairwise_giou(a: Tensor, b: Tensor) -> Tensor:
    """(..., N, M) generalised IoU of every (..., N, 4) with every (..., M, 4) corners."""
    return generalised_iou(a.unsqueeze(-2), b.unsqueeze(-3))


def pairwise_nwd(a: Tensor, b: Tensor, constant: float) -> Tensor:
    """(..., N, M) NWD of every (..., N, 4) with every (..., M, 4) centre and size in pixels."""
    return nwd(a.unsqueeze(-2), b.unsqueeze(-3), constant)
