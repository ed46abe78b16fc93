"""Which cells of the maps become queries, and how many queries there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_detr.models.blocks import BoxHead
from lit_detr.models.geometry import BoxCoding, Shapes, refine

__all__ = ["QUERY_BUCKETS", "QuerySelection", "Selection", "level_limits", "prior_bias", "query_budget", "select"]

QUERY_BUCKETS = (100, 200, 300, 450, 600, 750, 900, 1200, 1500)
CERTAIN = 1e4  # above every logit


def query_budget(
    counts: Sequence[int],
    *,
    minimum: int = 300,
    maximum: int = 1500,
    factor: float = 1.5,
    buckets: Sequence[int] = QUERY_BUCKETS,
) -> int:
    """Number of queries for a batch: few values ever occur, so that few shapes are compiled.

    Args:
        counts: Boxes of each image, on the host.
        minimum: Never fewer.
        maximum: Never more; images with more boxes than that leave some without a query.
        factor: Queries per box of the densest image.
        buckets: Allowed numbers, beside the two limits.

    Example:
        >>> query_budget([3, 25]), query_budget([25, 500]), query_budget([5000]), query_budget([])
        (300, 750, 1500, 300)
    """
    wanted = math.ceil(factor * max(counts, default=0))
    return next((b for b in sorted({*buckets, minimum}) if b >= wanted and minimum <= b <= maximum), maximum)


def prior_bias(probability: float) -> float:
    """Bias that makes a head begin at a probability.

    Source:
        Focal loss (arXiv 1708.02002).
    """
    return -math.log((1 - probability) / probability)


def level_limits(
    shapes: Shapes, queries: int, quota: tuple[float, float]
) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """How many queries each level is sure of, and how many it may have at most.

    Args:
        shapes: Cells per level.
        queries: In all; cut to the number of cells.
        quota: The two shares of all queries, the same for all levels.

    Returns:
        The number of queries, the least and the most per level. The most are raised evenly where they would not
        suffice, as on small images whose coarse maps have few cells.

    Example:
        >>> level_limits(((40, 40), (20, 20), (10, 10)), 300, (0.1, 0.6))
        (300, (30, 30, 30), (180, 180, 100))
        >>> level_limits(((8, 8), (4, 4)), 75, (0.1, 0.6))
        (75, (7, 7), (59, 16))
    """
    cells = [h * w for h, w in shapes]
    queries = min(queries, sum(cells))
    most = [min(n, math.ceil(quota[1] * queries)) for n in cells]
    while sum(most) < queries:
        room = [i for i, n in enumerate(cells) if most[i] < n]
        more = -(-(queries - sum(most)) // len(room))
        for i in room:
            most[i] = min(cells[i], most[i] + more)
    least = [min(m, int(quota[0] * queries)) for m in most]
    return queries, tuple(least), tuple(most)


def select(scores: Tensor, shapes: Shapes, queries: int, quota: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """The best cells of all levels, within the quotas.

    Args:
        scores: (B, S) float32, -inf where no query may be.
        shapes: Cells per level.
        queries: How many, at most all cells.
        quota: See `level_limits`.

    Returns:
        (B, Q) int64 cells and (B, Q) bool, true where there was none left that may be chosen.
    """
    queries, least, most = level_limits(shapes, queries, quota)
    values, indices, start = [], [], 0
    parts = scores.split([h * w for h, w in shapes], dim=1)
    for part, low, high in zip(parts, least, most, strict=True):
        value, index = part.topk(high, dim=1)
        # The first of a level are raised above all others, in order; -inf stays what it is.
        values += [value[:, :low] + 2 * CERTAIN, value[:, low:]]
        indices.append(index + start)
        start += part.shape[1]
    value, position = torch.cat(values, dim=1).topk(queries, dim=1)
    return torch.cat(indices, dim=1).gather(1, position), value == -torch.inf


class Selection(NamedTuple):
    """The proposals.

    Attributes:
        content: (B, Q, hidden) what the queries begin with.
        logits: (B, Q, K).
        boxes: (B, Q, 4) float32.
        cells: (B, Q) int64 position among all levels' cells.
        none: (B, Q) bool, true where a query stands for nothing.
    """

    content: Tensor
    logits: Tensor
    boxes: Tensor
    cells: Tensor
    none: Tensor


class QuerySelection(nn.Module):
    """Score every cell by one linear layer; boxes and contents are made for the chosen ones only.

    Args:
        hidden: Channels.
        classes: K.
        quota: Least and most share of the queries that any level gets.
        prior: Probability that a cell begins with.
        coding: Of the boxes.

    Source:
        Two-stage Deformable DETR (arXiv 2010.04159); the quota keeps a map with three quarters of all cells from taking
        all queries, or from getting none while the scores are still noise.
    """

    def __init__(
        self, hidden: int, classes: int, *, quota: tuple[float, float], prior: float, coding: BoxCoding
    ) -> None:
        super().__init__()
        self.quota = quota
        self.coding: BoxCoding = coding
        self.score = nn.Linear(hidden, classes)
        self.box = BoxHead(hidden)
        self.content = nn.Linear(hidden, hidden)
        self.norm = nn.LayerNorm(hidden)
        nn.init.normal_(self.score.weight, std=0.01)
        nn.init.constant_(self.score.bias, prior_bias(prior))
        nn.init.xavier_uniform_(self.content.weight)
        nn.init.zeros_(self.content.bias)

    def forward(
        self, memory: Tensor, priors: Tensor, shapes: Shapes, queries: int, valid: Tensor | None = None
    ) -> Selection:
        """Choose.

        Args:
            memory: (B, S, hidden) all levels' cells.
            priors: (S, 4) float32 a box for each cell.
            shapes: Cells per level.
            queries: How many.
            valid: (B, S) bool; no other cell is chosen while these last.
        """
        with torch.no_grad():
            # Detached: autocast would keep a cast made here, without its gradient, for the scores below.
            weight, bias = self.score.weight.detach(), self.score.bias.detach()
            scores = F.linear(memory.detach(), weight, bias).amax(-1).float().clamp(-CERTAIN, CERTAIN)
            if valid is not None:
                scores = scores.masked_fill(~valid, -torch.inf)
            cells, none = select(scores, shapes, queries, self.quota)
        chosen = memory.gather(1, cells[..., None].expand(-1, -1, memory.shape[-1]))
        content = self.norm(self.content(chosen.detach()))
        boxes = refine(priors[cells], self.box(chosen), self.coding)
        return Selection(content, self.score(chosen), boxes, cells, none)
