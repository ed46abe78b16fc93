"""YOLO: a yaml, images, and a text file of normalised boxes for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lit_cli.errors import InputError
from lit_detr.readers.records import Fix, Record, class_list, make_table
from lit_detr.readers.shared import (
    SPLITS,
    existing_folder,
    find_images,
    image_sizes,
    name_list,
    pair_files,
    read_text,
    split_folders,
)
from lit_detr.samples import DetectionTable

__all__ = ["Yolo", "find_yaml"]

_NAMES = ("classes.txt", "obj.names")


@dataclass(frozen=True)
class Yolo:
    """`data.yaml` with `names`, `path`, `train`, `val`, `test`; labels are lines of `class cx cy width height`.

    A split is a folder, a text file that lists images, or a list of such. The label of `images/train/a.jpg` is
    `labels/train/a.txt`, the last `images` of the path replaced; without one it lies beside the image. An image without
    a label file, or with an empty one, is one without objects; a split without any label file is refused, and so is a
    label without image. Without a yaml, `images/<split>` and `labels/<split>`, or `<split>/images` and
    `<split>/labels`, are read, with the names from `class_names`, `classes.txt` or `obj.names`.

    Sizes come from the headers of the images; an EXIF orientation is not applied.

    Args:
        root: The folder of the data set, or the yaml itself.
        class_names: By class index, where no file has them.
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
        file = find_yaml(Path(self.root))
        root = existing_folder(self.root if file is None else file.parent)
        if file is None:
            names = dict(enumerate(self._names(root)))
            splits = {
                split: [(p, p.relative_to(images).as_posix(), text) for p, text in _pairs(images, labels)]
                for split, (images, labels) in split_folders(root, ("labels",)).items()
            }
            if not splits:
                raise InputError(f"{root}: no data.yaml, expected it, or images/train with labels/train")
        else:
            content = _content(file)
            names = _yaml_names(content, file)
            if self.class_names is not None and [*names.values()] != [*self.class_names]:
                raise InputError(
                    f"{file}: names are {name_list(names.values())}, expected those of class_names or none"
                )
            root, splits = _yaml_splits(content, file)
        index = {category: i for i, category in enumerate(names)}
        records = {split: _records(found, index) for split, found in splits.items()}
        return make_table(root, records, [*names.values()], [*names], group=self.group, fix=self.fix)

    def _names(self, root: Path) -> list[str]:
        if self.class_names is not None:
            return class_list(self.class_names, "class_names")
        for file in (root / name for name in _NAMES):
            if file.is_file():
                return class_list([n.strip() for n in read_text(file).splitlines() if n.strip()], str(file))
        raise InputError(f"{root}: class names are missing, expected data.yaml, classes.txt or class_names")


def find_yaml(root: Path) -> Path | None:
    """The yaml of a data set: the root itself, `data.yaml`, `dataset.yaml`, or the only one with `names`."""
    if root.is_file():
        return root if root.suffix.lower() in (".yaml", ".yml") else None
    files = [root / f"{stem}.{suffix}" for stem in ("data", "dataset") for suffix in ("yaml", "yml")]
    there = [f for f in files if f.is_file()]
    if not there and root.is_dir():
        there = [f for s in ("yaml", "yml") for f in sorted(root.glob(f"*.{s}")) if "names:" in read_text(f)]
        there = there if len(there) == 1 else []
    return there[0] if there else None


def _content(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(read_text(file))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise InputError(f"{file}{line}: {getattr(error, 'problem', None) or 'broken'}, expected yaml") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: no mapping, expected names, train and val")
    return content


def _yaml_names(content: dict[str, Any], file: Path) -> dict[int, str]:
    names = content.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        raise InputError(f"{file}: class names are missing, expected names as a list or as a mapping from numbers")
    for key in names:
        if type(key) is not int or key < 0:
            raise InputError(f"{file}: names has key {key!r}, expected whole numbers from 0")
    names = {key: str(names[key]) for key in sorted(names)}  # yaml reads the name `1` as a number
    class_list(names.values(), f"{file}, names")
    count = content.get("nc", len(names))
    if count != len(names):
        raise InputError(f"{file}: nc is {count!r}, expected {len(names)} as names has")
    return names


def _yaml_splits(content: dict[str, Any], file: Path) -> tuple[Path, dict[str, list[tuple[Path, str, Path | None]]]]:
    base = content.get("path") or ""
    if not isinstance(base, str):
        raise InputError(f"{file}: path is {base!r}, expected a folder")
    # The path of a yaml that came from elsewhere is often that of another machine: the yaml's own folder is next.
    bases = [b for b in dict.fromkeys([file.parent / base, file.parent]) if b.is_dir()]
    root = bases[0]
    splits: dict[str, list[tuple[Path, str, Path | None]]] = {}
    for split, aliases in SPLITS.items():
        value = next((content[a] for a in aliases if content.get(a)), None)
        if value is None:
            continue
        found: list[tuple[Path, str, Path | None]] = []
        for entry in value if isinstance(value, list) else [value]:
            if not isinstance(entry, str):
                raise InputError(f"{file}: {split} is {entry!r}, expected a folder or a text file")
            # Exports are known that say ../train/images and mean train/images.
            options = [b / e for b in bases for e in dict.fromkeys([entry, entry.removeprefix("../")])]
            place = next((o for o in options if o.exists()), None)
            if place is None:
                raise InputError(f"{file}: {split}: {options[0]} is missing, expected a folder or a text file")
            found += _of_folder(place) if place.is_dir() else _of_list(place, bases)
        if not found:
            raise InputError(f"{file}: {split}: no image in {value}, expected at least one")
        if not any(text for *_, text in found):
            wanted = _label_of(found[0][0])
            raise InputError(f"{file}: {split}: not one label file, expected such as {wanted}")
        splits[split] = found
    if not splits:
        raise InputError(f"{file}: train and val are missing, expected at least one of them")
    return root, splits


def _pairs(images: Path, labels: Path) -> list[tuple[Path, Path | None]]:
    return pair_files(images, labels, ".txt", complete=False)


def _of_folder(folder: Path) -> list[tuple[Path, str, Path | None]]:
    images = find_images(folder)
    labels = _label_of(folder / "x.jpg").parent
    if labels != folder and labels.is_dir():
        return [(p, p.relative_to(folder).as_posix(), text) for p, text in _pairs(folder, labels)]
    nested = [(p, _label_of(p)) for p in images]
    return [(p, p.relative_to(folder).as_posix(), t if t.is_file() else None) for p, t in nested]


def _of_list(file: Path, bases: Sequence[Path]) -> list[tuple[Path, str, Path | None]]:
    found: list[tuple[Path, str, Path | None]] = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        image = next((p for b in [*bases, file.parent] if (p := b / line.strip()).is_file()), None)
        if image is None:
            raise InputError(
                f"{file}, line {number}: image {line.strip()} is missing, expected a path below {bases[0]}"
            )
        label = _label_of(image)
        found.append((image, line.strip().removeprefix("./"), label if label.is_file() else None))
    return found


def _label_of(image: Path) -> Path:
    """The last folder called images becomes labels; without one the label lies beside the image."""
    parts = [*image.with_suffix(".txt").parts]
    folders = [i for i, part in enumerate(parts[:-1]) if part == "images"]
    if folders:
        parts[folders[-1]] = "labels"
    return Path(*parts)


def _records(found: Sequence[tuple[Path, str, Path | None]], index: dict[int, int]) -> list[Record]:
    records: list[Record] = []
    sizes = image_sizes([image for image, *_ in found])
    for (image, key, text), (height, width) in zip(found, sizes, strict=True):
        record = Record(image, key, text or image, (height, width))
        lines = read_text(text).splitlines() if text is not None else []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{text}, line {number}"
            try:
                category, cx, cy, w, h = (float(v) for v in line.split())
            except ValueError:
                raise InputError(
                    f"{where}: {line.strip()[:60]!r}, expected 5 numbers: class cx cy width height"
                ) from None
            if category not in index:
                raise InputError(f"{where}: class {category:g} is unknown, expected one of {name_list(index)}")
            box = ((cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height)
            record.add(box, index[int(category)], f"line {number}")
        records.append(record)
    return records
