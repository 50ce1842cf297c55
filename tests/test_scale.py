"Converted data at scale: what opening, training and resuming read, and conversions that processes share"
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import training_runs
from waiting import until

import mdl_nbdev.base.claims as claims
from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.settings import ConvertSettings, TrainSettings
from mdl_nbdev.data.shards import CLAIMS, ShardFile, finished_shard
from mdl_nbdev.data.sounds import make_sounds
from mdl_nbdev.model.families import load_chat
from mdl_nbdev.train.convert import convert, write_small_files
from mdl_nbdev.train.dataset import AudioDataset

CHAT = load_chat("tiny")


@pytest.fixture(scope="module")
def csv(tmp_path_factory): return make_sounds(tmp_path_factory.mktemp("sounds"), 64, seed=3)


def settings(csv, out, **kw): return ConvertSettings(input=csv, base_dir=csv.parent, output=out, model_name="tiny", num_workers=1, **kw)


def repeated(csv, folder, shards):
    "A converted folder, one shard of which occurs many times"
    made = convert(settings(csv, folder / "one")).path
    shard = finished_shard(sorted(made.glob("data-*"))[0])
    many = folder / "many"
    many.mkdir()
    copies = [shard._replace(path=many / f"data-{i:05d}-copy.v2.arrow") for i in range(shards)]
    for copy in copies: os.link(shard.path, copy.path)
    write_small_files(settings(csv, many), CHAT, many, copies)
    return many


def open_many(csv, tmp_path, shards):
    "With the shards gone, so that none can be opened or looked at; in a process of its own, which measures itself"
    folder = repeated(csv, tmp_path, shards)
    for path in folder.glob("data-*"): path.unlink()
    code = f"""
import re, time
from pathlib import Path
from mdl_nbdev.model.families import load_chat
from mdl_nbdev.train.batches import StepSampler
from mdl_nbdev.train.dataset import AudioDataset
from mdl_nbdev.train.mix import Mix
chat, start = load_chat('tiny'), time.process_time()
ds = AudioDataset({str(folder)!r}, chat.fingerprint)
opened, start = time.process_time() - start, time.process_time()
mix = Mix([(None, ds)], family=chat.family)
mix.fingerprint(), mix.audio_digest(), str(mix)
batch = next(iter(StepSampler(mix.lengths, 8, task_ids=mix.task_ids)))
print(len(mix), opened, time.process_time() - start, int(re.search('VmHWM: *\\\\t* *(\\\\d+)', Path('/proc/self/status').read_text())[1])/1024, len(batch.rows))"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return [float(x) for x in printed.split()]


def test_opening_reads_no_shard(csv, tmp_path):
    rows, opened, prepared, megabytes, batch = open_many(csv, tmp_path, 1563)
    assert rows == 1563*64 and batch == 8 and opened < 1 and prepared < 4 and megabytes < 250


@pytest.mark.slow
def test_a_million_rows_open_within_two_seconds_and_300_mb(csv, tmp_path):
    rows, opened, prepared, megabytes, _ = open_many(csv, tmp_path, 15_625)
    assert rows == 1_000_000 and opened < 2 and prepared < 5 and megabytes < 300


@pytest.mark.slow
def test_resuming_at_row_500_000_reads_no_row_before_it(csv, tmp_path, monkeypatch):
    "The rows and shards that a resumed run reads are those of its own steps"
    from transformers import TrainerCallback

    from mdl_nbdev.train.batches import StepSampler
    from mdl_nbdev.train.run import train

    class From(TrainerCallback):
        "Two steps from this one on"
        def __init__(self, step): self.step = step
        def on_step_begin(self, args, state, control, **kw):
            if not state.global_step: state.global_step = self.step
        def on_step_end(self, args, state, control, **kw):
            if state.global_step == self.step + 2: control.should_save = control.should_training_stop = True

    data = repeated(csv, tmp_path, 15_625)
    def run(step, **kw):
        s = TrainSettings(output=tmp_path / "run", train_dataset=[data], model_name="tiny", num_workers=1, gradient_checkpointing=False, verify=False, **kw)
        return train(s, [From(step)])
    assert run(62_498).checkpoint.name == "checkpoint-62500" # of 125,000 in the epoch
    rows, shards, read, init = [], set(), AudioDataset.__getitem__, ShardFile.__init__
    monkeypatch.setattr(AudioDataset, "__getitem__", lambda self, i: (rows.append(int(i)), read(self, i))[1])
    monkeypatch.setattr(ShardFile, "__init__", lambda self, path: (shards.add(str(path)), init(self, path))[1])
    monkeypatch.setattr(ShardFile, "batches", None) # which reads a shard as a whole
    began = time.process_time()
    assert run(62_500, resume_from_checkpoint=True).checkpoint.name == "checkpoint-62502"
    ds = AudioDataset(data)
    order = StepSampler(ds.n_tokens + CHAT.family.clip_cost(ds.n_samples, ds.n_clips), 8, 42, task_ids=ds.tasks[1]).order(0)
    assert rows == [row for step in order[62_500:62_502] for row in step.tolist()] and time.process_time() - began < 30
    assert shards == {str(data / f"data-{row//64:05d}-copy.v2.arrow") for row in rows}


def start(csv, out, *args, prepare=None):
    log = out.parent / f"printed-{len(list(out.parent.glob('printed-*')))}"
    argv = [csv, "--output", out, "--model-name", "tiny", "--base-dir", csv.parent, "--num-workers", "1", *args]
    process = training_runs.start(argv, log, "mdl_convert", out.parent, prepare=prepare)
    process.log = log
    return process


def be_slow():
    "Signs of life come often, and every shard takes long enough to be interrupted"
    from mdl_nbdev.train import convert as module
    claims.BEAT, claims.SILENT, written = .2, 3, module.write_shard
    module.write_shard = lambda *a: (written(*a), time.sleep(.5))[0]


def holders(part): return training_runs.claim_holders((part / CLAIMS).glob("*.[0-9]"))


def contents(folder): return {p.name: p.read_bytes() for p in folder.iterdir()}


def table(path, text="word"):
    "Nine shards of texts and a short one, which convert in no time"
    path.write_text("".join(json.dumps(dict(question=f"{text} {i}", answer=str(i))) + "\n" for i in range(581)))
    return path


@pytest.fixture
def many(tmp_path):
    (tmp_path / "rows").mkdir()
    return table(tmp_path / "rows" / "rows.jsonl")


def test_four_processes_of_which_one_is_killed_and_one_stopped(many, tmp_path):
    "The others finish; the bytes are those of one process. Then the stopped one wakes up"
    whole, out = convert(settings(many, tmp_path / "whole")).path, tmp_path / "out"
    running = [start(many, out, "--join", "true", prepare=be_slow) for _ in range(4)]
    def caught(sign):
        found = until(lambda: [p for p in running if p.pid in holders(tmp_path / "out.part")])[0]
        os.kill(found.pid, sign)
        running.remove(found)
        return found
    stopped, _ = caught(signal.SIGSTOP), caught(signal.SIGKILL)
    for p in running: assert "581 rows" in training_runs.finish(p, p.log)
    assert contents(out) == contents(whole)
    os.kill(stopped.pid, signal.SIGCONT)
    assert "581 rows" in training_runs.finish(stopped, stopped.log)
    assert contents(out) == contents(whole) and len(AudioDataset(out)) == 581
    assert sorted(p.name for p in tmp_path.iterdir() if "printed" not in p.name) == ["out", "rows", "whole"]


def test_only_those_that_say_so_share_a_conversion(many, tmp_path):
    "A second start by accident is refused, whether the first one shares its conversion or not; and so is another table or setting"
    other = table(tmp_path / "other.jsonl", "another word")
    for first, second in [("false", "true"), ("true", "false")]:
        out = tmp_path / f"out-{first}"
        one = start(many, out, "--join", first, prepare=be_slow)
        until(lambda pid=one.pid, out=out: pid in holders(Path(f"{out}.part")))
        os.kill(one.pid, signal.SIGSTOP)
        two = start(many, out, "--join", second)
        assert "another process is writing this" in training_runs.finish(two, two.log, 2)
        if first == "true":
            for rows, *args in [(other,), (many, "--audio-dtype", "float32")]:
                three = start(rows, out, "--join", "true", *args)
                assert "other processes convert other rows there, or with other settings" in training_runs.finish(three, three.log, 2)
        os.kill(one.pid, signal.SIGCONT)
        training_runs.finish(one, one.log)
    late = start(many, out, "--join", "true")
    assert "the output exists already" in training_runs.finish(late, late.log, 2)
    with pytest.raises(InputError, match="--join: --overwrite is for one process"): convert(settings(many, out, join=True, overwrite=True))


def test_bad_rows_of_a_shared_conversion_are_reported_by_all(many, tmp_path):
    "All of them, whichever process found them; mended, the finished shards are kept"
    lines = many.read_text().splitlines(keepends=True)
    def lost(i): return json.dumps(dict(messages=[dict(role="user", content=[dict(type="audio", path=f"lost{i}.wav")]), dict(role="assistant", content="x")])) + "\n"
    many.write_text("".join(lost(i) if i in (70, 500) else line for i, line in enumerate(lines)))
    def run(): return [start(many, tmp_path / "out", "--join", "true", prepare=be_slow) for _ in range(2)]
    for p in run(): assert all(f"lost{i}.wav: no such file" in training_runs.finish(p, p.log, 2) for i in (70, 500))
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out.part").glob("data-*.arrow")}
    assert len(kept) == 8
    many.write_text("".join(lines))
    for p in run(): training_runs.finish(p, p.log)
    assert {n: t for n, t in kept.items() if (tmp_path / "out" / n).stat().st_mtime_ns != t} == {} and len(AudioDataset(tmp_path / "out")) == 581
