"The mean log-probability of answers: that of one slow pass over each, whatever chooses the tokens; and how well such numbers are calibrated"
import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_engine import MODELS
from test_label_scores import model_and_prompts

from mdl_nbdev import InferSettings, infer
from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.settings import EvalSettings
from mdl_nbdev.cli.inference import InferView
from mdl_nbdev.data.sounds import make_sounds
from mdl_nbdev.infer.calibration import Calibration, choice_probabilities
from mdl_nbdev.infer.evaluate import evaluate
from mdl_nbdev.model.collate import Collator
from mdl_nbdev.model.engine import GenerationOptions, Request, TransformersEngine

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=[*MODELS, "qwen2_audio"])
def parts(request, tmp_path_factory): return model_and_prompts(request.param, tmp_path_factory.mktemp)


def generated(model, chat, prompts, stop, size=4, **options):
    "Completions with one end token"
    engine = TransformersEngine(model, chat, GenerationOptions(logprobs=True, **options), size)
    engine.stops = [stop]
    return sorted(engine.generate(Request(n, e, 9) for n, e in enumerate(prompts)), key=lambda c: c.key)


def slow(model, chat, prompt, ids):
    "The log-probabilities of tokens after a prompt, from one pass over all of them"
    whole = np.concatenate([prompt.input_ids, np.array(ids, np.int32)])
    inputs = Collator(chat.pad_id, chat.family)([replace(prompt, input_ids=whole, labels=np.full(len(whole), -100, np.int32))]).inputs
    del inputs["labels"]
    with torch.no_grad(): logprobs = model(**inputs).logits[0].float().log_softmax(-1)
    return [float(logprobs[i, t]) for i, t in enumerate(ids, len(prompt.input_ids) - 1)]


@pytest.mark.parametrize("options", [{}, dict(repetition_penalty=1.5), dict(do_sample=True, temperature=1.7, top_p=.8), dict(do_sample=True, temperature=.5, repetition_penalty=1.3)], ids=str)
def test_the_confidence_is_that_of_a_slow_pass(parts, options):
    "By the model itself, before temperature, top-p and penalty; with the end token where there is one"
    model, chat, prompts = parts
    stop = generated(model, chat, prompts, -1, **options)[0].ids[4] # a token that comes
    found = generated(model, chat, prompts, stop, **options)
    assert not found[0].truncated and len(found[0].ids) <= 4
    for c in found:
        expected = slow(model, chat, prompts[c.key], c.ids + [stop]*(not c.truncated))
        np.testing.assert_allclose(c.logprobs, expected, atol=1e-4)
        assert c.confidence == pytest.approx(np.mean(expected), abs=1e-4) and c.confidence < 0


def test_batches_make_no_difference(parts):
    model, chat, prompts = parts
    stop = generated(model, chat, prompts, -1)[0].ids[4]
    many, few = (generated(model, chat, prompts, stop, size=size) for size in (4, 1))
    assert [c.ids for c in many] == [c.ids for c in few]
    np.testing.assert_allclose([c.confidence for c in many], [c.confidence for c in few], atol=1e-4)


@pytest.fixture(scope="module")
def here(tmp_path_factory): return make_sounds(tmp_path_factory.mktemp("sounds"), 12, seed=1)


def rows(path):
    with open(path, newline="") as f: return list(csv.DictReader(f))


def test_the_column(here, tmp_path):
    "Beside the answers, which it does not change; a run resumes with it alone, and a row without an answer has none"
    s = InferSettings(input=here, base_dir=here.parent, output=tmp_path/"a.csv", model_name="tiny", batch_size=4, max_new_tokens=6, confidence=True)
    view, plain_view = InferView(s.output), InferView(s.output)
    infer(s, [view.add])
    infer(replace(s, output=tmp_path/"plain.csv", confidence=False), [plain_view.add])
    found, plain = rows(tmp_path/"a.csv"), rows(tmp_path/"plain.csv")
    assert [{k: v for k, v in r.items() if k != "confidence"} for r in found] == plain
    assert all(float(r["confidence"]) < 0 for r in found) and len({r["confidence"] for r in found}) > 6
    assert "confidence" in view.latest() and found[-1]["confidence"] in view.latest() and "confidence" not in plain_view.latest()
    infer(replace(s, output=tmp_path/"b.csv", batch_size=1))
    assert [float(r["confidence"]) for r in rows(tmp_path/"b.csv")] == pytest.approx([float(r["confidence"]) for r in found], abs=1e-4)
    (tmp_path/"bad.csv").write_text("audio,prediction\nnowhere.wav,x\n")
    infer(replace(s, input=tmp_path/"bad.csv", output=tmp_path/"c.csv"))
    assert rows(tmp_path/"c.csv")[0]["confidence"] == ""


@pytest.mark.parametrize("options, message", [(dict(num_beams=2), "--confidence: is not known for a beam search"), (dict(labels="auto"), "--labels: .*leave out --confidence")])
def test_where_there_is_none(options, message):
    with pytest.raises(InputError, match=message): InferSettings(input="a.csv", output="b.csv", model_name="tiny", confidence=True, **options)


def test_an_earlier_version_knew_no_confidence(here, tmp_path):
    "Its unfinished runs go on"
    from mdl_nbdev.infer.identity import identity_changes, run_identity
    now = run_identity(InferSettings(input=here, output="a.csv", model_name="tiny"))
    before = now | dict(settings={k: v for k, v in now["settings"].items() if k != "confidence"})
    assert identity_changes(before, now) == []
    with_it = run_identity(InferSettings(input=here, output="a.csv", model_name="tiny", confidence=True))
    assert identity_changes(before, with_it) == ["--confidence was False and is True"]


def slow_error(p, right, bins=15):
    "Equations 2 and 3 of Guo et al. 2017, bin by bin"
    total = 0.
    for m in range(1, bins + 1):
        inside = [i for i, q in enumerate(p) if (m - 1)/bins < q <= m/bins]
        if inside: total += len(inside)/len(p)*abs(np.mean([right[i] for i in inside]) - np.mean([p[i] for i in inside]))
    return total


def made_up(rows, choices, times, seed):
    "Choices drawn from probabilities, which are then made surer by a factor"
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (rows, choices))
    drawn = np.array([rng.choice(choices, p=np.exp(x)/np.exp(x).sum()) for x in logits])
    order = np.argsort(-logits, axis=1)
    return Calibration(np.take_along_axis(times*logits, order, 1), np.argmax(order == drawn[:, None], axis=1))


@pytest.mark.parametrize("choices, times", [(2, 1.), (10, 2.5), (4, .5)])
def test_error_and_temperature(choices, times):
    c = made_up(3000, choices, times, seed=choices)
    assert c.error == pytest.approx(slow_error(c.probabilities, c.right == 0), abs=1e-12)
    def loss(t): return -np.log(choice_probabilities(c.logits/t)[np.arange(len(c.right)), c.right]).mean()
    temperature, grid = c.fit_temperature(), np.geomspace(.1, 10, 2001)
    assert temperature == pytest.approx(grid[np.argmin([loss(t) for t in grid])], rel=5e-3) and temperature == pytest.approx(times, rel=.1)
    other = made_up(3000, choices, times, seed=99)
    assert other.at(temperature).error < .035 and (times == 1. or other.at(temperature).error < other.error/2)
    assert (np.argmax(c.at(temperature).logits, 1) == 0).all(), "the answers stay"


def test_ends_of_bins():
    c = Calibration(np.log([[1/3, 2/3], [1, 1e-300], [1e-300, 1]]), np.array([0, 0, -1]))
    assert [b["rows"] for b in c.bins(3)] == [2, 1] and c.bins(3)[0]["probability"] == pytest.approx(1/6)
    assert Calibration(np.log([[2/3, 1/3], [.9, .1]]), np.array([0, 0])).fit_temperature() < .05, "right answers alone"
    assert Calibration(np.zeros((1, 2)), np.array([-1])).fit_temperature() == 1


def test_mdl_eval_shows_it(tmp_path):
    "From the probability, from the log-probabilities of all labels, from the confidence; an earlier file has nothing to show"
    def report(columns, **kw):
        for name, head, cells in (("refs.csv", "prediction", [["dog"], ["dog"], ["cat"], ["cow"]]), ("answers.csv", f"prediction,{','.join(columns)}", list(zip(["dog", "cat", "cat", "cat"], *columns.values())))):
            with open(tmp_path/name, "w", newline="") as f: csv.writer(f).writerows([["audio", *head.split(",")], *([f"{i}.wav", *c] for i, c in enumerate(cells))])
        return evaluate(EvalSettings(input=tmp_path/"answers.csv", reference=tmp_path/"refs.csv", output=tmp_path/"r.json", overwrite=True, **kw))
    r = report(dict(probability=[.9, .9, .6, ""]))
    assert "expected calibration error: 40.00% (mean probability 80.0%, exact match 66.7%)" in str(r) and "<img alt=\"expected calibration" in r._repr_html_()
    stored = json.loads((tmp_path/"r.json").read_text())["calibration"]
    assert stored["error"] == pytest.approx((2*abs(.5 - .9) + abs(1 - .6))/3) and [b["rows"] for b in stored["bins"]] == [1, 2]
    logs = [json.dumps(dict(cat=np.log(1 - p), dog=np.log(p))) for p in (.9, .1, .4, .3)]
    r = report(dict(probability=[.9, .9, .6, .7], margin=[.8, .8, .2, .4], log_probabilities=logs))
    assert r.calibration.right.tolist() == [0, 1, 0, -1] and r.calibration.probabilities == pytest.approx([.9, .9, .6, .7])
    assert report(dict(confidence=[np.log(.9), np.log(.5), 0, -1])).calibration.probabilities == pytest.approx([.9, .5, 1, np.exp(-1)])
    for columns in (dict(other=[1, 2, 3, 4]), dict(confidence=["high", "low", "", "low"]), dict(probability=[90, 80, 70, 60])): assert report(columns).calibration is None


def test_labels_scored_by_a_model(here, tmp_path):
    "From the run to the temperature"
    s = InferSettings(input=here, base_dir=here.parent, output=tmp_path/"a.csv", model_name="tiny", labels="auto", label_scores=True)
    infer(s)
    r = evaluate(EvalSettings(input=tmp_path/"a.csv", reference=here))
    assert r.calibration.logits.shape == (12, len({row["prediction"] for row in rows(here)})) and (r.calibration.right >= 0).all()
    assert [float(row["probability"]) for row in rows(tmp_path/"a.csv")] == pytest.approx(r.calibration.probabilities, abs=2e-4)
    assert ((r.calibration.right == 0) == r.scores.correct).all()
