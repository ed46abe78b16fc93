"""The fused optimizer against the plain one, clipped, with and without a gradient scaler."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from lit_common.optim import fused_adamw


class Toy(LightningModule):
    def __init__(self, fused):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.fused = fused

    def training_step(self, batch, batch_idx):
        loss = 50 * self.net(batch).float().square().mean()  # so that clipping has something to do
        return loss * float("inf") if batch_idx == 2 and self.trainer.precision == "16-mixed" else loss

    def configure_optimizers(self):
        if self.fused:
            return fused_adamw(self.parameters(), 0.01, clips=True)
        return torch.optim.AdamW(self.parameters(), lr=0.01, foreach=False)


def trained(fused, precision, algorithm):
    seed_everything(0, verbose=False)
    module = Toy(fused)
    plugins = []
    if precision == "16-mixed":
        plugins = [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))]
    trainer = Trainer(
        accelerator="cpu",
        plugins=plugins,
        precision=None if plugins else precision,
        max_epochs=2,
        gradient_clip_val=0.5,
        gradient_clip_algorithm=algorithm,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(torch.randn(16, 4), batch_size=2))
    (state,) = {int(s["step"]) for s in trainer.optimizers[0].state.values()}
    return torch.cat([p.detach().flatten() for p in module.parameters()]), state


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_clipped_fused_steps_are_those_of_the_plain_optimizer(precision, algorithm):
    ours, steps = trained(True, precision, algorithm)
    plain, expected = trained(False, precision, algorithm)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)
    assert steps == expected == (14 if precision == "16-mixed" else 16)  # two steps overflowed


def test_a_captured_gradient_takes_the_layout_of_its_parameter():
    """Fused optimizers refuse another one, as a channels-last weight's gradient may have."""
    from lit_common.graph import _laid_out_like

    parameter = torch.zeros(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    gradient = torch.randn(4, 3, 2, 2)
    found = _laid_out_like(gradient, parameter)
    assert found.stride() == parameter.stride()
    assert torch.equal(found, gradient)
    assert _laid_out_like(found, parameter) is found
