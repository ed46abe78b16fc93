"""EMA against a slow float64 loop, Lightning's own class, and the Trainer's life cycle."""

import copy
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lit_callbacks import EMA
from lit_callbacks.average import WeightAverage, decay_at
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

BATCHES = 6


class Toy(LightningModule):
    """Three layers with BatchNorm; remembers the first weight at each stage."""

    def __init__(self, *, late=False, fused=False, none_at=(), inf_at=(), compiled=False, frozen=False, optimizers=1):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        if frozen:
            self.net[0].requires_grad_(False)
        if compiled:
            self.net = torch.compile(self.net, backend="eager")
        self.late, self.fused, self.none_at, self.inf_at, self.n_optimizers = late, fused, none_at, inf_at, optimizers
        self.automatic_optimization = optimizers == 1
        self.seen = {}
        self.lr = 0.01

    def setup(self, stage):
        if self.late and not hasattr(self, "last"):
            self.last = nn.Linear(1, 1)

    def forward(self, x):
        y = self.net(x)
        return self.last(y) if self.late else y

    def training_step(self, batch, batch_idx):
        if batch_idx in self.none_at:
            return None
        loss = self(batch[0]).float().square().mean()
        if batch_idx in self.inf_at:
            loss = loss * float("inf")
        if not self.automatic_optimization:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
        return loss

    def look(self, stage):
        self.seen[stage] = weights(self)

    def validation_step(self, batch, batch_idx):
        self.look("validation_step")
        self.log("v", self(batch[0]).float().square().mean())

    def on_validation_epoch_end(self):
        self.look("validation_epoch_end")

    def on_train_epoch_end(self):
        self.look("train_epoch_end")

    def test_step(self, batch, batch_idx):
        self.look("test_step")

    def predict_step(self, batch, batch_idx):
        self.look("predict_step")

    def configure_optimizers(self):
        parts = [list(self.parameters())] if self.n_optimizers == 1 else [[p] for p in self.parameters()][:2]
        made = [torch.optim.AdamW(part, lr=self.lr, fused=self.fused) for part in parts]
        return made[0] if self.n_optimizers == 1 else made


class Recorder(Callback):
    """Weights in float64 at the start and after each step that AdamW itself has counted."""

    def __init__(self):
        self.weights, self.epochs, self.count = [], [], 0

    def on_train_start(self, trainer, pl_module):
        if not self.weights:
            self.weights.append(double(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        count = max((int(s["step"]) for o in trainer.optimizers for s in o.state.values()), default=0)
        if count > self.count:
            self.count = count
            self.weights.append(double(pl_module))
            self.epochs.append(trainer.current_epoch)


class Do(Callback):
    """Run a function in one hook."""

    def __init__(self, hook, function):
        setattr(self, hook, function)


def weights(module):
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def double(module):
    return {k: v.double() for k, v in weights(module).items()}


def reference(recorder, *, decay=0.9, warmup=True, every=1, start_step=0):
    """The definition, one number at a time; integers are the latest."""
    names = list(recorder.weights[0])
    average = recorder.weights[start_step]
    updates = 0
    for step in range(start_step + every, len(recorder.weights), every):
        keep = decay**every
        if warmup:
            keep = min(keep, (1 + updates) / (10 + updates))
        average = {k: keep * average[k] + (1 - keep) * recorder.weights[step][k] for k in names}
        updates += 1
    integers = {k: recorder.weights[-1][k] for k in names if "num_batches" in k}
    return {**average, **integers}, updates


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def close(a, b, rtol=1e-5, atol=1e-6):
    assert a.keys() == b.keys()
    for k in a:
        torch.testing.assert_close(a[k].double(), b[k].double(), rtol=rtol, atol=atol, msg=lambda m, k=k: f"{k}: {m}")


def loader(constant=False):
    x = (
        torch.ones(2 * BATCHES, 4)
        if constant
        else torch.randn(2 * BATCHES, 4, generator=torch.Generator().manual_seed(1))
    )
    if constant:
        x[1::2] = torch.tensor([0.5, -1.0, 2.0, 0.0])  # each batch the same, so that a resumed epoch sees its data
    return DataLoader(TensorDataset(x), batch_size=2)


def trainer_for(tmp_path, *callbacks, **options):
    defaults = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    defaults |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    if any(isinstance(cb, ModelCheckpoint) for cb in callbacks):
        defaults["enable_checkpointing"] = True
    return Trainer(callbacks=list(callbacks), num_sanity_val_steps=0, **(defaults | options))


def toy(**options):
    seed_everything(0, verbose=False)
    return Toy(**options)


def fit(tmp_path, *callbacks, model=None, constant=False, ckpt=None, **options):
    model = toy() if model is None else model
    trainer = trainer_for(tmp_path, *callbacks, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(not resumable|does not have many workers|lr_scheduler).*")
        trainer.fit(model, loader(constant), loader(constant), ckpt_path=ckpt)
    return trainer, model


def read(path):
    return torch.load(path, weights_only=True)


# ------------------------------------------------------------- arithmetic


def test_decay_at_ramps_and_ends_at_the_limit():
    assert decay_at(0, 0.9, True) == 0.1
    assert decay_at(8, 0.9, True) == 0.5
    assert decay_at(1000, 0.9, True) == 0.9
    assert decay_at(0, 0.9, False) == 0.9


@pytest.mark.parametrize(
    ("options", "expected", "trainer"),
    [
        ({}, {}, {}),
        ({"warmup": False}, {"warmup": False}, {}),
        ({"every_n_steps": 3}, {"every": 3}, {}),
        ({"every_n_steps": 3, "warmup": False}, {"every": 3, "warmup": False}, {}),
        ({"start_step": 5}, {"start_step": 5}, {}),
        ({"start_epoch": 1}, {"start_step": BATCHES}, {}),
        ({"start_step": 2, "start_epoch": 1}, {"start_step": BATCHES}, {}),
        ({}, {}, {"accumulate_grad_batches": 2}),
        ({"every_n_steps": 2, "start_step": 1}, {"every": 2, "start_step": 1}, {"val_check_interval": 2}),
    ],
)
def test_average_equals_a_float64_loop(tmp_path, options, expected, trainer):
    recorder, ema = Recorder(), EMA(decay=0.9, **options)
    _, model = fit(tmp_path, recorder, ema, **trainer)
    average, updates = reference(recorder, **expected)
    assert ema.n_averaged == updates > 0
    close(weights(model), average)


def test_averages_can_be_read_written_and_begun_anew(tmp_path):
    ema, seen = EMA(decay=0.9, warmup=False), {}

    def look(trainer, module):
        seen["average"] = {name: x.clone() for name, x in ema.averages().items()}
        if trainer.current_epoch == 0:
            ema.restart()
            seen["anew"] = same(ema.averages(), {n: x for n, x in module.state_dict().items() if n in ema.averages()})
        else:
            ema.averages()["net.0.weight"].fill_(7.0)

    assert ema.averages() == {}
    ema.restart()  # nothing to begin anew yet
    recorder = Recorder()
    _, model = fit(tmp_path, recorder, ema, Do("on_train_epoch_end", look), max_epochs=2)
    assert seen["anew"]
    assert (weights(model)["net.0.weight"] == 7.0).all()
    average, _ = reference(recorder, warmup=False, start_step=BATCHES)
    close(seen["average"], {n: x for n, x in average.items() if n in seen["average"]})


def test_copied_buffers_are_the_live_ones(tmp_path):
    recorder = Recorder()
    _, model = fit(tmp_path, recorder, EMA(decay=0.9, buffers="copy"))
    average, _ = reference(recorder)
    buffers = {k: recorder.weights[-1][k] for k in average if "running" in k}
    close(weights(model), average | buffers)


def test_integer_buffers_are_copied(tmp_path):
    trainer, _ = fit(tmp_path, EMA(decay=0.9))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert read(tmp_path / "a.ckpt")["state_dict"]["net.1.num_batches_tracked"] == 2 * BATCHES


def test_frozen_parameters_have_no_average_until_unfrozen(tmp_path):
    def unfreeze(trainer, pl_module):
        if trainer.current_epoch == 1:
            pl_module.net[0].requires_grad_(True)

    recorder, ema = Recorder(), EMA(decay=0.9)
    names = []
    look = Do("on_train_epoch_end", lambda t, m: names.append(sorted(ema._average.average)))
    _, model = fit(tmp_path, recorder, Do("on_train_epoch_start", unfreeze), ema, look, model=toy(frozen=True))
    assert "net.0.weight" not in names[0]
    assert "net.0.weight" in names[1]
    close(weights(model), reference(recorder)[0])


def test_two_optimizers_count_once_per_batch(tmp_path):
    recorder, ema = Recorder(), EMA(decay=0.9, every_n_steps=2)
    _, model = fit(tmp_path, recorder, ema, model=toy(optimizers=2))
    average, updates = reference(recorder, every=2)
    assert ema.n_averaged == updates == BATCHES
    close(weights(model), average)


def test_steps_without_gradients_do_not_count(tmp_path):
    recorder, ema = Recorder(), EMA(decay=0.9)
    with pytest.warns(UserWarning, match="returned `None`"):
        _, model = fit(tmp_path, recorder, ema, model=toy(none_at=(1, 2)))
    average, updates = reference(recorder)
    assert ema.n_averaged == updates == 2 * BATCHES - 4
    close(weights(model), average)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_steps_skipped_by_the_scaler_do_not_count(tmp_path, fused, every):
    recorder, ema = Recorder(), EMA(decay=0.9, every_n_steps=every, buffers="copy")
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0))
    inf_at = (1, 3) if every == 1 else (2, 3)  # with every=2 a whole interval
    _, model = fit(tmp_path, recorder, ema, model=toy(fused=fused, inf_at=inf_at), plugins=[plugin])
    average, updates = reference(recorder, every=every)
    assert ema.n_averaged == updates == (2 * BATCHES - 4) // every
    parameters = {k for k, _ in model.named_parameters()}
    close({k: v for k, v in weights(model).items() if k in parameters}, {k: average[k] for k in parameters})


def test_a_bf16_module_has_an_fp32_average_that_validation_does_not_round(tmp_path):
    recorder, ema = Recorder(), EMA(decay=0.9)
    trainer, model = fit(tmp_path, recorder, ema, precision="bf16-true")
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = read(tmp_path / "a.ckpt")
    assert saved["state_dict"]["net.0.weight"].dtype == torch.float32
    assert saved["current_model_state"]["net.0.weight"].dtype == torch.bfloat16
    close(saved["state_dict"], reference(recorder)[0])
    assert torch.equal(model.net[0].weight, saved["state_dict"]["net.0.weight"].bfloat16())


def test_an_update_is_one_lerp_without_host_sync():
    class Count(TorchDispatchMode):
        calls: list

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls.append(str(func))
            return func(*args, **(kwargs or {}))

    average = WeightAverage(toy(), average_buffers=True)
    with Count() as count:
        count.calls = []
        average.update(0.9)
    assert count.calls == ["aten._foreach_lerp_.Scalar"]
    with Count() as count:
        count.calls = []
        average.update(torch.tensor(0.9))
    assert "aten._local_scalar_dense.default" not in count.calls


def test_live_tensors_keep_their_storage(tmp_path):
    pointers = []
    note = Do("on_train_batch_end", lambda t, m, *_: pointers.append([v.data_ptr() for v in m.state_dict().values()]))
    fit(tmp_path, EMA(decay=0.9), note)
    assert all(p == pointers[0] for p in pointers)


def test_a_reassigned_buffer_is_followed(tmp_path):
    def reassign(trainer, pl_module, *_):
        pl_module.net[1].running_mean = pl_module.net[1].running_mean.clone()

    recorder = Recorder()
    _, model = fit(tmp_path, recorder, Do("on_train_batch_start", reassign), EMA(decay=0.9), max_epochs=1)
    close(weights(model), reference(recorder)[0])


def test_tied_weights_are_averaged_once(tmp_path):
    model = toy()
    model.twin = nn.Linear(4, 8)
    model.twin.weight = model.net[0].weight
    recorder, ema = Recorder(), EMA(decay=0.9)
    trainer, _ = fit(tmp_path, recorder, ema, model=model)
    assert ("net.0.weight" in ema._average.average) + ("twin.weight" in ema._average.average) == 1
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = read(tmp_path / "a.ckpt")
    for key in ("state_dict", "current_model_state"):
        assert torch.equal(saved[key]["twin.weight"], saved[key]["net.0.weight"])
    close({"w": saved["state_dict"]["twin.weight"]}, {"w": reference(recorder)[0]["net.0.weight"]})


# ------------------------------------------------------------- evaluation


def test_validation_and_its_epoch_end_see_the_average(tmp_path):
    recorder = Recorder()
    _, model = fit(tmp_path, recorder, EMA(decay=0.9))
    average, _ = reference(recorder)
    close(model.seen["validation_step"], average)
    close(model.seen["validation_epoch_end"], average)
    close(model.seen["train_epoch_end"], recorder.weights[-1])


def test_live_evaluation_leaves_the_average_to_the_files(tmp_path):
    recorder, best = Recorder(), ModelCheckpoint(tmp_path, monitor="v")
    trainer, model = fit(tmp_path, recorder, EMA(decay=0.9, evaluate="live"), best, max_epochs=1)
    average, _ = reference(recorder)
    close(model.seen["validation_step"], recorder.weights[-1])
    close(read(best.best_model_path)["state_dict"], average)
    trainer.test(model, loader(), verbose=False)
    close(model.seen["test_step"], recorder.weights[-1])
    close(weights(model), average)
    trainer.test(model, loader(), ckpt_path="best", verbose=False)
    close(model.seen["test_step"], average)


def test_an_exception_in_a_live_test_gives_the_average_back(tmp_path):
    def boom(*_):
        raise ZeroDivisionError

    trainer, model = fit(tmp_path, EMA(decay=0.9, evaluate="live"))
    before = weights(model)
    trainer.callbacks.append(Do("on_test_batch_start", boom))
    with pytest.raises(ZeroDivisionError):
        trainer.test(model, loader(), verbose=False)
    assert same(weights(model), before)


def test_before_the_start_live_weights_are_used_and_saved(tmp_path):
    recorder, ema = Recorder(), EMA(start_step=100)
    trainer, model = fit(tmp_path, recorder, ema)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = read(tmp_path / "a.ckpt")
    for state in (model.seen["validation_step"], weights(model), saved["state_dict"], saved["current_model_state"]):
        close(state, recorder.weights[-1])
    assert saved["averaging_state"]["n_averaged"] == 0


@pytest.mark.parametrize("weights_only", [False, True])
def test_test_and_predict_after_fit(tmp_path, weights_only):
    recorder = Recorder()
    first = ModelCheckpoint(tmp_path, monitor="v", mode="max", save_weights_only=weights_only)  # the first epoch wins
    trainer, model = fit(tmp_path, recorder, EMA(decay=0.9), first)
    average, _ = reference(recorder)
    trainer.test(model, loader(), verbose=False)
    trainer.predict(model, loader())
    close(model.seen["test_step"], average)
    close(model.seen["predict_step"], average)
    saved = read(first.best_model_path)
    trainer.test(model, loader(), ckpt_path="best", verbose=False)
    trainer.predict(model, loader(), ckpt_path="best")
    assert same(model.seen["test_step"], saved["state_dict"])
    assert same(model.seen["predict_step"], saved["state_dict"])
    recorder.weights = recorder.weights[: BATCHES + 1]
    close(saved["state_dict"], reference(recorder)[0])


def test_a_fresh_process_evaluates_a_file_in_silence(tmp_path):
    trainer, _ = fit(tmp_path, EMA(decay=0.9))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    model = toy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        trainer = trainer_for(tmp_path, EMA(decay=0.9))
        trainer.validate(model, loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert same(model.seen["validation_step"], read(tmp_path / "a.ckpt")["state_dict"])


# ------------------------------------------------------------ checkpoints


def test_checkpoint_keys_and_strict_plain_torch_loading(tmp_path):
    recorder, last = Recorder(), ModelCheckpoint(tmp_path, save_last=True)
    fit(tmp_path, recorder, EMA(decay=0.9), last)
    saved = read(tmp_path / "last.ckpt")
    assert saved["averaging_state"].keys() == {"n_averaged"}
    assert saved["averaging_state"]["n_averaged"] == 2 * BATCHES
    close(saved["state_dict"], reference(recorder)[0])
    close(saved["current_model_state"], recorder.weights[-1])
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    net.load_state_dict({k.removeprefix("net."): v for k, v in saved["state_dict"].items()}, strict=True)


def test_weights_only_checkpoints_hold_the_average_alone(tmp_path):
    recorder, every = (
        Recorder(),
        ModelCheckpoint(tmp_path, save_weights_only=True, every_n_train_steps=4, save_top_k=-1),
    )
    fit(tmp_path, recorder, EMA(decay=0.9), every, max_epochs=1)
    recorder.weights = recorder.weights[:5]
    saved = read(every.best_model_path)
    close(saved["state_dict"], reference(recorder)[0])
    assert "current_model_state" not in saved


def test_the_module_is_clean_after_fit_and_after_an_exception(tmp_path):
    def boom(*_):
        raise ZeroDivisionError

    original = LightningModule.on_save_checkpoint
    _, model = fit(tmp_path, EMA(decay=0.9))
    assert model.on_save_checkpoint.__func__ is original
    assert not model._load_state_dict_pre_hooks
    copy.deepcopy(model)
    pickle.dumps(model)
    model = toy()
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, EMA(decay=0.9), Do("on_train_epoch_end", boom), model=model)
    assert model.on_save_checkpoint.__func__ is original
    pickle.dumps(model)


def test_the_modules_own_save_hook_still_runs(tmp_path):
    model = toy()
    seen = []
    model.on_save_checkpoint = lambda checkpoint: seen.append("averaging_state" in checkpoint)
    trainer, _ = fit(tmp_path, EMA(decay=0.9), ModelCheckpoint(tmp_path), model=model, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert seen == [True, True]


def test_a_checkpoint_saved_inside_validation_is_not_swapped(tmp_path):
    recorder = Recorder()
    save = Do("on_validation_batch_end", lambda t, *_: t.save_checkpoint(tmp_path / "a.ckpt"))
    light = Do("on_validation_batch_start", lambda t, *_: t.save_checkpoint(tmp_path / "b.ckpt", weights_only=True))
    fit(tmp_path, recorder, EMA(decay=0.9), save, light)
    average, _ = reference(recorder)
    close(read(tmp_path / "a.ckpt")["state_dict"], average)
    close(read(tmp_path / "a.ckpt")["current_model_state"], recorder.weights[-1])
    close(read(tmp_path / "b.ckpt")["state_dict"], average)


def test_a_checkpoint_saved_between_step_and_update_has_the_update(tmp_path):
    save = Do("on_train_batch_end", lambda t, *_: t.save_checkpoint(tmp_path / "a.ckpt"))
    recorder = Recorder()
    _, model = fit(tmp_path, recorder, save, EMA(decay=0.9))
    saved = read(tmp_path / "a.ckpt")
    average, updates = reference(recorder)
    assert saved["averaging_state"]["n_averaged"] == saved["callbacks"]["EMA[ema]"]["n_averaged"] == updates
    close(saved["state_dict"], average)
    close(weights(model), average)


@pytest.mark.parametrize("hook", ["on_validation_batch_start", "on_train_batch_start"])
def test_an_exception_leaves_a_correct_checkpoint(tmp_path, hook):
    def boom(trainer, *_):
        if trainer.global_step >= BATCHES:
            raise ZeroDivisionError

    recorder, model = Recorder(), toy()
    light = ModelCheckpoint(tmp_path, filename="light", save_weights_only=True, save_on_exception=True)
    rescue = OnExceptionCheckpoint(tmp_path, filename="rescue")
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, recorder, EMA(decay=0.9), Do(hook, boom), rescue, light, model=model)
    average, updates = reference(recorder)
    saved = read(tmp_path / "rescue.ckpt")
    assert saved["averaging_state"]["n_averaged"] == updates == BATCHES
    close(saved["state_dict"], average)
    close(saved["current_model_state"], recorder.weights[-1])
    (light_path,) = {*tmp_path.glob("*light*.ckpt"), *tmp_path.glob("exception*.ckpt")}
    close(read(light_path)["state_dict"], average)
    close(weights(model), average)


def test_saving_after_other_weights_were_loaded_saves_those(tmp_path):
    trainer, model = fit(tmp_path, EMA(decay=0.9))
    other = toy().state_dict()
    other["net.0.weight"] = torch.zeros(8, 4)
    model.load_state_dict(other)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = read(tmp_path / "a.ckpt")
    assert same(saved["state_dict"], other)
    assert "current_model_state" not in saved


def test_disabled_does_nothing(tmp_path):
    recorder, last = Recorder(), ModelCheckpoint(tmp_path, save_last=True)
    _, model = fit(tmp_path, recorder, EMA(enabled=False), last)
    saved = read(tmp_path / "last.ckpt")
    assert not {"current_model_state", "averaging_state"} & saved.keys()
    assert "EMA[ema]" not in saved["callbacks"]
    close(weights(model), recorder.weights[-1])
    close(model.seen["validation_step"], recorder.weights[-1])


def test_disabled_says_so_when_it_resumes_an_averaged_file(tmp_path):
    fit(tmp_path, EMA(decay=0.9), ModelCheckpoint(tmp_path, save_last=True))
    with pytest.warns(UserWarning, match="averaging"):
        fit(tmp_path, EMA(enabled=False), ckpt=tmp_path / "last.ckpt", max_epochs=3)


def test_two_instances_side_by_side(tmp_path):
    recorder, last = Recorder(), ModelCheckpoint(tmp_path, save_last=True)
    _, model = fit(tmp_path, recorder, EMA(decay=0.9, name="a"), EMA(decay=0.5, name="b"), last)
    saved = read(tmp_path / "last.ckpt")
    close(saved["state_dict"], reference(recorder, decay=0.9)[0])
    close(model.seen["validation_step"], reference(recorder, decay=0.9)[0])
    second = saved["callbacks"]["EMA[b]"]["average"]
    expected = reference(recorder, decay=0.5)[0]
    close(second, {k: expected[k] for k in second})

    a, b, straight = EMA(decay=0.9, name="a"), EMA(decay=0.5, name="b"), EMA(decay=0.5, name="b")
    fit(tmp_path, a, b, ckpt=tmp_path / "last.ckpt", max_epochs=3)
    fit(tmp_path, EMA(decay=0.9, name="a"), straight, max_epochs=3)
    assert same(b._average.average, straight._average.average)


def test_layers_made_in_setup_are_averaged(tmp_path):
    recorder, last = Recorder(), ModelCheckpoint(tmp_path, save_last=True)
    fit(tmp_path, recorder, EMA(decay=0.9), last, model=toy(late=True))
    saved = read(tmp_path / "last.ckpt")
    assert "last.weight" in saved["state_dict"]
    close(saved["state_dict"], reference(recorder)[0])


def test_compiled_submodules_leave_no_trace_in_names(tmp_path):
    last = ModelCheckpoint(tmp_path, save_last=True)
    fit(tmp_path, EMA(decay=0.9), last, model=toy(compiled=True))
    saved = read(tmp_path / "last.ckpt")
    for key in ("state_dict", "current_model_state"):
        assert saved[key].keys() == toy().state_dict().keys()
    model = toy(compiled=True)
    fit(tmp_path, EMA(decay=0.9), model=model, ckpt=tmp_path / "last.ckpt", max_epochs=3)
    straight = toy(compiled=True)
    fit(tmp_path, EMA(decay=0.9), model=straight, max_epochs=3)
    assert same(weights(model), weights(straight))


# ----------------------------------------------------------------- resume


def finish(tmp_path, name, *callbacks, **options):
    """Fit, and everything of the end that has to be equal."""
    trainer, _ = fit(tmp_path, *callbacks, **options)
    trainer.save_checkpoint(tmp_path / name)
    saved = read(tmp_path / name)
    keys = ("state_dict", "current_model_state", "averaging_state")
    return {f"{k}.{name}": value for k in keys for name, value in saved[k].items()} | {
        "steps": torch.tensor(saved["callbacks"]["EMA[ema]"]["steps"])
    }


@pytest.mark.parametrize("options", [{}, {"every_n_steps": 5}, {"start_step": 4}])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_resume_in_mid_epoch_is_exact(tmp_path, options, precision):
    def save(trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 3:
            trainer.save_checkpoint(tmp_path / "mid.ckpt")

    keep = Do("on_train_batch_end", save)
    common = {"constant": True, "precision": precision}
    straight = finish(tmp_path, "a.ckpt", EMA(decay=0.9, **options), keep, **common)
    resumed = finish(tmp_path, "b.ckpt", EMA(decay=0.9, **options), ckpt=tmp_path / "mid.ckpt", **common)
    assert straight["steps"] == 2 * BATCHES
    assert same(straight, resumed)


def test_resume_from_epoch_end_is_exact(tmp_path):
    straight = finish(tmp_path, "a.ckpt", EMA(decay=0.9), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1))
    resumed = finish(tmp_path, "b.ckpt", EMA(decay=0.9), ckpt=tmp_path / "epoch=0.ckpt")
    assert same(straight, resumed)


def test_a_finished_run_extends_exactly(tmp_path):
    straight = finish(tmp_path, "a.ckpt", EMA(decay=0.9), max_epochs=3)
    finish(tmp_path, "b.ckpt", EMA(decay=0.9), max_epochs=2)
    resumed = finish(tmp_path, "c.ckpt", EMA(decay=0.9), ckpt=tmp_path / "b.ckpt", max_epochs=3)
    assert same(straight, resumed)


def test_resuming_in_the_same_process_takes_the_files_state(tmp_path):
    straight = finish(tmp_path, "a.ckpt", EMA(decay=0.9), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1))
    ema, model = EMA(decay=0.9), toy()
    fit(tmp_path, ema, model=model)
    resumed = finish(tmp_path, "b.ckpt", ema, model=model, ckpt=tmp_path / "epoch=0.ckpt")
    assert same(straight, resumed)


def test_a_second_fit_goes_on_from_raw_weights_and_average(tmp_path):
    recorder, ema = Recorder(), EMA(decay=0.9)
    trainer, model = fit(tmp_path, recorder, ema, max_epochs=1)
    first = recorder.weights[-1]
    starts = []
    trainer.callbacks.append(Do("on_train_start", lambda t, m: starts.append(double(m))))
    trainer.fit_loop.max_epochs = 2
    recorder.count = 0  # a new fit has a new optimizer
    trainer.fit(model, loader(), loader())
    close(starts[0], first, rtol=0, atol=0)
    average, updates = reference(recorder)
    assert ema.n_averaged == updates == 2 * BATCHES
    close(weights(model), average)


def test_a_second_fit_respects_weights_loaded_in_between(tmp_path):
    ema = EMA(decay=0.9)
    _, model = fit(tmp_path, ema)
    model.load_state_dict(toy().state_dict())
    recorder = Recorder()
    with pytest.warns(UserWarning, match="no longer holds"):
        fit(tmp_path, recorder, ema, model=model)
    close(recorder.weights[0], double(toy()))
    close(weights(model), reference(recorder)[0])


def test_all_instances_start_anew_together(tmp_path):
    first, second = EMA(decay=0.9, name="a"), EMA(decay=0.5, name="b")
    _, model = fit(tmp_path, first, second)
    model.load_state_dict(toy().state_dict())
    with pytest.warns(UserWarning, match="no longer holds"):
        fit(tmp_path, first, second, model=model, max_epochs=1)
    assert first.n_averaged == second.n_averaged == BATCHES


def test_a_run_that_diverged_to_nan_keeps_its_state(tmp_path):
    def poison(trainer, pl_module):
        with torch.no_grad():
            pl_module.net[0].bias.fill_(float("nan"))

    trainer, _ = fit(tmp_path, Do("on_train_epoch_start", poison), EMA(decay=0.9))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert read(tmp_path / "a.ckpt")["averaging_state"]["n_averaged"] == 2 * BATCHES


def test_resuming_without_an_average_warns_and_starts_one(tmp_path):
    fit(tmp_path, ModelCheckpoint(tmp_path, save_last=True), max_epochs=1)
    recorder = Recorder()
    with pytest.warns(UserWarning, match="holds no average"):
        _, model = fit(tmp_path, recorder, EMA(decay=0.9), ckpt=tmp_path / "last.ckpt")
    close(recorder.weights[0], read(tmp_path / "last.ckpt")["state_dict"])
    recorder.weights = recorder.weights[: BATCHES + 1]
    close(weights(model), reference(recorder)[0])


def test_lightnings_class_opens_our_file(tmp_path):
    fit(tmp_path, EMA(decay=0.9), ModelCheckpoint(tmp_path, save_last=True))
    saved = read(tmp_path / "last.ckpt")
    stock, seen = EMAWeightAveraging(decay=0.9), {}

    def look(trainer, pl_module):
        seen["live"] = weights(pl_module)
        seen["average"] = weights(stock._average_model.module)
        seen["n"] = int(stock._average_model.n_averaged)

    with pytest.warns(UserWarning, match="callbacks used to create"):
        fit(tmp_path, stock, Do("on_train_start", look), ckpt=tmp_path / "last.ckpt", max_epochs=3)
    assert same(seen["live"], saved["current_model_state"])
    assert same(seen["average"], saved["state_dict"])
    assert seen["n"] == 2 * BATCHES


def test_we_open_the_file_of_lightnings_class(tmp_path):
    fit(tmp_path, EMAWeightAveraging(decay=0.9), ModelCheckpoint(tmp_path, save_last=True))
    saved = read(tmp_path / "last.ckpt")
    ema, seen = EMA(decay=0.9), {}

    def look(trainer, pl_module):
        seen["live"] = weights(pl_module)
        seen["average"] = {k: v.clone() for k, v in ema._average.average.items()}
        seen["n"] = ema.n_averaged

    with pytest.warns(UserWarning, match="callbacks used to create"):
        fit(tmp_path, ema, Do("on_train_start", look), ckpt=tmp_path / "last.ckpt", max_epochs=3)
    assert same(seen["live"], saved["current_model_state"])
    assert same(seen["average"], {k: v for k, v in saved["state_dict"].items() if "num_batches" not in k})
    assert seen["n"] == 2 * BATCHES


def test_a_learning_rate_finder_beside_it_changes_nothing(tmp_path):
    finder = LearningRateFinder(num_training_steps=3, update_attr=False)
    recorder, ema = Recorder(), EMA(decay=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, model = fit(tmp_path, finder, recorder, ema, enable_checkpointing=True)
    assert ema.n_averaged == 2 * BATCHES
    close(recorder.weights[0], double(toy()))
    close(weights(model), reference(recorder)[0])


@pytest.mark.parametrize("early", ["finder", "save"])
def test_what_saves_before_our_fit_start_keeps_a_resumed_average(tmp_path, early):
    fit(tmp_path, EMA(decay=0.9), ModelCheckpoint(tmp_path, save_last=True), max_epochs=1)
    saved, ema, seen = read(tmp_path / "last.ckpt"), EMA(decay=0.9), {}

    def look(trainer, pl_module):
        seen["live"] = weights(pl_module)
        seen["average"] = {k: v.clone() for k, v in ema._average.average.items()}
        seen["n"] = ema.n_averaged

    finder = LearningRateFinder(num_training_steps=3, update_attr=False)
    save = Do("on_fit_start", lambda t, _: t.save_checkpoint(tmp_path / "early.ckpt"))
    callback = finder if early == "finder" else save
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ckpt = tmp_path / "last.ckpt"
        fit(tmp_path, callback, ema, Do("on_train_start", look), ckpt=ckpt, enable_checkpointing=True)
    assert same(seen["live"], saved["current_model_state"])
    assert same(seen["average"], {k: v for k, v in saved["state_dict"].items() if "num_batches" not in k})
    assert seen["n"] == BATCHES
    if early == "save":
        close(read(tmp_path / "early.ckpt")["state_dict"], saved["state_dict"], rtol=0, atol=0)


# ------------------------------------------------------------ bad settings


def test_sharded_strategies_are_refused():
    strategy = type("MyStrategy", (type("FSDPStrategy", (), {}),), {})()
    with pytest.raises(MisconfigurationException, match="FSDPStrategy"):
        EMA().setup(SimpleNamespace(strategy=strategy, callbacks=[]), toy(), "fit")


@pytest.mark.parametrize("wrong", [{"decay": 1.0}, {"every_n_steps": 0}, {"start_step": -1}, {"buffers": "x"}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(MisconfigurationException, match="EMA"):
        EMA(**wrong)
