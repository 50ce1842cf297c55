"The console scripts take MDL-Toolkit's command lines, with its options, meanings and defaults"
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_origin

import pytest

from mdl_nbdev.base import settings
from mdl_nbdev.base.command_line import from_args, option_groups, parser
from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.options import option, required_options
from mdl_nbdev.base.settings import ConvertSettings, InferSettings, MergeSettings, ServeSettings, TrainSettings

HALF = max(1, min(32, len(os.sched_getaffinity(0)) // 2))
DEFAULT_MODEL = "mispeech/midashenglm-7b-1021-bf16"
# MDL-Toolkit's options and defaults, from its command-line reference; the default model and the limit of an answer are ours
SHARED = dict(from_modelscope=False, tokenizing_batch_size=8, num_workers=HALF, system_prompt=None, user_prompt=None, base_dir=None)
TRAIN = SHARED | dict(
    model_name=DEFAULT_MODEL, eval_dataset=[], lr=1e-4, lora_rank=32, lora_alpha=32, lora_dropout=0.0, train_target=["encoder", "projector", "decoder"],
    num_epochs=1.0, warmup_steps=0, batch_size=8, gradient_accumulation_steps=1, gradient_checkpointing="auto", bf16=None, quantization=None, eval_steps=500, save_steps=500,
    eval_batch_size=None, eval_accumulation_steps=None, report_to=[], resume_from_checkpoint=None, save_total_limit=None, merge_lora=True)
COMMANDS = {
    "mdl_train": (TrainSettings, "--train-dataset a.csv --output out", TRAIN),
    "mdl_convert": (ConvertSettings, "a.csv --output out", SHARED | dict(model_name=DEFAULT_MODEL)),
    "mdl_infer": (InferSettings, "a.csv --output out.csv --model-name m", SHARED | dict(batch_size=32, max_length=None, max_new_tokens=None)),
}


def help_of(prog): return subprocess.run([sys.executable, "-c", f"from mdl_nbdev.cli.commands import {prog}; {prog}(['--help'])"], capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "1000"}).stdout


@pytest.mark.parametrize("prog", COMMANDS)
def test_options_have_their_defaults_and_stand_in_the_help(prog):
    cls, line, defaults = COMMANDS[prog]
    s, text = from_args(cls, line.split(), prog), re.sub(r"\n {20,}", "  ", help_of(prog))
    for name, default in defaults.items():
        assert getattr(s, name) == default, name
        shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else (",".join(default) or "none") if isinstance(default, list) else str(default)
        assert re.search(rf"^ *--{name.replace('_', '-')} .*\[{re.escape(shown)}\]$", text, re.M), (name, shown)


@pytest.mark.parametrize("prog", ["mdl_train", "mdl_convert", "mdl_infer", "mdl_merge", "mdl_check", "mdl_eval", "mdl_review", "mdl_compare", "mdl_serve", "mdl_demo"])
def test_every_option_is_explained(prog):
    text = help_of(prog)
    cls = {p: getattr(settings, p[4:].capitalize() + "Settings") for p in [prog]}[prog]
    for group in option_groups(cls).values():
        for name, what in group.items(): assert what and what in text, name


LINES = {
    "convert": ("mdl_convert path/to/input.csv --output path/to/output/", ConvertSettings, dict(input=Path("path/to/input.csv"), output=Path("path/to/output"))),
    "train": ("mdl_train --train-dataset path/to/converted/train/ --eval-dataset path/to/converted/eval/ --output path/to/output/", TrainSettings, dict(eval_dataset=[Path("path/to/converted/eval")])),
    "train, tuned": ("mdl_train --lr 1e-4 --lora-rank 32 --train-dataset t --output o --train-target encoder --train-target lm_head --quantization 4bit --bf16 true --eval-steps 0.1 --save-steps 100 "
                     "--merge-lora false --resume-from-checkpoint true --report-to wandb --report-to tensorboard --num-epochs 0.5 --user-prompt null",
                     TrainSettings, dict(train_target=["encoder", "lm_head"], quantization="4bit", bf16=True, eval_steps=0.1, save_steps=100, merge_lora=False, resume_from_checkpoint=True,
                                         report_to=["wandb", "tensorboard"], num_epochs=0.5, user_prompt=None)),
    "train, resumed at a path": ("mdl_train --train-dataset t --output o --resume-from-checkpoint o/checkpoint-5", TrainSettings, dict(resume_from_checkpoint=Path("o/checkpoint-5"))),
    "infer": ("mdl_infer path/to/input.csv --output path/to/output.csv --model-name model_name_or_path --max-length 128", InferSettings, dict(model_name="model_name_or_path", max_length=128)),
    "underscores and =": ("mdl_train --train_dataset=t --output=o --lora_rank=8 --train-target=encoder,decoder", TrainSettings, dict(lora_rank=8, train_target=["encoder", "decoder"])),
}


@pytest.mark.parametrize("case", LINES)
def test_command_lines_of_mdl_toolkit(case):
    line, cls, want = LINES[case]
    s = from_args(cls, line.split()[1:], line.split()[0])
    assert {k: getattr(s, k) for k in want} == want


BAD = {
    "unknown option": ("--train-dataset t --output o --lora-rnk 8", "unknown option --lora-rnk; did you mean --lora-rank?"),
    "another tool's name": ("--train-dataset t --output o --learning-rate 1", "unknown option --learning-rate; did you mean --lr?"),
    "MFTCoder's data": ("--data-paths t --output o", "unknown option --data-paths; did you mean --train-dataset?"),
    "MFTCoder's model": ("--pretrained-model-path m", "unknown option --pretrained-model-path; did you mean --model-name?"),
    "MFTCoder's tuning": ("--peft-type lora", "unknown option --peft-type; did you mean --tuning?"),
    "MFTCoder's checkpoints": ("--checkpointing-steps 5", "unknown option --checkpointing-steps; did you mean --save-steps?"),
    "no guess": ("--train-dataset t --output o --frobnicate 8", "unknown option --frobnicate; mdl_train --help lists the options"),
    "abbreviation": ("--train-dataset t --output o --lora-ran 8", "unknown option --lora-ran; did you mean --lora-rank?"),
    "no value": ("--train-dataset t --output", "argument --output: expected one argument"),
    "boolean": ("--train-dataset t --output o --bf16 yes", "--bf16: got 'yes', expected true|false or null"),
    "choice": ("--train-dataset t --output o --train-target head", "--train-target: got ['head'], expected encoder|projector|decoder|embed_tokens|lm_head"),
    "range": ("--train-dataset t --output o --lora-rank 0", "--lora-rank: got 0, expected at least 1"),
    "workers": (f"--train-dataset t --output o --num-workers {10**21}", "--num-workers: got 1000000000000000000000, expected less than 1000"),
    "steps": ("--train-dataset t --output o --eval-steps 2.5", "--eval-steps: got 2.5, expected a whole number of steps, or a fraction below 1"),
    "infinite": ("--train-dataset t --output o --lr inf", "--lr: got 'inf', expected a number"),
    "too small": ("--train-dataset t --output o --lr 1e-400", "--lr: got '1e-400', expected a number; it is too small to be told from 0"),
    "too small in a mapping": ("--train-dataset t --output o --task-weights a=1e-999", "got 'a=1e-999', expected name=a number; it is too small to be told from 0"),
    "underscore": ("--train-dataset t --output o --max-steps 1_000", "--max-steps: got '1_000', expected a whole number or null; write it as 1000"),
    "other digits": ("--train-dataset t --output o --eval-steps ٥٠", "--eval-steps: got '٥٠', expected a whole number or a number; write it as 50"),
    "a long number": (f"--train-dataset t --output o --max-steps {'9'*6000}", "999..., expected a whole number or null"),
    "a batch that no memory holds": (f"--train-dataset t --output o --batch-size {10**20}", "--batch-size: got 100000000000000000000, expected at most 1000000"),
    "no learning": ("--train-dataset t --output o --lr 0", "--lr: got 0.0, expected more than 0"),
    "no epoch": ("--train-dataset t --output o --num-epochs 0", "--num-epochs: got 0.0, expected more than 0"),
    "no learning of B": ("--train-dataset t --output o --loraplus-lr-ratio 0", "--loraplus-lr-ratio: got 0.0, expected more than 0"),
    "a seed that NumPy does not take": (f"--train-dataset t --output o --seed {2**32}", "--seed: got 4294967296, expected less than 4294967296"),
    "missing": ("--output o", "missing: --train-dataset"),
    "extra": ("t --train-dataset t --output o", "unexpected argument 't'"),
    "config": ("--config nowhere.yaml", "nowhere.yaml: cannot read"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_lines_name_what_is_wrong(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line, why = BAD[case]
    with pytest.raises(InputError) as e: from_args(TrainSettings, line.split(), "mdl_train")
    assert why in str(e.value)


CONFIGS = {
    "two colons": ("lr: 1: 2", "not valid YAML or JSON: mapping values are not allowed here in line 1, column 6"),
    "an open list": ("train_target: [a, b\nlr: 1", "while parsing a flow sequence in line 1, column 15"),
    "key": ("lora-rnk: 8", "unknown setting lora_rnk; did you mean lora_rank?"),
    "another tool's key": ("learning_rate: 1", "unknown setting learning_rate; did you mean lr?"),
    "no guess": ("frobnicate: 1", "unknown setting frobnicate; mdl --help lists the options"),
    "type": ("lora_rank: [8]", "--lora-rank: got [8], expected a whole number"),
    "boolean": ("bf16: 1", "--bf16: got 1, expected true|false or null"),
    "syntax": ("a: [", "not valid YAML or JSON"),
    "shape": ("- lora_rank", "expected settings"),
    "twice": ("lr: 1e-3\nmax_steps: 2\nlr: 1e-2", "the key lr occurs twice, the second time in line 3; keep one"),
    "twice inside": ("task_weights: {a: 1, a: 2}", "the key a occurs twice"),
    "octal": ("seed: 0o17", "--seed: got '0o17', expected a whole number"),
    "minutes": ("seed: 1:30", "--seed: got '1:30', expected a whole number"),
    "underscore": ("seed: 1_000", "--seed: got '1_000', expected a whole number; write it as 1000"),
    "too small": ("lr: 1.0e-400", "--lr: got '1.0e-400', expected a number; it is too small"),
    "no learning": ('{"lr": 0.0}', "--lr: got 0.0, expected more than 0"),
    "twice in JSON": ('{"lr": 1, "lr": 2}', "the key lr occurs twice"),
    "list as a key": ("? [1, 2]\n: 3", "a key that is not a text, in line 1"),
    "no such day": ("lr: 2024-99-99", "not valid YAML or JSON: month must be"),
    "long number": (f"lr: {'9'*6000}", "not valid YAML or JSON"),
    "number that no float holds": (f"lr: {'9'*400}", "--lr: got 9999"),
    "deep": ("["*3000, "not valid YAML or JSON"),
    "aliases": ("lr: &a 1\nmin_lr: *a", "aliases (*name) are not supported"),
}


def test_keys_of_yaml_are_what_is_written(tmp_path):
    "Names of tasks that YAML would read as booleans, numbers and null"
    (tmp_path/"c.yaml").write_text("task_weights: {no: 1, 2024: 2, 1.50: 3, null: 4, y: 5}\nmerge_lora: no\ntrain_dataset: [t]\noutput: o")
    s = from_args(TrainSettings, ["--config", str(tmp_path/"c.yaml")])
    assert s.task_weights == {"no": 1, "2024": 2, "1.50": 3, "null": 4, "y": 5} and s.merge_lora is False


@pytest.mark.parametrize("text, value", [("0", 0), ("010", 10), ("+7", 7), ("17", 17), ("'17'", 17)])
def test_whole_numbers_of_yaml_are_what_is_written(text, value, tmp_path):
    (tmp_path/"c.yaml").write_text(f"seed: {text}\ntrain_dataset: t\noutput: o")
    assert from_args(TrainSettings, ["--config", str(tmp_path/"c.yaml")]).seed == value


@pytest.mark.parametrize("case", CONFIGS)
def test_bad_configuration_files(case, tmp_path):
    text, why = CONFIGS[case]
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError) as e: from_args(TrainSettings, ["--config", str(tmp_path / "c.yaml"), "--train-dataset", "t", "--output", "o"])
    assert why in str(e.value) and "unicode string" not in str(e.value)


def test_what_has_a_place_has_no_option():
    with pytest.raises(InputError, match="unknown option --adapter; adapter is given without it: mdl_merge ADAPTER"):
        from_args(MergeSettings, ["--adapter", "a", "--output", "o"], "mdl_merge")


def test_the_usage_shows_what_is_required():
    p = parser(MergeSettings, "mdl_merge")
    assert p.format_help().replace("\n", " ").startswith("usage: mdl_merge [-h] --output PATH [--model-name TEXT]") and "BOOL] [--config FILE]" in p.format_usage()
    assert p.format_usage().split()[-1] == "ADAPTER"


def test_options_win_over_the_configuration_file(tmp_path):
    (tmp_path / "c.yaml").write_text("train-dataset: t.csv\noutput: o\nlr: 1e-3\nlora_rank: 8\ntrain_target: [encoder]\nbf16: null\n")
    s = from_args(TrainSettings, ["--config", str(tmp_path / "c.yaml"), "--lora-rank", "4"])
    assert (s.lr, s.lora_rank, s.train_target, s.bf16, s.train_dataset) == (1e-3, 4, ["encoder"], None, [Path("t.csv")])


def numeric_options():
    "Each option that takes numbers, of each command"
    for cls in vars(settings).values():
        if not (isinstance(cls, type) and cls.__name__.endswith("Settings") and dataclasses.is_dataclass(cls)): continue
        for f in dataclasses.fields(cls):
            if cls.__module__ == settings.__name__ and not {int, float}.isdisjoint([f.type, *get_args(f.type)]): yield cls, f


@pytest.mark.parametrize("cls, f", list(numeric_options()), ids=lambda x: getattr(x, "__name__", None) or x.name)
def test_absurd_numbers_are_refused(cls, f):
    "What no option can mean: infinite, not a number, and beyond 64 bits, where libraries raise or wrap around"
    required = dict.fromkeys(required_options(cls), "x")
    for text in ["100000000000000000000", "1e30", "1e308", "inf", "nan", "9"*5000]:
        given = f"a={text}" if get_origin(f.type) is dict else text
        with pytest.raises(InputError, match=f"^{option(f.name)}: got .*, expected ") as e: cls(**required | {f.name: given})
        assert len(str(e.value)) < 300


LIMITS = {TrainSettings: dict(seq_length=10**8, num_epochs=1e7, task_sampling={"a": 1e5}, batch_size=10**7),
    InferSettings: dict(max_new_tokens=10**8, max_length=10**8, num_beams=1001, temperature=1e-30, repetition_penalty=1e-30, seed=2**32),
    ServeSettings: dict(max_new_tokens=10**8, timeout=1e7, port=65536)}

@pytest.mark.parametrize("cls, name", [(cls, name) for cls, values in LIMITS.items() for name in values])
def test_numbers_that_would_fill_the_memory_or_give_nonsense(cls, name):
    with pytest.raises(InputError, match=f"{option(name)}: got .*, expected (at|less)"): cls(**dict.fromkeys(required_options(cls), "x") | {name: LIMITS[cls][name]})
