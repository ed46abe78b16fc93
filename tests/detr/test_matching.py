"""The assignment against a loop over stages and images with the textbook formulas; crowded, empty and broken input."""

import copy
import pickle
import threading
import time
import weakref

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import ops

from lit_cli.errors import InputError
from lit_detr import matching
from lit_detr.matching import ClassTerm, Matcher, stack_stages
from lit_detr.samples import Output, pack_targets
from tests.helpers.errors import refused

SIZE = (256, 320)
K = 4


def random_boxes(*shape, g):
    return torch.cat((torch.rand(*shape, 2, generator=g), 0.2 * torch.rand(*shape, 2, generator=g) + 0.005), -1)


def scene(counts, queries=12, stages=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(stages, len(counts), queries, K, generator=g)
    boxes = random_boxes(stages, len(counts), queries, g=g)
    wanted = [random_boxes(n, g=g) for n in counts]
    return logits, boxes, pack_targets(wanted, [torch.randint(0, K, (n,), generator=g) for n in counts])


def class_cost(kind, p, q):
    """As the papers write it: as an object minus as background."""
    log = lambda x: x.clamp_min(1e-30).log()  # noqa: E731
    if kind == "focal":
        return -0.25 * (1 - p) ** 2 * log(p) + 0.75 * p**2 * log(1 - p)
    if kind == "vfl":
        return -q * (q * log(p) + (1 - q) * log(1 - p)) + 0.75 * p**2 * log(1 - p)
    return -(q**1.5 * log(p) + (1 - q**1.5) * log(1 - p)) + p**1.5 * log(1 - p)


def slow_matches(logits, boxes, targets, kind="focal", weights=(2, 5, 2, 0), constant=12.0):
    """Query by target row of every stage and image, one by one in float64."""
    scale = torch.tensor([SIZE[1], SIZE[0], SIZE[1], SIZE[0]], dtype=torch.float64)
    found = {}
    for s in range(len(logits)):
        for b, n in enumerate(targets.counts):
            x, y, labels = boxes[s, b].double(), targets.boxes[b, :n].double(), targets.labels[b, :n]
            corners = [ops.box_convert(z, "cxcywh", "xyxy") for z in (x, y)]
            p = logits[s, b].double().sigmoid()[:, labels]
            gap = (x[:, None] - y) * scale
            gap[..., 2:] /= 2
            cost = weights[0] * class_cost(kind, p, ops.box_iou(*corners)) + weights[1] * torch.cdist(x, y, p=1)
            cost -= weights[2] * ops.generalized_box_iou(*corners)
            cost -= weights[3] * torch.exp(-gap.norm(dim=-1) / constant)
            rows, columns = linear_sum_assignment(cost)
            found[s, b] = dict(zip(columns.tolist(), rows.tolist(), strict=True))
    return found


def unpacked(matches):
    stages, batch, _ = matches.query.shape
    pairs = {}
    for s in range(stages):
        for b in range(batch):
            n = matches.counts[b]
            rows = matches.target[s, b, :n].tolist()
            assert rows == sorted(set(rows))
            pairs[s, b] = dict(zip(rows, matches.query[s, b, :n].tolist(), strict=True))
            assert len(set(pairs[s, b].values())) == n
    return pairs


@pytest.mark.parametrize("kind", ["focal", "vfl", "mal"])
@pytest.mark.parametrize("nwd", [0.0, 3.0])
def test_equals_a_loop_with_the_textbook_formulas(kind, nwd):
    matcher = Matcher(class_kind=kind, nwd=nwd, nwd_constant=12.0 if nwd else None)
    for seed in range(3):
        case = scene([3, 0, 12, 1, 7], seed=seed)
        matches = matcher(*case, SIZE)
        assert unpacked(matches) == slow_matches(*case, kind=kind, weights=(2, 5, 2, nwd))
        assert matches.valid.sum(1).tolist() == matches.counts == [3, 0, 12, 1, 7]
        assert not matches.query[:, 1].any()


@pytest.mark.parametrize("weights", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)])
def test_every_cost_alone(weights):
    names = ("class_cost", "l1", "giou", "nwd")
    matcher = Matcher(**dict(zip(names, map(float, weights), strict=True)), nwd_constant=30.0)
    case = scene([4, 2], seed=5)
    assert unpacked(matcher(*case, SIZE)) == slow_matches(*case, weights=weights, constant=30.0)


def test_more_boxes_than_queries_up_to_700():
    case = scene([700, 12, 40, 0], queries=24, stages=2)
    matches = Matcher()(*case, SIZE)
    assert matches.query.shape == (2, 4, 24)
    assert matches.counts == matches.lengths.tolist() == [24, 12, 24, 0]
    assert unpacked(matches) == slow_matches(*case)


def test_700_boxes_of_as_many_queries():
    case = scene([700], queries=720, stages=1)
    assert unpacked(Matcher(memory_mib=8)(*case, SIZE)) == slow_matches(*case)


def test_no_boxes_at_all():
    matches = Matcher()(*scene([0, 0]), SIZE)
    assert matches.query.shape == (3, 2, 12)
    assert matches.counts == [0, 0]
    assert not matches.valid.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_broken_predictions_are_taken_last(bad):
    logits, boxes, targets = scene([5, 3])
    logits[0, 0, :6], boxes[1, 0, :6] = bad, bad
    matches = Matcher(nwd=1.0, nwd_constant=9.0)(logits, boxes, targets, SIZE)
    assert len(unpacked(matches)) == 6
    assert matches.query[1, 0, :5].min() >= 6
    if bad != bad:
        assert matches.query[0, 0, :5].min() >= 6
    unpacked(Matcher()(torch.full_like(logits, bad), torch.full_like(boxes, bad), targets, SIZE))


def test_parts_and_threads_do_not_change_it(monkeypatch):
    monkeypatch.setattr(matching, "CELLS", 1)
    case = scene([9, 4, 0, 12, 1])
    whole = Matcher(workers=1)(*case, SIZE)
    for matcher in (Matcher(memory_mib=1e-6), Matcher(memory_mib=0.05, workers=3), Matcher(workers=8)):
        assert torch.equal(matcher(*case, SIZE).query, whole.query)


class Memory(TorchDispatchMode):
    """Bytes of the tensors alive at a time, but for memory set aside for the host."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = [x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)]
        fresh = isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in inputs
        if fresh and func is not torch.ops.aten.empty.memory_format:
            size = out.untyped_storage().nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(out, self.freed, size)
        return out

    def freed(self, size):
        self.now -= size


@pytest.mark.parametrize("count", [20, 300])
def test_device_memory_stays_in_its_budget(count):
    matcher = Matcher(memory_mib=4, class_kind="mal", nwd=1.0, nwd_constant=9.0)
    case = scene([count] * 4, queries=300)
    with Memory() as memory:
        matcher(*case, SIZE)
    assert 2 * 2**20 < memory.peak < 4 * 2**20


def test_costs_are_float32_from_bf16_under_autocast():
    logits, boxes, targets = scene([6, 2])
    logits = logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        matches = Matcher()(logits, boxes, targets, SIZE)
    assert unpacked(matches) == slow_matches(logits, boxes, targets)


def test_other_work_goes_on_until_the_result_is_asked_for(monkeypatch):
    gate, solve = threading.Event(), matching._solve

    def late(*args):
        assert gate.wait(20)
        solve(*args)

    monkeypatch.setattr(matching, "_solve", late)
    pending = Matcher().start(*scene([3, 2]), SIZE)
    time.sleep(0.01)
    assert not any(job.done() for job in pending._jobs)
    gate.set()
    matches = pending.result()
    assert matches.counts == [3, 2]
    assert pending.result() is matches


def test_a_failure_in_a_thread_is_not_lost(monkeypatch):
    monkeypatch.setattr(matching, "linear_sum_assignment", lambda costs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Matcher()(*scene([3]), SIZE)


def test_predictions_need_no_gradient_and_threads_are_kept():
    logits, boxes, targets = scene([3])
    matcher = copy.deepcopy(pickle.loads(pickle.dumps(Matcher(workers=3))))
    before = matching._pool(3)
    assert not matcher(logits.requires_grad_(), boxes.requires_grad_(), targets, SIZE).query.requires_grad
    assert matching._pool(3) is before


def test_stages():
    logits, boxes, _ = scene([0, 0], stages=4)
    stacked = stack_stages(Output(logits[:3], boxes[:3], logits[3], boxes[3]))
    assert torch.equal(stacked[0], logits)
    assert torch.equal(stacked[1], boxes)


def test_class_terms_are_the_formulas_with_their_signs():
    x, q = torch.linspace(-6, 6, 25, dtype=torch.float64), torch.linspace(0, 1, 25, dtype=torch.float64)
    p = x.sigmoid()
    for kind in ("focal", "vfl", "mal"):
        term = ClassTerm(kind)
        torch.testing.assert_close(term.positive(x, q) - term.negative(x), class_cost(kind, p, q), atol=1e-8, rtol=1e-6)
        assert (term.negative(x) >= 0).all()
        assert (term.positive(x, q) >= 0).all()
    for target in (0.0, 1.0):
        expected = ops.sigmoid_focal_loss(x, torch.full_like(x, target))
        value = ClassTerm("focal").positive(x, q) if target else ClassTerm("focal").negative(x)
        torch.testing.assert_close(value, expected)


def test_mal_at_a_point():
    # q = 0.64, gamma 1.5: q^gamma = 0.512; p = 0.8.
    x, q = torch.tensor(0.8 / 0.2).log(), torch.tensor(0.64)
    term = ClassTerm("mal")
    assert term.positive(x, q).item() == pytest.approx(0.512 * 0.22314355 + 0.488 * 1.60943791, rel=1e-5)
    assert term.negative(x).item() == pytest.approx(0.71554175 * 1.60943791, rel=1e-5)
    # A pair without overlap still pushes the score down, unlike varifocal.
    assert term.positive(x, torch.tensor(0.0)).item() == pytest.approx(1.60943791, rel=1e-5)
    assert ClassTerm("vfl").positive(x, torch.tensor(0.0)).item() == 0


def test_refusals():
    refused(lambda: Matcher(l1=-1.0), "matcher", "l1", "-1")
    refused(lambda: Matcher(giou=float("nan")), "giou")
    refused(lambda: Matcher(class_cost=0.0, l1=0.0, giou=0.0), "matcher", "all costs")
    refused(lambda: Matcher(nwd=1.0), "matcher", "nwd_constant")
    refused(lambda: Matcher(nwd_constant=0.0), "nwd_constant")
    refused(lambda: Matcher(memory_mib=0), "memory_mib")
    refused(lambda: Matcher(workers=0), "workers")
    refused(lambda: ClassTerm("softmax"), "class_kind", "softmax", "focal, vfl, mal")
    refused(lambda: ClassTerm("focal", alpha=1.5), "alpha")
    refused(lambda: ClassTerm("mal", gamma=0.5), "gamma")
    with pytest.raises(InputError):
        ClassTerm("mal", alpha=float("nan"))
