"""Whole volumes through a network that sees patches: every voxel in at least one window, several windows at once."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["SlidingWindow", "WindowWeight", "importance", "mirror_axes", "window_starts"]

WindowWeight = Literal["gaussian", "constant"]
Network = Callable[[Tensor], Tensor]
Triple = tuple[int, int, int]


def window_starts(size: int, patch: int, overlap: float) -> list[int]:
    """First voxels of the windows along one axis: evenly spread, the first at 0, the last at the end.

    `ceil(max(0, size - patch) / (patch * (1 - overlap))) + 1` windows, the number that nnU-Net and MONAI use.

    Args:
        size: Voxels along the axis, at least `patch`.
        patch: Voxels of a window.
        overlap: Share of a window that the next one covers again, in [0, 1).

    >>> window_starts(240, 128, 0.5), window_starts(96, 96, 0.5)
    ([0, 56, 112], [0])
    """
    room = size - patch
    count = math.ceil(room / (patch * (1 - overlap)) - 1e-9) + 1
    return [0] if count == 1 else [round(i * room / (count - 1)) for i in range(count)]


@functools.lru_cache(maxsize=8)
def importance(patch: Triple, weight: WindowWeight, device: torch.device) -> Tensor:
    """(D, H, W) float32 weight of each voxel of a window, at most 1; Gaussian with sigma = patch / 8."""
    out = torch.ones(patch, device=device)
    if weight == "gaussian":
        for axis, size in enumerate(patch):
            x = (torch.arange(size, device=device) - (size - 1) / 2) / (size / 8)
            shape = [1, 1, 1]
            shape[axis] = size
            out = out * torch.exp(-0.5 * x.square()).view(shape)
        out = out / out.max()
        # The far corners are smaller than float32 can hold beside 1; they still must count where nothing else does.
        out = out.clamp(min=1e-6)
    return out


def mirror_axes(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """All combinations of mirrored axes, the unmirrored first.

    >>> mirror_axes([0, 2])
    [(), (0,), (2,), (0, 2)]
    """
    return [c for n in range(len(axes) + 1) for c in itertools.combinations(axes, n)]


class _Window(NamedTuple):
    volume: int
    start: Triple
    mirror: tuple[int, ...]


class SlidingWindow:
    """Logits of whole volumes.

    Windows of all volumes and their mirrored copies share batches. Where a volume and its accumulator do not fit on
    the device, it stays on the host and is worked through in slabs along its first axis; out of memory on the way has
    the same effect, with a smaller batch.

    Args:
        patch: Window size (D, H, W); D = 1 gives slices to a two-dimensional network.
        overlap: Share of a window that the next one covers again.
        weight: Of the voxels of a window in the average.
        batch: Windows per forward pass.
        pad_batches: Fill a last, smaller batch with copies of its last window, whose logits are dropped. A compiled
            network then never meets a second batch size, for which it would be compiled again; others lose by it.
        mirror: Axes (0 to 2 for D, H, W) of test-time mirroring; all their combinations are averaged.
        device: Where the network is.
        memory: Bytes that volumes and accumulators may take on the device; by default half of what is free there.
        slices: Neighbouring slices that a two-dimensional network sees as channels (2.5-D), odd.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        patch: Triple,
        *,
        overlap: float = 0.5,
        weight: WindowWeight = "gaussian",
        batch: int = 4,
        pad_batches: bool = False,
        mirror: Sequence[int] = (),
        device: torch.device | str = "cpu",
        memory: int | None = None,
        slices: int = 1,
    ) -> None:
        if not 0 <= overlap < 1 or batch < 1 or any(p < 1 for p in patch) or slices % 2 == 0:
            raise ValueError(f"sliding window: overlap {overlap}, batch {batch}, patch {patch}, slices {slices}")
        if slices > 1 and patch[0] != 1:
            raise ValueError(f"sliding window: {slices} slices as channels need a patch of one slice, got {patch}")
        self.patch, self.overlap, self.weight, self.batch = patch, overlap, weight, batch
        self.pad_batches = pad_batches
        self.mirror = mirror_axes(sorted(set(mirror)))
        self.device = torch.device(device)
        self.memory, self.slices = memory, slices

    def count(self, size: Sequence[int]) -> int:
        """Forward passes of single windows that a volume (D, H, W) takes.

        >>> SlidingWindow((128, 128, 128)).count((240, 240, 155))
        18
        """
        return math.prod(len(self._starts(s, p)) for s, p in zip(size, self.patch, strict=True)) * len(self.mirror)

    @torch.no_grad()
    def __call__(self, network: Network, volumes: Sequence[Tensor]) -> list[Tensor]:
        """Average logits.

        Args:
            network: (B, C, D, H, W) to logits (B, K, D, H, W); (B, C, H, W) to (B, K, H, W) with slices.
            volumes: Each (C, D, H, W), on any device.

        Returns:
            For each (K, D, H, W) float32, on the device, or on the host where the volume did not fit.
        """
        out: list[Tensor | None] = [None] * len(volumes)
        here: list[int] = []
        for i, volume in enumerate(volumes):
            if self._fits([volumes[j] for j in here] + [volume]):
                here.append(i)
                continue
            self._finish(network, volumes, here, out)
            here = [i] if self._fits([volume]) else []
            if not here:
                out[i] = self._in_slabs(network, volume)
        self._finish(network, volumes, here, out)
        return [o for o in out if o is not None]

    # ---- geometry ------------------------------------------------------------------------------------------------

    def _starts(self, size: int, patch: int) -> list[int]:
        if patch == 1:  # slices: each once
            return list(range(max(size, 1)))
        starts = window_starts(max(size, patch), patch, self.overlap)
        # Holds by construction; a voxel that no window sees would be background for ever, and nobody would notice.
        ends = [0, *(s + patch for s in starts)]
        assert starts[0] == 0
        assert ends[-1] == max(size, patch)
        assert all(s <= e for s, e in zip(starts, ends[:-1], strict=True))
        return starts

    def _padded(self, volume: Tensor) -> tuple[Tensor, Triple]:
        """The volume with at least the size of a window, and how many zeros lie before it."""
        missing = [max(0, p - s) for p, s in zip(self.patch, volume.shape[1:], strict=True)]
        before = (missing[0] // 2, missing[1] // 2, missing[2] // 2)
        if not any(missing):
            return volume, before
        pad = [n for m, b in zip(reversed(missing), reversed(before), strict=True) for n in (b, m - b)]
        return F.pad(volume, pad), before

    def _fits(self, volumes: Sequence[Tensor]) -> bool:
        if self.device.type != "cuda" and self.memory is None:
            return True
        limit = self.memory if self.memory is not None else torch.cuda.mem_get_info(self.device)[0] // 2
        # The number of classes is not known before the first pass; eight float32 maps are a cautious guess.
        voxels = [math.prod(max(s, p) for s, p in zip(v.shape[1:], self.patch, strict=True)) for v in volumes]
        need = sum(4 * (v.shape[0] + 8) * n for v, n in zip(volumes, voxels, strict=True))
        return need <= limit

    # ---- the two ways --------------------------------------------------------------------------------------------

    def _finish(
        self, network: Network, volumes: Sequence[Tensor], which: Sequence[int], out: list[Tensor | None]
    ) -> None:
        if not which:
            return
        try:
            done = self._whole(network, [volumes[i] for i in which])
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            smaller = self._smaller()
            done = [smaller(network, [volumes[i]])[0] for i in which]
        for i, logits in zip(which, done, strict=True):
            out[i] = logits

    def _smaller(self) -> SlidingWindow:
        """The same with half the batch, or at batch 1 with slabs."""
        out = copy.copy(self)
        out.batch, out.memory = (self.batch // 2, self.memory) if self.batch > 1 else (1, 0)
        return out

    def _whole(self, network: Network, volumes: Sequence[Tensor]) -> list[Tensor]:
        padded = [self._padded(v.to(self.device, non_blocking=True)) for v in volumes]
        grids = [[self._starts(s, p) for s, p in zip(v.shape[1:], self.patch, strict=True)] for v, _ in padded]
        windows = [
            _Window(i, (d, h, w), mirror)
            for i, grid in enumerate(grids)
            for d, h, w in itertools.product(*grid)
            for mirror in self.mirror
        ]
        weight = importance(self.patch, self.weight, self.device)
        sums: list[Tensor] = []
        for part, logits in self._forward(network, [v for v, _ in padded], windows):
            if not sums:
                classes = logits.shape[1]
                sums = [torch.zeros(classes, *v.shape[1:], device=self.device) for v, _ in padded]
            for window, values in zip(part, logits, strict=True):
                sums[window.volume][(slice(None), *self._box(window.start))] += values * weight
        out = []
        for (_, before), total, grid, volume in zip(padded, sums, grids, volumes, strict=True):
            norm = self._norm(grid, tuple(total.shape[1:]))  # type: ignore[arg-type]
            total /= norm
            inside = [slice(b, b + s) for b, s in zip(before, volume.shape[1:], strict=True)]
            out.append(total[(slice(None), *inside)])
        return out

    def _in_slabs(self, network: Network, volume: Tensor) -> Tensor:
        """The same with the volume on the host and a slab of the accumulator on the device."""
        host, before = self._padded(volume.cpu())
        planes, rows, columns = [self._starts(s, p) for s, p in zip(host.shape[1:], self.patch, strict=True)]
        weight = importance(self.patch, self.weight, self.device)
        depth = self.patch[0]
        pieces: list[Tensor] = []
        slab: Tensor | None = None
        for start, following in zip(planes, [*planes[1:], None], strict=True):
            low, high = self._reach(start, host.shape[1])
            here = host[:, low:high].to(self.device)
            windows = [
                _Window(0, (start - low, row, column), mirror)
                for row, column in itertools.product(rows, columns)
                for mirror in self.mirror
            ]
            for part, logits in self._forward(network, [here], windows):
                if slab is None:
                    slab = torch.zeros(logits.shape[1], depth, *host.shape[2:], device=self.device)
                for window, values in zip(part, logits, strict=True):
                    _, h, w = self._box(window.start)
                    slab[:, :, h, w] += values * weight
            assert slab is not None
            done = depth if following is None else following - start
            pieces.append(slab[:, :done].to("cpu", copy=True))
            if following is not None:
                rest = slab[:, done:].clone()
                slab.zero_()
                slab[:, : depth - done] = rest
        total = torch.cat(pieces, dim=1)
        total /= self._norm([planes, rows, columns], tuple(total.shape[1:])).cpu()  # type: ignore[arg-type]
        inside = [slice(b, b + s) for b, s in zip(before, volume.shape[1:], strict=True)]
        return total[(slice(None), *inside)]

    # ---- parts ---------------------------------------------------------------------------------------------------

    def _forward(
        self, network: Network, volumes: Sequence[Tensor], windows: Sequence[_Window]
    ) -> Iterator[tuple[Sequence[_Window], Tensor]]:
        """Batches of windows with their logits, mirrored back and averaged over their mirrored copies' number."""
        for i in range(0, len(windows), self.batch):
            part = windows[i : i + self.batch]
            missing = self.batch - len(part) if self.pad_batches else 0
            images = torch.stack([self._cut(volumes[w.volume], w) for w in [*part, *[part[-1]] * missing]])
            if self.patch[0] == 1:
                images = images.flatten(1, 2)  # slices become channels
            logits = network(images)[: len(part)].float()
            if self.patch[0] == 1:
                logits = logits.unsqueeze(2)
            if len(self.mirror) > 1:
                unmirrored = [
                    m.flip([a + 1 for a in w.mirror]) if w.mirror else m for m, w in zip(logits, part, strict=True)
                ]
                logits = torch.stack(unmirrored) / len(self.mirror)
            yield part, logits

    def _cut(self, volume: Tensor, window: _Window) -> Tensor:
        box = self._box(window.start)
        if self.slices > 1:
            half = self.slices // 2
            z = torch.arange(window.start[0] - half, window.start[0] + half + 1, device=volume.device)
            patch = volume[:, z.clamp(0, volume.shape[1] - 1)][:, :, box[1], box[2]]
        else:
            patch = volume[(slice(None), *box)]
        return patch.flip([a + 1 for a in window.mirror]) if window.mirror else patch

    def _box(self, start: Triple) -> tuple[slice, slice, slice]:
        d, h, w = (slice(s, s + p) for s, p in zip(start, self.patch, strict=True))
        return d, h, w

    def _reach(self, start: int, depth: int) -> tuple[int, int]:
        """Planes that the windows beginning at `start` look at."""
        half = self.slices // 2
        return max(0, start - half), min(depth, start + self.patch[0] + half)

    def _norm(self, grid: Sequence[Sequence[int]], size: Triple) -> Tensor:
        """Sum of the weights at each voxel.

        The weight of a window is a product over the axes unless small values were clamped, so it is summed in full.
        """
        key = tuple(tuple(g) for g in grid)
        return _weight_sum(key, size, self.patch, self.weight, self.device)


@functools.lru_cache(maxsize=4)
def _weight_sum(
    grid: tuple[tuple[int, ...], ...], size: Triple, patch: Triple, weight: WindowWeight, device: torch.device
) -> Tensor:
    out = torch.zeros(size, device=device)
    one = importance(patch, weight, device)
    for corner in itertools.product(*grid):
        out[tuple(slice(s, s + p) for s, p in zip(corner, patch, strict=True))] += one
    return out
