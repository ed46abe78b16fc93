"""Tiny data sets on disk, one function per format, for every test that needs files to read."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

ISBI_SPLITS = {"TrainingData": ("001", "002"), "Test1Data": ("151",)}
DOCTORS = ("junior", "senior")


def write_image(path: Path, size: tuple[int, int] = (24, 20), value: int = 100) -> Path:
    """A grey image of one value, (H, W)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full(size, value, np.uint8))
    return path


def doctor_points(name: str, doctor: str) -> np.ndarray:
    """(19, 2): the doctors differ by (1.5, 1) so that their mean is no integer and no half."""
    k = np.arange(19)
    shift = (0.0, 0.0) if doctor == "junior" else (1.5, 1.0)
    return np.stack([k + int(name) / 4, 2.0 * k + 1], axis=1) + shift


def write_isbi(
    root: Path,
    *,
    splits: Mapping[str, Sequence[str]] = ISBI_SPLITS,
    images: str = "RawImage",
    annotations: str = "AnnotationsByMD",
    suffix: str = ".png",
    size: tuple[int, int] = (24, 20),
    doctors: Sequence[str] = DOCTORS,
) -> Path:
    """The ISBI 2015 folders; `images` and `annotations` say how deep they are nested ("" for the root)."""
    for split, names in splits.items():
        for name in names:
            write_image(root / images / split / f"{name}{suffix}", size)
            for doctor in doctors:
                lines = [f"{x},{y}" for x, y in doctor_points(name, doctor)] + ["0"] * 8
                path = root / annotations / f"400_{doctor}" / f"{name}.txt"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("\n".join(lines) + "\n")
    return root


def write_table(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    """Any csv."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_kaggle(
    root: Path,
    *,
    splits: Mapping[str, Sequence[str]] = {"train": ("001", "002"), "test1": ("151",)},
    doctors: Sequence[str] = DOCTORS,
    images: str = "cepha400/cepha400",
) -> Path:
    """Flat tables, with the images somewhere below."""
    header = ["image_path", *(f"{axis}{k}" for k in range(1, 20) for axis in "xy")]
    for split, names in splits.items():
        for name in names:
            write_image(root / images / f"{name}.png")
        for doctor in doctors:
            rows = [[f"{name}.png", *doctor_points(name, doctor).ravel()] for name in names]
            write_table(root / f"{split}_{doctor}.csv", header, rows)
    return root


def write_csv(
    root: Path,
    *,
    header: Sequence[str] = ("file", "scale", "p1x", "p1y", "p2x", "p2y"),
    rows: Sequence[Sequence[object]] = (("001.png", 0.1, 1.5, 2, 3, 4.25), ("002.png", 0.125, 5, 6, "", "")),
    table: str = "labels.csv",
    images: str = "images",
) -> Path:
    """A table with one row per image; the first column that names files decides which images are written."""
    column = next(i for i, name in enumerate(header) if name.lower().startswith(("file", "image")))
    for row in rows:
        write_image(root / images / str(row[column]))
    write_table(root / table, header, rows)
    return root


def coco(
    points: Mapping[str, Sequence[float]],
    names: Sequence[str] = ("tip", "base"),
    **image_fields: object,
) -> dict[str, list[dict[str, object]]]:
    """The content of a COCO file: keypoint triples by file name."""
    return {
        "images": [
            {"id": 7 + i, "file_name": n, "width": 20, "height": 24, **image_fields} for i, n in enumerate(points)
        ],
        "annotations": [
            {"id": i, "image_id": 7 + i, "category_id": 1, "keypoints": list(k)} for i, k in enumerate(points.values())
        ],
        "categories": [{"id": 1, "name": "tooth", "keypoints": list(names)}],
    }


def write_coco(
    root: Path,
    content: Mapping[str, object] | None = None,
    *,
    file: str = "train.json",
    images: str = "images",
) -> Path:
    """A COCO file with its images."""
    if content is None:
        content = coco({"a.png": (1.5, 2, 2, 3, 4, 1), "b.png": (5, 6, 2, 0, 0, 0)}, spacing=0.2)
    entries = content["images"]
    assert isinstance(entries, list)
    for entry in entries:
        write_image(root / images / str(entry["file_name"]))
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(json.dumps(content))
    return root
