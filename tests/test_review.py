"Wrong labels are found, by models that have not seen their rows, whatever interrupts the review"
import csv
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mdl_nbdev import ReviewReport, ReviewSettings, TrainSettings, review
from mdl_nbdev.base.command_line import from_args, parser
from mdl_nbdev.base.errors import InputError
from mdl_nbdev.cli.commands import mdl_review
from mdl_nbdev.data.rows import BadRow
from mdl_nbdev.data.sounds import make_sounds
from mdl_nbdev.data.sources import open_rows
from mdl_nbdev.infer.label_errors import assign_folds, doubtful_labels, label_margins, rank_labels
from mdl_nbdev.infer.review import Review, ReviewedRow

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = dict(model_name="tiny", lr=2e-3, lr_scheduler_type="cosine", warmup_steps=.1, batch_size=16, gradient_checkpointing=False)


def spoil(path, share=.05, seed=0):
    "Give some rows another label; returns their lines"
    header, *rows = path.read_text().splitlines()
    labels, chosen = sorted({r.split(",")[1] for r in rows}), random.Random(seed)
    bad = chosen.sample(range(len(rows)), round(share*len(rows)))
    for i in bad:
        audio, label = rows[i].split(",")
        rows[i] = f"{audio},{chosen.choice([other for other in labels if other != label])}"
    path.write_text("\n".join([header, *rows]) + "\n")
    return {i + 2 for i in bad}


# --- The formula

def made(seed, n=600):
    "Labels of which 8 % are drawn anew, and probabilities of a model with another accuracy for each label"
    k, rng = [3, 5, 8, 2, 10, 4][seed], np.random.default_rng(seed)
    true = rng.integers(0, k, n)
    z = np.exp(rng.normal(0, 1, (n, k)) + 3*np.eye(k)[true]*rng.uniform(.4, 1.2, k))
    given, bad = true.copy(), rng.random(n) < .08
    given[bad] = rng.integers(0, k, bad.sum())
    return given, z/z.sum(1, keepdims=True), given != true


@pytest.mark.parametrize("seed, found", enumerate([32, 33, 45, 24, 39, 38])) # as many as cleanlab 2.9.0 finds
def test_doubtful_labels_are_those_of_cleanlab(seed, found):
    given, p, wrong = made(seed)
    doubtful = doubtful_labels(given, p)
    assert doubtful.sum() == found
    order = rank_labels(given, p)
    assert wrong[order[:60]].sum() > .7*wrong.sum() and set(order[:found]) == set(np.flatnonzero(doubtful))
    filters, ranks = pytest.importorskip("cleanlab.filter"), pytest.importorskip("cleanlab.rank")
    assert (doubtful == filters.find_label_issues(given, p, filter_by="confident_learning", n_jobs=1)).all()
    assert (label_margins(given, p) + 1)/2 == pytest.approx(ranks.get_label_quality_scores(given, p, method="normalized_margin"))


def test_folds():
    rng = np.random.default_rng(0)
    labels = [str(x) for x in rng.choice(7, 500, p=[.4, .2, .2, .1, .06, .03, .01])]
    groups = [f"speaker {x}" for x in rng.integers(0, 40, 500)]
    for seed in range(3):
        plain, grouped = assign_folds(labels, 5, seed), assign_folds(labels, 5, seed, groups)
        assert (plain == assign_folds(labels, 5, seed)).all() and (grouped == assign_folds(labels, 5, seed, groups)).all()
        for label in set(labels):
            counts = np.bincount(plain[np.array(labels) == label], minlength=5)
            assert counts.max() - counts.min() <= 1, "equal shares of each label"
        assert np.ptp(np.bincount(plain)) <= 5
        assert all(len(set(grouped[np.array(groups) == g])) == 1 for g in set(groups)), "a group is in one fold"
        shares = np.array([np.bincount(grouped[np.array(labels) == label], minlength=5) for label in "01"])
        assert (shares/shares.sum(1, keepdims=True)).min() > .1
    assert (assign_folds(labels, 5, 0) != assign_folds(labels, 5, 1)).any()


# --- A review

@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    path = make_sounds(tmp_path_factory.mktemp("sounds"), 24)
    s = ReviewSettings(input=path, output=path.parent/"whole.csv", base_dir=path.parent, folds=2, max_steps=2, **TINY)
    return s, review(s)


def test_output(sounds, capsys):
    s, report = sounds
    rows, given = list(csv.DictReader(s.output.open())), {r.line: r for r in open_rows(s.input).rows()}
    assert list(rows[0]) == list(ReviewedRow._fields) and [r["rank"] for r in rows] == [str(i + 1) for i in range(24)]
    assert {int(r["line"]) for r in rows} == set(given), "every row is in the list"
    for r in rows:
        row = given[int(r["line"])]
        assert (r["audio"], r["label"]) == (row.audio, row.prediction)
        assert float(r["suggestion_probability"]) >= float(r["probability"]) and r["doubtful"] in ("true", "false")
    assert not Path(f"{s.output}.folds").exists() and report.input == s.input
    assert str(report).count("\n") > 4 and "scored by 2 models, each on rows that it was not trained on" in str(report)
    assert report._repr_html_().count("<audio") == len((report.doubtful or report.rows)[:20])
    with pytest.raises(InputError, match="exists already"): review(s)


class Killed(BaseException): pass


def test_interrupted_review_continues(sounds, monkeypatch):
    s, report = sounds
    s = replace(s, output=s.input.parent/"again.csv")
    from mdl_nbdev.train import run
    train, trained, score = run.train, [], Review.score_fold
    def counting(settings, **kw):
        trained.append(settings.output.name)
        return train(settings, **kw)
    def killed(self, fold):
        if fold: raise Killed
        score(self, fold)
    monkeypatch.setattr(run, "train", counting)
    monkeypatch.setattr(Review, "score_fold", killed)
    with pytest.raises(Killed): review(s)
    assert trained == ["fold-1"] and not s.output.exists()
    changed = replace(s, lr=1e-3)
    with pytest.raises(InputError, match="again.csv.folds: holds an unfinished review that cannot be continued: --lr was 0.002 and is 0.001. .*--overwrite true"): review(changed)
    monkeypatch.setattr(Review, "score_fold", score)
    assert [r[:4] for r in review(s).rows] == [r[:4] for r in report.rows]
    assert trained == ["fold-1", "fold-2"], "a finished fold is not trained again"
    assert s.output.read_bytes() == sounds[0].output.read_bytes()


def test_folds_train_on_the_other_rows(sounds, monkeypatch):
    s, _ = sounds
    s = replace(s, output=s.input.parent/"rows.csv", folds=3, group="prediction")
    from mdl_nbdev.train import run
    rows = []
    def train(settings, choose):
        from mdl_nbdev.model.families import load_chat
        from mdl_nbdev.train.prepare import open_mixes
        mix, _ = open_mixes(settings, load_chat("tiny"))
        rows.append([line for _, line in choose(mix).where(np.arange(len(choose(mix))))])
        raise Killed
    monkeypatch.setattr(run, "train", train)
    work = Review(s)
    work.begin()
    for fold in range(3):
        with pytest.raises(Killed): work.train_fold(fold)
    for fold, trained in enumerate(rows):
        held = [r for r, f in zip(work.rows, work.fold_of) if f == fold]
        assert not set(trained) & {r.line for r in held} and len(trained) + len(held) == 24
        assert not {r.prediction for r in held} & {r.prediction for r in work.rows if r.line in trained}, "groups stay together"


def test_scores_of_a_given_model(sounds, tmp_path):
    "A row without a clip is listed, with the line that it has in the input; the others are ranked"
    path = make_sounds(tmp_path, 16)
    path.write_text(path.read_text().replace("sounds/0003.wav", "sounds/gone.wav"))
    with pytest.raises(SystemExit) as e: mdl_review([str(path), "--output", str(tmp_path/"r.csv"), "--base-dir", str(tmp_path), "--model-name", "tiny", "--folds", "0"])
    assert e.value.code == 2 and len((tmp_path/"r.csv").read_text().splitlines()) == 16
    report = review(ReviewSettings(input=path, output=tmp_path/"r.csv", base_dir=tmp_path, model_name="tiny", folds=0, overwrite=True))
    assert [(b.line, "gone.wav" in b.reason) for b in report.bad] == [(5, True)] and len(report.rows) == 15


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_other_kinds_of_files(kind, tmp_path):
    "Labels are the last answers of conversations; labels that differ in white space at their ends are the same"
    path = make_sounds(tmp_path, 16)
    rows = [dict(audio=r.audio, prediction=r.prediction + " "*(i % 2)) for i, r in enumerate(open_rows(path).rows())]
    given = tmp_path/f"rows{kind}"
    if kind == ".jsonl": given.write_text("".join(json.dumps(dict(audio=r["audio"], question="What is it?", answer=r["prediction"])) + "\n" for r in rows))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq
        pq.write_table(pa.Table.from_pylist(rows), given)
    report = review(ReviewSettings(input=given, output=tmp_path/"r.csv", base_dir=tmp_path, model_name="tiny", folds=0))
    assert len(report.rows) == 16 and len({r.suggestion for r in report.rows} | {r.label.strip() for r in report.rows}) == 8


# --- What is refused, and what is shown

def test_refused(tmp_path, monkeypatch):
    path = make_sounds(tmp_path, 16)
    s = dict(input=path, output=tmp_path/"r.csv", base_dir=tmp_path, model_name="tiny")
    for options, message in {
        "--folds 1: no rows would be left": dict(folds=1), "--folds: got -1": dict(folds=-1),
        "--folds 40: more than the file has": dict(folds=40), "--group speaker: no value": dict(group="speaker"),
        "this file is reviewed": dict(train_dataset=path)}.items():
        with pytest.raises(InputError, match=options): review(ReviewSettings(**s | message))
    different = tmp_path/"texts.csv"
    different.write_text("audio,prediction\n" + "".join(f"{i}.wav,text {i}\n" for i in range(9)))
    with pytest.raises(InputError, match="9 different answers in 9 rows, so they are not labels"): review(ReviewSettings(**s | dict(input=different)))
    different.write_text("audio,prediction\na.wav,dog\nb.wav,\n")
    with pytest.raises(InputError, match="texts.csv:3: the prediction is empty"): review(ReviewSettings(**s | dict(input=different)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process"): review(ReviewSettings(**s))
    assert not list(tmp_path.glob("r.csv*"))


def test_options_that_a_review_sets_itself():
    shown = parser(ReviewSettings, "mdl_review").format_help()
    for name in ("--merge-lora", "--dry-run", "--resume-from-checkpoint", "--allow-changes"):
        assert name not in shown and name in parser(TrainSettings, "mdl_train").format_help()
        with pytest.raises(InputError, match=f"unknown option {name}"):
            from_args(ReviewSettings, ["rows.csv", "--output", "r.csv", name, "true"], "mdl_review")


def test_texts_are_shown_as_texts(tmp_path):
    evil = "<script>alert(1)</script>"
    rows = [ReviewedRow(1, 2, f"{evil}.wav", evil, .1, f"<b>{evil}", .8, True)]
    s = ReviewSettings(input=tmp_path/f"{evil[:8]}.csv", output=tmp_path/"r.csv", model_name=evil, folds=0)
    report = ReviewReport(s.output, s.input, rows, 0, [evil], [BadRow(evil, 3, evil)], s)
    assert not re.search("<script|<b>", report._repr_html_().replace("<b>line", "")) and "&lt;script" in report._repr_html_()


@pytest.mark.slow
def test_spoiled_labels_are_found(tmp_path):
    path = make_sounds(tmp_path, 320, seed=3)
    spoiled = spoil(path)
    report = review(ReviewSettings(input=path, output=tmp_path/"r.csv", base_dir=tmp_path, folds=4, num_epochs=14, **TINY))
    found = {r.line for r in report.rows[:32]} & spoiled
    assert len(found) >= .9*len(spoiled)
