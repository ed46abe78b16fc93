"""Whether training stays finite: the real module for many steps on crowded frames, every value of every step looked at.

The network, criterion, optimizer, clipping, EMA, device store and augmentation of configs/detr/h200.yaml, without its
mosaics, train through the real Trainer on drawn frames of 320 x 256 pixels with 0 to 100 objects, whose sides are 2 px
and more before they are scaled by 0.8 to 1.6. The loss, the norm of all gradients before clipping and that of all
parameters are tested on the device after each step, and read every few hundred steps only. Under fp16 the loss scaling
skips steps with non-finite gradients; these are counted as well.

    python benchmarks/detr_stability.py --out benchmarks/results/detr_stability.json [--fp16] [--cuda-graph] [--tiny]

A deadline ends a row early and the row says how many steps were done; with `--state FOLDER` the same command then goes
on from a checkpoint in there.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import Results, Row, table
from detr_equal_time import PLAIN
from detr_scenes import Scenes
from lightning.pytorch import Callback, LightningModule, Trainer
from profile_tasks import CONFIGS, SMALL_NETWORK
from profiles import clean_up
from torch import Tensor

from lit_cli.cli import LitCLI

IMAGES = 512
OBJECTS, SIDES = (0, 100), (2.0, 32.0)
COUNTS = ("loss", "gradient", "parameters")
COLUMNS = ("precision", "frame", "batch", "steps", "bad_loss", "bad_gradient", "bad_parameters", "first_bad")
MORE = ("largest_gradient", "loss_begin", "loss_end", "least_side_px", "steps_s")


class Watch(Callback):
    """Counts non-finite values on the device, without waiting for it.

    Args:
        every: Steps between two times that the counts are read and handed on.
        report: Takes what `values` gives.
        deadline: Unix time at which the fit ends after its epoch.
    """

    def __init__(self, every: int, report: Any, deadline: float) -> None:
        self.every, self.report, self.deadline = every, report, deadline
        self.steps = 0
        self.seconds = 0.0
        self.state: dict[str, Tensor] = {}
        self._gradient: Tensor | None = None
        self._begin = time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, or move what a checkpoint had to the device."""
        self._begin = time.perf_counter()
        for name in COUNTS:
            self.state.setdefault(f"bad_{name}", torch.zeros((), dtype=torch.int64))
        self.state.setdefault("first_bad", torch.tensor(-1))
        self.state.setdefault("largest_gradient", torch.zeros(()))
        self.state.setdefault("least_side_px", torch.tensor(float("inf")))
        for name in ("loss_begin", "loss_end"):
            self.state.setdefault(name, torch.zeros(()))
        self.state = {k: v.to(pl_module.device) for k, v in self.state.items()}

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """After unscaling and before clipping, which may hide a fault."""
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self._gradient = torch.nn.utils.get_total_norm(gradients).float()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count."""
        assert self._gradient is not None
        loss, gradient = outputs["loss"].detach().float(), self._gradient
        weights = torch.nn.utils.get_total_norm(list(_detached(pl_module.parameters())))
        height, width = batch.image.shape[-2:]
        sides = batch.targets.boxes[..., 2:]
        pixels = torch.minimum(sides[..., 0] * width, sides[..., 1] * height)
        pixels = torch.where(batch.targets.valid, pixels, torch.inf)

        s, any_bad = self.state, torch.zeros((), dtype=torch.bool, device=loss.device)
        for name, value in zip(COUNTS, (loss, gradient, weights), strict=True):
            bad = ~torch.isfinite(value)
            s[f"bad_{name}"] += bad
            any_bad |= bad
        s["first_bad"] = torch.where(any_bad & (s["first_bad"] < 0), self.steps, s["first_bad"])
        finite = torch.where(torch.isfinite(gradient), gradient, 0.0)
        s["largest_gradient"] = torch.maximum(s["largest_gradient"], finite)
        s["least_side_px"] = torch.minimum(s["least_side_px"], pixels.min())
        # Averages of the first and of the latest hundred steps or so.
        if self.steps < 100:
            s["loss_begin"] = s["loss_begin"] + (loss - s["loss_begin"]) / (self.steps + 1)
        s["loss_end"] = s["loss_end"] + (loss - s["loss_end"]) / min(100, self.steps + 1)
        self.steps += 1
        if self.steps % self.every == 0:
            self.report(self.values(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop between two epochs, where a fit can go on later."""
        if time.time() > self.deadline:
            trainer.should_stop = True

    def values(self, trainer: Trainer) -> Row:
        """The counts so far; waits for the device."""
        row: Row = {"steps": self.steps}
        row |= {k: round(v, 4) if isinstance(v := value.item(), float) else v for k, value in self.state.items()}
        row["seconds"] = round(self.seconds + time.perf_counter() - self._begin, 1)
        row["steps_s"] = round(self.steps / row["seconds"], 1) if row["seconds"] else None
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            row["loss_scale"] = scaler.get_scale()
        return row

    def state_dict(self) -> dict[str, Any]:
        """Steps, seconds and counts."""
        seconds = self.seconds + time.perf_counter() - self._begin
        return {"steps": self.steps, "seconds": seconds, "state": {k: v.cpu() for k, v in self.state.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.steps, self.seconds = state_dict["steps"], state_dict["seconds"]
        self.state = dict(state_dict["state"])


def _detached(parameters: Iterable[Tensor]) -> Iterable[Tensor]:
    return (p.detach() for p in parameters)


def build(precision: str, options: argparse.Namespace, folder: str) -> LitCLI:
    """Module, data and Trainer."""
    from lit_detr.__main__ import DetectionCLI
    from lit_detr.data import DetectionData
    from lit_detr.module import LitDETR

    images = 8 if options.tiny else IMAGES
    arguments = ["fit", "--config", str(CONFIGS / "detr" / "h200.yaml"), "--trainer.default_root_dir", folder]
    arguments += ["--trainer.precision", precision, "--trainer.logger", "false", "--trainer.callbacks", "null"]
    arguments += ["--trainer.enable_checkpointing", "false", "--trainer.enable_progress_bar", "false"]
    arguments += ["--trainer.enable_model_summary", "false", "--trainer.limit_val_batches", "0"]
    epochs = 2 * -(-options.steps // (images // options.batch))  # the steps end it; a resumed run may skip an epoch
    arguments += ["--trainer.max_steps", str(options.steps), "--trainer.max_epochs", str(epochs)]
    arguments += ["--model.pretrained", "false", "--model.compile", "true" if options.compile else "false"]
    arguments += ["--model.cuda_graph", "true" if options.cuda_graph else "false"]
    arguments += ["--data.format", "synthetic", "--data.batch_size", str(options.batch), "--data.store", "gpu"]
    arguments += PLAIN
    if options.tiny:
        arguments += ["--trainer.accelerator", "cpu", "--model.backbone", "resnet10t", "--data.image_size", "[64,96]"]
        arguments += [word for k, v in SMALL_NETWORK.items() for word in (f"--model.{k}", str(v))]
    cli = DetectionCLI(LitDETR, DetectionData, "lit_detr", arguments, build_only=True)
    data = cli.datamodule
    objects = (0, 12) if options.tiny else OBJECTS
    scenes = Scenes(data.image_size, objects, {"train": images, "val": 1}, SIDES, data.hparams["channels"])
    data._table, data._synthetic = scenes.read(), scenes
    return cli


def key_of(precision: str, options: argparse.Namespace) -> Row:
    """Key of a row."""
    frame = "96x64" if options.tiny else "320x256"
    switches = {"compile": options.compile, "cuda_graph": options.cuda_graph}
    return {"precision": precision, "frame": frame, "batch": options.batch, **switches}


def run(precision: str, options: argparse.Namespace, results: Results) -> None:
    """Train until the steps are done or the deadline has come; the row is written again and again on the way."""
    key = key_of(precision, options)
    known = results.get(**key)
    if known is not None and known["steps"] >= options.steps:
        return

    def report(values: Row) -> None:
        results.add(key, {**values, "wanted": options.steps})
        print(f"{precision}: {values}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        cli = build(precision, options, folder)
        watch = Watch(options.every, report, options.deadline)
        trainer: Trainer = cli.trainer
        trainer.callbacks.append(watch)  # type: ignore[attr-defined]
        state = options.state / f"{precision}_{key['frame']}.ckpt" if options.state else None
        resumed = str(state) if state is not None and state.is_file() else None
        trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=resumed)
        report(watch.values(trainer))
        if state is not None:
            state.parent.mkdir(parents=True, exist_ok=True)
            trainer.save_checkpoint(state)


def main(args: Sequence[str] | None = None) -> None:
    """Run the rows and print them."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, help="results (benchmarks/results/detr_stability.json; with --tiny not kept)")
    p.add_argument("--steps", type=int, help="optimizer steps (10000; with --tiny 8)")
    p.add_argument("--batch", type=int, help="images of a step (16; with --tiny 2)")
    p.add_argument("--every", type=int, help="steps between two writings of a row (500; with --tiny 4)")
    p.add_argument("--fp16", action="store_true", help="also fp16 with loss scaling")
    p.add_argument("--compile", action="store_true", help="compile the network")
    p.add_argument("--cuda-graph", action="store_true", help="replay the network as CUDA graphs")
    p.add_argument("--state", type=Path, help="folder of checkpoints to go on from")
    p.add_argument("--deadline", type=float, default=float("inf"), help="Unix time at which training ends")
    p.add_argument("--tiny", action="store_true", help="a dry run on a CPU")
    options = p.parse_args(args)
    options.steps = options.steps or (8 if options.tiny else 10_000)
    options.batch = options.batch or (2 if options.tiny else 16)
    options.every = options.every or (4 if options.tiny else 500)
    default = Path(__file__).parent / "results" / "detr_stability.json"
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = Results(options.out or (Path(scratch) / default.name if options.tiny else default))
        for precision in ("bf16-mixed", "16-mixed")[: 1 + options.fp16]:
            if time.time() >= options.deadline:
                print(f"deadline: stopped before {precision}; the same command goes on from here")
                break
            try:
                run(precision, options, results)
            except Exception as error:  # a refusal of one precision is a result, too
                key = key_of(precision, options)  # what was counted before stays in the row
                results.add(key, {**(results.get(**key) or {}), "error": f"{type(error).__name__}: {error!s:.300}"})
                print(f"{precision}: {error}")
            clean_up()
        print(table(results.rows, (*COLUMNS, *MORE)))


if __name__ == "__main__":
    main()
