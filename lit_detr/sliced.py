"""Sliced inference: large images cut on the device, tiles of all of them in full batches, detections merged there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_convert

from lit_cli.errors import InputError
from lit_detr.merging import Merged, Views, merge_images
from lit_detr.samples import DetectionSample, Output
from lit_detr.store import read_image
from lit_detr.tiles import Pair, checked_tile, cut, tile_grid

__all__ = ["Slicing", "best", "detect_sliced"]

Image = Tensor | NDArray[np.uint8] | str | Path
Network = Callable[[Tensor, Tensor | None], Output]
CHUNK = 2**24  # values of an image that are float at a time while it is scaled down


def detect_sliced(
    network: Network,
    image: Image | Sequence[Image],
    tile: int | Sequence[int] = 640,
    *,
    overlap: float = 0.25,
    batch: int = 16,
    frame: int | Sequence[int] | None = None,
    whole: bool = False,
    most: int = 300,
    limit: int = 3000,
    threshold: float = 0.5,
    min_score: float = 0.0,
    channels: int | None = None,
    device: torch.device | str | None = None,
) -> list[Merged]:
    """Detect in images of any size.

    Images go to the device one after the other, are cut there, and their tiles fill batches across images; what the
    tiles saw is merged there. Memory depends on the largest image and on `batch`, not on the number of images.
    Precision is that of the `torch.autocast` around the call.

    Args:
        network: A `LitDETR`, its network, or anything that gives an `Output` for images (B, C, H, W) from 0 to 1 and a
            mask (B, H, W) or None.
        image: (C, H, W) uint8 or a file, or a list of them.
        tile: Side, or [height, width], of the tiles in pixels of the images.
        overlap: Share of a tile that the next one covers again; at least as long as the objects are, that is best.
        batch: Tiles per forward pass.
        frame: What each tile is scaled to, with the same proportions; by default the image size that a `LitDETR` was
            trained with, else the tile's own.
        whole: One more pass over the image as a whole, scaled into a frame, for objects that are longer than the
            overlap of two tiles.
        most: Detections of a tile that count.
        limit: Detections of an image that are compared.
        threshold: Overlap from which on two detections are of one object, see `lit_detr.merging.merge`.
        min_score: Detections at or below are left out.
        channels: Of files, 1 or 3; by default what a `LitDETR` was trained with, else 3.
        device: By default the network's.

    Returns:
        For each image, or the only one, boxes in its pixels, scores and labels, the best first.

    Raises:
        InputError: An option is out of range, or an image cannot be read.

    Example:
        >>> def one_box(images, mask):
        ...     boxes = torch.tensor([0.5, 0.5, 0.25, 0.25]).expand(1, len(images), 1, 4)
        ...     return Output(torch.full((1, len(images), 1, 2), -1.0), boxes, boxes[0, ..., :2], boxes[0])
        >>> [found] = detect_sliced(one_box, torch.zeros(3, 64, 112, dtype=torch.uint8), tile=64, min_score=0.2)
        >>> found.boxes[::2].tolist()  # of two tiles, each with two classes
        [[24.0, 24.0, 40.0, 40.0], [72.0, 24.0, 88.0, 40.0]]
    """
    stored = dict(getattr(network, "hparams", {}))
    if frame is None:
        sides = (tile, tile) if isinstance(tile, int) else tuple(tile)
        own: Sequence[int] = stored.get("image_size") or sides
        frame = own if len(sides) == 2 and sides[0] * own[1] == sides[1] * own[0] else sides
    frame = (frame, frame) if isinstance(frame, int) else (int(frame[0]), int(frame[-1]))
    if min(batch, most, limit) < 1:
        raise InputError(f"detect_sliced: expected batch, most and limit of 1 or more, got {batch}, {most}, {limit}")
    slicing = Slicing(
        tile=checked_tile(tile, overlap, frame),
        overlap=overlap,
        frame=frame,
        batch=batch,
        whole=whole,
        most=most,
        limit=limit,
        merging={"threshold": threshold, "min_score": min_score},
    )
    if device is None:
        weight = next(network.parameters(), None) if isinstance(network, nn.Module) else None
        device = weight.device if weight is not None else "cpu"
    images: Sequence[Any] = [image] if isinstance(image, Tensor | np.ndarray | str | Path) else image
    wanted = int(channels or stored.get("in_channels") or 3)
    was = isinstance(network, nn.Module) and network.training
    if was:
        network.eval()  # type: ignore[attr-defined]
    try:
        return slicing.detect(network, (_opened(i, wanted) for i in images), torch.device(device))
    finally:
        if was:
            network.train()  # type: ignore[attr-defined]


def _opened(image: Image, channels: int) -> Tensor:
    if isinstance(image, str | Path):
        path = Path(image)
        empty = np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, bool)
        sample = DetectionSample(path.name, path, *empty, size=None, image_id=0, group="")
        image = read_image(sample, channels).transpose(2, 0, 1)
    values = image if isinstance(image, Tensor) else torch.from_numpy(np.ascontiguousarray(image))
    if values.ndim != 3 or values.dtype != torch.uint8 or not values.numel():
        raise InputError(
            f"image: expected (C, H, W) uint8, got {tuple(values.shape)} {str(values.dtype).removeprefix('torch.')}"
        )
    return values


class _Part(NamedTuple):
    """Where what a network saw lies in its image; heights and widths in pixels of the image."""

    start: Pair
    extent: tuple[float, float]  # beyond which nothing is seen: its inner borders
    span: tuple[float, float]  # of the whole frame, padding included
    size: Pair  # of the image
    content: Pair  # of the frame, that is image
    least: float  # detections with no longer side are left to others


@dataclass(frozen=True)
class Slicing:
    """The geometry of sliced inference.

    Attributes:
        tile: (height, width) in pixels of the images.
        overlap: Share of a tile that the next one covers again.
        frame: (height, width) of what the network sees.
        batch: Tiles per forward pass.
        whole: Whether to look at the whole image as well.
        most: Detections of a tile that count.
        limit: Detections of an image that are compared.
        pad_batches: Fill a last, smaller batch, so that a compiled network meets one batch size.
        merging: Options of `merge_images`.
    """

    tile: Pair
    overlap: float
    frame: Pair
    batch: int = 16
    whole: bool = False
    most: int = 300
    limit: int = 3000
    pad_batches: bool = False
    merging: dict[str, Any] = field(default_factory=dict)

    def count(self, size: Pair) -> int:
        """Forward passes of single tiles that an image (height, width) takes.

        >>> Slicing((640, 640), 0.25, (640, 640)).count((2048, 3840))
        32
        """
        tiles = len(tile_grid(size, self.tile, self.overlap))
        return tiles + (self.whole and tiles > 1)

    @torch.no_grad()
    def detect(self, network: Network, images: Iterable[Tensor], device: torch.device) -> list[Merged]:
        """Detections of images (C, H, W) uint8, which are taken one after the other."""
        parts: list[_Part] = []
        counts: list[int] = []
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        waiting: list[Tensor] = []

        def run() -> None:
            frames = torch.cat(waiting)
            waiting.clear()
            own = parts[len(parts) - len(frames) :]
            found.append(self._run(network, frames, [p.content for p in own]))

        for image in images:
            size = image.shape[-2], image.shape[-1]
            image = _send(image, device)
            grid = tile_grid(size, self.tile, self.overlap)
            starts = _send(torch.from_numpy(grid), device)
            tiles = [self._part(size, (int(y), int(x))) for y, x in grid]
            first = 0
            while first < len(tiles):
                last = first + self.batch - sum(len(w) for w in waiting)
                waiting.append(self._tiles(image, starts[first:last]))
                parts += tiles[first:last]
                first = last
                if sum(len(w) for w in waiting) == self.batch:
                    run()
            counts.append(len(tiles))
            if self.whole and len(tiles) > 1:
                part = self._whole(size)
                waiting.append(_padded(_scaled(image[None], part.content), self.frame))
                parts.append(part)
                counts[-1] += 1
                if sum(len(w) for w in waiting) == self.batch:
                    run()
        if waiting:
            run()
        if not counts:
            return []
        boxes, scores, labels = (torch.cat(values) for values in zip(*found, strict=True))
        return self._merge(boxes, scores, labels, parts, counts)

    def _part(self, size: Pair, start: Pair) -> _Part:
        (height, width), scale = self.tile, self.frame[0] / self.tile[0]
        seen = min(height, size[0]), min(width, size[1])
        content = max(1, round(seen[0] * scale)), max(1, round(seen[1] * scale))
        return _Part(start, (height, width), (height, width), size, content, 0.0)

    def _whole(self, size: Pair) -> _Part:
        scale = min(self.frame[0] / size[0], self.frame[1] / size[1])
        content = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
        span = self.frame[0] / scale, self.frame[1] / scale
        # What is no longer than the overlap lies whole in some tile, where it can be seen better.
        return _Part((0, 0), size, span, size, content, self.overlap * min(self.tile))

    def _tiles(self, image: Tensor, starts: Tensor) -> Tensor:
        """(n, C, *frame) float32, grey values from 0 to 255."""
        seen = min(self.tile[0], image.shape[-2]), min(self.tile[1], image.shape[-1])
        content = self._part((image.shape[-2], image.shape[-1]), (0, 0)).content
        return _padded(_scaled(cut(image, starts, seen), content), self.frame)

    def _run(self, network: Network, frames: Tensor, contents: Sequence[Pair]) -> tuple[Tensor, Tensor, Tensor]:
        """A forward pass: boxes as shares of the frame, scores and labels of each, the best first."""
        count = len(frames)
        if self.pad_batches and count < self.batch:
            frames = torch.cat([frames, frames[-1:].expand(self.batch - count, -1, -1, -1)])
            contents = [*contents, *[contents[-1]] * (self.batch - count)]
        mask = None
        if any(c != self.frame for c in contents):
            sides = _send(torch.tensor(contents), frames.device)
            rows = torch.arange(self.frame[0], device=frames.device) < sides[:, :1]
            columns = torch.arange(self.frame[1], device=frames.device) < sides[:, 1:]
            mask = rows[:, :, None] & columns[:, None, :]
        output = network(frames / 255, mask)
        boxes, scores, labels = best(output.logits[-1], output.boxes[-1], self.most)
        return boxes[:count], scores[:count], labels[:count]

    def _merge(
        self, boxes: Tensor, scores: Tensor, labels: Tensor, parts: Sequence[_Part], counts: Sequence[int]
    ) -> list[Merged]:
        rows = [(*p.start, *p.extent, *p.size, *p.span, p.least) for p in parts]
        table = _send(torch.tensor(rows, dtype=torch.float32), boxes.device)
        views = Views(table[:, 0:2], table[:, 2:4], table[:, 4:6])
        boxes = boxes * table[:, 6:8].flip(1).repeat(1, 2)[:, None]
        if self.whole:
            longer = (boxes[..., 2:] - boxes[..., :2]).amax(-1)
            scores = scores.masked_fill(longer < table[:, 8:], -torch.inf)
        return merge_images(boxes, scores, labels, views, counts, limit=self.limit, **self.merging)


def best(logits: Tensor, boxes: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The highest scores over queries and classes.

    Args:
        logits: (B, Q, K).
        boxes: (B, Q, 4) cx cy w h.
        most: How many are kept at most.

    Returns:
        (B, D, 4) x1 y1 x2 y2 in the same unit, (B, D) scores from 0 to 1, (B, D) int64 labels.

    Example:
        >>> b, s, k = best(torch.tensor([[[0.0, 9], [-9, -9]]]), torch.tensor([[[0.5, 0.5, 1, 1]] * 2]), 1)
        >>> b.tolist(), k.tolist()
        ([[[0.0, 0.0, 1.0, 1.0]]], [[1]])
    """
    scores, index = logits.float().sigmoid().flatten(1).topk(min(most, logits[0].numel()))
    query, label = index // logits.shape[2], index % logits.shape[2]
    found = boxes.float().gather(1, query[..., None].expand(-1, -1, 4))
    return box_convert(found, "cxcywh", "xyxy"), scores, label


# ---- pixels ----------------------------------------------------------------------------------------------------------


def _send(values: Tensor, device: torch.device) -> Tensor:
    """To the device, without waiting for it."""
    pinned = device.type == "cuda" and values.device.type == "cpu" and not values.is_pinned()
    return (values.pin_memory() if pinned else values).to(device, non_blocking=True)


def _padded(frames: Tensor, size: Pair) -> Tensor:
    """Black to the right and below."""
    return F.pad(frames, (0, size[1] - frames.shape[-1], 0, size[0] - frames.shape[-2]))


def _scaled(images: Tensor, size: Pair) -> Tensor:
    """(B, C, h, w) uint8 to float32 of another size, in whole grey values, as `fit_frame` does it on the host.

    Smaller by the mean of the area that a pixel covers, larger by bilinear interpolation.
    """
    height, width = images.shape[-2:]
    if (height, width) == size:
        return images.float()
    with torch.autocast(images.device.type, enabled=False):
        if size[0] > height or size[1] > width:
            return F.interpolate(images.float(), size, mode="bilinear", align_corners=False).round_()
        down, across = (_areas(n, m, images.device) for n, m in ((height, size[0]), (width, size[1])))
        # Only so many rows are float at a time: an image of 8K would be 400 MB.
        step = max(1, CHUNK // (images.shape[0] * images.shape[1] * width))
        rows = [images[..., y : y + step, :].float() @ across.T for y in range(0, height, step)]
        return (down @ torch.cat(rows, dim=-2)).round_()


@functools.lru_cache(maxsize=8)
def _areas(before: int, after: int, device: torch.device) -> Tensor:
    """(after, before) share of each pixel in each pixel of a shorter line."""
    edges = np.arange(after + 1) * (before / after)
    pixels = np.arange(before)
    shared = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    weights = np.maximum(shared, 0) * (after / before)
    return torch.from_numpy(weights.astype(np.float32)).to(device)
