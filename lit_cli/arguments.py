"""Commands beside the Trainer's own."""

from __future__ import annotations

import argparse
from typing import NoReturn

from lit_cli.errors import InputError

__all__ = ["CommandParser"]


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one line that begins with the command.

    Example:
        >>> CommandParser(prog="lit-dsunet plan").parse_args(["--depth", "3"])
        Traceback (most recent call last):
        ...
        lit_cli.errors.InputError: plan: unrecognized arguments: --depth 3
    """

    def error(self, message: str) -> NoReturn:
        """Raise `InputError`."""
        raise InputError(f"{self.prog.rpartition(' ')[2]}: {message}")
