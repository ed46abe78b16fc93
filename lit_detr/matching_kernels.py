"""A Triton kernel for the costs of matching: nothing of the size of all pairs is stored but the costs themselves."""

# A kernel's arguments are pointers and numbers as Triton sees them, its constants plain integers to the caller.
# ruff: noqa: ANN001, ANN202
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["KINDS", "pair_costs"]

KINDS = {"focal": 0, "vfl": 1, "mal": 2}
BLOCK = 256


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _power(p, gamma):
    """A power of a share; 0 ** 0 is 1."""
    found = tl.exp(gamma * tl.log(tl.maximum(p, 1e-30)))
    return tl.where(gamma == 0.0, 1.0, tl.where(p > 0.0, found, 0.0))


@triton.jit
def _term(x, quality, alpha, gamma, KIND: tl.constexpr):
    """As that object rather than as background: see `ClassTerm`."""
    p = 1.0 / (1.0 + tl.exp(-x))
    if KIND == 0:
        positive = alpha * _power(1.0 / (1.0 + tl.exp(x)), gamma) * _softplus(-x)
        negative = (1.0 - alpha) * _power(p, gamma) * _softplus(x)
    else:
        share = quality if KIND == 1 else _power(quality, gamma)
        positive = _softplus(x) - share * x
        if KIND == 1:
            positive = quality * positive
        negative = alpha * _power(p, gamma) * _softplus(x)
    return positive - negative


@triton.jit
def _pair_costs(
    logits, boxes, wanted, image, label, out, Q, logit_s, logit_b, logit_q, box_s, box_b, box_q,
    of_class, of_l1, of_giou, of_nwd, alpha, gamma, height, width, constant, smallest, largest,
    KIND: tl.constexpr, NWD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The costs of a box with some queries of a stage."""
    s, n = tl.program_id(1), tl.program_id(2)
    stages = tl.num_programs(1)
    q = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = q < Q
    b, k = tl.load(image + n).to(tl.int64), tl.load(label + n)
    ax, ay = tl.load(wanted + 4 * n).to(tl.float32), tl.load(wanted + 4 * n + 1).to(tl.float32)
    aw, ah = tl.load(wanted + 4 * n + 2).to(tl.float32), tl.load(wanted + 4 * n + 3).to(tl.float32)
    at = boxes + s.to(tl.int64) * box_s + b * box_b + q * box_q
    x, y = tl.load(at, inside, 0.0).to(tl.float32), tl.load(at + 1, inside, 0.0).to(tl.float32)
    w, h = tl.load(at + 2, inside, 0.0).to(tl.float32), tl.load(at + 3, inside, 0.0).to(tl.float32)
    cost = of_l1 * (tl.abs(x - ax) + tl.abs(y - ay) + tl.abs(w - aw) + tl.abs(h - ah))

    left, right = x - w / 2, x + w / 2
    top, bottom = y - h / 2, y + h / 2
    a_left, a_right = ax - aw / 2, ax + aw / 2
    a_top, a_bottom = ay - ah / 2, ay + ah / 2
    both_w = tl.maximum(tl.minimum(right, a_right) - tl.maximum(left, a_left), 0.0)
    both_h = tl.maximum(tl.minimum(bottom, a_bottom) - tl.maximum(top, a_top), 0.0)
    inter = both_w * both_h
    union = (right - left) * (bottom - top) + (a_right - a_left) * (a_bottom - a_top) - inter
    hull_w = tl.maximum(right, a_right) - tl.minimum(left, a_left)
    hull = hull_w * (tl.maximum(bottom, a_bottom) - tl.minimum(top, a_top))
    iou = inter / tl.maximum(union, smallest)
    cost -= of_giou * (iou - (hull - union) / tl.maximum(hull, smallest))
    if NWD:
        dx, dy, dw, dh = (x - ax) * width, (y - ay) * height, (w - aw) * width, (h - ah) * height
        away = dx * dx + dy * dy + (dw * dw + dh * dh) / 4
        cost -= of_nwd * tl.exp(-tl.sqrt(tl.maximum(away, smallest)) / constant)
    logit = tl.load(logits + s.to(tl.int64) * logit_s + b * logit_b + q * logit_q + k, inside, 0.0).to(tl.float32)
    cost += of_class * _term(logit, iou, alpha, gamma, KIND)
    cost = tl.where(cost != cost, largest, tl.minimum(tl.maximum(cost, -largest), largest))
    # Comparisons drop a NaN that is there, depending on the order of their arguments.
    broken = (x != x) | (y != y) | (w != w) | (h != h) | (logit != logit)
    cost = tl.where(broken, largest, cost)
    tl.store(out + (n.to(tl.int64) * stages + s) * Q + q, cost, inside)


def pair_costs(
    logits: Tensor,
    boxes: Tensor,
    wanted: Tensor,
    image: Tensor,
    label: Tensor,
    *,
    kind: str,
    factors: tuple[float, float, float, float],
    alpha: float,
    gamma: float,
    size: tuple[int, int],
    nwd_constant: float | None,
    smallest: float,
    largest: float,
) -> Tensor:
    """Costs of every box with the queries of its image.

    Args:
        logits: (S, B, Q, K) floating, K contiguous.
        boxes: (S, B, Q, 4) floating, cx cy w h as shares, the last axis contiguous.
        wanted: (N, 4) floating, cx cy w h as shares.
        image: (N,) int64 of each of them.
        label: (N,) int64.
        kind: Of the classification term, see `lit_detr.matching.ClassTerm`, as `alpha` and `gamma`.
        factors: Of class, L1, GIoU and NWD.
        alpha: See `kind`.
        gamma: See `kind`.
        size: (height, width) of the image in pixels, for NWD.
        nwd_constant: Of NWD; None without.
        smallest: What areas are divided by at least.
        largest: In place of NaN, and the bound of all costs.

    Returns:
        (N, S, Q) float32.
    """
    stages, _, queries = boxes.shape[:3]
    out = torch.empty(len(image), stages, queries, device=boxes.device, dtype=torch.float32)
    nwd = nwd_constant is not None and factors[3] > 0
    with torch.cuda.device_of(boxes):
        _pair_costs[(triton.cdiv(queries, BLOCK), stages, len(image))](
            logits, boxes, wanted.contiguous(), image, label, out, queries, *logits.stride()[:3], *boxes.stride()[:3],
            *(float(f) for f in factors), float(alpha), float(gamma), float(size[0]), float(size[1]),
            float(nwd_constant or 1.0), smallest, largest, KINDS[kind], nwd, BLOCK,
        )  # fmt: skip
    return out
