"Tables, models and converted datasets at addresses of stores: as on this machine, fetched once, and never half"
import json
import shutil
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mdl_nbdev.base import stored_outputs
from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.settings import CheckSettings, ConvertSettings, InferSettings, TrainSettings
from mdl_nbdev.cli import commands
from mdl_nbdev.cli.protocol import served_name
from mdl_nbdev.data import stored_inputs
from mdl_nbdev.data.sounds import make_sounds
from mdl_nbdev.data.stored_inputs import local_data, local_folder, with_local_inputs
from mdl_nbdev.infer.ask import ask, engine_for
from mdl_nbdev.model.load import load_model, load_processor
from mdl_nbdev.model.midashenglm_family import tiny_model
from mdl_nbdev.model.plausible import find_warnings
from mdl_nbdev.model.save import adapter_config, save_model

MODEL = "memory://bucket/model"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, memory):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MDL_CACHE", str(tmp_path/"cache"))
    monkeypatch.setattr(stored_outputs, "RETRIES", 1)
    monkeypatch.setattr(stored_inputs, "PINNED", {})


@pytest.fixture
def fetched(monkeypatch):
    "How often each file has been downloaded"
    counts, get_file = Counter(), MemoryFileSystem.get_file
    def count(self, rpath, *args, **kwargs):
        counts[rpath.rpartition("/")[2]] += 1
        return get_file(self, rpath, *args, **kwargs)
    monkeypatch.setattr(MemoryFileSystem, "get_file", count)
    return counts


def files(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
def cached(): return sorted(p.relative_to("cache").as_posix() for p in Path("cache").rglob("*") if p.is_file())


def put(memory, folder, address):
    for name, content in files(folder).items(): memory.pipe(f"/{address}/{name}", content)


def run(command, *args):
    "The exit code of a command"
    with pytest.raises(SystemExit) as e: getattr(commands, command)([str(a) for a in args])
    stored_inputs.PINNED.clear() # each command is a process
    return e.value.code


def test_from_a_table_to_answers_as_on_this_machine(memory, capsys):
    "Convert, train, merge and answer, in a store and here: the same weights and answers, and addresses wherever a name is written down"
    make_sounds(".", 8)
    put(memory, "sounds", "bucket/sounds")
    memory.pipe("/bucket/sounds.csv", Path("sounds.csv").read_bytes())
    save_model(tiny_model(), load_processor("tiny"), "model")
    put(memory, "model", "bucket/model")
    def everything(root):
        model, trained = f"{root}model", f"{root}runs/a/final"
        assert run("mdl_convert", f"{root}sounds.csv", "--output", f"{root}converted", "--model-name", model) == 0
        assert run("mdl_train", "--train-dataset", f"{root}converted", "--eval-dataset", f"{root}sounds.csv", "--model-name", model, "--output", f"{root}runs/a",
                   "--num-epochs", 1, "--batch-size", 4, "--merge-lora", "false") == 0
        assert run("mdl_merge", trained, "--output", f"{root}merged") == 0
        for name, options in {"adapted": ["--model-name", model, "--adapter", trained], "merged": ["--model-name", f"{root}merged"]}.items():
            assert run("mdl_infer", f"{root}sounds.csv", *options, "--output", f"{root}{name}.csv", "--max-new-tokens", 8) == 0
    everything("")
    everything("memory://bucket/")
    for name in ("adapted.csv", "merged.csv", "runs/a/final/adapter_model.safetensors", "merged/model.safetensors"):
        assert memory.cat(f"/bucket/{name}") == Path(name).read_bytes(), name
    assert adapter_config(local_folder("memory://bucket/runs/a/final"))["base_model_name_or_path"] == MODEL
    card = memory.cat("/bucket/runs/a/final/README.md").decode()
    assert f"base_model: {MODEL}" in card.replace('"', "")
    assert "`[\"memory://bucket/converted\"]`" in card and json.loads(memory.cat("/bucket/runs/a/config.json"))["train_dataset"] == ["memory://bucket/converted"]
    folders = [str(Path("cache").resolve()/name).encode() for name in ("folders", "tables", "outputs")]
    written = [p for p in memory.find("/bucket") if "/checkpoint-" not in p and not p.endswith((".arrow", "metrics.jsonl"))]
    assert not [path for path in written for folder in folders if folder in memory.cat(path)]


def test_a_folder_is_fetched_once_and_again_when_it_changes(memory, fetched, capsys):
    put_two = {"config.json": b"{}", "sub/weights.bin": b"0"*1000}
    for name, content in put_two.items(): memory.pipe(f"/bucket/model/{name}", content)
    first = local_folder(f"{MODEL}/")
    assert (files(first), first.name) == (put_two, "model") and fetched.total() == 2
    assert "memory://bucket/model: downloading 1,002 bytes to " in capsys.readouterr().err
    assert local_folder(Path("memory:/bucket/model")) == first and fetched.total() == 2 and not capsys.readouterr().err
    memory.pipe("/bucket/model/sub/weights.bin", b"1"*1000) # as large as before
    second = local_folder(MODEL)
    assert files(second)["sub/weights.bin"] == b"1"*1000 and files(first) == put_two, "another process may still read the older version"
    assert local_folder("here") == Path("here")


def test_threads_and_processes_fetch_a_folder_once(memory, fetched):
    for n in range(6): memory.pipe(f"/bucket/model/{n}", bytes([n])*100_000)
    found = []
    threads = [threading.Thread(target=lambda: found.append(local_folder(MODEL))) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(set(found)) == 1 and len(found) == 4 and set(fetched.values()) == {1} and not [p for p in cached() if "part" in p or "lock" in p]


def test_after_an_interruption_the_rest_is_fetched(memory, fetched, monkeypatch):
    "Of a file that has not arrived completely nothing counts"
    for n in range(6): memory.pipe(f"/bucket/model/{n}", bytes([n])*100_000)
    get_file, broken = MemoryFileSystem.get_file, [True]
    def breaks(self, rpath, lpath, **kwargs):
        get_file(self, rpath, lpath, **kwargs)
        if rpath.endswith("5") and broken:
            Path(lpath).write_bytes(b"half")
            if broken[0] != "short": raise ConnectionResetError(104, "reset")
    monkeypatch.setattr(MemoryFileSystem, "get_file", breaks)
    for fault in ("reset", "4 instead of 100000 bytes of 5"):
        with pytest.raises(InputError, match=f"{MODEL}: cannot be downloaded .*{fault}.; run the same command again; what has arrived is kept"): local_folder(MODEL)
        broken[0] = "short"
    broken.clear()
    fetched.clear()
    assert {name: content[:1] for name, content in files(local_folder(MODEL)).items()} == {str(n): bytes([n]) for n in range(6)}
    assert fetched == {"5": 1}


def test_too_little_space(memory, fetched, monkeypatch):
    memory.pipe("/bucket/model/weights", b"0"*5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4000))
    with pytest.raises(InputError, match=f"{MODEL}: needs .* in cache, where .* are free; free some space, or set MDL_CACHE to another folder".replace("in cache", "in .*cache")):
        local_folder(MODEL)
    assert not fetched


@pytest.mark.parametrize("address, marker, message", [
    ("memory://bucket/nowhere", "", "memory://bucket/nowhere: no such folder; check the address"),
    ("memory://bucket/runs/a", "config.json", "memory://bucket/runs/a: this is the folder of a run; what it has trained is memory://bucket/runs/a/final"),
    ("memory://bucket/runs/a", "", "memory://bucket/runs/a: this is the folder of a run; what it has trained is memory://bucket/runs/a/final"),
    ("memory://bucket/runs", "config.json", "memory://bucket/runs: there is no config.json in this folder; check the address"),
    ("memory://bucket/runs/b", "config.json", "memory://bucket/runs/b: this is the folder of a run; what it has trained is memory://bucket/runs/b/final"),
    ("memory://bucket/runs/b/final", "config.json", "memory://bucket/runs/b/final: there is no config.json in this folder; it holds an adapter: give it as --adapter"),
    ("memory://bucket/runs/a/final", "adapter_config.json", "memory://bucket/runs/a/final: there is no adapter_config.json in this folder; it holds a model: give it as --model-name"),
    ("memory://bucket/out", "", "/bucket/out/../../evil: this name leads out of the folder; rename the file"),
    ("nothing://bucket/model", "", "nothing://bucket/model: .*check the address")])
def test_what_is_no_such_folder(address, marker, message, memory, fetched):
    for name in ("runs/a/config.json", "runs/a/final/config.json", "runs/a/checkpoint-1/weights", "runs/b/config.json", "runs/b/final/adapter_config.json"):
        memory.pipe(f"/bucket/{name}", b"{}")
    memory.store["/bucket/out/../../evil"] = memory.store["/bucket/runs/a/config.json"]
    with pytest.raises(InputError, match=message): local_folder(address, marker)
    assert not fetched and not Path("cache/evil").exists()


def test_a_damaged_model_is_named_by_its_address(memory):
    memory.pipe("/bucket/model/config.json", b"{")
    with pytest.raises(InputError, match=f"^--model-name {MODEL}: ") as e: load_model(MODEL)
    assert "cache" not in str(e.value)


def test_a_command_stays_with_the_version_that_it_found(memory):
    "Its tokenizer and its weights belong together, whatever is uploaded meanwhile; a notebook gets the new one"
    memory.pipe("/bucket/model/config.json", b"{}")
    with_local_inputs(InferSettings(input="rows.csv", output="answers.csv", model_name=MODEL))
    first = local_folder(MODEL)
    memory.pipe("/bucket/model/config.json", b"{ }")
    assert local_folder(MODEL) == first
    stored_inputs.PINNED.clear()
    assert local_folder(MODEL) != first


def test_where_relative_paths_of_clips_start(memory):
    for name in ("a/rows.csv", "b/rows.csv", "task/rows.csv"): memory.pipe(f"/bucket/{name}", b"audio,prediction\ndog.wav,bark\n")
    memory.pipe("/bucket/converted/state.json", b"{}")
    Path("here").mkdir()
    Path("here/state.json").touch()
    def base(*paths, **kwargs):
        s = with_local_inputs(TrainSettings(train_dataset=list(paths), output="out", **kwargs))
        assert all(p.exists() for p in s.train_dataset)
        return s.base_dir and s.base_dir.as_posix()
    assert base("memory://bucket/a/rows.csv", "memory://bucket/converted", "here") == "memory:/bucket/a"
    assert base("memory://bucket/task/", "memory://bucket/task/rows.csv") == "memory:/bucket/task"
    assert base("memory://bucket/converted") is None
    with pytest.raises(InputError, match="--base-dir: give the folder .* in several: memory://bucket/a, memory://bucket/b"): base("memory://bucket/a/rows.csv", "memory://bucket/b/rows.csv")
    assert base("memory://bucket/a/rows.csv", "memory://bucket/b/rows.csv", base_dir=Path("clips")) == "clips"
    assert with_local_inputs(s := CheckSettings(input="rows.csv")) is s


def test_a_chat_template_and_warnings(memory):
    memory.pipe("/bucket/chat.jinja", b"{{ messages }}")
    s = with_local_inputs(ConvertSettings(input="rows.csv", output="out", model_name="tiny", chat_template="memory://bucket/chat.jinja"))
    assert s.chat_template.read_text() == "{{ messages }}" and s.base_dir is None and s.input == Path("rows.csv")
    given = InferSettings(input="s3://bucket/rows.csv", output="s3://bucket/out.csv", model_name="s3://bucket/model", adapter="s3://bucket/adapter", base_dir="s3://bucket/clips")
    assert not find_warnings(given, ["input", "output", "model_name", "adapter", "base_dir"])
    assert set(find_warnings(InferSettings(input="rows.csv", output="o", model_name="./x"), ["input", "model_name"])) == {"input", "model_name"}


def test_the_protocol_of_a_page_is_that_of_tables(memory, monkeypatch):
    "The web has no folders"
    asked = []
    monkeypatch.setattr(stored_inputs, "local_table", lambda path: asked.append(path) or Path("rows.csv"))
    assert local_data("https://example.org/rows") == Path("rows.csv") and asked == ["https://example.org/rows"]
    assert with_local_inputs(CheckSettings(input="https://example.org/a/rows.csv?sig=b/c")).base_dir.as_posix() == "https:/example.org/a"


def test_an_own_input_is_not_replaced(memory):
    rows = b"audio,prediction\ndog.wav,bark\n"
    for name in ("rows.csv", "answers.csv.rejects.csv"): memory.pipe(f"/bucket/{name}", rows)
    for name in ("config.json", "model.safetensors"): memory.pipe(f"/bucket/merged/{name}", b"{}")
    memory.pipe("/bucket/adapter/adapter_config.json", b"{}")
    for table, output in (("rows.csv", "rows.csv"), ("answers.csv.rejects.csv", "answers.csv")):
        with pytest.raises(SystemExit): commands.mdl_infer([f"memory://bucket/{table}", "--output", f"memory://bucket/{output}", "--model-name", "tiny", "--overwrite", "true"])
    stored_inputs.PINNED.clear()
    assert run("mdl_merge", "memory://bucket/adapter", "--model-name", "memory://bucket/merged/", "--output", "memory://bucket/merged", "--overwrite", "true") == 2
    assert memory.cat("/bucket/rows.csv") == memory.cat("/bucket/answers.csv.rejects.csv") == rows and not memory.exists("/bucket/answers.csv")
    assert memory.cat("/bucket/merged/model.safetensors") == b"{}"


def test_errors_and_reports_name_the_address(memory, capsys):
    memory.pipe("/bucket/rows.csv", b"audio,prediction\ndog.wav,\n")
    memory.pipe("/bucket/adapter/adapter_config.json", b"{")
    assert run("mdl_convert", "memory://bucket/rows.csv", "--output", "out", "--model-name", "tiny") == 2
    assert run("mdl_check", "memory://bucket/rows.csv", "--output", "found.csv") == 2
    assert {line.split(",")[1] for line in Path("found.csv").read_text().splitlines()[1:]} == {"memory://bucket/rows.csv"}
    for name in ("answers.csv", "labels.csv"): memory.pipe(f"/bucket/{name}", b"audio,prediction\ndog.wav,bark\n")
    assert run("mdl_eval", "memory://bucket/answers.csv", "--reference", "memory://bucket/labels.csv", "--output", "metrics.json") == 0
    assert json.loads(Path("metrics.json").read_text())["input"] == "memory://bucket/answers.csv"
    assert run("mdl_merge", "memory://bucket/adapter", "--output", "merged") == 2
    out, err = capsys.readouterr()
    assert "mdl_convert: memory://bucket/rows.csv:2: " in err and "mdl_merge: memory://bucket/adapter/adapter_config.json: not valid JSON" in err
    assert " memory://bucket/rows.csv:2: " in out and "cache/tables" not in out + err


def test_a_server_calls_an_adapter_by_its_address(memory):
    memory.pipe("/bucket/final/adapter_config.json", b"{}")
    s = with_local_inputs(InferSettings(input="requests", output="none", model_name="tiny", adapter="memory://bucket/final"))
    assert served_name(s) == "memory://bucket/final"
    assert served_name(InferSettings(input="requests", output="none", model_name="memory://bucket/model")) == "memory://bucket/model"


def test_markers_of_folders_are_no_files(memory, fetched, monkeypatch):
    "The console of S3 makes an empty file whose name ends in a slash for each new folder"
    for name in ("config.json", "sub/weights"): memory.pipe(f"/bucket/model/{name}", b"{}")
    find = MemoryFileSystem.find
    def with_markers(self, path, **kwargs):
        markers = {f"/bucket/model/{name}": dict(size=0, type="file") for name in ("", "sub/", "empty/")}
        return markers | find(self, path, **kwargs)
    monkeypatch.setattr(MemoryFileSystem, "find", with_markers)
    assert files(local_folder(MODEL)) == {"config.json": b"{}", "sub/weights": b"{}"}


def test_another_model_at_the_address_gives_another_result(memory):
    "What waits to be uploaded was made with the earlier one; without the cache's copies, it still counts as made with this one"
    def key():
        stored_inputs.PINNED.clear()
        stored_outputs.ADDRESSES.clear() # each command is a process
        return stored_outputs.run_key(with_local_inputs(InferSettings(input="rows.csv", output="out.csv", model_name=MODEL, adapter="memory://bucket/adapter")))
    memory.pipe("/bucket/model/config.json", b"{}")
    memory.pipe("/bucket/adapter/adapter_config.json", b"{}")
    first = key()
    shutil.rmtree("cache/folders")
    assert key() == first
    memory.pipe("/bucket/model/config.json", b"{ }")
    assert key() != first


def test_a_folder_that_appears_later_is_found(memory, monkeypatch):
    "File systems such as that of S3 remember what they have listed"
    remembered, isdir = {}, MemoryFileSystem.isdir
    monkeypatch.setattr(MemoryFileSystem, "isdir", lambda self, path: remembered.setdefault(path, isdir(self, path)))
    monkeypatch.setattr(MemoryFileSystem, "invalidate_cache", lambda self, path=None: remembered.clear())
    with pytest.raises(InputError, match="memory://bucket/rows: no such file"): local_data("memory://bucket/rows")
    memory.pipe("/bucket/rows/rows.csv", b"audio,prediction\n")
    assert local_data("memory://bucket/rows").is_dir()


def test_a_question_in_python_goes_to_the_model_that_is_there_now(memory, monkeypatch):
    from mdl_nbdev.model import engine
    loads = []
    def load(s):
        loads.append((s.model_name, s.adapter and s.adapter.name))
        raise InputError("loaded")
    monkeypatch.setattr(engine, "load_engine", load)
    make_sounds(".", 1)
    def question(**options):
        with pytest.raises(InputError, match="loaded"): ask(MODEL, "sounds/0000.wav", **options)
    memory.pipe("/bucket/model/config.json", b"{}")
    memory.pipe("/bucket/adapter/adapter_config.json", b"{}")
    question(adapter="memory://bucket/adapter")
    assert loads == [(MODEL, "adapter")]
    monkeypatch.setattr(engine, "load_engine", lambda s: loads.append(s.model_name))
    keep = InferSettings(input="rows.csv", output="out.csv", model_name=MODEL)
    for content in (b"{}", b"{}", b"{ }"):
        if memory.cat("/bucket/model/config.json") != content: memory.pipe("/bucket/model/config.json", content)
        engine_for(keep)
    assert len(loads) == 3
    with pytest.raises(InputError, match="memory://bucket/adapter: only commands read adapters from there; in Python, use local_folder"): adapter_config(Path("memory://bucket/adapter"))


def test_answers_at_addresses_are_compared(memory, capsys):
    for name, answer in {"a": "cat", "b": "dog", "reference": "cat"}.items(): memory.pipe(f"/bucket/{name}.csv", f"audio,prediction\nx.wav,dog\ny.wav,{answer}\n".encode())
    assert run("mdl_compare", "memory://bucket/a.csv", "memory://bucket/b.csv", "--reference", "memory://bucket/reference.csv") == 0
    said = capsys.readouterr().out
    assert "A: memory://bucket/a.csv" in said and "A is right and B wrong in 1, B is right and A wrong in 0" in said
