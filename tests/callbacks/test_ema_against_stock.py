"""The defects of Lightning's `EMAWeightAveraging`, each measured on both classes in the same scenario.

The `ours` half of a test says what is right: a slow average in float64, a file, plain torch. The `stock` half documents
the wrong value in the pinned Lightning and fails once Lightning has repaired it.
"""

import contextlib
import inspect
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import lightning
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    WeightAveraging,
    weight_averaging,
)
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lit_callbacks import EMA
from lit_callbacks.average import WeightAverage
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from tests.callbacks.slow_average import (
    BATCHES,
    Do,
    Steps,
    Toy,
    loader,
    read,
    run,
    slow_average,
    toy_of,
    trainer_for,
    weights,
)

DECAY = 0.9
STOCK_NAMES = {
    "every_n_steps": "update_every_n_steps",
    "start_step": "update_starting_at_step",
    "start_epoch": "update_starting_at_epoch",
}


class Side:
    """One of the two classes, and how its behaviour is judged."""

    def __init__(self, name, defect, folder):
        self.stock, self.defect, self.folder = name == "stock", defect, folder
        self.steps = Steps()

    def callback(self, *, decay=DECAY, **options) -> Callback:
        if not self.stock:
            return EMA(decay=decay, warmup=False, **options)
        return EMAWeightAveraging(decay=decay, **{STOCK_NAMES[name]: value for name, value in options.items()})

    def fit(self, *others, callback=None, model=None, **options):
        """Train a toy for an epoch; the other callbacks stand behind the average in the list."""
        model = Toy() if model is None else model
        callback = self.callback() if callback is None else callback
        trainer = trainer_for(self.folder, self.steps, callback, *others, **options)
        run(trainer, "fit", model)
        return trainer, model

    def save(self, trainer):
        trainer.save_checkpoint(self.folder / "a.ckpt")
        return read(self.folder / "a.ckpt")

    def average(self, first=0, **options):
        """What the average has to be, from the recorded step `first` on."""
        if self.stock:  # the first update copies the weights after a step, ours starts from those before it
            return floats(slow_average(self.steps.history[first + 1 :], decay=DECAY, **options))
        return slow_average(self.steps.history[first:], decay=DECAY, **options)

    @property
    def raw(self):
        return self.steps.history[-1]

    @contextmanager
    def wrong(self) -> Iterator[None]:
        """Hold a wrong behaviour of Lightning: whatever else happens inside, it is gone."""
        try:
            yield
        except (Exception, pytest.fail.Exception) as error:
            pytest.fail(
                f"Lightning {lightning.__version__} fixed {self.defect}: drop this companion and the remark in the "
                f"docs.\n{error}"
            )

    def equal(self, value, *, ours, stock):
        """Compare with the right value or with the wrong one; the two must not be mistaken for each other."""
        assert not matches(ours, stock), "the scenario does not tell right from wrong"
        with self.wrong() if self.stock else contextlib.nullcontext():
            if isinstance(value, dict):
                expected = stock if self.stock else ours
                assert expected.keys() <= value.keys() if self.stock else expected.keys() == value.keys()
                close({name: value[name] for name in expected}, expected)
            else:
                assert value == (stock if self.stock else ours)


def doubles(state):
    return {name: tensor.double() for name, tensor in state.items()}


def floats(state):
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


def close(value, expected):
    torch.testing.assert_close(doubles(value), doubles(expected), rtol=1e-5, atol=1e-6)


def matches(a, b):
    if not isinstance(a, dict):
        return a == b
    return all(torch.allclose(a[k].double(), b[k].double(), rtol=1e-5, atol=1e-6) for k in a.keys() & b.keys())


def updates(saved):
    return int(saved["averaging_state"]["n_averaged"])


@pytest.fixture(params=["ours", pytest.param("stock", marks=pytest.mark.stock)])
def side(request, tmp_path):
    found = re.match(r"test_(d\d+)_", request.function.__name__)
    assert found
    return Side(request.param, found[1].upper(), tmp_path)


# ------------------------------------------------- which weights are evaluated


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_d1_test_and_predict_of_the_same_process(side, stage):
    """D1: test and predict in the fit process use the raw weights."""
    best = ModelCheckpoint(side.folder, monitor="v")
    trainer, model = side.fit(best)
    run(trainer, stage, model, ckpt_path="best")
    side.equal(model.seen[f"{stage}_step"][0], ours=side.average(), stock=side.raw)
    saved = read(best.best_model_path)
    side.equal(model.seen[f"{stage}_step"][0], ours=saved["state_dict"], stock=saved["current_model_state"])


def test_d5_before_the_first_update(side):
    """D5: before the first update validation uses the initial weights, and a run that ends first ends with them."""
    _, model = side.fit(callback=side.callback(start_step=100), max_epochs=3)
    for epoch, seen in zip((1, 2, 3), model.seen["validation_step"], strict=True):
        side.equal(seen, ours=side.steps.history[epoch * BATCHES], stock=side.steps.history[0])
    side.equal(weights(model), ours=side.raw, stock=side.steps.history[0])


@pytest.mark.parametrize("who", ["module", "callback"])
def test_d7_the_end_of_the_validation_epoch(side, who):
    """D7: the module's `on_validation_epoch_end` and the callbacks after the average see the raw weights."""
    seen = []
    _, model = side.fit(Do("on_validation_epoch_end", lambda _, module: seen.append(weights(module))))
    close(floats(model.seen["validation_step"][0]), floats(side.average()))
    seen = seen if who == "callback" else model.seen["validation_epoch_end"]
    side.equal(seen[0], ours=side.average(), stock=side.raw)


# ---------------------------------------------------------- what files contain


def test_d2_weights_only_checkpoints(side):
    """D2: weights-only checkpoints hold the raw weights, though the metric in their name was the average's."""
    best = ModelCheckpoint(side.folder, monitor="v", save_weights_only=True)
    side.fit(best)
    side.equal(read(best.best_model_path)["state_dict"], ours=side.average(), stock=side.raw)


@pytest.mark.parametrize("key", ["state_dict", "current_model_state"])
@pytest.mark.parametrize("how", ["OnExceptionCheckpoint", "save_on_exception"])
def test_d6_an_exception_in_validation(side, how, key):
    """D6: an exception in validation writes a checkpoint whose two sets of weights are exchanged."""

    def fail(*_):
        raise ZeroDivisionError

    if how == "OnExceptionCheckpoint":
        rescue = OnExceptionCheckpoint(side.folder, filename="rescue")
    else:
        rescue = ModelCheckpoint(side.folder, save_on_exception=True)
    with pytest.raises(ZeroDivisionError):
        side.fit(Do("on_validation_batch_start", fail), rescue)
    (path,) = side.folder.glob("*.ckpt")
    right, wrong = side.average(), side.raw
    if key == "current_model_state":
        right, wrong = wrong, right
    side.equal(read(path)[key], ours=right, stock=wrong)


@pytest.mark.parametrize("key", ["state_dict", "current_model_state"])
def test_d8_a_checkpoint_from_inside_validation(side, key):
    """D8: a checkpoint saved inside validation has the two sets of weights exchanged."""
    saved = {}

    class Saving(Toy):
        def validation_step(self, batch, batch_idx):
            saved.update(side.save(self.trainer))

    side.fit(model=Saving())
    right, wrong = side.average(), side.raw
    if key == "current_model_state":
        right, wrong = wrong, right
    side.equal(saved[key], ours=right, stock=wrong)


class Late(Toy):
    def setup(self, stage):
        self.last = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.last(self.net(batch[0])).square().mean()


def test_d12_layers_made_in_setup(side):
    """D12: layers made in the module's `setup` are missing from the average and from `state_dict`."""
    trainer, _ = side.fit(model=Late(norm=False))
    state = side.save(trainer)["state_dict"]
    side.equal({"last.weight", "last.bias"} <= state.keys(), ours=True, stock=False)
    if not side.stock:
        close(state, side.average())


def test_d12_layers_made_in_setup_beside_batch_norm(side):
    """D12: tensors are paired by position, so that the missing layers meet the buffers, in another shape."""
    if side.stock:
        with side.wrong(), pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
            side.fit(model=Late())
        return
    trainer, _ = side.fit(model=Late())
    close(side.save(trainer)["state_dict"], side.average())


def test_d12_layers_made_in_setup_beside_a_buffer_of_their_shape(side):
    """D12: and in the same shape they are averaged into the buffer without a word."""

    class Slope(Late):
        def __init__(self):
            super().__init__(norm=False)
            self.register_buffer("constant", torch.ones(1))

        def setup(self, stage):
            self.last = nn.PReLU()  # one slope, 0.25

    trainer, _ = side.fit(model=Slope())
    constant = side.save(trainer)["state_dict"]["constant"]
    slopes = slow_average([{"constant": state["last.weight"]} for state in side.steps.history[1:]], decay=DECAY)
    side.equal({"constant": constant}, ours={"constant": torch.ones(1)}, stock=slopes)


def test_d19_a_checkpoint_saved_after_the_fit(side):
    """D19: a checkpoint saved after the fit has lost the raw weights, so that the run cannot be extended exactly."""
    trainer, _ = side.fit()
    saved = side.save(trainer)
    close(floats(saved["state_dict"]), floats(side.average()))
    side.equal(floats(saved["current_model_state"]), ours=floats(side.raw), stock=side.average())


def test_d20_resuming_without_the_average(side):
    """D20: training that resumes without the callback goes on from the average, and nothing says so."""
    trainer, _ = side.fit()
    saved = side.save(trainer)
    callbacks = [] if side.stock else [EMA(enabled=False)]
    model, start = Toy(), {}
    note = Do("on_train_start", lambda _, module: start.update(weights(module)))
    trainer = trainer_for(side.folder, *callbacks, note, max_epochs=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, loader(), loader(1), ckpt_path=side.folder / "a.ckpt")
    torch.testing.assert_close(start, dict(saved["state_dict"]), rtol=0, atol=0)
    # Lightning lists callbacks that a file knows and the Trainer lacks; what that does to the weights it does not say.
    # Nothing of ours runs in a Trainer without the callback either: to be told, leave it in and switch it off.
    messages = [str(w.message) for w in caught if not str(w.message).startswith("Be aware that when using `ckpt_path`")]
    side.equal(any("averaged weights" in message for message in messages), ours=True, stock=False)


def test_d23_a_compiled_submodule(side):
    """D23: the `_orig_mod.` of a compiled submodule leaks into the file."""
    trainer, _ = side.fit(model=Toy(compiled=True))
    names = side.save(trainer)["state_dict"].keys()
    side.equal(
        sorted(names),
        ours=sorted(Toy().state_dict()),
        stock=sorted(name.replace("net.", "net._orig_mod.") for name in Toy().state_dict()),
    )


# --------------------------------------------------------- which steps count


def test_d3_a_start_epoch_delays(side):
    """D3: `update_starting_at_epoch` never delays: it is joined to the rule for steps by OR."""
    trainer, _ = side.fit(callback=side.callback(start_epoch=50), max_epochs=3)
    side.equal(updates(side.save(trainer)), ours=0, stock=3 * BATCHES)


def test_d4_epochs_and_steps_do_not_add_up(side):
    """D4: updates at the end of epochs are made on top of those after steps."""
    trainer, _ = side.fit(callback=side.callback(start_epoch=0), max_epochs=3)
    side.equal(updates(side.save(trainer)), ours=3 * BATCHES, stock=3 * BATCHES + 3)


def test_d3_d4_a_start_epoch_in_the_middle(side):
    """D3 and D4 together: 8 steps before and 2 ends of epochs are averaged that should not be."""
    trainer, _ = side.fit(callback=side.callback(start_epoch=1), max_epochs=3)
    saved = side.save(trainer)
    side.equal(updates(saved), ours=2 * BATCHES, stock=3 * BATCHES + 2)
    if not side.stock:
        close(saved["state_dict"], side.average(first=BATCHES))


@pytest.mark.parametrize("fused", [False, True])
def test_d9_steps_that_the_scaler_skips(side, fused):
    """D9: fp16 steps that the gradient scaler skips are averaged."""
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0))
    trainer, _ = side.fit(model=Toy(fused=fused, inf_at=(1, 3)), plugins=[plugin])
    assert trainer.global_step == BATCHES
    assert len(side.steps.history) - 1 == BATCHES - 2
    saved = side.save(trainer)
    side.equal(updates(saved), ours=BATCHES - 2, stock=BATCHES)
    if not side.stock:
        close(saved["state_dict"], side.average())


def test_d10_batches_without_a_loss(side):
    """D10: a batch whose `training_step` returns None is averaged."""
    trainer, _ = side.fit(model=Toy(none_at=(1, 3)))
    assert len(side.steps.history) - 1 == BATCHES - 2
    saved = side.save(trainer)
    side.equal(updates(saved), ours=BATCHES - 2, stock=BATCHES)
    if not side.stock:
        close(saved["state_dict"], side.average())


@pytest.mark.parametrize(("every", "ours", "stock"), [(2, 4, 0), (3, 2, 3)])
def test_d11_two_optimizers(side, every, ours, stock):
    """D11: with two optimizers every second step is never, since `global_step` counts each of them."""
    trainer, _ = side.fit(callback=side.callback(every_n_steps=every), model=Toy(optimizers=2))
    assert trainer.global_step == 2 * BATCHES
    saved = side.save(trainer)
    side.equal(updates(saved), ours=ours, stock=stock)
    if not side.stock:
        close(saved["state_dict"], side.average(every=every))


def test_d18_a_second_fit(side):
    """D18: a second fit throws the average away, and starts from it instead of the raw weights."""
    starts = []
    trainer, model = side.fit(Do("on_train_start", lambda _, module: starts.append(weights(module))))
    average, raw = side.average(), side.raw
    trainer.fit_loop.max_epochs = 2
    run(trainer, "fit", model)
    side.equal(starts[1], ours=raw, stock=average)
    saved = side.save(trainer)
    side.equal(updates(saved), ours=2 * BATCHES, stock=BATCHES)
    if not side.stock:
        close(saved["state_dict"], side.average())


# -------------------------------------------------- precision, buffers, devices


def test_d13_validation_in_bf16(side):
    """D13: with `bf16-true` every validation rounds the fp32 average through bf16."""
    files = []

    def save(trainer, *_):
        if trainer.global_step == BATCHES:
            files.append(side.save(trainer)["state_dict"])

    # Validation comes between the end of the last batch and the end of the epoch.
    _, model = side.fit(Do("on_train_batch_end", save), Do("on_train_epoch_end", save), precision="bf16-true")
    assert len(model.seen["validation_step"]) == 1
    before, after = map(floats, files)
    assert before["net.0.weight"].dtype == torch.float32
    change = max((before[name] - after[name]).abs().max().item() for name in before)
    if side.stock:
        with side.wrong():
            assert 1e-4 < change < 1e-2
    else:
        assert change == 0
        close(after, floats(side.average()))


def test_d14_one_kernel_in_bf16(side):
    """D14: `multi_avg_fn`, the fast form, raises with `bf16-true`; ours has no other form."""
    if side.stock:
        callback = WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.999))
        # torch 2.14 and 2.11 word it differently.
        message = r"expected dtype float for `end`|on the same device and the same dtype"
        with side.wrong(), pytest.raises(RuntimeError, match=message):
            side.fit(callback=callback, precision="bf16-true")
    else:
        trainer, _ = side.fit(precision="bf16-true")
        close(side.save(trainer)["state_dict"], side.average())


def test_d15_every_offered_option_works(side):
    """D15: the command line offers `EMAWeightAveraging(multi_avg_fn=...)`, which always fails."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(EMAWeightAveraging if side.stock else EMA, "ema")
    offered = vars(parser.get_defaults().ema)
    if side.stock:
        with side.wrong():
            assert "multi_avg_fn" in offered
            with pytest.raises(AssertionError, match="Only one of avg_fn and multi_avg_fn"):
                side.fit(callback=EMAWeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.999)))
    else:
        assert offered.keys() == inspect.signature(EMA).parameters.keys()  # no **kwargs for somebody else's options
        trainer, _ = side.fit(callback=EMA(**offered))
        assert updates(side.save(trainer)) == BATCHES


@pytest.mark.parametrize(("decay", "stock"), [(0.9, 14), (0.999, 1)])
def test_d16_integer_buffers(side, decay, stock):
    """D16: integer buffers are averaged, and truncated."""
    callbacks = [side.callback(decay=decay)]
    if side.stock:
        callbacks.append(WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(decay)))
    for callback in callbacks:
        trainer, _ = side.fit(callback=callback, max_epochs=3)
        count = side.save(trainer)["state_dict"]["net.1.num_batches_tracked"].item()
        side.equal(count, ours=3 * BATCHES, stock=stock)


def test_d17_buffers_do_what_their_option_says(side):
    """D17: `use_buffers=False` leaves BatchNorm to the user, says the docstring, but overwrites it at each update."""
    if side.stock:
        callback = EMAWeightAveraging(decay=DECAY, use_buffers=False)
        own = torch.full((8,), 7.0)

        def by_the_user(trainer, pl_module):
            if trainer.current_epoch == 1:
                dict(vars(callback)["_average_model"].named_buffers())["module.net.1.running_mean"].copy_(own)

        trainer, _ = side.fit(Do("on_train_epoch_start", by_the_user), callback=callback, max_epochs=2)
        mean = side.save(trainer)["state_dict"]["net.1.running_mean"]
        side.equal({"mean": mean}, ours={"mean": own}, stock={"mean": side.raw["net.1.running_mean"]})
        return
    for option in ("average", "copy"):
        side.steps = Steps()
        trainer, _ = side.fit(callback=side.callback(buffers=option), max_epochs=2)
        expected = side.average() if option == "average" else side.raw
        state = side.save(trainer)["state_dict"]
        names = ("net.1.running_mean", "net.1.running_var")
        close({name: state[name] for name in names}, {name: expected[name] for name in names})


def test_d22_the_device_of_the_average(side, monkeypatch):
    """D22: `device=0` is ignored, since 0 is false; ours is where the module is."""
    if side.stock:
        asked = []
        monkeypatch.setattr(weight_averaging, "AveragedModel", lambda model, device, **_: asked.append(device))
        EMAWeightAveraging(device=0).setup(Trainer(barebones=True, accelerator="cpu"), Toy(), "fit")
        side.equal(asked, ours=[0], stock=[torch.device("cpu")])
        return
    callback, places = side.callback(), set()
    look = Do("on_train_batch_end", lambda *_: places.update(v.device for v in callback._average.average.values()))
    side.fit(look, callback=callback)
    assert places == {torch.device("cpu")}
    # No second device is at hand; "meta" shows that the average follows the module and not the default.
    elsewhere = WeightAverage(Toy().to("meta"), average_buffers=True)
    assert {value.device.type for value in elsewhere.average.values()} == {"meta"}


# --------------------------------------------------- beside others, elsewhere


def test_d21_two_averages_at_once(side):
    """D21: two averages in one run are impossible, since both have the same key in a checkpoint."""
    if side.stock:
        with side.wrong(), pytest.raises(RuntimeError, match="state_key"):
            trainer_for(side.folder, EMAWeightAveraging(decay=0.9), EMAWeightAveraging(decay=0.99))
        return
    second = EMA(decay=0.5, warmup=False, name="fast")
    trainer, _ = side.fit(second)
    saved = side.save(trainer)
    close(saved["state_dict"], side.average())
    fast = floats(slow_average(side.steps.history, decay=0.5))
    close(saved["callbacks"][second.state_key]["average"], fast)


def test_d24_a_trainer_of_pytorch_lightning(side):
    """D24: the callback fails inside a `pytorch_lightning` Trainer."""
    pl = pytest.importorskip("pytorch_lightning", reason="the twin package is not installed")
    toy = toy_of(pl.LightningModule)()
    trainer = trainer_for(side.folder, side.steps, side.callback(), of=pl.Trainer)
    if side.stock:
        with side.wrong(), pytest.raises(ValueError, match="Expected a parent"):
            run(trainer, "fit", toy)
        return
    run(trainer, "fit", toy)
    saved = side.save(trainer)
    close(saved["state_dict"], side.average())
    close(saved["current_model_state"], side.raw)
    close(toy.seen["validation_step"][0], side.average())
    run(trainer, "test", toy)
    close(toy.seen["test_step"][0], side.average())


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_d25_sharded_weights(side, strategy):
    """D25: sharded strategies are not supported, and at most a warning says so; ours refuses them."""
    # Without `__init__`, which asks for packages and devices that a test machine lacks.
    trainer = SimpleNamespace(strategy=strategy.__new__(strategy), callbacks=[])
    if side.stock:
        with side.wrong(), warnings.catch_warnings():
            warnings.simplefilter("error")
            callback = side.callback()
            callback.setup(trainer, Toy(), "fit")
            assert callback._average_model is not None
        return
    with pytest.raises(MisconfigurationException, match=f"EMA does not support {strategy.__name__}.*Use DDP"):
        side.callback().setup(trainer, Toy(), "fit")
