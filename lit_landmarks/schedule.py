"""How fast to learn, by batch size."""

from __future__ import annotations

import numpy as np

LR_RULE = ((8, 5e-4), (12, 6e-4), (16, 6e-4), (20, 1e-3), (32, 1e-3))  # images per optimizer step, learning rate


def auto_lr(effective_batch: int) -> float:
    """Learning rate by images per optimizer step: 5e-4 up to 8, 6e-4 at 12-16, 1e-3 from 20, linear in between.

    Example:
        >>> auto_lr(4), auto_lr(14), auto_lr(18), auto_lr(64)
        (0.0005, 0.0006, 0.0008, 0.001)
    """
    batches, rates = zip(*LR_RULE, strict=True)
    return round(float(np.interp(effective_batch, batches, rates)), 10)
