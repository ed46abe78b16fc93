"""From the backbone's maps to maps of one width that know of each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_detr.models.attention import SelfAttention
from lit_detr.models.blocks import ConvNorm, FeedForward, Fusion, recomputed
from lit_detr.models.geometry import sine_positions

__all__ = ["EncoderLayer", "FineLevel", "HybridEncoder"]


class EncoderLayer(nn.Module):
    """Self-attention and two linear layers over the cells of one map, normalised after each."""

    def __init__(self, hidden: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.attention = SelfAttention(hidden, heads)
        self.feedforward = FeedForward(hidden, feedforward, hidden)
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, H, W) to the same; nobody attends to cells outside `mask` (B, 1, H, W)."""
        h, w = x.shape[-2:]
        tokens = x.flatten(2).transpose(1, 2)
        positions = sine_positions(h, w, x.shape[1], x.device).to(x.dtype)
        seen = None if mask is None else mask.flatten(2)[:, :, None]
        tokens = self.norm1(tokens + self.attention(tokens + positions, seen))
        tokens = self.norm2(tokens + self.feedforward(tokens))
        return tokens.transpose(1, 2).reshape(x.shape)


class FineLevel(nn.Module):
    """The stride-4 map: the backbone's own plus the next coarser one, through separable convolutions.

    It is a leaf: it gives queries and values to the decoder and nothing to the other levels, so a network can be run
    without it, and it costs a tenth of a full fusion block, which has 3x3 convolutions.
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.project = ConvNorm(inputs, hidden, activate=False)
        self.depthwise = ConvNorm(hidden, hidden, 3, groups=hidden)
        self.pointwise = ConvNorm(hidden, hidden)

    def forward(self, x: Tensor, coarser: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, H, W) and (B, hidden, H / 2, W / 2) to (B, hidden, H, W)."""
        x = F.relu(self.project(x) + F.interpolate(coarser, scale_factor=2.0, mode="nearest"))
        return self.pointwise(self.depthwise(x, mask))


class HybridEncoder(nn.Module):
    """Self-attention at the coarsest level, then fusion downwards and upwards by convolutions.

    Args:
        channels: Of the backbone's maps, finest first.
        hidden: Channels of the results.
        fine: Whether the first map is a stride-4 leaf.
        heads: Of the self-attention.
        feedforward: Its inner width.
        layers: Layers of self-attention.
        depth: 3x3 convolutions in each fusion block.
        checkpointing: Recompute the fusion blocks in the backward pass.

    Source:
        RT-DETR (arXiv 2304.08069).
    """

    def __init__(
        self,
        channels: Sequence[int],
        hidden: int,
        *,
        fine: bool = False,
        heads: int = 8,
        feedforward: int = 1024,
        layers: int = 1,
        depth: int = 3,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.fine = FineLevel(channels[0], hidden) if fine else None
        full = list(channels[1:] if fine else channels)
        steps = range(len(full) - 1)
        self.project = nn.ModuleList(ConvNorm(c, hidden, activate=False) for c in full)
        self.attention = nn.ModuleList(EncoderLayer(hidden, heads, feedforward) for _ in range(layers))
        # All indexed by the finer level of a pair.
        self.lateral = nn.ModuleList(ConvNorm(hidden, hidden) for _ in steps)
        self.downwards = nn.ModuleList(Fusion(2 * hidden, hidden, depth) for _ in steps)
        self.shrink = nn.ModuleList(ConvNorm(hidden, hidden, 3, 2) for _ in steps)
        self.upwards = nn.ModuleList(Fusion(2 * hidden, hidden, depth) for _ in steps)

    def forward(self, maps: Sequence[Tensor], masks: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Fuse.

        Args:
            maps: (B, channels, h, w) per level, finest first.
            masks: (B, 1, h, w) bool per level. What lies outside has no effect on what lies inside.

        Returns:
            (B, hidden, h, w) per level.
        """
        inside: list[Tensor | None] = [None] * len(maps) if masks is None else list(masks)
        finest, finest_mask = maps[0], inside[0]
        if self.fine is not None:
            maps, inside = maps[1:], inside[1:]
        levels: list[Tensor] = [project(m) for project, m in zip(self.project, maps, strict=True)]
        for layer in self.attention:
            levels[-1] = self._run(layer, levels[-1], inside[-1])
        for i in reversed(range(len(levels) - 1)):  # coarse to fine
            levels[i + 1] = self.lateral[i](levels[i + 1])
            above = F.interpolate(levels[i + 1], scale_factor=2.0, mode="nearest")
            levels[i] = self._run(self.downwards[i], torch.cat([above, levels[i]], dim=1), inside[i])
        for i in range(len(levels) - 1):  # fine to coarse
            below = self.shrink[i](levels[i], inside[i])
            levels[i + 1] = self._run(self.upwards[i], torch.cat([below, levels[i + 1]], dim=1), inside[i + 1])
        if self.fine is None:
            return levels
        return [self._run(self.fine, finest, levels[0], finest_mask), *levels]

    def _run(self, module: nn.Module, *args: Tensor | None) -> Tensor:
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return recomputed(module, module, *args)
        return module(*args)
