"""Where samples live: on the device when they fit, else in memory, else mapped from the cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import Trainer

__all__ = ["Store", "batches_done", "cache_folder", "choose_store", "fits_in_memory", "root_device"]

Store = Literal["auto", "gpu", "ram", "disk"]


def cache_folder(wanted: str | None, task: str) -> Path | None:
    """Folder of a cache: the one that is wanted, `none` for none, by default one per task.

    That is in `$LIT_CACHE`, else in the user's cache folder.

    Example:
        >>> cache_folder("none", "landmarks"), cache_folder("here", "landmarks").name
        (None, 'here')
    """
    if wanted:
        return None if wanted == "none" else Path(wanted)
    base = (
        os.environ.get("LIT_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lit-vision-tasks"
    )
    return Path(base) / task


def root_device(trainer: Trainer | None) -> torch.device:
    """The device that this process trains on; the CPU without a Trainer."""
    return trainer.strategy.root_device if trainer is not None else torch.device("cpu")


def fits_in_memory(wanted: Store, nbytes: int) -> bool:
    """Whether to read so many bytes into memory: what a store says, or if they leave half of this machine's free.

    Example:
        >>> fits_in_memory("disk", 1), fits_in_memory("ram", 10**15), fits_in_memory("auto", 10**15)
        (False, True, False)
    """
    if wanted != "auto":
        return wanted != "disk"
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 16 * 2**30
    return nbytes < 0.5 * total


def choose_store(wanted: Store, nbytes: int, device: torch.device) -> Store:
    """`gpu`, `ram` or `disk` for samples of so many bytes.

    >>> choose_store("auto", 10**6, torch.device("cpu"))
    'gpu'
    """
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        # A fifth leaves room for the network; beyond it the loader path is the safer default.
        if nbytes < 0.2 * torch.cuda.mem_get_info(device)[0]:
            return "gpu"
    elif nbytes < 4 * 2**30:
        return "gpu"  # without a GPU the device is the RAM, and no worker could be faster than an index
    return "ram" if fits_in_memory("auto", nbytes) else "disk"


def batches_done(trainer: Trainer | None) -> int:
    """Batches of the current epoch that a resumed run has trained on already.

    Lightning makes the loaders (to count the steps) before it restores its loops, so their saved state comes too late;
    and that state counts batches given out, which an interrupt can leave one ahead of those trained on.
    """
    if trainer is None or not trainer.training:
        return 0
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready
