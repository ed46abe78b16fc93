import shlex
import shutil
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lit_callbacks import EMA, MemoryAndThroughput, MilestoneGuard

from lit_landmarks.__main__ import LandmarkCLI, main
from lit_landmarks.data import LandmarkData
from lit_landmarks.module import LitLandmarks
from tests.helpers.profiles import (
    ROOT,
    changed_lines,
    check_header,
    check_prints_itself,
    commands,
    content,
    differences,
)

ALL = sorted((ROOT / "configs" / "landmarks").glob("*.yaml"))
PROFILES = [path for path in ALL if path.stem != "demo"]  # the demo is no hardware profile
EXPECTED = {
    *("rtx3070ti_ultra_speed", "rtx3070ti_fast", "rtx3070ti_balanced", "rtx3070ti_good", "rtx3070ti_best"),
    *("rtx3070ti_ultra_quality", "rtx3070ti_prototype", "rtx3070ti_development", "rtx3070ti_quick"),
    *("rtx3070ti_max_accuracy", "rtx3070ti_max_quality", "two_stage_1", "two_stage_2", "gtx1660ti_6gb"),
    *("low_memory_4gb", "rtx3070", "rtx3090", "rtx4090", "a100", "h200"),
}
AUGMENT = ("rotation", "scale", "shift", "contrast", "gamma", "elastic", "cutout")
# What hardware decides, and what follows from the number of epochs.
MAY_DIFFER = {
    "trainer.precision",
    "trainer.max_epochs",
    "trainer.accumulate_grad_batches",
    "trainer.benchmark",
    "trainer.check_val_every_n_epoch",
    "trainer.callbacks.3.init_args.milestones",
    "trainer.callbacks.4.init_args.milestones",
    "model.lr",
    "model.compile",
    "model.cuda_graph",
    "model.gradient_checkpointing",
    "data.image_size",
    "data.batch_size",
    "data.store",
    "data.num_workers",
    "ema.enabled",
    "ema.decay",
    "ema.warmup",
}
# Stage 2 has to find what stage 1 wrote; the h200 profile is our own recipe for the shortest honest training.
ALSO = {
    "h200": {"model.loss", "model.sigma", *(f"data.augment.{k}" for k in AUGMENT)},
    "two_stage_1": {
        "trainer.callbacks.0.init_args.dirpath",
        "trainer.callbacks.0.init_args.enable_version_counter",
    },
}
SMALL = shlex.split(
    "--model.pretrained false --trainer.accelerator cpu --trainer.precision 32-true "
    "--trainer.enable_progress_bar false --trainer.enable_model_summary false --data.format synthetic "
    "--data.synthetic_train 8 --data.synthetic_test 1 --data.image_size 64 --data.batch_size 2 --data.num_workers 0"
)

pytestmark = pytest.mark.usefixtures("torch_settings")
each = pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
each_profile = pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)


def build(*args):
    return LandmarkCLI(LitLandmarks, LandmarkData, "lit_landmarks", ["fit", *map(str, args)], build_only=True)


@pytest.fixture(scope="module")
def parser():
    """The real command line's parser; making one takes longer than using it."""
    return build("--config", ALL[0]).parser


def test_every_promised_profile_exists():
    assert {path.stem for path in PROFILES} >= EXPECTED


@each
def test_prints_itself_and_builds(path, parser, tmp_path, capsys):
    copy = check_prints_itself(path, parser, tmp_path, capsys)

    # The names in the file are checked below; a network is only built when a fit begins.
    cli = build("--config", copy, "--model.pretrained", "false", "--trainer.accelerator", "cpu")
    want = content(path)
    assert cli.trainer.max_epochs == want["trainer"]["max_epochs"]
    assert cli.trainer.accumulate_grad_batches == want["trainer"].get("accumulate_grad_batches", 1)
    assert cli.trainer.gradient_clip_val == 1.0
    assert cli.datamodule.batch_size == want["data"]["batch_size"]
    assert cli.model.hparams["backbone"] == want["model"]["backbone"]
    assert cli.model.net is None
    assert any(isinstance(c, EMA) for c in cli.trainer.callbacks)


@each_profile
def test_callbacks(path):
    callbacks = content(path)["trainer"]["callbacks"]
    names = [c["class_path"].rpartition(".")[2] for c in callbacks]
    guards = [MilestoneGuard.__name__] * 2
    assert names == [
        ModelCheckpoint.__name__,
        LearningRateMonitor.__name__,
        MemoryAndThroughput.__name__,
        *guards,
    ]
    checkpoint = callbacks[0]["init_args"]
    assert (checkpoint["monitor"], checkpoint["mode"]) == ("val/mre_px", "min")
    assert checkpoint["save_last"]
    assert checkpoint["save_on_exception"]


@each_profile
def test_milestones_fall_on_validations_and_get_stricter(path):
    trainer = content(path)["trainer"]
    for guard in trainer["callbacks"][3:]:
        epochs, values = list(guard["init_args"]["milestones"]), list(guard["init_args"]["milestones"].values())
        assert epochs == sorted(set(epochs))
        assert values == sorted(values, reverse=guard["init_args"]["mode"] == "min")
        assert epochs[0] >= 1
        assert epochs[-1] <= trainer["max_epochs"]
        assert not any(epoch % trainer["check_val_every_n_epoch"] for epoch in epochs)
    # The last checkpoint is that of the last epoch.
    assert trainer["max_epochs"] % trainer["check_val_every_n_epoch"] == 0


@each
def test_backbone_and_decoder_exist(path):
    model = content(path)["model"]
    assert timm.is_model(model["backbone"])
    assert not model.get("pretrained") or timm.models.is_model_pretrained(model["backbone"])
    assert model.get("decoder", "auto") in ("auto", "branch", "pyramid") or hasattr(smp, model["decoder"])


@each_profile
def test_header(path, profile_benchmark):
    check_header(path)
    assert profile_benchmark.card_gb(path) in (4, 6, 8, 24, 40, 141)


@each_profile
def test_touches_only_what_hardware_decides(path):
    balanced = next(p for p in PROFILES if p.stem == "rtx3070ti_balanced")
    assert differences(path, balanced) <= MAY_DIFFER | ALSO.get(path.stem, set())


def test_profile_fits_by_name(tmp_path):
    small = ["--model.backbone", "hrnet_w18_small", "--trainer.default_root_dir", str(tmp_path)]
    cli = main(["fit", "--config", "rtx3070ti_fast", *SMALL, *small, "--trainer.fast_dev_run", "2"])
    assert cli.trainer.global_step == 2
    assert torch.isfinite(cli.trainer.callback_metrics["val/mre_mm"])
    assert {"train/loss", "val/sdr_2mm"} <= cli.trainer.callback_metrics.keys()


@pytest.mark.filterwarnings("ignore:Epoch 1. val")  # a milestone, missed after one step
def test_two_stages_work_as_their_headers_say(tmp_path, monkeypatch):
    first, second = commands(next(p for p in PROFILES if p.stem == "two_stage_1"))
    assert commands(next(p for p in PROFILES if p.stem == "two_stage_2")) == [first, second]
    monkeypatch.chdir(tmp_path)
    tiny = [*SMALL, "--model.backbone", "resnet10t", "--data.pixel_size", "0.1", "--trainer.max_epochs", "1"]
    tiny += ["--trainer.limit_train_batches", "1", "--trainer.num_sanity_val_steps", "0", "--plots.worst", "0"]
    for _ in range(2):  # a second stage 1 must not leave its checkpoint beside the first one's
        main([*first[:-2], *tiny])
    folder = Path("logs/landmarks/two_stage_1")
    assert [p.name for p in folder.glob("last*")] == ["last.ckpt"]
    at = second.index("--data.pixel_size")
    cli = main([*second[:at], *second[at + 2 :], *tiny, "--data.image_size", "96", "--trainer.fast_dev_run", "1"])
    assert cli.model.hparams["init_from"] == str(folder / "last.ckpt")
    assert cli.trainer.optimizers[0].defaults["lr"] == pytest.approx(5e-4)


def test_benchmark_rewrites_the_measured_lines_only(tmp_path, profile_benchmark):
    folder = tmp_path / "landmarks"
    shutil.copytree(ALL[0].parent, folder)
    results = profile_benchmark.Results(tmp_path / "results.json")
    common = {"fits": True, "reserved_gb": 3.21, "allocated_gb": 2.9, "limit_gb": 7.5, "data": "synthetic"}
    results.add({"name": "rtx3070ti_balanced"}, {**common, "samples_s": 50.0})
    results.add({"name": "rtx3070ti_fast"}, {**common, "samples_s": 100.0})
    results.add({"name": "rtx3070ti_good"}, {**common, "fits": False})
    results.add({"name": "rtx3070ti_best"}, {"error": "broken"})
    again = profile_benchmark.Results(results.path)
    assert again.get(name="rtx3070ti_best") is None
    assert profile_benchmark.write_headers(again, folder) == 3
    assert profile_benchmark.write_headers(again, folder) == 0
    for path in ALL:
        written = path.stem in ("rtx3070ti_balanced", "rtx3070ti_fast", "rtx3070ti_good")
        assert changed_lines(path, folder / path.name) == ([2, 3] if written else [])
    fast = (folder / "rtx3070ti_fast.yaml").read_text()
    assert "# measured: peak 3.2 GB reserved, 2.9 GB allocated; 100 samples/s = 2.00 x rtx3070ti_balanced" in fast
    assert "limited to 7.5 GB" in fast
    assert "# measured: does not fit" in (folder / "rtx3070ti_good.yaml").read_text()
