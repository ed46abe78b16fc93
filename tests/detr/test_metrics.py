"""Detection metrics against a slow reading of the COCO protocol, pycocotools and torchmetrics."""

import contextlib
import io
import math
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_cli.errors import InputError
from lit_detr import coco, metrics
from lit_detr.coco import ImageResult
from lit_detr.metrics import RANGES, DetectionAP
from tests.helpers.distributed import in_two_processes

pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed")

NAMES = ("bird", "drone", "plane")


# ---- a slow reference -----------------------------------------------------------------------------------------------


def slow_iou(a, b, crowd):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(w, 0) * max(h, 0)
    own, other = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    union = own if crowd else own + other - shared
    return shared / union if union > 0 else 0.0


def slow_evaluate(images, classes, bounds, limit):
    """Precision (T, R, K) and recall (T, K) by loops over images, classes, thresholds and detections."""
    precision, recall = -np.ones((10, 101, classes)), -np.ones((10, classes))
    for k in range(classes):
        for t, threshold in enumerate(np.linspace(0.5, 0.95, 10)):
            scored, positives = [], 0
            for image in images:
                boxes = [i for i in range(len(image.area)) if image.true_labels[i] == k]
                out = {i: image.crowd[i] or not bounds[0] <= image.area[i] <= bounds[1] for i in boxes}
                positives += sum(not out[i] for i in boxes)
                taken = set()
                mine = [d for d in range(len(image.scores)) if image.labels[d] == k]
                for d in sorted(mine, key=lambda d: -image.scores[d])[:limit]:
                    best, match = min(threshold, 1 - 1e-10), None
                    for i in sorted(boxes, key=lambda i: out[i]):
                        if i in taken and not image.crowd[i]:
                            continue
                        if match is not None and not out[match] and out[i]:
                            break
                        if (iou := slow_iou(image.boxes[d], image.true_boxes[i], image.crowd[i])) >= best:
                            best, match = iou, i
                    x1, y1, x2, y2 = image.boxes[d]
                    if match is None:
                        ignored = not bounds[0] <= (x2 - x1) * (y2 - y1) <= bounds[1]
                    else:
                        ignored = out[match]
                        taken.add(match)
                    scored.append((image.scores[d], match is not None, ignored))
            if not positives:
                continue
            tp = fp = 0
            curve = []
            for _, hit, ignored in sorted(scored, key=lambda s: -s[0]):
                if not ignored:
                    tp, fp = tp + hit, fp + (not hit)
                    curve.append((tp / positives, tp / (tp + fp)))
            recall[t, k] = curve[-1][0] if curve else 0
            for r, level in enumerate(np.linspace(0, 1, 101)):
                precision[t, r, k] = max((p for reached, p in curve if reached >= level), default=0)
    return precision, recall


def mean(values):
    return values[values > -1].mean() if (values > -1).any() else math.nan


# ---- random scenes --------------------------------------------------------------------------------------------------


def scene(seed, images=8, boxes=12, detections=30, classes=3, crowd=0.15, size=200):
    """Boxes from 3 to 120 px, areas as of a mask, detections near and far from them, images without either."""
    rng = np.random.default_rng(seed)
    result = []
    for i in range(images):
        g = 0 if i % 4 == 1 else int(rng.integers(1, boxes))
        d = 0 if i % 4 == 2 else int(rng.integers(1, detections))
        side = np.exp(rng.uniform(np.log(3), np.log(120), (g, 2)))
        corner = rng.uniform(0, size, (g, 2))
        true = np.concatenate([corner, corner + side], 1).astype(np.float32).astype(np.float64)
        labels = rng.integers(0, classes, g)
        near = rng.integers(0, g, d) if g else np.zeros(d, int)
        guess = np.concatenate([rng.uniform(0, 100, (d, 2)), rng.uniform(100, 150, (d, 2))], 1)
        guess_labels = rng.integers(0, classes, d)
        if g:
            close = rng.random(d) < 0.8
            moved = true[near] + rng.normal(0, 0.12, (d, 4)) * np.tile(side[near], 2) * rng.random((d, 1))
            guess[close], guess_labels[close] = moved[close], labels[near][close]
        guess[:, 2:] = np.maximum(guess[:, 2:], guess[:, :2] + 0.5)
        area = side.prod(1) * rng.uniform(0.5, 1, g)
        area[rng.random(g) < 0.1] = 64.0  # at the bound of two ranges
        found = guess.astype(np.float32).astype(np.float64), rng.permutation(d) / max(d, 1) + rng.random(d) * 1e-3
        is_crowd = rng.random(g) < crowd
        result.append(ImageResult(100 + 3 * i, *found, guess_labels, true, labels, area, is_crowd))
    return result


def as_dicts(image):
    found = {"boxes": image.boxes, "scores": image.scores, "labels": image.labels}
    true = {"boxes": image.true_boxes, "labels": image.true_labels, "area": image.area, "iscrowd": image.crowd}
    return tuple({k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in part.items()} for part in (found, true))


def fill(metric, images):
    for image in images:
        found, true = as_dicts(image)
        metric.update([image.image_id], [found], [true])
    return metric


def metric_of(images, names=NAMES, **kwargs):
    return fill(DetectionAP(names, **kwargs), images)


# ---- parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_one_pass_equals_the_slow_reference(seed):
    images, limits = scene(seed), [1, 3, 10, 100]
    both = coco.evaluate(images, 3, list(RANGES.values()), limits)
    assert both.precision.shape == (10, 101, 3, len(RANGES), 4)
    for a, bounds in enumerate(RANGES.values()):
        for m, limit in enumerate(limits):
            precision, recall = slow_evaluate(images, 3, bounds, limit)
            np.testing.assert_allclose(both.precision[..., a, m], precision, atol=1e-6)
            np.testing.assert_allclose(both.recall[..., a, m], recall, atol=1e-6)


def test_keys_name_what_they_say():
    images = scene(5, images=6)
    figures = {k: v.item() for k, v in metric_of(images, max_detections=(1, 4)).compute().items()}
    for name, key in (("vt", "vt"), ("tiny", "tiny"), ("small", "small"), ("medium", "medium")):
        precision, recall = slow_evaluate(images, 3, RANGES[name], 4)
        assert figures[f"ap_{key}"] == pytest.approx(mean(precision), abs=1e-6, nan_ok=True)
        assert figures[f"ar_{key}"] == pytest.approx(mean(recall), abs=1e-6, nan_ok=True)
    precision, recall = slow_evaluate(images, 3, RANGES["all"], 4)
    assert figures["ap"] == pytest.approx(mean(precision), abs=1e-6)
    assert figures["ap50"] == pytest.approx(mean(precision[0]), abs=1e-6)
    assert figures["ap75"] == pytest.approx(mean(precision[5]), abs=1e-6)
    assert figures["ar_4"] == pytest.approx(mean(recall), abs=1e-6)
    assert figures["ar50_4"] == pytest.approx(mean(recall[0]), abs=1e-6)
    for k, name in enumerate(NAMES):
        assert figures[f"ap_{name}"] == pytest.approx(mean(precision[:, :, k]), abs=1e-6, nan_ok=True)
    assert figures["ar_1"] == pytest.approx(mean(slow_evaluate(images, 3, RANGES["all"], 1)[1]), abs=1e-6)


def crowded(seed=3):
    """More than a hundred detections of a class in an image."""
    return scene(seed, images=5, boxes=60, detections=400, classes=1)


def test_plain_coco_is_pycocotools():
    reason = "pycocotools is not installed"
    api = pytest.importorskip("pycocotools.coco", reason=reason)
    evaluator = pytest.importorskip("pycocotools.cocoeval", reason=reason)
    for images, classes in ((scene(11, images=12), 3), (crowded(), 1)):
        truth, found = [], []
        for i, image in enumerate(images):
            for box, label, area, crowd in zip(*image[4:], strict=True):
                xywh = [*box[:2], *(box[2:] - box[:2])]
                row = {"id": len(truth) + 1, "image_id": i, "category_id": int(label), "bbox": xywh}
                truth.append({**row, "area": area, "iscrowd": int(crowd)})
            for box, score, label in zip(*image[1:4], strict=True):
                xywh = [*box[:2], *(box[2:] - box[:2])]
                found.append({"image_id": i, "category_id": int(label), "bbox": xywh, "score": score})
        with contextlib.redirect_stdout(io.StringIO()):
            gt = api.COCO()
            gt.dataset = {
                "images": [{"id": i} for i in range(len(images))],
                "categories": [{"id": k} for k in range(classes)],
                "annotations": truth,
                "info": {},
            }
            gt.createIndex()
            run = evaluator.COCOeval(gt, gt.loadRes(found), "bbox")
            run.evaluate()
            run.accumulate()
            run.summarize()
        figures = metric_of(images, NAMES[:classes]).compute()
        keys = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar_1", "ar_10", "ar_100")
        keys = (*keys, "ar_small", "ar_medium", "ar_large")
        ours = [figures[f"coco_{k}"].item() for k in keys]
        np.testing.assert_allclose(ours, np.where(run.stats < 0, np.nan, run.stats), atol=1e-6)


def test_plain_coco_is_that_of_torchmetrics():
    from torchmetrics.detection import MeanAveragePrecision

    images = scene(4, images=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Its own thresholds are rounded to float32, which moves AP in the fourth digit.
        levels = {
            "iou_thresholds": np.linspace(0.5, 0.95, 10).tolist(),
            "rec_thresholds": np.linspace(0, 1, 101).tolist(),
        }
        peer = MeanAveragePrecision(backend="faster_coco_eval", class_metrics=True, **levels)
        peer.warn_on_many_detections = False
        for image in images:
            found, true = as_dicts(image)
            peer.update([found], [true])
        theirs = peer.compute()
    ours = metric_of(images).compute()
    for key, name in (("ap", "map"), ("ap50", "map_50"), ("ap_small", "map_small"), ("ar_100", "mar_100")):
        assert ours[f"coco_{key}"].item() == pytest.approx(theirs[name].item(), abs=1e-6)
    assert [ours[f"ap_{n}"].item() for n in NAMES] == pytest.approx(theirs["map_per_class"].tolist(), abs=1e-6)


def test_more_than_a_hundred_detections_count_for_tiny_objects_only():
    images = crowded()
    figures = metric_of(images, ["x"]).compute()
    for prefix, limit in (("", 1500), ("coco_", 100)):
        precision, _ = slow_evaluate(images, 1, RANGES["all"], limit)
        assert figures[f"{prefix}ap"].item() == pytest.approx(mean(precision), abs=1e-6)
    assert abs(figures["ap"] - figures["coco_ap"]) > 1e-3
    assert figures["ar_1500"] > figures["ar_100"]


def test_areas_come_from_the_annotation():
    image = ImageResult(
        0, np.array([[0.0, 0, 20, 20]]), np.ones(1), np.zeros(1, int), np.array([[0.0, 0, 20, 20]]), *[None] * 3
    )
    for area, key in ((60.0, "vt"), (200.0, "tiny"), (400.0, "small"), (2000.0, "medium")):
        one = image._replace(true_labels=np.zeros(1, int), area=np.array([area]), crowd=np.zeros(1, bool))
        figures = metric_of([one], ["x"]).compute()
        assert [k for k in ("vt", "tiny", "small", "medium") if figures[f"ap_{k}"] == 1] == [key]
    found, true = as_dicts(one)
    del true["area"], true["iscrowd"]
    metric = DetectionAP(["x"])
    metric.update([0], [found], [true])
    assert metric.compute()["ap_small"] == 1  # the box's own


# ---- empty ----------------------------------------------------------------------------------------------------------


def empty(number=0, **parts):
    no = np.zeros(0)
    image = ImageResult(number, np.zeros((0, 4)), no, no.astype(int), np.zeros((0, 4)), no.astype(int), no, no > 0)
    return image._replace(**parts)


BOX = {"true_boxes": np.array([[5.0, 5, 15, 15]]), "true_labels": np.zeros(1, int), "area": np.array([100.0])}
FOUND = {"boxes": np.array([[5.0, 5, 15, 15]]), "scores": np.array([0.5]), "labels": np.zeros(1, int)}


@pytest.mark.filterwarnings("error")
def test_nothing_to_find_is_no_number_and_nothing_found_is_zero(capfd):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*compute.*before the .*update.*")  # torchmetrics' own
        assert all(math.isnan(v) for v in DetectionAP(["x"]).compute().values())
    for image in (empty(), empty(**FOUND), empty(**FOUND, **BOX, crowd=np.ones(1, bool))):
        figures = metric_of([image], ["x"]).compute()
        assert all(math.isnan(v) for v in figures.values())
    missed = metric_of([empty(**BOX, crowd=np.zeros(1, bool))], ["x", "y"]).compute()
    assert missed["ap"] == missed["ap_tiny"] == missed["ar_1500"] == missed["ap_x"] == 0
    assert math.isnan(missed["ap_small"])
    assert math.isnan(missed["ap_y"])
    assert capfd.readouterr() == ("", "")


def test_numbers_that_are_not_finite_are_left_out():
    boxes = np.array([[5.0, 5, 15, 15], [np.nan, 0, 1, 1], [0, 0, 1, 1]])
    bad = empty(
        boxes=boxes, scores=np.array([0.5, 0.9, np.nan]), labels=np.zeros(3, int), **BOX, crowd=np.zeros(1, bool)
    )
    assert metric_of([bad], ["x"]).compute()["ap"] == 1


# ---- the metric -----------------------------------------------------------------------------------------------------


def test_images_count_once_and_order_does_not_matter():
    images = scene(2)
    expected = metric_of(images).compute()
    repeated = metric_of([images[3], *images[::-1], images[0]]).compute()
    batched = DetectionAP(NAMES)
    batched.update(torch.tensor([i.image_id for i in images]), *zip(*map(as_dicts, images), strict=True))
    for other in (repeated, batched.compute()):
        assert {k: v.item() for k, v in other.items()} == pytest.approx(
            {k: v.item() for k, v in expected.items()}, nan_ok=True
        )
    batched.reset()
    assert math.isnan(fill(batched, [empty()]).compute()["ap"])
    assert fill(pickle.loads(pickle.dumps(DetectionAP(NAMES))), images).compute()["ap"] == expected["ap"]


def _one_half(rank):
    images = scene(6)
    metric = DetectionAP(NAMES)
    # The second half overlaps the first, as where a sampler pads.
    fill(metric, images[:5] if rank == 0 else images[4:])
    lonely = fill(DetectionAP(NAMES), images if rank == 0 else [])
    draws = metric.bootstrap_ap([str(i % 3) for i in range(len(images))], n=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return metric.compute(), lonely.compute(), draws


def test_two_processes_give_what_one_gives(tmp_path):
    both = in_two_processes(_one_half, tmp_path)
    images = scene(6)
    one = metric_of(images)
    expected = {k: v.item() for k, v in one.compute().items()}
    draws = one.bootstrap_ap([str(i % 3) for i in range(len(images))], n=5)
    for halves, lonely, drawn in both:
        for figures in (halves, lonely):
            assert {k: v.item() for k, v in figures.items()} == pytest.approx(expected, nan_ok=True)
        assert all(torch.equal(drawn[k], draws[k]) for k in draws)


def test_wrong_input_is_named():
    with pytest.raises(InputError, match="class_names: got none"):
        DetectionAP([])
    for limits in ((), (0, 10), (100, 10)):
        with pytest.raises(InputError, match="max_detections"):
            DetectionAP(["x"], max_detections=limits)
    found, true = as_dicts(scene(0)[0])
    metric = DetectionAP(["x"])
    with pytest.raises(ValueError, match="2 numbers, 1 detections"):
        metric.update([1, 2], [found], [true])
    with pytest.raises(ValueError, match="image 4: "):
        metric.update([4], [{**found, "scores": found["scores"][:0]}], [true])
    metric.update([9], [{**found, "labels": found["labels"] + 5}], [true])
    with pytest.raises(InputError, match=r"image 9: label \d, expected 0 to 0"):
        metric.compute()


def test_a_missing_evaluator_is_named(monkeypatch):
    monkeypatch.setattr(coco.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="faster-coco-eval is missing"):
        DetectionAP(["x"])


# ---- bootstrap ------------------------------------------------------------------------------------------------------


def test_draws_are_evaluations_of_the_drawn_images():
    images = scene(8, images=10)
    groups = [f"video {i // 2}" for i in range(10)]
    metric = metric_of(images, max_detections=(1, 20))
    draws = metric.bootstrap_ap(groups, n=4, seed=3)
    _, member = np.unique(groups, return_inverse=True)
    weights = np.random.default_rng(3).multinomial(5, np.full(5, 0.2), size=4)[:, member]
    for i, weight in enumerate(weights):
        copies = np.repeat(np.arange(10), weight)
        drawn = [images[c]._replace(image_id=j) for j, c in enumerate(copies)]
        figures = metric_of(drawn, max_detections=(1, 20)).compute()
        for key in ("ap", "ap50", "ap_tiny"):
            assert draws[key][i].item() == pytest.approx(figures[key].item(), abs=1e-9, nan_ok=True)
    by_number = metric.bootstrap_ap({im.image_id: g for im, g in zip(images, groups, strict=True)}, n=4, seed=3)
    assert all(torch.equal(by_number[k], draws[k]) for k in draws)
    assert not torch.equal(metric.bootstrap_ap(groups, n=4, seed=4)["ap"], draws["ap"])


def test_bootstrap_of_one_group_is_the_figure_itself():
    images = crowded()
    metric = metric_of(images, ["x"])
    figures, draws = metric.compute(), metric.bootstrap_ap(["one"] * len(images), n=2)
    for key in ("ap", "ap50", "ap_tiny"):
        assert draws[key].tolist() == pytest.approx([figures[key].item()] * 2, abs=1e-9)


def test_bootstrap_refuses_what_it_cannot_draw():
    metric = metric_of(scene(0))
    with pytest.raises(InputError, match="3 groups for 8 images"):
        metric.bootstrap_ap(["a"] * 3)
    with pytest.raises(InputError, match="image 103 and 6 others have no group"):
        metric.bootstrap_ap({100: "a"})
    with pytest.raises(InputError, match="n is 0"):
        metric.bootstrap_ap(["a"] * 8, n=0)
    nothing = metric_of([empty(1), empty(2, **FOUND)], ["x"]).bootstrap_ap(["a", "b"], n=3)
    assert all(torch.isnan(v).all() for v in nothing.values())


# ---- matching -------------------------------------------------------------------------------------------------------


def test_overlaps_are_those_of_torchvision():
    from torchvision.ops import box_iou

    rng = np.random.default_rng(0)
    a, b = (np.concatenate([xy := rng.uniform(0, 20, (n, 2)), xy + rng.uniform(0, 9, (n, 2))], 1) for n in (7, 5))
    expected = box_iou(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    np.testing.assert_allclose(coco.iou_matrix(a, b), expected, atol=1e-12)
    assert (coco.iou_matrix(np.zeros((2, 4)), np.zeros((1, 4))) == 0).all()
    assert coco.iou_matrix(a, b[:0]).shape == (7, 0)
    assert metrics.class_keys(["a", "a"]) == ["ap_a", "ap_a_class"]


@pytest.mark.data
def test_perfect_detections_of_the_infrared_frames():
    import json

    file = Path(os.environ.get("LIT_DATA", "")) / "drone_ir" / "annotations" / "val.json"
    if "LIT_DATA" not in os.environ or not file.is_file():
        pytest.skip("LIT_DATA names no folder with drone_ir")
    data = json.loads(file.read_text())
    metric = DetectionAP([c["name"] for c in data["categories"]])
    for image in data["images"]:
        own = [a for a in data["annotations"] if a["image_id"] == image["id"]]
        boxes = torch.tensor([a["bbox"] for a in own]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([a["category_id"] - 1 for a in own], dtype=torch.long)
        true = {"boxes": boxes, "labels": labels, "area": torch.tensor([a["area"] for a in own])}
        metric.update([image["id"]], [{"boxes": boxes, "labels": labels, "scores": torch.ones(len(own))}], [true])
    figures = metric.compute()
    assert figures["ap"].item() == figures["ap_tiny"].item() == figures["coco_ap"].item() == pytest.approx(1)
