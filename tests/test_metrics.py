"Normalizers and metrics by name, against pairs and figures made by hand"
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import sacrebleu

from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.settings import NORMALIZERS, EvalSettings
from mdl_nbdev.cli.commands import mdl_eval
from mdl_nbdev.data.intervals import bootstrap_interval
from mdl_nbdev.data.metrics import score
from mdl_nbdev.data.named_metrics import Metric, Texts, compared_texts, find_choice, load_metrics, measure, row_rouge_l, row_share
from mdl_nbdev.data.normalizers import normalize_texts
from mdl_nbdev.infer.evaluate import evaluate

# normalizer, two texts that it makes equal; then two that it does not
EQUAL = [
    ("casefold", "Straße", "STRASSE"), ("casefold", "É", "e\u0301"), ("casefold", " Male ", "male"),
    ("basic", "Well - done, you!", "well done you"), ("basic", "[noise] ok (laughs)", "OK."), ("basic", "<|de|>Grüß Gott.", "grüß gott"),
    ("whisper-english", "THE HARBOUR'S GREY", "the harbor is gray"), ("whisper-english", "Mrs. Ames can't", "missus ames can not"),
    ("whisper-english", "three hundred and five boats", "305 boats"), ("whisper-english", "uh, it cost five dollars", "It cost $5."),
    ("whisper-english", "<|en|>We'll go", "we will go"), ("whisper-english", "1,250 rows", "one thousand two hundred fifty rows"),
    ("chinese", "二零二三年十月一日", "２０２３年１０月１日"), ("chinese", "你好，世界！", "你 好 世 界"), ("chinese", "百分之三", "3％"), ("chinese", "五分之二", "2/5"),
    ("chinese", "零下", "零下。"), ("chinese", "我用 Python 写", "我用ＰＹＴＨＯＮ写"), ("chinese", "三点一四", "3.14"), ("chinese", "一百零二个", "<|zh|>102 个"), ("chinese", "say hi", "Say - Hi!")]
DIFFERENT = [("none", "Male", "male"), ("casefold", "ok.", "ok"), ("basic", "colour", "color"), ("basic", "twenty", "20"), ("whisper-english", "their", "there"),
             ("chinese", "二百", "三百"), ("chinese", "hot dog", "hotdog")]


@pytest.mark.parametrize("name, a, b", EQUAL)
def test_equal_after_a_normalizer(name, a, b):
    left, right = normalize_texts([a, b], name)
    assert left == right != ""
    assert a.strip() != b.strip()


@pytest.mark.parametrize("name, a, b", DIFFERENT)
def test_different_after_a_normalizer(name, a, b):
    left, right = normalize_texts([a, b], name)
    assert left != right


@pytest.mark.parametrize("name", NORMALIZERS)
def test_whatever_a_model_writes(name):
    texts = ["", " \n", "\x00\ud800", "9" * 400, "1.2.3/4-5%", "-", "<[(", "½Ⅷ②", "1/0", "👋🏽", "百分之", "point oh oh", "$£"]
    assert normalize_texts(texts, name)[:2] == ["", ""]
    assert [t == t.strip() for t in normalize_texts(texts, name)] == [True] * len(texts)


def test_rates_after_a_normalizer():
    "Six words of the references, one of them wrong; nothing is left of the last reference, where a word too many is an edit"
    refs, preds = ["It's a COLOUR.", "Mr. Ames", "Uh, um"], ["it is a color", "mister eames", "um, yes"]
    s = score(refs, preds, "whisper-english")
    assert (s.words.tolist(), s.word_edits.tolist(), s.correct.tolist()) == ([4, 2, 0], [0, 1, 1], [True, False, False])
    assert s.row_wer.tolist() == [0, 0.5, 1]
    with pytest.raises(InputError, match="whisper-english leaves nothing of any reference"): score(["Uh."], ["x"], "whisper-english")


def files(tmp_path, refs, preds):
    for name, answers in [("in.jsonl", refs), ("out.jsonl", preds)]:
        (tmp_path/name).write_text("".join(json.dumps(dict(audio=f"{i}.wav", prediction=a)) + "\n" for i, a in enumerate(answers)))
    return tmp_path/"out.jsonl", tmp_path/"in.jsonl"


def test_report_names_the_normalizer(tmp_path, capsys):
    "In text, JSON and HTML; the raw figures keep their names, so scripts that read them see what they saw"
    out, given = files(tmp_path, ["The <b>End", "A colour"], ["the <b>end!", "A color"])
    raw = evaluate(EvalSettings(input=out, reference=given)).to_dict()
    with pytest.raises(SystemExit) as e: mdl_eval([str(out), "--reference", str(given), "--normalizer", "whisper-english", "--output", str(tmp_path/"m.json")])
    assert not e.value.code
    text, d = capsys.readouterr().out, json.loads((tmp_path/"m.json").read_text())
    assert "normalizer: whisper-english\n  exact match: 100.00% (2 of 2 rows); raw: 0.00%\n  word error rate: 0.00% (0 edits of 4 words); raw: 75.00%\n" in text
    assert {k: d[k] for k in raw if k != "worst"} == {k: v for k, v in raw.items() if k != "worst"}
    assert (d["normalizer"], d["normalized"]["exact"], d["normalized"]["wer"], d["worst"]) == ("whisper-english", 1, 0, [])
    shown = evaluate(EvalSettings(input=out, reference=given, normalizer="casefold"))._repr_html_()
    assert "normalizer: casefold" in shown and "raw: 0.00%" in shown and "<b>e" not in shown


def test_missing_library(tmp_path, capsys, monkeypatch):
    out, given = files(tmp_path, ["a"], ["a"])
    for name, module, package in [("basic", "whisper_normalizer.basic", "whisper_normalizer"), ("chinese", "cn2an", "cn2an")]:
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(SystemExit) as e: mdl_eval([str(out), "--reference", str(given), "--normalizer", name])
        assert e.value.code == 2
        assert capsys.readouterr().err == f"mdl_eval: --normalizer {name} needs the package {package}: pip install 'mdl_nbdev[metrics]'\n"
    with pytest.raises(SystemExit) as e: mdl_eval([str(out), "--reference", str(given), "--normalizer", "german"])
    assert e.value.code == 2
    assert "expected none|casefold|basic|whisper-english|chinese" in capsys.readouterr().err


def test_libraries_are_loaded_on_demand():
    code = "import sys, mdl_nbdev.infer.evaluate; print(*{m.split('.')[0] for m in sys.modules} & {'whisper_normalizer', 'cn2an', 'regex', 'sacrebleu'})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "\n"


# Metrics by name

TAGS = (["rain; wind", "wind", "bird; rain", "bird"], ["wind;rain", "wind ; bird", "rain;rain", "Bird"])
# names, references, predictions, options, values by hand
BY_HAND = {
    "several labels": (["map", "macro-f1", "weighted-f1"], *TAGS, dict(normalizer="casefold", label_separator=";"), [5/6, 5/6, 5/6]), # bird has 1/2, the others 1
    "labels": (["accuracy", "macro-f1", "weighted-f1"], ["a", "a", "a", "b"], ["a", "a", "x", "a"], {}, [1/2, 1/3, 1/2]), # a: precision and recall of 2/3; b: 0
    "nothing named": (["map", "macro-f1"], ["a|b", "a"], ["", "c"], dict(label_separator="|"), [3/4, 0]), # the share of rows with each label
    "rates": (["wer", "cer", "exact"], ["ab cd", "ef"], ["ab ce", "ef"], {}, [1/3, 1/7, 1/2]),
    "choices": (["choice"], ["A", "(B)", "C. a horn", "D", "B"], ["a)", "The answer is B.", "a horn", "A dog", ""], {}, [3/5]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_values_by_hand(tmp_path, name):
    names, refs, preds, options, values = BY_HAND[name]
    out, given = files(tmp_path, refs, preds)
    report = evaluate(EvalSettings(input=out, reference=given, metric=names, **options))
    assert [v.value for v in report.values] == pytest.approx(values)
    assert list(json.loads(json.dumps(report.to_dict(), allow_nan=False))["metrics"]) == names
    assert str(report.values[0]) in str(report)


def drawn(n, seed=0):
    "Labels, a few of them wrong, by a generator that is the same everywhere: numbers below `n`"
    numbers = []
    for _ in range(400):
        seed = (1103515245 * seed + 12345) % 2**31
        numbers.append(seed // 65536 % n)
    return numbers


def test_as_scikit_learn():
    "Values of scikit-learn 1.9.1: f1_score(labels=those of the references), and average_precision_score of 0 and 1, macro"
    refs, noise = [f"l{i * i // 7}" for i in drawn(7)], drawn(3, 5)
    preds = [r if n else f"l{i}" for r, n, i in zip(refs, noise, drawn(9, 9))]
    [macro, weighted] = measure(["macro-f1", "weighted-f1"], Texts(refs, preds, score(refs, preds)))
    several = [f"{r};{s}" for r, s in zip(refs, refs[1:] + refs[:1])]
    named = [f"{p};{q}" for p, q in zip(preds, preds[7:] + preds[:7])]
    found = measure(["macro-f1", "weighted-f1", "map"], Texts(several, named, score(several, named), "none", ";"))
    assert [v.value for v in (macro, weighted, *found)] == pytest.approx([0.752346821897604, 0.7711611779948043, 0.5506661555989115, 0.6007423910062648, 0.46312334556136214])


def test_captions_as_sacrebleu():
    refs, preds = ["a dog barks at a passing car", "rain falls on a tin roof", "a man speaks"], ["a dog barks at a car", "rain is falling on a roof", ""]
    [bleu, chrf] = measure(["bleu", "chrf"], Texts(refs, preds, score(refs, preds)))
    assert bleu.value == pytest.approx(sacrebleu.corpus_bleu(preds, [refs]).score)
    assert chrf.value == pytest.approx(sacrebleu.corpus_chrf(preds, [refs]).score)
    assert str(bleu) == "BLEU: 34.23"


def test_rouge_as_rouge_score():
    "The figures are those of rouge-score 0.1.2: RougeScorer(['rougeL']).score(reference, prediction)['rougeL'].fmeasure"
    rows = [("a dog barks at a passing car", "a dog barks at a car", 12 / 13), ("rain falls on a tin roof", "rain is falling on a roof", 2 / 3),
            ("A man's voice, then a door-bell (twice).", "a door bell; then a man s voice", 8 / 17), ("birds sing", "", 0), ("wind", "Wind!", 1),
            ("a b c d", "d c b a", 1 / 4), ("a a a b", "a b a a", 3 / 4), ("!!", "x", 0)]
    refs, preds, expected = zip(*rows)
    assert row_rouge_l(compared_texts(refs, preds)) == pytest.approx(expected)
    assert measure(["rouge-l"], compared_texts(refs, preds))[0].value == pytest.approx(np.mean(expected))
    assert row_rouge_l(compared_texts(["狗在叫，下雨了", "Straße 5", "snake_case"], ["下雨 狗叫", "straße", "snake case"])) == pytest.approx([.4, 2 / 3, 1])


@pytest.mark.parametrize("names, order, text", [
    (["map"], [1, 2], "F1 of its labels 0%"), (["macro-f1", "wer"], [1, 2], "F1 of its labels 0%"), (["wer", "map"], [0, 1, 2], "WER 100%"),
    (["cer"], [1, 0, 2], "CER 75%"), (["bleu"], [1, 0, 2], "BLEU 0.0"), (["rouge-l"], [1, 0, 2], "ROUGE-L 0%"), ([], [0, 1, 2], "WER 100%")])
def test_worst_rows_by_the_first_metric(tmp_path, names, order, text):
    "The first row has its labels in another order, the second another label, the third one of two"
    rows = [("rain; wind", "wind; rain"), ("bird", "siren"), ("car; horn; dog", "car; horn"), ("dog", "dog")]
    for i, name in enumerate(("in.csv", "out.csv")):
        (tmp_path / name).write_text("audio,prediction\n" + "".join(f"{n}.wav,{r[i]}\n" for n, r in enumerate(rows)))
    report = evaluate(EvalSettings(input=tmp_path / "out.csv", reference=tmp_path / "in.csv", metric=names, label_separator=";"))
    assert (report.by_label, report.worst()) == (False, order)
    assert text in str(report) and report.to_dict()["worst"][0]["line"] == order[0] + 2


@pytest.mark.parametrize("text, letter", [("B", "B"), ("b", "B"), ("(b)", "B"), ("**B**", "B"), ("B: a horn", "B"), ("The answer is: (B)", "B"), ("the correct option is B, a horn.", "B"),
    ("It must be B.", "B"), ("B horn", "B"), ("A", "A"), ("A dog", ""), ("I think so", ""), ("the answer is a dog", ""), ("", "")])
def test_letters(text, letter): assert find_choice(text)[0] == letter


OWN = """
def share(references, predictions): return sum(map(str.__eq__, references, predictions))/len(references)
def two(references, predictions): return dict(rows=len(references), first=len(predictions[0]))
def fails(references, predictions): return 1/0
def text(references, predictions): return "good"
number = 1
"""


def test_own_metrics(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"mine_of_test.py").write_text(OWN)
    out, given = files(tmp_path, ["Ab", "c"], ["ab", "d"])
    report = evaluate(EvalSettings(input=out, reference=given, metric="mine_of_test:share,mine_of_test:two", normalizer="casefold"))
    assert [(v.metric.name, v.value, v.raw) for v in report.values] == [("mine_of_test:share", .5, 0), ("rows", 2, 2), ("first", 2, 2)]
    for name, message in [("mine_of_test:fails", "ZeroDivisionError: division by zero .mine_of_test.py, line 4"), ("mine_of_test:text", "returned 'good', expected a number"),
            ("mine_of_test:number", "has no function number"), ("mine_of_test:", "has no function"), ("no_such_one:f", "cannot import no_such_one"), ("werr", "got 'werr', expected exact.accuracy"),
            ("map", "give --label-separator")]:
        with pytest.raises(SystemExit) as e: mdl_eval([str(out), "--reference", str(given), "--metric", name])
        assert e.value.code == 2
        err = capsys.readouterr().err
        assert re.search(message, err) and len(err.splitlines()) == 1


# Intervals and parts

def test_intervals_as_the_binomial_distribution():
    for n, right in [(400, 360), (2000, 1000)]:
        share = right / n
        low, high = bootstrap_interval(Metric("exact", "exact match", row_share([i < right for i in range(n)])), n)
        half = 1.96 * (share * (1 - share) / n) ** 0.5
        assert (low, high) == pytest.approx((share - half, share + half), abs=half / 8)


@pytest.mark.parametrize("names, separator", [(["wer", "macro-f1", "weighted-f1", "bleu"], None), (["map", "macro-f1"], " ")])
def test_weights_are_repetitions(names, separator):
    "A row with weight 2 counts like two rows, one with weight 0 like none"
    refs, preds = ["a b c d e", "a b", "c", "d e f g h"], ["a b d d e", "a", "c b", "d e f g"]
    [once, twice] = [[2, 0, 1, 3], [1, 1, 1, 1]]
    repeated = [[t for t, n in zip(texts, once) for _ in range(n)] for texts in (refs, preds)]
    metrics = load_metrics(names, Texts(refs, preds, score(refs, preds), "none", separator))
    for m, expected in zip(metrics, measure(names, Texts(*repeated, score(*repeated), "none", separator))):
        values = m.value(np.array([once, twice]))
        assert values.tolist() == pytest.approx([expected.value, float(m.value(np.array(twice)))])


def test_report_by_column(tmp_path):
    "A key of either file, of tables and of records; every part's metrics are those of a file of its rows"
    rows = [("a", "a", "x"), ("b", "a", "y<b>"), ("b", "b", "x"), ("a", "a", "x")]
    (tmp_path/"in.csv").write_text("audio,prediction,who\n" + "".join(f"{i}.wav,{r},{who}\n" for i, (r, _, who) in enumerate(rows)))
    (tmp_path/"out.jsonl").write_text("".join(json.dumps(dict(audio=f"{i}.wav", prediction=p, room=i % 2)) + "\n" for i, (_, p, _) in enumerate(rows)))
    given = dict(input=tmp_path/"out.jsonl", reference=tmp_path/"in.csv")
    report = evaluate(EvalSettings(by="who", **given))
    assert [(p["part"], p["rows"], p["values"]["exact"], p["values"]["wer"]) for p in report.parts] == [("x", 3, 1, 0), ("y<b>", 1, 0, 1)]
    assert "y<b>" in str(report) and "y<b>" not in report._repr_html_() and "y&lt;b&gt;" in report._repr_html_()
    d = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (d["by"], d["parts"][0]["part"], d["metrics"]["exact"]["value"]) == ("who", "x", .75) and d["metrics"]["exact"]["interval"][1] == 1
    assert [(p["part"], p["rows"]) for p in evaluate(EvalSettings(by="room", metric="accuracy", max_labels=1, **given)).parts] == [("0", 2), ("1", 2)]
    with pytest.raises(InputError, match="--by mood: no such column in .*in.csv or .*out.jsonl"): evaluate(EvalSettings(by="mood", **given))
