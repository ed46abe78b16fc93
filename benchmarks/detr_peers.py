"""What the benchmarks of lit_detr need of its peers: RT-DETRv2 of transformers, RF-DETR and torchvision's FCOS.

Only public classes and their documented options; each is imported inside its function, so that a script says what is
missing and measures the rest. All begin with random weights and train everything, batch normalisation too. A peer takes
the batches that our network takes, gives one loss, and detects in the form that our metrics take. Call both under
autocast if wanted: what does not bear it, a peer keeps in float32 by itself.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from lit_detr.samples import Targets
from lit_detr.sliced import best

Mode = Literal["eager", "graphs", "compile"]
Answers = Targets | Sequence["Boxes"]

DETECTIONS = 300  # per image, as of LitDETR
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which RF-DETR and torchvision subtract


class Boxes(NamedTuple):
    """Of one image: labels (N,) int64 from 0 and boxes (N, 4), centre and size as shares of the image."""

    labels: Tensor
    boxes: Tensor


class Found(NamedTuple):
    """Per image, best first: boxes (D, 4) x1 y1 x2 y2 in pixels of the frame, scores (D,), labels (D,)."""

    boxes: Sequence[Tensor]
    scores: Sequence[Tensor]
    labels: Sequence[Tensor]


class Peer(nn.Module):
    """A detector of somebody else.

    Attributes:
        description: What it is, for a table.
        version: The package and its release.
        detections: Most per image; FCOS is built with its number.
    """

    description = ""
    version = ""
    detections = DETECTIONS

    def loss(self, images: Tensor, targets: Answers) -> Tensor:
        """() of images (B, C, H, W) from 0 to 1; the module must be in training mode."""
        raise NotImplementedError

    def detect(self, images: Tensor) -> Found:
        """Detections of images; the module must be in evaluation mode."""
        raise NotImplementedError

    @property
    def millions(self) -> float:
        """Parameters."""
        return round(sum(p.numel() for p in self.parameters()) / 1e6, 2)


def random_boxes(n: int, seed: int, classes: int = 4) -> Boxes:
    """Boxes with sides of 1 to 5 % of the image, anywhere.

    >>> labels, boxes = random_boxes(3, seed=0)
    >>> labels.shape, boxes.shape, bool((boxes[:, 2:] >= 0.01).all())
    (torch.Size([3]), torch.Size([3, 4]), True)
    """
    generator = torch.Generator().manual_seed(seed)
    side = 0.01 + 0.04 * torch.rand(n, 2, generator=generator)
    centre = 0.03 + 0.94 * torch.rand(n, 2, generator=generator)
    return Boxes(torch.randint(0, classes, (n,), generator=generator), torch.cat([centre, side], 1))


def unpacked(targets: Answers) -> list[Boxes]:
    """Per image, without waiting for the device: packed targets know their numbers on the host.

    >>> from lit_detr.samples import pack_targets
    >>> packed = pack_targets([torch.rand(2, 4), torch.zeros(0, 4)], [torch.ones(2), torch.zeros(0)])
    >>> [len(own.labels) for own in unpacked(packed)]
    [2, 0]
    """
    if isinstance(targets, Targets):
        return [Boxes(targets.labels[i, :n], targets.boxes[i, :n]) for i, n in enumerate(targets.counts)]
    return list(targets)


def load(name: str) -> Any:
    """Import a module of a peer."""
    return importlib.import_module(name)


@functools.lru_cache(maxsize=32)
def constant(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers on a device; a new tensor at every step would make the host wait."""
    with torch.inference_mode(False):  # it may be made in evaluation and used in training
        return torch.tensor(values, device=device)


# ---- RT-DETRv2 ------------------------------------------------------------------------------------------------------


class RTDETRv2(Peer):
    """RT-DETRv2 of transformers."""

    def __init__(self, net: Any, description: str, version: str, channels_last: bool) -> None:
        super().__init__()
        self.net, self.description, self.version = net, description, version
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.to(memory_format=self.format)  # type: ignore[call-overload]

    def loss(self, images: Tensor, targets: Answers) -> Tensor:
        """Its own sum."""
        labels = [{"class_labels": own.labels, "boxes": own.boxes} for own in unpacked(targets)]
        return self.net(pixel_values=images.contiguous(memory_format=self.format), labels=labels).loss

    def detect(self, images: Tensor) -> Found:
        """The best over queries and classes, as its image processor does it."""
        out = self.net(pixel_values=images.contiguous(memory_format=self.format))
        return in_pixels(out.logits, out.pred_boxes, images, self.detections)


def in_pixels(logits: Tensor, boxes: Tensor, images: Tensor, most: int = DETECTIONS) -> Found:
    """The best of queries with (B, Q, K) logits and boxes in shares of the images."""
    height, width = images.shape[-2:]
    found, scores, labels = best(logits, boxes, most)
    found = found * constant((width, height, width, height), found.device)
    return Found(list(found), list(scores), list(labels))


def rtdetr_v2(
    classes: int,
    size: int | tuple[int, int],
    queries: int = 300,
    patched: bool = False,
    channels_last: bool = False,
    noise_queries: int = 100,
) -> RTDETRv2:
    """RT-DETRv2-R18 as published: strides 8 to 32, three decoder layers, from random weights.

    Its class heads begin with a probability of 0.01, as in the original: that of transformers would be 0.2 for four
    classes.

    Args:
        classes: K.
        size: Side of the images, or (height, width).
        queries: At least as many as boxes on any image, or some stay without one.
        patched: Compare only the queries of inference with the boxes. Release 5.17 compares all queries of the last
            decoder layer, denoising queries included, which then take the boxes away from the others.
        channels_last: Memory format of the convolutions.
        noise_queries: Denoising queries: as many as fit, and at least two per box of the densest image.
    """
    transformers = load("transformers")
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if any(s % 32 for s in sides):
        raise ValueError(f"RT-DETRv2: expected sides that are multiples of 32, got {sides}")
    backbone = transformers.RTDetrResNetConfig(
        depths=[2, 2, 2, 2],
        hidden_sizes=[64, 128, 256, 512],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.RTDetrV2Config(
        backbone_config=backbone,
        encoder_in_channels=[128, 256, 512],
        hidden_expansion=0.5,
        decoder_layers=3,
        num_queries=queries,
        num_denoising=noise_queries,
        num_labels=classes,
        freeze_backbone_batch_norms=False,
        initializer_bias_prior_prob=0.01,
    )
    net: Any = transformers.RTDetrV2ForObjectDetection(config)
    if patched:
        net.loss_function = without_noise(net.loss_function)
    words = f"RT-DETRv2-R18, {queries} queries{', loss of the last layer mended' if patched else ''}"
    return RTDETRv2(net, words, f"transformers {transformers.__version__}", channels_last)


def without_noise(loss: Callable[..., Any]) -> Callable[..., Any]:
    """A loss of RT-DETR whose first term sees the queries of inference only; the denoising queries come first."""

    def narrowed(
        logits: Tensor,
        labels: Any,
        device: Any,
        pred_boxes: Tensor,
        *rest: Any,
        denoising_meta_values: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        if denoising_meta_values is not None:
            noise = denoising_meta_values["dn_num_split"][0]
            logits, pred_boxes = logits[:, noise:], pred_boxes[:, noise:]
        return loss(logits, labels, device, pred_boxes, *rest, denoising_meta_values=denoising_meta_values, **options)

    return narrowed


# ---- RF-DETR --------------------------------------------------------------------------------------------------------


class RFDETR(Peer):
    """RF-DETR, built by its own configurations."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: Any, criterion: Any, forward: Callable[..., Any], classes: int, description: str) -> None:
        super().__init__()
        self.net, self.criterion, self.classes, self.description = net, criterion, classes, description
        self._forward = forward
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1))

    def _samples(self, images: Tensor) -> Any:
        mask = torch.zeros(len(images), *images.shape[-2:], dtype=torch.bool, device=images.device)
        return load("rfdetr.utilities").NestedTensor((images - self.mean) / self.std, mask, no_padding=True)

    def loss(self, images: Tensor, targets: Answers) -> Tensor:
        """Its weighted sum over groups and layers."""
        size = constant(tuple(images.shape[-2:]), images.device)
        rows = [{"labels": t.labels, "boxes": t.boxes, "orig_size": size} for t in unpacked(targets)]
        packed, weights = load("rfdetr.utilities").pack_targets(rows), self.criterion.weight_dict
        losses = self.criterion(self._forward(self._samples(images), packed), packed)
        return torch.stack([losses[k] * weights[k] for k in losses if k in weights]).sum()

    def detect(self, images: Tensor) -> Found:
        """The best over the queries of its first group."""
        out = self.net(self._samples(images))
        return in_pixels(out["pred_logits"][..., : self.classes], out["pred_boxes"], images, self.detections)


def rfdetr_nano(classes: int, px: int, mode: Mode = "eager", device: str | torch.device = "cpu") -> RFDETR:
    """RF-DETR Nano from random weights; its ViT with patches of 16 fetches none.

    Args:
        classes: K.
        px: Side of the square images, a multiple of 32.
        mode: `graphs` is its runner of CUDA graphs, `compile` its recipe for static shapes.
        device: Where to build it; the graphs stay there.
    """
    configs, models = load("rfdetr.config"), load("rfdetr.models")
    folder = str(Path(tempfile.gettempdir()) / "rfdetr")
    kind = torch.device(device).type
    model_config = configs.RFDETRNanoConfig(
        pretrain_weights=None, resolution=px, positional_encoding_size=px // 16, num_classes=classes, device=kind
    )
    train_config = configs.TrainConfig(dataset_dir=".", output_dir=folder, multi_scale=False)
    net = models.build_model_from_config(model_config, train_config).to(device).train()
    criterion: Any = models.build_criterion_from_config(model_config, train_config)[0].to(device).train()
    forward: Callable[..., Any] = net
    if mode == "graphs":
        forward = load("rfdetr.training.cuda_graph_step").CudaGraphTrainingRunner(net)
    elif mode == "compile":
        import torch._inductor.config as inductor

        torch._dynamo.config.capture_scalar_outputs = True
        tiling = "coalesce_tiling_analysis"
        options: dict[str, Any] = {f"triton.{tiling}": False} if hasattr(inductor.triton, tiling) else {}
        criterion.matcher.enable_compiled_l1_cost(options)
        criterion.enable_compiled_detection_losses()
        forward = torch.compile(net, dynamic=False, options=options or None)
    peer = RFDETR(net, criterion, forward, classes, f"RF-DETR Nano, {mode}").to(device)
    peer.version = f"rfdetr {importlib.metadata.version('rfdetr')}"
    return peer


# ---- FCOS -----------------------------------------------------------------------------------------------------------


class FCOS(Peer):
    """torchvision's FCOS, its parts called on whole batches: its own transform goes image by image and waits."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: Any, description: str, version: str, channels_last: bool) -> None:
        super().__init__()
        self.net, self.description, self.version = net, description, version
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1))
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.to(memory_format=self.format)  # type: ignore[call-overload]

    def _heads(self, images: Tensor) -> tuple[dict[str, Tensor], list[Tensor], list[int]]:
        """Outputs in float32, anchors per image, cells per level."""
        from torchvision.models.detection.image_list import ImageList

        x = ((images - self.mean) / self.std).contiguous(memory_format=self.format)
        features = list(self.net.backbone(x).values())
        outputs = {name: value.float() for name, value in self.net.head(features).items()}
        sizes = [(int(images.shape[-2]), int(images.shape[-1]))] * len(images)
        anchors = self.net.anchor_generator(ImageList(x, sizes), features)
        return outputs, anchors, [f.shape[2] * f.shape[3] for f in features]

    def loss(self, images: Tensor, targets: Answers) -> Tensor:
        """Classification, GIoU and centerness in equal parts, as torchvision's reference training sums them."""
        outputs, anchors, cells = self._heads(images)
        height, width = images.shape[-2:]
        scale = constant((width, height, width, height), images.device)
        rows = [
            {"boxes": box_convert(own.boxes, "cxcywh", "xyxy") * scale, "labels": own.labels}
            for own in unpacked(targets)
        ]
        with torch.autocast(images.device.type, enabled=False):
            return torch.stack(list(self.net.compute_loss(rows, outputs, anchors, cells).values())).sum()

    def detect(self, images: Tensor) -> Found:
        """After non-maximum suppression."""
        outputs, anchors, cells = self._heads(images)
        size = (int(images.shape[-2]), int(images.shape[-1]))
        with torch.autocast(images.device.type, enabled=False):
            split = {name: list(value.split(cells, dim=1)) for name, value in outputs.items()}
            levels = [list(own.split(cells)) for own in anchors]
            found = self.net.postprocess_detections(split, levels, [size] * len(images))
        return Found(*([own[name] for own in found] for name in ("boxes", "scores", "labels")))


def fcos_r18(
    classes: int, finest: Literal[4, 8] = 4, channels_last: bool = False, detections: int = DETECTIONS
) -> FCOS:
    """FCOS with a feature pyramid on ResNet-18.

    Batch normalisation is trained, which torchvision's default freezes. Objects of 8 to 30 px belong to the finest
    level with either setting; with a stride of 8 the smallest may lie between all points and are then never learnt,
    with 4 every one of 6 px has some. The threshold on scores is 0.01 in place of 0.2, which would cut off the curve of
    precision and recall.

    Args:
        classes: K.
        finest: Finest stride; the coarsest is 64.
        channels_last: Memory format of the convolutions.
        detections: Most per image.
    """
    import torchvision
    from torchvision.models.detection import FCOS as Net
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    layers = [1, 2, 3, 4] if finest == 4 else [2, 3, 4]
    body = resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        norm_layer=nn.BatchNorm2d,
        trainable_layers=5,
        returned_layers=layers,
    )
    strides = [2 ** (layer + 1) for layer in layers] + [64]
    anchors = AnchorGenerator(tuple((s,) for s in strides), ((1.0,),) * len(strides))
    options: dict[str, Any] = {"score_thresh": 0.01, "nms_thresh": 0.6, "detections_per_img": detections}
    net = Net(body, classes, anchor_generator=anchors, topk_candidates=max(1000, detections), **options)
    words = f"FCOS-R18, strides {strides[0]} to 64"
    return FCOS(net, words, f"torchvision {torchvision.__version__}", channels_last)
