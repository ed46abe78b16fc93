"""The loss against a loop over stages and images in float64; empty batches and processes; bf16, memory, no waiting."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import ops

from lit_detr.losses import WEIGHTS, DetectionLoss
from lit_detr.matching import Matcher
from lit_detr.samples import Output, pack_targets
from tests.helpers.distributed import in_two_processes
from tests.helpers.errors import refused

SIZE = (256, 320)
K, C = 4, 12.0
MIXED = {"class": 1.5, "l1": 4.0, "giou": 2.5, "nwd": 3.0}


def random_boxes(*shape, g):
    centre = torch.rand(*shape, 2, generator=g, dtype=torch.float64)
    return torch.cat((centre, 0.2 * torch.rand(*shape, 2, generator=g, dtype=torch.float64) + 0.005), -1)


def scene(counts, queries=12, layers=3, noise=10, seed=0, dtype=torch.float64, classes=K):
    """An output with gradients, and targets; a third of the denoising queries each finds, rejects and is left over."""
    g = torch.Generator().manual_seed(seed)
    batch = len(counts)

    def logits(*shape):
        return (2 * torch.randn(*shape, classes, generator=g, dtype=torch.float64)).to(dtype).requires_grad_()

    def boxes(*shape):
        return random_boxes(*shape, g=g).to(dtype).requires_grad_()

    parts = [logits(layers, batch, queries), boxes(layers, batch, queries)]
    parts += [logits(batch, queries), boxes(batch, queries)]
    if noise:
        row = torch.stack([torch.randint(0, n, (noise,), generator=g) if n else torch.zeros(noise) for n in counts])
        kind = torch.randint(0, 3, (batch, noise), generator=g)
        row = row.long().masked_fill(kind == 2, -1)
        row[[n == 0 for n in counts]] = -1
        parts += [logits(layers, batch, noise), boxes(layers, batch, noise), row, kind == 0]
    wanted = [random_boxes(n, g=g).to(dtype) for n in counts]
    labels = [torch.randint(0, classes, (n,), generator=g) for n in counts]
    targets = pack_targets(wanted, labels)
    return Output(*parts), targets._replace(boxes=targets.boxes.to(dtype))


def tensors(output):
    return [t for t in output if t is not None and t.requires_grad]


def slow_class(kind, x, label, q):
    """Over the classes of one query; `label` None for background."""
    total = 0.0
    for k, logit in enumerate(x):
        p = logit.sigmoid()
        if k == label and kind == "focal":
            total = total - 0.25 * (1 - p) ** 2 * p.log()
        elif k == label and kind == "vfl":
            total = total - q * (q * p.log() + (1 - q) * (1 - p).log())
        elif k == label:
            total = total - (q**1.5 * p.log() + (1 - q**1.5) * (1 - p).log())
        elif kind == "focal":
            total = total - 0.75 * p**2 * (1 - p).log()
        else:
            weight = 0.75 * p.detach() ** 2 if kind == "vfl" else p.detach() ** 1.5
            total = total - weight * (1 - p).log()
    return total


def slow_set(kind, logits, boxes, pairs, ignored, wanted, labels):
    """Unweighted sums of one image in one stage."""
    sums = dict.fromkeys(WEIGHTS, torch.zeros((), dtype=torch.float64))
    scale = torch.tensor([SIZE[1], SIZE[0], SIZE[1], SIZE[0]], dtype=torch.float64)
    for i in range(len(logits)):
        if i in ignored:
            continue
        if i not in pairs:
            sums["class"] = sums["class"] + slow_class(kind, logits[i], None, None)
            continue
        a, b = boxes[i : i + 1], wanted[pairs[i]][None]
        corners = [ops.box_convert(z, "cxcywh", "xyxy") for z in (a, b)]
        q = ops.box_iou(*corners).item()
        gap = ((a - b) * scale)[0]
        distance = (gap[0] ** 2 + gap[1] ** 2 + (gap[2] / 2) ** 2 + (gap[3] / 2) ** 2).sqrt()
        sums["class"] = sums["class"] + slow_class(kind, logits[i], labels[pairs[i]].item(), q)
        sums["l1"] = sums["l1"] + F.l1_loss(a, b, reduction="sum")
        sums["giou"] = sums["giou"] + 1 - ops.generalized_box_iou(*corners)[0, 0]
        sums["nwd"] = sums["nwd"] + 1 - torch.exp(-distance / C)
    return sums


def slow_assign(logits, boxes, wanted, labels):
    corners = [ops.box_convert(z, "cxcywh", "xyxy") for z in (boxes, wanted)]
    p = logits.sigmoid()[:, labels]
    cost = -0.25 * (1 - p) ** 2 * p.log() + 0.75 * p**2 * (1 - p).log()
    cost = 2 * cost + 5 * torch.cdist(boxes, wanted, p=1) - 2 * ops.generalized_box_iou(*corners)
    return dict(zip(*(i.tolist() for i in linear_sum_assignment(cost.detach())), strict=True))


def slow_loss(kind, output, targets, weights, auxiliary=1.0, encoder=1.0, denoising=1.0):
    number = max(1, sum(targets.counts))
    layers = len(output.logits)
    parts = dict.fromkeys((*WEIGHTS, "auxiliary", "encoder", "denoising"), torch.zeros((), dtype=torch.float64))

    def add(key, value):
        parts[key] = parts[key] + value

    for b, n in enumerate(targets.counts):
        wanted, labels = targets.boxes[b, :n], targets.labels[b, :n]
        for s in range(layers + 1):
            x, y = (
                (output.logits[s, b], output.boxes[s, b])
                if s < layers
                else (output.encoder_logits[b], output.encoder_boxes[b])
            )
            pairs = slow_assign(x, y, wanted, labels) if n else {}
            for name, value in slow_set(kind, x, y, pairs, set(), wanted, labels).items():
                value = weights[name] * value / number
                if s == layers - 1:
                    add(name, value)
                else:
                    add(*(("encoder", encoder * value) if s == layers else ("auxiliary", auxiliary * value)))
        if output.noise_target is not None:
            row, positive = output.noise_target, output.noise_positive & (output.noise_target >= 0)
            ignored = {i for i, r in enumerate(row[b].tolist()) if r < 0}
            pairs = {i: row[b, i].item() for i in range(row.shape[1]) if positive[b, i]}
            for s in range(layers):
                args = output.noise_logits[s, b], output.noise_boxes[s, b], pairs, ignored, wanted, labels
                for name, value in slow_set(kind, *args).items():
                    add("denoising", denoising * weights[name] * value / max(1, positive.sum().item()))
    return {"loss": sum(parts.values()), **parts}


@pytest.mark.parametrize("kind", ["focal", "vfl", "mal"])
@pytest.mark.parametrize("noise", [0, 10])
def test_equals_a_loop_values_and_gradients(kind, noise):
    output, targets = scene([3, 0, 5], noise=noise)
    factors = {"auxiliary": 0.7, "encoder": 0.4, "denoising": 0.9}
    loss = DetectionLoss(Matcher(), class_kind=kind, weights=MIXED, nwd_constant=C, **factors)
    parts = loss(output, targets, SIZE)
    expected = slow_loss(kind, output, targets, MIXED, **factors)
    for name, value in parts.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-7), name
        assert value.requires_grad == (name == "loss")
    assert parts.keys() == expected.keys() - (set() if noise else {"denoising"})
    found = torch.autograd.grad(parts["loss"], tensors(output))
    for a, b in zip(found, torch.autograd.grad(expected["loss"], tensors(output)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_float32_and_default_weights():
    output, targets = scene([4, 2], dtype=torch.float32)
    parts = DetectionLoss(Matcher())(output, targets, SIZE)
    double = Output(*(t.double() if t.is_floating_point() else t for t in output))
    exact = targets._replace(boxes=targets.boxes.double())
    assert parts["loss"].dtype == torch.float32
    assert "nwd" not in parts
    assert parts["loss"].item() == pytest.approx(slow_loss("mal", double, exact, WEIGHTS)["loss"].item(), rel=1e-5)
    assert parts["loss"].item() == pytest.approx(sum(v.item() for k, v in parts.items() if k != "loss"), rel=1e-5)


def test_perfect_boxes_leave_nothing_of_l1_giou_and_nwd():
    _, targets = scene([5], dtype=torch.float32)
    boxes = targets.boxes[:, :5].expand(2, 1, 5, 4).clone().requires_grad_()
    logits = torch.full((2, 1, 5, K), -20.0).scatter(-1, targets.labels[:, :5].expand(2, 1, 5)[..., None], 20.0)
    output = Output(logits, boxes, logits[0], boxes[0])
    parts = DetectionLoss(Matcher(), weights={"nwd": 1.0}, nwd_constant=C)(output, targets, SIZE)
    assert parts["loss"].item() == pytest.approx(0, abs=1e-4)
    parts["loss"].backward()
    assert boxes.grad is not None
    assert boxes.grad.isfinite().all()


@pytest.mark.parametrize("noise", [0, 6])
def test_a_batch_without_boxes_touches_every_output(noise):
    output, targets = scene([0, 0], noise=noise, dtype=torch.float32)
    parts = DetectionLoss(Matcher())(output, targets, SIZE)
    parts["loss"].backward()
    assert all(v.isfinite() for v in parts.values())
    for name, tensor in zip(output._fields, output, strict=True):
        if tensor is None or not tensor.requires_grad:
            continue
        assert tensor.grad.isfinite().all(), name
        assert bool(tensor.grad.any()) == (name in ("logits", "encoder_logits")), name
    assert parts["class"].item() > 0
    assert parts["l1"].item() == parts["giou"].item() == 0


def test_more_boxes_than_queries():
    output, targets = scene([40, 3], queries=9)
    parts = DetectionLoss(Matcher(), weights=MIXED, nwd_constant=C)(output, targets, SIZE)
    assert parts["loss"].item() == pytest.approx(slow_loss("mal", output, targets, MIXED)["loss"].item(), rel=1e-7)


def test_a_broken_prediction_shows_in_the_loss():
    output, targets = scene([3, 2])
    with torch.no_grad():
        output.logits[1, 0, 4] = math.nan
    assert DetectionLoss(Matcher())(output, targets, SIZE)["loss"].isnan()


@pytest.mark.parametrize("kind", ["focal", "vfl", "mal"])
def test_bf16_autocast_stays_finite_with_boxes_of_two_pixels(kind):
    g = torch.Generator().manual_seed(0)
    net = nn.Linear(32, 2 * (K + 4))
    with torch.no_grad():
        net.weight.normal_(0, 2, generator=g)  # scores and boxes at their extremes
    loss = DetectionLoss(Matcher(nwd=1.0, nwd_constant=C), class_kind=kind, weights={"nwd": 1.0}, nwd_constant=C)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    for step in range(10):
        n = [60, 0, 1]
        sides = 2 / 640 * (1 + 5 * step / 10)
        wanted = [torch.cat((torch.rand(c, 2, generator=g), torch.full((c, 2), sides)), 1) for c in n]
        targets = pack_targets(wanted, [torch.randint(0, K, (c,), generator=g) for c in n])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(torch.randn(2, 3, 80, 32, generator=g))
            assert out.dtype == torch.bfloat16
            logits, boxes = out[..., :K], out[..., K : K + 4].float().sigmoid()
            noise, noise_boxes = out[..., K + 4 : -4], out[..., -4:].float().sigmoid()
            row = torch.randint(0, 60, (3, 80), generator=g) * torch.tensor([[1], [0], [0]])
            row[1] = -1
            parts = loss(
                Output(logits, boxes, logits[0], boxes[0], noise, noise_boxes, row, torch.rand(3, 80) < 0.5),
                targets,
                (640, 640),
            )
        assert all(v.dtype == torch.float32 and v.isfinite() for v in parts.values())
        optimizer.zero_grad()
        parts["loss"].backward()
        assert all(p.grad.isfinite().all() for p in net.parameters())
        optimizer.step()


class Watch(TorchDispatchMode):
    """Refuses what waits for a device, and notes the largest result but for memory set aside for the host."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not name.startswith(self.WAITS), name
        if name in ("index", "index_put", "index_put_"):
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), name
        out = func(*args, **(kwargs or {}))
        shared = [x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)]
        fresh = isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in shared
        if fresh and func is not torch.ops.aten.empty.memory_format:
            self.largest = max(self.largest, out.untyped_storage().nbytes())
        return out


def test_nothing_waits_for_the_device_and_memory_does_not_depend_on_the_boxes():
    largest = []
    for count in (20, 500):
        output, targets = scene([count, 0, count // 2], queries=300, dtype=torch.float32, classes=30, noise=100)
        loss = DetectionLoss(Matcher(memory_mib=1), weights=MIXED, nwd_constant=C)
        with Watch() as watch:
            loss(output, targets, SIZE)["loss"].backward()
        largest.append(watch.largest)
    assert largest[0] == largest[1] == 4 * 300 * 3 * 30 * 4  # the stacked logits


def test_the_parts_around_the_assignment_compile_without_a_break():
    plain = DetectionLoss(Matcher(), weights=MIXED, nwd_constant=C)
    compiled = DetectionLoss(Matcher(), weights=MIXED, nwd_constant=C)
    compiled.compile_parts(backend="aot_eager", dynamic=False)
    for counts in ([3, 5], [0, 7]):
        output, targets = scene(counts, dtype=torch.float32)
        a, b = plain(output, targets, SIZE), compiled(output, targets, SIZE)
        torch.testing.assert_close(a, b)
        gradients = [torch.autograd.grad(x["loss"], tensors(output)) for x in (a, b)]
        torch.testing.assert_close(*gradients)


class Net(nn.Module):
    """The same output for every image, each kind of it with parameters of its own."""

    def __init__(self):
        super().__init__()
        output, _ = scene([1], dtype=torch.float32, noise=6)
        self.parts = nn.ParameterList([t.detach() for t in tensors(output)])

    def forward(self, row, positive):
        batch = len(row)
        logits, boxes, encoder_logits, encoder_boxes, noise, noise_boxes = self.parts
        wide = [t.expand(-1, batch, -1, -1) for t in (logits, boxes, noise, noise_boxes)]
        encoder = [t.expand(batch, -1, -1) for t in (encoder_logits, encoder_boxes)]
        return Output(*wide[:2], *encoder, *wide[2:], row, positive)


def unequal(rank):
    """Gradients where one process has no boxes; process 2 stands for both in one."""
    counts = [[3, 5], [0, 0], [3, 5, 0, 0]][rank]
    _, targets = scene([3, 5, 0, 0], dtype=torch.float32)
    row = torch.tensor([[0, 1, 2, -1, 0, 1], [4, 3, 2, 1, 0, -1], [-1] * 6, [-1] * 6])
    pick = [[0, 1], [2, 3], [0, 1, 2, 3]][rank]
    some = [t[pick] for t in targets[:3]]
    targets = type(targets)(*some, counts)
    net = Net()
    step = DistributedDataParallel(net) if rank < 2 else net
    loss = DetectionLoss(Matcher(), weights=MIXED, nwd_constant=C)
    value = None
    for _ in range(2):
        net.zero_grad()
        value = loss(step(row[pick], (torch.arange(6) % 2 == 0).expand(len(pick), -1)), targets, SIZE)
        value["loss"].backward()
    assert value is not None
    alone = loss.eval()(net(row[pick], (torch.arange(6) % 2 == 0).expand(len(pick), -1)), targets, SIZE)
    return [p.grad for p in net.parameters()], value["loss"].detach(), alone["loss"].detach()


def test_two_processes_of_which_one_has_no_boxes_agree_with_one(tmp_path):
    (first, loss0, _), (second, loss1, alone) = in_two_processes(unequal, tmp_path)
    expected, whole, _ = unequal(2)
    assert ((loss0 + loss1) / 2).item() == pytest.approx(whole.item(), rel=1e-5)
    assert alone.item() == pytest.approx(4 * loss1.item(), rel=1e-5)  # by 1 rather than by the mean of 8 and 0
    for a, b, c in zip(first, second, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-6)
        assert c.any()


def test_refusals():
    refused(lambda: DetectionLoss(Matcher(), weights={"iou": 1.0}), "loss", "'iou'", "class, l1, giou, nwd")
    refused(lambda: DetectionLoss(Matcher(), weights={"l1": -1.0}), "l1", "-1")
    refused(lambda: DetectionLoss(Matcher(), auxiliary=math.inf), "auxiliary")
    refused(lambda: DetectionLoss(Matcher(), weights={"class": 0.0}), "class")
    refused(lambda: DetectionLoss(Matcher(), weights={"l1": 0.0, "giou": 0.0}), "l1, giou and nwd")
    refused(lambda: DetectionLoss(Matcher(), weights={"nwd": 1.0}), "loss", "nwd_constant")
    refused(lambda: DetectionLoss(Matcher(), class_kind="ce"), "class_kind", "'ce'")
