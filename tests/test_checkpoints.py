"Checkpoints: every way to damage one, to be killed while one is written, to run out of disk; state bit for bit; rotation and early stopping in tables"
import ast
import gc
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mdl_nbdev.base import files as base_files
from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.options import options_where
from mdl_nbdev.base.settings import TrainSettings
from mdl_nbdev.train import checkpoints as C
from mdl_nbdev.train import state as S
from mdl_nbdev.train.identity import check_identity, differences, identity, update_identity
from mdl_nbdev.train.stopping import EarlyStopping

fork = multiprocessing.get_context("fork")


def write(folder, fill=b"w", size=3000):
    "What a small run writes: tensors, state, and a folder in the folder"
    S.save_state(folder, "optimizer", {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.arange(size, dtype=torch.float32)}}, "lr": 0.1})
    (folder/"sub").mkdir()
    (folder/"sub"/"notes.txt").write_bytes(fill*size)


@pytest.fixture
def run(tmp_path):
    for step in (10, 20): C.write_checkpoint(tmp_path/"run", step, write)
    return tmp_path/"run"


def names(folder): return sorted(p.name for p in folder.iterdir())


# Whole or not

files = ["manifest.json", "optimizer.json", "optimizer.safetensors", "sub/notes.txt"]
newest = "checkpoint-20"


def flip(p):
    data = bytearray(p.read_bytes())
    data[random.Random(p.name).randrange(len(data))] ^= 4
    p.write_bytes(data)


def as_link(p):
    p.rename(p.with_name("elsewhere"))
    p.symlink_to(p.with_name("elsewhere"))


def as_folder(p):
    p.unlink()
    p.mkdir()


damage = {"missing": Path.unlink, "truncated": lambda p: os.truncate(p, p.stat().st_size - 1), "emptied": lambda p: os.truncate(p, 0),
          "longer": lambda p: p.write_bytes(p.read_bytes() + b"\n"), "a bit flipped": flip, "a folder": as_folder}


def test_whole(run):
    assert C.check_checkpoint(run/newest) is None
    assert C.last_checkpoint(run) == run/newest
    listed = json.loads((run/newest/"manifest.json").read_text())
    assert (listed["format"], listed["step"]) == (1, 20)
    sums = subprocess.run(["sha256sum", *listed["files"]], cwd=run/newest, capture_output=True, text=True, check=True).stdout.split()
    assert dict(zip(sums[1::2], sums[::2])) == {n: f["sha256"] for n, f in listed["files"].items()}
    assert sorted(listed["files"]) == files[1:]


@pytest.mark.parametrize("how", damage)
@pytest.mark.parametrize("name", files)
def test_damaged_file_is_named(run, capsys, name, how):
    damage[how](run/newest/name)
    before = {p: p.read_bytes() for p in (run/newest).rglob("*") if p.is_file()}
    assert name in C.check_checkpoint(run/newest)
    assert C.last_checkpoint(run) == run/"checkpoint-10"
    out = capsys.readouterr().out
    assert str(run/newest) in out and name in out and len(out.splitlines()) == 1
    assert before == {p: p.read_bytes() for p in (run/newest).rglob("*") if p.is_file()}, "it is left as it was"


@pytest.mark.parametrize("name", files[1:])
def test_a_link_is_no_file(run, name):
    as_link(run/newest/name)
    assert C.check_checkpoint(run/newest) == f"{name} is missing"


def test_empty_folder(run, capsys):
    shutil.rmtree(run/newest)
    (run/newest).mkdir()
    assert C.check_checkpoint(run/newest) == "it is empty"
    assert C.last_checkpoint(run) == run/"checkpoint-10"
    assert "it is empty" in capsys.readouterr().out


def test_nothing_whole(run, capsys):
    for n in names(run): (run/n/"optimizer.json").unlink()
    assert C.last_checkpoint(run) is None
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert C.last_checkpoint(run/"not there") is None


def test_bits_of_the_manifest_count(run):
    path = run/newest/"manifest.json"
    data = path.read_bytes()
    for i in range(0, 8*len(data), 9):
        path.write_bytes(data[:i//8] + bytes([data[i//8] ^ 1 << i % 8]) + data[i//8 + 1:])
        assert C.check_checkpoint(run/newest), f"bit {i}"


def good(run): return {k: v for k, v in json.loads((run/newest/"manifest.json").read_text()).items() if k != "sha256"}


forged = {
    "another format": lambda m: m | {"format": 2},
    "no step": lambda m: {k: v for k, v in m.items() if k != "step"},
    "step as text": lambda m: m | {"step": "20"},
    "step of another folder": lambda m: m | {"step": 30},
    "no files": lambda m: {k: v for k, v in m.items() if k != "files"},
    "files as a list": lambda m: m | {"files": list(m["files"])},
    "no size": lambda m: m | {"files": {"optimizer.json": {"sha256": "0"}}},
    "size as text": lambda m: m | {"files": {"optimizer.json": {"size": "1", "sha256": "0"}}},
    **{f"the name {n!r}": lambda m, n=n: m | {"files": m["files"] | {n: {"size": 1, "sha256": "0"}}} for n in
       ["../outside", "sub/../../outside", "/etc/passwd", "", ".", "..", "sub//notes.txt", "./sub/notes.txt", "sub\\..\\outside", "manifest.json", "a\0b", "x"*5000]},
}


@pytest.mark.parametrize("how", forged)
def test_forged_manifest(run, how):
    "A manifest whose own digest is right, but which says what a manifest may not say"
    (run/"outside").write_bytes(b"0")
    (run/newest/"manifest.json").write_text(C.sealed(forged[how](good(run))))
    assert C.check_checkpoint(run/newest)
    assert C.last_checkpoint(run) == run/"checkpoint-10"


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"7", b'{"sha256": 1}', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000])
def test_no_manifest_at_all(run, text):
    (run/newest/"manifest.json").write_bytes(text)
    assert "manifest.json" in C.check_checkpoint(run/newest)


def test_files_beside_do_no_harm(run):
    (run/newest/"note.txt").write_text("the good one")
    assert C.check_checkpoint(run/newest) is None


class Canary:
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return (open, (self.path, "w"))


@pytest.mark.parametrize("name", files)
def test_pickle_is_not_loaded(run, tmp_path, name):
    canary = tmp_path/"executed"
    (run/newest/name).write_bytes(pickle.dumps(Canary(canary)))
    assert C.check_checkpoint(run/newest)
    if "optimizer" in name:
        with pytest.raises(InputError, match="damaged"): S.load_state(run/newest, "optimizer")
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary))).close()
    assert canary.exists(), "it would have been"


@pytest.mark.parametrize("module", [C, S])
def test_no_pickle_in_the_source(module):
    tree = ast.parse(Path(module.__file__).read_text())
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)} | {a.name for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
    assert not used & {"pickle", "marshal", "shelve", "eval", "exec"}
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in ("load", "save") and getattr(n.value, "id", "") in ("torch", "np")]


def test_files_are_as_readable_as_any_new_file(tmp_path):
    "safetensors keeps its own to their owner; a colleague may use the checkpoint"
    def private(folder):
        for name in ("weights", "sub/weights"):
            (folder/name).parent.mkdir(exist_ok=True)
            os.close(os.open(folder/name, os.O_CREAT, 0o600))
        (folder/"script").touch(0o777)
    before = os.umask(0o027)
    try: checkpoint = C.write_checkpoint(tmp_path, 1, private)
    finally: os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in checkpoint.rglob("*") if p.is_file()}
    assert modes == {"weights": 0o640, "script": 0o750, "manifest.json": 0o640} and not C.check_checkpoint(checkpoint)


# Names

def test_newest_of_checkpoints_and_epochs(run, capsys):
    C.write_checkpoint(run, 25, write, name="epoch-1")
    assert C.last_checkpoint(run).name == "epoch-1"
    (run/"epoch-1"/"optimizer.json").unlink()
    assert C.last_checkpoint(run).name == newest
    C.write_checkpoint(run, 100, write)
    C.write_checkpoint(run, 9, write)
    assert C.last_checkpoint(run).name == "checkpoint-100", "numbers, not text"
    (run/"epoch-1"/"manifest.json").unlink()
    capsys.readouterr()
    assert C.last_checkpoint(run).name == "checkpoint-100"
    assert "epoch-1" in capsys.readouterr().out


def test_what_is_no_checkpoint(run, capsys):
    for n in ["checkpoint-99.part", "checkpoint-x", "checkpoint-", "final", "checkpoint-7.old", "epoch-3.part"]: shutil.copytree(run/"checkpoint-10", run/n)
    (run/"checkpoint-77").write_text("a file")
    assert C.last_checkpoint(run).name == newest
    out = capsys.readouterr().out
    assert "checkpoint-99.part: was never finished" in out and "epoch-3.part" in out and "old" not in out


def test_written_again(run):
    "A whole one is replaced, a damaged one stays beside the new"
    C.write_checkpoint(run, 20, lambda p: write(p, b"2"))
    assert (run/newest/"sub"/"notes.txt").read_bytes()[:1] == b"2"
    assert names(run) == ["checkpoint-10", "checkpoint-20"]
    for n in ("checkpoint-20.old", "checkpoint-20.old2"):
        (run/newest/"optimizer.json").unlink()
        C.write_checkpoint(run, 20, write)
        assert C.check_checkpoint(run/newest) is None
        assert n in names(run) and not (run/n/"optimizer.json").exists()


def test_later_ones_are_set_aside(run, capsys):
    C.write_checkpoint(run, 30, write, name="epoch-1")
    assert [p.name for p in C.set_aside_later(run, run/"checkpoint-10")] == ["epoch-1.old", "checkpoint-20.old"]
    assert C.last_checkpoint(run).name == "checkpoint-10"
    assert len(capsys.readouterr().out.splitlines()) == 2


# Killed

def child(target, *args):
    p = fork.Process(target=target, args=args)
    p.start()
    return p


def die(*args): os.kill(os.getpid(), signal.SIGKILL)


def before(module, name, when=1):
    "Let this process be killed just before the n-th call of a function"
    original, calls = getattr(module, name), []
    def patched(*args, **kwargs):
        calls.append(1)
        if len(calls) == when: die()
        return original(*args, **kwargs)
    setattr(module, name, patched)


def killed_in(stage, run, step):
    if stage == "the first file": before(S, "save_file")
    if stage == "a file half written": S.save_file = lambda tensors, path: (path.write_bytes(b"half"), die())
    if stage == "between files": before(Path, "mkdir", 2)
    if stage == "the first sync": before(os, "fsync")
    if stage == "hashing": before(base_files, "file_digest", 2)
    if stage == "the manifest": before(Path, "write_text", 2)
    if stage == "the manifest's sync": before(os, "fsync", 4)
    if stage == "the new name": before(os, "rename")
    if stage == "the name's sync": before(os, "fsync", 7)
    C.write_checkpoint(run, step, write)


stages = ["the first file", "a file half written", "between files", "the first sync", "hashing", "the manifest", "the manifest's sync", "the new name", "the name's sync"]


@pytest.mark.parametrize("stage", stages)
def test_killed_while_writing(run, capsys, stage):
    p = child(killed_in, stage, run, 30)
    p.join()
    assert p.exitcode == -signal.SIGKILL, "it was killed, so the stage was reached"
    last = C.last_checkpoint(run)
    if stage == "the name's sync": assert last.name == "checkpoint-30"
    else:
        assert last.name == newest
        assert "checkpoint-30.part: was never finished" in capsys.readouterr().out
    C.write_checkpoint(run, 30, write)
    assert C.last_checkpoint(run).name == "checkpoint-30"
    assert names(run) == ["checkpoint-10", "checkpoint-20", "checkpoint-30"]


def write_for_ever(run, start):
    for step in range(start + 1, 10**6):
        C.write_checkpoint(run, step, lambda p: write(p, size=20_000))
        C.keep(run, 2)


def test_killed_at_any_moment(tmp_path, capsys):
    rng, last, kills, end = random.Random(0), 0, 0, time.monotonic() + 100
    while kills < 25 or last < 10:
        assert time.monotonic() < end, "no progress"
        kills += 1
        p = child(write_for_ever, tmp_path, last)
        time.sleep(rng.uniform(0.02, 0.15))
        p.kill()
        p.join()
        found = C.last_checkpoint(tmp_path)
        if found:
            assert int(found.name[11:]) >= last
            last = int(found.name[11:])
    assert "skipped:" not in capsys.readouterr().out, "a kill leaves no damaged checkpoint, be it while writing or while removing"
    (tmp_path/"epoch-1.part").mkdir()
    C.write_checkpoint(tmp_path, last + 1, write)
    C.keep(tmp_path, 2)
    assert not list(tmp_path.glob("*.part")), "nor does what it left stay in the way"


def test_all_is_on_disk_before_the_name(tmp_path, monkeypatch):
    "fsync of every file, then the manifest, then the folders; rename; fsync of the run's folder"
    events, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), tmp_path)), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), rename(a, b)))
    C.write_checkpoint(tmp_path/"run", 1, write)
    part = "run/checkpoint-1.part"
    assert sorted(events[:3]) == [f"{part}/{n}" for n in files[1:]]
    assert events[3:] == [f"{part}/manifest.json", f"{part}/sub", part, "rename", "run"]


# Disk full

@pytest.fixture
def small_disk(tmp_path):
    "A file system of one megabyte"
    disk = tmp_path/"disk"
    disk.mkdir()
    r = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, text=True)
    if r.returncode: pytest.skip(f"cannot mount a small tmpfs here: {r.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def until_full(folder):
    "Use up all space, and say nothing of it: the manifest is the first that finds no room"
    with open(folder/"x", "wb", buffering=0) as f:
        try:
            while f.write(bytes(4096)): pass
        except OSError: pass


big = torch.zeros(400_000)
too_much = {"a file": lambda p: (p/"x").write_bytes(bytes(2**21)), "our state": lambda p: S.save_state(p, "optimizer", big), "safetensors": lambda p: save_file({"x": big}, p/"x"),
            "torch": lambda p: torch.save(big, p/"x"), "the manifest": until_full}


@pytest.mark.parametrize("what", too_much)
def test_disk_full(small_disk, what):
    run = small_disk/"run"
    C.write_checkpoint(run, 10, lambda p: write(p, size=30_000))
    used = shutil.disk_usage(small_disk).used
    with pytest.raises(InputError) as e: C.write_checkpoint(run, 20, too_much[what])
    text = str(e.value)
    del e # torch's error still holds its file open
    gc.collect()
    assert f"{run/'checkpoint-20'}: this checkpoint could not be written: the disk is full" in text
    assert "It needs " in text and " are free" in text and f"The last good checkpoint is {run/'checkpoint-10'}" in text
    assert names(run) == ["checkpoint-10"] and C.check_checkpoint(run/"checkpoint-10") is None
    assert shutil.disk_usage(small_disk).used == used
    C.write_checkpoint(run, 20, write)
    assert C.last_checkpoint(run).name == "checkpoint-20", "after room was made it goes on"


def test_disk_full_at_the_first(small_disk):
    with pytest.raises(InputError, match="It needs more than .*There is no earlier checkpoint"): C.write_checkpoint(small_disk/"run", 1, too_much["a file"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="no permission"): C.write_checkpoint(tmp_path/"run", 1, write)


def test_a_bug_is_not_a_disk_error(run):
    def wrong(p): raise RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"): C.write_checkpoint(run, 30, wrong)
    assert C.last_checkpoint(run).name == newest


# Several processes

def on_ranks(n, run, step, write, timeout=20):
    "Let threads stand for processes; gives what each returned or raised"
    barrier, results = threading.Barrier(n, timeout=timeout), [None]*n
    def work(rank):
        try: results[rank] = C.write_checkpoint(run, step, lambda p: write(p, rank), main=rank == 0, barrier=barrier.wait)
        except Exception as e: results[rank] = e
    threads = [threading.Thread(target=work, args=(r,)) for r in range(n)]
    for t in threads: t.start()
    for t in threads: t.join()
    return results


def share(folder, rank):
    time.sleep(0.02*rank)
    S.save_state(folder, f"random-{rank}", S.random_state())


def test_every_rank_writes_its_own(tmp_path):
    assert on_ranks(4, tmp_path, 5, share) == [tmp_path/"checkpoint-5"]*4
    assert C.check_checkpoint(tmp_path/"checkpoint-5") is None
    listed = json.loads((tmp_path/"checkpoint-5"/"manifest.json").read_text())["files"]
    assert sorted(listed) == sorted(f"random-{r}.{x}" for r in range(4) for x in ("json", "safetensors"))


@pytest.mark.parametrize("late", [0, 0.1])
@pytest.mark.parametrize("broken", [0, 1, 3])
def test_one_rank_finds_the_disk_full(run, broken, late):
    "All of them stop with a message, none waits for ever, and nothing is left of the attempt"
    def full(folder, rank):
        share(folder, rank)
        if rank == broken:
            time.sleep(late)
            raise OSError(28, "No space left on device")
    results = on_ranks(4, run, 30, full)
    assert all(isinstance(r, InputError) for r in results), results
    assert "the disk is full" in str(results[broken])
    assert names(run) == ["checkpoint-10", "checkpoint-20"]
    assert C.check_checkpoint(run/newest) is None


def test_what_a_killed_failure_left_is_in_nobodys_way(run):
    "Killed between the failure and the clean-up, and then it fails again: the main process must still learn of it"
    def full(folder, rank):
        share(folder, rank)
        if rank: raise OSError(28, "No space left on device")
    for left in ("checkpoint-30.failed", "checkpoint-30.part"):
        (run/left).mkdir()
        (run/left/"x").touch()
    assert all(isinstance(r, InputError) for r in on_ranks(3, run, 30, full))
    assert names(run) == ["checkpoint-10", "checkpoint-20"]


# State

def same(a, b):
    "Equal in type and to the last bit"
    assert type(a) is type(b), (a, b)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict): return list(a) == list(b) and all(same(j, k) and same(a[j], b[k]) for j, k in zip(a, b))
    if isinstance(a, torch.Tensor): return a.dtype == b.dtype and a.shape == b.shape and a.contiguous().reshape(-1).view(torch.uint8).tolist() == b.contiguous().reshape(-1).view(torch.uint8).tolist()
    if isinstance(a, (np.ndarray, np.generic)): return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, float): return math.isnan(a) == math.isnan(b) and (math.isnan(a) or (a == b and math.copysign(1, a) == math.copysign(1, b)))
    return a == b


def again(state, folder):
    S.save_state(folder, "s", state)
    return S.load_state(folder, "s")


leaves = (st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=8) | st.text(st.characters(codec=None, categories=None), max_size=6)
          | st.sampled_from(["$tensor", "$tuple", "$dict", "", "a.b", "a:0"]))
keys = st.integers() | st.text(max_size=4) | st.booleans() | st.none() | st.tuples(st.integers(), st.text(max_size=2)) | st.sampled_from(["$tuple", "$dict", "$"])
trees = st.recursive(leaves, lambda t: st.lists(t, max_size=4) | st.lists(t, max_size=4).map(tuple) | st.dictionaries(keys, t, max_size=4), max_leaves=20)


@settings(max_examples=300, deadline=None)
@given(trees)
def test_any_nested_state(tmp_path_factory, state):
    folder = tmp_path_factory.getbasetemp()
    assert same(again(state, folder), state)


dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
          torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2]


def test_tensors_of_all_types(tmp_path):
    def bits(dtype, shape):
        if dtype == torch.bool: return torch.rand(shape) > 0.5
        n = math.prod(shape)*dtype.itemsize
        return torch.randint(0, 256, (n,), dtype=torch.uint8).view(dtype).reshape(shape)
    state = {str(d): [bits(d, s) for s in [(), (0,), (1,), (3, 5), (2, 0, 3)]] for d in dtypes}
    state |= {"odd": [torch.rand(7, 3).T, torch.rand(9)[::2], torch.zeros(1).expand(4), torch.tensor(-0.0), torch.tensor(float("nan"))], "twice": [big[:5], big[:5]]}
    found = again(state, tmp_path)
    assert same(found, state)
    assert sorted(load_file(tmp_path/"s.safetensors")) == sorted(f"s.{k}.{i}:{n}" for n, (k, i) in enumerate((k, i) for k, v in state.items() for i in range(len(v))))
    found["twice"][0][0] = 7
    assert found["twice"][1][0] == 0, "they are apart"
    p = torch.nn.Parameter(torch.rand(2))
    assert torch.equal(again(p, tmp_path), p.detach())


def test_arrays_and_numbers(tmp_path):
    state = [np.arange(6).reshape(2, 3).astype(d) for d in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?", "c8")]
    state += [np.array(3.5), np.zeros((0, 4)), np.arange(9)[::2], np.asfortranarray(np.eye(3)), np.float64(0.1), np.float32(0.1), np.int64(-3), np.bool_(True), np.uint64(2**64 - 1)]
    assert same(again(state, tmp_path), state)


@pytest.mark.parametrize("bad", [object(), {1, 2}, Path("x"), torch.Size([1]), 1j, np.array(["text"]), np.array([None]), np.longdouble(1), np.zeros(1, ">f4"),
                                 torch.zeros(2, device="meta"), torch.eye(2).to_sparse(), lambda: 0, random.Random(0)], ids=lambda x: type(x).__name__)
def test_other_kinds_are_refused(tmp_path, bad):
    with pytest.raises(TypeError): S.save_state(tmp_path, "s", {"a": [bad]})
    assert not list(tmp_path.iterdir()), "nothing is written"


broken_json = ["", "{", "[1", '{"$what": 1}', '{"$tensor": "s:9"}', '{"$tensor": 3}', '{"$tensor": []}', '{"$bytes": "?"}', '{"$tuple": 3}', '{"$dict": [1]}', '{"$dict": [[[], 1]]}',
               '{"$float": "x"}', '{"$tuple": [], "b": 1}', '{"$number": null}', "[" * 100_000]


@pytest.mark.parametrize("text", broken_json)
@pytest.mark.parametrize("tensors", [True, False])
def test_damaged_state(tmp_path, text, tensors):
    S.save_state(tmp_path, "s", [torch.ones(3)] if tensors else [1])
    (tmp_path/"s.json").write_text(text)
    with pytest.raises(InputError, match="s.json: this state is damaged"): S.load_state(tmp_path, "s")


def test_missing_state(tmp_path):
    with pytest.raises(InputError, match="random-3.json: is missing"): S.load_state(tmp_path, "random-3")
    S.save_state(tmp_path, "s", [torch.ones(3)])
    (tmp_path/"s.safetensors").unlink()
    with pytest.raises(InputError, match="damaged"): S.load_state(tmp_path, "s")


def test_state_does_not_hang_on_the_file(tmp_path):
    S.save_state(tmp_path, "s", big)
    x = S.load_state(tmp_path, "s")
    os.truncate(tmp_path/"s.safetensors", 0)
    assert x.sum() == 0
    x[0] = 1


kinds = {"plain": {}, "fused": dict(fused=True), "foreach": dict(foreach=True), "amsgrad": dict(amsgrad=True, weight_decay=0.1)}


def course(kind, dtype=torch.float32):
    "A small training run: model, optimizer, schedule with warm-up and a floor, batches"
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.3), torch.nn.Linear(16, 1)).to(dtype)
    opt = torch.optim.AdamW([{"params": net[0].parameters(), "lr": 0.02}, {"params": net[2].parameters()}], lr=0.01, **kinds[kind])
    return net, opt, torch.optim.lr_scheduler.LambdaLR(opt, lambda s: max(min(1, (s + 1)/4), 0.1))


def go(net, opt, schedule, steps):
    seen = []
    for _ in range(steps):
        loss = net(torch.randn(4, 8, dtype=net[0].weight.dtype)).square().mean() + random.random()*net[0].weight.sum()*np.random.rand()
        loss.backward()
        seen.append((loss.item(), schedule.get_last_lr(), torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0).item()))
        opt.step()
        schedule.step()
        opt.zero_grad()
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", kinds)
def test_resumed_optimizer_goes_on_bit_for_bit(tmp_path, kind, dtype):
    whole = course(kind, dtype)
    go(*whole, 5)
    for name, x in [("model", dict(whole[0].state_dict())), ("optimizer", whole[1].state_dict()), ("schedule", whole[2].state_dict()), ("random-0", S.random_state())]:
        S.save_state(tmp_path, name, x)
        assert same(S.load_state(tmp_path, name), x)
    expected = go(*whole, 5)
    net, opt, schedule = course(kind, dtype)
    net.load_state_dict(S.load_state(tmp_path, "model"))
    opt.load_state_dict(S.load_state(tmp_path, "optimizer"))
    schedule.load_state_dict(S.load_state(tmp_path, "schedule"))
    S.set_random_state(S.load_state(tmp_path, "random-0"))
    assert go(net, opt, schedule, 5) == expected
    assert all(torch.equal(a, b) for a, b in zip(whole[0].state_dict().values(), net.state_dict().values()))


def test_random_states(tmp_path):
    random.gauss(0, 1), np.random.normal() # each leaves a half-used pair behind
    S.save_state(tmp_path, "r", S.random_state())
    draw = lambda: (random.random(), random.gauss(0, 1), np.random.normal(size=3).tolist(), torch.randn(5).tolist(), torch.nn.functional.dropout(torch.ones(9)).tolist())
    first = draw()
    S.set_random_state(S.load_state(tmp_path, "r"))
    assert draw() == first
    S.save_state(tmp_path, "plain", random.getstate())
    assert S.load_state(tmp_path, "plain") == random.getstate()


@pytest.mark.parametrize("name", ["PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"])
def test_numpy_generators(tmp_path, name):
    g = np.random.Generator(getattr(np.random, name)(1))
    g.integers(0, 9, 3, dtype=np.int32)
    S.save_state(tmp_path, "g", g.bit_generator.state)
    first = g.normal(size=4).tolist()
    other = np.random.Generator(getattr(np.random, name)(2))
    other.bit_generator.state = S.load_state(tmp_path, "g")
    assert other.normal(size=4).tolist() == first


# Rotation and early stopping. Written from the rules: patience counts evaluations in a row that are worse than the best; a limit of two keeps the best and the latest;
# checkpoints of epochs are kept and never counted.

def simulated(run, losses, limit=None, patience=None, epochs=()):
    "A run that evaluates and saves every ten steps; gives the step it stops at, the best step, and what is left"
    stop = EarlyStopping(patience)
    for i, loss in enumerate(losses, 1):
        step = 10*i
        C.write_checkpoint(run, step, lambda p: (p/"x").write_text("x"))
        if step in epochs: C.write_checkpoint(run, step, lambda p: (p/"x").write_text("x"), name=f"epoch-{epochs.index(step) + 1}")
        stopped = stop.update(loss, step)
        C.keep(run, limit, run/f"checkpoint-{stop.best_step}" if stop.best_step else None)
        resumed = EarlyStopping(patience)
        resumed.load_state_dict(json.loads(json.dumps(stop.state_dict())))
        assert resumed == stop
        stop = resumed # as if the run were taken up again after each evaluation
        if stopped: break
    left = sorted(int(p.name[11:]) for p in run.glob("checkpoint-*"))
    return (step if stopped else None), stop.best_step, left, sorted(p.name for p in run.glob("epoch-*"))


nan = float("nan")
curves = [ # losses, limit, patience, epochs: stops at, best, checkpoints left, epochs left
    ([5, 4, 3, 2, 1], 2, 2, (), None, 50, [40, 50], []),              # always better: best is the latest; one more fits
    ([1, 2, 3, 4, 5], 2, 2, (), 30, 10, [10, 30], []),                # always worse: stops at the second in a row
    ([1, 2, 3, 4, 5], 2, None, (), None, 10, [10, 50], []),           # no patience: never stops
    ([3, 2, 4, 2, 4, 2, 4], 2, 2, (), None, 20, [20, 70], []),        # ties are not worse: each ends the row; the earlier stays the best
    ([2, 2, 2, 2, 2], 2, 1, (), None, 10, [10, 50], []),              # all equal: nothing is worse than the best
    ([3, 2, 4, 2, 4, 4, 1], 2, 2, (), 60, 20, [20, 60], []),          # a tie, then two worse in a row
    ([3, 4, 2, 3, 4, 5], 3, 3, (), 60, 30, [30, 50, 60], []),         # better in between starts the count anew
    ([3, 4, 2, 3, 4, 5], 1, 3, (), 60, 30, [30, 60], []),             # a limit of one: best and latest both stay
    ([3, 2, 1], 1, 1, (), None, 30, [30], []),                        # a limit of one, the best is the latest
    ([3, 4], 1, 1, (), 20, 10, [10, 20], []),                         # a patience of one
    ([5, 4, 3, 4, 5, 6], None, 9, (), None, 30, [10, 20, 30, 40, 50, 60], []),      # no limit
    ([5, 4, 3, 4, 5, 6], 2, 9, (20, 40, 60), None, 30, [30, 60], ["epoch-1", "epoch-2", "epoch-3"]), # epochs are kept and not counted
    ([5, 4, 3, 4, 5, 6], 3, 9, (20, 40, 60), None, 30, [30, 50, 60], ["epoch-1", "epoch-2", "epoch-3"]),
    ([2, nan, nan, nan, 1], 2, 3, (), 40, 10, [10, 40], []),          # no number is worse than any
    ([nan, nan, 2, 3], 2, 3, (), None, 30, [30, 40], []),             # nothing is best until there is a number
    ([float("inf"), 2, 3, 3], 2, 2, (), 40, 20, [20, 40], []),
    ([2, 3, 1, 4, 0.5, 6, 7], 2, 2, (), 70, 50, [50, 70], []),        # never two in a row, until the end
]


@pytest.mark.parametrize("losses, limit, patience, epochs, stops, best, left, kept", curves)
def test_curves(tmp_path, losses, limit, patience, epochs, stops, best, left, kept):
    assert simulated(tmp_path, losses, limit, patience, epochs) == (stops, best, left, kept)


def test_rotation_spares_what_it_must(run, capsys):
    for step in (30, 40, 50): C.write_checkpoint(run, step, write)
    (run/"checkpoint-40"/"optimizer.json").unlink() # damaged
    (run/"checkpoint-20.old").mkdir()
    gone = C.keep(run, 2, best=run/"checkpoint-40", apart={"checkpoint-20"})
    assert [p.name for p in gone] == ["checkpoint-10"], "the best is damaged, so the newest two that are whole stay, and what stands apart"
    assert names(run) == ["checkpoint-20", "checkpoint-20.old", "checkpoint-30", "checkpoint-40", "checkpoint-50"]
    assert not C.keep(run, 2)[:-1] and C.keep(run, None) == []


def test_best_of_an_epoch_takes_no_place(run):
    C.write_checkpoint(run, 30, write)
    C.write_checkpoint(run, 20, write, name="epoch-1")
    C.keep(run, 2, best=run/"epoch-1")
    assert names(run) == ["checkpoint-20", "checkpoint-30", "epoch-1"]


# The same run?

def test_settings_that_matter():
    "Every setting either makes the run another one or is known not to"
    base = dict(train_dataset="a.csv", output="o")
    free = dict(output="p", train_dataset="b.csv", logging_steps=1, save_steps=7, save_total_limit=3, report_to="all", num_workers=1, resume_from_checkpoint=True, allow_changes=True, adapter="a",
                gradient_checkpointing=False, early_stopping_patience=2, eval_steps=3)
    change = dict(lr=1.0, batch_size=1, seed=1, num_epochs=2, lora_rank=4, loss_mode="case1", packing=True, task_weights="a=2", warmup_steps=3, min_lr=0.1, model_name="tiny",
                  tuning="full", lora_dropout=0.5, quantization="4bit", max_grad_norm=2, weight_decay=1, validation_split=0.5, validation_group="a", seq_length=7, gradient_accumulation_steps=2, learn_answers="last")
    old = identity(TrainSettings(**base))
    for k, v in free.items(): assert differences(old, identity(TrainSettings(**base | {k: v}))) == [], k
    for k, v in change.items():
        found = differences(old, identity(TrainSettings(**base | {k: v})))
        assert found and found[0].startswith("--" + k.replace("_", "-")) and ": was " in found[0], k
    kept = {"--" + name.replace("_", "-") for name in vars(TrainSettings(**base)) if name not in options_where(TrainSettings, "resume")}
    assert set(old) == kept and len(kept) > 25


def test_a_checkpoint_where_folders_cannot_be_opened_nor_files_synced_that_are_read(run, monkeypatch):
    "As on Windows"
    opened, modes, fsync = os.open, {}, os.fsync
    def windows_open(path, flags, mode=0o777, *, dir_fd=None):
        if os.path.isdir(path): raise PermissionError(13, "Permission denied")
        fd = opened(path, flags, mode, dir_fd=dir_fd)
        modes[fd] = flags & (os.O_WRONLY | os.O_RDWR)
        return fd
    def windows_fsync(fd):
        if not modes.get(fd, 1): raise OSError(9, "Bad file descriptor")
        fsync(fd)
    monkeypatch.setattr(os, "open", windows_open)
    monkeypatch.setattr(os, "fsync", windows_fsync)
    C.write_checkpoint(run, 60, write)
    monkeypatch.undo()
    assert not C.check_checkpoint(run/"checkpoint-60")


def test_allowed_changes_are_printed(tmp_path, capsys):
    now = identity(TrainSettings(train_dataset="a.csv", output="o"), processes=1)
    S.save_state(tmp_path, "run", dict(identity=now))
    check_identity(tmp_path, now, False)
    for change, skips in (({"--lr": 1.0}, False), ({"--batch-size": 4}, True)):
        with pytest.raises(InputError, match="other data or settings"): check_identity(tmp_path, now | change, False)
        check_identity(tmp_path, now | change, True)
        printed = capsys.readouterr().out
        assert f"resumed with other data or settings: {[*change][0]}: was" in printed and ("left out, or seen twice" in printed) == skips


def test_identities_of_earlier_versions():
    "Their words are translated and what they lack has its default; what has really changed is still found"
    now = identity(TrainSettings(train_dataset="a.csv", output="o"), processes=2, tokenizer="t")
    old = {k: v for k, v in now.items() if k not in ("--lora-init", "--packing")} | {"--loss-mode": "case3", "--old": 1}
    assert differences(update_identity(json.loads(json.dumps(old))), now) == []
    assert update_identity(now) == now
    changed = update_identity(old | {"--loss-mode": "case1", "processes": 4, "--model-name": "mispeech/midashenglm-7b"})
    assert [line.split(":")[0] for line in differences(changed, now)] == ["--loss-mode", "--model-name", "processes"]
    missing = update_identity({k: v for k, v in old.items() if k != "tokenizer"})
    assert differences(missing, now) == ['tokenizer: was not there, is "t"']


def test_differences():
    old = dict(a=1, b=dict(c=[1, 2], d="x"), e=(1, 2), gone=None)
    assert differences(old, json.loads(json.dumps(old))) == [], "a round through JSON is no difference"
    assert differences(old, dict(a=1.5, b=dict(c=[1, 3], d="x"), e=[1, 2], new=dict(x=1))) == [
        "a: was 1, is 1.5", "b.c: was [1, 2], is [1, 3]", "gone: was null, is not there", "new.x: was not there, is 1"]
    assert differences({}, {}) == []
    assert hashlib.sha256(b"").hexdigest() in differences({"d": hashlib.sha256(b"").hexdigest()}, {"d": ""})[0]
