"""Frames, cells, regions and embeddings against loops over patches and crops of frames."""

import itertools
from dataclasses import replace

import pytest
import torch

from lit_cli.errors import InputError
from lit_patchnerf.decoding import (
    cell_coordinates,
    check_region,
    decode_canvases,
    decode_cells,
    decode_region,
    embed_moments,
    frame_name,
    frame_times,
    moment_numbers,
    to_bytes,
)
from lit_patchnerf.models import CoordinateConfig, CoordinateDecoder, GridConfig, GridDecoder
from lit_patchnerf.patches import Geometry, frame_patches, patch_coordinates, plan_geometry

GRID = (2, 4)
# A crop that leaves rows out, and padding on both axes: 37 x 74 of 50 x 80 pixels, on a canvas of 40 x 80.
GEOMETRY = plan_geometry((50, 80), crop=(37, 74), patch=(20, 20), grid=GRID)
TIMES = torch.tensor([0.0, 0.35, 1.0])  # the middle one lies between frames
MODES = ("grid", "coordinate")


def network(mode, clip_dim=5, **changes):
    """Every parameter random: FiLM and residual blocks begin with zeros."""
    torch.manual_seed(0)
    if mode == "grid":
        options = {"width": 8, "frame": (40, 80), "grid": GRID, "strides": ((5, 5), (2, 2), (2, 2)), "floor": 6}
        options |= {"latent_frames": (7, 3), "latent_channels": (4, 3), "levels": 4, "blocks": (1, 0)}
        options |= {"atlas_stages": (1,)}
        net = GridDecoder(GridConfig(**options, clip_dim=clip_dim, **changes))
    else:
        options = {"fc_dim": 8, "patch": (20, 20), "stem": (2, 3), "floor": 6, "levels": 6}
        net = CoordinateDecoder(CoordinateConfig(**options, clip_dim=clip_dim, **changes))
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return net.eval()


def one_patch(net, time, row, col):
    """The slow reference: a patch at a time."""
    time = torch.as_tensor([float(time)])
    if isinstance(net, GridDecoder):
        return net.forward_patch(time, row, col)
    where = torch.tensor([[float(time), (row + 0.5) / GRID[0], (col + 0.5) / GRID[1]]])
    return net(where)


def looped(net):
    """Canvases and embeddings by loops over frames, rows and columns."""
    canvas, clip = torch.zeros(len(TIMES), 3, 40, 80), torch.zeros(len(TIMES), *GRID, 5)
    with torch.no_grad():
        for (f, time), r, c in itertools.product(enumerate(TIMES), range(GRID[0]), range(GRID[1])):
            patch = one_patch(net, time, r, c)
            canvas[f, :, r * 20 : r * 20 + 20, c * 20 : c * 20 + 20] = patch.rgb[0]
            if patch.clip is not None:
                clip[f, r, c] = patch.clip[0]
    return canvas, clip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("patches_per_call", [1, 5, 8, 17, 256])
def test_canvas_is_its_patches(mode, patches_per_call):
    net = network(mode)
    canvas, clip = looped(net)
    found = decode_canvases(net, TIMES, GEOMETRY, patches_per_call=patches_per_call)
    assert found.rgb.dtype == torch.float32
    assert not found.rgb.requires_grad
    torch.testing.assert_close(found.rgb, canvas, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.clip, clip, atol=1e-5, rtol=0)
    embedded = embed_moments(net, TIMES, GEOMETRY, patches_per_call=patches_per_call)
    torch.testing.assert_close(embedded, clip, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{"levels": 0}, {"clip_stage": 1}, {"clip_stage": 3, "activation": "sin"}])
def test_embeddings_of_the_grid_are_those_of_its_frames(options):
    net = network("grid")
    net = network_of(net, **options)
    with torch.no_grad():
        expected = net(TIMES).clip
    torch.testing.assert_close(embed_moments(net, TIMES, GEOMETRY), expected, atol=1e-6, rtol=0)


def network_of(net, **changes):
    torch.manual_seed(1)
    other = GridDecoder(replace(net.config, **changes))
    for parameter in other.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return other.eval()


@pytest.mark.parametrize("mode", MODES)
def test_without_the_head(mode):
    net = network(mode, clip_dim=None)
    found = decode_canvases(net, TIMES, GEOMETRY, patches_per_call=3)
    assert found.clip is None
    torch.testing.assert_close(found.rgb, looped(net)[0], atol=1e-5, rtol=0)
    with pytest.raises(InputError, match=r"no head for embeddings, expected one .* data\.embeddings"):
        embed_moments(net, TIMES, GEOMETRY)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("rows", "cols"),
    [
        (slice(None), slice(None)),
        (slice(1, 2), slice(1, 4)),
        (slice(0, 1), slice(3, 4)),
        (slice(-1, None), slice(None, -2)),
        (slice(0, 2), slice(2, 99)),
    ],
)
@pytest.mark.parametrize("patches_per_call", [2, 32])
def test_cells_are_the_crop_of_the_canvas(mode, rows, cols, patches_per_call):
    net = network(mode)
    whole = decode_canvases(net, TIMES, GEOMETRY).rgb.unflatten(3, (4, 20)).unflatten(2, (2, 20))
    expected = whole[:, :, rows, :, cols].flatten(4).flatten(2, 3)
    found = decode_cells(net, TIMES, GEOMETRY, rows, cols, patches_per_call=patches_per_call)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "region",
    [
        (0, 0, 50, 80),  # the frame with its black border
        (10, 10, 20, 30),
        (0, 0, 7, 80),  # one row of it is picture
        (0, 0, 6, 80),  # all black
        (25, 40, 1, 1),
        (40, 70, 10, 10),  # a corner
        (5, 0, 40, 4),
    ],
)
def test_region_is_the_crop_of_the_frame(mode, region):
    net = network(mode)
    top, left, height, width = region
    frame = GEOMETRY.restore(decode_canvases(net, TIMES, GEOMETRY).rgb)
    found = decode_region(net, TIMES, GEOMETRY, region, patches_per_call=3)
    torch.testing.assert_close(found, frame[:, :, top : top + height, left : left + width], atol=1e-5, rtol=0)


def test_region_decodes_no_more_than_it_touches(monkeypatch):
    net, seen = network("coordinate"), []
    forward = net.forward
    monkeypatch.setattr(net, "forward", lambda x: seen.append(len(x)) or forward(x))
    corner = GEOMETRY.corner
    decode_region(net, TIMES[:1], GEOMETRY, (corner[0] + 1, corner[1] + 1, 10, 10))
    assert seen == [1]


@pytest.mark.parametrize("mode", MODES)
def test_under_autocast(mode):
    net = network(mode)
    plain = decode_canvases(net, TIMES, GEOMETRY)
    with torch.autocast("cpu", torch.bfloat16):
        found = decode_canvases(net, TIMES, GEOMETRY)
        cells = decode_cells(net, TIMES, GEOMETRY, slice(1, 2), slice(0, 2))
        region = decode_region(net, TIMES, GEOMETRY, (10, 10, 20, 30))
        clip = embed_moments(net, TIMES, GEOMETRY)
    assert found.rgb.dtype == found.clip.dtype == cells.dtype == region.dtype == clip.dtype == torch.float32
    assert 0 < (found.rgb - plain.rgb).abs().max() < 0.05
    torch.testing.assert_close(cells, found.rgb[:, :, 20:, :40], atol=0.02, rtol=0)
    torch.testing.assert_close(region, GEOMETRY.restore(found.rgb)[:, :, 10:30, 10:40], atol=0.02, rtol=0)
    torch.testing.assert_close(clip, found.clip, atol=0.02, rtol=0)


def test_coordinates_are_those_of_training():
    index = frame_patches([0, 3, 6], GRID)
    t, r, c = cell_coordinates(frame_times(torch.tensor([0, 3, 6]), 7), GEOMETRY, slice(None), slice(None))
    found = torch.stack([t, (r + 0.5) / GRID[0], (c + 0.5) / GRID[1]], 1)
    torch.testing.assert_close(found, patch_coordinates(index, 7, GRID), atol=0, rtol=0)


def test_times_between_frames_and_of_a_single_frame():
    assert frame_times([0, 0.5], 2).tolist() == [0.0, 0.5]
    assert frame_times([0], 1).tolist() == [0.0]
    assert frame_times(torch.tensor([1]), 2).dtype == torch.float32


@pytest.mark.parametrize("mode", MODES)
def test_refuses_another_geometry(mode):
    net, other = network(mode), plan_geometry((40, 80), grid=(1, 2))
    for call in (
        lambda: decode_canvases(net, TIMES, other),
        lambda: embed_moments(net, TIMES, other),
        lambda: decode_cells(net, TIMES, other, slice(None), slice(None)),
    ):
        with pytest.raises(ValueError, match=r"expected .* by the geometry"):
            call()
    for times in (torch.tensor(0.5), torch.zeros(0), torch.zeros(2, 3)):
        with pytest.raises(ValueError, match="at least one moment"):
            decode_canvases(net, times, GEOMETRY)


@pytest.mark.parametrize(("rows", "cols"), [(slice(0, 0), slice(None)), (slice(None), slice(None, None, 2))])
def test_refuses_slices(rows, cols):
    with pytest.raises(ValueError, match="without a step, and not empty"):
        decode_cells(network("grid"), TIMES, GEOMETRY, rows, cols)


@pytest.mark.parametrize(
    "region", [(0, 0, 51, 80), (-1, 0, 5, 5), (0, 76, 5, 5), (0, 0, 0, 5), (0, 0, 5), (0.0, 0, 5, 5), (True, 0, 5, 5)]
)
def test_refuses_regions(region):
    with pytest.raises(InputError, match=r"^data\.region is \[.*\], expected .*top, left, height, width") as error:
        check_region(region, GEOMETRY)
    assert "\n" not in str(error.value)


def test_moments():
    assert moment_numbers(0, 3, 1, 4) == [0, 1, 2, 3]
    assert moment_numbers(0, 3, 2, 4) == [0, 2]
    assert moment_numbers(1, 1, 0.25, 4) == [1]
    assert moment_numbers(0, 1, 0.1, 2) == [round(i / 10, 6) for i in range(11)]
    assert moment_numbers(0, 2, 1 / 3, 3)[-1] == 2
    assert [frame_name(n) for n in moment_numbers(9, 10, 0.5, 11)] == ["000009.png", "000009_500.png", "000010.png"]
    assert frame_name(1.9999) == "000002.png"


@pytest.mark.parametrize(("first", "last"), [(-1, 3), (2, 1), (0, 4), (float("nan"), 2)])
def test_refuses_ranges(first, last):
    with pytest.raises(InputError, match=r"^data\.predict_range is .*expected first and last frame from 0 to 3"):
        moment_numbers(first, last, 1, 4)


@pytest.mark.parametrize("step", [0, -1, float("inf"), float("nan")])
def test_refuses_steps(step):
    with pytest.raises(InputError, match=r"^data\.predict_step is .*expected a positive number"):
        moment_numbers(0, 3, step, 4)


def test_bytes_round_and_clamp():
    values = torch.arange(256) / 255
    assert to_bytes(values).tolist() == list(range(256))
    assert to_bytes(values.bfloat16()).dtype == torch.uint8
    assert to_bytes(torch.tensor([-1.0, 2.0])).tolist() == [0, 255]


def test_geometry_of_these_tests():
    assert Geometry((50, 80), (37, 74), (6, 3), (1, 3), (20, 20), GRID) == GEOMETRY
