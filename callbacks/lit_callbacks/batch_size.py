"""The largest batch that fits, found by real training steps before the training begins."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException, _TunerExitException
from lightning.pytorch.utilities.parsing import lightning_getattr, lightning_hasattr, lightning_setattr
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lit_callbacks.probing import Meter, Snapshot, batch_length, meter_for, release, resize_batch, size_of, too_large

__all__ = ["BatchSizeFit", "Probe", "propose"]

_GB = 2**30


class Probe(NamedTuple):
    """What one batch size needed."""

    batch: int
    gb: float | None  # peak in GB of 2^30 bytes, what callbacks need in validation included; None if it was not reached
    fits: bool
    note: str  # why it does not fit


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def propose(fits: int, effective: int) -> tuple[int, int]:
    """Batch and accumulation for a wanted effective batch.

    Of the batches that use at least half of what fits, it takes the one whose product with a whole number of
    accumulated batches comes closest; of equals the largest.

    Args:
        fits: Largest batch that may be used.
        effective: Wanted samples per optimizer step.

    Returns:
        Samples per batch and batches per optimizer step. Their product is `effective` where that is possible without
        going below half of `fits`, as it is for every power of two.

    Raises:
        MisconfigurationException: If a number is below 1.

    Example:
        >>> propose(fits=19, effective=24)
        (12, 2)
        >>> propose(fits=12, effective=23)
        (12, 2)
    """
    if fits < 1 or effective < 1:
        raise MisconfigurationException(f"propose: fits and effective expected 1 or more, got {fits} and {effective}")
    top = min(fits, effective)

    def error(batch: int) -> int:
        return abs(batch * max(1, round(effective / batch)) - effective)

    batch = min(range((top + 1) // 2, top + 1), key=lambda b: (error(b), -b))
    return batch, max(1, round(effective / batch))


def _largest(fits: Callable[[int], bool], start: int, limit: int) -> int:
    """Largest size up to `limit` that fits, 0 if none does: doubling from `start`, then bisecting.

    Example:
        >>> _largest(lambda size: size <= 100, start=8, limit=4096)
        100
    """
    low, high, size = 0, limit + 1, min(start, limit)
    while True:
        if fits(size):
            low = size
        else:
            high = size
        if high - low <= 1:
            return low
        size = min(2 * low, limit) if high > limit else (low + high) // 2


def _bytes_of_callbacks(trainer: Trainer, module: LightningModule) -> int:
    """What callbacks will need in validation and do not hold yet.

    A callback may say so itself by `swap_bytes`, a number or a method without arguments. An average that takes the
    place of the weights in validation keeps these meanwhile: one more copy of what is averaged. The average itself is
    on the device already and needs no such rule.
    """
    total, averaged = 0, False
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        own: Any = getattr(callback, "swap_bytes", None)
        own = own() if callable(own) else own
        if isinstance(own, int):
            total += own
        elif {"EMA", "WeightAveraging"}.intersection(c.__name__ for c in type(callback).__mro__):
            averaged |= getattr(callback, "enabled", True) and getattr(callback, "evaluate", "ema") != "live"
    if averaged:
        total += sum(p.nbytes for p in module.parameters() if p.requires_grad)
        total += sum(b.nbytes for b in module.buffers() if b.is_floating_point())
    return total


# ---- the callback ----------------------------------------------------------------------------------------------------


class _ZeroGradients(Callback):
    """Stands in for all callbacks during a probe.

    With gradients of zero, a gradient scaler never skips the first steps, in which case the optimizer's state would not
    be made and not be counted; and no weight becomes infinite.
    """

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()


def _nothing(*_: Any, **__: Any) -> None:
    pass


@contextmanager
def _muted(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Let nobody hear of the steps. What is changed on the module and the optimizers is up to the snapshot."""
    callbacks, loggers, profiler = trainer.callbacks, trainer.loggers, trainer.profiler  # pyright: ignore[reportAttributeAccessIssue]
    trainer.callbacks = [_ZeroGradients()]  # type: ignore[attr-defined]
    trainer.loggers = [DummyLogger()] if loggers else []
    trainer.profiler = PassThroughProfiler()  # type: ignore[attr-defined]
    vars(module).update(log=_nothing, log_dict=_nothing)
    if hasattr(module, "eager_training_step"):
        vars(module)["training_step"] = module.eager_training_step
    for optimizer in trainer.optimizers:
        optimizer._optimizer_step_pre_hooks.clear()
        optimizer._optimizer_step_post_hooks.clear()
    try:
        yield
    finally:
        trainer.callbacks, trainer.loggers, trainer.profiler = callbacks, loggers, profiler  # type: ignore[attr-defined]


@contextmanager
def _rewound(loader: Any) -> Iterator[None]:
    """Read from a loader so that the run will read the same."""
    snapshot = Snapshot()
    snapshot.watch_loader(loader)
    if isinstance(loader, DataLoader):
        # In this process: an iterator that keeps its workers between epochs would be the run's own.
        off = {"num_workers": 0, "prefetch_factor": None, "timeout": 0, "pin_memory": False}
        vars(loader).update(**off, persistent_workers=False, _iterator=None)
    try:
        yield
    finally:
        snapshot.restore()


def _forget_compiled() -> None:
    # A shape that changes would be compiled as a dynamic one, and after eight shapes no longer at all.
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


class BatchSizeFit(Callback):
    """Find the largest training batch that fits a memory budget, and the accumulation that goes with it.

    Add it, run `fit`, paste the lines that it prints, remove it. Before the first batch it makes a few real training
    steps at growing batch sizes: augmentation on the device, forward and backward pass in the run's precision, clipping
    and optimizer step, with the gradients kept in between as under accumulation. The average of an `EMA` and the
    weights that it sets aside in validation count too. Everything is restored afterwards: weights, buffers, gradients,
    optimizers, schedulers, gradient scaler, metrics, random numbers and the order of the data.

    The batch is that of a method `worst_case_batch(batch_size)` of the module or data module, collated as the loader's.
    Without one it is made of the largest samples of the first batches, repeated where they do not suffice. A module
    whose `training_step` replays CUDA graphs offers the same step without them as
    `eager_training_step(batch, batch_idx)`: a graph would keep the shapes of the probe.

    It needs a CUDA device and does nothing without. Several devices, several training loaders without that method and
    `training_step(dataloader_iter)` are refused.

    Args:
        budget_gb: What the allocator may reserve, in GB of 2^30 bytes (`mem_gb` of `MemoryAndThroughput`).
        budget_share: The same as a share of the card; used without `budget_gb`. What is left is for the CUDA context,
            fragments and other programs.
        effective_batch: Wanted samples per optimizer step; by default the present batch times accumulation.
        max_batch: Largest batch tried, if the data set is not smaller.
        steps: Training steps per probe. The optimizer's state is made at the end of the first, and the allocator finds
            its final layout only after some.
        scan_batches: Batches among whose samples the largest are taken (the largest batch, if the loader hands out
            whole batches).
        margin: Share of the largest batch that the proposal stays below it.
        then: `stop` ends the fit before the first batch: no checkpoint, no validation. `apply` trains with the
            proposal, `continue` as configured.

    Attributes:
        batch_size: Largest batch that fits, 0 if none does, None before the search.
        recommended: Proposed batch.
        accumulate: Proposed `accumulate_grad_batches`.
        table: One `Probe` per batch size tried.

    Raises:
        MisconfigurationException: For arguments out of range, several devices, or a batch that cannot be resized.

    Example:
        >>> fit = BatchSizeFit(budget_gb=7.0, effective_batch=24)
        >>> trainer = Trainer(callbacks=[fit], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> fit.batch_size is None
        True
    """

    def __init__(
        self,
        *,
        budget_gb: float | None = None,
        budget_share: float = 0.9,
        effective_batch: int | None = None,
        max_batch: int = 4096,
        steps: int = 3,
        scan_batches: int = 4,
        margin: float = 0.05,
        then: Literal["stop", "apply", "continue"] = "stop",
    ) -> None:
        for name, value, good, expected in (
            ("budget_gb", budget_gb, budget_gb is None or budget_gb > 0, "more than 0"),
            ("budget_share", budget_share, 0.0 < budget_share <= 1.0, "more than 0, at most 1"),
            ("effective_batch", effective_batch, effective_batch is None or effective_batch >= 1, "1 or more"),
            ("max_batch", max_batch, max_batch >= 1, "1 or more"),
            ("steps", steps, steps >= 2, "2 or more, since the first makes the optimizer's state"),
            ("scan_batches", scan_batches, scan_batches >= 1, "1 or more"),
            ("margin", margin, 0.0 <= margin < 1.0, "0 or more, less than 1"),
            ("then", then, then in ("stop", "apply", "continue"), "stop, apply or continue"),
        ):
            if not good:
                raise MisconfigurationException(f"BatchSizeFit: {name} expected {expected}, got {value}")
        self.budget_gb = budget_gb
        self.budget_share = budget_share
        self.effective_batch = effective_batch
        self.max_batch = max_batch
        self.steps = steps
        self.scan_batches = scan_batches
        self.margin = margin
        self.then = then
        self.batch_size: int | None = None
        self.recommended: int | None = None
        self.accumulate: int | None = None
        self.table: list[Probe] = []
        self._meter_for = meter_for

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what the search was not made for, before anything is loaded."""
        if stage == "fit" and trainer.world_size > 1:
            raise MisconfigurationException(
                f"BatchSizeFit: devices expected 1, got {trainer.world_size} processes; find the batch on one device "
                "of the kind, then train on several"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search, print, and go on as `then` says."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_info("BatchSizeFit: nothing is probed in a fast_dev_run")
            return
        device = trainer.strategy.root_device
        meter = self._meter_for(device)
        if meter is None:
            rank_zero_info(f"BatchSizeFit: needs a CUDA device, this is {device.type}; nothing is probed")
            return
        self._check(trainer, pl_module)
        with isolate_rng():
            self._search(trainer, pl_module, meter)
        if not self.batch_size:
            self._nothing_fits(pl_module)
        if self.then == "stop":
            # The way out of Lightning's own tuners: hooks that end a training would save, export and report one that
            # never took place.
            raise _TunerExitException
        if self.then == "apply":
            self._apply(trainer, pl_module)

    def _check(self, trainer: Trainer, module: LightningModule) -> None:
        loaders = len(trainer.fit_loop._combined_loader.flattened)  # type: ignore[union-attr]
        if loaders != 1 and self._hook(trainer, module) is None:
            raise MisconfigurationException(
                f"BatchSizeFit: training loaders expected 1, got {loaders}; or define worst_case_batch(batch_size)"
            )
        if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
            raise MisconfigurationException("BatchSizeFit: training_step expected a batch, got dataloader_iter")
        if self.then == "apply" and not (
            lightning_hasattr(module, "batch_size") and trainer.fit_loop._data_source.is_module()
        ):
            raise MisconfigurationException(
                "BatchSizeFit: then expected stop or continue where neither module nor data module has a batch_size "
                "and a train_dataloader() made from it, got apply"
            )

    # ---- search ----------------------------------------------------------------------------------------------------

    def _search(self, trainer: Trainer, module: LightningModule, meter: Meter) -> None:
        self.table, self.recommended, self.accumulate = [], None, None
        budget, budget_text = self._budget(meter)
        aside = _bytes_of_callbacks(trainer, module)
        make_batch, present, limit = self._batches(trainer, module)
        snapshot = Snapshot()
        snapshot.watch(
            module,
            list(module.parameters()),  # those of scripted modules are in no dict
            list(module.buffers()),
            *trainer.optimizers,
            *(config.scheduler for config in trainer.lr_scheduler_configs),
        )
        if (scaler := getattr(trainer.precision_plugin, "scaler", None)) is not None:
            snapshot.watch(scaler)

        def fits(size: int) -> bool:
            probe = self._probe(trainer, module, meter, snapshot, size, partial(make_batch, size), budget, aside)
            self.table.append(probe)
            return probe.fits

        try:
            with meter.limit(max(0, budget - aside)):
                self.batch_size = _largest(fits, present, limit)
        finally:
            _forget_compiled()
            meter.start()
        effective = self.effective_batch or present * trainer.accumulate_grad_batches
        text = [f"BatchSizeFit: budget {budget_text}"]
        if aside:
            text.append(f"{aside / _GB:.2f} GB of it for what callbacks set aside in validation")
        text += self._table_lines()
        if self.batch_size:
            usable = max(1, int(self.batch_size * (1.0 - self.margin)))
            self.recommended, self.accumulate = propose(usable, effective)
            text += self._result_lines(trainer, module, effective, usable, limit)
        module.print("\n".join(text))

    def _budget(self, meter: Meter) -> tuple[int, str]:
        """Bytes that may be reserved, and the same in words."""
        total = meter.total
        budget = int(self.budget_share * total if self.budget_gb is None else self.budget_gb * _GB)
        if budget > total:
            raise MisconfigurationException(
                f"BatchSizeFit: budget_gb expected at most the card's {total / _GB:.1f}, got {self.budget_gb}"
            )
        text = f"{budget / _GB:.2f} of {total / _GB:.1f} GB"
        if (available := meter.available()) < budget:
            budget, text = available, f"{text}, but only {available / _GB:.2f} GB are free"
        return budget, text

    def _probe(
        self,
        trainer: Trainer,
        module: LightningModule,
        meter: Meter,
        snapshot: Snapshot,
        size: int,
        make_batch: Callable[[], Any],
        budget: int,
        aside: int,
    ) -> Probe:
        _forget_compiled()
        meter.start()
        peak, note = None, ""
        try:
            with _muted(trainer, module):
                # Keeps a batch until the next one is on the device, so that this one cannot take its place. The Trainer
                # does not, but its memory is in more pieces than a probe's: with the place reused, 2 % more was found
                # than could be trained (a network of two convolutions on an H200).
                held: list[Any] = []
                for step in range(self.steps):
                    self._step(trainer, module, make_batch(), step, held)
            peak = meter.peak() + aside
        except Exception as error:
            reason = too_large(error)
            if reason is None:
                raise
            note = reason
            release(error)
        finally:
            snapshot.restore()
        if peak is not None and peak > budget:
            note = "over the budget"
        return Probe(size, None if peak is None else peak / _GB, not note, note)

    @staticmethod
    def _step(trainer: Trainer, module: LightningModule, batch: Any, step: int, held: list[Any]) -> None:
        """The Trainer's own step without its loops, which count, log and call callbacks."""
        strategy, epoch = trainer.strategy, trainer.current_epoch
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = strategy.batch_to_device(batch, dataloader_idx=0)
        held[:] = [batch]
        module.on_train_batch_start(batch, step)
        args = (batch, step) if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2) else (batch,)
        if not module.automatic_optimization:
            strategy.training_step(*args)
            return
        optimizer = trainer.optimizers[0]

        def closure() -> Tensor | None:
            output = strategy.training_step(*args)
            loss = output["loss"] if isinstance(output, Mapping) else output
            if step == 0:  # later ones add to the gradients: with accumulation they live through the whole step
                module.optimizer_zero_grad(epoch, step, optimizer)
            if loss is None:
                return None
            loss = loss / trainer.accumulate_grad_batches
            strategy.backward(loss, optimizer)
            return loss.detach()

        module.optimizer_step(epoch, step, strategy._lightning_optimizers[0], closure)

    # ---- batches ---------------------------------------------------------------------------------------------------

    @staticmethod
    def _hook(trainer: Trainer, module: LightningModule) -> Callable[[int], Any] | None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        return getattr(module, "worst_case_batch", None) or getattr(data, "worst_case_batch", None)

    def _batches(self, trainer: Trainer, module: LightningModule) -> tuple[Callable[[int], Any], int, int]:
        """A function from size to batch, the present batch size and the largest one to try."""
        loader = trainer.fit_loop._combined_loader.flattened[0]  # type: ignore[union-attr]
        try:
            limit = min(self.max_batch, max(1, len(loader.dataset)))
        except (AttributeError, TypeError, NotImplementedError):  # streamed data
            limit = self.max_batch
        hint = lightning_getattr(module, "batch_size") if lightning_hasattr(module, "batch_size") else None
        hint = hint or getattr(loader, "batch_size", None)
        hook = self._hook(trainer, module)
        if hook is not None:
            return hook, min(hint or 1, limit), limit
        collates = isinstance(loader, DataLoader) and loader.batch_size is not None
        make_batch, present = self._from_samples(loader) if collates else self._from_batches(loader, hint)
        return make_batch, min(present, limit), limit

    def _from_samples(self, loader: DataLoader) -> tuple[Callable[[int], Any], int]:
        """Batches that the loader's own collate function makes of its first samples, the largest ones first."""
        with _rewound(loader):
            if isinstance(loader.dataset, IterableDataset):
                samples = list(islice(loader.dataset, self.scan_batches * (loader.batch_size or 1)))
            else:
                assert loader.batch_sampler is not None
                order = [i for batch in islice(loader.batch_sampler, self.scan_batches) for i in batch]
                fetch = getattr(loader.dataset, "__getitems__", None)
                samples = list(fetch(order)) if fetch else [loader.dataset[i] for i in order]
        if not samples:
            raise MisconfigurationException("BatchSizeFit: training data expected samples, got none")
        samples.sort(key=size_of, reverse=True)

        def make_batch(size: int) -> Any:
            chosen = (samples[i % len(samples)] for i in range(size))
            # Some collate functions take keys out of the samples.
            return loader.collate_fn([copy.copy(s) if isinstance(s, dict | list) else s for s in chosen])

        return make_batch, min(loader.batch_size or 1, len(samples))

    def _from_batches(self, loader: Any, hint: int | None) -> tuple[Callable[[int], Any], int]:
        """Batches cut from the largest of the first ones, or its samples repeated."""
        with _rewound(loader):
            iterator = iter(loader)
            batches = list(islice(iterator, self.scan_batches))
            if hasattr(iterator, "close"):
                iterator.close()  # type: ignore[attr-defined]
            del iterator
        if not batches:
            raise MisconfigurationException(
                "BatchSizeFit: training loader expected a batch, got none; define worst_case_batch(batch_size)"
            )
        sized = [(batch, batch_length(batch, hint)) for batch in batches]
        batch, length = max(sized, key=lambda pair: size_of(pair[0]) / pair[1])
        # On the host, or it would count beside the batch that is made from it.
        batch = move_data_to_device(batch, torch.device("cpu"))
        return partial(resize_batch, batch, length), sized[0][1]

    # ---- result ----------------------------------------------------------------------------------------------------

    def _table_lines(self) -> list[str]:
        lines = ["  batch  peak GB"]
        for probe in self.table:
            gb = "-" if probe.gb is None else f"{probe.gb:.2f}"
            lines.append(f"{probe.batch:7d}{gb:>9}  {probe.note or 'fits'}")
        return lines

    def _result_lines(
        self, trainer: Trainer, module: LightningModule, effective: int, usable: int, limit: int
    ) -> list[str]:
        assert self.batch_size is not None
        assert self.recommended is not None
        assert self.accumulate is not None
        batch, accumulate = self.recommended, self.accumulate
        end = ", where the search ended" if self.batch_size == limit else ""
        lines = [f"largest batch {self.batch_size}{end}; {usable} with a margin of {self.margin:.0%}"]
        reached = batch * accumulate
        if reached != effective:
            lines.append(f"effective batch {effective}: not reachable with batches near that; closest is {reached}")
        elif usable > effective:
            lines.append(f"more than the effective batch of {effective}; a larger one wants another learning rate")
        data = trainer.datamodule  # type: ignore[attr-defined]
        owned = data is not None and (hasattr(data, "batch_size") or "batch_size" in data.hparams)
        if owned or lightning_hasattr(module, "batch_size"):
            lines.append(f"{'data' if owned else 'model'}: {{batch_size: {batch}}}")
        else:
            lines.append(f"# batch_size of the training DataLoader: {batch}")
        lines.append(f"trainer: {{accumulate_grad_batches: {accumulate}}}  # effective batch {reached}")
        return lines

    def _nothing_fits(self, module: LightningModule) -> None:
        text = "BatchSizeFit: not even one sample fits into the budget"
        if self.then == "apply":
            raise MisconfigurationException(text)
        rank_zero_warn(text)

    def _apply(self, trainer: Trainer, module: LightningModule) -> None:
        loop = trainer.fit_loop
        before = self._steps_per_epoch(trainer)
        assert self.recommended is not None
        assert self.accumulate is not None
        lightning_setattr(module, "batch_size", self.recommended)
        trainer.accumulate_grad_batches = self.accumulate
        if loop._data_fetcher is not None:
            loop._data_fetcher.teardown()
        loop._combined_loader = None
        loop.setup_data()
        loader: Any = loop._combined_loader.flattened[0]  # type: ignore[union-attr]
        if getattr(loader, "batch_size", None) not in (None, self.recommended):
            raise MisconfigurationException(
                f"BatchSizeFit: train_dataloader() expected to use batch_size {self.recommended}, "
                f"got {loader.batch_size}"
            )
        after = self._steps_per_epoch(trainer)
        if before != after and trainer.lr_scheduler_configs:
            rank_zero_warn(
                f"BatchSizeFit: an epoch has {after} optimizer steps now; schedules were made for {before}. "
                "Paste the lines above instead of then=apply."
            )

    @staticmethod
    def _steps_per_epoch(trainer: Trainer) -> float:
        batches = trainer.num_training_batches
        return batches if batches == float("inf") else -(-int(batches) // trainer.accumulate_grad_batches)
