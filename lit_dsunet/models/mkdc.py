"""Multi-kernel depth-wise convolution (MKDC)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_dsunet.models import channels_last as cl

__all__ = ["MKDC", "MKDCNorm"]

MOST_BRANCHES = 4  # that the kernels take

MKDCNorm = Literal["batch", "instance"]


class MKDC(nn.Module):
    """Sum of parallel depth-wise convolutions of several kernel sizes, then a channel shuffle.

    `y = shuffle(sum_k ReLU6(norm(DWConv_k(x))))`, plus x with `residual`. This is the reduced three-dimensional form:
    the two-dimensional block that it comes from lies between two point-wise convolutions and adds its input, so without
    `residual` nothing carries the input past the block. Not to be confused with the block of *dilated dense*
    convolutions of the same abbreviation.

    Args:
        channels: Channels of input and output.
        kernels: Odd kernel sizes, the same along each axis.
        dims: 2 or 3.
        norm: Normalisation of each branch.
        residual: Add the input.
        fused: Compute all branches as one convolution of the largest kernel with the smaller ones zero-padded: fewer
            launches and one normalisation, but more multiplications. The same function of the same weights. Of no
            effect in a channels-last network on a GPU, which has kernels of its own for this block.

    Shapes:
        (B, C, ...) to the same.

    Source:
        MK-UNet, arXiv 2509.18493, multi-kernel depth-wise convolution with kernels 1, 3, 5.
    """

    def __init__(
        self,
        channels: int,
        kernels: Sequence[int] = (1, 3, 5),
        *,
        dims: Literal[2, 3] = 3,
        norm: MKDCNorm = "batch",
        residual: bool = False,
        fused: bool = False,
    ) -> None:
        super().__init__()
        if not kernels or any(k < 1 or k % 2 == 0 for k in kernels):
            raise ValueError(f"mkdc.kernels: expected odd sizes from 1, got {list(kernels)}")
        conv = nn.Conv3d if dims == 3 else nn.Conv2d
        self.kernels, self.dims, self.residual, self.fused = tuple(kernels), dims, residual, fused
        self.channels_last = False  # set by a network that keeps its maps so
        self.convs = nn.ModuleList(
            conv(channels, channels, k, padding=k // 2, groups=channels, bias=False) for k in kernels
        )
        self.norms = nn.ModuleList(_norm(norm, dims, channels) for _ in kernels)
        # Three groups where that divides the channels, as there are three kernels; else the next smaller number.
        self.groups = next(g for g in range(min(len(kernels), channels), 0, -1) if channels % g == 0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) to the same shape."""
        if self.channels_last and cl.usable(x) and self._for_kernels:
            return cl.depthwise_branches(x, self.convs, self.norms, groups=self.groups, residual=self.residual)
        y = self._fused(x) if self.fused else self._branches(x)
        y = self._shuffle(y)
        return x + y if self.residual else y

    @property
    def _for_kernels(self) -> bool:
        """Whether the normalisations are still those made here (SyncBatchNorm would not be)."""
        kinds = (nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm2d, nn.InstanceNorm3d)
        return len(self.kernels) <= MOST_BRANCHES and all(type(norm) in kinds for norm in self.norms)

    def _branches(self, x: Tensor) -> Tensor:
        parts = [F.relu6(norm(conv(x))) for conv, norm in zip(self.convs, self.norms, strict=True)]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def _fused(self, x: Tensor) -> Tensor:
        largest = max(self.kernels)
        weights = []
        for kernel, conv in zip(self.kernels, self.convs, strict=True):
            pad = (largest - kernel) // 2
            assert isinstance(conv.weight, Tensor)
            weights.append(F.pad(conv.weight, [pad, pad] * self.dims))
        # Output channel c * n + i is branch i of channel c, the order that `groups` asks for.
        n, channels = len(weights), x.shape[1]
        weight = torch.stack(weights, dim=1).flatten(0, 1)
        function = F.conv3d if self.dims == 3 else F.conv2d
        y = function(x, weight, padding=largest // 2, groups=channels)
        y = y.unflatten(1, (channels, n))
        parts = [F.relu6(norm(y[:, :, i])) for i, norm in enumerate(self.norms)]
        return torch.stack(parts).sum(0) if n > 1 else parts[0]

    def _shuffle(self, x: Tensor) -> Tensor:
        if self.groups == 1:
            return x
        shape = x.shape
        return x.reshape(shape[0], self.groups, shape[1] // self.groups, *shape[2:]).transpose(1, 2).reshape(shape)

    def extra_repr(self) -> str:
        """The options that the submodules do not show."""
        return f"kernels={self.kernels}, groups={self.groups}, residual={self.residual}, fused={self.fused}"

    @staticmethod
    def flops(channels: int, voxels: int, kernels: Sequence[int] = (1, 3, 5), dims: int = 3) -> int:
        """Floating-point operations of the convolutions, two per multiply-add.

        >>> MKDC.flops(64, 48**3)
        2165833728
        """
        return 2 * channels * voxels * sum(math.prod([k] * dims) for k in kernels)


def _norm(kind: MKDCNorm, dims: int, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm3d(channels) if dims == 3 else nn.BatchNorm2d(channels)
    return nn.InstanceNorm3d(channels, affine=True) if dims == 3 else nn.InstanceNorm2d(channels, affine=True)
