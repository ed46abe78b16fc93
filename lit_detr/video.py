"""Videos to predict on: read once, in order, a few batches ahead of the network and never as a whole."""

from __future__ import annotations

import math
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import cv2
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor

from lit_cli.errors import InputError
from lit_detr.augment import Boxes
from lit_detr.samples import DetectionSample
from lit_detr.store import DetectionBatch, Prepared, fit_frame, read_image

__all__ = [
    "Clip",
    "Frame",
    "FrameReader",
    "Stream",
    "StreamLoader",
    "find_videos",
    "is_video",
    "open_clip",
    "read_ahead",
]

T = TypeVar("T")

PER_SOURCE = 10**9  # positions of a file's frames begin at a multiple of it: nobody knows how many there will be
USUAL_FPS = 25.0  # of a file that names no rate, or an impossible one
SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"}  # what claims to be a video, whatever is in it

_ISO_BOXES = {b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"}  # one of them begins an mp4 or a mov
_ISO_IMAGES = {b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1", b"jxl "}


@dataclass(frozen=True)
class Clip(DetectionSample):
    """A video. `name` is its path below the folder, `size` that of its frames.

    Attributes:
        fps: Frames per second.
        frames: How many its header promises; 0 where it does not.
    """

    fps: float
    frames: int


@dataclass(frozen=True)
class Frame(Clip):
    """One frame of a video. `name` has the frame's number, `image` is the video's file.

    Attributes:
        clip: Name of the video.
        index: From 0.
        time: In seconds, by the file's clock.
    """

    clip: str
    index: int
    time: float


def is_video(path: Path) -> bool:
    """Whether a file is an mp4, mov, avi, mkv or webm by its first bytes, or claims to be one by its name.

    Example:
        >>> is_video(Path("nowhere/flight.MP4")), is_video(Path(__file__))
        (True, False)
    """
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        with path.open("rb") as file:
            head = file.read(12)
    except OSError:
        return False
    if head[:4] == b"RIFF":
        return head[8:12] == b"AVI "
    if head[:4] == b"\x1a\x45\xdf\xa3":  # Matroska and WebM
        return True
    return head[4:8] in _ISO_BOXES and head[8:12] not in _ISO_IMAGES


def find_videos(folder: Path) -> list[Path]:
    """The videos of a folder and of the folders in it, in order; hidden files are passed over."""
    found: list[Path] = []
    for place, _, names in os.walk(folder, followlinks=True):
        found += [path for n in names if n[0] != "." and is_video(path := Path(place, n))]
    return sorted(found)


def open_clip(path: Path, name: str, image_id: int) -> Clip:
    """Look into a video: its first frame is read.

    Raises:
        InputError: it cannot be read.
    """
    capture = _open(path)
    try:
        done, first = capture.read()
        if not done or first is None:
            raise InputError(f"{path}: a video without a frame that OpenCV can read")
        fps, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
    finally:
        capture.release()
    empty = np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, bool)
    return Clip(
        name,
        path,
        *empty,
        size=(first.shape[0], first.shape[1]),
        image_id=image_id,
        group=name,
        fps=fps if math.isfinite(fps) and 0 < fps <= 1000 else USUAL_FPS,
        frames=int(count) if math.isfinite(count) and 0 < count < PER_SOURCE else 0,
    )


def _open(path: Path) -> cv2.VideoCapture:
    if not path.is_file():
        raise InputError(f"{path}: no such video")
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    if not capture.isOpened():
        raise InputError(f"{path}: not a video that OpenCV can read")
    return capture


class FrameReader:
    """Frames of one video after another, forward only; going back opens it anew.

    A seek would land on another frame in many files, so what lies between is decoded and dropped.

    Args:
        channels: 1 or 3.
    """

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self._capture: cv2.VideoCapture | None = None
        self._path: Path | None = None
        self._next = 0
        self._last: tuple[int, NDArray[np.uint8], float] | None = None

    def read(self, clip: Clip, index: int) -> tuple[NDArray[np.uint8], float] | None:
        """(H, W, C) uint8 RGB or grey of a frame, and its time in seconds; None behind the last one.

        Raises:
            InputError: the video cannot be opened, or the frame has another size than the first one.
        """
        if self._path != clip.image or index < self._next - 1:
            self.close()
            self._capture, self._path = _open(clip.image), clip.image
        assert self._capture is not None
        if self._last is not None and self._last[0] == index:
            return self._last[1:]
        while self._next < index:
            if not self._capture.grab():
                return None
            self._next += 1
        done, found = self._capture.read()
        if not done or found is None:
            return None
        frame: Any = found
        if frame.shape[:2] != clip.size:
            raise InputError(
                f"{clip.image}: frame {index} has {frame.shape[0]} x {frame.shape[1]} pixels, the first one "
                f"{clip.size[0]} x {clip.size[1]}"  # type: ignore[index]
            )
        if self.channels == 1:
            frame = (cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY) if frame.ndim == 3 else frame)[:, :, None]
        else:
            frame = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB if frame.ndim == 3 else cv2.COLOR_GRAY2RGB)
        # The file's own clock where it runs: recordings of a screen or a phone have no constant rate.
        time = float(self._capture.get(cv2.CAP_PROP_POS_MSEC)) / 1000
        if index and not (math.isfinite(time) and time > 0):
            time = index / clip.fps
        self._next = index + 1
        self._last = (index, frame, time)
        return frame, time

    def close(self) -> None:
        """Let the file go."""
        if self._capture is not None:
            self._capture.release()
        self._capture = self._path = self._last = None
        self._next = 0


class _Lookup(Generic[T]):
    """A list whose items are made when asked for, by their position."""

    def __init__(self, get: Callable[[int], T]) -> None:
        self.get = get

    def __getitem__(self, position: int) -> T:
        return self.get(int(position))


class Stream(Prepared):
    """Videos and images in order. A frame's position is `PER_SOURCE` times its file's, plus its index.

    It stands where the decoded images of a split do, but holds none: of the frames that were read it keeps the times.

    Args:
        sources: Clips and images.
        frame: (height, width) that everything is fitted into.
        channels: 1 or 3.
    """

    def __init__(self, sources: Sequence[DetectionSample], frame: tuple[int, int], channels: int) -> None:
        scales, sizes, samples = (_Lookup(get) for get in (self._scale, self._size, self._sample))
        empty: Any = {"images": np.zeros((0, channels, *frame), np.uint8), "scales": scales, "sizes": sizes}
        super().__init__(**empty, samples=samples)  # type: ignore[arg-type]
        # An id tells images and frames of one folder apart.
        sources = [replace(s, image_id=i * PER_SOURCE) for i, s in enumerate(sources)]
        # The parent is frozen, and these are not fields of it.
        self.__dict__.update(sources=sources, frame=frame, channels=channels)
        self.__dict__.update(times=[np.zeros(0) for _ in sources], image_sizes={})

    sources: list[DetectionSample]
    frame: tuple[int, int]
    channels: int
    times: list[NDArray[np.float64]]
    image_sizes: dict[int, tuple[int, int]]

    def _source(self, position: int) -> tuple[DetectionSample, int]:
        number, index = divmod(position, PER_SOURCE)
        return self.sources[number], index

    def _sample(self, position: int) -> DetectionSample:
        source, index = self._source(position)
        if not isinstance(source, Clip):
            return source
        known = self.times[position // PER_SOURCE]
        own = {f.name: getattr(source, f.name) for f in fields(Clip)}
        own |= {"name": f"{source.name}#{index:06d}", "image_id": position}
        time = float(known[index]) if index < len(known) else index / source.fps
        return Frame(**own, clip=source.name, index=index, time=time)

    def _size(self, position: int) -> NDArray[np.int64]:
        source = self._source(position)[0]
        return np.array(source.size if isinstance(source, Clip) else self.image_sizes[position // PER_SOURCE])

    def _scale(self, position: int) -> float:
        height, width = self._size(position)
        return min(self.frame[0] / height, self.frame[1] / width)

    def _keep_time(self, number: int, index: int, time: float) -> None:
        known = self.times[number]
        if index >= len(known):  # doubled, so that a long video does not copy its times again and again
            self.times[number] = known = np.concatenate([known, np.zeros(max(256, len(known)))])
        known[index] = time

    def frames(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, NDArray[np.uint8] | None]]:
        """Positions of all frames and images, in order, with the pixels of those whose number is wanted.

        Args:
            wanted: Of the running number, from 0.
        """
        reader, running = FrameReader(self.channels), 0
        try:
            for number, source in enumerate(self.sources):
                if not isinstance(source, Clip):
                    image = read_image(source, self.channels) if wanted(running) else None
                    if image is not None:
                        self.image_sizes[number] = (image.shape[0], image.shape[1])
                    yield number * PER_SOURCE, image
                    running += 1
                    continue
                index = 0
                # Frames of other processes are decoded as well, since every frame needs the one before it.
                while (found := reader.read(source, index)) is not None:
                    self._keep_time(number, index, found[1])
                    yield number * PER_SOURCE + index, found[0] if wanted(running) else None
                    index, running = index + 1, running + 1
                if index < source.frames - 1:  # the count of a header is often off by one
                    text = f"{source.image}: {index} of {source.frames} frames could be read"
                    rank_zero_warn(text, category=UserWarning)
        finally:
            reader.close()

    def batches(self, size: int, rank: int = 0, world: int = 1) -> Iterator[DetectionBatch]:
        """Batches of a process: every world-th one.

        Args:
            size: Frames per batch.
            rank: This process.
            world: Number of processes.
        """
        which: list[int] = []
        images: list[NDArray[np.uint8]] = []

        def batch() -> DetectionBatch:
            found = DetectionBatch(
                torch.from_numpy(np.stack(images)),
                [Boxes(np.zeros((0, 4), np.float32), np.zeros(0, np.int64)) for _ in which],
                torch.from_numpy(np.stack([self._content(i) for i in which])),
                torch.tensor(which),
                torch.tensor(0),
            )
            which.clear()
            images.clear()
            return found

        for position, image in self.frames(lambda n: n // size % world == rank):
            if image is not None:
                which.append(position)
                images.append(fit_frame(image, self.frame)[0])
            if len(which) == size:
                yield batch()
        if which:
            yield batch()

    def _content(self, position: int) -> NDArray[np.int64]:
        return np.maximum(1, np.rint(self._size(position) * self._scale(position))).astype(np.int64)


class StreamLoader:
    """Batches of a stream, read by a thread ahead of the network.

    Args:
        stream: What is read.
        size: Frames per batch.
        ahead: Batches that wait at most; 0 reads when asked.
        pin: Page-locked batches.
        rank: This process.
        world: Number of processes.
    """

    def __init__(self, stream: Stream, size: int, *, ahead: int, pin: bool, rank: int = 0, world: int = 1) -> None:
        self.stream, self.size, self.ahead, self.pin = stream, size, ahead, pin
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[DetectionBatch]:
        batches = self.stream.batches(self.size, self.rank, self.world)
        if self.pin:
            batches = (b._replace(image=_pinned(b.image)) for b in batches)
        return read_ahead(batches, self.ahead) if self.ahead else batches


def _pinned(image: Tensor) -> Tensor:
    return image.pin_memory()


def read_ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """The same items, up to `count` of them made by a thread before they are asked for.

    What goes wrong there is raised here; a consumer that stops early ends the thread.

    Example:
        >>> list(read_ahead(iter(range(4)), 2))
        [0, 1, 2, 3]
    """
    waiting: queue.Queue[tuple[T | None, BaseException | None, bool]] = queue.Queue(count)
    stopped = threading.Event()

    def put(entry: tuple[T | None, BaseException | None, bool]) -> bool:
        while not stopped.is_set():
            try:
                waiting.put(entry, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item, None, False)):
                    return
            put((None, None, True))
        except BaseException as error:
            put((None, error, True))
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()

    thread = threading.Thread(target=work, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error, last = waiting.get()
            if error is not None:
                raise error
            if last:
                return
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        thread.join()
