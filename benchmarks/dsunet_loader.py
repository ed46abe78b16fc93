"""Augmented patches per second on their way to the device, without a network: device store, workers, and others' ways.

Every row runs through a real `Trainer` with a module of one parameter; batches end up on the device. All but the
guide's way augment as nnU-Net does: affine map, noise, blur, brightness, contrast, low resolution, gamma, reflections
(albumentations and MONAI: what they have of it). Volumes are drawn once (brains with lesions), or those of `--root`;
preprocessed ones lie in the cache.

- `ours, device store`: patches are gathered and augmented on the device; `ours, ram` and `ours, mapped`: workers cut
  patches, the device augments; `ours, ram, albumentations`: workers augment as well.
- `guide`: an npz file per volume, image and mask compressed; for each patch the whole file is read, `np.where` finds
  the foreground, 70 % of the patches are centred on it; a flip, a quarter turn, shift, scale, gamma, noise, each with
  probability 0.5. This is less augmentation than all the others do.
- `MONAI`: CacheDataset, RandCropByPosNegLabeld with 4 patches per volume read, in workers; `MONAI, device`: its fast
  recipe, everything cached and transformed on the device, without workers.

Rates are medians of windows, each at least as many steps as there are workers, since these deliver in bursts.

    python benchmarks/dsunet_loader.py [--root DATA --patch 40 56 40] [--only device] [--tiny]
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # before anything imports albumentations

import numpy as np
import torch
from common import Results, Row, table
from dsunet_peers import load, version
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lit_dsunet.augment import VolumeAugmentation
from lit_dsunet.data import VolumeData
from lit_dsunet.nifti import write_label, write_probability
from lit_dsunet.store import Case
from lit_dsunet.synthetic import SyntheticVolumes

Triple = tuple[int, int, int]
Batches = dict[str, Any]  # the data arguments of `Trainer.fit`
EPOCH = 250  # steps, as an epoch of nnU-Net has
WARMUP, WINDOWS = 6, 3
COLUMNS = ("data", "way", "workers", "patches_s", "low", "high", "epoch_s", "first_s", "device_gb")


# ---- what is measured: a training without a network -----------------------------------------------------------------


class Nothing(LightningModule):
    """Takes batches, looks at one voxel of each, and has something that an optimizer can be made for."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """A loss that depends on the batch, so that nothing can be left out."""
        image = batch["image"] if isinstance(batch, dict) else batch[0]
        return self.weight * image.flatten()[0].float()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Any."""
        return torch.optim.SGD(self.parameters(), 1e-3)


class Rate(Callback):
    """Ends the training after a number of windows and keeps the batches per second of each."""

    def __init__(self, workers: int, seconds: float, windows: int) -> None:
        self.workers, self.seconds, self.windows = workers, seconds, windows
        self.rates: list[float] = []
        self.first_s = 0.0
        self.begin = self._mark = time.perf_counter()
        self._warm = max(WARMUP, 2 * workers)
        self._seen = self._start = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the clock after each burst; a window ends with the first one beyond its length."""
        self._seen += 1
        burst = max(1, self.workers)
        if self._seen == 1:
            self.first_s = self._now() - self.begin
        if self._seen == self._warm:
            self._mark, self._start = self._now(), self._seen
        elif self._seen > self._warm and (self._seen - self._start) % burst == 0:
            if time.perf_counter() - self._mark < self.seconds:
                return
            now = self._now()
            self.rates.append((self._seen - self._start) / (now - self._mark))
            self._mark, self._start = now, self._seen
            trainer.should_stop = len(self.rates) >= self.windows

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def rate(batches: Batches, batch: int, workers: int, seconds: float, windows: int) -> Row:
    """Patches per second of a way."""
    gc.collect()
    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    callback = Rate(workers, seconds, windows)
    trainer = Trainer(
        accelerator="auto",
        devices=1,
        precision="32-true",
        max_epochs=100_000,
        min_epochs=0,
        logger=False,
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    trainer.fit(Nothing(), **batches)
    rates = [batch * r for r in callback.rates]
    row: Row = {
        "patches_s": round(statistics.median(rates), 1),
        "low": round(min(rates), 1),
        "high": round(max(rates), 1),
        "epoch_s": round(EPOCH * batch / statistics.median(rates), 2),
        "first_s": round(callback.first_s, 2),
    }
    if torch.cuda.is_available():
        row["device_gb"] = round((torch.cuda.max_memory_allocated() - before) / 1e9, 2)
    return row


# ---- others' ways ---------------------------------------------------------------------------------------------------


class NpzPatches(Dataset):
    """The guide's way: each patch reads a whole compressed volume.

    Args:
        files: npz files with `image` (D, H, W) float32 and `mask` (D, H, W) uint8.
        patch: (D, H, W).
        length: Patches of an epoch.
    """

    def __init__(self, files: Sequence[Path], patch: Triple, length: int) -> None:
        self.files, self.patch, self.length = list(files), patch, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((index, int(time.time_ns() % 2**31)))
        with np.load(self.files[index % len(self.files)]) as content:
            image, mask = content["image"], content["mask"]
        pad = [(0, max(0, p - s)) for p, s in zip(self.patch, mask.shape, strict=True)]
        image, mask = np.pad(image, pad), np.pad(mask, pad)
        room = np.array(mask.shape, np.int64) - np.array(self.patch, np.int64)
        start = rng.integers(0, room + 1)
        foreground = np.where(mask > 0)
        if len(foreground[0]) and rng.random() < 0.7:
            voxel = rng.integers(len(foreground[0]))
            centre = np.array([axis[voxel] for axis in foreground])
            start = np.clip(centre - np.array(self.patch) // 2, 0, room)
        box = tuple(slice(s, s + p) for s, p in zip(start, self.patch, strict=True))
        image, mask = _guide_augment(image[box], mask[box], rng)
        return torch.from_numpy(image[None].copy()), torch.from_numpy(mask.copy())


def _guide_augment(
    image: NDArray[np.float32], mask: NDArray[np.uint8], rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Its six changes, each with probability 0.5."""
    if rng.random() < 0.5:
        axis = int(rng.integers(3))
        image, mask = np.flip(image, axis), np.flip(mask, axis)
    if rng.random() < 0.5 and mask.shape[1] == mask.shape[2]:
        turns = int(rng.integers(1, 4))
        image, mask = np.rot90(image, turns, (1, 2)), np.rot90(mask, turns, (1, 2))
    if rng.random() < 0.5:
        image = image + np.float32(rng.uniform(-0.1, 0.1))
    if rng.random() < 0.5:
        image = image * np.float32(rng.uniform(0.9, 1.1))
    if rng.random() < 0.5:
        low, span = image.min(), np.float32(max(float(np.ptp(image)), 1e-6))
        image = np.power((image - low) / span, np.float32(rng.uniform(0.8, 1.2)), dtype=np.float32) * span + low
    if rng.random() < 0.5:
        image = np.add(image, 0.01 * rng.standard_normal(image.shape, dtype=np.float32), dtype=np.float32)
    return image, mask


def npz_loader(cases: Sequence[Case], folder: Path, patch: Triple, batch: int, workers: int) -> Batches:
    """The guide's loader; its files are written first."""
    folder.mkdir(exist_ok=True)
    files = [folder / f"{case.name}.npz" for case in cases]
    for case, file in zip(cases, files, strict=True):
        if not file.is_file() and case.label is not None:
            np.savez_compressed(file, image=case.image[0].astype(np.float32), mask=case.label)
    dataset = NpzPatches(files, patch, EPOCH * batch)
    return {"train_dataloaders": _loader(dataset, batch, workers)}


def _loader(dataset: Any, batch: int, workers: int, **options: Any) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=batch,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
        drop_last=True,
        worker_init_fn=_one_thread if workers else None,
        **options,
    )


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def monai_loader(cases: Sequence[Case], patch: Triple, batch: int, workers: int, on_device: bool) -> Batches:
    """MONAI's cached data set with random transforms, in workers or on the device."""
    t, data = load("monai.transforms"), load("monai.data")
    a, both = VolumeAugmentation(), ["image", "label"]
    per_volume = min(4, batch)
    data.set_track_meta(False)  # half the time of small patches goes into its tensors with metadata
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if on_device else None
    turn = np.radians(a.rotation)
    moves = 1 - (1 - a.rotation_p) * (1 - a.scale_p)
    steps = [
        t.EnsureTyped(both, dtype=[torch.float32, torch.uint8], device=device, track_meta=False),
        t.SpatialPadd(both, patch),
        t.FgBgToIndicesd("label"),  # found once and cached with the volume
        t.RandCropByPosNegLabeld(
            both,
            "label",
            patch,
            pos=0.33,
            neg=0.67,
            num_samples=per_volume,
            fg_indices_key="label_fg_indices",
            bg_indices_key="label_bg_indices",
        ),
        t.SelectItemsd(both),
        t.RandAffined(
            both,
            prob=moves,
            rotate_range=(turn,) * 3,
            scale_range=((a.scale[0] - 1, a.scale[1] - 1),) * 3,
            mode=("bilinear", "nearest"),
            padding_mode="zeros",
            device=device,
        ),
        t.RandGaussianNoised("image", prob=a.noise_p, std=a.noise),
        t.RandGaussianSmoothd("image", a.blur, a.blur, a.blur, prob=a.blur_p * a.channel_p),
        t.RandScaleIntensityd("image", factors=(a.brightness[0] - 1, a.brightness[1] - 1), prob=a.brightness_p),
        t.RandScaleIntensityFixedMeand(
            "image", factors=(a.contrast[0] - 1, a.contrast[1] - 1), preserve_range=True, prob=a.contrast_p
        ),
        t.RandSimulateLowResolutiond("image", prob=a.low_resolution_p * a.channel_p, zoom_range=a.low_resolution),
        t.RandAdjustContrastd("image", prob=a.gamma_p, gamma=a.gamma, retain_stats=True),
        t.RandAdjustContrastd("image", prob=a.gamma_invert_p, gamma=a.gamma, invert_image=True, retain_stats=True),
        *(t.RandFlipd(both, prob=a.mirror, spatial_axis=axis) for axis in range(3)),
    ]
    items = [{"image": c.image.astype(np.float32), "label": c.label[None]} for c in cases if c.label is not None]
    items = items * max(
        1, -(-EPOCH * batch // (per_volume * len(items)))
    )  # references, for an epoch as long as others'
    dataset = data.CacheDataset(items, t.Compose(steps), num_workers=0, progress=False, copy_cache=False)
    if on_device:
        loader = data.ThreadDataLoader(dataset, batch_size=batch // per_volume, shuffle=True, drop_last=True)
        return {"train_dataloaders": loader}
    collate = {"collate_fn": data.list_data_collate}
    return {"train_dataloaders": _loader(dataset, batch // per_volume, workers, **collate)}


# ---- ours -----------------------------------------------------------------------------------------------------------


def our_data(root: Path, folder: Path, patch: Triple, batch: int, **options: Any) -> VolumeData:
    """The data module over all training cases."""
    fixed: dict[str, Any] = {"augment": VolumeAugmentation(), "steps_per_epoch": EPOCH, "fold": None}
    return VolumeData(
        root=str(root), patch_size=patch, batch_size=batch, cache_dir=str(folder / "cache"), **{**fixed, **options}
    )


def draw(folder: Path, count: int, shape: Triple) -> Path:
    """Volumes with lesions in nnU-Net's raw layout, not compressed: reading them is not what is measured."""
    drawn = SyntheticVolumes(num_train=count, num_test=0, shape=shape, seed=0)
    for sample in drawn.read().splits["train"]:
        volume = drawn.volume(sample.name)
        assert volume.label is not None
        write_probability(folder / "imagesTr" / f"{sample.name}_0000.nii", volume.image[0], volume.geometry)
        write_label(folder / "labelsTr" / f"{sample.name}.nii", volume.label, volume.geometry)
    (folder / "dataset.json").write_text(
        '{"channel_names": {"0": "DWI"}, "labels": {"background": 0, "lesion": 1}, "file_ending": ".nii", '
        f'"numTraining": {count}}}'
    )
    return folder


def ways(
    root: Path, folder: Path, patch: Triple, batch: int, workers: Sequence[int]
) -> Iterator[tuple[str, int, Callable[[], Batches]]]:
    """Name, workers and how to make the batches; the fast ones first."""
    ours = partial(our_data, root, folder, patch, batch)

    def cases() -> list[Case]:
        return ours(num_workers=0, store="ram").cases("train")

    yield "ours, device store", 0, lambda: {"datamodule": ours(num_workers=0, store="gpu")}
    yield "MONAI, device", 0, lambda: monai_loader(cases(), patch, batch, 0, True)
    for n in workers:
        yield "ours, ram", n, partial(lambda n: {"datamodule": ours(num_workers=n, store="ram")}, n)
    for n in workers:
        yield "ours, mapped", n, partial(lambda n: {"datamodule": ours(num_workers=n, store="disk")}, n)
    for n in workers:
        yield (
            "ours, ram, albumentations",
            n,
            partial(lambda n: {"datamodule": ours(num_workers=n, store="ram", augment_on="cpu")}, n),
        )
    for n in workers:
        yield "MONAI", n, partial(lambda n: monai_loader(cases(), patch, batch, n, False), n)
    for n in workers:
        yield "guide", n, partial(lambda n: npz_loader(cases(), folder / "npz", patch, batch, n), n)


def arguments(args: list[str] | None) -> argparse.Namespace:
    """The script's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/dsunet_loader.json"))
    parser.add_argument("--root", type=Path, help="a data set in place of the drawn volumes")
    parser.add_argument("--volumes", type=int, default=32, help="drawn volumes (%(default)s)")
    parser.add_argument("--shape", type=int, nargs=3, default=(128, 160, 128), help="of each, D H W (%(default)s)")
    parser.add_argument("--patch", type=int, nargs=3, default=(96, 96, 96), help="D H W (%(default)s)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a window, at least")
    parser.add_argument("--folder", type=Path, help="for drawn volumes, cache and npz files; temporary if absent")
    parser.add_argument("--only", default="", help="comma-separated words that `WAY WORKERS` contains, each of them")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="Unix time after which no row starts")
    parser.add_argument("--tiny", action="store_true", help="a dry run on a CPU")
    options = parser.parse_args(args)
    if options.tiny:
        options.volumes, options.shape, options.patch = 4, (24, 24, 24), (16, 16, 16)
        options.batch, options.workers, options.seconds = 4, [1], 0.05
    return options


def measure(options: argparse.Namespace, folder: Path, results: Results) -> None:
    """All rows that are missing."""
    patch: Triple = tuple(options.patch)
    size = "x".join(map(str, options.shape))
    data = options.root.name if options.root else f"{options.volumes} drawn volumes of {size}"
    root = options.root
    words = [word for word in options.only.split(",") if word]
    for name, workers, make in ways(root or folder / "raw", folder, patch, options.batch, options.workers):
        key = {"data": data, "patch": list(patch), "batch": options.batch, "way": name, "workers": workers}
        wanted = all(word in f"{name} {workers}" for word in words)
        if not wanted or results.get(**key) is not None or time.time() > options.deadline:
            continue
        if root is None and not (folder / "raw" / "dataset.json").is_file():
            draw(folder / "raw", options.volumes, tuple(options.shape))
        begin = time.perf_counter()
        try:
            row = rate(make(), options.batch, workers, options.seconds, 1 if options.tiny else WINDOWS)
        except Exception as error:  # a peer that is missing or fails is a result
            row = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]}
        remarks = {"peer": version("monai")} if name.startswith("MONAI") else {}
        remarks |= {"cores": os.cpu_count(), "wall_s": round(time.perf_counter() - begin, 1)}
        results.add(key, {**row, **remarks})
        print(f"{name} {workers}: {row.get('error') or row['patches_s']} patches/s", flush=True)


def main(args: list[str] | None = None) -> None:
    """Measure what is missing and print the table."""
    options = arguments(args)
    warnings.filterwarnings("ignore")
    results = Results(options.out)
    if options.folder is not None:
        measure(options, options.folder, results)
    else:
        with tempfile.TemporaryDirectory() as folder:
            measure(options, Path(folder), results)
    print(table(results.rows, COLUMNS))


if __name__ == "__main__":
    main()
