"""The `best` and the `last` checkpoint of a run, and `last.ckpt` where the best epoch was not the last."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lit_callbacks import EMA
from torch.utils.data import DataLoader

from lit_cli.cli import bring_last_up_to_date, find_checkpoint, print_summary
from lit_cli.errors import InputError


class Worsening(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("v", float(self.current_epoch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, epochs, ckpt=None, average=False, keep=None):
    loader = DataLoader(torch.randn(8, 2, generator=torch.Generator().manual_seed(0)), batch_size=2)
    keep = keep or [ModelCheckpoint(folder, monitor="v", mode="min", save_last=True)]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=epochs, callbacks=[*keep, *([EMA(decay=0.5)] if average else [])], **quiet)
    module = Worsening()
    trainer.fit(module, loader, loader, ckpt_path=ckpt)
    return trainer, module


@pytest.mark.parametrize("average", [False, True])
def test_the_last_checkpoint_is_that_of_the_last_step(tmp_path, average):
    trainer, module = fit(tmp_path / "a", 3, average=average)
    last = tmp_path / "a" / "last.ckpt"
    assert torch.load(last, weights_only=True)["epoch"] == 0  # what Lightning leaves; if not, the function can go
    bring_last_up_to_date(trainer)
    content = torch.load(last, weights_only=True)
    assert content["global_step"] == trainer.global_step == 12
    for name, value in module.state_dict().items():
        assert torch.equal(content["state_dict"][name], value)
    _, extended = fit(tmp_path / "a", 5, str(last), average)
    _, whole = fit(tmp_path / "b", 5, average=average)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(extended.state_dict()[name], value, rtol=0, atol=0)


def test_a_last_checkpoint_of_the_last_step_is_left_alone(tmp_path):
    trainer, _ = fit(tmp_path, 1)
    before = (tmp_path / "last.ckpt").stat().st_mtime_ns
    bring_last_up_to_date(trainer)
    assert (tmp_path / "last.ckpt").stat().st_mtime_ns == before


def two(folder, mode, turned):
    """A callback for the best and one for the last, in the order of the profiles or in the other one."""
    best = ModelCheckpoint(folder, monitor="v", mode=mode)
    last = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
    return [last, best] if turned else [best, last]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("mode", "best"), [("min", "epoch=0-step=4.ckpt"), ("max", "epoch=2-step=12.ckpt")])
def test_of_two_callbacks_the_one_with_a_metric_knows_the_best(tmp_path, capsys, turned, mode, best):
    trainer, _ = fit(tmp_path, 3, keep=two(tmp_path, mode, turned))
    print_summary(trainer, "summary")
    lines = [line.split(": ") for line in capsys.readouterr().out.splitlines() if "checkpoint: " in line]
    assert [(word, Path(path).name) for word, path in lines] == [
        ("best checkpoint", best),
        ("last checkpoint", "last.ckpt"),
    ]
    assert find_checkpoint("best", tmp_path).name == best
    last = torch.load(find_checkpoint("last", tmp_path), weights_only=True)
    assert last["global_step"] == trainer.global_step == 12


@pytest.mark.parametrize("turned", [False, True])
def test_before_the_metric_was_logged_there_is_no_best(tmp_path, capsys, monkeypatch, turned):
    monkeypatch.setattr(Worsening, "validation_step", lambda *_: None)
    monkeypatch.setattr(ModelCheckpoint, "_save_topk_checkpoint", only_the_last(ModelCheckpoint._save_topk_checkpoint))
    trainer, _ = fit(tmp_path, 1, keep=two(tmp_path, "min", turned))
    print_summary(trainer, "summary")
    printed = capsys.readouterr().out
    assert "last checkpoint" in printed
    assert "best checkpoint" not in printed
    assert find_checkpoint("last", tmp_path).name == "last.ckpt"
    with pytest.raises(InputError, match=r"last\.ckpt names no best checkpoint"):
        find_checkpoint("best", tmp_path)


def only_the_last(original):
    """As under a schedule, whose cheap validations log no metric to judge by."""
    return lambda self, trainer, found: None if self.monitor else original(self, trainer, found)


def test_without_a_metric_the_newest_is_last_in_print_and_both_by_word(tmp_path, capsys):
    trainer, _ = fit(tmp_path, 2, keep=[ModelCheckpoint(tmp_path)])
    print_summary(trainer, "summary")
    assert "last checkpoint" in capsys.readouterr().out
    assert find_checkpoint("best", tmp_path) == find_checkpoint("last", tmp_path) == tmp_path / "epoch=1-step=8.ckpt"
