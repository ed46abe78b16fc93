"""Go back to the last good weights when training has collapsed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lit_callbacks import EMA
from torch import Tensor

from lit_cli.errors import InputError

__all__ = ["RollBack"]


def _once(tensors: Iterator[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _weights(module: LightningModule) -> list[Tensor]:
    """Parameters and buffers."""

    def found() -> Iterator[Tensor]:
        yield from module.parameters()
        yield from module.buffers()

    return _once(found())


def _write(tensors: list[Tensor], values: list[Tensor]) -> None:
    """Copy values into tensors where they lie, since a CUDA graph may have captured their addresses."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.detach().copy_(value)


class _Average:
    """The running average that another callback keeps: lit_callbacks' EMA or Lightning's WeightAveraging."""

    def __init__(self, callback: Callback) -> None:
        self.callback = callback

    @classmethod
    def all(cls, trainer: Trainer) -> list[_Average]:
        """Of the callbacks that have one by now."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return [found for found in map(cls, callbacks) if found.tensors()]

    def tensors(self) -> dict[str, Tensor]:
        """By name, to be copied into."""
        if isinstance(self.callback, EMA):
            return self.callback.averages()
        model = getattr(self.callback, "_average_model", None)  # Lightning's, which has no public way
        return dict(model.state_dict()) if isinstance(model, torch.nn.Module) else {}

    def has_begun(self) -> bool:
        """An average that begins later holds the first weights until then."""
        return not isinstance(self.callback, EMA) or self.callback.n_averaged > 0

    def restart(self) -> None:
        """Begin at the present weights, where the callback can."""
        if isinstance(self.callback, EMA):
            self.callback.restart()


class _Snapshot:
    """Copies, on the device, of weights, optimizer states and running averages."""

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self.weights = _weights(module)
        self.values = [tensor.detach().clone() for tensor in self.weights]
        self.states = [
            {
                p: {name: v.detach().clone() if isinstance(v, Tensor) else v for name, v in state.items()}
                for p, state in optimizer.state.items()
            }
            for optimizer in trainer.optimizers
        ]
        self.averages = [
            (average, {name: value.clone() for name, value in average.tensors().items()} if average.has_begun() else {})
            for average in _Average.all(trainer)
        ]

    def restore(self, trainer: Trainer) -> None:
        """Write everything back in its place."""
        held = [average.tensors() for average, _ in self.averages]  # an EMA on the host finishes what it is reading
        _write(self.weights, self.values)
        for optimizer, states in zip(trainer.optimizers, self.states, strict=True):
            for p, state in optimizer.state.items():
                known = states.get(p, {})
                for name, value in list(state.items()):
                    if not isinstance(value, Tensor):
                        # what the first step makes, it makes again
                        state.update({name: known[name]}) if name in known else state.pop(name)
                    elif name in known:
                        value.detach().copy_(known[name])
                    else:
                        value.detach().zero_()
        for (average, values), tensors in zip(self.averages, held, strict=True):
            if not values:
                average.restart()
            for name, tensor in tensors.items():
                if name in values:
                    tensor.copy_(values[name])


def _scale_rates(trainer: Trainer, factor: float) -> None:
    """Multiply every rate of optimizers and schedulers, those kept in tensors in place."""
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for name in ("lr", "initial_lr", "max_lr", "min_lr"):
                if isinstance(group.get(name), Tensor):
                    group[name].mul_(factor)
                elif name in group:
                    group[name] *= factor
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    while schedulers:
        scheduler: Any = schedulers.pop()
        schedulers += getattr(scheduler, "_schedulers", [])  # of SequentialLR and ChainedScheduler
        for name in ("base_lrs", "_last_lr"):
            rates = getattr(scheduler, name, None)
            if isinstance(rates, list):
                setattr(scheduler, name, [rate * factor for rate in rates])


class RollBack(Callback):
    """Watch the mean training loss of each epoch; after a collapse go back and train on at a lower rate.

    An epoch has collapsed if its loss or the weights at its end are not finite, or if the loss is above `factor` times
    the best so far. Then weights, buffers, optimizer states and the averages of EMA callbacks are as they were at the
    last good epoch, and all learning rates are multiplied by `lr_factor` for the rest of the run. The epoch counts:
    schedules go on and nothing is trained twice.

    This happens at the last batch of the epoch, before validation and before a checkpoint is written. The losses are
    summed on the device and read once per epoch; over several processes their mean decides, so that all do the same.
    Values are copied into the tensors that are there, so captured CUDA graphs stay valid. The copies take the memory of
    the weights, the optimizer states and the averages once more.

    Args:
        factor: Of the best loss, above which an epoch has collapsed. Losses are taken to be positive.
        warmup: Epochs before `factor` counts.
        every_n_epochs: Between copies. They are taken where the loss is at most sqrt(`factor`) times the best, and at
            the start of training.
        lr_factor: For the learning rates.
        most: Roll-backs of a run; the next collapse ends it.
        key: What of the output of `training_step` is watched. `loss` jumps where a term is switched on during training;
            name a part of it then, that the step returns beside it.
        enabled: False makes the callback do nothing, so that a config file can switch it off.

    Attributes:
        count: Roll-backs so far, also those before a resume.
        best: Best loss of an epoch.

    Raises:
        InputError: An option out of range, a collapse after `most` roll-backs, a start from weights that are not
            finite, or a training step that does not return what is to be watched.

    Example:
        >>> callback = RollBack(most=2)
        >>> callback.state_dict()
        {'count': 0, 'best': None, 'epochs': 0}
    """

    def __init__(
        self,
        *,
        factor: float = 4.0,
        warmup: int = 1,
        every_n_epochs: int = 1,
        lr_factor: float = 0.5,
        most: int = 3,
        key: str = "loss",
        enabled: bool = True,
    ) -> None:
        if not 1 < factor < math.inf or not 0 < lr_factor <= 1:
            raise InputError(
                f"RollBack: factor and lr_factor expected above 1 and in (0, 1], got {factor}, {lr_factor}"
            )
        if warmup < 0 or every_n_epochs < 1 or most < 0:
            raise InputError(
                "RollBack: warmup and most expected at least 0, every_n_epochs at least 1, "
                f"got {warmup}, {most}, {every_n_epochs}"
            )
        self.factor, self.warmup, self.every_n_epochs = factor, warmup, every_n_epochs
        self.lr_factor, self.most, self.key, self.enabled = lr_factor, most, key, enabled
        self.count = 0
        self.best: float | None = None
        self._epochs = 0
        self._sum: Tensor | None = None
        self._batches = 0
        self._snapshot: _Snapshot | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy what training starts from, also after a resume."""
        if not self.enabled:
            return
        self._sum, self._batches = None, 0
        if not bool(self._finite(pl_module)):
            raise InputError("RollBack: expected finite weights to start from, got NaN or infinity among them")
        self._snapshot = _Snapshot(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the loss up; look at it after the last batch."""
        if not self.enabled:
            return
        loss = outputs.get(self.key) if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            loss = loss.detach().float().mean()
            self._sum = loss.clone() if self._sum is None else self._sum + loss
            self._batches += 1
        if trainer.is_last_batch:
            self._look(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at an epoch that ended before its last batch."""
        if self.enabled and self._batches:
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Free the copies."""
        self._snapshot = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Free the copies."""
        self._snapshot = None

    @staticmethod
    def _finite(module: LightningModule) -> Tensor:
        """Whether all weights are, as a tensor."""
        floats = [t.detach() for t in _weights(module) if t.is_floating_point() and t.numel()]
        if not floats:
            return torch.tensor(True)
        norms = torch._foreach_norm(floats, math.inf)
        return torch.stack([norm.float().to(norms[0].device) for norm in norms]).isfinite().all()

    def _look(self, trainer: Trainer, module: LightningModule) -> None:
        if self._sum is None:
            raise InputError(
                f"RollBack: key expected a tensor among the outputs of training_step, got none as {self.key}"
            )
        mean = self._sum / self._batches
        self._sum, self._batches = None, 0
        both = torch.stack([mean, self._finite(module).to(mean)])
        loss, finite = trainer.strategy.reduce(both, reduce_op="mean").tolist()
        self._epochs += 1
        collapsed = not math.isfinite(loss) or finite < 1
        if not collapsed and self.best is not None and self.best > 0 and self._epochs > self.warmup:
            collapsed = loss > self.factor * self.best
        if collapsed:
            self._go_back(trainer, loss)
            return
        best = self.best = loss if self.best is None else min(self.best, loss)
        good = best <= 0 or loss <= math.sqrt(self.factor) * best
        if good and self._epochs % self.every_n_epochs == 0:
            self._snapshot = None  # so that two never take memory at once
            self._snapshot = _Snapshot(trainer, module)

    def _go_back(self, trainer: Trainer, loss: float) -> None:
        what = f"training collapsed in epoch {trainer.current_epoch}: loss {loss:.4g}"
        if self.best is not None:
            what += f", best {self.best:.4g}"
        if self.count >= self.most:
            raise InputError(f"RollBack: {what}, after {self.count} roll-backs; lower model.lr or clip gradients")
        assert self._snapshot is not None
        with torch.no_grad():
            self._snapshot.restore(trainer)
            _scale_rates(trainer, self.lr_factor)
        self.count += 1
        rank_zero_warn(
            f"RollBack: {what}; back to the last good weights, learning rate x {self.lr_factor:g} "
            f"({self.count} of {self.most})"
        )

    def state_dict(self) -> dict[str, Any]:
        """Counters; the copies are taken anew at a resume."""
        return {"count": self.count, "best": self.best, "epochs": self._epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.count, self.best, self._epochs = state_dict["count"], state_dict["best"], state_dict["epochs"]
