"""What the rows of detr_guide.py say of the guide's nine optimisations; light, as the tables of the docs need it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
CLEANUP_EVERY = 5  # steps, where cleaning up is measured


def baseline(rows: Sequence[Row]) -> Row | None:
    """The median of the baseline's rows."""
    own = [r for r in rows if r["row"].startswith("baseline") and r.get("images_s")]
    if not own:
        return None
    middle = {k: statistics.median(r[k] for r in own) for k in ("images_s", "step_ms", "val_s")}
    return {**own[0], **middle, "low": min(r["low"] for r in own), "high": max(r["high"] for r in own)}


def relative(rows: Sequence[Row]) -> list[Row]:
    """The rows with their speed as a multiple of the baseline's."""
    base = baseline(rows)
    return [r | ({"x baseline": r["images_s"] / base["images_s"]} if base and r.get("images_s") else {}) for r in rows]


def gains(rows: Sequence[Row]) -> list[Row]:
    """The guide's nine optimisations and their sum: what it expects, and how many times faster each makes training.

    Values are as far as the rows that they need are there. Where both of the guide's profiles have a switch on, the
    gain is that over a fit with the switch off.
    """
    found = {r["row"]: r for r in rows if r.get("images_s")}
    base = baseline(rows)
    if base is None:
        return []

    def times(name: str) -> float | None:
        return found[name]["images_s"] / base["images_s"] if name in found else None

    def over(slow: str, fast: Row | None) -> float | None:
        return fast["images_s"] / found[slow]["images_s"] if slow in found and fast else None

    def events(costs: dict[str, tuple[int, int, int]]) -> float | None:
        """From rows to (steps of the row, of the baseline, of the fast profile) between two events."""
        if not {"quiet", *costs} <= found.keys():
            return None
        quiet = found["quiet"]["step_ms"]
        cost = {name: max(0.0, every * (found[name]["step_ms"] - quiet)) for name, (every, _, _) in costs.items()}
        before = quiet + sum(cost[name] / often for name, (_, often, _) in costs.items())
        return before / (quiet + sum(cost[name] / rare for name, (_, _, rare) in costs.items()))

    train = base["train_images"] / base["images_s"]
    logging = {"log every step": (1, 50, 200), "refresh every step": (1, 20, 100)}
    cleaning = {"clean up every 5 steps": (CLEANUP_EVERY, 10, 30), "watch memory every step": (1, 50, 100)}
    validation = base["val_s"]
    share = f"7 validation every 2 epochs, {100 * validation / (train + validation):.0f} % of one"
    named = (
        ("1 batch 24 -> 36", "2-3x", times("batch 36")),
        ("2 workers 4 -> 12, prefetch 2 -> 6, persistent", "1.2-1.4x", times("12 workers, prefetch 6, persistent")),
        ("3 mixed precision", "~2x", over("fp32", base)),
        ("4 channels_last", "1.1-1.15x", times("channels_last")),
        ("5 TF32 beside bf16", "1.5x on matmul", over("no TF32", base)),
        ("5 TF32 in fp32", "1.5x on matmul", over("fp32, no TF32", found.get("fp32"))),
        ("6 CLAHE and motion blur off", "1.1-1.2x", times("no CLAHE, no motion blur")),
        (share, "2x of validation", (train + validation) / (train + validation / 2)),
        ("8 logging 50 -> 200, bar 20 -> 100", "1.05-1.1x", events(logging)),
        ("9 cleanup 10 -> 30, memory watched 50 -> 100", "1.02-1.05x", events(cleaning)),
        ("all together", "2-2.5x", times("all together")),
    )
    return [{"optimisation": name, "expected": said, "times": got} for name, said, got in named]
