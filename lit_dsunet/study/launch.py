"""Who does the runs: this process, one process per GPU, or SLURM jobs, the latter two through submitit."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lit_callbacks.graceful import GracefulExit

from lit_cli.errors import InputError
from lit_dsunet.study.plan import Run, Study
from lit_dsunet.study.report import make_report
from lit_dsunet.study.runner import remaining, work

__all__ = ["Launcher", "Worker", "launch"]

Launcher = Literal["inline", "local", "slurm"]

WEEK = 7 * 24 * 60  # minutes
POLL = 2.0  # seconds


@dataclass
class Worker:
    """Does what is left of a study; whoever finishes the last run writes the report.

    Plain values only: it is pickled, and unpickled in another process or on another machine.

    Attributes:
        folder: Of the study.
        runs: (seed, fold, arm) of the runs in question.
        overrides: Options beside the profile, which may name another data folder than the study began with.
        device: What CUDA_VISIBLE_DEVICES is set to; None leaves it.
        options: Of `work`.
        report: Options of `make_report`.
    """

    folder: str
    runs: list[tuple[int, int, str]]
    overrides: list[str]
    device: str | None = None
    options: dict[str, float] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> int:
        """Number of runs that are left."""
        if self.device is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.device  # before anything has asked for a GPU
        study = Study.load(self.folder)
        study.overrides = self.overrides
        try:
            left = work(study, [Run(*run) for run in self.runs], **self.options)  # type: ignore[arg-type]
        except GracefulExit as stop:
            # The end of a job that submitit had announced: the state is saved, now it may queue the job again.
            if hasattr(signal, "SIGUSR2") and stop.signum == signal.SIGUSR2:
                signal.raise_signal(signal.SIGUSR2)
            raise
        if not remaining(study, study.runs()):
            make_report(study, **self.report)
        return len(left)

    def checkpoint(self) -> Any:
        """What submitit queues again: the same, as every run knows where it stands."""
        return _submitit().helpers.DelayedSubmission(self)


def launch(
    study: Study,
    runs: Sequence[Run],
    launcher: Launcher = "inline",
    gpus: int | None = None,
    parameters: dict[str, Any] | None = None,
    options: dict[str, float] | None = None,
    report: dict[str, Any] | None = None,
) -> bool:
    """Have the runs done.

    Args:
        study: The study.
        runs: Which of its runs.
        launcher: `inline`, one after the other in this process; `local`, one process per GPU; `slurm`, one job per GPU.
        gpus: Number of processes or jobs; by default that of the GPUs here, for SLURM one.
        parameters: Of submitit's executor, such as `{"timeout_min": 240, "slurm_partition": "gpu"}`.
        options: Of `work`.
        report: Options of `make_report`.

    Returns:
        Whether they have ended: not so for SLURM jobs, which are only submitted.

    Raises:
        InputError: submitit is missing, or refuses the parameters.
    """
    worker = Worker(
        str(study.folder.resolve()),
        [(run.seed, run.fold, run.arm) for run in runs],
        study.overrides,
        options=options or {},
        report=report or {},
    )
    if launcher == "inline":
        if gpus not in (None, 1) or parameters:
            raise InputError("--gpus and --launch: expected --launcher local or slurm with them, got inline")
        work(study, runs, **worker.options)  # type: ignore[arg-type]
        return True
    left = remaining(study, runs)
    if not left:
        return True
    if launcher == "local":
        _wait(_start_local(study.folder, worker, gpus, len(left), parameters or {}))
        return True
    _start_slurm(study.folder, worker, gpus or 1, parameters or {})
    return False


def _start_local(folder: Path, worker: Worker, gpus: int | None, most: int, parameters: dict[str, Any]) -> list[Any]:
    devices = _visible_devices()
    count = len(devices) if gpus is None else gpus
    if count < 1:
        raise InputError("--gpus: no GPU is visible here, expected the number of processes")
    if devices and count > len(devices):
        raise InputError(f"--gpus {count}: only {len(devices)} are visible here")
    executor = _submitit().LocalExecutor(folder=str(folder / "jobs"))
    # submitit writes numbers of its own choice into CUDA_VISIBLE_DEVICES; the worker knows better.
    _update(executor, {"timeout_min": WEEK, **parameters})
    jobs = []
    for i in range(min(count, most)):
        worker.device = devices[i] if devices else ""
        jobs.append(executor.submit(worker))
        print(f"process {jobs[-1].job_id}: GPU {worker.device or 'none'}, output in {folder / 'jobs'}")
    return jobs


def _start_slurm(folder: Path, worker: Worker, count: int, parameters: dict[str, Any]) -> None:
    executor = _submitit().AutoExecutor(folder=str(folder / "jobs"), cluster="slurm")
    defaults = {"name": folder.resolve().name, "gpus_per_node": 1, "tasks_per_node": 1, "nodes": 1, "timeout_min": 240}
    _update(executor, {**defaults, **parameters})
    try:
        jobs = [executor.submit(worker) for _ in range(count)]
    except (OSError, RuntimeError) as error:
        raise InputError(f"--launcher slurm: {' '.join(str(error).split()):.200}") from error
    ids = ", ".join(str(job.job_id) for job in jobs)
    print(f"submitted {ids}; output in {folder / 'jobs'}; the last run to end writes {folder / 'report.md'}")


def _wait(jobs: Sequence[Any]) -> None:
    """Until all processes have ended; if this one is told to stop, so are they, and they save their state."""

    def end(signum: int, _: Any) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, end)
    try:
        while not all(job.done() for job in jobs):
            time.sleep(POLL)
    except (KeyboardInterrupt, SystemExit):
        for job in jobs:
            if not job.done():
                with contextlib.suppress(OSError, ValueError):
                    os.kill(int(job.job_id), signal.SIGTERM)
        until = time.monotonic() + 60
        while not all(job.done() for job in jobs) and time.monotonic() < until:
            time.sleep(POLL)
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
    for job in jobs:
        error = job.exception()
        if error is not None:
            last = [line for line in str(error).splitlines() if line.strip()]
            print(f"process {job.job_id} failed: {last[-1] if last else type(error).__name__}; see {job.paths.stderr}")


def _visible_devices() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be set to for each GPU here."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() and name.strip() != "-1"]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def _update(executor: Any, parameters: dict[str, Any]) -> None:
    try:
        executor.update_parameters(**parameters)
    except (AssertionError, NameError, TypeError, ValueError) as error:
        raise InputError(f"--launch: {' '.join(str(error).split()):.300}") from error


def _submitit() -> Any:
    try:
        import submitit  # pyright: ignore[reportMissingImports]
        import submitit.helpers  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            "--launcher local and slurm need submitit: pip install 'lit-vision-tasks[study]'; inline does without"
        ) from None
    return submitit
