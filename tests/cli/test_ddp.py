"""Two processes on the CPU, through the command line."""

import os
import subprocess
import sys

import pytest
import torch

from lit_landmarks.__main__ import main

DATA = [
    "--data.format",
    "synthetic",
    "--data.synthetic_train",
    "11",
    "--data.holdout",
    "0.45",
    "--data.batch_size",
    "2",
]
REST = ["--data.image_size", "64", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
NET = [
    "--model.backbone",
    "resnet10t",
    "--model.decoder",
    "pyramid",
    "--model.pretrained",
    "false",
    "--model.sigma",
    "4",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A fit of two processes: the finished process and its folder. 5 validation images make unequal shares."""
    folder = tmp_path_factory.mktemp("ddp")
    (folder / "run.yaml").write_text(
        "trainer:\n  callbacks:\n    - class_path: ModelCheckpoint\n"
        "      init_args: {monitor: val/mre_px, mode: min, save_last: true}\n"
    )
    command = [sys.executable, "-m", "lit_landmarks", "fit", "--config", "run.yaml", *DATA, *REST, *NET]
    command += ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_epochs", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done, folder


def test_one_process_prints_and_draws(run):
    done, folder = run
    assert done.stdout.count("lit_landmarks fit, after 1 epochs") == 1
    assert len(list(folder.rglob("val_worst_1.png"))) == 1


def test_metrics_are_those_of_one_process(run):
    _, folder = run
    (path,) = folder.rglob("last.ckpt")
    states = torch.load(path, weights_only=True)["callbacks"]
    (of_two,) = (float(s["best_model_score"]) for n, s in states.items() if n.startswith("ModelCheckpoint"))
    root = ["--trainer.logger", "false", "--trainer.default_root_dir", str(folder)]
    cli = main(["validate", *DATA, *REST, *root, "--ckpt_path", str(path)])
    assert float(cli.trainer.callback_metrics["val/mre_px"]) == pytest.approx(of_two, rel=1e-4)
