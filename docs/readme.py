"`python docs/readme.py [notebook] [README]`: write the README from nbs/index.ipynb: its prose, its code and the outputs stored in it."
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).parent.parent


def readme(
    notebook:Path, # The notebook, its outputs stored
)->str: # Markdown without hidden cells and directives
    "Render `notebook` as the README"
    nb = nbformat.read(notebook, 4)
    nb.metadata.language_info = {"name": "python"}
    nb.cells = [c for c in nb.cells if not re.search(r"^#\| *(hide|default_exp)\b", c.source, re.M)]
    for c in nb.cells: c.source = re.sub(r"^#\| .*\n?", "", c.source, flags=re.M) if c.cell_type == "code" else c.source
    text, resources = MarkdownExporter().from_notebook_node(nb)
    if resources["outputs"]: raise SystemExit(f"{notebook}: the README can't carry images yet, show text or a table")
    text = text.replace("](images/", "](nbs/images/")
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    notebook, out = map(Path, sys.argv[1:] or [root/"nbs"/"index.ipynb", root/"README.md"])
    out.write_text(readme(notebook), encoding="utf-8")
