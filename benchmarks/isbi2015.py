"""ISBI 2015 cephalograms: train on the 150 training images, report Test1.

A run is a profile plus overrides, trained through the command line users have, with a fixed schedule and its last EMA
weights: no test image takes part in any choice. With `--holdout` nothing of Test1 is read; that is the mode for
choosing settings.

    python benchmarks/isbi2015.py --root /data/isbi2015 --pixel_size 0.2 --seeds 0 1 2
    python benchmarks/isbi2015.py --root ... --name wide --holdout 0.2 --fold 0 --seeds 0 -- --model.backbone hrnet_w48

Rows go to a JSON file; what is there already is not run again.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Results

from lit_landmarks.__main__ import LandmarkCLI, main
from lit_landmarks.metrics import bootstrap_interval, success
from lit_landmarks.readers import Isbi2015

THRESHOLDS = (2.0, 2.5, 3.0, 4.0)
ANNOTATORS = ("mean", "junior", "senior")


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """The script's options and, behind `--`, overrides of the profile."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--root", required=True)
    p.add_argument("--pixel_size", type=float, default=0.2, help="mm per pixel of the files")
    p.add_argument("--config", default="h200", help="profile")
    p.add_argument("--name", default="h200", help="name of the row")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--holdout", type=float, default=0.0, help="score this fraction of the training images, not Test1")
    p.add_argument("--fold", type=int, default=0)
    p.add_argument("--out", type=Path, default=Path("benchmarks/results/isbi2015.json"))
    p.add_argument("--predictions", type=Path, default=None, help="folder for checkpoints and predictions")
    p.add_argument("--deadline", type=float, default=float("inf"), help="Unix time after which no run starts")
    options, rest = p.parse_known_args()
    return options, [a for a in rest if a != "--"]


def figures(errors: np.ndarray) -> dict[str, float]:
    """MRE, SD and SDR of (N, K) errors in mm."""
    flat = torch.from_numpy(errors[np.isfinite(errors)])
    out = {"mre": float(flat.mean()), "sd": float(flat.std()), "median": float(flat.median())}
    return out | {f"sdr_{t:g}mm": 100 * float(success(flat, t).double().mean()) for t in THRESHOLDS}


def errors_mm(points: np.ndarray, truth: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """(N, K) radial errors in mm of (N, K, 2) points in original pixels."""
    return np.sqrt((((points - truth) * spacing[:, None]) ** 2).sum(-1))


def predict(cli: LandmarkCLI) -> np.ndarray:
    """(N, K, 2) points of the split that `predict` reads, in its order."""
    cli.datamodule.hparams["predict_dir"] = None
    batches: Any = cli.trainer.predict(cli.model, datamodule=cli.datamodule)
    order = torch.cat([b["index"] for b in batches]).argsort()
    return torch.cat([b["points"] for b in batches])[order].cpu().numpy()


def run(options: argparse.Namespace, overrides: list[str], seed: int, results: Results) -> None:
    """Train once and add its rows."""
    key = {"name": options.name, "seed": seed, "holdout": options.holdout, "fold": options.fold}
    if results.get(**key, tta="none", annotator="mean") is not None:
        print("already there:", key)
        return
    folder = Path(options.predictions or tempfile.mkdtemp())
    split = "test1" if options.holdout == 0 else "val"
    torch.cuda.reset_peak_memory_stats() if torch.cuda.is_available() else None
    start = time.perf_counter()
    cli = main(
        [
            "fit",
            *("--config", options.config),
            *("--data.root", options.root, "--data.format", "isbi2015", "--data.pixel_size", str(options.pixel_size)),
            *("--data.holdout", str(options.holdout), "--data.fold", str(options.fold)),
            *("--seed_everything", str(seed), "--model.pretrained", "false"),
            *("--trainer.callbacks", "null", "--trainer.logger", "false", "--trainer.enable_checkpointing", "false"),
            *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
            *("--trainer.limit_val_batches", "0", "--plots.worst", "0", "--predictions.overlays", "false"),
            *("--predictions.folder", str(folder), "--trainer.default_root_dir", str(folder)),
            *overrides,
        ]
    )
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    cli.trainer.save_checkpoint(folder / f"{options.name}_seed{seed}.ckpt", weights_only=True)
    data = cli.datamodule
    if split == "val":
        data.hparams["test_split"] = "val"
        data._prepared["predict"] = data.prepared("val")
        truths = {"mean": data.prepared("val").targets}
        spacing = data.prepared("val").spacing
    else:
        data.hparams["test_split"] = "test1"
        tables = {a: Isbi2015(options.root, a, options.pixel_size).read().splits["test1"] for a in ANNOTATORS}
        truths = {a: np.stack([s.points for s in samples]) for a, samples in tables.items()}
        spacing = np.stack([np.array(s.spacing) for s in tables["mean"]])
    variants: tuple[list[str], ...] = ([], ["multiscale"], ["flip"]) if options.holdout == 0 else ([],)
    for tta in variants:
        cli.model.hparams["tta"] = tta
        cli.model.hparams["flip_pairs"] = []
        points = predict(cli)
        label = "+".join(tta) or "none"
        if split == "test1":
            np.save(folder / f"points_{options.name}_seed{seed}_{label}.npy", points.astype(np.float32))
        for annotator, truth in truths.items():
            if annotator != "mean" and tta:
                continue
            errors = errors_mm(points, truth, spacing)
            row: dict[str, Any] = {**figures(errors)}
            if annotator == "mean" and not tta:
                row |= {
                    "mre_interval": bootstrap_interval(torch.from_numpy(errors), lambda e: e.nanmean()),
                    "sdr_2mm_interval": bootstrap_interval(
                        torch.from_numpy(errors), lambda e: 100 * success(e, 2.0).double().mean()
                    ),
                    "per_landmark": [{"name": n, **figures(errors[:, [k]])} for k, n in enumerate(data.landmark_names)],
                    "train_s": round(seconds, 1),
                    "peak_gb": round(peak, 2),
                    "steps": cli.trainer.global_step,
                    "epochs": cli.trainer.current_epoch,
                    "overrides": overrides,
                }
            results.add({**key, "tta": label, "annotator": annotator}, row)
            print(
                f"{options.name} seed {seed} tta {label} truth {annotator}: MRE {row['mre']:.3f} mm, SDR2 "
                f"{row['sdr_2mm']:.2f} %, SDR4 {row['sdr_4mm']:.2f} %, {seconds:.0f} s, {peak:.1f} GB",
                flush=True,
            )


def ensemble(options: argparse.Namespace, results: Results) -> None:
    """The mean of the seeds' points, once all are there."""
    files = (
        sorted(Path(options.predictions).glob(f"points_{options.name}_seed*_none.npy")) if options.predictions else []
    )
    key = {"name": f"{options.name}, mean of {len(files)} models", "holdout": 0.0, "tta": "none", "annotator": "mean"}
    if len(files) < 2 or results.get(**key) is not None:
        return
    samples = Isbi2015(options.root, "mean", options.pixel_size).read().splits["test1"]
    points = np.mean([np.load(f) for f in files], axis=0)
    errors = errors_mm(points, np.stack([s.points for s in samples]), np.stack([np.array(s.spacing) for s in samples]))
    row = {**figures(errors), "mre_interval": bootstrap_interval(torch.from_numpy(errors), torch.mean)}
    results.add(key, row)
    print(f"mean of {len(files)} models: MRE {row['mre']:.3f} mm, SDR2 {row['sdr_2mm']:.2f} %")


if __name__ == "__main__":
    opts, rest = arguments()
    store = Results(opts.out)
    for one_seed in opts.seeds:
        if time.time() < opts.deadline:
            run(opts, rest, one_seed, store)
    if opts.holdout == 0:
        ensemble(opts, store)
