"""The data module: folds, stores that agree, and one clear line for what is wrong."""

import json

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from lit_cli.errors import InputError
from lit_dsunet.augment import VolumeAugmentation
from lit_dsunet.data import VolumeData
from lit_dsunet.loaders import CaseBatch, PatchBatch
from lit_dsunet.synthetic import SyntheticVolumes

SMALL = {
    "format": "synthetic",
    "synthetic_train": 6,
    "synthetic_test": 2,
    "synthetic_size": [16, 20, 18],
    "patch_size": [8, 8, 8],
    "batch_size": 3,
    "patches_per_volume": 2,
    "n_folds": 3,
    "num_workers": 0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Drawn volumes as an nnU-Net raw data set."""
    path = tmp_path_factory.mktemp("data") / "Dataset001_Drawn"
    SyntheticVolumes(num_train=6, num_test=2, shape=(16, 20, 18), seed=0, spacing=(2.0, 1.0, 1.0)).write(path)
    return path


def data(**options):
    return VolumeData(**{**SMALL, **options})


def on_disk(folder, tmp_path, **options):
    return data(format="auto", root=str(folder), cache_dir=str(tmp_path / "cache"), **options)


def batches(module, count=3):
    module.setup("fit")
    loader = module.train_dataloader()
    loader.sampler.set_epoch(0)
    return [b for _, b in zip(range(count), loader, strict=False)]


def test_folds_divide_the_cases_without_overlap():
    held = []
    for fold in range(3):
        one = data(fold=fold)
        train, val = ({s.name for s in one.samples(split)} for split in ("train", "val"))
        assert not train & val
        assert len(train | val) == 6
        held += sorted(val)
    assert len(held) == len(set(held)) == 6
    everything = data(fold=None)
    assert len(everything.cases("train")) == 6
    assert everything.cases("val") == []


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("store", ["ram", "disk"])
def test_all_stores_give_the_same_patches(folder, tmp_path, store, workers):
    resident = batches(on_disk(folder, tmp_path, store="gpu"))
    others = batches(on_disk(folder, tmp_path, store=store, num_workers=workers, persistent_workers=False))
    assert len(resident) == len(others) == 2
    for a, b in zip(resident, others, strict=True):
        assert isinstance(b, PatchBatch)
        for name in PatchBatch._fields:
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_an_epoch_has_as_many_steps_as_asked_for():
    module = data(steps_per_epoch=7)
    module.setup("fit")
    assert len(module.train_dataloader()) == 7
    assert len(batches(data(patches_per_volume=5))) == 3
    counts = torch.cat([b.case for b in batches(data(patches_per_volume=6), 8)]).bincount()
    assert counts.tolist() == [6, 6, 6, 6]


def test_whole_volumes_come_with_the_label_of_the_file(folder, tmp_path):
    module = on_disk(folder, tmp_path, spacing=[1.0, 1.0, 1.0], eval_batch_size=2)
    module.setup("test")
    (batch,) = list(module.test_dataloader())
    assert isinstance(batch, CaseBatch)
    assert batch.case == [0, 1]
    for image, label, case in zip(batch.image, batch.label, module.cases("test"), strict=True):
        assert tuple(image.shape) == (1, 32, 20, 18)
        assert tuple(label.shape) == case.native_shape == (16, 20, 18)


def test_the_test_cases_are_the_held_out_fold_where_there_are_no_others(folder, tmp_path):
    module = on_disk(folder, tmp_path, fold=1, test_split="val")
    assert [c.name for c in module.cases("test")] == [c.name for c in module.cases("val")]
    assert {c.name for c in on_disk(folder, tmp_path).cases("test")}.isdisjoint(
        {c.name for split in ("train", "val") for c in module.cases(split)}
    )


def test_the_seed_divides_and_orders_the_same_drawn_volumes():
    def look(**options):
        """Images by name, the held-out fold, and the order of the first epoch."""
        module = data(**options)
        cases = {c.name: c.image for split in ("train", "val", "test") for c in module.cases(split)}
        order = torch.cat([b.case for b in batches(module)])
        return cases, {c.name for c in module.cases("val")}, order.tolist()

    images, held, order = look(seed=0)
    same, other_held, other_order = look(seed=3)
    assert len(images) == 8
    assert images.keys() == same.keys()
    assert all(np.array_equal(images[name], same[name]) for name in images)
    assert held != other_held
    assert order != other_order
    redrawn, _, same_order = look(seed=0, synthetic_seed=1)
    assert not any(np.array_equal(images[name], redrawn[name]) for name in images)
    assert order == same_order


def test_folds_come_from_a_file(folder, tmp_path):
    names = [s.name for s in on_disk(folder, tmp_path, fold=None).samples("train")]
    folds = [{"val": [n], "train": [m for m in names if m != n]} for n in names]
    path = tmp_path / "splits_final.json"
    path.write_text(json.dumps(folds))
    module = on_disk(folder, tmp_path, fold=4, folds_file=str(path))
    assert [s.name for s in module.samples("val")] == [names[4]]
    with pytest.raises(InputError, match=r"data\.fold: this data set has folds 0 to 5, got 6"):
        on_disk(folder, tmp_path, fold=6, folds_file=str(path)).setup("fit")


def test_validation_patches_are_drawn_blindly():
    """The same patches whatever the labels are."""
    starts = []
    for clear in (False, True):
        module = data(val_patches=5)
        module.setup("fit")
        if clear:
            for case in module.cases("val"):
                case.label[:] = 0
        loader = module.val_dataloader()
        starts.append(torch.cat([b.image for b in loader]))
    assert torch.equal(*starts)
    assert len(starts[0]) == 10


def test_slices_are_images_with_their_neighbours_as_channels():
    module = data(patch_size=[1, 8, 8], slices=3)
    module.trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    (batch, *_) = batches(module)
    assert batch.image.shape == (3, 1, 3, 8, 8)
    flat = module.on_after_batch_transfer(batch, 0)
    assert flat.image.shape == (3, 3, 8, 8)
    assert torch.equal(flat.label, batch.label[:, 1])
    assert module.in_channels == 3


def test_augmentation_follows_from_the_seed_of_the_batch():
    module = data(augment=VolumeAugmentation(rotation_p=1.0, noise_p=1.0))
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    module.trainer = trainer
    trainer.training = True
    (batch, *_) = batches(module)
    a, b = (module.on_after_batch_transfer(batch, 0) for _ in range(2))
    assert torch.equal(a.image, b.image)
    assert not torch.equal(a.image, batch.image.float())
    assert a.label.dtype == torch.uint8
    trainer.training = False
    assert module.on_after_batch_transfer(batch, 0) is batch


def test_hyperparameters_are_plain():
    module = data(augment=VolumeAugmentation(), patch_size=(8, 8, 8))
    assert isinstance(module.hparams["augment"]["scale"], list)
    assert module.hparams["patch_size"] == [8, 8, 8]
    again = VolumeData(**module.hparams)
    assert again._augment == VolumeAugmentation(**module.hparams["augment"])


def test_a_folder_to_predict_on(folder, tmp_path):
    module = on_disk(folder, tmp_path, predict_dir=str(folder / "imagesTs"))
    module.setup("predict")
    (batch,) = list(module.predict_dataloader())
    assert batch.label == [None, None]
    np.testing.assert_array_equal(module.cases("predict")[0].image, module.cases("test")[0].image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"data\.batch_size: expected 1 or more, got 0"),
        ({"patch_size": [8, 8]}, r"data\.patch_size: expected three positive numbers"),
        ({"patch_size": [8, 8, 0]}, r"data\.patch_size: expected three positive numbers"),
        ({"slices": 2}, r"data\.slices: expected an odd number"),
        ({"slices": 3}, r"data\.slices: expected an odd number and a patch depth of 1"),
        ({"spacing": [1.0, 0.0, 1.0]}, r"data\.spacing: expected three positive"),
        ({"foreground": 1.5}, r"data\.foreground: expected a share"),
        ({"fold": 3}, r"data\.fold: expected 0 to 2"),
        ({"steps_per_epoch": 0}, r"data\.steps_per_epoch: expected 1 or more"),
        ({"augment": VolumeAugmentation(noise_p=2.0)}, r"data\.augment\.noise_p: expected a probability"),
    ],
)
def test_wrong_settings_are_one_line(options, message):
    with pytest.raises(InputError, match=message):
        data(**options)


@pytest.mark.parametrize(
    ("options", "stage", "message"),
    [
        ({"format": "auto"}, "fit", r"data\.root: name the data folder"),
        ({"format": "msd", "root": "/nowhere"}, "fit", "/nowhere"),
        ({"test_split": "hidden"}, "test", r"data\.test_split: 'hidden' is not in this data set"),
        ({"fold": None}, "validate", r"data: no volumes to validate on"),
    ],
)
def test_wrong_data_are_one_line(options, stage, message):
    with pytest.raises(InputError, match=message):
        data(**options).setup(stage)
