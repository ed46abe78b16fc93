"""Boxes, anchors and positions: all of it in float32, whatever the network computes in.

Boxes are centre x, centre y, width, height as shares of the padded image.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal, ParamSpec

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "BoxCoding",
    "Shapes",
    "anchors",
    "cell_counts",
    "inverse_sigmoid",
    "level_masks",
    "level_starts",
    "level_table",
    "refine",
    "sine_positions",
]

BoxCoding = Literal["relative", "logit"]
Shapes = tuple[tuple[int, int], ...]  # (height, width) in cells per level, finest first

MAX_LOG_SCALE = 4.0  # one refinement changes a side by at most e^4, so that no step overflows
EPS = 1e-5

P = ParamSpec("P")


def _kept(make: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Keep the constants of a shape on their device; a graph under compilation or export makes its own."""
    cached = functools.lru_cache(maxsize=128)(make)

    @functools.wraps(make)
    def get(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        if torch.compiler.is_compiling():
            return make(*args, **kwargs)
        # A tensor made in inference mode could not take part in training later.
        with torch.inference_mode(False), torch.no_grad():
            return cached(*args, **kwargs)  # type: ignore[arg-type]

    return get


def inverse_sigmoid(x: Tensor) -> Tensor:
    """Logit of a share, which is held away from 0 and 1.

    Example:
        >>> inverse_sigmoid(torch.tensor([0.5, 0.0]))
        tensor([  0.0000, -11.5129])
    """
    x = x.clamp(EPS, 1 - EPS)
    return torch.log(x / (1 - x))


def refine(reference: Tensor, delta: Tensor, coding: BoxCoding = "relative") -> Tensor:
    """Move boxes by what a head says.

    Args:
        reference: (..., 4) float32 boxes.
        delta: (..., 4) float32 from a head; zero leaves the box where it is.
        coding: `relative` moves the centre in widths and heights of the box and scales these by exponentials, so that
            one unit means the same for a tiny box as for a large one; `logit` adds in logit space, where one pixel of
            a tiny box is a thousandth of what a head gives.

    Returns:
        (..., 4) float32 boxes.

    Source:
        `relative`: the box coding of Faster R-CNN (arXiv 1506.01497), in DETRs since Plain-DETR (arXiv 2308.01904).
        `logit`: Deformable DETR (arXiv 2010.04159).

    Example:
        >>> box = torch.tensor([0.5, 0.5, 0.1, 0.2])
        >>> refine(box, torch.tensor([1.0, -0.5, 0.0, math.log(2)]))
        tensor([0.6000, 0.4000, 0.1000, 0.4000])
    """
    if coding == "logit":
        return torch.sigmoid(inverse_sigmoid(reference) + delta)
    # Halves by chunk: the gradient of two slices would be two padded tensors and their sum.
    (centre, size), (shift, scale) = reference.chunk(2, -1), delta.chunk(2, -1)
    scale = scale.clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE).exp()
    return torch.cat([centre + shift * size, size * scale], dim=-1)


@_kept
def anchors(shapes: Shapes, sizes: tuple[float, ...], canvas: tuple[int, int], device: torch.device) -> Tensor:
    """A square box at the centre of every cell.

    Args:
        shapes: Cells per level.
        sizes: Side of the boxes of each level in pixels.
        canvas: Height and width of the padded image in pixels.
        device: Of the result.

    Returns:
        (S, 4) float32, levels one after another, row by row.

    Example:
        >>> anchors(((1, 2),), (8.0,), (16, 32), torch.device("cpu"))
        tensor([[0.2500, 0.5000, 0.2500, 0.5000],
                [0.7500, 0.5000, 0.2500, 0.5000]])
    """
    out = []
    for (h, w), size in zip(shapes, sizes, strict=True):
        y = (torch.arange(h, device=device, dtype=torch.float32) + 0.5) / h
        x = (torch.arange(w, device=device, dtype=torch.float32) + 0.5) / w
        yy, xx = torch.meshgrid(y, x, indexing="ij")
        sides = [torch.full_like(xx, size / canvas[1]), torch.full_like(xx, size / canvas[0])]
        out.append(torch.stack([xx, yy, *sides], dim=-1).flatten(0, 1))
    return torch.cat(out)


@_kept
def cell_counts(shapes: Shapes, device: torch.device) -> Tensor:
    """(L, 2) float32: columns and rows of each level."""
    # Filled on the device: a tensor from a list would be a copy from the host, for which CUDA waits.
    return torch.cat([torch.full((1,), float(n), device=device) for h, w in shapes for n in (w, h)]).view(-1, 2)


@_kept
def level_starts(shapes: Shapes, device: torch.device) -> Tensor:
    """(L,) int64: position of each level's first cell.

    Example:
        >>> level_starts(((4, 4), (2, 2), (1, 1)), torch.device("cpu"))
        tensor([ 0, 16, 20])
    """
    sums = itertools.accumulate((h * w for h, w in shapes[:-1]), initial=0)
    return torch.cat([torch.full((1,), n, device=device) for n in sums])


@_kept
def level_table(shapes: Shapes, device: torch.device) -> Tensor:
    """(L, 3) int32: rows, columns and first cell of each level.

    Example:
        >>> level_table(((4, 5), (2, 3)), torch.device("cpu")).tolist()
        [[4, 5, 0], [2, 3, 20]]
    """
    firsts = itertools.accumulate((h * w for h, w in shapes[:-1]), initial=0)
    numbers = [n for (h, w), first in zip(shapes, firsts, strict=True) for n in (h, w, first)]
    return torch.cat([torch.full((1,), n, device=device, dtype=torch.int32) for n in numbers]).view(-1, 3)


@_kept
def sine_positions(h: int, w: int, channels: int, device: torch.device) -> Tensor:
    """Position codes of a map's cells.

    They count cells from the upper left corner and not shares of the map, so that padding on the right and below
    changes nothing.

    Returns:
        (h * w, channels) float32: sine and cosine of x, then of y.

    Source:
        Vaswani et al. (arXiv 1706.03762) along both axes, as in DETR (arXiv 2005.12872).
    """
    quarter = channels // 4
    steps = torch.arange(quarter, device=device, dtype=torch.float32) / quarter
    frequency = torch.exp(-math.log(10000.0) * steps)
    y, x = (torch.arange(n, device=device, dtype=torch.float32)[:, None] * frequency for n in (h, w))
    x = torch.cat([x.sin(), x.cos()], dim=1).expand(h, w, 2 * quarter)
    y = torch.cat([y.sin(), y.cos()], dim=1)[:, None].expand(h, w, 2 * quarter)
    return torch.cat([x, y], dim=-1).flatten(0, 1)


def level_masks(mask: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Which cells hold a valid pixel.

    Args:
        mask: (B, H, W) bool, true where the image is.
        shapes: Cells per level; they divide H and W.

    Returns:
        Per level (B, 1, h, w) bool.
    """
    current = mask[:, None].float()
    out = []
    for h, w in shapes:
        step = (current.shape[-2] // h, current.shape[-1] // w)
        current = F.max_pool2d(current, step, step)
        out.append(current > 0)
    return out
