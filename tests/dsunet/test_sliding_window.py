"""Sliding windows against a slow loop over windows and voxels."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from lit_dsunet.sliding_window import SlidingWindow, importance, mirror_axes, window_starts

PATCH = (4, 6, 4)


def network(x):
    """Two classes that depend on the place in the window and on the direction of each axis."""
    n = x.ndim - 2
    ramp = sum(
        (i + 1) * torch.linspace(0, 1, s).view([-1 if a == i else 1 for a in range(n)])
        for i, s in enumerate(x.shape[2:])
    )
    first = x.sum(1, keepdim=True)
    return torch.cat((first * (1 + ramp), first.square() - ramp), dim=1)


def slow(volume, patch, overlap, weight, mirrors):
    """The definition."""
    missing = [max(0, p - s) for p, s in zip(patch, volume.shape[1:], strict=True)]
    pad = [(m // 2, m - m // 2) for m in missing]
    image = np.pad(volume.numpy(), [(0, 0), *pad]).astype(np.float64)
    size = image.shape[1:]
    total, norm = np.zeros((2, *size)), np.zeros(size)
    gauss = importance(patch, weight, torch.device("cpu")).double().numpy()
    for corner in itertools.product(*(window_starts(s, p, overlap) for s, p in zip(size, patch, strict=True))):
        box = tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True))
        for mirror in mirrors:
            axes = [a + 1 for a in mirror]
            flipped = np.flip(image[(slice(None), *box)], axes).copy()
            out = network(torch.from_numpy(flipped)[None])[0].numpy()
            total[(slice(None), *box)] += np.flip(out, axes) * gauss / len(mirrors)
        norm[box] += gauss
    inside = tuple(slice(a, a + s) for (a, _), s in zip(pad, volume.shape[1:], strict=True))
    return torch.from_numpy((total / norm)[(slice(None), *inside)]).float()


@pytest.mark.parametrize("size", [(4, 6, 4), (9, 11, 7), (3, 13, 4), (2, 3, 2)])
@pytest.mark.parametrize("weight", ["gaussian", "constant"])
@pytest.mark.parametrize("mirror", [(), (0, 2)])
@pytest.mark.parametrize("memory", [None, 0])
def test_against_a_loop(size, weight, mirror, memory):
    """`memory=0` forces the slabs."""
    volume = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    window = SlidingWindow(PATCH, weight=weight, batch=3, mirror=mirror, memory=memory)
    expected = slow(volume, PATCH, 0.5, weight, mirror_axes(mirror))
    (found,) = window(network, [volume])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_several_volumes_share_batches():
    volumes = [torch.randn(1, *size) for size in ((5, 7, 9), (4, 6, 4), (8, 6, 5))]
    window = SlidingWindow(PATCH, batch=5)
    calls = []

    def counted(x):
        calls.append(len(x))
        return network(x)

    together = window(counted, volumes)
    assert calls[:-1] == [5] * (len(calls) - 1)
    assert sum(calls) == sum(window.count(v.shape[1:]) for v in volumes)
    for one, volume in zip(together, volumes, strict=True):
        torch.testing.assert_close(one, window(network, [volume])[0])


SIZES = ((5, 7, 9), (4, 6, 4), (2, 3, 2), (9, 11, 7))


@pytest.mark.parametrize("mirror", [(), (1,)])
@pytest.mark.parametrize("memory", [None, 0])
def test_padded_batches_have_one_shape_and_change_nothing(memory, mirror):
    """`memory=0` forces the slabs, each with a last batch of its own."""
    volumes = [torch.randn(1, *size, generator=torch.Generator().manual_seed(n)) for n, size in enumerate(SIZES)]
    shapes = []

    def recorded(x):
        shapes.append(tuple(x.shape))
        return network(x)

    options = {"batch": 3, "mirror": mirror, "memory": memory}
    plain, padded = SlidingWindow(PATCH, **options), SlidingWindow(PATCH, pad_batches=True, **options)
    for group in (volumes, *([v] for v in volumes)):
        expected = plain(recorded, group)
        needed = len(shapes)
        shapes.clear()
        for one, other in zip(padded(recorded, group), expected, strict=True):
            assert torch.equal(one, other)
        assert set(shapes) == {(3, 1, *PATCH)}
        assert len(shapes) == needed
        shapes.clear()


def test_full_batches_are_not_padded():
    volume = torch.randn(1, 9, 11, 4)
    window = SlidingWindow(PATCH, batch=4, pad_batches=True)
    sizes = []

    def counted(x):
        sizes.append(len(x))
        assert len(x.flatten(1).unique(dim=0)) == len(x)  # no window twice
        return network(x)

    window(counted, [volume])
    assert sizes == [4] * (window.count(volume.shape[1:]) // 4)
    assert sum(sizes) == window.count(volume.shape[1:])


@pytest.mark.parametrize("pad", [False, True])
def test_a_compiled_network_is_compiled_once_with_padding(pad):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(network, backend=counter)
    for size in SIZES:
        SlidingWindow(PATCH, batch=3, pad_batches=pad)(compiled, [torch.zeros(1, *size)])
    assert (counter.frame_count == 1) == pad


@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize("slices", [1, 3])
def test_slices_go_to_a_two_dimensional_network(slices, memory):
    volume = torch.randn(2, 5, 7, 6)
    window = SlidingWindow((1, 4, 4), weight="constant", batch=4, slices=slices, memory=memory)
    shapes = set()

    def net(x):
        shapes.add(tuple(x.shape[1:]))
        return x[:, :2] + x.mean(1, keepdim=True)  # channels: slices of the first channel come first

    (found,) = window(net, [volume])
    assert shapes == {(2 * slices, 4, 4)}
    z = torch.arange(5)[:, None] + torch.arange(slices) - slices // 2
    stacked = volume[:, z.clamp(0, 4)].permute(0, 2, 1, 3, 4).flatten(0, 1)
    torch.testing.assert_close(found, stacked[:2] + stacked.mean(0))


@pytest.mark.parametrize(
    ("size", "patch", "windows"),
    [
        ((240, 240, 155), (96, 96, 96), 48),
        ((240, 240, 155), (128, 128, 128), 18),
        ((190, 142, 88), (112, 112, 80), 12),
        ((112, 112, 73), (112, 112, 80), 1),
    ],
)
def test_number_of_windows_at_half_overlap(size, patch, windows):
    assert SlidingWindow(patch).count(size) == windows


def test_every_voxel_is_covered():
    rng = np.random.default_rng(0)
    for _ in range(300):
        size, patch, overlap = int(rng.integers(1, 90)), int(rng.integers(1, 40)), float(rng.uniform(0, 0.9))
        starts = window_starts(max(size, patch), patch, overlap)
        seen = np.zeros(max(size, patch), bool)
        for s in starts:
            assert s >= 0
            seen[s : s + patch] = True
        assert seen.all()
        assert all(b - a <= patch for a, b in itertools.pairwise(starts))
        assert len(starts) == math.ceil(max(0, size - patch) / (patch * (1 - overlap)) - 1e-9) + 1


def test_weights_are_the_gaussian():
    weight = importance((8, 4, 2), "gaussian", torch.device("cpu"))
    d, h, w = np.meshgrid(*((np.arange(n) - (n - 1) / 2) / (n / 8) for n in (8, 4, 2)), indexing="ij")
    expected = np.exp(-0.5 * (d**2 + h**2 + w**2))
    np.testing.assert_allclose(weight, np.maximum(expected / expected.max(), 1e-6), rtol=1e-5)


def test_out_of_memory_takes_smaller_batches_and_then_slabs():
    limit, seen = 1, []

    def greedy(x):
        seen.append(len(x))
        if len(x) > limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return network(x)

    volume = torch.randn(1, 6, 9, 5)
    (found,) = SlidingWindow(PATCH, batch=4)(greedy, [volume])
    assert seen[:2] == [4, 2]
    torch.testing.assert_close(found, SlidingWindow(PATCH)(network, [volume])[0])
    limit = 0
    with pytest.raises(torch.cuda.OutOfMemoryError):
        SlidingWindow(PATCH, batch=2)(greedy, [volume])


@pytest.mark.parametrize("wrong", [{"overlap": 1.0}, {"batch": 0}, {"slices": 2}, {"slices": 3}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="sliding window"):
        SlidingWindow(PATCH, **wrong)
