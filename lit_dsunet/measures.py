"""Dice, surface distances and volumes of one case.

`lit_dsunet.metrics` names the conventions and collects the same figures over the cases of an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from scipy.spatial import KDTree
from torch import Tensor

from lit_cli.errors import InputError
from lit_dsunet.components import Connectivity, Indices, Mask, check_masks, foreground, lesions

__all__ = [
    "DENSE",
    "Percentile",
    "Spacing",
    "class_counts",
    "dice",
    "dice_from_counts",
    "hd95",
    "lesion_count_difference",
    "millilitres",
    "millimetres",
    "surface_distance",
    "volume_difference_ml",
]

Spacing = Sequence[float] | NDArray[np.floating] | Tensor
Percentile = Literal["max", "pooled"]

DENSE = 20  # voxels of a box per surface point below which its distance map is faster than a search tree


def class_counts(prediction: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Voxels that both masks, the prediction and the target give to each foreground class.

    Args:
        prediction: (B, ...) class indices, integers or booleans.
        target: The same shape.
        num_classes: K, the background counted.

    Returns:
        (B, 3, K - 1) int64. Does not wait for the device.
    """
    # Case by case: on a CPU a sum along dimensions takes ten times as long as a whole count.
    counts = []
    for a, b in zip(prediction, target, strict=True):
        for index in range(1, num_classes):
            predicted, annotated = a == index, b == index
            counts += [torch.count_nonzero(mask) for mask in (predicted & annotated, predicted, annotated)]
    return torch.stack(counts).view(len(prediction), num_classes - 1, 3).transpose(1, 2)


def dice_from_counts(counts: Tensor, empty: float = 1.0) -> Tensor:
    """Dice coefficients from the voxels of `class_counts`.

    Args:
        counts: (..., 3, K - 1).
        empty: Value of a class that neither mask has.

    Returns:
        (..., K - 1) float64.
    """
    both, total = counts[..., 0, :].double(), counts[..., 1:, :].sum(-2).double()
    return torch.where(total > 0, 2 * both / total.clamp_min(1), empty)


def dice(prediction: Mask, target: Mask, num_classes: int = 2, empty: float = 1.0) -> Tensor:
    """Dice coefficient of each foreground class of one case, 2|A∩B| / (|A|+|B|).

    Args:
        prediction: Class indices of any shape, integers or booleans.
        target: The same shape.
        num_classes: K, the background counted.
        empty: Value of a class that neither mask has, 1 or NaN.

    Returns:
        (K - 1,) float64, on the device of the prediction.

    Raises:
        ValueError: For different shapes, or for numbers that are no class indices.

    Example:
    >>> dice(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 0, 0]), num_classes=4)
    tensor([0.6667, 0.0000, 1.0000], dtype=torch.float64)
    """
    a, b = torch.as_tensor(prediction), torch.as_tensor(target)
    check_masks(a, b)
    return dice_from_counts(class_counts(a[None], b[None], num_classes)[0], empty)


def hd95(
    prediction: Mask,
    target: Mask,
    spacing: Spacing,
    convention: Percentile = "max",
    both_empty: float = math.nan,
    one_empty: float = math.nan,
    percentile: float = 95.0,
) -> float:
    """Percentile of the distances between the surfaces of two masks.

    Args:
        prediction: (D, H, W), the object where not zero.
        target: The same shape.
        spacing: (3,) mm per voxel along D, H, W.
        convention: `max` of the percentiles of both directions, or percentile of both directions `pooled`.
        both_empty: Value where neither mask has an object.
        one_empty: Value where only one has.
        percentile: 95, or 100 for the Hausdorff distance itself. Interpolates linearly.

    Returns:
        Millimetres.

    Raises:
        InputError: For another convention, or a spacing that is not three positive numbers.
        ValueError: For different shapes, or for numbers that are no mask.

    Example:
    >>> a, b = np.zeros((2, 1, 8, 8), dtype=np.uint8)
    >>> a[0, 2, 2] = b[0, 2, 5] = 1
    >>> hd95(a, b, spacing=(5.0, 1.0, 2.0))
    6.0
    """
    check_masks(prediction, target)
    scale = millimetres(spacing)
    if convention not in ("max", "pooled"):
        raise InputError(f"convention: got {convention!r}, expected 'max' or 'pooled'")
    a, b = foreground(prediction), foreground(target)
    if not (len(a) and len(b)):
        return one_empty if len(a) or len(b) else both_empty
    return surface_distance(a, b, tuple(target.shape), scale, convention, percentile)


def surface_distance(
    a: Indices,
    b: Indices,
    shape: tuple[int, ...],
    scale: NDArray[np.float64],
    convention: Percentile,
    percentile: float = 95.0,
) -> float:
    """`hd95` of two sets of voxels, neither of them empty."""
    first, second = (_surface(voxels, shape) for voxels in (a, b))
    distances = [_nearest(first, second, scale), _nearest(second, first, scale)]
    if convention == "pooled":
        return float(np.percentile(np.concatenate(distances), percentile))
    return float(max(np.percentile(one, percentile) for one in distances))


def _nearest(points: Indices, surface: Indices, scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """Millimetres from each of the points (N, 3) to the nearest of a surface (M, 3)."""
    low = np.minimum(points.min(0), surface.min(0))
    extent = np.maximum(points.max(0), surface.max(0)) - low + 1
    # Lesions far apart are few points in a large box, which a search tree does not fill; a noisy mask is the contrary.
    if DENSE * (len(points) + len(surface)) < extent.prod():
        return KDTree(surface * scale).query(points * scale)[0]
    away = np.ones(extent, dtype=bool)
    away[tuple((surface - low).T)] = False
    return np.asarray(distance_transform_edt(away, sampling=scale))[tuple((points - low).T)]


def _surface(voxels: Indices, shape: tuple[int, ...]) -> Indices:
    """(N, 3) positions of the voxels that have a background voxel at one of their faces."""
    at = np.stack(np.unravel_index(voxels, shape), 1)
    low = at.min(0) - 1
    box = np.zeros(at.max(0) - low + 2, dtype=bool)
    box[tuple((at - low).T)] = True
    inner = box[1:-1, 1:-1, 1:-1].copy()
    for axis in range(3):
        for side in (slice(None, -2), slice(2, None)):
            inner &= box[tuple(side if a == axis else slice(1, -1) for a in range(3))]
    return at[~inner[tuple((at - low - 1).T)]]


def volume_difference_ml(prediction: Mask, target: Mask, spacing: Spacing) -> float:
    """Absolute difference of the volumes of two masks in millilitres; `spacing` is mm along D, H, W.

    >>> volume_difference_ml(np.ones((10, 10, 10), bool), np.zeros((10, 10, 10), bool), (1.0, 1.0, 2.0))
    2.0
    """
    check_masks(prediction, target)
    return abs(len(foreground(prediction)) - len(foreground(target))) * millilitres(spacing)


def lesion_count_difference(prediction: Mask, target: Mask, connectivity: Connectivity = 26) -> int:
    """Absolute difference of the numbers of lesions in two masks (D, H, W)."""
    counts = lesions(prediction, target, connectivity=connectivity)
    return abs(counts.n_target - counts.n_pred)


def millimetres(spacing: Spacing) -> NDArray[np.float64]:
    """(3,) mm per voxel along D, H, W; anything but three positive numbers is refused."""
    values = spacing.detach().cpu().numpy() if isinstance(spacing, Tensor) else spacing
    values = np.asarray(values, dtype=np.float64)
    if values.shape != (3,) or not (np.isfinite(values) & (values > 0)).all():
        raise InputError(f"spacing: got {values.tolist()}, expected three positive numbers, mm along D, H, W")
    return values


def millilitres(spacing: Spacing) -> float:
    """Volume of a voxel of this spacing (mm) in millilitres."""
    return float(np.prod(millimetres(spacing))) / 1000
