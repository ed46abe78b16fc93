"""What is made once for all tests of the module: a video, and a network that was trained on it."""

from pathlib import Path
from typing import NamedTuple

import pytest

from lit_patchnerf.synthetic import SyntheticVideo
from lit_patchnerf.video import write_frames
from tests.patchnerf.tiny import SCENE, fit, make_data, make_model


class Trained(NamedTuple):
    """A checkpoint of a fit, and the figures of its last validation."""

    path: Path
    figures: dict[str, float]


@pytest.fixture(scope="session")
def video(tmp_path_factory):
    """The scene as a folder of images: 8 frames of 32 x 64."""
    folder = tmp_path_factory.mktemp("video") / "scene"
    write_frames(folder, SyntheticVideo(**SCENE).draw())
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Grid mode with embeddings, 20 epochs."""
    folder = tmp_path_factory.mktemp("trained")
    model = make_model(clip_start=0.0, lr=0.02, decoder={"clip_stage": 1})
    options = {"max_epochs": 20, "check_val_every_n_epoch": 20, "validate": True}
    trainer = fit(folder, model, data=make_data(embeddings="toy:8"), **options)
    trainer.save_checkpoint(folder / "trained.ckpt")
    return Trained(folder / "trained.ckpt", {k: float(v) for k, v in trainer.callback_metrics.items()})
