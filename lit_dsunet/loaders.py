"""Batches of patches, from the device or from loader workers, and of whole volumes for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lit_common.loaders import EpochBatches
from lit_dsunet.augment import AlbumentationsVolume
from lit_dsunet.store import Case, PatchSampler, Resident, cut_patch

__all__ = ["CaseBatch", "CaseLoader", "PatchBatch", "PatchDataset", "ResidentPatches"]

Triple = tuple[int, int, int]


class PatchBatch(NamedTuple):
    """B patches; 2-D ones have no depth, and their neighbouring slices are channels."""

    image: Tensor  # (B, C, D, H, W) or (B, C, H, W); float16 at rest, float32 once augmented
    label: Tensor  # (B, D, H, W) or (B, H, W) uint8 class indices
    case: Tensor  # (B,) int64, position in the split
    seed: Tensor  # () int64 on the CPU: everything random about this batch follows from it


class CaseBatch(NamedTuple):
    """Whole volumes, each of its own size."""

    image: list[Tensor]  # (C, D, H, W) float16
    label: list[Tensor | None]  # (D, H, W) uint8 on the grid of the file
    case: list[int]  # position in the split


def whole_slices(batch: PatchBatch, slices: int) -> PatchBatch:
    """Patches of one slice, with its neighbours, as two-dimensional images."""
    return batch._replace(image=batch.image.flatten(1, 2), label=batch.label[:, slices // 2])


class ResidentPatches:
    """Patches of volumes that lie on the device."""

    def __init__(self, data: Resident, sampler: PatchSampler, patch: Triple, count: int) -> None:
        self.data, self.sampler, self.patch, self.count = data, sampler, patch, count
        self.device = data.device

    def __len__(self) -> int:
        return self.count

    def batch(self, order: Tensor, host_order: Tensor, seed: int) -> PatchBatch:
        """Patches of the volumes `order` modulo their number."""
        which = host_order % len(self.sampler.sizes)
        starts = torch.from_numpy(self.sampler.draw(which.numpy(), seed))
        if self.device.type == "cuda":  # pinned, or the copy would wait
            starts = starts.pin_memory()
        cases = order % len(self.sampler.sizes)
        image, label = self.data.patches(cases, starts.to(self.device, non_blocking=True), self.patch)
        return PatchBatch(image, label, cases, torch.tensor(seed))


class PatchDataset(Dataset):
    """Whole batches of patches for loader workers, from volumes in memory or mapped from the cache."""

    def __init__(
        self,
        cases: Sequence[Case],
        sampler: PatchSampler,
        patch: Triple,
        count: int,
        transform: AlbumentationsVolume | None = None,
    ) -> None:
        self.cases, self.sampler, self.patch, self.count = cases, sampler, patch, count
        self.transform = transform

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: tuple[Tensor, int]) -> PatchBatch:
        order, seed = item
        which = order.numpy() % len(self.cases)
        starts = self.sampler.draw(which, seed)
        images, labels = [], []
        for n, (index, start) in enumerate(zip(which, starts, strict=True)):
            image, label = cut_patch(self.cases[index], start, self.patch)
            if self.transform is not None:
                changed, label = self.transform(image.astype(np.float32), label, seed + 7919 * n)
                image = changed.astype(np.float16)
            images.append(image)
            labels.append(label)
        return PatchBatch(
            torch.from_numpy(np.stack(images)),
            torch.from_numpy(np.stack(labels)),
            torch.from_numpy(which),
            torch.tensor(seed),
        )


class CaseLoader:
    """Whole volumes in order, several at once; each process takes its share."""

    def __init__(self, cases: Sequence[Case], sampler: EpochBatches, resident: Resident | None) -> None:
        self.cases, self.sampler, self.resident = cases, sampler, resident
        self.dataset = range(len(cases))
        self.batch_sampler = None  # Lightning looks for it beside `sampler`

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[CaseBatch]:
        for order, _ in self.sampler:
            which = order.tolist()
            images, labels = [], []
            for i in which:
                case = self.cases[i]
                if self.resident is not None:
                    images.append(self.resident.volume(i)[0])
                else:
                    images.append(torch.from_numpy(np.ascontiguousarray(case.image)))
                native = case.native_label
                labels.append(None if native is None else torch.from_numpy(np.ascontiguousarray(native)))
            yield CaseBatch(images, labels, which)


def to_device(batch: Any, device: torch.device) -> Any:
    """Move a batch of either kind; the seed stays on the host, where it is read."""
    if isinstance(batch, PatchBatch):
        moved = {k: v.to(device, non_blocking=True) for k, v in batch._asdict().items() if k != "seed"}
        return batch._replace(**moved)
    # Volumes stay where they are: the sliding window decides what goes to the device.
    return batch._replace(label=[None if x is None else x.to(device, non_blocking=True) for x in batch.label])
