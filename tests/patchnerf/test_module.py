"""The module through a Trainer: each figure against one that is made by hand, and one line for what cannot be."""

import math

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lit_callbacks import EMA
from torch.nn import functional as F

from lit_cli.errors import InputError
from lit_common.schedule import warmup_cosine
from lit_patchnerf.compress.quantise import dequantise_state, quantise_state
from lit_patchnerf.metrics import psnr
from lit_patchnerf.module import LitPatchNeRF, load
from lit_patchnerf.splits import blend_frames, blend_neighbours
from lit_patchnerf.steps import OptimizerSteps
from lit_patchnerf.synthetic import SyntheticVideo
from tests.helpers.errors import refused
from tests.patchnerf.tiny import (
    HELD_OUT,
    SCENE,
    SaveAt,
    Watch,
    fit,
    make_data,
    make_model,
    make_trainer,
    same,
    weights,
)

TRAINED = [0, 1, 2, 4, 5, 6]


@pytest.fixture(scope="module")
def scene():
    """(T, 3, H, W) float from 0 to 1."""
    return torch.from_numpy(SyntheticVideo(**SCENE).draw()).permute(0, 3, 1, 2).float() / 255


def evaluate(folder, model, stage="validate", **options):
    options = {"embeddings": "toy:8", **options}
    (figures,) = getattr(make_trainer(folder), stage)(model, datamodule=make_data(**options), verbose=False)
    return figures


def decibels(a, b):
    return -10 * math.log10(float((a.double() - b.double()).square().mean()) + 1e-9)


class Gradients(Callback):
    """Those of the first step."""

    def __init__(self):
        self.found = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 0:
            self.found = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "sample"), [("grid", "patch"), ("grid", "frame"), ("coordinate", "patch")])
def test_loss_by_hand(tmp_path, scene, mode, sample):
    """Of the first step, sample by sample."""
    watch, data = Watch(), make_data(sample=sample, embeddings="toy:8", batch_size=3)
    model = make_model(mode, lr=1e-30, clip_weight=0.25, clip_start=0.0, loss="fusion8")
    fit(tmp_path, model, watch, data=data, max_steps=1, max_epochs=-1)
    table, errors, cosines = data.embedding_table.float(), [], []
    with torch.no_grad():
        for sample_index in watch.batches[0].indices[0].tolist():
            frame, cell = (sample_index, None) if sample == "frame" else divmod(sample_index, 8)
            row, column = divmod(cell or 0, 4)
            target, true = scene[frame], table[frame]
            if sample == "patch":
                target = target[:, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
                true = true[row, column]
            if mode == "coordinate":
                found = model.net(torch.tensor([[frame / 7, (row + 0.5) / 2, (column + 0.5) / 4]]))
                rgb, clip = found.rgb[0], found.clip[0]
            else:
                found = model.net(torch.tensor([frame / 7]))
                rgb, clip = found.rgb[0], found.clip[0]
                if sample == "patch":
                    rgb = rgb[:, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
                    clip = clip[row, column]
            errors.append(0.5 * (rgb - target).square().mean() + 0.5 * (rgb - target).abs().mean())
            cosines += F.cosine_similarity(clip.view(-1, 8), true.view(-1, 8)).tolist()
    expected = sum(errors) / 3 + 0.25 * (1 - sum(cosines) / len(cosines))
    assert watch.losses[0] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(("rule", "power"), [("constant", 0), ("sqrt", 0.5), ("linear", 1)])
def test_rates_follow_batch_and_schedule(tmp_path, rule, power):
    watch = Watch()
    model = make_model(lr_rule=rule, lr_batch=32, warmup=0.3, final=0.1)
    fit(tmp_path, model, watch, max_epochs=2)
    peak = 1e-2 * (8 / 32) ** power
    assert watch.steps == list(range(1, 13))
    assert watch.rates == pytest.approx([peak * warmup_cosine((n + 1) / 12, 0.3, 0.1) for n in range(12)])


def test_embeddings_train_the_trunk_unless_their_gradient_is_stopped(tmp_path):
    def gradients(weight, **decoder):
        seen = Gradients()
        model = make_model(clip_weight=weight, clip_start=0.0, decoder=decoder)
        fit(tmp_path, model, seen, data=make_data(embeddings="toy:8"), max_steps=1, max_epochs=-1)
        return seen.found

    def trunk(found):
        return {name: g for name, g in found.items() if ".clip." not in name}

    without, plain, stopped = gradients(0.0), gradients(1.0), gradients(1.0, clip_stop_gradient=True)
    assert same(trunk(stopped), trunk(without))
    assert not same(trunk(plain), trunk(without))
    heads = [name for name in stopped if ".clip." in name]
    assert heads
    assert all(bool(stopped[name].any()) for name in heads)


def test_embeddings_are_learnt_from_their_start_on(tmp_path, trained):
    assert trained.figures["val/train_cosine"] > 0.8
    watch, steps = Watch(), {"max_steps": 4, "max_epochs": -1}
    model = make_model(clip_weight=0.5, clip_start=0.5)
    trainer = fit(tmp_path, model, watch, data=make_data(embeddings="toy:8"), **steps)
    assert float(trainer.callback_metrics["train/clip"]) > 0
    assert watch.losses[1] < 0.2 < watch.losses[2]  # l2 alone, and half of a cosine's distance


def test_it_learns_more_than_its_neighbours_tell(trained):
    assert trained.figures["val/train_psnr_db"] > 24
    assert trained.figures["val/held_out_psnr_db"] > trained.figures["val/held_out_psnr_db_nearest"]


def test_training_starts_from_a_checkpoint(tmp_path, trained):
    """A head for embeddings may be new."""
    path = str(trained.path)
    before = load(path).net.state_dict()
    model = make_model(init_from=path, lr=1e-30, decoder={"clip_stage": 1})
    fit(tmp_path, model, max_steps=1, max_epochs=-1)
    assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())
    model = make_model(init_from=path, decoder={"clip_stage": 1})
    fit(tmp_path, model, data=make_data(embeddings="toy:4"), max_steps=1, max_epochs=-1)
    for wrong, message in ((path, "lacks"), ("nowhere.ckpt", "no such file")):
        with pytest.raises(InputError, match=f"^model.init_from: .*{message}"):
            fit(tmp_path, make_model(init_from=wrong, decoder={"width": 12}))


def test_hidden_pixels_teach_nothing_and_are_measured(tmp_path, scene):
    class Scribble(Callback):
        def __init__(self, level):
            self.level = level

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            batch.pixels.masked_fill_((batch.weight == 0).expand_as(batch.pixels), self.level)

    for sample, loss in (("patch", "fusion6"), ("frame", "l1_freq")):
        options = {"mask": "inpaint_6", "sample": sample, "batch_size": 2}
        found = []
        for level in (0, 255):
            model = make_model(loss=loss, lr=1e-3)
            fit(tmp_path, model, Scribble(level), data=make_data(**options), limit_train_batches=3)
            found.append(weights(model))
        assert same(*found)
    data = make_data(**options)
    (figures,) = make_trainer(tmp_path).validate(model, datamodule=data, verbose=False)
    hidden, rgb = data.hidden[0, 0], model.decode(torch.arange(8) / 7).rgb
    assert int(hidden.sum()) == 5 * 36
    expected = np.mean([decibels(a[:, hidden], b[:, hidden]) for a, b in zip(rgb, scene, strict=True)])
    assert figures["val/hidden_psnr_db"] == pytest.approx(expected, abs=1e-3)


def test_as_many_parameters_as_asked_for(tmp_path):
    model = make_model(target_params=5000)
    fit(tmp_path, model, max_steps=1, max_epochs=-1)
    assert 4000 < sum(p.numel() for p in model.net.parameters()) <= 5000


def test_compile_and_graph_need_a_gpu_and_say_so(tmp_path, caplog):
    found = []
    for options in ({}, {"compile": True}, {"cuda_graph": True}):
        model = make_model(**options)
        with caplog.at_level("INFO"):
            fit(tmp_path, model, max_steps=2, max_epochs=-1)
        found.append(weights(model))
    assert same(found[0], found[1])
    assert same(found[0], found[2])
    assert "model.compile: ignored" in caplog.text


# ---- training against rounding ---------------------------------------------------------------------------------------


def rounded_loss(model, scene, bits):
    """dB that rounding costs."""
    plain = psnr(model.decode(torch.arange(8) / 7).rgb, scene).mean()
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    model.net.load_state_dict(dequantise_state(quantise_state(before, bits)))
    rounded = psnr(model.decode(torch.arange(8) / 7).rgb, scene).mean()
    model.net.load_state_dict(before)
    return float(plain - rounded)


def test_rounding_costs_less_where_it_was_trained_against(tmp_path, trained, scene):
    found = []
    for bits in (None, 4):
        model = make_model(qat_bits=bits, init_from=str(trained.path), lr=5e-3, decoder={"clip_stage": 1})
        trainer = fit(tmp_path, model, max_epochs=5)
        found.append(rounded_loss(model, scene, 4))
        trainer.save_checkpoint(tmp_path / f"{bits}.ckpt")
    assert found[1] < 0.5 * found[0], found
    states = [torch.load(tmp_path / f"{bits}.ckpt", weights_only=True)["state_dict"] for bits in (None, 4)]
    assert states[0].keys() == states[1].keys()


@pytest.mark.parametrize("together", [1, 3])
def test_rounding_begins_and_goes_on_after_a_resume(tmp_path, together):
    class Rounds(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.seen.append(bool(pl_module._trained.rounding))

    data = {"steps_per_batch": together}
    rounds, whole = Rounds(), make_model(qat_bits=4, qat_start=0.5)
    fit(tmp_path, whole, rounds, SaveAt(9, tmp_path / "nine.ckpt"), data=make_data(**data), max_epochs=2)
    assert rounds.seen == [False] * (6 // together) + [True] * (6 // together)
    kept = torch.load(tmp_path / "nine.ckpt", weights_only=True)["state_dict"]
    assert kept.keys() == whole.state_dict().keys()
    resumed = make_model(qat_bits=4, qat_start=0.5)
    fit(tmp_path, resumed, data=make_data(**data), max_epochs=2, ckpt_path=tmp_path / "nine.ckpt")
    assert same(weights(resumed), weights(whole))


def test_steps_are_made_anew_once_where_rounding_begins(tmp_path, monkeypatch):
    """Batches of 4 and 2 steps in turn; rounding begins in the midst of one of 4."""
    forgotten = []
    forget = OptimizerSteps.forget
    monkeypatch.setattr(OptimizerSteps, "forget", lambda steps: (forgotten.append(watch.steps[-1]), forget(steps)))
    watch = Watch()
    model = make_model(qat_bits=4, qat_start=3 / 18)
    fit(tmp_path, model, watch, data=make_data(steps_per_batch=4), max_epochs=3)
    assert watch.steps == [4, 6, 10, 12, 16, 18]
    assert forgotten == [4]


# ---- evaluation ------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_decoded_frames(tmp_path, trained, scene):
    model = load(trained.path)
    rgb = model.decode(torch.arange(8) / 7).rgb
    figures = evaluate(tmp_path, model)
    each = np.array([decibels(a, b) for a, b in zip(rgb, scene, strict=True)])
    coarse = np.array([decibels((a * 255).round() / 255, b) for a, b in zip(rgb, scene, strict=True)])
    for prefix, frames in (("", range(8)), ("train_", TRAINED), ("held_out_", HELD_OUT)):
        part = each[list(frames)]
        assert figures[f"val/{prefix}psnr_db"] == pytest.approx(part.mean(), abs=1e-3)
        assert figures[f"val/{prefix}psnr_db_min"] == pytest.approx(part.min(), abs=1e-3)
        assert figures[f"val/{prefix}psnr_8bit_db"] == pytest.approx(coarse[list(frames)].mean(), abs=1e-3)
    assert not [name for name in figures if "unused" in name or math.isnan(figures[name])]
    # Frame 3 lies between 2 and 4; 7 is the last one, behind 6.
    guess = {"nearest": [scene[2], scene[6]], "blend": [(scene[2] + scene[4]) / 2, scene[6]]}
    neighbours = blend_neighbours(HELD_OUT, TRAINED)
    torch.testing.assert_close(blend_frames((scene * 255).byte().permute(0, 2, 3, 1), neighbours)[0], guess["blend"][0])
    for name, frames in guess.items():
        value = np.mean([decibels(a, scene[i]) for a, i in zip(frames, HELD_OUT, strict=True)])
        assert figures[f"val/held_out_psnr_db_{name}"] == pytest.approx(value, abs=1e-3)
        over = each[HELD_OUT].mean() - value
        assert figures[f"val/held_out_psnr_db_over_{name}"] == pytest.approx(over, abs=1e-3)


def test_cosines_are_those_of_embeddings(tmp_path, trained):
    model, data = load(trained.path), make_data(embeddings="toy:8")
    found, true = model.embed(torch.arange(8) / 7).numpy(), data.embedding_table.float().numpy()
    figures = evaluate(tmp_path, model)
    for kind, mean in (("cosine", 0.0), ("centred", true.reshape(-1, 8).mean(0))):
        a, b = found - mean, true - mean
        cosines = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        for name, frames in (("train", TRAINED), ("held_out", HELD_OUT)):
            assert figures[f"val/{name}_{kind}"] == pytest.approx(cosines[frames].mean(), abs=2e-3), (kind, name)


def test_a_test_repeats_the_validation(tmp_path, trained):
    model = load(trained.path)
    tested = evaluate(tmp_path, model, "test")
    for name, value in trained.figures.items():
        if name.startswith("val/"):
            assert tested[name.replace("val/", "test/")] == pytest.approx(value, abs=1e-4), name
    held = evaluate(tmp_path, model, eval_frames="held_out", embeddings=None)
    assert held["val/psnr_db"] == pytest.approx(trained.figures["val/held_out_psnr_db"], abs=1e-4)
    assert "val/train_psnr_db" not in held
    assert "val/train_cosine" not in held


@pytest.mark.parametrize("together", [1, 3])
def test_the_average_is_what_is_evaluated_and_saved(tmp_path, together):
    data, ema = make_data(steps_per_batch=together), EMA(decay=0.9, warmup=False)
    trainer = fit(tmp_path, make_model(), ema, data=data, validate=True, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    own = float(trainer.callback_metrics["val/psnr_db"])
    kept = torch.load(tmp_path / "a.ckpt", weights_only=True)
    average = load(tmp_path / "a.ckpt")
    live = load(tmp_path / "a.ckpt")
    live.load_state_dict(kept["current_model_state"])
    assert evaluate(tmp_path, average, embeddings=None)["val/psnr_db"] == pytest.approx(own, abs=1e-4)
    assert abs(evaluate(tmp_path, live, embeddings=None)["val/psnr_db"] - own) > 0.01


# ---- frames that patches do not tile, and prediction -----------------------------------------------------------------


@pytest.mark.parametrize("mode", ["grid", "coordinate"])
def test_padding_is_cut_off_again(tmp_path, mode):
    """31 x 61 pixels of patches of 16: a canvas of 32 x 64."""
    drawn = {**SCENE, "height": 31, "width": 61}
    data = {"synthetic": drawn, "grid": None, "patch_size": [16, 16], "crop": None}
    model = make_model(mode)
    fit(tmp_path, model, data=make_data(**data), max_steps=3, max_epochs=-1)
    geometry = model.geometry
    assert (geometry.canvas, geometry.crop) == ((32, 64), (31, 61))
    figures = evaluate(tmp_path, model, embeddings=None, **data)
    canvas = model.decode(torch.arange(8) / 7).rgb
    top, left = geometry.pad
    rgb = canvas[..., top : top + 31, left : left + 61]
    target = torch.from_numpy(SyntheticVideo(**drawn).draw()).permute(0, 3, 1, 2) / 255
    expected = np.mean([decibels(a, b) for a, b in zip(rgb, target, strict=True)])
    assert figures["val/psnr_db"] == pytest.approx(expected, abs=1e-3)
    assert "val/seam_ratio" not in figures
    found = predict(tmp_path, model, **data)
    assert found[0].shape == (8, 31, 61, 3)
    torch.testing.assert_close(found[0], (rgb * 255).round().byte().permute(0, 2, 3, 1), atol=1, rtol=0)


def predict(folder, model, **options):
    """All pixels, and the numbers of their frames."""
    found = make_trainer(folder).predict(model, datamodule=make_data(**options))
    assert all(batch["pixels"].dtype == torch.uint8 for batch in found)
    return torch.cat([batch["pixels"] for batch in found]), [n for batch in found for n in batch["numbers"]]


def test_predicted_frames(tmp_path, trained):
    """From the checkpoint alone, no pixel of the video is read."""
    model = load(trained.path)
    frames, numbers = predict(tmp_path, model, synthetic=None, video="no such file")
    assert numbers == list(range(8))
    expected = (model.decode(torch.arange(8) / 7).rgb * 255).round().byte().permute(0, 2, 3, 1)
    assert torch.equal(frames, expected)
    torch.testing.assert_close(model(torch.ones(1)), model.decode(torch.ones(1)).rgb)
    part, numbers = predict(tmp_path, model, region=[5, 9, 20, 17], predict_range=[2, 4], predict_step=0.5)
    assert numbers == [2.0, 2.5, 3.0, 3.5, 4.0]
    torch.testing.assert_close(part[::2], frames[2:5, 5:25, 9:26], atol=1, rtol=0)
    between = (model.decode(torch.tensor([2.5 / 7])).rgb * 255).round().byte().permute(0, 2, 3, 1)
    torch.testing.assert_close(part[1:2], between[:, 5:25, 9:26], atol=1, rtol=0)
    cells = model.decode_region(torch.tensor([3 / 7]), [17, 20, 12, 25])
    whole = model.decode(torch.tensor([3 / 7])).rgb
    torch.testing.assert_close(cells, whole[:, :, 17:29, 20:45], atol=1e-5, rtol=0)


def test_around_a_crop_it_is_black(tmp_path):
    model = make_model()
    fit(tmp_path, model, data=make_data(crop=[16, 32]), max_steps=1, max_epochs=-1, limit_train_batches=1)
    frames, _ = predict(tmp_path, model, crop=[16, 32])
    assert frames.shape == (8, 32, 64, 3)
    inside = frames[:, 8:24, 16:48].clone()
    assert inside.any()
    frames[:, 8:24, 16:48] = 0
    assert not frames.any()


def test_pictures_name_frame_and_role(trained, tmp_path):
    model, seen = load(trained.path), []

    class Pictures(Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            scores = pl_module.sample_scores(batch, outputs)
            assert scores.argmax() == outputs["psnr_db"].argmin()
            seen.append(pl_module.plot_predictions(batch, outputs))

    make_trainer(tmp_path, Pictures()).validate(model, datamodule=make_data(embeddings="toy:8"), verbose=False)
    assert len(seen) == 2
    assert all(found for found in seen)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"lr": 0.0}, "model.lr:"),
        ({"lr": -1.0}, "model.lr:"),
        ({"lr": math.nan}, "model.lr:"),
        ({"lr_batch": 0}, "model.lr_batch:"),
        ({"warmup": 1.5}, "model.warmup:"),
        ({"final": -0.1}, "model.final:"),
        ({"gradient_clip": 0.0}, "model.gradient_clip:"),
        ({"qat_bits": 1}, "model.qat_bits:"),
        ({"qat_bits": 17}, "model.qat_bits:"),
        ({"qat_start": 2.0}, "model.qat_start:"),
        ({"qat_noise": 0.0}, "model.qat_noise:"),
        ({"lr_rule": "cubic"}, "model.lr_rule:"),
        ({"loss": "l3"}, "model.loss"),
        ({"clip_start": 1.1}, "model.clip_start"),
        ({"optimizer_options": {"beta": 1}}, "model.optimizer_options:"),
        ({"optimizer_options": {"lr": 1}}, "model.optimizer_options:"),
    ],
)
def test_refused_options(options, field):
    refused(lambda: LitPatchNeRF(**options), field)


@pytest.mark.parametrize(
    ("model", "data", "trainer", "field"),
    [
        ({}, {"steps_per_batch": 2}, {"gradient_clip_val": 1.0}, "trainer.gradient_clip_val: with data.steps"),
        ({"cuda_graph": True}, {}, {"gradient_clip_val": 1.0}, "trainer.gradient_clip_val: with model.cuda_graph"),
        ({}, {"steps_per_batch": 2}, {"accumulate_grad_batches": 2}, "trainer.accumulate_grad_batches"),
        ({"mode": "coordinate"}, {"sample": "frame", "batch_size": 2}, {}, "data.sample"),
        ({"mode": "pixel"}, {}, {}, "model.mode"),
        ({"decoder": {"fc_dim": 8}}, {}, {}, "model.decoder.fc_dim"),
        ({"loss": "fusion10"}, {}, {}, "model.loss"),
        ({"optimizer": "sgd"}, {}, {}, "model.optimizer"),
        ({}, {}, {"max_epochs": -1}, "trainer.max_epochs"),
        ({"optimizer_options": {"betas": [0.9]}}, {}, {}, "model.optimizer_options.betas"),
    ],
)
def test_refused_fits(tmp_path, model, data, trainer, field):
    refused(lambda: fit(tmp_path, LitPatchNeRF(**model), data=make_data(**data), **trainer), field)


@pytest.mark.parametrize(("name", "value"), [("precision", "16-mixed"), ("world_size", 2)])
def test_what_needs_another_machine_is_refused(tmp_path, monkeypatch, name, value):
    """A CPU takes bfloat16 in the place of float16, and a second process is not needed for its refusal."""
    data, fields = make_data(steps_per_batch=2), {"precision": "trainer.precision", "world_size": "trainer.devices"}
    data.setup("fit")
    model = make_model()
    model.trainer = make_trainer(tmp_path)
    monkeypatch.setattr(Trainer, name, value)
    refused(lambda: model._choose_optimization(data), fields[name], str(value))


def test_another_video_is_refused(tmp_path, trained):
    model = load(trained.path)
    refused(lambda: evaluate(tmp_path, model, synthetic={**SCENE, "frames": 9}), "data.video", "frames", "8", "9")
    refused(lambda: evaluate(tmp_path, model, grid=[2, 2]), "data.video", "geometry")
    refused(lambda: evaluate(tmp_path, model, embeddings="toy:4"), "data.embeddings", "4", "8")
    for options, field in (
        ({"synthetic": {**SCENE, "frames": 9}}, "data.video"),
        ({"grid": [2, 2]}, "data.video"),
        ({"embeddings": "toy:4"}, "data.embeddings"),
        ({"embeddings": None}, "data.embeddings"),
    ):
        data = make_data(**{"embeddings": "toy:8", **options})
        refused(lambda: fit(tmp_path, make_model(), data=data, ckpt_path=trained.path), field, "checkpoint")  # noqa: B023


def test_embeddings_of_a_network_without_a_head_are_refused(tmp_path):
    model = make_model()
    fit(tmp_path, model, max_steps=1, max_epochs=-1)
    refused(lambda: evaluate(tmp_path, model), "data.embeddings")


def test_opening_a_checkpoint(tmp_path, trained):
    model = load(trained.path)
    assert not model.training
    assert (model.hparams["frames"], model.hparams["fps"], model.hparams["clip_dim"]) == (8, 12.0, 8)
    refused(lambda: load(tmp_path / "none.ckpt"), "none.ckpt", "no such file")
    (tmp_path / "text.ckpt").write_text("text")
    torch.save({"state_dict": {}}, tmp_path / "empty.ckpt")
    for name in ("text.ckpt", "empty.ckpt"):
        with pytest.raises(Exception, match="not a checkpoint of LitPatchNeRF") as caught:
            load(tmp_path / name)
        assert "\n" not in str(caught.value)
    refused(lambda: LitPatchNeRF().geometry, "model.geometry")
