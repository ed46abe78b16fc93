"""From files to batches: the cache, the hold-out, the three stores and their common order."""

import logging
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lit_cli.errors import InputError
from lit_common.loaders import EpochBatches
from lit_common.store import cache_folder
from lit_landmarks.augment import Augmentation, augment_batch
from lit_landmarks.data import LandmarkBatch, LandmarkData
from lit_landmarks.geometry import Letterbox, original_points
from lit_landmarks.samples import LandmarkSample
from lit_landmarks.store import prepare
from tests.landmarks.layouts import write_csv, write_image, write_isbi, write_kaggle

CPU = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


def write_samples(folder, count=5, size=(40, 30)):
    """Images of random pixels, with landmarks and a pixel size that differs from image to image."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for i in range(count):
        path = folder / f"{i}.png"
        cv2.imwrite(str(path), rng.integers(0, 255, (size[0] + i, size[1]), np.uint8))
        samples.append(LandmarkSample(path, str(i), rng.uniform(2, 28, (3, 2)), (0.1 + 0.01 * i, 0.2)))
    return samples


def data_set(root, count=10, pixel_size=0.1, size=(40, 30)):
    """A CSV data set of two landmarks, one of them missing in the second image."""
    rng = np.random.default_rng(1)
    rows = [[f"{i:03d}.png", *np.round(rng.uniform(3, 27, 4), 2)] for i in range(count)]
    rows[1][3:] = ["", ""]
    write_csv(root, header=("file", "p1x", "p1y", "p2x", "p2y"), rows=rows, images="images")
    for i, row in enumerate(rows):
        cv2.imwrite(str(root / "images" / row[0]), rng.integers(0, 255, (size[0] + 2 * i, size[1]), np.uint8))
    return {"root": str(root), "format": "csv", "pixel_size": pixel_size, "image_size": 64, "batch_size": 3}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_CACHE", str(tmp_path / "cache"))


# ---- store ----------------------------------------------------------------------------------------------------------


def test_prepared_images_and_points_are_the_letterboxed_ones(tmp_path):
    samples = write_samples(tmp_path / "in")
    found = prepare(samples, (64, 96), 1, None)
    assert len(found) == 5
    assert found.images.shape == (5, 1, 64, 96)
    assert found.names == ["0", "1", "2", "3", "4"]
    np.testing.assert_array_equal(found.sizes, [[40 + i, 30] for i in range(5)])
    np.testing.assert_allclose(found.spacing, [[0.1 + 0.01 * i, 0.2] for i in range(5)])
    for i, sample in enumerate(samples):
        box = Letterbox((40 + i, 30), (64, 96))
        np.testing.assert_array_equal(found.images[i], box.apply(sample.read_image(1)))
        expected = [(box.matrix @ [x, y, 1])[:2] for x, y in sample.points]
        np.testing.assert_allclose(found.points()[i].numpy(), expected, rtol=1e-5)
    assert found.points().dtype == torch.float32


@pytest.mark.parametrize("in_memory", [True, False])
def test_cache_is_written_once_and_read_afterwards(tmp_path, in_memory, monkeypatch):
    samples, cache = write_samples(tmp_path / "in"), tmp_path / "c"
    first = prepare(samples, (64, 64), 1, cache, in_memory=in_memory)
    written = {p.name: p.stat().st_mtime_ns for p in cache.iterdir()}
    assert sorted(p.split(".", 1)[1] for p in written) == ["npy", "sizes.npy"]  # no temporary file is left

    def no_more(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(LandmarkSample, "read_image", no_more)
    second = prepare(samples, (64, 64), 1, cache, in_memory=in_memory)
    assert {p.name: p.stat().st_mtime_ns for p in cache.iterdir()} == written
    assert isinstance(second.images, np.memmap) is not in_memory
    assert isinstance(first.images, np.memmap) is not in_memory
    np.testing.assert_array_equal(first.images, second.images)
    np.testing.assert_array_equal(first.sizes, second.sizes)


def test_cache_is_made_anew_for_other_pixels_sizes_and_channels(tmp_path):
    samples, cache = write_samples(tmp_path / "in", 2), tmp_path / "c"
    prepare(samples, (64, 64), 1, cache)
    prepare(samples, (64, 96), 1, cache)
    prepare(samples, (64, 64), 3, cache)
    prepare(samples[::-1], (64, 64), 1, cache)
    write_image(samples[0].path, (40, 30), 77)
    changed = prepare(samples, (64, 64), 1, cache)
    assert len(list(cache.glob("*.sizes.npy"))) == 5
    assert changed.images[0].max() == 77


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("which", ["images", "sizes"])
@pytest.mark.parametrize("how", ["empty", "cut", "text", "other shape"])
def test_damaged_cache_is_rebuilt(tmp_path, in_memory, which, how):
    samples, cache = write_samples(tmp_path / "in", 3), tmp_path / "c"
    expected = prepare(samples, (64, 64), 1, cache)
    (path,) = [p for p in cache.iterdir() if p.name.endswith("sizes.npy") is (which == "sizes")]
    whole = path.read_bytes()
    if how == "other shape":
        np.save(path, np.load(path)[:2])
    else:
        path.write_bytes({"empty": b"", "cut": whole[: len(whole) - 9], "text": b"not an array at all"}[how])
    found = prepare(samples, (64, 64), 1, cache, in_memory=in_memory)
    np.testing.assert_array_equal(found.images, expected.images)
    np.testing.assert_array_equal(found.sizes, expected.sizes)
    np.testing.assert_array_equal(found.matrices, expected.matrices)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("in_memory", [True, False])
def test_cache_folder_that_cannot_be_written_only_warns(tmp_path, caplog, in_memory):
    samples = write_samples(tmp_path / "in", 2)
    (tmp_path / "file").write_text("in the way")  # permissions would not stop root
    with caplog.at_level(logging.WARNING):
        found = prepare(samples, (64, 64), 1, tmp_path / "file" / "cache", in_memory=in_memory)
    assert "no image cache" in caplog.text
    np.testing.assert_array_equal(found.images, prepare(samples, (64, 64), 1, None).images)


def test_cache_folder_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_CACHE", str(tmp_path / "here"))
    assert cache_folder(None, "landmarks") == tmp_path / "here" / "landmarks"
    monkeypatch.delenv("LIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(None, "landmarks") == tmp_path / "xdg" / "lit-vision-tasks" / "landmarks"


def test_cache_dir_none_keeps_nothing(tmp_path):
    LandmarkData(**data_set(tmp_path / "d"), cache_dir="none").setup("fit")
    assert not (tmp_path / "cache").exists()
    LandmarkData(**data_set(tmp_path / "d"), cache_dir=str(tmp_path / "mine")).setup("fit")
    assert len(list((tmp_path / "mine").glob("*.npy"))) == 4


# ---- splits ---------------------------------------------------------------------------------------------------------


def test_folds_cover_the_training_images_once_and_no_test_image(tmp_path):
    root = write_kaggle(tmp_path / "d", splits={"train": [f"{i:03d}" for i in range(1, 12)], "test1": ["151", "152"]})
    held = []
    for fold in range(5):
        data = LandmarkData(root=str(root), pixel_size=0.1, image_size=32, holdout=0.2, fold=fold)
        train, val = data.names("train"), data.names("val")
        assert sorted(train + val) == [f"{i:03d}" for i in range(1, 12)]
        assert data.names("test") == ["151", "152"]
        held += val
    assert sorted(held) == [f"{i:03d}" for i in range(1, 12)]


def test_the_hold_out_follows_the_seed(tmp_path):
    spec = data_set(tmp_path / "d")
    first, again, other = (LandmarkData(**spec, holdout=0.3, seed=s).names("val") for s in (1, 1, 2))
    assert first == again
    assert len(first) == 3
    assert set(first) != set(other)


def test_own_val_split_is_used_instead_of_a_hold_out(tmp_path):
    rows = [(f"{i:03d}.png", split, 3, 4) for i, split in enumerate(["train", "train", "train", "val"])]
    root = write_csv(tmp_path / "d", header=("file", "split", "p1x", "p1y"), rows=rows)
    data = LandmarkData(root=str(root), format="csv", pixel_size=0.1, image_size=32, holdout=0.5)
    assert len(data.names("train")) == 3
    assert len(data.names("val")) == 1


def test_hold_out_of_nothing(tmp_path):
    data = LandmarkData(**data_set(tmp_path / "d"), holdout=0)
    data.setup("fit")
    assert len(data.names("train")) == 10
    assert data.val_dataloader() == []
    with pytest.raises(InputError, match=r"no images to validate on \(data\.holdout is 0"):
        LandmarkData(**data_set(tmp_path / "d"), holdout=0).setup("validate")


def test_unknown_test_split_lists_those_that_exist(tmp_path):
    root = write_isbi(tmp_path / "d", splits={"TrainingData": ("001", "002"), "Test1Data": ("151",)})
    data = LandmarkData(root=str(root), pixel_size=0.1, image_size=32, test_split="test9")
    with pytest.raises(InputError, match="'test9' is not in this data set; it has train, test1"):
        data.setup("test")
    assert LandmarkData(root=str(root), pixel_size=0.1, image_size=32).names("test") == ["151"]
    assert LandmarkData(root=str(root), pixel_size=0.1, image_size=32, test_split="train").names("test") == [
        "001",
        "002",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 100}, r"data\.image_size: expected a multiple of 32.*got 100"),
        ({"image_size": 0}, r"data\.image_size"),
        ({"image_size": [64, 70]}, r"data\.image_size"),
        ({"image_size": [64, 64, 64]}, r"data\.image_size"),
        ({"batch_size": 0}, r"data\.batch_size: expected 1 or more, got 0"),
        ({"synthetic_train": 0}, r"data\.synthetic_train"),
        ({"holdout": 1.0}, r"data\.holdout: expected 0 or more and below 1"),
        ({"holdout": 0.2, "fold": 5}, r"data\.fold: with holdout 0\.2 there are 5 folds from 0, got 5"),
        ({"fold": -1}, r"data\.fold"),
    ],
)
def test_senseless_arguments_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        LandmarkData(format="synthetic", **changes)


def test_augmentation_is_checked_before_training(tmp_path):
    data = LandmarkData(**data_set(tmp_path / "d"), augment=Augmentation(flip=0.5))
    with pytest.raises(InputError, match=r"data\.augment\.flip needs data\.flip_pairs"):
        data.setup("fit")


def test_no_root_is_named():
    with pytest.raises(InputError, match=r"data\.root: name the data folder"):
        LandmarkData().setup("fit")


def test_damaged_image_is_named(tmp_path):
    spec = data_set(tmp_path / "d")
    bad = tmp_path / "d" / "images" / "004.png"
    bad.write_bytes(b"no image")
    with pytest.raises(InputError, match="damaged or no image") as error:
        LandmarkData(**spec).setup("fit")
    assert str(bad) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_pixel_size_is_said_loudly(tmp_path):
    data = LandmarkData(**data_set(tmp_path / "d", pixel_size=None))
    with pytest.warns(UserWarning, match=r"pixel_size is unknown for the train images.*PIXELS"):
        data.setup("fit")
    assert np.isnan(data.prepared("train").spacing).all()


def test_hyperparameters_are_plain_and_build_the_same_again(tmp_path):
    data = LandmarkData(**data_set(tmp_path / "d"), augment=Augmentation(rotation=3.0))
    values = dict(data.hparams)
    torch.save(values, tmp_path / "h.pt")
    again = LandmarkData(**torch.load(tmp_path / "h.pt", weights_only=True))
    assert again._augment == Augmentation(rotation=3.0)
    assert dict(again.hparams) == values


# ---- unlabelled images ----------------------------------------------------------------------------------------------


def test_predict_folder_needs_no_labels(tmp_path):
    for name in ("b10.png", "b2.png"):
        write_image(tmp_path / "x" / name, (50, 70))
    (tmp_path / "x" / "notes.txt").write_text("no image")
    data = LandmarkData(predict_dir=str(tmp_path / "x"), pixel_size=[0.1, 0.2], image_size=64, eval_batch_size=2)
    assert not data.has_labels
    data.setup("predict")
    (batch,) = list(data.predict_dataloader())
    assert data.names("predict") == ["b2.png", "b10.png"]
    assert batch.image.shape == (2, 1, 64, 64)
    assert batch.points.shape == (2, 0, 2)
    np.testing.assert_allclose(batch.spacing.numpy(), [[0.1, 0.2]] * 2)
    np.testing.assert_allclose(batch.matrix[0].numpy(), Letterbox((50, 70), (64, 64)).matrix)


def test_predict_dir_may_be_one_image(tmp_path):
    data = LandmarkData(predict_dir=str(write_image(tmp_path / "one.png")), image_size=32)
    data.setup("predict")
    assert data.names("predict") == ["one.png"]
    assert np.isnan(data.prepared("predict").spacing).all()


def test_predict_dir_leaves_out_damaged_images_by_name(tmp_path):
    write_image(tmp_path / "x" / "a.png")
    (tmp_path / "x" / "b.png").write_bytes(b"no image")
    data = LandmarkData(predict_dir=str(tmp_path / "x"), image_size=32)
    with pytest.warns(UserWarning, match=r"left out: .*b\.png: damaged"):
        data.setup("predict")
    assert data.names("predict") == ["a.png"]
    (tmp_path / "x" / "a.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="left out"), pytest.raises(InputError, match="no readable image"):
        LandmarkData(predict_dir=str(tmp_path / "x"), image_size=32).setup("predict")


def test_missing_predict_dir_is_named(tmp_path):
    with pytest.raises(InputError, match=r"data\.predict_dir: no file or folder"):
        LandmarkData(predict_dir=str(tmp_path / "nowhere"), image_size=32).setup("predict")


# ---- batches --------------------------------------------------------------------------------------------------------


def epoch(data, number=0):
    """What a training step receives, batch by batch."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return list(loader)


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert isinstance(a, LandmarkBatch)
        for name, x, y in zip(LandmarkBatch._fields, a, b, strict=True):
            assert x.dtype == y.dtype, name
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"store": "auto"}, id="auto"),
        pytest.param({"store": "ram", "num_workers": 0}, id="ram"),
        pytest.param({"store": "ram", "num_workers": 2}, id="ram, 2 workers"),
        pytest.param({"store": "disk", "num_workers": 0}, id="disk"),
    ],
)
def test_every_store_gives_the_same_batches(tmp_path, changes):
    spec = {**data_set(tmp_path / "d"), "holdout": 0.2, "seed": 3}
    expected = LandmarkData(**spec, store="gpu")
    data = LandmarkData(**spec, **changes, persistent_workers=False)
    if changes["store"] == "disk":
        assert isinstance(data.prepared("train").images, np.memmap)
    for number in (0, 1):
        assert_same(epoch(data, number), epoch(expected, number))
    assert_same(list(data.val_dataloader()), list(expected.val_dataloader()))


def test_gpu_store_over_a_mapped_cache(tmp_path):
    """`disk` has been used before: the cache file is there, and the array read from it may not be writable."""
    spec = data_set(tmp_path / "d")
    assert_same(epoch(LandmarkData(**spec, store="disk", num_workers=0)), epoch(LandmarkData(**spec, store="gpu")))


def test_order_depends_on_seed_and_epoch_alone(tmp_path):
    spec = {**data_set(tmp_path / "d"), "holdout": 0.0}
    data = LandmarkData(**spec, seed=1)
    first, second = epoch(data, 0), epoch(data, 1)
    assert_same(epoch(data, 0), first)
    torch.manual_seed(99)
    assert_same(epoch(LandmarkData(**spec, seed=1), 1), second)

    def order(batches):
        return torch.cat([b.position for b in batches]).tolist()

    assert order(first) != order(second)
    assert order(first) != order(epoch(LandmarkData(**spec, seed=2), 0))
    assert len({int(b.seed) for b in first + second}) == 6


def test_batches_hold_what_the_file_says(tmp_path):
    data = LandmarkData(**data_set(tmp_path / "d"), holdout=0, drop_last=False)
    batches = epoch(data)
    assert [len(b.image) for b in batches] == [3, 3, 3, 1]
    assert sorted(torch.cat([b.position for b in batches]).tolist()) == list(range(10))
    table = data.table.splits["train"]
    for b in batches:
        assert b.image.dtype == torch.uint8
        for i, position in enumerate(b.position.tolist()):
            sample = table[position]
            np.testing.assert_array_equal(b.target[i].numpy(), sample.points)
            homogeneous = np.c_[sample.points, np.ones(2)]
            np.testing.assert_allclose(b.points[i].numpy(), (homogeneous @ b.matrix[i].numpy().T)[:, :2], rtol=1e-5)
            height, width = sample.read_image(1).shape[1:]
            box = Letterbox((height, width), (64, 64))
            np.testing.assert_array_equal(b.image[i].numpy(), box.apply(sample.read_image(1)))
    assert sum(int(torch.isnan(b.points).any(-1).sum()) for b in batches) == 1


def test_drop_last_and_small_sets(tmp_path):
    spec = {**data_set(tmp_path / "d", 4), "holdout": 0}
    assert [len(b.image) for b in epoch(LandmarkData(**spec))] == [3]
    assert [len(b.image) for b in epoch(LandmarkData(**{**spec, "batch_size": 16}))] == [4]


class _Recorder(LightningModule):
    """Keeps the batches that a training step sees."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.evaluated = [], []

    def training_step(self, batch, _):
        self.seen.append(batch)
        return self.weight * 0

    def validation_step(self, batch, _):
        self.evaluated.append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("store", ["gpu", "ram"])
def test_training_batches_are_augmented_by_their_seed_and_others_are_not(tmp_path, store):
    spec = {**data_set(tmp_path / "d"), "holdout": 0.2, "store": store, "num_workers": 0}
    seen = _Recorder()
    pairs = [[0, 1]]
    augment = Augmentation(flip=0.5)
    data = LandmarkData(**spec, flip_pairs=pairs, augment=augment)
    Trainer(max_epochs=2, **CPU).fit(seen, datamodule=data)
    plain = LandmarkData(**spec)
    expected = epoch(plain, 0) + epoch(plain, 1)
    assert len(seen.seen) == len(expected) == 4
    for got, raw in zip(seen.seen, expected, strict=True):
        out = augment_batch(raw.image, raw.points, augment, int(raw.seed), pairs)
        torch.testing.assert_close(got.image, out.image, rtol=0, atol=0)
        torch.testing.assert_close(got.points, out.points, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(got.matrix, out.matrix.double() @ raw.matrix)
        torch.testing.assert_close(got.target, raw.target, rtol=0, atol=0, equal_nan=True)
    for got in seen.evaluated:
        assert got.image.dtype == torch.uint8


def test_original_points_undo_the_augmented_matrix(tmp_path):
    seen = _Recorder()
    augment = Augmentation(rotation=20.0, scale=0.2, shift=0.1)
    data = LandmarkData(**data_set(tmp_path / "d"), holdout=0, augment=augment)
    Trainer(max_epochs=1, **CPU).fit(seen, datamodule=data)
    for got in seen.seen:
        torch.testing.assert_close(
            original_points(got.points, got.matrix), got.target, rtol=0, atol=1e-3, equal_nan=True
        )


@pytest.mark.parametrize("workers", [0, 2])
def test_albumentations_in_the_loader(tmp_path, workers):
    spec = {**data_set(tmp_path / "d"), "holdout": 0, "augment_on": "cpu", "persistent_workers": False}
    plain, first = epoch(LandmarkData(**spec, augment=None, num_workers=0)), None
    for store in ("gpu", "ram", "disk"):
        batches = epoch(LandmarkData(**spec, store=store, num_workers=workers))
        first = first or batches
        assert_same(batches, first)
    for got, raw in zip(first, plain, strict=True):
        assert got.image.dtype == torch.uint8
        assert not torch.equal(got.image, raw.image)
        assert torch.equal(torch.isnan(got.points), torch.isnan(raw.points))
        assert (torch.nan_to_num(got.points) - torch.nan_to_num(raw.points)).abs().amax((1, 2)).min() > 0.05
    seen = _Recorder()
    Trainer(max_epochs=1, **CPU).fit(seen, datamodule=LandmarkData(**spec, num_workers=workers))
    assert_same(seen.seen, first)  # and not augmented a second time on the device


# ---- EpochBatches ---------------------------------------------------------------------------------------------------


def sampler(length=23, batch_size=4, **kwargs):
    return EpochBatches(length, batch_size, **{"shuffle": True, "drop_last": False, **kwargs})


def test_an_epoch_holds_every_index_once():
    batches = list(sampler())
    assert len(sampler()) == len(batches) == 6
    assert sorted(torch.cat([i for i, _ in batches]).tolist()) == list(range(23))
    assert len(sampler(drop_last=True)) == len(list(sampler(drop_last=True))) == 5
    assert all(len(i) == 4 for i, _ in sampler(drop_last=True))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("length", [23, 24, 5])
def test_ranks_share_the_indices(shuffle, length):
    for number in range(2):
        shares = []
        for rank in range(2):
            own = sampler(length, shuffle=shuffle, rank=rank, world=2)
            own.set_epoch(number)
            shares.append(torch.cat([i for i, _ in own]).tolist())
        assert sorted(shares[0] + shares[1]) == list(range(length))
        if not shuffle:
            assert shares[0] == list(range(0, length, 2))


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize(("length", "batch_size"), [(23, 4), (9, 4), (7, 2), (24, 4), (17, 4)])
def test_ranks_train_equally_many_steps(length, batch_size, drop_last):
    """Or the longer one waits for the gradients of the other for ever."""
    steps = {len(list(sampler(length, batch_size, drop_last=drop_last, rank=rank, world=2))) for rank in range(2)}
    assert len(steps) == 1


def test_seeds_differ_between_epochs_batches_and_ranks():
    seen = set()
    for rank in range(2):
        for number in range(3):
            own = sampler(rank=rank, world=2)
            own.set_epoch(number)
            seen |= {seed for _, seed in own}
    assert len(seen) == 2 * 3 * 3


@pytest.mark.parametrize("store", ["gpu", "ram"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_resumes_in_the_middle_of_an_epoch(tmp_path, store, workers):
    spec = {**data_set(tmp_path / "d"), "holdout": 0, "drop_last": False, "store": store}
    spec |= {"num_workers": workers, "prefetch_factor": 2}
    expected = epoch(LandmarkData(**spec), 1)
    loader = LandmarkData(**spec).train_dataloader()
    loader.sampler.set_epoch(1)
    running = iter(loader)
    next(running), next(running)
    state = loader.state_dict()
    assert state == {"position": 2}  # whatever workers have fetched ahead

    fresh = LandmarkData(**spec).train_dataloader()
    fresh.load_state_dict(state)
    fresh.sampler.set_epoch(1)
    assert_same(list(fresh), expected[2:])
    assert fresh.state_dict() == {"position": 0}  # the epoch is over
    fresh.sampler.set_epoch(1)
    assert_same(list(fresh), expected)  # only once


def test_auto_store_follows_the_size(tmp_path, monkeypatch):
    data = LandmarkData(**data_set(tmp_path / "d"))
    prepared = data.prepared("train")
    assert data._resolve_store(prepared) == "gpu"
    huge = SimpleNamespace(images=SimpleNamespace(nbytes=5 * 2**30))
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**23}[name])  # 32 GiB
    assert data._resolve_store(huge) == "ram"
    huge.images.nbytes = 20 * 2**30
    assert data._resolve_store(huge) == "disk"


def test_elastic_is_refused_where_albumentations_would_round_the_points():
    with pytest.raises(InputError, match=r"data\.augment\.elastic"):
        LandmarkData(format="synthetic", augment=Augmentation(elastic=0.01), augment_on="cpu")
