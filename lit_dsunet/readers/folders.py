"""Plain folders: images with labels of equal names, and images alone for prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lit_cli.errors import InputError
from lit_dsunet.headers import read_header
from lit_dsunet.readers.shared import (
    BINARY,
    classes_of,
    count_channels,
    existing_folder,
    group_channels,
    make_table,
    nifti_files,
    pair,
    split_channel,
    stem_of,
)
from lit_dsunet.samples import VolumeSample, VolumeTable

__all__ = ["FolderPairs", "find_volumes", "pair_folders"]

_PLAIN = (("images", "labels"), ("images", "masks"))
_LAYOUTS = {
    "train": (*_PLAIN, ("imagesTr", "labelsTr"), *((f"train/{i}", f"train/{m}") for i, m in _PLAIN)),
    "val": tuple((f"val/{i}", f"val/{m}") for i, m in _PLAIN),
    "test": (("imagesTs", "labelsTs"), *((f"test/{i}", f"test/{m}") for i, m in _PLAIN)),
}


@dataclass(frozen=True)
class FolderPairs:
    """Two folders with files of equal names: `images` and `labels` (or `masks`), or `imagesTr` and `labelsTr`.

    Instead of equal names the images may be `{CASE}_{0000}`, one file per channel. Splits come from folders `train`,
    `val` and `test` above the two, or from `imagesTs` and `labelsTs`. The patient is the case: where a patient has
    several, list them with their patients in a csv instead.

    Args:
        root: The folder above the two.
        channels: Names of the channels; None numbers them.
        labels: Value in the label files by class name; None is 0 (background) and 1 (lesion).
        check_headers: Whether to compare channels, shapes and affines by the headers of all files.
    """

    root: str | Path
    channels: tuple[str, ...] | None = None
    labels: Mapping[str, int] | None = None
    check_headers: bool = True

    def read(self) -> VolumeTable:
        """List the cases.

        Raises:
            InputError: No pair of folders or an empty one, an image without label or the reverse, or another number of
                channels than named.
        """
        root = existing_folder(self.root)
        classes = classes_of(self.labels or BINARY, "labels")
        splits: dict[str, list[VolumeSample]] = {}
        for split, (images, labels) in pair_folders(root).items():
            files, masks = nifti_files(images), nifti_files(labels)
            # Equal names come first: in `patient_0001` the number need not be a channel.
            if set(files) & set(masks) or not all(map(split_channel, files)):
                splits[split] = pair({case: (path,) for case, path in files.items()}, masks)
            else:
                splits[split] = pair(group_channels(files), masks)
        if not splits:
            raise InputError(f"{root}: no images with labels, expected folders images and labels")
        count = count_channels(next(iter(splits.values()))[0])
        names = self.channels or (("image",) if count == 1 else tuple(f"channel_{i}" for i in range(count)))
        if len(names) != count:
            raise InputError(f"{root}: {count} channels in the images, expected {len(names)} as channels names them")
        return make_table(splits, names, classes, headers=self.check_headers)


def pair_folders(root: Path) -> dict[str, tuple[Path, Path]]:
    """The folders of images and labels by split, as far as both exist.

    Raises:
        InputError: Two layouts at once.
    """
    found: dict[str, tuple[Path, Path]] = {}
    for split, layouts in _LAYOUTS.items():
        for images, labels in layouts:
            if not ((root / images).is_dir() and (root / labels).is_dir()):
                continue
            if split in found:
                raise InputError(f"{root}: {found[split][1]} and {root / labels} are both {split}, expected one layout")
            found[split] = root / images, root / labels
    return found


def find_volumes(folder: str | Path, channels: int) -> list[VolumeSample]:
    """List the volumes to predict.

    Args:
        folder: NIfTI files without labels: one per case (4-D where there are several channels), or `{CASE}_{0000}`, one
            per channel. A single file is one case.
        channels: How many the network takes.

    Raises:
        InputError: No such folder or no file in it, both ways of naming, or another number of channels.
    """
    folder = Path(folder).expanduser()
    files = {stem_of(folder): folder} if folder.is_file() else nifti_files(existing_folder(folder))
    per_channel = _is_per_channel(files, channels)
    cases = group_channels(files, channels) if per_channel else {stem: (path,) for stem, path in files.items()}
    samples = [VolumeSample(case, paths, None, case) for case, paths in cases.items()]
    for sample in samples:
        count = count_channels(sample)
        if count != channels:
            advice = f" (or files {sample.name}_0000 to _{channels - 1:04d})" if channels > 1 else ""
            raise InputError(
                f"case {sample.name}: {sample.images[0]} has {count} channels, expected {channels}{advice}"
            )
    return samples


def _is_per_channel(files: Mapping[str, Path], channels: int) -> bool:
    """Whether `scan_0001` is channel 1 of `scan`, and no case of its own."""
    parts = [split_channel(stem) for stem in files]
    groups: dict[str, list[int]] = {}
    for part in filter(None, parts):
        groups.setdefault(part[0], []).append(part[1])
    if not all(parts):
        return False
    if channels > 1:
        return read_header(next(iter(files.values()))).channels == 1
    # One channel: either every file is _0000, or, in a folder for another network, all cases have the same channels,
    # which is then refused. Numbers that run on under a single name are cases.
    run = sorted(next(iter(groups.values())))
    alike = all(sorted(found) == run for found in groups.values())
    return alike and run == list(range(len(run))) and (len(run) == 1 or len(groups) > 1)
