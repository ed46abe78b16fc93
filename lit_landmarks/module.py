"""The LightningModule: heatmap regression of landmarks, from a uint8 batch to millimetres."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import cv2
import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn import functional as F

from lit_cli.errors import InputError
from lit_common.graph import GraphedStep, graphed_step
from lit_common.optim import fused_adamw, warn_of_resumed
from lit_common.schedule import warmup_cosine
from lit_common.weights import take_weights
from lit_landmarks import heatmaps as hm
from lit_landmarks.data import LandmarkBatch, LandmarkData
from lit_landmarks.geometry import Letterbox, flip_permutation, original_points
from lit_landmarks.losses import HeatmapLoss, LossName, heatmap_loss
from lit_landmarks.metrics import RadialError
from lit_landmarks.model import HeatmapNet, compile_blocks
from lit_landmarks.schedule import auto_lr

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler
    from numpy.typing import NDArray

# Mean and standard deviation that timm's weights were trained with; the grey ones are their averages.
RGB_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GREY_STATISTICS = ((0.449,), (0.226,))
NO_DECAY_DIMENSIONS = 1  # biases and norms


class LitLandmarks(LightningModule):
    """Landmark detection by heatmap regression.

    Args:
        backbone: A timm model with feature maps, or an encoder of segmentation-models-pytorch (see `HeatmapNet`).
        decoder: `auto`, `branch`, `pyramid` or a decoder class of segmentation-models-pytorch (`Unet`, `FPN`, ...).
        pretrained: `true` downloads ImageNet weights, a path reads them from a file. Only a fresh `fit` looks at
            it, and not a `fast_dev_run`.
        in_channels: 1 for grey, 3 for RGB.
        stride: Frame pixels per heatmap pixel: 4, 2 or 1.
        loss: `mse`, `weighted_mse`, `awing` (Adaptive Wing), `kl` or `dice` (soft Dice).
        sigma: Standard deviation of the target Gaussian in **frame (network input) pixels**; `auto` is
            14 px at a width of 512 and proportional to it, the guide's 3.5 pixels of a stride-4 heatmap.
        decode: `dark`, `centroid`, `quarter`, `argmax` or `softargmax`.
        lr: Peak learning rate; `auto` follows images per optimizer step (`auto_lr`).
        weight_decay: AdamW's, on weights with two or more dimensions.
        warmup: Fraction of the run in which the learning rate rises.
        final_lr: Learning rate at the end as a fraction of the peak.
        tta: Test-time augmentation in validate, test and predict: `flip` (needs flip pairs), `multiscale`.
        tta_scales: Scales of `multiscale`, each rounded to a multiple of 32 pixels; heatmaps are averaged in the frame.
        ensemble: Checkpoints whose heatmaps are averaged with this module's in validate, test and predict.
        channels_last: NHWC memory format.
        compile: `blocks` compiles the residual blocks (seconds), `full` the whole network (minutes for HRNet). Only on
            a GPU.
        cuda_graph: Replay forward and backward pass as CUDA graphs; one GPU only, ignored elsewhere.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        init_from: Checkpoint whose weights (EMA weights if it has them) training starts from; schedule and optimizer
            start anew.
        sdr_thresholds: Radii of the success detection rate, in mm (in pixels where mm are unknown).
        strict_sdr: Count errors below, instead of up to, the radius.
        num_landmarks: K; by default what the data has. This and the rest is stored in the checkpoint.
        image_size: [height, width] of the frame; from the data.
        landmark_names: K names; from the data.
        flip_pairs: 0-based pairs that change places in a left-right flip; from the data.

    Raises:
        InputError: with one line, for values that make no sense together or with the data.
    """

    def __init__(
        self,
        *,
        backbone: str = "hrnet_w32",
        decoder: str = "auto",
        pretrained: bool | str = True,
        in_channels: Literal[1, 3] = 1,
        stride: Literal[1, 2, 4] = 4,
        loss: LossName = "mse",
        sigma: float | Literal["auto"] = "auto",
        decode: hm.DecodeMethod = "dark",
        lr: float | Literal["auto"] = "auto",
        weight_decay: float = 1e-4,
        warmup: float = 0.05,
        final_lr: float = 0.01,
        tta: list[Literal["flip", "multiscale"]] | None = None,
        tta_scales: list[float] | None = None,
        ensemble: list[str] | None = None,
        channels_last: bool = True,
        compile: Literal["off", "blocks", "full"] = "off",
        cuda_graph: bool = False,
        gradient_checkpointing: bool = False,
        init_from: str | None = None,
        sdr_thresholds: list[float] | None = None,
        strict_sdr: bool = False,
        num_landmarks: int | None = None,
        image_size: list[int] | None = None,
        landmark_names: list[str] | None = None,
        flip_pairs: list[list[int]] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters({k: v for k, v in locals().items() if k not in ("self", "__class__")})
        for name, value, low, high in (("warmup", warmup, 0, 0.9), ("final_lr", final_lr, 0, 1)):
            if not low <= value <= high:
                raise InputError(f"model.{name}: expected {low} to {high}, got {value}")
        if sigma != "auto" and not sigma > 0:
            raise InputError(f"model.sigma: expected a positive number of frame pixels or auto, got {sigma}")
        if lr != "auto" and not lr > 0:
            raise InputError(f"model.lr: expected a positive number or auto, got {lr}")
        self.net: HeatmapNet | None = None
        self.criterion: HeatmapLoss | None = None
        self.metrics = nn.ModuleDict()  # filled with the stages that run; holds no weights
        self._graph: GraphedStep | None = None
        self._members: list[LitLandmarks] = []  # a list of modules is not registered: members stay out of checkpoints

    # ---- building --------------------------------------------------------------------------------------------------

    @property
    def sigma(self) -> float:
        """Standard deviation of the targets in heatmap pixels."""
        value = self.hparams["sigma"]
        return (hm.auto_sigma(self._frame[1]) if value == "auto" else float(value)) / self.hparams["stride"]

    @property
    def landmark_names(self) -> list[str]:
        """K names."""
        return self.hparams["landmark_names"] or [str(i + 1) for i in range(self.hparams["num_landmarks"] or 0)]

    @property
    def _frame(self) -> tuple[int, int]:
        size = self.hparams["image_size"]
        if size is None:
            raise InputError("model.image_size is unknown: fit with a LandmarkData, or name [height, width]")
        return int(size[0]), int(size[1])

    def setup(self, stage: str) -> None:
        """Take what only the data knows, and refuse data that the module was not made for."""
        data = self.trainer.datamodule if self._trainer is not None else None  # type: ignore[attr-defined]
        if isinstance(data, LandmarkData):
            self._meet(data, stage)
        if stage in ("fit", "validate"):
            self._add_metrics("val")
        if stage == "test":
            self._add_metrics("test")
        if stage != "fit":
            self._load_members()

    def _meet(self, data: LandmarkData, stage: str) -> None:
        h = self.hparams
        if data.has_labels:
            if h["num_landmarks"] is None:
                h["num_landmarks"] = data.num_landmarks
            elif h["num_landmarks"] != data.num_landmarks:
                raise InputError(f"the data has {data.num_landmarks} landmarks, the model {h['num_landmarks']}")
            h["landmark_names"] = h["landmark_names"] or data.landmark_names
        elif h["num_landmarks"] is None:
            raise InputError(
                "model.num_landmarks is unknown: name a labelled data.root, or a checkpoint with --ckpt_path"
            )
        if stage == "fit" or h["image_size"] is None:
            h["image_size"] = list(data.image_size)
        elif list(h["image_size"]) != list(data.image_size):
            raise InputError(
                f"data.image_size is {list(data.image_size)}, the checkpoint was trained at {h['image_size']}"
            )
        if h["flip_pairs"] is None:
            h["flip_pairs"] = data.flip_pairs
        if "flip" in (h["tta"] or ()) and h["flip_pairs"] is None:
            raise InputError(
                "model.tta: flip needs data.flip_pairs, the pairs of landmarks that change places ([] for none)"
            )
        if data.channels != h["in_channels"] and data.channels != 1:
            raise InputError(f"data.channels is {data.channels}, model.in_channels is {h['in_channels']}")

    def configure_model(self) -> None:
        """Build the network and the loss. Weights are only fetched for a fit that starts without a checkpoint."""
        h = self.hparams
        if self.net is not None:
            return
        if h["num_landmarks"] is None:
            raise InputError("model.num_landmarks is unknown: fit with a LandmarkData, or name it")
        trainer = self._trainer
        fresh = trainer is not None and trainer.state.fn == TrainerFn.FITTING and trainer.ckpt_path is None
        wanted = fresh and h["init_from"] is None and h["pretrained"]
        if wanted and trainer is not None and getattr(trainer, "fast_dev_run", False):
            rank_zero_info("fast_dev_run: the pretrained weights are not fetched")
            wanted = False
        # Lightning calls this with the GPU as default device, but libraries place some tensors on the CPU whatever the
        # default is. Lightning moves the whole module afterwards.
        with torch.device("cpu"):
            self.net = HeatmapNet(
                backbone=h["backbone"],
                decoder=h["decoder"],
                num_landmarks=h["num_landmarks"],
                in_channels=h["in_channels"],
                stride=h["stride"],
                pretrained=wanted,
                gradient_checkpointing=h["gradient_checkpointing"],
            )
        if h["channels_last"]:
            self.net = self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if fresh and h["init_from"] is not None:
            take_weights(self.net, h["init_from"], "model.init_from", lambda name: name.startswith("head."))
        self.criterion = heatmap_loss(h["loss"], sigma=self.sigma)

    def _load_members(self) -> None:
        if self._members or not self.hparams["ensemble"]:
            return
        for path in self.hparams["ensemble"]:
            if not Path(path).is_file():
                raise InputError(f"model.ensemble: no file {path}")
            shared = {k: self.hparams[k] for k in ("tta", "tta_scales", "flip_pairs")}
            member = LitLandmarks.load_from_checkpoint(path, map_location=self.device, ensemble=None, **shared)
            if member.hparams["num_landmarks"] != self.hparams["num_landmarks"]:
                raise InputError(f"model.ensemble: {path} has {member.hparams['num_landmarks']} landmarks")
            if tuple(member.hparams["image_size"]) != self._frame or member.hparams["stride"] != self.hparams["stride"]:
                raise InputError(f"model.ensemble: {path} has another image size or stride")
            self._members.append(member.eval())

    # ---- training --------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Say so when a resumed optimizer goes on with other values than the command line's."""
        warn_of_resumed(self.trainer.optimizers[0], lr=self._lr(), weight_decay=self.hparams["weight_decay"])

    def on_fit_start(self) -> None:
        """Compile and prepare the graphs, where that was asked for and a GPU is there."""
        self._compile()
        assert self.net is not None
        self._graph = graphed_step(self, self._loss_of, self.net) if self.hparams["cuda_graph"] else None

    def _compile(self) -> None:
        how = self.hparams["compile"]
        if how == "off":
            return
        if self.device.type != "cuda":
            rank_zero_info(f"model.compile {how}: ignored, the device is {self.device.type}")
            return
        import torch._dynamo

        torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)  # one per block shape
        assert self.net is not None
        if how == "full":
            self.net.compile()
        else:
            rank_zero_info(f"compiling {compile_blocks(self.net)} residual blocks")

    def on_fit_end(self) -> None:
        """Drop the captured graphs: the module moves off the device now, and they hold its memory."""
        self._graph = None

    def training_step(self, batch: LandmarkBatch, batch_idx: int) -> Tensor:
        """Loss of an augmented batch."""
        step = self._graph or self._loss_of
        loss = step(batch.image, batch.points)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch.image))
        return loss

    def eager_training_step(self, batch: LandmarkBatch, batch_idx: int) -> Tensor:
        """The same without a captured graph, for batches of any size (`BatchSizeFit` asks for it)."""
        return self._loss_of(batch.image, batch.points)

    def _loss_of(self, images: Tensor, points: Tensor) -> Tensor:
        assert self.net is not None
        assert self.criterion is not None
        size = (images.shape[-2], images.shape[-1])
        valid = hm.visible(points, size)
        stride = self.hparams["stride"]
        target = hm.encode(
            hm.to_heatmap(points, stride), valid, (size[0] // stride, size[1] // stride), sigma=self.sigma
        )
        return self.criterion(self.net(self._normalise(images)), target, valid)

    def _normalise(self, images: Tensor) -> Tensor:
        """uint8, or float in [0, 1], to what the network expects."""
        images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        channels = self.hparams["in_channels"]
        mean, std = GREY_STATISTICS if channels == 1 else RGB_STATISTICS
        if images.shape[1] != channels:
            images = images.expand(-1, channels, -1, -1)
        # Channel by channel: a tensor made from a list here would be a copy from the host in every step.
        parts = [(images[:, i : i + 1] - m) / s for i, (m, s) in enumerate(zip(mean, std, strict=True))]
        out = parts[0] if channels == 1 else torch.cat(parts, dim=1)
        return out.contiguous(memory_format=torch.channels_last) if self.hparams["channels_last"] else out

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Heatmaps (B, K, h, w) with peaks of about 1, for uint8 or [0, 1] images (B, C, H, W) of the frame's size."""
        if self.net is None:
            self.configure_model()
        assert self.net is not None
        assert self.criterion is not None
        return self.criterion.activate(self.net(self._normalise(images)))

    def locate(self, images: Tensor) -> hm.Decoded:
        """Landmarks of framed images, with test-time augmentation and ensemble as configured.

        Args:
            images: (B, C, H, W) uint8 or float in [0, 1].

        Returns:
            points and covariance in **frame pixels**, scores in [0, 1].
        """
        maps = self._augmented_maps(images)
        for member in self._members:
            maps = maps + member.to(images.device)._augmented_maps(images)
        maps = maps / (1 + len(self._members))
        found = hm.decode(maps, self.hparams["decode"], sigma=self.sigma)
        stride = self.hparams["stride"]
        return hm.Decoded(hm.from_heatmap(found.points, stride), found.score, found.covariance * stride**2)

    def _augmented_maps(self, images: Tensor) -> Tensor:
        """Mean of the heatmaps of an image and its variants, all brought back to the image's own grid."""
        tta: Sequence[str] = self.hparams["tta"] or ()
        height, width = images.shape[-2:]
        scales = self.hparams["tta_scales"] or [0.9, 1.0, 1.1] if "multiscale" in tta else [1.0]
        order = (
            flip_permutation(self.hparams["num_landmarks"], self.hparams["flip_pairs"] or []) if "flip" in tta else []
        )
        total: Tensor | None = None
        count = 0
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images
        for size in dict.fromkeys((_multiple(height * s), _multiple(width * s)) for s in scales):
            same = size == (height, width)
            scaled = pixels if same else F.interpolate(pixels, size, mode="bilinear", antialias=True)
            for flipped in (False, True) if order else (False,):
                maps = self(scaled.flip(-1) if flipped else scaled).float()
                if flipped:
                    maps = maps.flip(-1)[:, order]  # exact: pixel centres mirror onto pixel centres at every stride
                if not same:
                    stride = self.hparams["stride"]
                    maps = F.interpolate(maps, (height // stride, width // stride), mode="bilinear")
                total = maps if total is None else total + maps
                count += 1
        assert total is not None
        return total / count

    def validation_step(self, batch: LandmarkBatch, batch_idx: int) -> dict[str, Tensor]:
        """Errors of a batch, in original pixels and mm."""
        return self._evaluate(batch, "val")

    def test_step(self, batch: LandmarkBatch, batch_idx: int) -> dict[str, Tensor]:
        """Errors of a batch, in original pixels and mm."""
        return self._evaluate(batch, "test")

    def _evaluate(self, batch: LandmarkBatch, stage: str) -> dict[str, Tensor]:
        found = self.locate(batch.image)
        points = original_points(found.points, batch.matrix)
        present = torch.isfinite(batch.target).all(-1)
        known = torch.isfinite(batch.spacing).all(-1)
        spacing = torch.nan_to_num(batch.spacing, nan=1.0)  # masked by `known` wherever it was NaN
        for unit, mask, scale in (("px", present, None), ("mm", present & known[:, None], spacing)):
            metric = self.metrics[f"{stage}_{unit}"]
            assert isinstance(metric, RadialError)
            metric.update(points, batch.target, mask, scale)
        return {
            "points": points,
            "frame_points": found.points,
            "score": found.score,
            "error_px": (points - batch.target).square().sum(-1).sqrt(),
            "error_mm": ((points - batch.target) * batch.spacing[:, None]).square().sum(-1).sqrt(),  # NaN where unknown
        }

    def on_validation_epoch_end(self) -> None:
        """Log the pooled metrics."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the pooled metrics."""
        self._log_metrics("test")

    def _add_metrics(self, stage: str) -> None:
        thresholds = self.hparams["sdr_thresholds"] or [2.0, 2.5, 3.0, 4.0]
        units: tuple[Literal["px", "mm"], ...] = ("px", "mm")
        for unit in units:
            if f"{stage}_{unit}" not in self.metrics:
                metric = RadialError(thresholds, strict=self.hparams["strict_sdr"], unit=unit)
                self.metrics[f"{stage}_{unit}"] = metric.to(self.device)

    def _log_metrics(self, stage: str) -> None:
        in_mm = False
        for unit in ("mm", "px"):
            metric = self.metrics[f"{stage}_{unit}"]
            assert isinstance(metric, RadialError)
            values = metric.compute()
            metric.reset()
            if unit == "mm":
                in_mm = not bool(torch.isnan(values["mre"]))
                if not in_mm:
                    continue  # no image says how large its pixels are: there are no mm to report
            for key, value in values.items():
                # SDR in px is the answer only where mm are unknown; beside mm it would mislead.
                if unit == "px" and key != "mre" and in_mm:
                    continue
                name = key if key.startswith("sdr") else f"{key}_{unit}"
                # The metric is exact over all devices already; sync_dist only keeps Lightning from remarking on it.
                shown = key == "mre" and (unit == "mm" or not in_mm)
                self.log(f"{stage}/{name}", value.float(), prog_bar=shown, sync_dist=True)

    def predict_step(self, batch: LandmarkBatch, batch_idx: int) -> dict[str, Tensor]:
        """Landmarks in original pixels (B, K, 2), scores (B, K) and standard deviations in original pixels (B, K)."""
        found = self.locate(batch.image)
        scale = batch.matrix[:, 0, 0][:, None]
        spread = (torch.diagonal(found.covariance, dim1=-2, dim2=-1).mean(-1).clamp(min=0).sqrt() / scale).float()
        return {
            "points": original_points(found.points, batch.matrix),
            "score": found.score,
            "sd": spread,
            "spacing": batch.spacing,
            "index": batch.position,
        }

    @torch.no_grad()
    def predict_image(self, image: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Landmarks (K, 2) of one image, for notebooks.

        Args:
            image: (H, W) grey or (H, W, 3) RGB, uint8, of any size.

        Returns:
            x and y in pixels of that image.
        """
        if image.ndim == 3 and self.hparams["in_channels"] == 1:
            image = np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.uint8)  # the weights that readers get
        channels = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
        box = Letterbox((image.shape[0], image.shape[1]), self._frame)
        framed = torch.from_numpy(box.apply(np.ascontiguousarray(channels)))[None].to(self.device)
        was_training = self.training
        found = self.eval().locate(framed)
        self.train(was_training)
        matrix = torch.from_numpy(box.matrix)[None].to(self.device)
        return original_points(found.points, matrix)[0].cpu().numpy()

    # ---- optimizers ------------------------------------------------------------------------------------------------

    def _lr(self) -> float:
        """Peak learning rate; `auto` follows the images per optimizer step."""
        if self.hparams["lr"] != "auto":
            return float(self.hparams["lr"])
        data = getattr(self.trainer, "datamodule", None)
        batch = data.batch_size if isinstance(data, LandmarkData) else 8
        return auto_lr(batch * self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with cosine decay, counted in optimizer steps of the whole run."""
        h, trainer = self.hparams, self.trainer
        lr = self._lr()
        if h["lr"] == "auto":
            rank_zero_info(f"lr auto: {lr:g}")
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > NO_DECAY_DIMENSIONS], "weight_decay": h["weight_decay"]},
            {"params": [p for p in trained if p.ndim <= NO_DECAY_DIMENSIONS], "weight_decay": 0.0},
        ]
        optimizer = fused_adamw(groups, lr, clips=bool(trainer.gradient_clip_val))
        total = max(1, int(trainer.estimated_stepping_batches))

        def factor(step: int) -> float:
            return warmup_cosine((step + 1) / total, h["warmup"], h["final_lr"])

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _multiple(size: float, of: int = 32) -> int:
    return max(of, round(size / of) * of)
