"""Where decoded images live: each is read and letterboxed once, as uint8, and found again by a hash of what made it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_landmarks.geometry import Letterbox
from lit_landmarks.samples import LandmarkSample

log = logging.getLogger(__name__)
VERSION = 1  # raise it when preprocessing changes: old caches are then left alone


@dataclass(frozen=True, slots=True)
class Prepared:
    """One split, decoded and letterboxed.

    Attributes:
        images: (N, C, H, W) uint8, in memory or mapped from the cache file.
        matrices: (N, 3, 3) float64, original pixels to frame pixels.
        targets: (N, K, 2) float64, original pixels, NaN where missing.
        spacing: (N, 2) float64, mm per original pixel along x and y, NaN where unknown.
        names: N identifiers.
        sizes: (N, 2) original heights and widths.
    """

    images: NDArray[np.uint8]
    matrices: NDArray[np.float64]
    targets: NDArray[np.float64]
    spacing: NDArray[np.float64]
    names: list[str]
    sizes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.names)

    def points(self) -> Tensor:
        """(N, K, 2) float32 landmarks in frame pixels."""
        homogeneous = np.concatenate((self.targets, np.ones_like(self.targets[..., :1])), axis=-1)
        moved = np.einsum("nij,nkj->nki", self.matrices, homogeneous)[..., :2]
        return torch.from_numpy(np.ascontiguousarray(moved, dtype=np.float32))


def prepare(
    samples: Sequence[LandmarkSample],
    size: tuple[int, int],
    channels: int,
    cache_dir: Path | None,
    *,
    in_memory: bool = True,
    threads: int | None = None,
) -> Prepared:
    """Decode and letterbox every sample, or map what an earlier run left in the cache.

    Args:
        samples: What to read.
        size: (H, W) of the frame.
        channels: 1 or 3.
        cache_dir: Folder of the cache; None keeps nothing on disk.
        in_memory: Read the whole array into memory instead of mapping the cache file.
        threads: Decoding threads; OpenCV lets them run in parallel.

    Raises:
        InputError: an image cannot be read.
    """
    key = hashlib.sha256(
        json.dumps([VERSION, list(size), channels, [s.stamp() for s in samples]], sort_keys=True).encode()
    ).hexdigest()[:24]
    path = cache_dir / f"{key}.npy" if cache_dir is not None and samples else None
    sizes_path = path.with_suffix(".sizes.npy") if path is not None else None
    images: NDArray[np.uint8] | None = None
    sizes: NDArray[np.int64] | None = None
    if path is not None and sizes_path is not None and path.is_file() and sizes_path.is_file():
        try:
            images, sizes = np.load(path, mmap_mode=None if in_memory else "r"), np.load(sizes_path)
        except (ValueError, EOFError, OSError):
            images = None  # a damaged cache is only a lost minute
        if images is not None and (images.shape, sizes.shape if sizes is not None else None) != (
            (len(samples), channels, *size),
            (len(samples), 2),
        ):
            images = None
    if images is None or sizes is None:
        images, sizes = _decode(samples, size, channels, threads)
        if path is not None and sizes_path is not None:
            _save(sizes_path, sizes)
            if _save(path, images) and not in_memory:
                images = np.load(path, mmap_mode="r")
    assert images is not None
    num_landmarks = len(samples[0].points) if samples else 0
    return Prepared(
        images=images,
        matrices=np.stack([Letterbox((int(h), int(w)), size).matrix for h, w in sizes])
        if samples
        else np.zeros((0, 3, 3)),
        targets=np.stack([s.points for s in samples]) if samples else np.zeros((0, num_landmarks, 2)),
        spacing=np.array([s.spacing or (np.nan, np.nan) for s in samples], np.float64).reshape(-1, 2),
        names=[s.name for s in samples],
        sizes=sizes,
    )


def _decode(
    samples: Sequence[LandmarkSample], size: tuple[int, int], channels: int, threads: int | None
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    images = np.zeros((len(samples), channels, *size), np.uint8)
    sizes = np.zeros((len(samples), 2), np.int64)

    def one(index: int) -> None:
        image = samples[index].read_image(channels)
        sizes[index] = image.shape[1:]
        images[index] = Letterbox((image.shape[1], image.shape[2]), size).apply(image)

    with ThreadPoolExecutor(threads or min(16, os.cpu_count() or 1)) as pool:
        for _ in pool.map(one, range(len(samples))):  # consuming the results is what raises a worker's exception
            pass
    return images, sizes


def _save(path: Path, array: NDArray) -> bool:
    """Write atomically; a full or read-only disk costs the cache, never the run."""
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            np.save(file, array)
        Path(temporary).replace(path)
    except OSError as error:
        log.warning("no image cache at %s (%s); decoding again next time", path.parent, error)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        return False
    return True
