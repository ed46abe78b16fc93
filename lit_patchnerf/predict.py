"""Decoded frames as an mp4 or as a folder of pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray

from lit_cli.errors import InputError
from lit_common.images import save_rgb
from lit_patchnerf.decoding import frame_name
from lit_patchnerf.packing import film_fps
from lit_patchnerf.pictures import comparison
from lit_patchnerf.video import VideoWriter, read_video

__all__ = ["FrameWriter"]


class FrameWriter(BasePredictionWriter):
    """Writes decoded frames as soon as their batch is done: `video.mp4`, or `frames/000000.png` and so on.

    Args:
        format: `mp4`, whose codec is lossy, or `frames` as PNG.
        dirpath: Folder; by default `predictions` in the run's log folder.
        fps: Of the mp4; by default the video's, and that of moments between frames higher, so that the film lasts as
            long as the video.
        beside: The original, a file or a folder of images: its frames are shown beside the decoded ones.

    Attributes:
        artifacts: The files of the last run.

    Raises:
        InputError: with one line: an unknown format, a rate that is not positive, a film by several processes, an
            original that does not fit or has no such frame, or a file that cannot be written.
    """

    def __init__(
        self,
        format: Literal["mp4", "frames"] = "mp4",
        dirpath: str | None = None,
        fps: float | None = None,
        beside: str | None = None,
    ) -> None:
        super().__init__(write_interval="batch")
        if format not in ("mp4", "frames"):
            raise InputError(f"predictions.format: expected mp4 or frames, got {format}")
        if fps is not None and not 0 < fps < math.inf:
            raise InputError(f"predictions.fps: expected a positive number, got {fps}")
        self.format, self.dirpath, self.fps, self.beside = format, dirpath, fps, beside
        self.artifacts: list[str] = []
        self._film: VideoWriter | None = None
        self._first: tuple[float, NDArray[np.uint8]] | None = None
        self._count = 0
        self._originals: NDArray[np.uint8] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder on all processes together."""
        if stage != "predict":
            return
        if self.format == "mp4" and trainer.world_size > 1:
            raise InputError(
                "predictions.format: for an mp4 one process has to see all frames, so expected --trainer.devices 1 or "
                f"--predictions.format frames, got {trainer.world_size} processes"
            )
        self._originals = self._read(pl_module) if self.beside is not None else None
        folder = trainer.log_dir or trainer.default_root_dir
        self._folder = Path(self.dirpath) if self.dirpath else Path(folder) / "predictions"
        self.artifacts, self._film, self._first, self._count = [], None, None, 0

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
        """Write the frames of a batch."""
        pixels: NDArray[np.uint8] = prediction["pixels"].cpu().numpy()
        region = getattr(trainer.datamodule, "region", None)  # type: ignore[attr-defined]
        for number, decoded in zip(prediction["numbers"], pixels, strict=True):
            frame = decoded if self._originals is None else self._beside(float(number), decoded, region)
            if self.format == "mp4":
                self._add(float(number), frame, float(pl_module.hparams["fps"]))
                continue
            path = self._folder / "frames" / frame_name(number)
            try:
                save_rgb(path, frame)
            except OSError as error:
                raise InputError(
                    f"predictions.dirpath: {path} cannot be written ({error.strerror or error})"
                ) from error
            self.artifacts.append(str(path))
            self._count += 1

    def _read(self, pl_module: LightningModule) -> NDArray[np.uint8]:
        assert self.beside is not None
        count, size = pl_module.hparams["frames"], tuple(pl_module.hparams["geometry"]["frame"])
        frames, facts = read_video(self.beside, limit=count)
        if facts.size != size or len(frames) < count:
            raise InputError(
                f"predictions.beside: {self.beside} has {len(frames)} frames of {facts.size[0]}x{facts.size[1]}, "
                f"expected {count} of {size[0]}x{size[1]} as the network's"
            )
        return frames

    def _beside(self, number: float, decoded: NDArray[np.uint8], region: Sequence[int] | None) -> NDArray[np.uint8]:
        assert self._originals is not None
        if number != int(number):
            raise InputError(f"predictions.beside: the original has no frame {number:g}, expected data.predict_step 1")
        original = self._originals[int(number)]
        if region is not None:
            top, left, height, width = region
            original = original[top : top + height, left : left + width]
        return comparison(original, decoded, f"original  {int(number)}", error=False)

    def _add(self, number: float, frame: NDArray[np.uint8], fps: float) -> None:
        """Append a frame; the first one waits for the second, whose distance decides on the rate."""
        if self._film is not None:
            self._film.add(frame)
        elif self._first is None:
            self._first = number, frame
        else:
            self._open(fps, number - self._first[0]).add(frame)
        self._count += 1

    def _open(self, fps: float, step: float) -> VideoWriter:
        assert self._first is not None
        self._film = VideoWriter(self._folder / "video.mp4", self.fps or film_fps(fps, step))
        self._film.add(self._first[1])
        self.artifacts.append(str(self._film.path))
        self._first = None
        return self._film

    def _close(self) -> None:
        if self._film is not None:
            self._film.close()
        self._film = None

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the film and say where it is."""
        if self._first is not None:
            self._open(float(pl_module.hparams["fps"]), 1.0)
        self._close()
        where = self._folder / ("video.mp4" if self.format == "mp4" else "frames")
        rank_zero_info(f"{self._count} frames in {where}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Finish a film that was begun, so that it opens."""
        self._close()
