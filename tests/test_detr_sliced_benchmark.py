"""The benchmark of sliced inference: a dry run."""

import importlib
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench(monkeypatch):
    """The script; it imports its neighbours by their bare names."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("detr_sliced")


def test_a_dry_run(bench, tmp_path, monkeypatch):
    out = tmp_path / "rows.json"
    bench.main(["--tiny", "--out", str(out), "--deadline", "0"])
    assert not out.exists()
    bench.main(["--tiny", "--out", str(out)])
    rows = {row["way"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {way.name for way in bench.ways(4)}
    assert rows["loop, batch 1"]["agreement"] == 1
    assert all(row["images_s"] > 0 and row["shifted"] == 1 for row in rows.values())
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("the rows are there already"))
    bench.main(["--tiny", "--out", str(out)])


def test_agreement_counts_classes_and_places(bench):
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    both = bench.Merged(boxes, torch.tensor([0.9, 0.8]), torch.tensor([0, 1]))
    assert bench.agreement(both, bench.Merged(*(v[:1] for v in both))) == 0.75
    assert bench.agreement(both, both._replace(labels=both.labels.flip(0))) == 0
    assert bench.agreement(both, both._replace(scores=both.scores * 0)) == 0
    assert bench.relative([{"way": "x", **dict.fromkeys(("canvas", "frames", "tile", "input", "weights"), 0)}])
