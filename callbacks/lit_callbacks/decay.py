"""How much of the old average an update keeps: one pure function for every rule of `EMA`."""

from __future__ import annotations

import math
from typing import Literal, cast

import torch
from torch import Tensor

__all__ = ["DECAY", "decay_at", "keep_at"]

DECAY = 0.999


def _lesser(a: float | Tensor, b: float | Tensor) -> float | Tensor:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.where(cast(Tensor, a < b), a, b)
    return min(a, b)


def _exp(x: float | Tensor) -> float | Tensor:
    return x.exp() if isinstance(x, Tensor) else math.exp(x)


def keep_at(
    n: float | Tensor,
    elapsed: float | Tensor = 1,
    *,
    decay: float = DECAY,
    half_life: float | None = None,
    warmup: bool | Literal["ramp", "power", "tau"] = True,
    gamma: float = 1.0,
    power: float = 2 / 3,
    tau: float = 2000.0,
) -> float | Tensor:
    """Share of the old average that update `n` keeps.

    The lasting share is `decay^elapsed`, or `0.5^(elapsed / half_life)` with a half-life. Without a warm-up the first
    updates would be dominated by the untrained weights, so the share is limited while n is small:

    | `warmup` | share of update n |
    |---|---|
    | "ramp", True | min(lasting, (1 + n) / (10 + n)): about the last tenth of the training so far |
    | "power" | min(lasting, 1 - (1 + n / gamma)^-power): the inverse power rule of timm; update 0 copies |
    | "tau" | lasting * (1 - exp(-(n + 1) / tau)) |
    | False | lasting |

    Args:
        n: Number of updates already made, counted from 0.
        elapsed: What has passed since the last update: optimizer steps for `decay`, the unit of `half_life` for that.
        decay: Share kept over one optimizer step, in [0, 1); ignored with a half-life.
        half_life: After this long half of the average is newer.
        warmup: Rule for the beginning.
        gamma: Scale of the "power" rule, in updates.
        power: Exponent of the "power" rule.
        tau: Time constant of the "tau" rule, in updates.

    Returns:
        A number in [0, 1]; a tensor where `n` or `elapsed` is one, in its dtype and on its device.

    Example:
        >>> keep_at(10**6, 3, decay=0.9)  # doctest: +ELLIPSIS
        0.729...
        >>> keep_at(10**6, 50, half_life=100, warmup=False)  # doctest: +ELLIPSIS
        0.707...
        >>> keep_at(torch.tensor(0.0), decay=0.9, warmup="ramp")
        tensor(0.1000)
    """
    lasting = decay**elapsed if half_life is None else 0.5 ** (elapsed / half_life)
    if warmup == "power":
        return _lesser(lasting, 1.0 - (1.0 + n / gamma) ** -power)
    if warmup == "tau":
        return lasting * (1.0 - _exp(-(n + 1.0) / tau))
    return _lesser(lasting, (1 + n) / (10 + n)) if warmup else lasting


def decay_at(n: int, decay: float, warmup: bool | Literal["ramp", "power", "tau"]) -> float:
    """Share of the old average that update `n` keeps after one optimizer step; `keep_at` without its options.

    Args:
        n: Number of updates already made, counted from 0.
        decay: Final decay, in [0, 1).
        warmup: Rule for the beginning; False gives `decay` at once.

    Returns:
        A number in [0, 1).

    Example:
        >>> decay_at(0, decay=0.999, warmup=True)
        0.1
        >>> decay_at(10**6, decay=0.999, warmup=True)
        0.999
    """
    return float(keep_at(n, decay=decay, warmup=warmup))
