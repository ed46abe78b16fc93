"""Readers: one small class per on-disk format, all with `read() -> VolumeTable`.

Reading lists the files and compares their headers; no voxel is touched. An image without label, a label without image,
a missing channel, two grids in a case: each is an `InputError` with the name of the case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

from lit_cli.errors import InputError
from lit_dsunet.files import read_json
from lit_dsunet.readers.bids import AtlasV2, Isles22, Isles24
from lit_dsunet.readers.dataset_json import Msd, NnUNet
from lit_dsunet.readers.folders import FolderPairs, find_volumes, pair_folders
from lit_dsunet.readers.shared import existing_folder, split_channel, stem_of
from lit_dsunet.readers.tables import CaseList, list_files
from lit_dsunet.samples import VolumeTable

__all__ = [
    "AtlasV2",
    "CaseList",
    "FolderPairs",
    "Format",
    "Isles22",
    "Isles24",
    "Msd",
    "NnUNet",
    "VolumeReader",
    "detect_format",
    "find_volumes",
    "make_reader",
]

Format = Literal["auto", "msd", "nnunet", "isles22", "isles24", "atlas_v2", "folders", "list"]


class VolumeReader(Protocol):
    """What the data module needs of a format."""

    def read(self) -> VolumeTable:
        """List the cases. Voxels are not read."""
        ...


def detect_format(
    root: str | Path,
) -> Literal["msd", "nnunet", "isles22", "isles24", "atlas_v2", "folders", "list"]:
    """Name the format of a data set by the files in it.

    Raises:
        InputError: Nothing known is there.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> for name in ("images", "labels"):
        ...     Path(folder.name, name).mkdir()
        >>> detect_format(folder.name)
        'folders'
    """
    root = Path(root)
    if root.is_file() and root.suffix.lower() in (".csv", ".json"):
        return "list"
    root = existing_folder(root)
    if (root / "dataset.json").is_file():
        return _msd_or_nnunet(root)
    derivatives = root / "derivatives"
    if derivatives.is_dir():
        if any(derivatives.rglob("*lesion-msk.nii*")):
            return "isles24"
        if any(derivatives.rglob("*_msk.nii*")):
            return "isles22"
    if pair_folders(root):
        return "folders"
    if any(root.rglob("*_desc-T1lesion_mask.nii*")):  # before the lists, as the release has a table of its own
        return "atlas_v2"
    if len(list_files(root)) == 1:
        return "list"
    raise InputError(
        f"{root}: unknown format, expected dataset.json (msd, nnunet), derivatives with *_msk.nii.gz (isles22) or "
        "*_lesion-msk.nii.gz (isles24), *_desc-T1lesion_mask.nii.gz (atlas_v2), images and labels (folders), or a "
        "single csv or json (list)"
    )


def make_reader(
    format: Format,
    root: str | Path,
    channels: Sequence[str] | None = None,
    labels: Mapping[str, int] | None = None,
    check_headers: bool = True,
    read_folds: bool = True,
) -> VolumeReader:
    """Choose the reader.

    Args:
        format: The on-disk format; `auto` looks at the files.
        root: The folder of the data set; for `list` also the csv or json itself.
        channels: Which images (isles22, isles24), or how they are called (folders, list); None is the format's
            default. The other formats name them themselves.
        labels: Value in the label files by class name, for the formats that do not state it; None is 0 and 1.
        check_headers: Whether to compare channels, shapes and affines by the headers of all files.
        read_folds: Whether to take the folds of a `splits_final.json` (nnunet).

    Raises:
        InputError: The format is unknown or cannot be told from the files, or an option that it does not have.
    """
    root = Path(root).expanduser()  # a YAML file knows no shell that would do it
    if format == "auto":
        format = detect_format(root)
    names = None if channels is None else tuple(channels)
    if names == () or labels == {}:
        raise InputError("channels or labels is empty, expected null or some names")
    if names is not None and format in ("msd", "nnunet", "atlas_v2"):
        raise InputError(f"channels is {list(names)}, expected none, as {root} is read as {format}")
    if labels is not None and format in ("msd", "nnunet"):
        raise InputError(f"labels is {dict(labels)}, expected none, as the dataset.json of {root} names the classes")
    if format == "msd":
        return Msd(root, check_headers)
    if format == "nnunet":
        return NnUNet(root, check_headers, read_folds)
    if format == "isles22":
        return Isles22(root, names or Isles22.channels, labels, check_headers)
    if format == "isles24":
        return Isles24(root, names or Isles24.channels, labels, check_headers)
    if format == "atlas_v2":
        return AtlasV2(root, labels, check_headers)
    if format == "folders":
        return FolderPairs(root, names, labels, check_headers)
    if format == "list":
        return CaseList(root, names, labels, check_headers)
    known = "auto, msd, nnunet, isles22, isles24, atlas_v2, folders or list"
    raise InputError(f"format is {format!r}, expected {known}")


def _msd_or_nnunet(root: Path) -> Literal["msd", "nnunet"]:
    """Tell the two formats with a dataset.json apart: by the names of the images, else by what the json says."""
    content = read_json(root / "dataset.json")
    if isinstance(content, dict) and content.get("dataset"):
        return "nnunet"
    images, labels = (
        {stem_of(p) for p in (root / name).glob("*.nii*") if p.name[0] not in "._"} for name in ("imagesTr", "labelsTr")
    )
    if images & labels:
        return "msd"
    if images and all(map(split_channel, images)):
        return "nnunet"
    classes = content.get("labels") if isinstance(content, dict) else None
    values = list(classes.values()) if isinstance(classes, dict) else []
    return "nnunet" if values and all(isinstance(value, int | list) for value in values) else "msd"
