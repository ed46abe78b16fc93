"""Heatmap losses with one signature, and what turns their predictions into maps to decode.

Every loss takes `prediction` (B, K, h, w) as the network gives it, `target` (B, K, h, w) as `heatmaps.encode` gives it
and `valid` (B, K) bool, and returns a float32 scalar: a value per map, averaged over the valid landmarks of the batch.
Without a valid landmark it is 0 and its gradient is 0, not NaN. Inputs are converted to float32 first; the elementwise
operations and reductions below then stay in float32 under autocast. Nothing waits for the device.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from lit_cli.errors import InputError

__all__ = [
    "AdaptiveWingLoss",
    "HeatmapLoss",
    "KLLoss",
    "LossName",
    "MSELoss",
    "SoftDiceLoss",
    "WeightedMSELoss",
    "heatmap_loss",
]

LossName = Literal["mse", "weighted_mse", "awing", "kl", "dice"]


class HeatmapLoss(nn.Module, ABC):
    """Base of the losses: masks and averages what `per_map` gives.

    Attributes:
        activation: what `activate` applies to a prediction.
    """

    activation: ClassVar[Literal["none", "softmax", "sigmoid"]] = "none"

    def forward(self, prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            prediction: (B, K, h, w), any floating type, without activation.
            target: (B, K, h, w), peak 1.
            valid: (B, K) bool; the other maps have no part in value or gradient.

        Returns:
            () float32.
        """
        values = self.per_map(prediction.float(), target.float())
        return torch.where(valid, values, 0.0).sum() / valid.sum().clamp_min(1)

    @abstractmethod
    def per_map(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss (B, K) of each map, from float32 maps (B, K, h, w)."""

    def activate(self, prediction: Tensor) -> Tensor:
        """Predictions as float32 maps (B, K, h, w) that peak at about 1, for `heatmaps.decode`."""
        return prediction.float()


class MSELoss(HeatmapLoss):
    """Mean squared error.

    Args:
        scale: multiplies the loss. A landmark covers few of the pixels, so the plain mean is of the order of 1e-3.
            Adam does not notice the factor, but gradient clipping and the small numbers of float16 do.

    >>> loss = MSELoss(scale=100)
    >>> loss(torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 4, 4), torch.tensor([[True, False]]))
    tensor(100.)
    """

    def __init__(self, scale: float = 100.0) -> None:
        super().__init__()
        self.scale = scale

    def per_map(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Scaled mean of (p - t)^2."""
        return self.scale * (prediction - target).square().mean((-2, -1))


class WeightedMSELoss(HeatmapLoss):
    """Mean squared error with the weight 1 + c * target, so that the peak counts beside the much larger background.

    Args:
        weight: c; 0 is `MSELoss`.
        scale: as in `MSELoss`.

    >>> loss = WeightedMSELoss(weight=50, scale=1)
    >>> loss(torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4), torch.ones(1, 1, dtype=torch.bool))
    tensor(51.)
    """

    def __init__(self, weight: float = 50.0, scale: float = 100.0) -> None:
        super().__init__()
        self.weight = weight
        self.scale = scale

    def per_map(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Scaled mean of (1 + c t) (p - t)^2."""
        return self.scale * ((1 + self.weight * target) * (prediction - target).square()).mean((-2, -1))


class AdaptiveWingLoss(HeatmapLoss):
    """Adaptive Wing loss (Wang et al., Adaptive Wing Loss for Robust Face Alignment via Heatmap Regression, 2019).

    Logarithmic and therefore steep for small errors near the peak, almost quadratic in the background, linear for
    errors from `theta`. The defaults are those of the paper, which needs `alpha` above 2 and values in [0, 1].

    Args:
        omega: height of the logarithmic part.
        theta: error at which it turns linear.
        epsilon: error scale of the logarithm.
        alpha: the exponent is alpha - target.
        weight: w of the weighted loss map, which adds w times the loss where the target, dilated by 3x3, is at least
            0.2. 0 switches the map off.

    >>> loss = AdaptiveWingLoss(weight=0)
    >>> loss(torch.full((1, 1, 4, 4), 0.25), torch.zeros(1, 1, 4, 4), torch.ones(1, 1, dtype=torch.bool))
    tensor(0.7417)
    """

    def __init__(
        self, omega: float = 14.0, theta: float = 0.5, epsilon: float = 1.0, alpha: float = 2.1, weight: float = 10.0
    ) -> None:
        super().__init__()
        self.omega = omega
        self.theta = theta
        self.epsilon = epsilon
        self.alpha = alpha
        self.weight = weight

    def per_map(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean of the weighted adaptive wing function."""
        error = (prediction - target).abs()
        exponent = self.alpha - target
        ratio = self.theta / self.epsilon
        power = ratio**exponent
        slope = self.omega * exponent * power / ratio / (1 + power) / self.epsilon
        offset = self.theta * slope - self.omega * torch.log1p(power)
        curved = self.omega * torch.log1p((error / self.epsilon) ** exponent)
        values = torch.where(error < self.theta, curved, slope * error - offset)
        near = functional.max_pool2d(target, 3, stride=1, padding=1) >= 0.2
        return (values * (1 + self.weight * near)).mean((-2, -1))


class KLLoss(HeatmapLoss):
    """Kullback-Leibler divergence from the prediction, as a softmax over the map, to the target scaled to sum 1.

    Args:
        sigma: of the targets, heatmap pixels. Used by `activate` only.

    >>> loss = KLLoss(sigma=2.0)
    >>> loss(torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4), torch.ones(1, 1, dtype=torch.bool))
    tensor(0.)
    """

    activation = "softmax"

    def __init__(self, sigma: float = 2.0) -> None:
        super().__init__()
        self.sigma = sigma

    def per_map(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Sum of t (log t - log p) over the map, in nats."""
        # A valid landmark far outside the frame has an empty target: a loss of 0 rather than 0/0.
        target = target.flatten(2)
        target = target / target.sum(-1, keepdim=True).clamp_min(1e-12)
        log_probability = functional.log_softmax(prediction.flatten(2), -1)
        return (torch.xlogy(target, target) - target * log_probability).sum(-1)

    def activate(self, prediction: Tensor) -> Tensor:
        """Softmax over the map, times 2 pi sigma^2: a perfect prediction peaks at 1, a wider one below."""
        probability = torch.softmax(prediction.float().flatten(2), -1).view(prediction.shape)
        return probability * (2 * math.pi * self.sigma**2)


class SoftDiceLoss(HeatmapLoss):
    """1 - soft Dice of the sigmoid with squared terms, zero exactly where the two maps are equal.

    Source: Milletari et al., V-Net, 2016, on heatmaps instead of masks.

    Args:
        smooth: added to numerator and denominator, which keeps an empty target from 0/0.

    >>> loss = SoftDiceLoss(smooth=0)
    >>> loss(torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4), torch.ones(1, 1, dtype=torch.bool))
    tensor(0.2000)
    """

    activation = "sigmoid"

    def __init__(self, smooth: float = 1.0) -> None:
        super().__init__()
        self.smooth = smooth

    def per_map(self, prediction: Tensor, target: Tensor) -> Tensor:
        """1 - (2 sum p t + s) / (sum p^2 + sum t^2 + s)."""
        probability = torch.sigmoid(prediction)
        shared = (probability * target).sum((-2, -1))
        total = probability.square().sum((-2, -1)) + target.square().sum((-2, -1))
        return 1 - (2 * shared + self.smooth) / (total + self.smooth)

    def activate(self, prediction: Tensor) -> Tensor:
        """Sigmoid, in [0, 1]."""
        return torch.sigmoid(prediction.float())


def heatmap_loss(name: LossName, *, sigma: float = 2.0) -> HeatmapLoss:
    """A loss by name, with its defaults; build the class for other settings.

    Args:
        name: `mse`, `weighted_mse`, `awing`, `kl` or `dice`.
        sigma: of the targets, heatmap pixels; only `kl` uses it.

    >>> heatmap_loss("kl", sigma=3.5).activation
    'softmax'
    """
    match name:
        case "mse":
            return MSELoss()
        case "weighted_mse":
            return WeightedMSELoss()
        case "awing":
            return AdaptiveWingLoss()
        case "kl":
            return KLLoss(sigma)
        case "dice":
            return SoftDiceLoss()
    raise InputError(f"loss: got {name!r}, expected one of {', '.join(get_args(LossName))}")
