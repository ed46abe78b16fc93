"""Full validation at chosen epochs and a cheap one, or none, in between."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lit_callbacks.milestones import MilestoneGuard

__all__ = ["ValidationSchedule", "full_epochs", "is_full_epoch", "training_ends"]

SUFFIX = "_cheap"
_LOADER = "/dataloader_idx_"  # Lightning's ending of a metric's name when there are several loaders


def is_full_epoch(
    epoch: int,
    max_epochs: int,
    every_n: int = 5,
    milestones: Sequence[int] = (),
    dense_from: float = 0.9,
    dense_every: int = 1,
    first: bool = False,
) -> bool:
    """Whether an epoch, counted from 1, has a full validation.

    A run of unknown length, `max_epochs` -1, has neither a dense end nor a last epoch.

    Example:
        >>> is_full_epoch(10, max_epochs=-1), is_full_epoch(11, max_epochs=-1), is_full_epoch(11, max_epochs=11)
        (True, False, True)
    """
    if (every_n and epoch % every_n == 0) or epoch in milestones or (first and epoch == 1):
        return True
    if max_epochs < 1:
        return False
    # Rounded, since a share of 0.7 should mean 7 epochs of 10 in binary fractions too.
    dense = epoch > round(dense_from * max_epochs, 6) and (max_epochs - epoch) % dense_every == 0
    return epoch == max_epochs or (dense and epoch < max_epochs)


def full_epochs(
    max_epochs: int,
    every_n: int = 5,
    milestones: Sequence[int] = (),
    dense_from: float = 0.9,
    dense_every: int = 1,
    first: bool = False,
    upto: int | None = None,
) -> list[int]:
    """Epochs with a full validation, counted from 1.

    Args:
        max_epochs: Length of the run; -1 if it is unknown.
        every_n: Epochs between full validations; 0 for none at regular intervals.
        milestones: Further epochs.
        dense_from: Share of the run from which the denser end begins.
        dense_every: Epochs between full validations there, counted back from the last one.
        first: Whether the first epoch is one.
        upto: Last epoch listed; `max_epochs` by default.

    Raises:
        ValueError: without `upto` for a run of unknown length.

    Example:
        >>> full_epochs(20, every_n=5, milestones=[2], dense_from=0.8, dense_every=2)
        [2, 5, 10, 15, 18, 20]
        >>> full_epochs(-1, every_n=5, upto=12)
        [5, 10]
    """
    if max_epochs < 0 and upto is None:
        raise ValueError("full_epochs: upto expected for a run of unknown length, got None")
    last = max_epochs if upto is None else upto
    rule = (max_epochs, every_n, milestones, dense_from, dense_every, first)
    return [epoch for epoch in range(1, last + 1) if is_full_epoch(epoch, *rule)]


def _epoch(trainer: Trainer) -> int:
    """The epoch that runs or has just ended, counted from 1, in every hook of a fit."""
    # Other counters advance at the end of the epoch, and twice after some restarts.
    progress: Any = trainer.fit_loop.epoch_progress.current
    return max(progress.ready, progress.started)


def training_ends(trainer: Trainer) -> bool:
    """Whether the fit ends after the present batch, as far as that can be known now.

    True after the last batch of the last epoch, at `max_steps`, and where somebody has set `trainer.should_stop` and
    the minimum of epochs and steps is reached.
    """
    fit = trainer.fit_loop
    progress: Any = fit.epoch_progress.current
    finished = progress.processed
    if progress.processed < progress.ready and fit.epoch_loop._num_ready_batches_reached():
        finished += 1  # Lightning counts the epoch a little later
    if fit.max_steps not in (None, -1) and trainer.global_step >= fit.max_steps:
        return True
    if fit.max_epochs not in (None, -1) and finished >= fit.max_epochs:
        return True
    enough = finished >= (fit.min_epochs or 0) and trainer.global_step >= (fit.min_steps or 0)
    return bool(trainer.should_stop) and enough


class _Patches:
    """Methods replaced on single objects, put back exactly as they were."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def __bool__(self) -> bool:
        return bool(self._undo)

    def wrap(self, owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        own = vars(owner)
        had, before = name in own, own.get(name)

        def undo() -> None:
            if had:
                own[name] = before
            else:
                own.pop(name, None)

        own[name] = make(getattr(owner, name))
        self._undo.append(undo)

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()


class ValidationSchedule(Callback):
    """Validate fully at chosen epochs and cheaply, or not at all, at the others.

    Full are every `every_n_epochs`-th epoch, the `milestones`, the end of the run from `dense_from` on, and always the
    last epoch, also when `max_steps`, `max_time`, early stopping or anybody who sets `trainer.should_stop` ends the
    run. Within such an epoch every validation is full. If Lightning does not validate in a full epoch
    (`check_val_every_n_epoch`, `val_check_interval`), its next validation is full instead.

    Only full validations are judged, each once: by `ModelCheckpoint`, `EarlyStopping` (its patience counts them),
    `MilestoneGuard` and `ReduceLROnPlateau`. Their monitors are absent from `trainer.callback_metrics` at other times,
    and a callback whose monitor is absent is passed over without a word. What logs train metrics, or saves without a
    monitor, works as ever.

    Sanity check, `trainer.validate` and `trainer.test` are left alone.

    Args:
        every_n_epochs: Epochs between full validations; 0 for none at regular intervals.
        milestones: Further epochs with a full validation, counted from 1.
        dense_from: Share of the run, 0 to 1, after which they become denser; 1 for never.
        dense_every: Epochs between full validations from there on, counted back from the last one.
        first: Validate the first epoch fully.
        cheap: What happens at other epochs: "skip" validates nothing; "limit" takes the first `cheap_batches` batches
            and logs every metric under its name with `_cheap` added; "module" runs all of it, and the module does less
            where `ValidationSchedule.is_full(self.trainer)`, or its own attribute `full_validation` if it has one, is
            False. Its metrics keep their names, and those that it does not log are absent.
        cheap_batches: Batches of each validation loader for "limit".

    Raises:
        MisconfigurationException: for values out of range and a monitor ending in `_cheap` that nothing will log.

    Example:
        >>> schedule = ValidationSchedule(every_n_epochs=10, milestones=[1, 3], dense_from=0.9, cheap="skip")
        >>> schedule.full_epochs(40)
        [1, 3, 10, 20, 30, 37, 38, 39, 40]
    """

    def __init__(
        self,
        every_n_epochs: int = 5,
        milestones: Sequence[int] = (),
        dense_from: float = 0.9,
        dense_every: int = 1,
        first: bool = False,
        cheap: Literal["skip", "limit", "module"] = "limit",
        cheap_batches: int = 4,
    ) -> None:
        self._require(every_n_epochs >= 0, "every_n_epochs", "0 or more", every_n_epochs)
        self._require(all(m >= 1 for m in milestones), "milestones", "epochs of 1 or more", list(milestones))
        self._require(0.0 <= dense_from <= 1.0, "dense_from", "0 to 1", dense_from)
        self._require(dense_every >= 1, "dense_every", "1 or more", dense_every)
        self._require(cheap in ("skip", "limit", "module"), "cheap", "skip, limit or module", cheap)
        self._require(cheap_batches >= 1, "cheap_batches", "1 or more", cheap_batches)
        self.every_n_epochs = every_n_epochs
        self.milestones = sorted(set(milestones))
        self.dense_from = dense_from
        self.dense_every = dense_every
        self.first = first
        self.cheap = cheap
        self.cheap_batches = cheap_batches

        self._patches = _Patches()
        self._total = -1
        self._last_full: int | None = None
        self._after_batch = False
        self._announced = False
        # Names that validation has logged, and which of them may be judged now: those of a "full" or a "cheap" one
        # from its start to the next training batch. Then they are held, in case somebody judges at the epoch's end.
        self._keys: set[str] = set()
        self._values: Literal["none", "cheap", "full"] = "none"
        self._values_epoch = 0
        # What there was before a validation, and what its module has logged: the rest comes from callbacks.
        self._before: dict[str, Tensor] = {}
        self._logged: set[str] = set()
        self._held: dict[str, Tensor] = {}
        self._held_as: Literal["none", "cheap", "full"] = "none"
        self._passed_over: list[Any] = []

    @staticmethod
    def _require(holds: bool, field: str, expected: str, got: object) -> None:
        if not holds:
            raise MisconfigurationException(f"ValidationSchedule: {field} expected {expected}, got {got!r}")

    def full_epochs(self, max_epochs: int, upto: int | None = None) -> list[int]:
        """Epochs with a full validation in a run of that length, counted from 1; see the function of this name."""
        return full_epochs(max_epochs, *self._rule(), upto=upto)

    def _rule(self) -> tuple[int, Sequence[int], float, int, bool]:
        return self.every_n_epochs, self.milestones, self.dense_from, self.dense_every, self.first

    @staticmethod
    def is_full(trainer: Trainer) -> bool:
        """Whether the validation that runs is a full one; between validations, whether the next would be.

        True without a schedule, in the sanity check and outside `fit`.

        Example:
            >>> ValidationSchedule.is_full(Trainer(accelerator="cpu", logger=False, enable_checkpointing=False))
            True
        """
        schedule = _find(trainer)
        if schedule is None or not schedule._patches or trainer.sanity_checking or trainer.state.fn != "fit":
            return True
        return schedule._values == "full" if trainer.validating else schedule._due(trainer)

    # ----------------------------------------------------- the life of a fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work."""
        if stage != "fit":
            return
        callbacks: list[Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        for callback in callbacks:
            monitor = getattr(callback, "monitor", None)
            if self.cheap != "limit" and isinstance(monitor, str) and monitor.endswith(SUFFIX):
                raise MisconfigurationException(
                    f"ValidationSchedule: cheap expected limit, which alone logs {monitor!r}, the monitor of "
                    f"{type(callback).__name__}, got {self.cheap!r}"
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the decision when to validate, and what the callbacks with a monitor get to see."""
        self._total = self._length(trainer)
        if self._last_full is None or self._last_full > trainer.current_epoch + 1:
            self._last_full = trainer.current_epoch  # what was due before this callback came is not made up for
        self._announced = False
        self._values, self._passed_over, self._after_batch = "none", [], False
        self._install(trainer, pl_module)

    @staticmethod
    def _length(trainer: Trainer) -> int:
        """Epochs of the run, from `max_epochs` and `max_steps`; -1 if only its end will tell."""
        fit = trainer.fit_loop
        limits = [fit.max_epochs] if fit.max_epochs not in (None, -1) else []
        if fit.max_steps not in (None, -1) and math.isfinite(trainer.num_training_batches):
            per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
            limits.append(math.ceil(fit.max_steps / per_epoch))
        return int(min(limits, default=-1))  # pyright: ignore[reportArgumentType]

    def _install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning decides, limits and names in methods without hooks: they are replaced on this run's objects."""
        self._patches.undo()
        loop = trainer.fit_loop.epoch_loop
        wrap = self._patches.wrap
        wrap(loop, "_should_check_val_fx", lambda original: lambda *args: self._decide(trainer, original, *args))
        wrap(loop, "_update_learning_rates", lambda original: self._plateau_filter(trainer, original))
        wrap(loop.val_loop, "run", lambda original: lambda: self._validate(trainer, pl_module, original))
        wrap(
            loop.val_loop._results,
            "_forked_name",
            lambda original: lambda *args, **kw: self._named(original(*args, **kw)),
        )
        first_checkpoint = True
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            self._quieten(callback, trainer)
            if isinstance(callback, Checkpoint) and first_checkpoint:
                # Checkpoints come last, so whoever stops the run at the end of its epoch has done so by then.
                first_checkpoint = False
                wrap(callback, "on_train_epoch_end", lambda original: self._with_late_validation(original))
        if hasattr(pl_module, "full_validation"):
            pl_module.full_validation = True  # pyright: ignore[reportArgumentType]

    def _quieten(self, callback: Any, trainer: Trainer) -> None:
        """Pass a callback over while its monitor is absent for a good reason."""

        def early_stopping(original: Callable[..., Any]) -> Callable[..., Any]:
            def check(*args: Any, **kwargs: Any) -> None:
                if self._absent(trainer, callback.monitor):
                    self._passed_over.append(callback)
                else:
                    original(*args, **kwargs)

            return check

        def top_k(original: Callable[..., Any]) -> Callable[..., Any]:
            def save(trainer: Trainer, candidates: dict[str, Tensor]) -> None:
                if callback.monitor is None or not self._absent(trainer, callback.monitor):
                    original(trainer, candidates)

            return save

        def deferred(original: Callable[..., Any]) -> Callable[..., Any]:
            # A save triggered by steps or time waits for its metric. It keeps waiting through cheap validations, and
            # is made after the full one even where Lightning would look again only at the end of the epoch.
            def on_validation_end(*args: Any, **kwargs: Any) -> None:
                if not callback._defer_save_until_validation or trainer.sanity_checking:
                    original(*args, **kwargs)
                elif self._absent(trainer, callback.monitor):
                    original(*args, **kwargs)
                    callback._defer_save_until_validation = True
                else:
                    chosen, callback._save_on_train_epoch_end = callback._save_on_train_epoch_end, False
                    try:
                        original(*args, **kwargs)
                    finally:
                        callback._save_on_train_epoch_end = chosen

            return on_validation_end

        def guard(original: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **kwargs: (
                None if self._absent(trainer, callback.monitor) else original(*args, **kwargs)
            )

        # By method and not by class: `pytorch_lightning` has classes of its own with the same methods.
        if hasattr(callback, "_run_early_stopping_check"):
            self._patches.wrap(callback, "_run_early_stopping_check", early_stopping)
        if hasattr(callback, "_save_topk_checkpoint"):
            self._patches.wrap(callback, "_save_topk_checkpoint", top_k)
            self._patches.wrap(callback, "on_validation_end", deferred)
        if isinstance(callback, MilestoneGuard):
            self._patches.wrap(callback, "on_validation_end", guard)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """From here on the values of the last validation are stale."""
        if self._values != "none":
            self._held, self._held_as = self._take(trainer), self._values
            self._values = "none"

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note that from now on the loop asks after a batch, and not at a restart."""
        self._after_batch = True

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note a full validation before anybody writes a checkpoint."""
        if self._patches and not trainer.sanity_checking and self._values == "full":
            self._last_full = _epoch(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the values of this epoch's last validation to those that judge at its end."""
        if self._held_as != "none" and self._values_epoch == _epoch(trainer):
            trainer.callback_metrics.update(self._held)
            self._values = self._held_as
        self._held, self._held_as = {}, "none"
        self._values_epoch = 0  # shown: some restarts come here a second time
        self._passed_over = []

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make up for a full validation if there was no checkpoint callback to do it before, and let go."""
        if self._patches:
            # Lightning has counted the epoch by now; the metrics belong to its end.
            progress = trainer.fit_loop.epoch_progress.current
            progress.completed -= 1
            try:
                self._validate_late(trainer, pl_module)
            finally:
                progress.completed += 1
        self._release(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go."""
        self._release(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go."""
        self._release(trainer)

    def _release(self, trainer: Trainer) -> None:
        if self._patches:
            self._patches.undo()
            trainer.callback_metrics.update(self._held)
            self._held, self._held_as = {}, "none"
            if hasattr(trainer.lightning_module, "full_validation"):
                trainer.lightning_module.full_validation = True  # pyright: ignore[reportArgumentType]

    # -------------------------------------------------- when, and how much

    def _due(self, trainer: Trainer) -> bool:
        """Whether a validation now is a full one."""
        epoch, since = _epoch(trainer), self._last_full or 0
        if since == epoch or training_ends(trainer):
            return True
        epochs = {epoch, *range(since + 1, epoch + 1)}
        return any(is_full_epoch(e, self._total, *self._rule()) for e in epochs)

    def _decide(self, trainer: Trainer, original: Callable[..., bool], *args: Any) -> bool:
        """Whether to validate after this batch."""
        wanted = original(*args)
        if not self._after_batch or not trainer.enable_validation:
            return wanted  # at a restart the question is which part of the loop was under way
        if wanted:
            return self.cheap != "skip" or self._due(trainer)
        return self._last_full != _epoch(trainer) and training_ends(trainer)

    def _validate(self, trainer: Trainer, pl_module: LightningModule, original: Callable[[], Any]) -> Any:
        """Run one validation."""
        if trainer.sanity_checking:
            return original()
        full = self._due(trainer)
        self._take(trainer)
        self._held, self._held_as = {}, "none"
        self._values, self._values_epoch = "full" if full else "cheap", _epoch(trainer)
        self._before, self._logged = dict(trainer.callback_metrics), set()
        if hasattr(pl_module, "full_validation"):
            pl_module.full_validation = full  # pyright: ignore[reportArgumentType]
        try:
            return original() if full or self.cheap != "limit" else self._limited(trainer, original)
        finally:
            self._adopt(trainer)

    def _limited(self, trainer: Trainer, original: Callable[[], Any]) -> Any:
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.setup_data()
        batches = loop._max_batches
        if not self._announced and max(batches, default=0) <= self.cheap_batches:
            self._announced = True
            rank_zero_info(
                f"ValidationSchedule: cheap_batches is {self.cheap_batches} and there are {batches} validation "
                "batches, so cheap validations cost as much as full ones."
            )
        loop._max_batches = [min(count, self.cheap_batches) for count in batches]
        try:
            return original()
        finally:
            loop._max_batches = batches

    def _with_late_validation(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def on_train_epoch_end(trainer: Trainer, pl_module: LightningModule) -> None:
            self._validate_late(trainer, pl_module)
            original(trainer, pl_module)

        return on_train_epoch_end

    def _validate_late(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate fully at the end of an epoch after which the run turned out to end."""
        loop = trainer.fit_loop.epoch_loop
        if (
            self._last_full == _epoch(trainer)
            or not training_ends(trainer)
            or not trainer.enable_validation
            or trainer.received_sigterm
        ):
            return
        waiting, self._passed_over = self._passed_over, []
        connector = trainer._logger_connector
        first_loop_iter = connector._first_loop_iter
        # The step under which Lightning logs what belongs to the end of this epoch.
        loop._batches_that_stepped -= 1
        trainer.validating = True
        try:
            pl_module.on_validation_model_zero_grad()
            loop.val_loop.run()
        finally:
            trainer.training = True
            connector._first_loop_iter = first_loop_iter
            loop._batches_that_stepped += 1
        for callback in waiting:  # those that were asked at the end of this epoch, before the validation
            if callback._check_on_train_epoch_end:
                callback.on_train_epoch_end(trainer, pl_module)

    # ------------------------------------------------- what is to be judged

    def _named(self, names: tuple[str, str]) -> tuple[str, str]:
        """Names under which a validation metric becomes known."""
        if self._values == "cheap" and self.cheap == "limit":
            parts = (name.partition(_LOADER) for name in names)
            first, second = (f"{name}{SUFFIX}{loader}{index}" for name, loader, index in parts)
            names = first, second
        self._keys.update(names)
        self._logged.update(names)
        return names

    def _written_by_others(self, trainer: Trainer) -> list[str]:
        """Metrics that a callback has put beside those of the module since the validation began."""
        metrics = trainer.callback_metrics
        return [key for key in metrics if key not in self._logged and metrics[key] is not self._before.get(key)]

    def _adopt(self, trainer: Trainer) -> None:
        """Treat the metrics that callbacks wrote like those of the module."""
        metrics = trainer.callback_metrics
        for key in self._written_by_others(trainer):
            value = metrics.pop(key)
            _, name = self._named((key, key))
            metrics[name] = value

    def _take(self, trainer: Trainer) -> dict[str, Tensor]:
        """Remove the metrics of validation from what callbacks see."""
        metrics = trainer.callback_metrics
        return {key: metrics.pop(key) for key in self._keys if key in metrics}

    def _absent(self, trainer: Trainer, monitor: str) -> bool:
        """Whether a monitor is rightly absent. After a full validation it is not, and Lightning names the mistake."""
        if monitor in trainer.callback_metrics:
            limited = trainer.validating and self._values == "cheap" and self.cheap == "limit"
            return limited and monitor in self._written_by_others(trainer)
        return self._values != "full" or monitor.endswith(SUFFIX)

    def _plateau_filter(self, trainer: Trainer, original: Callable[..., None]) -> Callable[..., None]:
        def update(interval: str, update_plateau_schedulers: bool) -> None:
            strategy = trainer.strategy
            configs = strategy.lr_scheduler_configs
            left_out = [
                config
                for config in configs
                if update_plateau_schedulers
                and config.reduce_on_plateau
                and config.interval == interval
                and self._absent(trainer, str(config.monitor))
            ]
            if not left_out:
                original(interval=interval, update_plateau_schedulers=update_plateau_schedulers)
                return
            strategy.lr_scheduler_configs = [c for c in configs if not any(c is other for other in left_out)]
            try:
                original(interval=interval, update_plateau_schedulers=update_plateau_schedulers)
            finally:
                strategy.lr_scheduler_configs = configs

        return update

    # ---------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The last full validation, and values that somebody may judge at the end of the present epoch."""
        held = {key: float(value) for key, value in self._held.items()}
        return {"last_full": self._last_full, "epoch": self._values_epoch, "held": held, "held_as": self._held_as}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the values of a validation that has just ended: they are not held yet."""
        if self._values != "none" and self._values_epoch and self._patches:
            metrics = trainer.callback_metrics
            held = {key: float(metrics[key]) for key in self._keys if key in metrics}
            checkpoint["callbacks"][self.state_key].update(held=held, held_as=self._values)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the schedule."""
        self._last_full = state_dict["last_full"]
        self._values_epoch = state_dict["epoch"]
        self._held = {key: torch.tensor(value) for key, value in state_dict["held"].items()}
        self._held_as = state_dict["held_as"]
        self._keys.update(self._held)


def _find(trainer: Trainer) -> ValidationSchedule | None:
    callbacks: list[Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    return next((callback for callback in callbacks if isinstance(callback, ValidationSchedule)), None)
