"""Dice, HD95 and lesion-wise figures per case, exact under distributed training.

Every class keeps one row per case under the number of the case. Figures come from the rows of all processes, sorted by
that number; a case that a `DistributedSampler` handed out twice counts once. So the result depends neither on the
number of processes nor on the order of the cases, and `per_case` gives the rows themselves for paired statistics.

Conventions, which change every table:

- A figure is the mean over cases. Where a case has no value it is NaN there and left out of the mean.
- Dice of a class that neither mask has is `empty`: 1 as in ISLES, or NaN as in torchmetrics. So is the lesion F1 of a
  case without lesions in both masks. Lesion recall needs a lesion in the annotation, precision one in the prediction;
  otherwise they are NaN.
- HD95 is the larger of the 95th percentiles of both directions (Metrics Reloaded, MONAI), or the percentile of the
  distances of both directions together (medpy). A surface voxel has a background voxel, or the border of the volume,
  at one of its six faces.
- Lesions are 26-connected components. A found lesion is a true positive, a missed one a false negative, and a predicted
  one without partner a false positive; precision is TP/(TP+FP), recall TP/(TP+FN), F1 = TP/(TP+(FP+FN)/2).
  `lit_dsunet.components` says what found means in ISLES'22 and ISLES'24.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_cli.errors import InputError
from lit_dsunet.case_metric import CaseMetric, as_batch, spacings
from lit_dsunet.components import Connectivity, LesionCounts, Mask, Match, foreground, lesions
from lit_dsunet.measures import (
    Percentile,
    Spacing,
    class_counts,
    dice,
    dice_from_counts,
    hd95,
    lesion_count_difference,
    millilitres,
    surface_distance,
    volume_difference_ml,
)

__all__ = [
    "CaseDice",
    "CaseHD95",
    "LesionCounts",
    "LesionMetrics",
    "class_counts",
    "dice",
    "dice_from_counts",
    "hd95",
    "lesion_count_difference",
    "lesions",
    "stratum_names",
    "volume_difference_ml",
]

Unit = Literal["ml", "voxels"]


def _class_names(num_classes: int, class_names: Sequence[str] | None) -> list[str]:
    """Names of the foreground classes as parts of keys."""
    if num_classes < 2:
        raise InputError(f"num_classes: got {num_classes}, expected at least 2, the background counted")
    given = [str(index) for index in range(num_classes)] if class_names is None else class_names
    names = ["_".join(name.replace("/", " ").split()) for name in given]
    if len(set(names)) != num_classes:
        raise InputError(f"class_names: got {names}, expected {num_classes} different names, the background first")
    return names[1:]


class CaseDice(CaseMetric):
    """Dice per case and class; the mean of the foreground classes of a case is its `dice`.

    Args:
        num_classes: K, the background counted.
        class_names: K names for the keys, the background first; numbers without.
        empty: Dice of a class that neither mask has: 1 (ISLES), or NaN to leave it out.
        kwargs: Of `torchmetrics.Metric`.

    Raises:
        InputError: For fewer than two classes or names that do not fit.

    Example:
    >>> metric = CaseDice(class_names=["background", "lesion"])
    >>> target = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    >>> target[0, 0, 0, :2] = 1
    >>> prediction = target.clone()
    >>> prediction[0, 0, 1, :2] = 1
    >>> metric.update(prediction, target, spacing=None, case_index=[7, 3])
    >>> metric.compute()["dice"]
    tensor(0.8333, dtype=torch.float64)
    >>> metric.per_case()["dice_lesion"]
    tensor([1.0000, 0.6667], dtype=torch.float64)
    """

    higher_is_better = True

    def __init__(
        self, num_classes: int = 2, class_names: Sequence[str] | None = None, empty: float = 1.0, **kwargs: object
    ) -> None:
        self.names = _class_names(num_classes, class_names)
        super().__init__([f"{part}_{name}" for part in ("both", "pred", "target") for name in self.names], **kwargs)
        self.num_classes, self.empty = num_classes, empty

    def update(
        self, prediction: Tensor, target: Tensor, spacing: Spacing | None, case_index: int | Sequence[int] | Tensor
    ) -> None:
        """Add one case or a batch. Does not wait for the device.

        Args:
            prediction: (D, H, W) or (B, D, H, W) class indices.
            target: The same shape.
            spacing: Not used; the three metrics take the same arguments.
            case_index: Number of each case in the data set. Of a number that comes again the first case counts.
        """
        a, b = as_batch(prediction, target)
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        self._add(case_index, class_counts(a, b, self.num_classes).flatten(1).double())

    def figures(self, table: dict[str, Tensor]) -> dict[str, Tensor]:
        """`dice` and `dice_<class>`."""
        counts = torch.stack([table[name] for name in self.columns], 1).unflatten(1, (3, -1))
        values = dice_from_counts(counts, self.empty)
        each = {f"dice_{name}": column for name, column in zip(self.names, values.unbind(1), strict=True)}
        return {"dice": torch.nanmean(values, 1), **each}


class CaseHD95(CaseMetric):
    """HD95 per case and class in millimetres; computed on the host.

    A mean that leaves out the cases without a distance flatters whoever predicts nothing, so `hd95_defined` says for
    which share of cases and classes there is one, of those that the target or the prediction has.

    Args:
        num_classes: K, the background counted.
        class_names: K names for the keys, the background first; numbers without.
        convention: `max` of both directions or `pooled`.
        both_empty: Value of a class that neither mask has.
        one_empty: Value of a class that only one has, such as the diagonal of the volume.
        kwargs: Of `torchmetrics.Metric`.

    Raises:
        InputError: For an option out of range.

    Example:
    >>> metric = CaseHD95()
    >>> target = torch.zeros(1, 4, 8, dtype=torch.uint8)
    >>> target[0, 1, 1:5] = 1
    >>> metric.update(target.roll(2, dims=2), target, spacing=(1.0, 1.0, 0.5), case_index=0)
    >>> metric.compute()["hd95_mm"]
    tensor(0.9250, dtype=torch.float64)
    """

    higher_is_better = False

    def __init__(
        self,
        num_classes: int = 2,
        class_names: Sequence[str] | None = None,
        convention: Percentile = "max",
        both_empty: float = math.nan,
        one_empty: float = math.nan,
        **kwargs: object,
    ) -> None:
        self.names = _class_names(num_classes, class_names)
        super().__init__([f"{part}_{name}" for part in ("mm", "present") for name in self.names], **kwargs)
        if convention not in ("max", "pooled"):
            raise InputError(f"convention: got {convention!r}, expected 'max' or 'pooled'")
        self.convention: Percentile = convention
        self.both_empty, self.one_empty = both_empty, one_empty

    def update(
        self, prediction: Mask, target: Mask, spacing: Spacing, case_index: int | Sequence[int] | Tensor
    ) -> None:
        """Add one case or a batch; waits for the device.

        Args:
            prediction: (D, H, W) or (B, D, H, W) class indices.
            target: The same shape.
            spacing: (3,) or (B, 3) mm per voxel along D, H, W.
            case_index: Number of each case in the data set. Of a number that comes again the first case counts.
        """
        a, b = as_batch(prediction, target)
        shape = tuple(a.shape[1:])
        rows = []
        for case, scale in enumerate(spacings(spacing, len(a))):
            distances, present = [], []
            for index in range(1, len(self.names) + 1):
                voxels = foreground(a[case] == index), foreground(b[case] == index)
                present.append(float(sum(len(found) > 0 for found in voxels)))
                both = present[-1] == 2
                distances.append(surface_distance(*voxels, shape, scale, self.convention) if both else math.nan)
            rows.append(distances + present)
        self._add(case_index, torch.tensor(rows, dtype=torch.float64))

    def figures(self, table: dict[str, Tensor]) -> dict[str, Tensor]:
        """`hd95_mm`, the mean of the foreground classes, `hd95_<class>_mm` and `hd95_defined`."""
        values, present = torch.stack([table[name] for name in self.columns], 1).unflatten(1, (2, -1)).unbind(1)
        values = torch.where(present == 0, self.both_empty, torch.where(present == 1, self.one_empty, values))
        each = {f"hd95_{name}_mm": column for name, column in zip(self.names, values.unbind(1), strict=True)}
        defined = (present == 2).sum(1) / (present > 0).sum(1)  # 0 / 0 is NaN
        return {"hd95_mm": torch.nanmean(values, 1), **each, "hd95_defined": defined.double()}


def stratum_names(edges: Sequence[float], unit: Unit = "ml") -> list[str]:
    """Names of the strata between edges; a size equal to an edge belongs to the upper one.

    >>> stratum_names([0.05, 0.5])
    ['lt0.05ml', '0.05to0.5ml', 'ge0.5ml']
    """
    if not edges:
        return []
    middle = [f"{low:g}to{high:g}{unit}" for low, high in pairwise(edges)]
    return [f"lt{edges[0]:g}{unit}", *middle, f"ge{edges[-1]:g}{unit}"]


class LesionMetrics(CaseMetric):
    """Lesion-wise F1, precision and recall, differences of volume and count, recall by size; computed on the host.

    Each figure is the mean over the cases; those that end in `_pooled` treat the lesions of all cases as one.

    Args:
        match: `any` shared voxel (ISLES'22), or `iou` from `threshold` on, one to one (ISLES'24).
        threshold: Smallest intersection over union of a match; only for `iou`.
        connectivity: 6, 18 or 26.
        edges: Rising sizes of annotated lesions at which recall is split; none for no strata.
        unit: Of the edges, `ml` or `voxels`.
        label: Class index of the lesion; every foreground class without.
        empty: F1 of a case without lesions in both masks: 1 (ISLES), or NaN to leave it out.
        kwargs: Of `torchmetrics.Metric`.

    Raises:
        InputError: For an option out of range.

    Source: ISLES'22 and ISLES'24 evaluation; panoptica (Kofler et al., arXiv 2312.02608) for the matching of `iou`.

    Example:
    >>> metric = LesionMetrics(edges=[2], unit="voxels")
    >>> target = torch.tensor([[[1, 1, 1, 0, 1, 0, 0, 0]]])
    >>> prediction = torch.tensor([[[0, 0, 1, 1, 0, 0, 0, 0]]])
    >>> metric.update(prediction, target, spacing=(5.0, 10.0, 10.0), case_index=0)
    >>> figures = metric.compute()
    >>> {name: round(figures[name].item(), 3) for name in ("lesion_f1", "avd_ml", "ald", "lesion_recall_ge2voxels")}
    {'lesion_f1': 0.667, 'avd_ml': 1.0, 'ald': 1.0, 'lesion_recall_ge2voxels': 1.0}
    """

    higher_is_better = None

    def __init__(
        self,
        match: Match = "any",
        threshold: float = 0.2,
        connectivity: Connectivity = 26,
        edges: Sequence[float] = (0.05, 0.5),
        unit: Unit = "ml",
        label: int | None = None,
        empty: float = 1.0,
        **kwargs: object,
    ) -> None:
        if unit not in ("ml", "voxels"):
            raise InputError(f"unit: got {unit!r}, expected 'ml' or 'voxels'")
        if list(edges) != sorted(set(edges)) or (edges and edges[0] <= 0):
            raise InputError(f"edges: got {list(edges)}, expected rising positive numbers")
        if label is not None and label < 1:
            raise InputError(f"label: got {label}, expected a foreground class, 1 or more")
        nothing = np.zeros((1, 1, 1), dtype=bool)
        lesions(nothing, nothing, match, threshold, connectivity)  # refuses wrong options now, not after an epoch
        self.strata = stratum_names(edges, unit)
        columns = ["tp", "fp", "fn", "n_pred", "target_voxels", "pred_voxels", "voxel_ml"]
        super().__init__([*columns, *(f"{part}_{s}" for part in ("n", "found") for s in self.strata)], **kwargs)
        self.match: Match = match
        self.threshold = threshold
        self.connectivity: Connectivity = connectivity
        self.edges, self.unit, self.label, self.empty = tuple(edges), unit, label, empty

    def update(
        self, prediction: Mask, target: Mask, spacing: Spacing, case_index: int | Sequence[int] | Tensor
    ) -> None:
        """Add one case or a batch; waits for the device.

        Args:
            prediction: (D, H, W) or (B, D, H, W) class indices or booleans.
            target: The same shape.
            spacing: (3,) or (B, 3) mm per voxel along D, H, W.
            case_index: Number of each case in the data set. Of a number that comes again the first case counts.
        """
        a, b = as_batch(prediction, target)
        if self.label is not None:
            a, b = a == self.label, b == self.label
        # One after the other: threads did not shorten it, the many small calls hold the interpreter.
        rows = [self._row(a[case], b[case], scale) for case, scale in enumerate(spacings(spacing, len(a)))]
        self._add(case_index, torch.tensor(rows, dtype=torch.float64))

    def _row(self, prediction: Mask, target: Mask, spacing: NDArray[np.float64]) -> list[float]:
        counts = lesions(prediction, target, self.match, self.threshold, self.connectivity)
        voxel_ml = millilitres(spacing)
        row = [counts.tp, counts.fp, counts.fn, counts.n_pred, int(counts.sizes.sum()), counts.pred_voxels, voxel_ml]
        if not self.strata:
            return row
        size = counts.sizes * (voxel_ml if self.unit == "ml" else 1)
        # A lesion of exactly an edge's volume must not fall below it by the rounding of the spacing.
        stratum = np.searchsorted(np.array(self.edges) * (1 - 1e-9), size, side="right")
        groups = (stratum, stratum[counts.found])
        return row + [float(n) for group in groups for n in np.bincount(group, minlength=len(self.strata))]

    def figures(self, table: dict[str, Tensor]) -> dict[str, Tensor]:
        """All figures but the pooled ones."""
        both = {"ald": (table["tp"] + table["fn"] - table["n_pred"]).abs()}
        both["avd_ml"] = (table["target_voxels"] - table["pred_voxels"]).abs() * table["voxel_ml"]
        return {**self._rates(table), **both}

    def _rates(self, table: dict[str, Tensor]) -> dict[str, Tensor]:
        """F1, precision and recall from counts of any shape; 0 / 0 is NaN."""
        tp, fp, fn = (table[name] for name in ("tp", "fp", "fn"))
        wrong = (fp + fn) / 2
        rates = {
            "lesion_f1": torch.where(tp + wrong > 0, tp / (tp + wrong), self.empty),
            "lesion_precision": tp / (tp + fp),
            "lesion_recall": tp / (tp + fn),
        }
        return rates | {f"lesion_recall_{s}": table[f"found_{s}"] / table[f"n_{s}"] for s in self.strata}

    def compute(self) -> dict[str, Tensor]:
        """Means over the cases and, of the rates, the values of all lesions together, as () float64 tensors."""
        table = self._table()
        pooled = self._rates({name: column.sum() for name, column in table.items()})
        if not len(table["case"]):  # no case is not one empty case
            pooled = {name: torch.full_like(value, math.nan) for name, value in pooled.items()}
        return {**super().compute(), **{f"{name}_pooled": value for name, value in pooled.items()}}

    def per_case(self) -> dict[str, Tensor]:
        """(N,) tensors: `case`, each figure, and the counts and volumes that they come from."""
        with self._synced():
            table = self._table()
            counts = {name: table[name].long() for name in ("tp", "fp", "fn", "n_pred")}
            counts["n_target"] = counts["tp"] + counts["fn"]
            counts |= {name: table[name].long() for name in self.columns[7:]}
            volumes = {f"{part}_ml": table[f"{part}_voxels"] * table["voxel_ml"] for part in ("target", "pred")}
            return {"case": table["case"].long(), **self.figures(table), **counts, **volumes}
