"""The course of the learning rate over a run."""

from __future__ import annotations

import math

__all__ = ["flat_cosine", "warmup_cosine"]


def warmup_cosine(fraction: float, warmup: float, final: float) -> float:
    """Factor on the learning rate after `fraction` of the run: linear warm-up, then cosine down to `final`.

    Example:
        >>> [round(warmup_cosine(f, 0.1, 0.0), 3) for f in (0.0, 0.05, 0.1, 0.55, 1.0)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if fraction < warmup:
        return fraction / warmup
    progress = min(1.0, (fraction - warmup) / max(1e-12, 1 - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def flat_cosine(fraction: float, warmup: float, flat: float, final: float) -> float:
    """Factor after `fraction` of the run: linear warm-up, level up to `flat` of the run, then cosine down to `final`.

    Example:
        >>> [round(flat_cosine(f, 0.1, 0.5, 0.0), 3) for f in (0.05, 0.1, 0.5, 0.75, 1.0)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if fraction < max(warmup, flat):
        return min(1.0, fraction / warmup) if warmup else 1.0
    return warmup_cosine((fraction - flat) / max(1e-12, 1 - flat), 0.0, final)
