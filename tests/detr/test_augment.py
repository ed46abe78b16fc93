"""Boxes follow their pixels, whatever is drawn."""

import cv2
import numpy as np
import pytest
import torch

from lit_cli.errors import InputError
from lit_detr.augment import Boxes, DetectionAugmentation, WorkerAugmentation, augment_batch

SIZE = (48, 64)
PLAIN = {"flip_h": 0.0, "scale_p": 0.0, "shift": 0.0, "colour_p": 0.0}


def scenes(count: int, seed: int = 0) -> tuple[torch.Tensor, list[Boxes]]:
    """Black images with filled rectangles that do not touch, each of a grey value of its own."""
    rng = np.random.default_rng(seed)
    images, boxes = np.zeros((count, 1, *SIZE), np.float32), []
    for i in range(count):
        found = []
        for n, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)][: rng.integers(5)]):
            w, h = rng.integers(5, 14, 2)
            x, y = column * 32 + rng.integers(2, 32 - w - 1), row * 24 + rng.integers(2, 24 - h - 1)
            images[i, 0, y : y + h, x : x + w] = (i * 4 + n + 1) / (4 * count + 1)
            found.append((x, y, x + w, y + h))
        values = [i * 4 + n for n in range(len(found))]
        boxes.append(Boxes(np.array(found, np.float32).reshape(-1, 4), np.array(values, np.int64)))
    return torch.from_numpy(images), boxes


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"flip_v": 0.5, "scale": (0.5, 2.5), "shift": 0.3},
        {"mosaic_p": 1.0, "mosaic_scale": (0.6, 1.3)},
        {"mosaic_p": 0.5, "paste_p": 1.0, "flip_v": 0.5},
        {"paste_p": 1.0, "paste_margin": 0.0, **PLAIN},
    ],
)
def test_a_box_holds_the_pixels_of_its_object(options):
    settings = DetectionAugmentation(**{"colour_p": 0.0, "min_visible": 0.3, **options})
    checked = 0
    for seed in range(12):
        images, boxes = scenes(5, seed)
        new, kept = augment_batch(images, boxes, settings, seed)
        assert new.shape == images.shape
        for image, found in zip(new[:, 0].numpy(), kept, strict=True):
            for box, label in zip(found.boxes, found.labels, strict=True):
                assert (box >= 0).all()
                assert box[2] <= SIZE[1]
                assert box[3] <= SIZE[0]
                # Magnified edges are soft.
                (x0, y0), (x1, y1) = np.ceil(box[:2] + 1.5).astype(int), np.floor(box[2:] - 1.5).astype(int)
                if x1 - x0 < 1 or y1 - y0 < 1:
                    continue
                # A later quadrant or paste covers nothing that has a box, so the inside is the object's grey value.
                np.testing.assert_allclose(image[y0:y1, x0:x1], (label + 1) / 21, atol=1e-5)
                checked += 1
    assert checked > 60


def test_no_object_without_a_box_where_all_of_it_must_be_visible_somewhere():
    """What is left without a box is a rest below `min_visible`, or below `min_side`."""
    options = DetectionAugmentation(colour_p=0.0, min_visible=0.0, min_side=0.0, scale=(0.8, 2.0), flip_v=0.5)
    for seed in range(10):
        images, boxes = scenes(4, seed)
        new, kept = augment_batch(images, boxes, options, seed)
        for image, found in zip(new[:, 0].numpy(), kept, strict=True):
            covered = np.zeros(SIZE, bool)
            for x0, y0, x1, y1 in found.boxes:
                covered[max(0, int(y0 - 1)) : int(y1 + 2), max(0, int(x0 - 1)) : int(x1 + 2)] = True
            assert not image[~covered].any()


def test_pixels_equal_a_warp_by_opencv():
    images, boxes = scenes(3, 1)
    images = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    options = DetectionAugmentation(colour_p=0.0, flip_h=0.0, scale_p=1.0, keep_p=0.0)
    import lit_detr.augment as module

    pieces, _ = module._draw(boxes, SIZE, options, np.random.default_rng((7, 0)), True)
    new, _ = augment_batch(images, boxes, options, 7)
    for image, result, (piece,) in zip(images[:, 0].numpy(), new[:, 0].numpy(), pieces, strict=True):
        (sx, sy), (tx, ty) = piece.scale, piece.shift
        # OpenCV has pixel centres at integers.
        matrix = np.array([[sx, 0, tx + 0.5 * sx - 0.5], [0, sy, ty + 0.5 * sy - 0.5]])
        expected = cv2.warpAffine(image, matrix, SIZE[::-1], flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
        # Its weights have five bits.
        assert np.abs(result - expected).mean() < 0.01


@pytest.mark.parametrize(("share", "kept"), [(0.49, 1), (0.51, 0)])
def test_a_box_of_which_too_little_is_left_is_dropped(share, kept):
    """Half of it lies beyond the left border."""
    import lit_detr.augment as module

    box = Boxes(np.array([[2, 4, 8, 10]], np.float32), np.zeros(1, np.int64))
    piece = module._Piece(0, (0, 0, 64, 48), (1.0, 1.0), (-5.0, 0.0))
    found = module._through(box, piece, DetectionAugmentation(min_visible=share))
    assert found.boxes.tolist() == [[0.0, 4.0, 3.0, 10.0]] * kept
    assert len(module._through(box, piece, DetectionAugmentation(min_visible=0.1, min_side=3.5)).boxes) == 0


def test_crops_keep_an_object():
    images, boxes = scenes(6, 3)
    options = DetectionAugmentation(colour_p=0.0, scale=(2.0, 2.0), scale_p=1.0, keep_p=1.0, shift=0.5)
    for seed in range(10):
        _, kept = augment_batch(images, boxes, options, seed)
        assert all(len(k.boxes) > 0 for k, b in zip(kept, boxes, strict=True) if len(b.boxes))


def test_the_seed_decides_and_the_end_of_a_run_is_plain():
    images, boxes = scenes(4)
    options = DetectionAugmentation(mosaic_p=1.0, paste_p=1.0, plain_from=0.5)
    (a, first), (b, second), (c, _) = (augment_batch(images, boxes, options, s) for s in (3, 3, 4))
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert all((x.boxes == y.boxes).all() for x, y in zip(first, second, strict=True))
    assert not torch.equal(a, c)
    late, plain = (
        augment_batch(images, boxes, o, 3, progress=p)[0]
        for o, p in ((options, 0.5), (DetectionAugmentation(plain_from=0.5), 0.5))
    )
    assert torch.equal(late, plain)
    assert not torch.equal(late, augment_batch(images, boxes, options, 3, progress=0.4)[0])


def test_images_without_objects_and_batches_of_one():
    options = DetectionAugmentation(mosaic_p=1.0, paste_p=1.0)
    none = Boxes(np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    images = torch.full((3, 3, 16, 16), 100, dtype=torch.uint8)
    new, kept = augment_batch(images, [none] * 3, options, 0)
    assert [len(k.boxes) for k in kept] == [0, 0, 0]
    assert kept[0].boxes.shape == (0, 4)
    assert float(new.max()) <= 1
    new, kept = augment_batch(images[:1], [none], options, 0)
    assert new.shape == (1, 3, 16, 16)


def test_nothing_drawn_changes_nothing():
    images, boxes = scenes(2)
    new, kept = augment_batch((images * 255).to(torch.uint8), boxes, DetectionAugmentation(**PLAIN), 0)
    torch.testing.assert_close(new, (images * 255).to(torch.uint8) / 255)
    assert all((k.boxes == b.boxes).all() for k, b in zip(kept, boxes, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip_h": 2}, "flip_h: expected a share"),
        ({"scale": (2.0, 1.0)}, "scale: expected two numbers"),
        ({"noise": -1.0}, "noise: expected 0 or more"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(InputError, match=message) as caught:
        DetectionAugmentation(**options).check()
    assert "\n" not in str(caught.value)


def test_worker_augmentation():
    image = np.random.default_rng(0).integers(0, 90, (24, 32, 3), np.uint8)
    both = WorkerAugmentation(clahe_p=1.0, motion_blur_p=1.0)
    first, second = both(image.copy(), 5), both(image.copy(), 5)
    np.testing.assert_array_equal(first, second)
    assert first.shape == image.shape
    assert first.dtype == np.uint8
    assert not np.array_equal(first, image)
    np.testing.assert_array_equal(WorkerAugmentation()(image, 5), image)
    grey = WorkerAugmentation(clahe_p=1.0, motion_blur_p=1.0)(image[:, :, :1].copy(), 5)
    assert grey.shape == (24, 32, 1)
    with pytest.raises(InputError, match="clahe_p"):
        WorkerAugmentation(clahe_p=2)
    with pytest.raises(InputError, match="blur_limit"):
        WorkerAugmentation(blur_limit=4)
