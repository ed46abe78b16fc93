"""The matrices against drawn blobs and numpy: pixel centres at integers, x first."""

import numpy as np
import pytest
import torch

from lit_landmarks.geometry import Letterbox, flip_permutation, invert_affine, original_points, transform_points


def blobs(points, size, sigma):
    """(K, H, W) uint8, channel k a Gaussian blob at point k: what a measured image of a landmark would be."""
    rows, columns = np.arange(size[0])[:, None], np.arange(size[1])[None]
    maps = [np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * sigma**2)) for x, y in points]
    return np.round(255 * np.stack(maps)).astype(np.uint8)


def centroids(image):
    """(..., 2) centre of mass of each (..., H, W) channel, x first."""
    image = np.asarray(image, np.float64)
    mass = image.sum((-2, -1))
    x = (image * np.arange(image.shape[-1])).sum((-2, -1)) / mass
    y = (image * np.arange(image.shape[-2])[:, None]).sum((-2, -1)) / mass
    return np.stack((x, y), -1)


def random_matrices(count, seed=0):
    matrices = np.zeros((count, 3, 3))
    matrices[:, :2] = np.random.default_rng(seed).normal(size=(count, 2, 3))
    matrices[:, :2, 2] *= 100
    matrices[:, 2, 2] = 1
    return matrices


@pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param((96, 96), (64, 64), id="down"),
        pytest.param((48, 48), (160, 160), id="up"),
        pytest.param((301, 241), (128, 128), id="down, odd"),
        pytest.param((97, 131), (64, 160), id="wide into wide"),
        pytest.param((53, 41), (96, 192), id="up, odd, padded left and right"),
        pytest.param((41, 97), (128, 96), id="no whole factor, padded above and below"),
        pytest.param((64, 64), (64, 64), id="same"),
    ],
)
def test_letterbox_matrix_follows_a_drawn_dot(source, target):
    points = np.array([[0.5, 0.5], [0.31, 0.62], [0.7, 0.35]]) * (source[1] - 1, source[0] - 1) + 0.137
    sigma = max(2.0, min(source) / 20)
    image = blobs(points, source, sigma)
    box = Letterbox(source, target)
    framed = np.concatenate([box.apply(channel[None]) for channel in image])
    assert framed.shape == (3, *target)
    assert framed.dtype == np.uint8
    expected = np.c_[centroids(image), np.ones(3)] @ box.matrix.T
    np.testing.assert_allclose(centroids(framed), expected[:, :2], atol=0.05)


def test_letterbox_keeps_the_shape_and_leaves_black_around():
    box = Letterbox((100, 50), (64, 96))
    framed = box.apply(np.full((3, 100, 50), 200, np.uint8))
    assert box.inner == (64, 32)
    assert (framed[:, :, 32:64] == 200).all()
    assert not framed[:, :, :32].any()
    assert not framed[:, :, 64:].any()


def test_letterbox_keeps_channels_apart():
    image = np.stack([np.full((33, 40), v, np.uint8) for v in (10, 20, 30)])
    framed = Letterbox((33, 40), (64, 64)).apply(image)
    assert [int(c.max()) for c in framed] == [10, 20, 30]


def test_letterbox_of_a_sliver_keeps_one_pixel():
    box = Letterbox((1000, 3), (32, 32))
    assert box.inner == (32, 1)
    assert box.apply(np.full((1, 1000, 3), 9, np.uint8)).max() == 9


def test_invert_affine_is_the_inverse():
    matrices = random_matrices(20)
    found = invert_affine(torch.from_numpy(matrices))
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), np.linalg.inv(matrices), rtol=1e-9, atol=1e-9)


def test_invert_affine_computes_in_float64():
    matrix = torch.from_numpy(Letterbox((2400, 1935), (512, 512)).matrix)[None].float()
    found = invert_affine(matrix)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), np.linalg.inv(matrix.double().numpy()), rtol=1e-12)


def test_transform_points_is_the_loop():
    matrices, points = random_matrices(3), np.random.default_rng(1).normal(size=(3, 5, 2)) * 50
    expected = [[(m @ [x, y, 1])[:2] for x, y in row] for m, row in zip(matrices, points, strict=True)]
    found = transform_points(torch.from_numpy(matrices), torch.from_numpy(points))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    assert transform_points(torch.from_numpy(matrices), torch.from_numpy(points).float()).dtype == torch.float32


def test_transform_points_ignores_autocast():
    matrices, points = torch.from_numpy(random_matrices(2)), torch.rand(2, 4, 2) * 500
    with torch.autocast("cpu", torch.bfloat16):
        found = transform_points(matrices, points)
    torch.testing.assert_close(found, transform_points(matrices, points), rtol=0, atol=0)


def test_missing_points_stay_missing_and_alone():
    points = torch.tensor([[[1.0, 2.0], [torch.nan, torch.nan]]])
    found = transform_points(torch.from_numpy(random_matrices(1)), points)
    assert torch.isfinite(found[0, 0]).all()
    assert torch.isnan(found[0, 1]).all()


def test_original_points_undo_the_letterbox():
    box = Letterbox((301, 241), (128, 128))
    points = np.random.default_rng(0).uniform(0, 240, (1, 7, 2))
    framed = np.einsum("ij,nkj->nki", box.matrix, np.concatenate((points, np.ones((1, 7, 1))), -1))[..., :2]
    found = original_points(torch.from_numpy(framed), torch.from_numpy(box.matrix)[None])
    np.testing.assert_allclose(found.numpy(), points, atol=1e-9)


def test_flip_permutation_swaps_pairs():
    assert flip_permutation(5, [[0, 3], [4, 1]]) == [3, 4, 2, 0, 1]
    assert flip_permutation(3, []) == [0, 1, 2]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([[0, 5]], "from 0 to 4"),
        ([[-1, 2]], "from 0 to 4"),
        ([[0]], "expected pairs"),
        ([[0, 1, 2]], "expected pairs"),
        ([[0, 1], [1, 2]], "appears twice"),
        ([[2, 2]], "twice"),
    ],
)
def test_flip_permutation_refuses(pairs, message):
    with pytest.raises(ValueError, match=message):
        flip_permutation(5, pairs)
