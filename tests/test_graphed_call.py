"""Captured calls with several outputs and shapes against eager ones."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lit_common.graph import GraphedCall
from lit_detr.losses import DetectionLoss
from lit_detr.matching import Matcher
from lit_detr.models import build_network
from lit_detr.samples import Output, Targets, pack_targets

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class Two(nn.Module):
    """Two outputs that need a gradient and one that does not; one parameter is used for long inputs alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)
        self.long = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
        hidden = self.a(x).relu() * scale
        if len(x) > 4:
            hidden = hidden * self.long
        return hidden, self.b(hidden), hidden.argmax(-1)


def gradients(network):
    return [None if p.grad is None else p.grad.clone() for p in network.parameters()]


def test_shapes_options_and_accumulation():
    torch.manual_seed(0)
    network = Two().cuda()
    twin = copy.deepcopy(network)
    graphed = GraphedCall(network, network, most=3)
    # The last is a fourth combination, which runs eagerly.
    calls = [(4, 1.0), (6, 1.0), (4, 2.0), (4, 1.0), (6, 1.0), (5, 1.0), (4, 1.0)]
    for accumulate in (1, 3):
        for n in range(len(calls) - accumulate + 1):
            for net in (network, twin):
                net.zero_grad()
            for size, scale in calls[n : n + accumulate]:
                x = torch.randn(size, 8, device="cuda")
                found, wanted = graphed(x, scale=scale), twin(x, scale=scale)
                for a, b in zip(found, wanted, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
                for outputs in (found, wanted):
                    # A part of the outputs may be all that a loss looks at.
                    (outputs[1].square().mean() + (outputs[0].mean() if size == 4 else 0)).backward()
            for a, b in zip(gradients(network), gradients(twin), strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert len(graphed._captures) == 3


def targets_of(counts, seed):
    g = torch.Generator().manual_seed(seed)
    boxes = [torch.cat([torch.rand(n, 2, generator=g), 0.02 + 0.1 * torch.rand(n, 2, generator=g)], 1) for n in counts]
    labels = [torch.randint(0, 3, (n,), generator=g) for n in counts]
    return pack_targets(boxes, labels).to(torch.device("cuda"))


def test_a_detector_learns_the_same():
    """The whole step, denoising with its random numbers included, for two widths of targets and two budgets."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    options: dict[str, Any] = {"hidden": 64, "heads": 4, "feedforward": 64, "decoder_layers": 2, "noise_queries": 20}
    network = build_network(num_classes=3, backbone="resnet10t", **options).cuda().train()
    twin = copy.deepcopy(network)
    criterion = DetectionLoss(Matcher()).cuda()

    def call(net):
        def outputs(image, boxes, labels, lengths, queries):
            return tuple(net(image, None, Targets(boxes, labels, lengths, []), queries))

        return outputs

    graphed, eager = GraphedCall(call(network), network), call(twin)
    for step, (counts, queries) in enumerate(
        [((3, 0), 50), ((40, 1), 100), ((1, 2), 50), ((0, 0), 50), ((35, 7), 100)]
    ):
        targets = targets_of(counts, step)
        image = torch.rand(2, 3, 128, 160, device="cuda")
        twin.load_state_dict(network.state_dict())
        losses = []
        for net, run in ((network, graphed), (twin, eager)):
            net.zero_grad()
            torch.manual_seed(step)
            output = Output(*run(image, targets.boxes, targets.labels, targets.lengths, queries=queries))
            loss = criterion(output, targets, (128, 160))["loss"]
            loss.backward()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-4)
        total = torch.stack([p.grad.norm() for p in twin.parameters() if p.grad is not None]).norm()
        for (name, p), q in zip(network.named_parameters(), twin.parameters(), strict=True):
            if q.grad is not None:
                assert p.grad is not None, name
                assert (p.grad - q.grad).norm() < 1e-2 * total, (step, name)
        with torch.no_grad():
            for p in network.parameters():
                p -= 0.01 * p.grad if p.grad is not None else 0
