"""The operations of a U-Net on channels-last maps, each in one pass and lean in memory, with their gradients.

Tensor cores want the channels of a voxel together. torch's instance normalisation gives a contiguous map back whatever
it gets, `cat` and the splitting of its gradient copy slowly in that layout, and cuDNN is slow for one input channel: so
the layout alone makes a U-Net slower. With these operations in between it is what makes it fast.

Normalised maps are not kept for the way back: a map that has left `instance_norm_act` knows how to be made again from
the convolution's output, which has to be kept anyway, and inside `remade` autograd keeps that recipe instead.

`usable` says where all this works: on a GPU with Triton, which comes with torch on Linux. Elsewhere the callers fall
back to torch's own operations, which compute the same.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_common.kernels import usable

__all__ = [
    "concatenate",
    "conv",
    "depthwise_branches",
    "instance_norm_act",
    "join",
    "lay_out",
    "logits",
    "remade",
    "upsample",
    "usable",
]

FEW = 4  # image channels up to which cuDNN is not used
MOST_CLASSES = 16
_HALF = (torch.float16, torch.bfloat16)


def lay_out(network: nn.Module, dims: int) -> nn.Module:
    """Put a network's weights channels last, and let its modules that know of it (`channels_last`) use all this."""
    network.to(memory_format=torch.channels_last_3d if dims == 3 else torch.channels_last)  # type: ignore[call-overload]
    for module in network.modules():
        if hasattr(module, "channels_last"):
            module.channels_last = True  # type: ignore[assignment]
    return network


def join(x: Tensor, up: nn.Module, skip: Tensor, *, channels_last: bool) -> Tensor:
    """Up-sample a map by a transposed convolution and put a skip behind it."""
    if not channels_last or not usable(x):
        return torch.cat((up(x), skip), dim=1)
    return concatenate(upsample(x, up), skip, up.bias)  # type: ignore[arg-type]


def _form(x: Tensor) -> torch.memory_format:
    return torch.channels_last_3d if x.ndim == 5 else torch.channels_last


def _laid_out(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=_form(x))


def _autocast_type(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


# ---- remaking -------------------------------------------------------------------------------------------------------


class _Remade:
    """What autograd keeps in place of a map."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self.make = make


def remade(x: Tensor) -> Any:
    """A context in which autograd keeps, in place of a map from `instance_norm_act`, the recipe to make it again.

    For operations that keep their input as it is, such as convolutions. Other maps are kept as ever.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return contextlib.nullcontext()
    recipe: _Remade | None = getattr(x, "_remade", None)
    if recipe is None:
        return contextlib.nullcontext()
    pointer, shape = x.data_ptr(), x.shape

    def pack(kept: Tensor) -> Tensor | _Remade:
        # x lives as long as this context, so nothing else can lie at its place.
        return recipe if kept.data_ptr() == pointer and kept.shape == shape else kept

    def unpack(kept: Tensor | _Remade) -> Tensor:
        return kept.make() if isinstance(kept, _Remade) else kept

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


# ---- operations -----------------------------------------------------------------------------------------------------


class _InstanceNormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, removed: Tensor | None, eps: float, slope: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        from lit_dsunet.models import kernels  # imports Triton

        y, mean, rstd = kernels.norm_forward(x, weight, bias, eps, slope)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.slope, ctx.removed = slope, None if removed is None else removed.shape
        ctx.mark_non_differentiable(mean, rstd)
        return y, mean, rstd

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> Any:  # type: ignore[override]
        from lit_dsunet.models import kernels

        x, weight, bias, mean, rstd = ctx.saved_tensors
        dx, d_weight, d_bias = kernels.norm_backward(x, _laid_out(dy), weight, bias, mean, rstd, ctx.slope)
        removed = None if ctx.removed is None else d_bias.new_zeros(ctx.removed)
        return dx, d_weight.to(weight.dtype), d_bias.to(bias.dtype), removed, None, None


def instance_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    slope: float = 0.01,
    removed: Tensor | None = None,
) -> Tensor:
    """Instance normalisation and leaky ReLU of a channels-last map.

    Args:
        x: (B, C, ...) float16, bfloat16 or float32 on a device that is `usable`.
        weight: (C,) of the normalisation.
        bias: (C,) of the normalisation.
        eps: Added to the variance.
        slope: Of the activation below 0; 1 leaves it out.
        removed: A bias (C,) that was left out before, because the normalisation takes it away: it gets its gradient,
            which is 0.

    Returns:
        The same shape, type and layout; the statistics are taken in float32. `remade` knows it.
    """
    from lit_dsunet.models import kernels

    x = _laid_out(x)
    y, mean, rstd = _InstanceNormAct.apply(x, weight, bias, removed, eps, slope)  # type: ignore[misc]
    if torch.is_grad_enabled() and y.requires_grad:
        x, weight, bias = x.detach(), weight.detach(), bias.detach()
        y._remade = _Remade(lambda: kernels.normalise(x, weight, bias, mean, rstd, slope))
    return y  # type: ignore[no-any-return]


class _FewChannelConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        from lit_dsunet.models import kernels

        ctx.save_for_backward(x)
        ctx.kernel, ctx.dtype = weight.shape[2:], weight.dtype
        return kernels.few_channel_conv(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        from lit_dsunet.models import kernels

        (x,) = ctx.saved_tensors
        return None, kernels.few_channel_weight(x, _laid_out(dy), ctx.kernel).to(ctx.dtype)


def conv(x: Tensor, layer: nn.Module) -> Tensor:
    """A convolution's output without its bias.

    Args:
        x: (B, C, ...); an image of few channels that wants no gradient takes a kernel of its own, in half precision.
        layer: Conv2d or Conv3d with equal padding on both sides.
    """
    weight, stride = layer.weight, layer.stride
    assert isinstance(weight, Tensor)
    assert isinstance(stride, tuple)
    dtype, few = _autocast_type(x), x.shape[1] <= FEW and math.prod(weight.shape[1:]) <= 128
    if few and not x.requires_grad and dtype in _HALF and max(stride) == 1:
        return _FewChannelConv.apply(_laid_out(x.to(dtype)), weight)  # type: ignore[no-any-return]
    function = F.conv3d if x.ndim == 5 else F.conv2d
    with remade(x):
        return function(x, weight, None, stride, layer.padding)  # type: ignore[arg-type]


class _Concatenate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        from lit_dsunet.models import kernels

        a, b = _laid_out(a), _laid_out(b)
        ctx.sizes, ctx.dtype = (a.shape, b.shape), None if bias is None else bias.dtype
        channels = a.shape[1] + b.shape[1]
        out = torch.empty((a.shape[0], channels, *a.shape[2:]), dtype=a.dtype, device=a.device, memory_format=_form(a))
        kernels.copy_rows(a, out, a.shape[1], bias=bias)
        kernels.copy_rows(b, out, b.shape[1], target_at=a.shape[1])
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        from lit_dsunet.models import kernels

        dy, (first, second) = _laid_out(dy), ctx.sizes
        da, db = (torch.empty(s, dtype=dy.dtype, device=dy.device, memory_format=_form(dy)) for s in (first, second))
        sums = kernels.copy_rows(dy, da, first[1], sums=ctx.dtype is not None)
        kernels.copy_rows(dy, db, second[1], source_at=first[1])
        return da, db, None if sums is None else sums.to(ctx.dtype)


def concatenate(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.cat((a + bias, b), dim=1)` of channels-last maps of one size.

    Args:
        a: (B, C, ...).
        b: (B, C', ...).
        bias: (C,) of the convolution that `a` comes from; added here it costs nothing.
    """
    return _Concatenate.apply(a, b.to(a.dtype), bias)  # type: ignore[no-any-return]


def upsample(x: Tensor, layer: nn.Module) -> Tensor:
    """A transposed convolution's output without its bias (see `concatenate`)."""
    weight, stride = layer.weight, layer.stride
    assert isinstance(weight, Tensor)
    function = F.conv_transpose3d if x.ndim == 5 else F.conv_transpose2d
    with remade(x):
        return function(x, weight, None, stride)  # type: ignore[arg-type]


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        from lit_dsunet.models import kernels

        ctx.save_for_backward(x, weight)
        ctx.bias = bias.dtype
        return kernels.logits(x, weight.flatten(1).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        from lit_dsunet.models import kernels

        x, weight = ctx.saved_tensors
        # A recipe in place of x gives it in its own layout again.
        dx, d_weight, d_bias = kernels.logits_backward(x, weight.flatten(1).to(x.dtype), dy.contiguous())
        return dx, d_weight.view_as(weight).to(weight.dtype), d_bias.to(ctx.bias)


def logits(x: Tensor, layer: nn.Module) -> Tensor:
    """A 1x1 convolution to classes, with planes that lie one behind the other, as softmax and losses want them.

    Args:
        x: (B, C, ...), channels last.
        layer: Conv2d or Conv3d of kernel 1 with bias.

    Returns:
        (B, K, ...) contiguous.
    """
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    dtype = _autocast_type(x)
    with remade(x):
        if x.dtype == dtype and dtype in _HALF and weight.shape[0] <= MOST_CLASSES:
            return _Logits.apply(_laid_out(x), weight, bias)  # type: ignore[no-any-return]
        return layer(x)  # type: ignore[no-any-return]


class _Branches(torch.autograd.Function):
    """Depth-wise convolutions of one map, each with mean and variance of what comes out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, whole_batch: bool, *weights: Tensor) -> tuple[Tensor, ...]:
        from lit_dsunet.models import mkdc_kernels as kernels

        ctx.save_for_backward(x, *weights)
        voxels = x.numel() // (x.shape[0] * x.shape[1])
        maps, known = [], []
        for weight in weights:
            u, means, squares = kernels.branch(x, weight.to(x.dtype), stats=True)
            maps.append(u)
            known += kernels.statistics(means, squares, voxels, whole_batch=whole_batch)
        ctx.mark_non_differentiable(*known)
        return *maps, *known

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # type: ignore[override]
        from lit_dsunet.models import mkdc_kernels as kernels

        x, *weights = ctx.saved_tensors
        du = [_laid_out(g) for g in gradients[: len(weights)]]
        dx: Tensor | None = None
        if ctx.needs_input_grad[0]:
            for g, weight in zip(du, weights, strict=True):
                dx = kernels.branch(g, weight.to(x.dtype), flip=True, add=dx)[0]
        dw = [kernels.branch_weight(x, g, w.shape[2:]).to(w.dtype) for g, w in zip(du, weights, strict=True)]
        return dx, None, *dw


class _Combined(torch.autograd.Function):
    """Normalisation, ReLU6, sum and shuffle of branches, from statistics that may follow from them."""

    @staticmethod
    def forward(
        ctx: Any,
        options: tuple[int, bool, bool],
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        *u: Tensor,
    ) -> Tensor:
        from lit_dsunet.models import mkdc_kernels as kernels

        ctx.save_for_backward(mean, rstd, weight, bias, *u)
        ctx.options = options
        return kernels.combine(u, (mean, rstd, weight, bias), options[0], residual)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        from lit_dsunet.models import mkdc_kernels as kernels

        mean, rstd, weight, bias, *u = ctx.saved_tensors
        groups, follows, whole_batch = ctx.options
        known = (mean, rstd, weight, bias)
        dy = _laid_out(dy)
        sums = kernels.combine_sums(u, dy, known, groups)  # (N, B, 2, C)
        d_bias, d_weight = sums.sum(1).unbind(1)
        voxels = dy.numel() // (dy.shape[0] * dy.shape[1])
        if not follows:
            means = torch.zeros_like(sums)
        elif whole_batch:
            means = (sums.sum(1, keepdim=True) / (voxels * len(dy))).expand_as(sums).contiguous()
        else:
            means = sums / voxels
        du = kernels.combine_backward(u, dy, known, means, groups)
        return None, None, None, d_weight, d_bias, dy if ctx.needs_input_grad[5] else None, *du


def depthwise_branches(x: Tensor, convs: Any, norms: Any, *, groups: int, residual: bool) -> Tensor:
    """`shuffle(sum_k ReLU6(norm_k(conv_k(x))))`, plus x, of a channels-last map: what `MKDC` computes.

    Args:
        x: (B, C, ...) on a device that is `usable`.
        convs: Depth-wise convolutions without bias, up to four.
        norms: As many BatchNorm or affine InstanceNorm layers, all of one kind; running statistics are kept as ever.
        groups: Of the channel shuffle.
        residual: Add x.
    """
    x = _laid_out(x.to(_autocast_type(x)))
    count = len(convs)
    whole_batch = isinstance(norms[0], nn.modules.batchnorm._BatchNorm)
    follows = not whole_batch or norms[0].training or norms[0].running_mean is None
    with remade(x):
        out = _Branches.apply(x, whole_batch, *(conv.weight for conv in convs))
    u, known = out[:count], out[count:]
    means, variances = list(known[0::2]), list(known[1::2])
    for i, norm in enumerate(norms):
        if not whole_batch or norm.running_mean is None:
            continue
        if norm.training:
            _update_running(norm, means[i][0], variances[i][0], x.numel() // x.shape[1])
        else:
            shape = means[i].shape
            means[i], variances[i] = norm.running_mean.expand(shape), norm.running_var.expand(shape)
    rstd = (torch.stack(variances) + norms[0].eps).rsqrt()
    weight, bias = torch.stack([norm.weight.float() for norm in norms]), torch.stack([n.bias.float() for n in norms])
    options = (groups, follows, whole_batch)
    return _Combined.apply(options, torch.stack(means), rstd, weight, bias, x if residual else None, *u)  # type: ignore[no-any-return]


@torch.no_grad()
def _update_running(norm: Any, mean: Tensor, variance: Tensor, count: int) -> None:
    """As BatchNorm does in training: the unbiased variance, and a count of batches."""
    norm.num_batches_tracked.add_(1)
    if norm.momentum is None:
        share = 1.0 / norm.num_batches_tracked.float()
    else:
        share = torch.full((), norm.momentum, device=mean.device)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
    norm.running_var.lerp_((variance * (count / max(1, count - 1))).to(norm.running_var.dtype), share)
