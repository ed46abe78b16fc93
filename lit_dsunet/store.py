"""Where preprocessed volumes live: written once to a cache, then resident on the device, in memory, or mapped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_dsunet.preprocess import Preprocessing, prepare_volume
from lit_dsunet.samples import Geometry, Volume, VolumeSample

__all__ = ["Case", "PatchSampler", "Resident", "cut_patch", "foreground_centres", "prepare_cases"]

VERSION = 1  # raise it when preprocessing changes: old caches are then left alone
MOST_CENTRES = 10_000  # per class and case
Triple = tuple[int, int, int]
Read = Callable[[VolumeSample, Mapping[int, int]], Volume]


@dataclass(frozen=True, slots=True)
class Case:
    """A preprocessed case.

    Attributes:
        name: Identifier.
        image: (C, D, H, W) float16, in memory or mapped.
        label: (D, H, W) uint8, or None.
        centres: (N, 4) int16: class and voxel of foreground voxels, at most 10,000 of a class.
        geometry: Of the file.
        native_shape: (D, H, W) before resampling.
        native_label: (D, H, W) uint8 before resampling, which metrics are computed on; the same array as `label`
            where nothing was resampled.
    """

    name: str
    image: NDArray[np.float16]
    label: NDArray[np.uint8] | None
    centres: NDArray[np.int16]
    geometry: Geometry
    native_shape: Triple
    native_label: NDArray[np.uint8] | None = None

    @property
    def size(self) -> Triple:
        """(D, H, W)."""
        d, h, w = self.image.shape[1:]
        return d, h, w


def foreground_centres(label: NDArray[np.uint8] | None, seed: int = 0) -> NDArray[np.int16]:
    """(N, 4) class and voxel of the foreground, sampled without repetition where a class has very many."""
    if label is None:
        return np.zeros((0, 4), np.int16)
    rng = np.random.default_rng(seed)
    parts = []
    for value in np.unique(label[label > 0]):
        where = np.argwhere(label == value)
        if len(where) > MOST_CENTRES:
            where = where[np.sort(rng.choice(len(where), MOST_CENTRES, replace=False))]
        parts.append(np.column_stack([np.full(len(where), value), where]))
    return np.concatenate(parts).astype(np.int16) if parts else np.zeros((0, 4), np.int16)


def prepare_cases(
    samples: Sequence[VolumeSample],
    how: Preprocessing,
    label_values: Mapping[int, int],
    read: Read,
    cache_dir: Path | None,
    *,
    in_memory: bool = True,
    threads: int | None = None,
) -> list[Case]:
    """Read and preprocess every case, or take what an earlier run left in the cache.

    Args:
        samples: What to read.
        how: Preprocessing.
        label_values: Class by value in the label files.
        read: Reads one case.
        cache_dir: Folder of the cache; None keeps nothing on disk.
        in_memory: Read arrays into memory instead of mapping the cache files.
        threads: Cases at once.

    Raises:
        InputError: a case cannot be read.
    """

    def one(sample: VolumeSample) -> Case:
        folder = None if cache_dir is None else cache_dir / _key(sample, how, label_values)
        found = None if folder is None else _load(folder, sample.name, in_memory)
        if found is not None:
            return found
        volume = read(sample, label_values)
        image, label = prepare_volume(volume, how)
        d, h, w = volume.image.shape[1:]
        centres, half = foreground_centres(label), image.astype(np.float16)
        case = Case(volume.name, half, label, centres, volume.geometry, (d, h, w), volume.label)
        if folder is not None and _save(folder, case) and not in_memory:
            return _load(folder, sample.name, in_memory) or case
        return case

    with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(one, samples))


def _key(sample: VolumeSample, how: Preprocessing, label_values: Mapping[int, int]) -> str:
    files = [*sample.images, *([sample.label] if sample.label is not None else [])]
    stamps = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.exists()]
    values = sorted(label_values.items())
    text = json.dumps([VERSION, sample.name, stamps, asdict(how), values], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _load(folder: Path, name: str, in_memory: bool) -> Case | None:
    """A cached case; None if it is not there or damaged, which only costs the time to make it again."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        mode = None if in_memory else "r"
        image = np.load(folder / "image.npy", mmap_mode=mode)
        label = np.load(folder / "label.npy", mmap_mode=mode) if meta["label"] else None
        native = np.load(folder / "native.npy", mmap_mode=mode) if meta["resampled"] else label
        centres = np.load(folder / "centres.npy")
    except (OSError, ValueError, KeyError, EOFError):
        return None
    geometry = Geometry(np.array(meta["affine"]), tuple(meta["shape"]), tuple(meta["spacing"]))
    return Case(name, image, label, centres, geometry, tuple(meta["native_shape"]), native)


def _save(folder: Path, case: Case) -> bool:
    """Write a case in one move; a full disk costs the cache, not the run."""
    meta = {
        "label": case.label is not None,
        "resampled": case.native_label is not case.label,
        "affine": case.geometry.affine.tolist(),
        "shape": list(case.geometry.shape),
        "spacing": list(case.geometry.spacing),
        "native_shape": list(case.native_shape),
    }
    scratch = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent))
        np.save(scratch / "image.npy", case.image)
        np.save(scratch / "centres.npy", case.centres)
        if case.label is not None:
            np.save(scratch / "label.npy", case.label)
        if case.native_label is not None and meta["resampled"]:
            np.save(scratch / "native.npy", case.native_label)
        (scratch / "meta.json").write_text(json.dumps(meta))
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    except OSError:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        return False
    return True


class PatchSampler:
    """First voxels of patches, from stored foreground voxels and a seed: index arithmetic, no volume is read.

    The last `round(B * foreground)` patches of a batch are centred on a foreground voxel (of a class drawn first, then
    of its voxels); all others lie anywhere. A patch stays inside its volume; along an axis where the volume is smaller
    than the patch, the volume lies in the middle of it.

    Args:
        cases: The volumes.
        patch: (D, H, W).
        foreground: Share of patches with forced foreground.
    """

    def __init__(self, cases: Sequence[Case], patch: Triple, foreground: float = 0.33) -> None:
        self.sizes = np.array([case.size for case in cases], np.int64).reshape(-1, 3)
        self.patch = np.array(patch, np.int64)
        self.foreground = foreground
        self._by_class = [_by_class(case.centres) for case in cases]
        missing = np.maximum(0, self.patch - self.sizes)
        self.low = -(missing // 2)
        self.high = np.maximum(self.low, self.sizes - self.patch)

    def draw(self, cases: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
        """(B, 3) first voxels for the cases (B,); negative where the patch begins before its volume."""
        rng = np.random.default_rng(seed)
        low, high = self.low[cases], self.high[cases]
        starts = rng.integers(low, high + 1)
        forced = round(len(cases) * self.foreground)
        for i in range(len(cases) - forced, len(cases)):
            classes = self._by_class[cases[i]]
            if not classes:
                continue
            voxels = classes[rng.integers(len(classes))]
            centre = voxels[rng.integers(len(voxels))]
            starts[i] = np.clip(centre - self.patch // 2, low[i], high[i])
        return starts


def _by_class(centres: NDArray[np.int16]) -> list[NDArray[np.int64]]:
    return [centres[centres[:, 0] == value, 1:].astype(np.int64) for value in np.unique(centres[:, 0])]


def cut_patch(case: Case, start: Sequence[int], patch: Triple) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
    """A patch of a case in host memory, zeros outside of the volume.

    Returns:
        Image (C, *patch) and label (*patch).
    """
    image = np.zeros((case.image.shape[0], *patch), np.float16)
    label = np.zeros(patch, np.uint8)
    source, target = [], []
    for first, length, size in zip(start, patch, case.size, strict=True):
        begin, end = max(0, first), min(size, first + length)
        source.append(slice(begin, end))
        target.append(slice(begin - first, end - first))
    image[(slice(None), *target)] = case.image[(slice(None), *source)]
    if case.label is not None:
        label[tuple(target)] = case.label[tuple(source)]
    return image, label


class Resident:
    """All volumes in one flat tensor on the device; a batch of patches is one gather."""

    def __init__(self, cases: Sequence[Case], device: torch.device) -> None:
        self.device = device
        channels = cases[0].image.shape[0] if cases else 1
        counts = [int(np.prod(case.size)) for case in cases]
        self.offsets = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int64, device=device)
        self.sizes = torch.tensor([case.size for case in cases], dtype=torch.int64, device=device).reshape(-1, 3)
        self._bounds = [0, *np.cumsum(counts).tolist()]
        self._shapes = [case.size for case in cases]
        self.image = torch.zeros(channels, self._bounds[-1], dtype=torch.float16, device=device)
        self.label = torch.zeros(self._bounds[-1], dtype=torch.uint8, device=device)
        for i, case in enumerate(cases):
            part = slice(self._bounds[i], self._bounds[i + 1])
            self.image[:, part] = torch.from_numpy(np.ascontiguousarray(case.image)).flatten(1).to(device)
            if case.label is not None:
                self.label[part] = torch.from_numpy(np.ascontiguousarray(case.label)).flatten().to(device)

    @staticmethod
    def nbytes(cases: Sequence[Case]) -> int:
        """Bytes that the cases take on the device."""
        return sum(case.image.nbytes + int(np.prod(case.size)) for case in cases)

    def patches(self, cases: Tensor, starts: Tensor, patch: Triple) -> tuple[Tensor, Tensor]:
        """Patches of cases (B,) at first voxels (B, 3), both int64 on the device.

        Returns:
            Image (B, C, *patch) float16 and label (B, *patch) uint8; zeros outside of the volume.
        """
        axes, inside = [], []
        sizes = self.sizes[cases]
        for a, length in enumerate(patch):
            index = starts[:, a, None] + torch.arange(length, device=self.device)
            inside.append((index >= 0) & (index < sizes[:, a, None]))
            axes.append(index)
        d, h, w = axes[0][:, :, None, None], axes[1][:, None, :, None], axes[2][:, None, None, :]
        mask = inside[0][:, :, None, None] & inside[1][:, None, :, None] & inside[2][:, None, None, :]
        rows, columns = sizes[:, 1, None, None, None], sizes[:, 2, None, None, None]
        flat = self.offsets[cases][:, None, None, None] + (d * rows + h) * columns + w
        flat = torch.where(mask, flat, 0)
        image = self.image[:, flat].transpose(0, 1) * mask[:, None]
        return image, self.label[flat] * mask

    def volume(self, case: int) -> tuple[Tensor, Tensor]:
        """Image (C, D, H, W) float16 and label (D, H, W) uint8 of one case, without a copy."""
        part = slice(self._bounds[case], self._bounds[case + 1])
        shape = self._shapes[case]
        return self.image[:, part].unflatten(1, shape), self.label[part].unflatten(0, shape)
