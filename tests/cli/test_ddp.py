"""Two processes on the CPU, through the command line."""

import contextlib
import os
import socket
from pathlib import Path
from unittest import mock

import pytest
import torch

from lit_landmarks.__main__ import main
from tests.helpers.distributed import another_process

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


FIT = [*DATA, *REST, *NET, "--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_epochs", "1"]


def fit(rank, folder, port):
    """One process of two, which know of each other by what a scheduler sets; what it prints goes into a file."""
    known = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    with (
        mock.patch.dict(os.environ, {**known, "LOCAL_RANK": str(rank)}),
        contextlib.chdir(folder),
        Path(f"{rank}.txt").open("w") as file,
        contextlib.redirect_stdout(file),
    ):
        torch.set_num_threads(1)
        main(["fit", "--config", "run.yaml", *FIT])
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A fit of two processes: what they printed and their folder. 5 validation images make unequal shares."""
    folder = tmp_path_factory.mktemp("ddp")
    (folder / "run.yaml").write_text(
        "trainer:\n  callbacks:\n    - class_path: ModelCheckpoint\n"
        "      init_args: {monitor: val/mre_px, mode: min, save_last: true}\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    second = another_process(fit, 1, folder, port)
    second.start()
    try:
        fit(0, folder, port)
        second.join(60)
    finally:
        second.kill()
    assert second.exitcode == 0
    return "".join((folder / f"{rank}.txt").read_text() for rank in range(2)), folder


def test_one_process_prints_and_draws(run):
    printed, folder = run
    assert printed.count("lit_landmarks fit, after 1 epochs") == 1
    assert len(list(folder.rglob("val_worst_1.png"))) == 1


def test_metrics_are_those_of_one_process(run):
    _, folder = run
    (path,) = folder.rglob("last.ckpt")
    states = torch.load(path, weights_only=True)["callbacks"]
    (of_two,) = (float(s["best_model_score"]) for n, s in states.items() if n.startswith("ModelCheckpoint"))
    root = ["--trainer.logger", "false", "--trainer.default_root_dir", str(folder)]
    cli = main(["validate", *DATA, *REST, *root, "--ckpt_path", str(path)])
    assert float(cli.trainer.callback_metrics["val/mre_px"]) == pytest.approx(of_two, rel=1e-4)
