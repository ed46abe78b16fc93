"""Drawn brains with lesions: for demonstrations, tests and the study of lesion targets, without any data.

Lesions follow a size law, exact to the voxel: sizes are drawn from a log-normal distribution whose default quartiles
(6, 17 and 46 voxels) are about those of 3115 white-matter lesions at 1 mm.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from lit_cli.errors import InputError
from lit_dsunet.nifti import write_label, write_probability
from lit_dsunet.samples import Geometry, Volume, VolumeSample, VolumeTable

__all__ = ["LesionLaw", "SyntheticVolumes", "implant_lesions"]

_Mask = NDArray[np.bool_]
_Field = NDArray[np.float32]
_MIN_SIDE = 16
_SPREAD = 0.6745  # quartile of the normal distribution
_AROUND = np.ones((3, 3, 3), dtype=bool)


@dataclass(frozen=True)
class LesionLaw:
    """How many lesions a volume gets, how large they are and how they look.

    Args:
        count: Mean number per volume (Poisson). Fewer come out where there is no room.
        median: Median size in voxels.
        quartiles: Ratio of the upper quartile to the median, and of the median to the lower one (log-normal).
        largest: Sizes are cut off here.
        contrast: Range of the change of the grey value in a lesion, in standard deviations of the tissue.
        edge: Sigma in voxels of the blurred edge; the label ends where the blurred lesion falls to about a half.
    """

    count: float = 6.0
    median: float = 17.0
    quartiles: float = 2.72
    largest: int = 20000
    contrast: tuple[float, float] = (2.0, 4.0)
    edge: float = 0.6

    def __post_init__(self) -> None:
        for name, least in (("count", 0.0), ("median", 1.0), ("quartiles", 1.0), ("largest", 1.0), ("edge", 0.0)):
            if not least <= getattr(self, name) < math.inf:
                raise InputError(f"lesions: {name} is {getattr(self, name)}, expected {least:g} or more")
        if not self.contrast[0] <= self.contrast[1]:
            raise InputError(f"lesions: contrast is {self.contrast}, expected the smaller number first")

    def sizes(self, rng: np.random.Generator, count: int | None = None) -> NDArray[np.int64]:
        """Sizes in voxels, the largest first; as many as `count` says or is drawn.

        >>> np.percentile(LesionLaw().sizes(np.random.default_rng(0), 100000), [25, 50, 75]).round()
        array([ 6., 17., 46.])
        """
        number = int(rng.poisson(self.count)) if count is None else count
        sigma = math.log(self.quartiles) / _SPREAD
        drawn = np.exp(rng.normal(math.log(self.median), sigma, number))
        return np.sort(np.clip(np.rint(drawn), 1, self.largest).astype(np.int64))[::-1]


@dataclass(frozen=True)
class SyntheticVolumes:
    """A data set of drawn volumes.

    A brain is an ellipsoid with a brighter rim, dark ventricles and smooth texture, under a bias field and the noise of
    a magnitude image. A volume depends on the seed, its split and its number alone.

    Args:
        num_train: Volumes of the split `train`.
        num_test: Volumes of the split `test`.
        shape: Voxels along D, H, W.
        seed: Of everything random.
        channels: 1, in which lesions are bright as in DWI; 2 adds one in which they are dark as in ADC.
        spacing: mm along D, H, W.
        lesions: What the lesions are like. By default larger ones than nature's, for a demonstration within a minute.
        noise: Standard deviation of the noise; the tissue's mean is about 1.

    Raises:
        InputError: A count, the shape, the channels or the spacing is out of range.

    Example:
        >>> data = SyntheticVolumes(num_train=2, num_test=1, shape=(24, 24, 24))
        >>> [s.name for s in data.read().splits["train"]]
        ['train_000', 'train_001']
        >>> data.volume("test_000").image.shape
        (1, 24, 24, 24)
    """

    num_train: int = 24
    num_test: int = 8
    shape: tuple[int, int, int] = (48, 48, 48)
    seed: int = 0
    channels: int = 1
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    lesions: LesionLaw = LesionLaw(median=150.0, quartiles=2.0, contrast=(4.0, 6.0))
    noise: float = 0.05

    def __post_init__(self) -> None:
        if min(self.num_train, self.num_test) < 0 or self.num_train + self.num_test == 0:
            counts = f"{self.num_train} train and {self.num_test} test"
            raise InputError(f"synthetic: {counts} volumes, expected at least one")
        if len(self.shape) != 3 or min(self.shape) < _MIN_SIDE:
            raise InputError(f"synthetic: shape is {self.shape}, expected three sizes of at least {_MIN_SIDE}")
        if self.channels not in (1, 2):
            raise InputError(f"synthetic: channels is {self.channels}, expected 1 or 2")
        if len(self.spacing) != 3 or not all(0 < s < math.inf for s in self.spacing):
            raise InputError(f"synthetic: spacing is {self.spacing}, expected three numbers above 0")
        if self.seed < 0 or not self.noise >= 0:
            raise InputError(f"synthetic: seed {self.seed} and noise {self.noise}, expected 0 or more")

    def read(self) -> VolumeTable:
        """The table of the data set. Its samples have no files: `volume` draws them by name, `write` makes files."""
        splits = {
            split: [VolumeSample(f"{split}_{i:03d}", (), None, f"{split}_{i:03d}") for i in range(count)]
            for split, count in (("train", self.num_train), ("test", self.num_test))
            if count
        }
        return VolumeTable(splits, ("DWI", "ADC")[: self.channels], ("background", "lesion"), {0: 0, 1: 1})

    def volumes(self, split: str) -> list[Volume]:
        """All volumes of a split, drawn one after the other."""
        return [self.volume(sample.name) for sample in self.read().splits.get(split, [])]

    def volume(self, name: str) -> Volume:
        """Draw a volume.

        Raises:
            InputError: There is none of this name.
        """
        for number, (split, count) in enumerate((("train", self.num_train), ("test", self.num_test))):
            if name in (names := [f"{split}_{i:03d}" for i in range(count)]):
                return self._draw(name, np.random.default_rng((self.seed, number, names.index(name))))
        raise InputError(
            f"synthetic: there is no volume {name!r}, expected one of {self.num_train} train_### or "
            f"{self.num_test} test_###"
        )

    def _draw(self, name: str, rng: np.random.Generator) -> Volume:
        shape = self.shape
        brain, depth = _ellipsoid(rng, shape)
        tissue = 1 + 0.12 * _texture(rng, shape, 2.0) + 0.12 * _texture(rng, shape, 5.0)
        tissue += 0.25 * np.exp(-np.square(depth / 0.12))  # the rim
        for _ in range(2):
            centre = rng.uniform(-0.15, 0.15, 3)
            tissue -= 0.5 * np.exp(-3 * _radius(shape, centre, rng.uniform(0.15, 0.3, 3)) ** 2)
        bias = np.exp(0.15 * _texture(rng, shape, max(shape) / 3))
        clean = np.where(brain, tissue, 0).astype(np.float32)
        label, change = _lesions(brain & (depth > 0.1), self.lesions, rng)
        image = np.empty((self.channels, *shape), np.float32)
        for c in range(self.channels):
            # The second channel shows the same tissue the other way round, as ADC shows DWI's.
            base = clean if c == 0 else np.where(brain, 2 - tissue, 0).astype(np.float32)
            signal = ndimage.gaussian_filter(base, 0.6) + (0.17 if c == 0 else -0.12) * change
            noise = self.noise * rng.standard_normal((2, *shape), dtype=np.float32)
            image[c] = np.hypot(signal * bias + noise[0], noise[1])
        return Volume(name, image, label.astype(np.uint8), _geometry(shape, self.spacing))

    def write(self, folder: str | Path) -> Path:
        """Write the data set in nnU-Net's raw layout, with the test labels in `labelsTs`.

        Returns:
            The folder, which readers of that layout take as root.
        """
        folder = Path(folder)
        table = self.read()
        for split, short in (("train", "Tr"), ("test", "Ts")):
            for sample in table.splits.get(split, []):
                volume = self.volume(sample.name)
                geometry = volume.geometry
                for c, channel in enumerate(volume.image):
                    write_probability(folder / f"images{short}" / f"{sample.name}_{c:04d}.nii.gz", channel, geometry)
                assert volume.label is not None
                write_label(folder / f"labels{short}" / f"{sample.name}.nii.gz", volume.label, geometry)
        description = {
            "channel_names": {str(i): name for i, name in enumerate(table.channel_names)},
            "labels": {name: i for i, name in enumerate(table.class_names)},
            "numTraining": self.num_train,
            "file_ending": ".nii.gz",
        }
        (folder / "dataset.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        return folder


def implant_lesions(
    volume: Volume,
    law: LesionLaw,
    seed: int,
    *,
    foreground: _Mask | None = None,
    signs: Sequence[float] | None = None,
) -> Volume:
    """A volume with synthetic lesions in place of its label, for studies that need to know every lesion.

    The grey values in a lesion are the tissue's own, shifted by the law's contrast times the foreground's standard
    deviation: the texture stays, and a lesion in dark tissue stays darker than one in bright tissue.

    Args:
        volume: The volume; it stays as it is.
        law: What the lesions are like.
        seed: Everything drawn follows from it.
        foreground: (D, H, W) where lesions may lie; by default where the first channel is above the threshold between
            its two groups of grey values (Otsu), holes filled, without the outermost layer of voxels.
        signs: Factor of the contrast in each channel, by default 1 in the first and -1 in the others.

    Returns:
        A new volume with label 1 in the lesions and 0 elsewhere.

    Raises:
        InputError: The foreground's shape differs, or it is empty.

    Source:
        Threshold: N. Otsu, IEEE Trans. SMC 9 (1979), 62-66.
    """
    channels, *shape = volume.image.shape
    if foreground is None:
        foreground = np.asarray(ndimage.binary_erosion(_otsu(volume.image[0])), bool)
    if foreground.shape != tuple(shape) or not foreground.any():
        raise InputError(
            f"{volume.name}: foreground of shape {foreground.shape} with {int(foreground.sum())} voxels, expected some "
            f"of {tuple(shape)}"
        )
    factors = (1.0, *[-1.0] * (channels - 1)) if signs is None else tuple(signs)
    if len(factors) != channels:
        raise InputError(f"{volume.name}: {len(factors)} signs, expected one for each of the {channels} channels")
    label, change = _lesions(foreground, law, np.random.default_rng(seed))
    scale = [factor * float(channel[foreground].std()) for factor, channel in zip(factors, volume.image, strict=True)]
    image = (volume.image + np.reshape(scale, (-1, 1, 1, 1)) * change).astype(np.float32)
    return Volume(volume.name, image, label.astype(np.uint8), volume.geometry, [*volume.notes])


def _lesions(allowed: _Mask, law: LesionLaw, rng: np.random.Generator) -> tuple[_Mask, _Field]:
    """Where lesions are, and by how many standard deviations they change the grey values, blurred at the edges."""
    label = np.zeros(allowed.shape, dtype=bool)
    change = np.zeros(allowed.shape, dtype=np.float32)
    for size in law.sizes(rng).tolist():
        for _ in range(20):
            voxels = _lesion(allowed, size, rng)
            # Lesions keep a voxel's distance, so that each is a component by itself.
            if voxels is None or _touches(label, voxels):
                continue
            label[voxels] = True
            change[voxels] = rng.uniform(*law.contrast)
            break
    if law.edge > 0:
        change = np.asarray(ndimage.gaussian_filter(change, law.edge), np.float32)
    return label, np.where(allowed, change, np.float32(0))


def _lesion(allowed: _Mask, size: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], ...] | None:
    """The voxels of one connected lesion of exactly `size`, or None where there is no room.

    They are those of smallest distance from a random voxel, in a metric of random axes with a wavy surface.
    """
    candidates = np.flatnonzero(allowed)
    middle = np.unravel_index(rng.choice(candidates), allowed.shape)
    radius = math.ceil(1.6 * (size * 3 / (4 * math.pi)) ** (1 / 3)) + 2
    box = tuple(slice(max(0, m - radius), min(s, m + radius + 1)) for s, m in zip(allowed.shape, middle, strict=True))
    axes = [np.arange(b.start, b.stop) - m for b, m in zip(box, middle, strict=True)]
    offset = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    distance = np.linalg.norm(offset @ turn * np.exp(rng.uniform(-0.3, 0.3, 3)), axis=-1)
    if size >= 30:
        direction = offset / np.maximum(np.linalg.norm(offset, axis=-1, keepdims=True), 1)
        waves = np.sin(direction @ rng.normal(0, 2.5, (3, 4)) + rng.uniform(0, 2 * math.pi, 4))
        distance = distance * (1 + 0.1 * waves.sum(-1))
    distance[~allowed[box]] = np.inf
    flat = distance.ravel()
    if np.isfinite(flat).sum() < size:
        return None
    chosen = np.zeros(flat.shape, dtype=bool)
    chosen[np.argsort(flat, kind="stable")[:size]] = True
    chosen = chosen.reshape(distance.shape)
    _, count = ndimage.label(chosen, _AROUND)  # type: ignore[misc]
    if count != 1:
        return None
    places = np.nonzero(chosen)
    return tuple(p + b.start for p, b in zip(places, box, strict=True))


def _touches(label: _Mask, voxels: tuple[NDArray[np.int64], ...]) -> bool:
    box = tuple(slice(max(0, int(v.min()) - 1), int(v.max()) + 2) for v in voxels)
    mine = np.zeros_like(label[box])
    mine[tuple(v - b.start for v, b in zip(voxels, box, strict=True))] = True
    return bool(np.any(np.asarray(ndimage.binary_dilation(mine, _AROUND)) & label[box]))


def _texture(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> _Field:
    """Smooth random field of mean 0 and deviation 1: smoothed coarse noise, interpolated."""
    step = max(1.0, sigma / 1.5)
    field = rng.standard_normal([math.ceil(s / step) + 2 for s in shape], dtype=np.float32)
    field = np.asarray(ndimage.gaussian_filter(field, sigma / step), np.float32)
    for size in shape:
        place = np.arange(size) / step
        left = place.astype(np.int64)
        weights = np.zeros((size, len(field)), np.float32)
        weights[np.arange(size), left] = 1 - (place - left)
        weights[np.arange(size), left + 1] = place - left
        field = np.tensordot(field, weights, axes=(0, 1))  # the axis goes to the end, so three times round
    return (field - field.mean()) / max(float(field.std()), 1e-6)


def _radius(shape: tuple[int, ...], centre: NDArray[np.float64], half: NDArray[np.float64]) -> _Field:
    """Distance from a centre in half axes; both in units of half the volume."""
    axes = [((2 * np.arange(s) + 1) / s - 1 - c) / h for s, c, h in zip(shape, centre, half, strict=True)]
    return np.sqrt(axes[0][:, None, None] ** 2 + axes[1][:, None] ** 2 + axes[2] ** 2).astype(np.float32)


def _ellipsoid(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[_Mask, _Field]:
    """The brain, and the depth below its surface in half axes."""
    radius = _radius(shape, rng.uniform(-0.06, 0.06, 3), rng.uniform(0.75, 0.88, 3))
    radius *= 1 + 0.04 * _texture(rng, shape, max(shape) / 8)
    return radius < 1, 1 - radius


def _otsu(channel: NDArray[np.float32]) -> _Mask:
    counts, edges = np.histogram(channel, 256)
    middle = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)[:-1]
    above = channel.size - below
    total = np.cumsum(counts * middle)
    between = (total[:-1] / np.maximum(below, 1) - (total[-1] - total[:-1]) / np.maximum(above, 1)) ** 2 * below * above
    return np.asarray(ndimage.binary_fill_holes(channel > edges[1 + int(np.argmax(between))]), bool)


def _geometry(shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> Geometry:
    """Of a file stored as x, y, z with the origin of mm in its middle."""
    affine = np.diag([*spacing[::-1], 1.0])
    affine[:3, 3] = -(np.array(shape[::-1]) - 1) / 2 * spacing[::-1]
    return Geometry(affine, (shape[2], shape[1], shape[0]), spacing)
