"""What an error means to the person at the keyboard."""

from __future__ import annotations

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lit_callbacks.graceful import report_of
from lit_callbacks.oom import is_out_of_memory
from lit_callbacks.safe_io import is_disk_full

from lit_cli.errors import InputError

__all__ = ["message_of"]

SMALLER = "halve --data.batch_size and double --trainer.accumulate_grad_batches, or take a profile of a smaller card"


def message_of(error: Exception) -> str | None:
    """An error in one line, with what `GracefulStop` left behind; None for one that a user cannot mend.

    Example:
        >>> message_of(FileNotFoundError(2, "No such file or directory", "video.mp4"))
        'No such file or directory: video.mp4'
        >>> message_of(ZeroDivisionError()) is None
        True
    """
    report, full = report_of(error), is_disk_full(error)
    if isinstance(error, InputError | MisconfigurationException):
        message = str(error)
    elif is_out_of_memory(error):
        first = next(iter(str(error).splitlines()), type(error).__name__)
        message = f"out of memory ({first:.120})" + ("" if report else f"; {SMALLER}")
    elif isinstance(error, OSError) and not (error.filename is None and error.errno is None):
        message = f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")
        message = report or message if full else message  # a full disk's report says all there is to say
    else:
        return None
    return message if report is None or full else f"{message}; {report}"
