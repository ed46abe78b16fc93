"""Weights as one file that opens without Lightning: `safetensors`, or `.pt` for `torch.load`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lit_callbacks.average import clean_name

__all__ = ["WeightsExport", "checkpoint_weights", "export_weights", "load_weights", "plain_values"]

_INSTALL = "which is not installed: pip install safetensors"
_BY_HAND = "From a checkpoint: python -m lit_callbacks.export CHECKPOINT FILE"


def _plain(value: object) -> Any:
    """The value in plain types.

    Raises:
        TypeError: It has none.
    """
    if value is None or isinstance(value, bool):
        return value
    # Subclasses, such as numpy's float64 or members of an enum of strings, would be pickled with their class.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):  # JSON has no other keys
        return {_plain(key): _plain(item) for key, item in value.items()}
    raise TypeError(type(value).__name__)


def plain_values(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Split hyperparameters into those that any program can read and the names of the others.

    Plain are numbers, strings, booleans and None, and lists, tuples (which become lists) and mappings with string keys
    that hold nothing else. Keys that begin with an underscore are Lightning's own and left out.

    Returns:
        The plain values, and the names of those that are not.

    Example:
        >>> plain_values({"lr": 0.1, "size": (64, 64), "loss": torch.nn.MSELoss(), "_instantiator": "x"})
        ({'lr': 0.1, 'size': [64, 64]}, ['loss'])
    """
    plain: dict[str, Any] = {}
    dropped: list[str] = []
    for name, value in values.items():
        if str(name).startswith("_"):
            continue
        try:
            plain[str(name)] = _plain(value)
        except TypeError:
            dropped.append(str(name))
    return plain, dropped


def _place(tensor: Tensor, name: str) -> object:
    """What two names of the same tensor have in common."""
    address = tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0
    if not address or not tensor.numel():
        return name
    return tensor.device, address, tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride()


def _separate(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, contiguous on the host and alone in its storage; further names of tied tensors beside it."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[object, str] = {}
    for name, value in state.items():
        tensor = value.detach()
        known = first.setdefault(_place(tensor, name), name)
        if known != name:
            aliases[name] = known
            continue
        tensor = tensor.cpu().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()  # a part of a larger tensor, which would be written whole
        tensors[name] = tensor
    return tensors, aliases


def _reason(error: BaseException) -> str:
    """The system's message under an error of torch, which names only a position in the file."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return (str(error) or type(error).__name__).splitlines()[0]


def _write(path: Path, save: Callable[[Path], None]) -> None:
    """Let `save` write a temporary file beside `path` and put it into its place once it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(temporary)
        temporary.replace(path)
    except Exception as error:  # OSError, torch's RuntimeError or SafetensorError, for the same full disk
        raise OSError(f"{path}: not written: {_reason(error)}") from error
    finally:
        with suppress(OSError):  # no folder to look into
            temporary.unlink(missing_ok=True)


def _save_pt(content: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:  # given a path, torch would not say why it could not write
        torch.save(content, file)


def _check_suffix(path: Path) -> None:
    if path.suffix not in (".safetensors", ".pt"):
        raise MisconfigurationException(f"{path}: expected a name that ends in .safetensors or .pt")
    if path.suffix == ".safetensors" and find_spec("safetensors") is None:
        raise MisconfigurationException(f"{path}: needs safetensors, {_INSTALL}")


def export_weights(
    path: str | Path,
    state_dict: Mapping[str, Tensor],
    hyper_parameters: Mapping[str, Any] | None = None,
    *,
    prefix: str = "",
) -> Path:
    """Write weights and plain hyperparameters into one file; the suffix `.safetensors` or `.pt` decides the format.

    A `.pt` file is `{"state_dict", "hyper_parameters", "dropped"}` for `torch.load(path, weights_only=True)`. In a
    `.safetensors` file the last two are JSON in the metadata; tied tensors are stored once, and `aliases` there maps
    their further names to the stored one. `dropped` names what is not in the file: hyperparameters that are not plain,
    and entries of the state that are no tensors. The marks that `torch.compile` leaves in names are removed.

    An existing file is replaced as a whole, or stays as it is if writing fails.

    Args:
        path: The file; its folder is made.
        state_dict: Tensors by name, on any device.
        hyper_parameters: Any values; see `plain_values`.
        prefix: Take only the tensors whose name begins with it, and cut it off: `"net."` makes the file one for `net`.

    Returns:
        The path.

    Raises:
        OSError: It could not be written, for example on a full disk.
        MisconfigurationException: Another suffix, safetensors is not installed, or no tensor has the prefix.

    Example:
        >>> import tempfile
        >>> net = torch.nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = export_weights(f"{folder}/net.pt", net.state_dict(), {"width": 2})
        ...     state, hyper_parameters = load_weights(path)
        >>> net.load_state_dict(state)
        <All keys matched successfully>
        >>> hyper_parameters
        {'width': 2}
    """
    path = Path(path)
    _check_suffix(path)
    plain, dropped = plain_values(hyper_parameters or {})
    named = {clean_name(name): value for name, value in state_dict.items()}
    found = {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
    dropped += [name for name, value in found.items() if not isinstance(value, Tensor)]
    tensors, aliases = _separate({name: value for name, value in found.items() if isinstance(value, Tensor)})
    if prefix and not tensors:
        begin = sorted({name.partition(".")[0] for name in named})
        raise MisconfigurationException(f"export_weights: no tensor's name begins with {prefix!r}, but with {begin}")
    if path.suffix == ".pt":
        # Aliases are the same object, which torch stores once.
        every = {name: tensors[aliases.get(name, name)] for name in found if name in tensors or name in aliases}
        content = {"state_dict": every, "hyper_parameters": plain, "dropped": dropped}
        _write(path, lambda temporary: _save_pt(content, temporary))
        return path
    from safetensors.torch import save_file

    metadata = {"format": "pt", "hyper_parameters": json.dumps(plain)}
    metadata |= {"dropped": json.dumps(dropped), "aliases": json.dumps(aliases)}
    _write(path, lambda temporary: save_file(tensors, temporary, metadata))
    return path


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of `export_weights`; torch is all it takes, and safetensors for that format.

    Returns:
        The tensors on the CPU under all their names, for `load_state_dict`; and the plain hyperparameters.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no file of weights.
        MisconfigurationException: Another suffix, or safetensors is not installed.
    """
    path = Path(path)
    _check_suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".pt":
        content = _load(path, weights_only=True)
        return dict(content["state_dict"]), dict(content.get("hyper_parameters", {}))
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise ValueError(f"{path}: not a file of weights ({error})") from error
    state |= {name: state[stored] for name, stored in json.loads(metadata.get("aliases", "{}")).items()}
    return state, json.loads(metadata.get("hyper_parameters", "{}"))


def _load(path: Path, weights_only: bool) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=weights_only)
    except OSError:
        raise
    except Exception as error:  # of any class, where it is no file of torch
        refused = re.search(r"GLOBAL (\S+)", str(error)) if weights_only else None
        if refused:
            reason = f"holds an object of {refused[1]}, which is read from trusted files only (weights_only=False)"
        else:
            reason = f"not a file of torch.save ({type(error).__name__}: {' '.join(_reason(error).split())[:100]})"
        raise ValueError(f"{path}: {reason}") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), Mapping):
        return content
    raise ValueError(f"{path}: expected a checkpoint or a file of weights, which has a 'state_dict'")


def checkpoint_weights(path: str | Path, *, weights_only: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read `state_dict` and `hyper_parameters` of a Lightning checkpoint; with an EMA the former is the average.

    Args:
        path: The checkpoint, a file.
        weights_only: False also loads objects of any class, which runs code from the file: for your own files only.

    Returns:
        Both as they are stored, ready for `export_weights`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no checkpoint, or it holds objects of other classes.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    content = _load(path, weights_only)
    return dict(content["state_dict"]), dict(content.get("hyper_parameters", {}))


class WeightsExport(Callback):
    """Write the weights as one file that needs no Lightning, at the end of a fit that was not interrupted.

    The file holds what the module holds then: with `EMA` or Lightning's `WeightAveraging` the average. Beside it are
    the plain values of the module's `hparams`. `load_weights` reads it back; see `export_weights` for the format. A
    file of the same name is replaced. On demand, from any checkpoint: `python -m lit_callbacks.export CHECKPOINT FILE`.

    Under several processes the first one writes. A file that cannot be written is a warning, since the training is
    done. Nothing is written under `fast_dev_run`.

    Args:
        dirpath: Local folder; by default the logger's, or `default_root_dir`.
        filename: Name without suffix.
        format: "safetensors", "pt", or "auto": the former if it is installed.
        when: "end" writes `<filename>` from the module after the fit, "best" writes `<filename>_best` from the
            checkpoint callback's best file, "both" does both.
        prefix: Take only the tensors whose name begins with it, and cut it off: `net.` makes the file one for `net`.

    Attributes:
        artifacts: Files written by the last fit.

    Example:
        >>> export = WeightsExport(when="both", prefix="net.")
        >>> trainer = Trainer(callbacks=[export], accelerator="cpu", logger=False)
        >>> export.artifacts
        []
    """

    def __init__(
        self,
        dirpath: str | None = None,
        filename: str = "weights",
        format: Literal["auto", "safetensors", "pt"] = "auto",
        when: Literal["end", "best", "both"] = "end",
        prefix: str = "",
    ) -> None:
        if format not in ("auto", "safetensors", "pt"):
            raise MisconfigurationException(f"WeightsExport: format expected auto, safetensors or pt, got {format!r}")
        if when not in ("end", "best", "both"):
            raise MisconfigurationException(f"WeightsExport: when expected end, best or both, got {when!r}")
        if not filename or Path(filename).name != filename or filename.endswith((".pt", ".safetensors")):
            raise MisconfigurationException(
                f"WeightsExport: filename expected a name without folder and suffix, got {filename!r}"
            )
        self.dirpath = dirpath
        self.filename = filename
        self.format = format
        self.when = when
        self.prefix = prefix
        self.artifacts: list[Path] = []
        self._finished = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse before the training what could not be done after it."""
        self._finished = False
        if stage != "fit" or getattr(trainer, "fast_dev_run", False):
            return
        if self.format == "safetensors" and find_spec("safetensors") is None:
            raise MisconfigurationException(f"WeightsExport: format safetensors needs the package, {_INSTALL}")
        if self.when != "end" and trainer.checkpoint_callback is None:
            raise MisconfigurationException(
                f"WeightsExport: when expected 'end' without a checkpoint callback, which knows the best, "
                f"got {self.when!r}"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last fit."""
        self.artifacts = []

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the fit ended by itself, which `teardown` alone does not tell: tuners reach it too."""
        self._finished = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the files. Here every callback has left in the module what it leaves there."""
        if stage != "fit" or not self._finished or getattr(trainer, "fast_dev_run", False):
            return
        self._finished = False
        # Both ask the other processes.
        folder = Path(self.dirpath or trainer.log_dir or trainer.default_root_dir)
        state = trainer.strategy.lightning_module_state_dict() if self.when != "best" else {}
        if not trainer.is_global_zero:
            return
        if self.when != "best":
            self._write(folder / self.filename, lambda: (state, pl_module.hparams))
        if self.when != "end":
            best = getattr(trainer.checkpoint_callback, "best_model_path", "")
            if best:
                # This run's own file, whose hyperparameters may be of any class.
                self._write(folder / f"{self.filename}_best", lambda: checkpoint_weights(best, weights_only=False))
            else:
                rank_zero_warn("WeightsExport: the checkpoint callback has saved no file, so there is no best one.")

    def _write(self, stem: Path, content: Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Any]]]) -> None:
        safe = self.format == "safetensors" or (self.format == "auto" and find_spec("safetensors") is not None)
        path = stem.with_name(f"{stem.name}.safetensors" if safe else f"{stem.name}.pt")
        try:
            state, hyper_parameters = content()
            self.artifacts.append(export_weights(path, state, hyper_parameters, prefix=self.prefix))
        except (OSError, ValueError, MisconfigurationException) as error:
            rank_zero_warn(f"WeightsExport: {error}. {_BY_HAND}")
