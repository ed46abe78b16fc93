"""Where decoded images live: each is read and fitted to the frame once, as uint8, and found again by a hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lit_cli.errors import InputError
from lit_common.images import cached_images, decode_all
from lit_detr.augment import Boxes, WorkerAugmentation
from lit_detr.readers import check_size
from lit_detr.samples import DetectionSample

__all__ = [
    "BatchDataset",
    "DetectionBatch",
    "Prepared",
    "ReadImage",
    "Resident",
    "cache_key",
    "fit_frame",
    "prepare",
    "read_image",
]

VERSION = 1  # raise it when preprocessing changes: old caches are then left alone
ReadImage = Callable[[DetectionSample], NDArray[np.uint8]]


class DetectionBatch(NamedTuple):
    """B images in frames of one size; boxes stay on the host until they are final."""

    image: Tensor  # (B, C, H, W) uint8 at rest, float32 from 0 to 1 once augmented
    boxes: list[Boxes]  # in frame pixels
    content: Tensor  # (B, 2) int64 on the host: height and width of the part of the frame that is image
    position: Tensor  # (B,) int64 on the host, in the split
    seed: Tensor  # () int64 on the host: everything random about this batch follows from it


@dataclass(frozen=True)
class Prepared:
    """One split, decoded.

    Attributes:
        images: (N, C, H, W) uint8, in memory or mapped from the cache file; the image at the top left of its frame.
        scales: (N,) frame pixels per image pixel.
        sizes: (N, 2) original heights and widths.
        samples: What the images come from.
    """

    images: NDArray[np.uint8]
    scales: NDArray[np.float64]
    sizes: NDArray[np.int64]
    samples: list[DetectionSample]

    def __len__(self) -> int:
        return len(self.samples)

    def boxes(self, i: int) -> Boxes:
        """Boxes of an image to be trained on, in frame pixels; crowds are left out."""
        sample = self.samples[i]
        own = ~sample.crowd
        return Boxes((sample.boxes[own] * self.scales[i]).astype(np.float32), sample.labels[own])

    @property
    def content(self) -> NDArray[np.int64]:
        """(N, 2) height and width of each image in its frame."""
        return np.maximum(1, np.rint(self.sizes * self.scales[:, None])).astype(np.int64)

    def batch(self, which: NDArray[np.int64], image: Tensor, seed: int) -> DetectionBatch:
        """A batch around images that were fetched already."""
        boxes = [self.boxes(int(i)) for i in which]
        content = torch.from_numpy(self.content[which])
        return DetectionBatch(image, boxes, content, torch.from_numpy(which), torch.tensor(seed))


def read_image(sample: DetectionSample, channels: int) -> NDArray[np.uint8]:
    """(H, W, C) uint8 of a file; 16-bit images are scaled by their own maximum.

    Raises:
        InputError: no such file, damaged, or of another size than the annotation says.
    """
    data = np.fromfile(sample.image, np.uint8) if sample.image.is_file() else None
    if data is None:
        raise InputError(f"{sample.image}: no such image")
    flag = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR
    found: Any = cv2.imdecode(data, flag | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION) if len(data) else None
    if found is None:
        raise InputError(f"{sample.image}: not an image that OpenCV can read")
    deep = found.dtype != np.uint8
    image: NDArray[np.uint8] = (found * (255 / max(1, found.max()))).astype(np.uint8) if deep else found
    check_size(sample, (image.shape[0], image.shape[1]))
    image = image[:, :, None] if image.ndim == 2 else image[:, :, ::-1]  # to RGB
    return np.ascontiguousarray(image)


def fit_frame(image: NDArray[np.uint8], frame: tuple[int, int], scale: float = 0.0) -> tuple[NDArray[np.uint8], float]:
    """Scale an image into a frame, at its top left, black beyond it.

    Args:
        image: (H, W, C).
        frame: (height, width).
        scale: Frame pixels per image pixel; 0 for as many as fit.

    Returns:
        (C, height, width), and frame pixels per image pixel.
    """
    height, width = image.shape[:2]
    scale = scale or min(frame[0] / height, frame[1] / width)
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    if (h, w) != (height, width):
        way = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        resized: Any = cv2.resize(image, (w, h), interpolation=way)
        image = resized.reshape(h, w, image.shape[2])
    out = np.zeros((image.shape[2], *frame), np.uint8)
    out[:, :h, :w] = image.transpose(2, 0, 1)
    return out, scale


def prepare(
    samples: Sequence[DetectionSample],
    frame: tuple[int, int],
    channels: int,
    cache_dir: Path | None,
    *,
    read: ReadImage | None = None,
    in_memory: bool = True,
    threads: int | None = None,
) -> Prepared:
    """Decode every image, or map what an earlier run left in the cache.

    Args:
        samples: What to read.
        frame: (H, W).
        channels: 1 or 3.
        cache_dir: Folder of the cache; None keeps nothing on disk.
        read: Gives (H, W, C) uint8 of a sample; by default its file.
        in_memory: Read the whole array into memory instead of mapping the cache file.
        threads: Decoding threads; OpenCV lets them run in parallel.

    Raises:
        InputError: an image cannot be read.
    """

    def one(i: int) -> tuple[NDArray[np.uint8], tuple[int, int]]:
        image = read(samples[i]) if read is not None else read_image(samples[i], channels)
        return fit_frame(image, frame)[0], (image.shape[0], image.shape[1])

    path = cache_dir / f"{cache_key(samples, frame, channels)}.npy" if cache_dir is not None and samples else None
    shape = (channels, *frame)
    decode = partial(decode_all, len(samples), shape, one, threads)
    images, sizes = cached_images(path, (len(samples), *shape), decode, in_memory=in_memory)
    scales = np.minimum(frame[0] / sizes[:, 0], frame[1] / sizes[:, 1]) if len(sizes) else np.zeros(0)
    return Prepared(images, scales, sizes, list(samples))


def cache_key(samples: Sequence[DetectionSample], frame: tuple[int, int] | None, channels: int, *more: object) -> str:
    """Name of a cache file, from all that decides its content."""

    def stamp(sample: DetectionSample) -> list[object]:
        if not sample.image.is_file():
            raise InputError(f"{sample.image}: no such image")
        status = sample.image.stat()
        return [str(sample.image.resolve()), status.st_size, status.st_mtime_ns]

    content = json.dumps([VERSION, frame and list(frame), channels, [stamp(s) for s in samples], *more])
    return hashlib.sha256(content.encode()).hexdigest()[:24]


class Resident:
    """A split whose images lie on a device."""

    def __init__(self, prepared: Prepared, device: torch.device) -> None:
        self.prepared, self.device = prepared, device
        self.images = torch.from_numpy(np.ascontiguousarray(prepared.images)).to(device)

    def __len__(self) -> int:
        return len(self.prepared)

    def batch(self, order: Tensor, host_order: Tensor, seed: int) -> DetectionBatch:
        """The images `order`."""
        return self.prepared.batch(host_order.numpy(), self.images.index_select(0, order), seed)


class BatchDataset(Dataset):
    """Whole batches for loader workers, or in order without any."""

    def __init__(self, prepared: Prepared, change: WorkerAugmentation | None = None) -> None:
        self.prepared, self.change = prepared, change

    def __len__(self) -> int:
        return len(self.prepared)

    def __getitem__(self, item: tuple[Tensor, int]) -> DetectionBatch:
        order, seed = item
        which = order.numpy()
        images = [np.asarray(self.prepared.images[i]) for i in which]
        if self.change is not None:
            for n, image in enumerate(images):
                changed = self.change(np.ascontiguousarray(image.transpose(1, 2, 0)), seed + 7919 * n)
                images[n] = changed.transpose(2, 0, 1)
        return self.prepared.batch(which, torch.from_numpy(np.stack(images)), seed)
