"""`lit-landmarks fit | validate | test | predict`, from a shell, a test or a notebook."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import ClassVar

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # before anything imports albumentations

from lit_cli.cli import LitCLI, run
from lit_landmarks.data import LandmarkData
from lit_landmarks.module import LitLandmarks
from lit_landmarks.plots import LandmarkPlots
from lit_landmarks.predict import PredictionWriter


class LandmarkCLI(LitCLI):
    """The shared command line with the groups `plots` and `predictions`."""

    groups: ClassVar = {"plots": LandmarkPlots, "predictions": PredictionWriter}


def main(args: Sequence[str] | None = None) -> LandmarkCLI:
    """Run the command line.

    Args:
        args: Arguments without the program's name; by default the process's.

    Returns:
        The finished command line: its `trainer`, `model` and `datamodule` can be used further.
    """
    return run(LitLandmarks, LandmarkData, "lit_landmarks", args, LandmarkCLI)


def console() -> None:
    """Entry point of the console script: what `main` returns would become its exit status."""
    main()


if __name__ == "__main__":
    main()
