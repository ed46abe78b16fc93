"""Paired comparisons of per-case figures: bootstrap over patients, Wilcoxon, Holm, factorial contrasts, a verdict."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import wilcoxon

__all__ = ["Comparison", "Verdict", "bootstrap_mean", "compare", "contrast", "holm", "judge", "sentence", "wilcoxon_p"]

Verdict = Literal["helps", "hurts", "equivalent", "no evidence"]

CHUNK = 1000  # resamples at once: a matrix of them by the patients has to fit in memory
FEWEST = 10  # patients below which an interval of resamples is too short to speak of equivalence


@dataclass(frozen=True, slots=True)
class Comparison:
    """A mean paired difference.

    Attributes:
        mean: Over the cases.
        low: Lower end of the confidence interval of the mean.
        high: Upper end.
        p: Of Wilcoxon's signed-rank test, two-sided.
        cases: Pairs without NaN.
        patients: To whom they belong.
        p_holm: Corrected for the comparisons made together with this one; `p` where it is alone.
    """

    mean: float
    low: float
    high: float
    p: float
    cases: int
    patients: int
    p_holm: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def bootstrap_mean(
    values: ArrayLike,
    patients: Sequence[Hashable] | None = None,
    draws: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of a mean over cases, by resampling patients.

    Each resample takes as many patients as there are, with replacement, and all cases of each: cases of one patient are
    no independent evidence.

    Args:
        values: (N,) one per case, such as differences of two arms; no NaN.
        patients: Whose case each is; every case its own patient without.
        draws: Resamples.
        seed: Of the resamples.
        level: Of the interval.

    Returns:
        Its two ends; NaN without cases.

    Source:
        Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3.

    Example:
        >>> low, high = bootstrap_mean([1.0, 2.0, 3.0, 4.0, 5.0], draws=2000)
        >>> 1.0 < low < 3.0 < high < 5.0
        True
        >>> bootstrap_mean([2.0, 2.0])
        (2.0, 2.0)
    """
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        return math.nan, math.nan
    sums, counts = _by_patient(array, patients)
    n = len(sums)
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, draws, CHUNK):
        times = rng.multinomial(n, np.full(n, 1 / n), size=min(CHUNK, draws - start))
        means.append((times @ sums) / (times @ counts))
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def wilcoxon_p(values: ArrayLike, patients: Sequence[Hashable] | None = None) -> float:
    """Two-sided p of Wilcoxon's signed-rank test on the means of the patients.

    Args:
        values: (N,) differences, one per case; no NaN.
        patients: Whose case each is; every case its own patient without.

    Returns:
        p; 1 where nothing differs, NaN without cases.

    Example:
        >>> wilcoxon_p([1.0, 2.0, 3.0, 4.0, 5.0])
        0.0625
        >>> wilcoxon_p([0.0, 0.0])
        1.0
    """
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        return math.nan
    sums, counts = _by_patient(array, patients)
    means = sums / counts
    if not means.any():
        return 1.0
    # Exact where scipy can: few patients, none without a difference, and no ties.
    return float(wilcoxon(means).pvalue)  # type: ignore[attr-defined]


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Values of p corrected for as many tests as there are (step-down); NaN stay out of the count.

    Source:
        Holm, A simple sequentially rejective multiple test procedure, 1979.

    Example:
        >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
        {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    known = sorted((p, name) for name, p in p_values.items() if not math.isnan(p))
    corrected = dict(p_values)
    floor = 0.0
    for rank, (p, name) in enumerate(known):
        floor = max(floor, min(1.0, (len(known) - rank) * p))
        corrected[name] = floor
    return corrected


def compare(
    differences: Mapping[str, ArrayLike],
    patients: Sequence[Hashable] | None = None,
    *,
    draws: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Comparison]:
    """One `Comparison` per array of paired differences, their p corrected together.

    Args:
        differences: (N,) by name, one per case; NaN where a case has no value in one of the arms.
        patients: Whose case each is.
        draws: Resamples.
        seed: Of the resamples, the same for all.
        level: Of the intervals.

    Example:
        >>> found = compare({"up": [1.0, 2.0, float("nan"), 3.0], "same": [0.0, 0.0, 0.0, 0.0]})
        >>> found["up"].mean, found["up"].cases, found["same"].p_holm
        (2.0, 3, 1.0)
    """
    found: dict[str, Comparison] = {}
    for name, values in differences.items():
        array = np.asarray(values, dtype=np.float64)
        kept = np.flatnonzero(~np.isnan(array))
        array = array[kept]
        owners: Sequence[Hashable] = [i if patients is None else patients[i] for i in kept.tolist()]
        low, high = bootstrap_mean(array, owners, draws, seed, level)
        mean, p = float(array.mean()) if len(array) else math.nan, wilcoxon_p(array, owners)
        found[name] = Comparison(mean, low, high, p, len(array), len(set(owners)), p)
    corrected = holm({name: one.p for name, one in found.items()})
    return {
        name: Comparison(c.mean, c.low, c.high, c.p, c.cases, c.patients, corrected[name]) for name, c in found.items()
    }


def contrast(
    values: Mapping[str, ArrayLike], pairs: Sequence[tuple[str, str]], interaction: bool = False
) -> NDArray[np.float64]:
    """What a factor does to each case, over pairs of arms that differ in this factor alone.

    Args:
        values: (N,) per arm, one per case.
        pairs: (arm without, arm with) at each setting of the other factors.
        interaction: How much more it does in the second of two pairs than in the first, instead of the mean of all.

    Returns:
        (N,) mean of the differences, or the difference of the two.

    Example:
        >>> arms = {"none": [1.0], "a": [2.0], "b": [3.0], "both": [7.0]}
        >>> contrast(arms, [("none", "a"), ("b", "both")]), contrast(arms, [("none", "a"), ("b", "both")], True)
        (array([2.5]), array([3.]))
    """
    each = [np.asarray(values[b], dtype=np.float64) - np.asarray(values[a], dtype=np.float64) for a, b in pairs]
    if interaction:
        first, second = each
        return second - first
    return np.stack(each).mean(0)


def judge(found: Comparison, smallest: float, alpha: float = 0.05, higher_is_better: bool = True) -> Verdict:
    """What a comparison allows to say.

    - `equivalent`: the interval lies within ± `smallest`, and there are at least ten patients.
    - `helps`, `hurts`: the interval lies on one side of 0 and the corrected p is below `alpha`.
    - `no evidence`: neither.

    Args:
        found: The comparison.
        smallest: Smallest effect that matters, in the unit of the figure; 0 to leave equivalence out.
        alpha: Level of the test.
        higher_is_better: False for distances and other errors.

    Example:
        >>> judge(Comparison(0.1, -0.1, 0.3, 0.2, 50, 50, 0.2), smallest=0.5)
        'equivalent'
        >>> judge(Comparison(0.1, -1.1, 1.3, 0.2, 50, 50, 0.2), smallest=0.5)
        'no evidence'
    """
    if -smallest < found.low and found.high < smallest and found.patients >= FEWEST:
        return "equivalent"
    if found.p_holm < alpha and (found.low > 0 or found.high < 0):
        return "helps" if (found.low > 0) == higher_is_better else "hurts"
    return "no evidence"


def sentence(
    lead: str,
    unit: str,
    found: Comparison,
    verdict: Verdict,
    smallest: float,
    claim: str = "it helps",
    words: tuple[str, str] = ("it helps", "it hurts"),
    level: float = 0.95,
) -> str:
    """A comparison in words, whatever they are.

    Args:
        lead: What stands before the number.
        unit: What stands behind it.
        found: The comparison.
        verdict: What `judge` says about it.
        smallest: Smallest effect that matters.
        claim: What there is no evidence for, where there is none.
        words: For `helps` and `hurts`.
        level: Of the interval.

    Example:
        >>> found = Comparison(0.12, -0.05, 0.3, 0.21, 260, 260, 0.21)
        >>> sentence("MKDC changes Dice by", "points", found, "no evidence", 0.0)
        'MKDC changes Dice by +0.12 points (95 % CI -0.05 to 0.30; p = 0.21): no evidence that it helps here.'
    """
    if found.cases == 0:
        return f"{lead}: no case has a value in all arms."
    p = f"p = {found.p_holm:.2g}" if found.p_holm >= 0.001 else "p < 0.001"
    interval = f"{100 * level:g} % CI {found.low:.2f} to {found.high:.2f}"
    if verdict == "equivalent":
        end = f"equivalent within ±{smallest:g} {unit} here"
    elif verdict == "no evidence":
        few = f", but {found.patients} patients are too few to tell" if found.patients < FEWEST else ""
        end = f"no evidence that {claim} here{few}"
    else:
        small = min(abs(found.low), abs(found.high)) < smallest
        end = f"{words[verdict == 'hurts']} here{f', perhaps by less than {smallest:g} {unit}' if small else ''}"
    return f"{lead} {found.mean:+.2f} {unit} ({interval}; {p}): {end}."


def _by_patient(
    values: NDArray[np.float64], patients: Sequence[Hashable] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and number of the cases of each patient, in order of appearance."""
    if patients is None:
        return values, np.ones_like(values)
    if len(patients) != len(values):
        raise ValueError(f"{len(patients)} patients for {len(values)} values: expected one each")
    index: dict[Hashable, int] = {}
    which = np.array([index.setdefault(patient, len(index)) for patient in patients], dtype=np.int64)
    sums, counts = np.bincount(which, values, len(index)), np.bincount(which, minlength=len(index))
    return sums.astype(np.float64), counts.astype(np.float64)
