"""Weights of one checkpoint for another network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lit_cli.errors import InputError

__all__ = ["network_weights", "take_weights"]


def network_weights(path: str, option: str) -> dict[str, Tensor]:
    """The tensors of the network (`net.` in its module) in a checkpoint, by their names there.

    Args:
        path: The checkpoint.
        option: What the user named it with, for messages.

    Raises:
        InputError: no such file, or no checkpoint.
    """
    if not Path(path).is_file():
        raise InputError(f"{option}: {path}: no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"{option}: {path} is not a checkpoint of this library ({reason:.80})") from error
    return {k.removeprefix("net."): v for k, v in state.items() if k.startswith("net.")}


def take_weights(network: nn.Module, path: str, option: str, may_differ: Callable[[str], bool]) -> None:
    """Start a network from a checkpoint's weights; what may differ, such as heads, keeps its own where it does.

    Args:
        network: Takes the weights.
        path: The checkpoint.
        option: What the user named it with, for messages.
        may_differ: Whether a tensor of this name may be new or of another shape.

    Raises:
        InputError: no such file, no checkpoint, or one of another network.
    """
    own = network.state_dict()
    fitting = {k: v for k, v in network_weights(path, option).items() if k in own and own[k].shape == v.shape}
    missing = [k for k in own if k not in fitting]
    needed = [k for k in missing if not may_differ(k)]
    if needed:
        raise InputError(f"{option}: {path} lacks {len(needed)} tensors of this network, such as {needed[0]}")
    network.load_state_dict(fitting, strict=False)
    rank_zero_info(f"weights from {path}: {len(fitting)} tensors" + (f", new: {missing}" if missing else ""))
