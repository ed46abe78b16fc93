"""Small json files in a folder that several machines share: whole or absent, never half written."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

from lit_cli.errors import InputError

__all__ = ["create_json", "read_json", "write_json", "write_text"]


def read_json(path: Path) -> Any:
    """Content of a json file.

    Raises:
        InputError: It cannot be read, or is no json.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read this file ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}, expected json") from None


def write_json(path: Path, content: Any) -> None:
    """Replace a json file as a whole."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a text file as a whole."""
    temporary = _temporary(path, text)
    try:
        temporary.replace(path)
    finally:
        _remove(temporary)


def create_json(path: Path, content: Any) -> bool:
    """Write a json file unless there is one; of several processes the first wins.

    Returns:
        Whether it is this process's.
    """
    temporary = _temporary(path, json.dumps(content, indent=1) + "\n")
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if path.exists():
            return False
        temporary.replace(path)
    finally:
        _remove(temporary)
    return True


def _temporary(path: Path, text: str) -> Path:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        _remove(temporary)
        raise InputError(f"{path}: cannot write this file ({error.strerror})") from None
    return temporary


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # renamed already, or never made
        path.unlink()
