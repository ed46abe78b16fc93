"""Average precision at equal time, from random weights: ours beside RT-DETRv2-R18 and torchvision's FCOS-R18.

Every method gets the same seconds on one GPU, from before its first import of data to its last step: decoding from the
cache, upload, compilation and captures are in, evaluation is not. All see the same batches in the same order, with the
profile's augmentation on the device, all follow one course of the learning rate and switch mosaics off at one point,
both by the share of the time that is gone, and all are evaluated with an average of their weights of the same decay. So
the schedule ends with the time, however fast a method is, and no number of steps has to be guessed.

Ours is a profile as the command line builds it, in the real Trainer; peers run in a plain loop, which costs them less.
They are not compiled: their shapes change with the densest image of every batch. A peer's settings are what suits it
best, as far as known: RT-DETRv2 with bf16 and channels_last as published, with its last layer's loss mended, and that
in TF32 too, since bf16 rounds its coordinates; FCOS with a stride of 4 or 8, with AdamW or SGD. Rows named `plain` have
no mosaics and the default scaling, for the profile's were chosen for ours. Whoever tries other settings does so with
`--split holdout`, which leaves `val` alone and holds out a quarter of the videos of `train`.

Detections of all go through one evaluator. Intervals are over videos, drawn alike for all methods, so that differences
are paired; spreads are over seeds.

    python benchmarks/drone_ir.py --root /data/drone_ir --minutes 4 --save benchmarks/results/drone_ir
    python benchmarks/drone_ir.py --root ... --split holdout --only "FCOS P2 AdamW" --lr 2e-3 --seeds 0
    python benchmarks/drone_ir.py --root ... --scale 2 -- --model.queries 200     # overrides of ours
    python benchmarks/drone_ir.py --take a.json b.json                            # rows of several GPUs together
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from common import Results, Row, table, take
from detr_equal_time import FIGURES, PLAIN, QUIET, TINY, Recipe, Way, build, compete
from detr_peers import Peer, fcos_r18, rtdetr_v2

from lit_detr.__main__ import DetectionCLI
from lit_detr.metrics import DetectionAP

DRAWS = 500
EVALUATION_S = 60.0  # what a row takes beside its training, rather too much than too little
DRAWN = ("ap", "ap50", "ap_tiny")
KEY = ("part", "method", "split", "scale", "minutes", "config", "overrides", "lr", "seed")
COLUMNS = ("method", "split", "scale", "seed", *FIGURES[:6], "steps", "train_s", "first_s", "peak_gb")


def _rtdetr(classes: int, size: tuple[int, int], queries: int = 300, patched: bool = False) -> Peer:
    cells = sum(size[0] * size[1] // stride**2 for stride in (8, 16, 32))
    return rtdetr_v2(classes, size, queries=min(queries, cells), patched=patched, channels_last=True)


def _fcos(classes: int, size: tuple[int, int], finest: Literal[4, 8] = 4) -> Peer:
    return fcos_r18(classes, finest, channels_last=True)


_ADAMW, _SGD = Recipe(lr=1e-3, clip=10.0), Recipe("sgd", 2e-2, clip=10.0)
WAYS = {
    "ours": Way(),
    "ours 8-32": Way(extra=("--model.strides", "[8,16,32]")),
    "ours plain": Way(extra=PLAIN),
    "RT-DETRv2": Way(_rtdetr),
    "RT-DETRv2 plain": Way(_rtdetr, extra=PLAIN),
    "RT-DETRv2 mended": Way(functools.partial(_rtdetr, patched=True)),
    "RT-DETRv2 mended plain": Way(functools.partial(_rtdetr, patched=True), extra=PLAIN),
    "RT-DETRv2 mended TF32": Way(functools.partial(_rtdetr, patched=True), Recipe(dtype=None)),
    "FCOS P2 AdamW": Way(_fcos, _ADAMW),
    "FCOS P2 AdamW plain": Way(_fcos, _ADAMW, PLAIN),
    "FCOS P2 SGD": Way(_fcos, _SGD),
    "FCOS P3 AdamW": Way(functools.partial(_fcos, finest=8), _ADAMW),
    "FCOS P3 SGD": Way(functools.partial(_fcos, finest=8), _SGD),
}


# ---- drawn videos ---------------------------------------------------------------------------------------------------


def draws_of(cli: DetectionCLI, metric: DetectionAP, n: int = DRAWS) -> dict[str, Any]:
    """Figures of drawn videos."""
    groups = {s.image_id: s.group for s in cli.datamodule.prepared("val").samples}
    return {name: value.numpy() for name, value in metric.bootstrap_ap(groups, n=n).items()}


def interval(draws: Any) -> tuple[float, float]:
    """The middle 95 %."""
    low, high = np.nanpercentile(draws, [2.5, 97.5]) if np.isfinite(draws).any() else (math.nan, math.nan)
    return round(float(low), 4), round(float(high), 4)


def save(path: Path, kept: Sequence[Row], draws: dict[str, Any]) -> None:
    """Detections, image after image, and the draws."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        "image_id": np.array([row["image_id"] for row in kept], np.int64),
        "count": np.array([len(row["scores"]) for row in kept], np.int32),
        "boxes": torch.cat([row["boxes"] for row in kept]).float().numpy(),
        "scores": torch.cat([row["scores"] for row in kept]).numpy(),
        "labels": torch.cat([row["labels"] for row in kept]).to(torch.uint8).numpy(),
    }
    np.savez_compressed(path, **arrays, **{f"draws_{name}": value for name, value in draws.items()})


# ---- rows -----------------------------------------------------------------------------------------------------------


def file_of(folder: Path, row: Row) -> Path:
    """Where the detections of a row are kept."""
    words = "_".join(str(row[k]) for k in KEY[1:] if row[k] not in (None, "", "val"))
    return folder / ("".join(c if c.isalnum() or c in "._-" else "-" for c in words) + ".npz")


def run(way: Way, arguments: Sequence[str], key: Row, results: Results, folder: Path | None, draws: int) -> Row:
    """Train and evaluate one method with one seed."""
    holdout = key["split"] == "holdout"
    cli, row, metric, kept = compete(way, arguments, key["minutes"], key["seed"], holdout)
    drawn = draws_of(cli, metric, draws)
    row |= {f"{name}_interval": interval(values) for name, values in drawn.items()}
    cli.datamodule.teardown("fit")
    if folder is not None:
        save(file_of(folder, key), kept, drawn)
    return results.add(key, row)


def summary(rows: Sequence[Row], folder: Path | None) -> list[Row]:
    """Per setting and method the mean and the spread over seeds; then ours less each other one, paired over videos."""
    out: list[Row] = []
    shared = [k for k in KEY if k not in ("part", "method", "seed", "lr")]
    runs = [row for row in rows if row.get("part") == "run" and "error" not in row]
    for setting in dict.fromkeys(tuple(row[k] for k in shared) for row in runs):
        key = dict(zip(shared, setting, strict=True))
        mine = [row for row in runs if key.items() <= row.items()]
        methods = dict.fromkeys((row["method"], row["lr"]) for row in mine)
        each = {m: [row for row in mine if (row["method"], row["lr"]) == m] for m in methods}
        for (method, lr), own in each.items():
            values: Row = {"runs": len(own), "steps": round(statistics.fmean(r["steps"] for r in own))}
            for name in FIGURES:
                known = [r[name] for r in own if r[name] is not None]
                values[name] = round(statistics.fmean(known), 5) if known else None
                if len(known) > 1:
                    values[f"{name}_sd"] = round(statistics.stdev(known), 5)
            out.append({"part": "summary", "method": method, "lr": lr, **key, **values})
        drawn = {m: found for m, own in each.items() if folder and (found := pooled(own, folder))}
        ours = drawn.get(("ours", None))
        for (method, lr), theirs in drawn.items():
            if ours is None or method == "ours":
                continue
            values = {}
            for name in DRAWN:
                low, high = interval(ours[name] - theirs[name])
                means = [statistics.fmean(r[name] for r in each[m]) for m in (("ours", None), (method, lr))]
                values |= {name: round(means[0] - means[1], 5), f"{name}_low": low, f"{name}_high": high}
            out.append({"part": "summary", "method": f"ours - {method}", "lr": lr, **key, **values})
    return out


def pooled(rows: Sequence[Row], folder: Path) -> dict[str, Any] | None:
    """Draws of a method, mean over its seeds; None where a file is missing or has other draws."""
    files = [file_of(folder, row) for row in rows]
    if not all(file.is_file() for file in files):
        return None
    found = {name: [np.load(file)[f"draws_{name}"] for file in files] for name in DRAWN}
    return {name: np.mean(values, axis=0) for name, values in found.items()}


def options_of(doc: str | None, out: str) -> argparse.ArgumentParser:
    """What the scripts of this kind share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder of the data set")
    parser.add_argument("--config", default="h200", help="profile (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/{out}.json"))
    parser.add_argument("--take", type=Path, nargs="+", default=[], help="add the rows of these files and stop")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="Unix time that no run should pass")
    parser.add_argument("--tiny", action="store_true", help="a dry run on a CPU")
    return parser


def arguments(args: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The script's options and, behind `--`, overrides of the profile."""
    parser = options_of(__doc__, "drone_ir")
    parser.add_argument("--minutes", type=float, default=4.0, help="of each training (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="METHOD", help="of these")
    parser.add_argument("--scale", type=int, choices=[1, 2], default=1, help="magnify the frames for all methods")
    parser.add_argument("--split", choices=["val", "holdout"], default="val", help="holdout: to choose settings on")
    parser.add_argument("--lr", type=float, help="another learning rate, for peers")
    parser.add_argument("--save", type=Path, help="folder of detections and draws, which the differences need")
    options, rest = parser.parse_known_args(args)
    if options.tiny:
        options.seeds, options.config, options.minutes = options.seeds[:1], "demo", 0.0
    elif not options.root and not options.take:
        parser.error("--root: expected the folder of the data set")
    return options, [a for a in rest if a != "--"]


def run_and_summarise(
    options: argparse.Namespace,
    key: Sequence[str],
    measure: Callable[[Results, Path], None],
    summary: Callable[[Sequence[Row]], list[Row]],
    columns: Sequence[str],
    shown: Sequence[str],
) -> None:
    """Run what is missing, or take the rows of other files, and print the tables of the runs and of their summary.

    Args:
        options: Of `options_of`.
        key: Names of what tells rows apart.
        measure: Adds what is missing, with a scratch folder.
        summary: Rows from rows.
        columns: Of the runs.
        shown: Of the summary.
    """
    warnings.filterwarnings("ignore")
    results = Results(options.out)
    if options.take:
        take(results, options.take, key)
    else:
        with tempfile.TemporaryDirectory() as folder:
            measure(results, Path(folder))
    for row in summary(results.rows):
        results.add({k: row[k] for k in key if k in row}, {k: v for k, v in row.items() if k not in key})
    print(table([row for row in results.rows if row["part"] == "run"], columns))
    print(table([row for row in results.rows if row["part"] == "summary"], shown))


def main(args: Sequence[str] | None = None) -> None:
    """Run what is missing and print the tables."""
    options, overrides = arguments(args)
    shown = ("method", "split", "scale", "lr", *FIGURES[:4], "ap_sd", "ap_tiny_sd", "ap_low", "ap_high")
    shown += ("ap_tiny_low", "ap_tiny_high", "runs", "steps")
    run_and_summarise(
        options,
        KEY,
        lambda results, folder: measure(options, overrides, results, folder),
        lambda rows: summary(rows, options.save),
        COLUMNS,
        shown,
    )


def measure(options: argparse.Namespace, overrides: list[str], results: Results, folder: Path) -> None:
    """All runs that are missing, seed by seed."""
    base = ["--config", options.config, "--data.root", str(options.root), "--data.group", "stem"]
    frame = f"[{256 * options.scale},{320 * options.scale}]"
    base = [*TINY] if options.tiny else [*base, "--data.image_size", frame]
    base += [*QUIET, "--trainer.default_root_dir", str(folder), *overrides]
    plan: list[tuple[Way, Row]] = []
    for seed in options.seeds:
        for method in options.only:
            way, lr = WAYS[method], options.lr if WAYS[method].make is not None else None
            key: Row = dict.fromkeys(KEY) | {"part": "run", "method": method, "split": options.split}
            key |= {"scale": options.scale, "minutes": options.minutes, "config": options.config}
            key |= {"overrides": " ".join(overrides), "lr": lr, "seed": seed}
            if results.get(**key) is None:
                plan.append((way if lr is None else replace(way, recipe=replace(way.recipe, lr=lr)), key))
    if plan:
        data = build(base).datamodule
        for split in ("train", "val"):  # into the cache, so that the first row need not
            data.prepared(split)
    for way, key in plan:
        seed = key["seed"]
        if time.time() + 60 * options.minutes + EVALUATION_S * (not options.tiny) > options.deadline:
            print(f"deadline: stopped before {key['method']}, seed {seed}; the same command goes on from here")
            return
        own = [*base, "--seed_everything", str(seed), "--data.seed", str(seed)]
        try:
            row = run(way, own, key, results, options.save, 20 if options.tiny else DRAWS)
        except (ModuleNotFoundError, torch.OutOfMemoryError) as error:
            row = results.add(key, {"error": str(error).splitlines()[0]})
        print(table([row], (*COLUMNS, "error")).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
