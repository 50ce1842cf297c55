"Commands that are killed at any moment, and run again, end with the files of an undisturbed run"
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import training_runs
from waiting import until

from mdl_nbdev.base.text import plural
from mdl_nbdev.data.sounds import make_sounds

numbers = count()
KILLS = int(os.environ.get("KILLS", 200)) # of each command in a series


@pytest.fixture
def seed():
    "Decides when a test kills; `SEED=...` repeats one, as far as a machine runs at the same speed"
    number = int(os.environ.get("SEED") or random.randrange(2**32))
    print(f"SEED={number}") # seen if the test fails
    return number


def start(folder, command, *args, **env):
    "A command as a process of its own, in a folder"
    log = folder/f"printed-{next(numbers)}"
    process = training_runs.start(args, log, command, folder, env)
    process.log = log
    return process


def finish(process, code=0): return training_runs.finish(process, process.log, code)


def kill(process):
    process.kill()
    process.join()


def state(pid):
    "The state of a process and the id of its parent"
    try: return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[:2]
    except OSError: return ["X", "0"]


def children(process): return [p.name for p in Path("/proc").glob("[0-9]*") if state(p.name)[1] == str(process.pid)]
def ended(pids): return all(state(pid)[0] in "XZ" for pid in pids)


def contents(folder, pattern): return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob(pattern)) if p.is_file()}


def table(folder, name, n):
    "Sounds with every eighth clip missing, an awkward column, and answers with line ends"
    csv = make_sounds(folder, n)
    rows = [line.split(",") for line in csv.read_text().splitlines()[1:]]
    sep = "\t" if name.endswith(".tsv") else ","
    lines = [sep.join([f'"row {i}, with ""quotes""\nand é日👋"', f"lost/{i}.wav" if i % 8 == 5 else audio, answer]) for i, (audio, answer) in enumerate(rows)]
    (folder/name).write_text("\n".join([sep.join(["note", "audio", "prediction"]), *lines]) + "\n", encoding="utf-8")
    return name


def records(folder, name, n):
    "The same as conversations, every third with a history"
    rows = [line.split(",")[0] for line in make_sounds(folder, n).read_text().splitlines()[1:]]
    turns = lambda i, audio: [*([dict(role="human", content="hello"), dict(role="bot", content="hi 👋")] if i % 3 == 0 else []),
                              dict(role="human", content=f"row {i}\n", audio=f"lost/{i}.wav" if i % 8 == 5 else audio)]
    (folder/name).write_text("".join(json.dumps(dict(number=i, chat_rounds=turns(i, audio))) + "\n" for i, audio in enumerate(rows)))
    return name


def windows_of(log): return log.read_bytes().count(b"\n") if log.exists() else 0
def infer_args(name): return [name, "--model-name", "tiny", "--batch-size", "2", "--max-new-tokens", "4", "--num-workers", "2"]


def same_files(folder, suffix, n, missing):
    "The files of the run out.* are those of the undisturbed run whole.*"
    whole, out = ({k.split(".", 1)[1]: v for k, v in contents(folder, f"{name}.*").items()} for name in ["whole", "out"])
    assert sorted(whole) == [suffix, f"{suffix}.rejects.csv"]
    assert whole[suffix].count(b"row ") == n
    assert whole[f"{suffix}.rejects.csv"].count(b"lost/") == 2*missing
    assert out == whole


def resumed(out): return int(re.search(r", (\d+) of them answered before", out)[1])


@pytest.mark.parametrize("suffix, kills", [("csv", [(1, 3), (4, 6)]), ("jsonl", [(1, 6)]), pytest.param("tsv", [(1, 6)], marks=pytest.mark.slow)])
def test_inference(tmp_path, suffix, kills, seed):
    n, window, rng = 120, 16, random.Random(seed)
    args = ["mdl_infer", *infer_args((records if suffix == "jsonl" else table)(tmp_path, f"rows.{suffix}", n)), "--output"]
    finish(start(tmp_path, *args, f"whole.{suffix}"), code=2)
    part, log = tmp_path/f"out.{suffix}.part", tmp_path/f"out.{suffix}.part.log"
    for low, high in kills:
        process, windows = start(tmp_path, *args, f"out.{suffix}"), rng.randint(low, high)
        until(lambda least=windows: windows_of(log) >= least)
        time.sleep(rng.uniform(0, .1))
        kill(process)
        done = windows_of(log)*window
        with open(part, "ab") as f: f.write(rng.choice([b"", b'"row', b'"row 99, \xc3', b'x,y', b'"a\n"b",,,\n'])) # a row that was being written
        with open(log, "ab") as f: f.write(rng.choice([b"", b'{"window": 99']))
    assert resumed(finish(start(tmp_path, *args, f"out.{suffix}"), code=2)) == done
    same_files(tmp_path, suffix, n, len(range(5, n, 8)))


def launch(folder, *args):
    "mdl_infer as two processes under torchrun"
    command = [Path(sys.executable).parent/"torchrun", "--standalone", "--nproc-per-node", "2", "--no-python", Path(sys.executable).parent/"mdl_infer", *args]
    return subprocess.Popen(command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def by_hand(folder, world, *args):
    "mdl_infer as so many processes that nobody ends when one of them dies"
    return [start(folder, "mdl_infer", *args, **env) for env in training_runs.ranks(world)]


def rank(process, number):
    "Process id of a rank"
    for pid in children(process):
        try: environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError: continue
        if f"RANK={number}".encode() in environment: return int(pid)


@pytest.mark.slow
def test_inference_of_several_processes(tmp_path, seed):
    "One of them is killed at any moment, first under a launcher, then without; then the run goes on with another number of them"
    n, rng = 120, random.Random(seed)
    args = [*infer_args(table(tmp_path, "rows.csv", n)), "--output"]
    finish(start(tmp_path, "mdl_infer", *args, "whole.csv"), code=2)
    logs = [tmp_path/"out.csv.part.log", tmp_path/"out.csv.part-1.log"]
    def kill_at(windows, victim):
        until(lambda: sum(map(windows_of, logs)) >= windows)
        time.sleep(rng.uniform(0, .1))
        os.kill(victim(), signal.SIGKILL)
    launcher, victim = launch(tmp_path, *args, "out.csv"), rng.randint(0, 1)
    until(lambda: rank(launcher, victim))
    kill_at(rng.randint(0, 3), lambda: rank(launcher, victim))
    pids = children(launcher)
    assert "exitcode  : -9" in launcher.communicate(timeout=300)[1]
    assert launcher.returncode and ended(pids), "the launcher ends the others"
    ranks = by_hand(tmp_path, 2, *args, "out.csv")
    kill_at(rng.randint(4, 6), lambda: ranks[victim].pid)
    if victim == 0: finish(ranks[1]) # nobody puts the output together
    else:
        finish(ranks[0], code=2) # it has taken over what the other one had claimed
        same_files(tmp_path, "csv", n, len(range(5, n, 8)))
        return
    done = sum(json.loads(line)["rows"] for log in logs if log.exists() for line in log.read_text().splitlines())
    main, *others = by_hand(tmp_path, rng.choice([1, 3]), *args, "out.csv")
    assert resumed(finish(main, code=2)) == done
    for other in others: finish(other)
    same_files(tmp_path, "csv", n, len(range(5, n, 8)))


def test_conversion(tmp_path, seed):
    "The parent alone is killed: its workers must not go on without it"
    n, rng, noise = 260, random.Random(seed), np.random.default_rng(0)
    lines = ["audio,prediction"]
    for i in range(n):
        sf.write(tmp_path/f"{i}.flac", noise.normal(0, .1, int(44100*noise.uniform(.5, 2))), 44100)
        lines.append(f"{i}.flac,answer {i}")
    sf.write(tmp_path/"long.flac", noise.normal(0, .1, 44100*60), 44100)
    lines += [f"long.flac,long answer {i}" for i in range(16)] # the kills come before these are done
    (tmp_path/"rows.csv").write_text("\n".join(lines) + "\n")
    args = ["mdl_convert", "rows.csv", "--model-name", "tiny", "--num-workers", "2", "--output"]
    finish(start(tmp_path, *args, "whole"))
    part = tmp_path/"out.part"
    for shards in [0, 2]:
        process = start(tmp_path, *args, "out")
        until(lambda least=shards: part.exists() and len(list(part.glob("*.arrow"))) >= least)
        until(lambda parent=process: children(parent))
        time.sleep(rng.uniform(0, .1))
        workers = children(process)
        kill(process)
        until(lambda lost=workers: ended(lost), 60) # no worker outlives its parent
        finished = {p.name: p.stat().st_ino for p in part.glob("*.arrow")}
    finish(start(tmp_path, *args, "out"))
    assert contents(tmp_path/"out", "**/*") == contents(tmp_path/"whole", "**/*")
    assert not part.exists()
    assert {p.name: p.stat().st_ino for p in (tmp_path/"out").glob("*.arrow")}.items() >= finished.items(), "finished shards are kept"


def shards_of_infer(folder): return windows_of(folder/"out.part.log")
def shards_of_convert(folder): return len(list((folder/"out.part").glob("*.arrow")))
def checkpoints(folder): return len(list((folder/"out").glob("checkpoint-*")))


# Arguments of a command but for its output; what is equal in two of its results; how far it is, and in what
SERIES = {
    "mdl_infer": (infer_args("rows.csv"), lambda folder, name: {k.removeprefix(name): v for k, v in (contents(folder, f"{name}*") | contents(folder, f".{name}*")).items()}, shards_of_infer, "shard"),
    "mdl_convert": (["sounds.csv", "--model-name", "tiny", "--num-workers", "2", "--output"], lambda folder, name: contents(folder/name, "**/*"), shards_of_convert, "shard"),
    "mdl_train": (["--train-dataset", "sounds.csv", "--model-name", "tiny", "--batch-size", "8", "--max-steps", "8", "--save-steps", "2", "--logging-steps", "1",
        "--gradient-checkpointing", "false", "--resume-from-checkpoint", "true", "--output"],
        lambda folder, name: (training_runs.weights(folder/name), training_runs.history(folder/name)), checkpoints, "checkpoint")}


class Series:
    "Counts kills by how far a run was, and the results that followed"
    def __init__(self, command, unit, seed): self.command, self.unit, self.seed, self.places, self.ends, self.equal = command, unit, seed, Counter(), 0, 0
    @property
    def kills(self): return self.places.total()
    def __str__(self):
        places = ", ".join(f"{n} with {plural(place, f'finished {self.unit}')}" for place, n in sorted(self.places.items()))
        return f"{self.command}: {plural(self.kills, 'kill')} ({places}), {plural(self.ends, 'result')}, {self.equal} equal to that of an undisturbed run; SEED={self.seed}"


@pytest.mark.slow
@pytest.mark.parametrize("command", SERIES)
def test_kill_series(tmp_path, command, seed, record_property):
    "Each killed run is started again, until it gets to its end: its result is then that of an undisturbed run"
    (args, result, progress, unit), rng = SERIES[command], random.Random(seed)
    if command == "mdl_infer": args = [*args, "--output"]
    table(tmp_path, "rows.csv", 96) # and sounds.csv
    for name in ("first", "whole"): # the first one also starts the server of processes
        begin = time.monotonic()
        finish(start(tmp_path, command, *args, name), code=2 if command == "mdl_infer" else 0)
    seconds, series = time.monotonic() - begin, Series(command, unit, seed)
    whole = result(tmp_path, "whole")
    try:
        while series.kills < KILLS or not series.ends:
            process = start(tmp_path, command, *args, "out")
            process.join(rng.uniform(0, .8)*seconds if series.kills < KILLS else None)
            kill(process)
            assert "Traceback" not in process.log.read_text()
            if process.exitcode == -signal.SIGKILL:
                series.places[progress(tmp_path)] += 1
                continue
            assert process.exitcode == 0 or command == "mdl_infer" or "exists already" in process.log.read_text() # killed at the very end
            series.ends += 1
            series.equal += result(tmp_path, "out") == whole
            assert series.equal == series.ends
            for path in tmp_path.glob("out*"): shutil.rmtree(path) if path.is_dir() else path.unlink()
    finally: record_property("summary", str(series))
