"""The formulas against the networks, and both against published counts."""

from dataclasses import replace

import pytest
import torch

from lit_cli.errors import InputError
from lit_patchnerf.models import (
    COORDINATE_PRESETS,
    GRID_PRESETS,
    CoordinateConfig,
    GridConfig,
    build_decoder,
    count_params,
    decoder_config,
    solve_width,
)
from lit_patchnerf.models.counting import latent_params


def built(config):
    with torch.device("meta"):
        return sum(p.numel() for p in build_decoder(config).parameters())


COORDINATE = [
    *COORDINATE_PRESETS.values(),
    CoordinateConfig(fc_dim=13, patch=(20, 24), stem=(2, 3), clip_dim=None),
    CoordinateConfig(fc_dim=16, patch=(20, 20), stem=(5, 5), blocks=(2,), block="residual", clip_pool="attention"),
    CoordinateConfig(fc_dim=16, patch=(8, 8), stem=(2, 2), strides=((2, 2), (2, 2)), multiple=1, hidden=7, levels=3),
]
GRID = [
    *GRID_PRESETS.values(),
    GridConfig(width=8, frame=(40, 80), grid=(2, 4), latent_frames=(5,), latent_channels=(3,), levels=0),
    GridConfig(width=9, frame=(40, 80), grid=(2, 4), blocks=(1, 0, 2), multiple=4, clip_dim=6, clip_pool="attention"),
    GridConfig(width=9, frame=(40, 80), grid=(1, 2), blocks=(0, 1), block="residual", kernels=(3,), levels=5),
    GridConfig(width=9, frame=(40, 80), grid=(2, 4), atlas_stages=(2, 1), atlas_channels=(3, 1), camera_frames=7),
    GridConfig(width=9, frame=(40, 80), grid=(2, 4), atlas_stages=(3,), atlas_scales=(0.3,), atlas_margin=0.4),
]


@pytest.mark.parametrize("config", COORDINATE + GRID)
def test_formula_equals_the_network(config):
    assert count_params(config) == built(config)


@pytest.mark.parametrize(
    ("name", "fc_dim", "params", "guide"),
    [
        ("quality", 256, 30.16, 30),
        ("conservative", 224, 24.19, 25),
        ("moderate", 192, 18.76, 20),
        ("aggressive", 128, 10.00, 10),
    ],
)
def test_coordinate_presets(name, fc_dim, params, guide):
    config = COORDINATE_PRESETS[name]
    count = count_params(config) / 1e6
    assert config.fc_dim == fc_dim
    assert round(count, 2) == params
    assert abs(count / guide - 1) < 0.07


@pytest.mark.parametrize(
    ("name", "limit", "params"),
    [
        ("0.35m", 350e3, 341_722),
        ("0.75m", 750e3, 741_863),
        ("1.5m", 1.5e6, 1_490_643),
        ("3m", 3e6, 2_873_387),
    ],
)
def test_grid_presets_stay_below_their_names(name, limit, params):
    config = GRID_PRESETS[name]
    assert count_params(config) == params
    assert 0.95 * limit < params <= limit
    assert latent_params(config) == 128 * (132 + 33)
    assert solve_width(int(limit), config) == config


# Decoders of HNeRV for 640 x 1280 with 16,896 latents, counted from its layers.
@pytest.mark.parametrize(("width", "decoder"), [(32, 0.313e6), (48, 0.719e6), (68, 1_488_276), (97, 3.013e6)])
def test_without_film_it_is_hnerv(width, decoder):
    config = GridConfig(width=width, latent_frames=(132,), latent_channels=(16,), levels=0)
    assert count_params(config) - latent_params(config) == pytest.approx(decoder, rel=0 if width == 68 else 2e-3)


def test_latents_are_counted():
    config = GRID_PRESETS["1.5m"]
    more = replace(config, latent_frames=(133, 33))
    assert count_params(more) - count_params(config) == 2 * 4 * 16


@pytest.mark.parametrize("config", [CoordinateConfig(), GridConfig(), GridConfig(multiple=8, blocks=(0, 0, 1))])
@pytest.mark.parametrize("target", [2_000_000, 9_999_999])
def test_solved_width_is_the_largest(config, target):
    solved = solve_width(target, config)
    name = "width" if isinstance(config, GridConfig) else "fc_dim"
    wider = replace(solved, **{name: getattr(solved, name) + config.multiple})
    assert count_params(solved) <= target < count_params(wider)


def test_solved_width_is_a_multiple_of_the_step():
    assert solve_width(10_100_000, CoordinateConfig(), step=32).fc_dim == 128


def test_target_that_nothing_meets():
    with pytest.raises(InputError, match=r"^model\.target_params: expected at least \d+ for .*, got 1000$"):
        solve_width(1000, GridConfig())


def test_configuration_from_plain_values():
    config = decoder_config("coordinate", {"fc_dim": 8, "patch": [8, 12], "stem": [2, 3], "strides": [2, [2, 2]]})
    assert config == CoordinateConfig(fc_dim=8, patch=(8, 12), stem=(2, 3), strides=((2, 2), (2, 2)))
    assert decoder_config("grid", {"multiple": 8}, target_params=1_500_000).widths == GRID_PRESETS["1.5m"].widths


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("voxel", {}, "model.mode: expected coordinate or grid"),
        ("grid", {"fc_dim": 8}, "model.decoder.fc_dim: no such option in mode grid"),
        ("grid", {"width": 0}, "model.decoder.width: expected at least 1"),
        ("grid", {"kernels": [2]}, "model.decoder.kernels: expected odd"),
        ("grid", {"reduction": 0.0}, "model.decoder.reduction: expected positive"),
        ("grid", {"blocks": [-1]}, "model.decoder.blocks: expected numbers from 0"),
        ("grid", {"grid": [3, 4]}, "data.grid: expected to divide the frame"),
        ("grid", {"strides": [7]}, "model.decoder.strides: expected to divide the patch"),
        ("grid", {"frame": [322, 1280], "grid": [1, 4]}, "model.decoder.strides: expected strides for patches of"),
        ("grid", {"latent_frames": [5]}, "model.decoder.latent_frames: expected positive numbers, as many"),
        ("grid", {"levels": -1}, "model.decoder.levels: expected a number from 0"),
        ("grid", {"clip_dim": 0}, "model.decoder.clip_dim: expected at least 1 or null"),
        ("grid", {"clip_dim": 8, "clip_stage": 6}, "model.decoder.clip_stage: expected 1 to 5"),
        ("grid", {"activation": "relu"}, "model.decoder.activation: expected one of gelu, sin"),
        ("coordinate", {"block": "mlp"}, "model.decoder.block: expected one of convnext, residual"),
        ("coordinate", {"clip_pool": "max"}, "model.decoder.clip_pool: expected one of mean, attention"),
        ("coordinate", {"fc_dim": -1}, "model.decoder.fc_dim: expected at least 1"),
        ("coordinate", {"strides": [2, 2]}, "model.decoder.strides: expected a stem"),
        ("coordinate", {"patch": [9, 16]}, "model.decoder.stem: expected fewer rows"),
        ("coordinate", {"stem": [0, 16]}, "model.decoder.stem: expected fewer rows"),
    ],
)
def test_wrong_values_are_named(mode, options, message):
    with pytest.raises(InputError) as error:
        decoder_config(mode, options)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
