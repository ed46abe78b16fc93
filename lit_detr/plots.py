"""Pictures of what was found: hits, misses and false alarms over the image, tiny objects magnified beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from lit_detr.coco import ImageResult, match_image

__all__ = ["COLOURS", "Mark", "detection_picture", "marks"]

Kind = Literal["hit", "miss", "false alarm", "crowd", "found"]
Box = tuple[float, float, float, float]

COLOURS: dict[Kind, tuple[int, int, int]] = {
    "hit": (80, 220, 100),
    "miss": (255, 210, 60),
    "false alarm": (255, 70, 70),
    "crowd": (150, 150, 150),
    "found": (90, 200, 255),
}
"""RGB. Found boxes that match no object are false alarms; those that lie in a crowd are neither. Where the objects are
not known all of them are just found."""

_GREY, _WHITE, _BLACK = (48, 48, 48), (255, 255, 255), (0, 0, 0)
_FONT, _LINE = cv2.FONT_HERSHEY_SIMPLEX, cv2.LINE_AA
_COUNTED: dict[Kind, str] = {"hit": "hits", "miss": "misses", "false alarm": "false alarms"}
_WORST: tuple[Kind, ...] = ("miss", "false alarm", "hit", "found", "crowd")

_RGB = NDArray[np.uint8]


class Mark(NamedTuple):
    """One box of a picture.

    Attributes:
        kind: What it is.
        box: x1 y1 x2 y2 in pixels of the image.
        label: Class index.
        score: Of the detection, None for a miss and a crowd.
        truth: The object that a hit found.
    """

    kind: Kind
    box: Box
    label: int
    score: float | None
    truth: Box | None = None


def marks(result: ImageResult, threshold: float = 0.5, iou: float = 0.5) -> list[Mark]:
    """Tell hits from misses and false alarms, by the matching of COCO.

    Args:
        result: Detections and objects of an image.
        threshold: Detections with a lower score are left out.
        iou: Least overlap of a hit.

    Returns:
        Misses first, then false alarms, hits and crowds.

    Example:
        >>> box, one, no = np.array([[10.0, 10, 20, 20]]), np.ones(1), np.zeros(1, bool)
        >>> found = np.concatenate([box + 1, box + 50]), np.array([0.9, 0.6]), np.array([0, 0])
        >>> marked = marks(ImageResult(0, *found, box, np.zeros(1, int), one * 100, no))
        >>> [(m.kind, m.score) for m in marked]
        [('false alarm', 0.6), ('hit', 0.9)]
    """
    keep = result.scores >= threshold
    shown = result._replace(boxes=result.boxes[keep], scores=result.scores[keep], labels=result.labels[keep])
    found: list[Mark] = []
    taken: set[int] = set()
    for label in np.unique(np.concatenate([shown.labels, shown.true_labels])).tolist():
        match = match_image(shown, label, thresholds=np.array([iou]))
        for d, box, ignored in zip(match.order.tolist(), match.taken[0].tolist(), match.ignored[0], strict=True):
            if not ignored:
                kind: Kind = "hit" if box >= 0 else "false alarm"
                truth = _box(shown.true_boxes[box]) if box >= 0 else None
                found.append(Mark(kind, _box(shown.boxes[d]), label, float(shown.scores[d]), truth))
                taken.add(box)
    for i, (box, label) in enumerate(zip(result.true_boxes, result.true_labels.tolist(), strict=True)):
        if result.crowd[i] or i not in taken:
            found.append(Mark("crowd" if result.crowd[i] else "miss", _box(box), label, None))
    return sorted(found, key=lambda m: (_WORST.index(m.kind), -(m.score or 0)))


def detection_picture(
    image: _RGB,
    found: Sequence[Mark],
    class_names: Sequence[str] = (),
    *,
    caption: str = "",
    known: bool = True,
    least_side: int = 512,
    crops: int = 6,
    tiny: float = 32.0,
) -> _RGB:
    """Draw marks over an image, with magnified crops of tiny objects at the right.

    Args:
        image: (C, H, W) uint8, C 1 or 3; of other numbers the first channel is shown.
        found: What `marks` gives; the crops show the first ones.
        class_names: By class index; numbers where it is empty.
        caption: Of the line at the top, before the counts.
        known: Whether the objects are; if not, the line says how many boxes were found.
        least_side: Smaller images are enlarged by a whole factor towards this height.
        crops: Greatest number of crops; none where no mark is tiny.
        tiny: Longest side in pixels of what gets a crop.

    Returns:
        (H', W', 3) uint8 RGB.
    """
    zoom = max(1, math.ceil(least_side / image.shape[1]))
    grey = image if image.shape[0] == 3 else image[:1]
    rgb = np.array(np.broadcast_to(grey.transpose(1, 2, 0), (*image.shape[1:], 3)), order="C")
    # Pixels stay squares: interpolation would show edges that nobody measured.
    canvas = np.asarray(cv2.resize(rgb, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_NEAREST), np.uint8)
    numbered = [i for i, m in enumerate(found) if max(m.box[2] - m.box[0], m.box[3] - m.box[1]) <= tiny][:crops]
    for i, mark in reversed(list(enumerate(found))):  # the most important on top
        number = str(numbered.index(i) + 1) if i in numbered else ""
        _frame(canvas, mark, zoom, (0.0, 0.0), " ".join(part for part in (number, _text(mark, class_names)) if part))
    parts = [canvas]
    if numbered:
        parts.append(_column(rgb, [found[i] for i in numbered], found, class_names, canvas.shape[0], crops))
    picture = np.concatenate(parts, axis=1)
    return np.concatenate([_header(picture.shape[1], found, caption, known), picture])


def _box(box: NDArray[Any]) -> Box:
    x1, y1, x2, y2 = (float(v) for v in box)
    return x1, y1, x2, y2


def _text(mark: Mark, class_names: Sequence[str]) -> str:
    name = class_names[mark.label] if mark.label < len(class_names) else str(mark.label)
    return name if mark.score is None else f"{name} {mark.score:.2f}"


def _frame(
    canvas: _RGB,
    mark: Mark,
    zoom: float,
    origin: tuple[float, float],
    text: str,
    margin: int = 3,
    colour: tuple[int, int, int] | None = None,
) -> None:
    """A rectangle around a box, a little outside of it, with a text above or, at the top, below."""
    height, width = canvas.shape[:2]
    x1, y1, x2, y2 = ((v - o) * zoom for v, o in zip(mark.box, (*origin, *origin), strict=True))
    left, top = max(0, round(x1) - margin), max(0, round(y1) - margin)
    right, bottom = min(width - 1, round(x2) + margin - 1), min(height - 1, round(y2) + margin - 1)
    colour = colour or COLOURS[mark.kind]
    cv2.rectangle(canvas, (left, top), (right, bottom), colour, 1)
    if text:
        (w, h), _ = cv2.getTextSize(text, _FONT, 0.4, 1)
        y = top - 4 if top - 4 - h >= 0 else min(bottom + h + 4, height - 2)
        _write(canvas, text, (max(0, min(left, width - w - 1)), y), colour)


def _write(canvas: _RGB, text: str, at: tuple[int, int], colour: tuple[int, int, int]) -> None:
    """With a dark rim, readable on any ground; a thicker stroke would have other widths."""
    for x, y in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        cv2.putText(canvas, text, (at[0] + x, at[1] + y), _FONT, 0.4, _BLACK, 1, _LINE)
    cv2.putText(canvas, text, at, _FONT, 0.4, colour, 1, _LINE)


def _header(width: int, found: Sequence[Mark], caption: str, known: bool) -> _RGB:
    """Caption and counts, in the colours of the boxes."""
    line = np.full((24, width, 3), _GREY, np.uint8)
    x = 8
    texts = [(caption, _WHITE)] if caption else []
    counted: dict[Kind, str] = _COUNTED if known else {"found": "found"}
    for kind, name in counted.items():
        count = sum(m.kind == kind for m in found)
        texts.append((f"{count} {kind if count == 1 else name}", COLOURS[kind]))
    for text, colour in texts:
        _write(line, text, (x, 16), colour)
        x += cv2.getTextSize(text, _FONT, 0.4, 1)[0][0] + 16
    return line


def _column(
    rgb: _RGB, shown: Sequence[Mark], found: Sequence[Mark], class_names: Sequence[str], height: int, places: int
) -> _RGB:
    """Crops below each other: squares of about three times the object, with everything that lies in them.

    The object that a hit found is framed in white.
    """
    side = max(48, height // max(places, 1))
    rows = []
    for number, mark in enumerate(shown, start=1):
        x1, y1, x2, y2 = mark.box
        reach = max(8.0, 1.5 * max(x2 - x1, y2 - y1))
        # A whole number of pixels around the centre; what lies outside of the image is black.
        pixels = math.ceil(2 * reach)
        left, top = round((x1 + x2) / 2 - pixels / 2), round((y1 + y2) / 2 - pixels / 2)
        crop = np.zeros((pixels, pixels, 3), np.uint8)
        ys, xs = slice(max(0, top), top + pixels), slice(max(0, left), left + pixels)
        inside = rgb[ys, xs]
        y, x = ys.start - top, xs.start - left
        crop[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
        tile = np.asarray(cv2.resize(crop, (side, side), interpolation=cv2.INTER_NEAREST), np.uint8)
        zoom = side / pixels
        for other in reversed(found):
            o = other.box
            if o[0] < left + pixels and o[2] > left and o[1] < top + pixels and o[3] > top:
                if other.truth is not None:
                    _frame(tile, other._replace(box=other.truth), zoom, (left, top), "", 1, _WHITE)
                _frame(tile, other, zoom, (left, top), "", 1)
        _write(tile, f"{number} {_text(mark, class_names)}", (5, 14), COLOURS[mark.kind])
        cv2.rectangle(tile, (0, 0), (side - 1, side - 1), _GREY, 1)
        rows.append(tile)
    column = np.concatenate(rows)[:height]
    return np.concatenate([column, np.full((height - len(column), side, 3), _GREY, np.uint8)])
