"""Quantisation of weights and latents: min-max codes, for a stored network and within its training.

A tensor becomes codes from 0 to 2**bits - 1 with `value = minimum + scale * code`, the format of HNeRV's published
file. Minimum and scale are one pair for the tensor or one for each slice of it. Several layouts are tried: the whole
tensor, one axis kept (a pair for each output channel), one axis reduced. Among those whose pairs number less than a
share of the elements, 2 % by default, the one with the least squared error is taken. That is the best use of a
number of bits; where the codes are entropy-coded too, one pair for each tensor (a budget of 0) and a bit more can give
fewer bytes at an equal squared error. Both are worth a measurement on a network.

The pairs are float16 where that changes the error by less than 2 %, else float32; codes are made with the rounded
pair, so that the rounding of the pair is not added to that of the codes.

Quantisation-aware training computes with `fake_quantisers` of the same tensors in the same layouts, so bit for bit with
what the file will hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lit_cli.errors import InputError

__all__ = [
    "FakeQuantise",
    "Layout",
    "Quantised",
    "choose_layout",
    "dequantise",
    "dequantise_state",
    "fake_quantisers",
    "quantise",
    "quantise_state",
]

Bits = int | Mapping[str, int]
State = Mapping[str, "Quantised | Tensor"]

BUDGET = 0.02  # pairs of minimum and scale, as a share of a tensor's elements
_HALF_TOLERANCE = 1.02  # growth of the squared error that float16 pairs may cost


class Layout(NamedTuple):
    """How a tensor's pairs of minimum and scale lie.

    Attributes:
        shape: Their shape, which broadcasts against the tensor: (64, 1, 1, 1) is one pair for each of 64 channels.
        half: Whether they are rounded to float16.
    """

    shape: tuple[int, ...]
    half: bool


@dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """A tensor as codes.

    Attributes:
        codes: Whole numbers from 0 to 2**bits - 1 in the tensor's shape, uint8 up to 8 bits, else int32.
        minimum: Value of code 0, float32, broadcasts against the codes.
        scale: Value of one step, float32, of the same shape; 0 where a slice is constant.
        bits: 2 to 16.
        half: Whether minimum and scale are float16 numbers, so that 16 bits hold them exactly.
    """

    codes: Tensor
    minimum: Tensor
    scale: Tensor
    bits: int
    half: bool


def choose_layout(x: Tensor, bits: int, budget: float = BUDGET) -> Layout:
    """The layout of least squared error among those whose pairs number less than `budget` of the elements.

    One pair for the whole tensor is always allowed.

    Example:
        >>> rows = torch.tensor([[1.0], [100.0]]) * torch.linspace(-1, 1, 200)
        >>> choose_layout(rows, bits=8).shape  # two pairs for 400 elements
        (2, 1)
        >>> choose_layout(rows, bits=8, budget=0.001).shape
        (1, 1)
    """
    if not x.numel():
        return Layout((1,) * x.ndim, half=True)
    whole = (1,) * x.ndim
    kept = [tuple(n if d == axis else 1 for d, n in enumerate(x.shape)) for axis in range(x.ndim)]
    reduced = [tuple(1 if d == axis else n for d, n in enumerate(x.shape)) for axis in range(x.ndim)]
    # The coarse layouts come first, so that equal errors keep the fewest pairs.
    allowed = [whole, *sorted({s for s in kept + reduced if math.prod(s) < budget * x.numel()}, key=math.prod)]
    # The layout is chosen with float32 pairs, then the pairs are narrowed.
    errors = [_squared_error(x, bits, Layout(shape, half=False)) for shape in allowed]
    best = min(range(len(allowed)), key=errors.__getitem__)
    narrow = _squared_error(x, bits, Layout(allowed[best], half=True))
    # A comparison with NaN, which a pair beyond float16 gives, is false.
    return Layout(allowed[best], half=narrow <= _HALF_TOLERANCE * errors[best])


def quantise(x: Tensor, bits: int, layout: Layout | None = None, budget: float = BUDGET) -> Quantised:
    """A floating tensor to codes.

    Args:
        x: Any shape, any floating type; the arithmetic is float32.
        bits: 2 to 16.
        layout: As `choose_layout` gives it, which is asked when there is none.
        budget: For `choose_layout`.

    Raises:
        InputError: bits outside 2 to 16, or values that are not finite or span more than the layout's type can hold.

    Example:
        >>> q = quantise(torch.tensor([-1.0, 0.1, 2.0]), bits=2)
        >>> q.codes, dequantise(q)
        (tensor([0, 1, 3], dtype=torch.uint8), tensor([-1.,  0.,  2.]))
    """
    if not 2 <= bits <= 16:
        raise InputError(f"bits: expected 2 to 16, got {bits}")
    x = x.detach().float()
    if not bool(torch.isfinite(x).all()):
        raise InputError("a tensor to quantise has values that are not finite")
    layout = layout or choose_layout(x, bits, budget)
    minimum, scale = _pairs(x, bits, layout)
    if not bool(torch.isfinite(minimum).all() & torch.isfinite(scale).all()):
        raise InputError(f"a tensor to quantise has a range beyond {'float16' if layout.half else 'float32'}")
    codes = _codes(x, minimum, scale, bits).to(torch.uint8 if bits <= 8 else torch.int32)
    return Quantised(codes, minimum, scale, bits, layout.half)


def dequantise(q: Quantised) -> Tensor:
    """Codes to float32 values: minimum + scale * code."""
    return q.minimum + q.scale * q.codes


def quantise_state(
    state: Mapping[str, Tensor],
    bits: Bits,
    layouts: Mapping[str, Layout] | None = None,
    budget: float = BUDGET,
) -> dict[str, Quantised | Tensor]:
    """The tensors of a network, those worth it as codes.

    Codes are made of floating tensors with at least two axes longer than 1. Vectors such as biases are few and
    sensitive: they become float16, or stay float32 where float16 has no room. Whole numbers stay as they are.

    Args:
        state: `module.state_dict()`.
        bits: For all, or for name patterns as of a shell (`{"latents*": 6, "*": 8}`), of which the first that fits
            counts. What no pattern fits stays as it is.
        layouts: Of fake quantisation, by name, so that the codes are those that training saw.
        budget: For `choose_layout`.

    Returns:
        By name, in the same order; `dequantise_state` is the way back.

    Raises:
        InputError: bits outside 2 to 16, or values that are not finite; the message names the tensor.

    Example:
        >>> state = quantise_state(nn.Linear(64, 64).state_dict(), bits=8)
        >>> type(state["weight"]).__name__, state["bias"].dtype
        ('Quantised', torch.float16)
    """
    out: dict[str, Quantised | Tensor] = {}
    for name, x in state.items():
        wanted = _bits_of(name, bits)
        if wanted is None or not x.is_floating_point():
            out[name] = x.detach()
        elif _is_matrix(x):
            try:
                out[name] = quantise(x, wanted, (layouts or {}).get(name), budget)
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
        else:
            out[name] = _narrow(x.detach())
    return out


def dequantise_state(state: State) -> dict[str, Tensor]:
    """Tensors for `load_state_dict`; every floating one is float32."""
    plain = {name: dequantise(x) if isinstance(x, Quantised) else x for name, x in state.items()}
    return {name: x.float() if x.is_floating_point() else x for name, x in plain.items()}


class FakeQuantise(nn.Module):
    """Rounds a parameter to its codes' values; gradients pass as if it did not.

    Minimum and maximum follow the parameter at every step, so nothing is clipped but what float16 pairs cut off, and
    the straight-through gradient is 1 everywhere. Nothing waits for the device and no shape depends on values.

    Args:
        bits: 2 to 16.
        layout: Of the pairs; fixed, so that the file has the one that training saw.
        noise: Share of the elements that a training step rounds, drawn anew each time (Quant-Noise); the others keep
            their values and so their exact gradients. Evaluation always rounds all.

    Raises:
        InputError: bits or noise outside their range.

    Source:
        Fan et al., Training with Quantization Noise for Extreme Model Compression, ICLR 2021. Straight-through
        gradients: Bengio et al., arXiv 1308.3432.

    Example:
        >>> x = torch.tensor([0.0, 0.4, 3.0], requires_grad=True)
        >>> y = FakeQuantise(2, Layout((1,), half=True))(x)
        >>> y.sum().backward()
        >>> y.detach(), x.grad
        (tensor([0., 0., 3.]), tensor([1., 1., 1.]))
    """

    def __init__(self, bits: int, layout: Layout, noise: float = 1.0) -> None:
        super().__init__()
        if not 2 <= bits <= 16:
            raise InputError(f"bits: expected 2 to 16, got {bits}")
        if not 0.0 < noise <= 1.0:
            raise InputError(f"noise: expected a share above 0 and up to 1, got {noise}")
        self.bits, self.layout, self.noise = bits, layout, noise

    def forward(self, x: Tensor) -> Tensor:
        """The rounded parameter, in its type."""
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            value = x.float()
            minimum, scale = _pairs(value, self.bits, self.layout)
            rounded = minimum + scale * _codes(value, minimum, scale, self.bits)
            if self.training and self.noise < 1.0:
                rounded = torch.where(torch.rand_like(value) < self.noise, rounded, value)
        # The difference is exactly 0: the value is the rounded one to the last bit.
        return rounded.to(x.dtype) + (x - x.detach())

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"bits={self.bits}, layout={self.layout.shape}, noise={self.noise}"


def fake_quantisers(
    parameters: Iterable[tuple[str, Tensor]],
    bits: Bits,
    noise: float = 1.0,
    layouts: Mapping[str, Layout] | None = None,
) -> dict[str, FakeQuantise]:
    """`FakeQuantise` for each parameter that `quantise_state` would make codes of.

    What they give goes to `torch.func.functional_call` in the place of the parameters, which stay as they are.

    Args:
        parameters: `module.named_parameters()`.
        bits: As of `quantise_state`.
        noise: As of `FakeQuantise`.
        layouts: By name, of a training that goes on; the others are chosen for the parameters as they are.

    Raises:
        InputError: bits or noise outside their range, or no parameter fits.
    """
    found: dict[str, FakeQuantise] = {}
    for name, parameter in parameters:
        wanted = _bits_of(name, bits)
        if wanted is None or not _is_matrix(parameter):
            continue
        layout = (layouts or {}).get(name) or choose_layout(parameter.detach().float(), wanted)
        found[name] = FakeQuantise(wanted, layout, noise)
    if not found:
        raise InputError(f"bits: {bits} fits no parameter with two axes; expected a number or patterns of names")
    return found


def _pairs(x: Tensor, bits: int, layout: Layout) -> tuple[Tensor, Tensor]:
    """Minimum and scale of each slice."""
    if not x.numel():
        zero = x.new_zeros(layout.shape)
        return zero, zero
    axes = [d for d, n in enumerate(layout.shape) if n == 1 and x.shape[d] > 1]
    low, high = (x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)) if axes else (x, x)
    scale = (high - low) / (2**bits - 1)
    return (low.half().float(), scale.half().float()) if layout.half else (low.clone(), scale)


def _codes(x: Tensor, minimum: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes as float32 numbers; 0 where the scale is 0."""
    steps = (x - minimum) / torch.where(scale > 0, scale, torch.ones_like(scale))
    return torch.where(scale > 0, steps.round().clamp(0, 2**bits - 1), torch.zeros_like(steps))


def _squared_error(x: Tensor, bits: int, layout: Layout) -> float:
    minimum, scale = _pairs(x, bits, layout)
    return float((minimum + scale * _codes(x, minimum, scale, bits) - x).double().square().mean())


def _is_matrix(x: Tensor) -> bool:
    return x.is_floating_point() and sum(n > 1 for n in x.shape) >= 2


def _bits_of(name: str, bits: Bits) -> int | None:
    if isinstance(bits, int):
        return bits
    return next((wanted for pattern, wanted in bits.items() if fnmatchcase(name, pattern)), None)


def _narrow(x: Tensor) -> Tensor:
    """Float16 where no value overflows or loses more than its relative rounding, else float32."""
    half = x.half()
    safe = (half.float() - x.float()).abs() <= x.float().abs() * 2**-10
    return half if bool(safe.all()) else x.float()
