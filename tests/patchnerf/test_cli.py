"""The command line from a fit to a film, from a folder that is not the repository's."""

import os
import signal
from pathlib import Path

import cv2
import pytest
import torch
import yaml
from lightning.pytorch import Callback

from lit_patchnerf.__main__ import main
from lit_patchnerf.console import console

HERE = "tests.patchnerf.test_cli"
DECODER = "{width: 8, strides: [4, 2], reduction: 1.5, floor: 4, latent_frames: [8], latent_channels: [4], levels: 4}"
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
# Frames of 24 x 61 are padded to 32 x 64; 6 of 8 are trained on, in 3 steps.
TINY = [
    *QUIET,
    *("--data.synthetic", "{frames: 8, height: 24, width: 61, fps: 10}", "--model.decoder", DECODER),
    *("--data.grid", "null", "--data.patch_size", "[16, 16]", "--data.data_split", "3_3_4"),
]
SHORT = ["--trainer.max_epochs", "4", "--trainer.check_val_every_n_epoch", "2", "--trainer.log_every_n_steps", "1"]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cli = main(["fit", "--config", "demo", *TINY, *SHORT, "--plots.every_n_epochs", "2"])
    return folder, cli


@pytest.fixture
def inside(fitted, monkeypatch):
    """The folder of the fit, as the present one."""
    monkeypatch.chdir(fitted[0])
    return fitted[0]


def ends(capsys, *args):
    """The one line of a run that does not come to its end."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending:
        main(list(args))
    err = capsys.readouterr().err
    assert ending.value.code == 2, err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("lit-patchnerf: error: ")]
    return line


def film(path):
    """Frames and rate, as OpenCV reads them."""
    capture, frames = cv2.VideoCapture(str(path)), []
    rate = capture.get(cv2.CAP_PROP_FPS)
    while (read := capture.read())[0]:
        frames.append(read[1])
    return frames, rate


def test_a_fit_leaves_logs_checkpoints_and_pictures(fitted):
    folder, cli = fitted
    assert cli.trainer.global_step == 12
    assert {"lit_patchnerf", "logs"} & {path.name for path in folder.iterdir()} == {"logs"}
    assert (folder / "logs" / "patchnerf" / "demo").is_dir()
    assert list(folder.rglob("last.ckpt"))
    pictures = list(folder.rglob("*.png"))
    assert pictures
    assert cv2.imread(str(pictures[0])) is not None
    assert float(cli.trainer.callback_metrics["val/held_out_psnr_db"]) > 5


def test_a_test_gives_the_figures_of_the_best_validation(fitted, inside):
    """Model and video are the checkpoint's: neither the profile nor an option of the fit is repeated."""
    cli = main(["test", *QUIET, "--ckpt_path", "best", "--data.num_workers", "0", "--trainer.accelerator", "cpu"])
    best = torch.load(next(inside.rglob("last.ckpt")), weights_only=True)["callbacks"]
    (score,) = [float(s["best_model_score"]) for s in best.values() if isinstance(s, dict) and "best_model_score" in s]
    assert float(cli.trainer.callback_metrics["test/psnr_db"]) == pytest.approx(score, abs=1e-4)
    assert cli.model.hparams["frames"] == 8


def test_a_film_has_the_frames_and_the_size_of_the_video(fitted, inside):
    main(["predict", *QUIET, "--config", "demo", "--ckpt_path", "best", "--predictions.dirpath", "whole"])
    frames, rate = film(inside / "whole" / "video.mp4")
    assert len(frames) == 8
    assert rate == pytest.approx(10)
    assert abs(frames[0].shape[0] - 24) <= 1
    assert abs(frames[0].shape[1] - 61) <= 1


def test_files_of_options_in_layers(tmp_path, monkeypatch, video):
    """A file over the profile, and the command line over both."""
    monkeypatch.chdir(tmp_path)
    own = {
        "model": {"decoder": yaml.safe_load(DECODER), "lr": 0.004, "loss": "fusion9"},
        "data": {"video": str(video), "sample": "patch", "batch_size": 8, "steps_per_batch": 3, "data_split": "3_3_4"},
        "trainer": {"max_epochs": 2, "enable_progress_bar": False, "enable_model_summary": False},
    }
    Path("own.yaml").write_text(yaml.safe_dump(own))
    cli = main(["fit", "--config", "demo", "--config", "own.yaml", "--model.lr", "0.002", "--data.embeddings", "null"])
    assert cli.trainer.global_step == 12
    h = cli.model.hparams
    assert (h["lr"], h["loss"], h["optimizer"], h["frames"], h["clip_dim"]) == (0.002, "fusion9", "muon", 8, None)
    assert cli.trainer.max_epochs == 2
    assert Path("logs", "patchnerf", "own").is_dir()


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["fit", "--config", "nowhere"], ["--config nowhere", "demo"]),
        (["fit", "--data.video", "no.mp4"], ["no.mp4"]),
        (["fit", *TINY, "--data.data_split", "3_3"], ["data.data_split", "3_3"]),
        (["fit", *TINY, "--data.steps_per_batch", "2", "--trainer.gradient_clip_val", "1"], ["trainer.gradient_clip"]),
        (["predict", "--ckpt_path", "last"], ["no checkpoint"]),
    ],
)
def test_one_line_for_what_is_wrong(tmp_path, monkeypatch, capsys, args, parts):
    monkeypatch.chdir(tmp_path)
    line = ends(capsys, args[0], *(["--config", "demo"] if "nowhere" not in args else []), *args[1:])
    for part in parts:
        assert part in line, line


def test_one_line_for_a_checkpoint_of_another_video(inside, capsys):
    command = [
        "--config",
        "demo",
        *TINY,
        "--ckpt_path",
        "last",
        "--data.synthetic",
        "{frames: 9, height: 24, width: 61}",
    ]
    line = ends(capsys, "fit", *command)
    assert "data.video" in line
    assert "expected" in line


@pytest.mark.parametrize("word", ["query", "compress", "decode", "export"])
def test_commands_that_train_nothing_are_found(monkeypatch, capsys, word):
    monkeypatch.setattr("sys.argv", ["lit-patchnerf", word, "--help"])
    with pytest.raises(SystemExit) as ending:
        console()
    assert not ending.value.code
    assert word in capsys.readouterr().out


class Interrupt(Callback):
    """Ctrl-C in the midst of a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step == self.at:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_and_resume(fitted, tmp_path, monkeypatch, capsys):
    """To the weights of the run that was not interrupted."""
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has jobs in the background ignore it
    try:
        command = ["fit", "--config", "demo", *TINY, *SHORT]
        with pytest.raises(SystemExit) as ending:
            main([*command, f"--trainer.callbacks+={HERE}.Interrupt", "--trainer.callbacks.at=7"])
        assert ending.value.code == 1
    finally:
        signal.signal(signal.SIGINT, before)
    assert "Traceback" not in capsys.readouterr().err
    newest = max(tmp_path.rglob("*.ckpt"), key=lambda file: file.stat().st_mtime)
    assert torch.load(newest, weights_only=True)["global_step"] == 7
    cli = main([*command, "--ckpt_path", "last"])
    assert cli.trainer.global_step == 12
    for (name, a), b in zip(cli.model.state_dict().items(), fitted[1].model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
