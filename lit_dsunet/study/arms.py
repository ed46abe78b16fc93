"""What a study compares: arms as options over one profile, and the factors that they are made of."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from lit_cli.errors import InputError

__all__ = ["Arms", "LrRule", "batch_arms", "guide_arms", "option", "read_arms", "steps_of_an_epoch"]

LrRule = Literal["linear", "sqrt", "constant"]

# Options that change which random numbers the first weights get, so that these cannot be the same in all arms.
BUILDS_ANEW = ("arch", "strides", "kernels", "features", "encoder_blocks", "decoder_blocks", "encoder", "decoder")


@dataclass(frozen=True)
class Arms:
    """The arms of a study.

    Attributes:
        options: Per arm, values by option, such as `{"model.mkdc": "skips"}`.
        reference: The arm that the others are compared with.
        factors: Per factor, pairs (arm without, arm with) that differ in nothing else.
        claim: What a sentence says there is no evidence for, where there is none.
    """

    options: dict[str, dict[str, Any]]
    reference: str
    factors: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    claim: str = "it helps"

    def check(self, where: str = "arms") -> None:
        """Refuse names that lead nowhere."""
        names = ", ".join(self.options)
        if not self.options:
            raise InputError(f"{where}: no arm, expected options by name of the arm")
        for name, options in self.options.items():
            if not name or not all(c.isalnum() or c in "_.+" for c in name):
                raise InputError(f"{where}: arm {name!r}: expected letters, digits, _ . and + (it names a folder)")
            for key in options:
                if key.split(".")[0] not in ("model", "data", "trainer", "ema") or "." not in key:
                    raise InputError(f"{where}: arm {name}: option {key!r}: expected one such as model.mkdc")
        if self.reference not in self.options:
            raise InputError(f"{where}: reference {self.reference!r} is no arm; arms are {names}")
        for factor, pairs in self.factors.items():
            for arm in (arm for pair in pairs for arm in pair):
                if arm not in self.options:
                    raise InputError(f"{where}: factor {factor}: {arm!r} is no arm; arms are {names}")

    def only(self, names: Sequence[str]) -> Arms:
        """Some of the arms, with the factors that they still determine."""
        for name in names:
            if name not in self.options:
                raise InputError(f"--arms {name}: no such arm; arms are {', '.join(self.options)}")
        options = {name: values for name, values in self.options.items() if name in names}
        factors = {
            factor: pairs
            for factor, pairs in self.factors.items()
            if all(a in options and b in options for a, b in pairs)
        }
        reference = self.reference if self.reference in options else next(iter(options))
        return Arms(options, reference, factors, self.claim)

    @property
    def same_start(self) -> bool:
        """Whether layers that arms share begin with the same weights for the same seed."""
        keys = {key.removeprefix("model.") for options in self.options.values() for key in options}
        return keys.isdisjoint(BUILDS_ANEW)

    @property
    def same_order(self) -> bool:
        """Whether all arms see the same patches in the same order."""
        return not any(key.startswith("data.") for options in self.options.values() for key in options)


def guide_arms(config: Mapping[str, Any]) -> Arms:
    """Baseline, MKDC, deep supervision, and both.

    Args:
        config: The profile: its place of MKDC and its number of heads are taken, where it has them on.

    Example:
        >>> arms = guide_arms({"model": {"mkdc": "off", "deep_supervision": 2}})
        >>> arms.options["mkdc_ds"]
        {'model.mkdc': 'skips', 'model.deep_supervision': 2}
    """
    model = config["model"]
    place = "skips" if model["mkdc"] == "off" else model["mkdc"]
    heads = model["deep_supervision"] or 3
    options = {
        name: {"model.mkdc": mkdc, "model.deep_supervision": ds}
        for name, mkdc, ds in (
            ("baseline", "off", 0),
            ("mkdc", place, 0),
            ("ds", "off", heads),
            ("mkdc_ds", place, heads),
        )
    }
    factors = {"MKDC": [("baseline", "mkdc"), ("ds", "mkdc_ds")], "DS": [("baseline", "ds"), ("mkdc", "mkdc_ds")]}
    return Arms(options, "baseline", factors)


def batch_arms(config: Mapping[str, Any], batches: Sequence[int], rules: Sequence[LrRule], steps: int) -> Arms:
    """Batch sizes at equal numbers of optimizer steps.

    Args:
        config: The profile: the rate of another batch size follows from its own batch size and rate.
        batches: Patches per step.
        rules: How the rate grows with the batch: `linear`, `sqrt` or `constant`.
        steps: Of an epoch, the same for all.

    Example:
        >>> profile = {"data": {"batch_size": 8}, "model": {"lr": 0.01}}
        >>> arms = batch_arms(profile, [2, 8], ["sqrt"], steps=50)
        >>> arms.reference, arms.options["batch2"]
        ('batch8', {'data.batch_size': 2, 'data.steps_per_epoch': 50, 'model.lr': 0.005})
    """
    own, lr = config["data"]["batch_size"], config["model"]["lr"]
    power = {"linear": 1.0, "sqrt": 0.5, "constant": 0.0}
    options: dict[str, dict[str, Any]] = {}
    for batch in sorted({*batches}):
        if batch < 1:
            raise InputError(f"--batches: expected numbers from 1, got {batch}")
        for rule in rules:
            name = f"batch{batch}" if len(rules) == 1 or batch == own else f"batch{batch}_{rule}"
            rate = float(f"{lr * (batch / own) ** power[rule]:.6g}")  # as it will stand in the file
            options[name] = {"data.batch_size": batch, "data.steps_per_epoch": steps, "model.lr": rate}
    if not options:
        raise InputError("--batches: expected at least one number")
    reference = f"batch{own}" if f"batch{own}" in options else next(iter(options))
    return Arms(options, reference, claim="it hurts")


def steps_of_an_epoch(config: Mapping[str, Any], training_cases: int) -> int:
    """Steps of the profile's own epoch, of so many training cases.

    >>> steps_of_an_epoch({"data": {"steps_per_epoch": None, "patches_per_volume": 10, "batch_size": 8,
    ...     "drop_last": True}}, 4)
    5
    """
    data = config["data"]
    if data["steps_per_epoch"] is not None:
        return int(data["steps_per_epoch"])
    steps = training_cases * data["patches_per_volume"] / data["batch_size"]
    return max(1, math.floor(steps) if data["drop_last"] else math.ceil(steps))


class _Loader(yaml.SafeLoader):
    """YAML 1.2 in this respect: off and on are words, as `model.mkdc: off` means one."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool" or first in "tTfF"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_arms(path: str | Path) -> Arms:
    """Arms from a YAML file.

    It has `arms`, options by name of the arm; `reference`, by default the first arm; and, if effects are to be put
    together, `factors`, pairs [arm without, arm with] by name of the factor.

    Args:
        path: The file.

    Raises:
        InputError: No such file, or another form.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise InputError(f"{path}: cannot read this file ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}, expected YAML") from None
    arms = content.get("arms") if isinstance(content, dict) else None
    if not isinstance(arms, dict) or not all(isinstance(v, dict | None) for v in arms.values()):
        raise InputError(f"{path}: expected arms: {{name: {{option: value}}}}")
    unknown = sorted(set(content) - {"arms", "reference", "factors", "claim"})
    if unknown:
        raise InputError(f"{path}: {unknown[0]}: expected only arms, reference, factors and claim")
    factors = content.get("factors") or {}
    try:
        pairs = {str(name): [(str(a), str(b)) for a, b in value] for name, value in factors.items()}
    except (TypeError, ValueError, AttributeError):
        raise InputError(f"{path}: factors: expected {{name: [[arm without, arm with], ...]}}") from None
    options = {str(name): {str(k): v for k, v in (values or {}).items()} for name, values in arms.items()}
    found = Arms(
        options, str(content.get("reference", next(iter(options), ""))), pairs, content.get("claim", "it helps")
    )
    found.check(str(path))
    return found


def option(key: str, value: Any) -> str:
    """An option as the command line takes it.

    >>> option("model.mkdc", "off"), option("model.tta", [0, 1]), option("data.fold", None)
    ('--model.mkdc=off', '--model.tta=[0, 1]', '--data.fold=null')
    """
    return f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
