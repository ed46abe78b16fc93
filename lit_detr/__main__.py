"""`lit-detr fit | validate | test | predict`, from a shell, a test or a notebook."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import ClassVar

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # before anything imports albumentations

from lit_callbacks import PredictionLogger

from lit_cli.cli import LitCLI, run
from lit_detr.data import DetectionData
from lit_detr.module import LitDETR
from lit_detr.predict import DetectionWriter


class DetectionCLI(LitCLI):
    """The shared command line with the groups `plots` and `predictions`."""

    groups: ClassVar = {"plots": PredictionLogger, "predictions": DetectionWriter}


def main(args: Sequence[str] | None = None) -> DetectionCLI:
    """Run the command line.

    Args:
        args: Arguments without the program's name; by default the process's.

    Returns:
        The finished command line: its `trainer`, `model` and `datamodule` can be used further.
    """
    return run(LitDETR, DetectionData, "lit_detr", args, DetectionCLI)


def console() -> None:
    """Entry point of the console script."""
    main()  # its value would become the exit status


if __name__ == "__main__":
    console()
