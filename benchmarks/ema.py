"""What one update of an exponential moving average costs: ours beside Lightning's, torch's and timm's, in one process.

A real `Trainer` trains a landmark network on images that lie on the device. In one of its batch ends every average is
updated in turn, several rounds of a few updates each, with a synchronisation at the ends of a round only; this is
`update_us`, host and device together. Then windows of training steps alternate between no average and each of them;
the difference is `added_us`, what the update adds to a step while the device is busy with it, and `share` is that over
the plain step. `kernels` and `gpu_us` are counted by the profiler for one update.

    python benchmarks/ema.py --out benchmarks/results/ema.json [--only hrnet_w32] [--tiny]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import Results, Row, commit, spread, table
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lit_callbacks import EMA
from throughput import our_data
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lit_landmarks.module import LitLandmarks

DECAY = 0.999
POINTS = 19
MIB = 2**20
NONE = "no average"
COLUMNS = ("network", "step", "average", "update_us", "iqr_us", "kernels", "gpu_us", "added_us", "step_ms", "share")


class Case(NamedTuple):
    """A network and the kind of step that trains it."""

    network: str
    backbone: str
    decoder: str
    step: str
    graph: bool


CASES = (
    Case("hrnet_w32", "hrnet_w32", "branch", "CUDA graph", True),
    Case("hrnet_w32", "hrnet_w32", "branch", "eager", False),
    Case("unet_r50", "resnet50", "Unet", "CUDA graph", True),
)


class Average:
    """One way to keep an average: begins with the training and updates once per call."""

    def __init__(self, name: str, begin: Callable[[Trainer, LightningModule], Callable[[], object]]) -> None:
        self.name = name
        self.begin = begin
        self.update: Callable[[], object] = lambda: None
        self.mib = 0.0

    def start(self, trainer: Trainer, module: LightningModule) -> None:
        """Build it, and note the device memory that it takes."""
        before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        self.update = self.begin(trainer, module)
        if torch.cuda.is_available():
            self.mib = (torch.cuda.memory_allocated() - before) / MIB


def ours(mark_on_device: bool = False, **options: Any) -> Callable[[Trainer, LightningModule], Callable[[], object]]:
    """Our callback through its own hooks; `mark_on_device` takes the way of a fused optimizer under a GradScaler."""

    def begin(trainer: Trainer, module: LightningModule) -> Callable[[], object]:
        ema = EMA(decay=DECAY, **options)
        ema.setup(trainer, module, "fit")
        ema.on_fit_start(trainer, module)
        ema.on_train_start(trainer, module)
        flag = torch.zeros((), device=module.device)

        def update() -> None:
            ema._steps.stepped = True
            ema._steps.certain = not mark_on_device
            if mark_on_device:
                ema._steps.found_inf.append(flag)
            ema.on_train_batch_end(trainer, module, None, None, 0)

        return update

    return begin


def lightning(trainer: Trainer, module: LightningModule) -> Callable[[], object]:
    """Lightning's own callback through its hook."""
    stock = EMAWeightAveraging(decay=DECAY)
    stock.setup(trainer, module, "fit")

    def update() -> None:
        stock._latest_update_step = -1  # it counts optimizer steps, and here is one step for many updates
        stock.on_train_batch_end(trainer, module, None, None, 0)

    return update


def torch_swa(trainer: Trainer, module: LightningModule) -> Callable[[], object]:
    """Torch's AveragedModel with its fused function, buffers averaged."""
    net = network(module)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
    return lambda: average.update_parameters(net)


def timm_v3(trainer: Trainer, module: LightningModule) -> Callable[[], object]:
    """Timm's ModelEmaV3 with its defaults, foreach among them."""
    net = network(module)
    average = ModelEmaV3(net, decay=DECAY)
    return lambda: average.update(net)


def network(module: LightningModule) -> nn.Module:
    """The part of the module that is trained."""
    net = module.net
    assert isinstance(net, nn.Module)
    return net


def averages() -> list[Average]:
    """Everything that is compared, ours first."""
    return [
        Average("ours", ours()),
        Average("ours, buffers copied", ours(buffers="copy")),
        Average("ours, fused fp16", ours(mark_on_device=True)),
        Average("ours, offloaded", ours(offload=True)),
        Average("torch AveragedModel", torch_swa),
        Average("timm ModelEmaV3", timm_v3),
        Average("Lightning EMAWeightAveraging", lightning),
    ]


def synchronise() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Bench(Callback):
    """Measures inside a running fit and ends it.

    Args:
        rounds: Rounds of updates, and of windows.
        slice_s: Length of one round of updates and of one window of steps.
    """

    def __init__(self, rounds: int, slice_s: float, warmup: int) -> None:
        self.rounds, self.slice_s, self.warmup = rounds, slice_s, warmup
        self.averages = averages()
        self.alone: dict[str, list[float]] = {a.name: [] for a in self.averages}
        self.steps: dict[str, list[float]] = {NONE: [], **{a.name: [] for a in self.averages}}
        self.launches: dict[str, tuple[int, float]] = {}
        self.seen = 0
        self._windows: Iterator[Average | None] = iter(())
        self._now: Average | None = None
        self._due, self._begin, self._count = 0, 0.0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build all averages."""
        for average in self.averages:
            average.start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """First the updates alone, then windows of steps."""
        self.seen += 1
        if self.seen < self.warmup:
            return
        if self.seen == self.warmup:
            self._alone()
            self._windows = iter([a for _ in range(self.rounds) for a in (None, *self.averages)])
            self._begin = time.perf_counter()
            self._probe = self.seen
            self._due = 0
            return
        if self._due == 0:  # a few steps to know how many fill a window
            if self.seen < self._probe + 4:
                return
            synchronise()
            self._per_step = (time.perf_counter() - self._begin) / 4
            self._next(trainer)
            return
        if self._now is not None:
            self._now.update()
        if self.seen == self._due:
            synchronise()
            name = self._now.name if self._now else NONE
            self.steps[name].append((time.perf_counter() - self._begin) / self._count)
            self._next(trainer)

    def _next(self, trainer: Trainer) -> None:
        try:
            self._now = next(self._windows)
        except StopIteration:
            trainer.should_stop = True
            return
        cost = statistics.median(self.alone[self._now.name]) if self._now else 0.0
        self._count = max(3, int(self.slice_s / (self._per_step + cost)))
        self._due = self.seen + self._count
        synchronise()
        self._begin = time.perf_counter()

    def _alone(self) -> None:
        counts = {}
        for average in self.averages:
            average.update()
            synchronise()
            begin = time.perf_counter()
            average.update()
            synchronise()
            counts[average.name] = max(1, int(self.slice_s / (time.perf_counter() - begin)))
            self.launches[average.name] = profiled(average.update)
        for _ in range(self.rounds):
            for average in self.averages:
                synchronise()
                begin = time.perf_counter()
                for _ in range(counts[average.name]):
                    average.update()
                synchronise()
                self.alone[average.name].append((time.perf_counter() - begin) / counts[average.name])

    def rows(self) -> Iterator[tuple[str, Row]]:
        """Name and figures of each."""
        plain = statistics.median(self.steps[NONE])
        for average in self.averages:
            alone = spread([1e6 * s for s in self.alone[average.name]])
            # Each window with an average is compared with the plain one of its own round.
            differences = [b - a for a, b in zip(self.steps[NONE], self.steps[average.name], strict=True)]
            added = spread([1e6 * s for s in differences])
            kernels, gpu_us = self.launches[average.name]
            yield (
                average.name,
                {
                    "update_us": round(alone.median, 1),
                    "iqr_us": round(alone.iqr, 1),
                    "kernels": kernels,
                    "gpu_us": round(gpu_us, 1),
                    "added_us": round(added.median, 1),
                    "added_iqr_us": round(added.iqr, 1),
                    "step_ms": round(1000 * plain, 3),
                    "share": round(added.median / (1e6 * plain), 5),
                    "mib": round(average.mib, 1),
                },
            )


def profiled(update: Callable[[], object]) -> tuple[int, float]:
    """Kernels (and copies) of one update, and the microseconds that the device was busy with them."""
    if not torch.cuda.is_available():
        return 0, 0.0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        update()
        synchronise()
    events = [e for e in profile.events() or () if e.device_type == torch.autograd.DeviceType.CUDA]
    return len(events), float(sum(e.self_device_time_total for e in events))


def measure(case: Case, options: argparse.Namespace, results: Results) -> None:
    """All averages of one case, in one fit."""
    side, batch = (64, 2) if options.tiny else (options.side, options.batch)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (60, side, side), np.uint8)
    points = rng.uniform(0.2 * side, 0.8 * side, (60, POINTS, 2)).astype(np.float32)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    small = {"hrnet_w32": "hrnet_w18_small", "resnet50": "resnet10t"}
    module = LitLandmarks(
        backbone=small[case.backbone] if options.tiny else case.backbone,
        decoder=case.decoder,
        pretrained=False,
        sigma=8.0,
        cuda_graph=case.graph,
    )
    bench = Bench(2, 0.01, 3) if options.tiny else Bench(options.rounds, options.seconds, 12)
    trainer = Trainer(
        accelerator="auto",
        devices=1,
        precision="32-true" if options.tiny else "bf16-mixed",
        max_epochs=100_000,
        min_epochs=0,
        logger=False,
        callbacks=[bench],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=our_data(images, points, batch, 0, "gpu"))
    net = network(module)
    tensors = {
        "parameters": sum(1 for _ in net.parameters()),
        "buffers": sum(1 for _ in net.buffers()),
        "params_m": round(sum(p.numel() for p in net.parameters()) / 1e6, 1),
    }
    for name, values in bench.rows():
        key = {"network": case.network, "step": case.step, "side": side, "batch": batch, "average": name}
        results.add(key, {**values, **tensors})


def main(args: list[str] | None = None) -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ema.json"))
    parser.add_argument("--only", default="", help="comma-separated words that a case's network and step contain")
    parser.add_argument("--side", type=int, default=512, help="frame side in pixels")
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.4, help="length of one round of updates, of one window")
    parser.add_argument("--redo", action="store_true", help="measure again what this commit has not measured")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="Unix time after which no case starts")
    parser.add_argument("--tiny", action="store_true", help="a dry run on a CPU")
    options = parser.parse_args(args)
    warnings.filterwarnings("ignore")
    results = Results(options.out)
    for case in CASES:
        if not all(word in f"{case.network} {case.step}" for word in options.only.split(",")):
            continue
        done = results.get(network=case.network, step=case.step, average="ours")
        if (done and not (options.redo and done["commit"] != commit())) or time.time() > options.deadline:
            continue
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        measure(case, options, results)
    print(table(results.rows, COLUMNS))


if __name__ == "__main__":
    main()
