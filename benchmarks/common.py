"""What the benchmark scripts share: results that survive an interruption, timing without needless waits, tables."""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch

Row = dict[str, Any]


@functools.cache
def commit() -> str | None:
    """Short hash of the checkout; `$LIT_COMMIT` where there is no git."""
    if given := os.environ.get("LIT_COMMIT"):
        return given
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def device_name() -> str:
    """Name of the GPU, or cpu."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


class Results:
    """Rows in a JSON file, each found again by its key, so that a script continues where it was interrupted.

    Every row is its key, its values and where they come from: commit, date, torch and device. A row with an `error`
    does not count as present: the next run tries it again and replaces it.

    Args:
        path: The file; it is written after every row and need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = json.loads(path.read_text())["rows"] if path.is_file() else []

    def get(self, **key: Any) -> Row | None:
        """The row with this key, unless it is an error."""
        index = self._index(key)
        return None if index is None or "error" in self.rows[index] else self.rows[index]

    def add(self, key: Row, values: Row) -> Row:
        """Write a row, in the place of an older one with the same key."""
        origin = {"commit": commit(), "date": datetime.now(UTC).date().isoformat(), "torch": torch.__version__}
        row = {**key, **values, **origin, "device": device_name()}
        index = self._index(key)
        if index is None:
            self.rows.append(row)
        else:
            self.rows[index] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".tmp")  # a deadline may end the script between two bytes
        new.write_text(json.dumps({"rows": self.rows}, indent=1) + "\n")
        new.replace(self.path)
        return row

    def _index(self, key: Row) -> int | None:
        return next((i for i, row in enumerate(self.rows) if key.items() <= row.items()), None)


class Spread(NamedTuple):
    """The middle of some measurements and the distance between their quartiles, in their unit."""

    median: float
    iqr: float


def spread(values: Sequence[float]) -> Spread:
    """Median and interquartile range.

    >>> spread([1.0, 2.0, 3.0, 4.0, 100.0])
    Spread(median=3.0, iqr=2.0)
    """
    if len(values) < 2:
        return Spread(values[0], 0.0)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, high - low)


class Laps:
    """A stopwatch whose laps do not wait for the device: CUDA events on a GPU, the clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """End one lap and begin the next."""
        if self.device.type != "cuda":
            self._marks.append(perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """Length of each lap; waits for the device once."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self.device.type != "cuda":
            return [b - a for a, b in pairs]
        torch.cuda.synchronize(self.device)
        return [a.elapsed_time(b) / 1000 for a, b in pairs]


def timed(function: Callable[[], object], device: torch.device, repeats: int = 20, warmup: int = 3) -> list[float]:
    """Seconds of each of `repeats` calls."""
    for _ in range(warmup):
        function()
    laps = Laps(device)
    laps.mark()
    for _ in range(repeats):
        function()
        laps.mark()
    return laps.seconds()


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """The chosen columns as aligned text; what a row does not have is a dash."""
    cells = [list(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def _cell(value: object) -> str:
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def take(results: Results, files: Sequence[Path], key: Sequence[str]) -> None:
    """Add the rows of other files whose keys are not there yet, with the commit and date that they have."""
    for file in files:
        for row in Results(file).rows:
            if results.get(**{k: row[k] for k in key if k in row}) is None:
                results.rows.append(row)
    results.path.parent.mkdir(parents=True, exist_ok=True)
    results.path.write_text(json.dumps({"rows": results.rows}, indent=1) + "\n")
