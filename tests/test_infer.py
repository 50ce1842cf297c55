"Inference on every kind of file and model, with what is known of an interruption, and under launchers"
import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from training_runs import ranks, start
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mdl_nbdev.base import claims
from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.parts import LoggedProgress, LoggedShard, OutputPart
from mdl_nbdev.base.settings import InferSettings
from mdl_nbdev.data.sounds import make_sounds
from mdl_nbdev.data.tables import CsvFile
from mdl_nbdev.infer.identity import identity_changes, run_identity
from mdl_nbdev.infer.output import InferOutput
from mdl_nbdev.infer.run import DEFAULT_NEW_TOKENS, Prompter, infer
from mdl_nbdev.model.chat import Chat
from mdl_nbdev.model.engine import TransformersEngine
from mdl_nbdev.model.load import load_processor
from mdl_nbdev.model.midashenglm_family import tiny_model
from mdl_nbdev.model.text_family import tiny_text_model, tiny_text_tokenizer


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


def test_an_output_that_exists_is_refused_before_the_input_is_read(monkeypatch):
    "Reading millions of rows takes minutes"
    Path("rows.csv").write_text("user_prompt\na\n")
    Path("out.csv").write_text("user_prompt,prediction\na,b\n")
    monkeypatch.setattr(CsvFile, "rows", lambda self, on_bad=None: pytest.fail("the rows were read"))
    with pytest.raises(InputError, match="the output exists already"): answer("rows.csv", "out.csv")
    with pytest.raises(InputError, match="would replace its own input"): answer("rows.csv", "rows.csv")


def test_rejects_of_records():
    write("rows.jsonl", [{"prompt": "a"}, {"text": "no question"}, {"prompt": "b", "audio": "lost.wav"}])
    report = answer("rows.jsonl", "out.jsonl")
    assert [r["prediction"] == "" for r in lines("out.jsonl")] == [False, True, True]
    assert [r[:3] for r in table("out.jsonl.rejects.csv")] == [["row", "line", "audio"], ["2", "2", ""], ["3", "3", "lost.wav"]]
    assert "lost.wav: no such file" in report.rejected[1][3]
    page = report._repr_html_()
    assert ">a</td>" in page and page.count(report.rejected[0][3]) == 1, "the reason is given once"


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


def inst_model(path, answer):
    "A folder with a word-level model of the [INST] kind whose completion is always `answer`; every token of it follows from the one before"
    words = ["<unk>", "<s>", "</s>", *(f"▁{w}" for w in ["[INST]", "[/INST]", "hear"]), "▁"]
    tokens = answer.split("|")
    vocab = {w: i for i, w in enumerate(dict.fromkeys([*words, *tokens]))}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(prepend_scheme="always"), decoders.Metaspace(prepend_scheme="never")
    tok = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=True, chat_template=INST)
    n = len(vocab)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=n, hidden_size=n + n % 2, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, tie_word_embeddings=False,
                                         bos_token_id=1, eos_token_id=2, pad_token_id=2))
    chain = ["▁[/INST]", *tokens, "</s>"]
    with torch.no_grad():
        for p in model.parameters(): p.fill_(float(p.ndim == 1)) # norms are ones; attention and MLP add nothing
        model.model.embed_tokens.weight.copy_(torch.eye(n, n + n % 2))
        for before, after in zip(chain, chain[1:]): model.lm_head.weight[vocab[after], vocab[before]] = 1
    model.save_pretrained(path)
    tok.save_pretrained(path)


INST = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"


def test_completions_are_decoded_with_care():
    "Neither the space that the template puts before an answer nor `clean_up_tokenization_spaces` changes what the model said"
    inst_model("inst", "▁a|▁dog|▁,|▁do|▁n't|▁.")
    Path("prompts.csv").write_text("user_prompt\nhear\n")
    answer("prompts.csv", "out.csv", model_name="inst", max_new_tokens=20)
    assert table("out.csv")[1] == ["hear", "a dog , do n't ."]


def test_each_row_is_tokenized_once(monkeypatch):
    seen, tokenize = [], Chat.tokenize
    def count(self, conversations):
        seen.extend(c.line for c in conversations)
        return tokenize(self, conversations)
    monkeypatch.setattr(Chat, "tokenize", count)
    make_sounds(".", 5)
    answer("sounds.csv", "out.csv")
    assert sorted(seen) == [2, 3, 4, 5, 6]


def test_long_clips_are_answered_by_default():
    "A clip of 60 s, without any option about lengths; the replaced tool's option keeps its meaning"
    sf.write("long.wav", np.random.default_rng(0).normal(0, .1, 16000*60), 16000)
    Path("rows.csv").write_text("audio\nlong.wav\n")
    report = answer("rows.csv", "out.csv", max_new_tokens=None)
    assert report.rejected == [] and 0 < report.sample[0].max_new_tokens == DEFAULT_NEW_TOKENS
    report = answer("rows.csv", "short.csv", max_new_tokens=None, max_length=128)
    assert re.match(r"the prompt has 3\d\d tokens, so --max-length 128 leaves none for an answer", report.rejected[0][3])


def test_one_row_is_one_row():
    Path("rows.csv").write_text("audio\nlost.wav\n")
    first, last = str(answer("rows.csv", "out.csv")).splitlines()
    assert first.startswith("1 row in out.csv, ") and last.startswith("1 row without an answer, listed in out.csv.rejects.csv; the first is line 2: lost.wav: no such file")


# --- Memory, and the flow of rows

def test_a_row_too_large_for_the_memory_is_rejected(monkeypatch):
    "All others are answered, as if there were enough memory"
    write("in.jsonl", [dict(prompt="word "*(200 if i == 3 else i + 1)) for i in range(7)])
    def run(name): return answer("in.jsonl", name, model_name="tiny-text", batch_size=4)
    run("whole.jsonl")
    inputs = TransformersEngine.inputs
    def limited(self, batch):
        if len(batch)*max(len(r.example.input_ids) for r in batch) > 400: raise torch.OutOfMemoryError("CUDA out of memory.")
        return inputs(self, batch)
    monkeypatch.setattr(TransformersEngine, "inputs", limited)
    report = run("out.jsonl")
    (row, line, _, reason, _), = table("out.jsonl.rejects.csv")[1:]
    assert (row, line) == ("4", "4") and "out of memory with this row alone" in reason and "--max-new-tokens" in reason
    assert len(report.rejected) == 1
    whole, out = (lines(name) for name in ("whole.jsonl", "out.jsonl"))
    assert out == [w | dict(prediction="") if i == 3 else w for i, w in enumerate(whole)]


def test_batches_as_large_as_memory_allows():
    "The answers are those of batches of two"
    make_sounds(".", 9)
    answer("sounds.csv", "two.csv")
    answer("sounds.csv", "auto.csv", batch_size="auto")
    assert Path("auto.csv").read_bytes() == Path("two.csv").read_bytes()
    with pytest.raises(InputError, match="--batch-size: got 'all'"): settings("sounds.csv", "x.csv", batch_size="all")


def test_the_engine_does_not_wait_between_shards(monkeypatch):
    "While the last batch of a shard is generated, the first clips of the next are decoded"
    make_sounds(".", 20)
    decoded, seen, decode, inputs = [], [], Prompter.decode, TransformersEngine.inputs
    def noted(self, pair):
        decoded.append(pair[0].row.line)
        return decode(self, pair)
    def slow(self, batch):
        deadline = time.monotonic() + 20
        while len(decoded) < min(20, len(seen) + 3) and time.monotonic() < deadline: time.sleep(.01)
        seen.extend(r.key for r in batch)
        assert len(decoded) >= min(20, len(seen) + 2)
        return inputs(self, batch)
    monkeypatch.setattr(Prompter, "decode", noted)
    monkeypatch.setattr(TransformersEngine, "inputs", slow)
    report = answer("sounds.csv", "out.csv", batch_size=1, max_new_tokens=1)
    assert report.rows == 20 and not report.rejected and sorted(seen) == list(range(2, 22))


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


@pytest.fixture(scope="module")
def three_shards(whole, tmp_path_factory):
    "A folder with what a run left that was stopped after three shards"
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        stopped(3, whole/"sounds.csv", base_dir=whole)
    return folder


@pytest.mark.parametrize("name", damage)
def test_what_remains_of_a_run(name, whole, three_shards):
    "Finished shards that are intact count, all else is computed again, and the result is the same"
    shards, harm = damage[name]
    shutil.copytree(three_shards, ".", dirs_exist_ok=True)
    harm(Path("out.csv.part"), Path("out.csv.part.log"))
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


def test_moved_lines(whole):
    "Rows that are only on other lines keep their answers, and are reported where they are now"
    rows = (whole/"sounds.csv").read_text().splitlines(True)
    Path("rows.csv").write_text("".join(rows))
    stopped(3, "rows.csv", base_dir=whole)
    Path("rows.csv").write_text("".join([*rows[:20], "\n\n", *rows[20:]]))
    report = infer(settings("rows.csv", "out.csv", base_dir=whole))
    assert report.resumed == 48 and Path("out.csv").read_bytes() == (whole/"whole.csv").read_bytes()
    assert [line for _, line, *_ in report.rejected] == [str(i + 2 + 2*(i >= 19)) for i in range(3, 70, 9)]


def parsed_rows(monkeypatch):
    "The lines on which rows start that are read from now on"
    lines, row = [], CsvFile.row
    monkeypatch.setattr(CsvFile, "row", lambda self, cells, line: (lines.append(line), row(self, cells, line))[1])
    return lines


@pytest.mark.parametrize("harm", [None, lambda marks: marks.unlink(), lambda marks: marks.write_text("{"), lambda marks: marks.write_text("[]"),
                                  lambda marks: marks.write_text(marks.read_text().replace('"every": 16', '"every": 8'))])
def test_finished_rows_are_not_read_again(harm, monkeypatch):
    "A run that continues knows from an earlier one how many rows there are, and reads only those that it has to answer"
    Path("ask.csv").write_text("user_prompt\n" + "".join(f"Spell {i}\n" for i in range(70)))
    answer("ask.csv", "whole.csv", model_name="tiny-text")
    stopped(3, "ask.csv", model_name="tiny-text")
    if harm: harm(Path("out.csv.part.marks"))
    lines = parsed_rows(monkeypatch)
    report = answer("ask.csv", "out.csv", model_name="tiny-text")
    assert report.resumed == 48 and Path("out.csv").read_bytes() == Path("whole.csv").read_bytes() and leftovers("out.csv") == []
    assert lines == [*(range(2, 72) if harm else []), *range(50, 72)]


def test_clips_of_finished_rows_are_compared(whole, three_shards, monkeypatch):
    "Their rows are read once for that, and those that remain once to be answered"
    shutil.copytree(three_shards, ".", dirs_exist_ok=True)
    lines = parsed_rows(monkeypatch)
    assert infer(settings(whole/"sounds.csv", "out.csv", base_dir=whole)).resumed == 48
    assert lines == [*range(2, 50), *range(50, 72)]


def test_an_edit_during_the_run(monkeypatch):
    "A shard that is about to be read has changed: the run stops, and the next one answers what is there then"
    text = "user_prompt\n" + "".join(f"Spell {i}\n" for i in range(300))
    Path("ask.csv").write_text(text)
    def edit(rows, done, total): Path("ask.csv").write_text(text.replace("Spell 299", "Write 299"))
    with pytest.raises(InputError, match="ask.csv: changed while its rows were read; run the same command again"):
        infer(settings("ask.csv", "out.csv", model_name="tiny-text"), [edit])
    report = answer("ask.csv", "out.csv", model_name="tiny-text")
    assert report.resumed >= 16 and "Write 299" in Path("out.csv").read_text() and leftovers("out.csv") == []


def test_a_run_that_does_not_begin_leaves_nothing():
    Path("ask.csv").write_text("user_prompt\nSpell cat\n")
    with pytest.raises(InputError): answer("ask.csv", "out.csv", model_name="no-such-model")
    assert sorted(p.name for p in Path().iterdir()) == ["ask.csv"]


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
            with pytest.raises(InputError, match="out.csv: another process is writing this .*; wait") as e: infer(other)
            refused.append(e)
    infer(s, [another])
    assert len(refused) == 2
    assert Path("out.csv").read_bytes() == (whole/"whole.csv").read_bytes()


def test_two_starts_at_once(whole):
    "The lock is held from before the first look at the files until the end, so a second start never sees a moment without it"
    stopped(3, whole/"sounds.csv", base_dir=whole)
    s, refused, resume = settings(whole/"sounds.csv", "out.csv", base_dir=whole), [], InferOutput.resume
    def second(self, shard_rows):
        if not refused:
            refused.append(None)
            with pytest.raises(InputError, match="another process is writing this"): infer(s)
        return resume(self, shard_rows)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(InferOutput, "resume", second)
        assert infer(s).resumed == 48
    assert Path("out.csv").read_bytes() == (whole/"whole.csv").read_bytes()
    assert leftovers("out.csv") == ["out.csv.rejects.csv"]


def test_an_input_is_not_replaced(whole):
    "Rejected rows, or a part, as the input of the run that would remove them"
    shutil.copy(whole/"whole.csv", "out.csv")
    shutil.copy(whole/"whole.csv.rejects.csv", "out.csv.rejects.csv")
    shutil.copy(whole/"sounds.csv", "new.csv.part")
    before = {p: p.read_bytes() for p in Path().glob("*.csv*")}
    for input, output in [("out.csv.rejects.csv", "out.csv"), ("new.csv.part", "new.csv"), ("out.csv", "out.csv")]:
        with pytest.raises(InputError, match="input"): answer(input, output, overwrite=True)
    assert {p: p.read_bytes() for p in Path().glob("*.csv*")} == before
    Path("out.csv.rejects.csv").rename("again.csv")
    assert answer("again.csv", "out.csv", overwrite=True, base_dir=whole).rows == 8, "under another name it is an input as any other"


# --- The identity of a run

def save(path, seed):
    tiny_model(seed).save_pretrained(path)
    load_processor("tiny").save_pretrained(path)


def test_a_retrained_model_does_not_continue(whole):
    "The same path, other weights: refused before a row is written. The same weights elsewhere, or with other notes beside them, continue"
    save("model", 0)
    args = dict(base_dir=whole, model_name="model")
    stopped(2, whole/"sounds.csv", **args)
    Path("model").rename("first")
    save("model", 1)
    before = {p.name: p.read_bytes() for p in Path().glob("out.csv*") if p.is_file()}
    with pytest.raises(InputError, match="out.csv.part: .*unfinished run.*: the contents of --model-name have changed.*--overwrite true"): answer(whole/"sounds.csv", "out.csv", **args)
    assert {p.name: p.read_bytes() for p in Path().glob("out.csv*") if p.is_file()} == before
    Path("first/README.md").write_text("trained for a while")
    assert answer(whole/"sounds.csv", "out.csv", **args | dict(model_name="first")).resumed == 32
    assert Path("out.csv").read_bytes() == (whole/"whole.csv").read_bytes()
    assert answer(whole/"sounds.csv", "out.csv", **args, overwrite=True).resumed == 0
    assert Path("out.csv").read_bytes() != (whole/"whole.csv").read_bytes()


def test_contents_of_an_identity():
    "A byte of an adapter, of a template, of a tokenizer, of weights that are larger than a piece"
    save("model", 0)
    Path("adapter").mkdir()
    files = ["adapter/adapter_model.safetensors", "adapter/adapter_config.json", "mine.jinja", "model/model.safetensors", "model/tokenizer.json", "model/config.json"]
    for f in files[:3]: Path(f).write_text("some content")
    s = settings("rows.csv", "out.csv", model_name="model", adapter="adapter", chat_template="mine.jinja")
    before = run_identity(s)
    for f, name in zip(files, ["adapter", "adapter", "chat-template"] + ["model-name"]*3):
        flip(Path(f), Path(f).stat().st_size//2)
        assert identity_changes(before, run_identity(s)) == [f"the contents of --{name} have changed"]
        flip(Path(f), Path(f).stat().st_size//2)
    assert identity_changes(before, run_identity(s)) == []
    assert identity_changes(before, run_identity(dataclasses.replace(s, adapter=None))) == ["the contents of --adapter have changed"]
    assert identity_changes(before, run_identity(dataclasses.replace(s, seed=7))) == ["--seed was 42 and is 7"]


def test_unfinished_run_of_version_0_1(whole):
    "It did not record which model gave its answers, so it is refused, with the remedy, and nothing of it is lost"
    part, log = stopped(3, whole/"sounds.csv", base_dir=whole)
    Path("out.csv.part.json").write_text(json.dumps(dict(input=str(whole/"sounds.csv"), model_name="tiny", batch_size=2, base_dir=str(whole), max_new_tokens=4)))
    before = {p.name: p.read_bytes() for p in Path().glob("out.csv*") if p.is_file()}
    with pytest.raises(InputError, match="started by another version.*--overwrite true"): answer(whole/"sounds.csv", "out.csv", base_dir=whole)
    assert {p.name: p.read_bytes() for p in Path().glob("out.csv*") if p.is_file()} == before
    assert answer(whole/"sounds.csv", "out.csv", base_dir=whole, overwrite=True).resumed == 0
    assert Path("out.csv").read_bytes() == (whole/"whole.csv").read_bytes()


class Killed(BaseException): "Stands for the end of a process: nothing that it would do later happens"


class Killer:
    "Ends a process before one of the steps of `InferOutput.finish` or of what follows it, counting from 0"
    def __init__(self, step): self.step, self.finishing, self.done, self.killed = step, False, 0, False
    def guard(self, f):
        def guarded(path, *args, **kwargs):
            if not self.finishing: return f(path, *args, **kwargs)
            self.killed |= self.done == self.step
            self.done += 1
            if not self.killed: return f(path, *args, **kwargs)
            if not str(path).endswith(".lock"): raise Killed # the end of a process frees its locks, and leaves their files
        return guarded
    def finish(self, output, *args):
        self.finishing = True
        return finish(output, *args)


finish = InferOutput.finish


def test_killed_at_any_step_of_the_end(monkeypatch):
    "Of a run whose result is complete nothing else is left, wherever it was killed; before that, it goes on"
    def paths(): return [*Path().glob("out.csv*"), *Path().glob(".out.csv*")]
    def files(): return {p.name.removeprefix("out.csv"): p.read_bytes() for p in paths()}
    make_sounds(".", 6)
    Path("sounds/0003.wav").unlink()
    answer("sounds.csv", "whole.csv")
    expected = {"": Path("whole.csv").read_bytes(), ".rejects.csv": Path("whole.csv.rejects.csv").read_bytes()}
    for step in range(100):
        for path in paths(): path.unlink()
        killer = Killer(step)
        with monkeypatch.context() as m:
            m.setattr(os, "replace", killer.guard(os.replace))
            m.setattr(Path, "unlink", killer.guard(Path.unlink))
            m.setattr(InferOutput, "finish", partialmethod(lambda output, *args, killer: killer.finish(output, *args), killer=killer))
            try: answer("sounds.csv", "out.csv")
            except Killed: pass
        if not killer.killed: break
        try: answer("sounds.csv", "out.csv")
        except InputError as e: assert "out.csv: the output exists already" in str(e)
        assert files() == expected, step
    assert 7 <= step < 99


def test_many_finished_shards():
    "What remains of 100,000 shards is known at once"
    n = 100_000
    part = OutputPart(Path("out.csv.part"))
    part.create("audio,prediction\n")
    part.log.write_text("".join(LoggedShard(i, 20*i, 20*i + 20, "0"*16, 256, [], []).format() for i in range(n)))
    progress = LoggedProgress(SimpleNamespace(parts=lambda: [part]))
    assert progress.update() == 256*n
    start = time.process_time()
    for i in range(n, n + 10):
        with open(part.log, "a") as f: f.write(LoggedShard(i, 20*i, 20*i + 20, "0"*16, 256, [], []).format())
        assert progress.update() == 256*(i + 1)
    assert time.process_time() - start < 1


def test_interrupted_while_a_server_is_slow():
    "Ctrl-C does not wait for threads that read clips"
    code = """
import os, signal, sys, time
from mdl_nbdev.base.processes import DaemonPool
signal.signal(signal.SIGINT, signal.default_int_handler) # a shell's background jobs ignore it
def read(i):
    os.write(1, b'reading\\n') # in one piece, whatever the other thread writes
    time.sleep(60)
try:
    with DaemonPool(2) as pool: list(pool.map(read, range(9), ahead=4))
except KeyboardInterrupt: sys.exit(130)"""
    for _ in range(12): # a signal that comes just before the main thread waits is seen too
        p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert p.stdout.readline() == "reading\n"
        p.send_signal(signal.SIGINT)
        assert p.wait(timeout=50) == 130


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
    p = subprocess.run([*launchers[launcher], bin/command[0], *command[1:], *map(str, args)], env=env, capture_output=True, text=True, timeout=300)
    assert p.returncode == code, p.stderr
    return p.stdout, p.stderr


@pytest.mark.parametrize("launcher", ["torchrun", *(pytest.param(a, marks=pytest.mark.slow) for a in ("accelerate", "accelerate on the CPU"))])
def test_launchers(launcher, whole):
    "The output of two processes is that of one, and one of them prints; on a CPU accelerate starts only one unless configured otherwise"
    tiny_model().save_pretrained("model")
    load_processor("tiny").save_pretrained("model")
    out, err = launch(launcher, whole/"sounds.csv", "--base-dir", whole, "--output", "out.csv", "--model-name", "model", code=1)
    assert Path("out.csv").read_bytes() == (whole/"whole.csv").read_bytes()
    rejects = [[row[:-1] for row in table(path)] for path in ("out.csv.rejects.csv", whole/"whole.csv.rejects.csv")]
    assert rejects[0] == rejects[1], "but for the model, whose weights lie in another folder"
    assert leftovers("out.csv") == ["out.csv.rejects.csv"]
    assert out.count("70 rows in out.csv") == out.count("8 rows without an answer") == 1
    assert len(re.findall(r"answering:.*70/70", err)) >= 1 and "8 without an answer" in err


def by_hand(*args, prepare=None):
    "Two processes of one run, started by nobody who would end one when the other dies; each with what it printed and its exit code"
    runs = [start([*command[1:], *args], f"log{env['RANK']}", "mdl_infer", env=env, prepare=prepare) for env in ranks(2)]
    for run in runs: run.join(300)
    return [(Path(f"log{i}").read_text(), run.exitcode) for i, run in enumerate(runs)]


def test_bad_input_in_two_processes():
    "Reported once"
    make_sounds(".", 3)
    (first, code), (second, other) = by_hand("sounds.csv", "--output", "out.csv", "--model-name", "tiny", "--adapter", "nowhere")
    assert first.count("mdl_infer: ") == 1 and "no LoRA adapter here" in first and second == "" and code == other == 2
    assert not list(Path().glob("out*"))


def dies_after_a_shard():
    "The second process is killed when it has written its first shard"
    claims.SILENT = 2
    if os.environ["RANK"] != "1": return
    write = InferOutput.write
    def once(*args):
        write(*args)
        os.kill(os.getpid(), 9)
    InferOutput.write = once


def test_a_lost_process_keeps_nobody_up(whole):
    "Without a launcher that would end the other, which takes over what the lost one had claimed"
    args = [whole/"sounds.csv", "--base-dir", whole, "--output", "out.csv", "--model-name", "tiny"]
    (printed, code), (_, other) = by_hand(*args, prepare=dies_after_a_shard)
    assert (code, other) == (2, -9)
    assert "70 rows in out.csv" in printed and "8 rows without an answer" in printed
    assert Path("out.csv").read_bytes() == (whole/"whole.csv").read_bytes()
    assert leftovers("out.csv") == ["out.csv.rejects.csv"]
