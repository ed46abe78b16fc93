"""What every test needs: one thread, and a cache folder that is not the user's."""

import os

import pytest
import torch

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
