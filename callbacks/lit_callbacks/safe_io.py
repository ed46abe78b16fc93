"""Checkpoints that are complete or not there: write beside the target, then rename."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor

__all__ = ["CheckpointWriteError", "SafeCheckpointIO", "free_bytes", "is_complete", "is_disk_full", "newest_complete"]

_FULL = {errno.ENOSPC, errno.EDQUOT}
# What torch's zip writer says when the stream below it fails; on its own it does not pass the cause on.
_WRITER_TEXTS = ("PytorchStreamWriter failed writing file", "unexpected pos")


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; nothing of it is left and what was there before is untouched.

    `filename` is the target, `needed` the size of the tensors in bytes.
    """

    needed: int = 0


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes local checkpoints to `<name>.part` beside the target, flushes them to the disk and renames them.

    Lightning's own writer collects the file in memory, writes it to the folder for temporary files and moves it. Where
    that folder lies on another file system, the move is a copy onto the target: on a full disk half of a new
    `last.ckpt` replaces the good one. Remote paths go to Lightning's writer.

    Raises:
        CheckpointWriteError: The disk is full, or the writer failed otherwise.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     SafeCheckpointIO().save_checkpoint({"a": 1}, f"{folder}/deep/a.ckpt")
        ...     sorted(p.name for p in Path(folder).rglob("*"))
        ['a.ckpt', 'deep']
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint completely or not at all."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        part = target.with_name(f"{target.name}.part")  # not *.ckpt: nobody takes it for a checkpoint
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())  # network file systems report a full disk here at the earliest
            part.replace(target)
        except BaseException as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            cause = _cause(error)
            if cause is None:
                raise
            failure = CheckpointWriteError(cause.errno or errno.EIO, cause.strerror or str(cause), str(target))
            failure.needed = _tensor_bytes(checkpoint)
            raise failure from error


def _chain(error: BaseException) -> Iterable[BaseException]:
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__


def _is_writer_error(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _WRITER_TEXTS)


def _cause(error: BaseException) -> OSError | None:
    """The operating system's error behind a failed write, or one made up for torch's writer that lost it."""
    if not isinstance(error, OSError) and not _is_writer_error(error):
        return None
    found = next((e for e in _chain(error) if isinstance(e, OSError)), None)
    return found or OSError(errno.EIO, str(error).splitlines()[0])


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception comes from a full disk, a quota, or a checkpoint that could not be written.

    Example:
        >>> is_disk_full(OSError(errno.ENOSPC, "No space left on device")), is_disk_full(FileNotFoundError("x"))
        (True, False)
    """
    return (
        isinstance(error, CheckpointWriteError)
        or _is_writer_error(error)
        or (isinstance(error, OSError) and error.errno in _FULL)
    )


def _tensor_bytes(value: Any) -> int:
    """Size of all tensors in nested containers, each storage once."""
    storages: dict[int, int] = {}

    def visit(item: Any) -> None:
        if isinstance(item, Tensor):
            with contextlib.suppress(Exception):  # tensors without storage
                storage = item.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, Mapping):
            for inner in item.values():
                visit(inner)
        elif isinstance(item, list | tuple):
            for inner in item:
                visit(inner)

    visit(value)
    return sum(storages.values())


def free_bytes(folder: Path) -> int:
    """Free space of the file system that a folder lies on or would lie on."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def is_complete(path: Path) -> bool:
    """Whether a file is a whole checkpoint: its archive has an end and its content opens.

    Tensors are mapped, not read.

    Example:
        >>> is_complete(Path("nowhere.ckpt"))
        False
    """
    try:
        if not zipfile.is_zipfile(path):
            return False
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        return True  # classes that are not on torch's list of safe ones: the archive is whole
    except Exception:
        return False
    return True


def newest_complete(folders: Iterable[Path]) -> Path | None:
    """The newest whole `*.ckpt` in some folders."""
    files = {file for folder in folders if folder.is_dir() for file in folder.glob("*.ckpt") if file.is_file()}
    for file in sorted(files, key=lambda f: f.stat().st_mtime, reverse=True):
        if is_complete(file):
            return file
    return None
