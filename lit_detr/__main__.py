"""`lit-detr fit | validate | test | predict | export`, from a shell, a test or a notebook."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, ClassVar

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # before anything imports albumentations

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lit_callbacks import PredictionLogger

from lit_cli.cli import LitCLI, run
from lit_cli.console import dispatch
from lit_cli.errors import InputError
from lit_detr.data import DetectionData
from lit_detr.module import LitDETR
from lit_detr.predict import DetectionWriter

MLFLOW = ("mlflow", "sqlalchemy", "alembic")  # the last two where it writes into a database itself
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


class DetectionCLI(LitCLI):
    """The shared command line with the groups `plots` and `predictions`."""

    groups: ClassVar = {"plots": PredictionLogger, "predictions": DetectionWriter}

    def before_instantiate_classes(self) -> None:
        """Refuse a logger whose package is missing, which would otherwise end in a page about types."""
        super().before_instantiate_classes()
        loggers = self._get(self.config, "trainer.logger")
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            if isinstance(logger, Namespace) and str(logger.get("class_path")).endswith("MLFlowLogger"):
                address = str(logger.get("init_args.tracking_uri"))
                needed = MLFLOW if address.startswith(DATABASES) else MLFLOW[:1]
                missing = [name for name in needed if find_spec(name) is None]
                if missing:
                    raise InputError(
                        f"trainer.logger: MLFlowLogger needs {' and '.join(missing)}, not installed here: "
                        "pip install 'lit-vision-tasks[mlflow]'"
                    )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Put TensorBoard before loggers that have no folder: checkpoints, config and pictures go into its one."""
        trainer = super().instantiate_trainer(**kwargs)
        if trainer.loggers and not isinstance(trainer.loggers[0], CSVLogger | TensorBoardLogger):
            trainer.loggers = [TensorBoardLogger(trainer.default_root_dir), *trainer.loggers]
        return trainer


def main(args: Sequence[str] | None = None) -> DetectionCLI:
    """Run the command line.

    Args:
        args: Arguments without the program's name; by default the process's.

    Returns:
        The finished command line: its `trainer`, `model` and `datamodule` can be used further.
    """
    return run(LitDETR, DetectionData, "lit_detr", args, DetectionCLI)


def console() -> None:
    """Entry point of the console script: the Trainer's subcommands, and `export`."""
    dispatch("lit_detr", main, _command)


def _command(word: str) -> Callable[[list[str]], object] | None:
    if word == "export":
        from lit_detr.export import export_main

        return export_main
    return None


if __name__ == "__main__":
    console()
