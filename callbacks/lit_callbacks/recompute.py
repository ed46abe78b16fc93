"""BatchNorm statistics re-estimated from batches, and the means to let a module pass over batches without a trace."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["batch_norms", "estimate", "means", "preserved", "replaced", "sum_over_processes"]

_CONTAINERS = (list, dict, set, deque)


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """BatchNorm layers that track statistics, in order, each once.

    Example:
        >>> len(batch_norms(nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False))))
        1
    """
    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None and m.momentum != 0]


def _is_metric(module: nn.Module) -> bool:
    # By its form, since torchmetrics need not be installed for a module without metrics.
    return hasattr(module, "_defaults") and hasattr(module, "_update_count") and hasattr(module, "compute")


@contextmanager
def preserved(module: nn.Module, *, fresh_metrics: bool = False) -> Iterator[None]:
    """Put back what a pass over batches changes in a module, and the random numbers.

    For every submodule these are buffers, states of metrics, attributes (train or eval mode is one of them) and the
    contents of lists, dicts, sets and deques among them. What lies deeper, such as the fields of a plain object, is
    not seen.

    Args:
        module: The module that is going to run. Its buffers keep their storage.
        fresh_metrics: Let metrics start empty instead of from a copy of their state.

    Example:
        >>> net = nn.BatchNorm1d(2)
        >>> net.seen = []
        >>> with preserved(net):
        ...     _ = net(torch.ones(4, 2))
        ...     net.seen.append(1)
        >>> net.running_mean.tolist(), net.seen
        ([0.0, 0.0], [])
    """
    with torch.inference_mode(False), torch.no_grad():
        buffers = [(b, b.clone()) for b in module.buffers()]
    attributes: list[tuple[nn.Module, dict[str, Any]]] = []
    contents: list[tuple[Any, Any]] = []
    for sub in module.modules():
        attributes.append((sub, dict(sub.__dict__)))
        contents += [(value, value.copy()) for value in sub.__dict__.values() if type(value) in _CONTAINERS]
    random_numbers = isolate_rng()
    random_numbers.__enter__()
    try:
        for sub, _ in attributes:
            if _is_metric(sub):
                _detach_metric(sub, fresh=fresh_metrics)
        yield
    finally:
        random_numbers.__exit__(None, None, None)  # told of an exception, it would not restore
        for value, before in contents:
            _refill(value, before)
        for sub, before in attributes:
            for name in set(sub.__dict__) - set(before):
                del sub.__dict__[name]
            sub.__dict__.update(before)
        for buffer, before in buffers:
            with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                # Not through autograd: a graph that is waiting for its backward pass finds the buffer as it was.
                buffer.data.copy_(before)


@contextmanager
def replaced(module: nn.Module, **methods: Callable[..., Any]) -> Iterator[None]:
    """Put functions in the place of a module's methods for a while.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> with replaced(net, forward=lambda x: "nothing"):
        ...     net(torch.ones(1))
        'nothing'
    """
    own = {name: module.__dict__[name] for name in methods if name in module.__dict__}
    module.__dict__.update(methods)
    try:
        yield
    finally:
        for name in methods:
            module.__dict__.pop(name, None)
        module.__dict__.update(own)


def _detach_metric(metric: Any, fresh: bool) -> None:
    """Give a metric copies to write to; its own states wait in the attributes that `preserved` has noted."""
    for name in metric._defaults:
        state = getattr(metric, name)
        setattr(metric, name, list(state) if isinstance(state, list) else state.clone())
    if fresh:
        metric.reset()


def _refill(value: Any, before: Any) -> None:
    if value == before if isinstance(value, set) else _same_items(value, before):
        return
    value.clear()
    value.update(before) if isinstance(value, dict | set) else value.extend(before)


def _same_items(value: Any, before: Any) -> bool:
    # By identity: comparing tensors with == gives tensors.
    if len(value) != len(before):
        return False
    if isinstance(value, dict):
        return all(a is b and value[a] is before[b] for a, b in zip(value, before, strict=True))
    return all(a is b for a, b in zip(value, before, strict=True))


def estimate(layers: list[_BatchNorm], batches: Iterable[Any], forward: Callable[[Any], object]) -> list[Tensor]:
    """Sum up the statistics of each layer over batches, every call of a layer counting equally.

    The mean over the calls is what `torch.optim.swa_utils.update_bn` leaves in the layers, within rounding. That
    function sets `momentum` for the time being, which a compiled or captured forward pass would not notice. Here the
    statistics are set to zero before each batch; with momentum m the layer then leaves m times those of the batch.

    Args:
        layers: From `batch_norms`. Their buffers are used as scratch: call this within `preserved`.
        batches: What to run.
        forward: Runs one batch through the network, in the modes that the layers have.

    Returns:
        One float64 tensor of 2C + 1 numbers per layer: C sums of means, C sums of variances, number of calls.
    """
    for layer in layers:
        if isinstance(layer, nn.SyncBatchNorm):
            # It would wait for all processes; each estimates alone and the results are averaged afterwards.
            layer.__dict__["forward"] = partial(_BatchNorm.forward, layer)
    sums = [_zeros(layer) for layer in layers]
    # `.data` bypasses autograd: see `preserved`.
    scratch = [b.data for layer in layers for b in (layer.running_mean, layer.running_var)]  # type: ignore[union-attr]
    counters = [layer.num_batches_tracked.data for layer in layers]  # type: ignore[union-attr]
    for batch in batches:
        torch._foreach_zero_(scratch)
        torch._foreach_zero_(counters)
        forward(batch)
        for i, (layer, calls) in enumerate(zip(layers, _counts(counters), strict=True)):
            if calls:
                share = 1.0 if layer.momentum is None else 1.0 - (1.0 - layer.momentum) ** calls
                both = torch.cat(scratch[2 * i : 2 * i + 2]).to(sums[i].dtype)
                sums[i][:-1].add_(both, alpha=calls / share)
                sums[i][-1] += calls
    return sums


def _zeros(layer: _BatchNorm) -> Tensor:
    assert layer.running_mean is not None
    dtype = torch.float32 if layer.running_mean.device.type == "mps" else torch.float64
    return torch.zeros(2 * layer.num_features + 1, dtype=dtype, device=layer.running_mean.device)


def _counts(counters: list[Tensor]) -> list[int]:
    return [int(c) for c in torch.stack([c.to(counters[0].device) for c in counters]).tolist()]


def sum_over_processes(sums: list[Tensor]) -> list[Tensor]:
    """Add up the sums of all processes; a collective call."""
    flat = torch.cat(sums)
    torch.distributed.all_reduce(flat)
    return list(flat.split([len(s) for s in sums]))


def means(layers: list[_BatchNorm], sums: list[Tensor]) -> Mapping[int, Tensor]:
    """Estimated buffers by the id of the layer's buffer; layers without a call are left out."""
    found: dict[int, Tensor] = {}
    for layer, total in zip(layers, sums, strict=True):
        if total[-1] > 0:
            mean, var = (total[:-1] / total[-1]).split(layer.num_features)
            found[id(layer.running_mean)], found[id(layer.running_var)] = mean, var
    return found
