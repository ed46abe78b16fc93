"""Augmentation of patches: batched on the device, or per sample by albumentations in loader workers.

What is drawn depends on the batch's seed alone. It is drawn on the host, where it costs microseconds: so it is the same
on every device, nothing waits for the device, and each change is computed for the samples that got it and no others.
Only the noise itself comes from a generator on the device.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lit_cli.errors import InputError
from lit_dsunet import intensity

__all__ = ["AlbumentationsVolume", "VolumeAugmentation", "augment_batch", "symmetries_of"]

ANISOTROPY = 3.0  # nnU-Net's: beyond this ratio of spacings, or of patch sizes, slices are left where they are
_Symmetry = tuple[tuple[int, ...], tuple[int, ...]]  # the axis that comes to each place, then the places to reverse


@dataclass
class VolumeAugmentation:
    """Ranges of the random changes and their probabilities, by default those of nnU-Net. Probability 0 switches off.

    Each change comes with its probability `<change>_p` per sample. Factors are drawn evenly on a logarithmic scale, so
    that up and down are equally likely around 1. Brightness, contrast, gamma, blur and low resolution are drawn for
    each channel by itself.

    Args:
        rotation: Largest angle about each axis, degrees.
        scale: Range of factors; 1.4 magnifies.
        shear: Largest tangent of the angle between two axes.
        in_plane: Rotate, scale, shear and coarsen in the slices only: `auto` where the spacing across them is more than
            3 times the finest, or the patch's longest side more than 3 times its shortest.
        padding: What lies beyond the patch: 0 and background, or the voxel at the `border` with its class.
        mirror: Probability of a reflection along each axis.
        symmetries: Probability per sample of a random symmetry of the patch in place of `mirror`: of the 48 of a cube
            (8 of a square) those that keep size and spacing.
        noise: Largest standard deviation of Gaussian noise, in units of the image.
        blur: Range of the Gaussian's sigma along each axis, voxels.
        brightness: Range of a factor on the image.
        contrast: Range of a factor on the distance to the mean; the result stays between the old extremes.
        low_resolution: Range of the share of voxels along each axis that are kept and then interpolated.
        gamma: Range of an exponent on the image scaled to 0..1; mean and deviation are restored.
        gamma_invert_p: Probability of gamma on the negative image, before and beside `gamma_p`.
        channel_p: Probability per channel of blur and of low resolution, once its sample was chosen.
    """

    rotation: float = 30.0
    rotation_p: float = 0.2
    scale: tuple[float, float] = (0.7, 1.4)
    scale_p: float = 0.2
    shear: float = 0.1
    shear_p: float = 0.0
    in_plane: Literal["auto", "always", "never"] = "auto"
    padding: Literal["zeros", "border"] = "zeros"
    mirror: float = 0.5
    symmetries: float = 0.0
    noise: float = 0.1
    noise_p: float = 0.1
    blur: tuple[float, float] = (0.5, 1.0)
    blur_p: float = 0.2
    brightness: tuple[float, float] = (0.75, 1.25)
    brightness_p: float = 0.15
    contrast: tuple[float, float] = (0.75, 1.25)
    contrast_p: float = 0.15
    low_resolution: tuple[float, float] = (0.5, 1.0)
    low_resolution_p: float = 0.25
    gamma: tuple[float, float] = (0.7, 1.5)
    gamma_p: float = 0.3
    gamma_invert_p: float = 0.1
    channel_p: float = 0.5

    def check(self) -> None:
        """Raise `InputError` with one line if a value makes no sense."""
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            where = f"data.augment.{name}: expected"
            if name.endswith("_p") or name in ("mirror", "symmetries"):
                if not 0 <= value <= 1:
                    raise InputError(f"{where} a probability from 0 to 1, got {value}")
            elif name in ("rotation", "shear", "noise"):
                if not 0 <= value < float("inf"):
                    raise InputError(f"{where} 0 or more, got {value}")
            elif name in ("in_plane", "padding"):
                known = ("auto", "always", "never") if name == "in_plane" else ("zeros", "border")
                if value not in known:
                    raise InputError(f"{where} one of {', '.join(known)}, got {value!r}")
            elif len(value) != 2 or not 0 < value[0] <= value[1] < float("inf"):
                raise InputError(f"{where} two numbers above 0 in ascending order, got {value}")
        if self.low_resolution[1] > 1:
            raise InputError(f"data.augment.low_resolution: expected at most 1, got {self.low_resolution[1]}")


@torch.no_grad()
def augment_batch(
    image: Tensor,
    label: Tensor,
    options: VolumeAugmentation,
    seed: int,
    *,
    spacing: Sequence[float] | None = None,
    crop: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Augment a batch on the device it lies on.

    Image and mask are resampled once, by one affine map: trilinear and nearest. The order is nnU-Net's: space, noise,
    blur, brightness, contrast, low resolution, gamma, reflections.

    Args:
        image: (B, C, D, H, W) or (B, C, H, W), any floating type.
        label: (B, D, H, W) or (B, H, W) class indices, any integer type.
        options: Ranges and probabilities.
        seed: Everything drawn follows from it; 0 or more.
        spacing: mm per voxel along the axes, so that a rotation is one in the patient; None for equal ones.
        crop: Size of the result, taken from the middle. A patch cut larger than that brings its own surroundings for
            what a rotation turns in.

    Returns:
        Image (B, C, ...) float32 and label (B, ...) of its old type; the inputs stay as they are.

    Raises:
        InputError: `crop` is larger than the patch.

    Example:
        >>> image, label = torch.rand(2, 1, 8, 8, 8), torch.zeros(2, 8, 8, 8, dtype=torch.uint8)
        >>> new, mask = augment_batch(image, label, VolumeAugmentation(), seed=3, crop=(6, 6, 6))
        >>> new.shape, mask.dtype
        (torch.Size([2, 1, 6, 6, 6]), torch.uint8)
    """
    whole = tuple(image.shape[2:])
    size = whole if crop is None else tuple(crop)
    if len(size) != len(whole) or any(not 0 < s <= w for s, w in zip(size, whole, strict=True)):
        raise InputError(f"data.augment: crop is {size}, expected at most the patch's size {whole}")
    plan = _draw(len(image), image.shape[1], size, options, seed, tuple(spacing or (1.0,) * len(size)))
    with torch.autocast(image.device.type, enabled=False):
        image, label = _resample(image, label, size, plan, options.padding)
        generator = torch.Generator(image.device).manual_seed(seed)
        items = image.view(-1, *size)  # a channel of a sample each
        for change, chosen, values in plan.changes:
            index = _send(chosen, image.device)
            old = items if len(chosen) == len(items) else items.index_select(0, index)
            new = change(old, [_send(v, image.device) for v in values], generator)
            items.index_copy_(0, index, new)
        return _reflect(image, plan.symmetries), _reflect(label.unsqueeze(1), plan.symmetries).squeeze(1)


class _Plan(NamedTuple):
    """All that was drawn for a batch, on the host."""

    moved: NDArray[np.int64]  # (n,) samples to resample
    matrices: NDArray[np.float64]  # (n, d, d) from the offset of an output voxel to that of its source
    changes: list[tuple[intensity.Change, NDArray[np.int64], list[NDArray[Any]]]]  # what, for which items, how much
    symmetries: list[_Symmetry]  # per sample


def _draw(
    batch: int,
    channels: int,
    size: tuple[int, ...],
    options: VolumeAugmentation,
    seed: int,
    spacing: tuple[float, ...],
) -> _Plan:
    """Draw a batch's changes, each from a stream of its own, so that switching one off leaves the others alone."""
    dims, items = len(size), batch * channels

    def stream(name: str) -> np.random.Generator:
        return np.random.default_rng((seed, *name.encode()))

    def factors(rng: np.random.Generator, limits: tuple[float, float], count: int) -> NDArray[np.float64]:
        return np.exp(rng.uniform(np.log(limits[0]), np.log(limits[1]), count))

    through = _through_axis(size, spacing, options.in_plane)
    moving = [a for a in range(dims) if a != through]
    rng = stream("space")
    chance = rng.random((3, batch))
    turned, scaled, sheared = chance < np.array([[options.rotation_p], [options.scale_p], [options.shear_p]])
    angles = np.radians(rng.uniform(-options.rotation, options.rotation, (batch, dims))) * turned[:, None]
    zoom = np.where(scaled, factors(rng, options.scale, batch), 1)
    slants = rng.uniform(-options.shear, options.shear, (batch, dims, dims)) * sheared[:, None, None]
    moved = np.flatnonzero(turned | scaled | sheared)
    matrices = np.stack([_matrix(angles[b], zoom[b], slants[b], moving, spacing) for b in range(batch)])[moved]

    def deviation(rng: np.random.Generator) -> list[NDArray[Any]]:
        return [np.repeat(rng.uniform(0, options.noise, batch), channels)]  # one for all channels, as in nnU-Net

    def sigma(rng: np.random.Generator) -> list[NDArray[Any]]:
        return [intensity.kernels(rng.uniform(*options.blur, (items, dims)), options.blur[1])]

    def indices(rng: np.random.Generator) -> list[NDArray[Any]]:
        share, all_of_them = factors(rng, options.low_resolution, items), np.ones(items)
        return [
            t for a in range(dims) for t in intensity.coarse_indices(size[a], all_of_them if a == through else share)
        ]

    def factor(limits: tuple[float, float]) -> Callable[[np.random.Generator], list[NDArray[Any]]]:
        return lambda rng: [factors(rng, limits, items)]

    recipe: list[tuple[str, float, intensity.Change, Callable[[np.random.Generator], list[NDArray[Any]]]]] = [
        ("noise", 1.0, intensity.noise, deviation),
        ("blur", options.channel_p, intensity.blur, sigma),
        ("brightness", 1.0, intensity.brightness, factor(options.brightness)),
        ("contrast", 1.0, intensity.contrast, factor(options.contrast)),
        ("low_resolution", options.channel_p, intensity.coarsen, indices),
        ("gamma_invert", 1.0, intensity.gamma_inverted, factor(options.gamma)),
        ("gamma", 1.0, intensity.gamma, factor(options.gamma)),
    ]
    changes: list[tuple[intensity.Change, NDArray[np.int64], list[NDArray[Any]]]] = []
    for name, channel_p, change, draw in recipe:
        rng = stream(name)
        samples = rng.random((batch, 1)) < getattr(options, f"{name}_p")
        chosen = np.flatnonzero(samples & (rng.random((batch, channels)) < channel_p))
        if len(chosen):
            changes.append((change, chosen, [v[chosen] for v in draw(rng)]))

    rng = stream("symmetries")
    known = symmetries_of(size, spacing)
    full, picks = rng.random(batch) < options.symmetries, rng.integers(len(known), size=batch)
    flips = rng.random((batch, dims)) < options.mirror
    same = tuple(range(dims))
    symmetries = [
        known[picks[b]] if full[b] else (same, tuple(int(a) for a in np.flatnonzero(flips[b]))) for b in range(batch)
    ]
    return _Plan(moved, matrices, changes, symmetries)


def _send(values: NDArray[Any], device: torch.device) -> Tensor:
    """To the device, without waiting for it; floats as float32."""
    if values.dtype == np.float64:
        values = values.astype(np.float32)
    return torch.from_numpy(values).to(device, non_blocking=True)


def _through_axis(size: tuple[int, ...], spacing: tuple[float, ...], rule: str) -> int | None:
    """The axis across the slices where these are to be left in their places."""
    if len(size) == 2 or rule == "never":
        return None
    if rule == "always":
        return int(np.argmax(spacing)) if max(spacing) > min(spacing) else int(np.argmin(size))
    if max(spacing) > ANISOTROPY * min(spacing):
        return int(np.argmax(spacing))
    return int(np.argmin(size)) if max(size) > ANISOTROPY * min(size) else None


def _matrix(
    angles: NDArray[np.float64],
    zoom: float,
    slants: NDArray[np.float64],
    axes: list[int],
    spacing: tuple[float, ...],
) -> NDArray[np.float64]:
    """(d, d) from an output voxel's offset from the middle to its source's, moving `axes` only."""
    dims = len(spacing)
    matrix = np.eye(dims)
    planes = list(itertools.combinations(axes, 2))
    for angle, (i, j) in zip(angles, planes, strict=False):
        turn = np.eye(dims)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    shear = np.eye(dims)
    for i, j in planes:
        shear[i, j] = slants[i, j]
    matrix = matrix @ shear
    matrix[:, axes] /= zoom
    mm = np.asarray(spacing)
    return matrix * mm / mm[:, None]  # voxels to mm, the map, mm to voxels


def _resample(
    image: Tensor, label: Tensor, size: tuple[int, ...], plan: _Plan, padding: Literal["zeros", "border"]
) -> tuple[Tensor, Tensor]:
    """The middle of the patch as a copy, in the samples to move through their affine map."""
    whole, device = image.shape[2:], image.device
    first = [(w - s) // 2 for w, s in zip(whole, size, strict=True)]
    middle = tuple(slice(o, o + s) for o, s in zip(first, size, strict=True))
    cut = image[(..., *middle)].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    mask = label[(..., *middle)].clone(memory_format=torch.contiguous_format)
    if len(plan.moved) == 0:
        return cut, mask
    index, matrices = _send(plan.moved, device), _send(plan.matrices, device)
    dims = len(size)
    offsets = [torch.arange(s, device=device) - (s - 1) / 2 for s in size]
    axes = []
    for a in range(dims):  # no matrix product: it would run in a short float format where those are allowed
        source = torch.full((1,) * (dims + 1), first[a] + (size[a] - 1) / 2, device=device)
        for b, offset in enumerate(offsets):
            along = (offset if b == dims - 1 else offset.view(-1, *(1,) * (dims - 1 - b)))[None]
            source = source + matrices[:, a, b].view(-1, *(1,) * dims) * along
        axes.append((2 * source + 1) / whole[a] - 1)
    grid = torch.stack(axes[::-1], dim=-1)  # grid_sample wants x first
    options: dict[str, Any] = {"padding_mode": padding, "align_corners": False}
    values = F.grid_sample(image.index_select(0, index).float(), grid, mode="bilinear", **options)
    classes = F.grid_sample(label.index_select(0, index).unsqueeze(1).float(), grid, mode="nearest", **options)
    cut.index_copy_(0, index, values)
    mask.index_copy_(0, index, classes.squeeze(1).to(mask.dtype))
    return cut, mask


def symmetries_of(size: Sequence[int], spacing: Sequence[float]) -> list[_Symmetry]:
    """The reflections and exchanges of axes that keep a patch's size and spacing.

    Returns:
        Pairs of the axis that comes to each place and the places that are reversed then; the identity comes first.

    Example:
        >>> [len(symmetries_of(s, (1, 1, 1))) for s in ((8, 8, 8), (8, 8, 4), (8, 6, 4))]
        [48, 16, 8]
    """
    dims = range(len(size))
    orders = [
        order
        for order in itertools.permutations(dims)
        if all(size[i] == size[o] and abs(spacing[i] - spacing[o]) <= 0.01 * spacing[i] for i, o in enumerate(order))
    ]
    reversals = [r for n in range(len(size) + 1) for r in itertools.combinations(dims, n)]
    return [(order, r) for order in orders for r in reversals]


def _reflect(x: Tensor, symmetries: list[_Symmetry]) -> Tensor:
    """(B, C, ...), each sample under its symmetry; samples of one symmetry in one go."""
    order = sorted(range(len(x)), key=lambda b: symmetries[b])
    groups = [(key, len(list(members))) for key, members in itertools.groupby(order, key=lambda b: symmetries[b])]
    if [key for key, _ in groups] == [(tuple(range(x.ndim - 2)), ())]:
        return x
    x = x.index_select(0, _send(np.array(order), x.device))
    parts = [
        part.permute(0, 1, *(a + 2 for a in axes)).flip([a + 2 for a in reverse])
        for part, ((axes, reverse), _) in zip(x.split([n for _, n in groups]), groups, strict=True)
    ]
    return torch.cat(parts).index_select(0, _send(np.argsort(order), x.device))


class AlbumentationsVolume:
    """Changes of one sample through albumentations, for loader workers without a device to augment on.

    A cubic patch is turned by one of the 48 cube symmetries; of another only the slices are reflected, and turned where
    they are square. The affine map acts in the slices, the same in each. Grey values are scaled to 0..1 for
    albumentations and back, so `noise`, `brightness` and the filling of holes (with the minimum) refer to the sample's
    own range.

    Args:
        symmetry: Probability of the symmetry.
        rotation: Largest angle in the slices, degrees.
        scale: Range of factors in the slices.
        affine_p: Probability of the two.
        brightness: Largest addition, as a fraction of the range.
        contrast: Largest change of the factor on the scaled values.
        gamma: Range of exponents.
        blur: Range of the sigma in the slices, voxels.
        noise: Largest standard deviation, as a fraction of the range.
        intensity_p: Probability of each of these five.
        holes: Largest number of boxes that are blanked in the image and left in the label.
        hole_size: Largest side of a box as a fraction of the patch's.

    Raises:
        ValueError: A range makes no sense (albumentations' own message).
    """

    def __init__(
        self,
        *,
        symmetry: float = 1.0,
        rotation: float = 30.0,
        scale: tuple[float, float] = (0.7, 1.4),
        affine_p: float = 0.2,
        brightness: float = 0.1,
        contrast: float = 0.25,
        gamma: tuple[float, float] = (0.7, 1.5),
        blur: tuple[float, float] = (0.5, 1.0),
        noise: float = 0.02,
        intensity_p: float = 0.15,
        holes: int = 0,
        hole_size: float = 0.2,
    ) -> None:
        # Its import asks a server for the newest version, which stalls without a network.
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
        import albumentations as A

        shared: list[Any] = [A.Affine(rotate=(-rotation, rotation), scale=scale, keep_ratio=True, p=affine_p)]
        if holes:
            sides: Any = {f"hole_{side}_range": (hole_size / 2, hole_size) for side in ("depth", "height", "width")}
            shared.append(A.CoarseDropout3D(num_holes_range=(1, holes), **sides, p=1.0))
        flips = [A.HorizontalFlip(p=symmetry / 2), A.VerticalFlip(p=symmetry / 2)]
        # On the slices as a film, since the second fails on volumes (2.0.8).
        self._grey = A.Compose(
            [
                A.GaussianBlur(blur_limit=0, sigma_limit=blur, p=intensity_p),
                A.RandomBrightnessContrast(brightness, contrast, p=intensity_p),
                A.RandomGamma(gamma_limit=(100 * gamma[0], 100 * gamma[1]), p=intensity_p),
            ]
        )
        self._noise, self._intensity_p = noise, intensity_p
        self._cubic = A.Compose([A.CubicSymmetry(p=symmetry), *shared])
        self._square = A.Compose([A.D4(p=symmetry), *shared])
        self._other = A.Compose([*flips, *shared])

    def __call__(
        self, image: NDArray[np.float32], label: NDArray[np.uint8], seed: int
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Augment one sample.

        Args:
            image: (C, D, H, W).
            label: (D, H, W).
            seed: Everything drawn follows from it.

        Returns:
            Image and label of the same sizes and types.
        """
        depth, height, width = label.shape
        transform = self._other if height != width else self._cubic if depth == height else self._square
        # `set_random_seed` would give each transform the same numbers, so that what is rotated is always also blurred.
        rng = np.random.default_rng(seed)
        state = random.Random(seed)
        for part in (transform, self._grey):
            part.set_random_state(rng, state)
        low, high = float(image.min()), float(image.max())
        span = max(high - low, 1e-6)
        volume = np.ascontiguousarray(np.moveaxis((image - low) / span, 0, -1), np.float32)
        out = transform(volume=volume, mask3d=np.ascontiguousarray(label))
        new = np.asarray(self._grey(images=out["volume"].reshape(*volume.shape))["images"]).reshape(*volume.shape)
        if rng.random() < self._intensity_p:  # albumentations' own would be the same in every slice
            new = new + rng.uniform(0, self._noise) * rng.standard_normal(new.shape, dtype=np.float32)
        new = np.moveaxis(new, -1, 0) * span + low
        return np.ascontiguousarray(new, np.float32), np.ascontiguousarray(out["mask3d"])
