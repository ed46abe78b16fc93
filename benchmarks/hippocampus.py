"""Cross-validated Dice on small volumes at equal wall-clock time: ours beside MONAI's DynUNet with nnU-Net's recipe.

Ours is a profile as the command line builds it, trained to its end, its last average of the weights evaluated. The peer
then gets the seconds that ours took in the same fold with the same seed, start-up included: DynUNet with the same
filters, strides and kernels, MONAI's DeepSupervisionLoss around DiceCELoss, SGD with Nesterov momentum 0.99 from 0.01,
gradients clipped at norm 12, and a learning rate that falls to 0 over its time (power 0.9); its last weights are
evaluated by MONAI's sliding_window_inference. It gets our resident patches and our augmentation on the device, which
are faster than its own transforms, in its own loop without a Trainer: network, loss, optimizer and step are what
differs.

Nothing is validated, saved or drawn while training, so no held-out case takes part in a choice. Folds are dealt with
seed 0 and written once; a seed sets the first weights, the order and the augmentation. Dice is computed on the voxels
of the files by the same class, each case on its own, with a mean over the foreground classes. A training of a few
steps fills the compiler's cache before the clock starts (`cold start` rows), unless `--cold` is given; what a new
process has to do all the same is in the time.

    python benchmarks/hippocampus.py --root /data/msd_hippocampus --seeds 0 1 2
    python benchmarks/hippocampus.py --root ... -- --trainer.max_epochs 16      # a shorter schedule, for both
    python benchmarks/hippocampus.py --take a.json b.json                       # rows of several GPUs together
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Results, Row, table, take
from dsunet_peers import dynunet, mirrored, monai_loss, monai_windows, version
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lit_dsunet.__main__ import VolumeCLI
from lit_dsunet.augment import VolumeAugmentation, augment_batch
from lit_dsunet.data import VolumeData
from lit_dsunet.metrics import CaseDice
from lit_dsunet.models import default_features
from lit_dsunet.module import LitDSUNet
from lit_dsunet.preprocess import native_logits
from lit_dsunet.splits import write_folds
from lit_dsunet.statistics import compare

Figures = dict[str, dict[str, float]]  # by figure, then by case
OURS, PEER = "ours", "MONAI DynUNet"
MIRROR = [0, 1, 2]
EVERY = 20  # steps of the peer between two waits for the device, so that its host cannot run ahead of the clock
QUIET = [
    *("--trainer.callbacks", "null", "--trainer.logger", "false", "--trainer.enable_checkpointing", "false"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    *("--trainer.limit_val_batches", "0", "--trainer.num_sanity_val_steps", "0"),
    *("--plots.num_first", "0", "--plots.worst_k", "0"),
]
TINY = [
    *("--config", "demo", "--trainer.max_steps", "3", "--model.mkdc", "off", "--data.n_folds", "5"),
    *("--data.synthetic_train", "10", "--data.synthetic_test", "0", "--data.synthetic_size", "[16,16,16]"),
    *("--data.patch_size", "[16,16,16]", "--model.features", "[2,4,4]", "--trainer.max_epochs", "-1"),
]
COLUMNS = ("method", "fold", "seed", "tta", "dice", "train_s", "steps", "first_s", "eval_s", "fold_s", "peak_gb")


# ---- ours -----------------------------------------------------------------------------------------------------------


class BuildOnly(VolumeCLI):
    """The command line up to the point where it would run."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def build(arguments: Sequence[str]) -> BuildOnly:
    """Module, data and Trainer of a command line."""
    return BuildOnly(LitDSUNet, VolumeData, "lit_dsunet", ["fit", *arguments])


class Watch(Callback):
    """When the first step was done."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.first_s = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Wait for the device once."""
        if trainer.global_step == 1:
            self.first_s = wait() - self.begin


class PerCase(Callback):
    """Keeps what the test metrics know of each case."""

    def __init__(self) -> None:
        self.figures: Figures = {}
        self.means: dict[str, float] = {}
        self.seconds = 0.0

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the module resets its metrics."""
        cases = trainer.datamodule.cases("test")  # type: ignore[attr-defined]
        for metric in pl_module.metrics["test"].values():  # type: ignore[operator, union-attr]
            self.figures |= by_name(metric.per_case(), [case.name for case in cases])  # type: ignore[operator]
            self.means |= {k: float(v) for k, v in metric.compute().items()}  # type: ignore[operator]


def by_name(figures: Mapping[str, Tensor], names: Sequence[str]) -> Figures:
    """Figures of `per_case` by the names of the cases."""
    order = [names[int(i)] for i in figures["case"]]
    found = {name: [round(float(v), 5) for v in column] for name, column in figures.items() if name != "case"}
    return {name: dict(zip(order, column, strict=True)) for name, column in found.items()}


def wait() -> float:
    """The clock, once the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def clean() -> None:
    """Free what the last training left on the device and in the compiler."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak() -> Row:
    """Device memory since `clean`."""
    return {"peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)} if torch.cuda.is_available() else {}


def fit(arguments: Sequence[str]) -> tuple[BuildOnly, Row]:
    """Train as the command line would, and where the time went."""
    clean()
    begin = wait()
    watch = Watch()
    cli = build(arguments)
    cli.trainer.callbacks.append(watch)  # type: ignore[attr-defined]
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    seconds = wait() - begin
    row: Row = {"train_s": round(seconds, 2), "first_s": round(watch.first_s, 2), "steps": cli.trainer.global_step}
    network: Any = cli.model.net
    row |= {"params_m": round(sum(p.numel() for p in network.parameters()) / 1e6, 2)}
    return cli, row | peak()


def evaluate(cli: BuildOnly, mirror: bool, cases: PerCase | None = None) -> PerCase:
    """Figures of the held-out cases, whole volumes."""
    cases = cases or PerCase()
    cli.trainer.callbacks.append(cases)  # type: ignore[attr-defined]
    cli.model.hparams["tta"] = MIRROR if mirror else None
    cli.datamodule.hparams["test_split"] = "val"
    begin = wait()
    cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    cases.seconds = wait() - begin
    cli.trainer.callbacks.remove(cases)  # type: ignore[attr-defined]
    return cases


# ---- the peer -------------------------------------------------------------------------------------------------------


def train_peer(cli: BuildOnly, options: argparse.Namespace, seed: int, seconds: float) -> tuple[nn.Module, Row]:
    """DynUNet for so many seconds, at least three steps, on the data of a command line."""
    clean()
    begin = wait()
    h, data, device = cli.model.hparams, cli.datamodule, cli.trainer.strategy.root_device
    data.trainer = cli.trainer  # tells it the device
    data.setup("fit")
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = True
    strides = h["strides"] or [1, 2, 2, 2, 2, 2]
    features = h["features"] or default_features(len(strides))
    network = dynunet(data.in_channels, len(data.class_names), features, strides, h["kernels"]).to(device).train()
    compiles = options.peer_compile and device.type == "cuda"
    forward = torch.compile(network, dynamic=False) if compiles else network
    loss_of = monai_loss(batch_dice=True)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.99, nesterov=True, weight_decay=3e-5)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[options.peer_precision]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16 and device.type == "cuda")  # type: ignore[attr-defined]
    augment = None if data.hparams["augment"] is None else VolumeAugmentation(**data.hparams["augment"])
    spacing, loader = data.hparams["spacing"], data.train_dataloader()
    epoch = steps = 0
    first_s = 0.0
    while True:
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            share = (time.perf_counter() - begin) / max(seconds, 1e-9)
            if share >= 1 and steps >= 3:
                row: Row = {"train_s": round(wait() - begin, 2), "first_s": round(first_s, 2), "steps": steps}
                row |= {"params_m": round(sum(p.numel() for p in network.parameters()) / 1e6, 2), "compile": compiles}
                return network.eval(), row | peak()
            image, label = batch.image.to(device).float(), batch.label.to(device)
            if augment is not None:
                image, label = augment_batch(image, label, augment, int(batch.seed), spacing=spacing)
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * max(0.0, 1 - share) ** 0.9
            with torch.autocast(device.type, dtype):
                loss = loss_of(forward(image), label)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(network.parameters(), 12)
            scaler.step(optimizer)
            scaler.update()
            steps += 1
            if steps == 1 or steps % EVERY == 0:
                first_s = first_s or wait() - begin
                wait()
        epoch += 1


@torch.inference_mode()
def evaluate_peer(
    network: nn.Module, cli: BuildOnly, options: argparse.Namespace, mirror: bool
) -> tuple[Figures, float]:
    """Dice of the held-out cases by MONAI's sliding window, and the seconds that took."""
    begin = wait()
    data, device = cli.datamodule, cli.trainer.strategy.root_device
    cases, dtype = data.cases("val"), {"fp16": torch.float16, "bf16": torch.bfloat16}[options.peer_precision]
    forward = mirrored(network) if mirror else network
    metric = CaseDice(len(data.class_names), data.class_names)
    for i, case in enumerate(cases):
        image = torch.from_numpy(np.ascontiguousarray(case.image)).to(device).float()
        with torch.autocast(device.type, dtype):
            logits = monai_windows(forward, image, data.patch_size, 4)
        found = native_logits(logits.float(), case.native_shape).argmax(0).to(torch.uint8)
        assert case.native_label is not None
        truth = torch.from_numpy(np.ascontiguousarray(case.native_label)).to(device)
        metric.update(found, truth, case.geometry.spacing, i)
    figures = by_name(metric.per_case(), [case.name for case in cases])
    return figures, wait() - begin


# ---- rows -----------------------------------------------------------------------------------------------------------


def dealt(arguments: Sequence[str], folder: Path) -> Path:
    """The file with the folds, dealt with seed 0 over all training cases, which are preprocessed on the way."""
    data = build([*arguments, "--data.fold", "null", "--data.seed", "0"]).datamodule
    cases, samples = data.cases("train"), data.samples("train")
    path = folder / "folds.json"
    write_folds(path, data.folds(samples, cases), {"seed": 0})
    return path


def values(figures: Figures, kept: Iterable[str] = ("dice",)) -> Row:
    """Means over the cases, and the cases themselves for the figures to be kept; None where there is no value."""
    means = {name: mean(cases.values()) for name, cases in figures.items()}
    known = {name: {case: None if math.isnan(v) else v for case, v in figures[name].items()} for name in kept}
    return {**means, "per_case": known}


def mean(numbers: Iterable[float]) -> float | None:
    """Mean without NaN.

    >>> mean([1.0, float("nan"), 2.0]), mean([float("nan")])
    (1.5, None)
    """
    known = [n for n in numbers if not math.isnan(n)]
    return round(statistics.fmean(known), 5) if known else None


def run(options: argparse.Namespace, arguments: Sequence[str], results: Results, key: Row, seconds: float) -> float:
    """Train and evaluate one method on one fold with one seed; the seconds of its training."""
    begin = wait()
    if key["method"] == OURS:
        cli, row = fit(arguments)
        tested = {mirror: evaluate(cli, mirror) for mirror in (False, True)}
        found = {mirror: (cases.figures, cases.seconds) for mirror, cases in tested.items()}
        row |= {"precision": str(cli.trainer.precision), "compile": cli.model.hparams["compile"]}
    else:
        cli = build(arguments)
        network, row = train_peer(cli, options, key["seed"], seconds)
        found = {mirror: evaluate_peer(network, cli, options, mirror) for mirror in (False, True)}
        row |= {"precision": options.peer_precision, "peer": version("monai")}
    data = cli.datamodule
    row |= {"patch": list(data.patch_size), "batch": data.hparams["batch_size"], "cold": options.cold}
    cli.datamodule.teardown("fit")
    for mirror, (figures, eval_s) in found.items():
        timed = {"eval_s": round(eval_s, 2), "fold_s": round(row["train_s"] + eval_s, 2)}
        added = results.add({**key, "tta": mirror}, {**row, **timed, **values(figures)})
        print(table([added], COLUMNS).splitlines()[-1], f"({wait() - begin:.0f} s)", flush=True)
    return float(row["train_s"])


def warm_up(options: argparse.Namespace, arguments: Sequence[str], results: Results, methods: Sequence[str]) -> None:
    """Compile, capture and evaluate once without measuring Dice, and note how long the first step took."""
    short = [*arguments, *("--trainer.max_steps", "3", "--data.fold", "0")]
    for method in methods:
        if method == OURS:
            cli, row = fit(short)
            eval_s = sum(evaluate(cli, mirror).seconds for mirror in (False, True))
        else:
            cli = build(short)
            network, row = train_peer(cli, options, 0, 0.0)
            eval_s = sum(evaluate_peer(network, cli, options, mirror)[1] for mirror in (False, True))
        cli.datamodule.teardown("fit")
        print(f"cold start of {method}: {row['first_s']} s to the first step, {eval_s:.1f} s of evaluation", flush=True)
        results.add({"method": method, "part": "cold start"}, {**row, "eval_s": round(eval_s, 2)})


def summary(rows: Sequence[Row]) -> list[Row]:
    """Per profile, method and TTA the mean over cases and seeds; then the paired differences between the methods."""
    out: list[Row] = []
    for setting in dict.fromkeys((row["config"], row["overrides"], row["tta"]) for row in rows if "per_case" in row):
        key = dict(zip(("config", "overrides", "tta"), setting, strict=True))
        means: dict[str, dict[str, float]] = {}
        for method in (OURS, PEER):
            own = [row for row in rows if {**key, "method": method}.items() <= row.items() and "per_case" in row]
            if own:
                means[method] = pooled(own, "dice")
                out.append({"method": method, **key, **_means(own), "cases": len(means[method])})
        if len(means) == 2:
            both = sorted(means[OURS].keys() & means[PEER].keys())
            found = compare({"": [means[OURS][n] - means[PEER][n] for n in both]})[""]
            values = {"dice": found.mean, "low": found.low, "high": found.high, "p": found.p, "cases": found.cases}
            out.append({"method": f"{OURS} - {PEER}", **key, **values})
    return [{"part": "summary", **row} for row in out]


def _means(rows: Sequence[Row]) -> Row:
    """Dice, over all seeds and for each, and times of the runs of one method."""
    seeds = dict.fromkeys(row["seed"] for row in rows)
    each = [statistics.fmean(pooled([r for r in rows if r["seed"] == seed], "dice").values()) for seed in seeds]
    classes = [name for name in rows[0] if name.startswith("dice_")]
    row: Row = {"dice": round(statistics.fmean(each), 5), "seeds": [round(d, 5) for d in each], "runs": len(rows)}
    row |= {name: round(statistics.fmean(r[name] for r in rows), 5) for name in classes}
    times = {name: [r[name] for r in rows] for name in ("train_s", "eval_s", "fold_s", "steps")}
    return (
        row | {name: round(statistics.fmean(v), 2) for name, v in times.items()} | {"longest_s": max(times["fold_s"])}
    )


def pooled(rows: Sequence[Row], figure: str) -> dict[str, float]:
    """A figure of each case, mean over the seeds; cases without a value are left out."""
    seen: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row["per_case"][figure].items():
            if value is not None:
                seen.setdefault(name, []).append(value)
    return {name: statistics.fmean(found) for name, found in seen.items()}


def arguments(args: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The script's options and, behind `--`, overrides of the profile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder of the data set")
    parser.add_argument("--config", default="h200", help="profile (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", choices=[OURS, PEER], default=[OURS, PEER])
    parser.add_argument("--peer-precision", choices=["fp16", "bf16"], default="fp16", help="fp16 is nnU-Net's")
    parser.add_argument("--peer-compile", action=argparse.BooleanOptionalAction, default=True, help="nnU-Net does")
    parser.add_argument("--cold", action="store_true", help="let the clock see what is compiled")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/hippocampus.json"))
    parser.add_argument("--take", type=Path, nargs="+", default=[], help="add the rows of these files and stop")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="Unix time that no run should pass")
    parser.add_argument("--tiny", action="store_true", help="a dry run on a CPU")
    options, rest = parser.parse_known_args(args)
    if options.tiny:
        options.seeds, options.folds, options.config = [0], [0], "demo"
    if not options.root and not options.tiny and not options.take:
        parser.error("--root: expected the folder of the data set")
    return options, [a for a in rest if a != "--"]


def main(args: list[str] | None = None) -> None:
    """Run what is missing and print the tables."""
    options, overrides = arguments(args)
    warnings.filterwarnings("ignore")
    results = Results(options.out)
    keys = ("method", "part", "config", "overrides", "fold", "seed", "tta")
    if options.take:
        take(results, options.take, keys)
    else:
        with tempfile.TemporaryDirectory() as folder:
            measure(options, overrides, results, Path(folder))
    for row in summary(results.rows):
        key = {k: row[k] for k in ("part", "method", "config", "overrides", "tta")}
        results.add(key, {k: v for k, v in row.items() if k not in key})
    print(table([row for row in results.rows if "fold" in row], COLUMNS))
    shown = (
        "method",
        "config",
        "overrides",
        "tta",
        "dice",
        "low",
        "high",
        "p",
        "seeds",
        "cases",
        "fold_s",
        "longest_s",
    )
    print(table([row for row in results.rows if row.get("part") == "summary"], shown))


def measure(options: argparse.Namespace, overrides: list[str], results: Results, folder: Path) -> None:
    """All runs that are missing, the peer of a fold after ours."""
    base = TINY if options.tiny else ["--config", options.config, "--data.root", options.root]
    base = [*base, *QUIET, "--trainer.default_root_dir", str(folder), *overrides]
    plan = [(seed, fold, method) for seed in options.seeds for fold in options.folds for method in options.methods]
    fixed: Row = {"config": options.config, "overrides": " ".join(overrides)}
    plan = [p for p in plan if results.get(method=p[2], fold=p[1], seed=p[0], tta=True, **fixed) is None]
    if not plan:
        return
    base += ["--data.folds_file", str(dealt(base, folder))]
    if not options.cold:
        warm_up(options, base, results, options.methods)
    longest = 0.0
    for seed, fold, method in plan:
        if time.time() + longest > options.deadline:
            print(f"deadline: stopped before fold {fold}, seed {seed}; the same command goes on from here")
            return
        ours = results.get(method=OURS, fold=fold, seed=seed, tta=False, **fixed)
        if method == PEER and ours is None:
            continue  # its time is not known
        begin = time.time()
        extra = ["--data.fold", str(fold), "--data.seed", str(seed), "--seed_everything", str(seed)]
        key: Row = {"method": method, **fixed, "fold": fold, "seed": seed}
        run(options, [*base, *extra], results, key, ours["train_s"] if ours else 0.0)
        longest = max(longest, time.time() - begin)


if __name__ == "__main__":
    main()
