"The rules of the notebooks and of the package that can be counted"
import ast
import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from fastcore.docments import docments
from IPython.core.inputtransformer2 import TransformerManager

root = Path(__file__).parent.parent
sys.path.insert(0, str(root/"docs"))
import fold  # noqa: E402

package = root/"mdl_nbdev"
notebooks = sorted(p for p in (root/"nbs").rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(root).parts))
modules = sorted(".".join(p.relative_to(package).with_suffix("").parts) for p in package.rglob("*.py") if not p.stem.startswith("_") and p != package/"all.py") # those from notebooks
light = ["", ".all", *(f".{m}" for m in modules if m.startswith(("base.", "data.")) or m in ("model.chat", "model.collate", "train.dataset", "train.batches", "cli.commands"))]
commands = [line.split("=")[0] for line in (root/"settings.ini").read_text().split("console_scripts = ")[1].split("\n\n")[0].split()]
each_notebook = pytest.mark.parametrize("path", notebooks, ids=[str(p.relative_to(root/"nbs")) for p in notebooks])


def read(path): return nbformat.read(path, 4).cells
def code_cells(path): return [c for c in read(path) if c.cell_type == "code"]
def directive(cell, *names): return re.search(rf"^#\| *({'|'.join(names)})\b", cell.source, re.M)
def exported(cell): return directive(cell, "export", "exporti", "exports")
def number(path):
    "The numbers of a chapter's part and of the chapter in it; None for other notebooks"
    part, chapter = re.match(r"(\d)_[a-z]+$", path.parent.name), re.match(r"(\d\d)_[a-z_0-9]+\.ipynb$", path.name)
    return (int(part[1]), int(chapter[1])) if part and chapter else None


def tree(cell): return ast.parse(TransformerManager().transform_cell(cell.source)) # magics and shell commands become calls


def imported(cell):
    "The modules of this package that a cell imports, at any depth of it"
    for node in ast.walk(tree(cell)):
        names = []
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
        for name in names:
            if (m := re.match(r"mdl_nbdev\.(\w+\.\w+)", name)) and m[1] in modules: yield m[1]


def default_exp(path): return next((m[1] for c in code_cells(path) if (m := re.search(r"^#\| *default_exp +(\S+)", c.source, re.M))), None)


order = {default_exp(p): number(p) for p in notebooks if default_exp(p)}


def test_every_module_has_one_numbered_notebook():
    assert sorted(order) == modules
    assert all(order.values()), "a notebook that exports has a number"
    assert len(set(order.values())) == len(order), "a number names one notebook"
    assert len([p for p in notebooks if default_exp(p)]) == len(order), "a module comes from one notebook"


@each_notebook
def test_imports_follow_the_numbers(path):
    if not number(path): return
    looks_ahead = r"echo: *false" # a chapter may open with what later chapters make of it
    wrong = [(i, m) for i, c in enumerate(code_cells(path)) if not directive(c, looks_ahead) for m in imported(c) if order[m] > number(path)]
    assert not wrong, "imports from a notebook with a higher number: (code cell, module)"


def test_a_chapter_exports_to_its_part():
    parts = {p.parent.name for p in notebooks if number(p)}
    assert sorted(parts) == ["0_base", "1_data", "2_model", "3_train", "4_infer", "5_cli"]
    assert not [p for p in notebooks if default_exp(p) and default_exp(p).split(".")[0] != p.parent.name[2:]]


@each_notebook
def test_exported_code_imports_from_chapters(path):
    "Neither by the short names of the package nor from modules of version 0.1.0: both would hide the order of the chapters"
    wrong = []
    for cell in filter(exported, code_cells(path)):
        for node in ast.walk(tree(cell)):
            found = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom): found = [f"{node.module}.{a.name}" for a in node.names if a.name != "__version__"]
            wrong += [name for name in found if name.startswith("mdl_nbdev.") and not any(name == f"mdl_nbdev.{m}" or name.startswith(f"mdl_nbdev.{m}.") for m in modules)]
    assert not wrong


@each_notebook
def test_size(path):
    assert len(read(path)) <= 120
    long = {c.source.split("\n")[1]: n for c in code_cells(path) if exported(c) and (n := len(c.source.splitlines())) > 45}
    assert not long, "an exported cell has at most 45 lines"


@each_notebook
def test_title_and_subtitle(path):
    first = read(path)[0]
    assert first.cell_type == "markdown"
    assert re.match(r"# \S.*\n+> \S", first.source), "a notebook opens with `# Title` and `> subtitle`"


def shows(cell):
    "True if the last statement of a cell surely displays something: a value that is not a call, or a call of print or display"
    last = tree(cell).body[-1:]
    if not last or not isinstance(last[0], ast.Expr) or cell.source.rstrip().endswith(";"): return False
    value = last[0].value
    if isinstance(value, ast.Call): return getattr(value.func, "id", "") in ("print", "display")
    return not isinstance(value, (ast.Constant, ast.Await, ast.Yield))


@each_notebook
def test_outputs_are_stored(path):
    lessons = [c for c in code_cells(path) if not directive(c, "hide", "export", "exporti", "default_exp", "gpu", r"eval: *false")]
    assert not [c.source for c in lessons if shows(c) and not c.outputs], "a lesson's output is missing: run the notebook"
    if lessons: assert any(c.outputs for c in lessons)


@each_notebook
def test_outputs_are_clean(path):
    outputs = [o for c in code_cells(path) for o in c.outputs]
    assert not [o.evalue for o in outputs if o.output_type == "error"]
    assert not [o.text for o in outputs if o.get("name") == "stderr" and "Warning" in o.text]


@each_notebook
def test_metadata_is_clean(path):
    nb = nbformat.read(path, 4)
    assert set(nb.metadata) <= {"kernelspec"}, "what widgets know is not saved: their HTML is"
    wrong = [c.source for c in nb.cells if c.metadata != (fold.FOLDED if fold.is_aside(c) else {})]
    assert not wrong, "cells whose code is not part of the text are folded, and no others: python docs/fold.py"
    assert not [c.source for c in nb.cells if c.get("execution_count")]


@each_notebook
def test_no_machine_paths(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [line[:160] for line in lines if re.search(r"(?<![\w./~-])/(work|root|home|Users)/\w", line) and "base64" not in line]
    assert not found, "a path of one machine"


def public(module):
    "The public functions and classes that a module defines"
    m = importlib.import_module(f"mdl_nbdev.{module}")
    objects = [getattr(m, name) for name in m.__all__]
    return [o for o in objects if (inspect.isfunction(o) or inspect.isclass(o)) and o.__module__ == m.__name__ and not o.__name__.startswith("_")]


def own_parameters(o):
    "The parameters that a function or class declares itself, in so many words: not what it inherits, *args or **kwargs"
    if dataclasses.is_dataclass(o): return set(inspect.get_annotations(o))
    if inspect.isclass(o) and "__init__" not in vars(o): return set()
    varying = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {k for k, p in inspect.signature(o).parameters.items() if p.kind not in varying}


def undocumented(o):
    "The parameters of a function or class that have no comment"
    names = own_parameters(o)
    return [k for k, comment in docments(o, returns=False).items() if k in names and not comment] if names else []


@pytest.mark.parametrize("module", modules)
def test_public_names_are_documented(module):
    no_docstring = [o.__name__ for o in public(module) if not vars(o).get("__doc__") and not (inspect.isfunction(o) and o.__doc__)]
    assert not no_docstring, "no docstring"
    missing = {o.__name__: names for o in public(module) if (names := undocumented(o))}
    assert not missing, "parameters without a docments comment"


def test_a_public_name_means_one_thing():
    homes = {}
    for module in modules:
        for o in public(module): homes.setdefault(o.__name__, []).append(module)
    several = {name: found for name, found in homes.items() if len(found) > 1}
    assert not several, "several modules define a public function or class of this name"


heavy = {"torch", "transformers", "peft", "accelerate"}


def loaded(code):
    "The top-level modules that have run in a fresh interpreter after `code`"
    code = f"import sys\n{code}\nfrom mdl_nbdev.base.imports import waiting\nprint(); print(*{{m.split('.')[0] for m in sys.modules if m not in waiting}})"
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert r.returncode == 0, r.stderr
    return set(r.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("module", light)
def test_light_imports(module): assert not heavy & loaded(f"import mdl_nbdev{module}")


def test_watch_is_light():
    "It follows the runs of other processes, and never loads a model"
    assert not {*heavy, "datasets", "pandas", "pyarrow", "matplotlib", "IPython", "ipywidgets"} & loaded("from mdl_nbdev import watch, read_metrics, TrainReport, CheckReport")


def test_package_import_is_light(): assert not {*heavy, "datasets", "pandas", "numpy"} & loaded("import mdl_nbdev")


@pytest.mark.parametrize("command", commands)
def test_help_is_light(command):
    code = f"from mdl_nbdev.cli.commands import {command}\nsys.argv = ['{command}', '--help']\ntry: {command}()\nexcept SystemExit as e: assert not e.code, e"
    assert not {*heavy, "datasets", "pandas", "matplotlib"} & loaded(code)
