"""Slices of a volume with the contours of truth and prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["chosen_slices", "contours"]

TRUTH, PREDICTION = "#2ca02c", "#d62728"


def chosen_slices(mask: NDArray[np.bool_], count: int = 4) -> list[int]:
    """Slices along the first axis with most foreground, ascending; evenly spread ones where there is none.

    >>> mask = np.zeros((6, 2, 2), bool)
    >>> mask[2], mask[4, 0] = True, True
    >>> chosen_slices(mask, 2)
    [2, 4]
    """
    area = mask.sum((1, 2))
    if not area.any():
        return sorted({int(i) for i in np.linspace(0, len(mask) - 1, count + 2)[1:-1]})
    best = np.argsort(-area, kind="stable")[:count]
    return sorted(int(i) for i in best if area[i])


def contours(
    image: Tensor,
    truth: Tensor | None,
    label: Tensor,
    title: str,
    *,
    native: tuple[int, ...],
    count: int = 4,
) -> Figure:
    """A row of slices: the first channel in grey, the truth's outline green, the prediction's red.

    Args:
        image: (C, D, H, W), of any grid.
        truth: (D, H, W) class indices, or None.
        label: (D, H, W) class indices of the prediction.
        title: Above the row.
        native: (D, H, W) of truth and label; the image is resampled to it.
        count: Number of slices.

    Returns:
        A figure; whoever takes it closes it.
    """
    from matplotlib.figure import Figure

    grey = image[:1].float().cpu()
    if tuple(grey.shape[1:]) != tuple(native):
        grey = F.interpolate(grey[None], size=native, mode="trilinear", align_corners=False)[0]
    volume = grey[0].numpy()
    found = label.cpu().numpy()
    true = None if truth is None else truth.cpu().numpy()
    union = found > 0 if true is None else (found > 0) | (true > 0)
    slices = chosen_slices(union, count)
    figure = Figure(figsize=(3 * len(slices), 3.3), layout="constrained")
    low, high = np.percentile(volume, (0.5, 99.5))
    for i, z in enumerate(slices):
        axes = figure.add_subplot(1, len(slices), i + 1)
        axes.imshow(
            volume[z], cmap="gray", vmin=low, vmax=max(high, low + 1e-6), origin="lower", interpolation="nearest"
        )
        for mask, colour in ((true, TRUTH), (found, PREDICTION)):
            if mask is None:
                continue
            for value in np.unique(mask[z][mask[z] > 0]):
                axes.contour(mask[z] == value, levels=[0.5], colors=colour, linewidths=0.9)
        axes.set_title(f"slice {z}", fontsize=8)
        axes.set_axis_off()
    figure.suptitle(f"{title}   (green: truth, red: prediction)", fontsize=9)
    return figure
