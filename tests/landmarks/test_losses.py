import math
from typing import get_args

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lit_cli.errors import InputError
from lit_landmarks import losses
from lit_landmarks.heatmaps import decode, encode

NAMES = get_args(losses.LossName)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def batch():
    """Prediction, target and mask of 2 x 3 maps of 7 x 9 pixels; one landmark is missing."""
    generator = torch.Generator().manual_seed(0)
    points = 1 + 5 * torch.rand(2, 3, 2, generator=generator)
    valid = torch.tensor([[True, True, False], [True, True, True]])
    target = encode(points, valid, (7, 9), 1.2)
    prediction = torch.randn(2, 3, 7, 9, generator=generator)
    return prediction, target, valid


def mse(p, t):
    return 100 * np.mean((p - t) ** 2)


def weighted_mse(p, t):
    return 100 * np.mean((1 + 50 * t) * (p - t) ** 2)


def awing(p, t, omega=14.0, theta=0.5, epsilon=1.0, alpha=2.1, weight=10.0):
    """The formulas of the paper, pixel by pixel."""
    total = 0.0
    for row in range(t.shape[0]):
        for column in range(t.shape[1]):
            y, d = t[row, column], abs(t[row, column] - p[row, column])
            a = (
                omega
                * (1 / (1 + (theta / epsilon) ** (alpha - y)))
                * (alpha - y)
                * (theta / epsilon) ** (alpha - y - 1)
                * (1 / epsilon)
            )
            c = theta * a - omega * math.log(1 + (theta / epsilon) ** (alpha - y))
            value = omega * math.log(1 + abs(d / epsilon) ** (alpha - y)) if d < theta else a * d - c
            near = t[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2].max() >= 0.2
            total += value * (weight * near + 1)
    return total / t.size


def kl(p, t):
    q = t / t.sum()
    log_p = p - np.log(np.exp(p).sum())
    used = q > 0
    return float((q[used] * (np.log(q[used]) - log_p[used])).sum())


def dice(p, t):
    s = 1 / (1 + np.exp(-p))
    return 1 - (2 * (s * t).sum() + 1) / ((s**2).sum() + (t**2).sum() + 1)


REFERENCE = {"mse": mse, "weighted_mse": weighted_mse, "awing": awing, "kl": kl, "dice": dice}


def reference(name, prediction, target, valid):
    """The mean of the per-map formula over the valid landmarks, in float64."""
    p, t = prediction.detach().double().numpy(), target.double().numpy()
    return float(np.mean([REFERENCE[name](p[b, k], t[b, k]) for b, k in valid.nonzero().tolist()]))


@pytest.mark.parametrize("name", NAMES)
def test_value_equals_the_formula(name, batch):
    value = losses.heatmap_loss(name)(*batch)
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(reference(name, *batch), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_equals_finite_differences_of_the_formula(name, batch):
    prediction, target, valid = batch
    prediction.requires_grad_()
    losses.heatmap_loss(name)(prediction, target, valid).backward()
    for index in [(0, 0, 3, 4), (0, 1, 0, 0), (1, 2, 6, 8), (1, 0, 2, 2)]:
        ends = []
        for step in (1e-4, -1e-4):
            moved = prediction.detach().double().clone()
            moved[index] += step
            ends.append(reference(name, moved, target, valid))
        assert prediction.grad[index].item() == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=2e-3, abs=1e-6)
    assert (prediction.grad[0, 2] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_valid_is_zero_with_a_zero_gradient(name, batch):
    prediction, target, valid = batch
    prediction.requires_grad_()
    value = losses.heatmap_loss(name)(prediction, torch.zeros_like(target), torch.zeros_like(valid))
    value.backward()
    assert value.item() == 0
    assert (prediction.grad == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_valid_landmark_with_an_empty_target_is_finite(name, batch):
    prediction, target, valid = batch
    prediction.requires_grad_()
    value = losses.heatmap_loss(name)(prediction, torch.zeros_like(target), torch.ones_like(valid))
    value.backward()
    assert math.isfinite(value.item())
    assert torch.isfinite(prediction.grad).all()


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_finite_at_the_target_and_the_target_is_a_minimum(name, batch):
    _, target, valid = batch
    perfect = {
        "kl": target.clamp_min(1e-20).log(),
        "dice": torch.logit(target.clamp(1e-6, 1 - 1e-6)),
    }.get(name, target.clone())
    perfect.requires_grad_()
    loss = losses.heatmap_loss(name)
    value = loss(perfect, target, valid)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-5)
    assert torch.isfinite(perfect.grad).all()
    assert perfect.grad.abs().max() < 1e-4
    assert loss(perfect.detach() + 0.3 * target, target, valid) > value


@pytest.mark.parametrize("name", NAMES)
def test_each_landmark_counts_the_same_wherever_it_is_in_the_batch(name, batch):
    prediction, target, valid = batch
    loss = losses.heatmap_loss(name)
    single = [loss(prediction[b : b + 1, k : k + 1], target[b : b + 1, k : k + 1], torch.ones(1, 1).bool())
              for b, k in valid.nonzero().tolist()]  # fmt: skip
    torch.testing.assert_close(loss(*batch), torch.stack(single).mean())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_predictions_are_computed_in_float32(name, dtype, batch):
    prediction, target, valid = batch
    loss = losses.heatmap_loss(name)
    expected = loss(prediction.to(dtype).float(), target, valid)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(prediction.to(dtype), target, valid)
        maps = loss.activate(prediction.to(dtype))
    assert value.dtype == maps.dtype == torch.float32
    assert torch.equal(value, expected)


@pytest.mark.parametrize("name", NAMES)
def test_no_operation_waits_for_the_device(name, batch):
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert not any(word in str(func) for word in ("nonzero", "_local_scalar_dense", "masked_select")), func
            if "aten.index." in str(func):
                assert all(index is None or index.dtype != torch.bool for index in args[1])
            return func(*args, **(kwargs or {}))

    prediction, target, valid = batch
    prediction.requires_grad_()
    with Recorder():
        losses.heatmap_loss(name)(prediction, target, valid).backward()


@pytest.mark.parametrize("name", NAMES)
def test_a_perfect_prediction_activates_to_the_target(name):
    points = torch.tensor([[[20.0, 13.0], [15.4, 17.7]]])
    target = encode(points, torch.ones(1, 2).bool(), (32, 40), 2.0)
    loss = losses.heatmap_loss(name, sigma=2.0)
    logits = {"softmax": target.clamp_min(1e-30).log(), "sigmoid": torch.logit(target.clamp(1e-9, 1 - 1e-7))}
    maps = loss.activate(logits.get(loss.activation, target))
    torch.testing.assert_close(maps, target, atol=1e-4, rtol=0)
    decoded = decode(maps, "dark", 2.0)
    torch.testing.assert_close(decoded.points, points, atol=1e-3, rtol=0)
    assert decoded.score[0, 0].item() == pytest.approx(1, abs=1e-4)


def test_adaptive_wing_is_continuous_at_theta():
    loss = losses.AdaptiveWingLoss()
    valid = torch.ones(1, 1).bool()
    for level in (0.0, 0.5, 1.0):
        target = torch.full((1, 1, 3, 3), level)
        below, above = (loss(target + 0.5 + step, target, valid) for step in (-1e-5, 1e-5))
        assert above.item() == pytest.approx(below.item(), rel=1e-3)


def test_adaptive_wing_weights_only_the_surroundings_of_the_peak(batch):
    prediction, target, valid = batch
    plain, full = (losses.AdaptiveWingLoss(weight=w).per_map(prediction, target) for w in (0.0, 10.0))
    assert (full > plain)[valid].all()
    empty = torch.zeros_like(target)
    torch.testing.assert_close(
        losses.AdaptiveWingLoss(weight=10.0)(prediction, empty, valid),
        losses.AdaptiveWingLoss(weight=0.0)(prediction, empty, valid),
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_descent_on_maps_finds_the_points(name):
    points = torch.tensor([[[9.3, 6.2], [4.6, 8.1]]])
    valid = torch.ones(1, 2).bool()
    target = encode(points, valid, (14, 16), 1.5)
    loss = losses.heatmap_loss(name, sigma=1.5)
    prediction = torch.zeros(1, 2, 14, 16, requires_grad=True)
    optimizer = torch.optim.Adam([prediction], lr=0.3)
    for _ in range(150):
        optimizer.zero_grad()
        loss(prediction, target, valid).backward()
        optimizer.step()
    found = decode(loss.activate(prediction.detach()), "dark", 1.5).points
    assert (found - points).norm(dim=-1).max() < 0.05


def test_unknown_loss_is_named():
    with pytest.raises(InputError, match=r"'l0'.*weighted_mse"):
        losses.heatmap_loss("l0")
