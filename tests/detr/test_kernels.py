"""The kernels of attention and matching, in Triton's interpreter and on a GPU."""

from pathlib import Path

import pytest
import torch

from tests.helpers.interpreter import passes_in_the_interpreter, passes_on_the_gpu

CASES = [Path(__file__).with_name(f"{name}_kernel_cases.py") for name in ("attention", "matching")]


def test_in_the_interpreter():
    passes_in_the_interpreter(*CASES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    passes_on_the_gpu(*CASES)
