"""Batches of landmark images, from the device or from loader workers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lit_landmarks.augment import AlbumentationsAugment
from lit_landmarks.store import Prepared


class LandmarkBatch(NamedTuple):
    """A batch of B images with K landmarks each."""

    image: Tensor  # (B, C, H, W) uint8 in the frame; float32 in [0, 1] once augmented
    points: Tensor  # (B, K, 2) float32, frame pixels, NaN where missing
    matrix: Tensor  # (B, 3, 3) float64, original pixels to frame pixels
    target: Tensor  # (B, K, 2) float64, original pixels, NaN where missing
    spacing: Tensor  # (B, 2) float64, mm per original pixel along x and y, NaN where unknown
    position: Tensor  # (B,) int64, position in the split
    seed: Tensor  # () int64 on the CPU: everything random about this batch follows from it


class Resident:
    """A split as tensors on a device; images stay in host memory if they do not fit."""

    def __init__(self, data: Prepared, device: torch.device, images_too: bool) -> None:
        self.device = device
        if images_too and not data.images.flags.writeable:
            self.images: Any = torch.from_numpy(np.array(data.images)).to(device)
        else:
            self.images = torch.from_numpy(data.images).to(device) if images_too else data.images
        self.points = data.points().to(device)
        self.matrices = torch.from_numpy(data.matrices).to(device)
        self.targets = torch.from_numpy(data.targets).to(device)
        self.spacing = torch.from_numpy(data.spacing).to(device)

    def __len__(self) -> int:
        return len(self.points)

    def batch(self, order: Tensor, host_order: Tensor, seed: int) -> LandmarkBatch:
        """The samples `order` (indices on the device; `host_order` is the same on the host)."""
        if isinstance(self.images, Tensor):
            image = self.images[order]
        else:
            image = torch.from_numpy(np.ascontiguousarray(self.images[host_order.numpy()])).to(self.device)
        return LandmarkBatch(
            image,
            self.points[order],
            self.matrices[order],
            self.targets[order],
            self.spacing[order],
            order,
            torch.tensor(seed),
        )


class BatchDataset(Dataset):
    """Whole batches for loader workers: uint8 images leave the worker, floats and heatmaps are made on the device."""

    def __init__(self, data: Prepared, transform: AlbumentationsAugment | None) -> None:
        self.data, self.transform = data, transform
        self.points = data.points()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, item: tuple[Tensor, int]) -> LandmarkBatch:
        order, seed = item
        index = order.numpy()
        image, points = np.ascontiguousarray(self.data.images[index]), self.points[order]
        if self.transform is not None:
            pairs = [
                self.transform(i, p, seed + 7919 * n)
                for n, (i, p) in enumerate(zip(image, points.numpy(), strict=True))
            ]
            image = np.stack([i for i, _ in pairs])
            points = torch.from_numpy(np.stack([p for _, p in pairs]))
        return LandmarkBatch(
            torch.from_numpy(image),
            points,
            torch.from_numpy(self.data.matrices[index]),
            torch.from_numpy(self.data.targets[index]),
            torch.from_numpy(self.data.spacing[index]),
            order,
            torch.tensor(seed),
        )
