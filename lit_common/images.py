"""A cache of decoded images: one array a split, found again by a hash of what made it."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["cached_images", "decode_all", "save_array", "save_rgb"]

log = logging.getLogger(__name__)
Images = NDArray[np.uint8]
Sizes = NDArray[np.int64]


def cached_images(
    path: Path | None, shape: tuple[int, ...], decode: Callable[[], tuple[Images, Sizes]], *, in_memory: bool
) -> tuple[Images, Sizes]:
    """Decoded images from the cache, or decoded now and left there.

    Args:
        path: The cache file, ending in .npy; a second one beside it holds the sizes. None for no cache.
        shape: Of all images together.
        decode: Gives them, and the (N, 2) original heights and widths.
        in_memory: Read the whole array into memory instead of mapping the file.
    """
    if path is None:
        return decode()
    beside = path.with_suffix(".sizes.npy")
    if path.is_file() and beside.is_file():
        try:
            images, sizes = np.load(path, mmap_mode=None if in_memory else "r"), np.load(beside)
            if images.shape == shape and sizes.shape == (shape[0], 2):
                return images, sizes
        except (ValueError, EOFError, OSError):
            pass  # a damaged cache is only a lost minute
    images, sizes = decode()
    save_array(beside, sizes)
    if save_array(path, images) and not in_memory:
        images = np.load(path, mmap_mode="r")
    return images, sizes


def decode_all(
    count: int, shape: tuple[int, ...], one: Callable[[int], tuple[Images, tuple[int, int]]], threads: int | None = None
) -> tuple[Images, Sizes]:
    """Decode images in threads.

    Args:
        count: How many.
        shape: Of each.
        one: Gives an image and its original height and width; OpenCV lets several run in parallel.
        threads: By default as many as there are cores, 16 at most.
    """
    images, sizes = np.zeros((count, *shape), np.uint8), np.zeros((count, 2), np.int64)

    def fill(i: int) -> None:
        images[i], sizes[i] = one(i)

    with ThreadPoolExecutor(threads or min(16, os.cpu_count() or 1)) as pool:
        for _ in pool.map(fill, range(count)):  # consuming the results is what raises a worker's exception
            pass
    return images, sizes


def save_array(path: Path, array: NDArray) -> bool:
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


def save_rgb(path: Path, image: Images) -> None:
    """Write an RGB picture (H, W, 3).

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), image[:, :, ::-1]):
        raise OSError(f"could not write {path}")
