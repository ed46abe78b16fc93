"""Pascal VOC: an xml per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from lit_cli.errors import InputError
from lit_detr.readers.records import Fix, Record, class_list, make_table
from lit_detr.readers.shared import SPLITS, existing_folder, find_images, name_list, read_text
from lit_detr.samples import DetectionTable

__all__ = ["Difficult", "Voc"]

Difficult = Literal["crowd", "keep", "drop"]
_NAMES = ("labels.txt", "classes.txt")


@dataclass(frozen=True)
class Voc:
    """`Annotations/*.xml`, `JPEGImages`, and `ImageSets/Main/{train,val,test,trainval}.txt`.

    The pixels of VOC count from 1 and a box holds its last pixel, so that `xmin ymin xmax ymax` of 1 1 320 256 becomes
    0 0 320 256. Without `ImageSets/Main` all annotations are `train`; `trainval.txt` is `train` where neither train.txt
    nor val.txt is there. An image is found by the name of its xml, else by `filename`.

    Args:
        root: The folder that holds `Annotations`.
        class_names: In the wanted order, others are refused; None takes `labels.txt` or `classes.txt`, else whatever
            the files name, sorted.
        difficult: Objects marked so are passed over in training and metrics as VOC does (`crowd`), taken like others
            (`keep`), or left out (`drop`).
        group: `none`, `stem` (see `group_of`), or an element of the xml, such as `folder`.
        fix: `none` refuses faulty boxes, `clip` cuts them to the image and leaves out what has no area.
    """

    root: str | Path
    class_names: Sequence[str] | None = None
    difficult: Difficult = "crowd"
    group: str = "none"
    fix: Fix = "none"

    def read(self) -> DetectionTable:
        """Read all splits.

        Raises:
            InputError: A file that is missing or broken, an unknown class, or a faulty box.
        """
        root = existing_folder(self.root)
        annotations = root / "Annotations"
        if not annotations.is_dir():
            raise InputError(f"{annotations}: no such folder, expected it with xml files")
        splits = {split: _parse(files) for split, files in _splits(root, annotations).items()}
        names = self._names(root, [tree for trees in splits.values() for _, tree in trees])
        index = {name: i for i, name in enumerate(names)}
        folder = root / "JPEGImages" if (root / "JPEGImages").is_dir() else root
        images = {p.relative_to(folder).with_suffix("").as_posix(): p for p in find_images(folder)}
        records = {
            split: [self._record(path, tree, folder, images, index) for path, tree in trees]
            for split, trees in splits.items()
        }
        group = self.group if self.group in ("none", "stem") else "none"
        return make_table(root, records, names, group=group, fix=self.fix)

    def _names(self, root: Path, trees: Sequence[ElementTree.Element]) -> list[str]:
        if self.class_names is not None:
            return class_list(self.class_names, "class_names")
        for file in (root / name for name in _NAMES):
            if file.is_file():
                return class_list([n.strip() for n in read_text(file).splitlines() if n.strip()], str(file))
        found = {(name.text or "").strip() for tree in trees for name in tree.findall("object/name")}
        return class_list(sorted(found), f"{root}, Annotations")

    def _record(
        self, path: Path, tree: ElementTree.Element, folder: Path, images: dict[str, Path], index: dict[str, int]
    ) -> Record:
        image = images.get(path.stem)
        named = folder / (tree.findtext("filename") or path.stem).strip()
        if image is None and named.is_file():
            image = named
        if image is None:
            raise InputError(f"{path}: image is missing, expected {folder / path.stem}.jpg or its like, or {named}")
        record = Record(image, image.relative_to(folder).as_posix(), path, _size(path, tree))
        if self.group not in ("none", "stem"):
            record.group = (tree.findtext(self.group) or "").strip()
            if not record.group:
                raise InputError(f"{path}: {self.group} is missing, expected it as group is {self.group!r}")
        for number, found in enumerate(tree.findall("object"), 1):
            where = f"{path}, object {number}"
            name = (found.findtext("name") or "").strip()
            if name not in index:
                raise InputError(f"{where}: class {name!r} is unknown, expected one of {name_list(index)}")
            box = [_number(found, f"bndbox/{side}", where) for side in ("xmin", "ymin", "xmax", "ymax")]
            difficult = (found.findtext("difficult") or "0").strip() not in ("0", "")
            if not (difficult and self.difficult == "drop"):
                crowd = difficult and self.difficult == "crowd"
                record.add((box[0] - 1, box[1] - 1, box[2], box[3]), index[name], f"object {number}", crowd=crowd)
        return record


def _splits(root: Path, annotations: Path) -> dict[str, list[Path]]:
    lists = root / "ImageSets" / "Main"
    found: dict[str, list[Path]] = {}
    for split in (*SPLITS, "trainval"):
        file = lists / f"{split}.txt"
        if not file.is_file() or (split == "trainval" and found.keys() & {"train", "val"}):
            continue
        paths: dict[Path, int] = {}
        for number, line in enumerate(read_text(file).splitlines(), 1):
            if not line.strip():
                continue
            path = annotations / f"{line.strip()}.xml"
            if not path.is_file():
                raise InputError(f"{file}, line {number}: {path} is missing, expected this file")
            if path in paths:
                raise InputError(
                    f"{file}, line {number}: {line.strip()} is in line {paths[path]} too, expected it once"
                )
            paths[path] = number
        if not paths:
            raise InputError(f"{file}: empty, expected a name per line")
        found["train" if split == "trainval" else split] = list(paths)
    if found:
        return {split: found[split] for split in SPLITS if split in found}
    if lists.is_dir():
        raise InputError(f"{lists}: no train.txt, val.txt, test.txt or trainval.txt, expected at least one")
    return {"train": sorted(p for p in annotations.glob("*.xml") if p.name[0] != ".")}


def _parse(paths: Sequence[Path]) -> list[tuple[Path, ElementTree.Element]]:
    trees: list[tuple[Path, ElementTree.Element]] = []
    for path in paths:
        try:
            trees.append((path, ElementTree.parse(path).getroot()))
        except OSError as error:
            raise InputError(f"{path}: cannot read this file ({error.strerror})") from None
        except ElementTree.ParseError as error:
            raise InputError(f"{path}, line {error.position[0]}: {error.msg}, expected xml") from None
        except ValueError as error:  # an encoding that nobody knows
            raise InputError(f"{path}: {error}, expected xml") from None
    return trees


def _number(tree: ElementTree.Element, tag: str, where: str) -> float:
    text = tree.findtext(tag)
    try:
        return float(text or "")
    except ValueError:
        raise InputError(f"{where}: {tag} is {text!r}, expected a number") from None


def _size(path: Path, tree: ElementTree.Element) -> tuple[int, int] | None:
    """The annotated size; None where it is absent or 0, as some tools write."""
    if tree.find("size") is None:
        return None
    height, width = (_number(tree, f"size/{side}", str(path)) for side in ("height", "width"))
    if height < 0 or width < 0 or height % 1 or width % 1:
        raise InputError(f"{path}: size is {width:g} x {height:g}, expected whole numbers")
    return (int(height), int(width)) if height and width else None
