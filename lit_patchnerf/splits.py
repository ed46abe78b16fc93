"""Which frames train and which are held out, and what a held-out frame's neighbours alone would give."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor

from lit_cli.errors import InputError

__all__ = [
    "FrameSplit",
    "Neighbours",
    "blend_frames",
    "blend_neighbours",
    "latent_frames",
    "nearest_neighbours",
    "parse_split",
    "split_frames",
]


class FrameSplit(NamedTuple):
    """Frames by role, each list ascending.

    Attributes:
        train: Trained on.
        unused: In the pool for training but left out now; neither trained on nor in the validation figure.
        val: Held out.
    """

    train: list[int]
    unused: list[int]
    val: list[int]


class Neighbours(NamedTuple):
    """For each of N frames, K trained frames and how much each counts.

    Attributes:
        indices: (N, K) int64 frames.
        weights: (N, K) float32; a row sums to 1.
    """

    indices: NDArray[np.int64]
    weights: NDArray[np.float32]


def parse_split(text: str) -> tuple[int, int, int]:
    """The three numbers of a split such as `6_6_10`.

    Args:
        text: `a_b_c` with 1 <= a <= b <= c. Of every c frames the first a are trained on, those up to b are unused and
            the rest is held out. So `6_6_10` holds out 4 of 10, and `9_10_10` none.

    Raises:
        InputError: it is no such text.

    Example:
        >>> parse_split("6_6_10")
        (6, 6, 10)
    """
    found = re.fullmatch(r"(\d+)_(\d+)_(\d+)", str(text), re.ASCII)
    a, b, c = (int(number) for number in found.groups()) if found else (0, 0, 0)
    if not 1 <= a <= b <= c:
        raise InputError(
            f"data.data_split is {str(text)!r}, expected a_b_c with 1 <= a <= b <= c: trained, trained or unused, and "
            "all frames of a block, such as 6_6_10"
        )
    return a, b, c


def split_frames(count: int, text: str, shuffle_seed: int | None = None) -> FrameSplit:
    """Give each frame its role, with HNeRV's meaning of `data_split`.

    The i-th frame is trained on where i % c < a, unused where a <= i % c < b, and held out otherwise. A warning says
    when none is held out, as the figures then say nothing about frames between the trained ones.

    Args:
        count: Frames of the video.
        text: `a_b_c`, see `parse_split`.
        shuffle_seed: Deal the roles to the frames in the order of `random.Random(seed).shuffle`, which is HNeRV's for
            shuffled data; None keeps their own.

    Raises:
        InputError: the text is no split, or there is no frame.

    Source: data_split of https://github.com/haochen-rye/HNeRV (its meaning; it drops the unused frames).

    Example:
        >>> split_frames(10, "6_8_10")
        FrameSplit(train=[0, 1, 2, 3, 4, 5], unused=[6, 7], val=[8, 9])
    """
    a, b, c = parse_split(text)
    if count < 1:
        raise InputError(f"data.video: {count} frames to split, expected at least 1")
    order = list(range(count))
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(order)
    train = sorted(frame for i, frame in enumerate(order) if i % c < a)
    unused = sorted(frame for i, frame in enumerate(order) if a <= i % c < b)
    val = sorted(frame for i, frame in enumerate(order) if i % c >= b)
    if not val:
        rank_zero_warn(
            f"data.data_split: {text} holds out none of {count} frames, so no figure is of held-out frames; the second "
            "number counts trained and unused frames together, and 9_9_10 holds out one of ten",
            category=UserWarning,
        )
    return FrameSplit(train, unused, val)


def nearest_neighbours(wanted: Sequence[int], train: Sequence[int]) -> Neighbours:
    """The nearest trained frame of each wanted one; of two equally near ones the earlier.

    Args:
        wanted: Frames.
        train: Trained frames, ascending, at least one.

    Returns:
        Neighbours with K = 1.

    Example:
        >>> nearest_neighbours([1, 3], [0, 2, 5]).indices.tolist()
        [[0], [2]]
    """
    pair = blend_neighbours(wanted, train)
    nearest = np.where(pair.weights[:, 0] >= pair.weights[:, 1], pair.indices[:, 0], pair.indices[:, 1])
    return Neighbours(nearest[:, None], np.ones((len(nearest), 1), np.float32))


def blend_neighbours(wanted: Sequence[int], train: Sequence[int]) -> Neighbours:
    """The trained frames before and after each wanted one, weighted linearly by their nearness in time.

    Before the first and behind the last trained frame, that one alone counts; it then stands in both columns. So does a
    wanted frame that is itself trained.

    Args:
        wanted: Frames.
        train: Trained frames, ascending, at least one.

    Returns:
        Neighbours with K = 2.

    Example:
        >>> blend_neighbours([6, 7, 12], [5, 10])
        Neighbours(indices=array([[ 5, 10],
               [ 5, 10],
               [10, 10]]), weights=array([[0.8, 0.2],
               [0.6, 0.4],
               [1. , 0. ]], dtype=float32))
    """
    if not len(train):
        raise ValueError("no trained frame, expected at least one")
    at, known = np.asarray(wanted, np.int64), np.asarray(train, np.int64)
    behind = np.searchsorted(known, at, side="left")  # the first trained frame at or after the wanted one
    after = known[np.minimum(behind, len(known) - 1)]
    before = np.where(after == at, at, known[np.maximum(behind - 1, 0)])
    gap = after - before
    share = np.where(gap > 0, (at - before) / np.maximum(gap, 1), 0.0)
    return Neighbours(np.stack([before, after], 1), np.stack([1 - share, share], 1).astype(np.float32))


def blend_frames(frames: Tensor, neighbours: Neighbours) -> Tensor:
    """What the neighbours alone would give: the baseline that a network has to beat on held-out frames.

    Args:
        frames: (T, H, W, 3) uint8, on any device.
        neighbours: Of N frames.

    Returns:
        (N, 3, H, W) float32 from 0 to 1, on the device of the frames.
    """
    indices = torch.from_numpy(neighbours.indices).to(frames.device)
    weights = torch.from_numpy(neighbours.weights).to(frames.device)
    total = torch.zeros(len(indices), *frames.shape[1:], device=frames.device)
    for k in range(indices.shape[1]):
        total += frames[indices[:, k]].float() * weights[:, k, None, None, None]
    return (total / 255).permute(0, 3, 1, 2)


def latent_frames(count: int, train: Sequence[int]) -> list[int]:
    """Points in time of the two resolutions of a grid decoder's latents.

    As many as frames and a quarter of them; fewer where frames are held out, so that every point lies near enough to a
    trained frame to be trained.

    Args:
        count: Frames of the video.
        train: Those that are trained on, ascending.

    Example:
        >>> latent_frames(132, range(132)), latent_frames(20, [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15])
        ([132, 33], [4, 3])
    """
    known = [-1, *train, count]
    gap = max(b - a for a, b in pairwise(known))  # 1 where all are trained on
    fine = max(2, count // gap)
    return [fine, min(fine, max(2, count // max(4, gap + 1)))]
