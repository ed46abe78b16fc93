"""The LightningCLI that all tasks share.

What it adds to Lightning's own: an `ema:` group, `--matmul_precision`, profiles by name, a command line that wins over
what a checkpoint stores, a closing table, and errors of one line.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, TypeVar

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lit_callbacks import EMA
from lit_callbacks.graceful import GracefulStop
from rich.console import Console
from rich.table import Table

from lit_cli.console import one_line
from lit_cli.errors import InputError
from lit_cli.profiles import expand_profiles

CLI = TypeVar("CLI", bound="LitCLI")

REFRESH_EVERY = 20  # batches; each refresh of the progress bar reads the loss and so waits for the device


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise `InputError` with the message on one line."""
        raise InputError(" ".join(str(message).split())) from ex


class LitCLI(LightningCLI):
    """Command line of one task: one concrete module and one concrete data module.

    Args:
        model_class: The task's LightningModule.
        datamodule_class: The task's LightningDataModule. Its `checkpoint_fields` names the arguments that validate,
            test and predict take from a checkpoint.
        package: Import name of the task, for profiles by name and the log folder.
        args: Command line without the program's name; by default the process's.
        build_only: Make module, data and Trainer, but do not run them.
    """

    #: The task's own callbacks by the group that holds their options, so that two config files can each set one key.
    groups: ClassVar[Mapping[str, type[Callback]]] = {}

    def __init__(
        self,
        model_class: type[LightningModule],
        datamodule_class: type[LightningDataModule],
        package: str,
        args: Sequence[str] | None = None,
        *,
        build_only: bool = False,
    ) -> None:
        self.package, self.build_only = package, build_only
        self.given = expand_profiles(package, list(sys.argv[1:] if args is None else args))
        super().__init__(
            model_class,
            datamodule_class,
            args=self.given,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"default_root_dir": str(log_folder(package, self.given))},
            seed_everything_default=0,
            parser_class=OneLineParser,
        )

    # ---- arguments -------------------------------------------------------------------------------------------------

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The groups that every task has, and its own."""
        parser.add_lightning_class_args(EMA, "ema")
        parser.add_argument(
            "--matmul_precision",
            type=Literal["highest", "high", "medium"],
            default="high",
            help="float32 products: highest is exact, high uses TF32.",
        )
        for name, callback in self.groups.items():
            parser.add_lightning_class_args(callback, name)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse without Lightning's remark on arguments given beside the command line."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Decide what a checkpoint's stored arguments mean.

        In `fit` nothing: the command line describes the run, the checkpoint its state. In validate, test and predict
        the stored model (and the data's `checkpoint_fields`) replace config files, and what was typed replaces both.
        Lightning calls this private method between parsing and building; a test notices if it stops doing so.
        """
        subcommand = self.config.get("subcommand")
        if subcommand is None:
            return
        path = self.config[subcommand].get("ckpt_path")
        if not path:
            return
        if path in ("best", "last"):
            path = str(find_checkpoint(path, Path(self.config[subcommand]["trainer"]["default_root_dir"] or ".")))
            self.config[subcommand]["ckpt_path"] = path
            rank_zero_info(f"checkpoint: {path}")
        if path not in ("hpc", "registry") and "://" not in str(path) and not Path(path).is_file():
            raise InputError(f"--ckpt_path {path}: no such file")
        if not Path(path).is_file():
            return
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            raise InputError(f"--ckpt_path {path}: not a checkpoint ({str(error).splitlines()[0]:.100})") from error
        if not isinstance(content, dict) or "pytorch-lightning_version" not in content:
            raise InputError(f"--ckpt_path {path}: a file of weights, but not a checkpoint of Lightning")
        if subcommand == "fit":
            return
        stored: dict[str, dict[str, Any]] = {}
        for key, group, only in (
            ("hyper_parameters", "model", None),
            ("datamodule_hyper_parameters", "data", getattr(self._datamodule_class, "checkpoint_fields", ())),
        ):
            values = {k: v for k, v in content.get(key, {}).items() if not k.startswith("_")}
            stored[group] = values if only is None else {k: v for k, v in values.items() if k in only}
        self.config = self.parser.parse_object({subcommand: stored}, self.config)
        typed = typed_options(self.given, ("model", "data"))
        if typed:
            self.config = self.parser.parse_object({subcommand: self._parse_typed(subcommand, typed)}, self.config)

    def _parse_typed(self, subcommand: str, typed: list[str]) -> dict[str, Any]:
        parsed: Namespace = self._subcommand_parsers[subcommand].parse_args(typed, defaults=False)
        return {k: v for k, v in parsed.as_dict().items() if k in ("model", "data")}

    # ---- building and running --------------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        """Set what must hold before anything is built."""
        precision = self._get(self.config, "matmul_precision")
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
            # cuDNN's convolutions have a switch of their own.
            torch.backends.cudnn.allow_tf32 = precision != "highest"

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add what every run has, unless the user chose one.

        A progress bar that does not wait for the device at every batch, and the graceful end of an interrupted fit.
        """
        config = self._get(self.config_init, "trainer", default={})
        callbacks = config.get("callbacks") or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        if config.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(TQDMProgressBar(refresh_rate=REFRESH_EVERY))
        if not any(isinstance(c, GracefulStop) for c in callbacks):
            callbacks.append(GracefulStop(resume="--ckpt_path {path}"))
        kwargs["callbacks"] = callbacks
        return super().instantiate_trainer(**kwargs)

    def _run_subcommand(self, subcommand: str) -> None:
        if not self.build_only:
            super()._run_subcommand(subcommand)

    def after_fit(self) -> None:
        """Print the last validation's figures and what the run left on disk."""
        if self.trainer.interrupted:
            return
        bring_last_up_to_date(self.trainer)
        print_summary(self.trainer, title=f"{self.package} fit, after {self.trainer.current_epoch} epochs")


def bring_last_up_to_date(trainer: Trainer) -> None:
    """Write `last.ckpt` anew where Lightning's is older than the end of the training.

    With a monitored metric `ModelCheckpoint(save_last=True)` writes it only along with one of the best.
    """
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint) or callback.save_last is not True or not callback.last_model_path:
            continue
        if callback._last_global_step_saved < trainer.global_step:
            trainer.save_checkpoint(callback.last_model_path, callback.save_weights_only)  # on all processes


@rank_zero_only
def print_summary(trainer: Trainer, title: str) -> None:
    """Print every metric with a stage prefix, the checkpoints and the files in the callbacks' `artifacts`."""
    console = Console(soft_wrap=True)
    table = Table("metric", "value", title=title)
    for name, value in sorted(trainer.callback_metrics.items()):
        if "/" in name:
            table.add_row(name, f"{float(value):.4g}")
    if table.row_count:
        console.print(table)
    for word, path in written_checkpoints(trainer).items():
        console.print(f"{word} checkpoint: {path}")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for path in getattr(callback, "artifacts", ()):
            console.print(f"{Path(path).parent.name}: {path}")


def written_checkpoints(trainer: Trainer) -> dict[str, str]:
    """The `best` and the `last` checkpoint that the callbacks of a fit have left, as far as there are any."""
    best: list[str] = []
    last: list[str] = []
    for callback in trainer.checkpoint_callbacks:
        # A callback without a metric keeps its newest file under the name of the best.
        (best if getattr(callback, "monitor", None) else last).append(getattr(callback, "best_model_path", ""))
        last.append(getattr(callback, "last_model_path", ""))
    best, last = ([path for path in paths if path and Path(path).exists()] for paths in (best, last))
    newest = sorted(last, key=lambda path: Path(path).stat().st_mtime)[-1:]
    return {word: paths[0] for word, paths in (("best", best), ("last", newest)) if paths}


def log_folder(package: str, args: Sequence[str]) -> Path:
    """Where a run logs by default: `logs/<task>/<name of the last config file>`, so that each profile has its own runs.

    Example:
        >>> log_folder("lit_landmarks", ["fit", "--config", "configs/landmarks/demo.yaml"]).as_posix()
        'logs/landmarks/demo'
    """
    folder = Path("logs", package.removeprefix("lit_"))
    names = [b for a, b in pairwise(args) if a in ("--config", "-c")]
    names += [a.removeprefix("--config=") for a in args if a.startswith("--config=")]
    return folder / Path(names[-1]).stem if names else folder


def find_checkpoint(word: str, folder: Path) -> Path:
    """The `best` or `last` checkpoint of the newest run below a log folder.

    Lightning resolves these words in the process that trained only; in a new one it fails, or starts from scratch.

    Raises:
        InputError: there is none.
    """
    files = sorted(folder.rglob("*.ckpt"), key=lambda f: f.stat().st_mtime, reverse=True)
    if not files:
        raise InputError(
            f"--ckpt_path {word}: no checkpoint below {folder}; expected a path, or --trainer.default_root_dir"
        )
    if word == "last":
        return files[0]
    try:
        callbacks = torch.load(files[0], map_location="cpu", weights_only=True).get("callbacks", {})
    except Exception as error:
        raise InputError(f"--ckpt_path best: {files[0]} is not a checkpoint ({error!s:.80})") from error
    states = [s for s in callbacks.values() if isinstance(s, dict) and "best_model_path" in s]
    # A callback without a metric keeps its newest file under this name.
    for state in [s for s in states if s.get("monitor")] or states:
        best = state["best_model_path"]
        for candidate in (Path(best), files[0].parent / Path(best).name) if best else ():
            if candidate.is_file():
                return candidate
    raise InputError(f"--ckpt_path best: {files[0]} names no best checkpoint; give a path")


def typed_options(args: Sequence[str], groups: Sequence[str]) -> list[str]:
    """The `--group.name value` and `--group.name=value` parts of a command line.

    Example:
        >>> typed_options(["test", "--model.tta", "[flip]", "--trainer.devices=2", "--data.fold=1"], ("model", "data"))
        ['--model.tta', '[flip]', '--data.fold=1']
    """
    out: list[str] = []
    taking = False
    for arg in args:
        if arg.startswith("--"):
            taking = any(arg.startswith(f"--{group}.") for group in groups)
        if taking:
            out.append(arg)
            if arg.startswith("--") and "=" in arg:
                taking = False
    return out


def run(
    model_class: type[LightningModule],
    datamodule_class: type[LightningDataModule],
    package: str,
    args: Sequence[str] | None,
    cli_class: type[CLI],
) -> CLI:
    """Run a task's command line; errors that are the user's to mend end it with one line and status 2.

    `LIT_TRACEBACK=1` shows the traceback as well. A signal ends it with 128 + its number, after `GracefulStop`'s line.
    """
    return one_line(package, lambda: cli_class(model_class, datamodule_class, package, args))


__all__ = ["LitCLI", "OneLineParser", "print_summary", "run", "typed_options"]
