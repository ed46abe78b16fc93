"""Do soft or max targets of deep supervision find more lesions than nearest ones? Known lesions in real volumes.

Into every volume of `--root` lesions are implanted whose sizes follow those of 3115 white-matter lesions at 1 mm
(median 17 voxels, quartiles 6 and 46), each volume with its own; without a root, brains are drawn. The four arms,
`soft`, `max` and `nearest` targets and no deep supervision (`off`), train the same network of five stages (heads at
1/1, 1/2, 1/4 and 1/8) from the same first weights with the same patches, steps and schedule; what differs is the target
of the coarser heads. Whole held-out volumes are evaluated with the average of the weights at the end of training,
without TTA.

A lesion is found if any of its voxels is predicted (ISLES'22), components by 26 neighbours; recall, precision and F1
are means over cases (a case without lesions has no recall), `pooled` over all lesions; strata by voxels. Differences to
`nearest` are paired by case, the seeds averaged first: mean, bootstrap interval, Wilcoxon's p corrected for all
comparisons (Holm).

    python benchmarks/lesion_targets.py --root /data/msd_hippocampus --out benchmarks/results/lesion_targets.json
    python benchmarks/lesion_targets.py --take a.json b.json       # rows of runs on several GPUs together
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from common import Results, Row, table, take
from hippocampus import QUIET, PerCase, dealt, evaluate, fit, mean, pooled, values
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lit_dsunet.metrics import CaseDice, LesionMetrics
from lit_dsunet.nifti import read_volume, write_label, write_probability
from lit_dsunet.readers import make_reader
from lit_dsunet.samples import Volume
from lit_dsunet.statistics import compare, judge
from lit_dsunet.synthetic import LesionLaw, SyntheticVolumes, implant_lesions

ARMS = ("nearest", "soft", "max", "off")
FIGURES = {"lesion_recall": 0.01, "lesion_f1": 0.01, "lesion_precision": 0.01, "dice": 0.005}  # smallest that matters
EDGES = (6, 18, 47)  # voxels: the quartiles of the sizes
SETTING = ("data", "volumes_asked", "lesions_mean", "contrast", "steps_asked", "overrides")
COLUMNS = ("arm", "seed", "dice", "lesion_recall", "lesion_precision", "lesion_f1", "lesion_recall_pooled", "train_s")
STRATA = tuple(f"lesion_recall_{s}_pooled" for s in ("lt6voxels", "6to18voxels", "18to47voxels", "ge47voxels"))
NETWORK = [
    *("--model.strides", "[1,2,2,2,2]", "--model.loss", "dice_ce", "--model.loss_options", "{batch_dice: true}"),
    *("--model.optimizer", "adamw", "--model.lr", "0.001", "--model.weight_decay", "0.01"),
    *("--model.schedule", "cosine", "--model.warmup", "0.05", "--model.cuda_graph", "true"),
    *("--trainer.gradient_clip_val", "12", "--trainer.benchmark", "true", "--trainer.precision", "bf16-mixed"),
    *("--data.patch_size", "[32,48,32]", "--data.batch_size", "8", "--data.augment", "{}", "--ema.decay", "0.999"),
]
TINY = [
    *("--model.features", "[2,2,2,2,4]", "--trainer.precision", "32-true", "--model.cuda_graph", "false"),
    *("--data.patch_size", "[32,16,16]", "--data.batch_size", "2"),
]


class ByVoxels(PerCase):
    """Lesions by their size in voxels, where the module's own metrics sort them by millilitres."""

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put other metrics in the place of the module's."""
        found = {"dice": CaseDice(2, ["background", "lesion"]), "lesions": LesionMetrics(edges=EDGES, unit="voxels")}
        pl_module.metrics["test"] = nn.ModuleDict(found).to(pl_module.device)  # type: ignore[operator, index]


# ---- data -----------------------------------------------------------------------------------------------------------


def law(options: argparse.Namespace) -> LesionLaw:
    """What the lesions are like."""
    return LesionLaw(count=options.lesions, contrast=tuple(options.contrast))


def volumes(options: argparse.Namespace) -> list[Volume]:
    """Volumes with lesions, the same for the same options."""
    if options.root is None:
        side = 16 if options.tiny else 64
        size = (side, side, side)
        return SyntheticVolumes(num_train=options.volumes, num_test=0, shape=size, lesions=law(options)).volumes(
            "train"
        )
    read = make_reader("auto", options.root, None, None).read()
    samples = sorted(read.splits["train"], key=lambda s: s.name)[: options.volumes]
    return [implant_lesions(read_volume(s, read.label_values), law(options), i) for i, s in enumerate(samples)]


def write(cases: Sequence[Volume], folder: Path) -> Row:
    """A data set in nnU-Net's raw layout; how many lesions it has."""
    counts = LesionMetrics(edges=EDGES, unit="voxels")
    for number, volume in enumerate(cases):
        assert volume.label is not None
        for channel, image in enumerate(volume.image):
            path = folder / "imagesTr" / f"{volume.name}_{channel:04d}.nii"
            write_probability(path, image, volume.geometry)
        write_label(folder / "labelsTr" / f"{volume.name}.nii", volume.label, volume.geometry)
        counts.update(volume.label, volume.label, volume.geometry.spacing, number)
    content = {
        "channel_names": {str(c): f"channel {c}" for c in range(len(cases[0].image))},
        "labels": {"background": 0, "lesion": 1},
        "numTraining": len(cases),
        "file_ending": ".nii",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    seen = {k: int(v.sum()) for k, v in counts.per_case().items() if k == "n_target" or k.startswith("n_")}
    return {"volumes": len(cases), "lesions": seen["n_target"], **{k: v for k, v in seen.items() if "voxels" in k}}


# ---- runs -----------------------------------------------------------------------------------------------------------


def run(arm: str, seed: int, base: Sequence[str], results: Results, key: Row) -> None:
    """Train and evaluate one arm with one seed."""
    heads = ["--model.deep_supervision", "0" if arm == "off" else "3"]
    targets = [] if arm == "off" else ["--model.ds_targets", arm]
    cli, row = fit([*base, *heads, *targets, "--data.seed", str(seed), "--seed_everything", str(seed)])
    cases = evaluate(cli, False, ByVoxels())
    cli.datamodule.teardown("fit")
    row |= {"eval_s": round(cases.seconds, 2), "val_cases": len(cases.figures["dice"])}
    row |= values({k: cases.figures[k] for k in FIGURES}, FIGURES)
    results.add(key, {**row, **{k: mean([v]) for k, v in cases.means.items()}})


def settings(rows: Sequence[Row]) -> list[list[Row]]:
    """Runs that belong together: all that differs is arm, seed and fold."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if "per_case" in row:
            groups.setdefault(str([row[k] for k in SETTING]), []).append(row)
    return list(groups.values())


def over_seeds(rows: Sequence[Row]) -> list[Row]:
    """A row per setting and arm with the means of its seeds."""
    out = []
    for group in settings(rows):
        for arm in dict.fromkeys(row["arm"] for row in group):
            own = [row for row in group if row["arm"] == arm]
            shown = {k: mean(row[k] for row in own if row[k] is not None) for k in (*COLUMNS[2:], *STRATA)}
            out.append({"part": "mean", "arm": arm, **{k: own[0][k] for k in SETTING}, "runs": len(own), **shown})
    return out


def comparisons(rows: Sequence[Row]) -> list[Row]:
    """Each arm less `nearest`, for each figure, paired by case."""
    out: list[Row] = []
    for group in settings(rows):
        by_arm = {arm: [row for row in group if row["arm"] == arm] for arm in ARMS}
        differences: dict[str, list[float]] = {}
        for arm, own in by_arm.items():
            for figure in FIGURES if own and by_arm["nearest"] and arm != "nearest" else ():
                ours, theirs = pooled(own, figure), pooled(by_arm["nearest"], figure)
                both = sorted(ours.keys() & theirs.keys())
                differences[f"{arm} - nearest|{figure}"] = [ours[n] - theirs[n] for n in both]
        for name, found in compare(differences).items():
            pair, figure = name.split("|")
            key = {"part": "comparison", "pair": pair, "figure": figure, **{k: group[0][k] for k in SETTING}}
            values = {"difference": found.mean, "low": found.low, "high": found.high, "p_holm": found.p_holm}
            out.append({**key, **values, "cases": found.cases, "verdict": judge(found, FIGURES[figure])})
    return out


def arguments(args: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The script's options and, behind `--`, further arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="data set to implant lesions in; drawn brains if absent")
    parser.add_argument("--volumes", type=int, default=260, help="at most, and so many drawn ones (%(default)s)")
    parser.add_argument("--lesions", type=float, default=8.0, help="mean number in a volume (%(default)s)")
    parser.add_argument("--contrast", type=float, nargs=2, default=[1.5, 3.5], help="of lesions, in sd (%(default)s)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fold", type=int, default=0, help="of five")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/lesion_targets.json"))
    parser.add_argument("--take", type=Path, nargs="+", default=[], help="add the rows of these files and stop")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="Unix time that no run should pass")
    parser.add_argument("--tiny", action="store_true", help="a dry run on a CPU")
    options, rest = parser.parse_known_args(args)
    if options.tiny:
        options.volumes, options.steps, options.seeds, options.lesions = min(options.volumes, 10), 2, [0], 3.0
    return options, [a for a in rest if a != "--"]


def measure(options: argparse.Namespace, overrides: list[str], results: Results, folder: Path) -> None:
    """All runs that are missing, every arm of a seed before the next seed."""
    data = Path(options.root).name if options.root else "drawn brains"
    shared: Row = {"data": data, "volumes_asked": options.volumes, "lesions_mean": options.lesions}
    shared |= {"contrast": list(options.contrast), "steps_asked": options.steps, "overrides": " ".join(overrides)}
    plan = [
        {"arm": arm, "seed": seed, "fold": options.fold, **shared} for seed in options.seeds for arm in options.arms
    ]
    plan = [key for key in plan if results.get(**key) is None]
    if not plan:
        return
    found = write(volumes(options), folder / "raw")
    print(f"{found['lesions']} lesions in {found['volumes']} volumes", flush=True)
    results.add({"part": "data", **shared}, found)
    base = ["--data.root", str(folder / "raw"), "--data.format", "nnunet", "--data.cache_dir", str(folder / "cache")]
    base += [*NETWORK, *(TINY if options.tiny else []), *QUIET, "--trainer.default_root_dir", str(folder)]
    base += ["--trainer.max_epochs", "-1", "--trainer.max_steps", str(options.steps), *overrides]
    base += ["--data.folds_file", str(dealt(base, folder)), "--data.fold", str(options.fold)]
    longest = 0.0
    for key in plan:
        if time.time() + longest > options.deadline:
            print(f"deadline: stopped before {key['arm']}, seed {key['seed']}; the same command goes on from here")
            return
        begin = time.time()
        run(key["arm"], key["seed"], base, results, key)
        longest = max(longest, time.time() - begin)
        print(table([results.rows[-1]], COLUMNS).splitlines()[-1], f"({time.time() - begin:.0f} s)", flush=True)


def main(args: list[str] | None = None) -> None:
    """Run what is missing and print the tables."""
    options, overrides = arguments(args)
    warnings.filterwarnings("ignore")
    results = Results(options.out)
    if options.take:
        take(results, options.take, ("part", "arm", "pair", "figure", "seed", "fold", *SETTING))
    else:
        with tempfile.TemporaryDirectory() as folder:
            measure(options, overrides, results, Path(folder))
    for row in (*over_seeds(results.rows), *comparisons(results.rows)):
        key = {k: row[k] for k in ("part", "arm", "pair", "figure", *SETTING) if k in row}
        results.add(key, {k: v for k, v in row.items() if k not in key})
    print(table([row for row in results.rows if "seed" in row], (*COLUMNS, *STRATA)))
    print(table([row for row in results.rows if row.get("part") == "mean"], ("arm", "runs", *COLUMNS[2:], *STRATA)))
    shown = ("pair", "figure", "difference", "low", "high", "p_holm", "verdict")
    print(table([row for row in results.rows if row.get("part") == "comparison"], shown))


if __name__ == "__main__":
    main()
