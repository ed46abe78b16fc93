"""A timm network that gives feature maps at the wanted strides."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from lit_cli.errors import InputError
from lit_common.weights import first_line, load_weights
from lit_detr.models.blocks import recomputed

__all__ = ["BACKBONES", "Backbone"]

# The names that profiles and docs use; any other `features_only` model of timm does as well.
BACKBONES = ("resnet18", "resnet50", "hgnetv2_b0", "hgnetv2_b2", "hgnetv2_b4", "convnext_tiny")

BLOCK_NAMES = ("Block", "Bottleneck", "InvertedResidual")
WAY_OUT = "use --model.pretrained false, or --model.pretrained PATH with a weights file"


class Backbone(nn.Module):
    """Feature maps of an image.

    Args:
        name: A timm model that gives feature maps, such as one of `BACKBONES`.
        in_channels: Channels of the image.
        strides: Wanted strides, finest first.
        pretrained: True downloads timm's weights, a path reads them from a file.
        checkpointing: Recompute the blocks' activations in the backward pass.

    Attributes:
        channels: Of each map.

    Raises:
        InputError: timm has no such model, it lacks a stride, or its weights cannot be had.
    """

    def __init__(
        self,
        name: str,
        *,
        in_channels: int = 3,
        strides: Sequence[int] = (8, 16, 32),
        pretrained: bool | str = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        net = _create(name, in_channels, pretrained is True)
        reductions = net.feature_info.reduction()
        if missing := [s for s in strides if s not in reductions]:
            raise InputError(f"model.backbone: {name} has strides {reductions}, expected {missing} among them")
        used = [reductions.index(s) for s in strides]
        if used[-1] + 1 < len(reductions):  # stages behind the last one used would get no gradient
            net = _create(name, in_channels, pretrained is True, out_indices=tuple(used))
            used = list(range(len(used)))
        if isinstance(pretrained, str):
            load_weights(net, pretrained)
        self.net = net
        self.used = used
        self.channels_behind = _gives_channels_last(net)
        every = net.feature_info.channels()
        self.channels: list[int] = [every[i] for i in used]
        if checkpointing:
            for block in list(_outermost_blocks(net)):
                # The class is exchanged rather than the block wrapped, so that the names in the state dict stay.
                block.__class__ = _recomputing(type(block))

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, C, H, W) to (B, channels, H / stride, W / stride) per stride."""
        maps = self.net(images)
        maps = [maps[i] for i in self.used]
        return [m.permute(0, 3, 1, 2) for m in maps] if self.channels_behind else maps


def _create(name: str, in_channels: int, pretrained: bool, **kwargs: Any) -> Any:
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:6]) or "see timm.list_models()"
        raise InputError(f"model.backbone: timm has no model {name!r}; near it: {near}")
    try:
        return timm.create_model(name, features_only=True, in_chans=in_channels, pretrained=pretrained, **kwargs)
    except (OSError, ConnectionError) as error:
        raise InputError(f"model.pretrained: no weights for {name} ({first_line(error)}); {WAY_OUT}") from error
    except (RuntimeError, AssertionError) as error:
        if pretrained and "pretrained" in str(error).lower():
            raise InputError(f"model.pretrained: {first_line(error)}; {WAY_OUT}") from error
        raise InputError(f"model.backbone: {name} has no feature maps ({first_line(error)})") from error


def _gives_channels_last(net: Any) -> bool:
    form = getattr(net, "output_fmt", None)
    return getattr(form, "value", form) == "NHWC"


def _outermost_blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if type(child).__name__.endswith(BLOCK_NAMES):
            yield child
        else:
            yield from _outermost_blocks(child)


@functools.cache
def _recomputing(cls: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return cls.forward(self, *args)
        return recomputed(self, functools.partial(cls.forward, self), *args)

    return type(cls.__name__, (cls,), {"forward": forward})
