"""Radial errors and success detection rates, in millimetres or pixels, exact under distributed training.

Conventions: errors are distances in **original** pixels, or in millimetres once a spacing (mm per original pixel) is
given, in float64. Pooled figures (MRE, SD, median, P95, SDR) are over all valid landmarks of all images together. The
SD has the divisor N - 1, as in Wang et al., A benchmark for comparison of dental radiography analysis algorithms, 2016;
SDRs are percentages. A success is an error of at most the threshold; `strict` excludes equality. Annotations are often
integers, so errors of exactly 2 or 4 mm do occur: equality means within 1e-6.

A figure without any valid landmark is NaN. A prediction of NaN for a valid landmark is an infinite error, not a missing
one; a spacing of NaN, for an image of unknown scale, is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lit_cli.errors import InputError

__all__ = [
    "MeanRadialError",
    "RadialError",
    "Spacing",
    "SuccessDetectionRate",
    "Unit",
    "bootstrap_interval",
    "radial_errors",
    "success",
    "summarise",
    "summary_keys",
    "threshold_key",
]

Spacing = float | Tensor | None
Unit = Literal["mm", "px"]

DEFAULT_THRESHOLDS = (2.0, 2.5, 3.0, 4.0)
TIE = 1e-6  # far below any label resolution, far above the rounding of 20 px * 0.1 mm


def radial_errors(prediction: Tensor, target: Tensor, valid: Tensor, spacing: Spacing = None) -> Tensor:
    """Distance of each landmark to its annotation.

    Args:
        prediction: (B, K, 2), original pixels, not rounded.
        target: (B, K, 2), original pixels.
        valid: (B, K) bool; NaN targets are invalid whatever it says.
        spacing: mm per pixel: one number, (B,) per image, (B, 2) for x and y per image, or (B, K) per landmark; with
            K = 2, (B, 2) means x and y. NaN where unknown. `None` leaves pixels.

    Returns:
        (B, K) float64, NaN where not valid or where the spacing is unknown.

    >>> at = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])
    >>> radial_errors(at, torch.zeros(1, 2, 2), torch.tensor([[True, False]]), spacing=0.1)
    tensor([[0.5000,    nan]], dtype=torch.float64)
    """
    difference = prediction.double() - target.double()
    scale = torch.ones_like(difference) if spacing is None else _per_axis(spacing, difference)
    errors = torch.linalg.vector_norm(difference * scale, dim=-1)
    known = valid & ~torch.isnan(target * scale).any(-1)
    return torch.where(known, torch.nan_to_num(errors, nan=math.inf, posinf=math.inf), math.nan)


def _per_axis(spacing: float | Tensor, difference: Tensor) -> Tensor:
    """A spacing of any accepted form, so shaped that it multiplies (B, K, 2)."""
    if not isinstance(spacing, Tensor):
        return torch.full((), spacing, dtype=difference.dtype, device=difference.device)
    spacing = spacing.to(difference)
    batch, landmarks = difference.shape[:2]
    if spacing.ndim == 0:
        return spacing
    if spacing.shape == (batch,):
        return spacing[:, None, None]
    if spacing.shape == (batch, 2):
        return spacing[:, None, :]
    if spacing.shape == (batch, landmarks):
        return spacing[..., None]
    raise ValueError(
        f"spacing of shape {tuple(spacing.shape)}: expected (), ({batch},), ({batch}, 2) or ({batch}, {landmarks})"
    )


def success(errors: Tensor, threshold: float, strict: bool = False) -> Tensor:
    """Where an error is at most `threshold`, or below it if `strict`; False for NaN. Ties are decided within 1e-6.

    >>> success(torch.tensor([2.0, 2.0000000001, 2.1, torch.nan]), 2.0)
    tensor([ True,  True, False, False])
    """
    return errors < threshold - TIE if strict else errors <= threshold + TIE


def threshold_key(threshold: float, unit: Unit = "mm") -> str:
    """The name of a success rate.

    >>> threshold_key(2), threshold_key(2.5), threshold_key(4.0, "px")
    ('sdr_2mm', 'sdr_2.5mm', 'sdr_4px')
    """
    return f"sdr_{threshold:g}{unit}"


def summary_keys(thresholds: Sequence[float] = DEFAULT_THRESHOLDS, unit: Unit = "mm") -> list[str]:
    """The keys of `summarise` and `RadialError.compute`, in their order.

    >>> summary_keys([2, 2.5])
    ['mre', 'sd', 'median', 'p95', 'image_mre', 'sdr_2mm', 'sdr_2.5mm']
    """
    return ["mre", "sd", "median", "p95", "image_mre", *(threshold_key(threshold, unit) for threshold in thresholds)]


def summarise(
    errors: Tensor, thresholds: Sequence[float] = DEFAULT_THRESHOLDS, unit: Unit = "mm", strict: bool = False
) -> dict[str, Tensor]:
    """The figures of a matrix of errors.

    Args:
        errors: (N, K) floating, NaN for a missing landmark.
        thresholds: in the unit of the errors.
        unit: of the errors, for the names only.
        strict: whether an error equal to the threshold is a failure.

    Returns:
        One () tensor per name of `summary_keys`: pooled over all errors, but for `image_mre`, the mean of the means of
        the images, which differs from `mre` once landmarks are missing. `sdr_*` are percentages.
    """
    pooled = _columns(errors.reshape(-1, 1), thresholds, unit, strict)
    figures = {name: value[0] for name, value in pooled.items() if name != "count"}
    figures["image_mre"] = torch.nanmean(torch.nanmean(errors, 1))
    return {name: figures[name] for name in summary_keys(thresholds, unit)}


def _columns(errors: Tensor, thresholds: Sequence[float], unit: Unit, strict: bool) -> dict[str, Tensor]:
    """The figures (K,) of each column of (N, K) errors, NaN where a column has no error (`sd`: fewer than two)."""
    if not errors.shape[0]:
        errors = errors.new_full((1, errors.shape[1]), math.nan)  # nanquantile refuses an empty dimension
    count = (~torch.isnan(errors)).sum(0)
    mean = torch.nanmean(errors, 0)
    variance = torch.nansum((errors - mean).square(), 0) / (count - 1).clamp_min(0)
    figures = {
        "mre": mean,
        "sd": torch.where(count > 1, variance.sqrt(), math.nan),
        # Linear interpolation as in numpy; nanmedian would give the lower of two middle values.
        "median": torch.nanquantile(errors, 0.5, dim=0),
        "p95": torch.nanquantile(errors, 0.95, dim=0),
    }
    for threshold in thresholds:
        hits = success(errors, threshold, strict).sum(0).to(errors)
        figures[threshold_key(threshold, unit)] = 100 * hits / count  # 0 / 0 is NaN
    return {**figures, "count": count}


class RadialError(Metric):
    """Every radial error of an epoch, and the figures of the literature over them.

    All errors are kept (19 landmarks of a million images are 150 MB), since median and percentiles are no sums. Under
    distributed training the processes exchange them when a figure is asked for, so call the methods on every process. A
    sampler that repeats images to give each process as many counts these twice; no metric can tell.

    Args:
        thresholds: of the success rates, in the unit of the errors.
        strict: whether an error equal to the threshold is a failure.
        unit: `mm` requires a spacing in each update, `px` ignores it. There is no default spacing, which would label
            pixels as millimetres.
        kwargs: of `torchmetrics.Metric`.

    >>> metric = RadialError(thresholds=[2.0, 2.5])
    >>> prediction = torch.tensor([[[20.0, 0.0], [0.0, 23.0]], [[30.0, 0.0], [0.0, 0.0]]])
    >>> valid = torch.tensor([[True, True], [True, False]])
    >>> metric.update(prediction, torch.zeros(2, 2, 2), valid, spacing=0.1)
    >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
    {'mre': 2.433, 'sd': 0.513, 'median': 2.3, 'p95': 2.93, 'image_mre': 2.575, 'sdr_2mm': 33.333, 'sdr_2.5mm': 66.667}
    >>> metric.per_landmark()["mre"]
    tensor([2.5000, 2.3000], dtype=torch.float64)
    >>> metric.per_image()["mre"]
    tensor([2.1500, 3.0000], dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    errors: list[Tensor] | Tensor
    landmarks: Tensor

    def __init__(
        self,
        thresholds: Sequence[float] = DEFAULT_THRESHOLDS,
        strict: bool = False,
        unit: Unit = "mm",
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)
        if not thresholds or min(thresholds) <= 0:
            raise InputError(f"thresholds: got {list(thresholds)}, expected one or more positive numbers")
        if unit not in ("mm", "px"):
            raise InputError(f"unit: got {unit!r}, expected 'mm' or 'px'")
        self.thresholds = tuple(thresholds)
        self.strict = strict
        self.unit: Unit = unit
        self.set_dtype(torch.float64)  # also the type that a process without any image takes part with
        # Flat, since that process cannot know K either and gathering needs equal numbers of dimensions.
        self.add_state("errors", default=[], dist_reduce_fx="cat")
        self.add_state("landmarks", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="max")

    def update(self, prediction: Tensor, target: Tensor, valid: Tensor, spacing: Spacing = None) -> None:
        """Add a batch; the arguments are those of `radial_errors`. Does not wait for the device."""
        if self.unit == "px":
            spacing = None
        elif spacing is None:
            raise InputError("spacing: got none, expected mm per pixel; without one, use the unit 'px'")
        errors = radial_errors(prediction, target, valid, spacing)
        assert isinstance(self.errors, list)
        self.errors.append(errors.flatten())
        # Not in place, here and below: Lightning resets in inference mode, whose tensors no one may change outside.
        self.landmarks = torch.full_like(self.landmarks, errors.shape[1])

    def compute(self) -> dict[str, Tensor]:
        """The figures of `summarise` over all images, as () float64 tensors."""
        return summarise(self._matrix(), self.thresholds, self.unit, self.strict)

    def per_landmark(self) -> dict[str, Tensor]:
        """(K,) tensors `mre`, `sd`, `median`, `p95`, one per threshold, and `count`, the number of valid errors."""
        return _columns(self.gather(), self.thresholds, self.unit, self.strict)

    def per_image(self) -> dict[str, Tensor]:
        """(N,) tensors `mre`, `max` and `count`, process after process, each in the order of its updates."""
        errors = self.gather()
        count = (~torch.isnan(errors)).sum(1)
        highest = torch.where(torch.isnan(errors), -math.inf, errors).amax(1)
        return {
            "mre": torch.nanmean(errors, 1),
            "max": torch.where(count > 0, highest, math.nan),
            "count": count,
        }

    def gather(self) -> Tensor:
        """(N, K) float64: the errors of all processes, NaN for a missing landmark."""
        with self._synced():
            return self._matrix()

    def _matrix(self) -> Tensor:
        landmarks = int(self.landmarks)
        if not landmarks:  # no update anywhere
            return torch.zeros((0, 1), dtype=torch.float64, device=self.device)
        return dim_zero_cat(self.errors).reshape(-1, landmarks)

    @contextmanager
    def _synced(self) -> Iterator[None]:
        """States of all processes inside, own states afterwards; `compute` alone has that built in."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync and not self._is_synced):
            yield


class MeanRadialError(Metric):
    """The mean radial error alone, from a sum and a count: for a progress bar, a notebook or another module.

    Args:
        kwargs: of `torchmetrics.Metric`.

    >>> metric = MeanRadialError()
    >>> metric.update(torch.tensor([[[3.0, 4.0]]]), torch.zeros(1, 1, 2), torch.tensor([[True]]), spacing=0.1)
    >>> metric.compute()
    tensor(0.5000, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.add_state("total", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor, valid: Tensor, spacing: Spacing = None) -> None:
        """Add a batch; the arguments are those of `radial_errors`. Pixels without a spacing."""
        errors = radial_errors(prediction, target, valid, spacing)
        self.total = self.total + torch.nansum(errors)
        self.count = self.count + (~torch.isnan(errors)).sum()

    def compute(self) -> Tensor:
        """() float64, pooled over the valid landmarks."""
        return self.total / self.count


class SuccessDetectionRate(Metric):
    """The percentage of landmarks within one threshold, from two counts.

    Args:
        threshold: mm, or pixels if the updates give no spacing.
        strict: whether an error equal to the threshold is a failure.
        kwargs: of `torchmetrics.Metric`.

    >>> metric = SuccessDetectionRate(threshold=2.0)
    >>> prediction = torch.tensor([[[20.0, 0.0], [0.0, 23.0]]])
    >>> metric.update(prediction, torch.zeros(1, 2, 2), torch.tensor([[True, True]]), spacing=0.1)
    >>> metric.compute()
    tensor(50., dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    hits: Tensor
    count: Tensor

    def __init__(self, threshold: float = 2.0, strict: bool = False, **kwargs: object) -> None:
        super().__init__(**kwargs)
        if threshold <= 0:
            raise InputError(f"threshold: got {threshold}, expected a positive number")
        self.threshold = threshold
        self.strict = strict
        self.add_state("hits", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor, valid: Tensor, spacing: Spacing = None) -> None:
        """Add a batch; the arguments are those of `radial_errors`."""
        errors = radial_errors(prediction, target, valid, spacing)
        self.hits = self.hits + success(errors, self.threshold, self.strict).sum()
        self.count = self.count + (~torch.isnan(errors)).sum()

    def compute(self) -> Tensor:
        """() float64, percent."""
        return 100 * self.hits.double() / self.count


def bootstrap_interval(
    errors: Tensor,
    statistic: Callable[[Tensor], Tensor | float],
    num: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic, resampling **images**: the landmarks of one are not independent.

    Args:
        errors: (N, K), NaN for a missing landmark.
        statistic: takes (N, K) errors, gives one number.
        num: number of resamples.
        seed: of a generator of its own; the global one is left alone.
        level: coverage, between 0 and 1.

    Returns:
        Lower and upper bound, NaN without any image.

    >>> low, high = bootstrap_interval(torch.rand(50, 19).double(), torch.nanmean, num=200)
    >>> 0.4 < low < high < 0.6
    True
    """
    if not len(errors):
        return math.nan, math.nan
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(errors), (num, len(errors)), generator=generator).to(errors.device)
    values = torch.tensor([float(statistic(errors[draw])) for draw in draws], dtype=torch.float64)
    tail = (1 - level) / 2
    low, high = torch.nanquantile(values, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
