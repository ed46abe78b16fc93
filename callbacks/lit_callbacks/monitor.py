"""A few numbers about memory and speed, gathered without slowing the training down."""

from __future__ import annotations

import statistics
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
_MUCH_WAITING = 0.2  # share of the training time above which the summary names remedies


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
    """Batches, samples, seconds and seconds of waiting since the last reset."""

    def __init__(self) -> None:
        self.batches = 0
        self.samples = 0
        self.seconds = 0.0
        self.waited = 0.0

    def add(self, samples: int, seconds: float, waited: float) -> None:
        self.batches += 1
        self.samples += samples
        self.seconds += seconds
        self.waited += waited

    def rates(self, world_size: int) -> dict[str, float]:
        seconds = max(self.seconds, 1e-9)
        return {"samples/s": self.samples * world_size / seconds, "data_wait": self.waited / seconds}


class _Recurring:
    """Something that happens every so many batches: how much of it a batch brings.

    Only the batches up to the last time count. Shortly before the fifth validation, four of them took place in almost
    five periods; dividing by all batches would say that they are rarer than they are.
    """

    def __init__(self) -> None:
        self.amount = 0.0
        self._batches = 0

    def add(self, amount: float, batches: int) -> None:
        """Count `amount` after `batches` batches in all."""
        self.amount += amount
        self._batches = batches

    def per_batch(self) -> float:
        return self.amount / self._batches if self._batches else 0.0

    def left(self, batches: int, left: float) -> float:
        """What is to come after `batches`, in `left` further ones; at the end of a period also what is due now."""
        return max(0.0, self.per_batch() * (batches + left) - self.amount)


def _hours(seconds: float) -> str:
    """Hours, minutes and seconds.

    Example:
        >>> _hours(3725)
        '1:02:05'
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _table(s: Mapping[str, float]) -> str:
    """The summary of a fit as three columns of text."""
    card = f"of {s['card_gb']:.1f} GB" if "card_gb" in s else ""
    spread = f"median of {s['windows']:.0f} windows, IQR {s['samples/s_iqr']:.1f}" if s["windows"] else ""
    rows = [
        ("peak reserved", f"{s['mem_gb']:.2f} GB", card),
        ("peak allocated", f"{s['mem_alloc_gb']:.2f} GB", ""),
        ("samples/s", f"{s['samples/s_median']:.1f}", spread),
        ("waiting for data", f"{s['data_wait']:.0%}", f"of {_hours(s['seconds'])} of training"),
        ("validation", f"{s['validation']:.0%}", f"of {_hours(s['wall_s'])} in all"),
        ("steps", f"{s['steps']:.0f}", ""),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c}".rstrip() for a, b, c in rows)


def _waiting_remedy(share: float, loaders: object) -> str:
    """One line on what to do about a loader that is too slow."""
    text = f"{share:.0%} of the training time went by waiting for data"
    every = list(loaders.values()) if isinstance(loaders, Mapping) else loaders
    every = every if isinstance(every, list | tuple) else [every]
    workers = [n for one in every if (n := getattr(one, "num_workers", None)) is not None]
    ahead = [n for one in every if (n := getattr(one, "prefetch_factor", None)) is not None]
    if not workers:
        return f"{text}: look at what the loader, the transfer to the device and other callbacks do between batches."
    return (
        f"{text}: raise num_workers (now {workers[0]}) or prefetch_factor{f' (now {ahead[0]})' if ahead else ''}, keep "
        "decoded samples in memory, or the whole set on the device."
    )


class MemoryAndThroughput(Callback):
    """Log peak memory, samples per second, the share of time spent waiting for data and the time that is left.

    Written to the logger and the progress bar every `every_n_steps` batches: `mem_gb` and `mem_alloc_gb` (peak of the
    fit, GB of 2^30 bytes), `samples/s` (over all processes), `data_wait` (0 to 1: time between the end of a batch
    and the start of the next, which is loading, transfer to the device and other callbacks) and `eta_min` (minutes to
    the planned end of the fit). Validation and what is written after it do not count for the rates, nor does the
    batch after a validation within an epoch, nor the first one, since compilation and autotuning fall into it. Nothing
    waits for the device; the rates are right over a window because the host cannot run far ahead of it.

    `eta_min` supposes that the rest is like the fit so far: as many seconds per batch, validations per batch and
    seconds per validation. Before the first validation it knows none. The end is the first of `max_epochs`,
    `max_steps` and `max_time`; a fit without any of them has no `eta_min`.

    At the end of the fit a table is printed, and a line with remedies if more than 20 % of the training time was spent
    waiting.

    Args:
        every_n_steps: Batches per window.
        warn_fraction: Warn once when the allocator has reserved more than this share of the card.

    Attributes:
        summary: After the fit, over all of it: the first four numbers; `seconds`, the counted training time;
            `samples/s_median` and `samples/s_iqr` over the `windows`; `steps`, the batches after which an optimizer
            stepped; `wall_s`, the time in all; `validation`, the share of it in validation and what was written
            after it; on a GPU `card_gb`.

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
        self._rates: list[float] = []
        self._batches = 0
        self._largest = 0
        self._last_end: float | None = None
        self._start = 0.0
        self._warned = False
        # For the time that is left: when training stopped for something else, and what recurs.
        self._paused: float | None = None
        self._validated = False
        self._validation, self._between, self._steps = _Recurring(), _Recurring(), _Recurring()
        self._global_step = 0
        self._step_batches = 0
        self._epoch_length: int | None = None
        self._began = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start all counters anew."""
        self._reset()
        self._began = perf_counter()
        self._global_step = trainer.global_step
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from here what starting the loader's workers takes."""
        if self._batches:
            self._last_end = perf_counter()
            self._resume(self._last_end)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The wait for data ends here."""
        self._start = perf_counter()
        if self._validated:
            self._resume(self._start)

    def _resume(self, now: float) -> None:
        """Training goes on: book the time since the last batch."""
        if self._paused is not None:
            (self._validation if self._validated else self._between).add(now - self._paused, self._batches)
        self._paused, self._validated = None, False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; at the end of a window, log."""
        now = perf_counter()
        samples = samples_in(batch)
        if self._last_end is not None:
            waited = self._start - self._last_end
            for clock in (self._window, self._total):
                clock.add(samples, now - self._start + waited, waited)
        self._last_end = self._paused = now
        self._batches += 1
        self._largest = max(self._largest, samples)
        if trainer.global_step != self._global_step:
            self._steps.add(trainer.global_step - self._global_step, self._batches)
            self._global_step = trainer.global_step
            self._step_batches += 1
        if self._batches % self.every_n_steps == 0 and self._window.samples:
            self._log(trainer, pl_module, batch_idx)
            self._window = _Clock()

    def _log(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        device = trainer.strategy.root_device
        metrics = {**peak_memory_gb(device), **self._window.rates(trainer.world_size)}
        self._rates.append(metrics["samples/s"])
        left = self._seconds_left(trainer, batch_idx)
        if left is not None:
            # A large number with decimals would fill the bar.
            metrics["eta_min"] = round(left / 60, 1) if left < 6000 else float(round(left / 60))
        # The axis of everything that the module logs; global_step counts each optimizer of a batch.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
        if not trainer.barebones:
            for key in ("mem_gb", "samples/s", "eta_min"):
                if key not in metrics:
                    continue
                # A number would be sent to the device and read back; a CPU tensor stays where the bar reads it.
                value = torch.tensor(metrics[key])
                pl_module.log(key, value, prog_bar=True, logger=False, on_step=True, on_epoch=False, batch_size=1)
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory / _GB
            self._check(metrics["mem_gb"], total, trainer.accumulate_grad_batches)

    def _seconds_left(self, trainer: Trainer, batch_idx: int) -> float | None:
        """Time to the first of the limits of this fit; None if there is none, or if it cannot be told yet."""
        limits: list[float] = []
        batches = self._batches_left(trainer, batch_idx)
        if batches is not None:
            train = self._total.seconds / max(1, self._total.batches)
            pauses = sum(pause.left(self._batches, batches) for pause in (self._validation, self._between))
            limits.append(batches * train + pauses)
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            remaining = getattr(callback, "time_remaining", None)  # Lightning's Timer, which max_time adds
            seconds = remaining() if callable(remaining) else None
            if isinstance(seconds, int | float):
                limits.append(seconds)
        return max(0.0, min(limits)) if limits else None

    def _batches_left(self, trainer: Trainer, batch_idx: int) -> float | None:
        limits: list[float] = []
        length = trainer.num_training_batches
        if length == float("inf"):  # an iterable set without a length: its first epoch tells
            length = self._epoch_length
        if trainer.max_epochs is not None and trainer.max_epochs >= 0 and length is not None:
            limits.append((trainer.max_epochs - trainer.current_epoch) * length - (batch_idx + 1))
        if trainer.max_steps >= 0:
            per_batch = self._steps.per_batch() or 1 / trainer.accumulate_grad_batches
            steps = trainer.max_steps - self._global_step + self._steps.amount
            limits.append(steps / per_batch - self._batches)
        return min(limits) if limits else None

    def _check(self, reserved: float, total: float, accumulate: int = 1) -> None:
        """Warn once, before the run dies of a batch that is a little larger."""
        if self._warned or reserved <= self.warn_fraction * total:
            return
        self._warned = True
        if self._largest == 1:
            remedy = "The batch is one sample already: take smaller inputs, 16-bit precision or gradient checkpointing."
        else:
            keeps = "nearly keeps" if self._largest % 2 else "keeps"
            remedy = f"Halve batch_size and double accumulate_grad_batches, which {keeps} the effective batch"
            half = -(-self._largest // 2)
            now = f"batch_size {self._largest} and accumulate_grad_batches {accumulate}"
            remedy += f": {half} and {2 * accumulate} in place of {now}." if half else "."
        rank_zero_warn(
            f"{reserved:.1f} of {total:.1f} GB of the card are reserved, {reserved / total:.0%}: the run may end out "
            f"of memory. {remedy}"
        )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the next batch out: before it come validation and perhaps the writing of a checkpoint."""
        self._last_end = None
        self._validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the length of an epoch, which an iterable set does not tell beforehand."""
        self._epoch_length = trainer.fit_loop.epoch_loop.batch_progress.current.completed

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fill `summary` and print it as a table."""
        now = perf_counter()
        self._resume(now)
        device = trainer.strategy.root_device
        rates = self._total.rates(trainer.world_size)
        windows = self._rates or [rates["samples/s"]]
        several = len(windows) > 1
        low, middle, high = statistics.quantiles(windows, n=4, method="inclusive") if several else windows * 3
        wall = now - self._began
        self.summary = {
            **peak_memory_gb(device),
            **rates,
            "seconds": self._total.seconds,
            "samples/s_median": middle,
            "samples/s_iqr": high - low,
            "windows": len(self._rates),
            "steps": self._step_batches,
            "wall_s": wall,
            "validation": self._validation.amount / max(wall, 1e-9),
        }
        if device.type == "cuda":
            self.summary["card_gb"] = torch.cuda.get_device_properties(device).total_memory / _GB
        pl_module.print(_table(self.summary))
        if rates["data_wait"] > _MUCH_WAITING:
            pl_module.print(_waiting_remedy(rates["data_wait"], trainer.train_dataloader))
