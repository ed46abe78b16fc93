"""The console script `lit-patchnerf`: decoding a file imports nothing that only training needs."""

from __future__ import annotations

from collections.abc import Callable

from lit_cli.console import dispatch

__all__ = ["command", "console"]


def console() -> None:
    """Entry point: the Trainer's subcommands, and those that train nothing."""
    dispatch("lit_patchnerf", _main, command)


def _main() -> None:
    from lit_patchnerf.__main__ import main

    main()


def command(word: str) -> Callable[[list[str]], object] | None:
    """What a first word stands for, unless it is one of the Trainer's."""
    if word == "query":
        from lit_patchnerf.query import query_main

        return query_main
    if word in ("compress", "decode", "export"):
        from lit_patchnerf import export

        return {"compress": export.compress_main, "decode": export.decode_main, "export": export.export_main}[word]
    return None
