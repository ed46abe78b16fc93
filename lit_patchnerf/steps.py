"""Several optimizer steps from one batch, on a GPU as one CUDA graph.

A step of a small network takes a card about a millisecond, less than a Trainer needs to come round to the next one.
Here a batch holds the samples of K steps; forward pass, loss, backward pass, clipping and optimizer of all of them are
captured once and replayed, so that a batch costs the host one launch.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["OptimizerSteps", "interrupts_wait"]

MOST = 4  # graphs: an epoch has full batches and a last one
WARMUP = 3  # eager steps before a capture: cuDNN's choices, compilation, the optimizer's state


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    rates: Tensor
    means: Tensor


@contextmanager
def interrupts_wait(wanted: bool = True) -> Iterator[None]:
    """Let Ctrl-C wait until the end of a block that belongs together.

    Only where it would raise `KeyboardInterrupt`: other handlers of the signal, and other threads, are left alone. A
    second one does not wait.

    Args:
        wanted: Whether it does.
    """
    raises = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not wanted or not raises or threading.current_thread() is not threading.main_thread():
        yield
        return
    came = False

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt


class OptimizerSteps:
    """Takes K steps.

    Args:
        terms: From the k-th part of each input to (T,) float32, of which the first is minimised. It sees no host value,
            enters autocast itself and waits for nothing.
        optimizer: For a capture it is `capturable`, and the learning rates of its groups are tensors on the device.
        parameters: What it changes.
        clip: Largest norm of the gradient; None for no limit.
        capture: Replay a CUDA graph, one for each number of steps. Beyond `MOST` of them steps run eagerly.
    """

    def __init__(
        self,
        terms: Callable[..., Tensor],
        optimizer: Optimizer,
        parameters: Sequence[nn.Parameter],
        *,
        clip: float | None = None,
        capture: bool = False,
    ) -> None:
        self._terms, self._optimizer, self._parameters = terms, optimizer, list(parameters)
        self._clip, self._wanted = clip, capture
        self._graphs: dict[tuple[torch.Size, ...], _Graph] = {}

    def __call__(self, *inputs: Tensor, factors: Sequence[float]) -> Tensor:
        """Take the steps.

        Args:
            inputs: (K, ...) each.
            factors: K factors on the groups' `initial_lr`.

        Returns:
            (T,) means of the terms over the steps, valid until the next call.

        Whatever exception ends eager steps early, weights and optimizer are as before the call.
        """
        rates = [[float(group["initial_lr"]) * f for group in self._optimizer.param_groups] for f in factors]
        shapes = tuple(x.shape for x in inputs)
        if not self._wanted or (shapes not in self._graphs and len(self._graphs) == MOST):
            return self._all_or_none(inputs, rates)
        if shapes not in self._graphs:
            self._graphs[shapes] = self._capture(inputs, rates)
        graph = self._graphs[shapes]
        for own, new in zip(graph.inputs, inputs, strict=True):
            own.copy_(new, non_blocking=True)
        graph.rates.copy_(torch.tensor(rates), non_blocking=True)
        # Nobody calls the optimizer's step, so whoever listens for it is told here: before it, a copy of the weights to
        # the host may have to end, and after it, it is counted.
        for hook in self._optimizer._optimizer_step_pre_hooks.values():
            hook(self._optimizer, (), {})
        graph.graph.replay()
        for hook in self._optimizer._optimizer_step_post_hooks.values():
            hook(self._optimizer, (), {})
        return graph.means

    def forget(self) -> None:
        """Capture anew at the next call: the terms have become others."""
        self._graphs = {}

    def _all_or_none(self, inputs: Sequence[Tensor], rates: Sequence[Sequence[float]]) -> Tensor:
        """Eager steps; an exception among them takes all back, since the Trainer counts whole batches."""
        kept = self._save()
        try:
            return self._run(inputs, rates)
        except BaseException:
            self._restore(kept)
            raise

    def _run(self, inputs: Sequence[Tensor], rates: Sequence[Sequence[float]] | Tensor) -> Tensor:
        total: Tensor | None = None
        for k in range(len(rates)):
            for group, rate in zip(self._optimizer.param_groups, rates[k], strict=True):
                if isinstance(group["lr"], Tensor):
                    group["lr"].copy_(rate) if isinstance(rate, Tensor) else group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
            terms = self._terms(*(x[k] for x in inputs))
            self._optimizer.zero_grad(set_to_none=True)
            with torch.autocast(terms.device.type, enabled=False):
                terms[0].backward()
                if self._clip is not None:
                    nn.utils.clip_grad_norm_(self._parameters, self._clip, foreach=True)
                self._optimizer.step()
            torch.clear_autocast_cache()  # it holds casts of the weights as they were
            total = terms.detach() if total is None else total + terms.detach()
        assert total is not None
        return total / len(rates)

    def _capture(self, inputs: Sequence[Tensor], rates: Sequence[Sequence[float]]) -> _Graph:
        device = inputs[0].device
        own = [x.clone() for x in inputs]
        own_rates = torch.tensor(rates, device=device)
        rng = torch.cuda.get_rng_state(device)
        cache = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # replays would go on using casts made before
        torch.clear_autocast_cache()
        try:
            kept = self._save()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARMUP):
                    self._run([x[:1] for x in own], own_rates[:1])
            torch.cuda.current_stream().wait_stream(stream)
            self._restore(kept)
            del kept
            self._optimizer.zero_grad(set_to_none=True)
            graph = torch.cuda.CUDAGraph()
            pool = next((g.graph.pool() for g in self._graphs.values()), None)
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                means = self._run(own, own_rates)
        finally:
            torch.set_autocast_cache_enabled(cache)
        torch.cuda.set_rng_state(rng, device)
        return _Graph(graph, own, own_rates, means)

    def _save(self) -> tuple[list[Tensor], dict[Tensor, dict[str, Tensor]]]:
        state = {
            p: {name: x.clone() for name, x in own.items() if isinstance(x, Tensor)}
            for p, own in self._optimizer.state.items()
        }
        return [p.detach().clone() for p in self._parameters], state

    def _restore(self, kept: tuple[list[Tensor], dict[Tensor, dict[str, Tensor]]]) -> None:
        """As it was, in the same memory; an optimizer that had no state gets zeros, its beginning."""
        weights, state = kept
        with torch.no_grad():
            for parameter, before in zip(self._parameters, weights, strict=True):
                parameter.copy_(before)
            for parameter, own in self._optimizer.state.items():
                for name, x in own.items():
                    if isinstance(x, Tensor):
                        before = state.get(parameter, {}).get(name)
                        x.zero_() if before is None else x.copy_(before)
