"""What every test starts from: one thread, a fixed seed. What several start from: a folder."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_fixed_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def saved(tmp_path):
    """A folder with a compact DistilBERT, half of it gone."""
    # Not above: tests of kernels run where transformers is missing (bench/gpu/everything.py).
    import prunekern as pk
    from tests.helpers.compact_folders import small_model

    pk.save(small_model(), tmp_path / "m")
    return tmp_path / "m"
