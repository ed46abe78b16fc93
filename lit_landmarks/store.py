"""Where decoded images live: each is read and letterboxed once, as uint8, and found again by a hash of what made it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_common.images import cached_images, decode_all
from lit_landmarks.geometry import Letterbox
from lit_landmarks.samples import LandmarkSample

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

    def one(i: int) -> tuple[NDArray[np.uint8], tuple[int, int]]:
        image = samples[i].read_image(channels)
        return Letterbox((image.shape[1], image.shape[2]), size).apply(image), (image.shape[1], image.shape[2])

    path = cache_dir / f"{key}.npy" if cache_dir is not None and samples else None
    shape = (channels, *size)
    decode = partial(decode_all, len(samples), shape, one, threads)
    images, sizes = cached_images(path, (len(samples), *shape), decode, in_memory=in_memory)
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
