"""COCO json."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lit_cli.errors import InputError
from lit_detr.readers.records import Fix, Record, class_list, make_table
from lit_detr.readers.shared import SPLITS, existing_folder, name_list, read_json
from lit_detr.samples import DetectionTable

__all__ = ["Coco", "find_annotations"]

_PREFIX = r"(?:instances_)?"


@dataclass(frozen=True)
class Coco:
    """One json per split, with `images`, `annotations` (`bbox` as x y width height in pixels) and `categories`.

    Found are `annotations/<split>.json` and `annotations/instances_<split>[year].json`, both also directly in the root,
    and `<split>/_annotations.coco.json`. Images lie in `images/<split>`, `<split>/images`, `<split>`, beside the json,
    in `images` or in the root; `file_name` may hold folders. An image without annotations is one without objects.
    Classes are sorted by category id, whose numbers may have gaps; all splits must agree on them.

    Args:
        root: The folder of the data set.
        files: Path of the json by split, relative to the root; None looks for them.
        images: Folder of the images, relative to the root, which is tried first.
        group: `none`, `stem` (see `group_of`), or a field of the json's images, such as `video_id`.
        fix: `none` refuses faulty boxes, `clip` cuts them to the image and leaves out what has no area.

    Example:
        >>> len(Coco("data/drone_ir", group="stem").read().splits["val"])  # doctest: +SKIP
        410
    """

    root: str | Path
    files: Mapping[str, str] | None = None
    images: str | None = None
    group: str = "none"
    fix: Fix = "none"
    prefix: ClassVar[str] = _PREFIX

    def read(self) -> DetectionTable:
        """Read all splits.

        Raises:
            InputError: A file that is missing or broken, an unknown or repeated id, or a faulty box.
        """
        root = existing_folder(self.root)
        files = {s: root / f for s, f in self.files.items()} if self.files else find_annotations(root, self.prefix)
        if not files:
            raise InputError(f"{root}: no annotations/train.json or annotations/instances_train.json, expected one")
        contents = {split: _content(path) for split, path in files.items()}
        names: dict[int, str] = {}
        for split, path in files.items():
            _merge_categories(names, contents[split]["categories"], path)
        ids = sorted(names)
        class_names = class_list([names[i] for i in ids], name_list(files.values()))
        index = {category: i for i, category in enumerate(ids)}
        places = _Places(root, self.images)
        group = self.group if self.group in ("none", "stem") else "none"
        field = None if group == self.group else self.group
        splits = {s: _records(contents[s], p, s, places, index, field, self.fix) for s, p in files.items()}
        return make_table(root, splits, class_names, ids, group=group, fix=self.fix)


def find_annotations(root: Path, prefix: str = _PREFIX) -> dict[str, Path]:
    """Annotation files by split.

    Args:
        root: The folder of the data set.
        prefix: Regular expression of what stands before the split's name.

    Raises:
        InputError: Two files could be the same split.
    """
    folders = [root / "annotations", root / "Annotations", root]
    there = [p for f in folders if f.is_dir() for p in sorted(f.glob("*.json"))]
    found: dict[str, Path] = {}
    # Training and validation images together are the training set only where neither has a file of its own.
    for split, aliases in [*SPLITS.items(), ("trainval", ("trainval",))]:
        pattern = re.compile(rf"{prefix}(?:{'|'.join(aliases)})\d*(?:_v\d+)?\.json")
        files = [p for p in there if pattern.fullmatch(p.name)]
        files += [p for a in aliases if (p := root / a / "_annotations.coco.json").is_file()]
        files = list(
            {(p.stat().st_dev, p.stat().st_ino): p for p in files}.values()
        )  # one folder under two names, on some systems
        if split == "trainval":
            split = "train"
            if found.keys() & {"train", "val"}:
                continue
        if len(files) > 1:
            raise InputError(
                f"{files[0]}: {files[1].name} could be split {split!r} as well, expected one file, or its name in files"
            )
        if files:
            found[split] = files[0]
    return {split: found[split] for split in SPLITS if split in found}


class _Places:
    """Where images may lie. Folders are listed once, as asking for each of 100,000 files is slow."""

    def __init__(self, root: Path, images: str | None) -> None:
        self.root, self.images = root, images
        self.listed: dict[Path, frozenset[str]] = {}
        if images is not None and not (root / images).is_dir():
            raise InputError(f"{root / images}: no such folder, expected the images")

    def candidates(self, split: str, file: Path) -> list[Path]:
        """Existing folders in the order in which they are tried."""
        stem = re.sub(r"^instances_", "", file.stem)
        tags = dict.fromkeys([stem, split, *SPLITS.get(split, ()), *(["trainval"] if split != "test" else [])])
        shapes = ("images/{}", "images/{}/images", "{}/images", "{}")
        folders = [self.root / shape.format(tag) for tag in tags for shape in shapes]
        folders += [file.parent, self.root / "images", self.root / "JPEGImages", self.root]
        if self.images is not None:
            folders.insert(0, self.root / self.images)
        return [f for f in dict.fromkeys(folders) if f.is_dir()]

    def find(self, name: str, folders: list[Path]) -> Path | None:
        for folder in folders:
            path = folder / name
            if path.parent not in self.listed:
                inside = os.listdir(path.parent) if path.parent.is_dir() else []  # noqa: PTH208 names suffice
                self.listed[path.parent] = frozenset(inside)
            if path.name in self.listed[path.parent]:
                return path
        return None


def _content(path: Path) -> dict[str, list[dict[str, Any]]]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: no object, expected one with images, annotations and categories")
    for key in ("images", "annotations", "categories"):
        rows = content.get(key)
        if not isinstance(rows, list):
            raise InputError(f"{path}: {key} is {_short(rows)}, expected a list")
        needed = {"images": ("file_name",), "annotations": ("image_id", "category_id", "bbox"), "categories": ("name",)}
        seen: set[int] = set()
        for i, row in enumerate(rows):
            if not isinstance(row, dict):
                raise InputError(f"{path}: {key}[{i}] is {_short(row)}, expected an object")
            number = row.get("id")
            if type(number) is not int:
                raise InputError(f"{path}: {key}[{i}]: id is {_short(number)}, expected a whole number")
            if number in seen:
                raise InputError(f"{path}: {key}[{i}]: id {number} is there a second time, expected it once")
            seen.add(number)
            for name in needed[key]:
                if name not in row:
                    raise InputError(f"{path}: {key} id {number}: {name} is missing, expected it")
    return content


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _merge_categories(names: dict[int, str], categories: list[dict[str, Any]], path: Path) -> None:
    class_list([c["name"] for c in categories], f"{path}, categories")
    for category in categories:
        known = names.setdefault(category["id"], category["name"])
        if known != category["name"]:
            raise InputError(
                f"{path}: category id {category['id']} is {category['name']!r}, expected {known!r} as in other splits"
            )


def _records(
    content: dict[str, list[dict[str, Any]]],
    path: Path,
    split: str,
    places: _Places,
    index: Mapping[int, int],
    field: str | None,
    fix: Fix,
) -> list[Record]:
    records: dict[int, Record] = {}
    folders = places.candidates(split, path)
    for row in content["images"]:
        where = f"{path}, images id {row['id']}"
        name = row["file_name"]
        if not isinstance(name, str) or not name:
            raise InputError(f"{where}: file_name is {_short(name)}, expected a path")
        name = name.replace("\\", "/").removeprefix("./")
        image = places.find(name, folders)
        if image is None:
            raise InputError(f"{where}: image {name} is missing, expected it in {name_list(folders)}")
        if field is not None and field not in row:
            raise InputError(f"{where}: {field} is missing, expected it as group is {field!r} (or group: none or stem)")
        records[row["id"]] = Record(
            image, name, path, _size(row, where), row["id"], None if field is None else str(row[field])
        )
    for row in content["annotations"]:
        where = f"{path}, annotations id {row['id']}"
        record = records.get(row["image_id"])
        if record is None:
            raise InputError(f"{where}: image_id {_short(row['image_id'])} is unknown, expected the id of an image")
        if row["category_id"] not in index:
            raise InputError(
                f"{where}: category_id {_short(row['category_id'])} is unknown, expected one of {[*index]}"
            )
        x, y, width, height = _numbers(row["bbox"], 4, f"{where}: bbox")
        (area,) = _numbers([row.get("area", width * height)], 1, f"{where}: area")
        if fix == "clip" and not (0 < area < math.inf):
            area = max(width * height, 0.0)
        if not math.isfinite(area) or (area <= 0 and width > 0 and height > 0):
            raise InputError(f"{where}: area is {area:g}, expected pixels above 0 (fix: clip takes the box's)")
        record.boxes.append((x, y, x + width, y + height))
        record.labels.append(index[row["category_id"]])
        record.area.append(area)
        record.crowd.append(bool(row.get("iscrowd", 0)))
        record.marks.append(f"annotations id {row['id']}")
    return list(records.values())


def _numbers(values: Any, count: int, where: str) -> list[float]:
    try:
        numbers = [float(v) for v in values]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count or isinstance(values, str):
        raise InputError(f"{where} is {_short(values)}, expected {count} numbers")
    return numbers


def _size(row: Mapping[str, Any], where: str) -> tuple[int, int] | None:
    if row.get("width") is None or row.get("height") is None:
        return None
    height, width = _numbers([row["height"], row["width"]], 2, f"{where}: height and width")
    if height < 1 or width < 1 or height % 1 or width % 1:
        raise InputError(f"{where}: width x height is {width:g} x {height:g}, expected whole numbers above 0")
    return int(height), int(width)
