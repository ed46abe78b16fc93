"""The network, from plain values."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from lit_cli.errors import InputError
from lit_detr.models.attention import CORES, Core
from lit_detr.models.backbone import BACKBONES, Backbone
from lit_detr.models.decoder import Decoder
from lit_detr.models.denoising import Denoising
from lit_detr.models.detr import DETR
from lit_detr.models.encoder import HybridEncoder
from lit_detr.models.geometry import BoxCoding
from lit_detr.models.selection import QUERY_BUCKETS, QuerySelection, query_budget

__all__ = ["BACKBONES", "CORES", "DETR", "QUERY_BUCKETS", "BoxCoding", "Core", "build_network", "query_budget"]


def build_network(
    *,
    num_classes: int,
    backbone: str = "resnet18",
    in_channels: int = 3,
    pretrained: bool | str = False,
    strides: Sequence[int] = (8, 16, 32),
    hidden: int = 256,
    heads: int = 8,
    feedforward: int = 1024,
    encoder_layers: int = 1,
    fusion_depth: int = 3,
    decoder_layers: int = 3,
    points: int = 4,
    queries: int = 300,
    quota: tuple[float, float] = (0.05, 0.7),
    prior_sizes: Sequence[float] | None = None,
    prior_probability: float = 0.01,
    box_coding: BoxCoding = "relative",
    noise_queries: int = 200,
    label_noise: float = 0.25,
    box_noise: float = 1.0,
    noise_floor: float = 3.0,
    core: Core = "auto",
    gradient_checkpointing: bool = False,
    channels_last: bool = False,
) -> DETR:
    """A detector from plain values.

    Args:
        num_classes: K.
        backbone: A timm model with feature maps.
        in_channels: Channels of the image.
        pretrained: True downloads the backbone's weights, a path reads them from a file.
        strides: Of the maps, finest first, each twice the one before; a stride of 4 is a light leaf.
        hidden: Channels of encoder and decoder.
        heads: Of all attentions.
        feedforward: Inner width of their two linear layers.
        encoder_layers: Self-attention layers at the coarsest map.
        fusion_depth: 3x3 convolutions in each fusion block.
        decoder_layers: Number of decoder layers.
        points: Points that a head reads per level.
        queries: Number of queries where the call names none.
        quota: Least and most share of the queries that any level gets.
        prior_sizes: Side in pixels of the boxes that the levels' cells begin with; four strides each by default. The
            data know better.
        prior_probability: What every class begins with.
        box_coding: How heads move boxes.
        noise_queries: Denoising queries of every image; 0 for none.
        label_noise: Share of these with a random class.
        box_noise: Displacement of their sides in half widths and heights.
        noise_floor: The same in pixels, never less.
        core: How points are read: `auto` (kernels of our own on a GPU with Triton, elsewhere `grid_sample`),
            `grid_sample`, `bag` (less memory), `gather` (for export).
        gradient_checkpointing: Recompute activations in the backward pass.
        channels_last: For the convolutions.

    Raises:
        InputError: a value that does not fit.

    Example:
        >>> import torch
        >>> net = build_network(num_classes=4, backbone="resnet10t", hidden=32, heads=4, feedforward=64).eval()
        >>> out = net(torch.zeros(1, 3, 64, 96), queries=20)
        >>> out.logits.shape, out.boxes.shape
        (torch.Size([3, 1, 20, 4]), torch.Size([3, 1, 20, 4]))
    """
    strides = tuple(strides)
    if len(strides) < 2 or strides[0] not in (4, 8, 16) or any(b != 2 * a for a, b in pairwise(strides)):
        raise InputError(f"model.strides: expected two or more, doubling from 4, 8 or 16, got {list(strides)}")
    fine = strides[0] == 4
    if fine and len(strides) < 3:
        raise InputError(f"model.strides: expected two or more beside the stride of 4, got {list(strides)}")
    if hidden % (4 * heads) or hidden % 8:
        raise InputError(f"model.hidden: expected a multiple of 8 and of 4 x {heads} heads, got {hidden}")
    if noise_queries < 0 or noise_queries % 2:
        raise InputError(f"model.noise_queries: expected an even number, got {noise_queries}")
    if num_classes < 1 or queries < 1 or decoder_layers < 1 or points < 1:
        raise InputError("model: expected num_classes, queries, decoder_layers and points of 1 or more")
    low, high = quota
    if not 0 <= low <= 1 / len(strides) or not low <= high <= 1:
        raise InputError(f"model.quota: expected 0 <= least <= 1/{len(strides)} and least <= most <= 1, got {quota}")
    sizes = [4.0 * s for s in strides] if prior_sizes is None else list(prior_sizes)
    if len(sizes) != len(strides) or min(sizes) <= 0:
        raise InputError(f"model.prior_sizes: expected {len(strides)} sizes in pixels, got {sizes}")
    if core not in CORES:
        raise InputError(f"model.core: expected one of {', '.join(CORES)}, got {core!r}")
    body = Backbone(
        backbone,
        in_channels=in_channels,
        strides=strides,
        pretrained=pretrained,
        checkpointing=gradient_checkpointing,
    )
    return DETR(
        backbone=body,
        encoder=HybridEncoder(
            body.channels,
            hidden,
            fine=fine,
            heads=heads,
            feedforward=feedforward,
            layers=encoder_layers,
            depth=fusion_depth,
            checkpointing=gradient_checkpointing,
        ),
        selection=QuerySelection(hidden, num_classes, quota=(low, high), prior=prior_probability, coding=box_coding),
        denoising=Denoising(
            hidden, num_classes, queries=noise_queries, label_noise=label_noise, box_noise=box_noise, floor=noise_floor
        ),
        decoder=Decoder(
            hidden,
            num_classes,
            layers=decoder_layers,
            heads=heads,
            feedforward=feedforward,
            levels=len(strides),
            points=points,
            prior=prior_probability,
            coding=box_coding,
            core=core,
            checkpointing=gradient_checkpointing,
        ),
        strides=strides,
        prior_sizes=sizes,
        queries=queries,
        channels_last=channels_last,
    )
