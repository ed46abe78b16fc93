"""The U-Net family: plain and residual-encoder, two- and three-dimensional, with anisotropic strides."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from lit_dsunet.models import channels_last as cl
from lit_dsunet.models.heads import Heads

__all__ = ["ConvNormAct", "ResidualBlock", "UNet", "per_axis"]

Size = int | Sequence[int]
SkipModule = Callable[[int], nn.Module]
SLOPE = 0.01  # of the leaky ReLU


def per_axis(value: Size, dims: int) -> tuple[int, ...]:
    """One number per axis.

    >>> per_axis(2, 3), per_axis([1, 2, 2], 3)
    ((2, 2, 2), (1, 2, 2))
    """
    sizes = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(sizes) != dims or any(s < 1 for s in sizes):
        raise ValueError(f"expected {dims} positive numbers, got {value}")
    return sizes


class ConvNormAct(nn.Sequential):
    """Convolution, instance normalisation, leaky ReLU.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        kernel: Odd kernel size per axis.
        stride: Per axis.
        activate: False leaves the activation out, as before a residual sum.
        bias: Of the convolution.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        *,
        activate: bool = True,
        bias: bool = True,
    ) -> None:
        three = len(kernel) == 3
        conv = nn.Conv3d if three else nn.Conv2d
        norm = nn.InstanceNorm3d if three else nn.InstanceNorm2d
        layers: list[nn.Module] = [
            conv(inputs, outputs, kernel, stride, [k // 2 for k in kernel], bias=bias),  # type: ignore[arg-type]
            norm(outputs, eps=1e-5, affine=True),
        ]
        if activate:
            layers.append(nn.LeakyReLU(SLOPE, inplace=True))
        super().__init__(*layers)
        self.channels_last = False

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, ...) to (B, C', ...) at the stride."""
        if not self.channels_last or not cl.usable(input):
            return super().forward(input)
        conv, norm = self[0], self[1]
        assert isinstance(norm, (nn.InstanceNorm2d, nn.InstanceNorm3d))
        # The bias has no effect before this normalisation: it costs three passes over the map and gets no gradient.
        return cl.instance_norm_act(
            cl.conv(input, conv),
            norm.weight,
            norm.bias,
            eps=norm.eps,
            slope=SLOPE if len(self) > 2 else 1.0,
            removed=conv.bias,  # type: ignore[arg-type]
        )


class ResidualBlock(nn.Module):
    """Two convolutions beside a skip that pools, then projects (ResNet-D)."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, ...], stride: tuple[int, ...]) -> None:
        super().__init__()
        one = (1,) * len(kernel)
        self.conv1 = ConvNormAct(inputs, outputs, kernel, stride)
        self.conv2 = ConvNormAct(outputs, outputs, kernel, one, activate=False)
        skip: list[nn.Module] = []
        if max(stride) > 1:
            skip.append((nn.AvgPool3d if len(kernel) == 3 else nn.AvgPool2d)(stride, stride))  # type: ignore[arg-type]
        if inputs != outputs:
            skip.append(ConvNormAct(inputs, outputs, one, one, activate=False, bias=False))
        self.skip = nn.Sequential(*skip)
        self.act = nn.LeakyReLU(SLOPE, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) to (B, C', ...) at the stride."""
        return self.act(self.conv2(self.conv1(x)) + self.skip(x))


class UNet(nn.Module):
    """Encoder and decoder of convolutions with a logit head on every decoder stage.

    Args:
        in_channels: Channels of the image.
        num_classes: Channels of the logits.
        features: Channels per encoder stage, finest first.
        strides: Stride of each stage, per axis or one number; the first is 1 as a rule.
        kernels: Kernel size of each stage, per axis or one number.
        encoder_blocks: Convolutions (or residual blocks) per encoder stage.
        decoder_blocks: Convolutions per decoder stage, coarsest first.
        residual: Residual encoder with a stem.
        dims: 2 or 3.
        deep_supervision: Auxiliary heads that give logits in training, next to the finest one; 0 for none. The heads
            of all stages exist anyway, so that a checkpoint loads whatever this is.
        skip_module: Makes a module for a skip of so many channels, such as MKDC.
        decoder_module: The same after each decoder stage.
        checkpointing: Recompute the stages' activations in the backward pass.

    Attributes:
        stride: Product of the strides per axis: what a patch size must be a multiple of.
        head_strides: Stride per axis of each head's logits, finest first.

    Raises:
        ValueError: the lists do not fit together.

    Source:
        nnU-Net's PlainConvUNet and ResidualEncoderUNet (arXiv 1904.08128, 2404.09556): equal parameters and operations
        at equal settings.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        features: Sequence[int] = (32, 64, 128, 256, 320, 320),
        strides: Sequence[Size] = (1, 2, 2, 2, 2, 2),
        kernels: Sequence[Size] | None = None,
        encoder_blocks: Sequence[int] | int = 2,
        decoder_blocks: Sequence[int] | int = 2,
        residual: bool = False,
        dims: Literal[2, 3] = 3,
        deep_supervision: int = 0,
        skip_module: SkipModule | None = None,
        decoder_module: SkipModule | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        n = len(features)
        steps = [per_axis(s, dims) for s in strides]
        sizes = [per_axis(k, dims) for k in (kernels if kernels is not None else [3] * n)]
        encoding = [encoder_blocks] * n if isinstance(encoder_blocks, int) else list(encoder_blocks)
        decoding = [decoder_blocks] * (n - 1) if isinstance(decoder_blocks, int) else list(decoder_blocks)
        if n < 2 or not n == len(steps) == len(sizes) == len(encoding) == len(decoding) + 1:
            raise ValueError(
                f"model: {n} features need as many strides ({len(steps)}), kernels ({len(sizes)}) and encoder_blocks "
                f"({len(encoding)}), and one decoder_blocks less ({len(decoding)})"
            )
        self.checkpointing = checkpointing
        self.stride = tuple(math.prod(axis) for axis in zip(*steps, strict=True))

        one = (1,) * dims
        self.stem = ConvNormAct(in_channels, features[0], sizes[0], one) if residual else nn.Identity()
        self.encoder = nn.ModuleList()
        channels = features[0] if residual else in_channels
        for width, kernel, stride, blocks in zip(features, sizes, steps, encoding, strict=True):
            make = ResidualBlock if residual else ConvNormAct
            stage = [
                make(channels if i == 0 else width, width, kernel, stride if i == 0 else one) for i in range(blocks)
            ]
            self.encoder.append(nn.Sequential(*stage))
            channels = width

        up = nn.ConvTranspose3d if dims == 3 else nn.ConvTranspose2d
        self.ups, self.decoder = nn.ModuleList(), nn.ModuleList()
        for i, blocks in enumerate(decoding):
            level = n - 2 - i
            below, width = features[level + 1], features[level]
            self.ups.append(up(below, width, steps[level + 1], steps[level + 1]))  # type: ignore[arg-type]
            stage = [ConvNormAct(2 * width if j == 0 else width, width, sizes[level], one) for j in range(blocks)]
            self.decoder.append(nn.Sequential(*stage))
        widths = [features[n - 2 - i] for i in range(n - 1)]
        self.heads = Heads(widths, num_classes, dims, deep_supervision)
        # Last, so that networks with and without them begin with the same weights for the same seed.
        self.skips = nn.ModuleList(skip_module(w) if skip_module else nn.Identity() for w in widths)
        self.after = nn.ModuleList(decoder_module(w) if decoder_module else nn.Identity() for w in widths)
        self.channels_last = False
        self.head_strides = [tuple(math.prod(axis) for axis in zip(*steps[: i + 1], strict=True)) for i in range(n - 1)]

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits of an image (B, C, ...), each side a multiple of `stride`.

        Returns:
            In evaluation (B, K, ...) at the image's size; in training with deep supervision a list of logits at
            their own size, finest first.
        """
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last_3d if x.ndim == 5 else torch.channels_last)
        x = self.stem(x)
        features = []
        for stage in self.encoder:
            x = self._run(stage, x)
            features.append(x)
        maps: list[Tensor] = []
        for i, (skip, up, stage, after) in enumerate(
            zip(self.skips, self.ups, self.decoder, self.after, strict=True), start=2
        ):
            x = cl.join(x, up, skip(features[-i]), channels_last=self.channels_last)
            x = after(self._run(stage, x))
            maps.append(x)
        return self.heads(maps)

    def _run(self, stage: nn.Module, x: Tensor) -> Tensor:
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(stage, x, use_reentrant=False)  # type: ignore[no-any-return]
        return stage(x)
