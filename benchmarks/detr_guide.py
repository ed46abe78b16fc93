"""The original guide's nine optimisations, each switched on or off by itself, in the real Trainer through the real CLI.

The data are drawn frames of 640 x 640 pixels in JPEG files, which the data module decodes into memory before training
(`setup_s`), as it always does; so loader workers augment and collate. Each row is one fit within the memory of an RTX
A5000: a warm-up, windows of whole steps, one validation. Rows differ from the guide's baseline in what they name and in
nothing else; logger, progress bar, EMA and callbacks are the profile's, checkpoints are left out. The baseline is
measured at the beginning, in the middle and at the end, so that its own spread can be seen.

What happens every so many steps only (logging, the bar, cleaning up) is measured at every step or fifth step and
against a fit without it, and then counted as often as it happens: at the guide's intervals a window would be noise.

    python benchmarks/detr_guide.py --out benchmarks/results/detr_guide.json [--only baseline] [--tiny]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import Results, Row, spread, table
from detr_gains import CLEANUP_EVERY, gains, relative
from detr_scenes import Scenes
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lit_callbacks import MemoryAndThroughput, OOMGuard
from memory_cleanup import Cleanup
from profile_tasks import CONFIGS, SMALL_NETWORK
from profiles import GIB, Window, card_gb, clean_up, limit_memory, out_of_memory

from lit_cli.cli import LitCLI

WARMUP, WINDOW, WINDOWS = 8, 8, 5  # batches
RESERVE_S = 60  # no row takes longer
NEVER = 10**9  # steps
CACHED = ("--data.clahe_p", "0", "--data.motion_blur_p", "0")
COLUMNS = ("row", "batch", "images_s", "low", "high", "step_ms", "x baseline")
MORE = ("waiting", "allocated_gb", "reserved_gb", "parts", "setup_s", "val_s")


class Setting(NamedTuple):
    """A row to measure.

    Attributes:
        name: Of the row.
        extra: Arguments that differ from the profile's.
        config: The profile.
        quiet: Without anything that happens every so many steps, but for the next three.
        log: Steps between two entries of the logger.
        refresh: Steps between two refreshes of the progress bar.
        watch: Steps between two looks at the memory.
        cleanup: Steps between two cleanups.
    """

    name: str
    extra: tuple[str, ...] = ()
    config: str = "rtxa5000"
    quiet: bool = False
    log: int = NEVER
    refresh: int = 0
    watch: int = NEVER
    cleanup: int = NEVER


DEVICE = ("--data.store", "gpu", *CACHED)
SETTINGS = (
    Setting("baseline"),
    Setting("batch 36", ("--data.batch_size", "36", "--model.lr", "0.0005")),
    Setting(
        "12 workers, prefetch 6, persistent",
        ("--data.num_workers", "12", "--data.prefetch_factor", "6", "--data.persistent_workers", "true"),
    ),
    Setting("fp32", ("--trainer.precision", "32-true")),
    Setting("fp32, no TF32", ("--trainer.precision", "32-true", "--matmul_precision", "highest")),
    Setting("no TF32", ("--matmul_precision", "highest")),
    Setting("channels_last", ("--model.channels_last", "true")),
    Setting("no CLAHE, no motion blur", CACHED),
    Setting("baseline, again"),
    Setting("quiet", quiet=True),
    Setting("log every step", quiet=True, log=1),
    Setting("refresh every step", quiet=True, refresh=1),
    Setting("watch memory every step", quiet=True, watch=1),
    Setting("clean up every 5 steps", quiet=True, cleanup=CLEANUP_EVERY),
    Setting("all together", config="rtxa5000_fast"),
    Setting("ours: on the device", DEVICE),
    Setting("ours: all together, on the device", DEVICE, config="rtxa5000_fast"),
    Setting("ours: the same, compiled", (*DEVICE, "--model.compile", "true"), config="rtxa5000_fast"),
    Setting("ours: with CUDA graphs instead", (*DEVICE, "--model.cuda_graph", "true"), config="rtxa5000_fast"),
    Setting("baseline, last"),
)


class ValidationTime(Callback):
    """Seconds of the last validation, from its first batch to its figures."""

    seconds = 0.0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self._begin = _now()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End."""
        self.seconds = _now() - self._begin


class CleanUp(Callback):
    """The guide's memory cleanup: garbage collection and an empty cache after every so many steps."""

    def __init__(self, every: int) -> None:
        self.cleanup, self.step = Cleanup("both", every), 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Clean up if it is time."""
        self.step += 1
        self.cleanup.after(self.step)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def build(setting: Setting, root: Path, folder: str, tiny: bool) -> LitCLI:
    """Module, data and Trainer of a row."""
    from lit_detr.__main__ import DetectionCLI
    from lit_detr.data import DetectionData
    from lit_detr.module import LitDETR

    arguments = ["fit", "--config", str(CONFIGS / "detr" / f"{setting.config}.yaml"), "--data.root", str(root)]
    arguments += ["--trainer.default_root_dir", folder, "--trainer.num_sanity_val_steps", "0", "--data.cache_dir"]
    arguments += ["none", "--plots.num_first", "0", "--plots.worst_k", "0", *setting.extra]
    if tiny:
        arguments += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--data.image_size", "64"]
        arguments += ["--data.batch_size", "2", "--data.num_workers", "0", "--model.backbone", "resnet10t"]
        arguments += [word for k, v in SMALL_NETWORK.items() for word in (f"--model.{k}", str(v))]
    cli = DetectionCLI(LitDETR, DetectionData, "lit_detr", arguments, build_only=True)
    trainer = cli.trainer
    callbacks = [c for c in trainer.callbacks if not isinstance(c, ModelCheckpoint)]  # type: ignore[attr-defined]
    trainer.callbacks = callbacks  # type: ignore[attr-defined]
    trainer.check_val_every_n_epoch = trainer.fit_loop.max_epochs = 1
    if setting.quiet:
        trainer.log_every_n_steps = setting.log  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, MemoryAndThroughput):
                callback.every_n_steps = setting.watch
            if isinstance(callback, TQDMProgressBar):
                callback._refresh_rate = setting.refresh
        if setting.cleanup < NEVER:
            callbacks.append(CleanUp(setting.cleanup))
    return cli


def run(setting: Setting, root: Path, tiny: bool) -> Row:
    """Measure a row; running out of memory is a result."""
    limit = limit_memory(card_gb(CONFIGS / "detr" / f"{setting.config}.yaml"))
    skip, length, windows = (1, 1, 2) if tiny else (WARMUP, WINDOW, WINDOWS)
    if setting.cleanup < NEVER and not tiny:  # whole periods
        skip, length = 2 * setting.cleanup, 2 * setting.cleanup
    with tempfile.TemporaryDirectory() as folder:
        cli = build(setting, root, folder, tiny)
        trainer, data = cli.trainer, cli.datamodule
        h = data.hparams
        row: Row = {"batch": h["batch_size"], "precision": str(trainer.precision), "limit_gb": limit}
        begin = time.perf_counter()
        data.setup("fit")
        row["setup_s"] = round(time.perf_counter() - begin, 2)
        row["train_images"], row["val_images"] = (len(data.prepared(s)) for s in ("train", "val"))
        trainer.limit_train_batches = skip + length * windows
        check_shared_memory(data, trainer.limit_train_batches)
        window, validation = Window(skip, length * windows, lambda _: h["batch_size"]), ValidationTime()
        trainer.callbacks += [window, validation]  # type: ignore[attr-defined]
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            trainer.fit(cli.model, datamodule=data)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return {**row, "fits": False}
        row["fits"] = True
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, OOMGuard):
                row["parts"] = callback.parts
            if isinstance(callback, MemoryAndThroughput):
                row["waiting"] = round(float(callback.summary.get("data_wait", 0.0)), 3)
    assert window.laps is not None
    laps = window.laps.seconds()
    if len(laps) != length * windows:
        raise RuntimeError(f"{setting.name}: {len(laps)} batches were measured, expected {length * windows}")
    steps = [sum(laps[i : i + length]) / length for i in range(0, len(laps), length)]
    rates = [row["batch"] / s for s in steps]
    row |= {"images_s": round(statistics.median(rates), 1), "low": round(min(rates), 1), "high": round(max(rates), 1)}
    row |= {"step_ms": round(1000 * statistics.median(steps), 3), "step_ms_iqr": round(1000 * spread(steps).iqr, 3)}
    row["val_s"] = round(validation.seconds, 2)
    if torch.cuda.is_available() and not tiny:
        row["allocated_gb"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
        row["reserved_gb"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
    return row


def check_shared_memory(data: Any, batches: int) -> None:
    """Workers hand over batches in shared memory; a container's may be small, and its end would be a bus error."""
    shared, h = Path("/dev/shm"), data.hparams
    if not shared.is_dir() or not h["num_workers"]:
        return
    size = h["batch_size"] * h["channels"] * data.image_size[0] * data.image_size[1]
    need = size * min(batches, h["num_workers"] * h["prefetch_factor"])
    state = os.statvfs(shared)
    free = state.f_bavail * state.f_frsize
    if need > free:
        raise RuntimeError(f"/dev/shm has {free / GIB:.2f} GB free, the loader may fill {need / GIB:.2f}")


def main(args: Sequence[str] | None = None) -> None:
    """Measure what is not there yet, and print both tables."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, help="results (benchmarks/results/detr_guide.json; with --tiny not kept)")
    p.add_argument("--only", action="append", default=[], help="rows whose name contains this; may be repeated")
    p.add_argument("--files", type=int, default=2400, help="training images; more than the largest row reads")
    p.add_argument("--boxes", type=int, default=20, help="objects of an image")
    p.add_argument("--deadline", type=float, default=float("inf"), help="Unix time that no row passes")
    p.add_argument("--tiny", action="store_true", help="a dry run on a CPU")
    options = p.parse_args(args)
    default = Path(__file__).parent / "results" / "detr_guide.json"
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = Results(options.out or (Path(scratch) / default.name if options.tiny else default))
        pending = [s for s in SETTINGS if not results.get(row=s.name)]
        pending = [s for s in pending if not options.only or any(word in s.name for word in options.only)]
        root = Path(scratch) / "frames"
        if pending and time.time() < options.deadline:
            size, train, val, boxes = (640, options.files, 240, options.boxes) if not options.tiny else (64, 8, 2, 3)
            Scenes((size, size), (boxes, boxes), {"train": train, "val": val}).write(root)
        for setting in pending:
            if time.time() + (0 if options.tiny else RESERVE_S) > options.deadline:
                print(f"deadline: stopped before {setting.name}; the same command goes on from here")
                break
            measure(setting, root, options.tiny, results)
        print(table(relative(results.rows), (*COLUMNS, *MORE)))
        print(table(gains(results.rows), ("optimisation", "expected", "times")))


def measure(setting: Setting, root: Path, tiny: bool, results: Results) -> None:
    """Write a row; one row's fault must not cost the others."""
    start = time.perf_counter()
    said = io.StringIO()  # the bar is drawn, but not here
    row: Row
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            row = run(setting, root, tiny)
    except Exception as error:
        row = {"error": f"{type(error).__name__}: {error!s:.300}"}
    clean_up()
    limit_memory(None)
    row["wall_s"] = round(time.perf_counter() - start, 1)
    results.add({"row": setting.name}, row)
    got = row.get("error") or row.get("images_s") or "out of memory"
    print(f"{setting.name}: {got} ({row['wall_s']} s)", flush=True)


if __name__ == "__main__":
    main()
