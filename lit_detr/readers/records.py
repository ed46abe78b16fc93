"""From what a reader found to a checked table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from lit_cli.errors import InputError
from lit_detr.readers.shared import image_sizes
from lit_detr.samples import DetectionSample, DetectionTable

__all__ = ["Fix", "Record", "checked_boxes", "class_list", "group_of", "make_samples", "make_table"]

Fix = Literal["none", "clip"]
TOLERANCE = 1.0  # px; annotation tools round, or count from 1, and reach this far over the border


# ---- Boxes -----------------------------------------------------------------------------------------------------------


def checked_boxes(
    boxes: NDArray[np.float64], sizes: NDArray[np.int64], fix: Fix, where: Callable[[int], str]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Boxes inside their images.

    What reaches over the border by at most 1 px is rounding, and is cut without a word.

    Args:
        boxes: (N, 4) x1 y1 x2 y2 in pixels.
        sizes: (N, 2) height and width of each box's image.
        fix: `none` refuses every other fault; `clip` cuts boxes to the image and marks those without area.
        where: Names a box in an error.

    Returns:
        (N, 4) boxes in the image, and (N,) whether each is to be kept.

    Raises:
        InputError: A box with a number that is not finite, without area, or beyond the image.

    Example:
        >>> checked_boxes(np.array([[-0.5, 2, 6, 9.0]]), np.array([[9, 6]]), "none", str)[0].tolist()
        [[0.0, 2.0, 6.0, 9.0]]
    """
    limit = np.tile(sizes[:, ::-1].astype(np.float64), 2)

    def refuse(bad: Any, fault: Callable[[int], str]) -> None:
        if bad.any():
            i = int(bad.argmax())
            numbers = " ".join(f"{v:g}" for v in boxes[i])
            raise InputError(f"{where(i)}: box {numbers} (x1 y1 x2 y2) {fault(i)}")

    refuse(~np.isfinite(boxes).all(1), lambda _: "is not finite, expected four numbers")
    beyond = np.maximum(-boxes.min(1, initial=0), (boxes - limit).max(1, initial=0))
    inside = np.clip(boxes, 0, limit).astype(np.float32)
    empty = np.any(boxes[:, 2:] <= boxes[:, :2], axis=1)
    gone = empty | np.any(inside[:, 2:] <= inside[:, :2], axis=1)
    if fix == "none":
        refuse(empty, lambda _: "has no area, expected x1 < x2 and y1 < y2 (fix: clip leaves it out)")
        size = "{1:g} x {0:g}".format
        refuse(
            (beyond > TOLERANCE + 1e-6) | gone,
            lambda i: f"is not inside the image, expected it within {size(*sizes[i])} pixels (fix: clip cuts it)",
        )
    return inside, ~gone


@dataclass
class Record:
    """One image as a reader found it, before its boxes are checked.

    Attributes:
        image: The file.
        key: Its path below the folder of the images, which `group: stem` cuts.
        source: The file that annotates it, for errors.
        size: (height, width) as annotated; None is read from the image.
        image_id: As annotated, or None.
        group: Value of the field that groups; None follows the option.
        boxes: x1 y1 x2 y2 in pixels.
        labels: Class indices.
        crowd: Whether to pass over the box; empty is none of them.
        area: As annotated; empty is that of the boxes.
        marks: What a box is called in an error, such as `line 3`.
    """

    image: Path
    key: str
    source: Path
    size: tuple[int, int] | None = None
    image_id: int | None = None
    group: str | None = None
    boxes: list[Sequence[float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    crowd: list[bool] = field(default_factory=list)
    area: list[float] = field(default_factory=list)
    marks: list[str] = field(default_factory=list)

    def add(self, box: Sequence[float], label: int, mark: str, *, crowd: bool = False) -> None:
        """Append a box without annotated area."""
        self.boxes.append(box)
        self.labels.append(label)
        self.marks.append(mark)
        self.crowd.append(crowd)


def group_of(key: str, name: str, group: str) -> str:
    """The group of an image.

    Args:
        key: Its path below the folder of the images.
        name: Its name in the table.
        group: `none`: each image is its own; `stem`: frames of a video, whose name is that of the file up to the last
            underscore, with the folders before it.

    >>> group_of("v/IR_BIRD_005_0040.webp", "train/v/IR_BIRD_005_0040", "stem")
    'v/IR_BIRD_005'
    """
    if group == "none":
        return name
    folder, _, file = key.rpartition("/")
    stem = file.rpartition(".")[0] or file
    stem = stem.rpartition("_")[0] or stem
    return f"{folder}/{stem}" if folder else stem


def make_samples(root: Path, records: Sequence[Record], group: str, fix: Fix) -> tuple[list[DetectionSample], int]:
    """Samples of one split, and how many boxes were left out.

    Images without a size are opened for it.

    Raises:
        InputError: An image that cannot be opened for its size, or a faulty box.
    """
    unknown = [r for r in records if r.size is None]
    for record, size in zip(unknown, image_sizes([r.image for r in unknown]), strict=True):
        record.size = size
    counts = [len(r.boxes) for r in records]
    owner = np.repeat(np.arange(len(records)), counts)
    sizes = np.array([r.size for r in records], np.int64).reshape(-1, 2)[owner]
    boxes = np.array([b for r in records for b in r.boxes], np.float64).reshape(-1, 4)
    firsts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def where(i: int) -> str:
        record = records[owner[i]]
        return f"{record.source}, {record.marks[i - firsts[owner[i]]]}"

    boxes, keep = checked_boxes(boxes, sizes, fix, where)
    own_area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1, dtype=np.float32)
    samples: list[DetectionSample] = []
    for i, record in enumerate(records):
        rows = slice(firsts[i], firsts[i + 1])
        kept = keep[rows]
        area = np.array(record.area, np.float32) if record.area else own_area[rows]
        crowd = np.array(record.crowd, np.bool_) if record.crowd else np.zeros(counts[i], np.bool_)
        name = _name(root, record.image)
        samples.append(
            DetectionSample(
                name=name,
                image=record.image,
                boxes=boxes[rows][kept],
                labels=np.array(record.labels, np.int64)[kept],
                area=area[kept],
                crowd=crowd[kept],
                size=record.size,
                image_id=i if record.image_id is None else record.image_id,
                group=group_of(record.key, name, group) if record.group is None else record.group,
            )
        )
    return samples, int((~keep).sum())


def _name(root: Path, image: Path) -> str:
    path = image.relative_to(root) if image.is_relative_to(root) else image
    return path.with_suffix("").as_posix()


# ---- The table -------------------------------------------------------------------------------------------------------


def class_list(names: Iterable[object], where: str) -> list[str]:
    """Class names, which must be different texts, and at least one."""
    names = list(names)
    if not names:
        raise InputError(f"{where}: class names are missing, expected at least one")
    for i, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"{where}: a class is called {name!r}, expected a text")
        if name in names[:i]:
            raise InputError(f"{where}: two classes are called {name!r}, expected different names")
    return [str(name) for name in names]


def make_table(
    root: Path,
    splits: Mapping[str, Sequence[Record]],
    class_names: Sequence[str],
    category_ids: Sequence[int] | None = None,
    *,
    group: str = "none",
    fix: Fix = "none",
) -> DetectionTable:
    """Check the boxes of all splits and put the samples together.

    Raises:
        InputError: An empty split, no box in the whole set, a file that two samples share, or a faulty box.
    """
    out: dict[str, list[DetectionSample]] = {}
    left_out = 0
    seen: dict[str, str] = {}
    for split, records in splits.items():
        if not records:
            raise InputError(f"{root}: split {split!r} is empty, expected at least one image")
        out[split], dropped = make_samples(root, records, group, fix)
        left_out += dropped
        for sample in out[split]:
            if sample.name in seen:
                raise InputError(
                    f"{sample.image}: image {sample.name!r} is in split {seen[sample.name]!r} and again in {split!r}, "
                    "expected it once"
                )
            seen[sample.name] = split
    if not any(len(s.boxes) for samples in out.values() for s in samples):
        raise InputError(f"{root}: no box in any split, expected an annotated data set")
    if left_out:
        rank_zero_warn(f"{root}: {left_out} boxes without area inside their image were left out", category=UserWarning)
    ids = list(range(len(class_names))) if category_ids is None else list(category_ids)
    return DetectionTable(out, list(class_names), ids)
