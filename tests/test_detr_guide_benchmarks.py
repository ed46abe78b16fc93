"""The benchmarks of the guide's optimisations and of stability: their arithmetic, and dry runs."""

import importlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lit_callbacks import MemoryAndThroughput

from lit_detr.readers import make_reader
from tests.helpers.profiles import torch_settings_restored

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch):
    """Import a script by its name; it imports its neighbours by their bare names."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    with torch_settings_restored():
        yield importlib.import_module


def rows_of(path):
    return json.loads(path.read_text())["rows"]


# ---- frames ---------------------------------------------------------------------------------------------------------


def test_frames_and_their_files(script, tmp_path):
    scenes = script("detr_scenes").Scenes((64, 96), (0, 9), {"train": 6, "val": 2}, (2.0, 12.0), seed=3)
    table = scenes.read()
    scenes.write(tmp_path)
    options = {"group": "none", "fix": "none", "difficult": "crowd", "class_names": None}
    read = make_reader("auto", str(tmp_path), **options).read()
    assert read.class_names == table.class_names
    counts = set()
    for split, samples in table.splits.items():
        for ours, theirs in zip(samples, read.splits[split], strict=True):
            order = np.lexsort(ours.boxes.T), np.lexsort(theirs.boxes.T)
            np.testing.assert_array_equal(ours.boxes[order[0]], theirs.boxes[order[1]])
            np.testing.assert_array_equal(ours.labels[order[0]], theirs.labels[order[1]])
            counts.add(len(ours.boxes))
            sides = ours.boxes[:, 2:] - ours.boxes[:, :2]
            assert sides.min(initial=2) >= 2
            assert sides.max(initial=12) <= 12
            assert (ours.boxes[:, 2:] <= (96, 64)).all()
    assert len(counts) > 2
    assert max(counts) <= 9
    empty = script("detr_scenes").Scenes((64, 96), (0, 0), {"train": 6, "val": 2})
    sample = next(s for s in table.splits["train"] if len(s.boxes))
    x1, y1, x2, y2 = sample.boxes[-1].astype(int)  # drawn last, so nothing lies over it
    changed = scenes.image(sample.name)[0] != empty.image(sample.name)[0]
    assert changed[y1:y2, x1:x2].all()
    inside = np.zeros_like(changed)
    for a, b, c, d in sample.boxes.astype(int):
        inside[b:d, a:c] = True
    assert not changed[~inside].any()


# ---- the guide's optimisations --------------------------------------------------------------------------------------


def test_gains_by_hand(script):
    guide = script("detr_guide")

    def row(name, images_s, step_ms=240.0, **more):
        given = {"train_images": 1000, "val_s": 5.0, "low": images_s - 1, "high": images_s + 1}
        return {"row": name, "images_s": images_s, "step_ms": step_ms, **given, **more}

    rows = [
        row("baseline", 90.0),
        row("baseline, again", 100.0),
        row("baseline, last", 130.0),
        row("batch 36", 110.0),
        row("fp32", 50.0),
        row("fp32, no TF32", 40.0),
        row("quiet", 100.0, 200.0),
        row("log every step", 90.0, 210.0),  # 10 ms an entry
        row("refresh every step", 90.0, 204.0),  # 4 ms
        row("clean up every 5 steps", 90.0, 260.0),  # 300 ms
        row("watch memory every step", 90.0, 190.0),  # noise: less than without
        {"row": "all together", "fits": False},
    ]
    gains = {g["optimisation"][:2].strip(): g["times"] for g in guide.gains(rows) if "fp32" not in g["optimisation"]}
    assert gains["1"] == pytest.approx(1.1)
    assert gains["3"] == pytest.approx(2.0)
    assert gains["4"] is None
    assert gains["7"] == pytest.approx((10 + 5) / (10 + 2.5))  # 1000 images at 100 a second
    assert gains["8"] == pytest.approx((200 + 10 / 50 + 4 / 20) / (200 + 10 / 200 + 4 / 100))
    assert gains["9"] == pytest.approx((200 + 300 / 10) / (200 + 300 / 30))
    assert gains["al"] is None
    assert next(g["times"] for g in guide.gains(rows) if "TF32 in fp32" in g["optimisation"]) == pytest.approx(1.25)
    assert guide.gains(rows[3:]) == []
    assert [r.get("x baseline") for r in guide.relative(rows)][:4] == [0.9, 1.0, 1.3, 1.1]


def test_settings_are_one_change_each(script, tmp_path):
    guide = script("detr_guide")
    names = [s.name for s in guide.SETTINGS]
    assert len(names) == len(set(names))
    script("detr_scenes").Scenes((64, 64), (2, 2), {"train": 2, "val": 1}).write(tmp_path / "frames")
    wanted = {"quiet": (10**9, 0, 10**9), "log every step": (1, 0, 10**9), "watch memory every step": (10**9, 0, 1)}
    for setting in (s for s in guide.SETTINGS if s.name in (*wanted, "baseline", "all together")):
        cli = guide.build(setting, tmp_path / "frames", str(tmp_path), tiny=True)
        trainer = cli.trainer
        (bar,) = (c for c in trainer.callbacks if isinstance(c, TQDMProgressBar))
        (monitor,) = (c for c in trainer.callbacks if isinstance(c, MemoryAndThroughput))
        assert not any(isinstance(c, ModelCheckpoint) for c in trainer.callbacks)
        got = trainer.log_every_n_steps, bar.refresh_rate, monitor.every_n_steps
        usual = {"baseline": (50, 20, 50), "all together": (200, 100, 100)}
        assert got == (wanted | usual)[setting.name]


def test_guide_dry_run(script, tmp_path, monkeypatch, capsys):
    guide, out = script("detr_guide"), tmp_path / "rows.json"
    guide.main(["--tiny", "--only", "baseline", "--out", str(out), "--deadline", "0"])
    assert not out.exists()
    words = ["--tiny", "--only", "baseline, last", "--only", "clean up", "--out", str(out)]
    guide.main(words)
    rows = rows_of(out)
    assert [r["row"] for r in rows] == ["clean up every 5 steps", "baseline, last"]
    for row in rows:
        assert row["fits"]
        assert row["low"] <= row["images_s"] <= row["high"]
        assert row["images_s"] == pytest.approx(1000 * row["batch"] / row["step_ms"], rel=0.5)
        assert (row["train_images"], row["val_images"], row["parts"]) == (8, 2, 1)
        assert row["val_s"] > 0
    said = capsys.readouterr().out
    assert "optimisation" in said
    assert "x baseline" in said
    monkeypatch.setattr(guide, "run", lambda *_: pytest.fail("the rows are there already"))
    guide.main(words)


def test_faults_of_a_row_are_rows(script, tmp_path, monkeypatch):
    guide = script("detr_guide")
    results = guide.Results(tmp_path / "rows.json")

    def broken(*_):
        raise ValueError("no such thing")

    monkeypatch.setattr(guide, "run", broken)
    guide.measure(guide.SETTINGS[0], tmp_path, True, results)
    assert rows_of(results.path)[0]["error"] == "ValueError: no such thing"
    assert guide.gains(results.rows) == []


def test_too_little_shared_memory_is_said_before_workers_die_of_it(script, monkeypatch):
    guide = script("detr_guide")
    hparams = {"num_workers": 12, "prefetch_factor": 6, "batch_size": 36, "channels": 3}
    data = SimpleNamespace(hparams=hparams, image_size=(640, 640))
    monkeypatch.setattr(guide.Path, "is_dir", lambda self: True)
    for free, batches, fine in ((4 * 2**30, 100, True), (2**30, 100, False), (2**30, 10, True)):
        state = SimpleNamespace(f_bavail=free // 4096, f_frsize=4096)
        monkeypatch.setattr(guide.os, "statvfs", lambda path, state=state: state)
        if fine:
            guide.check_shared_memory(data, batches)
        else:
            with pytest.raises(RuntimeError, match=r"/dev/shm has 1.00 GB free, the loader may fill 2.97"):
                guide.check_shared_memory(data, batches)


# ---- stability ------------------------------------------------------------------------------------------------------


def test_every_fault_is_counted(script):
    bench = script("detr_stability")
    module = torch.nn.Linear(2, 1)
    module.device = torch.device("cpu")
    boxes = torch.tensor([[[0.5, 0.5, 0.25, 0.5], [0.5, 0.5, 0.0, 0.0]]])
    targets = SimpleNamespace(boxes=boxes, valid=torch.tensor([[True, False]]))
    batch = SimpleNamespace(image=torch.zeros(1, 3, 8, 20), targets=targets)
    reports = []
    watch = bench.Watch(2, reports.append, float("inf"))
    trainer = SimpleNamespace(precision_plugin=None, should_stop=False)
    watch.on_train_start(trainer, module)
    nan, inf = float("nan"), float("inf")
    # loss, gradient, weight of six steps
    for loss, gradient, weight in ((1, 3, 1), (3, inf, 1), (nan, 1, 1), (2, 4, 1), (inf, nan, nan), (2, 0, inf)):
        module.weight.data.fill_(weight)
        module.weight.grad = torch.tensor([[float(gradient), 0.0]])
        module.bias.grad = None
        watch.on_before_optimizer_step(trainer, module, None)
        watch.on_train_batch_end(trainer, module, {"loss": torch.tensor(float(loss))}, batch, 0)
    assert [r["steps"] for r in reports] == [2, 4, 6]
    assert [r["bad_gradient"] for r in reports] == [1, 1, 2]
    last = reports[-1]
    assert (last["bad_loss"], last["bad_parameters"], last["first_bad"]) == (2, 2, 1)
    assert last["largest_gradient"] == 4
    assert last["least_side_px"] == 4  # 0.5 x 8 and 0.25 x 20 px; the row that is none does not count
    assert reports[0]["loss_end"] == 2
    again = bench.Watch(2, reports.append, 0.0)
    again.load_state_dict(watch.state_dict())
    again.on_train_start(trainer, module)
    assert again.values(trainer)["bad_gradient"] == 2
    again.on_train_epoch_end(trainer, module)
    assert trainer.should_stop


def test_stability_dry_run_and_the_way_on(script, tmp_path, monkeypatch):
    bench, out = script("detr_stability"), tmp_path / "rows.json"
    words = ["--tiny", "--out", str(out), "--state", str(tmp_path / "state")]
    bench.main([*words, "--deadline", "0"])
    assert not out.exists()
    bench.main([*words, "--steps", "4"])
    (first,) = rows_of(out)
    assert (first["steps"], first["precision"], first["frame"]) == (4, "bf16-mixed", "96x64")
    assert [first[f"bad_{k}"] for k in bench.COUNTS] == [0, 0, 0]
    assert first["first_bad"] == -1
    assert 0 < first["largest_gradient"] < 1000
    assert 1.6 <= first["least_side_px"] < 8
    bench.main([*words, "--steps", "6"])
    (second,) = rows_of(out)
    assert (second["steps"], second["wanted"]) == (6, 6)  # four of them of the first call
    assert second["loss_begin"] == pytest.approx((4 * first["loss_begin"] + 2 * second["loss_end"]) / 6, rel=0.1)
    monkeypatch.setattr(bench, "build", lambda *_: pytest.fail("the row is there already"))
    bench.main([*words, "--steps", "6"])


def test_an_error_keeps_what_was_counted(script, tmp_path, monkeypatch):
    bench, out = script("detr_stability"), tmp_path / "rows.json"
    key = {"precision": "bf16-mixed", "frame": "96x64", "batch": 2, "compile": False, "cuda_graph": False}
    bench.Results(out).add(key, {"steps": 3, "bad_loss": 1})

    def broken(*_):
        raise RuntimeError("lost")

    monkeypatch.setattr(bench, "build", broken)
    bench.main(["--tiny", "--out", str(out)])
    (row,) = rows_of(out)
    assert (row["steps"], row["bad_loss"], row["error"]) == (3, 1, "RuntimeError: lost")
    shutil.rmtree(tmp_path)
