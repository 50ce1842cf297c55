"Converted datasets: what lies on disk, workers, crashes, folders of MDL-Toolkit; mixes of tasks and samples that are too long"
import gc
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import soundfile as sf
from xxhash import xxh3_128_hexdigest

from mdl_nbdev.base import files as base_files
from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.processes import Ranks
from mdl_nbdev.base.settings import ConvertSettings, TrainSettings
from mdl_nbdev.data.audio import load_audio, to_int16
from mdl_nbdev.data.shards import INDEX, MANIFEST, facts_path, finished_shard, record_batch, write_facts
from mdl_nbdev.data.sounds import make_sounds
from mdl_nbdev.data.tables import read_rows
from mdl_nbdev.model.families import load_chat
from mdl_nbdev.train import dataset
from mdl_nbdev.train.convert import conversion_key, convert, plan_shards, row_schema
from mdl_nbdev.train.dataset import AudioDataset, open_dataset
from mdl_nbdev.train.mix import BatchRows, Mix, describe_conversions, draw_groups, limit_length, open_mix, split
from mdl_nbdev.train.prepare import open_datasets

CHAT = load_chat("tiny")
TOK = CHAT.tok


@pytest.fixture(scope="module")
def csv(tmp_path_factory): return make_sounds(tmp_path_factory.mktemp("sounds"), 150, seed=3)


def settings(csv, out, **kw): return ConvertSettings(input=csv, base_dir=csv.parent, output=out, model_name="tiny", num_workers=kw.pop("num_workers", 1), **kw)


def files(folder): return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_rows_hold_the_clips_and_the_texts(csv, tmp_path, dtype):
    ds = AudioDataset(convert(settings(csv, tmp_path / "d", audio_dtype=dtype, user_prompt="What?")).path)
    plain = datasets.load_from_disk(str(tmp_path / "d"))
    for i, row in enumerate(read_rows(csv)):
        wave = load_audio(csv.parent / row.audio)
        assert np.array_equal(ds[i].clips[0], to_int16(wave) if dtype == "int16" else wave)
        assert TOK.decode(ds[i].labels[ds[i].labels >= 0]) == row.prediction + "<|im_end|>"
        assert ds[i].line == row.line == plain[i]["line"] and plain[i]["input_ids"] == ds[i].input_ids.tolist()
        if i == 5: assert plain[i]["audio"] == pytest.approx(ds[i].clips[0].tolist())


def test_any_number_of_workers_writes_the_same_bytes(csv, tmp_path):
    one, three = (convert(settings(csv, tmp_path / str(n), num_workers=n)).path for n in (1, 3))
    a, b = files(one), files(three)
    assert a == b and len([n for n in a if n.endswith(".arrow")]) == 3


def test_short_rows_share_a_record_batch(csv, tmp_path, monkeypatch):
    together = AudioDataset(convert(settings(csv, tmp_path / "one")).path, name="x")
    monkeypatch.setattr("mdl_nbdev.train.convert.RECORD_BATCH", 1)
    apart = AudioDataset(convert(settings(csv, tmp_path / "many")).path, name="x")
    assert len(list(apart.batches())) == 8 + 8 + 3 and len(list(together.batches())) <= 6
    assert Mix([(None, apart)]).fingerprint() == Mix([(None, together)]).fingerprint()
    for name in ("n_tokens", "n_samples", "n_clips", "lines"): assert np.array_equal(getattr(apart, name), getattr(together, name))
    for i in (0, 77, 149):
        assert np.array_equal(apart[i].clips[0], together[i].clips[0]) and apart[i].conversation == together[i].conversation


def test_rows_are_read_once_ahead_and_once_to_be_converted(csv, tmp_path, monkeypatch):
    "A conversion that is there already needs the first pass only"
    from mdl_nbdev.data import plan as module
    lines, make = [], module.row_conversation
    monkeypatch.setattr(module, "row_conversation", lambda row, s: lines.append(row.line) or make(row, s))
    options = dict(model_name="tiny", base_dir=csv.parent, num_workers=1)
    for times in (2, 1):
        assert len(open_dataset(csv, CHAT, tmp_path / "run", **options)) == 150
        assert lines == [*range(2, 152)]*times
        lines.clear()


def test_all_bad_rows_in_one_report_and_finished_shards_kept(csv, tmp_path):
    broken = tmp_path / "broken.csv"
    lines = csv.read_text().splitlines()
    good = lines[70]
    lines[70], lines[75] = "lost.wav,x", good.split(",")[0] + ","
    broken.write_text("\n".join(lines) + "\n")
    s = replace(settings(csv, tmp_path / "d"), input=broken)
    with pytest.raises(InputError, match=r"broken.csv:76: the prediction is empty"): convert(s)
    lines[75] = good
    broken.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=r"broken.csv:71: .*lost.wav: no such file"): convert(s)
    kept = {p.name: os.stat(p).st_mtime_ns for p in Path(f"{s.output}.part").glob("data-*.arrow")}
    assert len(kept) == 2
    lines[70] = good
    broken.write_text("\n".join(lines) + "\n")
    out = convert(s).path
    assert all(os.stat(out / n).st_mtime_ns == t for n, t in kept.items())
    assert len(AudioDataset(out)) == 150 and not Path(f"{s.output}.part").exists()


@pytest.mark.parametrize("audio_dtype", ["int16", "float32"])
def test_columns_are_as_pyarrow_makes_them(audio_dtype):
    rng, schema = np.random.default_rng(0), row_schema(audio_dtype)
    def row(lengths):
        samples = (100*rng.normal(size=sum(lengths))).astype(audio_dtype) if lengths else []
        return dict(input_ids=np.arange(5, dtype=np.int32), labels=np.array([-100, 3], np.int32), audio=samples, audio_lengths=lengths,
                    line=7, task="", conversation='{"a": "ü 你"}', spans=np.array([1, 2, 3, 4]))
    for rows in [[row([5, 2]), row([]), row([9])], [row([])], [row([0]), row([3])]]:
        made = record_batch(rows, schema)
        made.validate(full=True)
        assert made.equals(pa.RecordBatch.from_arrays([pa.array([r[f.name] for r in rows], f.type) for f in schema], schema=schema))


def test_digests_of_a_shard(csv, tmp_path):
    "Of its file, its audio and its tokens; a rerun that finds the shard written computes the same, or reads it"
    out = convert(settings(csv, tmp_path / "d")).path
    for name, facts in json.loads((out / "mdl_nbdev.json").read_text())["shards"].items():
        table = pa.ipc.open_stream(out / name).read_all()
        columns = {c: xxh3_128_hexdigest(table.column(c).combine_chunks().flatten().to_numpy().tobytes()) for c in ("audio", "input_ids", "labels")}
        assert facts == dict(rows=len(table), xxh3=xxh3_128_hexdigest((out / name).read_bytes()), **columns)
        shard = finished_shard(out / name)
        assert dict(rows=shard.rows, **shard.digests) == facts
        write_facts(shard)
        (out / name).rename(out / "elsewhere")
        assert finished_shard(out / name) == shard
        facts_path(out / name).unlink()


def test_conversion_imports_neither_torch_nor_pandas(csv, tmp_path):
    "Each of them takes longer to import than a hundred clips to convert"
    code = f"""
import sys
from mdl_nbdev import convert, ConvertSettings
convert(ConvertSettings(input={str(csv)!r}, output={str(tmp_path / "d")!r}, model_name='tiny', base_dir={str(csv.parent)!r}, num_workers=1))
print(*{{'torch', 'pandas'}} & set(sys.modules))"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_runs_of_the_same_data_share_one_conversion(csv, tmp_path, monkeypatch):
    "Also from other folders; other settings have their own. When rows change, the next conversion takes over what is right, unless a run reads it"
    rows, cache = tmp_path / "rows.csv", tmp_path / "cache"
    shutil.copy(csv, rows)
    def open_(path=rows, **kw): return open_dataset(path, CHAT, cache, **dict(model_name="tiny", base_dir=csv.parent, num_workers=1) | kw)
    def folders(): return sorted(p.name for p in cache.iterdir())
    def shards(ds): return {p.name: p.stat().st_ino for p in ds.path.glob("data-*")}
    def edit(text): rows.write_text("\n".join([*csv.read_text().splitlines()[:-1], csv.read_text().splitlines()[-1].rsplit(",", 1)[0] + "," + text]) + "\n")
    first = open_()
    monkeypatch.chdir(tmp_path)
    assert open_("rows.csv", num_workers=2).path == first.path and folders() == [first.path.name]
    other = open_(user_prompt="Which sound?")
    assert other.path != first.path and len(folders()) == 2
    before, label = shards(first), first[149].conversation.reference
    edit("changed")
    second = open_()
    assert (first[149].conversation.reference, second[149].conversation.reference) == (label, "changed") and len(folders()) == 3
    del first
    gc.collect()
    edit("changed again")
    third = open_()
    assert folders() == sorted(p.path.name for p in (second, third, other)) and third[149].conversation.reference == "changed again"
    assert [before[n] == i for n, i in sorted(shards(third).items()) if n in before] == [True, True] and len(shards(third)) == 3
    ds = AudioDataset(third.path)
    ds.verify(required=True)


def test_a_run_waits_for_the_conversion_of_another_one(tmp_path, monkeypatch, capsys):
    "Instead of converting the same once more, or giving up"
    monkeypatch.setattr(base_files, "LOCK_SECONDS", 0)
    csv, made = make_sounds(tmp_path / "s", 3, seed=1), []
    def open_(): made.append(open_dataset(csv, CHAT, tmp_path / "cache", model_name="tiny", base_dir=csv.parent, num_workers=1))
    convert_, started, go = dataset.convert, threading.Event(), threading.Event()
    monkeypatch.setattr(dataset, "convert", lambda *a: (started.set(), go.wait(60), convert_(*a)))
    threads = [threading.Thread(target=open_) for _ in range(2)]
    threads[0].start()
    assert started.wait(60)
    monkeypatch.setattr(dataset, "convert", None)
    threads[1].start()
    while "waiting for it" not in (said := capsys.readouterr().err): threads[1].join(.1)
    assert f"another process is writing this (process {os.getpid()} on " in said and not made
    go.set()
    for t in threads: t.join()
    assert made[0].path == made[1].path and [p.name for p in (tmp_path / "cache").iterdir()] == [made[0].path.name]


def test_a_conversion_in_the_run_folder_of_an_earlier_version_is_used(tmp_path, monkeypatch):
    csv = make_sounds(tmp_path / "s", 3, seed=1)
    s = ConvertSettings(input=csv, output=tmp_path / "run" / "0-sounds", model_name="tiny", base_dir=csv.parent, num_workers=1)
    jobs = plan_shards(s, CHAT)
    convert(s, CHAT, jobs)
    (s.output / "key").write_text(conversion_key(jobs))
    mix = open_mix([csv], CHAT, tmp_path / "cache", earlier=tmp_path / "run", model_name="tiny", base_dir=csv.parent, num_workers=1)
    assert mix.datasets[0].path == s.output
    assert describe_conversions([mix, None]) is None and not (tmp_path / "cache").exists()


def test_a_flipped_bit_is_found_before_training(tmp_path):
    "In a new run, and where it is asked for; the message says how to mend it"
    csv = make_sounds(tmp_path / "s", 3, seed=1)
    def opened(data, **kw): return open_datasets(TrainSettings(train_dataset=data, base_dir=csv.parent, output=tmp_path / "run", model_name="tiny", **kw), CHAT, Ranks())
    def flip(folder):
        shard = next(folder.glob("data-*"))
        data = bytearray(shard.read_bytes())
        data[len(data)//2] ^= 1
        shard.write_bytes(data)
    own, cached = convert(settings(csv, tmp_path / "d")).path, opened(csv)[0].datasets[0].path
    for folder in (own, cached): flip(folder)
    for data, remedy in ((own, "convert the file again"), (csv, f"delete the folder {cached}, then run")):
        for kw in (dict(), dict(verify=True), dict(verify=True, resume_from_checkpoint=True)):
            with pytest.raises(InputError, match=rf"data-\S+.arrow: is damaged: its contents are not what was converted; {remedy}"): opened(data, **kw)
        for kw in (dict(verify=False), dict(resume_from_checkpoint=True)): opened(data, **kw)
    shutil.rmtree(cached)
    opened(csv, verify=True)
    manifest = json.loads((own / "mdl_nbdev.json").read_text())
    (own / "mdl_nbdev.json").write_text(json.dumps({k: v for k, v in manifest.items() if k not in ("shards", "index")}))
    opened(own)
    with pytest.raises(InputError, match="--verify: .*d has no checksums"): opened(own, verify=True)


def test_wherever_a_bit_flips(tmp_path):
    "The header of the file, its columns and its end: everything has been hashed"
    folder = convert(settings(make_sounds(tmp_path / "s", 3, seed=1), tmp_path / "d")).path
    shard = next(folder.glob("data-*"))
    data = shard.read_bytes()
    for at in [*range(0, 4000, 41), *range(4000, len(data), len(data)//40), len(data) - 1]:
        shard.write_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at+1:])
        with pytest.raises(InputError, match="damaged|of the .* rows|lacks the columns"): open_dataset(folder, CHAT, tmp_path).verify()


def test_a_folder_that_was_copied_in_part(tmp_path):
    "A shard that is missing is found before training, and one that ends early when it is read"
    folder = convert(settings(make_sounds(tmp_path / "s", 3, seed=1), tmp_path / "d")).path
    ds = AudioDataset(folder)
    start, shard = int(ds.read("start")[0]), folder / ds.shards[0]
    for size in (start, start + 9, 0):
        os.truncate(shard, size)
        with pytest.raises(InputError, match=r"\.arrow: is missing or damaged .*convert the file again"): AudioDataset(folder)[0]
    shard.unlink()
    with pytest.raises(InputError, match=r"d: is incomplete or damaged .*data-00000-.*; convert the file again"): AudioDataset(folder).verify()


def test_a_folder_that_is_replaced_while_a_run_reads_it(tmp_path):
    "By another conversion, whose shards have other names; by one whose rows are in shards of the same names; and by nothing"
    def made(name, n): return convert(settings(make_sounds(tmp_path / f"s{n}", n, seed=n), tmp_path / name)).path
    first, second = made("d", 70), made("e", 75)
    shards = [sorted(p.name for p in folder.glob("data-*")) for folder in (first, second)]
    replaced = r"d: was replaced or removed after it had been opened; restore it and resume the run, or start a new one"
    ds = AudioDataset(first)
    first.rename(tmp_path / "old")
    second.rename(first)
    for rows in (75, None):
        with pytest.raises(InputError, match=replaced): ds[69]
        if rows: shutil.copytree(first, second), shutil.rmtree(first)
    shutil.copytree(second, first)
    for old, new in zip(*shards): (first / new).rename(first / old)
    with pytest.raises(InputError, match=replaced): ds[69]
    for name in (MANIFEST, INDEX): shutil.copy(tmp_path / "old" / name, first)
    with pytest.raises(InputError, match=r"data-00001-.*: is missing or damaged \(this row is not the one in the index\)"): AudioDataset(first)[69]


def test_a_changed_clip_is_converted_again(tmp_path):
    csv = make_sounds(tmp_path / "s", 5, seed=1)
    out = dict(model_name="tiny", base_dir=csv.parent)
    before = open_dataset(csv, CHAT, tmp_path / "run", **out)[0].clips[0].copy()
    first = next(read_rows(csv)).audio
    sf.write(csv.parent / first, np.zeros(8000, np.float32), 16000)
    after = open_dataset(csv, CHAT, tmp_path / "run", **out)[0].clips[0]
    assert len(after) == 8000 and not after.any() and before.any()


def change_clip(folder): sf.write(folder/"sounds"/"0003.wav", sf.read(folder/"sounds"/"0003.wav", dtype="int16")[0][::-1].copy(), 16000)
def change_rows(change):
    def edit(folder):
        lines = (folder/"sounds.csv").read_text().splitlines(keepends=True)
        change(lines)
        (folder/"sounds.csv").write_text("".join(lines))
    return edit


EDITS = {"nothing": (lambda folder: None, {}), "a clip of the same length": (change_clip, {}), "a word": (change_rows(lambda lines: lines.insert(9, lines.pop(9).replace("\n", "!\n"))), {}),
    "a row more": (change_rows(lambda lines: lines.insert(70, lines[3])), {}), "rows fewer": (change_rows(lambda lines: lines.__delitem__(slice(20, 90))), {}),
    "another order": (change_rows(lambda lines: lines.insert(1, lines.pop(100))), {}), "prompt": (lambda folder: None, dict(user_prompt="What?")), "type": (lambda folder: None, dict(audio_dtype="float32")),
    "base folder": (lambda folder: shutil.copytree(folder/"sounds", folder/"b"/"sounds"), dict(base_dir="b")), "answers": (lambda folder: None, dict(learn_answers="last"))}

@pytest.mark.parametrize("name", EDITS)
def test_a_conversion_that_ended_early_and_was_edited_is_as_a_new_one(tmp_path, monkeypatch, name):
    edit, changes = EDITS[name]
    monkeypatch.chdir(tmp_path)
    make_sounds(tmp_path, 130, seed=4) # three shards
    s = ConvertSettings(input="sounds.csv", output="d", model_name="tiny", num_workers=1)
    with monkeypatch.context() as m:
        m.setattr("mdl_nbdev.train.convert.write_small_files", lambda *args: 1/0)
        with pytest.raises(ZeroDivisionError): convert(s)
    assert len(list(Path("d.part").glob("*.arrow"))) == 3
    edit(tmp_path)
    convert(replace(s, **changes))
    convert(replace(s, output="new", **changes))
    assert files(Path("d")) == files(Path("new")) and not Path("d.part").exists()


def test_a_folder_of_mdl_toolkit_opens(tmp_path):
    "Its rows are padded to their conversion batch: on the left with masked tokens, on the right with silence"
    wave = np.linspace(-1, 1, 4000, dtype=np.float32)
    datasets.Dataset.from_dict({
        "input_ids": [[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]], "attention_mask": [[0, 0, 1, 1, 1], [1] * 5], "labels": [[-100, -100, -100, 6, 7], [-100] * 3 + [4, 5]],
        "input_values": [np.pad(wave[:3300], (0, 700)).tolist(), wave.tolist()], "audio_length": [3300, 4000]}).save_to_disk(tmp_path / "peer")
    ds = AudioDataset(tmp_path / "peer", CHAT.fingerprint)
    assert ds[0].input_ids.tolist() == [5, 6, 7] and ds[0].labels.tolist() == [-100, 6, 7] and np.array_equal(ds[0].clips[0], wave[:3300])
    assert ds.n_tokens.tolist() == [3, 5] and ds.n_samples.tolist() == [3300, 4000]
    assert ds.tasks[0] == ["peer"] and ds[1].task == "peer" and len(Mix([(None, ds)]).fingerprint()) == 20


def test_a_folder_of_version_0_1_0_opens():
    "Written by that version from a row with a clip, one with two, and one without; rows did not keep their conversations yet"
    ds = AudioDataset(Path(__file__).parent / "fixtures" / "converted-0.1.0", CHAT.fingerprint, "old")
    def ramp(n): return np.arange(n) % 100 * 100
    clips, answers = [[1600], [2400, 3200], []], ["a ramp", "the second", "hello"]
    assert len(ds) == 3 and ds.tasks[0] == ["compare", "old", "words"] and ds.lines.tolist() == [1, 2, 3] and ds.sample_rate == 16000
    assert ds.n_samples.tolist() == [1600, 5600, 0] and ds.n_tokens.tolist() == [52, 56, 52]
    for e, lengths, answer, line in zip(ds, clips, answers, (1, 2, 3)):
        assert [c.tolist() for c in e.clips] == [ramp(n).tolist() for n in lengths] and all(c.dtype == np.int16 for c in e.clips)
        assert TOK.decode(e.labels[e.labels >= 0]) == answer + "<|im_end|>" and (e.file, e.line) == ("rows.jsonl", line)
        assert e.conversation is None and e.spans is None
    assert Mix([(None, ds)]).fingerprint(earlier=True) == "45576bd81f5da77d", "what a checkpoint of that version has recorded"


def test_rows_keep_their_conversations(spoken, tmp_path):
    out = convert(ConvertSettings(input=spoken, output=tmp_path / "d", model_name="tiny", system_prompt="Listen.")).path
    plain, ds = datasets.load_from_disk(str(out)), AudioDataset(out)
    for i, (row, line) in enumerate(zip(plain, spoken.read_text().splitlines())):
        raw, kept = json.loads(line), json.loads(row["conversation"])
        assert kept["line"] == row["line"] == i + 1 and kept["file"] == str(spoken) and kept["task"] == raw["data_name"]
        assert [m["role"] for m in kept["messages"]] == ["system", *(m["role"] for m in raw["messages"])]
        said = [p.get("path") or p["text"] for m in raw["messages"] if m["role"] == "user" for p in m["content"]]
        assert [p.get("audio") or p["text"] for m in kept["messages"] if m["role"] == "user" for p in m["content"]] == said
        assert vars(ds[i].conversation) == kept and ds[i].spans.shape == (len(kept["messages"]), 2)
        for m, (start, stop) in zip(kept["messages"], ds[i].spans):
            words = [p["text"] for p in m["content"] if p["type"] == "text"]
            assert all(w in TOK.decode(ds[i].input_ids[start:stop]) for w in words)
        short = limit_length(Mix([(None, ds)]), 60, "truncate", CHAT)[0]
        assert all(e.spans.max() <= 60 for e in short)


def test_a_batch_of_many_clips_fits_its_record_batch(spoken, csv, tmp_path):
    "Arrow counts the samples of a record batch in 32 bits: fewer rows are tokenized together when a row has many clips"
    def size(path, **kw): return plan_shards(ConvertSettings(input=path, output=tmp_path / "d", base_dir=csv.parent, **kw), CHAT).jobs[0].batch_size
    assert size(csv) == 8 and size(csv, tokenizing_batch_size=1000) == 2**31 // (600 * 16000) and size(spoken, tokenizing_batch_size=1000) == 2**31 // (3 * 600 * 16000)


@pytest.mark.parametrize("what", ["nothing", "a file of another kind", "an empty folder", "missing columns"])
def test_what_is_no_dataset_is_refused(tmp_path, what):
    path = tmp_path / "x"
    if what == "a file of another kind": path.write_text("hello")
    if what == "an empty folder": path.mkdir()
    if what == "missing columns": datasets.Dataset.from_dict({"input_ids": [[1]], "labels": [[1]]}).save_to_disk(path)
    with pytest.raises(InputError, match="x: "): AudioDataset(path)


# Records, and mixes of tasks


def write_records(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def spell(words, **kw): return [dict(question=w, answer="-".join(w), **kw) for w in words]


@pytest.fixture(scope="module")
def spoken(csv, tmp_path_factory):
    "Records with no clip, one, and several, in a file of their own"
    clips = [str(csv.parent / r.audio) for r in read_rows(csv)][:9]
    user = lambda *parts: dict(role="user", content=[dict(type="audio", path=p) if p in clips else dict(type="text", text=p) for p in parts])
    bot = lambda text: dict(role="assistant", content=text)
    rounds = [[user(clips[0]), bot("one")], [user("before", clips[1], clips[2], "after"), bot("two"), user("and", clips[3]), bot("three")], [user("no clip"), bot("none")]]
    more = [[user(clips[i], clips[i + 1], "Which is longer?"), bot("the first of them")] for i in range(4, 8)]
    return write_records(tmp_path_factory.mktemp("records") / "spoken.jsonl", [dict(messages=m, data_name=f"t{i % 2}") for i, m in enumerate(rounds + more)])


@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_audio_of_records_is_kept_exactly(spoken, tmp_path, dtype):
    ds = AudioDataset(convert(ConvertSettings(input=spoken, output=tmp_path / "d", model_name="tiny", audio_dtype=dtype)).path)
    for i, line in enumerate(spoken.read_text().splitlines()):
        raw = json.loads(line)
        sources = [p["path"] for m in raw["messages"] if m["role"] == "user" for p in m["content"] if p["type"] == "audio"]
        assert len(ds[i].clips) == len(sources) and ds[i].line == i + 1 and ds[i].task == raw["data_name"]
        for got, path in zip(ds[i].clips, sources):
            wave, _ = sf.read(path, dtype="float32")  # these clips are 16 kHz mono
            assert got.dtype == dtype and np.array_equal(got, wave if dtype == "float32" else np.round(wave * 32768).astype(np.int16))
        answers = [m["content"] for m in raw["messages"] if m["role"] == "assistant"]
        assert TOK.decode(ds[i].labels[ds[i].labels >= 0]) == "".join(a + "<|im_end|>" for a in answers)
    assert datasets.load_from_disk(str(tmp_path / "d"))["task"] == [f"t{i % 2}" for i in range(7)]


def test_all_records_that_the_template_cannot_show_are_named(tmp_path):
    words = write_records(tmp_path / "w.jsonl", spell(["ab", "<|role_start|>", "cd", "x<|role_end|>"]))
    with pytest.raises(InputError) as e: convert(ConvertSettings(input=words, output=tmp_path / "d", model_name="tiny-text"))
    assert "w.jsonl:2: the user's text contains '<|role_start|>'" in str(e.value) and "w.jsonl:4: the user's text contains '<|role_end|>'" in str(e.value)


def test_names_of_tasks(spoken, tmp_path):
    "A folder of its own, else data_name, else the file; also when converted first"
    for name, words in [("upper", ["AB", "CD"]), ("lower", ["a", "b", "c"])]:
        for i, w in enumerate(words): write_records(tmp_path / "tasks" / name / f"{i}.jsonl", spell([w], data_name="not used"))
    plain = write_records(tmp_path / "plain.jsonl", [*spell("xy"), *spell("z", data_name="named")])
    mix = open_mix([tmp_path / "tasks", spoken, plain], CHAT, tmp_path / "cache", model_name="tiny")
    assert mix.task_names == ["lower", "named", "plain", "t0", "t1", "upper"]
    assert [mix[i].task for i in range(len(mix))] == ["lower"] * 3 + ["upper"] * 2 + ["t0", "t1"] * 3 + ["t0", "plain", "plain", "named"]
    assert [mix[i].task_id for i in range(len(mix))] == mix.task_ids.tolist()
    assert {k: v["rows"] for k, v in mix.describe().items()} == dict(lower=3, named=1, plain=2, t0=4, t1=3, upper=2)
    converted = convert(ConvertSettings(input=plain, output=tmp_path / "out" / "plain", model_name="tiny")).path
    assert open_mix([converted], CHAT, tmp_path / "cache2").describe() == open_mix([plain], CHAT, tmp_path / "cache3", model_name="tiny").describe()


def test_evaluation_numbers_tasks_as_training_does(csv, tmp_path):
    for name in "abc": write_records(tmp_path / f"{name}.jsonl", spell(["x", "y"]))
    def open_(*names, **kw): return open_mix([tmp_path / f"{n}.jsonl" for n in names], CHAT, tmp_path / "_".join(names), model_name="tiny", **kw)
    assert open_("c", "a", names=["a", "b", "c"]).task_ids.tolist() == [2, 2, 0, 0]
    assert open_("c", "a", names=["b"]).task_ids.tolist() == [0] * 4 and open_("c", names=["b"])[0].task == "b"
    with pytest.raises(InputError, match="has a task 'b' that is not in the training data, which has a, c"): open_("a", "b", names=["a", "c"])


def test_a_dataset_without_tasks_opens(csv, tmp_path):
    "As they were written before there were tasks"
    out = convert(settings(csv, tmp_path / "new")).path
    old = datasets.load_from_disk(str(out)).remove_columns("task")
    old.save_to_disk(tmp_path / "old")
    manifest = json.loads((out / "mdl_nbdev.json").read_text())
    del manifest["index"]
    (tmp_path / "old" / "mdl_nbdev.json").write_text(json.dumps(manifest))
    ds = AudioDataset(tmp_path / "old", CHAT.fingerprint)
    assert ds.tasks[0] == ["old"] and ds[3].task == "old" and ds[3].line == 5 and np.array_equal(ds[3].clips[0], AudioDataset(out)[3].clips[0])


@pytest.fixture(scope="module")
def mix(csv, spoken, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("mix")
    words = write_records(tmp / "spell.jsonl", spell(["word" * (1 + i % 5) for i in range(21)]))
    return open_mix([csv, words, spoken], CHAT, tmp / "cache", model_name="tiny", base_dir=csv.parent)


def test_a_mix_is_its_datasets_and_its_dummy_rows(mix):
    assert len(mix) == 150 + 21 + 7 == len(list(mix))
    for i in [0, 149, 150, 170, 171, 177]:
        e, (nothing,) = mix[i], mix.__getitems__(BatchRows([i], dummy=True))
        assert np.array_equal(e.input_ids, nothing.input_ids) and all(map(np.array_equal, e.clips, nothing.clips))
        assert (e.task, e.line) == (nothing.task, nothing.line)
        assert (e.labels >= 0).any() and not (nothing.labels >= 0).any()
        assert len(e.input_ids) == mix.n_tokens[i] and sum(map(len, e.clips)) == mix.n_samples[i]
    (pack,), (row,) = mix.__getitems__(BatchRows([(0, 150, 171)], packed=True)), mix.__getitems__(BatchRows([171]))
    assert [e.line for e in pack] == [2, 1, 1] and row.line == 1
    for i in (178, -1):
        with pytest.raises(IndexError): mix[i]
    again = pickle.loads(pickle.dumps(mix))
    assert again[160].task == "spell" and np.array_equal(again[160].input_ids, mix[160].input_ids) and len(pickle.dumps(mix)) < 30_000
    assert mix.by_task(dict(spell=2.0), "--task-weights") == {mix.task_names.index("spell"): 2.0}
    with pytest.raises(InputError, match="--task-weights: no task is called 'x'; there are sounds, spell, t0, t1"): mix.by_task(dict(x=1), "--task-weights")


def test_the_fingerprint_sees_content_not_places(mix, csv, spoken, tmp_path):
    words = write_records(tmp_path / "elsewhere" / "spell.jsonl", spell(["word" * (1 + i % 5) for i in range(21)]))
    def open_(*paths, **kw): return open_mix(paths, CHAT, tmp_path / str(kw), model_name="tiny", base_dir=csv.parent, **kw)
    assert open_(csv, words, spoken, num_workers=2, tokenizing_batch_size=7).fingerprint() == mix.fingerprint()
    assert mix.take(np.arange(len(mix))).fingerprint() == mix.fingerprint()
    other = [open_(csv, spoken, words), open_(csv, words, spoken, user_prompt="What?"), mix.take(np.arange(100)), mix.take(np.arange(len(mix))[::-1])]
    words.write_text(words.read_text().replace("w-o-r-d", "w-o-r-t", 1))
    other.append(open_(csv, words, spoken))
    other.append(limit_length(mix, 60, "truncate", CHAT)[0])
    assert len({m.fingerprint() for m in [mix, *other]}) == 7


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
def test_a_split_is_by_task_and_leaves_a_row_to_training(mix, share):
    one = mix.take(np.arange(len(mix)) != -1)
    train, held = split(one, share, seed=3)
    key = lambda m: list(zip(m.dataset_of.tolist(), m.row_of.tolist()))
    assert sorted(key(train) + key(held)) == key(mix) and key(held) == key(split(mix, share, seed=3)[1])
    for name, d in mix.describe().items():
        n = held.describe()[name]["rows"]
        assert n == min(d["rows"] - 1, max(1, round(share * d["rows"]))) and train.describe()[name]["rows"] == d["rows"] - n
    if share == 0.2: assert key(held) != key(split(mix, share, seed=4)[1])


def test_a_split_does_not_depend_on_other_tasks(mix):
    spell_rows = mix.take(mix.task_ids == mix.task_names.index("spell"))
    alone = Mix([("spell", mix.datasets[1])])
    assert split(spell_rows, 0.3)[1].row_of.tolist() == split(alone, 0.3)[1].row_of.tolist()
    one = alone.take(np.array([4]))
    with pytest.raises(InputError, match="--validation-split: every task has one row"): split(one, 0.3)
    with pytest.raises(InputError, match="--validation-split: got 1"): split(alone, 1)


@pytest.fixture(scope="module")
def voices(tmp_path_factory):
    "Two tasks, 60 and 40 rows, of 12 speakers who say between 3 and 14 words; three of them occur in both"
    folder, sizes = tmp_path_factory.mktemp("voices"), {f"s{i}": 3 + i for i in range(12)}
    rows = [dict(prompt=f"{who} {i}?", answer=f"w{i}", speaker=who) for who, n in sizes.items() for i in range(n)]
    files = []
    for name, part in dict(one=[*rows[:45], *rows[-15:]], two=rows[45:85]).items():
        files.append(folder/f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in part))
    return open_mix(files, load_chat("tiny-text"), folder/"cache", model_name="tiny-text")


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_groups_are_held_out_whole(voices, share, seed):
    groups = voices.groups("speaker")
    assert [voices[i].conversation.messages[0]["content"][0]["text"].split()[0] for i in range(len(voices))] == groups.tolist()
    held = draw_groups(voices, groups, share, seed)
    assert not set(groups[held]) & set(groups[~held]) and held.any()
    for task in range(2): assert (voices.task_ids[~held] == task).any()
    assert abs(held.mean() - share) < 0.08
    assert (held == draw_groups(voices, groups, share, seed)).all() and len({draw_groups(voices, groups, share, n).tobytes() for n in range(9)}) >= 3
    part = voices.take(np.arange(len(voices))[::-1])
    assert (part.groups("speaker") == groups[::-1]).all()


def test_groups_that_cannot_be_held_out(voices, tmp_path):
    one = voices.take(voices.groups("speaker") == "s11")
    with pytest.raises(InputError, match="no rows left to train on"): draw_groups(one, one.groups("speaker"), 0.1)
    two = voices.take(np.isin(voices.groups("speaker"), ["s0", "s2"]))
    assert draw_groups(two, two.groups("speaker"), 0.1).sum() == 3, "the smallest group, though it is more than wanted"
    with pytest.raises(InputError, match="one.jsonl:1: --validation-group site: no value in this row"): voices.groups("site")
    folder = Mix([(None, AudioDataset(voices.datasets[0].path))])
    with pytest.raises(InputError, match="was converted earlier, without this column; give the file"): folder.groups("speaker")


def check_truncated(short, whole, limit):
    "A shortened example is a beginning of the whole one, as long as can be, with whole clips"
    audio, bos, eos = (TOK.convert_tokens_to_ids(t) for t in ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"))
    n = len(short.input_ids)
    assert 0 < n <= limit and np.array_equal(short.input_ids, whole.input_ids[:n]) and np.array_equal(short.labels, whole.labels[:n])
    count = lambda e, t: int((e.input_ids == t).sum())
    assert count(short, bos) == count(short, eos) == len(short.clips) and count(short, audio) == sum(CHAT.family.clip_tokens(len(c)) for c in short.clips)
    assert all(map(np.array_equal, short.clips, whole.clips))
    if n < min(limit, len(whole.input_ids)): assert whole.input_ids[n] == bos and eos not in whole.input_ids[n:limit], "shorter than allowed only before a clip that does not fit"


@pytest.mark.parametrize("limit", range(5, 75, 3))
def test_truncation_never_splits_a_clip(mix, limit):
    spoken = mix.take(np.arange(171, 178))
    longer = [i for i in range(7) if spoken.n_tokens[i] > limit]
    can_learn = lambda e, n: (e.labels[1:n] >= 0).any()
    try: short, report = limit_length(spoken, limit, "truncate", CHAT)
    except InputError as e:
        assert "every row" in str(e) and len(longer) == 7
        return
    assert [r.line for r in report.rows] == [i + 1 for i in longer] and report.total == 7
    rejected = {r.line for r in report.rows if r.what == "rejected"}
    kept = [i for i in range(7) if i + 1 not in rejected]
    assert len(short) == len(kept) and report.rejected == len(rejected)
    for j, i in enumerate(kept):
        check_truncated(short[j], spoken[i], limit)
        assert can_learn(short[j], None) and len(short[j].input_ids) == short.n_tokens[j] and sum(map(len, short[j].clips)) == short.n_samples[j]
        if i in longer: assert report.rows[longer.index(i)].what == f"truncated to {short.n_tokens[j]}" and report.rows[longer.index(i)].tokens == spoken.n_tokens[i]
    # in the sixteen tokens before the limit there may be a clip, but before those nothing that could be learned is thrown away
    for line in rejected: assert not can_learn(spoken[line - 1], limit - 16)


def test_rejected_rows_are_listed(mix, tmp_path):
    limit = int(np.median(mix.n_tokens))
    short, report = limit_length(mix, limit, "reject", CHAT)
    gone = np.flatnonzero(mix.n_tokens > limit)
    assert len(short) == len(mix) - len(gone) and short.n_tokens.max() <= limit and report.rejected == len(gone) > 10
    report.write(tmp_path / "too_long.csv")
    lines = (tmp_path / "too_long.csv").read_text().splitlines()
    assert lines[0] == "file,line,tokens,what"
    assert lines[1:] == [f"{mix[i].file},{mix[i].line},{mix.n_tokens[i]},rejected" for i in gone]
    assert str(report) == f"{len(gone)} of 178 rows have more than {limit} tokens: {len(gone)} left out, 0 truncated"
    same, nothing = limit_length(mix, 10_000, "reject", CHAT)
    assert len(same) == 178 and not nothing.rows and same.fingerprint() == mix.fingerprint()
    with pytest.raises(InputError, match="--seq-length 3: every row has more tokens, the shortest"): limit_length(mix, 3, "reject", CHAT)


def test_prompts_of_a_converted_dataset_cannot_be_changed(csv, tmp_path):
    "A prompt that was not converted with the rows is refused, not passed over"
    out = convert(settings(csv, tmp_path / "d", user_prompt="What?")).path
    opened = lambda **kw: len(open_dataset(out, CHAT, tmp_path / "cache", **kw))
    assert opened() == opened(user_prompt="What?", system_prompt=None)
    with pytest.raises(InputError, match="with --user-prompt 'What.'.*convert them again with 'Who.'"): opened(user_prompt="Who?")
    with pytest.raises(InputError, match="without --system-prompt"): opened(system_prompt="Listen.")
