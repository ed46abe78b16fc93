"""Denoising queries: displaced boxes of the targets that the decoder has to put back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Denoising", "Noise", "attention_bias"]

SMALLEST = 1.0  # px, side of a displaced box
EPS = 1e-4


class Noise(NamedTuple):
    """Queries with a known answer.

    Attributes:
        content: (B, N, hidden).
        boxes: (B, N, 4) float32 where they begin.
        group: (B, N) int64 from 0: queries of one group see each other.
        target: (B, N) int64 row of the box they come from, -1 where there is none.
        positive: (B, N) bool: whether they are to find that box or to say that nothing is there.
    """

    content: Tensor
    boxes: Tensor
    group: Tensor
    target: Tensor
    positive: Tensor


class Denoising(nn.Module):
    """A fixed number of queries, whatever the number of boxes.

    Half of them are positive: boxes displaced by up to half their size. Each has a negative twin, displaced by more
    than that along one axis at least, which must say that nothing is there. An image with more boxes than pairs gets a
    random subset; one with fewer gets all of them again and again, each round a group of its own. No shape depends on
    the boxes, and nothing is read back from the device.

    Args:
        hidden: Channels.
        classes: K.
        queries: N, even; 0 makes none.
        label_noise: Share of the queries that get a random class.
        box_noise: Displacement of the centre in half widths and heights: at most once that for positives, and up to
            twice that for negatives. Sides change by as much as the centre of a positive.
        floor: The same in pixels, never less: half of a 4-px box would be no displacement to speak of.

    Source:
        DN-DETR (arXiv 2203.01305), contrastive groups of DINO (arXiv 2203.03605).
    """

    def __init__(
        self,
        hidden: int,
        classes: int,
        *,
        queries: int = 200,
        label_noise: float = 0.25,
        box_noise: float = 1.0,
        floor: float = 3.0,
    ) -> None:
        super().__init__()
        self.queries, self.classes = queries, classes
        self.label_noise, self.box_noise, self.floor = label_noise, box_noise, floor
        # It exists without denoising too, so that checkpoints load either way, but then nobody waits for its gradient.
        self.embedding = nn.Embedding(classes, hidden)
        self.embedding.weight.requires_grad_(queries > 0)

    def forward(self, boxes: Tensor, labels: Tensor, lengths: Tensor, canvas: tuple[int, int]) -> Noise:
        """Make the queries of a batch.

        Args:
            boxes: (B, T, 4) float32.
            labels: (B, T) int64.
            lengths: (B,) int64 valid rows.
            canvas: Height and width of the padded image in pixels.
        """
        (b, t), device = labels.shape, boxes.device
        boxes = boxes.float()
        pairs = self.queries // 2
        valid = torch.arange(t, device=device) < lengths[:, None]
        order = torch.rand(b, t, device=device).masked_fill(~valid, 2.0).argsort(1)
        turn = torch.arange(pairs, device=device)[None]
        rounds = lengths.clamp(min=1)[:, None]
        some = lengths[:, None] > 0
        row = order.gather(1, turn % rounds).repeat(1, 2)
        # An image without boxes has groups of one and no targets.
        group = torch.where(some, turn // rounds, turn).repeat(1, 2)
        positive = torch.arange(self.queries, device=device) < pairs

        chance = torch.rand(b, self.queries, device=device)
        label = labels.gather(1, row)
        label = torch.where(chance < self.label_noise, torch.randint_like(label, self.classes), label)
        displaced = self._displace(boxes.gather(1, row[..., None].expand(-1, -1, 4)), positive, canvas)
        return Noise(
            content=self.embedding(label),
            boxes=displaced,
            group=group,
            target=torch.where(some, row, -1),
            positive=positive & (some),
        )

    def _displace(self, boxes: Tensor, positive: Tensor, canvas: tuple[int, int]) -> Tensor:
        """Move and scale (B, N, 4) boxes; those that are not `positive` end outside the square of those that are.

        Moving corners instead, as DINO does, can turn a negative inside out and thereby into a good box.
        """
        height, width = canvas
        centre, size = boxes[..., :2], boxes[..., 2:]
        pixel = torch.cat([torch.full((1,), 1 / n, device=boxes.device) for n in (width, height)])
        reach = torch.maximum(size * (0.5 * self.box_noise), pixel * self.floor)
        draw = torch.rand(*boxes.shape, device=boxes.device) * 2 - 1
        shift = draw[..., :2]
        far = shift.abs().amax(-1, keepdim=True).clamp(min=EPS)  # within a square: 0 in the middle, 1 on its border
        shift = torch.where(positive[:, None], shift, shift * (1 + 1 / far))
        side = torch.maximum(size + draw[..., 2:] * reach, pixel * SMALLEST)
        return torch.cat([centre + shift * reach, side], dim=-1)


def attention_bias(group: Tensor | None, none: Tensor | None, queries: int, dtype: torch.dtype) -> Tensor | None:
    """Who may see whom in the decoder's self-attention.

    Queries see queries. Denoising queries see these too, and their own group; nobody else sees them. A query that
    stands for nothing is seen by itself only.

    Args:
        group: (B, N) int64 groups of the denoising queries, which come after the others.
        none: (B, Q) bool, true for queries that stand for nothing.
        queries: Q.
        dtype: Of the result.

    Returns:
        (B, 1, Q + N, Q + N), 0 or -inf; None where everybody sees everybody.
    """
    if group is None and none is None:
        return None
    known = group if group is not None else none
    assert known is not None
    b, device = known.shape[0], known.device
    # Below zero: seen by all. Queries that stand for nothing get groups of their own above all others.
    if none is None:
        identity = torch.full((b, queries), -1, device=device)
    else:
        own = torch.arange(queries, device=device) + (group.shape[1] if group is not None else 0)
        identity = torch.where(none, own, -1)
    if group is not None:
        identity = torch.cat([identity, group], dim=1)
    n = identity.shape[1]
    sees = (identity[:, None] < 0) | (identity[:, None] == identity[:, :, None])
    # Rows begin at multiples of 16 bytes, or each layer's kernel would copy it to such a place.
    bias = torch.full((b, n, -(-n // 8) * 8), -torch.inf, dtype=dtype, device=device)[:, :, :n]
    return bias.masked_fill_(sees, 0.0)[:, None]  # in place, or the rows would be packed
