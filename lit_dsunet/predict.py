"""Predictions as NIfTI files on the grid of the images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from lit_dsunet.loaders import CaseBatch
from lit_dsunet.module import Segmentation
from lit_dsunet.nifti import read_header, write_label

__all__ = ["SegmentationWriter"]


class SegmentationWriter(BasePredictionWriter):
    """Writes each predicted label map as soon as its batch is done.

    The file has the orientation and affine of the image that it belongs to, and the values and the data type of the
    label files of the training (uint8 where there are none).

    Args:
        dirpath: Folder; by default `predictions` in the run's log folder.
        suffix: Between the case's name and `.nii.gz`.

    Attributes:
        artifacts: The files of the last run.
    """

    def __init__(self, dirpath: str | None = None, suffix: str = "") -> None:
        super().__init__(write_interval="batch")
        self.dirpath, self.suffix = dirpath, suffix
        self.artifacts: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder on all processes together."""
        if stage == "predict":
            folder = trainer.log_dir or trainer.default_root_dir
            self._folder = Path(self.dirpath) if self.dirpath else Path(folder) / "predictions"
            self.artifacts = []

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the volumes of a batch."""
        assert isinstance(prediction, Segmentation)
        assert isinstance(batch, CaseBatch)
        data = trainer.datamodule  # type: ignore[attr-defined]
        cases, samples = data.cases("predict"), data.samples("predict")
        pairs = pl_module.hparams.get("label_values")
        values = dict(pairs) if pairs else None
        self._folder.mkdir(parents=True, exist_ok=True)
        for label, index in zip(prediction.label, prediction.case, strict=True):
            case, sample = cases[index], samples[index]
            image = sample.images[0] if sample.images else None
            dtype = read_header(sample.label).dtype if sample.label is not None else np.dtype(np.uint8)
            path = self._folder / f"{case.name}{self.suffix}.nii.gz"
            # A float label file holds integers too, but there is no reason to write another one.
            kind = dtype if dtype.kind in "iu" else np.dtype(np.uint8)
            write_label(path, label.cpu().numpy(), case.geometry, like=image, dtype=kind, label_values=values)
            self.artifacts.append(str(path))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the files are."""
        rank_zero_info(f"{len(self.artifacts)} label maps in {self._folder}")
