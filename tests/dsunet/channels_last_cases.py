"""The channels-last operations against torch's own; `test_channels_last.py` runs this file in Triton's interpreter.

On a GPU it runs as it is: `pytest tests/dsunet/channels_last_cases.py`.
"""

import copy
import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_dsunet.models import build_network
from lit_dsunet.models import channels_last as cl
from lit_dsunet.models.mkdc import MKDC

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="no CUDA device, no interpreter"
)


@pytest.fixture(autouse=True)
def exact():
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def draw(*shape, dtype=torch.float32):
    form = torch.channels_last_3d if len(shape) == 5 else torch.channels_last
    return torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=form)


def assert_near(found, expected, tolerance):
    difference = (found.detach().double() - expected.detach().double()).norm()
    assert difference <= tolerance * expected.detach().double().norm(), float(difference)


def doubles(*tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


@pytest.mark.parametrize("shape", [(2, 3, 5, 6, 7), (1, 32, 8, 8, 8), (2, 80, 4, 5, 6), (2, 5, 9, 11), (1, 1, 4, 4, 4)])
@pytest.mark.parametrize("slope", [0.01, 1.0])
def test_instance_norm_act(shape, slope):
    """Also for means far from 0, which sums of squares alone would not survive."""
    x = (draw(*shape) * 3 + 300).requires_grad_()
    weight, bias = (torch.randn(shape[1], device=DEVICE, requires_grad=True) for _ in range(2))
    removed = torch.zeros(shape[1], device=DEVICE, requires_grad=True)
    y = cl.instance_norm_act(x, weight, bias, slope=slope, removed=removed)
    assert y.is_contiguous(memory_format=cl._form(x))
    xd, wd, bd = doubles(x, weight, bias)
    expected = F.leaky_relu(F.instance_norm(xd, weight=wd, bias=bd, eps=1e-5), slope)
    assert_near(y, expected, 1e-4)
    gradient = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, weight, bias, removed), gradient)
    for a, b in zip(found, torch.autograd.grad(expected, (xd, wd, bd), gradient.double()), strict=False):
        assert_near(a, b, 1e-4)
    assert not found[3].any()


def test_half_precision_keeps_its_statistics_in_float32():
    x = (draw(2, 16, 8, 8, 8) + 30).half()
    weight, bias = torch.ones(16, device=DEVICE), torch.zeros(16, device=DEVICE)
    y = cl.instance_norm_act(x, weight, bias, slope=1.0)
    assert y.dtype == torch.float16
    assert_near(y, F.instance_norm(x.double()), 1e-3)


@pytest.mark.parametrize(
    ("shape", "kernel"), [((2, 1, 6, 7, 9), (3, 3, 3)), ((1, 2, 5, 6, 7), (1, 3, 3)), ((2, 3, 9, 10), (3, 3))]
)
def test_convolution_of_few_channels(shape, kernel):
    x = draw(*shape, dtype=torch.float16)
    layer = (nn.Conv3d if len(kernel) == 3 else nn.Conv2d)(shape[1], 20, kernel, padding=[k // 2 for k in kernel])
    layer = layer.to(DEVICE, torch.float16)
    y = cl.conv(x, layer)
    assert type(y.grad_fn).__name__ == "_FewChannelConvBackward"
    (weight,) = doubles(layer.weight)
    function = F.conv3d if len(kernel) == 3 else F.conv2d
    expected = function(x.double(), weight, None, 1, layer.padding)
    assert_near(y, expected, 1e-3)
    gradient = torch.randn_like(y)
    found = torch.autograd.grad(y, layer.weight, gradient)[0]
    assert_near(found, torch.autograd.grad(expected, weight, gradient.double())[0], 1e-3)


@pytest.mark.parametrize(("shape", "classes"), [((2, 20, 4, 5, 6), 2), ((1, 32, 6, 7), 3), ((2, 80, 3, 4, 5), 16)])
def test_logits(shape, classes):
    x = draw(*shape, dtype=torch.float16).requires_grad_()
    layer = (nn.Conv3d if len(shape) == 5 else nn.Conv2d)(shape[1], classes, 1).to(DEVICE, torch.float16)
    y = cl.logits(x, layer)
    assert type(y.grad_fn).__name__ == "_LogitsBackward"
    assert y.is_contiguous()
    xd, weight, bias = doubles(x, layer.weight, layer.bias)
    expected = (F.conv3d if len(shape) == 5 else F.conv2d)(xd, weight, bias)
    assert_near(y, expected, 1e-3)
    gradient = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, layer.weight, layer.bias), gradient)
    for a, b in zip(found, torch.autograd.grad(expected, (xd, weight, bias), gradient.double()), strict=True):
        assert_near(a, b, 1e-3)


def test_concatenate():
    a, b = draw(2, 5, 3, 4, 5).requires_grad_(), draw(2, 70, 3, 4, 5).requires_grad_()
    bias = torch.randn(5, device=DEVICE, requires_grad=True)
    y = cl.concatenate(a, b, bias)
    expected = torch.cat((a + bias.view(-1, 1, 1, 1), b), dim=1)
    torch.testing.assert_close(y, expected)
    gradient = torch.randn_like(expected)
    found, known = (torch.autograd.grad(out, (a, b, bias), gradient) for out in (y, expected))
    torch.testing.assert_close(found, known)


def test_a_map_is_made_again():
    """What a convolution keeps for its way back is the recipe, not the map."""
    x = draw(1, 4, 4, 4, 4).requires_grad_()
    weight, bias = (torch.randn(4, device=DEVICE, requires_grad=True) for _ in range(2))
    layer = nn.Conv3d(4, 4, 3, padding=1).to(DEVICE)
    y = cl.instance_norm_act(x, weight, bias)
    plain = F.conv3d(y, layer.weight, None, 1, 1)
    expected = torch.autograd.grad(plain.square().sum(), (x, layer.weight), retain_graph=True)
    out = cl.conv(y, layer)
    assert out.grad_fn._raw_saved_input.data is y._remade
    assert plain.grad_fn._raw_saved_input.data is not y._remade
    found = torch.autograd.grad(out.square().sum(), (x, layer.weight))
    torch.testing.assert_close(found, expected)


NETWORKS = [  # the interpreter takes its time for every program: one network of three stages, one batch of two there
    {"features": [4, 8, 12], "strides": [1, 2, 2], "deep_supervision": 1},
    {"arch": "resenc", "features": [4, 8], "strides": [1, [1, 2, 2]], "encoder_blocks": [1, 2]},
    {"features": [4, 8], "strides": [1, 2], "gradient_checkpointing": True},
    {"features": [4, 8], "strides": [1, 2], "dims": 2},
    {"mkdc": "skips", "mkdc_residual": True, "mkdc_kernels": [1, 3], "features": [4, 8], "strides": [1, 2], "dims": 2},
]


@pytest.mark.parametrize("options", NETWORKS)
def test_a_network_is_the_same_function(options):
    torch.manual_seed(1)
    plain = build_network(in_channels=2, num_classes=3, **options).to(DEVICE)
    torch.manual_seed(1)
    ours = build_network(in_channels=2, num_classes=3, channels_last=True, **options).to(DEVICE)
    batch = 2 if DEVICE == "cuda" or "deep_supervision" in options else 1
    x = torch.randn(batch, 2, *(8,) * options.get("dims", 3), device=DEVICE)
    losses = []
    for network in (plain, ours):
        out = network(x)
        losses.append(sum(o.square().mean() for o in (out if isinstance(out, list) else [out])))
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    largest = max(float(p.grad.norm()) for p in plain.parameters() if p.grad is not None)
    for (name, p), q in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            # Of what a normalisation undoes, as a bias before it, rounding errors are all of the gradient.
            assert (q.grad - p.grad).norm() <= 1e-3 * p.grad.norm() + 1e-6 * largest, name
    with torch.inference_mode():
        torch.testing.assert_close(ours.eval()(x[:1]), plain.eval()(x[:1]), rtol=1e-4, atol=1e-5)


MKDC_CASES = [
    ("batch", (2, 4, 2, 3, 3), (1, 3), True),
    ("instance", (1, 4, 2, 3, 3), (1, 5), False),
    ("batch", (2, 40, 3, 4), (3,), False),
    ("instance", (2, 6, 4, 5), (1, 3, 7), True),
]
if DEVICE == "cuda":  # many taps, which the interpreter goes through one by one
    MKDC_CASES += [("batch", (2, 4, 2, 3, 3), (1, 3, 5), True), ("batch", (2, 40, 1, 3, 4), (3,), False)]


@pytest.mark.parametrize(("norm", "shape", "kernels", "residual"), MKDC_CASES)
def test_mkdc(norm, shape, kernels, residual):
    torch.manual_seed(1)
    plain = MKDC(shape[1], kernels, dims=len(shape) - 2, norm=norm, residual=residual).to(DEVICE)
    for layer in plain.norms:
        nn.init.uniform_(layer.weight, 0.5, 2.0)
        nn.init.uniform_(layer.bias, -1.0, 6.0)  # so that both ends of ReLU6 are met
    ours = copy.deepcopy(plain)
    ours.channels_last = True
    # With statistics of the batch, then with running ones, where there are any.
    for mode in (True, False) if norm == "batch" else (True,):
        x = (draw(*shape) + 1).requires_grad_()
        found, expected = ours.train(mode)(x), plain.train(mode)(x)
        assert type(found.grad_fn).__name__ == "_CombinedBackward"
        assert_near(found, expected, 1e-5)
        gradient = torch.randn_like(expected)
        inputs = [(x, *m.parameters()) for m in (ours, plain)]
        for (name, _), a, b in zip(
            [("x", x), *plain.named_parameters()],
            torch.autograd.grad(found, inputs[0], gradient),
            torch.autograd.grad(expected, inputs[1], gradient),
            strict=True,
        ):
            scale = float(b.norm()) if float(b.norm()) > 1e-2 else 1.0  # no weight matters to a norm behind it alone
            assert float((a - b).norm()) <= 3e-3 * scale, name
        for (name, a), b in zip(ours.named_buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(a, b, msg=name)
