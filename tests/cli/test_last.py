"""`last.ckpt` after a run whose best epoch was not its last."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lit_callbacks import EMA
from torch.utils.data import DataLoader

from lit_cli.cli import bring_last_up_to_date


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


def fit(folder, epochs, ckpt=None, average=False):
    loader = DataLoader(torch.randn(8, 2, generator=torch.Generator().manual_seed(0)), batch_size=2)
    keep = ModelCheckpoint(folder, monitor="v", mode="min", save_last=True)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=epochs, callbacks=[keep, *([EMA(decay=0.5)] if average else [])], **quiet)
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
