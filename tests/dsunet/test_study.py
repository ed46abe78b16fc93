"""The study: the same table after every kind of end, work shared by processes, and honest sentences."""

import json
import os
import pickle
import re
import signal
import sys
import threading
import time
import types
import warnings
from typing import ClassVar

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lit_callbacks.graceful import GracefulExit
from torch import nn

from lit_cli.errors import InputError
from lit_dsunet.data import VolumeData
from lit_dsunet.module import LitDSUNet
from lit_dsunet.study import runner, study_main, sweep_main
from lit_dsunet.study.arms import Arms, batch_arms, guide_arms, read_arms
from lit_dsunet.study.claims import Claim
from lit_dsunet.study.launch import Worker, launch
from lit_dsunet.study.plan import Run, Study, open_study, parse_config
from lit_dsunet.study.recorder import Recorder, common_digest, patch_gflops, tensor_digests
from lit_dsunet.study.report import make_report
from lit_dsunet.study.runner import work
from tests.helpers.distributed import another_process

TINY = [
    *("--config", "demo"),
    *("--data.synthetic_size", "[16,16,16]"),
    *("--data.patch_size", "[8,8,8]"),
    *("--model.features", "[4,8,8]"),
    *("--data.synthetic_train", "4"),
    *("--data.synthetic_test", "1"),
    *("--data.n_folds", "2"),
    *("--data.patches_per_volume", "4"),
    *("--data.batch_size", "2"),
    *("--trainer.max_epochs", "2"),
    *("--trainer.logger", "false"),
]
ARMS = ["--arms", "baseline", "mkdc_ds"]
OFTEN = ["--save_minutes", "0", "--draws", "1000"]
STEPS = 8  # of a run: 2 cases x 4 patches / 2, twice


def run_study(folder, *more):
    return study_main([*TINY, *ARMS, *OFTEN, "--out", str(folder), *more])


def without_cost(report):
    return {key: value for key, value in report.items() if key != "cost"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """An uninterrupted study: its folder and its report."""
    folder = tmp_path_factory.mktemp("plain") / "study"
    return folder, run_study(folder)


def at_step(number, act):
    """A training step that does something at the end of the number-th optimizer step of this process."""
    original, count = LitDSUNet.training_step, [0]

    def step(self, batch, batch_idx):
        count[0] += 1
        if count[0] == number:
            act()
        return original(self, batch, batch_idx)

    return step


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise RuntimeError("a broken card")


def killed(folder):
    """A study in a process of its own, since a fork of one whose autograd has threads cannot go backward."""
    warnings.simplefilter("ignore")
    LitDSUNet.training_step = at_step(STEPS + 6, die)  # in the second epoch of the second run
    run_study(folder)


# ---- the acceptance of the study -----------------------------------------------------------------------------------


def test_a_study_that_was_killed_and_interrupted_gives_the_same_table(plain, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "study"

    child = another_process(killed, folder)
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    first = folder / "runs/baseline-fold0-seed0/result.json"
    second = folder / "runs/mkdc_ds-fold0-seed0"
    assert first.exists()
    assert (second / "lock").exists()  # nobody was left to remove it
    assert [f.name for f in second.glob("*.ckpt")] == ["last.ckpt"]
    untouched = first.stat().st_mtime_ns

    with monkeypatch.context() as patch:  # the same run again, from its epoch
        patch.setattr(LitDSUNet, "training_step", at_step(3, fail))
        with pytest.raises(RuntimeError, match="a broken card"):
            run_study(folder)
    assert not (second / "lock").exists()
    assert "mkdc_ds-fold0-seed0: goes on" in capsys.readouterr().out

    with monkeypatch.context() as patch:  # its end, and the middle of the third
        patch.setattr(LitDSUNet, "training_step", at_step(6, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        with pytest.raises(GracefulExit):
            run_study(folder)
    assert (second / "result.json").exists()
    assert (folder / "runs/baseline-fold1-seed0/interrupted.ckpt").exists()

    report = study_main(["--out", str(folder), "--draws", "1000"])  # the folder knows the rest
    assert report is not None
    assert without_cost(report) == without_cost(plain[1])
    assert first.stat().st_mtime_ns == untouched
    for run in (folder / "runs").iterdir():
        assert sorted(f.name for f in run.iterdir()) == ["config.yaml", "final.ckpt", "initial.json", "result.json"]
        result = json.loads((run / "result.json").read_text())
        assert result["steps"] == STEPS
        assert result["samples"] == 2 * STEPS
        assert result["cost"]["seconds"] > 0


def test_every_case_is_held_out_once_and_arms_differ_in_nothing_else(plain):
    folder, report = plain
    splits = json.loads((folder / "splits_final.json").read_text())
    names = [name for fold in splits for name in fold["val"]]
    assert len(names) == len(set(names)) == 4
    for fold, split in enumerate(splits):
        assert not set(split["train"]) & set(split["val"])
        for arm in ("baseline", "mkdc_ds"):
            result = json.loads((folder / f"runs/{arm}-fold{fold}-seed0/result.json").read_text())
            assert result["cases"]["name"] == split["val"]
    assert report["checks"]["optimizer steps"] == f"equal ({STEPS})"
    assert all(text.startswith("equal") for text in report["checks"].values())
    assert report["runs"] == {"done": 4, "planned": 4, "counted": 4}
    text = (folder / "report.md").read_text()
    assert report["sentences"][0] in text
    assert "mkdc_ds instead of baseline changes Dice by" in text
    assert "patients are too few to tell" in text
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_figures_are_those_of_the_final_weights(plain):
    folder, _ = plain
    study = Study.load(folder)
    run = study.runs()[1]
    result = json.loads(study.result(run).read_text())
    module = LitDSUNet.load_from_checkpoint(study.path(run) / "final.ckpt", weights_only=True)
    config = parse_config(study.arguments(run))["data"]
    Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False).validate(
        module, VolumeData(**config), verbose=False
    )
    cases = VolumeData(**config)
    assert [s.name for s in cases.samples("val")] == result["cases"]["name"]
    assert float(module.trainer.callback_metrics["val/dice"]) == result["metrics"]["dice"]
    assert result["metrics"]["dice"] == pytest.approx(np.mean(result["cases"]["dice"]), abs=1e-6)
    expected = patch_gflops(module.net, 1, (8, 8, 8))
    assert result["cost"]["gflops"] == expected


def test_a_finished_study_is_only_reported(plain, monkeypatch, capsys):
    folder, report = plain
    monkeypatch.setattr(runner, "execute", fail)
    assert without_cost(study_main(["--out", str(folder), "--report_only", "--draws", "1000"])) == without_cost(report)
    again = study_main(["--out", str(folder), "--smallest", "60", "--draws", "1000"])
    assert again["smallest_effect"] == 60
    assert "4 of 4 runs done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--trainer.max_epochs", "3"], "study.json: trainer.max_epochs is 2 there and 3 here; a study keeps"),
        (["--data.fold", "1"], "--data.fold: a study sets this for each run itself; expected --folds"),
        (["--trainer.devices", "2"], "--trainer.devices: a study sets this for each run itself; expected --launcher"),
        (["--trainer.limit_val_batches=3"], "--trainer.limit_val_batches: a study sets this"),
        (["--folds", "2"], "--folds 2: expected 0 to 1"),
        (["--arms", "mkcd"], "--arms mkcd: no such arm; arms are baseline, mkdc, ds, mkdc_ds"),
        (["--model.mdkc", "off"], "mdkc"),
        (["--gpus", "2"], "--gpus and --launch: expected --launcher local or slurm"),
        (["--launcher", "slurm", "--launch", "partition"], "--launch partition: expected key=value"),
        (["--seeds", "-1"], "--seeds: expected numbers from 0"),
    ],
)
def test_what_does_not_fit_is_one_line(plain, more, message):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        run_study(plain[0], *more)
    assert "\n" not in str(error.value)


def test_a_study_starts_with_a_profile(tmp_path):
    for args, message in (
        (["--out", str(tmp_path)], "--config: name a profile"),
        ([], "--out"),
        (["--out", str(tmp_path), "--report_only"], r"study\.json: no such file; start a study with --config"),
    ):
        with pytest.raises(InputError, match=message):
            study_main(args)


# ---- what is studied -----------------------------------------------------------------------------------------------


def drawn(folder, arms=None, folds=(0, 1), seeds=(0,), **config):
    """A study without anything to train."""
    arms = arms or guide_arms({"model": {"mkdc": "off", "deep_supervision": 2}})
    folder.mkdir(exist_ok=True)
    return Study(folder, [], [], {"data.seed": 0, **config}, arms, list(folds), list(seeds), "code", {})


def test_a_study_may_grow_but_not_change(tmp_path):
    open_study(drawn(tmp_path, folds=[0]))
    grown = open_study(drawn(tmp_path, seeds=[3], folds=[1]))
    assert (grown.folds, grown.seeds) == ([0, 1], [0, 3])
    assert Study.load(tmp_path) == grown
    assert len(grown.runs()) == 16
    open_study(drawn(tmp_path, **{"data.root": "/elsewhere"}))  # machines may keep the data in different places
    with pytest.raises(InputError, match=r"model\.lr is None there and 0\.1 here"):
        open_study(drawn(tmp_path, **{"model.lr": 0.1}))
    other = guide_arms({"model": {"mkdc": "decoder", "deep_supervision": 2}})
    with pytest.raises(InputError, match=r"model\.mkdc of arm mkdc is 'skips' there and 'decoder' here"):
        open_study(drawn(tmp_path, other))
    changed = drawn(tmp_path)
    changed.code = "new"
    with pytest.raises(InputError, match="the code is code there and new here"):
        open_study(changed)
    open_study(changed, accept_code=True)


def test_runs_of_a_fold_come_together_so_that_early_results_can_be_compared(tmp_path):
    runs = drawn(tmp_path, seeds=[0, 1]).runs()
    assert [(r.seed, r.fold) for r in runs[::4]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [r.arm for r in runs[:4]] == ["baseline", "mkdc", "ds", "mkdc_ds"]
    assert runs[5].name == "mkdc-fold1-seed0"


def test_arms_of_ones_own(tmp_path):
    path = tmp_path / "arms.yaml"
    path.write_text(
        "arms:\n  a: {model.mkdc: off}\n  b: {model.mkdc: skips, model.tta: [0, 1], ema.enabled: true}\n"
        "factors:\n  X: [[a, b]]\n"
    )
    arms = read_arms(path)
    assert arms == Arms({"a": {"model.mkdc": "off"}, "b": arms.options["b"]}, "a", {"X": [("a", "b")]})
    study = drawn(tmp_path, arms)
    assert "--model.mkdc=off" in study.arguments(Run(0, 0, "a"))
    assert {"--model.tta=[0, 1]", "--ema.enabled=true", "--seed_everything=7", "--data.seed=7"} <= {
        *study.arguments(Run(7, 0, "b"))
    }
    some = arms.only(["b"])
    assert (some.factors, some.reference) == ({}, "b")
    assert open_study(drawn(tmp_path / "grows", some)).arms == some
    assert open_study(drawn(tmp_path / "grows", arms)).arms.reference == "a"
    assert not Arms({"a": {"model.arch": "resenc"}}, "a").same_start


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arms: [a]", "expected arms:"),
        ("arms: {}", "no arm"),
        ("arms: {a: {mkdc: off}}", "option 'mkdc': expected one such as"),
        ("arms: {a b: {}}", "expected letters, digits"),
        ("arms: {a: {}}\nreference: b", "reference 'b' is no arm"),
        ("arms: {a: {}}\nfactors: {X: [[a, b]]}", "factor X: 'b' is no arm"),
        ("arms: {a: {}}\nfactors: {X: [a, b, c]}", "factors: expected"),
        ("arms: {a: {}}\nfolds: 3", "folds: expected only"),
        ("arms: {a: [", "expected YAML"),
    ],
)
def test_wrong_arms_are_one_line(tmp_path, text, message):
    path = tmp_path / "arms.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        read_arms(path)
    assert "\n" not in str(error.value)
    assert "arms.yaml" in str(error.value)


def test_batch_sizes_at_equal_numbers_of_steps(tmp_path, monkeypatch):
    trained = []

    def pretend(study, run, claim, save_minutes):
        trained.append(run.arm)
        return fake_result(study, run, np.random.default_rng(0).uniform(size=6))

    monkeypatch.setattr(runner, "execute", pretend)
    folder = tmp_path / "sweep"
    report = sweep_main(
        [*TINY, "--out", str(folder), "--batches", "1", "2", "8", "--lr_rule", "linear", "sqrt", "--folds", "0"]
    )
    assert trained == ["batch1_linear", "batch1_sqrt", "batch2", "batch8_linear", "batch8_sqrt"]
    assert report["reference"] == "batch2"
    assert "no evidence that it hurts here" in report["sentences"][0]
    assert "order of the patches" not in report["checks"]
    study = Study.load(folder)
    rates = [study.arms.options[arm]["model.lr"] for arm in trained]
    np.testing.assert_allclose(rates, [0.0025, 0.00353553, 0.005, 0.02, 0.01], rtol=1e-5)
    data = VolumeData(**parse_config(study.arguments(Run(0, 0, "batch8_sqrt")))["data"])
    data.setup("fit")
    loader = data.train_dataloader()
    assert len(loader) == STEPS / 2  # of an epoch of the profile itself
    assert len(next(iter(loader)).image) == 8
    with pytest.raises(InputError, match="--batches: expected numbers from 1"):
        batch_arms({"data": {"batch_size": 8}, "model": {"lr": 0.1}}, [0], ["linear"], 1)


# ---- who does what -------------------------------------------------------------------------------------------------


def test_of_many_that_want_a_run_one_gets_it(tmp_path):
    for round_ in range(5):
        path = tmp_path / f"lock{round_}"
        if round_ % 2:  # left behind by a process that is gone
            path.write_text(json.dumps({**own_lock(tmp_path), "pid": 2**22 + 1, "token": "dead"}))
        claims = [Claim(path) for _ in range(12)]
        got = []
        threads = [threading.Thread(target=lambda c=c, got=got: got.append(c.acquire())) for c in claims]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(got) == 1
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
        for claim in claims:
            claim.release()
        assert not path.exists()


def own_lock(folder):
    """What this process writes into a lock."""
    with Claim(folder / "mine") as claim:
        assert claim.acquire()
        return json.loads((folder / "mine").read_text())


def test_locks_of_the_living_stay_and_those_of_the_silent_do_not(tmp_path):
    path = tmp_path / "lock"
    mine = own_lock(tmp_path)
    content = {
        "alive": mine,
        "number given out again": {**mine, "started": "1"},
        "another machine": {**mine, "host": "elsewhere"},
        "another container": {**mine, "space": "pid:[1]"},
        "damaged": None,
    }
    for name, lock in content.items():
        for age in (0, 700):
            path.write_text("{" if lock is None else json.dumps(lock))
            os.utime(path, (time.time() - age, time.time() - age))
            stale = name == "number given out again" or (age > 600 and name != "alive") or (age and name == "alive")
            claim = Claim(path, stale_after=600)
            assert claim.acquire() == bool(stale), (name, age)
            claim.release()
            path.unlink(missing_ok=True)
    path.write_text(json.dumps(content["another machine"]))
    assert Claim(path, stale_after=0).acquire()


def test_a_claim_beats_and_notices_that_it_was_lost(tmp_path):
    claim = Claim(tmp_path / "lock", stale_after=0.05)
    assert claim.acquire()
    before = claim.path.stat().st_mtime_ns
    time.sleep(0.1)
    assert claim.path.stat().st_mtime_ns > before
    claim.path.write_text(json.dumps({"token": "another", "pid": 1, "host": "elsewhere"}))
    for _ in range(100):
        if claim.lost:
            break
        time.sleep(0.01)
    assert claim.lost
    recorder = Recorder(tmp_path, [], claim)
    with pytest.raises(InputError, match="process 1 on elsewhere has taken this run over"):
        recorder.on_train_batch_start(None, None, None, 0)
    claim.release()
    assert claim.path.exists()  # it is the other's


def test_runs_of_others_are_left_to_them(tmp_path, monkeypatch):
    study, done = drawn(tmp_path), []

    def pretend(study, run, claim, save_minutes):
        done.append(run)
        return fake_result(study, run, [0.5])

    monkeypatch.setattr(runner, "execute", pretend)
    runs = study.runs()
    other = Claim(study.path(runs[2]) / "lock")
    assert other.acquire()
    assert work(study, runs, say=lambda _: None) == [runs[2]]
    assert done == [run for run in runs if run != runs[2]]
    other.release()
    assert work(study, runs, say=lambda _: None) == []
    assert done[-1] == runs[2]
    assert len(done) == len(runs)


# ---- what comes out ------------------------------------------------------------------------------------------------


def fake_result(study, run, dice, **more):
    """Write the result of a run that never was."""
    names = [f"case{run.fold}_{i}" for i in range(len(dice))]
    cases = {"name": names, "patient": names, "dice": [float(d) for d in dice], **more.pop("cases", {})}
    cost = {"seconds": 1.0, "samples_per_s": None, "peak_reserved_gb": float(run.seed), "parameters": 10}
    result = {
        "arm": run.arm,
        "fold": run.fold,
        "seed": run.seed,
        "cases": cases,
        "metrics": {"dice": 0.5},
        "cost": cost,
    }
    result |= {"steps": 8, "order": f"seed{run.seed}", "initial": {"a:1": f"seed{run.seed}"}}
    result |= {"device": "none", "torch": "2", "code": "code", **more}
    study.path(run).mkdir(parents=True, exist_ok=True)
    study.result(run).write_text(json.dumps(result))
    return result


def fill(study, effects, size=40, noise=0.01):
    """Results of a study with known effects per arm."""
    for run in study.runs():
        base = np.random.default_rng(run.fold).uniform(0.4, 0.8, size)
        jitter = np.random.default_rng([run.seed, run.fold, len(run.arm)]).normal(0, noise, size)
        fake_result(study, run, base + effects[run.arm] + jitter)


def test_effects_that_are_there_are_found_and_others_are_not(tmp_path):
    study = drawn(tmp_path, seeds=[0, 1, 2])
    fill(study, {"baseline": 0, "mkdc": 0, "ds": 0.03, "mkdc_ds": 0.03})
    report = make_report(study, draws=1000)
    dice = report["effects"]["dice"]
    assert dice["DS"]["verdict"] == "helps"
    assert dice["DS"]["mean"] == pytest.approx(3, abs=0.3)
    assert dice["MKDC"]["verdict"] == dice["MKDC x DS"]["verdict"] == "equivalent"
    mkdc, ds, both = report["sentences"]
    assert mkdc.startswith("MKDC changes Dice by ")
    assert mkdc.endswith("equivalent within ±0.5 points here.")
    assert ds.endswith("it helps here.")
    assert both.startswith("MKDC and DS together exceed the sum of their effects on Dice by ")
    assert (report["cases"], report["patients"], report["runs"]["counted"]) == (80, 80, 24)
    values = [
        np.mean([json.loads(study.result(Run(s, f, "ds")).read_text())["cases"]["dice"] for s in range(3)], axis=0)
        for f in (0, 1)
    ]
    found = report["arms"]["ds"]["dice"]
    assert found["mean"] == pytest.approx(100 * np.concatenate(values).mean())
    assert found["mean_of_folds"] == pytest.approx(100 * np.mean([v.mean() for v in values]))
    assert len(found["by_seed"]) == 3
    assert found["sd_of_seeds"] == pytest.approx(np.std(found["by_seed"], ddof=1))
    assert report["cost"]["ds"]["peak_reserved_gb"] == 2  # the largest
    assert "SD of seeds" in (tmp_path / "report.md").read_text()


def test_an_arm_may_hurt_or_say_nothing(tmp_path):
    study = drawn(tmp_path)
    fill(study, {"baseline": 0, "mkdc": -0.05, "ds": 0.0, "mkdc_ds": -0.05}, noise=0.02)
    report = make_report(study, draws=1000)
    assert report["sentences"][0].endswith("it hurts here.")
    fill(study, {"baseline": 0, "mkdc": 0.002, "ds": 0.0, "mkdc_ds": 0.002}, noise=0.05)
    assert make_report(study, draws=1000)["sentences"][0].endswith("no evidence that it helps here.")
    fill(study, dict.fromkeys(study.arms.options, -0.58), noise=0.0)
    make_report(study, draws=1000)
    assert "networks that have learned nothing differ in nothing" in (tmp_path / "report.md").read_text()


def test_an_incomplete_study_compares_what_all_arms_have(tmp_path):
    study = drawn(tmp_path)
    fill(study, dict.fromkeys(study.arms.options, 0.0))
    study.result(Run(0, 1, "ds")).unlink()
    report = make_report(study, draws=1000)
    assert report["runs"] == {"done": 7, "planned": 8, "counted": 4}
    assert report["folds"] == [0]
    text = (tmp_path / "report.md").read_text()
    assert "Not complete: 7 of 8 runs are done, 4 counted" in text
    assert "have learned nothing" not in text
    study.result(Run(0, 0, "ds")).unlink()
    with pytest.raises(InputError, match="6 of 8 runs are done, expected one fold of all 4 arms"):
        make_report(study, draws=1000)


def test_arms_that_differ_in_more_than_their_options_are_told(tmp_path):
    study = drawn(tmp_path, folds=[0])
    fill(study, dict.fromkeys(study.arms.options, 0.0))
    fake_result(study, Run(0, 0, "ds"), np.full(40, 0.5), steps=9, order="other", initial={"a:1": "other"}, code="new")
    report = make_report(study, draws=1000)
    assert report["checks"] == {
        "optimizer steps": "DIFFERENT (8, 9)",
        "order of the patches": "DIFFERENT (by seed and epoch)",
        "first weights of common layers": "DIFFERENT",
    }
    text = (tmp_path / "report.md").read_text()
    assert "The arms differ in more than their options" in text
    assert "The code changed between runs" in text
    fake_result(study, Run(0, 0, "ds"), np.full(39, 0.5))
    with pytest.raises(InputError, match="other cases than those of the other arms"):
        make_report(study, draws=1000)


def test_figures_with_gaps_and_those_of_which_less_is_better(tmp_path):
    arms = Arms({"a": {}, "b": {}}, "a")
    study = drawn(tmp_path, arms, folds=[0])
    rng = np.random.default_rng(0)
    base = rng.uniform(2, 9, 30)
    for run in study.runs():
        distance = (base - (2 if run.arm == "b" else 0) + rng.normal(0, 0.1, 30)).tolist()
        recall = [None] * 10 + [0.5] * 20 if run.arm == "a" else [0.7] * 20 + [None] * 10
        cases = {"hd95_mm": distance, "lesion_recall": recall, "lesion_f1": [None] * 30}
        fake_result(study, run, rng.uniform(size=30), cases=cases)
    report = make_report(study, draws=1000)
    assert report["differences"]["hd95_mm"]["b"]["verdict"] == "helps"
    assert report["differences"]["hd95_mm"]["b"]["mean"] == pytest.approx(-2, abs=0.1)
    recall = report["differences"]["lesion_recall"]["b"]
    assert (recall["cases"], recall["mean"]) == (10, pytest.approx(20))
    assert report["differences"]["lesion_f1"]["b"]["cases"] == 0
    json.dumps(report, allow_nan=False)
    assert "HD95, mm" in (tmp_path / "report.md").read_text()


def test_first_weights_have_to_be_those_of_the_other_arms(tmp_path):
    module = types.SimpleNamespace(net=nn.Linear(3, 2), device=torch.device("cpu"))
    trainer = types.SimpleNamespace(ckpt_path=None)
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    for folder in (one, two, three):
        folder.mkdir()
    Recorder(one, []).on_fit_start(trainer, module)
    Recorder(two, [one, three]).on_fit_start(trainer, module)
    module.net = nn.Sequential(*[nn.Linear(3, 2)])
    Recorder(three, [one]).on_fit_start(trainer, module)  # no layer in common
    module.net = nn.Linear(3, 2)
    with pytest.raises(InputError, match=r"first weights of weight:2x3 are not those of one"):
        Recorder(three, [one, two]).on_fit_start(trainer, module)
    assert common_digest([tensor_digests(module.net)] * 2)[0] == 2


def test_operations_are_counted_without_computing():
    conv = nn.Conv3d(2, 4, 3, padding=1, groups=2, bias=False)
    assert patch_gflops(conv, 2, (8, 8, 8)) == 2 * 512 * 4 * 27 / 1e9
    assert conv.weight.device.type == "cpu"


# ---- several processes ---------------------------------------------------------------------------------------------


class FakeExecutor:
    """Runs a job where it is submitted, from its pickle."""

    made: ClassVar = []

    def __init__(self, folder, cluster="local"):
        self.folder, self.cluster, self.parameters, self.jobs = folder, cluster, {}, []
        FakeExecutor.made.append(self)

    def update_parameters(self, **parameters):
        if "partition" in parameters:
            raise NameError("Parameter 'partition' need to be prefixed\nby an executor name.")
        self.parameters |= parameters

    def submit(self, worker):
        copy = pickle.loads(pickle.dumps(worker))
        self.jobs.append(copy)
        error = None
        if self.cluster == "local":
            try:
                copy()
            except Exception as problem:
                error = problem
        paths = types.SimpleNamespace(stderr="log")
        return types.SimpleNamespace(
            job_id=str(len(self.jobs)), done=lambda: True, exception=lambda: error, paths=paths
        )


@pytest.fixture
def submitit(monkeypatch):
    """A launcher that starts no process."""
    FakeExecutor.made = []
    module = types.ModuleType("submitit")
    module.LocalExecutor = module.AutoExecutor = FakeExecutor
    module.helpers = types.ModuleType("submitit.helpers")
    module.helpers.DelayedSubmission = lambda worker: ("again", worker)
    monkeypatch.setitem(sys.modules, "submitit", module)
    monkeypatch.setitem(sys.modules, "submitit.helpers", module.helpers)
    return module


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """A study on disk whose runs cost nothing, and the devices that they saw."""
    study, seen = open_study(drawn(tmp_path / "study")), []

    def pretend(study, run, claim, save_minutes):
        seen.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
        return fake_result(study, run, np.linspace(0.3, 0.6, 12))

    monkeypatch.setattr(runner, "execute", pretend)
    return study, seen


def test_one_process_per_gpu(pretended, submitit, monkeypatch):
    study, seen = pretended
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert launch(study, study.runs(), "local", options={"save_minutes": 1.0})
    (executor,) = FakeExecutor.made
    assert [job.device for job in executor.jobs] == ["5", "7"]
    assert executor.parameters["timeout_min"] > 1000
    assert seen == ["5"] * 8  # the first one was fast enough for all
    assert (study.folder / "report.md").exists()
    assert executor.jobs[0].checkpoint() == ("again", executor.jobs[0])
    assert launch(study, study.runs(), "local")
    assert len(FakeExecutor.made) == 1  # nothing is left to start a process for


def test_a_process_that_fails_is_named(pretended, submitit, monkeypatch, capsys):
    study, _ = pretended
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(runner, "execute", lambda *_: fail())
    assert launch(study, study.runs(), "local", gpus=1)
    assert "process 1 failed: a broken card; see log" in capsys.readouterr().out
    with pytest.raises(InputError, match="no GPU is visible here"):
        launch(study, study.runs(), "local")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(InputError, match="--gpus 2: only 1 are visible"):
        launch(study, study.runs(), "local", gpus=2)


def test_slurm_jobs_are_submitted_and_left_alone(pretended, submitit, capsys):
    study, seen = pretended
    parameters = {"timeout_min": 30, "slurm_partition": "gpu"}
    assert not launch(study, study.runs(), "slurm", gpus=3, parameters=parameters)
    (executor,) = FakeExecutor.made
    assert executor.cluster == "slurm"
    assert {"gpus_per_node": 1, **parameters}.items() <= executor.parameters.items()
    assert len(executor.jobs) == 3
    assert seen == []
    assert "submitted 1, 2, 3" in capsys.readouterr().out
    assert executor.jobs[0]() == 0  # as the job does it
    assert (study.folder / "report.json").exists()
    with pytest.raises(InputError, match="--launch: Parameter 'partition' need to be prefixed by an executor"):
        launch(open_study(drawn(study.folder, seeds=[1])), [Run(1, 0, "ds")], "slurm", parameters={"partition": "gpu"})


def test_without_submitit_there_is_one_line(pretended, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    for launcher in ("local", "slurm"):
        with pytest.raises(InputError, match="need submitit: pip install"):
            launch(pretended[0], pretended[0].runs(), launcher)


def test_the_announced_end_of_a_job_queues_it_again(pretended, monkeypatch):
    study, _ = pretended

    def stop(*_):
        raise GracefulExit(signal.SIGUSR2)

    monkeypatch.setattr(runner, "execute", stop)
    heard = []
    before = signal.signal(signal.SIGUSR2, lambda signum, _: heard.append(signum))
    try:
        with pytest.raises(GracefulExit):
            Worker(str(study.folder), [(0, 0, "ds")], [])()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert heard == [signal.SIGUSR2]
    assert not (study.path(Run(0, 0, "ds")) / "lock").exists()
