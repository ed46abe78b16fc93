"""EMA's further options: decay rules, filters, BatchNorm statistics, host memory, a second validation, export, DDP."""

import copy
import json
import math
import os
import subprocess
import sys
import textwrap
import threading
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torchmetrics
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lit_callbacks import EMA
from lit_callbacks.average import WeightAverage, _HostCopy
from lit_callbacks.decay import keep_at
from lit_callbacks.live_validation import validate_again
from lit_callbacks.recompute import batch_norms, estimate, preserved
from test_ema import BATCHES, Do, Recorder, Toy, close, fit, loader, read, reference, same, trainer_for, weights
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

RULES = [
    {"warmup": False},
    {"warmup": "ramp"},
    {"warmup": True},
    {"warmup": "power"},
    {"warmup": "power", "warmup_gamma": 3.0, "warmup_power": 0.75},
    {"warmup": "tau", "warmup_tau": 5.0},
    {"half_life": 2.5, "warmup": False},
    {"half_life": 8.0, "half_life_unit": "samples"},
    {"half_life": 0.7, "half_life_unit": "epochs", "warmup": "tau", "warmup_tau": 2.0},
]


def toy(kind=Toy, **options):
    seed_everything(0, verbose=False)
    return kind(**options)


def train(tmp_path, *callbacks, model=None, data=None, val=None, ckpt=None, **options):
    """Fit with loaders of one's own."""
    model = toy() if model is None else model
    trainer = trainer_for(tmp_path, *callbacks, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(not resumable|does not have many|lr_scheduler|need to be provided).*")
        trainer.fit(model, data if data is not None else loader(), val if val is not None else loader(), ckpt_path=ckpt)
    return trainer, model


def share(n, steps, samples, *, decay=0.9, half_life=None, half_life_unit="steps", warmup=True, **w):
    """The rules once more, written out."""
    unit = {"steps": steps, "samples": samples, "epochs": steps / BATCHES}[half_life_unit]
    lasting = decay**steps if half_life is None else math.exp(-math.log(2) * unit / half_life)
    if warmup in (True, "ramp"):
        return min(lasting, (1 + n) / (10 + n))
    if warmup == "power":
        return min(lasting, 1 - (1 + n / w.get("warmup_gamma", 1)) ** -w.get("warmup_power", 2 / 3))
    if warmup == "tau":
        return lasting * -math.expm1(-(n + 1) / w.get("warmup_tau", 2000))
    return lasting


def slow(states, sizes, every=1, **rule):
    """Average over recorded states, one number at a time; `sizes` are the samples of each step."""
    average = states[0]
    for n, step in enumerate(range(every, len(states), every)):
        keep = share(n, every, sum(sizes[step - every : step]), **rule)
        average = {k: keep * average[k] + (1 - keep) * states[step][k] for k in average}
    return average | {k: v for k, v in states[-1].items() if "num_batches" in k}


def ema_for(rule, **options):
    return EMA(**({} if "half_life" in rule else {"decay": 0.9}), **rule, **options)


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


# ------------------------------------------------------------- decay rules


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("every", [1, 3])
def test_every_rule_equals_a_float64_loop(tmp_path, rule, every):
    recorder, ema = Recorder(), ema_for(rule, every_n_steps=every)
    _, model = fit(tmp_path, recorder, ema)
    assert ema.n_averaged == 2 * BATCHES // every
    close(weights(model), slow(recorder.weights, [2] * 2 * BATCHES, every, **rule))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_tensor_gives_the_same_share_as_the_host(rule):
    names = {"warmup_gamma": "gamma", "warmup_power": "power", "warmup_tau": "tau"}
    options = {names.get(k, k): v for k, v in rule.items() if k != "half_life_unit"}
    for n in (0, 1, 7, 1000, 10**6):
        for elapsed in (1, 3):
            host = keep_at(n, elapsed, decay=0.9999, **options)
            there = [torch.tensor(float(v), dtype=torch.float64) for v in (n, elapsed)]
            device = keep_at(*there, decay=0.9999, **options)
            assert 0.0 <= host < 1.0
            assert device.dtype == torch.float64
            assert float(device) == pytest.approx(host, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    ("rule", "fused"),
    [*((rule, True) for rule in RULES), *((rule, False) for rule in (RULES[1], RULES[7]))],
    ids=str,
)
@pytest.mark.parametrize("every", [1, 2])
def test_skipped_steps_do_not_count_in_any_rule(tmp_path, rule, fused, every):
    recorder, ema = Recorder(), ema_for(rule, every_n_steps=every, buffers="copy")
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0))
    inf_at = (1, 3) if every == 1 else (2, 3)
    _, model = fit(tmp_path, recorder, ema, model=toy(fused=fused, inf_at=inf_at), plugins=[plugin])
    assert ema.n_averaged == (2 * BATCHES - 4) // every
    average = slow(recorder.weights, [2] * 2 * BATCHES, every, **rule)
    names = {k for k, _ in model.named_parameters()}
    close({k: v for k, v in weights(model).items() if k in names}, {k: average[k] for k in names})


def test_a_fused_step_skipped_within_an_interval_shortens_it(tmp_path):
    recorder, ema = Recorder(), EMA(decay=0.9, every_n_steps=2, buffers="copy", warmup=False)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0))
    model = toy(fused=True, inf_at=(1,))
    fit(tmp_path, recorder, ema, model=model, plugins=[plugin], max_epochs=1)
    w = [s["net.0.weight"] for s in recorder.weights]  # 5 real steps: 1 | 2, 3 | 4, 5
    expected = w[0]
    for step, keep in ((1, 0.9), (3, 0.81), (5, 0.81)):
        expected = keep * expected + (1 - keep) * w[step]
    close({"w": weights(model)["net.0.weight"]}, {"w": expected})


def uneven():
    x = torch.randn(11, 4, generator=torch.Generator().manual_seed(1))
    sizes = [2, 3, 1, 2, 3]
    parts, start = [], 0
    for size in sizes:
        parts.append((x[start : start + size],))
        start += size
    return DataLoader(parts, batch_size=None), sizes


class NoNorm(Toy):
    """Batches of one sample, too."""

    def __init__(self, **options):
        super().__init__(**options)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1))


def test_samples_are_those_of_all_accumulated_batches(tmp_path):
    data, sizes = uneven()
    rule = {"half_life": 10.0, "half_life_unit": "samples", "warmup": False}
    recorder, model = Recorder(), toy(NoNorm)
    train(tmp_path, recorder, EMA(**rule), model=model, data=data, accumulate_grad_batches=2)
    per_epoch = [sizes[0] + sizes[1], sizes[2] + sizes[3], sizes[4]]
    close(weights(model), slow(recorder.weights, per_epoch * 2, **rule))


def test_samples_without_a_loss_or_of_a_skipped_step_have_not_been_seen(tmp_path):
    rule = {"half_life": 10.0, "half_life_unit": "samples", "warmup": False}
    recorder, model = Recorder(), toy(NoNorm, none_at=(1,))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*returned `None`.*")  # Lightning says so once per process
        train(tmp_path, recorder, EMA(**rule), model=model, accumulate_grad_batches=2, max_epochs=1)
    close(weights(model), slow(recorder.weights, [2, 4, 4], **rule))
    recorder, model = Recorder(), toy(NoNorm, inf_at=(2, 3))
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0))
    options = {"accumulate_grad_batches": 2, "max_epochs": 1, "plugins": [plugin]}
    train(tmp_path, recorder, EMA(**rule), model=model, **options)
    close(weights(model), slow(recorder.weights, [4, 4], **rule))


def test_samples_under_manual_optimization(tmp_path):
    rule = {"half_life": 10.0, "half_life_unit": "samples", "warmup": False}
    recorder, model = Recorder(), toy(optimizers=2)
    fit(tmp_path, recorder, EMA(**rule), model=model)
    close(weights(model), slow(recorder.weights, [2] * 2 * BATCHES, **rule))


def test_epochs_need_a_loader_with_an_end(tmp_path):
    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield (torch.ones(2, 4),)

    ema = EMA(half_life=2.0, half_life_unit="epochs")
    with pytest.raises(MisconfigurationException, match="half_life_unit"):
        train(tmp_path, ema, data=DataLoader(Endless(), batch_size=None), max_steps=3)
    train(tmp_path, EMA(half_life=2.0, half_life_unit="epochs"), model=toy(NoNorm), limit_train_batches=3,
          data=DataLoader(Endless(), batch_size=None), max_epochs=1)  # fmt: skip


def finish(tmp_path, name, *callbacks, model=None, **options):
    """Fit and read everything that has to be equal."""
    trainer, _ = train(tmp_path, *callbacks, model=model, data=loader(True), val=loader(True), **options)
    trainer.save_checkpoint(tmp_path / name)
    saved = read(tmp_path / name)
    return {f"{k}.{n}": v for k in ("state_dict", "current_model_state") for n, v in saved[k].items()}


@pytest.mark.parametrize(
    "options",
    [
        {"half_life": 9.0, "half_life_unit": "samples", "every_n_steps": 4},
        {"half_life": 0.5, "half_life_unit": "epochs", "every_n_steps": 5, "warmup": "tau", "warmup_tau": 3.0},
        {"warmup": "power", "exclude": "bias", "offload": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("fused", [False, True])
def test_resume_in_mid_epoch_is_exact(tmp_path, options, fused):
    keep = Do("on_train_batch_end", lambda t, *_: t.global_step == 3 and t.save_checkpoint(tmp_path / "mid.ckpt"))

    def more():
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        return {"model": toy(fused=fused)} | (
            {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]} if fused else {}
        )

    straight = finish(tmp_path, "a.ckpt", EMA(**options), keep, **more())
    resumed = finish(tmp_path, "b.ckpt", EMA(**options), ckpt=tmp_path / "mid.ckpt", **more())
    assert same(straight, resumed)


def test_resuming_with_other_settings_goes_on_from_the_saved_average(tmp_path):
    train(tmp_path, EMA(decay=0.9, every_n_steps=4), ModelCheckpoint(tmp_path, save_last=True), max_epochs=1)
    saved, recorder = read(tmp_path / "last.ckpt"), Recorder()
    ema = EMA(half_life=20.0, half_life_unit="samples", warmup=False, offload=True)
    _, model = train(tmp_path, recorder, ema, ckpt=tmp_path / "last.ckpt")
    expected = {k: v.double() for k, v in saved["state_dict"].items()}
    for i, state in enumerate(recorder.weights[1 : BATCHES + 1]):
        # The old file counts 2 steps since its last update, and no samples, since it had no use for them.
        keep = 0.5 ** (2 / 20)
        assert i < BATCHES
        expected = {k: keep * expected[k] + (1 - keep) * state[k] for k in expected}
    close(
        {k: v for k, v in weights(model).items() if "num" not in k},
        {k: v for k, v in expected.items() if "num" not in k},
    )


# ------------------------------------------------------------------ filters


@pytest.mark.parametrize(
    ("options", "averaged"),
    [
        ({"include": r"^net\.2"}, {"net.2.weight", "net.2.bias"}),
        ({"exclude": [r"running_", r"\.bias$"]}, {"net.0.weight", "net.1.weight", "net.2.weight"}),
        ({"include": ["weight", "running"], "exclude": r"1\.w|var|2"}, {"net.0.weight", "net.1.running_mean"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_filtered_out_stays_live(tmp_path, options, averaged, compiled):
    recorder, last = Recorder(), ModelCheckpoint(tmp_path, save_last=True)
    _, model = train(tmp_path, EMA(decay=0.9, **options), recorder, last, model=toy(compiled=compiled))
    recorder.weights = [{k.replace("_orig_mod.", ""): v for k, v in w.items()} for w in recorder.weights]
    full, _ = reference(recorder)
    expected = {k: full[k] if k in averaged else v for k, v in recorder.weights[-1].items()}
    saved = read(tmp_path / "last.ckpt")
    close(saved["state_dict"], expected)
    close(saved["current_model_state"], recorder.weights[-1])
    clean = {k.replace("_orig_mod.", ""): v for k, v in model.seen["validation_step"].items()}
    close(clean, expected)


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_without_a_match_is_an_error_before_training(tmp_path, option):
    started = []
    with pytest.raises(MisconfigurationException, match=rf"EMA: {option} .*'nett'; names are net.0.weight"):
        fit(tmp_path, EMA(**{option: ["net", "nett"]}), Do("on_train_start", lambda *_: started.append(1)))
    assert not started


def test_a_tied_tensor_is_filtered_by_any_of_its_names():
    net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    net["b"].weight = net["a"].weight
    assert set(WeightAverage(net, average_buffers=True, include=["^b"]).average) == {"a.weight", "b.bias"}
    assert set(WeightAverage(net, average_buffers=True, exclude=["^b"]).average) == {"a.bias"}
    average = WeightAverage(net, average_buffers=True, include=["^b"])
    nn.init.zeros_(net["a"].weight)
    state = average.averaged_state(net.state_dict())
    assert torch.equal(state["a.weight"], state["b.weight"])
    assert state["a.weight"].abs().sum() > 0


# ------------------------------------------------------- BatchNorm statistics


class Busy(LightningModule):
    """Dropout, two BatchNorm layers, a metric, a list and a counter that a second pass must not disturb."""

    def __init__(self, momentum=0.1, frozen=False, boom=None):
        super().__init__()
        first = nn.BatchNorm1d(8, momentum=momentum)
        self.net = nn.Sequential(nn.Linear(4, 8), first, nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.head = nn.Linear(8, 1)
        self.register_buffer("seen", torch.zeros(()))
        self.error = torchmetrics.MeanSquaredError()
        self.outputs, self.count, self.frozen, self.boom = [], 0, frozen, boom
        self.trace, self.kept = [], []
        self.notes = SimpleNamespace(ran=0)  # not put back: the inside of a plain object is not seen

    def on_train_epoch_start(self):
        if self.frozen:
            self.net[1].eval()

    def training_step(self, batch, batch_idx):
        if self.boom is not None and not torch.is_grad_enabled():
            raise self.boom
        y = self.head(self.net(batch[0]))
        target = batch[0].sum(1, keepdim=True) + torch.rand_like(y)
        self.error(y.detach(), target)
        loss = nn.functional.mse_loss(y, target)
        self.seen += 1
        self.count += 1
        self.outputs.append(loss.detach())
        self.log("train", loss)
        self.log("error", self.error)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.trace.append(outputs["loss"].item())
        self.kept.append(batch[0])

    def on_train_epoch_end(self):
        assert len(self.outputs) <= BATCHES
        self.outputs.clear()

    def validation_step(self, batch, batch_idx):
        self.log("v", self.head(self.net(batch[0])).square().mean())
        self.running = weights(self)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def norms(state):
    return {k: v for k, v in state.items() if "running" in k}


def with_update_bn(model, batches):
    """A copy of the module, whose weights are the average, after torch's own function in training mode."""
    torch.manual_seed(5)
    twin = copy.deepcopy(model.net)
    for module in twin.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    update_bn(batches, twin)
    return {f"net.{k}": v for k, v in twin.state_dict().items()}


def calm(**options):
    model = toy(Busy, **options)
    model.net[3].p = 0.0  # so that torch's function, with other random numbers, sees the same activations
    return model


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
@pytest.mark.parametrize("kept", [1, 4, 32])
def test_recomputed_statistics_are_those_of_update_bn(tmp_path, momentum, kept):
    model, last = calm(momentum=momentum), ModelCheckpoint(tmp_path, save_last=True)
    train(tmp_path, EMA(decay=0.9, buffers="recompute", recompute_batches=kept), last, model=model)
    expected = norms(with_update_bn(model, model.kept[-kept:]))
    close(norms(weights(model)), expected)
    close(norms(read(tmp_path / "last.ckpt")["state_dict"]), expected)
    close(norms(model.running), expected)
    live = norms(read(tmp_path / "last.ckpt")["current_model_state"])
    assert not torch.allclose(live["net.1.running_mean"], expected["net.1.running_mean"], atol=1e-4)


def test_a_layer_that_is_called_twice_counts_both_calls():
    torch.manual_seed(0)
    norm, x = nn.BatchNorm1d(3, momentum=None), torch.randn(2, 8, 3)
    twin = copy.deepcopy(norm)

    def both(batch):
        norm(batch)
        norm(2 * batch + 1)

    with preserved(norm):
        (sums,) = estimate(batch_norms(norm), x, both)
    update_bn([v for batch in x for v in (batch, 2 * batch + 1)], twin)
    close({"m": sums[:3] / sums[-1], "v": sums[3:6] / sums[-1]}, {"m": twin.running_mean, "v": twin.running_var})
    assert sums[-1] == 4
    assert norm.num_batches_tracked == 0


@pytest.mark.parametrize(
    "options",
    [
        {"buffers": "recompute", "recompute_batches": 3},
        {"buffers": "recompute", "evaluate": "both"},
        {"offload": True, "evaluate": "both"},
    ],
    ids=str,
)
def test_training_is_bit_identical_with_and_without(tmp_path, options):
    def run(ema):
        model, metrics = toy(Busy), []
        note = Do("on_train_epoch_end", lambda t, m: metrics.append(t.callback_metrics["error"].item()))
        every = ModelCheckpoint(tmp_path / ema.name, every_n_train_steps=4, save_top_k=-1)
        trainer, _ = train(tmp_path, ema, every, note, model=model, val_check_interval=2)
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        saved = read(tmp_path / "end.ckpt")
        live = saved.get("current_model_state", saved["state_dict"])
        return live, model.trace, metrics, model.count

    plain, with_ema = run(EMA(enabled=False, name="off")), run(EMA(decay=0.9, name="on", **options))
    assert same(plain[0], with_ema[0])
    assert plain[1:] == with_ema[1:]


def test_statistics_are_estimated_only_when_needed(tmp_path):
    class Counting(Busy):
        def recompute_batch(self, batch):
            self.notes.ran += 1
            self.net(batch[0])

    model = toy(Counting)
    counts = []
    note = Do("on_validation_start", lambda t, m: counts.append(m.notes.ran))
    best = ModelCheckpoint(tmp_path, save_last=True)
    trainer, _ = train(tmp_path, EMA(decay=0.9, buffers="recompute", recompute_batches=2), note, best, model=model)
    assert counts == [2, 4]  # once per validation, not again for the checkpoint or the end
    trainer.validate(model, loader(), verbose=False)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert model.notes.ran == 4
    model.notes.ran = 0
    model.outputs.clear()
    every = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_weights_only=True)
    no_val = {"limit_val_batches": 0, "max_epochs": 1}
    train(tmp_path, EMA(decay=0.9, buffers="recompute", recompute_batches=1), every, model=model, **no_val)
    assert model.notes.ran == 3  # the last file and the end are one state


def test_a_weights_only_file_has_the_statistics(tmp_path):
    model = calm()
    light = ModelCheckpoint(tmp_path, save_weights_only=True, every_n_train_steps=4)
    stop = {"max_steps": 4, "max_epochs": 1, "limit_val_batches": 0}
    train(tmp_path, EMA(decay=0.9, buffers="recompute"), light, model=model, **stop)
    saved = read(light.best_model_path)["state_dict"]
    close(norms(saved), norms(with_update_bn(model, model.kept)))
    assert same(saved, weights(model))


def test_frozen_layers_keep_their_statistics(tmp_path):
    model = toy(Busy, frozen=True)
    train(tmp_path, EMA(decay=0.9, buffers="recompute"), model=model)
    state = weights(model)
    assert torch.equal(state["net.1.running_mean"], torch.zeros(8))
    assert not torch.equal(state["net.5.running_mean"], torch.zeros(8))


def test_other_buffers_are_copied_and_modules_without_norm_cost_nothing(tmp_path):
    recorder, ema = Recorder(), EMA(decay=0.9, buffers="recompute")
    _, model = train(tmp_path, recorder, ema, model=toy(NoNorm))
    close(weights(model), reference(recorder)[0])
    assert not ema._batches
    model = toy(Busy)
    train(tmp_path, EMA(decay=0.9, buffers="recompute"), model=model)
    assert model.seen == 2 * BATCHES


def test_both_instances_can_estimate(tmp_path):
    def alone(ema):
        model = toy(Busy)
        train(tmp_path, ema, model=model)
        return weights(model)

    first = {"decay": 0.9, "name": "a", "buffers": "recompute"}
    second = {"decay": 0.5, "name": "b", "buffers": "recompute", "offload": True}
    a, b, model = EMA(**first), EMA(**second), toy(Busy)
    last = ModelCheckpoint(tmp_path, save_last=True)
    train(tmp_path, a, b, last, model=model)
    expected = [alone(EMA(**first)), alone(EMA(**second))]
    saved = read(tmp_path / "last.ckpt")
    assert same(weights(model), expected[0])
    assert same(saved["state_dict"], expected[0])
    other = saved["callbacks"]["EMA[b]"]["average"]
    assert same(other, {k: expected[1][k] for k in other})
    assert "net.1.running_mean" in other
    assert same(b._average.average, other)


def test_statistics_survive_a_resume_and_a_second_fit(tmp_path):
    options = {"decay": 0.9, "buffers": "recompute", "recompute_batches": 2}
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    model = toy()
    trainer, _ = train(tmp_path, EMA(**options), keep, model=model)
    first = read(tmp_path / "epoch=0.ckpt")
    ema, seen = EMA(**options), {}
    look = Do("on_train_start", lambda t, m: seen.update(copy.deepcopy(ema._average.average)))
    resumed = toy()
    train(tmp_path, ema, look, model=resumed, ckpt=tmp_path / "epoch=0.ckpt")
    assert same(seen, {k: first["state_dict"][k] for k in seen})
    assert same(weights(resumed), weights(model))

    before, raw = weights(model), []
    trainer.callbacks.append(Do("on_train_start", lambda t, m: raw.append(weights(m))))
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, loader(), loader())
    assert same(raw[0], read(tmp_path / "epoch=1.ckpt")["current_model_state"])
    assert not same(norms(weights(model)), norms(before))


@pytest.mark.parametrize("stage", ["validation", "checkpoint", "exception"])
def test_an_exception_while_estimating_leaves_the_run_clean(tmp_path, stage):
    model = toy(Busy, boom=RuntimeError("no gradients here"))
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=3)
    rescue = OnExceptionCheckpoint(tmp_path, filename="rescue")
    limits = {"limit_val_batches": 0} if stage != "validation" else {}
    callbacks = [EMA(decay=0.9, buffers="recompute"), rescue]
    if stage == "checkpoint":
        callbacks.append(saving)
    if stage == "exception":

        def stop(trainer, *_):
            if trainer.global_step == 3:
                raise ZeroDivisionError

        callbacks.append(Do("on_train_batch_start", stop))
    expected = ZeroDivisionError if stage == "exception" else RuntimeError
    with pytest.warns(UserWarning, match="the live ones: no gradients"), pytest.raises(expected) as caught:
        train(tmp_path, *callbacks, model=model, enable_checkpointing=True, **limits)
    if stage != "exception":
        assert any("recompute_batch" in note for note in caught.value.__notes__)
    assert "log" not in model.__dict__
    saved = read(tmp_path / "rescue.ckpt")
    assert same(norms(saved["state_dict"]), norms(saved["current_model_state"]))
    assert same(weights(model), saved["state_dict"])


@pytest.mark.parametrize("option", ["manual", "iterator"])
def test_a_training_step_that_cannot_be_repeated_is_refused(tmp_path, option):
    model = toy(Toy, optimizers=2 if option == "manual" else 1)
    if option == "iterator":
        model.training_step = lambda dataloader_iter: None
    with pytest.raises(MisconfigurationException, match="recompute_batch"):
        train(tmp_path, EMA(buffers="recompute"), model=model)
    model = toy(Toy, optimizers=2)
    model.recompute_batch = lambda batch: model(batch[0])
    train(tmp_path, EMA(buffers="recompute"), model=model, max_epochs=1)


def test_a_compiled_network_is_estimated_too(tmp_path):
    model, plain = toy(Toy, compiled=True), toy(Toy)
    for each in (model, plain):
        train(tmp_path, EMA(decay=0.9, buffers="recompute"), model=each, max_epochs=1)
    close({k.replace("_orig_mod.", ""): v for k, v in weights(model).items()}, weights(plain))


def test_preserved_puts_everything_back():
    model = toy(Busy)
    model.error(torch.ones(2), torch.zeros(2))
    model.table, model.words = {"a": 1}, {"x"}
    before, random = copy.deepcopy(model.__dict__), torch.get_rng_state()
    state, total = weights(model), model.error.sum_squared_error

    def disturb():
        assert model.error.sum_squared_error == 0
        model.eval()
        model.seen = torch.ones(()) + model.seen
        model.net[1].running_mean += 1
        model.error(torch.ones(3), torch.zeros(3))
        model.outputs.append(torch.rand(1))
        model.table["b"] = model.words.add("y")
        model.count, model.fresh = 7, True
        raise ZeroDivisionError

    with preserved(model, fresh_metrics=True), pytest.raises(ZeroDivisionError):
        disturb()
    assert same(weights(model), state)
    assert model.error.sum_squared_error is total
    assert model.training
    assert model.net[1].training
    assert (model.outputs, model.table, model.words, model.count) == ([], {"a": 1}, {"x"}, 0)
    assert model.__dict__.keys() == before.keys()
    assert torch.equal(random, torch.get_rng_state())


def test_layers_that_synchronise_estimate_alone(monkeypatch):
    def together(*_):
        raise AssertionError("waits for the other processes")

    plain = toy().net
    twin = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", together)
    x, sums = torch.randn(3, 8, 4), []
    for net in (plain, twin):
        with preserved(net):
            sums += estimate(batch_norms(net), x, net)
    assert torch.equal(*sums)
    assert "forward" not in twin[1].__dict__


# ------------------------------------------------------------- host memory


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("buffers", ["average", "copy", "recompute"])
def test_in_host_memory_the_numbers_are_the_same(tmp_path, precision, buffers):
    def run(name, **options):
        model = toy(Toy)
        ema = EMA(decay=0.9, buffers=buffers, every_n_steps=2, **options)
        save = Do("on_train_batch_end", lambda t, *_: t.global_step == 5 and t.save_checkpoint(tmp_path / name))
        train(tmp_path, ema, save, model=model, precision=precision, val_check_interval=2)
        return weights(model), read(tmp_path / name)["state_dict"], model.seen["validation_step"]

    for a, b in zip(run("a.ckpt"), run("b.ckpt", offload=True), strict=True):
        assert same(a, b)


def test_in_host_memory_a_share_from_the_device_is_the_same():
    results = []
    for on_host in (False, True):
        net = toy().net
        average = WeightAverage(net, average_buffers=True, on_host=on_host)
        for i in range(4):
            with torch.no_grad():
                net[0].weight += 1
            average.update(torch.tensor(0.5 + i / 10, dtype=torch.float64))
        results.append(average.average)
    assert same(*results)


def test_the_training_thread_does_not_wait_and_readers_do():
    net = toy().net
    average = WeightAverage(net, average_buffers=True, on_host=True)
    gate, host = threading.Event(), average._host
    work = host._work
    host._work = lambda *args: (gate.wait(10), work(*args))[1]
    before = {k: v.clone() for k, v in average._average.items()}
    with torch.no_grad():
        net[0].weight.zero_()
    average.update(0.5)  # returns while the thread stands at the gate
    assert same(before, average._average)
    with torch.no_grad():
        net[0].weight.fill_(100.0)  # the next step does not disturb the pending update
    threading.Timer(0.05, gate.set).start()
    close({"w": average.average["0.weight"]}, {"w": before["0.weight"] / 2})
    average.show_average()
    average.show_raw()
    assert (net[0].weight == 100.0).all()
    average.offload()


class FakeCuda:
    """Streams and events that only note, in order, what is asked of them; copies note themselves."""

    def __init__(self):
        self.notes = []

    def Stream(self, device):
        wait = lambda other: self.notes.append(f"side waits for {other.name}")  # noqa: E731
        return SimpleNamespace(name="side", wait_stream=wait)

    def Event(self, blocking):
        assert blocking
        record = lambda stream: self.notes.append(f"recorded on {stream.name}")  # noqa: E731
        return SimpleNamespace(record=record, synchronize=lambda: self.notes.append("thread waits"))

    def current_stream(self, device):
        return SimpleNamespace(name="main", wait_event=lambda event: self.notes.append("main waits"))

    @contextmanager
    def stream(self, stream):
        self.notes.append("on side")
        yield
        self.notes.append("on main")


def test_streams_and_events_are_in_order():
    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.copy_.default:
                fake.notes.append(f"copy {args[1].numel()}{' async' if args[2] else ''}")
            return func(*args, **(kwargs or {}))

    fake, average = FakeCuda(), torch.zeros(3)
    live = {"weight": torch.ones(3), "running": torch.ones(2)}
    host = _HostCopy(live, {"weight"}, cuda=fake, kind="cpu")
    host.fence()
    assert fake.notes == []
    with Noting():
        host.submit([([average], [host.copies["weight"]], None)], torch.tensor(0.5))
    host.wait()
    # The share and the buffers on the compute stream, since the next forward pass writes to buffers at once.
    expected = ["copy 1 async", "copy 2 async", "side waits for main", "on side", "copy 3 async", "on main"]
    assert fake.notes == [*expected, "recorded on side", "thread waits"]
    host.fence()
    host.fence()
    assert fake.notes[8:] == ["main waits"]
    assert average.tolist() == [0.5] * 3
    host.close()


def test_optimizers_and_swaps_of_the_other_instance_wait_for_the_copy(tmp_path):
    first, second = EMA(decay=0.9, name="a"), EMA(decay=0.5, name="b", offload=True)
    events = []

    def spy(trainer, pl_module):
        fence, shown = second._average.fence, first._average.show_average
        second._average.fence = lambda: (events.append("fence"), fence())[1]
        first._average.show_average = lambda: (events.append("swap"), shown())[1]
        trainer.optimizers[0].register_step_pre_hook(lambda *_: events.append("step"))

    train(tmp_path, first, second, Do("on_train_start", spy), max_epochs=1, limit_train_batches=1)
    assert events[: events.index("step")].count("fence") >= 1
    assert events[events.index("swap") - 1] == "fence"


@pytest.mark.parametrize("reader", ["update", "validation", "checkpoint", "end"])
def test_an_exception_in_the_thread_surfaces(tmp_path, reader):
    def broken(*_):
        raise MemoryError("out of host memory")

    ema = EMA(decay=0.9, offload=True)

    def spoil(trainer, pl_module, *_):
        ema._average._host._work = broken

    save = ModelCheckpoint(tmp_path, every_n_train_steps=2)
    limits = {"update": {}, "validation": {"val_check_interval": 2}, "checkpoint": {}, "end": {"max_steps": 2}}[reader]
    callbacks = [ema, Do("on_train_batch_start", lambda t, m, b, i: i == 1 and spoil(t, m))]
    if reader == "checkpoint":
        callbacks.append(save)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="out of host"):
            train(tmp_path, *callbacks, **limits)


def test_no_thread_is_left_after_a_fit(tmp_path):
    others, ema = set(threading.enumerate()), EMA(decay=0.9, offload=True)
    trainer, model = train(tmp_path, ema)
    assert not set(threading.enumerate()) - others
    before = weights(model)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, loader(), loader())
    assert ema.n_averaged == 3 * BATCHES
    assert not same(before, weights(model))
    copy.deepcopy(ema)


def test_two_instances_in_host_memory_and_live_tests(tmp_path):
    recorder, model = Recorder(), toy()
    a = EMA(decay=0.9, name="a", offload=True, evaluate="live")
    b = EMA(decay=0.5, name="b", offload=True)
    trainer, _ = train(tmp_path, recorder, a, b, model=model)
    close(weights(model), reference(recorder)[0])
    expected = reference(recorder, decay=0.5)[0]
    close(b._average.average, {k: expected[k] for k in b._average.average})
    trainer.test(model, loader(), verbose=False)
    close(model.seen["test_step"], recorder.weights[-1])
    close(weights(model), reference(recorder)[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("buffers", ["average", "recompute"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-mixed"])
def test_on_a_gpu_host_memory_gives_the_same_numbers(tmp_path, precision, buffers):
    def run(**options):
        model = toy(Busy)
        model.net[0], model.head = nn.Linear(4, 8), nn.Linear(8, 1)
        model.wide = nn.Linear(2048, 2048)  # long enough to be overwritten while it is being copied
        seed_everything(1, verbose=False)
        step = model.training_step
        model.training_step = lambda batch, batch_idx: (
            step(batch, batch_idx) + model.wide(batch[0].repeat(1, 512)).mean()
        )
        train(tmp_path, EMA(decay=0.9, buffers=buffers, **options), model=model, accelerator="gpu",
              devices=1, precision=precision, val_check_interval=2)  # fmt: skip
        del model.training_step
        return {k: v.cpu() for k, v in weights(model).items()}

    rounding = {"rtol": 1e-2, "atol": 1e-3} if precision == "bf16-true" else {"rtol": 1e-5, "atol": 1e-6}
    close(run(), run(offload=True), **rounding)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_copy_is_not_overtaken_by_the_next_step():
    net = nn.Linear(8192, 4096, bias=False, device="cuda")
    average = WeightAverage(net, average_buffers=True, on_host=True)
    assert average.average["weight"].is_pinned()
    with torch.no_grad():
        net.weight.zero_()
        average.restart()
        for i in range(20):
            average.fence()  # before what stands for an optimizer step
            net.weight.fill_(float(i + 1))
            torch.cuda.set_sync_debug_mode("error")
            try:
                average.update(0.5)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    expected = 0.0
    for i in range(20):
        expected = 0.5 * expected + 0.5 * (i + 1)
    torch.testing.assert_close(average.average["weight"], torch.full((4096, 8192), expected))
    average.show_average()
    average.show_raw()
    assert (net.weight == 20.0).all()


# -------------------------------------------------------- a second validation


class Scored(Toy):
    """Logs a mean over uneven batches, a sum, a maximum, a metric object and something at the end of the epoch."""

    def __init__(self, **options):
        super().__init__(**options)
        self.mse = torchmetrics.MeanSquaredError()
        self.extras = torchmetrics.MetricCollection([torchmetrics.MeanAbsoluteError(), torchmetrics.R2Score()])
        self.notes, self.outputs = SimpleNamespace(ends=[], modes=set()), []

    def on_validation_epoch_start(self):
        self.outputs = []

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        y, target = self(batch[0]).float(), batch[0].sum(1, keepdim=True)
        self.notes.modes.add((self.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        self.outputs.append(y)
        self.mse(y, target)
        self.extras.update(y, target)
        self.log("v", y.square().mean(), prog_bar=True)
        self.log_dict({"s": y.sum(), "quiet": y.mean()}, reduce_fx="sum", logger=False)
        self.log("m", y.max(), reduce_fx=torch.max, on_step=True, on_epoch=True)
        self.log("step", y.max(), on_step=True, on_epoch=False)
        if not self.n_loaders > 1:
            self.log("mse", self.mse)
            self.log_dict(self.extras)

    n_loaders = 1

    def on_validation_epoch_end(self):
        self.notes.ends.append(torch.cat(self.outputs).shape[0])
        self.log("end", torch.cat(self.outputs).mean())


def by_hand(model, state, loaders):
    """What the live weights give, without Trainer or logging."""
    twin = toy(Scored)
    twin.load_state_dict(state, strict=False)
    twin.eval()
    found = {}
    with torch.no_grad():
        for i, data in enumerate(loaders):
            suffix = f"/dataloader_idx_{i}" if len(loaders) > 1 else ""
            ys = [twin(batch[0]) for batch in data]
            y, target = torch.cat(ys), torch.cat([b[0].sum(1, keepdim=True) for b in data])
            found |= {f"v{suffix}": y.square().mean(), f"s{suffix}": y.sum(), f"m{suffix}": y.max()}
            found[f"quiet{suffix}"] = sum(v.mean() for v in ys)
            if not suffix:
                found |= {"mse": (y - target).square().mean(), "MeanAbsoluteError": (y - target).abs().mean()}
                found["R2Score"] = 1 - (y - target).square().sum() / (target - target.mean()).square().sum()
        found["end"] = torch.cat([twin(b[0]) for data in loaders for b in data]).mean()
    return {f"{k}_live": v for k, v in found.items()}


@pytest.mark.parametrize("n_loaders", [1, 2])
@pytest.mark.parametrize("limit", [1.0, 2])
def test_the_second_validation_is_that_of_the_live_weights(tmp_path, n_loaders, limit):
    x = torch.randn(17, 4, generator=torch.Generator().manual_seed(3))
    loaders = [DataLoader(TensorDataset(x[i:]), batch_size=5) for i in range(n_loaders)]  # the last batch is smaller
    model = toy(Scored)
    model.n_loaders = n_loaders
    recorder, at_save, hooks = Recorder(), [], []
    saving = ModelCheckpoint(tmp_path, save_last=True)
    saving.on_validation_end = lambda t, m: at_save.append(dict(t.callback_metrics))
    other = Do("on_validation_batch_end", lambda *_: hooks.append(1))
    logger = CSVLogger(tmp_path)
    train(tmp_path, recorder, EMA(decay=0.9, evaluate="both"), saving, other, model=model,
          val=loaders, limit_val_batches=limit, logger=logger, max_epochs=1)  # fmt: skip
    used = [list(data)[: limit if isinstance(limit, int) else None] for data in loaders]
    expected = by_hand(model, {k: v.float() for k, v in recorder.weights[-1].items()}, used)
    found = {k: v for k, v in at_save[-1].items() if k.endswith("_live")}
    close(found, expected)
    averaged = by_hand(model, weights(model), used)
    close({k[:-5]: at_save[-1][k[:-5]] for k in averaged}, {k[:-5]: v for k, v in averaged.items()})
    assert len(hooks) == sum(len(data) for data in used)
    assert model.notes.ends == [sum(b[0].shape[0] for data in used for b in data)] * 2
    assert model.notes.modes == {(False, False, False)}
    rows = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    name = "v_live" if n_loaders == 1 else "v/dataloader_idx_1_live"
    assert name in rows
    assert "s_live" not in rows.splitlines()[0]
    assert "log" not in model.__dict__


def test_the_second_validation_runs_in_the_trainers_precision_and_not_in_the_sanity_check(tmp_path):
    model, keys = toy(Scored), []
    note = Do("on_sanity_check_end", lambda t, m: keys.extend(t.callback_metrics))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_for(tmp_path, EMA(decay=0.9, evaluate="both"), note, precision="bf16-mixed", max_epochs=1)
        trainer.num_sanity_val_steps = 1
        trainer.fit(model, loader(), loader())
    assert not [k for k in keys if k.endswith("_live")]
    assert model.notes.modes == {(False, False, True)}
    assert len(model.notes.ends) == 3
    assert "v_live" in trainer.callback_metrics
    assert "v_live" in trainer.progress_bar_metrics


def test_both_can_be_monitored_before_and_after_the_start(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="v_live", save_top_k=-1)
    recorder = Recorder()
    ema = EMA(decay=0.9, evaluate="both", start_epoch=1)
    seen = []
    note = Do(
        "on_train_epoch_end",
        lambda t, m: seen.append((float(t.callback_metrics["v"]), float(t.callback_metrics["v_live"]))),
    )
    train(tmp_path, recorder, ema, best, note, model=toy(Scored))  # fmt: skip
    assert seen[0][0] == pytest.approx(seen[0][1])
    assert seen[1][0] != pytest.approx(seen[1][1])
    assert best.best_model_score is not None


def test_an_exception_in_the_second_validation_leaves_no_trace(tmp_path):
    class Fails(Scored):
        def on_validation_epoch_end(self):
            super().on_validation_epoch_end()
            if len(self.notes.ends) == 2:
                raise ZeroDivisionError

    model, recorder = toy(Fails), Recorder()
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, recorder, EMA(decay=0.9, evaluate="both"), model=model)
    close({k: v for k, v in weights(model).items() if k in recorder.weights[0]}, reference(recorder)[0])
    assert "log" not in model.__dict__


def test_a_validation_step_over_an_iterator_is_refused(tmp_path):
    model = toy()
    model.validation_step = lambda dataloader_iter: None
    with pytest.raises(MisconfigurationException, match="evaluate='both'"):
        train(tmp_path, EMA(evaluate="both"), model=model)


def test_sums_over_processes_are_asked_for_where_log_says_so():
    asked = []

    def reduce(tensor, reduce_op):
        asked.append(reduce_op)
        return tensor if reduce_op == "max" else tensor * 3

    class Logs(Scored):
        def validation_step(self, batch, batch_idx):
            self.log("a", batch.mean(), sync_dist=True)
            self.log("b", batch.max(), sync_dist=True, reduce_fx="max")

        def on_validation_epoch_end(self):
            pass

    combined = [(torch.tensor([1.0, 3.0]), 0, 0), (torch.tensor([8.0]), 1, 0)]
    combined = type("Loader", (list,), {"_mode": "sequential", "flattened": [0]})(combined)
    epoch_loop = SimpleNamespace(val_loop=SimpleNamespace(_combined_loader=combined))
    metrics = {"callback_metrics": {}, "progress_bar_metrics": {}, "logged_metrics": {}, "loggers": []}
    strategy = SimpleNamespace(reduce=reduce, batch_to_device=lambda batch, dataloader_idx: batch)
    precision = SimpleNamespace(convert_input=lambda batch: batch, val_step_context=torch.no_grad)
    fit_loop = SimpleNamespace(epoch_loop=epoch_loop)
    trainer = SimpleNamespace(fit_loop=fit_loop, strategy=strategy, precision_plugin=precision, **metrics)
    found = validate_again(trainer, toy(Logs))
    assert found == {"a_live": 4.0, "b_live": 8.0}
    assert asked == ["sum", "sum", "max", "sum"]


# ------------------------------------------------------- beside other things


@pytest.mark.parametrize("finder", ["rate", "size"])
def test_tuners_beside_it_change_nothing(tmp_path, finder):
    options = {"decay": 0.9, "buffers": "recompute", "evaluate": "both", "offload": True}

    class Sized(Toy):
        batch_size = 2

        def train_dataloader(self):
            return loader()

        val_dataloader = train_dataloader

    def run(*tuners):
        model, recorder, ema = toy(Sized), Recorder(), EMA(**options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer_for(tmp_path, *tuners, recorder, ema, enable_checkpointing=True).fit(model)
        assert ema.n_averaged == 2 * BATCHES
        return weights(model), recorder.weights[0]

    if finder == "rate":
        tuner = LearningRateFinder(num_training_steps=3, update_attr=False)
    else:
        tuner = BatchSizeFinder(steps_per_trial=2, max_trials=1)
    (tuned, tuned_start), (plain, plain_start) = run(tuner), run()
    assert same(tuned_start, plain_start)
    assert same(tuned, plain)


def test_configured_layers_and_all_options_at_once(tmp_path):
    class Late(Toy):
        def configure_model(self):
            if not hasattr(self, "last"):
                self.last = nn.Linear(1, 1)
                self.late = True

    model, recorder = toy(Late), Recorder()
    ema = EMA(half_life=6, half_life_unit="samples", warmup="power", every_n_steps=2, exclude="net.0", offload=True,
              buffers="recompute", evaluate="both", start_step=2)  # fmt: skip
    train(tmp_path, recorder, ema, model=model)
    assert ema.n_averaged == BATCHES - 1
    expected = slow(recorder.weights[2:], [2] * 2 * BATCHES, 2, half_life=6, half_life_unit="samples", warmup="power")
    close({"w": weights(model)["last.weight"]}, {"w": expected["last.weight"]})
    assert torch.equal(weights(model)["net.0.weight"].double(), recorder.weights[-1]["net.0.weight"])


def test_one_lerp_per_group_and_nothing_else(tmp_path):
    calls = {}

    def begin(trainer, pl_module, outputs, batch, batch_idx):
        calls["mode"] = Calls()
        calls["mode"].__enter__()

    def end(trainer, pl_module, outputs, batch, batch_idx):
        calls["mode"].__exit__(None, None, None)

    for buffers, precision in (("average", "32-true"), ("copy", "32-true"), ("average", "bf16-true")):
        counted = Do("on_train_batch_end", begin), EMA(decay=0.9, buffers=buffers), Do("on_train_batch_end", end)
        fit(tmp_path, *counted, precision=precision, max_epochs=1, limit_val_batches=0)
        names = calls["mode"].names
        lerp = ["aten._foreach_lerp_.Scalar"]
        # bf16 and fp16 go through storage of a bounded size that is made once
        assert names == (lerp if precision == "32-true" else ["aten._foreach_copy_.default", *lerp])


def test_conversion_goes_in_chunks_of_a_bounded_size(monkeypatch):
    monkeypatch.setattr("lit_callbacks.average._CHUNK", 40)
    net = toy().net.to(torch.bfloat16)
    twin = copy.deepcopy(net).float()
    average, full = WeightAverage(net, average_buffers=True), WeightAverage(twin, average_buffers=True)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.add_(1)
    for own, other in zip(twin.state_dict().values(), net.state_dict().values(), strict=True):
        own.copy_(other)
    with Calls() as calls:
        average.update(0.75)
    assert len(calls.names) > 2
    assert set(calls.names) == {"aten._foreach_copy_.default", "aten._foreach_lerp_.Scalar"}
    full.update(0.75)
    assert same(average.average, full.average)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_verdict_on_the_device_costs_no_sync(tmp_path, rule):
    calls = {}

    def begin(trainer, pl_module, outputs, batch, batch_idx):
        calls["mode"] = Calls()
        calls["mode"].__enter__()

    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0))
    stop = Do("on_train_batch_end", lambda *_: calls["mode"].__exit__(None, None, None))
    callbacks = Do("on_train_batch_end", begin), ema_for(rule), stop
    fit(tmp_path, *callbacks, model=toy(fused=True), plugins=[plugin], max_epochs=1, limit_val_batches=0)
    assert "aten._foreach_mul_.Tensor" in calls["mode"].names
    assert not [name for name in calls["mode"].names if "local_scalar" in name]


# ------------------------------------------------------------------- export


@pytest.mark.parametrize("moment", ["during", "after"])
def test_export_writes_the_average_alone(tmp_path, moment):
    pytest.importorskip("lit_callbacks.export")
    recorder, model = Recorder(), toy()
    a, b = EMA(decay=0.9, name="a"), EMA(decay=0.5, name="b", exclude="net.0")

    def write(*_):
        a.export(tmp_path / "a.pt", model)
        b.export(tmp_path / "b.pt", model)

    extra = [Do("on_validation_epoch_end", write)] if moment == "during" else []
    train(tmp_path, recorder, a, b, *extra, model=model)
    if moment == "after":
        write()
    saved = torch.load(tmp_path / "a.pt", weights_only=True)["state_dict"]
    close(saved, reference(recorder)[0])
    other = torch.load(tmp_path / "b.pt", weights_only=True)["state_dict"]
    expected = reference(recorder, decay=0.5)[0] | {
        k: v for k, v in recorder.weights[-1].items() if k.startswith("net.0") or "num_batches" in k
    }
    close(other, expected)


def test_export_before_a_fit_is_an_error(tmp_path):
    pytest.importorskip("lit_callbacks.export")
    with pytest.raises(MisconfigurationException, match="export"):
        EMA().export(tmp_path / "a.pt", toy())


# -------------------------------------------------------------- other homes


DDP = """
    import sys, torch, warnings
    sys.path[:0] = {paths!r}
    warnings.simplefilter("ignore")
    import torch.distributed as dist
    from lightning.pytorch import Trainer
    from lit_callbacks import EMA
    from test_ema import Do, Recorder, Toy, double, weights
    from test_ema_options import norms, slow, toy, with_update_bn
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    class Model(Toy):
        def __init__(self):
            super().__init__()
            self.kept = []
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.kept.append(batch[0])
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("w", self(batch[0]).mean(), sync_dist=True)

    def gather(tensors):
        found = [None, None]
        dist.all_gather_object(found, tensors)
        return found

    def equal(state):
        first, second = gather(state)
        return all(torch.equal(first[k], second[k]) for k in first)

    def check(trainer, model):
        state, names = weights(model), [k for k, _ in model.named_parameters()]
        assert equal(state) and equal({{k: second._average.average[k] for k in names}})
        batches = [b for part in gather(model.kept) for b in part]
        assert len(batches) == 12 and not torch.equal(batches[0], batches[6])
        for found, options in ((state, rule), (second._average.average, dict(decay=0.5))):
            expected = slow(recorder.weights, [4] * 6, **options)
            for k in names:
                torch.testing.assert_close(found[k].double(), expected[k], rtol=1e-5, atol=1e-6)
        expected = norms(with_update_bn(model, batches))
        for k, v in norms(state).items():
            torch.testing.assert_close(v, expected[k], rtol=1e-5, atol=1e-6)
        rates = gather(float(trainer.callback_metrics["w_live"]))
        assert rates[0] == rates[1]
        open({folder!r} + f"/checked {{trainer.global_rank}}", "w").close()

    data = DataLoader(TensorDataset(torch.randn(24, 4, generator=torch.Generator().manual_seed(1))), batch_size=2)
    rule = dict(half_life=10.0, half_life_unit="samples", warmup="tau", warmup_tau=3.0)
    recorder = Recorder()
    save = Do("on_train_epoch_end", lambda t, m: t.save_checkpoint({folder!r} + "/a.ckpt"))
    first = EMA(buffers="recompute", evaluate="both", **rule)
    second = EMA(decay=0.5, name="b", offload=True)
    trainer = Trainer(max_epochs=1, accelerator="cpu", strategy="ddp_fork", devices=2, logger=False,
                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                      num_sanity_val_steps=0, callbacks=[recorder, first, second, save, Do("on_fit_end", check)],
                      val_check_interval=4)
    trainer.fit(toy(Model), data, data)
"""


@pytest.mark.timeout(120)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_agree_with_each_other_and_with_the_reference(tmp_path):
    script = tmp_path / "train.py"
    here = os.path.dirname(__file__)  # noqa: PTH120
    script.write_text(textwrap.dedent(DDP).format(paths=[here], folder=str(tmp_path)))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    checked = sorted(path.name for path in tmp_path.glob("checked*"))
    assert checked == ["checked 0", "checked 1"]


def test_it_works_in_a_pytorch_lightning_trainer(tmp_path):
    pl = pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")

    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

        def training_step(self, batch, batch_idx):
            return self.net(batch[0]).square().mean()

        def validation_step(self, batch, batch_idx):
            self.log("v", self.net(batch[0]).square().mean())

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    def run(epochs, ckpt=None):
        ema = EMA(decay=0.9, buffers="recompute", evaluate="both", offload=True)
        best = pl.callbacks.ModelCheckpoint(tmp_path, monitor="v_live", save_last=True)
        trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
                             enable_model_summary=False, callbacks=[ema, best])  # fmt: skip
        model = Model()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(model, loader(), loader(), ckpt_path=ckpt)
        saved = read(tmp_path / "last.ckpt")
        assert ema.n_averaged == saved["averaging_state"]["n_averaged"] == BATCHES * epochs
        assert same(weights(model), saved["state_dict"])
        assert not same(saved["state_dict"], saved["current_model_state"])
        assert {"v", "v_live"} <= trainer.callback_metrics.keys()

    run(1)
    run(2, ckpt=tmp_path / "last.ckpt")


# ------------------------------------------------------------- bad settings


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"decay": 0.9, "half_life": 10}, "half_life"),
        ({"half_life": 0}, "half_life"),
        ({"half_life": float("inf")}, "half_life"),
        ({"half_life_unit": "batches"}, "half_life_unit"),
        ({"warmup": "cosine"}, "warmup"),
        ({"warmup_gamma": 0.0}, "warmup_gamma"),
        ({"warmup_power": -1.0}, "warmup_power"),
        ({"warmup_tau": float("nan")}, "warmup_tau"),
        ({"recompute_batches": 0}, "recompute_batches"),
        ({"evaluate": "raw"}, "evaluate"),
        ({"buffers": "mean"}, "buffers"),
        ({"include": "("}, "include"),
        ({"exclude": ["a", "["]}, "exclude"),
    ],
)
def test_wrong_options_are_named(wrong, field):
    with pytest.raises(MisconfigurationException, match=rf"^EMA: .*{field}.*got") as caught:
        EMA(**wrong)
    assert "\n" not in str(caught.value)


def test_the_default_is_still_0999():
    assert (EMA().decay, EMA().warmup, EMA(half_life=5).decay) == (0.999, True, None)


def test_every_argument_can_come_from_yaml(tmp_path):
    options = {
        "decay": None, "half_life": 2000, "half_life_unit": "samples", "warmup": "power", "warmup_gamma": 2,
        "include": ["net", "head"], "exclude": "bias", "buffers": "recompute", "recompute_batches": 4,
        "evaluate": "both", "offload": True,
    }  # fmt: skip
    parser = ArgumentParser()
    parser.add_class_arguments(EMA, "ema")
    parser.add_argument("--config", action="config")
    (tmp_path / "a.yaml").write_text(json.dumps({"ema": options}))
    ema = parser.instantiate_classes(parser.parse_args(["--config", str(tmp_path / "a.yaml")])).ema
    assert (ema.half_life, ema.warmup, ema.include, ema.exclude) == (2000, "power", ["net", "head"], ["bias"])
    ema = parser.instantiate_classes(parser.parse_args(["--ema.warmup", "false", "--ema.decay", "0.5"])).ema
    assert (ema.warmup, ema.decay) == (False, 0.5)
