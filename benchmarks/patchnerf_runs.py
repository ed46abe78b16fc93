"""What the benchmarks of lit_patchnerf share: runs of its command line, timed, and rows that a deadline leaves whole.

A run is what `lit-patchnerf fit --config PROFILE ...` does, in this process, by the real Trainer; loggers, checkpoints,
bars and pictures are left out. Figures are those of its last validation, over whole frames with the averaged weights.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import Results, Row, table, take
from lightning.pytorch import Callback, LightningModule, Trainer
from profile_tasks import CONFIGS
from scipy.stats import t as student
from steps import GIB, clean

from lit_cli.errors import InputError
from lit_patchnerf.__main__ import VideoCLI
from lit_patchnerf.data import PatchVideoData
from lit_patchnerf.models import CoordinateConfig, GridConfig
from lit_patchnerf.module import LitPatchNeRF

RESERVE_S = 60.0  # that a first run should have before the deadline
FIGURES = ("psnr_db", "psnr_db_min", "psnr_8bit_db", "ms_ssim", "ms_ssim_min", "train_psnr_db", "held_out_psnr_db")
TIMES = ("wall_s", "train_s", "first_s", "s_epoch")
QUIET = [
    *("--trainer.callbacks", "null", "--trainer.logger", "false", "--trainer.enable_checkpointing", "false"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    *("--trainer.num_sanity_val_steps", "0", "--plots.num_first", "0", "--plots.worst_k", "0"),
]
SCENE = {"frames": 10, "height": 32, "width": 64, "shapes": 2}
TINY = [
    *("--data.synthetic", json.dumps(SCENE), "--data.crop", "null", "--data.patch_size", "null"),
    *("--data.grid", "[2,4]", "--data.batch_size", "2", "--data.steps_per_batch", "2", "--data.num_workers", "0"),
    *("--trainer.accelerator", "cpu", "--trainer.precision", "32-true"),
    *("--model.ssim_window", "5", "--model.ssim_scales", "1"),
]
TINY_DECODERS = {
    "grid": [
        *("--model.target_params", "6000", "--model.decoder.strides", "[4,2]", "--model.decoder.floor", "4"),
        *("--model.decoder.latent_frames", "[6]", "--model.decoder.latent_channels", "[4]"),
    ],
    "coordinate": [
        *("--model.target_params", "null", "--model.decoder.fc_dim", "8", "--model.decoder.stem", "[4,4]"),
        *("--model.decoder.strides", "[2,2]", "--model.decoder.floor", "4", "--model.decoder.multiple", "4"),
        *("--model.decoder.levels", "8", "--model.decoder.hidden", "16"),
    ],
}


# ---- options ---------------------------------------------------------------------------------------------------------


def options_of(doc: str | None, out: str) -> argparse.ArgumentParser:
    """Options of a script.

    Args:
        doc: Of the script.
        out: Name of its results.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", type=Path, help="the file or folder of frames")
    parser.add_argument("--epochs", type=int, help="of each training (the profile's; with --tiny 2)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help=f"results (benchmarks/results/{out}.json; with --tiny not kept)")
    parser.add_argument("--take", type=Path, nargs="+", default=[], help="add the rows of these files and stop")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="Unix time that no run should pass")
    parser.add_argument("--tiny", action="store_true", help="a dry run on a CPU with a small drawn video")
    parser.set_defaults(results=out)
    return parser


def parsed(parser: argparse.ArgumentParser, args: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Options and, behind `--`, overrides of the profiles for all runs."""
    options, rest = parser.parse_known_args(args)
    if options.tiny:
        options.seeds, options.epochs = options.seeds[:1], options.epochs or 2
        torch.set_num_threads(1)
    elif not options.take and (options.video is None or not options.video.exists()):
        parser.error(f"--video: expected the video, got {options.video}")
    return options, [a for a in rest if a != "--"]


# ---- command lines ---------------------------------------------------------------------------------------------------


def profile(name: str) -> Path:
    """The file of a profile."""
    return CONFIGS / "patchnerf" / f"{name}.yaml"


def mode_of(name: str) -> str:
    """`grid` or `coordinate`, as a profile says."""
    found = re.search(r"^\s+mode: (\w+)", profile(name).read_text(), re.MULTILINE)
    return found[1] if found else "grid"


def command(
    name: str,
    options: argparse.Namespace,
    folder: Path,
    *more: str,
    seed: int = 0,
    changed: Sequence[str] = (),
    mode: str | None = None,
    validate_every: int | None = None,
) -> list[str]:
    """Arguments of a run.

    Args:
        name: Of the profile.
        options: Of the script.
        folder: For what a run writes.
        more: Further arguments, last of all.
        seed: Of weights and order.
        changed: Arguments that come before those that make a dry run small.
        mode: Of the decoder, if `changed` makes it another one.
        validate_every: In epochs; by default at the end alone.
    """
    out = ["--config", str(profile(name)), *QUIET, "--trainer.default_root_dir", str(folder)]
    out += ["--seed_everything", str(seed), "--data.seed", str(seed)]
    out += [*TINY] if options.tiny else ["--data.video", str(options.video)]
    out += [*changed, *(TINY_DECODERS[mode or mode_of(name)] if options.tiny else ())]
    epochs = options.epochs or build([*out, *more]).trainer.max_epochs
    out += ["--trainer.max_epochs", str(epochs), "--trainer.check_val_every_n_epoch", str(validate_every or epochs)]
    return [*out, *more]


class FitOnly(VideoCLI):
    """The command line without its other subcommands, whose parsers take longer to build than that of `fit`."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """`fit` alone."""
        return {"fit": VideoCLI.subcommands()["fit"]}


def build(arguments: Sequence[str], kind: type[VideoCLI] = FitOnly) -> VideoCLI:
    """Module, data and Trainer of a command line."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    return kind(LitPatchNeRF, PatchVideoData, "lit_patchnerf", ["fit", *arguments], build_only=True)


def values_of(arguments: Sequence[str]) -> Row:
    """What a command line comes to, for the comparison with another: what is not said has its default."""
    cli = build(arguments)
    values = {**cli.model.hparams, **{f"data.{k}": v for k, v in cli.datamodule.hparams.items()}}
    values |= {"precision": str(cli.trainer.precision), "max_epochs": cli.trainer.max_epochs}
    values["ema"] = cli.config["fit"]["ema"]["enabled"]
    kind = GridConfig if values["mode"] == "grid" else CoordinateConfig
    decoder = {field.name: field.default for field in fields(kind)} | (values.pop("decoder") or {})
    return values | {f"decoder.{k}": list(v) if isinstance(v, tuple) else v for k, v in decoder.items()}


# ---- runs ------------------------------------------------------------------------------------------------------------


def wait() -> float:
    """The clock, once the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Watch(Callback):
    """When things happened; the device is waited for after the first batch and around validations alone.

    Args:
        begin: When the run began, on the clock of `wait`.
    """

    def __init__(self, begin: float) -> None:
        self.begin = begin
        self.start = self.first = self.end = self.validated = self._mark = 0.0
        self.batches = 0
        self.curve: list[Row] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The data are there, the network is built."""
        self.start = wait()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The first one has compiled, or captured, what later ones use."""
        if not self.batches:
            self.first = wait()
        self.batches += 1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of training."""
        self._mark = wait()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start it again, and note how far it is."""
        now = wait()
        self.validated += now - self._mark
        value = trainer.callback_metrics.get("val/psnr_db")
        point = {"epoch": trainer.current_epoch + 1, "wall_s": round(now - self.begin, 2)}
        point["train_s"] = round(self._mark - self.start - (self.validated - (now - self._mark)), 2)
        self.curve.append(point | {"psnr_db": None if value is None else round(float(value), 3)})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last step, and the last validation."""
        self.end = wait()

    def row(self, epochs: int) -> Row:
        """Seconds: `wall_s` of all, `setup_s` before the first batch, `train_s` of training with its first batch."""
        train, first = self.end - self.start - self.validated, self.first - self.start
        rest = self.batches - 1
        out = {"wall_s": self.end - self.begin, "setup_s": self.start - self.begin, "train_s": train, "first_s": first}
        row: Row = {k: round(v, 2) for k, v in (out | {"val_s": self.validated}).items()}
        # Of the epochs less the first batch: what a longer training would take.
        row["s_epoch"] = round((train - first) / rest * self.batches / epochs, 4) if rest > 0 else None
        return row


class Run(NamedTuple):
    """A finished training."""

    cli: VideoCLI
    row: Row


def train(arguments: Sequence[str], started: float | None = None, keep: Path | None = None) -> Run:
    """Train as the command line would.

    Args:
        arguments: Of `command`.
        started: Unix time that `wall_s` counts from, with the whole command line; by default now, with that of `fit`.
        keep: A checkpoint to write.

    Returns:
        The command line, and a row of its figures, times, parameters and peak memory.
    """
    if torch.cuda.is_available():
        clean()
    begin = wait() - (0.0 if started is None else time.time() - started)
    cli = build(arguments, FitOnly if started is None else VideoCLI)
    watch = Watch(begin)
    trainer: Trainer = cli.trainer
    trainer.callbacks.append(watch)  # type: ignore[attr-defined]
    trainer.fit(cli.model, datamodule=cli.datamodule)
    if keep is not None:
        trainer.save_checkpoint(keep)
    epochs = trainer.current_epoch
    row = watch.row(epochs) | {"epochs": epochs, "steps": trainer.global_step, **figures_of(trainer)}
    net, h, data = cli.model.net, cli.model.hparams, cli.datamodule.hparams
    config = net.config
    row |= {"params": sum(p.numel() for p in net.parameters()), "mode": h["mode"]}
    row["width"] = config.width if h["mode"] == "grid" else config.fc_dim
    row |= {"frames": h["frames"], "frame": list(cli.datamodule.geometry.crop), "precision": str(trainer.precision)}
    row |= {name: data[name] for name in ("batch_size", "steps_per_batch", "sample")}
    row["lr"] = h["lr"]
    row["video"] = Path(data["video"]).name if data["video"] else "drawn"
    if len(watch.curve) > 1:
        row["curve"] = watch.curve
    return Run(cli, row | peak())


def figures_of(trainer: Trainer) -> Row:
    """What the last validation said, without its prefix, and the last loss."""
    found = {k: round(float(v), 5) for k, v in trainer.callback_metrics.items()}
    out: Row = {k.removeprefix("val/"): v for k, v in found.items() if k.startswith("val/")}
    return out | {"loss": found.get("train/loss")}


def peak() -> Row:
    """Device memory since `clean`."""
    if not torch.cuda.is_available():
        return {}
    own = {"allocated_gb": torch.cuda.max_memory_allocated(), "reserved_gb": torch.cuda.max_memory_reserved()}
    return {name: round(count / GIB, 2) for name, count in own.items()}


# ---- rows ------------------------------------------------------------------------------------------------------------


Job = tuple[Row, Callable[[], Row]]  # its key, and what makes the rest of the row


def work(results: Results, jobs: Iterable[Job], options: argparse.Namespace, columns: Sequence[str]) -> None:
    """Do what is not in the results yet, until the deadline; a run is thought to take no more than 1.5 earlier ones."""
    longest = 0.0
    for key, make in jobs:
        if results.get(**key) is not None:
            continue
        words = " ".join(f"{k} {v}" for k, v in key.items() if k != "part" and v not in (None, ""))
        if time.time() + (1.5 * longest or RESERVE_S * (not options.tiny)) > options.deadline:
            print(f"deadline: stopped before {words}; the same command goes on from here")
            return
        begin = time.time()
        try:
            row = results.add(key, make())
        except (torch.OutOfMemoryError, InputError) as error:
            row = results.add(key, {"error": str(error).splitlines()[0]})
        print(table([row], (*columns, "error")).splitlines()[-1], flush=True)
        longest = max(longest, time.time() - begin)


def conduct(
    options: argparse.Namespace,
    key: Sequence[str],
    jobs: Callable[[Results, Path], Iterable[Job]],
    columns: Sequence[str],
    summary: Callable[[Sequence[Row]], list[Row]] | None = None,
    shown: Sequence[str] = (),
) -> None:
    """Do the jobs, or take the rows of other files, and print the tables of the runs and of their summary.

    Args:
        options: Of the script.
        key: Names of what tells rows apart.
        jobs: In order, made as they are come to: a later one may look for an earlier one's row.
        columns: Of the runs.
        summary: Rows, with `part` and the rest of their key, from the rows of runs without an error.
        shown: Columns of the summary.
    """
    default = Path("benchmarks/results") / f"{options.results}.json"
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = Results(options.out or (Path(scratch) / default.name if options.tiny else default))
        if options.take:
            take(results, options.take, key)
        else:
            work(results, jobs(results, Path(scratch)), options, columns)
        if summary is not None:
            for row in summary([row for row in results.rows if row["part"] == "run" and "error" not in row]):
                results.add({k: row[k] for k in key if k in row}, {k: v for k, v in row.items() if k not in key})
    print(table([row for row in results.rows if row["part"] != "summary"], columns))
    if summary is not None:
        print(table([row for row in results.rows if row["part"] == "summary"], shown))


def means(rows: Sequence[Row], names: Sequence[str]) -> Row:
    """Mean of each figure that all rows have, with `_sd` of several rows.

    >>> means([{"a": 1.0, "b": None}, {"a": 2.0, "b": 1.0}], ("a", "b", "c"))
    {'a': 1.5, 'a_sd': 0.70711}
    """
    out: Row = {}
    for name in names:
        known = [row[name] for row in rows if row.get(name) is not None]
        if known and len(known) == len(rows):
            out[name] = round(statistics.fmean(known), 5)
            if len(known) > 1:
                out[f"{name}_sd"] = round(statistics.stdev(known), 5)
    return out


def paired(rows: Sequence[Row], others: Sequence[Row], names: Sequence[str]) -> Row:
    """Rows less those of the same seed: mean, and the 95 % interval of Student's t where there are two or more pairs.

    >>> rows = [{"seed": s, "x": x} for s, x in enumerate((1.0, 2.0, 3.0))]
    >>> paired(rows, [{"seed": s, "x": 0.0} for s in range(3)], ("x",))
    {'x_gain': 2.0, 'x_gain_low': -0.48414, 'x_gain_high': 4.48414}
    """
    by_seed, out = {row["seed"]: row for row in others}, {}
    for name in names:
        pairs = [(r.get(name), by_seed[r["seed"]].get(name)) for r in rows if r["seed"] in by_seed]
        gains = [a - b for a, b in pairs if a is not None and b is not None]
        if not gains:
            continue
        mean = statistics.fmean(gains)
        out[f"{name}_gain"] = round(mean, 5)
        if len(gains) > 1:
            half = float(student.ppf(0.975, len(gains) - 1)) * statistics.stdev(gains) / len(gains) ** 0.5
            out |= {f"{name}_gain_low": round(mean - half, 5), f"{name}_gain_high": round(mean + half, 5)}
    return out


def by_setting(
    rows: Sequence[Row], key: Sequence[str], names: Sequence[str], less: Callable[[Row], bool] | None = None
) -> list[Row]:
    """Summary rows: means over the seeds of each setting.

    Args:
        rows: Of runs.
        key: Of a row, with `part` and `seed`.
        names: Of the figures.
        less: The setting that others are compared with, seed by seed, where all of the key but one name agrees: the
            first of the key behind `part`.
    """
    shared, out = [k for k in key if k not in ("part", "seed")], []
    for setting in dict.fromkeys(tuple(row[k] for k in shared) for row in rows):
        own_key = dict(zip(shared, setting, strict=True))
        own = [row for row in rows if own_key.items() <= row.items()]
        values = {"runs": len(own), **means(own, names)}
        if less is not None and not less(own[0]):
            group = {k: v for k, v in own_key.items() if k != shared[0]}
            values |= paired(own, [r for r in rows if less(r) and group.items() <= r.items()], names)
        out.append({"part": "summary", **own_key, **values})
    return out
