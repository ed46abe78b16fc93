"""A second validation inside a fit, of the module alone, with what it logs collected under keys of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lit_callbacks.monitor import samples_in
from lit_callbacks.recompute import preserved, replaced

__all__ = ["Log", "accepted", "validate_again"]


def accepted(function: Callable[..., Any], *values: Any) -> tuple[Any, ...]:
    """As many of the values as the function takes by position.

    Example:
        >>> accepted(lambda batch: None, "batch", 0)
        ('batch',)
    """
    kinds = [p.kind for p in inspect.signature(function).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return values
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return values[: sum(kind in positional for kind in kinds)]


class _Value:
    """One logged key: a sum with its weight, an extreme, or a metric that computes itself."""

    def __init__(self, reduce: str, sync: bool, prog_bar: bool, logger: bool) -> None:
        self.reduce, self.sync, self.prog_bar, self.logger = reduce, sync, prog_bar, logger
        self.metric: Any = None
        self.total: Tensor | None = None
        self.weight = 0.0

    def add(self, value: Tensor, weight: float) -> None:
        self.weight += weight
        if self.reduce == "mean":
            value = value * weight
        if self.total is None:
            self.total = value
        elif self.reduce in ("min", "max"):
            self.total = getattr(torch, f"{self.reduce}imum")(self.total, value)
        else:
            self.total = self.total + value

    def compute(self, trainer: Trainer) -> Tensor:
        if self.metric is not None:
            return torch.as_tensor(self.metric.compute())
        assert self.total is not None
        total, weight = self.total, torch.as_tensor(self.weight, dtype=self.total.dtype, device=self.total.device)
        if self.sync:
            total = trainer.strategy.reduce(total, reduce_op=self.reduce if self.reduce in ("min", "max") else "sum")
            weight = trainer.strategy.reduce(weight, reduce_op="sum")
        return total / weight if self.reduce == "mean" else total  # type: ignore[operator]


class Log:
    """Stands in for `log` and `log_dict` of a module and collects their values over an epoch.

    Args:
        device: Where sums are kept.

    Attributes:
        values: By key, with `/dataloader_idx_<i>` where there are several loaders.
    """

    def __init__(self, device: torch.device) -> None:
        self.values: dict[str, _Value] = {}
        self._device = device
        self._batch: Any = None
        self._suffix = ""

    def at(self, batch: Any, dataloader_idx: int | None) -> None:
        """What is logged from here on belongs to this batch, or to none."""
        self._batch, self._suffix = batch, "" if dataloader_idx is None else f"/dataloader_idx_{dataloader_idx}"

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, **options: Any) -> None:
        """Collect several values."""
        for name, value in dictionary.items():
            self.log(name, value, *args, **options)

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[..., Any] = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Collect one value, with the arguments of `LightningModule.log`."""
        if on_epoch is False:
            return
        reduce = reduce_fx if isinstance(reduce_fx, str) else reduce_fx.__name__
        reduce = {"avg": "mean"}.get(reduce.lower(), reduce.lower())
        key = name + (self._suffix if add_dataloader_idx else "")
        kept = self.values.setdefault(
            key, _Value(reduce, sync_dist and not rank_zero_only, prog_bar, logger is not False)
        )
        if hasattr(value, "compute") and hasattr(value, "reset"):
            kept.metric = value
            return
        if batch_size is None:
            batch_size = 1 if self._batch is None else samples_in(self._batch)
        number = torch.as_tensor(value, device=self._device).detach()
        kept.add(number if number.is_floating_point() else number.to(torch.get_default_dtype()), batch_size)


def validate_again(trainer: Trainer, module: LightningModule) -> dict[str, Tensor]:
    """Run the module's validation once more and write what it logs as `<key>_live`.

    To be called at the end of a validation within a fit. Callbacks are not called, `on_validation_start` and
    `on_validation_end` of the module neither. The module, its metrics and the random numbers are put back.

    Args:
        trainer: Its validation loaders and limits are those of the validation that is ending.
        module: In eval mode, with the weights to validate.

    Returns:
        What was written to `trainer.callback_metrics` and to the loggers.
    """
    log = Log(module.device)
    with (
        preserved(module, fresh_metrics=True),
        replaced(module, log=log.log, log_dict=log.log_dict),
        torch.no_grad(),
    ):
        module.on_validation_epoch_start()
        for batch, batch_idx, dataloader_idx in _batches(trainer, module):
            log.at(batch, dataloader_idx)
            index = () if dataloader_idx is None else (dataloader_idx,)
            step, start, end = module.validation_step, module.on_validation_batch_start, module.on_validation_batch_end
            start(*accepted(start, batch, batch_idx, *index))
            with trainer.precision_plugin.val_step_context():
                output = step(*accepted(step, batch, batch_idx, *index))
            end(*accepted(end, output, batch, batch_idx, *index))
        log.at(None, None)
        module.on_validation_epoch_end()
        found = {f"{key}_live": (value, value.compute(trainer).detach()) for key, value in log.values.items()}
    trainer.callback_metrics.update({key: number for key, (_, number) in found.items()})
    trainer.progress_bar_metrics.update({key: float(number) for key, (v, number) in found.items() if v.prog_bar})
    logged = {key: number for key, (v, number) in found.items() if v.logger}
    trainer.logged_metrics.update(logged)
    for logger in trainer.loggers:
        # The axis of everything that the module logs in validation.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        logger.log_metrics({key: number.item() for key, number in logged.items()}, step=step)
    return {key: number for key, (_, number) in found.items()}


def _batches(trainer: Trainer, module: LightningModule) -> Iterator[tuple[Any, int, int | None]]:
    """Batches on the device with their numbers; the loader's number only where there are several."""
    loader: Any = trainer.fit_loop.epoch_loop.val_loop._combined_loader
    # `limit_val_batches` is in the loader's limits since the validation that is ending.
    several = loader._mode == "sequential" and len(loader.flattened) > 1
    for batch, batch_idx, dataloader_idx in loader:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)
        yield batch, batch_idx, dataloader_idx if several else None
