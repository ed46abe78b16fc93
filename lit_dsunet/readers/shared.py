"""What the readers of several formats use; it imports none of them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lit_cli.errors import InputError
from lit_dsunet.headers import Header, check_same_grid, read_header
from lit_dsunet.samples import VolumeSample, VolumeTable

__all__ = [
    "BINARY",
    "classes_of",
    "classes_of_json",
    "count_channels",
    "existing_folder",
    "group_channels",
    "make_table",
    "name_list",
    "nifti_files",
    "pair",
    "split_channel",
    "stem_of",
]

BINARY: dict[str, int] = {"background": 0, "lesion": 1}
"""The classes of a format that names none."""

_LARGEST_LABEL = 65535
_MOST_CLASSES = 255


# ---- Files -----------------------------------------------------------------------------------------------------------


def existing_folder(root: str | Path) -> Path:
    """The folder of a data set, which must exist."""
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder, expected the folder of a data set")
    return root


def stem_of(path: Path) -> str:
    """The name of a file without .nii or .nii.gz."""
    return path.name.removesuffix(".gz").removesuffix(".nii")


def nifti_files(folder: Path, endings: tuple[str, ...] = (".nii.gz", ".nii"), skip: str = ".") -> dict[str, Path]:
    """The NIfTI files of a folder by their stems, in order.

    Args:
        folder: Where to look; not below it.
        endings: What the names end in.
        skip: First characters of names that are left out, such as the `._*` files that macOS leaves behind.

    Raises:
        InputError: No folder, no such file in it, or two with the same stem.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, expected one with {' or '.join(endings)} files")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if not path.name.endswith(endings) or path.name[0] in skip or not path.is_file():
            continue
        stem = stem_of(path)
        if stem in files:
            raise InputError(f"{folder}: {files[stem].name} and {path.name} are both case {stem}, expected one of them")
        files[stem] = path
    if not files:
        raise InputError(f"{folder}: no {' or '.join(endings)} file, expected one per case")
    return files


def name_list(names: Sequence[str]) -> str:
    """The first names of a list, for an error."""
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


# ---- Classes ---------------------------------------------------------------------------------------------------------


def classes_of(labels: Mapping[str, int], where: str) -> tuple[tuple[str, ...], dict[int, int]]:
    """Class names, the background first, and class index by label value.

    Args:
        labels: Value in the label files by class name.
        where: What to name in the error.

    Raises:
        InputError: No background, fewer than two classes, or values that are no different whole numbers.

    Example:
        >>> classes_of({"lesion": 255, "background": 0}, "labels")
        (('background', 'lesion'), {0: 0, 255: 1})
    """
    for name, value in labels.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST_LABEL:
            raise InputError(f"{where}: {name!r} is {value!r}, expected a whole number from 0 to {_LARGEST_LABEL}")
    ordered = sorted(labels, key=lambda name: labels[name])
    values = [labels[name] for name in ordered]
    if 0 not in values:
        raise InputError(f"{where}: the values are {values}, expected 0 among them for the background")
    if len(set(values)) < len(values):
        raise InputError(f"{where}: the values are {values}, expected a different one per class")
    if not 2 <= len(values) <= _MOST_CLASSES:
        raise InputError(f"{where}: {len(values)} classes, expected 2 to {_MOST_CLASSES} with the background")
    return tuple(ordered), {value: index for index, value in enumerate(values)}


def classes_of_json(labels: Any, where: str) -> tuple[tuple[str, ...], dict[int, int]]:
    """Classes of a dataset.json in the form of MSD (`{"0": "background"}`) or of nnU-Net (`{"background": 0}`)."""
    if not isinstance(labels, dict) or not labels:
        raise InputError(f"{where}: labels is {labels!r}, expected an object with the classes")
    regions = [name for name, value in labels.items() if isinstance(value, list)]
    if regions:
        raise InputError(
            f"{where}: labels {name_list(regions)} are regions of several values, expected one value per class "
            "(list the disjoint classes instead; regions can be added up from the predictions)"
        )
    if "ignore" in {str(name).lower() for pair in labels.items() for name in pair}:
        raise InputError(f"{where}: labels has an ignore label, expected fully annotated volumes")
    if all(isinstance(value, str) for value in labels.values()):
        numbers = [key for key in labels if not key.isdecimal()]
        if numbers:
            raise InputError(f"{where}: labels has {name_list(numbers)}, expected numbers that name the classes")
        if len(set(labels.values())) < len(labels):
            raise InputError(f"{where}: labels names are {name_list(list(labels.values()))}, expected different ones")
        labels = {name: int(key) for key, name in labels.items()}
    return classes_of(labels, f"{where}: labels")


# ---- Cases -----------------------------------------------------------------------------------------------------------


def split_channel(stem: str) -> tuple[str, int] | None:
    """Case and channel of a file named as nnU-Net does: `la_003_0001` is channel 1 of `la_003`."""
    match = re.fullmatch(r"(.+)_(\d{4})", stem)
    return (match[1], int(match[2])) if match else None


def group_channels(files: Mapping[str, Path], count: int | None = None) -> dict[str, tuple[Path, ...]]:
    """Put the `{CASE}_{0000}` files of each case together.

    Args:
        files: Paths by stem.
        count: Number of channels; None is the largest that a case has.

    Raises:
        InputError: A name without channel, or a case with a channel too few or too many.
    """
    found: dict[str, dict[int, Path]] = {}
    for stem, path in files.items():
        parts = split_channel(stem)
        if parts is None:
            raise InputError(f"{path}: a name without channel, expected one like {stem}_0000")
        found.setdefault(parts[0], {})[parts[1]] = path
    expected = count or 1 + max(channel for channels in found.values() for channel in channels)
    for case, channels in found.items():
        for channel in range(expected):
            if channel not in channels:
                folder = next(iter(channels.values())).parent
                raise InputError(
                    f"case {case}: {case}_{channel:04d} is missing in {folder}, expected {expected} channels"
                )
        extra = max(channels)
        if extra >= expected:
            raise InputError(f"case {case}: {channels[extra]} is channel {extra}, expected {expected} channels from 0")
    return {case: tuple(channels[i] for i in range(expected)) for case, channels in found.items()}


def count_channels(sample: VolumeSample) -> int:
    """The number of its files, or of the channels in its only file."""
    several = len(sample.images)
    return several if several > 1 else read_header(next(iter(sample.images))).channels


def pair(images: Mapping[str, tuple[Path, ...]], labels: Mapping[str, Path]) -> list[VolumeSample]:
    """Pair images and labels of equal names, each case its own patient.

    Raises:
        InputError: An image without label or a label without image.
    """
    for case, paths in images.items():
        if case not in labels:
            raise InputError(
                f"case {case}: {paths[0]} has no label, expected {next(iter(labels.values())).parent}/{case}"
            )
    for case, path in labels.items():
        if case not in images:
            raise InputError(f"case {case}: label {path} has no image, expected one of the same name")
    return [VolumeSample(case, images[case], labels[case], case) for case in images]


def make_table(
    splits: dict[str, list[VolumeSample]],
    channel_names: Sequence[str],
    classes: tuple[tuple[str, ...], dict[int, int]],
    *,
    headers: bool = True,
    folds: tuple[tuple[str, ...], ...] | None = None,
    advice: str = "",
) -> VolumeTable:
    """Check the cases of a data set against each other and make the table.

    Args:
        splits: Cases by split; empty ones are left out.
        channel_names: One per channel of every case.
        classes: As `classes_of` returns them.
        headers: Whether to open the header of every file: channels, shapes and affines.
        folds: Held-out cases per fold.
        advice: What to do about files on different grids, appended to the error.

    Raises:
        InputError: A name twice or with a slash, a patient in two splits, cases with different numbers of files, or
            files that do not fit together.
    """
    splits = {split: samples for split, samples in splits.items() if samples}
    names: set[str] = set()
    split_of: dict[str, str] = {}
    first = next(iter(splits.values()))[0]
    for split, samples in splits.items():
        for sample in samples:
            if sample.name in names:
                raise InputError(f"case {sample.name}: {sample.images[0]} is the second of this name, expected one")
            names.add(sample.name)
            if not sample.name or set(sample.name) & set("/\\"):
                raise InputError(f"case {sample.name!r}: no name for a file, expected one without slashes")
            if len(sample.images) != len(first.images):
                count = len(sample.images)
                raise InputError(
                    f"case {sample.name}: {count} image files, expected {len(first.images)} as in case {first.name}"
                )
            if split_of.setdefault(sample.patient, split) != split:
                raise InputError(
                    f"case {sample.name}: patient {sample.patient} is in {split_of[sample.patient]} and in {split}, "
                    "expected each patient in one split"
                )
    if headers:
        samples = [sample for part in splits.values() for sample in part]
        # Threads, as opening many small files on a network is mostly waiting. `map` raises in the order of the cases.
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for _ in pool.map(lambda sample: _check_sample(sample, channel_names, advice), samples):
                pass
    return VolumeTable(splits, tuple(channel_names), *classes, folds)


def _check_sample(sample: VolumeSample, channel_names: Sequence[str], advice: str) -> None:
    reference: Header | None = None
    for path in (*sample.images, *([] if sample.label is None else [sample.label])):
        where = f"case {sample.name}, {path}"
        try:
            header = read_header(path)
        except InputError as error:
            raise InputError(f"case {sample.name}, {error}") from None
        expected = len(channel_names) if len(sample.images) == 1 and path != sample.label else 1
        if header.channels != expected:
            names = "as a label" if path == sample.label else f"({name_list(channel_names)})"
            raise InputError(f"{where}: {header.channels} channels in the file, expected {expected} {names}")
        if reference is None:
            reference = header
        check_same_grid(where, header, sample.images[0], reference, advice)
