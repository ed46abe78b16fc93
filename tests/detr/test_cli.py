"""The command line from a fit to a COCO file of detections."""

import json
from pathlib import Path

import cv2
import pytest

from lit_detr.__main__ import main

DEMO = str(Path(__file__).parents[2] / "configs" / "detr" / "demo.yaml")
TINY = [
    *("--config", DEMO, "--data.synthetic_train", "8", "--data.synthetic_val", "4", "--data.synthetic_test", "3"),
    *("--data.image_size", "64", "--model.hidden", "32", "--trainer.enable_progress_bar", "false"),
]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cli = main(["fit", *TINY, "--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1"])
    return folder, cli


def test_a_test_repeats_the_figures_of_the_fit(fitted, monkeypatch):
    """With averaged weights in both."""
    folder, fit = fitted
    monkeypatch.chdir(folder)
    tested = main(["test", *TINY, "--ckpt_path", "last", "--data.test_split", "val"])
    figures = {k: v for k, v in fit.trainer.callback_metrics.items() if k.startswith("val/")}
    assert len(figures) > 20
    for key, value in figures.items():
        other = tested.trainer.callback_metrics[key.replace("val/", "test/")]
        assert float(other) == pytest.approx(float(value), abs=1e-6, nan_ok=True), key


def test_pictures_are_drawn(fitted):
    folder, _ = fitted
    drawn = list(folder.rglob("*detections.png"))
    assert drawn
    assert cv2.imread(str(drawn[0])) is not None
    assert (folder / "logs").is_dir()


def test_predictions_are_a_coco_file(fitted, monkeypatch):
    folder, _ = fitted
    monkeypatch.chdir(folder)
    main(["predict", *TINY, "--ckpt_path", "last", "--predictions.dirpath", "out", "--predictions.least_score", "0"])
    entries = json.loads((folder / "out" / "detections.json").read_text())
    assert {e["file_name"] for e in entries} == {"test_0000", "test_0001", "test_0002"}
    for entry in entries:
        x, y, width, height = entry["bbox"]
        assert x >= 0
        assert y >= 0
        assert x + width <= 64.01
        assert y + height <= 64.01
        assert 0 <= entry["score"] <= 1
        assert entry["category_id"] in (1, 2, 3)
    assert len(list((folder / "out" / "pictures").glob("*.png"))) == 3


def test_a_folder_without_annotations(fitted, monkeypatch, tmp_path):
    folder, _ = fitted
    monkeypatch.chdir(folder)
    cv2.imwrite(str(tmp_path / "one.png"), cv2.imread(str(next(folder.rglob("*detections.png"))))[:50, :80])
    command = ["predict", "--config", DEMO, "--ckpt_path", "last", "--data.format", "auto", "--model.hidden", "32"]
    command += ["--data.predict_dir", str(tmp_path), "--predictions.dirpath", "two", "--predictions.least_score", "0"]
    main([*command, "--data.image_size", "64", "--trainer.enable_progress_bar", "false"])
    entries = json.loads((folder / "two" / "detections.json").read_text())
    assert {e["file_name"] for e in entries} == {"one.png"}
    assert max(e["bbox"][0] + e["bbox"][2] for e in entries) <= 80.01
