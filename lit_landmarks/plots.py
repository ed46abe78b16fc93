"""Pictures of what was found: overlays with error vectors, the worst images, bars per landmark."""

from __future__ import annotations

import heapq
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from numpy.typing import NDArray

from lit_common.images import save_rgb
from lit_landmarks.geometry import transform_points

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

GREEN, RED, YELLOW, WHITE = (80, 220, 100), (255, 70, 70), (255, 210, 60), (255, 255, 255)
SUBPIXEL = 4  # bits of cv2's fixed-point coordinates


def overlay(
    image: NDArray[np.uint8],
    points: NDArray[np.floating[Any]],
    target: NDArray[np.floating[Any]] | None = None,
    names: Sequence[str] = (),
    caption: str = "",
    least_side: int = 640,
) -> NDArray[np.uint8]:
    """Draw landmarks over an image.

    Args:
        image: (C, H, W) uint8, C 1 or 3.
        points: (K, 2) found landmarks in pixels of the image, in red (green where there is no target).
        target: (K, 2) true landmarks in green, with a yellow line for the error; NaN ones are left out.
        names: K labels.
        caption: One line at the top.
        least_side: Smaller images are enlarged to this height, so that the marks stay readable.

    Returns:
        (H', W', 3) uint8 RGB.
    """
    zoom = max(1.0, least_side / image.shape[1])
    canvas = np.array(np.broadcast_to(image.transpose(1, 2, 0), (*image.shape[1:], 3)), order="C")
    if zoom > 1:
        canvas = np.asarray(cv2.resize(canvas, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_LINEAR), np.uint8)
    radius = max(2, round(canvas.shape[0] / 200))

    def place(point: NDArray[np.floating[Any]]) -> tuple[int, int]:
        scaled = ((point + 0.5) * zoom - 0.5) * (1 << SUBPIXEL)
        return round(float(scaled[0])), round(float(scaled[1]))

    def dot(at: tuple[int, int], color: tuple[int, int, int]) -> None:
        cv2.circle(canvas, at, radius << SUBPIXEL, color, -1, cv2.LINE_AA, SUBPIXEL)

    for k, point in enumerate(points):
        if not np.isfinite(point).all():
            continue
        at = place(point)
        known = target is not None and bool(np.isfinite(target[k]).all())
        if known and target is not None:
            truth = place(target[k])
            cv2.line(canvas, truth, at, YELLOW, max(1, radius // 2), cv2.LINE_AA, SUBPIXEL)
            dot(truth, GREEN)
        dot(at, RED if known else GREEN)
        if k < len(names):
            where = (at[0] >> SUBPIXEL) + radius + 2, (at[1] >> SUBPIXEL) - radius
            cv2.putText(canvas, names[k], where, cv2.FONT_HERSHEY_SIMPLEX, radius / 8, WHITE, 1, cv2.LINE_AA)
    if caption:
        cv2.putText(canvas, caption, (8, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.5, WHITE, 1, cv2.LINE_AA)
    return canvas


def landmark_bars(mean: NDArray[np.floating[Any]], names: Sequence[str], unit: str) -> Figure:
    """Horizontal bars of the mean radial error of each landmark, the hardest at the top."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: it would keep every figure of the run

    order = np.argsort(np.nan_to_num(mean))
    figure = Figure(figsize=(7, 0.8 + 0.26 * len(mean)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.barh([names[i] for i in order], np.nan_to_num(mean)[order], color="#4878a8")
    axes.axvline(float(np.nanmean(mean)) if np.isfinite(mean).any() else 0.0, color="#333333", lw=1, ls="--")
    axes.set_xlabel(f"mean radial error ({unit})")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


class _Seen(NamedTuple):
    known: bool  # whether the error is in mm; such images come first where some are not
    error: float
    order: int  # breaks ties, so that arrays are never compared
    image: NDArray[np.uint8]
    points: NDArray[np.float32]
    target: NDArray[np.float32]
    position: int


class LandmarkPlots(Callback):
    """Overlays of the worst images and bars per landmark, as PNG files and in TensorBoard.

    Files go to `<log folder>/overlays` after validations at `every_n_epochs`, after the last one, and after `test`.
    With several devices they show the images that the first one evaluated.

    Args:
        worst: Number of images, those with the largest mean error first; 0 switches the callback off.
        every_n_epochs: Epochs between drawings while training.

    Attributes:
        artifacts: Paths of the last files written.

    Example:
        >>> LandmarkPlots(worst=2).artifacts
        []
    """

    def __init__(self, worst: int = 4, every_n_epochs: int = 25) -> None:
        if worst < 0 or every_n_epochs < 1:
            raise ValueError("plots: expected worst of 0 or more and every_n_epochs of 1 or more")
        self.worst, self.every_n_epochs = worst, every_n_epochs
        self.artifacts: list[Path] = []
        self._heap: list[_Seen] = []
        self._errors: list[NDArray[np.float64]] = []
        self._count = 0

    def _due(self, trainer: Trainer) -> bool:
        if not self.worst or trainer.sanity_checking:
            return False
        if not trainer.training and trainer.state.fn != "fit":
            return True
        epoch = trainer.current_epoch + 1
        last = trainer.max_epochs is not None and epoch >= trainer.max_epochs > 0
        last = last or trainer.should_stop or 0 < trainer.max_steps <= trainer.global_step
        return last or epoch % self.every_n_epochs == 0

    def _start(self) -> None:
        self._heap, self._errors, self._count = [], [], 0

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last validation."""
        self._start()

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last test."""
        self._start()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the worst of a batch."""
        if self._due(trainer):
            self._collect(outputs, batch)

    on_test_batch_end = on_validation_batch_end

    def _collect(self, outputs: Any, batch: Any) -> None:
        in_px, in_mm = to_numpy(outputs["error_px"]), to_numpy(outputs["error_mm"])
        self._errors.append(np.stack((in_px, in_mm)))
        target = to_numpy(transform_points(batch.matrix, batch.target).float())
        points = to_numpy(outputs["frame_points"].float())
        for i in range(len(points)):
            known = bool(np.isfinite(in_mm[i]).any())
            row = in_mm[i] if known else in_px[i]
            mean = float(np.nanmean(row)) if np.isfinite(row).any() else 0.0
            self._count += 1
            if len(self._heap) >= self.worst and (known, mean) <= self._heap[0][:2]:
                continue
            seen = _Seen(
                known, mean, self._count, to_numpy(batch.image[i]), points[i], target[i], int(batch.position[i])
            )
            (heapq.heappushpop if len(self._heap) >= self.worst else heapq.heappush)(self._heap, seen)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, if it is time."""
        if self._due(trainer):
            self._draw(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        if self._due(trainer):
            self._draw(trainer, pl_module, "test")
            for path in self.artifacts[:1]:
                print(f"overlay: {path}")

    def _draw(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = (
            Path(trainer.log_dir or trainer.default_root_dir) / "overlays"
        )  # on every process: it asks the first one
        if not trainer.is_global_zero or not self._heap:
            return
        names = getattr(pl_module, "landmark_names", [])
        data = trainer.datamodule  # type: ignore[attr-defined]
        files = data.names(stage) if data is not None and hasattr(data, "names") else []
        both = np.concatenate(self._errors, axis=1)
        in_mm = bool(np.isfinite(both[1]).any())
        errors, unit = (both[1], "mm") if in_mm else (both[0], "px")
        board = [lg.experiment for lg in trainer.loggers if isinstance(lg, TensorBoardLogger)]
        self.artifacts = []
        for rank, seen in enumerate(sorted(self._heap, reverse=True), start=1):
            file = files[seen.position] if seen.position < len(files) else str(seen.position)
            measured = f"{seen.error:.2f} {'mm' if seen.known else 'px'}"
            caption = f"{file}  mean error {measured}"
            picture = overlay(seen.image, seen.points, seen.target, names, caption)
            path = folder / f"{stage}_worst_{rank}.png"
            save_rgb(path, picture)
            self.artifacts.append(path)
            for writer in board:
                writer.add_image(f"{stage}/worst_{rank}", picture, trainer.global_step, dataformats="HWC")
        counts = np.isfinite(errors).sum(0)
        mean = np.where(counts > 0, np.nansum(errors, axis=0) / np.maximum(counts, 1), np.nan)
        figure = landmark_bars(mean, names or [str(i + 1) for i in range(len(mean))], unit)
        path = folder / f"{stage}_landmarks.png"
        figure.savefig(path, dpi=100)
        self.artifacts.append(path)
        for writer in board:
            writer.add_figure(f"{stage}/landmarks", figure, trainer.global_step)


def to_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """A tensor of any device as a NumPy array."""
    return tensor.detach().cpu().numpy()
