"""Connected components of sparse masks, and which components of two masks belong together.

Lesions fill a thousandth of a volume, so nothing here works on the grid. The non-zero voxels are listed once, in
reading order; those that follow each other along the last axis form runs, and components are those of the graph in
which runs of neighbouring lines touch. The time is that of one pass over the bytes of a mask plus a few searches among
its runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from lit_cli.errors import InputError

__all__ = [
    "Components",
    "Connectivity",
    "Indices",
    "LesionCounts",
    "Mask",
    "Match",
    "check_masks",
    "find_components",
    "foreground",
    "lesions",
    "match_components",
    "overlaps",
]

Mask = NDArray[np.generic] | Tensor
Connectivity = Literal[6, 18, 26]
Match = Literal["any", "iou"]
Indices = NDArray[np.int64]

# One half of the neighbouring lines: the step in z, the step in y, and by how much runs may miss each other along x.
LINES: dict[int, tuple[tuple[int, int, int], ...]] = {
    6: ((0, 1, 0), (1, 0, 0)),
    18: ((0, 1, 1), (1, -1, 0), (1, 0, 1), (1, 1, 0)),
    26: ((0, 1, 1), (1, -1, 1), (1, 0, 1), (1, 1, 1)),
}


def foreground(mask: Mask) -> Indices:
    """Where a mask is not zero.

    Args:
        mask: Booleans or integers of any shape; bool and uint8 are the fastest. A mask on a GPU is searched there, and
            only the indices travel.

    Returns:
        (N,) indices into the flattened mask, ascending.

    Example:
    >>> foreground(np.array([[0, 1], [2, 0]]))
    array([1, 2])
    """
    if isinstance(mask, Tensor):
        if mask.device.type != "cpu":
            return mask.reshape(-1).nonzero().squeeze(1).cpu().numpy()
        mask = mask.detach().numpy()
    flat = np.ascontiguousarray(mask).reshape(-1)
    if flat.itemsize > 1:
        flat = flat != 0
    # Eight voxels at a time, since most words are zero: four times as fast as numpy's own search.
    words = len(flat) // 8
    octets = flat[: 8 * words].view(np.uint8).reshape(words, 8)
    occupied = np.flatnonzero(octets.view(np.uint64) != 0)
    word, place = np.nonzero(octets[occupied])
    return np.concatenate([8 * occupied[word] + place, 8 * words + np.flatnonzero(flat[8 * words :])])


def check_masks(prediction: Mask, target: Mask) -> None:
    """Refuse two arrays that cannot be compared as masks.

    Raises:
        ValueError: For different shapes, or for floating numbers: probabilities would all count as object.
    """
    if tuple(prediction.shape) != tuple(target.shape):
        shapes = f"{tuple(prediction.shape)} and {tuple(target.shape)}"
        raise ValueError(f"prediction and target of shapes {shapes}: expected equal ones")
    for name, mask in (("prediction", prediction), ("target", target)):
        real = mask.is_floating_point() if isinstance(mask, Tensor) else mask.dtype.kind not in "biu"
        if real:
            raise ValueError(f"{name} of {mask.dtype}: expected class indices or booleans")


@dataclass(frozen=True, slots=True)
class Components:
    """The components of a mask, numbered from 0 in the order of their first voxels.

    Attributes:
        voxels: (N,) indices into the flattened mask, ascending.
        labels: (N,) component of each voxel.
        sizes: (K,) voxels of each component.
    """

    voxels: Indices
    labels: Indices
    sizes: Indices

    def __len__(self) -> int:
        return len(self.sizes)


def find_components(voxels: Indices, shape: tuple[int, int, int], connectivity: Connectivity = 26) -> Components:
    """Label the connected components of a mask.

    Args:
        voxels: (N,) ascending indices into the flattened mask, as `foreground` gives them.
        shape: Of the mask, (D, H, W).
        connectivity: Voxels touch across faces (6), also edges (18), also corners (26).

    Returns:
        The same components in the same order as `scipy.ndimage.label`, numbered from 0.

    Raises:
        InputError: For any other connectivity.

    Example:
    >>> mask = np.array([[[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]]])
    >>> find_components(foreground(mask), mask.shape).labels
    array([0, 0, 0, 1])
    >>> find_components(foreground(mask), mask.shape, connectivity=6).sizes
    array([2, 1, 1])
    """
    if connectivity not in LINES:
        raise InputError(f"connectivity: got {connectivity}, expected 6, 18 or 26")
    _, height, width = shape
    line, x = np.divmod(voxels, width)
    first = np.diff(voxels, prepend=-2) != 1
    first |= x == 0
    begin = np.flatnonzero(first)
    length = np.diff(begin, append=len(voxels))
    line, start = line[begin], x[begin]
    stop = start + length - 1
    source, other = [], []
    # Positions along all lines laid end to end, two voxels apart so that a reach of one never enters the next line.
    stride = width + 2
    starts, stops = line * stride + start, line * stride + stop
    for step_z, step_y, reach in LINES[connectivity]:
        y = line % height + step_y
        inside = np.flatnonzero((y >= 0) & (y < height))
        shift = (step_z * height + step_y) * stride
        low = np.searchsorted(stops, starts[inside] + (shift - reach))
        high = np.searchsorted(starts, stops[inside] + (shift + reach), side="right")
        count = np.maximum(high - low, 0)
        source.append(np.repeat(inside, count))
        # low, low + 1, ... high - 1 of each run, one after the other
        other.append(np.arange(count.sum()) + np.repeat(low - np.cumsum(count) + count, count))
    edges = np.concatenate(source), np.concatenate(other)
    graph = coo_array((np.ones(len(edges[0]), dtype=np.int8), edges), shape=(len(begin), len(begin)))
    number, of_run = connected_components(graph, directed=False) if len(begin) else (0, np.zeros(0, dtype=np.int32))
    labels = np.repeat(of_run.astype(np.int64), length)
    return Components(voxels, labels, np.bincount(labels, minlength=number))


def overlaps(target: Components, prediction: Components) -> tuple[Indices, Indices, Indices]:
    """Pairs of components that share voxels.

    Args:
        target: Components of one mask.
        prediction: Components of another mask of the same shape.

    Returns:
        Target component, predicted component and number of shared voxels, each (M,), ordered by the predicted one.
    """
    place = np.searchsorted(prediction.voxels, target.voxels)
    place[place == len(prediction.voxels)] = 0
    shared = prediction.voxels[place] == target.voxels if len(prediction.voxels) else np.zeros(len(place), dtype=bool)
    code = prediction.labels[place[shared]] * len(target) + target.labels[shared]
    code, voxels = np.unique(code, return_counts=True)
    predicted, of_target = np.divmod(code, max(len(target), 1))
    return of_target, predicted, voxels


def match_components(
    target: Components, prediction: Components, match: Match = "any", threshold: float = 0.2
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Decide which components were found and which predictions are no false alarm.

    Args:
        target: Components of the annotation.
        prediction: Components of the prediction, of the same shape.
        match: With `any` one shared voxel is enough, and one prediction may find several components (ISLES'22). With
            `iou` pairs are one to one: taken in the order of falling intersection over union, each pair of two
            components that are still free is a match if it reaches `threshold` (ISLES'24, panoptica's
            `NaiveThresholdMatching`). Equal values go by the number of the predicted, then of the target component.
        threshold: Intersection over union at which a pair matches, in (0, 1]; equality counts.

    Returns:
        found (T,), which target components were found, and matched (P,), which predicted ones are no false alarm.

    Raises:
        InputError: For another `match`, or a threshold outside of (0, 1].
    """
    if match not in ("any", "iou"):
        raise InputError(f"match: got {match!r}, expected 'any' or 'iou'")
    if not 0 < threshold <= 1:
        raise InputError(f"threshold: got {threshold}, expected a number in (0, 1]")
    found, matched = np.zeros(len(target), dtype=bool), np.zeros(len(prediction), dtype=bool)
    of_target, predicted, voxels = overlaps(target, prediction)
    if match == "any":
        found[of_target] = matched[predicted] = True
        return found, matched
    iou = voxels / (target.sizes[of_target] + prediction.sizes[predicted] - voxels)
    order = np.argsort(-iou, kind="stable")
    order = order[iou[order] >= threshold]
    # Few pairs reach the threshold: at 0.2 a component is in five of them at most.
    for t, p in zip(of_target[order].tolist(), predicted[order].tolist(), strict=True):
        if not found[t] and not matched[p]:
            found[t] = matched[p] = True
    return found, matched


@dataclass(frozen=True, slots=True)
class LesionCounts:
    """Lesions of one case.

    Attributes:
        tp: Lesions of the target that were found.
        fp: Predicted lesions without partner.
        fn: Lesions of the target that were missed.
        n_target: Lesions of the target.
        n_pred: Predicted lesions.
        sizes: (n_target,) voxels of each lesion of the target.
        found: (n_target,) which of them were found.
        pred_voxels: Voxels of all predicted lesions together.
    """

    tp: int
    fp: int
    fn: int
    n_target: int
    n_pred: int
    sizes: NDArray[np.int64]
    found: NDArray[np.bool_]
    pred_voxels: int


def lesions(
    prediction: Mask,
    target: Mask,
    match: Match = "any",
    threshold: float = 0.2,
    connectivity: Connectivity = 26,
) -> LesionCounts:
    """Count the lesions that were found, missed and made up.

    Args:
        prediction: (D, H, W), lesion where not zero.
        target: The same shape.
        match: `any` shared voxel (ISLES'22), or `iou` from `threshold` on, one to one (ISLES'24).
        threshold: Smallest intersection over union of a match; only for `iou`.
        connectivity: 6, 18 or 26.

    Returns:
        The counts, and size and fate of each lesion of the target in the order of `scipy.ndimage.label`.

    Raises:
        InputError: For an option out of range.
        ValueError: For different shapes, or for numbers that are no mask.

    Example:
    >>> target = np.array([[[1, 1, 1, 0, 1, 0, 0, 0]]])
    >>> prediction = np.array([[[0, 0, 1, 1, 0, 0, 1, 0]]])
    >>> counts = lesions(prediction, target)
    >>> counts.tp, counts.fp, counts.fn, counts.sizes, counts.found
    (1, 1, 1, array([3, 1]), array([ True, False]))
    >>> lesions(prediction, target, match="iou", threshold=0.3).tp  # 1 voxel of 4
    0
    """
    check_masks(prediction, target)
    depth, height, width = target.shape
    found_in = (foreground(prediction), foreground(target))
    predicted, annotated = (find_components(voxels, (depth, height, width), connectivity) for voxels in found_in)
    found, matched = match_components(annotated, predicted, match, threshold)
    tp = int(found.sum())
    return LesionCounts(
        tp=tp,
        fp=len(predicted) - int(matched.sum()),
        fn=len(annotated) - tp,
        n_target=len(annotated),
        n_pred=len(predicted),
        sizes=annotated.sizes,
        found=found,
        pred_voxels=len(predicted.voxels),
    )
