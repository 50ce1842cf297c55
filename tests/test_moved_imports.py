"What could be imported from version 0.1.0, whose modules were flat, still can; and the short imports of notebooks"
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mdl_nbdev import _moved

root = Path(__file__).parent.parent
nothing = "nothing" # a name that no module has


def fresh(code):
    "What a fresh interpreter prints"
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert r.returncode == 0, r.stderr
    return r.stdout


@pytest.mark.parametrize("module", _moved.MODULES)
def test_old_imports(module):
    old = importlib.import_module(f"mdl_nbdev.{module}")
    names = _moved.MODULES[module].split()
    missing = []
    for name in names:
        try: getattr(old, name)
        except (AttributeError, KeyError): missing.append(name)
    assert sorted(missing) == sorted(n for n in names if n in _moved.REMOVED)
    assert old.__all__ == [n for n in names if n not in _moved.REMOVED], "for `import *`"
    assert set(names) <= set(dir(old))


def test_tables_have_no_stale_entries():
    old = {name for names in _moved.MODULES.values() for name in names.split()}
    assert {*_moved.RENAMED, *_moved.REMOVED} <= old
    assert not set(_moved.REMOVED) & set(_moved.RENAMED)
    assert not set(_moved.CONSTANTS) & set(_moved.homes()), "nbdev's index knows where these are"
    assert all(len(why) > 10 for why in _moved.REMOVED.values()), "what to use instead"


def test_what_is_gone_says_so():
    for module, names in _moved.MODULES.items():
        for name in set(names.split()) & set(_moved.REMOVED):
            with pytest.raises(AttributeError, match="is gone"): getattr(importlib.import_module(f"mdl_nbdev.{module}"), name)
    with pytest.raises(AttributeError, match="mdl_nbdev.config.*no attribute 'nothing'"): getattr(importlib.import_module("mdl_nbdev.config"), nothing)
    with pytest.raises(ImportError): importlib.import_module("mdl_nbdev.nothing")


def test_short_imports():
    import mdl_nbdev
    assert len(set(mdl_nbdev.__all__)) == len(mdl_nbdev.__all__)
    for name in mdl_nbdev.__all__: assert getattr(mdl_nbdev, name) is not None and name in dir(mdl_nbdev)
    with pytest.raises(AttributeError): getattr(mdl_nbdev, nothing)


def test_all_names_for_notebooks():
    "`import *` binds every name, and those that need torch can be looked at and called like the functions that they stand for"
    import mdl_nbdev
    names = {}
    exec("from mdl_nbdev.all import *", names)
    assert {n: names[n] for n in mdl_nbdev.__all__} == {n: getattr(mdl_nbdev, n) for n in mdl_nbdev.__all__}
    for name in mdl_nbdev._CALLED_LATER:
        assert inspect.signature(names[name]) == inspect.signature(_moved.find(name)) and names[name].__doc__ == _moved.find(name).__doc__
    with pytest.raises(mdl_nbdev.InputError, match="no such folder"): names["load_model"]("./nothing")


@pytest.mark.parametrize("name", ["check", "train", "infer", "evaluate", "demo"])
def test_functions_with_the_name_of_a_module(name):
    "`from mdl_nbdev import train` gave a module, and gives something that can be called as well"
    import mdl_nbdev
    short = getattr(mdl_nbdev, name)
    function = getattr(short, name)
    assert inspect.isfunction(function) and inspect.signature(short) == inspect.signature(function)
    assert [p.annotation.__name__.removesuffix("Settings").lower() for p in inspect.signature(short).parameters.values()][0] == {"evaluate": "eval"}.get(name, name)


def test_short_imports_are_light():
    "Names of functions are loaded when they are used, and settings load nothing heavy"
    code = """import json, sys
from mdl_nbdev import train, infer, evaluate, check, demo, TrainSettings, InferSettings, EvalSettings, CheckSettings, InputError
import mdl_nbdev.cli
from mdl_nbdev.base.imports import waiting
TrainSettings(train_dataset='a.csv', output='b')
print(json.dumps(sorted({'torch', 'transformers', 'peft', 'pandas', 'datasets'} & {m.split('.')[0] for m in sys.modules} - {*waiting})))"""
    assert json.loads(fresh(code)) == []


def test_commands_are_named_as_functions():
    "A message that tells the shell what to run tells a notebook what to call"
    import mdl_nbdev
    from mdl_nbdev.base.errors import python_spelling
    from mdl_nbdev.cli import commands
    for name in (n for n in commands.__all__ if n.startswith("mdl_")):
        spelt = python_spelling(f"runs/{name}/a.csv: run {name}, then {name} again.")
        function = spelt.split()[2].removesuffix("(),")
        assert callable(getattr(mdl_nbdev, function)) and spelt == f"runs/{name}/a.csv: run {function}(), then {function}() again."


def test_a_call():
    code = """from mdl_nbdev import check, CheckSettings, InputError
try: check(CheckSettings(input='nothing.csv'))
except InputError as e: print(e)"""
    assert "nothing.csv" in fresh(code)


def test_tokenizers_in_the_place_of_chats(tmp_path):
    "By position or by name, with the module names of 0.1.0; a chat is taken too"
    from mdl_nbdev.chat import load_tokenizer
    from mdl_nbdev.config import ConvertSettings
    from mdl_nbdev.dataset import convert, limit_length, open_dataset, open_mix

    from mdl_nbdev.model.families import load_chat
    rows, tok, other = tmp_path/"in.jsonl", load_tokenizer("tiny-text"), dict(model_name="tiny-text", num_workers=1)
    rows.write_text('{"prompt": "dog", "answer": "d o g"}\n{"prompt": "a", "answer": "a"}\n')
    assert convert(ConvertSettings(input=rows, output=tmp_path/"data", **other), tok=tok).rows == 2
    given = [open_dataset(tmp_path/"data", tok, tmp_path/"cache"), open_dataset(rows, tok=tok, cache=tmp_path/"cache", **other), open_dataset(rows, load_chat("tiny-text"), tmp_path/"cache", **other)]
    assert len({tuple(ds[0].input_ids) for ds in given}) == 1
    mix = open_mix([rows], tok, tmp_path/"mix", **other)
    assert len(limit_length(mix, int(mix.n_tokens.min()), "reject", tok)[0]) == 1
    with pytest.raises(TypeError, match="tokens"): convert(ConvertSettings(input=rows, output=tmp_path/"more", **other), tokens=tok)


def test_listeners(tmp_path):
    "They see rows with the fields of 0.1.0; callbacks see those of today"
    from mdl_nbdev import InferSettings, infer
    rows, seen = tmp_path/"in.jsonl", []
    rows.write_text('{"prompt": "dog", "answer": "d o g"}\n')
    def listener(questions, done, total): seen.append((questions[0].answer, questions[0].cut, questions[0].row.prediction, done, total))
    def callback(rows, done, total): seen.append((rows[0].prediction, rows[0].truncated, rows[0].reference, done, total))
    for name, kw in dict(a=dict(listeners=[listener]), b=dict(callbacks=[callback]), c={}).items():
        infer(InferSettings(input=rows, output=tmp_path/f"{name}.jsonl", model_name="tiny-text", max_new_tokens=4, num_workers=1), **kw)
    assert len(seen) == 2 and seen[0] == seen[1] and seen[0][0] and seen[0][1:] == (True, "d o g", 1, 1)


def test_names_that_two_modules_had():
    "Other modules had functions and classes of the same names"
    from mdl_nbdev.losses import count_labels

    from mdl_nbdev.train import ProgressLine
    assert count_labels.__module__ == "mdl_nbdev.train.losses" and ProgressLine.__module__ == "mdl_nbdev.train.callbacks"


def test_console_scripts_of_version_0_1_0():
    "Their names were `mdl_nbdev.cli:mdl_train` and so on"
    from mdl_nbdev import cli
    from mdl_nbdev.cli import commands
    for name in _moved.MODULES["cli"].split(): assert getattr(cli, name) is getattr(commands, name)
    settings = (root/"settings.ini").read_text()
    for name in _moved.MODULES["cli"].split(): assert f"{name}=mdl_nbdev.cli.commands:{name}" in settings


def test_import_statements():
    code = """import PACKAGE.config
from PACKAGE.data import CsvFile
from PACKAGE.config import *
from PACKAGE.cli import mdl_check
import PACKAGE.audio as audio
assert PACKAGE.config.TrainSettings is TrainSettings
from PACKAGE.base.settings import TrainSettings as now
assert now is TrainSettings
try: mdl_check(['nothing.csv'])
except SystemExit as e: print(e.code, CsvFile.__name__, callable(audio.load_audio))""".replace("PACKAGE", "mdl_nbdev") # in one piece: tools that rewrite imports must leave these alone
    assert fresh(code).split() == ["2", "CsvFile", "True"]
