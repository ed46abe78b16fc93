"""Data for detection: splits, where their images live, and batches whose boxes end up packed on the device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor

from lit_cli.errors import InputError
from lit_common.loaders import IndexLoader, ResumableLoader, epoch_batches, worker_loader
from lit_common.store import Store, batches_done, cache_folder, choose_store, fits_in_memory, root_device
from lit_common.validation import without_validation
from lit_detr.augment import Boxes, DetectionAugmentation, WorkerAugmentation, augment_batch
from lit_detr.readers import Difficult, Fix, Format, find_images, make_reader
from lit_detr.samples import DetectionSample, DetectionTable, Targets, pack_targets
from lit_detr.store import BatchDataset, DetectionBatch, Prepared, Resident, prepare, read_image
from lit_detr.synthetic import SyntheticDetections

__all__ = ["DetectionData", "ReadyBatch", "to_targets"]


class ReadyBatch(NamedTuple):
    """What the network gets.

    Attributes:
        image: (B, C, H, W) float32 from 0 to 1.
        mask: (B, H, W) bool, true where the frame is image; None where all of it is.
        targets: Packed boxes; None for images without annotations.
        position: (B,) int64 on the host, in the split.
        seed: What is random in the step follows from it, so that a resumed run takes the same one.
    """

    image: Tensor
    mask: Tensor | None
    targets: Targets | None
    position: Tensor
    seed: int


def to_targets(boxes: Sequence[Boxes], frame: tuple[int, int], device: torch.device) -> Targets:
    """Pack boxes in frame pixels as shares of the frame, and send them without waiting.

    Example:
        >>> box = Boxes(np.array([[0, 0, 8, 4]], np.float32), np.array([2]))
        >>> to_targets([box], (8, 16), torch.device("cpu")).boxes[0, 0].tolist()
        [0.25, 0.25, 0.5, 0.5]
    """
    height, width = frame
    shares = []
    for own in boxes:
        b = torch.from_numpy(own.boxes) / torch.tensor([width, height, width, height])
        shares.append(torch.cat([(b[:, :2] + b[:, 2:]) / 2, b[:, 2:] - b[:, :2]], dim=1))
    packed = pack_targets(shares, [torch.from_numpy(own.labels) for own in boxes])
    if device.type == "cuda":  # pinned, or the copy would wait
        pinned = (t.pin_memory() for t in packed[:3])
        packed = Targets(*pinned, packed.counts)  # type: ignore[call-arg]
    return packed.to(device)


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
        channels: 1 or 3.
        batch_size: Images per step.
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
        predict_dir: File or folder of images to predict on.
        synthetic_train: Images drawn by `format: synthetic`.
        synthetic_val: Of these, held out.
        synthetic_test: Of these, beside the others.
        synthetic_seed: What is drawn.
        seed: Of the hold-out, the order and the augmentation.

    Raises:
        InputError: with one line, before training starts, when something about the data is not as expected.
    """

    # Taken from a checkpoint unless the command line says otherwise: evaluation must see what training saw.
    checkpoint_fields = ("image_size", "channels")

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
        for name in ("batch_size", "synthetic_train", "synthetic_val"):
            if values[name] < 1:
                raise InputError(f"data.{name}: expected 1 or more, got {values[name]}")
        if not 0 <= holdout < 1:
            raise InputError(f"data.holdout: expected 0 or more and below 1, got {holdout}")
        self._table: DetectionTable | None = None
        self._synthetic: SyntheticDetections | None = None
        self._prepared: dict[str, Prepared] = {}
        self._on_device: dict[tuple[str, torch.device], Resident] = {}
        self._during_fit = ExitStack()

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
        """The decoded split: `train`, `val`, `test` or `predict`."""
        if split not in self._prepared:
            self._prepared[split] = self._decode(self._samples(split))
        return self._prepared[split]

    def image_of(self, sample: DetectionSample) -> NDArray[np.uint8]:
        """(C, H, W) uint8 of a sample at its own size."""
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
        if len(split) < 1:
            raise InputError("data: no training images are left after the hold-out")
        size, begin = min(h["batch_size"], len(split)), partial(batches_done, self.trainer)
        sampler = epoch_batches(self.trainer, len(split), size, seed=h["seed"], shuffle=True, drop_last=h["drop_last"])
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
        """Move the images; all else is read on the host."""
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
        files = [path] if path.is_file() else find_images(path)
        if not files:
            raise InputError(f"data.predict_dir: no image in {path}")
        found, bad = [], []
        empty = np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, bool)
        for i, file in enumerate(files):
            name = file.name if path.is_file() else str(file.relative_to(path))
            sample = DetectionSample(name, file, *empty, size=None, image_id=i, group=name)
            try:
                read_image(sample, int(self.hparams["channels"]))
            except InputError as error:  # one damaged file must not cost the predictions of a whole folder
                bad.append(str(error))
                rank_zero_warn(f"left out: {error}", category=UserWarning)
            else:
                found.append(sample)
        if not found:
            raise InputError(f"data.predict_dir: no readable image; the first: {bad[0]}")
        return found

    def _decode(self, samples: list[DetectionSample]) -> Prepared:
        h = self.hparams
        size = len(samples) * h["channels"] * self.image_size[0] * self.image_size[1]
        drawn = bool(samples) and self._synthetic is not None and not samples[0].image.is_file()
        return prepare(
            samples,
            self.image_size,
            h["channels"],
            None if drawn else cache_folder(h["cache_dir"], "detr"),
            read=(lambda s: self.image_of(s).transpose(1, 2, 0)) if drawn else None,
            in_memory=fits_in_memory(h["store"], size),
        )

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
            self._on_device[key] = Resident(prepared, key[1])
            rank_zero_info(f"{split}: {len(prepared)} images, {prepared.images.nbytes / 2**20:.0f} MiB on {key[1]}")
        return self._on_device[key]

    def _in_order(self, split: str) -> IndexLoader | ResumableLoader:
        h, prepared = self.hparams, self.prepared(split)
        size = h["eval_batch_size"] or h["batch_size"]
        sampler = epoch_batches(self.trainer, len(prepared), size, shuffle=False, drop_last=False)
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
