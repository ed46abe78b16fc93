"""Training samples per second, from a plain Lightning loop to ours, one change at a time, in one process on one GPU.

Every row trains the same network with AdamW through a real `Trainer` on images that are decoded and resized already
(rows `files` excepted). Rates are medians over windows of whole steps after a warm-up, with a synchronisation at the
windows' ends only; start-up, the loader's included, and compilation are reported apart as `first_s`. `peak_gb` is what
the allocator reserved, since captured graphs keep their memory in a pool that counts as free.

    python benchmarks/throughput.py --out benchmarks/results/throughput.json [--only hrnet_w32,512] [--tiny]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from common import Results
from lightning.pytorch import Callback, LightningModule, Trainer
from plain_loop import FileSamples, MemorySamples, PlainLandmarks, loader

from lit_landmarks.data import LandmarkData
from lit_landmarks.model import HeatmapNet
from lit_landmarks.module import LitLandmarks
from lit_landmarks.samples import LandmarkSample, LandmarkTable

NETWORKS = {"hrnet_w32": ("hrnet_w32", "branch"), "unet_r34": ("resnet34", "Unet")}
POINTS = 19
BRIEF = ("plain fp32", "+ device store", "+ CUDA graph", "+ CUDA graph, compiled blocks")
Store = Literal["auto", "gpu", "ram", "disk"]
Compile = Literal["off", "blocks", "full"]
Run = tuple[LightningModule, dict[str, Any]]  # a module and the data arguments of `Trainer.fit`


class Step(NamedTuple):
    """A row to measure."""

    name: str
    workers: int | None
    make: Callable[[], Run]
    precision: str
    matmul: str


class Timer(Callback):
    """Stops training after `windows` windows of `seconds` and keeps the rate of each."""

    def __init__(self, batch: int, warmup: int, windows: int, seconds: float) -> None:
        self.batch, self.warmup, self.windows, self.seconds = batch, warmup, windows, seconds
        self.rates: list[float] = []
        self.first_s = 0.0
        self.begin = time.perf_counter()
        self._mark, self._steps, self._due = 0.0, 0, 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count, and look at the clock only when a window is over."""
        step = trainer.global_step
        if step == 1:
            self._sync()
            self.first_s = time.perf_counter() - self.begin
            self._probe = time.perf_counter()
        elif step == self.warmup:
            self._sync()
            per_step = (time.perf_counter() - self._probe) / (self.warmup - 1)
            self._steps = max(3, int(self.seconds / per_step))
            self._mark, self._due = time.perf_counter(), step + self._steps
        elif step == self._due:
            self._sync()
            now = time.perf_counter()
            self.rates.append(self._steps * self.batch / (now - self._mark))
            self._mark, self._due = now, step + self._steps
            trainer.should_stop = len(self.rates) >= self.windows

    @staticmethod
    def _sync() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def rate(module: Any, data: dict[str, Any], precision: str, timer: Timer, matmul: str) -> dict[str, Any]:
    """Train until the timer is content."""
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = matmul != "highest"
    torch.backends.cudnn.benchmark = True
    trainer = Trainer(
        accelerator="auto",
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_epochs=100_000,
        min_epochs=0,
        logger=False,
        callbacks=[timer],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, **data)
    return {
        "samples_per_s": round(statistics.median(timer.rates), 1),
        "low": round(min(timer.rates), 1),
        "high": round(max(timer.rates), 1),
        "first_s": round(timer.first_s, 1),
        "peak_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2) if torch.cuda.is_available() else 0.0,
    }


class InMemory(LandmarkSample):
    """A sample whose pixels lie in an array."""

    pixels: np.ndarray

    def read_image(self, channels: int) -> np.ndarray:
        """(channels, H, W)."""
        return np.broadcast_to(self.pixels, (channels, *self.pixels.shape[-2:]))

    def stamp(self) -> str:
        """Never cached: it has no file."""
        return self.name


def our_data(images: np.ndarray, points: np.ndarray, batch: int, workers: int, store: Store) -> LandmarkData:
    """The data module over arrays."""
    side = images.shape[1:]
    data = LandmarkData(
        root=".",
        image_size=list(side),
        batch_size=batch,
        holdout=0.0,
        store=store,
        num_workers=workers,
        cache_dir="none",
    )
    samples = []
    for i, (image, where) in enumerate(zip(images, points, strict=True)):
        sample = InMemory(path=None, name=str(i), points=where.astype(np.float64), spacing=(0.1, 0.1))
        object.__setattr__(sample, "pixels", image[None])
        samples.append(sample)
    data._table = LandmarkTable(splits={"train": samples}, landmark_names=tuple(str(i) for i in range(POINTS)))
    return data


@dataclass(frozen=True)
class Case:
    """One network at one size."""

    network: str
    side: int
    batch: int
    images: np.ndarray
    points: np.ndarray
    tiny: bool

    def net(self) -> HeatmapNet:
        """The network that all rows train."""
        backbone, decoder = self._names
        return HeatmapNet(backbone=backbone, decoder=decoder, num_landmarks=POINTS)

    @property
    def _names(self) -> tuple[str, str]:
        backbone, decoder = NETWORKS[self.network]
        small = {"hrnet_w32": "hrnet_w18_small", "resnet34": "resnet10t"}
        return (small[backbone] if self.tiny else backbone), decoder

    def plain(self, workers: int, channels_last: bool = False, fused: bool = False) -> Run:
        """The plain loop."""
        batches = loader(MemorySamples(self.images, self.points, 4000), self.batch, workers)
        return PlainLandmarks(self.net(), channels_last, fused), {"train_dataloaders": batches}

    def files(self, folder: Path, workers: int) -> Run:
        """The plain loop that reads and resizes each file."""
        files = sorted(f for f in folder.iterdir() if f.suffix.lower() in (".webp", ".bmp", ".png", ".jpg"))
        where = np.resize(self.points, (len(files), POINTS, 2))
        samples = FileSamples(files, (self.side, self.side), where, 4000)
        return PlainLandmarks(self.net()), {"train_dataloaders": loader(samples, self.batch, workers)}

    def ours(self, store: Store, workers: int = 0, compile: Compile = "off", graph: bool = False) -> Run:
        """The library's module and data module."""
        backbone, decoder = self._names
        module = LitLandmarks(
            backbone=backbone, decoder=decoder, pretrained=False, sigma=8.0, compile=compile, cuda_graph=graph
        )
        return module, {"datamodule": our_data(self.images, self.points, self.batch, workers, store)}

    def steps(self, workers: list[int], files: Path | None) -> Iterator[Step]:
        """The rows, each one change away from the one before (the last four: away from "device store")."""
        most = max(workers)
        for n in workers:
            yield Step("plain fp32", n, partial(self.plain, n), "32-true", "highest")
        if files is not None:
            yield Step("plain fp32, files", most, partial(self.files, files, most), "32-true", "highest")
        yield Step("+ TF32", most, partial(self.plain, most), "32-true", "high")
        yield Step("+ bf16", most, partial(self.plain, most), "bf16-mixed", "high")
        yield Step("+ channels_last", most, partial(self.plain, most, True), "bf16-mixed", "high")
        yield Step("+ fused AdamW", most, partial(self.plain, most, True, True), "bf16-mixed", "high")
        for n in workers:
            yield Step("+ uint8 loader, targets on device", n, partial(self.ours, "ram", n), "bf16-mixed", "high")
        yield Step("+ device store", None, partial(self.ours, "gpu"), "bf16-mixed", "high")
        yield Step("+ CUDA graph", None, partial(self.ours, "gpu", graph=True), "bf16-mixed", "high")
        compiled = partial(self.ours, "gpu", compile="blocks")
        yield Step("+ compiled blocks, no graph", None, compiled, "bf16-mixed", "high")
        both = partial(self.ours, "gpu", compile="blocks", graph=True)
        yield Step("+ CUDA graph, compiled blocks", None, both, "bf16-mixed", "high")
        yield Step("fp16 instead of bf16, eager", None, partial(self.ours, "gpu"), "16-mixed", "high")
        yield Step("fp32 instead of bf16, graph", None, partial(self.ours, "gpu", graph=True), "32-true", "highest")


def run_step(case: Case, step: Step, results: Results, seconds: float) -> None:
    """Measure a row, unless it is there; a row that fails is a row."""
    key = {"network": case.network, "side": case.side, "batch": case.batch, "step": step.name, "workers": step.workers}
    if results.get(**key) is not None:
        return
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()
    torch.manual_seed(0)
    windows, warmup = (1, 3) if case.tiny else (3, 12)
    try:
        module, data = step.make()
        values = rate(module, data, step.precision, Timer(case.batch, warmup, windows, seconds), step.matmul)
    except (RuntimeError, ValueError) as error:
        values = {"error": str(error).splitlines()[0][:200]}
    results.add(key, values)
    print(f"{' '.join(str(v) for v in key.values()):60s} {values}", flush=True)


def main() -> None:
    """Run all rows."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("benchmarks/results/throughput.json"))
    p.add_argument("--only", default="", help="comma-separated words; a row runs if its name contains all of them")
    p.add_argument("--batch", type=int, default=10)
    p.add_argument("--sides", type=int, nargs="+", default=[512, 384, 256])
    p.add_argument("--networks", nargs="+", default=list(NETWORKS))
    p.add_argument("--workers", type=int, nargs="+", default=[4, 16])
    p.add_argument("--seconds", type=float, default=1.5, help="length of one of three windows")
    p.add_argument("--deadline", type=float, default=float("inf"), help="Unix time after which no row starts")
    p.add_argument("--files", type=Path, default=None, help="folder of full-size images for the rows `files`")
    p.add_argument("--brief", action="store_true", help="only the first and the last steps of the way")
    p.add_argument("--tiny", action="store_true", help="a dry run on a CPU")
    args = p.parse_args()
    warnings.filterwarnings("ignore")
    results = Results(args.out)
    if args.tiny:
        args.sides, args.workers, args.batch, args.seconds = [64], [0], 2, 0.05
    words = [w for w in args.only.split(",") if w]
    rng = np.random.default_rng(0)
    for side in args.sides:
        images = rng.integers(0, 255, (150, side, side), np.uint8)
        points = rng.uniform(0.2 * side, 0.8 * side, (150, POINTS, 2)).astype(np.float32)
        for network in args.networks:
            case = Case(network, side, args.batch, images, points, args.tiny)
            for step in case.steps(args.workers, args.files):
                text = f"{network} {side} {step.name} {step.workers}"
                if args.brief and step.name not in BRIEF:
                    continue
                if all(w in text for w in words) and time.time() < args.deadline:
                    run_step(case, step, results, args.seconds)


if __name__ == "__main__":
    main()
