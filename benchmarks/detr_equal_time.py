"""What the comparisons of lit_detr at equal time and at equal steps share: training by the clock, one evaluator.

A clock runs from before the data are read to the last step. The course of the learning rate and the point from which
there are no mosaics are shares of its time, for our Trainer and for the loop of the peers alike: so a schedule ends
with the time, however fast a method is, and no number of steps has to be guessed.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from common import Row
from detr_peers import Found, Peer, in_pixels
from lightning.pytorch import Callback, LightningModule, Trainer
from lit_callbacks.average import WeightAverage, decay_at
from steps import clean
from torch import Tensor, nn

from lit_common.optim import fused_adamw, fused_sgd
from lit_common.schedule import flat_cosine
from lit_detr.__main__ import DetectionCLI
from lit_detr.augment import DetectionAugmentation, augment_batch
from lit_detr.batches import to_targets
from lit_detr.data import DetectionData
from lit_detr.metrics import DetectionAP
from lit_detr.module import LitDETR

LEAST = 3  # steps, however short the time
FIGURES = ("ap", "ap50", "ap_tiny", "ap_small", "ap_vt", "ar_100", "ar_tiny", "ar_small")
QUIET = [
    *("--trainer.callbacks", "null", "--trainer.logger", "false", "--trainer.enable_checkpointing", "false"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    *("--trainer.limit_val_batches", "0", "--trainer.num_sanity_val_steps", "0"),
    *("--plots.num_first", "0", "--plots.worst_k", "0"),
]
Detected = tuple[Tensor, Tensor, Tensor]  # of an image in its pixels: boxes, scores, labels
PLAIN = ("--data.augment.mosaic_p", "0", "--data.augment.scale", "[0.8,1.6]")  # the defaults
ENDLESS = ["--trainer.max_epochs", "-1", "--trainer.max_steps", "10000000"]
TINY = [
    *("--config", "demo", "--data.synthetic_train", "8", "--data.synthetic_val", "4", "--data.image_size", "[64,96]"),
    *("--data.batch_size", "4", "--data.channels", "3", "--model.hidden", "32", "--model.queries", "20"),
    *("--model.noise_queries", "10", "--model.eval_queries", "20", "--data.num_workers", "0"),
    *("--model.strides", "[4,8,16,32]"),
]


@dataclass(frozen=True)
class Recipe:
    """How a peer is trained; the course of the learning rate is that of `LitDETR`'s defaults for all."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 4e-4
    weight_decay: float = 1e-4
    clip: float = 0.1
    dtype: torch.dtype | None = torch.bfloat16  # None: float32, with TF32 products


@dataclass(frozen=True)
class Way:
    """One method."""

    make: Callable[[int, tuple[int, int]], Peer] | None = None  # of classes and frame; None is ours
    recipe: Recipe = field(default_factory=Recipe)
    extra: tuple[str, ...] = ()  # of our command line


# ---- time -----------------------------------------------------------------------------------------------------------


def wait() -> float:
    """The clock, once the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock:
    """How much of the time is gone."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.begin, self.first_s = max(seconds, 1e-9), wait(), 0.0

    @property
    def gone(self) -> float:
        """Seconds."""
        return time.perf_counter() - self.begin

    @property
    def share(self) -> float:
        """From 0 to 1."""
        return min(1.0, self.gone / self.seconds)

    def over(self, steps: int) -> bool:
        """Whether it is up, after so many steps; the first and some others wait for the device."""
        if steps == 1:
            self.first_s = round(wait() - self.begin, 2)
        elif steps % 20 == 0:
            wait()  # the host must not run ahead of the clock
        return steps >= LEAST and self.gone >= self.seconds


class ClockedData(DetectionData):
    """Data whose augmentation goes by the clock."""

    clock: Clock | None = None

    def _progress(self) -> float:
        return super()._progress() if self.clock is None else self.clock.share


class ByTheClock(Callback):
    """Lets the learning rate go by the clock and ends the training with it."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the course over steps."""
        h, clock = pl_module.hparams, self.clock
        scheduler: Any = trainer.lr_scheduler_configs[0].scheduler

        def factor(_: int) -> float:
            return flat_cosine(clock.share, h["warmup"], h["flat"], h["final"])

        scheduler.lr_lambdas = [factor] * len(scheduler.lr_lambdas)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop."""
        if self.clock.over(trainer.global_step):
            trainer.should_stop = True


# ---- training -------------------------------------------------------------------------------------------------------


def build(arguments: Sequence[str], holdout: bool = False) -> DetectionCLI:
    """Module, data and Trainer of a command line."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    cli = DetectionCLI(LitDETR, ClockedData, "lit_detr", ["fit", *arguments], build_only=True)
    if holdout:
        hold_out(cli.datamodule)
    return cli


def hold_out(data: DetectionData, share: float = 0.25) -> None:
    """Put a share of the training videos in the place of `val`; the same ones whatever the seed."""
    splits = data.table.splits
    groups = sorted({sample.group for sample in splits["train"]})
    order = np.random.default_rng(0).permutation(len(groups))
    held = {groups[i] for i in order[: max(1, round(share * len(groups)))]}
    samples = splits["train"]
    splits["train"] = [s for s in samples if s.group not in held]
    splits["val"] = [s for s in samples if s.group in held]


def fit(cli: DetectionCLI, clock: Clock | None) -> Row:
    """Train ours, by the clock or to the end that its command line names."""
    if clock is not None:
        cli.datamodule.clock = clock
        cli.trainer.callbacks.append(ByTheClock(clock))  # type: ignore[attr-defined]
    begin = wait() if clock is None else clock.begin
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    row: Row = {"train_s": round(wait() - begin, 2), "steps": cli.trainer.global_step}
    row |= {} if clock is None else {"first_s": clock.first_s}
    network: Any = cli.model.net
    row |= {"params_m": round(sum(p.numel() for p in network.parameters()) / 1e6, 2)}
    row |= {"loss": round(float(cli.trainer.callback_metrics["train/loss"]), 4)}
    return row | {"precision": str(cli.trainer.precision), "compile": cli.model.hparams["compile"], **peak()}


def peak() -> Row:
    """Device memory since `clean`."""
    return {"peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)} if torch.cuda.is_available() else {}


def train_peer(way: Way, cli: DetectionCLI, clock: Clock, seed: int) -> tuple[Peer, Row]:
    """Train a peer on the data of our command line until the clock is over; it comes back with its average."""
    data, h, recipe = cli.datamodule, cli.model.hparams, way.recipe
    device = cli.trainer.strategy.root_device
    data.trainer = cli.trainer  # tells it the device
    data.setup("fit")
    torch.manual_seed(seed)
    assert way.make is not None
    if data.tile is not None:
        raise ValueError("data.tile: peers see whole images only")
    peer = way.make(len(data.class_names), data.image_size).to(device).train()
    optimizer = make_optimizer(peer, recipe)
    average, ema = WeightAverage(peer, average_buffers=True), cli.config["fit"]["ema"]
    augment = None if data.hparams["augment"] is None else DetectionAugmentation(**data.hparams["augment"])
    loader, epoch, steps, loss = data.train_dataloader(), 0, 0, torch.zeros(())
    while True:
        loader.sampler.set_epoch(epoch)  # type: ignore[union-attr]
        for batch in loader:
            image, boxes = batch.image.to(device, non_blocking=True), batch.boxes
            if augment is None:
                image = image.float() / 255
            else:
                image, boxes = augment_batch(image, boxes, augment, int(batch.seed), progress=clock.share)
            factor = flat_cosine(clock.share, h["warmup"], h["flat"], h["final"])
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * factor
            with autocast(device, recipe.dtype):
                loss = peer.loss(image, to_targets(boxes, data.image_size, device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(peer.parameters(), recipe.clip)
            optimizer.step()
            average.update(decay_at(steps, ema["decay"] or 0.999, ema["warmup"]))
            steps += 1
            if clock.over(steps):
                row: Row = {"train_s": round(wait() - clock.begin, 2), "steps": steps, "first_s": clock.first_s}
                row |= {"params_m": peer.millions, "loss": round(float(loss), 4), "peer": peer.version}
                row |= {"description": peer.description}
                row |= {"recipe": f"{recipe.optimizer} {recipe.lr:g}", "precision": str(recipe.dtype), **peak()}
                average.show_average()
                return peer.eval(), row
        epoch += 1


def make_optimizer(peer: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """No weight decay on biases and normalisations, as in ours."""
    own = [p for p in peer.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in own if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in own if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "adamw":
        return fused_adamw(groups, recipe.lr, clips=True)
    return fused_sgd(groups, recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay, clips=True)


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Of a type; of none for None."""
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


# ---- evaluation -----------------------------------------------------------------------------------------------------


def detector(cli: DetectionCLI) -> tuple[Callable[[Tensor], Found], torch.dtype | None]:
    """Our network after a fit, as a peer detects, and the type it was trained in."""
    model: LitDETR = cli.model.to(cli.trainer.strategy.root_device)

    def detect(images: Tensor) -> Found:
        output = model(images)
        return in_pixels(output.logits[-1], output.boxes[-1], images, model.hparams["most_detections"])

    return detect, torch.bfloat16 if "bf16" in str(cli.trainer.precision) else None


def evaluate(
    cli: DetectionCLI, detect: Callable[[Tensor], Found], dtype: torch.dtype | None
) -> tuple[DetectionAP, list[Row]]:
    """The metric of the `val` images, filled, and the detections of each image in its own pixels."""
    data, kept = cli.datamodule, []
    metric, samples = DetectionAP(data.class_names), data.prepared("val").samples
    found = framed(cli, detect, dtype) if data.tile is None else sliced(cli, dtype)
    for sample, (boxes, scores, labels) in zip(samples, found, strict=True):
        row = {"boxes": boxes.double().cpu(), "scores": scores.float().cpu(), "labels": labels.cpu()}
        truth = {"boxes": sample.boxes, "labels": sample.labels, "area": sample.area, "iscrowd": sample.crowd}
        metric.update([sample.image_id], [row], [{k: torch.from_numpy(v) for k, v in truth.items()}])
        kept.append({"image_id": sample.image_id, **row})
    return metric, kept


@torch.inference_mode()
def framed(cli: DetectionCLI, detect: Callable[[Tensor], Found], dtype: torch.dtype | None) -> list[Detected]:
    """Detections in images that fill the frame."""
    data, device = cli.datamodule, cli.trainer.strategy.root_device
    split, size, out = data.prepared("val"), data.hparams["batch_size"], []
    if (split.content != np.array(data.image_size)).any():
        raise ValueError("an image does not fill its frame, and peers know no masks: choose --data.image_size")
    for begin in range(0, len(split), size):
        # The last batch is filled up: another size would be another compilation.
        which = np.minimum(np.arange(begin, begin + size), len(split) - 1)
        images = torch.from_numpy(np.stack([split.images[i] for i in which])).to(device).float() / 255
        with autocast(device, dtype):
            found = detect(images)
        for n, i in enumerate(which[: len(split) - begin]):
            limit = torch.from_numpy(np.tile(split.sizes[i][::-1], 2))
            boxes = (found.boxes[n].double().cpu() / split.scales[i]).clamp_min(0).minimum(limit)
            out.append((boxes, found.scores[n], found.labels[n]))
    return out


@torch.inference_mode()
def sliced(cli: DetectionCLI, dtype: torch.dtype | None) -> list[Detected]:
    """Our detections in images that are cut into tiles."""
    data, device, model = cli.datamodule, cli.trainer.strategy.root_device, cli.model
    images = (torch.from_numpy(np.ascontiguousarray(data.image_of(s))) for s in data.prepared("val").samples)
    with autocast(device, dtype):
        found = data.slicing(model.hparams["most_detections"]).detect(model, images, device)
    return [(f.boxes, f.scores, f.labels) for f in found]


def figures_of(metric: DetectionAP) -> Row:
    """What a row says; None where there is nothing to find."""
    values = {name: float(value) for name, value in metric.compute().items()}
    names = (*FIGURES, *(n for n in values if n in ("ap75", "ar_1500", "ar50_1500", "coco_ap")))
    names += tuple(f"ap_{name}" for name in metric.class_names if f"ap_{name}" in values)
    return {name: None if math.isnan(values[name]) else round(values[name], 5) for name in names}


def compete(
    way: Way, arguments: Sequence[str], minutes: float, seed: int, holdout: bool = False
) -> tuple[DetectionCLI, Row, DetectionAP, list[Row]]:
    """Train one method by the clock and evaluate it.

    Returns:
        The command line, whose data are still there, the row with the figures, the metric and the detections.
    """
    clean()
    clock = Clock(60 * minutes)
    cli = build([*arguments, *ENDLESS, *way.extra], holdout)
    if way.make is None:
        row = fit(cli, clock)
        metric, kept = evaluate(cli, *detector(cli))
    else:
        peer, row = train_peer(way, cli, clock, seed)
        metric, kept = evaluate(cli, peer.detect, way.recipe.dtype)
    data = cli.datamodule
    row |= {"frame": list(data.image_size), "batch": data.hparams["batch_size"], **figures_of(metric)}
    return cli, row | {"images_s": round(row["steps"] * row["batch"] / row["train_s"], 1)}, metric, kept
