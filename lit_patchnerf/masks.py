"""Which pixels training must not see, so that a network has to invent them: inpainting."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_cli.errors import InputError
from lit_patchnerf.patches import Geometry

__all__ = ["inpaint_squares", "load_mask"]

Mask = NDArray[np.bool_]

CENTRES = ((1 / 2, 1 / 2), (1 / 4, 1 / 4), (1 / 4, 3 / 4), (3 / 4, 1 / 4), (3 / 4, 3 / 4))  # shares of rows and columns
EXPECTED = "expected inpaint_N, such as inpaint_50, or an image file that is white where pixels are hidden"


def inpaint_squares(size: int, canvas: Sequence[int]) -> Mask:
    """HNeRV's mask: five squares, in the middle of an image and of its four quarters.

    A square's first row is its centre, rounded down, less half of its size, rounded down. HNeRV's squares of an odd
    size are one pixel smaller; these have the size that was asked for.

    Args:
        size: Rows and columns of a square.
        canvas: (height, width) of the image.

    Returns:
        (height, width), True where hidden.

    Raises:
        InputError: a square does not lie within the image.

    Source: `inpaint_N` of https://github.com/haochen-rye/HNeRV (its meaning).

    Example:
        >>> mask = inpaint_squares(2, (8, 16))
        >>> int(mask.sum()), bool(mask[3:5, 7:9].all()), bool(mask[1:3, 3:5].all())
        (20, True, True)
    """
    height, width = canvas
    hidden = np.zeros((height, width), np.bool_)
    for down, right in CENTRES:
        top, left = int(down * height) - size // 2, int(right * width) - size // 2
        if size < 1 or min(top, left) < 0 or top + size > height or left + size > width:
            raise InputError(
                f"data.mask is inpaint_{size}, expected squares of 1 pixel or more that lie within the canvas of "
                f"{height}x{width}: about {min(height, width) // 2} at most"
            )
        hidden[top : top + size, left : left + size] = True
    return hidden


def load_mask(mask: str, geometry: Geometry) -> Tensor:
    """The mask of all frames of a video.

    Args:
        mask: `inpaint_N` for `inpaint_squares` on the canvas; or an image file of the size of the original frame, which
            is cropped and padded as frames are, or of the canvas. Grey values from 128 up are hidden.
        geometry: Of the video. Where both sizes are equal, so are both readings.

    Returns:
        (1, 1, H, W) bool on the canvas, True where hidden. Padding is not hidden: it is no pixel of the frame at all.

    Raises:
        InputError: there is no such file, it is no image or of another size, or it hides no pixel, or all of them.
    """
    squares = re.fullmatch(r"inpaint_(\d+)", mask, re.ASCII)
    drawn = inpaint_squares(int(squares[1]), geometry.canvas) if squares else _read(Path(mask), geometry)
    hidden = np.zeros(geometry.canvas, np.bool_)
    hidden[geometry.content] = drawn[geometry.content]
    kept = hidden[geometry.content]
    if not kept.any() or kept.all():
        raise InputError(
            f"data.mask: {mask} hides {'all' if kept.any() else 'none'} of the {kept.size} pixels of a cropped frame, "
            "expected some of them"
        )
    return torch.from_numpy(hidden)[None, None]


def _read(path: Path, geometry: Geometry) -> Mask:
    """An image file as a mask on the canvas."""
    if not path.is_file():
        raise InputError(f"data.mask: no such file {path}, {EXPECTED}")
    try:
        image = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_GRAYSCALE)
    except (OSError, cv2.error):  # an empty file is an error of OpenCV's
        image = None
    if image is None:
        raise InputError(f"data.mask: {path} cannot be read as an image, {EXPECTED}")
    white = np.asarray(image) >= 128
    if white.shape == geometry.frame:
        placed = np.zeros(geometry.canvas, np.bool_)
        placed[geometry.content] = white[geometry.region]
        return placed
    if white.shape != geometry.canvas:
        (a, b), (c, d), (e, f) = white.shape, geometry.frame, geometry.canvas
        raise InputError(
            f"data.mask: {path} has {a}x{b} pixels, expected {c}x{d} as the video's frames have, or {e}x{f} as what is "
            "kept of them"
        )
    return white
