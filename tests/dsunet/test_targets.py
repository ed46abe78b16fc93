"""Targets of the heads against loops and torch's own interpolation; the erased lesions of nearest targets."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lit_cli.errors import InputError
from lit_dsunet.targets import ds_targets, ds_weights

CLASSES = 3


def labels(shape=(2, 8, 12, 16), dtype=torch.uint8):
    return torch.randint(0, CLASSES, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def slow(label, stride, mode):
    """One cell after the other."""
    label = label.numpy()
    size = [n // s for n, s in zip(label.shape[1:], stride, strict=True)]
    out = np.zeros((len(label), CLASSES, *size) if mode == "soft" else (len(label), *size))
    for b, *cell in itertools.product(range(len(label)), *map(range, size)):
        block = label[(b, *(slice(c * s, (c + 1) * s) for c, s in zip(cell, stride, strict=True)))]
        if mode == "soft":
            for k in range(CLASSES):
                out[(b, k, *cell)] = (block == k).mean()
        elif mode == "max":
            out[(b, *cell)] = block.max()
        else:
            out[(b, *cell)] = block[tuple(s // 2 for s in stride)]
    return torch.from_numpy(out)


@pytest.mark.parametrize("mode", ["soft", "max", "nearest"])
@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        pytest.param((2, 8, 12, 16), [(1, 1, 1), (2, 2, 2), (4, 4, 4)], id="isotropic"),
        pytest.param((2, 8, 12, 16), [(1, 1, 1), (1, 2, 2), (2, 4, 4), (4, 4, 8)], id="anisotropic"),
        pytest.param((1, 6, 6, 6), [(2, 2, 2), (3, 3, 3)], id="strides that do not nest"),
        pytest.param((3, 8, 12), [(1, 1), (2, 2), (4, 4)], id="slices"),
    ],
)
def test_against_a_loop(mode, shape, strides):
    label = labels(shape)
    targets = ds_targets(label, CLASSES, strides, mode)
    for target, stride in zip(targets, strides, strict=True):
        if max(stride) == 1:
            assert target is label
            continue
        torch.testing.assert_close(target.double(), slow(label, stride, mode).double(), rtol=0, atol=1e-7)
        assert target.dtype == (torch.float32 if mode == "soft" else torch.uint8)


@pytest.mark.parametrize("stride", [2, 3, 4, 8])
def test_nearest_is_nearest_exact(stride):
    label = labels((1, 24, 24, 24))
    expected = F.interpolate(label[None].float(), size=(24 // stride,) * 3, mode="nearest-exact")[0]
    (target,) = ds_targets(label, CLASSES, [(stride,) * 3], "nearest")
    assert torch.equal(target.float(), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_integer_types(dtype):
    for mode in ("soft", "max", "nearest"):
        (target,) = ds_targets(labels(dtype=dtype), CLASSES, [(2, 2, 2)], mode)
        assert torch.equal(target, ds_targets(labels(), CLASSES, [(2, 2, 2)], mode)[0].to(target.dtype))


def test_small_lesions_survive_in_soft_and_max_but_not_in_nearest():
    """A voxel at each of the 512 places of a cell: nearest keeps one of them."""
    label = torch.zeros(512, 8, 8, 8, dtype=torch.uint8)
    label.view(512, -1)[torch.arange(512), torch.arange(512)] = 1
    soft, highest, nearest = (ds_targets(label, 2, [(8, 8, 8)], m)[0] for m in ("soft", "max", "nearest"))
    assert torch.equal(soft[:, 1].flatten(), torch.full((512,), 1 / 512))
    assert highest.sum() == 512
    assert nearest.sum() == 1


def test_soft_shares_sum_to_one():
    for target in ds_targets(labels(), CLASSES, [(1, 2, 2), (2, 4, 4)], "soft"):
        torch.testing.assert_close(target.sum(1), torch.ones_like(target[:, 0]))


def test_halving_weights_keep_the_scale_of_the_loss():
    for n in range(1, 7):
        weights = ds_weights(n)
        assert sum(weights) == pytest.approx(1)
        assert all(a == pytest.approx(2 * b) for a, b in itertools.pairwise(weights))
    assert ds_weights(4) == pytest.approx((8 / 15, 4 / 15, 2 / 15, 1 / 15))


def test_guide_and_own_weights():
    # The guide lists [main, ds4, ds3, ds2] with 1, .5, .25, .125, and its ds4 is the coarsest.
    assert ds_weights(4, "guide") == (1, 0.125, 0.25, 0.5)
    assert ds_weights(1, "guide") == ds_weights(1) == (1,)
    assert ds_weights(3, [1, 0.5, 0]) == (1, 0.5, 0)


@pytest.mark.parametrize(
    ("count", "rule"), [(2, [1.0]), (2, [1.0, -1.0]), (2, [0.0, 0.0]), (1, [float("nan")]), (2, "thirds")]
)
def test_refused_weights(count, rule):
    with pytest.raises(InputError, match="weights: expected"):
        ds_weights(count, rule)


def test_refused_strides_and_modes():
    with pytest.raises(ValueError, match=r"strides: \(2, 2, 3\) does not divide the label's size \(8, 12, 16\)"):
        ds_targets(labels(), CLASSES, [(2, 2, 3)])
    with pytest.raises(ValueError, match="does not divide"):
        ds_targets(labels(), CLASSES, [(2, 2)])
    with pytest.raises(InputError, match="mode is 'mean', expected one of soft, max, nearest"):
        ds_targets(labels(), CLASSES, [(2, 2, 2)], "mean")
