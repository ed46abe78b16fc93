from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from lit_dsunet.nifti import read_volume
from lit_dsunet.readers import (
    AtlasV2,
    CaseList,
    FolderPairs,
    Isles22,
    Isles24,
    Msd,
    NnUNet,
    detect_format,
    find_volumes,
    make_reader,
)
from lit_dsunet.samples import VolumeTable
from tests.helpers.errors import refused

SHAPE = (3, 4, 5)


def volume(path: Path, channels: int = 1, shape: Sequence[int] = SHAPE, spacing: float = 1.0) -> Path:
    """Write an image; a label just as well, as readers look at headers alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.zeros((*shape, channels) if channels > 1 else shape, np.uint8)
    nib.save(nib.Nifti1Image(array, np.diag([spacing, spacing, spacing, 1])), path)
    return path


def write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def cases(table: VolumeTable) -> dict[str, list[str]]:
    return {split: [sample.name for sample in samples] for split, samples in table.splits.items()}


def files(table: VolumeTable, root: Path) -> list[list[str]]:
    """Images and label of each training case, relative to the root."""
    return [
        [str(p.relative_to(root)) for p in (*s.images, *([] if s.label is None else [s.label]))]
        for s in table.splits["train"]
    ]


# ---- MSD -------------------------------------------------------------------------------------------------------------


def write_msd(root: Path, names: Sequence[str] = ("a", "b"), channels: int = 1, **extra: Any) -> Path:
    for name in names:
        volume(root / "imagesTr" / f"{name}.nii.gz", channels)
        volume(root / "labelsTr" / f"{name}.nii.gz")
    modality = {str(i): f"MR{i}" for i in range(channels)}
    labels = {"0": "background", "1": "Anterior", "2": "Posterior"}
    write_json(root / "dataset.json", {"name": "x", "modality": modality, "labels": labels, **extra})
    return root


def test_msd_pairs_by_name_and_leaves_macos_files_out(tmp_path: Path) -> None:
    write_msd(tmp_path)
    for name in ("._a.nii.gz", "_b.nii.gz", ".c.nii.gz", "readme.txt"):
        (tmp_path / "imagesTr" / name).write_text("no volume")
    volume(tmp_path / "imagesTs" / "t.nii.gz")  # without labels: for prediction
    table = make_reader("auto", tmp_path).read()
    assert cases(table) == {"train": ["a", "b"]}
    assert files(table, tmp_path)[0] == ["imagesTr/a.nii.gz", "labelsTr/a.nii.gz"]
    assert table.class_names == ("background", "Anterior", "Posterior")
    assert table.label_values == {0: 0, 1: 1, 2: 2}
    assert table.channel_names == ("MR0",)
    assert table.folds is None
    assert [s.patient for s in table.splits["train"]] == ["a", "b"]
    volume(tmp_path / "labelsTs" / "t.nii.gz")
    assert cases(Msd(tmp_path).read()) == {"train": ["a", "b"], "test": ["t"]}


def test_msd_takes_the_list_of_the_json(tmp_path: Path) -> None:
    listed = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in ("b", "._b")]
    write_msd(tmp_path, channels=3, training=listed, test=["./imagesTs/t.nii.gz"])
    table = make_reader("auto", tmp_path).read()
    assert cases(table) == {"train": ["b"]}
    assert table.channel_names == ("MR0", "MR1", "MR2")
    case = table.splits["train"][0]
    assert read_volume(case, table.label_values).image.shape == (3, 5, 4, 3)
    (tmp_path / "labelsTr" / "b.nii.gz").unlink()
    refused(lambda: Msd(tmp_path).read(), "case b", "labelsTr/b.nii.gz", "missing")
    for entry in ("./imagesTr/b.nii.gz", {"image": "x"}, {"image": 3, "label": "x"}):
        write_msd(tmp_path, channels=3, training=[entry])
        refused(lambda: Msd(tmp_path).read(), "dataset.json", "training")
    write_msd(tmp_path, channels=3, training=[listed[0], listed[0]])
    refused(lambda: Msd(tmp_path).read(), "case b", "second")
    write_msd(tmp_path, channels=3, training=[listed[1]])
    refused(lambda: Msd(tmp_path).read(), "no case")


def test_msd_refusals(tmp_path: Path) -> None:
    write_msd(tmp_path)
    refused(lambda: Msd(tmp_path / "none").read(), "none", "no such folder")
    (tmp_path / "labelsTr" / "b.nii.gz").unlink()
    refused(lambda: Msd(tmp_path).read(), "case b", "no label")
    (tmp_path / "imagesTr" / "b.nii.gz").unlink()
    volume(tmp_path / "labelsTr" / "z.nii.gz")
    refused(lambda: Msd(tmp_path).read(), "case z", "no image")
    (tmp_path / "labelsTr" / "z.nii.gz").unlink()
    volume(tmp_path / "imagesTr" / "a.nii")
    refused(lambda: Msd(tmp_path).read(), "imagesTr", "a.nii and a.nii.gz", "case a")
    (tmp_path / "imagesTr" / "a.nii").unlink()
    assert cases(Msd(tmp_path).read()) == {"train": ["a"]}
    volume(tmp_path / "imagesTr" / "a.nii.gz", channels=2)
    refused(lambda: Msd(tmp_path).read(), "case a", "2 channels", "expected 1 (MR0)")
    (tmp_path / "imagesTr" / "a.nii.gz").unlink()
    refused(lambda: Msd(tmp_path).read(), "imagesTr", "no .nii.gz or .nii file")
    shutil.rmtree(tmp_path / "imagesTr")
    refused(lambda: Msd(tmp_path).read(), "imagesTr", "no such folder")
    (tmp_path / "dataset.json").unlink()
    refused(lambda: Msd(tmp_path).read(), "dataset.json", "no such file")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "no object"),
        ({"modality": {"0": "MR"}}, "no 'labels'"),
        ({"labels": {"0": "background", "1": "x"}}, "no 'modality'"),
        ({"labels": {"0": "background", "1": "x"}, "modality": {"1": "MR"}}, "modality is"),
        ({"labels": {"0": "background", "1": "x"}, "modality": "MR"}, "modality is"),
        ({"labels": {}, "modality": {"0": "MR"}}, "labels is"),
        ({"labels": {"zero": "background"}, "modality": {"0": "MR"}}, "zero"),
        ({"labels": {"0": "x", "1": "x"}, "modality": {"0": "MR"}}, "different ones"),
        ({"labels": {"1": "x", "2": "y"}, "modality": {"0": "MR"}}, "0 among them"),
        ({"labels": {"0": "background"}, "modality": {"0": "MR"}}, "1 classes"),
        ({"labels": {"0": "background", "70000": "x"}, "modality": {"0": "MR"}}, "70000"),
        ({"labels": {"0": "background", "1": 2}, "modality": {"0": "MR"}}, "'background'"),
    ],
)
def test_a_dataset_json_without_what_is_needed_is_refused(tmp_path: Path, content: object, said: str) -> None:
    write_msd(tmp_path)
    write_json(tmp_path / "dataset.json", content)
    refused(lambda: Msd(tmp_path).read(), "dataset.json", said)


def test_a_broken_dataset_json_names_its_line(tmp_path: Path) -> None:
    write_msd(tmp_path)
    (tmp_path / "dataset.json").write_text('{\n"labels": {,\n')
    refused(lambda: Msd(tmp_path).read(), "dataset.json, line 2")
    (tmp_path / "dataset.json").write_bytes(b"\xff\xfe")
    refused(lambda: Msd(tmp_path).read(), "dataset.json", "UTF-8")


# ---- nnU-Net ---------------------------------------------------------------------------------------------------------


def write_nnunet(root: Path, names: Sequence[str] = ("a_01", "b_02"), channels: int = 2, **extra: Any) -> Path:
    for name in names:
        for c in range(channels):
            volume(root / "imagesTr" / f"{name}_{c:04d}.nii.gz")
        volume(root / "labelsTr" / f"{name}.nii.gz")
    content = {
        "channel_names": {str(c): f"MR{c}" for c in range(channels)},
        "labels": {"background": 0, "lesion": 1},
        "numTraining": len(names),
        "file_ending": ".nii.gz",
    }
    write_json(root / "dataset.json", {**content, **extra})
    return root


def test_nnunet_groups_the_channels_of_a_case(tmp_path: Path) -> None:
    write_nnunet(tmp_path)
    table = make_reader("auto", tmp_path).read()
    assert cases(table) == {"train": ["a_01", "b_02"]}
    assert files(table, tmp_path)[1] == [
        "imagesTr/b_02_0000.nii.gz",
        "imagesTr/b_02_0001.nii.gz",
        "labelsTr/b_02.nii.gz",
    ]
    assert table.channel_names == ("MR0", "MR1")
    assert table.class_names == ("background", "lesion")
    assert table.folds is None
    volume(tmp_path / "imagesTs" / "t_0000.nii.gz")
    volume(tmp_path / "imagesTs" / "t_0001.nii.gz")
    assert cases(NnUNet(tmp_path).read()) == {"train": ["a_01", "b_02"]}
    volume(tmp_path / "labelsTs" / "t.nii.gz")
    assert cases(NnUNet(tmp_path).read()) == {"train": ["a_01", "b_02"], "test": ["t"]}


def test_nnunet_reads_the_form_of_its_first_version(tmp_path: Path) -> None:
    write_nnunet(tmp_path, channels=1)
    content = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "tumour"}}
    write_json(tmp_path / "dataset.json", content)
    table = make_reader("auto", tmp_path).read()
    assert table.channel_names == ("CT",)
    assert table.class_names == ("background", "tumour")


def test_nnunet_takes_the_files_that_the_json_places(tmp_path: Path) -> None:
    write_nnunet(tmp_path / "elsewhere")
    entry = {
        "images": [f"../elsewhere/imagesTr/a_01_{c:04d}.nii.gz" for c in range(2)],
        "label": "../elsewhere/labelsTr/a_01.nii.gz",
    }
    root = tmp_path / "Dataset001_X"
    content = json.loads((tmp_path / "elsewhere" / "dataset.json").read_text())
    write_json(root / "dataset.json", {**content, "dataset": {"one": entry}})
    table = make_reader("auto", root).read()
    assert cases(table) == {"train": ["one"]}
    assert table.splits["train"][0].images[1].is_file()
    for broken, said in (
        ({**entry, "label": "none.nii.gz"}, "none.nii.gz"),
        ({**entry, "images": entry["images"][:1]}, "1 images"),
        ({"label": "x"}, "images and label"),
        ("x", "images and label"),
    ):
        write_json(root / "dataset.json", {**content, "dataset": {"one": broken}})
        refused(lambda: NnUNet(root).read(), "one", said)


@pytest.mark.parametrize("place", ["Dataset1_X", ".", "../nnUNet_preprocessed/Dataset1_X"])
def test_nnunet_takes_the_folds_of_its_split_file(tmp_path: Path, place: str) -> None:
    raw = tmp_path / "nnUNet_raw"
    root = write_nnunet(raw / "Dataset1_X", ("a", "b", "c"))
    path = raw / place / "splits_final.json"
    write_json(path, [{"train": ["b", "c"], "val": ["a"]}, {"train": ["a"], "val": ["c", "b"]}])
    assert make_reader("auto", root).read().folds == (("a",), ("c", "b"))
    assert make_reader("auto", root, read_folds=False).read().folds is None
    write_json(path, [{"train": ["b", "c"], "val": ["a"]}])  # a single hold-out is fine
    assert NnUNet(root).read().folds == (("a",),)
    write_json(path, [{"train": ["b", "c"], "val": ["a", "zz"]}])
    refused(lambda: NnUNet(root).read(), "splits_final.json", "fold 0", "zz")
    write_json(path, [{"train": ["b", "c"], "val": ["a", "b"]}])
    refused(lambda: NnUNet(root).read(), "splits_final.json", "fold 0", "case b", "train and in val")
    write_json(path, [{"train": ["b"], "val": ["a"]}])
    refused(lambda: NnUNet(root).read(), "splits_final.json", "fold 0", "case c", "neither")


def test_nnunet_refusals(tmp_path: Path) -> None:
    write_nnunet(tmp_path)
    (tmp_path / "imagesTr" / "b_02_0001.nii.gz").unlink()
    refused(lambda: NnUNet(tmp_path).read(), "case b_02", "b_02_0001 is missing", "2 channels")
    volume(tmp_path / "imagesTr" / "b_02_0001.nii.gz")
    extra = volume(tmp_path / "imagesTr" / "b_02_0002.nii.gz")
    refused(lambda: NnUNet(tmp_path).read(), "case b_02", "b_02_0002.nii.gz", "2 channels")
    extra.unlink()
    bare = volume(tmp_path / "imagesTr" / "c.nii.gz")
    refused(lambda: NnUNet(tmp_path).read(), "c.nii.gz", "without channel", "c_0000")
    bare.unlink()
    label = volume(tmp_path / "labelsTr" / "c.nii.gz")
    refused(lambda: NnUNet(tmp_path).read(), "case c", "no image")
    label.unlink()
    (tmp_path / "labelsTr" / "a_01.nii.gz").unlink()
    refused(lambda: NnUNet(tmp_path).read(), "case a_01", "no label")
    volume(tmp_path / "labelsTr" / "a_01.nii.gz")
    write_nnunet(tmp_path, file_ending=".png")
    refused(lambda: NnUNet(tmp_path).read(), "file_ending", ".png", ".nii.gz")
    write_nnunet(tmp_path, file_ending=".nii")
    refused(lambda: NnUNet(tmp_path).read(), "imagesTr", "no .nii file")
    write_nnunet(tmp_path, labels={"background": 0, "whole": [1, 2], "core": [2]})
    refused(lambda: NnUNet(tmp_path).read(), "dataset.json", "whole, core", "regions")
    write_nnunet(tmp_path, labels={"background": 0, "lesion": 1, "ignore": 2})
    refused(lambda: NnUNet(tmp_path).read(), "dataset.json", "ignore")
    (tmp_path / "dataset.json").unlink()
    refused(lambda: NnUNet(tmp_path).read(), "dataset.json", "no such file")


def test_headers_are_compared_unless_told_not_to(tmp_path: Path) -> None:
    write_nnunet(tmp_path)
    faults: list[tuple[str, dict[str, Any], str]] = [
        ("imagesTr/b_02_0001.nii.gz", {"shape": (3, 4, 6)}, "3x4x6"),
        ("imagesTr/b_02_0001.nii.gz", {"spacing": 1.5}, "voxels"),
        ("imagesTr/b_02_0001.nii.gz", {"channels": 2}, "2 channels"),
        ("labelsTr/b_02.nii.gz", {"shape": (4, 3, 5)}, "4x3x5"),
        ("labelsTr/b_02.nii.gz", {"spacing": 1.5}, "voxels"),
        ("labelsTr/b_02.nii.gz", {"channels": 2}, "as a label"),
        ("labelsTr/b_02.nii.gz", {"shape": (4, 3)}, "4x3"),
    ]
    for path, kwargs, said in faults:
        volume(tmp_path / path, **kwargs)
        refused(lambda: NnUNet(tmp_path).read(), "case b_02", path, said)
        assert len(NnUNet(tmp_path, check_headers=False).read().splits["train"]) == 2
        volume(tmp_path / path)
    (tmp_path / "labelsTr" / "a_01.nii.gz").write_bytes(b"")
    refused(lambda: NnUNet(tmp_path).read(), "case a_01", "labelsTr/a_01.nii.gz", "cannot read")


# ---- ISLES and ATLAS -------------------------------------------------------------------------------------------------


def write_isles22(
    root: Path, subject: str = "sub-strokecase0001", session: str = "ses-0001", raw: bool = False
) -> None:
    stem, folder = f"{subject}_{session}", Path(subject) / session
    if raw:
        for channel in ("dwi", "adc"):
            volume(root / "rawdata" / folder / f"{stem}_{channel}.nii.gz")
        volume(root / "rawdata" / folder / f"{stem}_flair.nii.gz", shape=(8, 8, 3))
    else:
        for channel in ("dwi", "adc"):
            volume(root / folder / "dwi" / f"{stem}_{channel}.nii.gz")
        volume(root / folder / "anat" / f"{stem}_FLAIR.nii.gz", shape=(8, 8, 3))
    volume(root / "derivatives" / folder / f"{stem}_msk.nii.gz")


@pytest.mark.parametrize("raw", [False, True], ids=["release", "repository"])
def test_isles22_in_both_layouts(tmp_path: Path, raw: bool) -> None:
    root = tmp_path / "sub-folder"  # a name like a subject's above the data set must not count
    for subject in ("sub-strokecase0001", "sub-strokecase0002"):
        write_isles22(root, subject, raw=raw)
    table = make_reader("auto", root).read()
    assert cases(table) == {"train": ["sub-strokecase0001", "sub-strokecase0002"]}
    assert table.channel_names == ("dwi", "adc")
    assert table.class_names == ("background", "lesion")
    images, label = table.splits["train"][1].images, table.splits["train"][1].label
    assert [p.name[-10:] for p in (*images, label or Path())] == ["dwi.nii.gz", "adc.nii.gz", "msk.nii.gz"]
    assert make_reader("isles22", root, ["ADC"]).read().channel_names == ("ADC",)
    for check in (True, False):
        refused(
            lambda: make_reader("auto", root, ["dwi", "flair"], check_headers=check).read(),  # noqa: B023
            *("sub-strokecase0001", "8x8x3", "resample", "leave it out of channels"),
        )
    refused(lambda: Isles22(root, ("dwi", "t2")).read(), "case sub-strokecase0001", "*_t2.nii.gz")
    refused(lambda: Isles22(root, ("dwi", "DWI")).read(), "channels", "different")
    (root / "derivatives/sub-strokecase0001/ses-0001/sub-strokecase0001_ses-0001_msk.nii.gz").unlink()
    refused(lambda: Isles22(root).read(), "case sub-strokecase0001", "no mask")


def test_isles22_flair_that_was_resampled_is_read(tmp_path: Path) -> None:
    write_isles22(tmp_path, raw=True)
    folder = tmp_path / "rawdata/sub-strokecase0001/ses-0001"
    volume(folder / "sub-strokecase0001_ses-0001_flair.nii.gz")
    assert len(Isles22(tmp_path, ("dwi", "adc", "flair")).read().splits["train"][0].images) == 3
    volume(folder / "anat" / "sub-strokecase0001_ses-0001_FLAIR.nii.gz")
    refused(lambda: Isles22(tmp_path, ("flair",)).read(), "case sub-strokecase0001", "both", "*_flair")


def test_isles22_sessions_are_cases_of_one_patient(tmp_path: Path) -> None:
    write_isles22(tmp_path, "sub-a", "ses-1", raw=True)
    write_isles22(tmp_path, "sub-a", "ses-2", raw=True)
    write_isles22(tmp_path, "sub-b", "ses-1", raw=True)
    table = Isles22(tmp_path).read()
    assert cases(table) == {"train": ["sub-a_ses-1", "sub-a_ses-2", "sub-b_ses-1"]}
    assert [s.patient for s in table.splits["train"]] == ["sub-a", "sub-a", "sub-b"]


def test_isles22_refusals(tmp_path: Path) -> None:
    refused(lambda: Isles22(tmp_path).read(), "derivatives", "no such folder")
    (tmp_path / "derivatives").mkdir()
    refused(lambda: Isles22(tmp_path).read(), str(tmp_path), "no *_msk.nii.gz")
    write_isles22(tmp_path)
    adc = tmp_path / "sub-strokecase0001/ses-0001/dwi/sub-strokecase0001_ses-0001_adc.nii.gz"
    adc.unlink()
    refused(lambda: Isles22(tmp_path).read(), "case sub-strokecase0001", "*_adc.nii.gz")
    assert Isles22(tmp_path, ("dwi",)).read().channel_names == ("dwi",)
    shutil.rmtree(tmp_path / "sub-strokecase0001")
    refused(lambda: Isles22(tmp_path).read(), "case sub-strokecase0001_ses-0001", "no image")


def write_isles24(
    root: Path, subject: str, raw: str = "raw_data", first: str = "ses-01", second: str = "ses-02"
) -> None:
    stem, derived = f"{subject}_{first}", root / "derivatives" / subject
    volume(root / raw / subject / first / f"{stem}_ncct.nii.gz")
    volume(root / raw / subject / first / f"{stem}_cta.nii.gz", shape=(9, 9, 9))
    volume(root / raw / subject / first / "perfusion-maps" / f"{stem}_tmax.nii.gz", shape=(9, 9, 9))
    volume(derived / first / f"{stem}_space-ncct_cta.nii.gz")
    volume(derived / first / f"{stem}_space-ncct_ctp.nii.gz", channels=7)
    volume(derived / first / f"{stem}_lvo-msk.nii.gz")
    volume(derived / first / "perfusion-maps" / f"{stem}_space-ncct_tmax.nii.gz")
    volume(derived / second / f"{subject}_{second}_lesion-msk.nii.gz")
    (root / "phenotype" / subject).mkdir(parents=True)
    (root / "phenotype" / subject / "outcome.csv").write_text("mrs\n3\n")


@pytest.mark.parametrize(
    ("raw", "first", "second"), [("raw_data", "ses-01", "ses-02"), ("rawdata", "ses-0001", "ses-0002")]
)
def test_isles24_takes_what_lies_on_the_grid_of_the_ct(tmp_path: Path, raw: str, first: str, second: str) -> None:
    for subject in ("sub-stroke0001", "sub-stroke0002"):
        write_isles24(tmp_path, subject, raw, first, second)
    table = make_reader("auto", tmp_path).read()
    assert cases(table) == {"train": ["sub-stroke0001", "sub-stroke0002"]}
    stem = f"sub-stroke0001/{first}/"
    assert files(table, tmp_path)[0] == [
        f"derivatives/{stem}sub-stroke0001_{first}_space-ncct_cta.nii.gz",
        f"derivatives/{stem}perfusion-maps/sub-stroke0001_{first}_space-ncct_tmax.nii.gz",
        f"derivatives/sub-stroke0001/{second}/sub-stroke0001_{second}_lesion-msk.nii.gz",
    ]
    three = Isles24(tmp_path, ("ncct", "cta", "tmax")).read()
    assert files(three, tmp_path)[0][0] == f"{raw}/{stem}sub-stroke0001_{first}_ncct.nii.gz"
    refused(lambda: Isles24(tmp_path, ("cta", "cbf")).read(), "case sub-stroke0001", "space-ncct_cbf")
    refused(lambda: Isles24(tmp_path, ("cta", "ctp")).read(), "case sub-stroke0001", "7 channels")
    next((tmp_path / "derivatives" / "sub-stroke0002").rglob("*lesion-msk*")).unlink()
    refused(lambda: Isles24(tmp_path).read(), "case sub-stroke0002", "no mask")
    shutil.rmtree(tmp_path / "derivatives" / "sub-stroke0002")
    refused(lambda: Isles24(tmp_path).read(), "case sub-stroke0002", "no mask")
    shutil.rmtree(tmp_path / raw / "sub-stroke0002")
    volume(tmp_path / "derivatives/sub-stroke0003" / second / "sub-stroke0003_lesion-msk.nii.gz")
    refused(lambda: Isles24(tmp_path).read(), "case sub-stroke0003", "no image")


def write_atlas(folder: Path, subject: str, session: str = "ses-1", mask: bool = True) -> None:
    stem = f"{subject}_{session}_space-MNI152NLin2009aSym"
    volume(folder / subject / session / "anat" / f"{stem}_T1w.nii.gz")
    if mask:
        volume(folder / subject / session / "anat" / f"{stem}_label-L_desc-T1lesion_mask.nii.gz")


def test_atlas_pairs_images_and_masks(tmp_path: Path) -> None:
    write_atlas(tmp_path / "Training" / "R001", "sub-r001s001")
    write_atlas(tmp_path / "Training" / "R002", "sub-r002s003")
    write_atlas(tmp_path / "Training" / "R002", "sub-r002s003", "ses-2")
    write_atlas(tmp_path / "Testing" / "R003", "sub-r003s001", mask=False)
    (tmp_path / "metadata.csv").write_text("a,b\n")
    table = make_reader("auto", tmp_path).read()
    assert cases(table) == {"train": ["sub-r001s001_ses-1", "sub-r002s003_ses-1", "sub-r002s003_ses-2"]}
    assert [s.patient for s in table.splits["train"]] == ["sub-r001s001", "sub-r002s003", "sub-r002s003"]
    assert table.channel_names == ("T1w",)
    folder = tmp_path / "Training/R001/sub-r001s001/ses-1/anat"
    shutil.copy(next(folder.glob("*_T1w.nii.gz")), folder / "sub-r001s001_ses-2_T1w.nii.gz")
    refused(lambda: AtlasV2(tmp_path).read(), "case sub-r001s001_ses-2", "no mask")
    (folder / "sub-r001s001_ses-2_T1w.nii.gz").unlink()
    next(folder.glob("*_T1w.nii.gz")).unlink()
    refused(lambda: AtlasV2(tmp_path).read(), "case sub-r001s001_ses-1", "no image")
    refused(lambda: AtlasV2(tmp_path / "Testing").read(), "Testing", "no *_label-L")


# ---- Folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "labels", "split"),
    [
        ("images", "labels", "train"),
        ("images", "masks", "train"),
        ("imagesTr", "labelsTr", "train"),
        ("train/images", "train/labels", "train"),
        ("val/images", "val/masks", "val"),
        ("imagesTs", "labelsTs", "test"),
    ],
)
def test_folders_pair_by_name(tmp_path: Path, images: str, labels: str, split: str) -> None:
    for name in ("p_0001", "p_0002"):  # numbers that are none of channels
        volume(tmp_path / images / f"{name}.nii.gz")
        volume(tmp_path / labels / f"{name}.nii")
    table = make_reader("auto", tmp_path).read()
    assert cases(table) == {split: ["p_0001", "p_0002"]}
    assert table.channel_names == ("image",)
    assert table.class_names == ("background", "lesion")
    (tmp_path / images / "p_0001.nii.gz").unlink()
    refused(lambda: FolderPairs(tmp_path).read(), "case p_0001", "no image")


def test_folders_with_channels_splits_and_classes(tmp_path: Path) -> None:
    for split, names in (("train", "ab"), ("val", "c")):
        for name in names:
            for channel in range(2):
                volume(tmp_path / split / "images" / f"{name}_{channel:04d}.nii.gz")
            volume(tmp_path / split / "labels" / f"{name}.nii.gz")
    table = make_reader("auto", tmp_path, labels={"background": 0, "core": 100, "rim": 50}).read()
    assert cases(table) == {"train": ["a", "b"], "val": ["c"]}
    assert table.channel_names == ("channel_0", "channel_1")
    assert table.class_names == ("background", "rim", "core")
    assert table.label_values == {0: 0, 50: 1, 100: 2}
    assert make_reader("folders", tmp_path, ["T1", "T2"]).read().channel_names == ("T1", "T2")
    refused(lambda: make_reader("folders", tmp_path, ["T1"]).read(), "2 channels", "expected 1")
    (tmp_path / "val/images/c_0001.nii.gz").unlink()
    refused(lambda: FolderPairs(tmp_path).read(), "case c", "1 image files", "expected 2 as in case a")
    for name in ("a", "b"):
        (tmp_path / f"train/images/{name}_0001.nii.gz").rename(tmp_path / f"train/images/{name}.nii.gz")
    refused(lambda: FolderPairs(tmp_path).read(), "case a_0000", "no label")


def test_folders_with_4d_files(tmp_path: Path) -> None:
    volume(tmp_path / "images/a.nii.gz", channels=3)
    volume(tmp_path / "labels/a.nii.gz")
    assert len(FolderPairs(tmp_path).read().channel_names) == 3
    volume(tmp_path / "images/b.nii.gz", channels=2)
    volume(tmp_path / "labels/b.nii.gz")
    refused(lambda: FolderPairs(tmp_path).read(), "case b", "2 channels", "expected 3")


def test_folder_refusals(tmp_path: Path) -> None:
    refused(lambda: FolderPairs(tmp_path).read(), "no images with labels")
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    refused(lambda: FolderPairs(tmp_path).read(), "images", "no .nii.gz or .nii file")
    volume(tmp_path / "images/a.nii.gz")
    refused(lambda: FolderPairs(tmp_path).read(), "labels", "no .nii.gz or .nii file")
    volume(tmp_path / "labels/a.nii.gz")
    volume(tmp_path / "imagesTr/a.nii.gz")
    volume(tmp_path / "labelsTr/a.nii.gz")
    refused(lambda: FolderPairs(tmp_path).read(), "both train", "one layout")
    shutil.rmtree(tmp_path / "labelsTr")
    volume(tmp_path / "val/images/a.nii.gz")
    volume(tmp_path / "val/labels/a.nii.gz")
    refused(lambda: FolderPairs(tmp_path).read(), "case a", "second")


# ---- Lists -----------------------------------------------------------------------------------------------------------


def write_list(root: Path, text: str) -> Path:
    for name in "abc":
        volume(root / "data" / f"{name}.nii.gz")
        volume(root / "data" / f"{name}_mask.nii.gz")
    (root / "cases.csv").write_text(text)
    return root / "cases.csv"


def test_a_csv_lists_cases_with_patients_and_splits(tmp_path: Path) -> None:
    path = write_list(
        tmp_path,
        "\ufeffname, image, label, patient, split\n"
        "one, data/a.nii.gz, data/a_mask.nii.gz, p1, train\n\n"
        f"two,{tmp_path}/data/b.nii.gz,data/b_mask.nii.gz,p1,\n"
        "three,data/c.nii.gz,data/c_mask.nii.gz,p2,test\n",
    )
    table = make_reader("auto", tmp_path).read()
    assert cases(table) == {"train": ["one", "two"], "test": ["three"]}
    assert [s.patient for s in table.splits["train"]] == ["p1", "p1"]
    assert table.channel_names == ("image",)
    assert make_reader("auto", path).read() == table
    path.write_text(path.read_text(encoding="utf-8-sig").replace(",p2,", ",p1,"))
    refused(lambda: CaseList(path).read(), "case three", "patient p1", "train and in test")


def test_a_csv_with_one_column_per_channel(tmp_path: Path) -> None:
    path = write_list(tmp_path, "image_1;image_0;label\ndata/b.nii.gz;data/a.nii.gz;data/a_mask.nii.gz\n")
    table = make_reader("auto", tmp_path, channels=["DWI", "ADC"]).read()
    assert files(table, tmp_path) == [["data/a.nii.gz", "data/b.nii.gz", "data/a_mask.nii.gz"]]
    assert (cases(table), table.splits["train"][0].patient) == ({"train": ["a"]}, "a")
    refused(lambda: CaseList(path, ("DWI",)).read(), "case a", "2 channels", "expected 1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "columns are , expected image"),
        ("image,label\n", "no case"),
        ("image,mask\na,b\n", "image, mask"),
        ("image,image_0,label\na,b,c\n", "image_0"),
        ("image_0,image_2,label\na,b,c\n", "image_2"),
        ("image,label,label\na,b,c\n", "once"),
        ("image,label\ndata/a.nii.gz\n", "line 2: 1 cells"),
        ("image,label\n,data/a_mask.nii.gz\n", "line 2: image is ''"),
        ("image,label\ndata/a.nii.gz,\n", "line 2: label is ''"),
        ("image,label\ndata/z.nii.gz,data/a_mask.nii.gz\n", "case z"),
        ("image,label\ndata/a.nii.gz,data/z_mask.nii.gz\n", "z_mask.nii.gz is missing"),
        ("image,label,split\ndata/a.nii.gz,data/a_mask.nii.gz,dev\n", "'dev'"),
        ("image,label\n" + 2 * "data/a.nii.gz,data/a_mask.nii.gz\n", "case a"),
    ],
)
def test_csv_refusals(tmp_path: Path, text: str, said: str) -> None:
    path = write_list(tmp_path, text)
    refused(lambda: CaseList(path).read(), said)


def test_a_json_lists_cases_and_may_name_classes(tmp_path: Path) -> None:
    write_list(tmp_path, "").unlink()
    entry = {"image": ["data/a.nii.gz", "data/b.nii.gz"], "label": "data/a_mask.nii.gz", "name": "x", "split": "val"}
    path = write_json(tmp_path / "list.json", [entry])
    table = make_reader("auto", tmp_path).read()
    assert cases(table) == {"val": ["x"]}
    assert table.channel_names == ("channel_0", "channel_1")
    write_json(path, {"cases": [entry], "channels": ["DWI", "ADC"], "labels": {"background": 0, "stroke": 255}})
    table = make_reader("auto", path).read()
    assert (table.channel_names, table.class_names) == (("DWI", "ADC"), ("background", "stroke"))
    for content, said in (
        ({}, "no list of cases"),
        ([3], "case 0: 3"),
        ([], "no case"),
        ([{**entry, "mask": "x"}], "keys mask"),
        ([{**entry, "image": []}], "image is None"),
        ([{**entry, "image": [3]}], "image is 3"),
        ([{"image": "data/a.nii.gz"}], "label is None"),
        ([entry, {**entry, "name": "c", "image": "data/c.nii.gz"}], "case c: 1 image files, expected 2"),
        ({"cases": [entry], "labels": [0, 1]}, "labels is [0, 1]"),
        ({"cases": [entry], "channels": "DW"}, "channels is 'DW'"),
        ([{**entry, "name": "../x"}], "case '../x'"),
        ({"cases": [entry], "labels": {"background": 0, "stroke": "255"}}, "'stroke' is '255'"),
    ):
        write_json(path, content)
        refused(lambda: CaseList(path).read(), said)


def test_a_folder_with_two_lists_is_refused(tmp_path: Path) -> None:
    write_list(tmp_path, "image,label\n")
    (tmp_path / "other.csv").write_text("")
    refused(lambda: CaseList(tmp_path).read(), "cases.csv, other.csv", "single")
    refused(lambda: detect_format(tmp_path), "unknown format")
    refused(lambda: CaseList(tmp_path / "none").read(), "none", "no such folder")


# ---- Volumes to predict ----------------------------------------------------------------------------------------------


def predicted(folder: Path, channels: int) -> dict[str, int]:
    samples = find_volumes(folder, channels)
    assert all(s.label is None for s in samples)
    return {s.name: len(s.images) for s in samples}


@pytest.mark.parametrize(
    ("names", "channels", "expected"),
    [
        (("b", "a"), 1, {"a": 1, "b": 1}),
        (("a_0000", "b_0000"), 1, {"a": 1, "b": 1}),
        (("a_0000", "a_0001", "b_0000", "b_0001"), 2, {"a": 2, "b": 2}),
        (("scan_0000", "scan_0001", "scan_0002"), 1, {"scan_0000": 1, "scan_0001": 1, "scan_0002": 1}),
        (("scan_0007", "x_0012"), 1, {"scan_0007": 1, "x_0012": 1}),
        (("a_0000", "b"), 1, {"a_0000": 1, "b": 1}),
    ],
)
def test_volumes_to_predict(tmp_path: Path, names: Sequence[str], channels: int, expected: Mapping[str, int]) -> None:
    for name in names:
        volume(tmp_path / f"{name}.nii.gz")
    (tmp_path / "._x.nii.gz").write_text("")
    assert predicted(tmp_path, channels) == expected


def test_4d_volumes_to_predict(tmp_path: Path) -> None:
    for name in ("scan_0000", "scan_0001"):
        volume(tmp_path / f"{name}.nii.gz", channels=2)
    assert predicted(tmp_path, 2) == {"scan_0000": 1, "scan_0001": 1}
    assert predicted(tmp_path / "scan_0001.nii.gz", 2) == {"scan_0001": 1}
    refused(lambda: find_volumes(tmp_path, 1), "case scan_0000", "2 channels", "expected 1")
    refused(lambda: find_volumes(tmp_path, 3), "case scan", "expected 3")


def test_volumes_that_cannot_be_predicted(tmp_path: Path) -> None:
    refused(lambda: find_volumes(tmp_path / "none", 1), "none")
    refused(lambda: find_volumes(tmp_path, 1), str(tmp_path), "no .nii.gz or .nii file")
    for name in ("a_0000", "a_0001", "b_0000", "b_0001"):
        volume(tmp_path / f"{name}.nii.gz")
    refused(lambda: find_volumes(tmp_path, 1), "case a", "channel 1", "expected 1")
    refused(lambda: find_volumes(tmp_path, 3), "case a", "a_0002 is missing", "expected 3")
    (tmp_path / "b_0001.nii.gz").unlink()
    refused(lambda: find_volumes(tmp_path, 2), "case b", "b_0001 is missing", "expected 2")
    volume(tmp_path / "c.nii.gz")
    refused(lambda: find_volumes(tmp_path, 2), "1 channels", "expected 2", "_0000 to _0001")


# ---- Choosing --------------------------------------------------------------------------------------------------------


def test_make_reader_passes_what_the_format_has(tmp_path: Path) -> None:
    labels = {"background": 0, "lesion": 255}
    assert make_reader("msd", tmp_path, check_headers=False) == Msd(tmp_path, False)
    assert make_reader("isles22", tmp_path, ["dwi"], labels) == Isles22(tmp_path, ("dwi",), labels)
    assert make_reader("isles24", tmp_path) == Isles24(tmp_path, ("cta", "tmax"))
    assert make_reader("atlas_v2", tmp_path, labels=labels) == AtlasV2(tmp_path, labels)
    assert make_reader("list", tmp_path) == CaseList(tmp_path)
    refused(lambda: make_reader("msd", tmp_path, ["x"]), "channels", "msd")
    refused(lambda: make_reader("nnunet", tmp_path, ["x"]), "channels", "nnunet")
    refused(lambda: make_reader("atlas_v2", tmp_path, ["x"]), "channels", "atlas_v2")
    refused(lambda: make_reader("nnunet", tmp_path, labels=labels), "labels", "dataset.json")
    refused(lambda: make_reader("dicom", tmp_path), "'dicom'", "folders")  # type: ignore[arg-type]
    refused(lambda: make_reader("isles22", tmp_path, []), "channels", "empty")
    refused(lambda: make_reader("list", tmp_path, labels={}), "labels", "empty")
    refused(lambda: detect_format(tmp_path), str(tmp_path), "unknown format", "isles24")
    refused(lambda: detect_format(tmp_path / "none"), "no such folder")


@pytest.mark.parametrize(
    "labels", [{"x": 1, "y": 2}, {"background": 0, "x": 0}, {"background": 0, "x": True}, {"a": 0}]
)
def test_labels_that_are_no_classes_are_refused(tmp_path: Path, labels: dict[str, int]) -> None:
    volume(tmp_path / "images/a.nii.gz")
    volume(tmp_path / "labels/a.nii.gz")
    refused(lambda: make_reader("auto", tmp_path, labels=labels).read(), "labels: ")


def test_a_dataset_json_with_broken_folders_is_still_recognised(tmp_path: Path) -> None:
    write_json(tmp_path / "dataset.json", {"labels": {"background": 0, "x": 1}, "channel_names": {"0": "T1"}})
    assert detect_format(tmp_path) == "nnunet"
    write_json(tmp_path / "dataset.json", {"labels": {"0": "background"}, "modality": {"0": "T1"}})
    assert detect_format(tmp_path) == "msd"
    for content in ({"labels": ["background"]}, []):
        write_json(tmp_path / "dataset.json", content)
        assert detect_format(tmp_path) == "msd"
        refused(lambda: make_reader("auto", tmp_path).read(), "dataset.json")


# ---- Real data -------------------------------------------------------------------------------------------------------


@pytest.mark.data
def test_the_real_sets_are_recognised_and_read() -> None:
    data = Path(os.environ.get("LIT_DATA", ""))
    if "LIT_DATA" not in os.environ or not (data / "msd_hippocampus").is_dir() or not (data / "isles2022").is_dir():
        pytest.skip("LIT_DATA names no folder with msd_hippocampus and isles2022")
    assert detect_format(data / "msd_hippocampus") == "msd"
    table = make_reader("auto", data / "msd_hippocampus").read()
    assert {split: len(samples) for split, samples in table.splits.items()} == {"train": 260}
    assert table.class_names == ("background", "Anterior", "Posterior")
    assert detect_format(data / "isles2022") == "isles22"
    table = make_reader("auto", data / "isles2022").read()
    assert cases(table) == {"train": ["sub-strokecase0009"]}
    assert read_volume(table.splits["train"][0], table.label_values).image.shape == (2, 73, 112, 112)
