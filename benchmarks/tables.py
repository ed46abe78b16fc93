"""Write the measured tables of README.md and docs/*.md from benchmarks/results/*.json.

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`; whatever is there is replaced. What has no results
yet says so. A page without such marks is left alone.

    python benchmarks/tables.py
    python benchmarks/tables.py --check     # change nothing, exit with status 1 if a page is not current
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from table_parts import (
    NONE,
    NOT_MEASURED,
    Report,
    Row,
    Tables,
    conditions,
    grouped,
    listed,
    markdown,
    mean_sd,
    number,
    origin,
)
from tables_detr import TABLES_DETR
from tables_dsunet import TABLES_DSUNET
from tables_patchnerf import TABLES_PATCHNERF

ROOT = Path(__file__).parents[1]
SECTION = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
MARK = re.compile(r"<!-- (?:table:[\w-]+|/table) -->")
REFERENCE = "rtx3070ti_balanced"  # profiles are compared with it
VOLUMES = "dsunet/"  # begins the names of profiles for volumes
VOLUMES_REFERENCE = "guide_baseline"
GUIDE_LIMIT = "guide limit"  # names of rows that try the original guide's largest batches
BASELINE = "plain fp32"  # throughput is compared with it, at its fastest number of workers
DECODERS = ("argmax", "quarter", "centroid", "softargmax", "dark")
SDR = ("sdr_2mm", "sdr_2.5mm", "sdr_3mm", "sdr_4mm")


# ---- tables: a report of results/*.json to markdown -----------------------------------------------------------------


def profiles(report: Report) -> str:
    """Memory and relative speed of every profile, then the largest batches that the original guide names."""
    rows = [row for row in report["rows"] if "error" not in row]
    own = [row for row in rows if not row["name"].startswith(GUIDE_LIMIT)]
    limits = [row for row in rows if row["name"].startswith(GUIDE_LIMIT)]
    if not own:
        return NOT_MEASURED
    text = (
        f"{origin(own)} The allocator was limited to the memory of the profile's card less 0.5 GB. Memory holds for "
        f"that card as far as its kernels are the same; speed does not, hence the ratio to `{REFERENCE}`. Where "
        "launches bound it, `rtx3070ti_fast` and `rtx3070ti_quick`, which take equal steps, show the spread."
        f"{conditions(own)}"
    )
    text = f"{_profile_table(_by_name(own, REFERENCE), own)}\n\n{text}"
    if limits:
        text += f"\n\nThe largest batches that the original guide names for 8 GB:\n\n{_profile_table(limits, own)}"
    return text


def profiles_dsunet(report: Report) -> str:
    """Memory and relative speed of the profiles for volumes, then other batches of the original guide's network."""
    rows = [{**row, "name": row["name"].removeprefix(VOLUMES)} for row in report["rows"] if "error" not in row]
    own = [row for row in rows if not row["name"].startswith(GUIDE_LIMIT)]
    limits = [row for row in rows if row["name"].startswith(GUIDE_LIMIT)]
    if not own:
        return NOT_MEASURED
    text = (
        f"{origin(own)} The allocator was limited to the memory of the profile's card less 0.5 GB. Memory holds for "
        f"that card as far as its kernels are the same; speed does not, hence the ratio to `{VOLUMES_REFERENCE}`, in "
        f"voxels per second since patches differ in size.{conditions(own)}"
    )
    text = f"{_profile_table(_by_name(own, VOLUMES_REFERENCE), own, **_VOLUMES)}\n\n{text}"
    if limits:
        table = _profile_table(limits, own, **_VOLUMES)
        text += f"\n\nThe guide's MKDC + DS in less memory, without AMP, and in larger batches:\n\n{table}"
    return text


_VOLUMES = {"reference": VOLUMES_REFERENCE, "frame": "patch", "speed": "patches/s"}


def _by_name(rows: Sequence[Row], first: str) -> list[Row]:
    return sorted(rows, key=lambda row: (row["name"] != first, row["name"]))


def _profile_table(
    rows: Sequence[Row],
    all_rows: Sequence[Row],
    reference: str = REFERENCE,
    frame: str = "frame",
    speed: str = "samples/s",
) -> str:
    compared = next((row for row in all_rows if row["name"] == reference), {})
    header = ["profile", "card", frame, "batch", "precision", "peak reserved", "allocated", speed, "ratio"]
    return markdown(header, [_profile_cells(row, compared) for row in rows])


def _profile_cells(row: Row, reference: Row) -> list[str]:
    accumulate = row.get("accumulate", 1)
    batch = f"{row['batch']}" + (f" x {accumulate}" if accumulate > 1 else "")
    name = row["name"] if " " in row["name"] else f"`{row['name']}`"
    card = f"{row['card_gb']} GB" if row.get("card_gb") else NONE
    fixed = [name, card, row["frame"], batch, row["precision"]]
    if not row["fits"]:
        return [*fixed, "does not fit", NONE, NONE, NONE]
    comparable = reference.get("samples_s") and reference.get("device") == row.get("device") and row.get("samples_s")
    ratio = f"{_speed(row) / _speed(reference):.2f}" if comparable else NONE
    memory = [number(row.get(key), 2) + " GB" if row.get(key) is not None else NONE for key in _MEMORY]
    return [*fixed, *memory, number(row.get("samples_s"), 1 if "voxels" in row else 0), ratio]


def _speed(row: Row) -> float:
    """Samples per second; voxels where samples differ in size."""
    return row["samples_s"] * row.get("voxels", 1)


_MEMORY = ("reserved_gb", "allocated_gb")


def isbi2015(report: Report) -> str:
    """Errors on Test1 by run."""
    rows = [row for row in report["rows"] if "error" not in row and not row.get("holdout")]
    if not rows:
        return NOT_MEASURED
    text = (
        f"{origin(rows)} Test1, 150 images, 19 landmarks, trained on the 150 training images; seeds: mean ± sd. "
        "The interval is the bootstrap 95 % interval of the MRE over images, the widest of the seeds. Images are "
        "those of the challenge at half size (967 x 1200, 0.2 mm per pixel), re-encoded with loss."
        f"{conditions(rows)}"
    )
    return f"{_isbi_table(rows)}\n\n{text}"


def isbi2015_holdout(report: Report) -> str:
    """Errors on hold-outs of the training images, by which settings were chosen."""
    rows = [row for row in report["rows"] if "error" not in row and row.get("holdout")]
    if not rows:
        return NOT_MEASURED
    parts = [
        _isbi_table(rows),
        "What each changed in the profile `h200` as it stood at its commit:",
        markdown(["run", "commit", "changes"], [_changes(row) for row in rows if row.get("overrides")]),
        origin(rows),
    ]
    return "\n\n".join(parts)


def _changes(row: Row) -> list[str]:
    """Name, commit and the options that a run was given, `model.loss kl` for `--model.loss kl`."""
    options = " ".join(row["overrides"]).split("--")
    return [row["name"], row["commit"], ", ".join(o.strip() for o in options if o.strip())]


def _isbi_table(rows: Sequence[Row]) -> str:
    header = ["run", "truth", "TTA", "seeds", "MRE mm", "interval", "SDR 2 mm", "2.5 mm", "3 mm", "4 mm", "training"]
    groups = grouped(rows, "name", "annotator", "tta", "holdout")
    return markdown(header, [_isbi_cells(key, members) for key, members in groups.items()])


def _isbi_cells(key: tuple[Any, ...], rows: Sequence[Row]) -> list[str]:
    name, annotator, tta, holdout = key
    intervals = [row["mre_interval"] for row in rows if row.get("mre_interval")]
    interval = (
        f"{min(low for low, _ in intervals):.2f} to {max(high for _, high in intervals):.2f}" if intervals else NONE
    )
    seconds = [row["train_s"] for row in rows if row.get("train_s")]
    folds = len({row.get("fold") for row in rows})
    seeds = str(len({row.get("seed") for row in rows})) + (f", {folds} folds" if holdout and folds > 1 else "")
    return [
        name,
        annotator or "mean",
        tta or "none",
        seeds,
        mean_sd([row["mre"] for row in rows], 3),
        interval,
        *(mean_sd([row[key] for row in rows], 1) for key in SDR),
        f"{statistics.fmean(seconds):.0f} s" if seconds else NONE,
    ]


def isbi2015_landmarks(report: Report) -> str:
    """Errors of each landmark, for the first run on Test1 that has them; mean over its seeds."""
    rows = [row for row in report["rows"] if row.get("per_landmark") and not row.get("holdout")]
    if not rows:
        return NOT_MEASURED
    rows = next(iter(grouped(rows, "name").values()))
    cells = []
    for same in zip(*(row["per_landmark"] for row in rows), strict=True):
        figures = [number(statistics.fmean(one[key] for one in same), d) for key, d in _LANDMARK_FIGURES]
        cells.append([same[0]["name"], *figures])
    header = ["landmark", "MRE mm", "SD mm", "median mm", "SDR 2 mm", "SDR 4 mm"]
    return f"{markdown(header, cells)}\n\nRun {rows[0]['name']}, mean of {len(rows)} seeds. {origin(rows)}"


_LANDMARK_FIGURES = (("mre", 2), ("sd", 2), ("median", 2), ("sdr_2mm", 1), ("sdr_4mm", 1))


def throughput(report: Report) -> str:
    """Samples per second of each step, one column per network and image side, with the ratio to the plain loop."""
    rows: list[Row] = report["rows"]
    if not rows:
        return NOT_MEASURED
    groups = grouped(rows, "network", "side")
    columns = {key: groups[key] for key in sorted(groups, key=lambda key: (key[0], -key[1]))}
    cells = []
    for (step, workers), members in grouped(rows, "step", "workers").items():
        name = step if workers is None else f"{step}, {workers} workers"
        found = {(row["network"], row["side"]): row for row in members}
        cells.append([name, *(_rate(found.get(column), columns[column]) for column in columns)])
    header = ["step", *(f"{network} {side}" for network, side in columns)]
    batch = listed(row.get("batch") for row in rows)
    text = (
        f"Training samples per second and, in brackets, the ratio to the fastest `{BASELINE}`. Batch "
        f"{batch}, one GPU, medians of windows of whole steps. Steps marked + keep those above them.{_windows(rows)} "
        f"{origin(rows)}"
    )
    return f"{markdown(header, cells)}\n\n{text}"


def _windows(rows: Sequence[Row]) -> str:
    """A sentence on how far the windows of a row lie apart, with and without a graph."""
    spreads: dict[bool, list[float]] = {True: [], False: []}
    for row in rows:
        if row.get("low") and row.get("high"):
            spreads["CUDA graph" in row["step"]].append(row["high"] / row["low"] - 1)
    if not all(spreads.values()):
        return ""
    parts = [f"{statistics.median(s):.0%} (at most {max(s):.0%})" for s in (spreads[True], spreads[False])]
    return (
        f" The fastest window of a row lies above its slowest by {parts[0]} with a CUDA graph and by {parts[1]} "
        "without: the host sets the pace there, so differences of that size between such rows say nothing."
    )


def _rate(row: Row | None, column: Sequence[Row]) -> str:
    if row is None:
        return NONE
    if "error" in row:
        return "failed"
    plain = [r for r in column if r["step"] == BASELINE and r.get("samples_per_s")]
    if not plain:
        return number(row["samples_per_s"], 0)
    base = max(plain, key=lambda r: r["samples_per_s"])
    return f"{row['samples_per_s']:.0f} ({row['samples_per_s'] / base['samples_per_s']:.1f}x)"


def codec(report: Report) -> str:
    """What the codec costs when the maps are noisy."""
    return _codec(report, [row for row in report["rows"] if row["noise"]])


def codec_all(report: Report) -> str:
    """What the codec costs, with and without noise."""
    return _codec(report, report["rows"])


def _codec(report: Report, rows: Sequence[Row]) -> str:
    if not rows:
        return NOT_MEASURED
    cells = []
    for (size, stride, sigma, centre, noise), members in grouped(rows, *_CODEC_CASE).items():
        found = {row["method"]: row["mre_mm"] for row in members}
        case = [size, str(stride), number(sigma), centre, f"{100 * noise:.0f} %"]
        cells.append([*case, *(number(found.get(method), 3) for method in DECODERS)])
    header = ["frame", "stride", "sigma", "centre", "noise", *DECODERS]
    frame = report["frame"]
    text = (
        f"Mean error in mm of encoding and decoding alone, without a network. {report['count']} landmarks "
        f"({report['landmarks']}) in {frame['width']} x {frame['height']} pixels of {frame['mm_per_px']} mm; sigma in "
        "heatmap pixels; `integer` rounds the centre of the Gaussian to a heatmap pixel; noise relative to the peak. "
        f"{origin([{'device': 'cpu', **report}])}"
    )
    return f"{markdown(header, cells)}\n\n{text}"


def ema(report: Report) -> str:
    """Cost of one update of an average, ours and others'."""
    rows = [row for row in report["rows"] if "error" not in row]
    if not rows:
        return NOT_MEASURED
    cells = []
    for (network, step), members in grouped(rows, "network", "step").items():
        first = members[0]
        name = f"{network} ({first['params_m']:g} M), {step}, {first['step_ms']:.1f} ms"
        cells += [[name, *_ema_cells(row, first)] for row in members]
    header = ["network, step", "average", "update, µs", "ratio", "kernels", "GPU, µs", "adds to a step, µs", "share"]
    first = rows[0]
    text = (
        f"Batch {first['batch']}, {first['side']} px, bf16. `update`: host and device together, nothing else running; "
        "median of rounds. `adds to a step`: windows of steps with and without it, alternating; the host often waits "
        f"anyway, so part of an update is free, and below the noise of the windows it can be negative. {origin(rows)}"
        f"{conditions(rows)}"
    )
    return f"{markdown(header, cells)}\n\n{text}"


def _ema_cells(row: Row, ours: Row) -> list[str]:
    return [
        row["average"],
        f"{row['update_us']:.0f} ± {row['iqr_us']:.0f}",
        f"{row['update_us'] / ours['update_us']:.1f}",
        str(row["kernels"]),
        number(row["gpu_us"], 0),
        f"{row['added_us']:.0f} ± {row['added_iqr_us']:.0f}",
        f"{row['share']:.2%}",
    ]


def memory_cleanup(report: Report) -> str:
    """Speed and memory with each way to clean up, beside the same training without."""
    rows = [row for row in report["rows"] if "error" not in row]
    if not rows:
        return NOT_MEASURED
    cells = []
    for (network, frames, limited), members in grouped(rows, "network", "frames", "limited").items():
        plain = next((row for row in members if row["cleanup"] == "none"), {})
        training = f"{network}, {frames} frames" + (f", limited to {members[0]['limit_gb']:.2f} GB" if limited else "")
        cells += [[training, *_cleanup_cells(row, plain)] for row in members]
    header = ["training", "cleanup", "every", "samples/s", "ratio", "peak reserved", "allocated", "retries"]
    first = rows[0]
    text = (
        f"Batch {first['batch']}, largest frame {first['side']}, {first['precision']}, eager, images on the device; "
        "medians of three windows, within one fit for fixed frames. `retries`: how often the allocator gave back its "
        f"cache by itself because an allocation would have failed. {origin(rows)}{conditions(rows)}"
    )
    return f"{markdown(header, cells)}\n\n{text}"


def _cleanup_cells(row: Row, plain: Row) -> list[str]:
    every = NONE if row["cleanup"] == "none" else f"{row['every']} steps"
    if not row["fits"]:
        return [row["cleanup"], every, "out of memory", NONE, NONE, NONE, NONE]
    base = plain.get("samples_per_s")
    return [
        row["cleanup"],
        every,
        number(row["samples_per_s"], 0),
        f"{row['samples_per_s'] / base:.2f}" if base else NONE,
        *(number(row.get(key), 2) + " GB" if row.get(key) is not None else NONE for key in _MEMORY),
        NONE if row.get("retries") is None else str(row["retries"]),
    ]


_CODEC_CASE = ("input", "stride", "sigma_heatmap_px", "centre", "noise")

TABLES: Tables = {
    "profiles": ("profiles", profiles),
    "profiles-dsunet": ("profiles_dsunet", profiles_dsunet),
    "isbi2015": ("isbi2015", isbi2015),
    "isbi2015-holdout": ("isbi2015", isbi2015_holdout),
    "isbi2015-landmarks": ("isbi2015", isbi2015_landmarks),
    "throughput": ("throughput", throughput),
    "ema": ("ema", ema),
    "memory-cleanup": ("memory_cleanup", memory_cleanup),
    "codec": ("codec", codec),
    "codec-all": ("codec", codec_all),
    **TABLES_DSUNET,
    **TABLES_DETR,
    **TABLES_PATCHNERF,
}


# ---- pages ----------------------------------------------------------------------------------------------------------


def filled(page: str, table: Callable[[str], str]) -> str:
    r"""A page with every section replaced.

    Args:
        page: Markdown.
        table: From the name of a section to its content.

    Raises:
        ValueError: a mark is without its partner.

    >>> filled("a\n<!-- table:x -->\nold\n<!-- /table -->\nb", lambda name: f"new {name}")
    'a\n<!-- table:x -->\nnew x\n<!-- /table -->\nb'
    """
    if len(MARK.findall(page)) != 2 * len(SECTION.findall(page)):
        raise ValueError("a <!-- table:NAME --> or <!-- /table --> is without its partner")
    return SECTION.sub(lambda found: f"{found[1]}{table(found[2])}\n{found[3]}", page)


def table_of(name: str, results: Path) -> str:
    """Content of a section.

    Raises:
        ValueError: there is no table of that name.
    """
    if name not in TABLES:
        raise ValueError(f"no table {name!r}; there are {', '.join(TABLES)}")
    file, make = TABLES[name]
    path = results / f"{file}.json"
    return make(json.loads(path.read_text())) if path.is_file() else NOT_MEASURED


def outdated(root: Path = ROOT) -> dict[Path, str]:
    """Pages of a checkout that are not current, with what they should contain.

    Raises:
        ValueError: naming the page, if its marks make no sense.
    """
    pages: dict[Path, str] = {}
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        if not path.is_file():
            continue
        text = path.read_text()
        try:
            new = filled(text, lambda name: table_of(name, root / "benchmarks" / "results"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if new != text:
            pages[path] = new
    return pages


def main(args: Sequence[str] | None = None) -> int:
    """Write the pages that are not current, or only name them; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a page is not current")
    check = parser.parse_args(args).check
    pages = outdated()
    for path, text in pages.items():
        print(f"{path.relative_to(ROOT)}: {'not current' if check else 'written'}")
        if not check:
            path.write_text(text)
    return int(check and bool(pages))


if __name__ == "__main__":
    raise SystemExit(main())
