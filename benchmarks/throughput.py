"""Training samples per second, from a plain Lightning loop to ours, one change at a time, in one process on one GPU.

Every row trains the same network with AdamW through a real `Trainer` on images that are decoded and resized already (rows
`files` excepted). Rates are medians over windows of whole steps after a warm-up, with a synchronisation at the windows' ends
only; start-up, the loader's included, and compilation are reported apart as `first_s`.

    python benchmarks/throughput.py --out benchmarks/results/throughput.json [--only hrnet_w32,512] [--tiny]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Results
from lightning.pytorch import Callback, Trainer
from plain_loop import FileSamples, MemorySamples, PlainLandmarks, loader

from lit_landmarks.data import LandmarkData
from lit_landmarks.model import HeatmapNet
from lit_landmarks.module import LitLandmarks
from lit_landmarks.samples import LandmarkSample, LandmarkTable

NETWORKS = {"hrnet_w32": ("hrnet_w32", "branch"), "unet_r34": ("resnet34", "Unet")}
POINTS = 19


class Timer(Callback):
    """Stops training after `windows` windows of `seconds` and keeps the rate of each."""

    def __init__(self, batch: int, warmup: int, windows: int, seconds: float) -> None:
        self.batch, self.warmup, self.windows, self.seconds = batch, warmup, windows, seconds
        self.rates: list[float] = []
        self.first_s = 0.0
        self.begin = time.perf_counter()
        self._mark, self._steps, self._due = 0.0, 0, 0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
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
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
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
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if torch.cuda.is_available() else 0.0,
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


def our_data(images: np.ndarray, points: np.ndarray, batch: int, workers: int, store: str) -> LandmarkData:
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
    p.add_argument("--tiny", action="store_true", help="a dry run on a CPU")
    args = p.parse_args()
    warnings.filterwarnings("ignore")
    results = Results(args.out)
    if args.tiny:
        args.sides, args.workers, args.batch, args.seconds = [64], [0], 2, 0.05
    windows, warmup = (1, 3) if args.tiny else (3, 12)
    words = [w for w in args.only.split(",") if w]
    rng = np.random.default_rng(0)

    for side in args.sides:
        images = rng.integers(0, 255, (150, side, side), np.uint8)
        points = rng.uniform(0.2 * side, 0.8 * side, (150, POINTS, 2)).astype(np.float32)
        for network in args.networks:
            backbone, decoder = NETWORKS[network]
            if args.tiny:
                backbone = {"hrnet_w32": "hrnet_w18_small", "resnet34": "resnet10t"}[backbone]

            def row(
                step: str, workers: int | None, make: Any, precision: str, matmul: str, name: str = network
            ) -> None:
                key = {"network": name, "side": side, "batch": args.batch, "step": step, "workers": workers}
                text = " ".join(str(v) for v in key.values())
                if results.get(**key) is not None or not all(w in text for w in words) or time.time() > args.deadline:
                    return
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                torch._dynamo.reset()
                torch.manual_seed(0)
                try:
                    module, data = make()
                    values = rate(module, data, precision, Timer(args.batch, warmup, windows, args.seconds), matmul)
                except (RuntimeError, ValueError) as error:  # a row that fails is a row
                    values = {"error": str(error).splitlines()[0][:200]}
                results.add(key, values)
                print(f"{text:60s} {values}", flush=True)

            def net(b: str = backbone, d: str = decoder) -> HeatmapNet:
                return HeatmapNet(backbone=b, decoder=d, num_landmarks=POINTS)

            def plain(workers: int, channels_last: bool, fused: bool, length: int = 4000, make_net: Any = net) -> Any:
                def build() -> Any:
                    samples = MemorySamples(images, points, length)
                    batches = loader(samples, args.batch, workers)
                    return PlainLandmarks(make_net(), channels_last, fused), {"train_dataloaders": batches}

                return build

            def ours(store: str, workers: int, compile: str, graph: bool, b: str = backbone, d: str = decoder) -> Any:
                def build() -> Any:
                    module = LitLandmarks(
                        backbone=b,
                        decoder=d,
                        pretrained=False,
                        sigma=8.0,
                        compile=compile,
                        cuda_graph=graph,  # type: ignore[arg-type]
                    )
                    return module, {"datamodule": our_data(images, points, args.batch, workers, store)}

                return build

            for workers in args.workers:
                row("plain fp32", workers, plain(workers, False, False), "32-true", "highest")
            most = max(args.workers)
            if args.files is not None:
                files = sorted(f for f in args.files.iterdir() if f.suffix.lower() in (".webp", ".bmp", ".png", ".jpg"))

                def from_files(make_net: Any = net) -> Any:
                    where = np.resize(points, (len(files), POINTS, 2))
                    samples = FileSamples(files, (side, side), where, 4000)
                    return PlainLandmarks(make_net()), {"train_dataloaders": loader(samples, args.batch, most)}

                row("plain fp32, files", most, from_files, "32-true", "highest")
            row("+ TF32", most, plain(most, False, False), "32-true", "high")
            row("+ bf16", most, plain(most, False, False), "bf16-mixed", "high")
            row("+ channels_last", most, plain(most, True, False), "bf16-mixed", "high")
            row("+ fused AdamW", most, plain(most, True, True), "bf16-mixed", "high")
            for workers in args.workers:
                row(
                    "+ uint8 loader, targets on device",
                    workers,
                    ours("ram", workers, "off", False),
                    "bf16-mixed",
                    "high",
                )
            row("+ device store", None, ours("gpu", 0, "off", False), "bf16-mixed", "high")
            row("+ CUDA graph", None, ours("gpu", 0, "off", True), "bf16-mixed", "high")
            row("+ compiled blocks, no graph", None, ours("gpu", 0, "blocks", False), "bf16-mixed", "high")
            row("+ CUDA graph, compiled blocks", None, ours("gpu", 0, "blocks", True), "bf16-mixed", "high")
            row("fp16 instead of bf16, eager", None, ours("gpu", 0, "off", False), "16-mixed", "high")
            row("fp32 instead of bf16, graph", None, ours("gpu", 0, "off", True), "32-true", "highest")


if __name__ == "__main__":
    main()
