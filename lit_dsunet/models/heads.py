"""Logit heads on the stages of a decoder: deep supervision."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lit_dsunet.models import channels_last as cl

__all__ = ["Heads"]


class Heads(nn.Module):
    """A 1x1 convolution per decoder stage; in training the finest ones give logits at their own resolution.

    All heads exist whatever `deep_supervision` is, so that checkpoints load either way; those that never run are
    frozen, since DistributedDataParallel waits for the gradient of every trainable parameter.

    Args:
        channels: Of the decoder stages, coarsest first.
        num_classes: Channels of the logits.
        dims: 2 or 3.
        deep_supervision: Number of auxiliary heads beside the finest, 0 to len(channels) - 1.

    Raises:
        ValueError: there are not so many stages.
    """

    def __init__(self, channels: Sequence[int], num_classes: int, dims: int, deep_supervision: int) -> None:
        super().__init__()
        if not 0 <= deep_supervision < len(channels):
            raise ValueError(f"model.deep_supervision: expected 0 to {len(channels) - 1}, got {deep_supervision}")
        conv = nn.Conv3d if dims == 3 else nn.Conv2d
        self.convs = nn.ModuleList(conv(c, num_classes, 1) for c in channels)
        self.count = deep_supervision + 1
        self.channels_last = False
        for head in list(self.convs)[: -self.count]:
            head.requires_grad_(False)

    def forward(self, maps: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Logits of feature maps, coarsest first.

        Returns:
            The finest logits; in training with auxiliary heads a list, finest first.
        """
        if not self.training or self.count == 1:
            return self._head(-1, maps)
        return [self._head(-1 - i, maps) for i in range(self.count)]

    def _head(self, i: int, maps: Sequence[Tensor]) -> Tensor:
        if self.channels_last and cl.usable(maps[i]):
            return cl.logits(maps[i], self.convs[i])
        return self.convs[i](maps[i])  # type: ignore[no-any-return]
