"Two files of answers, or two trainings: tests that agree with published ones, and rows that one answers better"
import json
import math
import re

import numpy as np
import pytest

from mdl_nbdev import CompareSettings, compare
from mdl_nbdev.base.errors import InputError
from mdl_nbdev.cli.commands import mdl_compare
from mdl_nbdev.data.intervals import bootstrap_interval, draw_rows
from mdl_nbdev.data.named_metrics import METRICS, Metric, row_ratio, row_share
from mdl_nbdev.data.sounds import make_sounds
from mdl_nbdev.infer.pairs import mcnemar, paired_bootstrap


@pytest.mark.parametrize("a, b, p", [(5, 20, 0.004077315330505371), (10, 12, 0.8318119049072266), (0, 1, 1.), (1, 12, 0.00341796875), (101, 59, 0.001122905196234038)])
def test_mcnemar(a, b, p): # the values of statsmodels' mcnemar(exact=True)
    assert mcnemar(a, b) == mcnemar(b, a) == pytest.approx(p, rel=1e-6)


def test_mcnemar_by_its_definition():
    for a in range(12):
        for b in range(12):
            n, k = a + b, min(a, b)
            assert mcnemar(a, b) == pytest.approx(min(1., 2*sum(math.comb(n, i) for i in range(k + 1))/2**n))


def test_bootstrap_of_a_difference():
    "The interval of a difference of means is known: 1.96 standard errors of the rows' differences; the other interval, of separate draws, is far wider"
    rng = np.random.default_rng(0)
    hard = rng.random(4000)
    a, b = (rng.random(4000) > hard for _ in range(2))
    b[:100] = True
    low, high, p = paired_bootstrap(*(Metric("exact", "exact match", row_share(x)) for x in (a, b)), 4000)
    d = b.astype(float) - a
    assert (low, high) == pytest.approx((d.mean() - 1.96*d.std()/4000**.5, d.mean() + 1.96*d.std()/4000**.5), abs=.0015)
    assert paired_bootstrap(*(Metric("exact", "exact match", row_share(a)) for _ in range(2)), 4000) == (0., 0., 1.)
    edits, words = rng.poisson(1, 500), rng.integers(5, 20, 500)
    fewer = np.maximum(edits - (rng.random(500) < .2), 0)
    m, n = (Metric("wer", "word error rate", row_ratio(e, words)) for e in (edits, fewer))
    low, high, p = paired_bootstrap(m, n, 500)
    assert low < (fewer.sum() - edits.sum())/words.sum() < high < 0 and p == pytest.approx(2/2001)
    stats = pytest.importorskip("scipy.stats")
    def difference(e, f, w, axis): return (f.sum(axis) - e.sum(axis))/w.sum(axis)
    found = stats.bootstrap((edits, fewer, words), difference, paired=True, n_resamples=4000, method="percentile", rng=1).confidence_interval
    assert (low, high) == pytest.approx((found.low, found.high), abs=.0015)


def test_equal_models_are_rarely_called_different():
    rng = np.random.default_rng(1)
    values = [paired_bootstrap(*(Metric("exact", "", row_share(rng.random(200) < .8)) for _ in range(2)), 200, draws=400)[2] for _ in range(200)]
    assert .01 < np.mean(np.array(values) < .05) < .11


def test_draws_are_those_of_intervals():
    metric, rows = Metric("exact", "", row_share(np.arange(90) % 3 > 0)), list(draw_rows(90, 1000, 0))
    assert sum(map(len, rows)) == 1000 and all((w.sum(1) == 90).all() for w in rows)
    assert bootstrap_interval(metric, 90) == tuple(np.percentile(metric.value(np.concatenate(rows)), [2.5, 97.5]))


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = make_sounds(".", 40)
    header, *rows = path.read_text().splitlines()
    def write(name, wrong):
        cells = [r.split(",") for r in rows]
        answers = [f"{audio},{'<b>noise</b>' if i in wrong else label}" for i, (audio, label) in enumerate(cells)]
        (tmp_path/name).write_text("\n".join([header, *answers]) + "\n")
        return name
    return dict(a=write("a.csv", range(12)), b=write("b.csv", [0, 1, 2, 30]), reference=str(path))


def test_answers(files, capsys):
    found = compare(**files)
    exact, wer, cer = found.values
    assert (exact.a, exact.b, exact.test, exact.p) == (.7, .9, "McNemar", mcnemar(1, 9))
    assert wer.test == cer.test == "bootstrap" and wer.b - wer.a < 0 and wer.interval[0] < wer.b - wer.a < wer.interval[1]
    assert found.summary()[-1] == f"40 rows in {files['reference']}: A is right and B wrong in 1, B is right and A wrong in 9"
    assert [r.line for r in found.better["A"]] == [32] and sorted(r.line for r in found.better["B"]) == list(range(5, 14))
    assert all(r.right == side for side, rows in found.better.items() for r in rows)
    shown = found._repr_html_()
    assert shown.count("<audio") == 10 and "<b>noise" not in shown and "&lt;b&gt;noise" in shown
    with pytest.raises(SystemExit) as e: mdl_compare(["a.csv", "b.csv", "--reference", files["reference"], "--metric", "accuracy,macro-f1", "--output", "c.json"])
    out = capsys.readouterr().out
    assert not e.value.code and re.search(r"accuracy +70.00% +90.00% +\+20.00 points +\+\S+ to \+\S+ +0.021 \(McNemar\)", out) and "macro F1" in out and "better in B" in out
    saved = json.loads(open("c.json").read())
    assert saved["metrics"]["accuracy"]["difference"] == pytest.approx(.2) and len(saved["better"]["B"]) == 9


def test_texts_are_compared_by_their_errors(tmp_path):
    "Where neither is right, the one with fewer wrong characters is better"
    def write(name, texts):
        (tmp_path/name).write_text("user_prompt,prediction\n" + "".join(f"Say {i}.,{t}\n" for i, t in enumerate(texts)))
        return tmp_path/name
    refs = ["the cat sat on the mat", "a dog", "One two."]
    found = compare(write("a.csv", ["the cat sat", "a dig", "one two"]), write("b.csv", ["the cat sat on a mat", "a fox", "One two."]), reference=write("r.csv", refs))
    assert [(r.line, r.right) for r in found.better["B"]] == [(4, "B"), (2, "")] and [(r.line, r.right) for r in found.better["A"]] == [(3, "")]
    assert found.summary()[-1] == "where both are wrong, A is closer in 1 row and B in 1"
    alike = compare(tmp_path/"a.csv", tmp_path/"b.csv", reference=tmp_path/"r.csv", normalizer="casefold")
    assert "normalizer: casefold" in str(alike) and [r.line for r in alike.better["B"]] == [4, 2]


def test_metrics_without_an_interval(files):
    pytest.importorskip("sacrebleu")
    chrf, = compare(**files, metric=["chrf"]).values
    assert chrf.p is chrf.interval is None and chrf.cells()[-2:] == ["", ""]
    assert set(METRICS) >= {"exact", "accuracy", "choice"}


def run_folder(folder, **settings):
    folder.mkdir()
    (folder/"config.json").write_text(json.dumps(dict(output=str(folder), lr=1e-4, seed=1, prompt="<i>?</i>") | settings))
    losses = [dict(step=s, loss=settings.get("lr", 1)/s, learning_rate=.1, time=s) for s in (1, 10, 20)]
    (folder/"metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in [*losses, dict(step=20, eval_loss=2., eval_wer=.5, eval_runtime=3.)]))
    return folder


def test_trainings(tmp_path):
    a, b = run_folder(tmp_path/"a"), run_folder(tmp_path/"b", lr=.5, prompt="<script>x</script>", extra=True)
    found = compare(a, b, output=tmp_path/"c.json")
    assert [row[0] for row in found.changed()] == ["--lr", "--prompt", "--extra"] and found.names() == ["loss", "eval_loss", "eval_wer"]
    assert [row[0] for row in found.figures()] == ["loss, last", "eval loss, last", "eval loss, lowest", "eval wer, last"]
    shown = found._repr_html_()
    assert shown.count("<img") == 3 and "<script>x" not in shown and "A 0.05" in re.sub(r"\s+", " ", re.sub("<[^>]*>", "", shown))
    assert json.loads((tmp_path/"c.json").read_text())["settings"]["--lr"] == dict(a="0.0001", b="0.5")


def test_refused(files, tmp_path):
    a, run = files["a"], run_folder(tmp_path/"run")
    for args, message in {
        (a, str(run)): "one is a folder", (a, files["b"]): "--reference: name the file", (str(run), str(tmp_path)): "config.json: no such file",
        (a, "gone.csv", files["reference"]): "gone.csv: No such file", (a, files["reference"], files["reference"]): "this is the reference itself"}.items():
        with pytest.raises(InputError, match=message): compare(args[0], args[1], **(dict(reference=args[2]) if args[2:] else {}))
    with pytest.raises(InputError, match="two trainings are compared without"): compare(run, run, reference=a)
    with pytest.raises(InputError, match="this run would replace its own input"): compare(CompareSettings(**files, output=a, overwrite=True))
