"""Paired statistics against slow loops, enumeration, and simulated data of known truth."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import rankdata

from lit_dsunet.statistics import (
    Comparison,
    bootstrap_mean,
    compare,
    contrast,
    holm,
    judge,
    sentence,
    wilcoxon_p,
)


def slow_bootstrap(values, patients, draws, seed, level):
    """Case by case, as the definition says; only the numbers of times come from the same generator."""
    names = list(dict.fromkeys(patients))
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, draws, 1000):
        for times in rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=min(1000, draws - start)):
            drawn = []
            for name, count in zip(names, times, strict=True):
                drawn += [v for v, p in zip(values, patients, strict=True) if p == name] * count
            means.append(sum(drawn) / len(drawn))
    tail = (1 - level) / 2
    return np.quantile(means, [tail, 1 - tail])


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_bootstrap_is_that_of_its_definition(level):
    rng = np.random.default_rng(1)
    values = rng.normal(size=23)
    patients = [f"p{i}" for i in rng.integers(0, 9, 23)]
    found = bootstrap_mean(values, patients, draws=1200, seed=5, level=level)
    np.testing.assert_allclose(found, slow_bootstrap(values, patients, 1200, 5, level), rtol=1e-12)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    truth, hits, trials = 1.0, 0, 400
    for _ in range(trials):
        # Skewed, and three cases of each patient that share most of their value.
        patient = rng.exponential(truth, 40)
        values = np.repeat(patient, 3) + rng.normal(0, 0.1, 120)
        low, high = bootstrap_mean(values, np.repeat(np.arange(40), 3).tolist(), draws=400, seed=1)
        hits += low <= truth <= high
    assert 0.90 <= hits / trials <= 0.97


def test_copies_of_a_case_are_no_evidence():
    values = np.random.default_rng(2).normal(size=15)
    alone = bootstrap_mean(values, list(range(15)), draws=2000)
    tripled = bootstrap_mean(np.repeat(values, 3), np.repeat(np.arange(15), 3).tolist(), draws=2000)
    np.testing.assert_allclose(alone, tripled, rtol=1e-12)
    ignored = bootstrap_mean(np.repeat(values, 3), None, draws=2000)
    assert ignored[1] - ignored[0] < 0.7 * (alone[1] - alone[0])
    p_alone = wilcoxon_p(values)
    assert wilcoxon_p(np.repeat(values, 3), np.repeat(np.arange(15), 3).tolist()) == p_alone


def test_the_same_seed_gives_the_same_interval_whatever_its_size():
    values = np.random.default_rng(3).normal(size=10)
    assert bootstrap_mean(values, seed=7) == bootstrap_mean(values, seed=7)
    assert bootstrap_mean(values, seed=7) != bootstrap_mean(values, seed=8)
    assert all(math.isnan(end) for end in bootstrap_mean([]))
    with pytest.raises(ValueError, match="2 patients for 3 values"):
        bootstrap_mean([1.0, 2.0, 3.0], ["a", "b"])


def enumerated_wilcoxon(values):
    """Share of all sign patterns whose rank sum is at least as far from its centre."""
    ranks = rankdata(np.abs(values))
    centre = ranks.sum() / 2
    found = abs(ranks[np.asarray(values) > 0].sum() - centre)
    patterns = itertools.product((0, 1), repeat=len(values))
    far = [abs(np.dot(pattern, ranks) - centre) >= found - 1e-9 for pattern in patterns]
    return np.mean(far)


def test_wilcoxon_is_the_enumeration_of_all_signs():
    rng = np.random.default_rng(4)
    for n in (3, 6, 9):
        values = rng.normal(0.4, 1, n)
        assert wilcoxon_p(values) == pytest.approx(enumerated_wilcoxon(values), rel=1e-12)
    assert wilcoxon_p(np.zeros(5)) == 1.0
    assert math.isnan(wilcoxon_p([]))


def test_wilcoxon_finds_as_much_in_noise_as_it_should():
    rng = np.random.default_rng(5)
    found = [wilcoxon_p(rng.normal(size=20)) < 0.05 for _ in range(600)]
    assert 0.02 <= np.mean(found) <= 0.08


def slow_holm(values):
    """Smallest level at which the step-down procedure rejects each hypothesis, by trying levels."""
    levels = np.round(np.arange(0, 1.0005, 0.0005), 4)
    out = {}
    for name in values:
        for level in levels:
            rejected = set()
            for rank, (key, p) in enumerate(sorted(values.items(), key=lambda item: item[1])):
                if p > level / (len(values) - rank) + 1e-12:
                    break
                rejected.add(key)
            if name in rejected:
                out[name] = level
                break
        else:
            out[name] = 1.0
    return out


def test_holm_is_the_smallest_level_that_rejects():
    rng = np.random.default_rng(6)
    for _ in range(5):
        values = {f"h{i}": round(float(p), 3) for i, p in enumerate(rng.uniform(0, 0.3, 4))}
        expected = slow_holm(values)
        for name, p in holm(values).items():
            assert p == pytest.approx(expected[name], abs=1e-3)
    assert holm({"a": 0.02, "b": math.nan})["a"] == 0.02


def test_missing_values_leave_their_pair_out():
    nan = math.nan
    found = compare({"x": [1.0, nan, 3.0, nan], "none": [nan] * 4}, ["a", "a", "b", "b"], draws=200)
    assert (found["x"].mean, found["x"].cases, found["x"].patients) == (2.0, 2, 2)
    assert found["none"].cases == 0
    assert math.isnan(found["none"].mean)
    assert found["x"].p_holm == found["x"].p  # nothing to correct for


def test_effects_of_a_factorial_design_are_found_again():
    rng = np.random.default_rng(7)
    base = rng.normal(size=50)
    values = {"none": base, "a": base + 1, "b": base - 2, "both": base + 1 - 2 + 0.5}
    a, b = [("none", "a"), ("b", "both")], [("none", "b"), ("a", "both")]
    np.testing.assert_allclose(contrast(values, a), 1.25)
    np.testing.assert_allclose(contrast(values, b), -1.75)
    for pairs in (a, b):
        np.testing.assert_allclose(contrast(values, pairs, interaction=True), 0.5)


def comparison(low, high, p, patients=50):
    return Comparison((low + high) / 2, low, high, p, patients, patients, p)


@pytest.mark.parametrize(
    ("low", "high", "p", "patients", "better", "verdict"),
    [
        (0.6, 1.4, 0.001, 50, True, "helps"),
        (0.1, 1.4, 0.001, 50, True, "helps"),
        (-1.4, -0.6, 0.001, 50, True, "hurts"),
        (-1.4, -0.6, 0.001, 50, False, "helps"),
        (0.6, 1.4, 0.2, 50, True, "no evidence"),  # the tests disagree
        (-0.1, 1.4, 0.01, 50, True, "no evidence"),
        (-0.3, 0.4, 0.8, 50, True, "equivalent"),
        (0.1, 0.4, 0.001, 50, True, "equivalent"),  # an effect, but none that matters
        (-0.3, 0.4, 0.8, 5, True, "no evidence"),  # too few to say so
        (-0.3, 0.6, 0.8, 50, True, "no evidence"),
        (math.nan, math.nan, math.nan, 0, True, "no evidence"),
    ],
)
def test_verdicts(low, high, p, patients, better, verdict):
    assert judge(comparison(low, high, p, patients), smallest=0.5, higher_is_better=better) == verdict


def test_sentences_say_what_the_numbers_say():
    def say(found, **options):
        return sentence("MKDC changes Dice by", "points", found, judge(found, 0.5), 0.5, **options)

    assert say(comparison(-0.05, 1.3, 0.21)).endswith("no evidence that it helps here.")
    assert say(comparison(-0.05, 1.3, 0.21, 4)).endswith("but 4 patients are too few to tell.")
    assert say(comparison(0.6, 1.4, 1e-5)) == (
        "MKDC changes Dice by +1.00 points (95 % CI 0.60 to 1.40; p < 0.001): it helps here."
    )
    assert say(comparison(0.1, 1.4, 0.01)).endswith("it helps here, perhaps by less than 0.5 points.")
    assert say(comparison(-1.4, -0.6, 0.01)).endswith("it hurts here.")
    assert say(comparison(-0.2, 0.3, 0.6)).endswith("equivalent within ±0.5 points here.")
    assert say(comparison(-0.2, 0.9, 0.6), claim="it hurts").endswith("no evidence that it hurts here.")
    assert "no case" in say(comparison(math.nan, math.nan, math.nan, 0))
