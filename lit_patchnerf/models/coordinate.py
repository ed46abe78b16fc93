"""The decoder of coordinates: (t, y, x) of a patch's centre to the patch and its embedding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import get_args

from torch import Tensor, nn
from torch.nn import functional as F

from lit_cli.errors import InputError
from lit_patchnerf.models.blocks import (
    Activation,
    Block,
    Decoded,
    Pool,
    RgbHead,
    UpStage,
    activate,
    channel_widths,
    clip_head,
    nth,
)
from lit_patchnerf.models.encoding import PositionalEncoding

__all__ = ["CoordinateConfig", "CoordinateDecoder", "solve_strides"]

Pair = tuple[int, int]
PRIMES = (5, 3, 2)  # strides that a pixel shuffle may have


def solve_strides(patch: Pair, stem: Pair) -> tuple[Pair, ...]:
    """Strides that enlarge a stem to a patch, with as few rows and columns to spare as strides of 5, 3 and 2 allow.

    Large strides come first, where maps are small. The axis with fewer of them gets ones, not in the first stage, and
    where they bring the maps' aspect ratio soonest to the patch's.

    Raises:
        InputError: the stem is as large as the patch.

    >>> solve_strides((320, 320), (9, 16))
    ((3, 5), (3, 1), (2, 2), (2, 2))
    >>> solve_strides((180, 320), (9, 16))
    ((5, 5), (2, 2), (2, 2))
    """
    if min(*patch, *stem) < 1 or all(s >= p for p, s in zip(patch, stem, strict=True)):
        raise InputError(f"model.decoder.stem: expected fewer rows or columns than the patch {patch} has, got {stem}")
    factors = [_least_factors(math.ceil(p / s)) for p, s in zip(patch, stem, strict=True)]
    stages = max(len(f) for f in factors)

    def off_aspect(strides: tuple[Pair, ...]) -> float:
        height, width, total = stem[0], stem[1], 0.0
        for rows, columns in strides:
            height, width = height * rows, width * columns
            total += abs(math.log(height / width * patch[1] / patch[0]))
        return total

    spread = [_with_ones(f, stages) for f in factors]  # the longer axis has only one way
    return min((tuple(zip(rows, columns, strict=True)) for rows in spread[0] for columns in spread[1]), key=off_aspect)


def _least_factors(ratio: int) -> list[int]:
    """Factors of the least number from `ratio` on that has no other primes, largest first."""
    while True:
        rest, factors = ratio, []
        for prime in PRIMES:
            while rest % prime == 0:
                rest //= prime
                factors.append(prime)
        if rest == 1:
            return factors
        ratio += 1


def _with_ones(factors: list[int], stages: int) -> list[list[int]]:
    """All ways to fill up with ones, the first factor staying first."""
    if not factors:
        return [[1] * stages]
    ways = []
    for places in combinations(range(1, stages), len(factors) - 1):
        row = [1] * stages
        for place, factor in zip((0, *places), factors, strict=True):
            row[place] = factor
        ways.append(row)
    return ways


@dataclass(frozen=True)
class CoordinateConfig:
    """What a `CoordinateDecoder` is built from; lists end with an entry that repeats.

    Raises:
        InputError: a value is out of its range, or strides do not reach the patch.
    """

    fc_dim: int = 192
    """channels of the stem's map"""
    patch: Pair = (320, 320)
    """rows and columns of a patch"""
    stem: Pair = (9, 16)
    """rows and columns of the stem's map"""
    strides: tuple[Pair, ...] | None = None
    """rows and columns of each stage; None solves for the patch"""
    kernels: tuple[int, ...] = (5, 3)
    """odd, of each stage's convolution"""
    reductions: tuple[float, ...] = (1.4, 1.2)
    """what each stage divides the channels by"""
    multiple: int = 8
    """that channels are rounded to"""
    floor: int = 32
    """least channels of a stage"""
    blocks: tuple[int, ...] | None = None
    """blocks of each stage; None for one in each but the last"""
    block: Block = "convnext"
    """kind of the blocks"""
    activation: Activation = "gelu"
    """behind the stem and in the stages"""
    base: float = 1.25
    """of the positional encoding"""
    levels: int = 80
    """frequencies per coordinate"""
    hidden: int = 256
    """width of the layer between the encoding and the stem"""
    clip_dim: int | None = 512
    """length of the embeddings, None for no such head"""
    clip_stage: int = 2
    """stage whose features the embedding comes from, from 1"""
    clip_pool: Pool = "mean"
    """how those features are pooled"""
    clip_stop_gradient: bool = False
    """the embedding trains its head alone"""

    def __post_init__(self) -> None:
        for name in ("fc_dim", "multiple", "floor", "levels", "hidden"):
            if getattr(self, name) < 1:
                raise InputError(f"model.decoder.{name}: expected at least 1, got {getattr(self, name)}")
        check_choices(self.block, self.activation, self.clip_pool)
        check_numbers("reductions", self.reductions)
        check_stages(self.kernels, self.blocks or (0,))
        strides = self.all_strides
        reached = self.decoded
        if any(r < p for r, p in zip(reached, self.patch, strict=True)) or min(min(s) for s in strides) < 1:
            raise InputError(
                f"model.decoder.strides: expected a stem {self.stem} to reach {self.patch}, it reaches {reached}"
            )
        if self.clip_dim is not None:
            check_clip(self.clip_dim, self.clip_stage, len(strides))

    @property
    def all_strides(self) -> tuple[Pair, ...]:
        """Strides of the stages, solved for if there are none."""
        return self.strides if self.strides else solve_strides(self.patch, self.stem)

    @property
    def decoded(self) -> Pair:
        """Rows and columns of the map from which the patch is cropped."""
        rows, columns = zip(*self.all_strides, strict=True)
        return self.stem[0] * math.prod(rows), self.stem[1] * math.prod(columns)

    @property
    def widths(self) -> list[int]:
        """Channels of the stem's map and after each stage."""
        stages = len(self.all_strides)
        return channel_widths(self.fc_dim, self.reductions, multiple=self.multiple, floor=self.floor, stages=stages)

    @property
    def all_blocks(self) -> list[int]:
        """Blocks of each stage."""
        stages = len(self.all_strides)
        return [nth(self.blocks, i) if self.blocks else int(i < stages - 1) for i in range(stages)]


def check_choices(block: str, activation: str, pool: str) -> None:
    """Refuse names that are none of the choices: a file's header goes through no parser."""
    for name, value, choices in (
        ("block", block, Block),
        ("activation", activation, Activation),
        ("clip_pool", pool, Pool),
    ):
        if value not in get_args(choices):
            raise InputError(f"model.decoder.{name}: expected one of {', '.join(get_args(choices))}, got {value}")


def check_numbers(name: str, values: tuple[float, ...]) -> None:
    """Refuse an empty list and numbers that are not positive."""
    if not values or any(v <= 0 for v in values):
        raise InputError(f"model.decoder.{name}: expected positive numbers, got {values}")


def check_stages(kernels: tuple[int, ...], blocks: tuple[int, ...]) -> None:
    """Refuse kernels that are even and a negative count of blocks."""
    if not kernels or any(k < 1 or k % 2 == 0 for k in kernels):
        raise InputError(f"model.decoder.kernels: expected odd positive numbers, got {kernels}")
    if not blocks or any(b < 0 for b in blocks):
        raise InputError(f"model.decoder.blocks: expected numbers from 0, got {blocks}")


def check_clip(size: int, stage: int, stages: int) -> None:
    """Refuse an embedding without numbers or from a stage that is not there."""
    if size < 1:
        raise InputError(f"model.decoder.clip_dim: expected at least 1 or null, got {size}")
    if not 1 <= stage <= stages:
        raise InputError(f"model.decoder.clip_stage: expected 1 to {stages}, got {stage}")


class CoordinateDecoder(nn.Module):
    """Positional encoding, two layers to a small map, up-sampling stages, a head for colours and one for embeddings.

    Stages enlarge rows and columns separately, so that a 9 x 16 map becomes a 320 x 320 patch with four rows to spare
    instead of a 1080 x 1920 one to shrink. Spare rows and columns are cropped, half on either side.

    Args:
        config: See `CoordinateConfig`.

    Example:
        >>> import torch
        >>> decoder = CoordinateDecoder(CoordinateConfig(fc_dim=8, patch=(20, 20), stem=(2, 3), clip_dim=4))
        >>> rgb, clip = decoder(torch.tensor([[0.0, 0.25, 0.5], [1.0, 0.25, 0.5]]))
        >>> rgb.shape, clip.shape
        (torch.Size([2, 3, 20, 20]), torch.Size([2, 4]))
    """

    def __init__(self, config: CoordinateConfig) -> None:
        super().__init__()
        self.config = config
        self.stem_size = config.stem
        self.activation: Activation = config.activation
        widths = config.widths
        self.encoding = PositionalEncoding(config.base, config.levels)
        self.hidden = nn.Linear(self.encoding.size(3), config.hidden)
        self.stem = nn.Linear(config.hidden, config.fc_dim * math.prod(config.stem))
        self.stages = nn.ModuleList(
            UpStage(
                widths[i],
                widths[i + 1],
                kernel=nth(config.kernels, i),
                stride=stride,
                blocks=config.all_blocks[i],
                block=config.block,
                activation=config.activation,
            )
            for i, stride in enumerate(config.all_strides)
        )
        self.rgb = RgbHead(widths[-1])
        self.clip_stage = config.clip_stage
        width = widths[config.clip_stage]
        self.clip = clip_head(width, config.clip_dim, pool=config.clip_pool, stop_gradient=config.clip_stop_gradient)
        self.patch = config.patch
        self.first = tuple((d - p) // 2 for d, p in zip(config.decoded, config.patch, strict=True))

    def forward(self, coordinates: Tensor) -> Decoded:
        """(N, 3) of t, y, x from 0 to 1 to colours (N, 3, h, w) and embeddings (N, D)."""
        x = self._stem(coordinates)
        clip = None
        for number, stage in enumerate(self.stages, start=1):
            x, _ = stage(x)
            if self.clip is not None and number == self.clip_stage:
                clip = self.clip(x)
        (top, left), (height, width) = self.first, self.patch
        return Decoded(self.rgb(x)[:, :, top : top + height, left : left + width], clip)

    def embed(self, coordinates: Tensor) -> Tensor:
        """The embeddings alone, for the cost of the stages before their head: what a search wants.

        Raises:
            RuntimeError: the decoder has no such head.
        """
        if self.clip is None:
            raise RuntimeError("this decoder was built with clip_dim None")
        x = self._stem(coordinates)
        for stage in self.stages[: self.clip_stage]:
            x, _ = stage(x)
        return self.clip(x)

    def _stem(self, coordinates: Tensor) -> Tensor:
        x = self.hidden(self.encoding(coordinates))
        x = activate(self.stem(F.gelu(x)), self.activation)
        # Channels last in the layer's output, which makes a channels-last map of it without a copy.
        return x.view(len(x), *self.stem_size, -1).permute(0, 3, 1, 2)
