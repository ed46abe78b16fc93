"""Out of memory: tell it from other errors, free what can be freed, go on with smaller parts of a batch."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import functools
import gc
import itertools
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.memory import is_oom_error
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["OOMGuard", "is_out_of_memory", "release_memory", "same_effective_batch", "split_batch"]

_TEXTS = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED", "HOST_ALLOCATION_FAILED")
_MERGED = {"mean", "sum", "max", "min", "amax", "amin"}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory is exhausted, on the device or the host.

    Example:
        >>> is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")), is_out_of_memory(MemoryError())
        (True, True)
        >>> is_out_of_memory(RuntimeError("shape mismatch"))
        False
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and (any(t in str(error) for t in _TEXTS) or is_oom_error(error))


def release_memory(error: BaseException) -> None:
    """Drop the tensors that an exception's traceback holds and give cached blocks back to the device."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        traceback.clear_frames(found.__traceback__)
        found = found.__cause__ or found.__context__
    gc.collect()
    if torch.cuda.is_initialized():
        # After some errors the device takes no more orders; the first error is the one to hear about.
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def same_effective_batch(batch_size: int, accumulate: int) -> str:
    """The next smaller batch with the accumulation that keeps their product, in words.

    Example:
        >>> same_effective_batch(10, 1)
        'batch_size 10 x accumulate_grad_batches 1 -> batch_size 5 x accumulate_grad_batches 2'
        >>> same_effective_batch(9, 2)
        'batch_size 9 x accumulate_grad_batches 2 -> batch_size 3 x accumulate_grad_batches 6'
    """
    factor = next((f for f in range(2, batch_size + 1) if batch_size % f == 0), None)
    before = f"batch_size {batch_size} x accumulate_grad_batches {accumulate}"
    if factor is None:
        return f"{before} cannot be split further: take smaller samples, a smaller model or gradient checkpointing"
    return f"{before} -> batch_size {batch_size // factor} x accumulate_grad_batches {accumulate * factor}"


# ------------------------------------------------------------------ splitting


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            yield from _tensors(getattr(value, f.name))


def _batch_length(batch: Any) -> int | None:
    """Size of the first dimension of the first tensor that has one, as Lightning takes it."""
    return next((len(t) for t in _tensors(batch) if t.dim() > 0), None)


def _slice(value: Any, part: slice, length: int) -> Any:
    if isinstance(value, Tensor):
        return value[part] if value.dim() > 0 and len(value) == length else value
    if isinstance(value, list | tuple) and len(value) == length and not any(isinstance(v, Tensor) for v in value):
        return type(value)(value[part]) if not hasattr(value, "_fields") else value
    if isinstance(value, list) and len(value) == length and not _holds(value, length):
        return value[part]  # one tensor of any shape per sample
    if isinstance(value, Mapping):
        items = {k: _slice(v, part, length) for k, v in value.items()}
        return items if type(value) is dict else type(value)(items)  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_slice(v, part, length) for v in value))
    if isinstance(value, list | tuple):
        return type(value)(_slice(v, part, length) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        out = copy.copy(value)
        for f in dataclasses.fields(value):
            object.__setattr__(out, f.name, _slice(getattr(value, f.name), part, length))
        return out
    return value


def _holds(values: list[Any], length: int) -> bool:
    """Whether a list is a list of batched tensors rather than of one tensor per sample."""
    return all(isinstance(v, Tensor) and v.dim() > 0 and len(v) == length for v in values)


def split_batch(batch: Any, parts: int) -> list[tuple[Any, int]]:
    """Cut a batch into parts of almost equal size, each with its number of samples.

    Tensors whose first dimension is the batch and lists with one entry per sample are cut; other values are the same
    in every part. Dicts, lists, tuples, named tuples and dataclasses are searched. Nothing is copied.

    Raises:
        MisconfigurationException: There is no tensor with a batch dimension in it.

    Example:
        >>> split_batch({"x": torch.arange(3), "name": ["a", "b", "c"]}, 2)
        [({'x': tensor([0, 1]), 'name': ['a', 'b']}, 2), ({'x': tensor([2]), 'name': ['c']}, 1)]
    """
    length = _batch_length(batch)
    if length is None:
        raise MisconfigurationException(
            f"OOMGuard: batch expected tensors with a batch dimension, got {type(batch).__name__} without any"
        )
    parts = max(1, min(parts, length))
    ends = [i * (length // parts) + min(i, length % parts) for i in range(parts + 1)]  # the larger parts first
    return [(_slice(batch, slice(a, b), length), b - a) for a, b in itertools.pairwise(ends)]


# ------------------------------------------------------------------ the callback


class _Logs:
    """What the parts of one batch log, to be logged once: means weighted by samples."""

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        self._log = module.log
        self._values: dict[str, list[tuple[Any, int, int | None]]] = {}
        self._options: dict[str, dict[str, Any]] = {}
        self._of_part: list[tuple[str, Any, int | None]] = []

    def __call__(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        reduce_fx = options.get("reduce_fx", "mean")
        how = reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", "")
        if isinstance(value, Tensor):
            value = value.detach()
        plain = isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
        if args or not plain or how not in _MERGED:
            self._log(name, value, *args, **options)  # torchmetrics and dicts add up by themselves
            return
        self._of_part.append((name, value, options.pop("batch_size", None)))
        self._options[name] = options

    def begin(self) -> None:
        """Forget what a part logged that did not come to its end."""
        self._of_part = []

    def end(self, samples: int) -> None:
        """Take in what the part logged."""
        for name, value, size in self._of_part:
            self._values.setdefault(name, []).append((value, samples, size))
        self._of_part = []

    def write(self) -> None:
        """Log the merged values."""
        for name, entries in self._values.items():
            options = self._options[name]
            how = options.get("reduce_fx", "mean")
            how = how if isinstance(how, str) else how.__name__
            values = [value for value, _, _ in entries]
            if how == "sum":
                merged = sum(values[1:], values[0])
            elif how != "mean":
                merged = functools.reduce(
                    lambda a, b, pick=torch.maximum if "max" in how else torch.minimum: pick(a, b),
                    [torch.as_tensor(v) for v in values],
                )
            else:
                weights = [n for _, n, _ in entries]
                merged = sum(v * n for v, n in zip(values, weights, strict=True)) / sum(weights)
            sizes = [size for _, _, size in entries]
            known = [size for size in sizes if size is not None]
            if len(known) == len(sizes):
                options["batch_size"] = sum(known)
            self._log(name, merged, **options)


class OOMGuard(Callback):
    """Go on after an out-of-memory error in training, with each batch cut into parts whose gradients add up.

    A step that runs out of memory is repeated in 2, 4, ... parts, and so is every later one. The parts of a batch are
    forwarded and differentiated one after the other within the same step; each loss is weighted by its share of the
    samples and by whatever factor Lightning applies (accumulation, gradient scaler). Batch size, accumulation,
    optimizer steps and the learning-rate schedule stay as they are, so the effective batch does too, and a warning says
    what changed.

    This is exact for losses that are means over samples. BatchNorm normalises by the statistics of a part, losses that
    compare the samples of a batch see fewer of them, and values that a step logs are averaged over the parts.

    An error in the backward pass spoils the gradients that earlier batches of an accumulation window left. If there are
    none, the batch is repeated; if there are, the error is raised, the number of parts is noted, and a run that is
    resumed from a checkpoint starts with it (`GracefulStop` writes one at the last complete optimizer step).

    Automatic optimization on one device only.

    Args:
        max_parts: Give up and raise the error when more parts would be needed.
        enabled: False makes the callback do nothing, so that a config file can switch it off.

    Attributes:
        parts: Parts that each batch is cut into at present.

    Raises:
        MisconfigurationException: At the start of a fit with manual optimization or several processes.

    Example:
        >>> guard = OOMGuard(max_parts=4)
        >>> guard.parts
        1
    """

    def __init__(self, max_parts: int = 8, enabled: bool = True) -> None:
        if max_parts < 2:
            raise MisconfigurationException(f"OOMGuard: max_parts expected at least 2, got {max_parts}")
        self.max_parts = max_parts
        self.enabled = enabled
        self.parts = 1
        self._unwrap: Callable[[], None] | None = None
        self._forget()

    def _forget(self) -> None:
        """Drop what belongs to the batch that is running."""
        self._batch: tuple[Any, tuple[Any, ...]] | None = None
        self._loss: Tensor | None = None
        self._proxy: Tensor | None = None
        self._rest: list[tuple[Any, int]] = []
        self._share = 1.0  # of the part whose loss waits for its backward pass
        self._length = 0
        self._logs: _Logs | None = None
        self._mean: Tensor | None = None
        self._rng: list[Tensor] = []

    # ------------------------------------------------------------------ fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be split."""
        if not self.enabled or stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise MisconfigurationException("OOMGuard: automatic_optimization expected True, got manual optimization")
        if trainer.world_size > 1:
            raise MisconfigurationException(
                f"OOMGuard: devices expected 1, got {trainer.world_size} processes, which would have to split together"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the module's `training_step` and `backward` behind the guard."""
        if not self.enabled:
            return
        self._remove()
        own = {name: pl_module.__dict__.get(name) for name in ("training_step", "backward")}
        step, backward = pl_module.training_step, pl_module.backward

        @functools.wraps(step)
        def training_step(batch: Any, *args: Any) -> Any:
            return self._forward(trainer, pl_module, step, batch, args)

        @functools.wraps(backward)
        def guarded_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            self._backward(trainer, pl_module, step, functools.partial(backward, *args, **kwargs), loss)

        def unwrap() -> None:
            for name, before in own.items():
                if before is None:
                    pl_module.__dict__.pop(name, None)
                else:
                    pl_module.__dict__[name] = before

        pl_module.__dict__.update(training_step=training_step, backward=guarded_backward)
        self._unwrap = unwrap

    def _remove(self) -> None:
        self._forget()
        if self._unwrap is not None:
            self._unwrap()
            self._unwrap = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the module its methods back."""
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the module its methods back."""
        self._remove()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the step's output be the mean over the parts, as the callbacks and the module get it."""
        if self._mean is not None and isinstance(outputs, dict) and isinstance(outputs.get("loss"), Tensor):
            outputs["loss"].copy_(self._mean / trainer.accumulate_grad_batches)
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """The number of parts, with which a resumed run starts."""
        return {"parts": self.parts} if self.enabled else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Start with the parts that the run had come to."""
        self.parts = min(state_dict["parts"], self.max_parts)

    # ------------------------------------------------------------------ one batch

    def _forward(
        self, trainer: Trainer, module: LightningModule, step: Callable[..., Any], batch: Any, args: tuple[Any, ...]
    ) -> Any:
        """Run the step on the first part; cut further until it fits.

        Lightning gets a stand-in of the loss, whose gradient tells the factor that it put before it, and which holds no
        activations when they must be freed.
        """
        self._forget()
        self._batch = (batch, args)
        self._remember_rng(trainer)
        out = None
        while True:
            try:
                if self.parts == 1:
                    out = step(batch, *args)
                    self._length = 1
                    loss = _loss_of(out)
                else:
                    pieces = split_batch(batch, self.parts)
                    self._length = sum(n for _, n in pieces)
                    self._logs, out, loss = _Logs(module), None, None
                    while pieces and loss is None:  # a part may be skipped by returning None
                        piece, samples = pieces.pop(0)
                        out = self._step(module, step, piece, samples, args)
                        loss = _loss_of(out)
                        self._share = samples / self._length
                    self._rest = pieces
                break
            except Exception as error:
                if not is_out_of_memory(error) or not self._may_split(batch):
                    raise
                release_memory(error)
                out = loss = None
            # Beyond the except block nothing refers to the failed attempt.
            self._more(trainer, module, batch)
            self._restore_rng(trainer)
        if loss is None:
            if self._logs is not None:
                self._logs.write()
            return None
        self._loss = loss
        self._proxy = loss.detach().clone().requires_grad_()
        return {**out, "loss": self._proxy} if isinstance(out, Mapping) else self._proxy

    def _step(
        self, module: LightningModule, step: Callable[..., Any], piece: Any, samples: int, args: tuple[Any, ...]
    ) -> Any:
        """One part's forward pass, its logging held back."""
        assert self._logs is not None
        hook, own = module._current_fx_name, module.__dict__.get("log")
        module._current_fx_name = "training_step"
        module.__dict__["log"] = self._logs
        self._logs.begin()
        try:
            out = step(piece, *args)
        finally:
            module._current_fx_name = hook
            if own is None:
                module.__dict__.pop("log", None)
            else:
                module.__dict__["log"] = own
        self._logs.end(samples)
        return out

    def _backward(
        self,
        trainer: Trainer,
        module: LightningModule,
        step: Callable[..., Any],
        backward: Callable[[Tensor], None],
        stand_in: Tensor,
    ) -> None:
        """Differentiate the first part, then run the others."""
        if self._proxy is None or self._loss is None:
            backward(stand_in)
            return
        (factor,) = torch.autograd.grad(stand_in, self._proxy)
        self._proxy = None
        assert self._batch is not None
        batch, args = self._batch
        logged = self._logs is None  # the whole batch went forward and logged what it had to
        while True:
            try:
                self._run(trainer, module, step, backward, factor, args)
                break
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                first = trainer.fit_loop.epoch_loop.batch_idx % trainer.accumulate_grad_batches == 0
                able = self._may_split(batch)
                if not able or not first:
                    if able:
                        self.parts *= 2
                        error.add_note(
                            f"OOMGuard: the gradients of earlier batches of the accumulation window are lost; a run "
                            f"that is resumed starts with {self.parts} parts per batch"
                        )
                    raise
                self._loss = None
                self._rest = []
                release_memory(error)
            module.zero_grad()
            self._more(trainer, module, batch)
            self._restore_rng(trainer)
            self._rest = split_batch(batch, self.parts)
            self._length = sum(n for _, n in self._rest)
            self._logs = _Logs(module)
            self._mean = None
        if self._logs is not None and not logged:
            hook, module._current_fx_name = module._current_fx_name, "training_step"
            try:
                self._logs.write()
            finally:
                module._current_fx_name = hook
        if self._logs is None:
            self._mean = None
        self._loss = None
        self._rest = []

    def _run(
        self,
        trainer: Trainer,
        module: LightningModule,
        step: Callable[..., Any],
        backward: Callable[[Tensor], None],
        factor: Tensor,
        args: tuple[Any, ...],
    ) -> None:
        """Backward of the part that is forwarded already, then both passes of the rest."""
        loss, self._loss = self._loss, None
        if loss is not None:
            self._add(backward, loss, self._share, factor)
        del loss
        while self._rest:
            piece, samples = self._rest[0]
            share = samples / self._length
            out = None
            try:
                with trainer.precision_plugin.train_step_context():
                    out = self._step(module, step, piece, samples, args)
            except Exception as error:
                # Only a forward pass failed: the gradients of the other parts are as they should be.
                if not is_out_of_memory(error) or samples < 2 or self.parts * 2 > self.max_parts:
                    raise
                release_memory(error)
            else:
                self._rest.pop(0)
                loss = _loss_of(out)
                if loss is not None:
                    self._add(backward, loss, share, factor)
                del loss, out
                continue
            self._more(trainer, module, self._batch[0] if self._batch else piece)
            self._rest = [smaller for p, _ in self._rest for smaller in split_batch(p, 2)]

    def _add(self, backward: Callable[[Tensor], None], loss: Tensor, share: float, factor: Tensor) -> None:
        weighted = factor * share if share != 1.0 else factor
        backward(loss * weighted)
        mean = loss.detach() * share
        self._mean = mean if self._mean is None else self._mean + mean

    # ------------------------------------------------------------------ parts

    def _may_split(self, batch: Any) -> bool:
        length = _batch_length(batch)
        return length is not None and self.parts < length and self.parts * 2 <= self.max_parts

    def _more(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Double the parts and say so."""
        self.parts *= 2
        sizes = sorted({n for _, n in split_batch(batch, self.parts)}, reverse=True)
        length, accumulate = _batch_length(batch), trainer.accumulate_grad_batches
        norm = any(isinstance(layer, _BatchNorm) and layer.training for layer in module.modules())
        rank_zero_warn(
            f"OOMGuard: out of memory with {length} samples in {self.parts // 2} part(s). From here on each batch runs "
            f"in {self.parts} parts of {' or '.join(map(str, sizes))}, whose gradients add up: the effective batch "
            f"stays {length} x {accumulate}."
            + (f" BatchNorm normalises over {sizes[-1]} samples at a time." if norm else "")
        )

    def _remember_rng(self, trainer: Trainer) -> None:
        self._rng = [torch.get_rng_state()]
        if trainer.strategy.root_device.type == "cuda":
            self._rng.append(torch.cuda.get_rng_state(trainer.strategy.root_device))

    def _restore_rng(self, trainer: Trainer) -> None:
        torch.set_rng_state(self._rng[0])
        if len(self._rng) > 1:
            torch.cuda.set_rng_state(self._rng[1], trainer.strategy.root_device)


def _loss_of(out: Any) -> Tensor | None:
    return out.get("loss") if isinstance(out, Mapping) else out
