"""Readers: one small class per on-disk format, all with `read() -> LandmarkTable`.

Wrong input raises `InputError` with one line that names the file, the line or field and what was expected. Nothing is
guessed about numbers: a spacing that no file and no argument states stays unknown, and the mean of two annotators needs
both of them.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from lit_cli.errors import InputError
from lit_landmarks.samples import IMAGE_SUFFIXES, LandmarkSample, LandmarkTable, as_spacing, find_images, image_size

__all__ = [
    "ISBI2015_NAMES",
    "Annotator",
    "CocoKeypoints",
    "Format",
    "Isbi2015",
    "KaggleCsv",
    "LandmarkCsv",
    "LandmarkReader",
    "detect_format",
    "make_reader",
]

Annotator = Literal["mean", "junior", "senior"]
Format = Literal["auto", "isbi2015", "kaggle_csv", "csv", "coco"]

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

_ISBI_SPLITS = {"train": "TrainingData", "test1": "Test1Data", "test2": "Test2Data"}
_ISBI_FULL_SIZE = (1935, 2400)  # width, height of the challenge's own files, whose pixels are 0.1 mm
_CSV_SPLITS = ("train", "val", "valid", "validation", "test", "test1", "test2")
_FILE_COLUMNS = ("file", "image", "image_path", "filename", "file_name", "image file")
_SPACING_COLUMNS = ("pixel_size", "scale", "spacing(mm)", "spacing")
_LARGEST = 1e6  # no image has so many columns; a larger coordinate is a shifted or damaged file


class LandmarkReader(Protocol):
    """What the data module needs of a format."""

    def read(self) -> LandmarkTable:
        """Read the annotations. Images are only looked up, not decoded."""
        ...


@dataclass(frozen=True)
class Isbi2015:
    """The ISBI 2015 cephalogram challenge in its official folders.

    Annotations are `400_junior/NNN.txt` and `400_senior/NNN.txt` below `AnnotationsByMD` or the root; images of any
    type lie in `TrainingData`, `Test1Data` and `Test2Data` below `RawImage`, `RawImage/RawImage` or the root. They
    become the splits `train`, `test1` and `test2`; those that are absent are left out.

    Args:
        root: The folder of the data set.
        annotator: Whose points are the truth. `mean` averages both doctors without rounding.
        pixel_size: mm per pixel. None means 0.1 if the first image has the official 1935 x 2400 pixels, for which that
            figure holds, else unknown.

    Example:
        >>> Isbi2015("data/isbi2015", annotator="senior").read().landmark_names[:2]  # doctest: +SKIP
        ('sella', 'nasion')
    """

    root: str | Path
    annotator: Annotator = "mean"
    pixel_size: float | Sequence[float] | None = None

    def read(self) -> LandmarkTable:
        """Read the points and look the images up.

        Raises:
            InputError: A folder or an annotation is missing, or an annotation is malformed.
        """
        root = _folder(self.root)
        doctors = _doctors(self.annotator)
        spacing = as_spacing(self.pixel_size, "pixel_size")
        images = self._images(root)
        annotations = [self._annotations(root, doctor) for doctor in doctors]
        if spacing is None and image_size(next(iter(images.values()))[0]) == _ISBI_FULL_SIZE:
            spacing = (0.1, 0.1)
        splits = {
            split: [
                LandmarkSample(
                    path,
                    path.stem,
                    np.mean([self._points(folder / f"{path.stem}.txt", path) for folder in annotations], axis=0),
                    spacing,
                )
                for path in paths
            ]
            for split, paths in images.items()
        }
        return LandmarkTable(splits, ISBI2015_NAMES)

    @staticmethod
    def _images(root: Path) -> dict[str, list[Path]]:
        for base in (root / "RawImage", root / "RawImage" / "RawImage", root):
            images = {s: find_images(base / name) for s, name in _ISBI_SPLITS.items() if (base / name).is_dir()}
            if images:
                return images
        raise InputError(
            f"{root}: no image folder, expected {', '.join(_ISBI_SPLITS.values())} (or one of them) "
            "in RawImage, in RawImage/RawImage or directly in it"
        )

    @staticmethod
    def _annotations(root: Path, doctor: str) -> Path:
        for folder in _isbi_annotations(root, doctor):
            return folder
        raise InputError(f"{root}: no folder 400_{doctor}, expected it in AnnotationsByMD or directly in it")

    @staticmethod
    def _points(path: Path, image: Path) -> NDArray[np.float64]:
        """Read the first 19 lines `x,y`; the classification rows of one value that follow are not needed."""
        if not path.is_file():
            raise InputError(f"{path}: missing annotation of the image {image}")
        points: list[tuple[float, float]] = []
        for number, line in enumerate(_text(path).splitlines(), start=1):
            fields = [f.strip() for f in line.split(",")]
            if fields == [""] or (len(fields) == 1 and len(points) == len(ISBI2015_NAMES)):
                continue
            where = f"{path}, line {number}"
            if len(fields) != 2:
                # Skipping such a line would shift every later landmark by one.
                raise InputError(f"{where}: {line.strip()!r} after {len(points)} points, expected 19 lines x,y")
            points.append((_number(fields[0], where, "x"), _number(fields[1], where, "y")))
        if len(points) != len(ISBI2015_NAMES):
            raise InputError(f"{path}: {len(points)} lines x,y, expected {len(ISBI2015_NAMES)}")
        return np.array(points)


@dataclass(frozen=True)
class KaggleCsv:
    """The flat tables in which the same challenge is passed around.

    `{train,test1,test2}_{junior,senior}.csv` in the root, each with a column `image_path` and 38 further columns
    x, y, x, y, ... in the challenge's order. Images are found by their name anywhere below the root.

    Args:
        root: The folder of the data set.
        annotator: Whose points are the truth. `mean` averages both tables without rounding and needs both.
        pixel_size: mm per pixel; the tables do not state it. None leaves it unknown.

    Example:
        >>> KaggleCsv("data/cepha400", annotator="senior", pixel_size=0.1).read().num_landmarks  # doctest: +SKIP
        19
    """

    root: str | Path
    annotator: Annotator = "mean"
    pixel_size: float | Sequence[float] | None = None

    def read(self) -> LandmarkTable:
        """Read the points and look the images up.

        Raises:
            InputError: A table is missing or malformed, or the two annotators' tables list different images.
        """
        root = _folder(self.root)
        spacing = as_spacing(self.pixel_size, "pixel_size")
        doctors = _doctors(self.annotator)
        images = _Images(root)
        splits: dict[str, list[LandmarkSample]] = {}
        for split in _ISBI_SPLITS:
            paths = [root / f"{split}_{doctor}.csv" for doctor in doctors]
            if not any((root / f"{split}_{doctor}.csv").is_file() for doctor in _doctors("mean")):
                continue
            absent = [p.name for p in paths if not p.is_file()]
            if absent:
                raise InputError(f"{root}: no {absent[0]}, expected it because annotator is {self.annotator!r}")
            tables = [self._table(path) for path in paths]
            for path, table in zip(paths[1:], tables[1:], strict=True):
                differing = sorted(table.keys() ^ tables[0].keys())
                if differing:
                    raise InputError(f"{path}: {differing[0]!r} is not in both tables, expected those of {paths[0]}")
            samples = []
            for name, (where, _) in tables[0].items():
                points = np.mean([table[name][1] for table in tables], axis=0)
                path = images.find(name, split, where)
                samples.append(LandmarkSample(path, path.stem, points, spacing))
            splits[split] = samples
        if not splits:
            raise InputError(f"{root}: no table, expected train_senior.csv, test1_junior.csv or the like in it")
        return LandmarkTable(splits, ISBI2015_NAMES)

    @staticmethod
    def _table(path: Path) -> dict[str, tuple[str, NDArray[np.float64]]]:
        """Points and place of each row, by image name."""
        columns, rows = _csv_rows(path)
        if "image_path" not in columns:
            raise InputError(f"{path}: columns are {_listed(columns)}, expected image_path and 38 coordinates")
        coordinates = [c for c in columns if c != "image_path"]
        axes = [re.sub(r"[^xy]", "", c.lower()) for c in coordinates]
        if len(coordinates) != 2 * len(ISBI2015_NAMES):
            raise InputError(f"{path}: {len(coordinates)} columns beside image_path, expected 38 coordinates")
        if set(axes) == {"x", "y"} and axes != ["x", "y"] * len(ISBI2015_NAMES):
            raise InputError(f"{path}: columns are {_listed(coordinates)}, expected x and y in turn")
        table: dict[str, tuple[str, NDArray[np.float64]]] = {}
        for where, cells in rows:
            name = cells["image_path"]
            if name in table:
                raise InputError(f"{where}: {name!r} stands also in {table[name][0]}, expected one row per image")
            pairs = zip(coordinates[::2], coordinates[1::2], strict=True)
            table[name] = where, np.array([_point(cells[x], cells[y], where, x) for x, y in pairs])
        return table


@dataclass(frozen=True)
class LandmarkCsv:
    r"""A table with one row per image; the CL-Detection style tables are of this kind.

    Columns, in any order and case: the image (`file`, `image`, `image_path`, `filename`, `file_name` or `image file`);
    optionally `split` (without it all rows are `train`); optionally the pixel size in mm (`pixel_size`, `scale`,
    `spacing(mm)`, `spacing`, or `pixel_size_x` and `pixel_size_y`); and the landmarks as pairs `p1x`, `p1y` or
    `<name>_x`, `<name>_y`. An empty cell (or `nan`) is a missing landmark. Other columns are passed over.

    Args:
        root: The table itself, or a folder with `train.csv`, `val.csv`, `test.csv` (the split is the file's name), with
            `labels.csv`, or with a single table. Images are looked up relative to the table's folder and then by name
            anywhere below it.
        pixel_size: mm per pixel of the images for which the table states none.

    Example:
        >>> import tempfile, cv2
        >>> folder = tempfile.TemporaryDirectory()
        >>> _ = cv2.imwrite(f"{folder.name}/001.png", np.zeros((4, 4), np.uint8))
        >>> _ = Path(folder.name, "labels.csv").write_text("file,scale,sella_x,sella_y\n001.png,0.1,1.5,2\n")
        >>> table = LandmarkCsv(folder.name).read()
        >>> table.landmark_names, table.splits["train"][0].points.tolist()
        (('sella',), [[1.5, 2.0]])
    """

    root: str | Path
    pixel_size: float | Sequence[float] | None = None

    def read(self) -> LandmarkTable:
        """Read the points and look the images up.

        Raises:
            InputError: No table, a table without the columns above, a cell that is no number, an image that is missing
                or listed twice, or tables with different landmarks.
        """
        default = as_spacing(self.pixel_size, "pixel_size")
        files = _csv_files(Path(self.root))
        images = _Images(files[0][1].parent)
        found: list[_Found] = []
        names: tuple[str, ...] | None = None
        for split, path in files:
            columns, rows = _csv_rows(path)
            layout = _CsvLayout.of(columns, path)
            if names is None:
                names = layout.names
            if layout.names != names:
                raise InputError(f"{path}: landmarks are {_listed(layout.names)}, expected those of {files[0][1]}")
            found += [layout.row(where, cells, split, default, images) for where, cells in rows]
        return LandmarkTable(_by_split(found), names or ())


@dataclass(frozen=True)
class CocoKeypoints:
    """COCO keypoint files with one object per image.

    A keypoint `x, y, v` with v = 0 is missing; x and y are pixel indices, as COCO defines them, hence pixel centres at
    integers. An image entry may state `spacing` or `pixel_size` in mm, one number or x and y.

    Args:
        root: The json file itself, or a folder with `train.json`, `val.json`, `test.json`, or `annotations` with files
            such as `person_keypoints_train2017.json`. A single json under another name is the split `train`. Images
            are looked up in the folder, `images`, a folder called like the split, and then by name anywhere below.
        pixel_size: mm per pixel of the images for which the file states none.

    Example:
        >>> CocoKeypoints("data/hands", pixel_size=0.14).read().splits.keys()  # doctest: +SKIP
        dict_keys(['train', 'val'])
    """

    root: str | Path
    pixel_size: float | Sequence[float] | None = None

    def read(self) -> LandmarkTable:
        """Read the points and look the images up.

        Raises:
            InputError: No json, an entry without its fields, none or several annotations of an image, an image that is
                missing, or files with different landmarks.
        """
        default = as_spacing(self.pixel_size, "pixel_size")
        folder, files = _json_files(Path(self.root))
        images = _Images(folder)
        found: list[_Found] = []
        names: tuple[str, ...] | None = None
        for split, path in files:
            content = _coco_content(path)
            own = _coco_names(content, path)
            if names is None:
                names = own
            if own != names:
                raise InputError(f"{path}: landmarks are {_listed(own)}, expected those of {files[0][1]}")
            found += self._samples(content, path, split, own, default, images)
        return LandmarkTable(_by_split(found), names or ())

    @staticmethod
    def _samples(
        content: dict[str, list[dict[str, Any]]],
        path: Path,
        split: str,
        names: tuple[str, ...],
        default: tuple[float, float] | None,
        images: _Images,
    ) -> Iterable[_Found]:
        keypoints: dict[Any, Any] = {}
        known = [_field(entry, "id", path, "images") for entry in content["images"]]
        repeated = next((i for i in known if known.count(i) > 1), None) if len(set(known)) < len(known) else None
        if repeated is not None:
            raise InputError(f"{path}: two images have the id {repeated!r}, expected different ids")
        for entry in content["annotations"]:
            image_id = _field(entry, "image_id", path, "annotations")
            if image_id not in known:
                raise InputError(f"{path}: an annotation has image_id {image_id!r}, expected the id of an image")
            if image_id in keypoints:
                raise InputError(f"{path}: image {image_id!r} has more than one annotation, expected one per image")
            keypoints[image_id] = _field(entry, "keypoints", path, "annotations")
        for entry in content["images"]:
            name, image_id = str(_field(entry, "file_name", path, "images")), entry["id"]
            where = f"{path}, image {name}"
            if image_id not in keypoints:
                raise InputError(f"{where}: no annotation, expected one per image")
            values = keypoints[image_id]
            if not isinstance(values, list) or len(values) != 3 * len(names):
                count = len(values) if isinstance(values, list) else values
                raise InputError(f"{where}: {count} keypoint values, expected {3 * len(names)} (x, y, v each)")
            points = np.full((len(names), 2), np.nan)
            for k, landmark in enumerate(names):
                x, y, visible = values[3 * k : 3 * k + 3]
                if visible not in (0, 1, 2):
                    raise InputError(f"{where}: v of {landmark!r} is {visible!r}, expected 0, 1 or 2")
                if visible:
                    points[k] = _number(x, where, f"x of {landmark!r}"), _number(y, where, f"y of {landmark!r}")
            stated = entry.get("spacing", entry.get("pixel_size"))
            spacing = default if stated is None else as_spacing(stated, where)
            image = images.find(name, split, where)
            yield _Found(where, split, name, LandmarkSample(image, image.stem, points, spacing))


def detect_format(root: str | Path) -> Literal["isbi2015", "kaggle_csv", "csv", "coco"]:
    """Name the format of a data set by the files in it.

    Raises:
        InputError: Nothing known is there, or both csv and json annotations.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> _ = Path(folder.name, "train.csv").write_text("")
        >>> detect_format(folder.name)
        'csv'
    """
    root = Path(root)
    if root.is_file() and root.suffix.lower() in (".csv", ".json"):
        return "csv" if root.suffix.lower() == ".csv" else "coco"
    root = _folder(root)
    if any(_isbi_annotations(root, doctor) for doctor in _doctors("mean")):
        return "isbi2015"
    if any((root / f"{split}_{doctor}.csv").is_file() for split in _ISBI_SPLITS for doctor in _doctors("mean")):
        return "kaggle_csv"
    # First the files that are called as expected: a folder with labels.csv and, say, spacing.json is no riddle.
    for conventional in (True, False):
        is_csv = bool(_csv_candidates(root, conventional))
        is_coco = bool(_json_candidates(root, conventional))
        if is_csv and is_coco:
            raise InputError(f"{root}: both csv and json annotations, expected format to say which: csv or coco")
        if is_csv or is_coco:
            return "csv" if is_csv else "coco"
    raise InputError(
        f"{root}: unknown format, expected AnnotationsByMD/400_junior or 400_senior (isbi2015), train_senior.csv or "
        "the like (kaggle_csv), train.csv or labels.csv or a single csv (csv), train.json or annotations/*train*.json "
        "or a single json (coco)"
    )


def make_reader(
    format: Format,
    root: str | Path,
    annotator: Annotator = "mean",
    pixel_size: float | Sequence[float] | None = None,
) -> LandmarkReader:
    """Choose the reader.

    Args:
        format: The on-disk format; `auto` looks at the files.
        root: The folder (or, for csv and coco, the file) of the data set.
        annotator: Whose points are the truth, for the formats with two annotators.
        pixel_size: mm per pixel, one number or x and y; the per-image values of csv and coco come first.

    Raises:
        InputError: The format or the annotator is unknown, cannot be told from the files, or do not fit together.
    """
    root = Path(root).expanduser()  # a YAML file knows no shell that would do it
    if format == "auto":
        format = detect_format(root)
    _doctors(annotator)
    if format == "isbi2015":
        return Isbi2015(root, annotator, pixel_size)
    if format == "kaggle_csv":
        return KaggleCsv(root, annotator, pixel_size)
    if format not in ("csv", "coco"):
        raise InputError(f"format is {format!r}, expected auto, isbi2015, kaggle_csv, csv or coco")
    if annotator != "mean":
        raise InputError(f"annotator is {annotator!r}, expected mean, as {root} is read as {format}")
    return LandmarkCsv(root, pixel_size) if format == "csv" else CocoKeypoints(root, pixel_size)


# ---- Shared by several formats --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """A sample on its way into the table: where it was read, its split, the image as the file calls it."""

    where: str
    split: str
    listed: str
    sample: LandmarkSample


def _by_split(found: Iterable[_Found]) -> dict[str, list[LandmarkSample]]:
    """Group by split and name each sample by its file's stem, or by its listed path where stems repeat."""
    groups: dict[str, list[_Found]] = {}
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


class _Images:
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
        return {split for split in map(_split_name, folders) if split is not None}

    def _of_other_split(self, path: Path, split: str | None) -> bool:
        # The same name may exist in train/ and val/: taking the other one would mislabel an image without a word. This
        # matters only where each split has its folder; elsewhere val.csv may well list images of a folder train/.
        own = {f for f in self._split_folders if split is not None and (f.startswith(split) or split.startswith(f))}
        return bool(own) and bool(self._splits_of(path)) and not self._splits_of(path) & own


def _split_name(text: str) -> str | None:
    """The split that a file or folder name speaks of: `person_keypoints_train2017` is `train`."""
    match = re.search(r"(?<![a-z])(train|val(?!u)|test)(?:[a-z]*_?([12])(?!\d))?", text.lower())
    if match is None:
        return None
    return match[1] + (match[2] or "") if match[1] == "test" else match[1]


def _folder(root: str | Path) -> Path:
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder, expected the folder of a data set")
    return root


def _doctors(annotator: str) -> tuple[str, ...]:
    if annotator not in ("mean", "junior", "senior"):
        raise InputError(f"annotator is {annotator!r}, expected mean, junior or senior")
    return ("junior", "senior") if annotator == "mean" else (annotator,)


def _isbi_annotations(root: Path, doctor: str) -> list[Path]:
    bases = (root / "AnnotationsByMD", root / "AnnotationsByMD" / "AnnotationsByMD", root)
    return [base / f"400_{doctor}" for base in bases if (base / f"400_{doctor}").is_dir()]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte-order mark
    except OSError as error:
        raise InputError(f"{path}: cannot read this file ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: no text, expected UTF-8") from None


def _number(value: object, where: str, field: str) -> float:
    try:
        number = float(value) if isinstance(value, str | int | float) else math.nan
    except ValueError:
        number = math.nan
    if not abs(number) <= _LARGEST:  # NaN fails the comparison as well
        raise InputError(f"{where}: {field} is {value!r}, expected a number of at most {_LARGEST:.0f} in size")
    return number


def _point(x: str, y: str, where: str, field: str) -> tuple[float, float]:
    missing = [text.lower() in ("", "nan") for text in (x, y)]
    if all(missing):
        return math.nan, math.nan
    if any(missing):
        raise InputError(f"{where}: {field} and its partner are {x!r} and {y!r}, expected both or neither")
    return _number(x, where, field), _number(y, where, f"partner of {field}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


# ---- csv ------------------------------------------------------------------------------------------------------------


def _csv_rows(path: Path) -> tuple[list[str], list[tuple[str, dict[str, str]]]]:
    """The columns, and for each row its place in the file and its cells by column."""
    reader = csv.reader(io.StringIO(_text(path)), strict=True)
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


def _csv_candidates(root: Path, conventional: bool) -> list[tuple[str | None, Path]]:
    """Tables in a folder with the split that their name states (None: the rows say it)."""
    if not conventional:
        tables = [p for p in sorted(root.glob("*.csv")) if not p.name.startswith(".")]
        return [(None, tables[0])] if len(tables) == 1 else []
    named = [(_split_name(name), root / f"{name}.csv") for name in _CSV_SPLITS]
    return [(s, p) for s, p in [(None, root / "labels.csv"), *named] if p.is_file()]


def _csv_files(root: Path) -> list[tuple[str | None, Path]]:
    if root.is_file():
        return [(None, root)]
    root = _folder(root)
    files = _csv_candidates(root, True) or _csv_candidates(root, False)
    if not files:
        raise InputError(f"{root}: no table, expected train.csv, val.csv, test.csv, or labels.csv, or a single csv")
    splits = [s for s, _ in files]
    if len(set(splits)) != len(splits) or (None in splits and len(splits) > 1):
        names = ", ".join(p.name for _, p in files)
        raise InputError(f"{root}: {names} stand side by side, expected labels.csv alone or one table per split")
    return files


@dataclass(frozen=True)
class _CsvLayout:
    """Which column of a table holds what."""

    file: str
    split: str | None
    spacing: tuple[str, ...]
    names: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, columns: list[str], path: Path) -> _CsvLayout:
        known = {c.lower(): c for c in columns}
        files = [known[c] for c in _FILE_COLUMNS if c in known]
        if len(files) != 1:
            raise InputError(
                f"{path}: {files or 'no'} image column, expected exactly one of {', '.join(_FILE_COLUMNS)}"
            )
        spacings = [(known[c],) for c in _SPACING_COLUMNS if c in known]
        parts = tuple(known[c] for c in ("pixel_size_x", "pixel_size_y") if c in known)
        spacings += [parts] if parts else []
        if len(spacings) > 1 or len(parts) == 1:
            named = ", ".join(c for group in spacings for c in group)
            raise InputError(f"{path}: pixel size in {named}, expected one column or pixel_size_x with pixel_size_y")
        taken = {files[0], *(spacings[0] if spacings else ())}
        points: dict[str, dict[str, str]] = {}
        for column in columns:
            match = re.fullmatch(r"(p\d+|.+(?=_))_?([xy])", column, flags=re.IGNORECASE)
            if match and column not in taken:
                points.setdefault(match[1], {})[match[2].lower()] = column
        for name, axes in points.items():
            if len(axes) != 2:
                have = next(iter(axes.values()))
                raise InputError(f"{path}: column {have!r} has no partner, expected x and y of {name!r}")
        if not points:
            raise InputError(
                f"{path}: columns are {_listed(columns)}, expected landmarks as p1x, p1y or name_x, name_y"
            )
        pairs = tuple((axes["x"], axes["y"]) for axes in points.values())
        return cls(files[0], known.get("split"), spacings[0] if spacings else (), tuple(points), pairs)

    def row(
        self,
        where: str,
        cells: dict[str, str],
        file_split: str | None,
        default: tuple[float, float] | None,
        images: _Images,
    ) -> _Found:
        listed = cells[self.file]
        if not listed:
            raise InputError(f"{where}: {self.file} is empty, expected an image")
        split = file_split
        if self.split is not None:
            text = cells[self.split].lower()
            split = _split_name(text) or text
            if not split or (file_split is not None and split != file_split):
                raise InputError(f"{where}: split is {text!r}, expected {file_split or 'a name such as train'}")
        spacing = default
        if any(cells[c] for c in self.spacing):
            stated = [_number(cells[c], where, c) for c in self.spacing]
            spacing = as_spacing(stated if len(stated) == 2 else stated[0], where)
        points = [_point(cells[x], cells[y], where, x) for x, y in self.pairs]
        image = images.find(listed, split, where)
        return _Found(where, split or "train", listed, LandmarkSample(image, image.stem, np.array(points), spacing))


# ---- COCO -----------------------------------------------------------------------------------------------------------


def _json_candidates(root: Path, conventional: bool) -> list[tuple[str, Path]]:
    """The json files of a folder or of its `annotations` with their splits."""
    for folder in (root, root / "annotations"):
        paths = [p for p in sorted(folder.glob("*.json")) if not p.name.startswith(".")]
        named = [(split, p) for p in paths if (split := _split_name(p.stem)) is not None]
        if conventional and named:
            return named
        if not conventional and len(paths) == 1:
            return [("train", paths[0])]
    return []


def _json_files(root: Path) -> tuple[Path, list[tuple[str, Path]]]:
    """The folder below which the images lie, and the json files with their splits."""
    if root.is_file():
        folder = root.parent.parent if root.parent.name == "annotations" else root.parent
        return folder, [(_split_name(root.stem) or "train", root)]
    root = _folder(root)
    files = _json_candidates(root, True) or _json_candidates(root, False)
    if not files:
        raise InputError(f"{root}: no json, expected train.json, val.json, test.json or annotations/*train*.json")
    splits = [s for s, _ in files]
    repeated = next((s for s in splits if splits.count(s) > 1), None)
    if repeated is not None:
        names = ", ".join(p.name for s, p in files if s == repeated)
        raise InputError(f"{root}: {names} are all split {repeated!r}, expected one json per split")
    return root, files


def _coco_content(path: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        content = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: {error.msg}, expected json") from None
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
            raise InputError(
                f"{path}: no entries under {key!r}, expected a COCO file with images, annotations, categories"
            )
    return content


def _coco_names(content: dict[str, list[dict[str, Any]]], path: Path) -> tuple[str, ...]:
    named = [c["keypoints"] for c in content["categories"] if c.get("keypoints")]
    if len(named) != 1 or not isinstance(named[0], list):
        raise InputError(f"{path}: {len(named)} categories with keypoint names, expected exactly one")
    return tuple(str(name) for name in named[0])


def _field(entry: dict[str, Any], key: str, path: Path, section: str) -> Any:
    if key not in entry:
        raise InputError(f"{path}: an entry of {section} has no {key!r}, expected it in every entry")
    return entry[key]
