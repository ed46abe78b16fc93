"""Results of runs put together: one row per case, the same cases in every arm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_cli.errors import InputError
from lit_dsunet.files import read_json
from lit_dsunet.study.plan import Run, Study
from lit_dsunet.study.recorder import common_digest

__all__ = ["Tables", "collect"]


@dataclass
class Tables:
    """Figures of all arms over the same cases.

    Attributes:
        names: Of the cases, fold by fold.
        patients: Whose they are.
        folds: (N,) fold that held each case out.
        values: Per arm and figure, (N,) means over the seeds; NaN where a case has no value.
        seeds: Per arm and figure, (S, N) of each seed that all folds have.
        counted: (seed, fold) pairs that every arm has finished.
        found: Runs with a result.
        planned: All runs.
        checks: What the arms were found to have in common.
        cost: Means over the runs, per arm.
        about: Devices, versions and code of the runs.
    """

    names: list[str]
    patients: list[str]
    folds: NDArray[np.int64]
    values: dict[str, dict[str, NDArray[np.float64]]]
    seeds: dict[str, dict[str, NDArray[np.float64]]]
    counted: list[tuple[int, int]]
    found: int
    planned: int
    checks: dict[str, str]
    cost: dict[str, dict[str, float | None]]
    about: dict[str, list[str]]


def collect(study: Study) -> Tables:
    """Read the results; a seed and fold counts once all arms have finished it.

    Raises:
        InputError: There is nothing to compare yet, or results do not belong together.
    """
    results = {run: read_json(study.result(run)) for run in study.runs() if study.result(run).exists()}
    arms = list(study.arms.options)
    pairs = [(s, f) for s in study.seeds for f in study.folds if all(Run(s, f, arm) in results for arm in arms)]
    if not pairs:
        raise InputError(
            f"{study.folder}: {len(results)} of {len(study.runs())} runs are done, expected one fold of all "
            f"{len(arms)} arms"
        )
    folds = sorted({fold for _, fold in pairs})
    cases = {fold: _cases(study, results, fold, pairs) for fold in folds}
    figures = _figures([results[Run(s, f, arm)] for s, f in pairs for arm in arms])
    complete = [s for s in study.seeds if all((s, f) in pairs for f in folds)]

    def column(arm: str, figure: str, seeds_of: dict[int, list[int]]) -> NDArray[np.float64]:
        return np.concatenate(
            [np.mean([_column(results[Run(s, f, arm)], figure) for s in seeds_of[f]], axis=0) for f in folds]
        )

    available = {f: [s for s, fold in pairs if fold == f] for f in folds}
    counted = [results[Run(s, f, arm)] for s, f in pairs for arm in arms]
    return Tables(
        names=[name for f in folds for name in cases[f][0]],
        patients=[patient for f in folds for patient in cases[f][1]],
        folds=np.repeat(folds, [len(cases[f][0]) for f in folds]),
        values={arm: {k: column(arm, k, available) for k in figures} for arm in arms},
        seeds={
            arm: {k: np.array([column(arm, k, {f: [s] for f in folds}) for s in complete]) for k in figures}
            for arm in arms
        },
        counted=pairs,
        found=len(results),
        planned=len(study.runs()),
        checks=_checks(study, results, pairs),
        cost={arm: _cost([results[Run(s, f, arm)]["cost"] for s, f in pairs]) for arm in arms},
        about={key: sorted({str(result[key]) for result in counted}) for key in ("device", "torch", "code")},
    )


def _cases(
    study: Study, results: dict[Run, dict[str, Any]], fold: int, pairs: Sequence[tuple[int, int]]
) -> tuple[list[str], list[str]]:
    """Names and patients of the cases of a fold, the same in all its runs."""
    first: tuple[list[str], list[str]] | None = None
    for seed in (s for s, f in pairs if f == fold):
        for arm in study.arms.options:
            run = Run(seed, fold, arm)
            table = results[run]["cases"]
            found = table["name"], table["patient"]
            first = first or found
            if found != first:
                raise InputError(f"{study.result(run)}: other cases than those of the other arms, expected the same")
    assert first is not None
    return first


def _figures(results: Sequence[dict[str, Any]]) -> list[str]:
    """Those that every run has."""
    common = set.intersection(*(set(result["cases"]) for result in results)) - {"name", "patient"}
    return [figure for figure in results[0]["cases"] if figure in common]


def _column(result: dict[str, Any], figure: str) -> NDArray[np.float64]:
    return np.array([math.nan if v is None else v for v in result["cases"][figure]], dtype=np.float64)


def _cost(costs: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    """Means, but the largest of peaks."""
    out: dict[str, float | None] = {}
    for key in costs[0]:
        known = [value for cost in costs if (value := cost[key]) is not None]
        out[key] = None if not known else max(known) if key.startswith("peak") else float(np.mean(known))
    return out


def _checks(study: Study, results: dict[Run, dict[str, Any]], pairs: Sequence[tuple[int, int]]) -> dict[str, str]:
    """Whether the arms differ in nothing but their options."""
    arms = list(study.arms.options)

    def each(key: str) -> list[list[Any]]:
        return [[results[Run(s, f, arm)][key] for arm in arms] for s, f in pairs]

    steps = each("steps")
    checks = {"optimizer steps": _agree(steps, ", ".join(map(str, sorted({n for row in steps for n in row}))))}
    if study.arms.same_order:
        checks["order of the patches"] = _agree(each("order"), "by seed and epoch")
    if study.arms.same_start:
        digests = [common_digest(row) for row in each("initial")]
        equal = all(digest is not None for _, digest in digests)
        numbers = sorted({count for count, _ in digests})
        texts = sorted({str(digest) for _, digest in digests})
        checks["first weights of common layers"] = (
            f"equal ({', '.join(map(str, numbers))} tensors, {', '.join(texts)})" if equal else "DIFFERENT"
        )
    return checks


def _agree(rows: Sequence[Sequence[Any]], text: str) -> str:
    return f"equal ({text})" if all(len({str(v) for v in row}) == 1 for row in rows) else f"DIFFERENT ({text})"
