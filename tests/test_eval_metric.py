"The metric of answers during training: what it measures, which checkpoint it chooses, in several processes and after a kill"
import csv as csv_files
import json
import re
from dataclasses import replace

import pytest
from torch.nn import Parameter
from torch.optim import SGD
from training_runs import finish, history, kill_later, ranks, start, wait_until

from mdl_nbdev.base.command_line import from_args
from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.settings import EvalSettings, InferSettings, TrainSettings
from mdl_nbdev.cli.watch import watch
from mdl_nbdev.data.sounds import make_sounds
from mdl_nbdev.infer.evaluate import evaluate
from mdl_nbdev.infer.run import infer
from mdl_nbdev.model.families import load_chat
from mdl_nbdev.train.mix import open_mix
from mdl_nbdev.train.prepare import check_settings
from mdl_nbdev.train.report import TrainReport
from mdl_nbdev.train.run import train
from mdl_nbdev.train.samples import AnswerMetric
from mdl_nbdev.train.schedule import schedule_arguments
from mdl_nbdev.train.stopping import EarlyStopping

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    "Eight sounds, and the same with the labels of every other one swapped: a model that learns the sounds is ever surer of answers that are wrong there"
    table = make_sounds(tmp_path_factory.mktemp("sounds"), 8, seed=3)
    with open(table, newline="") as f: rows = list(csv_files.DictReader(f))
    labels = [r["prediction"] for r in rows]
    for i, r in enumerate(rows):
        if i % 2: r["prediction"] = next(label for label in labels[i:] + labels if label != labels[i])
    with open(table.with_name("spoiled.csv"), "w", newline="") as f:
        out = csv_files.DictWriter(f, rows[0])
        out.writeheader()
        out.writerows(rows)
    return table


def arguments(sounds, **kw):
    "Enough steps to learn eight sounds by heart"
    settings = dict(train_dataset=sounds, eval_dataset=sounds.with_name("spoiled.csv"), base_dir=sounds.parent, model_name="tiny", lr=4e-3, batch_size=4, num_epochs=16, eval_steps=4,
                    logging_steps=4, save_steps=1000, save_total_limit=1, lr_scheduler_type="constant", max_grad_norm=0.5, eval_metric="exact", sample_answers=0)
    return [str(x) for k, v in (settings | kw).items() for x in (f"--{k}", v)]


def evaluations(run): return [json.loads(line) for line in (run/"metrics.jsonl").read_text().splitlines() if "eval_loss" in line]


@pytest.fixture(scope="module")
def whole(sounds, tmp_path_factory):
    "A run in one process"
    run = tmp_path_factory.mktemp("whole")/"run"
    return train(from_args(TrainSettings, [*arguments(sounds), "--output", str(run)], "mdl_train"))


def test_the_metric_decides_where_the_loss_disagrees(whole, sounds, tmp_path):
    found = evaluations(whole.output)
    lowest = min(found, key=lambda m: m["eval_loss"])["step"]
    best = min(found, key=lambda m: (-m["eval_exact"], m["eval_loss"]))["step"]
    assert lowest != best and max(m["eval_exact"] for m in found) >= .375
    assert whole.best.name == f"checkpoint-{best}" and found[-1]["best_step"] == best
    assert {p.name for p in whole.output.glob("checkpoint-*")} == {f"checkpoint-{best}", f"checkpoint-{whole.steps}"}
    assert f", exact match {found[-1]['eval_exact']:.2%};" in str(whole)
    card = (whole.final/"README.md").read_text()
    assert f"| exact match | {found[-1]['eval_exact']:.2%} |" in card and "| normalizer of the answers | none |" in card


def test_the_loss_decides_without_a_metric(whole, sounds, tmp_path):
    "As it did before, with the same numbers"
    args = from_args(TrainSettings, [*arguments(sounds), "--output", str(tmp_path/"run")], "mdl_train")
    r = train(replace(args, eval_metric=None))
    losses = [(m["step"], m["eval_loss"]) for m in evaluations(r.output)]
    assert losses == [(m["step"], m["eval_loss"]) for m in evaluations(whole.output)], "answers change no step of a run"
    assert r.best.name == f"checkpoint-{min(losses, key=lambda x: x[1])[0]}"
    assert not {"best_step", "eval_exact"} & set(evaluations(r.output)[-1])


def test_mdl_eval_says_the_same(whole, sounds, tmp_path):
    "Of the model in `final/`, which is that of the last step"
    rows = sounds.with_name("spoiled.csv")
    infer(InferSettings(input=rows, base_dir=sounds.parent, model_name=str(whole.final), output=tmp_path/"a.csv", max_new_tokens=16))
    r = evaluate(EvalSettings(input=tmp_path/"a.csv", reference=rows))
    assert r.scores.exact == evaluations(whole.output)[-1]["eval_exact"]


def test_two_processes_are_one(whole, sounds, tmp_path):
    args = [*arguments(sounds, batch_size=2, eval_batch_size=3), "--output", tmp_path/"run"]
    runs = [start(args, tmp_path/f"log{i}", env=env) for i, env in enumerate(ranks(2))]
    printed = "".join(finish(process, tmp_path/f"log{i}") for i, process in enumerate(runs))
    assert printed.count("exact: measured on answers to 8 of 8 evaluation rows") == 1, "one process speaks for all"
    assert [(m["step"], m["eval_exact"], m["best_step"]) for m in evaluations(tmp_path/"run")] == [(m["step"], m["eval_exact"], m["best_step"]) for m in evaluations(whole.output)]


def test_killed_and_resumed(whole, sounds, tmp_path):
    log, run = tmp_path/"log", tmp_path/"run"
    again = [*arguments(sounds), "--output", run, "--resume_from_checkpoint", "true"]
    for _ in range(2):
        process = start(again, log)
        before = set(run.glob("checkpoint-*"))
        wait_until(lambda seen=before: set(run.glob("checkpoint-*")) - seen, process)
        kill_later(process, .5)
    finish(start(again, log), log)
    assert history(run) == history(whole.output)
    assert {p.name for p in run.glob("checkpoint-*")} == {p.name for p in whole.output.glob("checkpoint-*")}


def test_asked_to_stop_while_it_answers(sounds, tmp_path, monkeypatch):
    "The evaluation is left and made up for"
    args = from_args(TrainSettings, [*arguments(sounds, num_epochs=4, eval_batch_size=2), "--output", str(tmp_path/"run")], "mdl_train")
    expected = train(replace(args, output=tmp_path/"whole"))
    measure, asked = AnswerMetric.measure, []
    def stopped(self, trainer, at):
        if not asked: trainer.stop_requested = "SIGTERM"
        asked.append(trainer.state.global_step)
        return measure(self, trainer, at)
    monkeypatch.setattr(AnswerMetric, "measure", stopped)
    r = train(args)
    assert (r.stopped, asked, evaluations(args.output)) == ("SIGTERM", [4], []) and not r.whole
    r = train(replace(args, resume_from_checkpoint=True))
    assert r.whole and asked == [4, 4, 8] and history(args.output) == history(expected.output)


FOLLOWED = { # values and losses -> steps at which the best one changes, and where a patience of two stops
    "greater": (True, [(.1, 3), (.3, 4), (.2, 2), (.4, 5)], [1, 2, 2, 4], None),
    "smaller": (False, [(.9, 3), (.3, 4), (.2, 5), (.4, 1), (.2, 6)], [1, 2, 3, 3, 3], 5),
    "equal values: the lower loss is better": (True, [(0., 3), (0., 2), (.5, 4), (.5, 5), (.5, 3), (.5, 3)], [1, 2, 3, 3, 5, 5], None),
    "no better, no worse: early at 100 %": (True, [(1., .2), (1., .3), (1., .4)], [1, 1, 1], 3)}


@pytest.mark.parametrize("case", FOLLOWED)
def test_what_is_best(case):
    greater, seen, best, end = FOLLOWED[case]
    stop, found = EarlyStopping(2, "eval_x", greater), []
    for step, (value, loss) in enumerate(seen, 1):
        over = stop.update(value, step, loss)
        assert over == (step == end)
        found.append(stop.best_step)
        state = stop.state_dict()
        stop = EarlyStopping(2, "eval_x", greater)
        stop.load_state_dict(json.loads(json.dumps(state)))
    assert found == best


def test_another_metric_begins_anew():
    "A run that is resumed with `--allow-changes true` does not compare an error rate with a loss"
    stop = EarlyStopping(2)
    stop.load_state_dict(dict(best=.5, best_step=3, counter=1)) # as earlier versions saved it
    assert (stop.best, stop.best_step, stop.counter) == (.5, 3, 1)
    stop = EarlyStopping(2, "eval_wer")
    stop.load_state_dict(dict(best=.5, best_step=3, counter=1))
    assert (stop.best, stop.counter) == (None, 0)


@pytest.mark.parametrize("metric, mode", [("exact", "max"), ("wer", "min"), (None, "min")])
@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
def test_schedules_that_follow(kind, metric, mode):
    "The rate falls when the metric gets worse, whichever way that is"
    from transformers import get_scheduler
    s = TrainSettings(train_dataset="a.csv", eval_dataset="b.csv", output="r", eval_metric=metric, lr_scheduler_type=kind, scheduler_args=dict(patience=0, min_lr=1e-9))
    optimizer = SGD([Parameter()], lr=1)
    schedule = get_scheduler(kind, optimizer, scheduler_specific_kwargs=schedule_arguments(s, 100))
    assert schedule.mode == mode
    for value in (.5, .4, .3) if mode == "max" else (.3, .4, .5): schedule.step(value)
    assert optimizer.param_groups[0]["lr"] < 1


def text_mix(folder, counts, **kw):
    records = [dict(data_name=name, prompt=f"{name} {i}", answer=f"{name} {i}", **kw) for name, n in counts.items() for i in range(n)]
    (folder/"rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return open_mix([folder/"rows.jsonl"], load_chat("tiny-text"), folder/"data", model_name="tiny-text")


def settings(**kw): return TrainSettings(**dict(train_dataset="a.csv", eval_dataset="b.csv", output="r", model_name="tiny-text", eval_metric="exact") | kw)


def test_the_rows(tmp_path):
    "The same ones for a seed, whatever the batches and the processes; spread over the tasks; at most as many as there are"
    mix, chat = text_mix(tmp_path, dict(a=50, b=3, c=20)), load_chat("tiny-text")
    def rows(**kw): return AnswerMetric(settings(**kw), chat, mix).rows
    few = rows(eval_metric_rows=12)
    assert [r.task for r in few] == ["a", "b", "c"]*3 + ["a", "c"]*1 + ["a"]
    assert few == rows(eval_metric_rows=12, batch_size=3, output="x") and few != rows(eval_metric_rows=12, seed=1)
    assert len({r.row for r in rows()}) == len(rows()) == 73 and len(rows(eval_metric_rows=73)) == 73
    assert all(r.reference == mix[r.row].conversation.messages[-1]["content"][0]["text"] for r in few)
    metric = AnswerMetric(settings(eval_metric_rows=12, batch_size=5), chat, mix)
    assert metric.limit == 8 + max(r.tokens for r in few) and sorted(r for b in metric.batches for r in b) == sorted(few)
    lengths = [r.prompt_tokens for b in metric.batches for r in b]
    assert lengths == sorted(lengths, reverse=True)


def test_metrics_of_tasks_and_normalizers(tmp_path):
    mix, chat = text_mix(tmp_path, dict(a=4, b=2)), load_chat("tiny-text")
    metric = AnswerMetric(settings(), chat, mix)
    right = {r.row: r.reference for r in metric.rows}
    assert metric.values(right | {r.row: "?" for r in metric.rows if r.task == "b"}) == {"eval_exact": pytest.approx(4/6), "eval_exact_a": 1., "eval_exact_b": 0.}
    shouted = {row: text.upper() for row, text in right.items()}
    assert metric.values(shouted)["eval_exact"] == 0 and AnswerMetric(settings(eval_normalizer="casefold"), chat, mix).values(shouted)["eval_exact"] == 1
    assert AnswerMetric(settings(eval_metric="wer"), chat, mix).values({row: text + " ?" for row, text in right.items()})["eval_wer"] == .5


def test_a_metric_of_your_own(tmp_path, monkeypatch):
    "The first of several numbers; smaller is better if the function says so"
    monkeypatch.chdir(tmp_path)
    (tmp_path/"my_errors.py").write_text("def errors(references, predictions): return dict(wrong=sum(map(str.__ne__, references, predictions)), rows=len(references))\n"
                                         "errors.greater_is_better = False\ndef hits(references, predictions): return 1.\ndef broken(references, predictions): return 'many'\n")
    mix, chat = text_mix(tmp_path, dict(a=3)), load_chat("tiny-text")
    metric = AnswerMetric(settings(eval_metric="my_errors:errors"), chat, mix)
    assert metric.values({r.row: "?" for r in metric.rows}) == {"eval_my_errors:errors": 3.}
    check_settings(settings(eval_metric="my_errors:errors", train_dataset=tmp_path/"rows.jsonl", eval_dataset=tmp_path/"rows.jsonl"))
    from mdl_nbdev.train.stopping import followed_metric
    assert followed_metric(settings(eval_metric="my_errors:errors")) == ("eval_my_errors:errors", False)
    assert followed_metric(settings(eval_metric="my_errors:hits")) == ("eval_my_errors:hits", True)
    with pytest.raises(InputError, match="--eval-metric my_errors:broken: returned 'many'"): AnswerMetric(settings(eval_metric="my_errors:broken"), chat, mix)


def test_plain_text_has_no_answers(tmp_path):
    (tmp_path/"t.jsonl").write_text('{"text": "once upon a time"}\n')
    mix = open_mix([tmp_path/"t.jsonl"], load_chat("tiny-text"), tmp_path/"data", model_name="tiny-text")
    with pytest.raises(InputError, match="--eval-metric exact: the evaluation data is plain text"): AnswerMetric(settings(), load_chat("tiny-text"), mix)


BAD = {
    "no evaluation": (dict(eval_dataset=[]), "--eval-metric exact: needs evaluation data"),
    "no such metric": (dict(eval_metric="accurancy"), "--eval-metric: got 'accurancy', expected exact|"),
    "no such function": (dict(eval_metric="json:nothing"), "--eval-metric json:nothing: json has no function nothing"),
    "labels without a separator": (dict(eval_metric="map"), "--eval-metric map .*give --eval-label-separator"),
    "a normalizer for nothing": (dict(eval_metric=None, eval_normalizer="basic"), "--eval-normalizer: needs --eval-metric"),
    "rows for nothing": (dict(eval_metric=None, eval_metric_rows=3), "--eval-metric-rows: needs --eval-metric"),
}


@pytest.mark.parametrize("case", BAD)
def test_one_clear_message(case):
    wrong, message = BAD[case]
    with pytest.raises(InputError, match=message): check_settings(settings(**wrong))


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharded_weights(monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(InputError, match="--eval-metric exact: no process has the whole model"): check_settings(settings())


def test_the_dashboard(tmp_path):
    "The metric has a chart and is what the best evaluation is judged by; that of another process reads it from the folder"
    lines = [dict(step=s, loss=1/s, time=float(s)) for s in range(1, 9)]
    for step, loss, wer, best in ((2, 1., .5, 2), (4, .9, .25, 4), (8, .8, .375, 4)):
        lines.append(dict(step=step, eval_loss=loss, eval_samples_per_second=9., eval_wer=wer, eval_wer_a=wer, eval_wer_b=wer/2, best_step=best, time=float(step)))
    (tmp_path/"metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in sorted(lines, key=lambda m: m["step"])))
    view = watch(tmp_path).view
    assert view.best == (.25, 4) and "best word error rate" in view.head() and "25.00% at step 4" in view.head()
    assert 'aria-label="word error rate: eval wer from 50.00% at step 2 to 37.50% at step 8; eval wer a' in view.curves()
    assert "eval wer" not in re.search('aria-label="loss per token[^"]*"', view.curves())[0]
    report = TrainReport(tmp_path, 8, 1, 2, lines, eval_metric="wer", final_step=4)
    assert report.figures()[-1] == ("word error rate", "25.00%")
    assert 'alt="loss from 1 at step 1 to 0.125 at step 8; eval loss from' in report._repr_html_() and "eval wer from 0.5 at step 2 to 0.375 at step 8" in report._repr_html_()


@pytest.mark.parametrize("low, high, shown", [(1.4, 8, {"2", "3", "4", "6"}), (.0007, 300, {"0.001", "0.01", "0.1", "1", "10", "100"}), (.25, 3, {"0.3", "0.4", "0.6", "1", "2"})])
def test_the_loss_axis_has_plain_numbers(tmp_path, low, high, shown):
    "6, not 6 × 10⁰"
    figure = TrainReport(tmp_path, 2, 1, 2, [dict(step=1, loss=high), dict(step=2, loss=low)]).figure()
    figure.draw_without_rendering()
    axis = figure.axes[0].yaxis
    bottom, top = axis.get_view_interval()
    ticks = [(t.get_loc(), t.label1.get_text()) for t in axis.get_major_ticks() + axis.get_minor_ticks()]
    found = {text for at, text in ticks if text and bottom <= at <= top}
    assert shown <= found and all(float(text) == pytest.approx(at) and text == f"{at:g}" for at, text in ticks if text)
