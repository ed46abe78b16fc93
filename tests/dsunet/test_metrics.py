import math
import os
import pickle
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import MetricCollection

from lit_cli.errors import InputError
from lit_dsunet import components, measures, metrics
from tests.helpers.distributed import in_two_processes

CLASSES = (metrics.CaseDice, metrics.CaseHD95, metrics.LesionMetrics)
STRUCTURES = {6: 1, 18: 2, 26: 3}


# Slow references: one pass over the volume per component or pair, as the challenges' own scripts go


def reference_lesions(prediction, target, match, threshold=0.2, connectivity=26):
    """tp, fp, fn and a list of (size, found) per lesion of the target."""
    structure = ndimage.generate_binary_structure(3, STRUCTURES[connectivity])
    labelled, n_target = ndimage.label(target, structure)
    predicted, n_pred = ndimage.label(prediction, structure)
    sizes = [int((labelled == t).sum()) for t in range(1, n_target + 1)]
    if match == "any":
        found = [bool((prediction[labelled == t] != 0).any()) for t in range(1, n_target + 1)]
        fp = sum(not (target[predicted == p] != 0).any() for p in range(1, n_pred + 1))
    else:
        pairs = []
        for p, t in product(range(1, n_pred + 1), range(1, n_target + 1)):
            a, b = predicted == p, labelled == t
            pairs.append(((a & b).sum() / (a | b).sum(), p, t))
        found, taken = [False] * n_target, set()
        for iou, p, t in sorted(pairs, key=lambda pair: -pair[0]):
            if iou >= threshold and p not in taken and not found[t - 1]:
                taken.add(p)
                found[t - 1] = True
        fp = n_pred - len(taken)
    return sum(found), fp, n_target - sum(found), n_target, n_pred, sizes, found


def reference_hd95(a, b, spacing, convention="max", percentile=95):
    """By distance maps and erosion."""

    def surface(mask):
        return mask & ~ndimage.binary_erosion(mask)

    edges = surface(a != 0), surface(b != 0)
    maps = [ndimage.distance_transform_edt(~edge, spacing) for edge in edges]
    ways = maps[1][edges[0]], maps[0][edges[1]]
    if convention == "pooled":
        return np.percentile(np.concatenate(ways), percentile)
    return max(np.percentile(way, percentile) for way in ways)


def reference_dice(prediction, target, index, empty):
    both = total = 0
    for p, t in zip(prediction.ravel().tolist(), target.ravel().tolist(), strict=True):
        both += p == index == t
        total += (p == index) + (t == index)
    return 2 * both / total if total else empty


# Masks


def blobs(seed, shape=(14, 22, 19), count=7):
    """Balls of random size, some of one voxel, some at the border."""
    rng = np.random.default_rng(seed)
    grid = np.indices(shape)
    mask = np.zeros(shape, dtype=np.uint8)
    for _ in range(count):
        centre = rng.integers(0, shape)
        mask[((grid - centre.reshape(3, 1, 1, 1)) ** 2).sum(0) <= rng.choice([0, 1, 2, 4, 9])] = 1
    return mask


def perturbations(mask, seed=0):
    """Predictions as a network would make them wrong."""
    rng = np.random.default_rng(seed)
    labelled, number = ndimage.label(mask, np.ones((3, 3, 3)))
    split = mask.copy()
    split[:, ::3] = 0
    extra = mask.copy()
    extra[tuple(rng.integers(0, mask.shape, (5, 3)).T)] = 1
    return {
        "same": mask,
        "shifted": np.roll(mask, (1, 1, -1), (0, 1, 2)),
        "shifted in x": np.roll(mask, 1, 2),
        "dropped": mask * (labelled > number // 2).astype(np.uint8),
        "merged": ndimage.binary_dilation(mask, iterations=2).astype(np.uint8),
        "split": split,
        "extra": extra,
        "thinned": mask * (rng.random(mask.shape) < 0.6).astype(np.uint8),
        "noise": (rng.random(mask.shape) < 0.1).astype(np.uint8),
        "empty": np.zeros_like(mask),
        "full": np.ones_like(mask),
    }


def pairs():
    for seed in range(2):
        target = blobs(seed)
        for name, prediction in perturbations(target, seed).items():
            yield pytest.param(prediction, target, id=f"{name}-{seed}")
            if name in ("empty", "full", "noise"):
                yield pytest.param(target, prediction, id=f"{name} target-{seed}")
    nothing = np.zeros((3, 4, 5), dtype=np.uint8)
    yield pytest.param(nothing, nothing, id="both empty")
    corner = nothing.copy()
    corner[-1, -1, -1] = 1
    yield pytest.param(corner, corner, id="one voxel in the corner")


# Components


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 1000, 1003])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.6, 1.0])
def test_foreground_equals_numpy(size, density):
    bits = np.random.default_rng(size).random(size) < density
    expected = np.flatnonzero(bits)
    for dtype in (bool, np.uint8, np.int8, np.int16, np.int64):
        np.testing.assert_array_equal(components.foreground((bits * 3).astype(dtype)), expected)
        np.testing.assert_array_equal(components.foreground(torch.from_numpy((bits * 3).astype(dtype))), expected)


def test_foreground_of_views_is_in_reading_order():
    mask = blobs(0)
    for view in (mask.transpose(2, 0, 1), mask[::2, 1:, ::-1], np.asfortranarray(mask)):
        np.testing.assert_array_equal(components.foreground(view), np.flatnonzero(view.copy(order="C")))
    tensor = torch.from_numpy(mask).permute(2, 0, 1)
    np.testing.assert_array_equal(components.foreground(tensor), np.flatnonzero(tensor.contiguous().numpy()))


@pytest.mark.parametrize("connectivity", [6, 18, 26])
@pytest.mark.parametrize("shape", [(9, 11, 13), (1, 17, 16), (12, 1, 7), (8, 9, 1), (1, 1, 1)])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.2, 0.5, 0.9, 1.0])
def test_components_are_numbered_as_by_scipy(shape, density, connectivity):
    mask = np.random.default_rng(7).random(shape) < density
    expected, number = ndimage.label(mask, ndimage.generate_binary_structure(3, STRUCTURES[connectivity]))
    found = components.find_components(components.foreground(mask), shape, connectivity)
    np.testing.assert_array_equal(found.labels + 1, expected[mask])
    assert len(found) == number
    np.testing.assert_array_equal(found.sizes, np.bincount(expected[mask], minlength=number + 1)[1:])


@pytest.mark.parametrize("voxels", [((0, 0, 4), (0, 1, 0)), ((0, 2, 4), (1, 0, 0)), ((0, 2, 1), (1, 0, 1))])
def test_ends_of_lines_and_slices_do_not_touch_the_next(voxels):
    mask = np.zeros((2, 3, 5), dtype=bool)
    mask[tuple(np.transpose(voxels))] = True
    assert len(components.find_components(components.foreground(mask), mask.shape)) == 2


# Lesions


@pytest.mark.parametrize(("prediction", "target"), pairs())
@pytest.mark.parametrize(("match", "threshold"), [("any", 0.2), ("iou", 0.2), ("iou", 1.0)])
def test_lesions_equal_a_loop(prediction, target, match, threshold):
    counts = metrics.lesions(prediction, target, match, threshold)
    tp, fp, fn, n_target, n_pred, sizes, found = reference_lesions(prediction, target, match, threshold)
    assert (counts.tp, counts.fp, counts.fn, counts.n_target, counts.n_pred) == (tp, fp, fn, n_target, n_pred)
    assert counts.sizes.tolist() == sizes
    assert counts.found.tolist() == found
    assert counts.pred_voxels == prediction.sum()
    assert metrics.lesion_count_difference(prediction, target) == abs(n_target - n_pred)


@pytest.mark.parametrize("connectivity", [6, 18])
@pytest.mark.parametrize("match", ["any", "iou"])
def test_lesions_of_other_connectivities_equal_a_loop(match, connectivity):
    target = blobs(5)
    for prediction in perturbations(target).values():
        counts = metrics.lesions(prediction, target, match, connectivity=connectivity)
        expected = reference_lesions(prediction, target, match, connectivity=connectivity)
        assert (counts.tp, counts.fp, counts.fn, counts.n_target, counts.n_pred) == expected[:5]
        assert counts.found.tolist() == expected[6]


def lines(*text):
    """(1, lines, characters) mask of what is no dot."""
    return np.array([[[c != "." for c in line] for line in text]])


def test_equality_reaches_the_iou_threshold():
    target, prediction = lines("aaaaa..."), lines("a.......")
    assert metrics.lesions(prediction, target, "iou", 0.2).tp == 1
    assert metrics.lesions(prediction, target, "iou", 0.2001).tp == 0


def test_editions_differ_where_one_prediction_covers_two_lesions():
    target, prediction = lines("aaaa.bbb", "........"), lines("cccccccc", "........")
    any_touch, one_to_one = (metrics.lesions(prediction, target, match) for match in ("any", "iou"))
    assert (any_touch.tp, any_touch.fp, any_touch.fn) == (2, 0, 0)
    assert (one_to_one.tp, one_to_one.fp, one_to_one.fn) == (1, 0, 1)
    assert one_to_one.found.tolist() == [True, False]  # the larger overlap


def test_one_to_one_goes_by_falling_overlap():
    """The best pair is taken first, though it leaves the second lesion without partner."""
    target = lines("aaaa.bb")
    prediction = lines("ccccccc")
    assert metrics.lesions(prediction, target, "iou", 0.2).found.tolist() == [True, False]
    two = metrics.lesions(lines("cc.cccc"), target, "iou", 0.2)
    assert (two.tp, two.found.tolist()) == (2, [True, True])


@pytest.mark.parametrize(
    ("options", "word"),
    [({"match": "best"}, "match"), ({"threshold": 0}, "threshold"), ({"connectivity": 8}, "connectivity")],
)
def test_wrong_lesion_options_are_named(options, word):
    mask = blobs(0)
    with pytest.raises(InputError, match=word):
        metrics.lesions(mask, mask, **options)
    with pytest.raises(InputError, match=word):
        metrics.LesionMetrics(**options)


def test_probabilities_and_other_shapes_are_refused():
    mask = blobs(0)
    for function in (metrics.dice, metrics.lesions, lambda a, b: metrics.hd95(a, b, (1, 1, 1))):
        with pytest.raises(ValueError, match="float32"):
            function(mask.astype(np.float32), mask)
        with pytest.raises(ValueError, match=r"\(14, 22, 19\).*\(14, 22, 18\)"):
            function(mask, mask[..., 1:])
    with pytest.raises(ValueError, match=r"target of torch.float16"):
        metrics.lesions(torch.from_numpy(mask), torch.from_numpy(mask).half())


# Dice, distances, volumes


@pytest.mark.parametrize("empty", [1.0, math.nan])
def test_dice_equals_a_loop(empty):
    rng = np.random.default_rng(0)
    masks = rng.integers(0, 4, (2, 4, 5, 6))
    masks[masks == 2] = 0  # a class that neither has
    for dtype in (np.uint8, np.int64):
        values = metrics.dice(*masks.astype(dtype), num_classes=5, empty=empty)
        expected = [reference_dice(*masks, index, empty) for index in range(1, 5)]
        np.testing.assert_array_equal(values.numpy(), expected)
        assert values.dtype == torch.float64


@pytest.mark.parametrize(("prediction", "target"), pairs())
def test_binary_dice_equals_a_loop(prediction, target):
    expected = reference_dice(prediction, target, 1, 1.0)
    assert metrics.dice(prediction, target).tolist() == [expected]
    assert metrics.dice(prediction.astype(bool), target.astype(bool)).tolist() == [expected]


@pytest.mark.parametrize(("prediction", "target"), pairs())
@pytest.mark.parametrize("convention", ["max", "pooled"])
@pytest.mark.parametrize("dense", [0, math.inf])
def test_hd95_equals_distance_maps(prediction, target, convention, dense, monkeypatch):
    monkeypatch.setattr(measures, "DENSE", dense)  # each of the two ways for all masks
    spacing = (5.0, 0.7, 1.3)
    value = metrics.hd95(prediction, target, spacing, convention, both_empty=-1, one_empty=-2)
    if prediction.any() and target.any():
        assert value == pytest.approx(reference_hd95(prediction, target, spacing, convention), rel=1e-12, abs=1e-12)
    else:
        assert value == (-2 if prediction.any() or target.any() else -1)


def test_hausdorff_distance_itself_and_defaults():
    a, b = blobs(1), blobs(2)
    expected = reference_hd95(a, b, (1, 1, 2), percentile=100)
    assert metrics.hd95(a, b, (1, 1, 2), percentile=100) == pytest.approx(expected, rel=1e-12)
    assert math.isnan(metrics.hd95(a, b * 0, (1, 1, 1)))
    with pytest.raises(InputError, match="convention"):
        metrics.hd95(a, b, (1, 1, 1), "mean")


@pytest.mark.parametrize("spacing", [(1, 1), (1, 1, 0), (1, math.nan, 1), (1, 1, -1), 2.0])
def test_spacings_that_are_none_are_refused(spacing):
    mask = blobs(0)
    for function in (metrics.hd95, metrics.volume_difference_ml):
        with pytest.raises(InputError, match="spacing"):
            function(mask, mask, spacing)


@pytest.mark.parametrize(("prediction", "target"), pairs())
def test_volume_difference(prediction, target):
    expected = abs(int(prediction.sum()) - int(target.sum())) * 0.5 * 2 * 3 / 1000
    assert metrics.volume_difference_ml(prediction, target, torch.tensor([0.5, 2, 3])) == pytest.approx(expected)


# As metrics


def cases():
    """(prediction, target, spacing, number) of seven cases of three classes, the last with nothing in either mask."""
    result = []
    for number, name in enumerate(["shifted", "dropped", "split", "extra", "empty", "noise"]):
        target = blobs(number) + 0
        target[:, :, 10:] *= 2
        prediction = perturbations(target != 0, number)[name].astype(np.uint8)
        prediction[:, :, 9:] *= 2
        result.append((prediction, target.astype(np.uint8), (2.0, 1.0, 0.5 + number), 10 - number))
    result.append((result[0][0] * 0, result[0][1] * 0, (1.0, 1.0, 1.0), 3))
    return [(torch.from_numpy(a), torch.from_numpy(b), c, d) for a, b, c, d in result]


def make(kind, **kwargs):
    return kind(**kwargs) if kind is metrics.LesionMetrics else kind(num_classes=3, **kwargs)


def filled(kind, data=None, **kwargs):
    metric = make(kind, **kwargs)
    for case in cases() if data is None else data:
        metric.update(*case)
    return metric


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14, equal_nan=True)


def test_case_dice_equals_loops():
    metric = filled(metrics.CaseDice, class_names=["background", "left side", "right/side"])
    table = metric.per_case()
    assert list(table) == ["case", "dice", "dice_left_side", "dice_right_side"]
    expected = np.array([[reference_dice(*case[:2], i, 1.0) for i in (1, 2)] for case in reversed(cases()[:6])])
    expected = np.vstack([[[1, 1]], expected])  # number 3, the empty one, before 5 to 10
    np.testing.assert_array_equal(table["case"], [3, 5, 6, 7, 8, 9, 10])
    np.testing.assert_allclose(table["dice_left_side"], expected[:, 0], rtol=1e-15)
    np.testing.assert_allclose(table["dice"], expected.mean(1), rtol=1e-15)
    assert metric.compute()["dice"].item() == pytest.approx(expected.mean(), rel=1e-14)
    left_out = filled(metrics.CaseDice, empty=math.nan).compute()
    assert left_out["dice"].item() == pytest.approx(expected[1:].mean(), rel=1e-14)


def test_case_hd95_equals_distance_maps():
    metric = filled(metrics.CaseHD95, convention="pooled")
    table = metric.per_case()
    rows = []
    for a, b, spacing, _ in sorted(cases(), key=lambda case: case[3]):
        masks = [(a.numpy() == i, b.numpy() == i) for i in (1, 2)]
        rows.append([reference_hd95(*m, spacing, "pooled") if m[0].any() and m[1].any() else math.nan for m in masks])
    expected = np.array(rows)
    assert np.isnan(expected).sum(1).tolist() == [2, 0, 2, 0, 0, 0, 0]
    np.testing.assert_allclose(np.stack([table["hd95_1_mm"], table["hd95_2_mm"]], 1), expected, rtol=1e-12)
    np.testing.assert_array_equal(table["hd95_defined"], [math.nan, 1, 0, 1, 1, 1, 1])
    assert metric.compute()["hd95_mm"].item() == pytest.approx(np.nanmean(expected.mean(1)), rel=1e-12)
    punished = filled(metrics.CaseHD95, both_empty=0.0, one_empty=300.0).per_case()
    np.testing.assert_array_equal(punished["hd95_mm"][[0, 2]], [0, 300])
    np.testing.assert_array_equal(punished["hd95_defined"], table["hd95_defined"])


@pytest.mark.parametrize("label", [None, 2])
@pytest.mark.parametrize("match", ["any", "iou"])
def test_lesion_metrics_equal_loops(match, label):
    edges = [0.005, 0.02]
    metric = filled(metrics.LesionMetrics, match=match, label=label, edges=edges)
    rows, sums, strata = [], np.zeros(3), np.zeros((2, 3))
    for a, b, spacing, _ in sorted(cases(), key=lambda case: case[3]):
        a, b = ((m.numpy() != 0) if label is None else (m.numpy() == label) for m in (a, b))
        tp, fp, fn, n_target, n_pred, sizes, found = reference_lesions(a, b, match)
        ml = math.prod(spacing) / 1000
        f1 = tp / (tp + (fp + fn) / 2) if tp + fp + fn else 1.0
        recall, precision = (tp / (tp + n) if tp + n else math.nan for n in (fn, fp))
        by_size = []
        for low, high in ((0, 0.005), (0.005, 0.02), (0.02, math.inf)):
            inside = [f for size, f in zip(sizes, found, strict=True) if low <= size * ml * (1 + 1e-12) < high]
            by_size.append((sum(inside), len(inside)))
        strata += np.array(by_size).T
        sums += tp, fp, fn
        rates = [hit / n if n else math.nan for hit, n in by_size]
        rows.append([f1, precision, recall, *rates, abs(n_target - n_pred), abs(a.sum() - b.sum()) * ml])
    keys = ["lesion_f1", "lesion_precision", "lesion_recall"]
    by_stratum = [f"lesion_recall_{s}" for s in ("lt0.005ml", "0.005to0.02ml", "ge0.02ml")]
    table, figures = metric.per_case(), metric.compute()
    for column, key in zip(np.array(rows).T, [*keys, *by_stratum, "ald", "avd_ml"], strict=True):
        np.testing.assert_allclose(table[key], column, rtol=1e-12, err_msg=key)
        assert figures[key].item() == pytest.approx(np.nanmean(column), rel=1e-12)
    tp, fp, fn = sums
    pooled = [tp / (tp + (fp + fn) / 2), tp / (tp + fp), tp / (tp + fn), *(strata[0] / strata[1])]
    assert [figures[f"{key}_pooled"].item() for key in [*keys, *by_stratum]] == pytest.approx(pooled, rel=1e-12)
    assert table["tp"].sum() == tp
    assert (table["n_target"] == table["tp"] + table["fn"]).all()
    assert (strata[1] > 0).all()


def test_a_lesion_at_an_edge_belongs_to_the_upper_stratum():
    mask = torch.zeros(1, 1, 12, dtype=torch.uint8)
    mask[0, 0, :3] = 1
    for spacing in ((0.1, 0.1, 0.1), (0.1, 0.7, 0.3), (1.1, 1.1, 1.1)):
        edge = 3 * math.prod(float(f"{s}") for s in reversed(spacing)) / 1000
        metric = metrics.LesionMetrics(edges=[edge])
        metric.update(mask, mask, spacing, 0)
        assert metric.per_case()[f"n_{metric.strata[1]}"].tolist() == [1]
    metric = metrics.LesionMetrics(edges=[3, 4], unit="voxels")
    metric.update(mask, mask, (1, 1, 1), 0)
    assert [metric.per_case()[f"n_{s}"].item() for s in metric.strata] == [0, 1, 0]
    assert metric.strata == ["lt3voxels", "3to4voxels", "ge4voxels"]
    assert not metrics.LesionMetrics(edges=[]).strata


@pytest.mark.parametrize("kind", CLASSES)
def test_a_batch_equals_its_cases(kind):
    data = cases()
    batch = make(kind)
    spacing = torch.tensor([case[2] for case in data])
    numbers = torch.tensor([case[3] for case in data])
    batch.update(torch.stack([c[0] for c in data]), torch.stack([c[1] for c in data]), spacing, numbers)
    assert_equal(batch.per_case(), filled(kind).per_case())
    for wrong in ([1, 2], 4):
        with pytest.raises(ValueError, match="case_index"):
            batch.update(torch.stack([c[0] for c in data]), torch.stack([c[1] for c in data]), spacing, wrong)


@pytest.mark.parametrize("kind", CLASSES)
def test_repeated_cases_count_once_in_any_order(kind):
    data = cases()
    again = filled(kind, [*reversed(data), data[2], data[0]])
    assert_equal(again.per_case(), filled(kind).per_case())
    assert_equal(again.compute(), filled(kind).compute())


@pytest.mark.parametrize("kind", CLASSES)
def test_states_merge_exactly_with_repeated_cases(kind):
    data = cases()
    merged, other = filled(kind, data[:4]), filled(kind, data[3:] + data[:1])
    merged.merge_state(other)
    assert_equal(merged.compute(), filled(kind).compute())
    assert_equal(merged.per_case(), filled(kind).per_case())


@pytest.mark.parametrize("kind", CLASSES)
def test_forward_gives_the_case_and_accumulates(kind):
    metric, data = make(kind), cases()
    assert_equal(metric(*data[0]), filled(kind, data[:1]).compute())
    for case in data[1:]:
        metric(*case)
    assert_equal(metric.compute(), filled(kind).compute())
    with torch.inference_mode():
        metric.reset()
    metric.update(*data[1])
    assert_equal(metric.compute(), filled(kind, data[1:2]).compute())


@pytest.mark.parametrize("kind", CLASSES)
def test_states_stay_double_and_pickle(kind):
    metric = pickle.loads(pickle.dumps(filled(kind).half().float()))
    assert_equal(metric.compute(), filled(kind).compute())
    assert all(value.dtype == torch.float64 and value.shape == () for value in metric.compute().values())


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("kind", CLASSES)
def test_nothing_is_nan(kind):
    figures = make(kind).compute()
    assert list(figures) == list(filled(kind).compute())
    assert all(torch.isnan(value) for value in figures.values())
    assert all(len(column) == 0 for column in make(kind).per_case().values())


def test_the_three_take_the_same_arguments_and_make_different_keys():
    collection = MetricCollection([make(kind) for kind in CLASSES])
    for case in cases():
        collection.update(*case)
    together = collection.compute()
    assert_equal(together, {name: value for kind in CLASSES for name, value in filled(kind).compute().items()})
    assert {"dice", "hd95_mm", "lesion_f1", "lesion_precision", "lesion_recall", "avd_ml", "ald"} <= set(together)


def test_dice_does_not_wait_for_the_device():
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert not any(word in str(func) for word in ("aten.nonzero", "_local_scalar_dense", "masked_select")), func
            return func(*args, **(kwargs or {}))

    metric, data = make(metrics.CaseDice), cases()
    with Recorder():
        for case in data:
            metric.update(*case)


@pytest.mark.parametrize(
    ("kind", "options", "word"),
    [
        (metrics.CaseDice, {"num_classes": 1}, "num_classes"),
        (metrics.CaseDice, {"class_names": ["a", "b", "c"]}, "class_names"),
        (metrics.CaseHD95, {"class_names": ["a", "a"]}, "class_names"),
        (metrics.CaseHD95, {"convention": "mean"}, "convention"),
        (metrics.LesionMetrics, {"edges": [2, 1]}, "edges"),
        (metrics.LesionMetrics, {"edges": [0, 1]}, "edges"),
        (metrics.LesionMetrics, {"unit": "mm"}, "unit"),
        (metrics.LesionMetrics, {"label": 0}, "label"),
    ],
)
def test_wrong_options_are_named(kind, options, word):
    with pytest.raises(InputError, match=f"^{word}"):
        kind(**options)


def test_wrong_cases_are_refused():
    mask = torch.zeros(2, 3, 4, 5, dtype=torch.uint8)
    for kind in CLASSES:
        with pytest.raises(ValueError, match="expected equal"):
            make(kind).update(mask, mask[:1], (1, 1, 1), [0, 1])
        with pytest.raises(ValueError, match="float32"):
            make(kind).update(mask.float(), mask, (1, 1, 1), [0, 1])
        with pytest.raises(ValueError, match=r"\(1, 2, 3, 4, 5\)"):
            make(kind).update(mask[None], mask[None], (1, 1, 1), 0)
    with pytest.raises(ValueError, match="for 2 cases"):
        metrics.CaseHD95().update(mask, mask, np.ones((3, 3)), [0, 1])
    with pytest.raises(InputError, match="spacing"):
        metrics.LesionMetrics().update(mask, mask, (1, 1), [0, 1])


def _figures(rank):
    return [_figures_of(kind, rank) for kind in CLASSES]


def _figures_of(kind, rank):
    # Unequal shares with one case in both; and a process that has nothing at all.
    data = cases()
    uneven = filled(kind, [data[:5], data[4:]][rank])
    lonely = filled(kind, [data, []][rank])
    return [uneven.compute(), uneven.per_case(), lonely.compute(), lonely.per_case(), len(uneven.rows)]


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_two_processes_equal_one(tmp_path):
    for rank, results in enumerate(in_two_processes(_figures, tmp_path)):
        for kind, result in zip(CLASSES, results, strict=True):
            single = filled(kind)
            assert_equal(result[0], single.compute())
            assert_equal(result[1], single.per_case())
            assert_equal(result[2], single.compute())
            assert_equal(result[3], single.per_case())
            assert result[4] == [5, 3][rank]  # back to its own share after each figure


# A real mask


@pytest.mark.data
@pytest.mark.skipif("LIT_DATA" not in os.environ, reason="LIT_DATA names no folder")
def test_isles_case_and_its_perturbations_equal_loops():
    nibabel = pytest.importorskip("nibabel")
    file = next((Path(os.environ["LIT_DATA"]) / "isles2022").rglob("*_msk.nii.gz"))
    image = nibabel.load(file)
    target = np.ascontiguousarray(np.asarray(image.dataobj).T.astype(np.uint8))
    spacing = image.header.get_zooms()[::-1]
    counts = metrics.lesions(target, target)
    assert (counts.n_target, target.sum()) == (18, 523)
    assert (counts.sizes.min(), counts.sizes.max(), (counts.sizes <= 18).sum()) == (2, 201, 15)
    assert metrics.volume_difference_ml(target, target * 0, spacing) == pytest.approx(4.184, rel=1e-6)
    crop = tuple(slice(max(0, at.min() - 6), at.max() + 7) for at in np.nonzero(target))
    target = np.ascontiguousarray(target[crop])
    for name, prediction in perturbations(target).items():
        if name == "noise":  # hundreds of components, too slow for the loop
            continue
        for match in ("any", "iou"):
            counts = metrics.lesions(prediction, target, match)
            expected = reference_lesions(prediction, target, match)
            assert (counts.tp, counts.fp, counts.fn, counts.n_target, counts.n_pred) == expected[:5], name
            assert counts.sizes.tolist() == expected[5]
            assert counts.found.tolist() == expected[6]
        if prediction.any():
            for convention in ("max", "pooled"):
                expected = reference_hd95(prediction, target, spacing, convention)
                assert metrics.hd95(prediction, target, spacing, convention) == pytest.approx(expected, rel=1e-9), name
        both, total = int((prediction * target).sum()), int(prediction.sum()) + int(target.sum())
        assert metrics.dice(prediction, target).item() == 2 * both / total
