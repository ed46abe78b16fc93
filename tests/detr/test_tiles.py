from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from numpy.typing import NDArray

from lit_detr.merging import Merged, merge
from lit_detr.samples import DetectionSample, DetectionTable
from lit_detr.tiles import TileIndex, cut, tile_grid, tile_starts, tile_view, tiles_of
from tests.helpers.errors import refused

Size = tuple[int, int]
GEOMETRIES: list[tuple[Size, Size, float]] = [
    ((256, 320), (128, 128), 0.25),
    ((300, 211), (96, 64), 0.4),
    ((97, 500), (128, 128), 0.2),  # lower than a tile
    ((50, 60), (128, 96), 0.2),  # smaller than a tile
    ((128, 129), (128, 128), 0.0),
    ((128, 128), (128, 128), 0.5),
]


def sample(boxes: object, size: Size | None = None, name: str = "a", crowd: object = None) -> DetectionSample:
    array = np.array(boxes, np.float32).reshape(-1, 4)
    return DetectionSample(
        name=name,
        image=Path(f"{name}.png"),
        boxes=array,
        labels=np.arange(len(array), dtype=np.int64) % 3,
        area=((array[:, 2] - array[:, 0]) * (array[:, 3] - array[:, 1])).astype(np.float32),
        crowd=np.zeros(len(array), np.bool_) if crowd is None else np.array(crowd, np.bool_),
        size=size,
        image_id=7,
        group="g",
    )


def random_boxes(rng: np.random.Generator, count: int, size: Size, longest: float) -> NDArray[np.float32]:
    """Anywhere in the image, borders included, at quarters of a pixel, so that sums with the starts are exact."""
    limit = np.array([size[1], size[0]])
    sides = np.minimum(rng.integers(1, int(4 * longest) + 1, (count, 2)) / 4, limit)
    corners = np.round(rng.uniform(-0.2, 1.2, (count, 2)) * limit * 4) / 4  # many pushed to the borders
    corners = np.clip(corners, 0, limit - sides)
    return np.concatenate([corners, corners + sides], axis=1).astype(np.float32)


# ---- Geometry --------------------------------------------------------------------------------------------------------


def test_starts_cover_everything_with_the_overlap() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        size, tile, overlap = int(rng.integers(1, 900)), int(rng.integers(1, 300)), float(rng.uniform(0, 0.95))
        starts = tile_starts(size, tile, overlap)
        assert starts[0] == 0
        if size <= tile:
            assert starts == [0]
            continue
        assert starts[-1] == size - tile
        steps = np.diff(starts)
        assert steps.min() > 0
        assert steps.max() <= max(1, tile - overlap * tile + 1e-6)  # no gap, and no less overlap than asked for
        assert steps.max() - steps.min() <= 1  # evenly
        assert len(starts) == 1 + -(-(size - tile) // max(1, int(tile * (1 - overlap) + 1e-6)))  # and no more than that
    with pytest.raises(ValueError, match="overlap 1"):
        tile_starts(10, 5, 1.0)
    with pytest.raises(ValueError, match="size 0"):
        tile_starts(0, 5, 0.5)


@pytest.mark.parametrize(("size", "tile", "overlap"), GEOMETRIES)
def test_every_pixel_is_in_a_tile(size: Size, tile: Size, overlap: float) -> None:
    seen = np.zeros(size, np.int64)
    for y, x in tile_grid(size, tile, overlap):
        seen[y : y + tile[0], x : x + tile[1]] += 1
    assert seen.min() >= 1


# ---- Boxes -----------------------------------------------------------------------------------------------------------


def slow_tiles(boxes: NDArray[np.float32], size: Size, tile: Size, overlap: float, least: float) -> dict:
    """(tile, box) -> (clipped box, whether it counts), by loops."""
    found = {}
    starts = tile_grid(size, tile, overlap).tolist()
    for b, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        shares = []
        for y, x in starts:
            w = max(0.0, min(x2, x + tile[1]) - max(x1, x))
            h = max(0.0, min(y2, y + tile[0]) - max(y1, y))
            shares.append(w * h / ((x2 - x1) * (y2 - y1)))
        centre = (x1 + x2) / 2, (y1 + y2) / 2
        holding = [
            i for i, (y, x) in enumerate(starts) if x <= centre[0] < x + tile[1] and y <= centre[1] < y + tile[0]
        ]
        home = max(holding, key=lambda i: (shares[i], -i))
        for i, (y, x) in enumerate(starts):
            if shares[i] > 0:
                inside = max(x1, x) - x, max(y1, y) - y, min(x2, x + tile[1]) - x, min(y2, y + tile[0]) - y
                found[i, b] = inside, shares[i] >= least or i == home, shares[i]
    return found


@pytest.mark.parametrize(("size", "tile", "overlap"), GEOMETRIES)
@pytest.mark.parametrize("least", [0.0, 0.5, 1.0])
def test_boxes_in_tiles_equal_a_loop(size: Size, tile: Size, overlap: float, least: float) -> None:
    boxes = random_boxes(np.random.default_rng(1), 60, size, 90)
    expected = slow_tiles(boxes, size, tile, overlap, least)
    whole = sample(boxes, size)
    for pieces in ("crowd", "drop"):
        tiles = tiles_of(whole, size, tile, overlap, min_visible=least, pieces=pieces)
        for i, (part, start) in enumerate(tiles):
            assert part.name == f"a@{start[0]}_{start[1]}"
            assert (part.size, part.image, part.group) == (size, whole.image, "g")
            rows = [b for b in range(len(boxes)) if (i, b) in expected and (pieces == "crowd" or expected[i, b][1])]
            np.testing.assert_array_equal(part.boxes, np.array([expected[i, b][0] for b in rows]).reshape(-1, 4))
            np.testing.assert_array_equal(part.labels, whole.labels[rows])
            np.testing.assert_array_equal(part.crowd, [not expected[i, b][1] for b in rows])
            np.testing.assert_allclose(part.area, [whole.area[b] * expected[i, b][2] for b in rows], rtol=1e-6)


@pytest.mark.parametrize(("size", "tile", "overlap"), GEOMETRIES)
def test_no_object_is_lost_and_small_ones_are_whole_somewhere(size: Size, tile: Size, overlap: float) -> None:
    boxes = random_boxes(np.random.default_rng(2), 300, size, 200)
    marked = sample(boxes, size)
    marked = DetectionSample(**{**vars(marked), "labels": np.arange(len(boxes))})
    tiles = tiles_of(marked, size, tile, overlap, min_visible=1.0, pieces="drop")
    found = {int(label) for part, _ in tiles for label in part.labels}
    assert found == set(range(len(boxes)))
    back = [
        (part.boxes + np.tile(start[::-1], 2)).astype(np.float32)[part.labels == b]
        for b in range(len(boxes))
        for part, start in tiles
    ]
    whole = {
        b for b, p in zip(np.repeat(range(len(boxes)), len(tiles)), back, strict=True) if (p == boxes[b]).all(1).any()
    }
    shared = [int(overlap * t) if s > t else s for s, t in zip(size, tile, strict=True)]
    small = {b for b, (x1, y1, x2, y2) in enumerate(boxes) if y2 - y1 <= shared[0] and x2 - x1 <= shared[1]}
    assert small <= whole
    assert 0 in [len(part.boxes) for part, _ in tiles_of(sample([[0, 0, 2, 2]]), (400, 400), tile, overlap)]


def test_crowd_stays_crowd_and_pieces_of_it_stay() -> None:
    whole = sample([[0, 0, 200, 100], [90, 40, 110, 60]], (100, 200), crowd=[True, False])
    for pieces in ("crowd", "drop"):
        parts = [t.sample for t in tiles_of(whole, (100, 200), (100, 105), 0.0, min_visible=0.6, pieces=pieces)]
        assert [p.crowd.tolist() for p in parts] == ([[True, False], [True, False]])
        assert all(p.boxes[0].tolist() == [0, 0, 105, 100] for p in parts)


# ---- The view --------------------------------------------------------------------------------------------------------


def table(count: int = 6) -> DetectionTable:
    corner = [[2, 2, 8, 8]]
    samples = [sample(corner if i % 2 else [], (100, 200), f"train/{i}") for i in range(count)]
    return DetectionTable({"train": samples, "val": [sample(corner, (30, 40), "val/0")]}, ["a", "b", "c"], [1, 2, 3])


def test_the_view_numbers_its_tiles() -> None:
    view = tile_view(table(), (50, 50), 0.0)
    train = view["train"]
    assert len(train) == 6 * 8
    assert train.parents.tolist() == [i for i in range(6) for _ in range(8)]
    assert [t.sample.image_id for t in train.tiles] == list(range(48))
    assert len({t.sample.name for t in train.tiles}) == 48
    assert np.flatnonzero(~train.empty).tolist() == [8, 24, 40]
    assert train.tiles[9].start == (0, 50)
    assert train.shape == (50, 50)
    assert len(view["val"]) == 1
    unknown = DetectionTable({"train": [sample([], None)]}, ["a"])
    refused(lambda: tile_view(unknown, (50, 50), 0.0), "a.png", "size")
    assert len(tile_view(unknown, (50, 50), 0.0, sizes={"a": (100, 100)})["train"]) == 4
    only_crowd = DetectionTable({"train": [sample([[0, 0, 5, 5]], (50, 50), crowd=[True])]}, ["a"])
    unclear = tile_view(only_crowd, (50, 50), 0.0)["train"]
    assert unclear.empty.tolist() == [False]
    assert unclear.unclear is not None
    assert unclear.unclear.tolist() == [True]
    assert len(unclear.epoch(0)) == 0  # neither an example nor background


def index(full: int, bare: int) -> TileIndex:
    empty = np.random.default_rng(3).permutation([False] * full + [True] * bare)
    return TileIndex([], np.arange(full + bare), empty, (1, 1))


def test_empty_tiles_come_in_their_share_and_in_turns() -> None:
    tiles = index(60, 100)
    for share in (0.0, 0.2, 0.5):
        chosen = tiles.epoch(0, empty_share=share)
        assert tiles.empty[chosen].mean() == pytest.approx(share)
        assert set(np.flatnonzero(~tiles.empty)) <= set(chosen)
        assert len(set(chosen)) == len(chosen)
    epochs = [tiles.epoch(e, empty_share=0.4) for e in range(5)]  # 40 of 100 each: two and a half, then again
    drawn = np.concatenate([c[tiles.empty[c]] for c in epochs])
    assert np.bincount(drawn, minlength=160)[tiles.empty].tolist() == [2] * 100
    np.testing.assert_array_equal(tiles.epoch(3, empty_share=0.4), epochs[3])  # a resumed run
    assert set(tiles.epoch(0, empty_share=0.4, seed=1)) != set(epochs[0])
    assert set(epochs[1]) != set(epochs[0])
    assert tiles.empty[tiles.epoch(0, empty_share=0.9)].sum() == 100  # no more than there are
    assert len(index(0, 5).epoch(2)) == 5
    assert len(index(5, 0).epoch(2)) == 5
    with pytest.raises(ValueError, match="empty_share 1"):
        tiles.epoch(0, empty_share=1.0)


# ---- Inference -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "tile", "overlap"), GEOMETRIES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_cut_equals_slices(size: Size, tile: Size, overlap: float, dtype: torch.dtype) -> None:
    images = torch.randint(1, 255, (2, 3, *size)).to(dtype)
    starts = torch.from_numpy(tile_grid(size, tile, overlap))
    expected = torch.zeros(2, len(starts), 3, *tile, dtype=dtype)
    for b, (i, (y, x)) in itertools.product(range(2), enumerate(starts.tolist())):
        part = images[b, :, y : y + tile[0], x : x + tile[1]]
        expected[b, i, :, : part.shape[1], : part.shape[2]] = part
    torch.testing.assert_close(cut(images, starts, tile), expected.flatten(0, 1), rtol=0, atol=0)
    torch.testing.assert_close(cut(images[1], starts, tile), expected[1], rtol=0, atol=0)
    assert cut(images, starts, tile).is_contiguous()


def apart(rng: np.random.Generator, size: Size, longest: float) -> NDArray[np.float32]:
    """Objects that do not touch: one in each cell of a grid, those of the outer cells partly at the image's border."""
    cell = int(longest) + 3
    cells = [(x, y) for y in range(0, size[0] - cell + 1, cell) for x in range(0, size[1] - cell + 1, cell)]
    sides = np.maximum(np.round(rng.uniform(0.05, 1, (len(cells), 2)) * longest * 4) / 4, 1)
    room = np.round(rng.uniform(0, 1, sides.shape) * (cell - 1 - sides) * 4) / 4
    corners = np.array(cells) + room * (rng.random(sides.shape) < 0.7)
    boxes = np.concatenate([corners, corners + sides], 1)
    if rng.random() < 0.5:  # the grid begins at the far corner
        boxes = np.tile([size[1], size[0]], 2) - boxes[:, [2, 3, 0, 1]]
    return boxes.astype(np.float32)


@pytest.mark.parametrize(("size", "tile", "overlap"), [g for g in GEOMETRIES if g[2]])  # at a bare seam none is whole
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["iou", "ios", "mixed"])
def test_objects_come_back_exactly(size: Size, tile: Size, overlap: float, kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shared = min(int(overlap * t) if s > t else min(s, t) - 4 for s, t in zip(size, tile, strict=True))
    boxes = apart(rng, size, min(shared, 40))
    assert len(boxes) >= 1
    whole = sample(boxes, size)
    tiles = tiles_of(whole, size, tile, overlap, min_visible=0.1, pieces="drop")
    most = max(len(t.sample.boxes) for t in tiles) + 3
    found, scores = torch.rand(len(tiles), most, 4), torch.zeros(len(tiles), most)  # rows of no score are junk
    labels = torch.zeros(len(tiles), most, dtype=torch.int64)
    for i, (part, _) in enumerate(tiles):
        n = len(part.boxes)
        found[i, :n], labels[i, :n] = torch.from_numpy(part.boxes), torch.from_numpy(part.labels)
        scores[i, :n] = torch.from_numpy(rng.uniform(0.6, 1, n).astype(np.float32))  # a piece may be surer
    starts = torch.tensor([t.start for t in tiles])
    out = merge(found, scores, labels, starts, tile, size, overlap=kind)  # type: ignore[arg-type]
    assert sorted(out.boxes.tolist()) == sorted(boxes.tolist())
    assert (out.scores.diff() <= 0).all()
    by_box = {tuple(b): int(label) for b, label in zip(boxes.tolist(), whole.labels, strict=True)}
    assert all(by_box[tuple(b)] == c for b, c in zip(out.boxes.tolist(), out.labels.tolist(), strict=True))


def slow_merge(
    boxes, scores, labels, starts, tile, size, overlap, threshold, border, trust, within
) -> list[list[float]]:
    """The documented rules, one detection after the other."""
    found = []
    for t, (y, x) in enumerate(starts.tolist()):
        for q in range(boxes.shape[1]):
            x1, y1, x2, y2 = boxes[t, q].tolist()
            ends = border >= 0 and (
                (x1 <= border and x > 0)
                or (y1 <= border and y > 0)
                or (x2 >= tile[1] - border and x + tile[1] < size[1])
                or (y2 >= tile[0] - border and y + tile[0] < size[0])
            )
            box = [
                min(max(v + o, 0), s)
                for v, o, s in zip((x1, y1, x2, y2), (x, y, x, y), (size[1], size[0]) * 2, strict=True)
            ]
            area = max(box[2] - box[0], 0) * max(box[3] - box[1], 0)
            if area > 0 and scores[t, q] > 0:
                found.append((float(scores[t, q]), area, box, int(labels[t, q]), t, ends))

    def shared(a, b) -> float:
        w = min(a[2][2], b[2][2]) - max(a[2][0], b[2][0])
        h = min(a[2][3], b[2][3]) - max(a[2][1], b[2][1])
        return max(w, 0) * max(h, 0)

    def gives_way(a) -> bool:
        return a[5] and any(
            b[3] == a[3] and b[4] != a[4] and not b[5] and b[0] >= trust * a[0] and shared(a, b) >= threshold * a[1]
            for b in found
        )

    left = sorted((d for d in found if not gives_way(d)), key=lambda d: (-d[0], -d[1]))
    kept: list = []
    for d in left:
        for k in kept:
            if k[3] != d[3] or (k[4] == d[4] and not within):
                continue
            small = overlap == "ios" or (overlap == "mixed" and (k[5] or d[5]))
            base = min(k[1], d[1]) if small else k[1] + d[1] - shared(k, d)
            if shared(k, d) > threshold * base:
                break
        else:
            kept.append(d)
    return [[*d[2], d[0], d[3]] for d in kept]


@pytest.mark.parametrize("kind", ["iou", "ios", "mixed"])
@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("border", [-1.0, 2.0])
def test_merge_equals_a_loop(kind: str, within: bool, border: float) -> None:
    size, tile = (120, 150), (64, 56)
    starts = torch.from_numpy(tile_grid(size, tile, 0.4))
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        count = 12
        corner = torch.randint(-8, 60, (len(starts), count, 2), generator=g)
        boxes = torch.cat([corner, corner + torch.randint(0, 40, (len(starts), count, 2), generator=g)], -1).float()
        scores = torch.randperm(len(starts) * count, generator=g).view(len(starts), count) / 1000
        labels = torch.randint(0, 2, (len(starts), count), generator=g)
        given = (boxes, scores, labels, starts, tile, size)
        out = merge(*given, overlap=kind, threshold=0.3, border=border, trust=0.7, within=within)  # type: ignore[arg-type]
        rows = torch.cat([out.boxes, out.scores[:, None], out.labels[:, None]], 1)
        expected = torch.tensor(slow_merge(*given, kind, 0.3, border, 0.7, within))
        torch.testing.assert_close(rows, expected, rtol=0, atol=1e-6)
        assert 0 < len(rows) < scores.numel()


def test_merge_of_one_tile_equals_torchvision() -> None:
    g = torch.Generator().manual_seed(0)
    corner = torch.rand(1, 300, 2, generator=g) * 80
    boxes = torch.cat([corner, corner + 5 + torch.rand(1, 300, 2, generator=g) * 15], -1)
    scores, labels = torch.rand(1, 300, generator=g), torch.randint(0, 3, (1, 300), generator=g)
    out = merge(boxes, scores, labels, torch.zeros(1, 2, dtype=torch.int64), (100, 100), (100, 100), within=True)
    keep = torchvision.ops.batched_nms(boxes[0], scores[0], labels[0], 0.5)
    torch.testing.assert_close(out, Merged(boxes[0, keep], scores[0, keep], labels[0, keep]), rtol=0, atol=0)
    free = merge(boxes, scores, labels, torch.zeros(1, 2, dtype=torch.int64), (100, 100), (100, 100))
    assert len(free.boxes) == 300  # a set predictor's own detections stay


def test_merge_prefers_the_whole_unless_it_is_doubtful() -> None:
    starts = torch.tensor([[0, 0], [0, 60]])
    boxes = torch.tensor([[[80.0, 10, 100, 20]], [[20.0, 10, 50, 20]]])  # 80..100 of an object at 80..110

    def merged(piece: float, whole: float, **more: object) -> list[list[float]]:
        scores = torch.tensor([[piece], [whole]])
        label = torch.zeros(2, 1, dtype=torch.int64)
        return merge(boxes, scores, label, starts, (100, 100), (100, 160), **more).boxes.tolist()  # type: ignore[arg-type]

    assert merged(0.9, 0.6) == [[80, 10, 110, 20]]
    assert merged(0.9, 0.1) == [[80, 10, 100, 20]]
    assert merged(0.9, 0.6, border=-1.0) == [[80, 10, 100, 20]]  # IoU 2/3, by score alone
    assert merged(0.9, 0.6, min_score=0.7) == [[80, 10, 100, 20]]
    assert merged(0.9, 0.6, limit=1) == [[80, 10, 100, 20]]


def test_merge_of_nothing_of_padding_and_in_half_precision() -> None:
    starts = torch.zeros(1, 2, dtype=torch.int64)
    none = merge(torch.zeros(1, 0, 4), torch.zeros(1, 0), torch.zeros(1, 0).long(), starts, (9, 9), (9, 9))
    assert [tuple(t.shape) for t in none] == [(0, 4), (0,), (0,)]
    boxes = torch.tensor([[[1.0, 1, 4, 4], [1, 6, 4, 8], [1, 3, 4, 8]]])  # the image ends at row 5
    out = merge(boxes.bfloat16(), torch.ones(1, 3).bfloat16(), torch.arange(3)[None], starts, (9, 9), (5, 9))
    assert out.boxes.tolist() == [[1, 1, 4, 4], [1, 3, 4, 5]]
    assert out.boxes.dtype == out.scores.dtype == torch.float32
