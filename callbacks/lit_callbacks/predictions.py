"""Pictures of predictions, drawn by the module, from the validation that runs anyway."""

from __future__ import annotations

import copy
import heapq
import os
import re
import struct
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import zip_longest
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lit_callbacks.monitor import samples_in
from lit_callbacks.validation import ValidationSchedule, training_ends

__all__ = ["PredictionLogger", "select_sample"]

HOOK = "plot_predictions(self, batch, outputs) -> figure, or list or dict of figures"


def _is_batched(value: object, size: int) -> bool:
    """Whether the first axis of an array counts the samples."""
    shape = getattr(value, "shape", None)
    return shape is not None and len(shape) > 0 and shape[0] == size


def _one_each(values: Sequence[Any], size: int) -> bool:
    """Whether a list holds one element per sample (names, boxes of each image) and not the parts of a batch."""
    if len(values) != size or len({type(value) for value in values}) != 1:
        return False
    if all(_is_batched(value, size) for value in values):
        return False
    return not all(isinstance(value, list | tuple) and len(value) == size for value in values)


def select_sample(batch: Any, index: int, size: int) -> Any:
    """One sample of a batch, as a batch of one, copied to the host.

    Tensors and arrays whose first axis has `size` entries are cut, also within mappings, sequences, named tuples and
    dataclasses. From a list with one element per sample (names, images of different sizes) that element is taken; a
    list of tensors that all have `size` entries is taken for the parts of a batch. Everything else is kept as it is.

    Args:
        batch: A batch, or what a step returned for it.
        index: Which sample.
        size: Samples in the batch.

    Example:
        >>> batch = {"image": torch.zeros(4, 3, 8, 8), "name": ["a", "b", "c", "d"], "scale": 0.5}
        >>> sample = select_sample(batch, 2, size=4)
        >>> sample["image"].shape, sample["name"], sample["scale"]
        (torch.Size([1, 3, 8, 8]), ['c'], 0.5)
    """
    if isinstance(batch, Tensor):
        # A copy, since a slice would keep the whole batch alive.
        part = batch[index : index + 1] if _is_batched(batch, size) else batch
        return part.detach().to("cpu", copy=True)
    if isinstance(batch, Mapping):
        return {key: select_sample(value, index, size) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(select_sample(value, index, size) for value in batch))
    if isinstance(batch, list | tuple):
        if _one_each(batch, size):
            return type(batch)([select_sample(batch[index], 0, -1)])
        return type(batch)([select_sample(value, index, size) for value in batch])
    if hasattr(batch, "__array__"):
        return batch[index : index + 1].copy() if _is_batched(batch, size) else batch
    if is_dataclass(batch) and not isinstance(batch, type):
        part = copy.copy(batch)
        for field in fields(batch):
            object.__setattr__(part, field.name, select_sample(getattr(batch, field.name), index, size))
        return part
    return batch


def to_picture(figure: Any, dpi: int) -> Tensor:
    """A figure as uint8 RGB, shape (H, W, 3).

    Args:
        figure: A matplotlib figure, or an array or tensor of shape (H, W), (H, W, C) or (C, H, W) with C 1 or 3, uint8,
            bool or floating in [0, 1].
        dpi: Dots per inch of a matplotlib figure.

    Raises:
        ValueError: for anything else.
    """
    matplotlib_figure = getattr(sys.modules.get("matplotlib.figure"), "Figure", None)
    if matplotlib_figure is not None and isinstance(figure, matplotlib_figure):
        return _rasterise(figure, dpi)
    if not isinstance(figure, Tensor):
        if not hasattr(figure, "__array__"):
            raise ValueError(f"expected a matplotlib figure, an array or a tensor, got {type(figure).__name__}")
        figure = torch.as_tensor(figure.__array__().copy())
    picture = figure.detach().cpu()
    if picture.ndim == 2:
        picture = picture[..., None]
    if picture.ndim == 3 and picture.shape[-1] not in (1, 3) and picture.shape[0] in (1, 3):
        picture = picture.permute(1, 2, 0)
    if picture.ndim != 3 or picture.shape[-1] not in (1, 3) or 0 in picture.shape:
        raise ValueError(f"expected (H, W), (H, W, C) or (C, H, W) with C 1 or 3, got {tuple(figure.shape)}")
    if picture.dtype == torch.bool:
        picture = picture * torch.tensor(255, dtype=torch.uint8)
    elif picture.is_floating_point():
        picture = picture.float().nan_to_num(0.0).clamp(0, 1).mul(255).round().to(torch.uint8)
    elif picture.dtype != torch.uint8:
        raise ValueError(f"expected uint8, bool or floating values in [0, 1], got {picture.dtype}")
    return picture.expand(-1, -1, 3).contiguous()


def _rasterise(figure: Any, dpi: int) -> Tensor:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels: Any = memoryview(canvas.buffer_rgba())
    _close(figure)
    rgba = torch.frombuffer(bytearray(pixels), dtype=torch.uint8)
    return rgba.view(*pixels.shape)[..., :3].contiguous()


def _close(figure: Any) -> None:
    """Pyplot keeps every figure that it made until it is closed."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is not None:
        pyplot.close(figure)


def png(picture: Tensor) -> bytes:
    """PNG file of a (H, W, 3) uint8 picture, without a library for images.

    Example:
        >>> png(torch.zeros(2, 2, 3, dtype=torch.uint8))[1:4]
        b'PNG'
    """
    height, width, _ = picture.shape
    # Each line begins with its filter: 0, none.
    lines = torch.cat((torch.zeros(height, 1, dtype=torch.uint8), picture.reshape(height, -1)), dim=1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(lines.numpy().tobytes(), 6))
    return b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class _Kept(NamedTuple):
    score: float
    order: int  # negative position: of equal scores the first seen stays, and samples are never compared
    batch: Any
    outputs: Any


class PredictionLogger(Callback):
    """Draw the first validation samples and the worst ones, to the loggers and to PNG files.

    The module draws, in a method `plot_predictions(batch, outputs)`. It gets one sample as a batch of one and what
    `validation_step` returned for it, on the CPU, and returns a figure, or a list or a dict of figures: matplotlib
    figures, or arrays or tensors of shape (H, W, 3) or (3, H, W), uint8 or floating in [0, 1]. What is drawn has to be
    in `outputs`, since the weights may be on another device by then.

    The worst samples need a method `sample_scores(batch, outputs)` as well, which returns one number per sample of a
    batch, shape (B,), larger for worse; NaN for a sample without a score. Without it the first samples alone are drawn.
    Both are called on one process only: no collective call belongs into them.

    Samples are kept at epochs that are due, and at the last one if its end is known before its validation. With a
    `ValidationSchedule`, due drawings wait for the next full validation. `trainer.validate` and `trainer.test` always
    draw. With several devices the first one draws what it has validated.

    Files are named `epoch=005-first-0.png` and `epoch=005-worst-0-score=1.25.png`, or `test-...`; a name that the
    module gives to a figure is added. TensorBoard, Weights & Biases and MLflow get images
    `predictions/first-0`.

    Args:
        every_n_epochs: Epochs between drawings.
        num_first: Number of first samples.
        worst_k: Number of worst samples.
        dirpath: Folder of the files; by default `predictions` in the logger's folder, or in `default_root_dir`.
        to_logger: Send pictures to the loggers.
        to_disk: Write files.
        max_seconds: No sample is begun after this time; one line says how many were left out.
        dpi: Dots per inch of matplotlib figures.

    Attributes:
        artifacts: Paths of the files of the last drawing.

    Raises:
        MisconfigurationException: for values out of range, or a module without `plot_predictions`.

    Example:
        >>> PredictionLogger(every_n_epochs=10, worst_k=8).artifacts
        []
    """

    def __init__(
        self,
        every_n_epochs: int = 5,
        num_first: int = 4,
        worst_k: int = 4,
        dirpath: str | None = None,
        to_logger: bool = True,
        to_disk: bool = True,
        max_seconds: float = 20.0,
        dpi: int = 100,
    ) -> None:
        for field, value, least in (
            ("every_n_epochs", every_n_epochs, 1),
            ("num_first", num_first, 0),
            ("worst_k", worst_k, 0),
            ("dpi", dpi, 1),
        ):
            if value < least:
                raise MisconfigurationException(f"PredictionLogger: {field} expected {least} or more, got {value}")
        if not max_seconds > 0:
            raise MisconfigurationException(f"PredictionLogger: max_seconds expected above 0, got {max_seconds}")
        self.every_n_epochs = every_n_epochs
        self.num_first = num_first
        self.worst_k = worst_k
        self.dirpath = dirpath
        self.to_logger = to_logger
        self.to_disk = to_disk
        self.max_seconds = max_seconds
        self.dpi = dpi

        self.artifacts: list[Path] = []
        self._folder = Path()
        self._failed = False
        self._late = False
        self._collecting = False
        self._drawn_epoch = 0
        self._drawn_batch = -1
        self._forget()

    def _forget(self) -> None:
        self._first: list[_Kept] = []
        self._worst: list[_Kept] = []
        self._count = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look for the module's method, and find the folder while all processes are here to agree on it."""
        if stage == "predict" or not self.num_first + self.worst_k:
            return
        if not callable(getattr(pl_module, "plot_predictions", None)):
            raise MisconfigurationException(
                f"PredictionLogger: {type(pl_module).__name__} expected to have a method {HOOK}, got none"
            )
        default = trainer.log_dir or trainer.default_root_dir
        self._folder = Path(self.dirpath) if self.dirpath is not None else Path(default) / "predictions"
        self._failed = self._late = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from here, also in a resumed run."""
        self._drawn_epoch, self._drawn_batch = trainer.current_epoch, -1

    # -------------------------------------------------------------- keeping

    def _due(self, trainer: Trainer) -> bool:
        if self._failed or trainer.sanity_checking or not self.num_first + self.worst_k:
            return False
        if trainer.state.fn != "fit":
            return True
        if not ValidationSchedule.is_full(trainer):
            return False
        epoch = trainer.current_epoch + 1
        if epoch // self.every_n_epochs > self._drawn_epoch // self.every_n_epochs:
            return True
        return training_ends(trainer) and self._drawn_batch != trainer.fit_loop.total_batch_idx

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide once for this validation."""
        self._forget()
        self._collecting = self._due(trainer)

    on_test_start = on_validation_start

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first samples and the worst so far."""
        if not self._collecting or not trainer.is_global_zero:
            return
        try:
            self._keep(pl_module, batch, outputs)
        except Exception as error:
            self._give_up("sample_scores", error)

    on_test_batch_end = on_validation_batch_end

    def _keep(self, pl_module: LightningModule, batch: Any, outputs: Any) -> None:
        scores = self._scores(pl_module, batch, outputs)
        size = len(scores) if scores else samples_in(batch)
        for index in range(min(size, self.num_first - len(self._first))):
            score = scores[index] if scores else float("nan")
            self._first.append(self._one(score, index, size, batch, outputs))
        # Only the worst of the batch can be among the worst of all; the others are not copied.
        worst = heapq.nlargest(self.worst_k, (i for i, s in enumerate(scores) if s == s), key=scores.__getitem__)
        for index in worst:
            if len(self._worst) < self.worst_k:
                heapq.heappush(self._worst, self._one(scores[index], index, size, batch, outputs))
            elif scores[index] > self._worst[0].score:
                heapq.heapreplace(self._worst, self._one(scores[index], index, size, batch, outputs))
        self._count += size

    def _scores(self, pl_module: LightningModule, batch: Any, outputs: Any) -> list[float]:
        judge: Any = getattr(pl_module, "sample_scores", None)
        if not self.worst_k or not callable(judge):
            return []
        scores: Any = judge(batch, outputs)
        if not isinstance(scores, Tensor) or scores.ndim != 1:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"expected a tensor of shape (B,), got {got}")
        return scores.detach().double().tolist()

    def _one(self, score: float, index: int, size: int, batch: Any, outputs: Any) -> _Kept:
        sample, result = select_sample(batch, index, size), select_sample(outputs, index, size)
        return _Kept(score, -(self._count + index), sample, result)

    # -------------------------------------------------------------- drawing

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, while averaged weights, if there are any, are still in place."""
        if not self._collecting:
            return
        self._collecting = False
        if trainer.state.fn == "fit":
            self._drawn_epoch, self._drawn_batch = trainer.current_epoch + 1, trainer.fit_loop.total_batch_idx
        if not trainer.is_global_zero or self._failed:
            return
        try:
            self._draw(trainer, pl_module)
        except Exception as error:
            self._give_up("plot_predictions", error)
        finally:
            self._forget()

    on_test_epoch_end = on_validation_epoch_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let the samples go."""
        self._forget()

    def _give_up(self, method: str, error: Exception) -> None:
        """A picture is not worth a training."""
        self._failed, self._collecting = True, False
        self._forget()
        text = " ".join(str(error).split())
        rank_zero_warn(f"PredictionLogger: no more pictures, {method} failed: {type(error).__name__}: {text}")

    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        start = perf_counter()
        fit = trainer.state.fn == "fit"
        prefix = f"epoch={trainer.current_epoch + 1:03d}" if fit else str(trainer.state.fn.value)  # pyright: ignore[reportOptionalMemberAccess]
        first = [(f"first-{i}", "", kept) for i, kept in enumerate(self._first)]
        ranked = sorted(self._worst, key=lambda kept: (kept.score, kept.order), reverse=True)
        worst = [(f"worst-{i}", f"-score={kept.score:.4g}", kept) for i, kept in enumerate(ranked)]
        # In turn, so that a cut in time leaves some of both.
        queue = [item for pair in zip_longest(first, worst) for item in pair if item is not None]
        self.artifacts = []
        for done, (name, score, kept) in enumerate(queue):
            if perf_counter() - start > self.max_seconds:
                self._report_late(len(queue) - done, len(queue))
                break
            for label, figure in named_figures(pl_module.plot_predictions(kept.batch, kept.outputs)):  # pyright: ignore[reportCallIssue]
                picture = to_picture(figure, self.dpi)
                ending = f"-{label}" if label else ""
                if self.to_logger:
                    tag = f"predictions/{name}" if fit else f"{prefix}_predictions/{name}"
                    self._log(trainer, f"{tag}/{label}" if label else tag, picture)
                if self.to_disk and not getattr(trainer, "fast_dev_run", 0):  # set where pyright does not look
                    path = self._folder / f"{_file_name(prefix + '-' + name + score + ending)}.png"
                    write_atomically(path, png(picture))
                    self.artifacts.append(path)

    def _report_late(self, left: int, total: int) -> None:
        if self._late:
            return
        self._late = True
        rank_zero_warn(
            f"PredictionLogger: {left} of {total} samples were left out, since drawing took longer than max_seconds, "
            f"{self.max_seconds:g}."
        )

    def _log(self, trainer: Trainer, tag: str, picture: Tensor) -> None:
        # The axis of everything that the module logs.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            experiment: Any = getattr(logger, "experiment", None)
            if callable(getattr(experiment, "add_image", None)):  # TensorBoard
                experiment.add_image(tag, picture.numpy(), step, dataformats="HWC")
            elif callable(log_image := getattr(logger, "log_image", None)):  # Weights & Biases
                log_image(key=tag, images=[picture.numpy()], step=step)
            elif callable(getattr(experiment, "log_image", None)) and (
                run := getattr(logger, "run_id", None)
            ):  # MLflow
                experiment.log_image(run, picture.numpy(), artifact_file=f"{tag}/{step}.png")


def named_figures(figures: Any) -> Iterable[tuple[str, Any]]:
    """Label and figure of everything that `plot_predictions` returned; a single figure has no label."""
    if figures is None:
        return []
    if isinstance(figures, Mapping):
        pairs = [(str(label), value) for label, value in figures.items()]
    elif isinstance(figures, list | tuple):
        pairs = [(str(i), value) for i, value in enumerate(figures)]
    else:
        return [("", figures)]
    flat: list[tuple[str, Any]] = []
    for label, value in pairs:
        several = isinstance(value, list | tuple)
        flat += [(f"{label}-{i}", part) for i, part in enumerate(value)] if several else [(label, value)]
    return flat


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", text)
