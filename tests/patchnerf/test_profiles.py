"""The files of `configs/patchnerf` through the real command line."""

import shlex

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lit_callbacks import MemoryAndThroughput

from lit_patchnerf.__main__ import VideoCLI, main
from lit_patchnerf.data import PatchVideoData
from lit_patchnerf.models import COORDINATE_PRESETS, count_params, decoder_config
from lit_patchnerf.module import LitPatchNeRF
from tests.helpers.profiles import (
    ROOT,
    check_best_and_last,
    check_prints_itself,
    commands,
    content,
    differences,
    flat,
    header,
)

FOLDER = ROOT / "configs" / "patchnerf"
# fc_dim, batch, epochs between evaluations
GUIDE = {
    "a100_quality": (256, 8, 10),
    "a100_conservative": (224, 16, 20),
    "a100_moderate": (192, 24, 30),
    "a100_aggressive": (128, 32, 30),
}
BUNNY = {"bunny_0.35m": 350_000, "bunny_0.75m": 750_000, "bunny_1.5m": 1_500_000, "bunny_3m": 3_000_000}
PROFILES = [FOLDER / f"{name}.yaml" for name in (*GUIDE, *BUNNY, "smoke_5_epochs", "gpu_8gb", "h200")]
# The demo is no hardware profile, and has a test of its own.
SMALL = shlex.split(
    "--trainer.accelerator cpu --trainer.precision 32-true --trainer.enable_progress_bar false "
    "--trainer.enable_model_summary false --model.target_params null "
    "--data.synthetic '{frames: 10, height: 32, width: 64}' --data.crop null --data.patch_size [16,16]"
)
SMALL_DECODERS = {
    "coordinate": "{fc_dim: 8, stem: [4, 4], strides: [2, 2], floor: 4, multiple: 4, levels: 8, hidden: 16}",
    "grid": "{width: 8, strides: [4, 2], reduction: 1.5, floor: 4, multiple: 4, latent_frames: [10, 5], "
    "latent_channels: [4, 4], levels: 0, activation: sin}",
}

pytestmark = pytest.mark.usefixtures("torch_settings")
each = pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)


def profile(name):
    return FOLDER / f"{name}.yaml"


@pytest.fixture(scope="module")
def parser():
    """The real command line's parser; making one takes longer than using it."""
    options = ["fit", "--config", str(PROFILES[0]), "--trainer.accelerator", "cpu"]
    return VideoCLI(LitPatchNeRF, PatchVideoData, "lit_patchnerf", options, build_only=True).parser


def test_every_promised_profile_exists():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {"demo", *(path.stem for path in PROFILES)}


@each
def test_prints_itself(path, parser, tmp_path, capsys):
    check_prints_itself(path, parser, tmp_path, capsys)


@pytest.mark.filterwarnings("ignore:data.data_split. 1_1_1 holds out none")  # a reconstruction is of all frames
@pytest.mark.parametrize("name", ["a100_moderate", "smoke_5_epochs", "bunny_1.5m", "h200"])  # of each kind one
def test_trains(name, tmp_path):
    """Everything as in the file, but frames, network, tower and device."""
    want = content(profile(name))
    decoder = ["--model.decoder", SMALL_DECODERS[want["model"]["mode"]]]
    tower = ["--data.embeddings", "toy:8"] if "embeddings" in want["data"] else []
    where = ["--trainer.default_root_dir", str(tmp_path), "--trainer.fast_dev_run", "2"]
    cli = main(["fit", "--config", name, *SMALL, *decoder, *tower, *where])
    assert cli.trainer.global_step > 0
    assert torch.isfinite(cli.trainer.callback_metrics["train/loss"])
    assert torch.isfinite(cli.trainer.callback_metrics["val/psnr_db"])
    assert cli.model.hparams["loss"] == want["model"]["loss"]
    assert cli.datamodule.hparams["steps_per_batch"] == want["data"]["steps_per_batch"]
    assert (
        type(cli.trainer.optimizers[0]).__name__ == {"adamw": "AdamW", "muon": "MuonAdamW"}[want["model"]["optimizer"]]
    )


@each
def test_callbacks(path):
    expected = [LearningRateMonitor, MemoryAndThroughput]
    assert check_best_and_last(path, "val/psnr_db") == [c.__name__ for c in expected]


@each
def test_header(path, profile_benchmark):
    lines = header(path)
    assert lines[0].startswith("# Card: ")
    assert any(line.startswith("# measured: ") for line in lines)
    assert all(line.startswith("#") for line in lines)
    assert ["fit", "--config", f"configs/patchnerf/{path.name}"] in [command[:3] for command in commands(path)]
    card = {**dict.fromkeys((*GUIDE, "smoke_5_epochs"), 40), "h200": 141}.get(path.stem, 8)
    assert profile_benchmark.card_gb(path) == card


@each
def test_the_last_epoch_is_validated(path):
    trainer = content(path)["trainer"]
    assert trainer["max_epochs"] % trainer["check_val_every_n_epoch"] == 0


@each
def test_steps_of_a_batch_divide_those_of_an_epoch_of_bunny(path):
    """Or the last batch would be captured apart. It has 132 frames; 6_6_10 trains on 80, which are 640 patches."""
    data = content(path)["data"]
    samples = {"1_1_1": 132, "6_6_10": 80}[data["data_split"]] * (8 if data["sample"] == "patch" else 1)
    steps = samples // data["batch_size"]
    if path.stem not in ("a100_moderate", "smoke_5_epochs"):  # 26 steps have no divisor near
        assert steps % data["steps_per_batch"] == 0


@pytest.mark.parametrize("name", GUIDE)
def test_the_guides_own(name):
    fc_dim, batch, every = GUIDE[name]
    values = flat(content(profile(name)))
    assert values["model.decoder.fc_dim"] == fc_dim == COORDINATE_PRESETS[name.removeprefix("a100_")].fc_dim
    assert (values["data.batch_size"], values["trainer.check_val_every_n_epoch"]) == (batch, every)
    assert (values["trainer.max_epochs"], values["data.data_split"], values["model.loss"]) == (300, "6_6_10", "fusion6")
    assert values["model.clip_start"] * 300 == pytest.approx(50, abs=0.5)
    assert differences(profile(name), profile("a100_moderate")) <= {
        "model.decoder.fc_dim",
        "data.batch_size",
        "data.steps_per_batch",
        "trainer.check_val_every_n_epoch",
    }


def test_the_trial_run_is_that_of_the_recommended_profile():
    assert differences(profile("smoke_5_epochs"), profile("a100_moderate")) == {
        "trainer.max_epochs",
        "trainer.check_val_every_n_epoch",
        "data.embeddings",
    }
    assert content(profile("smoke_5_epochs"))["trainer"]["max_epochs"] == 5


def test_the_small_card_has_the_recommended_network():
    assert differences(profile("gpu_8gb"), profile("a100_moderate")) == {"data.batch_size", "data.steps_per_batch"}


@pytest.mark.parametrize("name", BUNNY)
def test_sizes_are_kept_and_used(name):
    values = content(profile(name))
    limit = values["model"]["target_params"]
    assert limit == BUNNY[name]
    crop, patch = values["data"]["crop"], values["data"]["patch_size"]
    grid = [c // p for c, p in zip(crop, patch, strict=True)]
    config = decoder_config("grid", {**values["model"]["decoder"], "frame": crop, "grid": grid}, target_params=limit)
    assert 0.97 * limit < count_params(config) <= limit
    assert values["trainer"]["max_epochs"] == 300
    sizes = {"model.target_params", "model.decoder.reduction", "model.decoder.multiple", "model.decoder.floor"}
    assert differences(profile(name), profile("bunny_1.5m")) <= sizes
