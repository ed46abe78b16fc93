"""Training where nothing is held out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

__all__ = ["without_validation"]


@contextmanager
def without_validation(trainer: Trainer) -> Iterator[None]:
    """Let a Trainer fit where there is nothing to validate on; a data module enters this in its `setup`.

    No loaders alone would not do: Lightning takes an empty list for one loader and warns of its length. And where it
    validates every few epochs, its checkpoint callback waits for a validation, so that it would write nothing at all.
    In here it writes at the end of every epoch, unless it was told otherwise.
    """
    before = trainer.limit_val_batches, trainer.check_val_every_n_epoch, trainer.val_check_interval
    trainer.limit_val_batches, trainer.check_val_every_n_epoch, trainer.val_check_interval = 0, 1, 1.0
    rank_zero_info("nothing is held out: no validation, and so no best checkpoint")
    # A checkpoint callback that looks for the best would ask whether its figure was logged.
    warnings.filterwarnings("ignore", message=r"`ModelCheckpoint\(monitor='val/")
    try:
        yield
    finally:
        trainer.limit_val_batches, trainer.check_val_every_n_epoch, trainer.val_check_interval = before
