"""Data sets of tiny objects in formats of their own: AI-TOD and VisDrone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from lit_cli.errors import InputError
from lit_detr.readers.coco import Coco
from lit_detr.readers.records import Fix, Record, class_list, make_table
from lit_detr.readers.shared import existing_folder, name_list, pair_files, read_text, split_folders
from lit_detr.samples import DetectionTable

__all__ = ["AITOD_CLASSES", "VISDRONE_CLASSES", "AiTod", "PlainText", "VisDrone"]

AITOD_CLASSES = (
    *("airplane", "bridge", "storage-tank", "ship", "swimming-pool", "vehicle", "person", "wind-mill"),  # in this order
)
VISDRONE_CLASSES = (
    *("pedestrian", "people", "bicycle", "car", "van", "truck", "tricycle", "awning-tricycle", "bus", "motor"),  # 1..10
)
_IGNORED_REGION, _OTHERS = 0, 11
_LABELS = ("annotations", "labels")


@dataclass(frozen=True)
class AiTod(Coco):
    """AI-TOD as COCO json under the names of its releases.

    `annotations/aitod_{training,validation,test}_v1.json` and `annotations/aitodv2_{train,val,test}.json`; where only
    `aitodv2_trainval.json` is there, it is `train`. Images lie where COCO's do, or in `trainval`. The published
    protocol trains on trainval and tests on test: name both in `files`.
    """

    prefix: ClassVar[str] = r"aitod(?:v\d)?_"


@dataclass(frozen=True)
class PlainText:
    """A text file per image with lines of `x1 y1 x2 y2 class`, as in the tools of AI-TOD.

    Pixels count from 0 and x2, y2 are the far edges. Layouts are those of `split_folders` with `annotations` or
    `labels`. An empty file is an image without objects, a missing one is refused.

    Args:
        root: The folder of the data set.
        class_names: In the wanted order; a line may then name the class or give its index. None takes the classes of
            AI-TOD if all are among them, else whatever the files name, sorted.
        group: `none` or `stem` (see `group_of`).
        fix: `none` refuses faulty boxes, `clip` cuts them to the image and leaves out what has no area.
    """

    root: str | Path
    class_names: Sequence[str] | None = None
    group: str = "none"
    fix: Fix = "none"

    def read(self) -> DetectionTable:
        """Read all splits.

        Raises:
            InputError: A file that is missing or broken, an unknown class, or a faulty box.
        """
        root = existing_folder(self.root)
        splits: dict[str, list[Record]] = {}
        words: list[tuple[Record, str]] = []  # the class of each box as the file has it, known to nobody yet
        for split, pairs in _pairs(root).items():
            splits[split] = []
            for image, key, text in pairs:
                record = Record(image, key, text)
                splits[split].append(record)
                for number, line in _lines(text):
                    cells = re.split(r"[,\s]+", line)
                    try:
                        box = [float(cell) for cell in cells[:4]]
                    except ValueError:
                        box = []
                    if len(box) < 4 or len(cells) < 5:
                        raise InputError(f"{text}, line {number}: {line[:60]!r}, expected x1 y1 x2 y2 class")
                    record.add(box, 0, f"line {number}")
                    words.append((record, " ".join(cells[4:])))
        names = self._names(root, {word for _, word in words})
        index = {name: i for i, name in enumerate(names)}
        index.update({str(i): i for i in range(len(names)) if str(i) not in index})
        for record in {id(record): record for record, _ in words}.values():
            record.labels.clear()
        for record, word in words:
            if word not in index:
                mark = record.marks[len(record.labels)]
                raise InputError(
                    f"{record.source}, {mark}: class {word!r} is unknown, expected one of {name_list(names)}"
                )
            record.labels.append(index[word])
        return make_table(root, splits, names, group=self.group, fix=self.fix)

    def _names(self, root: Path, words: set[str]) -> list[str]:
        if self.class_names is not None:
            return class_list(self.class_names, "class_names")
        if words <= set(AITOD_CLASSES):
            return list(AITOD_CLASSES)
        if all(word.isdecimal() for word in words):
            raise InputError(f"{root}: class names are missing as the files have numbers, expected class_names")
        return class_list(sorted(words), str(root))


@dataclass(frozen=True)
class VisDrone:
    """VisDrone-DET: `x,y,width,height,score,category,truncation,occlusion` per line, categories 1 to 10.

    Folders are `VisDrone2019-DET-{train,val,test-dev}`, or the plain names of the splits, with `images` and
    `annotations`. Boxes of score 0 are crowd. Ignored regions (category 0) and others (11) are crowd of every class,
    as a detection of any class is forgiven there; such a region is therefore in the table once per class.

    Args:
        root: The folder of the data set.
        group: `none` or `stem` (see `group_of`).
        fix: `none` refuses faulty boxes, `clip` cuts them to the image and leaves out what has no area.

    Source: the readme of the VisDrone2018-DET toolkit.
    """

    root: str | Path
    group: str = "none"
    fix: Fix = "none"

    def read(self) -> DetectionTable:
        """Read all splits.

        Raises:
            InputError: A file that is missing or broken, an unknown category, or a faulty box.
        """
        root = existing_folder(self.root)
        splits = {split: [_visdrone(*found) for found in pairs] for split, pairs in _pairs(root).items()}
        count = len(VISDRONE_CLASSES)
        return make_table(root, splits, VISDRONE_CLASSES, range(1, count + 1), group=self.group, fix=self.fix)


def _visdrone(image: Path, key: str, text: Path) -> Record:
    record = Record(image, key, text)
    for number, line in _lines(text):
        where = f"{text}, line {number}"
        try:
            # Some lines of the release end in a comma.
            x, y, width, height, score, category, _, _ = (float(cell) for cell in line.rstrip(", ").split(","))
        except ValueError:
            raise InputError(f"{where}: {line[:60]!r}, expected 8 numbers between commas") from None
        if category not in range(_OTHERS + 1):
            raise InputError(f"{where}: category {category:g} is unknown, expected 0 to {_OTHERS}")
        box = (x, y, x + width, y + height)
        if category in (_IGNORED_REGION, _OTHERS):
            for label in range(len(VISDRONE_CLASSES)):
                record.add(box, label, f"line {number}", crowd=True)
        else:
            record.add(box, int(category) - 1, f"line {number}", crowd=score == 0)
    return record


def _pairs(root: Path) -> dict[str, list[tuple[Path, str, Path]]]:
    """Image, its path below the folder of images, and its text file, by split."""
    folders = split_folders(root, _LABELS)
    if not folders:
        raise InputError(f"{root}: no images with annotations, expected train/images and train/annotations or the like")
    return {
        split: [
            (path, path.relative_to(images).as_posix(), text)
            for path, text in pair_files(images, labels, ".txt", complete=True)
            if text is not None
        ]
        for split, (images, labels) in folders.items()
    }


def _lines(path: Path) -> list[tuple[int, str]]:
    lines = enumerate((line.strip() for line in read_text(path).splitlines()), 1)
    return [(number, line) for number, line in lines if line]
