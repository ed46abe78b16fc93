"""Formats and measures against torchvision, loops and numbers by hand; tiny and degenerate boxes; autocast."""

import math

import pytest
import torch
from torchvision import ops

from lit_detr.boxes import (
    cxcywh_to_xyxy,
    generalised_iou,
    iou,
    iou_and_giou,
    nwd,
    pairwise_giou,
    pairwise_iou,
    pairwise_nwd,
    to_pixels,
    xyxy_to_cxcywh,
)


def boxes(n, seed=0, dtype=torch.float64):
    """Centre and size as shares, of which many overlap."""
    g = torch.Generator().manual_seed(seed)
    return torch.cat((torch.rand(n, 2, generator=g), 0.4 * torch.rand(n, 2, generator=g) + 0.01), 1).to(dtype)


def slow_nwd(a, b, constant):
    (ax, ay, aw, ah), (bx, by, bw, bh) = a.tolist(), b.tolist()
    w = (ax - bx) ** 2 + (ay - by) ** 2 + ((aw - bw) / 2) ** 2 + ((ah - bh) / 2) ** 2
    return math.exp(-math.sqrt(w) / constant)


def test_formats_are_torchvisions_and_inverse():
    x = boxes(20).view(4, 5, 4)
    corners = cxcywh_to_xyxy(x)
    torch.testing.assert_close(corners, ops.box_convert(x, "cxcywh", "xyxy"))
    torch.testing.assert_close(xyxy_to_cxcywh(corners), x)
    assert cxcywh_to_xyxy(x[:, :0]).shape == (4, 0, 4)


def test_pairwise_measures_are_torchvisions():
    a, b = cxcywh_to_xyxy(boxes(30)), cxcywh_to_xyxy(boxes(40, 1))
    torch.testing.assert_close(pairwise_iou(a, b), ops.box_iou(a, b))
    torch.testing.assert_close(pairwise_giou(a, b), ops.generalized_box_iou(a, b))
    both = iou_and_giou(a[:, None], b)
    torch.testing.assert_close(both[0], pairwise_iou(a, b))
    torch.testing.assert_close(both[1], pairwise_giou(a, b))
    batched = pairwise_giou(a.view(2, 15, 4), b.view(2, 20, 4))
    torch.testing.assert_close(batched[1], ops.generalized_box_iou(a[15:], b[20:]))


def test_elementwise_measures_are_the_diagonal():
    a, b = boxes(30), boxes(30, 1)
    a_corners, b_corners = cxcywh_to_xyxy(a), cxcywh_to_xyxy(b)
    torch.testing.assert_close(iou(a_corners, b_corners), ops.box_iou(a_corners, b_corners).diag())
    expected = 1 - ops.generalized_box_iou_loss(a_corners, b_corners, eps=0)
    torch.testing.assert_close(generalised_iou(a_corners, b_corners), expected)
    torch.testing.assert_close(nwd(a, b, 0.3), pairwise_nwd(a, b, 0.3).diag())


def test_nwd_is_the_formula():
    a, b = to_pixels(boxes(6), (640, 640)), to_pixels(boxes(7, 1), (640, 640))
    expected = torch.tensor([[slow_nwd(x, y, 12.7) for y in b] for x in a], dtype=torch.float64)
    torch.testing.assert_close(pairwise_nwd(a, b, 12.7), expected)


@pytest.mark.parametrize("measure", [iou, generalised_iou, lambda a, b: nwd(a, b, 0.5)])
def test_gradients(measure):
    a, b = cxcywh_to_xyxy(boxes(8)).requires_grad_(), cxcywh_to_xyxy(boxes(8, 1)).requires_grad_()
    assert torch.autograd.gradcheck(measure, (a, b))


@pytest.mark.parametrize("measure", [iou, generalised_iou, lambda a, b: nwd(a, b, 0.5)])
def test_boxes_without_area_and_equal_boxes_give_finite_values_and_gradients(measure):
    rows = [[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.7], [0.2, 0.2, 0.4, 0.4]]
    for dtype in (torch.float32, torch.float64):
        a = torch.tensor(rows, dtype=dtype, requires_grad=True)
        value = measure(a[:, None], a.detach()[None])
        value.sum().backward()
        assert value.isfinite().all()
        assert a.grad is not None
        assert a.grad.isfinite().all()
        assert value[2, 2].item() == pytest.approx(1, abs=1e-5)


def test_a_box_of_two_pixels_is_exact_in_float32():
    # Half a pixel beside its target at the far corner of 640 px: IoU 1.5 * 2 / (4 + 4 - 3) exactly.
    a = torch.tensor([638.0, 638.0, 2.0, 2.0]) / 640
    b = torch.tensor([638.5, 638.0, 2.0, 2.0]) / 640
    a, b = cxcywh_to_xyxy(a), cxcywh_to_xyxy(b)
    assert iou(a, b).item() == pytest.approx(0.6, rel=1e-3)
    assert generalised_iou(a, b).item() == pytest.approx(0.6, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_under_autocast(dtype):
    x = boxes(10, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        corners = cxcywh_to_xyxy(x)
        results = [corners, xyxy_to_cxcywh(x), to_pixels(x, (640, 480)), pairwise_iou(x, x), pairwise_nwd(x, x, 1.0)]
        results.append(pairwise_giou(corners, corners))
    assert {r.dtype for r in results} == {torch.float32}
    torch.testing.assert_close(corners, cxcywh_to_xyxy(x.float()), rtol=0, atol=0)
    torch.testing.assert_close(results[-1], ops.generalized_box_iou(corners, corners))


def test_to_pixels_takes_x_by_the_width():
    x = torch.tensor([[0.25, 0.5, 0.1, 0.2]])
    torch.testing.assert_close(to_pixels(x, (100, 400)), torch.tensor([[100.0, 50.0, 40.0, 20.0]]))
