"Every notebook runs top to bottom in a Jupyter kernel, in whichever folder of nbs/ the kernel starts, and prints what it has stored"
import difflib
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.slow
nbs = Path(__file__).parent.parent/"nbs"
notebooks = sorted(p for p in nbs.rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(nbs).parts))

BAR = re.compile(r'<div style="max-width:520px"><div.*?<small>[^<]*</small></div>', re.S)
VARYING = [ # what differs between two runs, and what stands for it
    (r"^Converted data: .*", ""),
    (r"data:[^\"')]*", "data"), (r"/tmp/[\w./-]+", "path"), (r"\b(0x)?[0-9a-f]{7,}\b", "digest"), (r"[\d.,:]*\d[\d.,:e%-]*", "0"),
    (r"0 ?(s/\w+|\w+/s)", "speed"), (r"[▁-█▉-▏]+", "bar"), (r"\s+", " ")]


def printed(cell):
    "The lines of a cell's texts and tables, without pictures, widgets, warnings, and what differs between two runs"
    text = ""
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if output.get("name") == "stderr" or any(kind.startswith(("image", "application")) for kind in data): continue
        text += output.get("text") or data.get("text/html") or data.get("text/markdown") or data.get("text/plain", "")
    lines = BAR.sub("", text).replace(">", ">\n").splitlines()
    for pattern, stand_in in VARYING: lines = [re.sub(pattern, stand_in, line).strip() for line in lines]
    return [line for line in lines if line]


@pytest.mark.parametrize("path", notebooks, ids=[str(p.relative_to(nbs)) for p in notebooks])
def test_runs_in_another_folder(path, monkeypatch):
    "nbdev_test starts each in its own folder; here the chapters start among the tutorials, and the tutorials among the chapters"
    monkeypatch.setenv("IN_TEST", "1") # or their last cells would write the package, while other tests run it
    nb = nbformat.read(path, 4)
    nb.cells = [c for c in nb.cells if not re.search(r"^#\| *(eval: *false|gpu|data)\b", c.source, re.M)]
    stored = [printed(c) for c in nb.cells]
    NotebookClient(nb, timeout=600, kernel_name="python3", resources=dict(metadata=dict(path=nbs if path.parent != nbs else nbs/"tutorials"))).execute()
    assert all(c.execution_count for c in nb.cells if c.cell_type == "code" and c.source.strip())
    stale = ["\n".join([c.source[:200], *difflib.unified_diff(was, printed(c), "stored", "printed now", n=0, lineterm="")])
             for c, was in zip(nb.cells, stored) if was != printed(c) and "#| slow" not in c.source] # those may answer otherwise elsewhere
    assert not stale, "\n\n".join(stale)
