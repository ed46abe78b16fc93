"""Training with CUDA graphs: one launch forward, one launch backward.

Networks of many small kernels leave a fast card waiting for the host. The graphs are captured by hand instead of with
`torch.cuda.make_graphed_callables` because that function hands every gradient back to autograd, which clones each of
them (about a thousand launches for HRNet-W32); here gradients are written once, where the optimizer reads. It also
knows one shape only, and graphs that do not share their memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

__all__ = ["GraphedCall", "GraphedStep", "graphed_step", "graphs_allowed"]

Outputs = tuple[Tensor, ...]


def graphs_allowed(module: LightningModule) -> bool:
    """Whether graphs can be used; a line says why where they cannot.

    Args:
        module: On its device, with a Trainer; its hyperparameter `gradient_checkpointing` is asked for.
    """
    if module.device.type != "cuda":
        rank_zero_info(f"model.cuda_graph: ignored, the device is {module.device.type}")
        return False
    why = None
    if module.trainer.world_size > 1:
        why = "several devices train together"
    elif module.hparams["gradient_checkpointing"]:
        why = "gradient checkpointing reads the random state on the host"
    if why is not None:
        rank_zero_warn(f"model.cuda_graph: not used, {why}")
    return why is None


def graphed_step(module: LightningModule, step: Callable[..., Tensor], network: nn.Module) -> GraphedStep | None:
    """`GraphedStep` where graphs can be used, else None.

    Args:
        module: As of `graphs_allowed`.
        step: As of `GraphedStep`.
        network: As of `GraphedStep`.
    """
    return GraphedStep(step, network) if graphs_allowed(module) else None


class GraphedCall:
    """Captures a function for each shape of its inputs, on its first call, and replays it afterwards.

    Args:
        function: Takes tensors, and plain values by keyword, and returns tensors. No host synchronisation inside. Its
            random numbers come from the default generator, whose seed counts at every replay.
        module: Owns the parameters that get gradients and the buffers that warm-up must not disturb.
        warmup: Eager runs before a capture (cuDNN's choices, lazily built handles, compilation).
        most: Captures at most; inputs of further shapes run eagerly.

    Outputs stay valid until the next call. `backward` works with gradient accumulation, gradient clipping and a
    GradScaler, and is to run before the next call. Hooks on parameters do not fire, so it serves one device, not DDP.
    Captures share their memory, as only one of them is in use at a time.
    """

    def __init__(
        self, function: Callable[..., Tensor | Outputs], module: nn.Module, warmup: int = 3, most: int = 16
    ) -> None:
        self._function, self._module = function, module
        self._warmup, self._most = warmup, most
        self._captures: dict[Hashable, _Capture] = {}
        self._gradients: dict[nn.Parameter, Tensor] = {}  # in the graphs' memory, written by every replay
        self._sums: dict[nn.Parameter, Tensor] = {}  # outside of it, while gradients accumulate

    def __call__(self, *inputs: Tensor, **options: Hashable) -> Outputs:
        """What the function returns, as a tuple.

        Args:
            inputs: Of any shapes; gradients do not flow to them.
            options: Plain values, captured as part of the function.
        """
        key = (tuple(options.items()), tuple((x.shape, x.dtype) for x in inputs))
        capture = self._captures.get(key)
        if capture is None:
            if len(self._captures) >= self._most:
                return _as_tuple(self._function(*inputs, **options))
            capture = self._captures[key] = self._capture(inputs, options)
        return _Replay.apply(capture.anchor, self, capture, *inputs)  # type: ignore[no-any-return]

    def _capture(self, inputs: Sequence[Tensor], options: dict[str, Any]) -> _Capture:
        self._keep_gradients()
        device = inputs[0].device
        parameters = [p for p in self._module.parameters() if p.requires_grad]
        own = [x.clone() for x in inputs]
        saved = [(b, b.clone()) for b in self._module.buffers()]
        rng = torch.cuda.get_rng_state(device)
        # Autocast's cache would hold casts of the weights made before the capture: replays would go on using those.
        cache = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        torch.clear_autocast_cache()
        pool = next((c.forward.pool() for c in self._captures.values()), None)
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(self._warmup):
                    outputs = _as_tuple(self._function(*own, **options))
                    losses = [x for x in outputs if x.requires_grad]
                    torch.autograd.grad(losses, parameters, [torch.ones_like(x) for x in losses], allow_unused=True)
                    del outputs, losses
            torch.cuda.current_stream().wait_stream(stream)
            forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(forward, pool=pool, capture_error_mode="thread_local"):
                outputs = _as_tuple(self._function(*own, **options))
            losses = [x for x in outputs if x.requires_grad]
            scales = [torch.ones_like(x) for x in losses]
            with torch.cuda.graph(backward, pool=forward.pool(), capture_error_mode="thread_local"):
                found = torch.autograd.grad(losses, parameters, scales, allow_unused=True)
                used = [(p, g.detach()) for p, g in zip(parameters, found, strict=True) if g is not None]
                for parameter, gradient in used:
                    if parameter in self._gradients:  # of an earlier capture
                        self._gradients[parameter].copy_(gradient)
                    else:
                        # As in a backward pass: fused optimizers refuse another layout than the parameter's.
                        self._gradients[parameter] = _laid_out_like(gradient, parameter)
                del found
        finally:
            torch.set_autocast_cache_enabled(cache)
        with torch.no_grad():
            for buffer, before in saved:
                buffer.copy_(before)
        torch.cuda.set_rng_state(rng, device)
        return _Capture(forward, backward, own, outputs, scales, [p for p, _ in used])

    def _run_forward(self, capture: _Capture, inputs: Sequence[Tensor]) -> None:
        self._keep_gradients()
        for own, new in zip(capture.inputs, inputs, strict=True):
            own.copy_(new, non_blocking=True)
        capture.forward.replay()

    def _run_backward(self, capture: _Capture, scales: Sequence[Tensor | None]) -> None:
        """Replay the backward pass and add its gradients to `Parameter.grad`."""
        for own, new in zip(capture.scales, scales, strict=True):
            if new is None:
                own.zero_()
            else:
                own.copy_(new)
        capture.backward.replay()
        sums: list[Tensor] = []
        more: list[Tensor] = []
        for parameter in capture.parameters:
            gradient = self._gradients[parameter]
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                sums.append(parameter.grad)
                more.append(gradient)
        if sums:
            torch._foreach_add_(sums, more)

    def _keep_gradients(self) -> None:
        """Move the gradients of an earlier micro-batch out of the graphs' memory.

        A capture's two graphs share it: the backward pass put its gradients where activations had been, and the next
        forward pass writes its activations there again.
        """
        kept = [p for p, g in self._gradients.items() if p.grad is g]
        if not kept:
            return
        for parameter in kept:
            if parameter not in self._sums:
                self._sums[parameter] = torch.empty_like(self._gradients[parameter])
        totals = [self._sums[p] for p in kept]
        torch._foreach_copy_(totals, [self._gradients[p] for p in kept])
        for parameter, total in zip(kept, totals, strict=True):
            parameter.grad = total


class GraphedStep:
    """`GraphedCall` of a function that returns a loss, for one shape of inputs; others run eagerly.

    Args:
        step: Takes tensors of fixed shapes and returns a scalar loss; no host synchronisation inside.
        module: As of `GraphedCall`.
        warmup: As of `GraphedCall`.
    """

    def __init__(self, step: Callable[..., Tensor], module: nn.Module, warmup: int = 3) -> None:
        self._call = GraphedCall(step, module, warmup, most=1)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The loss of one step, shape ()."""
        # A copy: it may be looked at after the next step.
        return self._call(*inputs)[0].clone()


class _Capture:
    """Two graphs and the tensors that they read and write."""

    def __init__(
        self,
        forward: torch.cuda.CUDAGraph,
        backward: torch.cuda.CUDAGraph,
        inputs: list[Tensor],
        outputs: Outputs,
        scales: list[Tensor],
        parameters: list[nn.Parameter],
    ) -> None:
        self.forward, self.backward = forward, backward
        self.inputs, self.scales, self.parameters = inputs, scales, parameters
        self.differentiable = [x.requires_grad for x in outputs]
        self.outputs = [x.detach() for x in outputs]
        self.anchor = torch.zeros((), device=inputs[0].device, requires_grad=True)


def _as_tuple(outputs: Tensor | Outputs) -> Outputs:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _laid_out_like(gradient: Tensor, parameter: Tensor) -> Tensor:
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


class _Replay(torch.autograd.Function):
    """Stands in autograd's graph for the two captured ones; `anchor` is what makes `backward` be called."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, graphed: GraphedCall, capture: _Capture, *inputs: Tensor) -> Outputs:
        ctx.graphed, ctx.capture = graphed, capture
        ctx.set_materialize_grads(False)
        graphed._run_forward(capture, inputs)
        outputs = tuple(x.detach() for x in capture.outputs)  # no copies
        pairs = zip(outputs, capture.differentiable, strict=True)
        ctx.mark_non_differentiable(*(x for x, differentiable in pairs if not differentiable))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Any:
        capture: _Capture = ctx.capture
        scales = [g for g, differentiable in zip(grad_outputs, capture.differentiable, strict=True) if differentiable]
        ctx.graphed._run_backward(capture, scales)
        return (None, None, None, *[None] * len(capture.inputs))
