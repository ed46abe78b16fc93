"""The CUDA-graph step against the eager one."""

import copy

import pytest
import torch
from torch import nn

from lit_common.graph import GraphedStep
from lit_landmarks.model import HeatmapNet

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def make(network: nn.Module, precision: torch.dtype | None):
    def step(images, target):
        with torch.autocast("cuda", dtype=precision or torch.bfloat16, enabled=precision is not None):
            return (network(images).float() - target).square().mean()

    return step


@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_losses_and_gradients_are_the_eager_ones(precision, accumulate):
    """Both start each optimizer step from the same weights, since tiny differences would grow from step to step."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    eager = HeatmapNet(backbone="hrnet_w18_small", num_landmarks=3).cuda()
    captured = copy.deepcopy(eager)
    graphed = GraphedStep(make(captured, precision), captured)
    plain = make(eager, precision)
    optimizer = torch.optim.AdamW(captured.parameters(), lr=1e-3, fused=True)
    tolerance = 1e-3 if precision is None else 5e-2
    for step in range(3):
        eager.load_state_dict(captured.state_dict())
        eager.zero_grad()
        for _ in range(accumulate):
            images = torch.rand(4, 1, 64, 64, device="cuda")
            target = torch.rand(4, 3, 16, 16, device="cuda")
            a, b = plain(images, target), graphed(images, target)
            torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-4)
            for loss in (a, b):
                (loss / accumulate).backward()
        for (name, p), q in zip(eager.named_parameters(), captured.named_parameters(), strict=True):
            difference = (p.grad - q[1].grad).norm() / p.grad.norm().clamp(min=1e-6)
            assert difference < 10 * tolerance, (step, name, float(difference))
        torch.nn.utils.clip_grad_norm_(captured.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    # BatchNorm statistics: warm-up must have left none of its own behind.
    counters = {int(v) for k, v in captured.state_dict().items() if k.endswith("num_batches_tracked")}
    assert counters == {3 * accumulate}


def test_other_shapes_run_eagerly():
    torch.manual_seed(0)
    network = HeatmapNet(backbone="hrnet_w18_small", num_landmarks=3).cuda()
    graphed = GraphedStep(make(network, None), network)
    graphed(torch.rand(4, 1, 64, 64, device="cuda"), torch.rand(4, 3, 16, 16, device="cuda")).backward()
    loss = graphed(torch.rand(2, 1, 64, 64, device="cuda"), torch.rand(2, 3, 16, 16, device="cuda"))
    loss.backward()
    assert torch.isfinite(loss)
