"""The kernels of attention and matching in Triton's interpreter, asked for before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = [str(Path(__file__).with_name(f"{name}_kernel_cases.py")) for name in ("attention", "matching")]


def test_in_the_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", *CASES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    assert pytest.main(["-q", "-n", "0", "-p", "no:cacheprovider", str(CASES)]) == 0
