"""Splits, stores and batches: what comes out must not depend on where images live."""

import json

import cv2
import numpy as np
import pytest
import torch

from lit_cli.errors import InputError
from lit_detr.batches import ReadyBatch
from lit_detr.data import DetectionData
from lit_detr.samples import DetectionSample
from lit_detr.store import fit_frame, prepare, read_image

DRAWN = {"format": "synthetic", "image_size": 64, "channels": 1, "batch_size": 4, "num_workers": 0}


def drawn(**options):
    data = DetectionData(**{**DRAWN, "synthetic_train": 10, "synthetic_val": 3, "synthetic_test": 2, **options})
    data.setup("fit")
    return data


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Two videos of images of two sizes in COCO's layout, without a `val` split."""
    root = tmp_path_factory.mktemp("coco")
    (root / "train").mkdir()
    (root / "annotations").mkdir()
    images, annotations = [], []
    rng = np.random.default_rng(0)
    for i in range(6):
        height, width = (40, 80) if i % 2 else (48, 32)
        name = f"video{i // 3}_{i}.png"
        cv2.imwrite(str(root / "train" / name), rng.integers(0, 255, (height, width, 3), np.uint8))
        images.append({"id": i, "file_name": name, "height": height, "width": width})
        box = [4, 6, 10, 8]
        annotations.append({"id": i, "image_id": i, "category_id": 3, "bbox": box, "area": 80, "iscrowd": int(i == 5)})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "thing"}]}
    (root / "annotations" / "train.json").write_text(json.dumps(content))
    return root


def test_boxes_follow_their_images_into_the_frame(coco, tmp_path):
    data = DetectionData(root=str(coco), image_size=[64, 96], batch_size=6, holdout=0.0, augment=None, num_workers=0)
    data.setup("fit")
    prepared = data.prepared("train")
    for i, sample in enumerate(prepared.samples):
        height, width = sample.size
        scale = min(64 / height, 96 / width)
        assert prepared.scales[i] == pytest.approx(scale)
        expected = sample.boxes * scale if not sample.crowd.any() else np.zeros((0, 4))
        np.testing.assert_allclose(prepared.boxes(i).boxes, expected, rtol=1e-6)
        assert not prepared.images[i, :, round(height * scale) :].any()
        assert not prepared.images[i, :, :, round(width * scale) :].any()
    (batch,) = data.train_dataloader()
    ready = data.on_after_batch_transfer(batch, 0)
    assert isinstance(ready, ReadyBatch)
    assert ready.image.shape == (6, 3, 64, 96)
    assert ready.image.max() <= 1
    assert sorted(ready.targets.counts) == [0, 1, 1, 1, 1, 1]
    for row, position in enumerate(ready.position.tolist()):
        h, w = prepared.content[position]
        assert int(ready.mask[row].sum()) == h * w
        own = prepared.boxes(position).boxes
        found = ready.targets.boxes[row, : len(own)] * torch.tensor([96, 64, 96, 64])
        centres = torch.from_numpy(own[:, :2] + own[:, 2:]) / 2
        torch.testing.assert_close(found[:, :2], centres)


def test_groups_are_held_out_whole(coco):
    data = DetectionData(root=str(coco), image_size=64, holdout=0.34, num_workers=0)
    data.setup("fit")
    train, val = ({s.name for s in data.prepared(split).samples} for split in ("train", "val"))
    assert train
    assert val
    assert not train & val
    assert len(train | val) == 6


@pytest.mark.parametrize("store", ["ram", "disk"])
def test_a_batch_does_not_depend_on_the_store(coco, store, tmp_path):
    options = {"root": str(coco), "image_size": 64, "batch_size": 3, "holdout": 0.0, "seed": 3}
    resident = DetectionData(**options, store="gpu", cache_dir="none")
    other = DetectionData(**options, store=store, cache_dir=str(tmp_path), num_workers=0)
    for _ in range(2):  # decoded, then from the cache
        other._prepared.clear()
        for data in (resident, other):
            data.setup("fit")
        for a, b in zip(resident.train_dataloader(), other.train_dataloader(), strict=True):
            assert torch.equal(a.image, b.image)
            assert torch.equal(a.position, b.position)
            assert int(a.seed) == int(b.seed)
            assert all(np.array_equal(x.boxes, y.boxes) for x, y in zip(a.boxes, b.boxes, strict=True))
    assert len(list(tmp_path.glob("*.npy"))) == 2


def test_drawn_images_and_their_seeds():
    data = drawn()
    assert [len(data.prepared(s)) for s in ("train", "val", "test")] == [10, 3, 2]
    same, other = drawn(seed=1), drawn(synthetic_seed=1)
    assert np.array_equal(data.prepared("train").images, same.prepared("train").images)
    assert not np.array_equal(data.prepared("train").images, other.prepared("train").images)
    orders = [next(iter(d.train_dataloader())).position.tolist() for d in (data, same)]
    assert orders[0] != orders[1]


def test_clahe_and_blur_run_in_workers():
    data = drawn(clahe_p=1.0, motion_blur_p=1.0)
    batch = next(iter(data.train_dataloader()))
    plain = torch.from_numpy(np.stack([data.prepared("train").images[i] for i in batch.position.tolist()]))
    assert batch.image.shape == plain.shape
    assert not torch.equal(batch.image, plain)
    again = next(iter(data.train_dataloader()))
    assert torch.equal(batch.image, again.image)
    ready = data.on_after_batch_transfer(batch, 0)
    assert ready.targets.counts == [len(b.boxes) for b in batch.boxes]


def test_worker_processes_give_the_same_batches():
    here, there = drawn(store="ram"), drawn(store="ram", num_workers=2)
    for a, b in zip(here.train_dataloader(), there.train_dataloader(), strict=True):
        assert torch.equal(a.image, b.image)
        first, second = (data.on_after_batch_transfer(batch, 0) for data, batch in ((here, a), (there, b)))
        torch.testing.assert_close(first.targets.boxes, second.targets.boxes)


def test_predicting_on_a_folder_names_what_is_damaged(coco, tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((20, 30, 3), np.uint8))
    (tmp_path / "b.png").write_bytes(b"no image")
    data = DetectionData(predict_dir=str(tmp_path), image_size=64, num_workers=0, cache_dir="none")
    with pytest.warns(UserWarning, match=r"b\.png: not an image"):
        data.setup("predict")
    assert [s.name for s in data.prepared("predict").samples] == ["a.png"]


def sample(path, size=None):
    empty = np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, bool)
    return DetectionSample(path.name, path, *empty, size=size, image_id=0, group=path.name)


def test_refusals(tmp_path):
    path = tmp_path / "x.png"
    cv2.imwrite(str(path), np.zeros((20, 30), np.uint8))
    with pytest.raises(InputError, match=r"30 x 20 pixels, expected 20 x 30 as annotated"):
        read_image(sample(path, (30, 20)), 1)
    with pytest.raises(InputError, match=r"nothing\.png: no such image"):
        prepare([sample(tmp_path / "nothing.png")], (32, 32), 1, tmp_path)
    for options, message in (
        ({"image_size": 100}, "data.image_size: expected a multiple of 32"),
        ({"batch_size": 0}, "data.batch_size: expected 1 or more"),
        ({"holdout": 1.0}, "data.holdout"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            DetectionData(**options)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"data\.root: name the data folder"):
        DetectionData().setup("fit")
    with pytest.raises(InputError, match=r"data\.predict_dir: no file or folder"):
        DetectionData(predict_dir=str(tmp_path / "none")).setup("predict")


def test_sixteen_bits_are_scaled_and_colours_are_rgb(tmp_path):
    cv2.imwrite(str(tmp_path / "deep.png"), np.array([[0, 30000], [15000, 30000]], np.uint16))
    assert read_image(sample(tmp_path / "deep.png"), 1)[..., 0].tolist() == [[0, 255], [127, 255]]
    cv2.imwrite(str(tmp_path / "red.png"), np.full((2, 2, 3), (0, 0, 255), np.uint8))  # OpenCV writes BGR
    assert read_image(sample(tmp_path / "red.png"), 3)[0, 0].tolist() == [255, 0, 0]


def test_frames_keep_the_proportions():
    image = np.full((10, 20, 1), 200, np.uint8)
    out, scale = fit_frame(image, (64, 64))
    assert scale == pytest.approx(3.2)
    assert out.shape == (1, 64, 64)
    assert (out[0, :32] == 200).all()
    assert not out[0, 32:].any()
