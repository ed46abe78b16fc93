"""The benchmarks of lit_detr: dry runs."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch):
    """Import a script by its name; it imports its neighbours by their bare names."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def rows_of(path):
    return json.loads(path.read_text())["rows"]


# ---- metrics --------------------------------------------------------------------------------------------------------


def test_detection_metrics_dry_run(script, tmp_path, monkeypatch):
    pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed")
    bench, out = script("detection_metrics"), tmp_path / "rows.json"
    bench.main(["--tiny", "--out", str(out)])
    rows = {row["way"]: row for row in rows_of(out)}
    assert set(rows) == set(bench.ways())
    assert rows["ours"]["ap"] == rows["ours"]["coco_ap"]  # fewer than a hundred detections
    assert rows["ours"]["coco_ap"] == pytest.approx(rows["torchmetrics, faster-coco-eval"]["coco_ap"], abs=1e-6)
    assert abs(rows["bootstrap"]["ap"] - rows["ours"]["ap"]) < 0.1
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("the rows are there already"))
    bench.main(["--tiny", "--out", str(out)])


def test_ways_that_differ_end_the_script(script):
    check = script("detection_metrics").check
    check("x", {"coco_ap": 0.5, "ap": 0.1}, {"coco_ap": 0.5 + 1e-8, "ap": 0.2})
    with pytest.raises(RuntimeError, match=r"x: coco_ap is 0.5, expected 0.51"):
        check("x", {"coco_ap": 0.5}, {"coco_ap": 0.51})
