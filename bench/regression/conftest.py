"""--new-baseline: write what is measured to baseline.json instead of comparing with it."""

import pytest
import torch

import prunekern as pk
from bench.regression import ratios


def pytest_addoption(parser):
    parser.addoption("--new-baseline", action="store_true", help="write the ratios measured now to baseline.json")


class Expected:
    """What each case has to reach; `known` is None where it is being written."""

    def __init__(self, known: dict[str, float] | None):
        self.known, self.measured = known, {}


@pytest.fixture(scope="session")
def expected(request):
    isa = pk.info()["isa"]
    if request.config.getoption("--new-baseline"):
        writing = Expected(None)
        yield writing
        ratios.write(isa, {"torch": torch.__version__}, writing.measured)
        return
    known = ratios.read(isa)
    if not known:
        pytest.skip(f"baseline.json has nothing for this CPU's instruction set ({isa}): write it with --new-baseline")
    yield Expected(known)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)
