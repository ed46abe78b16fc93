"""The detector: backbone, encoder, query selection, decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_cli.errors import InputError
from lit_detr.models.attention import CORES, Core
from lit_detr.models.backbone import Backbone
from lit_detr.models.blocks import autocasts
from lit_detr.models.decoder import Decoder, DecoderLayer
from lit_detr.models.denoising import Denoising, Noise, attention_bias
from lit_detr.models.encoder import HybridEncoder
from lit_detr.models.geometry import Shapes, anchors, level_masks
from lit_detr.models.selection import QuerySelection
from lit_detr.samples import Output, Targets

__all__ = ["DETR"]

NOTHING = -20.0  # logit of a query that stands for nothing


class DETR(nn.Module):
    """Boxes and classes of the objects in an image, without non-maximum suppression.

    All boxes are shares of the padded image. With a mask, padded cells are never proposed, read as zero and attended to
    by nobody; codes of positions count cells from the upper left corner or are shares of the valid part, and anchors
    are in pixels. So everything behind the backbone gives the same boxes, in pixels, for an image and for that image
    padded on the right and below, if boxes are coded `relative` and there are cells enough for all queries. The
    backbone knows nothing of masks: there, cells within reach of the padding change.

    Args:
        backbone: Gives the maps.
        encoder: Fuses them.
        selection: Chooses the queries.
        denoising: Makes queries with known answers in training.
        decoder: Refines the queries.
        strides: Of the maps, finest first.
        prior_sizes: Side in pixels of the box that a cell begins with, per level.
        queries: Number of queries when the call names none.
        channels_last: Lay the maps out with channels last.

    Attributes:
        stride: What the sides of an image must be multiples of.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        encoder: HybridEncoder,
        selection: QuerySelection,
        denoising: Denoising,
        decoder: Decoder,
        strides: Sequence[int],
        prior_sizes: Sequence[float],
        queries: int = 300,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.backbone, self.encoder, self.selection = backbone, encoder, selection
        self.denoising, self.decoder = denoising, decoder
        self.strides, self.prior_sizes = tuple(strides), tuple(float(s) for s in prior_sizes)
        self.stride = self.strides[-1]
        self.queries = queries
        self.channels_last = channels_last
        if channels_last:
            self.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.register_load_state_dict_pre_hook(_without_fine_level)

    def set_core(self, core: Core) -> None:
        """Choose how the decoder reads points: see `lit_detr.models.attention.CORES`."""
        if core not in CORES:
            raise InputError(f"model.core: expected one of {', '.join(CORES)}, got {core!r}")
        self.decoder.core = core

    def forward(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        targets: Targets | None = None,
        queries: int | None = None,
    ) -> Output:
        """Detect.

        Args:
            images: (B, C, H, W) float; H and W multiples of `stride`.
            mask: (B, H, W) bool, true where the image is; each image has a valid pixel. None: everywhere.
            targets: In training, what the denoising queries are made of; not read in evaluation.
            queries: How many; at most one per cell.

        Returns:
            Logits and boxes of every layer, and of the denoising queries in training with targets.

        Raises:
            ValueError: the size is not a multiple of `stride`.
        """
        height, width = images.shape[-2:]
        if height % self.stride or width % self.stride:
            raise ValueError(f"images: expected sides that are multiples of {self.stride}, got {height} x {width}")
        shapes: Shapes = tuple((height // s, width // s) for s in self.strides)
        masks = None if mask is None else level_masks(mask, shapes)
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        levels = self.encoder(self.backbone(images), masks)
        noise = None
        if self.training and targets is not None and self.denoising.queries:
            noise = self.denoising(targets.boxes, targets.labels, targets.lengths, (height, width))
        return self._detect(levels, shapes, mask, masks, noise, queries or self.queries)

    def _detect(
        self,
        levels: Sequence[Tensor],
        shapes: Shapes,
        mask: Tensor | None,
        masks: Sequence[Tensor] | None,
        noise: Noise | None,
        queries: int,
    ) -> Output:
        """From the encoder's maps to the output."""
        canvas = (shapes[0][0] * self.strides[0], shapes[0][1] * self.strides[0])
        memory = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
        valid = None if masks is None else torch.cat([m.flatten(1) for m in masks], dim=1)
        priors = anchors(shapes, self.prior_sizes, canvas, memory.device)
        chosen = self.selection(memory, priors, shapes, queries, valid)

        x, reference = chosen.content, chosen.boxes.detach()
        queries = x.shape[1]
        if noise is not None:
            x = torch.cat([x, noise.content.to(x.dtype)], dim=1)
            reference = torch.cat([reference, noise.boxes], dim=1)
        none = None if valid is None else chosen.none
        bias = attention_bias(None if noise is None else noise.group, none, queries, _compute_dtype(x))
        logits, boxes = self.decoder(
            x, reference, memory, shapes, bias=bias, valid=valid, stretch=None if mask is None else _stretch(mask)
        )
        noise_logits = noise_boxes = None
        if noise is not None:
            sizes = [queries, noise.boxes.shape[1]]
            logits, noise_logits = logits.split(sizes, dim=2)
            boxes, noise_boxes = boxes.split(sizes, dim=2)
        encoder_logits = chosen.logits
        if none is not None:
            logits = logits.masked_fill(none[None, ..., None], NOTHING)
            encoder_logits = encoder_logits.masked_fill(none[..., None], NOTHING)
        return Output(
            logits=logits,
            boxes=boxes,
            encoder_logits=encoder_logits,
            encoder_boxes=chosen.boxes,
            noise_logits=noise_logits,
            noise_boxes=noise_boxes,
            noise_target=None if noise is None else noise.target,
            noise_positive=None if noise is None else noise.positive,
        )


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What attention computes in."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def _stretch(mask: Tensor) -> Tensor:
    """(B, 1, 4) float32: the padded image's width and height in widths and heights of its valid part."""
    sides = [mask.any(1).sum(1), mask.any(2).sum(1)]  # valid columns, valid rows
    ratio = [n / side.clamp(min=1) for n, side in zip((mask.shape[2], mask.shape[1]), sides, strict=True)]
    return torch.stack(ratio * 2, dim=-1)[:, None]


def _without_fine_level(module: nn.Module, state: dict[str, Any], prefix: str, *args: object) -> None:
    """Leave out what a checkpoint with a stride-4 level has beyond a network without one."""
    assert isinstance(module, DETR)
    fine = [name for name in state if name.startswith(f"{prefix}encoder.fine.")]
    if module.encoder.fine is not None or not fine:
        return
    for name in fine:
        del state[name]
    layers: Mapping[str, nn.Module] = dict(module.decoder.layers.named_children())
    for i, layer in layers.items():
        assert isinstance(layer, DecoderLayer)
        for kind in ("weight", "bias"):
            name = f"{prefix}decoder.layers.{i}.cross.sampling.{kind}"
            if name in state:
                state[name] = layer.cross.coarser_only(state[name])
