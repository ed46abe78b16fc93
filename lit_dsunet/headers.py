"""What a NIfTI file says about itself: its grid, its channels, its dtype, and the way to the canonical orientation.

Arrays are (D, H, W) = (z, y, x) of the closest canonical orientation (RAS+). Going there permutes and flips axes and
never resamples, so that coming back is exact.
"""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import io_orientation
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from numpy.typing import NDArray

from lit_cli.errors import InputError
from lit_dsunet.samples import Geometry

__all__ = [
    "AFFINE_TOLERANCE",
    "UNREADABLE",
    "Header",
    "array_shape",
    "check_header",
    "check_same_grid",
    "image_class",
    "raw_header",
    "read_geometry",
    "read_header",
    "size_text",
    "to_canonical",
    "to_stored",
    "unreadable",
]

AFFINE_TOLERANCE = 0.01
"""Largest distance, in voxels, between the same corner of two files of a case. Headers are float32 and quaternions lose
digits, so equal grids differ a little; a hundredth of a voxel harms no mask."""

UNREADABLE = (OSError, EOFError, zlib.error, ValueError, KeyError, ImageFileError, HeaderDataError, WrapStructError)
"""What gzip and nibabel raise for a file that is damaged or something else."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says about itself.

    Attributes:
        geometry: Where its voxels lie.
        channels: Size of the fourth axis, 1 without one.
        dtype: Of the numbers as stored.
    """

    geometry: Geometry
    channels: int
    dtype: np.dtype[Any]


def read_header(path: str | Path) -> Header:
    """Read geometry, channels and dtype without the voxels.

    Raises:
        InputError: Unreadable, no NIfTI, 2-D, an affine without inverse, another unit than mm, or no real numbers.
    """
    return check_header(raw_header(Path(path)), str(path))


def read_geometry(path: str | Path) -> Geometry:
    """Read where the voxels of a file lie, from its header alone.

    Raises:
        InputError: As `read_header`.
    """
    return read_header(path).geometry


def check_same_grid(where: str, header: Header, reference_path: Path, reference: Header, advice: str = "") -> None:
    """Refuse a file that does not lie voxel on voxel with the first of its case.

    Args:
        where: How to call the file in the error.
        header: Of the file.
        reference_path: The first file of the case.
        reference: Its header.
        advice: What to do about it, appended to the error.

    Raises:
        InputError: Another shape, or an affine that moves a corner by more than `AFFINE_TOLERANCE` voxels.
    """
    own, other = header.geometry, reference.geometry
    if own.shape != other.shape:
        raise InputError(
            f"{where}: shape {size_text(own.shape)}, expected {size_text(other.shape)} as in {reference_path.name}"
            f"{advice}"
        )
    corners = np.array([[*corner, 1] for corner in product(*((0, n - 1) for n in own.shape))])
    gap = float(np.linalg.norm(corners @ (own.affine - other.affine)[:3].T, axis=1).max())
    if gap > AFFINE_TOLERANCE * min(other.spacing):
        voxels = gap / min(other.spacing)
        raise InputError(
            f"{where}: the affine differs from that of {reference_path.name} by {gap:.3g} mm ({voxels:.3g} voxels) at "
            f"a corner, expected the same grid within {AFFINE_TOLERANCE} voxels{advice}"
        )


# ---- Orientation -----------------------------------------------------------------------------------------------------


def to_canonical(stored: NDArray[Any], geometry: Geometry) -> NDArray[Any]:
    """Turn an array as stored into the canonical orientation; a view.

    Args:
        stored: (X, Y, Z) or (X, Y, Z, C), axes as in the file.
        geometry: Of the file.

    Returns:
        (D, H, W) or (C, D, H, W).

    Example:
        >>> affine = np.diag([-2.0, 2.0, 3.0, 1.0])  # x runs to the left
        >>> geometry = Geometry(affine, (2, 1, 1), (3.0, 2.0, 2.0))
        >>> to_canonical(np.array([[[5]], [[7]]]), geometry).tolist()
        [[[7, 5]]]
    """
    order, flipped = _turn(geometry.affine)
    if stored.ndim == 3:
        return np.flip(stored.transpose(order), flipped)
    return np.flip(stored.transpose(3, *order), tuple(axis + 1 for axis in flipped))


def to_stored(array: NDArray[Any], geometry: Geometry) -> NDArray[Any]:
    """Turn an array back into the orientation of its file, the inverse of `to_canonical`; a view.

    Args:
        array: (D, H, W) or (C, D, H, W).
        geometry: Of the file.

    Returns:
        (X, Y, Z) or (X, Y, Z, C).
    """
    order, flipped = _turn(geometry.affine)
    back = [int(axis) for axis in np.argsort(order)]
    if array.ndim == 3:
        return np.flip(array, flipped).transpose(back)
    return np.flip(array, tuple(axis + 1 for axis in flipped)).transpose(*(axis + 1 for axis in back), 0)


def array_shape(geometry: Geometry) -> tuple[int, int, int]:
    """(D, H, W) of the array that a file becomes."""
    (depth, height, width), _ = _turn(geometry.affine)
    return geometry.shape[depth], geometry.shape[height], geometry.shape[width]


def _turn(affine: NDArray[np.float64]) -> tuple[tuple[int, int, int], tuple[int, ...]]:
    """The stored axes that become D, H and W, and which of D, H and W are reversed then."""
    axes, signs = io_orientation(affine).T
    depth, height, width = (int(np.flatnonzero(axes == world)[0]) for world in (2, 1, 0))
    order = (depth, height, width)
    return order, tuple(i for i, axis in enumerate(order) if signs[axis] < 0)


# ---- Fields ----------------------------------------------------------------------------------------------------------


def raw_header(path: Path) -> Any:
    """The header of a file as nibabel has it.

    Raises:
        InputError: Unreadable, or no NIfTI.
    """
    try:
        with path.open("rb") as file:
            start = file.read(2)
            file.seek(0)
            # By its first bytes, as files called .nii may well be compressed.
            block = (gzip.GzipFile(fileobj=file) if start == b"\x1f\x8b" else file).read(540)  # that of NIfTI-2
        kind = image_class(block).header_class
        return kind(block[: kind.sizeof_hdr])
    except UNREADABLE as error:
        raise unreadable(str(path), error) from None


def image_class(start: bytes) -> Any:
    """The class of nibabel for a file, by its first bytes."""
    for order in ("little", "big"):
        if (size := int.from_bytes(start[:4], order)) in (348, 540):
            return nib.Nifti1Image if size == 348 else nib.Nifti2Image
    raise ValueError("no NIfTI header")


def check_header(header: Any, where: str) -> Header:
    """Take from nibabel's header what is needed.

    Raises:
        InputError: 2-D, an affine without inverse, another unit than mm, or no real numbers.
    """
    shape, dtype = tuple(int(n) for n in header.get_data_shape()), header.get_data_dtype()
    if len(shape) == 5 and shape[3] == 1:  # the vector form of NIfTI: x, y, z, no time, components
        shape = (*shape[:3], shape[4])
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise InputError(f"{where}: the shape is {size_text(shape)}, expected three axes, or four with channels last")
    if not (np.issubdtype(dtype, np.integer) or np.issubdtype(dtype, np.floating)):
        raise InputError(f"{where}: the voxels are {dtype}, expected real numbers")
    if int(header["xyzt_units"]) % 8 not in (0, 2):  # 0: not stated, which NIfTI programs take as mm
        raise InputError(f"{where}: xyzt_units is {int(header['xyzt_units'])}, expected a length in mm (2)")
    try:
        affine = np.asarray(header.get_best_affine(), np.float64)
    except UNREADABLE as error:
        raise unreadable(where, error) from None
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    # The volume of a voxel against that of a box with its edges: 1 without shear, 0 where axes coincide.
    if not np.isfinite(affine).all() or not abs(np.linalg.det(affine[:3, :3])) > 1e-4 * spacing.prod():
        raise InputError(f"{where}: the affine {np.round(affine, 4).tolist()} has no inverse, expected three axes")
    order, _ = _turn(affine)
    depth, height, width = (float(spacing[axis]) for axis in order)
    geometry = Geometry(affine, (shape[0], shape[1], shape[2]), (depth, height, width))
    return Header(geometry, shape[3] if len(shape) == 4 else 1, dtype)


def size_text(shape: tuple[int, ...]) -> str:
    """A shape for an error: `(2, 3)` is 2x3."""
    return "x".join(map(str, shape))


def unreadable(where: str, error: Exception) -> InputError:
    """The one line for a file that gzip or nibabel cannot read."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return InputError(f"{where}: cannot read this file ({reason}), expected an intact .nii or .nii.gz")
