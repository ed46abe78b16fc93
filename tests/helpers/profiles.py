"""What the tests of every task's profiles look at: the header, the content and the printed configuration of a file."""

import importlib.util
import shlex
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[2]


def header(path):
    return path.read_text().split("\nseed_everything")[0].splitlines()


def commands(path):
    """The command lines of a header, as argument lists without the program's name."""
    text = "\n".join(line.removeprefix("#").strip() for line in header(path) if line.startswith("#   "))
    return [shlex.split(line)[1:] for line in text.replace("\\\n", " ").splitlines()]


def content(path):
    return yaml.safe_load(path.read_text())


def flat(value, prefix=""):
    """Nested keys joined by dots; milestones and lists of anything but groups stay whole."""
    groups = isinstance(value, dict) or (isinstance(value, list) and isinstance(next(iter(value), None), dict))
    if not value or not groups or prefix.endswith("milestones."):
        return {prefix[:-1]: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, inner in items for k, v in flat(inner, f"{prefix}{key}.").items()}


def differences(a, b):
    """Keys in which two profiles differ."""
    here, there, missing = flat(content(a)), flat(content(b)), object()
    return {k for k in here.keys() | there.keys() if here.get(k, missing) != there.get(k, missing)}


def check_header(path):
    """Card, the guide's expectation, two lines that the benchmark writes, and the command to start with."""
    lines = header(path)
    assert lines[0].startswith("# Card: ")
    assert lines[1].startswith("# expected (guide): ")
    assert [i for i, line in enumerate(lines) if line.startswith("# measured: ")] == [2, 3]
    assert all(line.startswith("#") for line in lines)
    assert any(
        ["fit", "--config", f"configs/{path.parent.name}/{path.name}"] == command[:3] for command in commands(path)
    )


def printed(path, parser, capsys):
    """The configuration that `--print_config` shows, as text."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        parser.parse_args(["fit", "--config", str(path), "--print_config"])
    assert not done.value.code
    return capsys.readouterr().out


def check_prints_itself(path, parser, folder, capsys):
    """What `--print_config` shows is a configuration that shows the same; it is returned as a file."""
    copy = folder / "printed.yaml"
    copy.write_text(printed(path, parser, capsys))
    assert printed(copy, parser, capsys) == copy.read_text()
    return copy


def check_best_and_last(path, monitor):
    """A checkpoint for the best and one to resume from; the other callbacks' names."""
    best, last, *others = content(path)["trainer"]["callbacks"]
    assert best == {"class_path": "ModelCheckpoint", "init_args": {"monitor": monitor, "mode": "max"}}
    options = {"filename": "last", "enable_version_counter": False, "save_on_exception": True}
    assert last == {"class_path": "ModelCheckpoint", "init_args": options}
    return [c["class_path"].rpartition(".")[2] for c in others]


def changed_lines(old, new):
    """Numbers of the lines in which two files of equal length differ, from 0."""
    pairs = zip(old.read_text().splitlines(), new.read_text().splitlines(), strict=True)
    return [i for i, (a, b) in enumerate(pairs) if a != b]


@contextmanager
def benchmark_of_profiles():
    """`benchmarks/profiles.py` as a module; it imports its neighbours by their bare names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        spec = importlib.util.spec_from_file_location("benchmark_of_profiles", ROOT / "benchmarks" / "profiles.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@contextmanager
def torch_settings_restored():
    """One thread inside, and afterwards the global settings of before, which profiles change."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    benchmark, tf32 = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = benchmark, tf32
