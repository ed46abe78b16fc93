"""The LightningModule against hand-made networks and hand-made figures, on two synthetic images or a few more."""

import math
import shutil

import cv2
import numpy as np
import pytest
import timm
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lit_callbacks import EMA
from torch import nn
from torch.nn import functional

from lit_cli.errors import InputError
from lit_landmarks import heatmaps as hm
from lit_landmarks.__main__ import main
from lit_landmarks.augment import Augmentation
from lit_landmarks.data import LandmarkData
from lit_landmarks.geometry import Letterbox
from lit_landmarks.losses import heatmap_loss
from lit_landmarks.module import LitLandmarks, auto_lr, warmup_cosine
from lit_landmarks.synthetic import SyntheticCephalograms
from tests.landmarks.test_data import data_set
from tests.landmarks.test_geometry import blobs

CPU = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
NET = {"backbone": "test_resnet", "pretrained": False}  # timm's smallest
LARGER = {"backbone": "resnet10t", "pretrained": False, "decoder": "Unet", "stride": 2}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIT_CACHE", str(tmp_path / "cache"))


def trainer(**kwargs):
    return Trainer(**{**CPU, "enable_checkpointing": False, **kwargs})


def synthetic(**kwargs):
    spec = {"synthetic_train": 10, "synthetic_test": 3, "image_size": 64, "batch_size": 2, "holdout": 0.2}
    return LandmarkData(format="synthetic", **{**spec, **kwargs})


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory):
    """A net that knows two images by heart, its checkpoint, and the losses of its steps."""
    folder = tmp_path_factory.mktemp("overfitted")
    torch.manual_seed(0)
    model = LitLandmarks(**LARGER, sigma=5.0, lr=4e-3)
    data = synthetic(synthetic_train=2, holdout=0, augment=None, cache_dir="none")
    losses = Losses()
    fit = trainer(max_epochs=60, callbacks=[losses])
    fit.fit(model, datamodule=data)
    path = folder / "two.ckpt"
    fit.save_checkpoint(path)
    return model, path, losses.values


class Losses(Callback):
    """The logged loss of every step."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(trainer.callback_metrics["train/loss"].item())


class Pooled(nn.Module):
    """A net that "detects" whatever is bright: map k is channel k of the image, reduced to the stride."""

    def __init__(self, stride, statistics):
        super().__init__()
        self.stride, self.seen = stride, []
        self.mean, self.std = (torch.tensor(v).view(1, -1, 1, 1) for v in statistics)

    def forward(self, images):
        self.seen.append(images)
        return functional.avg_pool2d(images * self.std + self.mean, self.stride)


class Halves(Pooled):
    """Map 0 sees the left half of a grey image, map 1 the right half: a mirrored image has them exchanged."""

    def forward(self, images):
        maps = super().forward(images)
        left = (torch.arange(maps.shape[-1]) < maps.shape[-1] // 2).float()
        return torch.cat((maps * left, maps * (1 - left)), 1)


GREY = ((0.449,), (0.226,))
RGB = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def with_net(net, landmarks, size, **kwargs):
    """A module around a toy network."""
    model = LitLandmarks(pretrained=False, num_landmarks=landmarks, image_size=list(size), stride=net.stride, **kwargs)
    model.net = net
    model.criterion = heatmap_loss("mse", sigma=model.sigma)
    return model.eval()


# ---- rules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "lr"), [(1, 5e-4), (8, 5e-4), (10, 5.5e-4), (12, 6e-4), (16, 6e-4), (18, 8e-4), (20, 1e-3), (99, 1e-3)]
)
def test_auto_lr(images, lr):
    assert auto_lr(images) == pytest.approx(lr, rel=1e-9)


def test_warmup_cosine():
    fractions = [0.0, 0.025, 0.05, 0.525, 1.0, 1.5]
    expected = [0.0, 0.5, 1.0, 0.01 + 0.99 * 0.5, 0.01, 0.01]
    assert [warmup_cosine(f, 0.05, 0.01) for f in fractions] == pytest.approx(expected)
    assert warmup_cosine(0.0, 0.0, 0.1) == 1.0
    later = [warmup_cosine(f, 0.1, 0.0) for f in np.linspace(0.1, 1, 50)]
    assert later == sorted(later, reverse=True)


@pytest.mark.parametrize("kwargs", [{}, {"lr": 3e-3, "warmup": 0.2, "final_lr": 0.1}])
def test_learning_rate_of_every_step(kwargs):
    class Rates(Callback):
        values = []  # noqa: RUF012 - one use

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.values.append([g["lr"] for g in optimizer.param_groups])

    rates = Rates()
    rates.values = []
    fit = trainer(max_epochs=3, accumulate_grad_batches=2, callbacks=[rates])
    fit.fit(LitLandmarks(**NET, **kwargs), datamodule=synthetic(batch_size=2, holdout=0.2, augment=None))
    assert fit.global_step == len(rates.values) == 6  # 4 batches an epoch
    peak = kwargs.get("lr", 5e-4)
    for step, pair in enumerate(rates.values):
        factor = warmup_cosine((step + 1) / 6, kwargs.get("warmup", 0.05), kwargs.get("final_lr", 0.01))
        assert pair == pytest.approx([peak * factor] * 2)


def test_auto_lr_counts_accumulated_images():
    fit = trainer(max_epochs=1, accumulate_grad_batches=6)
    fit.fit(LitLandmarks(**NET), datamodule=synthetic(batch_size=2, synthetic_train=15, augment=None))
    assert fit.global_step == 1
    assert fit.optimizers[0].defaults["lr"] == pytest.approx(6e-4)


def test_accumulated_gradients_are_the_mean_of_the_batches(monkeypatch):
    data = synthetic(holdout=0, augment=None, batch_size=2, synthetic_train=4)
    grads = []

    class Keep(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            grads.append([p.grad.clone() for p in pl_module.net.head.parameters()])

    torch.manual_seed(0)
    model = LitLandmarks(**NET, lr=1e-12, weight_decay=0.0)
    trainer(max_epochs=1, accumulate_grad_batches=2, callbacks=[Keep()]).fit(model, datamodule=data)
    assert len(grads) == 1
    loader = data.train_dataloader()
    loader.sampler.set_epoch(0)
    model.train()
    model.zero_grad()
    for batch in loader:
        (model._loss_of(batch.image, batch.points) / 2).backward()
    for a, p in zip(grads[0], model.net.head.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-3, atol=1e-6)


def test_weight_decay_spares_biases_and_norms():
    fit = trainer(max_epochs=1)
    model = LitLandmarks(**NET, weight_decay=0.3)
    fit.fit(model, datamodule=synthetic(augment=None))
    decayed, spared = fit.optimizers[0].param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    assert {id(p) for p in decayed["params"]} == {id(p) for p in model.parameters() if p.ndim >= 2}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


def test_auto_sigma_is_three_and_a_half_heatmap_pixels_at_512():
    for size, stride, expected in ((512, 4, 3.5), (256, 4, 1.75), (512, 2, 7.0), (384, 4, 2.625)):
        model = LitLandmarks(num_landmarks=1, image_size=[size, size], stride=stride)
        assert model.sigma == pytest.approx(expected)
    assert LitLandmarks(num_landmarks=1, image_size=[64, 64], stride=4, sigma=6.0).sigma == 1.5


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"warmup": 1.0}, r"model\.warmup"),
        ({"final_lr": -1.0}, r"model\.final_lr"),
        ({"sigma": 0.0}, r"model\.sigma"),
        ({"lr": -1.0}, r"model\.lr"),
    ],
)
def test_senseless_values_are_named(kwargs, message):
    with pytest.raises(InputError, match=message):
        LitLandmarks(**kwargs)


# ---- training -------------------------------------------------------------------------------------------------------


def test_two_images_are_learnt_by_heart(overfitted):
    model, _, losses = overfitted
    assert len(losses) == 60
    assert losses[-1] < losses[0] / 10
    figures = trainer().test(model, datamodule=synthetic(synthetic_train=2, test_split="train"), verbose=False)[0]
    box = Letterbox((300, 240), (64, 64))
    assert figures["test/mre_px"] * box.matrix[0, 0] < 2  # frame pixels; one is 4.7 px of the image


@pytest.mark.parametrize("loss", ["mse", "weighted_mse", "awing", "kl", "dice"])
@pytest.mark.parametrize("away", [math.nan, -30.0, 64.0])
def test_missing_and_outside_landmarks_teach_nothing(loss, away):
    torch.manual_seed(0)
    model = LitLandmarks(**NET, num_landmarks=3, image_size=[64, 64], loss=loss, sigma=6.0)
    model.configure_model()
    images = torch.randint(0, 255, (2, 1, 64, 64), dtype=torch.uint8)
    points = torch.tensor([[[20.0, 30.0], [40.0, 10.0], [33.0, 33.0]]]).repeat(2, 1, 1)
    points[:, 1] = away
    value = model._loss_of(images, points)
    assert torch.isfinite(value)
    value.backward()
    gradient = model.net.head[-1].weight.grad.abs().flatten(1).amax(1)
    assert gradient[1] == 0
    assert gradient[0] > 0
    assert gradient[2] > 0
    model.zero_grad()
    points[:] = away
    value = model._loss_of(images, points)
    value.backward()
    assert torch.isfinite(value)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_target_is_a_gaussian_at_the_landmark():
    model = LitLandmarks(**NET, num_landmarks=1, image_size=[64, 96], sigma=6.0, stride=4)
    model.configure_model()
    seen = []

    class Keep(nn.Module):
        def forward(self, prediction, target, valid):
            seen.append((target, valid))
            return prediction.sum()

    model.criterion = Keep()
    model._loss_of(torch.zeros(2, 1, 64, 96, dtype=torch.uint8), torch.tensor([[[50.3, 20.7]]]).repeat(2, 1, 1))
    target, valid = seen[0]
    x, y = (50.3 + 0.5) / 4 - 0.5, (20.7 + 0.5) / 4 - 0.5
    rows, columns = torch.arange(16.0)[:, None], torch.arange(24.0)
    expected = torch.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * 1.5**2))
    torch.testing.assert_close(target[0, 0], expected, rtol=1e-3, atol=1e-5)
    assert valid.all()


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_normalised_as_timm_expects(channels):
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (GREY if channels == 1 else RGB))
    image = torch.randint(0, 255, (2, channels, 32, 32), dtype=torch.uint8)
    model = LitLandmarks(in_channels=channels)
    torch.testing.assert_close(model._normalise(image), (image / 255 - mean) / std)
    torch.testing.assert_close(model._normalise(image / 255), (image / 255 - mean) / std)
    if channels == 3:
        grey = image[:, :1]
        torch.testing.assert_close(model._normalise(grey), (grey.expand(-1, 3, -1, -1) / 255 - mean) / std)


class Interrupt(Callback):
    """As Ctrl-C would, before or after some batch of the second epoch."""

    def __init__(self, when, batch):
        self.when, self.batch = when, batch

    def _maybe(self, when, trainer, batch_idx):
        if (when, trainer.current_epoch, batch_idx) == (self.when, 1, self.batch):
            raise KeyboardInterrupt

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._maybe("before", trainer, batch_idx)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._maybe("after", trainer, batch_idx)


RESIDENT = {"store": "gpu"}


@pytest.mark.parametrize(
    ("spec", "when", "batch"),
    [
        pytest.param(RESIDENT, "after", 1, id="resident, after a batch"),
        pytest.param(RESIDENT, "before", 2, id="resident, before a batch"),
        pytest.param(RESIDENT, "after", 3, id="resident, after the last batch"),
        pytest.param({"store": "ram", "num_workers": 2, "prefetch_factor": 2}, "before", 1, id="two workers"),
        pytest.param({"store": "disk", "num_workers": 0, "augment_on": "cpu"}, "after", 1, id="albumentations"),
    ],
)
def test_an_interrupted_run_resumes_bit_for_bit(tmp_path, spec, when, batch):
    """Epoch 2 of 3, four batches each, with EMA."""

    def run(folder, *callbacks, ckpt_path=None):
        torch.manual_seed(0)
        losses, ema = Losses(), EMA(decay=0.9)
        saving = ModelCheckpoint(dirpath=folder, save_last=True, save_on_exception=True)
        model = LitLandmarks(**NET, sigma=6.0, lr=2e-3)
        fit = trainer(
            max_epochs=3, gradient_clip_val=1.0, enable_checkpointing=True, callbacks=[losses, ema, saving, *callbacks]
        )
        data = synthetic(**spec, augment=Augmentation(elastic=0.0), seed=5, cache_dir=str(tmp_path / "decoded"))
        try:
            fit.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        except (KeyboardInterrupt, SystemExit):
            assert callbacks
        return fit, model, losses.values, ema, folder

    whole, expected, expected_losses, ema, _ = run(tmp_path / "a")
    _, _, before, _, folder = run(tmp_path / "b", Interrupt(when, batch))
    assert len(before) == 4 + batch + (when == "after")
    path = max(folder.glob("*.ckpt"), key=lambda p: torch.load(p, weights_only=True)["global_step"])
    fit, model, after, resumed, _ = run(tmp_path / "c", ckpt_path=str(path))
    assert fit.global_step == whole.global_step == 12
    assert before + after == expected_losses
    assert resumed.n_averaged == ema.n_averaged == 12
    for (name, a), b in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    raw, theirs = (torch.load(tmp_path / d / "last.ckpt", weights_only=True) for d in "ac")
    for name, value in raw["current_model_state"].items():
        assert torch.equal(value, theirs["current_model_state"][name]), name
    for key in ("val/mre_px", "val/mre_mm"):
        assert fit.callback_metrics[key] == whole.callback_metrics[key]


def test_init_from_takes_weights_and_nothing_else(overfitted):
    _, path, _ = overfitted
    state = torch.load(path, weights_only=True)["state_dict"]
    seen = {}

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.update({k: v.clone() for k, v in pl_module.state_dict().items()})
            seen["step"], seen["epoch"] = trainer.global_step, trainer.current_epoch

    model = LitLandmarks(**LARGER, init_from=str(path))
    fit = trainer(max_epochs=1, limit_train_batches=1, callbacks=[Look()])
    fit.fit(model, datamodule=synthetic(image_size=96))
    assert (seen.pop("step"), seen.pop("epoch")) == (0, 0)
    assert set(seen) == set(state)
    for name, value in state.items():
        torch.testing.assert_close(seen[name], value, rtol=0, atol=0, msg=name)


def test_init_from_with_other_landmarks_keeps_all_but_the_head(overfitted, tmp_path):
    _, path, _ = overfitted
    model = LitLandmarks(**LARGER, init_from=str(path), lr=1e-12)
    fit = trainer(max_epochs=1, limit_train_batches=1)
    fit.fit(model, datamodule=LandmarkData(**data_set(tmp_path / "d")))
    state = torch.load(path, weights_only=True)["state_dict"]
    assert model.net.head[-1].weight.shape[0] == 2
    torch.testing.assert_close(
        model.net.body.encoder.model.conv1[0].weight, state["net.body.encoder.model.conv1.0.weight"]
    )


@pytest.mark.parametrize("kwargs", [{"decoder": "pyramid"}, {"backbone": "resnet18"}])
def test_init_from_refuses_another_network(overfitted, kwargs):
    _, path, _ = overfitted
    model = LitLandmarks(**{**LARGER, **kwargs}, init_from=str(path))
    with pytest.raises(InputError, match=r"model\.init_from: .*lacks .* tensors"):
        trainer(max_epochs=1).fit(model, datamodule=synthetic())


def test_init_from_names_a_file_that_is_missing_or_wrong(tmp_path):
    (tmp_path / "text.ckpt").write_text("nothing")
    for name in ("text.ckpt", "nowhere.ckpt"):
        model = LitLandmarks(**NET, init_from=str(tmp_path / name))
        with pytest.raises(InputError, match=rf"model\.init_from: .*{name}"):
            trainer(max_epochs=1).fit(model, datamodule=synthetic())


def test_gpu_options_are_left_out_on_a_cpu():
    model = LitLandmarks(**NET, cuda_graph=True, compile="full")
    trainer(max_epochs=1, limit_train_batches=2).fit(model, datamodule=synthetic())
    assert model._graph is None


def test_fit_without_a_hold_out(tmp_path, recwarn):
    cli = main(
        [
            *("fit", "--data.format", "synthetic", "--data.synthetic_train", "4", "--data.synthetic_test", "1"),
            *("--data.image_size", "64", "--data.batch_size", "2", "--data.holdout", "0"),
            *("--model.backbone", "resnet10t", "--model.pretrained", "false", "--trainer.max_epochs", "2"),
            *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.logger", "false"),
            *("--trainer.check_val_every_n_epoch", "5"),  # no validation to wait for with a checkpoint
        ]
    )
    assert cli.trainer.global_step == 4
    assert not any(k.startswith("val/") for k in cli.trainer.callback_metrics)
    assert list(tmp_path.rglob("*.ckpt"))
    assert not any("zero" in str(w.message) for w in recwarn)
    assert cli.trainer.limit_val_batches == 1.0
    assert cli.trainer.check_val_every_n_epoch == 5


def test_fit_without_a_pixel_size_reports_pixels_alone(tmp_path):
    fit = trainer(max_epochs=1)
    with pytest.warns(UserWarning, match="PIXELS only"):
        fit.fit(LitLandmarks(**NET), datamodule=LandmarkData(**data_set(tmp_path / "d", pixel_size=None)))
    assert not [k for k in fit.callback_metrics if "mm" in k]
    assert {"val/mre_px", "val/sdr_2px", "val/median_px"} <= set(fit.callback_metrics)
    assert torch.isfinite(fit.callback_metrics["val/mre_px"])


# ---- data and model that do not fit ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ({}, {"synthetic_test": 1, "image_size": 96}, r"data\.image_size is \[96, 96\], the checkpoint was trained"),
        ({"tta": ["flip"]}, {}, r"model\.tta: flip needs data\.flip_pairs"),
        ({}, {"channels": 3}, r"data\.channels is 3, model\.in_channels is 1"),
        ({"num_landmarks": 5}, {}, "the data has 8 landmarks, the model 5"),
    ],
)
def test_data_that_the_model_was_not_made_for(model, data, message):
    module = LitLandmarks(**{**NET, "num_landmarks": 8, "image_size": [64, 64], **model})
    with pytest.raises(InputError, match=message):
        trainer().test(module, datamodule=synthetic(**data), verbose=False)


# ---- evaluation -----------------------------------------------------------------------------------------------------


def test_metrics_are_those_of_the_predictions(tmp_path):
    """In original pixels and mm, with other sizes of pixels along x and y and a missing landmark."""
    spec = data_set(tmp_path / "d", pixel_size=[0.1, 0.3])
    data = LandmarkData(**spec, test_split="train")
    torch.manual_seed(0)
    model = LitLandmarks(**NET, num_landmarks=2, image_size=[64, 64], sdr_thresholds=[1.0, 3.0])
    run = trainer()
    figures = run.test(model, datamodule=data, verbose=False)[0]
    points = torch.cat([p["points"] for p in run.predict(model, datamodule=data)]).numpy()
    truth = np.stack([s.points for s in data.table.splits["train"]])
    difference = points - truth
    px = np.sqrt((difference**2).sum(-1))
    mm = np.sqrt(((difference * [0.1, 0.3]) ** 2).sum(-1))
    assert np.isnan(px).sum() == 1
    for unit, errors in (("px", px), ("mm", mm)):
        assert figures[f"test/mre_{unit}"] == pytest.approx(np.nanmean(errors), rel=1e-5)
    assert figures["test/sd_mm"] == pytest.approx(np.nanstd(mm, ddof=1), rel=1e-5)
    assert figures["test/median_mm"] == pytest.approx(np.nanmedian(mm), rel=1e-5)
    assert figures["test/p95_mm"] == pytest.approx(np.nanpercentile(mm, 95), rel=1e-5)
    for threshold in (1, 3):
        share = 100 * (mm[np.isfinite(mm)] <= threshold).mean()
        assert figures[f"test/sdr_{threshold}mm"] == pytest.approx(share, rel=1e-5)
    assert not [k for k in figures if k.startswith("test/sdr") and k.endswith("px")]


def test_known_detections_come_out_in_original_pixels(tmp_path):
    """A toy network that sees the blobs: an error here is an error of the way back."""
    names, truth = [], []
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for i, size in enumerate([(150, 120), (90, 200), (64, 64)]):
        points = rng.uniform(0.3, 0.7, (3, 2)) * (size[1], size[0])
        image = blobs(points, size, sigma=max(size) / 24)
        cv2.imwrite(str(tmp_path / "in" / f"{i}.png"), image[::-1].transpose(1, 2, 0))  # BGR
        names.append(f"{i}.png")
        truth.append(points)
    model = with_net(Pooled(2, RGB), 3, (64, 64), in_channels=3, sigma=64 / 24)
    data = LandmarkData(predict_dir=str(tmp_path / "in"), channels=3, image_size=64, pixel_size=0.1, batch_size=2)
    found = torch.cat([p["points"] for p in trainer().predict(model, datamodule=data)])
    assert found.dtype == torch.float64
    for i, (points, expected) in enumerate(zip(found.numpy(), truth, strict=True)):
        scale = Letterbox(tuple(data.prepared("predict").sizes[i]), (64, 64)).matrix[0, 0]
        np.testing.assert_allclose(points, expected, atol=0.1 / scale)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_flip_tta_changes_nothing_for_a_symmetric_network(stride):
    points = torch.tensor([[[20.3, 40.7], [70.6, 30.2]]])
    image = torch.from_numpy(blobs(points[0].numpy(), (64, 96), 4.0)).amax(0)[None, None]
    plain = with_net(Halves(stride, GREY), 2, (64, 96), sigma=4.0).locate(image)
    torch.testing.assert_close(plain.points, points, rtol=0, atol=0.1)
    model = with_net(Halves(stride, GREY), 2, (64, 96), sigma=4.0, tta=["flip"], flip_pairs=[[0, 1]])
    found = model.locate(image)
    assert len(model.net.seen) == 2
    torch.testing.assert_close(found.points, plain.points, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.score, plain.score, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.covariance, plain.covariance, rtol=1e-3, atol=1e-3)
    wrong = with_net(Halves(stride, GREY), 2, (64, 96), sigma=4.0, tta=["flip"], flip_pairs=[]).locate(image)
    assert (wrong.score < 0.75 * plain.score).all()  # the two maps blur into each other


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("scales", [None, [0.6], [1.5], [0.5, 1.0, 2.0]])
def test_multiscale_tta_keeps_the_points(stride, scales):
    size = (160, 192)
    points = torch.tensor([[[60.3, 50.7], [120.9, 80.2], [90.5, 100.5]]])
    image = torch.from_numpy(blobs(points[0].numpy(), size, 9.0))[None]
    model = with_net(Pooled(stride, RGB), 3, size, in_channels=3, sigma=9.0, tta=["multiscale"], tta_scales=scales)
    found = model.locate(image)
    torch.testing.assert_close(found.points, points, rtol=0, atol=0.1)
    shapes = {tuple(s.shape[-2:]) for s in model.net.seen}
    assert all(side % 32 == 0 for shape in shapes for side in shape)
    if scales is None:
        assert shapes == {size, (128, 160), (192, 224)} or len(shapes) == 3
    else:
        assert len(shapes) == len(scales)


def test_multiscale_and_flip_multiply():
    image = torch.from_numpy(blobs(np.array([[20.0, 40.0], [70.0, 30.0]]), (64, 96), 6.0)).amax(0)[None, None]
    spec = {"tta": ["flip", "multiscale"], "tta_scales": [1.0, 2.0], "flip_pairs": [[0, 1]]}
    model = with_net(Halves(2, GREY), 2, (64, 96), sigma=6.0, **spec)
    found = model.locate(image)
    assert len(model.net.seen) == 4
    torch.testing.assert_close(found.points[0], torch.tensor([[20.0, 40.0], [70.0, 30.0]]), rtol=0, atol=0.1)


@pytest.mark.parametrize("stride", [1, 2])
def test_standard_deviation_of_predictions_is_in_original_pixels(tmp_path, stride):
    points = np.array([[100.2, 80.6], [140.4, 120.3], [60.7, 110.9]])
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in" / "a.png"), blobs(points, (192, 192), 6.0)[::-1].transpose(1, 2, 0))
    model = with_net(Pooled(stride, RGB), 3, (64, 64), in_channels=3, sigma=2.0, decode="centroid")
    data = LandmarkData(predict_dir=str(tmp_path / "in"), channels=3, image_size=64, pixel_size=0.1)
    (out,) = trainer().predict(model, datamodule=data)
    # The centroid's window of 2 sigma sees most of the blob, never more.
    assert ((out["sd"] > 4.0) & (out["sd"] < 6.8)).all()
    assert (out["score"] > 0.8).all()


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def make_checkpoint(path, seed, **kwargs):
    torch.manual_seed(seed)
    model = LitLandmarks(**NET, num_landmarks=8, image_size=[64, 64], sigma=6.0, **kwargs)
    fit = trainer(max_epochs=1, limit_train_batches=2)
    fit.fit(model, datamodule=synthetic(flip_pairs=[[0, 1]]))
    fit.save_checkpoint(path)
    return model.eval()


def test_an_ensemble_averages_heatmaps(tmp_path):
    a, b, c = (make_checkpoint(tmp_path / f"{s}.ckpt", s) for s in range(3))
    model = LitLandmarks.load_from_checkpoint(
        tmp_path / "0.ckpt", ensemble=[str(tmp_path / "1.ckpt"), str(tmp_path / "2.ckpt")]
    )
    data = synthetic()
    out = trainer().predict(model, datamodule=data)
    images = torch.from_numpy(data.prepared("test").images)
    with torch.no_grad():
        maps = (a(images) + b(images) + c(images)) / 3
    expected = hm.decode(maps, "dark", sigma=1.5)
    scores = torch.cat([p["score"] for p in out])
    torch.testing.assert_close(scores, expected.score, rtol=1e-4, atol=1e-5)
    matrices = data.prepared("test").matrices
    framed = hm.from_heatmap(expected.points, 4).double().numpy()
    for i, points in enumerate(torch.cat([p["points"] for p in out]).numpy()):
        back = (np.c_[framed[i], np.ones(8)] @ np.linalg.inv(matrices[i]).T)[:, :2]
        np.testing.assert_allclose(points, back, atol=1e-2)
    assert len(model.state_dict()) == len(a.state_dict())  # members stay out of checkpoints


def test_test_time_augmentation_reaches_every_member_of_an_ensemble(tmp_path):
    a, b = (make_checkpoint(tmp_path / f"{s}.ckpt", s) for s in range(2))
    model = LitLandmarks.load_from_checkpoint(
        tmp_path / "0.ckpt", ensemble=[str(tmp_path / "1.ckpt")], tta=["flip"], flip_pairs=[[0, 1]]
    )
    data = synthetic(flip_pairs=[[0, 1]])
    out = trainer().predict(model, datamodule=data)
    images = torch.from_numpy(data.prepared("test").images)
    order = [1, 0, *range(2, 8)]
    with torch.no_grad():
        maps = sum(m(images) + m(images.flip(-1)).flip(-1)[:, order] for m in (a, b)) / 4
    expected = hm.decode(maps, "dark", sigma=1.5).score
    torch.testing.assert_close(torch.cat([p["score"] for p in out]), expected, rtol=1e-4, atol=1e-5)


def test_an_ensemble_of_other_networks_is_refused(tmp_path):
    make_checkpoint(tmp_path / "a.ckpt", 0)
    make_checkpoint(tmp_path / "b.ckpt", 1, stride=2)
    model = LitLandmarks.load_from_checkpoint(tmp_path / "a.ckpt", ensemble=[str(tmp_path / "b.ckpt")])
    with pytest.raises(InputError, match=r"model\.ensemble: .*b\.ckpt has another image size or stride"):
        trainer().predict(model, datamodule=synthetic())
    model = LitLandmarks.load_from_checkpoint(tmp_path / "a.ckpt", ensemble=["nowhere.ckpt"])
    with pytest.raises(InputError, match=r"model\.ensemble: .*nowhere\.ckpt"):
        trainer().predict(model, datamodule=synthetic())


def only_plain(value):
    if isinstance(value, dict):
        return all(isinstance(k, str) and only_plain(v) for k, v in value.items())
    if isinstance(value, list):
        return all(map(only_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def test_a_checkpoint_is_plain_and_opens_anywhere(overfitted, tmp_path):
    _, path, _ = overfitted
    content = torch.load(path, weights_only=True)
    assert only_plain(dict(content["hyper_parameters"]))
    assert only_plain(dict(content["datamodule_hyper_parameters"]))
    h = content["hyper_parameters"]
    assert (h["num_landmarks"], h["image_size"], h["stride"]) == (8, [64, 64], 2)
    assert h["landmark_names"][0] == "sella"


def test_load_from_checkpoint_needs_no_network_and_no_first_stage(overfitted, tmp_path, monkeypatch):
    trained, path, _ = overfitted
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"] |= {"pretrained": True, "init_from": "gone.ckpt", "ensemble": ["gone.ckpt"]}
    torch.save(content, tmp_path / "moved.ckpt")
    original = timm.create_model

    def offline(*args, pretrained=False, **kwargs):
        assert not pretrained
        return original(*args, pretrained=False, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    model = LitLandmarks.load_from_checkpoint(tmp_path / "moved.ckpt", weights_only=True).eval()
    images = torch.randint(0, 255, (1, 1, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(model(images), trained.eval()(images))


def test_predict_image_is_the_pipeline(overfitted, tmp_path):
    _, path, _ = overfitted
    model = LitLandmarks.load_from_checkpoint(path)
    sample = SyntheticCephalograms(2, 1, size=(201, 167)).read().splits["train"][0]
    image = sample.read_image(1)[0]
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in" / "a.png"), image)
    data = LandmarkData(predict_dir=str(tmp_path / "in"), image_size=64)
    (out,) = trainer().predict(model, datamodule=data)
    model.train()
    points = model.predict_image(image)
    assert model.training  # left as it was
    assert points.shape == (8, 2)
    np.testing.assert_allclose(points, out["points"][0].numpy(), atol=1e-3)
    np.testing.assert_allclose(model.predict_image(np.repeat(image[..., None], 3, -1)), points, atol=0.3)


def test_predict_image_sees_the_grey_that_the_reader_sees(tmp_path):
    """A colour file is reduced to grey by its luminance; the mean of the channels is another picture."""
    colour = np.zeros((64, 64, 3), np.uint8)
    colour[:, :21], colour[:, 21:42], colour[:, 42:] = (200, 0, 0), (0, 200, 0), (0, 0, 200)
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in" / "a.png"), colour[:, :, ::-1])
    model = with_net(Pooled(4, GREY), 1, (64, 64), sigma=6.0)
    trainer().predict(model, datamodule=LandmarkData(predict_dir=str(tmp_path / "in"), image_size=64))
    model.predict_image(colour)
    from_file, from_array = ((s * 0.226 + 0.449) * 255 for s in model.net.seen)
    torch.testing.assert_close(from_array, from_file, rtol=0, atol=1.5)


def test_predict_image_of_a_colour_model():
    model = LitLandmarks(**NET, in_channels=3, num_landmarks=2, image_size=[64, 64])
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 255, (70, 50), np.uint8)
    assert model.predict_image(grey).shape == (2, 2)
    np.testing.assert_allclose(
        model.predict_image(grey), model.predict_image(np.repeat(grey[..., None], 3, -1)), atol=1e-3
    )


def test_hyperparameters_reach_the_checkpoint_of_a_copy(overfitted, tmp_path):
    """Saving what was loaded changes nothing."""
    _, path, _ = overfitted
    shutil.copy(path, tmp_path / "a.ckpt")
    model = LitLandmarks.load_from_checkpoint(tmp_path / "a.ckpt", decode="centroid")
    assert model.hparams["decode"] == "centroid"
    assert model.hparams["sigma"] == 5.0
    assert model.landmark_names == list(SyntheticCephalograms(1, 1).read().landmark_names)
