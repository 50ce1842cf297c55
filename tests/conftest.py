"`@pytest.mark.slow` tests run with `--slow` only (`make test-slow`); modules that ask for `one_thread` compute with one"
import gc
import os
import shutil
import tempfile

import fsspec
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1") # before the hub's client is imported: no test needs the network
cache = tempfile.TemporaryDirectory()
os.environ["MDL_CACHE"] = cache.name


def pytest_addoption(parser): parser.addoption("--slow", action="store_true", help="run the slow tests too")


def pytest_configure(config): config.addinivalue_line("markers", "slow: takes long; runs under `make test-slow`")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"): return
    for item in items:
        if "slow" in item.keywords: item.add_marker(pytest.mark.skip(reason="slow: make test-slow"))


def pytest_terminal_summary(terminalreporter):
    "Show what tests have recorded as their `summary`, such as the counts of a series"
    reports = [r for outcome in ("passed", "failed") for r in terminalreporter.stats.get(outcome, []) if r.when == "call"]
    lines = [line for r in reports for name, line in r.user_properties if name == "summary"]
    if lines: terminalreporter.section("series")
    for line in lines: terminalreporter.write_line(line)


@pytest.fixture(scope="module", autouse=True)
def frozen():
    "What a module has imported is out of reach of the garbage collector, which each training run calls"
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def one_thread():
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def browser():
    "Chromium, with a microphone that it pretends to have"
    chromium = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
    if not chromium: pytest.skip("no Chromium: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium, args=flags)
        yield b
        b.close()


@pytest.fixture
def memory():
    "The memory of this process as a store"
    store = fsspec.filesystem("memory")
    yield store
    store.store.clear()
    store.pseudo_dirs[:] = [""]
