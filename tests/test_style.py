"The style of code and notebooks: `python tests/style.py --places` shows where a limit is exceeded"
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
