"""Notice early that a run will not get where it should."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

__all__ = ["MilestoneGuard"]

_CAUSES = (
    "Likely causes: a learning rate that is too high or too low, wrong targets or normalisation, pretrained weights "
    "that were not loaded, an effective batch size unlike the one the milestones come from."
)


class MilestoneGuard(Callback):
    """Compare a metric with what a healthy run has reached by certain epochs; warn, or stop the run.

    The comparison takes place at the end of the first validation at or after the milestone. If several milestones have
    passed since the last validation, only the latest is judged. NaN never reaches a milestone.

    Args:
        monitor: Key in `trainer.callback_metrics`.
        milestones: Finished epochs, counted from 1, to the worst acceptable value of the metric, in its own unit.
        mode: "min" if a smaller value is better, "max" if a larger one is.
        action: "warn" writes one line, "stop" writes it and ends the training gracefully.
        advice: Sentence for the warning in place of the general list of causes.

    Example:
        >>> guard = MilestoneGuard("val/mre_mm", {10: 4.0, 50: 2.0}, mode="min", action="stop")
        >>> guard.state_key
        'MilestoneGuard[val/mre_mm]'
        >>> guard.due(12)
        10
    """

    def __init__(
        self,
        monitor: str,
        milestones: dict[int, float],
        mode: Literal["min", "max"],
        action: Literal["warn", "stop"] = "warn",
        advice: str = "",
    ) -> None:
        if mode not in ("min", "max") or action not in ("warn", "stop"):
            raise MisconfigurationException(f"MilestoneGuard: unknown mode={mode!r} or action={action!r}")
        if not milestones or min(milestones) < 1:
            raise MisconfigurationException("MilestoneGuard: milestones must name at least one epoch, counted from 1")
        self.monitor = monitor
        self.milestones = dict(sorted(milestones.items()))
        self.mode = mode
        self.action = action
        self.advice = advice
        self._judged = 0
        self._seen = False
        self._announced = False

    @property
    def state_key(self) -> str:
        """One key per monitored metric, so that several guards can work side by side."""
        return f"MilestoneGuard[{self.monitor}]"

    def state_dict(self) -> dict[str, Any]:
        """The last judged milestone, so that a resumed run does not repeat itself."""
        return {"judged": self._judged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the last judged milestone."""
        self._judged = state_dict["judged"]

    def due(self, finished: int) -> int | None:
        """Latest milestone that `finished` epochs have reached and that was not judged yet."""
        reached = [epoch for epoch in self.milestones if self._judged < epoch <= finished]
        return reached[-1] if reached else None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the milestone that is due, if there is one."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        # A validation within an epoch runs before that epoch counts as finished, one at its end does too.
        finished = trainer.current_epoch + int(trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)
        due = self.due(finished)
        metric = trainer.callback_metrics.get(self.monitor)
        if metric is None:
            self._missing(due, finished, sorted(trainer.callback_metrics))
            return
        self._seen = True
        if due is None:
            return
        self._judged = due
        got, expected = float(metric), self.milestones[due]
        failed = not (got <= expected if self.mode == "min" else got >= expected)
        if self.action == "stop":
            # Ranks that disagree about stopping would wait for each other forever.
            failed = trainer.strategy.reduce_boolean_decision(failed, all=False)
        if failed:
            self._report(trainer, due, finished, got, expected)

    def _report(self, trainer: Trainer, due: int, finished: int, got: float, expected: float) -> None:
        bound = "at most" if self.mode == "min" else "at least"
        end = " The training stops here." if self.action == "stop" else ""
        rank_zero_warn(
            f"Epoch {finished}: {self.monitor} is {got:.4g}, but {bound} {expected:.4g} was expected by epoch {due}. "
            f"{self.advice or _CAUSES}{end}"
        )
        if self.action == "stop":
            trainer.should_stop = True

    def _missing(self, due: int | None, finished: int, available: list[str]) -> None:
        """Metrics of the training epoch appear after its validation, so only the second one can tell a typo."""
        if self._seen:
            return
        text = f"MilestoneGuard: there is no metric {self.monitor!r} after {finished} epochs; there are {available}."
        if due is not None and self.action == "stop":
            raise MisconfigurationException(text)
        if finished >= 2 and not self._announced:
            self._announced = True
            first = next(iter(self.milestones))
            rank_zero_warn(
                f"{text} " + (f"The run will fail at epoch {first}." if self.action == "stop" else "Not judged.")
            )
