"""The command line with tiles, from a fit to predictions."""

import json
from pathlib import Path

import cv2
import pytest

from lit_detr.__main__ import main
from tests.detr.sliced_cases import SIZES, coco_folder


def test_the_command_line_takes_the_geometry_from_the_checkpoint(tmp_path, monkeypatch):
    root = coco_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    demo = str(Path(__file__).parents[2] / "configs" / "detr" / "demo.yaml")
    common = ["--config", demo, "--data.format", "coco", "--data.root", str(root), "--data.cache_dir", "cache"]
    common += [
        "--model.hidden",
        "32",
        "--model.feedforward",
        "32",
        "--model.decoder_layers",
        "1",
        "--model.strides",
        "[8,16]",
        "--plots.num_first",
        "0",
        "--plots.worst_k",
        "0",
        "--model.queries",
        "20",
        "--model.eval_queries",
        "20",
        "--model.noise_queries",
        "10",
        "--model.most_detections",
        "20",
        "--trainer.enable_progress_bar",
        "false",
        "--data.batch_size",
        "16",
    ]
    tiles = ["--data.tile", "64", "--data.image_size", "64", "--data.tile_overlap", "0.3", "--data.tile_whole", "true"]
    once = ["--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1"]
    fit = main(["fit", *common, *tiles, *once])
    figures = {k: v for k, v in fit.trainer.callback_metrics.items() if k.startswith("val/")}
    for verb, prefix in (("validate", "val/"), ("test", "test/")):  # the geometry comes from the checkpoint
        cli = main([verb, *common, "--ckpt_path", "last"])
        assert cli.datamodule.tile == (64, 64)
        assert cli.datamodule.hparams["tile_whole"]
        for key, value in figures.items():
            other = cli.trainer.callback_metrics[key.replace("val/", prefix)]
            assert float(other) == pytest.approx(float(value), abs=1e-6, nan_ok=True), key
    main(["predict", *common, "--ckpt_path", "last", "--predictions.dirpath", "out", "--predictions.least_score", "0"])
    entries = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {e["image_id"] for e in entries} == set(range(len(SIZES)))
    for entry in entries:
        x, y, width, height = entry["bbox"]
        limit = SIZES[entry["image_id"]]
        assert 0 <= entry["score"] <= 1
        assert min(x, y) >= 0
        assert x + width <= limit[1] + 0.02
        assert y + height <= limit[0] + 0.02
    assert cv2.imread(str(next((tmp_path / "out" / "pictures").glob("*.png")))) is not None
