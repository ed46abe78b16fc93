"""Predictions as one COCO file, pictures of them, and videos with the boxes drawn in."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray

from lit_cli.errors import InputError
from lit_common.images import save_rgb
from lit_detr.module import Detections
from lit_detr.plots import Mark, detection_picture
from lit_detr.samples import DetectionSample
from lit_detr.video import Frame

__all__ = ["DetectionWriter"]


class DetectionWriter(BasePredictionWriter):
    """Writes `detections.json`, a COCO result file, and a picture per image.

    Each entry has `image_id`, `file_name`, `category_id`, `category`, `bbox` (x, y, width, height in pixels of the
    file) and `score`. Those of a video's frame have `frame`, counted from 0, and `time` in seconds as well.

    Args:
        dirpath: Folder; by default `predictions` in the run's log folder.
        threshold: Detections with a lower score are left out of the pictures.
        least_score: And of the file.
        pictures: Most pictures that are drawn.
        video: Draw whole videos, as mp4, in place of pictures of their frames; on one device.

    Attributes:
        artifacts: The files of the last run.

    Raises:
        InputError: with one line, when a video is to be drawn by several processes, or cannot be written.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        threshold: float = 0.5,
        least_score: float = 0.01,
        pictures: int = 100,
        video: bool = False,
    ) -> None:
        super().__init__(write_interval="batch")
        self.dirpath, self.threshold, self.least_score, self.pictures = dirpath, threshold, least_score, pictures
        self.video = video
        self.artifacts: list[str] = []
        self._entries: list[dict[str, Any]] = []
        self._drawn = 0
        self._film: _Film | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder on all processes together."""
        if stage == "predict":
            if self.video and trainer.world_size > 1:
                raise InputError(
                    f"predictions.video: one process has to see all frames, so expected --trainer.devices 1, "
                    f"got {trainer.world_size} processes"
                )
            folder = trainer.log_dir or trainer.default_root_dir
            self._folder = Path(self.dirpath) if self.dirpath else Path(folder) / "predictions"
            self.artifacts, self._entries, self._drawn = [], [], 0

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
            source = _source(sample)
            for box, score, label in zip(boxes, scores, labels, strict=True):
                if score >= self.least_score:
                    x0, y0, x1, y1 = (round(float(v), 2) for v in box)
                    entry = {"image_id": sample.image_id, **source, "category_id": ids[label]}
                    entry |= {"category": names[label], "bbox": [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)]}
                    self._entries.append({**entry, "score": round(float(score), 5)})
            in_film = self.video and isinstance(sample, Frame)
            if in_film or self._drawn < self.pictures:
                found = [
                    Mark("found", tuple(float(v) for v in box), int(label), float(score))  # type: ignore[arg-type]
                    for box, score, label in zip(boxes, scores, labels, strict=True)
                    if score >= self.threshold
                ]
                self._draw(sample, data.image_of(sample), found, names, in_film)

    def _draw(
        self, sample: DetectionSample, image: NDArray[np.uint8], found: list[Mark], names: list[str], in_film: bool
    ) -> None:
        caption = f"{sample.clip} {sample.time:.2f} s" if isinstance(sample, Frame) else sample.name
        if in_film:
            assert isinstance(sample, Frame)
            # Without crops, whose column comes and goes: all frames of a video have one size.
            self._add(sample, detection_picture(image, found, names, caption=caption, known=False, crops=0))
            return
        # The dot of a suffix, and not one of a frame's number or of a folder.
        stem = re.sub(r"\.[^./#]*(?=$|#)", "", sample.name).replace("/", "_").replace("#", "_")
        path = self._folder / "pictures" / f"{stem}.png"
        save_rgb(path, detection_picture(image, found, names, caption=caption, known=False))
        self.artifacts.append(str(path))
        self._drawn += 1

    def _add(self, sample: Frame, picture: NDArray[np.uint8]) -> None:
        if self._film is None or self._film.clip != sample.clip:
            self._close_film()
            path = self._folder / "videos" / f"{sample.clip.replace('/', '_').replace('.', '_')}.mp4"
            self._film = _Film(path, sample, picture)
            self.artifacts.append(str(path))
        self._film.add(picture)

    def _close_film(self) -> None:
        if self._film is not None:
            self._film.close()
        self._film = None

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file, one per process, and say where it is."""
        self._close_film()
        suffix = f".{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = self._folder / f"detections{suffix}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self._entries))
        self.artifacts.insert(0, str(path))
        rank_zero_info(f"{len(self._entries)} detections in {path}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Finish a video that was begun, so that it opens."""
        self._close_film()


def _source(sample: DetectionSample) -> dict[str, Any]:
    """Where a detection was found."""
    if isinstance(sample, Frame):
        return {"file_name": sample.clip, "frame": sample.index, "time": round(sample.time, 4)}
    return {"file_name": sample.name}


class _Film:
    """An mp4 that grows by a picture at a time."""

    def __init__(self, path: Path, sample: Frame, picture: NDArray[np.uint8]) -> None:
        self.clip = sample.clip
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = picture.shape[:2]
        self.size = height + height % 2, width + width % 2  # the codec halves the colours' resolution
        codec = cv2.VideoWriter.fourcc(*"mp4v")
        self._writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, codec, sample.fps, self.size[::-1])
        if not self._writer.isOpened():
            raise InputError(f"predictions.video: OpenCV cannot write {path}")

    def add(self, picture: NDArray[np.uint8]) -> None:
        """Append an RGB picture."""
        padded = np.zeros((*self.size, 3), np.uint8)
        padded[: picture.shape[0], : picture.shape[1]] = picture[:, :, ::-1]
        self._writer.write(padded)

    def close(self) -> None:
        """Write the index, without which no player opens the file."""
        self._writer.release()
