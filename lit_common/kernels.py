"""Whether kernels written in Triton can be used."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

__all__ = ["usable"]

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's way to run on a CPU, for tests


def usable(x: Tensor) -> bool:
    """Whether kernels run on this tensor's device; not while compiling, where the compiler writes its own.

    Example:
        >>> usable(torch.zeros(1, device="meta"))
        False
    """
    here = x.is_cuda or (_INTERPRETED and x.device.type == "cpu")
    return _HAS_TRITON and here and not torch.compiler.is_compiling()
