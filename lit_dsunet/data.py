"""The data module: reader, folds, store and the patches on their way to the network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info

from lit_cli.errors import InputError
from lit_common.loaders import EpochBatches, IndexLoader, ResumableLoader, epoch_batches, worker_loader
from lit_common.store import Store, batches_done, cache_folder, choose_store, fits_in_memory, root_device
from lit_common.validation import without_validation
from lit_dsunet.augment import AlbumentationsVolume, VolumeAugmentation, augment_batch
from lit_dsunet.loaders import CaseLoader, PatchBatch, PatchDataset, ResidentPatches, to_device, whole_slices
from lit_dsunet.nifti import read_volume
from lit_dsunet.preprocess import Normalise, Preprocessing
from lit_dsunet.readers import find_volumes, make_reader
from lit_dsunet.samples import VolumeSample, VolumeTable
from lit_dsunet.splits import load_folds, make_folds
from lit_dsunet.store import Case, PatchSampler, Resident, prepare_cases
from lit_dsunet.synthetic import SyntheticVolumes

__all__ = ["VolumeData"]

Format = Literal["auto", "msd", "nnunet", "isles22", "isles24", "atlas_v2", "folders", "list", "synthetic"]
Triple = tuple[int, int, int]


class VolumeData(LightningDataModule):
    """Volumes with label maps, cut into patches; resident on the device when they fit.

    Args:
        root: Data folder (or the CSV/JSON file itself).
        format: Layout on disk; `auto` looks for what is there, `synthetic` draws volumes and needs no root.
        channels: Images to read where the format has a choice (ISLES), or their names.
        labels: Value in the label files by class name, where the format does not state it.
        spacing: mm along D, H, W that all volumes are resampled to; null keeps each volume's own grid.
        normalise: `zscore` over a volume, `nonzero` over its voxels that are not 0, or `none`.
        patch_size: Voxels along D, H, W; a depth of 1 gives slices to a two-dimensional network.
        slices: Neighbouring slices as channels of a two-dimensional network (2.5-D), odd.
        batch_size: Patches per step and device.
        patches_per_volume: Patches of each volume per epoch.
        steps_per_epoch: Steps of an epoch, in place of `patches_per_volume`.
        foreground: Share of a batch's patches that are centred on a foreground voxel.
        fold: Fold that is held out of the training cases; null trains on all of them, without validation.
        n_folds: Folds that are made where neither the data set nor `folds_file` has some.
        folds_file: Folds in the form of nnU-Net's splits_final.json.
        test_split: Cases of `test`; `auto` is the data set's test split, or the held-out fold.
        augment: Ranges of the random changes; null for none.
        augment_on: `device` in batches, or `cpu` in the loader's workers with albumentations.
        store: Where volumes live: `gpu`, `ram`, `disk` (mapped), or `auto` by their size.
        cache_dir: Folder of preprocessed volumes; `none` keeps nothing on disk.
        eval_batch_size: Volumes per evaluation step, whose windows share batches.
        val_patches: Validate on so many random patches per volume in place of whole volumes. This misses voxels that
            no patch sees and is there to reproduce older results.
        val_batch_size: Patches per step of such a validation.
        num_workers: Worker processes where volumes are not on the device.
        prefetch_factor: Batches per worker ahead.
        persistent_workers: Keep workers between epochs.
        pin_memory: Page-locked batches.
        drop_last: Leave out a last batch that is not full.
        predict_dir: NIfTI files to predict on.
        synthetic_train: Cases drawn by `format: synthetic`.
        synthetic_test: Of these, beside the training cases.
        synthetic_size: Voxels along D, H, W of drawn volumes.
        synthetic_seed: Of the drawing: another `seed` divides and orders the same volumes in another way.
        seed: Of folds, order, patches and augmentation.

    Raises:
        InputError: with one line, for values that make no sense or data that cannot be read.
    """

    checkpoint_fields = ("spacing", "normalise", "patch_size", "slices", "channels")

    def __init__(
        self,
        *,
        root: str | None = None,
        format: Format = "auto",
        channels: list[str] | None = None,
        labels: dict[str, int] | None = None,
        spacing: list[float] | None = None,
        normalise: Normalise = "zscore",
        patch_size: list[int] | tuple[int, int, int] = (96, 96, 96),
        slices: int = 1,
        batch_size: int = 2,
        patches_per_volume: int = 10,
        steps_per_epoch: int | None = None,
        foreground: float = 0.33,
        fold: int | None = 0,
        n_folds: int = 5,
        folds_file: str | None = None,
        test_split: str = "auto",
        augment: VolumeAugmentation | None = None,
        augment_on: Literal["device", "cpu"] = "device",
        store: Store = "auto",
        cache_dir: str | None = None,
        eval_batch_size: int = 4,
        val_patches: int = 0,
        val_batch_size: int = 16,
        num_workers: int = 4,
        prefetch_factor: int = 4,
        persistent_workers: bool = True,
        pin_memory: bool = True,
        drop_last: bool = True,
        predict_dir: str | None = None,
        synthetic_train: int = 24,
        synthetic_test: int = 6,
        synthetic_size: list[int] | tuple[int, int, int] = (48, 48, 48),
        synthetic_seed: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        values = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        if isinstance(augment, dict):  # from a checkpoint's plain values
            augment = VolumeAugmentation(**augment)
        # Only plain values: a checkpoint with a dataclass in it would not open with weights_only=True.
        values["augment"] = None if augment is None else _plain(asdict(augment))
        values["patch_size"], values["synthetic_size"] = list(patch_size), list(synthetic_size)
        self.save_hyperparameters(values, logger=False)
        for name in ("batch_size", "patches_per_volume", "eval_batch_size", "val_batch_size", "slices"):
            if values[name] < 1:
                raise InputError(f"data.{name}: expected 1 or more, got {values[name]}")
        self.patch_size = _triple("patch_size", patch_size)
        if slices % 2 == 0 or (slices > 1 and self.patch_size[0] != 1):
            raise InputError(f"data.slices: expected an odd number and a patch depth of 1, got {slices}")
        if spacing is not None and (len(spacing) != 3 or min(spacing) <= 0):
            raise InputError(f"data.spacing: expected three positive numbers of mm, got {spacing}")
        if not 0 <= foreground <= 1:
            raise InputError(f"data.foreground: expected a share from 0 to 1, got {foreground}")
        if steps_per_epoch is not None and steps_per_epoch < 1:
            raise InputError(f"data.steps_per_epoch: expected 1 or more, got {steps_per_epoch}")
        if fold is not None and not 0 <= fold < n_folds and folds_file is None:
            raise InputError(f"data.fold: expected 0 to {n_folds - 1}, or null, got {fold}")
        if augment is not None:
            augment.check()
        self._augment = augment
        self._table: VolumeTable | None = None
        self._synthetic: SyntheticVolumes | None = None
        self._cases: dict[str, list[Case]] = {}
        self._samples: dict[str, list[VolumeSample]] = {}
        self._on_device: dict[str, Resident] = {}
        self._during_fit = ExitStack()

    # ---- what the module asks ------------------------------------------------------------------------------------

    @property
    def table(self) -> VolumeTable:
        """The cases of every split, read on first use."""
        if self._table is None:
            h = self.hparams
            if h["format"] == "synthetic":
                self._synthetic = SyntheticVolumes(
                    num_train=h["synthetic_train"],
                    num_test=h["synthetic_test"],
                    shape=_triple("synthetic_size", h["synthetic_size"]),
                    seed=h["synthetic_seed"],
                )
                self._table = self._synthetic.read()
            elif h["root"] is None:
                raise InputError("data.root: name the data folder, as in --data.root /data/Task04_Hippocampus")
            else:
                self._table = make_reader(h["format"], h["root"], h["channels"], h["labels"]).read()
        return self._table

    @property
    def has_labels(self) -> bool:
        """Whether a labelled data set was named (a folder to predict on needs none)."""
        return self.hparams["root"] is not None or self.hparams["format"] == "synthetic"

    @property
    def in_channels(self) -> int:
        """Channels that the network sees, neighbouring slices counted."""
        return len(self.table.channel_names) * self.hparams["slices"]

    @property
    def class_names(self) -> list[str]:
        """K names, the background first."""
        return list(self.table.class_names)

    @property
    def preprocessing(self) -> Preprocessing:
        """What is done to each volume."""
        spacing = self.hparams["spacing"]
        return Preprocessing(None if spacing is None else tuple(spacing), self.hparams["normalise"])

    def cases(self, split: str) -> list[Case]:
        """The preprocessed cases of `train`, `val`, `test` or `predict`."""
        if split not in self._cases:
            if split in ("train", "val"):
                self._divide()
            else:
                self._cases[split], self._samples[split] = self._evaluated(split)
        return self._cases[split]

    def samples(self, split: str) -> list[VolumeSample]:
        """The files of a split's cases, in the same order."""
        self.cases(split)
        return self._samples[split]

    # ---- Lightning's hooks ---------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Read, check and preprocess the splits of a stage, so that bad data ends the run before it starts."""
        self._during_fit.close()  # a fit that failed had no teardown
        wanted = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}[stage]
        for split in wanted:
            self.cases(split)
        if stage != "fit" and not self.cases(wanted[0]):
            raise InputError(f"data: no volumes to {stage} on (data.fold is {self.hparams['fold']})")
        if stage == "fit" and self.trainer is not None and not self.cases("val"):
            self._during_fit.enter_context(without_validation(self.trainer))

    def train_dataloader(self) -> Any:
        """Batches of patches, in an order that depends on the seed and the epoch alone."""
        h, cases = self.hparams, self.cases("train")
        if not cases:
            raise InputError("data: no training volumes are left beside the held-out fold")
        count = len(cases) * h["patches_per_volume"]
        if h["steps_per_epoch"] is not None:
            count = h["steps_per_epoch"] * h["batch_size"] * (self.trainer.world_size if self.trainer else 1)
        sampler = self._batches(count, min(h["batch_size"], count), shuffle=True, drop_last=h["drop_last"])
        return self._patch_loader("train", sampler, partial(batches_done, self.trainer), self._transform())

    def val_dataloader(self) -> Any:
        """The held-out volumes in order; none if nothing is held out."""
        if not self.cases("val"):
            return []
        if self.hparams["val_patches"]:
            count = len(self.cases("val")) * self.hparams["val_patches"]
            sampler = self._batches(count, self.hparams["val_batch_size"], shuffle=False, drop_last=False)
            return self._patch_loader("val", sampler, None, None)
        return self._in_order("val")

    def test_dataloader(self) -> Any:
        """The test volumes in order."""
        return self._in_order("test")

    def predict_dataloader(self) -> Any:
        """The volumes of `predict_dir`, or the test volumes."""
        return self._in_order("predict")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment training batches where they lie; give slices to a two-dimensional network."""
        if not isinstance(batch, PatchBatch):
            return batch
        if self.patch_size[0] == 1:
            batch = whole_slices(batch, self.hparams["slices"])
        training = self.trainer is not None and self.trainer.training
        if not training or self._augment is None or self.hparams["augment_on"] == "cpu":
            return batch
        spacing = self.hparams["spacing"]
        dims = batch.label.ndim - 1
        image, label = augment_batch(
            batch.image.float(),
            batch.label,
            self._augment,
            int(batch.seed),
            spacing=None if spacing is None else spacing[-dims:],
        )
        return batch._replace(image=image, label=label)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch; what only the host reads stays there."""
        return to_device(batch, device)

    def teardown(self, stage: str) -> None:
        """Release the device memory of the resident volumes, and the Trainer."""
        self._on_device.clear()
        self._during_fit.close()

    # ---- inside --------------------------------------------------------------------------------------------------

    @property
    def _depth(self) -> Triple:
        """Size of what is cut: a slice comes with its neighbours."""
        d, h, w = self.patch_size
        return (self.hparams["slices"] if d == 1 else d, h, w)

    def _batches(self, count: int, size: int, *, shuffle: bool, drop_last: bool) -> EpochBatches:
        seed = self.hparams["seed"]
        return epoch_batches(self.trainer, count, size, shuffle=shuffle, drop_last=drop_last, seed=seed)

    def _transform(self) -> AlbumentationsVolume | None:
        if self._augment is None or self.hparams["augment_on"] == "device":
            return None
        a = self._augment
        return AlbumentationsVolume(
            symmetry=a.mirror, rotation=a.rotation, scale=a.scale, affine_p=a.rotation_p, gamma=a.gamma, blur=a.blur
        )

    def _patch_loader(
        self, split: str, sampler: EpochBatches, begin: Any, transform: Any
    ) -> IndexLoader | ResumableLoader:
        cases = self.cases(split)
        # Validation patches are drawn blindly: ground truth must not choose what is looked at.
        patches = PatchSampler(cases, self._depth, self.hparams["foreground"] if split == "train" else 0.0)
        if transform is None and (resident := self._resident(split)) is not None:
            return IndexLoader(ResidentPatches(resident, patches, self._depth, sampler.length), sampler, begin)
        data = PatchDataset(cases, patches, self._depth, sampler.length, transform)
        return worker_loader(data, sampler, self.hparams, begin)

    def _in_order(self, split: str) -> CaseLoader:
        cases = self.cases(split)
        sampler = self._batches(len(cases), self.hparams["eval_batch_size"], shuffle=False, drop_last=False)
        return CaseLoader(cases, sampler, self._resident(split))

    def _resident(self, split: str) -> Resident | None:
        """The volumes on the device, if that is where they live."""
        if split not in self._on_device:
            cases, device = self.cases(split), root_device(self.trainer)
            size = Resident.nbytes(cases)
            if choose_store(self.hparams["store"], size, device) != "gpu":
                return None
            self._on_device[split] = Resident(cases, device)
            rank_zero_info(f"{split}: {len(cases)} volumes, {size / 2**20:.0f} MiB on {device}")
        return self._on_device[split]

    def _divide(self) -> None:
        """Training and validation cases."""
        h, splits = self.hparams, self.table.splits
        if "train" not in splits:
            raise InputError(f"data: this data set has no training split, only {', '.join(splits)}")
        samples = [s for s in splits["train"] if s.label is not None or self._synthetic is not None]
        cases = self._prepare(samples)
        held: set[str] = set()
        if splits.get("val"):
            self._cases["val"], self._samples["val"] = self._prepare(splits["val"]), splits["val"]
        elif h["fold"] is not None:
            held = set(self.folds(samples, cases)[h["fold"]])
        for split in ("train", "val"):
            if split in self._cases:
                continue
            keep = [i for i, s in enumerate(samples) if (s.name in held) == (split == "val")]
            self._cases[split], self._samples[split] = [cases[i] for i in keep], [samples[i] for i in keep]

    def folds(self, samples: Sequence[VolumeSample], cases: Sequence[Case]) -> list[list[str]]:
        """Names of the held-out cases per fold: from `folds_file`, the data set, or made here."""
        h = self.hparams
        if h["folds_file"] is not None:
            folds = load_folds(h["folds_file"], samples)
        elif self.table.folds is not None:
            folds = [list(f) for f in self.table.folds]
        else:
            volumes = {
                c.name: float((c.label > 0).sum()) * math.prod(c.geometry.spacing) / 1000
                if c.label is not None
                else 0.0
                for c in cases
            }
            return make_folds(samples, volumes, h["n_folds"], h["seed"])
        if h["fold"] >= len(folds):
            raise InputError(f"data.fold: this data set has folds 0 to {len(folds) - 1}, got {h['fold']}")
        return folds

    def _evaluated(self, split: str) -> tuple[list[Case], list[VolumeSample]]:
        h = self.hparams
        if split == "predict" and h["predict_dir"] is not None:
            channels = len(self.table.channel_names) if self.has_labels else self._expected_channels()
            samples = find_volumes(h["predict_dir"], channels)
            return self._prepare(samples), samples
        splits = self.table.splits
        name = h["test_split"]
        if name == "auto":
            name = "test" if splits.get("test") and (split == "predict" or self._labelled("test")) else "val"
        if (name in ("train", "val") and name not in splits) or name == "train":
            return self.cases(name), self.samples(name)
        if name not in splits:
            raise InputError(f"data.test_split: {name!r} is not in this data set; it has {', '.join(splits)}")
        if split == "test" and not self._labelled(name):
            raise InputError(f"data.test_split: the cases of {name!r} have no labels; predict on them instead")
        return self._prepare(splits[name]), splits[name]

    def _labelled(self, name: str) -> bool:
        return self._synthetic is not None or all(s.label is not None for s in self.table.splits[name])

    def _expected_channels(self) -> int:
        module = self.trainer.lightning_module if self.trainer is not None else None
        channels = getattr(module, "hparams", {}).get("in_channels") if module is not None else None
        return (channels or 1) // self.hparams["slices"]

    def _prepare(self, samples: Sequence[VolumeSample]) -> list[Case]:
        h = self.hparams
        values = self.table.label_values if self.has_labels else {0: 0}
        if self._synthetic is not None and not (samples and samples[0].images):
            drawn = self._synthetic
            return prepare_cases(samples, self.preprocessing, values, lambda s, _: drawn.volume(s.name), None)
        # Twice the files' size, uncompressed, is a safe guess before anything was read.
        size = sum(8 * f.stat().st_size for s in samples for f in s.images if f.exists())
        folder, in_memory = cache_folder(h["cache_dir"], "dsunet"), fits_in_memory(h["store"], size)
        return prepare_cases(samples, self.preprocessing, values, read_volume, folder, in_memory=in_memory)


def _triple(name: str, value: Sequence[int]) -> Triple:
    if len(value) != 3 or any(int(v) != v or v < 1 for v in value):
        raise InputError(f"data.{name}: expected three positive numbers of voxels along D, H, W, got {list(value)}")
    d, h, w = (int(v) for v in value)
    return d, h, w


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
