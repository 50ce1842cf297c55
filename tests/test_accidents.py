"Double starts, inputs in the way of outputs, damage, and things that change between two starts of a run"
import dataclasses
import gzip
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
import training_runs
import yaml
from transformers import TrainerCallback

import mdl_nbdev
from mdl_nbdev import ConvertSettings, DemoSettings, EvalSettings, InferSettings, MergeSettings, ReviewSettings, TrainSettings, convert, infer, train
from mdl_nbdev.base import files
from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.files import file_lock
from mdl_nbdev.cli import commands
from mdl_nbdev.cli.demo import demo_folder
from mdl_nbdev.data import audio
from mdl_nbdev.data.audio import load_audio
from mdl_nbdev.data.remote import fetch
from mdl_nbdev.data.sounds import make_sounds
from mdl_nbdev.infer import output, review
from mdl_nbdev.infer.output import InferOutput
from mdl_nbdev.model.collate import Batch
from mdl_nbdev.model.save import merge_adapter
from mdl_nbdev.train.dataset import AudioDataset
from mdl_nbdev.train.loop import TaskTrainer
from mdl_nbdev.train.report import TrainReport, model_card

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A folder with sounds, a model in full, an adapter of `tiny`, and a converted dataset"
    folder = tmp_path_factory.mktemp("made")
    csv = make_sounds(folder, 12, seed=1)
    s = settings(csv, folder/"run", base_dir=folder)
    train(s)
    train(dataclasses.replace(s, output=folder/"adapted", merge_lora=False))
    convert(ConvertSettings(input=csv, output=folder/"converted", model_name="tiny", base_dir=folder, num_workers=1))
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, made, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "LOCK_SECONDS", 0)
    shutil.copytree(made/"sounds", "sounds")
    shutil.copy(made/"sounds.csv", "sounds.csv")


def settings(csv, output, **options):
    base = dict(model_name="tiny", max_steps=4, save_steps=2, batch_size=4, num_workers=1, gradient_checkpointing=False)
    return TrainSettings(train_dataset=csv, output=output, **base | options)

def asked(**options):
    base = dict(input="sounds.csv", output="out.csv", model_name="tiny", max_new_tokens=2, batch_size=1, num_workers=1)
    return InferSettings(**base | options)

def everything(folder="."): return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(Path(folder).rglob("*"))}


# One run at a time

def each_command(made):
    "Settings of each command, and the lock of its output"
    return {
        "infer": (asked(), "out.csv.part.lock"),
        "convert": (ConvertSettings(input="sounds.csv", output="set", model_name="tiny", num_workers=1), "set.lock"),
        "train": (settings("sounds.csv", "run"), "run/.lock"),
        "merge_adapter": (MergeSettings(adapter=made/"adapted"/"final", output="merged"), "merged.lock"),
        "evaluate": (EvalSettings(input="sounds.csv", reference=made/"sounds.csv", output="m.json"), "m.json.lock"),
        "demo": (DemoSettings(output="demo"), "demo.lock")}

@pytest.mark.parametrize("name", ["infer", "convert", "train", "merge_adapter", "evaluate", "demo"])
def test_a_second_start_is_refused_before_it_writes(made, name):
    s, lock = each_command(made)[name]
    Path(lock).parent.mkdir(exist_ok=True)
    with file_lock(lock):
        before = everything()
        with pytest.raises(InputError, match=rf"another process is writing this \(process {os.getpid()} on \S+, since .*\); wait"):
            getattr(mdl_nbdev, name)(s)
        assert everything() == before
    assert not Path(lock).exists()


def test_joining_needs_file_locks(monkeypatch, tmp_path):
    "Neither some network file systems nor Windows have any; Windows has no module fcntl either"
    monkeypatch.setattr(files, "open_locked", lambda path, shared=False: open(path, "a+b"))
    monkeypatch.setitem(sys.modules, "fcntl", None)
    def begin(): raise AssertionError
    with pytest.raises(InputError, match=f"--join: {tmp_path} has no file locks, .*; choose an --output on a file system that has them, not on Windows"):
        with files.shared_lock(tmp_path/"set.lock", begin): pass
    assert not (tmp_path/"set.lock").exists()


def test_a_lock_outlives_its_killed_process_only_by_its_workers(monkeypatch):
    "A restart right after a kill waits for the workers of the killed process, which may still write"
    code = ("import os, sys, time; from mdl_nbdev.base.files import lock_file; f = lock_file('x.lock')\n"
            "if os.fork()==0: time.sleep(1.5); os._exit(0)\nprint('locked', flush=True); time.sleep(60)")
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    p.stdout.readline()
    p.kill()
    p.wait()
    with pytest.raises(InputError, match=f"process {p.pid} on"): files.lock_file("x.lock")
    monkeypatch.setattr(files, "LOCK_SECONDS", 10)
    files.lock_file("x.lock").close()


def shorten_demo():
    "In a process of its own: a demo of a few clips"
    mdl_nbdev.demo = partial(mdl_nbdev.demo, clips=32, held_out=8, epochs=1)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["mdl_infer sounds.csv --model-name tiny --max-new-tokens 2 --batch-size 1 --output out.csv",
    "mdl_convert sounds.csv --model-name tiny --num-workers 1 --output out",
    "mdl_train --train-dataset sounds.csv --output out --model-name tiny --max-steps 4 --batch-size 4 --gradient-checkpointing false",
    "mdl_merge ADAPTER --output out", "mdl_demo --output out",
    "mdl_review labels.csv --model-name tiny --folds 0 --output out",
    "mdl_review labels.csv --model-name tiny --folds 2 --max-steps 1 --gradient-checkpointing false --output out",
    "mdl_check sounds.csv --output out", "mdl_eval sounds.csv --reference labels.csv --output out",
    "mdl_compare sounds.csv labels.csv --reference answers.csv --output out"])
def test_twenty_double_starts(made, command, monkeypatch):
    "Exactly one of two runs, whichever of them is first"
    name, *argv = command.replace("ADAPTER", str(made/"adapted"/"final")).split()
    header, *rows = Path("sounds.csv").read_text().splitlines()
    Path("labels.csv").write_text("\n".join([header, *(f"{row.split(',')[0]},{'AB'[i % 2]}" for i, row in enumerate(rows))]) + "\n")
    shutil.copy("sounds.csv", "answers.csv")
    for _n in range(20):
        both = [training_runs.start(argv, f"log{i}", name, prepare=shorten_demo) for i in range(2)]
        for p in both: p.join(300)
        logs = [Path(f"log{i}") for i in range(2)]
        printed = [log.read_text() for log in logs]
        for log in logs: log.unlink()
        if "demo" in command: assert sorted(p.exitcode for p in both) in ([0, 0], [0, 2]) # one after the other
        else: assert sorted(p.exitcode for p in both) == [0, 2], printed
        assert not any("Traceback" in text for text in printed), printed
        left = {p.name for p in Path().iterdir()} - {"sounds", "sounds.csv", "labels.csv", "answers.csv", "out", "out.csv"}
        assert not left
        for p in Path().glob("out*"): shutil.rmtree(p) if p.is_dir() else p.unlink()


UNFINISHED = { # A command but for its output; what shows that it is under way
    "mdl_infer sounds.csv --model-name tiny --max-new-tokens 2 --batch-size 1 --num-workers 1": "out.part.log",
    "mdl_convert many.csv --model-name tiny --num-workers 2": "out.part/*.arrow",
    "mdl_train --train-dataset sounds.csv --model-name tiny --max-steps 6 --save-steps 1 --batch-size 4 --num-workers 1 --gradient-checkpointing false "
        "--resume-from-checkpoint true": "out/checkpoint-*",
    "mdl_review labels.csv --model-name tiny --folds 2 --max-steps 2 --gradient-checkpointing false": "out.folds/scores-1.csv*"}

@pytest.mark.slow
@pytest.mark.parametrize("command", UNFINISHED)
def test_twenty_double_starts_of_an_unfinished_run(command):
    "Killed once, then started twice at once: one of the two finishes it, as an undisturbed run would"
    name, *argv = command.split()
    header, *rows = Path("sounds.csv").read_text().splitlines()
    Path("labels.csv").write_text("\n".join([header, *(f"{row.split(',')[0]},{'AB'[i % 2]}" for i, row in enumerate(rows))]) + "\n")
    Path("many.csv").write_text("\n".join([header, *rows*100]) + "\n")
    def result(): return training_runs.weights(Path("out")) if "train" in name else everything("out") or Path("out").read_bytes()
    def clean():
        for p in [*Path().glob("out*"), *Path().glob("log*"), *Path().glob(".out*")]: shutil.rmtree(p) if p.is_dir() else p.unlink()
    argv += ["--output", "out"]
    first = training_runs.start(argv, "log", name)
    first.join(300)
    whole, killed = result(), 0
    for _ in range(20):
        clean()
        first = training_runs.start(argv, "log", name)
        training_runs.wait_until(lambda: any(p.stat().st_size for p in Path().glob(UNFINISHED[command])), first)
        first.kill()
        first.join()
        killed += first.exitcode == -signal.SIGKILL
        both = [training_runs.start(argv, f"log{i}", name) for i in range(2)]
        for p in both: p.join(300)
        printed = [Path(f"log{i}").read_text() for i in range(2)]
        assert sorted(p.exitcode for p in both) in ([0, 2], [0, 0] if "train" in name else []), printed # after the end there is nothing to do
        assert not any("Traceback" in text for text in printed), printed
        assert result() == whole
        assert not [p.name for p in [*Path().glob("out.*"), *Path().glob(".out*")]]
    assert killed == 20


# Inputs stay

def test_no_output_takes_an_input_with_it(made):
    "Wherever the input lies, and whatever it is called"
    shutil.copytree(made/"adapted"/"final", "adapter")
    shutil.copytree(made/"run"/"final", "model")
    shutil.copytree(made/"converted", "set")
    shutil.copy("sounds.csv", "set/rows.csv")
    Path("set.part").mkdir()
    for name in ("set.part/rows.csv", "o.csv.part-3", "o.csv.rejects.csv", ".o.csv.part", ".o.csv.rejects.csv.part", ".o.csv.part.json.part"):
        shutil.copy("sounds.csv", name)
    os.symlink("o.csv.part-3", "link.csv")
    os.link("o.csv.part-3", "hard.csv")
    shutil.copy("sounds.csv", "m.csv")
    def template(name): return Path(name).write_text("{{ messages[0].content }}") and name
    refused = [
        *(lambda n=n: convert(ConvertSettings(input=n, output="set", model_name="tiny", overwrite=True)) for n in ("set/rows.csv", "set.part/rows.csv")),
        lambda: convert(ConvertSettings(input="sounds.csv", output="set", model_name="tiny", base_dir="set", overwrite=True)),
        *(lambda n=n: infer(asked(input=n, output="o.csv", overwrite=True)) for n in [*map(str, Path().glob("o.csv.*")), *map(str, Path().glob(".o.csv.*")), "link.csv", "hard.csv"]),
        lambda: infer(asked(output="o.csv", chat_template=template("o.csv.part.jinja"), overwrite=True)),
        lambda: merge_adapter(MergeSettings(adapter="adapter", model_name="model", output="model", overwrite=True)),
        lambda: mdl_nbdev.evaluate(EvalSettings(input="m.csv", reference="sounds.csv", output="m.csv", overwrite=True))]
    Path("set/sounds").mkdir() # clips inside the output
    for p in Path("sounds").iterdir(): shutil.copy(p, "set/sounds")
    before = everything() | {"o.csv.part.jinja": b"{{ messages[0].content }}"}
    for n,f in enumerate(refused):
        with pytest.raises(InputError, match="own input|did not write it|not a kind of file"): f()
        assert everything() | {"o.csv.part.jinja": before["o.csv.part.jinja"]} == before, n


def test_files_whose_names_are_like_ours_stay(made):
    "What a command writes for a while has hidden names; where it has not, a file of somebody else's stops it"
    commands = {"o.csv": lambda: infer(asked(output="o.csv")), "m.json": lambda: mdl_nbdev.evaluate(EvalSettings(input="sounds.csv", reference=made/"sounds.csv", output="m.json")),
                "set": lambda: convert(ConvertSettings(input="sounds.csv", output="set", model_name="tiny", num_workers=1)),
                "merged": lambda: merge_adapter(MergeSettings(adapter=made/"adapted"/"final", output="merged"))}
    others = [f"{output}.{end}" for output in commands for end in ("new", "old", "tmp")]
    for name in [*others, "m.json.part", "merged.part", "o.csv.rejects.csv.new", "o.csv.part.json.new"]: Path(name).write_text("mine")
    before = everything()
    refused = ("o.csv.part", "o.csv.part.lock", "m.json.lock", "set.lock", "merged.lock", "set.part/data.txt", "set.part/data-0.csv")
    for name in refused:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("mine")
        output = next(output for output in commands if name.startswith(output))
        with pytest.raises(InputError, match=f"{re.escape(name)}: .*choose another --output"): commands[output]()
        assert Path(name).read_text() == "mine" and not Path(output).exists()
        if Path(name).parent.name: shutil.rmtree(Path(name).parent)
        else: Path(name).unlink()
    for command in commands.values(): command()
    after = everything()
    assert before == {name: after[name] for name in before} and not [name for name in after if name.startswith(".")]
    assert {*commands} <= {*after}


def signal_before(step, number):
    "Send this process a signal before it changes the file system for the `step`-th time, counting from 0"
    changes = iter(range(1000))
    def watch(event, args):
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wxa+")
        if not (writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod")): return
        if next(changes) == step: os.kill(os.getpid(), number)
    sys.addaudithook(watch)


def in_a_child(f):
    "Run a function in a child process, and return how it ended"
    pid = os.fork()
    if pid: return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    signal.signal(signal.SIGINT, signal.default_int_handler) # which a shell has its background jobs ignore
    try: f()
    except BaseException: os._exit(1) # noqa: B036
    os._exit(0)


def write_model(text, fails=False):
    with files.replacing_folder("model") as part:
        for name in ("config", "weights"): files.write_text(part/name, text)
        os.chmod(part/"weights", 0o600)
        if fails: raise ValueError


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_folder_is_old_or_new_whenever_a_signal_comes(number):
    "After a rerun, which tidies up, whether it succeeds or not"
    def model(): return {p.name: p.read_text() for p in Path("model").iterdir()}
    old, new, again = ({name: text for name in ("config", "weights")} for text in ("old", "new", "again"))
    ends = []
    for step in range(100):
        for p in Path("model"), Path(".model.part"), Path(".model.old"): shutil.rmtree(p, ignore_errors=True)
        write_model("old")
        code = in_a_child(lambda step=step: (signal_before(step, number), write_model("new")))
        if code == 0 and ends and model() == new: break
        ends.append(code)
        with pytest.raises(ValueError, match="^$"): write_model("again", fails=True)
        assert model() in (old, new) and not [*Path().glob(".model*")], step
        write_model("again")
        assert model() == again, step
    assert 8 < step < 99 and (number != signal.SIGKILL or {*ends} == {-signal.SIGKILL})


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_file_is_old_or_new_whenever_a_signal_comes(number):
    for step in range(100):
        files.write_text("m.json", "old")
        code = in_a_child(lambda step=step: (signal_before(step, number), files.write_text("m.json", "new")))
        if code == 0: break
        assert Path("m.json").read_text() in ("old", "new")
        files.write_text("m.json", "again")
        assert Path("m.json").read_text() == "again" and not [*Path().glob(".m.json*")], step
    assert 3 <= step < 99


@pytest.fixture(scope="module")
def reviewed(tmp_path_factory):
    "A review of a file with a clip that is gone: its settings, its output, and the folder that is removed after that is written"
    folder = tmp_path_factory.mktemp("reviewed")
    csv = make_sounds(folder, 16)
    csv.write_text(csv.read_text().replace("sounds/0003.wav", "sounds/gone.wav"))
    s = ReviewSettings(input=csv, output="out", base_dir=folder, model_name="tiny", folds=0)
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        m.setattr(review, "remove_folder", lambda path: shutil.copytree(path, "scores") if path.exists() else None)
        mdl_nbdev.review(s)
        return s, Path("out").read_bytes(), folder/"scores"


def killed_anywhere(command, prepare, whole):
    "Kill a command before each change of files, and run it again: it ends as if undisturbed. Returns how often that was"
    for step in range(500):
        for p in [*Path().glob("out*"), *Path().glob(".out*")]: shutil.rmtree(p) if p.is_dir() else p.unlink()
        prepare()
        code = in_a_child(lambda step=step: (signal_before(step, signal.SIGKILL), command()))
        if code == 0: return step
        assert code == -signal.SIGKILL
        try: command()
        except InputError as e: assert "out: the output exists already" in str(e)
        assert {p.name for p in Path().iterdir()} - {"sounds", "sounds.csv"} == {"out"}, step
        assert (everything("out") or Path("out").read_bytes()) == whole, step


@pytest.mark.parametrize("scored", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_review_killed_anywhere(reviewed, scored):
    s, whole, scores = reviewed
    assert killed_anywhere(lambda: mdl_nbdev.review(s), lambda: scored and shutil.copytree(scores, "out.folds"), whole) > (12 if scored else 30)


@pytest.mark.parametrize("overwrite", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_conversion_killed_anywhere(overwrite):
    s = ConvertSettings(input="sounds.csv", output="out", model_name="tiny", num_workers=1, overwrite=overwrite)
    convert(s)
    whole = everything("out")
    assert killed_anywhere(lambda: convert(s), lambda: overwrite and convert(dataclasses.replace(s, user_prompt="What?")), whole) > 12


def test_the_folder_of_a_demo_killed_anywhere():
    s = DemoSettings(output="out")
    demo_folder(s)
    whole = everything("out")
    def earlier(): Path("out/answers").mkdir(parents=True), Path("out/answers/a.csv").touch(), Path("out/demo.json").touch()
    assert killed_anywhere(lambda: demo_folder(s), earlier, whole) > 6


@pytest.mark.parametrize("name", ["samples.jsonl", "too_long.csv", "final/rows.csv", "checkpoint-2/rows.csv"])
def test_a_run_does_not_replace_its_own_rows(name):
    Path("run", name).parent.mkdir(parents=True)
    shutil.copy("sounds.csv", Path("run", name))
    before = everything()
    with pytest.raises(InputError, match="own input"): train(settings(Path("run", name), "run", resume_from_checkpoint=True))
    assert everything() == before


def test_a_model_in_the_run_folder_is_not_replaced(made):
    shutil.copytree(made/"run", "run")
    with pytest.raises(InputError, match="own input"): train(settings("sounds.csv", "run", model_name="run/final", resume_from_checkpoint=True))


def test_overwriting_removes_only_what_the_command_wrote(made):
    merge = MergeSettings(adapter=made/"adapted"/"final", output="merged")
    merge_adapter(merge)
    Path("merged/notes.docx").write_text("mine")
    with pytest.raises(InputError, match="merged/notes.docx: not removed"): merge_adapter(dataclasses.replace(merge, overwrite=True))
    Path("merged/notes.docx").unlink()
    merge_adapter(dataclasses.replace(merge, overwrite=True))


# What changes while a run is under way, and between two starts

def interrupted(s, shards=1):
    "Leave a run after some shards"
    def stop(rows, done, total):
        if done >= 8*shards: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): infer(s, [stop])

@pytest.mark.parametrize("change", ["more", "fewer", "another"])
def test_the_input_changes_during_a_run(change):
    "Found at the end; the rerun has exactly the rows that are there now"
    rows = Path("sounds.csv").read_text().splitlines()
    now = dict(more=[*rows, rows[1]], fewer=rows[:-1], another=[*rows[:3], rows[1], *rows[4:]])[change]
    def edit(answered, done, total): Path("sounds.csv").write_text("\n".join(now) + "\n")
    s = asked()
    with pytest.raises(InputError, match="sounds.csv: changed while its rows were answered"): infer(s, [edit])
    assert not Path("out.csv").exists()
    assert infer(s).rows == len(now) - 1
    infer(dataclasses.replace(s, output="whole.csv"))
    assert Path("out.csv").read_bytes() == Path("whole.csv").read_bytes()


def test_a_lost_shard_is_noticed():
    s, write = asked(), InferOutput.write
    with pytest.MonkeyPatch.context() as m:
        m.setattr(InferOutput, "write", lambda self, part, number, *a: write(self, part, number, *a) if number else None)
        with pytest.raises(InputError, match="run the same command again"): infer(s)
    assert infer(s).rows == 12 and len(Path("out.csv").read_text().splitlines()) == 13


def test_killed_after_the_output_got_its_name():
    "The rerun ends well and leaves nothing"
    def killed(self):
        if self.path.exists(): raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as m:
        m.setattr(InferOutput, "clear", killed)
        with pytest.raises(KeyboardInterrupt): infer(asked())
    assert Path("out.csv.part").exists()
    before = Path("out.csv").read_bytes()
    assert infer(asked()).resumed == 12
    assert Path("out.csv").read_bytes() == before and not list(Path().glob("out.csv.*"))
    with pytest.raises(InputError, match="exists already"): infer(asked())


def test_lines_follow_an_edit_of_the_input():
    "Shards that are finished keep their answers; the lines of their rejected and truncated rows are those of the edited file"
    rows = Path("sounds.csv").read_text().splitlines()
    rows[1] = "lost.wav,tone"
    Path("sounds.csv").write_text("\n".join(rows) + "\n")
    interrupted(asked(max_new_tokens=1))
    Path("sounds.csv").write_text("\n".join([rows[0], "", "", *rows[1:]]) + "\n")
    report = infer(asked(max_new_tokens=1))
    assert report.resumed == 8 and report.rejected[0][:2] == ["1", "4"] and 5 in report.truncated and 3 not in report.truncated
    assert Path("out.csv.rejects.csv").read_text().splitlines()[1].startswith("1,4,lost.wav,")


def test_only_rejected_rows_are_asked_again(monkeypatch):
    "After they were mended; the result is that of a run over the mended file"
    rows = Path("sounds.csv").read_text().splitlines()
    Path("sounds.csv").write_text("\n".join([*rows[:3], "lost.wav,tone", *rows[4:9], "gone.wav,tone", *rows[10:]]) + "\n")
    infer(asked())
    again = asked(retry_rejects=True)
    with pytest.raises(InputError, match="was answered by another model, or with other settings"): infer(dataclasses.replace(again, max_new_tokens=3))
    with pytest.raises(InputError, match="leave out --overwrite"): infer(dataclasses.replace(again, overwrite=True))
    mended = [*rows[:9], "gone.wav,tone", *rows[10:]]
    for wrong in ([*mended, rows[1]], mended[:-1], [*mended[:5], rows[1], *mended[6:]]):
        Path("sounds.csv").write_text("\n".join(wrong) + "\n")
        with pytest.raises(InputError, match="only rows without an answer may be changed"): infer(again)
    Path("sounds.csv").write_text("\n".join(mended) + "\n")
    made, tokenize, write = [], mdl_nbdev.model.chat.Chat.tokenize, output.write_text
    def killed(path, text):
        if "rejects" in str(path): raise KeyboardInterrupt
        write(path, text)
    with monkeypatch.context() as m:
        m.setattr(mdl_nbdev.model.chat.Chat, "tokenize", lambda self, c: made.extend(c) or tokenize(self, c))
        m.setattr(output, "write_text", killed) # before the rejects are brought up to date
        with pytest.raises(KeyboardInterrupt): infer(again)
    assert {c.line for c in made if c.file == "sounds.csv"} == {4}
    report = infer(again)
    assert (report.rows, report.resumed, [r[0] for r in report.rejected]) == (12, 12, ["9"])
    infer(asked(output="whole.csv"))
    for end in ("", ".rejects.csv"): assert Path(f"out.csv{end}").read_bytes() == Path(f"whole.csv{end}").read_bytes()
    Path("sounds.csv").write_text("\n".join(rows) + "\n")
    assert (infer(again).resumed, sorted(p.name for p in Path().glob("out*"))) == (11, ["out.csv"])
    with pytest.raises(InputError, match="there is no out.csv.rejects.csv, so there is nothing to answer again"): infer(again)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null"])
def test_a_damaged_identity_of_a_run(text):
    interrupted(asked())
    Path("out.csv.part.json").write_text(text)
    with pytest.raises(InputError, match="cannot be continued: .*; *|discard it with --overwrite true"): infer(asked())
    assert infer(asked(overwrite=True)).rows == 12


# Converted folders

def damage(name):
    "A copy of the converted folder, with one kind of damage"
    state = json.loads(Path("set/state.json").read_text())
    if name == "a lost shard": (Path("set")/state["_data_files"][0]["filename"]).unlink()
    elif name == "a flipped bit":
        shard = Path("set")/state["_data_files"][0]["filename"]
        data = bytearray(shard.read_bytes())
        data[len(data)//2] ^= 1
        shard.write_bytes(data)
    else: Path("set/mdl_nbdev.json").write_text(name)

@pytest.mark.parametrize("name", ["", "{", "[]", "5", '{"tokenizer":"x"}', '{"rows":"x","sample_rate":1}', "a lost shard", "a flipped bit"])
def test_a_damaged_dataset(made, name):
    shutil.copytree(made/"converted", "set")
    damage(name)
    with pytest.raises(InputError, match="set.*(convert the file again|no rows)"): train(settings("set", "run"))
    assert not Path("run/metrics.jsonl").exists()


def test_rows_are_counted(made):
    shutil.copytree(made/"converted", "set")
    manifest = Path("set/mdl_nbdev.json")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"rows": 13}))
    with pytest.raises(InputError, match="set: has 12 of the 13 rows that were converted"): AudioDataset("set")


# Checkpoints

def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again(made, capsys):
    shutil.copytree(made/"run", "run")
    for p in Path("run").glob("checkpoint-*"): os.truncate(p/"trained.safetensors", 100)
    before = everything("run")
    with pytest.raises(InputError, match="run: cannot be resumed: none of its checkpoints"): train(settings("sounds.csv", "run", resume_from_checkpoint=True))
    assert everything("run") == before
    for p in Path("run").glob("checkpoint-*"): shutil.rmtree(p)
    with pytest.raises(InputError, match="it has a final model and no checkpoint"): train(settings("sounds.csv", "run", resume_from_checkpoint=True))


class Poison(TrainerCallback):
    "Makes a value of the weights, or of the optimizer, infinite after the third step"
    def __init__(self, optimizer=False): self.of_optimizer = optimizer
    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step != 3: return
        p = next(p for p in model.parameters() if p.requires_grad)
        tensor = optimizer.state[p]["exp_avg"] if self.of_optimizer else p.data
        tensor.view(-1)[0] = float("inf")

@pytest.mark.parametrize("optimizer", [False, True])
def test_a_checkpoint_that_is_not_finite_is_not_written(optimizer):
    s = settings("sounds.csv", "run", save_steps=1, save_total_limit=1, logging_steps=100)
    with pytest.raises(InputError, match="has diverged: at step 3, .* not finite. This checkpoint is not written; the last good one is run/checkpoint-2. Lower --lr"):
        train(s, [Poison(optimizer)])
    assert [p.name for p in Path("run").glob("checkpoint-*")] == ["checkpoint-2"]


def test_clips_or_base_model_change_before_a_resume(made):
    shutil.copytree(made/"run"/"final", "model")
    s = settings("sounds.csv", "run", model_name="model")
    train(s)
    shutil.rmtree("run/checkpoint-4")
    again = dataclasses.replace(s, resume_from_checkpoint=True)
    for p in Path("sounds").glob("*.wav"):
        samples, rate = sf.read(p, dtype="int16")
        sf.write(p, samples[::-1].copy(), rate)
    with pytest.raises(InputError, match="checkpoint-2: belongs to a run with other data or settings.*training clips: was"): train(again)
    for p in Path("sounds").glob("*.wav"): shutil.copy(made/p, p)
    config = json.loads(Path("model/generation_config.json").read_text())
    Path("model/generation_config.json").write_text(json.dumps(config | {"temperature": .5}))
    with pytest.raises(InputError, match="contents of --model-name: was"): train(again)
    Path("model/generation_config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copytree(made/"run"/"final", "model", dirs_exist_ok=True)
    assert train(again).whole


# One message instead of a traceback

def message(command, *argv, capsys):
    with pytest.raises(SystemExit) as e: getattr(commands, command)(list(map(str, argv)))
    err = capsys.readouterr().err
    assert e.value.code == 2, err
    return err.splitlines()[-1]

BOMB = "output: &a [x, x]\n" + "".join(f"x{n}: &{c} [*{b}, *{b}]\n" for n,(b,c) in enumerate(zip("abcdefgh", "bcdefghi")))

@pytest.mark.parametrize("text", ["output: 2026-02-30", "output: " + "["*3000, "output: " + "9"*5000, "output: [[a, b]]", BOMB], ids=range(5))
def test_yaml_that_is_none(text, capsys):
    Path("a.yaml").write_text(text)
    said = message("mdl_convert", "sounds.csv", "--config", "a.yaml", capsys=capsys)
    assert said.startswith("mdl_convert: a.yaml: ") and len(said) < 500

@pytest.mark.parametrize("change", [dict(peft_type="NOPE"), dict(target_modules="["), dict(lora_alpha=None), dict(r="x"), dict(base_model_name_or_path=5), "[]", "5", "", "["*3000], ids=str)
def test_a_damaged_adapter(made, change, capsys):
    shutil.copytree(made/"adapted"/"final", "adapter")
    path = Path("adapter/adapter_config.json")
    path.write_text(change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change))
    assert message("mdl_merge", "adapter", "--output", "merged", capsys=capsys).startswith("mdl_merge: adapter")
    assert not list(Path().glob("*merged*"))

@pytest.mark.parametrize("name,text", [("config.json", "[]"), ("config.json", "null"), ("tokenizer_config.json", "[]"), ("tokenizer_config.json", "{}"),
    ("tokenizer.json", "[]"), ("tokenizer.json", "{}"), ("generation_config.json", "[]"), ("config.json", dict(text_config=5)), ("config.json", dict(dtype="nope")),
    ("generation_config.json", dict(eos_token_id="x")), ("generation_config.json", dict(eos_token_id=[1, None, {}])),
    ("config.json", dict(attn_implementation="kernels-community/flash-attn2")), ("config.json", dict(_attn_implementation="someone/evil:main")),
    ("tokenizer_config.json", dict(tokenizer_class="NoSuch")), ("tokenizer_config.json", dict(tokenizer_class="pipeline")), ("tokenizer_config.json", dict(model_max_length="x"))], ids=str)
def test_a_damaged_model(made, name, text, capsys):
    shutil.copytree(made/"run"/"final", "model")
    path = Path("model", name)
    path.write_text(text if isinstance(text, str) else json.dumps(json.loads(path.read_text()) | text))
    assert message("mdl_infer", "sounds.csv", "--model-name", "model", "--output", "out.csv", capsys=capsys).startswith("mdl_infer: --model-name model: ")


class KillReader(TrainerCallback):
    "Kills the processes that read the data, as a machine without memory does"
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step != 1: return
        for p in multiprocessing.active_children(): os.kill(p.pid, signal.SIGKILL)

def test_a_killed_reader_ends_in_a_message():
    with pytest.raises(InputError, match="a process that reads the data was killed.*fewer --num-workers"):
        train(settings("sounds.csv", "run", max_steps=30, num_workers=2, batch_size=1), [KillReader()])


def test_a_run_folder_that_is_moved():
    class Move(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3: os.rename("run", "elsewhere")
    with pytest.raises(InputError, match="^run: this run folder was moved or removed while the run wrote into it, at step 3"):
        train(settings("sounds.csv", "run", logging_steps=1), [Move()])
    assert not Path("run").exists()
    assert train(settings("sounds.csv", "elsewhere", resume_from_checkpoint=True)).whole


@pytest.mark.parametrize("schedule, stops", [("linear", (2,)), ("linear", (2, 1)), ("linear", (5,)), ("linear", (5, 1)), ("reduce_lr_on_plateau", (2, 1)), ("greedy", (5,))], ids=str)
def test_a_stop_ends_an_evaluation(schedule, stops, monkeypatch):
    "Also the last one, and that with which a resumed run makes up for it; in the end the run is as an undisturbed one"
    s = settings("sounds.csv", "run", eval_dataset=["sounds.csv"], eval_steps=2, save_steps=100, logging_steps=1, sample_answers=0,
                 lr_scheduler_type=schedule, scheduler_args={} if schedule == "linear" else dict(patience=0))
    def metrics(report): return [{k: v for k, v in m.items() if not k.endswith("per_second") and k not in ("time", "peak_memory_gib")} for m in report.metrics]
    whole, losses = train(dataclasses.replace(s, output="whole")), TaskTrainer.task_token_losses
    for stop in stops: # batches of evaluations, each of which has three
        batches = []
        def asked_to_stop(self, batch, stop=stop, batches=batches):
            batches.append(batch)
            if len(batches) == stop: self.stop_requested = "SIGTERM"
            return losses(self, batch)
        with monkeypatch.context() as m:
            m.setattr(TaskTrainer, "task_token_losses", asked_to_stop)
            report = train(s)
        assert (report.stopped, report.steps, len(batches), report.whole) == ("SIGTERM", 4 if stops[0] == 5 else 2, stop, False)
        assert sum("eval_loss" in m for m in report.metrics) == (stops[0] == 5) and not Path("run/final").exists()
        s = dataclasses.replace(s, resume_from_checkpoint=True)
    report = train(s)
    assert metrics(report) == metrics(whole) and report.whole and report.eval_loss == whole.eval_loss
    assert metrics(train(s)) == metrics(whole)


# Texts of strangers

@pytest.mark.parametrize("template", ["{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(9999) %}{% for b in range(9999) %}.{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(100) }}"], ids=range(3))
def test_a_chat_template_that_does_not_end(template, capsys):
    Path("endless.jinja").write_text("{{ messages[0].role }}\n" + template)
    said = message("mdl_infer", "sounds.csv", "--model-name", "tiny", "--chat-template", "endless.jinja", "--output", "o.csv", capsys=capsys)
    assert said.startswith("mdl_infer: endless.jinja:2: fails on turns of user, assistant: it does not end")


def test_what_names_say_does_nothing_to_a_terminal(capsys):
    "Escape sequences, line breaks and half surrogates in cells and in names of columns and files"
    row = '"\x1b]0;x\x07\x1b[31mred\u202e\nmdl_check: all rows are good.wav",a\n'
    Path("in\x1b[2J\n.csv").write_text("audio,prediction,\x1b[1mbold\n" + row[:-1] + ",\n")
    with pytest.raises(SystemExit): commands.mdl_check(["in\x1b[2J\n.csv"])
    with pytest.raises(SystemExit): commands.mdl_convert(["in\x1b[2J\n.csv", "--model-name", "tiny", "--output", "set"])
    with pytest.raises(SystemExit): commands.mdl_infer(["in\x1b[2J\n.csv", "--model-name", "tiny", "--output", "out.csv"])
    said = "".join(capsys.readouterr())
    assert not set(said) & set("\x1b\x07\u202e") and "\\x1b[31mred" in said
    assert not any(line.startswith("mdl_check: all rows") for line in said.splitlines())


def test_a_card_shows_names_as_they_are(tmp_path):
    name = "<script>`x`|*y*\n---\nlicense: mit"
    card = model_card(settings("a.csv", tmp_path/"<img src=x>", model_name=name, user_prompt="`<b>` | ``c``"), TrainReport(tmp_path, 1, 1, 1), {})
    head, body = card.split("---\n\n", 1)
    assert yaml.safe_load(head.strip("-\n")) == dict(library_name="transformers", base_model=name, tags=["lora", "mdl_nbdev"])
    assert "# &lt;img src=x&gt;\n" in body and "license" not in [line.split(":")[0] for line in body.splitlines()]
    assert "<b>" in body and "``` \"`<b>` \\| ``c``\" ```" in body


def test_a_refusal_of_all_processes_is_printed_once(monkeypatch, capsys):
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as e: commands.mdl_train(["--nonsense", "1"])
        assert e.value.code == 2 and bool(capsys.readouterr().err) == (rank == "0")


def test_a_worker_sends_batches_through_a_pipe():
    "Not through shared memory, of which a container has 64 MB"
    batch = Batch(dict(input_ids=torch.arange(6).view(2, 3), samples=torch.rand(2, 5)), 24_000)
    again = pickle.loads(ForkingPickler.dumps(batch))
    assert again.sample_rate == 24_000 and all((again[k] == v).all() for k, v in batch.items())
    again["samples"] += 1


# Clips that no library expects

def test_a_row_with_any_fault_is_rejected(monkeypatch):
    "Sparse files of 20 GiB whose headers were never completed, a flac without a length, and libraries that fail in ways of their own"
    w = sf.read("sounds/0000.wav")[0]
    sf.write("a.flac", w, 16_000)
    flac, wav = bytearray(Path("a.flac").read_bytes()), bytearray(Path("sounds/0000.wav").read_bytes())
    flac[21], flac[22:26] = flac[21] & 0xf0, bytes(4) # the number of samples
    wav[4:8] = wav[40:44] = bytes(4)
    Path("open.flac").write_bytes(flac)
    Path("open.wav").write_bytes(wav)
    names = dict.fromkeys(["sounds/0000.wav", "open.flac", "open.wav"], True)
    assert all((load_audio(name) == load_audio("sounds/0000.wav")).all() for name in names)
    for name in ("open.flac", "open.wav"):
        shutil.copy(name, f"20GiB-{name}")
        os.truncate(f"20GiB-{name}", 20*2**30)
        names[f"20GiB-{name}"] = False
    sf.write("long.flac", np.zeros(16_000*700), 16_000)
    flac = bytearray(Path("long.flac").read_bytes())
    flac[21], flac[22:26] = flac[21] & 0xf0, bytes(4)
    Path("long.flac").write_bytes(flac)
    names["long.flac"] = False
    for n, error in enumerate([OSError(5, "Input/output error"), MemoryError(), ZeroDivisionError("division by zero"), RuntimeError("soxr: no"), ValueError("array is too big")]):
        shutil.copy("sounds/0000.wav", f"fault-{n}.wav")
        names[f"fault-{n}.wav"] = error
    def failing(f, path, src):
        if isinstance(names.get(str(src)), Exception): raise names[str(src)]
    monkeypatch.setattr(audio, "check_complete", failing)
    Path("in.csv").write_text("\n".join(["audio", *names]) + "\n")
    report = infer(asked(input="in.csv"))
    assert [name for _, _, name, _ in report.rejected] == [name for name, good in names.items() if good is not True]
    assert [r[3] for r in report.rejected if r[2] == "long.flac"] == ["long.flac: over 600 s long, the limit is 600 s; " + audio.SHORTER]
    assert "Input/output error" in report.rejected[3][3] and "takes too much memory" in report.rejected[4][3]


def test_a_number_that_would_become_infinity_is_a_bad_row(capsys):
    Path("in.jsonl").write_text('{"audio":"sounds/0000.wav","score":1e400}\n{"audio":"sounds/0000.wav","score":-1.5e308}\n')
    assert "in.jsonl:1: the number 1e400 is too large to be kept; write it as text, in quotes" in message("mdl_infer", "in.jsonl", "--model-name", "tiny", "--output", "o.jsonl", capsys=capsys)


# Downloads are bounded

@pytest.fixture
def server(monkeypatch, tmp_path):
    "A web server whose answer the test sets: headers and body"
    answer = {}
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(answer.get("status", 200))
            for name, value in answer["headers"].items(): self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer["body"])
        def log_message(self, *args): pass
    web = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    monkeypatch.setenv("MDL_CACHE", str(tmp_path/"cache"))
    answer["url"] = f"http://127.0.0.1:{web.server_port}/a.wav"
    yield answer
    web.shutdown()

def test_a_compressed_file_is_decompressed_piece_by_piece(server):
    sound = Path("sounds/0000.wav").read_bytes()
    server |= dict(headers={"Content-Encoding": "gzip"}, body=gzip.compress(sound))
    assert fetch(server["url"]).read_bytes() == sound
    server |= dict(body=gzip.compress(bytes(2**26)))
    with pytest.raises(InputError, match="larger than the limit of 1,048,576"): fetch(server["url"] + "?2", max_bytes=2**20)
    for body in (gzip.compress(sound)[:-9], b"no gzip"):
        server |= dict(body=body)
        with pytest.raises(InputError, match="the compressed body is"): fetch(server["url"] + "?3", retries=0)
    for encoding in ("gzip, gzip", "br", "x"*5000):
        server |= dict(headers={"Content-Encoding": encoding})
        with pytest.raises(InputError, match="compresses this file in a way that is not supported") as e: fetch(server["url"] + "?4")
        assert len(str(e.value)) < 300

def test_redirects_end(server):
    server |= dict(status=302, headers={"Location": server["url"]}, body=b"")
    with pytest.raises(InputError, match="redirects more than 5 times; check the address"): fetch(server["url"])

def test_a_host_that_does_not_answer_is_left_alone(monkeypatch, tmp_path, server):
    "After three clips, for a while"
    monkeypatch.setenv("MDL_CACHE", str(tmp_path/"cache"))
    with socket.socket() as s: # a port on which nobody listens
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}/"
    for n in range(3):
        with pytest.raises(InputError, match="ConnectError.*1 times"): fetch(f"{url}{n}.wav", retries=0)
    with pytest.raises(InputError, match="not asked for, since 127.0.0.1:.* did not send the last 3 clips"): fetch(f"{url}4.wav", retries=0)
    server |= dict(headers={}, body=b"a clip")
    assert fetch(server["url"]).read_bytes() == b"a clip"
    monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + 61)
    with pytest.raises(InputError, match="ConnectError"): fetch(f"{url}5.wav", retries=0)

@pytest.mark.parametrize("url", ["http://www..example.com/a.wav", "http://./a.wav", f"http://{'a'*70}.com/a.wav", "http://xn--a/a.wav", "http://", "http:///a.wav",
    "http://[::1/a.wav", "http://a:99999/a.wav", "http://a:x/a.wav", "http://\ud800.com/a.wav", "http://a b/a.wav", "https://" + "a."*200 + "com/a.wav"], ids=range(12))
def test_an_address_that_cannot_be_one_is_a_bad_row(url, monkeypatch, tmp_path):
    monkeypatch.setenv("MDL_CACHE", str(tmp_path/"cache"))
    with pytest.raises(InputError): fetch(url, retries=0, timeout=2, deadline=5)
