"""Losses against the textbook formulas in plain torch or loops; gradients; half precision; what they keep in memory."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn
from torch.nn import functional as F

from lit_cli.errors import InputError
from lit_dsunet.losses import DeepSupervisionLoss, DiceCELoss, make_loss
from lit_dsunet.targets import device_components, ds_targets

B, K, SIZE = 2, 3, (4, 6, 4)
EVERY = ["dice_ce", "tversky", "focal", "topk", "generalised_dice", "blob"]


def batch(size=SIZE, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(B, K, *size, generator=g, dtype=torch.float64)
    return logits.to(dtype), torch.randint(0, K, (B, *size), generator=g, dtype=torch.uint8)


def one_hot(label):
    return F.one_hot(label.long(), K).movedim(-1, 1).double()


def shares(label):
    """Soft targets of twice the stride."""
    return ds_targets(label, K, [(2,) * (label.ndim - 1)], "soft")[0]


def tversky(p, y, alpha, beta, dims, smooth=1e-5):
    tp, fp, fn = (p * y).sum(dims), (p * (1 - y)).sum(dims), ((1 - p) * y).sum(dims)
    return ((tp + smooth / 2) / (tp + alpha * fp + beta * fn + smooth / 2))[..., 1:].mean()


@pytest.mark.parametrize("size", [SIZE, (6, 8)], ids=["volume", "slice"])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_dice_ce_is_the_textbook_formula(size, batch_dice):
    logits, label = batch(size)
    p, y = logits.double().softmax(1), one_hot(label)
    dims = tuple(range(2, y.ndim)) if not batch_dice else (0, *range(2, y.ndim))
    dice = (2 * (p * y).sum(dims) + 1e-5) / (p.sum(dims) + y.sum(dims) + 1e-5)
    expected = 1 - dice[..., 1:].mean() + F.cross_entropy(logits.double(), label.long())
    for target in (label, label.long(), y.float()):
        loss = make_loss("dice_ce", batch_dice=batch_dice)(logits, target)
        assert loss.shape == ()
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    parts = [make_loss("dice_ce", batch_dice=batch_dice, **{off: 0.0})(logits, label) for off in ("dice", "ce")]
    assert sum(parts).item() == pytest.approx(expected.item(), rel=1e-5)


def test_class_weights_are_torchs():
    logits, label = batch()
    weights = [0.2, 1.0, 3.0]
    loss = make_loss("dice_ce", dice=0.0, class_weights=weights)
    expected = F.cross_entropy(logits, label.long(), torch.tensor(weights))
    assert loss(logits, label).item() == pytest.approx(expected.item(), rel=1e-5)
    assert not loss.state_dict()


def test_tversky():
    logits, label = batch()
    p, y = logits.double().softmax(1), one_hot(label)
    loss = make_loss("tversky", alpha=0.2, beta=0.9, ce=0.0)(logits, label)
    assert loss.item() == pytest.approx(1 - tversky(p, y, 0.2, 0.9, (2, 3, 4)).item(), rel=1e-5)
    half = make_loss("tversky", alpha=0.5, beta=0.5)(logits, label)
    torch.testing.assert_close(half, make_loss("dice_ce")(logits, label))


def test_focal():
    logits, label = batch()
    log_p = logits.double().log_softmax(1)
    expected = -(one_hot(label) * (1 - log_p.exp()) ** 2 * log_p).sum(1).mean()
    assert make_loss("focal")(logits, label).item() == pytest.approx(expected.item(), rel=1e-5)
    plain = F.cross_entropy(logits, label.long())
    torch.testing.assert_close(make_loss("focal", gamma=0.0)(logits, label), plain)
    with_dice = make_loss("focal", dice=0.5)(logits, label).item()
    dice = make_loss("dice_ce", ce=0.0)(logits, label).item()
    assert with_dice == pytest.approx(expected.item() + 0.5 * dice, rel=1e-5)


@pytest.mark.parametrize("percent", [10.0, 37.0, 100.0, 0.01])
def test_topk(percent):
    logits, label = batch()
    each = F.cross_entropy(logits, label.long(), reduction="none").flatten().sort(descending=True).values
    count = max(1, math.floor(len(each) * percent / 100))
    loss = make_loss("topk", percent=percent)(logits, label)
    torch.testing.assert_close(loss, each[:count].mean())


def test_generalised_dice_and_its_blind_spot():
    logits, label = batch()
    p, y = logits.double().softmax(1), one_hot(label)
    w = 1 / y.sum((0, 2, 3, 4)) ** 2
    top, bottom = ((w * t.sum((0, 2, 3, 4))).sum() for t in (p * y, p + y))
    loss = make_loss("generalised_dice")(logits, label)
    assert loss.item() == pytest.approx(1 - 2 * (top / bottom).item(), rel=1e-5)
    # Without foreground the loss is 1 and says nothing: what the original guide's runs met in most batches.
    empty = torch.zeros_like(label)
    logits = logits.requires_grad_()
    blind = make_loss("generalised_dice")(logits, empty)
    blind.backward()
    assert blind.item() == pytest.approx(1, abs=1e-5)
    assert logits.grad.abs().max() < 1e-7


def test_shares_are_met_exactly_at_the_minimum():
    """Dice and cross entropy of shares are both best where p equals them; the product form of Dice is not."""
    _, label = batch((8, 8, 8))
    target = shares(label).double()
    best = target.clamp_min(1e-9).log()
    dice, ce = make_loss("dice_ce", ce=0.0), make_loss("dice_ce", dice=0.0)
    assert dice(best, target).item() == pytest.approx(0, abs=1e-5)
    entropy = -(target * target.clamp_min(1e-9).log()).sum(1).mean()
    assert ce(best, target).item() == pytest.approx(entropy.item(), rel=1e-6)
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = best.clamp_min(-3) + 0.1 * torch.randn(best.shape, generator=rng, dtype=best.dtype)
        assert dice(other, target) > dice(best, target)
        assert ce(other, target) > ce(best, target)


def slow_blob(logits, label):
    """One lesion after the other, the others masked out of its domain."""
    p = logits.softmax(1).numpy()
    samples = []
    for k in range(1, K):
        for b in range(len(label)):
            lesions, count = ndimage.label(label[b].numpy() == k, np.ones((3,) * (label.ndim - 1)))
            losses = []
            for i in range(1, count + 1):
                domain = (lesions == 0) | (lesions == i)
                mine, guess = (lesions == i)[domain], p[b, k][domain]
                losses.append(1 - 2 * (mine * guess).sum() / (mine.sum() + guess.sum()))
            if losses:
                samples.append(np.mean(losses))
    return np.mean(samples)


@pytest.mark.parametrize("size", [(12, 14, 10), (24, 20)], ids=["volume", "slice"])
def test_blob_loss_against_a_loop_over_lesions(size):
    g = torch.Generator().manual_seed(1)
    label = (torch.rand(B, *size, generator=g) < 0.05).to(torch.uint8)
    label += 2 * (torch.rand(B, *size, generator=g) < 0.02).to(torch.uint8) * (label == 0)
    label[1][label[1] == 2] = 0  # a sample without lesions of class 2
    logits = torch.randn(B, K, *size, generator=g, dtype=torch.float64)
    whole = make_loss("dice_ce")(logits, label)
    loss = make_loss("blob", blob=0.7)(logits, label)
    assert (loss - whole).item() == pytest.approx(0.7 * slow_blob(logits, label), rel=1e-9)
    torch.testing.assert_close(make_loss("blob", blob=0.7)(logits, one_hot(label)), loss)


@pytest.mark.parametrize("density", [0.01, 0.05, 0.1, 0.3])
@pytest.mark.parametrize("size", [(24, 20, 22), (40, 44)], ids=["volume", "slice"])
def test_components_are_scipys(size, density):
    mask = torch.rand(3, *size, generator=torch.Generator().manual_seed(3)) < density
    found = device_components(mask)
    own = torch.arange(math.prod(size)).view(size).expand_as(mask)
    assert torch.equal(found[~mask], own[~mask])
    for b in range(len(mask)):
        lesions, count = ndimage.label(mask[b].numpy(), np.ones((3,) * len(size)))
        expected = ndimage.maximum(own[b].numpy(), lesions, range(1, count + 1))
        assert np.array_equal(found[b][mask[b]], np.asarray(expected)[lesions[mask[b].numpy()] - 1])


def test_components_of_a_snake():
    """A component folded up to the length of 2079 pixels, far from any lesion."""
    mask = torch.zeros(1, 63, 64, dtype=torch.bool)
    mask[0, ::2] = True
    mask[0, 1::4, -1] = mask[0, 3::4, 0] = True
    assert len(device_components(mask)[mask].unique()) == 1


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "shares"])
def test_gradients(name, soft):
    _, label = batch((4, 4, 8) if soft else (2, 2, 4))
    label = label * (label > 1)  # classes 0 and 2
    target = shares(label).double() if soft else label
    logits, _ = batch((2, 2, 4), torch.float64)
    loss = make_loss(name, **({"iterations": 3} if name == "blob" else {}))
    assert torch.autograd.gradcheck(lambda x: loss(x, target), logits.requires_grad_(), atol=1e-7)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits(name, dtype):
    """Extreme logits, sums beyond what float16 can hold, and autocast: value of float32, finite gradient."""
    logits, label = batch((42, 42, 42), dtype)
    logits = logits * (60 if dtype == torch.bfloat16 else 3000)
    loss = make_loss(name)
    x = logits.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(x, label)
    value.backward()
    assert value.dtype == torch.float32
    assert x.grad.dtype == dtype
    assert x.grad.isfinite().all()
    assert value.item() == pytest.approx(loss(logits.double(), label).item(), rel=1e-4)


@pytest.mark.parametrize("name", ["dice_ce", "tversky", "focal", "topk", "blob"])
@pytest.mark.parametrize("options", [{}, {"batch_dice": True}], ids=["per sample", "batch"])
def test_empty_foreground_still_teaches(name, options):
    """Without a lesion in the batch the loss is finite and pushes a false alarm down."""
    if name == "topk":
        options = {**options, "percent": 50.0}
    logits = torch.zeros(B, 2, 8, 8, 8, requires_grad=True)
    loss = make_loss(name, **options)(logits, torch.zeros(B, 8, 8, 8, dtype=torch.uint8))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    assert logits.grad[:, 1].sum() > 0.1
    assert (logits.grad[:, 1] >= 0).all()


@pytest.mark.parametrize("name", EVERY)
def test_a_perfect_prediction_costs_nothing_and_descent_finds_it(name):
    _, label = batch((8, 8, 8))
    logits = torch.zeros(B, K, 8, 8, 8, requires_grad=True)
    loss, optimizer = make_loss(name), torch.optim.Adam([logits], lr=0.5)
    start = loss(logits, label).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss(logits, label).backward()
        optimizer.step()
    assert loss(logits, label).item() < 0.05 * start
    assert torch.equal(logits.argmax(1), label.long())


def test_little_is_kept_for_the_backward_pass():
    """Only the logits, in their own type, and the label; autograd's version keeps several float32 copies."""
    logits, label = batch((16, 16, 16), torch.bfloat16)
    kept = []
    x = logits.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        DiceCELoss()(x, label)
    large = [t for t in kept if t.numel() > 1000]
    assert sum(t.numel() * t.element_size() for t in large) == x.numel() * 2 + label.numel()
    assert {t.data_ptr() for t in large} == {x.data_ptr(), label.data_ptr()}


@pytest.mark.parametrize(("name", "options"), [("dice_ce", {}), ("blob", {"iterations": 1})])
def test_compiles_as_one_graph(name, options):
    torch.compiler.reset()
    logits, label = batch((8, 8, 8))
    loss = DeepSupervisionLoss(make_loss(name, **options))
    heads = [logits.requires_grad_(), logits.detach()[..., ::2, ::2, ::2].requires_grad_()]
    expected = loss(heads, label)
    grads = torch.autograd.grad(expected, heads)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    value = compiled(heads, label)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, heads), grads)


@pytest.mark.parametrize("mode", ["soft", "max", "nearest"])
def test_deep_supervision_adds_up_its_heads(mode):
    _, label = batch((8, 8, 16))
    g = torch.Generator().manual_seed(0)
    heads = [torch.randn(B, K, 8 // a, 8 // s, 16 // s, generator=g) for a, s in ((1, 1), (1, 2), (2, 4))]
    base = make_loss("dice_ce")
    targets = ds_targets(label, K, [(1, 1, 1), (1, 2, 2), (2, 4, 4)], mode)
    each = [base(h, t) for h, t in zip(heads, targets, strict=True)]
    halving = DeepSupervisionLoss(base, mode=mode)(heads, label)
    torch.testing.assert_close(halving, (4 * each[0] + 2 * each[1] + each[2]) / 7)
    own = DeepSupervisionLoss(base, mode=mode, weights=[1.0, 0.0, 0.3])(heads, label)
    torch.testing.assert_close(own, each[0] + 0.3 * each[2])
    torch.testing.assert_close(DeepSupervisionLoss(base, mode=mode)(heads[0], label), each[0])


def test_the_guides_way():
    """Auxiliary logits interpolated to full size, 0.5 for the coarsest of them."""
    _, label = batch((8, 8, 8))
    heads = [torch.randn(B, K, 8 // s, 8 // s, 8 // s) for s in (1, 2, 4, 8)]
    base = make_loss("generalised_dice")
    expected = base(heads[0], label)
    for weight, head in zip((0.125, 0.25, 0.5), heads[1:], strict=True):
        expected = expected + weight * base(nn.Upsample((8, 8, 8), mode="trilinear")(head), label)
    loss = DeepSupervisionLoss(base, weights="guide", mode="upsample")(heads, label)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_loss("dice"), "loss: name is 'dice', expected one of dice_ce, tversky"),
        (lambda: make_loss("topk", k=3), "loss: topk has no option 'k', expected one of percent, dice, batch_dice"),
        (lambda: make_loss("generalised_dice", k=3), "generalised_dice has no option 'k', expected one of none"),
        (lambda: make_loss("topk", percent=0.0), "percent is 0.0, expected more than 0 and at most 100"),
        (lambda: make_loss("focal", gamma=0.5), "gamma is 0.5, expected 0 or at least 1"),
        (lambda: make_loss("tversky", alpha=-1.0), "alpha is -1.0, expected 0 or more"),
        (lambda: make_loss("blob", blob=float("nan")), "blob is nan, expected 0 or more"),
        (lambda: DeepSupervisionLoss(nn.Identity(), mode="mean"), "mode is 'mean', expected one of soft, max"),
        (lambda: DeepSupervisionLoss(nn.Identity(), weights=[0.0]), "weights: expected 1 numbers"),
    ],
)
def test_refused_options(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_refused_shapes():
    logits, label = batch()
    loss = make_loss("dice_ce")
    with pytest.raises(ValueError, match=r"expected class indices \(2, 4, 6, 4\) or shares \(2, 3, 4, 6, 4\), got"):
        loss(logits, label[..., :2])
    with pytest.raises(ValueError, match=r"torch\.float32"):
        loss(logits, label.float())
    with pytest.raises(ValueError, match="two classes or more, got 1"):
        loss(logits[:, :1], label)
    with pytest.raises(ValueError, match="does not divide"):
        DeepSupervisionLoss(loss)([logits, logits[..., :3]], label)
    with pytest.raises(InputError, match="weights: expected 1 numbers"):
        DeepSupervisionLoss(loss, weights=[1.0, 1.0])([logits], label)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", EVERY)
def test_on_cuda_nothing_waits_and_the_value_is_the_same(name):
    logits, label = batch((16, 16, 16))
    heads = [logits, logits[..., ::2, ::2, ::2].contiguous()]
    loss = DeepSupervisionLoss(make_loss(name))
    expected = loss(heads, label)
    there, on_device, loss = [h.cuda().requires_grad_() for h in heads], label.cuda(), loss.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            value = loss(there, on_device)
        value.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(value.cpu(), expected, rtol=1e-4, atol=1e-5)
