"""Rankings of a video's patches by embeddings, their pictures, and how far a network's agree with the true ones.

A table of embeddings (T, rows, cols, D) may be the network's or CLIP's own: nothing here needs a network.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_cli.errors import InputError
from lit_patchnerf.patches import Geometry
from lit_patchnerf.similarity import (
    blend_embeddings,
    label_probabilities,
    mean_embedding,
    relevancy,
    similarity_report,
    text_scores,
)
from lit_patchnerf.splits import FrameSplit, blend_neighbours, nearest_neighbours
from lit_patchnerf.video import VideoWriter

__all__ = [
    "Hit",
    "Score",
    "cell_box",
    "embedding_report",
    "frame_curve",
    "heat_picture",
    "score_table",
    "top_hits",
    "write_heat",
]

Score = Literal["relevancy", "cosine", "probability"]
Frames = NDArray[np.uint8]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Hit:
    """A patch that answers a query.

    Attributes:
        frame: Number from 0.
        row: Of the grid.
        col: Likewise.
        score: The higher, the better.
        box: x1 y1 x2 y2 in pixels of the original frame, the last two excluded.
    """

    frame: int
    row: int
    col: int
    score: float
    box: Box


def score_table(table: Tensor, queries: Tensor, negatives: Tensor | None = None, score: Score = "relevancy") -> Tensor:
    """Score every patch for every query.

    Args:
        table: (T, rows, cols, D) embeddings.
        queries: (M, D) of texts or pictures.
        negatives: (K, D), for `relevancy`.
        score: `relevancy` against negatives (LERF; below 0.5 a patch is more like one of them), plain `cosine`, or
            `probability`, a softmax over the queries as labels.

    Returns:
        (M, T, rows, cols) float32 on the table's device.

    Raises:
        ValueError: Relevancy lacks negatives, or the lengths of the embeddings differ.

    Example:
        >>> table = torch.eye(3).reshape(1, 1, 3, 3)
        >>> score_table(table, torch.eye(3)[1:2], score="cosine")
        tensor([[[[0., 1., 0.]]]])
    """
    patches = table.flatten(0, 2)
    if score == "relevancy":
        if negatives is None:
            raise ValueError("relevancy: expected negatives")
        scores = relevancy(patches, queries, negatives)
    elif score == "cosine":
        scores = text_scores(patches, queries)
    else:
        scores = label_probabilities(patches, queries).T
    return scores.unflatten(1, table.shape[:3])


def cell_box(geometry: Geometry, row: int, col: int) -> Box:
    """Where a patch lies in the original frame: x1 y1 x2 y2 in pixels, without what was padded.

    Example:
        >>> from lit_patchnerf.patches import plan_geometry
        >>> cell_box(plan_geometry((720, 1280), crop=(640, 1280), grid=(2, 4)), 1, 3)
        (960, 360, 1280, 680)
    """
    edges = []
    for at, axis in ((col, 1), (row, 0)):
        size, low = geometry.patch[axis], geometry.corner[axis]
        start = low - geometry.pad[axis] + at * size
        edges.append([min(max(edge, low), low + geometry.crop[axis]) for edge in (start, start + size)])
    (x1, x2), (y1, y2) = edges
    return x1, y1, x2, y2


def top_hits(scores: Tensor, geometry: Geometry, count: int = 10, apart: int = 0) -> list[Hit]:
    """The best patches of a query, best first; of equal scores the earlier one.

    Args:
        scores: (T, rows, cols).
        geometry: Of the patches.
        count: Most hits.
        apart: Pass over a patch if the same place is a hit already, so many frames away or fewer: neighbours in time
            show nearly the same.

    Example:
        >>> from lit_patchnerf.patches import plan_geometry
        >>> scores = torch.tensor([0.1, 0.9, 0.8, 0.3]).reshape(4, 1, 1)
        >>> [hit.frame for hit in top_hits(scores, plan_geometry((8, 8)), 2)]
        [1, 2]
        >>> [hit.frame for hit in top_hits(scores, plan_geometry((8, 8)), 2, apart=1)]
        [1, 3]
    """
    rows, cols = geometry.grid
    if scores.ndim != 3 or tuple(scores.shape[1:]) != (rows, cols):
        raise ValueError(f"scores {tuple(scores.shape)}, expected (T, {rows}, {cols})")
    flat = scores.detach().float().cpu().flatten()
    hits: list[Hit] = []
    for index in torch.argsort(flat, descending=True, stable=True).tolist():
        if len(hits) >= count:
            break
        frame, cell = divmod(index, rows * cols)
        row, col = divmod(cell, cols)
        if apart and any((h.row, h.col) == (row, col) and abs(h.frame - frame) <= apart for h in hits):
            continue
        hits.append(Hit(frame, row, col, float(flat[index]), cell_box(geometry, row, col)))
    return hits


def frame_curve(scores: Tensor) -> Tensor:
    """How well each frame answers: the score of its best patch, (..., T, rows, cols) to (..., T).

    >>> frame_curve(torch.tensor([[[0.2, 0.7]], [[0.4, 0.1]]]))
    tensor([0.7000, 0.4000])
    """
    return scores.amax((-2, -1))


def heat_picture(frame: Frames, scores: Tensor, geometry: Geometry, low: float, high: float) -> Frames:
    """A frame under the colours of its scores, blue for low and red for high.

    Args:
        frame: (H, W, 3) uint8 RGB in its original size.
        scores: (rows, cols).
        geometry: Of the patches. What its crop left out of the frame turns grey and dark.
        low: Score of the first colour, and below.
        high: Of the last one.

    Returns:
        (H, W, 3) uint8, a new array.
    """
    if frame.shape[:2] != geometry.frame:
        raise ValueError(f"a frame of {frame.shape[:2]} pixels, expected {geometry.frame}")
    share = (scores.detach().float().cpu().numpy() - low) / max(high - low, 1e-12)
    levels = np.rint(255 * np.clip(np.nan_to_num(share), 0, 1)).astype(np.uint8)
    height, width = geometry.canvas
    smooth = cv2.resize(levels, (width, height), interpolation=cv2.INTER_LINEAR)[geometry.content]
    colours = cv2.cvtColor(cv2.applyColorMap(smooth, cv2.COLORMAP_TURBO), cv2.COLOR_BGR2RGB)
    grey = cv2.cvtColor(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    picture = grey // 2
    inside = geometry.region
    # Over grey, so that the only colours are those of the scores.
    picture[inside] = cv2.addWeighted(np.ascontiguousarray(grey[inside]), 0.5, colours, 0.5, 0)
    return picture


def write_heat(
    path: str | Path, frames: Iterable[Frames], scores: Tensor, geometry: Geometry, fps: float
) -> tuple[float, float]:
    """Write the heat map of a query as an mp4.

    Args:
        path: The file.
        frames: (H, W, 3) uint8 RGB, T of them in their original size.
        scores: (T, rows, cols).
        geometry: Of the patches.
        fps: Frames per second.

    Returns:
        The scores of the first and the last colour: the lowest and the highest of the video.

    Raises:
        InputError: there are fewer frames, or the file cannot be written.
    """
    low, high = scores.min().item(), scores.max().item()
    count = 0
    with VideoWriter(path, fps) as video:
        for frame, values in zip(frames, scores.cpu(), strict=False):
            video.add(heat_picture(frame, values, geometry, low, high))
            count += 1
    if count < len(scores):
        raise InputError(f"{path}: {count} frames to draw on, expected {len(scores)}")
    return low, high


def embedding_report(
    model_table: Tensor, true_table: Tensor, split: FrameSplit, texts: Tensor | None = None
) -> dict[str, dict[str, float]]:
    """The network's embeddings of the held-out frames beside those of predictors without a network.

    Args:
        model_table: (T, rows, cols, D), `embed_video`.
        true_table: (T, rows, cols, D), `embedding_table`.
        split: Which frames were trained on. Where none is held out, the report has `model` alone, over all frames: it
            then says how well they were learnt, and there is nothing to compare it with.
        texts: (M, D) queries; with them, how far rankings of the patches agree.

    Returns:
        For `model`, `nearest` (trained frame) and `blend` (of the two around) what `similarity_report` says.

    Raises:
        ValueError: The shapes differ.
    """
    if model_table.ndim != 4 or model_table.shape != true_table.shape:
        raise ValueError(
            f"model {tuple(model_table.shape)} and true {tuple(true_table.shape)}: expected both (T, rows, cols, D)"
        )
    truth = true_table.to(model_table.device)
    wanted = split.val or list(range(len(truth)))
    found = {"model": model_table[wanted]}
    if split.val:
        found["nearest"] = blend_embeddings(truth, nearest_neighbours(wanted, split.train))
        found["blend"] = blend_embeddings(truth, blend_neighbours(wanted, split.train))
    flat = {name: table.flatten(0, 2) for name, table in found.items()}
    queries = None if texts is None else texts.to(model_table.device)
    return similarity_report(flat, truth[wanted].flatten(0, 2), mean_embedding(truth), queries)
