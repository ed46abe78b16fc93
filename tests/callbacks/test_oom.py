"""Split batches against whole ones."""

import dataclasses
import errno
import warnings
import weakref
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lit_callbacks.graceful import GracefulStop, report_of
from lit_callbacks.oom import OOMGuard, is_out_of_memory, release_memory, same_effective_batch, split_batch
from torch import nn
from torch.utils.data import DataLoader

N, BATCH = 21, 5  # four batches of 5 and one of 1
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True).sin()
OOM = "CUDA out of memory. Tried to allocate 2 GiB"


class Net(LightningModule):
    """Its passes fail for more than `room` samples, from a batch on."""

    def __init__(self, room=100, after=0, where="forward", output="tensor", norm=False, dropout=0.0):
        super().__init__()
        layers = [nn.Linear(4, 8), nn.BatchNorm1d(8) if norm else nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1)]
        self.net = nn.Sequential(*layers)
        self.room, self.after, self.where, self.output = room, after, where, output
        self.sizes, self.logged_by_hand = [], []

    def _tight(self, samples):
        return self.trainer.fit_loop.total_batch_idx >= self.after and samples > self.room

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.sizes.append(len(x))
        if self.where == "forward" and self._tight(len(x)):
            raise torch.OutOfMemoryError(OOM)
        hidden = self.net(x)
        if self.where == "backward" and self._tight(len(x)):
            hidden = Fails.apply(hidden)
        loss = nn.functional.mse_loss(hidden, y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"worst": (hidden - y).abs().amax(), "n": 1.0}, reduce_fx="max", on_step=False, on_epoch=True)
        return {"loss": loss, "extra": 1} if self.output == "dict" else loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Fails(torch.autograd.Function):
    """Passes gradients to a part of the network, then runs out of memory."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *gradients):
        raise torch.OutOfMemoryError(OOM)


class Outputs(Callback):
    def __init__(self):
        self.losses, self.logged, self.norms = [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.norms.append(torch.stack([p.grad.norm() for p in pl_module.parameters()]))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        self.logged.append(float(trainer.callback_metrics.get("loss_step", "nan")))


def fit(net, guard, *callbacks, folder=None, ckpt_path=None, **options):
    torch.manual_seed(0)
    for layer in net.net:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    outputs = Outputs()
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*([guard] if guard else []), outputs, *callbacks],
        **{"max_epochs": 2, "gradient_clip_val": 0.5, **options},
    )
    trainer.error = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(net, DataLoader(list(zip(X, Y, strict=True)), batch_size=BATCH), ckpt_path=ckpt_path)
        except Exception as error:
            trainer.error = error
    trainer.said = [str(w.message) for w in caught if "OOMGuard" in str(w.message)]
    return trainer, outputs


def same(net, outputs, expected, reference):
    for a, b in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    torch.testing.assert_close(outputs.norms, reference.norms, rtol=1e-5, atol=1e-6)
    assert outputs.losses == pytest.approx(reference.losses, rel=1e-5)
    assert outputs.logged == pytest.approx(reference.logged, rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize("output", ["tensor", "dict"])
def test_parts_are_the_whole(accumulate, parts, output):
    """Gradients, weights, and what is logged."""
    expected, net, guard = Net(output=output), Net(output=output), OOMGuard()
    whole, reference = fit(expected, None, accumulate_grad_batches=accumulate)
    guard.parts = parts
    trainer, outputs = fit(net, guard, accumulate_grad_batches=accumulate)
    assert trainer.error is None
    assert trainer.said == []
    assert max(net.sizes) == -(-BATCH // parts)
    same(net, outputs, expected, reference)
    for key in ("loss_epoch", "worst", "n"):
        assert float(trainer.callback_metrics[key]) == pytest.approx(float(whole.callback_metrics[key]), rel=1e-5)
    assert "training_step" not in net.__dict__
    assert "backward" not in net.__dict__
    assert "log" not in net.__dict__


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("room", [3, 2, 1])
def test_a_run_goes_on_where_memory_was_too_small(where, room):
    expected, net, guard = Net(), Net(room=room, after=3, where=where), OOMGuard()
    whole, reference = fit(expected, None)
    trainer, outputs = fit(net, guard)
    assert trainer.error is None
    assert trainer.global_step == whole.global_step
    assert guard.parts == {3: 2, 2: 4, 1: 8}[room]
    assert len(trainer.said) == {3: 1, 2: 2, 1: 3}[room]
    assert "the effective batch stays 5 x 1" in trainer.said[-1]
    same(net, outputs, expected, reference)
    assert float(trainer.callback_metrics["loss_epoch"]) == pytest.approx(
        float(whole.callback_metrics["loss_epoch"]), rel=1e-5
    )


def test_an_error_in_the_forward_pass_spoils_no_window():
    expected, net = Net(), Net(room=2, after=4)
    _, reference = fit(expected, None, accumulate_grad_batches=3)
    trainer, outputs = fit(net, OOMGuard(), accumulate_grad_batches=3)
    assert trainer.error is None
    same(net, outputs, expected, reference)


def test_an_error_in_the_forward_pass_of_a_later_part():
    expected, net, guard = Net(), Net(), OOMGuard()
    _, reference = fit(expected, None)

    def training_step(batch, batch_idx, step=net.training_step):
        if len(batch[0]) == 2 and bool((batch[0] == X[18:20]).all()):
            raise torch.OutOfMemoryError(OOM)
        return step(batch, batch_idx)

    net.training_step = training_step
    guard.parts = 2
    trainer, outputs = fit(net, guard)
    assert trainer.error is None
    assert guard.parts == 4
    same(net, outputs, expected, reference)
    assert net.__dict__["training_step"] is training_step  # the module's own, as it was


def test_lost_gradients_of_a_window_end_the_run_and_a_resumed_one_starts_split(tmp_path):
    expected = Net()
    whole, reference = fit(expected, None, accumulate_grad_batches=3)
    net, guard = Net(room=3, after=6, where="backward"), OOMGuard()  # the second of three batches
    trainer, _ = fit(net, guard, GracefulStop(), folder=tmp_path, accumulate_grad_batches=3)
    assert isinstance(trainer.error, torch.OutOfMemoryError)
    assert "earlier batches of the accumulation window" in trainer.error.__notes__[0]
    assert "OOMGuard goes on with 2 parts per batch" in report_of(trainer.error)
    (path,) = tmp_path.rglob("interrupted.ckpt")
    net, guard = Net(room=3, where="backward"), OOMGuard()
    again, outputs = fit(net, guard, folder=tmp_path, accumulate_grad_batches=3, ckpt_path=str(path))
    assert again.error is None
    assert guard.parts == 2
    assert again.global_step == whole.global_step
    for a, b in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert outputs.losses == pytest.approx(reference.losses[-len(outputs.losses) :], rel=1e-5)


def test_no_more_parts_than_allowed_or_samples():
    net, guard = Net(room=1), OOMGuard(max_parts=2)
    trainer, _ = fit(net, guard)
    assert isinstance(trainer.error, torch.OutOfMemoryError)
    net, guard = Net(room=0), OOMGuard(max_parts=64)
    trainer, _ = fit(net, guard)
    assert isinstance(trainer.error, torch.OutOfMemoryError)
    assert guard.parts == 8
    assert "training_step" not in net.__dict__


def test_other_errors_pass():
    net = Net()
    net.training_step = lambda batch, batch_idx: 1 / 0
    trainer, _ = fit(net, OOMGuard())
    assert isinstance(trainer.error, ZeroDivisionError)


def test_batch_norm_is_mentioned():
    trainer, _ = fit(Net(room=4, norm=True), OOMGuard(), limit_train_batches=4)
    assert "BatchNorm normalises over 2 samples at a time." in trainer.said[0]


def test_dropout_of_a_repeated_batch_starts_from_the_same_state():
    runs = []
    for net in (Net(dropout=0.5), Net(dropout=0.5, room=3, where="backward")):
        guard = OOMGuard()
        guard.parts = 2 if net.room > 5 else 1
        trainer, outputs = fit(net, guard, max_epochs=1)
        assert trainer.error is None
        runs.append(outputs.losses)
    assert runs[0] == runs[1]


def test_a_part_without_a_loss_is_left_out():
    net, guard = Net(), OOMGuard()
    seen = []

    def training_step(batch, batch_idx, step=net.training_step):
        seen.append(len(batch[0]))
        return None if len(batch[0]) == 3 else step(batch, batch_idx)

    net.training_step = training_step
    guard.parts = 2
    trainer, outputs = fit(net, guard, max_epochs=1, limit_train_batches=1)
    assert trainer.error is None
    assert seen == [3, 2]
    assert outputs.losses == pytest.approx([0.4 * outputs.logged[0]])


def test_gradient_scaler():
    """Its factor reaches every part. In bf16, where the parts of a sum round differently."""
    runs = []
    for parts in (1, 2):
        net, guard = Net(), OOMGuard()
        guard.parts = parts
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        trainer, outputs = fit(net, guard, plugins=[plugin], accumulate_grad_batches=2)
        assert trainer.error is None
        assert scaler.get_scale() == 1024.0
        runs.append((outputs.losses, outputs.norms))
    assert runs[1][0] == pytest.approx(runs[0][0], rel=2e-2)
    torch.testing.assert_close(runs[1][1], runs[0][1], rtol=5e-2, atol=1e-2)


def test_an_own_backward_is_called():
    net, calls = Net(), []

    def backward(loss, *args, **kwargs):
        calls.append(float(loss.detach()))
        loss.backward(*args, **kwargs)

    net.backward = backward
    guard = OOMGuard()
    guard.parts = 2
    trainer, _ = fit(net, guard, max_epochs=1, limit_train_batches=1)
    assert trainer.error is None
    assert len(calls) == 2
    assert net.__dict__["backward"] is backward


def test_what_is_refused(tmp_path):
    class Manual(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    trainer, _ = fit(Manual(), OOMGuard(), gradient_clip_val=None)
    assert "OOMGuard: automatic_optimization expected True" in str(trainer.error)
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp_spawn", logger=False, default_root_dir=tmp_path)
    with pytest.raises(MisconfigurationException, match="OOMGuard: devices expected 1, got 2 processes"):
        OOMGuard().setup(trainer, Net(), "fit")
    OOMGuard(enabled=False).setup(trainer, Net(), "fit")
    with pytest.raises(MisconfigurationException, match="OOMGuard: max_parts expected at least 2, got 1"):
        OOMGuard(max_parts=1)


def test_disabled_does_nothing():
    net, guard = Net(room=1), OOMGuard(enabled=False)
    trainer, _ = fit(net, guard)
    assert isinstance(trainer.error, torch.OutOfMemoryError)
    assert guard.state_dict() == {}


def test_the_state_is_capped():
    guard = OOMGuard(max_parts=4)
    guard.load_state_dict({"parts": 8})
    assert guard.parts == 4


# ------------------------------------------------------------------ memory


def test_the_failed_attempt_is_freed_before_the_next():
    """Activations of the attempt that failed must not be alive while the parts run."""
    alive = []

    class Keeps(Net):
        def training_step(self, batch, batch_idx):
            if alive and len(batch[0]) < BATCH:
                alive.append(alive[0]() is None)
            hidden = self.net(batch[0])
            if len(batch[0]) == BATCH:
                alive.append(weakref.ref(hidden))
                hidden = Fails.apply(hidden)
            return nn.functional.mse_loss(hidden, batch[1])

    trainer, _ = fit(Keeps(), OOMGuard(), max_epochs=1, limit_train_batches=1)
    assert trainer.error is None
    assert alive[1:] == [True, True]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(OOM),
        MemoryError(),
        RuntimeError(OOM),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:75] DefaultCPUAllocator: can't allocate memory"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=str,
)
def test_what_is_out_of_memory(error):
    assert is_out_of_memory(error)


def test_what_is_not_out_of_memory():
    assert not is_out_of_memory(OSError(errno.ENOSPC, "No space left on device"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_release_memory_follows_the_chain():
    class Held:
        pass

    refs = []

    def inner():
        held = Held()
        refs.append(weakref.ref(held))
        raise ValueError

    def outer():
        held = Held()
        refs.append(weakref.ref(held))
        try:
            inner()
        except ValueError as error:
            raise RuntimeError from error

    try:
        outer()
    except RuntimeError as error:
        assert all(ref() is not None for ref in refs)
        release_memory(error)
        assert all(ref() is None for ref in refs)


@pytest.mark.parametrize(
    ("size", "accumulate", "after"),
    [(10, 1, "batch_size 5 x accumulate_grad_batches 2"), (9, 2, "batch_size 3 x accumulate_grad_batches 6")],
)
def test_advice(size, accumulate, after):
    assert same_effective_batch(size, accumulate).endswith(f"-> {after}")


def test_advice_for_one_sample():
    assert "cannot be split further" in same_effective_batch(1, 4)


# ------------------------------------------------------------------ splitting


class Pair(NamedTuple):
    image: torch.Tensor
    seed: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Sample:
    image: torch.Tensor
    names: list
    scale: float


def test_splitting_finds_everything():
    image, boxes = torch.arange(10).view(5, 2), [torch.zeros(i, 4) for i in range(5)]
    batch = {
        "pair": Pair(image, torch.tensor(7)),
        "boxes": boxes,
        "sample": Sample(image, list("abcde"), 2.0),
        "both": [image, image + 1],
        "ids": (1, 2, 3, 4, 5),
        "table": torch.zeros(3),
        "name": "abcde",
    }
    parts = split_batch(batch, 2)
    assert [n for _, n in parts] == [3, 2]
    for (part, n), rows in zip(parts, (slice(0, 3), slice(3, 5)), strict=True):
        assert type(part["pair"]) is Pair
        assert torch.equal(part["pair"].image, image[rows])
        assert part["pair"].image.data_ptr() == image[rows].data_ptr()  # a view
        assert part["pair"].seed == 7
        assert [len(b) for b in part["boxes"]] == list(range(5))[rows]
        assert torch.equal(part["sample"].image, image[rows])
        assert part["sample"].names == list("abcde")[rows]
        assert part["sample"].scale == 2.0
        assert [len(t) for t in part["both"]] == [n, n]
        assert part["ids"] == (1, 2, 3, 4, 5)[rows]
        assert part["table"] is batch["table"]
        assert part["name"] == "abcde"


@pytest.mark.parametrize(
    ("length", "parts", "sizes"), [(5, 8, [1] * 5), (7, 4, [2, 2, 2, 1]), (8, 2, [4, 4]), (3, 1, [3])]
)
def test_sizes(length, parts, sizes):
    pieces = split_batch(torch.arange(length), parts)
    assert [n for _, n in pieces] == sizes
    assert torch.equal(torch.cat([p for p, _ in pieces]), torch.arange(length))


def test_a_batch_without_a_length():
    with pytest.raises(MisconfigurationException, match="batch expected tensors with a batch dimension, got int"):
        split_batch(3, 2)
