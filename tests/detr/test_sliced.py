"""Sliced inference: what comes out must not depend on how images were cut and batched."""

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lit_detr import merging
from lit_detr.merging import Views, merge, merge_images
from lit_detr.models import build_network
from lit_detr.sliced import Slicing, _scaled, best, detect_sliced
from lit_detr.store import fit_frame
from lit_detr.tiles import tile_grid
from tests.detr.sliced_cases import SIZES, Seer, rectangles
from tests.helpers.errors import refused


def rows(found):
    """Boxes with their labels, in an order of their own."""
    return sorted([*box, label] for box, label in zip(found.boxes.tolist(), found.labels.tolist(), strict=True))


@pytest.mark.parametrize(("tile", "frame"), [(64, None), (64, 128), (32, 64), ([32, 64], None)])
def test_every_object_comes_back_once(tile, frame):
    rng = np.random.default_rng(0)
    small = tile != 64
    drawn = [rectangles(rng, size, longest=10 if small else 14) for size in SIZES]
    network, overlap = Seer(), 0.5 if small else 0.3
    found = detect_sliced(network, [d[0] for d in drawn], tile, overlap=overlap, frame=frame, batch=5, min_score=0.01)
    for (_, boxes, labels), own in zip(drawn, found, strict=True):
        expected = sorted([*box, label] for box, label in zip(boxes.tolist(), labels.tolist(), strict=True))
        np.testing.assert_allclose(np.array(rows(own)).reshape(-1, 5), np.array(expected).reshape(-1, 5), atol=1e-3)
        assert (own.scores.diff() <= 0).all()
    assert set(network.batches[:-1]) == {5}  # tiles of several images fill a batch
    shape = (tile, tile) if isinstance(tile, int) else tuple(tile)
    assert sum(network.batches) == sum(len(tile_grid(size, shape, overlap)) for size in SIZES)


def test_one_more_pass_over_the_whole_image_finds_what_no_tile_holds():
    image = torch.zeros(1, 256, 256, dtype=torch.uint8)
    image[:, 40:200, 20:220] = 240
    image[:, 230:238, 100:108] = 120
    network = Seer()
    tiles = detect_sliced(network, image, 64, min_score=0.01)[0]
    assert [20, 40, 220, 200, 1] not in rows(tiles)
    both = detect_sliced(network, image, 64, whole=True, min_score=0.01)[0]
    assert [20, 40, 220, 200, 1] in rows(both)
    assert [r for r in rows(both) if r[4] == 0] == [[100, 230, 108, 238, 0]]  # seen by both, and best by the tiles


def small_network(channels=1, **options):
    torch.manual_seed(0)
    values = {"backbone": "resnet10t", "hidden": 32, "heads": 4, "feedforward": 64, "decoder_layers": 2}
    values |= {"strides": [8, 16, 32], "queries": 20, "noise_queries": 0, **options}
    return build_network(num_classes=3, in_channels=channels, **values)


@pytest.mark.parametrize("frame", [64, 96, 32])
def test_batches_equal_a_loop_over_tiles(frame):
    """Of a network that was not trained, with masks where an image does not fill its tile."""
    network = small_network(3).eval()
    rng = np.random.default_rng(0)
    tile, overlap, scale = (64, 64), 0.25, frame / 64
    images = [
        cv2.GaussianBlur(rng.integers(0, 255, (*size, 3), np.uint8), (0, 0), 2) for size in ((100, 150), (50, 90))
    ]
    found = detect_sliced(network, [i.transpose(2, 0, 1) for i in images], 64, frame=frame, batch=7)
    for image, own in zip(images, found, strict=True):
        size = image.shape[:2]
        starts, parts = tile_grid(size, tile, overlap), []
        for y, x in starts:
            part = np.ascontiguousarray(image[y : y + 64, x : x + 64])
            pixels = torch.from_numpy(fit_frame(part, (frame, frame), scale)[0])[None].float() / 255
            mask = torch.zeros(1, frame, frame, dtype=torch.bool)
            mask[:, : round(part.shape[0] * scale), : round(part.shape[1] * scale)] = True
            with torch.no_grad():
                output = network(pixels, mask)
            boxes, scores, labels = best(output.logits[-1], output.boxes[-1], 300)
            parts.append((boxes * 64, scores, labels))
        boxes, scores, labels = (torch.cat(values) for values in zip(*parts, strict=True))
        expected = merge(boxes, scores, labels, torch.from_numpy(starts), tile, size)
        # Grey values that two ways round differently move scores by a little, so only what is clear must agree.
        most = min(len(own.boxes), len(expected.boxes))
        assert most > 20
        torch.testing.assert_close(own.scores[:20], expected.scores[:20], rtol=0.02, atol=1e-3)
        if frame == 64:
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", [(30, 40), (32, 32), (20, 61), (90, 100), (64, 128)])
def test_scaling_equals_the_host(size):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (3, 64, 128), np.uint8)
    way = cv2.INTER_AREA if size[0] < 64 else cv2.INTER_LINEAR
    expected = cv2.resize(image.transpose(1, 2, 0), size[::-1], interpolation=way).transpose(2, 0, 1)
    found = _scaled(torch.from_numpy(image)[None], size)[0]
    assert (found - torch.from_numpy(expected).float()).abs().max() <= 1


def test_memory_of_scaling_is_bounded(monkeypatch):
    image = torch.randint(0, 255, (1, 3, 61, 83), dtype=torch.uint8)
    expected = _scaled(image, (20, 30))
    monkeypatch.setattr("lit_detr.sliced.CHUNK", 1000)
    torch.testing.assert_close(_scaled(image, (20, 30)), expected, rtol=0, atol=1)


def test_a_last_batch_is_filled_for_a_compiled_network():
    images = [torch.from_numpy(rectangles(np.random.default_rng(0), size)[0]) for size in SIZES[:3]]
    plain, padded = Seer(), Seer()
    first = Slicing((64, 64), 0.25, (64, 64), batch=8).detect(plain, images, torch.device("cpu"))
    second = Slicing((64, 64), 0.25, (64, 64), batch=8, pad_batches=True).detect(padded, images, torch.device("cpu"))
    assert plain.batches[-1] < 8
    assert set(padded.batches) == {8}
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("pairs", [1, 2000, 10**9])
def test_images_are_merged_together_as_alone(monkeypatch, pairs):
    monkeypatch.setattr(merging, "PAIRS", pairs)
    g = torch.Generator().manual_seed(0)
    tile, sizes = (64, 64), [(64, 64), (120, 150), (64, 200), (50, 60), (120, 64)]
    starts = [torch.from_numpy(tile_grid(size, tile, 0.4)) for size in sizes]
    counts = [len(s) for s in starts]
    corner = torch.randint(-8, 60, (sum(counts), 9, 2), generator=g)
    boxes = torch.cat([corner, corner + torch.randint(0, 40, corner.shape, generator=g)], -1).float()
    scores = torch.rand(boxes.shape[:2], generator=g)
    labels = torch.randint(0, 2, boxes.shape[:2], generator=g)
    extents = torch.tensor(tile).expand(sum(counts), 2)
    views = Views(torch.cat(starts), extents, torch.tensor(sizes).repeat_interleave(torch.tensor(counts), 0))
    together = merge_images(boxes, scores, labels, views, counts, limit=30)
    parts = zip(*(v.split(counts) for v in (boxes, scores, labels)), starts, sizes, strict=True)
    for own, (b, s, k, start, size) in zip(together, parts, strict=True):
        torch.testing.assert_close(own, merge(b, s, k, start, tile, size, limit=30), rtol=0, atol=0)
    assert merge_images(boxes[:0], scores[:0], labels[:0], Views(*(v[:0] for v in views)), []) == []


def test_files_arrays_and_tensors_are_the_same(tmp_path):
    image, boxes, _ = rectangles(np.random.default_rng(0), (100, 130))
    cv2.imwrite(str(tmp_path / "a.png"), image[0])
    network = Seer().train()
    given = [image, torch.from_numpy(image), tmp_path / "a.png", str(tmp_path / "a.png")]
    found = detect_sliced(network, given, 64, channels=1)
    assert network.training
    for own in found:
        torch.testing.assert_close(own, found[0], rtol=0, atol=0)
        torch.testing.assert_close(own, detect_sliced(network, given[0], 64)[0], rtol=0, atol=0)
    assert len(found[0].boxes) >= len(boxes)
    assert detect_sliced(network, [], 64) == []


def test_a_mask_only_where_a_frame_is_not_all_image():
    network = Seer()
    detect_sliced(network, torch.zeros(1, 128, 128, dtype=torch.uint8), 64)
    assert network.masks == [None]
    detect_sliced(network, torch.zeros(1, 40, 128, dtype=torch.uint8), 64)
    assert (network.masks[1].sum((1, 2)) == 40 * 64).all()


def test_refusals(tmp_path):
    image = torch.zeros(1, 64, 64, dtype=torch.uint8)
    refused(lambda: detect_sliced(Seer(), image, 16), "tile: expected 32 pixels or more", "16")
    refused(lambda: detect_sliced(Seer(), image, 64, overlap=0.95), "tile_overlap", "0.95")
    refused(lambda: detect_sliced(Seer(), image, [32, 64], frame=64), "tile: 32 x 64", "64 x 64")
    refused(lambda: detect_sliced(Seer(), image, 64, batch=0), "batch", "0")
    refused(lambda: detect_sliced(Seer(), image.float(), 64), "image: expected (C, H, W) uint8", "float32")
    refused(lambda: detect_sliced(Seer(), image[0], 64), "image: expected (C, H, W) uint8", "(64, 64)")


def test_nothing_is_compared_beyond_the_limit():
    image = torch.from_numpy(rectangles(np.random.default_rng(0), (200, 200))[0])
    every = detect_sliced(Seer(), image, 64, min_score=0.01)[0]
    some = detect_sliced(Seer(), image, 64, min_score=0.01, limit=10)[0]
    assert 0 < len(some.boxes) <= 10 < len(every.boxes)
    one = detect_sliced(Seer(), F.pad(image, (0, 0)), 64, min_score=0.01, most=1)[0]
    assert 0 < len(one.boxes) <= Slicing((64, 64), 0.25, (64, 64)).count((200, 200))
