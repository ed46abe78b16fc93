"""What the readers of several formats use; it imports none of them."""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Literal

from lit_cli.errors import InputError
from lit_landmarks.samples import IMAGE_SUFFIXES, LandmarkSample

Annotator = Literal["mean", "junior", "senior"]

ISBI2015_NAMES = (
    "sella",
    "nasion",
    "orbitale",
    "porion",
    "subspinale",
    "supramentale",
    "pogonion",
    "menton",
    "gnathion",
    "gonion",
    "lower_incisor_tip",
    "upper_incisor_tip",
    "upper_lip",
    "lower_lip",
    "subnasale",
    "soft_pogonion",
    "posterior_nasal_spine",
    "anterior_nasal_spine",
    "articulare",
)
"""The 19 landmarks of the ISBI 2015 challenge in the order of its files."""

ISBI_SPLITS = {"train": "TrainingData", "test1": "Test1Data", "test2": "Test2Data"}
_LARGEST = 1e6  # no image has so many columns; a larger coordinate is a shifted or damaged file


@dataclass(frozen=True)
class Found:
    """A sample on its way into the table: where it was read, its split, the image as the file calls it."""

    where: str
    split: str
    listed: str
    sample: LandmarkSample


def by_split(found: Iterable[Found]) -> dict[str, list[LandmarkSample]]:
    """Group by split and name each sample by its file's stem, or by its listed path where stems repeat."""
    groups: dict[str, list[Found]] = {}
    for item in found:
        groups.setdefault(item.split, []).append(item)
    splits: dict[str, list[LandmarkSample]] = {}
    for split, items in groups.items():
        first: dict[Path | None, str] = {}
        for item in items:
            if item.sample.path in first:
                raise InputError(
                    f"{item.where}: {item.listed!r} stands also in {first[item.sample.path]}, expected once"
                )
            first[item.sample.path] = item.where
        unique = len({item.sample.name for item in items}) == len(items)
        splits[split] = [
            item.sample if unique else replace(item.sample, name=PureWindowsPath(item.listed).as_posix())
            for item in items
        ]
    return splits


class Images:
    """Finds the image that an annotation names, below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._by_stem: dict[str, list[Path]] | None = None
        self._split_folders: set[str] = set()

    def find(self, name: str, split: str | None, where: str) -> Path:
        """Look relative to the root first, then for the name anywhere below, with any image extension.

        Args:
            name: File name or path with either kind of slash.
            split: The split that the annotation belongs to; folders of another split are left out. None if unknown.
            where: What to name in the error.
        """
        listed = PureWindowsPath(name)  # understands both kinds of slashes
        direct = self.root / listed.as_posix()
        if direct.is_file():
            return direct
        if self._by_stem is None:
            self._by_stem = self._index()
        found = [p for p in self._by_stem.get(listed.stem, []) if not self._of_other_split(p, split)]
        preferences: list[Callable[[Path], bool]] = [
            lambda p: p.name == listed.name,
            lambda p: p.parts[-len(listed.parts) :] == listed.parts,
            lambda p: split in p.relative_to(self.root).parts,
        ]
        for preferred in preferences:
            found = [p for p in found if preferred(p)] or found
        if not found:
            raise InputError(f"{where}: image {name!r} not found, expected it in {self.root} or a folder below")
        if len(found) > 1:
            raise InputError(f"{where}: image {name!r} is ambiguous ({found[0]}, {found[1]}), expected one such file")
        return found[0]

    def _index(self) -> dict[str, list[Path]]:
        index: dict[str, list[Path]] = {}
        visited: set[str] = set()
        # Links are followed, as image folders often are links; `visited` breaks their circles.
        for folder, subfolders, files in os.walk(self.root, followlinks=True):
            real = os.path.realpath(folder)
            subfolders[:] = [] if real in visited else sorted(s for s in subfolders if not s.startswith("."))
            if real in visited:
                continue
            visited.add(real)
            for file in sorted(files):
                path = Path(folder, file)
                if path.suffix.lower() in IMAGE_SUFFIXES and not file.startswith("."):
                    index.setdefault(path.stem, []).append(path)
                    self._split_folders |= self._splits_of(path)
        return index

    def _splits_of(self, path: Path) -> set[str]:
        folders = path.relative_to(self.root).parts[:-1]
        return {split for split in map(split_name, folders) if split is not None}

    def _of_other_split(self, path: Path, split: str | None) -> bool:
        # The same name may exist in train/ and val/: taking the other one would mislabel an image without a word. This
        # matters only where each split has its folder; elsewhere val.csv may well list images of a folder train/.
        own = {f for f in self._split_folders if split is not None and (f.startswith(split) or split.startswith(f))}
        return bool(own) and bool(self._splits_of(path)) and not self._splits_of(path) & own


def split_name(text: str) -> str | None:
    """The split that a file or folder name speaks of: `person_keypoints_train2017` is `train`."""
    match = re.search(r"(?<![a-z])(train|val(?!u)|test)(?:[a-z]*_?([12])(?!\d))?", text.lower())
    if match is None:
        return None
    return match[1] + (match[2] or "") if match[1] == "test" else match[1]


def existing_folder(root: str | Path) -> Path:
    """The folder of a data set, which must exist."""
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder, expected the folder of a data set")
    return root


def doctors_of(annotator: str) -> tuple[str, ...]:
    """The doctors whose points an annotator stands for: `mean` is both."""
    if annotator not in ("mean", "junior", "senior"):
        raise InputError(f"annotator is {annotator!r}, expected mean, junior or senior")
    return ("junior", "senior") if annotator == "mean" else (annotator,)


def read_text(path: Path) -> str:
    """The content of a text file."""
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte-order mark
    except OSError as error:
        raise InputError(f"{path}: cannot read this file ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: no text, expected UTF-8") from None


def parse_number(value: object, where: str, field: str) -> float:
    """A coordinate or a spacing as a finite number; `where` and `field` are named in the error."""
    try:
        number = float(value) if isinstance(value, str | int | float) else math.nan
    except ValueError:
        number = math.nan
    if not abs(number) <= _LARGEST:  # NaN fails the comparison as well
        raise InputError(f"{where}: {field} is {value!r}, expected a number of at most {_LARGEST:.0f} in size")
    return number


def parse_point(x: str, y: str, where: str, field: str) -> tuple[float, float]:
    """The two cells of a landmark as a point; NaN where both are empty."""
    missing = [text.lower() in ("", "nan") for text in (x, y)]
    if all(missing):
        return math.nan, math.nan
    if any(missing):
        raise InputError(f"{where}: {field} and its partner are {x!r} and {y!r}, expected both or neither")
    return parse_number(x, where, field), parse_number(y, where, f"partner of {field}")


def name_list(names: Sequence[str]) -> str:
    """The first names of a list, for an error."""
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def csv_rows(path: Path) -> tuple[list[str], list[tuple[str, dict[str, str]]]]:
    """The columns, and for each row its place in the file and its cells by column."""
    reader = csv.reader(io.StringIO(read_text(path)), strict=True)
    columns: list[str] = []
    rows: list[tuple[str, dict[str, str]]] = []
    try:
        for cells in reader:
            cells = [c.strip() for c in cells]
            if not any(cells):
                continue
            where = f"{path}, line {reader.line_num}"
            if not columns:
                columns = cells
                if len(set(columns)) != len(columns):
                    repeated = next(c for c in columns if columns.count(c) > 1)
                    raise InputError(f"{where}: two columns are called {repeated!r}, expected different names")
            elif len(cells) != len(columns):
                raise InputError(f"{where}: {len(cells)} cells, expected {len(columns)} as in the header")
            else:
                rows.append((where, dict(zip(columns, cells, strict=True))))
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}, expected comma-separated values") from None
    if not rows:
        raise InputError(f"{path}: no row, expected a header and one row per image")
    return columns, rows
