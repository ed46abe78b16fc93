"""What the metrics of an epoch share: rows of numbers per case, exact under distributed training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lit_dsunet.components import Mask, check_masks
from lit_dsunet.measures import Spacing, millimetres

__all__ = ["CaseMetric", "as_batch", "spacings"]


class CaseMetric(Metric):
    """Rows of float64 per case, the first column being the number of the case."""

    is_differentiable = False
    full_state_update = False

    rows: list[Tensor] | Tensor

    def __init__(self, columns: Sequence[str], **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.columns = tuple(columns)
        self.set_dtype(torch.float64)  # also the type that a process without any case takes part with
        # Flat, since gathering needs equal numbers of dimensions from that process too.
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def figures(self, table: dict[str, Tensor]) -> dict[str, Tensor]:
        """The columns of `per_case` from those of the state."""
        raise NotImplementedError

    def compute(self) -> dict[str, Tensor]:
        """Means over the cases as () float64 tensors, NaN where no case has a value."""
        return {name: torch.nanmean(values) for name, values in self.figures(self._table()).items()}

    def per_case(self) -> dict[str, Tensor]:
        """(N,) tensors: `case`, int64 and ascending, and each figure of each case. Call it on every process."""
        with self._synced():
            table = self._table()
            return {"case": table["case"].long(), **self.figures(table)}

    def _add(self, cases: int | Sequence[int] | Tensor, rows: Tensor) -> None:
        """Append (B, columns) float64 under the numbers of their cases."""
        count = len(rows)
        if isinstance(cases, Tensor):
            numbers = cases.reshape(-1).to(self.device, torch.float64)
        else:  # filled, not copied: a copy to the device would wait for it
            each = list(cases) if isinstance(cases, Sequence) else [cases]
            numbers = torch.stack([torch.full((), case, dtype=torch.float64, device=self.device) for case in each])
        if len(numbers) != count:
            raise ValueError(f"case_index of {len(numbers)} numbers for {count} cases: expected one each")
        assert isinstance(self.rows, list)
        self.rows.append(torch.cat([numbers[:, None], rows.to(self.device)], 1).flatten())

    def _table(self) -> dict[str, Tensor]:
        """Columns of the states as they are, sorted by case; of a repeated case the first row stays."""
        width = 1 + len(self.columns)
        flat = dim_zero_cat(self.rows) if len(self.rows) else torch.zeros(0, dtype=torch.float64, device=self.device)
        rows = flat.reshape(-1, width)
        rows = rows[torch.argsort(rows[:, 0], stable=True)]
        rows = rows[torch.diff(rows[:, 0], prepend=rows.new_full((1,), math.nan)) != 0]
        return dict(zip(("case", *self.columns), rows.unbind(1), strict=True))

    @contextmanager
    def _synced(self) -> Iterator[None]:
        """States of all processes inside, own states afterwards; `compute` alone has that built in."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync and not self._is_synced):
            yield


def as_batch(prediction: Mask, target: Mask) -> tuple[Mask, Mask]:
    """Both as (B, D, H, W)."""
    check_masks(prediction, target)
    if prediction.ndim not in (3, 4):
        raise ValueError(f"prediction of shape {tuple(prediction.shape)}: expected (D, H, W) or (B, D, H, W)")
    return (prediction[None], target[None]) if prediction.ndim == 3 else (prediction, target)


def spacings(spacing: Spacing, count: int) -> Iterator[NDArray[np.float64]]:
    """One spacing per case, from (3,) or (B, 3)."""
    values = np.asarray(spacing.detach().cpu() if isinstance(spacing, Tensor) else spacing, dtype=np.float64)
    if values.ndim == 2 and len(values) != count:
        raise ValueError(f"spacing of shape {values.shape} for {count} cases: expected (3,) or ({count}, 3)")
    return (millimetres(values if values.ndim < 2 else values[case]) for case in range(count))
