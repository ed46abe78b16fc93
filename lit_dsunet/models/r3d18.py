"""A U-Net over a three-dimensional ResNet-18, as the original guide trained it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_dsunet.models import channels_last as cl
from lit_dsunet.models.heads import Heads
from lit_dsunet.models.unet import SkipModule

__all__ = ["R3D18UNet"]

DECODER = (256, 128, 64, 64)


class _Basic(nn.Module):
    """Two 3x3x3 convolutions and a projected skip (ResNet's basic block)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm3d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv3d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm3d(outputs),
        )
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.skip = nn.Sequential(nn.Conv3d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm3d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x), inplace=True)


def _double(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [
            nn.Conv3d(width, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm3d(outputs),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class R3D18UNet(nn.Module):
    """ResNet3D-18 encoder and a U-Net decoder whose finest logits lie at half the resolution.

    The finest logits are interpolated to the image's size; the auxiliary ones stay at strides 4, 8 and 16.

    Args:
        in_channels: Channels of the image.
        num_classes: Channels of the logits.
        deep_supervision: Auxiliary heads, 0 to 3.
        skip_module: Makes a module for a skip of so many channels.

    Attributes:
        stride: Per axis, what a patch size must be a multiple of.
        head_strides: Stride of each head's logits, finest first; the finest is interpolated to 1.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        deep_supervision: int = 0,
        skip_module: SkipModule | None = None,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(in_channels, 64, 7, 2, 3, bias=False), nn.BatchNorm3d(64), nn.ReLU(inplace=True)
        )
        self.pool = nn.MaxPool3d(3, 2, 1)
        widths = (64, 128, 256, 512)
        self.layers = nn.ModuleList(
            nn.Sequential(_Basic(inputs, outputs, stride), _Basic(outputs, outputs, 1))
            for inputs, outputs, stride in zip((64, *widths), widths, (1, 2, 2, 2), strict=False)
        )
        skips = (256, 128, 64, 64)
        self.ups = nn.ModuleList(
            nn.ConvTranspose3d(below, width, 2, 2) for below, width in zip((512, *DECODER), DECODER, strict=False)
        )
        self.decoder = nn.ModuleList(_double(width + skip, width) for width, skip in zip(DECODER, skips, strict=True))
        self.heads = Heads(DECODER, num_classes, 3, deep_supervision)
        # Last, so that networks with and without them begin with the same weights for the same seed.
        self.skips = nn.ModuleList(skip_module(c) if skip_module else nn.Identity() for c in skips)
        self.channels_last = False
        self.stride = (32, 32, 32)
        self.head_strides = [(1, 1, 1), (4, 4, 4), (8, 8, 8), (16, 16, 16)]

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits, as of `UNet.forward`."""
        size = x.shape[2:]
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last_3d)
        x = self.stem(x)
        features = [x]
        x = self.pool(x)
        for layer in self.layers:
            x = layer(x)
            features.append(x)
        maps = []
        for i, (skip, up, stage) in enumerate(zip(self.skips, self.ups, self.decoder, strict=True), start=2):
            x = cl.join(x, up, skip(features[-i]), channels_last=self.channels_last)
            x = stage(x)
            maps.append(x)
        out = self.heads(maps)
        if isinstance(out, list):
            return [F.interpolate(out[0], size=size, mode="trilinear"), *out[1:]]
        return F.interpolate(out, size=size, mode="trilinear")
