"""The kernels in Triton's interpreter and on a GPU."""

from pathlib import Path

import pytest
import torch

from lit_dsunet.models import build_network
from lit_dsunet.models import channels_last as cl
from tests.helpers.interpreter import passes_in_the_interpreter, passes_on_the_gpu

CASES = Path(__file__).with_name("channels_last_cases.py")


def test_in_the_interpreter():
    passes_in_the_interpreter(CASES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    passes_on_the_gpu(CASES)


def test_elsewhere_torch_does_it():
    x = torch.randn(1, 1, 8, 8, 8)
    assert not cl.usable(x)
    torch.manual_seed(0)
    ours = build_network(in_channels=1, num_classes=2, strides=[1, 2], features=[4, 8], channels_last=True)
    torch.manual_seed(0)
    plain = build_network(in_channels=1, num_classes=2, strides=[1, 2], features=[4, 8])
    torch.testing.assert_close(ours(x), plain(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_a_gpu_is_near_float32_and_waits_for_nothing(dtype):
    """Nearer than torch's own half precision, or as near."""
    torch.manual_seed(0)
    options = {"in_channels": 1, "num_classes": 2, "strides": [1, 2, 2], "features": [32, 64, 80]}
    exact = build_network(**options).cuda().double()
    ours = build_network(**options, channels_last=True).cuda()
    plain = build_network(**options).cuda()
    for network in (ours, plain):
        network.load_state_dict({k: v.float() for k, v in exact.state_dict().items()})
    x = torch.randn(2, 1, 32, 32, 32, device="cuda")
    expected = exact(x.double())
    expected.square().mean().backward()
    errors = []
    for network in (ours, plain):
        network(x)  # what is built at first may wait
        network.zero_grad()
        torch.cuda.set_sync_debug_mode("error" if network is ours else "default")
        try:
            with torch.autocast("cuda", dtype):
                out = network(x)
            (1024 * out.float().square().mean()).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        pairs = [(out, expected)]
        pairs += [
            (p.grad / 1024, q.grad)
            for p, q in zip(network.parameters(), exact.parameters(), strict=True)
            if q.grad is not None and q.grad.norm() > 1e-9
        ]
        errors.append([float((a.double() - b).norm() / b.norm()) for a, b in pairs])
    assert max(errors[0]) < max(1.3 * max(errors[1]), 0.05), errors
