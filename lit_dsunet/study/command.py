"""`lit-dsunet study` and `lit-dsunet sweep-batch`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from lit_cli.arguments import CommandParser
from lit_cli.errors import InputError
from lit_dsunet.files import read_json
from lit_dsunet.study.arms import Arms, LrRule, batch_arms, guide_arms, read_arms, steps_of_an_epoch
from lit_dsunet.study.launch import Launcher, launch
from lit_dsunet.study.plan import Run, Study, new_study, open_study, write_splits
from lit_dsunet.study.report import make_report
from lit_dsunet.study.runner import remaining

__all__ = ["study_main", "sweep_main"]

MakeArms = Callable[[argparse.Namespace, dict[str, Any], Study], Arms]


def study_main(args: Sequence[str]) -> dict[str, Any] | None:
    """Train and compare arms over folds: by default baseline, MKDC, deep supervision, and both.

    Args:
        args: What follows `lit-dsunet study`. What this command does not know goes to `fit`.

    Returns:
        The report; None while runs are left.

    Raises:
        InputError: With one line, for what the user has to mend.
    """
    parser = _parser("study", "Train and compare arms over folds.")
    parser.add_argument("--arms", nargs="+", help="some of the arms; default: all")
    parser.add_argument("--arms_file", help="YAML with arms of your own, in place of baseline, mkdc, ds and mkdc_ds")

    def arms(options: argparse.Namespace, config: dict[str, Any], study: Study) -> Arms:
        found = guide_arms(config) if options.arms_file is None else read_arms(options.arms_file)
        return found if options.arms is None else found.only(options.arms)

    return _main(parser, args, arms)


def sweep_main(args: Sequence[str]) -> dict[str, Any] | None:
    """Train and compare batch sizes at equal numbers of optimizer steps.

    Args:
        args: What follows `lit-dsunet sweep-batch`. What this command does not know goes to `fit`.

    Returns:
        The report; None while runs are left.

    Raises:
        InputError: With one line, for what the user has to mend.
    """
    parser = _parser("sweep-batch", "Train and compare batch sizes at equal numbers of optimizer steps.")
    parser.add_argument("--batches", nargs="+", type=int, default=[2, 4, 8, 16, 32], help="patches per step")
    parser.add_argument(
        "--lr_rule", nargs="+", choices=get_args(LrRule), default=["linear"], help="how the rate follows the batch"
    )

    def arms(options: argparse.Namespace, config: dict[str, Any], study: Study) -> Arms:
        fewest = min(len(fold["train"]) for fold in read_json(study.splits))
        steps = steps_of_an_epoch(config, fewest)
        return batch_arms(config, options.batches, list(dict.fromkeys(options.lr_rule)), steps)

    return _main(parser, args, arms)


def _parser(word: str, text: str) -> CommandParser:
    parser = CommandParser(
        f"lit-dsunet {word}",
        description=f"{text} What follows beside these options goes to `fit`, such as --trainer.max_epochs 50.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", "-c", action="append", default=[], help="profile; not needed to go on")
    parser.add_argument("--out", required=True, type=Path, help="folder of the study; machines may share it")
    parser.add_argument("--folds", nargs="+", type=int, help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0")
    parser.add_argument("--launcher", choices=get_args(Launcher), default="inline", help="default: inline")
    parser.add_argument("--gpus", type=int, help="processes of --launcher local, jobs of slurm")
    parser.add_argument(
        "--launch", nargs="+", default=[], metavar="KEY=VALUE", help="parameters of submitit's executor"
    )
    parser.add_argument("--save_minutes", type=float, default=2.0, help="between checkpoints; 0: every epoch")
    parser.add_argument("--stale_minutes", type=float, default=10.0, help="of silence before a run is taken over")
    parser.add_argument("--smallest", type=float, default=0.5, help="smallest effect on Dice that matters, points")
    parser.add_argument("--draws", type=int, default=10_000, help="resamples of the patients")
    parser.add_argument("--accept_code", action="store_true", help="go on although the code has changed")
    parser.add_argument("--report_only", action="store_true", help="report on what is there")
    return parser


def _main(parser: CommandParser, args: Sequence[str], make_arms: MakeArms) -> dict[str, Any] | None:
    own, overrides = split_options(parser, args)
    options = parser.parse_args(own)
    if options.report_only:
        study = Study.load(options.out)
    else:
        study, runs = _prepare(options, overrides, make_arms)
        _say_plan(study, runs)
        report = {"smallest": options.smallest, "draws": options.draws, "title": options.out.resolve().name}
        ended = launch(
            study,
            runs,
            options.launcher,
            options.gpus,
            _parameters(options.launch),
            {"save_minutes": options.save_minutes, "stale_minutes": options.stale_minutes},
            report,
        )
        if not ended:
            return None
        left = remaining(study, study.runs())
        if left:
            print(f"{len(left)} of {len(study.runs())} runs are left, such as {left[0].name}; the same command goes on")
            return None
    report = make_report(study, options.smallest, options.draws, options.out.resolve().name)
    print("\n".join(["", *report["notes"], *report["sentences"], "", f"report: {study.folder / 'report.md'}"]))
    return report


def _prepare(options: argparse.Namespace, overrides: Sequence[str], make_arms: MakeArms) -> tuple[Study, list[Run]]:
    """The study and those of its runs that this call is about."""
    out: Path = options.out
    profiles = list(options.config)
    before = Study.load(out) if (out / "study.json").exists() else None
    if before is not None and not profiles:
        profiles = [str(out / name) for name in before.profiles]
        overrides = [*before.overrides, *overrides]
    if not profiles:
        raise InputError("--config: name a profile, such as --config configs/dsunet/demo.yaml")
    study, config = new_study(out, profiles, overrides)
    sizes = write_splits(study, config)
    if before is not None and not options.config and not vars(options).get("arms_file"):
        arms = before.arms if vars(options).get("arms") is None else before.arms.only(options.arms)
    else:
        arms = make_arms(options, config, study)
    for fold in options.folds or ():
        if not 0 <= fold < len(sizes):
            raise InputError(f"--folds {fold}: expected 0 to {len(sizes) - 1}")
    folds = options.folds if options.folds is not None else before.folds if before else range(len(sizes))
    seeds = options.seeds if options.seeds is not None else before.seeds if before else [0]
    if any(seed < 0 for seed in seeds):
        raise InputError(f"--seeds: expected numbers from 0, got {list(seeds)}")
    asked = replace(study, arms=arms, folds=sorted({*folds}), seeds=sorted({*seeds}))
    return open_study(asked, options.accept_code), asked.runs()


def _say_plan(study: Study, runs: Sequence[Run]) -> None:
    done = len(runs) - len(remaining(study, runs))
    arms, folds, seeds = ({getattr(run, key) for run in runs} for key in ("arm", "fold", "seed"))
    print(
        f"{study.folder}: {len(arms)} arms x {len(folds)} folds x {len(seeds)} seeds, {done} of {len(runs)} runs done"
    )


def split_options(parser: argparse.ArgumentParser, args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options that a parser knows, and the rest, each with the values that follow it.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> _ = parser.add_argument("--folds", nargs="+")
        >>> split_options(parser, ["--folds", "0", "1", "--data.root", "/data", "--model.lr=-1"])
        (['--folds', '0', '1'], ['--data.root', '/data', '--model.lr=-1'])
    """
    known = {name for action in parser._actions for name in action.option_strings}
    own: list[str] = []
    rest: list[str] = []
    target = own
    for arg in args:
        if arg.startswith("--") or arg in known:
            target = own if arg.split("=")[0] in known else rest
        target.append(arg)
    return own, rest


def _parameters(words: Sequence[str]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for word in words:
        key, sign, value = word.partition("=")
        if not sign or not key:
            raise InputError(f"--launch {word}: expected key=value, such as timeout_min=240")
        out[key] = _number(value)
    return out


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)
