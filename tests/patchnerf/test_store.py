import os
from dataclasses import replace

import numpy as np
import pytest
import torch

import lit_patchnerf.store
from lit_patchnerf.patches import gather_patches
from lit_patchnerf.store import from_frames, place_frames, prepare_video
from lit_patchnerf.video import VideoFacts, write_frames, write_video
from tests.helpers.errors import refused

CPU = torch.device("cpu")


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def clip(tmp_path):
    """A folder of 5 frames, 18 x 25."""
    write_frames(tmp_path / "clip", noise(5, 18, 25, 3))
    return tmp_path / "clip"


@pytest.fixture
def decodes(monkeypatch):
    """How often frames were decoded."""
    calls = []
    original = lit_patchnerf.store.Source.frames

    def counted(self, limit=None):
        for frame in original(self, limit):
            calls.append(1)
            yield frame

    monkeypatch.setattr(lit_patchnerf.store.Source, "frames", counted)
    return calls


@pytest.mark.parametrize("wanted", [{"grid": (2, 3)}, {"crop": (16, 24), "patch": (8, 8)}])
def test_cached_and_uncached_frames_are_the_placed_ones(clip, tmp_path, decodes, wanted):
    plain = prepare_video(clip, **wanted)
    np.testing.assert_array_equal(plain.frames, plain.geometry.place(noise(5, 18, 25, 3)))
    assert plain.cache is None
    assert plain.facts.count == 5
    first = prepare_video(clip, **wanted, cache_dir=tmp_path / "cache")
    assert len(decodes) == 10
    again = prepare_video(clip, **wanted, cache_dir=tmp_path / "cache")
    assert len(decodes) == 10  # nothing was decoded but the first frame's size
    for found in (first, again):
        np.testing.assert_array_equal(found.frames, plain.frames)
        assert isinstance(found.frames, np.memmap)
        assert (found.geometry, found.facts) == (plain.geometry, plain.facts)
    np.testing.assert_array_equal(np.load(first.cache), plain.frames)  # an ordinary file of numpy's
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [first.cache.name]


def test_what_makes_other_pixels_makes_another_cache(clip, tmp_path, decodes):
    cache = tmp_path / "cache"

    def file(**wanted):
        return prepare_video(clip, **{"grid": (2, 2), **wanted}, cache_dir=cache).cache

    first = file()
    assert file(crop=(16, 24)) != first
    assert file(patch=(8, 8)) != first
    assert file(limit=3) != first
    assert file(grid=(1, 2)) == first  # the same canvas in other patches
    before = len(decodes)
    assert file() == first
    assert len(decodes) == before
    image = clip / "000001.png"
    os.utime(image, ns=(1, 1))  # changed in place, with as many bytes
    second = file()
    assert second != first
    image.unlink()
    assert file() not in (first, second)
    assert len(prepare_video(clip, cache_dir=cache).frames) == 4


def test_a_new_version_leaves_old_caches_alone(clip, tmp_path, monkeypatch):
    first = prepare_video(clip, cache_dir=tmp_path / "cache").cache
    monkeypatch.setattr(lit_patchnerf.store, "VERSION", lit_patchnerf.store.VERSION + 1)
    assert prepare_video(clip, cache_dir=tmp_path / "cache").cache != first


@pytest.mark.parametrize("damage", ["half", "empty", "text", "shape"])
def test_a_damaged_cache_is_made_anew(clip, tmp_path, damage):
    first = prepare_video(clip, cache_dir=tmp_path / "cache")
    expected = np.array(first.frames)
    content = first.cache.read_bytes()
    if damage == "shape":
        np.save(first.cache, expected[:, :-1])
    else:
        first.cache.write_bytes({"half": content[: len(content) // 2], "empty": b"", "text": b"no array"}[damage])
    again = prepare_video(clip, cache_dir=tmp_path / "cache")
    assert again.cache == first.cache
    np.testing.assert_array_equal(again.frames, expected)


def test_a_disk_that_fails_costs_only_the_cache(clip, tmp_path, caplog):
    (tmp_path / "file").touch()
    found = prepare_video(clip, cache_dir=tmp_path / "file" / "cache")
    np.testing.assert_array_equal(found.frames, noise(5, 18, 25, 3))
    assert found.cache is None
    assert "no cache of frames" in caplog.text


def test_a_disk_that_fills_up_costs_only_the_cache(clip, tmp_path, monkeypatch):
    class Full:
        def __init__(self, out):
            self.out = out

        def __call__(self, out, values):
            if values["shape"][0]:
                raise OSError("no space left")
            return self.out(out, values)

    npy = lit_patchnerf.store.npy
    monkeypatch.setattr(npy, "write_array_header_1_0", Full(npy.write_array_header_1_0))
    found = prepare_video(clip, cache_dir=tmp_path / "cache")
    np.testing.assert_array_equal(found.frames, noise(5, 18, 25, 3))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_bad_video_leaves_nothing_in_the_cache(clip, tmp_path):
    (clip / "000003.png").write_bytes(b"no image")
    refused(lambda: prepare_video(clip, cache_dir=tmp_path / "cache"), "000003.png")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_limit_and_a_rate(clip):
    found = prepare_video(clip, limit=3, fps=7)
    assert (len(found.frames), found.facts.count, found.facts.fps) == (3, 3, 7)
    refused(lambda: prepare_video(clip, limit=1), "data.limit is 1", "at least 2")


def test_an_mp4_in_the_cache(tmp_path):
    path = write_video(tmp_path / "clip.mp4", noise(4, 16, 24, 3), 10)
    plain = prepare_video(path, grid=(2, 2))
    found = prepare_video(path, grid=(2, 2), cache_dir=tmp_path / "cache")
    np.testing.assert_array_equal(found.frames, plain.frames)
    path.write_bytes(path.read_bytes() + b"\0")  # the digest is of the content, wherever the file lies
    assert prepare_video(path, grid=(2, 2), cache_dir=tmp_path / "cache").cache != found.cache


# ---- Where they live -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["auto", "gpu", "ram", "disk"])
@pytest.mark.filterwarnings("error")
def test_patches_are_the_same_wherever_the_frames_live(clip, tmp_path, store):
    video = prepare_video(clip, grid=(2, 3), cache_dir=tmp_path / "cache")
    tensor = place_frames(video, store, CPU)
    mapped = tensor.data_ptr() == video.frames.ctypes.data
    assert mapped == (store == "disk")
    index = torch.tensor([29, 0, 7])
    expected = gather_patches(torch.from_numpy(np.array(video.frames)), index, (2, 3))
    assert torch.equal(gather_patches(tensor, index, (2, 3)), expected)


def test_a_write_to_mapped_frames_does_not_reach_the_file(clip, tmp_path):
    video = prepare_video(clip, cache_dir=tmp_path / "cache")
    place_frames(video, "disk", CPU).zero_()
    np.testing.assert_array_equal(np.load(video.cache), noise(5, 18, 25, 3))


def test_mapping_needs_a_cache(clip):
    refused(lambda: place_frames(prepare_video(clip), "disk", CPU), "data.store is disk", "data.cache_dir")


def test_frames_in_memory_are_prepared_alike(clip):
    facts = VideoFacts("drawn", (18, 25), 5, 24.0, "digest")
    found = from_frames(noise(5, 18, 25, 3), facts, crop=(16, 24), grid=(2, 2))
    read = prepare_video(clip, crop=(16, 24), grid=(2, 2))
    np.testing.assert_array_equal(found.frames, read.frames)
    assert found.frames.flags.c_contiguous
    assert found.geometry == read.geometry
    assert place_frames(replace(found), "auto", CPU).shape == (5, 16, 24, 3)
