"""SSIM and MS-SSIM against loops over windows, torchmetrics, and formulas written out; gradients, weights, limits."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure as tm_ms_ssim,
)
from torchmetrics.functional.image import structural_similarity_index_measure as tm_ssim

from lit_cli.errors import InputError
from lit_patchnerf.ssim import BETAS, fitting_scales, ms_ssim, smallest_side, ssim


def images(size=(24, 30), samples=2, channels=3, noise=0.1, seed=0, dtype=torch.float32):
    """Smooth images and noisy copies of them: the similarity of each scale is well above 0."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(samples, channels, 6, 6, generator=g)
    target = torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1)
    prediction = (target + noise * torch.randn(target.shape, generator=g)).clamp(0, 1)
    return prediction.to(dtype), target.to(dtype)


def loops(x, y, window, sigma):
    """Similarity and contrast of every window of two float64 planes, one at a time."""
    at = np.arange(window) - window // 2
    kernel = np.exp(-(at[:, None] ** 2 + at**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    rows, columns = x.shape[0] - window + 1, x.shape[1] - window + 1
    similarity, contrast = np.zeros((rows, columns)), np.zeros((rows, columns))
    for r in range(rows):
        for c in range(columns):
            a, b = x[r : r + window, c : c + window], y[r : r + window, c : c + window]
            mean_a, mean_b = (kernel * a).sum(), (kernel * b).sum()
            var_a, var_b = (kernel * (a - mean_a) ** 2).sum(), (kernel * (b - mean_b) ** 2).sum()
            covariance = (kernel * (a - mean_a) * (b - mean_b)).sum()
            contrast[r, c] = (2 * covariance + 9e-4) / (var_a + var_b + 9e-4)
            similarity[r, c] = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4) * contrast[r, c]
    return similarity, contrast


def slow_ms_ssim(x, y, window, sigma, scales):
    """One plane, with zeros around an odd side before it is halved."""
    result = 1.0
    for scale in range(scales):
        similarity, contrast = loops(x, y, window, sigma)
        value = (similarity if scale == scales - 1 else contrast).mean()
        result *= max(value, 0) ** (BETAS[scale] * sum(BETAS) / sum(BETAS[:scales]))
        x, y = (np.pad(z, [(side % 2, side % 2) for side in z.shape]) for z in (x, y))
        even = [side // 2 * 2 for side in x.shape]
        x, y = (z[: even[0], : even[1]].reshape(even[0] // 2, 2, even[1] // 2, 2).mean((1, 3)) for z in (x, y))
    return result


@pytest.mark.parametrize(("window", "sigma"), [(11, 1.5), (5, 1.5)])
def test_ssim_is_the_mean_over_windows(window, sigma):
    x, y = images((17, 14))
    expected = [
        np.mean(
            [loops(a.double().numpy(), b.double().numpy(), window, sigma)[0].mean() for a, b in zip(p, t, strict=True)]
        )
        for p, t in zip(x, y, strict=True)
    ]
    value = ssim(x, y, window=window, sigma=sigma)
    assert value.shape == (2,)
    np.testing.assert_allclose(value.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(("window", "sigma"), [(11, 1.5), (5, 0.6)])
@pytest.mark.parametrize("noise", [0.02, 0.3])
def test_ssim_is_that_of_torchmetrics(window, sigma, noise):
    x, y = images((33, 40), noise=noise)
    options = {"sigma": sigma, "data_range": 1.0}
    expected = tm_ssim(x, y, reduction="none", **options)
    torch.testing.assert_close(ssim(x, y, window=window, sigma=sigma, border="reflect"), expected, atol=1e-5, rtol=0)
    _, full = tm_ssim(x, y, return_full_image=True, **options)
    half = window // 2
    inner = full[..., half:-half, half:-half].mean((1, 2, 3))
    torch.testing.assert_close(ssim(x, y, window=window, sigma=sigma), inner, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(176, 200), (191, 177)])
def test_ms_ssim_is_that_of_torchmetrics(size):
    x, y = images(size)
    expected = tm_ms_ssim(x, y, data_range=1.0, reduction="none")
    torch.testing.assert_close(ms_ssim(x, y, border="reflect"), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("window", "scales"), [(5, 4), (3, 3)])
@pytest.mark.parametrize("size", [(40, 48), (37, 43)])
def test_ms_ssim_with_valid_windows_is_that_of_loops(window, scales, size):
    x, y = images(size, samples=1, channels=2)
    planes = [
        slow_ms_ssim(a.double().numpy(), b.double().numpy(), window, 1.5, scales)
        for a, b in zip(x[0], y[0], strict=True)
    ]
    value = ms_ssim(x, y, window=window, scales=scales)
    assert value.item() == pytest.approx(np.mean(planes), abs=1e-5)


def test_the_exponents_are_the_published_ones():
    """A constant image against a scaled one: contrast 1 at all scales, so only the last luminance counts."""
    x, y = (torch.full((1, 1, 176, 176), level, dtype=torch.float64) for level in (0.8, 0.4))
    luminance = (2 * 0.32 + 1e-4) / (0.64 + 0.16 + 1e-4)
    assert ms_ssim(x, y).item() == pytest.approx(luminance**0.1333, abs=1e-9)
    assert ssim(x, y).item() == pytest.approx(luminance, abs=1e-9)


def test_samples_do_not_meet():
    x, y = images(samples=3)
    torch.testing.assert_close(ssim(x, y), torch.cat([ssim(x[i : i + 1], y[i : i + 1]) for i in range(3)]))


def test_gradients():
    x, y = (t.requires_grad_() for t in images((12, 13), samples=1, channels=2, dtype=torch.float64))
    assert gradcheck(lambda a, b: ssim(a, b, window=5), (x, y))
    assert gradcheck(lambda a, b: ms_ssim(a, b, window=5, scales=2), (x, y))


def test_opposite_images_have_finite_gradients():
    y = images((40, 40), samples=1)[1]
    x = (1 - y).requires_grad_()
    value = ms_ssim(x, y, window=5, scales=3)
    value.sum().backward()
    assert 0 <= value.item() < 0.2
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_identical_black_images_are_equal():
    x = torch.zeros(1, 3, 65, 65, requires_grad=True)
    value = ms_ssim(x, torch.zeros(1, 3, 65, 65), window=5)
    value.sum().backward()
    assert value.item() == 1
    assert torch.isfinite(x.grad).all()


def test_autocast_changes_nothing():
    x, y = images((70, 70))
    with torch.autocast("cpu", torch.bfloat16):
        inside = ssim(x, y), ms_ssim(x, y, window=5)
    torch.testing.assert_close(inside, (ssim(x, y), ms_ssim(x, y, window=5)), rtol=0, atol=0)
    half = ssim(x.bfloat16(), y.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, ssim(x.bfloat16().float(), y.bfloat16().float()), rtol=0, atol=0)


def test_memory_format_changes_nothing():
    x, y = images((70, 70))
    x_last, y_last = (t.contiguous(memory_format=torch.channels_last) for t in (x, y))
    torch.testing.assert_close(ms_ssim(x_last, y_last, window=5), ms_ssim(x, y, window=5))


def test_a_full_weight_changes_nothing():
    x, y = images((41, 43))
    ones = torch.ones(2, 1, 41, 43)
    torch.testing.assert_close(ssim(x, y, weight=ones), ssim(x, y))
    even = images((40, 48))
    ones = torch.ones(2, 1, 40, 48)
    torch.testing.assert_close(ms_ssim(*even, window=5, scales=3, weight=ones), ms_ssim(*even, window=5, scales=3))


@pytest.mark.parametrize("function", [ssim, lambda *a, **k: ms_ssim(*a, window=5, scales=3, **k)], ids=["ssim", "ms"])
def test_nothing_leaks_from_where_the_weight_is_0(function):
    x, y = images((48, 48), samples=1)
    weight = torch.ones(1, 1, 48, 48)
    weight[..., 10:30, 12:40] = 0
    hidden = (1 - weight) * torch.rand(1, 1, 48, 48)
    x = x.requires_grad_()
    value = function(x, y, weight=weight)
    torch.testing.assert_close(value, function(x, y + hidden, weight=weight), rtol=0, atol=0)
    value.sum().backward()
    assert (x.grad[(weight == 0).expand(1, 3, -1, -1)] == 0).all()
    assert (x.grad[..., :8, :8] != 0).any()
    far = torch.zeros(1, 1, 48, 48)
    far[..., :20, :20] = 1
    if function is ssim:  # windows without weight have no part in the mean
        assert function(y, y, weight=far).item() == pytest.approx(1, abs=1e-6)
        assert function(x, y, weight=far).item() < 0.95


def test_no_weight_at_all():
    x, y = images(samples=1)
    assert ssim(x, y, weight=torch.zeros(1, 1, 24, 30)).item() == 0


def test_what_is_too_small_is_refused():
    for border, least in (("valid", 161), ("reflect", 176)):
        assert smallest_side(border=border) == least
        x = torch.rand(1, 1, least, least + 3)
        assert torch.isfinite(ms_ssim(x, x, border=border)).all()
        with pytest.raises(InputError, match=f"at least {least}") as error:
            ms_ssim(x[..., 1:, :], x[..., 1:, :], border=border)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="must be larger than"):  # torchmetrics refuses at the same size
        tm_ms_ssim(torch.rand(1, 1, 175, 200), torch.rand(1, 1, 175, 200), data_range=1.0)
    x = torch.rand(1, 1, 10, 20)
    with pytest.raises(InputError, match="at least 11"):
        ssim(x, x)
    assert fitting_scales(160, 400) == 4
    assert fitting_scales(65, 65, window=5) == 5


@pytest.mark.parametrize(
    ("change", "word"),
    [({"window": 4}, "window"), ({"border": "same"}, "border"), ({"weight": torch.ones(2, 3, 24, 30)}, "weight")],
)
def test_wrong_options_are_named(change, word):
    with pytest.raises(ValueError, match=word):
        ssim(*images(), **change)
    with pytest.raises(ValueError, match="border valid"):
        ssim(*images(), border="reflect", weight=torch.ones(2, 1, 24, 30))
    with pytest.raises(ValueError, match="target"):
        ssim(images()[0], images()[1][:1])
    with pytest.raises(ValueError, match="scales"):
        smallest_side(scales=6)


def test_one_graph():
    x, y = images((24, 24))
    compiled = torch.compile(
        lambda a, b: ssim(a, b) + ms_ssim(a, b, window=5, scales=3), backend="eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(x, y), ssim(x, y) + ms_ssim(x, y, window=5, scales=3))
