"""From a volume as it was read to what the network sees, and its logits back to the file's voxels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from lit_dsunet.samples import Volume

__all__ = ["Normalise", "Preprocessing", "native_logits", "normalise", "prepare_volume", "resample_image"]

Normalise = Literal["zscore", "nonzero", "none"]
Triple = tuple[int, int, int]
ANISOTROPIC = 3.0  # beyond this ratio of spacings a spline along the coarse axis would ring over several mm


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """What is done to every volume of a run.

    Attributes:
        spacing: mm per voxel along D, H, W; None keeps each volume's own grid.
        normalise: `zscore` over all voxels of a channel, `nonzero` over those that are not 0 (skull-stripped images;
            the others stay 0), or `none`. It comes before the resampling, which would change the statistics.
    """

    spacing: tuple[float, float, float] | None = None
    normalise: Normalise = "zscore"

    def size(self, shape: Sequence[int], spacing: Sequence[float]) -> Triple:
        """Voxels of a volume after the resampling."""
        if self.spacing is None:
            return (int(shape[0]), int(shape[1]), int(shape[2]))
        d, h, w = (max(1, round(n * own / new)) for n, own, new in zip(shape, spacing, self.spacing, strict=True))
        return d, h, w


def prepare_volume(volume: Volume, how: Preprocessing) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None]:
    """Normalise, then resample.

    Returns:
        Image (C, d, h, w) float32 and label (d, h, w) uint8, or None.
    """
    image = normalise(volume.image, how.normalise)
    size = how.size(image.shape[1:], volume.geometry.spacing)
    if size == image.shape[1:]:
        return image, volume.label
    image = resample_image(image, size, volume.geometry.spacing)
    label = None if volume.label is None else resample_label(volume.label, size)
    return image, label


def normalise(image: NDArray[np.float32], how: Normalise) -> NDArray[np.float32]:
    """(C, D, H, W) with mean 0 and standard deviation 1 per channel; a constant channel becomes 0."""
    if how == "none":
        return image
    out = np.zeros_like(image, dtype=np.float32)
    for channel, target in zip(image, out, strict=True):
        mask = channel != 0 if how == "nonzero" else np.ones(channel.shape, bool)
        values = channel[mask].astype(np.float64)  # maxima of 1e6 beside a median of 1e3 in fp32 lose the variance
        if values.size:
            target[mask] = (values - values.mean()) / max(float(values.std()), 1e-8)
    return out


def resample_image(
    image: NDArray[np.float32], size: Triple, spacing: Sequence[float] | None = None
) -> NDArray[np.float32]:
    """Cubic splines between voxel centres; nearest along an axis whose spacing is much coarser than the others.

    Args:
        image: (C, D, H, W).
        size: New (D, H, W).
        spacing: mm per voxel of the old grid.
    """
    orders = [3, 3, 3]
    if spacing is not None and max(spacing) / min(spacing) > ANISOTROPIC:
        orders[int(np.argmax(spacing))] = 0
    out = image
    for order in (0, 3):
        zoom = [size[a] / image.shape[a + 1] if orders[a] == order else 1.0 for a in range(3)]
        if any(z != 1 for z in zoom):
            out = np.stack(
                [np.asarray(ndimage.zoom(c, zoom, order=order, mode="nearest", grid_mode=True)) for c in out]
            )
    return out.astype(np.float32)


def resample_label(label: NDArray[np.uint8], size: Triple) -> NDArray[np.uint8]:
    """Linear occupancy of each class, then the largest: small structures keep their volume better than by nearest."""
    best = np.zeros(size, np.uint8)
    most = np.full(size, -1.0, np.float32)
    for value in np.unique(label):
        mask = torch.from_numpy((label == value).astype(np.float32))[None, None]
        share = F.interpolate(mask, size=size, mode="trilinear", align_corners=False)[0, 0].numpy()
        wins = share > most
        best[wins], most[wins] = value, share[wins]
    return best


def native_logits(logits: Tensor, shape: Triple) -> Tensor:
    """Logits on the grid of the file.

    Args:
        logits: (K, d, h, w).
        shape: (D, H, W) of the volume before `prepare_volume`.

    Returns:
        (K, D, H, W), on the same device.
    """
    if tuple(logits.shape[1:]) == tuple(shape):
        return logits
    return F.interpolate(logits[None], size=shape, mode="trilinear", align_corners=False)[0]
