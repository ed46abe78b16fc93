"""Videos in and out: an mp4 or any other file that OpenCV decodes, or a folder of images."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Self

import cv2
import numpy as np
from numpy.typing import NDArray

from lit_cli.errors import InputError
from lit_common.images import save_rgb

__all__ = ["Source", "VideoFacts", "VideoWriter", "collect", "open_source", "read_video", "write_frames", "write_video"]

Frames = NDArray[np.uint8]

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
USUAL_FPS = 25.0  # of a folder, and of a file that names no rate or an impossible one
FEWEST = 2  # frames: one is a picture, and has no time


@dataclass(frozen=True)
class VideoFacts:
    """What is known of a video once all its frames were read.

    Attributes:
        path: The file or folder as it was named.
        size: (height, width) of every frame in pixels.
        count: Frames.
        fps: Frames per second.
        digest: sha256 of the file; of a folder, of the names and byte counts of its images.
    """

    path: str
    size: tuple[int, int]
    count: int
    fps: float
    digest: str


@dataclass(frozen=True)
class Source:
    """A video that was found and whose first frame was read.

    Attributes:
        path: The file or folder.
        size: (height, width) of the first frame, which all others must have.
        fps: Frames per second.
        promised: Frames by the file's header, 0 where it does not say; headers err, so only reading gives the count.
        images: Files of a folder in natural order; none for a video file.
    """

    path: Path
    size: tuple[int, int]
    fps: float
    promised: int
    images: tuple[Path, ...] = ()

    def frames(self, limit: int | None = None) -> Iterator[Frames]:
        """Frames (height, width, 3) uint8 RGB from the first one on, decoded in order.

        Args:
            limit: Most frames that are given.

        Raises:
            InputError: a frame is damaged, or has another size than the first one.
        """
        found = (_read_image(path) for path in self.images) if self.images else _decode(self.path)
        for index, frame in enumerate(islice(found, limit)):
            if frame.shape[:2] != self.size:
                where = self.images[index] if self.images else f"{self.path}: frame {index}"
                height, width = frame.shape[:2]
                raise InputError(
                    f"data.video: {where} has {height}x{width} pixels, expected {self.size[0]}x{self.size[1]} as the "
                    "first frame has"
                )
            yield frame

    def digest(self) -> str:
        """Sha256 of the file; of a folder, of the names and byte counts of its images."""
        if not self.images:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        text = "\n".join(f"{path.name} {path.stat().st_size}" for path in self.images)
        return hashlib.sha256(text.encode()).hexdigest()

    def facts(self, count: int) -> VideoFacts:
        """The facts, once so many frames were read.

        Raises:
            InputError: there are fewer than 2.
        """
        if count < FEWEST:
            raise InputError(f"data.video: {self.path} has {count} frame, expected at least {FEWEST}")
        return VideoFacts(str(self.path), self.size, count, self.fps, self.digest())


def open_source(path: str | Path, fps: float | None = None) -> Source:
    """Find a video and read its first frame.

    Args:
        path: A file that OpenCV decodes, or a folder of images; hidden files are passed over.
        fps: Frames per second, over what the file says; without either, 25.

    Raises:
        InputError: there is nothing, no video, no image, or fewer than 2 of them.
    """
    path = Path(path)
    if fps is not None and not 0 < fps < math.inf:
        raise InputError(f"data.fps is {fps}, expected a positive number")
    if path.is_dir():
        images = _find_images(path)
        height, width = _read_image(images[0]).shape[:2]
        return Source(path, (height, width), fps or USUAL_FPS, len(images), images)
    if not path.is_file():
        raise InputError(f"data.video: no such file or folder {path}, expected a video or a folder of images")
    capture = _open(path)
    try:
        done, first = capture.read()
        if not done or first is None:
            raise InputError(f"data.video: {path} has no frame that OpenCV can read, expected a video")
        rate, promised = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
    finally:
        capture.release()
    rate = rate if math.isfinite(rate) and 0 < rate <= 1000 else USUAL_FPS
    count = int(promised) if math.isfinite(promised) and 0 < promised < 1e9 else 0
    return Source(path, (first.shape[0], first.shape[1]), fps or rate, count)


def read_video(path: str | Path, limit: int | None = None, fps: float | None = None) -> tuple[Frames, VideoFacts]:
    """All frames of a video in memory, as they are in the file.

    Args:
        path: A file that OpenCV decodes, or a folder of images in natural order.
        limit: Read so many frames at most.
        fps: Frames per second, over what the file says.

    Returns:
        Frames (T, H, W, 3) uint8 RGB and the facts.

    Raises:
        InputError: no video, fewer than 2 frames, or frames of several sizes.
    """
    source = open_source(path, fps)
    frames = collect(source, source.frames(limit), limit)
    return frames, source.facts(len(frames))


def collect(source: Source, frames: Iterable[Frames], limit: int | None = None) -> Frames:
    """Put frames of a source, perhaps cropped, into one array (T, ...) without holding them twice.

    Args:
        source: Where they come from; its promised count says how much room to make.
        frames: All of one shape.
        limit: The most that will come.
    """
    room = min(source.promised or 64, limit or math.inf)
    array: Frames | None = None
    count = 0
    for frame in frames:
        if array is None:
            array = np.empty((int(room), *frame.shape), np.uint8)
        elif count == len(array):  # the header promised too few
            array = np.concatenate([array, np.empty((max(16, count // 2), *frame.shape), np.uint8)])
        array[count] = frame
        count += 1
    return np.empty((0, *source.size, 3), np.uint8) if array is None else array[:count]


class VideoWriter:
    """An mp4 that grows by a frame at a time; use it in a `with` block, so that the file is finished.

    A row or column is repeated where a side is odd, since the codec halves the resolution of the colours.

    Args:
        path: The file, ending in .mp4.
        fps: Frames per second.

    Raises:
        InputError: OpenCV cannot write the file.
    """

    def __init__(self, path: str | Path, fps: float) -> None:
        self.path, self.fps, self.count = Path(path), fps, 0
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)

    def add(self, frame: Frames) -> None:
        """Append a frame (H, W, 3) RGB; all must have the size of the first one."""
        if self._writer is None:
            self._size = frame.shape[0], frame.shape[1]
            self._writer = self._begin()
        if frame.shape != (*self._size, 3):
            raise ValueError(f"{self.path}: a frame of shape {frame.shape}, expected {(*self._size, 3)}")
        below, beside = self._size[0] % 2, self._size[1] % 2
        even = np.pad(frame, ((0, below), (0, beside), (0, 0)), mode="edge") if below or beside else frame
        self._writer.write(np.ascontiguousarray(even[:, :, ::-1]))
        self.count += 1

    def _begin(self) -> cv2.VideoWriter:
        height, width = (side + side % 2 for side in self._size)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write a video to {self.path}: {error.strerror}") from error
        codec = cv2.VideoWriter.fourcc(*"mp4v")
        writer = cv2.VideoWriter(str(self.path), cv2.CAP_FFMPEG, codec, self.fps, (width, height))
        if not writer.isOpened():
            raise InputError(f"OpenCV cannot write a video to {self.path}, expected a writable path that ends in .mp4")
        return writer

    def close(self) -> None:
        """Write the index, without which no player opens the file."""
        if self._writer is not None:
            self._writer.release()
        self._writer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_video(path: str | Path, frames: Iterable[Frames], fps: float) -> Path:
    """Write frames (H, W, 3) uint8 RGB as an mp4 and give its path; the codec is lossy.

    Raises:
        InputError: OpenCV cannot write the file.
    """
    with VideoWriter(path, fps) as video:
        for frame in frames:
            video.add(frame)
    return video.path


def write_frames(folder: str | Path, frames: Iterable[Frames], first: int = 0) -> list[Path]:
    """Write frames (H, W, 3) uint8 RGB as `000000.png` and so on, without loss.

    Args:
        folder: Where to; it is made.
        frames: The frames.
        first: Number of the first one.

    Raises:
        OSError: a picture cannot be written.
    """
    paths = []
    for number, frame in enumerate(frames, first):
        paths.append(Path(folder) / f"{number:06d}.png")
        save_rgb(paths[-1], frame)
    return paths


def _find_images(folder: Path) -> tuple[Path, ...]:
    found = [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.name[0] != "." and p.is_file()]
    if len(found) < FEWEST:
        raise InputError(
            f"data.video: {len(found)} images in {folder}, expected at least {FEWEST} "
            f"({' '.join(sorted(IMAGE_SUFFIXES))})"
        )
    return tuple(sorted(found, key=_natural_key))


def _natural_key(path: Path) -> tuple[list[tuple[float, str]], str]:
    # 2.png before 10.png; the name itself comes last and orders 1.png and 01.png, which are equal as numbers.
    parts = re.findall(r"\d+|\D+", path.name)
    return [(int(p), "") if p.isdecimal() else (math.inf, p.lower()) for p in parts], path.name


def _read_image(path: Path) -> Frames:
    try:
        image = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    except (OSError, cv2.error):  # an empty file is an error of OpenCV's
        image = None
    if image is None:
        raise InputError(f"data.video: {path} cannot be read, expected an image")
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), np.uint8)


def _open(path: Path) -> cv2.VideoCapture:
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    if not capture.isOpened():
        raise InputError(f"data.video: {path} is not a video that OpenCV can read, expected mp4, avi, mkv, mov or webm")
    return capture


def _decode(path: Path) -> Iterator[Frames]:
    capture, count = _open(path), 0
    try:
        promised = capture.get(cv2.CAP_PROP_FRAME_COUNT)
        while True:
            done, frame = capture.read()
            if not done or frame is None:
                break
            count += 1
            code = cv2.COLOR_BGR2RGB if frame.ndim == 3 else cv2.COLOR_GRAY2RGB
            yield np.asarray(cv2.cvtColor(frame, code), np.uint8)
        if count < promised - 1:  # the count of a header is often off by one
            # Here, since who decodes a file needs nothing that trains.
            from lightning.pytorch.utilities import rank_zero_warn

            rank_zero_warn(f"{path}: {count} of {int(promised)} frames could be read", category=UserWarning)
    finally:
        capture.release()
