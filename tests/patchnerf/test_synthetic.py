from itertools import pairwise

import numpy as np
import pytest

from lit_patchnerf.synthetic import SyntheticVideo
from lit_patchnerf.video import read_video
from tests.helpers.errors import refused


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(((a.astype(float) - b) ** 2).mean() / 255**2 + 1e-9))


def shrink(frame: np.ndarray, factor: int) -> np.ndarray:
    h, w = frame.shape[0] // factor, frame.shape[1] // factor
    return frame.reshape(h, factor, w, factor, 3).astype(float).mean((1, 3))


def test_the_same_seed_draws_the_same_scene():
    first = SyntheticVideo(frames=4, seed=5).draw()
    np.testing.assert_array_equal(first, SyntheticVideo(frames=4, seed=5).draw())
    assert psnr(first, SyntheticVideo(frames=4, seed=6).draw()) < 25
    assert SyntheticVideo(seed=5).facts() == SyntheticVideo(seed=5).facts()
    assert SyntheticVideo(seed=5).facts().digest != SyntheticVideo(seed=6).facts().digest


@pytest.mark.parametrize(("frames", "height", "width"), [(2, 8, 8), (24, 33, 65), (3, 100, 20), (64, 64, 128)])
def test_any_size(frames, height, width):
    found = SyntheticVideo(frames=frames, height=height, width=width).draw()
    assert found.shape == (frames, height, width, 3)
    assert found.dtype == np.uint8
    assert found.std() > 5


@pytest.mark.parametrize("seed", range(5))
def test_motion_is_smooth_and_everywhere_in_time(seed):
    found = SyntheticVideo(frames=48, height=64, width=128, seed=seed).draw()
    steps = [psnr(a, b) for a, b in pairwise(found)]
    assert min(steps) > 15
    assert max(steps) < 45  # no frame is like the one before it
    far = [psnr(found[i], found[i + 24]) for i in range(24)]
    assert np.mean(far) < np.mean(steps) - 3
    # A frame between two others is nearer to both than they are to one another.
    assert np.mean([psnr(a, b) for a, b in zip(found, found[2:], strict=False)]) < np.mean(steps)


def test_another_size_shows_the_same_scene():
    small = SyntheticVideo(frames=3, height=64, width=128).draw()
    large = SyntheticVideo(frames=3, height=192, width=384).draw()
    assert psnr(shrink(large[1], 3), small[1]) > 32


def test_more_frames_show_the_same_scene_slower():
    few, many = SyntheticVideo(frames=5).draw(), SyntheticVideo(frames=9).draw()
    np.testing.assert_array_equal(few, many[::2])


def test_one_more_shape_leaves_the_others():
    some, more = SyntheticVideo(frames=2, shapes=3).draw(), SyntheticVideo(frames=2, shapes=4).draw()
    changed = (some != more).any(-1).mean()
    assert 0 < changed < 0.2
    assert SyntheticVideo(frames=2, shapes=0).draw().std() > 5


def test_texture_is_detail():
    def detail(texture):
        frames = SyntheticVideo(frames=3, texture=texture).draw().astype(float)
        return np.abs(np.diff(frames, axis=2)).mean()

    assert detail(0.0) < detail(0.5) < detail(1.0)


def test_edges_are_smooth():
    """A hard edge would jump from one colour to the other between two pixels; here most edges have one between."""
    frame = SyntheticVideo(frames=2, shapes=1, texture=0.0, height=200, width=200).draw()[0].astype(int)
    plain = SyntheticVideo(frames=2, shapes=0, texture=0.0, height=200, width=200).draw()[0].astype(int)
    change = np.abs(frame - plain).sum(-1)
    inside = change > 0.9 * np.median(change[change > 3])
    partly = (change > 3) & ~inside
    assert 0.3 * np.sqrt(inside.sum()) < partly.sum() < inside.sum()


def test_an_mp4_of_the_scene(tmp_path):
    scene = SyntheticVideo(frames=6, height=64, width=96)
    found, facts = read_video(scene.write(tmp_path / "scene.mp4"))
    assert psnr(found, scene.draw()) > 28
    assert (facts.size, facts.count, facts.fps) == (scene.facts().size, scene.facts().count, scene.facts().fps)


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"frames": 1}, "frames is 1"),
        ({"height": 7}, "height is 7"),
        ({"width": 0}, "width is 0"),
        ({"shapes": -1}, "shapes is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"texture": 1.5}, "texture is 1.5"),
        ({"texture": float("nan")}, "texture is nan"),
        ({"fps": 0.0}, "fps is 0.0"),
    ],
)
def test_values_out_of_range_are_refused(values, part):
    refused(lambda: SyntheticVideo(**values), "synthetic video", part)
