"""What trial steps need: batches of any size, a way back, and a meter of memory."""

from __future__ import annotations

import copy
import gc
import random
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, Protocol

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.memory import is_oom_error
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler

__all__ = ["Meter", "Snapshot", "batch_length", "meter_for", "release", "resize_batch", "size_of", "too_large"]

_MANY = 10_000  # items of a container beyond which it is data, not state


# ---- batches ---------------------------------------------------------------------------------------------------------


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in fields(value)]
    return ()


def _is_array(value: Any) -> bool:
    # NumPy's arrays as well, without importing it.
    return isinstance(value, Tensor) or (hasattr(value, "ndim") and hasattr(value, "nbytes"))


def _arrays(value: Any) -> Iterator[Any]:
    """Arrays with at least one axis."""
    if _is_array(value) and value.ndim:
        yield value
    for child in _children(value):
        yield from _arrays(child)


def size_of(value: Any) -> int:
    """Bytes of the tensors in dicts, lists, tuples and dataclasses.

    Example:
        >>> size_of({"x": torch.zeros(2, 3), "id": ["a", "b"]})
        24
    """
    return sum(array.nbytes for array in _arrays(value))


def _is_samples(value: Any, length: int) -> bool:
    """Tell a list of one item per sample from a list of whole-batch tensors, such as image and target.

    A target may have as many boxes as the batch has samples, so one array of another length decides.
    """
    if not isinstance(value, list) or len(value) != length:
        return False
    lengths = [array.shape[0] for array in _arrays(value)]
    return not lengths or any(n != length for n in lengths)


def batch_length(batch: Any, hint: int | None = None) -> int:
    """Samples of a batch.

    Args:
        batch: Tensors and lists in dicts, lists, tuples and dataclasses.
        hint: Taken if anything in it is that long. Otherwise the first axis of the first tensor decides.

    Raises:
        MisconfigurationException: If nothing in it has a length.

    Example:
        >>> batch_length(([torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)], ["a", "b"]), hint=2)
        2
    """
    lengths = [array.shape[0] for array in _arrays(batch)]
    stack = [batch]
    while hint is not None and stack:
        value = stack.pop()
        if hint in lengths or (isinstance(value, list) and len(value) == hint):
            return hint
        stack.extend(_children(value))
    if not any(lengths):
        raise MisconfigurationException(
            f"BatchSizeFit: batch expected tensors in dicts, lists, tuples or dataclasses, got {type(batch).__name__}; "
            "define worst_case_batch(batch_size) in the module or data module"
        )
    return int(next(n for n in lengths if n))


def resize_batch(batch: Any, length: int, size: int) -> Any:
    """Cut a batch or repeat its samples.

    Args:
        batch: Tensors and lists in dicts, lists, tuples and dataclasses; what has not `length` items is kept.
        length: Samples that it has.
        size: Samples that it shall have.

    Example:
        >>> resize_batch({"x": torch.tensor([1, 2]), "id": ["a", "b"]}, length=2, size=3)
        {'x': tensor([1, 2, 1]), 'id': ['a', 'b', 'a']}
    """
    return _take(batch, length, torch.arange(size) % length)


def _take(value: Any, length: int, index: Tensor) -> Any:
    if _is_array(value):
        if not value.ndim or value.shape[0] != length:
            return value
        return value[index.to(value.device)] if isinstance(value, Tensor) else value[index.numpy()]
    if _is_samples(value, length):
        return [value[i] for i in index.tolist()]
    take = partial(_take, length=length, index=index)
    if isinstance(value, Mapping):
        out: Any = copy.copy(value)
        for key, item in value.items():
            out[key] = take(item)
        return out
    if isinstance(value, list | tuple):
        items = [take(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if is_dataclass(value) and not isinstance(value, type):
        out = copy.copy(value)
        for field in fields(value):
            object.__setattr__(out, field.name, take(getattr(value, field.name)))  # frozen ones too
        return out
    return value


# ---- the way back ----------------------------------------------------------------------------------------------------


def _same(a: Iterable[Any], b: Iterable[Any]) -> bool:
    return len(a := list(a)) == len(b := list(b)) and all(x is y for x, y in zip(a, b, strict=True))


def _refill(container: Any, content: Any) -> None:
    """Give a container its old content back, in place: others hold references to it."""
    if isinstance(container, dict):
        if not (_same(container, content) and _same(container.values(), content.values())):
            container.clear()
            container.update(content)
    elif not _same(container, content):
        container.clear()
        (container.update if isinstance(container, set) else container.extend)(content)


class Snapshot:
    """The state of some objects, to be restored exactly, any number of times.

    Tensors are copied to the host, where they do not count, and copied back into the memory they had. Attributes and
    containers get the objects back that they held: a Python counter, the state that an optimizer makes in its first
    step, the states of a torchmetrics metric, the mode of a module. Random generators go back to where they were.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> snapshot = Snapshot()
        >>> snapshot.watch(net)
        >>> before = net.weight.item()
        >>> _ = nn.init.zeros_(net.eval().weight)
        >>> snapshot.restore()
        >>> net.weight.item() == before, net.training
        (True, True)
    """

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}  # the objects themselves, or another could get their id
        self._undo: list[Callable[[], object]] = []

    def restore(self) -> None:
        """Bring everything back that was watched."""
        for undo in self._undo:
            undo()

    def watch(self, *roots: Any) -> None:
        """Watch objects, modules and whatever they hold in containers. Other objects inside are left alone."""
        self._walk(roots, (nn.Module, Optimizer, LRScheduler), tensors=True)

    def watch_loader(self, loader: Any) -> None:
        """Watch a data loader, its samplers and data sets; their tensors are data, which nothing writes to."""
        self._walk([loader], (DataLoader, Sampler, Dataset), tensors=False)

    def _walk(self, roots: Iterable[Any], inside: tuple[type, ...], *, tensors: bool) -> None:
        roots = list(roots)
        top = {id(root) for root in roots}
        stack = roots
        while stack:
            value = stack.pop()
            if id(value) in self._seen or value is None or isinstance(value, str | bytes | int | float | type):
                continue
            self._seen[id(value)] = value
            if isinstance(value, Tensor):
                if tensors:
                    stack.extend(self._tensor(value))
            elif isinstance(value, dict):
                self._undo.append(partial(_refill, value, dict(value)))
                stack.extend(value.values() if len(value) <= _MANY else ())
            elif isinstance(value, list | deque | set):
                self._undo.append(partial(_refill, value, list(value)))
                stack.extend(value if len(value) <= _MANY else ())
            elif isinstance(value, tuple):
                stack.extend(value)
            elif not self._generator(value) and hasattr(value, "__dict__"):
                if id(value) in top or isinstance(value, inside):
                    stack.append(vars(value))
                elif not tensors:
                    # A transform with a generator of its own. Its other attributes may belong to a running thread.
                    for item in list(vars(value).values()):
                        self._generator(item)

    def _tensor(self, tensor: Tensor) -> list[Tensor]:
        # `data` leaves the version counter alone: a graph that somebody holds stays valid.
        own, host = tensor.data, tensor.detach().to("cpu", copy=True)
        leaf, needs_grad = tensor.is_leaf, tensor.requires_grad
        grad = tensor.grad if leaf else None

        def undo() -> None:
            if tensor.data_ptr() != own.data_ptr() or tensor.shape != own.shape:
                tensor.data = own
            # The states of a metric are inference tensors once a validation has reset them.
            with torch.inference_mode(own.is_inference()):
                own.copy_(host)
            if leaf:
                if tensor.requires_grad != needs_grad:
                    tensor.requires_grad_(needs_grad)
                tensor.grad = grad

        self._undo.append(undo)
        return [] if grad is None else [grad]

    def _generator(self, value: Any) -> bool:
        if isinstance(value, random.Random):
            self._undo.append(partial(value.setstate, value.getstate()))
        elif isinstance(value, torch.Generator) or type(value).__name__ == "RandomState":
            self._undo.append(partial(value.set_state, value.get_state()))  # type: ignore[union-attr]
        elif hasattr(value, "bit_generator"):  # numpy.random.Generator
            self._undo.append(partial(setattr, value.bit_generator, "state", value.bit_generator.state))
        else:
            return False
        return True


def too_large(error: BaseException) -> str | None:
    """Say in words that a batch was too large; None for any other error.

    Example:
        >>> too_large(torch.OutOfMemoryError("CUDA out of memory.")), too_large(ValueError("shape"))
        ('out of memory', None)
    """
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or is_oom_error(error) or "STATUS_ALLOC_FAILED" in text:
        return "out of memory"
    if isinstance(error, RuntimeError) and ("INT_MAX" in text or "32-bit ind" in text):
        return "too large for a kernel"
    return None


def release(error: BaseException | None) -> None:
    """Let go of the tensors in the frames of an exception and of those that led to it."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__, error = None, error.__cause__ or error.__context__


# ---- memory ----------------------------------------------------------------------------------------------------------


class Meter(Protocol):
    """Memory of a device."""

    total: int  # bytes of the card

    def available(self) -> int:
        """Bytes that this process could have of it."""
        ...

    def limit(self, budget: int) -> AbstractContextManager[None]:
        """Make every request beyond the budget fail as on a smaller card."""
        ...

    def start(self) -> None:
        """Give back what is not in use and forget the peak."""
        ...

    def peak(self) -> int:
        """Bytes reserved at most since `start`."""
        ...


class CudaMeter:
    """The caching allocator of one GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.total = torch.cuda.get_device_properties(device).total_memory

    def available(self) -> int:
        self.start()
        return torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device)

    @contextmanager
    def limit(self, budget: int) -> Iterator[None]:
        before = torch.cuda.get_per_process_memory_fraction(self.device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / self.total), self.device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(before, self.device)

    def start(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        torch.cuda.synchronize(self.device)  # an error of a kernel belongs to the probe that launched it
        return torch.cuda.max_memory_reserved(self.device)


def meter_for(device: torch.device) -> Meter | None:
    """Meter of a device, None for one without an allocator that could be limited."""
    return CudaMeter(device) if device.type == "cuda" else None
