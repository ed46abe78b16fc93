"""`lit-dsunet fit | validate | test | predict | plan | study | sweep-batch`, from a shell, a test or a notebook."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import ClassVar

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # before anything imports albumentations

from lit_callbacks import PredictionLogger

from lit_cli.cli import LitCLI, run
from lit_cli.console import dispatch
from lit_dsunet.data import VolumeData
from lit_dsunet.module import LitDSUNet
from lit_dsunet.predict import SegmentationWriter


class VolumeCLI(LitCLI):
    """The shared command line with the groups `plots` and `predictions`."""

    groups: ClassVar = {"plots": PredictionLogger, "predictions": SegmentationWriter}


def main(args: Sequence[str] | None = None) -> VolumeCLI:
    """Run the command line.

    Args:
        args: Arguments without the program's name; by default the process's.

    Returns:
        The finished command line: its `trainer`, `model` and `datamodule` can be used further.
    """
    return run(LitDSUNet, VolumeData, "lit_dsunet", args, VolumeCLI)


def console() -> None:
    """Entry point of the console script: the Trainer's subcommands, and those that train nothing themselves."""
    dispatch("lit_dsunet", main, _command)


def _command(word: str) -> Callable[[list[str]], object] | None:
    """What a first word stands for, unless it is one of the Trainer's."""
    if word == "plan":
        from lit_dsunet.plan import plan_main

        return plan_main
    if word in ("study", "sweep-batch"):
        from lit_dsunet.study import study_main, sweep_main

        return study_main if word == "study" else sweep_main
    return None


if __name__ == "__main__":
    console()
