import hashlib
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from lit_patchnerf.video import (
    VideoWriter,
    collect,
    open_source,
    read_video,
    write_frames,
    write_video,
)
from tests.helpers.errors import refused


def smooth(count: int = 6, height: int = 32, width: int = 48) -> np.ndarray:
    """(T, H, W, 3) frames that a lossy codec nearly keeps; each has its own brightness, and red is strongest."""
    t, y, x = np.meshgrid(np.arange(count), np.arange(height), np.arange(width), indexing="ij")
    return np.stack([120 + 15 * t + x, 60 + y + 0 * t, 30 + 5 * t], -1).astype(np.uint8)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


# ---- Folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_comes_back_without_loss_and_in_natural_order(tmp_path):
    frames = noise(12, 9, 14, 3)
    for i, frame in enumerate(frames):
        cv2.imwrite(str(tmp_path / f"frame{i + 1}.png"), frame[:, :, ::-1])  # frame10 comes after frame9
    (tmp_path / "._frame1.png").write_bytes(b"of macOS")
    (tmp_path / "notes.txt").write_text("no image")
    found, facts = read_video(tmp_path, fps=12)
    np.testing.assert_array_equal(found, frames)
    assert (facts.size, facts.count, facts.fps, facts.path) == ((9, 14), 12, 12, str(tmp_path))
    assert open_source(tmp_path).fps == 25


def test_digest_of_a_folder_follows_names_and_sizes(tmp_path):
    paths = write_frames(tmp_path, noise(3, 9, 14, 3))
    text = "\n".join(f"00000{i}.png {paths[i].stat().st_size}" for i in range(3))
    first = open_source(tmp_path).digest()
    assert first == hashlib.sha256(text.encode()).hexdigest()
    paths[2].rename(tmp_path / "000009.png")
    assert open_source(tmp_path).digest() != first


def test_grey_and_transparent_images_become_rgb(tmp_path):
    grey, clear = noise(8, 8), noise(8, 8, 4)
    cv2.imwrite(str(tmp_path / "0.png"), grey)
    cv2.imwrite(str(tmp_path / "1.png"), clear)
    found, _ = read_video(tmp_path)
    np.testing.assert_array_equal(found[0], np.repeat(grey[:, :, None], 3, 2))
    np.testing.assert_array_equal(found[1], clear[:, :, 2::-1])


def test_folders_that_hold_no_video_are_refused(tmp_path):
    refused(lambda: open_source(tmp_path), "data.video: 0 images", "at least 2", ".png")
    write_frames(tmp_path, noise(1, 8, 8, 3))
    refused(lambda: open_source(tmp_path), "1 images", str(tmp_path))


def test_an_image_of_another_size_is_named(tmp_path):
    write_frames(tmp_path, noise(2, 8, 8, 3))
    write_frames(tmp_path, noise(1, 8, 10, 3), first=2)
    refused(lambda: read_video(tmp_path), "data.video", "000002.png has 8x10 pixels", "expected 8x8")
    assert len(read_video(tmp_path, limit=2)[0]) == 2


@pytest.mark.parametrize("content", [b"", b"no image"])
def test_a_damaged_image_is_named(tmp_path, content):
    write_frames(tmp_path, noise(3, 8, 8, 3))
    (tmp_path / "000001.png").write_bytes(content)
    refused(lambda: read_video(tmp_path), "data.video", "000001.png cannot be read", "expected an image")


# ---- Files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 48), (33, 47)])
def test_an_mp4_that_we_wrote_can_be_read(tmp_path, shape):
    frames = smooth(6, *shape)
    path = write_video(tmp_path / "deep" / "clip.mp4", frames, fps=12.5)
    found, facts = read_video(path)
    assert found.shape == (6, shape[0] + shape[0] % 2, shape[1] + shape[1] % 2, 3)
    assert np.abs(found[:, : shape[0], : shape[1]].astype(int) - frames).mean() < 4  # red is not blue
    assert (facts.size, facts.count, facts.fps) == (found.shape[1:3], 6, 12.5)
    assert facts.digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_avi_can_be_read(tmp_path):
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (48, 32))
    for frame in smooth():
        writer.write(frame[:, :, ::-1])
    writer.release()
    found, facts = read_video(path, limit=4, fps=30)
    assert np.abs(found.astype(int) - smooth()[:4]).mean() < 4
    assert (facts.count, facts.fps) == (4, 30)


def test_what_is_no_video_is_refused(tmp_path):
    refused(lambda: open_source(tmp_path / "none.mp4"), "data.video: no such file or folder", "none.mp4")
    (tmp_path / "text.mp4").write_text("no video at all")
    refused(lambda: open_source(tmp_path / "text.mp4"), "text.mp4 is not a video that OpenCV can read")
    (tmp_path / "empty.mp4").touch()
    refused(lambda: open_source(tmp_path / "empty.mp4"), "empty.mp4 is not a video")


def test_a_single_frame_is_refused(tmp_path):
    path = write_video(tmp_path / "still.mp4", smooth(1), fps=5)
    refused(lambda: read_video(path), "still.mp4 has 1 frame", "at least 2")


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_an_impossible_rate_is_refused(tmp_path, fps):
    refused(lambda: open_source(tmp_path, fps=fps), "data.fps", "positive")


def test_a_truncated_file_says_how_much_of_it_was_read(tmp_path):
    path = tmp_path / "cut.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for frame in noise(20, 48, 64, 3):
        writer.write(frame)
    writer.release()
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match="of 20 frames could be read"):
        found, facts = read_video(path)
    assert 2 <= len(found) == facts.count < 19


# ---- Writing ---------------------------------------------------------------------------------------------------------


def test_frames_of_several_sizes_are_not_written(tmp_path):
    with VideoWriter(tmp_path / "clip.mp4", 5) as video:
        video.add(noise(8, 8, 3))
        with pytest.raises(ValueError, match=r"shape \(8, 10, 3\), expected \(8, 8, 3\)"):
            video.add(noise(8, 10, 3))
    assert video.count == 1


def test_a_video_is_finished_when_drawing_fails(tmp_path):
    def frames():
        yield from smooth(3)
        raise RuntimeError("drawing failed")

    with pytest.raises(RuntimeError, match="drawing failed"):
        write_video(tmp_path / "clip.mp4", frames(), 5)
    assert len(read_video(tmp_path / "clip.mp4")[0]) == 3


def test_places_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "file").touch()
    refused(lambda: write_video(tmp_path / "file" / "clip.mp4", smooth(), 5), "cannot write a video", "clip.mp4")
    refused(lambda: write_video(tmp_path / "clip.unknown", smooth(), 5), "cannot write a video", "clip.unknown")


def test_pictures_are_numbered_from_the_first(tmp_path):
    paths = write_frames(tmp_path / "new", noise(2, 8, 8, 3), first=41)
    assert [p.name for p in paths] == ["000041.png", "000042.png"]


# ---- Counting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("promised", [0, 1, 3, 7, 100])
@pytest.mark.parametrize("limit", [None, 3, 50])
def test_a_wrong_promise_costs_no_frame(tmp_path, promised, limit):
    write_frames(tmp_path, noise(2, 8, 8, 3))
    source = open_source(tmp_path)
    object.__setattr__(source, "promised", promised)
    frames = noise(70 if promised == 0 else 40, 4, 5, 3)[:limit]
    np.testing.assert_array_equal(collect(source, iter(frames), limit), frames)


def test_no_frame_is_an_empty_array(tmp_path):
    write_frames(tmp_path, noise(2, 8, 8, 3))
    assert collect(open_source(tmp_path), iter(())).shape == (0, 8, 8, 3)


@pytest.mark.data
def test_big_buck_bunny():
    path = Path(os.environ.get("LIT_DATA", "")) / "bunny" / "bigbuckbunny.mp4"
    if "LIT_DATA" not in os.environ or not path.is_file():
        pytest.skip("LIT_DATA names no folder with bunny/bigbuckbunny.mp4")
    frames, facts = read_video(path)
    assert frames.shape == (132, 720, 1280, 3)
    assert (facts.size, facts.count) == ((720, 1280), 132)
    assert facts.digest == "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd"
