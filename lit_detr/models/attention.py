"""Self-attention, and attention to a few points of several maps (deformable attention)."""

from __future__ import annotations

import math
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_common.kernels import usable
from lit_detr.models.blocks import autocasts
from lit_detr.models.geometry import Shapes, cell_counts, level_starts, level_table

__all__ = [
    "CORES",
    "Core",
    "DeformableAttention",
    "SelfAttention",
    "kernels_take",
    "sample_auto",
    "sample_bag",
    "sample_gather",
    "sample_grid",
]

Core = Literal["auto", "grid_sample", "gather", "bag"]


class SelfAttention(nn.Module):
    """Multi-head attention of tokens to each other, queries, keys and values from one matrix product."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.output = nn.Linear(hidden, hidden)
        for layer in (self.qkv, self.output):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, N, hidden) to the same; `bias` (B, 1, N or 1, N) is added to the scores, or is bool: true attends."""
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.output(out.transpose(1, 2).reshape(b, n, c))


class Sampler(Protocol):
    """How values at points between cells are read and summed; all are the same function.

    Bilinear between the centres of cells; outside a map everything is zero.

    Args:
        value: (B, heads, S, D) of all levels one after another, row by row.
        locations: (B, Q, heads, L, P, 2) x, y as shares of the maps.
        weights: (B, Q, heads, L, P).
        shapes: (height, width) of each level.

    Returns:
        (B, Q, heads * D): the weighted sum per head.
    """

    def __call__(self, value: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes) -> Tensor:
        """See the class."""
        ...


def sample_grid(value: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes) -> Tensor:
    """`F.grid_sample` once per level: see `Sampler`."""
    b, heads, _, d = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    grids = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).reshape(len(shapes), b * heads, queries, points, 2)
    sampled = [
        F.grid_sample(part.reshape(b * heads, h, w, d).permute(0, 3, 1, 2), grid, align_corners=False)
        for part, grid, (h, w) in zip(value.split([h * w for h, w in shapes], 2), grids.unbind(0), shapes, strict=True)
    ]
    share = weights.permute(0, 2, 1, 3, 4).reshape(b * heads, 1, queries, -1)
    out = (torch.cat(sampled, dim=-1) * share).sum(-1)  # (B * heads, D, Q)
    return out.view(b, heads * d, queries).transpose(1, 2)


def _corners(locations: Tensor, weights: Tensor, shapes: Shapes) -> tuple[Tensor, Tensor]:
    """The four cells around each point, of all levels at once.

    Returns:
        (B, Q, heads, L * P * 4) int64 positions in a head's table of S rows, and as many weights: bilinear times given,
        zero outside the map.
    """
    device = locations.device
    counts = cell_counts(shapes, device)[:, None]  # (L, 1, 2)
    # Far points are brought to where all four corners are still outside: an integer could not hold every float.
    at = torch.minimum(locations * counts - 0.5, counts + 1).clamp(min=-2.0)
    low = at.floor()
    upper = at - low
    cell = torch.stack([low, low + 1], dim=-1)  # (..., L, P, 2 axes, 2 sides)
    counts = counts[..., None]
    share = torch.stack([1 - upper, upper], dim=-1) * ((cell >= 0) & (cell < counts))
    cell = torch.minimum(cell.clamp(min=0), counts - 1).long()
    row = cell[..., 1, :, None] * counts[:, :, :1].long() + level_starts(shapes, device)[:, None, None, None]
    index = row + cell[..., 0, None, :]
    weight = share[..., 1, :, None] * share[..., 0, None, :] * weights[..., None, None]
    return index.flatten(3), weight.flatten(3)


def sample_gather(value: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes) -> Tensor:
    """One gather over all levels, out of operations that every exporter knows: see `Sampler`.

    It holds the values of all four corners of every point, so it is for inference.
    """
    b, heads, _, d = value.shape
    index, weight = _corners(locations, weights, shapes)
    queries, items = index.shape[1], index.shape[3]
    index = index.transpose(1, 2).reshape(b, heads, queries * items, 1).expand(-1, -1, -1, d)
    taken = value.gather(2, index).view(b, heads, queries, items, d)
    out = (taken * weight.transpose(1, 2)[..., None]).sum(3)
    return out.transpose(1, 2).reshape(b, queries, heads * d)


def sample_bag(value: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes) -> Tensor:
    """One `F.embedding_bag` over all levels: see `Sampler`.

    A point is four rows of a table with weights, and a query's head is a bag of such rows, so that one kernel reads and
    sums them and no sampled value is kept for the backward pass.
    """
    b, heads, s, d = value.shape
    index, weight = _corners(locations, weights, shapes)
    queries, items = index.shape[1], index.shape[3]
    first = (torch.arange(b * heads, device=value.device) * s).view(b, 1, heads, 1)
    out = F.embedding_bag(
        (index + first).view(-1, items),
        value.reshape(-1, d),
        per_sample_weights=weight.reshape(-1, items),
        mode="sum",
    )
    return out.view(b, queries, heads * d)


def sample_auto(value: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes) -> Tensor:
    """Kernels of our own where they run, else `sample_grid`: see `Sampler`."""
    if not kernels_take(value):
        return sample_grid(value, locations, weights, shapes)
    from lit_detr.models.attention_kernels import deformable

    return deformable(value, locations, weights, level_table(shapes, value.device))


def kernels_take(value: Tensor) -> bool:
    """Whether `sample_auto` has a kernel for such values, which then may be of any floating type up to 32 bits."""
    return usable(value) and value.dtype in (torch.float32, torch.bfloat16, torch.float16)


CORES: dict[str, Sampler] = {
    "auto": sample_auto,
    "grid_sample": sample_grid,
    "gather": sample_gather,
    "bag": sample_bag,
}
assert set(CORES) == set(get_args(Core))


class DeformableAttention(nn.Module):
    """Each query reads a few points around its box on every level.

    Args:
        hidden: Channels.
        heads: Number of heads.
        levels: Number of maps.
        points: Points per head and level.

    Source:
        Deformable DETR (arXiv 2010.04159), points in units of the box. There a box of 5 px keeps its points within one
        cell; here the unit is at least a cell of the level, so that tiny boxes see their surroundings too.
    """

    def __init__(self, hidden: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling = nn.Linear(hidden, heads * levels * points * 3)  # two offsets and a score for each point
        self.output = nn.Linear(hidden, hidden)
        nn.init.zeros_(self.sampling.weight)
        angle = torch.arange(heads) * (2 * math.pi / heads)
        ring = torch.stack([angle.cos(), angle.sin()], dim=-1)
        ring = ring / ring.abs().amax(-1, keepdim=True)
        offsets = ring.view(heads, 1, 1, 2) * torch.arange(1, points + 1).view(points, 1)  # one head per direction
        with torch.no_grad():
            bias = torch.cat([offsets.expand(-1, levels, -1, -1), torch.zeros(heads, levels, points, 1)], dim=-1)
            self.sampling.bias.copy_(bias.flatten())
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor, reference: Tensor, value: Tensor, shapes: Shapes, sampler: Sampler) -> Tensor:
        """Attend.

        Args:
            x: (B, Q, hidden) queries with their positions added.
            reference: (B, Q, 4) float32 boxes.
            value: (B, heads, S, hidden / heads) float32, or what the sampler takes; zero where there is no image.
            shapes: Of the levels.
            sampler: One of `CORES`.

        Returns:
            (B, Q, hidden).
        """
        b, q, _ = x.shape
        found = self.sampling(x).view(b, q, self.heads, self.levels, self.points, 3).float()
        offsets, scores = found.split([2, 1], dim=-1)
        weights = scores.flatten(3).softmax(-1).view(b, q, self.heads, self.levels, self.points)
        half = torch.maximum(
            reference[:, :, None, 2:] * 0.5, cell_counts(shapes, x.device).reciprocal()
        )  # (B, Q, L, 2)
        unit = (half / self.points)[:, :, None, :, None]
        locations = reference[:, :, None, None, None, :2] + offsets * unit
        read = sampler(value, locations, weights, shapes)
        # Under autocast the product casts by itself, and what it needs.
        return self.output(read if autocasts(x) else read.to(x.dtype))

    def coarser_only(self, weight: Tensor) -> Tensor:
        """Rows of the `sampling` weight or bias of a network with one finer level that this one has as well."""
        every = weight.view(self.heads, self.levels + 1, self.points, 3, -1)
        return every[:, 1:].reshape(self.sampling.out_features, *weight.shape[1:])
