"""The decoder of learned latents: fully convolutional, so that a patch is the crop of its frame."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import combinations_with_replacement
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_cli.errors import InputError
from lit_patchnerf.models.atlas import Atlas, CameraPath
from lit_patchnerf.models.blocks import (
    Activation,
    Block,
    Conv,
    Decoded,
    Pool,
    RgbHead,
    UpStage,
    Window,
    activate,
    channel_widths,
    clip_head,
    nth,
    trim,
    without_autocast,
)
from lit_patchnerf.models.coordinate import check_choices, check_clip, check_numbers, check_stages
from lit_patchnerf.models.encoding import PositionalEncoding

__all__ = ["GridConfig", "GridDecoder", "TemporalGrid", "patch_strides"]

Pair = tuple[int, int]
LARGEST_STRIDE = 5
MOST_CELLS = 16  # latent rows or columns of a patch; beyond that the latents outweigh the network
LATENT_STD = 0.1


def patch_strides(patch: Pair, stages: int = 5) -> tuple[Pair, ...]:
    """Strides whose product divides a patch: the largest such product, from strides of at most 5 that are alike.

    Raises:
        InputError: the patch has too few small divisors.

    >>> patch_strides((320, 320))
    ((5, 5), (4, 4), (4, 4), (2, 2), (2, 2))
    >>> patch_strides((360, 320))
    ((5, 5), (4, 4), (3, 4), (3, 2), (2, 2))
    """
    axes = []
    for size in patch:
        ways = combinations_with_replacement(range(LARGEST_STRIDE, 0, -1), stages)
        fitting = [way for way in ways if size % math.prod(way) == 0] if size > 0 else []
        best = max(fitting, key=lambda way: (math.prod(way), -sum(way), way), default=(1,))
        if size < 1 or size > MOST_CELLS * math.prod(best):
            raise InputError(
                f"model.decoder.strides: expected strides for patches of {patch}, "
                f"as {size} is no product of {stages} numbers up to {LARGEST_STRIDE} and one up to {MOST_CELLS}"
            )
        axes.append(best)
    return tuple(zip(*axes, strict=True))


@dataclass(frozen=True)
class GridConfig:
    """What a `GridDecoder` is built from; lists end with an entry that repeats.

    Raises:
        InputError: a value is out of its range, or frame, grid and strides do not fit together.
    """

    width: int = 64
    """channels of the first map"""
    frame: Pair = (640, 1280)
    """rows and columns of a frame"""
    grid: Pair = (2, 4)
    """rows and columns of patches"""
    strides: tuple[Pair, ...] | None = None
    """rows and columns of each stage; None solves for the patches, so that one is a latent cell if it can be"""
    kernels: tuple[int, ...] = (1, 3, 5)
    """odd, of each stage's convolution"""
    reduction: float = 1.2
    """what each stage divides the channels by"""
    multiple: int = 1
    """that channels are rounded to"""
    floor: int = 12
    """least channels of a stage"""
    blocks: tuple[int, ...] = (0,)
    """blocks of each stage"""
    block: Block = "convnext"
    """kind of the blocks"""
    activation: Activation = "gelu"
    """behind the first map and in the stages"""
    latent_frames: tuple[int, ...] = (132, 33)
    """points in time of each resolution of the latents"""
    latent_channels: tuple[int, ...] = (16, 16)
    """numbers per cell of each resolution"""
    atlas_stages: tuple[int, ...] = ()
    """stages whose map, before the activation, an atlas is added to, from 1; empty for no atlas"""
    atlas_channels: tuple[int, ...] = (1,)
    """numbers per place of each atlas"""
    atlas_scales: tuple[float, ...] = (1.0,)
    """places for each position of the map, along rows and along columns, of each atlas"""
    atlas_margin: float = 0.15
    """how much higher and wider than a frame an atlas is"""
    camera_frames: int | None = None
    """points in time of the camera's path over the atlases; 0 for a still camera, None for those of the last latents"""
    base: float = 1.25
    """of the positional encoding of t"""
    levels: int = 16
    """frequencies of t, half the length of FiLM's vector; 0 for no FiLM"""
    clip_dim: int | None = None
    """length of the embeddings, None for no such head"""
    clip_stage: int = 2
    """stage whose features the embedding comes from, from 1"""
    clip_pool: Pool = "mean"
    """how those features are pooled"""
    clip_stop_gradient: bool = False
    """the embedding trains its head alone"""

    def __post_init__(self) -> None:
        for name in ("width", "multiple", "floor"):
            if getattr(self, name) < 1:
                raise InputError(f"model.decoder.{name}: expected at least 1, got {getattr(self, name)}")
        if self.levels < 0:
            raise InputError(f"model.decoder.levels: expected a number from 0, got {self.levels}")
        check_choices(self.block, self.activation, self.clip_pool)
        check_numbers("reduction", (self.reduction,))
        check_stages(self.kernels, self.blocks)
        frames, channels = self.latent_frames, self.latent_channels
        if not frames or len(frames) != len(channels) or min(*frames, *channels) < 1:
            raise InputError(
                "model.decoder.latent_frames: expected positive numbers, as many as latent_channels, "
                f"got {frames} and {channels}"
            )
        if not 0 <= self.atlas_margin <= 1:
            raise InputError(f"model.decoder.atlas_margin: expected a share from 0 to 1, got {self.atlas_margin}")
        if self.camera_frames is not None and (self.camera_frames < 0 or self.camera_frames == 1):
            raise InputError(f"model.decoder.camera_frames: expected 0, or 2 and more, got {self.camera_frames}")
        if not self.atlas_scales or not all(0 < scale <= 1 for scale in self.atlas_scales):
            raise InputError(
                f"model.decoder.atlas_scales: expected numbers above 0 and up to 1, got {self.atlas_scales}"
            )
        if not self.atlas_channels or min(self.atlas_channels) < 1:
            raise InputError(f"model.decoder.atlas_channels: expected positive numbers, got {self.atlas_channels}")
        if min(self.grid) < 1 or any(f < 1 or f % g for f, g in zip(self.frame, self.grid, strict=True)):
            raise InputError(f"data.grid: expected to divide the frame {self.frame}, got {self.grid}")
        product = tuple(math.prod(axis) for axis in zip(*self.all_strides, strict=True))
        if min(product) < 1 or any(p % s for p, s in zip(self.patch, product, strict=True)):
            raise InputError(f"model.decoder.strides: expected to divide the patch {self.patch}, got {product} in all")
        stages = len(self.all_strides)
        if len(set(self.atlas_stages)) < len(self.atlas_stages) or not {*self.atlas_stages} <= {*range(1, stages + 1)}:
            raise InputError(
                f"model.decoder.atlas_stages: expected different stages from 1 to {stages}, got {self.atlas_stages}"
            )
        if self.clip_dim is not None:
            check_clip(self.clip_dim, self.clip_stage, len(self.all_strides))

    @property
    def patch(self) -> Pair:
        """Rows and columns of a patch."""
        return self.frame[0] // self.grid[0], self.frame[1] // self.grid[1]

    @property
    def all_strides(self) -> tuple[Pair, ...]:
        """Strides of the stages, solved for if there are none."""
        return self.strides if self.strides else patch_strides(self.patch)

    @property
    def cells(self) -> Pair:
        """Rows and columns of latent cells of a patch."""
        rows, columns = (
            p // math.prod(axis) for p, axis in zip(self.patch, zip(*self.all_strides, strict=True), strict=True)
        )
        return rows, columns

    @property
    def latent_grid(self) -> Pair:
        """Rows and columns of latent cells of a frame."""
        return self.cells[0] * self.grid[0], self.cells[1] * self.grid[1]

    @property
    def camera_points(self) -> int:
        """Points in time of the camera's path, 0 without one."""
        points = self.latent_frames[-1] if self.camera_frames is None else self.camera_frames
        return points if self.atlas_stages and points > 1 else 0

    def map_size(self, stage: int) -> Pair:
        """Rows and columns of a frame's map behind a stage, from 1."""
        rows, columns = (
            n * math.prod(axis[:stage])
            for n, axis in zip(self.latent_grid, zip(*self.all_strides, strict=True), strict=True)
        )
        return rows, columns

    @property
    def widths(self) -> list[int]:
        """Channels of the first map and after each stage."""
        stages = len(self.all_strides)
        return channel_widths(self.width, (self.reduction,), multiple=self.multiple, floor=self.floor, stages=stages)


class TemporalGrid(nn.Module):
    """Learned maps at evenly spaced points in time, linear in between.

    Args:
        points: In time, the first at t = 0 and the last at t = 1.
        channels: Of the maps.
        size: Rows and columns of the maps.

    Example:
        >>> grid = TemporalGrid(3, 1, (1, 1))
        >>> _ = grid.values.data.copy_(torch.tensor([0.0, 1.0, 5.0]).view(3, 1, 1, 1))
        >>> grid(torch.tensor([0.0, 0.25, 0.75, 1.0])).flatten()
        tensor([0.0000, 0.5000, 3.0000, 5.0000], grad_fn=<ViewBackward0>)
    """

    def __init__(self, points: int, channels: int, size: Pair) -> None:
        super().__init__()
        self.values = nn.Parameter(LATENT_STD * torch.randn(points, channels, *size))

    def forward(self, t: Tensor) -> Tensor:
        """(N,) from 0 to 1 to (N, C, rows, columns), in the latents' fp32.

        As a product with the weights of all points: for grids of this size it costs nothing, and unlike a gather its
        gradient is the same in every run.
        """
        points = len(self.values)
        with without_autocast(t):
            places = t.to(self.values.dtype).clamp(0, 1) * (points - 1)
            weights = (1 - (places[:, None] - torch.arange(points, device=t.device)).abs()).relu()
            return (weights @ self.values.flatten(1)).view(len(t), *self.values.shape[1:])


class GridDecoder(nn.Module):
    """Latents of a moment, a 1x1 convolution, up-sampling stages modulated by t, a head for colours.

    Atlases hold what a camera moves over; where it looks is learned with them.

    Convolutions pad with zeros at the border of the frame and nowhere else: a patch is decoded from its own latents and
    a halo of its neighbours', cut after each stage to what the rest can still see, and equals the crop of the frame.

    Args:
        config: See `GridConfig`.

    Attributes:
        halos: Rows and columns around a patch before each stage, and before the head.

    Source:
        HNeRV's decoder (arXiv 2304.02633) with learned latents in place of its encoder and FiLM by t; with FiLM off and
        one latent per frame it has HNeRV's parameters.

    Example:
        >>> config = GridConfig(width=8, frame=(16, 32), grid=(1, 2), strides=((4, 4), (2, 2)), latent_frames=(5, 2))
        >>> decoder = GridDecoder(config)
        >>> frame = decoder(torch.tensor([0.5])).rgb
        >>> patch = decoder.forward_patch(torch.tensor([0.5]), 0, 1).rgb
        >>> frame.shape, torch.allclose(frame[..., 16:], patch, atol=1e-6)
        (torch.Size([1, 3, 16, 32]), True)
    """

    def __init__(self, config: GridConfig) -> None:
        super().__init__()
        self.config = config
        self.grid, self.cells, self.latent_grid = config.grid, config.cells, config.latent_grid
        self.activation: Activation = config.activation
        widths = config.widths
        self.latents = nn.ModuleList(
            TemporalGrid(points, channels, self.latent_grid)
            for points, channels in zip(config.latent_frames, config.latent_channels, strict=True)
        )
        self.encoding = PositionalEncoding(config.base, config.levels) if config.levels else None
        vector = 2 * config.levels
        self.time = nn.Linear(vector, vector) if vector else None
        self.stem = Conv(sum(config.latent_channels), config.width, 1)
        self.stages = nn.ModuleList(
            UpStage(
                widths[i],
                widths[i + 1],
                kernel=nth(config.kernels, i),
                stride=stride,
                blocks=nth(config.blocks, i),
                block=config.block,
                activation=config.activation,
                vector=vector,
            )
            for i, stride in enumerate(config.all_strides)
        )
        self.atlases = nn.ModuleDict()  # by the number of their stage
        for i, stage in enumerate(config.atlas_stages):
            numbers, scale = nth(config.atlas_channels, i), nth(config.atlas_scales, i)
            atlas = Atlas(numbers, widths[stage], config.map_size(stage), config.atlas_margin, scale)
            self.atlases[str(stage)] = atlas
        self.camera = CameraPath(config.camera_points) if config.camera_points else None
        self.rgb = RgbHead(widths[-1])
        self.clip_stage = config.clip_stage
        width = widths[config.clip_stage]
        self.clip = clip_head(width, config.clip_dim, pool=config.clip_pool, stop_gradient=config.clip_stop_gradient)
        self.halos, self.spares = self._plan()

    def _plan(self) -> tuple[list[Pair], list[Pair]]:
        """The halo before each stage and the head, and what each stage has to spare after its shuffle."""
        halos: list[Pair] = [(1, 1)]  # of the head's 3x3 convolution
        spares: list[Pair] = []
        for stage in reversed(self.stages):
            assert isinstance(stage, UpStage)
            wanted = halos[0]
            before = stage.halo(wanted)
            rows, columns = (
                (b - stage.margin) * s - stage.block_margin - w
                for b, s, w in zip(before, stage.stride, wanted, strict=True)
            )
            spares.insert(0, (rows, columns))
            halos.insert(0, before)
        return halos, spares

    def forward(self, t: Tensor) -> Decoded:
        """(N,) from 0 to 1 to whole frames (N, 3, H, W) and the embeddings of their patches (N, rows, cols, D)."""
        x, moment, clip = self._first(self._latents(t)), self._moment(t), None
        for number in range(1, len(self.stages) + 1):
            x, _ = self._advance(number, x, moment)
            if number == self.clip_stage:
                clip = self._embeddings(x)
        return Decoded(self.rgb(x), clip)

    def embed(self, t: Tensor) -> Tensor | None:
        """The embeddings of `forward` without the stages behind their head; None without one."""
        x, moment = self._first(self._latents(t)), self._moment(t)
        for number in range(1, self.clip_stage + 1):
            x, _ = self._advance(number, x, moment)
        return self._embeddings(x)

    def forward_patch(self, t: Tensor, row: Tensor | int, column: Tensor | int) -> Decoded:
        """Patches alone: colours (N, 3, h, w), equal to the crops of their frames, and embeddings (N, D).

        Args:
            t: (N,) from 0 to 1.
            row: (N,) integers or one for all: the patch's row in the grid.
            column: The same of its column.
        """
        (halo_rows, halo_columns), (cell_rows, cell_columns) = self.halos[0], self.cells
        top = torch.as_tensor(row, device=t.device).expand(len(t)) * cell_rows - halo_rows
        left = torch.as_tensor(column, device=t.device).expand(len(t)) * cell_columns - halo_columns
        rows = top[:, None] + torch.arange(cell_rows + 2 * halo_rows, device=t.device)
        columns = left[:, None] + torch.arange(cell_columns + 2 * halo_columns, device=t.device)
        x, moment, clip = self._first(_select(self._latents(t), rows, columns)), self._moment(t), None
        window: Window | None = Window(top, left, *self.latent_grid)
        for number in range(1, len(self.stages) + 1):
            x, window = self._advance(number, x, moment, window)
            if self.clip is not None and number == self.clip_stage:
                clip = self.clip(trim(x, *self.halos[number]))
        return Decoded(self.rgb(x, window), clip)

    def _latents(self, t: Tensor) -> Tensor:
        return torch.cat([grid(t) for grid in self.latents], dim=1)

    def _first(self, latents: Tensor) -> Tensor:
        return activate(self.stem(latents), self.activation)

    def _moment(self, t: Tensor) -> _Moment:
        vector = None
        if self.encoding is not None and self.time is not None:
            vector = F.gelu(self.time(self.encoding(t[:, None])))
        if not self.atlases:
            return _Moment(vector, None)
        still = torch.zeros_like(t)
        return _Moment(vector, (still, still, still) if self.camera is None else self.camera(t))

    def _advance(
        self, number: int, x: Tensor, moment: _Moment, window: Window | None = None
    ) -> tuple[Tensor, Window | None]:
        """One stage, from 1, of whole maps or of a window."""
        add = partial(self.atlases[str(number)], moment.camera) if str(number) in self.atlases else None
        return self.stages[number - 1](x, moment.vector, window, self.spares[number - 1], add)

    def _embeddings(self, x: Tensor) -> Tensor | None:
        """Whole maps (N, C, H, W) to (N, rows, cols, D)."""
        if self.clip is None:
            return None
        (rows, columns), (height, width) = self.grid, x.shape[2:]
        patches = x.unflatten(3, (columns, width // columns)).unflatten(2, (rows, height // rows))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        return self.clip(patches).unflatten(0, (len(x), rows, columns))


class _Moment(NamedTuple):
    """What the stages have to know of a batch's times."""

    vector: Tensor | None
    camera: tuple[Tensor, Tensor, Tensor] | None


def _select(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Rows (N, h) and columns (N, w) of (N, C, H, W) maps; those that are not there are zero.

    Sums of products with zeros and ones, which are exact: the gradient of an index would sort on every step, and a
    matrix product would round where TF32 is on. The maps have few positions.
    """
    pick_rows = rows[:, :, None] == torch.arange(x.shape[2], device=x.device)
    pick_columns = columns[:, :, None] == torch.arange(x.shape[3], device=x.device)
    x = (x[:, :, None] * pick_rows[:, None, :, :, None]).sum(dim=3)
    return (x[:, :, :, None] * pick_columns[:, None, None]).sum(dim=4)
