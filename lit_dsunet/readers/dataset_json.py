"""Data sets described by a dataset.json: the Medical Segmentation Decathlon and nnU-Net's raw folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_cli.errors import InputError
from lit_dsunet.files import read_json
from lit_dsunet.readers.shared import (
    classes_of_json,
    existing_folder,
    group_channels,
    make_table,
    name_list,
    nifti_files,
    pair,
    stem_of,
)
from lit_dsunet.samples import VolumeSample, VolumeTable
from lit_dsunet.splits import load_folds

__all__ = ["Msd", "NnUNet"]


@dataclass(frozen=True)
class Msd:
    """A task of the Medical Segmentation Decathlon: `imagesTr`, `labelsTr`, `dataset.json`.

    Several channels lie in one 4-D file. The cases are those of `training` in the dataset.json, or, where it lists
    none, all files of `imagesTr` by name. Names that start with `.` or `_` are left out. `imagesTs` is read as the
    split `test` only where there is a `labelsTs`. The patient is the case.

    Args:
        root: The folder of the task.
        check_headers: Whether to compare channels, shapes and affines by the headers of all files.

    Example:
        >>> Msd("data/Task04_Hippocampus").read().class_names  # doctest: +SKIP
        ('background', 'Anterior', 'Posterior')
    """

    root: str | Path
    check_headers: bool = True

    def read(self) -> VolumeTable:
        """List the cases.

        Raises:
            InputError: No dataset.json or a field of it, or images and labels that do not pair up.
        """
        root = existing_folder(self.root)
        path, content = _dataset_json(root)
        classes = classes_of_json(_field(content, "labels", path), str(path))
        channels = _channel_names(content, path)
        listed = content.get("training") or []
        splits = {"train": self._listed(root, path, listed) if listed else self._paired(root, "Tr")}
        if (root / "labelsTs").is_dir():
            splits["test"] = self._paired(root, "Ts")
        return make_table(splits, channels, classes, headers=self.check_headers)

    @staticmethod
    def _paired(root: Path, part: str) -> list[VolumeSample]:
        images = nifti_files(root / f"images{part}", skip="._")
        labels = nifti_files(root / f"labels{part}", skip="._")
        return pair({case: (image,) for case, image in images.items()}, labels)

    @staticmethod
    def _listed(root: Path, path: Path, listed: Any) -> list[VolumeSample]:
        samples: list[VolumeSample] = []
        for entry in listed if isinstance(listed, list) else [listed]:
            if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("image", "label")):
                raise InputError(f"{path}: training has {entry!r}, expected an object with image and label")
            image, label = root / entry["image"], root / entry["label"]
            case = stem_of(image)
            if case[0] in "._":
                continue
            for file in (image, label):
                if not file.is_file():
                    raise InputError(f"case {case}: {file} is missing, expected it as {path.name} lists it")
            samples.append(VolumeSample(case, (image,), label, case))
        if not samples:
            raise InputError(f"{path}: training lists no case, expected some")
        return samples


@dataclass(frozen=True)
class NnUNet:
    """A raw data set of nnU-Net: `imagesTr/{CASE}_{0000}.nii.gz`, `labelsTr/{CASE}.nii.gz`, `dataset.json`.

    Folds come from a `splits_final.json` in the folder, beside it, or in `nnUNet_preprocessed/<name>` next to
    `nnUNet_raw`. `imagesTs` is read as the split `test` only where there is a `labelsTs`. The patient is the case.

    Args:
        root: The folder `DatasetXXX_Name`.
        check_headers: Whether to compare channels, shapes and affines by the headers of all files.
        read_folds: False leaves a `splits_final.json` alone.
    """

    root: str | Path
    check_headers: bool = True
    read_folds: bool = True

    def read(self) -> VolumeTable:
        """List the cases.

        Raises:
            InputError: No dataset.json or a field of it, regions or an ignore label, another file type than NIfTI, a
                channel or a label that is missing, or folds that do not fit the cases.
        """
        root = existing_folder(self.root)
        path, content = _dataset_json(root)
        classes = classes_of_json(_field(content, "labels", path), str(path))
        channels = _channel_names(content, path)
        ending = content.get("file_ending", ".nii.gz")
        if ending not in (".nii", ".nii.gz"):
            raise InputError(f"{path}: file_ending is {ending!r}, expected .nii.gz or .nii")
        splits: dict[str, list[VolumeSample]] = {}
        if content.get("dataset"):
            splits["train"] = self._listed(root, path, content["dataset"], len(channels))
        else:
            splits["train"] = self._paired(root, "Tr", ending, len(channels))
        if (root / "labelsTs").is_dir():
            splits["test"] = self._paired(root, "Ts", ending, len(channels))
        places = (root, root.parent, root.parent.parent / "nnUNet_preprocessed" / root.name)
        files = [file for place in places if (file := place / "splits_final.json").is_file()]
        folds = None
        if files and self.read_folds:
            folds = tuple(tuple(fold) for fold in load_folds(files[0], splits["train"], complete=False))
        return make_table(splits, channels, classes, headers=self.check_headers, folds=folds)

    @staticmethod
    def _paired(root: Path, part: str, ending: str, channels: int) -> list[VolumeSample]:
        images = nifti_files(root / f"images{part}", (ending,))
        labels = nifti_files(root / f"labels{part}", (ending,))
        return pair(group_channels(images, channels), labels)

    @staticmethod
    def _listed(root: Path, path: Path, listed: Any, channels: int) -> list[VolumeSample]:
        """The cases that the dataset.json itself places, wherever the files are."""
        samples: list[VolumeSample] = []
        for case, entry in listed.items() if isinstance(listed, dict) else [("?", listed)]:
            images = entry.get("images") if isinstance(entry, dict) else None
            if not isinstance(images, list) or not isinstance(entry.get("label"), str):
                raise InputError(f"{path}: dataset has {case!r}: {entry!r}, expected an object with images and label")
            if len(images) != channels:
                raise InputError(f"{path}: case {case} has {len(images)} images, expected {channels} channels")
            files = [root / str(file) for file in (*images, entry["label"])]
            for file in files:
                if not file.is_file():
                    raise InputError(f"case {case}: {file} is missing, expected it as {path.name} lists it")
            samples.append(VolumeSample(case, tuple(files[:-1]), files[-1], case))
        return samples


def _dataset_json(root: Path) -> tuple[Path, dict[str, Any]]:
    path = root / "dataset.json"
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected it to name channels and labels")
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: no object, expected one with channels and labels")
    return path, content


def _field(content: dict[str, Any], key: str, path: Path) -> Any:
    if key not in content:
        raise InputError(f"{path}: no {key!r}, expected it beside {name_list(sorted(content))}")
    return content[key]


def _channel_names(content: dict[str, Any], path: Path) -> tuple[str, ...]:
    key = "channel_names" if "channel_names" in content else "modality"
    names = _field(content, key, path)
    expected = {str(i) for i in range(len(names))} if isinstance(names, dict) else set()
    if not expected or set(names) != expected:
        raise InputError(f"{path}: {key} is {names!r}, expected an object with the keys 0, 1, ... of the channels")
    return tuple(str(names[str(i)]) for i in range(len(names)))
