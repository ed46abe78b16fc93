"""What the benchmarks of single steps share: numerics, compilation, and a clean measurement."""

from __future__ import annotations

import argparse
import gc
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import Row, spread, timed

GIB = 2**30
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def setup() -> torch.device:
    """Device and numerics of all rows."""
    warnings.filterwarnings("ignore")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compiler(device: torch.device) -> Callable[..., Any]:
    """`torch.compile` with default settings; without code generation on a CPU, where that takes a minute."""
    options: dict[str, Any] = {"dynamic": False} if device.type == "cuda" else {"backend": "eager"}
    return lambda target: torch.compile(target, **options)


class Held(NamedTuple):
    """Bytes on the device before a row is prepared: what rows before it never gave back is not this row's."""

    allocated: int = 0
    reserved: int = 0

    @classmethod
    def now(cls) -> Held:
        """Of this moment."""
        if not torch.cuda.is_available():
            return cls()
        return cls(torch.cuda.memory_allocated(), torch.cuda.memory_reserved())


def measured(
    first: Callable[[], object],
    step: Callable[[], object],
    device: torch.device,
    tiny: bool,
    seconds: float = 3.0,
    held: Held | None = None,
    from_first: bool = False,
) -> Row:
    """Time `step` after `first` and one of its own have run; milliseconds and peaks of memory.

    Args:
        first: The first step.
        step: Each further one.
        device: Where they run.
        tiny: A dry run.
        seconds: To measure for.
        held: Taken off the peaks.
        from_first: Peaks count from `first` on, because it captures a graph, whose replays have none of their own;
            otherwise from `step` on, without cuDNN's trials.
    """
    cuda, held = device.type == "cuda", held or Held()

    def wait() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    begin = wait()
    first()
    wait()
    if cuda and not from_first:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step()
    first_s = wait() - begin
    begin = wait()
    for _ in range(1 if tiny else 3):
        step()
    each = (wait() - begin) / (1 if tiny else 3)
    laps = spread([1000 * s for s in timed(step, device, 2 if tiny else max(5, min(60, int(seconds / each))), 0)])
    row: Row = {"ms": round(laps.median, 3), "iqr_ms": round(laps.iqr, 3), "first_s": round(first_s, 2)}
    if cuda:
        row["allocated_gb"] = round((torch.cuda.max_memory_allocated() - held.allocated) / GIB, 3)
        row["reserved_gb"] = round((torch.cuda.max_memory_reserved() - held.reserved) / GIB, 3)
        row["held_gb"] = round(held.allocated / GIB, 3)
    return row


def clean() -> None:
    """Free what the last row left on the device and in the compiler."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def step_options(doc: str | None, out: str, words: str, args: list[str] | None) -> argparse.Namespace:
    """Options of a script that times steps in many ways.

    Args:
        doc: Of the script.
        out: Name of its results.
        words: What the words of `--only` are looked for in.
        args: Command line.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/{out}.json"))
    parser.add_argument("--only", default="", help=f"comma-separated words that `{words}` contains")
    parser.add_argument("--brief", action="store_true", help="for all sizes only the ways that matter most")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="Unix time that no row should pass")
    parser.add_argument("--tiny", action="store_true", help="a dry run on a CPU")
    return parser.parse_args(args)
