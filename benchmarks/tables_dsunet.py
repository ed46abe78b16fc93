"""Tables of the volume task: training step, inference, loaders, Hippocampus, lesion targets and metrics, studies."""

from __future__ import annotations

from collections.abc import Sequence

from table_parts import NONE, NOT_MEASURED, Report, Row, Tables, conditions, grouped, listed, markdown, number, origin

OURS = "ours"
GUIDE = "guide"  # the loader that others are compared with
FAILED = "failed"


# ---- parts ----------------------------------------------------------------------------------------------------------


def probability(p: float | None) -> str:
    """A value of p.

    >>> probability(0.0004), probability(0.0312)
    ('< 0.001', '0.031')
    """
    return NONE if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def interval(row: Row, digits: int) -> str:
    """The two ends of a confidence interval of a difference.

    >>> interval({"low": -0.5, "high": 1.25}, 2)
    '-0.50 to +1.25'
    """
    if row.get("low") is None or row.get("high") is None:
        return NONE
    return f"{signed(row['low'], digits)} to {signed(row['high'], digits)}"


def signed(value: float | None, digits: int) -> str:
    """A difference.

    >>> signed(0.25, 1), signed(-0.04, 1)
    ('+0.2', '0.0')
    """
    if value is None:
        return NONE
    text = f"{value:+.{digits}f}"
    return text if float(text) else text[1:]


def size_of(shape: str) -> str:
    """A shape as it is read.

    >>> size_of("240x240x155")
    '240 x 240 x 155'
    """
    return shape.replace("x", " x ")


def good(report: Report) -> list[Row]:
    """Rows that are no errors."""
    return [row for row in report["rows"] if "error" not in row]


def peers(rows: Sequence[Row], key: str) -> str:
    """A sentence with the names and versions of the peers."""
    return f"Peers: {listed(row.get(key) for row in rows) or 'none'}."


def fastest(rows: Sequence[Row], key: str, ours: bool = False) -> Row | None:
    """The fastest row of the peers, or of ours among those that train the same network."""
    own = [row for row in rows if row.get(key) and (row["tool"] == OURS) == ours]
    if ours:
        own = [row for row in own if row.get("norm", "instance") == "instance" and row.get("mkdc", "off") == "off"]
        own = [row for row in own if row.get("deep_supervision", True)]
    return min(own, key=lambda row: row[key], default=None)


def fastest_of(rows: Sequence[Row]) -> str:
    """Who the fastest peer was: among few rows it need not be the fastest way that it has."""
    count = sum(row["tool"] != OURS for row in rows)
    return f"the fastest of {count} peer rows" if count > 1 else "the only peer row"


# ---- training step --------------------------------------------------------------------------------------------------


def dsunet_step(report: Report) -> str:
    """Patches per second and memory of each way to train, a column per size."""
    rows = good(report)
    if not rows:
        return NOT_MEASURED
    sizes = grouped(rows, "side", "batch")
    best = {size: fastest(members, "ms") for size, members in sizes.items()}
    cells = []
    for (way,), members in grouped(report["rows"], "way").items():
        found = {(row["side"], row["batch"]): row for row in members}
        cells.append([way, *(_step_cell(found.get(size), best[size]) for size in sizes)])
    goals = [
        f"{side}³, batch {batch}: `{own['way']}` has {peer['ms'] / own['ms']:.2f}x the speed"
        f"{_share(own, peer, ' and {} the memory')} of {fastest_of(members)}"
        for (side, batch), members in sizes.items()
        if (peer := best[side, batch]) is not None and (own := fastest(members, "ms", ours=True)) is not None
    ]
    text = (
        "Patches per second and peak memory of the tensors in GiB; in brackets both over those of the fastest peer's "
        "row of the same size. Medians of whole steps, compilation and capture left out. "
        f"{peers([row for row in rows if row['tool'] != OURS], 'remark')} {origin(rows)}{conditions(rows)}"
    )
    header = ["way", *(f"{side}³, batch {batch}" for side, batch in sizes)]
    return "\n\n".join([markdown(header, cells), *([f"{'; '.join(goals)}."] if goals else []), text])


def _share(row: Row, base: Row, words: str) -> str:
    """Its memory over that of another row, in words; nothing where it is not known."""
    known = row.get("allocated_gb") and base.get("allocated_gb")
    return words.format(f"{row['allocated_gb'] / base['allocated_gb']:.2f}x") if known else ""


def _step_cell(row: Row | None, best: Row | None) -> str:
    if row is None:
        return NONE
    if "error" in row:
        return FAILED
    speed = f" ({best['ms'] / row['ms']:.2f}x)" if best else ""
    memory = f", {row['allocated_gb']:.1f} GiB" if row.get("allocated_gb") else ""
    return f"{row['patches_s']:.1f}{speed}{memory}{_share(row, best, ' ({})') if best else ''}"


# ---- inference ------------------------------------------------------------------------------------------------------


def dsunet_inference(report: Report) -> str:
    """Seconds per volume of each way, with and without TTA."""
    rows = good(report)
    if not rows:
        return NOT_MEASURED
    groups = grouped(sorted(rows, key=lambda row: row["tta"]), "volume", "tta")
    best = {column: fastest(members, "s") for column, members in groups.items()}
    cells = []
    for (way,), members in grouped(report["rows"], "way").items():
        found = {(row["volume"], row["tta"]): row for row in members}
        times = [_seconds_cell(found.get(column), best[column]) for column in groups]
        agreement = min((row["agreement"] for row in members if "agreement" in row), default=None)
        peak = max((row["allocated_gb"] for row in members if row.get("allocated_gb")), default=None)
        cells.append([way, *times, number(agreement, 4), number(peak, 1)])
    names = [f"{size_of(volume)}{', TTA' if tta else ''}" for volume, tta in groups]
    goals = [
        f"{name}: `{own['way']}` is {peer['s'] / own['s']:.2f}x as fast as {fastest_of(members)}, agreement "
        f"{own['agreement']:.4f}"
        for name, (column, members) in zip(names, groups.items(), strict=True)
        if (peer := best[column]) is not None and (own := fastest(members, "s", ours=True)) is not None
    ]
    text = (
        "Seconds per volume on the device, from the normalised image to the logits; in brackets how many times as fast "
        "as the fastest peer's row of the same column. Agreement: Dice with float32 windows one by one, the lowest of "
        f"the row. Peak: of the tensors, the largest of the row. {peers(rows, 'peer')} {origin(rows)}{conditions(rows)}"
    )
    table = markdown(["way", *names, "agreement", "peak GiB"], cells)
    return "\n\n".join([table, *([f"{'; '.join(goals)}."] if goals else []), text])


def _seconds_cell(row: Row | None, best: Row | None) -> str:
    if row is None:
        return NONE
    if "error" in row:
        return FAILED
    return f"{row['s']:.3f}" + (f" ({best['s'] / row['s']:.2f}x)" if best else "")


# ---- loader ---------------------------------------------------------------------------------------------------------


def dsunet_loader(report: Report) -> str:
    """Augmented patches per second of each way."""
    rows = good(report)
    if not rows:
        return NOT_MEASURED
    cells = []
    for (data, patch, batch), members in _by_patch(report["rows"]).items():
        guide = max((row["patches_s"] for row in members if row["way"] == GUIDE and "error" not in row), default=None)
        cells += [[f"{data}, patch {patch}, batch {batch}", *_loader_cells(row, guide)] for row in members]
    header = ["data", "way", "patches/s", "windows", "ratio", "250 steps, s", "device GB"]
    text = (
        "Augmented patches on the device, through a Trainer without a network: median, slowest and fastest of three "
        f"windows; ratio to the fastest row of the guide's way. {listed(row.get('cores') for row in rows)} cores. "
        f"{peers(rows, 'peer')} {origin(rows)}{conditions(rows)}"
    )
    return f"{markdown(header, cells)}\n\n{text}"


def _by_patch(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Rows with equal data, patch and batch."""
    named = [{**row, "size": "x".join(map(str, row["patch"])) if "patch" in row else NONE} for row in rows]
    return grouped(named, "data", "size", "batch")


def _loader_cells(row: Row, guide: float | None) -> list[str]:
    way = f"{row['way']}, {row['workers']} worker{'s' * (row['workers'] > 1)}" if row.get("workers") else row["way"]
    if "error" in row:
        return [way, FAILED, NONE, NONE, NONE, NONE]
    windows = f"{row['low']:.0f} to {row['high']:.0f}"
    ratio = f"{row['patches_s'] / guide:.1f}x" if guide else NONE
    figures = [f"{row['patches_s']:.0f}", windows, ratio, number(row["epoch_s"], 1)]
    return [way, *figures, number(row.get("device_gb"), 2)]


# ---- Hippocampus ----------------------------------------------------------------------------------------------------


def hippocampus(report: Report) -> str:
    """Cross-validated Dice of both methods and their difference."""
    rows = [row for row in report["rows"] if row.get("part") == "summary"]
    runs = [row for row in good(report) if "fold" in row]
    if not rows or not runs:
        return NOT_MEASURED
    cold = [f"{row['method']} {row['first_s']:.0f} s" for row in report["rows"] if row.get("part") == "cold start"]
    theirs = [row for row in runs if row.get("peer")]
    compiled = ", compiled" if any(row.get("compile") for row in theirs) else ""
    peer = f"{listed(row['peer'] for row in theirs)} in {listed(row.get('precision') for row in theirs)}{compiled}"
    # The summary is made where the rows come together, which need not be where they were measured.
    text = (
        f"Dice, mean over the foreground classes, {listed(row['cases'] for row in rows)} held-out cases of "
        f"{len({row['fold'] for row in runs})} folds, and the seeds. Differences are paired by case, the seeds "
        "averaged first: mean, 95 % bootstrap interval, Wilcoxon's p. The peer trains for the seconds that ours took "
        "in the same fold with the same seed; `longest` is the longest fold, evaluation included. First step with an "
        f"empty compiler's cache after: {', '.join(cold) or 'not measured'}. Peer: {peer if theirs else 'none'}. "
        f"{origin(runs)}{conditions(runs)}"
    )
    header = ["method", "profile", "TTA", "Dice", "seeds, or interval", "training s", "longest s", "steps", "runs"]
    return f"{markdown(header, [_dice_cells(row) for row in rows])}\n\n{text}"


def _dice_cells(row: Row) -> list[str]:
    profile = f"`{row['config']}` {row['overrides']}".strip()
    fixed = [row["method"], profile, "mirrors" if row["tta"] else "none"]
    if "low" in row:
        p = probability(row["p"])
        span = f"{interval(row, 4)}, p {p if p.startswith('<') else f'= {p}'}"
        return [*fixed, signed(row["dice"], 4), span, NONE, NONE, NONE, NONE]
    seeds = ", ".join(f"{dice:.4f}" for dice in row["seeds"])
    figures = [number(row[key], 0) for key in ("train_s", "longest_s", "steps")]
    return [*fixed, f"{row['dice']:.4f}", seeds, *figures, str(row["runs"])]


# ---- lesion targets -------------------------------------------------------------------------------------------------


LESION_FIGURES = {
    "dice": "Dice",
    "lesion_recall": "recall",
    "lesion_precision": "precision",
    "lesion_f1": "F1",
    "lesion_recall_lt6voxels_pooled": "recall < 6 voxels",
    "lesion_recall_6to18voxels_pooled": "6 to 17",
    "lesion_recall_18to47voxels_pooled": "18 to 46",
    "lesion_recall_ge47voxels_pooled": "from 47",
}
LESION_SETTING = ("data", "volumes_asked", "lesions_mean", "contrast", "steps_asked", "overrides")


def lesion_targets(report: Report) -> str:
    """For each setting the lesion figures of each arm, then the differences to nearest targets."""
    settings: dict[str, list[Row]] = {}
    for row in good(report):
        settings.setdefault(str([row.get(key) for key in LESION_SETTING]), []).append(row)
    texts = [_lesion_setting(rows) for rows in settings.values() if any(row.get("part") == "mean" for row in rows)]
    return "\n\n".join(texts) or NOT_MEASURED


def _lesion_setting(rows: Sequence[Row]) -> str:
    means, pairs = ([row for row in rows if row.get("part") == part] for part in ("mean", "comparison"))
    data = next((row for row in rows if row.get("part") == "data"), None)
    runs = [row for row in rows if "seed" in row]
    cells = [[row["arm"], *(number(row.get(key), 3) for key in LESION_FIGURES), str(row["runs"])] for row in means]
    parts = [markdown(["targets", *LESION_FIGURES.values(), "runs"], cells)]
    if pairs:
        header = ["difference", "figure", "mean", "95 % interval", "p (Holm)", "verdict"]
        parts.append(markdown(header, [_pair_cells(row) for row in pairs]))
    lesions = f"{data['lesions']} lesions in {data['volumes']} volumes ({data['data']}). " if data else ""
    changed = f" with `{means[0]['overrides']}`" if means[0].get("overrides") else ""
    steps = f"{means[0]['steps_asked']} steps{changed}. " if means[0].get("steps_asked") else ""
    parts.append(
        f"{lesions}{steps}Means over held-out cases and seeds, recall by size over all lesions. Differences are paired "
        f"by case, the seeds averaged first. {origin(runs or means)}{conditions(runs)}"
    )
    return "\n\n".join(parts)


def _pair_cells(row: Row) -> list[str]:
    figures = [signed(row["difference"], 3), interval(row, 3), probability(row["p_holm"]), row["verdict"]]
    return [row["pair"], LESION_FIGURES[row["figure"]], *figures]


# ---- lesion metrics -------------------------------------------------------------------------------------------------


COUNTED = {"any": "lesions, any overlap", "iou": "lesions, IoU from 0.2", "hd95": "HD95"}


def lesion_metrics(report: Report) -> str:
    """Milliseconds of each way to count lesions or to find HD95."""
    rows = good(report)
    if not rows:
        return NOT_MEASURED
    ways = [way for (way,) in grouped(rows, "way") if way != OURS]
    cells = []
    for (figure, count, _), members in grouped(rows, "figure", "lesions", "shape").items():
        found = {row["way"]: row for row in members}
        times = [_ms_cell(found.get(way)) for way in (*ways, OURS)]
        own = found.get(OURS)
        cells.append([COUNTED[figure], str(count), *times, f"{own['speedup']:.0f}x" if own else NONE])
    text = (
        "Milliseconds of CPU time in one thread, median ± distance between the quartiles, for masks of "
        f"{listed(size_of(row['shape']) for row in rows)} voxels; `ratio` is the row's first way over ours. All ways "
        f"of a row gave the same result. {origin(rows)}{conditions(rows)}"
    )
    return f"{markdown(['figure', 'lesions', *ways, OURS, 'ratio'], cells)}\n\n{text}"


def _ms_cell(row: Row | None) -> str:
    if row is None:
        return NONE
    digits = 0 if row["ms"] >= 100 else 1
    return f"{row['ms']:.{digits}f} ± {row['iqr_ms']:.{digits}f}"


# ---- studies --------------------------------------------------------------------------------------------------------


CROSS = " x "  # between the factors of an interaction
COST = {  # key in the report: title, factor, decimals
    "seconds": ("training s", 1.0, 0),
    "evaluation_seconds": ("evaluation s", 1.0, 1),
    "samples_per_s": ("patches/s", 1.0, 1),
    "peak_reserved_gb": ("peak GiB", 1.0, 2),
    "parameters": ("parameters, M", 1e-6, 3),
    "gflops": ("GFLOP a patch", 1.0, 2),
}


def study(report: Report) -> str:
    """Dice and cost of the arms, the effects with intervals and p, and the sentences; from a study's report.json."""
    if not report.get("arms"):
        return NOT_MEASURED
    effects = report["effects"].get("dice") or {}
    parts = [_arms_table(report, with_verdict=not effects)]
    if effects:
        header = ["effect", "Dice, points", "95 % interval", "p", "p (Holm)", "verdict"]
        cells = [
            [
                f"{name}, interaction" if CROSS in name else name,
                signed(found["mean"], 2),
                interval(found, 2),
                probability(found["p"]),
                probability(found["p_holm"]),
                found["verdict"],
            ]
            for name, found in effects.items()
        ]
        parts.append(markdown(header, cells))
    parts += [f"**{note}**" for note in report["notes"]]
    parts.append("\n".join(f"- {sentence}" for sentence in report["sentences"]))
    return "\n\n".join([*parts, _study_text(report)])


def _arms_table(report: Report, with_verdict: bool) -> str:
    arms, cost, reference = report["arms"], report["cost"], report["reference"]
    seeds = any(arm["dice"].get("sd_of_seeds") is not None for arm in arms.values())
    header = ["arm", "Dice, points", "SD of cases", *(["SD of seeds"] if seeds else []), f"against {reference}"]
    header += ["95 % interval", "p (Holm)", *(["verdict"] if with_verdict else [])]
    header += [title for title, _, _ in COST.values()]
    cells = []
    for name, arm in arms.items():
        dice, found = arm["dice"], report["differences"]["dice"].get(name, {})
        row = [name, number(dice["mean"], 2), number(dice["sd"], 2)]
        row += [number(dice.get("sd_of_seeds"), 2)] if seeds else []
        row += [signed(found.get("mean"), 2), interval(found, 2), probability(found.get("p_holm"))]
        row += [found.get("verdict", NONE)] if with_verdict else []
        for key, (_, factor, digits) in COST.items():
            value = cost[name].get(key)
            row.append(NONE if value is None else number(factor * value, digits))
        cells.append(row)
    return markdown(header, cells)


def _study_text(report: Report) -> str:
    about, runs, arms = report["about"], report["runs"], report["arms"]
    minutes = sum(report["cost"][arm].get(key) or 0 for arm in arms for key in ("seconds", "evaluation_seconds")) / 60
    places = {"commit": "commit", "code": "code", "torch": "torch"}
    found = [f"{label} {_joined(about[key])}" for label, key in places.items() if about.get(key)]
    checks = "; ".join(f"{name}: {text}" for name, text in report["checks"].items())
    return (
        f"{report['cases']} cases of {report['patients']} patients, each held out once; folds "
        f"{_joined(report['folds'])}; seeds {_joined(report['seeds'])}; {runs['counted']} of {runs['planned']} runs, "
        f"{minutes * runs['counted'] / len(arms):.1f} minutes of training and evaluation together. Differences are "
        "paired by case: 95 % bootstrap interval over patients, Wilcoxon's p, Holm's correction over a table's rows; "
        f"`equivalent` is within ±{report['smallest_effect']:g} points. Checked: {checks}. Measured on "
        f"{_joined(about.get('device')) or 'an unnamed device'}: {'; '.join(found)}."
    )


def _joined(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value or "")


TABLES_DSUNET: Tables = {
    "dsunet-hippocampus": ("hippocampus", hippocampus),
    "dsunet-study": ("dsunet_study", study),
    "dsunet-sweep": ("dsunet_sweep", study),
    "dsunet-lesion-targets": ("lesion_targets", lesion_targets),
    "dsunet-step": ("dsunet_step", dsunet_step),
    "dsunet-inference": ("dsunet_inference", dsunet_inference),
    "dsunet-loader": ("dsunet_loader", dsunet_loader),
    "dsunet-lesion-metrics": ("lesion_metrics", lesion_metrics),
}
