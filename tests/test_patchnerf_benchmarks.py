"""The benchmarks of lit_patchnerf: dry runs of the real code, and what they compute besides."""

import argparse
import doctest
import importlib
import inspect
import json
import math
import shutil
import time
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
import torch

from lit_patchnerf.data import PatchVideoData
from lit_patchnerf.losses import FORMULAS
from lit_patchnerf.models import GridConfig
from lit_patchnerf.models.blocks import Activation
from lit_patchnerf.module import LitPatchNeRF
from lit_patchnerf.optim import Name as OptimizerName
from lit_patchnerf.optim import make_optimizer

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs" / "patchnerf"
PEER = """
import argparse, sys, decord
from pytorchvideo.data import encoded_video
assert sys.argv[0] == "train_nerv_all.py" and "-j" in sys.argv
epochs = int(sys.argv[sys.argv.index("-e") + 1])
for n in range(epochs):
    print(f"Time/epoch: \\tCurrent:{0.5 if n else 2.0:.2f} \\tAverage:1.0")
print(f"Eval at epoch {epochs} for bunny: pred_seen_psnr: 30.12 quant_seen_psnr: 29.9")
"""


@pytest.fixture
def script(monkeypatch):
    """Import a script by its name; it imports its neighbours by their bare names."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn.benchmark
    yield importlib.import_module
    torch.set_float32_matmul_precision(precision)
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = tf32, cudnn


def run(script, name, out, *more):
    """A dry run of a script; its rows that are no summary, and those that are."""
    script(name).main(["--tiny", "--out", str(out), *more])
    rows = json.loads(out.read_text())["rows"]
    return [row for row in rows if row["part"] == "run"], [row for row in rows if row["part"] == "summary"]


def table(script, name, rows):
    return script("tables_patchnerf").TABLES_PATCHNERF[name][1]({"rows": rows})


def test_doctests(script):
    for name in ("patchnerf_runs", "patchnerf_time"):
        assert doctest.testmod(script(name)).failed == 0


def test_bunny(script, tmp_path, monkeypatch):
    out = tmp_path / "a.json"
    (row,), (mean,) = run(script, "patchnerf_bunny", out, "--only", "bunny_1.5m", "--", "--model.lr", "0.01")
    assert row["psnr_db"] == mean["psnr_db"] > 5
    assert row["params"] <= 6000
    assert (row["epochs"], row["steps"], row["lr"], row["overrides"]) == (2, 10, 0.01, "--model.lr 0.01")
    assert row["wall_s"] == pytest.approx(row["setup_s"] + row["train_s"] + row["val_s"], abs=0.05)
    assert 0 < row["first_s"] <= row["train_s"]
    # Three batches an epoch: five of the six come after the first one.
    assert row["s_epoch"] == pytest.approx((row["train_s"] - row["first_s"]) / 5 * 3, abs=0.02)
    assert "| `bunny_1.5m` |" in table(script, "patchnerf-bunny", [row, mean])
    bench = script("patchnerf_bunny")
    monkeypatch.setattr(bench, "train", lambda *_: pytest.fail("the row is there already"))
    run(script, "patchnerf_bunny", out, "--only", "bunny_1.5m", "--", "--model.lr", "0.01")
    bench.main(["--take", str(out), "--out", str(tmp_path / "b.json")])
    assert [r["part"] for r in json.loads((tmp_path / "b.json").read_text())["rows"]] == ["run", "summary"]


def test_a_script_needs_a_video(script, capsys):
    for words in ([], ["--video", "no_such.mp4"]):
        with pytest.raises(SystemExit):
            script("patchnerf_bunny").main(words)
        assert "--video: expected the video" in capsys.readouterr().err


def test_a_deadline_and_a_failed_run_leave_the_rest(script, tmp_path, monkeypatch, capsys):
    bench = script("patchnerf_bunny")

    def fail(*_):
        raise torch.OutOfMemoryError("no memory\nat all")

    monkeypatch.setattr(bench, "train", fail)
    words = ["--only", "bunny_1.5m", "--deadline"]
    rows, _ = run(script, "patchnerf_bunny", tmp_path / "a.json", *words, str(time.time() + 100))
    assert [row["error"] for row in rows] == ["no memory"]
    bench.main(["--tiny", "--out", str(tmp_path / "b.json"), *words, "1"])
    assert "deadline: stopped before profile bunny_1.5m" in capsys.readouterr().out


def test_time(script, tmp_path, monkeypatch):
    bench, repo = script("patchnerf_time"), tmp_path / "repo"
    monkeypatch.setattr(bench, "WRAPPED", bench.WRAPPED.replace(", torch", "").partition("print(")[0])  # a quick start
    repo.mkdir()
    (repo / "train_nerv_all.py").write_text(PEER)
    words = ["--repo", str(repo), "--workers", "4"]
    rows, _ = run(script, "patchnerf_time", tmp_path / "a.json", *words)
    ours = [row for row in rows if row["tool"] == "ours"]
    assert [(r["epochs"], r["every"], len(r.get("curve", ()))) for r in ours] == [(2, 0, 0), (2, 1, 2)]
    first, last = ours[1]["curve"]
    assert (first["epoch"], last["epoch"]) == (1, 2)
    assert 0 < first["train_s"] < last["train_s"] <= ours[1]["train_s"] + 0.01
    assert first["wall_s"] < last["wall_s"] <= ours[1]["wall_s"]
    (peer,) = [row for row in rows if row["tool"] == "HNeRV"]
    assert (peer["epochs"], peer["psnr_db"], peer["s_epoch"], peer["train_s"]) == (2, 30.12, 0.5, 2.5)
    assert peer["paper_s"] == pytest.approx(peer["wall_s"] + 298 * 0.5, abs=0.1)
    assert peer["computed"]
    text = table(script, "patchnerf-time", rows)
    assert "| HNeRV, 4 workers | 2 | 30.12 |" in text
    assert "No schedule reached 35.57 dB" in text


def test_a_peer_that_fails_says_why(script, tmp_path, monkeypatch):
    bench = script("patchnerf_time")
    (tmp_path / "train_nerv_all.py").write_text("raise RuntimeError('no such card')")
    monkeypatch.setattr(bench, "WRAPPED", bench.WRAPPED.replace(", torch", ""))
    assert bench.run_peer(tmp_path, tmp_path, 1, 0, 60)["error"] == "RuntimeError: no such card"


def test_a_peer_gets_the_epochs_that_fit(script, tmp_path, monkeypatch):
    bench, asked = script("patchnerf_time"), []

    def stand_in(repo, folder, epochs, workers, timeout):
        asked.append(epochs)
        return {"epochs": epochs, "s_epoch": 2.0, "train_s": 2.0 * epochs, "wall_s": 2.0 * epochs + 10}

    monkeypatch.setattr(bench, "run_peer", stand_in)
    options = argparse.Namespace(repo=tmp_path, deadline=time.time() + 470, peer_epochs=300)
    row = bench.peer(options, tmp_path, 4, 0.5)
    assert asked == [4, 99]  # (235 - 15) / 2.2, less what a moment took
    assert row["paper_s"] == pytest.approx(610)
    options.deadline = math.inf
    row = bench.peer(options, tmp_path, 4, 0.5)
    assert asked[2:] == [4, 300]
    assert not row["computed"]


def test_guide(script, tmp_path):
    rows, means = run(script, "patchnerf_guide", tmp_path / "a.json", "--only", "a100_aggressive", "--epochs", "1")
    whole, held = rows
    assert (whole["split"], held["split"]) == ("1_1_1", "6_6_10")
    assert "held_out_psnr_db" not in whole
    over = held["held_out_psnr_db"] - held["held_out_psnr_db_blend"]
    assert held["held_out_psnr_db_over_blend"] == pytest.approx(over, abs=1e-3)
    assert "held_out_centred" in held
    assert whole["mode"] == "coordinate"
    text = table(script, "patchnerf-guide", [*rows, *means])
    assert "embeddings toy:16, a stand-in for a CLIP tower" in text
    assert "26 to 29" in text


def test_clip(script, tmp_path):
    arms = ["with", "on top, gradient stopped"]
    rows, means = run(script, "patchnerf_clip", tmp_path / "a.json", "--epochs", "1", "--arms", *arms)
    by_arm = {row["arm"]: row for row in rows}
    without, top = by_arm["without"], by_arm["on top, gradient stopped"]
    assert top["width"] == without["width"]
    assert top["params"] == without["params"] + top["head_params"]
    assert by_arm["with"]["params"] <= without["wanted"]
    assert all(by_arm[arm]["model_centred_cosine"] is not None for arm in arms)
    assert {"nearest_spearman", "blend_top5"} <= top.keys()
    # A head that sends no gradient back leaves the pixels alone.
    assert top["psnr_db"] == without["psnr_db"]
    gains = {row["arm"]: row.get("psnr_db_gain") for row in means}
    assert gains["without"] is None
    assert gains["on top, gradient stopped"] == 0
    assert "| on top, gradient stopped |" in table(script, "patchnerf-clip", [*rows, *means])


def test_ablation(script, tmp_path, capsys):
    settings = ["activation sin", "coordinate mode"]
    words = [word for setting in settings for word in ("--only", setting)]
    rows, means = run(script, "patchnerf_ablation", tmp_path / "a.json", "--epochs", "1", *words)
    assert [row["setting"] for row in rows] == ["base", "coordinate mode"]
    assert "activation sin: left out, the profile has that" in capsys.readouterr().out
    base, other = rows
    assert (other["mode"], other["sample"], other["batch_size"]) == ("coordinate", "patch", 8)
    gain = next(row for row in means if row["setting"] == "coordinate mode")["psnr_db_gain"]
    assert gain == pytest.approx(other["psnr_db"] - base["psnr_db"], abs=1e-4)
    assert "| coordinate mode |" in table(script, "patchnerf-ablation", [*rows, *means])


def test_every_setting_of_the_ablation_is_one_that_this_version_has(script):
    known = {
        "model.decoder": {field.name for field in fields(GridConfig)},
        "model.optimizer_options": set(inspect.signature(make_optimizer).parameters),
        "trainer": {"precision"},
        "ema": {"enabled"},
    }
    for group, owner in (("model", LitPatchNeRF), ("data", PatchVideoData)):
        known[group] = set(inspect.signature(owner).parameters)
    choices = {"--model.loss": tuple(FORMULAS), "--model.decoder.activation": get_args(Activation)}
    choices |= {"--model.optimizer": get_args(OptimizerName), "--model.mode": ("coordinate",)}
    for changed in script("patchnerf_ablation").SETTINGS.values():
        for option, value in zip(changed[::2], changed[1::2], strict=True):
            group, _, name = option.removeprefix("--").rpartition(".")
            assert name in known[group]
            assert value in choices.get(option, (value,))


def test_compression(script, tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    rows, _ = run(script, "patchnerf_compression", tmp_path / "a.json", "--epochs", "1", "--save", str(kept))
    by_way = {(row["way"], row["bits"]): row for row in rows}
    assert list(by_way) == [
        ("as trained", 32),
        ("rounded", 8),
        ("rounded", 6),
        ("trained on", 32),
        ("QAT", 8),
        ("QAT", 6),
    ]
    before, eight, six = (by_way[way] for way in list(by_way)[:3])
    assert before["bytes"] == 4 * before["params"]
    for row in (eight, six, by_way["QAT", 8]):
        assert row["bytes"] == row["on_disk"] == sum(row["parts"].values())
        assert row["bpp"] == pytest.approx(8 * row["bytes"] / (10 * 32 * 64), abs=1e-5)
        assert row["lost_db"] == pytest.approx(before["psnr_8bit_db"] - row["psnr_8bit_db"], abs=1e-3)
        assert row["fps_fp32"] > 0
    assert six["bytes"] < eight["bytes"] < before["bytes"]
    assert abs(eight["lost_db"]) < 0.1
    assert "| rounded, 8 bit |" in table(script, "patchnerf-compression", rows)

    def fail(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    # A checkpoint takes the place of the training; those that follow it are still made.
    monkeypatch.setattr(script("patchnerf_compression"), "train", fail)
    words = ["--ckpt", str(kept / "bunny_1.5m_0.ckpt")]
    rows, _ = run(script, "patchnerf_compression", tmp_path / "b.json", *words)
    assert [row.get("error") for row in rows] == [None] * 3 + ["no memory"] * 3
    assert rows[0]["psnr_8bit_db"] == before["psnr_8bit_db"]
    with pytest.raises(SystemExit):
        run(script, "patchnerf_compression", tmp_path / "c.json", "--ckpt", "no_such.ckpt")


def test_means_and_differences(script):
    runs = script("patchnerf_runs")
    key = ("part", "arm", "profile", "seed")
    rows = [
        {"part": "run", "arm": a, "profile": "p", "seed": s, "x": x + s, "y": None}
        for a, x in (("a", 1.0), ("b", 3.0))
        for s in (0, 1)
    ]
    base, other = runs.by_setting(rows, key, ("x", "y"), lambda row: row["arm"] == "a")
    assert base == {"part": "summary", "arm": "a", "profile": "p", "runs": 2, "x": 1.5, "x_sd": 0.70711}
    assert other["x_gain"] == other["x_gain_low"] == other["x_gain_high"] == 2.0
    assert runs.paired(rows[2:3], rows[:1], ("x",)) == {"x_gain": 2.0}


def test_profiles(script, tmp_path):
    bench, out = script("profiles"), tmp_path / "profiles_patchnerf.json"
    bench.main(["--tiny", "--only", "patchnerf/a100_moderate", "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert "error" not in row
    assert (row["per_frame"], row["samples_epoch"], row["sample"]) == (8, 48, "patch")
    assert row["s_epoch"] == pytest.approx(48 / row["samples_s"], rel=0.01)
    assert "| `a100_moderate` |" in table(script, "patchnerf-profiles", [row])


def test_headers_of_profiles(script, tmp_path):
    bench, folder = script("profiles"), tmp_path / "patchnerf"
    shutil.copytree(FOLDER, folder)
    results = bench.Results(tmp_path / "profiles_patchnerf.json")
    common = {"fits": True, "reserved_gb": 3.0, "allocated_gb": 2.0, "limit_gb": 7.5, "data": "drawn", "s_epoch": 0.25}
    results.add({"name": "patchnerf/a100_moderate"}, common | {"samples_s": 800.0, "per_frame": 8})
    results.add({"name": "patchnerf/bunny_1.5m"}, common | {"samples_s": 200.0, "per_frame": 1})
    bunny = {"part": "summary", "profile": "bunny_1.5m", "epochs_wanted": None, "overrides": ""}
    whole = {"psnr_db": 38.75, "train_s": 61.0, "epochs": 300.0}
    bench.Results(tmp_path / "patchnerf_bunny.json").add(bunny, whole)
    task = bench.TASKS["patchnerf"]
    assert bench.write_headers(results, folder, task) == 2
    assert bench.write_headers(results, folder, task) == 0
    lines = [n for n in (folder / "bunny_1.5m.yaml").read_text().splitlines() if n.startswith(bench.MEASURED)]
    assert len(lines) == 2
    assert "200 frames/s = 2.00 x a100_moderate, 0.25 s an epoch" in lines[0]
    assert "38.75 dB on Big Buck Bunny after 300 epochs, 61 s of training on cpu; on cpu limited" in lines[0]
    rest = [
        [n for n in p.read_text().splitlines() if not n.startswith(bench.MEASURED)]
        for p in (folder / "bunny_1.5m.yaml", FOLDER / "bunny_1.5m.yaml")
    ]
    assert rest[0] == rest[1]


def test_profiles_are_measured_with_their_card(script):
    profiles = script("profiles")
    cases = profiles.cases(profiles.TASKS["patchnerf"], [])
    assert cases[0].name == "patchnerf/a100_moderate"
    assert {c.name for c in cases} >= {f"patchnerf/{p.stem}" for p in FOLDER.glob("*.yaml") if p.stem != "demo"}
    assert all(case.card_gb for case in cases)
