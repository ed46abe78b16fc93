"""Predictions as one COCO file, and pictures of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from lit_common.images import save_rgb
from lit_detr.module import Detections
from lit_detr.plots import Mark, detection_picture

__all__ = ["DetectionWriter"]


class DetectionWriter(BasePredictionWriter):
    """Writes `detections.json`, a COCO result file, and a picture per image.

    Each entry has `image_id`, `file_name`, `category_id`, `category`, `bbox` (x, y, width, height in pixels of the
    file) and `score`.

    Args:
        dirpath: Folder; by default `predictions` in the run's log folder.
        threshold: Detections with a lower score are left out of the pictures.
        least_score: And of the file.
        pictures: Most pictures that are drawn.

    Attributes:
        artifacts: The files of the last run.
    """

    def __init__(
        self, dirpath: str | None = None, threshold: float = 0.5, least_score: float = 0.01, pictures: int = 100
    ) -> None:
        super().__init__(write_interval="batch")
        self.dirpath, self.threshold, self.least_score, self.pictures = dirpath, threshold, least_score, pictures
        self.artifacts: list[str] = []
        self._entries: list[dict[str, Any]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder on all processes together."""
        if stage == "predict":
            folder = trainer.log_dir or trainer.default_root_dir
            self._folder = Path(self.dirpath) if self.dirpath else Path(folder) / "predictions"
            self.artifacts, self._entries = [], []

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
        """Keep the entries of a batch and draw its images."""
        assert isinstance(prediction, Detections)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        names: list[str] = pl_module.hparams["class_names"]
        ids: list[int] = pl_module.hparams["category_ids"] or list(range(1, len(names) + 1))
        samples = data.prepared("predict").samples
        rows = (prediction.boxes.cpu().numpy(), prediction.scores.cpu().numpy(), prediction.labels.cpu().numpy())
        for boxes, scores, labels, position in zip(*rows, prediction.position, strict=True):
            sample = samples[position]
            for box, score, label in zip(boxes, scores, labels, strict=True):
                if score >= self.least_score:
                    x0, y0, x1, y1 = (round(float(v), 2) for v in box)
                    entry = {"image_id": sample.image_id, "file_name": sample.name, "category_id": ids[label]}
                    entry |= {"category": names[label], "bbox": [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)]}
                    self._entries.append({**entry, "score": round(float(score), 5)})
            if len(self.artifacts) < self.pictures:
                found = [
                    Mark("hit", tuple(float(v) for v in box), int(label), float(score))  # type: ignore[arg-type]
                    for box, score, label in zip(boxes, scores, labels, strict=True)
                    if score >= self.threshold
                ]
                image = data.image_of(sample)
                path = self._folder / "pictures" / f"{sample.name.replace('/', '_').rsplit('.', 1)[0]}.png"
                save_rgb(path, detection_picture(image, found, names, caption=sample.name))
                self.artifacts.append(str(path))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file, one per process, and say where it is."""
        suffix = f".{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = self._folder / f"detections{suffix}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self._entries))
        self.artifacts.insert(0, str(path))
        rank_zero_info(f"{len(self._entries)} detections in {path}")
