"""The data module: an epoch's order, stores that agree, exact resume, and one clear line for what is wrong."""

import logging
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from lit_common.loaders import IndexLoader, ResumableLoader
from lit_patchnerf.data import EvalFrames, PatchVideoData, StepBatches, TrainSamples
from lit_patchnerf.patches import Geometry, frame_patches, plan_geometry
from lit_patchnerf.samples import FrameBatch, MomentBatch, TrainBatch
from lit_patchnerf.synthetic import SyntheticVideo
from lit_patchnerf.video import write_frames
from tests.helpers.errors import refused

SCENE = {"frames": 10, "height": 18, "width": 26, "shapes": 2}
SMALL = {"synthetic": SCENE, "grid": [2, 3], "data_split": "6_7_10", "batch_size": 4, "num_workers": 0}
TRAINED = 6 * 6  # patches


def data(stage: str | None = "fit", **options) -> PatchVideoData:
    module = PatchVideoData(**{**SMALL, **options})
    if stage:
        module.setup(stage)
    return module


def epoch(module: PatchVideoData, number: int = 0) -> list[TrainBatch]:
    loader = module.train_dataloader()
    loader.sampler.set_epoch(number)
    return list(loader)


def order(batches: list[TrainBatch]) -> list[int]:
    return torch.cat([batch.indices.flatten() for batch in batches]).tolist()


class Watcher(LightningModule):
    """Keeps what it is given; its one weight depends on the order of the batches."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.seen: dict[str, list] = {"train": [], "val": [], "test": [], "predict": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(batch.indices.flatten().tolist())
        return (self.gain - batch.pixels.float().mean() / 255) ** 2

    def validation_step(self, batch, batch_idx):
        self.seen["val"].append(batch)

    def test_step(self, batch, batch_idx):
        self.seen["test"].append(batch)

    def predict_step(self, batch, batch_idx):
        self.seen["predict"].append(batch)
        return batch

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.05)


class SaveAt(Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def run(folder, **options) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "num_sanity_val_steps": 0}
    return Trainer(default_root_dir=folder, **{**quiet, **options})


def module_of(**hparams) -> LightningModule:
    module = Watcher()
    module.save_hyperparameters(hparams)
    return module


@pytest.fixture
def clip(tmp_path):
    """The scene as a folder of images."""
    write_frames(tmp_path / "clip", SyntheticVideo(**SCENE).draw())
    return str(tmp_path / "clip")


@pytest.fixture
def targets(monkeypatch):
    """A stand-in for the towers; gives the table it makes and how it was called."""
    calls = []
    module = ModuleType("lit_patchnerf.clip")

    def embedding_table(video, provider, weights, cache_dir, device):
        calls.append((provider, weights, cache_dir, device))
        shape = len(video.frames), *video.geometry.grid, 5
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()

    module.embedding_table = embedding_table
    monkeypatch.setitem(sys.modules, "lit_patchnerf.clip", module)
    return calls


def test_patches_are_cut_from_the_canvas():
    module = data(steps_per_batch=3)
    assert module.geometry == plan_geometry((18, 26), grid=(2, 3))
    assert (module.count, module.fps, module.steps_per_epoch) == (10, 24.0, 9)
    assert module.frames.shape == (10, 18, 27, 3)  # a column of padding
    batches = epoch(module)
    assert len(batches) == len(module.train_dataloader()) == 3
    for batch in batches:
        assert batch.indices.shape == (3, 4)
        assert batch.indices.dtype == torch.int64
        assert batch.pixels.shape == (3, 4, 3, 9, 9)
        assert batch.pixels.dtype == torch.uint8
        assert batch.embeddings is None
        for k in range(3):
            for b in range(4):
                t, r, c = np.unravel_index(int(batch.indices[k, b]), (10, 2, 3))
                expected = module.frames[t, 9 * r : 9 * r + 9, 9 * c : 9 * c + 9].permute(2, 0, 1)
                assert torch.equal(batch.pixels[k, b], expected)


def test_an_epoch_has_every_trained_patch_once():
    split = data().split
    assert (split.train, split.unused, split.val) == ([0, 1, 2, 3, 4, 5], [6], [7, 8, 9])
    found = order(epoch(data()))
    assert sorted(found) == frame_patches(split.train, (2, 3)).tolist()
    assert found != sorted(found)
    assert order(epoch(data(), 1)) != found
    assert order(epoch(data(seed=1))) != found
    assert order(epoch(data())) == found


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("size", [4, 5])
def test_the_order_does_not_depend_on_the_steps_of_a_batch(size, drop_last):
    plain = order(epoch(data(batch_size=size, drop_last=drop_last)))
    for steps in (2, 3, 5):
        module = data(batch_size=size, steps_per_batch=steps, drop_last=drop_last)
        batches = epoch(module)
        found = order(batches)
        assert found == plain[: len(found)]
        assert all(batch.indices.shape[1] == size for batch in batches)
        assert all(len(batch.indices) == steps for batch in batches[:-1])
        assert sum(len(batch.indices) for batch in batches) == module.steps_per_epoch
        if drop_last:
            assert found == plain
            assert len(found) == TRAINED // size * size
        else:  # every patch, and the last step filled up from the beginning
            assert set(found) == set(range(TRAINED))
            assert len(found) == -(-TRAINED // size) * size
            assert found[TRAINED:] == found[: len(found) - TRAINED]


def test_more_steps_than_an_epoch_has_are_cut_down(caplog):
    caplog.set_level(logging.INFO)
    module = data(batch_size=5, steps_per_batch=50)
    assert "data.steps_per_batch is 50, but an epoch has 7 steps" in caplog.text
    (batch,) = epoch(module)
    assert batch.indices.shape == (7, 5)
    assert order([batch]) == order(epoch(data(batch_size=5)))


def test_a_split_that_yaml_took_for_a_number_is_refused():
    refused(lambda: PatchVideoData(data_split=6610), "data.data_split is the number 6610", 'in quotes: "6_6_10"')


def test_batches_are_gathered_without_a_look_at_the_device():
    """Any value that the host asked a meta tensor for would raise."""
    frames, index = (torch.empty(shape, device="meta") for shape in ((5, 8, 12, 3), (6,)))
    table = torch.empty(5, 2, 3, 7, device="meta")
    weight, mask = (torch.empty(shape, device="meta") for shape in ((6, 1, 4, 4), (1, 1, 8, 12)))
    order = index.long()
    batch = TrainSamples(frames, torch.empty(30, device="meta").long(), (2, 3), 3, weight, table).batch(order, order, 0)
    assert [tuple(x.shape) for x in batch] == [(2, 3), (2, 3, 3, 4, 4), (2, 3, 1, 4, 4), (2, 3, 7)]
    batch = TrainSamples(frames, torch.empty(4, device="meta").long(), None, 3, mask, table).batch(order, order, 0)
    assert [tuple(x.shape) for x in batch] == [(2, 3), (2, 3, 3, 8, 12), (2, 3, 1, 8, 12), (2, 3, 2, 3, 7)]
    whole = EvalFrames(frames, torch.tensor([4, 1, 3]), torch.empty(5, device="meta"), mask.bool(), table)
    batch = whole.batch(order[:2], torch.tensor([2, 0]), 0)
    assert batch.frames == [3, 4]
    assert batch.hidden.shape == (2, 1, 8, 12)


def test_whole_frames_as_samples(targets):
    module = data(sample="frame", batch_size=2, steps_per_batch=2, drop_last=False, embeddings="toy:5")
    batches = epoch(module)
    assert [tuple(batch.pixels.shape) for batch in batches] == [(2, 2, 3, 18, 27), (1, 2, 3, 18, 27)]
    assert sorted(order(batches)) == module.split.train
    for batch in batches:
        assert torch.equal(batch.pixels, module.frames[batch.indices].permute(0, 1, 4, 2, 3))
        assert torch.equal(batch.embeddings, module.embedding_table[batch.indices])
        assert batch.weight.shape == (*batch.indices.shape, 1, 18, 27)
        assert batch.weight.sum((2, 3, 4)).unique().tolist() == [18 * 26]  # not the padding


def test_padding_has_no_weight_and_no_padding_none():
    assert all(batch.weight is None for batch in epoch(data(crop=[18, 24])))
    for batch in epoch(data()):
        assert batch.weight.shape == (1, 4, 1, 9, 9)
        assert batch.weight.dtype == torch.float32
        last = batch.indices % 3 == 2
        assert torch.equal(batch.weight.sum((2, 3, 4)), torch.where(last, 72.0, 81.0))
        assert not batch.weight[last][..., -1].any()


def test_the_mask_hides_pixels_of_training_and_shows_them_in_evaluation(tmp_path):
    white = np.random.default_rng(0).random((18, 26)) < 0.4
    white[:9, :9] = True  # the first patch of every frame
    cv2.imwrite(str(tmp_path / "mask.png"), white.astype(np.uint8) * 255)
    module = data(mask=str(tmp_path / "mask.png"), batch_size=5)
    assert module.hidden.shape == (1, 1, 18, 27)
    padded = np.pad(white, ((0, 0), (0, 1)), constant_values=True)
    batches = epoch(module)
    assert len(order(batches)) == 6 * 5
    for index, weight in ((i, w) for b in batches for i, w in zip(b.indices[0], b.weight[0], strict=True)):
        r, c = divmod(int(index) % 6, 3)
        assert (r, c) != (0, 0)  # nothing of it can be seen
        np.testing.assert_array_equal(weight[0].numpy() == 0, padded[9 * r : 9 * r + 9, 9 * c : 9 * c + 9])
    (batch, *_) = module.val_dataloader()
    assert batch.hidden.shape == (4, 1, 18, 27)
    np.testing.assert_array_equal(batch.hidden[3, 0, :, :26].numpy(), white)
    assert not batch.hidden[..., 26].any()
    frames = epoch(data(sample="frame", mask=str(tmp_path / "mask.png")))
    np.testing.assert_array_equal(frames[0].weight[0, 1, 0].numpy() == 0, padded)


def test_embeddings_come_with_patches_and_frames(targets, tmp_path):
    module = data(embeddings="timm:tower", embeddings_weights="w.pt", cache_dir=str(tmp_path))
    table = module.embedding_table
    assert (module.embedding_dim, table.dtype) == (5, torch.float16)
    for batch in epoch(module):
        assert torch.equal(batch.embeddings, table.reshape(-1, 5)[batch.indices])
    assert torch.equal(torch.cat([batch.embeddings for batch in module.val_dataloader()]), table)
    assert targets == [("timm:tower", "w.pt", tmp_path, torch.device("cpu"))]  # made once
    assert data().embedding_dim is None
    sys.modules["lit_patchnerf.clip"].embedding_table = lambda *_: torch.zeros(10, 1, 1, 5)
    refused(lambda: data(embeddings="file:other.npy"), "data.embeddings", "(10, 2, 3)", "(10, 1, 1, 5)")


@pytest.mark.parametrize("sample", ["patch", "frame"])
def test_all_stores_give_the_same_batches(clip, tmp_path, sample, targets):
    def batches(**options):
        module = data(
            video=clip,
            sample=sample,
            steps_per_batch=2 if sample == "patch" else 1,
            cache_dir=str(tmp_path / "cache"),
            persistent_workers=False,
            mask="inpaint_3",
            embeddings="toy",
            **options,
        )
        kind = IndexLoader if options["store"] == "gpu" else ResumableLoader
        assert isinstance(module.train_dataloader(), kind)
        assert isinstance(module.val_dataloader(), kind)
        return epoch(module, 3) + list(module.val_dataloader())

    resident = batches(store="gpu")
    for options in ({"store": "ram"}, {"store": "disk"}, {"store": "disk", "num_workers": 2}):
        others = batches(**options)
        assert len(others) == len(resident) > 3
        for a, b in zip(resident, others, strict=True):
            assert type(a) is type(b)
            for name in a._fields:
                x, y = getattr(a, name), getattr(b, name)
                assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, name


def test_evaluation_has_every_frame_in_order_with_its_role():
    for stage in ("validate", "test"):
        module = data(stage, eval_batch_size=3)
        batches = list(module.val_dataloader() if stage == "validate" else module.test_dataloader())
        assert [batch.frames for batch in batches] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
        assert torch.cat([batch.split for batch in batches]).tolist() == [0] * 6 + [1] + [2] * 3
        for batch in batches:
            assert isinstance(batch, FrameBatch)
            assert batch.indices.tolist() == batch.frames
            assert torch.equal(batch.pixels, module.frames[batch.indices].permute(0, 3, 1, 2))
            assert batch.hidden is None
            assert batch.embeddings is None
    held = data("validate", eval_frames="held_out")
    assert [batch.frames for batch in held.val_dataloader()] == [[7, 8, 9]]
    with pytest.warns(UserWarning, match="holds out none"):
        everything = data("validate", eval_frames="held_out", data_split="9_10_10")
    assert sum(len(batch.frames) for batch in everything.val_dataloader()) == 10


def test_a_shuffled_split_and_options_of_the_video(clip):
    module = data(video=clip, split_seed=3, limit=8, fps=50, crop=[16, 24], patch_size=[8, 8], grid=None)
    assert (module.count, module.fps, module.geometry.grid) == (8, 50, (2, 3))
    assert module.split.train != sorted(range(6))
    drawn = data(split_seed=3, limit=8, fps=50, crop=[16, 24], patch_size=[8, 8], grid=None)
    assert (drawn.count, drawn.fps, drawn.split) == (8, 50, module.split)
    assert torch.equal(drawn.frames, module.frames)


@pytest.mark.parametrize("store", ["gpu", "ram"])
@pytest.mark.parametrize("stop", [3, 6, 8])
def test_resumes_in_mid_epoch(tmp_path, store, stop):
    def fit(ckpt_path=None, callbacks=()):
        module = Watcher()
        trainer = run(tmp_path, max_epochs=3, callbacks=list(callbacks), limit_val_batches=0)
        source = data(None, store=store, batch_size=3, steps_per_batch=2, persistent_workers=False)
        trainer.fit(module, datamodule=source, ckpt_path=ckpt_path, weights_only=True)
        return module

    path = tmp_path / "mid.ckpt"
    whole = fit(callbacks=[SaveAt(stop, path)])
    assert len(whole.seen["train"]) == 3 * 6
    assert whole.seen["train"][:6] != whole.seen["train"][6:12]
    rest = fit(path)
    assert rest.seen["train"] == whole.seen["train"][stop:]
    assert torch.equal(rest.gain, whole.gain)


@pytest.mark.parametrize("store", ["gpu", "ram"])
def test_a_resumed_epoch_begins_after_the_batches_that_were_trained_on(store):
    """Whatever the loader's own state says: an interrupt leaves it one ahead."""
    module = in_process(data(None, store=store), 0, 1)
    whole = order(epoch(module))
    progress = SimpleNamespace(batch_progress=SimpleNamespace(current=SimpleNamespace(ready=2)))
    module.trainer.training, module.trainer.fit_loop = True, SimpleNamespace(epoch_loop=progress)
    assert order(epoch(module)) == whole[2 * 4 :]


def test_a_trainer_runs_every_stage(tmp_path, targets):
    trainer = run(tmp_path, max_epochs=2, devices=1)
    module, source = Watcher(), data(None, steps_per_batch=2, embeddings="toy", predict_range=[2, 5], predict_step=0.5)
    trainer.fit(module, datamodule=source)
    batches = len(module.seen["train"]) // 2
    assert module.seen["train"][:batches] != module.seen["train"][batches:]
    assert sum(len(batch.frames) for batch in module.seen["val"]) == 2 * 10
    trainer.test(module, datamodule=source, verbose=False)
    assert torch.equal(torch.cat([batch.indices for batch in module.seen["test"]]), torch.arange(10))
    found = trainer.predict(module, datamodule=source)
    assert [number for batch in found for number in batch.numbers] == [2, 2.5, 3, 3.5, 4, 4.5, 5]
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    stored = torch.load(tmp_path / "plain.ckpt", weights_only=True)["datamodule_hyper_parameters"]
    again = PatchVideoData(**{name: stored[name] for name in PatchVideoData.checkpoint_fields})
    assert again.geometry == source.geometry


def in_process(module: PatchVideoData, rank: int, world: int) -> PatchVideoData:
    """The module as one of several processes has it."""
    strategy = SingleDeviceStrategy(torch.device("cpu"))
    module.trainer = SimpleNamespace(global_rank=rank, world_size=world, strategy=strategy, training=False)
    module.setup("fit")
    return module


def test_processes_share_an_epoch_and_make_the_same_steps():
    for drop_last, size, steps in ((True, 4, 1), (False, 5, 2), (True, 2, 3)):
        shares, held, made = [], [], set()
        for rank in range(4):
            module = data(None, drop_last=drop_last, batch_size=size, steps_per_batch=steps, grid=[2, 2], limit=9)
            batches = epoch(in_process(module, rank, 4))
            shares.append(order(batches))
            made.add(tuple(tuple(batch.indices.shape) for batch in batches))
            held += [frame for batch in module.val_dataloader() for frame in batch.frames]
        assert len(made) == 1
        assert sorted(held) == list(range(9))
        together = [index for share in shares for index in set(share)]
        assert len(together) == len(set(together))
        if not drop_last:
            assert sorted(together) == list(range(6 * 4))
    refused(lambda: in_process(data(None, batch_size=10), 0, 4), "data.batch_size is 10", "at most 9", "4 processes")


def test_more_processes_than_frames_to_evaluate_are_refused():
    module = in_process(data(None, data_split="9_9_10", eval_frames="held_out"), 1, 2)
    refused(module.val_dataloader, "trainer.devices: 2 processes for 1 samples to evaluate", "one for each")


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize(("length", "size", "world"), [(37, 3, 1), (37, 3, 4), (9, 9, 1), (23, 5, 2)])
def test_batches_of_steps(length, size, world, steps):
    for drop_last in (True, False):
        found = []
        for rank in range(world):
            batches = StepBatches(length, size, steps, drop_last=drop_last, rank=rank, world=world)
            found.append([len(indices) for indices, _ in batches])
            assert len(batches) == len(found[-1])
            assert batches.steps * size == sum(found[-1])
        assert all(one == found[0] for one in found)  # or processes would wait for each other
        assert all(samples % size == 0 for samples in found[0])
        made = sum(found[0]) // size
        share = length // world
        assert made == (share // size if drop_last else -(-share // size))


def test_predicts_without_the_video(tmp_path):
    geometry = plan_geometry((30, 40), crop=(20, 40), grid=(2, 4))
    module = module_of(frames=21, geometry=geometry.to_dict(), fps=12.5)
    options = {"video": str(tmp_path / "gone.mp4"), "predict_range": [19.5, 20], "predict_step": 0.25}
    source = PatchVideoData(**options, region=[5, 10, 25, 30])
    (batch,) = run(tmp_path).predict(module, datamodule=source)
    assert isinstance(batch, MomentBatch)
    assert batch.numbers == [19.5, 19.75, 20.0]
    assert torch.equal(batch.times, torch.tensor([19.5 / 20, 19.75 / 20, 1.0]))
    assert (source.geometry, source.count, source.fps) == (geometry, 21, 12.5)
    assert source.region == (5, 10, 25, 30)
    every = PatchVideoData(video=options["video"], eval_batch_size=8, fps=30)
    batches = run(tmp_path).predict(module, datamodule=every)
    assert [len(batch.numbers) for batch in batches] == [8, 8, 5]
    # Frames have the very times that they were trained at.
    assert torch.equal(torch.cat([batch.times for batch in batches]), torch.arange(21) / 20)
    assert every.fps == 30
    refused(lambda: every.setup("fit"), "data.video", "no such file")  # which needs the video again


def test_moments_in_steps_that_are_no_binary_fractions():
    module = data("predict", predict_range=[1, 3], predict_step=0.1, eval_batch_size=100)
    (batch,) = module.predict_dataloader()
    assert batch.numbers == [round(1 + i / 10, 1) for i in range(21)]
    (batch,) = data("predict", predict_range=[4, 4]).predict_dataloader()
    assert batch.numbers == [4.0]


def test_hyperparameters_are_plain():
    module = data(None, crop=(16, 24), predict_range=(0, 2))
    assert module.hparams["crop"] == [16, 24]
    assert module.hparams["predict_range"] == [0, 2]
    assert PatchVideoData(**module.hparams).hparams == module.hparams
    assert set(PatchVideoData.checkpoint_fields) <= set(module.hparams)
    assert Geometry.from_dict(module.geometry.to_dict()) == module.geometry


@pytest.mark.parametrize(
    ("stage", "options", "parts"),
    [
        (None, {"batch_size": 0}, ["data.batch_size is 0", "1 or more"]),
        (None, {"steps_per_batch": 0}, ["data.steps_per_batch is 0"]),
        (None, {"eval_batch_size": 0}, ["data.eval_batch_size is 0"]),
        (None, {"num_workers": -1}, ["data.num_workers is -1"]),
        (None, {"sample": "pixel"}, ["data.sample is 'pixel'", "patch, frame"]),
        (None, {"eval_frames": "val"}, ["data.eval_frames is 'val'", "all, held_out"]),
        (None, {"store": "tape"}, ["data.store is 'tape'"]),
        (None, {"limit": 1}, ["data.limit is 1"]),
        (None, {"fps": 0}, ["data.fps is 0"]),
        (None, {"predict_step": float("nan")}, ["data.predict_step is nan"]),
        (None, {"data_split": "7_6_10"}, ["data.data_split"]),
        ("fit", {"video": "/nowhere.mp4"}, ["data.video", "/nowhere.mp4"]),
        ("fit", {"synthetic": {"frame": 3}}, ["data.synthetic", "'frame'", "frames, height"]),
        ("fit", {"synthetic": {"frames": 1}}, ["data.synthetic: frames is 1"]),
        ("fit", {"synthetic": {"frames": "many"}}, ["data.synthetic", "many"]),
        ("fit", {"crop": [20, 26]}, ["data.crop is 20x26", "18x26"]),
        ("fit", {"grid": [0, 2]}, ["data.grid"]),
        ("fit", {"batch_size": 37}, ["data.batch_size is 37", "at most 36", "36 patches of 6 trained frames"]),
        ("fit", {"batch_size": 7, "sample": "frame", "drop_last": False}, ["at most 6", "6 trained frames"]),
        ("fit", {"mask": "inpaint_20"}, ["data.mask is inpaint_20", "18x27"]),
        ("fit", {"mask": "nothing.png"}, ["data.mask", "nothing.png"]),
        ("fit", {"store": "disk"}, ["data.store is disk"]),
        ("predict", {"predict_range": [0, 10]}, ["data.predict_range is [0, 10]", "0 to 9"]),
        ("predict", {"predict_range": [-1, 3]}, ["data.predict_range"]),
        ("predict", {"predict_range": [3, 2]}, ["data.predict_range"]),
        ("predict", {"predict_range": [3]}, ["data.predict_range"]),
        ("predict", {"region": [0, 0, 5]}, ["data.region", "top, left, height and width"]),
        ("predict", {"region": [0, 0, 0, 5]}, ["data.region"]),
        ("predict", {"region": [0, -1, 5, 5]}, ["data.region"]),
        ("predict", {"region": [10, 10, 9, 5]}, ["data.region is [10, 10, 9, 5]", "18x26"]),
        ("predict", {"region": [0, 0, 2, 26], "crop": [14, 24]}, ["data.region", "14x24", "row 2 and column 1"]),
    ],
)
def test_what_is_wrong_is_one_line(stage, options, parts):
    refused(lambda: data(stage, **options), *parts)


def test_a_mapped_video_needs_a_cache(clip):
    refused(lambda: data(video=clip, store="disk", cache_dir="none"), "data.store is disk", "data.cache_dir")


@pytest.mark.data
def test_big_buck_bunny_has_the_steps_that_were_counted(tmp_path):
    path = Path(os.environ.get("LIT_DATA", "")) / "bunny" / "bigbuckbunny.mp4"
    if "LIT_DATA" not in os.environ or not path.is_file():
        pytest.skip("LIT_DATA names no folder with bunny")
    for size, steps in ((8, 80), (16, 40), (24, 26), (32, 20)):
        module = data(
            video=str(path),
            crop=[640, 1280],
            grid=None,
            patch_size=[320, 320],
            data_split="6_6_10",
            batch_size=size,
            store="disk",
            cache_dir=str(tmp_path),
        )
        assert module.steps_per_epoch == steps == len(module.train_dataloader())
        assert (len(module.split.train), len(module.split.val)) == (80, 52)
