"""Frames as a grid of patches: crop or pad to it, gather patches by index, put frames together and back in place.

A patch index is t * rows * cols + r * cols + c, so an index tensor needs nothing beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_cli.errors import InputError

__all__ = [
    "Geometry",
    "assemble_frames",
    "frame_patches",
    "gather_patches",
    "patch_coordinates",
    "plan_geometry",
    "unit_range",
]

Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """Where a grid of patches lies in a frame.

    A centre crop of the frame is padded, where the grid does not divide it, to the canvas that the patches tile.

    Attributes:
        frame: (height, width) of the original frame in pixels.
        crop: (height, width) of what is kept of it.
        corner: (top, left) of the crop in the frame.
        pad: (top, left) rows and columns of the canvas before the crop begins.
        patch: (height, width) of a patch.
        grid: (rows, cols) of patches.
    """

    frame: Pair
    crop: Pair
    corner: Pair
    pad: Pair
    patch: Pair
    grid: Pair

    @property
    def canvas(self) -> Pair:
        """(height, width) of all patches together."""
        return self.patch[0] * self.grid[0], self.patch[1] * self.grid[1]

    @property
    def per_frame(self) -> int:
        """Patches of a frame."""
        return self.grid[0] * self.grid[1]

    @property
    def content(self) -> tuple[slice, slice]:
        """Rows and columns of the canvas that are pixels of the frame, which is where figures are computed."""
        return slice(self.pad[0], self.pad[0] + self.crop[0]), slice(self.pad[1], self.pad[1] + self.crop[1])

    @property
    def region(self) -> tuple[slice, slice]:
        """Rows and columns of the frame that the canvas holds."""
        (top, left), (height, width) = self.corner, self.crop
        return slice(top, top + height), slice(left, left + width)

    def place(self, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Crop frames (..., H, W, 3), and pad them by repeating their border, to the canvas (..., h, w, 3)."""
        if frames.shape[-3:-1] != self.frame:
            raise ValueError(f"frames of {frames.shape[-3:-1]} pixels, expected {self.frame}")
        kept = frames[(..., *self.region, slice(None))]
        sides = [
            (before, whole - before - size)
            for before, whole, size in zip(self.pad, self.canvas, self.crop, strict=True)
        ]
        if not any(map(any, sides)):
            return kept
        return np.pad(kept, [(0, 0)] * (frames.ndim - 3) + sides + [(0, 0)], mode="edge")

    def cut(self, canvas: Tensor) -> Tensor:
        """The pixels of the frame in (..., h, w) of the canvas, without the padding; a view."""
        return canvas[(..., *self.content)]

    def restore(self, canvas: Tensor, around: Tensor | None = None) -> Tensor:
        """Put canvases back to where they were in frames of the original size.

        Args:
            canvas: (..., C, h, w) of any type.
            around: (..., C, H, W) original frames, in the range of the canvas, to fill in what the crop left out; black
                without them.

        Returns:
            (..., C, H, W).
        """
        if tuple(canvas.shape[-2:]) != self.canvas:
            raise ValueError(f"a canvas of {tuple(canvas.shape[-2:])} pixels, expected {self.canvas}")
        frames = canvas.new_zeros(*canvas.shape[:-2], *self.frame) if around is None else around.to(canvas).clone()
        frames[(..., *self.region)] = self.cut(canvas)
        return frames

    def to_dict(self) -> dict[str, list[int]]:
        """Plain values, for a checkpoint or a file's header."""
        return {name: list(pair) for name, pair in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Sequence[int]]) -> Geometry:
        """The geometry of `to_dict`.

        Example:
            >>> geometry = plan_geometry((720, 1280), crop=(640, 1280), grid=(2, 4))
            >>> Geometry.from_dict(geometry.to_dict()) == geometry
            True
        """
        pairs: dict[str, Any] = {name: (int(pair[0]), int(pair[1])) for name, pair in values.items()}
        return cls(**pairs)


def plan_geometry(
    frame: Sequence[int],
    crop: Sequence[int] | None = None,
    patch: Sequence[int] | None = None,
    grid: Sequence[int] | None = None,
) -> Geometry:
    """Decide on crop and padding.

    With a patch size, as many patches as cover the crop; with a grid, the smallest patches that do; with both, the crop
    is as much of the frame as they cover. What the patches cover beyond the crop is padded, half of it on each side.

    Args:
        frame: (height, width) of the video in pixels.
        crop: (height, width) of the centre crop; by default the whole frame, or what patch and grid cover of it.
        patch: (height, width) of a patch in pixels.
        grid: (rows, cols); by default 1 x 1 if no patch size is given either, which is the whole frame.

    Raises:
        InputError: a size is not a pair of positive numbers, the crop is larger than the frame or than the canvas of
            patch and grid.

    Example:
        >>> plan_geometry((720, 1280), crop=(640, 1280), patch=(320, 320))  # doctest: +NORMALIZE_WHITESPACE
        Geometry(frame=(720, 1280), crop=(640, 1280), corner=(40, 0), pad=(0, 0), patch=(320, 320), grid=(2, 4))
    """
    frame = _pair("the video's frame", frame)
    wanted = _pair("data.crop", crop) if crop is not None else frame
    if wanted[0] > frame[0] or wanted[1] > frame[1]:
        raise InputError(f"data.crop is {wanted[0]}x{wanted[1]}, expected at most the frame's {frame[0]}x{frame[1]}")
    sides = _pair("data.patch_size", patch) if patch is not None else None
    cells = _pair("data.grid", grid) if grid is not None else None
    if sides is None:
        cells = cells or (1, 1)
        sides = -(-wanted[0] // cells[0]), -(-wanted[1] // cells[1])
    elif cells is None:
        cells = -(-wanted[0] // sides[0]), -(-wanted[1] // sides[1])
    canvas = sides[0] * cells[0], sides[1] * cells[1]
    if crop is None:
        wanted = min(frame[0], canvas[0]), min(frame[1], canvas[1])
    elif wanted[0] > canvas[0] or wanted[1] > canvas[1]:
        raise InputError(
            f"data.crop is {wanted[0]}x{wanted[1]}, expected at most {canvas[0]}x{canvas[1]}, which patch_size and "
            "grid cover together"
        )
    # round() takes the odd pixel as torchvision's CenterCrop does, so that crops hold the pixels of other codes' crops.
    corner = round((frame[0] - wanted[0]) / 2), round((frame[1] - wanted[1]) / 2)
    pad = (canvas[0] - wanted[0]) // 2, (canvas[1] - wanted[1]) // 2
    return Geometry(frame, wanted, corner, pad, sides, cells)


def _pair(field: str, value: Sequence[int]) -> Pair:
    if len(value) != 2 or any(not isinstance(v, int | np.integer) or isinstance(v, bool) or v < 1 for v in value):
        raise InputError(f"{field} is {list(value)}, expected two whole numbers from 1 up: rows first, then columns")
    return int(value[0]), int(value[1])


def gather_patches(frames: Tensor, index: Tensor, grid: Sequence[int], halo: int = 0) -> Tensor:
    """Patches of a batch of indices: one indexed read, without a loop and without waiting for the device.

    Args:
        frames: (T, rows * h, cols * w, 3) uint8 canvases, on any device.
        index: (N,) int64 patch indices on the same device, from 0 to T * rows * cols - 1; negative ones count from the
            end.
        grid: (rows, cols).
        halo: Pixels around each patch that come as well, zeros beyond the frame.

    Returns:
        (N, 3, h + 2 halo, w + 2 halo) of the frames' type, in channels-last memory.

    Example:
        >>> frames = torch.arange(2 * 4 * 6 * 3, dtype=torch.uint8).reshape(2, 4, 6, 3)
        >>> patch = gather_patches(frames, torch.tensor([5]), (2, 2))  # frame 1, row 0, column 1
        >>> bool((patch[0] == frames[1, 0:2, 3:6].permute(2, 0, 1)).all())
        True
    """
    rows, cols, h, w = _cells(frames, grid)
    t, r, c = _split_index(index, (rows, cols))
    if not halo:
        # Splitting the sides is a view; the three indices then pick whole patches, whose rows are copied in one piece.
        cells = frames.unflatten(2, (cols, w)).unflatten(1, (rows, h))
        return cells[t, r, :, c].permute(0, 3, 1, 2)
    y = r[:, None] * h + torch.arange(-halo, h + halo, device=frames.device)
    x = c[:, None] * w + torch.arange(-halo, w + halo, device=frames.device)
    inside = ((y >= 0) & (y < rows * h))[:, :, None] & ((x >= 0) & (x < cols * w))[:, None, :]
    y, x = y.clamp(0, rows * h - 1), x.clamp(0, cols * w - 1)
    found = frames[t[:, None, None], y[:, :, None], x[:, None, :]] * inside[..., None]
    return found.permute(0, 3, 1, 2)


def unit_range(patches: Tensor) -> Tensor:
    """uint8 as float32 from 0 to 1.

    >>> unit_range(torch.tensor([0, 51, 255], dtype=torch.uint8))
    tensor([0.0000, 0.2000, 1.0000])
    """
    return patches.float() / 255


def patch_coordinates(index: Tensor, count: int, grid: Sequence[int]) -> Tensor:
    """Where patches lie in the video.

    Args:
        index: (N,) int64 patch indices.
        count: Frames of the video.
        grid: (rows, cols).

    Returns:
        (N, 3) float32 of t, y, x: t is frame / (count - 1), so 0 for the first and 1 for the last frame, and 0 for a
        single one; y and x are the patch's centre as a share of the canvas, (r + 0.5) / rows and (c + 0.5) / cols.

    Example:
        >>> patch_coordinates(torch.tensor([0, 7, 23]), 3, (2, 4))
        tensor([[0.0000, 0.2500, 0.1250],
                [0.0000, 0.7500, 0.8750],
                [1.0000, 0.7500, 0.8750]])
    """
    rows, cols = grid
    t, r, c = _split_index(index, (rows, cols))
    return torch.stack([t / max(1, count - 1), (r + 0.5) / rows, (c + 0.5) / cols], 1).float()


def frame_patches(frames: Sequence[int] | Tensor, grid: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Indices of all patches of some frames, a frame's in reading order.

    Args:
        frames: (F,) frames.
        grid: (rows, cols).
        device: Of the result; by default that of a tensor, else the CPU.

    Returns:
        (F * rows * cols,) int64.

    Example:
        >>> frame_patches([0, 3], (1, 2))
        tensor([0, 1, 6, 7])
    """
    per_frame = grid[0] * grid[1]
    first = torch.as_tensor(frames, dtype=torch.int64, device=device)
    return (first[:, None] * per_frame + torch.arange(per_frame, device=first.device)).flatten()


def assemble_frames(patches: Tensor, grid: Sequence[int]) -> Tensor:
    """Put frames together from their patches, the inverse of gathering `frame_patches` without a halo.

    Args:
        patches: (F * rows * cols, C, h, w) in the order of `frame_patches`.
        grid: (rows, cols).

    Returns:
        (F, C, rows * h, cols * w).
    """
    rows, cols = grid
    if patches.shape[0] % (rows * cols):
        raise ValueError(f"{patches.shape[0]} patches, expected a multiple of {rows} x {cols}")
    cells = patches.unflatten(0, (-1, rows, cols))
    return cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _split_index(index: Tensor, grid: Pair) -> tuple[Tensor, Tensor, Tensor]:
    per_frame = grid[0] * grid[1]
    cell = index % per_frame
    return (index - cell) // per_frame, cell // grid[1], cell % grid[1]


def _cells(frames: Tensor, grid: Sequence[int]) -> tuple[int, int, int, int]:
    (rows, cols), (height, width) = grid, frames.shape[1:3]
    if height % rows or width % cols:
        raise ValueError(f"frames of {height} x {width} pixels, expected a multiple of the grid's {rows} x {cols}")
    return rows, cols, height // rows, width // cols
