"""Large images as tiles of one size: the same geometry for the boxes in training and for the pixels afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lit_cli.errors import InputError
from lit_detr.samples import DetectionSample, DetectionTable

__all__ = [
    "Pair",
    "Pieces",
    "Tile",
    "TileIndex",
    "checked_tile",
    "cut",
    "tile_grid",
    "tile_starts",
    "tile_view",
    "tiles_of",
]

Pair = tuple[int, int]
Pieces = Literal["crowd", "drop"]
SLIVER = 1e-3  # px; what a tile shows less of would have no area in single precision
LEAST_TILE = 32  # px


# ---- Geometry --------------------------------------------------------------------------------------------------------


def checked_tile(tile: int | Sequence[int], overlap: float, frame: Pair, where: str = "") -> Pair:
    """(height, width) of a tile that fills its frame.

    Args:
        tile: One side, or [height, width], in pixels of the files.
        overlap: Share of a tile that the next one covers again.
        frame: (height, width) of the network's input.
        where: Prefix of the names in errors.

    Raises:
        InputError: A side below 32 pixels, other proportions than the frame's, or an overlap outside of [0, 0.9].

    >>> checked_tile(320, 0.25, (640, 640))
    (320, 320)
    """
    sides = (tile, tile) if isinstance(tile, int) else tuple(tile)
    if len(sides) != 2 or min(sides) < LEAST_TILE:
        raise InputError(f"{where}tile: expected {LEAST_TILE} pixels or more, or [height, width] of such, got {tile}")
    if not 0 <= overlap <= 0.9:
        raise InputError(f"{where}tile_overlap: expected a share from 0 to 0.9, got {overlap}")
    if sides[0] * frame[1] != sides[1] * frame[0]:
        raise InputError(
            f"{where}tile: {sides[0]} x {sides[1]} pixels, expected the proportions of image_size, "
            f"{frame[0]} x {frame[1]}"
        )
    return sides[0], sides[1]


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
        empty: (T,) whether there is nothing but background.
        shape: (height, width) of a tile.
        unclear: (T,) whether crowds and pieces are all that is there, which makes a tile neither an example nor
            background; None where there is no such tile.
    """

    tiles: list[Tile]
    parents: NDArray[np.int64]
    empty: NDArray[np.bool_]
    shape: Pair
    unclear: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.tiles)

    def epoch(self, epoch: int, *, empty_share: float = 0.2, seed: int = 0) -> NDArray[np.int64]:
        """Positions of the tiles of one epoch, in order: all with objects, and some of the empty ones.

        Empty tiles come in turns, in an order that the seed shuffles: none comes again before all others were there.
        Unclear ones never come. The number is the same in every epoch, and nothing but the arguments decides which
        they are, so that every process and a resumed run agree.

        Args:
            epoch: Counts from 0.
            empty_share: Share of empty tiles in the epoch, in [0, 1), as far as there are so many.
            seed: Of the shuffling.

        Raises:
            ValueError: The share is out of range.
        """
        if not 0 <= empty_share < 1:
            raise ValueError(f"tiles: empty_share {empty_share}")
        full = np.flatnonzero(~self.empty if self.unclear is None else ~self.empty & ~self.unclear)
        bare = np.flatnonzero(self.empty)
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
        empty = np.array([not len(t.sample.crowd) for t in tiles], np.bool_)
        unclear = np.array([bool(t.sample.crowd.all()) for t in tiles], np.bool_) & ~empty
        out[split] = TileIndex(tiles, np.array(parents, np.int64), empty, tile, unclear)
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
