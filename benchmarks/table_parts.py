"""What the tables of all benchmarks are made of: cells, sentences on where the rows come from, markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Row = dict[str, Any]
Report = dict[str, Any]
Tables = dict[str, tuple[str, Callable[[Report], str]]]  # by name of the section: file in results/, how to write it

NOT_MEASURED = "Not measured yet."
NONE = "–"  # noqa: RUF001 - the sign for an empty cell


def conditions(rows: Sequence[Row]) -> str:
    """A sentence on what else the machine did, for rows that say so in `conditions`."""
    said = sorted({row["conditions"] for row in rows if row.get("conditions")})
    return f" Conditions: {'; '.join(said)}." if said else ""


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column is text, the others are numbers.

    >>> print(markdown(["a", "b"], [["x", "1"]]))
    | a | b |
    |---|---:|
    | x | 1 |
    """
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(header) - 1), *lines[1:]])


def number(value: Any, digits: int = 1) -> str:
    """A number with fixed decimals; a dash for None."""
    return NONE if value is None else f"{value:.{digits}f}"


def listed(values: Iterable[Any]) -> str:
    """Different values in the order of their first appearance.

    >>> listed(["b", None, "a", "b"])
    'b, a'
    """
    return ", ".join(dict.fromkeys(str(v) for v in values if v))


def origin(rows: Sequence[Row]) -> str:
    """One sentence: on which device, at which commit, when and with which torch the rows were measured."""
    devices = listed(row.get("device") for row in rows)
    found = [("commit", "commit"), ("", "date"), ("torch", "torch")]
    parts = [f"{label} {listed(row.get(key) for row in rows)}".strip() for label, key in found]
    return f"Measured on {devices or 'an unnamed device'}: {'; '.join(parts)}."


def mean_sd(values: Sequence[float], digits: int) -> str:
    """Mean, and the standard deviation where there are several values.

    >>> mean_sd([1.0, 1.2], 2), mean_sd([1.0], 2)
    ('1.10 ± 0.14', '1.00')
    """
    mean = number(statistics.fmean(values), digits)
    return mean if len(values) < 2 else f"{mean} ± {number(statistics.stdev(values), digits)}"


def grouped(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of some keys, in the order of their first appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return groups
