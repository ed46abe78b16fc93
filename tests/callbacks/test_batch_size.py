import gc
import random
import warnings
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lit_callbacks import EMA
from lit_callbacks.batch_size import BatchSizeFit, _largest, propose
from lit_callbacks.probing import Snapshot, batch_length, release, resize_batch, too_large
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler
from torchmetrics import MeanMetric

GB = 2**30


class FakeMeter:
    """A card on which a batch of B needs `slope * B + offset` GB."""

    def __init__(self, slope=1.0, offset=0.0, total=100.0, free=None):
        self.slope, self.offset = slope, offset
        self.total = int(total * GB)
        self.free = self.total if free is None else int(free * GB)
        self.budget = self.total
        self.limits, self.used = [], 0

    def available(self):
        return self.free

    @contextmanager
    def limit(self, budget):
        self.limits.append(budget)
        self.budget = budget
        try:
            yield
        finally:
            self.budget = self.total

    def start(self):
        self.used = 0

    def peak(self):
        return self.used

    def use(self, batch, strict=True):
        needed = int((self.slope * batch + self.offset) * GB)
        if strict and needed > self.budget:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        self.used = max(self.used, needed)


class Samples(Dataset):
    """Items that depend on every kind of random generator, the global ones and the data set's own."""

    def __init__(self, n=64):
        self.n, self.reads = n, 0
        self.own = (np.random.default_rng(0), random.Random(0), torch.Generator().manual_seed(0))

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.reads += 1
        noise = torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002 - that is what others use
        noise = noise + self.own[0].random() + self.own[1].random() + torch.rand((), generator=self.own[2])
        return {"x": torch.full((4,), float(i)) / self.n + 0.01 * noise, "id": str(i)}


class InBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, action):
        ctx.action = action
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        ctx.action()
        return grads[0], None


class Net(LightningModule):
    def __init__(self, meter=None, where="forward", optimizer="adamw", manual=False):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 1))
        self.net[1].weight.requires_grad_(False)
        self.metric = MeanMetric()
        self.meter, self.where, self.optimizer = meter, where, optimizer
        self.automatic_optimization = not manual
        self.calls, self.seen, self.losses = 0, [], []

    def use(self, batch):
        if self.meter is not None:
            self.meter.use(batch)

    def training_step(self, batch, batch_idx):
        self.calls += 1
        size = len(batch["x"])
        assert len(batch["id"]) == size
        if self.where == "forward":
            self.use(size)
        y = self.net(batch["x"])
        if self.where == "backward":
            y = InBackward.apply(y, lambda: self.use(size))
        loss = (y - batch["x"].sum(1, keepdim=True)).square().mean()
        self.metric.update(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("metric", self.metric, on_epoch=True, on_step=False)
        self.losses.append(loss.item())
        self.seen = [*self.seen, size]
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.lr_schedulers().step()
        return loss

    def on_before_optimizer_step(self, optimizer):
        if self.where == "step":
            self.use(max(self.seen[-1:], default=0) or 0)

    def validation_step(self, batch, batch_idx):
        self.log("val", self.metric(self.net(batch["x"]).mean()))

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        if self.optimizer == "sgd":
            return torch.optim.SGD(trained, lr=0.01, momentum=0.9)
        optimizer = torch.optim.AdamW(trained, lr=0.01, amsgrad=True)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Data(LightningDataModule):
    def __init__(self, batch_size=8, n=64, **options):
        super().__init__()
        self.batch_size, self.n, self.options = batch_size, n, options

    def train_dataloader(self):
        return DataLoader(Samples(self.n), batch_size=self.batch_size, shuffle=True, **self.options)

    def val_dataloader(self):
        return DataLoader(Samples(8), batch_size=8)


def make(meter, **options):
    fit = BatchSizeFit(**{"then": "continue", "margin": 0.0, **options})
    fit._meter_for = lambda device: meter
    return fit


def run(tmp_path, module, *callbacks, data=None, loaders=None, ckpt_path=None, epochs=2, **options):
    seed_everything(1, verbose=False)
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
        "max_epochs": epochs,
    }
    trainer = Trainer(callbacks=list(callbacks), **{**defaults, **options})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        if loaders is not None:
            trainer.fit(module, loaders, ckpt_path=ckpt_path)
        else:
            trainer.fit(module, datamodule=data or Data(), ckpt_path=ckpt_path)
    return trainer


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def test_proposals_against_all_candidates():
    for fits in range(1, 40):
        for effective in range(1, 70):
            batch, accumulate = propose(fits, effective)
            top = min(fits, effective)
            assert top / 2 <= batch <= top
            assert accumulate >= 1
            best = min(
                abs(b * k - effective) for b in range(-(-top // 2), top + 1) for k in range(1, 2 * effective + 1)
            )
            assert abs(batch * accumulate - effective) == best
            if effective & (effective - 1) == 0:
                assert batch * accumulate == effective


@pytest.mark.parametrize(
    ("fits", "effective", "expected"), [(24, 24, (24, 1)), (7, 24, (6, 4)), (100, 16, (16, 1)), (1, 5, (1, 5))]
)
def test_proposals(fits, effective, expected):
    assert propose(fits, effective) == expected


def test_search_finds_every_limit_with_few_probes():
    for start in (1, 3, 8, 64):
        for limit in (1, 5, 64, 200):
            for largest in range(limit + 2):
                tried = []

                def fits(size, tried=tried, largest=largest):
                    tried.append(size)
                    return size <= largest

                assert _largest(fits, start, limit) == min(largest, limit)
                assert len(tried) == len(set(tried)) <= 16
                assert max(tried) <= limit


# ---- batches ---------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    image: torch.Tensor
    seed: torch.Tensor


@dataclass(frozen=True)
class Record:
    image: torch.Tensor
    name: str


def test_batches_of_all_kinds_are_resized():
    image = torch.arange(3).reshape(3, 1)
    batch = {
        "tensors": [image, image[:, 0]],
        "pair": Pair(image, torch.tensor(7)),
        "record": Record(image, "whole"),
        "names": ["a", "b", "c"],
        "boxes": [torch.zeros(2, 4), torch.ones(3, 4), torch.zeros(0, 4)],
        "array": np.arange(3),
        "matrix": torch.eye(4),
        "number": 3,
    }
    assert batch_length(batch) == batch_length(batch, hint=3) == 3
    large = resize_batch(batch, 3, 5)
    order = [0, 1, 2, 0, 1]
    assert large["tensors"][0].squeeze(1).tolist() == large["tensors"][1].tolist() == order
    assert isinstance(large["pair"], Pair)
    assert large["pair"].image.squeeze(1).tolist() == order
    assert large["pair"].seed == 7
    assert large["record"].image.squeeze(1).tolist() == order
    assert large["record"].name == "whole"
    assert large["names"] == ["a", "b", "c", "a", "b"]
    assert [len(b) for b in large["boxes"]] == [2, 3, 0, 2, 3]
    assert large["array"].tolist() == order
    assert large["matrix"].shape == (4, 4)
    assert large["number"] == 3
    assert resize_batch(batch, 3, 2)["names"] == ["a", "b"]
    assert batch["names"] == ["a", "b", "c"]


def test_two_tensors_of_a_batch_of_two_are_no_samples():
    large = resize_batch([torch.zeros(2, 3), torch.zeros(2)], 2, 5)
    assert [t.shape for t in large] == [(5, 3), (5,)]


def test_length_prefers_what_is_known():
    images = [torch.zeros(3, 4, 4), torch.zeros(3, 5, 5)]
    assert batch_length((images, ["a", "b"]), hint=2) == 2
    assert batch_length(torch.zeros(5, 2), hint=8) == 5
    with pytest.raises(MisconfigurationException, match=r"worst_case_batch"):
        batch_length(object())


# ---- snapshot --------------------------------------------------------------------------------------------------------


def test_snapshot_brings_everything_back_in_place():
    net = Net()
    net.notes, net.count, net.table = ["a"], 1, {"k": [1]}
    net.generator = torch.Generator().manual_seed(3)
    with torch.inference_mode():
        net.metric.reset()
    weight, pointer, before = net.net[0].weight, net.net[0].weight.data_ptr(), net.net[0].weight.detach().clone()
    metric = {k: v for k, v in vars(net.metric).items() if k not in ("_parameters", "_buffers")}
    drawn = torch.rand(3, generator=net.generator.clone_state())
    snapshot = Snapshot()
    snapshot.watch(net)
    for _ in range(2):
        net.eval()
        net.notes.append("b")
        net.count += 1
        net.table["k"].append(2)
        net.extra = torch.zeros(1)
        net.net[0].weight.grad = torch.ones_like(weight)
        net.net[0].weight.requires_grad_(False)
        net.net[0].weight.data = torch.zeros(8, 4)
        net.net[1](torch.rand(4, 8))
        net.net[1].running_mean = torch.zeros(8)
        with torch.inference_mode():
            net.metric.update(5.0)
        torch.rand(5, generator=net.generator)
        snapshot.restore()
        assert net.training
        assert net.net[1].training
        assert (net.notes, net.count, net.table, hasattr(net, "extra")) == (["a"], 1, {"k": [1]}, False)
        assert net.net[0].weight is weight
        assert weight.data_ptr() == pointer
        assert torch.equal(weight, before)
        assert weight.requires_grad
        assert weight.grad is None
        assert net.net[1].num_batches_tracked == 0
        assert net.metric.update_count == metric["_update_count"]
        assert net.metric.mean_value == 0
    assert torch.equal(torch.rand(3, generator=net.generator), drawn)


def test_released_exceptions_hold_no_tensors():
    held = []

    def inner():
        big = torch.zeros(3)
        held.append(weakref.ref(big))
        raise ValueError

    def outer():
        also = torch.ones(3)
        held.append(weakref.ref(also))
        try:
            inner()
        except ValueError as error:
            raise torch.OutOfMemoryError("CUDA out of memory") from error

    try:
        outer()
    except RuntimeError as error:
        kept = error
    assert all(ref() is not None for ref in held)
    release(kept)
    gc.collect()
    assert all(ref() is None for ref in held)


def test_which_errors_mean_too_large():
    assert too_large(RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED.")) == "out of memory"
    assert too_large(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"))
    assert too_large(RuntimeError("upsample: expected less than INT_MAX elements")) == "too large for a kernel"
    assert too_large(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


# ---- the search ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [2, 5, 8, 19, 64])
@pytest.mark.parametrize("where", ["forward", "backward", "step"])
def test_finds_the_largest_batch(tmp_path, largest, where):
    meter = FakeMeter(slope=1.0, offset=0.5)
    fit = make(meter, budget_gb=largest + 0.5, max_batch=64)
    module = Net(meter, where)
    run(tmp_path, module, fit, epochs=1, limit_train_batches=0.125 if largest < 8 else 2, data=Data(min(8, largest)))
    assert fit.batch_size == largest
    assert meter.limits == [int((largest + 0.5) * GB)]
    assert {p.batch for p in fit.table if p.fits} == {p.batch for p in fit.table if p.batch <= largest}
    assert all(p.note == "out of memory" and p.gb is None for p in fit.table if not p.fits)
    assert next(p.gb for p in fit.table if p.batch == largest) == pytest.approx(largest + 0.5)


def test_the_configured_batch_may_be_too_large(tmp_path):
    meter = FakeMeter()
    fit = make(meter, budget_gb=3.0, then="stop")
    run(tmp_path, Net(meter), fit)
    assert fit.batch_size == 3
    assert (fit.recommended, fit.accumulate) == (2, 4)


def test_a_meter_over_the_budget_counts_without_an_error(tmp_path):
    meter = FakeMeter(slope=0.5)
    meter.limit = lambda budget: warnings.catch_warnings()  # a limit that nobody keeps
    fit = make(meter, budget_share=0.1, then="stop")
    run(tmp_path, Net(meter), fit)
    assert fit.batch_size == 20
    assert {p.note for p in fit.table if not p.fits} == {"over the budget"}


def test_the_data_set_and_max_batch_bound_the_search(tmp_path):
    for bound, options in ((24, {"data": Data(n=24)}), (10, {})):
        meter = FakeMeter()
        fit = make(meter, then="stop", max_batch=10 if bound == 10 else 4096)
        run(tmp_path, Net(meter), fit, **options)
        assert fit.batch_size == max(p.batch for p in fit.table) == bound


def test_memory_that_others_hold_is_no_budget(tmp_path, capsys):
    meter = FakeMeter(free=11.0)
    fit = make(meter, then="stop")
    run(tmp_path, Net(meter), fit)
    assert fit.batch_size == 11
    assert "budget 90.00 of 100.0 GB, but only 11.00 GB are free" in capsys.readouterr().out


def test_an_average_is_counted(tmp_path, capsys):
    meter = FakeMeter(slope=0.0)
    module = Net(meter)
    trained = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    floating = sum(b.nbytes for b in module.buffers() if b.is_floating_point())

    class Own(Callback):
        swap_bytes = GB

    for callbacks, expected in (
        ([EMA()], trained + floating),
        ([EMA(name="a"), EMA(name="b")], trained + floating),
        ([EMA(enabled=False)], 0),
        ([EMA(evaluate="live")], 0),
        ([Own()], GB),
    ):
        fit = make(meter, budget_gb=2.0, then="stop")
        run(tmp_path, Net(meter), *callbacks, fit)
        assert meter.limits[-1] == 2 * GB - expected
        assert fit.table[0].gb == pytest.approx(expected / GB)
    assert "1.00 GB of it for what callbacks set aside in validation" in capsys.readouterr().out


def test_nothing_fits(tmp_path):
    class Roomy(Net):
        def on_train_epoch_start(self):
            self.meter = None  # what was too large for the budget trains nevertheless

    meter = FakeMeter(offset=5.0)
    fit = make(meter, budget_gb=1.0)
    with pytest.warns(UserWarning, match="not even one sample fits"):
        trainer = run(tmp_path, Roomy(meter), fit, epochs=1)
    assert (fit.batch_size, fit.recommended, fit.accumulate) == (0, None, None)
    assert [p.batch for p in fit.table] == [8, 4, 2, 1]
    assert trainer.global_step == 8
    with pytest.raises(MisconfigurationException, match="not even one sample fits"):
        run(tmp_path, Net(meter), make(meter, budget_gb=1.0, then="apply"))


# ---- restoring -------------------------------------------------------------------------------------------------------


class Trace(Callback):
    """What a run did: losses, weights, states and random numbers."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        self.rows.append((batch["id"], batch["x"].clone(), pl_module.losses[-1], lr, trainer.global_step))

    def on_train_end(self, trainer, pl_module):
        self.weights = {k: v.clone() for k, v in pl_module.state_dict().items()}
        self.optimizer = trainer.optimizers[0].state_dict()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.scaler = scaler.state_dict() if scaler else None
        self.random = (random.random(), np.random.rand(), torch.rand(()).item())  # noqa: NPY002
        self.metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        self.counts = (pl_module.calls, pl_module.losses, pl_module.seen)
        self.averages = [c.state_dict() for c in trainer.callbacks if isinstance(c, EMA)]


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def same_run(with_fit, without):
    names = sorted(set(vars(without)) - {"log", "log_dict"})
    assert len(without.rows) > 3
    assert [n for n in names if not equal(getattr(with_fit, n), getattr(without, n))] == []


CASES = {
    "plain": ({}, {}, {}),
    "sgd": ({"optimizer": "sgd"}, {}, {}),
    "manual": ({"manual": True}, {}, {}),
    "accumulate and clip": ({}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}, {}),
    "scaler": ({}, {}, {}),
    "bf16": ({}, {"precision": "bf16-true"}, {}),
    "oom in backward": ({"where": "backward"}, {}, {}),
    "oom in step": ({"where": "step"}, {}, {}),
    "workers": ({}, {}, {"num_workers": 1, "persistent_workers": True}),
    "sampler": ({}, {}, {"own_sampler": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_the_same_to_the_last_bit(tmp_path, case):
    of_module, of_trainer, of_data = CASES[case]

    class Sampled(Data):
        def train_dataloader(self):
            if not of_data.get("own_sampler"):
                return super().train_dataloader()
            samples = Samples(self.n)
            sampler = RandomSampler(samples, generator=torch.Generator().manual_seed(5))
            return DataLoader(samples, batch_size=8, sampler=sampler, generator=torch.Generator().manual_seed(6))

    loader = {k: v for k, v in of_data.items() if k != "own_sampler"}
    traces = []
    for wanted in (True, False):
        seed_everything(0, verbose=False)
        meter, trace = FakeMeter(), Trace()
        fit = make(meter, budget_gb=21.5)
        module = Net(meter if wanted else None, **of_module)
        if case == "scaler":  # its first scale overflows, so that the first steps of the run are skipped
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=3)
            of_trainer = {"plugins": MixedPrecision("16-mixed", "cpu", scaler)}
        callbacks = [EMA(name="before"), *([fit] if wanted else []), EMA(name="after"), trace]
        run(tmp_path, module, *callbacks, data=Sampled(**loader), epochs=2, **of_trainer)
        traces.append(trace)
        if wanted:
            assert fit.batch_size == 21
            assert sorted(p.fits for p in fit.table) == [False] * 3 + [True] * 4
    same_run(*traces)


def test_the_state_of_the_optimizer_is_there_in_the_second_step(tmp_path):
    states = []

    class Look(Net):
        def training_step(self, batch, batch_idx):
            optimizer = self.trainer.optimizers[0]
            states.append((len(optimizer.state), self.net[0].weight.grad is not None))
            return super().training_step(batch, batch_idx)

        def on_before_backward(self, loss):
            states.append(self.net[0].weight.grad is not None)

    meter = FakeMeter()
    # A scale that overflows: the scaler would skip the first steps, and nothing would be made.
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**100))
    run(tmp_path, Look(meter), make(meter, max_batch=16, then="stop"), plugins=plugin)
    # As under accumulation the gradients of the first step live on through the second.
    assert states == [(0, False), False, (5, True), True, (5, True), True] * 2


def test_a_resumed_run_is_the_same_to_the_last_bit(tmp_path):
    seed_everything(0, verbose=False)
    first = run(tmp_path, Net(), epochs=1)
    first.save_checkpoint(tmp_path / "first.ckpt")
    traces = []
    for wanted in (True, False):
        meter, trace = FakeMeter(), Trace()
        fit = make(meter, budget_gb=21.0)
        path = tmp_path / "first.ckpt"
        run(tmp_path, Net(meter), *([fit] if wanted else []), trace, ckpt_path=path, epochs=2)
        traces.append(trace)
        assert fit.batch_size == (21 if wanted else None)
    same_run(*traces)


def test_an_error_of_the_module_is_raised_with_everything_restored(tmp_path):
    class Broken(Net):
        def training_step(self, batch, batch_idx):
            if len(batch["x"]) > 8:
                self.net[0].weight.data.zero_()
                raise RuntimeError("shapes cannot be multiplied")
            return super().training_step(batch, batch_idx)

    seed_everything(0, verbose=False)
    module, fit, meter = Broken(), make(FakeMeter()), Trace()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    callbacks = [fit, meter]
    with pytest.raises(RuntimeError, match="shapes cannot"):
        run(tmp_path, module, *callbacks)
    assert equal(before, dict(module.state_dict()))
    assert "log" not in vars(module)
    assert module.trainer.callbacks[: len(callbacks)] == callbacks


def test_the_log_does_not_hear_of_probes(tmp_path):
    rows = []
    for wanted in (True, False):
        seed_everything(0, verbose=False)
        logger = CSVLogger(tmp_path / str(wanted))
        meter = FakeMeter()
        callbacks = [make(meter, budget_gb=21.0)] if wanted else []
        run(tmp_path, Net(meter), *callbacks, logger=logger, log_every_n_steps=1)
        rows.append(open(logger.log_dir + "/metrics.csv").read())  # noqa: PTH123, SIM115
    assert rows[0] == rows[1]


# ---- where batches come from -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", ["module", "data"])
def test_the_hook_makes_the_worst_batch(tmp_path, owner):
    asked = []

    def worst_case_batch(self, batch_size):
        asked.append(batch_size)
        return {"x": torch.zeros(batch_size, 4), "id": ["x"] * batch_size}

    meter = FakeMeter()
    module = type("Hooked", (Net,), {"worst_case_batch": worst_case_batch} if owner == "module" else {})(meter)
    data = type("Hooked", (Data,), {"worst_case_batch": worst_case_batch} if owner == "data" else {})()
    fit = make(meter, budget_gb=12.0, then="stop")
    run(tmp_path, module, fit, data=data)
    assert fit.batch_size == 12
    assert list(dict.fromkeys(asked)) == [p.batch for p in fit.table]
    assert asked[0] == 8


class Ragged(Dataset):
    """Images of different heights with different numbers of boxes; number 13 is the largest."""

    def __len__(self):
        return 32

    def __getitem__(self, i):
        return torch.zeros(3, 8 + (i == 13) * 8 + i % 3, 8), {"boxes": torch.zeros(i % 4, 4)}


class Detector(LightningModule):
    def __init__(self, meter):
        super().__init__()
        self.weight, self.meter, self.pixels = nn.Parameter(torch.ones(())), meter, []

    def training_step(self, batch):
        images, targets = batch
        assert len(images) == len(targets)
        self.meter.use(len(images))
        self.pixels.append(sum(image.nbytes for image in images))
        for target in targets:
            target.pop("boxes")
        return self.weight.square()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def collate(samples):
    return tuple(zip(*samples, strict=True))


def test_samples_are_collated_anew_the_largest_first(tmp_path):
    meter = FakeMeter()
    fit = make(meter, budget_gb=9.0)
    module = Detector(meter)

    class Watch(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            self.first = list(pl_module.pixels)

    kept = module.pixels
    make_batch, present = fit._from_samples(DataLoader(Ragged(), batch_size=4, collate_fn=collate))
    assert present == 4
    images, targets = make_batch(3)
    assert [image.shape[1] for image in images] == [17, 10, 10]
    assert len(targets) == 3
    assert [image.shape[1] for image in make_batch(18)[0]][16:] == [17, 10]
    run(tmp_path, module, fit, loaders=DataLoader(Ragged(), batch_size=4, collate_fn=collate), epochs=1)
    assert fit.batch_size == 9
    assert len(kept) == len(module.pixels) == 8


class Stream(IterableDataset):
    def __iter__(self):
        return iter([{"x": torch.rand(4), "id": str(i)} for i in range(16)])


class Ready(Dataset):
    """Whole batches; the one in the middle has the largest samples."""

    def __len__(self):
        return 3

    def __getitem__(self, i):
        if i > 2:
            raise IndexError
        return {"x": torch.rand(3, 4), "id": ["a"] * 3, "more": torch.zeros(3, 5 + 5 * (i == 1))}


def test_a_stream_has_no_end_that_bounds_the_search(tmp_path):
    meter = FakeMeter()
    fit = make(meter, budget_gb=30.0, then="stop")
    run(tmp_path, Net(meter), fit, loaders=DataLoader(Stream(), batch_size=4))
    assert fit.table[0].batch == 4
    assert fit.batch_size == 30


def test_ready_batches_are_resized(tmp_path):
    widths = []

    class Wide(Net):
        def training_step(self, batch, batch_idx):
            widths.append(batch["more"].shape)
            return super().training_step(batch, batch_idx)

    meter = FakeMeter()
    fit = make(meter, budget_gb=6.0, then="stop")
    loader = OwnLoader()
    run(tmp_path, Wide(meter), fit, loaders=loader)
    assert fit.batch_size == 6
    assert [p.batch for p in fit.table] == [3, 6, 12, 9, 7]
    assert widths[0] == (3, 10)
    assert set(widths) == {(p.batch, 10) for p in fit.table}


class OwnLoader:
    """A loader that is no DataLoader."""

    def __iter__(self):
        yield from (Ready()[i] for i in range(3))


class Orders(Sampler):
    """Whole batches of indices; it forgets where to start once it has started."""

    def __init__(self):
        self.start = 1

    def __len__(self):
        return 5

    def __iter__(self):
        start, self.start = self.start, 0
        for i in range(start, 5):
            yield [4 * i + k for k in range(4)]


class Counting(DataLoader):
    position = 0

    def __iter__(self):
        for batch in super().__iter__():
            self.position += 1
            yield batch


class Whole(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, order):
        return {"x": torch.tensor(order).float().unsqueeze(1).expand(-1, 4), "id": [str(i) for i in order]}


@pytest.mark.parametrize(("kind", "workers"), [(Counting, 0), (Counting, 1), (DataLoader, 1)])
def test_loaders_of_ready_batches_are_rewound(tmp_path, kind, workers):
    traces = []
    for wanted in (True, False):
        seed_everything(0, verbose=False)
        loader = kind(Whole(), sampler=Orders(), batch_size=None, num_workers=workers, persistent_workers=bool(workers))
        meter, trace = FakeMeter(), Trace()
        fit = make(meter, budget_gb=6.0)
        callbacks = [fit] if wanted else []
        run(tmp_path, Net(meter), *callbacks, trace, loaders=loader)
        trace.position = getattr(loader, "position", None)
        traces.append(trace)
        assert fit.batch_size == (6 if wanted else None)
    assert traces[1].position in (9, None)
    same_run(*traces)


def test_an_eager_step_replaces_one_that_captures(tmp_path):
    class Graphed(Net):
        def __init__(self, meter):
            super().__init__(meter)
            self.captured = None

        def training_step(self, batch, batch_idx):
            self.captured = self.captured or len(batch["x"])
            return self.eager_training_step(batch, batch_idx)

        def eager_training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx)

    meter = FakeMeter()
    module, fit = Graphed(meter), make(meter, budget_gb=20.0)
    trainer = run(tmp_path, module, fit, epochs=1)
    assert fit.batch_size == 20
    assert module.captured == 8
    assert "training_step" not in vars(module)
    assert trainer.global_step == module.calls == 8


# ---- what comes after ------------------------------------------------------------------------------------------------


def test_stop_leaves_nothing_behind(tmp_path, capsys):
    called = []

    class Listen(Callback):
        def on_train_batch_start(self, *_):
            called.append("batch")

        def on_validation_epoch_end(self, trainer, pl_module):
            called.append("sanity" if trainer.sanity_checking else "validation")

        def on_train_end(self, *_):
            called.append("end")

        def on_fit_end(self, *_):
            called.append("fit end")

        def teardown(self, trainer, pl_module, stage):
            called.append("teardown")

    meter = FakeMeter(slope=0.5)
    fit = make(meter, budget_gb=9.9, margin=0.05, effective_batch=24, then="stop")
    checkpoint = ModelCheckpoint(tmp_path / "saved", save_last=True, save_on_exception=True)
    trainer = run(
        tmp_path, Net(meter), fit, Listen(), checkpoint, enable_checkpointing=True, min_epochs=1, num_sanity_val_steps=1
    )
    assert trainer.state.finished
    assert called == ["sanity", "teardown"]
    assert not (tmp_path / "saved").exists()
    assert (fit.batch_size, fit.recommended, fit.accumulate) == (19, 12, 2)
    lines = capsys.readouterr().out.splitlines()
    assert "data: {batch_size: 12}" in lines
    assert "trainer: {accumulate_grad_batches: 2}  # effective batch 24" in lines
    assert "largest batch 19; 18 with a margin of 5%" in lines
    assert "     16     8.00  fits" in lines
    assert "     32        -  out of memory" in lines


def test_the_lines_say_what_cannot_be_reached(tmp_path, capsys):
    meter = FakeMeter()
    run(tmp_path, Net(meter), make(meter, budget_gb=12.0, effective_batch=23, then="stop"))
    assert "effective batch 23: not reachable with batches near that; closest is 24" in capsys.readouterr().out
    run(tmp_path, Net(meter), make(meter, budget_gb=12.0, then="stop"), accumulate_grad_batches=1)
    out = capsys.readouterr().out
    assert "more than the effective batch of 8; a larger one wants another learning rate" in out
    assert "trainer: {accumulate_grad_batches: 1}  # effective batch 8" in out
    loader = DataLoader(Samples(), batch_size=8)
    run(tmp_path, Net(meter), make(meter, budget_gb=12.0, then="stop"), loaders=loader, accumulate_grad_batches=3)
    out = capsys.readouterr().out
    assert "# batch_size of the training DataLoader: 12" in out
    assert "trainer: {accumulate_grad_batches: 2}  # effective batch 24" in out


@pytest.mark.parametrize("holder", ["attribute", "hparams"])
def test_apply_trains_with_the_proposal(tmp_path, holder):
    class InHparams(LightningDataModule):
        def __init__(self, batch_size=8):
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self):
            return DataLoader(Samples(), batch_size=self.hparams["batch_size"], shuffle=True)

    meter = FakeMeter()
    fit = make(meter, budget_gb=21.0, effective_batch=32, then="apply")
    module = Net(meter)
    data = Data() if holder == "attribute" else InHparams()
    with pytest.warns(UserWarning, match="an epoch has 2 optimizer steps now; schedules were made for 8"):
        trainer = run(tmp_path, module, fit, data=data, epochs=1)
    assert (fit.batch_size, fit.recommended, fit.accumulate) == (21, 16, 2)
    assert module.seen == [16] * 4
    assert trainer.global_step == 2


def test_apply_keeps_quiet_about_a_schedule_that_stays(tmp_path):
    meter = FakeMeter()
    module = Net(meter)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", module="lightning")
        trainer = run(
            tmp_path,
            module,
            make(meter, budget_gb=21.0, then="apply"),
            data=Data(n=64),
            epochs=1,
            accumulate_grad_batches=4,
        )
    assert module.seen == [16] * 4
    assert trainer.global_step == 2


def test_apply_needs_a_batch_size_to_set(tmp_path):
    loader = DataLoader(Samples(), batch_size=8)
    with pytest.raises(MisconfigurationException, match=r"then expected stop or continue .* got apply"):
        run(tmp_path, Net(), make(FakeMeter(), then="apply"), loaders=loader)

    class Deaf(Data):
        def train_dataloader(self):
            return DataLoader(Samples(), batch_size=8)

    meter = FakeMeter()
    with pytest.raises(MisconfigurationException, match="expected to use batch_size 4, got 8"):
        run(tmp_path, Net(meter), make(meter, budget_gb=5.0, then="apply"), data=Deaf())


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("budget_gb", 0.0),
        ("budget_share", 0.0),
        ("budget_share", 1.1),
        ("effective_batch", 0),
        ("max_batch", 0),
        ("steps", 1),
        ("scan_batches", 0),
        ("margin", 1.0),
        ("then", "maybe"),
    ],
)
def test_bad_arguments(name, value):
    with pytest.raises(MisconfigurationException, match=rf"BatchSizeFit: {name} expected .*, got {value}$"):
        BatchSizeFit(**{name: value})
    with pytest.raises(MisconfigurationException, match="propose"):
        propose(0, 8)


def test_a_budget_beyond_the_card_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"budget_gb expected at most the card's 8\.0, got 9"):
        run(tmp_path, Net(), make(FakeMeter(total=8.0), budget_gb=9.0))


def test_without_cuda_it_does_nothing(tmp_path, caplog):
    fit = BatchSizeFit()
    with caplog.at_level("INFO"):
        trainer = run(tmp_path, Net(), fit, epochs=1)
    assert trainer.global_step == 8
    assert fit.batch_size is None
    trainer = run(tmp_path, Net(), make(FakeMeter(), then="stop"), fast_dev_run=True)
    assert trainer.global_step == 1


def test_several_devices_and_loaders_are_refused(tmp_path):
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    with pytest.raises(MisconfigurationException, match="devices expected 1, got 2"):
        BatchSizeFit().setup(trainer, Net(), "fit")
    loaders = {"a": DataLoader(Samples(), batch_size=8), "b": DataLoader(Samples(), batch_size=4)}
    with pytest.raises(MisconfigurationException, match="training loaders expected 1, got 2"):
        run(tmp_path, Net(), make(FakeMeter()), loaders=loaders)

    class Own(Net):
        def training_step(self, dataloader_iter):
            return None

    with pytest.raises(MisconfigurationException, match="expected a batch, got dataloader_iter"):
        run(tmp_path, Own(), make(FakeMeter()))


def test_the_command_line_builds_it():
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(BatchSizeFit, "fit")
    made = parser.parse_args(["--fit.budget_gb=7.5", "--fit.effective_batch=24", "--fit.then=apply"])
    assert parser.instantiate(made).fit.budget_gb == 7.5


# ---- on a GPU --------------------------------------------------------------------------------------------------------


class Convolutions(LightningModule):
    def __init__(self):
        super().__init__()
        first = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()
        self.net = nn.Sequential(*first, nn.Conv2d(16, 4, 3, padding=1))

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.001)


class Held(Callback):
    """What the process holds when training begins."""

    def on_train_epoch_start(self, trainer, pl_module):
        self.reserved = torch.cuda.memory_reserved()


class Images(Dataset):
    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return torch.full((3, 128, 128), float(i % 7))


def train_on_gpu(tmp_path, batch, *callbacks, budget_gb=None):
    """A few steps, on a card that has only so much."""
    total = torch.cuda.get_device_properties(0).total_memory
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0 if budget_gb is None else budget_gb * GB / total)
    try:
        seed_everything(0, verbose=False)
        module = Convolutions()
        loader = DataLoader(Images(4096), batch_size=batch)
        options = {"accelerator": "gpu", "devices": 1, "precision": "16-mixed", "limit_train_batches": 3}
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False):
            run(tmp_path, module, *callbacks, loaders=loader, epochs=1, **options)
        return {k: v.cpu() for k, v in module.state_dict().items()}
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("budget_gb", [1.0, 2.5])
def test_on_a_gpu_what_fits_trains_and_a_third_more_does_not(tmp_path, budget_gb):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    fit = BatchSizeFit(budget_gb=budget_gb, then="continue")
    held = Held()
    assert equal(train_on_gpu(tmp_path, 8, held, fit), train_on_gpu(tmp_path, 8))
    assert held.reserved < 128 * 2**20  # what libraries keep as workspace
    assert torch.cuda.get_per_process_memory_fraction() == 1.0
    assert 16 < fit.batch_size < 4096
    assert all(p.gb <= budget_gb for p in fit.table if p.fits)
    assert any(p.note == "out of memory" for p in fit.table)
    usable = int(fit.batch_size * (1 - fit.margin))  # the margin is for fragments
    train_on_gpu(tmp_path, usable, budget_gb=budget_gb)
    with pytest.raises(torch.OutOfMemoryError):
        train_on_gpu(tmp_path, int(1.3 * fit.batch_size), budget_gb=budget_gb)
