import json

import numpy as np
import pytest
import torch
from torchvision.transforms.functional import center_crop

from lit_patchnerf.patches import (
    Geometry,
    assemble_frames,
    frame_patches,
    gather_patches,
    patch_coordinates,
    plan_geometry,
    unit_range,
)
from tests.helpers.errors import refused


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def slow_patch(frames: np.ndarray, index: int, grid: tuple[int, int], halo: int = 0) -> np.ndarray:
    """(h, w, 3) by slicing a zero-padded frame."""
    rows, cols = grid
    h, w = frames.shape[1] // rows, frames.shape[2] // cols
    t, cell = divmod(index, rows * cols)
    r, c = divmod(cell, cols)
    padded = np.pad(frames[t], ((halo, halo), (halo, halo), (0, 0)))
    return padded[r * h : (r + 1) * h + 2 * halo, c * w : (c + 1) * w + 2 * halo]


# ---- Geometry --------------------------------------------------------------------------------------------------------

GEOMETRIES = [
    {},
    {"grid": (2, 4)},
    {"patch": (7, 9)},
    {"crop": (20, 31), "grid": (2, 4)},
    {"crop": (21, 30), "patch": (8, 8)},
    {"patch": (8, 8), "grid": (2, 3)},
    {"patch": (30, 10), "grid": (1, 2)},
    {"crop": (5, 5), "patch": (8, 8), "grid": (2, 3)},
]


@pytest.mark.parametrize("wanted", GEOMETRIES)
@pytest.mark.parametrize("frame", [(24, 36), (25, 37), (26, 33)])
def test_what_was_cropped_and_padded_comes_back_to_its_place(frame, wanted):
    geometry = plan_geometry(frame, **wanted)
    original = noise(3, *frame, 3)
    placed = geometry.place(original)
    assert placed.shape == (3, *geometry.canvas, 3)
    assert geometry.canvas == (geometry.grid[0] * geometry.patch[0], geometry.grid[1] * geometry.patch[1])
    pixels = torch.from_numpy(original).permute(0, 3, 1, 2)
    canvas = torch.from_numpy(np.ascontiguousarray(placed)).permute(0, 3, 1, 2)
    # torchvision's crop is the reference; beyond it the border repeats.
    kept = center_crop(pixels, list(geometry.crop))
    assert torch.equal(geometry.cut(canvas), kept)
    (top, left), (height, width) = geometry.pad, geometry.canvas
    sides = [left, width - left - geometry.crop[1], top, height - top - geometry.crop[0]]
    assert torch.equal(canvas.float(), torch.nn.functional.pad(kept.float(), sides, mode="replicate"))
    assert max(abs(sides[0] - sides[1]), abs(sides[2] - sides[3])) <= 1
    # Back in place: all of it with the original around, and black beyond the crop without.
    assert torch.equal(geometry.restore(canvas, pixels), pixels)
    alone = geometry.restore(canvas)
    assert alone.shape == pixels.shape
    assert torch.equal(alone[..., *geometry.region], kept)
    assert alone.long().sum() == kept.long().sum()


def test_bunny_is_cropped_as_by_the_papers():
    geometry = plan_geometry((720, 1280), crop=(640, 1280), patch=(320, 320))
    assert (geometry.grid, geometry.corner, geometry.pad, geometry.per_frame) == ((2, 4), (40, 0), (0, 0), 8)
    assert geometry == plan_geometry((720, 1280), patch=(320, 320), grid=(2, 4))
    assert geometry == plan_geometry((720, 1280), crop=(640, 1280), grid=(2, 4))


def test_a_patch_size_alone_covers_the_whole_frame():
    geometry = plan_geometry((720, 1280), patch=(320, 320))
    assert (geometry.grid, geometry.canvas, geometry.pad) == ((3, 4), (960, 1280), (120, 0))
    assert geometry.content == (slice(120, 840), slice(0, 1280))


def test_geometry_survives_json():
    geometry = plan_geometry((25, 37), crop=(21, 30), patch=(8, 8))
    assert Geometry.from_dict(json.loads(json.dumps(geometry.to_dict()))) == geometry


def test_floats_are_put_back_over_bytes():
    geometry = plan_geometry((6, 6), crop=(4, 4))
    found = geometry.restore(torch.full((3, 4, 4), 0.5), torch.zeros(3, 6, 6, dtype=torch.uint8))
    assert found.dtype == torch.float32
    assert found.sum() == 3 * 16 * 0.5


@pytest.mark.parametrize(
    ("wanted", "parts"),
    [
        ({"crop": (25, 36)}, ("data.crop is 25x36", "frame's 24x36")),
        ({"crop": (24, 36), "patch": (8, 8), "grid": (2, 3)}, ("data.crop is 24x36", "16x24", "patch_size and grid")),
        ({"crop": (24,)}, ("data.crop is [24]", "two whole numbers")),
        ({"patch": (8, 0)}, ("data.patch_size is [8, 0]",)),
        ({"patch": (8.0, 8)}, ("data.patch_size",)),
        ({"grid": (True, 2)}, ("data.grid",)),
    ],
)
def test_impossible_geometries_are_refused(wanted, parts):
    refused(lambda: plan_geometry((24, 36), **wanted), *parts)


def test_frames_of_another_size_are_an_error():
    geometry = plan_geometry((24, 36), grid=(2, 2))
    with pytest.raises(ValueError, match="expected \\(24, 36\\)"):
        geometry.place(noise(25, 36, 3))
    with pytest.raises(ValueError, match="expected \\(24, 36\\)"):
        geometry.restore(torch.zeros(3, 12, 18))


# ---- Patches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(1, 1), (2, 4), (3, 2), (12, 1)])
@pytest.mark.parametrize("halo", [0, 1, 5, 40])
def test_gathered_patches_are_the_sliced_ones(grid, halo):
    frames = noise(3, 12, 16, 3)
    index = torch.randint(0, 3 * grid[0] * grid[1], (17,), generator=torch.Generator().manual_seed(0))
    found = gather_patches(torch.from_numpy(frames), index, grid, halo)
    h, w = 12 // grid[0] + 2 * halo, 16 // grid[1] + 2 * halo
    assert found.shape == (17, 3, h, w)
    assert found.dtype == torch.uint8
    assert found.is_contiguous(memory_format=torch.channels_last)
    for patch, i in zip(found, index.tolist(), strict=True):
        np.testing.assert_array_equal(patch.permute(1, 2, 0).numpy(), slow_patch(frames, i, grid, halo))


@pytest.mark.parametrize("grid", [(1, 1), (2, 4), (3, 2)])
def test_frames_are_put_together_from_their_patches(grid):
    frames = torch.from_numpy(noise(4, 12, 16, 3))
    found = assemble_frames(gather_patches(frames, frame_patches([3, 1], grid), grid), grid)
    assert torch.equal(found, frames[[3, 1]].permute(0, 3, 1, 2))


def test_indices_of_frames_and_their_coordinates():
    index = frame_patches(torch.tensor([2, 0]), (2, 3))
    assert index.tolist() == [12, 13, 14, 15, 16, 17, 0, 1, 2, 3, 4, 5]
    found = patch_coordinates(index, 5, (2, 3))
    expected = [[t / 4, (r + 0.5) / 2, (c + 0.5) / 3] for t in (2, 0) for r in range(2) for c in range(3)]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert found.dtype == torch.float32
    assert patch_coordinates(torch.tensor([0]), 1, (1, 1)).tolist() == [[0.0, 0.5, 0.5]]


def test_coordinates_of_a_long_video_are_exact():
    index = torch.tensor([99_999 * 8 + 7])
    assert patch_coordinates(index, 100_000, (2, 4)).tolist() == [[1.0, 0.75, 0.875]]


def test_a_patch_in_unit_range():
    frames = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(1, 2, 2, 3)
    found = unit_range(gather_patches(frames, torch.tensor([0]), (1, 1)))
    torch.testing.assert_close(found[0, :, 0, 0], torch.tensor([0.0, 0.2, 1.0]))


def test_gathering_never_waits_for_the_device():
    """On the meta device a look at a value fails, and so do shapes that depend on one."""
    frames = torch.empty(3, 12, 16, 3, dtype=torch.uint8, device="meta")
    index = torch.empty(5, dtype=torch.int64, device="meta")
    for halo in (0, 2):
        assert gather_patches(frames, index, (2, 4), halo).shape == (5, 3, 6 + 2 * halo, 4 + 2 * halo)
    assert patch_coordinates(index, 3, (2, 4)).shape == (5, 3)


def test_a_grid_that_does_not_divide_the_frame_is_an_error():
    with pytest.raises(ValueError, match="multiple of the grid's 5 x 4"):
        gather_patches(torch.zeros(1, 12, 16, 3), torch.tensor([0]), (5, 4))
    with pytest.raises(ValueError, match="multiple of 2 x 4"):
        assemble_frames(torch.zeros(7, 3, 6, 4), (2, 4))
