"""Triton kernels for deformable attention: one pass over all levels and points forward, one backward.

Nothing that has the size of the sampled values is ever stored, and values are read where the matrix product left them,
in its precision and layout. A program takes some queries of a head; sums are formed in float32.
"""

# A kernel's arguments are pointers and numbers as Triton sees them, its constants plain integers to the caller.
# ruff: noqa: ANN001, ANN202
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["deformable"]

BLOCK_Q = 32


@triton.jit
def _corner(base, stride, start, cx, cy, w, h, inside, d, own):
    """Where a corner's values lie, and for which queries it exists."""
    there = inside & (cx >= 0) & (cx < w) & (cy >= 0) & (cy < h)
    row = (start + cy * w + cx).to(tl.int64) * stride
    return base + row[:, None] + d[None, :], there[:, None] & own[None, :]


@triton.jit
def _place(locations, at, h, w, inside):
    """The upper left corner of the cells' centres around some points, and how far the points lie from it."""
    # Far points are brought to where all four corners are still outside: an integer holds no such float.
    x = tl.minimum(tl.maximum(tl.load(locations + 2 * at, inside, 0.0) * w - 0.5, -2.0), w + 1.0)
    y = tl.minimum(tl.maximum(tl.load(locations + 2 * at + 1, inside, 0.0) * h - 0.5, -2.0), h + 1.0)
    left, top = tl.floor(x), tl.floor(y)
    return left.to(tl.int32), top.to(tl.int32), x - left, y - top


@triton.jit
def _forward(
    value, locations, weights, levels, out, Q, stride_b, stride_h, stride_s,
    HEADS: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The weighted sum over all points of some queries of a head."""
    head, b = tl.program_id(1), tl.program_id(2)
    q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    inside, own = q < Q, d < D
    base = value + b.to(tl.int64) * stride_b + head * stride_h
    row = (b.to(tl.int64) * Q + q) * HEADS + head
    total = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for level in range(LEVELS):
        h, w = tl.load(levels + 3 * level), tl.load(levels + 3 * level + 1)
        start = tl.load(levels + 3 * level + 2)
        for p in range(POINTS):
            at = (row * LEVELS + level) * POINTS + p
            share = tl.load(weights + at, inside, 0.0)
            cx, cy, fx, fy = _place(locations, at, h, w, inside)
            for j in tl.static_range(2):
                for i in tl.static_range(2):
                    of_x = fx if i else 1.0 - fx
                    of_y = fy if j else 1.0 - fy
                    pointer, there = _corner(base, stride_s, start, cx + i, cy + j, w, h, inside, d, own)
                    total += (share * of_x * of_y)[:, None] * tl.load(pointer, there, 0.0).to(tl.float32)
    to = out + row[:, None] * D + d[None, :]
    tl.store(to, total.to(out.dtype.element_ty), inside[:, None] & own[None, :])


@triton.jit
def _backward(
    value, locations, weights, levels, d_out, d_value, d_locations, d_weights, Q, stride_b, stride_h, stride_s,
    grad_b, grad_h, grad_s,
    HEADS: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of the same; those of the values are added to what other programs give."""
    head, b = tl.program_id(1), tl.program_id(2)
    q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    inside, own = q < Q, d < D
    base = value + b.to(tl.int64) * stride_b + head * stride_h
    d_base = d_value + b.to(tl.int64) * grad_b + head * grad_h
    row = (b.to(tl.int64) * Q + q) * HEADS + head
    found = tl.load(d_out + row[:, None] * D + d[None, :], inside[:, None] & own[None, :], 0.0).to(tl.float32)
    for level in range(LEVELS):
        h, w = tl.load(levels + 3 * level), tl.load(levels + 3 * level + 1)
        start = tl.load(levels + 3 * level + 2)
        for p in range(POINTS):
            at = (row * LEVELS + level) * POINTS + p
            share = tl.load(weights + at, inside, 0.0)
            cx, cy, fx, fy = _place(locations, at, h, w, inside)
            d_share = tl.zeros((BLOCK_Q,), tl.float32)
            d_x = tl.zeros((BLOCK_Q,), tl.float32)
            d_y = tl.zeros((BLOCK_Q,), tl.float32)
            for j in tl.static_range(2):
                for i in tl.static_range(2):
                    of_x = fx if i else 1.0 - fx
                    of_y = fy if j else 1.0 - fy
                    pointer, there = _corner(base, stride_s, start, cx + i, cy + j, w, h, inside, d, own)
                    dot = tl.sum(found * tl.load(pointer, there, 0.0).to(tl.float32), 1)
                    d_share += of_x * of_y * dot
                    d_x += (of_y if i else -of_y) * dot
                    d_y += (of_x if j else -of_x) * dot
                    d_pointer, _ = _corner(d_base, grad_s, start, cx + i, cy + j, w, h, inside, d, own)
                    tl.atomic_add(d_pointer, (share * of_x * of_y)[:, None] * found, there)
            tl.store(d_weights + at, d_share, inside)
            tl.store(d_locations + 2 * at, d_x * share * w, inside)
            tl.store(d_locations + 2 * at + 1, d_y * share * h, inside)


class _Deformable(torch.autograd.Function):
    """See `deformable`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, locations: Tensor, weights: Tensor, levels: Tensor) -> Tensor:
        b, heads, _, depth = value.shape
        queries, points = locations.shape[1], locations.shape[4]
        locations, weights = locations.float().contiguous(), weights.float().contiguous()
        out = value.new_empty(b, queries, heads * depth)
        with torch.cuda.device_of(value):
            _forward[(triton.cdiv(queries, BLOCK_Q), heads, b)](
                value, locations, weights, levels, out, queries, *value.stride()[:3],
                heads, len(levels), points, depth, BLOCK_Q, triton.next_power_of_2(depth),
            )  # fmt: skip
        ctx.save_for_backward(value, locations, weights, levels)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        value, locations, weights, levels = ctx.saved_tensors
        b, heads, cells, depth = value.shape
        queries, points = locations.shape[1], locations.shape[4]
        # In the layout of (B, S, heads, D), as a matrix product gives it.
        d_value = torch.zeros(b, cells, heads, depth, device=value.device, dtype=torch.float32).transpose(1, 2)
        d_locations, d_weights = torch.empty_like(locations), torch.empty_like(weights)
        with torch.cuda.device_of(value):
            _backward[(triton.cdiv(queries, BLOCK_Q), heads, b)](
                value, locations, weights, levels, grad_outputs[0].contiguous(), d_value, d_locations, d_weights,
                queries, *value.stride()[:3], *d_value.stride()[:3],
                heads, len(levels), points, depth, BLOCK_Q, triton.next_power_of_2(depth),
            )  # fmt: skip
        return d_value.to(value.dtype), d_locations, d_weights, None


def deformable(value: Tensor, locations: Tensor, weights: Tensor, levels: Tensor) -> Tensor:
    """Read values between cells and sum them: as `lit_detr.models.attention.Sampler`.

    Args:
        value: (B, heads, S, D) float32 or half precision, of any strides but that of D, which is 1.
        locations: (B, Q, heads, L, P, 2) float32.
        weights: (B, Q, heads, L, P) float32.
        levels: (L, 3) int32 on the device: rows, columns and first cell of each level.

    Returns:
        (B, Q, heads * D) of the values' type.
    """
    return _Deformable.apply(value, locations, weights, levels)  # type: ignore[no-any-return]
