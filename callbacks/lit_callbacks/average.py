"""An exponential moving average of a module's weights, in plain torch: the arithmetic under `EMA`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["WeightAverage", "clean_name", "decay_at"]

Slot = dict[str, Any]


def decay_at(n: int, decay: float, warmup: bool) -> float:
    """Share of the old average that update `n` keeps.

    Without the warm-up the first `1 / (1 - decay)` updates would be dominated by the untrained weights; the ramp
    `(1 + n) / (10 + n)` averages about the last tenth of the training so far until `decay` is reached.

    Args:
        n: Number of updates already made, counted from 0.
        decay: Final decay, in [0, 1).
        warmup: False gives `decay` at once.

    Returns:
        A number in [0, 1).

    Example:
        >>> decay_at(0, decay=0.999, warmup=True)
        0.1
        >>> decay_at(10**6, decay=0.999, warmup=True)
        0.999
    """
    return min(decay, (1 + n) / (10 + n)) if warmup else decay


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


def _named_slots(module: nn.Module) -> Iterator[tuple[str, Slot, str, bool]]:
    """Yield the clean name, the dict that holds the tensor, its key there, and whether it is a parameter."""
    for prefix, sub in module.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for key, value in sub._parameters.items():
            if value is not None:
                yield clean_name(dot + key), sub._parameters, key, True
        for key, value in sub._buffers.items():
            if value is not None and key not in sub._non_persistent_buffers_set:
                yield clean_name(dot + key), sub._buffers, key, False


class WeightAverage:
    """Average of the trainable parameters and floating buffers of a module, matched by name.

    Frozen parameters, integer buffers and non-persistent buffers have no average: the module's own values serve. The
    module's tensors are only ever written in place, since a CUDA graph may have captured their addresses.

    Args:
        module: The live module.
        average_buffers: Also average floating persistent buffers, such as BatchNorm statistics.

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

    def __init__(self, module: nn.Module, *, average_buffers: bool) -> None:
        self.average: dict[str, Tensor] = {}
        self.raw: dict[str, Tensor] | None = None
        self._average_buffers = average_buffers
        self._live: dict[str, Tensor] = {}
        self._alias: dict[str, str] = {}
        self._slots: list[tuple[Slot, str, Tensor]] = []
        self._groups: list[tuple[list[Tensor], list[Tensor]]] = []
        self.bind(module)

    def _wanted(self, name: str, tensor: Tensor, is_parameter: bool) -> bool:
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return False
        return name in self.average or (tensor.requires_grad if is_parameter else self._average_buffers)

    def bind(self, module: nn.Module) -> None:
        """Look up the module's tensors again and follow their device and dtype.

        Tensors that became trainable since then join with their present value, which is also what an average over
        their frozen time would be.

        Raises:
            RuntimeError: If an averaged tensor has left the module.
        """
        live: dict[str, Tensor] = {}
        slots: list[tuple[Slot, str, Tensor]] = []
        self._alias = {}
        first_name: dict[int, str] = {}
        for name, slot, key, is_parameter in _named_slots(module):
            tensor: Tensor = slot[key]
            if not self._wanted(name, tensor, is_parameter) and id(tensor) not in first_name:
                continue
            # A tied tensor has several names in a state_dict and must be averaged once.
            self._alias[name] = first_name.setdefault(id(tensor), name)
            if self._alias[name] == name:
                live[name] = tensor
                slots.append((slot, key, tensor))
        if missing := sorted(set(self.average) - set(self._alias)):
            raise RuntimeError(f"the module no longer has the averaged tensors {missing[:5]} ({len(missing)} in all)")
        with _plain_tensors():
            for name, tensor in live.items():
                old = self.average.get(name, tensor)
                new = old.detach().to(tensor.device, _master_dtype(tensor))
                self.average[name] = new.clone() if old is tensor else new
                if self.raw is not None and name not in self.raw:
                    self.raw[name] = tensor.detach().clone()
        self._live, self._slots = live, slots
        groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for name, tensor in live.items():
            masters, lives = groups.setdefault((tensor.device, tensor.dtype), ([], []))
            masters.append(self.average[name])
            lives.append(tensor.detach())
        self._groups = list(groups.values())

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
                self.average[name].copy_(saved[name])
        return [name for name in self.average if name not in saved]

    def restart(self) -> None:
        """Let the average begin at the module's present weights."""
        with _plain_tensors():
            for masters, lives in self._groups:
                torch._foreach_copy_(masters, lives)

    def update(self, keep: float | Tensor) -> None:
        """Move the average towards the module: `average = keep * average + (1 - keep) * live`.

        Args:
            keep: Share of the old average in [0, 1]; a 0-dim tensor stays on its device, without a host sync.
        """
        with _plain_tensors():
            for masters, lives in self._groups:
                source = lives
                if lives[0].dtype != masters[0].dtype:
                    source = [torch.empty_like(master) for master in masters]
                    torch._foreach_copy_(source, lives)
                if isinstance(keep, Tensor):
                    # lerp takes a scalar weight only from the host; these three do the same from the device.
                    factor = keep.to(masters[0].device, masters[0].dtype)
                    torch._foreach_sub_(masters, source)
                    torch._foreach_mul_(masters, factor)
                    torch._foreach_add_(masters, source)
                else:
                    torch._foreach_lerp_(masters, source, 1.0 - keep)

    def show_average(self) -> None:
        """Write the average into the module and keep the module's own values in `raw`."""
        if self.raw is not None:
            return
        with _plain_tensors():
            self.raw = {name: tensor.detach().clone() for name, tensor in self._live.items()}
            for masters, lives in self._groups:
                torch._foreach_copy_(lives, masters)

    def show_raw(self) -> None:
        """Write the module's own values back."""
        if self.raw is None:
            return
        with _plain_tensors():
            lives = [tensor.detach() for tensor in self._live.values()]
            torch._foreach_copy_(lives, [self.raw[name] for name in self._live])
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
        """Move everything to the host, where the module waits after a fit."""
        self.average = {name: value.cpu() for name, value in self.average.items()}
        if self.raw is not None:
            self.raw = {name: value.cpu() for name, value in self.raw.items()}

    def averaged_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Replace what is averaged in a `state_dict` of the module; the rest is passed on."""
        return self._replaced(state, self.average.get)

    def raw_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Replace what is averaged in a `state_dict` of the module by the module's own values."""
        return self._replaced(state, (self.raw or {}).get)

    def _replaced(self, state: Mapping[str, Any], lookup: Callable[[str, Any], Any]) -> dict[str, Any]:
        named = ((clean_name(name), value) for name, value in state.items())
        return {name: lookup(self._alias.get(name, name), value) for name, value in named}
