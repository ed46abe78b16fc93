"""The command line that all tasks share."""

from lit_cli.errors import InputError

__all__ = ["InputError"]
