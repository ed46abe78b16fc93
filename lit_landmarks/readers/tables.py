"""Tables with one row per image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lit_cli.errors import InputError
from lit_landmarks.readers.shared import (
    Found,
    Images,
    by_split,
    csv_rows,
    existing_folder,
    name_list,
    parse_number,
    parse_point,
    split_name,
)
from lit_landmarks.samples import LandmarkSample, LandmarkTable, as_spacing

_CSV_SPLITS = ("train", "val", "valid", "validation", "test", "test1", "test2")
_FILE_COLUMNS = ("file", "image", "image_path", "filename", "file_name", "image file")
_SPACING_COLUMNS = ("pixel_size", "scale", "spacing(mm)", "spacing")


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
        images = Images(files[0][1].parent)
        found: list[Found] = []
        names: tuple[str, ...] | None = None
        for split, path in files:
            columns, rows = csv_rows(path)
            layout = _CsvLayout.of(columns, path)
            if names is None:
                names = layout.names
            if layout.names != names:
                raise InputError(f"{path}: landmarks are {name_list(layout.names)}, expected those of {files[0][1]}")
            found += [layout.row(where, cells, split, default, images) for where, cells in rows]
        return LandmarkTable(by_split(found), names or ())


def csv_candidates(root: Path, conventional: bool) -> list[tuple[str | None, Path]]:
    """Tables in a folder with the split that their name states (None: the rows say it)."""
    if not conventional:
        tables = [p for p in sorted(root.glob("*.csv")) if not p.name.startswith(".")]
        return [(None, tables[0])] if len(tables) == 1 else []
    named = [(split_name(name), root / f"{name}.csv") for name in _CSV_SPLITS]
    return [(s, p) for s, p in [(None, root / "labels.csv"), *named] if p.is_file()]


def _csv_files(root: Path) -> list[tuple[str | None, Path]]:
    if root.is_file():
        return [(None, root)]
    root = existing_folder(root)
    files = csv_candidates(root, True) or csv_candidates(root, False)
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
                f"{path}: columns are {name_list(columns)}, expected landmarks as p1x, p1y or name_x, name_y"
            )
        pairs = tuple((axes["x"], axes["y"]) for axes in points.values())
        return cls(files[0], known.get("split"), spacings[0] if spacings else (), tuple(points), pairs)

    def row(
        self,
        where: str,
        cells: dict[str, str],
        file_split: str | None,
        default: tuple[float, float] | None,
        images: Images,
    ) -> Found:
        listed = cells[self.file]
        if not listed:
            raise InputError(f"{where}: {self.file} is empty, expected an image")
        split = file_split
        if self.split is not None:
            text = cells[self.split].lower()
            split = split_name(text) or text
            if not split or (file_split is not None and split != file_split):
                raise InputError(f"{where}: split is {text!r}, expected {file_split or 'a name such as train'}")
        spacing = default
        if any(cells[c] for c in self.spacing):
            stated = [parse_number(cells[c], where, c) for c in self.spacing]
            spacing = as_spacing(stated if len(stated) == 2 else stated[0], where)
        points = [parse_point(cells[x], cells[y], where, x) for x, y in self.pairs]
        image = images.find(listed, split, where)
        return Found(where, split or "train", listed, LandmarkSample(image, image.stem, np.array(points), spacing))
