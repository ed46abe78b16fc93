"""What the heads of deep supervision are taught: labels at their own resolution, the weights of their losses, lesions.

All of it is made on the device that holds the label, and nothing waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_cli.errors import InputError

__all__ = ["TargetMode", "WeightRule", "device_components", "ds_targets", "ds_weights"]

TargetMode = Literal["soft", "max", "nearest"]
WeightRule = Literal["halving", "guide"]


def ds_targets(
    label: Tensor, num_classes: int, strides: Sequence[Sequence[int]], mode: TargetMode = "soft"
) -> list[Tensor]:
    """Targets of the heads, made on the device that holds the label.

    A cell is the block of stride voxels that one logit stands for.

    - `soft`: the share of the cell that each class covers. A lesion of one voxel still counts 1/512 at stride 8.
    - `max`: the highest class index in the cell, so that a lesion survives at every stride and grows with it. Where
      several foreground classes meet in a cell, the highest index takes it: number the classes that must not be lost
      last.
    - `nearest`: the class of the voxel at the cell's centre, the one after it for an even stride (nearest-exact, as
      nnU-Net and MONAI do). Small structures fall between these voxels: of lesions with a median of 17 voxels, 20 %
      have none left at stride 2, 62 % at stride 4 and 86 % at stride 8.

    A head of stride 1 gets the label itself in every mode: its one-hot code would say the same in K times the memory.

    Args:
        label: (B, D, H, W) or (B, H, W) class indices of any integer type.
        num_classes: K, for `soft`.
        strides: Per head, the voxels of a cell along each axis, finest first.
        mode: As above.

    Returns:
        Per head (B, K, ...) float32 for `soft`, (B, ...) class indices of the label's type otherwise.

    Raises:
        ValueError: a stride does not divide the label's size.

    Example:
        >>> label = torch.tensor([[[0, 1, 0, 0], [0, 0, 0, 0]]])
        >>> soft, nearest = (ds_targets(label, 2, [(2, 2)], mode)[0] for mode in ("soft", "nearest"))
        >>> soft[0, 1], nearest[0]
        (tensor([[0.2500, 0.0000]]), tensor([[0, 0]]))
    """
    if mode not in get_args(TargetMode):
        raise InputError(f"targets: mode is {mode!r}, expected one of {', '.join(get_args(TargetMode))}")
    size = tuple(label.shape[1:])
    targets: list[Tensor] = []
    previous, reached = label, (1,) * len(size)
    for stride in (tuple(s) for s in strides):
        if len(stride) != len(size) or any(n % s for n, s in zip(size, stride, strict=True)):
            raise ValueError(f"strides: {stride} does not divide the label's size {size}")
        if max(stride) == 1:
            targets.append(label)
        elif mode == "nearest":
            targets.append(label[(slice(None), *(slice(s // 2, None, s) for s in stride))])
        else:
            # Blocks of blocks are blocks, so a coarser head starts from the finer one where it can.
            if any(s % r for s, r in zip(stride, reached, strict=True)):
                previous, reached = label, (1,) * len(size)
            step = tuple(s // r for s, r in zip(stride, reached, strict=True))
            previous, reached = _pool(previous, num_classes, step, mode), stride
            targets.append(previous)
    return targets


def _pool(target: Tensor, num_classes: int, step: tuple[int, ...], mode: Literal["soft", "max"]) -> Tensor:
    """A label or a coarser target of `ds_targets`, coarser by `step`."""
    dims = len(step)
    if mode == "max":
        blocks = [n for size, s in zip(target.shape[1:], step, strict=True) for n in (size // s, s)]
        return target.reshape(len(target), *blocks).amax(tuple(range(2, 2 * dims + 1, 2)))
    pool = F.avg_pool3d if dims == 3 else F.avg_pool2d
    if target.ndim == dims + 2:
        return pool(target, step)
    # One class at a time: the one-hot code at full resolution never exists.
    classes = [pool((target == k).float().unsqueeze(1), step) for k in range(num_classes)]
    return torch.cat(classes, dim=1)


def ds_weights(count: int, rule: WeightRule | Sequence[float] = "halving") -> tuple[float, ...]:
    """Weights of the heads' losses, finest first.

    Args:
        count: Number of heads.
        rule: `halving` is 1/2^i divided by the sum, so that the loss keeps its scale whatever the number of heads;
            `guide` is 1 for the finest head and 1/2, 1/4, 1/8 ... for the others beginning with the COARSEST, not
            divided by the sum (1, .125, .25, .5 for four heads); or `count` numbers, taken as they are.

    Raises:
        InputError: the numbers are not `count` finite ones of 0 or more with one above 0.

    Example:
        >>> ds_weights(4, "guide")
        (1.0, 0.125, 0.25, 0.5)
        >>> [round(w, 3) for w in ds_weights(4)]
        [0.533, 0.267, 0.133, 0.067]
    """
    if isinstance(rule, str):
        if rule not in get_args(WeightRule):
            raise InputError(f"weights: expected {', '.join(get_args(WeightRule))} or numbers, got {rule!r}")
        if rule == "guide":
            return (1.0, *(0.5 ** (count - i) for i in range(1, count)))
        total = sum(0.5**i for i in range(count))
        return tuple(0.5**i / total for i in range(count))
    weights = tuple(float(w) for w in rule)
    if len(weights) != count or not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
        raise InputError(f"weights: expected {count} numbers of 0 or more, finest head first, got {list(rule)}")
    return weights


@torch.no_grad()
def device_components(mask: Tensor, iterations: int = 12) -> Tensor:
    """Connected components of masks, on the device and without knowing on the host how many there are.

    Every voxel points to one of the same component with an index at least as large; all end at the component's largest
    index. In each round a voxel and the one it points to take over the largest index that a neighbour points to, and
    pointers are shortened, so that the rounds grow about with the logarithm of a component's extent. Too few rounds
    split a component; they never join two.

    Args:
        mask: (B, D, H, W) or (B, H, W) bool.
        iterations: Rounds. 12 are enough for anything that looks like a lesion and for random masks of 64^3 voxels at
            the density where a single component begins to fill them.

    Returns:
        (B, ...) int64: for a voxel of the mask the flat index, within its sample, of the component's last voxel; for
        any other voxel its own.

    Source:
        FastSV (arXiv 1910.05971), with the 26 (8) neighbours' maximum taken by pooling.

    Example:
        >>> device_components(torch.tensor([[[1, 0, 0, 1], [0, 1, 0, 1]]]).bool())
        tensor([[[5, 1, 2, 7],
                 [4, 5, 6, 7]]])
    """
    pool = F.max_pool3d if mask.ndim == 4 else F.max_pool2d
    inside = mask.flatten(1)
    count = inside.shape[1]
    exact = torch.float32 if count < 2**24 else torch.float64  # pooling needs a floating type
    own = torch.arange(count, device=mask.device).expand(len(mask), count)
    parent = own
    for _ in range(iterations):
        grand = parent.gather(1, parent)
        near = pool(torch.where(inside, grand, -1).view(mask.shape).to(exact).unsqueeze(1), 3, 1, 1)
        near = torch.where(inside, near.flatten(1).long(), own)
        parent = parent.scatter_reduce(1, parent, near, "amax")
        parent = torch.maximum(torch.maximum(parent, grand), near)
    for _ in range(2):
        parent = parent.gather(1, parent)
    return parent.view(mask.shape)
