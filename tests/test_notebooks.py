"Every notebook runs top to bottom in a Jupyter kernel, in whichever folder of nbs/ the kernel starts"
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.slow
nbs = Path(__file__).parent.parent/"nbs"
notebooks = sorted(p for p in nbs.rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(nbs).parts))


@pytest.mark.parametrize("path", notebooks, ids=[str(p.relative_to(nbs)) for p in notebooks])
def test_runs_in_another_folder(path, monkeypatch):
    "nbdev_test starts each in its own folder; here the chapters start among the tutorials, and the tutorials among the chapters"
    monkeypatch.setenv("IN_TEST", "1") # or their last cells would write the package, while other tests run it
    nb = nbformat.read(path, 4)
    nb.cells = [c for c in nb.cells if not re.search(r"^#\| *(eval: *false|gpu|data)\b", c.source, re.M)]
    NotebookClient(nb, timeout=600, kernel_name="python3", resources=dict(metadata=dict(path=nbs if path.parent != nbs else nbs/"tutorials"))).execute()
    assert all(c.execution_count for c in nb.cells if c.cell_type == "code" and c.source.strip())
