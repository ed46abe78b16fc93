"""A real fit of the demo profile that is cut short and goes on with `--ckpt_path last`, against one that was not."""

import csv
import errno
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lit_callbacks.safe_io import is_complete

from lit_landmarks.__main__ import console, main
from tests.helpers.distributed import another_process

ROOT = Path(__file__).parents[2]
HERE = "tests.cli.test_nothing_is_lost"
# Three epochs of four batches of two images.
TINY = [
    *("--data.synthetic_train", "12", "--data.holdout", "0.34", "--data.image_size", "64", "--data.batch_size", "2"),
    *("--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false"),
    *("--trainer.enable_model_summary", "false", "--plots.worst", "0", "--ema.decay", "0.9"),
    *("--model.backbone", "test_resnet"),  # timm's smallest: its checkpoints are written by the dozen here
]


def command(folder, *more):
    logger = ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", str(folder)]
    return ["fit", "--config", "demo", "--trainer.default_root_dir", str(folder), *TINY, *logger, *more]


def adding(callback, **options):
    """Arguments that append a callback of this file."""
    typed = [f"--trainer.callbacks.{k}={v}" for k, v in options.items()]
    return [f"--trainer.callbacks+={HERE}.{callback}", *typed]


def logged(folder):
    """All runs' metrics by (name, step); a later run must agree with an earlier one where both logged."""
    found = {}
    for file in sorted(Path(folder).rglob("metrics.csv")):
        for row in csv.DictReader(file.open()):
            for name in ("train/loss", "val/mre_px"):
                if row.get(name):
                    key, value = (name, int(row["step"])), float(row[name])
                    assert found.setdefault(key, value) == value, key
    return found


def last(folder):
    return max(Path(folder).rglob("*.ckpt"), key=lambda f: f.stat().st_mtime)


@pytest.fixture(scope="module")
def module_patch():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LIT_TRACEBACK", raising=False)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "callbacks")]))
        yield patch


@pytest.fixture(scope="module")
def whole(tmp_path_factory, module_patch):
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    cli = main(command(folder))
    assert cli.trainer.global_step == 12
    return logged(folder), cli.model


def resume(folder, whole, *more):
    """Go on with the newest checkpoint, to the same losses and the same model."""
    expected, model = whole
    cli = main(command(folder, "--ckpt_path", "last", *more))
    assert cli.trainer.global_step == 12
    for key, value in logged(folder).items():
        assert value == expected[key], key
    assert logged(folder).keys() == expected.keys()
    for (name, a), b in zip(cli.model.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def ends(capsys, *args):
    """Status and stderr of a run that does not come to its end."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending:
        main(list(args))
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return ending.value.code, err


class OutOfMemory(Callback):
    """The step runs out of memory once, after its forward pass."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_start(self, trainer, pl_module):
        step = pl_module.training_step

        def training_step(batch, batch_idx):
            loss = step(batch, batch_idx)
            if trainer.fit_loop.total_batch_idx == self.at:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return loss

        pl_module.training_step = training_step


class FullDisk(Callback):
    """From the n-th checkpoint on, files are cut short: one, or all in its folder."""

    def __init__(self, at: int, lasting: bool = False) -> None:
        self.at, self.lasting, self.writes = at, lasting, 0

    def setup(self, trainer, pl_module, stage):
        save = torch.save

        def full(obj, file, *args, **kwargs):
            self.writes += 1
            if self.writes == self.at or (self.lasting and self.writes > self.at):
                file.write(b"half a file" * 1000)
                raise OSError(errno.ENOSPC, "No space left on device")
            return save(obj, file, *args, **kwargs)

        torch.save = full


class Signal(Callback):
    """Send a signal to this process in the midst of a step or of a validation."""

    def __init__(self, at: int, name: str = "SIGTERM", validation: bool = False) -> None:
        self.at, self.signum, self.validation = at, getattr(signal, name), validation

    def on_before_backward(self, trainer, pl_module, loss):
        if not self.validation and trainer.fit_loop.total_batch_idx == self.at:
            os.kill(os.getpid(), self.signum)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if self.validation and trainer.global_step == self.at:
            os.kill(os.getpid(), self.signum)


@pytest.fixture(autouse=True)
def _torch_save_comes_back(module_patch):
    save, interrupt = torch.save, signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has jobs in the background ignore it
    yield
    torch.save = save
    signal.signal(signal.SIGINT, interrupt)


@pytest.mark.parametrize(("name", "validation", "at"), [("SIGTERM", False, 5), ("SIGUSR1", True, 8)])
def test_a_signal(tmp_path, capsys, whole, name, validation, at):
    code, err = ends(capsys, *command(tmp_path, *adding("Signal", at=at, name=name, validation=validation)))
    assert code == 128 + getattr(signal, name)
    (line,) = [line for line in err.splitlines() if line.startswith(name)]
    assert f"resume with --ckpt_path {last(tmp_path)}" in line
    assert last(tmp_path).name == "interrupted.ckpt"
    resume(tmp_path, whole)


def fit_on_its_own(folder):
    """As from a shell, for long."""
    with (folder / "stderr.txt").open("w") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = open(2, "w", buffering=1)  # noqa: SIM115 - for the rest of the process
    os.environ.pop("LIT_TRACEBACK", None)
    torch.set_num_threads(1)
    sys.argv = ["lit-landmarks", *command(folder, "--trainer.max_epochs", "1000")]
    console()


def test_kill_from_outside(tmp_path, whole):
    """A process of its own, killed as a scheduler would do it."""
    process = another_process(fit_on_its_own, tmp_path)
    process.start()
    until = time.monotonic() + 60
    while not list(tmp_path.rglob("last.ckpt")) and time.monotonic() < until and process.exitcode is None:
        time.sleep(0.05)
    process.terminate()
    process.join(60)
    err = (tmp_path / "stderr.txt").read_text()
    assert process.exitcode == 143, err
    assert "Traceback" not in err
    assert err.count("resume with --ckpt_path") == 1
    assert last(tmp_path).name == "interrupted.ckpt"
    step = torch.load(last(tmp_path), weights_only=True)["global_step"]
    cli = main(command(tmp_path, "--ckpt_path", "last", "--trainer.max_epochs", str(step // 4 + 1)))
    assert cli.trainer.global_step == (step // 4 + 1) * 4


def test_out_of_memory(tmp_path, capsys, whole):
    code, err = ends(capsys, *command(tmp_path, *adding("OutOfMemory", at=6)))
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("lit-landmarks: error: ")]
    assert "out of memory (CUDA out of memory. Tried to allocate 2 GiB)" in line
    assert "batch_size 2 x accumulate_grad_batches 1 -> batch_size 1 x accumulate_grad_batches 2" in line
    assert line.endswith(f"resume with --ckpt_path {last(tmp_path)}")
    resume(tmp_path, whole)


def test_out_of_memory_within_a_window(tmp_path, capsys):
    """Windows of three batches: the second window is cut short."""
    windows = ["--trainer.accumulate_grad_batches", "3"]
    main(command(tmp_path / "whole", *windows))
    ends(capsys, *command(tmp_path / "cut", *windows, *adding("OutOfMemory", at=5)))
    assert torch.load(last(tmp_path / "cut"), weights_only=True)["global_step"] == 2
    cli = main(command(tmp_path / "cut", *windows, "--ckpt_path", "last"))
    assert cli.trainer.global_step == 6
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")


@pytest.mark.parametrize("lasting", [False, True], ids=["for a moment", "for good"])
def test_a_full_disk(tmp_path, capsys, whole, lasting):
    code, err = ends(capsys, *command(tmp_path, *adding("FullDisk", at=3, lasting=lasting)))
    torch.save = torch.serialization.save
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("lit-landmarks: error: ")]
    assert "No space left on device while writing" in line
    assert ("no checkpoint of the present state could be written" in line) == lasting
    assert line.endswith(f"resume with --ckpt_path {last(tmp_path)}")
    assert (last(tmp_path).name == "interrupted.ckpt") != lasting
    assert all(is_complete(file) for file in tmp_path.rglob("*.ckpt"))
    assert not list(tmp_path.rglob("*.part"))
    resume(tmp_path, whole)


def test_ctrl_c_is_as_it_was(tmp_path, capsys, caplog, whole):
    with caplog.at_level("INFO"):
        code, _ = ends(capsys, *command(tmp_path, *adding("Signal", at=5, name="SIGINT")))
    assert code == 1
    assert "saved checkpoint to" in caplog.text
    assert last(tmp_path).name == "last.ckpt"
    resume(tmp_path, whole)
