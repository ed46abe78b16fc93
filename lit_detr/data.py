"""Data for detection: splits, where their images live, and batches whose boxes end up packed on the device."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor

from lit_cli.errors import InputError
from lit_common.loaders import EpochBatches, IndexLoader, ResumableLoader, epoch_batches, worker_loader
from lit_common.store import Store, batches_done, cache_folder, choose_store, fits_in_memory, root_device
from lit_common.validation import without_validation
from lit_detr.augment import DetectionAugmentation, WorkerAugmentation, augment_batch
from lit_detr.batches import ReadyBatch, to_targets
from lit_detr.readers import Difficult, Fix, Format, find_images, make_reader
from lit_detr.samples import DetectionSample, DetectionTable
from lit_detr.sliced import Slicing
from lit_detr.store import BatchDataset, DetectionBatch, Prepared, Resident, prepare, read_image
from lit_detr.synthetic import SyntheticDetections
from lit_detr.tile_store import (
    ResidentWhole,
    TileBatches,
    WholeBatch,
    WholeDataset,
    WholeImages,
    WholeStream,
    prepare_tiles,
    prepare_whole,
    sized,
)
from lit_detr.tiles import Pieces, TileIndex, checked_tile, tile_view
from lit_detr.video import Clip, Frame, FrameReader, Stream, StreamLoader, find_videos, is_video, open_clip

__all__ = ["DetectionData"]

FULL_BATCHES = 4  # of tiles, in each batch of whole images


class DetectionData(LightningDataModule):
    """Images with boxes.

    Args:
        root: Folder of the data set.
        format: Layout on disk; `auto` looks for what is there, `synthetic` draws images and needs no root.
        group: What a hold-out never divides: `none` (each image for itself), `stem` (the file's name up to the last
            underscore, as of the frames of a video), or a field of the annotations.
        fix: `clip` mends boxes that reach beyond their image or have no area in place of refusing them.
        difficult: What becomes of Pascal VOC's difficult objects.
        data_classes: Names of the classes where the files do not say them.
        image_size: One side, or [height, width], of the frame that the network sees, multiples of 32. Images are scaled
            to fit, never distorted.
        tile: One side, or [height, width] in the proportions of `image_size`, of the tiles that images are cut into, in
            pixels of the files; each is fitted to `image_size`. Training images are then tiles; evaluation cuts on the
            device, merges what the tiles saw, and judges whole images. None for no tiles.
        tile_overlap: Share of a tile that the next one covers again.
        tile_min_visible: Share of a box from which on it counts in a tile.
        tile_pieces: What becomes of smaller shares: `crowd`, and tiles with nothing else are left out; or `drop`, and
            they are background.
        tile_whole: In evaluation, look at the whole image as well, for objects longer than the overlap.
        empty_tiles: Share of tiles without objects in an epoch, as far as there are so many; others in every epoch.
        channels: 1 or 3.
        batch_size: Images, or tiles, per step.
        eval_batch_size: In evaluation; by default the same.
        holdout: Share of the training groups that is held out where the data has no `val` split.
        test_split: What `test` evaluates; `auto` is the test split if there is one, else `val`.
        store: `gpu` (resident uint8), `ram`, `disk` (mapped cache), or `auto`.
        cache_dir: Of decoded images; `none` for none.
        augment: Ranges and probabilities on the device; null for none.
        clahe_p: Probability of CLAHE, in loader workers.
        motion_blur_p: Probability of motion blur, in loader workers.
        num_workers: Worker processes where images are not on the device, or CLAHE or blur are wanted.
        prefetch_factor: Batches per worker ahead.
        persistent_workers: Keep workers between epochs.
        pin_memory: Page-locked batches.
        drop_last: Leave out a last training batch that is not full.
        predict_dir: File or folder of images and videos to predict on; videos are read as a stream, in any store.
        synthetic_train: Images drawn by `format: synthetic`.
        synthetic_val: Of these, held out.
        synthetic_test: Of these, beside the others.
        synthetic_seed: What is drawn.
        seed: Of the hold-out, the order and the augmentation.

    Raises:
        InputError: with one line, before training starts, when something about the data is not as expected.
    """

    # Taken from a checkpoint unless the command line says otherwise: evaluation must see what training saw.
    checkpoint_fields = ("image_size", "channels", "tile", "tile_overlap", "tile_whole")

    def __init__(
        self,
        *,
        root: str | None = None,
        format: Format | Literal["synthetic"] = "auto",
        group: str = "none",
        fix: Fix = "none",
        difficult: Difficult = "crowd",
        data_classes: list[str] | None = None,
        image_size: int | list[int] = 640,
        tile: int | list[int] | None = None,
        tile_overlap: float = 0.25,
        tile_min_visible: float = 0.5,
        tile_pieces: Pieces = "crowd",
        tile_whole: bool = False,
        empty_tiles: float = 0.2,
        channels: Literal[1, 3] = 3,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        holdout: float = 0.1,
        test_split: str = "auto",
        store: Store = "auto",
        cache_dir: str | None = None,
        augment: DetectionAugmentation | None = DetectionAugmentation(),  # noqa: B008 - never changed in place
        clahe_p: float = 0.0,
        motion_blur_p: float = 0.0,
        num_workers: int = 4,
        prefetch_factor: int = 2,
        persistent_workers: bool = True,
        pin_memory: bool = True,
        drop_last: bool = True,
        predict_dir: str | None = None,
        synthetic_train: int = 200,
        synthetic_val: int = 40,
        synthetic_test: int = 40,
        synthetic_seed: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        values = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        if isinstance(augment, dict):  # from a checkpoint's plain values
            augment = DetectionAugmentation(**augment)
        # Only plain values: a checkpoint with a dataclass in it would not open with weights_only=True.
        values["augment"] = _plain(asdict(augment)) if augment is not None else None
        self.save_hyperparameters(values, logger=False)
        self._augment: DetectionAugmentation | None = augment
        self.image_size = _frame(image_size)
        self.tile = None if tile is None else checked_tile(tile, tile_overlap, self.image_size, "data.")
        if not 0 <= tile_min_visible <= 1:
            raise InputError(f"data.tile_min_visible: expected a share from 0 to 1, got {tile_min_visible}")
        if not 0 <= empty_tiles < 1:
            raise InputError(f"data.empty_tiles: expected 0 or more and below 1, got {empty_tiles}")
        for name in ("batch_size", "synthetic_train", "synthetic_val"):
            if values[name] < 1:
                raise InputError(f"data.{name}: expected 1 or more, got {values[name]}")
        if not 0 <= holdout < 1:
            raise InputError(f"data.holdout: expected 0 or more and below 1, got {holdout}")
        self._table: DetectionTable | None = None
        self._synthetic: SyntheticDetections | None = None
        self._prepared: dict[str, Prepared] = {}
        self._tiles: TileIndex | None = None  # of the training split
        self._on_device: dict[tuple[str, torch.device], Resident] = {}
        self._during_fit = ExitStack()
        self._reader = FrameReader(channels)

    # ---- what the module asks ------------------------------------------------------------------------------------

    @property
    def table(self) -> DetectionTable:
        """The samples of every split, read on first use."""
        if self._table is None:
            self._table = self._read()
        return self._table

    @property
    def has_labels(self) -> bool:
        """Whether an annotated data set was named (a folder to predict on needs none)."""
        return self.hparams["root"] is not None or self.hparams["format"] == "synthetic"

    @property
    def class_names(self) -> list[str]:
        """By class index."""
        return list(self.table.class_names)

    def prepared(self, split: str) -> Prepared:
        """A split, decoded: `train`, `val`, `test` or `predict`; with tiles, those of `train`, else whole images."""
        if split not in self._prepared:
            if self.tile is None:
                self._prepared[split] = self._decode(self._samples(split))
            else:
                self._prepared[split] = self._cut() if split == "train" else self._whole(split)
        return self._prepared[split]

    def slicing(self, most: int, *, pad_batches: bool = False) -> Slicing:
        """How evaluation cuts images.

        Args:
            most: Detections of a tile that count.
            pad_batches: Give the network full batches only.
        """
        assert self.tile is not None
        h = self.hparams
        return Slicing(
            tile=self.tile,
            overlap=h["tile_overlap"],
            frame=self.image_size,
            batch=h["eval_batch_size"] or h["batch_size"],
            whole=h["tile_whole"],
            most=most,
            pad_batches=pad_batches,
        )

    def image_of(self, sample: DetectionSample) -> NDArray[np.uint8]:
        """(C, H, W) uint8 of a sample at its own size; frames of a video are best asked for in order."""
        if isinstance(sample, Frame):
            found = self._reader.read(sample, sample.index)
            if found is None:
                raise InputError(f"{sample.image}: no frame {sample.index}")
            return found[0].transpose(2, 0, 1)
        drawn = self._drawn(sample)
        return drawn if drawn is not None else read_image(sample, self.hparams["channels"]).transpose(2, 0, 1)

    # ---- Lightning's hooks ---------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Read, check and decode the splits of a stage, so that bad data ends the run before it starts."""
        self._during_fit.close()  # a fit that failed had no teardown
        wanted = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}[stage]
        if self._augment is not None and stage == "fit":
            self._augment.check()
        for split in wanted:
            self.prepared(split)
        if stage in ("validate", "test") and not len(self.prepared(wanted[0])):
            raise InputError(f"data: no images to {stage} on (data.holdout is {self.hparams['holdout']})")
        if stage == "fit" and self.trainer is not None and not len(self.prepared("val")):
            self._during_fit.enter_context(without_validation(self.trainer))

    def train_dataloader(self) -> IndexLoader | ResumableLoader:
        """Batches of the training split, in an order that depends on the seed and the epoch alone."""
        h, split = self.hparams, self.prepared("train")
        begin = partial(batches_done, self.trainer)
        sampler = self._order(split)
        in_workers = h["clahe_p"] > 0 or h["motion_blur_p"] > 0
        if not in_workers and self._resolve(split) == "gpu":
            return IndexLoader(self._resident("train"), sampler, begin)
        change = WorkerAugmentation(h["clahe_p"], h["motion_blur_p"]) if in_workers else None
        return worker_loader(BatchDataset(split, change), sampler, h, begin)

    def val_dataloader(self) -> Any:
        """The `val` split or the hold-out, in order; none if nothing is held out."""
        return self._in_order("val") if len(self.prepared("val")) else []

    def test_dataloader(self) -> Any:
        """The test split in order."""
        return self._in_order("test")

    def predict_dataloader(self) -> Any:
        """The images of `predict_dir`, or the test split."""
        return self._in_order("predict")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move the images; all else is read on the host. Whole images move one by one, when they are cut."""
        if isinstance(batch, WholeBatch):
            return batch
        if not isinstance(batch, DetectionBatch):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        return batch._replace(image=batch.image.to(device, non_blocking=True))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment training batches where they lie, and pack the boxes."""
        if not isinstance(batch, DetectionBatch):
            return batch
        image, boxes, mask = batch.image, batch.boxes, None
        if self.trainer is not None and self.trainer.training and self._augment is not None:
            # What an image leaves of its frame is as good as what an augmentation leaves of it: all of it is image.
            image, boxes = augment_batch(image, boxes, self._augment, int(batch.seed), progress=self._progress())
        else:
            image, mask = image.float() / 255, self._mask(batch)
        return ReadyBatch(
            image, mask, to_targets(boxes, self.image_size, image.device), batch.position, int(batch.seed)
        )

    def teardown(self, stage: str) -> None:
        """Release the device memory of the resident splits, and the Trainer."""
        self._on_device.clear()
        self._during_fit.close()
        self._reader.close()

    # ---- inside --------------------------------------------------------------------------------------------------

    def _read(self) -> DetectionTable:
        h = self.hparams
        if h["format"] == "synthetic":
            self._synthetic = SyntheticDetections(
                num_train=h["synthetic_train"],
                num_val=h["synthetic_val"],
                num_test=h["synthetic_test"],
                size=self.image_size,
                seed=h["synthetic_seed"],
                channels=h["channels"],
            )
            return self._synthetic.read()
        if h["root"] is None:
            raise InputError("data.root: name the data folder, as in --data.root /data/coco")
        options = {"group": h["group"], "fix": h["fix"], "difficult": h["difficult"], "class_names": h["data_classes"]}
        return make_reader(h["format"], h["root"], **options).read()

    def _progress(self) -> float:
        """Share of the run that is done."""
        assert self.trainer is not None
        total = self.trainer.estimated_stepping_batches
        return min(1.0, self.trainer.global_step / total) if total and total != float("inf") else 0.0

    def _mask(self, batch: DetectionBatch) -> Tensor | None:
        height, width = self.image_size
        if bool((batch.content == torch.tensor([height, width])).all()):
            return None
        content = batch.content.to(batch.image.device, non_blocking=True)
        rows = torch.arange(height, device=batch.image.device) < content[:, :1]
        columns = torch.arange(width, device=batch.image.device) < content[:, 1:]
        return rows[:, :, None] & columns[:, None, :]

    def _samples(self, split: str) -> list[DetectionSample]:
        h = self.hparams
        if split == "predict" and h["predict_dir"] is not None:
            return self._unlabelled(Path(h["predict_dir"]))
        splits = self.table.splits
        if split in ("test", "predict"):
            name = h["test_split"]
            if name == "auto":
                name = "test" if splits.get("test") else "val"
            if name == "val":
                return self._samples("val")
            if name not in splits:
                raise InputError(f"data.test_split: {name!r} is not in this data set; it has {', '.join(splits)}")
            return splits[name]
        if "train" not in splits:
            raise InputError(f"data: this data set has no training split, only {', '.join(splits)}")
        if splits.get("val"):
            return splits[split]
        # Groups are held out whole: neighbouring frames of a video are nearly the same image.
        groups = sorted({s.group for s in splits["train"]})
        order = np.random.default_rng(h["seed"]).permutation(len(groups))
        count = max(1, round(len(groups) * h["holdout"])) if h["holdout"] > 0 else 0
        held = {groups[i] for i in order[:count]}
        return [s for s in splits["train"] if (s.group in held) == (split == "val")]

    def _unlabelled(self, path: Path) -> list[DetectionSample]:
        if not path.exists():
            raise InputError(f"data.predict_dir: no file or folder {path}")
        files = [path] if path.is_file() else sorted({*find_images(path), *find_videos(path)})
        if not files:
            raise InputError(f"data.predict_dir: no image and no video in {path}")
        found, bad = [], []
        empty = np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, bool)
        for i, file in enumerate(files):
            name = file.name if path.is_file() else str(file.relative_to(path))
            sample = DetectionSample(name, file, *empty, size=None, image_id=i, group=name)
            try:
                if is_video(file):
                    sample = open_clip(file, name, i)
                else:
                    read_image(sample, int(self.hparams["channels"]))
            except InputError as error:  # one damaged file must not cost the predictions of a whole folder
                bad.append(str(error))
                rank_zero_warn(f"left out: {error}", category=UserWarning)
            else:
                found.append(sample)
        if not found:
            raise InputError(f"data.predict_dir: no readable image or video; the first: {bad[0]}")
        return found

    def _decode(self, samples: list[DetectionSample]) -> Prepared:
        h = self.hparams
        if any(isinstance(s, Clip) for s in samples):
            return Stream(samples, self.image_size, h["channels"])
        size = len(samples) * h["channels"] * self.image_size[0] * self.image_size[1]
        return prepare(samples, self.image_size, h["channels"], **self._source(samples, size))

    def _source(self, samples: list[DetectionSample], size: int) -> dict[str, Any]:
        """Where samples come from and go to, as `prepare` and its like want it."""
        drawn = bool(samples) and self._synthetic is not None and not samples[0].image.is_file()
        return {
            "cache_dir": None if drawn else cache_folder(self.hparams["cache_dir"], "detr"),
            "read": (lambda s: self.image_of(s).transpose(1, 2, 0)) if drawn else None,
            "in_memory": fits_in_memory(self.hparams["store"], size),
        }

    def _order(self, split: Prepared) -> EpochBatches:
        h, trainer = self.hparams, self.trainer
        if len(split) < 1:
            raise InputError("data: no training images are left after the hold-out")
        options: dict[str, Any] = {"seed": h["seed"], "drop_last": h["drop_last"]}
        if self._tiles is None:
            return epoch_batches(trainer, len(split), min(h["batch_size"], len(split)), shuffle=True, **options)
        options |= {} if trainer is None else {"rank": trainer.global_rank, "world": trainer.world_size}
        return TileBatches(self._tiles, h["batch_size"], empty_share=h["empty_tiles"], **options)

    def _cut(self) -> Prepared:
        """The tiles of the training split."""
        h, samples = self.hparams, sized(self._samples("train"))
        assert self.tile is not None
        table = DetectionTable({"train": samples}, [])
        options = {"min_visible": h["tile_min_visible"], "pieces": h["tile_pieces"]}
        index = self._tiles = tile_view(table, self.tile, h["tile_overlap"], **options)["train"]
        size = len(index) * h["channels"] * self.image_size[0] * self.image_size[1]
        rank_zero_info(
            f"train: {len(samples)} images are {len(index)} tiles, {int(index.empty.sum())} of them without objects"
        )
        return prepare_tiles(index, samples, self.image_size, h["channels"], **self._source(samples, size))

    def _whole(self, split: str) -> WholeImages | WholeStream:
        """A split at the sizes of its files; images to predict on are read when they are needed, each only once."""
        h, samples = self.hparams, self._samples(split)
        if any(isinstance(s, Clip) for s in samples):
            return WholeStream(samples, self.image_size, h["channels"])
        if split == "predict" and h["predict_dir"] is not None:
            return WholeImages.to_read(samples, h["channels"], self.image_of)
        samples = sized(samples)
        size = h["channels"] * sum(s.size[0] * s.size[1] for s in samples if s.size is not None)
        return prepare_whole(samples, h["channels"], **self._source(samples, size))

    def _drawn(self, sample: DetectionSample) -> NDArray[np.uint8] | None:
        """A frame of `format: synthetic`; None for files."""
        if self._synthetic is None or sample.image.is_file():
            return None
        return self._synthetic.image(sample.name)

    def _resolve(self, split: Prepared) -> Store:
        return choose_store(self.hparams["store"], split.images.nbytes, root_device(self.trainer))

    def _resident(self, split: str) -> Resident:
        key = (split, root_device(self.trainer))
        if key not in self._on_device:
            prepared = self.prepared(split)
            kind = ResidentWhole if isinstance(prepared, WholeImages) else Resident
            self._on_device[key] = kind(prepared, key[1])
            rank_zero_info(f"{split}: {len(prepared)} images, {prepared.images.nbytes / 2**20:.0f} MiB on {key[1]}")
        return self._on_device[key]

    def _in_order(self, split: str) -> IndexLoader | ResumableLoader | StreamLoader:
        h, prepared = self.hparams, self.prepared(split)
        size = h["eval_batch_size"] or h["batch_size"]
        whole = isinstance(prepared, (WholeImages, WholeStream))
        if whole:  # as many images as fill some batches with their tiles: only the last one is not full
            size = max(1, round(FULL_BATCHES * size / prepared.mean(self.slicing(1).count)))
        if isinstance(prepared, Stream):
            rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
            ahead, pin = (h["prefetch_factor"] if h["num_workers"] else 0), h["pin_memory"] and not whole
            return StreamLoader(
                prepared, size, ahead=ahead, pin=pin and torch.cuda.is_available(), rank=rank, world=world
            )
        sampler = epoch_batches(self.trainer, len(prepared), size, shuffle=False, drop_last=False)
        if isinstance(prepared, WholeImages) and (prepared.read is not None or self._resolve(prepared) != "gpu"):
            return worker_loader(WholeDataset(prepared), sampler, h)
        if self._resolve(prepared) == "gpu":
            return IndexLoader(self._resident(split), sampler)
        return worker_loader(BatchDataset(prepared), sampler, h)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _frame(image_size: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    """(H, W) from one side or [height, width]."""
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2 or any(s < 32 or s % 32 for s in sides):
        raise InputError(f"data.image_size: expected a multiple of 32, or [height, width] of such, got {image_size}")
    return sides
