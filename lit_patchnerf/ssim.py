"""Structural similarity of images from 0 to 1, per sample: SSIM and its multi-scale form.

Two conventions about the border are offered, since they change the third decimal of published figures:

- `valid`, the default, is that of pytorch_msssim, which HNeRV and its successors report: only windows that lie within
  the image count, an odd side is padded by zeros at both ends before it is halved, and the scales of MS-SSIM are
  multiplied for each channel by itself.
- `reflect` is that of torchmetrics: the image is mirrored at its border, but the contrast terms of MS-SSIM take valid
  windows; an odd side loses its last row, and channels are averaged before the scales are multiplied.

Everything is computed in float32 (float64 for float64 images), under autocast too: variances are small differences of
large numbers. Nothing waits for the device or copies to it, so that a step can be captured.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_cli.errors import InputError

__all__ = ["BETAS", "Border", "fitting_scales", "ms_ssim", "smallest_side", "ssim"]

Border = Literal["valid", "reflect"]

BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
C1, C2 = 0.01**2, 0.03**2
# A power below 1 has no finite slope at 0, where the references have NaN as gradient: a scale counts at least this.
FLOOR = 1e-6


def ssim(
    prediction: Tensor,
    target: Tensor,
    *,
    window: int = 11,
    sigma: float = 1.5,
    border: Border = "valid",
    weight: Tensor | None = None,
) -> Tensor:
    """Mean structural similarity of each sample.

    Args:
        prediction: (N, C, H, W), 0 to 1, any floating type.
        target: Likewise.
        window: Side of the Gaussian window, odd. The references' is 11; HiNeRV trains with 5.
        sigma: Its standard deviation in pixels.
        border: See the module.
        weight: (N, 1, H, W) from 0 to 1. Both images are multiplied by it, so that nothing leaks from where it is 0,
            and a window counts by the weight within it. Only with `valid`.

    Returns:
        (N,) float32, at most 1; 0 for a sample without any weight.

    Raises:
        InputError: The image is smaller than the window.
        ValueError: Shapes differ, or an option is none of those above.

    Source:
        Wang et al., Image quality assessment: from error visibility to structural similarity, 2004.

    Example:
        >>> image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> ssim(image, image).tolist()
        [1.0, 1.0]
        >>> bool((ssim(image, 1 - image) < 0).all())
        True
    """
    _check(prediction, target, window, border, weight)
    if min(prediction.shape[-2:]) < window:
        raise InputError(
            f"ssim: an image of {prediction.shape[-2]} x {prediction.shape[-1]} is smaller than the window, expected "
            f"sides of at least {window}"
        )
    with torch.autocast(prediction.device.type, enabled=False):
        x, y = _wide(prediction), _wide(target)
        if weight is not None:
            weight = weight.to(x.dtype)
            x, y = x * weight, y * weight
        if border == "reflect":
            x, y = _mirrored(x, window), _mirrored(y, window)
        similarity, _ = _maps(x, y, window, sigma)
        return _average(similarity, _window_weight(weight, window, sigma)).mean(1)


def ms_ssim(
    prediction: Tensor,
    target: Tensor,
    *,
    window: int = 11,
    sigma: float = 1.5,
    scales: int = 5,
    border: Border = "valid",
    weight: Tensor | None = None,
) -> Tensor:
    """Multi-scale structural similarity of each sample.

    Like both references it refuses an image that is too small for the scales. Fewer of them are the caller's choice,
    as the figures are then others: the first exponents, scaled to the same sum.

    Args:
        prediction: (N, C, H, W), 0 to 1, any floating type.
        target: Likewise.
        window: As in `ssim`.
        sigma: Likewise.
        scales: 1 to 5; 5 is the standard.
        border: See the module.
        weight: As in `ssim`; halved along with the images.

    Returns:
        (N,) float32, 0 to 1. A scale whose similarity is below 1e-6 counts as 1e-6, so that gradients stay finite.

    Raises:
        InputError: The image is too small, `smallest_side` says for what.
        ValueError: Shapes differ, or an option is none of those above.

    Source:
        Wang et al., Multi-scale structural similarity for image quality assessment, 2003.

    Example:
        >>> image = torch.rand(1, 3, 192, 192, generator=torch.Generator().manual_seed(0))
        >>> bool(ms_ssim(image, 0.9 * image) > 0.98), smallest_side(), smallest_side(window=5)
        (True, 161, 65)
    """
    _check(prediction, target, window, border, weight)
    least = smallest_side(window, scales, border)
    if min(prediction.shape[-2:]) < least:
        raise InputError(
            f"ms_ssim: an image of {prediction.shape[-2]} x {prediction.shape[-1]} is too small for {scales} scales of "
            f"a window of {window}, expected sides of at least {least}, a smaller window or fewer scales"
        )
    with torch.autocast(prediction.device.type, enabled=False):
        x, y = _wide(prediction), _wide(target)
        if weight is not None:
            weight = weight.to(x.dtype)
            x, y = x * weight, y * weight
        result: Tensor | None = None
        total = sum(BETAS[:scales]) / sum(BETAS)
        for scale, beta in enumerate(BETAS[:scales]):
            last = scale == scales - 1
            if border == "reflect" and last:
                x, y = _mirrored(x, window), _mirrored(y, window)
            similarity, contrast = _maps(x, y, window, sigma)
            value = _average(similarity if last else contrast, _window_weight(weight, window, sigma))
            if border == "reflect":
                value = value.mean(1, keepdim=True)
            factor = value.clamp_min(FLOOR) ** (beta / total)
            result = factor if result is None else result * factor
            if not last:
                x, y = _halved(x, border), _halved(y, border)
                weight = None if weight is None else _halved(weight, border)
        assert result is not None
        return result.mean(1)


def smallest_side(window: int = 11, scales: int = 5, border: Border = "valid") -> int:
    """The smallest side of an image that `ms_ssim` takes.

    Raises:
        ValueError: `scales` is not 1 to 5.

    >>> smallest_side(), smallest_side(border="reflect"), smallest_side(scales=3)
    (161, 176, 41)
    """
    if not 1 <= scales <= len(BETAS):
        raise ValueError(f"scales is {scales}, expected 1 to {len(BETAS)}")
    halvings = 2 ** (scales - 1)
    return window * halvings if border == "reflect" else (window - 1) * halvings + 1


def fitting_scales(height: int, width: int, window: int = 11) -> int:
    """How many scales an image has room for, 0 to 5.

    >>> fitting_scales(320, 320), fitting_scales(80, 120), fitting_scales(8, 8)
    (5, 3, 0)
    """
    return sum(min(height, width) >= smallest_side(window, scales) for scales in range(1, len(BETAS) + 1))


def _check(prediction: Tensor, target: Tensor, window: int, border: Border, weight: Tensor | None) -> None:
    if prediction.ndim != 4 or prediction.shape != target.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)}: expected both as (N, C, H, W)"
        )
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window is {window}, expected an odd number")
    if border not in ("valid", "reflect"):
        raise ValueError(f"border is {border!r}, expected valid or reflect")
    if weight is None:
        return
    if border == "reflect":
        raise ValueError("weight: expected border valid with it, got reflect")
    if weight.shape != (len(prediction), 1, *prediction.shape[-2:]):
        raise ValueError(f"weight of shape {tuple(weight.shape)}: expected (N, 1, H, W) of {tuple(prediction.shape)}")


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _filtered(x: Tensor, window: int, sigma: float) -> Tensor:
    """Gaussian means over all windows within (N, C, H, W): (N, C, H - window + 1, W - window + 1)."""
    # Made on the device: a copy from the host would wait, and could not be captured.
    at = torch.arange(window, dtype=x.dtype, device=x.device) - window // 2
    kernel = torch.exp(-(at**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, 1, window)
    x = F.conv2d(x, kernel, groups=x.shape[1])
    return F.conv2d(x, kernel.transpose(2, 3), groups=x.shape[1])


def _maps(x: Tensor, y: Tensor, window: int, sigma: float) -> tuple[Tensor, Tensor]:
    """Similarity and its factor of contrast and structure, for every valid window and channel."""
    channels = x.shape[1]
    x, y = x - 0.5, y - 0.5  # variances are the same, and lose fewer digits to the squares of the means
    # Four maps suffice, as the two variances occur only as their sum. They are channels of one contiguous tensor: so
    # the convolution is a depthwise one in NCHW, which torch computes itself in float32, where cuDNN would take TF32.
    maps = torch.cat([x, y, x * x + y * y, x * y], 1).contiguous()
    mean_x, mean_y, square, product = _filtered(maps, window, sigma).split(channels, 1)
    covariance, variances = product - mean_x * mean_y, square - mean_x * mean_x - mean_y * mean_y
    contrast = (2 * covariance + C2) / (variances + C2)
    mean_x, mean_y = mean_x + 0.5, mean_y + 0.5
    return (2 * mean_x * mean_y + C1) / (mean_x * mean_x + mean_y * mean_y + C1) * contrast, contrast


def _mirrored(x: Tensor, window: int) -> Tensor:
    half = window // 2
    return F.pad(x, (half, half, half, half), mode="reflect")


def _halved(x: Tensor, border: Border) -> Tensor:
    odd = (x.shape[-2] % 2, x.shape[-1] % 2) if border == "valid" else 0
    return F.avg_pool2d(x, 2, padding=odd)


def _window_weight(weight: Tensor | None, window: int, sigma: float) -> Tensor | None:
    """The weight within each window."""
    # Twice, since a depthwise convolution needs two channels; see `_maps`.
    return None if weight is None else _filtered(weight.expand(-1, 2, -1, -1).contiguous(), window, sigma)[:, :1]


def _average(values: Tensor, weight: Tensor | None) -> Tensor:
    """(N, C) mean over the windows."""
    if weight is None:
        return values.mean((2, 3))
    total = weight.sum((2, 3)).clamp_min(torch.finfo(values.dtype).tiny)
    return (values * weight).sum((2, 3)) / total
