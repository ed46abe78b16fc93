"""Tiles in training, whole images in evaluation: the data, and the module on it."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lit_detr.data import DetectionData
from lit_detr.module import LitDETR
from lit_detr.samples import Output
from lit_detr.store import fit_frame, read_image
from lit_detr.tile_store import WholeBatch
from lit_detr.tiles import tile_grid, tiles_of
from tests.detr.sliced_cases import SIZES, Seer, coco_folder
from tests.detr.test_module import SMALL, Losses, trainer
from tests.helpers.errors import refused

TILES = {"tile": 64, "tile_overlap": 0.3, "channels": 1, "batch_size": 4, "num_workers": 0, "cache_dir": "none"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return coco_folder(tmp_path_factory.mktemp("tiles"))


def tiled(root, stage="fit", **options):
    data = DetectionData(root=str(root), **{**TILES, "image_size": 64, **options})
    data.setup(stage)
    return data


def epoch(data, number):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return list(loader)


# ---- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [64, 128, 32])
def test_tiles_equal_a_slow_cut_of_each_image(root, image_size):
    data = tiled(root, image_size=image_size, tile_min_visible=0.6)
    prepared, scale, row = data.prepared("train"), image_size / 64, 0
    for sample in data.table.splits["train"]:
        image = read_image(sample, 1)
        parts = tiles_of(sample, sample.size, (64, 64), 0.3, min_visible=0.6)
        for (y, x), part in zip(tile_grid(sample.size, (64, 64), 0.3), parts, strict=True):
            pixels = np.ascontiguousarray(image[y : y + 64, x : x + 64])
            expected, _ = fit_frame(pixels, (image_size, image_size), scale)
            assert np.array_equal(prepared.images[row], expected)
            assert prepared.sizes[row].tolist() == list(pixels.shape[:2])
            assert prepared.scales[row] == scale
            own = part.sample.boxes[~part.sample.crowd] * scale
            np.testing.assert_allclose(prepared.boxes(row).boxes, own, rtol=1e-6)
            row += 1
    assert row == len(prepared)


def test_an_epoch_has_all_objects_and_a_share_of_the_empty_tiles(root):
    data = tiled(root, empty_tiles=0.2, drop_last=False)
    prepared, epochs = data.prepared("train"), [epoch(data, n) for n in range(3)]
    full = {i for i in range(len(prepared)) if len(prepared.boxes(i).boxes)}
    empty = {i for i in range(len(prepared)) if not len(prepared.samples[i].boxes)}
    assert len({len(batches) for batches in epochs}) == 1
    seen = []
    for batches in epochs:
        positions = torch.cat([b.position for b in batches]).tolist()
        assert len(set(positions)) == len(positions)
        assert full <= set(positions)
        seen.append(set(positions) - full)
        assert seen[-1] <= empty
        assert len(seen[-1]) == min(len(empty), round(len(full) / 4))
    assert seen[0] != seen[1]
    again = epoch(tiled(root, empty_tiles=0.2, drop_last=False), 1)
    assert all(torch.equal(a.image, b.image) for a, b in zip(epochs[1], again, strict=True))


def test_processes_share_an_epoch(root):
    data = tiled(root)
    sampler = data.train_dataloader().sampler
    orders = []
    for rank in range(2):
        sampler.rank, sampler.num_replicas = rank, 2
        sampler.set_epoch(3)
        orders.append(sampler.order().tolist())
    sampler.rank, sampler.num_replicas = 0, 1
    assert sorted(orders[0] + orders[1]) == sorted(sampler.order().tolist())
    assert not set(orders[0]) & set(orders[1])


@pytest.mark.parametrize("store", ["ram", "disk"])
def test_a_batch_does_not_depend_on_the_store(root, store, tmp_path):
    here, other = tiled(root, store="gpu"), tiled(root, store=store, cache_dir=str(tmp_path))
    for _ in range(2):  # decoded, then from the cache
        other = tiled(root, store=store, cache_dir=str(tmp_path))
        for a, b in zip(here.train_dataloader(), other.train_dataloader(), strict=True):
            assert torch.equal(a.image, b.image)
            assert torch.equal(a.position, b.position)
        for a, b in zip(here.val_dataloader(), other.val_dataloader(), strict=True):
            assert torch.equal(a.position, b.position)
            assert all(torch.equal(x, y) for x, y in zip(a.image, b.image, strict=True))
    assert isinstance(other.prepared("train").images, np.memmap) == (store == "disk")
    assert len(list(tmp_path.glob("*.npy"))) == 2
    tiled(root, cache_dir=str(tmp_path), tile_overlap=0.4).prepared("train")
    assert len(list(tmp_path.glob("*.npy"))) == 3  # other starts, other tiles; whole images are the same


def test_evaluation_gives_whole_images_each_once(root):
    data = tiled(root, "validate", eval_batch_size=16)
    batches = list(data.val_dataloader())
    assert torch.cat([b.position for b in batches]).tolist() == list(range(len(SIZES)))
    assert len(batches) < len(SIZES)
    for batch in batches:
        assert isinstance(batch, WholeBatch)
        for i, image in zip(batch.position.tolist(), batch.image, strict=True):
            expected = read_image(data.table.splits["val"][i], 1).transpose(2, 0, 1)
            assert np.array_equal(image.numpy(), expected)


def test_an_image_is_decoded_once_and_not_once_for_each_tile(root, monkeypatch):
    seen = []

    def read(sample, channels):
        seen.append(sample.name)
        return read_image(sample, channels)

    monkeypatch.setattr("lit_detr.tile_store.read_image", read)
    data = tiled(root)
    expected = [s.name for split in ("train", "val") for s in data.table.splits[split]]
    assert sorted(seen) == sorted(expected)


def test_refusals(root):
    for options, parts in (
        ({"tile": 16}, ("data.tile", "32")),
        ({"tile": [64, 32]}, ("data.tile: 64 x 32", "64 x 64")),
        ({"tile": [64, 64, 64]}, ("data.tile", "[64, 64, 64]")),
        ({"tile_overlap": 1.0}, ("data.tile_overlap", "1.0")),
        ({"tile_min_visible": 2.0}, ("data.tile_min_visible", "2.0")),
        ({"empty_tiles": 1.0}, ("data.empty_tiles", "1.0")),
    ):
        refused(lambda o=options: DetectionData(**{**TILES, "image_size": 64, **o}), *parts)


# ---- module ----------------------------------------------------------------------------------------------------------


def seeing(root, tmp_path, network=None, **options):
    data = DetectionData(**{**TILES, "root": root and str(root), "image_size": 64, "eval_batch_size": 8, **options})
    model = LitDETR(class_names=["dark", "bright"], in_channels=1, image_size=[64, 64])
    model.configure_model()
    model.net = network or Seer()
    return trainer(tmp_path), model, data


@pytest.mark.parametrize("image_size", [64, 128])
def test_a_network_that_sees_all_in_its_tiles_finds_all_in_the_images(root, tmp_path, image_size):
    run, model, data = seeing(root, tmp_path, image_size=image_size)
    (figures,) = run.validate(model, datamodule=data, verbose=False)
    assert figures["val/ap"] == pytest.approx(1, abs=1e-6)
    found = run.predict(model, datamodule=data)
    samples = data.table.splits["val"]
    for batch in found:
        assert batch.boxes.shape[:2] == batch.scores.shape == batch.labels.shape
        for scores, boxes, position in zip(batch.scores, batch.boxes, batch.position, strict=True):
            assert int((scores > 0.01).sum()) == len(samples[position].boxes)  # once, also across borders
            assert not boxes[scores.isneginf()].any()
    assert sorted(i for batch in found for i in batch.position) == list(range(len(SIZES)))


def test_a_folder_of_images_is_read_as_it_is_needed(root, tmp_path):
    run, model, data = seeing(root, tmp_path)
    expected = {
        i: b for batch in run.predict(model, datamodule=data) for b, i in zip(batch.boxes, batch.position, strict=True)
    }
    run, model, data = seeing(root, tmp_path, predict_dir=str(root / "val"))
    for batch in run.predict(model, datamodule=data):
        for boxes, i in zip(batch.boxes, batch.position, strict=True):
            count = min(len(boxes), len(expected[i]))
            torch.testing.assert_close(boxes[:count], expected[i][:count])
    assert data.prepared("predict").images.size == 0


class SaveAt(Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_resumes_in_mid_epoch_to_the_same_losses(root, tmp_path):
    def fit(folder, ckpt_path=None, more=()):
        torch.manual_seed(0)
        data = DetectionData(root=str(root), **{**TILES, "image_size": 64, "batch_size": 8})
        losses = Losses()
        options = {"max_epochs": 2, "limit_val_batches": 0, "enable_checkpointing": False}
        run = trainer(folder, callbacks=[losses, *more], **options)
        run.fit(LitDETR(**SMALL), datamodule=data, ckpt_path=ckpt_path)
        return losses.seen, run.num_training_batches

    path = tmp_path / "mid.ckpt"
    whole, count = fit(tmp_path / "a", more=[SaveAt(2, path)])
    assert count > 2
    rest, _ = fit(tmp_path / "b", ckpt_path=path)
    assert set(rest) == {step for step in whole if step > 2}
    for step, loss in rest.items():
        assert loss == pytest.approx(whole[step], rel=1e-4), step


def test_frames_of_a_video_are_cut_like_images(tmp_path):
    (tmp_path / "videos").mkdir()
    path = tmp_path / "videos" / "flight.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25, (150, 100))
    for n in range(3):
        frame = np.zeros((100, 150, 3), np.uint8)
        frame[40:60, 50 + 8 * n : 62 + 8 * n] = 240
        writer.write(frame)
    writer.release()
    cv2.imwrite(str(tmp_path / "videos" / "still.png"), frame)
    run, model, data = seeing(None, tmp_path, predict_dir=str(tmp_path / "videos"))
    found = [
        (s, b) for batch in run.predict(model, datamodule=data) for s, b in zip(batch.scores, batch.boxes, strict=True)
    ]
    assert len(found) == 4
    for n, (scores, boxes) in enumerate(found):
        (box,) = boxes[scores > 0.01].tolist()
        left = 50 + 8 * min(n, 2)
        np.testing.assert_allclose(box, [left, 40, left + 12, 60], atol=1.01)  # JPEG blurs edges


@pytest.mark.data
def test_real_frames_as_tiles(tmp_path):
    root = Path(os.environ.get("LIT_DATA", "")) / "drone_ir"
    if "LIT_DATA" not in os.environ or not root.is_dir():
        pytest.skip("LIT_DATA names no folder with drone_ir")
    data = tiled(root, "validate", tile=[128, 160], image_size=[128, 160], eval_batch_size=32)
    data.table.splits["val"][:] = data.table.splits["val"][::20]
    data._prepared.clear()
    network = Teacher(data)
    model = LitDETR(class_names=data.class_names, in_channels=1, image_size=[128, 160])
    model.configure_model()
    model.net = network
    (figures,) = trainer(tmp_path).validate(model, datamodule=data, verbose=False)
    assert figures["val/ap50"] == pytest.approx(1, abs=1e-6)
    assert max(network.sizes) == 32


class Teacher(torch.nn.Module):
    """Tells the boxes of each tile, in the order in which tiles come."""

    def __init__(self, data):
        super().__init__()
        self.sizes, parts = [], []
        for s in data.table.splits["val"]:
            tiles = tiles_of(s, s.size, data.tile, data.hparams["tile_overlap"], min_visible=0.0)
            parts += [part.sample for part in tiles]
        self.parts = parts

    def forward(self, images, mask=None, targets=None, queries=None):
        height, width = images.shape[-2:]
        logits, boxes = torch.full((len(images), 50, 4), -30.0), torch.full((len(images), 50, 4), 0.5)
        own, self.parts = self.parts[: len(images)], self.parts[len(images) :]
        self.sizes.append(len(images))
        for b, part in enumerate(own):
            values = torch.from_numpy(part.boxes) / torch.tensor([width, height, width, height])
            count = len(values)
            boxes[b, :count] = torch.cat([(values[:, :2] + values[:, 2:]) / 2, values[:, 2:] - values[:, :2]], 1)
            logits[b, torch.arange(count), torch.from_numpy(part.labels)] = 3.0
        return Output(logits[None], boxes[None], logits, boxes)
