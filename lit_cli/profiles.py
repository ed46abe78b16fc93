"""Profiles by name: `--config rtx3070ti_balanced` instead of a path."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from lit_cli.errors import InputError


def profile_folders(package: str) -> list[Path]:
    """Folders that hold a package's profiles: those in the installed wheel, then those of a checkout."""
    root = Path(str(importlib.resources.files(package)))
    task = package.removeprefix("lit_")
    return [folder for folder in (root / "configs", root.parent / "configs" / task) if folder.is_dir()]


def find_profile(package: str, value: str) -> str:
    """Path of a config file given by path, by profile name, or by its path inside a checkout.

    Args:
        package: Import name of the task, such as `lit_landmarks`.
        value: What followed `--config`.

    Raises:
        InputError: there is no such file and no such profile.
    """
    if Path(value).is_file():
        return value
    folders = profile_folders(package)
    path = Path(value)
    bare = path.name == value
    inside = path.parts[-3:-1] == ("configs", package.removeprefix("lit_"))  # configs/<task>/<name>.yaml from elsewhere
    if bare or inside:
        for folder in folders:
            candidate = folder / (path.name if path.suffix in (".yaml", ".yml") else f"{path.name}.yaml")
            if candidate.is_file():
                return str(candidate)
    known = sorted({p.stem for folder in folders for p in folder.glob("*.yaml")})
    raise InputError(f"--config {value}: no such file, and no such profile; profiles are {', '.join(known)}")


def expand_profiles(package: str, args: list[str]) -> list[str]:
    """The command line with every `--config` or `-c` value replaced by the path of its file."""
    out: list[str] = []
    expects_value = False
    for arg in args:
        if expects_value:
            arg, expects_value = find_profile(package, arg), False
        elif arg in ("--config", "-c"):
            expects_value = True
        elif arg.startswith("--config="):
            arg = f"--config={find_profile(package, arg.removeprefix('--config='))}"
        out.append(arg)
    return out
