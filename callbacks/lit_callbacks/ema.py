"""Exponential moving average of the weights, evaluated and saved in place of the weights themselves."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.utils.hooks import RemovableHandle

from lit_callbacks.average import WeightAverage, clean_name
from lit_callbacks.decay import DECAY
from lit_callbacks.ema_run import RunningAverage

__all__ = ["EMA"]

_SHARDED = {"FSDPStrategy", "XLAFSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}


def _match_compiled_names(module: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
    """Rename keys of a state to be loaded where only `torch.compile` around a submodule sets them apart."""
    own = {clean_name(name): name for name in module.state_dict(keep_vars=True)}
    for name in list(state_dict):
        wanted = own.get(clean_name(name), name)
        if wanted not in state_dict:
            state_dict[wanted] = state_dict.pop(name)


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


class EMA(RunningAverage):
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
        super().__init__(recompute_batches)
        self._from_file = False
        self._load_handle: RemovableHandle | None = None
        self._unwrap_save: Callable[[], None] | None = None

    @property
    def state_key(self) -> str:
        """Key of this instance in a checkpoint's `callbacks`."""
        return f"EMA[{self.name}]"

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
        self._steps.stop_listening()
        self._steps.clear_marks()
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

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing on the module and nothing on the device."""
        if self._unwrap_save is not None:  # a tuner left the fit without calling any of its last hooks
            self._unwrap_save()
            self._fitting = False
            self._steps.stop_listening()
            self._steps.clear_marks()
        self._remove_load_handle()
        if self._average is not None:
            self._average.offload()

    def _remove_load_handle(self) -> None:
        if self._load_handle is not None:
            self._load_handle.remove()
            self._load_handle = None

    # ---------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Counters, and the average where a checkpoint's `state_dict` does not hold it."""
        if not self.enabled:
            return {}
        state = self._steps.state_dict() | {"owner": self._owner}
        tensors = self._loaded if self._loaded is not None else self._average and self._average.average
        if tensors and (not self._owner or (not self.n_averaged and self._steps.started_at is not None)):
            state["average"] = dict(tensors)
        return state

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the average as `state_dict` and the raw weights beside it."""
        if not self.enabled:
            return
        if self._steps.stepped:  # saved between the optimizer step and the end of its batch
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
            self._steps.load_state_dict(own, self.every_n_steps)
            averaged = checkpoint["state_dict"] if own["owner"] and self.n_averaged else None
            self._loaded = own.get("average", averaged)
        elif has_raw and "averaging_state" in checkpoint and self._owner:
            n, steps = int(checkpoint["averaging_state"]["n_averaged"]), checkpoint["global_step"]
            counters = {"n_averaged": n, "steps": steps, "started_at": steps if n else None}
            self._steps.load_state_dict(counters, self.every_n_steps)
            self._loaded = checkpoint["state_dict"] if n else None
        else:
            rank_zero_warn(
                f"The checkpoint holds no average for EMA[{self.name}]: a new one starts from the loaded weights."
            )
        if self._fitting:  # a tuner restores in the middle of a fit
            self._materialise(pl_module)
