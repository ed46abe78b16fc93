"""The benchmark of memory cleanup: its plan of windows, and a dry run."""

import importlib
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench(monkeypatch):
    """The script as a module; it imports its neighbours by their bare names."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield importlib.import_module("memory_cleanup")
    torch.set_float32_matmul_precision(before)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = tf32, False


def test_every_row_has_a_key_of_its_own(bench):
    keys = [tuple(group.key(c).items()) for group in bench.groups() for c in group.cleanups]
    assert len(keys) == len(set(keys))
    for group in bench.groups():
        if len(group.cleanups) > 1 or not group.limited:
            assert bench.Group(group.network, group.frames, False, [bench.NONE]).key(bench.NONE) in [
                g.key(c) for g in bench.groups() for c in g.cleanups
            ]


def test_cleanups_come_when_due(bench, monkeypatch):
    called = Counter()
    monkeypatch.setattr(bench.gc, "collect", lambda: called.update(["gc"]))
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench.torch.cuda, "empty_cache", lambda: called.update(["cache"]))
    for step in range(1, 101):
        bench.NONE.after(step)
    assert not called
    for cleanup, want in (
        (bench.Cleanup("empty_cache", 1), {"cache": 100}),
        (bench.Cleanup("gc.collect", 50), {"gc": 2}),
        (bench.BOTH, {"cache": 10, "gc": 10}),
    ):
        called.clear()
        for step in range(1, 101):
            cleanup.after(step)
        assert called == want


def test_windows_take_turns_and_hold_whole_periods(bench, monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    cleanups = [bench.NONE, bench.Cleanup("gc.collect", 10)]

    def collect():
        now[0] += 1.0
        order.append("gc")

    monkeypatch.setattr(bench.gc, "collect", collect)
    rotation = bench.Rotation(4, cleanups, period=4, seconds=2.5, rounds=3)
    trainer = SimpleNamespace(should_stop=False)
    rotation.on_train_start(trainer, None)
    batches = 0
    while not trainer.should_stop:
        now[0] += 0.1
        batches += 1
        rotation.on_train_batch_end(trainer, None, None, None, 0)
    assert [len(windows) for windows in rotation.measured.values()] == [3, 3]
    # 28 steps of 0.1 s are the first multiple of 4 beyond 2.5 s; with garbage collection 20 are that of 4 and 10.
    assert batches == bench.WARMUP + 3 * (2 * 4 + 28 + 20)
    assert [w.rate for w in rotation.measured[cleanups[0]]] == pytest.approx([40.0] * 3)
    assert [w.rate for w in rotation.measured[cleanups[1]]] == pytest.approx([20 * 4 / 4.0] * 3)
    assert len(order) == 6


def test_frames_change_and_repeat(bench):
    frames = iter(bench.VariableFrames(2, 128, "cpu"))
    shapes = [(image.shape[-2:], maps.shape[-2:]) for image, maps in (next(frames) for _ in range(2 * bench.CYCLE))]
    assert shapes[: bench.CYCLE] == shapes[bench.CYCLE :]
    assert shapes[0][0] == (128, 128)
    assert len(set(shapes)) > 3
    assert all(s % 32 == 0 and s == 4 * m for image, maps in shapes for s, m in zip(image, maps, strict=True))


def test_dry_run_goes_on_where_it_stopped(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "CYCLE", 2)
    monkeypatch.setattr(bench, "WARMUP", 1)
    out = tmp_path / "rows.json"
    bench.main(["--tiny", "--out", str(out), "--only", "unet_r34,variable"])
    rows = json.loads(out.read_text())["rows"]
    assert [(row["cleanup"], row["every"]) for row in rows] == [("none", 1), ("empty_cache", 10), ("both", 10)]
    assert all(row["fits"] and row["samples_per_s"] > 0 for row in rows)
    assert "samples_per_s" in capsys.readouterr().out
    monkeypatch.setattr(bench, "rate", lambda *_: pytest.fail("the rows are there already"))
    bench.main(["--tiny", "--out", str(out), "--only", "unet_r34,variable"])
    bench.main(["--tiny", "--out", str(out), "--deadline", "0"])
    assert json.loads(out.read_text())["rows"] == rows


def test_running_out_of_memory_is_a_result(bench, tmp_path, monkeypatch):
    results = bench.Results(tmp_path / "rows.json")
    group = bench.Group("unet_r34", "variable", True, [bench.BOTH])
    case = SimpleNamespace(batch=2, side=64, tiny=True)
    assert bench.limit_for(group, results) is None
    bench.run_group(group, case, results, 0.1)  # without the row to take the limit from
    assert results.rows == []
    results.add(group._replace(limited=False).key(bench.NONE), {"allocated_gb": 2.0})
    assert bench.limit_for(group, results) == pytest.approx(2.1)
    monkeypatch.setattr(bench, "variable", lambda case: (None, {}))

    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench, "rate", full)
    bench.run_group(group, case, results, 0.1)
    assert results.get(**group.key(bench.BOTH))["fits"] is False

    def broken(*_):
        raise RuntimeError("something else\nand more")

    monkeypatch.setattr(bench, "rate", broken)
    other = group._replace(limited=False, cleanups=[bench.EACH[0]])
    bench.run_group(other, case, results, 0.1)
    assert results.rows[-1]["error"] == "something else"
    assert results.get(**other.key(bench.EACH[0])) is None
