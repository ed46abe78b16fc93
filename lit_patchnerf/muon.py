"""Muon for the matrices inside a network and AdamW for the rest, in a few dozen kernels a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

__all__ = ["MuonAdamW", "Scale", "newton_schulz"]

Scale = Literal["rms", "spectral"]
Shape = tuple[int, int]

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# What the launches of one more batched iteration may cost in multiply-adds: about 20 kernels of 3 us on a large GPU,
# which does some 10^13 a second on matrices this small. A CPU launches nothing.
LAUNCHES_MACS = 5e8


def newton_schulz(x: Tensor, steps: int = 5) -> Tensor:
    """The orthogonal factor of matrices, nearly.

    Singular values of more than 1 % of the norm come to lie between 0.68 and 1.14 instead of at 1.

    Args:
        x: (B, m, n). Zero rows and columns stay zero and change nothing in the others.
        steps: Iterations of the quintic.

    Returns:
        (B, m, n) in the dtype of `x`.

    Source:
        Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    Example:
        >>> x = newton_schulz(torch.tensor([[[3.0, 0.0], [0.0, -2.0]]]))
        >>> [round(v, 1) for v in x.flatten().tolist()]
        [1.1, 0.0, 0.0, -0.7]
    """
    a, b, c = COEFFICIENTS
    transposed = x.shape[-2] > x.shape[-1]  # the products are then of the smaller side
    x = x.mT if transposed else x
    # The Frobenius norm bounds the largest singular value. Not smaller than tiny: a zero gradient gives a zero update.
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    x = x / norm.clamp(min=1e-12).to(x.dtype)
    for _ in range(steps):
        square = x @ x.mT
        square = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, square, x, beta=a)
    return x.mT if transposed else x


class _Matrix(NamedTuple):
    """Where a matrix lies in the flat buffer; its rows are `stride` apart."""

    start: int
    rows: int
    columns: int
    stride: int

    @property
    def shape(self) -> Shape:
        return min(self.rows, self.columns), max(self.rows, self.columns)

    def places(self, device: torch.device) -> Tensor:
        """(m, n) places of its entries, the shorter side first."""
        rows = self.start + self.stride * torch.arange(self.rows, device=device)
        places = rows[:, None] + torch.arange(self.columns, device=device)
        return places.T if self.rows > self.columns else places


def batches(shapes: Iterable[Shape], launches: float, steps: int = 5) -> list[list[Shape]]:
    """Sort shapes of matrices into batches that are padded to a common size.

    Two batches become one while the zeros cost less than the launches that this saves.

    Args:
        shapes: (m, n) of each matrix, with m <= n.
        launches: Multiply-adds that a batch may waste.
        steps: Iterations.

    Example:
        >>> batches([(8, 64), (8, 72), (512, 512)], launches=1e7)
        [[(512, 512)], [(8, 64), (8, 72)]]
    """
    found: dict[Shape, list[Shape]] = {}
    for shape in shapes:
        found.setdefault(shape, []).append(shape)

    def work(members: list[Shape]) -> int:
        m, n = (max(sizes) for sizes in zip(*members, strict=True))
        return steps * len(members) * (2 * m * m * n + m**3)

    groups = list(found.values())
    while len(groups) > 1:
        pairs = ((work(x + y) - work(x) - work(y), i, j) for (i, x), (j, y) in combinations(enumerate(groups), 2))
        waste, i, j = min(pairs)
        if waste >= launches:
            break
        groups.append(groups[i] + groups.pop(j))
        groups.pop(i)
    return groups


class _Batch:
    """Matrices that are orthogonalised together: all of one shape, or gathered into one with zeros around them.

    Args:
        matrices: They fill the flat buffer between `start` and `stop`.
        start: Where they begin.
        stop: Where they end.
        zero: A place of the flat buffer that holds 0.
        scale: Of each matrix' update.
        device: Of the flat buffer.
    """

    def __init__(
        self,
        matrices: list[_Matrix],
        start: int,
        stop: int,
        zero: int,
        scale: Callable[[int, int], float],
        device: torch.device,
    ) -> None:
        self.start, self.stop = start, stop
        scales = [scale(m.rows, m.columns) for m in matrices]
        self.scales = torch.tensor(scales, device=device)[:, None, None]
        first = matrices[0]
        self.shape = (len(matrices), first.rows, first.columns)
        self.index: Tensor | None = None
        if all(m[1:] == first[1:] and m.stride == m.columns for m in matrices):
            return  # one after the other already
        rows, columns = (max(sizes) for sizes in zip(*(m.shape for m in matrices), strict=True))
        self.shape = (len(matrices), rows, columns)
        index = torch.full(self.shape, zero, dtype=torch.int32, device=device)
        for i, matrix in enumerate(matrices):
            m, n = matrix.shape
            index[i, :m, :n] = matrix.places(device).int()
        self.index = index.flatten()
        filled = (self.index != zero).nonzero().squeeze(1)
        self.inverse = torch.empty(stop - start, dtype=torch.int32, device=device)
        self.inverse[self.index[filled].long() - start] = filled.int()

    def orthogonalise(self, flat: Tensor, steps: int) -> Tensor:
        """The updates of the matrices in `flat`, in fp32 and its order."""
        if self.index is None:
            x = newton_schulz(flat[self.start : self.stop].view(self.shape), steps)
            return (x * self.scales).flatten()
        x = newton_schulz(flat.index_select(0, self.index).view(self.shape), steps) * self.scales
        return x.flatten().index_select(0, self.inverse)


class _Plan:
    """The flat buffer of a set of parameters and the batches of their matrices.

    Each parameter has a view in its own memory layout. The rows of its matrix are the output channels; in a
    channels-last kernel the columns come in another order, which the orthogonal factor follows.
    """

    def __init__(self, parameters: Sequence[Tensor], phases: Sequence[int], scale: Scale, launches: float) -> None:
        device = parameters[0].device
        shapes = [_shape(p, f) for p, f in zip(parameters, phases, strict=True)]
        total = sum(p.numel() for p in parameters)
        self.flat = torch.zeros(total + 1, device=device)  # the last one stays 0
        self.batches: list[_Batch] = []
        places: dict[int, Tensor] = {}
        start = 0
        for members in batches([shape for shape, f in zip(shapes, phases, strict=True) for _ in range(f)], launches):
            matrices, stop = [], start
            for i, (parameter, split) in enumerate(zip(parameters, phases, strict=True)):
                if shapes[i] not in members:
                    continue
                rows, columns = len(parameter) // split, parameter.numel() // len(parameter)
                matrices += [_Matrix(stop + k * columns, rows, columns, split * columns) for k in range(split)]
                places[i] = self.flat.as_strided(parameter.shape, _strides(parameter), stop)
                stop += parameter.numel()
            self.batches.append(_Batch(matrices, start, stop, total, _scale_of(scale), device))
            start = stop
        self.views = [places[i] for i in range(len(parameters))]

    def orthogonalise(self, steps: int) -> None:
        """Replace what the views hold by its orthogonal factor, scaled."""
        values = self.flat.bfloat16() if self.flat.is_cuda else self.flat
        # Manual optimisation calls this under autocast, which would choose the dtype by itself.
        with torch.autocast(self.flat.device.type, enabled=False):
            found = [batch.orthogonalise(values, steps) for batch in self.batches]
        torch.cat(found, out=self.flat[:-1])


def _shape(parameter: Tensor, phases: int) -> Shape:
    rows, columns = len(parameter) // phases, parameter.numel() // len(parameter)
    return min(rows, columns), max(rows, columns)


def _strides(parameter: Tensor) -> tuple[int, ...]:
    dense = parameter.is_contiguous() or parameter.is_contiguous(memory_format=torch.channels_last)
    return parameter.stride() if dense else torch.empty(parameter.shape, device="meta").stride()


def _scale_of(scale: Scale) -> Callable[[int, int], float]:
    if scale == "rms":
        return lambda rows, columns: 0.2 * math.sqrt(max(rows, columns))
    return lambda rows, columns: math.sqrt(max(1.0, rows / columns))


class MuonAdamW(Optimizer):
    """Muon on the parameter groups with `muon: True`, AdamW on the others.

    A kernel (out, in, k, k) is the matrix (out, in * k * k). Matrices of similar shapes are padded with zeros and
    iterated on as one batch, in bfloat16 on CUDA and in float32 elsewhere; AdamW is torch's fused one. A network of
    twenty matrices takes under 100 kernels instead of 25 for each matrix. The host reads nothing from the device and
    counts no steps, so that a CUDA graph can hold the step; for that `lr` has to be a tensor on the device and the
    option `capturable` true, and one step has to be taken before the capture.

    timm's Muon has the same rule, but goes through the matrices one by one, and falls back to NAdamW with Nesterov
    momentum.

    Args:
        params: Parameter groups of float32 tensors. A Muon group has tensors of two or more dimensions, and may have a
            list `phases`: for each, into how many interleaved sets of output channels it is split, s * s for the
            phases of a pixel shuffle by s.
        lr: Learning rate of the groups that have none.
        weight_decay: Decoupled, relative to the rate.
        momentum: Of Muon.
        nesterov: Look ahead by one step of the momentum.
        steps: Newton-Schulz iterations.
        scale: `rms`: updates as large as AdamW's, 0.2 * sqrt(max(out, in)); `spectral`: sqrt(max(1, out / in)).
        betas: Of AdamW.
        eps: Of AdamW.
        capturable: The step may be captured.
        launches: As of `batches`; None for a number that suits the device.

    Source:
        Jordan et al. 2024 (kellerjordan.github.io/posts/muon); `rms` from Moonlight (arXiv 2502.16982).

    Example:
        >>> weight = nn.Parameter(torch.eye(2))
        >>> optimizer = MuonAdamW([{"params": [weight], "muon": True, "lr": 0.1}])
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> bool((weight.detach().diag() < 1).all())
        True
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        steps: int = 5,
        scale: Scale = "rms",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        capturable: bool = False,
        launches: float | None = None,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov, "steps": steps}
        defaults |= {"scale": scale, "betas": betas, "eps": eps, "capturable": capturable, "launches": launches}
        self._plans: dict[Any, _Plan] = {}
        super().__init__(params, defaults | {"muon": False, "phases": None})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Keep the buffers when a state is loaded: a graph may have captured them."""
        super().__setstate__(state)
        self.__dict__.setdefault("_plans", {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step.

        Args:
            closure: Computes the loss and the gradients anew.
        """
        self._accelerator_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            listed = [(i, p) for i, p in enumerate(group["params"]) if p.grad is not None]
            if listed and group["muon"]:
                self._muon(number, group, listed)
            elif listed:
                self._adamw(group, [p for _, p in listed])
        return loss

    def _plan(self, number: int, group: dict[str, Any], listed: list[tuple[int, nn.Parameter]]) -> _Plan:
        key = (number, *((i, p.stride(), p.device) for i, p in listed))
        if key not in self._plans:
            launches = group["launches"]
            if launches is None:
                launches = LAUNCHES_MACS if listed[0][1].is_cuda else 0.0
            phases = group["phases"] or [1] * len(group["params"])
            self._plans[key] = _Plan([p for _, p in listed], [phases[i] for i, _ in listed], group["scale"], launches)
        return self._plans[key]

    def _muon(self, number: int, group: dict[str, Any], listed: list[tuple[int, nn.Parameter]]) -> None:
        plan = self._plan(number, group, listed)
        parameters: list[Tensor] = [p for _, p in listed]
        gradients = [p.grad for _, p in listed if p.grad is not None]
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        lr, momentum = group["lr"], group["momentum"]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        if group["nesterov"]:
            torch._foreach_copy_(plan.views, gradients)
            torch._foreach_lerp_(plan.views, buffers, momentum)
        else:
            torch._foreach_copy_(plan.views, buffers)
        plan.orthogonalise(group["steps"])
        plan.flat.mul_(lr)
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_sub_(parameters, plan.views)

    def _adamw(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        for p in parameters:
            if not self.state[p]:
                state = {name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in _MOMENTS}
                self.state[p].update(state, step=torch.zeros((), device=p.device))
        states = [self.state[p] for p in parameters]
        fused = parameters[0].device.type in ("cuda", "cpu")
        adamw(
            list(parameters),
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=fused,
            foreach=None if fused else True,
            capturable=group["capturable"] and parameters[0].is_cuda,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


_MOMENTS = ("exp_avg", "exp_avg_sq")
