"""A tiny scene, tiny decoders of both modes, and a quiet Trainer."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_patchnerf.data import PatchVideoData
from lit_patchnerf.module import LitPatchNeRF

SCENE = {"frames": 8, "height": 32, "width": 64, "shapes": 2, "fps": 12.0}
# Frames 3 and 7 are held out. 48 patches of 16 x 16 are trained on: 6 steps of 8 in an epoch.
HELD_OUT = [3, 7]
DATA = {"synthetic": SCENE, "grid": [2, 4], "data_split": "3_3_4", "batch_size": 8, "num_workers": 0}
DECODERS: dict[str, dict[str, Any]] = {
    "grid": {
        "width": 8,
        "strides": [4, 2],
        "reduction": 1.5,
        "floor": 4,
        "levels": 4,
        "latent_frames": [6],
        "latent_channels": [4],
    },
    "coordinate": {
        "fc_dim": 8,
        "stem": [4, 4],
        "strides": [2, 2],
        "floor": 4,
        "multiple": 4,
        "levels": 8,
        "hidden": 16,
    },
}


def make_data(**options: Any) -> PatchVideoData:
    return PatchVideoData(**{**DATA, **options})


def make_model(mode: str = "grid", decoder: dict[str, Any] | None = None, **options: Any) -> LitPatchNeRF:
    torch.manual_seed(0)
    options = {"loss": "l2", "lr": 1e-2, "decoder": DECODERS[mode] | (decoder or {}), **options}
    return LitPatchNeRF(mode=mode, **options)  # type: ignore[arg-type]


def make_trainer(folder: Any, *callbacks: Callback, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "num_sanity_val_steps": 0, "max_epochs": 1}
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), **{**quiet, **options})


def fit(
    folder: Any,
    model: LitPatchNeRF,
    *callbacks: Callback,
    data: PatchVideoData | None = None,
    ckpt_path: Any = None,
    validate: bool = False,
    **options: Any,
) -> Trainer:
    """A fit from a fixed seed, by default of one epoch without validation."""
    torch.manual_seed(0)
    options = options if validate else {"limit_val_batches": 0, **options}
    trainer = make_trainer(folder, *callbacks, **options)
    trainer.fit(model, datamodule=data or make_data(), ckpt_path=ckpt_path)
    return trainer


def weights(module: LightningModule) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class SaveAt(Callback):
    """A checkpoint in the middle of training."""

    def __init__(self, step: int, path: Any) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class Watch(Callback):
    """What each batch gave, which rate it was taken at, and the step that the Trainer was at afterwards."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.steps: list[int] = []
        self.batches: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        self.rates.append(float(trainer.optimizers[0].param_groups[0]["lr"]))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        self.steps.append(trainer.global_step)
