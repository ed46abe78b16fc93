from __future__ import annotations

import gzip
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from lit_dsunet.nifti import read_geometry, read_header, read_volume, write_label, write_probability
from lit_dsunet.samples import Geometry, VolumeSample
from tests.helpers.errors import refused

BINARY = {0: 0, 1: 1}


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def sample_of(image: Path | tuple[Path, ...], label: Path | None = None) -> VolumeSample:
    return VolumeSample("case7", image if isinstance(image, tuple) else (image,), label, "patient3")


def ramp(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def orientations() -> Iterator[np.ndarray]:
    """The affines of all 48 ways to store a volume, with three different spacings and an origin."""
    for axes in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            affine = np.eye(4)
            affine[:3, :3] = 0
            for stored, (world, sign) in enumerate(zip(axes, signs, strict=True)):
                affine[world, stored] = sign * (0.5, 1.25, 3.0)[stored]
            affine[:3, 3] = (-7, 11, 3.5)
            yield affine


def world_of(affine: np.ndarray, index: tuple[int, ...]) -> np.ndarray:
    return (affine @ [*index, 1])[:3]


# ---- Orientation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tilt", [0.0, 0.35], ids=["straight", "oblique"])
def test_all_48_orientations_are_read_as_canonical_and_written_back_exactly(tmp_path: Path, tilt: float) -> None:
    rotation = np.eye(4)
    rotation[:3, :3] = Rotation.from_rotvec(tilt * np.array([1, -2, 0.5]) / np.sqrt(5.25)).as_matrix()
    stored = ramp(3, 4, 5)
    for straight in orientations():
        affine = rotation @ straight
        image = save(tmp_path / "image.nii", stored, affine)
        volume = read_volume(
            sample_of(image, save(tmp_path / "label.nii", (stored % 2).astype(np.uint8), affine)), BINARY
        )
        array, geometry = volume.image[0], volume.geometry
        assert volume.label is not None
        assert array.flags.c_contiguous
        assert volume.label.flags.c_contiguous
        np.testing.assert_array_equal(volume.label, array % 2)
        # Independent of nibabel: by brute force, the orientation whose axes run along z, y, x and upwards is the one.
        origin, steps = {}, {}
        for index in np.ndindex(3, 4, 5):
            origin[float(stored[index])] = world_of(straight, index)
        first = origin[float(array[0, 0, 0])]
        for axis, world in enumerate((2, 1, 0)):
            step = np.zeros(3, int)
            step[axis] = 1
            steps[axis] = origin[float(array[tuple(step)])] - first
            expected = np.zeros(3)
            expected[world] = geometry.spacing[axis]
            np.testing.assert_allclose(steps[axis], expected, atol=1e-5)
        for path, like in ((tmp_path / "back.nii.gz", image), (tmp_path / "back.nii", None)):
            write_label(path, array, geometry, like, np.int16)
            back: Any = nib.load(path)
            np.testing.assert_array_equal(np.asarray(back.dataobj), stored)
            np.testing.assert_allclose(back.affine, affine, atol=1e-6)
        write_probability(tmp_path / "p.nii.gz", np.stack([array, -array]), geometry, image)
        back = nib.load(tmp_path / "p.nii.gz")
        assert back.get_data_dtype() == np.float32
        np.testing.assert_array_equal(np.asarray(back.dataobj), np.stack([stored, -stored], axis=-1))


def test_a_turn_of_45_degrees_reads_image_and_label_alike(tmp_path: Path) -> None:
    stored = ramp(4, 4, 4)
    for degrees in (44.9999, 45.0, 45.0001):
        affine = np.eye(4)
        affine[:3, :3] = Rotation.from_euler("z", degrees, degrees=True).as_matrix()
        other = np.eye(4)
        other[:3, :3] = Rotation.from_euler("z", 90 - degrees, degrees=True).as_matrix()
        image, label = (
            save(tmp_path / "i.nii", stored, affine),
            save(tmp_path / "l.nii", stored.astype(np.uint8), other),
        )
        volume = read_volume(sample_of(image, label), {i: i for i in range(64)})
        np.testing.assert_array_equal(volume.label, volume.image[0])


def test_channels_from_files_and_from_the_fourth_axis_agree(tmp_path: Path) -> None:
    affine = np.diag([-2.0, 2.0, 3.0, 1.0])
    both = ramp(3, 4, 5, 2)
    together = read_volume(sample_of(save(tmp_path / "both.nii.gz", both, affine)), BINARY)
    parts = tuple(save(tmp_path / f"{c}.nii.gz", both[..., c], affine) for c in range(2))
    apart = read_volume(sample_of(parts), BINARY)
    assert together.image.shape == (2, 5, 4, 3)
    assert together.image.flags.c_contiguous
    assert together.label is None
    np.testing.assert_array_equal(together.image, apart.image)
    np.testing.assert_array_equal(together.image[1, 4, 3, ::-1], both[:, 3, 4, 1])
    vector = save(tmp_path / "vector.nii", both[:, :, :, None], affine)  # the form of ITK, with an axis for time
    np.testing.assert_array_equal(read_volume(sample_of(vector), BINARY).image, together.image)
    assert read_header(vector).channels == read_header(tmp_path / "both.nii.gz").channels == 2
    assert read_volume(sample_of(save(tmp_path / "one.nii", both[..., :1], affine)), BINARY).image.shape == (1, 5, 4, 3)


def test_geometry_comes_from_the_header_alone(tmp_path: Path) -> None:
    affine = np.diag([-2.0, 0.5, 3.0, 1.0])
    path = save(tmp_path / "image.nii.gz", np.zeros((40, 50, 60), np.int16), affine)
    path.write_bytes(path.read_bytes()[:400])  # no voxels left
    geometry = read_geometry(path)
    np.testing.assert_array_equal(geometry.affine, affine)
    assert geometry.shape == (40, 50, 60)
    assert geometry.spacing == (3.0, 0.5, 2.0)


def test_other_variants_of_nifti_are_read(tmp_path: Path) -> None:
    stored = ramp(2, 3, 4).astype(np.int16)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    nib.save(nib.Nifti2Image(stored, affine), tmp_path / "two.nii.gz")
    big = nib.Nifti1Image(stored, affine, nib.Nifti1Header(endianness=">"))
    nib.save(big, tmp_path / "big.nii")
    (tmp_path / "packed.nii").write_bytes(gzip.compress((tmp_path / "big.nii").read_bytes()))
    scaled = nib.Nifti1Image(stored, affine)
    scaled.header.set_slope_inter(0.5, 10)
    nib.save(scaled, tmp_path / "scaled.nii")
    for name in ("two.nii.gz", "big.nii", "packed.nii", "scaled.nii"):
        volume = read_volume(sample_of(tmp_path / name), BINARY)
        expected = np.asarray(nib.load(tmp_path / name).dataobj) if name != "packed.nii" else stored  # type: ignore
        np.testing.assert_array_equal(volume.image[0], expected.transpose(2, 1, 0))
        write_label(tmp_path / "out.nii.gz", np.ones((4, 3, 2), np.uint8), volume.geometry, tmp_path / name)
        np.testing.assert_array_equal(read_geometry(tmp_path / "out.nii.gz").affine, affine)


# ---- Labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_label_values_become_classes_whatever_their_dtype(tmp_path: Path, dtype: type) -> None:
    image = save(tmp_path / "i.nii", ramp(2, 2, 2))
    label = save(tmp_path / "l.nii", np.array([0, 1, 4, 200, 0, 0, 4, 4], dtype).reshape(2, 2, 2))
    volume = read_volume(sample_of(image, label), {0: 0, 1: 1, 4: 2, 200: 2})
    assert volume.label is not None
    assert volume.label.dtype == np.uint8
    assert volume.label.transpose(2, 1, 0).ravel().tolist() == [0, 1, 2, 2, 0, 0, 2, 2]
    assert volume.notes == []
    refused(lambda: read_volume(sample_of(image, label), {0: 0, 1: 1}), "case7", str(label), "4, 200", "0, 1")


def test_labels_that_are_almost_integers_are_rounded_with_a_note(tmp_path: Path) -> None:
    image = save(tmp_path / "i.nii", ramp(2, 1, 1))
    label = save(tmp_path / "l.nii", np.array([0.9996, 0], np.float32).reshape(2, 1, 1))
    volume = read_volume(sample_of(image, label), BINARY)
    assert volume.label is not None
    assert volume.label.ravel().tolist() == [1, 0]
    assert "0.0004" in volume.notes[0]
    for values, said in (([0.5, 0.25], "0.25, 0.5"), ([np.nan, 0], "nan"), ([np.inf, 0], "inf")):
        save(label, np.array(values, np.float32).reshape(2, 1, 1))
        refused(lambda: read_volume(sample_of(image, label), BINARY), "case7", str(label), said, "integers")


@pytest.mark.parametrize("value", [-1, 2, 70000, 2**31 - 1, -(2**31)])
def test_unknown_label_values_are_named(tmp_path: Path, value: int) -> None:
    image = save(tmp_path / "i.nii", ramp(2, 1, 1))
    label = save(tmp_path / "l.nii", np.array([0, value], np.int32).reshape(2, 1, 1))
    refused(lambda: read_volume(sample_of(image, label), BINARY), "case7", str(label), f"{value:g}", "0, 1")


# ---- Refusals --------------------------------------------------------------------------------------------------------


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    for bad, dtype in ((np.nan, np.float32), (np.inf, np.float32), (1e300, np.float64)):
        array = ramp(2, 2, 2).astype(dtype)
        array[0, 0, 0] = array[1, 1, 1] = bad
        path = save(tmp_path / "i.nii", array)
        refused(lambda: read_volume(sample_of(path), BINARY), "case7", str(path), "2 voxels", "finite")  # noqa: B023


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    image, other = save(tmp_path / "a.nii", ramp(2, 3, 4)), save(tmp_path / "b.nii", ramp(2, 3, 5))
    four = save(tmp_path / "c.nii", ramp(2, 3, 4, 2))
    refused(lambda: read_volume(sample_of((image, other)), BINARY), "case7", str(other), "2x3x5", "2x3x4", "a.nii")
    refused(lambda: read_volume(sample_of(image, other), BINARY), "case7", str(other), "2x3x5", "2x3x4")
    refused(lambda: read_volume(sample_of((image, four)), BINARY), "case7", str(four), "2 channels")
    refused(lambda: read_volume(sample_of((four, image)), BINARY), "case7", "2 channels")
    refused(lambda: read_volume(sample_of(image, four), BINARY), "case7", str(four), "2 channels", "expected 1")
    refused(lambda: read_volume(sample_of(()), BINARY), "case7", "no image")


def test_other_affines_are_refused_with_the_distance(tmp_path: Path) -> None:
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    image = save(tmp_path / "i.nii", ramp(2, 3, 101), affine)
    moved, tilted, close, flipped = (affine.copy() for _ in range(4))
    moved[0, 3] += 0.5
    tilted[:3, :3] = Rotation.from_euler("x", 0.01).as_matrix() * 2  # 2 mm at the far end of 200 mm
    close[:3, 3] += 1e-3
    flipped[0] = (-2, 0, 0, 2)  # the same voxels stored the other way round
    save(tmp_path / "close.nii", np.zeros((2, 3, 101), np.uint8), close)
    assert read_volume(sample_of(image, tmp_path / "close.nii"), BINARY).label is not None
    for name, other, gap in (("m", moved, "0.5 mm (0.25 voxels)"), ("t", tilted, "2 mm"), ("f", flipped, "2 mm")):
        path = save(tmp_path / f"{name}.nii", np.zeros((2, 3, 101), np.uint8), other)
        refused(lambda: read_volume(sample_of(image, path), BINARY), "case7", str(path), gap, "i.nii")  # noqa: B023
        refused(lambda: read_volume(sample_of((image, path)), BINARY), "case7", str(path), gap, "i.nii")  # noqa: B023


def test_files_that_are_no_volume_are_refused(tmp_path: Path) -> None:
    flat = save(tmp_path / "flat.nii", ramp(4, 5))
    time = save(tmp_path / "time.nii", ramp(2, 2, 2, 2, 2))
    complex_ = save(tmp_path / "complex.nii", np.zeros((2, 2, 2), np.complex64))
    rgb = save(tmp_path / "rgb.nii", np.zeros((2, 2, 2), [("R", "u1"), ("G", "u1"), ("B", "u1")]))
    metre = nib.Nifti1Image(ramp(2, 2, 2), np.eye(4))
    metre.header.set_xyzt_units("meter")
    nib.save(metre, tmp_path / "metre.nii")
    for path, said in ((flat, "4x5"), (time, "2x2x2x2x2"), (complex_, "complex"), (rgb, "real"), ("metre.nii", "mm")):
        refused(lambda: read_volume(sample_of(tmp_path / path), BINARY), "case7", Path(path).name, said)  # noqa: B023
        refused(lambda: read_header(tmp_path / path), Path(path).name, said)  # noqa: B023


def test_affines_without_inverse_are_refused(tmp_path: Path) -> None:
    for row, said in (((0, 0, 0, 0), "inverse"), ((np.nan, 0, 0, 0), "nan")):
        image = nib.Nifti1Image(ramp(2, 2, 2), np.eye(4))
        image.header["sform_code"] = 1
        content = bytearray(image.to_bytes())
        content[280:296] = np.array(row, np.float32).tobytes()  # srow_x
        path = tmp_path / "i.nii"
        path.write_bytes(content)
        refused(lambda: read_volume(sample_of(path), BINARY), "case7", str(path), said)  # noqa: B023


def test_damaged_files_name_themselves(tmp_path: Path) -> None:
    whole = save(
        tmp_path / "whole.nii.gz", np.random.default_rng(0).integers(0, 99, (20, 20, 20), np.int16)
    ).read_bytes()
    plain = gzip.decompress(whole)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    wrong_sum = bytearray(whole)
    wrong_sum[-6] ^= 0xFF
    magic = bytearray(plain)
    magic[344:348] = b"nope"
    contents = {
        "cut.nii.gz": whole[: len(whole) // 2],
        "tail.nii.gz": whole[:-4],
        "flipped.nii.gz": bytes(flipped),
        "sum.nii.gz": bytes(wrong_sum),
        "plain.nii": plain[:-100],
        "header.nii": plain[:100],
        "magic.nii": bytes(magic),
        "text.nii.gz": b"version https://git-lfs.github.com/spec/v1\n",
        "empty.nii.gz": b"",
        "packed_text.nii.gz": gzip.compress(b"hello"),
    }
    good = save(tmp_path / "good.nii", ramp(20, 20, 20))
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        refused(lambda: read_volume(sample_of(path), BINARY), "case7", str(path), "cannot read")  # noqa: B023
        refused(lambda: read_volume(sample_of(good, path), BINARY), "case7", str(path), "cannot read")  # noqa: B023
    for path in (tmp_path / "none.nii.gz", tmp_path):
        refused(lambda: read_volume(sample_of(path), BINARY), "case7", str(path), "cannot read")  # noqa: B023
    for name in ("header.nii", "magic.nii", "text.nii.gz", "empty.nii.gz", "packed_text.nii.gz", "none.nii.gz"):
        refused(lambda: read_header(tmp_path / name), name, "cannot read")  # noqa: B023


# ---- Writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qform", [0, 1, 2])
@pytest.mark.parametrize("sform", [0, 1, 2, 4])
def test_the_header_of_the_original_is_kept(tmp_path: Path, qform: int, sform: int) -> None:
    affine = np.diag([-2.0, 1.0, 3.0, 1.0])
    affine[:3, :3] = Rotation.from_rotvec([0.1, 0.2, -0.1]).as_matrix() @ affine[:3, :3]
    affine[:3, 3] = (1.1, 2.2, 3.3)
    original = nib.Nifti1Image(ramp(3, 4, 5, 2), np.diag([2.0, 1.0, 3.0, 1.0]))
    original.header.set_qform(affine, qform)
    original.header.set_sform(affine, sform)
    original.header.set_slope_inter(2, 5)
    original.header["cal_max"] = 500
    path = tmp_path / "image.nii.gz"
    path.write_bytes(gzip.compress(nib.Nifti1Image(ramp(3, 4, 5, 2), None, original.header).to_bytes()))
    volume = read_volume(sample_of(path), BINARY)
    label = (np.arange(60) % 2).reshape(5, 4, 3)
    write_label(tmp_path / "out" / "label.nii.gz", label, volume.geometry, path)
    back: Any = nib.load(tmp_path / "out" / "label.nii.gz")
    before: Any = nib.load(path)
    np.testing.assert_array_equal(back.affine, before.affine)
    for field in ("qform_code", "sform_code", "quatern_b", "qoffset_x", "srow_x", "srow_y", "srow_z", "xyzt_units"):
        np.testing.assert_array_equal(back.header[field], before.header[field])
    np.testing.assert_array_equal(back.header["pixdim"][:4], before.header["pixdim"][:4])
    assert back.shape == (3, 4, 5)
    assert back.get_data_dtype() == np.uint8
    assert back.header["cal_max"] == 0
    again = read_volume(sample_of(path, tmp_path / "out" / "label.nii.gz"), BINARY)
    np.testing.assert_array_equal(again.label, label)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["label.nii.gz"]


def test_without_an_original_a_sheared_affine_survives(tmp_path: Path) -> None:
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[0, 1] = 0.7
    geometry = Geometry(affine, (2, 3, 4), (2.0, float(np.hypot(0.7, 2)), 2.0))
    write_label(tmp_path / "l.nii", np.zeros((4, 3, 2), np.uint8), geometry)
    back: Any = nib.load(tmp_path / "l.nii")
    np.testing.assert_allclose(back.affine, affine, atol=1e-6)
    assert (int(back.header["qform_code"]), int(back.header["sform_code"])) == (0, 1)
    assert back.header.get_xyzt_units()[0] == "mm"


def test_classes_are_written_as_the_values_of_the_label_files(tmp_path: Path) -> None:
    geometry = Geometry(np.eye(4), (3, 1, 1), (1.0, 1.0, 1.0))
    classes = np.array([0, 1, 2]).reshape(1, 1, 3)
    values = {0: 0, 255: 1, 1000: 2, 1001: 2}
    write_label(tmp_path / "l.nii", classes, geometry, dtype=np.int32, label_values=values)
    assert np.asarray(nib.load(tmp_path / "l.nii").dataobj).ravel().tolist() == [0, 255, 1000]  # type: ignore
    volume = read_volume(sample_of(tmp_path / "l.nii", tmp_path / "l.nii"), values)
    np.testing.assert_array_equal(volume.label, classes)
    for dtype in (np.uint8, np.int8):
        refused(
            lambda: write_label(tmp_path / "x.nii", classes, geometry, dtype=dtype, label_values=values),  # noqa: B023
            "x.nii",
            "1000",
            np.dtype(dtype).name,
        )
    with pytest.raises(ValueError, match=r"classes \[2\]"):
        write_label(tmp_path / "x.nii", classes, geometry, label_values=BINARY)
    assert not (tmp_path / "x.nii").exists()


def test_writing_refuses_what_does_not_fit(tmp_path: Path) -> None:
    geometry = Geometry(np.eye(4), (2, 3, 4), (1.0, 1.0, 1.0))
    label = np.zeros((4, 3, 2), np.uint8)
    with pytest.raises(ValueError, match="2x3x4, expected 4x3x2"):
        write_label(tmp_path / "x.nii", label.T, geometry)
    refused(lambda: write_label(tmp_path / "x.mha", label, geometry), "x.mha", ".nii.gz")
    other = save(tmp_path / "other.nii", ramp(2, 3, 4), np.diag([1.0, 1.0, 1.5, 1.0]))
    refused(lambda: write_label(tmp_path / "x.nii", label, geometry, other), "x.nii", "other.nii", "1.5 mm")
    (tmp_path / "file").write_text("")
    refused(lambda: write_label(tmp_path / "file" / "x.nii", label, geometry), "x.nii", "cannot write")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "other.nii"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = Geometry(np.eye(4), (2, 3, 4), (1.0, 1.0, 1.0))
    write_label(tmp_path / "l.nii", np.zeros((4, 3, 2)), geometry)

    def full(path: Path, content: bytes) -> None:
        path.open("wb").close()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        refused(lambda: write_label(tmp_path / "l.nii", np.ones((4, 3, 2)), geometry), "l.nii", "No space left")
    assert [p.name for p in tmp_path.iterdir()] == ["l.nii"]
    assert not np.asarray(nib.load(tmp_path / "l.nii").dataobj).any()  # type: ignore


# ---- Real data -------------------------------------------------------------------------------------------------------


def real(name: str) -> Path:
    root = Path(os.environ.get("LIT_DATA", "")) / name
    if "LIT_DATA" not in os.environ or not root.is_dir():
        pytest.skip(f"LIT_DATA names no folder with {name}")
    return root


@pytest.mark.data
def test_the_stroke_case_has_its_known_lesions(tmp_path: Path) -> None:
    root = real("isles2022")
    case = "sub-strokecase0009"
    images = tuple(root / "rawdata" / case / "ses-0001" / f"{case}_ses-0001_{c}.nii.gz" for c in ("dwi", "adc"))
    mask = root / "derivatives" / case / "ses-0001" / f"{case}_ses-0001_msk.nii.gz"
    volume = read_volume(VolumeSample(case, images, mask, case), BINARY)
    assert volume.label is not None
    assert volume.image.shape == (2, 73, 112, 112)
    assert nib.aff2axcodes(volume.geometry.affine) == ("L", "A", "S")
    assert volume.label.sum() == 523
    assert volume.label.sum() * np.prod(volume.geometry.spacing) / 1000 == pytest.approx(4.184, abs=1e-3)
    _, components = ndimage.label(volume.label, np.ones((3, 3, 3)))  # type: ignore[misc]
    assert components == 18
    dtype = read_header(mask).dtype
    write_label(tmp_path / "m.nii.gz", volume.label, volume.geometry, mask, dtype)
    before: Any = nib.load(mask)
    back: Any = nib.load(tmp_path / "m.nii.gz")
    np.testing.assert_array_equal(np.asarray(back.dataobj), np.asarray(before.dataobj))
    np.testing.assert_array_equal(back.affine, before.affine)
    assert back.get_data_dtype() == before.get_data_dtype() == np.uint16


@pytest.mark.data
def test_the_hippocampi_are_read_despite_their_dtypes() -> None:
    root = real("msd_hippocampus")
    paths = sorted((root / "imagesTr").glob("*.nii.gz"))
    voxels, dtypes = [], []
    for path in paths:
        label = root / "labelsTr" / path.name
        volume = read_volume(VolumeSample(path.name, (path,), label, path.name), {0: 0, 1: 1, 2: 2})
        voxels.append(np.bincount(volume.label.ravel(), minlength=3))  # type: ignore[union-attr]
        dtypes.append((read_header(path).dtype.name, read_header(label).dtype.name))
    assert len(paths) == 260
    assert sum(image == "uint8" for image, _ in dtypes) == 55
    assert sum(label == "float32" for _, label in dtypes) == 2
    assert np.median(voxels, axis=0)[1:].tolist() == [1725, 1578.5]
