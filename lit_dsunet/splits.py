"""Folds: dealt by patient and foreground volume, written once, checked for leaks whenever they are read."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_cli.errors import InputError
from lit_dsunet.files import create_file, read_json
from lit_dsunet.samples import VolumeSample

__all__ = ["check_folds", "load_folds", "make_folds", "write_folds"]

_DRAWS = 100


def make_folds(
    samples: Sequence[VolumeSample], volumes: Mapping[str, float], n_folds: int = 5, seed: int = 0
) -> list[list[str]]:
    """Deal the cases into folds of like foreground volume, a patient's cases together.

    Patients are sorted by their foreground and cut into strata of `n_folds`; each stratum is dealt at random, one
    patient per fold. Of a hundred such deals the one with the most equal sums is taken, as a few large lesions hold
    most of the volume of a data set. The result depends on names, patients, volumes and seed alone, not on the order of
    the samples.

    Args:
        samples: The cases, with their patients.
        volumes: Foreground per case, in ml or voxels.
        n_folds: At least 2, at most the number of patients.
        seed: Of the deals.

    Returns:
        Sorted names of the held-out cases per fold.

    Raises:
        InputError: Too few patients, a name twice, or a case whose volume is missing or no number from 0 up.

    Example:
        >>> cases = [VolumeSample(name, (), None, name) for name in "abcdef"]
        >>> folds = make_folds(cases, {"a": 0, "b": 1, "c": 10, "d": 11, "e": 100, "f": 101}, n_folds=2)
        >>> [len(set(fold) & set("ef")) for fold in folds]
        [1, 1]
    """
    _patients(samples)
    cases: dict[str, list[str]] = {}
    for sample in sorted(samples, key=lambda sample: sample.name):
        volume = volumes.get(sample.name)
        if volume is None or not 0 <= volume < math.inf:  # NaN fails the comparison as well
            raise InputError(f"case {sample.name}: foreground volume is {volume}, expected a number from 0 up")
        cases.setdefault(sample.patient, []).append(sample.name)
    if len(cases) < 2:
        raise InputError(
            f"data.fold: {len(cases)} patient cannot be dealt into folds, expected null, to train on it alone"
        )
    if not 2 <= n_folds <= len(cases):
        raise InputError(f"n_folds is {n_folds}, expected 2 to {len(cases)}, the number of patients")
    totals = {patient: float(sum(volumes[name] for name in names)) for patient, names in cases.items()}
    draw = random.Random(seed)
    best: tuple[float, list[list[str]]] | None = None
    for _ in range(_DRAWS):
        patients = sorted(cases)
        draw.shuffle(patients)  # equal volumes, such as those of empty masks, fall in chance order
        patients.sort(key=lambda patient: totals[patient], reverse=True)
        folds: list[list[str]] = [[] for _ in range(n_folds)]
        for start in range(0, len(patients), n_folds):
            stratum = patients[start : start + n_folds]
            for fold, patient in zip(draw.sample(folds, len(stratum)), stratum, strict=True):
                fold.append(patient)
        cost = _spread([sum(totals[p] for p in fold) for fold in folds])
        cost += _spread([sum(len(cases[p]) for p in fold) for fold in folds])
        if best is None or cost < best[0]:
            best = cost, folds
    assert best is not None  # _DRAWS > 0
    return [sorted(name for patient in fold for name in cases[patient]) for fold in best[1]]


def check_folds(folds: Sequence[Sequence[str]], samples: Sequence[VolumeSample], where: str = "folds") -> None:
    """Refuse folds that are no clean partition of the cases.

    Args:
        folds: Names of the held-out cases per fold.
        samples: The cases that the folds are of.
        where: What to name in the error.

    Raises:
        InputError: Fewer than two folds, an empty one, a case that is unknown, missing or held out twice, or a patient
            on both sides.
    """
    if len(folds) < 2:
        raise InputError(f"{where}: {len(folds)} folds, expected at least 2")
    held_out = [(i, name) for i, fold in enumerate(folds) for name in fold]
    fold_of = _fold_of(held_out, samples, where)
    for sample in samples:
        if sample.name not in fold_of:
            raise InputError(f"{where}: case {sample.name} is in no val, expected every case in exactly one")
    empty = [i for i, fold in enumerate(folds) if not fold]
    if empty:
        raise InputError(f"{where}: fold {empty[0]} holds out no case, expected some")


def write_folds(path: str | Path, folds: Sequence[Sequence[str]], meta: Mapping[str, Any] | None = None) -> None:
    """Write folds once, in the form of nnU-Net's splits_final.json.

    Each entry has `train` and `val`, and `meta`, which nnU-Net ignores. An existing file is never replaced: it is
    compared, so that two machines which share a folder, or a run that resumes, work with one and the same split.

    Args:
        path: The json file.
        folds: Names of the held-out cases per fold, a partition of all cases.
        meta: How the folds were made, such as the seed; plain json values.

    Raises:
        InputError: The file exists with other folds or another meta, or cannot be written.
    """
    path = Path(path)
    names = sorted(name for fold in folds for name in fold)
    content = [
        {"train": [n for n in names if n not in held_out], "val": sorted(held_out), "meta": dict(meta or {})}
        for held_out in map(set, folds)
    ]
    text = "[\n" + ",\n".join(json.dumps(entry, sort_keys=True) for entry in content) + "\n]\n"
    if not create_file(path, text):
        _compare(path, json.loads(text))


def load_folds(path: str | Path, samples: Sequence[VolumeSample], complete: bool = True) -> list[list[str]]:
    """Read folds in the form of nnU-Net's splits_final.json and check them for leaks.

    Args:
        path: The json file, a list of `{"train": [...], "val": [...]}`.
        samples: The cases that it must split.
        complete: Whether every case must be held out by exactly one fold. False allows a single hold-out or random
            ones, as nnU-Net does; each fold is checked all the same.

    Returns:
        Names of the held-out cases per fold.

    Raises:
        InputError: No such file or another form, an unknown case, a case left out, or a case or a patient on both
            sides.
    """
    path = Path(path)
    folds: list[list[str]] = []
    for i, entry in enumerate(_entries(path)):
        where = f"{path}, fold {i}"
        train, val = entry["train"], entry["val"]
        sides = _fold_of([("train", name) for name in train] + [("val", name) for name in val], samples, where)
        for sample in samples:
            if sample.name not in sides:
                raise InputError(f"{where}: case {sample.name} is in neither train nor val, expected every case")
        if not train or not val:
            raise InputError(f"{where}: {len(train)} cases in train and {len(val)} in val, expected some in both")
        folds.append(val)
    if complete:
        check_folds(folds, samples, str(path))
    return folds


def _fold_of(
    placed: Sequence[tuple[int | str, str]], samples: Sequence[VolumeSample], where: str
) -> dict[str, int | str]:
    """The side of each case, of (side, case); no case and no patient may be on two sides."""
    patients = _patients(samples)
    side_of: dict[str, int | str] = {}
    side_of_patient: dict[str, tuple[int | str, str]] = {}
    for side, name in placed:
        if name not in patients:
            raise InputError(f"{where}: case {name} is in no reader's list, expected the name of a case")
        if name in side_of:
            raise InputError(f"{where}: case {name} is in {_side(side_of[name])} and in {_side(side)}, expected once")
        side_of[name] = side
        other, of = side_of_patient.setdefault(patients[name], (side, name))
        if other != side:
            raise InputError(
                f"{where}: patient {patients[name]} is in {_side(other)} (case {of}) and in {_side(side)} (case {name})"
                ", expected all cases of a patient together"
            )
    return side_of


def _side(side: int | str) -> str:
    return side if isinstance(side, str) else f"val of fold {side}"


def _patients(samples: Sequence[VolumeSample]) -> dict[str, str]:
    patients: dict[str, str] = {}
    for sample in samples:
        if sample.name in patients:
            raise InputError(f"case {sample.name}: two cases of this name, expected different names")
        patients[sample.name] = sample.patient
    return patients


def _spread(values: Sequence[float]) -> float:
    """Standard deviation relative to the mean."""
    return statistics.pstdev(values) / (statistics.fmean(values) or 1)


def _entries(path: Path) -> list[dict[str, Any]]:
    content = read_json(path)
    if not isinstance(content, list) or not content:
        raise InputError(f'{path}: no list of folds, expected [{{"train": [...], "val": [...]}}, ...]')
    for i, entry in enumerate(content):
        sides = [entry.get(side) for side in ("train", "val")] if isinstance(entry, dict) else []
        if not sides or not all(isinstance(s, list) and all(isinstance(n, str) for n in s) for s in sides):
            raise InputError(f"{path}, fold {i}: expected train and val, each a list of case names")
    return content


def _compare(path: Path, expected: list[dict[str, Any]]) -> None:
    found = _entries(path)
    if len(found) != len(expected):
        raise InputError(
            f"{path}: {len(found)} folds, expected {len(expected)} as asked for; folds are never overwritten"
        )
    for i, (old, new) in enumerate(zip(found, expected, strict=True)):
        meta, asked = old.get("meta", {}), new["meta"]
        for key in sorted({*meta, *asked}):
            if meta.get(key) != asked.get(key):
                raise InputError(
                    f"{path}: {key} is {meta.get(key)!r}, expected {asked.get(key)!r} as asked for; folds are never "
                    "overwritten"
                )
        for side in ("val", "train"):
            other = sorted({*old[side]} ^ {*new[side]})
            if other:
                raise InputError(
                    f"{path}: case {other[0]} is on the other side of fold {i}, expected the folds asked for; folds "
                    "are never overwritten"
                )
