"""Tables of the detection task on accuracy, at equal time and at equal steps; and the names of all its tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from table_parts import NOT_MEASURED, Report, Row, Tables, conditions, grouped, listed, markdown, number, origin
from tables_detr_speed import (
    detr_step,
    evaluation,
    gained,
    guide,
    met,
    paragraphs,
    points,
    profiles_detr,
    sentence,
    sliced,
    stability,
)
from tables_dsunet import OURS, good, peers, signed

# What was aimed at.
AHEAD = 5.0  # points of AP of tiny objects over RT-DETRv2 on frames, of AP in crowded scenes
RECALL = 0.95  # of FCOS's in crowded scenes
CLEAR = 1.0  # point of AP that two seeds may settle


# ---- parts -----------------------------------------------------------------------------------------------------------
def summaries(report: Report, *shared: str) -> list[tuple[list[Row], list[Row]]]:
    """For each setting its summary rows and the runs that they are of."""
    rows = good(report)
    groups = grouped(rows, *shared).values()
    parts = [([r for r in g if r.get("part") == "summary"], [r for r in g if r.get("part") == "run"]) for g in groups]
    return [(found, runs) for found, runs in parts if found and runs]


def best(rows: Sequence[Row], name: str, figure: str = "ap_tiny") -> Row | None:
    """The row of a kind of method with the largest figure: who has several rows is taken at its best."""
    own = [row for row in rows if row["method"].startswith(name) and row.get(figure) is not None]
    return max(own, key=lambda row: row[figure], default=None)


def named(row: Row) -> str:
    """A method, with a learning rate that is not its own."""
    return row["method"] + (f", rate {row['lr']:g}" if row.get("lr") else "")


# ---- accuracy at equal time ------------------------------------------------------------------------------------------


DIFFERENCE = "ours - "
EQUAL_TIME = ("split", "scale", "minutes", "config", "overrides")


def drone_ir(report: Report) -> str:
    """For each setting the methods, and ours less each of them; those on a hold-out come last."""
    settings = summaries(report, *EQUAL_TIME)
    settings.sort(key=lambda found: found[0][0]["split"] == "holdout")
    return paragraphs(*(_drone_setting(*found) for found in settings)) or NOT_MEASURED


def _drone_setting(rows: Sequence[Row], runs: Sequence[Row]) -> str:
    first = rows[0]
    methods = [row for row in rows if not row["method"].startswith(DIFFERENCE)]
    pairs = [row for row in rows if row["method"].startswith(DIFFERENCE)]
    figures = {"ap": "AP", "ap50": "AP50", "ap_tiny": "AP tiny", "ap_small": "AP small", "ar_100": "AR"}
    cells = []
    for row in methods:
        own = [r for r in runs if (r["method"], r["lr"]) == (row["method"], row["lr"])]
        scores = [points(row.get(key), row.get(f"{key}_sd")) for key in figures]
        seconds = number(statistics.fmean(r["train_s"] for r in own), 0)
        memory = [r["peak_gb"] for r in own if r.get("peak_gb")]
        cells.append(
            [named(row), *scores, str(row["steps"]), seconds, number(max(memory, default=None)), str(row["runs"])]
        )
    table = markdown(["method", *figures.values(), "steps", "s", "peak GB", "seeds"], cells)
    names = {"ap": "AP", "ap50": "AP50", "ap_tiny": "AP tiny"}
    differences = [
        [named(row), *(gained(row.get(key), row.get(f"{key}_low"), row.get(f"{key}_high")) for key in names)]
        for row in pairs
    ]
    changed = f" with `{first['overrides']}`" if first["overrides"] else ""
    where = "the validation videos" if first["split"] == "val" else "a quarter of the training videos, held out"
    height, width = runs[0]["frame"]
    text = (
        f"Points of AP on {where}, mean ± sd of the seeds; frames of {width} x {height} pixels, {first['minutes']:g} "
        f"minutes on one GPU for each, profile `{first['config']}`{changed}. Differences: mean over the seeds, 95 % "
        f"interval over drawn videos. {peers(runs, 'peer')} {origin(runs)}{conditions(runs)}"
    )
    return paragraphs(
        table,
        markdown(["difference", *names.values()], differences) if differences else "",
        _ahead(methods, pairs),
        text,
    )


def _ahead(methods: Sequence[Row], pairs: Sequence[Row]) -> str:
    """Ours beside the best row of each rival, by AP of tiny objects."""
    ours = next((row for row in methods if row["method"] == OURS and row.get("ap_tiny") is not None), None)
    said = []
    for name, goal in (("RT-DETRv2", AHEAD), ("FCOS", 0.0)):
        rival = best(methods, name)
        if ours is None or rival is None:
            continue
        gain = ours["ap_tiny"] - rival["ap_tiny"]
        pair = next((p for p in pairs if p["method"] == DIFFERENCE + rival["method"] and p["lr"] == rival["lr"]), {})
        low, high = pair.get("ap_tiny_low"), pair.get("ap_tiny_high")
        aim = f"{goal:g} points were aimed at" if goal else "to be above was aimed at"
        verdict = met(100 * gain >= goal if goal else gain > 0)
        if low is not None and high is not None and low <= 0 <= high:
            verdict += "; the interval holds 0, so the order may be chance"
        words = f"Ours has {gained(gain, low, high)} points of AP tiny against `{named(rival)}`"
        said.append(f"{words} ({aim}: {verdict}).")
    return " ".join(said)


# ---- ablation --------------------------------------------------------------------------------------------------------


BASE = "base"


def ablation(report: Report) -> str:
    """For each number of steps what every setting changes."""
    settings = summaries(report, "split", "steps", "config", "overrides")
    return paragraphs(*(_ablation_setting(*found) for found in settings)) or NOT_MEASURED


def _ablation_setting(rows: Sequence[Row], runs: Sequence[Row]) -> str:
    base = next((row for row in rows if row["setting"] == BASE), None)
    cells = []
    for row in rows:
        scores = [points(row.get(key), row.get(f"{key}_sd")) for key in ("ap", "ap_tiny", "ar_tiny")]
        gains = [gained(row.get(f"{key}_gain")) for key in ("ap", "ap_tiny")]
        cells.append(
            [
                row["setting"],
                *scores,
                *gains,
                number(row.get("confident"), 2),
                number(row["train_s"], 0),
                str(row["runs"]),
            ]
        )
    header = ["setting", "AP", "AP tiny", "AR tiny", "change of AP", "of AP tiny", "sure", "s", "seeds"]
    first, changed = rows[0], f" with `{rows[0]['overrides']}`" if rows[0]["overrides"] else ""
    where = "the validation videos" if first["split"] == "val" else "a quarter of the training videos, held out"
    text = (
        f"Points on {where} after {first['steps']} steps of {listed(r.get('batch') for r in runs)} images, profile "
        f"`{first['config']}`{changed}, not compiled; mean over the seeds, changes paired by seed. `sure`: detections "
        f"with a score above 0.3 per image. {origin(runs)}{conditions(runs)}"
    )
    return paragraphs(markdown(header, cells), _changes(base, rows), text)


def _changes(base: Row | None, rows: Sequence[Row]) -> str:
    """Which settings change AP of tiny objects by more than two seeds can leave to chance."""
    found = {row["setting"]: 100 * row["ap_tiny_gain"] for row in rows if row.get("ap_tiny_gain") is not None}
    if base is None or not found:
        return ""
    noise = max(CLEAR, 200 * base.get("ap_tiny_sd", 0.0))
    groups = {
        "better than the base": [s for s, gain in found.items() if gain >= noise],
        "worse": [s for s, gain in found.items() if gain <= -noise],
        "no difference that so few seeds could show": [s for s, gain in found.items() if abs(gain) < noise],
    }
    said = [f"{words}: {', '.join(names) or 'none'}" for words, names in groups.items()]
    lead = f"Changes of AP tiny count from {noise:.1f} points on (twice the base's spread, at least {CLEAR:g})."
    return f"{lead} {sentence(said)}"


# ---- crowded scenes --------------------------------------------------------------------------------------------------


def dense(report: Report) -> str:
    """AP and recall of each method at each density."""
    settings = summaries(report, "boxes", "scenes", "minutes", "config", "overrides")
    if not settings:
        return NOT_MEASURED
    figures = {"ap": "AP", "ap50": "AP50", "ap_tiny": "AP tiny", "ar_1500": "AR", "ar50_1500": "recall at IoU 0.5"}
    cells, said = [], []
    for rows, _ in settings:
        for row in rows:
            scores = [points(row.get(key), row.get(f"{key}_sd")) for key in figures]
            cells.append(
                [
                    row["method"],
                    str(row["boxes"]),
                    *scores,
                    number(row["steps"], 0),
                    number(row["images_s"], 0),
                    str(row["runs"]),
                ]
            )
        said += _crowded(rows)
    runs = [run for _, own in settings for run in own]
    texts = listed(
        f"{r['minutes']:g} minutes, {r['scenes']} scenes" + (f", `{r['overrides']}`" if r["overrides"] else "")
        for r in runs
    )
    text = (
        f"Points on scenes made of validation frames, trained on scenes of training frames, for {texts} (training + "
        f"evaluation), profile `{runs[0]['config']}`. {peers(runs, 'peer')} {origin(runs)}{conditions(runs)}"
    )
    header = ["method", "boxes", *figures.values(), "steps", "images/s", "seeds"]
    return paragraphs(markdown(header, cells), " ".join(said), text)


def _crowded(rows: Sequence[Row]) -> list[str]:
    ours, said = next((row for row in rows if row["method"] == OURS), None), []
    if ours is None:
        return []
    if (rival := best(rows, "RT-DETRv2", "ap")) is not None and ours.get("ap") is not None:
        gain = 100 * (ours["ap"] - rival["ap"])
        said.append(
            f"{signed(gain, 1)} points of AP against `{rival['method']}` ({AHEAD:g} were aimed at: "
            f"{met(gain >= AHEAD)})"
        )
    if (
        (rival := best(rows, "FCOS", "ar50_1500")) is not None
        and rival["ar50_1500"]
        and ours.get("ar50_1500") is not None
    ):
        share = ours["ar50_1500"] / rival["ar50_1500"]
        gain = gained(None if None in (ours.get("ap"), rival.get("ap")) else ours["ap"] - rival["ap"])
        said.append(
            f"{share:.2f}x the recall of `{rival['method']}` ({RECALL:g}x was aimed at: {met(share >= RECALL)}), and "
            f"{gain} points of AP"
        )
    return [f"With {rows[0]['boxes']} boxes ours has {sentence(said)}"] if said else []


TABLES_DETR: Tables = {
    "detr-step": ("detr_step", detr_step),
    "detr-drone-ir": ("drone_ir", drone_ir),
    "detr-ablation": ("detr_ablation", ablation),
    "detr-dense": ("detr_dense", dense),
    "detr-sliced": ("detr_sliced", sliced),
    "detr-metrics": ("detection_metrics", evaluation),
    "detr-guide": ("detr_guide", guide),
    "detr-stability": ("detr_stability", stability),
    "profiles-detr": ("profiles_detr", profiles_detr),
}
