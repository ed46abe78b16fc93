"""Crowded scenes at equal time, from random weights: ours beside RT-DETRv2-R18 and torchvision's FCOS-R18.

Scenes are frames of drone_ir side by side with their objects pasted wherever nothing is (`lit_detr.canvas`): about 100
boxes on 2 x 2 frames, or 500 on 3 x 3, most of 8 to 25 px. Those for training are made of training frames, those for
evaluation of validation frames; they are drawn once with a fixed seed and kept in `--work`. What is pasted is easier
than the frames' own objects, so that figures compare methods with each other, not with other data.

Time, batches, augmentation, schedule, average and evaluator are shared as in `drone_ir.py`, but without mosaics, since
scenes are composed already. Queries and detections are as many for RT-DETRv2 as ours has for such scenes, and more than
there are boxes; FCOS may keep as many detections. Ours is not compiled: the number of boxes, and so its shapes, differ
from batch to batch.

    python benchmarks/detr_dense.py --root /data/drone_ir --minutes 4 --work /tmp/dense
    python benchmarks/detr_dense.py --root ... --boxes 500 --only ours -- --model.strides [8,16,32]
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from common import Results, Row, table
from detr_equal_time import PLAIN, QUIET, TINY, Recipe, Way, compete
from detr_peers import Peer, fcos_r18, rtdetr_v2
from drone_ir import EVALUATION_S, options_of, run_and_summarise
from numpy.typing import NDArray

from lit_detr.canvas import Canvas, dense_composite
from lit_detr.data import DetectionData
from lit_detr.samples import DetectionSample
from lit_detr.store import read_image

SOURCES = 60  # frames that a scene is made of, backgrounds and objects
METHODS = ("ours", "ours 8-32", "RT-DETRv2", "RT-DETRv2 mended", "RT-DETRv2 mended TF32", "FCOS P2 AdamW")
KEY = ("part", "method", "boxes", "scenes", "minutes", "config", "overrides", "seed")
SHOWN = ("ap", "ap50", "ap_tiny", "ap_small", "ar_1500", "ar50_1500", "ar_tiny")
COLUMNS = ("method", "boxes", "seed", *SHOWN, "steps", "images_s", "train_s", "first_s", "peak_gb")


@dataclass(frozen=True)
class Density:
    """How scenes with so many boxes are laid out, and what methods need for them."""

    columns: int
    rows: int
    queries: int
    batch: int

    @property
    def frame(self) -> tuple[int, int]:
        """Height and width of scenes of 320 x 256 frames."""
        return 256 * self.rows, 320 * self.columns


DENSITIES = {100: Density(2, 2, 300, 16), 500: Density(3, 3, 750, 8)}


# ---- scenes ---------------------------------------------------------------------------------------------------------

Frame = tuple[NDArray[np.uint8], DetectionSample]
_frames: list[Frame] = []  # of the split at work, in each process


def _share(frames: list[Frame]) -> None:
    _frames[:] = frames


def scene(seed: int, boxes: int, columns: int, rows: int) -> Canvas:
    """One scene of the shared frames."""
    chosen = np.random.default_rng(seed).choice(len(_frames), min(SOURCES, len(_frames)), replace=False)
    images, samples = zip(*(_frames[i] for i in chosen), strict=True)
    return dense_composite(images, samples, boxes, seed, columns=columns, rows=rows)


def make_scenes(data: DetectionData, folder: Path, boxes: int, counts: dict[str, int]) -> Path:
    """Write scenes as a COCO data set, unless they are there.

    Args:
        data: Where frames come from.
        folder: Where data sets are kept.
        boxes: On each scene.
        counts: Scenes by split.

    Returns:
        The root of the data set.
    """
    density = DENSITIES[boxes]
    root = folder / "_".join(["dense", str(boxes), *(str(n) for n in counts.values())])
    for number, (split, count) in enumerate(counts.items()):
        file = root / "annotations" / f"{split}.json"
        if file.is_file():
            continue
        (root / split).mkdir(parents=True, exist_ok=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        samples = data.table.splits[split]
        frames = [(data.image_of(s) if data.hparams["format"] == "synthetic" else read(s), s) for s in samples]
        seeds = range(1_000_000 * number, 1_000_000 * number + count)
        layout = {"boxes": boxes, "columns": density.columns, "rows": density.rows}
        with ProcessPoolExecutor(initializer=_share, initargs=(frames,)) as pool:
            scenes = pool.map(functools.partial(scene, **layout), seeds, chunksize=4)
            content = write_scenes(scenes, root / split, data)
        file.write_text(json.dumps(content))
    return root


def read(sample: DetectionSample) -> NDArray[np.uint8]:
    """(3, H, W) of a file."""
    return read_image(sample, 3).transpose(2, 0, 1)


def write_scenes(scenes: Any, folder: Path, data: DetectionData) -> dict[str, list[Row]]:
    """Write the images of scenes; their annotation in COCO's form."""
    ids = data.table.category_ids or list(range(1, len(data.class_names) + 1))
    images: list[Row] = []
    rows: list[Row] = []
    for number, canvas in enumerate(scenes, 1):
        name = f"{number:05d}.png"
        if not cv2.imwrite(str(folder / name), np.ascontiguousarray(canvas.image.transpose(1, 2, 0)[:, :, ::-1])):
            raise OSError(f"{folder / name}: could not be written")
        _, height, width = canvas.image.shape
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for (x1, y1, x2, y2), label in zip(canvas.boxes.tolist(), canvas.labels.tolist(), strict=True):
            bbox = [x1, y1, x2 - x1, y2 - y1]
            row = {"id": len(rows) + 1, "image_id": number, "category_id": ids[label], "bbox": bbox}
            rows.append({**row, "area": bbox[2] * bbox[3], "iscrowd": 0})
    classes = [{"id": i, "name": name} for i, name in zip(ids, data.class_names, strict=True)]
    return {"images": images, "annotations": rows, "categories": classes}


# ---- methods --------------------------------------------------------------------------------------------------------


def way_of(method: str, density: Density) -> Way:
    """A method, with as many queries and detections as the scenes need."""
    queries = density.queries

    def rtdetr(classes: int, size: tuple[int, int]) -> Peer:
        peer = rtdetr_v2(classes, size, queries=queries, patched="mended" in method, channels_last=True)
        peer.detections = queries
        return peer

    def fcos(classes: int, size: tuple[int, int]) -> Peer:
        return fcos_r18(classes, 4, channels_last=True, detections=queries)

    if method.startswith("ours"):
        numbers = dict.fromkeys(("queries", "eval_queries", "most_detections"), queries)
        extra = [word for name, value in numbers.items() for word in (f"--model.{name}", str(value))]
        strides = ["--model.strides", "[8,16,32]"] if method == "ours 8-32" else []
        return Way(extra=(*extra, "--model.compile", "false", *strides))
    if method.startswith("FCOS"):
        return Way(fcos, Recipe(lr=1e-3, clip=10.0))
    return Way(rtdetr, Recipe(dtype=None if method.endswith("TF32") else torch.bfloat16))


def run(method: str, arguments: Sequence[str], key: Row, results: Results) -> Row:
    """Train and evaluate one method with one seed."""
    way = way_of(method, DENSITIES[key["boxes"]])
    overrides = key["overrides"].split()
    cli, row, _, kept = compete(
        Way(way.make, way.recipe, (*way.extra, *overrides)), arguments, key["minutes"], key["seed"]
    )
    samples = cli.datamodule.prepared("val").samples
    row |= {"boxes_per_image": round(statistics.fmean(len(s.boxes) for s in samples), 1)}
    row |= {"found_per_image": round(statistics.fmean(int((f["scores"] > 0.3).sum()) for f in kept), 1)}
    cli.datamodule.teardown("fit")
    return results.add(key, row)


def summary(rows: Sequence[Row]) -> list[Row]:
    """Per density and method the mean over seeds."""
    out: list[Row] = []
    shared = [k for k in KEY if k not in ("part", "seed")]
    runs = [row for row in rows if row.get("part") == "run" and "error" not in row]
    for setting in dict.fromkeys(tuple(row[k] for k in shared) for row in runs):
        key = dict(zip(shared, setting, strict=True))
        own = [row for row in runs if key.items() <= row.items()]
        values: Row = {"runs": len(own)}
        for name in (*SHOWN, "steps", "images_s"):
            known = [row[name] for row in own if row.get(name) is not None]
            values |= {name: round(statistics.fmean(known), 5)} if known else {}
            values |= {f"{name}_sd": round(statistics.stdev(known), 5)} if len(known) > 1 else {}
        out.append({"part": "summary", **key, **values})
    return out


def arguments(args: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The script's options and, behind `--`, overrides of ours, and of the data for all."""
    parser = options_of(__doc__, "detr_dense")
    parser.add_argument("--minutes", type=float, default=4.0, help="of each training (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--boxes", type=int, nargs="+", choices=list(DENSITIES), default=list(DENSITIES))
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help="of these")
    parser.add_argument("--scenes", type=int, nargs=2, default=[300, 60], help="for training and evaluation")
    parser.add_argument("--work", type=Path, help="folder where scenes are kept; by default they are drawn anew")
    options, rest = parser.parse_known_args(args)
    if options.tiny:
        options.seeds, options.config, options.minutes, options.scenes = options.seeds[:1], "demo", 0.0, [4, 2]
        options.boxes = options.boxes[:1]
    elif not options.root and not options.take:
        parser.error("--root: expected the folder of the data set")
    return options, [a for a in rest if a != "--"]


def main(args: Sequence[str] | None = None) -> None:
    """Run what is missing and print the tables."""
    options, overrides = arguments(args)
    run_and_summarise(
        options,
        KEY,
        lambda results, folder: measure(options, overrides, results, folder),
        summary,
        COLUMNS,
        ("method", "boxes", *SHOWN, "ap_sd", "runs", "steps", "images_s"),
    )


def source(options: argparse.Namespace) -> DetectionData:
    """The frames."""
    if options.tiny:
        return DetectionData(format="synthetic", image_size=[64, 96], channels=3, synthetic_train=8, synthetic_val=6)
    return DetectionData(root=options.root, group="stem", image_size=[256, 320])


def measure(options: argparse.Namespace, overrides: list[str], results: Results, folder: Path) -> None:
    """All runs that are missing."""
    counts: dict[str, int] = dict(zip(("train", "val"), options.scenes, strict=True))
    data = source(options)
    for boxes in options.boxes:
        density = DENSITIES[boxes]
        plan = [(seed, method) for seed in options.seeds for method in options.only]
        fixed: Row = {
            "part": "run",
            "boxes": boxes,
            "scenes": "+".join(map(str, counts.values())),
            "minutes": options.minutes,
        }
        fixed |= {"config": options.config, "overrides": " ".join(overrides)}
        plan = [(s, m) for s, m in plan if results.get(**fixed, seed=s, method=m) is None]
        if not plan:
            continue
        root = make_scenes(data, options.work or folder, boxes, counts)
        base = [*TINY, "--data.format", "coco"] if options.tiny else ["--config", options.config]
        height, width = (64 * density.rows, 96 * density.columns) if options.tiny else density.frame
        base += [*QUIET, "--trainer.default_root_dir", str(folder), "--data.root", str(root)]
        base += ["--data.image_size", f"[{height},{width}]", *PLAIN]
        base += ["--data.batch_size", str(2 if options.tiny else density.batch)]
        for seed, method in plan:
            if time.time() + 60 * options.minutes + EVALUATION_S * (not options.tiny) > options.deadline:
                print(f"deadline: stopped before {method}, seed {seed}; the same command goes on from here")
                return
            own = [*base, "--seed_everything", str(seed), "--data.seed", str(seed)]
            try:
                row = run(method, own, {**fixed, "seed": seed, "method": method}, results)
            except (ModuleNotFoundError, torch.OutOfMemoryError) as error:
                row = results.add({**fixed, "seed": seed, "method": method}, {"error": str(error).splitlines()[0]})
            print(table([row], (*COLUMNS, "error")).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
