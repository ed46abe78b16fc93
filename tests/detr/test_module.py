"""The module through a Trainer: it learns, resumes to the same losses, and opens outside of it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from lit_cli.errors import InputError
from lit_detr.data import DetectionData
from lit_detr.module import LitDETR, best

SMALL = {
    "backbone": "resnet10t",
    "hidden": 32,
    "heads": 4,
    "feedforward": 64,
    "strides": [8, 16],
    "decoder_layers": 2,
    "queries": 20,
    "eval_queries": 20,
    "most_queries": 40,
    "noise_queries": 10,
    "lr": 2e-3,
}
DRAWN = {"format": "synthetic", "image_size": 64, "channels": 1, "num_workers": 0, "seed": 0}


def trainer(folder, **options):
    defaults = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=folder, **{**defaults, "gradient_clip_val": 0.5, **options})


class Losses(Callback):
    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen[trainer.global_step] = float(outputs["loss"])


def fit(folder, epochs, ckpt_path=None, **options):
    torch.manual_seed(0)
    data = DetectionData(**{**DRAWN, "batch_size": 4, "synthetic_train": 8, "synthetic_val": 2, **options})
    model, losses = LitDETR(**SMALL), Losses()
    run = trainer(folder, max_epochs=4, callbacks=[losses])
    run.fit_loop.max_epochs = 4
    if epochs < 4:
        run.callbacks.append(_Stop(epochs))
    run.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return run, losses.seen


class _Stop(Callback):
    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("whole"), 4)


def test_resumes_to_the_same_losses(whole, tmp_path):
    run, first = fit(tmp_path, 2)
    run.save_checkpoint(tmp_path / "half.ckpt")
    _, second = fit(tmp_path, 4, ckpt_path=tmp_path / "half.ckpt")
    assert set(first) | set(second) == set(whole[1])
    for step, loss in {**first, **second}.items():
        assert loss == pytest.approx(whole[1][step], rel=1e-4), step


def test_sizes_to_begin_with_come_from_the_data(whole):
    run, _ = whole
    split = run.datamodule.prepared("train")
    boxes = np.concatenate([split.boxes(i).boxes for i in range(len(split))])
    sides = np.sort(np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])))
    model = run.lightning_module
    assert model.hparams["prior_sizes"] == pytest.approx(np.quantile(sides, [0.25, 0.75]), abs=0.01)
    assert list(model.net.prior_sizes) == model.hparams["prior_sizes"]


def test_figures_of_a_test_are_those_of_the_checkpoint(whole, tmp_path):
    run, _ = whole
    run.save_checkpoint(tmp_path / "last.ckpt")
    model = LitDETR.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert model.class_names == run.lightning_module.class_names
    data = DetectionData(**{**DRAWN, "batch_size": 4, "synthetic_train": 8, "synthetic_val": 2}, test_split="val")
    (figures,) = trainer(tmp_path).test(model, datamodule=data, verbose=False)
    (validated,) = trainer(tmp_path).validate(model, datamodule=data, verbose=False)
    for key, value in validated.items():
        np.testing.assert_equal(figures[key.replace("val/", "test/")], value)
    image = torch.rand(1, 1, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(model(image).logits, run.lightning_module(image).logits)


def test_it_learns(tmp_path):
    """Four frames by heart."""
    torch.manual_seed(0)
    data = DetectionData(**DRAWN, batch_size=4, synthetic_train=4, synthetic_val=1, augment=None)
    model, losses = LitDETR(**SMALL, warmup=0.1), Losses()
    trainer(tmp_path, max_epochs=40, callbacks=[losses], limit_val_batches=0, enable_checkpointing=False).fit(
        model, datamodule=data
    )
    values = list(losses.seen.values())
    assert np.mean(values[-3:]) < 0.8 * np.mean(values[:3])


def test_detections_lie_on_the_files_and_best_are_first(whole, tmp_path):
    run, _ = whole
    data = DetectionData(**{**DRAWN, "batch_size": 4, "synthetic_train": 8, "synthetic_val": 2}, test_split="val")
    found = trainer(tmp_path).predict(run.lightning_module, datamodule=data)
    assert sorted(i for batch in found for i in batch.position) == [0, 1]
    for batch in found:
        assert (batch.boxes >= 0).all()
        assert (batch.boxes <= 64).all()
        assert (batch.scores.diff(dim=1) <= 0).all()


def test_best_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    logits, boxes = torch.randn(2, 5, 3, generator=generator), torch.rand(2, 5, 4, generator=generator)
    found, scores, labels = best(logits, boxes, 7)
    for image in range(2):
        rows = sorted(((float(logits[image, q, k]), q, k) for q in range(5) for k in range(3)), reverse=True)[:7]
        for n, (value, q, k) in enumerate(rows):
            assert float(scores[image, n]) == pytest.approx(1 / (1 + np.exp(-value)), rel=1e-5)
            assert int(labels[image, n]) == k
            cx, cy, w, h = boxes[image, q].tolist()
            expected = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
            np.testing.assert_allclose(found[image, n], expected, atol=1e-6)


def test_frames_without_objects_train(tmp_path, monkeypatch):
    from lit_detr.store import Prepared

    nothing = Prepared.boxes

    def none(self, i):
        own = nothing(self, i)
        return own._replace(boxes=own.boxes[:0], labels=own.labels[:0])

    monkeypatch.setattr(Prepared, "boxes", none)
    _, losses = fit(tmp_path, 1)
    assert all(np.isfinite(v) for v in losses.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "model.lr: expected a positive number"),
        ({"warmup": 2.0}, "model.warmup: expected a share"),
        ({"queries": 50, "most_queries": 20}, "model.queries: expected 1 to"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(InputError, match=message) as caught:
        LitDETR(**options)
    assert "\n" not in str(caught.value)


def test_other_classes_are_refused(tmp_path):
    data = DetectionData(**{**DRAWN, "batch_size": 4, "synthetic_train": 8, "synthetic_val": 2})
    with pytest.raises(InputError, match="the data has classes"):
        trainer(tmp_path, max_epochs=1).fit(LitDETR(**SMALL, class_names=["tank"]), datamodule=data)


def test_training_starts_from_a_checkpoint_of_other_classes(whole, tmp_path):
    """Everything but what has a row for each class is taken."""
    run, _ = whole
    run.save_checkpoint(tmp_path / "last.ckpt")
    before = run.lightning_module.net.state_dict()
    settings = {**SMALL, "prior_sizes": [8.0, 16.0], "init_from": str(tmp_path / "last.ckpt"), "in_channels": 1}
    model = LitDETR(**settings, class_names=[*run.lightning_module.class_names, "another"])
    model._trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"), ckpt_path=None)
    model.configure_model()
    after = model.net.state_dict()
    assert before.keys() == after.keys()
    other = {k for k in after if after[k].shape != before[k].shape}
    assert {k.rsplit(".", 2)[0] for k in other} == {"decoder.class_heads", "selection", "denoising"}
    assert all(torch.equal(after[k], before[k]) for k in after.keys() - other)
    wider = LitDETR(**{**settings, "hidden": 64, "class_names": model.class_names})
    wider._trainer = model._trainer
    with pytest.raises(InputError, match=r"model.init_from: .* lacks"):
        wider.configure_model()


def test_float16_is_warned_of(tmp_path, monkeypatch):
    """A CPU takes bfloat16 in its place, so that a GPU's answer is needed here."""
    monkeypatch.setattr(Trainer, "precision", "16-mixed")
    data = DetectionData(**{**DRAWN, "batch_size": 2, "synthetic_train": 2, "synthetic_val": 1})
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0, num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match="float16 overflows"):
        run.fit(LitDETR(**SMALL), datamodule=data)
