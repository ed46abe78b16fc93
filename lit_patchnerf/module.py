"""A video as a network: decoded patch by patch or frame by frame, with an embedding of each patch to search it by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lit_cli.errors import InputError
from lit_common.schedule import warmup_cosine
from lit_common.weights import take_weights
from lit_patchnerf.compress.quantise import Layout, fake_quantisers
from lit_patchnerf.data import PatchVideoData, StepBatches
from lit_patchnerf.decoding import decode_canvases, decode_region, embed_moments, frame_times, to_bytes
from lit_patchnerf.losses import ClipLoss, make_loss
from lit_patchnerf.metrics import SPLITS, FrameMetrics, SeamRatio, held_out_beside_baselines, psnr
from lit_patchnerf.models import (
    CoordinateDecoder,
    Decoded,
    GridConfig,
    GridDecoder,
    Mode,
    build_decoder,
    count_params,
    decoder_config,
)
from lit_patchnerf.optim import Name as OptimizerName
from lit_patchnerf.optim import make_optimizer, shuffle_phases
from lit_patchnerf.patches import Geometry, unit_range
from lit_patchnerf.pictures import comparison
from lit_patchnerf.samples import FrameBatch, MomentBatch, TrainBatch
from lit_patchnerf.similarity import centred_cosine, cosine, mean_embedding
from lit_patchnerf.splits import blend_frames, blend_neighbours, latent_frames, nearest_neighbours
from lit_patchnerf.steps import OptimizerSteps, interrupts_wait
from lit_patchnerf.trained import Trained

__all__ = ["LitPatchNeRF", "LrRule", "load"]

LrRule = Literal["constant", "sqrt", "linear"]
TERMS = ("loss", "pixels", "clip")
ROUNDING = "rounding_layouts"  # in checkpoints
# Those of `make_optimizer` that are not the module's own.
OPTIMIZER_OPTIONS = (
    "betas",
    "fused",
    "muon_lr",
    "momentum",
    "nesterov",
    "ns_steps",
    "muon_scale",
    "adamw_parts",
    "phases",
)
# What figures of the splits are called beside those of all frames.
NAMES = {"train": "train", "unused": "unused", "val": "held_out"}


class LitPatchNeRF(LightningModule):
    """A neural video representation of the NeRV family: one network is trained until it is the video.

    Args:
        mode: `grid`: learned latents and convolutions decode a whole frame, or a patch that equals its crop.
            `coordinate`: the place (t, y, x) of a patch is decoded by itself.
        decoder: Options of `GridConfig` or `CoordinateConfig`; frame, grid and patch come from the data.
        target_params: Solve for the widest decoder with at most so many parameters, latents included.
        loss: `l2`, `l1`, `ssim`, `fusion1` to `fusion12`, `fusion10_freq`, … (`lit_patchnerf.losses`).
        ssim_window: Side of the window of its SSIM, 11 or 5.
        ssim_scales: Scales of its MS-SSIM.
        clip_weight: Factor of the embeddings' loss, where there are targets.
        clip_start: Share of the training that begins without it.
        clip_ramp: Share of the training in which it grows to its factor.
        optimizer: `adam`, `adamw`, `adan` or `muon`.
        lr: Peak learning rate.
        optimizer_options: Further options of `lit_patchnerf.optim.make_optimizer`; `phases: true` lets Muon take each
            phase of a pixel shuffle as a matrix of its own.
        weight_decay: Decoupled, of matrices.
        lr_rule: How `lr` follows the batch: `sqrt` and `linear` multiply it by (a power of) batch_size / lr_batch.
        lr_batch: Batch size that `lr` is meant for.
        warmup: Share of the training with rising learning rate.
        final: Share of it at the end of the cosine.
        gradient_clip: Largest norm of the gradient where the module steps by itself, with `cuda_graph` or
            `data.steps_per_batch`; elsewhere it is the Trainer's `gradient_clip_val`.
        qat_bits: Train against rounding to so many bits; null for none.
        qat_start: Share of the training that begins without it.
        qat_noise: Share of the weights that a step rounds.
        channels_last: NHWC memory format.
        compile: Compile the network; only on a GPU.
        cuda_graph: Replay all of a batch's optimizer steps as one CUDA graph; only on one GPU.
        init_from: Checkpoint whose weights training starts from.
        frames: Of the video, from the data. This and the rest is stored in the checkpoint.
        fps: Of the video, from the data.
        geometry: Of frames and patches, from the data.
        clip_dim: Length of the embeddings, from the data.

    Raises:
        InputError: with one line, for values that make no sense together or with the data.
    """

    def __init__(
        self,
        *,
        mode: Mode = "grid",
        decoder: dict[str, Any] | None = None,
        target_params: int | None = None,
        loss: str = "fusion6",
        ssim_window: int = 11,
        ssim_scales: int = 5,
        clip_weight: float = 0.1,
        clip_start: float = 1 / 6,
        clip_ramp: float = 0.0,
        optimizer: OptimizerName = "adamw",
        lr: float = 1e-3,
        optimizer_options: dict[str, Any] | None = None,
        weight_decay: float = 0.0,
        lr_rule: LrRule = "constant",
        lr_batch: int = 8,
        warmup: float = 0.1,
        final: float = 0.0,
        gradient_clip: float | None = None,
        qat_bits: int | None = None,
        qat_start: float = 0.0,
        qat_noise: float = 1.0,
        channels_last: bool = True,
        compile: bool = False,
        cuda_graph: bool = False,
        init_from: str | None = None,
        frames: int | None = None,
        fps: float | None = None,
        geometry: dict[str, list[int]] | None = None,
        clip_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters({k: v for k, v in locals().items() if k not in ("self", "__class__")})
        for name, value in (("lr", lr), ("lr_batch", lr_batch), ("gradient_clip", gradient_clip)):
            if value is not None and not value > 0:
                raise InputError(f"model.{name}: expected a positive number, got {value}")
        for name, value in (("warmup", warmup), ("final", final), ("qat_start", qat_start)):
            if not 0 <= value <= 1:
                raise InputError(f"model.{name}: expected a share from 0 to 1, got {value}")
        if qat_bits is not None and not 2 <= qat_bits <= 16:
            raise InputError(f"model.qat_bits: expected 2 to 16 or null, got {qat_bits}")
        if not 0 < qat_noise <= 1:
            raise InputError(f"model.qat_noise: expected a share above 0 and up to 1, got {qat_noise}")
        for name in optimizer_options or {}:
            if name not in OPTIMIZER_OPTIONS:
                known = ", ".join(OPTIMIZER_OPTIONS)
                raise InputError(f"model.optimizer_options: no option {name}, expected some of {known}")
        if lr_rule not in get_args(LrRule):
            raise InputError(f"model.lr_rule: expected one of {', '.join(get_args(LrRule))}, got {lr_rule}")
        self.pixel_loss = make_loss(loss, window=ssim_window, scales=ssim_scales)
        self.clip_loss = ClipLoss(clip_weight, start=clip_start, ramp=clip_ramp)
        self.net: CoordinateDecoder | GridDecoder | None = None
        self.metrics = nn.ModuleDict()  # filled with the stages that run; holds no weights
        self._steps: OptimizerSteps | None = None
        self._wrapped: tuple[Trained, ...] = ()  # as an attribute of its own it would be in checkpoints, too
        self.rounding_layouts: dict[str, Layout] = {}
        self._length: int | None = None  # of the fit in optimizer steps
        self._baselines: dict[str, dict[str, Tensor]] = {}
        self._mean_embedding: Tensor | None = None

    # ---- building ------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Take what only the data knows, and refuse data that the module was not made for."""
        data = self._data
        if data is not None:
            self._meet(data, stage)
        if stage == "fit":
            self._choose_optimization(data)
        split = {"fit": "val", "validate": "val", "test": "test"}.get(stage)
        if split is not None:
            seams = SeamRatio(self.geometry.patch) if self.geometry.per_frame > 1 else None
            parts: dict[str, nn.Module] = {"frames": FrameMetrics()}
            if seams is not None and self.geometry.crop == self.geometry.canvas:
                parts["seams"] = seams
            for name in ("hidden_psnr_db", *(f"{kind}_{s}" for kind in ("cosine", "centred") for s in SPLITS)):
                parts[name] = MeanMetric()
            self.metrics[split] = nn.ModuleDict(parts)

    @property
    def _data(self) -> PatchVideoData | None:
        found = getattr(self.trainer, "datamodule", None) if self._trainer is not None else None
        return found if isinstance(found, PatchVideoData) else None

    def _meet(self, data: PatchVideoData, stage: str) -> None:
        h = self.hparams
        if stage == "predict" and h["geometry"] is not None:
            return
        fresh = h["geometry"] is None
        if fresh and h["mode"] == "grid" and "latent_frames" not in (h["decoder"] or {}):
            h["decoder"] = {**(h["decoder"] or {}), "latent_frames": latent_frames(data.count, data.split.train)}
        own = {"frames": data.count, "geometry": data.geometry.to_dict()}
        for name, value in own.items():
            if h[name] is None:
                h[name] = value
            elif h[name] != value:
                raise InputError(f"data.video: its {name} are {value}, expected {h[name]} as the model has")
        h["fps"] = h["fps"] or data.fps
        if h["clip_dim"] is None and fresh:
            h["clip_dim"] = data.embedding_dim
        elif data.embedding_dim not in (None, h["clip_dim"]):
            raise InputError(
                f"data.embeddings: their length is {data.embedding_dim}, the model's head expected {h['clip_dim']}"
            )
        if data.hparams["sample"] == "frame" and h["mode"] == "coordinate":
            raise InputError("data.sample: frame expected model.mode grid; coordinate mode learns patches")
        if stage == "fit":
            self.pixel_loss.check_size(*(data.geometry.canvas if self._whole_frames else data.geometry.patch))

    def _choose_optimization(self, data: PatchVideoData | None) -> None:
        """Whether the Trainer makes the steps, or the module several at a time."""
        h, trainer = self.hparams, self.trainer
        several = data is not None and data.hparams["steps_per_batch"] > 1
        by_itself = several or h["cuda_graph"]
        self.automatic_optimization, self._length = not by_itself, None
        if not by_itself:
            if h["gradient_clip"] is not None:
                raise InputError(
                    "model.gradient_clip: expected trainer.gradient_clip_val in its place, as the Trainer makes the "
                    "steps without model.cuda_graph and with data.steps_per_batch 1"
                )
            return
        option = "model.cuda_graph" if h["cuda_graph"] else "data.steps_per_batch"
        if trainer.gradient_clip_val:
            raise InputError(f"trainer.gradient_clip_val: with {option} expected model.gradient_clip in its place")
        if trainer.accumulate_grad_batches > 1:
            raise InputError(f"trainer.accumulate_grad_batches: with {option} expected 1 and a larger data.batch_size")
        precision = str(trainer.precision)
        if precision.startswith("16"):
            raise InputError(f"trainer.precision: with {option} expected bf16-mixed or 32-true, got {precision}")
        if trainer.world_size > 1:
            raise InputError(f"trainer.devices: with {option} expected 1, got {trainer.world_size} processes")

    @property
    def geometry(self) -> Geometry:
        """Of frames and patches."""
        if self.hparams["geometry"] is None:
            raise InputError("model.geometry: expected a fit with a PatchVideoData first, or a checkpoint")
        return Geometry.from_dict(self.hparams["geometry"])

    @property
    def _whole_frames(self) -> bool:
        return self._data is not None and self._data.hparams["sample"] == "frame"

    def configure_model(self) -> None:
        """Build the network."""
        if self.net is not None:
            return
        h, geometry = self.hparams, self.geometry
        options = dict(h["decoder"] or {})
        options["clip_dim"] = h["clip_dim"]
        if h["mode"] == "grid":
            options |= {"frame": geometry.canvas, "grid": geometry.grid}
        else:
            options["patch"] = geometry.patch
        config = decoder_config(h["mode"], options, target_params=h["target_params"])
        with torch.device("cpu"):  # Lightning calls this with the GPU as default device and moves the module afterwards
            self.net = build_decoder(config)
        if self._fresh:
            width = config.width if isinstance(config, GridConfig) else config.fc_dim
            total = count_params(config)
            rank_zero_info(f"decoder: {total:,} parameters, width {width}, {total * 4:,} bytes as float32")
            if h["init_from"] is not None:
                take_weights(self.net, h["init_from"], "model.init_from", lambda name: name.startswith("clip."))
        if h["channels_last"]:
            self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def _fresh(self) -> bool:
        """Whether this is a fit that starts without a checkpoint."""
        trainer = self._trainer
        return trainer is not None and trainer.state.fn == TrainerFn.FITTING and trainer.ckpt_path is None

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Build the network first, so that a checkpoint opens outside of a Trainer too."""
        self.configure_model()
        return super().load_state_dict(state_dict, strict, assign)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with another video, and take over what rounding is trained against."""
        stored = checkpoint.get("hyper_parameters", {})
        fields = {"mode": "model.mode", "clip_dim": "data.embeddings", "frames": "data.video", "geometry": "data.video"}
        for name, field in fields.items():
            own, known = self.hparams[name], self.hparams["geometry"] is not None
            if known and name in stored and stored[name] != own:
                raise InputError(f"{field}: its {name} is {own}, the checkpoint expected {stored[name]}")
        self._check_place(checkpoint)
        _unite_counters(checkpoint)
        kept = checkpoint.get(ROUNDING, {})
        self.rounding_layouts = {name: Layout(tuple(shape), half) for name, (shape, half) in kept.items()}

    def _check_place(self, checkpoint: Mapping[str, Any]) -> None:
        """A place inside an epoch is counted in batches, which another number of steps makes others."""
        trainer, data = self._trainer, self._data
        if trainer is None or data is None or trainer.state.fn != TrainerFn.FITTING:
            return
        loop = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
        stored = checkpoint.get("datamodule_hyper_parameters", {}).get("steps_per_batch")
        own = data.hparams["steps_per_batch"]
        inside = not loop.get("is_last_batch", True) and loop.get("current", {}).get("ready", 0) > 0
        if inside and stored is not None and stored != own:
            raise InputError(
                f"data.steps_per_batch is {own}, expected {stored}: the checkpoint lies inside an epoch of such batches"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the layouts that rounding began with: those of the present weights may be others."""
        if self.rounding_layouts:
            checkpoint[ROUNDING] = {name: [list(own.shape), own.half] for name, own in self.rounding_layouts.items()}

    # ---- training ------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Make what training calls in the network's place; compile it where that was asked for and a GPU is there."""
        assert self.net is not None
        trained = Trained(self.net, self.hparams["frames"], self.geometry.grid, self._whole_frames)
        self._wrapped = (trained,)
        for option in ("compile", "cuda_graph"):
            if self.hparams[option] and self.device.type != "cuda":
                rank_zero_info(f"model.{option}: ignored, the device is {self.device.type}")
        if self.hparams["compile"] and self.device.type == "cuda":
            trained.compile(dynamic=False)

    @property
    def _trained(self) -> Trained:
        return self._wrapped[0]

    @property
    def _captures(self) -> bool:
        return bool(self.hparams["cuda_graph"]) and self.device.type == "cuda"

    def on_fit_end(self) -> None:
        """Give back the graph's memory."""
        self._steps, self._wrapped = None, ()

    def training_step(self, batch: TrainBatch, batch_idx: int) -> dict[str, Tensor]:
        """The loss of a batch; with several optimizer steps in it, or a captured one, these as well."""
        if self.automatic_optimization:
            terms = self._terms(*(x[0] for x in self._inputs(batch, self.trainer.global_step)))
            self._note(terms.detach(), batch)
            return {"loss": terms[0], "pixels": terms[1].detach()}
        if self._steps is None:
            optimizer = self.trainer.optimizers[0]
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self._steps = OptimizerSteps(
                self._terms, optimizer, parameters, clip=self.hparams["gradient_clip"], capture=self._captures
            )
        first, last = self.trainer.global_step, self.trainer.max_steps
        if 0 < last < first + len(batch.indices):
            batch = batch.head(last - first)
        count = len(batch.indices)
        if self._rounds(first) and not self._trained.rounding:
            self._steps.forget()  # from here on the network is another one
        factors = [self._factor(step) for step in range(first, first + count)]
        inputs = self._inputs(batch, first)
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        scheduler: Any = self.lr_schedulers()
        with interrupts_wait(self._captures):  # between a graph, which nothing takes back, and its accounting
            terms = self._steps(*inputs, factors=factors)
            for _ in range(count):
                progress.increment_ready()
                progress.increment_completed()
            scheduler.last_epoch += count - 1
            scheduler.step()
        self._note(terms, batch)
        return {"loss": terms[0].clone(), "pixels": terms[1].clone()}

    def _inputs(self, batch: TrainBatch, first: int) -> list[Tensor]:
        """Tensors (K, ...) that the steps read; what is absent has no elements."""
        count, device = len(batch.indices), batch.pixels.device
        total = self._total_steps
        shares = torch.tensor([(first + k) / total for k in range(count)], dtype=torch.float32)
        shares = shares.to(device, non_blocking=True)
        none = batch.pixels.new_empty(count, 0, dtype=torch.float32)
        weight = none if batch.weight is None else batch.weight
        embeddings = none if batch.embeddings is None else batch.embeddings
        return [batch.indices, batch.pixels, weight, embeddings, shares]

    def _terms(self, index: Tensor, pixels: Tensor, weight: Tensor, embeddings: Tensor, share: Tensor) -> Tensor:
        """(T,) of `TERMS` of one optimizer step."""
        with self._autocast():
            decoded = self._trained(index, self._fake_quantised())
        loss = self.pixel_loss(decoded.rgb, unit_range(pixels), weight if weight.numel() else None)
        clip = loss.new_zeros(())
        if decoded.clip is not None and embeddings.numel():
            clip = self.clip_loss(decoded.clip.flatten(0, -2), embeddings.float().flatten(0, -2), share)
        return torch.stack([loss + clip, loss.detach(), clip.detach()])

    def _autocast(self) -> AbstractContextManager:
        return self.trainer.precision_plugin.forward_context()

    def _fake_quantised(self) -> dict[str, Tensor] | None:
        """The network's parameters as rounding would leave them, once that is trained for."""
        assert self.net is not None
        if not self._rounds(self.trainer.global_step):
            return None
        rounding = self._trained.rounding
        if not rounding:
            h, named = self.hparams, self.net.named_parameters()
            rounding.update(fake_quantisers(named, h["qat_bits"], h["qat_noise"], self.rounding_layouts))
            self.rounding_layouts = {name: fake.layout for name, fake in rounding.items()}
        own = dict(self.net.named_parameters())
        return {name: fake(own[name]) for name, fake in rounding.items()}

    def _rounds(self, step: int) -> bool:
        """Whether an optimizer step trains against rounding."""
        h = self.hparams
        return h["qat_bits"] is not None and step >= round(h["qat_start"] * self._total_steps)

    def _note(self, terms: Tensor, batch: TrainBatch) -> None:
        size = batch.indices.numel()
        self.log("train/loss", terms[0].clone(), prog_bar=True, batch_size=size)
        if batch.embeddings is not None:
            self.log_dict({f"train/{n}": t.clone() for n, t in zip(TERMS[1:], terms[1:], strict=True)}, batch_size=size)

    @property
    def _total_steps(self) -> int:
        """Optimizer steps of the whole fit."""
        if self._length is None:
            self._length = self._count_steps()
        return self._length

    def _count_steps(self) -> int:
        trainer = self.trainer
        total = trainer.estimated_stepping_batches  # counts a batch as one step; it loads the data
        sampler = getattr(trainer.train_dataloader, "sampler", None)
        epochs = -1 if trainer.max_epochs is None else trainer.max_epochs
        if isinstance(sampler, StepBatches) and not self.automatic_optimization and epochs != -1:
            together = sampler.batch_size // sampler.step_size
            total = min(int(trainer.num_training_batches) * together, sampler.steps) * max(1, epochs)
            total = total if trainer.max_steps == -1 else min(total, trainer.max_steps)
        if math.isinf(total):
            raise InputError(
                "trainer.max_epochs: expected a number or trainer.max_steps: the rate falls over the whole run"
            )
        return max(1, int(total))

    def _factor(self, step: int) -> float:
        h = self.hparams
        return warmup_cosine(min(1.0, (step + 1) / self._total_steps), h["warmup"], h["final"])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The chosen optimizer, with a cosine over the whole run."""
        assert self.net is not None
        h = self.hparams
        power = {"constant": 0.0, "sqrt": 0.5, "linear": 1.0}[h["lr_rule"]]
        size = self._data.hparams["batch_size"] if self._data is not None else h["lr_batch"]
        options = dict(h["optimizer_options"] or {})
        if options.get("phases") is True:
            options["phases"] = shuffle_phases(self.net)
        optimizer = make_optimizer(
            h["optimizer"],
            self.net.named_parameters(),
            lr=h["lr"] * (size / h["lr_batch"]) ** power,
            weight_decay=h["weight_decay"],
            capturable=not self.automatic_optimization and self._captures,
            clips=bool(self.trainer.gradient_clip_val),
            **options,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # ---- decoding ------------------------------------------------------------------------------------------------

    def forward(self, times: Tensor) -> Tensor:
        """Frames (F, 3, H, W) from 0 to 1 at times (F,) from 0 to 1."""
        return self.decode(times).rgb

    def _network(self) -> CoordinateDecoder | GridDecoder:
        self.configure_model()
        assert self.net is not None
        return self.net

    def frame_times(self, index: Tensor) -> Tensor:
        """(F,) float32 from 0 to 1 of frames."""
        return frame_times(index, self.hparams["frames"])

    def decode(self, times: Tensor) -> Decoded:
        """Frames of moments, between frames too.

        Args:
            times: (F,) float32 from 0 for the first frame to 1 for the last.

        Returns:
            Colours (F, 3, H, W) of the canvas from 0 to 1, and embeddings (F, rows, cols, D) or None.
        """
        return decode_canvases(self._network(), times, self.geometry)

    def decode_region(self, times: Tensor, region: Sequence[int]) -> Tensor:
        """A rectangle of the original frame (top, left, height, width), from the patches that it touches.

        Returns:
            Colours (F, 3, height, width) from 0 to 1.
        """
        return decode_region(self._network(), times, self.geometry, region)

    def embed(self, times: Tensor) -> Tensor:
        """Embeddings (F, rows, cols, D) alone, at a fraction of the cost of the colours.

        Raises:
            RuntimeError: the decoder has no such head.
        """
        return embed_moments(self._network(), times, self.geometry)

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def _measure(self, stage: str, batch: FrameBatch) -> dict[str, Any]:
        geometry = self.geometry
        parts: Any = self.metrics[stage]
        decoded = self.decode(self.frame_times(batch.indices))
        rgb = decoded.rgb.float().clamp(0, 1)
        target = unit_range(batch.pixels)
        inside, wanted = geometry.cut(rgb), geometry.cut(target)
        parts["frames"].update(batch.indices, batch.split, inside, wanted)
        if "seams" in parts:
            parts["seams"].update(batch.indices, batch.split, rgb, target)
        if batch.hidden is not None:
            hidden = geometry.cut(batch.hidden).float()
            error = ((inside - wanted).square() * hidden).sum((1, 2, 3)) / (3 * hidden.sum((1, 2, 3))).clamp_min(1)
            parts["hidden_psnr_db"].update(-10 * torch.log10(error + 1e-9))
        if batch.embeddings is not None and decoded.clip is not None:
            self._measure_embeddings(parts, batch, decoded.clip)
        return {
            "rgb": inside,
            "target": wanted,
            "psnr_db": psnr(inside, wanted),
            "split": batch.split,
            "frames": batch.frames,
        }

    def _measure_embeddings(self, parts: Any, batch: FrameBatch, found: Tensor) -> None:
        assert batch.embeddings is not None
        if self._mean_embedding is None:
            assert self._data is not None
            table = self._data.embedding_table
            assert table is not None
            self._mean_embedding = mean_embedding(table.float())
        true, mean = batch.embeddings.float(), self._mean_embedding.to(found.device)
        plain, centred = cosine(found, true).mean((1, 2)), centred_cosine(found, true, mean).mean((1, 2))
        for number, name in enumerate(SPLITS):
            of = (batch.split == number).float()
            # A weight of 0 leaves a frame out, without asking the device how many there are.
            parts[f"cosine_{name}"].update(plain, of)
            parts[f"centred_{name}"].update(centred, of)

    def validation_step(self, batch: FrameBatch, batch_idx: int) -> dict[str, Any]:
        """Figures of whole frames."""
        return self._measure("val", batch)

    def on_validation_epoch_end(self) -> None:
        """Log the figures over all frames."""
        self._log("val")

    def test_step(self, batch: FrameBatch, batch_idx: int) -> dict[str, Any]:
        """The same for a test."""
        return self._measure("test", batch)

    def on_test_epoch_end(self) -> None:
        """Log the figures over all frames."""
        self._log("test")

    def _log(self, stage: str) -> None:
        values: dict[str, Any] = {}
        parts: Any = self.metrics[stage]
        for name, metric in parts.items():
            if not metric.update_count:
                continue
            found = metric.compute()
            if isinstance(found, dict):
                values |= {_renamed(key): value for key, value in found.items()}
            else:
                kind, _, of = name.partition("_")
                values[f"{NAMES[of]}_{kind}" if of in NAMES else name] = found
            metric.reset()
        values = {key: value for key, value in values.items() if not torch.isnan(value)}
        if "held_out_psnr_db" in values:
            figures = {"val_psnr_db": values["held_out_psnr_db"]}
            rows = held_out_beside_baselines(figures, self._neighbours_alone())
            values |= {_renamed(key): torch.tensor(value) for key, value in rows.items()}
        # Exact over all devices already; sync_dist only keeps Lightning from remarking on it.
        self.log_dict({f"{stage}/{key}": value.float() for key, value in values.items()}, sync_dist=True)

    def _neighbours_alone(self) -> dict[str, dict[str, Tensor]]:
        """The held-out figures of what the frames around each would give without a network."""
        data = self._data
        assert data is not None
        if not self._baselines:
            held, train = data.split.val, data.split.train
            for name, neighbours in (("nearest", nearest_neighbours), ("blend", blend_neighbours)):
                found = []
                for start in range(0, len(held), 8):
                    part = held[start : start + 8]
                    guess = blend_frames(data.frames, neighbours(part, train))
                    target = unit_range(data.frames[part].permute(0, 3, 1, 2))
                    found.append(psnr(data.geometry.cut(guess), data.geometry.cut(target)))
                self._baselines[name] = {"val_psnr_db": torch.cat(found).mean()}
        return self._baselines

    # ---- pictures ------------------------------------------------------------------------------------------------

    def sample_scores(self, batch: FrameBatch, outputs: dict[str, Any]) -> Tensor:
        """How bad each frame is, for `PredictionLogger`."""
        return -outputs["psnr_db"]

    def plot_predictions(self, batch: FrameBatch, outputs: dict[str, Any]) -> dict[str, Any]:
        """Original, reconstruction and error of a frame, for `PredictionLogger`."""
        out = {}
        for target, found, frame, split in zip(
            outputs["target"], outputs["rgb"], outputs["frames"], outputs["split"], strict=True
        ):
            name = NAMES[SPLITS[int(split)]].replace("_", " ")
            out["frames"] = comparison(target, found, caption=f"frame {frame}, {name}")
        return out

    # ---- prediction ----------------------------------------------------------------------------------------------

    def predict_step(self, batch: MomentBatch, batch_idx: int) -> dict[str, Any]:
        """Frames in their original size, or the region that was asked for: uint8 (F, h, w, 3)."""
        geometry, data = self.geometry, self._data
        region = data.region if data is not None else None
        if region is None:
            found = geometry.restore(to_bytes(self.decode(batch.times).rgb))
        else:
            found = to_bytes(self.decode_region(batch.times, region))
        return {"pixels": found.permute(0, 2, 3, 1), "numbers": batch.numbers}


def _unite_counters(checkpoint: dict[str, Any]) -> None:
    """The Trainer counts steps of its own and a module's apart; a run goes on from their number, whoever makes them."""
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    own = loop.get("epoch_loop.manual_optimization.optim_step_progress")
    trainers = loop.get("epoch_loop.automatic_optimization.optim_progress", {}).get("optimizer", {}).get("step")
    for counter in (own, trainers):
        if counter is not None:
            counter["total"].update(ready=checkpoint["global_step"], completed=checkpoint["global_step"])


def _renamed(key: str) -> str:
    """`val_psnr_db` of the metrics is a held-out figure: `val/` is what a Trainer calls every validation."""
    for name, shown in NAMES.items():
        if key.startswith(f"{name}_"):
            return shown + key[len(name) :]
    return key


def load(path: str | Path, device: str | torch.device = "cpu") -> LitPatchNeRF:
    """The module of a checkpoint, in evaluation mode.

    Raises:
        InputError: no such file, or not a checkpoint of this module.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file, expected a checkpoint")
    try:
        module = LitPatchNeRF.load_from_checkpoint(path, map_location=device)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: not a checkpoint of LitPatchNeRF ({str(error).splitlines()[0]:.100})") from error
    return module.eval()
