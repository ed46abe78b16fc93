"""Where the frames of a video live: decoded once into a cache, then on the device, in memory, or mapped."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from lit_cli.errors import InputError
from lit_common.store import Store, choose_store
from lit_patchnerf.patches import Geometry, plan_geometry
from lit_patchnerf.video import Source, VideoFacts, collect, open_source

__all__ = ["PreparedVideo", "from_frames", "place_frames", "prepare_video"]

log = logging.getLogger(__name__)

VERSION = 1  # raise it when decoding or placing changes: old caches are then left alone
Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class PreparedVideo:
    """A video's frames on the canvas that its patches tile.

    Attributes:
        frames: (T, rows * h, cols * w, 3) uint8 RGB, in memory or mapped from the cache.
        geometry: How they were cropped and padded, and the grid.
        facts: Of the video.
        cache: File that they are mapped from, or None.
    """

    frames: Frames
    geometry: Geometry
    facts: VideoFacts
    cache: Path | None = None


def prepare_video(
    path: str | Path,
    crop: Sequence[int] | None = None,
    patch: Sequence[int] | None = None,
    grid: Sequence[int] | None = None,
    *,
    limit: int | None = None,
    fps: float | None = None,
    cache_dir: Path | None = None,
) -> PreparedVideo:
    """Read, crop and pad a video, or map what an earlier run left in the cache.

    The cache is found again by a hash of the video (see `Source.digest`; for a folder the times of its files as well),
    the crop and padding, the limit and the version of OpenCV; another grid on the same canvas shares it. A damaged
    cache is made anew, and a full or read-only disk costs the cache, never the run.

    Args:
        path: A file that OpenCV decodes, or a folder of images.
        crop: See `plan_geometry`, as for patch and grid.
        patch: Patch size.
        grid: Rows and columns.
        limit: Read so many frames at most, from the first one on.
        fps: Frames per second, over what the file says.
        cache_dir: Folder of the cache; None keeps nothing on disk.

    Raises:
        InputError: the video cannot be read, or the geometry is impossible.
    """
    if limit is not None and limit < 2:
        raise InputError(f"data.limit is {limit}, expected at least 2 frames")
    source = open_source(path, fps)
    geometry = plan_geometry(source.size, crop, patch, grid)
    placed = (geometry.place(frame) for frame in source.frames(limit))
    if cache_dir is not None:
        file = cache_dir / f"{_key(source, geometry, limit)}.npy"
        frames = _load(file, geometry)
        if frames is None and _save(file, placed, geometry):
            frames = _load(file, geometry)
        if frames is not None:
            return PreparedVideo(frames, geometry, source.facts(len(frames)), file)
        placed = (geometry.place(frame) for frame in source.frames(limit))  # some may have been taken
    frames = collect(source, placed, limit)
    return PreparedVideo(frames, geometry, source.facts(len(frames)))


def from_frames(
    frames: Frames,
    facts: VideoFacts,
    crop: Sequence[int] | None = None,
    patch: Sequence[int] | None = None,
    grid: Sequence[int] | None = None,
) -> PreparedVideo:
    """The same for frames (T, H, W, 3) in memory, such as a drawn scene.

    Example:
        >>> facts = VideoFacts("noise", (30, 40), 3, 25.0, "")
        >>> from_frames(np.zeros((3, 30, 40, 3), np.uint8), facts, grid=(2, 3)).frames.shape
        (3, 30, 42, 3)
    """
    geometry = plan_geometry(frames.shape[1:3], crop, patch, grid)
    return PreparedVideo(np.ascontiguousarray(geometry.place(frames)), geometry, facts)


def place_frames(video: PreparedVideo, store: Store, device: torch.device) -> Tensor:
    """The frames as a tensor: on the device, in memory, or mapped.

    Args:
        video: Prepared frames.
        store: `gpu` for the device, `ram`, `disk` for a mapped file, or `auto` for the first of them that they fit in.
        device: That the network is on.

    Returns:
        (T, rows * h, cols * w, 3) uint8; on `device` for `gpu`, else on the CPU. Patches of it are gathered alike.

    Raises:
        InputError: `disk` is wanted, and there is no cache to map.
    """
    where = choose_store(store, video.frames.nbytes, device)
    if where == "disk" and video.cache is None and store == "disk":
        raise InputError("data.store is disk, expected a cache folder in data.cache_dir that can be written")
    frames = video.frames
    if where != "disk" and isinstance(frames, np.memmap) and (where == "ram" or device.type == "cpu"):
        frames = np.array(frames)
    tensor = torch.from_numpy(frames)
    return tensor.to(device) if where == "gpu" else tensor


def _key(source: Source, geometry: Geometry, limit: int | None) -> str:
    stamps = [path.stat().st_mtime_ns for path in source.images]
    place = [geometry.frame, geometry.crop, geometry.corner, geometry.pad, geometry.canvas]
    text = json.dumps([VERSION, cv2.__version__, source.digest(), stamps, place, limit])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _load(file: Path, geometry: Geometry) -> Frames | None:
    """Cached frames; None if there are none or they are damaged, which only costs the time to make them again."""
    try:
        # Copy on write: the file stays as it is, and torch does not warn of an array that cannot be written.
        frames = np.load(file, mmap_mode="c")
    except (OSError, ValueError, EOFError):
        return None
    fits = frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[1:] == (*geometry.canvas, 3)
    return frames if fits and len(frames) else None


def _save(file: Path, frames: Iterator[Frames], geometry: Geometry) -> bool:
    """Write frames as they come, none of them kept in memory; whether that worked."""
    temporary: str | None = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
        with os.fdopen(handle, "wb") as out:
            shape = geometry.canvas
            start, count = _header(out, 0, shape), 0
            for frame in frames:
                out.write(np.ascontiguousarray(frame).data)
                count += 1
            # The count is known only now; numpy leaves room in the header for a first axis that grows.
            out.seek(0)
            if _header(out, count, shape) != start:
                raise OSError("the header of the array changed its length")
        Path(temporary).replace(file)
    except OSError as error:
        log.warning("no cache of frames at %s (%s); decoding again next time", file.parent, error)
        return False
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    return True


def _header(out: BinaryIO, count: int, canvas: tuple[int, int]) -> int:
    values: dict[str, Any] = {"descr": "|u1", "fortran_order": False, "shape": (count, *canvas, 3)}
    npy.write_array_header_1_0(out, values)
    return out.tell()
