"""Where a run can go on: progress, random states and statistics of the last complete optimizer step.

Lightning's counters say how far the loops came. A checkpoint that is written anywhere else than after an optimizer step
and its validation needs other numbers: gradients are not saved, so a half finished accumulation window must be trained
again, and a half finished validation must run again from its first batch.
"""

from __future__ import annotations

import math
import random
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

__all__ = [
    "Boundary",
    "NormStatistics",
    "at_boundary",
    "batch_progress",
    "current_boundary",
    "epoch_finished",
    "fix_validation_total",
    "plain_random_state",
    "random_state",
    "rescale",
    "rewind",
    "set_random_state",
    "validation_due",
]


# ------------------------------------------------------------------ random states


def random_state(device: torch.device) -> dict[str, Any]:
    """States of the global generators: torch on the host and the device, Python, NumPy if it is loaded.

    CUDA keeps seed and offset on the host: nothing here waits for the device.
    """
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if "numpy" in sys.modules:
        state["numpy"] = sys.modules["numpy"].random.get_state()
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def plain_random_state(state: dict[str, Any]) -> dict[str, Any]:
    """The same with tensors and numbers alone, so that `torch.load(..., weights_only=True)` takes it."""
    if isinstance(state["python"], dict):
        return state  # it is that of a checkpoint
    out: dict[str, Any] = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    version, numbers, gauss = state["python"]
    out["python"] = {"version": version, "state": torch.tensor(numbers, dtype=torch.int64), "gauss": gauss}
    if "numpy" in state:
        name, keys, position, has_gauss, cached = state["numpy"]
        keys = torch.tensor(keys.tolist(), dtype=torch.int64)
        out["numpy"] = [str(name), keys, int(position), int(has_gauss), float(cached)]
    return out


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set the generators from a checkpoint's part.

    Example:
        >>> state = plain_random_state(random_state(torch.device("cpu")))
        >>> a = torch.rand(()), random.random()
        >>> set_random_state(state, torch.device("cpu"))
        >>> a == (torch.rand(()), random.random())
        True
    """
    torch.set_rng_state(state["torch"].cpu())
    python = state["python"]
    random.setstate((python["version"], tuple(python["state"].tolist()), python["gauss"]))
    if "numpy" in state:
        import importlib

        name, keys, *rest = state["numpy"]
        numpy = importlib.import_module("numpy")
        numpy.random.set_state((name, numpy.array(keys.tolist(), dtype=numpy.uint32), *rest))
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


# ------------------------------------------------------------------ statistics of normalisation layers


class NormStatistics:
    """Running statistics of BatchNorm and its kin, kept as they were after the last optimizer step.

    A forward pass updates them before anything can fail behind it.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for layer in module.modules():
            if isinstance(layer, _NormBase):
                for buffer in (layer.running_mean, layer.running_var, layer.num_batches_tracked):
                    if buffer is not None:
                        groups.setdefault((buffer.device, buffer.dtype), []).append(buffer.detach())
        self._groups = [(live, [tensor.clone() for tensor in live]) for live in groups.values()]

    @torch.no_grad()
    def keep(self) -> None:
        """Take the present values."""
        for live, kept in self._groups:
            torch._foreach_copy_(kept, live)

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the layers the values of the last `keep`."""
        for live, kept in self._groups:
            torch._foreach_copy_(live, kept)


# ------------------------------------------------------------------ progress


@dataclass(frozen=True)
class Boundary:
    """The state of the loops after an optimizer step, or at the start of an epoch."""

    total: int  # batches trained on in all
    current: int  # of this epoch; 0 at its start
    stepped: int  # Lightning's count of batches that stepped, as it is before the batch is closed
    global_step: int
    loaders: list[dict[str, Any]] | None  # states of loaders that have one
    rng: dict[str, Any] | None  # in a checkpoint's form once it came from one


def batch_progress(trainer: Trainer) -> Any:
    """Lightning's counters of training batches, whose declared type lacks most of them."""
    return trainer.fit_loop.epoch_loop.batch_progress


def epoch_progress(trainer: Trainer) -> Any:
    """Likewise of epochs."""
    return trainer.fit_loop.epoch_progress


def _loader_states(trainer: Trainer) -> list[dict[str, Any]] | None:
    combined = trainer.fit_loop._combined_loader
    return combined._state_dicts() or None if combined is not None else None


def current_boundary(trainer: Trainer, rng: dict[str, Any] | None, *, start: bool = False) -> Boundary:
    """The boundary that the loops stand at now.

    Args:
        trainer: In a fit.
        rng: Random states that belong to it.
        start: At the start of an epoch, before any of its batches.
    """
    progress = batch_progress(trainer)
    return Boundary(
        total=progress.total.processed,
        current=0 if start else progress.current.processed,
        stepped=trainer.fit_loop.epoch_loop._batches_that_stepped,
        global_step=trainer.global_step,
        loaders=None if start else _loader_states(trainer),
        rng=rng,
    )


def at_boundary(trainer: Trainer) -> bool:
    """Whether the last batch that was begun is trained on and ended in an optimizer step."""
    epoch, batches = epoch_progress(trainer).current, batch_progress(trainer).current
    if epoch.started != epoch.ready or not 0 < batches.ready == batches.processed:
        return False
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def epoch_finished(trainer: Trainer) -> bool:
    """Whether all batches and validations of the epoch are done: Lightning's own numbers are right from there on."""
    epoch = epoch_progress(trainer).current
    return epoch.processed == epoch.ready


def _by_time(trainer: Trainer) -> bool:
    return getattr(trainer, "_val_check_time_interval", None) is not None


def validation_due(trainer: Trainer) -> bool:
    """Whether the last batch is one after which validation runs."""
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is None or _by_time(trainer):
        return False
    # A run that wants to stop validates out of turn; a resumed one does not.
    stop, trainer.should_stop = trainer.should_stop, False
    try:
        return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)
    finally:
        trainer.should_stop = stop


def _set(progress: dict[str, int], done: int, completed: int | None = None) -> None:
    for name in progress:
        progress[name] = done
    if completed is not None:
        progress["completed"] = completed


def rewind(loops: dict[str, Any], trainer: Trainer, at: Boundary, validated: bool) -> Boundary:
    """Edit the loops' part of a checkpoint so that a resumed run goes on from a boundary.

    Lightning tells from the differences between its counters in which hook a checkpoint was written, and skips what was
    done by then. Its patterns are used here: "in `on_train_batch_end`" or "in `on_validation_end`", whose resumption
    goes on with the next batch; "in the midst of validation", whose resumption validates; and "epoch finished".

    Args:
        loops: `checkpoint["loops"]["fit_loop"]`.
        trainer: In a fit.
        at: The last boundary.
        validated: The validation that was due there has ended.

    Returns:
        The boundary that was written.
    """
    if epoch_finished(trainer):
        return at
    loop = trainer.fit_loop.epoch_loop
    batches, state = loops["epoch_loop.batch_progress"], loops["epoch_loop.state_dict"]
    epoch = epoch_progress(trainer)
    if at.loaders is not None:
        loops["state_dict"]["combined_loader"] = at.loaders
    if at_boundary(trainer):
        if validation_due(trainer):
            state["_batches_that_stepped"] = at.stepped
            if not validated:
                for part in ("total", "current"):
                    _set(batches[part], batches[part]["processed"])
                val = loops["epoch_loop.val_loop.batch_progress"]
                _set(val["current"], 0)
                val["total"].update(ready=1, started=1, processed=0, completed=0)
                val["is_last_batch"] = False
    elif at.current == 0 or epoch.current.started < epoch.current.ready:
        for part in ("total", "current"):
            _set(loops["epoch_progress"][part], loops["epoch_progress"][part]["processed"])
        _set(batches["total"], at.total)
        _set(batches["current"], 0)
        batches["is_last_batch"] = False
        loops["state_dict"].pop("combined_loader", None)
        state["_batches_that_stepped"] = loop._batches_that_stepped - int(_counts_twice(trainer, at))
        at = replace(at, current=0)
    else:
        # "In on_train_batch_end" would count a validation that is done by asking its loader for an iterator, which
        # draws a random number; "in on_validation_end" passes it over.
        open_batches = 0 if validated else 1
        _set(batches["total"], at.total, completed=at.total - open_batches)
        _set(batches["current"], at.current, completed=at.current - open_batches)
        batches["is_last_batch"] = False
        state["_batches_that_stepped"] = at.stepped
    steps = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    for progress in (steps["step"], steps["zero_grad"], loops["epoch_loop.scheduler_progress"]):
        for part in ("total", "current"):
            _set(progress[part], progress[part]["completed"])
    return at


def _counts_twice(trainer: Trainer, at: Boundary) -> bool:
    """Whether a run with `max_steps`, resumed at the start of an epoch, closes the batch before it a second time."""
    every = trainer.val_check_batch
    if trainer.max_steps == -1 or every is None or math.isinf(every) or _by_time(trainer):
        return False
    due = trainer.fit_loop.epoch_loop._should_check_val_epoch()
    return due and (trainer.check_val_every_n_epoch is not None or at.total % every == 0)


def rescale(trainer: Trainer, before: int, now: int) -> bool:
    """In a resumed epoch, count the batches that are done in batches of another size.

    Returns:
        False if the samples that are done are no whole number of batches; the rest of a batch is then trained on again.
    """
    progress = batch_progress(trainer).current
    done, samples = progress.completed - progress.processed, progress.processed * before
    for name in ("ready", "started", "processed"):
        setattr(progress, name, samples // now)
    progress.completed = progress.processed + done
    return samples % now == 0


def fix_validation_total(trainer: Trainer) -> None:
    """Take back the batch by which a resumed validation is marked as begun."""
    trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset_on_restart()
