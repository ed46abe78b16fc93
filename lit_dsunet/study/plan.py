"""The folder of a study: what is studied, the folds, and one folder per run."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lit_cli.errors import InputError
from lit_cli.profiles import find_profile
from lit_dsunet.files import create_json, read_json, write_json
from lit_dsunet.study.arms import Arms, option

__all__ = [
    "Run",
    "Study",
    "code_digest",
    "new_study",
    "open_study",
    "parse_config",
    "quiet_lightning",
    "write_splits",
]

# Where things lie and how they get to the network, not what is computed: machines that share a study may differ.
PLACES = (
    "data.root",
    "data.cache_dir",
    "data.folds_file",
    "data.store",
    "data.num_workers",
    "data.prefetch_factor",
    "data.persistent_workers",
    "data.pin_memory",
    "data.predict_dir",
    "trainer.default_root_dir",
    "trainer.logger",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "trainer.devices",
    "config",
    "ckpt_path",
)

# What the study decides itself, and what every run has in common.
OWNED = {
    "seed_everything": "--seeds",
    "data.fold": "--folds",
    "data.seed": "--seeds",
    "data.folds_file": None,
    "trainer.default_root_dir": "--out",
    "trainer.devices": "--launcher local, which runs several at once",
    "ckpt_path": None,
}
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
FIXED = [
    "--trainer.devices=1",
    "--trainer.num_nodes=1",
    "--trainer.enable_checkpointing=true",
    "--trainer.limit_val_batches=0",  # nobody looks at the held-out cases before the end
    "--trainer.num_sanity_val_steps=0",
    "--data.val_patches=0",
]


@dataclass(frozen=True, order=True)
class Run:
    """One training."""

    seed: int
    fold: int
    arm: str

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.arm}-fold{self.fold}-seed{self.seed}"


@dataclass
class Study:
    """A study in its folder.

    Attributes:
        folder: Shared by all machines that work on it.
        profiles: Names of the config files' copies in the folder.
        overrides: Options given beside them.
        config: Every setting that follows from both, by dotted name.
        arms: What is compared.
        folds: Held out one after the other.
        seeds: Of weights and order.
        code: Digest of the code that trains.
        about: Versions and the like, for the record.
    """

    folder: Path
    profiles: list[str]
    overrides: list[str]
    config: dict[str, Any]
    arms: Arms
    folds: list[int]
    seeds: list[int]
    code: str
    about: dict[str, Any]

    def runs(self) -> list[Run]:
        """All runs: seed by seed and fold by fold, so that what is finished early can be compared."""
        return [Run(seed, fold, arm) for seed in self.seeds for fold in self.folds for arm in self.arms.options]

    def path(self, run: Run) -> Path:
        """Folder of a run."""
        return self.folder / "runs" / run.name

    def result(self, run: Run) -> Path:
        """File whose existence says that a run is done."""
        return self.path(run) / "result.json"

    @property
    def splits(self) -> Path:
        """The folds."""
        return self.folder / "splits_final.json"

    def arguments(self, run: Run) -> list[str]:
        """Command line of the fit of a run."""
        own = {
            "seed_everything": run.seed,
            "data.fold": run.fold,
            "data.folds_file": str(self.splits),
            "data.seed": run.seed,
            "trainer.default_root_dir": str(self.path(run)),
        }
        options = {**self.arms.options[run.arm], **own}
        return [*_fit(self._profile_paths(), self.overrides), *FIXED, *(option(k, v) for k, v in options.items())]

    def _profile_paths(self) -> list[str]:
        return [str(self.folder / name) for name in self.profiles]

    def as_dict(self) -> dict[str, Any]:
        """The content of study.json."""
        a = self.arms
        return {
            "profiles": self.profiles,
            "profile_sha256": [_digest((self.folder / name).read_bytes()) for name in self.profiles],
            "overrides": self.overrides,
            "arms": a.options,
            "reference": a.reference,
            "factors": {name: [list(pair) for pair in pairs] for name, pairs in a.factors.items()},
            "claim": a.claim,
            "folds": self.folds,
            "seeds": self.seeds,
            "code": self.code,
            "about": self.about,
            "config": self.config,
        }

    @staticmethod
    def load(folder: str | Path) -> Study:
        """The study in a folder.

        Raises:
            InputError: There is none, or its file is damaged.
        """
        path = Path(folder) / "study.json"
        if not path.exists():
            raise InputError(f"{path}: no such file; start a study with --config")
        d = read_json(path)
        try:
            factors = {name: [(a, b) for a, b in pairs] for name, pairs in d["factors"].items()}
            arms = Arms(d["arms"], d["reference"], factors, d["claim"])
            keys = ("profiles", "overrides", "config", "folds", "seeds", "code", "about")
            return Study(folder=Path(folder), arms=arms, **{key: d[key] for key in keys})
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: {error!r}: expected the file as it was written") from None


def open_study(study: Study, accept_code: bool = False) -> Study:
    """Write study.json, or agree with the one that is there.

    The settings of a study never change. Arms, folds and seeds may be added.

    Args:
        study: As asked for.
        accept_code: Go on although the code has changed since.

    Returns:
        What the folder holds from now on: all arms, folds and seeds that were ever asked for.

    Raises:
        InputError: The folder holds a study of something else; the message names the first difference.
    """
    path = study.folder / "study.json"
    study.arms.check()
    if create_json(path, study.as_dict()):
        return study
    found = Study.load(study.folder)
    for key in sorted({*found.config, *study.config}):
        old, new = found.config.get(key), study.config.get(key)
        if old != new and not _is_place(key):
            raise _other(path, key, old, new)
    for name in sorted({*found.arms.options} & {*study.arms.options}):
        old, new = found.arms.options[name], study.arms.options[name]
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                raise _other(path, f"{key} of arm {name}", old.get(key), new.get(key))
    if found.code != study.code and not accept_code:
        raise InputError(
            f"{path}: the code is {found.code} there and {study.code} here, expected one code for all runs; "
            "--accept_code goes on all the same, and the report says so"
        )
    wider = set(found.arms.options) <= set(study.arms.options)
    arms = replace(
        found.arms,
        reference=(study if wider else found).arms.reference,
        options={**found.arms.options, **study.arms.options},
        factors={**study.arms.factors, **found.arms.factors},
    )
    merged = replace(
        found,
        arms=arms,
        folds=sorted({*found.folds, *study.folds}),
        seeds=sorted({*found.seeds, *study.seeds}),
        overrides=study.overrides,
    )
    if (merged.arms, merged.folds, merged.seeds) != (found.arms, found.folds, found.seeds):
        write_json(path, replace(merged, overrides=found.overrides).as_dict())
    return merged


def _other(path: Path, key: str, old: Any, new: Any) -> InputError:
    return InputError(
        f"{path}: {key} is {old!r} there and {new!r} here; a study keeps its settings, take another --out"
    )


def _is_place(key: str) -> bool:
    return any(key == place or key.startswith(f"{place}.") for place in PLACES)


def new_study(folder: Path, profiles: Sequence[str], overrides: Sequence[str]) -> tuple[Study, dict[str, Any]]:
    """A study without arms yet, its profiles copied to the folder; and the profiles' values, nested.

    Raises:
        InputError: No such profile, an option that the study sets itself, or one that is wrong.
    """
    for word in overrides:
        key = word.removeprefix("--").split("=")[0]
        if word.startswith("--") and (key in OWNED or any(fixed.startswith(f"--{key}=") for fixed in FIXED)):
            instead = f"; expected {OWNED[key]}" if OWNED.get(key) else ""
            raise InputError(f"--{key}: a study sets this for each run itself{instead}")
    files = [Path(find_profile("lit_dsunet", profile)) for profile in profiles]
    values = parse_config(_fit([str(f) for f in files], overrides))
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for file in files:
        copy = folder / "profiles" / file.name
        if not copy.exists():  # resumed by the copy, which need not be copied onto itself
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
        names.append(f"profiles/{file.name}")
    config = {k: v for k, v in sorted(_flat(values)) if k.split(".")[0] != "config"}
    about = {"version": _version(), "commit": _commit()}
    return Study(folder, names, list(overrides), config, Arms({}, ""), [], [], code_digest(), about), values


def _fit(profiles: Sequence[str], overrides: Sequence[str]) -> list[str]:
    return ["fit", *(word for p in profiles for word in ("--config", p)), *QUIET, *overrides]


def parse_config(args: Sequence[str]) -> dict[str, Any]:
    """Every setting that a command line leads to, without building anything.

    Raises:
        InputError: It is wrong.
    """
    from lit_dsunet.__main__ import VolumeCLI
    from lit_dsunet.data import VolumeData
    from lit_dsunet.module import LitDSUNet

    class Parsed(Exception):
        pass

    class Parser(VolumeCLI):
        """Stops where the classes would be built."""

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {"fit": VolumeCLI.subcommands()["fit"]}

        def before_instantiate_classes(self) -> None:
            raise Parsed(self.config[self.config.subcommand].as_dict())

    with quiet_lightning():
        try:
            Parser(LitDSUNet, VolumeData, "lit_dsunet", list(args))
        except Parsed as parsed:
            return json.loads(json.dumps(parsed.args[0], default=str))
    raise AssertionError("the command line was run")


def write_splits(study: Study, config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Write the folds once, and check them if they are there.

    Args:
        study: Whose folder.
        config: The profile's values, nested.

    Returns:
        Numbers of training and held-out cases per fold.

    Raises:
        InputError: The data cannot be read or has a validation split of its own, or the folds there are not its.
    """
    from lit_dsunet.data import VolumeData
    from lit_dsunet.splits import check_folds, write_folds

    if not study.splits.exists():
        data = VolumeData(**{**config["data"], "fold": 0})
        if data.table.splits.get("val"):
            raise InputError("data: this data set has a validation split of its own, expected one to make folds of")
        samples = [*data.samples("train"), *data.samples("val")]
        folds = data.folds(samples, [*data.cases("train"), *data.cases("val")])
        check_folds(folds, samples)
        source = (
            "folds_file" if config["data"]["folds_file"] else "data set" if data.table.folds else "foreground volume"
        )
        write_folds(study.splits, folds, {"by": source, "n_folds": len(folds), "seed": config["data"]["seed"]})
    return [(len(fold["train"]), len(fold["val"])) for fold in read_json(study.splits)]


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Leave out what Lightning tells about every Trainer; warnings stay."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def code_digest() -> str:
    """Digest of the packages that a training runs through; not of the study itself, which may be mended meanwhile."""
    parts = []
    for package in ("lit_dsunet", "lit_common", "lit_cli", "lit_callbacks"):
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations
        root = Path(next(iter(spec.submodule_search_locations)))
        for file in sorted(root.rglob("*.py")):
            name = file.relative_to(root).as_posix()
            if not (package == "lit_dsunet" and (name.startswith("study/") or name == "statistics.py")):
                parts.append(f"{package}/{name} {_digest(file.read_bytes())}")
    return _digest("\n".join(parts).encode())[:12]


def _version() -> str | None:
    try:
        return importlib.metadata.version("lit-vision-tasks")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return None


def _commit() -> str | None:
    try:
        where = Path(__file__).parent
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=where, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
