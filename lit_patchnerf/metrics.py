"""Figures of whole frames, exact under distributed training: PSNR, SSIM, MS-SSIM and how visible the seams are.

Conventions, which change every table:

- Figures are of frames, not of patches: re-assemble a frame first. The figure of a set of frames is the mean of the
  figures of its frames, and `_min` the worst of them.
- PSNR is -10 log10(mean squared error + 1e-9), as in HNeRV, so 90 dB at most. `psnr_db` is of the float output as it
  is, `psnr_8bit_db` of the output clamped and rounded to 8 bits, which is what a viewer sees.
- SSIM and MS-SSIM take valid windows of 11 (see `lit_patchnerf.ssim`); HNeRV's columns named ssim are MS-SSIM. A frame
  too small for 5 scales has no MS-SSIM and is NaN.
- Frames are `train`, `unused` (kept out of the training by the split, though not held out) or `val`. A set without
  frames has NaN. HNeRV counts unused frames as seen.

A frame that a `DistributedSampler` handed out twice counts once. No `update` waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lit_cli.errors import InputError
from lit_patchnerf.ssim import ms_ssim, smallest_side, ssim

__all__ = [
    "FIGURES",
    "SPLITS",
    "FrameMetrics",
    "SeamRatio",
    "SplitName",
    "held_out_beside_baselines",
    "mean_gradients",
    "psnr",
    "round_to_8bit",
]

SplitName = Literal["train", "unused", "val"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
WINDOW = 11  # the default of `ssim` and `ms_ssim`
FIGURES = ("psnr_db", "psnr_8bit_db", "ssim", "ms_ssim")


def psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, for a range of 0 to 1.

    Args:
        prediction: (N, ...) floating.
        target: Likewise.

    Returns:
        (N,) float32, at most 90.

    Source:
        HNeRV (arXiv 2304.02633), its code.

    >>> psnr(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.1)).round(decimals=3)
    tensor([20.])
    """
    with torch.autocast(prediction.device.type, enabled=False):
        return -10 * torch.log10((prediction.float() - target.float()).square().flatten(1).mean(1) + 1e-9)


def round_to_8bit(image: Tensor) -> Tensor:
    """The nearest of 256 levels from 0 to 1, float32.

    >>> round_to_8bit(torch.tensor([-1.0, 0.1, 2.0]))
    tensor([0.0000, 0.1020, 1.0000])
    """
    return (image.float().clamp(0, 1) * 255).round() / 255


class _FrameRows(Metric):
    """A row of numbers per frame, of which the first two are the frame and its split."""

    is_differentiable = False
    full_state_update = False

    rows: list[Tensor] | Tensor

    def __init__(self, columns: Sequence[str], **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.columns = tuple(columns)
        # Flat, since gathering needs equal numbers of dimensions from a process without any frame too.
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def _figures(self, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        """The figures of frames from their columns."""
        return columns

    def per_frame(self) -> dict[str, Tensor]:
        """(T,) tensors: `frame` ascending, `split` (0 train, 1 unused, 2 val), then figures. Call it everywhere."""
        with self._synced():
            table = self._table()
        frame, split = table.pop("frame").long(), table.pop("split").long()
        return {"frame": frame, "split": split, **self._figures(table)}

    def _add(self, frames: Sequence[int] | Tensor, splits: Sequence[SplitName] | Tensor, values: list[Tensor]) -> None:
        count = len(values[0])
        if len(frames) != count or len(splits) != count:
            raise ValueError(f"{len(frames)} frames and {len(splits)} splits of {count} images: expected one each")
        if not isinstance(splits, Tensor):
            if unknown := [split for split in splits if split not in SPLITS]:
                raise ValueError(f"split is {unknown[0]!r}, expected one of {', '.join(SPLITS)}")
            splits = self._filled([SPLITS.index(split) for split in splits])
        numbers = frames if isinstance(frames, Tensor) else self._filled(frames)
        columns = [numbers, splits, *values]
        rows = torch.stack([column.detach().to(self.device, torch.float32) for column in columns], 1)
        assert isinstance(self.rows, list)
        self.rows.append(rows.flatten())

    def _filled(self, numbers: Sequence[int]) -> Tensor:
        # Filled, not copied: a copy to the device would wait for it.
        return torch.stack([torch.full((), float(number), device=self.device) for number in numbers])

    def _table(self) -> dict[str, Tensor]:
        """Columns of the states as they are, sorted by frame; of a repeated frame the first row stays."""
        names = ("frame", "split", *self.columns)
        flat = dim_zero_cat(self.rows) if len(self.rows) else torch.zeros(0, device=self.device)
        rows = flat.reshape(-1, len(names))
        rows = rows[torch.argsort(rows[:, 0], stable=True)]
        rows = rows[torch.diff(rows[:, 0], prepend=rows.new_full((1,), math.nan)) != 0]
        return dict(zip(names, rows.unbind(1), strict=True))

    @contextmanager
    def _synced(self) -> Iterator[None]:
        """States of all processes inside, own states afterwards; `compute` alone has that built in."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync and not self._is_synced):
            yield


class FrameMetrics(_FrameRows):
    """PSNR, SSIM and MS-SSIM of whole frames: mean, minimum and by split.

    Args:
        structural: Whether to compute SSIM and MS-SSIM, which cost more than PSNR; without them they are left out.

    Example:
        >>> metric = FrameMetrics(structural=False)
        >>> target = torch.zeros(2, 3, 8, 8)
        >>> metric.update([0, 7], ["train", "val"], target + torch.tensor([0.1, 0.01])[:, None, None, None], target)
        >>> figures = metric.compute()
        >>> [round(figures[name].item(), 1) for name in ("psnr_db", "psnr_db_min", "val_psnr_db", "unused_psnr_db")]
        [30.0, 20.0, 40.0, nan]
    """

    def __init__(self, *, structural: bool = True, **kwargs: object) -> None:
        super().__init__(FIGURES if structural else FIGURES[:2], **kwargs)

    def update(
        self,
        frames: Sequence[int] | Tensor,
        splits: Sequence[SplitName] | Tensor,
        prediction: Tensor,
        target: Tensor,
    ) -> None:
        """Add frames.

        Args:
            frames: N numbers in the video.
            splits: N names, or numbers in the order of `SPLITS`.
            prediction: (N, 3, h, w) whole frames from 0 to 1.
            target: Likewise.

        Raises:
            ValueError: Shapes or numbers differ, or a split is unknown.
        """
        if prediction.ndim != 4 or prediction.shape != target.shape:
            raise ValueError(
                f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)}: expected both as (N, 3, h, w)"
            )
        with torch.no_grad():
            values = [psnr(prediction, target), psnr(round_to_8bit(prediction), target)]
            if len(self.columns) > 2:
                side = min(prediction.shape[-2:])
                none = torch.full_like(values[0], math.nan)
                values.append(ssim(prediction.float(), target.float()) if side >= WINDOW else none)
                values.append(ms_ssim(prediction.float(), target.float()) if side >= smallest_side() else none)
        self._add(frames, splits, values)

    def compute(self) -> dict[str, Tensor]:
        """() float32 by name: each figure, with `_min` its worst frame, and both for each split, as `val_psnr_db`."""
        table = self._table()
        figures = {}
        sets = {"": torch.ones_like(table["split"], dtype=torch.bool)}
        sets |= {f"{name}_": table["split"] == number for number, name in enumerate(SPLITS)}
        for prefix, chosen in sets.items():
            for name in self.columns:
                values = table[name][chosen]
                figures[prefix + name] = values.mean()
                figures[f"{prefix}{name}_min"] = values.min() if len(values) else values.new_tensor(math.nan)
        return figures


def held_out_beside_baselines(
    model: Mapping[str, Tensor], baselines: Mapping[str, Mapping[str, Tensor]], figure: str = "psnr_db"
) -> dict[str, float]:
    """The figure of held-out frames, those of predictors without a network, and what is gained over each of them.

    Args:
        model: What `FrameMetrics.compute` returns for the network.
        baselines: The same for each baseline by its name, such as `nearest` and `blend` (`splits.blend_frames`).
        figure: One of `FIGURES`.

    Raises:
        ValueError: There is no such figure.

    Example:
        >>> row = held_out_beside_baselines(
        ...     {"val_psnr_db": torch.tensor(31.5)}, {"blend": {"val_psnr_db": torch.tensor(30.25)}}
        ... )
        >>> row
        {'val_psnr_db': 31.5, 'val_psnr_db_blend': 30.25, 'val_psnr_db_over_blend': 1.25}
    """
    key = f"val_{figure}"
    if any(key not in figures for figures in (model, *baselines.values())):
        raise ValueError(f"figure is {figure!r}, expected one that the metrics of all predictors have")
    own = model[key].item()
    row = {key: own}
    for name, figures in baselines.items():
        row[f"{key}_{name}"] = figures[key].item()
        row[f"{key}_over_{name}"] = own - row[f"{key}_{name}"]
    return row


def mean_gradients(image: Tensor, patch: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Mean absolute difference of neighbouring pixels across the borders of patches, and inside patches.

    Args:
        image: (N, C, h, w).
        patch: Height and width of a patch; h and w are multiples of them.

    Returns:
        Two (N,) float32. The first is NaN for an image of one patch.
    """
    height, width = patch
    image = image.float()
    sums = []
    counts = [0, 0]
    for dim, size in ((-2, height), (-1, width)):
        difference = image.diff(dim=dim).abs()
        at = [slice(None)] * image.ndim
        at[dim] = slice(size - 1, None, size)
        across = difference[tuple(at)]
        sums.append((across.flatten(1).sum(1), difference.flatten(1).sum(1)))
        counts[0] += across[0].numel()
        counts[1] += difference[0].numel() - across[0].numel()
    border = sums[0][0] + sums[1][0]
    inside = sums[0][1] + sums[1][1] - border
    return border / (counts[0] or math.nan), inside / (counts[1] or math.nan)


class SeamRatio(_FrameRows):
    """How much stronger the gradient across the borders of patches is in the prediction than in the original.

    In both, the mean absolute gradient across the borders is divided by that inside the patches; the figure is the
    quotient of the two. It is 1 without seams, and above 1 where borders show.

    Args:
        patch: Height and width of a patch.

    Raises:
        InputError: A side of the patch is not positive.

    Example:
        >>> metric = SeamRatio((4, 4))
        >>> image = torch.rand(1, 3, 8, 8)
        >>> metric.update([0], ["train"], image, image)
        >>> metric.compute()["seam_ratio"].item()
        1.0
    """

    def __init__(self, patch: Sequence[int], **kwargs: object) -> None:
        super().__init__(("border", "inside", "target_border", "target_inside"), **kwargs)
        if len(patch) != 2 or not all(side > 0 for side in patch):
            raise InputError(f"data.patch_size is {list(patch)}, expected a height and a width in pixels")
        self.patch = (int(patch[0]), int(patch[1]))

    def update(
        self,
        frames: Sequence[int] | Tensor,
        splits: Sequence[SplitName] | Tensor,
        prediction: Tensor,
        target: Tensor,
    ) -> None:
        """Add frames; the arguments are those of `FrameMetrics.update`."""
        if prediction.ndim != 4 or prediction.shape != target.shape:
            raise ValueError(
                f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)}: expected both as (N, 3, h, w)"
            )
        height, width = prediction.shape[-2:]
        if height % self.patch[0] or width % self.patch[1]:
            raise ValueError(f"frames of {height} x {width}: expected multiples of the patch {self.patch}")
        with torch.no_grad():
            values = [*mean_gradients(prediction, self.patch), *mean_gradients(target, self.patch)]
        self._add(frames, splits, values)

    def compute(self) -> dict[str, Tensor]:
        """() float32: `seam_ratio` of the gradients averaged over all frames, `seam_ratio_max` of the worst frame."""
        table = self._table()
        ratio = _quotient({name: table[name].mean() for name in self.columns})
        worst = _quotient(table)
        return {"seam_ratio": ratio, "seam_ratio_max": worst.max() if len(worst) else ratio}

    def _figures(self, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"seam_ratio": _quotient(columns)}


def _quotient(columns: Mapping[str, Tensor]) -> Tensor:
    return (columns["border"] / columns["inside"]) / (columns["target_border"] / columns["target_inside"])
