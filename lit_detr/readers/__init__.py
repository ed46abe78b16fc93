"""Readers: one small class per on-disk format, all with `read() -> DetectionTable`.

Reading lists the images and checks every box; no pixel is decoded. Whether an image has the size that its annotation
says is for whoever decodes it to ask: `check_size`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

from lit_cli.errors import InputError
from lit_detr.readers.coco import Coco, find_annotations
from lit_detr.readers.records import Fix
from lit_detr.readers.shared import check_size, existing_folder, find_images, image_size, read_text, split_folders
from lit_detr.readers.text import AiTod, PlainText, VisDrone
from lit_detr.readers.voc import Difficult, Voc
from lit_detr.readers.yolo import Yolo, find_yaml
from lit_detr.samples import DetectionTable

__all__ = [
    "AiTod",
    "Coco",
    "DetectionReader",
    "Difficult",
    "Fix",
    "Format",
    "PlainText",
    "VisDrone",
    "Voc",
    "Yolo",
    "check_size",
    "detect_format",
    "find_images",
    "image_size",
    "make_reader",
]

Format = Literal["auto", "coco", "yolo", "voc", "aitod", "visdrone", "text"]
Known = Literal["coco", "yolo", "voc", "aitod", "visdrone", "text"]


class DetectionReader(Protocol):
    """What the data module needs of a format."""

    def read(self) -> DetectionTable:
        """Read the annotations. Pixels are not touched."""
        ...


def detect_format(root: str | Path) -> Known:
    """Name the format of a data set by the files in it.

    Raises:
        InputError: Nothing known is there.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> Path(folder.name, "annotations").mkdir()
        >>> _ = Path(folder.name, "annotations", "instances_train2017.json").write_text("{}")
        >>> detect_format(folder.name)
        'coco'
    """
    root = Path(root)
    if root.is_file() and find_yaml(root):
        return "yolo"
    root = existing_folder(root)
    if any((root / "Annotations").glob("*.xml")):
        return "voc"
    names = [p.name for f in (root / "annotations", root / "Annotations", root) for p in f.glob("*.json")]
    if any(re.match(AiTod.prefix, name) for name in names) and not find_annotations(root):
        return "aitod"
    if find_annotations(root):
        return "coco"
    if find_yaml(root):
        return "yolo"
    for _, labels in split_folders(root, ("labels", "annotations")).values():
        for path in sorted(labels.rglob("*.txt")):
            line = next((text.strip() for text in read_text(path).splitlines() if text.strip()), None)
            if line is None or path.stem == "classes":
                continue
            if line.count(",") >= 7:
                return "visdrone"
            return "yolo" if _is_yolo(line) and labels.name != "annotations" else "text"
    raise InputError(
        f"{root}: unknown format, expected annotations/train.json or instances_train.json (coco), data.yaml (yolo), "
        "Annotations/*.xml (voc), annotations/aitod*.json (aitod), or images beside annotations/*.txt (visdrone, text)"
    )


def _is_yolo(line: str) -> bool:
    try:
        numbers = [float(cell) for cell in line.split()]
    except ValueError:
        return False
    return len(numbers) == 5 and numbers[0] % 1 == 0 and all(0 <= n <= 1 for n in numbers[1:])


def make_reader(
    format: Format,
    root: str | Path,
    *,
    files: Mapping[str, str] | None = None,
    images: str | None = None,
    class_names: Sequence[str] | None = None,
    difficult: Difficult = "crowd",
    group: str = "none",
    fix: Fix = "none",
) -> DetectionReader:
    """Choose the reader.

    Args:
        format: The on-disk format; `auto` looks at the files.
        root: The folder of the data set; for `yolo` also the yaml itself.
        files: Annotation file by split, relative to the root (coco, aitod); None looks for them.
        images: Folder of the images, relative to the root (coco, aitod); None looks for it.
        class_names: In their order, where the files do not name them all (yolo, voc, text).
        difficult: What becomes of objects that VOC marks so.
        group: What keeps images together in splits and bootstraps: `none`, each is its own; `stem`, frames of a video,
            by the file's name up to the last underscore; or a field of the annotation (coco, aitod, voc).
        fix: `none` refuses boxes without area and boxes more than 1 px outside their image; `clip` cuts boxes to the
            image and leaves out those without area, with one warning.

    Raises:
        InputError: The format is unknown or cannot be told from the files, or an option that it does not have.
    """
    root = Path(root).expanduser()  # a YAML file knows no shell that would do it
    if fix not in ("none", "clip"):
        raise InputError(f"fix is {fix!r}, expected none or clip")
    if difficult not in ("crowd", "keep", "drop"):
        raise InputError(f"difficult is {difficult!r}, expected crowd, keep or drop")
    if format == "auto":
        format = "coco" if files else detect_format(root)
    has = {
        "files": format in ("coco", "aitod"),
        "images": format in ("coco", "aitod"),
        "class_names": format in ("yolo", "voc", "text"),
        "group": format in ("coco", "aitod", "voc") or group in ("none", "stem"),
    }
    given = {"files": files, "images": images, "class_names": class_names, "group": group}
    for name, value in given.items():
        if value is not None and not has[name]:
            wanted = "none or stem" if name == "group" else "null"
            raise InputError(f"{name} is {value!r}, expected {wanted}, as {root} is read as {format}")
    if format in ("coco", "aitod"):
        return (Coco if format == "coco" else AiTod)(root, files, images, group, fix)
    if format == "yolo":
        return Yolo(root, class_names, group, fix)
    if format == "voc":
        return Voc(root, class_names, difficult, group, fix)
    if format == "visdrone":
        return VisDrone(root, group, fix)
    if format == "text":
        return PlainText(root, class_names, group, fix)
    raise InputError(f"format is {format!r}, expected auto, coco, yolo, voc, aitod, visdrone or text")
