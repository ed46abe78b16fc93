"""What a reader returns: files of a case, and the case itself once it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["Geometry", "Volume", "VolumeSample", "VolumeTable"]


@dataclass(frozen=True, slots=True)
class VolumeSample:
    """Files of one case.

    Attributes:
        name: Identifier, unique in the data set.
        images: One file per channel, or one file with the channels as fourth axis.
        label: File of the label map; None where there is none.
        patient: Whose case it is: folds never share a patient.
    """

    name: str
    images: tuple[Path, ...]
    label: Path | None
    patient: str


@dataclass(frozen=True, slots=True)
class VolumeTable:
    """A data set.

    Attributes:
        splits: Cases by `train`, `val`, `test`; the latter two where the data set defines them.
        channel_names: One per image channel.
        class_names: One per class, the background first.
        label_values: Class index by the value that stands for it in the label files.
        folds: Names of the held-out cases per fold, where the data set defines folds.
    """

    splits: dict[str, list[VolumeSample]]
    channel_names: tuple[str, ...]
    class_names: tuple[str, ...]
    label_values: Mapping[int, int]
    folds: tuple[tuple[str, ...], ...] | None = None


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where the voxels of an array lie in the file that it came from.

    Arrays are (D, H, W) = (z, y, x) of the closest canonical orientation (RAS+); the file may be stored otherwise.

    Attributes:
        affine: (4, 4) float64 of the file: voxel indices as stored to mm.
        shape: The file's three sizes as stored.
        spacing: (3,) mm per voxel of the array, along D, H, W.
    """

    affine: NDArray[np.float64]
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]


@dataclass(slots=True)
class Volume:
    """A case in memory.

    Attributes:
        name: Identifier.
        image: (C, D, H, W) float32.
        label: (D, H, W) uint8 class indices, or None.
        geometry: Where its voxels lie.
    """

    name: str
    image: NDArray[np.float32]
    label: NDArray[np.uint8] | None
    geometry: Geometry
    notes: list[str] = field(default_factory=list)
