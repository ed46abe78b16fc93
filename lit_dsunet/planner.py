"""Spacing, patch, network and batch size from the data and the memory of the card."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lit_cli.errors import InputError
from lit_dsunet.models import Arch, build_network

__all__ = ["Fingerprint", "Plan", "activations", "fingerprint", "make_plan", "topology"]

Triple = tuple[int, int, int]
GIB = 2**30
COARSE = 3.0  # an axis this much coarser than the others is resampled to its finer tenth
SAME = 2.0  # axes whose spacings differ by less are pooled together
SMALLEST = 4  # voxels of the coarsest feature map along an axis
MOST_POOLINGS = 5
# Bytes per element of a convolution's output that a 16-bit training step keeps: the output, what the normalisation and
# the activation keep, and gradients on the way back. Calibrated on measured peaks of PlainConvUNet (96^3 batch 8: 7.7
# GiB, 128^3 batch 2: 4.7 GiB); `benchmarks/profiles.py` checks each profile against its card.
BYTES_PER_ELEMENT = 5.0
BYTES_PER_PARAMETER = 24  # weight, gradient, two moments, average, and a 16-bit copy
CONTEXT_GIB = 0.6
HEADROOM = 0.85  # of what is left, for the allocator's gaps and validation
MOST_BATCH = 64


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What the planner needs to know of a data set.

    Attributes:
        sizes: (N, 3) voxels along D, H, W as stored.
        spacings: (N, 3) mm.
        channels: Image channels.
        classes: Background included.
    """

    sizes: np.ndarray
    spacings: np.ndarray
    channels: int
    classes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What to train with.

    Attributes:
        spacing: mm along D, H, W.
        median_size: Voxels of the median volume at that spacing.
        patch: Voxels along D, H, W.
        batch_size: Patches per step.
        strides: Per stage and axis.
        kernels: Per stage and axis.
        arch: Network family.
        memory_gib: Estimate of a training step's peak.
    """

    spacing: tuple[float, float, float]
    median_size: Triple
    patch: Triple
    batch_size: int
    strides: list[list[int]]
    kernels: list[list[int]]
    arch: Arch
    memory_gib: float

    def yaml(self) -> str:
        """The lines of a LightningCLI file, with the reasons as comments."""
        return "\n".join(
            [
                f"# Median volume at this spacing: {_listed(self.median_size)} voxels.",
                f"# Estimated peak of a 16-bit step: {self.memory_gib:.1f} GiB.",
                "model:",
                f"  arch: {self.arch}",
                f"  strides: {_listed([_listed(s) for s in self.strides])}",
                f"  kernels: {_listed([_listed(k) for k in self.kernels])}",
                f"  deep_supervision: {min(3, max(0, len(self.strides) - 3))} # not on the two coarsest maps",
                "data:",
                f"  spacing: {_listed(f'{s:g}' for s in self.spacing)} # mm along D, H, W",
                f"  patch_size: {_listed(self.patch)} # D, H, W",
                f"  batch_size: {self.batch_size}",
                "",
            ]
        )


def _listed(values: Sequence[object] | object) -> str:
    return f"[{', '.join(str(v) for v in values)}]"  # type: ignore[union-attr]


def fingerprint(
    sizes: Sequence[Sequence[int]], spacings: Sequence[Sequence[float]], channels: int, classes: int
) -> Fingerprint:
    """From the headers of all volumes.

    Raises:
        InputError: there are none.
    """
    if not len(sizes):
        raise InputError("plan: the data set has no volumes to plan from")
    return Fingerprint(np.asarray(sizes, float), np.asarray(spacings, float), channels, classes)


def target_spacing(data: Fingerprint) -> tuple[float, float, float]:
    """Median spacing; the tenth percentile along an axis that is much coarser and shorter than the others."""
    spacing = np.median(data.spacings, axis=0)
    size = np.median(data.sizes, axis=0)
    worst = int(np.argmax(spacing))
    others = [a for a in range(3) if a != worst]
    if spacing[worst] > COARSE * spacing[others].max() and size[worst] * COARSE < size[others].min():
        spacing[worst] = max(np.percentile(data.spacings[:, worst], 10), spacing[others].max())
    d, h, w = (float(round(s, 6)) for s in spacing)
    return d, h, w


def topology(patch: Sequence[int], spacing: Sequence[float]) -> tuple[list[list[int]], list[list[int]]]:
    """Strides and kernels: an axis is halved while its map stays large enough and its spacing is the finest so far.

    Axes whose spacing is within a factor of two of the finest are halved together; a coarse axis gets kernels of 1
    until the others have caught up with it.

    >>> topology([40, 56, 40], [1.0, 1.0, 1.0])
    ([[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]], [[3, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]])
    >>> topology([16, 128, 128], [5.0, 1.0, 1.0])[0]
    [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2]]
    """
    size, fine = [float(p) for p in patch], [float(s) for s in spacing]
    strides, kernels = [[1, 1, 1]], [[3 if s < SAME * min(fine) else 1 for s in fine]]
    pooled = [0, 0, 0]
    for _ in range(MOST_POOLINGS):
        can = [a for a in range(3) if size[a] >= 2 * SMALLEST]
        if not can:
            break
        finest = min(fine[a] for a in can)
        stride = [2 if a in can and fine[a] < SAME * finest else 1 for a in range(3)]
        fine = [f * s for f, s in zip(fine, stride, strict=True)]
        size = [math.ceil(n / s) for n, s in zip(size, stride, strict=True)]
        pooled = [p + (s > 1) for p, s in zip(pooled, stride, strict=True)]
        strides.append(stride)
        kernels.append([3 if p or fine[a] < SAME * min(fine) else 1 for a, p in enumerate(pooled)])
    return strides, kernels


def _multiple(patch: Sequence[float], spacing: Sequence[float]) -> Triple:
    """The next smaller patch that the network's strides divide, at least one coarsest voxel."""
    size = [max(1, int(p)) for p in patch]
    for _ in range(8):  # rounding can change the strides, which change the rounding
        strides, _ = topology(size, spacing)
        total = np.prod(strides, axis=0).astype(int)
        rounded = [max(int(t), int(n) // int(t) * int(t)) for n, t in zip(size, total, strict=True)]
        if rounded == size:
            break
        size = rounded
    return size[0], size[1], size[2]


def _enclosing(patch: Sequence[float], spacing: Sequence[float]) -> Triple:
    """The next larger patch that the network's strides divide."""
    strides, _ = topology([math.ceil(p) for p in patch], spacing)
    total = np.prod(strides, axis=0)
    d, h, w = (int(math.ceil(p / t) * t) for p, t in zip(patch, total, strict=True))
    return d, h, w


def activations(network: nn.Module, channels: int, patch: Sequence[int]) -> int:
    """Elements of all convolutions' outputs for one patch, found without computing them.

    Args:
        network: On the meta device.
        channels: Image channels.
        patch: Voxels per axis.
    """
    total = 0

    def count(module: nn.Module, args: object, out: Tensor) -> None:
        nonlocal total
        total += out.numel()

    kinds = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    handles = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        network(torch.empty(1, channels, *patch, device="meta"))
    for handle in handles:
        handle.remove()
    return total


@functools.lru_cache(maxsize=64)
def _cost(
    channels: int, classes: int, arch: Arch, strides: tuple[tuple[int, ...], ...], kernels: tuple[tuple[int, ...], ...]
) -> tuple[float, int]:
    """Elements per voxel of a patch, and parameters. All maps scale with the patch, so the smallest one tells."""
    with torch.device("meta"):
        network = build_network(
            in_channels=channels, num_classes=classes, arch=arch, strides=strides, kernels=kernels
        ).eval()
    smallest = [2 * math.prod(axis) for axis in zip(*strides, strict=True)]  # a single voxel cannot be normalised
    return activations(network, channels, smallest) / math.prod(smallest), sum(p.numel() for p in network.parameters())


def estimate_gib(data: Fingerprint, patch: Triple, spacing: Sequence[float], batch: int, arch: Arch) -> float:
    """Peak of a 16-bit training step, in GiB."""
    strides, kernels = topology(patch, spacing)
    lists = tuple(map(tuple, strides)), tuple(map(tuple, kernels))
    per_voxel, parameters = _cost(data.channels, data.classes, arch, *lists)
    elements = per_voxel * math.prod(patch)
    return CONTEXT_GIB + (parameters * BYTES_PER_PARAMETER + batch * elements * BYTES_PER_ELEMENT) / GIB


def make_plan(data: Fingerprint, memory_gb: float, *, arch: Arch = "unet", batch_cap: float = 0.05) -> Plan:
    """The largest patch up to the median volume at which two patches fit, then the largest batch.

    Args:
        data: The data set.
        memory_gb: Memory of the card in GB of 2^30 bytes.
        arch: `unet` or `resenc`.
        batch_cap: Largest share of the data set's voxels in one batch: larger ones see each volume too often.

    Raises:
        InputError: not even the smallest network fits.
    """
    spacing = target_spacing(data)
    sizes = data.sizes * data.spacings / np.array(spacing)
    median = np.median(sizes, axis=0)
    budget = memory_gb * HEADROOM
    # A patch of the median volume's physical shape, but not more elongated than a cube of 256^3 voxels would be.
    cube = np.array([1 / s for s in spacing])
    cube *= (256**3 / cube.prod()) ** (1 / 3)
    patch = _enclosing(median.tolist(), spacing)
    if any(p > max(c, m) for p, c, m in zip(patch, cube, median, strict=True)):
        patch = _multiple(np.minimum(cube, median).tolist(), spacing)
    while (need := estimate_gib(data, patch, spacing, 2, arch)) > budget:
        strides, _ = topology(patch, spacing)
        step = np.prod(strides, axis=0)
        # Shrink the axis that is the longest part of the median volume, by one coarsest voxel.
        order = np.argsort([-p / m for p, m in zip(patch, median, strict=True)])
        axis = next((int(a) for a in order if patch[a] > step[a] and patch[a] > 2 * SMALLEST), None)
        if axis is None:
            raise InputError(f"plan: {memory_gb:g} GB are too little; the smallest patch needs {need:.1f} GiB")
        smaller = list(patch)
        smaller[axis] -= int(step[axis])
        patch = _multiple(smaller, spacing)
    one = estimate_gib(data, patch, spacing, 1, arch)
    per_patch = estimate_gib(data, patch, spacing, 2, arch) - one
    by_memory = 1 + int((budget - one) / per_patch)
    by_data = round(batch_cap * sizes.prod(axis=1).sum() / math.prod(patch))
    batch = max(2, min(by_memory, by_data, MOST_BATCH))
    strides, kernels = topology(patch, spacing)
    d, h, w = (round(m) for m in median)
    return Plan(
        spacing, (d, h, w), patch, batch, strides, kernels, arch, estimate_gib(data, patch, spacing, batch, arch)
    )


def write_plan(plan: Plan, path: Path) -> None:
    """Write the YAML.

    Raises:
        InputError: the file exists already.
    """
    if path.exists():
        raise InputError(f"plan: {path} exists; name another file, or remove it")
    path.write_text(plan.yaml())
