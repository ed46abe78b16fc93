"""A training step as two CUDA graphs: one launch forward, one launch backward.

HRNet launches thousands of small kernels a step and the host cannot feed a fast card with them. The graphs are captured
by hand instead of with `torch.cuda.make_graphed_callables` because that function hands every gradient back to autograd,
which clones each of them (about a thousand launches for HRNet-W32); here gradients are written once, where the
optimizer reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

__all__ = ["GraphedStep", "graphed_step"]


def graphed_step(module: LightningModule, step: Callable[..., Tensor], network: nn.Module) -> GraphedStep | None:
    """`GraphedStep` where graphs can be used; elsewhere None, and a line that says why.

    Args:
        module: On its device, with a Trainer; its hyperparameter `gradient_checkpointing` is asked for.
        step: As of `GraphedStep`.
        network: As of `GraphedStep`.
    """
    if module.device.type != "cuda":
        rank_zero_info(f"model.cuda_graph: ignored, the device is {module.device.type}")
        return None
    why = None
    if module.trainer.world_size > 1:
        why = "several devices train together"
    elif module.hparams["gradient_checkpointing"]:
        why = "gradient checkpointing reads the random state on the host"
    if why is not None:
        rank_zero_warn(f"model.cuda_graph: not used, {why}")
        return None
    return GraphedStep(step, network)


class GraphedStep:
    """Captures `step` on its first call and replays it afterwards.

    Args:
        step: Takes tensors of fixed shapes and returns a scalar loss; no host synchronisation inside.
        module: Owns the parameters that get gradients and the buffers that warm-up must not disturb.
        warmup: Eager runs before the capture (cuDNN's choices, lazily built handles, compilation).

    The returned loss works with `loss.backward()` under gradient accumulation, gradient clipping and a GradScaler.
    Hooks on parameters do not fire, so it serves one device, not DDP. Inputs of other shapes than the captured ones run
    eagerly.
    """

    def __init__(self, step: Callable[..., Tensor], module: nn.Module, warmup: int = 3) -> None:
        self._step = step
        self._module = module
        self._warmup = warmup
        self._captured = False

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The loss of one step, shape ()."""
        if not self._captured:
            self._capture(inputs)
        if any(a.shape != b.shape for a, b in zip(inputs, self._inputs, strict=True)):
            return self._step(*inputs)
        return _Replay.apply(self._anchor, self, *inputs)  # type: ignore[no-any-return]

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        self._parameters = [p for p in self._module.parameters() if p.requires_grad]
        self._inputs = [x.clone() for x in inputs]
        self._anchor = torch.zeros((), device=inputs[0].device, requires_grad=True)
        saved = [(b, b.clone()) for b in self._module.buffers()]
        rng = torch.cuda.get_rng_state(inputs[0].device)
        # Autocast's cache would hold casts of the weights made before the capture: replays would go on using those.
        cache = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        torch.clear_autocast_cache()
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(self._warmup):
                    loss = self._step(*self._inputs)
                    torch.autograd.grad(loss, self._parameters, allow_unused=True)
                    del loss
            torch.cuda.current_stream().wait_stream(stream)
            self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._forward, capture_error_mode="thread_local"):
                loss = self._step(*self._inputs)
            self._scale = torch.ones_like(loss)
            with torch.cuda.graph(self._backward, pool=self._forward.pool(), capture_error_mode="thread_local"):
                grads = torch.autograd.grad(loss, self._parameters, grad_outputs=self._scale, allow_unused=True)
                # As in a backward pass: fused optimizers refuse a gradient in another layout than its parameter.
                grads = [_laid_out_like(g, p) for g, p in zip(grads, self._parameters, strict=True)]
        finally:
            torch.set_autocast_cache_enabled(cache)
        self._loss = loss.detach()
        used = [(p, g.detach()) for p, g in zip(self._parameters, grads, strict=True) if g is not None]
        self._parameters, self._grads = [p for p, _ in used], [g for _, g in used]
        self._sums: list[Tensor] = []
        with torch.no_grad():
            for buffer, before in saved:
                buffer.copy_(before)
        torch.cuda.set_rng_state(rng, inputs[0].device)
        self._captured = True

    def _run_forward(self, inputs: Iterable[Tensor]) -> Tensor:
        if self._parameters[0].grad is self._grads[0]:
            self._keep_gradients()
        for own, new in zip(self._inputs, inputs, strict=True):
            own.copy_(new, non_blocking=True)
        self._forward.replay()
        return self._loss.clone()

    def _run_backward(self, scale: Tensor) -> None:
        """Replay the backward pass and add its gradients to `Parameter.grad`."""
        first = self._parameters[0].grad is None
        self._scale.copy_(scale)
        self._backward.replay()
        if first:
            for p, g in zip(self._parameters, self._grads, strict=True):
                p.grad = g
        else:
            torch._foreach_add_([p.grad for p in self._parameters], self._grads)  # type: ignore[arg-type]

    def _keep_gradients(self) -> None:
        """Move the gradients of an earlier micro-batch out of the graphs' memory.

        The two graphs share a pool: the backward pass put its gradients where activations had been, and the next
        forward pass writes its activations there again.
        """
        if not self._sums:
            self._sums = [torch.empty_like(g) for g in self._grads]
        torch._foreach_copy_(self._sums, self._grads)
        for p, total in zip(self._parameters, self._sums, strict=True):
            p.grad = total


def _laid_out_like(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    if gradient is None or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


class _Replay(torch.autograd.Function):
    """Stands in autograd's graph for the two captured ones; `anchor` is what makes `backward` be called."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, graphed: GraphedStep, *inputs: Tensor) -> Tensor:
        ctx.graphed = graphed
        return graphed._run_forward(inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        graphed: GraphedStep = ctx.graphed
        graphed._run_backward(grad_outputs[0])
        return (None, None, *[None] * len(graphed._inputs))
