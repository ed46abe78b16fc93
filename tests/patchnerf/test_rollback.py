"""Collapse on purpose: what is restored, what goes on, when it ends."""

import math

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lit_callbacks import EMA
from torch import nn
from torch.utils.data import DataLoader

from lit_cli.errors import InputError
from lit_patchnerf.optim import make_optimizer
from lit_patchnerf.rollback import RollBack

STEPS = 4


class Toy(LightningModule):
    """Multiplies the loss of an epoch by a factor; where that is NaN, a step spoils all weights."""

    def __init__(self, factors=None, name="adan", manual=False, capturable=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.ModuleDict({"stages": nn.Linear(3, 4), "rgb": nn.Linear(4, 3)})
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.factors, self.name, self.capturable = dict(factors or {}), name, capturable
        self.automatic_optimization = not manual

    def training_step(self, batch, batch_idx):
        self.seen += 1
        factor = self.factors.get(self.current_epoch, 1.0)
        loss = (self.net["rgb"](torch.tanh(self.net["stages"](batch))) - 1).square().mean() * factor
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.lr_schedulers().step()
            return {"loss": loss.detach(), "part": loss.detach() / factor}
        return {"loss": loss, "part": loss.detach() / factor}

    def configure_optimizers(self):
        optimizer = make_optimizer(self.name, self.named_parameters(), lr=1e-3, capturable=self.capturable)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 100)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def everything(trainer, module):
    weights = [*module.parameters(), *module.buffers()]
    state = [v for s in trainer.optimizers[0].state.values() for v in s.values()]
    return weights, state


class Watch(Callback):
    """Copies of everything as each epoch begins and ends, and where it lies."""

    def __init__(self):
        self.starts, self.ends, self.places, self.rates = {}, {}, {}, {}

    def on_train_epoch_start(self, trainer, module):
        weights, state = everything(trainer, module)
        self.starts[trainer.current_epoch] = [t.detach().clone() for t in (*weights, *state)]
        self.rates[trainer.current_epoch] = [float(g["lr"]) for g in trainer.optimizers[0].param_groups]

    def on_train_epoch_end(self, trainer, module):
        weights, state = everything(trainer, module)
        self.ends[trainer.current_epoch] = [t.detach().clone() for t in (*weights, *state)]
        self.places[trainer.current_epoch] = [t.data_ptr() for t in (*weights, *state)]


def fit(module, *callbacks, epochs=5, ckpt_path=None, **options):
    seed_everything(0, verbose=False)
    options = {"enable_checkpointing": False} | options
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(torch.rand(4 * STEPS, 3), batch_size=4), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("name", ["adam", "adan", "muon"])
@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("capturable", [False, True])
def test_nan_brings_back_weights_buffers_and_optimizer_exactly_and_in_place(name, manual, capturable):
    module, watch, callback = Toy({3: math.nan}, name, manual, capturable), Watch(), RollBack()
    with pytest.warns(UserWarning, match=r"collapsed in epoch 3: loss nan.*\(1 of 3\)"):
        trainer = fit(module, callback, watch)
    assert callback.count == 1
    assert all(torch.equal(a, b) for a, b in zip(watch.ends[3], watch.ends[2], strict=True))
    assert watch.places[3] == watch.places[2] == watch.places[4]
    assert not all(torch.equal(a, b) for a, b in zip(watch.ends[4], watch.ends[3], strict=True))
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    # The schedule goes on where it is, from half the rate.
    assert watch.rates[3] == pytest.approx([1e-3 * (1 - 3 * STEPS / 100)] * len(watch.rates[3]))
    assert watch.rates[4] == pytest.approx([0.5e-3 * (1 - 4 * STEPS / 100)] * len(watch.rates[4]))
    assert [float(g["lr"]) for g in trainer.optimizers[0].param_groups] == pytest.approx(
        [0.5e-3 * 0.8] * len(watch.rates[4])
    )
    assert trainer.lr_scheduler_configs[0].scheduler.base_lrs == pytest.approx([0.5e-3] * len(watch.rates[4]))


def test_a_collapse_in_the_first_epoch_goes_back_to_the_start():
    module, watch = Toy({0: math.nan}), Watch()
    with pytest.warns(UserWarning, match="epoch 0"):
        fit(module, RollBack(), watch, epochs=1)
    weights = len(list(module.parameters())) + 1
    assert all(torch.equal(a, b) for a, b in zip(watch.starts[0], watch.ends[0][:weights], strict=True))
    assert not any(value.any() for value in watch.ends[0][weights:])  # as before the first step


def test_a_spike_counts_after_the_warmup_alone():
    callback, watch = RollBack(), Watch()
    with pytest.warns(UserWarning, match="epoch 3"):
        fit(Toy({3: 10.0}), callback, watch)
    assert all(torch.equal(a, b) for a, b in zip(watch.ends[3], watch.ends[2], strict=True))
    for quiet in (RollBack(factor=50), RollBack(warmup=4), RollBack(key="part"), RollBack(enabled=False)):
        fit(Toy({3: 10.0}), quiet)
        assert quiet.count == 0


def test_copies_are_taken_at_good_epochs_of_the_interval():
    # After epochs 1 and 3; the loss of epoch 3 is too far above the best for a copy.
    watch = Watch()
    with pytest.warns(UserWarning, match="epoch 4"):
        fit(Toy({3: 3.0, 4: math.nan}), RollBack(every_n_epochs=2), watch)
    assert all(torch.equal(a, b) for a, b in zip(watch.ends[4], watch.ends[1], strict=True))


def test_a_last_step_that_spoils_the_weights_is_seen_by_them():
    class Spoil(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.current_epoch == 2 and batch_idx == STEPS - 1:
                module.net["rgb"].bias.data[0] = math.inf

    module, callback = Toy(), RollBack()
    with pytest.warns(UserWarning, match="epoch 2"):
        fit(module, Spoil(), callback, epochs=3)
    assert callback.count == 1
    assert bool(module.net["rgb"].bias.isfinite().all())


def test_it_gives_up():
    callback = RollBack(most=2)
    with pytest.warns(UserWarning, match="RollBack"), pytest.raises(InputError, match=r"epoch 4: .*after 2 roll-backs"):
        fit(Toy({2: math.nan, 3: math.nan, 4: math.nan}), callback)
    assert callback.count == 2


def test_a_resumed_run_goes_on_counting_and_has_the_lower_rate(tmp_path):
    factors = {2: math.nan, 5: math.nan}
    whole, callback = Watch(), RollBack()
    with pytest.warns(UserWarning, match="RollBack"):
        fit(Toy(factors), callback, whole, epochs=7)
    assert callback.count == 2
    saved = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    with pytest.warns(UserWarning, match="RollBack"):
        fit(Toy(factors), RollBack(), saved, epochs=4, enable_checkpointing=True)
    again, resumed = Watch(), RollBack()
    with pytest.warns(UserWarning, match=r"epoch 5: .*\(2 of 3\)"):
        fit(Toy(factors), resumed, again, epochs=7, ckpt_path=str(tmp_path / "last.ckpt"))
    assert resumed.state_dict() == pytest.approx(callback.state_dict())
    assert again.rates[6] == pytest.approx(whole.rates[6])
    assert again.rates[6][0] == pytest.approx(0.25e-3 * (1 - 6 * STEPS / 100))
    # The loader shuffles nothing, so that both runs see the same batches.
    for a, b in zip(whole.ends[6], again.ends[6], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("make", [lambda: EMA(decay=0.5), lambda: EMA(decay=0.5, offload=True), WeightAveraging])
def test_averages_of_other_callbacks_keep_no_nan(make, first):
    module, average, callback = Toy({3: math.nan}), make(), RollBack()
    callbacks = [average, callback] if first else [callback, average]
    with pytest.warns(UserWarning, match="epoch 3"):
        fit(module, *callbacks, epochs=5)
    assert all(bool(p.isfinite().all()) for p in module.parameters())  # the average, by now


def test_an_average_that_has_not_begun_begins_at_the_restored_weights():
    module, average = Toy({2: math.nan}), EMA(decay=0.5, start_epoch=2)
    with pytest.warns(UserWarning, match="epoch 2"):
        fit(module, average, RollBack(), epochs=3)
    assert all(bool(p.isfinite().all()) for p in module.parameters())


def test_wrong_options_and_starts_are_named():
    for options in ({"factor": 1.0}, {"lr_factor": 0.0}, {"warmup": -1}, {"every_n_epochs": 0}, {"most": -1}):
        with pytest.raises(InputError, match="RollBack: "):
            RollBack(**options)
    with pytest.raises(InputError, match="none as other"):
        fit(Toy(), RollBack(key="other"))
    module = Toy()
    module.net["rgb"].bias.data[0] = math.nan
    with pytest.raises(InputError, match="finite weights"):
        fit(module, RollBack())
