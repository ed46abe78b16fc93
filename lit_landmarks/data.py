"""The data module: reader, split, store and the batch on its way to the network."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_cli.errors import InputError
from lit_common.loaders import IndexLoader, ResumableLoader, epoch_batches, worker_loader
from lit_common.store import Store, batches_done, cache_folder, choose_store, fits_in_memory, root_device
from lit_common.validation import without_validation
from lit_landmarks.augment import AlbumentationsAugment, Augmentation, augment_batch
from lit_landmarks.loaders import BatchDataset, LandmarkBatch, Resident
from lit_landmarks.readers import make_reader
from lit_landmarks.samples import LandmarkSample, LandmarkTable, find_images
from lit_landmarks.store import Prepared, prepare
from lit_landmarks.synthetic import SyntheticCephalograms


class LandmarkData(LightningDataModule):
    """Images with landmarks, resident on the device when they fit.

    Args:
        root: Data folder (or the CSV/JSON file itself).
        format: Layout on disk; `auto` looks for what is there, `synthetic` draws images and needs no root.
        annotator: Whose points to learn where a data set has two: `mean` of both (un-rounded), `junior` or `senior`.
        pixel_size: mm per original pixel, one number or [x, y], where the files do not say.
        image_size: Side of the frame, or [height, width], in pixels; multiples of 32. Images are letterboxed into it.
        channels: 1 (grey) or 3 (RGB).
        batch_size: Images per training step and device.
        eval_batch_size: Images per evaluation step; by default `batch_size`.
        holdout: Fraction of the training images kept out for validation, when the data has no `val` split of its own;
            0 trains on all of them.
        fold: Which hold-out: with `holdout=0.2`, folds 0 to 4 cover every training image once.
        test_split: Name of the split that `test` uses; `auto` takes the first of test, test1, val; without a
            `val` split of the data, `val` is the hold-out.
        store: `gpu` keeps the images on the device and samples by index, `ram` and `disk` feed it through loader
            workers, `auto` takes the first that fits.
        cache_dir: Folder of the decoded images; `none` keeps nothing on disk.
        augment: Ranges of the augmentation; null switches it off.
        augment_on: `device` (batched, after transfer) or `cpu` (albumentations in the loader workers).
        flip_pairs: 0-based pairs of landmarks that change places in a left-right flip; [] if none do.
        num_workers: Loader processes (`ram` and `disk` only, like the next three).
        prefetch_factor: Batches each worker fetches ahead.
        persistent_workers: Keep the workers between epochs.
        pin_memory: Copy batches into page-locked memory.
        drop_last: Leave out the last batch of an epoch if it is not full.
        predict_dir: Folder of images (or one image) without labels, for `predict`.
        synthetic_train: Training images of the synthetic format.
        synthetic_test: Test images of the synthetic format.
        seed: Seeds the hold-out, the order and the augmentation.

    Raises:
        InputError: with one line, before training starts, when something about the data is not as expected.
    """

    # Taken from a checkpoint unless the command line says otherwise: evaluation must see what training saw.
    checkpoint_fields = ("image_size", "channels", "flip_pairs")

    def __init__(
        self,
        *,
        root: str | None = None,
        format: Literal["auto", "isbi2015", "kaggle_csv", "csv", "coco", "synthetic"] = "auto",
        annotator: Literal["mean", "junior", "senior"] = "mean",
        pixel_size: float | list[float] | None = None,
        image_size: int | list[int] = 512,
        channels: Literal[1, 3] = 1,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        holdout: float = 0.1,
        fold: int = 0,
        test_split: str = "auto",
        store: Store = "auto",
        cache_dir: str | None = None,
        augment: Augmentation | None = Augmentation(),  # noqa: B008 - never changed in place
        augment_on: Literal["device", "cpu"] = "device",
        flip_pairs: list[list[int]] | None = None,
        num_workers: int = 4,
        prefetch_factor: int = 4,
        persistent_workers: bool = True,
        pin_memory: bool = True,
        drop_last: bool = True,
        predict_dir: str | None = None,
        synthetic_train: int = 96,
        synthetic_test: int = 24,
        seed: int = 0,
    ) -> None:
        super().__init__()
        values = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        if isinstance(augment, dict):  # from a checkpoint's plain values
            augment = Augmentation(**augment)
        # Only plain values: a checkpoint with a dataclass in it would not open with weights_only=True.
        values["augment"] = asdict(augment) if augment is not None else None
        # Not to the logger: it refuses keys that the module has too, and config.yaml lies beside its files anyway.
        self.save_hyperparameters(values, logger=False)
        self._augment: Augmentation | None = augment
        self.image_size = _frame(image_size)
        self.channels = int(channels)
        self.batch_size = batch_size
        self.flip_pairs = flip_pairs
        for name in ("batch_size", "synthetic_train", "synthetic_test"):
            if values[name] < 1:
                raise InputError(f"data.{name}: expected 1 or more, got {values[name]}")
        if augment is not None and augment.elastic > 0 and augment_on == "cpu":
            raise InputError("data.augment.elastic: only with data.augment_on device; albumentations rounds the points")
        if not 0 <= holdout < 1:
            raise InputError(f"data.holdout: expected 0 or more and below 1, got {holdout}")
        if fold < 0 or (holdout > 0 and (fold + 1) * holdout > 1 + 1e-6):
            raise InputError(f"data.fold: with holdout {holdout} there are {int(1 / holdout)} folds from 0, got {fold}")
        self._table: LandmarkTable | None = None
        self._prepared: dict[str, Prepared] = {}
        self._on_device: dict[tuple[str, torch.device], Resident] = {}
        self._during_fit = ExitStack()

    # ---- what the module asks ------------------------------------------------------------------------------------

    @property
    def table(self) -> LandmarkTable:
        """The samples of every split, read on first use."""
        if self._table is None:
            self._table = self._read()
        return self._table

    @property
    def num_landmarks(self) -> int:
        """K."""
        return self.table.num_landmarks

    @property
    def landmark_names(self) -> list[str]:
        """K names, in order."""
        return list(self.table.landmark_names)

    @property
    def has_labels(self) -> bool:
        """Whether a labelled data set was named (a folder to predict on needs none)."""
        return self.hparams["root"] is not None or self.hparams["format"] == "synthetic"

    def names(self, split: str) -> list[str]:
        """Identifiers of a split's images, in the order of `LandmarkBatch.position`."""
        return self._get(split).names

    def prepared(self, split: str) -> Prepared:
        """The decoded split: `train`, `val`, `test` or `predict`."""
        return self._get(split)

    # ---- Lightning's hooks ---------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Read, check and decode the splits of a stage, so that bad data ends the run before it starts."""
        self._during_fit.close()  # a fit that failed had no teardown
        wanted = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}[stage]
        if self._augment is not None and stage == "fit":
            try:
                self._augment.check(self.num_landmarks, self.flip_pairs)
            except ValueError as error:
                raise InputError(str(error)) from error
        for split in wanted:
            self._get(split)
        if stage in ("validate", "test") and not len(self._get(wanted[0])):
            raise InputError(f"data: no images to {stage} on (data.holdout is {self.hparams['holdout']})")
        if stage == "fit" and self.trainer is not None and not len(self._get("val")):
            self._during_fit.enter_context(without_validation(self.trainer))

    def train_dataloader(self) -> IndexLoader | ResumableLoader:
        """Batches of the training split, in an order that depends on the seed and the epoch alone."""
        h, split = self.hparams, self._get("train")
        if len(split) < 1:
            raise InputError("data: no training images are left after the hold-out")
        size, begin = min(self.batch_size, len(split)), partial(batches_done, self.trainer)
        sampler = epoch_batches(self.trainer, len(split), size, seed=h["seed"], shuffle=True, drop_last=h["drop_last"])
        if self._resolve_store(split) == "gpu" and h["augment_on"] == "device":
            return IndexLoader(self._resident("train"), sampler, begin)
        on_cpu = self._augment is not None and h["augment_on"] == "cpu"
        transform = AlbumentationsAugment(self._augment, self.flip_pairs) if on_cpu and self._augment else None
        return worker_loader(BatchDataset(split, transform), sampler, h, begin)

    def val_dataloader(self) -> Any:
        """The hold-out (or the data's own `val` split) in order; none if nothing is held out."""
        return self._in_order("val") if len(self._get("val")) else []

    def test_dataloader(self) -> Any:
        """The test split in order."""
        return self._in_order("test")

    def predict_dataloader(self) -> Any:
        """The images of `predict_dir`, or the test split."""
        return self._in_order("predict")

    def on_after_batch_transfer(self, batch: LandmarkBatch, dataloader_idx: int) -> LandmarkBatch:
        """Augment training batches where they lie."""
        training = self.trainer is not None and self.trainer.training
        if not training or self._augment is None or self.hparams["augment_on"] == "cpu":
            return batch
        out = augment_batch(batch.image, batch.points, self._augment, int(batch.seed), self.flip_pairs)
        return batch._replace(image=out.image, points=out.points, matrix=out.matrix.double() @ batch.matrix)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch; the seed stays on the host, where it is read."""
        if not isinstance(batch, LandmarkBatch):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        moved = {k: v.to(device, non_blocking=True) for k, v in batch._asdict().items() if k != "seed"}
        return batch._replace(**moved)

    def teardown(self, stage: str) -> None:
        """Release the device memory of the resident splits, and the Trainer."""
        self._on_device.clear()
        self._during_fit.close()

    # ---- inside --------------------------------------------------------------------------------------------------

    def _read(self) -> LandmarkTable:
        h = self.hparams
        if h["format"] == "synthetic":
            return SyntheticCephalograms(h["synthetic_train"], h["synthetic_test"], seed=h["seed"]).read()
        if h["root"] is None:
            raise InputError("data.root: name the data folder, as in --data.root /data/isbi2015")
        size = h["pixel_size"]
        pair = tuple(size) if isinstance(size, list) else size
        return make_reader(h["format"], h["root"], h["annotator"], pair).read()

    def _samples(self, split: str) -> list[LandmarkSample]:
        h = self.hparams
        if split == "predict" and h["predict_dir"] is not None:
            return self._unlabelled(h["predict_dir"])
        splits = self.table.splits
        if split in ("test", "predict"):
            name = h["test_split"]
            if name == "auto":
                name = next((n for n in ("test", "test1", "val") if splits.get(n)), "test")
            if name == "val" and not splits.get("val"):
                return self._samples("val")  # the hold-out of the training images
            if name not in splits:
                raise InputError(f"data.test_split: {name!r} is not in this data set; it has {', '.join(splits)}")
            return splits[name]
        if "train" not in splits:
            raise InputError(f"data: this data set has no training split, only {', '.join(splits)}")
        train = splits["train"]
        if splits.get("val"):
            return splits[split]
        order = np.random.default_rng(h["seed"]).permutation(len(train))
        bounds = [round(len(train) * min(1.0, h["holdout"] * i)) for i in (h["fold"], h["fold"] + 1)]
        if h["holdout"] > 0:  # of a handful of images one at least, rather than silently none
            bounds[1] = max(bounds[1], bounds[0] + 1)
        held = set(order[bounds[0] : bounds[1]].tolist())
        return [s for i, s in enumerate(train) if (i in held) == (split == "val")]

    def _unlabelled(self, folder: str) -> list[LandmarkSample]:
        path = Path(folder)
        if not path.exists():
            raise InputError(f"data.predict_dir: no file or folder {folder}")
        size = self.hparams["pixel_size"]
        spacing = None if size is None else (float(size), float(size)) if not isinstance(size, list) else tuple(size)
        count = self.num_landmarks if self.has_labels else 0
        files = [path] if path.is_file() else find_images(path)
        nothing = np.full((count, 2), np.nan)
        return self._readable(
            [LandmarkSample(path=f, name=f.name, points=nothing, spacing=spacing) for f in files]  # type: ignore[arg-type]
        )

    def _readable(self, samples: list[LandmarkSample]) -> list[LandmarkSample]:
        """Without the damaged files, each named: one of them must not cost the predictions of a whole folder."""
        bad: dict[int, str] = {}

        def check(item: tuple[int, LandmarkSample]) -> None:
            try:
                item[1].read_image(self.channels)
            except InputError as error:
                bad[item[0]] = str(error)

        with ThreadPoolExecutor() as pool:
            list(pool.map(check, enumerate(samples)))
        for message in bad.values():
            rank_zero_warn(f"left out: {message}", category=UserWarning)
        if len(bad) == len(samples):
            raise InputError(f"data.predict_dir: no readable image; the first: {bad[0]}")
        return [s for i, s in enumerate(samples) if i not in bad]

    def _get(self, split: str) -> Prepared:
        if split not in self._prepared:
            folder = cache_folder(self.hparams["cache_dir"], "landmarks")
            samples = self._samples(split)
            size = len(samples) * self.channels * self.image_size[0] * self.image_size[1]
            in_memory = fits_in_memory(self.hparams["store"], size)
            if any(s.path is None for s in samples):
                folder = None  # drawn images are cheaper to draw again than to keep
            self._prepared[split] = prepare(samples, self.image_size, self.channels, folder, in_memory=in_memory)
            if split != "predict" and samples and all(s.spacing is None for s in samples):
                rank_zero_warn(
                    f"data.pixel_size is unknown for the {split} images: errors are reported in PIXELS only, not mm. "
                    "Set --data.pixel_size (mm per pixel of the original images) for mm.",
                    category=UserWarning,
                )
        return self._prepared[split]

    def _resolve_store(self, split: Prepared) -> Store:
        return choose_store(self.hparams["store"], split.images.nbytes, root_device(self.trainer))

    def _resident(self, split: str) -> Resident:
        device = root_device(self.trainer)
        key = (split, device)
        if key not in self._on_device:
            prepared = self._get(split)
            resident = self._resolve_store(prepared) == "gpu"
            self._on_device[key] = Resident(prepared, device, resident)
            if resident:
                rank_zero_info(f"{split}: {len(prepared)} images, {prepared.images.nbytes / 2**20:.0f} MiB on {device}")
        return self._on_device[key]

    def _in_order(self, split: str) -> IndexLoader:
        data = self._resident(split)
        size: int = self.hparams["eval_batch_size"] or self.batch_size
        return IndexLoader(data, epoch_batches(self.trainer, len(data), size, shuffle=False, drop_last=False))


def _frame(image_size: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    """(H, W) from one side or [height, width]."""
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2 or any(s < 32 or s % 32 for s in sides):
        raise InputError(f"data.image_size: expected a multiple of 32, or [height, width] of such, got {image_size}")
    return int(sides[0]), int(sides[1])
