"""The module through real Trainers and the real command line, on drawn volumes."""

import json
import math
import shlex

import nibabel as nib
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lit_callbacks import EMA, PredictionLogger, ValidationSchedule

from lit_cli.errors import InputError
from lit_dsunet.__main__ import main
from lit_dsunet.augment import VolumeAugmentation
from lit_dsunet.data import VolumeData
from lit_dsunet.module import LitDSUNet
from lit_dsunet.synthetic import SyntheticVolumes

NET = {"strides": [1, 2], "features": [4, 8], "deep_supervision": 0, "lr": 0.003, "optimizer": "adamw"}
SMALL = {
    "format": "synthetic",
    "synthetic_train": 6,
    "synthetic_test": 2,
    "synthetic_size": [16, 16, 16],
    "patch_size": [8, 8, 8],
    "batch_size": 2,
    "patches_per_volume": 1,
    "n_folds": 3,
    "num_workers": 0,
}


def data(**options):
    return VolumeData(**{**SMALL, **options})


def trainer(folder, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    common = {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": folder, "enable_checkpointing": False}
    return Trainer(**(quiet | common | options))


def fitted(folder, model=None, module=None, **options):
    seed_everything(0, verbose=False)
    model = LitDSUNet(**NET) if model is None else model
    run = trainer(folder, **options)
    run.fit(model, datamodule=data() if module is None else module)
    return run, model


ARMS = [{"mkdc": m, "deep_supervision": d} for m in ("off", "skips") for d in (0, 1)]


@pytest.mark.parametrize("arm", ARMS)
def test_the_four_arms_train_and_evaluate(tmp_path, arm):
    run, model = fitted(tmp_path, LitDSUNet(**NET | {"strides": [1, 2, 2], "features": [4, 4, 8]} | arm))
    assert math.isfinite(float(run.callback_metrics["train/loss"]))
    assert 0 <= float(run.callback_metrics["val/dice"]) <= 1
    (result,) = run.test(model, datamodule=data(), verbose=False)
    assert {"test/dice", "test/lesion_f1", "test/avd_ml"} <= result.keys()
    assert model.hparams["class_names"] == ["background", "lesion"]


def test_a_network_learns_the_lesions(tmp_path):
    """Bright lesions on dark tissue: half a minute is enough for a Dice that chance does not give."""
    module = data(synthetic_size=[24, 24, 24], patch_size=[16, 16, 16], patches_per_volume=8, foreground=0.5)
    run, _ = fitted(tmp_path, LitDSUNet(**NET | {"lr": 0.01, "features": [8, 16]}), module, max_epochs=4)
    assert float(run.callback_metrics["val/dice"]) > 0.5


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ({"arch": "smp", "strides": None, "features": None, "encoder": "tu-resnet10t"}, {"patch_size": [1, 32, 32]}),
        ({"arch": "smp", "encoder": "tu-resnet10t", "deep_supervision": 2}, {"patch_size": [1, 32, 32], "slices": 3}),
        ({"strides": [1, 2], "features": [4, 8]}, {"patch_size": [1, 8, 8]}),
        ({"arch": "resenc", "gradient_checkpointing": True}, {}),
        ({"loss": "blob", "ds_targets": "max", "schedule": "cosine", "optimizer": "sgd"}, {}),
        ({"loss": "generalised_dice", "ds_weights": "guide", "warmup": 0.2}, {"val_patches": 2}),
        ({"hd95": True, "tta": [0, 2], "lesion_match": "iou", "channels_last": True}, {"spacing": [2.0, 1.0, 1.0]}),
        ({"compile": True, "cuda_graph": True}, {"augment": VolumeAugmentation()}),
    ],
)
def test_options_train(tmp_path, model, options):
    size = {"synthetic_size": [32, 32, 32]} if options.get("patch_size") else {}
    run, _ = fitted(tmp_path, LitDSUNet(**{**NET, **model}), data(**{**size, **options}))
    key = "val/patch_dice" if options.get("val_patches") else "val/dice"
    assert math.isfinite(float(run.callback_metrics[key]))
    if model.get("hd95"):
        assert "val/hd95_mm" in run.callback_metrics


def test_predictions_do_not_depend_on_the_ground_truth(tmp_path):
    """Validation with the labels withheld gives the same label maps."""

    class Keep(Callback):
        def __init__(self):
            self.labels = []

        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            self.labels += [label.clone() for label in outputs["label"]]

    _, model = fitted(tmp_path)
    found = []
    for withheld in (False, True):
        module, keep = data(), Keep()
        module.setup("validate")
        if withheld:
            for case in module.cases("val"):
                case.native_label[:] = 0
        trainer(tmp_path, callbacks=[keep]).validate(model, datamodule=module, verbose=False)
        found.append(keep.labels)
    assert len(found[0]) == 2
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_checkpoint_opens_and_repeats_its_result(tmp_path):
    run, model = fitted(tmp_path, callbacks=[EMA(decay=0.9)])
    run.save_checkpoint(tmp_path / "a.ckpt")
    (expected,) = run.test(model, datamodule=data(), verbose=False)
    again = LitDSUNet.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    (found,) = trainer(tmp_path).test(again, datamodule=data(), verbose=False)
    assert found == pytest.approx(expected, nan_ok=True)
    volume = torch.randn(1, 10, 9, 12)
    torch.testing.assert_close(again.segment([volume])[0], model.segment([volume])[0])


def test_an_ensemble_averages_logits(tmp_path):
    paths, models = [], []
    for seed in (0, 1):
        seed_everything(seed, verbose=False)
        run, model = trainer(tmp_path), LitDSUNet(**NET)
        run.fit(model, datamodule=data(seed=seed))
        run.save_checkpoint(tmp_path / f"{seed}.ckpt")
        paths.append(str(tmp_path / f"{seed}.ckpt"))
        models.append(model)
    both = LitDSUNet.load_from_checkpoint(paths[0], weights_only=True, ensemble=paths[1:])
    trainer(tmp_path).test(both, datamodule=data(), verbose=False)
    volume = torch.randn(1, 8, 8, 8)
    mean = (models[0].segment([volume])[0] + models[1].segment([volume])[0]) / 2
    torch.testing.assert_close(both.segment([volume])[0], mean)
    other = LitDSUNet.load_from_checkpoint(paths[0], weights_only=True, ensemble=[str(tmp_path / "none.ckpt")])
    with pytest.raises(InputError, match=r"model\.ensemble: .*none\.ckpt: no such file"):
        trainer(tmp_path).test(other, datamodule=data(), verbose=False)


def test_a_schedule_tells_cheap_from_full(tmp_path):
    class Logged(Callback):
        def __init__(self):
            self.keys = []

        def on_validation_end(self, trainer, pl_module):
            self.keys.append({k for k in trainer.callback_metrics if k.startswith("val/")})

    logged = Logged()
    schedule = ValidationSchedule(every_n_epochs=2, dense_from=1.0, cheap="module")
    fitted(tmp_path, callbacks=[schedule, logged], max_epochs=4)
    assert ["val/dice" in keys for keys in logged.keys] == [False, True, False, True]
    assert "val/dice_monitor" in logged.keys[0]
    assert "val/lesion_f1" not in logged.keys[0]


@pytest.mark.parametrize("store", ["gpu", "ram"])
def test_an_interrupted_run_resumes_bit_for_bit(tmp_path, store):
    def run(folder, ckpt=None, *callbacks):
        seed_everything(0, verbose=False)
        module = data(store=store, augment=VolumeAugmentation(), patches_per_volume=3)
        model = LitDSUNet(**NET)
        one = trainer(folder, max_epochs=3, callbacks=[EMA(decay=0.9), *callbacks], limit_val_batches=0)
        one.fit(model, datamodule=module, ckpt_path=ckpt)
        return {k: v.clone() for k, v in model.state_dict().items()}

    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 9:
                trainer.save_checkpoint(tmp_path / "mid.ckpt")

    expected = run(tmp_path, None, Save())
    found = run(tmp_path, str(tmp_path / "mid.ckpt"))
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "Dataset001_Drawn"
    SyntheticVolumes(num_train=6, num_test=2, shape=(16, 20, 18), seed=0, spacing=(2.0, 1.0, 1.0)).write(path)
    return path


QUIET = shlex.split(
    "--trainer.accelerator cpu --trainer.enable_progress_bar false --trainer.enable_model_summary false "
    "--trainer.precision 32-true --data.num_workers 0"
)
TINY = [
    *QUIET,
    *("--model.strides", "[1,2]", "--model.features", "[4,8]", "--model.deep_supervision", "0"),
    *("--data.patch_size", "[8,8,8]", "--data.patches_per_volume", "1", "--data.batch_size", "2"),
]


def test_the_command_line_from_fit_to_nifti(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIT_CACHE", str(tmp_path / "cache"))
    demo = ["--config", "demo", "--data.format", "auto", "--data.root", str(folder), "--data.n_folds", "3"]
    cli = main(["fit", *demo, *TINY, "--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1"])
    printed = capsys.readouterr().out
    assert "val/dice" in printed
    assert "last checkpoint" in printed
    main(["test", *demo, *TINY, "--ckpt_path", "last"])
    assert "test/dice" in capsys.readouterr().out
    out = tmp_path / "out"
    where = ["--data.predict_dir", str(folder / "imagesTs"), "--predictions.dirpath", str(out)]
    main(["predict", *demo, *TINY, "--ckpt_path", "last", *where])
    images = sorted((folder / "imagesTs").glob("*.nii.gz"))
    for image in images:
        label = nib.load(out / image.name.replace("_0000", ""))
        original = nib.load(image)
        np.testing.assert_array_equal(label.affine, original.affine)
        assert label.shape == original.shape
        assert set(np.unique(np.asarray(label.dataobj))) <= {0, 1}
    assert len(images) == 2
    assert cli.trainer.callback_metrics


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            ["--data.patch_size", "[9,8,8]"],
            "data.patch_size: expected multiples of the network's (2, 2, 2), got (9, 8, 8)",
        ),
        (["--model.deep_supervision", "3"], "model.deep_supervision: expected 0 to 0, got 3"),
        (["--model.init_from", "none.ckpt"], "model.init_from: none.ckpt: no such file"),
        (["--data.root", "/nowhere", "--data.format", "msd"], "/nowhere"),
        (["--model.loss", "dise"], "dise"),
        (["--model.loss_options", "{batchdice: true}"], "dice_ce has no option 'batchdice'"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, extra, message):
    monkeypatch.chdir(tmp_path)
    small = ["--data.synthetic_train", "3", "--data.n_folds", "3", "--data.synthetic_size", "[16,16,16]"]
    with pytest.raises(SystemExit) as done:
        main(["fit", "--config", "demo", *TINY, *small, *extra])
    assert done.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize("options", [{"val_patches": 2}, {"val_patches": 2, "patch_size": [1, 8, 8]}, {}])
def test_pictures_of_volumes_and_of_patches(tmp_path, options):
    pictures = PredictionLogger(every_n_epochs=1, num_first=1, worst_k=1, dirpath=str(tmp_path / "pictures"))
    fitted(tmp_path, LitDSUNet(**NET), data(**options), callbacks=[pictures])
    assert len(pictures.artifacts) == len(list((tmp_path / "pictures").glob("*.png"))) == 2


def test_hyperparameters_in_a_checkpoint_are_plain(tmp_path):
    run, _ = fitted(tmp_path, LitDSUNet(**NET | {"loss_options": {"batch_dice": True}}))
    run.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    json.dumps(content["hyper_parameters"])
    json.dumps(content["datamodule_hyper_parameters"])
