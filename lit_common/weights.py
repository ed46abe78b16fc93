"""Weights of a file or a checkpoint for a network."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lit_cli.errors import InputError

__all__ = ["first_line", "load_weights", "network_weights", "take_weights"]


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
        raise InputError(f"{option}: {path} is not a checkpoint of this library ({first_line(error):.80})") from error
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


def load_weights(module: nn.Module, path: str) -> None:
    """Load every tensor of a weights file (`.pth`, `.ckpt`, `.safetensors`) whose name and shape fit a backbone.

    Raises:
        InputError: no such file, not a weights file, or fewer than half of the module's tensors are in it.
    """
    if not Path(path).is_file():
        raise InputError(f"model.pretrained: no file {path}; expected true, false or a weights file")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            state: dict[str, Tensor] = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)  # type: ignore[assignment]
    except Exception as error:
        raise InputError(f"model.pretrained: {path} is not a weights file ({first_line(error)})") from error
    own = module.state_dict()
    fitting = {name: found for name, tensor in own.items() if (found := _fitting(name, tensor, state)) is not None}
    if len(fitting) * 2 < len(own):
        raise InputError(
            f"model.pretrained: {path} holds {len(fitting)} of the {len(own)} tensors of this backbone; "
            "expected a file saved from the same architecture"
        )
    module.load_state_dict(fitting, strict=False)


def _fitting(name: str, own: Tensor, state: dict[str, Tensor]) -> Tensor | None:
    """A file's tensor for one of ours, under the names that timm and segmentation-models-pytorch give it."""
    plain = name.removeprefix("model.")  # smp's wrapper around timm
    # timm's feature extractors flatten their first level: stages.0 becomes stages_0.
    names = (name, plain, re.sub(r"^([a-z]+)_(\d+)\.", r"\1.\2.", plain))
    found = next((state[n] for n in names if n in state and isinstance(state[n], Tensor)), None)
    if found is None or found.shape == own.shape:
        return found
    if own.ndim == 4 and found.shape == (own.shape[0], 3, *own.shape[2:]):
        from timm.models._manipulate import adapt_input_conv  # its import costs seconds

        return adapt_input_conv(own.shape[1], found)  # an RGB stem for another number of channels
    return None


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
