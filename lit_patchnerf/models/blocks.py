"""What both decoders are made of: convolutions that know where a patch lies, up-sampling stages, heads.

A map is decoded in one of two ways. As a whole, a convolution pads with zeros. As a patch of something larger, the map
comes with a halo and a `Window` that says where it lies: positions beyond the frame are set to zero before each
convolution, which then takes no padding and uses up some of the halo. The numbers are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "Activation",
    "Block",
    "ClipHead",
    "Conv",
    "ConvNeXtBlock",
    "Decoded",
    "FiLM",
    "Pool",
    "ResidualBlock",
    "RgbHead",
    "UpStage",
    "Window",
    "activate",
    "channel_widths",
    "clip_head",
    "nth",
    "pixel_shuffle",
    "trim",
    "without_autocast",
]

Activation = Literal["gelu", "sin"]
Block = Literal["convnext", "residual"]
Pool = Literal["mean", "attention"]
Pair = tuple[int, int]
Entry = TypeVar("Entry")


class Decoded(NamedTuple):
    """What a decoder gives: colours (N, 3, h, w) from 0 to 1 and unit embeddings, or None without that head."""

    rgb: Tensor
    clip: Tensor | None


def nth(values: Sequence[Entry], index: int) -> Entry:
    """An entry of a list whose last one repeats.

    >>> [nth((1, 3, 5), i) for i in range(5)]
    [1, 3, 5, 5, 5]
    """
    return values[min(index, len(values) - 1)]


def channel_widths(first: int, reductions: Sequence[float], *, multiple: int, floor: int, stages: int) -> list[int]:
    """Channels before the first stage and after each: divided by a reduction, rounded to a multiple, at least `floor`.

    >>> channel_widths(256, (1.4, 1.2), multiple=8, floor=32, stages=4)
    [256, 184, 152, 128, 104]
    >>> channel_widths(68, (1.2,), multiple=1, floor=12, stages=5)
    [68, 57, 48, 40, 33, 28]
    """
    widths = [first]
    for stage in range(stages):
        reduction = reductions[min(stage, len(reductions) - 1)]
        widths.append(max(floor, round(widths[-1] / reduction / multiple) * multiple))
    return widths


def trim(x: Tensor, rows: int, columns: int) -> Tensor:
    """Cut so many rows and columns off each side of a (N, C, H, W) map.

    >>> trim(torch.zeros(1, 1, 6, 6), 1, 2).shape
    torch.Size([1, 1, 4, 2])
    """
    return x[:, :, rows : x.shape[2] - rows, columns : x.shape[3] - columns]


def pixel_shuffle(x: Tensor, rows: int, columns: int) -> Tensor:
    """(N, C * rows * columns, H, W) to (N, C, H * rows, W * columns), keeping the memory format.

    With `rows == columns` it is torch's PixelShuffle, which on a GPU gives a contiguous map back whatever it gets.

    >>> pixel_shuffle(torch.arange(6.0).view(1, 6, 1, 1), 2, 3)
    tensor([[[[0., 1., 2.],
              [3., 4., 5.]]]])
    """
    n, _, height, width = x.shape
    if x.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1).reshape(n, height, width, -1, rows, columns).permute(0, 1, 4, 2, 5, 3)
        return x.reshape(n, height * rows, width * columns, -1).permute(0, 3, 1, 2)
    x = x.reshape(n, -1, rows, columns, height, width).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(n, -1, height * rows, width * columns)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """An island in the precision of its own tensors; nothing on the meta device, which has no autocast."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class Window(NamedTuple):
    """Where the maps of a batch of patches lie in their frames.

    Example:
        >>> window = Window(top=torch.tensor([-1]), left=torch.tensor([0]), height=4, width=2)
        >>> window.mask(torch.ones(1, 1, 2, 3))
        tensor([[[[0., 0., 0.],
                  [1., 1., 0.]]]])
    """

    top: Tensor
    """(N,) the frame's row that is the map's first, negative where the halo leaves the frame"""
    left: Tensor
    """(N,) the same of the columns"""
    height: int
    """of the frame, at the resolution of the map"""
    width: int
    """of the frame, at the resolution of the map"""

    def mask(self, x: Tensor) -> Tensor:
        """The map with zeros beyond the frame."""
        rows = self.top[:, None] + torch.arange(x.shape[2], device=x.device)
        columns = self.left[:, None] + torch.arange(x.shape[3], device=x.device)
        rows_inside = (rows >= 0) & (rows < self.height)
        columns_inside = (columns >= 0) & (columns < self.width)
        return x * (rows_inside[:, None, :, None] & columns_inside[:, None, None, :])

    def trimmed(self, rows: int, columns: int) -> Window:
        """The window of a map after `trim`."""
        return Window(self.top + rows, self.left + columns, self.height, self.width)

    def enlarged(self, rows: int, columns: int) -> Window:
        """The window of a map after `pixel_shuffle`."""
        return Window(self.top * rows, self.left * columns, self.height * rows, self.width * columns)


class Conv(nn.Conv2d):
    """Convolution that keeps the size of a whole map, or takes `margin` off each side of a patch.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        kernel: Odd size.
        groups: As many as channels make it depth-wise.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, *, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, groups=groups)
        self.margin = kernel // 2

    def forward(self, input: Tensor, window: Window | None = None) -> Tensor:
        """(N, C, H, W) to (N, C', H, W), or (N, C', H - 2 margin, W - 2 margin) with a window."""
        if window is None:
            return super().forward(input)
        if self.margin:
            input = window.mask(input)
        return F.conv2d(input, self.weight, self.bias, groups=self.groups)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """GELU or sine."""
    return x.sin() if activation == "sin" else F.gelu(x)


class ConvNeXtBlock(nn.Module):
    """Depth-wise 7x7 convolution, layer norm, two layers on each position, scaled, added to the input.

    Args:
        channels: In and out.
        scale: What the learned scale of the added part begins with: 1e-6 in the original, more here, because these
            networks train for thousands of steps instead of hundreds of thousands.

    Source:
        ConvNeXt (arXiv 2201.03545).
    """

    def __init__(self, channels: int, scale: float = 0.1) -> None:
        super().__init__()
        self.depthwise = Conv(channels, channels, 7, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.widen = nn.Linear(channels, 4 * channels)
        self.narrow = nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), scale))
        self.margin = self.depthwise.margin

    def forward(self, x: Tensor, window: Window | None = None) -> Tensor:
        """(N, C, H, W) to the same, less `margin` with a window."""
        y = self.depthwise(x, window).permute(0, 2, 3, 1)
        y = self.narrow(F.gelu(self.widen(self.norm(y))))
        y = y * self.scale.to(y.dtype)  # an fp32 factor would make the map behind it fp32 under autocast
        kept = x if window is None else trim(x, self.margin, self.margin)
        return kept + y.permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions added to the input; the second begins with zeros, so that the block begins with nothing.

    Args:
        channels: In and out.
        activation: Between the two.
    """

    def __init__(self, channels: int, activation: Activation = "gelu") -> None:
        super().__init__()
        self.conv1 = Conv(channels, channels, 3)
        self.conv2 = Conv(channels, channels, 3)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]
        self.activation: Activation = activation
        self.margin = 2

    def forward(self, x: Tensor, window: Window | None = None) -> Tensor:
        """(N, C, H, W) to the same, less `margin` with a window."""
        y = activate(self.conv1(x, window), self.activation)
        if window is None:
            return x + self.conv2(y)
        return trim(x, self.margin, self.margin) + self.conv2(y, window.trimmed(1, 1))


class FiLM(nn.Module):
    """A scale and a shift per channel from a vector of the sample, none at the start.

    Source:
        FiLM (arXiv 1709.07871).
    """

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, 2 * channels)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        """(N, C, H, W) and (N, size) to (N, C, H, W)."""
        scale, shift = self.linear(vector)[:, :, None, None].chunk(2, dim=1)
        return x * (1 + scale) + shift


class UpStage(nn.Module):
    """Convolution, pixel shuffle, FiLM if there is a vector for it, activation, blocks.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        kernel: Of the convolution, odd.
        stride: How much higher and wider the map becomes.
        blocks: Blocks behind it.
        block: Their kind.
        activation: After the shuffle, and inside residual blocks.
        vector: Length of the vector for FiLM, 0 for none.

    Attributes:
        margin: What the convolution takes off the halo.
        block_margin: What the blocks take off it.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: int,
        stride: Pair,
        blocks: int = 0,
        block: Block = "convnext",
        activation: Activation = "gelu",
        vector: int = 0,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.activation: Activation = activation
        self.conv = Conv(inputs, outputs * stride[0] * stride[1], kernel)
        self.film = FiLM(vector, outputs) if vector else None
        self.blocks = nn.ModuleList(
            ConvNeXtBlock(outputs) if block == "convnext" else ResidualBlock(outputs, activation) for _ in range(blocks)
        )
        self.margin = kernel // 2
        self.block_margin = blocks * (3 if block == "convnext" else 2)

    def halo(self, wanted: Pair) -> Pair:
        """The halo that the input needs for a wanted one of the output, rows and columns."""
        rows, columns = (
            math.ceil((w + self.block_margin) / s) + self.margin for w, s in zip(wanted, self.stride, strict=True)
        )
        return rows, columns

    def forward(
        self,
        x: Tensor,
        vector: Tensor | None = None,
        window: Window | None = None,
        spare: Pair = (0, 0),
        add: Callable[[Tensor, Window | None], Tensor] | None = None,
    ) -> tuple[Tensor, Window | None]:
        """(N, C, H, W) to (N, C', H * rows, W * columns) and its window.

        Args:
            x: The map.
            vector: (N, size) for FiLM.
            window: Where the map lies, None if it is whole.
            spare: Rows and columns to cut off each side after the shuffle, because nothing behind needs them.
            add: From the map behind the shuffle and its window to what is added to it.
        """
        x = pixel_shuffle(self.conv(x, window), *self.stride)
        if window is not None:
            window = window.trimmed(self.margin, self.margin).enlarged(*self.stride).trimmed(*spare)
            x = trim(x, *spare)
        if add is not None:
            x = x + add(x, window)
        if self.film is not None and vector is not None:
            x = self.film(x, vector)
        x = activate(x, self.activation)
        for block in self.blocks:
            x = block(x, window)
            if window is not None:
                window = window.trimmed(block.margin, block.margin)  # type: ignore[arg-type]
        return x, window


class RgbHead(nn.Module):
    """3x3 convolution and 0.5 tanh + 0.5.

    Behind the convolution all is at least fp32: bfloat16 has steps of 1/256 just below 1, where tanh gives colours, but
    before tanh its steps are a noise below 60 dB. So the convolution itself may be one of bfloat16; in fp32 it took a
    quarter of a training step.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, 3, 3)

    def forward(self, x: Tensor, window: Window | None = None) -> Tensor:
        """(N, C, H, W) to colours (N, 3, H, W), or two rows and columns fewer with a window."""
        colours = self.conv(x, window)
        return 0.5 * colours.to(torch.promote_types(colours.dtype, torch.float32)).tanh() + 0.5


class ClipHead(nn.Module):
    """Pooled features to a unit embedding, in the weights' fp32.

    Args:
        channels: Of the features.
        size: Of the embedding.
        pool: The mean, or weights from one learned query, which begin equal and so with the mean.
        stop_gradient: The features learn nothing from this head.
    """

    def __init__(self, channels: int, size: int, *, pool: Pool = "mean", stop_gradient: bool = False) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(channels)) if pool == "attention" else None
        self.hidden = nn.Linear(channels, size)
        self.output = nn.Linear(size, size)
        self.stop_gradient = stop_gradient

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, size) of length one."""
        with without_autocast(x):
            x = (x.detach() if self.stop_gradient else x).to(self.output.weight.dtype).flatten(2)
            if self.query is None:
                pooled = x.mean(dim=2)
            else:
                weights = (self.query @ x / x.shape[1] ** 0.5).softmax(dim=1)
                pooled = (x * weights[:, None]).sum(dim=2)
            return F.normalize(self.output(F.gelu(self.hidden(pooled))), dim=1)


def clip_head(channels: int, size: int | None, *, pool: Pool, stop_gradient: bool) -> ClipHead | None:
    """A `ClipHead`; None without a size."""
    return None if size is None else ClipHead(channels, size, pool=pool, stop_gradient=stop_gradient)
