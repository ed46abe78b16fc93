"""Detection of tiny objects with a transformer."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch._dynamo
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from lit_cli.errors import InputError
from lit_common.graph import GraphedCall, graphs_allowed
from lit_common.optim import fused_adamw, warn_of_resumed
from lit_common.schedule import flat_cosine
from lit_common.weights import take_weights
from lit_detr.batches import ReadyBatch
from lit_detr.coco import ImageResult
from lit_detr.data import DetectionData
from lit_detr.losses import DetectionLoss
from lit_detr.matching import ClassKind, Matcher
from lit_detr.metrics import DetectionAP
from lit_detr.models import build_network, query_budget
from lit_detr.plots import detection_picture, marks
from lit_detr.samples import BUCKET, Output, Targets
from lit_detr.sliced import best
from lit_detr.tile_store import WholeBatch

__all__ = ["Detections", "LitDETR"]


COMPILED_SHAPES = 64
STRIDES = (8, 16, 32)
LEAST_PRIOR = 2.0  # px


class Detections(NamedTuple):
    """What evaluation of a batch gives, image by image, best first.

    Where the images of a batch have different numbers, rows beyond an image's own have a score of minus infinity.
    """

    boxes: Tensor  # (B, D, 4) x1 y1 x2 y2 in pixels of the file
    scores: Tensor  # (B, D)
    labels: Tensor  # (B, D) int64
    position: list[int]  # in the split


class LitDETR(LightningModule):
    """A detection transformer with a light encoder and a deformable decoder.

    Args:
        backbone: `resnet18`, `resnet50`, `hgnetv2_b0`, `convnext_tiny`, … or any timm model with feature maps.
        pretrained: ImageNet weights of it: true, false, or a path.
        strides: Of the maps that the decoder reads, each twice the one before; from 4 on for objects below 16 pixels.
        hidden: Channels of encoder and decoder.
        heads: Of attention.
        feedforward: Inner width of the linear layers beside attention.
        points: Points that a head reads per level.
        prior_sizes: Side in pixels of the boxes that the cells of each level begin with, finest first; null takes
            quantiles of the training boxes' sides.
        decoder_layers: How often boxes are refined.
        queries: Fewest queries.
        most_queries: Most of them, where a batch has many boxes.
        eval_queries: Of evaluation, which cannot know how many boxes there are.
        noise_queries: Denoising queries in training, 0 for none.
        noise_weight: Factor of their loss.
        class_loss: `focal`, `vfl` or `mal`.
        l1: Factor of the loss, and of the cost in matching.
        giou: Of both.
        nwd: Of both.
        nwd_constant: C in pixels of the network's input; null takes the mean side of the training boxes.
        lr: Peak learning rate.
        backbone_lr: Its share for the backbone.
        weight_decay: Of AdamW; none on biases and normalisations.
        warmup: Share of the run with rising learning rate.
        flat: Share of the run up to which it stays level, before a cosine.
        final: Share of it at the end.
        most_detections: Detections kept per image.
        channels_last: NHWC memory format of the convolutions.
        compile: Compile the network; only on a GPU.
        cuda_graph: Replay the network's forward and backward pass as CUDA graphs, one pair for each number of queries;
            only on one GPU.
        gradient_checkpointing: Recompute activations in the backward pass.
        init_from: Checkpoint whose weights training starts from.
        class_names: From the data. This and the rest is stored in the checkpoint.
        category_ids: What the files call them, from the data.
        in_channels: From the data.
        image_size: [height, width], from the data.

    Raises:
        InputError: with one line, for values that make no sense together or with the data.
    """

    def __init__(
        self,
        *,
        backbone: str = "resnet18",
        pretrained: bool | str = False,
        strides: list[int] | None = None,
        hidden: int = 256,
        heads: int = 8,
        feedforward: int = 1024,
        points: int = 4,
        prior_sizes: list[float] | None = None,
        decoder_layers: int = 3,
        queries: int = 300,
        most_queries: int = 1500,
        eval_queries: int = 300,
        noise_queries: int = 100,
        noise_weight: float = 1.0,
        class_loss: ClassKind = "mal",
        l1: float = 5.0,
        giou: float = 2.0,
        nwd: float = 0.0,
        nwd_constant: float | None = None,
        lr: float = 4e-4,
        backbone_lr: float = 1.0,
        weight_decay: float = 1e-4,
        warmup: float = 0.05,
        flat: float = 0.5,
        final: float = 0.05,
        most_detections: int = 300,
        channels_last: bool = False,
        compile: bool = False,
        cuda_graph: bool = False,
        gradient_checkpointing: bool = False,
        init_from: str | None = None,
        class_names: list[str] | None = None,
        category_ids: list[int] | None = None,
        in_channels: int | None = None,
        image_size: list[int] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters({k: v for k, v in locals().items() if k not in ("self", "__class__")})
        if lr <= 0:
            raise InputError(f"model.lr: expected a positive number, got {lr}")
        for name, value in (("warmup", warmup), ("flat", flat), ("final", final)):
            if not 0 <= value <= 1:
                raise InputError(f"model.{name}: expected a share from 0 to 1, got {value}")
        if not 1 <= queries <= most_queries:
            raise InputError(f"model.queries: expected 1 to most_queries ({most_queries}), got {queries}")
        self.net: nn.Module | None = None
        self.criterion: DetectionLoss | None = None
        self._graph: GraphedCall | None = None
        self.metrics = nn.ModuleDict()  # filled with the stages that run; holds no weights

    # ---- building ------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Take what only the data knows, and refuse data that the module was not made for."""
        data = self.trainer.datamodule if self._trainer is not None else None  # type: ignore[attr-defined]
        if isinstance(data, DetectionData):
            self._meet(data, stage)
        if stage == "fit" and self._trainer is not None and str(self.trainer.precision).startswith("16"):
            rank_zero_warn(
                f"trainer.precision {self.trainer.precision}: float16 overflows on images with many small objects; "
                "bf16-mixed does not, and 32-true where the GPU has no bfloat16",
                category=UserWarning,
            )
        for split in {"fit": ["val"], "validate": ["val"], "test": ["test"]}.get(stage, []):
            self.metrics[split] = DetectionAP(self.class_names)

    def _meet(self, data: DetectionData, stage: str) -> None:
        h = self.hparams
        if data.has_labels:
            if h["class_names"] is None:
                h["class_names"] = data.class_names
                h["category_ids"] = list(data.table.category_ids)
            elif h["class_names"] != data.class_names:
                raise InputError(f"the data has classes {data.class_names}, the model {h['class_names']}")
        elif h["class_names"] is None:
            raise InputError("model.class_names is unknown: name an annotated data.root, or a checkpoint")
        h["in_channels"] = h["in_channels"] or data.hparams["channels"]
        if stage == "fit" or h["image_size"] is None:
            h["image_size"] = list(data.image_size)
        if stage == "fit":
            self._measure_boxes(data)

    def _measure_boxes(self, data: DetectionData) -> None:
        """Sizes that begin with what the training boxes have."""
        h, split = self.hparams, data.prepared("train")
        boxes = [split.boxes(i).boxes for i in range(len(split))]
        sides = np.concatenate([np.sqrt(np.prod(b[:, 2:] - b[:, :2], axis=1)) for b in boxes]) if boxes else np.zeros(0)
        if not len(sides):
            return
        if h["prior_sizes"] is None:
            h["prior_sizes"] = prior_sizes(sides, len(h["strides"] or STRIDES))
            rank_zero_info(f"model.prior_sizes: {h['prior_sizes']} pixels, quantiles of the training boxes' sides")
        if h["nwd"] > 0 and h["nwd_constant"] is None:
            h["nwd_constant"] = round(float(sides.mean()), 2)
            rank_zero_info(f"model.nwd_constant: {h['nwd_constant']} pixels, the mean side of the training boxes")

    @property
    def class_names(self) -> list[str]:
        """By class index."""
        return list(self.hparams["class_names"] or [])

    def configure_model(self) -> None:
        """Build the network."""
        h = self.hparams
        if self.net is not None:
            return
        if not h["class_names"] or h["in_channels"] is None:
            raise InputError("model.class_names and model.in_channels are unknown: fit with a DetectionData first")
        fresh = self._fresh
        with torch.device("cpu"):  # Lightning calls this with the GPU as default device and moves the module afterwards
            try:
                self.net = build_network(
                    num_classes=len(h["class_names"]),
                    in_channels=h["in_channels"],
                    backbone=h["backbone"],
                    pretrained=h["pretrained"] if fresh and h["init_from"] is None else False,
                    strides=h["strides"] or STRIDES,
                    hidden=h["hidden"],
                    heads=h["heads"],
                    feedforward=h["feedforward"],
                    points=h["points"],
                    prior_sizes=h["prior_sizes"],
                    decoder_layers=h["decoder_layers"],
                    queries=h["queries"],
                    noise_queries=h["noise_queries"],
                    gradient_checkpointing=h["gradient_checkpointing"],
                    channels_last=h["channels_last"],
                )
            except ValueError as error:
                raise InputError(str(error)) from error
        if fresh and h["init_from"] is not None:
            assert self.net is not None
            take_weights(self.net, h["init_from"], "model.init_from", _depends_on_classes)
        constant = h["nwd_constant"] if h["nwd"] > 0 else None
        self.criterion = DetectionLoss(
            Matcher(l1=h["l1"], giou=h["giou"], nwd=h["nwd"], nwd_constant=constant),
            class_kind=h["class_loss"],
            weights={"l1": h["l1"], "giou": h["giou"], "nwd": h["nwd"]},
            nwd_constant=constant,
            denoising=h["noise_weight"],
        )

    @property
    def _fresh(self) -> bool:
        """Whether this is a fit that starts without a checkpoint."""
        trainer = self._trainer
        return trainer is not None and trainer.state.fn == TrainerFn.FITTING and trainer.ckpt_path is None

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Build the network first, so that a checkpoint opens outside of a Trainer too."""
        if self.net is None:
            self.configure_model()
        return super().load_state_dict(state_dict, strict, assign)

    # ---- training ------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Compile and capture, where that was asked for and a GPU is there."""
        assert self.net is not None
        assert self.criterion is not None
        if self.hparams["compile"]:
            if self.device.type == "cuda":
                # A graph for each width of the targets and number of queries: one for all would be slower.
                torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_SHAPES)
                self.net.compile(dynamic=False)
                self.criterion.compile_parts(dynamic=False)
            else:
                rank_zero_info(f"model.compile: ignored, the device is {self.device.type}")
        wanted = self.hparams["cuda_graph"] and graphs_allowed(self)
        self._graph = GraphedCall(self._outputs, self.net) if wanted else None

    def on_fit_end(self) -> None:
        """Give back the graphs' memory."""
        self._graph = None

    def on_train_start(self) -> None:
        """Say so when a resumed optimizer goes on with other values than the command line's."""
        h = self.hparams
        warn_of_resumed(self.trainer.optimizers[0], lr=h["lr"], weight_decay=h["weight_decay"])

    def training_step(self, batch: ReadyBatch, batch_idx: int) -> Tensor:
        """Loss of an augmented batch."""
        assert self.net is not None
        assert self.criterion is not None
        assert batch.targets is not None
        h = self.hparams
        budget = query_budget(batch.targets.counts, minimum=h["queries"], maximum=h["most_queries"])
        torch.manual_seed(batch.seed)  # for the denoising queries: the state of generators is in no checkpoint
        output = self._network_output(batch.image, batch.mask, batch.targets, budget)
        height, width = batch.image.shape[-2:]
        terms = self.criterion(output, batch.targets, (height, width))
        size = len(batch.image)
        self.log("train/loss", terms["loss"].detach(), prog_bar=True, batch_size=size)
        self.log_dict({f"train/{k}": v for k, v in terms.items() if k != "loss"}, batch_size=size)
        return terms["loss"]

    def _network_output(self, image: Tensor, mask: Tensor | None, targets: Targets, budget: int) -> Output:
        """By replaying a graph where there is one."""
        assert self.net is not None
        wide = widened(targets) if self._graph is not None or self.hparams["compile"] else targets
        if self._graph is None or mask is not None:
            # Without the numbers on the host, which the network does not read but a compiler would take for constants.
            return self.net(image, mask, wide._replace(counts=[]), budget)  # type: ignore[no-any-return]
        return Output(*self._graph(image, wide.boxes, wide.labels, wide.lengths, queries=budget))

    def _outputs(
        self, image: Tensor, boxes: Tensor, labels: Tensor, lengths: Tensor, queries: int
    ) -> tuple[Tensor, ...]:
        """What is captured."""
        assert self.net is not None
        output: Output = self.net(image, None, Targets(boxes, labels, lengths, []), queries)
        return tuple(x for x in output if x is not None)

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Output:
        """Logits and boxes of images (B, C, H, W) from 0 to 1, H and W multiples of the coarsest stride."""
        if self.net is None:
            self.configure_model()
        assert self.net is not None
        was = self.training
        self.eval()
        try:
            return self.net(image, mask, None, self.hparams["eval_queries"])  # type: ignore[no-any-return]
        finally:
            self.train(was)

    def detect(self, batch: ReadyBatch | WholeBatch, split: str) -> Detections:
        """Detections of a batch in pixels of the files."""
        if isinstance(batch, WholeBatch):
            return self._detect_sliced(batch)
        output = self(batch.image, batch.mask)
        boxes, scores, labels = best(output.logits[-1], output.boxes[-1], self.hparams["most_detections"])
        prepared = self.trainer.datamodule.prepared(split)  # type: ignore[attr-defined]
        position = batch.position.tolist()
        height, width = batch.image.shape[-2:]
        scale = np.stack([np.array([width, height, width, height]) / prepared.scales[i] for i in position])
        limit = np.stack([np.tile(prepared.sizes[i][::-1], 2) for i in position])
        scale, limit = (torch.from_numpy(v).to(boxes.device, boxes.dtype)[:, None] for v in (scale, limit))
        return Detections((boxes * scale).clamp_min(0).minimum(limit), scores, labels, position)

    def _detect_sliced(self, batch: WholeBatch) -> Detections:
        """The same of whole images, which are cut into tiles on the device."""
        h, data = self.hparams, self.trainer.datamodule  # type: ignore[attr-defined]
        compiled = h["compile"] and self.device.type == "cuda"
        found = data.slicing(h["most_detections"], pad_batches=compiled).detect(self, batch.image, self.device)
        boxes, scores, labels = (
            pad_sequence([getattr(f, name) for f in found], batch_first=True, padding_value=value)
            for name, value in (("boxes", 0.0), ("scores", -torch.inf), ("labels", 0))
        )
        return Detections(boxes, scores, labels, batch.position.tolist())

    def _measure(self, stage: str, batch: ReadyBatch | WholeBatch, split: str) -> Detections:
        found = self.detect(batch, split)
        samples = self.trainer.datamodule.prepared(split).samples  # type: ignore[attr-defined]
        own = [samples[i] for i in found.position]
        targets = [
            {
                "boxes": torch.from_numpy(s.boxes),
                "labels": torch.from_numpy(s.labels),
                "area": torch.from_numpy(s.area),
                "iscrowd": torch.from_numpy(s.crowd),
            }
            for s in own
        ]
        detections = [
            {"boxes": b, "scores": c, "labels": k}
            for b, c, k in zip(found.boxes, found.scores, found.labels, strict=True)
        ]
        targets = [{k: v.to(self.device, non_blocking=True) for k, v in t.items()} for t in targets]
        self.metrics[stage].update([s.image_id for s in own], detections, targets)  # type: ignore[operator]
        return found

    def validation_step(self, batch: ReadyBatch | WholeBatch, batch_idx: int) -> dict[str, Any]:
        """Average precision of whole images."""
        return self._measure("val", batch, "val")._asdict()

    def on_validation_epoch_end(self) -> None:
        """Log the figures over all images."""
        self._log("val")

    def test_step(self, batch: ReadyBatch | WholeBatch, batch_idx: int) -> dict[str, Any]:
        """The same for the test split."""
        return self._measure("test", batch, "test")._asdict()

    def on_test_epoch_end(self) -> None:
        """Log the figures over all images."""
        self._log("test")

    # ---- pictures ------------------------------------------------------------------------------------------------

    def _results(self, outputs: dict[str, Any]) -> list[ImageResult]:
        split: Any = self.trainer.datamodule.prepared(self._split)  # type: ignore[attr-defined]
        rows = (outputs[k].double().cpu().numpy() for k in ("boxes", "scores", "labels"))
        found = []
        for boxes, scores, labels, position in zip(*rows, outputs["position"], strict=True):
            s = split.samples[position]
            truth = s.boxes.astype(np.float64), s.labels, s.area.astype(np.float64), s.crowd
            own = np.isfinite(scores)
            found.append(ImageResult(s.image_id, boxes[own], scores[own], labels[own].astype(np.int64), *truth))
        return found

    @property
    def _split(self) -> str:
        return "test" if self.trainer.state.fn == TrainerFn.TESTING else "val"

    def sample_scores(self, batch: ReadyBatch | WholeBatch, outputs: dict[str, Any]) -> Tensor:
        """How bad each image is, for `PredictionLogger`: misses and false alarms."""
        bad = [sum(m.kind in ("miss", "false alarm") for m in marks(r)) for r in self._results(outputs)]
        return torch.tensor(bad, dtype=torch.float32)

    def plot_predictions(self, batch: ReadyBatch | WholeBatch, outputs: dict[str, Any]) -> dict[str, Any]:
        """Hits, misses and false alarms, with magnified crops, for `PredictionLogger`."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        samples = data.prepared(self._split).samples
        out = {}
        for result, position in zip(self._results(outputs), outputs["position"], strict=True):
            sample = samples[position]
            out["detections"] = detection_picture(
                data.image_of(sample), marks(result), self.class_names, caption=sample.name
            )
        return out

    # ---- prediction ----------------------------------------------------------------------------------------------

    def predict_step(self, batch: ReadyBatch | WholeBatch, batch_idx: int) -> Detections:
        """Detections in pixels of the files."""
        return self.detect(batch, "predict")

    def _log(self, stage: str) -> None:
        metric = self.metrics[stage]
        if metric.update_count:  # type: ignore[union-attr]
            values = {f"{stage}/{k}": v.float() for k, v in metric.compute().items()}  # type: ignore[operator]
            # Exact over all devices already; sync_dist only keeps Lightning from remarking on it.
            self.log_dict(values, sync_dist=True)
        metric.reset()  # type: ignore[operator, union-attr]

    # ---- optimizers ----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW in few groups, with a schedule in shares of the whole run."""
        h, trainer = self.hparams, self.trainer
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(("backbone" in name, parameter.ndim > 1), []).append(parameter)
        listed = [
            {
                "params": own,
                "lr": h["lr"] * (h["backbone_lr"] if of_backbone else 1.0),
                "weight_decay": h["weight_decay"] if decays else 0.0,
            }
            for (of_backbone, decays), own in sorted(groups.items(), key=lambda item: (item[0][0], not item[0][1]))
        ]
        optimizer = fused_adamw(listed, h["lr"], clips=bool(trainer.gradient_clip_val))
        total = max(1, int(trainer.estimated_stepping_batches))

        def factor(step: int) -> float:
            return flat_cosine(min(1.0, (step + 1) / total), h["warmup"], h["flat"], h["final"])

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _depends_on_classes(name: str) -> bool:
    """Whether a tensor of the network has a row for each class."""
    return any(part in name for part in ("class_heads", "selection.score", "denoising.embedding"))


def prior_sizes(sides: NDArray[Any], levels: int) -> list[float]:
    """Sizes that divide the boxes evenly among the levels, small ones for the finest.

    Args:
        sides: (N,) of the boxes in pixels of the network's input.
        levels: How many.

    Example:
        >>> prior_sizes(np.arange(8.0, 25.0), 4)
        [10.0, 14.0, 18.0, 22.0]
    """
    quantiles = np.quantile(sides, (np.arange(levels) + 0.5) / levels)
    return [round(max(float(q), LEAST_PRIOR), 2) for q in quantiles]


def widened(targets: Targets) -> Targets:
    """The targets with the next power of two as their width, so that few of them occur.

    Example:
        >>> from lit_detr.samples import pack_targets
        >>> widened(pack_targets([torch.zeros(70, 4)], [torch.zeros(70)])).boxes.shape
        torch.Size([1, 128, 4])
    """
    more = max(BUCKET, 1 << (targets.labels.shape[1] - 1).bit_length()) - targets.labels.shape[1]
    if not more:
        return targets
    boxes, labels = F.pad(targets.boxes, (0, 0, 0, more)), F.pad(targets.labels, (0, more))
    return targets._replace(boxes=boxes, labels=labels)
