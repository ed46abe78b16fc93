"""What the evaluation of detections costs on one CPU core: ours beside pycocotools and torchmetrics.

Drawn scenes have boxes of 4 to 40 px in three classes; detections lie near boxes and elsewhere, with random scores.
Each way evaluates the same scenes from tensors to figures; one whose COCO figures differ from pycocotools' ends the
script. `ours` gives COCO's and AI-TOD's ranges and limits and each class in one pass; `pycocotools` and `torchmetrics`
give COCO's ranges with 100 detections alone, `torchmetrics class_metrics` each class as well; torchmetrics runs on its
default back end, pycocotools, and on faster-coco-eval. `bootstrap` is 100 draws over groups of eight images.

Times are CPU time of the process, which others on the same machine disturb least; everything runs in one thread. The
ways of pycocotools run once where a round takes longer than `--patience` seconds.

    OMP_NUM_THREADS=1 python benchmarks/detection_metrics.py [--out benchmarks/results/detection_metrics.json] [--tiny]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

import numpy as np
import torch
from common import Results, Row, spread, table
from torch import Tensor

from lit_detr.metrics import DetectionAP

CLASSES = 3
SIZE = 640
FULL = ((100, 100, 300), (400, 2, 300))  # images, boxes and detections in each: crowded and sparse
COLUMNS = ("scene", "way", "s", "iqr_s", "runs", "images_s", "speedup", "ap", "ap_tiny")
FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium")

Part = dict[str, Tensor]
Way = Callable[["Scene"], dict[str, float]]


class Scene(NamedTuple):
    """Detections and boxes of each image."""

    found: list[Part]
    true: list[Part]


def scene(images: int, boxes: int, detections: int, seed: int = 0) -> Scene:
    """Half of the detections near boxes, half anywhere."""
    rng = np.random.default_rng(seed)
    result = Scene([], [])
    for _ in range(images):
        side, corner = rng.uniform(4, 40, (boxes, 2)), rng.uniform(0, SIZE - 40, (boxes, 2))
        true, labels = np.concatenate([corner, corner + side], 1), rng.integers(0, CLASSES, boxes)
        which, near = rng.integers(0, boxes, detections), rng.random(detections) < 0.5
        spot = rng.uniform(0, SIZE - 40, (detections, 2))
        far = np.concatenate([spot, spot + rng.uniform(4, 40, (detections, 2))], 1)
        close = true[which] + rng.normal(0, 0.1, (detections, 4)) * np.tile(side[which], 2) * rng.random(
            (detections, 1)
        )
        found = np.where(near[:, None], close, far)
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
        score = np.where(near, rng.beta(3, 2, detections), rng.beta(2, 3, detections))
        result.found.append(_part(boxes=found, scores=score, labels=labels[which]))
        result.true.append(_part(boxes=true, labels=labels, area=side.prod(1)))
    return result


def _part(**arrays: Any) -> Part:
    return {k: torch.from_numpy(v) if v.dtype == np.int64 else torch.from_numpy(v).float() for k, v in arrays.items()}


# Ways


def filled(data: Scene) -> DetectionAP:
    """Our metric after an epoch."""
    metric = DetectionAP([f"class {k}" for k in range(CLASSES)])
    metric.update(range(len(data.found)), data.found, data.true)
    return metric


def ours(data: Scene) -> dict[str, float]:
    """Both protocols and the classes."""
    return {k: v.item() for k, v in filled(data).compute().items()}


def bootstrap(data: Scene) -> dict[str, float]:
    """Means over the draws."""
    draws = filled(data).bootstrap_ap([str(i // 8) for i in range(len(data.found))], n=100)
    return {k: v.nanmean().item() for k, v in draws.items()}


def pycocotools(data: Scene) -> dict[str, float]:
    """The reference, without its printing."""
    api: Any = importlib.import_module("pycocotools.coco")
    evaluator: Any = importlib.import_module("pycocotools.cocoeval")
    truth: list[Row] = []
    found: list[Row] = []
    for i, (d, t) in enumerate(zip(data.found, data.true, strict=True)):
        for box, label, area in zip(_xywh(t["boxes"]), t["labels"].tolist(), t["area"].tolist(), strict=True):
            row = {"id": len(truth) + 1, "image_id": i, "category_id": label, "bbox": box, "area": area, "iscrowd": 0}
            truth.append(row)
        for box, label, score in zip(_xywh(d["boxes"]), d["labels"].tolist(), d["scores"].tolist(), strict=True):
            found.append({"image_id": i, "category_id": label, "bbox": box, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        gt = api.COCO()
        images, categories = [{"id": i} for i in range(len(data.true))], [{"id": k} for k in range(CLASSES)]
        gt.dataset = {"images": images, "categories": categories, "annotations": truth, "info": {}}
        gt.createIndex()
        run = evaluator.COCOeval(gt, gt.loadRes(found), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return {f"coco_{name}": float(value) for name, value in zip(FIGURES, run.stats, strict=False)}


def _xywh(boxes: Tensor) -> list[list[float]]:
    wide = boxes.double()
    return torch.cat([wide[:, :2], wide[:, 2:] - wide[:, :2]], 1).tolist()


def torchmetrics(data: Scene, backend: str, class_metrics: bool) -> dict[str, float]:
    """With the thresholds of COCO in double precision; its own are rounded and move AP in the fourth digit."""
    detection: Any = importlib.import_module("torchmetrics.detection")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = detection.MeanAveragePrecision(
            backend=backend,
            class_metrics=class_metrics,
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0, 1, 101).tolist(),
        )
        metric.update(data.found, data.true)
        figures = metric.compute()
    names = ("map", "map_50", "map_75", "map_small", "map_medium")
    return {f"coco_{ours}": float(figures[name]) for ours, name in zip(FIGURES, names, strict=True)}


def ways() -> dict[str, Way]:
    """The first is what the others are compared with."""
    result: dict[str, Way] = {"ours": ours, "bootstrap": bootstrap}
    fast = "faster_coco_eval"
    result["torchmetrics, faster-coco-eval"] = lambda d: torchmetrics(d, fast, False)
    if importlib.util.find_spec("pycocotools"):
        result = {"pycocotools": pycocotools, **result}
        result["torchmetrics"] = lambda d: torchmetrics(d, "pycocotools", False)
        result["torchmetrics class_metrics"] = lambda d: torchmetrics(d, "pycocotools", True)
    return result


def measure(way: Way, data: Scene, rounds: int, patience: float) -> tuple[Row, dict[str, float]]:
    """Seconds and figures; what is slow runs once."""
    seconds: list[float] = []
    figures: dict[str, float] = {}
    while len(seconds) < rounds and not (seconds and seconds[0] > patience):
        begin = process_time()
        figures = way(data)
        seconds.append(process_time() - begin)
    middle = spread(seconds)
    row = {"s": round(middle.median, 4), "iqr_s": round(middle.iqr, 4), "runs": len(seconds)}
    return {**row, "images_s": round(len(data.found) / middle.median, 1)}, figures


def check(way: str, figures: dict[str, float], reference: dict[str, float]) -> None:
    """Raise where COCO's figures differ."""
    for key in (f"coco_{name}" for name in FIGURES):
        if key in figures and key in reference and not np.isclose(figures[key], reference[key], rtol=0, atol=1e-6):
            raise RuntimeError(f"{way}: {key} is {figures[key]}, expected {reference[key]}")


def main(args: Sequence[str] | None = None) -> None:
    """Run all rows."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, help="results (benchmarks/results/detection_metrics.json; with --tiny not kept)")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--patience", type=float, default=3.0, help="seconds above which a way runs once")
    p.add_argument("--tiny", action="store_true", help="a dry run on a few images")
    options = p.parse_args(args)
    default = Path(__file__).parent / "results" / "detection_metrics.json"
    with tempfile.TemporaryDirectory() as scratch:
        results = Results(options.out or (Path(scratch) / default.name if options.tiny else default))
        for size in ((16, 4, 9),) if options.tiny else FULL:
            key = {"scene": "{} images, {} boxes, {} detections".format(*size)}
            if all(results.get(**key, way=way) for way in ways()):
                continue
            data = scene(*size)
            ours(scene(2, 3, 4))  # imports are not timed
            reference: dict[str, float] = {}
            base: float | None = None
            for name, way in ways().items():
                row, figures = measure(way, data, 1 if options.tiny else options.rounds, options.patience)
                reference = reference or figures
                check(name, figures, reference)
                base = base or row["s"]
                shown = {k: round(figures[k], 6) for k in ("ap", "ap_tiny", "coco_ap", "coco_ap_small") if k in figures}
                speedup = {} if name == "bootstrap" else {"speedup": round(base / max(row["s"], 1e-9), 1)}
                added = results.add({**key, "way": name}, {**row, **speedup, **shown})
                print(" ".join(f"{added[c]}" for c in COLUMNS if c in added), flush=True)
        print(table(results.rows, COLUMNS))


if __name__ == "__main__":
    main()
