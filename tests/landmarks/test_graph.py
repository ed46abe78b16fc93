"""The CUDA-graph step against the eager one."""

import copy

import pytest
import torch
from torch import nn

from lit_landmarks.graph import GraphedStep
from lit_landmarks.model import HeatmapNet

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def make(network: nn.Module, precision: torch.dtype | None):
    def step(images, target):
        with torch.autocast("cuda", dtype=precision or torch.bfloat16, enabled=precision is not None):
            return (network(images).float() - target).square().mean()

    return step


@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_same_training_as_eager(precision, accumulate):
    torch.backends.cudnn.deterministic = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    eager = HeatmapNet(backbone="hrnet_w18_small", num_landmarks=3).cuda()
    captured = copy.deepcopy(eager)
    graphed = GraphedStep(make(captured, precision), captured)
    plain = make(eager, precision)
    optimizers = [torch.optim.AdamW(n.parameters(), lr=1e-3, fused=True) for n in (eager, captured)]
    for i in range(12):
        images = torch.rand(4, 1, 64, 64, device="cuda")
        target = torch.rand(4, 3, 16, 16, device="cuda")
        a, b = plain(images, target), graphed(images, target)
        torch.testing.assert_close(a, b, rtol=2e-3 if precision is None else 5e-2, atol=1e-4)
        for loss in (a, b):
            (loss / accumulate).backward()
        if i == 0:
            for (name, p), q in zip(eager.named_parameters(), captured.parameters(), strict=True):
                if precision is None:
                    torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5, msg=name)
        if i % accumulate == accumulate - 1:
            for n, o in zip((eager, captured), optimizers, strict=True):
                torch.nn.utils.clip_grad_norm_(n.parameters(), 1.0)
                o.step()
                o.zero_grad()
    # BatchNorm statistics: warm-up must have left none of its own behind.
    mean = dict(eager.named_buffers())["body.net.bn1.running_mean"]
    other = dict(captured.named_buffers())["body.net.bn1.running_mean"]
    torch.testing.assert_close(mean, other, rtol=1e-2, atol=1e-3)
    assert int(dict(captured.named_buffers())["body.net.bn1.num_batches_tracked"]) == 12


def test_other_shapes_run_eagerly():
    torch.manual_seed(0)
    network = HeatmapNet(backbone="hrnet_w18_small", num_landmarks=3).cuda()
    graphed = GraphedStep(make(network, None), network)
    graphed(torch.rand(4, 1, 64, 64, device="cuda"), torch.rand(4, 3, 16, 16, device="cuda")).backward()
    loss = graphed(torch.rand(2, 1, 64, 64, device="cuda"), torch.rand(2, 3, 16, 16, device="cuda"))
    loss.backward()
    assert torch.isfinite(loss)
