"""What each part of lit_detr is worth: one option changed at a time, equal steps, all else as in a profile.

Every row is a training by the real Trainer on drone_ir with so many optimizer steps of equal batches; only the option
named differs, so what it costs in time stands beside what it brings in precision. Two seeds cannot settle less than a
point or two: the base is given with its own spread, and rows that differ from it by less say nothing. Options that
this version does not have are named and left out, and so are those that the profile has anyway. With tiles, of half the
frame and magnified twice, as many steps see fewer whole images.

The network is not compiled here, since every setting would be compiled anew; `-- --model.compile true` does so.
Choices belong on `--split holdout`, figures to be published on `val`.

    python benchmarks/detr_ablation.py --root /data/drone_ir --steps 2000
    python benchmarks/detr_ablation.py --root ... --only "stride 4 off" --only "NWD 2" -- --data.batch_size 16
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from common import Results, Row, table
from detr_equal_time import FIGURES, QUIET, TINY, build, detector, evaluate, figures_of, fit
from drone_ir import EVALUATION_S, options_of, run_and_summarise
from steps import clean

from lit_detr.augment import DetectionAugmentation
from lit_detr.data import DetectionData
from lit_detr.module import LitDETR

BASE = "base"
HALF = "half of the frame"  # a tile that is magnified twice
KEY = ("part", "setting", "split", "steps", "config", "overrides", "seed")
COLUMNS = ("setting", "seed", *FIGURES[:4], "ar_100", "ar_tiny", "confident", "steps", "train_s", "peak_gb", "loss")


def _each(option: str, values: Sequence[object], *others: str) -> dict[str, dict[str, object]]:
    """Settings of one option, and of others that go with it."""
    words = option.partition(".")[2].replace("_", " ").removeprefix("augment.")
    return {f"{words} {value}": dict.fromkeys((option, *others), value) for value in values}


SETTINGS: dict[str, dict[str, object]] = {
    BASE: {},
    "stride 4 off": {"model.strides": [8, 16, 32]},
    "prior sizes 12 to 40": {"model.prior_sizes": [12, 17, 24, 40]},  # of strides 4 to 32; quantiles of the data
    "NWD 2": {"model.nwd": 2.0},
    "NWD 2 for GIoU": {"model.nwd": 2.0, "model.giou": 0.0},
    **_each("model.noise_queries", (0, 50, 100, 200)),
    **_each("model.noise_weight", (0.5, 2.0)),
    **_each("model.queries", (100, 300, 900), "model.eval_queries"),
    **_each("model.class_loss", ("focal", "vfl", "mal")),
    "mosaic off": {"data.augment.mosaic_p": 0.0},
    "mosaic 0.5": {"data.augment.mosaic_p": 0.5},
    "copy-paste off": {"data.augment.paste_p": 0.0},
    "copy-paste 0.5": {"data.augment.paste_p": 0.5},
    "tiles off": {"data.tile": "null"},
    "tiles": {"data.tile": HALF},
}


def lacking(options: Mapping[str, object]) -> list[str]:
    """Options that this version does not have.

    >>> lacking({"model.lr": 1.0, "data.augment.mosaic_p": 0.5, "data.no_such": 1})
    ['data.no_such']
    """
    owners = {"model": LitDETR, "data": DetectionData, "data.augment": DetectionAugmentation}
    out = []
    for option in options:
        owner, _, name = option.rpartition(".")
        if name not in inspect.signature(owners[owner]).parameters:
            out.append(option)
    return out


def command_line(options: Mapping[str, object], frame: Sequence[int]) -> list[str]:
    """Options as arguments.

    >>> command_line({"model.strides": [8, 16], "data.augment.mosaic_p": 0.5, "data.tile": HALF}, (256, 320))
    ['--model.strides', '[8,16]', '--data.augment.mosaic_p', '0.5', '--data.tile', '[128,160]']
    """
    half = [side // 2 for side in frame]
    known = ((name, half if value == HALF else value) for name, value in options.items())
    pairs = ((f"--{name}", str(value).replace(" ", "")) for name, value in known)
    return [word for pair in pairs for word in pair]


def values_of(arguments: Sequence[str]) -> tuple[Row, tuple[int, int]]:
    """What a command line comes to, for the comparison with another, and the frame."""
    cli = build(arguments)
    values = {**cli.model.hparams, **{f"data.{k}": v for k, v in cli.datamodule.hparams.items()}}
    return values, cli.datamodule.image_size


def run(arguments: Sequence[str], key: Row, results: Results) -> Row:
    """Train and evaluate one setting with one seed."""
    clean()
    cli = build(arguments, key["split"] == "holdout")
    row = fit(cli, None)
    metric, kept = evaluate(cli, *detector(cli))
    sure = sum(int((found["scores"] > 0.3).sum()) for found in kept)
    row |= {**figures_of(metric), "confident": round(sure / max(1, len(kept)), 3)}  # per image
    row |= {"batch": cli.datamodule.hparams["batch_size"], "frame": list(cli.datamodule.image_size)}
    cli.datamodule.teardown("fit")
    return results.add(key, row)


def summary(rows: Sequence[Row]) -> list[Row]:
    """Per setting the mean over seeds, and less the base with the same seeds."""
    out: list[Row] = []
    shared = [k for k in KEY if k not in ("part", "setting", "seed")]
    runs = [row for row in rows if row.get("part") == "run" and "error" not in row]
    for group in dict.fromkeys(tuple(row[k] for k in shared) for row in runs):
        key = dict(zip(shared, group, strict=True))
        mine = [row for row in runs if key.items() <= row.items()]
        base = {row["seed"]: row for row in mine if row["setting"] == BASE}
        for setting in dict.fromkeys(row["setting"] for row in mine):
            own = [row for row in mine if row["setting"] == setting]
            values: Row = {"runs": len(own), "train_s": round(statistics.fmean(r["train_s"] for r in own), 1)}
            for name in (*FIGURES, "confident"):
                known = [r for r in own if r.get(name) is not None]
                if known:
                    values[name] = round(statistics.fmean(r[name] for r in known), 5)
                pairs = [
                    r[name] - base[r["seed"]][name] for r in known if base.get(r["seed"], {}).get(name) is not None
                ]
                if pairs and setting != BASE:
                    values[f"{name}_gain"] = round(statistics.fmean(pairs), 5)
                if setting == BASE and len(known) > 1:
                    values[f"{name}_sd"] = round(statistics.stdev(r[name] for r in known), 5)
            out.append({"part": "summary", "setting": setting, **key, **values})
    return out


def arguments(args: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The script's options and, behind `--`, overrides of the profile, for all settings."""
    parser = options_of(__doc__, "detr_ablation")
    parser.add_argument("--steps", type=int, default=2000, help="of each training (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", action="append", choices=list(SETTINGS), metavar="SETTING", help="beside the base")
    parser.add_argument("--split", choices=["val", "holdout"], default="val", help="holdout: to choose settings on")
    options, rest = parser.parse_known_args(args)
    if options.tiny:
        options.seeds, options.config, options.steps = options.seeds[:1], "demo", 2
    elif not options.root and not options.take:
        parser.error("--root: expected the folder of the data set")
    return options, [a for a in rest if a != "--"]


def main(args: Sequence[str] | None = None) -> None:
    """Run what is missing and print the tables."""
    options, overrides = arguments(args)
    gains = ("ap_gain", "ap_tiny_gain", "ar_tiny_gain", "ap_sd", "ap_tiny_sd")
    run_and_summarise(
        options,
        KEY,
        lambda results, folder: measure(options, overrides, results, folder),
        summary,
        COLUMNS,
        ("setting", *FIGURES[:4], *gains, "runs", "train_s"),
    )


def measure(options: argparse.Namespace, overrides: list[str], results: Results, folder: Path) -> None:
    """All runs that are missing, seed by seed."""
    base = ["--config", options.config, "--data.root", str(options.root), "--data.group", "stem"]
    base = [*TINY] if options.tiny else base
    base += [*QUIET, "--trainer.default_root_dir", str(folder), "--model.compile", "false", *overrides]
    base += ["--trainer.max_epochs", "-1", "--trainer.max_steps", str(options.steps)]
    plan, (known, frame) = [], values_of(base)
    for setting in dict.fromkeys([BASE, *(options.only or SETTINGS)]):
        if missing := lacking(SETTINGS[setting]):
            print(f"{setting}: left out, there is no {', '.join(missing)}")
        elif setting != BASE and values_of([*base, *command_line(SETTINGS[setting], frame)])[0] == known:
            print(f"{setting}: left out, the profile has that")
        else:
            plan.append(setting)
    longest = 0.0
    for seed in options.seeds:
        for setting in plan:
            key: Row = {"part": "run", "setting": setting, "split": options.split, "steps": options.steps}
            key |= {"config": options.config, "overrides": " ".join(overrides), "seed": seed}
            if results.get(**key) is not None:
                continue
            # Settings differ in their time: half as much again as the longest so far.
            if time.time() + (1.5 * longest or EVALUATION_S * (not options.tiny)) > options.deadline:
                print(f"deadline: stopped before {setting}, seed {seed}; the same command goes on from here")
                return
            own = [
                *base,
                *command_line(SETTINGS[setting], frame),
                "--seed_everything",
                str(seed),
                "--data.seed",
                str(seed),
            ]
            begin = time.time()
            try:
                row = run(own, key, results)
            except torch.OutOfMemoryError as error:
                row = results.add(key, {"error": str(error).splitlines()[0]})
            print(table([row], (*COLUMNS, "error")).splitlines()[-1], flush=True)
            longest = max(longest, time.time() - begin)


if __name__ == "__main__":
    main()
