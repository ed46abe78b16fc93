"""Original, reconstruction and amplified error side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["comparison", "draw_grid"]

Picture = NDArray[np.uint8]
Image = Tensor | NDArray[np.uint8]

GAIN = 8.0  # an error of 32 levels is white
_GREY, _WHITE = (48, 48, 48), (255, 255, 255)
_FONT, _LINE, _SCALE = cv2.FONT_HERSHEY_SIMPLEX, cv2.LINE_AA, 0.45
_BAR, _GAP = 24, 4  # pixels: a line of text at least, and what lies between pictures


def comparison(
    target: Image,
    prediction: Image,
    caption: str = "",
    *,
    psnr_db: float | None = None,
    error: bool = True,
    gain: float = GAIN,
    grid: Sequence[int] | None = None,
    least_width: int = 320,
    most_width: int = 960,
) -> Picture:
    """Original | reconstruction | error, with a line of text above.

    The error is the mean absolute difference of the colours, times `gain`, from black to bright yellow.

    Args:
        target: The original: (H, W, 3) uint8, or a tensor (3, H, W) of uint8 or of floats from 0 to 1.
        prediction: The reconstruction, likewise and of the same size.
        caption: Above the original.
        psnr_db: Of the reconstruction; by default computed from what is given here.
        error: Whether the third picture is drawn.
        gain: Factor of the error.
        grid: Draw the borders of so many rows and columns of patches.
        least_width: Narrower pictures are enlarged towards it, by a whole factor.
        most_width: Wider ones are shrunk to it.

    Returns:
        (h, w, 3) uint8 RGB.

    Raises:
        ValueError: the two differ in size, or are no RGB pictures.

    Example:
        >>> original = np.zeros((40, 80, 3), np.uint8)
        >>> comparison(original, original + 10, "frame 0", grid=(2, 4)).shape
        (184, 968, 3)
    """
    wanted, found = _levels(target), _levels(prediction)
    if wanted.shape != found.shape:
        raise ValueError(f"a reconstruction of {found.shape[:2]} pixels, expected {wanted.shape[:2]} of the original")
    difference = found - wanted
    if psnr_db is None:
        psnr_db = -10 * math.log10(float(np.square(difference / 255, dtype=np.float64).mean()) + 1e-9)
    panels = [(_bytes(wanted), caption or "original"), (_bytes(found), f"reconstruction  {psnr_db:.2f} dB")]
    if error:
        strength = np.clip(gain * np.abs(difference).mean(2), 0, 255).astype(np.uint8)
        colours = cv2.applyColorMap(strength, cv2.COLORMAP_INFERNO)
        panels.append((np.asarray(colours[:, :, ::-1], np.uint8), f"error x {gain:g}"))
    columns: list[Picture] = []
    for picture, text in panels:
        scaled = _scaled(picture, least_width, most_width)
        shown = scaled if grid is None else draw_grid(scaled, grid)
        if columns:
            columns.append(np.full((len(columns[0]), _GAP, 3), _GREY, np.uint8))
        columns.append(np.concatenate([_bar(shown.shape[1], text), shown]))
    return np.concatenate(columns, axis=1)


def draw_grid(picture: Picture, grid: Sequence[int]) -> Picture:
    """The borders of rows x columns of equal patches over a copy, half transparent.

    >>> picture = np.zeros((4, 6, 3), np.uint8)
    >>> draw_grid(picture, (1, 2))[0, :, 0].tolist()
    [0, 0, 0, 128, 0, 0]
    """
    out = picture.copy()
    (rows, cols), (height, width) = grid, picture.shape[:2]
    for r in range(1, rows):
        out[round(r * height / rows)] = picture[round(r * height / rows)] // 2 + 128
    for c in range(1, cols):
        out[:, round(c * width / cols)] = picture[:, round(c * width / cols)] // 2 + 128
    return out


def _levels(image: Image) -> NDArray[np.float32]:
    """(H, W, 3) from 0 to 255, not rounded."""
    if isinstance(image, Tensor):
        plain = image.detach().permute(1, 2, 0) if image.ndim == 3 else image
        levels = plain.float() if image.dtype == torch.uint8 else plain.float().clamp(0, 1) * 255
        array = levels.cpu().numpy()
    elif image.dtype == np.uint8:
        array = image.astype(np.float32)
    else:
        raise ValueError(f"an array of {image.dtype}, expected uint8, or a tensor")
    if array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"a picture of shape {tuple(image.shape)}, expected (H, W, 3), or a tensor (3, H, W)")
    return array


def _bytes(levels: NDArray[np.float32]) -> Picture:
    return levels.round().astype(np.uint8)


def _scaled(picture: Picture, least: int, most: int) -> Picture:
    height, width = picture.shape[:2]
    if width > most:
        size = (most, max(1, round(height * most / width)))
        return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)
    zoom = max(1, min(math.ceil(least / width), most // width))
    # Pixels stay squares: interpolation would hide the errors that the picture is for.
    return np.asarray(cv2.resize(picture, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_NEAREST), np.uint8)


def _bar(width: int, text: str) -> Picture:
    """A grey line with text, larger over wide pictures, shortened to what fits."""
    size = max(1.0, width / 640)
    line = np.full((round(_BAR * size), width, 3), _GREY, np.uint8)
    while text and cv2.getTextSize(text, _FONT, _SCALE * size, 1)[0][0] > width - 12:
        text = text[:-1]
    cv2.putText(line, text, (6, round(16 * size)), _FONT, _SCALE * size, _WHITE, 1, _LINE)
    return line
