"""Changes of grey values, each for many items with an amount of their own at once.

An item is one channel of one sample. Every change takes `x` (n, ...), a list of tensors with n rows on the same device
and the generator of the device's random numbers, and returns new values. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "Change",
    "blur",
    "brightness",
    "coarse_indices",
    "coarsen",
    "contrast",
    "gamma",
    "gamma_inverted",
    "kernels",
    "noise",
]

Change = Callable[[Tensor, list[Tensor], torch.Generator], Tensor]


def _column(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (x.ndim - 1))


def noise(x: Tensor, values: list[Tensor], generator: torch.Generator) -> Tensor:
    """Gaussian noise. Values: standard deviation."""
    return x + _column(values[0], x) * torch.randn(x.shape, generator=generator, device=x.device)


def brightness(x: Tensor, values: list[Tensor], generator: torch.Generator) -> Tensor:
    """The values times a factor. Values: factor."""
    return x * _column(values[0], x)


def contrast(x: Tensor, values: list[Tensor], generator: torch.Generator) -> Tensor:
    """The distance to the mean times a factor, between the old extremes. Values: factor."""
    voxels = tuple(range(1, x.ndim))
    mean, low, high = x.mean(voxels, keepdim=True), x.amin(voxels, keepdim=True), x.amax(voxels, keepdim=True)
    return torch.clamp((x - mean) * _column(values[0], x) + mean, low, high)


def gamma(x: Tensor, values: list[Tensor], generator: torch.Generator) -> Tensor:
    """A power of the values scaled to 0..1, with the old mean and deviation. Values: exponent."""
    voxels = tuple(range(1, x.ndim))
    low, high = x.amin(voxels, keepdim=True), x.amax(voxels, keepdim=True)
    new = ((x - low) / (high - low).clamp_min(1e-7)).pow(_column(values[0], x))
    deviation, mean = torch.std_mean(x, voxels, keepdim=True)
    new_deviation, new_mean = torch.std_mean(new, voxels, keepdim=True)
    return (new - new_mean) / new_deviation.clamp_min(1e-7) * deviation + mean


def gamma_inverted(x: Tensor, values: list[Tensor], generator: torch.Generator) -> Tensor:
    """`gamma` on the negative. Values: exponent."""
    return -gamma(-x, values, generator)


def kernels(sigma: NDArray[np.float64], largest: float) -> NDArray[np.float64]:
    """(n, d, 2r + 1) Gaussians cut off at 3 of the largest sigma."""
    radius = max(1, int(3 * largest + 0.5))
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma[..., None]) ** 2)
    return weights / weights.sum(-1, keepdims=True)


def blur(x: Tensor, values: list[Tensor], generator: torch.Generator) -> Tensor:
    """Gaussian blur, the border voxels repeated. Values: `kernels`.

    Axis by axis as a sum of shifted copies, since every item has its own kernel.
    """
    weights = values[0]
    radius = weights.shape[-1] // 2
    for axis in range(1, x.ndim):
        size = x.shape[axis]
        wide = x.index_select(axis, torch.arange(-radius, size + radius, device=x.device).clamp(0, size - 1))
        x = torch.zeros_like(x)
        for i in range(weights.shape[-1]):
            x.addcmul_(_column(weights[:, axis - 1, i].contiguous(), x), wide.narrow(axis, i, size))
    return x


def coarse_indices(size: int, share: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any]]:
    """Per item and voxel of an axis: the two voxels that survive around it, and the weight of the second.

    It is nearest-exact to `size * share` voxels and linear back, in one step.
    """
    coarse = np.clip(np.rint(size * share), 1, size)[:, None]
    place = np.maximum((np.arange(size) + 0.5) * coarse / size - 0.5, 0)
    left = np.floor(place)
    kept = [np.floor((j + 0.5) * size / coarse).astype(np.int64) for j in (left, np.minimum(left + 1, coarse - 1))]
    return kept[0], kept[1], place - left


def coarsen(x: Tensor, values: list[Tensor], generator: torch.Generator) -> Tensor:
    """Simulated low resolution. Values: `coarse_indices` of each axis, one after the other."""
    for axis in range(1, x.ndim):
        shape = (len(x), *(x.shape[a] if a == axis else 1 for a in range(1, x.ndim)))
        left, right, weight = (v.view(shape) for v in values[3 * axis - 3 : 3 * axis])
        x = torch.lerp(torch.take_along_dim(x, left, axis), torch.take_along_dim(x, right, axis), weight)
    return x
