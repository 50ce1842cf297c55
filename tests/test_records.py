"Every form a record may take and every way it may be broken; Parquet; the files of tasks; the check of all of them"
import bz2
import csv
import gzip
import json
import lzma
import os
import pickle
import re
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.settings import CheckSettings, ConvertSettings, InferSettings
from mdl_nbdev.data.audio import load_audio, to_int16
from mdl_nbdev.data.check import check
from mdl_nbdev.data.jsonl import JsonlFile
from mdl_nbdev.data.parquet import ParquetFile
from mdl_nbdev.data.rows import to_conversation
from mdl_nbdev.data.sounds import make_sounds
from mdl_nbdev.data.sources import find_tasks, note_misnamed, open_rows
from mdl_nbdev.data.tables import CsvFile, format_row
from mdl_nbdev.infer.run import infer
from mdl_nbdev.model.families import load_chat
from mdl_nbdev.train.convert import convert
from mdl_nbdev.train.dataset import AudioDataset, open_dataset


def write(folder, data, name="r.jsonl"):
    path = folder/name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def jsonl(folder, *records, name="r.jsonl"): return write(folder, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), name)


def told(conversation):
    "Messages in short: role, then texts as they are and clips in a tuple"
    return [(m["role"], *(p["text"] if p["type"] == "text" else (p["audio"],) for p in m["content"])) for m in conversation.messages]


def rounds(*said, key="chat_rounds", **kwargs): return {key: [{"role": r, "content": c} for r, c in said], **kwargs}


# Forms

H, B = ("human", "Q"), ("bot", "A")
QA = [("user", "Q"), ("assistant", "A")]
forms = {
    "rounds": (rounds(H, B), QA),
    "round ids": ({"chat_rounds": [{"role": "human", "content": "Q", "chat_round_id": 1}, {"role": "bot", "content": "A", "chat_round_id": 1}]}, QA),
    "system": (rounds(("system", "S"), H, B), [("system", "S"), *QA]),
    "turns": (rounds(("system", "S"), H, B, ("human", "Q2"), ("bot", "A2")), [("system", "S"), *QA, ("user", "Q2"), ("assistant", "A2")]),
    "role names": (rounds(("user", "Q"), ("gpt", "A"), ("human", "Q2"), ("assistant", "A2")), [*QA, ("user", "Q2"), ("assistant", "A2")]),
    "messages": (rounds(("user", "Q"), ("assistant", "A"), key="messages"), QA),
    "parts": (rounds(("user", [{"type": "text", "text": "Q"}]), ("assistant", [{"type": "text", "text": "A"}]), key="messages"), QA),
    "parts in order": (rounds(("user", [{"type": "text", "text": "this "}, {"type": "audio", "audio": "a.wav"}, {"type": "text", "text": " or "}, {"type": "audio", "url": "http://x/b.wav"}]), B),
                       [("user", "this ", ("a.wav",), " or ", ("http://x/b.wav",)), ("assistant", "A")]),
    "split texts": (rounds(("user", [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]), ("bot", [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}])), [("user", "one two"), ("assistant", "AB")]),
    "part by path": (rounds(("user", [{"type": "audio", "path": "a.wav"}]), B), [("user", ("a.wav",)), ("assistant", "A")]),
    "empty system": (rounds(("system", ""), H, B), QA),
    "system beside rounds": (rounds(H, B, system="S"), [("system", "S"), *QA]),
    "system twice the same": (rounds(("system", "S"), H, B, system="S"), [("system", "S"), *QA]),
    **{f"{q}/{a}": ({q: "Q", a: "A"}, QA) for q, a in [("prompt", "answer"), ("prompt", "response"), ("input", "output"), ("instruction", "output"),
        ("instruction", "response"), ("question", "response"), ("question", "answer"), ("query", "answer")]},
    "pair and system": ({"system": "S", "query": "Q", "answer": "A"}, [("system", "S"), *QA]),
    "columns": ({"audio": "a.wav", "system_prompt": "S", "user_prompt": "Q", "prediction": "A"}, [("system", "S"), ("user", ("a.wav",), "Q"), ("assistant", "A")]),
    "instruction and input": ({"instruction": "Q", "input": "x", "output": "A"}, [("user", "Q\nx"), ("assistant", "A")]),
    "instruction with an empty input": ({"instruction": "Q", "input": "", "output": "A"}, QA),
    "null is nothing": ({"prompt": "Q", "answer": "A", "response": None, "system": None, "audio": None, "data_name": None, "chat_rounds": None}, QA),
    "other keys": ({"id": [1, {"x": None}], "prompt": "Q", "score": 0.5, "answer": "A"}, QA),
    "a question beside rounds": (rounds(H, B, question="another"), QA),
    "text": ({"text": " To be, or not \n"}, [("text", " To be, or not \n")]),
    "text and empty others": ({"text": "x", "prompt": "", "answer": "", "messages": []}, [("text", "x")]),
    "audio": ({"audio": "a.wav", "prompt": "Q", "answer": "A"}, [("user", ("a.wav",), "Q"), ("assistant", "A")]),
    "several clips": ({"audio": ["a.wav", "b.wav"], "prompt": "Q", "answer": "A"}, [("user", ("a.wav",), ("b.wav",), "Q"), ("assistant", "A")]),
    "no clips": ({"audio": [], "prompt": "Q", "answer": "A"}, QA),
    "audio and an answer": ({"audio": "a.wav", "answer": "A"}, [("user", ("a.wav",)), ("assistant", "A")]),
    "audio and a prediction": ({"audio": "a.wav", "prediction": "A"}, [("user", ("a.wav",)), ("assistant", "A")]),
    "audio, an empty question and an answer": ({"audio": "a.wav", "question": "", "answer": "A"}, [("user", ("a.wav",)), ("assistant", "A")]),
    "audio of the first turn": (rounds(("system", "S"), H, B, ("human", "Q2"), ("bot", "A2"), audio="a.wav"), [("system", "S"), ("user", ("a.wav",), "Q"), ("assistant", "A"), ("user", "Q2"), ("assistant", "A2")]),
    "audio of rounds": ({"chat_rounds": [{"role": "human", "audio": ["a.wav", "b.wav"], "content": "Q"}, {"role": "bot", "content": "A"}, {"role": "human", "audio": "c.wav"}, {"role": "bot", "content": "A2"}], "audio": "r.wav"},
                        [("user", ("r.wav",), ("a.wav",), ("b.wav",), "Q"), ("assistant", "A"), ("user", ("c.wav",)), ("assistant", "A2")]),
    "question and prediction": ({"prompt": "Q", "prediction": "A"}, QA),
    "rounds and prediction": (rounds(H, prediction="A"), QA),
    "an empty answer and a prediction": (rounds(H, ("bot", ""), prediction="A"), QA),
    "the same answer twice": ({"prompt": "Q", "answer": "A", "prediction": "A"}, QA),
    "an answer and an empty prediction": ({"prompt": "Q", "answer": "A", "prediction": ""}, QA),
    "control tokens": (rounds(("human", "<|im_end|>\u2028\x85"), ("bot", "<|role_start|>bot<|role_end|>👋🏽")), [("user", "<|im_end|>\u2028\x85"), ("assistant", "<|role_start|>bot<|role_end|>👋🏽")]),
    "blanks are kept": ({"prompt": " Q\n", "answer": " A\t"}, [("user", " Q\n"), ("assistant", " A\t")]),
}


@pytest.mark.parametrize("name", forms)
def test_forms(tmp_path, name):
    raw, expected = forms[name]
    record, = open_rows(jsonl(tmp_path, raw)).rows()
    before = json.dumps(record.raw)
    assert told(to_conversation(record)) == expected
    asked = expected[:-1] if expected[-1][0] == "assistant" else expected
    if asked[-1][0] != "text": assert told(to_conversation(record, with_prediction=False)) == asked
    assert (record.raw, json.dumps(record.raw), record.line) == (raw, before, 1)
    assert record.audio == next((p[0] for m in expected for p in m[1:] if isinstance(p, tuple)), None)


def test_record(tmp_path):
    path = jsonl(tmp_path, rounds(H, B, data_name="bells"), {"prompt": "Q"}, {"text": "T"}, {"prompt": "Q", "answer": "A", "prediction": "P"}, {"prompt": "Q", "answer": "A", "prediction": ""})
    records = list(open_rows(path))
    assert [(r.task, r.prediction, r.where) for r in records] == [("bells", "A", f"{path}:1"), (None, None, f"{path}:2"), (None, None, f"{path}:3"), (None, "P", f"{path}:4"), (None, "", f"{path}:5")]
    assert to_conversation(records[0]).task == "bells"
    assert pickle.loads(pickle.dumps(records)) == records


conversations = st.tuples(st.none() | st.text(min_size=1).filter(str.strip), st.lists(st.text().filter(str.strip), min_size=2, max_size=6).filter(lambda t: len(t) % 2 == 0))
each = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@settings(max_examples=150, **each)
@given(st.lists(conversations, min_size=1, max_size=4), st.data())
def test_all_forms_of_a_conversation_are_read_alike(tmp_path, convs, data):
    pick = lambda *options: data.draw(st.sampled_from(options))
    def content(text):
        cut = data.draw(st.integers(0, len(text)))
        return pick(text, [{"type": "text", "text": text}], [{"type": "text", "text": text[:cut]}, {"type": "text", "text": text[cut:]}])
    def written(system, turns):
        said = [(pick("human", "user"), content(t)) if i % 2 == 0 else (pick("bot", "assistant", "gpt"), content(t)) for i, t in enumerate(turns)]
        if len(turns) == 2 and pick(True, False):
            q, a = pick(("prompt", "answer"), ("instruction", "output"), ("query", "answer"))
            return {q: turns[0], a: turns[1], **({"system": system} if system else {})}
        if system and pick(True, False): return rounds(*said, key=pick("chat_rounds", "messages"), system=system)
        return rounds(*([("system", content(system))] if system else []), *said, key=pick("chat_rounds", "messages"))
    raws = [written(*c) for c in convs]
    ascii = pick(True, False)
    path = write(tmp_path, pick("\ufeff", "") + pick("\n", "\r\n", "\n \n").join(json.dumps(r, ensure_ascii=ascii) for r in raws) + pick("", "\n"))
    expected = [[("system", s)] * bool(s) + [("assistant" if i % 2 else "user", t) for i, t in enumerate(turns)] for s, turns in convs]
    records = list(open_rows(path))
    assert [told(to_conversation(r)) for r in records] == expected
    assert [r.raw for r in records] == raws
    at = path.read_text("utf-8-sig").split("\n")
    assert all(json.loads(at[r.line-1]) == r.raw for r in records)


values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(), lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3), max_leaves=5)


@settings(max_examples=150, **each)
@given(st.dictionaries(st.sampled_from(["id", "é", "", "x y", "\u2028", "meta"]), values), st.text(), st.booleans())
def test_what_inference_writes_is_read_back(tmp_path, other, answer, first):
    raw = {"prediction": "old"} | other | {"prompt": "Q"} if first else other | {"prompt": "Q"}
    f = open_rows(jsonl(tmp_path, raw))
    line = f.header() + f.format(next(f.rows()), answer)
    assert line.endswith("\n") and line.count("\n") == 1
    back, = open_rows(write(tmp_path, line, "out.jsonl.part"))
    assert list(back.raw.items()) == list({**raw, "prediction": answer}.items())
    assert back.prediction == answer
    assert f.format(back, answer) == line


# What is wrong with a line

bad_records = {
    "no object": ([1], "this line is a list; a record is one JSON object on one line"),
    "text alone": ("x", "this line is text; a record"),
    "null": (None, "this line is null; a record"),
    "empty object": ({}, r"no conversation in the keys \(none\)"),
    "no form": ({"Prompt": "Q", "completion": "A"}, "no conversation in the keys Prompt, completion; it needs chat_rounds, messages, text"),
    "an answer alone": ({"answer": "A"}, "no conversation in the keys answer"),
    "two pairs": ({"prompt": "Q", "question": "Q", "answer": "A"}, "more than one conversation: prompt/answer, question/answer; keep one"),
    "two answers": ({"prompt": "Q", "response": "A", "answer": "A"}, "more than one conversation: prompt/answer, prompt/response"),
    "rounds and a pair": (rounds(H, B, prompt="Q", answer="A"), "more than one conversation: chat_rounds, prompt/answer"),
    "rounds and messages": ({**rounds(H, B), **rounds(H, B, key="messages")}, "more than one conversation: chat_rounds, messages"),
    "text and a pair": ({"text": "T", "prompt": "Q", "answer": "A"}, "more than one conversation: text, prompt/answer"),
    "text and a question": ({"text": "T", "prompt": "Q"}, "more than one conversation: text, prompt"),
    "two questions": ({"prompt": "Q", "query": "Q"}, "more than one conversation: prompt, query"),
    "rounds that are text": ({"chat_rounds": "x"}, "chat_rounds is text; it must be a list"),
    "messages that are an object": ({"messages": {"role": "user"}}, "messages is an object; it must be a list"),
    "no rounds": (rounds(), "there is no user message"),
    "system alone": (rounds(("system", "S")), "there is no user message"),
    "audio and no rounds": (rounds(audio="a.wav"), "there is no user message"),
    "a round that is text": ({"messages": ["Q", "A"]}, "message 1 is text; a message is an object"),
    "no role": ({"messages": [{"content": "Q"}]}, "message 1 has the role null; the roles are system, human, user, bot, assistant, gpt"),
    "another role": (rounds(H, ("tool", "x")), 'message 2 has the role "tool"'),
    "a role that is a list": (rounds((["human"], "Q")), r'message 1 has the role \["human"\]'),
    "system in the middle": (rounds(H, ("system", "S"), B), "message 2 is a system message; it must come first"),
    "two systems": (rounds(("system", "S"), ("system", "S"), H, B), "message 2 is a system message; it must come first"),
    "bot first": (rounds(B, H), "message 1 is from the assistant and should be from the user"),
    "bot behind system": (rounds(("system", "S"), B), "message 2 is from the assistant and should be from the user"),
    "two humans": (rounds(("system", "S"), H, H, B), "message 3 is from the user and should be from the assistant"),
    "two bots": (rounds(H, B, B), "message 3 is from the assistant and should be from the user"),
    "an empty question": (rounds(("human", " "), B), "message 1 is empty; write what the user says"),
    "an empty prompt": ({"prompt": "", "answer": "A"}, "message 1 is empty"),
    "null asks nothing": ({"prompt": None}, "message 1 is empty"),
    "no content": ({"messages": [{"role": "user"}]}, "message 1 is empty"),
    "an empty answer in the middle": (rounds(H, ("bot", "\n"), H, B), "message 2 is empty; write what the assistant says"),
    "a number for an answer": ({"prompt": "Q", "answer": 5}, "answer is a number; it must be text, in quotes"),
    "a list for a prompt": ({"prompt": ["Q"], "answer": "A"}, "prompt is a list; it must be text"),
    "true for a content": (rounds(("human", True), B), "the content of message 1 is true or false; it must be text"),
    "a number for a content": (rounds(H, ("bot", 1.5)), "the content of message 2 is a number"),
    "an object for a content": (rounds(("human", {"text": "Q"}), B), "the content of message 1 is an object"),
    "a number for text": ({"text": 1}, "text is a number"),
    "empty text": ({"text": " \n"}, "text is empty"),
    "a number for system": ({"system": 1, "prompt": "Q", "answer": "A"}, "system is a number"),
    "two different systems": (rounds(("system", "S"), H, B, system="T"), "system differs from the system message"),
    "a number for data_name": ({"data_name": 3, "prompt": "Q", "answer": "A"}, "data_name is a number"),
    "a number for prediction": ({"prompt": "Q", "prediction": 3}, "prediction is a number"),
    "a number for audio": ({"audio": 3, "prompt": "Q"}, "audio has a number where a clip should be"),
    "empty audio": ({"audio": "", "prompt": "Q"}, "audio has an empty text where a clip should be"),
    "sound in a record": ({"audio": {"path": None, "bytes": "UklGRg"}, "prompt": "Q"}, "audio has an object where a clip should be, with the keys path, bytes; give its path"),
    "clips under two keys": ({"audio": "a.wav", "audios": ["b.wav"], "prompt": "Q"}, "clips in audio and audios; keep one"),
    "more marks than clips": (rounds(("user", "<audio><audio>Q"), B, key="messages", audios=["a.wav"]), "2 <audio> marks in the text and 1 clip; give a mark for each"),
    "a mark without a clip": (rounds(("user", "<audio>Q"), B, key="messages"), "1 <audio> mark in the text and 0 clips"),
    "a mark beside a clip": (rounds(("user", [{"type": "audio", "path": "a.wav"}, {"type": "text", "text": "<audio>Q"}]), B), "an <audio> mark in the text has no clip"),
    "a picture": ({"messages": rounds(H, B)["chat_rounds"], "images": ["a.png"]}, "images cannot be read, only texts and clips"),
    "a transcript and an answer": ({"audio_filepath": "a.wav", "text": "T", "answer": "A"}, "audio_filepath with text and another answer"),
    "a history that is text": ({"history": "x", "instruction": "Q", "output": "A"}, "history must be a list of turns"),
    "null in a list of clips": ({"audio": ["a.wav", None], "prompt": "Q"}, "audio has null where a clip should be"),
    "audio of text": ({"audio": "a.wav", "text": "T"}, "text cannot have audio; .*as prediction"),
    "audio of a bot": ({"messages": [{"role": "user", "content": "Q"}, {"role": "bot", "audio": "a.wav", "content": "A"}]}, "message 2 has the role bot and audio; only user messages can have clips"),
    "audio of a system": (rounds(("system", [{"type": "audio", "audio": "a.wav"}]), H), "message 1 has the role system and audio"),
    "a number for a round's audio": ({"messages": [{"role": "user", "audio": [1], "content": "Q"}]}, "message 1 has a number where a clip should be"),
    "a part that is text": (rounds(("human", ["Q"]), B), "message 1 has text among its parts"),
    "an image": (rounds(("human", [{"type": "image_url"}]), B), 'message 1 has a part of type "image_url"; only text and audio are supported'),
    "a part without type": (rounds(("human", [{"text": "Q"}]), B), "message 1 has a part of type null"),
    "a part with a number": (rounds(("human", [{"type": "text", "text": 1}]), B), "the text of a part of message 1 is a number"),
    "an audio part without a clip": (rounds(("human", [{"type": "audio"}]), B), "message 1 has an audio part without exactly one clip"),
    "an audio part with two": (rounds(("human", [{"type": "audio", "path": "a", "url": "b"}]), B), "without exactly one clip"),
    "an audio part with a list": (rounds(("human", [{"type": "audio", "audio": ["a", "b"]}]), B), "without exactly one clip"),
}
bad_lines = {
    "cut": (b'{"prompt": "Q", "ans', "not valid JSON: .* at column 17; a record is one JSON object on one line"),
    "single quotes": (b"{'prompt': 'Q'}", "not valid JSON: .* at column 2"),
    "two on a line": (b'{"prompt": "Q"} {"prompt": "Q"}', "not valid JSON: Extra data at column 17"),
    "words": (b"prompt,answer", "not valid JSON"),
    "latin-1": (b'{"prompt": "caf\xe9"}', "byte 0xe9 in column 16 of line 2 is not UTF-8"),
    "NUL": (b'{"prompt": "\0"}', "NUL character in column 13 of line 2"),
    "a key twice": (b'{"prompt": "Q", "prompt": "R"}', "the key 'prompt' occurs twice"),
    "a key twice further in": (b'{"messages": [{"role": "user", "role": "bot"}]}', "the key 'role' occurs twice"),
    "half a pair": (rb'{"prompt": "\ud83d"}', "half of a surrogate pair"),
    "half a pair in a key": (rb'{"prompt": "Q", "\udc00": 1}', "half of a surrogate pair"),
    "too deep": (b"[" * 100_000, "not readable as JSON: .*recursion"),
    "a long number": (b'{"prompt": "Q", "n": ' + b"1" * 5000 + b"}", "not readable as JSON: .*digits"),
    "a raw control character": (b'{"prompt": "a\tb"}', "not valid JSON: Invalid control character"),
}
all_bad = {**{k: (json.dumps(r).encode(), e) for k, (r, e) in bad_records.items()}, **bad_lines}


@pytest.mark.parametrize("name", all_bad)
def test_bad_lines(tmp_path, name):
    data, expected = all_bad[name]
    path = write(tmp_path, b'{"prompt": "Q"}\n' + data + b'\n{"prompt": "R"}\n')
    rows = open_rows(path).rows()
    assert next(rows).line == 1
    with pytest.raises(InputError) as e: next(rows)
    assert re.match(f"{path}:2: .*{expected}", str(e.value)) and "\n" not in str(e.value) and len(str(e.value)) < 500
    bad = []
    assert [r.raw["prompt"] for r in open_rows(path).rows(bad.append)] == ["Q", "R"], "the reading goes on"
    assert [(b.file, b.line) for b in bad] == [(str(path), 2)]


def marked(*marks): # An answer for each, between prompts
    return {"messages": [m for i, mark in enumerate(marks) for m in ({"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}", **mark})]}


@pytest.mark.parametrize("mark, learned", [({"weight": 0}, False), ({"weight": 1}, True), ({"train": False}, False), ({"loss": 0.0}, False), ({"loss": True}, True),
                                           ({"weight": None}, True), ({"weight": 0, "train": False}, False)], ids=str)
def test_answers_that_are_not_to_be_learned(tmp_path, mark, learned):
    "From the file to the labels, in files that are converted and in converted ones"
    path, chat = jsonl(tmp_path, marked(mark, {})), load_chat("tiny-text")
    record, = JsonlFile(path)
    assert [m.get("learn", True) for m in to_conversation(record).messages] == [True, learned, True, True]
    out = convert(ConvertSettings(input=path, output=tmp_path/"out", model_name="tiny-text", num_workers=1)).path
    e = open_dataset(out, chat, tmp_path)[0]
    assert chat.tok.decode(e.labels[e.labels >= 0]) == ("a0<|endoftext|>" if learned else "") + "a1<|endoftext|>"


@pytest.mark.parametrize("marks, message", {"half": ([{"weight": 0.5}], "weight of message 2 is 0.5; it must be 0 or 1"),
    "text": ([{"train": "no"}], 'train of message 2 is "no"; it must be 0 or 1'),
    "two": ([{"train": True, "weight": 0}], "weight and train of message 2 say different things; keep one"),
    "nothing": ([{"weight": 0}, {"train": False}], "no answer of this conversation is to be learned")}.values())
def test_marks_that_make_no_sense(tmp_path, marks, message):
    path = jsonl(tmp_path, marked(*marks))
    with pytest.raises(InputError, match=re.escape(message)): convert(ConvertSettings(input=path, output=tmp_path/"out", model_name="tiny-text", num_workers=1))


def test_keys_of_messages_that_are_not_used_are_named(tmp_path, capsys):
    path = jsonl(tmp_path, marked({"tool_calls": [], "reasoning_content": "hm"}), marked({"tool_calls": []}), marked({"name": None}))
    named = "not used: messages.tool_calls (2 rows), messages.reasoning_content (1 row)"
    assert named in str(check(CheckSettings(input=path)))
    convert(ConvertSettings(input=path, output=tmp_path/"out", model_name="tiny-text", num_workers=1))
    assert f"{path}: {named}" in capsys.readouterr().err


def test_all_bad_lines_in_one_error(tmp_path):
    good = b'{"prompt": "Q"}\r\n'
    path = write(tmp_path, b"\xef\xbb\xbf" + good + b"\n".join([data + b"\n" + b" \n" + good[:-2] for data, _ in all_bad.values()]))
    with pytest.raises(InputError) as e: open_rows(path).count()
    lines = str(e.value).splitlines()
    assert lines[0] == f"{len(all_bad)} bad rows:" and lines[1].startswith(f"{path}:2: ") and lines[2].startswith(f"{path}:5: ") and lines[-1].startswith(f"... and {len(all_bad)-20} more")
    report = check(CheckSettings(input=path, predictions=False, num_workers=1))
    assert [b.line for b in report.bad] == [2 + 3*i for i in range(len(all_bad))] and report.rows == 2*len(all_bad) + 1
    for b, (name, (_, expected)) in zip(report.bad, all_bad.items()): assert re.match(f".*{expected.replace('of line 2', 'of line [0-9]+')}", b.reason), name
    assert all(str(b) in str(report) for b in report.bad)
    report._repr_html_()


file_errors = {
    "empty": (b"", "r.jsonl: the file is empty; it needs records, one JSON object on a line"),
    "blank lines": (b"\n  \r\n", "r.jsonl: the file is empty"),
    "UTF-16": ('{"prompt": "Q"}\n'.encode("utf-16"), "r.jsonl:1: byte 0xff in column 1 of line 1 is not UTF-8.*iconv -f UTF-16"),
    "a list of records": (b'[{"prompt": "Q"},\n{"prompt": "R"}]\n', "r.jsonl:1: not valid JSON"),
    "a CSV": (b"audio,prediction\na.wav,x\n", "r.jsonl:1: not valid JSON"),
}


@pytest.mark.parametrize("name", file_errors)
def test_file_errors(tmp_path, name):
    data, expected = file_errors[name]
    with pytest.raises(InputError, match=expected): list(open_rows(write(tmp_path, data)))


def test_reading_does_not_hold_the_file(tmp_path):
    one = json.dumps({"prompt": "Q" * 1000, "answer": "A", "x": [1] * 100})
    paths = [write(tmp_path, (one + "\n") * 10_000), tmp_path/"r.parquet"]
    with pq.ParquetWriter(paths[1], pa.schema([("audio", pa.string()), ("prediction", pa.string())])) as w:
        for i in range(20): w.write_table(pa.table({"audio": [f"{i}-{j}" + "Q" * 1000 for j in range(1000)], "prediction": ["A"] * 1000}))
    for path, n in zip(paths, [10_000, 20_000]):
        f = open_rows(path)
        tracemalloc.start()
        assert f.count() == n
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 5e6
        assert sum(1 for _ in f) == sum(1 for _ in f) == n, "a file can be read again"


# What is asked, and what is trained on

faults = {
    "a question": ({"prompt": "Q"}, ["the last message is from the user"], []),
    "an empty answer": (rounds(H, ("bot", " ")), ["the last answer is empty"], []),
    "a null answer": ({"prompt": "Q", "answer": None}, ["the last answer is empty"], []),
    "an empty prediction": ({"prompt": "Q", "prediction": ""}, ["the last message is from the user"], []),
    "two answers": ({"prompt": "Q", "answer": "A", "prediction": "P"}, ["the last message and prediction give two answers, 'A' and 'P'"], []),
    "text": ({"text": "T"}, [], ["a text has no prompt"]),
    "a conversation": (rounds(H, B, H, B), [], []),
}


@pytest.mark.parametrize("name", faults)
def test_faults(tmp_path, name):
    raw, training, asking = faults[name]
    record, = open_rows(jsonl(tmp_path, raw))
    for expected, with_prediction in [(training, True), (asking, False)]:
        found = record.faults(None, with_prediction)
        assert len(found) == len(expected) and all(f.startswith(e) for f, e in zip(found, expected))
        if not found: to_conversation(record, with_prediction=with_prediction)
        else:
            with pytest.raises(InputError, match=f"r.jsonl:1: {expected[0]}"): to_conversation(record, with_prediction=with_prediction)


def test_prompts_and_places(tmp_path):
    path = jsonl(tmp_path, {"audio": ["a.wav", "https://x/b.wav"], "answer": "A"}, rounds(("system", "own"), ("human", [{"type": "audio", "path": "/c.wav"}]), B, H),
                 {"prompt": "Q", "audio": "~/d.wav", "answer": "A"}, {"text": "T"})
    convs = [to_conversation(r, "S", "U", tmp_path/"clips", with_prediction=i != 1) for i, r in enumerate(open_rows(path))]
    assert list(map(told, convs)) == [
        [("system", "S"), ("user", (str(tmp_path/"clips/a.wav"),), ("https://x/b.wav",), "U"), ("assistant", "A")],
        [("system", "own"), ("user", ("/c.wav",), "U"), ("assistant", "A"), ("user", "Q")],
        [("system", "S"), ("user", (str(Path("~/d.wav").expanduser()),), "Q"), ("assistant", "A")],
        [("text", "T")]]
    assert [c.clips for c in convs][:2] == [[str(tmp_path/"clips/a.wav"), "https://x/b.wav"], ["/c.wav"]]
    assert [c.where for c in convs] == [f"{path}:{i}" for i in range(1, 5)]


def test_text_tables(tmp_path):
    table = "id,user_prompt,prediction\n1,1 + 1 = ?,2\n2,,4\n"
    pq.write_table(pa.table({"id": [1, 2], "user_prompt": ["1 + 1 = ?", None], "prediction": ["2", "4"]}), tmp_path/"t.parquet")
    for path in [write(tmp_path, table, "t.csv"), write(tmp_path, table.replace(",", "\t"), "t.tsv"), tmp_path/"t.parquet"]:
        a, b = open_rows(path)
        assert told(to_conversation(a, "S")) == [("system", "S"), ("user", "1 + 1 = ?"), ("assistant", "2")]
        assert told(to_conversation(b, user_prompt="U", with_prediction=False)) == [("user", "U")]
        with pytest.raises(InputError, match="the user prompt is empty or null, and there is no audio"): to_conversation(b)
    for header in ["Audio", " audio", "audios", "audio_path"]:
        with pytest.raises(InputError, match="no column audio.*rename .* to 'audio'"): open_rows(write(tmp_path, f"{header},user_prompt,prediction\na,b,c\n", "t.csv"))
    row, = open_rows(write(tmp_path, "audio,user_prompt,prediction\n,Q,A\n", "t.csv"))
    with pytest.raises(InputError, match="the audio cell is empty"): to_conversation(row)


lost_clips = {"path.csv": "path,user_prompt,prediction\na.wav,Q,A\n", "wav.tsv": "user_prompt\tprediction\twav\nQ\tA\thttps://x/a.MP3\n",
    "file_name.csv": "file_name,user_prompt,prediction\nmy clip 1.wma,Q,A\n", "clip.jsonl": '{"clip": {"path": "a.wav"}, "prompt": "Q", "answer": "hello"}\n', "sound.jsonl": '{"prompt": "Q", "answer": "A", "sound": ["https://x/a.flac?key=1"]}\n'}


@pytest.mark.parametrize("name", lost_clips)
def test_clips_under_another_name_are_not_lost(tmp_path, name):
    with pytest.raises(InputError, match=f":[12]: the (column|key) {name.split('.')[0]} names a clip.*rename it to audio"):
        list(open_rows(write(tmp_path, lost_clips[name], name)))


def test_a_clip_of_a_parquet_table_is_not_lost(tmp_path):
    pq.write_table(pa.table({"wav": ["a.wav", "none"], "user_prompt": ["Q", "Q"], "prediction": ["A", "A"]}), tmp_path/"t.parquet")
    bad = []
    assert [r.line for r in open_rows(tmp_path/"t.parquet").rows(bad.append)] == [2] and "wav names a clip" in bad[0].reason


def test_an_answer_under_another_name(tmp_path):
    record, = open_rows(jsonl(tmp_path, {"audio": "a.wav", "sentence": "hello"}))
    assert record.faults() == ["the last message is from the user, and there is no prediction; sentence looks like it ('hello'): rename it to prediction"]


# What other tools write, as they mean it: the messages that a model sees

CLIP, SAID = ("user", ("a.wav",)), ("assistant", "A")
other_tools = {
    "NeMo": ({"audio_filepath": "a.wav", "duration": 2.5, "text": "A"}, [("user", ("a.wav#t=0,2.5",)), SAID]),
    "NeMo, a part": ({"audio_filepath": "a.wav", "offset": 1.5, "duration": 2, "text": "A", "lang": "en"}, [("user", ("a.wav#t=1.5,3.5",)), SAID]),
    "NeMo, a question": ({"audio_filepath": "a.wav", "question": "Q", "answer": "A"}, [("user", ("a.wav",), "Q"), SAID]),
    "NeMo, a question and a transcript": ({"audio_filepath": "a.wav", "question": "Q", "text": "A"}, [("user", ("a.wav",), "Q"), SAID]),
    "ms-swift": ({"messages": [{"role": "user", "content": "<audio>Q"}, {"role": "assistant", "content": "A"}], "audios": ["a.wav"]}, [("user", ("a.wav",), "Q"), SAID]),
    "ms-swift, two clips": ({"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "<audio> or <audio>?"}, {"role": "assistant", "content": "A"}], "audios": ["a.wav", "b.wav"]},
                            [("system", "S"), ("user", ("a.wav",), " or ", ("b.wav",), "?"), SAID]),
    "ms-swift, later turns": ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": "<audio>"}, {"role": "assistant", "content": "A"}], "audios": "a.wav"},
                              [("user", "Q"), ("assistant", "B"), CLIP, SAID]),
    "ms-swift, query": ({"query": "Q", "response": "A", "audios": ["a.wav"], "images": [], "history": [["Q0", "A0"]]}, [("user", ("a.wav",), "Q0"), ("assistant", "A0"), ("user", "Q"), SAID]),
    "LLaMA-Factory, ShareGPT": ({"conversations": [{"from": "human", "value": "<audio>Q"}, {"from": "gpt", "value": "A"}], "system": "S", "tools": "", "audios": ["a.wav"]}, [("system", "S"), ("user", ("a.wav",), "Q"), SAID]),
    "LLaMA-Factory, Alpaca": ({"instruction": "<audio>Q", "input": "x", "output": "A", "system": "", "history": [], "audios": ["a.wav"]}, [("user", ("a.wav",), "Q\nx"), SAID]),
    "datasets": ({"audio": {"path": "a.wav", "bytes": None}, "user_prompt": "Q", "prediction": "A"}, [("user", ("a.wav",), "Q"), SAID]),
    "Qwen": ({"messages": [{"role": "user", "content": [{"type": "audio", "audio_url": "a.wav"}, {"type": "text", "text": "Q"}]}, {"role": "assistant", "content": "A"}]}, [("user", ("a.wav",), "Q"), SAID]),
    "vLLM": ({"messages": [{"role": "user", "content": [{"type": "audio_url", "audio_url": {"url": "a.wav"}}]}, {"role": "assistant", "content": "A"}]}, [CLIP, SAID]),
    "HTML": ({"prompt": "<audio>no</audio>", "answer": "A"}, [("user", "<audio>no</audio>"), SAID])}


@pytest.mark.parametrize("name", other_tools)
def test_records_of_other_tools(tmp_path, name):
    raw, expected = other_tools[name]
    record, = open_rows(jsonl(tmp_path, raw))
    assert told(to_conversation(record)) == expected and record.raw == raw


def test_marks_in_a_table(tmp_path):
    one, two = open_rows(write(tmp_path, "audio,user_prompt,prediction\na.wav,Is <audio> loud?,A\na.wav,<audio><audio>,A\n", "t.csv"))
    assert told(to_conversation(one)) == [("user", "Is ", ("a.wav",), " loud?"), SAID]
    with pytest.raises(InputError, match="2 <audio> marks in the user prompt and 1 clip"): to_conversation(two)


# Kinds of files

def test_open_rows(tmp_path):
    pq.write_table(pa.table({"audio": ["a.wav"], "prediction": ["x"]}), tmp_path/"t.parquet")
    written = {"t.csv": "audio,prediction\na.wav,x\n", "t.tsv": "audio\tprediction\na.wav\tx\n", "t.jsonl": '{"audio": "a.wav", "prediction": "x"}\n', "t.parquet": (tmp_path/"t.parquet").read_bytes()}
    kinds = {"t.csv": (CsvFile, ".csv"), "t.tsv": (CsvFile, ".tsv"), "t.jsonl": (JsonlFile, ".jsonl"), "t.parquet": (ParquetFile, ".csv")}
    for name, data in written.items():
        for named in [name, name.upper(), f"{name}.part", f"{name}.PART"]:
            f = open_rows(write(tmp_path, data, named))
            assert (type(f), f.out_suffix, f.columns, f.count(), f.path) == (*kinds[name], ["audio", "prediction"], 1, tmp_path/named)
            assert told(to_conversation(next(iter(f)))) == [("user", ("a.wav",)), ("assistant", "x")]
    for name in ["t.txt", "t", "t.json.bak", ".part"]:
        with pytest.raises(InputError, match=r"must end in .csv, .tsv, .jsonl, .parquet"): open_rows(write(tmp_path, "x", name))
    for name in ["none.csv", "none.jsonl", "none.parquet", "none.txt"]:
        with pytest.raises(InputError, match=f"{name}: No such file or directory; the working directory is"): open_rows(tmp_path/name)
    for name in ["d.csv", "d.jsonl", "d.parquet", "d.txt"]:
        (tmp_path/name).mkdir()
        with pytest.raises(InputError, match=f"{name}: is a folder"): open_rows(tmp_path/name)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refused(*args): raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("mdl_nbdev.data.rows.open", refused, raising=False) # file modes mean nothing to root
    for name in ["t.csv", "t.jsonl", "t.parquet"]:
        with pytest.raises(InputError, match=f"{name}: Permission denied; the working directory is"): open_rows(write(tmp_path, "x", name))


cells = st.none() | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0") | st.sampled_from(',"\r\n\t;'), max_size=8)


@settings(max_examples=60, **each)
@given(st.lists(st.tuples(cells.filter(lambda c: c != "null"), cells, cells, st.integers(-10**12, 10**12)), min_size=1, max_size=30), st.integers(1, 10)) # null is no clip in a CSV
def test_parquet_is_read_like_a_csv(tmp_path, rows, group):
    names = ["audio", "x", "prediction", "id"]
    table = pa.table([pa.array(c, pa.int64() if n == "id" else pa.string()) for n, c in zip(names, zip(*rows))], names)
    pq.write_table(table, tmp_path/"t.parquet", row_group_size=group)
    text = [["" if v is None else str(v) for v in r] for r in rows]
    write(tmp_path, "".join(map(format_row, [names, *text])), "t.csv")
    f, other = open_rows(tmp_path/"t.parquet"), open_rows(tmp_path/"t.csv")
    short = lambda f: [(r.audio, r.prediction, r.cells) for r in f]
    assert f.columns == other.columns and short(f) == short(other)
    assert [r.line for r in f] == list(range(1, len(rows)+1))
    out = write(tmp_path, f.header() + "".join(f.format(r, "ok") for r in f), "out.csv")
    with open(out, newline="", encoding="utf-8") as g: assert list(csv.reader(g)) == [names, *([a, x, "ok", i] for a, x, _, i in text)]


def test_parquet_types(tmp_path):
    pd.DataFrame({"audio": pd.Categorical(["a.wav", "b.wav"]), "prediction": ["null", None], "f": [1.5, None], "b": [True, False], "l": [["é"], []],
                  "d": pd.to_datetime(["2020-01-02", None])}).to_parquet(tmp_path/"t.parquet")
    a, b = open_rows(tmp_path/"t.parquet")
    assert (a.audio, a.prediction, a.cells[:5]) == ("a.wav", "null", ("a.wav", "null", "1.5", "true", '["é"]'))
    assert (b.audio, b.prediction, b.cells[1], b.cells[3], b.cells[4]) == ("b.wav", None, "", "false", "[]")
    for column, values, message in [("audio", [[.5]], r"the column audio holds list<.*>; it must be text \(the path or URL of each clip\), or the bytes of each clip"),
                                    ("prediction", [b"x"], "the column prediction holds binary; it must be text"), ("prediction", [3], "the column prediction holds int64; it must be text")]:
        pq.write_table(pa.table({**{"audio": ["a.wav"], "prediction": ["x"]}, column: values}), tmp_path/"t.parquet")
        with pytest.raises(InputError, match=f"t.parquet: {message}"): open_rows(tmp_path/"t.parquet")
    pq.write_table(pa.table([["a"], ["b"], ["c"]], ["audio", "prediction", "audio"]), tmp_path/"t.parquet")
    with pytest.raises(InputError, match="more than one column is called 'audio'"): open_rows(tmp_path/"t.parquet")
    pq.write_table(pa.table({"Audio": ["a"], "prediction": ["b"]}), tmp_path/"t.parquet")
    with pytest.raises(InputError, match="t.parquet: no column audio.*rename 'Audio' to 'audio'"): open_rows(tmp_path/"t.parquet")
    pq.write_table(pa.table({"audio": pa.array([], pa.string()), "prediction": pa.array([], pa.string())}), tmp_path/"t.parquet")
    with pytest.raises(InputError, match="t.parquet: columns and no rows"): open_rows(tmp_path/"t.parquet").count()


@pytest.mark.parametrize("kind", ["binary", "large binary", "struct", "list"])
@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_clips_inside_a_table_of_texts(tmp_path, kind, suffix):
    "Under another name than audio they would be left out, and the texts trained alone; other binary columns do not matter"
    sf.write(tmp_path/f"a.{suffix}", .1*np.sin(np.arange(16000)/9), 16000)
    clip = (tmp_path/f"a.{suffix}").read_bytes()
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values, types = {"binary": ([None, clip], pa.binary()), "large binary": ([clip, clip], pa.large_binary()), "struct": ([dict(bytes=None, path="a"), dict(bytes=clip, path="a")], struct),
                     "list": ([[], [dict(bytes=clip, path="a")]], pa.list_(struct))}[kind]
    texts = dict(user_prompt=["a", "b"], prediction=["c", "d"], image=pa.array([b"\x89PNG", b"\xff\xd8\xff\xe0"]), empty=pa.array([None, None], pa.binary()))
    assert [r.prediction for r in open_rows(write_parquet(tmp_path, texts))] == ["c", "d"]
    with pytest.raises(InputError, match="t.parquet: the column recordings holds clips, and only audio is read; rename it to audio"):
        open_rows(write_parquet(tmp_path, texts | dict(recordings=pa.array(values, types))))


def write_parquet(folder, columns):
    pq.write_table(pa.table(columns), folder/"t.parquet")
    return folder/"t.parquet"


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.binary()), ("path", pa.string())])], ids=["binary", "large binary", "struct"])
def test_parquet_with_clips_inside(tmp_path, monkeypatch, capsys, kind):
    "As `datasets` writes its Audio and Image columns: the same samples as those of the files, in check, conversion and inference"
    monkeypatch.setenv("MDL_CACHE", str(tmp_path/"cache"))
    make_sounds(tmp_path, 5)
    paths = sorted((tmp_path/"sounds").glob("*.wav"))
    cells = [p.read_bytes() for p in paths]
    if pa.types.is_struct(kind): cells = [dict(bytes=data, path=p.name) for data, p in zip(cells, paths)][:4] + [dict(bytes=None, path=str(paths[4]))]
    image = [dict(bytes=b"PNG", path="a.png")] * 5
    pq.write_table(pa.table(dict(audio=pa.array(cells, kind), prediction=[p.stem for p in paths], image=image)), tmp_path/"t.parquet")
    report = check(CheckSettings(input=tmp_path/"t.parquet", num_workers=1))
    assert report.rows == 5 and not report.bad and "image (5 rows)" in str(report)
    convert(ConvertSettings(input=tmp_path/"t.parquet", output=tmp_path/"set", model_name="tiny", num_workers=1))
    made = AudioDataset(tmp_path/"set", load_chat("tiny").fingerprint)
    for i, p in enumerate(paths): np.testing.assert_array_equal(made[i].clips[0], to_int16(load_audio(p)))
    assert "t.parquet: ignored columns: image (binary data)" in capsys.readouterr().err
    infer(InferSettings(input=tmp_path/"t.parquet", output=tmp_path/"out.csv", model_name="tiny", max_new_tokens=2, num_workers=1))
    out = list(csv.DictReader(open(tmp_path/"out.csv")))
    assert list(out[0]) == ["audio", "prediction"] and [Path(row["audio"]).read_bytes() for row in out] == [p.read_bytes() for p in paths]
    n = len(list((tmp_path/"cache"/"cells").iterdir()))
    assert n == (4 if pa.types.is_struct(kind) else 5), "each clip once, and nothing half-written"


def test_broken_parquet(tmp_path):
    path = tmp_path/"t.parquet"
    pq.write_table(pa.table({"audio": [f"{i}.wav" * 9 for i in range(5000)], "prediction": ["x"] * 5000}), path, row_group_size=1000, compression="zstd", use_dictionary=False)
    data = path.read_bytes()
    for broken in [b"", b"PAR1", b"words", data[:-100], data[:len(data)//2]]:
        with pytest.raises(InputError, match="t.parquet: not readable as Parquet: .*write it again"): open_rows(write(tmp_path, broken, "t.parquet"))
    for at in [len(data)//3, len(data)//2]:
        f = open_rows(write(tmp_path, data[:at] + bytes(100) + data[at+100:], "t.parquet"))
        with pytest.raises(InputError, match="t.parquet: damaged after row [0-9,]+: .*write it again"): f.count()
    bad = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"audio": bad, "prediction": ["x"]}), path)
    with pytest.raises(InputError, match="t.parquet: damaged after row 0: .*utf-8"): open_rows(path).count()


# Tasks

trees = {
    "a file": (["a.csv"], ["a.csv"], [("a", "a", "a.csv")]),
    "files": (["a.csv", "b.tsv", "c.parquet", "d.jsonl"], ["d.jsonl", "a.csv", "b.tsv", "c.parquet"], [("d", "d", "d.jsonl"), ("a", "a", "a.csv"), ("b", "b", "b.tsv"), ("c", "c", "c.parquet")]),
    "a file that names tasks": (["a+name.jsonl"], ["a+name.jsonl"], [(None, "a+name", "a+name.jsonl")]),
    "a task": (["t/b.jsonl", "t/a.csv", "t/notes.txt", "t/clips/a.wav", "t/.hidden/x.csv"], ["t"], [("t", "t", "t/a.csv"), ("t", "t", "t/b.jsonl")]),
    "a task whose records name others": (["t/a+name.jsonl"], ["t"], [("t", "t", "t/a+name.jsonl")]),
    "tasks": (["d/two/a.CSV", "d/one/a.csv", "d/one/b.csv", "d/README.md", "d/.git/x.csv"], ["d"], [("one", "one", "d/one/a.csv"), ("one", "one", "d/one/b.csv"), ("two", "two", "d/two/a.CSV")]),
    "a dataset": (["s/state.json"], ["s"], [(None, "s", "s")]),
    "a dataset with a dot": (["s.v1.2/state.json"], ["s.v1.2"], [(None, "s.v1.2", "s.v1.2")]),
    "datasets and tables": (["d/s/state.json", "d/t/a.csv"], ["d"], [("s", "s", "d/s"), ("t", "t", "d/t/a.csv")]),
    "a folder with a dot": (["d.x/a.csv"], ["d.x"], [("d.x", "d.x", "d.x/a.csv")]),
    "folders and files": (["d/t/a.csv", "b.csv"], ["b.csv", "d"], [("b", "b", "b.csv"), ("t", "t", "d/t/a.csv")]),
    "a missing file": ([], ["none.csv"], [("none", "none", "none.csv")]),
}


def plant(folder, names):
    for name in names:
        record = {"prompt": "Q", "answer": "A"} | ({"data_name": "x"} if "+name" in name else {})
        write(folder, json.dumps(record if name.endswith("jsonl") else {}) + "\n", name)


@pytest.mark.parametrize("name", trees)
def test_tasks(tmp_path, name):
    files, paths, expected = trees[name]
    plant(tmp_path, files)
    assert [(s.task, s.name, s.path.relative_to(tmp_path).as_posix()) for s in find_tasks([tmp_path/p for p in paths])] == expected


def test_clips_in_folders_below_a_task_and_links_in_a_circle(tmp_path):
    plant(tmp_path, ["t/a.csv", "t/clips/x/1.wav", "t/clips/x/1.json", "t/clips/.trash/b.csv"])
    (tmp_path/"t"/"clips"/"x"/"back").symlink_to(tmp_path/"t"/"clips")
    assert [s.path.name for s in find_tasks([tmp_path])] == ["a.csv"]


def test_a_task_by_its_folder_when_that_is_here(tmp_path, monkeypatch):
    plant(tmp_path, ["t/a.csv"])
    monkeypatch.chdir(tmp_path/"t")
    assert [(s.task, str(s.path)) for s in find_tasks([Path(".")])] == [("t", "a.csv")]


bad_trees = {
    "empty": (["d/README.md"], ["d"], "d: no data in this folder; it needs .csv, .tsv, .jsonl, .parquet files"),
    "an empty task": (["d/t/a.csv", "d/u/notes.txt"], ["d"], "d/u: no data in this folder"),
    "one level too many": (["d/x/t/a.csv"], ["d"], "d/x: no data in this folder"),
    "mixed": (["d/a.csv", "d/t/a.csv"], ["d"], r"d: holds data itself \(a.csv\) and in a folder \(t\)"),
    "mixed with a dataset": (["d/a.csv", "d/s/state.json"], ["d"], r"d: holds data itself \(a.csv\) and in a folder \(s\)"),
    "mixed further in": (["d/t/a.csv", "d/t/more/b.csv"], ["d"], r"d/t: holds data itself \(a.csv\) and in a folder \(more\)"),
    "mixed far in": (["d/t/a.csv", "d/t/clips/1.wav", "d/t/clips/old/b.tsv"], ["d"], r"d/t: holds data itself \(a.csv\) and in a folder \(clips.old\)"),
    "mixed with a dataset far in": (["d/a.csv", "d/x/y/z/state.json"], ["d"], r"d: holds data itself \(a.csv\) and in a folder \(x.y.z\)"),
    "packed far in": (["d/t/a.csv", "d/t/x/y/b.jsonl.gz"], ["d"], r"d/t: holds data itself \(a.csv\) and in a folder \(x.y\)"),
    "twice": (["a.csv"], ["a.csv", "./a.csv"], "a.csv: given twice"),
    "twice by a folder": (["d/t/a.csv"], ["d", "d/t"], "d/t/a.csv: given twice"),
}


@pytest.mark.parametrize("name", bad_trees)
def test_bad_folders(tmp_path, name):
    files, paths, message = bad_trees[name]
    plant(tmp_path, files)
    with pytest.raises(InputError, match=message): find_tasks([tmp_path/p for p in paths])


RECORD = '{"audio": "a.wav", "prediction": "x"}'
UNREAD = {"one.json": RECORD, "lines.json": f"{RECORD} \n{RECORD}\n", "inside.json": json.dumps(dict(data=[dict(messages=[])]), indent=1), "list.json": '[{"a": 1}]',
    "utf16.json": f"[{RECORD}]".encode("utf-16"), "a.txt": "id\taudio\ttext\n1\ta.wav\tx", "b.txt": "audio,prediction\na.wav,x\n", "c.txt": f"{RECORD}\n", "train": f"{RECORD}\n",
    **dict.fromkeys(["a.ndjson", "a.jsonlines", "a.jl", "a.manifest", "a.arrow", "a.feather", "a.xlsx", "a.ods", "a.jsonl.gz", "a.csv.zst", "a.jsonl.lz4", "a.json.zip"], "")}
READ_OR_NO_ROWS = {"labels.json": '{"dog": 0, "text": 1}', "config.json": json.dumps(dict(model_name="tiny", lr=1e-4), indent=1), "dataset_info.json": '{"features": {"audio": {}}}',
    "README.txt": "Columns: audio, prediction\n", "trans.txt": "1 hello\n", "text": "utt1 hello\n", "latin.txt": b"\xe9", "LICENSE": "MIT", "sounds.tar.gz": "", "empty.json": "", "a.jsonl.bak": RECORD}

@pytest.mark.parametrize("name, content", [*UNREAD.items(), *READ_OR_NO_ROWS.items()])
def test_no_file_with_rows_is_left_out_of_a_task(tmp_path, name, content):
    (tmp_path/"t").mkdir()
    (tmp_path/"t"/"a.csv").write_text("audio,prediction\na.wav,x\n")
    (tmp_path/"t"/name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if name in READ_OR_NO_ROWS: assert [s.path.name for s in find_tasks([tmp_path])] == ["a.csv"]
    else:
        with pytest.raises(InputError, match=f"{name} would not be read; rows are read from files that end in .*: unpack or convert it, or move it"): find_tasks([tmp_path])


def test_links_that_lead_nowhere(tmp_path):
    (tmp_path/"t").mkdir()
    (tmp_path/"t"/"a.csv").write_text("audio,prediction\na.wav,x\n")
    (tmp_path/"t"/"a.wav").symlink_to("/lost/a.wav") # a bad row, if a row names it
    assert len(find_tasks([tmp_path])) == 1
    for link in (tmp_path/"t"/"b.csv", tmp_path/"u"):
        link.symlink_to("/lost/b")
        with pytest.raises(InputError, match=f"{link}: a link to /lost/b, which does not exist; mend or remove it"): find_tasks([tmp_path])
        link.unlink()
    os.mkfifo(tmp_path/"t"/"c.csv")
    with pytest.raises(InputError, match="c.csv: is not a regular file"): open_rows(find_tasks([tmp_path])[1].path)


# The check

@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for name, seconds in dict(a=1, b=.5, long=3).items(): sf.write(folder/f"{name}.wav", np.random.default_rng(0).uniform(-.5, .5, int(seconds*16000)), 16000)
    return folder


def test_check_of_records(tmp_path, clips):
    path = jsonl(tmp_path, rounds(("system", "S"), H, B, ("human", [{"type": "audio", "path": "a.wav"}, {"type": "audio", "path": "b.wav"}]), ("bot", "A2"), data_name="x", audio="a.wav"),
        {"prompt": "Q", "answer": "A", "data_name": "x", "id": 1}, {"text": "T", "id": 2}, {"prompt": "Q", "answer": "A"}, {"prompt": "Q", "answer": "B"},
        {"prompt": "Q"}, {"audio": ["a.wav", "none.wav", "none.wav"], "answer": "A"}, {"audio": "long.wav", "prompt": "Q", "answer": "A", "prediction": "P"}, {"answer": "A"}, [])
    r = check(CheckSettings(input=path, base_dir=clips, max_audio_seconds=2., num_workers=2))
    assert (r.rows, r.clips, sorted(r.seconds), r.tasks, dict(r.turns), dict(r.other)) == (10, 7, [.5, 1, 1, 1], {"x": 2}, {2: 1, 1: 6, 0: 1}, {"id": 2})
    assert r.labels == {"A2": 1, "A": 3, "B": 1, "P": 1}
    assert (r.repeated, r.conflicting, r.no_system_prompt, r.no_user_prompt) == (1, 1, 6, 2)
    reasons = ["the last message is from the user", "none.wav: no such file", "long.wav: 3.0 s long", "the last message and prediction", "no conversation in the keys answer", "is a list"]
    found = [b.reason for b in r.bad]
    assert [b.line for b in r.bad] == [6, 7, 8, 8, 9, 10] and sorted(reasons) == sorted(next(x for x in reasons if x in f) for f in found)
    for shown in [str(r), r._repr_html_()]: assert "tasks" in shown and "2 turns" in shown and "ignored: id (2 rows)" in shown
    r = check(CheckSettings(input=path, base_dir=clips, max_audio_seconds=2., num_workers=2, predictions=False))
    assert [b.line for b in r.bad] == [3, 7, 8, 9, 10], "a text has no prompt"


def test_check_of_texts_and_parquet(tmp_path, clips):
    r = check(CheckSettings(input=jsonl(tmp_path, {"prompt": "Q", "answer": "A"}, {"text": "T"}), num_workers=1))
    assert not r.failed and "audio: none, the rows are text" in str(r)
    pq.write_table(pa.table({"audio": ["a.wav", None, "none.wav"], "prediction": ["x", "y", None], "id": [1, 2, 3]}), tmp_path/"t.parquet")
    r = check(CheckSettings(input=tmp_path/"t.parquet", base_dir=clips, num_workers=1))
    assert [(b.line, b.reason[:9]) for b in r.bad] == [(2, "the audio"), (3, f"{clips}/none.wav"[:9]), (3, "the predi")]
    assert (r.rows, list(r.seconds), r.other) == (3, [1.], {"id": 3})


def test_displays_are_escaped(tmp_path):
    f = open_rows(jsonl(tmp_path, rounds(("human", "<script>"), ("bot", "a & b"), data_name="<i>", audio="<u>.wav"), {"text": "<script>"}))
    for shown in [f, *f, to_conversation(next(f.rows()))]:
        page = shown._repr_html_()
        assert not re.search("<(script|i|u)>", page) and "&lt;script&gt;" in page


# Parts of a clip

@pytest.fixture(scope="module")
def ramp(tmp_path_factory):
    "A clip of two seconds whose samples say where they are"
    folder = tmp_path_factory.mktemp("ramp")
    sf.write(folder/"r.wav", np.arange(32000, dtype=np.int16), 16000)
    return folder


segments = {"start and end": ({"start": "0.5", "end": "1.25"}, "#t=0.5,1.25"), "offset and duration": ({"offset": ".1", "duration": "0.2"}, "#t=0.1,0.3"),
            "onset and offset": ({"onset": "0.5", "offset": "1.25"}, "#t=0.5,1.25"), "onset": ({"onset": "0.5"}, "#t=0.5"), "start and duration": ({"start": "0.5", "duration": "0.25"}, "#t=0.5,0.75"),
            "to the end": ({"start": "1e-1"}, "#t=0.1"), "nothing is given": ({"start": "", "end": ""}, ""), "from the start": ({"start": "", "end": "1.0"}, "#t=0,1"),
            "the length of a file": ({"duration": "2.0"}, "#t=0,2"), "rounded up": ({"duration": "2.05"}, "#t=0,2.05"), "the beginning": ({"duration": "0.75"}, "#t=0,0.75"), "an end": ({"end": "1.5"}, "#t=0,1.5"),
            "names of their own": ({"end": "1", "duration": "x"}, ""), "beside another start": ({"begin_time": "0.5", "duration": "1"}, ""), "and another": ({"start_sec": "0.5", "end": "1"}, "")}
nonsense = {"text": ({"start": "early", "end": "1"}, "start is 'early'; it must be a number of seconds"), "before the clip": ({"offset": "-1", "duration": "1"}, "offset is '-1'"),
            "backwards": ({"start": "1", "end": "0.5"}, "the segment from 1 to 0.5 s is empty; correct start and end"), "empty": ({"offset": "1", "duration": "0"}, "the segment from 1 to 1 s is empty"),
            "not a number": ({"start": "nan"}, "start is 'nan'"), "NeMo's whole file": ({"duration": "-1"}, "duration is '-1'"), "no sound": ({"duration": "0"}, "the segment from 0 to 0 s is empty; correct duration"), "endless": ({"start": "0", "end": "inf"}, "end is 'inf'"), "digits with a line": ({"start": "1_0"}, "start is '1_0'"),
            "Arabic digits": ({"start": "\u0661"}, "start is '\u0661'"), "an event before it begins": ({"onset": "1", "offset": "0.5"}, "the segment from 1 to 0.5 s is empty; correct onset and offset")}


def segment_files(folder, extra):
    "A row with these cells in each kind of file; numbers where the kind has them"
    def number(v):
        try: return float(v) if v and v.isascii() and "_" not in v else v or None
        except ValueError: return v
    row = {"audio": "r.wav", "prediction": "x", **extra}
    pq.write_table(pa.table({k: [v] for k, v in row.items()}), folder/"s.parquet")
    raw = {k: number(v) if k in extra and v not in ("nan", "inf") else v for k, v in row.items()}
    return [write(folder, format_row([*row]) + format_row([*row.values()]), "s.csv"), folder/"s.parquet", write(folder, json.dumps(raw) + "\n", "s.jsonl")]


@pytest.mark.parametrize("name", segments)
def test_a_row_names_a_part_of_its_clip(tmp_path, ramp, name):
    extra, part = segments[name]
    for path in segment_files(tmp_path, extra):
        row, = open_rows(path)
        assert to_conversation(row).clips == [f"r.wav{part}"]
        r = check(CheckSettings(input=path, base_dir=ramp, num_workers=1))
        first, _, last = part.removeprefix("#t=").partition(",")
        assert not r.bad and list(r.seconds) == pytest.approx([min(2, float(last or 2)) - float(first or 0)])
        assert set(r.other) == (set() if part or name == "nothing is given" else set(extra))


@pytest.mark.parametrize("name, remedy", [("a.jsonl.gz", "unpack it: gunzip"), ("a.json", "write its records one below the other: python -c"), ("a.manifest", "rename it to .jsonl"),
                                          ("a.txt", "its name must end in .csv, .tsv, .jsonl, .parquet")])
def test_other_kinds_of_files(tmp_path, name, remedy):
    with pytest.raises(InputError, match=f"not a kind of file with rows; {re.escape(remedy)}"): open_rows(write(tmp_path, "[]", name))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.TSV", "a.csv.part"])
@pytest.mark.parametrize("kind", ["gzip", "bzip2", "xz", "zip", "parquet"])
def test_the_content_of_another_kind(tmp_path, name, kind):
    "Under the name of a text, as some browsers save what a server packs"
    text = b'{"prompt": "a", "response": "b"}\n'
    if kind == "zip":
        with zipfile.ZipFile(tmp_path/name, "w") as f: f.writestr("a.jsonl", text)
    elif kind == "parquet": pq.write_table(pa.table({"audio": ["a.wav"]}), tmp_path/name)
    else: (tmp_path/name).write_bytes({"gzip": gzip, "bzip2": bz2, "xz": lzma}[kind].compress(text))
    what = {"zip": "a zip archive", "parquet": "Parquet; rename it to .parquet"}.get(kind, f"packed with {kind}; rename it to FILE")
    with pytest.raises(InputError, match=f"{re.escape(name)}: the content is {what}"): open_rows(tmp_path/name)


def test_marks_where_no_clip_can_stand(tmp_path):
    "ms-swift would put a clip into an answer; a text without clips may speak of a mark"
    def record(answer, audios, system="s"):
        messages = [{"role": role, "content": text} for role, text in (("system", system), ("user", "<audio>q" if audios else "q"), ("assistant", answer))]
        return write(tmp_path, json.dumps({"messages": messages, "audios": audios}) + "\n", "r.jsonl")
    for facts, role in [(("it is <audio>", ["a.wav"]), "assistant"), (("<audio>", ["a.wav", "b.wav"]), "assistant"), (("a", ["a.wav"], "<audio>"), "system")]:
        path = record(*facts)
        with pytest.raises(InputError, match=f"r.jsonl:1: an <audio> mark in the text of the {role}; only user messages can have clips: move it, or remove it"): open_rows(path).count()
    for facts in [("HTML has <audio>", []), ("a", ["a.wav"])]: assert open_rows(record(*facts)).count() == 1


def test_the_remedy_for_json(tmp_path):
    (tmp_path/"OLD.json").write_text(json.dumps([{"prompt": "a", "response": "1"}, {"prompt": "é", "response": "2"}]))
    with pytest.raises(InputError) as e: open_rows(tmp_path/"OLD.json")
    command = str(e.value).partition("one below the other: ")[2].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert [r.prediction or r.messages[-1]["content"][0]["text"] for r in open_rows(tmp_path/"NEW.jsonl")] == ["1", "2"]


def test_the_remedy_for_kaldi(tmp_path):
    "A clip without a text, or with an empty one, gets an empty answer, which check lists"
    (tmp_path/"wav.scp").write_text("u1 a.wav\nu2\tdir/b c.wav\nu3 c.wav\nu4 d.wav\n")
    (tmp_path/"text").write_text("u1 hello, you\nu2\tb\n\nu4\nu5 lost\n")
    with pytest.raises(InputError) as e: open_rows(tmp_path/"wav.scp")
    command = re.search('python -c ".*" > rows.csv', str(e.value))[0].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    rows = [*open_rows(tmp_path/"rows.csv")]
    assert [(r.audio, r.prediction) for r in rows] == [("a.wav", "hello, you"), ("dir/b c.wav", "b"), ("c.wav", None), ("d.wav", None)]
    assert [bool(r.faults()) for r in rows] == [False, False, True, True]


def test_a_manifest_without_or_with_a_wrong_text(tmp_path):
    "The message names the key of the file"
    unlabelled = write(tmp_path, json.dumps({"audio_filepath": "a.wav", "text": None}) + "\n", "a.jsonl")
    row, = open_rows(unlabelled)
    assert to_conversation(row, with_prediction=False).clips == ["a.wav"] and "add the answer as prediction" in row.faults()[0]
    with pytest.raises(InputError, match="text is a number"): open_rows(write(tmp_path, json.dumps({"audio_filepath": "a.wav", "text": 5}) + "\n", "b.jsonl")).count()


def test_columns_that_look_like_times(tmp_path, ramp, capfd):
    "Only exact names cut a clip: AudioCaps has a `start_time` in another file"
    path = write(tmp_path, "audio,start_time,end,Channel,prediction\nr.wav,0.5,1,0,x\n", "t.csv")
    r = check(CheckSettings(input=path, base_dir=ramp, num_workers=1))
    assert r.misnamed == {"start_time": "start", "Channel": "channel"} and list(r.seconds) == [2]
    note_misnamed(open_rows(path))
    assert "ignored columns: start_time (did you mean start?), Channel (did you mean channel?)" in capfd.readouterr().err
    note_misnamed(open_rows(write(tmp_path, json.dumps({"audio": "r.wav", "begin": 0.5, "end": 1, "prompt": "a", "response": "b"}) + "\n", "t.jsonl")))
    assert "ignored columns: begin (did you mean start?)\n" in capfd.readouterr().err
    for first, last in [("start_ms", "end_ms"), ("start_sample", "end_sample"), ("begin", "stop")]:
        note_misnamed(open_rows(write(tmp_path, f"audio,{first},{last},prediction\nr.wav,500,1000,x\n", "t.csv")))
        assert f"ignored columns: {first} (did you mean start?), {last} (did you mean end?)\n" in capfd.readouterr().err


@pytest.mark.parametrize("name", nonsense)
def test_times_that_mean_nothing(tmp_path, name):
    extra, message = nonsense[name]
    for path in segment_files(tmp_path, extra):
        with pytest.raises(InputError) as e: open_rows(path).count()
        assert message.replace("'", "") in str(e.value).replace("'", "").replace("-1.0", "-1")


@pytest.mark.parametrize("key", ["start", "end", "onset", "offset", "duration", "channel"])
def test_a_part_inside_a_clips_object_is_refused(tmp_path, key):
    "It would be dropped, and the whole clip used"
    path = write(tmp_path, json.dumps({"audio": {"path": "a.wav", "bytes": None, key: 0}, "prediction": "x"}) + "\n", "t.jsonl")
    with pytest.raises(InputError, match=f"t.jsonl:1: audio has an object with {key}; put what selects a part of the clip beside audio, or into its path"): open_rows(path).count()


def test_segments_of_records(tmp_path):
    two = write(tmp_path, json.dumps({"audio": ["a.wav", "b.wav"], "prediction": "x", "start": 1}) + "\n", "two.jsonl")
    with pytest.raises(InputError, match="start with 2 clips; name the part in each clip, as in clip.wav#t=1.5,3, or rename it"): open_rows(two).count()
    named, = open_rows(write(tmp_path, json.dumps({"audio": ["a.wav#t=1,2", "b.wav"], "prediction": "x"}) + "\n", "named.jsonl"))
    assert to_conversation(named, base_dir="d").clips == ["d/a.wav#t=1,2", "d/b.wav"]


def test_segments_are_what_is_converted_and_answered(tmp_path, ramp):
    path = write(tmp_path, "audio,start,end,prediction\nr.wav,0.25,0.5,one\nr.wav,0.5,1.5,two\nr.wav,,,all\nr.wav,1.5,3,wrong\n", "t.csv")
    r = check(CheckSettings(input=path, base_dir=ramp, num_workers=1))
    assert [b.line for b in r.bad] == [5] and "outside the clip, which is 2.000 s long" in r.bad[0].reason
    infer(InferSettings(input=path, base_dir=ramp, output=tmp_path/"answers.csv", model_name="tiny", max_new_tokens=2, num_workers=1))
    with open(tmp_path/"answers.csv", newline="") as f: assert [r[:3] for r in csv.reader(f)] == [line.split(",")[:3] for line in path.read_text().splitlines()]
    manifest = write(tmp_path, "".join(json.dumps({"audio_filepath": "r.wav", "duration": d, "text": "x"}) + "\n" for d in (2, 0.5, 2.01, 1999)), "m.jsonl")
    r = check(CheckSettings(input=manifest, base_dir=ramp, num_workers=1))
    assert list(r.seconds) == pytest.approx([2, .5, 2]) and [b.line for b in r.bad] == [4]
    assert "r.wav#t=0,1999: outside the clip, which is 2.000 s long; correct where the segment starts and ends, or rename what says so" in r.bad[0].reason
    path.write_text(path.read_text().replace("r.wav,1.5,3,wrong\n", ""))
    settings = ConvertSettings(input=path, base_dir=ramp, output=tmp_path/"converted", model_name="tiny", num_workers=1)
    convert(settings)
    clips = [e.clips[0] for e in open_dataset(settings.output, load_chat("tiny"), tmp_path)]
    for clip, (first, last) in zip(clips, [(4000, 8000), (8000, 24000), (0, 32000)]): assert np.array_equal(clip, np.arange(first, last))
