"""An exponential moving average of a module's weights, in plain torch: the arithmetic under `EMA`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_callbacks.decay import decay_at

__all__ = ["WeightAverage", "clean_name", "decay_at", "tensor_names"]

Slot = dict[str, Any]

_CHUNK = 2**24  # numbers converted to fp32 at a time: 64 MB however large the module is


def clean_name(name: str) -> str:
    """Name of a tensor as it would be without `torch.compile` around a submodule.

    Example:
        >>> clean_name("net._orig_mod.0.weight")
        'net.0.weight'
    """
    return name.replace("_orig_mod.", "")


@contextmanager
def _plain_tensors() -> Iterator[None]:
    # Evaluation loops run in inference mode, where a new tensor could never be written to again.
    with torch.inference_mode(False), torch.no_grad():
        yield


def _master_dtype(tensor: Tensor) -> torch.dtype:
    # With 8 or 11 bits of mantissa a step of 1 - decay = 0.001 would be rounded away.
    return torch.float32 if tensor.dtype in (torch.bfloat16, torch.float16) else tensor.dtype


@dataclass
class _Entry:
    """A tensor of the module: where it hangs, and all its names if it is tied."""

    tensor: Tensor
    slot: Slot
    key: str
    is_parameter: bool
    is_statistic: bool
    names: list[str] = field(default_factory=list)


def _entries(module: nn.Module) -> list[_Entry]:
    """Parameters and persistent buffers in the order of a `state_dict`, each tensor once."""
    found: dict[int, _Entry] = {}
    for prefix, sub in module.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for key, value in sub._parameters.items():
            if value is not None:
                entry = found.setdefault(id(value), _Entry(value, sub._parameters, key, True, False))
                entry.names.append(clean_name(dot + key))
        for key, value in sub._buffers.items():
            if value is not None and key not in sub._non_persistent_buffers_set:
                statistic = isinstance(sub, _BatchNorm) and key in ("running_mean", "running_var")
                entry = found.setdefault(id(value), _Entry(value, sub._buffers, key, False, statistic))
                entry.names.append(clean_name(dot + key))
    return list(found.values())


def tensor_names(module: nn.Module) -> list[str]:
    """Clean names of all parameters and persistent buffers, which `include` and `exclude` are compared with.

    Example:
        >>> tensor_names(nn.Sequential(nn.Linear(1, 1)))
        ['0.weight', '0.bias']
    """
    return [name for entry in _entries(module) for name in entry.names]


Group = tuple[list[Tensor], list[Tensor], list[Tensor] | None]


def _by_kind(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Sort (master, source) pairs into lists that one foreach call can take."""
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for master, source in pairs:
        masters, sources = groups.setdefault((source.device, source.dtype), ([], []))
        masters.append(master)
        sources.append(source)
    return list(groups.values())


def _chunks(masters: list[Tensor], sources: list[Tensor]) -> Iterator[Group]:
    """Add storage for the conversion of bf16 and fp16 sources, which the chunks use one after the other."""
    if masters[0].dtype == sources[0].dtype:
        yield masters, sources, None
        return
    spans, start, size, largest = [], 0, 0, 0
    for i, source in enumerate(sources):
        if size and size + source.numel() > _CHUNK:
            spans.append((start, i))
            start, size = i, 0
        size += source.numel()
        largest = max(largest, size)
    spans.append((start, len(sources)))
    storage = torch.empty(largest, dtype=masters[0].dtype, device=masters[0].device)
    for a, b in spans:
        pieces = storage.split([s.numel() for s in sources[a:b]] + [largest - sum(s.numel() for s in sources[a:b])])
        # In the masters' memory format, without which a foreach call falls apart into one kernel per tensor.
        wide = [p.as_strided(m.size(), m.stride()) for p, m in zip(pieces, masters[a:b], strict=False)]
        yield masters[a:b], sources[a:b], wide


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets and targets[0].device == sources[0].device:
        torch._foreach_copy_(targets, sources)
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def _blend(groups: list[Group], keep: float | Tensor) -> None:
    for masters, lives, wide in groups:
        if wide is not None:
            torch._foreach_copy_(wide, lives)
        source = lives if wide is None else wide
        if isinstance(keep, Tensor):
            # lerp takes a scalar weight only from the host; these three do the same from the device.
            torch._foreach_sub_(masters, source)
            torch._foreach_mul_(masters, keep.to(masters[0].device, masters[0].dtype))
            torch._foreach_add_(masters, source)
        else:
            torch._foreach_lerp_(masters, source, 1.0 - keep)


class _HostCopy:
    """Copies of live tensors in host memory, and the thread that blends them into the masters there.

    With CUDA the copies go through a side stream into pinned memory, and `fence` lets the compute stream wait for them
    on the device. The next update waits until the thread is done with this one, since both use the same memory: the
    host may run one step ahead of the device, not two.

    Args:
        tensors: Live tensors by name.
        parameters: Names that only an optimizer writes to.
        cuda: Module with the streams and events.
        kind: Type of the devices that copy asynchronously.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], parameters: set[str], cuda: Any = torch.cuda, kind: str = "cuda"
    ) -> None:
        self._cuda, self._kind = cuda, kind
        self.copies = {name: _host_like(tensor) for name, tensor in tensors.items()}
        # The next forward pass already writes to buffers, the optimizer to parameters only.
        self._early = [(self.copies[n], t) for n, t in tensors.items() if n not in parameters]
        self._late = [(self.copies[n], t) for n, t in tensors.items() if n in parameters]
        self._devices = sorted({t.device for t in tensors.values() if t.device.type == kind}, key=str)
        self._streams = {device: cuda.Stream(device) for device in self._devices}
        # A spinning wait would take a core from the loaders.
        self._events = {device: cuda.Event(blocking=True) for device in self._devices}
        self._keep: Tensor | None = None
        self._fenced = True
        self._worker: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None
        self._error: BaseException | None = None

    def submit(self, groups: list[Group], keep: float | Tensor) -> None:
        self.wait()
        if isinstance(keep, Tensor):
            if self._keep is None:
                self._keep = _host_like(keep)
            self._copy(self._keep, keep)
            keep = self._keep
        for copy, live in self._early:
            self._copy(copy, live)
        for device in self._devices:
            self._streams[device].wait_stream(self._cuda.current_stream(device))
        for copy, live in self._late:
            if live.device in self._streams:
                with self._cuda.stream(self._streams[live.device]):
                    self._copy(copy, live)
            else:
                self._copy(copy, live)
        for device in self._devices:
            self._events[device].record(self._streams[device])
        self._fenced = not self._devices
        if self._worker is None:
            self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ema")
        self._pending = self._worker.submit(self._work, groups, keep)

    def _copy(self, copy: Tensor, live: Tensor) -> None:
        copy.copy_(live, non_blocking=live.device.type == self._kind)

    def _work(self, groups: list[Group], keep: float | Tensor) -> None:
        for event in self._events.values():
            event.synchronize()
        with _plain_tensors():
            _blend(groups, keep)

    def fence(self) -> None:
        """Let what is queued from now on wait, on the device, until the live tensors have been copied."""
        if not self._fenced:
            self._fenced = True
            for device, event in self._events.items():
                self._cuda.current_stream(device).wait_event(event)

    def wait(self) -> None:
        """Wait for the thread.

        Raises:
            RuntimeError: If an update failed, also at every later call: the average is not to be used any more.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._error = pending.exception()
        if self._error is not None:
            raise RuntimeError(f"the average in host memory could not be updated: {self._error}") from self._error

    def close(self) -> None:
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None


def _host_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda", requires_grad=False)


class WeightAverage:
    """Average of the trainable parameters and floating buffers of a module, matched by name.

    Frozen parameters, integer buffers and non-persistent buffers have no average: the module's own values serve, as
    they do for what the filters leave out. The module's tensors are only ever written in place, since a CUDA graph may
    have captured their addresses.

    Args:
        module: The live module.
        average_buffers: Also average floating persistent buffers, such as BatchNorm statistics.
        statistics: Hold BatchNorm statistics beside the average, written by `write_statistics` alone.
        include: Regular expressions, searched in clean names; where given, only what matches one is averaged.
        exclude: Regular expressions; what matches one is not averaged.
        on_host: Keep the average and `raw` in host memory and update them there, in a thread.

    Attributes:
        average: Averages by clean name, each in the shape of its tensor; fp32 where the module is bf16 or fp16.
        raw: The module's own values by name while the module holds the average, else None.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(net.weight)
        >>> average = WeightAverage(net, average_buffers=True)
        >>> _ = nn.init.constant_(net.weight, 2.0)
        >>> average.update(0.5)
        >>> average.show_average()
        >>> net.weight.item()
        1.5
        >>> average.show_raw()
        >>> net.weight.item()
        2.0
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        average_buffers: bool,
        statistics: bool = False,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        on_host: bool = False,
    ) -> None:
        self._average: dict[str, Tensor] = {}
        self.raw: dict[str, Tensor] | None = None
        self._average_buffers = average_buffers
        self._hold_statistics = statistics
        self._include = [re.compile(p) for p in include]
        self._exclude = [re.compile(p) for p in exclude]
        self._on_host = on_host
        self._host: _HostCopy | None = None
        self._live: dict[str, Tensor] = {}
        self._statistics: list[str] = []
        self._alias: dict[str, str] = {}
        self._slots: list[tuple[Slot, str, Tensor]] = []
        self._bound: list[tuple[int, ...]] = []
        self._groups: list[Group] = []
        self._pairs: list[tuple[list[Tensor], list[Tensor]]] = []
        self.bind(module)

    @property
    def average(self) -> dict[str, Tensor]:
        """Averages by clean name, up to date."""
        self._wait()
        return self._average

    def _wait(self) -> None:
        if self._host is not None:
            self._host.wait()

    def fence(self) -> None:
        """Call this before the module's tensors are written to: a copy to the host may still be reading them."""
        if self._host is not None:
            self._host.fence()

    def _wanted(self, entry: _Entry) -> bool:
        if not (entry.tensor.is_floating_point() or entry.tensor.is_complex()):
            return False
        if any(name in self._average for name in entry.names):
            return True
        if self._include and not any(p.search(name) for p in self._include for name in entry.names):
            return False
        if any(p.search(name) for p in self._exclude for name in entry.names):
            return False
        if entry.is_parameter:
            return entry.tensor.requires_grad
        return self._average_buffers or (self._hold_statistics and entry.is_statistic)

    def bind(self, module: nn.Module) -> None:
        """Look up the module's tensors again and follow their device and dtype.

        Tensors that became trainable since then join with their present value, which is also what an average over
        their frozen time would be.

        Raises:
            RuntimeError: If an averaged tensor has left the module.
        """
        self._wait()
        self.fence()
        live: dict[str, Tensor] = {}
        parameters: set[str] = set()
        self._slots, self._statistics, self._alias = [], [], {}
        for entry in _entries(module):
            if not self._wanted(entry):
                continue
            # A tied tensor has several names in a state_dict and must be averaged once.
            name = next((n for n in entry.names if n in self._average), entry.names[0])
            self._alias |= dict.fromkeys(entry.names, name)
            live[name] = entry.tensor
            self._slots.append((entry.slot, entry.key, entry.tensor))
            if entry.is_parameter:
                parameters.add(name)
            if entry.is_statistic and not self._average_buffers:
                self._statistics.append(name)
        if missing := sorted(set(self._average) - set(self._alias)):
            raise RuntimeError(f"the module no longer has the averaged tensors {missing[:5]} ({len(missing)} in all)")
        with _plain_tensors():
            for name, tensor in live.items():
                self._average[name] = self._master(self._average.get(name), tensor)
                if self.raw is not None and name not in self.raw:
                    self.raw[name] = tensor.detach().clone()
        self._live = live
        # A module that was moved keeps its parameters and gives them other memory.
        bound = [(tensor.data_ptr(), id(tensor), id(self._average[name])) for name, tensor in live.items()]
        if bound != self._bound:
            self._bound = bound
            self._regroup(parameters)

    def _master(self, old: Tensor | None, tensor: Tensor) -> Tensor:
        """The stored average in its place, or a new one that begins with the present value."""
        dtype = _master_dtype(tensor)
        if not self._on_host:
            return tensor.detach().to(dtype, copy=True) if old is None else old.to(tensor.device, dtype)
        pinned = tensor.device.type == "cuda"
        if old is not None and old.device.type == "cpu" and old.dtype == dtype and (not pinned or old.is_pinned()):
            return old
        value = tensor.detach() if old is None else old
        return torch.empty_like(value, dtype=dtype, device="cpu", pin_memory=pinned).copy_(value)

    def _regroup(self, parameters: set[str]) -> None:
        # `.data`: a swap to and fro leaves the values as they were, so autograd need not know of it.
        lives = {name: tensor.data for name, tensor in self._live.items()}
        self._pairs = _by_kind((self._average[name], tensor) for name, tensor in lives.items())
        moving = {name: tensor for name, tensor in lives.items() if name not in self._statistics}
        with _plain_tensors():
            if self._on_host:
                if self._host is not None:
                    self._host.close()
                self._host = _HostCopy(moving, parameters)
                moving = self._host.copies
            kinds = _by_kind((self._average[name], source) for name, source in moving.items())
            self._groups = [group for masters, sources in kinds for group in _chunks(masters, sources)]

    def is_bound(self) -> bool:
        """Tell whether the cached tensors are still the module's own, which a reassigned buffer is not."""
        return all(slot.get(key) is tensor for slot, key, tensor in self._slots)

    def load(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Copy saved averages in.

        Args:
            tensors: By name; names without an average here are ignored.

        Returns:
            The averaged names that `tensors` lacks; they keep their value.
        """
        saved = {clean_name(name): value for name, value in tensors.items() if isinstance(value, Tensor)}
        found = [name for name in self.average if name in saved]
        with _plain_tensors():
            for name in found:
                self._average[name].copy_(saved[name])
        return [name for name in self._average if name not in saved]

    def restart(self) -> None:
        """Let the average begin at the module's present weights."""
        self._wait()
        with _plain_tensors():
            for masters, lives in self._pairs:
                _copy(masters, lives)

    def update(self, keep: float | Tensor) -> None:
        """Move the average towards the module: `average = keep * average + (1 - keep) * live`.

        Args:
            keep: Share of the old average in [0, 1]; a 0-dim tensor stays on its device, without a host sync.

        Raises:
            RuntimeError: In host memory, if the update before this one failed.
        """
        with _plain_tensors():
            if self._host is not None:
                self._host.submit(self._groups, keep)
            else:
                _blend(self._groups, keep)

    @property
    def has_statistics(self) -> bool:
        """Tell whether there is anything for `write_statistics`."""
        return bool(self._statistics)

    def write_statistics(self, found: Mapping[int, Tensor]) -> None:
        """Take new BatchNorm statistics over.

        Args:
            found: By the id of the module's buffer; a layer that is missing takes the module's own values.
        """
        self._wait()
        with _plain_tensors():
            for name in self._statistics:
                tensor = self._live[name]
                own = tensor if self.raw is None else self.raw[name]
                self._average[name].copy_(found.get(id(tensor), own))
                if self.raw is not None:
                    tensor.data.copy_(self._average[name])

    def show_average(self) -> None:
        """Write the average into the module and keep the module's own values in `raw`."""
        if self.raw is not None:
            return
        self._wait()
        self.fence()
        with _plain_tensors():
            # Allocated anew each time: evaluation needs less memory than a training step, so it costs nothing then,
            # while a copy that is kept would be missing during training. On the host the copies are there anyway.
            self.raw = {name: self._raw_copy(name, tensor) for name, tensor in self._live.items()}
            for masters, lives in self._pairs:
                _copy(lives, masters)

    def _raw_copy(self, name: str, tensor: Tensor) -> Tensor:
        if self._host is None:
            return tensor.detach().clone()
        copy = self._host.copies.get(name)
        return (_host_like(tensor) if copy is None else copy).copy_(tensor.detach())

    def show_raw(self) -> None:
        """Write the module's own values back."""
        if self.raw is None:
            return
        with _plain_tensors():
            _copy([tensor.data for tensor in self._live.values()], [self.raw[name] for name in self._live])
        self.raw = None

    def is_shown(self) -> bool:
        """Compare the module with the average, exactly: False once somebody has loaded other weights into it."""
        with _plain_tensors():
            return self.raw is not None and all(
                # NaN equals itself here: a run that diverged has not loaded other weights.
                torch.allclose(
                    tensor, self.average[name].to(tensor.device, tensor.dtype), rtol=0.0, atol=0.0, equal_nan=True
                )
                for name, tensor in self._live.items()
            )

    def offload(self) -> None:
        """Move everything to the host, where the module waits after a fit, and end the thread."""
        self._average = {name: value.cpu() for name, value in self.average.items()}
        if self.raw is not None:
            self.raw = {name: value.cpu() for name, value in self.raw.items()}
        if self._host is not None:
            self._host.close()
        self._host, self._groups, self._pairs, self._bound = None, [], [], []

    def averaged_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Replace what is averaged in a `state_dict` of the module; the rest is passed on."""
        return self._replaced(state, self.average.get)

    def raw_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Replace what is averaged in a `state_dict` of the module by the module's own values."""
        return self._replaced(state, (self.raw or {}).get)

    def _replaced(self, state: Mapping[str, Any], lookup: Callable[[str, Any], Any]) -> dict[str, Any]:
        named = ((clean_name(name), value) for name, value in state.items())
        return {name: lookup(self._alias.get(name, name), value) for name, value in named}
