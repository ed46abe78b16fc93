import io
import sys
import warnings
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lit_callbacks import predictions
from lit_callbacks.ema import EMA
from lit_callbacks.predictions import PredictionLogger, named_figures, png, select_sample, to_picture
from lit_callbacks.validation import ValidationSchedule
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

SCORES = [0.5, 3.0, float("nan"), 2.0, 9.0, 2.0, float("inf"), 1.0]


class Plain(LightningModule):
    """Sample i is the number i; its score is `SCORES[i]`, plus the epoch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.drawn = []  # (finished epochs, sample)
        self.copied = 0

    def training_step(self, batch, batch_idx):
        self.log("t", 0.0)
        return self.weight.square()

    def validation_step(self, batch, batch_idx):
        return {"twice": 2 * batch[0], "weight": self.weight.detach().clone(), "name": ["x"] * len(batch[0])}

    def test_step(self, batch, batch_idx):
        return self.validation_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Drawing(Plain):
    def plot_predictions(self, batch, outputs):
        (image,) = batch
        assert image.shape == (1, 1)
        assert outputs["twice"].shape == (1, 1)
        assert outputs["twice"].item() == 2 * image.item()
        assert not torch.is_grad_enabled()
        assert not self.training
        self.drawn.append((self.trainer.current_epoch + 1, int(image)))
        return torch.full((2, 3, 3), int(image), dtype=torch.uint8)


class Judging(Drawing):
    def sample_scores(self, batch, outputs):
        return torch.tensor([SCORES[int(i)] for i in batch[0]])


def loader(batch_size=3):
    return DataLoader(TensorDataset(torch.arange(8.0)[:, None]), batch_size=batch_size)


def trainer_for(tmp_path, *given, logger=False, epochs=1, **options):
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        num_sanity_val_steps=1,
        callbacks=list(given),
        **options,
    )


def fit(tmp_path, *given, model=None, batch_size=3, **options):
    trainer = trainer_for(tmp_path, *given, **options)
    model = Judging() if model is None else model
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
        trainer.fit(model, loader(4), loader(batch_size))
    return trainer, model


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------ which samples


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_first_and_worst_samples_whatever_the_batches(tmp_path, batch_size):
    callback = PredictionLogger(1, num_first=2, worst_k=4)
    fit(tmp_path, callback, batch_size=batch_size)
    files = ["first-0", "worst-0-score=inf", "first-1", "worst-1-score=9", "worst-2-score=3", "worst-3-score=2"]
    assert [path.name for path in callback.artifacts] == [f"epoch=001-{file}.png" for file in files]
    assert names(tmp_path / "predictions") == sorted(path.name for path in callback.artifacts)
    drawn = [int(np.asarray(Image.open(path))[0, 0, 0]) for path in callback.artifacts]
    ranked = sorted((i for i in range(8) if SCORES[i] == SCORES[i]), key=lambda i: (-SCORES[i], i))
    assert drawn == [0, ranked[0], 1, *ranked[1:4]]  # of two with a score of 2, the first seen


def test_without_scores_the_first_alone(tmp_path):
    callback = PredictionLogger(1, num_first=5)
    _, model = fit(tmp_path, callback, model=Drawing())
    assert [sample for _, sample in model.drawn] == [0, 1, 2, 3, 4]
    assert len(callback.artifacts) == 5


def test_only_kept_samples_are_copied(tmp_path):
    class Counting(PredictionLogger):
        def _one(self, score, index, *args):
            copied.append(index)
            return super()._one(score, index, *args)

    copied = []
    fit(tmp_path, Counting(4, num_first=1, worst_k=1), epochs=4, batch_size=8)
    assert copied == [0, 6]  # and none before epoch 4


def test_nothing_is_drawn_with_both_numbers_zero(tmp_path):
    callback = PredictionLogger(1, num_first=0, worst_k=0)
    fit(tmp_path, callback, model=Plain())
    assert callback.artifacts == []


# --------------------------------------------------------------------------------------- when


def test_scheduled_epochs_and_the_last(tmp_path):
    _, model = fit(tmp_path, PredictionLogger(3, num_first=1, worst_k=0), epochs=7)
    assert [epoch for epoch, _ in model.drawn] == [3, 6, 7]


def test_an_epoch_without_validation_is_made_up_for(tmp_path):
    callback = PredictionLogger(3, num_first=1, worst_k=0)
    _, model = fit(tmp_path, callback, epochs=8, check_val_every_n_epoch=2)
    assert [epoch for epoch, _ in model.drawn] == [4, 6, 8]


def test_several_validations_within_an_epoch(tmp_path):
    callback = PredictionLogger(2, num_first=1, worst_k=0)
    _, model = fit(tmp_path, callback, epochs=5, val_check_interval=0.5)
    assert [epoch for epoch, _ in model.drawn] == [2, 4, 5]


@pytest.mark.parametrize("cheap", ["skip", "limit"])
def test_drawings_wait_for_a_full_validation(tmp_path, cheap):
    callback = PredictionLogger(3, num_first=0, worst_k=1)
    schedule = ValidationSchedule(4, dense_from=1.0, cheap=cheap, cheap_batches=1)

    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch + 1 == 10

    _, model = fit(tmp_path, callback, schedule, Stop(), epochs=20)
    assert model.drawn == [(4, 6), (8, 6), (10, 6)]  # 10 is the late validation that the schedule adds


def test_validate_and_test_draw(tmp_path):
    callback = PredictionLogger(99, num_first=1, worst_k=1)
    trainer, model = trainer_for(tmp_path, callback), Judging()
    trainer.validate(model, loader(), verbose=False)
    assert [path.name for path in callback.artifacts] == ["validate-first-0.png", "validate-worst-0-score=inf.png"]
    trainer.test(model, loader(), verbose=False)
    assert [path.name for path in callback.artifacts] == ["test-first-0.png", "test-worst-0-score=inf.png"]
    callback.setup(trainer, Plain(), "predict")  # asks for no method


def test_a_resumed_run_keeps_its_epochs(tmp_path):
    trainer, _ = fit(tmp_path, PredictionLogger(3, num_first=1, worst_k=0), epochs=4)
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    second = trainer_for(tmp_path, PredictionLogger(3, num_first=1, worst_k=0), epochs=7)
    model = Judging()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        second.fit(model, loader(4), loader(), ckpt_path=tmp_path / "c.ckpt")
    assert [epoch for epoch, _ in model.drawn] == [6, 7]


@pytest.mark.parametrize("ema_first", [True, False])
def test_outputs_and_module_have_the_average(tmp_path, ema_first):
    seen = []

    class Look(Judging):
        def plot_predictions(self, batch, outputs):
            seen.append((outputs["weight"].item(), self.weight.item()))

    ema, callback = EMA(decay=0.9, warmup=False), PredictionLogger(1, num_first=1, worst_k=0)
    _, model = fit(tmp_path, *([ema, callback] if ema_first else [callback, ema]), model=Look(), epochs=2)
    assert all(output == weight for output, weight in seen)
    assert seen[-1][0] == model.weight.item()  # which holds the average after the fit
    assert callback.artifacts == []  # None draws nothing


# -------------------------------------------------------------------------------------- where


def test_tensorboard_gets_the_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Several(Judging):
        def plot_predictions(self, batch, outputs):
            picture = np.zeros((4, 5, 3), np.float32)
            picture[..., 1] = float(batch[0]) / 255
            return {"green": picture, "both": [picture, picture]}

    logger = TensorBoardLogger(tmp_path, "tb")
    callback = PredictionLogger(2, num_first=1, worst_k=1)
    fit(tmp_path, callback, logger=logger, model=Several(), epochs=4)
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()
    labels = ["green", "both-0", "both-1"]
    assert set(events.Tags()["images"]) == {f"predictions/{k}-0/{x}" for k in ("first", "worst") for x in labels}
    images = events.Images("predictions/worst-0/green")
    assert [image.step for image in images] == [3, 7]  # two optimizer steps an epoch: the step of the epoch's metrics
    decoded = np.asarray(Image.open(io.BytesIO(images[0].encoded_image_string)).convert("RGB"))
    assert decoded.shape == (4, 5, 3)
    assert (decoded == [0, 6, 0]).all()
    assert callback.artifacts[0].name == "epoch=004-first-0-green.png"
    assert callback.artifacts[0].parent == Path(logger.log_dir, "predictions")


def test_loggers_with_log_image_get_the_pictures(tmp_path):
    class Recording(CSVLogger):
        def __init__(self, *args):
            super().__init__(*args)
            self.images = []

        def log_image(self, key, images, step=None):
            self.images.append((key, images[0].shape, step))

    logger = Recording(tmp_path)
    callback = PredictionLogger(1, num_first=1, worst_k=0, dirpath=str(tmp_path / "here"))
    fit(tmp_path, callback, logger=logger)
    assert logger.images == [("predictions/first-0", (2, 3, 3), 1)]
    assert names(tmp_path / "here") == ["epoch=001-first-0.png"]
    logger.images.clear()
    fit(tmp_path, PredictionLogger(1, to_logger=False, to_disk=False), logger=logger)
    assert logger.images == []


def test_mlflow_gets_the_pictures(tmp_path):
    class Client:
        def log_image(self, run_id, image, artifact_file):
            images.append((run_id, image.shape, artifact_file))

    class Fake(CSVLogger):
        run_id, client = "run", Client()
        experiment = property(lambda self: self.client)

        def save(self):
            pass

        def log_metrics(self, metrics, step=None):
            pass

        log_hyperparams = log_metrics

    images = []
    fit(tmp_path, PredictionLogger(1, num_first=1, worst_k=0), logger=Fake(tmp_path))
    assert images == [("run", (2, 3, 3), "predictions/first-0/1.png")]


def test_other_processes_draw_nothing(tmp_path, monkeypatch):
    callback, model = PredictionLogger(1), Judging()
    trainer = trainer_for(tmp_path, callback)
    monkeypatch.setattr(type(trainer.strategy), "is_global_zero", False, raising=False)
    trainer.validate(model, loader(), verbose=False)
    assert model.drawn == []
    assert not (tmp_path / "predictions").exists()


def test_fast_dev_run_draws_without_files(tmp_path):
    callback = PredictionLogger(1)
    _, model = fit(tmp_path, callback, fast_dev_run=True)
    assert model.drawn
    assert callback.artifacts == []
    assert not (tmp_path / "predictions").exists()


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    def full(path, data):
        io.FileIO(path, "w").write(data[:2])
        raise OSError("no space left")

    monkeypatch.setattr(predictions.Path, "write_bytes", full)
    with pytest.warns(UserWarning, match="no more pictures, .*OSError: no space left"):
        fit(tmp_path, PredictionLogger(1))
    assert names(tmp_path / "predictions") == []


# -------------------------------------------------------------------------- limits and failures


def test_the_cap_in_time(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(predictions, "perf_counter", lambda: clock.now)

    class Slow(Judging):
        def plot_predictions(self, batch, outputs):
            clock.now += 4.0
            return super().plot_predictions(batch, outputs)

    callback = PredictionLogger(1, num_first=4, worst_k=4, max_seconds=10.0)
    line = "5 of 8 samples were left out, since drawing took longer than max_seconds, 10."
    with pytest.warns(UserWarning, match=line) as caught:
        _, model = fit(tmp_path, callback, model=Slow(), epochs=2)
    assert [sample for _, sample in model.drawn] == [0, 6, 1] * 2  # some of both kinds
    assert len(callback.artifacts) == 3
    assert sum("left out" in str(w.message) for w in caught) == 1


@pytest.mark.parametrize("method", ["plot_predictions", "sample_scores"])
def test_a_failing_hook_ends_the_pictures_and_not_the_training(tmp_path, method):
    calls = []

    class Broken(Judging):
        pass

    def fail(self, batch, outputs):
        calls.append(1)
        raise RuntimeError("two\nlines")

    setattr(Broken, method, fail)
    with pytest.warns(UserWarning, match=f"no more pictures, {method} failed: RuntimeError: two lines") as caught:
        trainer, _ = fit(tmp_path, PredictionLogger(1), model=Broken(), epochs=3)
    assert trainer.current_epoch == 3
    assert len(calls) == 1
    assert sum("no more pictures" in str(w.message) for w in caught) == 1


@pytest.mark.parametrize(
    ("scores", "got"), [(torch.zeros(3, 1), r"\(3, 1\)"), ([1.0], "list"), (torch.zeros(()), r"\(\)")]
)
def test_scores_of_another_shape_are_named(tmp_path, scores, got):
    class Wrong(Judging):
        def sample_scores(self, batch, outputs):
            return scores

    with pytest.warns(UserWarning, match=rf"sample_scores failed: ValueError: expected .* \(B,\), got {got}"):
        fit(tmp_path, PredictionLogger(1), model=Wrong())


def test_a_module_without_the_method_is_told_its_signature(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"Plain expected .* plot_predictions\(self, batch, outputs\)"):
        fit(tmp_path, PredictionLogger(), model=Plain())


@pytest.mark.parametrize(
    "wrong", [{"every_n_epochs": 0}, {"num_first": -1}, {"worst_k": -1}, {"dpi": 0}, {"max_seconds": 0.0}]
)
def test_bad_arguments_name_themselves(wrong):
    with pytest.raises(MisconfigurationException, match=f"PredictionLogger: {next(iter(wrong))} expected"):
        PredictionLogger(**wrong)


def test_arguments_come_from_yaml():
    parser = ArgumentParser()
    parser.add_class_arguments(PredictionLogger, "p")
    config = parser.parse_args(["--p.worst_k=2", "--p.dirpath=there"])
    assert parser.instantiate_classes(config).p.worst_k == 2


# ------------------------------------------------------------------------------ samples of batches

Pair = namedtuple("Pair", "image name")


@dataclass(frozen=True)
class Item:
    image: torch.Tensor
    scale: float


def test_samples_of_all_kinds_of_batches():
    image = torch.arange(4.0).reshape(4, 1)
    boxes = [torch.zeros(n, 4) for n in (0, 5, 2, 3)]
    targets = [{"boxes": b, "id": torch.tensor(i)} for i, b in enumerate(boxes)]
    batch = {
        "image": image,
        "list": [image, image + 10],
        "tuple": (image, "all"),
        "named": Pair(image, list("abcd")),
        "item": Item(image, 0.5),
        "boxes": boxes,
        "targets": targets,
        "pairs": [("a", 1), ("b", 2), ("c", 3), ("d", 4)],
        "numpy": np.arange(8).reshape(4, 2),
        "other": torch.zeros(7),
        "scalar": torch.tensor(1.0),
        "none": None,
    }
    sample = select_sample(batch, 2, 4)
    assert sample["image"].tolist() == sample["named"].image.tolist() == sample["item"].image.tolist() == [[2.0]]
    assert [x.tolist() for x in sample["list"]] == [[[2.0]], [[12.0]]]
    assert sample["tuple"][1] == "all"
    assert sample["named"].name == ["c"]
    assert sample["item"].scale == 0.5
    assert batch["item"].image is image
    assert [len(b) for b in sample["boxes"]] == [2]
    assert sample["targets"][0]["id"] == 2
    assert sample["pairs"] == [("c", 3)]
    assert sample["numpy"].tolist() == [[4, 5]]
    assert sample["other"].shape == (7,)
    assert sample["none"] is None


def test_a_batch_of_two_parts_and_two_samples():
    image, label = torch.zeros(2, 3), torch.tensor([5, 6])
    assert select_sample([image, label], 1, 2)[1].tolist() == [6]
    images, found = (torch.zeros(3, 4, 4), torch.zeros(3, 5, 5)), ({"n": 1}, {"n": 2})
    sample = select_sample((images, found), 1, 2)
    assert sample[0][0].shape == (3, 5, 5)
    assert sample[1] == ({"n": 2},)


def test_samples_do_not_keep_the_batch_alive():
    image = torch.zeros(100, 10, requires_grad=True)
    sample = select_sample(image, 3, 100)
    assert sample.untyped_storage().nbytes() == 40
    assert not sample.requires_grad


# ------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize(
    ("shape", "order"), [((3, 4, 5), (1, 2, 0)), ((4, 5, 3), (0, 1, 2)), ((1, 4, 5), (1, 2, 0)), ((4, 5, 1), (0, 1, 2))]
)
def test_pictures_of_arrays(kind, shape, order):
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = np.broadcast_to(values.transpose(order), (4, 5, 3))
    for source in (values, values.astype(np.float32) / 255, values.astype(np.float64) / 255):
        assert (to_picture(kind(source), 100).numpy() == expected).all()


def test_pictures_of_masks_and_odd_values():
    assert to_picture(torch.tensor([[True, False]]), 100).tolist() == [[[255] * 3, [0] * 3]]
    odd = torch.tensor([[-1.0, 2.0, float("nan")]])
    assert to_picture(odd, 100)[0, :, 0].tolist() == [0, 255, 0]


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(2, 4, 5), torch.zeros(1, 3, 4, 5), torch.zeros(4, 5, dtype=torch.long), "a.png", torch.zeros(0, 4)],
)
def test_other_things_are_no_pictures(wrong):
    with pytest.raises(ValueError, match="expected"):
        to_picture(wrong, 100)


def test_png_files_are_read_by_others():
    picture = torch.randint(0, 256, (7, 5, 3), dtype=torch.uint8)
    assert (np.asarray(Image.open(io.BytesIO(png(picture)))) == picture.numpy()).all()


def test_matplotlib_figures_are_drawn_and_closed():
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    pyplot.switch_backend("agg")
    for make in (pyplot.figure, Figure):
        figure = make(figsize=(2, 1), facecolor=(1.0, 0.0, 0.0))
        figure.add_axes((0.5, 0.0, 0.5, 1.0)).set_facecolor("blue")
        picture = to_picture(figure, dpi=50)
        assert picture.shape == (50, 100, 3)
        assert picture[5, 5].tolist() == [255, 0, 0]
        assert picture[25, 75].tolist() == [0, 0, 255]
    assert pyplot.get_fignums() == []


def test_arrays_need_no_matplotlib(monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.pyplot", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    assert to_picture(torch.zeros(3, 2, 2), 100).shape == (2, 2, 3)


def test_labels_of_figures():
    assert list(named_figures(None)) == []
    assert list(named_figures("f")) == [("", "f")]
    assert list(named_figures(["f", "g"])) == [("0", "f"), ("1", "g")]
    assert list(named_figures({"a": "f", "b": ["g", "h"]})) == [("a", "f"), ("b-0", "g"), ("b-1", "h")]
