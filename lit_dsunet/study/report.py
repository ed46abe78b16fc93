"""The end of a study: report.json, report.md and a plot."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_cli.errors import InputError
from lit_dsunet.files import write_file, write_json
from lit_dsunet.statistics import Comparison, compare, contrast, judge, sentence
from lit_dsunet.study.page import Figure, markdown
from lit_dsunet.study.plan import Study
from lit_dsunet.study.tables import Tables, collect

__all__ = ["make_report", "summarise"]

LEARNED = 10.0  # points of Dice below which a difference is one between failures
CROSS = " x "  # between the factors of an interaction
SECONDARY = ("lesion_f1", "lesion_recall", "lesion_precision", "hd95_mm", "avd_ml")


def summarise(
    tables: Tables, study: Study, smallest: float = 0.5, draws: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """Everything that a report says, as plain values.

    Args:
        tables: The cases.
        study: Whose they are.
        smallest: Smallest effect on Dice that matters, in points.
        draws: Resamples of the patients.
        seed: Of the resamples.

    Returns:
        The content of report.json.
    """
    arms, reference = list(study.arms.options), study.arms.reference
    present = list(tables.values[reference])
    classes = [key for key in present if key.startswith("dice_")]
    keys = ["dice", *(classes if len(classes) > 1 else []), *(key for key in SECONDARY if key in present)]
    out: dict[str, Any] = {
        "runs": {"done": tables.found, "planned": tables.planned, "counted": len(tables.counted) * len(arms)},
        "cases": len(tables.names),
        "patients": len(set(tables.patients)),
        "folds": sorted({fold for _, fold in tables.counted}),
        "seeds": sorted({seed for seed, _ in tables.counted}),
        "reference": reference,
        "smallest_effect": smallest,
        "draws": draws,
        "checks": tables.checks,
        "about": {**tables.about, **{k: v for k, v in study.about.items() if v}, "study_code": study.code},
        "arms": {arm: {} for arm in arms},
        "differences": {},
        "effects": {},
        "notes": [],
        "sentences": [],
        "cost": tables.cost,
    }
    for key in keys:
        figure = Figure(key)
        values = {arm: figure.scale * tables.values[arm][key] for arm in arms}
        for arm in arms:
            seeds = figure.scale * tables.seeds[arm][key]
            out["arms"][arm][key] = _summary(values[arm], tables.folds, seeds)
        differences = {arm: values[arm] - values[reference] for arm in arms if arm != reference}
        effects = _effects(values, study)
        options: dict[str, Any] = {"draws": draws, "seed": seed}
        margin = smallest if key == "dice" else 0.0
        for part, found in (
            ("differences", compare(differences, tables.patients, **options)),
            ("effects", compare(effects, tables.patients, **options)),
        ):
            verdicts = {
                name: judge(one, margin, higher_is_better=figure.higher_is_better) for name, one in found.items()
            }
            out[part][key] = {name: {**one.as_dict(), "verdict": verdicts[name]} for name, one in found.items()}
    out["sentences"] = _sentences(out, study)
    out["notes"] = _notes(out)
    return _plain(out)


def _effects(values: dict[str, NDArray[np.float64]], study: Study) -> dict[str, NDArray[np.float64]]:
    """Main effect of each factor per case, and the interaction of two that have two pairs each."""
    factors = study.arms.factors
    out = {name: contrast(values, pairs) for name, pairs in factors.items()}
    crossed = [name for name, pairs in factors.items() if len(pairs) == 2]
    if len(crossed) == 2:
        out[CROSS.join(crossed)] = contrast(values, factors[crossed[0]], interaction=True)
    return out


def _summary(values: NDArray[np.float64], folds: NDArray[np.int64], seeds: NDArray[np.float64]) -> dict[str, Any]:
    """Mean over the cases, mean of the folds, and the spread of both folds and seeds."""
    means = [_mean(values[folds == fold]) for fold in np.unique(folds)]
    by_seed = [_mean(row) for row in seeds]
    known = values[~np.isnan(values)]
    return {
        "mean": _mean(values),
        "sd": float(np.std(known, ddof=1)) if len(known) > 1 else math.nan,
        "cases": len(known),
        "mean_of_folds": _mean(np.array(means)),
        "sd_of_folds": float(np.std(means, ddof=1)) if len(means) > 1 else math.nan,
        "by_fold": means,
        "by_seed": by_seed,
        "sd_of_seeds": float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else math.nan,
    }


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _sentences(report: dict[str, Any], study: Study) -> list[str]:
    """Of the effects, or where there are none of the arms."""
    smallest, effects = report["smallest_effect"], report["effects"]["dice"]
    out = []
    for name, found in (effects or report["differences"]["dice"]).items():
        one = Comparison(**{k: v for k, v in found.items() if k != "verdict"})
        options: dict[str, Any] = {"claim": study.arms.claim}
        if CROSS in name:
            lead = f"{' and '.join(name.split(CROSS))} together exceed the sum of their effects on Dice by"
            options = {"claim": "one changes what the other does"}
            options["words"] = ("they reinforce each other", "they weaken each other")
        else:
            lead = f"{name if effects else f'{name} instead of {study.arms.reference}'} changes Dice by"
        out.append(sentence(lead, "points", one, found["verdict"], smallest, **options))
    return out


def _notes(report: dict[str, Any]) -> list[str]:
    """What has to be known before a table is believed."""
    runs, about = report["runs"], report["about"]
    best = max(arm["dice"]["mean"] for arm in report["arms"].values())
    notes = {
        f"Not complete: {runs['done']} of {runs['planned']} runs are done, {runs['counted']} counted.": (
            runs["done"] < runs["planned"]
        ),
        "The arms differ in more than their options: see the checks below.": any(
            text.startswith("DIFFERENT") for text in report["checks"].values()
        ),
        "The code changed between runs.": len({*about["code"], about["study_code"]}) > 1,
        f"The best arm reaches {best:.1f} points: networks that have learned nothing differ in nothing.": best
        < LEARNED,
    }
    return [note for note, holds in notes.items() if holds]


def _plain(value: Any) -> Any:
    """NaN is no json."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def make_report(study: Study, smallest: float = 0.5, draws: int = 10_000, title: str = "Study") -> dict[str, Any]:
    """Write report.json, report.md and plot.png from the results that are there.

    Args:
        study: The study.
        smallest: Smallest effect on Dice that matters, in points.
        draws: Resamples of the patients.
        title: Of the page.

    Returns:
        The content of report.json.

    Raises:
        InputError: There is nothing to compare yet, or an option makes no sense.
    """
    from lit_dsunet.study.figure import draw

    if smallest < 0 or draws < 100:
        raise InputError(
            f"--smallest and --draws: expected 0 or more points and 100 or more draws, got {smallest}, {draws}"
        )
    tables = collect(study)
    report = summarise(tables, study, smallest, draws)
    write_json(study.folder / "report.json", report)
    write_file(study.folder / "report.md", markdown(report, title))
    draw(report, Path(study.folder / "plot.png"))
    return report
