"The README in both languages: made from its notebook, the same code and the same outputs"
import sys
from pathlib import Path

import nbformat
import pytest

root = Path(__file__).parent.parent
sys.path.insert(0, str(root/"docs"))
import readme  # noqa: E402


@pytest.mark.parametrize("notebook", readme.READMES)
def test_readme_is_its_notebook(notebook):
    assert (root/readme.READMES[notebook]).read_text(encoding="utf-8") == readme.readme(root/"nbs"/notebook)


def test_both_languages_show_the_same_code_and_outputs():
    english, chinese = ([(c.source, c.outputs) for c in nbformat.read(root/"nbs"/n, 4).cells if c.cell_type == "code"] for n in readme.READMES)
    assert [source for source, _ in english] == [source for source, _ in chinese]
    assert english == chinese and any(outputs for _, outputs in english)


def test_both_languages_have_the_same_structure():
    def structure(name): return [c.cell_type + "#" * c.source.startswith("#") + "|" * c.source.count("\n| ") for c in nbformat.read(root/"nbs"/name, 4).cells]
    assert structure("index.ipynb") == structure("index_zh.ipynb")
