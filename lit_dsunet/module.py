"""Segmentation of volumes with a U-Net."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lit_cli.errors import InputError
from lit_common.graph import GraphedStep, graphed_step
from lit_common.optim import fused_adamw, fused_sgd, warn_of_resumed
from lit_common.schedule import warmup_cosine
from lit_common.weights import take_weights
from lit_dsunet.data import VolumeData
from lit_dsunet.loaders import CaseBatch, PatchBatch
from lit_dsunet.losses import DeepSupervisionLoss, LossName, make_loss
from lit_dsunet.metrics import CaseDice, CaseHD95, LesionMetrics, class_counts, dice_from_counts
from lit_dsunet.models import Arch, MKDCPlace, build_network
from lit_dsunet.models.mkdc import MKDCNorm
from lit_dsunet.preprocess import native_logits
from lit_dsunet.sliding_window import SlidingWindow

__all__ = ["LitDSUNet", "Segmentation"]

Axes = int | list[int]


class Segmentation(NamedTuple):
    """What evaluation of a batch of volumes gives, volume by volume."""

    label: list[Tensor]  # (D, H, W) uint8 class indices on the grid of the file
    score: Tensor  # (B,) mean foreground Dice, NaN without a label
    case: list[int]  # position in the split


class LitDSUNet(LightningModule):
    """A U-Net with deep supervision and MKDC as switches, trained on patches and evaluated on whole volumes.

    Args:
        arch: `unet` (plain convolutions), `resenc` (residual encoder), `r3d18_unet` (the original guide's network) or
            `smp`, any encoder and decoder of segmentation-models-pytorch on slices.
        strides: Stride of each stage, one number or one per axis; the first is 1.
        kernels: Kernel size of each stage; null is 3 everywhere.
        features: Channels per stage; null doubles from 32 up to 320.
        encoder_blocks: Convolutions, or residual blocks, per encoder stage.
        decoder_blocks: Convolutions per decoder stage, coarsest first.
        mkdc: Where multi-kernel depth-wise convolutions stand: on the `skips`, after each `decoder` stage, or `off`.
        mkdc_kernels: Their kernel sizes.
        mkdc_norm: Normalisation of each of their branches.
        mkdc_residual: Add their input to their output.
        mkdc_fused: Compute all kernels as one convolution.
        deep_supervision: Auxiliary heads, 0 for none.
        ds_targets: What coarser heads are taught: `soft` occupancy, `max`, `nearest`, or `upsample` of their logits.
        ds_weights: `halving` from the finest, the `guide`'s, or numbers.
        loss: `dice_ce`, `tversky`, `focal`, `topk`, `generalised_dice` or `blob`.
        loss_options: Options of that loss, such as `{batch_dice: true}`.
        encoder: Encoder of `arch: smp`.
        decoder: Decoder of `arch: smp`.
        pretrained: ImageNet weights of that encoder: true, false, or a path.
        optimizer: `sgd` with Nesterov momentum, or `adamw`.
        lr: Peak learning rate.
        weight_decay: For SGD the L2 penalty.
        momentum: Of SGD.
        schedule: `poly` to 0 with power 0.9, or `cosine`.
        warmup: Share of the steps with rising learning rate.
        overlap: Share of a window that the next one covers again, in full evaluation.
        tta: Axes (0 to 2 for D, H, W) of test-time mirroring in full evaluation.
        monitor_overlap: Overlap in the cheap validation of a `ValidationSchedule`; no mirroring there.
        window_batch: Windows per forward pass.
        lesions: Lesion-wise metrics; `auto` for two classes.
        lesion_match: `any` overlap (ISLES'22) or `iou` of at least 0.2 (ISLES'24).
        hd95: 95 % Hausdorff distance in full evaluation.
        ensemble: Checkpoints whose logits are averaged with this module's in test and predict.
        channels_last: Keep the channels of a voxel together in memory (NDHWC). On a GPU with Triton `unet` and `resenc`
            use kernels of their own between the convolutions then, which is the fastest and leanest way that they have;
            without, and together with `compile`, the layout alone makes them slower.
        compile: Compile the network; only on a GPU.
        cuda_graph: Replay forward and backward pass as CUDA graphs; one GPU only, ignored elsewhere.
        gradient_checkpointing: Recompute activations in the backward pass.
        init_from: Checkpoint whose weights training starts from.
        in_channels: From the data. This and the rest is stored in the checkpoint.
        class_names: Background first; from the data.
        patch_size: Voxels along D, H, W; from the data.
        slices: Slices as channels of a two-dimensional network; from the data.
        label_values: [value, class] pairs of the label files; from the data.

    Raises:
        InputError: with one line, for values that make no sense together or with the data.
    """

    def __init__(
        self,
        *,
        arch: Arch = "unet",
        strides: list[Axes] | None = None,
        kernels: list[Axes] | None = None,
        features: list[int] | None = None,
        encoder_blocks: list[int] | None = None,
        decoder_blocks: list[int] | None = None,
        mkdc: MKDCPlace = "off",
        mkdc_kernels: list[int] | None = None,
        mkdc_norm: MKDCNorm = "batch",
        mkdc_residual: bool = False,
        mkdc_fused: bool = False,
        deep_supervision: int = 0,
        ds_targets: Literal["soft", "max", "nearest", "upsample"] = "soft",
        ds_weights: Literal["halving", "guide"] | list[float] = "halving",
        loss: LossName = "dice_ce",
        loss_options: dict[str, Any] | None = None,
        encoder: str = "resnet34",
        decoder: str = "Unet",
        pretrained: bool | str = False,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        lr: float = 0.01,
        weight_decay: float = 3e-5,
        momentum: float = 0.99,
        schedule: Literal["poly", "cosine"] = "poly",
        warmup: float = 0.0,
        overlap: float = 0.5,
        tta: list[int] | None = None,
        monitor_overlap: float = 0.25,
        window_batch: int = 4,
        lesions: bool | Literal["auto"] = "auto",
        lesion_match: Literal["any", "iou"] = "any",
        hd95: bool = False,
        ensemble: list[str] | None = None,
        channels_last: bool = False,
        compile: bool = False,
        cuda_graph: bool = False,
        gradient_checkpointing: bool = False,
        init_from: str | None = None,
        in_channels: int | None = None,
        class_names: list[str] | None = None,
        patch_size: list[int] | None = None,
        slices: int = 1,
        label_values: list[list[int]] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters({k: v for k, v in locals().items() if k not in ("self", "__class__")})
        if not 0 <= warmup < 1:
            raise InputError(f"model.warmup: expected a share from 0 to below 1, got {warmup}")
        for name, value in (("overlap", overlap), ("monitor_overlap", monitor_overlap)):
            if not 0 <= value < 1:
                raise InputError(f"model.{name}: expected a share from 0 to below 1, got {value}")
        if lr <= 0:
            raise InputError(f"model.lr: expected a positive number, got {lr}")
        if any(a not in (0, 1, 2) for a in tta or ()):
            raise InputError(f"model.tta: expected axes from 0 to 2 (D, H, W), got {tta}")
        self.criterion = DeepSupervisionLoss(
            make_loss(loss, **(loss_options or {})), weights=ds_weights, mode=ds_targets
        )
        self.net: nn.Module | None = None
        self.metrics = nn.ModuleDict()  # filled with the stages that run; holds no weights
        self.full_validation = True  # set by a ValidationSchedule with `cheap: module`
        self._graph: GraphedStep | None = None
        self._compiled = False
        self._members: list[LitDSUNet] = []  # a list of modules is not registered: members stay out of checkpoints

    # ---- building ------------------------------------------------------------------------------------------------

    @property
    def class_names(self) -> list[str]:
        """K names, the background first."""
        return list(self.hparams["class_names"] or [])

    @property
    def dims(self) -> Literal[2, 3]:
        """2 for slices, 3 for volumes."""
        return 2 if self._patch[0] == 1 else 3

    @property
    def _patch(self) -> tuple[int, int, int]:
        size = self.hparams["patch_size"]
        if size is None:
            raise InputError("model.patch_size is unknown: fit with a VolumeData, or name [depth, height, width]")
        return int(size[0]), int(size[1]), int(size[2])

    def setup(self, stage: str) -> None:
        """Take what only the data knows, and refuse data that the module was not made for."""
        data = self.trainer.datamodule if self._trainer is not None else None  # type: ignore[attr-defined]
        if isinstance(data, VolumeData):
            self._meet(data, stage)
        if stage in ("fit", "validate"):
            self._add_metrics("val")
        if stage == "test":
            self._add_metrics("test")
        if stage in ("test", "predict"):
            self._load_members()

    def _meet(self, data: VolumeData, stage: str) -> None:
        h = self.hparams
        if data.has_labels:
            for name, found in (("in_channels", data.in_channels), ("class_names", data.class_names)):
                if h[name] is None:
                    h[name] = found
                elif h[name] != found:
                    raise InputError(f"the data has {name} {found}, the model {h[name]}")
            h["label_values"] = h["label_values"] or [[v, c] for v, c in sorted(data.table.label_values.items())]
        elif h["in_channels"] is None:
            raise InputError(
                "model.in_channels is unknown: name a labelled data.root, or a checkpoint with --ckpt_path"
            )
        if stage == "fit" or h["patch_size"] is None:
            h["patch_size"], h["slices"] = list(data.patch_size), data.hparams["slices"]

    def configure_model(self) -> None:
        """Build the network."""
        h = self.hparams
        if self.net is not None:
            return
        if h["in_channels"] is None or not h["class_names"]:
            raise InputError("model.in_channels and model.class_names are unknown: fit with a VolumeData, or name them")
        strides = h["strides"] if h["strides"] is not None else [1, 2, 2, 2, 2, 2]
        with torch.device("cpu"):  # Lightning calls this with the GPU as default device and moves the module afterwards
            try:
                self.net = build_network(
                    in_channels=h["in_channels"],
                    num_classes=len(h["class_names"]),
                    arch=h["arch"],
                    dims=self.dims,
                    strides=strides,
                    kernels=h["kernels"],
                    features=h["features"],
                    encoder_blocks=h["encoder_blocks"],
                    decoder_blocks=h["decoder_blocks"],
                    mkdc=h["mkdc"],
                    mkdc_kernels=h["mkdc_kernels"] or (1, 3, 5),
                    mkdc_norm=h["mkdc_norm"],
                    mkdc_residual=h["mkdc_residual"],
                    mkdc_fused=h["mkdc_fused"],
                    deep_supervision=h["deep_supervision"],
                    encoder=h["encoder"],
                    decoder=h["decoder"],
                    pretrained=h["pretrained"] if self._fresh else False,
                    gradient_checkpointing=h["gradient_checkpointing"],
                    channels_last=h["channels_last"],
                )
            except ValueError as error:
                raise InputError(str(error)) from error
        stride: Sequence[int] = self.net.stride  # type: ignore[assignment]
        patch = self._patch[-self.dims :]
        if any(p % s for p, s in zip(patch, stride, strict=True)):
            raise InputError(f"data.patch_size: expected multiples of the network's {tuple(stride)}, got {patch}")
        if h["init_from"] is not None and self._fresh:
            # Heads follow the classes and may differ; the rest has to be there.
            take_weights(self.net, h["init_from"], "model.init_from", lambda name: "heads" in name)

    @property
    def _fresh(self) -> bool:
        """Whether this is a fit that starts without a checkpoint."""
        trainer = self._trainer
        return trainer is not None and trainer.state.fn == TrainerFn.FITTING and trainer.ckpt_path is None

    def _load_members(self) -> None:
        self._members = []
        for path in self.hparams["ensemble"] or ():
            if not Path(path).is_file():
                raise InputError(f"model.ensemble: {path}: no such file")
            member = LitDSUNet.load_from_checkpoint(path, map_location="cpu", weights_only=True)
            for name in ("in_channels", "class_names", "patch_size"):
                if member.hparams[name] != self.hparams[name]:
                    raise InputError(
                        f"model.ensemble: {path} has {name} {member.hparams[name]}, expected {self.hparams[name]}"
                    )
            self._members.append(member.eval().requires_grad_(False))

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Build the network first, so that a checkpoint opens outside of a Trainer too."""
        if self.net is None:
            self.configure_model()
        return super().load_state_dict(state_dict, strict, assign)

    # ---- training ------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Compile and prepare the graphs, where that was asked for and a GPU is there."""
        if self.hparams["compile"]:
            if self.device.type == "cuda":
                assert self.net is not None
                self.net.compile()
                self._compiled = True
            else:
                rank_zero_info(f"model.compile: ignored, the device is {self.device.type}")
        assert self.net is not None
        self._graph = graphed_step(self, self._loss_of, self.net) if self.hparams["cuda_graph"] else None

    def on_train_start(self) -> None:
        """Say so when a resumed optimizer goes on with other values than the command line's."""
        h = self.hparams
        warn_of_resumed(self.trainer.optimizers[0], lr=h["lr"], weight_decay=h["weight_decay"])

    def on_fit_end(self) -> None:
        """Drop the captured graphs: the module moves off the device now, and they hold its memory."""
        self._graph = None

    def training_step(self, batch: PatchBatch, batch_idx: int) -> Tensor:
        """Loss of a batch of patches."""
        step = self._graph or self._loss_of
        loss = step(batch.image, batch.label)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch.image))
        return loss

    def eager_training_step(self, batch: PatchBatch, batch_idx: int) -> Tensor:
        """The same without a captured graph, for batches of any size (`BatchSizeFit` asks for it)."""
        return self._loss_of(batch.image, batch.label)

    def _loss_of(self, image: Tensor, label: Tensor) -> Tensor:
        return self.criterion(self._logits(image), label)  # type: ignore[no-any-return]

    def _logits(self, image: Tensor) -> Any:
        assert self.net is not None
        image = image.float()
        if self.hparams["channels_last"]:
            form = torch.channels_last_3d if image.ndim == 5 else torch.channels_last
            image = image.contiguous(memory_format=form)
        return self.net(image)

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, K, ...) of normalised patches (B, C, D, H, W), or of slices (B, C, H, W)."""
        if self.net is None:
            self.configure_model()
        was = self.training
        self.eval()
        try:
            return self._logits(image)  # type: ignore[no-any-return]
        finally:
            self.train(was)

    def segment(self, volumes: Sequence[Tensor], *, full: bool = True) -> list[Tensor]:
        """Logits of whole, preprocessed volumes.

        Args:
            volumes: Each (C, D, H, W) at the training's spacing, of any size, on any device.
            full: With test-time mirroring and the larger overlap.

        Returns:
            (K, D, H, W) float32 each.
        """
        h = self.hparams
        window = SlidingWindow(
            self._patch,
            overlap=h["overlap"] if full else h["monitor_overlap"],
            batch=h["window_batch"],
            pad_batches=self._compiled,
            mirror=(h["tta"] or ()) if full else (),
            device=self.device,
            slices=h["slices"],
        )
        out: list[Tensor] = []
        members = [self, *self._members]
        for member in members:
            member.to(self.device)
            logits = window(member, [v.float() for v in volumes])
            out = logits if not out else [a + b for a, b in zip(out, logits, strict=True)]
        return [logits / len(members) for logits in out] if len(members) > 1 else out

    def _evaluate(self, batch: CaseBatch, *, full: bool) -> Segmentation:
        data = self._cases(batch)
        labels, scores = [], []
        classes = len(self.class_names)
        for logits, truth, case in zip(self.segment(batch.image, full=full), batch.label, data, strict=True):
            label = native_logits(logits, case.native_shape).argmax(0).to(torch.uint8)
            labels.append(label)
            if truth is None:
                scores.append(torch.full((), math.nan, device=label.device))
                continue
            counts = class_counts(label[None], truth.to(label.device)[None], classes)
            scores.append(torch.nanmean(dice_from_counts(counts)).float())
        return Segmentation(labels, torch.stack([s.to(self.device) for s in scores]), batch.case)

    def _cases(self, batch: CaseBatch) -> list[Any]:
        cases = self.trainer.datamodule.cases(self._split)  # type: ignore[attr-defined]
        return [cases[i] for i in batch.case]

    @property
    def _split(self) -> str:
        """Which cases the Trainer evaluates."""
        fn = self.trainer.state.fn
        assert fn is not None
        return fn.value if fn in (TrainerFn.TESTING, TrainerFn.PREDICTING) else "val"

    def _measure(self, stage: str, batch: CaseBatch, found: Segmentation, *, full: bool) -> None:
        for label, truth, case, index in zip(found.label, batch.label, self._cases(batch), batch.case, strict=True):
            assert truth is not None
            for name, metric in self.metrics[stage].items():  # type: ignore[operator, union-attr]
                if full or name == "dice":
                    metric.update(label, truth.to(label.device), case.geometry.spacing, index)  # type: ignore[operator]

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Whole volumes; the metrics of a cheap validation carry another name."""
        if isinstance(batch, PatchBatch):
            return self._validate_patches(batch)._asdict()
        full = self.full_validation
        found = self._evaluate(batch, full=full)
        self._measure("val", batch, found, full=full)
        return found._asdict()

    def on_validation_epoch_end(self) -> None:
        """Log the means over the cases."""
        self._log("val", full=self.full_validation)

    def test_step(self, batch: CaseBatch, batch_idx: int) -> dict[str, Any]:
        """Whole volumes, in full."""
        found = self._evaluate(batch, full=True)
        self._measure("test", batch, found, full=True)
        return found._asdict()

    def on_test_epoch_end(self) -> None:
        """Log the means over the cases."""
        self._log("test", full=True)

    def predict_step(self, batch: CaseBatch, batch_idx: int) -> Segmentation:
        """Labels on the grid of the files."""
        return self._evaluate(batch, full=True)

    def _validate_patches(self, batch: PatchBatch) -> Segmentation:
        """Dice pooled over the patches of a batch: an older convention, which leaves out what no patch sees."""
        label = self(batch.image).argmax(1).to(torch.uint8)
        classes = len(self.class_names)
        pooled = class_counts(label.flatten()[None], batch.label.flatten()[None], classes)
        self.log("val/patch_dice", torch.nanmean(dice_from_counts(pooled)).float(), batch_size=1, sync_dist=True)
        each = dice_from_counts(class_counts(label, batch.label, classes))
        return Segmentation(list(label), torch.nanmean(each, 1).float(), batch.case.tolist())

    def _add_metrics(self, stage: str) -> None:
        h, names = self.hparams, self.class_names
        found: dict[str, nn.Module] = {"dice": CaseDice(len(names), names)}
        if h["lesions"] is True or (h["lesions"] == "auto" and len(names) == 2):
            found["lesions"] = LesionMetrics(match=h["lesion_match"])
        if h["hd95"]:
            found["hd95"] = CaseHD95(len(names), names)
        self.metrics[stage] = nn.ModuleDict(found)

    def _log(self, stage: str, *, full: bool) -> None:
        for name, metric in self.metrics[stage].items():  # type: ignore[operator, union-attr]
            if metric.update_count and (full or name == "dice"):  # type: ignore[union-attr]
                values = metric.compute()  # type: ignore[operator]
                kept = {k: v for k, v in values.items() if full or k == "dice"}
                suffix = "" if full else "_monitor"
                # Exact over all devices already; sync_dist only keeps Lightning from remarking on it.
                self.log_dict({f"{stage}/{k}{suffix}": v.float() for k, v in kept.items()}, sync_dist=True)
            metric.reset()  # type: ignore[operator, union-attr]

    # ---- pictures ------------------------------------------------------------------------------------------------

    def sample_scores(self, batch: CaseBatch, outputs: dict[str, Any]) -> Tensor:
        """How bad each volume is, for `PredictionLogger`: 1 - Dice."""
        return 1 - outputs["score"]

    def plot_predictions(self, batch: CaseBatch, outputs: dict[str, Any]) -> dict[str, Any]:
        """The slices of a volume with most foreground, with contours, for `PredictionLogger`."""
        from lit_dsunet.plots import contours

        names = self.trainer.datamodule.samples(self._split)  # type: ignore[attr-defined]
        out = {}
        for image, truth, label, score, index in zip(
            batch.image, batch.label, outputs["label"], outputs["score"], batch.case, strict=True
        ):
            title = f"{names[int(index)].name}, Dice {float(score):.3f}"
            if label.ndim == 2:  # a slice, its neighbours being channels
                image, label = image[:, None], label[None]
                truth = None if truth is None else truth[None]
            out["contours"] = contours(image, truth, label, title, native=tuple(label.shape))
        return out

    # ---- optimizers ----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD or AdamW with a schedule counted in optimizer steps of the whole run."""
        h, trainer = self.hparams, self.trainer
        trained = [p for p in self.parameters() if p.requires_grad]
        if h["optimizer"] == "adamw":
            groups = [
                {"params": [p for p in trained if p.ndim > 1], "weight_decay": h["weight_decay"]},
                {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
            ]
            optimizer: torch.optim.Optimizer = fused_adamw(groups, h["lr"], clips=bool(trainer.gradient_clip_val))
        else:
            optimizer = fused_sgd(
                trained,
                h["lr"],
                momentum=h["momentum"],
                weight_decay=h["weight_decay"],
                clips=bool(trainer.gradient_clip_val),
            )
        total = max(1, int(trainer.estimated_stepping_batches))

        def factor(step: int) -> float:
            fraction = min(1.0, (step + 1) / total)
            if h["schedule"] == "cosine":
                return warmup_cosine(fraction, h["warmup"], 0.0)
            if fraction < h["warmup"]:
                return fraction / h["warmup"]
            return (1 - (fraction - h["warmup"]) / (1 - h["warmup"]) * (1 - 1 / total)) ** 0.9

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
