"""Space against scipy, grey values against torch and scipy, probabilities by counting, symmetries as a group."""

import itertools
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional as F

from lit_cli.errors import InputError
from lit_dsunet import intensity
from lit_dsunet.augment import AlbumentationsVolume, VolumeAugmentation, _draw, augment_batch, symmetries_of

NOTHING = {f.name: 0.0 for f in fields(VolumeAugmentation) if f.name.endswith("_p")} | {"mirror": 0.0}
OFF = VolumeAugmentation(**NOTHING)
SPACE = replace(OFF, rotation_p=1.0, scale_p=1.0, shear_p=1.0)
GREY = ["noise", "blur", "brightness", "contrast", "low_resolution", "gamma", "gamma_invert"]


def batch(size=(12, 14, 16), count=4, channels=2, seed=0):
    """Smooth images and labels of three classes."""
    rng = np.random.default_rng(seed)
    image = ndimage.gaussian_filter(rng.normal(size=(count, channels, *size)), [0, 0, *[1.5] * len(size)])
    image = torch.from_numpy(image / image.std()).float()
    return image, torch.bucketize(image[:, 0].contiguous(), torch.tensor([-0.5, 0.7])).to(torch.uint8)


def only(name, **changes):
    return replace(OFF, **{f"{name}_p": 1.0, "channel_p": 1.0}, **changes)


@pytest.mark.parametrize("size", [(12, 14, 16), (14, 16)], ids=["volume", "slice"])
def test_nothing_on_changes_nothing(size):
    image, label = batch(size)
    new, mask = augment_batch(image, label, OFF, 0)
    assert torch.equal(new, image)
    assert torch.equal(mask, label)
    assert new.data_ptr() != image.data_ptr()


@pytest.mark.parametrize("size", [(12, 14, 16), (14, 16)], ids=["volume", "slice"])
def test_ranges_of_one_change_next_to_nothing(size):
    """Everything on, with ranges that leave the image as it is: the resampling and the formulas are exact there."""
    one = (1.0, 1.0)
    still = {"rotation": 0.0, "shear": 0.0, "scale": one, "brightness": one, "contrast": one, "gamma": one}
    options = VolumeAugmentation(
        **{f.name: 1.0 for f in fields(VolumeAugmentation) if f.name.endswith("_p")},
        **still, noise=0.0, blur=(0.01, 0.01), low_resolution=one, mirror=0.0,
    )  # fmt: skip
    image, label = batch(size)
    new, mask = augment_batch(image, label, options, 0)
    torch.testing.assert_close(new, image, rtol=0, atol=2e-5)
    assert torch.equal(mask, label)


@pytest.mark.parametrize(
    ("size", "spacing", "crop"),
    [
        pytest.param((16, 18, 20), None, None, id="isotropic"),
        pytest.param((16, 18, 20), (2.0, 1.0, 0.8), None, id="spacing"),
        pytest.param((16, 18, 21), (1.0, 1.0, 1.0), (12, 12, 12), id="crop"),
        pytest.param((16, 18, 20), (5.0, 1.0, 1.0), None, id="in plane"),
        pytest.param((20, 26), None, (16, 24), id="slice"),
    ],
)
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_one_affine_map_against_scipy(size, spacing, crop, padding):
    image, label = batch(size)
    options = replace(SPACE, padding=padding)
    out = crop or size
    plan = _draw(4, 2, out, options, 7, spacing or (1.0,) * len(size))
    new, mask = augment_batch(image, label, options, 7, spacing=spacing, crop=crop)
    assert np.array_equal(plan.moved, range(4))
    first = [(w - s) // 2 for w, s in zip(size, out, strict=True)]
    mode = {"zeros": "grid-constant", "border": "nearest"}[padding]
    for b, matrix in enumerate(plan.matrices):
        middle = (np.array(out) - 1) / 2
        offset = np.array(first) + middle - matrix @ middle
        for c in range(2):
            old = image[b, c].double().numpy()
            expected = ndimage.affine_transform(old, matrix, offset, out, order=1, mode=mode)
            np.testing.assert_allclose(new[b, c], expected, atol=3e-5)
        expected = ndimage.affine_transform(label[b].numpy(), matrix, offset, out, order=0, mode=mode)
        assert (mask[b].numpy() == expected).mean() > 0.999  # ties between two voxels may go either way
        assert not np.allclose(matrix, np.eye(len(out)), atol=0.02)


def test_rotation_is_one_in_the_patient():
    """With unequal spacings a map in mm without scale is orthogonal, and turns about each axis."""
    mm = np.array([2.0, 1.0, 0.8])
    plan = _draw(50, 1, (16, 18, 20), replace(OFF, rotation_p=1.0), 3, tuple(mm))
    turns = plan.matrices * mm[:, None] / mm
    np.testing.assert_allclose(turns @ turns.transpose(0, 2, 1), np.broadcast_to(np.eye(3), (50, 3, 3)), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(turns), 1)
    angles = np.degrees([np.arctan2(turns[:, i, j], turns[:, i, i]) for i, j in ((0, 1), (0, 2), (1, 2))])
    assert (np.abs(angles).max(1) > 20).all()


def test_scale_magnifies_evenly_up_and_down():
    plan = _draw(2000, 1, (16, 16, 16), replace(OFF, scale_p=1.0), 0, (1.0, 1.0, 1.0))
    factor = 1 / plan.matrices[:, 0, 0]
    np.testing.assert_allclose(plan.matrices, np.eye(3) / factor[:, None, None])
    assert 0.7 <= factor.min() < 0.71
    assert 1.39 < factor.max() <= 1.4
    assert np.log(factor).mean() == pytest.approx(np.log(0.7 * 1.4) / 2, abs=0.02)


@pytest.mark.parametrize(
    ("size", "spacing", "rule", "still"),
    [
        pytest.param((16, 48, 48), (1, 1, 1), "auto", None, id="3 to 1 is still isotropic"),
        pytest.param((15, 48, 48), (1, 1, 1), "auto", 0, id="flat patch"),
        pytest.param((48, 48, 48), (1, 1, 3.1), "auto", 2, id="thick slices"),
        pytest.param((15, 48, 48), (1, 1, 1), "never", None, id="never"),
        pytest.param((48, 40, 48), (1, 1, 1), "always", 1, id="always"),
    ],
)
def test_slices_stay_where_they_are(size, spacing, rule, still):
    options = replace(SPACE, in_plane=rule, low_resolution=(0.5, 0.5), low_resolution_p=1.0, channel_p=1.0)
    plan = _draw(8, 1, size, options, 0, spacing)
    for axis in range(3):
        others = [a for a in range(3) if a != axis]
        apart = np.allclose(plan.matrices[:, axis, others], 0) and np.allclose(plan.matrices[:, others, axis], 0)
        assert apart == (axis == still)
        left = plan.changes[0][2][3 * axis]
        assert np.array_equal(left, np.broadcast_to(np.arange(size[axis]), left.shape)) == (axis == still)
    if still is not None:
        np.testing.assert_allclose(plan.matrices[:, still, still], 1)


def test_mask_and_image_move_together():
    """A ball as image and as mask: the moved image, cut at its half, is the moved mask."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(24.0)] * 3, indexing="ij"))
    centres = 11.5 + torch.tensor([[3.0, 0, 0], [0, -3, 1], [-2, 2, 2], [1, 3, -3]])
    distance = (grid - centres.view(4, 3, 1, 1, 1)).norm(dim=1)
    options = replace(SPACE, mirror=0.5, symmetries=0.5)
    new, mask = augment_batch((6.5 - distance).clamp(-1, 1)[:, None], (distance < 6.5).to(torch.uint8), options, 5)
    assert ((new[:, 0] > 0) == mask).float().mean() > 0.98
    assert ((mask == 1) != (distance < 6.5)).float().mean() > 0.04


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_labels_keep_their_type_and_classes(dtype):
    image, label = batch(count=8)
    label = (label * 3).to(dtype)
    _, mask = augment_batch(image.half(), label, VolumeAugmentation(rotation_p=1.0), 1)
    assert mask.dtype == dtype
    assert set(mask.unique().tolist()) <= {0, 3, 6}


def test_mirrors():
    image, label = batch()
    options = replace(OFF, mirror=1.0)
    new, mask = augment_batch(image, label, options, 0)
    assert torch.equal(new, image.flip((2, 3, 4)))
    again, mask = augment_batch(new, mask, options, 1)
    assert torch.equal(again, image)
    assert torch.equal(mask, label)
    many = _draw(4000, 1, (4, 4, 4), replace(OFF, mirror=0.5), 0, (1.0,) * 3).symmetries
    for axis in range(3):
        assert sum(axis in reverse for _, reverse in many) / 4000 == pytest.approx(0.5, abs=0.03)


def test_the_48_symmetries_form_a_group():
    image = torch.arange(27).view(1, 1, 3, 3, 3)
    codes = symmetries_of((3, 3, 3), (1.0, 1.0, 1.0))

    def act(x, code):
        return x.permute(*code[0]).flip(code[1])

    cubes = {tuple(act(image[0, 0], c).flatten().tolist()): c for c in codes}
    assert len(codes) == len(cubes) == 48
    products = {tuple(act(act(image[0, 0], a), b).flatten().tolist()) for a, b in itertools.product(codes, codes)}
    assert products == set(cubes)  # closed; finite and cancellative, hence a group
    assert codes[0] == ((0, 1, 2), ())


@pytest.mark.parametrize(
    ("size", "spacing", "count"),
    [((4, 4, 4), (1, 1, 1), 48), ((4, 4, 4), (3, 1, 1), 16), ((4, 6, 6), (1, 1, 1), 16), ((4, 4), (1, 1), 8)],
)
def test_symmetries_keep_size_and_spacing(size, spacing, count):
    codes = symmetries_of(size, spacing)
    assert len(codes) == count
    image = torch.rand(400, 1, *size)
    label = (image[:, 0] * 200).to(torch.uint8)
    new, mask = augment_batch(image, label, replace(OFF, symmetries=1.0), 2, spacing=spacing)
    assert torch.equal((new[:, 0] * 200).to(torch.uint8), mask)
    seen = set()
    for old, now in zip(image[:, 0], new[:, 0], strict=True):
        (found,) = [c for c in codes if torch.equal(old.permute(*c[0]).flip(c[1]), now)]
        seen.add(found)
    assert len(seen) == count


def test_noise_statistics():
    image = torch.zeros(400, 1, 6, 8, 8)
    new, _ = augment_batch(image, image[:, 0].byte(), only("noise", noise=0.2), 4)
    deviation = new.flatten(1).std(1)
    assert deviation.max() < 0.23
    assert deviation.mean() == pytest.approx(0.1, abs=0.01)  # even from 0 to 0.2
    assert new.mean().abs() < 0.002
    plain = (new / deviation.view(-1, 1, 1, 1, 1)).flatten()
    assert (plain**4).mean() == pytest.approx(3, abs=0.1)  # Gaussian
    assert torch.corrcoef(new.flatten(1)[:2])[0, 1].abs() < 0.2


def test_noise_reaches_all_channels_alike():
    image = torch.zeros(50, 2, 8, 8, 8)
    new, _ = augment_batch(image, image[:, 0].byte(), only("noise"), 4)
    first, second = new.flatten(2).std(2).T
    torch.testing.assert_close(first, second, rtol=0.2, atol=0)


@pytest.mark.parametrize("size", [(12, 14, 16), (14, 16)], ids=["volume", "slice"])
def test_blur_against_scipy(size):
    image, _ = batch(size)
    items = image.flatten(0, 1)
    sigma = np.random.default_rng(0).uniform(0.5, 1.0, (len(items), len(size)))
    weights = torch.from_numpy(intensity.kernels(sigma, 1.0)).float()
    new = intensity.blur(items, [weights], torch.Generator())
    for item, result, s in zip(items.numpy(), new.numpy(), sigma, strict=True):
        np.testing.assert_allclose(result, ndimage.gaussian_filter(item, s, mode="nearest", radius=3), atol=1e-5)


@pytest.mark.parametrize("size", [(12, 14, 16), (14, 16)], ids=["volume", "slice"])
def test_low_resolution_against_torch(size):
    image, _ = batch(size)
    items = image.flatten(0, 1)
    share = np.random.default_rng(1).uniform(0.5, 1.0, len(items))
    values = [torch.from_numpy(v) for s in size for v in intensity.coarse_indices(s, share)]
    new = intensity.coarsen(items, [v.float() if v.is_floating_point() else v for v in values], torch.Generator())
    linear = "trilinear" if len(size) == 3 else "bilinear"
    for item, result, z in zip(items, new, share, strict=True):
        small = F.interpolate(item[None, None], size=[round(s * z) for s in size], mode="nearest-exact")
        torch.testing.assert_close(result, F.interpolate(small, size=size, mode=linear)[0, 0], rtol=0, atol=1e-5)


def test_contrast_and_brightness():
    image, label = batch(count=64)
    new, _ = augment_batch(image, label, only("brightness"), 0)
    factor = (new / image).flatten(2).median(2).values
    torch.testing.assert_close(new, image * factor[..., None, None, None])
    assert 0.75 <= factor.min() < 0.78
    assert 1.22 < factor.max() <= 1.25
    assert (factor[:, 0] - factor[:, 1]).abs().max() > 0.1  # each channel by itself
    new, _ = augment_batch(image, label, only("contrast"), 0)
    old, new = image.flatten(2), new.flatten(2)
    mean = old.mean(2, keepdim=True)
    slope = ((new - mean) / (old - mean)).median(2, keepdim=True).values
    expected = torch.minimum(torch.maximum((old - mean) * slope + mean, old.amin(2, True)), old.amax(2, True))
    torch.testing.assert_close(new, expected, rtol=0, atol=1e-4)
    assert slope.min() < 0.78
    assert slope.max() > 1.22


@pytest.mark.parametrize("name", ["gamma", "gamma_invert"])
def test_gamma(name):
    image, label = batch()
    new, _ = augment_batch(image, label, only(name, gamma=(1.5, 1.5)), 0)
    for old, result in zip(image.flatten(0, 1).double(), new.flatten(0, 1), strict=True):
        x = -old if name == "gamma_invert" else old
        y = ((x - x.min()) / (x.max() - x.min())) ** 1.5
        y = (y - y.mean()) / y.std() * x.std() + x.mean()
        torch.testing.assert_close(result, (-y if name == "gamma_invert" else y).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", GREY)
def test_a_constant_image_stays_finite(name):
    image = torch.full((2, 1, 8, 8, 8), 3.0)
    new, _ = augment_batch(image, image[:, 0].byte(), only(name), 0)
    assert new.isfinite().all()
    if name not in ("noise", "brightness"):
        torch.testing.assert_close(new, image)


@pytest.mark.parametrize("name", [*GREY, "rotation", "scale", "shear"])
def test_probabilities_are_per_sample(name):
    image, label = (t[:1].expand(300, *t.shape[1:]) for t in batch((6, 6, 6)))
    new, _ = augment_batch(image, label, replace(OFF, **{f"{name}_p": 0.3, "channel_p": 1.0}), 9)
    changed = (new != image).flatten(1).any(1)
    assert changed.float().mean() == pytest.approx(0.3, abs=0.08)
    results = new[changed].flatten(1)
    # Each sample by its own amount; of low resolution there are few different ones for 6 voxels.
    assert len(results.unique(dim=0)) >= (3 if name == "low_resolution" else 0.9 * len(results))


def test_probability_per_channel():
    image, label = (t[:1].expand(300, *t.shape[1:]) for t in batch((6, 6, 6)))
    new, _ = augment_batch(image, label, replace(OFF, blur_p=0.6, channel_p=0.5), 9)
    changed = (new != image).flatten(2).any(2).float()
    assert changed.mean().item() == pytest.approx(0.3, abs=0.05)
    assert (changed[:, 0] * changed[:, 1]).mean().item() == pytest.approx(0.15, abs=0.05)


ALL = VolumeAugmentation(
    **{f.name: 1.0 for f in fields(VolumeAugmentation) if f.name.endswith("_p")}, mirror=0.5, symmetries=0.5
)


@pytest.mark.parametrize("size", [(12, 12, 12), (12, 12)], ids=["volume", "slice"])
def test_all_follows_from_the_seed_and_no_generator_is_touched(size):
    image, label = batch(size)
    image.requires_grad_()
    before = image.detach().clone(), torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    a, b, other = (augment_batch(image, label, ALL, seed) for seed in (7, 7, 8))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], other[0])
    assert not a[0].requires_grad
    assert torch.equal(image, before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    assert np.array_equal(np.random.get_state()[1], before[2])  # noqa: NPY002


def test_switching_one_change_off_leaves_the_others_alone():
    image, label = batch()
    some = VolumeAugmentation(mirror=0.5, rotation_p=0.5, gamma_p=0.0, noise_p=0.0)
    with_gamma = augment_batch(image, label, replace(some, gamma_p=1.0), 3)
    without = augment_batch(image, label, some, 3)
    assert torch.equal(with_gamma[1], without[1])
    assert not torch.equal(with_gamma[0], without[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotation": -1.0}, "data.augment.rotation: expected 0 or more, got -1"),
        ({"noise": float("nan")}, "data.augment.noise: expected 0 or more, got nan"),
        ({"blur_p": 1.5}, "data.augment.blur_p: expected a probability from 0 to 1, got 1.5"),
        ({"mirror": -0.5}, "data.augment.mirror: expected a probability"),
        ({"scale": (1.4, 0.7)}, "data.augment.scale: expected two numbers above 0 in ascending order"),
        ({"gamma": (0.0, 1.0)}, "data.augment.gamma: expected two numbers above 0"),
        ({"low_resolution": (0.5, 2.0)}, "data.augment.low_resolution: expected at most 1, got 2"),
        ({"padding": "wrap"}, "data.augment.padding: expected one of zeros, border, got 'wrap'"),
        ({"in_plane": "no"}, "data.augment.in_plane: expected one of auto, always, never, got 'no'"),
    ],
)
def test_refused_options(changes, message):
    with pytest.raises(InputError) as caught:
        VolumeAugmentation(**changes).check()
    assert str(caught.value).startswith(message)
    VolumeAugmentation().check()


@pytest.mark.parametrize("crop", [(12, 14, 17), (12, 14), (0, 1, 1)])
def test_refused_crop(crop):
    with pytest.raises(InputError, match="expected at most the patch's size"):
        augment_batch(*batch(), OFF, 0, crop=crop)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_nothing_waits_and_all_but_the_noise_is_the_same():
    image, label = batch((12, 12, 12))
    expected = augment_batch(image, label, replace(ALL, noise_p=0.0), 3, crop=(10, 10, 10))
    on_device = image.cuda(), label.cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        new, mask = augment_batch(*on_device, replace(ALL, noise_p=0.0), 3, crop=(10, 10, 10))
        augment_batch(*on_device, ALL, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(new.cpu(), expected[0], rtol=1e-3, atol=1e-3)
    assert (mask.cpu() == expected[1]).float().mean() > 0.999


@pytest.mark.parametrize("size", [(12, 12, 12), (8, 12, 12), (8, 10, 12)], ids=["cube", "squares", "other"])
def test_albumentations(size):
    augment = AlbumentationsVolume(affine_p=0.7, intensity_p=0.5, holes=2)
    image, label = (t[0].numpy() for t in batch(size, count=1))
    results = [augment(image, label, seed) for seed in (*range(8), 0)]
    for new, mask in results:
        assert new.shape == image.shape
        assert new.dtype == np.float32
        assert mask.shape == label.shape
        assert mask.dtype == np.uint8
        assert set(np.unique(mask)) <= {0, 1, 2}
        assert np.abs(new).max() < 1.5 * np.abs(image).max()
    assert np.array_equal(results[0][0], results[-1][0])
    assert len({new.tobytes() for new, _ in results}) == 8


@pytest.mark.parametrize("size", [(12, 12, 12), (8, 12, 12), (8, 10, 12)], ids=["cube", "squares", "other"])
def test_albumentations_moves_image_and_label_together(size):
    augment = AlbumentationsVolume(intensity_p=0.0, affine_p=0.0)
    label = np.random.default_rng(0).integers(0, 3, size, dtype=np.uint8)
    image = label[None].astype(np.float32) * 2 - 1
    distinct = set()
    for seed in range(20):
        new, mask = augment(image, label, seed)
        np.testing.assert_allclose(new[0], mask.astype(np.float32) * 2 - 1, atol=1e-5)
        distinct.add(mask.tobytes())
    assert len(distinct) > 3


def test_albumentations_draws_each_change_by_itself():
    """Two coins, not one: its `set_random_seed` throws the same for all transforms."""
    augment = AlbumentationsVolume(affine_p=0.0, symmetry=1.0, intensity_p=0.0)
    label = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    masks = [augment(label[None].astype(np.float32), label, seed)[1] for seed in range(200)]
    for axes in ((), (1,), (2,), (1, 2)):
        assert 30 < sum(np.array_equal(m, np.flip(label, axes)) for m in masks) < 70
