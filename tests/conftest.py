"""What every test needs: one thread, and a cache folder that is not the user's."""

import os

import pytest
import torch

from tests.helpers import profiles

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # before anything imports albumentations


@pytest.fixture(scope="session", autouse=True)
def _one_thread_and_no_user_cache(tmp_path_factory):
    """Several processes of the suite may share few cores, and tests must leave nothing in the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # for processes that tests start
        patch.setenv("LIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)


@pytest.fixture
def torch_settings():
    """Global settings of torch, which profiles change, as they were."""
    with profiles.torch_settings_restored():
        yield


@pytest.fixture(scope="module")
def profile_benchmark():
    """`benchmarks/profiles.py`."""
    with profiles.benchmark_of_profiles() as module:
        yield module
