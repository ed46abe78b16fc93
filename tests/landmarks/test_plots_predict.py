"""What runs leave behind: overlays with marks at the right pixels, the worst images, a CSV of predictions."""

import csv
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lit_landmarks.__main__ import main
from lit_landmarks.data import LandmarkData
from lit_landmarks.module import LitLandmarks
from lit_landmarks.plots import GREEN, RED, YELLOW, LandmarkPlots, landmark_bars, overlay, save_rgb
from lit_landmarks.predict import HEADER, PredictionWriter
from tests.landmarks.layouts import write_csv, write_image
from tests.landmarks.test_data import data_set

CPU = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
}
NET = {"backbone": "test_resnet", "pretrained": False}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIT_CACHE", str(tmp_path / "cache"))


def synthetic(**kwargs):
    spec = {"synthetic_train": 6, "synthetic_test": 5, "image_size": 64, "batch_size": 2, "holdout": 0.4}
    return LandmarkData(format="synthetic", **{**spec, **kwargs})


def module(**kwargs):
    torch.manual_seed(0)
    return LitLandmarks(**{**NET, "num_landmarks": 8, "image_size": [64, 64], "sigma": 6.0, **kwargs})


def marks(picture, color):
    """(x, y) centre of all pixels of one colour."""
    rows, columns = np.nonzero((np.abs(picture.astype(int) - color) < 30).all(-1))
    assert len(rows), f"nothing of colour {color}"
    return columns.mean(), rows.mean()


def at(point, zoom):
    return (np.asarray(point) + 0.5) * zoom - 0.5


# ---- overlay --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("least_side", [100, 400])
def test_marks_lie_at_the_landmarks(channels, least_side):
    image = np.full((channels, 100, 150), 40, np.uint8)
    points, target = np.array([[40.25, 30.5], [90.0, 20.0]]), np.array([[100.0, 80.75], [np.nan, np.nan]])
    zoom = least_side / 100
    picture = overlay(image, points, target, least_side=least_side)
    assert picture.shape == (100 * zoom, 150 * zoom, 3)
    assert picture.dtype == np.uint8
    np.testing.assert_allclose(marks(picture, RED), at(points[0], zoom), atol=0.6)
    half = picture.copy()
    half[: int(50 * zoom)] = 0  # the landmark without a target is green as well, and lies above
    np.testing.assert_allclose(marks(half, GREEN), at(target[0], zoom), atol=0.6)
    half = picture.copy()
    half[int(50 * zoom) :], half[:, : int(70 * zoom)] = 0, 0
    np.testing.assert_allclose(marks(half, GREEN), at(points[1], zoom), atol=0.6)
    np.testing.assert_allclose(marks(picture, YELLOW), at((points[0] + target[0]) / 2, zoom), atol=3 * zoom)
    assert (picture[-1, 0] == 40).all()
    assert (image == 40).all()  # the caller's array is not drawn on


def test_without_a_target_marks_are_green_and_missing_ones_left_out():
    picture = overlay(np.zeros((1, 700, 700), np.uint8), np.array([[200.0, 300.0], [np.nan, 3.0]]))
    np.testing.assert_allclose(marks(picture, GREEN), (200, 300), atol=0.6)
    assert not (np.abs(picture.astype(int) - RED) < 30).all(-1).any()


def test_landmarks_outside_the_image_do_no_harm():
    picture = overlay(np.zeros((1, 64, 64), np.uint8), np.array([[-500.0, 9000.0]]), np.array([[70.0, 70.0]]), ["far"])
    assert picture.shape == (640, 640, 3)


def test_names_and_caption_are_written():
    image, points = np.zeros((1, 640, 640), np.uint8), np.array([[300.0, 300.0]])
    bare = overlay(image, points)
    named, captioned = overlay(image, points, names=["sella"]), overlay(image, points, caption="a.png")
    changed = np.argwhere((named != bare).any(-1))
    assert changed.min() > 250
    assert changed.max() < 400
    changed = np.argwhere((captioned != bare).any(-1))
    assert changed.max(0)[0] < 30


def test_an_image_whose_memory_lies_pixel_by_pixel():
    """As cv2 reads it, transposed: drawing must neither fail nor reach the caller's array."""
    image = np.full((700, 700, 3), 40, np.uint8)
    picture = overlay(image.transpose(2, 0, 1), np.array([[200.0, 300.0]]))
    np.testing.assert_allclose(marks(picture, GREEN), (200, 300), atol=0.6)
    assert (image == 40).all()


def test_saved_pictures_keep_their_colours(tmp_path):
    image = np.zeros((8, 9, 3), np.uint8)
    image[..., 0] = 200
    save_rgb(tmp_path / "deep" / "down" / "a.png", image)
    assert (cv2.imread(str(tmp_path / "deep" / "down" / "a.png"))[0, 0] == (0, 0, 200)).all()


def test_bars_show_the_means_hardest_on_top():
    figure = landmark_bars(np.array([1.0, 3.0, np.nan, 2.0]), ["a", "b", "c", "d"], "mm")
    (axes,) = figure.axes
    assert [t.get_text() for t in axes.get_yticklabels()] == ["c", "a", "d", "b"]
    assert [b.get_width() for b in axes.patches] == [0.0, 1.0, 2.0, 3.0]
    assert "mm" in axes.get_xlabel()
    assert axes.lines[0].get_xdata()[0] == 2.0


# ---- the worst images -----------------------------------------------------------------------------------------------


class Errors(LandmarkPlots):
    """Also keeps what it was told."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.told, self.drawn = {}, []

    def _collect(self, outputs, batch):
        for position, row in zip(batch.position.tolist(), outputs["error_mm"], strict=True):
            self.told[position] = float(row.nanmean())
        super()._collect(outputs, batch)

    def _draw(self, trainer, pl_module, stage):
        self.drawn += [(s.position, s.error) for s in sorted(self._heap, reverse=True)]
        super()._draw(trainer, pl_module, stage)


@pytest.mark.parametrize("worst", [1, 3, 9])
def test_the_worst_images_are_the_worst(tmp_path, worst, capsys):
    plots = Errors(worst=worst)
    trainer = Trainer(**CPU, logger=False, default_root_dir=tmp_path / "out", callbacks=[plots])
    data = synthetic()
    trainer.test(module(), datamodule=data, verbose=False)
    assert len(plots.told) == 5
    expected = sorted(plots.told.items(), key=lambda item: -item[1])[:worst]
    assert [p for p, _ in plots.drawn] == [p for p, _ in expected]
    np.testing.assert_allclose([e for _, e in plots.drawn], [e for _, e in expected])
    count = min(worst, 5)
    files = [tmp_path / "out" / "overlays" / f"test_worst_{i + 1}.png" for i in range(count)]
    assert plots.artifacts == [*files, tmp_path / "out" / "overlays" / "test_landmarks.png"]
    assert all(cv2.imread(str(p)) is not None for p in plots.artifacts)
    assert str(files[0]) in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:data.pixel_size is unknown")
def test_the_caption_names_file_error_and_unit(tmp_path, monkeypatch):
    """Errors are in mm where pixel sizes are known, in pixels where not; at the first drawing as at any other."""
    captions, units = [], []
    monkeypatch.setattr(
        "lit_landmarks.plots.overlay",
        lambda *args, **_: captions.append(args[4] if len(args) > 4 else "") or np.zeros((8, 8, 3), np.uint8),
    )
    monkeypatch.setattr(
        "lit_landmarks.plots.landmark_bars",
        lambda mean, names, unit: units.append(unit) or landmark_bars(mean, names, unit),
    )
    for pixel_size, unit in ((0.1, "mm"), (None, "px")):
        captions.clear(), units.clear()
        spec = {**data_set(tmp_path / f"d{unit}", pixel_size=pixel_size), "test_split": "train"}
        plots = Errors(worst=1)
        trainer = Trainer(**CPU, logger=False, default_root_dir=tmp_path / "out", callbacks=[plots])
        trainer.test(module(num_landmarks=2), datamodule=LandmarkData(**spec), verbose=False)
        (position, error), data = plots.drawn[0], trainer.datamodule
        assert captions == [f"{data.names('test')[position]}  mean error {error:.2f} {unit}"]
        assert units == [unit]


def test_images_of_unknown_scale_do_not_mix_pixels_with_millimetres(tmp_path):
    """Ten pixels are no ten millimetres: beside known ones, an image of unknown scale has no place in the ranking."""
    rows = [(f"{i}.png", 0.05 if i % 2 else "", 3, 4 + i, 9, 9) for i in range(6)]
    root = write_csv(tmp_path / "d", rows=[(n, *rest) for n, *rest in rows])
    data = LandmarkData(root=str(root), format="csv", image_size=64, test_split="train")
    plots = Errors(worst=3)
    trainer = Trainer(**CPU, logger=False, default_root_dir=tmp_path / "out", callbacks=[plots])
    trainer.test(module(num_landmarks=2), datamodule=data, verbose=False)
    assert {data.names("test")[position] for position, _ in plots.drawn} == {"1", "3", "5"}


def test_zero_images_switch_the_pictures_off(tmp_path):
    plots = LandmarkPlots(worst=0)
    Trainer(**CPU, logger=False, default_root_dir=tmp_path, callbacks=[plots]).test(
        module(), datamodule=synthetic(), verbose=False
    )
    assert plots.artifacts == []
    assert not (tmp_path / "overlays").exists()


@pytest.mark.parametrize(("every", "epochs", "expected"), [(2, 5, [1, 3, 4]), (25, 3, [2])])
def test_when_pictures_are_drawn(tmp_path, every, epochs, expected):
    class When(LandmarkPlots):
        seen = ()

        def _draw(self, trainer, pl_module, stage):
            self.seen = (*self.seen, trainer.current_epoch)

    plots = When(every_n_epochs=every)
    trainer = Trainer(**{**CPU, "num_sanity_val_steps": 1}, logger=False, max_epochs=epochs, callbacks=[plots])
    trainer.fit(module(), datamodule=synthetic(augment=None))
    assert list(plots.seen) == expected


def test_tensorboard_gets_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="tb")
    trainer = Trainer(**CPU, logger=logger, max_epochs=2, callbacks=[LandmarkPlots(worst=2)], log_every_n_steps=1)
    trainer.fit(module(), datamodule=synthetic(augment=None))
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    assert set(tags["images"]) == {"val/worst_1", "val/worst_2", "val/landmarks"}
    assert {"train/loss", "val/mre_px", "val/mre_mm"} <= set(tags["scalars"])
    encoded = events.Images("val/worst_1")[0].encoded_image_string
    picture = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(
        picture, cv2.imread(str(tmp_path / "tb" / "version_0" / "overlays" / "val_worst_1.png"))
    )


# ---- predict --------------------------------------------------------------------------------------------------------


def predict(folder, model=None, **kwargs):
    """Predictions of a folder, the rows of the CSV, and what the writer wrote."""
    writer = PredictionWriter(folder=str(folder))
    trainer = Trainer(**CPU, logger=False, callbacks=[writer])
    data = kwargs.pop("data", None) or LandmarkData(image_size=64, batch_size=2, **kwargs)
    out = trainer.predict(model or module(), datamodule=data)
    with (folder / "predictions.csv").open(newline="") as file:
        return out, list(csv.DictReader(file)), writer


def test_csv_holds_every_landmark_in_pixels_and_mm(tmp_path):
    for i, size in enumerate([(60, 80), (100, 50), (64, 64)]):
        write_image(tmp_path / "in" / f"{i}.png", size)
    out, rows, writer = predict(tmp_path / "out", predict_dir=str(tmp_path / "in"), pixel_size=[0.1, 0.25])
    assert list(rows[0]) == HEADER
    assert len(rows) == 3 * 8
    points, scores, sd = (torch.cat([p[k] for p in out]).numpy() for k in ("points", "score", "sd"))
    for n, row in enumerate(rows):
        i, k = divmod(n, 8)
        assert (row["file"], row["landmark"], row["name"]) == (f"{i}.png", str(k + 1), str(k + 1))
        x, y = points[i, k]
        found = [float(row[c]) for c in ("x_px", "y_px", "x_mm", "y_mm", "score", "sd_px")]
        expected = [x, y, 0.1 * x, 0.25 * y, scores[i, k], sd[i, k]]
        np.testing.assert_allclose(found, expected, atol=1e-3)
    pictures = sorted(p.name for p in (tmp_path / "out").glob("*.png"))
    assert pictures == ["0.png", "1.png", "2.png"]
    assert writer.artifacts == [tmp_path / "out" / n for n in ("predictions.csv", *pictures)]


def test_overlays_show_the_predictions(tmp_path):
    write_image(tmp_path / "in" / "a.png", (64, 64), 0)
    model = module(num_landmarks=1)
    _, rows, _ = predict(tmp_path / "out", model, predict_dir=str(tmp_path / "in"), pixel_size=0.1)
    picture = cv2.imread(str(tmp_path / "out" / "a.png"))[:, :, ::-1]
    where = at([float(rows[0]["x_px"]), float(rows[0]["y_px"])], 10)
    inside = np.clip(where, 0, 639)
    assert np.linalg.norm(np.array(marks(picture, GREEN)) - inside) < 4  # a mark at the border is cut


def test_unknown_pixel_size_leaves_mm_empty_and_says_so(tmp_path):
    write_image(tmp_path / "in" / "a.png")
    with pytest.warns(UserWarning, match=r"data\.pixel_size is unknown: the mm columns are empty"):
        _, rows, _ = predict(tmp_path / "out", predict_dir=str(tmp_path / "in"))
    assert {(r["x_mm"], r["y_mm"]) for r in rows} == {("", "")}
    assert all(r["x_px"] for r in rows)


def test_files_of_one_stem_get_two_pictures(tmp_path):
    for name in ("a.png", "a.jpg", "b.png"):
        write_image(tmp_path / "in" / name)
    _, rows, writer = predict(tmp_path / "out", predict_dir=str(tmp_path / "in"), pixel_size=0.1)
    assert len(list((tmp_path / "out").glob("*.png"))) == len(set(writer.artifacts)) - 1 == 3
    assert {r["file"] for r in rows} == {"a.png", "a.jpg", "b.png"}


def test_names_with_folders_get_two_pictures(tmp_path):
    """A labelled set may name its images `a/1.png` and `b/1.png`."""
    rows = [("a/1.png", 3, 4), ("b/1.png", 5, 6)]
    root = write_csv(tmp_path / "d", header=("file", "p1x", "p1y"), rows=rows)
    data = LandmarkData(root=str(root), format="csv", pixel_size=0.1, image_size=64, test_split="train")
    _, rows, writer = predict(tmp_path / "out", module(num_landmarks=1), data=data)
    assert len({r["file"] for r in rows}) == 2
    assert len(list((tmp_path / "out").rglob("*.png"))) == len(set(writer.artifacts)) - 1 == 2


def test_overlays_can_be_left_out(tmp_path):
    write_image(tmp_path / "in" / "a.png")
    writer = PredictionWriter(folder=str(tmp_path / "out"), overlays=False)
    data = LandmarkData(predict_dir=str(tmp_path / "in"), image_size=64, pixel_size=0.1)
    Trainer(**CPU, logger=False, callbacks=[writer]).predict(module(), datamodule=data)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["predictions.csv"]


def test_a_second_prediction_replaces_the_first(tmp_path):
    write_image(tmp_path / "in" / "a.png")
    for _ in range(2):
        _, rows, _ = predict(tmp_path / "out", predict_dir=str(tmp_path / "in"), pixel_size=0.1)
    assert len(rows) == 8


def test_predict_needs_only_a_checkpoint_and_a_folder(tmp_path, capsys):
    trainer = Trainer(**CPU, logger=False, max_epochs=1)
    model = LitLandmarks(**NET, sigma=6.0)
    trainer.fit(model, datamodule=synthetic(image_size=[96, 64]))
    trainer.save_checkpoint("m.ckpt")
    for name in ("x.png", "y.bmp"):
        write_image(tmp_path / "in" / name, (70, 50), 120)
    capsys.readouterr()
    cli = main(
        [
            *("predict", "--ckpt_path", "m.ckpt", "--data.predict_dir", "in", "--data.pixel_size", "0.1"),
            *("--predictions.folder", "out", "--trainer.accelerator", "cpu", "--trainer.logger", "false"),
            *("--trainer.enable_progress_bar", "false"),
        ]
    )
    assert cli.datamodule.image_size == (96, 64)
    with open("out/predictions.csv", newline="") as file:  # noqa: PTH123 - as a user would
        rows = list(csv.DictReader(file))
    assert [r["file"] for r in rows] == ["x.png"] * 8 + ["y.bmp"] * 8
    assert [r["name"] for r in rows[:2]] == ["sella", "nasion"]
    for row in rows:
        assert float(row["x_mm"]) == pytest.approx(0.1 * float(row["x_px"]), abs=2e-3)
    image = cv2.imread("in/x.png", cv2.IMREAD_GRAYSCALE)
    expected = LitLandmarks.load_from_checkpoint("m.ckpt").predict_image(image)
    np.testing.assert_allclose([[float(r["x_px"]), float(r["y_px"])] for r in rows[:8]], expected, atol=2e-3)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["predictions.csv", "x.png", "y.png"]
    assert "16 landmarks written to out/predictions.csv" in capsys.readouterr().out


def test_file_names_of_several_processes_do_not_collide(tmp_path):
    def csv_of(world_size, rank):
        writer = PredictionWriter(folder=str(tmp_path))
        trainer = SimpleNamespace(world_size=world_size, global_rank=rank, log_dir=None, default_root_dir="elsewhere")
        writer.on_predict_start(trainer, None)
        return writer.artifacts[0]

    assert len({csv_of(2, rank) for rank in range(2)}) == 2
    assert csv_of(1, 0) == tmp_path / "predictions.csv"
