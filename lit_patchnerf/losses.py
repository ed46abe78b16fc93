"""Losses of pixels by the names that HNeRV gives them, and the cosine loss of embeddings.

Every loss of pixels takes float images (N, 3, h, w) from 0 to 1 of any floating type and returns a float32 scalar (a
float64 one for float64 images), the mean over the samples. A weight of pixels leaves out what must not be learned, as
in inpainting: neither prediction nor target has any influence where it is 0. All sums are taken in float32, under
autocast too, and nothing waits for the device.
"""

from __future__ import annotations

from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_cli.errors import InputError
from lit_patchnerf.ssim import fitting_scales, ms_ssim, smallest_side, ssim

__all__ = ["FORMULAS", "ClipLoss", "LossName", "PixelLoss", "Term", "frequency_error", "make_loss", "warmup_factor"]

Term = Literal["l1", "l2", "charbonnier", "ssim", "ms_ssim", "frequency"]
LossName = Literal[
    "l2",
    "l1",
    "charbonnier",
    "ssim",
    "ms_ssim",
    "fusion1",
    "fusion2",
    "fusion3",
    "fusion4",
    "fusion5",
    "fusion6",
    "fusion7",
    "fusion8",
    "fusion9",
    "fusion10",
    "fusion11",
    "fusion12",
    "l1_freq",
    "l1_ssim_freq",
    "fusion10_freq",
]

#: The factors of the terms of each loss. `ssim` and `ms_ssim` stand for 1 minus the similarity.
FORMULAS: dict[LossName, dict[Term, float]] = {
    "l2": {"l2": 1.0},
    "l1": {"l1": 1.0},
    "charbonnier": {"charbonnier": 1.0},
    "ssim": {"ssim": 1.0},
    "ms_ssim": {"ms_ssim": 1.0},
    "fusion1": {"l2": 0.3, "ssim": 0.7},
    "fusion2": {"l1": 0.3, "ssim": 0.7},
    "fusion3": {"l2": 0.5, "ssim": 0.5},
    "fusion4": {"l1": 0.5, "ssim": 0.5},
    "fusion5": {"l2": 0.7, "ssim": 0.3},
    "fusion6": {"l1": 0.7, "ssim": 0.3},
    "fusion7": {"l2": 0.7, "l1": 0.3},
    "fusion8": {"l2": 0.5, "l1": 0.5},
    "fusion9": {"l1": 0.9, "ssim": 0.1},
    "fusion10": {"l1": 0.7, "ms_ssim": 0.3},
    "fusion11": {"l1": 0.9, "ms_ssim": 0.1},
    "fusion12": {"l1": 0.8, "ms_ssim": 0.2},
    "l1_freq": {"l1": 60.0, "frequency": 1.0},
    "l1_ssim_freq": {"l1": 42.0, "ssim": 18.0, "frequency": 1.0},
    "fusion10_freq": {"l1": 42.0, "ms_ssim": 18.0, "frequency": 1.0},
}


class PixelLoss(nn.Module):
    """A weighted sum of terms, the mean over the samples.

    Args:
        terms: Factors of the terms, as in `FORMULAS`.
        window: Side of the window of SSIM and MS-SSIM, 11 as in HNeRV or 5 as in HiNeRV.
        scales: Scales of MS-SSIM; below 5 they are renormalised, which is another loss for smaller patches.
        epsilon: Where `charbonnier`, sqrt(e^2 + epsilon^2), turns from a square into an absolute value.

    Raises:
        InputError: An option is out of its range.

    Source:
        HNeRV (arXiv 2304.02633) for the names and factors, Boosting-NeRV (arXiv 2402.18152) for those with `freq`.

    Example:
        >>> image = torch.rand(2, 3, 32, 32)
        >>> make_loss("fusion6")(image, image).item()
        0.0
    """

    def __init__(self, terms: dict[Term, float], *, window: int = 11, scales: int = 5, epsilon: float = 1e-3) -> None:
        super().__init__()
        unknown = [term for term in terms if term not in get_args(Term)]
        if unknown or not terms:
            raise InputError(f"model.loss: terms are {list(terms)}, expected some of {', '.join(get_args(Term))}")
        if window < 3 or window % 2 == 0:
            raise InputError(f"model.ssim_window is {window}, expected an odd number of at least 3")
        if not 1 <= scales <= 5:
            raise InputError(f"model.ssim_scales is {scales}, expected 1 to 5")
        if not epsilon > 0:
            raise InputError(f"model.loss: epsilon is {epsilon}, expected more than 0")
        self.terms = dict(terms)
        self.window, self.scales, self.epsilon = window, scales, epsilon

    def forward(self, prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """() float32; the arguments are those of `per_sample`."""
        return self.per_sample(prediction, target, weight).mean()

    def per_sample(self, prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of each sample.

        Args:
            prediction: (N, C, h, w), 0 to 1.
            target: Likewise; finite where the weight is 0, too.
            weight: (N, 1, h, w) from 0 to 1; None for 1 everywhere.

        Returns:
            (N,) float32. Errors of pixels are weighted means, 0 for a sample without any weight.

        Raises:
            InputError: The patch is too small for SSIM or MS-SSIM.
        """
        if prediction.ndim != 4 or prediction.shape != target.shape:
            raise ValueError(
                f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)}: expected both as (N, C, h, w)"
            )
        with torch.autocast(prediction.device.type, enabled=False):
            x, y = _wide(prediction), _wide(target)
            weight = None if weight is None else weight.to(x.dtype)
            total = x.new_zeros(len(x))
            for term, factor in self.terms.items():
                total = total + factor * self._term(term, x, y, weight)
            return total

    def check_size(self, height: int, width: int) -> None:
        """Refuse a patch that is too small before anything is trained.

        Raises:
            InputError: With the sizes that are possible.
        """
        if "ssim" in self.terms and min(height, width) < self.window:
            raise InputError(
                f"model.loss: SSIM with a window of {self.window} needs patches of at least that side, got "
                f"{height} x {width}: expected a larger data.patch_size or a smaller model.ssim_window"
            )
        if "ms_ssim" in self.terms and fitting_scales(height, width, self.window) < self.scales:
            raise InputError(
                f"model.loss: MS-SSIM with {self.scales} scales of a window of {self.window} needs patches of at least "
                f"{smallest_side(self.window, self.scales)} pixels a side, got {height} x {width}: expected a larger "
                "data.patch, a smaller model.ssim_window or fewer model.ssim_scales"
            )

    def _term(self, term: Term, x: Tensor, y: Tensor, weight: Tensor | None) -> Tensor:
        if term == "ssim":
            return 1 - ssim(x, y, window=self.window, weight=weight)
        if term == "ms_ssim":
            return 1 - ms_ssim(x, y, window=self.window, scales=self.scales, weight=weight)
        if term == "frequency":
            return frequency_error(x, y, weight)
        error = x - y
        if term == "l1":
            return _mean(error.abs(), weight)
        if term == "l2":
            return _mean(error.square(), weight)
        return _mean((error.square() + self.epsilon**2).sqrt(), weight)


def make_loss(name: str, *, window: int = 11, scales: int = 5) -> PixelLoss:
    """A loss of pixels by its name, in lower case or as HNeRV writes it.

    Args:
        name: One of `LossName`.
        window: As in `PixelLoss`.
        scales: Likewise.

    Raises:
        InputError: There is no such loss, or an option is out of its range.

    Example:
        >>> make_loss("Fusion6").terms
        {'l1': 0.7, 'ssim': 0.3}
    """
    if name.lower() not in FORMULAS:
        raise InputError(f"model.loss is {name!r}, expected one of {', '.join(FORMULAS)}")
    return PixelLoss(FORMULAS[cast(LossName, name.lower())], window=window, scales=scales)


def frequency_error(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean absolute difference of the real and imaginary parts of the unnormalised 2-D Fourier transforms.

    Args:
        prediction: (N, C, h, w) float.
        target: Likewise.
        weight: (N, 1, h, w); the images are multiplied by it.

    Returns:
        (N,) of the images' type, float32 at least.

    Source:
        Boosting-NeRV (arXiv 2402.18152).
    """
    with torch.autocast(prediction.device.type, enabled=False):
        # One transform instead of two, as it is linear; of a real image, so that half of it is the mirror of the other.
        error = _wide(prediction) - _wide(target)
        if weight is not None:
            error = error * weight.to(error.dtype)
        width = error.shape[-1]
        parts = torch.view_as_real(torch.fft.rfft2(error)).abs().sum(-1)
        # The first column has no mirror, nor has the last one of an even width.
        whole = 2 * parts.sum(-1) - parts[..., 0]
        if width % 2 == 0:
            whole = whole - parts[..., -1]
        return whole.mean((1, 2)) / (2 * width)


def warmup_factor(progress: float | Tensor, start: float = 1 / 6, ramp: float = 0.0) -> float | Tensor:
    """How much a term counts at a point of the training.

    Args:
        progress: Share of the training that is done, 0 to 1; a () tensor in a captured step, where a number would be
            frozen.
        start: The share at which the term begins; 1/6 is the reference's epoch 50 of 300.
        ramp: The share over which it grows linearly to 1; 0 for a switch, as in the reference.

    Returns:
        0 to 1, a tensor for a tensor.

    Example:
        >>> [warmup_factor(p, start=0.25, ramp=0.5) for p in (0.1, 0.5, 0.9)]
        [0.0, 0.5, 1.0]
        >>> warmup_factor(0.2, start=0.2), warmup_factor(torch.tensor(0.1), start=0.2)
        (1.0, tensor(0.))
    """
    if isinstance(progress, Tensor):
        return ((progress - start) / ramp).clamp(0, 1) if ramp > 0 else (progress >= start).to(progress.dtype)
    if ramp > 0:
        return min(max((progress - start) / ramp, 0.0), 1.0)
    return float(progress >= start)


class ClipLoss(nn.Module):
    """1 - cosine of predicted and true embeddings, times its factor and that of the warm-up.

    Args:
        factor: Of the term; the reference takes 0.1 to 0.2.
        start: As in `warmup_factor`.
        ramp: Likewise.

    Raises:
        InputError: An option is out of its range.

    Example:
        >>> loss = ClipLoss(factor=0.1)
        >>> round(loss(torch.eye(2), -torch.eye(2)).item(), 4), loss(torch.eye(2), torch.eye(2), 0.1).item()
        (0.2, 0.0)
    """

    def __init__(self, factor: float = 0.1, *, start: float = 1 / 6, ramp: float = 0.0) -> None:
        super().__init__()
        if not factor >= 0:
            raise InputError(f"model.clip_weight is {factor}, expected 0 or more")
        if not 0 <= start <= 1:
            raise InputError(f"model.clip_start is {start}, expected a share of the training from 0 to 1")
        if not 0 <= ramp <= 1:
            raise InputError(f"model.clip_ramp is {ramp}, expected a share of the training from 0 to 1")
        self.factor, self.start, self.ramp = factor, start, ramp

    def forward(self, prediction: Tensor, target: Tensor, progress: float | Tensor = 1.0) -> Tensor:
        """The weighted loss.

        Args:
            prediction: (N, D), of any length.
            target: (N, D), likewise. An embedding of zeros has cosine 0.
            progress: As in `warmup_factor`.

        Returns:
            () float32.
        """
        if prediction.ndim != 2 or prediction.shape != target.shape:
            raise ValueError(
                f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)}: expected both as (N, D)"
            )
        with torch.autocast(prediction.device.type, enabled=False):
            cosine = F.cosine_similarity(_wide(prediction), _wide(target), dim=1)
            return self.factor * warmup_factor(progress, self.start, self.ramp) * (1 - cosine).mean()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _mean(error: Tensor, weight: Tensor | None) -> Tensor:
    """(N,) mean over channels and pixels."""
    if weight is None:
        return error.mean((1, 2, 3))
    total = weight.sum((1, 2, 3)).clamp_min(torch.finfo(error.dtype).tiny)
    return (error.mean(1, keepdim=True) * weight).sum((1, 2, 3)) / total
