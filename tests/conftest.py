"`@pytest.mark.slow` tests run with `--slow` only (`make test-slow`); modules that ask for `one_thread` compute with one"
import pytest


def pytest_addoption(parser): parser.addoption("--slow", action="store_true", help="run the slow tests too")


def pytest_configure(config): config.addinivalue_line("markers", "slow: takes long; runs under `make test-slow`")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"): return
    for item in items:
        if "slow" in item.keywords: item.add_marker(pytest.mark.skip(reason="slow: make test-slow"))


@pytest.fixture(scope="module")
def one_thread():
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
