"""Normalising and resampling against numpy, scipy and known functions."""

import numpy as np
import pytest
import torch

from lit_dsunet.preprocess import (
    Preprocessing,
    native_logits,
    normalise,
    prepare_volume,
    resample_image,
    resample_label,
)
from lit_dsunet.samples import Geometry, Volume


def volume(shape=(12, 16, 10), spacing=(1.0, 1.0, 2.0), channels=1, seed=0):
    rng = np.random.default_rng(seed)
    z, y, x = (np.arange(n) * s for n, s in zip(shape, spacing, strict=True))
    smooth = np.sin(z[:, None, None] / 5) + np.cos(y[None, :, None] / 6) + x[None, None] / 10
    image = np.stack([smooth + c for c in range(channels)]).astype(np.float32)
    label = (rng.random(shape) < 0.1).astype(np.uint8)
    label[4:8, 4:10, 3:6] = 2
    return Volume("a", image, label, Geometry(np.eye(4), shape[::-1], spacing))


def test_z_score_survives_huge_intensities():
    rng = np.random.default_rng(0)
    image = (1.7e6 + rng.normal(0, 3.0, (2, 8, 8, 8))).astype(np.float32)
    out = normalise(image, "zscore")
    expected = (image.astype(np.float64) - image.mean((1, 2, 3), np.float64, keepdims=True)) / image.astype(
        np.float64
    ).std((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_nonzero_leaves_the_background_alone():
    image = np.zeros((1, 4, 4, 4), np.float32)
    image[0, 1:3] = np.random.default_rng(0).normal(100, 10, (2, 4, 4))
    out = normalise(image, "nonzero")
    assert (out[image == 0] == 0).all()
    assert abs(out[image != 0].mean()) < 1e-5
    assert out[image != 0].std() == pytest.approx(1, abs=1e-5)


def test_a_constant_channel_becomes_zero():
    assert (normalise(np.full((1, 3, 3, 3), 7, np.float32), "zscore") == 0).all()


def test_nothing_is_resampled_without_a_spacing():
    case = volume()
    image, label = prepare_volume(case, Preprocessing(None, "none"))
    assert image is case.image
    assert label is case.label


def test_resampling_keeps_a_smooth_function():
    """Voxel centres: voxel i of the new grid lies at (i + 0.5) * ratio - 0.5 of the old one."""
    case = volume((40, 40, 20), (1.0, 1.0, 2.0))
    image, label = prepare_volume(case, Preprocessing((2.0, 1.0, 1.0), "none"))
    assert image.shape == (1, 20, 40, 40)
    assert label.shape == (20, 40, 40)
    z = (np.arange(20) + 0.5) * 2 - 0.5
    x = ((np.arange(40) + 0.5) / 2 - 0.5) * 2
    expected = np.sin(z[:, None, None] / 5) + np.cos(np.arange(40)[None, :, None] / 6) + x[None, None] / 10
    inside = (slice(2, -2), slice(2, -2), slice(4, -4))
    np.testing.assert_allclose(image[0][inside], expected[inside], atol=0.02)


def test_the_coarse_axis_is_not_interpolated():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(1, 4, 20, 20)).astype(np.float32)
    out = resample_image(image, (8, 20, 20), (5.0, 1.0, 1.0))
    np.testing.assert_array_equal(out[0], np.repeat(image[0], 2, axis=0))


def test_labels_keep_their_classes_and_volume():
    case = volume((20, 20, 20), (1.0, 1.0, 1.0))
    out = resample_label(case.label, (40, 40, 40))
    assert set(np.unique(out)) <= set(np.unique(case.label))
    ratio = (out == 2).sum() / (8 * (case.label == 2).sum())
    assert ratio == pytest.approx(1, abs=0.1)


def test_logits_return_to_the_original_grid():
    case = volume((12, 16, 10), (1.0, 1.0, 2.0))
    how = Preprocessing((1.0, 1.0, 1.0), "none")
    _, label = prepare_volume(case, how)
    logits = torch.nn.functional.one_hot(torch.from_numpy(label).long(), 3).permute(3, 0, 1, 2).float()
    back = native_logits(logits, (12, 16, 10)).argmax(0).numpy()
    assert back.shape == case.label.shape
    block = case.label == 2
    assert 2 * (back[block] == 2).sum() / (block.sum() + (back == 2).sum()) > 0.9
    assert native_logits(logits, tuple(label.shape)) is logits
