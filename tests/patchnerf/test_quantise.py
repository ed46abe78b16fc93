"""Min-max codes against loops, and fake quantisation against what a file would hold."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from lit_cli.errors import InputError
from lit_patchnerf.compress.quantise import (
    FakeQuantise,
    Layout,
    Quantised,
    choose_layout,
    dequantise,
    dequantise_state,
    fake_quantisers,
    quantise,
    quantise_state,
)


def uneven(*shape, seed=0):
    """A tensor whose first axis has slices of very different range."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-2, 0, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return torch.randn(shape, generator=generator) * spread


def slow_slice(values, bits):
    """One pair in float64."""
    low, high = min(values), max(values)
    step = (high - low) / (2**bits - 1)
    return [low + step * round((v - low) / step) if step else low for v in values]


@pytest.mark.parametrize("bits", [2, 3, 6, 8, 12, 16])
@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (1, 60)])
def test_codes_against_a_loop_over_the_slices(bits, shape):
    x = uneven(4, 60)
    q = quantise(x, bits, Layout(shape, half=False))
    if shape == (1, 1):
        expected = np.reshape(slow_slice(x.flatten().tolist(), bits), (4, 60))
    elif shape == (4, 1):
        expected = np.array([slow_slice(row.tolist(), bits) for row in x])
    else:
        expected = np.array([slow_slice(column.tolist(), bits) for column in x.T]).T
    assert q.codes.dtype == (torch.uint8 if bits <= 8 else torch.int32)
    assert q.minimum.shape == q.scale.shape == shape
    assert int(q.codes.min()) == 0
    assert int(q.codes.max()) == 2**bits - 1
    # A value half way between two codes may fall to either.
    step = q.scale.expand(4, 60)
    different = (dequantise(q) - torch.from_numpy(expected).float()).abs() > 0.01 * step
    assert different.float().mean() < 0.01
    assert ((dequantise(q) - x).abs() <= 0.51 * step + 1e-6).all()


def test_the_layout_has_the_least_error_of_those_that_fit():
    x = uneven(32, 8, 5, 5)
    layout = choose_layout(x, 8)
    assert layout == ((32, 1, 1, 1), True)
    errors = {}
    for shape in [(1, 1, 1, 1), (32, 1, 1, 1), (1, 8, 1, 1), (1, 1, 5, 1), (1, 1, 1, 5)]:  # below 2 % of 6,400
        errors[shape] = float((dequantise(quantise(x, 8, Layout(shape, half=False))) - x).square().mean())
    assert min(errors, key=errors.__getitem__) == layout.shape
    assert choose_layout(x, 8, budget=0.0).shape == (1, 1, 1, 1)
    assert math.prod(choose_layout(x, 8, budget=1.0).shape) > 32


@pytest.mark.parametrize("budget", [0.001, 0.02, 0.3])
def test_pairs_stay_below_their_budget(budget):
    for shape in [(68, 16, 1, 1), (40, 33, 5, 5), (7, 3), (1, 5, 1), (132, 16, 2, 4)]:
        pairs = math.prod(choose_layout(uneven(*shape), 6, budget).shape)
        assert pairs == 1 or pairs < budget * math.prod(shape)


def test_pairs_are_float16_only_where_that_does_not_matter():
    x = uneven(40, 40)
    coarse, fine = quantise(x, 6), quantise(x, 16)
    assert coarse.half
    assert torch.equal(coarse.scale.half().float(), coarse.scale)
    assert torch.equal(coarse.minimum.half().float(), coarse.minimum)
    assert not fine.half
    for factor in (1e6, 1e-7):  # beyond what float16 holds
        q = quantise(x * factor, 8)
        assert not q.half
        assert float((dequantise(q) - x * factor).abs().max()) <= 0.51 * float(q.scale.max())


@pytest.mark.parametrize("value", [0.0, 0.1, -3e5, 1.0])
def test_constant_tensors_come_back_exactly(value):
    x = torch.full((6, 7), value)
    q = quantise(x, 4)
    assert torch.equal(dequantise(q), x)
    assert int(q.codes.max()) == 0


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (2, 0, 4), (1, 1)])
def test_odd_shapes(shape):
    x = torch.full(shape, 2.5)
    q = quantise(x, 8)
    assert q.codes.shape == shape
    assert torch.equal(dequantise(q), x)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_computed_in_float32(kind):
    x = uneven(8, 100).to(kind)
    assert torch.equal(dequantise(quantise(x, 8)), dequantise(quantise(x.float(), 8)))


@pytest.mark.parametrize("bits", [1, 17])
def test_bits_outside_their_range_are_refused(bits):
    with pytest.raises(InputError, match=f"expected 2 to 16, got {bits}"):
        quantise(torch.ones(3), bits)
    with pytest.raises(InputError, match=f"expected 2 to 16, got {bits}"):
        FakeQuantise(bits, Layout((1,), half=True))


def test_values_that_are_not_finite_are_refused_by_name():
    with pytest.raises(InputError, match=r"^head\.weight: .*not finite"):
        quantise_state({"head.weight": torch.tensor([[1.0, math.nan], [0.0, 1.0]])}, 8)
    with pytest.raises(InputError, match="range beyond float32"):
        quantise(torch.tensor([3e38, -3e38]), 8)


def test_a_state_keeps_what_codes_do_not_pay_for():
    state = {
        "latents": uneven(5, 16, 2, 4),
        "conv.weight": uneven(8, 3, 3, 3),
        "conv.bias": torch.randn(8),
        "scale": torch.full((8, 1, 1), 1e-6),  # a vector by its content, below float16's normal numbers
        "steps": torch.tensor(7),
        "other": uneven(3, 4),
    }
    q = quantise_state(state, {"latents*": 6, "conv.*": 8, "s*": 8})
    assert list(q) == list(state)
    assert isinstance(q["latents"], Quantised)
    assert isinstance(q["conv.weight"], Quantised)
    assert (q["latents"].bits, q["conv.weight"].bits) == (6, 8)
    assert q["conv.bias"].dtype == torch.float16
    assert q["scale"].dtype == torch.float32
    assert torch.equal(q["steps"], state["steps"])
    assert torch.equal(q["other"], state["other"])
    back = dequantise_state(q)
    assert {n: x.dtype for n, x in back.items()} == {n: x.dtype for n, x in state.items()}
    assert all(torch.allclose(back[n], x, atol=0.05) for n, x in state.items())


def test_eight_bits_have_the_noise_that_theory_gives():
    x = torch.rand(400, 400, generator=torch.Generator().manual_seed(0)) - 0.5
    # Uniform numbers of variance 1/12, an error of variance step**2 / 12: 20 log10(255) dB.
    noise = (dequantise(quantise(x, 8, Layout((1, 1), half=False))) - x).double()
    assert 10 * torch.log10(x.double().square().sum() / noise.square().sum()) == pytest.approx(48.13, abs=0.1)


class Net(nn.Module):
    """Latents, a convolution and a linear layer."""

    def __init__(self):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(6, 4, 3, 3))
        self.conv = nn.Conv2d(4, 16, 3, padding=1)
        self.head = nn.Linear(16, 3)

    def forward(self):
        return self.head(functional.gelu(self.conv(self.latents)).movedim(1, -1))


BITS = {"latents": 6, "*": 8}


def rounded(net, fakes):
    """What the network computes with rounded parameters."""
    own = dict(net.named_parameters())
    return functional_call(net, {name: fake(own[name]) for name, fake in fakes.items()}, ())


def test_training_computes_what_the_file_holds():
    torch.manual_seed(0)
    net = Net()
    fakes = fake_quantisers(net.named_parameters(), BITS)
    assert {name: fake.bits for name, fake in fakes.items()} == {"latents": 6, "conv.weight": 8, "head.weight": 8}
    layouts = {name: fake.layout for name, fake in fakes.items()}
    stored = dequantise_state(quantise_state(net.state_dict(), BITS, layouts))
    fresh = Net()
    fresh.load_state_dict(stored | {n: x for n, x in net.state_dict().items() if n.endswith("bias")})
    assert torch.equal(fresh(), rounded(net, fakes))
    assert not torch.equal(net(), rounded(net, fakes))
    with pytest.raises(InputError, match="fits no parameter"):
        fake_quantisers(net.named_parameters(), {"nothing": 8})


def test_a_training_that_goes_on_keeps_its_layouts():
    net = Net()
    first = {name: fake.layout for name, fake in fake_quantisers(net.named_parameters(), 8).items()}
    with torch.no_grad():
        net.conv.weight *= torch.logspace(-3, 0, 16)[:, None, None, None]
    anew = fake_quantisers(net.named_parameters(), 8)
    assert anew["conv.weight"].layout != first["conv.weight"]
    kept = fake_quantisers(net.named_parameters(), 8, layouts=first)
    assert {name: fake.layout for name, fake in kept.items()} == first
    part = fake_quantisers(net.named_parameters(), 8, layouts={"conv.weight": first["conv.weight"]})
    assert part["conv.weight"].layout == first["conv.weight"]
    assert part["head.weight"].layout == anew["head.weight"].layout


def test_gradients_pass_straight_through():
    x = uneven(6, 50).requires_grad_()
    weight = torch.randn(6, 50)
    for noise in (1.0, 0.4):
        fake = FakeQuantise(3, Layout((6, 1), half=True), noise)
        (grad,) = torch.autograd.grad((fake(x) * weight).sum(), x)
        assert torch.equal(grad, weight)
    # Through a function the gradient is that at the rounded point.
    fake = FakeQuantise(3, Layout((6, 1), half=True))
    (grad,) = torch.autograd.grad(fake(x).square().sum(), x)
    assert torch.allclose(grad, 2 * fake(x))


def test_noise_rounds_a_share_in_training_and_all_in_evaluation():
    x = uneven(50, 400)
    fake = FakeQuantise(2, Layout((50, 1), half=False), noise=0.3)
    torch.manual_seed(0)
    once, again = fake(x), fake(x)
    rounded = fake.eval()(x)
    moved = rounded != x
    assert torch.equal(torch.where(once != x, rounded, x), once)
    assert float((once != x)[moved].float().mean()) == pytest.approx(0.3, abs=0.02)
    assert not torch.equal(once, again)
    for wrong in (0.0, 1.5):
        with pytest.raises(InputError, match="noise: expected a share"):
            FakeQuantise(2, Layout((1,), half=True), noise=wrong)


def test_autocast_and_half_parameters_do_not_change_the_arithmetic():
    x = uneven(8, 64)
    fake = FakeQuantise(8, Layout((8, 1), half=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fake(x), dequantise(quantise(x, 8, fake.layout)))
    assert fake(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("noise", [1.0, 0.8])
def test_training_with_rounding_lowers_its_error(noise):
    torch.manual_seed(0)
    target = torch.rand(6, 3, 3, 3)
    net = Net()

    def train(steps, fakes):
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            functional.mse_loss(rounded(net, fakes), target).backward()
            optimizer.step()

    def error(state):
        fresh = Net()
        fresh.load_state_dict(state)
        with torch.no_grad():
            return float(functional.mse_loss(fresh(), target))

    train(200, {})
    bits = 3
    after = error(dequantise_state(quantise_state(net.state_dict(), bits)))
    fakes = fake_quantisers(net.named_parameters(), bits, noise)
    train(120, fakes)
    layouts = {name: fake.layout for name, fake in fakes.items()}
    aware = error(dequantise_state(quantise_state(net.state_dict(), bits, layouts)))
    assert aware < 0.7 * after
