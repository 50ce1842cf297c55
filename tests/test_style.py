"The style of code and notebooks: `python tests/style.py --places` shows where a limit is exceeded"
import io
import re
import tokenize
from pathlib import Path

import pytest
from nbformat import read
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, writes
from style import measure

LIMITS = { # what is allowed, never to be raised
    "line width, 95th percentile": 110,
    "line width, maximum": 140,
    "private functions, %": 30,
    "lines of a module": 400,
    "lines of an exported cell": 40,
    "exported cells in a row": 3,
    "private names of several modules": 0}
A = """# %% a line of nbdev, which does not count
__all__ = ['neither does this line, though it is longer than the others']
_a, b = 1, 2
class A:
    def _m(self): pass
@patch
def _p(self:A, u, v, w, x, *, y, z, t): return 1 if u else 2 if v else 3
def f():
    def _inner(): raise KeyError
"""
CODE = ["#| default_exp a", "#| export\n_a = 1", "#| hide\n_a", "#|exporti\nx = 2\ny = 3", "x", "#| export\nz = 4"]


def test_limits():
    measures = measure()
    assert set(LIMITS) == {name for name, m in measures.items() if m.goal is not None}
    over = {name: (measures[name].value, limit) for name, limit in LIMITS.items() if measures[name].value > limit}
    assert not over, "{rule: (now, allowed)}"


def test_counts(tmp_path):
    notebook = new_notebook(cells=[*map(new_code_cell, CODE), new_markdown_cell("It is told. That was all of it.")])
    files = {"mdl_nbdev/base/a.py": A, "mdl_nbdev/b.py": "def _a(): pass\ndef _p(): pass\n",
             "mdl_nbdev/_modidx.py": "x = 1\n"*900, "nbs/0_base/0_a.ipynb": writes(notebook)}
    for file, text in files.items():
        (tmp_path/file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/file).write_text(text, encoding="utf-8")
    measures = measure(tmp_path)
    assert [m.value for m in measures.values()][:13] == [72, 72, 80, 9, 2, 2, 1, 0, 1, 0, 1, 0, 4]
    assert measures["private names of several modules"].places == [(2, "_a: b.py, base/a.py")]
    assert measures[r"wording \btold\b(?! apart)"].places == [(1, "0_base/0_a.ipynb cell 6")]


root = Path(__file__).parent.parent
pages = [*sorted(p for p in (root/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts), *sorted((root/"docs").glob("*.md")),
         *(root/p for p in ("CHANGELOG.md", "benchmarks/README.md", "examples/README.md"))]
BRITISH = re.compile(r"\b(\w*colour\w*|behaviour\w*|\w*labell(ed|ing)|(cancel|travel|signal|model)l(ed|ing)|centr(e|es|ed)|grey\w*|spelt|learnt|towards"
    r"|neighbour\w*|favour\w*|honour\w*|licen[c]e[sd]?|catalogues?|artefacts?|judgements?|whilst|analys(e|es|ed|ing)"
    r"|(normal|initial|token|optim|recogn|serial|summar|organ|general|special|quant|util|synchron|parallel|random|minim|maxim|visual|memor|character|emphas)is(e|es|ed|ing|ation)\w*)\b", re.I)


def prose(cell):
    "What a cell says in words: Markdown, comments and docstrings, without code and the names in backticks"
    if cell.cell_type == "code":
        try: tokens = list(tokenize.generate_tokens(io.StringIO(cell.source).readline))
        except (tokenize.TokenError, IndentationError): return "" # a shell command
        starts = (tokenize.INDENT, tokenize.NEWLINE, tokenize.NL)
        return "\n".join(t.string for last, t in zip(tokens, tokens[1:]) if t.type == tokenize.COMMENT or t.type == tokenize.STRING and last.type in starts)
    return re.sub(r"^(    |```).*$|\]\([^)]*\)", "", cell.source, flags=re.M)


@pytest.mark.parametrize("path", pages, ids=[str(p.relative_to(root)) for p in pages])
def test_spelling_is_american(path):
    texts = map(prose, read(path, 4).cells) if path.suffix == ".ipynb" else [path.read_text(encoding="utf-8")]
    found = [m[0] for text in texts for m in BRITISH.finditer(re.sub(r"`[^`\n]*`", "", text))]
    assert not found
