"""Stroke data sets in BIDS-like folders: ISLES 2022, ISLES 2024, ATLAS v2."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lit_cli.errors import InputError
from lit_dsunet.readers.shared import BINARY, classes_of, existing_folder, make_table, name_list, stem_of
from lit_dsunet.samples import VolumeSample, VolumeTable

__all__ = ["AtlasV2", "Isles22", "Isles24"]

_RAW_FOLDERS = ("rawdata", "raw_data")  # the releases of ISLES differ
_OTHER_GRID = "; register and resample it to {} first, or leave it out of channels"


@dataclass(frozen=True)
class Isles22:
    """ISLES 2022, as released and as in the challenge's repository.

    Released: `sub-*/ses-*/dwi/*_{dwi,adc}.nii.gz`, `sub-*/ses-*/anat/*_FLAIR.nii.gz`. Repository:
    `rawdata/sub-*/ses-*/*_{dwi,adc,flair}.nii.gz`. Both: `derivatives/sub-*/ses-*/*_msk.nii.gz`. A session is a case,
    the subject the patient.

    Args:
        root: The folder that holds `derivatives`.
        channels: Which images, by the last part of their names in either case. FLAIR lies on a grid of its own and is
            refused unless it was resampled.
        labels: Value in the masks by class name; None is 0 and 1.
        check_headers: Whether to compare channels, shapes and affines by the headers of all files.

    Example:
        >>> Isles22("data/isles2022").read().channel_names  # doctest: +SKIP
        ('dwi', 'adc')
    """

    root: str | Path
    channels: tuple[str, ...] = ("dwi", "adc")
    labels: Mapping[str, int] | None = None
    check_headers: bool = True

    def read(self) -> VolumeTable:
        """List the cases.

        Raises:
            InputError: No masks, a session without mask or channel (or the reverse), or a channel on another grid.
        """
        root = existing_folder(self.root)
        classes = classes_of(self.labels or BINARY, "labels")
        _check_channels(self.channels)
        masks = _by_folder(_volumes(_existing(root / "derivatives", "the masks"), "*_msk.nii*"), "sub", "ses")
        images = _by_folder(_volumes(_raw_folder(root), "*.nii*", besides="derivatives"), "sub", "ses")
        _same_cases(root, images, masks, "*_msk.nii.gz below derivatives", name_list(self.channels))
        several = len({_entity("sub", session) for session in masks}) < len(masks)
        samples: list[VolumeSample] = []
        for session, files in sorted(masks.items()):
            subject = _entity("sub", session)
            case = session if several else subject
            found = images[session]
            paths = tuple(_only(case, _ending_in(found, f"_{name}"), f"*_{name}.nii.gz") for name in self.channels)
            samples.append(VolumeSample(case, paths, _only(case, files, "*_msk.nii.gz"), subject))
        # FLAIR has never the grid of DWI as released: whoever asks for it is told so now, not at the first epoch.
        headers = self.check_headers or "flair" in {name.lower() for name in self.channels}
        advice = _OTHER_GRID.format(self.channels[0])
        return make_table({"train": samples}, self.channels, classes, headers=headers, advice=advice)


@dataclass(frozen=True)
class Isles24:
    """ISLES 2024: acute CT with the final infarct, everything on the grid of the non-contrast CT.

    Images are `derivatives/sub-*/**/*_space-ncct_{cta,tmax,...}.nii.gz`, and `*_ncct.nii.gz` of `rawdata` (or
    `raw_data`) for `ncct`; the label is `derivatives/sub-*/**/*_lesion-msk.nii.gz`. Sessions may be called `ses-01` or
    `ses-0001`. A subject is a case.

    Args:
        root: The folder that holds `derivatives`.
        channels: Which images: `ncct`, or what follows `space-ncct_` in the names.
        labels: Value in the masks by class name; None is 0 and 1.
        check_headers: Whether to compare channels, shapes and affines by the headers of all files.
    """

    root: str | Path
    channels: tuple[str, ...] = ("cta", "tmax")
    labels: Mapping[str, int] | None = None
    check_headers: bool = True

    def read(self) -> VolumeTable:
        """List the cases.

        Raises:
            InputError: No masks, a subject without mask or channel (or the reverse), or a channel on another grid.
        """
        root = existing_folder(self.root)
        classes = classes_of(self.labels or BINARY, "labels")
        _check_channels(self.channels)
        derived = _by_folder(_volumes(_existing(root / "derivatives", "images and masks"), "*.nii*"), "sub")
        raw = _by_folder(_volumes(_raw_folder(root), "*.nii*", besides="derivatives"), "sub")
        masks = {s: found for s, files in derived.items() if (found := _ending_in(files, "lesion-msk"))}
        # A subject is there by its images, raw or derived; other masks, of vessels say, do not make one.
        images = {s: raw.get(s, []) + derived.get(s, []) for s in sorted({*raw, *derived})}
        images = {s: files for s, files in images.items() if len(_ending_in(files, "-msk")) < len(files)}
        _same_cases(root, images, masks, "*_lesion-msk.nii.gz below derivatives", name_list(self.channels))
        samples: list[VolumeSample] = []
        for subject, files in sorted(masks.items()):
            paths: list[Path] = []
            for name in self.channels:
                found = _ending_in(derived[subject], f"_space-ncct_{name}")
                if not found and name.lower() == "ncct":
                    found = _ending_in(raw.get(subject, []), "_ncct")
                paths.append(_only(subject, found, f"*_space-ncct_{name}.nii.gz"))
            samples.append(VolumeSample(subject, tuple(paths), _only(subject, files, "*_lesion-msk.nii.gz"), subject))
        advice = _OTHER_GRID.format("the non-contrast CT")
        return make_table({"train": samples}, self.channels, classes, headers=self.check_headers, advice=advice)


@dataclass(frozen=True)
class AtlasV2:
    """ATLAS v2: `**/*_T1w.nii.gz` with `*_label-L_desc-T1lesion_mask.nii.gz`.

    A session is a case, the subject the patient. Folders called `Testing` hold images whose masks are not public and
    are left out.

    Args:
        root: The folder of the release, or its `Training`.
        labels: Value in the masks by class name; None is 0 and 1.
        check_headers: Whether to compare channels, shapes and affines by the headers of all files.
    """

    root: str | Path
    labels: Mapping[str, int] | None = None
    check_headers: bool = True

    def read(self) -> VolumeTable:
        """List the cases.

        Raises:
            InputError: An image without mask (or the reverse), or two of the same name.
        """
        root = existing_folder(self.root)
        classes = classes_of(self.labels or BINARY, "labels")
        images = self._by_name(_volumes(root, "*_T1w.nii*", besides="Testing"), r"_T1w")
        masks = self._by_name(_volumes(root, "*_mask.nii*", besides="Testing"), r"_label-[^_]+_desc-T1lesion_mask")
        _same_cases(root, images, masks, "*_label-L_desc-T1lesion_mask.nii.gz", "*_T1w.nii.gz")
        samples: list[VolumeSample] = []
        for name, files in images.items():
            image, mask = _only(name, files, "*_T1w.nii.gz"), _only(name, masks[name], "*_T1lesion_mask.nii.gz")
            # Without the template's name, which is the same in all: sub-r001s001_ses-1.
            case = re.sub(r"_space-[^_]+", "", name)
            samples.append(VolumeSample(case, (image,), mask, _entity("sub", name) or case))
        return make_table({"train": samples}, ("T1w",), classes, headers=self.check_headers)

    @staticmethod
    def _by_name(paths: Iterable[Path], ending: str) -> dict[str, list[Path]]:
        """Files by what their names begin with; images and masks may lie in different folders."""
        found: dict[str, list[Path]] = {}
        for path in paths:
            if match := re.fullmatch(rf"(.+){ending}", stem_of(path)):
                found.setdefault(match[1], []).append(path)
        return found


# ---- Shared by the three ---------------------------------------------------------------------------------------------


def _existing(folder: Path, what: str) -> Path:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, expected {what} in it")
    return folder


def _raw_folder(root: Path) -> Path:
    return next((folder for name in _RAW_FOLDERS if (folder := root / name).is_dir()), root)


def _check_channels(channels: tuple[str, ...]) -> None:
    if not channels or len({name.lower() for name in channels}) < len(channels):
        raise InputError(f"channels is {list(channels)}, expected different names of images")


def _volumes(folder: Path, pattern: str, besides: str | None = None) -> list[Path]:
    """The NIfTI files below a folder, apart from hidden ones and those of a folder that is not asked for."""
    paths = (p for p in sorted(folder.rglob(pattern)) if p.name.endswith((".nii", ".nii.gz")) and p.name[0] != ".")
    return [p for p in paths if besides not in p.relative_to(folder).parts and p.is_file()]


def _entity(key: str, name: str) -> str:
    """`sub-x` of `sub-x_ses-y_dwi`; empty without."""
    return next((part for part in name.split("_") if part.startswith(f"{key}-")), "")


def _by_folder(paths: Iterable[Path], *keys: str) -> dict[str, list[Path]]:
    """Files by the entities that their folders speak of, the innermost folder first: `sub-x_ses-y`."""
    found: dict[str, list[Path]] = {}
    for path in paths:
        entities = [next((f for f in path.parts[-2::-1] if f.startswith(f"{key}-")), "") for key in keys]
        if entities[0]:
            found.setdefault("_".join(filter(None, entities)), []).append(path)
    return found


def _ending_in(paths: Iterable[Path], ending: str) -> list[Path]:
    return [path for path in paths if stem_of(path).lower().endswith(ending.lower())]


def _only(case: str, paths: list[Path], expected: str) -> Path:
    if not paths:
        raise InputError(f"case {case}: no file {expected}, expected one")
    if len(paths) > 1:
        raise InputError(f"case {case}: {paths[0]} and {paths[1]} are both {expected}, expected one")
    return paths[0]


def _same_cases(
    root: Path, images: Mapping[str, list[Path]], masks: Mapping[str, list[Path]], mask: str, image: str
) -> None:
    if not masks:
        raise InputError(f"{root}: no {mask}, expected one per case")
    for case, paths in images.items():
        if case not in masks:
            raise InputError(f"case {case}: {paths[0]} has no mask, expected {mask}")
    for case, paths in masks.items():
        if case not in images:
            raise InputError(f"case {case}: mask {paths[0]} has no image, expected {image}")
