"Commands that are killed at any moment, and run again, end with the files of an undisturbed run"
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from mdl_nbdev.sounds import make_sounds


def start(folder, command, *args):
    "A command as a process of its own"
    code = f"from mdl_nbdev.cli import {command}; {command}()"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, "-c", code, *args], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process, code=0):
    "Wait for a process and see that it ended as it should; gives what it printed"
    out, err = process.communicate(timeout=100)
    assert "Traceback" not in err, err
    assert process.returncode == code, err
    return out


def wait_until(condition, *args, seconds=60):
    "Wait until something holds"
    end = time.monotonic() + seconds
    while not condition(*args):
        assert time.monotonic() < end
        time.sleep(.002)


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


def rows_of(part): return part.read_bytes().count(b"row ") if part.exists() else 0


@pytest.mark.parametrize("suffix, kills", [("csv", [(16, 48), (64, 88)]), ("tsv", [(16, 88)])])
def test_inference(tmp_path, suffix, kills):
    n, window, rng = 120, 16, random.Random(os.urandom(8))
    args = ["mdl_infer", table(tmp_path, f"rows.{suffix}", n), "--model-name", "tiny", "--batch-size", "2", "--max-new-tokens", "16", "--num-workers", "2", "--output"]
    finish(start(tmp_path, *args, f"whole.{suffix}"), code=2)
    part = tmp_path/f"out.{suffix}.part"
    for low, high in kills:
        process, rows = start(tmp_path, *args, f"out.{suffix}"), rng.randint(low, high)
        wait_until(lambda least: rows_of(part) >= least, rows)
        time.sleep(rng.uniform(0, .1))
        process.kill()
        process.communicate()
        done = rows_of(part)//window*window
        with open(part, "ab") as f: f.write(rng.choice([b"", b'"row', b'"row 99, \xc3', b'x,y', b'"a\n"b",,,\n'])) # a row that was being written
    assert f", {done:,} of them answered before" in finish(start(tmp_path, *args, f"out.{suffix}"), code=2)
    whole, out = ({k.split(".", 1)[1]: v for k, v in contents(tmp_path, f"{name}.*").items()} for name in ["whole", "out"])
    assert sorted(whole) == [suffix, f"{suffix}.rejects.csv"]
    assert whole[suffix].count(b"row ") == n
    assert whole[f"{suffix}.rejects.csv"].count(b"lost/") == 2*len(range(5, n, 8))
    assert out == whole


def test_conversion(tmp_path):
    "The parent alone is killed: its workers must not go on without it"
    n, rng, noise = 260, random.Random(os.urandom(8)), np.random.default_rng(0)
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
        wait_until(lambda least: part.exists() and len(list(part.glob("*.arrow"))) >= least, shards)
        wait_until(children, process)
        time.sleep(rng.uniform(0, .1))
        workers = children(process)
        process.kill()
        process.communicate()
        wait_until(ended, workers, seconds=10) # no worker outlives its parent
        finished = {p.name: p.stat().st_ino for p in part.glob("*.arrow")}
    finish(start(tmp_path, *args, "out"))
    assert contents(tmp_path/"out", "**/*") == contents(tmp_path/"whole", "**/*")
    assert not part.exists()
    assert {p.name: p.stat().st_ino for p in (tmp_path/"out").glob("*.arrow")}.items() >= finished.items(), "finished shards are kept"
