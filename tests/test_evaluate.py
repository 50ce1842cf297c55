"The figures of an evaluation against a slow Levenshtein distance, and the pairing of two files"
import csv
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.settings import EvalSettings
from mdl_nbdev.cli.commands import mdl_eval
from mdl_nbdev.data.metrics import score
from mdl_nbdev.infer.evaluate import evaluate


def distance(a, b):
    "Levenshtein's distance between two sequences, by its definition"
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    table[:, 0], table[0] = range(len(a) + 1), range(len(b) + 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b): table[i+1, j+1] = min(table[i, j+1] + 1, table[i+1, j] + 1, table[i, j] + (x != y))
    return table[-1, -1]


text = st.text(st.sampled_from("abB ' \n\t\u00a0\u3000é日👋🏽\x1c"), max_size=10)
pairs = st.lists(st.tuples(text.filter(str.strip), text), min_size=1, max_size=6)


@settings(max_examples=300, deadline=None)
@given(pairs)
def test_distances(pairs):
    refs, preds = map(list, zip(*pairs))
    s, tidy = score(refs, preds), [(r.split(), p.split()) for r, p in pairs]
    words = [distance(r, p) for r, p in tidy]
    chars = [distance(" ".join(r), " ".join(p)) for r, p in tidy]
    assert s.word_edits.tolist() == words
    assert s.char_edits.tolist() == chars
    assert s.wer == pytest.approx(sum(words) / sum(len(r) for r, _ in tidy))
    assert s.cer == pytest.approx(sum(chars) / sum(len(" ".join(r)) for r, _ in tidy))
    assert s.exact == pytest.approx(np.mean([r.strip() == p.strip() for r, p in pairs]))
    assert s.empty.tolist() == [not p.strip() for p in preds]


def test_many_rows():
    refs = [f"row {i} of many" for i in range(25_000)]
    s = score(refs, [r.replace("of", "off") if i % 2 else r for i, r in enumerate(refs)])
    assert (s.exact, s.wer) == (0.5, 0.125)
    assert s.word_edits.tolist() == [0, 1] * 12_500


def write(path, rows, columns=("audio", "prediction")):
    with open(path, "w", newline="", encoding="utf-8") as f: csv.writer(f, lineterminator="\n").writerows([columns, *rows])
    return path


def report(tmp_path, refs, preds, **kwargs):
    clips = [f"{i}.wav" for i in range(len(refs))]
    given = write(tmp_path/"in.csv", zip(clips, refs))
    return evaluate(EvalSettings(input=write(tmp_path/"out.csv", zip(clips, preds)), reference=given, **kwargs))


@pytest.mark.parametrize("refs, preds, kwargs", [
    (["yes", "no"] * 50, ["yes", ""] * 50, {}),
    ([f"label {i % 40}" for i in range(200)], ["<b>&"] * 200, dict(max_labels=5)),
    ([f"a sentence about {i}" for i in range(100)], [f"a  sentence of {i} <i>" for i in range(100)], dict(max_labels=7)),
    (["yes"] * 4, ["yes"] * 4, {}), (["one", "two"], ["one", "two"], {}), (["a", "a", "b"], ["", "", ""], dict(max_labels=0)),
    (["line\nend\r", "x"], ["a\n\nb", " x "], {}), (["x" * 500] * 2, ["y" * 500, "\x1b[31m"], {}),
], ids=["two labels", "many labels", "transcripts", "one label", "all right", "no table", "line ends", "long"])
def test_displays(tmp_path, refs, preds, kwargs):
    r = report(tmp_path, refs, preds, **kwargs)
    d = json.loads(json.dumps(r.to_dict(), allow_nan=False))
    lines = str(r).splitlines()
    assert f"{d['exact']:.2%} ({d['correct']:,} of {len(refs):,} rows)" in lines[1]
    assert max(map(len, lines)) < 300
    assert "\x1b" not in str(r)
    assert len(lines) <= 6 + max(3 * r.most, 1)
    shown = r._repr_html_()
    assert "<b>&" not in shown and "<i>" not in shown
    for tag in ["table", "tr", "td", "div"]: assert len(re.findall(f"<{tag}[ >]", shown)) == shown.count(f"</{tag}>")
    if "labels" in d: assert sum(x["rows"] for x in d["labels"]) == d["rows"] and sum(x["exact"] for x in d["labels"]) == d["correct"]
    else: assert len(d["worst"]) <= r.most


def luminance(rgb): return sum(w*(c/12.92 if c <= .04045 else ((c + .055)/1.055)**2.4) for w, c in zip((.2126, .7152, .0722), (v/255 for v in rgb)))


@pytest.mark.parametrize("text, page", [("212121", "ffffff"), ("e0e0e0", "111111"), ("ced6dd", "222832")], ids=["light", "dark", "dark site"])
def test_numbers_and_corrections_are_legible(tmp_path, text, page):
    "A text on a tint of the page, as the text of the page is; WCAG asks for 4.5"
    shown = report(tmp_path, ["yes", "no"] * 10, ["yes", "yes"] * 10)._repr_html_() + report(tmp_path, ["one two"] * 2 + ["a"], ["three", "two", "a"])._repr_html_()
    tints = set(re.findall(r"background:rgba\((\d+),(\d+),(\d+),([\d.]+)\)", shown))
    assert len({t[:3] for t in tints}) == 2 and max(float(t[3]) for t in tints) >= .4 and not re.search("[^-]color:", shown)
    text, page = (bytes.fromhex(c) for c in (text, page))
    for *rgb, alpha in tints:
        dark, light = sorted([luminance(text), luminance([float(alpha)*int(c) + (1 - float(alpha))*p for c, p in zip(rgb, page)])])
        assert (light + .05)/(dark + .05) >= 4.5, (rgb, alpha)


def test_order_of_labels_and_rows(tmp_path):
    r = report(tmp_path, list("bbbaaac"), list("bxxaaa") + [""])
    assert [(x["label"], x["rows"], x["exact"], x["wrong"], x["wrong_rows"]) for x in r.label_table()] == [("a", 3, 3, None, 0), ("b", 3, 1, "x", 2), ("c", 1, 0, "", 1)]
    r = report(tmp_path, ["a b c d", "e f", "g", "h i j k"], ["a b c", "e", "g", "h i x y"])
    assert (r.worst(), r.by_label) == ([3, 1, 0], False)


def test_the_word_null_is_an_answer(tmp_path):
    words = [("a.wav", "null"), ("b.wav", "NA"), ("c.wav", "nan")]
    quoted = tmp_path/"quoted.csv"
    quoted.write_text('audio,prediction\n' + "".join(f'{a},"{p}"\n' for a, p in words))
    (tmp_path/"in.jsonl").write_text("".join(json.dumps({"audio": a, "prediction": p}) + "\n" for a, p in words))
    pq.write_table(pa.table({"audio": [a for a, _ in words], "prediction": [p for _, p in words]}), tmp_path/"in.parquet")
    answers = write(tmp_path/"out.csv", words)
    for reference in [quoted, tmp_path/"in.jsonl", tmp_path/"in.parquet"]:
        r = evaluate(EvalSettings(input=answers, reference=reference))
        assert (r.scores.exact, r.predictions) == (1, ["null", "NA", "nan"])


def test_differences_that_nobody_sees(tmp_path):
    "Unicode forms do not count; white space is named, since it counts for the exact match alone"
    r = report(tmp_path, ["el pr\u00f3ximo", "one\r\ntwo", "a b", "x"], ["el pro\u0301ximo", "one\ntwo", "a\u00a0b", "y"])
    assert r.scores.correct.tolist() == [True, False, False, False] and r.references[0] == r.predictions[0]
    assert "(1 of 4 rows), differing only in white space: 2\n" in str(r)


clips = ["a.wav", "b.wav", "c.wav"]
faults = {
    "fewer rows": ([clips, ["x"] * 3], [clips[:2], ["x"] * 2], "out.csv: 2 rows, and .*in.csv has 3: .*run it again"),
    "more rows": ([clips[:2], ["x"] * 2], [clips, ["x"] * 3], "out.csv: 3 rows, and .*in.csv has 2: "),
    "another order": ([clips, ["x"] * 3], [clips[::-1], ["x"] * 3], r"out.csv:2: audio is 'c.wav', and .*in.csv:2 has 'a.wav' \(2 of 3 rows differ\); .*another order"),
    "other clips": ([clips, ["x"] * 3], [["a.wav", "b.wav", "d.wav"], ["x"] * 3], r"out.csv:4: audio is 'd.wav', and .*in.csv:4 has 'c.wav' \(1 of 3"),
    "no answers": ([clips, ["", "\t", "  "]], [clips, ["x"] * 3], "3 bad rows:\n.*in.csv:2: .*\n.*in.csv:3: .*\n.*in.csv:4: "),
}


@pytest.mark.parametrize("name", faults)
def test_faults(tmp_path, capsys, name):
    refs, rows, message = faults[name]
    given, answers = write(tmp_path/"in.csv", zip(*refs)), write(tmp_path/"out.csv", zip(*rows))
    with pytest.raises(SystemExit) as e: mdl_eval([str(answers), "--reference", str(given), "--output", str(tmp_path/"f.json")])
    out, err = capsys.readouterr()
    assert (e.value.code, out) == (2, "")
    assert re.match(f"mdl_eval: .*{message}", err, re.S)
    assert not (tmp_path/"f.json").exists()


def test_missing_columns_and_broken_rows(tmp_path):
    given = write(tmp_path/"in.csv", [("a.wav", "x")])
    other = write(tmp_path/"out.csv", [("a.wav", "x")], ("audio", "answer"))
    with pytest.raises(InputError, match="out.csv:1: no column prediction"): evaluate(EvalSettings(input=other, reference=given))
    other.write_text("audio,prediction\na.wav,x,y\nb.wav\n")
    with pytest.raises(InputError, match="2 bad rows"): evaluate(EvalSettings(input=other, reference=given))


def test_command(tmp_path, capsys):
    "Other columns and TSV don't matter; an empty prediction is wrong and counted; the figures go to a file that is not replaced"
    given = tmp_path/"in.tsv"
    given.write_text("id\taudio\tprediction\r\n1\ta.wav\tyes\r\n2\tb.wav\tno\r\n", encoding="utf-8-sig", newline="")
    answers = write(tmp_path/"out.csv", [("a.wav", "yes", 1), ("b.wav", "", 2)], ("audio", "prediction", "x"))
    figures = tmp_path/"deep"/"f.json"
    args = [str(answers), "--reference", str(given), "--output", str(figures)]
    with pytest.raises(SystemExit) as e: mdl_eval(args)
    assert not e.value.code
    assert "exact match: 50.00% (1 of 2 rows), without a prediction: 1" in capsys.readouterr().out
    before = figures.read_bytes()
    assert json.loads(before)["empty"] == 1
    assert [p.name for p in figures.parent.iterdir()] == ["f.json"]
    with pytest.raises(SystemExit) as e: mdl_eval(args)
    assert e.value.code == 2
    assert figures.read_bytes() == before
    for bad in [tmp_path/"out.csv"/"f.json", "/proc/f.json"]:
        with pytest.raises(SystemExit) as e: mdl_eval([*args[:-1], str(bad)])
        assert e.value.code == 2
        assert re.search("cannot (make this folder|write this file).*choose another --output", capsys.readouterr().err)


# Records and other kinds of files

def jsonl(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def rounds(*said): return [{"role": r, "content": c} for r, c in zip(["human", "bot"] * 3, said)]


def test_records(tmp_path):
    "The right answer is the last bot's, the answer to judge is the prediction; an empty one is wrong even where the right one stands beside it"
    records = [{"chat_rounds": rounds("Q", "A", "Q2", "yes")}, {"audio": ["a.wav", "b.wav"], "answer": "no"}, {"prompt": "Q", "prediction": "so"}, {"query": "Q", "answer": "yes"}]
    given = jsonl(tmp_path/"in.jsonl", *records)
    answers = jsonl(tmp_path/"out.jsonl", *({**r, "prediction": p} for r, p in zip(records, [" yes", "yes", "so", ""])))
    r = evaluate(EvalSettings(input=answers, reference=given))
    assert (r.references, r.predictions, r.lines) == (["yes", "no", "so", "yes"], ["yes", "yes", "so", ""], [1, 2, 3, 4])
    assert (r.scores.correct.tolist(), r.scores.empty.tolist()) == ([True, False, True, False], [False, False, False, True])


def test_kinds_of_files_compare(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    rows = [("a.wav", "yes"), ("b.wav", "no")]
    pq.write_table(pa.table(dict(zip(["audio", "prediction"], map(list, zip(*rows))))), tmp_path/"a.parquet")
    files = [write(tmp_path/"a.csv", rows), tmp_path/"a.parquet", jsonl(tmp_path/"a.jsonl", *(dict(audio=a, answer=p) for a, p in rows))]
    for a in files:
        for b in files:
            if a != b: assert evaluate(EvalSettings(input=a, reference=b)).scores.exact == 1
    texts = write(tmp_path/"t.csv", [("Q1", "yes"), ("Q2", "no")], ("user_prompt", "prediction"))
    assert evaluate(EvalSettings(input=texts, reference=jsonl(tmp_path/"t.jsonl", dict(prompt="Q1", answer="yes"), dict(prompt="Q2", answer="yes")))).scores.exact == .5


record_faults = {
    "another question": ([dict(prompt="Q", answer="A")], [dict(prompt="R", answer="A")], "out.jsonl:1: prompt is 'R', and .*in.jsonl:1 has 'Q'"),
    "another clip": ([dict(audio=["a.wav", "b.wav"], answer="A")], [dict(audio=["a.wav", "c.wav"], prediction="A")], "out.jsonl:1: audio is 'a.wav, c.wav', and .*in.jsonl:1 has 'a.wav, b.wav'"),
    "an earlier round": ([dict(chat_rounds=rounds("Q", "A", "R", "B"))], [dict(chat_rounds=rounds("X", "A", "R", "B"))], "prompt is 'X R', and .* has 'Q R'"),
    "another order": ([dict(prompt="Q", answer="A"), dict(prompt="R", answer="A")], [dict(prompt="R", answer="A"), dict(prompt="Q", answer="A")], r"\(2 of 2 rows differ\); the same rows are in another order"),
    "no right answer": ([dict(prompt="Q")], [dict(prompt="Q", prediction="A")], "in.jsonl:1: the reference has no prediction"),
    "two right answers": ([dict(prompt="Q", answer="A", prediction="P")], [dict(prompt="Q", answer="A", prediction="A")], "in.jsonl:1: the last message and prediction give two answers"),
    "broken records": ([dict(prompt="Q", answer="A")] * 2, [dict(prompt="Q", answer=1), dict(answer="A")], "2 bad rows:\n.*out.jsonl:1: answer is a number.*\n.*out.jsonl:2: no conversation"),
}


@pytest.mark.parametrize("name", record_faults)
def test_record_faults(tmp_path, name):
    refs, answers, message = record_faults[name]
    with pytest.raises(InputError) as e: evaluate(EvalSettings(input=jsonl(tmp_path/"out.jsonl", *answers), reference=jsonl(tmp_path/"in.jsonl", *refs)))
    assert re.search(message, str(e.value), re.S)
