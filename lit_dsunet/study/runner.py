"""One run of a study after the other: claim, train, evaluate, write the result."""

from __future__ import annotations

import gc
import math
import platform
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lit_callbacks import (
    BatchSizeFit,
    GracefulStop,
    MemoryAndThroughput,
    MilestoneGuard,
    PredictionLogger,
    ValidationSchedule,
)

from lit_cli.console import QUIET
from lit_dsunet.files import read_json, write_json
from lit_dsunet.study.claims import Claim
from lit_dsunet.study.plan import Run, Study, code_digest, quiet_lightning
from lit_dsunet.study.recorder import INITIAL, Recorder, patch_gflops

__all__ = ["execute", "newest_checkpoint", "remaining", "work"]

FINAL = "final.ckpt"

NORMAL = (  # remarks on what is meant to be so
    "Checkpoint directory .* exists and is not empty",
    "Be aware that when using `ckpt_path`, callbacks used to create",  # another --save_minutes
)

# They choose, end or draw by validations, of which there are none before the end, or measure what is measured here.
LEFT_OUT = (
    Checkpoint,
    EarlyStopping,
    MilestoneGuard,
    ValidationSchedule,
    BatchSizeFit,
    PredictionLogger,
    MemoryAndThroughput,
)


def remaining(study: Study, runs: Sequence[Run]) -> list[Run]:
    """Those without a result."""
    return [run for run in runs if not study.result(run).exists()]


def work(
    study: Study,
    runs: Sequence[Run],
    *,
    save_minutes: float = 2.0,
    stale_minutes: float = 10.0,
    say: Callable[[str], None] = print,
) -> list[Run]:
    """Do the runs that nobody else does, one after the other.

    Args:
        study: The study.
        runs: Which of its runs.
        save_minutes: Between two checkpoints; 0 writes one after every epoch.
        stale_minutes: After which the run of a machine that fell silent is taken over.
        say: Where progress goes, line by line.

    Returns:
        Those that are left: others are at work on them.
    """
    with _ends_on_sigterm():
        while True:
            done = 0
            for run in remaining(study, runs):
                claim = Claim(study.path(run) / "lock", stale_after=60 * stale_minutes)
                if not claim.acquire():
                    continue
                with claim:
                    if study.result(run).exists():  # finished by another while this one looked at the others
                        continue
                    left = len(remaining(study, runs))
                    say(f"{run.name}: {'goes on' if newest_checkpoint(study.path(run)) else 'starts'} ({left} left)")
                    try:
                        result = execute(study, run, claim, save_minutes)
                    except BaseException as error:
                        say(f"{run.name}: stopped ({type(error).__name__}); the same command goes on from here")
                        raise
                    figures = ", ".join(f"{k} {v:.4f}" for k, v in result["metrics"].items() if k == "dice")
                    say(f"{run.name}: {figures}, {result['cost']['seconds']:.0f} s")
                    done += 1
            if not done:
                return remaining(study, runs)


def execute(study: Study, run: Run, claim: Claim | None = None, save_minutes: float = 2.0) -> dict[str, Any]:
    """Train and evaluate one run, from its newest checkpoint if it has one.

    The weights that count are those of the last step (the average, under EMA); nothing is selected. The held-out cases
    are evaluated once, after training, whole and in full.

    Args:
        study: The study.
        run: One of its runs, claimed by this process.
        claim: The claim.
        save_minutes: Between two checkpoints; 0 writes one after every epoch.

    Returns:
        The content of its result.json, which is written last.
    """
    folder = study.path(run)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        result = _train_and_evaluate(study, run, claim, save_minutes)
        write_json(study.result(run), result)
    finally:
        _forget()
    for file in _checkpoints(folder):
        file.unlink(missing_ok=True)
    return result


def _train_and_evaluate(study: Study, run: Run, claim: Claim | None, save_minutes: float) -> dict[str, Any]:
    from lit_dsunet.data import VolumeData
    from lit_dsunet.module import LitDSUNet

    folder = study.path(run)
    alike = [study.path(other) for other in study.runs() if other.seed == run.seed and other != run]
    recorder = Recorder(folder, alike if study.arms.same_start else [], claim)
    arguments = study.arguments(run)
    checkpoint = newest_checkpoint(folder)
    if checkpoint is not None:
        arguments.append(f"--ckpt_path={checkpoint}")
    with quiet_lightning(), warnings.catch_warnings():
        for remark in (*QUIET, *NORMAL):
            warnings.filterwarnings("ignore", message=remark)
        command = _run_class(folder, recorder, save_minutes)
        cli = command(LitDSUNet, VolumeData, "lit_dsunet", arguments)
        trainer: Any = cli.trainer
        trainer.save_checkpoint(folder / FINAL, weights_only=True)
        began = time.perf_counter()
        trainer.limit_val_batches = 1.0
        # From the file, so that what is judged is what is kept.
        path = str(folder / FINAL)
        trainer.validate(cli.model, datamodule=cli.datamodule, ckpt_path=path, weights_only=True, verbose=False)
        return _result(study, run, cli, recorder, time.perf_counter() - began)


def _run_class(folder: Path, recorder: Recorder, save_minutes: float) -> Any:
    """The command line with the callbacks of a run in place of those that select."""
    from lit_dsunet.__main__ import VolumeCLI
    from lit_dsunet.predict import SegmentationWriter

    left_out = (*LEFT_OUT, SegmentationWriter)

    class RunCLI(VolumeCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            """The one that is used: the parsers of the others take a second of every run."""
            return {"fit": VolumeCLI.subcommands()["fit"]}

        def instantiate_trainer(self, **kwargs: Any) -> Any:
            config = self._get(self.config_init, "trainer")
            listed = config.get("callbacks") or []
            kept = [c for c in (listed if isinstance(listed, list) else [listed]) if not isinstance(c, left_out)]
            if config.get("logger") is False:
                kept = [c for c in kept if not isinstance(c, LearningRateMonitor)]
            if not any(isinstance(c, GracefulStop) for c in kept):
                # SIGUSR2 is what submitit announces the end of a job with.
                kept.append(GracefulStop(("SIGTERM", "SIGUSR1", "SIGUSR2"), str(folder), resume="the same command"))
            often: Any = (
                {"train_time_interval": timedelta(minutes=save_minutes)} if save_minutes else {"every_n_epochs": 1}
            )
            saver = ModelCheckpoint(
                folder,
                filename="last",
                enable_version_counter=False,
                save_on_exception=False,  # GracefulStop does
                save_on_train_epoch_end=True,  # by default it might wait for a validation, and there is none
                **often,
            )
            config["callbacks"] = [*kept, recorder, saver]
            trainer = super().instantiate_trainer(**kwargs)
            everything: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
            everything[:] = [c for c in everything if c is saver or not isinstance(c, left_out)]
            return trainer

        def after_fit(self) -> None:
            """No table after every run: the study ends in one."""

    return RunCLI


def _result(study: Study, run: Run, cli: Any, recorder: Recorder, seconds: float) -> dict[str, Any]:
    trainer, module, data = cli.trainer, cli.model, cli.datamodule
    samples = data.samples("val")
    table = {name: values for name, values in recorder.per_case.items() if name != "case"}
    index = [int(i) for i in recorder.per_case["case"]]
    if index != list(range(len(samples))):
        raise AssertionError(f"{run.name}: figures of cases {index}, expected all {len(samples)} of the fold")
    metrics = {k.removeprefix("val/"): float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
    patch = tuple(module.hparams["patch_size"])[-module.dims :]
    device = module.device
    return {
        "arm": run.arm,
        "fold": run.fold,
        "seed": run.seed,
        "cases": {
            "name": [s.name for s in samples],
            "patient": [s.patient for s in samples],
            **{name: [_number(v) for v in values] for name, values in table.items()},
        },
        "metrics": {name: _number(value) for name, value in metrics.items()},
        "steps": trainer.global_step,
        "samples": recorder.samples,
        "order": recorder.order,
        "initial": read_json(study.path(run) / INITIAL),
        "cost": {
            **recorder.cost(),
            "evaluation_seconds": seconds,
            "parameters": sum(p.numel() for p in module.net.parameters() if p.requires_grad),
            "gflops": patch_gflops(module.net, module.hparams["in_channels"], patch),
        },
        "code": code_digest(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "trained_on": device.type,
        "host": platform.node(),
    }


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that a run goes on from."""
    files = [(f.stat().st_mtime_ns, f) for f in _checkpoints(folder)]
    return max(files)[1] if files else None


def _checkpoints(folder: Path) -> list[Path]:
    return [f for f in folder.glob("*.ckpt") if f.name != FINAL]


def _number(value: float) -> float | None:
    """NaN is no json."""
    return None if math.isnan(value) else value


def _forget() -> None:
    """Leave nothing of a run to the next one in this process."""
    if "torch._dynamo" in sys.modules:  # otherwise nothing was compiled, and the import takes seconds
        torch.compiler.reset()  # the networks of several arms would share one limit of compilations
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _ends_on_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the stack between two fits too, so that locks are given back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(signum: int, _: Any) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
