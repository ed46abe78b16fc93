"""What a run of a study notes about itself: first weights, order, cost, and figures per case."""

from __future__ import annotations

import copy
import hashlib
import math
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lit_cli.errors import InputError
from lit_common.loaders import EpochBatches
from lit_dsunet.files import read_json, write_json
from lit_dsunet.study.claims import Claim

__all__ = ["Recorder", "common_digest", "order_digest", "patch_gflops", "tensor_digests"]

INITIAL = "initial.json"


class Recorder(Callback):
    """Measures the training of a run, checks where it starts, and keeps the figures per case of its evaluation.

    Its numbers are part of the checkpoints, so that they count every step once, however often a run was interrupted.

    Args:
        folder: Of the run; the digests of the first weights go there.
        others: Folders of the runs that must start alike.
        claim: Whoever lost it stops.

    Attributes:
        per_case: Figures of the last validation, by name, one per case; `case` is the position in the split.
    """

    def __init__(self, folder: Path, others: list[Path], claim: Claim | None = None) -> None:
        self.folder, self.others, self.claim = folder, others, claim
        self.per_case: dict[str, list[float]] = {}
        self._state = {"seconds": 0.0, "steady_seconds": 0.0, "samples": 0, "steady_samples": 0}
        self._peaks = {"allocated": 0, "reserved": 0}
        self._order: str | None = None
        self._began: float | None = None
        self._first_ended: float | None = None

    # ---- training ------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the first weights with those of the other arms; begin to measure memory."""
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        if trainer.ckpt_path is not None:
            return
        net = pl_module.net
        assert isinstance(net, nn.Module)
        found = tensor_digests(net)
        for other in self.others:
            if not (other / INITIAL).exists():
                continue
            theirs = read_json(other / INITIAL)
            differing = [name for name in found if theirs.get(name, found[name]) != found[name]]
            if differing:
                raise InputError(
                    f"{self.folder.name}: first weights of {differing[0]} are not those of {other.name}, expected the "
                    f"same in all arms of one seed"
                )
        write_json(self.folder / INITIAL, found)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        sampler = getattr(trainer.train_dataloader, "sampler", None)
        if isinstance(sampler, EpochBatches):
            self._order = order_digest(sampler)
        self._began, self._first_ended = time.perf_counter(), None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop where another process has gone on with this run."""
        if self.claim is not None and self.claim.lost:
            raise InputError(f"{self.folder}: {self.claim.owner()} has taken this run over; it goes on there")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count patches; those of the first batch pay for compilation and are left out of the rate."""
        self._state["samples"] += len(batch.image)
        if self._first_ended is None:
            self._first_ended = time.perf_counter()
        else:
            self._state["steady_samples"] += len(batch.image)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self._note_peaks(pl_module.device)
        self._state, self._began = self._now(), None

    def _now(self) -> dict[str, Any]:
        """The state with what has passed since the clock was started."""
        state, now = dict(self._state), time.perf_counter()
        if self._began is not None:
            state["seconds"] += now - self._began
            if self._first_ended is not None:
                state["steady_seconds"] += now - self._first_ended
        return state

    def _note_peaks(self, device: torch.device) -> None:
        if device.type == "cuda":
            self._peaks = {
                "allocated": max(self._peaks["allocated"], torch.cuda.max_memory_allocated(device)),
                "reserved": max(self._peaks["reserved"], torch.cuda.max_memory_reserved(device)),
            }

    @property
    def state_key(self) -> str:
        """In a checkpoint's `callbacks`."""
        return "StudyRecorder"

    def state_dict(self) -> dict[str, Any]:
        """What was counted so far."""
        return {**self._now(), **self._peaks, "order": self._order}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._state = {key: state_dict[key] for key in self._state}
        self._peaks = {key: state_dict[key] for key in self._peaks}
        self._order = state_dict["order"]

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the figures before the module resets its metrics."""
        found: dict[str, list[float]] = {}
        metrics: Any = pl_module.metrics["val"]  # type: ignore[index]
        for metric in metrics.values():
            table = {name: values.tolist() for name, values in metric.per_case().items()}
            if found and found["case"] != table["case"]:
                raise AssertionError(f"metrics of different cases: {found['case']} and {table['case']}")
            found |= table
        self.per_case = found

    # ---- afterwards ----------------------------------------------------------------------------------------------

    @property
    def order(self) -> str | None:
        """Digest of the order of the patches."""
        return self._order

    @property
    def samples(self) -> int:
        """Patches that were trained on."""
        return int(self._state["samples"])

    def cost(self) -> dict[str, float | None]:
        """Seconds, patches per second, and peaks in GB of 2^30 bytes (None without a GPU)."""
        s = self._state
        rate = s["steady_samples"] / s["steady_seconds"] if s["steady_samples"] and s["steady_seconds"] else None
        peaks = {f"peak_{k}_gb": v / 2**30 if v else None for k, v in self._peaks.items()}
        return {"seconds": s["seconds"], "samples_per_s": rate, **peaks}


def tensor_digests(net: nn.Module) -> dict[str, str]:
    """Digest of each tensor of a network, by name and shape."""
    digests = {}
    for name, tensor in net.state_dict().items():
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        shape = "x".join(map(str, tensor.shape))
        digests[f"{name.removeprefix('_orig_mod.')}:{shape}"] = hashlib.sha256(content).hexdigest()[:16]
    return digests


def common_digest(tables: list[dict[str, str]]) -> tuple[int, str | None]:
    """Number of the tensors that all networks have, and the digest of their values; None if these differ.

    >>> common_digest([{"a:1": "x", "b:1": "y"}, {"a:1": "x"}])[0]
    1
    >>> common_digest([{"a:1": "x"}, {"a:1": "z"}])
    (1, None)
    """
    names = sorted(set.intersection(*map(set, tables)))
    if any(table[name] != tables[0][name] for table in tables for name in names):
        return len(names), None
    return len(names), hashlib.sha256(repr([(n, tables[0][n]) for n in names]).encode()).hexdigest()[:16]


def order_digest(sampler: EpochBatches) -> str:
    """Digest of the order of the first epoch and of its first batch's seed, from which all else follows."""
    first = copy.copy(sampler)
    first.epoch = 0
    content = first.order().numpy().tobytes() + str((first.batch_size, first.batch_seed(0))).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def patch_gflops(net: nn.Module, in_channels: int, patch: tuple[int, ...]) -> float | None:
    """10^9 floating-point operations, two per multiply-add, of the forward pass of one patch in training.

    Args:
        net: The network; counted without computing anything.
        in_channels: Channels of the image.
        patch: (D, H, W), or (H, W).

    Returns:
        None where an operation cannot be traced.
    """
    from torch.utils.flop_counter import FlopCounterMode

    try:
        shadow = copy.deepcopy(net).to("meta").train()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            shadow(torch.empty(1, in_channels, *patch, device="meta"))
    except (NotImplementedError, RuntimeError):
        return None
    flops = counter.get_total_flops()
    return flops / 1e9 if flops and math.isfinite(flops) else None
