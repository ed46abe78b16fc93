"""What `predict` leaves behind: one CSV and an overlay per image."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_warn

from lit_common.images import save_rgb
from lit_landmarks.data import LandmarkData
from lit_landmarks.geometry import transform_points
from lit_landmarks.plots import overlay, to_numpy

HEADER = ["file", "landmark", "name", "x_px", "y_px", "x_mm", "y_mm", "score", "sd_px"]


class PredictionWriter(BasePredictionWriter):
    """Writes `predictions.csv` (one row per image and landmark) and overlays.

    Coordinates are those of the original image, pixel centres at integers; mm are pixels times the pixel size and empty
    where that is unknown. `sd_px` is the standard deviation that the heatmap's peak suggests, in original pixels.

    Args:
        folder: Where to write; by default `<log folder>/predictions`.
        overlays: Draw a PNG per image.

    Attributes:
        artifacts: Files written.
    """

    def __init__(self, folder: str | None = None, overlays: bool = True) -> None:
        super().__init__(write_interval="batch")
        self.folder, self.overlays = folder, overlays
        self.artifacts: list[Path] = []
        self._rows = 0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the CSV."""
        # Once and on every process: the log folder is asked of the first one.
        default = Path(trainer.log_dir or trainer.default_root_dir) / "predictions"
        suffix = f".{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = (Path(self.folder) if self.folder else default) / f"predictions{suffix}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            csv.writer(file).writerow(HEADER)
        self.artifacts, self._rows = [path], 0

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
        """Append a batch."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, LandmarkData)
        files, names = data.names("predict"), getattr(pl_module, "landmark_names", [])
        points, score, sd = (to_numpy(prediction[k]) for k in ("points", "score", "sd"))
        spacing = to_numpy(prediction["spacing"])
        rows: list[list[object]] = []
        for i, index in enumerate(prediction["index"].tolist()):
            known = bool(np.isfinite(spacing[i]).all())
            for k, (x, y) in enumerate(points[i]):
                mm = [f"{x * spacing[i, 0]:.4f}", f"{y * spacing[i, 1]:.4f}"] if known else ["", ""]
                name = names[k] if k < len(names) else str(k + 1)
                rows.append(
                    [files[index], k + 1, name, f"{x:.3f}", f"{y:.3f}", *mm, f"{score[i, k]:.4f}", f"{sd[i, k]:.3f}"]
                )
        with self.artifacts[0].open("a", newline="") as file:
            csv.writer(file).writerows(rows)
        self._rows += len(rows)
        if self.overlays:
            framed = to_numpy(transform_points(batch.matrix, prediction["points"]))
            images = to_numpy(batch.image)
            for i, index in enumerate(prediction["index"].tolist()):
                flat = files[index].replace("/", "_")
                path = self.artifacts[0].with_name(f"{Path(flat).stem}.png")
                if path in self.artifacts:  # two files may differ in their extension alone
                    path = path.with_name(f"{flat}.png")
                save_rgb(path, overlay(images[i], framed[i], names=names, caption=files[index]))
                self.artifacts.append(path)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the files are."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if (
            isinstance(data, LandmarkData)
            and len(data.prepared("predict"))
            and not np.isfinite(data.prepared("predict").spacing).any()
        ):
            rank_zero_warn("data.pixel_size is unknown: the mm columns are empty", category=UserWarning)
        print(f"{self._rows} landmarks written to {self.artifacts[0]}")
