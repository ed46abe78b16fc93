"""Files that are whole or absent, never half written, also in a folder that several machines share."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_cli.errors import InputError

__all__ = ["create_file", "create_json", "read_json", "write_file", "write_json"]


def read_json(path: Path) -> Any:
    """Content of a json file.

    Raises:
        InputError: It cannot be read, or is no json.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: cannot read this file ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: no text, expected UTF-8") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: {error.msg}, expected json") from None


def write_json(path: Path, content: Any) -> None:
    """Replace a json file."""
    write_file(path, _json(content))


def create_json(path: Path, content: Any) -> bool:
    """`create_file` with json."""
    return create_file(path, _json(content))


def write_file(path: Path, content: str | bytes) -> None:
    """Replace a file.

    Raises:
        InputError: It cannot be written.
    """
    with _written_beside(path, content) as temporary:
        temporary.replace(path)


def create_file(path: Path, content: str | bytes) -> bool:
    """Write a file unless there is one; of several processes the first wins.

    Returns:
        Whether it is this process's.

    Raises:
        InputError: It cannot be written.
    """
    with _written_beside(path, content) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            if path.exists():
                return False
            temporary.replace(path)
    return True


@contextlib.contextmanager
def _written_beside(path: Path, content: str | bytes) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        yield temporary
    except OSError as error:
        raise InputError(f"{path}: cannot write this file ({error.strerror})") from None
    finally:
        with contextlib.suppress(OSError):  # it is gone already, or its folder never came to be
            temporary.unlink()


def _json(content: Any) -> str:
    return json.dumps(content, indent=1) + "\n"
