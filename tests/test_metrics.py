"Normalizers and metrics by name, against pairs and figures made by hand"
import json
import subprocess
import sys

import pytest

from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.settings import NORMALIZERS, EvalSettings
from mdl_nbdev.cli.commands import mdl_eval
from mdl_nbdev.infer.evaluate import evaluate
from mdl_nbdev.infer.metrics import score
from mdl_nbdev.infer.normalizers import normalize_texts

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
