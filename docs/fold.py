"""`python docs/fold.py [NBS]`: fold, in JupyterLab, the code that is not part of a notebook's text

Cells marked `#| hide` or `#| echo: false` open folded, so that a chapter begins with what it shows. Their outputs stay visible.
"""
import re
import sys
from pathlib import Path

import nbformat

FOLDED = {"jupyter": {"source_hidden": True}}


def is_aside(cell): return cell.cell_type == "code" and re.match(r"(#\|.*\n)*#\| *(hide|echo: *false)\b", cell.source)


def fold(path):
    "Fold a notebook's asides, and unfold the rest; whether anything changed"
    nb = nbformat.read(path, 4)
    before = [dict(c.metadata) for c in nb.cells]
    for c in nb.cells: c.metadata = nbformat.from_dict(FOLDED if is_aside(c) else {})
    if changed := before != [dict(c.metadata) for c in nb.cells]: nbformat.write(nb, path)
    return changed


if __name__ == "__main__":
    for path in sorted(Path(*sys.argv[1:] or [Path(__file__).parent.parent/"nbs"]).rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts and fold(path): print(path)
