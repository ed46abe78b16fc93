"""The picture of a study: differences with their intervals, and what every fold says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

__all__ = ["draw"]

COLOURS = {"helps": "tab:green", "hurts": "tab:red", "equivalent": "tab:blue", "no evidence": "0.35"}


def draw(report: dict[str, Any], path: Path) -> None:
    """Write a PNG: on the left Dice against the reference arm and the effects, on the right the means of the folds.

    Args:
        report: The content of report.json.
        path: The file, replaced as a whole.
    """
    differences, effects = report["differences"]["dice"], report["effects"]["dice"]
    rows = [*differences.items(), *effects.items()]
    figure = Figure(figsize=(10, 1.6 + 0.45 * max(4, len(rows))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))

    smallest = report["smallest_effect"]
    left.axvspan(-smallest, smallest, color="0.92", label=f"±{smallest:g} points")
    left.axvline(0, color="0.5", linewidth=1)
    for y, (_, found) in enumerate(rows):
        if found["mean"] is None:
            continue
        colour = COLOURS[found["verdict"]]
        left.plot([found["low"], found["high"]], [y, y], color=colour, linewidth=2)
        left.plot(found["mean"], y, "o", color=colour)
    if effects and differences:
        left.axhline(len(differences) - 0.5, color="0.8", linewidth=1, linestyle=":")
    labels = [f"{name} - {report['reference']}" for name in differences] + [f"effect of {name}" for name in effects]
    left.set_yticks(
        range(len(rows)), [f"{label}\n{found['verdict']}" for label, (_, found) in zip(labels, rows, strict=True)]
    )
    left.invert_yaxis()
    left.set_xlabel("Dice, points: mean paired difference and 95 % interval")
    left.legend(loc="best", frameon=False)

    arms = list(report["arms"])
    by_fold = [report["arms"][arm]["dice"]["by_fold"] for arm in arms]
    for k, fold in enumerate(report["folds"]):
        right.plot(range(len(arms)), [means[k] for means in by_fold], ".-", color="0.75", linewidth=1)
        right.annotate(
            str(fold), (len(arms) - 1, by_fold[-1][k]), textcoords="offset points", xytext=(5, -3), fontsize=7
        )
    means = [report["arms"][arm]["dice"]["mean_of_folds"] for arm in arms]
    right.plot(range(len(arms)), means, "o", color="black")
    right.set_xticks(range(len(arms)), arms, rotation=30, ha="right")
    right.set_ylabel("Dice, points: folds and their mean")

    temporary = path.with_name(f".{path.stem}.{os.getpid()}.png")
    figure.savefig(temporary, dpi=120)
    temporary.replace(path)
