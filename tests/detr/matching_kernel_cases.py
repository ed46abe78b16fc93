"""What the kernel of the costs must give, for Triton's interpreter and for a GPU: see test_kernels.py."""

import os

import pytest
import torch

from lit_detr import matching
from lit_detr.matching import LARGEST, Matcher
from lit_detr.samples import pack_targets

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
SIZE = (256, 320)

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device, no interpreter"
)


def scene(counts, queries, dtype=torch.float32):
    g = torch.Generator().manual_seed(queries)

    def boxes(*shape):
        return torch.cat((torch.rand(*shape, 2, generator=g), 0.2 * torch.rand(*shape, 2, generator=g) + 0.005), -1)

    logits = 4 * torch.randn(2, len(counts), queries, 3, generator=g)
    found = boxes(2, len(counts), queries)
    wanted = [boxes(n) for n in counts]
    for own in wanted:  # some are found exactly
        own[: min(len(own), 2)] = found[0, 0, : min(len(own), 2)]
    labels = [torch.randint(0, 3, (n,), generator=g) for n in counts]
    device = torch.device(DEVICE)
    return logits.to(device, dtype), found.to(device), pack_targets(wanted, labels).to(device)


def both(monkeypatch, matcher, logits, boxes, targets):
    """By the kernel and by torch."""
    image, row = matching._flat_rows(targets)
    assert matching.usable(boxes)
    ours = matcher._costs(logits, boxes, targets, image, row, SIZE)
    with monkeypatch.context() as patch:
        patch.setattr(matching, "usable", lambda x: False)
        theirs = matcher._costs(logits, boxes, targets, image, row, SIZE)
    assert ours.shape == theirs.shape
    return ours, theirs


@pytest.mark.parametrize("kind", ["focal", "vfl", "mal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_costs_are_those_of_torch(monkeypatch, kind, dtype):
    matcher = Matcher(class_kind=kind, nwd=1.5, nwd_constant=12.0, gamma=0.0 if dtype == torch.bfloat16 else None)
    ours, theirs = both(monkeypatch, matcher, *scene([2, 0, 1], 260, dtype))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_views_and_factors_of_zero(monkeypatch):
    logits, boxes, targets = scene([2, 1], 40)
    ours, theirs = both(monkeypatch, Matcher(class_cost=0.0), logits[:, :, 5:30], boxes[:, :, 5:30], targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    ours, theirs = both(monkeypatch, Matcher(l1=0.0, giou=0.0), logits.transpose(0, 1), boxes.transpose(0, 1), targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_broken_numbers_become_the_largest_cost(monkeypatch, bad):
    logits, boxes, targets = scene([2, 1], 8)
    boxes[0, 0, 1, 2] = boxes[1, 1, 3, 0] = bad
    logits[1, 0, 2] = bad
    ours, theirs = both(monkeypatch, Matcher(), logits, boxes, targets)
    assert torch.isfinite(ours).all()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours[:2, 0, 1] == LARGEST).all()
    assert (ours[2:, 1, 3] == LARGEST).all()
