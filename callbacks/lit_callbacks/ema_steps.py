"""Which optimizer steps took place since the last update of an average, and how many samples they saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

__all__ = ["StepCount"]

Number = int | Tensor
Share = Callable[[Number, Number, Number], float | Tensor]


@dataclass
class _Window:
    """Optimizer steps since the last update and the samples they saw.

    Fused optimizers skip on the device, unknown to the host: of such steps the verdict is kept as a tensor.
    """

    steps: int = 0
    samples: int = 0
    open: list[tuple[int, Tensor]] = field(default_factory=list)

    def add(self, samples: int, found_inf: list[Tensor]) -> None:
        """Count a step; `found_inf` has the flags of its optimizers if the device may have skipped it."""
        if not found_inf:
            self.steps += 1
            self.samples += samples
            return
        device = found_inf[0].device
        flags = torch.stack([flag.detach().to(device).reshape(()) for flag in found_inf])
        # float64, so that the decay is that of the host's arithmetic. MPS has none.
        self.open.append((samples, flags.gt(0).all().to(torch.float32 if device.type == "mps" else torch.float64)))

    def totals(self) -> tuple[int | Tensor, int | Tensor]:
        """Steps and samples; tensors where the device decides."""
        steps: int | Tensor = self.steps
        samples: int | Tensor = self.samples
        for seen, skipped in self.open:
            steps = steps + (1 - skipped)
            samples = samples + seen * (1 - skipped) if seen else samples
        return steps, samples

    def settle(self) -> None:
        """Ask the device."""
        steps, samples = self.totals()
        self.steps, self.samples, self.open = round(float(steps)), round(float(samples)), []


class StepCount:
    """Counts what happens to the weights between two updates of their average.

    Not every batch ends in a step: under accumulation, or where `training_step` returns None, it does not. Several
    optimizers may step in one batch, which then counts once. A gradient scaler skips steps, on the host or, with a
    fused optimizer, on the device alone.

    Attributes:
        steps: Batches that ended in a step, those skipped on the device among them.
        started_at: `steps` when the average began; None before.
        stepped: The present batch has ended in a step that `count` has not seen yet.
        certain: No device may have skipped that step.
        found_inf: Flags of those that may have.
        global_step: The Trainer's, at the end of the last batch; the caller sets it when training starts.
    """

    def __init__(self) -> None:
        self._hooked: list[Optimizer] = []
        self._handles: list[RemovableHandle] = []
        self.forget()

    def forget(self) -> None:
        """Start from nothing."""
        self._n = 0
        self.steps = 0
        self.started_at: int | None = None
        # Fused optimizers skip on the device, unknown to the host: such updates are counted there.
        self._skipped: Tensor | None = None
        self._window = _Window()
        self.clear_marks()

    def clear_marks(self) -> None:
        """Forget the present batch, and the samples whose gradients wait for a step."""
        self.stepped = False
        self.certain = False
        self.found_inf: list[Tensor] = []
        # Samples of this batch before its gradient exists, and of those whose gradients wait for a step.
        self._in_batch = 0
        self._accumulated = 0
        self._manual = False
        self.global_step = 0

    @property
    def updates(self) -> int:
        """Updates made so far."""
        if self._skipped is not None:
            self._n -= round(self._skipped.item())
            self._skipped = None
        return self._n

    # ---------------------------------------------------------------- hooks

    def listen(self, optimizers: Sequence[Optimizer], before: Callable[..., None] | None = None) -> None:
        """Hear of the steps of these optimizers, and call `before` ahead of each."""
        if [id(o) for o in optimizers] != [id(o) for o in self._hooked]:
            self.stop_listening()
            self._hooked = list(optimizers)
            self._handles = [o.register_step_post_hook(self._mark) for o in self._hooked]
            if before is not None:
                self._handles += [o.register_step_pre_hook(before) for o in self._hooked]

    def stop_listening(self) -> None:
        """Leave nothing on the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._hooked = [], []

    def _mark(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Note that a step took place. Several optimizers step in one batch, so the update itself waits."""
        if not any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            return  # training_step returned None
        self.stepped = True
        if self._manual:
            self.accumulate()  # `loss.backward()` may have been called past Lightning
        # A gradient scaler leaves its verdict here when the optimizer does the skipping itself (fused).
        found_inf = getattr(optimizer, "found_inf", None)
        if isinstance(found_inf, Tensor):
            self.found_inf.append(found_inf)
        else:
            self.certain = True

    # -------------------------------------------------------------- batches

    def batch_starts(self, samples: int, manual: bool) -> None:
        """Note the size of a batch over all processes, and whether the module steps its optimizers itself."""
        self._in_batch, self._manual = samples, manual

    def accumulate(self) -> None:
        """The batch has a loss and so a part in the next step."""
        self._accumulated += self._in_batch
        self._in_batch = 0

    def batch_ends(self, global_step: int) -> None:
        """Settle which samples a step has seen."""
        attempted = global_step != self.global_step
        self.global_step = global_step
        if self._manual:
            self.accumulate()
        if attempted and not self.stepped:
            self._accumulated = 0  # skipped on the host: no weight has seen these samples
        self._in_batch = 0

    def count(self) -> None:
        """Count the step that the batch has ended in, from the start of the average on also for the next update."""
        samples, flags = self._accumulated, [] if self.certain else self.found_inf
        self.stepped, self.certain, self.found_inf, self._accumulated = False, False, [], 0
        self.steps += 1
        if self.started_at is not None:
            self._window.add(samples, flags)

    # -------------------------------------------------------------- updates

    def start(self) -> None:
        """The average begins here."""
        self.started_at = self.steps
        self._window = _Window()

    def take(self, share: Share) -> float | Tensor | None:
        """Close the window before an update.

        Args:
            share: Share of the old average to keep, from the updates before and the steps and samples since the last.

        Returns:
            That share; a 0-dim tensor, which is 1 if all steps were skipped, where the device knows; None if there
            was no step.
        """
        keep = self._keep(share)
        self._window = _Window()
        return keep

    def _keep(self, share: Share) -> float | Tensor | None:
        steps, samples = self._window.totals()
        if not isinstance(steps, Tensor):
            return share(self._n, steps, samples) if steps else None
        before = self._skipped if self._skipped is not None else torch.zeros_like(steps)
        keep = cast(Tensor, share(self._n - before, steps, samples))
        skipped = steps == 0
        self._skipped = before + skipped
        return torch.where(skipped, torch.ones_like(keep), keep)

    def updated(self) -> None:
        """Count the update that `take` was called for."""
        self._n += 1

    # ---------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """All counters as plain numbers; waits for the device."""
        state = {"n_averaged": self.updates, "steps": self.steps, "started_at": self.started_at}
        self._window.settle()
        return state | {"window_steps": self._window.steps, "window_samples": self._window.samples}

    def load_state_dict(self, state: Mapping[str, Any], every_n_steps: int) -> None:
        """Go on from the counters of a file; `every_n_steps` is the length of a window."""
        self._n, self.steps, self.started_at = state["n_averaged"], state["steps"], state["started_at"]
        # Files of the first version have no window; without fused skips its steps follow from the others.
        waiting = 0 if self.started_at is None else (self.steps - self.started_at) % every_n_steps
        self._window = _Window(state.get("window_steps", waiting), state.get("window_samples", 0))
