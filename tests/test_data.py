"Every form a table of rows may take, every way it may be broken, and the check of a whole data set"
import csv
import io
import pickle
import re
import string
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.settings import CheckSettings, ConvertSettings
from mdl_nbdev.data.check import check
from mdl_nbdev.data.clips import segment_names
from mdl_nbdev.data.conversations import Conversation
from mdl_nbdev.data.rows import BadRow, Row, to_conversation
from mdl_nbdev.data.sources import open_rows
from mdl_nbdev.data.tables import CsvFile, format_row, lone_quote_fault, read_rows
from mdl_nbdev.train.convert import convert


def write(folder, data, name="t.csv"):
    path = folder/name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def cells(path, **kwargs): return [r.cells for r in read_rows(path, **kwargs)]
def lines(path): return [r.line for r in read_rows(path)]


def pandas_cells(path):
    sep = "\t" if path.suffix == ".tsv" else ","
    t = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8", sep=sep)
    return [tuple(row) for row in t.itertuples(index=False, name=None)]


forms = {
    "plain": ("audio,prediction\na.wav,yes\nb.wav,no\n", [2, 3]),
    "no newline at the end": ("audio,prediction\na.wav,yes", [2]),
    "BOM": (b"\xef\xbb\xbfaudio,prediction\na.wav,yes\n", [2]),
    "BOM and a quoted name": (b'\xef\xbb\xbf"audio",prediction\na.wav,yes\n', [2]),
    "CRLF": ("audio,prediction\r\na.wav,yes\r\nb.wav,no\r\n", [2, 3]),
    "CR": ("audio,prediction\ra.wav,yes\rb.wav,no\r", [2, 3]),
    "blank lines": ("\naudio,prediction\n\na.wav,yes\n\n\nb.wav,no\n\n", [4, 7]),
    "quoted newlines": ('audio,prediction\na.wav,"one\ntwo\n\nfour"\nb.wav,no\n"c\n.wav",no\nd.wav,yes\n', [2, 6, 7, 9]),
    "quoted CRLF": ('audio,prediction\r\na.wav,"one\r\ntwo"\r\nb.wav,no\r\n', [2, 4]),
    "newline in the header": ('audio,"pre\ndiction"\na.wav,yes\n', [3]),
    "quotes": ('audio,prediction\na.wav,"say ""yes"", then go"\nb.wav,5" nail\nc.wav,\'x\'\n', [2, 3, 4]),
    "missing-value words": ("audio,prediction\na,None\nb,NA\nc,nan\nd,NaN\ne,N/A\nf,NULL\ng,<NA>\nh,-\n", range(2, 10)),
    "unicode": ("audio,prediction\nя/日本.wav,Grüße 👋🏽 \u2028 \x85 \x0b \x0c end\nb.wav,no\n", [2, 3]),
    "spaces": ("audio,prediction\n a.wav ,  yes \n", [2]),
    "numbers": ("audio,prediction\n001,1e5\n1.0,TRUE\n", [2, 3]),
    "one column": ('audio\na.wav\n""\nb.wav\n', [2, 3, 4]),
    "other columns": ("id,audio,x,prediction,\n1,a.wav,,yes,z\n", [2]),
    "unnamed columns": ("audio,prediction,,\na.wav,yes,,\n", [2]),
    "a huge cell": ("audio,prediction\na.wav," + "word " * 100_000 + "\nb.wav,no\n", [2, 3]),
    "many columns": (",".join(["audio", *map(str, range(999))]) + "\n" + ",".join(["a.wav"] * 1000) + "\n", [2]),
}


@pytest.mark.parametrize("name", forms)
def test_forms(tmp_path, name):
    text, starts = forms[name]
    path = write(tmp_path, text)
    assert cells(path) == pandas_cells(path)
    assert lines(path) == list(starts)


def test_tsv(tmp_path):
    path = write(tmp_path, 'audio\tprediction\na.wav\tone, two\nb.wav\t"tab\there"\n', "t.tsv")
    assert cells(path) == pandas_cells(path) == [("a.wav", "one, two"), ("b.wav", "tab\there")]
    assert cells(write(tmp_path, path.read_bytes(), "T.TSV")) == cells(path)


lone_quotes = {
    "in the middle": ('audio\tprediction\tage\na.wav\t"Where to? he asked.\tteens\nb.wav\tGood bye.\ttwenties\nc.wav\tHe said "\tteens\nd.wav\tyes\t\n', {2: "joins 3 lines"}),
    "in the last column": ('audio\tprediction\na.wav\t"Where to?\nb.wav\tHe said "\nc.wav\tno\nd.wav\tyes\n', {2: "joins 2 lines"}),
    "without a partner": ('audio\tprediction\na.wav\t"Where to?\nb.wav\tno\nc.wav\tno\nd.wav\tyes\n', {2: "never closed"}),
    "before a word": ('audio\tprediction\na.wav\t"Yes" he said\nb.wav\tno\nc.wav\tno\nd.wav\tyes\n', {2: "text after a closing quote"}),
}


@pytest.mark.parametrize("name", lone_quotes)
def test_quotes_that_are_text(tmp_path, name):
    text, expected = lone_quotes[name]
    path, bad = write(tmp_path, text, "OLD.tsv"), []
    list(CsvFile(path).rows(bad.append))
    assert [b.line for b in bad] == list(expected)
    for b in bad: assert expected[b.line] in b.reason
    remedy = bad[0].reason[bad[0].reason.index("python -c"):]
    subprocess.run(remedy.replace("python", sys.executable, 1), shell=True, check=True, cwd=tmp_path)
    assert cells(tmp_path/"NEW.csv") == [tuple(line.split("\t")) for line in text.splitlines()[1:]]


def test_cells_of_several_lines(tmp_path):
    path = write(tmp_path, 'audio\tprediction\tx\na.wav\t"one\ntwo\tthree"\t\nb.wav\t"one\ntwo"\t"x\ty"\n', "t.tsv")
    assert cells(path) == [("a.wav", "one\ntwo\tthree", ""), ("b.wav", "one\ntwo", "x\ty")]


def test_not_given(tmp_path):
    path = write(tmp_path, 'audio,system_prompt,user_prompt,prediction\na,,null,None\nb,"","null",NULL\nnull,nan, null,""\nc,,,null\nd,,,"null"\n')
    given = [(r.audio, r.system_prompt, r.user_prompt, r.prediction) for r in read_rows(path)]
    assert given == [("a", None, None, "None"), ("b", None, "null", "NULL"), (None, "nan", " null", None), ("c", None, None, "null"), ("d", None, None, "null")]
    assert cells(path)[0] == ("a", "", "null", "None"), "cells stay as they were written"


def test_optional_columns(tmp_path):
    row, = read_rows(write(tmp_path, "x,audio\n1,a.wav\n"))
    assert row == Row("a.wav", None, None, None, str(tmp_path/"t.csv"), 2, ("1", "a.wav"))
    assert not hasattr(row, "__dict__")
    assert pickle.loads(pickle.dumps(row)) == row
    row, = read_rows(write(tmp_path, "prediction\nyes\n"), needs=("prediction",))
    assert (row.audio, row.prediction) == (None, "yes")


text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0") | st.sampled_from(',"\r\n\t \';'), max_size=8)
names = st.lists(text.filter(str.strip), max_size=3, unique=True).filter(lambda n: "audio" not in n)
each = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def tables(draw):
    columns = draw(st.permutations(["audio", *draw(names)]))
    assume(not segment_names(columns)) # their cells would have to be times
    rows = draw(st.lists(st.tuples(*[text] * len(columns)), min_size=1, max_size=5))
    assume(not any(lone_quote_fault(r, len(columns)) for r in rows)) # each line of such a row would be a row of a TSV without quotes
    return columns, rows


def starts(written):
    "The line on which each of these pieces of a file starts; a line ends with CR, LF or both"
    return [1 + len(re.findall("\r\n|\r|\n", "".join(written[:i]))) for i in range(len(written))]


def csv_text(row, **kwargs):
    out = io.StringIO(newline="")
    csv.writer(out, **kwargs).writerow(row)
    return out.getvalue()


@settings(max_examples=150, **each)
@given(tables(), st.sampled_from([dict(lineterminator="\r\n"), dict(quoting=csv.QUOTE_ALL, lineterminator="\n")]), st.booleans(), st.booleans())
def test_what_csv_writes_is_read_back(tmp_path, table, dialect, bom, tsv):
    columns, rows = table
    written = [csv_text(r, delimiter="\t" if tsv else ",", **dialect) for r in [columns, *rows]]
    path = write(tmp_path, b"\xef\xbb\xbf" * bom + "".join(written).encode(), "t.tsv" if tsv else "t.csv")
    f = CsvFile(path)
    assert f.columns == list(columns)
    assert [r.cells for r in f] == rows
    assert [r.line for r in f] == starts(written)[1:]
    assert f.count() == len(rows)


@settings(max_examples=100, **each)
@given(tables(), st.booleans())
def test_what_is_formatted_is_read_back(tmp_path, table, tsv):
    columns, rows = table
    path = tmp_path/("t.tsv" if tsv else "t.csv")
    written = [format_row(r, "\t" if tsv else ",") for r in [columns, *rows]]
    write(tmp_path, "".join(written), path.name)
    assert cells(path) == rows
    assert lines(path) == starts(written)[1:]
    assert all(w.endswith("\n") and not w.endswith("\r\n") for w in written)


@settings(max_examples=40, **each)
@given(st.lists(st.tuples(text, text), min_size=1, max_size=5))
def test_what_pandas_writes_is_read_back(tmp_path, rows):
    path = tmp_path/"t.csv"
    pd.DataFrame(rows, columns=["audio", "prediction"]).to_csv(path, index=False, quoting=csv.QUOTE_ALL)
    assert cells(path) == rows


file_errors = {
    "empty": ("", "t.csv: the file is empty"),
    "only blank lines": ("\n\n", "t.csv: the file is empty"),
    "only a BOM": (b"\xef\xbb\xbf", "t.csv: the file is empty"),
    "header only": ("audio,prediction\n", "t.csv: a header and no rows"),
    "no audio": ("path,prediction\na,b\n", "t.csv:1: no column audio; found 'path', 'prediction'"),
    "no prediction": ("audio,label\na,b\n", "t.csv:1: no column prediction; found 'audio', 'label'"),
    "both missing": ("x,y\na,b\n", "t.csv:1: no column audio, prediction; found 'x', 'y'"),
    "capitals": ("Audio,Prediction\na,b\n", "rename 'Audio' to 'audio', 'Prediction' to 'prediction'"),
    "spaces": ("audio, prediction\na,b\n", "rename ' prediction' to 'prediction'"),
    "a slip": ("audio,predicton\na,b\n", "rename 'predicton' to 'prediction'"),
    "another name": ("audio,label\na,b\n", "rename 'label' to 'prediction'"),
    "no header": ("a.wav,dog\nb.wav,cat\n", "t.csv:1: the first line looks like data, but it must name the columns; add a header above it, such as audio,prediction"),
    "no header, and an id": ("1,a.wav,dog\n2,b.wav,cat\n", "such as column1,audio,prediction"),
    "semicolons": ("audio;prediction\na;b\n", "separated by semicolons"),
    "tabs": ("audio\tprediction\na\tb\n", "separated by tabs"),
    "twice": ("audio,x,prediction,x\na,b,c,d\n", "t.csv:1: more than one column is called 'x'"),
    "UTF-16": ("audio,prediction\na,b\n".encode("utf-16"), "iconv -f UTF-16"),
    "NUL in the header": ("audio,predic\0tion\na,b\n", "t.csv:1: NUL character in column 13 of line 1, in 'audio,predic\\x00tion'; the file is damaged"),
    "latin-1 header": ("audio,prediction,é\na,b,c\n".encode("latin-1"), "t.csv:1: byte 0xe9 in column 18 of line 1 is not UTF-8"),
    "quoted header": ('audio,"prediction\na,b\n', "t.csv:1: a quote is opened and never closed"),
}


@pytest.mark.parametrize("name", file_errors)
def test_file_errors(tmp_path, name):
    data, expected = file_errors[name]
    with pytest.raises(InputError) as e: list(read_rows(write(tmp_path, data), needs=("audio", "prediction")))
    assert expected in str(e.value) and "\n" not in str(e.value)


def test_paths(tmp_path):
    for path, expected in [(tmp_path/"none.csv", "none.csv: No such file or directory; the working directory is"), (tmp_path, "is a folder"), ("/dev/null", "not a regular file")]:
        with pytest.raises(InputError, match=expected): read_rows(path)


row_errors = {
    "too few": (b"c\n", "1 cell, but the header has 2: ['c']; there is no cell for prediction"),
    "too many": (b"c,d,e\n", "3 cells, but the header has 2: ['c', 'd', 'e']; put a cell that contains the separator in quotes"),
    "latin-1": (b"c,caf\xe9\n", "byte 0xe9 in column 6 of line 3 is not UTF-8"),
    "latin-1 on a later line": (b'c,"a\nb\nc\xe9"\n', "byte 0xe9 in column 2 of line 5 is not UTF-8"),
    "cut UTF-8": (b"c,caf\xc3\n", "byte 0xc3 in column 6 of line 3"),
    "surrogate": (b"c,\xed\xa0\x80\n", "byte 0xed in column 3 of line 3"),
    "NUL": (b"c,\0\n", "NUL character in column 3 of line 3, in 'c,\\x00'; the file"),
    "NUL in a long cell": (b"c," + b"x"*1000 + b"y\0z" + b"w"*1000 + b"\n", "column 1004 of line 3, in '" + "x"*19 + "y\\x00z" + "w"*18 + "'; the file"),
    "text behind a quote": (b'c,"d"e\n', "text after a closing quote;"),
    "inner quotes": (b'c,"5" nails"\n', "text after a closing quote;"),
    "a quote left open": (b'c,"d\ne,"f"\n', "text after a closing quote (the row spans lines 3 to 4)"),
}


@pytest.mark.parametrize("name", row_errors)
def test_row_errors(tmp_path, name):
    data, expected = row_errors[name]
    path = write(tmp_path, b"audio,prediction\na,b\n" + data + b"x,y\n")
    rows = read_rows(path)
    assert next(rows).cells == ("a", "b")
    with pytest.raises(InputError) as e: next(rows)
    assert str(e.value).startswith(f"{path}:3: ") and expected in str(e.value) and "\n" not in str(e.value)
    bad = []
    assert [r.cells for r in CsvFile(path).rows(bad.append)] == [("a", "b"), ("x", "y")], "the reading goes on"
    assert [b.line for b in bad] == [3]


def test_open_quote_to_the_end(tmp_path):
    path = write(tmp_path, 'audio,prediction\na,b\nc,"d\n' + "e,f\n" * 100)
    with pytest.raises(InputError, match=r":3: a quote is opened and never closed \(the row spans lines 3 to 103\)"): list(read_rows(path))


def test_all_bad_rows_in_one_error(tmp_path):
    path = write(tmp_path, "audio,prediction\n" + "a\nb,c\n" * 30)
    with pytest.raises(InputError) as e: CsvFile(path).count()
    report = str(e.value).splitlines()
    assert report[0] == "30 bad rows:" and report[20].startswith(f"{path}:40: 1 cell,") and report[-1].startswith("... and 10 more")


def test_reading_does_not_hold_the_file(tmp_path):
    path = write(tmp_path, "audio,prediction\n" + "a,b\n" * 10)
    rows = read_rows(path)
    assert next(iter(rows)).line == 2 and not isinstance(rows, list)
    f = CsvFile(path)
    assert f.count() == len(list(f)) == len(list(f)) == 10, "a file can be read again"


# Conversations


def test_prompts(tmp_path):
    path = write(tmp_path, "audio,system_prompt,user_prompt,prediction\na.wav,own,,x\nb.wav,null,own,y\n")
    told = [[(m["role"], [p.get("text", p.get("audio")) for p in m["content"]])
             for m in to_conversation(r, system_prompt="S", user_prompt="U", base_dir=tmp_path).messages] for r in read_rows(path)]
    a, b = str(tmp_path/"a.wav"), str(tmp_path/"b.wav")
    assert told == [[("system", ["own"]), ("user", [a, "U"]), ("assistant", ["x"])], [("system", ["S"]), ("user", [b, "own"]), ("assistant", ["y"])]]


@pytest.mark.parametrize("prediction", ["", '""', "  "])
def test_missing_answer(tmp_path, prediction):
    row, = read_rows(write(tmp_path, f"audio,prediction\na.wav,{prediction}\n"))
    with pytest.raises(InputError, match=r"t\.csv:2: the prediction is empty"): to_conversation(row)
    assert [m["role"] for m in to_conversation(row, with_prediction=False).messages] == ["user"]


def test_missing_audio(tmp_path):
    row, = read_rows(write(tmp_path, "audio,prediction\nnull,x\n"))
    with pytest.raises(InputError, match=r"t\.csv:2: the audio cell is empty"): to_conversation(row)


def test_displays_are_escaped(tmp_path):
    path = write(tmp_path, "audio,user_prompt,prediction,<b>x\n<i>.wav,<script>,a & b,1\n")
    row, = read_rows(path)
    for shown in [row, to_conversation(row), CsvFile(path)]:
        page = shown._repr_html_()
        assert "<script>" not in page and "&lt;script&gt;" in page and "a &amp; b" in page and "<i>" not in page and "<b>x" not in page


def test_what_a_conversation_knows(tmp_path):
    path = write(tmp_path, "audio,system_prompt,user_prompt,prediction\na.wav,S,U,x\nb.wav,,,\n")
    a, b = (to_conversation(r, with_prediction=i == 0) for i, r in enumerate(read_rows(path)))
    assert (a.where, a.clips, a.system, a.prompt_text(), a.reference, [m["role"] for m in a.turns]) == (f"{path}:2", ["a.wav"], "S", "U", "x", ["user", "assistant"])
    assert (b.clips, b.system, b.prompt_text(), b.reference, b.turns) == (["b.wav"], None, "", None, b.messages)


messages = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": st.lists(
    st.fixed_dictionaries({"type": st.just("text"), "text": st.text()}) | st.fixed_dictionaries({"type": st.just("audio"), "audio": st.text()}))}), min_size=1)


@settings(deadline=None)
@given(messages, st.none() | st.text(), st.none() | st.integers(1), st.none() | st.text())
def test_conversations_as_json(messages, file, line, task):
    c = Conversation(messages, file, line, task)
    assert Conversation.from_json(c.to_json()) == c and c.to_json().isascii() and "\n" not in c.to_json()


# The check


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    "Good clips and bad ones"
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    def clip(name, seconds, rate=16000, w=None, **kwargs):
        sf.write(folder/name, rng.uniform(-.5, .5, int(seconds * rate)) if w is None else w, rate, **kwargs)
    clip("a.wav", 1)
    clip("b.flac", .5, 44100)
    clip("long.wav", 3, 8000)
    clip("short.wav", .05)
    clip("none.wav", 0)
    clip("nan.wav", 1, w=np.full(16000, np.nan), subtype="FLOAT")
    clip("whole.flac", 1)
    data = (folder/"whole.flac").read_bytes()
    (folder/"cut.flac").write_bytes(data[:len(data) // 2])
    (folder/"text.wav").write_text("this is no audio")
    (folder/"zero.wav").write_bytes(b"")
    (folder/"folder.wav").mkdir()
    return folder


def run(path, clips, **kwargs):
    return check(CheckSettings(**{**dict(input=path, base_dir=clips, max_audio_seconds=2., num_workers=2), **kwargs}))


def test_a_good_file(tmp_path, clips):
    path = write(tmp_path, "audio,system_prompt,user_prompt,prediction\na.wav,s,u,x\nb.flac,,u,y\na.wav,,,y\na.wav,,,y\na.wav,,,x\n")
    r = run(path, clips)
    assert (r.rows, r.bad, r.labels) == (5, [], {"x": 2, "y": 3})
    assert list(r.seconds) == pytest.approx([1, 1, 1, 1, .5])
    assert r.hours == pytest.approx(4.5 / 3600)
    assert (r.no_system_prompt, r.no_user_prompt, r.repeated, r.conflicting) == (4, 3, 1, 1)
    assert "rows: 5, bad: 0" in str(r) and "<table" in r._repr_html_()
    r = run(path, clips, system_prompt="s", user_prompt="u")
    assert (r.no_system_prompt, r.no_user_prompt) == (0, 0)


bad_clips = {"missing.wav": "", "text.wav": "", "zero.wav": "", "none.wav": "", "folder.wav": "", "long.wav": "3"}
broken_clips = {"nan.wav": "NaN", "cut.flac": ""}


@pytest.mark.parametrize("decode", [True, False])
def test_every_bad_row_is_reported(tmp_path, clips, decode):
    table = ["audio,prediction", *(f"{name},x" for name in [*bad_clips, *broken_clips]), "a.wav,", 'a.wav,""', ",x", "a.wav", "a.wav,x,y",
             'a.wav,"x"y', "a.wav,\0", "a.wav,caf\udce9", "a.wav,fine", "missing.wav,x"]
    path = write(tmp_path, "\n".join(table).encode("utf-8", "surrogateescape") + b"\n")
    r = run(path, clips, decode=decode)
    good = {0, table.index("a.wav,fine")} | ({1 + [*bad_clips, *broken_clips].index(n) for n in broken_clips} if not decode else set())
    assert [b.line for b in r.bad] == [i + 1 for i in range(len(table)) if i not in good]
    assert r.rows == len(table) - 1
    reasons = {b.line: b.reason for b in r.bad}
    for line, (name, expected) in enumerate(bad_clips.items(), 2): assert name in reasons[line] and expected in reasons[line]
    assert all(str(b) in str(r) for b in r.bad) and not any("\n" in str(b) for b in r.bad)
    assert all(isinstance(b, BadRow) and b.file == str(path) for b in r.bad)
    r._repr_html_()


@pytest.mark.parametrize("decode", [True, False])
def test_short_clips_are_listed_and_can_be_used(tmp_path, clips, decode):
    sf.write(clips/"one sample.wav", np.zeros(1), 16000)
    path = write(tmp_path, "audio,prediction\nshort.wav,x\na.wav,x\none sample.wav,x\nshort.wav,y\n")
    r = run(path, clips, decode=decode)
    assert (r.bad, r.failed, len(r.seconds)) == ([], False, 4), "conversion takes them, so the check does"
    assert [(b.line, b.reason.partition(";")[0]) for b in r.short] == [(2, "short.wav: 0.050 s long"), (4, "one sample.wav: 0.000 s long"), (5, "short.wav: 0.050 s long")]
    assert "3 rows with a clip shorter than 0.1 s" in str(r) and all(str(b) in str(r) for b in r.short) and "one sample.wav" in r._repr_html_()
    report = convert(ConvertSettings(input=path, base_dir=clips, output=tmp_path/"out", model_name="tiny", num_workers=1))
    assert report.rows == r.rows


def test_predictions_are_optional(tmp_path, clips):
    path = write(tmp_path, "audio\na.wav\n")
    with pytest.raises(InputError, match="no column prediction; .*; rows that are to be answered, .* with --predictions false"): run(path, clips)
    r = run(path, clips, predictions=False)
    assert (r.rows, r.bad, r.labels) == (1, [], {})
    str(r), r._repr_html_()
    with pytest.raises(InputError, match="no column audio, prediction; found 'x'; add it or rename one$"): run(write(tmp_path, "x\na.wav\n"), clips)
    hint = "no row has an answer; rows that are to be answered, as by mdl_infer, are checked with --predictions false"
    empty = write(tmp_path, "audio,prediction\na.wav,\nb.flac,\n")
    assert hint in str(run(empty, clips)) and hint not in str(run(empty, clips, predictions=False))
    assert hint.replace("mdl_infer", "infer()").replace("--predictions false", "predictions=False") in run(empty, clips)._repr_html_()
    assert hint not in str(run(write(tmp_path, "audio,prediction\na.wav,\nb.flac,x\n"), clips)), "one has"


def test_nothing_but_bad_rows(tmp_path, clips):
    r = run(write(tmp_path, "audio,prediction\nmissing.wav,x\ny\n"), clips)
    assert (r.rows, len(r.bad), len(r.seconds)) == (2, 2, 0)
    str(r), r._repr_html_()


def test_base_dir_hint(tmp_path, clips):
    path = write(clips, "audio,prediction\na.wav,x\n")
    r = run(path, None)
    assert len(r.bad) == 1 and f"--base-dir {clips}" in str(r)


def test_audio_cells_that_are_no_paths(tmp_path, clips):
    table = ["audio,prediction", "x" * 5000 + ",x", "nope://example.org/a.wav,x", "?,x", "a.wav\u2028,x"]
    assert [b.line for b in run(write(tmp_path, "\n".join(table)), clips).bad] == [2, 3, 4, 5]


def test_many_labels(tmp_path, clips):
    names = ["".join(n) for n in zip(string.ascii_lowercase, string.ascii_uppercase)]
    r = run(write(tmp_path, "audio,prediction\n" + "".join(f"a.wav,{n}\n" for n in names)), clips)
    assert "predictions: 26, 26 distinct" in str(r) and "others" not in str(r), "texts that all differ are no labels"
    assert r.conflicting == 25
    r = run(write(tmp_path, "audio,prediction\n" + "".join(f"a.wav,{n}\n" for n in names*2)), clips)
    assert "predictions: 52, 26 distinct" in str(r) and "(6 others)" in str(r)


def test_plain_settings_do(tmp_path, clips):
    s = SimpleNamespace(input=[write(tmp_path, "audio,prediction\na.wav,x\n")], base_dir=clips, system_prompt=None, user_prompt=None,
                        max_audio_seconds=600., num_workers=1, decode=False, predictions=True, encoding="utf-8", channel="mix",
                        allow_private_hosts=True, refresh_cache=False, group=None, output=None, overwrite=False)
    assert check(s).rows == 1


def test_null_in_quotes_is_a_word(tmp_path):
    "In prompts, through inference and back; without quotes nothing is given; a Parquet file has missing values of its own"
    text = 'audio,user_prompt,system_prompt,prediction\na.wav,"null",null,x\n"b,""c"".wav",null,"null",null\nc.wav,"two\nlines","null","null"\n'
    f = CsvFile(write(tmp_path, text))
    prompts = [("null", None), (None, "null"), ("two\nlines", "null")]
    assert [(r.user_prompt, r.system_prompt) for r in f] == prompts and all(type(r.user_prompt) in (str, type(None)) for r in f)
    again = write(tmp_path, f.header() + "".join(f.format(r, r.prediction) for r in f), "again.csv")
    assert again.read_text() == text.replace('"two\nlines","null","null"', '"two\nlines","null",null')
    tsv = write(tmp_path, f.header("\t") + "".join(f.format(r, r.prediction, "\t") for r in f), "again.tsv")
    pq.write_table(pa.table(dict(audio=["a", "b", "c"], user_prompt=[p for p, _ in prompts], system_prompt=[p for _, p in prompts])), tmp_path/"t.parquet")
    parquet = open_rows(tmp_path/"t.parquet", ())
    out = write(tmp_path, parquet.header() + "".join(parquet.format(r, "x") for r in parquet), "out.csv")
    for path in (again, tsv, out): assert [(r.user_prompt, r.system_prompt) for r in CsvFile(path)] == prompts


# Other encodings

TEXTS = {"gb18030": "狗叫声 你好", "big5": "狗叫聲 你好嗎", "shift_jis": "犬の鳴き声", "euc_kr": "개 짖는 소리", "cp1252": "café, Größe", "utf_16": "été 狗"}


@pytest.mark.parametrize("encoding, message", [*((name, f"^--encoding: '{name}' is no encoding that Python knows") for name in ("rot13", "idna", "zip", "hex", "latin-0")),
    *((name, f"t.csv: cannot be read as {name}: ") for name in ("utf-16", "utf-32"))])
def test_an_encoding_that_cannot_be(tmp_path, encoding, message):
    (tmp_path/"t.csv").write_bytes("audio,prediction\na.wav,猫叫声\n".encode("gbk"))
    with pytest.raises(InputError, match=message): list(open_rows(tmp_path/"t.csv", encoding=encoding))


@pytest.mark.parametrize("encoding", TEXTS)
def test_the_likely_encoding_is_named_and_reads_the_file(tmp_path, encoding):
    for name, text in {"t.csv": f'audio,prediction\na.wav,"{TEXTS[encoding]}"\n', "t.jsonl": f'{{"audio": "a.wav", "prediction": "{TEXTS[encoding]}"}}\n'}.items():
        (tmp_path/name).write_bytes(text.encode(encoding))
        one, several = f"it looks like .*: read it with --encoding {encoding}, or save it as UTF-8, for example: iconv -f", f"name the encoding in which the text is right with --encoding \\(.*{encoding} reads {TEXTS[encoding]}"
        with pytest.raises(InputError, match=f"is not UTF-8; ({one}|{several})"): list(open_rows(tmp_path/name))
        row, = open_rows(tmp_path/name, encoding=encoding)
        assert row.prediction == TEXTS[encoding]


@pytest.mark.parametrize("encoding", ["gb18030", "shift_jis", "big5"])
def test_a_few_bytes_fit_several_encodings(tmp_path, encoding):
    text = {"gb18030": "你好", "shift_jis": "こんにちは", "big5": "你好嗎"}[encoding]
    (tmp_path/"t.csv").write_bytes(f"audio,prediction\na.wav,{text}\n".encode(encoding))
    with pytest.raises(InputError, match=f"t.csv:2: byte 0x.. in column 7 of line 2 is not UTF-8; name the encoding in which the text is right with --encoding \\(.*{encoding} reads {text}.*, or save"): list(open_rows(tmp_path/"t.csv"))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark(tmp_path, encoding):
    (tmp_path/"t.csv").write_bytes("audio,prediction\na.wav,你好，今天天气很好\n".encode(encoding))
    name = encoding.replace("-", "_")
    with pytest.raises(InputError, match=f"t.csv:1: NUL character in column . of line 1; it looks like UTF-16..: read it with --encoding {name}, or"): open_rows(tmp_path/"t.csv")
    row, = open_rows(tmp_path/"t.csv", encoding=name)
    assert row.prediction == "你好，今天天气很好"


@pytest.mark.parametrize("encoding", ["utf-32", "utf-32-be"])
def test_utf_32_begins_like_utf_16(tmp_path, encoding):
    (tmp_path/"t.csv").write_bytes(("\ufeff"*(encoding != "utf-32") + "audio,prediction\na.wav,你好\n").encode(encoding))
    with pytest.raises(InputError, match="it looks like UTF-32: read it with --encoding utf_32, or save it as UTF-8, for example: iconv -f UTF-32"): open_rows(tmp_path/"t.csv")
    row, = open_rows(tmp_path/"t.csv", encoding="utf_32")
    assert row.prediction == "你好"


def test_a_wrong_encoding(tmp_path):
    (tmp_path/"t.csv").write_bytes("audio,prediction\na.wav,é\n".encode())
    with pytest.raises(InputError, match="'klingon' is no encoding that Python knows"): open_rows(tmp_path/"t.csv", encoding="klingon")
    with pytest.raises(InputError, match="is not ASCII; save the file as UTF-8, or name"): list(open_rows(tmp_path/"t.csv", encoding="ascii"))


def test_silent_clips_are_listed(tmp_path):
    wave = np.random.default_rng(0).uniform(-.3, .3, 1600)
    sf.write(tmp_path/"opposite.wav", np.stack([wave, -wave], 1), 16000)
    sf.write(tmp_path/"loud.wav", wave, 16000)
    write(tmp_path, "audio,prediction\nopposite.wav,x\nloud.wav,y\n", "t.csv")
    report = check(CheckSettings(input=tmp_path/"t.csv", base_dir=tmp_path, num_workers=1))
    assert [r.line for r in report.notes["silent"]] == [2] and "1 row with a silent clip" in str(report) and not report.bad
