"""Drawn volumes: reproducible, exact in the size law, lesions that stand apart; files that read back; implants."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from lit_cli.errors import InputError
from lit_dsunet.samples import Geometry, Volume
from lit_dsunet.synthetic import LesionLaw, SyntheticVolumes, implant_lesions

SMALL = SyntheticVolumes(num_train=3, num_test=2, shape=(32, 40, 36), spacing=(2.0, 1.0, 0.5))
AROUND = np.ones((3, 3, 3))


def sizes(label):
    lesions, count = ndimage.label(label, AROUND)
    return np.bincount(lesions.ravel(), minlength=count + 1)[1:]


def plain(shape=(40, 44, 48), channels=2):
    """A textured ball of 100 in a background of 0."""
    grid = np.stack(np.meshgrid(*[np.arange(s) - s / 2 for s in shape], indexing="ij"))
    ball = np.sqrt((grid**2).sum(0)) < 18
    image = np.random.default_rng(0).normal(100, 10, (channels, *shape)) * ball
    return Volume("case", image.astype(np.float32), None, Geometry(np.eye(4), shape[::-1], (1.0, 1.0, 1.0)), ["note"])


def test_the_table_names_what_can_be_drawn():
    table = SMALL.read()
    assert {k: len(v) for k, v in table.splits.items()} == {"train": 3, "test": 2}
    assert table.channel_names == ("DWI",)
    assert table.class_names == ("background", "lesion")
    assert [v.name for v in SMALL.volumes("test")] == ["test_000", "test_001"]
    assert replace(SMALL, num_test=0).read().splits.keys() == {"train"}
    assert SMALL.volumes("val") == []


def test_a_volume():
    volume = replace(SMALL, channels=2).volume("train_001")
    assert volume.image.shape == (2, 32, 40, 36)
    assert volume.image.dtype == np.float32
    assert volume.label.dtype == np.uint8
    assert set(np.unique(volume.label)) == {0, 1}
    assert volume.geometry.spacing == (2.0, 1.0, 0.5)
    assert volume.geometry.shape == (36, 40, 32)
    assert np.array_equal(np.linalg.norm(volume.geometry.affine[:3, :3], axis=0), (0.5, 1.0, 2.0))
    lesion, brain = volume.label == 1, volume.image[0] > 0.5
    assert 0.2 < brain.mean() < 0.5
    assert brain[lesion].all()
    around = ndimage.binary_dilation(lesion, iterations=3) & ~ndimage.binary_dilation(lesion) & brain
    dwi, adc = volume.image
    assert dwi[lesion].mean() > dwi[around].mean() + 3 * 0.12
    assert adc[lesion].mean() < adc[around].mean() - 3 * 0.08
    corner = volume.image[:, :3, :3, :3]
    assert corner.min() >= 0  # a magnitude
    assert 0 < corner.mean() < 0.1


def test_a_volume_follows_from_seed_split_and_number_alone():
    volume = SMALL.volume("test_001")
    same = replace(SMALL, num_train=1, num_test=7).volume("test_001")
    assert np.array_equal(volume.image, same.image)
    assert np.array_equal(volume.label, same.label)
    others = (SMALL.volume("train_001"), SMALL.volume("test_000"), replace(SMALL, seed=1).volume("test_001"))
    assert not any(np.array_equal(volume.image, other.image) for other in others)


def test_the_default_law_has_the_published_quartiles():
    drawn = LesionLaw().sizes(np.random.default_rng(1), 20000)
    assert np.percentile(drawn, [25, 50, 75]) == pytest.approx([6, 17, 46], abs=1.5)
    assert (np.diff(drawn) <= 0).all()
    counts = [len(LesionLaw(count=5).sizes(np.random.default_rng(i))) for i in range(300)]
    assert np.mean(counts) == pytest.approx(5, abs=0.4)
    assert LesionLaw(largest=9).sizes(np.random.default_rng(1), 100).max() == 9


def test_lesions_are_separate_components_of_the_drawn_sizes():
    law = LesionLaw(count=25)
    for seed in range(3):
        found = np.sort(sizes(implant_lesions(plain(), law, seed).label))[::-1]
        drawn = law.sizes(np.random.default_rng(seed))
        left = list(drawn)
        for size in found.tolist():
            left.remove(size)  # each component has a size that was drawn
        assert len(found) >= 0.8 * len(drawn)


def test_volumes_are_drawn_quickly():
    data = SyntheticVolumes(num_train=4, num_test=0)
    start = time.process_time()
    data.volumes("train")
    assert time.process_time() - start < 1.5  # about 0.2 s on one core


def test_a_threshold_finds_the_lesions_of_the_demonstration():
    """Bright enough to be learned within a minute, yet not for a threshold alone."""
    best = []
    for volume in SyntheticVolumes(num_train=6, num_test=0).volumes("train"):
        lesion = volume.label == 1
        guesses = [volume.image[0] > t for t in np.linspace(1, 2.2, 25)]
        best.append(max(2 * (g & lesion).sum() / (g.sum() + lesion.sum()) for g in guesses))
    assert 0.6 < np.mean(best) < 0.97


def test_written_files_read_back(tmp_path):
    data = replace(SMALL, channels=2)
    root = data.write(tmp_path / "set")
    description = json.loads((root / "dataset.json").read_text())
    assert description["channel_names"] == {"0": "DWI", "1": "ADC"}
    assert description["labels"] == {"background": 0, "lesion": 1}
    assert description["numTraining"] == 3
    names = sorted(str(p.relative_to(root)) for p in root.rglob("*.nii.gz"))
    expected = [f"imagesTr/train_{i:03d}_{c:04d}" for i in range(3) for c in range(2)]
    expected += [f"imagesTs/test_{i:03d}_{c:04d}" for i in range(2) for c in range(2)]
    expected += [f"labelsTr/train_{i:03d}" for i in range(3)] + [f"labelsTs/test_{i:03d}" for i in range(2)]
    assert names == sorted(f"{n}.nii.gz" for n in expected)
    volume = data.volume("test_001")
    for path, array in (("imagesTs/test_001_0001", volume.image[1]), ("labelsTs/test_001", volume.label)):
        file = nibabel.load(root / f"{path}.nii.gz")
        assert nibabel.aff2axcodes(file.affine) == ("R", "A", "S")
        assert np.array_equal(np.asarray(file.dataobj).transpose(2, 1, 0), array)
        np.testing.assert_allclose(file.affine, volume.geometry.affine)
        assert file.header.get_zooms() == pytest.approx((0.5, 1.0, 2.0))


def test_implants_lie_in_the_foreground_and_follow_the_tissue():
    volume = plain()
    law = LesionLaw(count=20, median=60, contrast=(3.0, 3.0), edge=0.0)
    new = implant_lesions(volume, law, 4)
    lesion, ball = new.label == 1, volume.image[0] != 0
    assert volume.label is None
    assert new.notes == ["note"]
    assert lesion.any()
    assert ball[lesion].all()
    change = new.image - volume.image
    assert not change[:, ~lesion].any()
    deviation = [channel[ndimage.binary_erosion(ball)].std() for channel in volume.image]
    np.testing.assert_allclose(change[0][lesion], 3 * deviation[0], rtol=0.03)
    np.testing.assert_allclose(change[1][lesion], -3 * deviation[1], rtol=0.03)
    assert new.image[0][lesion].std() == pytest.approx(10, abs=2)  # the texture is still there


def test_edges_are_smooth_and_stay_inside():
    volume = plain()
    sharp, smooth = (implant_lesions(volume, LesionLaw(count=8, median=200, edge=e), 1) for e in (0.0, 0.8))
    assert np.array_equal(sharp.label, smooth.label)
    change = smooth.image[0] - volume.image[0]
    assert not change[volume.image[0] == 0].any()
    lesion = smooth.label == 1
    rim = ndimage.binary_dilation(lesion) & ~lesion & ndimage.binary_erosion(volume.image[0] != 0)
    inner = lesion & ~ndimage.binary_erosion(lesion)
    core = ndimage.binary_erosion(lesion, iterations=2)
    assert 0 < change[rim].mean() < 0.5 * change[core].mean()
    assert change[rim].mean() < change[inner].mean() < change[core].mean()


def test_implants_are_reproducible_and_take_options():
    volume = plain()
    one, same, other = (implant_lesions(volume, LesionLaw(), seed) for seed in (1, 1, 2))
    assert np.array_equal(one.image, same.image)
    assert not np.array_equal(one.label, other.label)
    half = np.zeros(volume.image.shape[1:], bool)
    half[:20] = volume.image[0, :20] != 0
    mine = implant_lesions(volume, LesionLaw(edge=0.0), 1, foreground=half, signs=(0.0, 1.0))
    assert mine.label.any()
    assert not mine.label[20:].any()
    assert np.array_equal(mine.image[0], volume.image[0])
    assert (mine.image[1] >= volume.image[1]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SyntheticVolumes(num_train=0, num_test=0), "0 train and 0 test volumes, expected at least one"),
        (lambda: SyntheticVolumes(shape=(8, 48, 48)), "expected three sizes of at least 16"),
        (lambda: SyntheticVolumes(channels=3), "channels is 3, expected 1 or 2"),
        (lambda: SyntheticVolumes(spacing=(1, 0, 1)), "expected three numbers above 0"),
        (lambda: SyntheticVolumes(seed=-1), "expected 0 or more"),
        (lambda: SMALL.volume("train_003"), "there is no volume 'train_003'"),
        (lambda: LesionLaw(median=0.5), "lesions: median is 0.5, expected 1 or more"),
        (lambda: LesionLaw(contrast=(2, 1)), "lesions: contrast is"),
        (lambda: implant_lesions(plain(), LesionLaw(), 0, foreground=np.zeros((2, 2, 2), bool)), "case: foreground of"),
        (lambda: implant_lesions(plain(), LesionLaw(), 0, signs=(1,)), "case: 1 signs, expected one for each of the 2"),
    ],
)
def test_refused(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.data
def test_implants_in_a_real_volume():
    folder = Path(os.environ.get("LIT_DATA", "")) / "msd_hippocampus" / "imagesTr"
    if "LIT_DATA" not in os.environ or not folder.is_dir():
        pytest.skip("LIT_DATA names no folder with msd_hippocampus")
    file = nibabel.load(next(p for p in sorted(folder.glob("*.nii*")) if not p.name.startswith(".")))
    image = np.asarray(file.dataobj, np.float32).transpose(2, 1, 0)[None]
    volume = Volume("real", image, None, Geometry(file.affine, file.shape, (1.0, 1.0, 1.0)))
    new = implant_lesions(volume, LesionLaw(count=10), 0)
    lesion = new.label == 1
    assert len(sizes(lesion)) >= 5
    assert (new.image[0][lesion] > image[0][lesion]).all()
