"""NIfTI files to volumes and back: values, channels and label maps; every doubt is refused by the name of the case."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import DTypeLike, NDArray

from lit_cli.errors import InputError
from lit_dsunet.files import write_file
from lit_dsunet.headers import (
    UNREADABLE,
    Header,
    array_shape,
    check_header,
    check_same_grid,
    image_class,
    raw_header,
    read_geometry,
    read_header,
    size_text,
    to_canonical,
    to_stored,
    unreadable,
)
from lit_dsunet.samples import Geometry, Volume, VolumeSample

__all__ = [
    "Header",
    "read_geometry",
    "read_header",
    "read_volume",
    "to_canonical",
    "to_stored",
    "write_label",
    "write_probability",
]

_ROUNDING = 1e-3  # a label stored as float may be off its integer by so much
_NO_CLASS = 255
_GEOMETRY_FIELDS = (
    *("pixdim", "qform_code", "sform_code", "xyzt_units", "srow_x", "srow_y", "srow_z"),
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
)


def read_volume(sample: VolumeSample, label_values: Mapping[int, int]) -> Volume:
    """Read a case.

    Args:
        sample: Its files: one 3-D file per channel, or one 4-D file.
        label_values: Class index, 0 to 254, by the value that stands for it in the label file.

    Returns:
        The volume; `notes` says what was mended, such as labels stored as 0.9996.

    Raises:
        InputError: A file that cannot be read, files on different grids, NaN or infinity, a label that is no integer
            within 0.001, or a value that `label_values` does not know.
    """
    if not sample.images:
        raise InputError(f"case {sample.name}: no image, expected at least one file")
    first, *others = sample.images
    voxels, reference = _read_channels(sample, first)
    channels = [voxels]
    for path in others:
        where = _where(sample, path)
        voxels, header = _read_channels(sample, path, reference)
        check_same_grid(where, header, first, reference)
        channels.append(voxels)
        if len(channels[0]) != 1 or len(voxels) != 1:
            several = max(len(channels[0]), len(voxels))
            raise InputError(f"{where}: {several} channels in a file, expected 1 as the case has a file per channel")
    # Into an array of our own: without one, numpy copies the strides of the turned views.
    image = np.empty((sum(map(len, channels)), *array_shape(reference.geometry)), np.float32)
    np.concatenate(channels, out=image)
    label, notes = None, []
    if sample.label is not None:
        where = _where(sample, sample.label)
        content, header = _open(sample.label, where)
        if header.channels != 1:
            raise InputError(f"{where}: the label has {header.channels} channels, expected 1")
        check_same_grid(where, header, first, reference)
        label = _classes(to_canonical(_numbers(content, where), reference.geometry)[0], label_values, where, notes)
    return Volume(sample.name, image, label, reference.geometry, notes)


def _read_channels(
    sample: VolumeSample, path: Path, reference: Header | None = None
) -> tuple[NDArray[np.float32], Header]:
    """The channels of a file, (C, D, H, W), turned as the first file of the case is, and its header."""
    where = _where(sample, path)
    content, header = _open(path, where)
    try:
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
            stored = content.get_fdata(caching="unchanged", dtype=np.float32)
    except UNREADABLE as error:
        raise unreadable(where, error) from None
    bad = int(stored.size - np.isfinite(stored).sum())
    if bad:
        raise InputError(f"{where}: {bad} voxels are NaN or infinite, expected finite numbers")
    # Near 45 degrees two headers of one grid may round to different orientations: one of them must decide for all.
    geometry = (reference or header).geometry
    return to_canonical(stored.reshape((*stored.shape[:3], -1)), geometry), header


def _open(path: Path, where: str) -> tuple[Any, Header]:
    """The image of a file, whole in memory, and its header."""
    try:
        content = path.read_bytes()
        # Decompressing as a whole verifies the checksum, which reading voxel by voxel does not.
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        image = image_class(content).from_bytes(content)
    except UNREADABLE as error:
        raise unreadable(where, error) from None
    return image, check_header(image.header, where)


def _numbers(image: Any, where: str) -> NDArray[Any]:
    """The voxels as (X, Y, Z, C), as they are."""
    try:
        voxels = np.asanyarray(image.dataobj)
    except UNREADABLE as error:
        raise unreadable(where, error) from None
    return voxels.reshape((*voxels.shape[:3], -1))


def _classes(stored: NDArray[Any], label_values: Mapping[int, int], where: str, notes: list[str]) -> NDArray[np.uint8]:
    """Map the values of a label file to class indices."""
    if np.issubdtype(stored.dtype, np.floating):
        rounded = np.rint(stored)
        with np.errstate(invalid="ignore"):
            off = np.abs(stored - rounded)
        bad = ~(off <= _ROUNDING)  # NaN fails the comparison as well
        if bad.any():
            raise InputError(f"{where}: the label has values {_some(stored[bad])}, expected integers")
        if off.any():
            notes.append(f"{where}: label values were rounded by up to {off.max():.2g}")
        stored = rounded
    low, high = min(label_values), max(label_values)
    table = np.full(high - low + 1, _NO_CLASS, np.uint8)
    for value, index in label_values.items():
        table[value - low] = index
    outside = (stored < low) | (stored > high)
    classes = table[np.where(outside, low, stored).astype(np.intp) - low]
    unknown = outside | (classes == _NO_CLASS)
    if unknown.any():
        known = ", ".join(map(str, sorted(label_values)))
        raise InputError(f"{where}: the label has values {_some(stored[unknown])}, expected {known}")
    return np.ascontiguousarray(classes)


def _some(values: NDArray[Any]) -> str:
    different = np.unique(values)
    return ", ".join(f"{value:g}" for value in different[:5]) + (", ..." if len(different) > 5 else "")


def _where(sample: VolumeSample, path: Path) -> str:
    return f"case {sample.name}, {path}"


# ---- Writing ---------------------------------------------------------------------------------------------------------


def write_label(
    path: str | Path,
    array: NDArray[Any],
    geometry: Geometry,
    like: str | Path | None = None,
    dtype: DTypeLike = np.uint8,
    label_values: Mapping[int, int] | None = None,
) -> None:
    """Write a label map in the orientation and with the affine of the file that it belongs to.

    Args:
        path: A .nii or .nii.gz; it appears whole or not at all.
        array: (D, H, W) class indices in canonical orientation.
        geometry: Of the original file.
        like: The original file, whose qform, sform and their codes are kept bit by bit. None writes both from the
            geometry (the sform alone if the affine shears).
        dtype: To store; `read_header(label).dtype` is that of a label file.
        label_values: As in `VolumeTable`: the values to write for the classes; the first one where several are mapped
            to a class. None writes the class indices.

    Raises:
        InputError: A value that `dtype` cannot hold, `like` is on another grid, or the file cannot be written.
        ValueError: `array` has another shape than the geometry, or a class without a value.
    """
    path = Path(path)
    if label_values is not None:
        value_of: dict[int, int] = {}
        for value, index in label_values.items():
            value_of.setdefault(index, value)
        missing = set(np.unique(array).tolist()) - set(value_of)
        if missing:
            raise ValueError(f"classes {sorted(missing)} have no value in label_values {dict(label_values)}")
        table = np.array([value_of.get(index, 0) for index in range(max(value_of) + 1)], np.int64)
        array = table[array.astype(np.intp)]
    cast = array.astype(np.dtype(dtype).newbyteorder("="))
    if not np.array_equal(cast, array):
        raise InputError(f"{path}: cannot store {array.min()} to {array.max()} as {cast.dtype}, expected a wider dtype")
    _write(path, cast, geometry, like)


def write_probability(
    path: str | Path, array: NDArray[np.floating], geometry: Geometry, like: str | Path | None = None
) -> None:
    """Write probabilities as float32, as `write_label` does.

    Args:
        path: A .nii or .nii.gz.
        array: (D, H, W), or (C, D, H, W) which becomes a 4-D file with the channels last.
        geometry: Of the original file.
        like: The original file, whose qform and sform are kept.

    Raises:
        InputError: `like` is on another grid, or the file cannot be written.
        ValueError: `array` has another shape than the geometry.
    """
    _write(Path(path), array.astype(np.float32), geometry, like)


def _write(path: Path, array: NDArray[Any], geometry: Geometry, like: str | Path | None) -> None:
    if array.ndim not in (3, 4) or array.shape[-3:] != array_shape(geometry):
        raise ValueError(f"array is {size_text(array.shape)}, expected {size_text(array_shape(geometry))} of geometry")
    if not path.name.endswith((".nii", ".nii.gz")):
        raise InputError(f"{path}: cannot write this kind of file, expected a name in .nii or .nii.gz")
    header = nib.Nifti1Header()
    header.set_data_dtype(array.dtype)
    if like is None:
        header.set_sform(geometry.affine, code=1)
        header.set_qform(geometry.affine, code=1)
        # A quaternion holds no shear; a qform that says something else than the sform would only mislead.
        if not np.allclose(np.asarray(header.get_qform()), geometry.affine, atol=1e-3 * min(geometry.spacing)):
            header["qform_code"] = 0
        header.set_xyzt_units("mm")
    else:
        like = Path(like)
        original = raw_header(like)
        check_same_grid(str(path), Header(geometry, 1, array.dtype), like, check_header(original, str(like)))
        for field in _GEOMETRY_FIELDS:
            header[field] = original[field]
        header["pixdim"][4:] = 1  # the channels of the original are none of ours
    # Without an affine of its own the image leaves the header alone.
    content = nib.Nifti1Image(to_stored(array, geometry), None, header).to_bytes()
    if path.name.endswith(".gz"):
        content = gzip.compress(content, compresslevel=6 if array.dtype.kind in "iu" else 1, mtime=0)
    write_file(path, content)
