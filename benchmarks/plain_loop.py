"""The loop that people write first, as the baseline: per-sample albumentations and heatmaps in loader workers.

Same network and same optimizer as ours, so that a ratio says what the way of a sample costs, not what the network does.
Images are already decoded and resized in memory; `FileSamples` also reads and resizes the file each time, as many loops
do.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
import torch
from lightning.pytorch import LightningModule
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lit_landmarks.model import HeatmapNet


class MemorySamples(Dataset):
    """Augments one image and draws its heatmaps in NumPy.

    Args:
        images: (N, H, W) uint8.
        points: (N, K, 2) pixels of the images.
        length: Samples of an epoch; images repeat.
        sigma: Heatmap pixels.
    """

    def __init__(self, images: NDArray[np.uint8], points: NDArray[np.float32], length: int, sigma: float = 2.0) -> None:
        self.images, self.points, self.length, self.sigma = images, points, length, sigma
        self.augment = A.Compose(
            [
                A.Affine(rotate=(-10, 10), scale=(0.9, 1.1), translate_percent=(-0.04, 0.04), p=1.0),
                A.RandomGamma((81, 123), p=1.0),
                A.RandomBrightnessContrast(0.1, 0.2, p=1.0),
                A.GaussNoise(std_range=(0.0, 0.02), p=1.0),
                A.Normalize(mean=(0.449,), std=(0.226,)),
            ],
            keypoint_params=A.KeypointParams(format="xy", remove_invisible=False),
        )

    def __len__(self) -> int:
        return self.length

    def read(self, index: int) -> NDArray[np.uint8]:
        """(H, W) uint8."""
        return self.images[index]

    def __getitem__(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        index %= len(self.points)
        out = self.augment(image=self.read(index)[..., None], keypoints=self.points[index])
        height, width = out["image"].shape[0] // 4, out["image"].shape[1] // 4
        rows, columns = np.arange(height, dtype=np.float32), np.arange(width, dtype=np.float32)
        maps = np.empty((len(self.points[index]), height, width), np.float32)
        for k, (x, y) in enumerate((np.asarray(out["keypoints"], np.float32) + 0.5) / 4 - 0.5):
            maps[k] = np.exp(-((columns[None] - x) ** 2 + (rows[:, None] - y) ** 2) / (2 * self.sigma**2))
        return np.ascontiguousarray(out["image"].reshape(1, height * 4, width * 4)), maps


class FileSamples(MemorySamples):
    """The same, reading and resizing the file for every sample."""

    def __init__(
        self, files: Sequence[Path], size: tuple[int, int], points: NDArray[np.float32], length: int, sigma: float = 2.0
    ) -> None:
        super().__init__(np.zeros((0, *size), np.uint8), points, length, sigma)
        self.files, self.size = list(files), size

    def read(self, index: int) -> NDArray[np.uint8]:
        """(H, W) uint8."""
        image = cv2.imread(str(self.files[index]), cv2.IMREAD_GRAYSCALE)
        assert image is not None
        return cv2.resize(image, self.size[::-1], interpolation=cv2.INTER_AREA)  # type: ignore[return-value]


def _one_thread(_: int) -> None:
    cv2.setNumThreads(0)


def loader(data: Dataset, batch: int, workers: int) -> DataLoader:
    """A DataLoader with the usual options."""
    return DataLoader(
        data,
        batch,
        shuffle=True,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        drop_last=True,
        worker_init_fn=_one_thread,
    )


class PlainLandmarks(LightningModule):
    """Forward, MSE, AdamW."""

    def __init__(self, net: HeatmapNet, channels_last: bool = False, fused: bool = False) -> None:
        super().__init__()
        self.net = net.to(memory_format=torch.channels_last) if channels_last else net  # type: ignore[call-overload]
        self.channels_last, self.fused = channels_last, fused

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Mean squared error of a batch."""
        images, maps = batch
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        loss = F.mse_loss(self.net(images).float(), maps)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW as most loops write it."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=self.fused)
