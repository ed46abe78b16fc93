"""Exponential moving average of the weights, evaluated and saved in place of the weights themselves."""

from __future__ import annotations

import inspect
import math
import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lit_callbacks.average import WeightAverage, clean_name, tensor_names
from lit_callbacks.decay import DECAY, keep_at
from lit_callbacks.live_validation import accepted, validate_again
from lit_callbacks.monitor import samples_in
from lit_callbacks.recompute import batch_norms, estimate, means, preserved, replaced, sum_over_processes
from lit_callbacks.validation import ValidationSchedule

__all__ = ["EMA"]

_SHARDED = {"FSDPStrategy", "XLAFSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}


def _match_compiled_names(module: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
    """Rename keys of a state to be loaded where only `torch.compile` around a submodule sets them apart."""
    own = {clean_name(name): name for name in module.state_dict(keep_vars=True)}
    for name in list(state_dict):
        wanted = own.get(clean_name(name), name)
        if wanted not in state_dict:
            state_dict[wanted] = state_dict.pop(name)


@dataclass
class _Window:
    """Optimizer steps since the last update and the samples they saw.

    Fused optimizers skip on the device, unknown to the host: of such steps the verdict is kept as a tensor.
    """

    steps: int = 0
    samples: int = 0
    open: list[tuple[int, Tensor]] = field(default_factory=list)

    def add(self, samples: int, found_inf: list[Tensor]) -> None:
        """Count a step; `found_inf` has the flags of its optimizers if the device may have skipped it."""
        if not found_inf:
            self.steps += 1
            self.samples += samples
            return
        device = found_inf[0].device
        flags = torch.stack([flag.detach().to(device).reshape(()) for flag in found_inf])
        # float64, so that the decay is that of the host's arithmetic. MPS has none.
        self.open.append((samples, flags.gt(0).all().to(torch.float32 if device.type == "mps" else torch.float64)))

    def totals(self) -> tuple[int | Tensor, int | Tensor]:
        """Steps and samples; tensors where the device decides."""
        steps: int | Tensor = self.steps
        samples: int | Tensor = self.samples
        for seen, skipped in self.open:
            steps = steps + (1 - skipped)
            samples = samples + seen * (1 - skipped) if seen else samples
        return steps, samples

    def settle(self) -> None:
        """Ask the device."""
        steps, samples = self.totals()
        self.steps, self.samples, self.open = round(float(steps)), round(float(samples)), []


def _one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise MisconfigurationException(f"EMA: unknown {name}, expected one of {choices}, got {value!r}")


def _patterns(name: str, value: str | list[str] | None) -> list[str]:
    patterns = [value] if isinstance(value, str) else list(value or [])
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise MisconfigurationException(
                f"EMA: {name} expected regular expressions, got {pattern!r}: {error}"
            ) from None
    return patterns


class EMA(Callback):
    """Average the weights over the optimizer steps; validate, test, predict and save with the average.

    Checkpoints have the keys of Lightning's `WeightAveraging`: `state_dict` is the average and loads strictly into the
    plain module, `current_model_state` are the weights that the optimizer works on. Both classes open each other's
    files. A weights-only checkpoint holds the average alone. For a bf16 or fp16 module `state_dict` is fp32. A
    weights-only file that is saved after the fit is what the module holds by then, in its dtype and with its names:
    `export` writes the average in fp32 and with plain names at any time.

    One update follows each batch in which an optimizer changed something: not the batches in between under
    accumulation, not the steps that a gradient scaler skips, not a step without gradients. Until the first update the
    live weights are validated and saved. After the fit the module holds the average; a further `fit` of the same module
    goes on from the raw weights and the average. If other weights were loaded into the module in between, training
    starts from those and so does a new average.

    With several instances the first enabled one is validated and fills `state_dict`; the others live in their callback
    state. Sharded strategies (FSDP, DeepSpeed) are refused.

    Args:
        decay: Share of the old average that one optimizer step keeps, in [0, 1); None is 0.999.
        half_life: Instead of `decay`: after this long half of the average is newer.
        half_life_unit: Unit of `half_life`. Samples are counted over all processes and accumulated batches; an epoch
            is as many optimizer steps as its batches make.
        warmup: Limit the decay of update n, counted from 0. True or "ramp": to (1 + n) / (10 + n). "power": to
            1 - (1 + n / warmup_gamma)^-warmup_power. "tau": times 1 - exp(-(n + 1) / warmup_tau).
        warmup_gamma: Scale of the "power" rule, in updates.
        warmup_power: Exponent of the "power" rule.
        warmup_tau: Time constant of the "tau" rule, in updates.
        every_n_steps: Optimizer steps per update; `decay` is raised to this power.
        start_step: Optimizer steps before the average begins.
        start_epoch: Epochs before the average begins; the later of the two counts.
        include: Regular expressions, searched in the names of parameters and buffers: average only what matches one.
        exclude: Regular expressions: do not average what matches one; its live value is used and saved.
        buffers: "average" or "copy" floating buffers. "recompute" estimates the statistics of BatchNorm anew under the
            averaged weights, when they are needed, and copies the others. Integer buffers are always copied.
        recompute_batches: Training batches to estimate from, the last ones, which stay in memory by reference.
        evaluate: Weights in validation, test and predict of the training process. "both" validates the average and
            then the live weights, whose metrics are called `<key>_live`; test and predict see the average. A file's
            `state_dict`, loaded by `ckpt_path`, is always taken as it is.
        offload: Keep the average, and during evaluation the raw weights, in host memory; a thread updates it there.
        enabled: False makes the callback do nothing, so that a config file can switch it off.
        name: Tells several instances apart, also in checkpoints.

    Raises:
        MisconfigurationException: On values out of range, with both `decay` and `half_life`, on a pattern that matches
            nothing, with sharded strategies, and with modules or loaders that an option cannot serve.

    Example:
        >>> slow, fast = EMA(decay=0.9999, name="slow"), EMA(half_life=500, warmup="power", name="fast")
        >>> slow.state_key, fast.state_key
        ('EMA[slow]', 'EMA[fast]')
        >>> trainer = Trainer(callbacks=[slow, fast], accelerator="cpu", logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        *,
        decay: float | None = None,
        half_life: float | None = None,
        half_life_unit: Literal["steps", "samples", "epochs"] = "steps",
        warmup: bool | Literal["ramp", "power", "tau"] = True,
        warmup_gamma: float = 1.0,
        warmup_power: float = 2 / 3,
        warmup_tau: float = 2000.0,
        every_n_steps: int = 1,
        start_step: int = 0,
        start_epoch: int = 0,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        buffers: Literal["average", "copy", "recompute"] = "average",
        recompute_batches: int = 32,
        evaluate: Literal["ema", "live", "both"] = "ema",
        offload: bool = False,
        enabled: bool = True,
        name: str = "ema",
    ) -> None:
        if decay is not None and half_life is not None:
            raise MisconfigurationException(
                f"EMA: half_life replaces decay, expected one of them, got decay={decay} and half_life={half_life}"
            )
        if decay is None and half_life is None:
            decay = DECAY
        if decay is not None and not 0.0 <= decay < 1.0:
            raise MisconfigurationException(f"EMA: decay must be in [0, 1), got {decay}")
        positive = {"half_life": half_life, "warmup_gamma": warmup_gamma, "warmup_power": warmup_power}
        for field_name, value in (positive | {"warmup_tau": warmup_tau}).items():
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise MisconfigurationException(f"EMA: {field_name} must be finite, expected > 0, got {value}")
        if every_n_steps < 1 or start_step < 0 or start_epoch < 0 or recompute_batches < 1:
            raise MisconfigurationException(
                "EMA: expected every_n_steps and recompute_batches >= 1, start_step and start_epoch >= 0, got "
                f"{every_n_steps}, {recompute_batches}, {start_step}, {start_epoch}"
            )
        _one_of("half_life_unit", half_life_unit, ("steps", "samples", "epochs"))
        _one_of("warmup", warmup, (True, False, "ramp", "power", "tau"))
        _one_of("buffers", buffers, ("average", "copy", "recompute"))
        _one_of("evaluate", evaluate, ("ema", "live", "both"))
        self.decay = decay
        self.half_life = half_life
        self.half_life_unit = half_life_unit
        self.warmup: bool | Literal["ramp", "power", "tau"] = warmup
        self.warmup_gamma = warmup_gamma
        self.warmup_power = warmup_power
        self.warmup_tau = warmup_tau
        self.every_n_steps = every_n_steps
        self.start_step = start_step
        self.start_epoch = start_epoch
        self.include = _patterns("include", include)
        self.exclude = _patterns("exclude", exclude)
        self.buffers = buffers
        self.recompute_batches = recompute_batches
        self.evaluate = evaluate
        self.offload = offload
        self.enabled = enabled
        self.name = name

        self._average: WeightAverage | None = None
        self._owner = True
        self._instances: list[EMA] = [self]
        self._fitting = False
        self._continued = False
        self._return_to_average = False
        # Averages from a file wait here until the module has its final device, dtype and trainable parameters.
        self._loaded: dict[str, Tensor] | None = None
        self._from_file = False
        self._hooked: list[Optimizer] = []
        self._handles: list[RemovableHandle] = []
        self._load_handle: RemovableHandle | None = None
        self._unwrap_save: Callable[[], None] | None = None
        self._batches: deque[Any] = deque(maxlen=recompute_batches)
        self._modules: list[torch.nn.Module] = []
        self._modes: list[bool] = []
        self._forget()

    def _forget(self) -> None:
        """Drop the average and everything counted for it."""
        self._average = None
        self._loaded = None
        self._n = 0
        self._steps = 0
        self._started_at: int | None = None
        # Fused optimizers skip on the device, unknown to the host: such updates are counted there.
        self._skipped: Tensor | None = None
        self._window = _Window()
        # BatchNorm statistics: older than the average; of this process alone, whose sums are kept until all meet.
        self._stale = False
        self._alone = False
        self._estimated: tuple[list[_BatchNorm], list[Tensor]] = [], []
        self._clear_marks()

    def _clear_marks(self) -> None:
        self._stepped = False
        self._certain = False
        self._found_inf: list[Tensor] = []
        # Samples of this batch before its gradient exists, and of those whose gradients wait for a step.
        self._in_batch = 0
        self._accumulated = 0
        self._manual = False
        self._global_step = 0

    @property
    def state_key(self) -> str:
        """Key of this instance in a checkpoint's `callbacks`."""
        return f"EMA[{self.name}]"

    @property
    def n_averaged(self) -> int:
        """Updates made so far."""
        if self._skipped is not None:
            self._n -= round(self._skipped.item())
            self._skipped = None
        return self._n

    # ------------------------------------------------------------------ fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse sharded strategies; make a checkpoint and a compiled module agree about names."""
        if not self.enabled:
            return
        if stage == "fit" and (bad := _SHARDED.intersection(c.__name__ for c in type(trainer.strategy).__mro__)):
            raise MisconfigurationException(
                f"EMA does not support {bad.pop()}, where a process sees only its part of the weights. "
                "Use DDP or a single device, or set enabled=False."
            )
        self._instances = [cb for cb in trainer.callbacks if isinstance(cb, EMA) and cb.enabled] or [self]  # pyright: ignore[reportAttributeAccessIssue]
        self._owner = self._instances[0] is self
        if self._owner:
            self._remove_load_handle()
            # A module-level function, so that the module can still be pickled.
            self._load_handle = pl_module.register_load_state_dict_pre_hook(_match_compiled_names)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the average, or go on with that of a file or of an earlier fit."""
        if not self.enabled:
            return
        self._check(pl_module)
        if self._average is not None and self._loaded is None and not self._from_file:
            self._go_on(pl_module)
        self._materialise(pl_module)
        self._from_file = False
        self._fitting = True
        if self._owner:
            self._wrap_save(pl_module)

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

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the optimizers; a resumed epoch has no `on_train_epoch_start`."""
        if not self.enabled:
            return
        if self.half_life_unit == "epochs" and self.half_life is not None and math.isinf(trainer.num_training_batches):
            raise MisconfigurationException(
                "EMA: half_life_unit 'epochs' expected a training loader with a length or a number for "
                "limit_train_batches, got a loader without end"
            )
        self._global_step = trainer.global_step
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the optimizers, take in layers that were unfrozen, begin if it is time."""
        if not self.enabled or self._average is None:
            return
        if [id(o) for o in trainer.optimizers] != [id(o) for o in self._hooked]:
            self._remove_step_hooks()
            self._hooked = list(trainer.optimizers)
            self._handles = [o.register_step_post_hook(self._mark) for o in self._hooked]
            if self.offload:
                self._handles += [o.register_step_pre_hook(self._fence) for o in self._hooked]
        self._average.bind(pl_module)
        self._modules = list(pl_module.modules()) if self._average.has_statistics else []
        self._start_if_due(trainer)

    def _fence(self, *_: Any) -> None:
        """Let the device finish copying weights to the host before they change."""
        if self._average is not None:
            self._average.fence()

    def _mark(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Note that a step took place. Several optimizers step in one batch, so the update itself waits."""
        if not any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            return  # training_step returned None
        self._stepped = True
        if self._manual:
            self._accumulate()  # `loss.backward()` may have been called past Lightning
        # A gradient scaler leaves its verdict here when the optimizer does the skipping itself (fused).
        found_inf = getattr(optimizer, "found_inf", None)
        if isinstance(found_inf, Tensor):
            self._found_inf.append(found_inf)
        else:
            self._certain = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the size of the batch."""
        self._manual = not pl_module.automatic_optimization
        if self.half_life_unit == "samples":
            self._in_batch = samples_in(batch) * trainer.world_size

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The batch has a loss and so a part in the next step."""
        self._accumulate()

    def _accumulate(self) -> None:
        self._accumulated += self._in_batch
        self._in_batch = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average if this batch ended in an optimizer step."""
        if self._modules:
            self._batches.append(batch)
            self._modes = [module.training for module in self._modules]
        attempted = trainer.global_step != self._global_step
        self._global_step = trainer.global_step
        if self._manual:
            self._accumulate()
        if attempted and not self._stepped:
            self._accumulated = 0  # skipped on the host: no weight has seen these samples
        self._in_batch = 0
        self._after_step(trainer, pl_module)

    def _after_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        average = self._average
        if not self._stepped or average is None:
            return
        samples, flags = self._accumulated, [] if self._certain else self._found_inf
        self._stepped, self._certain, self._found_inf, self._accumulated = False, False, [], 0
        self._steps += 1
        if self._started_at is None:
            self._start_if_due(trainer)
            return
        self._window.add(samples, flags)
        if (self._steps - self._started_at) % self.every_n_steps:
            return
        if not average.is_bound():
            average.bind(pl_module)
        keep = self._keep(trainer)
        self._window = _Window()
        if keep is None:
            return
        average.update(keep)
        self._n += 1
        self._stale = self._alone = average.has_statistics

    def _keep(self, trainer: Trainer) -> float | Tensor | None:
        """Share of the old average; a 0-dim tensor, which is 1 if all steps were skipped, where the device knows."""
        steps, samples = self._window.totals()
        if not isinstance(steps, Tensor):
            return self._share(self._n, steps, samples, trainer) if steps else None
        before = self._skipped if self._skipped is not None else torch.zeros_like(steps)
        keep = cast(Tensor, self._share(self._n - before, steps, samples, trainer))
        skipped = steps == 0
        self._skipped = before + skipped
        return torch.where(skipped, torch.ones_like(keep), keep)

    def _share(self, n: int | Tensor, steps: int | Tensor, samples: int | Tensor, trainer: Trainer) -> float | Tensor:
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
        due = self._steps >= self.start_step and trainer.current_epoch >= self.start_epoch
        if self._started_at is None and due and self._average is not None:
            self._average.restart()
            self._started_at = self._steps
            self._window = _Window()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Other callbacks may write to the weights here."""
        self._fence()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the module."""
        self._finish(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the module also when there was nothing to train."""
        self._finish(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Bring the module into its state after a fit; checkpoint callbacks save only afterwards."""
        if not self._fitting:
            self._leave()
            return
        try:
            self._after_step(trainer, pl_module)
            self._finish(trainer, pl_module, failed=True)
        except RuntimeError as error:  # a broken device must not hide the first exception
            rank_zero_warn(f"EMA[{self.name}]: the weights could not be exchanged after the exception: {error}")

    def _finish(self, trainer: Trainer, pl_module: LightningModule, failed: bool = False) -> None:
        if not self._fitting:
            return
        self._fitting = False
        self._remove_step_hooks()
        self._clear_marks()
        if self._unwrap_save is not None:
            self._unwrap_save()
        try:
            if self._average is not None and self.n_averaged:
                self._average.bind(pl_module)
                self._average.show_raw()  # an exception in validation finds the average there
                if failed:
                    self._refresh_after_failure(trainer, pl_module)
                else:
                    self._refresh(trainer, pl_module, together=True)
                if self._owner:
                    self._show()
        finally:
            self._batches.clear()
            self._modules, self._modes = [], []

    def _show(self) -> None:
        assert self._average is not None
        for instance in self._instances:
            instance._fence()  # the others may still be copying the live weights
        self._average.show_average()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing on the module and nothing on the device."""
        if self._unwrap_save is not None:  # a tuner left the fit without calling any of its last hooks
            self._unwrap_save()
            self._fitting = False
            self._remove_step_hooks()
            self._clear_marks()
        self._remove_load_handle()
        if self._average is not None:
            self._average.offload()

    def _remove_step_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._hooked = [], []

    def _remove_load_handle(self) -> None:
        if self._load_handle is not None:
            self._load_handle.remove()
            self._load_handle = None

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

    # ---------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Counters, and the average where a checkpoint's `state_dict` does not hold it."""
        if not self.enabled:
            return {}
        state: dict[str, Any] = {
            "n_averaged": self.n_averaged,
            "steps": self._steps,
            "started_at": self._started_at,
            "owner": self._owner,
        }
        self._window.settle()
        state |= {"window_steps": self._window.steps, "window_samples": self._window.samples}
        tensors = self._loaded if self._loaded is not None else self._average and self._average.average
        if tensors and (not self._owner or (not self._n and self._started_at is not None)):
            state["average"] = dict(tensors)
        return state

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the average as `state_dict` and the raw weights beside it."""
        if not self.enabled:
            return
        if self._stepped:  # saved between the optimizer step and the end of its batch
            self._after_step(trainer, pl_module)
        if self._fitting:
            self._refresh(trainer, pl_module, together=False)
        checkpoint["callbacks"][self.state_key] = self.state_dict()
        if not self._owner:
            return
        if self._loaded is not None:  # a tuner saves in its own on_fit_start, before ours
            self._materialise(pl_module)
        average = self._average
        if average is None:
            return
        if not self._fitting and average.raw is not None and not self._still_shown(pl_module):
            # Other weights were loaded since the fit: they are what the user saves, and no average belongs to them.
            checkpoint["callbacks"].pop(self.state_key, None)
            return
        state = checkpoint["state_dict"]
        checkpoint["current_model_state"] = average.raw_state(state)
        checkpoint["state_dict"] = self._saved_state(average, state)
        # Lightning's class loads this strictly: nothing else may be in it.
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self.n_averaged, dtype=torch.long)}

    def _saved_state(self, average: WeightAverage, state: Mapping[str, Any]) -> dict[str, Any]:
        return average.averaged_state(state) if self.n_averaged else average.raw_state(state)

    def export(self, path: str | Path, pl_module: LightningModule) -> Path:
        """Write the averaged weights alone, as plain tensors by name.

        Args:
            path: Of the file; its ending chooses the format, see `lit_callbacks.export`.
            pl_module: The module of the fit, during it or afterwards.

        Returns:
            Path of the file.

        Raises:
            MisconfigurationException: If there was no fit.
            RuntimeError: If the module lacks averaged tensors.
        """
        from lit_callbacks.export import export_weights

        if self._average is None:
            raise MisconfigurationException(f"EMA: export expected a fit before it, got none for EMA[{self.name}]")
        if not self._average.is_bound():
            self._average.bind(pl_module)
        if self._fitting:
            self._refresh(pl_module.trainer, pl_module, together=False)
        state: Mapping[str, Any] = pl_module.state_dict()
        for other in self._instances:
            if other._average is not None:  # what another one shows is neither live nor ours
                state = other._average.raw_state(state)
        return export_weights(path, self._saved_state(self._average, state), dict(pl_module.hparams) or None)

    def _wrap_save(self, pl_module: LightningModule) -> None:
        """Reach weights-only checkpoints, for which the Trainer calls no callback but always this module hook."""
        original = pl_module.on_save_checkpoint
        had_own = pl_module.__dict__.get("on_save_checkpoint")

        def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
            if "averaging_state" not in checkpoint and self._average is not None:
                trainer = pl_module.trainer
                self._after_step(trainer, pl_module)
                self._refresh(trainer, pl_module, together=False)
                checkpoint["state_dict"] = self._saved_state(self._average, checkpoint["state_dict"])
            original(checkpoint)

        def unwrap() -> None:
            self._unwrap_save = None
            if had_own is not None:
                pl_module.__dict__["on_save_checkpoint"] = had_own
            else:
                pl_module.__dict__.pop("on_save_checkpoint", None)

        if self._unwrap_save is not None:
            self._unwrap_save()
        pl_module.__dict__["on_save_checkpoint"] = on_save_checkpoint
        self._unwrap_save = unwrap

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Resume from a checkpoint of this class or of Lightning's `WeightAveraging`.

        Everything is read here instead of in `load_state_dict`, which sees only the callback's own part of the file.
        """
        if trainer.state.fn != "fit":
            return  # the Trainer has loaded `state_dict`, the average, and that is all there is to do
        has_raw = "current_model_state" in checkpoint
        if not self.enabled:
            if has_raw:
                rank_zero_warn(
                    f"EMA[{self.name}] is off, but the checkpoint was written with averaging: training goes on from "
                    "the averaged weights."
                )
            return
        own = (checkpoint.get("callbacks") or {}).get(self.state_key)
        self._forget()
        self._from_file = True
        if has_raw and self._owner:
            pl_module.load_state_dict(checkpoint["current_model_state"], strict=pl_module.strict_loading)
        if own is not None and (own["n_averaged"] == 0 or has_raw or "average" in own):
            self._n, self._steps, self._started_at = own["n_averaged"], own["steps"], own["started_at"]
            averaged = checkpoint["state_dict"] if own["owner"] and self._n else None
            self._loaded = own.get("average", averaged)
            # Files of the first version have no window; without fused skips its steps follow from the others.
            waiting = 0 if self._started_at is None else (self._steps - self._started_at) % self.every_n_steps
            self._window = _Window(own.get("window_steps", waiting), own.get("window_samples", 0))
        elif has_raw and "averaging_state" in checkpoint and self._owner:
            self._n = int(checkpoint["averaging_state"]["n_averaged"])
            self._steps = checkpoint["global_step"]
            self._started_at = self._steps if self._n else None
            self._loaded = checkpoint["state_dict"] if self._n else None
        else:
            rank_zero_warn(
                f"The checkpoint holds no average for EMA[{self.name}]: a new one starts from the loaded weights."
            )
        if self._fitting:  # a tuner restores in the middle of a fit
            self._materialise(pl_module)
