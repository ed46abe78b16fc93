"""The report of a study as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Figure", "markdown"]

LOWER = ("hd95", "avd", "ald")  # figures of which less is better


@dataclass(frozen=True)
class Figure:
    """How a figure is shown."""

    key: str

    @property
    def title(self) -> str:
        """Its name in a table."""
        return {"hd95_mm": "HD95", "avd_ml": "volume difference"}.get(
            self.key, self.key.replace("_", " ").replace("dice", "Dice").replace("f1", "F1")
        )

    @property
    def unit(self) -> str:
        """Points (hundredths) of shares; otherwise what its key ends in."""
        return next((u for u in ("mm", "ml") if self.key.endswith(f"_{u}")), "points")

    @property
    def scale(self) -> float:
        """From the stored value to the unit."""
        return 100.0 if self.unit == "points" else 1.0

    @property
    def higher_is_better(self) -> bool:
        """The direction of better."""
        return not self.key.startswith(LOWER)


def markdown(report: dict[str, Any], title: str) -> str:
    """The report as text."""
    parts = [f"# {title}", ""]
    for note in report["notes"]:
        parts += [f"**{note}**", ""]
    parts += [*(f"- {text}" for text in report["sentences"]), ""]
    parts += ["![Differences and folds](plot.png)", ""]
    reference = report["reference"]
    for key in report["differences"]:
        figure = Figure(key)
        first = next(iter(report["arms"].values()))[key]
        several = len(first["by_seed"]) > 1
        head = ["arm", f"{figure.title}, {figure.unit}", "SD of cases", "mean of folds (SD)"]
        head += ["SD of seeds"] if several else []
        head += [f"against {reference}", "95 % CI", "p", "p (Holm)", "cases", "verdict"]
        rows = []
        for arm, values in report["arms"].items():
            v = values[key]
            row = [arm, _f(v["mean"]), _f(v["sd"]), f"{_f(v['mean_of_folds'])} ({_f(v['sd_of_folds'])})"]
            row += [_f(v["sd_of_seeds"])] if several else []
            found = report["differences"][key].get(arm)
            rows.append(row + (_compared(found) if found else ["-"] * 6))
        parts += [f"## {figure.title}", "", *_table(head, rows), ""]
        effects = report["effects"][key]
        if effects:
            rows = [[name, *_compared(found)] for name, found in effects.items()]
            head = ["effect", figure.unit, "95 % CI", "p", "p (Holm)", "cases", "verdict"]
            parts += [*_table(head, rows), ""]
    parts += ["## Cost", "", *_cost_table(report["cost"]), "", "## Checks", ""]
    parts += [*(f"- {name}: {text}" for name, text in report["checks"].items()), "", "## How to read this", ""]
    parts += [_method(report), ""]
    parts += ["; ".join(f"{k}: {_list(v) if isinstance(v, list) else v}" for k, v in report["about"].items()), ""]
    return "\n".join(parts)


def _method(report: dict[str, Any]) -> str:
    return f"""\
{report["cases"]} cases of {report["patients"]} patients, each evaluated once per arm and seed, whole, by the network
that did not train on it; the weights are those of the last step. Folds {_list(report["folds"])}; seeds
{_list(report["seeds"])}; figures of several seeds are averaged per case first. Differences are paired by case.
Intervals are percentiles of {report["draws"]} resamples of the patients, p is of Wilcoxon's signed-rank test on
patients, and Holm's correction is over the rows of a table. A main effect is the mean of the differences at both
settings of the other factor; the interaction is how much larger the difference is where the other factor is on.

`equivalent`: the interval lies within ±{report["smallest_effect"]:g} points. `no evidence`: the data show neither an
effect nor its absence. The intervals cover the choice of patients, not the chance in training, which is what several
seeds are for."""


def _compared(found: dict[str, Any]) -> list[str]:
    interval = f"{_f(found['low'], True)} to {_f(found['high'], True)}"
    p = [_p(found["p"]), _p(found["p_holm"])]
    return [_f(found["mean"], True), interval, *p, str(found["cases"]), found["verdict"]]


def _cost_table(cost: dict[str, dict[str, float | None]]) -> list[str]:
    names = {
        "seconds": ("s a run", 1, 1),
        "evaluation_seconds": ("s evaluation", 1, 1),
        "samples_per_s": ("patches/s", 1, 1),
        "peak_reserved_gb": ("peak GB reserved", 1, 2),
        "peak_allocated_gb": ("allocated", 1, 2),
        "parameters": ("parameters, M", 1e-6, 3),
        "gflops": ("GFLOP a patch", 1, 2),
    }
    rows = []
    for arm, values in cost.items():
        found = [values.get(key) for key in names]
        cells = ["-" if v is None else f"{v * s:.{d}f}" for v, (_, s, d) in zip(found, names.values(), strict=True)]
        rows.append([arm, *cells])
    return _table(["arm", *(head for head, _, _ in names.values())], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return ["| " + " | ".join(row) + " |" for row in (head, rule, *rows)]


def _f(value: float | None, signed: bool = False) -> str:
    if value is None:
        return "-"
    return f"{value:+.2f}" if signed else f"{value:.2f}"


def _p(value: float | None) -> str:
    return "-" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def _list(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))
