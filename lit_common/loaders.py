"""How samples become batches: an order that a seed decides, and loaders that resume where a run stopped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lit_cli.errors import InputError

__all__ = [
    "EpochBatches",
    "IndexLoader",
    "ResidentData",
    "ResumableLoader",
    "epoch_batches",
    "quiet_worker",
    "worker_loader",
]


class ResidentData(Protocol):
    """Samples that lie on a device."""

    device: torch.device

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def batch(self, order: Tensor, host_order: Tensor, seed: int) -> Any:
        """The samples `order` (indices on the device; `host_order` is the same on the host)."""
        ...


class EpochBatches(DistributedSampler):
    """Yields whole batches as (indices, seed), from the seed and the epoch alone.

    It is a `DistributedSampler` because that is what tells Lightning to leave sharding to it: each rank gets every
    world-th index and, in evaluation, no index twice.

    Args:
        length: Number of samples.
        batch_size: Samples per batch and rank.
        shuffle: New order each epoch.
        drop_last: Leave out a last batch that is not full; in training all ranks then make the same number of steps.
        seed: Seeds order and augmentation.
        rank: This process.
        world: Number of processes.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        shuffle: bool,
        drop_last: bool,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        super().__init__(range(length), world, rank, shuffle=shuffle, seed=seed, drop_last=drop_last)  # type: ignore[arg-type]
        self.length, self.batch_size = length, batch_size
        self.start = 0  # batches to skip in the next pass, after a resume

    def __len__(self) -> int:
        """Batches of one epoch on this rank."""
        if not self.shuffle:
            return math.ceil(len(range(self.rank, self.length, self.num_replicas)) / self.batch_size)
        share = self.length // self.num_replicas  # the same on all ranks, or they would wait for each other
        return max(1, share // self.batch_size if self.drop_last else math.ceil(share / self.batch_size))

    def order(self) -> Tensor:
        """This rank's indices for the current epoch."""
        if not self.shuffle:
            return torch.arange(self.rank, self.length, self.num_replicas)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return torch.randperm(self.length, generator=generator)[self.rank :: self.num_replicas]

    def batch_seed(self, batch: int) -> int:
        """Seed of a batch: different for every epoch, batch and rank."""
        return int(np.random.SeedSequence((self.seed, self.epoch, batch, self.rank)).generate_state(1, np.uint32)[0])

    def __iter__(self) -> Iterator[Any]:
        order, start = self.order(), self.start
        self.start = 0
        for i in range(start, len(self)):
            yield order[i * self.batch_size : (i + 1) * self.batch_size], self.batch_seed(i)


def epoch_batches(trainer: Trainer | None, length: int, batch_size: int, **options: Any) -> EpochBatches:
    """This process's part of an epoch; without a Trainer there is one process.

    Args:
        trainer: Knows the processes.
        length: Number of samples.
        batch_size: Samples per batch and process.
        options: Of `EpochBatches`.

    Raises:
        InputError: A process would have nothing to evaluate, for which the others would wait.
    """
    rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
    if not options.get("shuffle") and 0 < length < world:
        raise InputError(
            f"trainer.devices: {world} processes for {length} samples to evaluate, expected no more than one for each"
        )
    return EpochBatches(length, batch_size, rank=rank, world=world, **options)


class IndexLoader:
    """A loader without workers: a batch is an index into tensors that lie on the device already.

    Stateful, so that Lightning resumes in the middle of an epoch with the batch that would have come next.
    """

    def __init__(self, data: ResidentData, sampler: EpochBatches, begin: Callable[[], int] | None = None) -> None:
        self.data, self.sampler, self.begin = data, sampler, begin
        self.dataset = range(len(data))
        self.batch_sampler = None  # Lightning looks for it beside `sampler`
        self._position = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        # A generator: nothing runs before the first batch, when Lightning has told the sampler its epoch.
        sampler, size = self.sampler, self.sampler.batch_size
        order = sampler.order()
        on_device = order.to(self.data.device)
        self._position, sampler.start = max(sampler.start, self.begin() if self.begin else 0), 0
        for i in range(self._position, len(sampler)):
            part = slice(i * size, (i + 1) * size)
            self._position = i + 1
            yield self.data.batch(on_device[part], order[part], sampler.batch_seed(i))

    def state_dict(self) -> dict[str, int]:
        """How many batches of the epoch were given out."""
        return {"position": self._position % max(1, len(self))}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next pass there."""
        self.sampler.start = state["position"]


class ResumableLoader(DataLoader):
    """A DataLoader over `EpochBatches` that knows how many batches it gave out."""

    _position = 0
    begin: Callable[[], int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        sampler = self.sampler
        assert isinstance(sampler, EpochBatches)
        self._position = sampler.start = max(sampler.start, self.begin() if self.begin else 0)
        for batch in super().__iter__():
            self._position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """How many batches of the epoch were given out."""
        return {"position": self._position % max(1, len(self))}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next pass there."""
        sampler = self.sampler
        assert isinstance(sampler, EpochBatches)
        sampler.start = state["position"]


def worker_loader(
    data: Dataset, sampler: EpochBatches, options: Mapping[str, Any], begin: Callable[[], int] | None = None
) -> ResumableLoader:
    """Whole batches from worker processes.

    Args:
        data: Makes a batch of each item of the sampler.
        sampler: The order.
        options: `num_workers`, `prefetch_factor`, `persistent_workers` and `pin_memory`, as data modules have them;
            those that make no sense without workers or a GPU are left out there.
        begin: Batches of the epoch that are done already.
    """
    workers = options["num_workers"]
    loader = ResumableLoader(
        data,
        sampler=sampler,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=options["prefetch_factor"] if workers else None,
        persistent_workers=bool(options["persistent_workers"] and workers),
        pin_memory=bool(options["pin_memory"] and torch.cuda.is_available()),
        worker_init_fn=quiet_worker,
        collate_fn=_as_it_is,
    )
    loader.begin = begin
    return loader


def _as_it_is(batch: Any) -> Any:
    """Batches are made whole; the default would make tensors of arrays that are to stay on the host."""
    return batch


def quiet_worker(_: int) -> None:
    """One OpenCV thread per worker: more of them only fight for the same cores."""
    import cv2

    cv2.setNumThreads(0)
    torch.set_num_threads(1)
