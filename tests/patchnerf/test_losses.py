"""Losses against their formulas written out, transforms by numpy, weights, gradients and the warm-up."""

from typing import get_args

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.functional.image import structural_similarity_index_measure

from lit_cli.errors import InputError
from lit_patchnerf.losses import FORMULAS, ClipLoss, LossName, PixelLoss, frequency_error, make_loss, warmup_factor
from lit_patchnerf.ssim import ms_ssim

SMALL = {"window": 5, "scales": 3}


def images(size=(48, 50), samples=2, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(samples, 3, 6, 6, generator=g)
    target = F.interpolate(coarse, size, mode="bicubic").clamp(0, 1)
    return (target + 0.1 * torch.randn(target.shape, generator=g)).clamp(0, 1).to(dtype), target.to(dtype)


def similarity(x, y):
    """SSIM with valid windows of 11, from torchmetrics' map."""
    full = structural_similarity_index_measure(x, y, data_range=1.0, return_full_image=True)[1]
    return full[..., 5:-5, 5:-5].mean((1, 2, 3))


def spectrum(x, y):
    f = np.fft.fft2(x.double().numpy()) - np.fft.fft2(y.double().numpy())
    return torch.from_numpy((np.abs(f.real) + np.abs(f.imag)).mean((1, 2, 3)) / 2)


# HNeRV's formulas as functions of L1, L2, S, M and the spectrum.
WRITTEN = {
    "L2": lambda a, b, s, m, f: b,
    "L1": lambda a, b, s, m, f: a,
    "SSIM": lambda a, b, s, m, f: 1 - s,
    "ms_ssim": lambda a, b, s, m, f: 1 - m,
    "Fusion1": lambda a, b, s, m, f: 0.3 * b + 0.7 * (1 - s),
    "Fusion2": lambda a, b, s, m, f: 0.3 * a + 0.7 * (1 - s),
    "Fusion3": lambda a, b, s, m, f: 0.5 * b + 0.5 * (1 - s),
    "Fusion4": lambda a, b, s, m, f: 0.5 * a + 0.5 * (1 - s),
    "Fusion5": lambda a, b, s, m, f: 0.7 * b + 0.3 * (1 - s),
    "Fusion6": lambda a, b, s, m, f: 0.7 * a + 0.3 * (1 - s),
    "Fusion7": lambda a, b, s, m, f: 0.7 * b + 0.3 * a,
    "Fusion8": lambda a, b, s, m, f: 0.5 * b + 0.5 * a,
    "Fusion9": lambda a, b, s, m, f: 0.9 * a + 0.1 * (1 - s),
    "Fusion10": lambda a, b, s, m, f: 0.7 * a + 0.3 * (1 - m),
    "Fusion11": lambda a, b, s, m, f: 0.9 * a + 0.1 * (1 - m),
    "Fusion12": lambda a, b, s, m, f: 0.8 * a + 0.2 * (1 - m),
    "L1_freq": lambda a, b, s, m, f: 60 * a + f,
    "L1_ssim_freq": lambda a, b, s, m, f: 60 * (0.7 * a + 0.3 * (1 - s)) + f,
    "Fusion10_freq": lambda a, b, s, m, f: 60 * (0.7 * a + 0.3 * (1 - m)) + f,
}


@pytest.fixture(scope="module")
def large():
    """The images with each term of them."""
    x, y = images((170, 165))
    l1, l2 = (x - y).abs().mean((1, 2, 3)), (x - y).square().mean((1, 2, 3))
    return x, y, (l1, l2, similarity(x, y), ms_ssim(x, y), spectrum(x, y).float())


@pytest.mark.parametrize("name", WRITTEN)
def test_losses_are_their_formulas(name, large):
    x, y, terms = large
    loss = make_loss(name)
    expected = WRITTEN[name](*terms)
    torch.testing.assert_close(loss.per_sample(x, y), expected, rtol=1e-5, atol=1e-5)
    assert loss(x, y).shape == ()
    assert loss(x, y).item() == pytest.approx(expected.mean().item(), rel=1e-5, abs=1e-5)
    assert not loss.state_dict()


def test_every_name_has_a_formula():
    assert tuple(FORMULAS) == get_args(LossName)
    assert {name.lower() for name in WRITTEN} | {"charbonnier"} == set(FORMULAS)


def test_charbonnier():
    x, y = images()
    expected = ((x - y).double().square() + 1e-6).sqrt().mean()
    assert make_loss("charbonnier")(x, y).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("size", [(8, 10), (7, 9), (5, 8)])
def test_half_a_spectrum_is_as_good_as_the_whole(size):
    x, y = images(size)
    torch.testing.assert_close(frequency_error(x, y).double(), spectrum(x, y), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["l2", "charbonnier", "fusion6", "fusion10", "fusion10_freq"])
def test_gradients(name):
    x, y = images((11, 12), samples=1, dtype=torch.float64)
    weight = torch.rand(1, 1, 11, 12, dtype=torch.float64)
    loss = make_loss(name, window=5, scales=2)
    assert gradcheck(lambda a: loss(a, y), (x.requires_grad_(),), fast_mode=True)
    assert gradcheck(lambda a: loss(a, y, weight), (x,), fast_mode=True)


@pytest.mark.parametrize("name", FORMULAS)
def test_weights(name):
    x, y = images(size=(48, 48))
    loss = make_loss(name, **SMALL)
    ones = torch.ones(2, 1, 48, 48)
    torch.testing.assert_close(loss(x, y, ones), loss(x, y), rtol=1e-5, atol=1e-6)
    weight = ones.clone()
    weight[:, :, 12:32, 20:44] = 0
    hidden = (weight == 0).expand(-1, 3, -1, -1)
    x.requires_grad_()
    value = loss(x, y, weight)
    value.backward()
    assert (x.grad[hidden] == 0).all()
    assert (x.grad[~hidden] != 0).any()
    torch.testing.assert_close(loss(x, y.masked_fill(hidden, 0.123), weight), value, rtol=0, atol=0)


def test_weighted_errors_are_means_over_what_is_seen():
    x, y = images()
    weight = (torch.rand(2, 1, 48, 50, generator=torch.Generator().manual_seed(1)) < 0.4).float()
    seen = weight.bool().expand(-1, 3, -1, -1)
    expected = torch.stack([(x - y).abs()[i][seen[i]].mean() for i in range(2)])
    torch.testing.assert_close(make_loss("l1").per_sample(x, y, weight), expected)
    assert make_loss("l1")(x, y, torch.zeros_like(weight)).item() == 0


def test_float32_under_autocast():
    x, y = images()
    for name in FORMULAS:
        loss = make_loss(name, **SMALL)
        with torch.autocast("cpu", torch.bfloat16):
            inside = loss(x, y)
        torch.testing.assert_close(inside, loss(x, y), rtol=0, atol=0)
        assert loss(x.bfloat16(), y).dtype == torch.float32


def test_nothing_waits_or_copies():
    """No read of a value by the host, and no tensor made from the host's numbers."""

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh")
            assert not any(name in str(func) for name in names), func
            return func(*args, **(kwargs or {}))

    x, y = images()
    weight = torch.ones(2, 1, 48, 50)
    embeddings, progress = torch.rand(2, 8), torch.tensor(0.3)
    clip = ClipLoss(ramp=0.5)
    losses = [make_loss(name, **SMALL) for name in ("fusion10_freq", "fusion6", "charbonnier")]
    with Recorder():
        for loss in losses:
            loss(x.requires_grad_(), y, weight).backward()
        clip(embeddings, embeddings, progress)


def test_one_graph():
    x, y = images()
    loss = make_loss("fusion10_freq", **SMALL)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, y), loss(x, y))


def test_wrong_input_is_named():
    with pytest.raises(InputError, match=r"^model\.loss is 'fusion13', expected one of l2, .*fusion12"):
        make_loss("fusion13")
    for options, word in (({"window": 4}, "model.ssim_window"), ({"scales": 6}, "model.ssim_scales")):
        with pytest.raises(InputError, match=word):
            make_loss("l1", **options)
    with pytest.raises(InputError, match=r"model\.loss"):
        PixelLoss({"l3": 1.0})
    with pytest.raises(InputError, match="epsilon"):
        PixelLoss({"charbonnier": 1.0}, epsilon=0.0)
    with pytest.raises(ValueError, match="target"):
        make_loss("l1")(torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8))


def test_small_patches_are_refused_before_training():
    make_loss("fusion10").check_size(161, 400)
    with pytest.raises(InputError, match=r"at least 161 .*160 x 320.*data\.patch"):
        make_loss("fusion10").check_size(160, 320)
    make_loss("fusion10", window=5, scales=3).check_size(17, 17)
    with pytest.raises(InputError, match=r"window of 11.*10 x 80"):
        make_loss("fusion6").check_size(10, 80)
    make_loss("l2").check_size(1, 1)


# Embeddings


def test_clip_loss_is_the_mean_cosine():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 16, generator=g), torch.randn(5, 16, generator=g)
    expected = 1 - np.mean([(a @ b / (a.norm() * b.norm())).item() for a, b in zip(x, y, strict=True)])
    assert ClipLoss(0.2)(x, y).item() == pytest.approx(0.2 * expected, rel=1e-5)
    torch.testing.assert_close(ClipLoss(0.2)(3 * x, 0.1 * y), ClipLoss(0.2)(x, y))
    with torch.autocast("cpu", torch.bfloat16):
        assert ClipLoss(0.2)(x, y).item() == pytest.approx(0.2 * expected, rel=1e-5)
    assert gradcheck(ClipLoss(0.2), (x.double().requires_grad_(), y.double()))
    zero = torch.zeros(5, 16, requires_grad=True)
    ClipLoss()(zero, y).backward()
    assert torch.isfinite(zero.grad).all()


def test_the_warm_up_is_a_switch_at_a_sixth():
    x, y = torch.eye(2), -torch.eye(2)
    values = [ClipLoss(0.1)(x, y, epoch / 300).item() for epoch in (0, 49, 50, 299)]
    assert values == pytest.approx([0, 0, 0.2, 0.2])


@pytest.mark.parametrize("ramp", [0.0, 0.1, 0.5])
def test_the_warm_up_is_the_same_for_numbers_and_tensors(ramp):
    for progress in np.linspace(0, 1, 23):
        number = warmup_factor(float(progress), 0.21, ramp)
        tensor = warmup_factor(torch.tensor(progress), 0.21, ramp)
        assert 0 <= number <= 1
        assert number == pytest.approx(tensor.item())
    assert warmup_factor(0.2, 0.21, ramp) == 0
    assert warmup_factor(0.75, 0.21, ramp) == 1


@pytest.mark.parametrize(("options", "field"), [({"factor": -1}, "clip_weight"), ({"start": 2}, "clip_start")])
def test_wrong_clip_options_are_named(options, field):
    with pytest.raises(InputError, match=rf"model\.{field}"):
        ClipLoss(**options)
    with pytest.raises(InputError, match=r"model\.clip_ramp"):
        ClipLoss(ramp=-0.1)
    with pytest.raises(ValueError, match=r"\(N, D\)"):
        ClipLoss()(torch.zeros(3), torch.zeros(3))
