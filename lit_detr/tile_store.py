"""Tiles of large images for training, and the large images whole for evaluation: decoded once, found by a hash."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_cli.errors import InputError
from lit_common.images import save_array
from lit_common.loaders import EpochBatches
from lit_detr.readers import image_size
from lit_detr.samples import DetectionSample
from lit_detr.store import BatchDataset, Prepared, ReadImage, Resident, cache_key, fit_frame, read_image
from lit_detr.tiles import TileIndex
from lit_detr.video import Stream

__all__ = [
    "ResidentWhole",
    "TileBatches",
    "WholeBatch",
    "WholeDataset",
    "WholeImages",
    "WholeStream",
    "prepare_tiles",
    "prepare_whole",
    "sized",
]


class WholeBatch(NamedTuple):
    """Images at their own sizes, to be cut into tiles on the device."""

    position: Tensor  # (B,) int64 on the host, in the split; first, as it says how many images there are
    image: list[Tensor]  # (C, H, W) uint8 each


@dataclass(frozen=True)
class WholeImages(Prepared):
    """One split at the sizes of its files, for evaluation that cuts on the device.

    Attributes:
        images: (channels x pixels,) uint8, one image after the other; empty where they are read when they are needed.
        channels: Of the images.
        read: Gives (C, H, W) of a sample then.
    """

    channels: int = 3
    read: ReadImage | None = None

    @classmethod
    def to_read(cls, samples: list[DetectionSample], channels: int, read: ReadImage) -> WholeImages:
        """Images that are read when they are needed, for those that are needed once."""
        sizes = np.array([_size_of(s) for s in samples], np.int64).reshape(-1, 2)
        return cls(np.zeros(0, np.uint8), np.ones(len(samples)), sizes, samples, channels, read)

    def mean(self, count: Callable[[tuple[int, int]], int]) -> float:
        """Mean of a count over the sizes of all images."""
        return float(np.mean([count((h, w)) for h, w in self.sizes.tolist()]))

    def image(self, i: int, images: Tensor | None = None) -> Tensor:
        """(C, H, W) uint8 of an image, a copy, or a view of `images` if these lie on a device."""
        if self.read is not None:
            return torch.from_numpy(np.ascontiguousarray(self.read(self.samples[i])))
        first, last = (self.channels * int(n) for n in self.pixels[i : i + 2])
        own = torch.from_numpy(np.array(self.images[first:last])) if images is None else images[first:last]
        return own.view(self.channels, *self.sizes[i].tolist())

    def batch_of(self, which: NDArray[np.int64], images: Tensor | None = None) -> WholeBatch:
        """The images `which`."""
        return WholeBatch(torch.from_numpy(which), [self.image(int(i), images) for i in which])

    @cached_property
    def pixels(self) -> NDArray[np.int64]:
        """(N + 1,) pixels before each image."""
        return np.concatenate([[0], np.cumsum(self.sizes.prod(1))])


def sized(samples: Sequence[DetectionSample]) -> list[DetectionSample]:
    """Samples that know the size of their image, if need be from the header of the file."""
    return [replace(s, size=_size_of(s)) for s in samples]


def _size_of(sample: DetectionSample) -> tuple[int, int]:
    return sample.size if sample.size is not None else image_size(sample.image)


def prepare_whole(
    samples: Sequence[DetectionSample],
    channels: int,
    cache_dir: Path | None,
    *,
    read: ReadImage | None = None,
    in_memory: bool = True,
    threads: int | None = None,
) -> WholeImages:
    """Decode images at their own sizes, or map what an earlier run left in the cache.

    Args:
        samples: Of known sizes.
        channels: 1 or 3.
        cache_dir: As for `prepare`, as is the rest.
        read: Gives (H, W, C).
        in_memory: Read the whole array into memory.
        threads: Decoding threads.
    """
    sizes = np.array([s.size for s in samples], np.int64).reshape(-1, 2)
    out = WholeImages(np.zeros(0, np.uint8), np.ones(len(samples)), sizes, list(samples), channels)

    def fill(images: NDArray[np.uint8], i: int) -> None:
        image = read(samples[i]) if read is not None else read_image(samples[i], channels)
        first, last = (channels * int(n) for n in out.pixels[i : i + 2])
        images[first:last] = image.transpose(2, 0, 1).reshape(-1)

    path = cache_dir / f"{cache_key(samples, None, channels)}.npy" if cache_dir is not None and samples else None
    shape = (channels * int(out.pixels[-1]),)
    return replace(out, images=_cached(path, shape, len(samples), fill, in_memory, threads))


def prepare_tiles(
    index: TileIndex,
    samples: Sequence[DetectionSample],
    frame: tuple[int, int],
    channels: int,
    cache_dir: Path | None,
    *,
    read: ReadImage | None = None,
    in_memory: bool = True,
    threads: int | None = None,
) -> Prepared:
    """The tiles of images, each image decoded once and each tile fitted to the frame.

    A tile that its image does not fill is not magnified to fill the frame: the frame stays black there, and objects
    have the scale that they have in all other tiles.

    Args:
        index: The tiles.
        samples: The images that they are of, with known sizes.
        frame: (H, W) in the proportions of a tile.
        channels: As for `prepare`, as is the rest.
        cache_dir: Folder of the cache.
        read: Gives (H, W, C).
        in_memory: Read the whole array into memory.
        threads: Decoding threads.
    """
    (height, width), scale = index.shape, frame[0] / index.shape[0]
    firsts = np.searchsorted(index.parents, np.arange(len(samples) + 1))

    def fill(images: NDArray[np.uint8], i: int) -> None:
        image = read(samples[i]) if read is not None else read_image(samples[i], channels)
        for t in range(firsts[i], firsts[i + 1]):
            y, x = index.tiles[t].start
            images[t] = fit_frame(image[y : y + height, x : x + width], frame, scale)[0]

    starts = [[int(p), *t.start] for p, t in zip(index.parents, index.tiles, strict=True)]
    path = None
    if cache_dir is not None and samples:
        path = cache_dir / f"{cache_key(samples, frame, channels, [height, width], starts)}.npy"
    images = _cached(path, (len(index), channels, *frame), len(samples), fill, in_memory, threads)
    sizes = np.array([s.size for s in samples], np.int64).reshape(-1, 2)[index.parents]
    seen = np.minimum(sizes, np.array([height, width]))
    return Prepared(images, np.full(len(index), scale), seen, [t.sample for t in index.tiles])


def _cached(
    path: Path | None,
    shape: tuple[int, ...],
    count: int,
    fill: Callable[[NDArray[np.uint8], int], None],
    in_memory: bool,
    threads: int | None,
) -> NDArray[np.uint8]:
    """An array from the cache, or filled now by `count` calls and left there."""
    if path is not None and path.is_file():
        try:
            found = np.load(path, mmap_mode=None if in_memory else "r")
            if found.shape == shape and found.dtype == np.uint8:
                return found
        except (ValueError, EOFError, OSError):
            pass  # a damaged cache is only a lost minute
    on_disk = path is not None and not in_memory and np.prod(shape) > 0
    if on_disk:  # what does not fit in memory must not pass through it
        assert path is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent) as file:
            images = np.memmap(file, np.uint8, "w+", shape=shape)
    else:
        images = np.zeros(shape, np.uint8)
    with ThreadPoolExecutor(threads or min(16, os.cpu_count() or 1)) as pool:
        for _ in pool.map(partial(fill, images), range(count)):  # which raises a worker's exception
            pass
    if path is not None and save_array(path, images) and on_disk:
        return np.load(path, mmap_mode="r")
    return images


class TileBatches(EpochBatches):
    """Batches of an epoch of tiles: all with objects, and other empty ones every time.

    Args:
        index: The tiles.
        batch_size: Tiles per batch and rank.
        empty_share: Share of empty tiles in an epoch.
        options: Of `EpochBatches`.
    """

    def __init__(self, index: TileIndex, batch_size: int, *, empty_share: float, seed: int, **options: Any) -> None:
        self.index, self.empty_share = index, empty_share
        count = len(index.epoch(0, empty_share=empty_share, seed=seed))
        if not count:
            raise InputError("data: no training tile is left, expected one with an object, or with nothing at all")
        super().__init__(count, min(batch_size, count), shuffle=True, seed=seed, **options)

    def order(self) -> Tensor:
        """This rank's tiles for the current epoch."""
        chosen = self.index.epoch(self.epoch, empty_share=self.empty_share, seed=self.seed)
        return torch.from_numpy(chosen)[super().order()]


class ResidentWhole(Resident):
    """Whole images that lie on a device."""

    def batch(self, order: Tensor, host_order: Tensor, seed: int) -> WholeBatch:  # type: ignore[override]
        """The images `order`."""
        return _whole(self.prepared).batch_of(host_order.numpy(), self.images)


class WholeDataset(BatchDataset):
    """Batches of whole images for loader workers, or in order without any."""

    def __getitem__(self, item: tuple[Tensor, int]) -> WholeBatch:  # type: ignore[override]
        return _whole(self.prepared).batch_of(item[0].numpy())


def _whole(prepared: Prepared) -> WholeImages:
    assert isinstance(prepared, WholeImages)
    return prepared


class WholeStream(Stream):
    """Videos and images in order, at the sizes of their frames."""

    def mean(self, count: Callable[[tuple[int, int]], int]) -> float:
        """Mean of a count over the sizes of the files; 1 for images, which nobody has looked at."""
        return float(np.mean([count(s.size) if s.size is not None else 1 for s in self.sources]))

    def batches(self, size: int, rank: int = 0, world: int = 1) -> Iterator[WholeBatch]:  # type: ignore[override]
        """Batches of a process: every world-th one."""
        which: list[int] = []
        images: list[Tensor] = []
        for position, image in self.frames(lambda n: n // size % world == rank):
            if image is not None:
                which.append(position)
                images.append(torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))))
            if len(which) == size:
                yield WholeBatch(torch.tensor(which), images)
                which, images = [], []
        if which:
            yield WholeBatch(torch.tensor(which), images)
