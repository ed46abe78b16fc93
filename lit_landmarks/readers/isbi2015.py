"""The ISBI 2015 cephalogram challenge in its official folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lit_cli.errors import InputError
from lit_landmarks.readers.shared import (
    ISBI2015_NAMES,
    ISBI_SPLITS,
    Annotator,
    doctors_of,
    existing_folder,
    parse_number,
    read_text,
)
from lit_landmarks.samples import LandmarkSample, LandmarkTable, as_spacing, find_images, image_size

_ISBI_FULL_SIZE = (1935, 2400)  # width, height of the challenge's own files, whose pixels are 0.1 mm


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
        root = existing_folder(self.root)
        doctors = doctors_of(self.annotator)
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
            images = {s: find_images(base / name) for s, name in ISBI_SPLITS.items() if (base / name).is_dir()}
            if images:
                return images
        raise InputError(
            f"{root}: no image folder, expected {', '.join(ISBI_SPLITS.values())} (or one of them) "
            "in RawImage, in RawImage/RawImage or directly in it"
        )

    @staticmethod
    def _annotations(root: Path, doctor: str) -> Path:
        for folder in isbi_annotations(root, doctor):
            return folder
        raise InputError(f"{root}: no folder 400_{doctor}, expected it in AnnotationsByMD or directly in it")

    @staticmethod
    def _points(path: Path, image: Path) -> NDArray[np.float64]:
        """Read the first 19 lines `x,y`; the classification rows of one value that follow are not needed."""
        if not path.is_file():
            raise InputError(f"{path}: missing annotation of the image {image}")
        points: list[tuple[float, float]] = []
        for number, line in enumerate(read_text(path).splitlines(), start=1):
            fields = [f.strip() for f in line.split(",")]
            if fields == [""] or (len(fields) == 1 and len(points) == len(ISBI2015_NAMES)):
                continue
            where = f"{path}, line {number}"
            if len(fields) != 2:
                # Skipping such a line would shift every later landmark by one.
                raise InputError(f"{where}: {line.strip()!r} after {len(points)} points, expected 19 lines x,y")
            points.append((parse_number(fields[0], where, "x"), parse_number(fields[1], where, "y")))
        if len(points) != len(ISBI2015_NAMES):
            raise InputError(f"{path}: {len(points)} lines x,y, expected {len(ISBI2015_NAMES)}")
        return np.array(points)


def isbi_annotations(root: Path, doctor: str) -> list[Path]:
    """The folders of a doctor's annotations that exist, the preferred one first."""
    bases = (root / "AnnotationsByMD", root / "AnnotationsByMD" / "AnnotationsByMD", root)
    return [base / f"400_{doctor}" for base in bases if (base / f"400_{doctor}").is_dir()]
