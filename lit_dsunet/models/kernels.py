"""Triton kernels for channels-last maps: what a U-Net needs beside cuDNN's convolutions.

Every map is seen as (B, S, C), S voxels of C channels that lie together. Nothing here knows autograd; see
`channels_last` for that, and for the same functions in torch's own operations.
"""

# A kernel's arguments are pointers and numbers as Triton sees them, its constants plain integers to the caller.
# ruff: noqa: ANN001, ANN202
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "copy_rows",
    "few_channel_conv",
    "few_channel_weight",
    "logits",
    "logits_backward",
    "norm_backward",
    "norm_forward",
    "normalise",
]

PROGRAMS = 2112  # sixteen to each of a large card's 132 multiprocessors


# ---- instance normalisation with leaky ReLU -------------------------------------------------------------------------


@triton.jit
def _statistics(x, part, S, C, CHUNK, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sums of x - x0 and of its square over a chunk of the voxels, x0 being the channel's first voxel."""
    b, chunk, n = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    own = c < C
    base = x + b.to(tl.int64) * S * C
    first = tl.load(base + c, own, 0.0).to(tl.float32)
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    square = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    end = tl.minimum(S, (chunk + 1) * CHUNK)
    for start in range(chunk * CHUNK, end, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        there = (s < end)[:, None] & own[None, :]
        v = tl.load(base + s[:, None].to(tl.int64) * C + c[None, :], there, 0.0).to(tl.float32)
        v = tl.where(there, v - first[None, :], 0.0)
        total += v
        square += v * v
    out = part + (b * n + chunk).to(tl.int64) * 2 * C + c
    tl.store(out, tl.sum(total, 0), own)
    tl.store(out + C, tl.sum(square, 0), own)


@triton.jit
def _finish_statistics(x, part, mean, rstd, S, C, n, eps, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    b = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    own = c < C
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    square = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, n, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        there = (i < n)[:, None] & own[None, :]
        at = part + (b * n + i)[:, None].to(tl.int64) * 2 * C + c[None, :]
        total += tl.load(at, there, 0.0)
        square += tl.load(at + C, there, 0.0)
    first = tl.load(x + b.to(tl.int64) * S * C + c, own, 0.0).to(tl.float32)
    m = tl.sum(total, 0) / S
    var = tl.maximum(tl.sum(square, 0) / S - m * m, 0.0)
    tl.store(mean + b * C + c, m + first, own)
    tl.store(rstd + b * C + c, 1.0 / tl.sqrt(var + eps), own)


@triton.jit
def _normalise(x, y, mean, rstd, weight, bias, S, C, slope, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    b = tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    own = c < C
    there = (s < S)[:, None] & own[None, :]
    at = b.to(tl.int64) * S * C + s[:, None].to(tl.int64) * C + c[None, :]
    scale = tl.load(rstd + b * C + c, own, 0.0) * tl.load(weight + c, own, 0.0).to(tl.float32)
    shift = tl.load(bias + c, own, 0.0).to(tl.float32) - tl.load(mean + b * C + c, own, 0.0) * scale
    v = tl.load(x + at, there, 0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    tl.store(y + at, tl.where(v > 0, v, v * slope).to(y.dtype.element_ty), there)


@triton.jit
def _gradient_sums(
    x, dy, mean, rstd, weight, bias, part, S, C, CHUNK, slope, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Sums of dz and of dz * x_hat over a chunk, z being what goes into the activation."""
    b, chunk, n = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    own = c < C
    base = b.to(tl.int64) * S * C
    m, r = tl.load(mean + b * C + c, own, 0.0), tl.load(rstd + b * C + c, own, 0.0)
    w, o = tl.load(weight + c, own, 0.0).to(tl.float32), tl.load(bias + c, own, 0.0).to(tl.float32)
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    product = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    end = tl.minimum(S, (chunk + 1) * CHUNK)
    for start in range(chunk * CHUNK, end, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        there = (s < end)[:, None] & own[None, :]
        at = base + s[:, None].to(tl.int64) * C + c[None, :]
        hat = (tl.load(x + at, there, 0.0).to(tl.float32) - m[None, :]) * r[None, :]
        dz = tl.load(dy + at, there, 0.0).to(tl.float32)
        dz = tl.where(hat * w[None, :] + o[None, :] > 0, dz, dz * slope)
        total += dz
        product += dz * hat
    out = part + (b * n + chunk).to(tl.int64) * 2 * C + c
    tl.store(out, tl.sum(total, 0), own)
    tl.store(out + C, tl.sum(product, 0), own)


@triton.jit
def _finish_sums(part, sums, d_weight, d_bias, B, C, n, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Partial sums (B, n, 2, C) to (B, 2, C), and those over B: the gradients of bias and weight."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    own = c < C
    all_total = tl.zeros((BLOCK_C,), tl.float32)
    all_product = tl.zeros((BLOCK_C,), tl.float32)
    for b in range(B):
        total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        product = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        for start in range(0, n, BLOCK_N):
            i = start + tl.arange(0, BLOCK_N)
            there = (i < n)[:, None] & own[None, :]
            at = part + (b * n + i)[:, None].to(tl.int64) * 2 * C + c[None, :]
            total += tl.load(at, there, 0.0)
            product += tl.load(at + C, there, 0.0)
        t, p = tl.sum(total, 0), tl.sum(product, 0)
        tl.store(sums + b * 2 * C + c, t, own)
        tl.store(sums + b * 2 * C + C + c, p, own)
        all_total += t
        all_product += p
    tl.store(d_bias + c, all_total, own)
    tl.store(d_weight + c, all_product, own)


@triton.jit
def _gradient(x, dy, dx, mean, rstd, weight, bias, sums, S, C, slope, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    b = tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    own = c < C
    there = (s < S)[:, None] & own[None, :]
    at = b.to(tl.int64) * S * C + s[:, None].to(tl.int64) * C + c[None, :]
    m, r = tl.load(mean + b * C + c, own, 0.0), tl.load(rstd + b * C + c, own, 0.0)
    w, o = tl.load(weight + c, own, 0.0).to(tl.float32), tl.load(bias + c, own, 0.0).to(tl.float32)
    total = tl.load(sums + b * 2 * C + c, own, 0.0) / S
    product = tl.load(sums + b * 2 * C + C + c, own, 0.0) / S
    hat = (tl.load(x + at, there, 0.0).to(tl.float32) - m[None, :]) * r[None, :]
    dz = tl.load(dy + at, there, 0.0).to(tl.float32)
    dz = tl.where(hat * w[None, :] + o[None, :] > 0, dz, dz * slope)
    out = (w * r)[None, :] * (dz - total[None, :] - hat * product[None, :])
    tl.store(dx + at, out.to(dx.dtype.element_ty), there)


def _tile(channels: int) -> tuple[int, int, int]:
    """Voxels and channels of a tile, and tiles along the channels."""
    block_c = min(64, triton.next_power_of_2(channels))
    return 4096 // block_c, block_c, triton.cdiv(channels, block_c)


def _chunks(batch: int, voxels: int, block_s: int, tiles: int) -> tuple[int, int]:
    """Voxels per chunk and number of chunks, so that a large card is busy and the second pass short."""
    chunks = max(1, min(triton.cdiv(voxels, block_s), PROGRAMS // (batch * tiles)))
    size = triton.cdiv(triton.cdiv(voxels, chunks), block_s) * block_s
    return size, triton.cdiv(voxels, size)


def _sizes(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.numel() // (x.shape[0] * x.shape[1]), x.shape[1]


def norm_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    """The activated map, and mean and 1/SD (B, C) float32 of each channel."""
    batch, voxels, channels = _sizes(x)
    block_s, block_c, tiles = _tile(channels)
    size, chunks = _chunks(batch, voxels, block_s, tiles)
    part = x.new_empty((batch, chunks, 2, channels), dtype=torch.float32)
    mean, rstd = (x.new_empty((batch, channels), dtype=torch.float32) for _ in range(2))
    _statistics[(batch, chunks, tiles)](x, part, voxels, channels, size, block_s, block_c)
    _finish_statistics[(batch, triton.cdiv(channels, 16))](x, part, mean, rstd, voxels, channels, chunks, eps, 256, 16)
    return normalise(x, weight, bias, mean, rstd, slope), mean, rstd


def normalise(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, slope: float) -> Tensor:
    """The activated map from known statistics."""
    batch, voxels, channels = _sizes(x)
    block_s, block_c, tiles = _tile(channels)
    y = torch.empty_like(x)
    grid = (triton.cdiv(voxels, block_s), batch, tiles)
    _normalise[grid](x, y, mean, rstd, weight, bias, voxels, channels, slope, block_s, block_c)
    return y


def norm_backward(
    x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the map, and float32 ones of weight and bias."""
    batch, voxels, channels = _sizes(x)
    block_s, block_c, tiles = _tile(channels)
    size, chunks = _chunks(batch, voxels, block_s, tiles)
    part = x.new_empty((batch, chunks, 2, channels), dtype=torch.float32)
    sums = x.new_empty((batch, 2, channels), dtype=torch.float32)
    d_weight, d_bias = (x.new_empty(channels, dtype=torch.float32) for _ in range(2))
    dx = torch.empty_like(x)
    known = (mean, rstd, weight, bias)
    _gradient_sums[(batch, chunks, tiles)](x, dy, *known, part, voxels, channels, size, slope, block_s, block_c)
    _finish_sums[(triton.cdiv(channels, 16),)](part, sums, d_weight, d_bias, batch, channels, chunks, 256, 16)
    grid = (triton.cdiv(voxels, block_s), batch, tiles)
    _gradient[grid](x, dy, dx, *known, sums, voxels, channels, slope, block_s, block_c)
    return dx, d_weight, d_bias


# ---- rows of channels -----------------------------------------------------------------------------------------------


@triton.jit
def _copy_rows(
    source, target, bias, part, V, C, source_row, target_row, CHUNK,
    ADD: tl.constexpr, SUM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    own = c < C
    more = tl.load(bias + c, own & ADD, 0.0).to(tl.float32)
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    end = tl.minimum(V, (chunk + 1) * CHUNK)
    for start in range(chunk * CHUNK, end, BLOCK_S):
        v = start + tl.arange(0, BLOCK_S)
        there = (v < end)[:, None] & own[None, :]
        row = v[:, None].to(tl.int64)
        values = tl.load(source + row * source_row + c[None, :], there, 0.0)
        if SUM:
            total += values.to(tl.float32)
        if ADD:
            values = (values.to(tl.float32) + more[None, :]).to(target.dtype.element_ty)
        tl.store(target + row * target_row + c[None, :], values, there)
    if SUM:
        tl.store(part + chunk.to(tl.int64) * C + c, tl.sum(total, 0), own)


def copy_rows(
    source: Tensor,
    target: Tensor,
    channels: int,
    *,
    source_at: int = 0,
    target_at: int = 0,
    bias: Tensor | None = None,
    sums: bool = False,
) -> Tensor | None:
    """Copy channels of a channels-last map to channels of another one of the same size.

    Args:
        source: (B, C, ...).
        target: (B, C', ...).
        channels: How many.
        source_at: The first of them in the source.
        target_at: The first of them in the target.
        bias: (channels,) to add.
        sums: Give the sum of what was read.

    Returns:
        (channels,) float32 with `sums`.
    """
    block_s, block_c, tiles = _tile(channels)
    voxels = source.numel() // source.shape[1]
    size, chunks = _chunks(1, voxels, block_s, tiles)
    part = source.new_empty((chunks, channels) if sums else (1, 1), dtype=torch.float32)
    # Flat views that begin at the first channel to be copied.
    ends = [_from_channel(source, source_at), _from_channel(target, target_at)]
    _copy_rows[(chunks, tiles)](
        *ends,
        part if bias is None else bias,
        part,
        voxels,
        channels,
        source.shape[1],
        target.shape[1],
        size,
        ADD=bias is not None,
        SUM=sums,
        BLOCK_S=block_s,
        BLOCK_C=block_c,
    )
    return part.sum(0) if sums else None


def _from_channel(x: Tensor, first: int) -> Tensor:
    return x.as_strided((x.numel() - first,), (1,), x.storage_offset() + first)


# ---- logits ---------------------------------------------------------------------------------------------------------


@triton.jit
def _logits(x, weight, bias, out, V, S, C, K, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    v = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    c, k = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    values = tl.load(x + v[:, None] * C + c[None, :], (v < V)[:, None] & (c < C)[None, :], 0.0)
    w = tl.load(weight + k[None, :] * C + c[:, None], (c < C)[:, None] & (k < K)[None, :], 0.0)
    y = tl.dot(values, w) + tl.load(bias + k, k < K, 0.0).to(tl.float32)[None, :]
    at = (v // S)[:, None] * K * S + k[None, :] * S + (v % S)[:, None]
    tl.store(out + at, y.to(out.dtype.element_ty), (v < V)[:, None] & (k < K)[None, :])


@triton.jit
def _logits_gradient(
    x, weight, dy, dx, part, V, S, C, K, LOOPS,
    BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradient of the map, and of weight and bias a part per program: (C + 1, K), the bias last."""
    p = tl.program_id(0).to(tl.int64)
    c, k = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    w = tl.load(weight + k[:, None] * C + c[None, :], (k < K)[:, None] & (c < C)[None, :], 0.0)
    total = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    summed = tl.zeros((BLOCK_K,), tl.float32)
    for i in range(LOOPS):
        v = (p * LOOPS + i) * BLOCK_V + tl.arange(0, BLOCK_V)
        at = (v // S)[:, None] * K * S + k[None, :] * S + (v % S)[:, None]
        g = tl.load(dy + at, (v < V)[:, None] & (k < K)[None, :], 0.0)
        there = (v < V)[:, None] & (c < C)[None, :]
        values = tl.load(x + v[:, None] * C + c[None, :], there, 0.0)
        tl.store(dx + v[:, None] * C + c[None, :], tl.dot(g, w).to(dx.dtype.element_ty), there)
        total += tl.dot(tl.trans(values), g)
        summed += tl.sum(g.to(tl.float32), 0)
    base = part + p * (C + 1) * K
    tl.store(base + c[:, None] * K + k[None, :], total, (c < C)[:, None] & (k < K)[None, :])
    tl.store(base + C * K + k, summed, k < K)


def _logit_blocks(channels: int) -> dict[str, int]:
    block_c = max(16, triton.next_power_of_2(channels))
    return {"BLOCK_V": max(32, min(128, 8192 // block_c)), "BLOCK_C": block_c, "BLOCK_K": 16}


def logits(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A convolution with kernel 1 to few classes, whose planes lie one behind the other as losses want them.

    Args:
        x: (B, C, ...) float16 or bfloat16, channels last.
        weight: (K, C) of the same type, K of 16 at most.
        bias: (K,).

    Returns:
        (B, K, ...) contiguous.
    """
    blocks = _logit_blocks(x.shape[1])
    batch, voxels, channels = _sizes(x)
    out = x.new_empty((batch, weight.shape[0], *x.shape[2:]))
    grid = (triton.cdiv(batch * voxels, blocks["BLOCK_V"]),)
    _logits[grid](x, weight, bias, out, batch * voxels, voxels, channels, weight.shape[0], **blocks)
    return out


def logits_backward(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the map, and float32 ones of weight (K, C) and bias (K,), from a contiguous `dy`."""
    blocks = _logit_blocks(x.shape[1])
    batch, voxels, channels = _sizes(x)
    classes = weight.shape[0]
    count = triton.cdiv(batch * voxels, blocks["BLOCK_V"])
    loops = triton.cdiv(count, PROGRAMS // 2)
    programs = triton.cdiv(count, loops)
    dx = torch.empty_like(x)
    part = x.new_empty((programs, channels + 1, classes), dtype=torch.float32)
    _logits_gradient[(programs,)](x, weight, dy, dx, part, batch * voxels, voxels, channels, classes, loops, **blocks)
    sums = part.sum(0)
    return dx, sums[:-1].t().contiguous(), sums[-1]


# ---- convolutions of few channels -----------------------------------------------------------------------------------


@triton.jit
def _few_patches(x, v, k, V, D, H, W, C: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, S):
    """(voxels, taps * C): the neighbourhoods of voxels `v` of the whole batch, 0 outside of the volume."""
    b, s = v // S, v % S
    d, h, w = s // (H * W), (s // W) % H, s % W
    c, tap = k % C, k // C
    dd = d[:, None] + (tap // (KH * KW))[None, :] - KD // 2
    hh = h[:, None] + ((tap // KW) % KH)[None, :] - KH // 2
    ww = w[:, None] + (tap % KW)[None, :] - KW // 2
    there = (dd >= 0) & (dd < D) & (hh >= 0) & (hh < H) & (ww >= 0) & (ww < W)
    there = there & (v < V)[:, None] & (k < KD * KH * KW * C)[None, :]
    at = ((b.to(tl.int64)[:, None] * D + dd) * H + hh) * W + ww
    return tl.load(x + at * C + c[None, :], there, 0.0)


@triton.jit
def _few_conv(
    x, weight, y, V, D, H, W, S, N,
    C: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    v = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    patches = _few_patches(x, v, k, V, D, H, W, C, KD, KH, KW, S)
    w = tl.load(weight + k[:, None] * N + n[None, :], (k < KD * KH * KW * C)[:, None] & (n < N)[None, :], 0.0)
    out = tl.dot(patches, w)
    there = (v < V)[:, None] & (n < N)[None, :]
    tl.store(y + v[:, None] * N + n[None, :], out.to(y.dtype.element_ty), there)


@triton.jit
def _few_weight(
    x, dy, part, V, D, H, W, S, N, LOOPS,
    C: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for i in range(LOOPS):
        v = (p * LOOPS + i) * BLOCK_V + tl.arange(0, BLOCK_V)
        patches = _few_patches(x, v, k, V, D, H, W, C, KD, KH, KW, S)
        there = (v < V)[:, None] & (n < N)[None, :]
        total += tl.dot(tl.trans(patches), tl.load(dy + v[:, None] * N + n[None, :], there, 0.0))
    own = (k < KD * KH * KW * C)[:, None] & (n < N)[None, :]
    taps = KD * KH * KW * C
    tl.store(part + (p * taps + k[:, None]) * N + n[None, :], total, own)


def _few(x: Tensor, kernel: Sequence[int], outputs: int) -> tuple[tuple[int, ...], dict[str, int]]:
    """Sizes (B * S, D, H, W, S, N) and the constants of the two kernels; a slice is a volume of depth 1."""
    size, taps = tuple(x.shape[2:]), tuple(kernel)
    d, h, w = (1,) * (3 - len(size)) + size
    kd, kh, kw = (1,) * (3 - len(taps)) + taps
    block_k = max(16, triton.next_power_of_2(kd * kh * kw * x.shape[1]))
    block_n = max(16, min(64, triton.next_power_of_2(outputs)))
    constants = {"C": x.shape[1], "KD": kd, "KH": kh, "KW": kw, "BLOCK_V": 128, "BLOCK_K": block_k, "BLOCK_N": block_n}
    return (x.shape[0] * d * h * w, d, h, w, d * h * w, outputs), constants


def few_channel_conv(x: Tensor, weight: Tensor) -> Tensor:
    """Convolution (stride 1, same size, no bias) of a channels-last map of very few channels.

    cuDNN has no tensor-core kernel for one channel: there it takes as long as for 32. Here a neighbourhood is a row of
    a matrix product.

    Args:
        x: (B, C, ...) float16 or bfloat16, channels last, C of 4 at most.
        weight: (N, C, ...) of the same type, odd kernel sizes.
    """
    sizes, constants = _few(x, weight.shape[2:], weight.shape[0])
    form = torch.channels_last_3d if x.ndim == 5 else torch.channels_last
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)
    rows = weight.movedim((0, 1), (-1, -2)).contiguous()  # (taps, C, N)
    grid = (triton.cdiv(sizes[0], constants["BLOCK_V"]), triton.cdiv(sizes[5], constants["BLOCK_N"]))
    _few_conv[grid](x, rows, y, *sizes, **constants)
    return y


def few_channel_weight(x: Tensor, dy: Tensor, kernel: Sequence[int]) -> Tensor:
    """Gradient of that convolution's weight, (N, C, ...) float32."""
    outputs = dy.shape[1]
    sizes, constants = _few(x, kernel, outputs)
    blocks = triton.cdiv(sizes[0], constants["BLOCK_V"])
    loops = triton.cdiv(blocks, PROGRAMS // 4)
    programs = triton.cdiv(blocks, loops)
    part = x.new_empty((programs, *kernel, x.shape[1], outputs), dtype=torch.float32)
    _few_weight[(programs, triton.cdiv(outputs, constants["BLOCK_N"]))](x, dy, part, *sizes, loops, **constants)
    return part.sum(0).movedim((-1, -2), (0, 1))
