"""Sines and cosines of coordinates at geometrically spaced frequencies."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["PositionalEncoding"]


class PositionalEncoding(nn.Module):
    """Coordinates as sin and cos of `x * base**k * pi`, k = 0 .. levels - 1.

    Angles are one fp32 product each, whatever autocast says, so that every device gets the same ones. Above about
    `base**k = 1e7` they are rounded by a radian and more: those levels tell coordinates apart but say nothing of their
    distance. Of the default 80 levels at 1.25, which are NeRV's, the last seven do that.

    Args:
        base: Ratio of neighbouring frequencies.
        levels: Frequencies per coordinate.

    Raises:
        ValueError: fewer than one level, or a base that is not positive.

    Source:
        NeRV (arXiv 2110.13903), section 3.1.

    Example:
        >>> encoding = PositionalEncoding(base=2.0, levels=2)
        >>> encoding(torch.tensor([[0.5]])).round(decimals=3) + 0.0
        tensor([[ 1.,  0.,  0., -1.]])
        >>> encoding.size(3)
        12
    """

    def __init__(self, base: float = 1.25, levels: int = 80) -> None:
        super().__init__()
        if levels < 1 or base <= 0:
            raise ValueError(f"expected at least one level and a positive base, got {levels} and {base}")
        self.levels = levels
        scales = torch.tensor([base**k * math.pi for k in range(levels)], dtype=torch.float32)
        self.register_buffer("scales", scales, persistent=False)  # follows from the configuration
        self.scales: Tensor

    def size(self, coordinates: int) -> int:
        """Numbers that so many coordinates become."""
        return 2 * self.levels * coordinates

    def forward(self, coordinates: Tensor) -> Tensor:
        """(N, D) to (N, 2 * levels * D): per coordinate all sines, then all cosines."""
        angles = coordinates.float()[..., None] * self.scales
        return torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(1)
