"A conversion whose rows are read shard by shard writes what reading the whole table at once would write"
import csv
import errno
import io
import json
import os
import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.settings import ConvertSettings
from mdl_nbdev.data import plan as module
from mdl_nbdev.data.marks import count_rows, reading
from mdl_nbdev.data.plan import plan_rows, stored_plan
from mdl_nbdev.data.rows import to_conversation
from mdl_nbdev.data.shards import CLAIMS, PLAN, ShardJob, write_facts
from mdl_nbdev.data.sources import open_rows
from mdl_nbdev.model.families import load_chat
from mdl_nbdev.train.convert import conversion_key, convert, plan_shards, write_shard

CHAT = load_chat("tiny-text")
N = 150 # three shards


def rows(): return [dict(user_prompt=f'line\n"{i}", é日\r\nmore', prediction=random.Random(i).choice(["a\nb", "null", "c,d"]), note="") for i in range(N)]


def write_table(path, encoding="utf-8", delimiter=","):
    with open(path, "w", newline="", encoding=encoding) as f:
        writer = csv.DictWriter(f, rows()[0], delimiter=delimiter, quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows())


def write_records(path):
    def turns(i): return [dict(role=role, content=f"{role} {i}") for role in ["user", "assistant"]*2]
    records = [dict(messages=turns(i), data_name=f"task {i % 2}") if i % 3 else dict(prompt=str(i), prediction="x") for i in range(N)]
    path.write_text("".join(json.dumps(r) + "\n"*(1 + (i % 20 == 0)) for i, r in enumerate(records)))


def write_archive(path):
    import tarfile
    with tarfile.open(path, "w") as tar:
        for i in range(N):
            data = json.dumps(dict(prompt=str(i), prediction="x")).encode()
            info = tarfile.TarInfo(f"{i}.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


WRITE = {"rows.csv": write_table, "rows.tsv": lambda path: write_table(path, delimiter="\t"), "bom.csv": lambda path: write_table(path, "utf-8-sig"),
         "utf-16.csv": lambda path: write_table(path, "utf-16"), "rows.jsonl": write_records, "rows.tar": write_archive,
         "rows.parquet": lambda path: pq.write_table(pa.Table.from_pylist(rows()), path, row_group_size=50)}


def settings_of(folder, name, **kw):
    path = folder/name
    if not path.exists(): WRITE[name](path)
    encoding = "utf-16" if name == "utf-16.csv" else "utf-8"
    return ConvertSettings(**dict(input=path, output=folder/"out", model_name="tiny-text", num_workers=1, encoding=encoding) | kw)


def reference(s, folder):
    "Names and bytes of shards of conversations that are all in memory; and the conversations"
    found = [to_conversation(row, s.system_prompt, s.user_prompt) for row in open_rows(s.input, encoding=s.encoding).rows()]
    found = [c.learning_last() if s.learn_answers == "last" else c for c in found]
    folder.mkdir()
    facts = (s.audio_dtype, s.max_audio_seconds, s.tokenizing_batch_size, CHAT.fingerprint, CHAT.family.sample_rate)
    jobs = [ShardJob(folder, n, 64, *facts, conversations=tuple(found[n*64:(n+1)*64])) for n in range(3)]
    shards = [(job, write_shard(job, CHAT).path) for job in jobs]
    return {path.name: job.part(path).read_bytes() for job, path in shards}, found


@pytest.mark.parametrize("options", [dict(), dict(num_workers=2), dict(join=True), dict(learn_answers="last", system_prompt="Short.")], ids=str)
@pytest.mark.parametrize("name", WRITE)
def test_shards_are_those_of_the_whole_table(name, options, tmp_path):
    s = settings_of(tmp_path, name, **options)
    expected, found = reference(s, tmp_path/"reference")
    plan = plan_shards(s, CHAT)
    assert [c for job in plan.read(lambda job: True) for c in job.conversations] == found
    assert [len(job.conversations) for job in plan.read(lambda job: job.index != 1)] == [64, 22] and [job.rows for job in plan.jobs] == [64, 64, 22]
    assert conversion_key(plan) == conversion_key(plan_shards(s, CHAT, keyed=True))
    out = convert(s, CHAT).path
    assert {p.name: p.read_bytes() for p in out.glob("data-*.arrow")} == expected
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("out.")] and not (out/CLAIMS).exists()


@pytest.mark.parametrize("name", WRITE)
def test_rows_are_counted_without_being_parsed(name, tmp_path):
    s = settings_of(tmp_path, name)
    assert count_rows(open_rows(s.input, encoding=s.encoding)) == N


def test_all_faults_are_in_one_report_in_order(tmp_path):
    "Those of the file, of rows, and of the shard that a row would be in"
    s = settings_of(tmp_path, "rows.jsonl")
    lines = [json.dumps(dict(prompt=str(i), prediction="x")) + "\n" for i in range(N)]
    lines[3], lines[70], lines[149] = "{\n", json.dumps(dict(prompt="?")) + "\n", "[]\n"
    s.input.write_text("".join(lines))
    with pytest.raises(InputError) as e: convert(s, CHAT)
    said = str(e.value).splitlines()
    assert said[0] == "3 bad rows:" and said[-1].startswith("The clips have not been checked yet")
    assert [line.removeprefix(f"{s.input}:").split(":")[0] for line in said[1:-1]] == ["4", "71", "150"]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet", "rows.tar", "utf-16.csv"])
def test_a_file_that_changes_after_the_pass_is_refused(name, tmp_path):
    s = settings_of(tmp_path, name)
    plan = plan_shards(s, CHAT)
    shards = plan.read(lambda job: True)
    next(shards)
    if name in ("rows.csv", "rows.jsonl"): s.input.write_bytes(s.input.read_bytes().replace(b"100", b"107"))
    else: os.utime(s.input, ns=(1, 1))
    with pytest.raises(InputError, match=f"{name}: changed while its rows were read; run the same command again"): list(shards)


@pytest.mark.parametrize("name", WRITE)
def test_a_file_that_is_written_during_the_pass_is_refused(name, tmp_path):
    "A row at its end may be half there, and still look like a row"
    s = settings_of(tmp_path, name)
    with pytest.raises(InputError, match=f"{name}: changed while its rows were read"): plan_rows(s, lambda _: os.utime(s.input, ns=(1, 1)))


@pytest.mark.parametrize("name", WRITE)
def test_a_file_that_becomes_shorter_after_the_pass_is_refused(name, tmp_path, monkeypatch):
    "Also where all the shards that are wanted are gone; otherwise a conversion would wait for them without end"
    s = settings_of(tmp_path, name)
    plan = plan_shards(s, CHAT)
    monkeypatch.setitem(globals(), "N", 70)
    WRITE[name](s.input)
    with pytest.raises(InputError, match=f"{name}: changed while its rows were read; run the same command again"):
        list(plan.read(lambda job: job.index == 2))


@pytest.mark.parametrize("name", WRITE)
def test_a_file_that_is_removed_after_the_pass_is_reported(name, tmp_path):
    s = settings_of(tmp_path, name)
    plan = plan_shards(s, CHAT)
    shards = plan.read(lambda job: True)
    next(shards)
    s.input.unlink()
    for rest in shards, plan.read(lambda job: True):
        with pytest.raises(InputError, match=f"{name}: No such file or directory; the working directory is"): list(rest)


def test_a_file_that_cannot_be_read_is_reported(tmp_path):
    "But not a fault of another file as one of this file"
    source = open_rows(settings_of(tmp_path, "rows.csv").input)
    with pytest.raises(InputError, match="rows.csv: cannot be read: Input/output error; run the same command again"), reading(source):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    with pytest.raises(OSError, match="other"), reading(source): raise OSError(errno.EIO, "no", "other")


def test_finished_work_is_kept_when_a_later_row_cannot_be_read(tmp_path, monkeypatch):
    "The disk is waited for: a process that ends while a thread of Arrow writes is aborted"
    s, real = settings_of(tmp_path, "rows.csv"), write_facts
    def slowly(shard):
        s.input.write_text("")
        time.sleep(.3)
        real(shard)
    monkeypatch.setattr("mdl_nbdev.train.convert.write_facts", slowly)
    threads = threading.active_count()
    with pytest.raises(InputError, match="changed while its rows were read"): convert(s, CHAT)
    assert threading.active_count() <= threads + 1 # the claims' thread may take a moment to end
    part = Path(f"{s.output}.part")
    assert [*part.glob("data-00000-*.arrow")] and not [*part.glob("*.tmp")]


def test_a_table_that_grows_between_count_and_pass_is_refused(tmp_path, monkeypatch):
    s = settings_of(tmp_path, "rows.csv")
    monkeypatch.setattr(module, "count_rows", lambda source: 10**5)
    with pytest.raises(InputError, match="rows.csv: changed while its rows were read"): plan_rows(s)


def test_a_stored_plan_is_used_only_for_the_same_rows_and_settings(tmp_path):
    s, path = settings_of(tmp_path, "rows.csv", join=True), tmp_path/"plan"
    assert stored_plan(s, path) is None, "there is none"
    plan = plan_rows(s)
    plan.store(path)
    stored = stored_plan(s, path)
    assert (stored.marks, stored.digest, stored.most_clips) == (plan.marks, plan.digest, plan.most_clips) and plan.digest
    assert stored_plan(replace(s, num_workers=3), path)
    for change in (dict(system_prompt="x"), dict(base_dir=tmp_path), dict(channel="left"), dict(learn_answers="last"), dict(refresh_cache=True)):
        assert stored_plan(replace(s, **change), path) is None
    text = s.input.read_text()
    s.input.write_text(text + "x,y,z\n")
    assert stored_plan(s, path) is None
    s.input.write_text(text)
    stored = path.read_text()
    for damaged in ("", stored[:-9], "{}", "[1, 2, 3, 4]", json.dumps(json.loads(stored)[:3] + [{}])):
        path.write_text(damaged)
        assert stored_plan(s, path) is None


def test_a_process_that_joins_makes_no_pass(tmp_path, monkeypatch):
    "Where the first one has begun, also if that was killed; with other settings, it makes a pass of its own"
    s = settings_of(tmp_path, "rows.csv", join=True)
    part = Path(f"{s.output}.part")
    def killed(*_): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr("mdl_nbdev.train.convert.convert_shards", killed)
        with pytest.raises(KeyboardInterrupt): convert(s, CHAT)
    assert (part/CLAIMS/PLAN).is_file()
    passes, real = [], plan_rows
    monkeypatch.setattr("mdl_nbdev.train.convert.plan_rows", lambda *args: passes.append(1) or real(*args))
    expected, _ = reference(s, tmp_path/"reference")
    assert plan_shards(replace(s, system_prompt="x"), CHAT).digest != plan_shards(s, CHAT).digest and passes == [1]
    out = convert(s, CHAT).path
    assert passes == [1] and {p.name: p.read_bytes() for p in out.glob("data-*.arrow")} == expected


def test_no_more_than_a_few_shards_are_in_memory(tmp_path, monkeypatch):
    "Conversations are gone once their shard is converted"
    import gc
    s, most = settings_of(tmp_path, "rows.jsonl"), [0]
    s.input.write_text("".join(json.dumps(dict(prompt=str(i), prediction="x")) + "\n" for i in range(20*64)))
    def alive(job, chat):
        gc.collect()
        most.append(sum(type(o).__name__ == "Conversation" for o in gc.get_objects()))
        return write_shard(job, chat)
    monkeypatch.setattr("mdl_nbdev.train.convert.write_shard", alive)
    assert convert(s, CHAT).rows == 20*64 and max(most) <= 5*64
