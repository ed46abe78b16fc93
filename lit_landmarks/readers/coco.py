"""COCO keypoint files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lit_cli.errors import InputError
from lit_landmarks.readers.shared import (
    Found,
    Images,
    by_split,
    existing_folder,
    name_list,
    parse_number,
    read_text,
    split_name,
)
from lit_landmarks.samples import LandmarkSample, LandmarkTable, as_spacing


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
        images = Images(folder)
        found: list[Found] = []
        names: tuple[str, ...] | None = None
        for split, path in files:
            content = _coco_content(path)
            own = _coco_names(content, path)
            if names is None:
                names = own
            if own != names:
                raise InputError(f"{path}: landmarks are {name_list(own)}, expected those of {files[0][1]}")
            found += self._samples(content, path, split, own, default, images)
        return LandmarkTable(by_split(found), names or ())

    @staticmethod
    def _samples(
        content: dict[str, list[dict[str, Any]]],
        path: Path,
        split: str,
        names: tuple[str, ...],
        default: tuple[float, float] | None,
        images: Images,
    ) -> Iterable[Found]:
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
                    points[k] = (
                        parse_number(x, where, f"x of {landmark!r}"),
                        parse_number(y, where, f"y of {landmark!r}"),
                    )
            stated = entry.get("spacing", entry.get("pixel_size"))
            spacing = default if stated is None else as_spacing(stated, where)
            image = images.find(name, split, where)
            yield Found(where, split, name, LandmarkSample(image, image.stem, points, spacing))


def json_candidates(root: Path, conventional: bool) -> list[tuple[str, Path]]:
    """The json files of a folder or of its `annotations` with their splits."""
    for folder in (root, root / "annotations"):
        paths = [p for p in sorted(folder.glob("*.json")) if not p.name.startswith(".")]
        named = [(split, p) for p in paths if (split := split_name(p.stem)) is not None]
        if conventional and named:
            return named
        if not conventional and len(paths) == 1:
            return [("train", paths[0])]
    return []


def _json_files(root: Path) -> tuple[Path, list[tuple[str, Path]]]:
    """The folder below which the images lie, and the json files with their splits."""
    if root.is_file():
        folder = root.parent.parent if root.parent.name == "annotations" else root.parent
        return folder, [(split_name(root.stem) or "train", root)]
    root = existing_folder(root)
    files = json_candidates(root, True) or json_candidates(root, False)
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
        content = json.loads(read_text(path))
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
