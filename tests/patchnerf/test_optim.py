"""Optimizers against timm, torch, loops over single numbers and the singular value decomposition."""

import copy
import functools
import math

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from timm.optim import Adan as TimmAdan
from timm.optim import Muon as TimmMuon
from timm.optim import muon as timm_muon
from torch import nn
from torch.utils.data import DataLoader

from lit_cli.errors import InputError
from lit_patchnerf.models import build_decoder, decoder_config
from lit_patchnerf.muon import MuonAdamW, _Plan, batches, newton_schulz
from lit_patchnerf.optim import Adan, make_optimizer, muon_takes, shuffle_phases

NAMES = ["adam", "adamw", "adan", "muon"]


def parameters(seed=0, shapes=((4, 3), (5,), (2, 3, 3, 3))):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def fill(params, step):
    """Gradients with a course, so that their changes matter; they leave out what is named nowhere."""
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator) + 0.3 * p.detach() + math.sin(step / 3)


def network():
    net = nn.ModuleDict({"hidden": nn.Linear(3, 6), "stages": nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))})
    net["rgb"] = nn.Linear(6, 3)
    return net


# ---- Adan ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("capturable", [False, True])
def test_adan_is_timms(weight_decay, capturable):
    ours, theirs = parameters(), parameters()
    lr = torch.tensor(0.02) if capturable else 0.02
    optimizer = Adan(ours, lr=lr, weight_decay=weight_decay, capturable=capturable)
    reference = TimmAdan(theirs, lr=0.02, weight_decay=weight_decay)
    for step in range(20):
        fill(ours, step)
        fill(theirs, step)
        optimizer.step()
        reference.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_adan_is_the_loop_over_numbers():
    (p,) = parameters(shapes=((2, 3),))
    optimizer = Adan([p], lr=0.05, weight_decay=0.02)
    theta = p.detach().double().flatten().tolist()
    m, v, n, old = [0.0] * 6, [0.0] * 6, [0.0] * 6, [0.0] * 6
    b1, b2, b3 = 0.98, 0.92, 0.99
    for k in range(1, 21):
        fill([p], k)
        gradient = p.grad.double().flatten().tolist()
        optimizer.step()
        for i, g in enumerate(gradient):
            change = g - old[i] if k > 1 else 0.0
            old[i] = g
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * change
            n[i] = b3 * n[i] + (1 - b3) * (g + b2 * change) ** 2
            eta = 0.05 / (math.sqrt(n[i] / (1 - b3**k)) + 1e-8)
            theta[i] = (theta[i] - eta * (m[i] / (1 - b1**k) + b2 * v[i] / (1 - b2**k))) / (1 + 0.05 * 0.02)
    torch.testing.assert_close(
        p.detach().double().flatten(), torch.tensor(theta, dtype=torch.float64), atol=1e-5, rtol=0
    )


def test_adan_counts_parameters_that_join_or_pause_by_themselves():
    together = parameters()
    alone = copy.deepcopy(together)
    optimizer = Adan(together, lr=0.02)
    single = [Adan([p], lr=0.02) for p in alone]
    for step in range(9):
        fill(together, step)
        if step < 3:
            together[1].grad = None
        if step in (4, 5):
            together[2].grad = None
        for p, q in zip(together, alone, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        for o in single:
            o.step()
        if step == 6:  # a loaded state goes on in the same way
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = Adan(together, lr=0.02)
            optimizer.load_state_dict(state)
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert [int(optimizer.state[p]["step"]) for p in together] == [9, 6, 7]
    assert len({id(optimizer.state[p]["step"]) for p in together}) == 3


def test_adan_with_a_state_of_zeros_is_a_new_one():
    ours, fresh = parameters(), parameters()
    optimizer, other = Adan(ours, lr=0.02), Adan(fresh, lr=0.02)
    fill(ours, 0)
    optimizer.step()
    with torch.no_grad():
        for p, q in zip(ours, fresh, strict=True):
            p.copy_(q)
            for value in optimizer.state[p].values():
                value.zero_()
    for step in (1, 2):
        fill(ours, step)
        fill(fresh, step)
        optimizer.step()
        other.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, fresh, strict=True))


# ---- Muon ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 40), (2, 40, 6), (1, 30, 75)])
def test_newton_schulz_is_nearly_the_orthogonal_factor(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    exact, found = u @ v, newton_schulz(x)
    values = torch.linalg.svdvals(found)
    assert float(values.max()) < 1.21
    assert float(values[..., :-1].min()) > 0.6  # the smallest of a square matrix may be tiny
    assert float(torch.cosine_similarity(found.flatten(1), exact.flatten(1)).min()) > 0.95


def test_zeros_around_a_matrix_change_nothing():
    generator = torch.Generator().manual_seed(2)
    matrices = [torch.randn(m, n, generator=generator) for m, n in ((5, 9), (3, 20), (7, 7))]
    padded = torch.zeros(3, 8, 20)
    for i, x in enumerate(matrices):
        padded[i, : x.shape[0], : x.shape[1]] = x
    found = newton_schulz(padded)
    for i, x in enumerate(matrices):
        m, n = x.shape
        torch.testing.assert_close(found[i, :m, :n], newton_schulz(x[None])[0], rtol=1e-4, atol=1e-5)
        found[i, :m, :n] = 0
    assert not found.any()
    assert not newton_schulz(torch.zeros(1, 3, 4)).any()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("launches", [0.0, 1e5, 1e12])
def test_the_batched_step_is_that_of_each_matrix_alone(launches, channels_last):
    shapes = ((8, 3, 3, 3), (12, 4), (4, 12), (12, 4), (6, 5, 1, 1), (9, 2, 5, 5))
    ours = parameters(shapes=shapes)
    if channels_last:
        ours = [nn.Parameter(p.detach().to(memory_format=torch.channels_last) if p.ndim == 4 else p) for p in ours]
    loop = [p.detach().clone().contiguous() for p in ours]
    buffers = [torch.zeros_like(p) for p in loop]
    optimizer = MuonAdamW([{"params": ours, "muon": True}], lr=0.02, weight_decay=0.1, launches=launches)
    for step in range(3):
        fill(ours, step)
        gradients = [p.grad.clone().contiguous() for p in ours]
        optimizer.step()
        for p, g, m in zip(loop, gradients, buffers, strict=True):
            m.mul_(0.95).add_(0.05 * g)
            x = newton_schulz((0.05 * g + 0.95 * m).flatten(1)[None])[0]
            p.mul_(1 - 0.02 * 0.1).sub_(0.02 * 0.2 * math.sqrt(max(x.shape)) * x.view(p.shape))
    for p, q in zip(ours, loop, strict=True):
        torch.testing.assert_close(p.detach().contiguous(), q, rtol=1e-4, atol=1e-5)
    (plan,) = optimizer._plans.values()
    assert len(plan.batches) == {0.0: 4, 1e5: len(plan.batches), 1e12: 1}[launches]


def test_muon_is_timms_without_its_bfloat16(monkeypatch):
    in_float32 = functools.partial(timm_muon.zeropower_via_newtonschulz, dtype=torch.float32)
    monkeypatch.setattr(timm_muon, "zeropower_via_newtonschulz", in_float32)
    ours, theirs = parameters(shapes=((16, 8), (8, 4, 3, 3))), parameters(shapes=((16, 8), (8, 4, 3, 3)))
    optimizer = MuonAdamW([{"params": ours, "muon": True}], lr=0.02, scale="spectral")
    reference = TimmMuon(theirs, lr=0.02, nesterov=True, ns_coefficients="original", adjust_lr_fn="original")
    for step in range(5):
        fill(ours, step)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_phases_of_a_pixel_shuffle_are_matrices_of_their_own():
    (p,) = parameters(shapes=((8, 2, 3, 3),))
    start = p.detach().clone()
    fill([p], 0)
    gradient = p.grad.clone()
    MuonAdamW([{"params": [p], "muon": True, "phases": [4]}], lr=1.0, scale="spectral").step()
    for phase in range(4):
        x = newton_schulz((0.05 + 0.95 * 0.05) * gradient[phase::4].flatten(1)[None])[0]
        torch.testing.assert_close((start - p.detach())[phase::4].flatten(1), x, rtol=1e-3, atol=1e-4)


def test_batches_trade_zeros_for_launches():
    shapes = [(8, 64), (8, 64), (7, 60), (200, 900)]
    assert len(batches(shapes, 0.0)) == 3
    assert sorted(map(len, batches(shapes, 1e6))) == [1, 3]
    assert sorted(map(len, batches(shapes, 1e12))) == [4]


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("coordinate", {"fc_dim": 32, "floor": 16}),
        ("grid", {"blocks": [1, 0], "block": "residual", "clip_dim": 32, "width": 24}),
    ],
)
def test_muon_has_the_matrices_inside_both_decoders(mode, options):
    decoder = build_decoder(decoder_config(mode, options))
    taken = {name for name, p in decoder.named_parameters() if muon_takes(name, p)}
    ends = ("conv.weight", "conv1.weight", "conv2.weight", "widen.weight", "narrow.weight")
    wanted = {n for n, _ in decoder.named_parameters() if n.startswith("stages.") and n.endswith(ends)}
    assert taken == wanted
    assert len(taken) >= 7
    optimizer = make_optimizer("muon", decoder.named_parameters(), lr=1e-3, weight_decay=0.1, muon_lr=0.02)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert list(groups) == ["muon", "adamw_decayed", "adamw"]
    assert sum(len(g["params"]) for g in groups.values()) == len(list(decoder.parameters()))
    assert {g["lr"] for g in groups.values()} == {0.02, 1e-3}
    plain = {id(p) for p in groups["adamw"]["params"]}
    ones = {n for n, p in decoder.named_parameters() if p.ndim == 1 or n.startswith("latents.")}
    assert {n for n, p in decoder.named_parameters() if id(p) in plain} == ones
    phases = shuffle_phases(decoder)
    assert set(phases) <= taken
    make_optimizer("muon", decoder.named_parameters(), lr=1e-3, phases=phases)


# ---- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_capturable_steps_are_the_same_and_leave_their_tensors_in_place(name):
    seed_everything(0, verbose=False)
    plain = network()
    captured = copy.deepcopy(plain)
    one = make_optimizer(name, plain.named_parameters(), lr=0.01, weight_decay=0.01)
    two = make_optimizer(name, captured.named_parameters(), lr=0.01, weight_decay=0.01, capturable=True)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)) for o in (one, two)]
    rates = [group["lr"] for group in two.param_groups]
    assert all(isinstance(rate, torch.Tensor) for rate in rates)
    assert all(isinstance(base, float) for base in schedules[1].base_lrs)  # no tensor that a scheduler would read
    pointers = None
    for step in range(6):
        fill(plain.parameters(), step)
        fill(captured.parameters(), step)
        for o, schedule in zip((one, two), schedules, strict=True):
            o.step()
            schedule.step()
        found = [v.data_ptr() for s in two.state.values() for v in s.values()]
        assert found == (pointers or found)
        pointers = found
    assert all(group["lr"] is rate for group, rate in zip(two.param_groups, rates, strict=True))
    assert float(rates[-1]) == pytest.approx(0.01 / 7)
    for p, q in zip(plain.parameters(), captured.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("saved", "wanted"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("name", NAMES)
def test_a_state_goes_on_exactly_and_rates_stay_what_they_are(name, saved, wanted, tmp_path):
    seed_everything(0, verbose=False)
    net = network()
    first = make_optimizer(name, net.named_parameters(), lr=0.01, capturable=saved)
    for step in range(3):
        fill(net.parameters(), step)
        first.step()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    other = copy.deepcopy(net)
    second = make_optimizer(name, other.named_parameters(), lr=0.5, capturable=wanted)
    rates = [group["lr"] for group in second.param_groups]
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(isinstance(group["lr"], torch.Tensor) == wanted for group in second.param_groups)
    assert not wanted or all(g["lr"] is rate for g, rate in zip(second.param_groups, rates, strict=True))
    assert [float(g["lr"]) for g in second.param_groups] == pytest.approx([float(g["lr"]) for g in first.param_groups])
    for step in (3, 4):
        for each, optimizer in ((net, first), (other, second)):
            fill(each.parameters(), step)
            optimizer.step()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


class Toy(LightningModule):
    def __init__(self, name, manual):
        super().__init__()
        self.net, self.name, self.automatic_optimization = network(), name, not manual

    def training_step(self, batch, batch_idx):
        x = batch
        for layer in (self.net["hidden"], *self.net["stages"], self.net["rgb"]):
            x = torch.tanh(layer(x))
        loss = (x - batch).square().mean()
        if not self.automatic_optimization:
            optimizer, schedule = self.optimizers(), self.lr_schedulers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            schedule.step()
        return loss

    def configure_optimizers(self):
        optimizer = make_optimizer(self.name, self.named_parameters(), lr=0.01, capturable=True, clips=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 24)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", NAMES)
def test_lightning_trains_automatically_and_by_hand_alike(name, precision):
    found = []
    for manual in (False, True):
        seed_everything(3, verbose=False)
        module = Toy(name, manual)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(accelerator="cpu", max_epochs=3, precision=precision, enable_model_summary=False, **quiet)
        trainer.fit(module, DataLoader(torch.rand(32, 3), batch_size=4))
        found.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
        assert float(trainer.optimizers[0].param_groups[0]["lr"]) == 0
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"name": "sgd"}, "model.optimizer"),
        ({"lr": 0.0}, "model.lr"),
        ({"lr": math.nan}, "model.lr"),
        ({"betas": (0.9, 0.999)}, "model.optimizer_options.betas: expected 3"),
        ({"weight_decay": -1.0}, "model.weight_decay: expected a number from 0, got -1"),
        ({"weight_decay": math.nan}, "model.weight_decay"),
        (
            {"name": "muon", "momentum": 1.0},
            "model.optimizer_options.momentum: expected a number from 0 and below 1, got 1",
        ),
        ({"name": "muon", "muon_scale": "other"}, "model.optimizer_options.muon_scale"),
        ({"name": "muon", "phases": {"stages.0.weight": 3}}, "model.optimizer_options.phases"),
    ],
)
def test_wrong_options_are_named(options, text):
    with pytest.raises(InputError, match=text):
        make_optimizer(**({"name": "adan", "named_parameters": network().named_parameters(), "lr": 0.01} | options))


def test_frozen_parameters_are_left_out_and_something_must_remain():
    net = network()
    net["hidden"].requires_grad_(False)
    optimizer = make_optimizer("adamw", net.named_parameters(), lr=0.01)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6
    with pytest.raises(InputError, match="none"):
        make_optimizer("adamw", net.requires_grad_(False).named_parameters(), lr=0.01)
    with pytest.raises(InputError, match="float32"):
        make_optimizer("muon", network().double().named_parameters(), lr=0.01)


def test_the_scales_of_muon():
    (p,) = parameters(shapes=((16, 4),))
    for scale, factor in (("rms", 0.2 * 4), ("spectral", 2.0)):
        plan = _Plan([p], [1], scale, 0.0)
        assert plan.batches[0].scales.item() == pytest.approx(factor)
    groups = make_optimizer("muon", network().named_parameters(), lr=1e-3, muon_scale="spectral").param_groups
    assert groups[0]["lr"] == pytest.approx(0.02)
