"""`lit-patchnerf fit | validate | test | predict | query | compress | decode | export`, from a shell or a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from lightning.pytorch.cli import LightningArgumentParser
from lit_callbacks import PredictionLogger

from lit_cli.cli import LitCLI, run
from lit_cli.console import dispatch
from lit_patchnerf.console import command
from lit_patchnerf.data import PatchVideoData
from lit_patchnerf.module import LitPatchNeRF
from lit_patchnerf.predict import FrameWriter
from lit_patchnerf.rollback import RollBack


class VideoCLI(LitCLI):
    """The shared command line with the groups `plots`, `predictions` and `rollback`."""

    groups: ClassVar = {"plots": PredictionLogger, "predictions": FrameWriter, "rollback": RollBack}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """A collapse is one of the pixels: the whole loss rises where the embeddings' part is switched on."""
        super().add_arguments_to_parser(parser)
        parser.set_defaults({"rollback.key": "pixels"})


def main(args: Sequence[str] | None = None) -> VideoCLI:
    """Run the command line.

    Args:
        args: Arguments without the program's name; by default the process's.

    Returns:
        The finished command line: its `trainer`, `model` and `datamodule` can be used further.
    """
    return run(LitPatchNeRF, PatchVideoData, "lit_patchnerf", args, VideoCLI)


if __name__ == "__main__":
    dispatch("lit_patchnerf", main, command)
