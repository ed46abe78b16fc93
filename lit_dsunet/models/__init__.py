"""The networks, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from lit_dsunet.models.channels_last import lay_out
from lit_dsunet.models.mkdc import MKDC, MKDCNorm
from lit_dsunet.models.r3d18 import R3D18UNet
from lit_dsunet.models.unet import Size, UNet

__all__ = ["MKDC", "Arch", "R3D18UNet", "UNet", "build_network", "default_features"]

Arch = Literal["unet", "resenc", "r3d18_unet", "smp"]
MKDCPlace = Literal["off", "skips", "decoder"]

RESIDUAL_BLOCKS = (1, 3, 4, 6, 6, 6)


def default_features(stages: int, dims: int = 3) -> list[int]:
    """Channels per stage: doubled from 32, at most 320 in 3-D and 512 in 2-D.

    >>> default_features(6)
    [32, 64, 128, 256, 320, 320]
    """
    return [min(32 * 2**i, 320 if dims == 3 else 512) for i in range(stages)]


def build_network(
    *,
    in_channels: int,
    num_classes: int,
    arch: Arch = "unet",
    dims: Literal[2, 3] = 3,
    strides: Sequence[Size] = (1, 2, 2, 2, 2, 2),
    kernels: Sequence[Size] | None = None,
    features: Sequence[int] | None = None,
    encoder_blocks: Sequence[int] | None = None,
    decoder_blocks: Sequence[int] | None = None,
    mkdc: MKDCPlace = "off",
    mkdc_kernels: Sequence[int] = (1, 3, 5),
    mkdc_norm: MKDCNorm = "batch",
    mkdc_residual: bool = False,
    mkdc_fused: bool = False,
    deep_supervision: int = 0,
    encoder: str = "resnet34",
    decoder: str = "Unet",
    pretrained: bool | str = False,
    gradient_checkpointing: bool = False,
    channels_last: bool = False,
) -> nn.Module:
    """A network from plain values; see the classes for what each means.

    Raises:
        ValueError: the values do not fit together.
    """

    def block(channels: int) -> nn.Module:
        return MKDC(channels, mkdc_kernels, dims=dims, norm=mkdc_norm, residual=mkdc_residual, fused=mkdc_fused)

    on_skips = block if mkdc == "skips" else None

    def laid_out(network: nn.Module) -> nn.Module:
        return lay_out(network, dims) if channels_last else network

    if arch == "smp":
        from lit_dsunet.models.smp2d import SliceNet  # its import costs seconds

        if dims != 2 or mkdc != "off":
            raise ValueError(f"model.arch smp: expected dims 2 and mkdc off, got dims {dims} and mkdc {mkdc}")
        return laid_out(
            SliceNet(
                in_channels=in_channels,
                num_classes=num_classes,
                encoder=encoder,
                decoder=decoder,
                pretrained=pretrained,
                deep_supervision=deep_supervision,
            )
        )
    if pretrained:
        raise ValueError(f"model.pretrained: only arch smp has pretrained encoders, got arch {arch}")
    if arch == "r3d18_unet":
        if dims != 3 or mkdc == "decoder" or gradient_checkpointing:
            raise ValueError("model.arch r3d18_unet: expected dims 3, mkdc off or skips, no gradient_checkpointing")
        return laid_out(
            R3D18UNet(
                in_channels=in_channels,
                num_classes=num_classes,
                deep_supervision=deep_supervision,
                skip_module=on_skips,
            )
        )
    stages = len(strides)
    residual = arch == "resenc"
    blocks = RESIDUAL_BLOCKS[:stages] + (6,) * (stages - len(RESIDUAL_BLOCKS)) if residual else (2,) * stages
    unet = UNet(
        in_channels=in_channels,
        num_classes=num_classes,
        features=features if features is not None else default_features(stages, dims),
        strides=strides,
        kernels=kernels,
        encoder_blocks=encoder_blocks if encoder_blocks is not None else blocks,
        decoder_blocks=decoder_blocks if decoder_blocks is not None else 1 if residual else 2,
        residual=residual,
        dims=dims,
        deep_supervision=deep_supervision,
        skip_module=on_skips,
        decoder_module=block if mkdc == "decoder" else None,
        checkpointing=gradient_checkpointing,
    )
    return laid_out(unet)
