"""The optimizers that a decoder can be trained with, each one torch Optimizer that a CUDA graph can hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from lit_cli.errors import InputError
from lit_patchnerf.models.blocks import UpStage
from lit_patchnerf.muon import MuonAdamW, Scale

__all__ = ["ADAMW_PARTS", "Adan", "Name", "make_optimizer", "muon_takes", "shuffle_phases"]

Name = Literal["adam", "adamw", "adan", "muon"]

BETAS: dict[str, tuple[float, ...]] = {
    "adam": (0.9, 0.999),
    "adamw": (0.9, 0.999),
    "adan": (0.98, 0.92, 0.99),
    "muon": (0.9, 0.95),
}
# Layers behind an encoding or learned latents, those latents, what modulates, and the heads.
ADAMW_PARTS = ("hidden", "stem", "time", "latents", "film", "atlases", "rgb", "clip")
# Muon's rate where none is given, in units of `lr`. Its `rms` scale was made for AdamW's own rate.
MUON_RATES: dict[str, float] = {"rms": 1.0, "spectral": 20.0}


class Adan(Optimizer):
    """Adaptive Nesterov momentum, from three moments of the gradient and of its change.

    All parameters are updated by a few multi-tensor kernels. Steps are counted on the device, the host reads nothing,
    and a state of zeros is the state before the first step. Parameters that have had gradients in the same steps share
    a counter.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate; a tensor on the device if a CUDA graph is to read it.
        betas: What the means of the gradient, of its change and of the square keep; the paper writes 1 - beta.
        eps: Added to the denominator.
        weight_decay: Decoupled: after the update the weights are divided by 1 + lr * weight_decay.
        capturable: The step may be captured, after one step outside.

    Source:
        Xie et al., Adan (arXiv 2208.06677), Algorithm 1 without the restart, with the bias corrections of the
        authors' implementation: no change of the gradient is known in the first step.

    Example:
        >>> weight = nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = Adan([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> round(weight.item(), 4)
        0.9
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        capturable: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "capturable": capturable}
        super().__init__(params, defaults)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state; counters of equal value become one again."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            counters: dict[float, Tensor] = {}
            for p in group["params"]:
                if self.state[p]:
                    step = self.state[p]["step"].to(p.device)
                    self.state[p]["step"] = counters.setdefault(float(step), step)

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
        for group in self.param_groups:
            for step, parameters in self._together(group["params"]):
                self._update(group, step, parameters)
        return loss

    def _together(self, parameters: list[nn.Parameter]) -> list[tuple[Tensor, list[nn.Parameter]]]:
        """The parameters with gradients, by their counters."""
        counts: dict[int, int] = {}
        found: dict[int, list[nn.Parameter]] = {}
        fresh: Tensor | None = None
        for p in parameters:
            if p.grad is not None and not self.state[p]:
                fresh = torch.zeros((), device=p.device) if fresh is None else fresh
                state = {name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in _MOMENTS}
                self.state[p].update(state, step=fresh)
            step = self.state[p].get("step") if p in self.state else None
            if step is not None:
                counts[id(step)] = counts.get(id(step), 0) + 1
                if p.grad is not None:
                    found.setdefault(id(step), []).append(p)
        together: list[tuple[Tensor, list[nn.Parameter]]] = []
        for key, members in found.items():
            step = self.state[members[0]]["step"]
            if len(members) < counts[key]:  # the others have no gradient now: from here on they are counted apart
                step = step.clone()
                for p in members:
                    self.state[p]["step"] = step
            together.append((step, members))
        return together

    def _update(self, group: dict[str, Any], step: Tensor, members: list[nn.Parameter]) -> None:
        beta1, beta2, beta3 = group["betas"]
        parameters: list[Tensor] = list(members)
        gradients = [p.grad for p in members if p.grad is not None]
        means, changes, squares, before = ([self.state[p][name] for p in members] for name in _MOMENTS)
        step.add_(1)
        # 1 - beta^t, without the cancellation of fp32 in the first steps
        correct1, correct2, correct3 = (-torch.expm1(step.double() * math.log(b)) for b in (beta1, beta2, beta3))
        rate = (group["lr"] / correct1).float()
        rate_of_change = (group["lr"] * beta2 / correct2).float()

        difference = torch._foreach_sub(gradients, before)
        torch._foreach_mul_(difference, (step > 1).float())
        torch._foreach_copy_(before, gradients)
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_lerp_(changes, difference, 1 - beta2)
        torch._foreach_mul_(difference, beta2)
        torch._foreach_add_(difference, gradients)
        torch._foreach_mul_(squares, beta3)
        torch._foreach_addcmul_(squares, difference, difference, 1 - beta3)

        denominator = torch._foreach_sqrt(squares)
        torch._foreach_mul_(denominator, correct3.rsqrt().float())
        torch._foreach_add_(denominator, group["eps"])
        update = torch._foreach_mul(means, rate)
        torch._foreach_add_(update, torch._foreach_mul(changes, rate_of_change))
        torch._foreach_div_(update, denominator)
        torch._foreach_sub_(parameters, update)
        if group["weight_decay"]:
            torch._foreach_div_(parameters, 1 + group["lr"] * group["weight_decay"])


_MOMENTS = ("exp_avg", "exp_avg_diff", "exp_avg_sq", "pre_grad")


def muon_takes(name: str, parameter: Tensor, adamw_parts: Sequence[str] = ADAMW_PARTS) -> bool:
    """Whether a parameter is a matrix inside the network: two or more inputs and outputs, in none of the parts named.

    A depth-wise kernel is none: its channels do not mix. Biases, norms and scales have one dimension.

    Args:
        name: As of `named_parameters`, with any prefix.
        parameter: Looked at for its shape.
        adamw_parts: Names of modules, at any depth.

    Example:
        >>> muon_takes("net.stages.0.conv.weight", torch.zeros(8, 4, 3, 3)), muon_takes("rgb.conv.weight", torch.eye(3))
        (True, False)
    """
    if parameter.ndim < 2 or min(parameter.shape[:2]) < 2:
        return False
    return not set(name.split(".")) & set(adamw_parts)


def shuffle_phases(module: nn.Module) -> dict[str, int]:
    """Kernels in front of a pixel shuffle, by name, and its phases: every s * s-th output channel is of one phase.

    Args:
        module: A decoder, or what holds one.
    """
    stages = [(name, stage) for name, stage in module.named_modules() if isinstance(stage, UpStage)]
    return {f"{name}.conv.weight": stage.stride[0] * stage.stride[1] for name, stage in stages}


def _positive(values: Mapping[str, float | None]) -> None:
    for name, value in values.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise InputError(f"model.{name}: expected a number above 0, got {value}")


def make_optimizer(
    name: Name,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float = 0.0,
    betas: Sequence[float] | None = None,
    capturable: bool = False,
    fused: bool | None = None,
    clips: bool = False,
    muon_lr: float | None = None,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    muon_scale: Scale = "rms",
    adamw_parts: Sequence[str] = ADAMW_PARTS,
    phases: Mapping[str, int] | None = None,
) -> Optimizer:
    """One optimizer for a whole network.

    Schedulers multiply `initial_lr`, a plain number, so that with a rate on the device no step of theirs waits for it.

    Args:
        name: `adam` and `adamw` are torch's, `adan` and `muon` ours; with `muon`, AdamW has what `muon_takes` leaves.
        named_parameters: Of the network, on its device; frozen ones are left out.
        lr: Learning rate.
        weight_decay: Of matrices and kernels; latents, biases, norms and scales have none.
        betas: Of the moments, three for Adan; None for the authors' values. With `muon`: of AdamW.
        capturable: The step can be captured in a CUDA graph after a first one outside: rates are tensors on the device,
            which schedulers and a loaded state fill, and never replace.
        fused: Torch's one-kernel Adam and AdamW; None where the device has it.
        clips: Gradients are clipped, so fp16 gradients are to be unscaled before the step (see
            `lit_common.optim.fused_adamw`).
        muon_lr: Learning rate of Muon; None for `lr` with the scale `rms` and 20 `lr` with `spectral`.
        momentum: Of Muon.
        nesterov: Of Muon.
        ns_steps: Newton-Schulz iterations of Muon.
        muon_scale: As of `MuonAdamW`.
        adamw_parts: As of `muon_takes`.
        phases: Kernels, by name, whose pixel-shuffle phases Muon takes as matrices of their own (`shuffle_phases`).

    Raises:
        InputError: An unknown name, a number out of range, nothing to train, or not float32 for Muon.

    Example:
        >>> net = nn.ModuleDict({"stages": nn.Linear(4, 4), "rgb": nn.Linear(4, 3)})
        >>> optimizer = make_optimizer("muon", net.named_parameters(), lr=1e-3)
        >>> [(group["name"], len(group["params"])) for group in optimizer.param_groups]
        [('muon', 1), ('adamw', 3)]
    """
    if name not in BETAS:
        raise InputError(f"model.optimizer: expected one of {', '.join(BETAS)}, got {name}")
    _positive({"lr": lr, "optimizer_options.muon_lr": muon_lr, "optimizer_options.ns_steps": ns_steps})
    if not weight_decay >= 0:
        raise InputError(f"model.weight_decay: expected a number from 0, got {weight_decay}")
    if not 0 <= momentum < 1:
        raise InputError(f"model.optimizer_options.momentum: expected a number from 0 and below 1, got {momentum}")
    chosen = tuple(BETAS[name] if betas is None else betas)
    if len(chosen) != len(BETAS[name]) or not all(0 < b < 1 for b in chosen):
        raise InputError(
            f"model.optimizer_options.betas: expected {len(BETAS[name])} numbers between 0 and 1, got {list(chosen)}"
        )
    if muon_scale not in MUON_RATES:
        raise InputError(
            f"model.optimizer_options.muon_scale: expected one of {', '.join(MUON_RATES)}, got {muon_scale}"
        )
    named = [(key, p) for key, p in named_parameters if p.requires_grad]
    if not named:
        raise InputError("model: expected parameters to train, got none")

    groups: list[dict[str, Any]] = []
    rest = named
    if name == "muon":
        if wrong := [key for key, p in named if p.dtype != torch.float32]:
            raise InputError(f"model.optimizer: muon expected float32 parameters, got another dtype in {wrong[0]}")
        inside = [(key, p) for key, p in named if muon_takes(key, p, adamw_parts)]
        taken = {key for key, _ in inside}
        rest = [(key, p) for key, p in named if key not in taken]
        rate = MUON_RATES[muon_scale] * lr if muon_lr is None else muon_lr
        splits = [(phases or {}).get(key, 1) for key, _ in inside]
        for (key, p), split in zip(inside, splits, strict=True):
            if split < 1 or len(p) % split:
                raise InputError(
                    f"model.optimizer_options.phases: expected to divide the {len(p)} channels of {key}, got {split}"
                )
        groups.append({"params": [p for _, p in inside], "name": "muon", "muon": True, "lr": rate, "phases": splits})
    kind = "adamw" if name == "muon" else name
    decays = [bool(weight_decay) and p.ndim > 1 and not {"latents", "values"} & set(key.split(".")) for key, p in rest]
    pairs = list(zip(rest, decays, strict=True))
    groups.append({"params": [p for (_, p), d in pairs if d], "name": f"{kind}_decayed", "lr": lr})
    groups.append({"params": [p for (_, p), d in pairs if not d], "name": kind, "lr": lr, "weight_decay": 0.0})
    groups = [{**group, "initial_lr": group["lr"]} for group in groups if group["params"]]

    device = named[0][1].device
    if capturable:
        groups = [{**group, "lr": torch.tensor(float(group["lr"]), device=device)} for group in groups]
    optimizer: Optimizer
    if name == "muon":
        optimizer = MuonAdamW(
            groups,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            steps=int(ns_steps),
            scale=muon_scale,
            betas=(chosen[0], chosen[1]),
            capturable=capturable,
        )
    elif name == "adan":
        optimizer = Adan(
            groups, betas=(chosen[0], chosen[1], chosen[2]), weight_decay=weight_decay, capturable=capturable
        )
    else:
        if fused is None:
            fused = device.type in ("cuda", "cpu")
        maker = Adam if name == "adam" else AdamW
        on_cpu = device.type == "cpu"  # torch captures, and has the flag, on accelerators alone
        optimizer = maker(
            groups,
            betas=(chosen[0], chosen[1]),
            weight_decay=weight_decay,
            fused=fused,
            capturable=capturable and not on_cpu,
        )
        if clips and fused:
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    optimizer.register_load_state_dict_post_hook(_Own(optimizer))
    return optimizer


class _Own:
    """What an optimizer keeps when it loads a state: the tensors of its rates, and how it runs."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.options = [
            {name: group[name] for name in ("capturable", "fused", "launches") if name in group}
            for group in optimizer.param_groups
        ]

    def __call__(self, optimizer: Optimizer) -> None:
        for group, rate, options in zip(optimizer.param_groups, self.rates, self.options, strict=True):
            loaded = float(group["lr"])
            group["lr"] = rate.fill_(loaded) if isinstance(rate, Tensor) else loaded
            group["initial_lr"] = float(group["initial_lr"])
            group.update(options)
            on_device = options.get("capturable") or options.get("fused") or "fused" not in options
            for p in group["params"]:
                state = optimizer.state.get(p, {})
                if on_device and "step" in state:
                    state["step"] = state["step"].to(p.device)
