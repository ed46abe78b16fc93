"""What `torch.cuda.empty_cache()` and `gc.collect()` every n steps do to the speed and memory of a training.

HRNet-W32 and a U-Net train eagerly in 16-mixed precision on images that lie on the device. The ways to clean up take
turns within one fit, in three rounds of windows that hold whole periods, so that all of them see the same machine. A
training with a different frame size at every step, where the allocator's cache fragments, has a fit of its own for each
way: once with the whole card, once limited to little more than its tensors need. `retries` counts how often the
allocator had to give back its cache by itself.

    python benchmarks/memory_cleanup.py --out benchmarks/results/memory_cleanup.json [--only unet_r34,fixed] [--tiny]
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import Results, Row, table
from lightning.pytorch import LightningModule, Trainer
from plain_loop import PlainLandmarks
from profiles import GIB, clean_up, out_of_memory
from throughput import POINTS, Case, Run, Timer, rate
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

PRECISION = "16-mixed"
ROUNDS, WARMUP, SETTLE = 3, 8, 2
CYCLE = 20  # frame sizes before they repeat
HEADROOM = 1.05  # of what the tensors take at most
COLUMNS = ("network", "frames", "limited", "cleanup", "every", "fits", "samples_per_s", "low", "high")
MEMORY = ("limit_gb", "reserved_gb", "allocated_gb", "retries")


class Cleanup(NamedTuple):
    """What to do after every so many steps."""

    name: str
    every: int

    def after(self, step: int) -> None:
        """Clean up if it is time."""
        if self.name == "none" or step % self.every:
            return
        if self.name in ("gc.collect", "both"):
            gc.collect()
        if self.name in ("empty_cache", "both") and torch.cuda.is_available():
            torch.cuda.empty_cache()


NONE, BOTH = Cleanup("none", 1), Cleanup("both", 10)  # the latter is the guide's
EACH = [Cleanup(name, every) for name in ("empty_cache", "gc.collect") for every in (1, 10, 50)]


class Group(NamedTuple):
    """Ways to clean up that are measured in one fit."""

    network: str
    frames: str
    limited: bool
    cleanups: list[Cleanup]

    def key(self, cleanup: Cleanup) -> Row:
        """Key of a row."""
        fixed = {"network": self.network, "frames": self.frames, "limited": self.limited}
        return {**fixed, "cleanup": cleanup.name, "every": cleanup.every}


def groups(tiny: bool = False) -> list[Group]:
    """Everything to measure; windows of 50 steps of HRNet would take longer than all the rest."""
    small = [Group("unet_r34", "variable", limited, [c]) for limited in (False, True) for c in (NONE, EACH[1], BOTH)]
    return [
        Group("unet_r34", "fixed", False, [NONE, *(c for c in EACH if not tiny or c.every < 50), BOTH]),
        Group("hrnet_w32", "fixed", False, [NONE, *(c for c in EACH if c.every < 50), BOTH]),
        *small,
    ]


class Window(NamedTuple):
    """What one window measured."""

    rate: float
    reserved: float
    allocated: float
    retries: int


class Rotation(Timer):
    """Lets every way to clean up have a window of its own in each round, then stops the training.

    Args:
        batch: Samples of a step.
        cleanups: The ways; with several of them each window begins with an empty cache.
        period: Steps after which the training itself repeats; a window holds whole ones.
        seconds: Length of a window at least.
        rounds: Windows for each way.
    """

    def __init__(self, batch: int, cleanups: Sequence[Cleanup], period: int, seconds: float, rounds: int) -> None:
        super().__init__(batch, WARMUP, rounds, seconds)
        self.cleanups, self.period = cleanups, period
        self.measured: dict[Cleanup, list[Window]] = {cleanup: [] for cleanup in cleanups}
        self._plan: Iterator[None] = iter(())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the plan."""
        torch.backends.cudnn.benchmark = False  # it would time every frame size
        self._plan = self._steps_of(trainer)
        next(self._plan)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Go on in the plan."""
        next(self._plan, None)

    def _steps_of(self, trainer: Trainer) -> Iterator[None]:
        """The whole run; each `yield` is a batch."""
        for _ in range(self.warmup):
            yield
        for _ in range(self.windows):
            for cleanup in self.cleanups:
                if len(self.cleanups) > 1 and torch.cuda.is_available():
                    torch.cuda.empty_cache()
                for step in range(1, max(SETTLE, self.period) + 1):
                    yield
                    cleanup.after(step)
                yield from self._window(cleanup)
        trainer.should_stop = True

    def _window(self, cleanup: Cleanup) -> Iterator[None]:
        whole = math.lcm(cleanup.every, self.period)
        self._sync()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        retries, begin, step = _retries(), time.perf_counter(), 0
        while not step or step % whole or time.perf_counter() - begin < self.seconds:
            yield
            step += 1
            cleanup.after(step)
        self._sync()
        samples_per_s = step * self.batch / (time.perf_counter() - begin)
        reserved, allocated = peaks()
        self.measured[cleanup].append(Window(samples_per_s, reserved, allocated, _retries() - retries))
        self.rates.append(samples_per_s)


def peaks() -> tuple[float, float]:
    """Largest reserved and allocated memory in GB of 2^30 bytes."""
    if not torch.cuda.is_available():
        return 0.0, 0.0
    return torch.cuda.max_memory_reserved() / GIB, torch.cuda.max_memory_allocated() / GIB


def _retries() -> int:
    return torch.cuda.memory_stats().get("num_alloc_retries", 0) if torch.cuda.is_available() else 0


class VariableFrames(IterableDataset):
    """Batches on the device whose height and width change at every step, the same ones every `CYCLE` steps."""

    def __init__(self, batch: int, largest: int, device: str) -> None:
        sides = np.arange(largest // 2, largest + 1, 32)
        self.sizes = np.random.default_rng(0).choice(sides, (CYCLE, 2)).tolist()
        self.sizes[0] = [largest, largest]
        self.image = torch.randn(batch, 1, largest, largest, device=device)
        self.maps = torch.rand(batch, POINTS, largest // 4, largest // 4, device=device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            for height, width in self.sizes:
                yield self.image[..., :height, :width], self.maps[..., : height // 4, : width // 4]


def variable(case: Case) -> Run:
    """The network of a case on frames of changing size."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batches = DataLoader(VariableFrames(case.batch, case.side, device), batch_size=None)
    return PlainLandmarks(case.net(), channels_last=True, fused=True), {"train_dataloaders": batches}


def limit_memory(limit_gb: float | None) -> None:
    """Limit the allocator; None takes the limit away."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory / GIB
        torch.cuda.set_per_process_memory_fraction(1.0 if limit_gb is None else min(1.0, limit_gb / total))


def limit_for(group: Group, results: Results) -> float | None:
    """A little more than the tensors of the same training took without a limit; None if that is not known."""
    free = results.get(**group._replace(limited=False).key(NONE)) if group.limited else None
    return round(HEADROOM * free["allocated_gb"], 3) if free and free.get("allocated_gb") else None


def run_group(group: Group, case: Case, results: Results, seconds: float) -> None:
    """Measure the rows of a group that are not there yet; running out of memory is a result."""
    pending = [cleanup for cleanup in group.cleanups if results.get(**group.key(cleanup)) is None]
    limit = limit_for(group, results)
    if not pending or (group.limited and limit is None):
        return
    clean_up()
    torch.manual_seed(0)
    same = group.frames == "fixed"
    make = partial(case.ours, "gpu") if same else partial(variable, case)
    seconds, rounds = (0.0, 1) if case.tiny else (seconds, ROUNDS)
    timer = Rotation(case.batch, pending, 1 if same else CYCLE, seconds, rounds)
    common: Row = {"side": case.side, "batch": case.batch, "precision": PRECISION, "limit_gb": limit}
    failure: Row = {}
    limit_memory(limit)
    try:
        module, data = make()
        rate(module, data, "32-true" if case.tiny else PRECISION, timer, "high")
    except (RuntimeError, ValueError) as error:
        failure = {"fits": False} if out_of_memory(error) else {"error": str(error).splitlines()[0][:200]}
    limit_memory(None)
    for cleanup in pending:
        values = failure or summary(timer.measured[cleanup])
        results.add(group.key(cleanup), {**common, **values})
        print(f"{' '.join(str(v) for v in group.key(cleanup).values()):45s} {values}", flush=True)


def summary(windows: Sequence[Window]) -> Row:
    """A row from the windows of one way to clean up."""
    rates = [w.rate for w in windows]
    row: Row = {"fits": True, "samples_per_s": round(statistics.median(rates), 1)}
    row |= {"low": round(min(rates), 1), "high": round(max(rates), 1)}
    if torch.cuda.is_available():
        row["reserved_gb"] = round(max(w.reserved for w in windows), 3)
        row["allocated_gb"] = round(max(w.allocated for w in windows), 3)
        row["retries"] = sum(w.retries for w in windows)
    return row


def main(args: Sequence[str] | None = None) -> None:
    """Run all rows."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, help="results (benchmarks/results/memory_cleanup.json; with --tiny not kept)")
    p.add_argument("--only", default="", help="comma-separated words; a group runs if its name contains all of them")
    p.add_argument("--batch", type=int, default=12)
    p.add_argument("--side", type=int, default=512)
    p.add_argument("--seconds", type=float, default=0.8, help="length of one of three windows, at least")
    p.add_argument("--deadline", type=float, default=float("inf"), help="Unix time after which no group starts")
    p.add_argument("--tiny", action="store_true", help="a dry run on a CPU")
    options = p.parse_args(args)
    if options.tiny:
        options.side, options.batch = 64, 2
    words = [w for w in options.only.split(",") if w]
    default = Path(__file__).parent / "results" / "memory_cleanup.json"
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (150, options.side, options.side), np.uint8)
    points = rng.uniform(0.2 * options.side, 0.8 * options.side, (150, POINTS, 2)).astype(np.float32)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = Results(options.out or (Path(scratch) / default.name if options.tiny else default))
        for group in groups(options.tiny):
            text = f"{group.network} {group.frames} {'limited' if group.limited else 'whole'}"
            if all(w in text for w in words) and time.time() < options.deadline:
                case = Case(group.network, options.side, options.batch, images, points, options.tiny)
                run_group(group, case, results, options.seconds)
        print(table(results.rows, (*COLUMNS, *MEMORY)))


if __name__ == "__main__":
    main()
