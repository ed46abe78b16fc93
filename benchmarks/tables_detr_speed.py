"""Tables of the detection task on speed and memory: step, tiles, evaluation, the guide's switches, stability, profiles.

Each ends with a sentence that is formed from the rows and says how far they are from what was aimed at.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence

from detr_gains import gains
from table_parts import NONE, NOT_MEASURED, Report, Row, conditions, grouped, listed, markdown, number, origin
from tables_dsunet import FAILED, OURS, good, interval, peers, signed, size_of

# What was aimed at.
FASTER = 1.3  # times the faster peer, at every density
GROWTH = 0.15  # of memory from 20 to 500 boxes an image
SLICED, EVALUATED = 4.0, 3.0  # times as fast
LONG = 10_000  # steps without a non-finite value
FEW, MANY = 20, 500  # boxes


# ---- parts -----------------------------------------------------------------------------------------------------------


def met(reached: bool) -> str:
    """A verdict."""
    return "met" if reached else "not met"


def points(value: float | None, sd: float | None = None) -> str:
    """A share of 1 in points, with its spread.

    >>> points(0.4567), points(0.4567, 0.012), points(None)
    ('45.7', '45.7 ± 1.2', '–')
    """
    if value is None:
        return NONE
    return f"{100 * value:.1f}" + ("" if sd is None else f" ± {100 * sd:.1f}")


def gained(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """A difference in points, with its interval.

    >>> gained(0.05, 0.01, 0.09), gained(-0.05)
    ('+5.0 (+1.0 to +9.0)', '-5.0')
    """
    if value is None:
        return NONE
    ends = {k: None if v is None else 100 * v for k, v in (("low", low), ("high", high))}
    return signed(100 * value, 1) + ("" if None in ends.values() else f" ({interval(ends, 1)})")


def paragraphs(*parts: str) -> str:
    """Those that are not empty, a line apart."""
    return "\n\n".join(part for part in parts if part)


def sentence(parts: Sequence[str]) -> str:
    """Parts after one another.

    >>> sentence(["one", "two"]), sentence([])
    ('One; two.', '')
    """
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if parts else ""


def fastest(rows: Sequence[Row], key: str = "ms") -> Row | None:
    """The row with the shortest time."""
    return min((row for row in rows if row.get(key)), key=lambda row: row[key], default=None)


# ---- training step ---------------------------------------------------------------------------------------------------


def detr_step(report: Report) -> str:
    """Images per second and memory of each way to train, a column per size; how memory grows; what was aimed at."""
    rows = good(report)
    if not rows:
        return NOT_MEASURED
    sizes = grouped(rows, "px", "batch", "boxes")
    peer = {size: fastest([r for r in own if r["tool"] != OURS and r["queries"] == 300]) for size, own in sizes.items()}
    cells = []
    for (way,), members in grouped(report["rows"], "way").items():
        found = {(row["px"], row["batch"], row["boxes"]): row for row in members}
        cells.append([way, *(_step_cell(found.get(size), peer[size]) for size in sizes)])
    header = ["way", *(f"{px} px, {batch} x {boxes} boxes" for px, batch, boxes in sizes)]
    text = (
        "Images per second and peak memory of the tensors in GiB; in brackets both over those of the fastest peer row "
        "with 300 queries of the same column. Columns: side of the images, images in a batch, boxes on each. Medians "
        "of whole steps, compilation and capture left out. Ours takes 1.5 queries per box and 300 at least unless its "
        f"row says otherwise. {peers([r for r in rows if r['tool'] != OURS], 'remark')} {origin(rows)}"
        f"{conditions(rows)}"
    )
    return paragraphs(markdown(header, cells), _step_goals(sizes, peer), _growth(rows), text)


def _step_cell(row: Row | None, peer: Row | None) -> str:
    if row is None or "error" in row:
        return NONE if row is None else FAILED
    speed = f" ({peer['ms'] / row['ms']:.2f}x)" if peer else ""
    memory = f", {row['allocated_gb']:.1f} GiB" if row.get("allocated_gb") else ""
    if memory and peer and peer.get("allocated_gb"):
        memory += f" ({row['allocated_gb'] / peer['allocated_gb']:.2f}x)"
    return f"{row['images_s']:.0f}{speed}{memory}"


def _ours(rows: Sequence[Row], queries: int | None = None, fine: bool = False) -> Row | None:
    """Our fastest row that trains with all denoising queries."""
    own = [row for row in rows if row["tool"] == OURS and row["fine"] == fine and row["noise"] == 100]
    return fastest([row for row in own if row["queries"] == queries])


def _step_goals(sizes: dict[tuple[int, ...], list[Row]], peer: dict[tuple[int, ...], Row | None]) -> str:
    """Per size how many times as fast as the fastest peer; short of the aim is said as well."""
    said, short, dense = [], [], max(boxes for _, _, boxes in sizes)
    for size, rows in sizes.items():
        own, other, (px, _, boxes) = _ours(rows), peer[size], size
        if own is None or other is None:
            continue
        where = f"{px} px, {boxes} boxes"
        ratio = other["ms"] / own["ms"]
        words = f"{where}: `{own['way']}` is {ratio:.2f}x as fast as `{other['way']}`"
        if (equal := _ours(rows, 300)) is not None and boxes == dense:
            words += f", with 300 queries as well {other['ms'] / equal['ms']:.2f}x"
        if (fine := _ours(rows, fine=True)) is not None:
            words += f", with stride 4 {other['ms'] / fine['ms']:.2f}x"
        said.append(words)
        short += [where] if ratio < FASTER else []
    if not said:
        return ""
    verdict = f"not met at {', '.join(short)}" if short else "met at all of these sizes"
    return f"{sentence(said)} {FASTER}x the faster peer was aimed at: {verdict}."


def _growth(rows: Sequence[Row]) -> str:
    """Memory with few and with many boxes, of each way that was measured with both."""
    cells, ours = [], {}
    for (_, _, way), members in grouped(rows, "px", "batch", "way").items():
        found = {row["boxes"]: row.get("allocated_gb") for row in members}
        few, many = found.get(FEW), found.get(MANY)
        if few and many:
            cells.append([way, f"{few:.2f}", f"{many:.2f}", f"{100 * (many / few - 1):+.0f} %"])
            if members[0]["tool"] == OURS:
                ours[way] = many / few - 1
    if not cells:
        return ""
    table = markdown(["way", f"GiB with {FEW} boxes", f"{MANY} boxes", "growth"], cells)
    if not ours:
        return table
    most = max(ours, key=lambda way: ours[way])
    goal = f"Less than {GROWTH:.0%} was aimed at, ours grows by at most {ours[most]:.1%} (`{most}`)"
    return f"{table}\n\n{goal}: {met(ours[most] < GROWTH)}."


# ---- tiles -----------------------------------------------------------------------------------------------------------


def sliced(report: Report) -> str:
    """Speed and AP of each way to detect in large images."""
    rows = good(report)
    if not rows:
        return NOT_MEASURED
    cells, said = [], []
    for (canvas, frames, tile, seen, weights), members in grouped(
        rows, "canvas", "frames", "tile", "input", "weights"
    ).items():
        found = {row["way"]: row for row in members}
        base = found.get("loop, batch 1")
        name = f"{size_of(canvas)}, {frames}, tiles of {tile}" + (f" seen at {seen}" if seen != tile else "")
        for row in members:
            ratio = f"{base['s'] / row['s']:.1f}x" if base else NONE
            cells.append([name, row["way"], f"{row['images_s']:.2f}", ratio, str(row["tiles"]), points(row["ap"])])
            cells[-1] += [points(row["ap_tiny"]), f"{row['agreement']:.3f}", number(row.get("allocated_gb"), 2)]
        own = fastest([r for r in members if r["tool"] == OURS and not r["whole"]], "s")
        other = fastest([r for r in members if r["tool"] != OURS], "s")
        if own is None or other is None or base is None:
            continue
        ratio = base["s"] / own["s"]
        said.append(
            f"{name} ({weights}): `{own['way']}` is {ratio:.1f}x as fast as `loop, batch 1` ({SLICED:g}x was aimed at: "
            f"{met(ratio >= SLICED)}) and {other['s'] / own['s']:.1f}x as fast as `{other['way']}`, AP "
            f"{points(own['ap'])} beside {points(base['ap'])}"
        )
    text = (
        "Images per second from the host's memory to merged detections, medians; the ratio is to `loop, batch 1`. AP "
        "in points on whole canvases; agreement with the detections of `loop, batch 1`; peak of the tensors in GiB. "
        f"{origin(rows)}{conditions(rows)}"
    )
    header = ["canvas", "way", "images/s", "ratio", "tiles", "AP", "AP tiny", "agreement", "peak GiB"]
    return paragraphs(markdown(header, cells), sentence(said), text)


# ---- evaluation ------------------------------------------------------------------------------------------------------


def evaluation(report: Report) -> str:
    """Seconds of each way to evaluate the same detections."""
    rows = good(report)
    if not rows:
        return NOT_MEASURED
    cells, said = [], []
    for (scene,), members in grouped(rows, "scene").items():
        found = {row["way"]: row for row in members}
        own = found.get(OURS)
        for row in members:
            ratio = f"{row['s'] / own['s']:.1f}x" if own and "speedup" in row else NONE
            seconds = f"{row['s']:.2f}" + (f" ± {row['iqr_s']:.2f}" if row["runs"] > 1 else "")
            cells.append([scene, row["way"], seconds, str(row["runs"]), ratio])
        ratios = {way: found[way]["s"] / own["s"] for way in ("pycocotools", "torchmetrics") if own and way in found}
        if ratios:
            words = " and ".join(f"{ratio:.1f}x as fast as {way}" for way, ratio in ratios.items())
            said.append(
                f"{scene}: ours is {words} ({EVALUATED:g}x was aimed at: {met(min(ratios.values()) >= EVALUATED)})"
            )
    text = (
        "Seconds of CPU time in one thread from tensors to figures, median ± distance between the quartiles; the ratio "
        "is to ours. All ways have the same COCO figures to 1e-6, or the script ends; ours has those of AI-TOD and of "
        "each class in the same pass, `bootstrap` is 100 draws of groups of images. `torchmetrics` is its default, on "
        f"pycocotools. {origin(rows)}{conditions(rows)}"
    )
    return paragraphs(markdown(["scene", "way", "s", "runs", "ratio"], cells), sentence(said), text)


# ---- the guide's optimisations ---------------------------------------------------------------------------------------


def guide(report: Report) -> str:
    """What the guide expects of each of its optimisations and what it brought; then every row."""
    rows = good(report)
    bases = [row for row in rows if row["row"].startswith("baseline") and row.get("images_s")]
    if not bases:
        return NOT_MEASURED
    found = gains(rows)
    rates = [row["images_s"] for row in bases]
    spread = max(rates) / min(rates) - 1
    first = [[g["optimisation"], g["expected"], NONE if g["times"] is None else f"{g['times']:.2f}x"] for g in found]
    middle = statistics.median(rates)
    cells = []
    for row in report["rows"]:
        if "error" in row or not row.get("images_s"):
            cells.append(
                [row["row"], number(row.get("batch"), 0), FAILED if "error" in row else "out of memory", *[NONE] * 6]
            )
            continue
        waiting = NONE if row.get("waiting") is None else f"{row['waiting']:.0%}"
        memory = [number(row.get(key), 1) for key in ("allocated_gb", "reserved_gb")]
        window = f"{row['low']:.1f} to {row['high']:.1f}"
        cells.append(
            [row["row"], str(row["batch"]), f"{row['images_s']:.1f}", window, f"{row['images_s'] / middle:.2f}x"]
        )
        cells[-1] += [waiting, *memory, number(row.get("val_s"), 1)]
    header = ["row", "batch", "images/s", "windows", "ratio", "waiting", "allocated", "reserved GiB", "validation s"]
    text = (
        "Images per second of the whole training in windows of steps, within 23.5 GB; `waiting`: share of the time "
        "that the step waited for data. Logging, bar and cleaning up are measured at every step or fifth step and "
        f"counted as often as they happen. {origin(rows)}{conditions(rows)}"
    )
    return paragraphs(
        markdown(["optimisation", "expected (guide)", "measured"], first),
        _judged(found, spread, len(bases)),
        markdown(header, cells),
        text,
    )


def _judged(gains: Sequence[Row], spread: float, count: int) -> str:
    """Each optimisation as the guide said, less than that, or nothing that the baseline's own spread would not give."""
    groups: dict[str, list[str]] = {
        "as much as the guide expects, or more": [],
        "less": [],
        "nothing beyond that spread": [],
        "slower": [],
    }
    for gain in gains:
        least = re.fullmatch(r"~?([\d.]+)(?:-[\d.]+)?x", gain["expected"])
        if gain["times"] is None or least is None:  # what it expects of a part of the step or epoch
            continue
        times, enough = gain["times"], float(least[1])
        which = 3 if times < 1 - spread else 0 if times >= enough else 1 if times > 1 + spread else 2
        list(groups.values())[which].append(f"{gain['optimisation']} ({times:.2f}x)")
    said = [f"{words}: {', '.join(names)}" for words, names in groups.items() if names]
    lead = f"The {count} rows of the baseline lie {spread:.0%} apart. " if count > 1 else ""
    return f"{lead}{sentence(said)}".strip()


# ---- stability -------------------------------------------------------------------------------------------------------


BAD = ("loss", "gradient", "parameters")


def stability(report: Report) -> str:
    """Non-finite values of long trainings."""
    rows = [row for row in report["rows"] if row.get("steps")]
    if not rows:
        return NOT_MEASURED
    cells, said = [], []
    for row in rows:
        way = ", ".join([row["precision"], *(k.replace("_", " ") for k in ("compile", "cuda_graph") if row.get(k))])
        bad = [str(row[f"bad_{name}"]) for name in BAD]
        begin = NONE if row["first_bad"] < 0 else str(row["first_bad"])
        figures = [f"{row['largest_gradient']:.3g}", f"{row['loss_begin']:.2f} to {row['loss_end']:.2f}"]
        cells.append([way, str(row["batch"]), str(row["steps"]), *bad, begin, *figures, f"{row['least_side_px']:.1f}"])
        finite = not any(row[f"bad_{name}"] for name in BAD)
        short = f" of {wanted}" if (wanted := row.get("wanted", LONG)) > row["steps"] else ""
        result = (
            "all values finite"
            if finite
            else f"non-finite losses in {bad[0]}, gradients in {bad[1]}, weights in {bad[2]}"
        )
        words = f"`{way}`: {row['steps']} steps{short}, {result}, boxes down to {row['least_side_px']:.1f} px"
        words += f"; it ended by {row['error']}" if "error" in row else ""
        if row["precision"] == "bf16-mixed":
            enough = finite and row["steps"] >= LONG and "error" not in row
            words += f" ({LONG} steps without a non-finite value were aimed at: {met(enough)})"
        said.append(words)
    text = (
        f"Frames of {listed(size_of(r['frame']) for r in rows)} pixels. Steps with a non-finite value, and the first "
        "of them; the largest finite norm of the gradients before clipping; means of the loss over a hundred steps at "
        f"the beginning and at the end; the shortest side of a box in pixels. {origin(rows)}{conditions(rows)}"
    )
    header = [
        "precision",
        "batch",
        "steps",
        "losses",
        "gradients",
        "weights",
        "first",
        "largest gradient",
        "loss",
        "least side",
    ]
    return paragraphs(markdown(header, cells), sentence(said), text)


# ---- profiles --------------------------------------------------------------------------------------------------------


PREFIX, REFERENCE, CROWD = "detr/", "rtxa5000", f" {MANY} boxes"


def profiles_detr(report: Report) -> str:
    """Memory and relative speed of every profile, with few and with many boxes; then what was tried beside them."""
    rows = [{**row, "name": row["name"].removeprefix(PREFIX)} for row in good(report)]
    found = {row["name"]: row for row in rows}
    own = sorted(
        (row for row in rows if " " not in row["name"]), key=lambda row: (row["name"] != REFERENCE, row["name"])
    )
    other = [row for row in rows if " " in row["name"] and not row["name"].endswith(CROWD)]
    if not own:
        return NOT_MEASURED
    header = ["profile", "card", "frame", "batch", "precision", "peak reserved", "allocated", f"allocated,{CROWD}"]
    header += ["images/s", "ratio", f"images/s,{CROWD}"]
    table = markdown(header, [_profile_cells(row, found.get(REFERENCE), found.get(row["name"] + CROWD)) for row in own])
    text = (
        f"Drawn images with {FEW} boxes each, and with {MANY}. The allocator was limited to the memory of the "
        "profile's card less 0.5 GB. Memory holds for that card as far as its kernels are the same; speed does not, "
        f"hence the ratio to `{REFERENCE}`. {origin(rows)}{conditions(rows)}"
    )
    more = ""
    if other:
        cells = [_profile_cells(row, found.get(row["name"].partition(" ")[0]), None) for row in other]
        dropped = [[c for i, c in enumerate(line) if i not in (7, 10)] for line in cells]
        names = [h for i, h in enumerate(header) if i not in (7, 10)]
        more = f"Profiles with one change, with the ratio to the profile without it:\n\n{markdown(names, dropped)}"
    return paragraphs(table, _fitting(own, found), text, more)


def _fitting(own: Sequence[Row], found: dict[str, Row]) -> str:
    """Whether everything fits, and how much memory many boxes take."""
    crowds = {row["name"]: found[row["name"] + CROWD] for row in own if row["name"] + CROWD in found}
    large = [row["name"] for row in own if not row["fits"]] + [
        f"{n} with {MANY} boxes" for n, r in crowds.items() if not r["fits"]
    ]
    said = [
        f"{len(own)} profiles fit their card, {len(crowds)} of them measured with {MANY} boxes too"
        if not large
        else f"out of memory: {', '.join(large)}"
    ]
    pairs = {n: (found[n].get("allocated_gb"), crowd.get("allocated_gb")) for n, crowd in crowds.items()}
    growth = {n: many / few - 1 for n, (few, many) in pairs.items() if few and many}
    if growth:
        most = max(growth, key=lambda name: growth[name])
        said.append(
            f"from {FEW} to {MANY} boxes the tensors' peak grows by {min(growth.values()):.0%} to {growth[most]:.0%} "
            f"(`{most}`)"
        )
    return sentence(said)


def _profile_cells(row: Row, reference: Row | None, crowd: Row | None) -> list[str]:
    accumulate = row.get("accumulate", 1)
    batch = f"{row['batch']}" + (f" x {accumulate}" if accumulate > 1 else "")
    name = row["name"] if " " in row["name"] else f"`{row['name']}`"
    fixed = [name, f"{row['card_gb']} GB" if row.get("card_gb") else NONE, row["frame"], batch, row["precision"]]
    dense_memory = NONE if crowd is None else "does not fit" if not crowd["fits"] else _gb(crowd, "allocated_gb")
    dense_speed = NONE if crowd is None else number(crowd.get("samples_s"), 1)
    if not row["fits"]:
        return [*fixed, "does not fit", NONE, dense_memory, NONE, NONE, dense_speed]
    known = reference and reference.get("samples_s") and reference.get("device") == row.get("device")
    ratio = f"{row['samples_s'] / reference['samples_s']:.2f}" if known and reference and row.get("samples_s") else NONE
    memory = [_gb(row, "reserved_gb"), _gb(row, "allocated_gb"), dense_memory]
    return [*fixed, *memory, number(row.get("samples_s"), 1), ratio, dense_speed]


def _gb(row: Row, key: str) -> str:
    return NONE if row.get(key) is None else f"{row[key]:.2f} GB"
