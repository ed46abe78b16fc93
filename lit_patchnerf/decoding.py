"""From moments to pixels: frames, some cells of their grid, a region, embeddings, in either mode.

Nothing here trains or imports what does: a file is decoded with numpy and torch alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lit_cli.errors import InputError
from lit_patchnerf.models.blocks import Decoded
from lit_patchnerf.models.coordinate import CoordinateDecoder
from lit_patchnerf.models.grid import GridDecoder
from lit_patchnerf.patches import Geometry, assemble_frames

__all__ = [
    "Decoder",
    "cell_coordinates",
    "check_geometry",
    "check_region",
    "decode_canvases",
    "decode_cells",
    "decode_region",
    "embed_moments",
    "frame_name",
    "frame_times",
    "moment_numbers",
    "to_bytes",
]

Decoder = CoordinateDecoder | GridDecoder


def frame_times(numbers: Sequence[float] | Tensor, count: int, device: torch.device | None = None) -> Tensor:
    """When frames are: 0 for the first and 1 for the last one, as `patch_coordinates` has it.

    Args:
        numbers: (F,) frames; 12.5 lies between frames 12 and 13.
        count: Frames of the video.
        device: Of the result; by default that of a tensor, else the CPU.

    Returns:
        (F,) float32.

    Example:
        >>> frame_times([0, 2.5, 10], 11)
        tensor([0.0000, 0.2500, 1.0000])
    """
    return torch.as_tensor(numbers, dtype=torch.float32, device=device) / max(1, count - 1)


def moment_numbers(
    first: float,
    last: float,
    step: float,
    count: int,
    fields: tuple[str, str] = ("data.predict_range", "data.predict_step"),
) -> list[float]:
    """Moments of a range, in frames.

    Args:
        first: First frame.
        last: Last frame; it is included if a step falls on it.
        step: Frames from one to the next; below 1 there are moments between frames.
        count: Frames of the video.
        fields: Names of range and step for the message.

    Raises:
        InputError: the range is not inside of the video, or the step is not positive.

    Example:
        >>> moment_numbers(2, 4, 0.5, 132)
        [2.0, 2.5, 3.0, 3.5, 4.0]
    """
    if not 0 <= first <= last <= count - 1:
        raise InputError(f"{fields[0]} is {first:g} to {last:g}, expected first and last frame from 0 to {count - 1}")
    if not 0 < step < math.inf:
        raise InputError(f"{fields[1]} is {step:g}, expected a positive number")
    return [round(float(min(last, first + i * step)), 6) for i in range(math.floor((last - first) / step + 1e-6) + 1)]


def frame_name(number: float) -> str:
    """The PNG file of a moment; sorted by name they are in order.

    >>> frame_name(12), frame_name(12.5)
    ('000012.png', '000012_500.png')
    """
    whole, thousandths = divmod(round(number * 1000), 1000)
    return f"{whole:06d}_{thousandths:03d}.png" if thousandths else f"{whole:06d}.png"


def to_bytes(rgb: Tensor) -> Tensor:
    """Colours from 0 to 1 as uint8, rounded.

    >>> to_bytes(torch.tensor([-0.1, 0.2, 0.5, 1.1]))
    tensor([  0,  51, 128, 255], dtype=torch.uint8)
    """
    return (rgb.float() * 255).round().clamp(0, 255).to(torch.uint8)


def cell_coordinates(times: Tensor, geometry: Geometry, rows: slice, cols: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Time, row and column of the patches of some cells, a frame's in reading order.

    Args:
        times: (F,) from 0 to 1.
        geometry: Its grid counts the rows and columns.
        rows: Rows of the grid, without a step.
        cols: Columns of the grid, without a step.

    Returns:
        Three (F * rows * cols,) tensors on the device of the times: float, int64, int64.

    Raises:
        ValueError: the slices are empty or have a step.

    Example:
        >>> geometry = Geometry((4, 6), (4, 6), (0, 0), (0, 0), (2, 2), (2, 3))
        >>> cell_coordinates(torch.tensor([0.0, 0.5]), geometry, slice(1, 2), slice(1, 3))
        (tensor([0.0000, 0.0000, 0.5000, 0.5000]), tensor([1, 1, 1, 1]), tensor([1, 2, 1, 2]))
    """
    chosen = []
    for part, size, name in ((rows, geometry.grid[0], "rows"), (cols, geometry.grid[1], "cols")):
        first, last, step = part.indices(size)
        if step != 1 or first >= last:
            raise ValueError(f"{name} {part}: expected a slice without a step, and not empty, of 0 to {size}")
        chosen.append(torch.arange(first, last, device=times.device))
    r, c = (cell.flatten() for cell in torch.meshgrid(*chosen, indexing="ij"))
    return times.repeat_interleave(len(r)), r.repeat(len(times)), c.repeat(len(times))


@torch.no_grad()
def decode_canvases(net: Decoder, times: Tensor, geometry: Geometry, *, patches_per_call: int = 32) -> Decoded:
    """Whole canvases.

    Args:
        net: A decoder whose patches have the size of the geometry's.
        times: (F,) from 0 for the first frame to 1 for the last.
        geometry: How patches lie in the canvas.
        patches_per_call: Most patches in memory at a time; a whole frame in grid mode, if it has more.

    Returns:
        Colours (F, 3, H, W) from 0 to 1 in float32, and unit embeddings (F, rows, cols, D), None without that head.

    Raises:
        ValueError: the decoder is not of this geometry.
    """
    check_geometry(net, geometry)
    times, grid = _on_device(net, times), geometry.grid
    if isinstance(net, GridDecoder):
        found = [net(part) for part in times.split(_frames_per_call(geometry, patches_per_call))]
        rgb, clip = torch.cat([x.rgb for x in found]), [x.clip for x in found]
        return Decoded(rgb, None if net.clip is None else torch.cat([x for x in clip if x is not None]))
    cells = cell_coordinates(times, geometry, slice(None), slice(None))
    found = [net(part) for part in _coordinates(*cells, geometry).split(max(1, patches_per_call))]
    rgb, clip = assemble_frames(torch.cat([x.rgb for x in found]), grid), [x.clip for x in found]
    if net.clip is None:
        return Decoded(rgb, None)
    return Decoded(rgb, torch.cat([x for x in clip if x is not None]).unflatten(0, (len(times), *grid)))


@torch.no_grad()
def decode_cells(
    net: Decoder, times: Tensor, geometry: Geometry, rows: slice, cols: slice, *, patches_per_call: int = 32
) -> Tensor:
    """Some patches of the canvas, put together; what lies beside them is not decoded.

    Args:
        net: A decoder whose patches have the size of the geometry's.
        times: (F,) from 0 to 1.
        geometry: How patches lie in the canvas.
        rows: Rows of the grid, without a step.
        cols: Columns of the grid, without a step.
        patches_per_call: Most patches in memory at a time.

    Returns:
        Colours (F, 3, h, w) from 0 to 1 in float32, equal to the crop of `decode_canvases`.

    Raises:
        ValueError: the slices are empty or have a step, or the decoder is not of this geometry.
    """
    check_geometry(net, geometry)
    times = _on_device(net, times)
    t, r, c = cell_coordinates(times, geometry, rows, cols)
    height, width = len(range(geometry.grid[0])[rows]), len(range(geometry.grid[1])[cols])
    size = max(1, patches_per_call)
    if not isinstance(net, GridDecoder):
        patches = [net(part).rgb for part in _coordinates(t, r, c, geometry).split(size)]
    elif (height, width) == geometry.grid:  # without halos it is less work
        return decode_canvases(net, times, geometry, patches_per_call=patches_per_call).rgb
    else:
        patches = [net.forward_patch(*part).rgb for part in zip(*(x.split(size) for x in (t, r, c)), strict=True)]
    return assemble_frames(torch.cat(patches), (height, width))


@torch.no_grad()
def decode_region(
    net: Decoder, times: Tensor, geometry: Geometry, region: Sequence[int], *, patches_per_call: int = 32
) -> Tensor:
    """A rectangle of the original frame, from the patches that it touches.

    Args:
        net: A decoder whose patches have the size of the geometry's.
        times: (F,) from 0 to 1.
        geometry: How patches lie in the frame.
        region: top, left, height, width in pixels of the original frame.
        patches_per_call: Most patches in memory at a time.

    Returns:
        Colours (F, 3, height, width) from 0 to 1, equal to the crop of the restored frame: black where the video was
        cropped.

    Raises:
        InputError: the region is not inside of the frame.
        ValueError: the decoder is not of this geometry.
    """
    top, left, height, width = check_region(region, geometry)
    found = torch.zeros(len(times), 3, height, width, device=_device(net))
    cells, source, target = [], [], []
    for start, size, corner, crop, pad, patch in zip(
        (top, left), (height, width), geometry.corner, geometry.crop, geometry.pad, geometry.patch, strict=True
    ):
        first, last = max(start, corner), min(start + size, corner + crop)  # in the frame
        if first >= last:
            return found
        begin, end = first - corner + pad, last - corner + pad  # in the canvas
        cells.append(slice(begin // patch, -(-end // patch)))
        source.append(slice(begin - begin // patch * patch, end - begin // patch * patch))
        target.append(slice(first - start, last - start))
    decoded = decode_cells(net, times, geometry, cells[0], cells[1], patches_per_call=patches_per_call)
    found[(..., *target)] = decoded[(..., *source)]
    return found


def check_region(region: Sequence[int], geometry: Geometry, field: str = "data.region") -> tuple[int, int, int, int]:
    """A rectangle inside of the original frame.

    Args:
        region: top, left, height, width in pixels.
        geometry: Of the frame.
        field: The name of the region for the message.

    Raises:
        InputError: these are not four whole numbers, or not inside of the frame.
    """
    height, width = geometry.frame
    if len(region) != 4 or any(not isinstance(v, int) or isinstance(v, bool) for v in region):
        raise InputError(f"{field} is {list(region)}, expected four whole numbers: top, left, height, width")
    top, left, rows, columns = region
    if top < 0 or left < 0 or rows < 1 or columns < 1 or top + rows > height or left + columns > width:
        raise InputError(
            f"{field} is {list(region)}, expected top, left, height, width inside of the frame's {height}x{width}"
        )
    return top, left, rows, columns


def check_geometry(net: Decoder, geometry: Geometry) -> None:
    """Refuse a decoder of other patches: what it gives would be put together wrongly.

    Raises:
        ValueError: the decoder is not of this geometry.
    """
    if isinstance(net, GridDecoder):
        own, expected = (net.config.frame, net.grid), (geometry.canvas, geometry.grid)
    else:
        own, expected = net.patch, geometry.patch
    if own != expected:
        raise ValueError(f"a decoder of {own}, expected {expected} by the geometry")


@torch.no_grad()
def embed_moments(net: Decoder, times: Tensor, geometry: Geometry, *, patches_per_call: int = 256) -> Tensor:
    """Embeddings of all patches, for the cost of the stages before their head.

    Args:
        net: A decoder with a head for embeddings, whose patches have the size of the geometry's.
        times: (F,) from 0 to 1.
        geometry: How patches lie in the canvas.
        patches_per_call: Most patches in memory at a time; a whole frame in grid mode, if it has more.

    Returns:
        (F, rows, cols, D) of length one, float32.

    Raises:
        InputError: the decoder has no such head.
        ValueError: the decoder is not of this geometry.
    """
    check_geometry(net, geometry)
    if net.clip is None:
        raise InputError("the network has no head for embeddings, expected one that was trained with data.embeddings")
    times = _on_device(net, times)
    if isinstance(net, GridDecoder):
        parts = times.split(_frames_per_call(geometry, patches_per_call))
        return torch.cat([found for part in parts if (found := net.embed(part)) is not None])
    cells = cell_coordinates(times, geometry, slice(None), slice(None))
    found = [net.embed(part) for part in _coordinates(*cells, geometry).split(max(1, patches_per_call))]
    return torch.cat(found).unflatten(0, (len(times), *geometry.grid))


def _coordinates(t: Tensor, r: Tensor, c: Tensor, geometry: Geometry) -> Tensor:
    """(N, 3) of t, y, x, the latter at the centres of patches."""
    rows, cols = geometry.grid
    return torch.stack([t, (r + 0.5) / rows, (c + 0.5) / cols], dim=1)


def _frames_per_call(geometry: Geometry, patches: int) -> int:
    return max(1, patches // geometry.per_frame)


def _device(net: Decoder) -> torch.device:
    return next(net.parameters()).device


def _on_device(net: Decoder, times: Tensor) -> Tensor:
    if times.ndim != 1 or not len(times):
        raise ValueError(f"times of shape {tuple(times.shape)}, expected (F,) with at least one moment")
    return times.to(_device(net), torch.float32)
