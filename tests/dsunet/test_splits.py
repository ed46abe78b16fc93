from __future__ import annotations

import json
import multiprocessing
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lit_cli.errors import InputError
from lit_dsunet.samples import VolumeSample
from lit_dsunet.splits import check_folds, load_folds, make_folds, write_folds
from tests.helpers.errors import refused


def samples_of(patients: dict[str, str]) -> list[VolumeSample]:
    return [VolumeSample(name, (Path(name),), None, patient) for name, patient in patients.items()]


def singles(names: str) -> list[VolumeSample]:
    return samples_of({name: name for name in names})


def lesions(count: int, seed: int, per_patient: int = 1) -> tuple[list[VolumeSample], dict[str, float]]:
    """Cases with the heavy-tailed volumes of stroke lesions, a tenth of them without any."""
    rng = np.random.default_rng(seed)
    samples = samples_of({f"c{i:03d}": f"p{i // per_patient}" for i in range(count)})
    ml = np.exp(rng.normal(2.0, 1.4, count)) * (rng.random(count) > 0.1)
    return samples, {s.name: float(v) for s, v in zip(samples, ml, strict=True)}


def write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


# ---- Dealing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "per_patient", "n_folds"), [(250, 1, 5), (53, 1, 5), (60, 3, 4), (7, 1, 3), (5, 1, 5)]
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_folds_are_a_partition_by_patient(count: int, per_patient: int, n_folds: int, seed: int) -> None:
    samples, volumes = lesions(count, seed, per_patient)
    folds = make_folds(samples, volumes, n_folds, seed)
    assert sorted(name for fold in folds for name in fold) == sorted(volumes)
    patients = [{s.patient for s in samples if s.name in fold} for fold in folds]
    assert sum(map(len, patients)) == len(set.union(*patients))
    sizes = [len(p) for p in patients]
    assert max(sizes) - min(sizes) <= 1
    check_folds(folds, samples)


def test_volumes_are_balanced_much_better_than_by_chance() -> None:
    ours: dict[str, list[float]] = {"sum": [], "median": [], "log": []}
    chance: dict[str, list[float]] = {"sum": [], "median": [], "log": []}
    summaries = {"sum": np.sum, "median": np.median, "log": lambda v: np.log1p(v).mean()}
    for seed in range(10):
        samples, volumes = lesions(250, seed)
        names = random.Random(seed).sample(sorted(volumes), 250)
        for folds, found in ((make_folds(samples, volumes, 5, seed), ours), ([names[i::5] for i in range(5)], chance)):
            for key, summary in summaries.items():
                values = [summary([volumes[name] for name in fold]) for fold in folds]
                found[key].append(float(np.std(values) / np.mean(values)))
    # The sum hangs on the one or two largest lesions, which no dealing can share out.
    assert np.mean(ours["sum"]) < np.mean(chance["sum"]) / 2
    assert np.mean(ours["median"]) < np.mean(chance["median"]) / 3
    assert np.mean(ours["log"]) < np.mean(chance["log"]) / 8


def test_every_fifth_of_the_volumes_is_spread_over_all_folds() -> None:
    samples, volumes = lesions(250, 3)
    folds = make_folds(samples, volumes, 5, 0)
    ranked = sorted(volumes, key=lambda name: volumes[name])
    for start in range(0, 250, 50):
        part = set(ranked[start : start + 50])
        # Exactly ten where volumes differ; the empty masks are all alike and may fall one over the border.
        assert all(abs(len(part & set(fold)) - 10) <= 1 for fold in folds)


def test_patients_with_several_cases_are_balanced_as_well() -> None:
    rng = np.random.default_rng(0)
    patients = {f"c{i}": f"p{p}" for i, p in enumerate(p for p in range(60) for _ in range(rng.integers(1, 5)))}
    volumes = {name: float(np.exp(rng.normal(2, 1))) for name in patients}
    folds = make_folds(samples_of(patients), volumes, 5, 0)
    sizes = [len(fold) for fold in folds]
    assert max(sizes) - min(sizes) <= 0.2 * np.mean(sizes)
    check_folds(folds, samples_of(patients))


def test_dealing_depends_on_the_seed_and_not_on_the_order() -> None:
    samples, volumes = lesions(100, 0)
    folds = make_folds(samples, volumes, 5, 7)
    shuffled = random.Random(0).sample(samples, len(samples))
    assert make_folds(shuffled, dict(reversed(volumes.items())), 5, 7) == folds
    assert make_folds(samples, {n: 8 * v for n, v in volumes.items()}, 5, 7) == folds  # voxels of 8 per ml
    assert make_folds(samples, volumes, 5, 8) != folds


def test_volumes_that_are_all_equal_or_empty_are_dealt_by_chance() -> None:
    samples, _ = lesions(50, 0)
    for volume in (0, 3):
        folds = make_folds(samples, {s.name: volume for s in samples}, 5, 0)
        assert [len(fold) for fold in folds] == [10] * 5
        assert folds[0] != sorted(s.name for s in samples)[:10]


def test_dealing_refuses_what_cannot_be_dealt() -> None:
    volumes = {"a": 1.0, "b": 2.0, "c": 3.0}
    refused(lambda: make_folds(singles("abc"), volumes, 4), "n_folds is 4", "2 to 3")
    refused(lambda: make_folds(singles("abc"), volumes, 1), "n_folds is 1")
    refused(lambda: make_folds(samples_of({"a": "p", "b": "p"}), volumes, 2), "data.fold", "1 patient", "null")
    refused(lambda: make_folds(singles("abcd"), volumes, 2), "case d", "None")
    for bad in (-1.0, float("nan"), float("inf")):
        refused(lambda: make_folds(singles("abc"), {**volumes, "b": bad}, 2), "case b", str(bad))  # noqa: B023
    refused(lambda: make_folds([*singles("ab"), *singles("a")], volumes, 2), "case a", "two cases")


# ---- Checking --------------------------------------------------------------------------------------------------------


def test_leaks_between_folds_are_named() -> None:
    samples = samples_of({"a1": "p", "a2": "p", "b": "b", "c": "c"})
    check_folds([["a1", "a2"], ["b", "c"]], samples)
    refused(
        lambda: check_folds([["a1", "b"], ["a2", "c"]], samples, "f"), "f: patient p", "fold 0", "fold 1", "a1", "a2"
    )
    refused(lambda: check_folds([["a1", "a2", "b"], ["b", "c"]], samples), "case b", "fold 0", "fold 1")
    refused(lambda: check_folds([["a1", "a2", "b", "b"], ["c"]], samples), "case b")
    refused(lambda: check_folds([["a1", "a2"], ["b"]], samples), "case c", "no val")
    refused(lambda: check_folds([["a1", "a2", "z"], ["b", "c"]], samples), "case z")
    refused(lambda: check_folds([["a1", "a2", "b", "c"], []], samples), "fold 1", "no case")
    refused(lambda: check_folds([["a1", "a2", "b", "c"]], samples), "1 folds", "at least 2")


# ---- Files -----------------------------------------------------------------------------------------------------------


def test_folds_are_written_once_in_the_form_of_nnunet(tmp_path: Path) -> None:
    path = tmp_path / "study" / "splits_final.json"
    folds, meta = [["a", "b"], ["c"]], {"seed": 3, "n_folds": 2}
    write_folds(path, folds, meta)
    content = json.loads(path.read_text())
    assert [(entry["train"], entry["val"]) for entry in content] == [(["c"], ["a", "b"]), (["a", "b"], ["c"])]
    assert content[0]["meta"] == meta
    assert [p.name for p in path.parent.iterdir()] == ["splits_final.json"]
    assert load_folds(path, singles("abc")) == folds
    before = path.stat()
    write_folds(path, [["b", "a"], ["c"]], meta)  # the same folds: nothing happens
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    refused(lambda: write_folds(path, [["a", "c"], ["b"]], meta), str(path), "case b", "fold 0", "never overwritten")
    refused(lambda: write_folds(path, folds, {**meta, "seed": 4}), str(path), "seed is 3", "4", "never overwritten")
    refused(lambda: write_folds(path, folds), str(path), "n_folds is 2", "None")
    refused(lambda: write_folds(path, [["a"], ["b"], ["c"]], meta), str(path), "2 folds", "expected 3")
    refused(lambda: write_folds(path, [["a", "b"], ["c", "d"]], meta), str(path), "case d")
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert [p.name for p in path.parent.iterdir()] == ["splits_final.json"]


def test_without_hard_links_folds_are_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", unsupported)
    path = tmp_path / "s.json"
    write_folds(path, [["a"], ["b"]])
    write_folds(path, [["a"], ["b"]])
    assert load_folds(path, singles("ab")) == [["a"], ["b"]]
    refused(lambda: write_folds(path, [["b"], ["a"]]), "never overwritten")
    assert [p.name for p in tmp_path.iterdir()] == ["s.json"]


def _race(path: Path, folds: list[list[str]], start: Any, results: Any) -> None:
    start.wait()
    try:
        write_folds(path, folds)
        results.put("written")
    except InputError:
        results.put("refused")


def test_of_two_processes_one_wins_and_the_other_is_told(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    path, start, results = tmp_path / "s.json", context.Event(), context.Queue()
    choices = [[["a"], ["b"]], [["b"], ["a"]]]
    workers = [context.Process(target=_race, args=(path, f, start, results)) for f in choices]
    for worker in workers:
        worker.start()
    start.set()
    assert sorted(results.get(timeout=20) for _ in workers) == ["refused", "written"]
    for worker in workers:
        worker.join(timeout=20)
    assert load_folds(path, singles("ab")) in choices


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused_message = r"s\.json: cannot write this file"
    with pytest.raises(InputError, match=refused_message):
        write_folds(tmp_path / "file" / "s.json", [["a"], ["b"]])


def test_loading_finds_leaks(tmp_path: Path) -> None:
    samples = samples_of({"a1": "p", "a2": "p", "b": "b", "c": "c"})
    path = tmp_path / "s.json"
    fold = {"train": ["b", "c"], "val": ["a1", "a2"]}
    other = {"train": ["a1", "a2"], "val": ["b", "c"]}
    assert load_folds(write_json(path, [fold, other]), samples) == [["a1", "a2"], ["b", "c"]]
    for content, parts in (
        ([fold, {"train": ["a1", "a2", "b"], "val": ["b", "c"]}], ("fold 1", "case b", "train and in val")),
        ([{"train": ["a2", "b", "c"], "val": ["a1"]}, other], ("fold 0", "patient p", "a1", "a2")),
        ([{"train": ["b", "c", "z"], "val": ["a1", "a2"]}, other], ("fold 0", "case z")),
        ([{"train": ["b"], "val": ["a1", "a2"]}, other], ("fold 0", "case c", "neither")),
        ([fold, fold], ("case a1", "val of fold 0", "val of fold 1")),
        ([fold], ("1 folds",)),
        ([{"train": [], "val": ["a1", "a2", "b", "c"]}, other], ("fold 0", "0 cases in train")),
    ):
        refused(lambda: load_folds(write_json(path, content), samples), "s.json", *parts)  # noqa: B023
    third = {"train": ["a1", "a2", "b"], "val": ["c"]}
    refused(lambda: load_folds(write_json(path, [fold, third]), samples), "case b", "no val")
    assert load_folds(write_json(path, [fold]), samples, complete=False) == [["a1", "a2"]]
    assert load_folds(write_json(path, [fold, third]), samples, complete=False) == [["a1", "a2"], ["c"]]


@pytest.mark.parametrize(
    "content", [{}, [], [3], [{"train": ["a"]}], [{"train": "a", "val": ["b"]}], [{"train": [1], "val": []}]]
)
def test_loading_refuses_another_form(tmp_path: Path, content: object) -> None:
    refused(lambda: load_folds(write_json(tmp_path / "s.json", content), singles("ab")), "s.json", "train")


def test_loading_names_unreadable_files(tmp_path: Path) -> None:
    for text in ("{", "\x00"):
        (tmp_path / "s.json").write_text(text)
        refused(lambda: load_folds(tmp_path / "s.json", singles("ab")), "s.json", "json")
    with pytest.raises(InputError, match=r"none\.json: cannot read"):
        load_folds(tmp_path / "none.json", singles("ab"))
