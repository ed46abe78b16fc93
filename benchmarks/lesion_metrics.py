"""What lesion-wise counts and HD95 cost on one CPU core: ours beside a loop over the components and other ways.

A mask of 182 x 218 x 182 voxels gets lesions whose sizes follow white-matter lesions (median 17 voxels, quartiles 6
and 46); the prediction shifts them by a voxel, drops a fifth and invents as many. In each round every way takes its
turn, so that all of them see the same machine; a way whose result differs from the first one's ends the script. `loop`
is what the evaluation scripts of the challenges do: label both masks, then one comparison of the whole volume per
component; `loop cc3d` labels with cc3d, where `connected-components-3d` is installed. `dense` labels with scipy and
counts pairs with one bincount, without a loop. `distance maps` are those of scipy in the common bounding box.

Times are CPU time of the process, which others on the same machine disturb least; everything runs in one thread.

    OMP_NUM_THREADS=1 python benchmarks/lesion_metrics.py [--out benchmarks/results/lesion_metrics.json] [--tiny]
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

import numpy as np
from common import Results, Row, spread, table
from numpy.typing import NDArray
from scipy import ndimage

from lit_dsunet.components import lesions
from lit_dsunet.metrics import hd95

MNI = (182, 218, 182)
SPACING = (1.0, 1.0, 1.0)
STRUCTURE = np.ones((3, 3, 3), dtype=bool)
MEDIAN, SIGMA = 17, 1.51  # a log-normal of quartiles 6 and 47
COLUMNS = ("figure", "lesions", "way", "ms", "iqr_ms", "speedup", "voxels", "tp", "fp", "fn")

Labels = NDArray[np.int32]
Mask = NDArray[np.uint8] | NDArray[np.bool_]
Labeller = Callable[[Mask], tuple[Labels, int]]
Way = Callable[[Mask, Mask], tuple[float, ...]]


class Counts(NamedTuple):
    """Lesions found, made up and missed."""

    tp: int
    fp: int
    fn: int


# Masks


def lesion_mask(count: int, shape: tuple[int, int, int], rng: np.random.Generator) -> tuple[Mask, Labels]:
    """A mask with exactly so many components, and which of them each voxel belongs to, from 1."""
    labels = np.zeros(shape, dtype=np.int32)
    size, half = np.array(shape), np.array(shape) / 2
    number = 0
    while number < count:
        voxels = int(np.clip(rng.lognormal(np.log(MEDIAN), SIGMA), 1, np.prod(size) / 500))
        reach = int(np.ceil(1.3 * (3 * voxels / (4 * np.pi)) ** (1 / 3))) + 1
        centre = rng.integers(reach + 1, size - reach - 1)
        if (((centre - half) / half) ** 2).sum() > 0.8:  # inside of a head
            continue
        around = tuple(slice(c - reach - 1, c + reach + 2) for c in centre)
        if labels[around].any():
            continue
        # The nearest voxels to the centre, by a distance that is longer along two axes.
        offsets = np.indices((2 * reach + 1,) * 3).reshape(3, -1).T - reach
        order = np.argsort(((offsets * rng.uniform(0.8, 1.2, 3)) ** 2).sum(1), kind="stable")
        number += 1
        labels[tuple((centre + offsets[order[:voxels]]).T)] = number
    return (labels > 0).astype(np.uint8), labels


def predicted_mask(labels: Labels, count: int, rng: np.random.Generator) -> Mask:
    """The lesions a voxel off, without a fifth of them and with as many new ones."""
    kept = rng.permutation(count + 1) > count // 5
    kept[0] = False
    new, _ = lesion_mask(max(count // 5, 1), (labels.shape[0], labels.shape[1], labels.shape[2]), rng)
    return np.roll(kept[labels], 1, 2).astype(np.uint8) | new


# Ways


def scipy_labels(mask: Mask) -> tuple[Labels, int]:
    """Label with scipy."""
    labels: Any = np.empty(mask.shape, dtype=np.int32)
    return labels, int(ndimage.label(mask, STRUCTURE, output=labels))  # pyright: ignore[reportArgumentType]


def cc3d_labels(mask: Mask) -> tuple[Labels, int]:
    """Label with connected-components-3d."""
    cc3d: Any = importlib.import_module("cc3d")
    return cc3d.connected_components(mask, connectivity=26, return_N=True)


def loop_any(prediction: Mask, target: Mask, label: Labeller) -> Counts:
    """ISLES'22: each component compared with the whole other mask."""
    annotated, n_target = label(target)
    predicted, n_pred = label(prediction)
    target, prediction = target.astype(bool), prediction.astype(bool)
    both = np.logical_and(target, prediction)
    tp = sum(bool(np.logical_and(annotated == index, both).any()) for index in range(1, n_target + 1))
    hits = sum(bool(np.logical_and(predicted == index, target).any()) for index in range(1, n_pred + 1))
    return Counts(tp, n_pred - hits, n_target - tp)


def loop_iou(prediction: Mask, target: Mask, label: Labeller, threshold: float = 0.2) -> Counts:
    """ISLES'24: the overlap of each pair of components that touch, then the best pairs first."""
    annotated, n_target = label(target)
    predicted, n_pred = label(prediction)
    pairs = []
    for t in range(1, n_target + 1):
        a = annotated == t
        for p in np.unique(predicted[a]):
            if p:
                b = predicted == p
                pairs.append((np.logical_and(a, b).sum() / np.logical_or(a, b).sum(), int(p), t))
    return greedy(pairs, n_target, n_pred, threshold)


def greedy(pairs: list[tuple[float, int, int]], n_target: int, n_pred: int, threshold: float) -> Counts:
    """One-to-one matches in the order of falling overlap."""
    used_p, used_t = set(), set()
    for iou, p, t in sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2])):
        if iou >= threshold and p not in used_p and t not in used_t:
            used_p.add(p)
            used_t.add(t)
    return Counts(len(used_t), n_pred - len(used_p), n_target - len(used_t))


def dense(prediction: Mask, target: Mask, match: str, threshold: float = 0.2) -> Counts:
    """Labels of the whole volume by scipy, pairs by one bincount."""
    annotated, n_target = scipy_labels(target)
    predicted, n_pred = scipy_labels(prediction)
    both = np.logical_and(target, prediction)
    code = predicted[both].astype(np.int64) * (n_target + 1) + annotated[both]
    shared = np.bincount(code, minlength=(n_target + 1) * (n_pred + 1)).reshape(n_pred + 1, n_target + 1)
    if match == "any":
        tp = int((shared.sum(0) > 0).sum())
        return Counts(tp, n_pred - int((shared.sum(1) > 0).sum()), n_target - tp)
    sizes = np.bincount(annotated.ravel()), np.bincount(predicted.ravel())
    pairs = [(shared[p, t] / (sizes[0][t] + sizes[1][p] - shared[p, t]), p, t) for p, t in np.argwhere(shared).tolist()]
    return greedy(pairs, n_target, n_pred, threshold)


def ours(prediction: Mask, target: Mask, match: str) -> Counts:
    """The counts of `lit_dsunet`."""
    counts = lesions(prediction, target, "any" if match == "any" else "iou")
    return Counts(counts.tp, counts.fp, counts.fn)


def distance_maps(prediction: Mask, target: Mask) -> tuple[float]:
    """HD95 by two distance maps of the bounding box of both masks."""
    box = ndimage.find_objects((prediction | target).astype(np.int8))[0]
    assert box is not None
    edges = [np.pad(mask[box] > 0, 1) for mask in (prediction, target)]
    edges = [mask & ~np.asarray(ndimage.binary_erosion(mask), dtype=bool) for mask in edges]
    a, b = edges
    maps = [np.asarray(ndimage.distance_transform_edt(~edge, sampling=SPACING)) for edge in edges]
    return (float(max(np.percentile(maps[1][a], 95), np.percentile(maps[0][b], 95))),)


def ways(figure: str) -> dict[str, Way]:
    """Ways to compute a figure; the first is what the others are compared with."""
    if figure == "hd95":
        return {"distance maps": distance_maps, "ours": lambda p, t: (hd95(p, t, SPACING),)}
    loop = loop_any if figure == "any" else loop_iou
    result: dict[str, Way] = {"loop": lambda p, t: loop(p, t, scipy_labels)}
    if importlib.util.find_spec("cc3d"):
        result["loop cc3d"] = lambda p, t: loop(p, t, cc3d_labels)
    result["dense"] = lambda p, t: dense(p, t, figure)
    result["ours"] = lambda p, t: ours(p, t, figure)
    return result


def measure(figure: str, prediction: Mask, target: Mask, rounds: int) -> Iterator[tuple[str, Row]]:
    """Way and values of each row of a figure."""
    times: dict[str, list[float]] = {}
    answers: dict[str, tuple[float, ...]] = {}
    for way, function in ways(figure).items():
        answers[way] = function(prediction, target)  # not timed: caches and imports
        times[way] = []
    first, *_ = answers.values()
    for way, answer in answers.items():
        if not np.allclose(answer, first, rtol=1e-9, atol=0):
            raise RuntimeError(f"{figure}: {way} gives {answer}, expected {first}")
    for _ in range(rounds):
        for way, function in ways(figure).items():
            for _ in range(5 if way == "ours" else 1):  # it is too short for one
                begin = process_time()
                function(prediction, target)
                times[way].append(1000 * (process_time() - begin))
    base = spread(next(iter(times.values()))).median
    for way, values in times.items():
        middle = spread(values)
        row: Row = {"ms": round(middle.median, 3), "iqr_ms": round(middle.iqr, 3)}
        row["speedup"] = round(base / middle.median, 1)
        names = ("mm",) if figure == "hd95" else Counts._fields
        yield way, {**row, "runs": len(values), **dict(zip(names, answers[way], strict=True))}


def main(args: Sequence[str] | None = None) -> None:
    """Run all rows."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, help="results (benchmarks/results/lesion_metrics.json; with --tiny not kept)")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--tiny", action="store_true", help="a dry run on a small volume")
    options = p.parse_args(args)
    shape, numbers = ((40, 48, 40), (3, 8)) if options.tiny else (MNI, (37, 251))
    default = Path(__file__).parent / "results" / "lesion_metrics.json"
    with tempfile.TemporaryDirectory() as scratch:
        results = Results(options.out or (Path(scratch) / default.name if options.tiny else default))
        for number in numbers:
            rng = np.random.default_rng(number)
            target, labels = lesion_mask(number, shape, rng)
            prediction = predicted_mask(labels, number, rng)
            for figure in ("any", "iou", "hd95"):
                key = {"figure": figure, "lesions": number, "shape": "x".join(map(str, shape))}
                if all(results.get(**key, way=way) for way in ways(figure)):
                    continue
                rounds = 1 if options.tiny else 3 if figure == "hd95" else options.rounds
                for way, values in measure(figure, prediction, target, rounds):
                    row = results.add({**key, "way": way}, {**values, "voxels": int(target.sum())})
                    print(" ".join(f"{row[name]}" for name in COLUMNS if name in row), flush=True)
        print(table(results.rows, COLUMNS))


if __name__ == "__main__":
    main()
