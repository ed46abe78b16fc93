"""Parameters of a decoder by formula, the width for a wanted number of them, and presets.

Counted is everything that a decoder needs: weights, biases, latents, the head for embeddings.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TypeVar

from lit_cli.errors import InputError
from lit_patchnerf.models.atlas import atlas_size
from lit_patchnerf.models.blocks import Block, Pool, nth
from lit_patchnerf.models.coordinate import CoordinateConfig
from lit_patchnerf.models.grid import GridConfig

__all__ = [
    "COORDINATE_PRESETS",
    "GRID_PRESETS",
    "coordinate_params",
    "count_params",
    "grid_params",
    "latent_params",
    "solve_width",
]

Config = TypeVar("Config", bound=CoordinateConfig | GridConfig)
WIDEST = 65536

COORDINATE_PRESETS = {
    "quality": CoordinateConfig(fc_dim=256),
    "conservative": CoordinateConfig(fc_dim=224),
    "moderate": CoordinateConfig(fc_dim=192),
    "aggressive": CoordinateConfig(fc_dim=128),
}
"""30.16, 24.19, 18.76 and 10.00 million parameters."""

GRID_PRESETS = {
    "0.35m": GridConfig(width=32),
    "0.75m": GridConfig(width=48, multiple=4),
    "1.5m": GridConfig(width=64, multiple=8),
    "3m": GridConfig(width=96, multiple=8),
}
"""For 132 frames of 640 x 1280, 21,120 latents included: 0.342, 0.742, 1.491 and 2.873 million parameters.

Channels are multiples of as much as keeps the whole just below its name.
"""


def coordinate_params(config: CoordinateConfig) -> int:
    """Parameters of a `CoordinateDecoder`.

    With 480 numbers of encoding, a hidden width of 256, a 9 x 16 map of C channels and stages of c_i channels, s_i new
    positions per old one, kernels k_i and n_i ConvNeXt blocks:

        481*256 + 257*144*C + sum_i [c_(i-1) c_i s_i k_i^2 + c_i s_i + n_i (8 c_i^2 + 58 c_i)] + 27 c_last + 3 + head

    >>> coordinate_params(COORDINATE_PRESETS["aggressive"])
    10002891
    """
    widths = config.widths
    encoded = 2 * config.levels * 3
    total = (encoded + 1) * config.hidden + (config.hidden + 1) * math.prod(config.stem) * config.fc_dim
    for i, stride in enumerate(config.all_strides):
        total += _stage(widths[i], widths[i + 1], nth(config.kernels, i), stride)
        total += config.all_blocks[i] * _block(widths[i + 1], config.block)
    return total + _heads(widths, config.clip_dim, config.clip_stage, config.clip_pool)


def grid_params(config: GridConfig) -> int:
    """Parameters of a `GridDecoder`, latents included.

    With c_0 the width, d numbers per latent cell in all and FiLM's vector of v numbers:

        latents + (v + 1) v + (d + 1) c_0 + sum_i [c_(i-1) c_i s_i k_i^2 + c_i s_i + 2 (v + 1) c_i + blocks] + head

    An atlas of a numbers per place adds a c_i and its places, a camera three for each of its points.

    HNeRV's decoder of 1,488,276 parameters and its 16,896 latents:

    >>> grid_params(GridConfig(width=68, latent_frames=(132,), latent_channels=(16,), levels=0))
    1505172
    """
    widths = config.widths
    vector = 2 * config.levels
    total = latent_params(config) + (vector + 1) * vector + (sum(config.latent_channels) + 1) * config.width
    for i, stride in enumerate(config.all_strides):
        total += _stage(widths[i], widths[i + 1], nth(config.kernels, i), stride)
        total += nth(config.blocks, i) * _block(widths[i + 1], config.block)
        total += 2 * (vector + 1) * widths[i + 1] if vector else 0
    for i, stage in enumerate(config.atlas_stages):
        size = atlas_size(config.map_size(stage), config.atlas_margin, nth(config.atlas_scales, i))
        total += nth(config.atlas_channels, i) * (math.prod(size) + widths[stage])
    total += 3 * config.camera_points
    return total + _heads(widths, config.clip_dim, config.clip_stage, config.clip_pool)


def latent_params(config: GridConfig) -> int:
    """The latents among them.

    >>> latent_params(GridConfig(latent_frames=(132,), latent_channels=(16,)))
    16896
    """
    per_moment = sum(
        points * channels for points, channels in zip(config.latent_frames, config.latent_channels, strict=True)
    )
    return per_moment * math.prod(config.latent_grid)


def count_params(config: CoordinateConfig | GridConfig) -> int:
    """Parameters of the decoder that a configuration describes."""
    return grid_params(config) if isinstance(config, GridConfig) else coordinate_params(config)


def solve_width(target_params: int, config: Config, *, step: int | None = None) -> Config:
    """The configuration with the largest `fc_dim` or `width` that has at most so many parameters.

    Args:
        target_params: Limit of the whole decoder, latents included.
        config: Everything but the width.
        step: The width is a multiple of it; by default of what the other channels are rounded to.

    Raises:
        InputError: even the narrowest has more.

    Example:
        >>> hnerv = GridConfig(latent_frames=(132,), latent_channels=(16,), levels=0)
        >>> solve_width(1_510_000, hnerv).width
        68
    """
    step = step or config.multiple
    name = "width" if isinstance(config, GridConfig) else "fc_dim"

    def at(steps: int) -> Config:
        return replace(config, **{name: steps * step})  # type: ignore[arg-type]

    fits, too_wide = 0, WIDEST // step + 1
    while too_wide - fits > 1:  # widths of all stages grow with the first, and the count with them
        middle = (fits + too_wide) // 2
        if count_params(at(middle)) <= target_params:
            fits = middle
        else:
            too_wide = middle
    if fits == 0:
        least = count_params(at(1))
        raise InputError(f"model.target_params: expected at least {least} for this configuration, got {target_params}")
    return at(fits)


def _stage(inputs: int, outputs: int, kernel: int, stride: tuple[int, int]) -> int:
    return (inputs * kernel**2 + 1) * outputs * math.prod(stride)


def _block(channels: int, block: Block) -> int:
    return 8 * channels**2 + 58 * channels if block == "convnext" else 2 * (9 * channels**2 + channels)


def _heads(widths: list[int], clip_dim: int | None, clip_stage: int, pool: Pool) -> int:
    total = 27 * widths[-1] + 3
    if clip_dim is not None:
        channels = widths[clip_stage]
        total += (channels + 1) * clip_dim + (clip_dim + 1) * clip_dim + (channels if pool == "attention" else 0)
    return total
