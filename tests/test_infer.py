"Inference on every kind of file and model, with what is known of an interruption, and under launchers"
import csv
import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mdl_nbdev.model.text_family import tiny_text_tokenizer
from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.settings import InferSettings
from mdl_nbdev.infer.run import infer
from mdl_nbdev.model.load import load_processor
from mdl_nbdev.model.midashenglm_family import tiny_model
from mdl_nbdev.model.text_family import tiny_text_model
from mdl_nbdev.data.sounds import make_sounds


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)


def settings(input, output, **kwargs): return InferSettings(**dict(input=input, output=output, model_name="tiny", batch_size=2, max_new_tokens=4, num_workers=2) | kwargs)
def answer(input, output, **kwargs): return infer(settings(input, output, **kwargs))
def table(path): return list(csv.reader(open(path, encoding="utf-8", newline=""), delimiter="\t" if str(path).endswith("tsv") else ","))
def lines(path): return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
def write(path, records): Path(path).write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
def leftovers(name): return sorted(p.name for p in Path().glob(f"{name}.*") if p.name != name)


# --- Kinds of files

def test_kinds_of_files():
    "The same rows from CSV, TSV, Parquet and JSONL get the same answers, each in its place"
    make_sounds(".", 6)
    rows = [[f'note, "{i}"\nand more', r[0], "old", str(i)] for i, r in enumerate(table("sounds.csv")[1:])]
    names = ["note", "audio", "prediction", "number"]
    for name, sep in [("rows.csv", ","), ("rows.tsv", "\t")]:
        with open(name, "w", newline="") as f: csv.writer(f, delimiter=sep).writerows([names, *rows])
    pq.write_table(pa.table({n: [r[i] for r in rows] for i, n in enumerate(names)}), "rows.parquet")
    write("rows.jsonl", [{"audio": r[1], "note": r[0], "prediction": "old", "number": i} for i, r in enumerate(rows)])
    outs = [("rows.csv", "a.csv"), ("rows.csv", "a.tsv"), ("rows.tsv", "b.tsv"), ("rows.tsv", "b.csv"), ("rows.parquet", "c.csv"), ("rows.parquet", "c.tsv"), ("rows.parquet", "c")]
    for i, o in outs: answer(i, o)
    answer("rows.jsonl", "d.jsonl")
    first = table("a.csv")
    assert [names, *([r[0], r[1], a[2], r[3]] for r, a in zip(rows, first[1:]))] == first
    assert all(table(o) == first for _, o in outs)
    assert lines("d.jsonl") == [{"audio": r[1], "note": r[0], "prediction": a[2], "number": i} for i, (r, a) in enumerate(zip(rows, first[1:]))]
    assert "old" not in {r[2] for r in first}
    assert [list(r) for r in lines("d.jsonl")] == [["audio", "note", "prediction", "number"]]*6, "the order of keys is kept"


@pytest.mark.parametrize("input, output, right", [("rows.jsonl", "out.csv", ".jsonl"), ("rows.jsonl", "out.parquet", ".jsonl"), ("rows.csv", "out.jsonl", ".csv or .tsv"),
                                                  ("rows.parquet", "out.parquet", ".csv or .tsv")])
def test_output_of_another_kind(input, output, right):
    "Refused before a model is loaded"
    write("rows.jsonl", [{"prompt": "a"}])
    Path("rows.csv").write_text("user_prompt\na\n")
    pq.write_table(pa.table({"user_prompt": ["a"]}), "rows.parquet")
    with pytest.raises(InputError, match=f"{output}: the answers to {input} are written as {right}; choose"): answer(input, output, model_name="nowhere")
    assert not list(Path().glob("out*"))


def test_rejects_of_records():
    write("rows.jsonl", [{"prompt": "a"}, {"text": "no question"}, {"prompt": "b", "audio": "lost.wav"}])
    report = answer("rows.jsonl", "out.jsonl")
    assert [r["prediction"] == "" for r in lines("out.jsonl")] == [False, True, True]
    assert [r[:3] for r in table("out.jsonl.rejects.csv")] == [["row", "line", "audio"], ["2", "2", ""], ["3", "3", "lost.wav"]]
    assert "lost.wav: no such file" in report.rejected[1][3]
    page = report._repr_html_()
    assert ">a</td>" in page and "lost.wav: no such file" in page


def test_report_shows_clips_and_prompts():
    make_sounds(".", 2)
    write("rows.jsonl", [{"messages": [{"role": "user", "content": [{"type": "audio", "path": "sounds/0000.wav"}, {"type": "audio", "path": "sounds/0001.wav"}, {"type": "text", "text": "Which?"}]}]}])
    assert answer("rows.jsonl", "out.jsonl")._repr_html_().count("<audio") == 2


# --- Text models

def greedy(model, tok, prompt, n):
    "The completion of a prompt, token by token, without padding, cache or neighbours"
    ids = tok(prompt, add_special_tokens=False).input_ids
    new = []
    with torch.no_grad():
        while len(new) < n:
            token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
            if token == tok.eos_token_id: break
            new.append(token)
    return tok.decode(new)


def prompt(*turns):
    "The text of a prompt with role markers, typed from the specification"
    return "".join(f"<|role_start|>{role}<|role_end|>{text}" + "<|endoftext|>"*(role == "bot") for role, text in turns) + "<|role_start|>bot<|role_end|>"


def chat(*turns): return {"chat_rounds": [{"role": r, "content": c, "chat_round_id": i} for i, (r, c) in enumerate(turns)]}


def test_text_model_is_prompted_with_the_history():
    "Prompts of many lengths in one batch, against a loop over single rows"
    conversations = [[("human", "a")], [("system", "Be brief."), ("human", "What is the capital of France? " * 5)],
                     [("human", "Spell cat"), ("bot", "c a t"), ("human", "And dog?")], [("system", "S"), ("human", "1"), ("bot", "2"), ("human", "3"), ("bot", "4"), ("human", "5é日👋")]]
    write("ask.jsonl", [chat(*c) for c in conversations] + [chat(*conversations[2], ("bot", "the reference, which is not shown to the model"))])
    answer("ask.jsonl", "told.jsonl", model_name="tiny-text", max_new_tokens=12, batch_size=8)
    model, tok = tiny_text_model(), tiny_text_tokenizer()
    expected = [greedy(model, tok, prompt(*c), 12) for c in conversations]
    told = lines("told.jsonl")
    assert [r["prediction"] for r in told] == [*expected, expected[2]]
    assert len(set(expected)) == 4
    assert [{k: v for k, v in r.items() if k != "prediction"} for r in told] == lines("ask.jsonl")


def test_table_of_texts():
    Path("ask.csv").write_text("user_prompt,system_prompt,prediction\nSpell cat,,\nReverse abc,Be brief.,cba\n")
    answer("ask.csv", "told.csv", model_name="tiny-text", system_prompt="Speak.")
    model, tok = tiny_text_model(), tiny_text_tokenizer()
    expected = [greedy(model, tok, prompt(("system", s), ("human", h)), 4) for s, h in [("Speak.", "Spell cat"), ("Be brief.", "Reverse abc")]]
    assert [r[2] for r in table("told.csv")[1:]] == expected


def test_chat_template_file():
    Path("mine.jinja").write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}<|endoftext|>{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}")
    Path("ask.csv").write_text("user_prompt\nSpell cat\n")
    answer("ask.csv", "told.csv", model_name="tiny-text", chat_template="mine.jinja")
    assert table("told.csv")[1] == ["Spell cat", greedy(tiny_text_model(), tiny_text_tokenizer(), "[user] Spell cat<|endoftext|>[assistant] ", 4)]


def folder(path, model, **generation):
    "A model as others publish theirs"
    model.generation_config.update(**generation)
    model.save_pretrained(path)
    tiny_text_tokenizer().save_pretrained(path)


def test_model_of_a_fixed_length():
    "A model with learnt positions is not taken beyond them: its answer ends there, and a longer prompt is rejected"
    from transformers import GPT2Config, GPT2LMHeadModel
    tok = tiny_text_tokenizer()
    torch.manual_seed(0)
    folder("gpt2", GPT2LMHeadModel(GPT2Config(vocab_size=len(tok), n_positions=40, n_embd=16, n_layer=1, n_head=2, eos_token_id=tok.eos_token_id)).eval())
    used = len(tok(prompt(("human", "")), add_special_tokens=False).input_ids)
    write("ask.jsonl", [{"prompt": "x"*n} for n in (5, 40-used-3, 40-used, 60)])
    report = answer("ask.jsonl", "told.jsonl", model_name="gpt2", max_new_tokens=99)
    assert [r[1] for r in report.rejected] == ["3", "4"]
    assert re.match("the prompt has 40 tokens, and this model takes 40", report.rejected[0][3])
    assert report.truncated == [1, 2]
    answers = [tok(r["prediction"], add_special_tokens=False).input_ids for r in lines("told.jsonl")]
    assert [len(a) for a in answers[2:]] == [0, 0]


def test_a_models_own_sampling_is_not_taken(capfd):
    "Settings decide, not the generation_config.json that a model comes with; and nothing complains"
    Path("ask.csv").write_text("user_prompt\nSpell cat\nReverse abc\n")
    folder("plain", tiny_text_model())
    folder("fancy", tiny_text_model(), do_sample=True, temperature=.6, top_k=20, top_p=.8, repetition_penalty=1.3)
    for name in ["plain", "fancy"]: answer("ask.csv", f"{name}.csv", model_name=name, max_new_tokens=16)
    assert table("plain.csv") == table("fancy.csv")
    err = capfd.readouterr().err
    assert "flags" not in err and "Warning" not in err and "temperature" not in err, err


def test_sampling_options():
    write("ask.jsonl", [{"prompt": f"word {i}"} for i in range(6)])
    def answers(**kwargs): return [r["prediction"] for r in (answer("ask.jsonl", "told.jsonl", model_name="tiny-text", max_new_tokens=24, overwrite=True, **kwargs), lines("told.jsonl"))[1]]
    greedy, sampled = answers(), answers(do_sample=True, seed=1)
    assert answers(do_sample=True, seed=1) == sampled != answers(do_sample=True, seed=2)
    assert answers(do_sample=True, top_p=1e-6) == greedy, "only the most likely token is left"
    assert answers(do_sample=True, temperature=1e-4) == greedy
    assert answers(num_beams=3) != greedy
    tokens = [len(set(a)) for a in answers(repetition_penalty=5.)]
    assert sum(tokens) > sum(len(set(a)) for a in greedy), "fewer tokens are repeated"


# --- What remains of an earlier run

interrupts = []


def stopped(shards, input="sounds.csv", output="out.csv", **kwargs):
    "A run that ends after so many shards of 16 rows; gives its part file and log"
    def stop(rows, done, total):
        if done >= 16*shards: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt) as e: infer(settings(input, output, **kwargs), [stop])
    interrupts.append(e) # as in a notebook, which keeps the last traceback and with it what its frames hold
    return Path(f"{output}.part"), Path(f"{output}.part.log")


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1
    path.write_bytes(data)


damage = {
    "none": (3, lambda part, log: None),
    "torn row": (3, lambda part, log: part.open("ab").write(b'"sounds/00')),
    "torn log": (3, lambda part, log: log.open("ab").write(b'{"window": 3, "sta')),
    "zeros behind the log": (3, lambda part, log: log.open("ab").write(b"\0"*99 + b"\n")),
    "log line lost": (2, lambda part, log: log.write_bytes(b"".join(log.read_bytes().splitlines(True)[:2]))),
    "log lost": (0, lambda part, log: log.unlink()),
    "part lost": (0, lambda part, log: part.unlink()),
    "part cut": (2, lambda part, log: os.truncate(part, part.stat().st_size - 3)),
    "bit of an answer": (2, lambda part, log: flip(part, part.stat().st_size//2)),
    "bit of the log": (0, lambda part, log: flip(log, 0)),
    "both empty": (0, lambda part, log: [p.write_bytes(b"") for p in (part, log)]),
    "part of another rank": (3, lambda part, log: [p.rename(str(p).replace(".part", ".part-3")) for p in (part, log)]),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A folder with 70 sounds, of which some are missing, and their answers"
    folder = tmp_path_factory.mktemp("whole")
    make_sounds(folder, 70)
    for i in range(3, 70, 9): (folder/f"sounds/{i:04}.wav").unlink()
    infer(settings(folder/"sounds.csv", folder/"whole.csv", base_dir=folder))
    return folder


@pytest.mark.parametrize("name", damage)
def test_what_remains_of_a_run(name, whole):
    "Finished shards that are intact count, all else is computed again, and the result is the same"
    shards, harm = damage[name]
    part, log = stopped(3, whole/"sounds.csv", base_dir=whole)
    harm(part, log)
    report = infer(settings(whole/"sounds.csv", "out.csv", base_dir=whole))
    assert report.resumed == 16*shards
    assert Path("out.csv").read_bytes() == (whole/"whole.csv").read_bytes()
    assert Path("out.csv.rejects.csv").read_bytes() == (whole/"whole.csv.rejects.csv").read_bytes()
    assert leftovers("out.csv") == ["out.csv.rejects.csv"]
    assert len(report.rejected) == 8 and report.truncated, "an earlier run's rows are in the report"


def test_changed_input(whole):
    "A row that was changed: its shard is computed again, and no other"
    rows = (whole/"sounds.csv").read_text().splitlines(True)
    Path("rows.csv").write_text("".join(rows))
    stopped(3, "rows.csv", base_dir=whole)
    Path("rows.csv").write_text("".join([*rows[:20], rows[1], *rows[21:]]))
    report = infer(settings("rows.csv", "out.csv", base_dir=whole))
    assert report.resumed == 32
    answer("rows.csv", "again.csv", base_dir=whole)
    assert Path("out.csv").read_bytes() == Path("again.csv").read_bytes()


def test_starting_over(whole):
    stopped(3, whole/"sounds.csv", base_dir=whole)
    for p in ["out.csv.part", "out.csv.part.log"]: shutil.copy(p, p.replace(".part", ".part-1"))
    assert infer(settings(whole/"sounds.csv", "out.csv", base_dir=whole, overwrite=True)).resumed == 0
    assert leftovers("out.csv") == ["out.csv.rejects.csv"]


def test_two_runs_with_one_output(whole):
    "The second is refused while the first lives"
    s = settings(whole/"sounds.csv", "out.csv", base_dir=whole)
    refused = []
    def another(rows, done, total):
        if refused: return
        for other in (s, dataclasses.replace(s, overwrite=True)):
            with pytest.raises(InputError, match="out.csv: another process is writing this; wait") as e: infer(other)
            refused.append(e)
    infer(s, [another])
    assert len(refused) == 2
    assert Path("out.csv").read_bytes() == (whole/"whole.csv").read_bytes()


# --- Launchers

env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
command = ["mdl_infer", "--batch-size", "2", "--max-new-tokens", "4", "--num-workers", "1"]
bin = Path(sys.executable).parent
fsdp = ["--config_file", Path(__file__).parent.parent/"examples"/"fsdp.yaml", "--fsdp_cpu_ram_efficient_loading", "true"] # which concerns training alone
launchers = {
    "torchrun": [bin/"torchrun", "--standalone", "--nproc-per-node", "2", "--no-python"],
    "accelerate": [bin/"accelerate", "launch", *fsdp, "--num_processes", "2", "--main_process_port", "0", "--no_python"],
    "accelerate on the CPU": [bin/"accelerate", "launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--no_python"],
}


def launch(launcher, *args, code=0):
    "Run a command under a launcher; gives what it printed"
    p = subprocess.run([*launchers[launcher], bin/command[0], *command[1:], *map(str, args)], env=env, capture_output=True, text=True, timeout=120)
    assert p.returncode == code, p.stderr
    return p.stdout, p.stderr


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate", pytest.param("accelerate on the CPU", marks=pytest.mark.slow)])
def test_launchers(launcher, whole):
    "The output of two processes is that of one, and one of them prints; on a CPU accelerate starts only one unless configured otherwise"
    tiny_model().save_pretrained("model")
    load_processor("tiny").save_pretrained("model")
    out, err = launch(launcher, whole/"sounds.csv", "--base-dir", whole, "--output", "out.csv", "--model-name", "model", code=1)
    assert Path("out.csv").read_bytes() == (whole/"whole.csv").read_bytes()
    assert Path("out.csv.rejects.csv").read_bytes() == (whole/"whole.csv.rejects.csv").read_bytes()
    assert leftovers("out.csv") == ["out.csv.rejects.csv"]
    assert out.count("70 rows in out.csv") == out.count("8 rows without an answer") == 1
    assert len(re.findall(r"answering:.*70/70", err)) >= 1 and "8 without an answer" in err


def test_bad_input_under_a_launcher():
    "Reported once"
    make_sounds(".", 3)
    _, err = launch("torchrun", "sounds.csv", "--output", "out.csv", "--model-name", "tiny", "--adapter", "nowhere", code=1)
    assert err.count("mdl_infer: ") == 1 and "no LoRA adapter here" in err
    assert "another process" not in err
    assert not list(Path().glob("out*"))


def by_hand(rank, *args):
    "One of two processes, started by nobody who would end it when the other dies"
    code = """
import os, sys
from mdl_nbdev.cli.commands import mdl_infer
from mdl_nbdev.infer.output import InferOutput
if os.environ["RANK"] == os.environ.get("DIES"):
    write = InferOutput.write
    def once(*args):
        write(*args)
        os.kill(os.getpid(), 9)
    InferOutput.write = once
mdl_infer()"""
    return subprocess.Popen([sys.executable, "-c", code, *command[1:], *map(str, args)], env={**env, **rank}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_lost_process_ends_the_others(whole):
    "Without a launcher that would do it, and with a message; the rest is answered by one process alone"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    args = [whole/"sounds.csv", "--base-dir", whole, "--output", "out.csv", "--model-name", "tiny"]
    ranks = [by_hand({"RANK": str(r), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DIES": "1"}, *args) for r in range(2)]
    (_, err), _ = [p.communicate(timeout=100) for p in ranks]
    assert [p.returncode for p in ranks] == [2, -9]
    assert err.splitlines()[-1] == ("mdl_infer: another process of this run ended before its work was done; finished work is kept: run the same command again to continue")
    report = infer(settings(whole/"sounds.csv", "out.csv", base_dir=whole))
    assert report.resumed == 3*16 + 6, "shards 0, 2 and 4 are those of the first process, the other one had finished shard 1"
    assert Path("out.csv").read_bytes() == (whole/"whole.csv").read_bytes()
