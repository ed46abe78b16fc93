"""Optimizers as all tasks build them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import AdamW

__all__ = ["fused_adamw"]


def fused_adamw(params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]], lr: float, *, clips: bool) -> AdamW:
    """AdamW in one kernel per parameter group, also where gradients are clipped.

    A fused optimizer unscales fp16 gradients inside its kernel, too late for clipping, so Lightning refuses the two
    together. With `clips` this one does not claim to do that: the GradScaler unscales before the clipping, as for any
    other optimizer. The alternative, `fused=False`, costs tens of milliseconds a step for a network of a thousand small
    tensors, since it counts the steps of each on the host.

    Args:
        params: Parameters, or parameter groups.
        lr: Learning rate.
        clips: Gradients are clipped before the step.

    Example:
        >>> layer = torch.nn.Linear(1, 1)
        >>> fused_adamw(layer.parameters(), lr=0.1, clips=True).defaults["fused"]
        True
    """
    optimizer = AdamW(params, lr=lr, fused=True)
    if clips:
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer
