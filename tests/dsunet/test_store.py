"""The cache, the sampler and the two ways to cut a patch, against slicing a padded array."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_dsunet.preprocess import Preprocessing
from lit_dsunet.samples import Geometry, Volume, VolumeSample
from lit_dsunet.store import Case, PatchSampler, Resident, cut_patch, foreground_centres, prepare_cases

PATCH = (6, 8, 5)


def case(size, channels=2, seed=0, classes=2):
    rng = np.random.default_rng(seed)
    label = np.where(rng.random(size) < 0.05, rng.integers(1, classes + 1, size), 0).astype(np.uint8)
    image = rng.normal(size=(channels, *size)).astype(np.float16)
    geometry = Geometry(np.eye(4), size[::-1], (1.0, 1.0, 1.0))
    return Case(f"c{seed}", image, label, foreground_centres(label), geometry, size)


CASES = [case((9, 8, 12), seed=0), case((4, 20, 3), seed=1), case((6, 8, 5), seed=2)]


def slow_patch(one, start):
    pad = [(p, p) for p in PATCH]
    image = np.pad(one.image, [(0, 0), *pad])
    label = np.pad(one.label, pad)
    box = tuple(slice(s + p, s + 2 * p) for s, p in zip(start, PATCH, strict=True))
    return image[(slice(None), *box)], label[box]


def test_patches_from_the_device_and_from_the_host_are_slices_of_the_padded_volume():
    sampler = PatchSampler(CASES, PATCH, 0.5)
    which = np.array([0, 1, 2, 1, 0, 2])
    starts = sampler.draw(which, seed=3)
    image, label = Resident(CASES, torch.device("cpu")).patches(
        torch.from_numpy(which), torch.from_numpy(starts), PATCH
    )
    for i, (index, start) in enumerate(zip(which, starts, strict=True)):
        for got_image, got_label in ((image[i].numpy(), label[i].numpy()), cut_patch(CASES[index], start, PATCH)):
            expected_image, expected_label = slow_patch(CASES[index], start)
            np.testing.assert_array_equal(got_image, expected_image)
            np.testing.assert_array_equal(got_label, expected_label)


def test_whole_volumes_come_back():
    resident = Resident(CASES, torch.device("cpu"))
    for i, one in enumerate(CASES):
        image, label = resident.volume(i)
        np.testing.assert_array_equal(image.numpy(), one.image)
        np.testing.assert_array_equal(label.numpy(), one.label)
    assert Resident.nbytes(CASES) == sum(t.nbytes for t in (resident.image, resident.label))


def test_patches_stay_inside_and_small_volumes_in_the_middle():
    sampler = PatchSampler(CASES, PATCH, 0.33)
    for seed in range(50):
        starts = sampler.draw(np.array([0, 1, 2] * 4), seed)
        for index, start in zip([0, 1, 2] * 4, starts, strict=True):
            for s, p, n in zip(start, PATCH, CASES[index].size, strict=True):
                assert (0 <= s <= n - p) if n >= p else s == -((p - n) // 2)


def test_every_start_is_drawn_alike():
    sampler = PatchSampler(CASES[:1], PATCH, 0.0)
    starts = sampler.draw(np.zeros(20_000, np.int64), seed=0)
    counts = np.bincount(starts[:, 2], minlength=8)
    assert len(counts) == 8
    np.testing.assert_allclose(counts / 20_000, 1 / 8, atol=0.01)


@pytest.mark.parametrize(
    ("batch", "share", "forced"), [(2, 0.33, 1), (3, 0.33, 1), (9, 0.33, 3), (8, 0.7, 6), (4, 0.0, 0)]
)
def test_the_last_patches_of_a_batch_hold_foreground(batch, share, forced):
    one = case((30, 30, 30), seed=5)
    label = np.zeros((30, 30, 30), np.uint8)
    label[15, 15, 15] = 1
    label[3, 3, 3] = 2
    one = Case("x", one.image, label, foreground_centres(label), one.geometry, one.size)
    sampler = PatchSampler([one], PATCH, share)
    seen = set()
    for seed in range(200):
        starts = sampler.draw(np.zeros(batch, np.int64), seed)
        found = [set(np.unique(cut_patch(one, s, PATCH)[1])) - {0} for s in starts]
        assert all(found[batch - forced :])
        seen |= set().union(*found[batch - forced :]) if forced else set()
    assert not forced or seen == {1, 2}  # both classes, though one voxel each


def test_a_volume_without_foreground_gives_random_patches():
    empty = Case("e", CASES[0].image, None, foreground_centres(None), CASES[0].geometry, CASES[0].size)
    starts = PatchSampler([empty], PATCH, 1.0).draw(np.zeros(50, np.int64), 0)
    assert len(np.unique(starts[:, 0])) > 2


def test_draws_depend_on_the_seed_alone():
    sampler = PatchSampler(CASES, PATCH)
    which = np.array([0, 1, 2, 0])
    np.testing.assert_array_equal(sampler.draw(which, 1), sampler.draw(which, 1))
    assert (sampler.draw(which, 1) != sampler.draw(which, 2)).any()


def test_centres_are_the_foreground_and_at_most_ten_thousand_of_a_class():
    label = np.zeros((30, 30, 30), np.uint8)
    label[:15] = 1
    label[20, 20, 20] = 2
    centres = foreground_centres(label)
    assert (label[tuple(centres[:, 1:].T)] == centres[:, 0]).all()
    assert [(centres[:, 0] == c).sum() for c in (1, 2)] == [10_000, 1]
    assert len(np.unique(centres, axis=0)) == len(centres)


def files(tmp_path, n=3):
    samples = []
    for i in range(n):
        path = tmp_path / f"{i}.bin"
        path.write_bytes(b"x")
        samples.append(VolumeSample(f"c{i}", (path,), None, f"p{i}"))
    return samples


class Reader:
    def __init__(self):
        self.calls = []

    def __call__(self, sample, values):
        self.calls.append(sample.name)
        one = case((6, 7, 8), channels=1, seed=int(sample.name[1:]))
        return Volume(sample.name, one.image.astype(np.float32), one.label, one.geometry)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_cache_is_read_once_and_knows_what_changed(tmp_path, in_memory):
    samples, cache = files(tmp_path), tmp_path / "cache"
    how = Preprocessing((2.0, 1.0, 1.0))

    def cases(how=how):
        reader = Reader()
        return prepare_cases(samples, how, {0: 0}, reader, cache, in_memory=in_memory), sorted(reader.calls)

    first, read = cases()
    assert read == ["c0", "c1", "c2"]
    again, read = cases()
    assert read == []
    for a, b in zip(first, again, strict=True):
        assert (a.name, a.size, a.native_shape) == (b.name, b.size, b.native_shape) == (a.name, (3, 7, 8), (6, 7, 8))
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.label, b.label)
        np.testing.assert_array_equal(a.centres, b.centres)
        np.testing.assert_array_equal(a.native_label, b.native_label)
        assert a.native_label.shape == a.native_shape
        np.testing.assert_array_equal(a.geometry.affine, b.geometry.affine)
    assert isinstance(again[0].image, np.memmap) is not in_memory
    stamp = samples[1].images[0].stat()
    os.utime(samples[1].images[0], ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 10**9))
    assert cases()[1] == ["c1"]
    assert cases(Preprocessing())[1] == ["c0", "c1", "c2"]


def test_a_damaged_cache_is_made_again(tmp_path):
    samples, cache = files(tmp_path, 1), tmp_path / "cache"
    prepare_cases(samples, Preprocessing(), {}, Reader(), cache)
    (damaged,) = cache.glob("*/image.npy")
    damaged.write_bytes(damaged.read_bytes()[:100])
    reader = Reader()
    (one,) = prepare_cases(samples, Preprocessing(), {}, reader, cache)
    assert reader.calls == ["c0"]
    assert one.size == (6, 7, 8)


def test_a_full_disk_costs_the_cache_alone(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    (one,) = prepare_cases(files(tmp_path, 1), Preprocessing(), {}, Reader(), tmp_path / "cache", in_memory=False)
    assert one.size == (6, 7, 8)
    assert list(Path(tmp_path / "cache").iterdir()) == []
