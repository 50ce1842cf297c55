"`python docs/readme.py [NBS] [FOLDER]`: write README.md and README_zh.md from nbs/index.ipynb and nbs/index_zh.ipynb: prose, code and stored outputs."
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


READMES = {"index.ipynb": "README.md", "index_zh.ipynb": "README_zh.md"} # Notebook in nbs/ -> file

if __name__ == "__main__":
    nbs, out = map(Path, sys.argv[1:] or [root/"nbs", root])
    for notebook, name in READMES.items(): (out/name).write_text(readme(nbs/notebook), encoding="utf-8")
