"""The callbacks in an environment that has torch, lightning and what these two need, and nothing else."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import lit_callbacks
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SCRIPT = Path(__file__).parents[2] / "examples" / "plug_in.py"
ABSENT = (
    *("lit_cli", "lit_landmarks", "timm", "segmentation_models_pytorch", "albumentations", "cv2", "torchvision"),
    *("matplotlib", "scipy", "jsonargparse", "tensorboard", "safetensors", "rich", "PIL", "pytest"),
)
# Runs the script, then says what it imported from outside of the environment, or should not have found in it.
CHILD = """
import json, runpy, sys, sysconfig
script, folder, absent = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
sys.argv = [script, folder]
runpy.run_path(script, run_name="__main__")
from importlib.util import find_spec
print(json.dumps({"imported": sorted(m for m in absent if m in sys.modules),
                  "there": sorted(m for m in absent if find_spec(m))}))
"""


def needed(*names):
    """Distributions with everything that they need, by their own statement."""
    found, todo = {}, [Requirement(name) for name in names]
    while todo:
        requirement = todo.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in found:
            continue
        try:
            distribution = importlib.metadata.distribution(requirement.name)
        except importlib.metadata.PackageNotFoundError:  # optional on this platform, or another name for torch
            continue
        found[name, extras] = distribution
        for text in distribution.requires or ():
            other = Requirement(text)
            environments = [{"extra": extra} for extra in ("", *extras)]
            if other.marker is None or any(other.marker.evaluate(e) for e in environments):
                todo.append(other)
    return found.values()


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A folder that holds links to the needed packages only, and to lit_callbacks."""
    folder = tmp_path_factory.mktemp("only")
    for distribution in needed("torch", "lightning"):
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            link = folder / top
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(top))))
    (folder / "lit_callbacks").symlink_to(Path(lit_callbacks.__file__).parent)
    return folder


def test_a_strangers_project_runs_with_all_callbacks(environment, tmp_path):
    # -S leaves out the site-packages of this interpreter.
    done = subprocess.run(
        [sys.executable, "-S", "-c", CHILD, str(SCRIPT), str(tmp_path / "run"), json.dumps(ABSENT)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(environment), "PATH": os.environ["PATH"], "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert json.loads(lines[-1]) == {"imported": [], "there": []}
    assert any(line.startswith("error without Lightning:") for line in lines)
    assert any(line.startswith("peak reserved") for line in lines)

    files = {path.relative_to(tmp_path / "run").name: path for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {"weights.pt", "last.ckpt", "metrics.csv"} <= files.keys()  # without safetensors and tensorboard
    pictures = [name for name in files if name.endswith(".png")]
    assert sum("first" in name for name in pictures) == 4
    assert sum("worst" in name for name in pictures) == 4
