"""The one exception whose text is written for the person at the keyboard."""

from __future__ import annotations


class InputError(ValueError):
    """Wrong input: a file, a field or an option.

    The message is one line that names what was read, what was wrong and what was expected. `LitCLI` prints it without a
    traceback and exits with status 2; in a notebook it is an ordinary `ValueError`.
    """
