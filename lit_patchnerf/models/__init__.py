"""The decoders, from plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

from lit_cli.errors import InputError
from lit_patchnerf.models.blocks import Decoded
from lit_patchnerf.models.coordinate import CoordinateConfig, CoordinateDecoder
from lit_patchnerf.models.counting import COORDINATE_PRESETS, GRID_PRESETS, count_params, solve_width
from lit_patchnerf.models.grid import GridConfig, GridDecoder

__all__ = [
    "COORDINATE_PRESETS",
    "GRID_PRESETS",
    "CoordinateConfig",
    "CoordinateDecoder",
    "Decoded",
    "GridConfig",
    "GridDecoder",
    "Mode",
    "build_decoder",
    "count_params",
    "decoder_config",
    "solve_width",
]

Mode = Literal["coordinate", "grid"]


def decoder_config(
    mode: Mode, options: Mapping[str, Any] | None = None, *, target_params: int | None = None
) -> CoordinateConfig | GridConfig:
    """A configuration from plain values, as they come from YAML or a file's header.

    Lists may stand for tuples, and one number for a pair of strides.

    Args:
        mode: Which decoder.
        options: Fields of its configuration; what is left out keeps its default.
        target_params: Solve for the widest decoder with at most so many parameters.

    Raises:
        InputError: an unknown mode or field, or values that do not fit together.

    Example:
        >>> decoder_config("grid", {"width": 8, "frame": [16, 32], "strides": [4, 2]}).strides
        ((4, 4), (2, 2))
    """
    classes: dict[str, type[CoordinateConfig] | type[GridConfig]] = {"coordinate": CoordinateConfig, "grid": GridConfig}
    if mode not in classes:
        raise InputError(f"model.mode: expected coordinate or grid, got {mode}")
    known = [field.name for field in fields(classes[mode])]
    values = dict(options or {})
    for name in values:
        if name not in known:
            raise InputError(f"model.decoder.{name}: no such option in mode {mode}, expected one of {', '.join(known)}")
    if values.get("strides"):
        values["strides"] = [(s, s) if isinstance(s, int) else s for s in values["strides"]]
    config = classes[mode](**{name: _tuples(value) for name, value in values.items()})
    return config if target_params is None else solve_width(target_params, config)


def build_decoder(config: CoordinateConfig | GridConfig) -> CoordinateDecoder | GridDecoder:
    """The decoder that a configuration describes, its weights drawn from torch's generator."""
    return GridDecoder(config) if isinstance(config, GridConfig) else CoordinateDecoder(config)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value
