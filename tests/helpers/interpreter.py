"""Kernels on a CPU: in Triton's interpreter, which has to be asked for before Triton is imported."""

import os
import subprocess
import sys

import pytest


def passes_in_the_interpreter(*cases):
    """Run files of tests in a process of their own; none of them may be left out."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", *map(str, cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout


def passes_on_the_gpu(*cases):
    """The same files on a CUDA device."""
    assert pytest.main(["-q", "-n", "0", "-p", "no:cacheprovider", *map(str, cases)]) == 0
