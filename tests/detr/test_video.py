"""Videos to predict on: every frame once, in order, as if it were an image."""

import json
import time

import cv2
import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lit_cli.errors import InputError
from lit_detr.data import DetectionData
from lit_detr.module import LitDETR
from lit_detr.predict import DetectionWriter
from lit_detr.video import PER_SOURCE, FrameReader, is_video, open_clip, read_ahead

SIZE = (48, 80)  # height, width: the frame below is padded
FPS = 10.0
CODECS = {"mp4": "mp4v", "avi": "MJPG", "mkv": "mp4v", "mov": "mp4v", "webm": "VP80"}


def film(path, count, codec=None, seed=0, size=SIZE):
    """A bright square that moves over a textured ground."""
    ground = np.random.default_rng(seed).integers(0, 90, (size[0] // 8, size[1] // 8, 3), np.uint8)
    ground = cv2.resize(ground, size[::-1], interpolation=cv2.INTER_NEAREST)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*(codec or CODECS[path.suffix[1:]])), FPS, size[::-1])
    assert writer.isOpened()
    for i in range(count):
        frame = ground.copy()
        frame[10:22, 4 + 4 * i % 60 : 16 + 4 * i % 60] = 255
        writer.write(frame)
    writer.release()
    return path


def decoded(path):
    capture, out = cv2.VideoCapture(str(path)), []
    while (found := capture.read())[0]:
        out.append(found[1])
    return out


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = LitDETR(
        backbone="resnet10t",
        hidden=32,
        heads=4,
        feedforward=64,
        strides=[8, 16],
        decoder_layers=1,
        queries=8,
        eval_queries=8,
        noise_queries=0,
        most_detections=6,
        class_names=["square", "other"],
        category_ids=[3, 7],
        in_channels=3,
        image_size=[64, 64],
    )
    model.configure_model()
    for head in [model.net.selection.box, *model.net.decoder.box_heads]:
        nn.init.normal_(head.last.weight, std=0.05)
    nn.init.normal_(model.net.selection.score.weight, std=0.3)
    return model


def predict(model, source, out, *, writer=None, limit=1.0, **options):
    defaults = {"image_size": 64, "batch_size": 4, "num_workers": 0, "cache_dir": str(out / "cache")}
    data = DetectionData(predict_dir=str(source), **{**defaults, **options})
    callback = DetectionWriter(dirpath=str(out), **{"least_score": 0.0, "pictures": 0, **(writer or {})})
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = Trainer(accelerator="cpu", callbacks=[callback], limit_predict_batches=limit, **quiet)
    trainer.predict(model, datamodule=data, return_predictions=False)
    return json.loads((out / "detections.json").read_text()), callback


def by_frame(entries):
    out = {}
    for e in entries:
        out.setdefault(e.get("frame", e["file_name"]), []).append((e["category_id"], e["score"], *e["bbox"]))
    return out


@pytest.mark.parametrize("ending", CODECS)
def test_every_frame_as_its_image(ending, model, tmp_path):
    path, folder = film(tmp_path / f"clip.{ending}", 11), tmp_path / "images"
    folder.mkdir()
    for i, frame in enumerate(decoded(path)):
        cv2.imwrite(str(folder / f"{i:03d}.png"), frame)
    entries, _ = predict(model, path, tmp_path / "video", num_workers=2)
    expected, _ = predict(model, folder, tmp_path / "single")
    frames = [e["frame"] for e in entries]
    assert frames == sorted(frames)
    assert set(frames) == set(range(11))
    assert {e["file_name"] for e in entries} == {path.name}
    assert all(e["time"] == pytest.approx(e["frame"] / FPS, abs=1e-3) for e in entries)
    assert all(e["image_id"] == e["frame"] for e in entries)
    found, images = by_frame(entries), by_frame(expected)
    for i in range(11):
        np.testing.assert_allclose(found[i], images[f"{i:03d}.png"], atol=0.011)
    assert not np.allclose(found[0], found[5], atol=0.011)


@pytest.mark.parametrize("store", ["auto", "ram", "disk"])
@pytest.mark.parametrize("workers", [0, 2])
def test_stores_and_workers_change_nothing(store, workers, model, tmp_path):
    path = film(tmp_path / "clip.avi", 6)
    entries, _ = predict(model, path, tmp_path / "out", store=store, num_workers=workers)
    expected, _ = predict(model, path, tmp_path / "again", batch_size=6)
    assert [e["frame"] for e in entries] == [e["frame"] for e in expected]
    np.testing.assert_allclose([e["bbox"] for e in entries], [e["bbox"] for e in expected], atol=0.011)


def test_a_folder_of_both(model, tmp_path):
    """With a video without a suffix, one in a folder, an image between them, and damaged files."""
    source = tmp_path / "in"
    (source / "deep").mkdir(parents=True)
    film(source / "a.avi", 3).rename(source / "a")
    cv2.imwrite(str(source / "b.png"), np.zeros((20, 40, 3), np.uint8))
    film(source / "deep" / "c.mp4", 2, size=(32, 32))
    (source / "d.mp4").write_bytes(b"no video at all")
    (source / "notes.txt").write_text("not read")
    with pytest.warns(UserWarning, match=r"left out: .*d\.mp4: not a video that OpenCV can read"):
        entries, callback = predict(
            model, source, tmp_path / "out", writer={"video": True, "pictures": 9, "threshold": 0.0}
        )
    seen = list(dict.fromkeys((e["file_name"], e.get("frame"), e["image_id"]) for e in entries))
    assert seen == [
        *(("a", i, i) for i in range(3)),
        ("b.png", None, PER_SOURCE),
        *(("deep/c.mp4", i, 2 * PER_SOURCE + i) for i in range(2)),
    ]
    assert max(e["bbox"][0] + e["bbox"][2] for e in entries if e["file_name"] == "b.png") <= 40.01
    names = [p.rsplit("/", 1)[1] for p in callback.artifacts]
    assert names == ["detections.json", "a.mp4", "b.png", "deep_c_mp4.mp4"]
    drawn = [decoded(p) for p in callback.artifacts if p.endswith(".mp4")]
    assert [len(frames) for frames in drawn] == [3, 2]
    capture = cv2.VideoCapture(callback.artifacts[1])
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(FPS)
    shown = drawn[0][0].astype(int)
    assert shown.shape[0] >= 512
    green = (shown[..., 1] - shown[..., 2] > 60) & (shown[..., 1] - shown[..., 0] > 60)
    assert green.sum() > 100  # frames of boxes


def test_pictures_of_frames(model, tmp_path):
    path = film(tmp_path / "clip.v2.avi", 5)
    _, callback = predict(model, path, tmp_path / "out", writer={"pictures": 3})
    assert [p.rsplit("/", 1)[1] for p in callback.artifacts[1:]] == [f"clip.v2_{i:06d}.png" for i in range(3)]


def test_it_ends_early_without_reading_on(model, tmp_path):
    path = film(tmp_path / "clip.avi", 60)
    entries, _ = predict(model, path, tmp_path / "out", limit=2, num_workers=1)
    assert {e["frame"] for e in entries} == set(range(8))


def test_processes_share_the_batches(tmp_path):
    data = DetectionData(predict_dir=str(film(tmp_path / "clip.avi", 11)), image_size=64)
    stream = data.prepared("predict")
    every = [b.position.tolist() for b in stream.batches(3)]
    assert every == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]
    assert [b.position.tolist() for b in stream.batches(3, 0, 2)] == every[::2]
    assert [b.position.tolist() for b in stream.batches(3, 1, 2)] == every[1::2]
    content = next(stream.batches(1)).content.tolist()
    assert content == [[round(64 * SIZE[0] / SIZE[1]), 64]]


def test_grey_frames(tmp_path):
    path = film(tmp_path / "clip.avi", 2)
    clip = open_clip(path, "clip", 0)
    assert (clip.size, clip.fps, clip.frames) == (SIZE, FPS, 2)
    grey, moment = FrameReader(1).read(clip, 1)
    assert grey.shape == (*SIZE, 1)
    assert moment == pytest.approx(0.1, abs=1e-3)
    np.testing.assert_array_equal(grey[..., 0], cv2.cvtColor(decoded(path)[1], cv2.COLOR_BGR2GRAY))


def test_frames_in_any_order(tmp_path):
    path = film(tmp_path / "clip.mp4", 9)
    clip, reader, expected = open_clip(path, "clip", 0), FrameReader(3), decoded(path)
    for i in (0, 3, 3, 8, 2, 7):
        np.testing.assert_array_equal(reader.read(clip, i)[0], expected[i][..., ::-1])
    assert reader.read(clip, 9) is None


def test_a_video_that_breaks_off(model, tmp_path):
    path = film(tmp_path / "clip.avi", 40)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match=r"clip\.avi: \d+ of 40 frames could be read"):
        entries, _ = predict(model, path, tmp_path / "out")
    frames = {e["frame"] for e in entries}
    assert frames == set(range(len(frames)))
    assert 5 < len(frames) < 40


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "not a video that OpenCV can read"), (b"\0\0\0\x18ftypisom" + bytes(200), "not a video that OpenCV can")],
)
def test_a_damaged_video_is_one_line(content, message, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(content)
    data = DetectionData(predict_dir=str(tmp_path / "bad.mp4"), image_size=64)
    with pytest.warns(UserWarning, match="left out"), pytest.raises(InputError, match=message) as caught:
        data.prepared("predict")
    assert "\n" not in str(caught.value)


def test_a_folder_of_nothing(tmp_path):
    with pytest.raises(InputError, match="no image and no video in"):
        DetectionData(predict_dir=str(tmp_path), image_size=64).prepared("predict")


def test_videos_are_drawn_by_one_process(tmp_path):
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, default_root_dir=tmp_path)
    with pytest.raises(InputError, match=r"predictions\.video: one process has to see all frames"):
        DetectionWriter(video=True).setup(trainer, None, "predict")


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"\0\0\0\x18ftypisom", True),
        (b"\0\0\0\x08wide\0\0\0\0", True),
        (b"\0\0\0\x18ftypavif", False),
        (b"RIFF\0\0\0\0AVI ", True),
        (b"RIFF\0\0\0\0WAVE", False),
        (b"\x1a\x45\xdf\xa3" + bytes(8), True),
        (b"\x89PNG\r\n\x1a\n" + bytes(4), False),
        (b"", False),
    ],
)
def test_content_decides(head, expected, tmp_path):
    (tmp_path / "file").write_bytes(head)
    assert is_video(tmp_path / "file") == expected


def test_reading_ahead_is_bounded_and_ends():
    made = []

    def items():
        try:
            for i in range(100):
                made.append(i)
                yield i
        finally:
            made.append("closed")

    reading = read_ahead(items(), 2)
    assert [next(reading), next(reading)] == [0, 1]
    time.sleep(0.2)
    assert max(made) <= 4  # two given out, two waiting, one in hand
    reading.close()
    assert made[-1] == "closed"

    def fails():
        yield 1
        raise InputError("broken")

    reading = read_ahead(fails(), 2)
    assert next(reading) == 1
    with pytest.raises(InputError, match="broken"):
        next(reading)
