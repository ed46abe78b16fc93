"""What every profile needs and does: peak memory, speed, and whether it fits the card that it is named after.

Each profile goes through the real command line and the real Trainer, with augmentation, EMA, clipping, optimizer
state and one validation; only downloaded weights, loggers and checkpoints are left out. The allocator is limited to the
memory of the profile's card (its header names it) less what a CUDA context takes there. Memory therefore transfers to
the card as far as the kernels are the same; speed does not, so it is given relative to that of one profile
(rtx3070ti_balanced, dsunet/guide_baseline, detr/rtxa5000, patchnerf/a100_moderate) on the same device. Batches that the
original guides name are tried as well.

    python benchmarks/profiles.py --root data/isbi2015 --pixel-size 0.1
    python benchmarks/profiles.py --task dsunet
    python benchmarks/profiles.py --task detr --write-headers
    python benchmarks/profiles.py --task patchnerf --root bigbuckbunny.mp4

What is measured of each task, and with which data, is in profile_tasks.py.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Laps, Results, Row, spread, table
from lightning.pytorch import Callback, LightningModule, Trainer
from profile_tasks import TASKS, Case, Task, card_gb

from lit_cli.cli import LitCLI

MEASURED = "# measured:"
GIB = 2**30
CONTEXT_GB = 0.5  # context, kernels and driver of one process; not seen by the allocator
WARMUP_STEPS, STEPS = 3, 30  # optimizer steps before and in the measured window
MAX_BATCHES = 60  # in the window; many small batches make one optimizer step
COLUMNS = ("name", "frame", "batch", "precision", "limit_gb", "fits", "reserved_gb", "allocated_gb", "samples_s")


class Window(Callback):
    """Times the batches of a window without waiting for the device in between.

    Args:
        skip: Batches before it.
        count: Batches in it.
        samples: How many samples a batch has.
    """

    def __init__(self, skip: int, count: int, samples: Callable[[Any], int]) -> None:
        self.skip, self.count, self.samples_of = skip, count, samples
        self.seen = self.samples = 0
        self.laps: Laps | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Start after `skip` batches, then mark each of `count`."""
        self.seen += 1
        if self.seen == self.skip:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)
            self.laps = Laps(pl_module.device)
        if self.laps is not None and self.seen <= self.skip + self.count:
            self.laps.mark()
            self.samples += self.samples_of(batch) * (self.seen > self.skip)


def build(task: Task, case: Case, options: argparse.Namespace, folder: str) -> LitCLI:
    """Module, data and Trainer of a profile."""
    arguments = ["fit", "--config", str(case.profile), "--trainer.default_root_dir", folder]
    arguments += ["--trainer.logger", "false", "--trainer.enable_checkpointing", "false", "--trainer.callbacks", "null"]
    arguments += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    arguments += ["--trainer.num_sanity_val_steps", "0", *task.arguments(case.profile, options)]
    if options.tiny:
        arguments += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
        arguments += ["--data.batch_size", "2", "--data.num_workers", "0"]
    return task.build(arguments if options.tiny else [*arguments, *case.extra], options, case)


def run(task: Task, case: Case, options: argparse.Namespace) -> Row:
    """Train a few steps and validate once, within the memory of the card."""
    limit = limit_memory(case.card_gb)
    with tempfile.TemporaryDirectory() as folder:
        cli = build(task, case, options, folder)
        trainer, data, module = cli.trainer, cli.datamodule, cli.model
        data.setup("fit")
        accumulate = trainer.accumulate_grad_batches
        skip = 1 if options.tiny else max(6, WARMUP_STEPS * accumulate)
        count = 1 if options.tiny else min(MAX_BATCHES // accumulate, STEPS) * accumulate  # whole optimizer steps
        # Whole epochs of equal length, so that validation comes last and outside the window.
        epochs = -(-(skip + count) // task.batches_in_epoch(data))
        trainer.fit_loop.max_epochs = trainer.check_val_every_n_epoch = epochs
        trainer.limit_train_batches = -(-(skip + count) // epochs)
        described = task.describe(data, options)
        window = Window(skip, count, lambda batch: task.samples_of(batch, described))
        trainer.callbacks.append(window)  # type: ignore[attr-defined]
        row: Row = {
            **described,
            "accumulate": accumulate,
            "precision": str(trainer.precision),
            "compile": module.hparams["compile"],
            "cuda_graph": module.hparams.get("cuda_graph", False),
            "card_gb": case.card_gb,
            "limit_gb": limit,
        }
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            trainer.fit(module, datamodule=data)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return {**row, "fits": False}
    assert window.laps is not None
    seconds = window.laps.seconds()
    step = spread([1000 * s for s in seconds])
    row["fits"] = True
    if torch.cuda.is_available() and not options.tiny:
        row["allocated_gb"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
        row["reserved_gb"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
    row["batches"] = len(seconds)
    row["samples_s"] = round(window.samples / sum(seconds), 1)
    row["batch_ms"], row["batch_ms_iqr"] = round(step.median, 2), round(step.iqr, 2)
    return row | task.more_figures(row)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that the limit was reached; libraries have names of their own for it."""
    text = str(error)
    return isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in text or "ALLOC_FAILED" in text


def limit_memory(card_gb: int | None) -> float | None:
    """Limit the allocator to a card's memory; the limit in GB of 2^30 bytes, None if this card is the smaller one."""
    if not torch.cuda.is_available():
        return None
    total = torch.cuda.get_device_properties(0).total_memory / GIB
    limit = None if card_gb is None or card_gb >= total else card_gb - CONTEXT_GB
    torch.cuda.set_per_process_memory_fraction(1.0 if limit is None else limit / total)
    return limit


def clean_up() -> None:
    """Give back what the last profile left on the device and in the compiler, and its cuDNN switch."""
    torch.backends.cudnn.benchmark = False  # Lightning leaves it as it is where a profile does not name it
    if not torch.cuda.is_available():
        return
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def cases(task: Task, names: list[str]) -> list[Case]:
    """Everything to measure; the reference first."""
    found = [Case(task.prefix + p.stem, p, [], card_gb(p)) for p in sorted(task.folder.glob("*.yaml"))]
    found.sort(key=lambda case: case.name != task.reference)
    out = [*(case for case in found if case.card_gb is not None), *task.more_cases()]
    return [case for case in out if not names or case.name in names]


def measure(task: Task, options: argparse.Namespace, results: Results) -> None:
    """Run what is not in the results yet, until the deadline."""
    began = time.monotonic()
    for case in cases(task, options.only):
        if not options.redo and results.get(name=case.name):
            continue
        if options.deadline_s and time.monotonic() - began > options.deadline_s - task.reserve_s:
            print(f"deadline: stopped before {case.name}; the same command goes on from here")
            return
        start = time.monotonic()
        row: Row
        try:
            row = run(task, case, options)
        except Exception as error:  # one profile's fault must not cost the others
            row = {"error": f"{type(error).__name__}: {error!s:.300}"}
        clean_up()
        row["wall_s"] = round(time.monotonic() - start, 1)
        results.add({"name": case.name}, row)
        said = row.get("error") or row.get("samples_s") or "out of memory"
        print(f"{case.name}: {said} ({row['wall_s']} s)", flush=True)


def relative(task: Task, row: Row, results: Results) -> float | None:
    """Speed as a multiple of the reference profile's on the same device."""
    reference = results.get(name=task.reference)
    if not reference or "samples_s" not in reference or "samples_s" not in row:
        return None
    return task.speed(row) / task.speed(reference) if reference["device"] == row["device"] else None


def header_lines(task: Task, row: Row, ratio: float | None, more: str = "") -> list[str]:
    """The two lines of a profile's header that say what was measured."""
    where = row["device"] + (f" limited to {row['limit_gb']:g} GB" if row.get("limit_gb") else "")
    if row["fits"]:
        got = f"peak {row['reserved_gb']:.1f} GB reserved, {row['allocated_gb']:.1f} GB allocated"
        got = f"{got}; {task.speed_words(row, ratio)}{more}; on {where}"
    else:
        got = f"does not fit: out of memory on {where}"
    origin = f"{row['date']}, commit {row['commit']}, torch {row['torch']}, {row['data']} data"
    return [f"{MEASURED} {got}", f"{MEASURED} {origin}; python benchmarks/profiles.py --only {row['name']}"]


def write_headers(results: Results, folder: Path, task: Task = TASKS["landmarks"]) -> int:
    """Put the results into the headers of the profiles; how many files changed."""
    changed = 0
    for path in sorted(folder.glob("*.yaml")):
        row = results.get(name=task.prefix + path.stem)
        if row is None or (row["fits"] and "reserved_gb" not in row):  # a run without a GPU says nothing
            continue
        lines = path.read_text().splitlines()
        old = [i for i, line in enumerate(lines) if line.startswith(MEASURED)]
        if not 1 <= len(old) <= 2 or old[-1] != old[0] + len(old) - 1:  # one says that nothing was measured yet
            raise SystemExit(f"{path}: expected two lines '{MEASURED}' in a row")
        more = task.more_words(row["name"], results)
        lines[old[0] : old[-1] + 1] = header_lines(task, row, relative(task, row, results), more)
        text = "\n".join(lines) + "\n"
        if text != path.read_text():
            path.write_text(text)
            changed += 1
    return changed


def main(args: list[str] | None = None) -> None:
    """Parse the options, measure, print; or write the headers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, help="whose profiles (that of --only, else landmarks)")
    parser.add_argument("--root", help="data folder (ISBI 2015 for landmarks); drawn images or volumes if absent")
    parser.add_argument("--pixel-size", type=float, default=0.1, help="mm per pixel of ISBI 2015 (%(default)s)")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this profile; may be repeated")
    parser.add_argument("--out", type=Path, help="results (a file in benchmarks/results; with --tiny not kept)")
    parser.add_argument("--redo", action="store_true", help="measure again what the results have already")
    parser.add_argument("--deadline-s", type=float, help="start nothing that would not end within these seconds")
    parser.add_argument("--write-headers", action="store_true", help="only copy the results into the profiles")
    parser.add_argument("--tiny", action="store_true", help="dry run on the CPU: small network and input, two steps")
    options = parser.parse_args(args)
    if options.tiny:
        torch.set_num_threads(1)  # at this size threads only wait for each other
    named = next((t for t in TASKS.values() if t.prefix and any(n.startswith(t.prefix) for n in options.only)), None)
    task = TASKS[options.task] if options.task else named or TASKS["landmarks"]
    unknown = set(options.only) - {case.name for case in cases(task, [])}
    if unknown:
        parser.error(f"--only: {task.name} has no profile {', '.join(sorted(unknown))}")
    default = Path(__file__).parent / "results" / task.results
    with tempfile.TemporaryDirectory() as scratch:
        results = Results(options.out or (Path(scratch) / task.results if options.tiny else default))
        if options.write_headers:
            print(f"{write_headers(results, task.folder, task)} profiles changed")
            return
        measure(task, options, results)
        ratio = f"x {task.reference}"
        rows = [{**row, ratio: relative(task, row, results)} for row in results.rows]
        print(table(rows, (*COLUMNS, ratio)))


if __name__ == "__main__":
    main()
