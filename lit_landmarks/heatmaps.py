"""Heatmap codec: landmark coordinates to Gaussian maps and back, batched, in plain torch.

Conventions shared by every function here:

* Pixel centres lie at integers, x comes first, and a scaling by s takes x to (x + 0.5) * s - 0.5. A frame of width W
  therefore covers [-0.5, W - 0.5). `to_heatmap` and `from_heatmap` are the only places where the stride enters.
* The options of the task and of the command line give sigma in **input pixels**. These functions see heatmaps only, so
  their sigma is in **heatmap pixels**: sigma / stride.
* The arithmetic is float32 whatever the input or an enclosing autocast region. Nothing waits for the device and no
  shape depends on values, so that a training step or a prediction can be captured in a CUDA graph or compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional

from lit_cli.errors import InputError

__all__ = [
    "DecodeMethod",
    "Decoded",
    "argmax",
    "auto_sigma",
    "centroid",
    "dark",
    "decode",
    "encode",
    "from_heatmap",
    "quarter",
    "softargmax",
    "to_heatmap",
    "visible",
]

DecodeMethod = Literal["dark", "centroid", "quarter", "argmax", "softargmax"]

_TINY = 1e-12  # keeps 0/0 and log(0) out without reaching any value that matters
_SUPPORT = (
    6.0  # sigmas: a Gaussian is below the rounding of its peak there; denormal numbers beyond would slow a CPU down
)
_REACH = 1.5  # heatmap px: a Taylor step that leaves the peak by more does not describe this peak


class Decoded(NamedTuple):
    """Landmarks read from heatmaps.

    Attributes:
        points: (B, K, 2) float32, x and y in heatmap pixels.
        score: (B, K) float32 in [0, 1], the highest value of each map, clamped. It is a confidence only as far as the
            maps peak at 1 where the network is sure, which `HeatmapLoss.activate` arranges.
        covariance: (B, K, 2, 2) float32, heatmap pixels squared, in the order x, y: the spread of the peak.
    """

    points: Tensor
    score: Tensor
    covariance: Tensor


def to_heatmap(points: Tensor, stride: float) -> Tensor:
    """Input pixels to heatmap pixels, any shape.

    >>> to_heatmap(torch.tensor([1.5, 5.5]), stride=4)
    tensor([0., 1.])
    """
    return (points + 0.5) / stride - 0.5


def from_heatmap(points: Tensor, stride: float) -> Tensor:
    """Heatmap pixels to input pixels, any shape; the inverse of `to_heatmap`.

    >>> from_heatmap(torch.tensor([0.0, 1.0]), stride=4)
    tensor([1.5000, 5.5000])
    """
    return (points + 0.5) * stride - 0.5


def auto_sigma(image_width: int) -> float:
    """Sigma in **input pixels** for an input of this width, growing with the resolution.

    The rule is 3.5 * width / 512 pixels of a stride-4 heatmap (1.75 at width 256, 2.6 at 384, 3.5 at 512), hence four
    times that in input pixels. Divide by the stride for `encode` and `decode`.

    >>> auto_sigma(512), auto_sigma(256) / 4
    (14.0, 1.75)
    """
    return 4 * 3.5 * image_width / 512


def visible(points: Tensor, size: tuple[int, int]) -> Tensor:
    """Which points lie inside a frame.

    Args:
        points: (..., 2), x and y in pixels of that frame. NaN marks a missing landmark.
        size: height and width of the frame.

    Returns:
        (...) bool, False for points outside [-0.5, W - 0.5) x [-0.5, H - 0.5) and for NaN.
    """
    x, y = points.unbind(-1)
    return (x >= -0.5) & (x < size[1] - 0.5) & (y >= -0.5) & (y < size[0] - 0.5)


def encode(points: Tensor, valid: Tensor, size: tuple[int, int], sigma: float | Tensor) -> Tensor:
    """Gaussian maps with the exact, sub-pixel centre, as the outer product of two 1-D Gaussians.

    Rounding the centre to a pixel would cost up to half a heatmap pixel per axis that no decoder can win back.

    Args:
        points: (B, K, 2), heatmap pixels. Values of points that are not valid are ignored, NaN included.
        valid: (B, K) bool. A point that is not valid gets a map of zeros.
        size: height h and width w of the maps.
        sigma: heatmap pixels; a tensor must broadcast to (B, K) and may require a gradient.

    Returns:
        (B, K, h, w) float32 with the value 1 at the centre, were there a pixel.
    """
    # The mask is applied to the coordinates as well: 0 * NaN would be NaN.
    points = torch.where(valid[..., None], points, 0.0).float()
    width = sigma.float().expand(valid.shape)[..., None] if isinstance(sigma, Tensor) else sigma
    rows = torch.arange(size[0], device=points.device, dtype=torch.float32)
    columns = torch.arange(size[1], device=points.device, dtype=torch.float32)
    along_x = _gaussian((columns - points[..., :1]) / width)
    along_y = _gaussian((rows - points[..., 1:]) / width) * valid[..., None]
    return along_y[..., :, None] * along_x[..., None, :]


def decode(heatmaps: Tensor, method: DecodeMethod = "dark", sigma: float = 2.0) -> Decoded:
    """Read one landmark per map.

    Args:
        heatmaps: (B, K, h, w) with h, w >= 3, after `HeatmapLoss.activate`: a peak on a background of about zero.
            The points do not depend on the scale of a map, the score does.
        method: `dark` is the most exact, see the function of each name.
        sigma: of the training targets, heatmap pixels.

    >>> maps = encode(torch.tensor([[[20.3, 11.8]]]), torch.ones(1, 1, dtype=torch.bool), (32, 48), sigma=2.0)
    >>> decode(maps, "dark", sigma=2.0).points
    tensor([[[20.3000, 11.8000]]])
    >>> decode(maps, "argmax", sigma=2.0).points
    tensor([[[20., 12.]]])
    """
    if method not in get_args(DecodeMethod):
        raise InputError(f"decode method: got {method!r}, expected one of {', '.join(get_args(DecodeMethod))}")
    return _DECODERS[method](heatmaps, sigma)


def argmax(heatmaps: Tensor, sigma: float) -> Decoded:
    """The pixel of the highest value: off by up to half a heatmap pixel per axis even without noise."""
    heatmaps = heatmaps.float()
    peak, highest = _peak(heatmaps)
    _, covariance = _moments(heatmaps, peak, sigma)
    return Decoded(peak.float(), _score(highest), covariance)


def quarter(heatmaps: Tensor, sigma: float) -> Decoded:
    """The highest pixel, moved a quarter pixel along each axis towards its larger neighbour.

    Source: the reference code of Newell et al., Stacked Hourglass Networks, 2016. No shift along an axis where the
    pixel has a neighbour on one side only.
    """
    heatmaps = heatmaps.float()
    peak, highest = _peak(heatmaps)
    patch, inside = _gather(heatmaps, peak, radius=1)
    difference = torch.stack((patch[..., 1, 2] - patch[..., 1, 0], patch[..., 2, 1] - patch[..., 0, 1]), -1)
    both = torch.stack((inside[..., 1, 2] & inside[..., 1, 0], inside[..., 2, 1] & inside[..., 0, 1]), -1)
    shift = torch.where(both, 0.25 * torch.sign(difference), 0.0)
    _, covariance = _moments(heatmaps, peak, sigma)
    return Decoded(peak + torch.where(torch.isfinite(shift), shift, 0.0), _score(highest), covariance)


def centroid(heatmaps: Tensor, sigma: float) -> Decoded:
    """Centre of mass of the window of radius 2 sigma around the highest pixel, negative values as zero.

    The window is cut off at the border, which pulls points nearby inwards.
    """
    heatmaps = heatmaps.float()
    peak, highest = _peak(heatmaps)
    points, covariance = _moments(heatmaps, peak, sigma)
    return Decoded(points, _score(highest), covariance)


def softargmax(heatmaps: Tensor, sigma: float, temperature: float = 0.25) -> Decoded:
    """Expectation of the coordinate over the whole map (Sun et al., Integral Human Pose Regression, 2018).

    The weights are max(h, 0) ** (1 / temperature). Temperature 1 is the plain expectation, which suits maps that a
    softmax produced; any background moves it to the middle of the map, so the default weighs the peak more.

    Args:
        heatmaps: (B, K, h, w).
        sigma: heatmap pixels, for the covariance only, which describes the window around the highest pixel.
        temperature: greater than 0.
    """
    heatmaps = heatmaps.float()
    peak, highest = _peak(heatmaps)
    scale = highest.clamp_min(_TINY)[..., None, None]
    weights = (heatmaps / scale).clamp_min(0) ** (1 / temperature)
    rows, columns = weights.sum(-1), weights.sum(-2)
    mass = rows.sum(-1)
    x = (columns * torch.arange(columns.shape[-1], device=columns.device)).sum(-1) / mass
    y = (rows * torch.arange(rows.shape[-1], device=rows.device)).sum(-1) / mass
    points = torch.stack((x, y), -1)
    _, covariance = _moments(heatmaps, peak, sigma)
    return Decoded(torch.where(torch.isfinite(points), points, peak), _score(highest), covariance)


def dark(heatmaps: Tensor, sigma: float) -> Decoded:
    """Blur by the Gaussian of the targets, then one Newton step on the logarithm at the highest pixel.

    Source: Zhang et al., Distribution-Aware Coordinate Representation for Human Pose Estimation, 2020. The logarithm of
    a Gaussian is quadratic, so the step -H^-1 g is exact without noise. Three things differ from the reference code:

    * The blur has the sigma of the target, which makes it a matched filter and its maximum the most likely position
      under white noise; the maximum is sought after the blur.
    * Each blurred value is divided by the norm of the part of the kernel that lies inside the map. A zero-padded blur
      pulls peaks inwards within 3 sigma of the border, the normalised one has its maximum at the true centre.
    * Where the Hessian is not negative definite or the step ends more than 1.5 px from the peak, the local centroid
      around that peak is taken.

    The covariance is -H^-1 less the variance of the blur: sigma^2 on the diagonal for a perfect map, wider along the
    direction in which a map is blurred, never less than a hundredth of sigma^2.
    """
    heatmaps = heatmaps.float()
    blurred = _matched_filter(heatmaps, sigma)
    peak, highest = _peak(blurred)
    # At the border the 3x3 patch moves inwards by one pixel, and the step may be that much longer.
    x = peak[..., 0].clamp(1, heatmaps.shape[-1] - 2)
    y = peak[..., 1].clamp(1, heatmaps.shape[-2] - 2)
    start = torch.stack((x, y), -1)
    patch, _ = _gather(blurred, start, radius=1)
    # The floor is relative to each map, so that the scale of a map does not matter.
    floor = (1e-6 * highest).clamp_min(_TINY)[..., None, None]
    offset, spread, good = _newton(torch.log(torch.maximum(patch, floor)))
    points = start + offset
    good = good & ((points - peak).abs() <= _REACH).all(-1)
    variance = sigma**2
    spread = _at_least(spread - variance * torch.eye(2, device=spread.device), 0.01 * variance)
    fallback, moments = _moments(heatmaps, peak, sigma)
    points = torch.where(good[..., None], points, fallback)
    return Decoded(points, _score(heatmaps.amax((-2, -1))), torch.where(good[..., None, None], spread, moments))


_DECODERS: dict[str, Callable[[Tensor, float], Decoded]] = {
    "dark": dark,
    "centroid": centroid,
    "quarter": quarter,
    "argmax": argmax,
    "softargmax": softargmax,
}


def _gaussian(distance: Tensor) -> Tensor:
    """exp(-d^2 / 2) of distances in sigmas, exactly zero beyond `_SUPPORT`."""
    return torch.where(distance.abs() <= _SUPPORT, torch.exp(-0.5 * distance**2), 0.0)


def _peak(heatmaps: Tensor) -> tuple[Tensor, Tensor]:
    """Position (B, K, 2) int64 in the order x, y and value (B, K) of the highest pixel."""
    highest, index = heatmaps.flatten(2).max(-1)
    width = heatmaps.shape[-1]
    return torch.stack((index % width, torch.div(index, width, rounding_mode="floor")), -1), highest


def _score(highest: Tensor) -> Tensor:
    """The value of the highest pixel as a score in [0, 1]; NaN becomes 0."""
    return torch.nan_to_num(highest).clamp(0, 1)


def _gather(heatmaps: Tensor, center: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """The square around a pixel of each map.

    Args:
        heatmaps: (B, K, h, w).
        center: (B, K, 2) int64, x and y.
        radius: n = 2 * radius + 1 pixels along each axis.

    Returns:
        (B, K, n, n) values and (B, K, n, n) bool, True inside the map. Outside, the nearest pixel stands in.
    """
    height, width = heatmaps.shape[-2:]
    steps = torch.arange(-radius, radius + 1, device=heatmaps.device)
    x = (center[..., 0, None] + steps)[..., None, :]
    y = (center[..., 1, None] + steps)[..., :, None]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    index = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
    return heatmaps.flatten(2).gather(-1, index.flatten(2)).view(index.shape), inside


def _moments(heatmaps: Tensor, peak: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Centre of mass (B, K, 2) and covariance (B, K, 2, 2) of the window of radius 2 sigma around a pixel.

    Negative and non-finite values weigh nothing. A window without mass gives the pixel itself and sigma^2.
    """
    radius = max(1, math.ceil(2 * sigma))
    values, inside = _gather(heatmaps, peak, radius)
    weights = torch.where(inside & torch.isfinite(values), values, 0.0).clamp_min(0)
    steps = torch.arange(-radius, radius + 1, device=heatmaps.device, dtype=torch.float32)
    mass = weights.sum((-2, -1))
    filled = mass > _TINY
    weights = weights / torch.where(filled, mass, 1.0)[..., None, None]
    columns, rows = weights.sum(-2), weights.sum(-1)
    x, y = (columns * steps).sum(-1), (rows * steps).sum(-1)
    dx, dy = steps - x[..., None], steps - y[..., None]
    xx, yy = (columns * dx**2).sum(-1), (rows * dy**2).sum(-1)
    xy = (weights * dy[..., :, None] * dx[..., None, :]).sum((-2, -1))
    covariance = torch.where(filled[..., None, None], _symmetric(xx, xy, yy), sigma**2 * torch.eye(2, device=x.device))
    return peak + torch.stack((x, y), -1), covariance


def _matched_filter(heatmaps: Tensor, sigma: float) -> Tensor:
    """(B, K, h, w): correlation of each map with a Gaussian centred on each pixel, over the norm of that Gaussian.

    The blur is a product with one (h, h) and one (w, w) matrix. The rows of these matrices handle the border, and they
    are built on the device, so that nothing has to be cached or copied.
    """

    def kernel(length: int) -> Tensor:
        pixels = torch.arange(length, device=heatmaps.device, dtype=torch.float32)
        weights = _gaussian((pixels[:, None] - pixels) / sigma)
        return weights / weights.square().sum(1, keepdim=True).sqrt()

    with torch.autocast(heatmaps.device.type, enabled=False):  # it would run the products in half precision
        # A softmax leaves denormal numbers, with which this product takes a CPU ten times as long.
        heatmaps = functional.hardshrink(heatmaps, 1e-20)
        return kernel(heatmaps.shape[-2]) @ heatmaps @ kernel(heatmaps.shape[-1]).T


def _newton(patch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One Newton step to the maximum of a (B, K, 3, 3) patch, from its middle.

    Returns:
        (B, K, 2) offset -H^-1 g, (B, K, 2, 2) -H^-1, (B, K) bool where H is negative definite by a margin above
        rounding. The others hold no meaning elsewhere.
    """
    gradient = 0.5 * torch.stack((patch[..., 1, 2] - patch[..., 1, 0], patch[..., 2, 1] - patch[..., 0, 1]), -1)
    xx = patch[..., 1, 2] - 2 * patch[..., 1, 1] + patch[..., 1, 0]
    yy = patch[..., 2, 1] - 2 * patch[..., 1, 1] + patch[..., 0, 1]
    xy = 0.25 * (patch[..., 2, 2] - patch[..., 2, 0] - patch[..., 0, 2] + patch[..., 0, 0])
    determinant = xx * yy - xy**2
    good = (xx < -1e-5) & (yy < -1e-5) & (determinant > 1e-10)
    determinant = torch.where(good, determinant, 1.0)
    spread = _symmetric(-yy / determinant, xy / determinant, -xx / determinant)
    return (spread * gradient[..., None, :]).sum(-1), spread, good


def _symmetric(xx: Tensor, xy: Tensor, yy: Tensor) -> Tensor:
    """(..., 2, 2) matrices from their three different elements."""
    return torch.stack((torch.stack((xx, xy), -1), torch.stack((xy, yy), -1)), -2)


def _at_least(covariance: Tensor, floor: float) -> Tensor:
    """Symmetric (..., 2, 2) matrices with both eigenvalues raised to `floor`, in closed form."""
    xx, xy, yy = covariance[..., 0, 0], covariance[..., 0, 1], covariance[..., 1, 1]
    middle, half = 0.5 * (xx + yy), 0.5 * (xx - yy)
    radius = torch.sqrt(half**2 + xy**2)
    high, low = (middle + radius).clamp_min(floor), (middle - radius).clamp_min(floor)
    shrink = 0.5 * (high - low) / radius.clamp_min(_TINY)
    middle = 0.5 * (high + low)
    return _symmetric(middle + shrink * half, shrink * xy, middle - shrink * half)
