"Clips in stores, in tar archives and in Parquet files: the waveforms of the files themselves, and what is said where there is none"
import io
import json
import ntpath
import os
import posixpath
import subprocess
import sys
import tarfile
import time
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf

from mdl_nbdev.base import cache as base_cache
from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.stores import as_written
from mdl_nbdev.cli import commands
from mdl_nbdev.data import remote
from mdl_nbdev.data.audio import audio_info, load_audio
from mdl_nbdev.data.clips import clip_stamp, clip_state, local_file, prepare_clips, resolve, split_archive
from mdl_nbdev.data.remote import cached_path, clip_version, fetch, refresh_cache
from mdl_nbdev.data.rows import to_conversation
from mdl_nbdev.data.sources import open_rows

NAMES = ("a.wav", "b.flac", "c.mp3", "d.ogg")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv("MDL_CACHE", str(tmp_path/"cache"))


@pytest.fixture
def clips(tmp_path):
    for i, name in enumerate(NAMES): sf.write(tmp_path/name, np.random.default_rng(i).uniform(-.2, .2, (9000 + i, 2)), 22_050)
    return tmp_path


def archive(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def shard(clips): return archive(clips/"shard-000.tar", {f"./in/{name}": (clips/name).read_bytes() for name in NAMES})


@pytest.mark.parametrize("name", NAMES)
def test_waveforms_are_those_of_files(clips, shard, memory, name):
    memory.pipe(f"/bucket/{name}", (clips/name).read_bytes())
    memory.pipe("/bucket/shard.tar", shard.read_bytes())
    pq.write_table(pa.table(dict(audio=[dict(bytes=(clips/name).read_bytes(), path=name)], prediction=["x"])), clips/"clips.parquet")
    inside = next(open_rows(clips/"clips.parquet").rows()).audio
    sources = [inside, f"{shard}/in/{name}", f"memory://bucket/{name}", f"memory://bucket/shard.tar/in/{name}", resolve(f"shard.tar/in/{name}", Path("memory://bucket"))]
    for part in ("", "#t=0.1,0.3&channel=1"):
        expected = load_audio(f"{clips}/{name}{part}")
        for src in sources:
            assert np.array_equal(load_audio(src + part), expected), src
            assert audio_info(src + part).samples == audio_info(f"{clips}/{name}{part}").samples


def test_a_query_names_no_archive():
    "Such an address is that of a file, also where `.tar/` is in it; in a store and on a disk a question mark is a character"
    for url in ("https://host/get?file=a.tar/b.wav", "https://host/a.tar/b.wav?sig=x", "https://host/a.tar?sig=x/y"): assert split_archive(url) == (url, "")
    assert split_archive("https://host/a.tar/b.wav") == ("https://host/a.tar", "b.wav")
    assert split_archive("s3://bucket/a.tar/b?.wav") == ("s3://bucket/a.tar", "b?.wav") and split_archive("a.tar/b?.wav") == ("a.tar", "b?.wav")


@pytest.mark.parametrize("path", [Path("s3://bucket/clips"), PureWindowsPath("s3://bucket/clips")])
def test_an_address_that_has_been_a_path(path, monkeypatch):
    "On Windows too, where paths are joined with backslashes; in the name of a file a backslash stays"
    monkeypatch.setattr("mdl_nbdev.data.clips.os", SimpleNamespace(path=ntpath if isinstance(path, PureWindowsPath) else posixpath))
    assert as_written(path) == "s3://bucket/clips" and as_written("s3://bucket/a\\b") == "s3://bucket/a\\b"
    assert as_written(PureWindowsPath("C:/clips")) == "C:\\clips"
    assert resolve("a/b.wav", path) == "s3://bucket/clips/a/b.wav"


def test_a_changed_archive_is_noticed(clips, shard):
    src, before = f"{shard}/in/a.wav", clip_stamp(f"{shard}/in/a.wav")
    old = load_audio(src)
    archive(shard, {"in/a.wav": (clips/"b.flac").read_bytes()})
    assert clip_stamp(src) != before and not np.array_equal(load_audio(src), old)


def test_a_store_is_asked_once_and_again_only_for_what_changed(clips, memory, capsys, monkeypatch):
    for name in NAMES[:2]: memory.pipe(f"/bucket/{name}", (clips/name).read_bytes())
    urls, reads = [f"memory://bucket/{name}" for name in NAMES[:2]], []
    monkeypatch.setattr(remote, "open_stored", lambda url, f=remote.open_stored: reads.append(url) or f(url))
    for url in urls*2: load_audio(url)
    assert reads == urls
    assert refresh_cache(urls, 1) == [] and clip_state(urls[0]) is None
    memory.pipe("/bucket/a.wav", (clips/"c.mp3").read_bytes())
    assert refresh_cache(urls, 1) == urls[:1] and "2 clips" in capsys.readouterr().err
    assert clip_state(urls[0]) is not None and np.array_equal(load_audio(urls[0]), load_audio(clips/"c.mp3"))


def test_a_folder_called_like_an_archive_is_a_folder(clips):
    (clips/"old.tar").mkdir()
    (clips/"a.wav").rename(clips/"old.tar"/"a.wav")
    assert local_file(f"{clips}/old.tar/a.wav") == clips/"old.tar"/"a.wav"


def cut(shard): shard.write_bytes(shard.read_bytes()[:900])
def pack(shard):
    import gzip
    shard.write_bytes(gzip.compress(shard.read_bytes()))


@pytest.mark.parametrize("spoil, member, message", [
    (None, "in/lost.wav", "no such file in this archive"), (cut, "in/a.wav", "truncated|cannot be read"), (pack, "in/a.wav", "cannot be read .* not compressed"),
    (lambda shard: shard.unlink(), "in/a.wav", "no such file"), (lambda shard: archive(shard, {"in/a.wav": b""}), "in/a.wav", r"empty \(0 bytes\)")])
def test_archives_that_cannot_be_read(shard, spoil, member, message):
    if spoil: spoil(shard)
    with pytest.raises(InputError, match=message) as e: load_audio(f"{shard}/{member}")
    assert str(e.value).startswith(f"{shard}/{member}: ") and "\n" not in str(e.value)


def test_a_sparse_file_in_an_archive_is_refused(clips):
    "Its bytes are not in one piece there, and what follows it is another file's"
    sf.write(clips/"holes.wav", np.concatenate([np.full(9000, .1), np.zeros(100_000), np.full(9000, .1)]), 16_000)
    data = (clips/"holes.wav").read_bytes()
    with open(clips/"holes.wav", "wb") as f:
        f.write(data[:20_000])
        f.seek(200_000)
        f.write(data[200_000:])
    sf.write(clips/"next.wav", np.zeros(200_000), 16_000)
    subprocess.run(["tar", "--sparse", "--hole-detection=raw", "-cf", "holes.tar", "holes.wav", "next.wav"], cwd=clips, check=True)
    assert len(load_audio(f"{clips}/holes.tar/next.wav"))==200_000
    with pytest.raises(InputError, match="links and sparse files are not read"): load_audio(f"{clips}/holes.tar/holes.wav")


def test_an_archive_is_downloaded_again_within_its_own_limits(shard, memory, monkeypatch, capsys):
    "Which are those of its first download, not those of a clip"
    monkeypatch.setattr(remote.update, "__defaults__", (10, *remote.update.__defaults__[1:]))
    clip = "memory://bucket/shard.tar/in/a.wav"
    memory.pipe("/bucket/shard.tar", shard.read_bytes())
    load_audio(clip)
    memory.pipe("/bucket/shard.tar", archive(shard, {"in/a.wav": Path(shard.parent/"b.flac").read_bytes()}).read_bytes())
    prepare_clips(SimpleNamespace(allow_private_hosts=True, refresh_cache=True, num_workers=1), [clip])
    assert "asked for again, 1 changed" in capsys.readouterr().err


class NoStore(fsspec.AbstractFileSystem):
    "A store that fails"
    protocol, error = "failing", None
    def info(self, path, **kwargs): raise self.error


@pytest.mark.parametrize("error, message", [(FileNotFoundError("x"), "no such file; check the address"), (PermissionError("Forbidden"), "Forbidden; check the address, and the credentials"),
                                            (RuntimeError("of the\nlibrary"), "RuntimeError of the library, 3 times; try again later")])
def test_errors_of_stores(monkeypatch, error, message):
    fsspec.register_implementation("failing", NoStore, clobber=True)
    monkeypatch.setattr(NoStore, "error", error)
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    with pytest.raises(InputError, match=f"^failing://b/a.wav: .*{message}") as e: load_audio("failing://b/a.wav")
    assert "\n" not in str(e.value) and not cached_path("failing://b/a.wav").exists()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(InputError, match=r's3://b/a.wav: .*s3fs.*; pip install "mdl_nbdev\[remote\]"'): load_audio("s3://b/a.wav")


def test_private_hosts_have_no_way_around_the_policy(clips, memory, monkeypatch):
    monkeypatch.setenv("MDL_ALLOW_PRIVATE_HOSTS", "false")
    memory.pipe("/bucket/a.wav", (clips/"a.wav").read_bytes())
    load_audio("memory://bucket/a.wav")
    for url in ("ftp://10.0.0.1/a.wav", "sftp://10.0.0.1/a.wav", "local:///etc/passwd"):
        with pytest.raises(InputError, match="--allow-private-hosts is false"): load_audio(url)


def samples(clips):
    wav = (clips/"a.wav").read_bytes()
    return archive(clips/"samples.tar", {"x/1.wav": wav, "x/1.txt": b"a bell\n", "x/2.flac": (clips/"b.flac").read_bytes(), "x/2.json": json.dumps(dict(prompt="What?", answer="a dog", id=7)).encode(),
        "x/3.json": b"{bad", "x/4.left.wav": wav, "x/4.right.wav": wav, "5.wav": wav, "5.txt": b"b\xe9", "6.txt": b"one", "6.json": b'{"prediction": "two"}', "7.wav": wav})


def test_samples_are_rows(clips):
    bad, f = [], open_rows(samples(clips))
    rows = list(f.rows(bad.append))
    assert [(r.line, r.prediction) for r in rows] == [(1, "a bell"), (2, "a dog"), (7, None)]
    assert [b.line for b in bad] == [3, 4, 5, 6]
    assert [next(m in b.reason for b in bad) for m in ("not valid JSON",)] == [True] and "2 clips in one sample" in bad[1].reason and "differ" in bad[3].reason
    conversation = to_conversation(rows[1], base_dir="elsewhere")
    assert conversation.prompt_text() == "What?" and np.array_equal(load_audio(conversation.clips[0]), load_audio(clips/"b.flac"))
    assert json.loads(f.format(rows[1], "a cat")) == dict(prompt="What?", answer="a dog", id=7, audio=rows[1].audio, prediction="a cat")


@pytest.mark.parametrize("data, message", [(b"", "damaged after sample 0, or compressed|no files in this archive"), (b"no archive"*100, "damaged after sample 0, or compressed")])
def test_archives_that_are_none(tmp_path, data, message):
    (tmp_path/"s.tar").write_bytes(data)
    with pytest.raises(InputError, match=message): list(open_rows(tmp_path/"s.tar").rows())


def test_a_run_converts_and_answers_an_archive(clips):
    from mdl_nbdev.model.families import load_chat
    from mdl_nbdev.train.mix import open_mix
    table = archive(clips/"good.tar", {"1.wav": (clips/"a.wav").read_bytes(), "1.txt": b"a bell", "2.flac": (clips/"b.flac").read_bytes(), "2.txt": b"a dog"})
    mixes = [open_mix([table], load_chat("tiny"), clips/"mdl", num_workers=1, on_the_fly=fly) for fly in (False, True)]
    assert mixes[0].fingerprint() == mixes[1].fingerprint() and mixes[0].task_names == ["good"]
    for a, b in zip(*mixes, strict=True): assert np.array_equal(a.clips[0], b.clips[0])


def run(command, *args):
    "The exit code of a command"
    with pytest.raises(SystemExit) as e: getattr(commands, command)([str(a) for a in args])
    return e.value.code


def table_of(memory, clips, folder="/bucket/data"):
    "A table and its clips, here and in a store"
    for name in NAMES: memory.pipe(f"{folder}/{name}", (clips/name).read_bytes())
    table = clips/"rows.csv"
    table.write_text("".join(f"{row}\n" for row in ["audio,prediction", *(f"{name},word" for name in NAMES)]))
    memory.pipe(f"{folder}/rows.csv", table.read_bytes())
    return table


def test_commands_read_tables_from_stores(memory, clips, monkeypatch, capsys):
    "The same output as from files, and from the table as it is now; relative clips start from its folder"
    table, address = table_of(memory, clips), "memory://bucket/data/rows.csv"
    model = ("--model-name", "tiny", "--max-new-tokens", 2, "--num-workers", 1)
    assert run("mdl_infer", table, "--output", clips/"here.csv", "--base-dir", clips, *model) == 0
    assert run("mdl_infer", address, "--output", clips/"there.csv", *model) == 0
    assert (clips/"here.csv").read_bytes() == (clips/"there.csv").read_bytes()
    assert run("mdl_check", address) == 0 and run("mdl_convert", address, "--output", clips/"set", "--model-name", "tiny", "--num-workers", 1) == 0
    memory.pipe("/bucket/data/rows.csv", b"audio,prediction\na.wav,word\nlost.wav,word\n")
    capsys.readouterr()
    assert run("mdl_check", address) == 2
    assert "rows.csv:3: memory://bucket/data/lost.wav: no such file" in capsys.readouterr().out
    assert run("mdl_check", "memory://bucket/none.csv") == 2
    assert "memory://bucket/none.csv: no such file; check the address" in capsys.readouterr().err


def test_tables_of_several_folders_need_a_base_dir(memory, clips, capsys):
    table_of(memory, clips)
    memory.pipe("/bucket/more/rows.csv", b"audio,prediction\na.wav,word\n")
    both = "memory://bucket/data/rows.csv", "memory://bucket/more/rows.csv"
    assert run("mdl_check", *both) == 2 and "--base-dir: give the folder" in capsys.readouterr().err
    assert run("mdl_check", *both, "--base-dir", "memory://bucket/data") == 0


def test_in_python_the_message_names_the_way():
    with pytest.raises(InputError, match="s3://bucket/rows.csv: only commands read tables from there"): open_rows(Path("s3://bucket/rows.csv"))


def put(memory, n, size=1000):
    "Clips in the store, which differ, and the addresses of them"
    for i in range(n): memory.pipe(f"/bucket/{i:02d}.wav", bytes([i])*size)
    return [f"memory://bucket/{i:02d}.wav" for i in range(n)]


def test_the_cache_stays_within_its_limit(memory, monkeypatch):
    "The files that were not used for longest go, and are downloaded again when a row needs them"
    monkeypatch.setenv("MDL_CACHE_LIMIT", str(10_000/2**30))
    monkeypatch.setattr(base_cache, "RECENT", 0)
    monkeypatch.setattr(base_cache, "CACHE_ROOM", base_cache.CacheRoom())
    monkeypatch.setattr(remote, "CACHE_ROOM", base_cache.CACHE_ROOM)
    urls = put(memory, 40)
    paths = [cached_path(url) for url in urls]
    for url in urls:
        fetch(url)
        fetch(urls[0]) # a file of every row, as an archive is
        assert sum(p.stat().st_size for p in paths if p.exists()) <= 10_000
    kept = [p.exists() for p in paths]
    assert kept[0] and 7 <= sum(kept) <= 10 and all(kept[-6:])
    gone = kept.index(False)
    before = clip_version(urls[gone])
    assert fetch(urls[gone]).read_bytes() == bytes([gone])*1000 and clip_version(urls[gone]) == before
    memory.pipe(f"/bucket/{gone:02d}.wav", b"another clip")
    paths[gone].unlink()
    fetch(urls[gone])
    assert clip_version(urls[gone]) != before, "that a clip has changed is noticed, although it was removed in between"


def test_files_in_use_stay_in_the_cache(memory, monkeypatch):
    "A process of its own has just asked for them; without a limit nothing goes at all"
    monkeypatch.setenv("MDL_CACHE_LIMIT", str(3000/2**30))
    urls = put(memory, 12)
    for url in urls: fetch(url)
    assert all(cached_path(url).exists() for url in urls)
    for i, url in enumerate(urls): os.utime(cached_path(url), (time.time() - 3600 + i, 0))
    monkeypatch.delenv("MDL_CACHE_LIMIT")
    base_cache.CacheRoom().added(cached_path(urls[0]))
    assert all(cached_path(url).exists() for url in urls)
    monkeypatch.setenv("MDL_CACHE_LIMIT", str(3000/2**30))
    fetch(urls[3])
    base_cache.CacheRoom().added(cached_path(urls[0]))
    assert [i for i, url in enumerate(urls) if cached_path(url).exists()] == [0, 3]


@pytest.mark.parametrize("limit", ["0", "-1", "nan", "inf", "50GB"])
def test_a_limit_that_is_none(memory, monkeypatch, limit):
    monkeypatch.setenv("MDL_CACHE_LIMIT", limit)
    with pytest.raises(InputError, match=f"MDL_CACHE_LIMIT: got '{limit}', expected a number of GiB above 0"): fetch(put(memory, 1)[0])
