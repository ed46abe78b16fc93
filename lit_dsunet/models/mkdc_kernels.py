"""Triton kernels for multi-kernel depth-wise convolution on channels-last maps.

A depth-wise convolution has no use for tensor cores and is slow by cuDNN in three dimensions. Here every branch is one
pass that also gives the statistics of its normalisation, and all that follows, the normalisations, ReLU6, sum and
channel shuffle, is one more; the way back is built alike. Maps are seen as (B, S, C), S voxels of C channels.
"""

# A kernel's arguments are pointers and numbers as Triton sees them, its constants plain integers to the caller.
# ruff: noqa: ANN001, ANN202
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["branch", "branch_weight", "combine", "combine_backward", "combine_sums", "statistics"]


PROGRAMS = 2112  # sixteen to each of a large card's 132 multiprocessors


# ---- one branch -----------------------------------------------------------------------------------------------------


@triton.jit
def _branch(
    x, weight, y, means, squares, D, H, W, C,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, FLIP: tl.constexpr, ADD: tl.constexpr, STATS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Depth-wise convolution of a tile; its mean and sum of squared distances to it per channel."""
    S = D * H * W
    tile, b, tiles = tl.program_id(0), tl.program_id(2), tl.num_programs(0)
    s = tile * BLOCK_S + tl.arange(0, BLOCK_S)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    own, inside = c < C, s < S
    d, h, w = s // (H * W), (s // W) % H, s % W
    base = b.to(tl.int64) * S * C
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for kd in range(KD):
        for kh in range(KH):
            dd, hh = d + kd - KD // 2, h + kh - KH // 2
            row = inside & (dd >= 0) & (dd < D) & (hh >= 0) & (hh < H)
            first = (dd * H + hh) * W
            for kw in tl.static_range(KW):
                ww = w + kw - KW // 2
                there = (row & (ww >= 0) & (ww < W))[:, None] & own[None, :]
                values = tl.load(x + base + (first + ww)[:, None].to(tl.int64) * C + c[None, :], there, 0.0)
                tap = (kd * KH + kh) * KW + kw
                if FLIP:
                    tap = KD * KH * KW - 1 - tap
                total += values.to(tl.float32) * tl.load(weight + tap * C + c, own, 0.0).to(tl.float32)[None, :]
    at = base + s[:, None].to(tl.int64) * C + c[None, :]
    valid = inside[:, None] & own[None, :]
    if ADD:
        total += tl.load(y + at, valid, 0.0).to(tl.float32)
    out = total.to(y.dtype.element_ty)
    tl.store(y + at, out, valid)
    if STATS:
        count = tl.minimum(BLOCK_S, S - tile * BLOCK_S)
        values = tl.where(valid, out.to(tl.float32), 0.0)
        mean = tl.sum(values, 0) / count
        away = tl.where(valid, values - mean[None, :], 0.0)
        part = (b * tiles + tile).to(tl.int64) * C + c
        tl.store(means + part, mean, own)
        tl.store(squares + part, tl.sum(away * away, 0), own)


@triton.jit
def _branch_weight(
    x, dy, part, B, D, H, W, C, CHUNK,
    KH: tl.constexpr, KW: tl.constexpr, KD: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient of the weights of one row of taps from a chunk of the voxels of the whole batch."""
    S = D * H * W
    line, chunk = tl.program_id(0), tl.program_id(1)
    kd, kh = line // KH, line % KH
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    t = tl.arange(0, TAPS)
    own = c < C
    total = tl.zeros((TAPS, BLOCK_S, BLOCK_C), tl.float32)
    end = tl.minimum(B * S, (chunk + 1) * CHUNK)
    for start in range(chunk * CHUNK, end, BLOCK_S):
        v = start + tl.arange(0, BLOCK_S)
        b, s = v // S, v % S
        d, h, w = s // (H * W), (s // W) % H, s % W
        dd, hh = d + kd - KD // 2, h + kh - KH // 2
        row = (v < end) & (dd >= 0) & (dd < D) & (hh >= 0) & (hh < H)
        g = tl.load(dy + v[:, None].to(tl.int64) * C + c[None, :], (v < end)[:, None] & own[None, :], 0.0)
        ww = w[None, :] + t[:, None] - KW // 2
        there = row[None, :] & (ww >= 0) & (ww < W) & (t < KW)[:, None]
        at = (((b * D + dd) * H + hh) * W)[None, :].to(tl.int64) + ww
        mask = there[:, :, None] & own[None, None, :]
        values = tl.load(x + at[:, :, None] * C + c[None, None, :], mask, 0.0)
        total += values.to(tl.float32) * g.to(tl.float32)[None, :, :]
    sums = tl.sum(total, 1)
    out = part + (chunk.to(tl.int64) * KD * KH * KW + line * KW + t)[:, None] * C + c[None, :]
    tl.store(out, sums, (t < KW)[:, None] & own[None, :])


def _volume(x: Tensor, kernel: Sequence[int]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(D, H, W) and kernel of a map; a slice is a volume of depth 1."""
    size, taps = tuple(x.shape[2:]), tuple(kernel)
    lead = (1,) * (3 - len(size))
    return (lead + size), (lead + taps)  # type: ignore[return-value]


def _block(channels: int) -> tuple[int, int]:
    """Voxels and channels of a convolution's tile."""
    block_c = min(32, triton.next_power_of_2(channels))
    return 2048 // block_c, block_c


def _rows(weight: Tensor) -> Tensor:
    """(C, 1, ...) weights as (taps, C)."""
    return weight.flatten(1).t().contiguous()


def branch(
    x: Tensor, weight: Tensor, *, flip: bool = False, add: Tensor | None = None, stats: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """A depth-wise convolution of the same size.

    Args:
        x: (B, C, ...), channels last.
        weight: (C, 1, ...), odd sizes.
        flip: Use the weights in reverse: the gradient of the input from that of the output.
        add: A map that the result is added to, in place.
        stats: Give the statistics of tiles.

    Returns:
        The map, and (B, tiles, C) float32 mean and sum of squared distances to it of each tile.
    """
    (d, h, w), (kd, kh, kw) = _volume(x, weight.shape[2:])
    batch, channels, voxels = x.shape[0], x.shape[1], d * h * w
    block_s, block_c = _block(channels)
    tiles = triton.cdiv(voxels, block_s)
    y = torch.empty_like(x) if add is None else add
    means, squares = (
        x.new_empty((batch, tiles, channels) if stats else (1, 1, 1), dtype=torch.float32) for _ in range(2)
    )
    _branch[(tiles, triton.cdiv(channels, block_c), batch)](
        x, _rows(weight), y, means, squares, d, h, w, channels,
        KD=kd, KH=kh, KW=kw, FLIP=flip, ADD=add is not None, STATS=stats, BLOCK_S=block_s, BLOCK_C=block_c,
    )  # fmt: skip
    return y, means, squares


def branch_weight(x: Tensor, dy: Tensor, kernel: Sequence[int]) -> Tensor:
    """Gradient of a depth-wise convolution's weight, (C, 1, ...) float32."""
    (d, h, w), (kd, kh, kw) = _volume(x, kernel)
    batch, channels = x.shape[:2]
    block_c, block_s, taps = min(32, triton.next_power_of_2(channels)), 16, triton.next_power_of_2(kw)
    total = batch * d * h * w
    chunks = max(1, min(triton.cdiv(total, 64 * block_s), PROGRAMS // (kd * kh)))
    size = triton.cdiv(triton.cdiv(total, chunks), block_s) * block_s
    chunks = triton.cdiv(total, size)
    part = x.new_empty((chunks, kd * kh * kw, channels), dtype=torch.float32)
    _branch_weight[(kd * kh, chunks, triton.cdiv(channels, block_c))](
        x, dy, part, batch, d, h, w, channels, size,
        KH=kh, KW=kw, KD=kd, TAPS=taps, BLOCK_S=block_s, BLOCK_C=block_c,
    )  # fmt: skip
    return part.sum(0).t().reshape(channels, 1, *kernel)


def statistics(means: Tensor, squares: Tensor, voxels: int, *, whole_batch: bool) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (B, C) from those of tiles, over each sample or over the batch."""
    tiles, block = means.shape[1], _block(means.shape[2])[0]
    # Full tiles and a last one; built without a copy from the host, which a graph could not hold.
    last = torch.arange(tiles, device=means.device).view(-1, 1) == tiles - 1
    counts = torch.where(last, float(voxels - block * (tiles - 1)), float(block))
    axes = (0, 1) if whole_batch else (1,)
    total = voxels * (len(means) if whole_batch else 1)
    mean = (means * counts).sum(axes, keepdim=True) / total
    var = (squares + (means - mean).square() * counts).sum(axes, keepdim=True) / total
    shape = (means.shape[0], means.shape[2])
    return mean[:, 0].expand(shape).contiguous(), var[:, 0].expand(shape).contiguous()


# ---- normalisations, ReLU6, sum and shuffle -------------------------------------------------------------------------


@triton.jit
def _before_relu(u, mean, rstd, weight, bias, i, at, there, b, c, B, C, own):
    """What branch i's ReLU6 sees, and its normalised values."""
    m, r = tl.load(mean + (i * B + b) * C + c, own, 0.0), tl.load(rstd + (i * B + b) * C + c, own, 0.0)
    hat = (tl.load(u + at, there, 0.0).to(tl.float32) - m[None, :]) * r[None, :]
    return hat * tl.load(weight + i * C + c, own, 0.0)[None, :] + tl.load(bias + i * C + c, own, 0.0)[None, :], hat


@triton.jit
def _combine(
    u0, u1, u2, u3, x, y, mean, rstd, weight, bias, B, S, C, GROUPS,
    N: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1)
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    own = c < C
    there = (s < S)[:, None] & own[None, :]
    row = b.to(tl.int64) * S * C + s[:, None].to(tl.int64) * C
    at = row + c[None, :]
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for i in tl.static_range(N):
        u = u0 if i == 0 else (u1 if i == 1 else (u2 if i == 2 else u3))
        z, _ = _before_relu(u, mean, rstd, weight, bias, i, at, there, b, c, B, C, own)
        total += tl.minimum(tl.maximum(z, 0.0), 6.0)
    shuffled = (c % (C // GROUPS)) * GROUPS + c // (C // GROUPS)
    to = row + shuffled[None, :]
    if RESIDUAL:
        total += tl.load(x + to, there, 0.0).to(tl.float32)
    tl.store(y + to, total.to(y.dtype.element_ty), there)


@triton.jit
def _combine_sums(
    u0, u1, u2, u3, dy, part, mean, rstd, weight, bias, B, S, C, CHUNK, GROUPS,
    N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Per branch the sums of dz and of dz * u_hat over a chunk, dz being the gradient before ReLU6."""
    chunk, chunks, b = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    own = c < C
    shuffled = (c % (C // GROUPS)) * GROUPS + c // (C // GROUPS)
    base = b.to(tl.int64) * S * C
    end = tl.minimum(S, (chunk + 1) * CHUNK)
    for i in tl.static_range(N):
        u = u0 if i == 0 else (u1 if i == 1 else (u2 if i == 2 else u3))
        total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
        product = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
        for start in range(chunk * CHUNK, end, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            there = (s < end)[:, None] & own[None, :]
            row = base + s[:, None].to(tl.int64) * C
            z, hat = _before_relu(u, mean, rstd, weight, bias, i, row + c[None, :], there, b, c, B, C, own)
            dz = tl.load(dy + row + shuffled[None, :], there, 0.0).to(tl.float32)
            dz = tl.where((z > 0) & (z < 6), dz, 0.0)
            total += dz
            product += dz * hat
        out = part + (((i * B + b) * chunks + chunk) * 2).to(tl.int64) * C + c
        tl.store(out, tl.sum(total, 0), own)
        tl.store(out + C, tl.sum(product, 0), own)


@triton.jit
def _combine_gradient(
    u0, u1, u2, u3, d0, d1, d2, d3, dy, mean, rstd, weight, bias, means, B, S, C, GROUPS,
    N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of the branches; `means` (N, B, 2, C) are those of dz and dz * u_hat over what was normalised."""
    b = tl.program_id(1)
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    own = c < C
    there = (s < S)[:, None] & own[None, :]
    row = b.to(tl.int64) * S * C + s[:, None].to(tl.int64) * C
    at = row + c[None, :]
    shuffled = (c % (C // GROUPS)) * GROUPS + c // (C // GROUPS)
    g = tl.load(dy + row + shuffled[None, :], there, 0.0).to(tl.float32)
    for i in tl.static_range(N):
        u = u0 if i == 0 else (u1 if i == 1 else (u2 if i == 2 else u3))
        out = d0 if i == 0 else (d1 if i == 1 else (d2 if i == 2 else d3))
        z, hat = _before_relu(u, mean, rstd, weight, bias, i, at, there, b, c, B, C, own)
        dz = tl.where((z > 0) & (z < 6), g, 0.0)
        scale = tl.load(weight + i * C + c, own, 0.0) * tl.load(rstd + (i * B + b) * C + c, own, 0.0)
        at_means = means + (i * B + b) * 2 * C + c
        less = tl.load(at_means, own, 0.0)[None, :] + hat * tl.load(at_means + C, own, 0.0)[None, :]
        tl.store(out + at, (scale[None, :] * (dz - less)).to(out.dtype.element_ty), there)


def _tile(channels: int) -> tuple[int, int, int]:
    block_c = min(64, triton.next_power_of_2(channels))
    return 2048 // block_c, block_c, triton.cdiv(channels, block_c)


def _four(maps: Sequence[Tensor]) -> list[Tensor]:
    """Kernels take four pointers, of which they read the first ones."""
    return [*maps, *[maps[0]] * (4 - len(maps))]


def _sizes(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.numel() // (x.shape[0] * x.shape[1]), x.shape[1]


def combine(u: Sequence[Tensor], known: Sequence[Tensor], groups: int, residual: Tensor | None) -> Tensor:
    """Sum of the normalised branches behind ReLU6, channels shuffled, plus the residual.

    Args:
        u: Up to four maps (B, C, ...), channels last.
        known: Mean and 1/SD (N, B, C), weight and bias (N, C), float32 and contiguous.
        groups: Of the channel shuffle.
        residual: (B, C, ...) or None.
    """
    batch, voxels, channels = _sizes(u[0])
    block_s, block_c, tiles = _tile(channels)
    y = torch.empty_like(u[0])
    _combine[(triton.cdiv(voxels, block_s), batch, tiles)](
        *_four(u), y if residual is None else residual, y, *known, batch, voxels, channels, groups,
        N=len(u), RESIDUAL=residual is not None, BLOCK_S=block_s, BLOCK_C=block_c,
    )  # fmt: skip
    return y


def combine_sums(u: Sequence[Tensor], dy: Tensor, known: Sequence[Tensor], groups: int) -> Tensor:
    """(N, B, 2, C) float32: per branch and sample the sums of dz and of dz * u_hat."""
    batch, voxels, channels = _sizes(u[0])
    block_s, block_c, tiles = _tile(channels)
    chunks = max(1, min(triton.cdiv(voxels, block_s), PROGRAMS // (batch * tiles)))
    size = triton.cdiv(triton.cdiv(voxels, chunks), block_s) * block_s
    chunks = triton.cdiv(voxels, size)
    part = dy.new_empty((len(u), batch, chunks, 2, channels), dtype=torch.float32)
    _combine_sums[(chunks, batch, tiles)](
        *_four(u), dy, part, *known, batch, voxels, channels, size, groups,
        N=len(u), BLOCK_S=block_s, BLOCK_C=block_c,
    )  # fmt: skip
    return part.sum(2)


def combine_backward(u: Sequence[Tensor], dy: Tensor, known: Sequence[Tensor], means: Tensor, groups: int) -> list[Any]:
    """Gradients of the branches, from the means (N, B, 2, C) of what `combine_sums` sums up."""
    batch, voxels, channels = _sizes(u[0])
    block_s, block_c, tiles = _tile(channels)
    out = [torch.empty_like(x) for x in u]
    _combine_gradient[(triton.cdiv(voxels, block_s), batch, tiles)](
        *_four(u), *_four(out), dy, *known, means, batch, voxels, channels, groups,
        N=len(u), BLOCK_S=block_s, BLOCK_C=block_c,
    )  # fmt: skip
    return out
