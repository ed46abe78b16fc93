"""The average of a run: kept up to date in training, in the place of the weights in evaluation."""

from __future__ import annotations

import inspect
import math
import re
from collections import deque
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lit_callbacks.average import WeightAverage, tensor_names
from lit_callbacks.decay import DECAY, keep_at
from lit_callbacks.ema_steps import Number, StepCount
from lit_callbacks.live_validation import accepted, validate_again
from lit_callbacks.monitor import samples_in
from lit_callbacks.recompute import batch_norms, estimate, means, preserved, replaced, sum_over_processes
from lit_callbacks.validation import ValidationSchedule

__all__ = ["RunningAverage"]


class RunningAverage(Callback):
    """What `EMA` does between the beginning and the end of a fit, and in evaluation.

    Args:
        recompute_batches: Training batches to estimate BatchNorm statistics from.
    """

    # The options of `EMA`, which sets and explains them.
    decay: float | None
    half_life: float | None
    half_life_unit: Literal["steps", "samples", "epochs"]
    warmup: bool | Literal["ramp", "power", "tau"]
    warmup_gamma: float
    warmup_power: float
    warmup_tau: float
    every_n_steps: int
    start_step: int
    start_epoch: int
    include: list[str]
    exclude: list[str]
    buffers: Literal["average", "copy", "recompute"]
    evaluate: Literal["ema", "live", "both"]
    offload: bool
    enabled: bool
    name: str

    def __init__(self, recompute_batches: int) -> None:
        self._average: WeightAverage | None = None
        self._steps = StepCount()
        self._owner = True
        self._instances: list[RunningAverage] = [self]
        self._fitting = False
        self._continued = False
        self._return_to_average = False
        # Averages from a file wait here until the module has its final device, dtype and trainable parameters.
        self._loaded: dict[str, Tensor] | None = None
        self._batches: deque[Any] = deque(maxlen=recompute_batches)
        self._modules: list[torch.nn.Module] = []
        self._modes: list[bool] = []
        self._forget()

    def _forget(self) -> None:
        """Drop the average and everything counted for it."""
        self._average = None
        self._loaded = None
        self._steps.forget()
        # BatchNorm statistics: older than the average; of this process alone, whose sums are kept until all meet.
        self._stale = False
        self._alone = False
        self._estimated: tuple[list[_BatchNorm], list[Tensor]] = [], []

    @property
    def n_averaged(self) -> int:
        """Updates made so far."""
        return self._steps.updates

    def averages(self) -> dict[str, Tensor]:
        """The averages by the names of the module's tensors, to be read or copied into; none before a fit has begun."""
        return {} if self._average is None else self._average.average

    def restart(self) -> None:
        """Let the average begin at the module's present weights; its updates are counted on."""
        if self._average is not None:
            self._average.restart()

    # ---------------------------------------------------------------- start

    def _check(self, pl_module: LightningModule) -> None:
        """Refuse what would otherwise fail, or be wrong without a word, in the middle of the fit."""
        names = tensor_names(pl_module)
        for option, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                if not any(re.search(pattern, name) for name in names):
                    raise MisconfigurationException(
                        f"EMA: {option} expected a pattern that matches a parameter or buffer, got {pattern!r}; "
                        f"names are {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
                    )
        if self.buffers == "recompute" and batch_norms(pl_module) and not hasattr(pl_module, "recompute_batch"):
            manual = not pl_module.automatic_optimization
            if manual or "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
                raise MisconfigurationException(
                    "EMA: buffers='recompute' expected a method recompute_batch(batch) of the module, got none, and "
                    f"training_step {'would step the optimizers' if manual else 'takes no batch'}"
                )
        step = inspect.signature(pl_module.validation_step)
        if self.evaluate == "both" and self._owner and "dataloader_iter" in step.parameters:
            raise MisconfigurationException(
                "EMA: evaluate='both' expected validation_step(batch, batch_idx), got validation_step(dataloader_iter)"
            )

    def _go_on(self, pl_module: LightningModule) -> None:
        """Second fit: give the raw weights back to the optimizer, unless the module holds other weights by now."""
        assert self._average is not None
        try:
            self._average.bind(pl_module)
            shown = self._average.is_shown() or not self._owner
        except RuntimeError:  # another module
            shown = False
        self._continued = (shown or self.n_averaged == 0) and (self._owner or self._instances[0]._continued)
        if self._continued:
            self._average.show_raw()
            return
        rank_zero_warn(
            f"EMA[{self.name}]: the module no longer holds the weights that the last fit left in it. "
            "Training and a new average start from its present weights."
        )
        self._forget()

    def _materialise(self, pl_module: LightningModule) -> None:
        if self._average is None:
            self._average = WeightAverage(
                pl_module,
                average_buffers=self.buffers == "average",
                statistics=self.buffers == "recompute",
                include=self.include,
                exclude=self.exclude,
                on_host=self.offload,
            )
        else:
            self._average.bind(pl_module)
        if self._loaded is not None:
            missing = self._average.load(self._loaded)
            self._loaded = None
            if missing:
                rank_zero_warn(f"EMA[{self.name}]: no saved average for {missing}; they start at their present value.")

    # ------------------------------------------------------------- training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the optimizers; a resumed epoch has no `on_train_epoch_start`."""
        if not self.enabled:
            return
        if self.half_life_unit == "epochs" and self.half_life is not None and math.isinf(trainer.num_training_batches):
            raise MisconfigurationException(
                "EMA: half_life_unit 'epochs' expected a training loader with a length or a number for "
                "limit_train_batches, got a loader without end"
            )
        self._steps.global_step = trainer.global_step
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the optimizers, take in layers that were unfrozen, begin if it is time."""
        if not self.enabled or self._average is None:
            return
        self._steps.listen(trainer.optimizers, before=self._fence if self.offload else None)
        self._average.bind(pl_module)
        self._modules = list(pl_module.modules()) if self._average.has_statistics else []
        self._start_if_due(trainer)

    def _fence(self, *_: Any) -> None:
        """Let the device finish copying weights to the host before they change."""
        if self._average is not None:
            self._average.fence()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the size of the batch."""
        samples = samples_in(batch) * trainer.world_size if self.half_life_unit == "samples" else 0
        self._steps.batch_starts(samples, manual=not pl_module.automatic_optimization)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The batch has a loss and so a part in the next step."""
        self._steps.accumulate()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average if this batch ended in an optimizer step."""
        if self._modules:
            self._batches.append(batch)
            self._modes = [module.training for module in self._modules]
        self._steps.batch_ends(trainer.global_step)
        self._after_step(trainer, pl_module)

    def _after_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        average, steps = self._average, self._steps
        if not steps.stepped or average is None:
            return
        steps.count()
        if steps.started_at is None:
            self._start_if_due(trainer)
            return
        if (steps.steps - steps.started_at) % self.every_n_steps:
            return
        if not average.is_bound():
            average.bind(pl_module)
        keep = steps.take(partial(self._share, trainer))
        if keep is None:
            return
        average.update(keep)
        steps.updated()
        self._stale = self._alone = average.has_statistics

    def _share(self, trainer: Trainer, n: Number, steps: Number, samples: Number) -> float | Tensor:
        elapsed = steps
        if self.half_life is not None and self.half_life_unit == "samples":
            elapsed = samples
        elif self.half_life is not None and self.half_life_unit == "epochs":
            elapsed = steps / math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        return keep_at(
            n,
            elapsed,
            decay=DECAY if self.decay is None else self.decay,
            half_life=self.half_life,
            warmup=self.warmup,
            gamma=self.warmup_gamma,
            power=self.warmup_power,
            tau=self.warmup_tau,
        )

    def _start_if_due(self, trainer: Trainer) -> None:
        due = self._steps.steps >= self.start_step and trainer.current_epoch >= self.start_epoch
        if self._steps.started_at is None and due and self._average is not None:
            self._average.restart()
            self._steps.start()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Other callbacks may write to the weights here."""
        self._fence()

    def _show(self) -> None:
        assert self._average is not None
        for instance in self._instances:
            instance._fence()  # the others may still be copying the live weights
        self._average.show_average()

    # ----------------------------------------------------------- evaluation

    def _enter(self, trainer: Trainer, pl_module: LightningModule) -> None:
        average = self._average
        if not self.enabled or not self._owner or average is None or not self.n_averaged:
            return
        if self._fitting:
            if self.evaluate != "live":
                average.bind(pl_module)
                self._show()
                self._refresh(trainer, pl_module, together=True)
        elif self.evaluate == "live" and trainer.ckpt_path is None and self._still_shown(pl_module):
            average.show_raw()
            self._return_to_average = True

    def _leave(self) -> None:
        if self._average is None:
            return
        if self._fitting:
            self._average.show_raw()
        elif self._return_to_average:
            self._return_to_average = False
            self._average.show_average()

    def _still_shown(self, pl_module: LightningModule) -> bool:
        """After a fit: does the module still hold the average, or weights that somebody loaded since?"""
        if self._average is None or self._average.raw is None:
            return False
        try:
            self._average.bind(pl_module)
        except RuntimeError:  # another module
            return False
        return self._average.is_shown()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap in, before the module's own hook."""
        self._enter(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap out, after the module's `on_validation_epoch_end` and before checkpoints are written."""
        self._leave()
        if not (self.enabled and self.evaluate == "both" and self._owner and self._fitting):
            return
        if not trainer.sanity_checking and ValidationSchedule.is_full(trainer):
            validate_again(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap in."""
        self._enter(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap out."""
        self._leave()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap in."""
        self._enter(trainer, pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap out."""
        self._leave()

    # ------------------------------------------------- BatchNorm statistics

    def _refresh(self, trainer: Trainer, pl_module: LightningModule, together: bool) -> None:
        """Estimate BatchNorm statistics under the average if it has changed since.

        Args:
            trainer: Runs the fit.
            pl_module: May hold the average or its own weights, and holds the same afterwards.
            together: Every process is here, so that their estimates can be averaged.
        """
        average = self._average
        together = together and trainer.world_size > 1
        if average is None or not (self._stale or (self._alone and together)):
            return
        shown = average.raw is not None
        if not shown:
            average.bind(pl_module)
            self._show()
        try:
            if self._stale:
                self._estimated = self._estimate(trainer, pl_module)
            layers, sums = self._estimated
            if together and sums:
                sums = sum_over_processes(sums)
            average.write_statistics(means(layers, sums))
        finally:
            if not shown:
                average.show_raw()
        self._stale = False
        self._alone = trainer.world_size > 1 and not together
        if not self._alone:
            self._estimated = [], []

    def _estimate(self, trainer: Trainer, pl_module: LightningModule) -> tuple[list[_BatchNorm], list[Tensor]]:
        """Run the kept batches as in training, without a trace in the run."""

        def forward(batch: Any) -> None:
            own = getattr(pl_module, "recompute_batch", None)
            with trainer.precision_plugin.train_step_context():
                if own is not None:
                    own(batch)
                else:
                    pl_module.training_step(*accepted(pl_module.training_step, batch, 0))

        def mute(*_: Any, **__: Any) -> None:
            return None

        # Casts of the other weights, should this be within an autocast region.
        torch.clear_autocast_cache()
        try:
            with (
                torch.inference_mode(False),
                torch.no_grad(),
                preserved(pl_module),
                replaced(pl_module, log=mute, log_dict=mute),
            ):
                for module, training in zip(self._modules, self._modes, strict=False):
                    module.training = training
                layers = [layer for layer in batch_norms(pl_module) if layer.training]  # the others are frozen
                return layers, estimate(layers, self._batches, forward)
        except Exception as error:
            error.add_note(
                f"Raised while EMA[{self.name}] ran training batches once more for BatchNorm statistics. If the module "
                "has a method recompute_batch(batch), that is called instead of training_step; it need only run the "
                "forward pass."
            )
            raise
        finally:
            torch.clear_autocast_cache()

    def _refresh_after_failure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate if that is possible; the live statistics serve if not."""
        if not self._stale:
            return
        try:
            if trainer.world_size == 1:  # the other processes may be elsewhere
                self._refresh(trainer, pl_module, together=False)
        except Exception as error:
            rank_zero_warn(f"EMA[{self.name}]: the BatchNorm statistics are the live ones: {error}")
        if self._stale and self._average is not None:
            self._average.write_statistics({})
        self._stale = self._alone = False
