"What the package imports is what settings.ini requires"
import ast
import re
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

root = Path(__file__).parent.parent
settings = (root/"settings.ini").read_text(encoding="utf-8")
# Imported only where the user asks for them by an option or a launcher; an extra or a launcher's own installation brings them
OPTIONAL = {"modelscope": "modelscope", "bitsandbytes": "quantization", "av": "media", "deepspeed": None,
            "whisper_normalizer": "metrics", "cn2an": "metrics", "sacrebleu": "metrics", "starlette": "serve", "uvicorn": "serve", "vllm": "vllm"}


def requirements(key):
    "Distribution names that a list in settings.ini requires, normalised"
    line = re.search(rf"^{key} *= *(.*)$", settings, re.M)[1]
    return {re.match(r"[\w.-]+", r)[0].lower().replace("_", "-"): r for r in line.split()}


def imported_names():
    "Top-level name -> the files of the package that import it"
    found = {}
    for path in sorted((root/"mdl_nbdev").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import): names = [a.name for a in node.names]
            if isinstance(node, ast.ImportFrom) and not node.level: names = [node.module]
            for name in names: found.setdefault(name.partition(".")[0], set()).add(path.relative_to(root).as_posix())
    return {k: v for k, v in found.items() if k not in sys.stdlib_module_names and k != "mdl_nbdev"}


def providers():
    "Top-level name -> the distributions that install it, normalised (`packages_distributions` of Python 3.10 misses most)"
    found = {}
    for d in distributions():
        for name in {Path(f).parts[0].partition(".")[0] for f in d.files or () if Path(f).suffix in (".py", ".so")}:
            found.setdefault(name, set()).add(d.metadata["Name"].lower().replace("_", "-"))
    return found


names, provided_by = imported_names(), providers()


@pytest.mark.parametrize("name", names)
def test_every_import_is_declared(name):
    declared = requirements("requirements")
    if name in OPTIONAL:
        extra = OPTIONAL[name]
        assert extra is None or name.replace("_", "-") in requirements(f"{extra}_requirements")
        assert name not in declared
    else: assert provided_by[name] & set(declared), f"imported by {sorted(names[name])}"


@pytest.mark.parametrize("requirement", requirements("requirements"))
def test_every_requirement_is_imported(requirement):
    assert [name for name in names if requirement in provided_by.get(name, ())]


def test_fastcore_has_no_upper_bound():
    "fastai needs 2.x and the development tools 1.14.5; the package runs with both"
    assert requirements("requirements")["fastcore"] == "fastcore>=1.12.3"
    assert "fastcore==1.14.5" in (root/"constraints.txt").read_text().split()
