"""A csv or json that lists the cases."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_cli.errors import InputError
from lit_dsunet.files import read_json
from lit_dsunet.readers.shared import (
    BINARY,
    classes_of,
    count_channels,
    existing_folder,
    make_table,
    name_list,
    stem_of,
)
from lit_dsunet.samples import VolumeSample, VolumeTable

__all__ = ["CaseList", "list_files"]

_SPLITS = ("train", "val", "test")
_OF_OTHERS = ("dataset.json", "dataset_description.json", "participants.json", "splits_final.json")


@dataclass(frozen=True)
class CaseList:
    """A csv or json that lists the cases, for files that lie anywhere.

    Columns of a csv: `image` (or `image_0`, `image_1`, ... for one file per channel) and `label`; optional `name`
    (otherwise that of the image file), `patient` (otherwise the name) and `split` (`train`, `val` or `test`, otherwise
    `train`). A json is a list of objects with these keys, `image` a text or a list; or an object with that list as
    `cases`, and optionally `channels` and `labels`. Paths are absolute or relative to the list.

    Args:
        root: The list, or a folder with a single csv or json.
        channels: Names of the channels; None takes those of the json, or numbers them.
        labels: Value in the label files by class name; None takes those of the json, or 0 (background) and 1 (lesion).
        check_headers: Whether to compare channels, shapes and affines by the headers of all files.
    """

    root: str | Path
    channels: tuple[str, ...] | None = None
    labels: Mapping[str, int] | None = None
    check_headers: bool = True

    def read(self) -> VolumeTable:
        """List the cases.

        Raises:
            InputError: No list, a row without image or label, a file that is missing, or an unknown split.
        """
        path = _the_list(Path(self.root))
        content: dict[str, Any] = {}
        if path.suffix.lower() == ".json":
            loaded = read_json(path)
            content = loaded if isinstance(loaded, dict) else {"cases": loaded}
            rows = _json_rows(path, content.get("cases"))
        else:
            rows = _csv_rows(path)
        if not rows:
            raise InputError(f"{path}: no case, expected at least one")
        labels = self.labels or content.get("labels") or BINARY
        if not isinstance(labels, Mapping):
            raise InputError(f"{path}: labels is {labels!r}, expected the value of each class name")
        classes = classes_of(labels, "labels" if self.labels else f"{path}: labels")
        splits: dict[str, list[VolumeSample]] = {split: [] for split in _SPLITS}
        for where, row in rows:
            split = row.get("split") or "train"
            if split not in _SPLITS:
                raise InputError(f"{where}: split is {split!r}, expected train, val or test")
            splits[split].append(_sample(path.parent, where, row))
        first = next(sample for part in splits.values() for sample in part)
        count = count_channels(first)
        names = self.channels or content.get("channels") or tuple(f"channel_{i}" for i in range(count))
        if not isinstance(names, list | tuple):
            raise InputError(f"{path}: channels is {names!r}, expected a list of names")
        names = ("image",) if names == ("channel_0",) else tuple(map(str, names))
        if len(names) != count:
            raise InputError(f"case {first.name}: {count} channels, expected {len(names)} ({name_list(names)})")
        return make_table(splits, names, classes, headers=self.check_headers)


def list_files(folder: Path) -> list[Path]:
    """The csv and json files of a folder that may list cases."""
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".csv", ".json") and p.name[0] != ".")
    return [p for p in paths if p.name not in _OF_OTHERS]


def _the_list(root: Path) -> Path:
    if root.is_file():
        return root
    files = list_files(existing_folder(root))
    if len(files) != 1:
        found = name_list([p.name for p in files]) or "no csv or json"
        raise InputError(f"{root}: {found}, expected a single csv or json that lists the cases")
    return files[0]


def _csv_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte-order mark
    except OSError as error:
        raise InputError(f"{path}: cannot read this file ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: no text, expected UTF-8") from None
    first_line = text.split("\n", 1)[0]
    reader = csv.reader(io.StringIO(text), delimiter=max(",;\t", key=first_line.count))
    columns = [cell.strip() for cell in next(reader, [])]
    images = [c for c in columns if c == "image" or re.fullmatch(r"image_\d+", c)]
    numbered = [f"image_{i}" for i in range(len(images))]
    if images != ["image"] and (not images or sorted(images) != sorted(numbered)):
        raise InputError(f"{path}: columns are {name_list(columns)}, expected image, or image_0, image_1, ...")
    unknown = [c for c in columns if c not in (*images, "name", "label", "patient", "split")]
    if unknown or "label" not in columns or len(set(columns)) < len(columns):
        raise InputError(f"{path}: columns are {name_list(columns)}, expected name, image, label, patient, split once")
    rows: list[tuple[str, dict[str, Any]]] = []
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        where = f"{path}, line {reader.line_num}"
        if len(cells) != len(columns):
            raise InputError(f"{where}: {len(cells)} cells, expected {len(columns)} as in the header")
        row: dict[str, Any] = dict(zip(columns, (cell.strip() for cell in cells), strict=True))
        row["image"] = [row[c] for c in (images if images == ["image"] else numbered)]
        rows.append((where, row))
    return rows


def _json_rows(path: Path, cases: Any) -> list[tuple[str, dict[str, Any]]]:
    if not isinstance(cases, list):
        raise InputError(f"{path}: no list of cases, expected a list of objects, or an object with it as cases")
    rows: list[tuple[str, dict[str, Any]]] = []
    for i, case in enumerate(cases):
        where = f"{path}, case {i}"
        if not isinstance(case, dict):
            raise InputError(f"{where}: {case!r}, expected an object with image and label")
        unknown = set(case) - {"name", "image", "label", "patient", "split"}
        if unknown:
            raise InputError(f"{where}: keys {name_list(sorted(unknown))}, expected name, image, label, patient, split")
        image = case.get("image")
        rows.append((where, {**case, "image": image if isinstance(image, list) else [image]}))
    return rows


def _sample(folder: Path, where: str, row: dict[str, Any]) -> VolumeSample:
    for key, value in (("image", i) for i in row["image"]) if row["image"] else [("image", None)]:
        if not isinstance(value, str) or not value:
            raise InputError(f"{where}: {key} is {value!r}, expected the path of a file")
    if not isinstance(row.get("label"), str) or not row["label"]:
        raise InputError(f"{where}: label is {row.get('label')!r}, expected the path of a file")
    images = tuple(folder / image for image in row["image"])
    name = str(row.get("name") or stem_of(images[0]))
    for file in (*images, folder / row["label"]):
        if not file.is_file():
            raise InputError(f"{where}, case {name}: {file} is missing, expected this file")
    return VolumeSample(name, images, folder / row["label"], str(row.get("patient") or name))
