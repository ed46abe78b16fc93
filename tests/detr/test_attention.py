"""Attention against slow loops and against torch's own module."""

import math

import pytest
import torch
from torch import nn

from lit_detr.models.attention import CORES, DeformableAttention, SelfAttention

SHAPES = ((3, 5), (2, 2), (1, 3))


def loop(value, locations, weights, shapes):
    """One point, one corner at a time."""
    b, heads, _, d = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    rows = []
    for i in range(b):
        for q in range(queries):
            for head in range(heads):
                total, start = torch.zeros(d, dtype=value.dtype), 0
                for level, (h, w) in enumerate(shapes):
                    for p in range(points):
                        x = locations[i, q, head, level, p, 0] * w - 0.5
                        y = locations[i, q, head, level, p, 1] * h - 0.5
                        left, top = math.floor(x.item()), math.floor(y.item())
                        for column in (left, left + 1):
                            for row in (top, top + 1):
                                if 0 <= column < w and 0 <= row < h:
                                    share = (1 - (x - column).abs()) * (1 - (y - row).abs())
                                    cell = value[i, head, start + row * w + column]
                                    total = total + weights[i, q, head, level, p] * share * cell
                    start += h * w
                rows.append(total)
    return torch.stack(rows).view(b, queries, heads * d)


def problem(seed=0, queries=3):
    g = torch.Generator().manual_seed(seed)
    cells = sum(h * w for h, w in SHAPES)
    value = torch.randn(2, 2, cells, 3, generator=g, dtype=torch.float64)
    locations = torch.rand(2, queries, 2, 3, 2, 2, generator=g, dtype=torch.float64) * 1.8 - 0.4  # some outside
    weights = torch.rand(2, queries, 2, 3, 2, generator=g, dtype=torch.float64)
    return [t.requires_grad_() for t in (value, locations, weights)]


@pytest.mark.parametrize("core", CORES)
def test_cores_are_the_loop_in_values_and_gradients(core):
    inputs = problem()
    expected = loop(*inputs, SHAPES)
    found = CORES[core](*inputs, SHAPES)
    torch.testing.assert_close(found, expected)
    direction = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for a, b in zip(
        torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("far", [-1e9, -1.5, 2.5, 1e9])
def test_points_outside_read_zero(core, far):
    value, locations, weights = problem()
    locations = torch.full_like(locations, far).requires_grad_()
    out = CORES[core](value, locations, weights, SHAPES)
    assert out.abs().max() == 0
    grads = torch.autograd.grad(out.sum(), (value, locations, weights))
    assert all(g.abs().max() == 0 for g in grads)


@pytest.mark.parametrize("core", CORES)
def test_cell_centres_read_their_cell(core):
    value, _, weights = problem(queries=1)
    weights = torch.zeros_like(weights)
    weights[:, :, :, 0, 1] = 1.0
    h, w = SHAPES[0]
    locations = torch.full((2, 1, 2, 3, 2, 2), 0.5, dtype=torch.float64)
    locations[..., 0, 1, :] = torch.tensor([(3 + 0.5) / w, (1 + 0.5) / h])
    out = CORES[core](value, locations, weights, SHAPES)
    torch.testing.assert_close(out.view(2, 2, 3), value[:, :, 1 * w + 3])


@pytest.mark.parametrize("core", CORES)
def test_float32_cores_agree_on_many_points(core):
    value, locations, weights = (t.detach() for t in problem(seed=3, queries=200))
    expected = CORES["grid_sample"](value, locations, weights, SHAPES)
    found = CORES[core](value.float(), locations.float(), weights.float(), SHAPES)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_a_constant_map_comes_back_as_it_is():
    attention = DeformableAttention(16, heads=4, levels=3, points=2)
    nn.init.eye_(attention.output.weight)
    shapes = ((8, 8), (4, 4), (2, 2))
    constant = torch.randn(1, 4, 1, 4).expand(1, 4, 84, 4)
    box = torch.tensor([[[0.5, 0.5, 0.2, 0.2]]])
    # The coarsest ring of one cell leaves a 2 x 2 map of centres at 1/4 and 3/4: sides of 1/2 stay inside of 0.25.
    attention.sampling.bias.data *= 0.4
    out = attention(torch.randn(1, 1, 16), box, constant, shapes, CORES["grid_sample"])
    torch.testing.assert_close(out.view(4, 4), constant[0, :, 0])


def test_points_start_in_a_ring_of_half_a_box_but_at_least_a_cell():
    attention = DeformableAttention(16, heads=8, levels=2, points=4)
    shapes = ((40, 20), (20, 10))
    seen = {}

    def sampler(value, locations, weights, shapes):
        seen.update(locations=locations, weights=weights)
        return torch.zeros(*locations.shape[:2], 16)

    boxes = torch.tensor([[[0.5, 0.4, 0.3, 0.6], [0.5, 0.4, 0.001, 0.002]]])
    attention(torch.randn(1, 2, 16), boxes, torch.zeros(1), shapes, sampler)
    offsets = seen["locations"][0] - boxes[0, :, None, None, None, :2]  # (Q, heads, L, P, 2)
    torch.testing.assert_close(seen["weights"], torch.full_like(seen["weights"], 1 / 8))
    reach = offsets.abs().amax((1, 3))
    large, tiny = reach[0], reach[1]
    torch.testing.assert_close(large, torch.tensor([[0.15, 0.3], [0.15, 0.3]]))
    torch.testing.assert_close(tiny, torch.tensor([[1 / 20, 1 / 40], [1 / 10, 1 / 20]]))
    steps = offsets[0, 0, 0, :, 0]  # the first head looks to the right
    torch.testing.assert_close(steps, torch.arange(1, 5) * 0.15 / 4)
    assert len({tuple(d.sign().tolist()) for d in offsets[0, :, 0, 0].round(decimals=6)}) == 8


def test_rows_of_a_network_with_one_more_level():
    more = DeformableAttention(16, heads=4, levels=3, points=2)
    less = DeformableAttention(16, heads=4, levels=2, points=2)
    nn.init.normal_(more.sampling.weight)
    rows = more.sampling.weight.detach().view(4, 3, 2, 3, 16)
    found = less.coarser_only(more.sampling.weight.detach()).view(4, 2, 2, 3, 16)
    assert torch.equal(found, rows[:, 1:])
    assert less.coarser_only(more.sampling.bias.detach()).shape == less.sampling.bias.shape


@pytest.mark.parametrize("masked", [False, True])
def test_self_attention_is_torchs(masked):
    ours, theirs = SelfAttention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.in_proj_weight.data = ours.qkv.weight.data
    theirs.in_proj_bias.data = ours.qkv.bias.data
    theirs.out_proj.load_state_dict(ours.output.state_dict())
    x = torch.randn(2, 5, 16)
    sees = torch.eye(5, dtype=torch.bool) | (torch.rand(5, 5) < 0.5)
    expected = theirs(x, x, x, attn_mask=~sees if masked else None)[0]
    torch.testing.assert_close(ours(x, sees[None, None] if masked else None), expected, atol=1e-6, rtol=1e-5)
