"""Queries look at each other and at the maps, and refine their boxes layer by layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_detr.models.attention import CORES, Core, DeformableAttention, SelfAttention, kernels_take
from lit_detr.models.blocks import BoxHead, FeedForward, recomputed
from lit_detr.models.geometry import BoxCoding, Shapes, refine
from lit_detr.models.selection import prior_bias

__all__ = ["BoxPosition", "Decoder", "DecoderLayer"]

FREQUENCIES = 16
FASTEST = 64.0  # periods per image: 10 px at 640, so that neighbouring tiny boxes differ


class BoxPosition(nn.Module):
    """A code for a box: sines of its centre and of the logarithm of its size, then two linear layers."""

    frequency: Tensor

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mix = FeedForward(8 * FREQUENCIES, hidden, hidden)
        steps = torch.linspace(0, 1, FREQUENCIES)
        self.register_buffer("frequency", torch.pi * (2 * FASTEST) ** steps, persistent=False)

    def forward(self, boxes: Tensor) -> Tensor:
        """(B, Q, 4) float32 shares of the valid part to (B, Q, hidden)."""
        # Sizes of 1/1000 to 1 become -1 to 0.
        at = torch.cat([boxes[..., :2], boxes[..., 2:].clamp(min=1e-4).log() * 0.145], dim=-1)
        angle = (at[..., None] * self.frequency).flatten(2)
        return self.mix(torch.cat([angle.sin(), angle.cos()], dim=-1).to(self.mix[0].weight.dtype))  # type: ignore[arg-type]


class DecoderLayer(nn.Module):
    """Self-attention, deformable cross-attention, two linear layers; normalised after each."""

    def __init__(self, hidden: int, heads: int, feedforward: int, levels: int, points: int) -> None:
        super().__init__()
        self.attention = SelfAttention(hidden, heads)
        self.cross = DeformableAttention(hidden, heads, levels, points)
        self.feedforward = FeedForward(hidden, feedforward, hidden)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(hidden) for _ in range(3))

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        reference: Tensor,
        value: Tensor,
        shapes: Shapes,
        core: Core,
        bias: Tensor | None,
    ) -> Tensor:
        """(B, Q, hidden) to the same."""
        x = self.norm1(x + self.attention(x + position, bias))
        x = self.norm2(x + self.cross(x + position, reference, value, shapes, CORES[core]))
        return self.norm3(x + self.feedforward(x))


class Decoder(nn.Module):
    """Layers with a class head and a box head each.

    The box of a layer is the one before it, moved. What a layer starts from carries no gradient, but its prediction
    does one layer back ("look forward twice"): a head also learns to be a good start.

    Args:
        hidden: Channels.
        classes: K.
        layers: Number of layers.
        heads: Of both attentions.
        feedforward: Inner width.
        levels: Number of maps.
        points: Points per head and level.
        prior: Probability that the class heads begin with.
        coding: Of the boxes.
        core: How points are read.
        checkpointing: Recompute the layers in the backward pass.

    Source:
        Deformable DETR (arXiv 2010.04159), look forward twice of DINO (arXiv 2203.03605).
    """

    def __init__(
        self,
        hidden: int,
        classes: int,
        *,
        layers: int = 3,
        heads: int = 8,
        feedforward: int = 1024,
        levels: int = 3,
        points: int = 4,
        prior: float = 0.01,
        coding: BoxCoding = "relative",
        core: Core = "auto",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.checkpointing = heads, checkpointing
        self.coding: BoxCoding = coding
        self.core: Core = core
        self.value = nn.Linear(hidden, layers * hidden)  # of all layers in one product
        self.position = BoxPosition(hidden)
        self.layers = nn.ModuleList(DecoderLayer(hidden, heads, feedforward, levels, points) for _ in range(layers))
        self.class_heads = nn.ModuleList(nn.Linear(hidden, classes) for _ in range(layers))
        self.box_heads = nn.ModuleList(BoxHead(hidden) for _ in range(layers))
        for weight in self.value.weight.chunk(layers):
            nn.init.xavier_uniform_(weight)
        nn.init.zeros_(self.value.bias)
        for head in self.class_heads:
            assert isinstance(head, nn.Linear)
            nn.init.normal_(head.weight, std=0.01)
            nn.init.constant_(head.bias, prior_bias(prior))

    def forward(
        self,
        x: Tensor,
        reference: Tensor,
        memory: Tensor,
        shapes: Shapes,
        *,
        bias: Tensor | None = None,
        valid: Tensor | None = None,
        stretch: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Refine.

        Args:
            x: (B, Q, hidden) contents.
            reference: (B, Q, 4) float32 boxes, without gradient.
            memory: (B, S, hidden) all levels' cells.
            shapes: Cells per level.
            bias: (B, 1, Q, Q) for the self-attention.
            valid: (B, S) bool; other cells read as zero.
            stretch: (B, 1, 4) float32 from shares of the padded image to shares of its valid part.

        Returns:
            Logits (L, B, Q, K) and boxes (L, B, Q, 4) float32.
        """
        values = self._values(memory, valid)
        references, deltas, logits = [reference], [], []
        for layer, class_head, box_head, value in zip(
            self.layers, self.class_heads, self.box_heads, values, strict=True
        ):
            position = self.position(reference if stretch is None else reference * stretch)
            x = self._run(layer, x, position, reference, value, shapes, self.core, bias)
            logits.append(class_head(x))
            deltas.append(box_head(x))
            moved = refine(reference, deltas[-1], self.coding)
            references.append(moved)
            reference = moved.detach()
        return torch.stack(logits), refine(torch.stack(references[:-1]), torch.stack(deltas), self.coding)

    def _values(self, memory: Tensor, valid: Tensor | None) -> tuple[Tensor, ...]:
        """Per layer (B, heads, S, D): as they are for kernels of our own, else float32 with levels that are maps."""
        b, s, c = memory.shape
        value = self.value(memory)
        if valid is not None:
            value = value * valid[..., None]
        value = value.view(b, s, len(self.layers), self.heads, c // self.heads)
        if self.core == "auto" and kernels_take(value):
            return tuple(own.transpose(1, 2) for own in value.unbind(2))
        value = value.permute(2, 0, 3, 1, 4)
        return value.to(torch.float32, memory_format=torch.contiguous_format).contiguous().unbind(0)

    def _run(self, layer: nn.Module, *args: object) -> Tensor:
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return recomputed(layer, layer, *args)
        return layer(*args)
