"""How patches, frames and moments become batches, on the device or in workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lit_common.loaders import EpochBatches
from lit_patchnerf.patches import gather_patches
from lit_patchnerf.samples import FrameBatch, MomentBatch, TrainBatch

__all__ = ["EvalFrames", "Moments", "StepBatches", "TrainSamples"]


class StepBatches(EpochBatches):
    """Batches that hold the samples of several optimizer steps, for training.

    An epoch has the same steps whatever their number in a batch; the last batch may hold fewer. Steps are full: without
    `drop_last` the last one is filled up with samples from the beginning.

    Args:
        length: Number of samples.
        step_size: Samples of a step and rank, at most a rank's share of them.
        steps: Steps in a batch.
        drop_last: Leave out what does not fill a step.
        seed: Of the order.
        rank: This process.
        world: Number of processes.

    Example:
        >>> batches = StepBatches(7, 2, 3, drop_last=False)
        >>> [len(indices) for indices, _ in batches]
        [6, 2]
    """

    def __init__(
        self, length: int, step_size: int, steps: int, *, drop_last: bool, seed: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        size = step_size * steps
        super().__init__(length, size, shuffle=True, drop_last=drop_last, seed=seed, rank=rank, world=world)
        # All ranks make the same number of equal steps, or they would wait for each other.
        share = length // world
        self.steps = share // step_size if drop_last else math.ceil(share / step_size)
        """Optimizer steps of one epoch on this rank."""
        self.step_size = step_size

    def __len__(self) -> int:
        """Batches of one epoch on this rank."""
        return math.ceil(self.steps * self.step_size / self.batch_size)

    def order(self) -> Tensor:
        """This rank's indices for the current epoch."""
        order = super().order()[: self.length // self.num_replicas]
        wanted = self.steps * self.step_size
        return torch.cat([order[:wanted], order[: max(0, wanted - len(order))]])


class TrainSamples(Dataset):
    """Batches of patches or frames, gathered where the frames lie; for `IndexLoader` and for workers alike.

    Args:
        frames: (T, H, W, 3) uint8 canvases.
        pool: (N,) int64 patches or frames to draw from; this and all else on the device of the frames.
        grid: (rows, cols) of patches; None for whole frames.
        step_size: Samples of an optimizer step.
        weight: (rows * cols, 1, h, w) of patches or (1, 1, H, W) of frames; None where every pixel counts.
        embeddings: (T, rows, cols, D) float16; None without targets.
    """

    def __init__(
        self,
        frames: Tensor,
        pool: Tensor,
        grid: Sequence[int] | None,
        step_size: int,
        weight: Tensor | None = None,
        embeddings: Tensor | None = None,
    ) -> None:
        self.frames, self.pool, self.grid, self.step_size = frames, pool, grid, step_size
        self.device, self.weight = frames.device, weight
        self.embeddings = embeddings.flatten(0, 2) if embeddings is not None and grid is not None else embeddings

    def __len__(self) -> int:
        return len(self.pool)

    def __getitem__(self, item: tuple[Tensor, int]) -> TrainBatch:
        order, seed = item
        return self.batch(order, order, seed)

    def batch(self, order: Tensor, host_order: Tensor, seed: int) -> TrainBatch:
        """The samples at `order` in the pool, in steps; their number is a multiple of the step's."""
        index = self.pool[order]
        if self.grid is None:
            pixels = self.frames[index].permute(0, 3, 1, 2)
        else:
            pixels = gather_patches(self.frames, index, self.grid)
        weight = self.weight
        if weight is not None:
            # That of frames is the same for all: a view, which takes no memory.
            weight = weight.expand(len(index), -1, -1, -1) if self.grid is None else weight[index % len(weight)]
        embeddings = None if self.embeddings is None else self.embeddings[index]
        return TrainBatch(self._cut(index), self._cut(pixels), _maybe(self._cut, weight), _maybe(self._cut, embeddings))

    def _cut(self, samples: Tensor) -> Tensor:
        return samples.unflatten(0, (-1, self.step_size))


class EvalFrames(Dataset):
    """Batches of whole frames to evaluate on; for `IndexLoader` and for workers alike.

    Args:
        frames: (T, H, W, 3) uint8 canvases.
        wanted: (N,) int64 frames to evaluate on, on the CPU.
        roles: (T,) int64, 0 trained, 1 unused, 2 held out; this and the rest on the device of the frames.
        hidden: (1, 1, H, W) bool; None without a mask.
        embeddings: (T, rows, cols, D) float16; None without targets.
    """

    def __init__(
        self,
        frames: Tensor,
        wanted: Tensor,
        roles: Tensor,
        hidden: Tensor | None = None,
        embeddings: Tensor | None = None,
    ) -> None:
        self.frames, self.roles, self.hidden, self.embeddings = frames, roles, hidden, embeddings
        self.device, self.wanted, self.host_wanted = frames.device, wanted.to(frames.device), wanted

    def __len__(self) -> int:
        return len(self.host_wanted)

    def __getitem__(self, item: tuple[Tensor, int]) -> FrameBatch:
        order, seed = item
        return self.batch(order, order, seed)

    def batch(self, order: Tensor, host_order: Tensor, seed: int) -> FrameBatch:
        """The frames at `order` among the wanted ones."""
        index = self.wanted[order]
        return FrameBatch(
            index,
            self.host_wanted[host_order].tolist(),
            self.frames[index].permute(0, 3, 1, 2),
            self.roles[index],
            None if self.hidden is None else self.hidden.expand(len(index), -1, -1, -1),
            None if self.embeddings is None else self.embeddings[index],
        )


class Moments:
    """Batches of moments to decode, from the first to the last frame in even steps.

    Args:
        first: Frame, perhaps between two.
        last: Likewise, included if the steps meet it.
        step: In frames.
        count: Frames of the video.

    Example:
        >>> Moments(1, 2, 0.5, 5).batch(torch.arange(3), torch.arange(3), 0)
        MomentBatch(times=tensor([0.2500, 0.3750, 0.5000]), numbers=[1.0, 1.5, 2.0])
    """

    device = torch.device("cpu")

    def __init__(self, first: float, last: float, step: float, count: int) -> None:
        self.first, self.last, self.step, self.count = first, last, step, count
        self.length = math.floor((last - first) / step + 1e-6) + 1  # ten steps of 0.1 are one frame

    def __len__(self) -> int:
        return self.length

    def batch(self, order: Tensor, host_order: Tensor, seed: int) -> MomentBatch:
        """Some of the moments."""
        numbers = [float(min(self.last, round(self.first + i * self.step, 9))) for i in host_order.tolist()]
        times = torch.tensor([number / max(1, self.count - 1) for number in numbers], dtype=torch.float32)
        return MomentBatch(times, numbers)


def _maybe(change: Callable[[Tensor], Tensor], tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else change(tensor)
