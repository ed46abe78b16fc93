"""Several optimizer steps from a batch: one by one they are the same to the last bit, as a graph nearly the same."""

import copy
import math
import os
import signal

import pytest
import torch
from lightning.pytorch import Callback
from lit_callbacks import EMA, GracefulStop
from torch import nn

from lit_cli.errors import InputError
from lit_common.schedule import warmup_cosine
from lit_patchnerf.rollback import RollBack
from lit_patchnerf.steps import OptimizerSteps, interrupts_wait
from tests.patchnerf.tiny import SaveAt, Watch, fit, make_data, make_model, same, weights

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
OPTIMIZERS = ["adamw", "adan", "muon"]


def train(folder, together=1, *callbacks, data=None, ckpt_path=None, model=None, **options):
    """Two epochs of six steps, by default on the CPU: the module, the Trainer and what was seen."""
    watch = Watch()
    module = make_model(**{"lr": 3e-3, "weight_decay": 0.01, **(model or {})})
    data = make_data(steps_per_batch=together, **(data or {}))
    options = {"max_epochs": 2, **options}
    trainer = fit(folder, module, watch, *callbacks, data=data, ckpt_path=ckpt_path, **options)
    return module, trainer, watch


def states(trainer):
    """All tensors of the optimizer, on the CPU."""
    found = trainer.optimizers[0].state_dict()["state"]
    return {f"{i} {name}": torch.as_tensor(value).cpu() for i, own in found.items() for name, value in own.items()}


# ---- on the CPU, to the last bit -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_three_steps_of_a_batch_are_three_batches(tmp_path, name):
    options = {"model": {"optimizer": name, "clip_start": 0.5}, "data": {"embeddings": "toy:8"}}
    one, three = (train(tmp_path, together, **options) for together in (1, 3))
    assert same(weights(one[0]), weights(three[0]))
    assert same(states(one[1]), states(three[1]))
    assert one[2].steps == list(range(1, 13))
    assert three[2].steps == [3, 6, 9, 12]
    assert three[2].losses == pytest.approx([sum(one[2].losses[i : i + 3]) / 3 for i in range(0, 12, 3)], rel=1e-5)
    assert float(one[1].callback_metrics["train/clip"]) > 0
    # The rate that a batch begins with is that of its first step.
    assert three[2].rates == pytest.approx(one[2].rates[::3], rel=1e-12)
    schedulers = [trainer.lr_scheduler_configs[0].scheduler for _, trainer, _ in (one, three)]
    assert schedulers[0].last_epoch == schedulers[1].last_epoch == 12
    assert schedulers[0].get_last_lr() == pytest.approx(schedulers[1].get_last_lr())


@pytest.mark.parametrize(("size", "drop_last", "steps"), [(8, True, 6), (9, True, 5), (9, False, 6)])
def test_a_last_batch_of_fewer_steps(tmp_path, size, drop_last, steps):
    data = {"batch_size": size, "drop_last": drop_last}
    one, ragged = train(tmp_path, data=data), train(tmp_path, 4, data=data)
    assert ragged[2].steps == [4, steps, steps + 4, 2 * steps]
    assert same(weights(one[0]), weights(ragged[0]))
    firsts = [one[2].rates[n] for n in (0, 4, steps, steps + 4)]
    assert ragged[2].rates == pytest.approx(firsts, rel=1e-12)


def test_clipping_is_that_of_the_trainer(tmp_path):
    one = train(tmp_path, gradient_clip_val=0.02)
    three = train(tmp_path, 3, model={"gradient_clip": 0.02})
    free = train(tmp_path, 3)
    assert same(weights(one[0]), weights(three[0]))
    assert not same(weights(free[0]), weights(three[0]))


@pytest.mark.parametrize(("together", "name"), [(1, "adamw"), *((3, name) for name in OPTIMIZERS)])
def test_resume_in_the_middle_of_an_epoch(tmp_path, together, name):
    options = {"model": {"optimizer": name, "clip_start": 0.5}, "data": {"embeddings": "toy:8"}}
    whole = train(tmp_path, together, SaveAt(9, tmp_path / "nine.ckpt"), **options)
    rest = train(tmp_path, together, ckpt_path=tmp_path / "nine.ckpt", **options)
    assert rest[2].steps == [step for step in whole[2].steps if step > 9]
    assert rest[2].losses == whole[2].losses[-len(rest[2].losses) :]
    assert same(weights(whole[0]), weights(rest[0]))
    assert same(states(whole[1]), states(rest[1]))


class InterruptAfter(Callback):
    """Ctrl-C behind an optimizer step, which need not be the last one of its batch."""

    def __init__(self, step: int) -> None:
        self.step, self.seen = step, 0

    def on_train_start(self, trainer, pl_module):
        trainer.optimizers[0].register_step_post_hook(self.count)

    def count(self, *_):
        self.seen += 1
        if self.seen == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def ctrl_c():
    """As in a shell; jobs in its background ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_interrupt_between_the_steps_of_a_batch(tmp_path, name, ctrl_c):
    """The checkpoint is that of the last whole batch, and the run goes on from it to the last bit."""
    options = {"model": {"optimizer": name}}
    whole = train(tmp_path, 3, **options)
    stop = GracefulStop(dirpath=tmp_path)
    with pytest.raises(SystemExit):
        train(tmp_path, 3, InterruptAfter(8), stop, **options)
    assert stop.path is not None
    assert torch.load(stop.path, weights_only=True)["global_step"] == 6
    rest = train(tmp_path, 3, ckpt_path=stop.path, **options)
    assert rest[2].steps == [9, 12]
    assert same(weights(whole[0]), weights(rest[0]))
    assert same(states(whole[1]), states(rest[1]))


def test_an_interrupt_waits_for_the_end_of_a_block(ctrl_c):
    def block(times, wanted=True, error=None):
        done = []
        try:
            with interrupts_wait(wanted):
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)
                    done.append(1)
                if error is not None:
                    raise error
        except (KeyboardInterrupt, ZeroDivisionError) as ending:
            done.append(type(ending))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        return done

    assert block(1) == [1, KeyboardInterrupt]
    assert block(2) == [1, KeyboardInterrupt], "the second one does not wait"
    assert block(1, wanted=False) == [KeyboardInterrupt]
    assert block(1, error=ZeroDivisionError()) == [1, ZeroDivisionError]
    assert block(0) == []
    noted = []
    signal.signal(signal.SIGINT, lambda *_: noted.append(1))
    with interrupts_wait():
        signal.raise_signal(signal.SIGINT)
        assert noted == [1], "another handler is left alone"


def test_another_number_of_steps_in_the_middle_of_an_epoch_is_refused(tmp_path):
    train(tmp_path, 3, SaveAt(9, tmp_path / "nine.ckpt"))
    with pytest.raises(InputError, match=r"data.steps_per_batch is 1, expected 3: the checkpoint lies inside an epoch"):
        train(tmp_path, 1, ckpt_path=tmp_path / "nine.ckpt")


def test_clipping_is_refused_where_it_would_do_nothing(tmp_path):
    with pytest.raises(InputError, match=r"model.gradient_clip: expected trainer.gradient_clip_val"):
        train(tmp_path, 1, model={"gradient_clip": 1.0})


class Ended(Callback):
    """A checkpoint after the first epoch."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(("first", "then"), [(1, 3), (3, 1)])
def test_another_number_of_steps_from_the_end_of_an_epoch_on(tmp_path, first, then):
    whole = train(tmp_path, first, Ended(tmp_path / "end.ckpt"))
    rest = train(tmp_path, then, ckpt_path=tmp_path / "end.ckpt")
    assert (rest[1].global_step, rest[2].steps[0]) == (12, 6 + then)
    assert same(weights(whole[0]), weights(rest[0]))


@pytest.mark.parametrize(
    ("limits", "steps"),
    [({"max_steps": 6, "max_epochs": -1}, 6), ({"max_steps": 9}, 9), ({"max_steps": 8}, 8), ({"max_steps": 1}, 1)],
)
def test_max_steps_counts_optimizer_steps(tmp_path, limits, steps):
    one, three = (train(tmp_path, together, **limits) for together in (1, 3))
    assert one[1].global_step == three[1].global_step == steps
    assert same(weights(one[0]), weights(three[0]))
    assert one[2].rates == pytest.approx([3e-3 * warmup_cosine((n + 1) / steps, 0.1, 0.0) for n in range(steps)])


def test_the_schedule_is_of_optimizer_steps_whatever_ends_the_run_first(tmp_path):
    """Batches are fewer than steps, and `max_steps` is beyond the epochs; or an epoch is cut short."""
    three = train(tmp_path, 3, max_steps=1000)
    assert three[2].rates == pytest.approx([3e-3 * warmup_cosine(step / 12, 0.1, 0.0) for step in (1, 4, 7, 10)])
    cut = train(tmp_path, 4, limit_train_batches=1)
    assert cut[2].rates == pytest.approx([3e-3 * warmup_cosine(step / 8, 0.1, 0.0) for step in (1, 5)])


def test_a_collapse_within_steps_goes_back(tmp_path):
    class Spoil(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 1:
                for p in pl_module.parameters():
                    p.detach().fill_(math.nan)

    with pytest.warns(UserWarning, match="collapsed in epoch 1"):
        module, _, watch = train(tmp_path, 3, Spoil(), RollBack(key="pixels"), max_epochs=3)
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    assert watch.steps == [3, 6, 9, 12, 15, 18]
    expected = [3e-3 * warmup_cosine(step / 18, 0.1, 0.0) for step in (1, 4, 7, 10, 13, 16)]
    assert watch.rates == pytest.approx([*expected[:4], expected[4] / 2, expected[5] / 2])


def test_steps_by_themselves():
    """Against a loop, with two groups and a clipped gradient."""
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 2)])
    twin = copy.deepcopy(net)

    def terms(module):
        def error(x, y):
            loss = (module[1](module[0](x).tanh()) - y).square().mean()
            return torch.stack([loss, y.mean()])

        return error

    def optimizer(module):
        groups = [{"params": list(part.parameters()), "lr": lr} for part, lr in zip(module, (0.1, 0.01), strict=True)]
        return torch.optim.AdamW([{**group, "initial_lr": group["lr"]} for group in groups])

    x, y, factors = torch.randn(5, 6, 3), torch.randn(5, 6, 2), [1.0, 0.5, 0.25, 0.0, 2.0]
    steps = OptimizerSteps(terms(net), optimizer(net), list(net.parameters()), clip=0.3)
    found = steps(x, y, factors=factors)
    loop, losses = optimizer(twin), []
    for k, factor in enumerate(factors):
        for group, lr in zip(loop.param_groups, (0.1, 0.01), strict=True):
            group["lr"] = lr * factor
        losses.append(terms(twin)(x[k], y[k]))
        loop.zero_grad()
        losses[-1][0].backward()
        assert nn.utils.clip_grad_norm_(twin.parameters(), 0.3) > 0.3
        loop.step()
    assert same(weights_of(net), weights_of(twin))
    torch.testing.assert_close(found, torch.stack(losses).mean(0).detach())
    assert not found.requires_grad


def weights_of(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


# ---- on a GPU, as a graph --------------------------------------------------------------------------------------------


def on_gpu(folder, together, graph, *callbacks, model=None, **options):
    model = {"cuda_graph": graph, **(model or {})}
    return train(folder, together, *callbacks, model=model, accelerator="gpu", devices=1, **options)


def close(a, b, tolerance=2e-3):
    for (name, x), (_, y) in zip(weights(a[0]).items(), weights(b[0]).items(), strict=True):
        torch.testing.assert_close(x.cpu(), y.cpu(), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def exact():
    """Without TF32, whose choice of kernels may differ."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("offload", [False, True])
def test_captured_as_eager(tmp_path, exact, name, offload):
    """Schedule, embeddings from the middle on, clipping and an average included."""
    found = []
    for graph in (False, True):
        ema = EMA(decay=0.9, warmup=False, offload=offload)
        options = {"model": {"optimizer": name, "clip_start": 0.5, "clip_ramp": 0.2, "gradient_clip": 0.05}}
        run = on_gpu(tmp_path, 3, graph, ema, data={"embeddings": "toy:8"}, max_epochs=3, **options)
        found.append(run)
    eager, captured = found
    close(eager, captured)  # the averages, after a fit
    assert captured[2].steps == eager[2].steps
    assert captured[2].rates == pytest.approx(eager[2].rates, rel=1e-5)
    assert captured[2].losses == pytest.approx(eager[2].losses, rel=1e-2)
    for key, value in states(eager[1]).items():
        if key.endswith("step"):
            assert float(states(captured[1])[key]) == float(value)


@pytest.mark.gpu
@gpu
def test_a_graph_of_one_step(tmp_path, exact):
    close(on_gpu(tmp_path, 3, True), on_gpu(tmp_path, 1, True))


@pytest.mark.gpu
@gpu
def test_more_shapes_than_graphs_run_eagerly(exact):
    """Against the same steps without a graph."""
    torch.manual_seed(0)
    nets = [nn.Linear(3, 2).cuda()]
    nets.append(copy.deepcopy(nets[0]))
    x, makers = torch.randn(8, 4, 3, device="cuda"), []
    for capture, net in zip((False, True), nets, strict=True):
        lr = torch.tensor(0.01, device="cuda")
        groups = [{"params": list(net.parameters()), "lr": lr, "initial_lr": 0.01}]
        optimizer = torch.optim.AdamW(groups, capturable=True)
        terms = lambda x, net=net: net(x).square().mean()[None]  # noqa: E731
        makers.append(OptimizerSteps(terms, optimizer, list(net.parameters()), capture=capture))
    for count in (1, 2, 3, 4, 5, 6, 5, 2, 1):
        found = [steps(x[:count], factors=[1.0 / (k + 1) for k in range(count)]).clone() for steps in makers]
        torch.testing.assert_close(*found)
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@gpu
def test_captured_on_the_gpu_as_eager_on_the_cpu(tmp_path, exact):
    close(train(tmp_path, 3), on_gpu(tmp_path, 3, True), 5e-3)


@pytest.mark.gpu
@gpu
def test_a_graph_follows_a_roll_back(tmp_path, exact):
    class Spoil(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 1:
                for p in pl_module.parameters():
                    p.detach().fill_(math.nan)

    found = []
    for graph in (False, True):
        with pytest.warns(UserWarning, match="collapsed in epoch 1"):
            found.append(on_gpu(tmp_path, 3, graph, Spoil(), RollBack(key="pixels"), max_epochs=4))
    close(*found)
    assert found[1][2].rates == pytest.approx(found[0][2].rates, rel=1e-5)
    assert found[1][2].losses[-1] == pytest.approx(found[0][2].losses[-1], rel=1e-2)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("first", ["gpu", "cpu"])
def test_resume_on_another_device(tmp_path, exact, first):
    whole = on_gpu(tmp_path, 3, True)
    save = SaveAt(9, tmp_path / "nine.ckpt")
    if first == "gpu":
        on_gpu(tmp_path, 3, True, save)
        rest = train(tmp_path, 3, ckpt_path=tmp_path / "nine.ckpt")
    else:
        train(tmp_path, 3, save)
        rest = on_gpu(tmp_path, 3, True, ckpt_path=tmp_path / "nine.ckpt")
    assert rest[2].steps == [12]
    close(whole, rest, 5e-3)


@pytest.mark.gpu
@gpu
def test_resume_of_a_captured_run(tmp_path, exact):
    whole = on_gpu(tmp_path, 3, True, SaveAt(9, tmp_path / "nine.ckpt"))
    close(whole, on_gpu(tmp_path, 3, True, ckpt_path=tmp_path / "nine.ckpt"))


@pytest.mark.gpu
@gpu
def test_a_ragged_batch(tmp_path, exact):
    """Four steps and two, three times."""
    eager, captured = (on_gpu(tmp_path, 4, graph, max_epochs=3) for graph in (False, True))
    assert captured[2].steps == [4, 6, 10, 12, 16, 18]
    close(eager, captured)


@pytest.mark.gpu
@gpu
def test_rounding_that_begins_is_captured_anew(tmp_path, exact):
    options = {"model": {"qat_bits": 4, "qat_start": 0.5}}
    close(*(on_gpu(tmp_path, 3, graph, **options) for graph in (False, True)), 2e-2)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("options", [{}, {"qat_bits": 6}, {"mode": "coordinate"}, {"decoder": {"atlas_stages": [1]}}])
def test_compiled_and_captured(tmp_path, exact, options):
    eager = on_gpu(tmp_path, 3, False, model=options)
    close(eager, on_gpu(tmp_path, 3, True, model={"compile": True, **options}), 2e-2)


@pytest.mark.gpu
@gpu
def test_bfloat16_is_captured_with_fresh_casts(tmp_path, exact):
    """A cast of the weights that a capture kept would let every replay see those of before."""
    eager, captured = (on_gpu(tmp_path, 3, graph, precision="bf16-mixed", max_epochs=4) for graph in (False, True))
    close(eager, captured, 2e-2)
    assert captured[2].losses[-1] < captured[2].losses[0]


@pytest.mark.gpu
@gpu
@pytest.mark.filterwarnings("ignore:data.data_split. 1_1_1 holds out none")
@pytest.mark.parametrize("atlas_stages", [[], [4]])
def test_whole_frames_of_a_real_size_are_learned_alike(tmp_path, atlas_stages):
    """The losses of a profile's own steps: bfloat16, Muon with a rate of its own, kernels that take workspaces."""
    scene = {"frames": 12, "height": 320, "width": 640, "shapes": 4}
    data = {"synthetic": scene, "sample": "frame", "batch_size": 1, "grid": [1, 2], "data_split": "1_1_1"}
    decoder = {"activation": "sin", "levels": 0, "width": 32, "strides": [5, 4, 4, 2, 2], "floor": 16, "multiple": 8}
    decoder |= {"latent_frames": [12, 6], "latent_channels": [8, 8], "reduction": 1.2}
    decoder |= {"atlas_stages": atlas_stages, "camera_frames": 6}
    model = {"optimizer": "muon", "optimizer_options": {"muon_lr": 0.01}, "lr": 0.005, "decoder": decoder}
    found = []
    for together, graph in ((1, False), (6, False), (6, True)):
        options = {"data": data, "model": model, "precision": "bf16-mixed", "max_epochs": 20}
        losses = on_gpu(tmp_path, together, graph, **options)[2].losses[-36 // together :]  # of three epochs
        found.append(sum(losses) / len(losses))
    assert found[1] == pytest.approx(found[0], rel=0.2)
    assert found[2] == pytest.approx(found[0], rel=0.2)
