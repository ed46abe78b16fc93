"""Augmentation: geometry and colour of whole batches on the device, CLAHE and motion blur in loader workers.

What is drawn, and what becomes of the boxes, is decided on the host from the batch's seed: so the host knows how many
boxes there are without waiting for the device. Scaling, shifts, flips, crops, mosaics and pasted objects are one field
of source pixels, and the images are read once through it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_cli.errors import InputError

__all__ = ["Boxes", "DetectionAugmentation", "WorkerAugmentation", "augment_batch"]


class Boxes(NamedTuple):
    """The boxes of one image on the host."""

    boxes: NDArray[np.float32]  # (N, 4) x1 y1 x2 y2 in pixels
    labels: NDArray[np.int64]  # (N,)


@dataclass
class DetectionAugmentation:
    """Ranges of the random changes and their probabilities. Probability 0 switches off.

    Args:
        flip_h: Probability of a left-right flip.
        flip_v: Probability of a top-bottom flip.
        scale: Range of a factor, drawn evenly on a logarithmic scale; above 1 magnifies and crops.
        scale_p: Its probability.
        shift: Largest shift, as a share of each side.
        keep_p: Probability that a crop is placed around one of the objects, so that it is not lost.
        min_visible: Share of a box that must remain in the image for the box to remain.
        min_side: Shortest side of a box that remains, pixels.
        mosaic_p: Probability that an image is composed of four of its batch.
        mosaic_scale: Range of the factor of each.
        paste_p: Probability that objects of other images of the batch are pasted in.
        paste_most: So many at most.
        paste_margin: Surroundings that come along, as a share of the object's sides.
        brightness: Range of a factor.
        contrast: Range of a factor on the distance to the mean.
        gamma: Range of an exponent.
        noise: Largest standard deviation of Gaussian noise; the image spans 0 to 1.
        colour_p: Probability of each of these four.
        plain_from: Share of the run from which on mosaics and pasting are off.
    """

    flip_h: float = 0.5
    flip_v: float = 0.0
    scale: tuple[float, float] = (0.8, 1.6)
    scale_p: float = 0.8
    shift: float = 0.1
    keep_p: float = 0.9
    min_visible: float = 0.4
    min_side: float = 1.0
    mosaic_p: float = 0.0
    mosaic_scale: tuple[float, float] = (0.5, 1.0)
    paste_p: float = 0.0
    paste_most: int = 3
    paste_margin: float = 0.25
    brightness: tuple[float, float] = (0.8, 1.25)
    contrast: tuple[float, float] = (0.8, 1.25)
    gamma: tuple[float, float] = (0.8, 1.25)
    noise: float = 0.02
    colour_p: float = 0.3
    plain_from: float = 0.85

    def check(self) -> None:
        """Raise `InputError` with one line if a value makes no sense."""
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            where = f"data.augment.{name}: expected"
            if isinstance(value, (tuple, list)):
                if len(value) != 2 or not 0 < value[0] <= value[1] < float("inf"):
                    raise InputError(f"{where} two numbers above 0 in ascending order, got {value}")
            elif name.endswith("_p") or name in ("flip_h", "flip_v", "min_visible", "plain_from"):
                if not 0 <= value <= 1:
                    raise InputError(f"{where} a share from 0 to 1, got {value}")
            elif not 0 <= value < float("inf"):
                raise InputError(f"{where} 0 or more, got {value}")

    @property
    def composes(self) -> bool:
        """Whether images of a batch get into each other."""
        return self.mosaic_p > 0 or self.paste_p > 0


class _Piece(NamedTuple):
    """A rectangle of a new image and where its pixels come from: source = (place - shift) / scale, per axis."""

    image: int  # position in the batch of what is read
    rect: tuple[int, int, int, int]  # x0 y0 x1 y1 of what is written
    scale: tuple[float, float]  # along x and y, negative for a flip
    shift: tuple[float, float]


def augment_batch(
    images: Tensor,
    boxes: Sequence[Boxes],
    options: DetectionAugmentation,
    seed: int,
    *,
    progress: float = 0.0,
) -> tuple[Tensor, list[Boxes]]:
    """Augment a batch on the device it lies on.

    Args:
        images: (B, C, H, W) uint8, or floating from 0 to 1.
        boxes: Of each image.
        options: Ranges and probabilities.
        seed: Everything drawn follows from it; 0 or more.
        progress: Share of the run that is done.

    Returns:
        (B, C, H, W) float32 from 0 to 1, and the boxes on the host.

    Example:
        >>> image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
        >>> image[..., 2:4, 1:3] = 255
        >>> box = Boxes(np.array([[1, 2, 3, 4]], np.float32), np.zeros(1, np.int64))
        >>> flips = DetectionAugmentation(flip_h=1, scale_p=0, shift=0, colour_p=0)
        >>> new, kept = augment_batch(image, [box], flips, seed=0)
        >>> kept[0].boxes.tolist(), new[0, 0, 2, 5:7].tolist()
        ([[5.0, 2.0, 7.0, 4.0]], [1.0, 1.0])
    """
    rng = np.random.default_rng((seed, 0))
    height, width = images.shape[-2:]
    composing = progress < options.plain_from
    pieces, kept = _draw(boxes, (height, width), options, rng, composing)
    values = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    return _colour(_read(values, pieces), options, np.random.default_rng((seed, 1)), seed), kept


# ---- what is drawn, on the host -------------------------------------------------------------------------------------


def _draw(
    boxes: Sequence[Boxes],
    size: tuple[int, int],
    options: DetectionAugmentation,
    rng: np.random.Generator,
    composing: bool,
) -> tuple[list[list[_Piece]], list[Boxes]]:
    height, width = size
    pieces: list[list[_Piece]] = []
    kept: list[Boxes] = []
    for i in range(len(boxes)):
        whole = (0, 0, width, height)
        if composing and len(boxes) > 1 and rng.random() < options.mosaic_p:
            x, y = (round(rng.uniform(0.35, 0.65) * side) for side in (width, height))
            rects = [(0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)]
            sources = [i, *rng.choice(len(boxes), 3)]
            limits = options.mosaic_scale
        else:
            rects, sources = [whole], [i]
            limits = options.scale if rng.random() < options.scale_p else (1.0, 1.0)
        mine, parts = [], []
        for rect, source in zip(rects, sources, strict=True):
            piece = _place(int(source), rect, boxes[int(source)].boxes, size, limits, options, rng)
            mine.append(piece)
            parts.append(_through(boxes[int(source)], piece, options))
        found = Boxes(np.concatenate([p.boxes for p in parts]), np.concatenate([p.labels for p in parts]))
        if composing and len(boxes) > 1 and rng.random() < options.paste_p:
            found = _paste(i, found, boxes, mine, size, options, rng)
        pieces.append(mine)
        kept.append(found)
    return pieces, kept


def _place(
    source: int,
    rect: tuple[int, int, int, int],
    boxes: NDArray[np.float32],
    size: tuple[int, int],
    limits: tuple[float, float],
    options: DetectionAugmentation,
    rng: np.random.Generator,
) -> _Piece:
    """Scale, shift and flips of what fills a rectangle."""
    factor = float(np.exp(rng.uniform(np.log(limits[0]), np.log(limits[1]))))
    flips = (rng.random() < options.flip_h, rng.random() < options.flip_v)
    anchor = boxes[rng.integers(len(boxes))] if len(boxes) and rng.random() < options.keep_p else None
    scales, shifts = [], []
    for axis, side in enumerate((size[1], size[0])):
        low, high = rect[axis], rect[axis + 2]
        room = (high - low) - factor * side
        # The image may lie anywhere inside of the rectangle, or the rectangle inside of the image, and a little beyond.
        beyond = options.shift * (high - low)
        first, last = sorted((0.0, room))
        start = low + rng.uniform(first - beyond, last + beyond)
        if anchor is not None:
            a, b = float(anchor[axis]) * factor, float(anchor[axis + 2]) * factor
            if flips[axis]:
                a, b = factor * side - b, factor * side - a
            if b - a <= high - low:  # as near to what was drawn as keeps the object whole
                start = float(np.clip(start, low - a, high - b))
        scales.append(-factor if flips[axis] else factor)
        shifts.append(start + factor * side if flips[axis] else start)
    return _Piece(source, rect, (scales[0], scales[1]), (shifts[0], shifts[1]))


def _through(boxes: Boxes, piece: _Piece, options: DetectionAugmentation) -> Boxes:
    """Boxes of the source in the new image, cut to the piece's rectangle; what is hardly left of is dropped."""
    scale, shift = np.tile(piece.scale, 2), np.tile(piece.shift, 2)
    new = boxes.boxes * scale + shift
    new = np.concatenate([np.minimum(new[:, :2], new[:, 2:]), np.maximum(new[:, :2], new[:, 2:])], axis=1)
    area = np.prod(new[:, 2:] - new[:, :2], axis=1)
    low, high = np.tile(piece.rect[:2], 2), np.tile(piece.rect[2:], 2)
    cut = np.clip(new, low, high)
    sides = cut[:, 2:] - cut[:, :2]
    keep = (sides.min(axis=1, initial=np.inf) >= options.min_side) & (
        sides.prod(axis=1) >= options.min_visible * area - 1e-6
    )
    return Boxes(cut[keep].astype(np.float32), boxes.labels[keep])


def _paste(
    image: int,
    found: Boxes,
    boxes: Sequence[Boxes],
    pieces: list[_Piece],
    size: tuple[int, int],
    options: DetectionAugmentation,
    rng: np.random.Generator,
) -> Boxes:
    """Add objects of other images where nothing is."""
    height, width = size
    others = [(j, n) for j, b in enumerate(boxes) if j != image for n in range(len(b.boxes))]
    if not others:
        return found
    new, labels = list(found.boxes), list(found.labels)
    for index in rng.choice(len(others), min(options.paste_most, len(others)), replace=False):
        source, number = others[index]
        box = boxes[source].boxes[number]
        margin = options.paste_margin * (box[2:] - box[:2])
        low = np.maximum(np.floor(box[:2] - margin), 0).astype(int)
        high = np.minimum(np.ceil(box[2:] + margin), (width, height)).astype(int)
        w, h = high - low
        if w >= width or h >= height:
            continue
        taken = np.array(new, np.float32).reshape(-1, 4)
        for _ in range(10):
            x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            apart = (taken[:, 0] >= x + w) | (taken[:, 2] <= x) | (taken[:, 1] >= y + h) | (taken[:, 3] <= y)
            if apart.all():
                step = np.array([x, y]) - low
                pieces.append(
                    _Piece(source, (x, y, x + int(w), y + int(h)), (1.0, 1.0), (float(step[0]), float(step[1])))
                )
                new.append((box + np.tile(step, 2)).astype(np.float32))
                labels.append(boxes[source].labels[number])
                break
    return Boxes(np.array(new, np.float32).reshape(-1, 4), np.array(labels, np.int64))


# ---- pixels, on the device ------------------------------------------------------------------------------------------


def _send(values: NDArray[Any], device: torch.device) -> Tensor:
    """To the device, without waiting for it."""
    out = torch.from_numpy(values)
    return (out.pin_memory() if device.type == "cuda" else out).to(device, non_blocking=True)


def _read(images: Tensor, pieces: Sequence[Sequence[_Piece]]) -> Tensor:
    """The new images, bilinear; black where a source does not reach."""
    device, (batch, _, height, width) = images.device, images.shape
    most = max(len(p) for p in pieces)
    table = np.zeros((most, batch, 9), np.float32)
    for b, own in enumerate(pieces):
        for p, piece in enumerate(own):
            table[p, b] = (piece.image, *piece.rect, *piece.scale, *piece.shift)
    rows = _send(table, device)
    x = torch.arange(width, device=device) + 0.5
    y = torch.arange(height, device=device) + 0.5
    # A rectangle is a product of intervals, so coordinates along x and along y would do for one piece; several overlap.
    place = torch.zeros(batch, height, width, device=device)
    across, down = torch.zeros_like(place), torch.zeros_like(place)
    for row in rows:
        source, x0, y0, x1, y1, scale_x, scale_y, shift_x, shift_y = row.view(batch, 9, 1, 1).unbind(1)
        here = (x > x0) & (x < x1) & ((y > y0[..., 0]) & (y < y1[..., 0]))[..., None]
        place = torch.where(here, source, place)
        across = torch.where(here, (x - shift_x) / torch.where(scale_x == 0, 1, scale_x), across)
        down = torch.where(here, ((y[:, None] - shift_y) / torch.where(scale_y == 0, 1, scale_y)), down)
    return _bilinear(images, place.long(), across - 0.5, down - 0.5)


def _bilinear(images: Tensor, place: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Values at (place, y, x), each (B, H, W); 0 outside."""
    channels, height, width = images.shape[1:]
    flat = images.permute(1, 0, 2, 3).reshape(channels, -1)
    left, top = x.floor(), y.floor()
    right_share, bottom_share = x - left, y - top
    out = torch.zeros(channels, *place.shape, device=images.device)
    for dx, wx in ((0, 1 - right_share), (1, right_share)):
        for dy, wy in ((0, 1 - bottom_share), (1, bottom_share)):
            column, line = left + dx, top + dy
            inside = (column >= 0) & (column < width) & (line >= 0) & (line < height)
            index = (place * height + line.clamp(0, height - 1).long()) * width + column.clamp(0, width - 1).long()
            out += flat[:, index.flatten()].view_as(out) * (wx * wy * inside)
    return out.transpose(0, 1).contiguous()


def _colour(images: Tensor, options: DetectionAugmentation, rng: np.random.Generator, seed: int) -> Tensor:
    """Brightness, contrast, gamma and noise of each image, as far as drawn."""
    count = len(images)
    chosen = rng.random((4, count)) < options.colour_p
    limits = (options.brightness, options.contrast, options.gamma)
    factors = np.stack([np.exp(rng.uniform(np.log(low), np.log(high), count)) for low, high in limits])
    factors = np.where(chosen[:3], factors, 1.0)
    deviation = np.where(chosen[3], rng.uniform(0, options.noise, count), 0.0)
    if not chosen.any():
        return images
    drawn = _send(np.concatenate([factors, deviation[None]]).astype(np.float32), images.device)
    brightness, contrast, gamma, noise = drawn.view(4, count, 1, 1, 1).unbind(0)
    images = images * brightness
    mean = images.mean((1, 2, 3), keepdim=True)
    images = ((images - mean) * contrast + mean).clamp(0, 1)
    images = images.clamp_min(1e-6).pow(gamma) if chosen[2].any() else images
    if chosen[3].any():
        generator = torch.Generator(images.device).manual_seed(seed)
        images = images + noise * torch.randn(images.shape, generator=generator, device=images.device)
    return images.clamp(0, 1)


# ---- in loader workers ----------------------------------------------------------------------------------------------


class WorkerAugmentation:
    """Contrast-limited histogram equalisation and motion blur by albumentations; neither moves a box.

    Args:
        clahe_p: Probability of CLAHE.
        motion_blur_p: Probability of motion blur.
        blur_limit: Largest kernel of the blur, odd pixels from 3.

    Raises:
        InputError: a value out of range, or albumentations is not installed.
    """

    def __init__(self, clahe_p: float = 0.0, motion_blur_p: float = 0.0, blur_limit: int = 5) -> None:
        for name, value in (("clahe_p", clahe_p), ("motion_blur_p", motion_blur_p)):
            if not 0 <= value <= 1:
                raise InputError(f"data.{name}: expected a probability from 0 to 1, got {value}")
        if blur_limit < 3 or blur_limit % 2 == 0:
            raise InputError(f"data.blur_limit: expected an odd number from 3, got {blur_limit}")
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
        try:
            import albumentations as A
        except ImportError:
            raise InputError(
                "data.clahe_p and data.motion_blur_p need albumentations: pip install 'albumentations>=2.0.8,<3'"
            ) from None
        self._clahe = A.Compose([A.CLAHE(p=1.0)])
        self._blur = A.Compose([A.MotionBlur(blur_limit=(3, blur_limit), p=1.0)])
        self.clahe_p, self.motion_blur_p = clahe_p, motion_blur_p

    def __call__(self, image: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
        """(H, W, 1 or 3) uint8 to the same, changed or not as the seed says."""
        rng = np.random.default_rng((seed, 2))
        draws = rng.random(2)
        for change, wanted in ((self._clahe, draws[0] < self.clahe_p), (self._blur, draws[1] < self.motion_blur_p)):
            if wanted:
                change.set_random_seed(int(rng.integers(2**31)))
                image = change(image=image)["image"].reshape(image.shape)
        return image
