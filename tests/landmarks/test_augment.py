"""Images and landmarks must move together: blobs drawn at the landmarks are found again where the points went."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lit_landmarks.augment import AlbumentationsAugment, Augmentation, augment_batch
from lit_landmarks.geometry import transform_points
from tests.landmarks.test_geometry import blobs, centroids

OFF = Augmentation(rotation=0, scale=0, shift=0, brightness=0, contrast=0, gamma=0, noise=0)
SIZE = (112, 128)
POINTS = np.array([[48.3, 40.6], [80.7, 45.2], [64.1, 70.4]])  # far enough inside for everything drawn here
STRONG = {"rotation": 25.0, "scale": 0.15, "shift": 0.04}


def batch(count=6, sigma=3.0):
    """(B, K, H, W) images whose channel k shows landmark k, and (B, K, 2) points."""
    shift = np.random.default_rng(0).uniform(-3, 3, (count, 1, 2))
    points = POINTS + shift
    images = np.stack([blobs(p, SIZE, sigma) for p in points])
    return torch.from_numpy(images), torch.from_numpy(points).float()


def flat_images(count=4, value=128, channels=1):
    """A bright rectangle with black padding left and right."""
    images = torch.zeros(count, channels, 64, 96, dtype=torch.uint8)
    images[..., 16:80] = value
    return images, torch.full((count, 1, 2), 30.0)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"rotation": 25.0}, id="rotation"),
        pytest.param({"scale": 0.15}, id="scale"),
        pytest.param({"shift": 0.08}, id="shift"),
        pytest.param(STRONG, id="affine"),
        pytest.param({"elastic": 0.01}, id="elastic"),
        pytest.param({**STRONG, "elastic": 0.01}, id="affine and elastic"),
        pytest.param({"flip": 0.5}, id="flip"),
        pytest.param({**STRONG, "elastic": 0.01, "flip": 0.5}, id="everything"),
    ],
)
def test_image_and_points_stay_together(changes):
    elastic = "elastic" in changes
    images, points = batch(sigma=1.2 if elastic else 3.0)  # a bent wide blob has its centroid elsewhere
    moved_far = 0.0
    for seed in range(4):
        out = augment_batch(images, points, replace(OFF, **changes), seed, [])
        assert out.image.dtype == torch.float32
        found = centroids(out.image)
        np.testing.assert_allclose(found, out.points.numpy(), atol=0.15 if elastic else 0.06)
        moved_far = max(moved_far, float((out.points - points).abs().max()))
    assert moved_far > 2  # or nothing was tested


def test_nothing_on_changes_nothing():
    images, points = batch()
    out = augment_batch(images, points, OFF, 0)
    torch.testing.assert_close(out.image, images.float() / 255, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.points, points)
    torch.testing.assert_close(out.matrix, torch.eye(3).expand(6, 3, 3))


def test_the_matrix_maps_old_points_to_new_ones():
    images, points = batch()
    out = augment_batch(images, points, replace(OFF, **STRONG, flip=0.5), 3, [])
    torch.testing.assert_close(transform_points(out.matrix, points), out.points)
    assert {bool(d < 0) for d in torch.det(out.matrix)} == {True, False}  # some are mirrored


def test_a_flip_swaps_pairs():
    images, points = batch(8)
    spec = replace(OFF, flip=0.5)
    out, unpaired = augment_batch(images, points, spec, 1, [[0, 1]]), augment_batch(images, points, spec, 1, [])
    flipped = torch.det(out.matrix) < 0
    assert 0 < flipped.sum() < 8
    width = SIZE[1]
    for i in range(8):
        x, y = points[i].T
        if flipped[i]:
            expected = torch.stack((width - 1 - x, y), -1)[[1, 0, 2]]
            torch.testing.assert_close(out.image[i], images[i].flip(-1) / 255, rtol=0, atol=1e-5)
        else:
            expected = points[i]
        torch.testing.assert_close(out.points[i], expected)
    torch.testing.assert_close(unpaired.points[flipped], out.points[flipped][:, [1, 0, 2]])


@pytest.mark.parametrize("changes", [{}, {"elastic": 0.01, "cutout": 2, "flip": 0.5}], ids=["default", "everything"])
def test_all_follows_from_the_seed(changes):
    images, points = batch()
    spec = Augmentation(**changes)
    a, b, other = (augment_batch(images, points, spec, seed, []) for seed in (7, 7, 8))
    for one, same, different in zip(a, b, other, strict=True):
        torch.testing.assert_close(one, same, rtol=0, atol=0)
        assert not torch.equal(one, different)


def test_the_global_generators_are_left_alone():
    images, points = batch(2)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - it is the global one that is looked at
    expected = torch.rand(3), np.random.rand(3)  # noqa: NPY002
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    augment_batch(images, points, Augmentation(elastic=0.01, cutout=1), 3)
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])  # noqa: NPY002


def test_images_of_a_batch_differ():
    images, points = (t[:1].expand(6, *t.shape[1:]) for t in batch(1))
    out = augment_batch(images, points, Augmentation(), 0)
    for i in range(5):
        assert (out.points[i] - out.points[i + 1]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["gamma", "contrast", "brightness"])
def test_grey_values_change_and_padding_stays_black(name):
    images, points = flat_images()
    out = augment_batch(images, points, replace(OFF, **{name: 0.4}), 5)
    assert not out.image[..., :15].any()
    assert not out.image[..., 81:].any()
    inside = out.image[:, 0, 32, 48]
    assert inside.std() > 0.02
    assert not torch.equal(inside, torch.full((4,), 128 / 255))
    torch.testing.assert_close(out.points, points)


def test_grey_values_follow_the_documented_ranges():
    images, points = flat_images(64)
    value = 128 / 255
    gamma = augment_batch(images, points, replace(OFF, gamma=0.5), 0).image[:, 0, 32, 48]
    assert value ** (2**0.5) - 1e-5 <= gamma.min()
    assert gamma.max() <= value ** (2**-0.5) + 1e-5
    assert gamma.min() < value ** (2**0.4)
    assert gamma.max() > value ** (2**-0.4)
    brightness = augment_batch(images, points, replace(OFF, brightness=0.2), 0).image[:, 0, 32, 48] - value
    assert brightness.abs().max() <= 0.2 + 1e-5
    assert brightness.max() > 0.15
    assert brightness.min() < -0.15


def test_noise_stays_below_its_largest_deviation():
    images = torch.full((32, 1, 64, 64), 128, dtype=torch.uint8)
    out = augment_batch(images, torch.zeros(32, 1, 2), replace(OFF, noise=0.05), 2)
    deviation = (out.image - 128 / 255).flatten(1).std(1)
    assert deviation.max() < 0.05 * 1.05
    assert deviation.max() > 0.035
    assert deviation.min() < 0.02
    assert out.image.min() >= 0
    assert out.image.max() <= 1
    assert (out.image - 128 / 255).mean().abs() < 1e-3


def test_cutout_sets_so_many_rectangles_of_at_most_that_size():
    images = torch.full((16, 1, 80, 80), 255, dtype=torch.uint8)
    out = augment_batch(images, torch.full((16, 1, 2), 40.0), replace(OFF, cutout=1, cutout_size=0.3), 4)
    holes = out.image[:, 0] == 0
    assert (out.image[:, 0][~holes] > 0.99).all()
    sides = [(int(h.any(0).sum()), int(h.any(1).sum())) for h in holes]
    assert all(int(h.sum()) == w * t for h, (w, t) in zip(holes, sides, strict=True))  # a full rectangle
    assert 15 < max(max(s) for s in sides) <= 0.3 * 80 + 1
    several = augment_batch(images, torch.full((16, 1, 2), 40.0), replace(OFF, cutout=4, cutout_size=0.3), 4)
    assert (several.image == 0).sum() > 2 * holes.sum()


def test_missing_landmarks_stay_missing_and_disturb_nobody():
    images, points = batch()
    spec = replace(OFF, **STRONG, elastic=0.01, flip=0.5)
    whole = augment_batch(images, points, spec, 3, [[0, 1]])
    holed = points.clone()
    holed[:, 2] = torch.nan
    out = augment_batch(images, holed, spec, 3, [[0, 1]])
    assert torch.isnan(out.points[:, 2]).all()
    torch.testing.assert_close(out.points[:, :2], whole.points[:, :2])
    torch.testing.assert_close(out.image, whole.image)


def test_probability_decides_which_images_are_moved():
    images, points = batch(40)
    out = augment_batch(images, points, replace(OFF, rotation=20.0, probability=0.5), 0)
    still = (out.points - points).abs().amax((1, 2)) < 1e-4
    assert 8 < still.sum() < 32
    torch.testing.assert_close(augment_batch(images, points, replace(OFF, **STRONG, probability=0.0), 0).points, points)


@pytest.mark.parametrize("changes", [{"elastic": 0.012}, {**STRONG, "elastic": 0.012, "flip": 0.5}])
def test_elastic_points_are_where_their_pixel_went(changes):
    """An image of its own coordinates tells where each pixel was read; bilinear sampling is exact on it."""
    _, points = batch(16)
    rows, columns = torch.meshgrid(torch.arange(SIZE[0]), torch.arange(SIZE[1]), indexing="ij")
    ramps = torch.stack((columns, rows)).to(torch.uint8).expand(16, 2, *SIZE)
    out = augment_batch(ramps, points, replace(OFF, **changes), 0, [])
    read = out.image * 255
    compared = 0
    for i in range(16):
        for (x, y), before in zip(out.points[i].tolist(), points[i], strict=True):
            if not (2 < x < SIZE[1] - 3 and 2 < y < SIZE[0] - 3):
                continue
            left, top = int(x), int(y)
            u, v = x - left, y - top
            patch = read[i, :, top : top + 2, left : left + 2]
            at = (1 - v) * ((1 - u) * patch[:, 0, 0] + u * patch[:, 0, 1])
            at += v * ((1 - u) * patch[:, 1, 0] + u * patch[:, 1, 1])
            torch.testing.assert_close(at, before, rtol=0, atol=0.02)
            compared += 1
    assert compared > 30


@pytest.mark.parametrize(
    ("changes", "pairs", "message"),
    [
        *(
            ({name: -0.1}, None, f"augment.{name}: expected 0 or more")
            for name in ("rotation", "scale", "shift", "brightness", "contrast", "gamma", "noise", "elastic")
        ),
        ({"scale": 0.95}, None, "augment.scale: expected 0 to 0.9"),
        ({"flip": 1.5}, [], "augment.flip: expected 0 to 1"),
        ({"probability": -0.1}, None, "augment.probability: expected 0 to 1"),
        ({"cutout_size": 1.1}, None, "augment.cutout_size: expected 0 to 1"),
        ({"elastic": 0.013}, None, "augment.elastic"),
        ({"flip": 0.5}, None, "augment.flip needs data.flip_pairs"),
        ({"flip": 0.5}, [[0, 9]], "flip_pairs: expected pairs of indices from 0 to 2"),
        ({}, [[0, 9]], "flip_pairs: expected pairs of indices from 0 to 2"),
        ({"cutout": -1}, None, "augment.cutout"),
        ({"elastic": 0.02, "elastic_grid": 1}, None, "augment.elastic_grid"),
        ({"elastic": 0.05}, None, "augment.elastic"),  # three of five images would fold over
        ({"elastic": 0.02, "elastic_grid": 20}, None, "augment.elastic"),
    ],
)
def test_senseless_values_are_named(changes, pairs, message):
    with pytest.raises(ValueError, match=message) as error:
        Augmentation(**changes).check(3, pairs)
    assert "\n" not in str(error.value)


def test_sensible_values_pass():
    Augmentation().check(3, None)
    Augmentation(flip=1.0, scale=0.9, elastic=0.012, cutout=3).check(3, [[0, 2]])


# ---- albumentations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        pytest.param({"rotation": 25.0}, 0.06, id="rotation"),
        pytest.param({"scale": 0.15}, 0.06, id="scale"),
        pytest.param({"shift": 0.08}, 0.06, id="shift"),
        pytest.param(STRONG, 0.06, id="affine"),
        pytest.param({**STRONG, "flip": 0.5}, 0.06, id="flip"),
    ],
)
def test_albumentations_keeps_image_and_points_together(changes, tolerance):
    images, points = batch()
    transform = AlbumentationsAugment(replace(OFF, **changes), [])
    moved_far, differences = 0.0, []
    for seed, (image, where) in enumerate(zip(images.numpy(), points.numpy(), strict=True)):
        new_image, moved = transform(image, where, seed)
        assert new_image.dtype == np.uint8
        assert new_image.shape == image.shape
        differences.append(moved - centroids(new_image))
        moved_far = max(moved_far, np.abs(moved - where).max())
    assert np.abs(differences).max() < tolerance, np.round(differences, 3)
    assert moved_far > 1


def test_albumentations_scales_both_axes_alike():
    """As the batched augmentation does: a squashed head is no head."""
    images, points = batch(1)
    transform = AlbumentationsAugment(replace(OFF, scale=0.15), [])
    for seed in range(6):
        _, moved = transform(images[0].numpy(), points[0].numpy(), seed)
        factor = np.ptp(moved, axis=0) / np.ptp(points[0].numpy(), axis=0)
        assert factor[0] == pytest.approx(factor[1], abs=1e-3)


def test_albumentations_follows_the_seed():
    images, points = batch(1)
    spec = Augmentation(cutout=1, flip=0.5)
    transform = AlbumentationsAugment(spec, [[0, 1]])
    image, where = images[0].numpy(), points[0].numpy()
    a = transform(image, where, 11)
    other = transform(image, where, 12)
    fresh = AlbumentationsAugment(spec, [[0, 1]])(image, where, 11)  # another worker
    for one, same, different in zip(a, fresh, other, strict=True):
        np.testing.assert_array_equal(one, same)
        assert not np.array_equal(one, different)


def test_albumentations_takes_missing_and_outside_points():
    images, points = batch(1)
    where = points[0].numpy().copy()
    where[1] = np.nan
    where[2] = (-20.0, 400.0)
    spec = Augmentation(cutout=3, cutout_size=0.8, flip=1.0)
    _, moved = AlbumentationsAugment(spec, [[0, 2]])(images[0].numpy(), where, 5)
    assert np.isnan(moved[1]).all()
    assert np.isfinite(moved[[0, 2]]).all()
    assert np.linalg.norm(moved[0] - moved[2]) > 100  # no point stands in for another
    _, none = AlbumentationsAugment(spec, [])(images[0].numpy(), np.full((3, 2), np.nan, np.float32), 5)
    assert np.isnan(none).all()


def test_albumentations_flip_swaps_pairs():
    images, points = batch(1)
    image, where = images[0].numpy(), points[0].numpy()
    new_image, moved = AlbumentationsAugment(replace(OFF, flip=1.0), [[0, 1]])(image, where, 0)
    np.testing.assert_array_equal(new_image, image[:, :, ::-1])
    np.testing.assert_allclose(moved, (where * (-1, 1) + (SIZE[1] - 1, 0))[[1, 0, 2]], atol=1e-3)


@pytest.mark.parametrize("channels", [1, 3])
def test_albumentations_keeps_the_number_of_channels(channels):
    image = np.full((channels, 64, 96), 90, np.uint8)
    new_image, _ = AlbumentationsAugment(Augmentation(cutout=1))(image, np.full((2, 2), 30, np.float32), 0)
    assert new_image.shape == image.shape
    assert new_image.dtype == np.uint8
