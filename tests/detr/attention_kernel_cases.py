"""What the attention kernels must give, for Triton's interpreter and for a GPU: see test_kernels.py."""

import os

import pytest
import torch
from torch import nn

from lit_detr.models import build_network
from lit_detr.models.attention import kernels_take, sample_auto, sample_grid

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
SHAPES = ((6, 9), (3, 5), (1, 3))

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device, no interpreter"
)


def problem(queries, depth=5, heads=2, layers=3, dtype=torch.float32):
    """Values as a matrix product of several layers leaves them; some points lie outside, some far outside."""
    g = torch.Generator().manual_seed(queries)
    cells = sum(h * w for h, w in SHAPES)
    table = torch.randn(2, cells, layers, heads, depth, generator=g).to(dtype).to(DEVICE).requires_grad_()
    locations = torch.rand(2, queries, heads, len(SHAPES), 2, 2, generator=g) * 1.8 - 0.4
    locations[0, 0, 0, 0, :2] = torch.tensor([1e9, -1e9])
    weights = torch.rand(2, queries, heads, len(SHAPES), 2, generator=g)
    return table, locations.to(DEVICE).requires_grad_(), weights.to(DEVICE).requires_grad_()


@pytest.mark.parametrize(("queries", "depth"), [(6, 5)] if DEVICE == "cpu" else [(6, 5), (70, 4)])
def test_values_and_gradients_are_those_of_grid_sample(queries, depth, monkeypatch):
    from lit_detr.models import attention_kernels

    if DEVICE == "cpu":  # the interpreter takes its time for every program, and a last one may be partly empty
        monkeypatch.setattr(attention_kernels, "BLOCK_Q", 4)
    inputs = table, locations, weights = problem(queries, depth)
    value = table.unbind(2)[1].transpose(1, 2)  # a view, as the decoder hands it over
    assert kernels_take(value)
    found, expected = (sample(value, locations, weights, SHAPES) for sample in (sample_auto, sample_grid))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    direction = torch.randn(expected.shape).to(DEVICE)
    ours, theirs = (torch.autograd.grad(out, inputs, direction, retain_graph=True) for out in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16])
def test_half_precision_loses_only_what_rounding_does(dtype):
    inputs = table, locations, weights = problem(2, 4, heads=1 if DEVICE == "cpu" else 2, dtype=dtype)
    value = table.unbind(2)[0].transpose(1, 2)
    found = sample_auto(value, locations, weights, SHAPES)
    assert found.dtype == dtype
    expected = sample_grid(value.float(), locations, weights, SHAPES)
    spacing = torch.finfo(dtype).eps
    assert (found.float() - expected).abs().max() <= spacing * expected.abs().max()
    direction = torch.randn(expected.shape).to(DEVICE).to(dtype)
    ours = torch.autograd.grad(found, inputs, direction)
    theirs = torch.autograd.grad(expected, inputs, direction.float())
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert (a.double() - b.double()).norm() <= 2 * spacing * b.double().norm()


def test_a_network_detects_and_learns_the_same():
    torch.manual_seed(0)
    options = {"hidden": 16, "heads": 2, "feedforward": 16, "decoder_layers": 1, "noise_queries": 0}
    net = build_network(num_classes=3, backbone="resnet10t", strides=(16, 32), **options).to(DEVICE).eval()
    for layer in net.decoder.layers:
        nn.init.normal_(layer.cross.sampling.bias)  # points in the middle of cells, as at first, lie on kinks
    images = torch.rand(1, 3, 64, 96, device=DEVICE)
    mask = torch.ones(1, 64, 96, dtype=torch.bool, device=DEVICE)
    mask[:, :, 80:] = False
    results = []
    for core in ("auto", "grid_sample"):
        net.set_core(core)
        net.zero_grad()
        out = net(images, mask, queries=5)
        (out.logits.square().mean() + out.boxes.square().mean()).backward()
        results.append(
            (out.logits.detach(), out.boxes.detach(), *(p.grad for p in net.parameters() if p.grad is not None))
        )
    assert len(results[0]) == len(results[1])
    largest = max(float(x.norm()) for x in results[1])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-6 * largest
