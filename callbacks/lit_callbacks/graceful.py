"""End a run so that it can go on: signals, exceptions, exhausted memory, a full disk."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from lit_callbacks.ema import EMA
from lit_callbacks.oom import OOMGuard, is_out_of_memory, release_memory, same_effective_batch
from lit_callbacks.resume import (
    Boundary,
    NormStatistics,
    at_boundary,
    batch_progress,
    current_boundary,
    epoch_finished,
    fix_validation_total,
    plain_random_state,
    random_state,
    rescale,
    rewind,
    set_random_state,
)
from lit_callbacks.safe_io import CheckpointWriteError, SafeCheckpointIO, free_bytes, is_disk_full, newest_complete

__all__ = ["GracefulExit", "GracefulStop", "report_of"]

_KNOWN = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP", "SIGXCPU")


class GracefulExit(SystemExit):
    """Ends the fit after a signal; the exit status is 128 + the signal's number, as shells have it."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


def report_of(error: BaseException | None) -> str | None:
    """What `GracefulStop` had to say about an exception, or about one that it follows from.

    Example:
        >>> report_of(ValueError("no fit was running")) is None
        True
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        report = getattr(error, "graceful_report", None)
        if report is not None:
            return report
        error = error.__cause__ or error.__context__
    return None


class GracefulStop(Callback):
    """Leave a checkpoint from which the run goes on as if it had not been interrupted, and say where it is.

    On a signal the running accumulation window is finished, one checkpoint is written and the fit ends with
    `GracefulExit`. A second signal of the same kind ends the process at once. After running out of memory, or when a
    checkpoint or log cannot be written because the disk is full, the same checkpoint is written before the exception
    goes on its way. For any other exception, Ctrl-C included, one is written unless a `ModelCheckpoint` with
    `save_on_exception` or an `OnExceptionCheckpoint` does so.

    Every checkpoint that is written during the fit, by whomever, holds the progress of the last complete optimizer
    step: an accumulation window or a validation that was cut short starts again. It also holds the states of the random
    generators, which are set when the run is resumed, so that dropout goes on as it would have. If the batch size was
    changed meanwhile, a resumed epoch goes on behind the samples that it had seen.

    Local checkpoints are written beside their target and renamed, so that a failed write leaves the old file alone.

    With several processes the signal of any of them stops all, together. Exceptions of one process are not saved then,
    because the others wait elsewhere. SLURM's automatic requeueing keeps its signals.

    Args:
        signals: Names of the signals to stop on.
        dirpath: Folder of the checkpoint; by default that of the first `ModelCheckpoint`, else `checkpoints` in the
            log folder.
        filename: Its name without `.ckpt`.
        fallback_dirpath: Folder on another disk, used if `dirpath` cannot be written.
        max_wait: Seconds to wait for the end of an accumulation window; afterwards the window is given up. One process.
        check_every_n_steps: Optimizer steps between two agreements of several processes about a signal.
        norm_statistics: Keep BatchNorm statistics of the last optimizer step, since a forward pass that fails later has
            changed them already. Costs one copy of these buffers per step. Not used if an `EMA` is listed before.
        resume: How to resume, for the message; `{path}` is the checkpoint.
        enabled: False makes the callback do nothing, so that a config file can switch it off.

    Raises:
        MisconfigurationException: Unknown signals, or numbers out of range.

    Example:
        >>> stop = GracefulStop(signals=["SIGTERM"], fallback_dirpath="/tmp")
        >>> GracefulExit(signal.SIGTERM).code
        143
    """

    def __init__(
        self,
        signals: Sequence[str] = ("SIGTERM", "SIGUSR1"),
        dirpath: str | None = None,
        filename: str = "interrupted",
        fallback_dirpath: str | None = None,
        max_wait: float = 30.0,
        check_every_n_steps: int = 10,
        norm_statistics: bool = True,
        resume: str = "ckpt_path={path}",
        enabled: bool = True,
    ) -> None:
        if unknown := [name for name in signals if name not in _KNOWN]:
            raise MisconfigurationException(f"GracefulStop: signals expected some of {_KNOWN}, got {unknown[0]!r}")
        if not filename or Path(filename).name != filename:
            raise MisconfigurationException(f"GracefulStop: filename expected a name without folders, got {filename!r}")
        if max_wait < 0 or check_every_n_steps < 1:
            raise MisconfigurationException(
                f"GracefulStop: max_wait expected >= 0 and check_every_n_steps >= 1, got {max_wait} and "
                f"{check_every_n_steps}"
            )
        self.signals = tuple(signals)
        self.dirpath = dirpath
        self.filename = filename
        self.fallback_dirpath = fallback_dirpath
        self.max_wait = max_wait
        self.check_every_n_steps = check_every_n_steps
        self.norm_statistics = norm_statistics
        self.resume = resume
        self.enabled = enabled

        self.path: str | None = None
        self._handlers: dict[int, Any] = {}
        self._silenced: list[ModelCheckpoint] = []
        self._loaded: dict[str, Any] | None = None
        self._loaded_loaders: list[dict[str, Any]] | None = None
        self._plain_io: Any = None
        self._forget()

    def _forget(self) -> None:
        self._active = False
        self._installed = False
        self._received: int | None = None
        self._received_at = 0.0
        self._mark: Boundary | None = None
        self._marks = 0
        self._validated = -1  # the boundary whose validation is done
        self._validated_rng: dict[str, Any] | None = None
        self._first_step = 0
        self._start_rng: dict[str, Any] | None = None
        self._norms: NormStatistics | None = None
        self._savers: dict[str, dict[str, Any]] = {}
        self._failed_write = False

    # ------------------------------------------------------------------ signals

    def _install(self, trainer: Trainer) -> None:
        if self._installed:
            return
        self._installed = True
        if threading.current_thread() is not threading.main_thread():
            rank_zero_warn("GracefulStop: signals are handled in the main thread only; this fit runs in another one")
            return
        names = set(self.signals)
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            requeue = environment.requeue_signal
            names -= {"SIGTERM", getattr(requeue, "name", "SIGUSR1")}
        for name in sorted(names):
            if hasattr(signal, name):  # Windows lacks some
                signum = getattr(signal, name)
                self._handlers[signum] = signal.signal(signum, self._note)

    def _note(self, signum: int, _: FrameType | None) -> None:
        """Signal handler: remember the signal. The loops are left as they are until they ask."""
        if self._received == signum:
            # Asked twice: no more waiting.
            signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        self._received, self._received_at = signum, time.monotonic()

    def _restore_handlers(self) -> None:
        for signum, handler in self._handlers.items():
            if signal.getsignal(signum) == self._note:  # Lightning may have put its own predecessors back already
                signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self._handlers = {}

    def _stop_if_asked(self, trainer: Trainer, *, rare: bool = False) -> None:
        """Between optimizer steps: all processes agree, then end."""
        signum = self._received or 0
        if trainer.world_size > 1:
            if self._marks % self.check_every_n_steps and not rare:
                return
            flag = torch.tensor(signum, device=trainer.strategy.root_device)
            signum = int(trainer.strategy.reduce(flag, reduce_op="max"))
        if signum:
            raise GracefulExit(signum)

    # ------------------------------------------------------------------ fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write checkpoints safely from here on."""
        while self._silenced:
            self._silenced.pop().save_on_exception = True
        if not self.enabled or stage != "fit":
            return
        self._forget()
        self._loaded = self._loaded_loaders = None
        io = trainer.strategy.checkpoint_io
        if type(io) is TorchCheckpointIO:
            self._plain_io = io
            trainer.strategy.checkpoint_io = SafeCheckpointIO()

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from Lightning, which has just set its own handlers."""
        if self.enabled:
            self._install(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the random states before loaders draw from them."""
        if self._loaded is not None and trainer.fit_loop._combined_loader is None:
            self._set_random_state(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to keep track; go on with the state of a checkpoint."""
        if not self.enabled:
            return
        self._install(trainer)
        # Here and not on an exception, because asking for the log folder takes all processes.
        checkpoint = next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)), None)
        folder = trainer.log_dir or trainer.default_root_dir
        self._folder = Path(self.dirpath or (checkpoint and checkpoint.dirpath) or Path(folder) / "checkpoints")
        self._first_step = trainer.global_step
        self._start_rng = None
        if self._loaded is not None:
            if self._loaded["mid_epoch"]:
                self._set_random_state(trainer)
                self._fit_batch_size(trainer)
            self._start_rng = self._loaded.get("rng")
        elif trainer.world_size == 1:
            self._start_rng = plain_random_state(random_state(trainer.strategy.root_device))
        earlier = trainer.callbacks[: trainer.callbacks.index(self)]  # pyright: ignore[reportAttributeAccessIssue]
        if self.norm_statistics and not any(isinstance(c, EMA) and c.enabled for c in earlier):
            self._norms = NormStatistics(pl_module)
        self._active = True

    def _set_random_state(self, trainer: Trainer) -> None:
        state = self._loaded and self._loaded.get("rng")
        if state and trainer.world_size == 1:
            set_random_state(state, trainer.strategy.root_device)

    def _fit_batch_size(self, trainer: Trainer) -> None:
        assert self._loaded is not None
        before, now = self._loaded.get("batch_size"), batch_size_of(trainer)
        if before and now and before != now and not rescale(trainer, before, now):
            rank_zero_warn(
                f"GracefulStop: batch_size changed from {before} to {now}, which does not divide the samples that the "
                "epoch has seen; some of them come again"
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The start of an epoch is a boundary too."""
        if not self._active:
            return
        self._stop_if_asked(trainer, rare=True)
        rng = self._start_rng if trainer.fit_loop.is_resuming else self._random_state(trainer)
        self._mark = current_boundary(trainer, rng, start=True)
        if self._norms is not None:
            self._norms.keep()  # something may have set them at the end of an epoch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Between two accumulation windows: end, if a signal has come."""
        if not self._active:
            return
        if self._mark is None:
            self._mark = self._resumed_boundary(trainer)
        between = batch_progress(trainer).current.processed == self._mark.current
        overdue = trainer.world_size == 1 and time.monotonic() - self._received_at > self.max_wait
        if between or (self._received is not None and overdue):
            self._stop_if_asked(trainer)

    def _resumed_boundary(self, trainer: Trainer) -> Boundary:
        """Where a run that was resumed within an epoch stands before its first batch."""
        progress = batch_progress(trainer)
        return Boundary(
            total=progress.total.processed,
            current=progress.current.processed,
            stepped=trainer.fit_loop.epoch_loop._batches_that_stepped - 1,
            global_step=trainer.global_step,
            loaders=self._loaded_loaders,
            rng=self._start_rng,
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the boundary, if this batch ended in an optimizer step."""
        if self._active and at_boundary(trainer):
            self._set_mark(trainer)

    def _set_mark(self, trainer: Trainer) -> None:
        self._mark = current_boundary(trainer, self._random_state(trainer))
        self._marks += 1
        if self._norms is not None:
            self._norms.keep()
        self._note_savers(trainer)

    def _random_state(self, trainer: Trainer) -> dict[str, Any] | None:
        # Several processes draw different numbers, and a checkpoint has room for one state.
        return random_state(trainer.strategy.root_device) if trainer.world_size == 1 else None

    def _note_savers(self, trainer: Trainer) -> None:
        """Keep what checkpoint callbacks know before they write: they note a file as written beforehand."""
        for callback in trainer.checkpoint_callbacks:
            state = callback.state_dict()
            if state:
                copies = {k: dict(v) if isinstance(v, dict) else v for k, v in state.items()}
                self._savers[callback.state_key] = copies

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End instead of validating, if a signal has come; a resumed run validates first."""
        if self._active and not trainer.sanity_checking:
            fix_validation_total(trainer)
            self._stop_if_asked(trainer, rare=True)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """End within a validation: a resumed run does it again."""
        # Processes may have unequal numbers of validation batches: they agree at its end.
        if self._received is not None and trainer.world_size == 1:
            raise GracefulExit(self._received)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the validation of this boundary is done."""
        if not self._active or trainer.sanity_checking:
            return
        if self._mark is None:
            self._mark = self._resumed_boundary(trainer)
        self._validated = self._mark.total
        self._validated_rng = self._random_state(trainer)
        self._note_savers(trainer)
        # After a resumption within the epoch Lightning leaves plateau schedulers out, because metrics are not saved;
        # they are here.
        trainer.fit_loop._restarting = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what checkpoint callbacks know before they write."""
        if self._active:
            self._note_savers(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give signals and checkpoint writer back."""
        if not self.enabled or stage != "fit":
            return
        self._active = False
        self._restore_handlers()
        self._restore_io(trainer)
        if self._received is not None:
            # Training was complete when it came: nothing is to be saved, and the process has yet to obey.
            self._say(f"{signal.Signals(self._received).name}: training was complete, nothing is lost")
            signum, self._received = self._received, None
            trainer._signal_connector.teardown()
            signal.raise_signal(signum)

    def _restore_io(self, trainer: Trainer) -> None:
        if self._plain_io is not None:
            trainer.strategy.checkpoint_io, self._plain_io = self._plain_io, None

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the progress of the last complete optimizer step into whatever is being saved."""
        if not self._active:
            return
        mark = self._mark
        if mark is None:
            mark = current_boundary(trainer, self._start_rng)
        elif at_boundary(trainer) and mark.total != batch_progress(trainer).total.processed:
            # Another callback saves at the end of a batch before it was this one's turn.
            mark = current_boundary(trainer, self._random_state(trainer))
        # A write that failed may have been that of a best checkpoint: then the validation comes again.
        validated = self._validated == mark.total and not (self._failed_write and at_boundary(trainer))
        mid_epoch = not epoch_finished(trainer)
        mark = rewind(checkpoint["loops"]["fit_loop"], trainer, mark, validated)
        rng = self._validated_rng if validated else mark.rng
        if not mid_epoch:
            rng = self._random_state(trainer)
        state: dict[str, Any] = {"mid_epoch": mid_epoch and mark.current > 0, "batch_size": batch_size_of(trainer)}
        if rng is not None:
            state["rng"] = plain_random_state(rng)
        checkpoint["callbacks"][self.state_key] = state
        if self._failed_write:
            # What could not be written is no best checkpoint to remember.
            for key, saved in self._savers.items():
                if key in checkpoint["callbacks"]:
                    checkpoint["callbacks"][key] = saved

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the random states, if a fit is resumed."""
        state = (checkpoint.get("callbacks") or {}).get(self.state_key)
        if not self.enabled or trainer.state.fn != "fit" or state is None:
            return
        self._loaded = state
        loops = checkpoint.get("loops", {}).get("fit_loop", {})
        self._loaded_loaders = loops.get("state_dict", {}).get("combined_loader")
        self._set_random_state(trainer)

    # ------------------------------------------------------------------ exceptions

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what there is, and say where and how to go on."""
        if not self.enabled or trainer.state.fn != "fit":
            return
        try:
            if self._active:
                self._rescue(trainer, pl_module, exception)
            elif isinstance(exception, GracefulExit):
                self._say(f"{signal.Signals(exception.signum).name}: stopped before the first step, nothing to save")
        except Exception as problem:  # a broken device must not hide the first exception
            rank_zero_warn(f"GracefulStop: the state could not be saved after the exception: {problem}")
        finally:
            self._received = None
            self._restore_handlers()

    def _rescue(self, trainer: Trainer, module: LightningModule, error: BaseException) -> None:
        stop, memory, full = isinstance(error, GracefulExit), is_out_of_memory(error), is_disk_full(error)
        if memory:
            release_memory(error)
            module.zero_grad()
            release_memory(error)
        self._settle(trainer)
        if (trainer.world_size > 1 and not stop) or getattr(trainer, "fast_dev_run", False):
            return
        saved_by = self._own_savers(trainer)
        if not (stop or memory or full) and saved_by:
            return  # as configured; what they write holds the right progress
        clauses = [self._failure(error)] if full else []
        if trainer.global_step == self._first_step and not full:
            path = trainer.ckpt_path
            clauses.append("stopped before the first optimizer step, nothing to save")
        else:
            path, problem = self._save(trainer, saved_by, full)
            where = f"saved at optimizer step {trainer.global_step}, in epoch {trainer.current_epoch}"
            clauses.append(problem or where)
        if memory:
            clauses.append(self._advice(trainer))
        if path:
            clauses.append(f"resume with {self.resume.format(path=path)}")
        name = f"{signal.Signals(error.signum).name}: " if isinstance(error, GracefulExit) else ""
        self._tell(error, name + "; ".join(clauses))

    def _settle(self, trainer: Trainer) -> None:
        """Finish the books of a batch whose optimizer step is done; take back a window that is not."""
        loop = trainer.fit_loop.epoch_loop
        progress = batch_progress(trainer)
        if epoch_finished(trainer) or self._mark is None:
            return
        in_batch = progress.current.processed < progress.current.started == progress.current.ready
        if in_batch and not loop._should_accumulate() and trainer.global_step > self._mark.global_step:
            # Ctrl-C in the moment between the step and its accounting.
            progress.increment_processed()
            loop.update_lr_schedulers("step", update_plateau_schedulers=False)
            if loop._num_ready_batches_reached():
                loop.update_lr_schedulers("epoch", update_plateau_schedulers=False)
            self._set_mark(trainer)
        elif self._norms is not None and not at_boundary(trainer):
            self._norms.put_back()

    def _own_savers(self, trainer: Trainer) -> list[Callback]:
        """Callbacks that write a resumable checkpoint on an exception by themselves."""
        found: list[Callback] = []
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                if callback.save_on_exception and not callback.save_weights_only:
                    found.append(callback)
            elif isinstance(callback, OnExceptionCheckpoint):
                found.append(callback)
        return found

    def _save(self, trainer: Trainer, saved_by: list[Callback], full: bool) -> tuple[str | None, str | None]:
        """Write one checkpoint; keep other callbacks from writing the same again.

        Returns:
            The path to resume from, and what went wrong if that is not the present state.
        """
        self._failed_write = full
        for callback in saved_by:
            if isinstance(callback, ModelCheckpoint):
                callback.save_on_exception = False  # until the next setup
                self._silenced.append(callback)
            elif isinstance(callback, OnExceptionCheckpoint) and not full:
                return callback.ckpt_path, None  # it cannot be kept from writing, after this
        folders = [self._folder, *([Path(self.fallback_dirpath)] if self.fallback_dirpath else [])]
        problems = []
        for folder in folders:
            path = self._free_name(folder, trainer)
            try:
                trainer.save_checkpoint(path, weights_only=False)
            except Exception as error:
                problems.append(f"{path} ({getattr(error, 'strerror', None) or str(error).splitlines()[0]})")
                continue
            self.path = str(path)
            return self.path, None
        others = [Path(d) for c in trainer.checkpoint_callbacks if (d := getattr(c, "dirpath", None))]
        complete = newest_complete([*folders, *others])
        text = f"no checkpoint of the present state could be written: {', '.join(problems)}"
        found = f"; the newest complete one is {complete}" if complete else "; there is no complete one"
        return (str(complete) if complete else None), text + found

    def _free_name(self, folder: Path, trainer: Trainer) -> Path:
        """A name of an earlier interruption is used again only by the run that went on from it."""
        path, n = folder / f"{self.filename}.ckpt", 0
        mine = {str(Path(p).resolve()) for p in (self.path, trainer.ckpt_path) if p}
        while path.exists() and str(path.resolve()) not in mine:
            n += 1
            path = folder / f"{self.filename}-v{n}.ckpt"
        return path

    def _failure(self, error: BaseException) -> str:
        """What was being written, and how much room there is for it."""
        name = getattr(error, "filename", None)
        folder = Path(name).parent if name else self._folder
        cause = getattr(error, "strerror", None) or str(error).splitlines()[0]
        room = f"{free_bytes(folder) / 1e6:.0f} MB free in {folder}"
        if isinstance(error, CheckpointWriteError):
            room = f"{error.needed / 1e6:.0f} MB needed, {room}"
        return f"{cause} while writing {name or 'a file'} ({room})"

    def _advice(self, trainer: Trainer) -> str:
        """How to need less memory with the same effective batch."""
        guard = next((c for c in trainer.callbacks if isinstance(c, OOMGuard) and c.enabled), None)  # pyright: ignore[reportAttributeAccessIssue]
        if guard is not None and guard.parts > 1:
            return f"OOMGuard goes on with {guard.parts} parts per batch"
        size = batch_size_of(trainer)
        if size is None:
            return "halve the batch size and double accumulate_grad_batches, which keeps the effective batch"
        return f"to keep the effective batch of {size * trainer.accumulate_grad_batches}: " + same_effective_batch(
            size, trainer.accumulate_grad_batches
        )

    def _tell(self, error: BaseException, text: str) -> None:
        """Attach the message to the exception; print it where no traceback will show it."""
        error.graceful_report = text  # type: ignore[attr-defined]
        if isinstance(error, SystemExit | KeyboardInterrupt):
            self._say(text)
        else:
            error.add_note(text)

    @rank_zero_only
    def _say(self, text: str) -> None:
        print(f"\n{text}", file=sys.stderr, flush=True)


def batch_size_of(trainer: Trainer) -> int | None:
    """Samples per batch and process, as the data module or the training loader has it."""
    loader = trainer.train_dataloader
    places = [trainer.datamodule, loader, getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None)]  # type: ignore[attr-defined]
    for place in places:
        size = getattr(place, "batch_size", None)
        if isinstance(size, int) and not isinstance(size, bool) and size > 0:
            return size
    return None
