"""A few numbers about memory and speed, gathered without slowing the training down."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

__all__ = ["MemoryAndThroughput"]

_GB = 2**30


def _leaves(batch: object) -> Iterable[Tensor]:
    """Tensors of a batch, in order, through mappings, sequences and dataclasses."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _leaves(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _leaves(value)
    elif is_dataclass(batch):
        for field in fields(batch):
            yield from _leaves(getattr(batch, field.name))


def samples_in(batch: object) -> int:
    """Samples of a batch: length of the first axis of its first tensor; 1 without such a tensor.

    Example:
        >>> samples_in({"image": torch.zeros(4, 3, 8, 8), "id": ["a", "b", "c", "d"]})
        4
    """
    return next((leaf.shape[0] for leaf in _leaves(batch) if leaf.ndim), 1)


def peak_memory_gb(device: torch.device) -> dict[str, float]:
    """Peak memory in GB (2^30 bytes): that of the CUDA allocator, or of the process on a CPU.

    `mem_gb` is what the allocator has reserved, which must fit on the card; `mem_alloc_gb` is what tensors took of it.
    """
    if device.type == "cuda":
        # Counters of the allocator on the host; reading them does not wait for the device.
        return {
            "mem_gb": torch.cuda.max_memory_reserved(device) / _GB,
            "mem_alloc_gb": torch.cuda.max_memory_allocated(device) / _GB,
        }
    try:
        import resource
    except ImportError:  # Windows
        return {"mem_gb": 0.0, "mem_alloc_gb": 0.0}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"mem_gb": peak / _GB, "mem_alloc_gb": peak / _GB}


class _Clock:
    """Samples, seconds and seconds of waiting since the last reset."""

    def __init__(self) -> None:
        self.samples = 0
        self.seconds = 0.0
        self.waited = 0.0

    def add(self, samples: int, seconds: float, waited: float) -> None:
        self.samples += samples
        self.seconds += seconds
        self.waited += waited

    def rates(self, world_size: int) -> dict[str, float]:
        seconds = max(self.seconds, 1e-9)
        return {"samples/s": self.samples * world_size / seconds, "data_wait": self.waited / seconds}


class MemoryAndThroughput(Callback):
    """Log peak memory, samples per second and the share of time spent waiting for data.

    Written to the logger and the progress bar every `every_n_steps` batches: `mem_gb` and `mem_alloc_gb` (peak of the
    fit, GB of 2^30 bytes), `samples/s` (over all processes) and `data_wait` (0 to 1: time between the end of a batch
    and the start of the next, which is loading, transfer to the device and other callbacks). Validation and the batch
    after it do not count, nor does the first batch, since compilation and autotuning fall into it. Nothing waits for
    the device; the rates are right over a window because the host cannot run far ahead of it.

    Args:
        every_n_steps: Batches per window.
        warn_fraction: Warn once when the allocator has reserved more than this share of the card.

    Attributes:
        summary: After the fit, the same four numbers over all of it and `seconds`, the counted training time.

    Example:
        >>> monitor = MemoryAndThroughput(every_n_steps=20)
        >>> monitor.summary
        {}
    """

    def __init__(self, every_n_steps: int = 50, warn_fraction: float = 0.95) -> None:
        if every_n_steps < 1 or not 0.0 < warn_fraction <= 1.0:
            raise MisconfigurationException("MemoryAndThroughput: every_n_steps must be >= 1, warn_fraction in (0, 1]")
        self.every_n_steps = every_n_steps
        self.warn_fraction = warn_fraction
        self.summary: dict[str, float] = {}
        self._reset()

    def _reset(self) -> None:
        self._window, self._total = _Clock(), _Clock()
        self._batches = 0
        self._last_end: float | None = None
        self._start = 0.0
        self._warned = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start all counters anew."""
        self._reset()
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from here what starting the loader's workers takes."""
        if self._batches:
            self._last_end = perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The wait for data ends here."""
        self._start = perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; at the end of a window, log."""
        now = perf_counter()
        if self._last_end is not None:
            waited = self._start - self._last_end
            for clock in (self._window, self._total):
                clock.add(samples_in(batch), now - self._start + waited, waited)
        self._last_end = now
        self._batches += 1
        if self._batches % self.every_n_steps == 0 and self._window.samples:
            self._log(trainer, pl_module)
            self._window = _Clock()

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        device = trainer.strategy.root_device
        metrics = {**peak_memory_gb(device), **self._window.rates(trainer.world_size)}
        # The axis of everything that the module logs; global_step counts each optimizer of a batch.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
        if not trainer.barebones:
            for key in ("mem_gb", "samples/s"):
                # A number would be sent to the device and read back; a CPU tensor stays where the bar reads it.
                value = torch.tensor(metrics[key])
                pl_module.log(key, value, prog_bar=True, logger=False, on_step=True, on_epoch=False, batch_size=1)
        if device.type == "cuda":
            self._check(metrics["mem_gb"], torch.cuda.get_device_properties(device).total_memory / _GB)

    def _check(self, reserved: float, total: float) -> None:
        """Warn once, before the run dies of a batch that is a little larger."""
        if self._warned or reserved <= self.warn_fraction * total:
            return
        self._warned = True
        rank_zero_warn(
            f"{reserved:.1f} of {total:.1f} GB of the card are reserved, {reserved / total:.0%}: the run may end out "
            "of memory. Halve batch_size and double accumulate_grad_batches, which keeps the effective batch."
        )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the next batch out: before it come validation and perhaps the writing of a checkpoint."""
        self._last_end = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fill `summary` and print it as one line."""
        rates = self._total.rates(trainer.world_size)
        self.summary = {**peak_memory_gb(trainer.strategy.root_device), **rates, "seconds": self._total.seconds}
        s = self.summary
        pl_module.print(
            f"peak memory {s['mem_gb']:.2f} GB reserved, {s['mem_alloc_gb']:.2f} GB allocated; "
            f"{s['samples/s']:.1f} samples/s; {s['data_wait']:.0%} of {s['seconds']:.0f} s waiting for data"
        )
