"Whatever is wrong with the input: one clear message, exit code 2, no traceback, and nothing lost"
import csv
import functools
import hashlib
import http.server
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from training_runs import finish, start

from mdl_nbdev.cli import commands as cli
from mdl_nbdev.data import remote
from mdl_nbdev.data.sounds import make_sounds

# --- How a command ends

@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    "Tests run in a folder of their own, with a cache of their own, without the hub and with little patience"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MDL_CACHE", str(tmp_path/"cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(remote.update, "__defaults__", (5000, 0.5, 2., 0)) # max_bytes, timeout, deadline, retries
    monkeypatch.setattr(remote, "_silent", {}) # hosts that other tests waited for


def digests(folder="."):
    "Path -> digest of every file"
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(folder).rglob("*") if p.is_file() and "cache" not in p.parts}


def check_message(command, err):
    "The one message that a command printed, progress bars left out"
    text = "\n".join(line.split("\r")[-1] for line in err.split("\n") if not re.search(r"it/s|row/s|clip/s|\d+%\|", line.split("\r")[-1]))
    assert "Traceback" not in err, err
    assert len(re.findall(f"^{command}: ", text, re.M)) == 1, text
    message = text[text.index(f"{command}: ")+len(command)+2:].strip()
    assert text.strip() == f"{command}: {message}", f"more than the message: {text}"
    return message


def refused(capfd, command, *args, lost=()):
    "Run a command that must refuse its input with exit code 2; gives its message"
    before = digests()
    capfd.readouterr()
    with pytest.raises(SystemExit) as e: getattr(cli, command)([str(a) for a in args])
    out, err = capfd.readouterr()
    after = digests()
    assert {p: after.get(p) for p in before} == before, "a file was changed or removed"
    assert e.value.code == 2, (e.value.code, out, err)
    err = re.sub(r"downloaded clips are kept in .*\n", "", err)
    return check_message(command, err) if command != "mdl_check" or err.startswith("mdl_check: ") else out


# --- Tables that can't be read

def text(content, name="rows.csv"):
    def make():
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return name
    return make


def folder():
    Path("folder.csv").mkdir()
    return "folder.csv"


def under_a_file():
    Path("file").write_text("x")
    return "file/rows.csv"


tables = {
    "no such file": (lambda: "nowhere.csv", r"nowhere.csv: no such file|nowhere.csv: No such file"),
    "under a file": (under_a_file, "file/rows.csv: (not|Not) a directory"),
    "empty": (text(""), "rows.csv: the file is empty; it needs a header with the columns audio"),
    "header only": (text("audio,prediction\n"), "rows.csv: a header and no rows; add rows"),
    "missing column": (text("path,prediction\na.wav,x\n"), "rows.csv:1: no column audio; found 'path', 'prediction'"),
    "semicolons": (text("audio;prediction\na.wav;x\n"), "rows.csv:1: .*semicolons"),
    "a folder": (folder, "folder.csv: "),
    "a recording": (text(b"RIFF\x24\x10\x00\x00WAVEfmt \x10\x00\x00\x00\xff\xfe\n\x00\x00\n", "clip.wav"), r"clip.wav: not a kind of file with rows"),
    "UTF-16": (text("audio,prediction\na.wav,x\n".encode("utf-16")), "rows.csv:1: .*not UTF-8.*iconv"),
    "broken rows": (text('audio,prediction\na.wav,x,y\nb.wav\n"c.wav,x\n'), "rows.csv:2: 3 cells.*\n *rows.csv:3: 1 cell,.*\n *rows.csv:4: .*never closed"),
    "unreadable": (lambda: "/proc/self/mem", "/proc/self/mem: "),
}
commands = {
    "check": ("mdl_check",),
    "convert": ("mdl_convert", "--model-name", "tiny", "--output", "out"),
    "train": ("mdl_train", "--model-name", "tiny", "--output", "out", "--train-dataset"),
    "infer": ("mdl_infer", "--model-name", "tiny", "--output", "out.csv", "--max-new-tokens", "1"),
    "eval set": ("mdl_train", "--model-name", "tiny", "--output", "out", "--train-dataset", "sounds.csv", "--eval-dataset"),
}


def given(command, path):
    "The arguments of a command that reads a table"
    name, *args = commands[command]
    if "sounds.csv" in args: make_sounds(".", 3)
    return [name, *args, path]


@pytest.mark.parametrize("name", tables)
@pytest.mark.parametrize("command", commands)
def test_tables(capfd, command, name):
    make, message = tables[name]
    assert re.search(message, refused(capfd, *given(command, make()))), name
    assert not list(Path(".").glob("out/final*")) and not Path("out.csv").exists()
    assert command != "convert" or not Path("out").exists()


# --- Clips that can't be used

def wav(name, seconds=0.3, rate=16000, **kwargs):
    sf.write(name, np.sin(np.arange(int(seconds*rate))/9)/2, rate, **kwargs)
    return name


def truncated():
    whole = Path(wav("cut.wav")).read_bytes()
    Path("cut.wav").write_bytes(whole[:len(whole)//2])
    return "cut.wav"


def not_a_number():
    x = np.sin(np.arange(5000)/9)/2
    x[2500] = np.nan
    sf.write("nan.wav", x, 16000, subtype="FLOAT")
    return "nan.wav"


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/missing.wav": return self.send_error(404)
        if self.path == "/broken.wav": return self.send_error(500)
        self.send_response(200)
        if self.path == "/huge.wav": self.send_header("Content-Length", str(10**12))
        self.end_headers()
        if self.path == "/hangs.wav": time.sleep(3)
        if self.path == "/endless.wav":
            try:
                for _ in range(200): self.wfile.write(bytes(1000))
            except OSError: pass
        if self.path == "/page.wav": self.wfile.write(b"<html>Please log in</html>")
    def log_message(self, *args): pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as s:
        s.daemon_threads, s.block_on_close = True, False
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{s.server_port}"
        s.shutdown()


def made(make, *args, **kwargs):
    def f():
        make(*args, **kwargs)
        return str(args[0]) if args else ""
    return f


def a_folder():
    Path("dir.wav").mkdir()
    return "dir.wav"


local_clips = {
    "no such file": (lambda: "nowhere.wav", "nowhere.wav: no such file"),
    "a folder": (a_folder, "dir.wav: this is a folder"),
    "empty": (text("", "empty.wav"), r"empty.wav: .*empty \(0 bytes\)"),
    "not audio": (text("these are words, not sounds " * 99, "words.wav"), "words.wav: not readable as audio"),
    "truncated": (truncated, "cut.wav: truncated"),
    "NaN": (not_a_number, "nan.wav: .*NaN"),
    "too long": (made(wav, "long.wav", seconds=2.5), r"long.wav: 2.5 s.* 2[; ].*--max-audio-seconds|long.wav: 2.5 s.*--max-audio-seconds 2;"),
    "no sound": (made(wav, "none.wav", seconds=0), "none.wav: .*0 frames"),
    "unknown address": (lambda: "nope://example.org/a.wav", "nope://example.org/a.wav: Protocol not known: nope; check"),
}
remote_clips = {
    "404": ("/missing.wav", "/missing.wav: the server answered 404"),
    "500": ("/broken.wav", "/broken.wav: the server answered 500"),
    "hangs": ("/hangs.wav", "/hangs.wav: .*(Timeout|not complete)"),
    "too large": ("/huge.wav", "/huge.wav: larger than the limit of 5,000 bytes"),
    "endless": ("/endless.wav", "/endless.wav: larger than the limit"),
    "a web page": ("/page.wav", "/page.wav: not readable as audio"),
    "no server": ("http://127.0.0.1:9/x.wav", "http://127.0.0.1:9/x.wav: Connect"),
}


def bad_clips(server):
    "A table whose clips are all bad but for the first and the last, and what must be said of each line"
    clips, messages = [wav("good1.wav")], []
    for make, message in local_clips.values():
        clips.append(make())
        messages.append(message)
    for path, message in remote_clips.values():
        clips.append(path if "://" in path else server + path)
        messages.append(message)
    clips.append(wav("good2.wav"))
    Path("rows.csv").write_text("audio,prediction\n" + "".join(f"{c},yes\n" for c in clips))
    return {line: message for line, message in enumerate(messages, 3)}


def lines_of(message):
    "The bad rows of a message; a report of mdl_check also has rows that are doubtful only"
    return {int(m[1]): m[2] for m in re.finditer(r"^ *rows.csv:(\d+): (.*)$", message.rpartition("\nbad rows\n")[2], re.M)}


@pytest.mark.parametrize("command", [c for c in commands if c != "infer"])
def test_clips(capfd, command, server):
    expected = bad_clips(server)
    found = lines_of(refused(capfd, *given(command, "rows.csv"), "--max-audio-seconds", "2"))
    assert list(found) == list(expected)
    for line, message in expected.items(): assert re.search(message, found[line]), (line, found[line])
    for message in found.values(): assert re.search("[:;] [a-z].*$", message), f"no remedy: {message}"


def test_missing_answers(capfd):
    "Training needs an answer in every row, inference does not"
    wav("a.wav")
    Path("rows.csv").write_text("audio,prediction\na.wav,yes\na.wav,\nnull,no\na.wav,null\na.wav,\"\"\na.wav,  \n")
    for command in ["check", "convert", "train"]:
        found = lines_of(refused(capfd, *given(command, "rows.csv")))
        assert {line: "prediction" in reason for line, reason in found.items()} == {3: True, 4: False, 6: True, 7: True}


def read(name):
    with open(name, encoding="utf-8", newline="") as f: return list(csv.reader(f))


def failed(capfd, command, *args):
    "Run a command that does what it can and ends with exit code 2; gives its report"
    before = digests()
    capfd.readouterr()
    with pytest.raises(SystemExit) as e: getattr(cli, command)([str(a) for a in args])
    out, err = capfd.readouterr()
    assert e.value.code == 2, (out, err)
    assert "Traceback" not in out + err
    assert {p: d for p, d in digests().items() if p in before} == before
    return out


def test_inference_answers_the_other_rows(capfd, server):
    expected = bad_clips(server)
    with open("rows.csv", "a") as f: f.write("null,yes\n,yes\n")
    report = failed(capfd, *given("infer", "rows.csv"), "--max-audio-seconds", "2")
    head, *rows = read("out.csv")
    rejects = {int(line): (int(row), clip, reason) for row, line, clip, reason, _ in read("out.csv.rejects.csv")[1:]}
    last = len(rows) + 1
    expected = {**expected, last-1: "the audio cell is empty or null", last: "the audio cell is empty or null"}
    assert (head, [r[0] for r in rows]) == (["audio", "prediction"], [r[0] for r in read("rows.csv")[1:]])
    assert list(rejects) == sorted(expected)
    for line, message in expected.items():
        row, clip, reason = rejects[line]
        assert (row, rows[row-1]) == (line - 1, [clip if line < last-1 else rows[row-1][0], ""])
        assert re.search(message, reason), (line, reason)
    assert {r[1] for r in rows if "good" in r[0]} != {""}
    assert f"{len(expected)} rows without an answer, listed in out.csv.rejects.csv" in report
    assert sorted(p for p in os.listdir() if p.startswith("out")) == ["out.csv", "out.csv.rejects.csv"]


def test_inference_stops_when_told_to(capfd):
    wav("a.wav")
    Path("rows.csv").write_text("audio\na.wav\nb.wav\na.wav\nc.wav\n")
    assert re.match("rows.csv:3: b.wav: no such file", refused(capfd, *given("infer", "rows.csv"), "--on-error", "raise"))
    assert not Path("out.csv").exists()
    wav("b.wav"), wav("c.wav")
    with pytest.raises(SystemExit) as e: cli.mdl_infer([*given("infer", "rows.csv")[1:], "--on-error", "raise"])
    assert not e.value.code
    assert len(read("out.csv")) == 5


def test_prompt_longer_than_max_length(capfd):
    wav("a.wav")
    Path("rows.csv").write_text(f"audio,user_prompt\na.wav,{'word ' * 99}\na.wav,short\n")
    args = [a for a in given("infer", "rows.csv") if a not in ("--max-new-tokens", "1")]
    failed(capfd, *args, "--max-length", "60")
    assert [bool(r[2]) for r in read("out.csv")[1:]] == [False, True]
    (_, line, clip, reason, _), = read("out.csv.rejects.csv")[1:]
    assert (line, clip) == ("2", "a.wav")
    assert re.search(r"prompt has 5\d\d tokens.*--max-length 60.*raise it, or give --max-new-tokens", reason)


# --- Outputs that can't be written

def existing_file():
    Path("out").write_text("precious")


def existing_folder():
    Path("out").mkdir()
    Path("out/precious").write_text("x")


def dangling_link(): Path("out").symlink_to("nowhere/deep")


outputs = {
    "existing file": ("out", existing_file, "out: (the output exists already|cannot make this folder: File exists)"),
    "existing folder": ("out", existing_folder, "out: (the output exists already|holds)"),
    "under a file": ("out/new", existing_file, "out.*: cannot "),
    "no such place": ("/proc/new", lambda: None, "/proc/new.*: cannot "),
    "dangling link": ("out", dangling_link, "out: (the output exists already|cannot make this folder)"),
}


@pytest.mark.parametrize("name", outputs)
@pytest.mark.parametrize("command", ["mdl_convert"])
def test_outputs(capfd, command, name):
    output, make, message = outputs[name]
    make_sounds(".", 3)
    make()
    assert re.match(message, refused(capfd, command, "sounds.csv", "--model-name", "tiny", "--output", output))


@pytest.mark.parametrize("name", ["existing file", "under a file", "no such place", "dangling link"])
def test_output_of_training(capfd, name):
    output, make, message = outputs[name]
    make_sounds(".", 3)
    make()
    assert re.match(message, refused(capfd, "mdl_train", "--train-dataset", "sounds.csv", "--model-name", "tiny", "--output", output))


@pytest.mark.parametrize("name", outputs)
def test_output_of_inference(capfd, name):
    output, make, message = outputs[name]
    make_sounds(".", 3)
    make()
    assert re.match(message, refused(capfd, "mdl_infer", "sounds.csv", "--model-name", "tiny", "--output", output))


@pytest.mark.parametrize("output", ["sounds.csv", "sounds", "."])
def test_inference_does_not_replace_its_input(capfd, output):
    make_sounds(".", 3)
    refused(capfd, "mdl_infer", "sounds.csv", "--model-name", "tiny", "--output", output, "--overwrite", "true")
    assert sorted(os.listdir()) == ["sounds", "sounds.csv"]


def test_unfinished_run_with_other_settings(capfd):
    make_sounds(".", 3)
    Path("sounds/0001.wav").unlink()
    args = given("infer", "sounds.csv")
    refused(capfd, *args, "--on-error", "raise")
    assert Path("out.csv.part").exists()
    Path("out.csv.part.log").write_text('{"window": 0, "start": 0, "end": 0, "digest": "", "rows": 1, "rejects": [], "cut": []}\n') # as if there were an answer
    message = refused(capfd, *args, "--user-prompt", "What?")
    assert re.match("out.csv.part: holds an unfinished run that cannot be continued: .*user.prompt.*What.*--overwrite true", message)


@pytest.mark.parametrize("output", ["sounds.csv", "sounds", "."])
@pytest.mark.parametrize("overwrite", ["false", "true"])
def test_convert_does_not_replace_what_it_did_not_make(capfd, output, overwrite):
    make_sounds(".", 3)
    refused(capfd, "mdl_convert", "sounds.csv", "--model-name", "tiny", "--output", output, "--overwrite", overwrite)


def test_convert_keeps_the_old_output_when_the_new_one_fails(capfd):
    make_sounds(".", 3)
    args = ["mdl_convert", "sounds.csv", "--model-name", "tiny", "--output", "out"]
    with pytest.raises(SystemExit) as e: cli.mdl_convert(args[1:])
    assert not e.value.code
    Path("sounds/0001.wav").write_text("damaged")
    assert "sounds.csv:3: sounds/0001.wav" in refused(capfd, *args, "--overwrite", "true")
    wav("sounds/0001.wav")
    old = digests("out")
    with pytest.raises(SystemExit) as e: cli.mdl_convert([*args[1:], "--overwrite", "true"])
    assert not e.value.code
    assert digests("out") != old


# --- Columns that may be meant as others

def test_a_column_with_another_name_for_the_prompt(capfd):
    make_sounds(".", 3)
    head, *lines = Path("sounds.csv").read_text().splitlines()
    Path("asked.csv").write_text("\n".join([head + ",question,id", *(line + ",What is it?,7" for line in lines)]) + "\n")
    note = "asked.csv: ignored columns: question (did you mean user_prompt?)"
    for command, args in {"check": [], "convert": ["--output", "out", "--model-name", "tiny"], "infer": ["--output", "out.csv", "--model-name", "tiny"]}.items():
        with pytest.raises(SystemExit) as e: getattr(cli, f"mdl_{command}")(["asked.csv", *args])
        out, err = capfd.readouterr()
        assert e.value.code == 0
        if command == "check": assert "ignored: question (3 rows; did you mean user_prompt?), id (3 rows)" in out
        else: assert err.count(note) == 1
    Path("asked.csv").write_text("\n".join([head + ",question,user_prompt", *(line + ",What is it?,What?" for line in lines)]) + "\n")
    with pytest.raises(SystemExit): cli.mdl_check(["asked.csv"])
    assert "ignored: question (3 rows)" in capfd.readouterr().out # the prompt has its column


# --- Options and models

def ready():
    "A table, an output and a model for each command"
    make_sounds(".", 3)
    return {"mdl_check": ["sounds.csv"], "mdl_convert": ["sounds.csv", "--output", "out", "--model-name", "tiny"],
            "mdl_train": ["--train-dataset", "sounds.csv", "--output", "out", "--model-name", "tiny"], "mdl_infer": ["sounds.csv", "--output", "out.csv", "--model-name", "tiny"],
            "mdl_merge": ["adapter", "--output", "out"], "mdl_eval": ["sounds.csv", "--reference", "other.csv"],
            "mdl_review": ["sounds.csv", "--output", "out.csv", "--model-name", "tiny"], "mdl_compare": ["a.csv", "b.csv", "--reference", "sounds.csv"],
            "mdl_serve": ["--model-name", "tiny"], "mdl_demo": []}


@pytest.mark.parametrize("command", ["mdl_check", "mdl_convert", "mdl_train", "mdl_infer", "mdl_merge", "mdl_eval", "mdl_review", "mdl_compare", "mdl_serve", "mdl_demo"])
def test_options(capfd, command):
    args = ready()[command]
    assert "unknown option --frobnicate" in refused(capfd, command, *args, "--frobnicate", "1")
    assert "--config" in refused(capfd, command, *args, "--config") or True
    assert "nowhere.yaml: " in refused(capfd, command, *args, "--config", "nowhere.yaml")
    Path("c.yaml").write_text("frobnicate: 1\n")
    assert "c.yaml: unknown setting frobnicate" in refused(capfd, command, *args, "--config", "c.yaml")
    Path("c.yaml").write_text("a: [\n")
    assert "c.yaml: not valid YAML" in refused(capfd, command, *args, "--config", "c.yaml")
    surplus = "one: No such file" if command == "mdl_check" else "unexpected argument" # it takes any number of tables
    assert surplus in refused(capfd, command, *args, "one", "two")
    if args: assert "missing: " in refused(capfd, command)


@pytest.mark.parametrize("args, message", [
    (["--lora-rnk", "8"], "unknown option --lora-rnk; did you mean --lora-rank"), (["--lora-rank", "many"], "--lora-rank: got 'many', expected a whole number"),
    (["--lora-rank", "0"], "--lora-rank: got 0, expected at least 1"), (["--lr", "nan"], "--lr: got 'nan', expected a number"), (["--merge-lora", "maybe"], "true.false"),
    (["--train-target", "decoder,tail"], "--train-target: .*tail"), (["--quantization", "2bit"], "--quantization: got '2bit', expected 8bit or 4bit|8bit.4bit"), (["--lora-rank"], "--lora-rank.*expected"),
    (["--lr-scheduler-type", "zigzag"], "--lr-scheduler-type zigzag: .*linear"), (["--report-to", "nobody"], "--report-to"), (["--lora-target-modules", "(["], "--lora-target-modules"),
    (["--lora-target-modules", "nothing_has_this_name"], "--lora-target-modules"), (["--resume-from-checkpoint", "nowhere"], "--resume-from-checkpoint nowhere"),
], ids=lambda x: "=".join(x) if isinstance(x, list) else "")
def test_training_options(capfd, args, message):
    assert re.search(message, refused(capfd, "mdl_train", *ready()["mdl_train"], *args))


@pytest.mark.parametrize("name", ["nobody/nothing", "./nowhere"])
@pytest.mark.parametrize("command", ["mdl_convert", "mdl_train", "mdl_infer"])
def test_unknown_model(capfd, command, name):
    assert re.match(f"--model-name {name}: .*(offline|no such folder)", refused(capfd, command, *ready()[command][:-2], "--model-name", name))


def damaged_model(kind):
    "A folder that is no model"
    Path("model").mkdir()
    if kind == "recordings": wav("model/a.wav")
    if kind == "broken json":
        for name in ["config.json", "tokenizer_config.json", "tokenizer.json"]: Path("model", name).write_text("{")


@pytest.mark.parametrize("kind", ["empty", "recordings", "broken json"])
@pytest.mark.parametrize("command", ["mdl_convert", "mdl_train", "mdl_infer"])
def test_damaged_model(capfd, command, kind):
    args = ready()[command][:-2]
    damaged_model(kind)
    assert "--model-name model: " in refused(capfd, command, *args, "--model-name", "model")


def test_another_tokenizer(capfd):
    from mdl_nbdev.model.midashenglm_family import tiny_tokenizer
    tok = tiny_tokenizer()
    tok.chat_template = "{# another #}" + tok.chat_template
    tok.save_pretrained("other")
    Path("other/config.json").write_text('{"model_type": "midashenglm"}')
    make_sounds(".", 3)
    with pytest.raises(SystemExit): cli.mdl_convert(["sounds.csv", "--model-name", "other", "--output", "converted"])
    for args in [["--train-dataset", "converted"], ["--train-dataset", "sounds.csv", "--eval-dataset", "converted"]]:
        message = refused(capfd, "mdl_train", *args, "--model-name", "tiny", "--output", "out")
        assert re.match("converted: converted with another tokenizer.*convert it again", message)


def damaged_dataset(kind):
    make_sounds(".", 3)
    with pytest.raises(SystemExit): cli.mdl_convert(["sounds.csv", "--model-name", "tiny", "--output", "converted"])
    shard, = Path("converted").glob("data-*.arrow")
    if kind == "cut shard": shard.write_bytes(shard.read_bytes()[:1000])
    if kind == "no shard": shard.unlink()
    if kind == "no state": Path("converted/state.json").unlink()
    if kind == "recordings": Path("converted").rename("old"), Path("sounds").rename("converted")


@pytest.mark.parametrize("kind", ["cut shard", "no shard", "no state", "recordings"])
def test_damaged_dataset(capfd, kind):
    damaged_dataset(kind)
    message = refused(capfd, "mdl_train", "--train-dataset", "converted", "--model-name", "tiny", "--output", "out")
    assert re.match("converted.*convert", message)


@pytest.mark.parametrize("command", ["mdl_train", "mdl_infer"])
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantization_without_bitsandbytes(capfd, command, bits, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    message = refused(capfd, command, *ready()[command], "--quantization", bits)
    assert re.match(f"--quantization {bits}.*bitsandbytes.*pip install", message)


def test_a_mended_table_goes_on(capfd):
    "Rows that were answered before the stop are not asked again after their file was mended further down"
    make_sounds(".", 12)
    lines = Path("sounds.csv").read_text().splitlines()
    Path("rows.csv").write_text("\n".join([*lines[:10], "lost.wav,tone", *lines[10:]]) + "\n")
    args = [*given("infer", "rows.csv"), "--batch-size", "1", "--on-error", "raise"]
    refused(capfd, *args)
    assert len(read("out.csv.part")) == 1 + 8
    Path("rows.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(SystemExit) as e: cli.mdl_infer(args[1:])
    assert not e.value.code
    assert "8 of them answered before" in capfd.readouterr().out
    assert [r[0] for r in read("out.csv")] == [line.split(",")[0] for line in lines]


# --- Merging

@pytest.fixture
def adapted():
    "A saved tiny model and an adapter for it"
    from mdl_nbdev.base.settings import TuneSettings
    from mdl_nbdev.model.adapters import adapt
    from mdl_nbdev.model.load import load_model, load_processor
    from mdl_nbdev.model.save import save_model
    model = load_model("tiny", device="cpu")
    save_model(model, load_processor("tiny"), "base")
    save_model(adapt(load_model("base", device="cpu"), TuneSettings(train_target=["projector"], lora_rank=2)), load_processor("tiny"), "adapter")


def test_merge(capfd, adapted):
    merge = functools.partial(refused, capfd, "mdl_merge")
    assert re.match("nowhere: no LoRA adapter here", merge("nowhere", "--output", "out"))
    assert re.match("base: no LoRA adapter here", merge("base", "--output", "out"))
    assert re.match("--model-name ./nowhere: ", merge("adapter", "--output", "out", "--model-name", "./nowhere"))
    assert re.match("/proc/new.*: cannot ", merge("adapter", "--output", "/proc/new"))
    Path("recordings").mkdir()
    wav("recordings/a.wav")
    assert re.match("recordings: the output exists already", merge("adapter", "--output", "recordings"))
    for output in ["adapter", "base", "recordings", "recordings/a.wav", "."]:
        assert re.match(rf"(adapter|base|{output}): (this run would replace its own input|not replaced)", merge("adapter", "--output", output, "--overwrite", "true"))
    Path("adapter/adapter_config.json").write_text("{")
    assert re.match("adapter/adapter_config.json: not valid JSON", merge("adapter", "--output", "out"))


def test_damaged_adapter(capfd, adapted):
    "It is refused by merging and by inference"
    make_sounds(".", 3)
    weights = Path("adapter/adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:999])
    for args in [["mdl_merge", "adapter"], ["mdl_infer", "sounds.csv", "--model-name", "base", "--adapter", "adapter"]]:
        assert re.match("adapter: this adapter does not fit base, or is damaged", refused(capfd, *args, "--output", "out"))
    assert "no LoRA adapter here" in refused(capfd, "mdl_infer", "sounds.csv", "--model-name", "base", "--adapter", "nowhere", "--output", "out")
    weights = Path("base/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:99999])
    assert "--model-name base: cannot be loaded: base/model.safetensors is damaged" in refused(capfd, "mdl_infer", "sounds.csv", "--model-name", "base", "--output", "out")
    assert not Path("out").exists()


def test_a_run_that_has_answered_nothing_is_in_nobodys_way(capfd):
    make_sounds(".", 3)
    Path("sounds/0001.wav").unlink()
    refused(capfd, *given("infer", "sounds.csv"), "--on-error", "raise")
    with pytest.raises(SystemExit): cli.mdl_infer([str(a) for a in [*given("infer", "sounds.csv")[1:], "--user-prompt", "What?"]])
    assert len(Path("out.csv").read_text().splitlines()) == 4


LIMITS = [("infer", "--temperature", 0, "at least 1e-06"), ("infer", "--top-p", 2, "at most 1"), ("infer", "--repetition-penalty", 0, "at least 0.01"), ("infer", "--output", "", "a path"),
          ("train", "--lora-dropout", 1.5, "less than 1"), ("train", "--validation-split", 1, "less than 1"), ("train", "--train-dataset", "", "a path")]


@pytest.mark.parametrize("command,option,value,expected", LIMITS, ids=[f"{o}={v}" for _, o, v, _ in LIMITS])
def test_limits(capfd, command, option, value, expected):
    make_sounds(".", 3)
    message = refused(capfd, *given(command, "sounds.csv"), option, value)
    assert re.match(f"{option}: got .*expected .*{expected}", message)


def test_a_bad_value_in_a_configuration_names_its_file(capfd):
    make_sounds(".", 3)
    Path("c.yaml").write_text("lr: fast\n")
    assert "c.yaml: --lr: got 'fast'" in refused(capfd, *given("train", "sounds.csv"), "--config", "c.yaml")


def test_a_run_folder_is_not_its_model(capfd):
    make_sounds(".", 3)
    Path("run/final").mkdir(parents=True)
    Path("run/final/adapter_config.json").write_text("{}")
    assert "this is a run; its model is run/final" in refused(capfd, "mdl_infer", "sounds.csv", "--output", "o.csv", "--model-name", "run")
    assert "did you mean run/final" in refused(capfd, "mdl_merge", "run", "--output", "merged")


@pytest.mark.parametrize("command,size", [("mdl_convert", "1m"), ("mdl_train", "12m")])
@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounts a tmpfs, for which it must be root on Linux")
def test_a_full_disk_is_one_message(command, size):
    make_sounds(".", 60)
    Path("small").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "small"]).returncode: pytest.skip("no mount here")
    source = ["sounds.csv"] if command == "mdl_convert" else ["--train-dataset", "sounds.csv", "--max-steps", 1, "--save-steps", 1]
    try:
        process = start([*source, "--model-name", "tiny", "--output", "small/out"], "log", command)
        assert "the disk is full" in finish(process, "log", 2)
        assert not list(Path("small").rglob(".final.*"))
    finally: subprocess.run(["umount", "small"])
