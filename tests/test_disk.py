"A disk that is full or read-only, from any moment of any command on: one message, nothing lost, and a rerun continues"
import errno
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mdl_nbdev import TrainSettings, train
from mdl_nbdev.base import files
from mdl_nbdev.base.errors import WriteError
from mdl_nbdev.cli import commands
from mdl_nbdev.data.sounds import make_sounds

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")]


class Fault:
    "From a certain moment on nothing can be written below the working directory: no byte more, or no file opened for writing"
    def __init__(self): self.kind, self.seen = None, []
    def start(self, kind, after): self.kind, self.after, self.seen = kind, after, []
    def stop(self):
        self.kind = None
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    def __call__(self, event, args): # of Python's audit hooks
        if not self.kind or event not in ("open", "os.mkdir", "os.rename", "os.truncate") or isinstance(args[0], int): return
        path = os.path.abspath(os.fsdecode(args[0]))
        writes = event != "open" or args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not writes or not path.startswith(os.getcwd()): return
        self.seen.append(f"{event} {os.path.relpath(path)}")
        if len(self.seen) <= self.after: return
        if self.kind == "full": resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        else: raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

fault = Fault()
sys.addaudithook(fault)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Sounds, in a table with a row that has no clip, and in one without"
    folder = tmp_path_factory.mktemp("made")
    csv = make_sounds(folder, 4, seed=1)
    rows = csv.read_text().splitlines()
    csv.write_text("\n".join([*rows, "lost.wav,tone"]) + "\n")
    (folder/"good.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(autouse=True)
def here(made, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_SECONDS", 0)
    monkeypatch.setenv("MDL_CACHE", "cache")
    monkeypatch.chdir(tmp_path)
    begin(made, "start")
    yield
    fault.stop()


def begin(made, name):
    "An empty folder with the inputs, as the working directory"
    os.chdir(Path.cwd() if name == "start" else "..")
    Path(name).mkdir()
    os.chdir(name)
    shutil.copytree(made/"sounds", "sounds")
    for n in ("sounds.csv", "good.csv"): shutil.copy(made/n, n)
    shutil.copy("good.csv", "reference.csv")


def an_adapter(made):
    if not (made/"run").exists():
        train(TrainSettings(train_dataset=made/"good.csv", base_dir=made, output=made/"run", model_name="tiny", max_steps=1, merge_lora=False, num_workers=1))
    return str(made/"run"/"final")


def settings_of(command, made):
    "Arguments, and the files that are the result"
    training = ["--train-dataset", "good.csv", "--eval-dataset", "good.csv", "--output", "run", "--model-name", "tiny", "--max-steps", "2", "--save-steps", "1",
                "--logging-steps", "1", "--batch-size", "4", "--num-workers", "1", "--seq-length", "40", "--gradient-checkpointing", "false", "--sample-answers", "1"]
    return dict(
        mdl_merge=lambda: ([an_adapter(made), "--output", "merged"], "merged/*"),
        mdl_convert=lambda: (["good.csv", "--output", "set", "--model-name", "tiny", "--num-workers", "1"], "set/*"),
        mdl_infer=lambda: (["sounds.csv", "--output", "out.csv", "--model-name", "tiny", "--max-new-tokens", "2", "--batch-size", "1", "--num-workers", "1"], "out.csv*"),
        mdl_eval=lambda: (["good.csv", "--reference", "reference.csv", "--output", "figures.json"], "figures.json"),
        mdl_train=lambda: (training, "run/final/model.safetensors"))[command]()


def call(command, argv, capsys, kind=None, after=10**9):
    "Exit code, and what was printed to stderr"
    fault.start(kind or "count", after)
    try:
        with pytest.raises(SystemExit) as e: getattr(commands, command)(argv)
    finally: fault.stop()
    return e.value.code, capsys.readouterr().err


def moments(seen, exhaustive):
    "After how many of the writes the disk is full: each, or the first of each kind of file"
    if exhaustive: return range(len(seen))
    kinds = [re.sub(r"\d+|-[0-9a-f]{8,}", "", s) for s in seen]
    return sorted({kinds.index(k) for k in kinds})


def check(command, kind, made, capsys, exhaustive=False):
    argv, pattern = settings_of(command, made)
    def results(): return {str(p): p.read_bytes() for p in sorted(Path().glob(pattern)) if p.name != "README.md"}
    normal = 2 if command == "mdl_infer" else 0 # a row without an answer
    code, err = call(command, argv, capsys)
    assert code == normal, err
    whole, seen = results(), list(fault.seen)
    assert whole
    again = [*argv, *(["--resume-from-checkpoint", "true"] if command == "mdl_train" else ["--overwrite", "true"] if command == "mdl_merge" else [])]
    told = 0
    for after in moments(seen, exhaustive):
        begin(made, f"{kind}-{after}")
        code, err = call(command, argv, capsys, kind, after)
        where = f"{command}, {kind} after {after}: {seen[after]}\n{err}"
        said = [line for line in err.splitlines() if line.startswith(f"{command}: ")]
        assert "Traceback" not in err, where
        if code != normal or "Finished work is kept" in err:
            told += 1
            assert code == 2 and len(said) == 1 and err.splitlines()[-1] == said[0], where
            assert re.search(r"(set|out\.csv|merged|figures\.json|run|cache)\S*: ", said[0]), where
            assert re.search("run the command again|resume with --resume-from-checkpoint true", said[0]), where
        elif results() == whole: continue # the last write of all
        code, err = call(command, again, capsys)
        assert code == normal and results() == whole, where + err
    return told, len(seen)


slow = pytest.mark.slow

@pytest.mark.parametrize("kind", ["full", "read-only"])
@pytest.mark.parametrize("command,exhaustive", [("mdl_convert", False), ("mdl_infer", False), ("mdl_eval", False),
    pytest.param("mdl_merge", False, marks=slow), pytest.param("mdl_train", False, marks=slow), pytest.param("mdl_convert", True, marks=slow),
    pytest.param("mdl_infer", True, marks=slow)])
def test_nothing_can_be_written(command, exhaustive, kind, made, capsys):
    told, of = check(command, kind, made, capsys, exhaustive)
    with capsys.disabled(): print(f"\n{command}, {kind}: {told} messages, {of} writes")
    assert told


@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_generated_sounds(kind):
    fault.start(kind, 2)
    with pytest.raises(WriteError, match="^new/sounds: cannot write this folder: .*choose another --output"): make_sounds("new", 20)


@pytest.mark.slow
def test_batches_take_no_shared_memory():
    "Containers have 64 MB of it, this one half of what a batch takes"
    csv = make_sounds("many", 32, seed=1)
    code = "from mdl_nbdev.cli.commands import mdl_train; mdl_train()"
    argv = ["--train-dataset", csv, "--base-dir", "many", "--output", "run", "--model-name", "tiny", "--max-steps", "4", "--batch-size", "16", "--num-workers", "2"]
    script = 'mount -t tmpfs -o size=512k tmpfs /dev/shm && echo mounted && exec "$@"'
    if not shutil.which("unshare"): pytest.skip("no unshare here")
    r = subprocess.run(["unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=600)
    if "mounted" not in r.stdout: pytest.skip("no mount here")
    assert r.returncode == 0 and Path("run/final").is_dir(), r.stderr[-2000:]


@pytest.mark.slow
def test_shared_memory_that_does_not_hold_locks():
    "One message that names it, rather than the disk, and a remedy that works"
    csv = make_sounds("many", 130, seed=1)
    script = "mount -t tmpfs -o size=4k tmpfs /dev/shm && echo mounted && exec \"$@\""
    if not shutil.which("unshare"): pytest.skip("no unshare here")
    def run(command, *argv):
        code = f"from mdl_nbdev.cli.commands import {command}; {command}()"
        return subprocess.run(["unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-c", code, *map(str, argv), "--model-name", "tiny"], capture_output=True, text=True, timeout=600)
    converted = [run("mdl_convert", csv, "--base-dir", "many", "--output", "set", "--num-workers", n) for n in (2, 1)]
    if "mounted" not in converted[0].stdout: pytest.skip("no mount here")
    trained = [run("mdl_train", "--train-dataset", "set", "--output", f"run{n}", "--num-workers", n, "--max-steps", 2) for n in (2, 1)]
    for failed, done in (converted, trained):
        assert failed.returncode == 2 and "the shared memory in /dev/shm is full" in failed.stderr and "Traceback" not in failed.stderr, failed.stderr[-2000:]
        assert done.returncode == 0, done.stderr[-2000:]
