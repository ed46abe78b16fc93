import shlex
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lit_callbacks import EMA, MemoryAndThroughput, ValidationSchedule

from lit_cli.cli import find_checkpoint
from lit_dsunet.__main__ import VolumeCLI, main
from lit_dsunet.data import VolumeData
from lit_dsunet.models import build_network
from lit_dsunet.module import LitDSUNet
from lit_dsunet.planner import fingerprint, make_plan
from tests.helpers.profiles import (
    ROOT,
    changed_lines,
    check_header,
    check_prints_itself,
    commands,
    content,
    differences,
    flat,
)

FOLDER = ROOT / "configs" / "dsunet"
ALL = sorted(FOLDER.glob("*.yaml"))
PROFILES = [path for path in ALL if path.stem != "demo"]  # the demo is no hardware profile
ARMS = ("guide_baseline", "guide_mkdc", "guide_ds", "guide_mkdc_ds")
CARDS = {"gpu_8gb": 8, "gpu_12gb": 12, "rtxa5000_24gb": 24, "a100_40gb": 40, "a100_80gb": 80}
HEAD = fingerprint([[155, 240, 240]] * 100, [[1.0, 1.0, 1.0]] * 100, 1, 2)  # the volumes that they are planned for

# What the arms of the study are about.
ARMS_DIFFER = {"model.mkdc", "model.deep_supervision"}
# What memory and the kind of tensor cores decide.
CARDS_DIFFER = {
    "trainer.precision",
    "model.arch",
    "model.strides",
    "model.window_batch",
    "data.patch_size",
    "data.batch_size",
    "data.num_workers",
}
# The h200 profile is our own recipe for the shortest honest training of small volumes.
ALSO = {
    "h200": {
        "trainer.max_epochs",
        "trainer.check_val_every_n_epoch",
        "trainer.callbacks.4.init_args.every_n_epochs",
        "model.deep_supervision",
        "model.optimizer",
        "model.lr",
        "model.weight_decay",
        "model.momentum",
        "model.schedule",
        "model.warmup",
        "model.channels_last",
        "model.compile",
        "model.cuda_graph",
        "data.eval_batch_size",
    }
}
SMALL = shlex.split(
    "--trainer.accelerator cpu --trainer.precision 32-true --trainer.enable_progress_bar false "
    "--trainer.enable_model_summary false --data.format synthetic --data.synthetic_train 5 --data.synthetic_test 1 "
    "--data.synthetic_size [32,32,32] --data.patch_size [32,32,32] --data.batch_size 2 --data.num_workers 0 "
    "--trainer.log_every_n_steps 1"
)
TINY = shlex.split("--model.strides [1,2,2] --model.features [4,4,8] --model.deep_supervision 1")

pytestmark = pytest.mark.usefixtures("torch_settings")
each = pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
each_profile = pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)


def build(*args):
    return VolumeCLI(LitDSUNet, VolumeData, "lit_dsunet", ["fit", *map(str, args)], build_only=True)


@pytest.fixture(scope="module")
def parser():
    """The real command line's parser; making one takes longer than using it."""
    return build("--config", ALL[0], "--trainer.accelerator", "cpu", "--trainer.precision", "32-true").parser


def profile(name):
    return next(path for path in PROFILES if path.stem == name)


def test_every_promised_profile_exists():
    assert {path.stem for path in ALL} == {"demo", *ARMS, *CARDS, "h200"}


@each
def test_prints_itself_and_builds(path, parser, tmp_path, capsys):
    copy = check_prints_itself(path, parser, tmp_path, capsys)

    cli = build("--config", copy, "--trainer.accelerator", "cpu", "--trainer.precision", "32-true")
    want = content(path)
    assert cli.trainer.max_epochs == want["trainer"]["max_epochs"]
    assert cli.trainer.gradient_clip_val == want["trainer"]["gradient_clip_val"]
    assert cli.datamodule.hparams["batch_size"] == want["data"]["batch_size"]
    assert list(cli.datamodule.patch_size) == want["data"]["patch_size"]
    assert cli.model.net is None  # a network is only built when a fit begins
    assert any(isinstance(c, EMA) for c in cli.trainer.callbacks)


@each_profile
def test_networks_take_their_patches(path):
    model, patch = content(path)["model"], content(path)["data"]["patch_size"]
    names = ("arch", "mkdc", "mkdc_kernels", "mkdc_norm", "mkdc_residual", "deep_supervision", "strides")
    with torch.device("meta"):
        net = build_network(in_channels=1, num_classes=3, **{k: model[k] for k in names if k in model})
        heads = net.train()(torch.empty(2, 1, *patch))
    heads = heads if isinstance(heads, list) else [heads]
    assert len(heads) == 1 + model["deep_supervision"]
    assert heads[0].shape == (2, 3, *patch)
    assert all(p % s == 0 for p, s in zip(patch, net.stride, strict=True))


@each_profile
def test_callbacks(path):
    trainer = content(path)["trainer"]
    names = [c["class_path"].rpartition(".")[2] for c in trainer["callbacks"]]
    expected = (ModelCheckpoint, ModelCheckpoint, LearningRateMonitor, MemoryAndThroughput, ValidationSchedule)
    assert names == [c.__name__ for c in expected]
    best, last, _, _, schedule = (c.get("init_args", {}) for c in trainer["callbacks"])
    assert best == {"monitor": "val/dice", "mode": "max"}
    assert last == {"filename": "last", "enable_version_counter": False, "save_on_exception": True}
    # Full validations fall on epochs that validate at all, so that none is put off, and the last epoch is one.
    every = trainer["check_val_every_n_epoch"]
    assert schedule["cheap"] == "module"
    assert schedule["every_n_epochs"] % every == 0
    assert trainer["max_epochs"] % every == 0
    due = ValidationSchedule(**schedule).full_epochs(trainer["max_epochs"])
    assert due[-1] == trainer["max_epochs"]
    assert not any(epoch % every for epoch in due)


@each_profile
def test_header(path, profile_benchmark):
    check_header(path)
    assert profile_benchmark.card_gb(path) == CARDS.get(path.stem, 141 if path.stem == "h200" else 24)


@pytest.mark.parametrize("name", ARMS)
def test_arms_differ_in_their_two_switches_alone(name):
    assert differences(profile(name), profile("guide_baseline")) <= ARMS_DIFFER
    model = content(profile(name))["model"]
    assert (model["mkdc"], model["deep_supervision"]) == (
        "skips" if "mkdc" in name else "off",
        3 if name.endswith("ds") else 0,
    )


def test_the_study_makes_the_same_arms():
    arms = pytest.importorskip("lit_dsunet.study.arms").guide_arms
    for name in ARMS:
        found = arms(content(profile(name))).options
        assert list(found) == [arm.removeprefix("guide_") for arm in ARMS]
        for arm, options in found.items():
            values = flat(content(profile(f"guide_{arm}")))
            assert {k: values[k] for k in options} == options


def test_arms_are_the_guides():
    """Its settings, one by one."""
    values = flat(content(profile("guide_mkdc_ds")))
    wanted = {
        "trainer.max_epochs": 100,
        "trainer.precision": "16-mixed",
        "trainer.gradient_clip_val": 1.0,
        "trainer.callbacks.4.init_args.every_n_epochs": 5,
        "trainer.callbacks.4.init_args.first": True,
        "model.arch": "r3d18_unet",
        "model.mkdc": "skips",
        "model.mkdc_kernels": [1, 3, 5],
        "model.mkdc_norm": "batch",
        "model.mkdc_residual": False,
        "model.deep_supervision": 3,
        "model.ds_targets": "upsample",
        "model.ds_weights": "guide",
        "model.loss": "generalised_dice",
        "model.optimizer": "adamw",
        "model.lr": 1e-4,
        "model.weight_decay": 0.01,
        "model.schedule": "cosine",
        "model.warmup": 0.05,
        "data.patch_size": [96, 96, 96],
        "data.batch_size": 8,
        "data.patches_per_volume": 10,
        "data.foreground": 0.7,
        "data.n_folds": 5,
        "data.drop_last": True,
        "ema.enabled": False,
    }
    assert {k: values.get(k) for k in wanted} == wanted
    assert "data.val_patches" not in values  # full coverage unless somebody asks for less


@pytest.mark.parametrize("name", [*CARDS, "h200"])
def test_cards_differ_in_what_hardware_decides(name):
    assert differences(profile(name), profile("gpu_8gb")) <= CARDS_DIFFER | ALSO.get(name, set())


@pytest.mark.parametrize("name", CARDS)
def test_patch_and_batch_are_the_planners(name):
    got = content(profile(name))
    plan = make_plan(HEAD, CARDS[name], arch=got["model"]["arch"])
    assert got["data"]["patch_size"] == list(plan.patch)
    assert got["data"]["batch_size"] == plan.batch_size
    assert [s if isinstance(s, list) else [s] * 3 for s in got["model"]["strides"]] == plan.strides
    assert all(k == [3, 3, 3] for k in plan.kernels)  # the default


def test_a_plan_comes_on_top(tmp_path):
    """Every key of a plan replaces the profile's, so that the two describe one network."""
    plan = make_plan(fingerprint([[73, 112, 112]] * 250, [[2.0, 2.0, 2.0]] * 250, 2, 2), 8)
    path = tmp_path / "plan.yaml"
    path.write_text(plan.yaml())
    cli = build("--config", profile("gpu_8gb"), "--config", path, *SMALL[:4])
    assert cli.datamodule.patch_size == plan.patch
    assert cli.datamodule.hparams["batch_size"] == plan.batch_size
    assert cli.datamodule.hparams["spacing"] == list(plan.spacing)
    assert cli.model.hparams["strides"] == plan.strides
    assert cli.model.hparams["loss_options"] == {"batch_dice": True}


def test_guide_fits_by_name(tmp_path):
    where = ["--trainer.default_root_dir", str(tmp_path)]
    cli = main(["fit", "--config", "guide_mkdc_ds", *SMALL, *where, "--trainer.fast_dev_run", "2"])
    assert cli.trainer.global_step == 2
    assert torch.isfinite(cli.trainer.callback_metrics["train/loss"])
    assert {"val/dice", "val/lesion_f1"} <= cli.trainer.callback_metrics.keys()


@pytest.mark.filterwarnings("ignore:PredictionLogger")  # there is no volume to draw
def test_guide_validates_on_patches_as_its_header_says(tmp_path):
    command = next(c for c in commands(profile("guide_baseline")) if "--data.val_patches" in c)
    options = command[command.index("--data.val_patches") :]
    assert options[:4] == ["--data.val_patches", "20", "--data.val_batch_size", "16"]
    where = ["--trainer.default_root_dir", str(tmp_path), "--trainer.max_epochs", "1", "--data.patches_per_volume", "1"]
    small = ["--model.arch", "unet", *TINY]  # a checkpoint of the guide's network has half a gigabyte
    cli = main(["fit", "--config", "guide_baseline", *SMALL, *small, *where, *options])
    assert "val/dice" not in cli.trainer.callback_metrics
    (best,) = (c for c in cli.trainer.callbacks if isinstance(c, ModelCheckpoint))
    assert best.monitor == "val/patch_dice"
    assert Path(best.best_model_path).is_file()


def test_card_can_be_resumed_between_full_validations(tmp_path, monkeypatch):
    short = ["--trainer.max_epochs", "2", "--trainer.check_val_every_n_epoch", "1", "--data.steps_per_epoch", "2"]
    where = ["--trainer.default_root_dir", str(tmp_path), "--plots.worst_k", "0", "--plots.num_first", "0"]
    there = []

    def look(module):
        there.append([p.name for p in tmp_path.rglob("*.ckpt")])

    monkeypatch.setattr(LitDSUNet, "on_train_epoch_start", look)
    cli = main(["fit", "--config", "gpu_8gb", *SMALL, *TINY, *short, *where])
    assert there == [[], ["last.ckpt"]]  # the first validation was the cheap one
    best, last = (Path(c.best_model_path) for c in cli.trainer.callbacks if isinstance(c, ModelCheckpoint))
    assert (best.name, last.name) == ("epoch=1-step=4.ckpt", "last.ckpt")
    assert torch.load(last, weights_only=True)["epoch"] == 1
    assert cli.trainer.callback_metrics.keys() >= {"val/dice", "val/lesion_recall"}
    assert find_checkpoint("best", tmp_path) == best


@pytest.mark.parametrize("name", ["demo", "gpu_8gb"])  # save_last, and a second checkpoint callback with a schedule
def test_nothing_held_out(name, tmp_path, monkeypatch, recwarn):
    """All cases are trained on, nobody warns, and the run can be resumed from any epoch's end."""
    short = ["--data.fold", "null", "--trainer.max_epochs", "2", "--data.steps_per_epoch", "2"]
    where = ["--trainer.default_root_dir", str(tmp_path)]
    there = []

    def look(module):
        there.append(sum(1 for _ in tmp_path.rglob("last.ckpt")))

    monkeypatch.setattr(LitDSUNet, "on_train_epoch_start", look)
    cli = main(["fit", "--config", name, *SMALL, *TINY, *short, *where])
    assert len(cli.datamodule.cases("train")) == 5
    assert not [str(w.message) for w in recwarn if "zero" in str(w.message) or "monitor" in str(w.message)]
    assert cli.trainer.limit_val_batches == 1.0
    assert (
        cli.trainer.check_val_every_n_epoch
        == content(FOLDER / f"{name}.yaml")["trainer"]["check_val_every_n_epoch"]
        > 1
    )
    (last,) = tmp_path.rglob("*.ckpt")
    assert last == find_checkpoint("last", tmp_path)
    assert torch.load(last, weights_only=True)["global_step"] == 4
    if name != "demo":  # `save_last` is written at the end, or when the run is interrupted
        assert there == [0, 1]
    again = main(
        ["fit", "--config", name, *SMALL, *TINY, *short, *where, "--trainer.max_epochs", "3", "--ckpt_path", "last"]
    )
    assert again.trainer.global_step == 6
    cli = main(["test", "--config", name, *SMALL, *where, "--data.fold", "0", "--ckpt_path", "last"])
    assert "test/dice" in cli.trainer.callback_metrics


def test_nothing_held_out_in_a_dry_run(tmp_path, recwarn):
    where = ["--trainer.default_root_dir", str(tmp_path), "--trainer.fast_dev_run", "true"]
    cli = main(["fit", "--config", "demo", *SMALL, *TINY, "--data.fold", "null", *where])
    assert cli.trainer.global_step == 1
    assert not any("zero" in str(w.message) for w in recwarn)
    assert not any(key.startswith("val/") for key in cli.trainer.callback_metrics)


def test_benchmark_rewrites_the_measured_lines_only(tmp_path, profile_benchmark):
    folder = tmp_path / "dsunet"
    shutil.copytree(FOLDER, folder)
    results = profile_benchmark.Results(tmp_path / "results.json")
    common = {"fits": True, "reserved_gb": 3.21, "allocated_gb": 2.9, "limit_gb": 23.5, "data": "synthetic"}
    results.add({"name": "dsunet/guide_baseline"}, {**common, "samples_s": 50.0, "voxels": 96**3})
    results.add({"name": "dsunet/gpu_8gb"}, {**common, "samples_s": 100.0, "voxels": 96**3 // 2, "limit_gb": 7.5})
    results.add({"name": "dsunet/gpu_12gb"}, {**common, "fits": False})
    assert profile_benchmark.write_headers(results, folder, profile_benchmark.TASKS["dsunet"]) == 3
    assert profile_benchmark.write_headers(results, folder, profile_benchmark.TASKS["dsunet"]) == 0
    for path in ALL:
        written = path.stem in ("guide_baseline", "gpu_8gb", "gpu_12gb")
        assert changed_lines(path, folder / path.name) == ([2, 3] if written else [])
    lines = (folder / "gpu_8gb.yaml").read_text().splitlines()
    speed = "100 patches/s, in voxels 1.00 x guide_baseline"
    assert lines[2].startswith(f"# measured: peak 3.2 GB reserved, 2.9 GB allocated; {speed}")
    assert lines[3].endswith("python benchmarks/profiles.py --only dsunet/gpu_8gb")
    assert "# measured: does not fit" in (folder / "gpu_12gb.yaml").read_text()


def test_benchmark_measures_a_profile(tmp_path, profile_benchmark, capsys):
    out = tmp_path / "results.json"
    profile_benchmark.main(["--tiny", "--only", "dsunet/h200", "--out", str(out)])
    row = profile_benchmark.Results(out).get(name="dsunet/h200")
    assert (row["frame"], row["batch"], row["voxels"], row["fits"]) == ("32x32x32", 2, 32**3, True)
    assert row["samples_s"] > 0
    assert "dsunet/h200" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        profile_benchmark.main(["--task", "landmarks", "--only", "dsunet/h200"])
    names = [case.name for case in profile_benchmark.cases(profile_benchmark.TASKS["dsunet"], [])]
    assert names[0] == "dsunet/guide_baseline"
    assert {f"dsunet/{path.stem}" for path in PROFILES} < set(names)
