"""The ISBI 2015 cephalogram challenge as flat tables."""

from __future__ import annotations

import re
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
    Images,
    csv_rows,
    doctors_of,
    existing_folder,
    name_list,
    parse_point,
)
from lit_landmarks.samples import LandmarkSample, LandmarkTable, as_spacing


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
        root = existing_folder(self.root)
        spacing = as_spacing(self.pixel_size, "pixel_size")
        doctors = doctors_of(self.annotator)
        images = Images(root)
        splits: dict[str, list[LandmarkSample]] = {}
        for split in ISBI_SPLITS:
            paths = [root / f"{split}_{doctor}.csv" for doctor in doctors]
            if not any((root / f"{split}_{doctor}.csv").is_file() for doctor in doctors_of("mean")):
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
        columns, rows = csv_rows(path)
        if "image_path" not in columns:
            raise InputError(f"{path}: columns are {name_list(columns)}, expected image_path and 38 coordinates")
        coordinates = [c for c in columns if c != "image_path"]
        axes = [re.sub(r"[^xy]", "", c.lower()) for c in coordinates]
        if len(coordinates) != 2 * len(ISBI2015_NAMES):
            raise InputError(f"{path}: {len(coordinates)} columns beside image_path, expected 38 coordinates")
        if set(axes) == {"x", "y"} and axes != ["x", "y"] * len(ISBI2015_NAMES):
            raise InputError(f"{path}: columns are {name_list(coordinates)}, expected x and y in turn")
        table: dict[str, tuple[str, NDArray[np.float64]]] = {}
        for where, cells in rows:
            name = cells["image_path"]
            if name in table:
                raise InputError(f"{where}: {name!r} stands also in {table[name][0]}, expected one row per image")
            pairs = zip(coordinates[::2], coordinates[1::2], strict=True)
            table[name] = where, np.array([parse_point(cells[x], cells[y], where, x) for x, y in pairs])
        return table
