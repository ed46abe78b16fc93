"""Files, folders and image headers, for the readers of all formats; it imports none of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from lit_cli.errors import InputError
from lit_detr.samples import DetectionSample

__all__ = [
    "IMAGE_SUFFIXES",
    "SPLITS",
    "check_size",
    "existing_folder",
    "find_images",
    "image_size",
    "image_sizes",
    "name_list",
    "pair_files",
    "read_json",
    "read_text",
    "split_folders",
]

SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test",),
}
"""Splits, and what files and folders call them."""

IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)


# ---- Files -----------------------------------------------------------------------------------------------------------


def existing_folder(root: str | Path) -> Path:
    """The folder of a data set, which must exist."""
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder, expected the folder of a data set")
    return root


def name_list(names: Iterable[object]) -> str:
    """The first names of a list, for an error."""
    names = [str(name) for name in names]
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def read_text(path: Path) -> str:
    """A whole text file, which must be UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot read this file ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: no text, expected UTF-8") from None


def read_json(path: Path) -> Any:
    """Content of a json file."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: {error.msg}, expected json") from None


def find_images(folder: Path) -> list[Path]:
    """The images of a folder and of the folders in it, in order; hidden files are passed over."""
    found: list[Path] = []
    for place, _, names in os.walk(folder, followlinks=True):
        found += [Path(place, n) for n in names if n[0] != "." and Path(n).suffix.lower() in IMAGE_SUFFIXES]
    return sorted(found)


def split_folders(root: Path, labels: Sequence[str]) -> dict[str, tuple[Path, Path]]:
    """Folders with the images and the labels of each split.

    Known layouts: `<split>/images` with `<split>/<labels>`, also where the split's folder has a longer name that ends
    in `-<split>` or `-<split>-dev` as in VisDrone; `images/<split>` with `<labels>/<split>`; and `images` with
    `<labels>`, which is then all `train`.

    Args:
        root: The folder of the data set.
        labels: What the folder of the labels may be called.
    """
    found: dict[str, tuple[Path, Path]] = {}
    folders = sorted(p for p in root.iterdir() if p.is_dir())
    for split, aliases in SPLITS.items():
        endings = tuple(f"-{a}{more}" for a in aliases for more in ("", "-dev"))
        pairs = [
            (p / "images", p / x) for p in folders if p.name in aliases or p.name.endswith(endings) for x in labels
        ]
        pairs += [(root / "images" / a, root / x / a) for a in aliases for x in labels]
        there = [pair for pair in pairs if pair[0].is_dir() and pair[1].is_dir()]
        if len({images for images, _ in there}) > 1:
            raise InputError(f"{root}: {there[0][0]} and {there[1][0]} are both split {split!r}, expected one")
        if there:
            found[split] = there[0]
    whole = [(root / "images", root / x) for x in labels if (root / x).is_dir()]
    return found or ({"train": whole[0]} if whole and whole[0][0].is_dir() else {})


def pair_files(images: Path, labels: Path, suffix: str, *, complete: bool) -> list[tuple[Path, Path | None]]:
    """Images with their label files, which have the same path and name in another folder.

    Args:
        images: Folder of the images.
        labels: Folder of the label files.
        suffix: Of the label files.
        complete: Whether an image without label file is an error.

    Raises:
        InputError: An image without label (if asked for), a label without image, or no pair at all.
    """
    files = find_images(images)
    keys = {p.relative_to(images).with_suffix("").as_posix(): p for p in files}
    if len(keys) < len(files):
        again = next(p for p in files if keys[p.relative_to(images).with_suffix("").as_posix()] != p)
        raise InputError(f"{again}: a second image of this name with another suffix, expected one")
    texts = {
        p.relative_to(labels).with_suffix("").as_posix(): p for p in labels.rglob(f"*{suffix}") if p.name[0] != "."
    }
    texts.pop("classes", None)  # written beside the labels by common tools
    orphans = sorted(texts.keys() - keys.keys())
    if orphans:
        raise InputError(f"{texts[orphans[0]]}: its image is missing, expected {images / orphans[0]} as jpg, png or so")
    bare = sorted(keys.keys() - texts.keys())
    if bare and (complete or len(bare) == len(keys)):
        raise InputError(f"{keys[bare[0]]}: its annotation is missing, expected {labels / (bare[0] + suffix)}")
    return [(path, texts.get(key)) for key, path in keys.items()]


# ---- Image sizes -----------------------------------------------------------------------------------------------------


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) in pixels as stored, from the header where Pillow knows the format.

    An EXIF orientation is not applied: boxes count pixels of the stored grid.

    Raises:
        InputError: The file is missing, damaged or no image.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.height, image.width
    except FileNotFoundError:
        raise InputError(f"{path}: image is missing, expected this file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        pass  # not Pillow's: 4 channels of 16 bits, say, or very many pixels
    try:
        decoded = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
    except (OSError, cv2.error):
        decoded = None
    if decoded is None:
        raise InputError(f"{path}: damaged or no image, expected a file that Pillow or OpenCV can read")
    return int(decoded.shape[0]), int(decoded.shape[1])


def image_sizes(paths: Sequence[Path]) -> list[tuple[int, int]]:
    """`image_size` of many files, several at a time, as a network folder answers slowly."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(image_size, paths, chunksize=64))


def check_size(sample: DetectionSample, size: tuple[int, int]) -> None:
    """Compare a decoded image with what the annotation says of it.

    Args:
        sample: With or without a size.
        size: (height, width) of the decoded image.

    Raises:
        InputError: They differ, so that the boxes belong to another version of the image.
    """
    if sample.size is not None and sample.size != tuple(size):
        raise InputError(
            f"{sample.image}: {size[1]} x {size[0]} pixels, expected {sample.size[1]} x {sample.size[0]} as annotated"
        )
