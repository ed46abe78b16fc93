"""Exponential moving average of the weights, evaluated and saved in place of the weights themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lit_callbacks.average import WeightAverage, clean_name, decay_at

__all__ = ["EMA"]

_SHARDED = {"FSDPStrategy", "XLAFSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}


def _match_compiled_names(module: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
    """Rename keys of a state to be loaded where only `torch.compile` around a submodule sets them apart."""
    own = {clean_name(name): name for name in module.state_dict(keep_vars=True)}
    for name in list(state_dict):
        wanted = own.get(clean_name(name), name)
        if wanted not in state_dict:
            state_dict[wanted] = state_dict.pop(name)


class EMA(Callback):
    """Average the weights over the optimizer steps; validate, test, predict and save with the average.

    Checkpoints have the keys of Lightning's `WeightAveraging`: `state_dict` is the average and loads strictly into the
    plain module, `current_model_state` are the weights that the optimizer works on. Both classes open each other's
    files. A weights-only checkpoint holds the average alone. For a bf16 or fp16 module `state_dict` is fp32.

    One update follows each optimizer step that changed something: not the batches in between under accumulation, not
    the steps that a gradient scaler skips, not a step without gradients. Until the first update the live weights are
    validated and saved. After the fit the module holds the average; a further `fit` of the same module goes on from
    the raw weights and the average. If other weights were loaded into the module in between, training starts from
    those and so does a new average.

    With several instances the first enabled one is validated and fills `state_dict`; the others live in their callback
    state. Sharded strategies (FSDP, DeepSpeed) are refused.

    Args:
        decay: Share of the old average that one optimizer step keeps, in [0, 1).
        warmup: Limit the decay of update n, counted from 0, to (1 + n) / (10 + n).
        every_n_steps: Optimizer steps per update; `decay` is raised to this power.
        start_step: Optimizer steps before the average begins.
        start_epoch: Epochs before the average begins; the later of the two counts.
        buffers: "average" or "copy" floating buffers such as BatchNorm statistics. Integer ones are always copied.
        evaluate: Weights in validation, test and predict of the training process. A file's `state_dict`, loaded by
            `ckpt_path`, is always taken as it is.
        enabled: False makes the callback do nothing, so that a config file can switch it off.
        name: Tells several instances apart, also in checkpoints.

    Example:
        >>> slow, fast = EMA(decay=0.9999, name="slow"), EMA(decay=0.99, name="fast")
        >>> slow.state_key, fast.state_key
        ('EMA[slow]', 'EMA[fast]')
        >>> trainer = Trainer(callbacks=[slow, fast], accelerator="cpu", logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        *,
        decay: float = 0.999,
        warmup: bool = True,
        every_n_steps: int = 1,
        start_step: int = 0,
        start_epoch: int = 0,
        buffers: Literal["average", "copy"] = "average",
        evaluate: Literal["ema", "live"] = "ema",
        enabled: bool = True,
        name: str = "ema",
    ) -> None:
        if not 0.0 <= decay < 1.0:
            raise MisconfigurationException(f"EMA: decay must be in [0, 1), got {decay}")
        if every_n_steps < 1 or start_step < 0 or start_epoch < 0:
            raise MisconfigurationException("EMA: every_n_steps must be >= 1, start_step and start_epoch >= 0")
        if buffers not in ("average", "copy") or evaluate not in ("ema", "live"):
            raise MisconfigurationException(f"EMA: unknown buffers={buffers!r} or evaluate={evaluate!r}")
        self.decay = decay
        self.warmup = warmup
        self.every_n_steps = every_n_steps
        self.start_step = start_step
        self.start_epoch = start_epoch
        self.buffers = buffers
        self.evaluate = evaluate
        self.enabled = enabled
        self.name = name

        self._average: WeightAverage | None = None
        self._owner = True
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
        self._clear_marks()

    def _clear_marks(self) -> None:
        self._stepped = False
        self._certain = False
        self._found_inf: list[Tensor] = []

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
        self._owner = self._first(trainer) is self
        if self._owner:
            self._remove_load_handle()
            # A module-level function, so that the module can still be pickled.
            self._load_handle = pl_module.register_load_state_dict_pre_hook(_match_compiled_names)

    def _first(self, trainer: Trainer) -> EMA:
        return next((cb for cb in trainer.callbacks if isinstance(cb, EMA) and cb.enabled), self)  # pyright: ignore[reportAttributeAccessIssue]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the average, or go on with that of a file or of an earlier fit."""
        if not self.enabled:
            return
        if self._average is not None and self._loaded is None and not self._from_file:
            self._go_on(trainer, pl_module)
        self._materialise(pl_module)
        self._from_file = False
        self._fitting = True
        if self._owner:
            self._wrap_save(pl_module)

    def _go_on(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Second fit: give the raw weights back to the optimizer, unless the module holds other weights by now."""
        assert self._average is not None
        try:
            self._average.bind(pl_module)
            shown = self._average.is_shown() or not self._owner
        except RuntimeError:  # another module
            shown = False
        self._continued = (shown or self.n_averaged == 0) and (self._owner or self._first(trainer)._continued)
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
            self._average = WeightAverage(pl_module, average_buffers=self.buffers == "average")
        else:
            self._average.bind(pl_module)
        if self._loaded is not None:
            missing = self._average.load(self._loaded)
            self._loaded = None
            if missing:
                rank_zero_warn(f"EMA[{self.name}]: no saved average for {missing}; they start at their present value.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the optimizers; a resumed epoch has no `on_train_epoch_start`."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the optimizers, take in layers that were unfrozen, begin if it is time."""
        if not self.enabled or self._average is None:
            return
        if [id(o) for o in trainer.optimizers] != [id(o) for o in self._hooked]:
            self._remove_step_hooks()
            self._hooked = list(trainer.optimizers)
            self._handles = [o.register_step_post_hook(self._mark) for o in self._hooked]
        self._average.bind(pl_module)
        self._start_if_due(trainer)

    def _mark(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Note that a step took place. Several optimizers step in one batch, so the update itself waits."""
        if not any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            return  # training_step returned None
        self._stepped = True
        # A gradient scaler leaves its verdict here when the optimizer does the skipping itself (fused).
        found_inf = getattr(optimizer, "found_inf", None)
        if isinstance(found_inf, Tensor):
            self._found_inf.append(found_inf)
        else:
            self._certain = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average if this batch ended in an optimizer step."""
        self._after_step(trainer, pl_module)

    def _after_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        average = self._average
        if not self._stepped or average is None:
            return
        self._stepped = False
        self._steps += 1
        if self._started_at is None:
            self._start_if_due(trainer)
            self._clear_marks()
            return
        if (self._steps - self._started_at) % self.every_n_steps:
            return
        if not average.is_bound():
            average.bind(pl_module)
        limit = self.decay**self.every_n_steps
        average.update(decay_at(self._n, limit, self.warmup) if self._certain else self._keep_on_device(limit))
        self._n += 1
        self._clear_marks()

    def _keep_on_device(self, limit: float) -> Tensor:
        """Decay as a 0-dim tensor: 1, which changes nothing, if every step since the last update was skipped."""
        device = self._found_inf[0].device
        skipped = torch.stack([flag.detach().to(device).reshape(()) for flag in self._found_inf]).gt(0).all()
        before = self._skipped if self._skipped is not None else torch.zeros((), device=device)
        n = self._n - before
        ramp = ((1 + n) / (10 + n)).clamp(max=limit) if self.warmup else torch.full_like(n, limit)
        self._skipped = before + skipped
        return torch.where(skipped, torch.ones_like(ramp), ramp)

    def _start_if_due(self, trainer: Trainer) -> None:
        due = self._steps >= self.start_step and trainer.current_epoch >= self.start_epoch
        if self._started_at is None and due and self._average is not None:
            self._average.restart()
            self._started_at = self._steps

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the module."""
        self._finish(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the module also when there was nothing to train."""
        self._finish(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Bring the module into its state after a fit; checkpoint callbacks save only afterwards."""
        if not self._fitting:
            self._leave()
            return
        try:
            self._after_step(trainer, pl_module)
            self._finish(pl_module)
        except RuntimeError as error:  # a broken device must not hide the first exception
            rank_zero_warn(f"EMA[{self.name}]: the weights could not be exchanged after the exception: {error}")

    def _finish(self, pl_module: LightningModule) -> None:
        if not self._fitting:
            return
        self._fitting = False
        self._remove_step_hooks()
        self._clear_marks()
        if self._unwrap_save is not None:
            self._unwrap_save()
        if self._average is not None and self._owner and self.n_averaged:
            self._average.bind(pl_module)
            self._average.show_average()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing on the module and nothing on the device."""
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
            if self.evaluate == "ema":
                average.bind(pl_module)
                average.show_average()
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

    def _wrap_save(self, pl_module: LightningModule) -> None:
        """Reach weights-only checkpoints, for which the Trainer calls no callback but always this module hook."""
        original = pl_module.on_save_checkpoint
        had_own = pl_module.__dict__.get("on_save_checkpoint")

        def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
            if "averaging_state" not in checkpoint and self._average is not None:
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
