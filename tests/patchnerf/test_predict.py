"""What the writer leaves on the disk, through a Trainer."""

import cv2
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lit_cli.errors import InputError
from lit_patchnerf.predict import FrameWriter
from lit_patchnerf.samples import MomentBatch
from lit_patchnerf.video import read_video, write_frames


class Stub(pl.LightningModule):
    """Grey frames whose level is 20 times their number."""

    def __init__(self, size=(16, 24), fps=20.0, fail_at=None):
        super().__init__()
        self.hparams.update({"fps": fps, "frames": 10, "geometry": {"frame": list(size)}})
        self.size, self.fail_at = size, fail_at

    def predict_step(self, batch, batch_idx):
        if batch_idx == self.fail_at:
            raise RuntimeError("stop")
        levels = torch.tensor(batch.numbers) * 20
        pixels = levels.round().to(torch.uint8)[:, None, None, None].expand(-1, *self.size, 3)
        return {"pixels": pixels, "numbers": batch.numbers}


def loader(numbers, batch):
    parts = [numbers[i : i + batch] for i in range(0, len(numbers), batch)]
    return DataLoader(parts, batch_size=None, collate_fn=lambda part: MomentBatch(torch.tensor(part) / 30, list(part)))


def predict(writer, numbers, tmp_path, batch=3, module=None):
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=[writer],
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.predict(module or Stub(), loader(numbers, batch), return_predictions=False)
    return writer


def levels(path):
    frames, facts = read_video(path)
    return frames[:, 5, 5].mean(-1), facts


def test_mp4(tmp_path):
    writer = predict(FrameWriter(), [float(i) for i in range(8)], tmp_path)
    path = tmp_path / "predictions" / "video.mp4"
    assert writer.artifacts == [str(path)]
    found, facts = levels(path)
    np.testing.assert_allclose(found, np.arange(8) * 20, atol=7)
    assert (facts.size, facts.fps) == ((16, 24), 20.0)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize(("step", "fps"), [(0.5, 40.0), (1.0, 20.0), (2.0, 20.0)])
def test_film_lasts_as_long_as_the_video(tmp_path, step, fps, batch):
    numbers = np.arange(3, 9.001, step).tolist()
    writer = predict(FrameWriter(dirpath=str(tmp_path / "x")), numbers, tmp_path, batch)
    found, facts = levels(writer.artifacts[0])
    assert facts.fps == fps
    np.testing.assert_allclose(found, np.array(numbers) * 20, atol=7)


def test_fps_of_ones_own_and_a_single_frame(tmp_path):
    writer = FrameWriter(fps=7.0)
    assert levels(predict(writer, [1.0, 1.5, 2.0], tmp_path).artifacts[0])[1].fps == 7.0
    writer = predict(FrameWriter(), [4.0], tmp_path)  # the second run forgets the first
    capture = cv2.VideoCapture(writer.artifacts[0])
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 1
    assert capture.get(cv2.CAP_PROP_FPS) == 20.0


def test_frames(tmp_path):
    writer = predict(FrameWriter(format="frames"), [2.0, 2.5, 3.0, 3.5], tmp_path)
    folder = tmp_path / "predictions" / "frames"
    names = ["000002.png", "000002_500.png", "000003.png", "000003_500.png"]
    assert writer.artifacts == [str(folder / name) for name in names]
    assert sorted(p.name for p in folder.iterdir()) == names
    found, _ = read_video(folder)  # in natural order too, and without loss
    np.testing.assert_array_equal(found[:, 0, 0, 0], [40, 50, 60, 70])


def test_odd_sizes(tmp_path):
    writer = predict(FrameWriter(), [0.0, 1.0], tmp_path, module=Stub(size=(15, 23)))
    assert levels(writer.artifacts[0])[1].size == (16, 24)


def test_a_film_that_was_begun_opens(tmp_path):
    with pytest.raises(RuntimeError, match="stop"):
        predict(FrameWriter(), [float(i) for i in range(9)], tmp_path, module=Stub(fail_at=2))
    assert len(levels(tmp_path / "predictions" / "video.mp4")[0]) == 6


def test_beside_the_original(tmp_path):
    originals = [np.full((16, 24, 3), 250 - 20 * i, np.uint8) for i in range(10)]
    write_frames(tmp_path / "original", originals)
    writer = FrameWriter(format="frames", beside=str(tmp_path / "original"))
    predict(writer, [2.0, 3.0], tmp_path)
    for path, number in zip(writer.artifacts, (2, 3), strict=True):
        picture = cv2.imread(path)
        left, right = picture[-16:, :24], picture[-16:, -24:]
        assert (left == 250 - 20 * number).all()
        assert (right == 20 * number).all()
    part = writer._beside(3.0, np.zeros((4, 6, 3), np.uint8), [8, 9, 4, 6])
    assert (part[-4:, :6] == 190).all()
    with pytest.raises(InputError, match=r"^predictions\.beside: the original has no frame 2\.5, expected .*step 1$"):
        predict(writer, [2.0, 2.5], tmp_path)
    write_frames(tmp_path / "short", originals[:4])
    short = FrameWriter(beside=str(tmp_path / "short"))
    with pytest.raises(InputError, match=r"short has 4 frames of 16x24, expected 10 of 16x24 as the network's$"):
        predict(short, [2.0], tmp_path)
    other = Stub(size=(16, 26))
    with pytest.raises(InputError, match=r"original has 10 frames of 16x24, expected 10 of 16x26"):
        predict(writer, [2.0], tmp_path, module=other)


def test_several_processes(tmp_path, monkeypatch):
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=tmp_path)
    monkeypatch.setattr(type(trainer), "world_size", property(lambda self: 2))
    with pytest.raises(InputError, match=r"^predictions\.format: .*expected --trainer\.devices 1.*got 2 processes$"):
        FrameWriter().setup(trainer, Stub(), "predict")
    FrameWriter().setup(trainer, Stub(), "fit")
    FrameWriter(format="frames").setup(trainer, Stub(), "predict")


def test_refusals(tmp_path):
    with pytest.raises(InputError, match=r"^predictions\.format: expected mp4 or frames, got gif"):
        FrameWriter(format="gif")
    for fps in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"^predictions\.fps: expected a positive number"):
            FrameWriter(fps=fps)
    (tmp_path / "file").write_text("")
    for kind in ("mp4", "frames"):
        with pytest.raises(InputError, match="cannot"):
            predict(FrameWriter(format=kind, dirpath=str(tmp_path / "file")), [0.0, 1.0], tmp_path)
