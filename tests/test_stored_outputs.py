"Outputs at addresses of stores: the bytes of a run on this machine, refused early, and not lost when an upload fails"
import json
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from training_runs import free_port
from transformers import TrainerCallback

from mdl_nbdev.base import stored_outputs, stored_runs
from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.settings import CheckSettings, ConvertSettings, InferSettings, MergeSettings, ReviewSettings, TrainSettings, TuneSettings
from mdl_nbdev.base.stored_outputs import StoredOutput, local_output
from mdl_nbdev.cli import commands
from mdl_nbdev.data.sounds import make_sounds
from mdl_nbdev.infer.run import infer
from mdl_nbdev.model import vllm
from mdl_nbdev.train.convert import convert
from mdl_nbdev.train.dataset import AudioDataset
from mdl_nbdev.train.run import train


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MDL_CACHE", str(tmp_path/"cache"))
    monkeypatch.setattr(stored_outputs, "RETRIES", 1)
    make_sounds(".", 5)
    with open("sounds.csv", "a") as f: f.write("lost.wav,\n")


class Shelf(DirFileSystem):
    "A folder as a store, which notes what is done to it and fails where it is told to"
    protocol, cachable = "shelf", False
    done, broken = [], {}
    def __init__(self, **kwargs): super().__init__(path="shelf", fs=LocalFileSystem())
    def note(self, verb, path):
        error = self.broken.get(verb)
        if error: raise error
        self.done.append((verb, path))
    def put_file(self, lpath, rpath, **kwargs):
        self.note("put", rpath)
        assert rpath.endswith(".part"), "a reader would see half a file"
        return super().put_file(lpath, rpath, **kwargs)
    def pipe_file(self, path, value, **kwargs):
        self.note("pipe", path)
        return super().pipe_file(path, value, **kwargs)


@pytest.fixture
def shelf(monkeypatch):
    Path("shelf").mkdir()
    fsspec.register_implementation("shelf", Shelf, clobber=True)
    monkeypatch.setattr(Shelf, "done", [])
    monkeypatch.setattr(Shelf, "broken", {})
    yield Path("shelf")


def settings(output, **kwargs): return InferSettings(**dict(input="sounds.csv", output=output, model_name="tiny", batch_size=2, max_new_tokens=4, num_workers=1) | kwargs)
def files(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
def stored(memory, folder): return {path.removeprefix(f"{folder}/"): memory.cat(path) for path in memory.find(folder)}
def no_engine(*args): pytest.fail("the rows were answered again")


def run(command, *args):
    "The exit code of a command"
    with pytest.raises(SystemExit) as e: getattr(commands, command)([str(a) for a in args])
    return e.value.code


# --- Answers

def test_answers_in_a_store_are_those_of_a_file(memory, capsys):
    infer(settings("out/answers.csv"))
    report = infer(settings("memory://bucket/answers.csv"))
    assert stored(memory, "/bucket") == files("out"), "with the rejects"
    assert str(report).startswith("6 rows in memory://bucket/answers.csv") and "memory://bucket/answers.csv.rejects.csv" in str(report)
    assert "cache" not in str(report) and report.failed
    assert not [p for p in Path("cache/outputs").rglob("*")], "nothing is left here once it is there"


def test_the_command(memory, capsys):
    args = "sounds.csv", "--output", "memory://bucket/answers.csv", "--model-name", "tiny", "--max-new-tokens", 4, "--num-workers", 1
    assert run("mdl_infer", *args) == 2, "a row has no answer"
    assert "6 rows in memory://bucket/answers.csv" in capsys.readouterr().out
    assert run("mdl_infer", *args) == 2
    assert "memory://bucket/answers.csv: the output exists already" in capsys.readouterr().err
    assert run("mdl_check", "sounds.csv", "--output", "memory://bucket/found.csv") == 2
    assert "--output: memory:/bucket/found.csv is not on this machine" in capsys.readouterr().err


def test_an_output_that_exists_is_refused_before_the_model_is_loaded(memory):
    memory.pipe("/bucket/answers.csv", b"old")
    memory.pipe("/bucket/answers.csv.rejects.csv", b"old")
    memory.pipe("/bucket/answers.csv.gz", b"of somebody else")
    with pytest.raises(InputError, match="memory://bucket/answers.csv: the output exists already"): infer(settings("memory://bucket/answers.csv", model_name="nowhere"))
    Path("sounds.csv").write_text("".join(Path("sounds.csv").read_text().splitlines(True)[:-1]))
    infer(settings("out.csv"))
    infer(settings("memory://bucket/answers.csv", overwrite=True))
    assert stored(memory, "/bucket") == {"answers.csv": Path("out.csv").read_bytes(), "answers.csv.gz": b"of somebody else"}


def test_rejects_are_answered_again(memory):
    s = settings("memory://bucket/answers.csv")
    infer(s)
    make_sounds("more", 1)
    Path("more/sounds/0000.wav").rename("lost.wav")
    retried = settings("memory://bucket/answers.csv", retry_rejects=True)
    report = infer(retried)
    infer(settings("out.csv"))
    assert stored(memory, "/bucket") == {"answers.csv": Path("out.csv").read_bytes()} and report.resumed == 5


@pytest.mark.parametrize("broken, message", [("pipe", "cannot write there .PermissionError: not yours.; check the address, and the credentials"),
                                             ("put", "cannot be uploaded .OSError: busy.; the result is complete in .*answers.csv: run the same command again to upload it")])
def test_a_store_that_fails(shelf, broken, message, monkeypatch, capsys):
    "At once if nothing can be written; at the end the answers are kept, and uploaded by the next run"
    address = "shelf://bucket/answers.csv"
    infer(settings("out/answers.csv"))
    Shelf.broken[broken] = PermissionError("not yours") if broken == "pipe" else OSError("busy")
    with pytest.raises(InputError, match=f"{address}: {message}"): infer(settings(address, model_name="nowhere" if broken == "pipe" else "tiny"))
    kept = local_output(address)
    if broken == "pipe": return
    assert kept.read_bytes() == Path("out/answers.csv").read_bytes() and not files("shelf")
    monkeypatch.setattr(vllm, "choose_engine", no_engine)
    with pytest.raises(InputError, match=f"{address}: the result of an earlier command for this address, with other settings or input, waits in"): infer(settings(address, seed=1))
    with pytest.raises(InputError, match=f"{address}: cannot be uploaded"): infer(settings(address))
    Shelf.broken.clear()
    report = infer(settings(address, num_workers=2))
    assert files("shelf/bucket") == files("out") and not kept.exists() and str(report).startswith(f"6 rows in {address}")
    assert [row[2] for row in report.rejected] == ["lost.wav"] and "uploading the result of an earlier run" in capsys.readouterr().err


def test_a_waiting_result_of_other_rows_is_not_uploaded(shelf):
    address = "shelf://bucket/answers.csv"
    Shelf.broken["put"] = OSError("busy")
    with pytest.raises(InputError, match="cannot be uploaded"): infer(settings(address))
    Shelf.broken.clear()
    text = Path("sounds.csv").read_text().splitlines(True)
    Path("sounds.csv").write_text("".join(text[:4]))
    with pytest.raises(InputError, match="with other settings or input"): infer(settings(address))
    infer(settings("out.csv"))
    infer(settings(address, overwrite=True))
    assert files("shelf/bucket") == {"answers.csv": Path("out.csv").read_bytes()}


def test_an_interrupted_run_continues(memory, monkeypatch):
    address, shards = "memory://bucket/answers.csv", []
    make_sounds(".", 40)
    def stop(rows, done, total): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): infer(settings(address), [stop])
    assert not memory.find("/bucket")
    with pytest.raises(InputError, match="^memory://bucket/answers.csv.part: holds an unfinished run"): infer(settings(address, seed=3))
    report = infer(settings(address), [lambda rows, done, total: shards.append(len(rows))])
    infer(settings("out.csv"))
    assert report.resumed == 16 and sum(shards) == 24 and memory.cat("/bucket/answers.csv") == Path("out.csv").read_bytes()


def test_messages_name_the_address(memory):
    s = settings("memory://bucket/answers.csv", on_error="raise")
    with pytest.raises(InputError, match="finished rows are kept in memory://bucket/answers.csv.part"): infer(s)


@pytest.mark.parametrize("address, message", [("memory://bucket/a.csv", "--join: memory://bucket/a.csv is not in a folder that the processes share"),
                                              ("nowhere://bucket/a.csv", "Protocol not known: nowhere"), ("memory://bucket/..", "has no name at its end")])
def test_refused_addresses(memory, address, message):
    with pytest.raises(InputError, match=message): infer(settings(address, model_name="nowhere", join="bucket/a" in address))


def test_a_missing_package(monkeypatch):
    def missing(address): raise ImportError("Install s3fs to access S3")
    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(InputError, match=r's3://b/a.csv: Install s3fs.*; pip install "mdl_nbdev\[remote\]"'): infer(settings("s3://b/a.csv", model_name="nowhere"))


def test_two_processes_of_a_launcher():
    "They write into one place, and the main process uploads"
    infer(settings("out/answers.csv"))
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    code = "from mdl_nbdev.cli.commands import mdl_infer; mdl_infer()"
    Path("start.py").write_text(code)
    args = ["start.py", "sounds.csv", "--output", "local://there/answers.csv", "--model-name", "tiny", "--batch-size", "2", "--max-new-tokens", "4", "--num-workers", "1"]
    r = subprocess.run([*line, *args], capture_output=True, text=True, timeout=600)
    assert files("there") == files("out"), r.stderr
    assert r.stdout.count("6 rows in local://") == 1 and not files("cache/outputs")


# --- Folders

def rows(name="good.csv"):
    Path(name).write_text("".join(Path("sounds.csv").read_text().splitlines(True)[:-1]))
    return name


def converted(output, **kwargs): return convert(ConvertSettings(input=rows(), output=output, model_name="tiny", num_workers=1, **kwargs))


def test_a_converted_folder(memory, tmp_path):
    converted("here")
    report = converted("memory://bucket/sets/a")
    assert stored(memory, "/bucket/sets/a") == files("here") and "in memory://bucket/sets/a" in str(report)
    memory.get("/bucket/sets/a/", "back/", recursive=True)
    assert len(AudioDataset("back")) == report.rows == 5
    with pytest.raises(InputError, match="memory://bucket/sets/a: the output exists already"): converted("memory://bucket/sets/a")
    memory.pipe("/bucket/sets/a/data-00000-old.arrow", b"of the earlier folder")
    converted("memory://bucket/sets/a", overwrite=True)
    assert stored(memory, "/bucket/sets/a") == files("here"), "what the earlier folder had is gone"
    memory.pipe("/bucket/sets/a/notes.docx", b"mine")
    with pytest.raises(InputError, match="not replaced: this command did not write notes.docx"): converted("memory://bucket/sets/a", overwrite=True)
    assert memory.cat("/bucket/sets/a/notes.docx") == b"mine"


def test_what_opens_a_folder_comes_last(shelf):
    converted("shelf://bucket/sets/a")
    sent = [path for verb, path in Shelf.done if verb == "put"]
    assert len(sent) == len(files("shelf/bucket/sets/a")) > 3 and sent[-1] == "bucket/sets/a/mdl_nbdev.json.part"
    assert not [name for name in files("shelf") if name.endswith(".part")]


def test_a_replaced_folder_is_closed_first(shelf, monkeypatch):
    "While it is replaced, nobody can open it"
    converted("shelf://bucket/a")
    monkeypatch.setattr(Shelf, "put_file", lambda self, lpath, rpath, **kwargs: pytest.fail("open") if Path("shelf/bucket/a/mdl_nbdev.json").exists() else Shelf.__base__.put_file(self, lpath, rpath, **kwargs))
    converted("shelf://bucket/a", overwrite=True)
    assert Path("shelf/bucket/a/mdl_nbdev.json").exists()


def test_a_merged_model(memory):
    from mdl_nbdev.model.adapters import adapt
    from mdl_nbdev.model.load import load_model, load_processor
    from mdl_nbdev.model.save import merge_adapter, save_model
    save_model(adapt(load_model("tiny"), TuneSettings(lora_rank=2)), load_processor("tiny"), "adapter")
    def merged(output, **kwargs): return merge_adapter(MergeSettings(adapter="adapter", model_name="tiny", output=output, **kwargs))
    merged("here")
    assert merged("memory://bucket/models/a") == "memory://bucket/models/a" and stored(memory, "/bucket/models/a") == files("here")
    with pytest.raises(InputError, match="the output exists already"): merged("memory://bucket/models/a")
    memory.pipe("/bucket/other/text.txt", b"mine")
    with pytest.raises(InputError, match="not replaced: this command did not write text.txt"): merged("memory://bucket/other", overwrite=True)


def test_a_file_where_a_folder_should_be(memory):
    memory.pipe("/bucket/a", b"a file")
    with pytest.raises(InputError, match="the output exists already"): converted("memory://bucket/a")


def test_what_the_store_holds_is_compared(memory, monkeypatch):
    monkeypatch.setattr(StoredOutput, "put", lambda self, name, show: self.fs.pipe_file(f"{self.there}/{name}", b"less"))
    with pytest.raises(InputError, match="cannot be uploaded .OSError: the store holds"): converted("memory://bucket/a")
    assert len(AudioDataset(local_output("memory://bucket/a"))) == 5


def test_commands_that_write_here_only():
    for make in (lambda out: CheckSettings(input="a.csv", output=out), lambda out: ReviewSettings(input="a.csv", output=out)):
        for out in ("s3://bucket/out.csv", Path("gs://bucket/out")):
            with pytest.raises(InputError, match="--output: .* is not on this machine"): make(out)


def test_a_kill_while_the_copy_here_is_removed_costs_the_store_nothing(memory, monkeypatch):
    "It ends halfway through the removal; the same command finds the whole result in the store"
    s, remove = ConvertSettings(input=rows(), output="memory://bucket/converted", model_name="tiny", num_workers=1), shutil.rmtree
    def half(path, *args, **kwargs):
        if not memory.exists("/bucket/converted"): return remove(path, *args, **kwargs)
        for p in [p for p in sorted(Path(path).rglob("*")) if p.is_file()][:2]: p.unlink()
        raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(shutil, "rmtree", half)
        convert(s)
    before = stored(memory, "/bucket/converted")
    assert len(before) > 3
    with pytest.raises(InputError, match="the output exists already"): convert(s)
    assert stored(memory, "/bucket/converted") == before


def test_a_retry_whose_download_was_interrupted_is_made_again(memory, monkeypatch):
    s = settings("memory://bucket/answers.csv")
    infer(s)
    get = type(memory).get_file
    def lost(self, path, *args, **kwargs):
        if "rejects" in path: raise PermissionError("not now")
        return get(self, path, *args, **kwargs)
    again = settings("memory://bucket/answers.csv", retry_rejects=True)
    with monkeypatch.context() as m, pytest.raises(InputError, match="cannot be read .*not now"):
        m.setattr(type(memory), "get_file", lost)
        infer(again)
    shutil.copy(next(Path().rglob("*.wav")), "lost.wav")
    assert not infer(again).rejected


# --- Training runs

class Killed(Exception): pass


class Kill(TrainerCallback):
    "Ends a run after a step, as a crash does"
    def __init__(self, step, then=lambda: None): self.step, self.then = step, then
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step != self.step: return
        self.then()
        raise Killed


def run_settings(output, **kwargs):
    return TrainSettings(**dict(train_dataset=rows(), eval_dataset="good.csv", output=output, model_name="tiny", batch_size=2, max_steps=7, save_steps=2, eval_steps=2, sample_answers=1, logging_steps=1,
                                num_workers=1, lr=1e-3) | kwargs)


def other_machine(): shutil.rmtree("cache/outputs")
def weights(found): return {name: data for name, data in found.items() if name.startswith("final/") and name.endswith(".safetensors")}
def checkpoints(found): return sorted({name.split("/")[0] for name in found if name.startswith("checkpoint")})


@pytest.mark.parametrize("limit", [None, 2])
def test_a_run_continues_on_another_machine(memory, monkeypatch, limit):
    monkeypatch.setattr(stored_runs, "LOOK_SECONDS", .02)
    train(run_settings("run", save_total_limit=limit))
    address = "memory://bucket/runs/a"
    with pytest.raises(Killed): train(run_settings(address, save_total_limit=limit), [Kill(5)])
    assert checkpoints(stored(memory, "/bucket/runs/a")) == ["checkpoint-2", "checkpoint-4"]
    other_machine()
    with pytest.raises(InputError, match=f"{address}: holds a run already"): train(run_settings(address, save_total_limit=limit))
    report = train(run_settings(address, save_total_limit=limit, resume_from_checkpoint=True))
    found, here = stored(memory, "/bucket/runs/a"), files("run")
    assert weights(found) == weights(here) != {}, "bit for bit"
    assert checkpoints(found) == checkpoints(here)
    assert json.loads(found["checkpoint-6/trainer_state.json"])["best_global_step"] in (2, 4, 6), "by which the best one is found"
    losses = [[m["loss"] for m in map(json.loads, text.splitlines()) if "loss" in m] for text in (found["metrics.jsonl"], here["metrics.jsonl"])]
    assert losses[0] == losses[1] and json.loads(found["status.json"])["phase"] == "finished"
    assert set(here) - {".lock"} == set(found), "nothing is missing, nothing is left over"
    assert json.loads(found["config.json"])["output"] == "memory://bucket/runs/a", "an address as `--config` reads it"
    assert str(report).endswith(f"the model is in {address}/final") and not files("cache/outputs")


def test_checkpoints_are_uploaded_while_the_run_continues(memory, monkeypatch):
    monkeypatch.setattr(stored_runs, "LOOK_SECONDS", .02)
    seen = []
    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step != 4: return
            for _ in range(500):
                if memory.exists("/bucket/runs/a/checkpoint-2/manifest.json"): break
                stored_runs.threading.Event().wait(.02)
            seen.extend(checkpoints(stored(memory, "/bucket/runs/a")))
    train(run_settings("memory://bucket/runs/a", max_steps=4), [Look()])
    assert seen == ["checkpoint-2"]


def test_a_run_that_cannot_be_uploaded(shelf, capsys, monkeypatch):
    "It ends, everything is kept, and the same command uploads it"
    monkeypatch.setattr(stored_runs, "LOOK_SECONDS", .02)
    monkeypatch.setattr(stored_outputs, "RETRIES", 0)
    Shelf.broken["put"] = OSError("busy")
    s = run_settings("shelf://bucket/a", max_steps=2, eval_dataset=[])
    with pytest.raises(InputError, match="shelf://bucket/a: cannot be uploaded .*busy.*; everything is in .*run the same command again with --resume-from-checkpoint true"): train(s)
    assert (local_output("shelf://bucket/a")/"final").is_dir() and not files("shelf")
    Shelf.broken.clear()
    train(run_settings("shelf://bucket/a", max_steps=2, eval_dataset=[], resume_from_checkpoint=True))
    train(run_settings("run", max_steps=2, eval_dataset=[]))
    assert weights(files("shelf/bucket/a")) == weights(files("run")) and not files("cache/outputs")


def test_nothing_is_written_there_before_a_run_is_sure(memory, shelf):
    train(run_settings("memory://bucket/a", dry_run=True, eval_dataset=[]))
    assert not memory.find("/bucket")
    Shelf.broken["pipe"] = PermissionError("not yours")
    with pytest.raises(InputError, match="shelf://bucket/a: cannot write there"): train(run_settings("shelf://bucket/a", model_name="nowhere"))
    memory.pipe("/bucket/b/final/model.safetensors", b"weights")
    with pytest.raises(InputError, match="memory://bucket/b: cannot be resumed: it has no complete checkpoint"): train(run_settings("memory://bucket/b", resume_from_checkpoint=True))


@pytest.mark.parametrize("limit, fetched", [(None, ["checkpoint-2", "checkpoint-6"]), (3, ["checkpoint-2", "checkpoint-4", "checkpoint-6"])])
def test_what_is_fetched(memory, limit, fetched):
    "The newest complete checkpoint and the best one, without what was half uploaded; nothing that this machine has a newer one of"
    address = "memory://bucket/runs/a"
    for step in (2, 4, 6, 8): memory.pipe(f"/bucket/runs/a/checkpoint-{step}/trainer_state.json", json.dumps(dict(best_global_step=2)).encode())
    for step in (2, 4, 6): memory.pipe(f"/bucket/runs/a/checkpoint-{step}/manifest.json", str(step).encode())
    for name in ("metrics.jsonl", "samples/1.wav", "final/config.json"): memory.pipe(f"/bucket/runs/a/{name}", b"{}")
    out = stored_runs.StoredRun(address)
    out.local.mkdir(parents=True)
    for _ in range(2): # the second time, nothing is lacking
        stored_runs.fetch_run(out, run_settings(address, save_total_limit=limit), out.stored())
        assert checkpoints(files(out.local)) == fetched == sorted(out.sent) and {"metrics.jsonl", "samples/1.wav"} < set(files(out.local))
        memory.rm("/bucket/runs/a/metrics.jsonl")
        memory.pipe("/bucket/runs/a/metrics.jsonl", b"[]")
    assert (out.local/"metrics.jsonl").read_bytes() == b"{}" and not (out.local/"final").exists()


def test_an_emptied_folder_empties_no_store(memory):
    "Only what the run itself removes is removed there"
    address = "memory://bucket/runs/a"
    with pytest.raises(Killed): train(run_settings(address, save_total_limit=1), [Kill(3, lambda: shutil.rmtree(local_output(address)/"checkpoint-2"))])
    out = stored_runs.StoredRun(address)
    out.removes, out.sent = True, {"checkpoint-2": (0, 0)}
    memory.pipe("/bucket/runs/a/checkpoint-2/manifest.json", b"{}")
    out.sync()
    assert memory.exists("/bucket/runs/a/checkpoint-2/manifest.json")


def test_a_damaged_checkpoint_here_replaces_none_in_the_store(memory):
    address = "memory://bucket/runs/a"
    with pytest.raises(Killed): train(run_settings(address), [Kill(5)])
    for p in local_output(address).glob("checkpoint-*/*.safetensors"): p.write_bytes(p.read_bytes()[:100])
    train(run_settings(address, resume_from_checkpoint=True))
    train(run_settings("run"))
    assert weights(stored(memory, "/bucket/runs/a")) == weights(files("run")) != {}


# --- S3

@pytest.fixture
def s3(monkeypatch):
    "A server of S3 on this machine, with one bucket"
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    s3fs = pytest.importorskip("s3fs")
    server.start()
    host, port = server.get_host_and_port()
    for name, value in dict(AWS_ENDPOINT_URL=f"http://{host}:{port}", AWS_ACCESS_KEY_ID="testing", AWS_SECRET_ACCESS_KEY="testing", AWS_DEFAULT_REGION="us-east-1").items(): monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    store = s3fs.S3FileSystem()
    store.mkdir("bucket")
    yield store
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def test_s3(s3):
    infer(settings("out/answers.csv"))
    infer(settings("s3://bucket/runs/answers.csv"))
    assert {p.rpartition("/")[2]: s3.cat(p) for p in s3.find("bucket/runs")} == files("out")
    with pytest.raises(InputError, match="s3://bucket/runs/answers.csv: the output exists already"): infer(settings("s3://bucket/runs/answers.csv", model_name="nowhere"))
    with pytest.raises(InputError, match="s3://none/answers.csv: cannot write there .*; check the address, and the credentials"): infer(settings("s3://none/answers.csv", model_name="nowhere"))
    assert not s3.exists("none"), "a bucket is not made"
    converted("here")
    converted("s3://bucket/sets/a")
    assert {p.removeprefix("bucket/sets/a/"): s3.cat(p) for p in s3.find("bucket/sets/a")} == files("here")
    with pytest.raises(Killed): train(run_settings("s3://bucket/runs/a", save_total_limit=1), [Kill(5)])
    other_machine()
    train(run_settings("s3://bucket/runs/a", save_total_limit=1, resume_from_checkpoint=True))
    train(run_settings("run", save_total_limit=1))
    found = {p.removeprefix("bucket/runs/a/"): s3.cat(p) for p in s3.find("bucket/runs/a")}
    assert weights(found) == weights(files("run")) != {} and checkpoints(found) == checkpoints(files("run"))
