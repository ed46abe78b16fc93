"""What a console script does with its arguments and its errors, without importing what only training needs."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import TypeVar

__all__ = ["QUIET", "dispatch", "one_line"]

Result = TypeVar("Result")

QUIET = (  # remarks of libraries on each other, about nothing that a user did
    r".*isinstance\(treespec, LeafSpec\)` is deprecated",
    r"The dirpath has changed from",
    r"Couldn't infer the batch indices fetched from your dataloader",
)


def dispatch(
    package: str,
    main: Callable[[], object],
    command_of: Callable[[str], Callable[[list[str]], object] | None],
) -> None:
    """The Trainer's subcommands, or a command that trains nothing itself.

    Args:
        package: Import name of the task.
        main: Runs the Trainer's.
        command_of: The command that a first word stands for, None for one of the Trainer's.
    """
    args = sys.argv[1:]
    command = command_of(args[0]) if args else None
    if command is None:
        main()  # its value would become the exit status
    else:
        one_line(package, lambda: command(args[1:]))


def one_line(package: str, action: Callable[[], Result]) -> Result:
    """Do something for the user; what goes wrong by the user's own input is one line and status 2.

    `LIT_TRACEBACK=1` shows the traceback as well.
    """
    for noise in QUIET:
        warnings.filterwarnings("ignore", message=noise)
    try:
        return action()
    except Exception as error:
        from lit_cli.messages import message_of  # it imports Lightning

        message = message_of(error)
        if message is None:
            raise
        if os.environ.get("LIT_TRACEBACK"):
            traceback.print_exc()
        print(f"{package.replace('_', '-')}: error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2) from None
