"""Large images as tiles of one size: the same geometry for the boxes in training and for detections afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lit_cli.errors import InputError
from lit_detr.samples import DetectionSample, DetectionTable

__all__ = [
    "Merged",
    "Pieces",
    "Tile",
    "TileIndex",
    "cut",
    "merge",
    "tile_grid",
    "tile_starts",
    "tile_view",
    "tiles_of",
]

Pair = tuple[int, int]
Pieces = Literal["crowd", "drop"]
Overlap = Literal["iou", "ios", "mixed"]
SLIVER = 1e-3  # px; what a tile shows less of would have no area in single precision


# ---- Geometry --------------------------------------------------------------------------------------------------------


def tile_starts(size: int, tile: int, overlap: float) -> list[int]:
    """First pixels of the tiles along one axis: evenly spread, the first at 0, the last at the end.

    Neighbours share at least `overlap * tile` pixels, so that whatever is no longer than these lies whole in some tile.

    Args:
        size: Pixels along the axis; fewer than `tile` give one tile, which is padded at its end.
        tile: Pixels of a tile.
        overlap: Share of a tile that the next one covers again, in [0, 1).

    Raises:
        ValueError: An argument is out of range.

    >>> tile_starts(1920, 640, 0.25), tile_starts(500, 640, 0.25)
    ([0, 426, 853, 1280], [0])
    """
    if size < 1 or tile < 1 or not 0 <= overlap < 1:
        raise ValueError(f"tiles: size {size}, tile {tile}, overlap {overlap}")
    room = size - tile
    if room <= 0:
        return [0]
    # Whole pixels: rounding the starts must not make an overlap a pixel smaller than was asked for.
    step = max(1, int(tile * (1 - overlap) + 1e-6))
    count = -(-room // step)
    return [i * room // count for i in range(count + 1)]


def tile_grid(size: Pair, tile: Pair, overlap: float) -> NDArray[np.int64]:
    """(T, 2) first row and column of every tile of an image, row by row.

    Args:
        size: (height, width) of the image.
        tile: (height, width) of a tile.
        overlap: Share of a tile that the next one covers again.

    >>> tile_grid((100, 200), (100, 120), 0.25).tolist()
    [[0, 0], [0, 80]]
    """
    rows, columns = (tile_starts(s, t, overlap) for s, t in zip(size, tile, strict=True))
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2).astype(np.int64)


# ---- Training: tiles as a view of a table ----------------------------------------------------------------------------


class Tile(NamedTuple):
    """A part of an image.

    Attributes:
        sample: Its boxes count from the corner of the tile; `image` and `size` are still those of the whole file.
        start: First row and column in the file.
    """

    sample: DetectionSample
    start: Pair


def tiles_of(
    sample: DetectionSample,
    size: Pair,
    tile: Pair,
    overlap: float,
    *,
    min_visible: float = 0.5,
    pieces: Pieces = "crowd",
    first_id: int = 0,
) -> list[Tile]:
    """Cut a sample.

    A box counts in a tile that shows at least `min_visible` of its area, and always in its home: of the tiles that hold
    its centre, the one that shows most of it. No object is therefore lost from all tiles. Boxes end at the tile, and
    their annotated area shrinks by the share that is cut off.

    Args:
        sample: An image with its boxes, all of them inside it and with an area.
        size: (height, width) of the image.
        tile: (height, width) of a tile.
        overlap: Share of a tile that the next one covers again.
        min_visible: Share of a box's area from which on it counts, in [0, 1].
        pieces: What becomes of a smaller share: `crowd`, neither to be found nor wrong if it is; or `drop`, background.
        first_id: Image id of the first tile, as one of the image would stand for several.
    """
    starts = tile_grid(size, tile, overlap)
    corners = np.concatenate([starts[:, ::-1], starts[:, ::-1] + tile[::-1]], axis=1).astype(np.float64)  # x y x y
    boxes = sample.boxes.astype(np.float64)
    low = np.maximum(boxes[None, :, :2], corners[:, None, :2])  # (T, N, 2)
    high = np.minimum(boxes[None, :, 2:], corners[:, None, 2:])
    visible = ((high - low) > SLIVER).all(-1)
    share = (high - low).clip(0).prod(-1) / (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    holds = ((corners[:, None, :2] <= centre) & (centre < corners[:, None, 2:])).all(-1)
    counts = visible & (share >= min_visible - 1e-9)
    counts[np.where(holds, share, -1.0).argmax(0), np.arange(len(boxes))] = True
    shown = counts | (visible if pieces == "crowd" else visible & sample.crowd)
    which, rows = shown.nonzero()
    inside = np.concatenate([low[which, rows], high[which, rows]], axis=1) - np.tile(corners[which, :2], 2)
    inside, labels = inside.astype(np.float32), sample.labels[rows]
    area = (sample.area[rows] * share[which, rows]).astype(np.float32)
    crowd = sample.crowd[rows] | ~counts[which, rows]
    ends = np.cumsum(shown.sum(1)).tolist()
    out: list[Tile] = []
    for i, ((y, x), first, last) in enumerate(zip(starts.tolist(), [0, *ends[:-1]], ends, strict=True)):
        part = DetectionSample(
            name=f"{sample.name}@{y}_{x}",
            image=sample.image,
            boxes=inside[first:last],
            labels=labels[first:last],
            area=area[first:last],
            crowd=crowd[first:last],
            size=sample.size,
            image_id=first_id + i,
            group=sample.group,
        )
        out.append(Tile(part, (y, x)))
    return out


@dataclass(frozen=True)
class TileIndex:
    """The tiles of one split.

    Attributes:
        tiles: All of them. The image id of a tile is its position here.
        parents: (T,) position of each tile's image in the split.
        empty: (T,) whether there is nothing to learn but background.
        shape: (height, width) of a tile.
    """

    tiles: list[Tile]
    parents: NDArray[np.int64]
    empty: NDArray[np.bool_]
    shape: Pair

    def __len__(self) -> int:
        return len(self.tiles)

    def epoch(self, epoch: int, *, empty_share: float = 0.2, seed: int = 0) -> NDArray[np.int64]:
        """Positions of the tiles of one epoch, in order: all with objects, and some of the empty ones.

        Empty tiles come in turns, in an order that the seed shuffles: none comes again before all others were there.
        The number is the same in every epoch, and nothing but the arguments decides which they are, so that every
        process and a resumed run agree.

        Args:
            epoch: Counts from 0.
            empty_share: Share of empty tiles in the epoch, in [0, 1), as far as there are so many.
            seed: Of the shuffling.

        Raises:
            ValueError: The share is out of range.
        """
        if not 0 <= empty_share < 1:
            raise ValueError(f"tiles: empty_share {empty_share}")
        full, bare = np.flatnonzero(~self.empty), np.flatnonzero(self.empty)
        if not len(full):
            return bare
        count = min(len(bare), round(len(full) * empty_share / (1 - empty_share)))
        if not count:
            return full
        order = np.random.default_rng(seed).permutation(bare)
        return np.sort(np.concatenate([full, order[(epoch * count + np.arange(count)) % len(bare)]]))


def tile_view(
    table: DetectionTable,
    tile: Pair,
    overlap: float,
    *,
    sizes: Mapping[str, Pair] | None = None,
    min_visible: float = 0.5,
    pieces: Pieces = "crowd",
) -> dict[str, TileIndex]:
    """Tiles of all splits; no image is opened.

    Args:
        table: A data set.
        tile: (height, width) of a tile.
        overlap: Share of a tile that the next one covers again.
        sizes: (height, width) by name of the sample, where the samples do not know it themselves.
        min_visible: See `tiles_of`.
        pieces: See `tiles_of`.

    Raises:
        InputError: The size of an image is unknown.
    """
    out: dict[str, TileIndex] = {}
    for split, samples in table.splits.items():
        tiles: list[Tile] = []
        parents: list[int] = []
        for i, sample in enumerate(samples):
            size = (sizes or {}).get(sample.name) or sample.size
            if size is None:
                raise InputError(f"{sample.image}: size is unknown, expected it in the annotation or in sizes")
            found = tiles_of(sample, size, tile, overlap, min_visible=min_visible, pieces=pieces, first_id=len(tiles))
            parents += [i] * len(found)
            tiles += found
        empty = np.array([bool(t.sample.crowd.all()) for t in tiles], np.bool_)
        out[split] = TileIndex(tiles, np.array(parents, np.int64), empty, tile)
    return out


# ---- Inference -------------------------------------------------------------------------------------------------------


def cut(images: Tensor, starts: Tensor, tile: Pair) -> Tensor:
    """All tiles at once, on the images' device.

    Args:
        images: (C, H, W), or (B, C, H, W) of one size, in any dtype. Below or right of a small image are zeros.
        starts: (T, 2) first row and column, on the same device.
        tile: (height, width) of a tile.

    Returns:
        (T, C, height, width), or (B * T, C, height, width) with the tiles of an image together.
    """
    height, width = tile
    images = images if images.ndim == 4 else images[None]
    missing = max(0, height - images.shape[-2]), max(0, width - images.shape[-1])
    if any(missing):
        images = F.pad(images, (0, missing[1], 0, missing[0]))
    # A view with every place a tile could begin at; indexing it copies only the tiles that are asked for.
    places = images.unfold(2, height, 1).unfold(3, width, 1).permute(2, 3, 0, 1, 4, 5)
    return places[starts[:, 0], starts[:, 1]].transpose(0, 1).flatten(0, 1)


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
    the host waits once per round of suppression, usually two to four times.

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
    (height, width), boxes = tile, boxes.float()
    # Scalars throughout: a tensor made of them would be one more copy to the device.
    y, x = starts.to(torch.float32).unbind(1)
    x1, y1, x2, y2 = boxes.unbind(-1)
    is_cut = torch.zeros_like(x1, dtype=torch.bool)
    if border >= 0:  # an inner border is one that is not the image's
        is_cut |= ((x1 <= border) & (x > 0)[:, None]) | ((x2 >= width - border) & (x + width < size[1])[:, None])
        is_cut |= ((y1 <= border) & (y > 0)[:, None]) | ((y2 >= height - border) & (y + height < size[0])[:, None])
    is_cut = is_cut.flatten()
    boxes = (boxes + torch.stack([x, y, x, y], dim=1)[:, None]).flatten(0, 1)
    across, down = boxes[:, 0::2].clamp(0, size[1]), boxes[:, 1::2].clamp(0, size[0])
    boxes = torch.stack([across, down], dim=2).flatten(1)
    area = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)
    scores, labels = scores.flatten().float(), labels.flatten()
    valid = (area > 0) & (scores > min_score)

    order = area.argsort(descending=True, stable=True)
    ranked = scores.masked_fill(~valid, -torch.inf)
    order = order[ranked[order].argsort(descending=True, stable=True)][:limit]
    boxes, scores, labels, area, valid, is_cut = (t[order] for t in (boxes, scores, labels, area, valid, is_cut))
    source = order // max(x1.shape[1], 1)

    shared = _intersection(boxes)
    rivals = (labels[:, None] == labels) & valid[:, None] & valid
    elsewhere = rivals & (source[:, None] != source)
    better = ~is_cut[:, None] & is_cut & (scores[:, None] >= trust * scores) & (shared >= threshold * area)
    alive = valid & ~(elsewhere & better).any(0)

    iou = shared > threshold * (area[:, None] + area - shared)
    ios = shared > threshold * torch.minimum(area[:, None], area)
    alike = {"iou": iou, "ios": ios, "mixed": torch.where(is_cut[:, None] | is_cut, ios, iou)}[overlap]
    # Row j removes column i where j comes first. Rounds end at the greedy result: each settles at least one more row.
    removes = ((rivals if within else elsewhere) & alike).triu(1)
    keep = alive
    while True:
        following = alive & ~(removes & keep[:, None]).any(0)
        if torch.equal(following, keep):
            break
        keep = following
    return Merged(boxes[keep], scores[keep], labels[keep])


def _intersection(boxes: Tensor) -> Tensor:
    """(N, N) shared areas, one axis after the other, which takes half the memory."""
    out = (
        torch.minimum(boxes[:, None, 2], boxes[:, 2]).sub_(torch.maximum(boxes[:, None, 0], boxes[:, 0])).clamp_(min=0)
    )
    high = torch.minimum(boxes[:, None, 3], boxes[:, 3]).sub_(torch.maximum(boxes[:, None, 1], boxes[:, 1]))
    return out.mul_(high.clamp_(min=0))
