"""Average precision and recall of an epoch: COCO's figures and those of tiny objects, exact under distributed training.

Both protocols come out of one pass. They differ in the ranges of areas and in how many detections count:

| keys | ranges | detections per image and class |
|---|---|---|
| `ap*`, `ar_*` | AI-TOD: very tiny to 8², tiny to 16², small to 32², medium to 64² pixels | 1500 |
| `coco_*` | COCO: small to 32², medium to 96², large | 100 |

Up to a hundred detections per class and image, `ap` and `coco_ap` are therefore the same number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lit_cli.errors import InputError
from lit_detr.coco import IOU_THRESHOLDS, RECALLS, Evaluation, ImageResult, evaluate, match_image, require_evaluator

__all__ = ["RANGES", "DetectionAP", "class_keys"]

RANGES = {
    "all": (0.0, 1e10),
    "vt": (0.0, 8.0**2),
    "tiny": (8.0**2, 16.0**2),
    "small": (16.0**2, 32.0**2),
    "medium": (32.0**2, 64.0**2),
    "coco_small": (0.0, 32.0**2),
    "coco_medium": (32.0**2, 96.0**2),
    "coco_large": (96.0**2, 1e10),
}
"""Ranges of the annotated area in square pixels; as in COCO, an area at a bound belongs to both sides."""

COCO_LIMITS = (1, 10, 100)
_TOD, _COCO = ("vt", "tiny", "small", "medium"), ("small", "medium", "large")
_FOUND, _TRUE, _SEEN = 6, 7, 3  # numbers per detection, per box and per image in the states
_NONE = -1.0

Detections = Mapping[str, Tensor]


class DetectionAP(Metric):
    """Average precision (AP) and average recall (AR) over all images.

    An image counts once however often it comes, by its number: samplers that repeat images to give each process as many
    do not change the figures. Detections with a number that is not finite are left out. All detections are kept until
    `compute`, 48 bytes each.

    Args:
        class_names: By class index; they make the keys `ap_<name>`.
        max_detections: Ascending numbers of detections per image and class that count in the figures of tiny objects;
            the last one for all but `ar_<number>`. COCO's own 1, 10 and 100 are always evaluated as well.
        kwargs: Of `torchmetrics.Metric`.

    Raises:
        InputError: No class, an option out of range, or faster-coco-eval is not installed.

    Source:
        T.-Y. Lin et al., Microsoft COCO, ECCV 2014; J. Wang et al., Tiny Object Detection in Aerial Images, ICPR 2020
        (limits of 1500 and areas).

    Example:
        >>> metric = DetectionAP(["bird", "drone"])
        >>> box, one = torch.tensor([[10.0, 10, 20, 20]]), torch.ones(1, dtype=torch.long)
        >>> found = {"boxes": box, "scores": torch.tensor([0.9]), "labels": one}
        >>> true = {"boxes": box + 1, "labels": one, "area": torch.tensor([100.0])}
        >>> metric.update([7], [found], [true])
        >>> figures = metric.compute()
        >>> [round(figures[key].item(), 3) for key in ("ap", "ap50", "ap_tiny", "ap_drone", "ap_bird")]
        [0.4, 1.0, 0.4, 0.4, nan]
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    found: list[Tensor] | Tensor
    true: list[Tensor] | Tensor
    seen: list[Tensor] | Tensor

    def __init__(
        self, class_names: Sequence[str], max_detections: Sequence[int] = (1, 100, 1500), **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not class_names:
            raise InputError("class_names: got none, expected one or more names")
        if not max_detections or min(max_detections) < 1 or sorted(set(max_detections)) != list(max_detections):
            raise InputError(f"max_detections: got {list(max_detections)}, expected ascending numbers from 1")
        require_evaluator()
        self.class_names = tuple(class_names)
        self.max_detections = tuple(max_detections)
        self.set_dtype(torch.float64)  # also the type that a process without any image takes part with
        # Flat, since gathering needs equal numbers of dimensions from that process too.
        for name in ("found", "true", "seen"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(
        self, image_ids: Sequence[int] | Tensor, detections: Sequence[Detections], targets: Sequence[Detections]
    ) -> None:
        """Add images. Does not wait for the device.

        Args:
            image_ids: A number per image, unique in the data set.
            detections: Per image `boxes` (D, 4) x1 y1 x2 y2 in pixels of the file, `scores` (D,), `labels` (D,).
            targets: Per image `boxes` (G, 4), `labels` (G,); `area` (G,) as annotated, by default the boxes' own;
                `iscrowd` (G,), by default none.

        Raises:
            ValueError: The lists or the tensors of an image differ in length.
        """
        numbers = [int(i) for i in (image_ids.tolist() if isinstance(image_ids, Tensor) else image_ids)]
        if not len(numbers) == len(detections) == len(targets):
            lengths = f"{len(numbers)} numbers, {len(detections)} detections and {len(targets)} targets"
            raise ValueError(f"{lengths}: expected one each per image")
        assert isinstance(self.found, list)
        assert isinstance(self.true, list)
        assert isinstance(self.seen, list)
        counts: list[float] = []
        for number, got, want in zip(numbers, detections, targets, strict=True):
            boxes = want["boxes"].reshape(-1, 4)
            area = want["area"] if "area" in want else (boxes[:, 2:] - boxes[:, :2]).prod(1)
            crowd = want["iscrowd"] if "iscrowd" in want else torch.zeros_like(area)
            self.found.append(self._columns(number, got["boxes"].reshape(-1, 4), got["scores"], got["labels"]))
            self.true.append(self._columns(number, boxes, want["labels"], area, crowd))
            counts += [number, len(got["scores"]), len(want["labels"])]
        # From the host without waiting for it.
        self.seen.append(torch.tensor(counts, dtype=torch.float64).to(self.device, non_blocking=True))

    def _columns(self, number: int, boxes: Tensor, *columns: Tensor) -> Tensor:
        if any(len(c) != len(boxes) for c in columns):
            raise ValueError(f"image {number}: {len(boxes)} boxes with {[len(c) for c in columns]} further values")
        parts = [boxes, *(c.reshape(-1, 1) for c in columns)]
        return torch.cat([p.detach().to(self.device, torch.float64) for p in parts], 1).flatten()

    def compute(self) -> dict[str, Tensor]:
        """The figures as () float64 tensors between 0 and 1, NaN where there is nothing to find.

        Returns:
            `ap`, `ap50`, `ap75`, `ap_vt`, `ap_tiny`, `ap_small`, `ap_medium`, `ar_vt` to `ar_medium`, `ar_<limit>` and
            `ar50_<last limit>` (recall at an IoU of 0.5); `coco_` with `ap`, `ap50`, `ap75`, `ap_small`, `ap_medium`,
            `ap_large`, `ar_1`, `ar_10`, `ar_100`, `ar_small`, `ar_medium`, `ar_large`; `ap_<class>`.
        """
        limits = sorted({*COCO_LIMITS, *self.max_detections})
        pass_ = evaluate(self._images(), len(self.class_names), list(RANGES.values()), limits)
        return {k: torch.tensor(v, dtype=torch.float64) for k, v in self._figures(pass_, limits).items()}

    def _figures(self, both: Evaluation, limits: Sequence[int]) -> dict[str, float]:
        names, last = list(RANGES), limits.index(self.max_detections[-1])

        def ap(name: str = "all", limit: int = last, iou: int | None = None) -> float:
            return _mean(both.precision[slice(None) if iou is None else iou, ..., names.index(name), limit])

        def ar(name: str = "all", limit: int = last, iou: int | None = None) -> float:
            return _mean(both.recall[slice(None) if iou is None else iou, ..., names.index(name), limit])

        figures = {"ap": ap(), "ap50": ap(iou=0), "ap75": ap(iou=5), **{f"ap_{r}": ap(r) for r in _TOD}}
        figures |= {f"ar_{r}": ar(r) for r in _TOD}
        figures |= {f"ar_{limit}": ar(limit=limits.index(limit)) for limit in self.max_detections}
        figures[f"ar50_{self.max_detections[-1]}"] = ar(iou=0)
        plain = limits.index(COCO_LIMITS[-1])
        figures |= {"coco_ap": ap(limit=plain)}
        figures |= {"coco_ap50": ap(limit=plain, iou=0), "coco_ap75": ap(limit=plain, iou=5)}
        figures |= {f"coco_ap_{r}": ap(f"coco_{r}", plain) for r in _COCO}
        figures |= {f"coco_ar_{limit}": ar(limit=limits.index(limit)) for limit in COCO_LIMITS}
        figures |= {f"coco_ar_{r}": ar(f"coco_{r}", plain) for r in _COCO}
        for k, key in enumerate(class_keys(self.class_names, figures)):
            figures[key] = _mean(both.precision[:, :, k, 0, last])
        return figures

    def bootstrap_ap(
        self, groups: Mapping[int, str] | Sequence[str], n: int = 1000, seed: int = 0
    ) -> dict[str, Tensor]:
        """Draw whole groups of images with replacement, since neighbouring frames of a video are not independent.

        Images are matched once; a draw then only weights what each image contributes, which gives what an evaluation of
        the drawn images would, but for the order of equal scores. A thousand draws of 400 images with 300 detections
        each take some ten seconds. The draws depend on the seed and the groups alone: of two metrics with the same
        images and seed, the i-th draws are the same images, so that differences can be formed draw by draw.

        Args:
            groups: The group of each image by its number, or in ascending order of the numbers.
            n: Number of draws.
            seed: Of a generator of its own.

        Returns:
            (n,) float64 tensors `ap`, `ap50` and `ap_tiny`, NaN where a draw has nothing to find.

        Raises:
            InputError: Images without a group, or `n` is below 1.
        """
        if n < 1:
            raise InputError(f"bootstrap: n is {n}, expected 1 or more")
        with self._synced():
            images = self._images()
        if isinstance(groups, Mapping):
            lacking = [image.image_id for image in images if image.image_id not in groups]
            if lacking:
                raise InputError(f"bootstrap: image {lacking[0]} and {len(lacking) - 1} others have no group")
            names = [groups[image.image_id] for image in images]
        elif len(groups) != len(images):
            raise InputError(f"bootstrap: {len(groups)} groups for {len(images)} images, expected one each")
        else:
            names = list(groups)
        unique, member = np.unique(np.asarray(names, dtype=str), return_inverse=True)
        weights = np.zeros((n, len(images)), np.int64)
        if len(images):
            rng = np.random.default_rng(seed)
            drawn = rng.multinomial(len(unique), np.full(len(unique), 1 / len(unique)), size=n)
            weights = drawn[:, member]
        result = {}
        for name, keys in (("all", ("ap", "ap50")), ("tiny", ("ap_tiny",))):
            curves = [_curve(images, k, RANGES[name], self.max_detections[-1]) for k in range(len(self.class_names))]
            ap = np.stack([np.stack([_average_precision(c, w) for c in curves], 1) for w in weights])  # n, T, K
            result[keys[0]] = [_mean(row) for row in ap]
            if len(keys) > 1:
                result[keys[1]] = [_mean(row[0]) for row in ap]
        return {key: torch.tensor(values, dtype=torch.float64) for key, values in result.items()}

    def _images(self) -> list[ImageResult]:
        """Every image once, ascending; of a repeated one the first stays."""
        found, true, seen = (
            (dim_zero_cat(s).cpu().numpy() if len(s) else np.zeros(0)).reshape(-1, width)
            for s, width in ((self.found, _FOUND), (self.true, _TRUE), (self.seen, _SEEN))
        )
        ends = np.cumsum(seen[:, 1:].astype(np.int64), 0)
        images: dict[int, ImageResult] = {}
        for (number, d, g), (end_d, end_g) in zip(seen.astype(np.int64).tolist(), ends.tolist(), strict=True):
            if number in images:
                continue
            rows, boxes = found[end_d - d : end_d], true[end_g - g : end_g]
            rows = rows[np.isfinite(rows).all(1)]
            labels, true_labels = rows[:, 5].astype(np.int64), boxes[:, 4].astype(np.int64)
            self._check(number, labels, true_labels)
            parts = boxes[:, :4], true_labels, boxes[:, 5], boxes[:, 6] > 0
            images[number] = ImageResult(number, rows[:, :4], rows[:, 4], labels, *parts)
        return [images[number] for number in sorted(images)]

    def _check(self, number: int, *labels: NDArray[np.int64]) -> None:
        for each in labels:
            if len(each) and not 0 <= each.min() <= each.max() < len(self.class_names):
                wrong = each.min() if each.min() < 0 else each.max()
                raise InputError(f"image {number}: label {wrong}, expected 0 to {len(self.class_names) - 1}")

    @contextmanager
    def _synced(self) -> Iterator[None]:
        """States of all processes inside, own states afterwards; `compute` alone has that built in."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync and not self._is_synced):
            yield


def class_keys(class_names: Sequence[str], taken: Mapping[str, object] | Sequence[str] = ()) -> list[str]:
    """Keys of the classes: without blanks and slashes, and none that another figure has.

    >>> class_keys(["bird", "swimming pool", "tiny"], ["ap_tiny"])
    ['ap_bird', 'ap_swimming_pool', 'ap_tiny_class']
    """
    keys: list[str] = []
    for name in class_names:
        key = "ap_" + name.replace(" ", "_").replace("/", "_")
        while key in taken or key in keys:
            key += "_class"
        keys.append(key)
    return keys


def _mean(values: NDArray[np.float64]) -> float:
    """Mean of what is not -1."""
    there = values[values > _NONE]
    return float(there.mean()) if there.size else math.nan


class _Curve(NamedTuple):
    """The detections of a class over all images, highest score first."""

    image: NDArray[np.int64]  # (D,) its place
    right: list[NDArray[np.int64]]  # per threshold: places of the right detections
    counted: NDArray[np.bool_]  # (T, D), or (1, D) where all thresholds agree
    positives: NDArray[np.int64]  # (I,) boxes to be found


def _curve(images: Sequence[ImageResult], label: int, bounds: tuple[float, float], limit: int) -> _Curve:
    matches = [match_image(image, label, bounds, IOU_THRESHOLDS, limit) for image in images]
    positives = np.array([m.positives for m in matches], np.int64)
    thresholds = len(IOU_THRESHOLDS)
    if not matches:
        return _Curve(np.zeros(0, np.int64), [np.zeros(0, np.int64)] * thresholds, np.zeros((1, 0), bool), positives)
    score = np.concatenate([i.scores[m.order] for i, m in zip(images, matches, strict=True)])
    order = np.argsort(-score, kind="stable")
    image = np.repeat(np.arange(len(images)), [len(m.order) for m in matches])[order]
    counted = ~np.concatenate([m.ignored for m in matches], 1)[:, order]
    right = (np.concatenate([m.taken for m in matches], 1)[:, order] >= 0) & counted
    # What comes after the last right detection changes nothing: precision only falls and recall stays.
    end = int(np.flatnonzero(right.any(0)).max(initial=-1)) + 1
    image, counted, right = image[:end], counted[:, :end], right[:, :end]
    if (counted == counted[:1]).all():
        counted = counted[:1]
    return _Curve(image, [np.flatnonzero(row) for row in right], counted, positives)


def _average_precision(curve: _Curve, weights: NDArray[np.int64]) -> NDArray[np.float64]:
    """(T,) where each image comes as often as its weight says, -1 without boxes.

    Repeated images have equal scores; taking them as one block leaves out points of the curve between its ends, whose
    precision the end of the block covers.
    """
    total = int(weights @ curve.positives)
    result = np.zeros(len(curve.right))
    if not total:
        return result + _NONE
    weight = weights[curve.image]
    so_far = np.cumsum(weight * curve.counted, 1)
    for t, places in enumerate(curve.right):
        own = places[weight[places] > 0]
        if not len(own):
            continue
        hits = np.cumsum(weight[own])
        precision = hits / so_far[min(t, len(so_far) - 1), own]
        envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
        result[t] = envelope[np.searchsorted(hits / total, RECALLS)].mean()
    return result
