"""The network: shapes, selection, padding, denoising, precision, compilation."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from lit_cli.errors import InputError
from lit_detr.models import CORES, build_network, query_budget
from lit_detr.models.backbone import Backbone
from lit_detr.models.denoising import Denoising, attention_bias
from lit_detr.models.geometry import level_masks, refine, sine_positions
from lit_detr.models.selection import level_limits, select
from lit_detr.samples import Targets, pack_targets

TINY = {"num_classes": 3, "backbone": "resnet10t", "hidden": 32, "heads": 4, "feedforward": 64, "noise_queries": 24}
COARSE, ALL = (8, 16, 32), (4, 8, 16, 32)


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    net = build_network(**{**TINY, **options})
    for head in [net.selection.box, *net.decoder.box_heads]:  # else no box would ever move
        nn.init.normal_(head.last.weight, std=0.02)
    nn.init.normal_(net.selection.score.weight)  # else all scores would be nearly equal
    return net


def some_targets(*counts, seed=0):
    g = torch.Generator().manual_seed(seed)
    centres = [torch.cat([torch.rand(n, 2, generator=g), torch.rand(n, 2, generator=g) * 0.2], 1) for n in counts]
    return pack_targets(centres, [torch.randint(3, (n,), generator=g) for n in counts])


@pytest.fixture(scope="module")
def net():
    return tiny(strides=ALL)


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(5))


# ----------------------------------------------------------------------------------------------------- shapes


def test_parameters_are_those_of_the_class():
    with torch.device("meta"):
        net = build_network(num_classes=80)
        fine = build_network(num_classes=80, strides=ALL)
    millions = [sum(p.numel() for p in n.parameters()) / 1e6 for n in (net, fine)]
    assert millions == [pytest.approx(19.73, abs=0.01), pytest.approx(19.89, abs=0.01)]  # RT-DETRv2-R18: 20


@pytest.mark.parametrize("strides", [COARSE, ALL, (16, 32), (4, 8, 16)])
@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (0, 0)])
def test_output_of_training_and_evaluation(strides, counts, images):
    net = tiny(strides=strides)
    out = net(images, None, some_targets(*counts), 18)
    assert out.logits.shape == (3, 2, 18, 3)
    assert out.boxes.shape == (3, 2, 18, 4)
    assert out.encoder_logits.shape == (2, 18, 3)
    assert out.noise_logits.shape == (3, 2, 24, 3)
    assert out.noise_boxes.shape == (3, 2, 24, 4)
    assert out.noise_target.shape == out.noise_positive.shape == (2, 24)
    assert all(torch.isfinite(t).all() for t in out)
    sum(t.float().mean() for t in out if t.is_floating_point()).backward()
    without = [n for n, p in net.named_parameters() if p.grad is None]
    assert without == []
    with torch.no_grad():
        out = net.eval()(images, None, some_targets(*counts), 18)
    assert out.logits.shape == (3, 2, 18, 3)
    assert out.noise_logits is None
    assert net(images[:1]).logits.shape[2] == min(300, sum((64 // s) * (96 // s) for s in strides))


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "hgnetv2_b0", "convnext_tiny", "swin_tiny_patch4_window7_224"]
)
@pytest.mark.parametrize("strides", [ALL, (4, 8, 16)])
def test_backbones_give_the_strides(name, strides):
    if name.startswith("swin"):
        body, side = Backbone(name, in_channels=5, strides=strides), 224
    else:
        with torch.device("meta"):
            body, side = Backbone(name, in_channels=5, strides=strides), 64
    device = next(body.parameters()).device
    with torch.no_grad():
        maps = body.eval()(torch.zeros(1, 5, side, side, device=device))
    assert [m.shape for m in maps] == [
        (1, c, side // s, side // s) for c, s in zip(body.channels, strides, strict=True)
    ]


def test_weights_from_a_file(tmp_path):
    source = Backbone("resnet10t", in_channels=3)
    path = tmp_path / "weights.pth"
    torch.save({f"{n}": t for n, t in source.net.state_dict().items()}, path)
    grey = Backbone("resnet10t", in_channels=1, pretrained=str(path))
    assert torch.equal(grey.net.layer1[0].conv1.weight, source.net.layer1[0].conv1.weight)
    first = next(n for n, t in source.net.state_dict().items() if t.ndim == 4 and t.shape[1] == 3)
    torch.testing.assert_close(grey.net.state_dict()[first], source.net.state_dict()[first].sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet19"}, "model.backbone: timm has no model 'resnet19'"),
        ({"backbone": "vit_tiny_patch16_224"}, "model.backbone: vit_tiny_patch16_224 has strides"),
        ({"pretrained": "/nowhere.pth"}, "model.pretrained: no file /nowhere.pth"),
        ({"strides": (8, 32)}, "model.strides"),
        ({"strides": (4, 8)}, "model.strides"),
        ({"hidden": 20}, "model.hidden"),
        ({"noise_queries": 25}, "model.noise_queries"),
        ({"quota": (0.5, 0.6)}, "model.quota"),
        ({"prior_sizes": [8.0]}, "model.prior_sizes"),
        ({"core": "cuda"}, "model.core"),
        ({"num_classes": 0}, "num_classes"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(InputError, match=message):
        build_network(**{**TINY, **options})


def test_a_size_that_does_not_fit_is_refused(net):
    with pytest.raises(ValueError, match="multiples of 32, got 64 x 90"):
        net(torch.zeros(1, 3, 64, 90))


# ----------------------------------------------------------------------------------------------------- queries


@pytest.mark.parametrize(
    ("counts", "options", "expected"),
    [
        ([0], {}, 300),
        ([200, 3], {}, 300),
        ([201], {}, 450),
        ([500], {}, 750),
        ([9999], {}, 1500),
        ([500], {"maximum": 600}, 600),
        ([40], {"minimum": 50}, 100),
        ([10], {"minimum": 50}, 50),
        ([10], {"minimum": 20, "maximum": 20}, 20),
        ([510], {"maximum": 800}, 800),
    ],
)
def test_query_budget(counts, options, expected):
    assert query_budget(counts, **options) == expected


def greedy(scores, shapes, queries, quota):
    """What is sure first, then the best of the rest while its level has room."""
    queries, least, most = level_limits(shapes, queries, quota)
    level = np.repeat(range(len(shapes)), [h * w for h, w in shapes])
    taken, used = [], [0] * len(shapes)
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    for sure in (True, False):
        for i in order:
            limit = least if sure else most
            if i not in taken and used[level[i]] < limit[level[i]] and len(taken) < queries:
                taken.append(i)
                used[level[i]] += 1
    return set(taken), used


@pytest.mark.parametrize("seed", range(6))
def test_selection_is_the_greedy_one(seed):
    g = torch.Generator().manual_seed(seed)
    shapes = ((8, 10), (4, 5), (2, 3))
    scores = torch.randn(3, 106, generator=g) + torch.randn(3, 3, generator=g).repeat_interleave(
        torch.tensor([80, 20, 6]), dim=1
    )
    cells, none = select(scores, shapes, 30, (0.1, 0.6))
    assert not none.any()
    for row, values in zip(cells, scores, strict=True):
        assert set(row.tolist()) == greedy(values.tolist(), shapes, 30, (0.1, 0.6))[0]


@pytest.mark.parametrize(("favour", "expected"), [(50.0, 18), (-50.0, 3)])
def test_the_finest_level_neither_takes_all_nor_starves(favour, expected):
    scores = torch.rand(2, 320 + 80 + 20)
    scores[:, :320] += favour
    cells, _ = select(scores, ((16, 20), (8, 10), (4, 5)), 30, (0.1, 0.6))
    assert (cells < 320).sum(1).tolist() == [expected] * 2


@pytest.mark.parametrize("queries", [1, 5, 60, 84, 500])
def test_every_number_of_queries_is_reached_once_each(queries):
    cells, none = select(torch.rand(2, 84), ((8, 8), (4, 4), (2, 2)), queries, (0.05, 0.5))
    assert cells.shape == (2, min(queries, 84))
    assert all(len(set(row.tolist())) == len(row) for row in cells)
    assert not none.any()


# ----------------------------------------------------------------------------------------------------- padding


def detect(net, maps, mask, canvas, queries=20):
    shapes = tuple((canvas[0] // s, canvas[1] // s) for s in net.strides)
    masks = None if mask is None else level_masks(mask, shapes)
    return net._detect(net.encoder(maps, masks), shapes, mask, masks, None, queries)


@pytest.mark.parametrize("core", CORES)
@torch.no_grad()
def test_padding_changes_nothing_behind_the_backbone(core, images):
    net = tiny(strides=ALL, core=core).eval()
    maps = net.backbone(images)
    plain = detect(net, maps, None, (64, 96))
    height, width = 128, 192
    padded = []
    for m, s in zip(maps, ALL, strict=True):
        wide = torch.randn(2, m.shape[1], height // s, width // s) * 50
        wide[..., : m.shape[2], : m.shape[3]] = m
        padded.append(wide)
    mask = torch.zeros(2, height, width, dtype=torch.bool)
    mask[:, :64, :96] = True
    found = detect(net, padded, mask, (height, width))
    torch.testing.assert_close(found.logits, plain.logits, atol=2e-5, rtol=1e-4)
    pixels = torch.tensor([96.0, 64, 96, 64]), torch.tensor([192.0, 128, 192, 128])
    torch.testing.assert_close(found.boxes * pixels[1], plain.boxes * pixels[0], atol=2e-3, rtol=1e-4)


@torch.no_grad()
def test_padded_cells_are_never_proposed(images):
    net = tiny(strides=COARSE).eval()
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[0] = True
    mask[1, :32, :40] = True  # 4 x 5 + 2 x 3 + 1 x 2 = 28 cells
    out = net(images, mask, None, 60)
    alive = out.encoder_logits.amax(-1) > -15
    assert alive.sum(1).tolist() == [60, 28]
    last = out.logits[-1].amax(-1) > -15
    assert torch.equal(last, alive)
    assert torch.isfinite(out.boxes).all()
    # The dead ones are invisible: the others are the same without them.
    fewer = net(images, mask, None, 28)
    found = torch.sort(out.logits[-1, 1][alive[1]].sum(-1))[0]
    torch.testing.assert_close(found, torch.sort(fewer.logits[-1, 1].sum(-1))[0], atol=1e-4, rtol=1e-4)


def test_masks_of_levels():
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[0, :8, :5] = True
    found = [m[0, 0].tolist() for m in level_masks(mask, ((4, 4), (2, 2)))]
    assert found[0] == [[True, True, False, False]] * 2 + [[False] * 4] * 2
    assert found[1] == [[True, False], [False, False]]


def test_positions_do_not_depend_on_the_size_of_the_map():
    small = sine_positions(2, 3, 32, torch.device("cpu")).view(2, 3, 32)
    large = sine_positions(4, 5, 32, torch.device("cpu")).view(4, 5, 32)
    assert torch.equal(small, large[:2, :3])
    assert len({tuple(p) for p in large.flatten(0, 1).tolist()}) == 20


# ----------------------------------------------------------------------------------------------------- denoising


@pytest.mark.parametrize("count", [0, 1, 5, 12, 13, 700])
def test_groups_have_every_box_once_and_a_twin_each(count):
    targets = some_targets(count, 2)
    noise = Denoising(8, 3, queries=24)(targets.boxes, targets.labels, targets.lengths, (640, 640))
    assert noise.boxes.shape == (2, 24, 4)
    row, group, positive = noise.target[0], noise.group[0], noise.positive[0]
    assert torch.equal(row[:12], row[12:])
    assert torch.equal(group[:12], group[12:])
    if count == 0:
        assert (row == -1).all()
        assert not positive.any()
        return
    assert positive.tolist() == [True] * 12 + [False] * 12
    assert row.min() >= 0
    assert row.max() < count
    for g in group.unique():
        members = row[:12][group[:12] == g].tolist()
        assert len(set(members)) == len(members) <= count
    assert len(group.unique()) == -(-12 // count)


@pytest.mark.parametrize(("size", "reach"), [(0.2, 0.1), (0.004, 3 / 640)])
def test_displacement_of_large_and_tiny_boxes(size, reach):
    boxes = torch.tensor([[[0.1, 0.5, size, size]]])
    noise = Denoising(8, 3, queries=2000, floor=3.0)(
        boxes, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, dtype=torch.int64), (640, 640)
    )
    far = (noise.boxes[0, :, :2] - boxes[0, :, :2]).abs().amax(1) / reach
    assert 0.9 < far[:1000].max() <= 1 + 1e-5
    assert 1 - 1e-5 <= far[1000:].min() < 1.2
    assert 1.9 < far[1000:].max() <= 2 + 1e-5
    change = (noise.boxes[0, :, 2:] - size).abs()
    assert change.max() <= reach + 1e-6
    assert change.max() > 0.9 * reach
    assert (noise.boxes[..., 2:] >= 1 / 640 - 1e-7).all()


def test_noise_follows_the_generator_and_the_labels():
    targets = some_targets(5, 2)
    module = Denoising(8, 3, queries=400, label_noise=0.3)

    def draw(seed):
        torch.manual_seed(seed)
        return module(targets.boxes, targets.labels, targets.lengths, (320, 256))

    a, b, c = draw(1), draw(1), draw(2)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a.boxes, c.boxes)
    given = module.embedding(targets.labels.gather(1, a.target))
    changed = (a.content != given).any(-1).float().mean()
    assert 0.1 < changed < 0.3  # a third of the random classes is the right one


def test_who_sees_whom():
    group = torch.tensor([[0, 0, 1, 0, 0, 1], [0, 1, 2, 0, 1, 2]])
    none = torch.tensor([[False, False, False], [False, True, True]])
    bias = attention_bias(group, none, 3, torch.float32)
    assert bias.shape == (2, 1, 9, 9)
    assert bias.stride(2) % 8 == 0
    for b in range(2):
        for i in range(9):
            for j in range(9):
                own_group = i >= 3 and j >= 3 and group[b, i - 3] == group[b, j - 3]
                seen_by_all = j < 3 and not none[b, j]
                assert (bias[b, 0, i, j] == 0) == (i == j or seen_by_all or own_group)
    assert attention_bias(None, None, 3, torch.float32) is None


def test_noise_changes_no_query(net, images):
    net = copy.deepcopy(net).train()
    outs = []
    for seed, counts in [(1, (3, 1)), (2, (3, 1)), (3, (0, 700)), (4, None)]:
        torch.manual_seed(seed)
        outs.append(net(images, None, None if counts is None else some_targets(*counts), 30))
    for out in outs[1:]:
        torch.testing.assert_close(out.boxes, outs[0].boxes, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(out.logits, outs[0].logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(outs[1].noise_boxes, outs[0].noise_boxes, atol=1e-3)


@torch.no_grad()
def test_groups_do_not_see_each_other(net):
    shapes = ((8, 8), (4, 4), (2, 2), (1, 1))
    memory, x = torch.randn(1, 85, 32), torch.randn(1, 10, 32)
    boxes = torch.rand(1, 10, 4) * 0.5 + 0.2
    group = torch.tensor([[0, 0, 1, 1, 1]])
    bias = attention_bias(group, None, 5, torch.float32)
    before = net.decoder(x, boxes, memory, shapes, bias=bias)[1][-1, 0]
    x[:, 5] += 1.0  # of group 0
    change = (net.decoder(x, boxes, memory, shapes, bias=bias)[1][-1, 0] - before).abs().amax(-1)
    assert change[:5].max() < 1e-6
    assert change[5:7].min() > 1e-5
    assert change[7:].max() < 1e-6


# ----------------------------------------------------------------------------------------------------- refinement


@pytest.mark.parametrize("coding", ["relative", "logit"])
def test_a_delta_of_zero_leaves_a_box(coding):
    boxes = torch.rand(20, 4) * 0.8 + 0.1
    torch.testing.assert_close(refine(boxes, torch.zeros(20, 4), coding), boxes)
    extreme = refine(boxes, torch.full((20, 4), 1e4), coding)
    assert torch.isfinite(extreme).all()


def test_gradients_look_forward_twice(images):
    net = tiny(strides=COARSE)
    boxes = net(images, None, None, 12).boxes
    biases = [head.last.bias for head in net.decoder.box_heads]
    reached = [
        [
            g is not None and bool(g.abs().sum() > 0)
            for g in torch.autograd.grad(layer.sum(), biases, retain_graph=True, allow_unused=True)
        ]
        for layer in boxes
    ]
    assert reached == [[True, False, False], [True, True, False], [False, True, True]]
    encoder = torch.autograd.grad(boxes.sum(), net.selection.box.last.bias, allow_unused=True)
    assert encoder == (None,)


def test_initial_probabilities_and_boxes():
    net = build_network(**TINY, prior_probability=0.02, prior_sizes=[10.0, 20.0, 40.0])
    out = net(torch.randn(2, 3, 64, 96), None, None, 30)
    assert out.logits.sigmoid().mean().item() == pytest.approx(0.02, rel=0.2)
    assert out.encoder_logits.sigmoid().mean().item() == pytest.approx(0.02, rel=0.5)
    pixels = out.boxes[-1, ..., 2:] * torch.tensor([96.0, 64.0])
    assert {round(v) for v in pixels.flatten().tolist()} <= {10, 20, 40}
    torch.testing.assert_close(out.boxes[-1], out.encoder_boxes)


# ----------------------------------------------------------------------------------------------------- precision


def test_boxes_keep_their_precision_under_autocast(images):
    net = build_network(**TINY, strides=COARSE).train()
    third_of_a_pixel = 0.3 / 32  # of the prior box's side at stride 8
    for head in net.decoder.box_heads:
        nn.init.constant_(head.last.bias, third_of_a_pixel)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(images, None, some_targets(4, 0), 24)
    assert out.logits.dtype == torch.bfloat16
    assert out.boxes.dtype == out.encoder_boxes.dtype == out.noise_boxes.dtype == torch.float32
    expected = refine(out.encoder_boxes, torch.full((4,), third_of_a_pixel))
    torch.testing.assert_close(out.boxes[0], expected, atol=1e-6, rtol=0)
    out.encoder_logits.sum().backward()
    assert net.selection.score.weight.grad.abs().sum() > 0  # the ungraded scores share their weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_cores_give_the_same_detections(net, images, dtype):
    net = copy.deepcopy(net).eval()
    mask = torch.ones(2, 64, 96, dtype=torch.bool)
    mask[:, :, 64:] = False
    outs = []
    for core in CORES:
        net.set_core(core)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            outs.append(net(images, mask, None, 30))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for out in outs[1:]:
        torch.testing.assert_close(out.boxes, outs[0].boxes, atol=tolerance, rtol=0)
        torch.testing.assert_close(out.logits.float(), outs[0].logits.float(), atol=tolerance * 10, rtol=0)
    with pytest.raises(InputError, match="expected one of"):
        net.set_core("cuda")


# ----------------------------------------------------------------------------------------------------- checkpoints


@torch.no_grad()
def test_state_loads_without_fine_level_and_denoising(net, images):
    net = copy.deepcopy(net).eval()
    less = build_network(**{**TINY, "noise_queries": 0}, strides=COARSE).eval()
    less.load_state_dict(net.state_dict(), strict=True)
    assert not less.denoising.embedding.weight.requires_grad
    again = build_network(**TINY, strides=ALL)
    again.load_state_dict(net.state_dict(), strict=True)
    # The stride-4 map is a leaf: the maps of the other levels are the same without it.
    maps = net.encoder(net.backbone(images))
    for a, b in zip(less.encoder(less.backbone(images)), maps[1:], strict=True):
        torch.testing.assert_close(a, b)
    assert less(images, None, None, 20).boxes.shape == (3, 2, 20, 4)
    with pytest.raises(RuntimeError, match=r"encoder\.fine"):
        again.load_state_dict(less.state_dict(), strict=True)


def test_recomputation_gives_equal_gradients_and_statistics(images):
    targets = some_targets(3, 0)
    results = []
    for checkpointing in (False, True):
        net = tiny(strides=ALL, gradient_checkpointing=checkpointing, decoder_layers=2).train()
        torch.manual_seed(1)
        out = net(images, None, targets, 20)
        (out.boxes.sum() + out.logits.square().sum() + out.noise_boxes.square().sum()).backward()
        results.append(({n: p.grad for n, p in net.named_parameters()}, dict(net.named_buffers())))
    (grads, buffers), (grads2, buffers2) = results
    for name, grad in grads.items():
        if grad is not None:
            torch.testing.assert_close(grads2[name], grad, msg=name)
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffers2[name], buffer, msg=name)


# ----------------------------------------------------------------------------------------------------- speed


class NoReadBack(TorchDispatchMode):
    """What makes the host wait for the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique2"), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("core", CORES)
def test_nothing_is_read_back_from_the_device(net, images, core):
    net = copy.deepcopy(net).train()
    net.set_core(core)
    mask = torch.ones(2, 64, 96, dtype=torch.bool)
    with NoReadBack():
        out = net(images, mask, some_targets(3, 0), 30)
        out.boxes.sum().backward()


def test_forward_knows_no_values():
    with torch.device("meta"):
        net = build_network(num_classes=4, strides=ALL).train()
        targets = Targets(
            torch.empty(2, 32, 4), torch.empty(2, 32, dtype=torch.int64), torch.empty(2, dtype=torch.int64), [3, 0]
        )
        out = net(torch.empty(2, 3, 256, 320), torch.ones(2, 256, 320, dtype=torch.bool), targets, 450)
    assert out.boxes.shape == (3, 2, 450, 4)
    assert out.noise_boxes.shape == (3, 2, 200, 4)


def test_one_graph_for_all_counts(images):
    net = tiny(strides=(8, 16), decoder_layers=1, fusion_depth=1, backbone="test_resnet").train()
    counter = CompileCounter()  # runs the graph as it is
    compiled = torch.compile(net, fullgraph=True, dynamic=False, backend=counter)
    for counts in [(3, 1), (0, 0), (30, 2)]:
        torch.manual_seed(0)
        found = compiled(images, None, some_targets(*counts), 20)
        torch.manual_seed(0)
        expected = net(images, None, some_targets(*counts), 20)
        torch.testing.assert_close(found.boxes, expected.boxes, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.noise_boxes, expected.noise_boxes, atol=1e-5, rtol=1e-4)
    assert counter.frame_count == 1
    found.boxes.sum().backward()


@torch.no_grad()
def test_channels_last_changes_no_result(images):
    plain, last = tiny(strides=ALL).eval(), tiny(strides=ALL, channels_last=True).eval()
    assert last.encoder.fine.pointwise.conv.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        last(images, None, None, 30).boxes, plain(images, None, None, 30).boxes, atol=1e-4, rtol=1e-3
    )


def test_constants_made_in_inference_serve_training():
    net = tiny(strides=COARSE)
    images = torch.randn(1, 3, 96, 32)  # a shape of no other test
    with torch.inference_mode():
        net.eval()(images)
    net.train()(images, None, None, 5).boxes.sum().backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("core", CORES)
def test_no_waiting_on_cuda(core):
    net = build_network(num_classes=4, strides=ALL, core=core).cuda().train()
    images = torch.randn(2, 3, 256, 320, device="cuda")
    targets = some_targets(40, 0).to(torch.device("cuda"))
    for mode in ("default", "error"):  # the first run makes the constants
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", torch.bfloat16):
                out = net(images, None, targets, 300)
            (out.boxes.sum() + out.logits.float().sum()).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
