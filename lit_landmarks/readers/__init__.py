"""Readers: one small class per on-disk format, all with `read() -> LandmarkTable`.

Wrong input raises `InputError` with one line that names the file, the line or field and what was expected. Nothing is
guessed about numbers: a spacing that no file and no argument states stays unknown, and the mean of two annotators needs
both of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

from lit_cli.errors import InputError
from lit_landmarks.readers.coco import CocoKeypoints, json_candidates
from lit_landmarks.readers.isbi2015 import Isbi2015, isbi_annotations
from lit_landmarks.readers.kaggle_csv import KaggleCsv
from lit_landmarks.readers.shared import ISBI2015_NAMES, ISBI_SPLITS, Annotator, doctors_of, existing_folder
from lit_landmarks.readers.tables import LandmarkCsv, csv_candidates
from lit_landmarks.samples import LandmarkTable

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

Format = Literal["auto", "isbi2015", "kaggle_csv", "csv", "coco"]


class LandmarkReader(Protocol):
    """What the data module needs of a format."""

    def read(self) -> LandmarkTable:
        """Read the annotations. Images are only looked up, not decoded."""
        ...


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
    root = existing_folder(root)
    if any(isbi_annotations(root, doctor) for doctor in doctors_of("mean")):
        return "isbi2015"
    if any((root / f"{split}_{doctor}.csv").is_file() for split in ISBI_SPLITS for doctor in doctors_of("mean")):
        return "kaggle_csv"
    # First the files that are called as expected: a folder with labels.csv and, say, spacing.json is no riddle.
    for conventional in (True, False):
        is_csv = bool(csv_candidates(root, conventional))
        is_coco = bool(json_candidates(root, conventional))
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
    doctors_of(annotator)
    if format == "isbi2015":
        return Isbi2015(root, annotator, pixel_size)
    if format == "kaggle_csv":
        return KaggleCsv(root, annotator, pixel_size)
    if format not in ("csv", "coco"):
        raise InputError(f"format is {format!r}, expected auto, isbi2015, kaggle_csv, csv or coco")
    if annotator != "mean":
        raise InputError(f"annotator is {annotator!r}, expected mean, as {root} is read as {format}")
    return LandmarkCsv(root, pixel_size) if format == "csv" else CocoKeypoints(root, pixel_size)
