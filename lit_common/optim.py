"""Optimizers as all tasks build them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import SGD, AdamW, Optimizer

__all__ = ["fused_adamw", "fused_sgd", "warn_of_resumed"]


def warn_of_resumed(optimizer: Optimizer, **wanted: float) -> None:
    """Say so when a resumed optimizer goes on with other values than the command line's.

    Args:
        optimizer: After the checkpoint was loaded; its first group is looked at.
        wanted: `lr`, the peak rate, and other values of a parameter group.
    """
    group = optimizer.param_groups[0]
    for name, value in wanted.items():
        has = group.get("initial_lr", value) if name == "lr" else group[name]
        if not math.isclose(has, value):
            rank_zero_warn(
                f"model.{name} is {value:g}, but the resumed optimizer goes on with {has:g}; to start from the "
                "weights with a new optimizer, use --model.init_from instead of --ckpt_path"
            )


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


def fused_sgd(
    params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
    lr: float,
    *,
    momentum: float,
    weight_decay: float,
    clips: bool,
) -> SGD:
    """SGD with Nesterov momentum in one kernel per parameter group, also where gradients are clipped (`fused_adamw`).

    Args:
        params: Parameters, or parameter groups.
        lr: Learning rate.
        momentum: 0 for plain gradient descent.
        weight_decay: L2 penalty.
        clips: Gradients are clipped before the step.

    Example:
        >>> layer = torch.nn.Linear(1, 1)
        >>> fused_sgd(layer.parameters(), 0.1, momentum=0.9, weight_decay=0.0, clips=True).defaults["nesterov"]
        True
    """
    optimizer = SGD(params, lr, momentum=momentum, nesterov=momentum > 0, weight_decay=weight_decay, fused=True)
    if clips:
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer
