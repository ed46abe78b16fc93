"""Detections of the parts of an image, put together: what several parts saw comes once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lit_detr.tiles import Pair

__all__ = ["Merged", "Overlap", "Views", "merge", "merge_images"]

Overlap = Literal["iou", "ios", "mixed"]
PAIRS = 2 * 3000**2  # pairs of detections compared at a time, about 400 MB


class Merged(NamedTuple):
    """Detections of a whole image, the best first.

    Attributes:
        boxes: (M, 4) float32 x1 y1 x2 y2 in pixels of the image.
        scores: (M,) float32.
        labels: (M,) int64.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class Views(NamedTuple):
    """Where the parts that a network saw lie in their images, in pixels of the images.

    Attributes:
        starts: (T, 2) first row and column.
        extents: (T, 2) height and width.
        sizes: (T, 2) height and width of the image that a part is of.
    """

    starts: Tensor
    extents: Tensor
    sizes: Tensor


def merge(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    starts: Tensor,
    tile: Pair,
    size: Pair,
    *,
    overlap: Overlap = "mixed",
    threshold: float = 0.5,
    border: float = 1.0,
    trust: float = 0.5,
    within: bool = False,
    min_score: float = 0.0,
    limit: int = 3000,
) -> Merged:
    """Detections of the tiles of one image, without what several tiles saw.

    First a detection that ends at an inner border of its tile gives way to one of the same class in another tile that
    ends at none, covers it, and is about as sure. Then greedy suppression by class: of two that overlap by more than
    the threshold, the one with the lower score goes; of equal scores, the smaller one. Everything stays on the device;
    the host waits once per round of suppression, usually two to four times, and once for the numbers.

    Args:
        boxes: (T, Q, 4) x1 y1 x2 y2 in pixels of the tiles.
        scores: (T, Q).
        labels: (T, Q) integers.
        starts: (T, 2) first row and column of the tiles.
        tile: (height, width) of a tile.
        size: (height, width) of the image. Boxes end there, and those of the padding go.
        overlap: `iou`; `ios`, the intersection over the smaller box; or `mixed`, the latter only where one of the two
            ends at an inner border: a piece lies within the whole, with a small IoU.
        threshold: Of the overlap, and of the share of a piece that the whole covers.
        border: Pixels within which a box counts as ending at the border; negative turns the first rule off.
        trust: How sure the whole must be at least, as a share of the piece's score.
        within: Whether detections of the same tile suppress one another, which a set predictor does not need.
        min_score: Detections at or below are left out.
        limit: Only that many of the best are compared, as memory grows with the square.

    Source: Akyon et al., "Slicing aided hyper inference", ICIP 2022, for the overlap over the smaller box.
    """

    def same(pair: Pair) -> Tensor:  # filled on the device: a tensor made of numbers would be one more copy
        return torch.stack([torch.full((len(starts),), float(v), device=starts.device) for v in pair], dim=1)

    views = Views(starts, same(tile), same(size))
    return merge_images(
        *(boxes, scores, labels, views, [len(starts)]),
        overlap=overlap,
        threshold=threshold,
        border=border,
        trust=trust,
        within=within,
        min_score=min_score,
        limit=limit,
    )[0]


def merge_images(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    views: Views,
    counts: Sequence[int],
    *,
    overlap: Overlap = "mixed",
    threshold: float = 0.5,
    border: float = 1.0,
    trust: float = 0.5,
    within: bool = False,
    min_score: float = 0.0,
    limit: int = 3000,
) -> list[Merged]:
    """`merge` of several images together, whose parts may differ in size.

    Small images are merged many at a time, so that the host does not wait once for each.

    Args:
        boxes: (T, Q, 4) x1 y1 x2 y2 from the corner of each part, the parts of an image together.
        scores: (T, Q).
        labels: (T, Q) integers.
        views: Where the parts lie.
        counts: Parts of each image.
        overlap: As the following, see `merge`.
        threshold: Of the overlap.
        border: Pixels.
        trust: How sure the whole must be.
        within: Whether detections of the same part suppress one another.
        min_score: Detections at or below are left out.
        limit: Of each image.
    """
    placed, cut_off = _placed(boxes.float(), views, border)
    columns = (placed, scores.float(), labels, cut_off)
    out: list[Merged] = []
    first = 0
    while len(out) < len(counts):
        # As many images as fit, all as wide as the widest.
        number, most = 0, 0
        for count in counts[len(out) :]:
            wider = max(most, min(limit, count * scores.shape[1]))
            if number and (number + 1) * wider**2 > PAIRS:
                break
            number, most = number + 1, wider
        own = counts[len(out) : len(out) + number]
        last = first + sum(own)
        group = (_padded(c[first:last], own) for c in columns)
        out += _merged(*group, scores.shape[1], overlap, threshold, trust, within, min_score, limit)
        first = last
    return out


def _placed(boxes: Tensor, views: Views, border: float) -> tuple[Tensor, Tensor]:
    """Boxes in pixels of their image, and (T, Q) whether they end at a border of their part that is not the image's."""
    starts, extents, sizes = (t.to(torch.float32)[:, None].flip(-1) for t in views)  # (T, 1, 2) along x and y
    low, high = boxes[..., :2], boxes[..., 2:]
    is_cut = torch.zeros(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
    if border >= 0:
        inner = (low <= border) & (starts > 0) | (high >= extents - border) & (starts + extents < sizes)
        is_cut = inner.any(-1)
    ends = ((v + starts).clamp_min(0).minimum(sizes) for v in (low, high))
    return torch.cat(list(ends), dim=-1), is_cut


def _padded(values: Tensor, counts: Sequence[int]) -> Tensor:
    """(T, Q, ...) to (B, most * Q, ...) with zeros where an image has fewer parts."""
    if len(set(counts)) == 1:
        out = values.unflatten(0, (len(counts), counts[0]))
    else:
        out = pad_sequence(list(values.split(list(counts))), batch_first=True)
    return out.flatten(1, 2)


def _merged(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    is_cut: Tensor,
    queries: int,
    overlap: Overlap,
    threshold: float,
    trust: float,
    within: bool,
    min_score: float,
    limit: int,
) -> list[Merged]:
    """Merge (B, N, ...) detections of B images; `queries` neighbours along N are of one part."""
    area = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)
    valid = (area > 0) & (scores > min_score)
    order = area.argsort(descending=True, stable=True)
    ranked = scores.masked_fill(~valid, -torch.inf).gather(1, order)
    order = order.gather(1, ranked.argsort(descending=True, stable=True)[:, :limit])
    scores, labels, area, valid, is_cut = (t.gather(1, order) for t in (scores, labels, area, valid, is_cut))
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
    source = order // max(queries, 1)

    def rows(values: Tensor) -> Tensor:
        return values[:, :, None]

    def columns(values: Tensor) -> Tensor:
        return values[:, None]

    shared = _intersection(boxes)
    rivals = (rows(labels) == columns(labels)) & rows(valid) & columns(valid)
    elsewhere = rivals & (rows(source) != columns(source))
    better = ~rows(is_cut) & columns(is_cut) & (rows(scores) >= trust * columns(scores))
    better &= shared >= threshold * columns(area)
    alive = valid & ~(elsewhere & better).any(1)

    iou = shared > threshold * (rows(area) + columns(area) - shared)
    ios = shared > threshold * torch.minimum(rows(area), columns(area))
    alike = {"iou": iou, "ios": ios, "mixed": torch.where(rows(is_cut) | columns(is_cut), ios, iou)}[overlap]
    # Row j removes column i where j comes first. Rounds end at the greedy result: each settles at least one more row.
    removes = ((rivals if within else elsewhere) & alike).triu(1)
    keep = alive
    while True:
        following = alive & ~(removes & rows(keep)).any(1)
        if torch.equal(following, keep):
            break
        keep = following
    left = (~keep).byte().argsort(dim=1, stable=True)  # those that are kept, still in order, then the others
    boxes = boxes.gather(1, left[..., None].expand(-1, -1, 4))
    scores, labels = scores.gather(1, left), labels.gather(1, left)
    numbers = keep.sum(1).tolist()
    return [Merged(*(t[i, :n] for t in (boxes, scores, labels))) for i, n in enumerate(numbers)]


def _intersection(boxes: Tensor) -> Tensor:
    """(B, N, N) shared areas, one axis after the other, which takes half the memory."""
    x1, y1, x2, y2 = boxes.unbind(-1)

    def along(low: Tensor, high: Tensor) -> Tensor:
        start = torch.maximum(low[:, :, None], low[:, None])
        return torch.minimum(high[:, :, None], high[:, None]).sub_(start).clamp_(min=0)

    return along(x1, x2).mul_(along(y1, y2))
