"Runs over several tasks: the mix, the weights, the losses of each, the schedule, and when to stop"
import json
import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import SchedulerType, TrainerCallback, TrainingArguments

from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.settings import TrainSettings
from mdl_nbdev.model.load import load_model
from mdl_nbdev.model.save import load_adapter, merge
from mdl_nbdev.train.loop import FlooredSchedule
from mdl_nbdev.train.prepare import check_settings
from mdl_nbdev.train.run import train

ROLE = "<|role_start|>{}<|role_end|>"


pytestmark = pytest.mark.usefixtures("one_thread")


def write(path, pairs):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": q, "answer": a}) + "\n" for q, a in pairs))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    "Two folders of records: 24 words to copy in two files, 8 to shout"
    folder = tmp_path_factory.mktemp("tasks")
    words = [f"w{i:02d}x" for i in range(24)]
    write(folder/"copy"/"a.jsonl", [(w, w) for w in words[:16]])
    write(folder/"copy"/"b.jsonl", [(w, w) for w in words[16:]])
    write(folder/"shout"/"a.jsonl", [(w, w.upper() + "!") for w in words[:8]])
    return folder


def settings(tasks, out, **kw):
    return TrainSettings(**dict(train_dataset=[tasks], output=out, model_name="tiny-text", lr=1e-3, batch_size=8, logging_steps=1, lora_rank=8, validation_split=.25) | kw)


@pytest.mark.parametrize("mode", ["case1", "case2", "case3", "case4", "coba"])
def test_every_task_is_logged(tasks, tmp_path, mode):
    r = train(settings(tasks, tmp_path/"r", loss_mode=mode, num_epochs=2, coba_warmup_steps=3, coba_window=4))
    first = r.metrics[0]
    assert {"loss", "loss_copy", "loss_shout"} <= set(first)
    evaluation = [m for m in r.metrics if "eval_loss" in m][-1]
    assert {"eval_loss_copy", "eval_loss_shout"} <= set(evaluation)
    if mode in ("case3", "case4", "coba"):
        assert evaluation["eval_loss"] == pytest.approx((evaluation["eval_loss_copy"] + evaluation["eval_loss_shout"])/2)
    if mode == "coba":
        weights = [(m["weight_copy"], m["weight_shout"]) for m in r.metrics if "weight_copy" in m]
        assert weights[:3] == [(.5, .5)]*3 and all(sum(w) == pytest.approx(1) for w in weights) and weights[-1] != (.5, .5)


def test_held_out_speakers_are_named_and_kept_on_resume(tmp_path, capsys):
    rows = tmp_path/"rows.jsonl"
    def write_rows(speaker): rows.write_text("".join(json.dumps({"prompt": f"{n}?", "answer": str(n), "speaker": speaker(n)}) + "\n" for n in range(40)))
    write_rows(lambda n: f"s{n % 10}")
    s = settings(rows, tmp_path/"r", validation_split=.2, validation_group="speaker", max_steps=2, save_steps=1)
    train(s)
    found = re.search(r"For evaluation: 8 of 40 rows \(20.0%\), those of 2 of 10 values of speaker: (s\d), (s\d)\n", capsys.readouterr().out)
    assert found
    more = replace(s, max_steps=3, resume_from_checkpoint=True, allow_changes=True)
    train(more)
    assert found[0] in capsys.readouterr().out
    write_rows(lambda n: f"s{n // 4}")
    with pytest.raises(InputError, match="--allow-changes"): train(replace(s, resume_from_checkpoint=True))


def test_weights_that_leave_nothing_to_learn_from(tasks, tmp_path):
    with pytest.raises(InputError, match="--task-weights leaves no task to learn from; give some task more than 0"):
        train(settings(tasks, tmp_path/"r", task_weights="copy=0,shout=0", max_steps=1))


def test_a_task_of_weight_zero_is_not_learned_from(tasks, tmp_path):
    "The gradient is that of the other task alone"
    s = settings(tasks, tmp_path/"a", task_weights={"shout": 0}, max_steps=1, batch_size=32, validation_split=0)
    alone = replace(s, output=tmp_path/"b", train_dataset=[tasks/"copy"], task_weights={})
    norm = lambda r: r.metrics[0]["grad_norm"]
    assert norm(train(s)) == pytest.approx(norm(train(alone)), rel=1e-4)


def test_steps_of_any_cut_are_the_same(tasks, tmp_path):
    "case4 weighs a sample by the samples of its task in the whole step, however that is cut into batches"
    runs = [train(settings(tasks, tmp_path/str(a), loss_mode="case4", batch_size=8//a, gradient_accumulation_steps=a, max_steps=3, validation_split=0)) for a in (1, 2, 4)]
    for other in runs[1:]:
        for a, b in zip(runs[0].metrics[:3], other.metrics[:3]):
            for name in ("loss", "loss_copy", "loss_shout", "grad_norm"):
                if name in a: assert b[name] == pytest.approx(a[name], rel=1e-4), name


def test_packing_trains_alike(tasks, tmp_path):
    "All rows in one step: the same loss and gradient, packed or not"
    s = settings(tasks, tmp_path/"a", batch_size=32, max_steps=1, validation_split=0)
    plain, packed = train(s), train(replace(s, output=tmp_path/"b", packing=True, seq_length=256))
    for name in ("loss", "loss_copy", "loss_shout", "grad_norm"): assert packed.metrics[0][name] == pytest.approx(plain.metrics[0][name], rel=1e-4)


def test_batches_of_a_token_budget_train_alike(tasks, tmp_path):
    "All rows in one step: the same loss and gradient, in one batch or in many of unequal numbers of rows"
    s = settings(tasks, tmp_path/"a", batch_size=32, max_steps=1, validation_split=0)
    plain, budgeted = train(s), train(replace(s, output=tmp_path/"b", batch_size=8, batch_tokens=60, gradient_accumulation_steps=100))
    for name in ("loss", "loss_copy", "loss_shout", "grad_norm"): assert budgeted.metrics[0][name] == pytest.approx(plain.metrics[0][name], rel=1e-4)


def test_too_long_rows_are_listed(tasks, tmp_path):
    r = train(settings(tasks, tmp_path/"r", seq_length=21, max_steps=1, validation_split=0))
    listed = (r.output/"too_long.csv").read_text().splitlines()
    assert len(listed) > 1 and "rejected" in listed[1]
    with pytest.raises(InputError): train(settings(tasks, tmp_path/"none", seq_length=3, max_steps=1, validation_split=0))


def test_full_tuning_of_text(tasks, tmp_path):
    r = train(settings(tasks, tmp_path/"r", tuning="full", max_steps=2))
    assert r.trainable <= r.parameters and load_model(str(r.final)).dtype == torch.float32
    assert "in full" in (r.final/"README.md").read_text()


@pytest.mark.parametrize("option", [dict(use_rslora=True), dict(use_dora=True), dict(lora_init="pissa"), dict(loraplus_lr_ratio=8.)], ids=lambda o: next(iter(o)))
def test_variants_of_lora_train_and_merge(tasks, tmp_path, option):
    r = train(settings(tasks, tmp_path/"r", max_steps=3, **option))
    assert load_model(str(r.final)) and math.isfinite(r.last("loss"))


def learning_rates(r): return [m["learning_rate"] for m in r.metrics if "learning_rate" in m]


@pytest.mark.parametrize("shape", ["cosine", *(pytest.param(s, marks=pytest.mark.slow) for s in ("linear", "polynomial", "inverse_sqrt", "constant_with_warmup"))])
def test_the_floor_of_the_learning_rate(tasks, tmp_path, shape):
    "Below the floor only in the warm-up; elsewhere as without it"
    s = settings(tasks, tmp_path/"a", lr_scheduler_type=shape, warmup_steps=.25, max_steps=12, validation_split=0)
    free, floored = learning_rates(train(s)), learning_rates(train(replace(s, output=tmp_path/"b", min_lr=4e-4)))
    assert floored[:3] == free[:3] and floored[3:] == [max(4e-4, x) for x in free[3:]]
    assert s.lr == max(floored)


@pytest.mark.parametrize("more", [{}, dict(min_lr=1e-4)], ids=["free", "floor"])
@pytest.mark.parametrize("kind", [t.value for t in SchedulerType])
def test_every_schedule_that_is_offered_works(kind, more, tmp_path):
    "It starts at the peak, never leaves the interval from the floor to the peak, and does not know an argument of no schedule"
    def schedule(**kw):
        trainer = object.__new__(FlooredSchedule) # its part that makes the schedule, without a model
        trainer.s, trainer.lr_scheduler = TrainSettings(train_dataset=["t"], output=tmp_path, lr=1e-3, lr_scheduler_type=kind, **kw), None
        trainer.args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
        trainer.args.lr_scheduler_type = SchedulerType(kind)
        trainer.optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=1e-3)
        return trainer.create_scheduler(40, trainer.optimizer), trainer.optimizer
    steps, optimizer = schedule(**more)
    rates = []
    for _ in range(40):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        steps.step(*[1.0]*(kind in FOLLOWING))
    assert rates[0] > .95e-3 and max(rates) <= 1e-3 and min(rates) >= more.get("min_lr", 0)*.999
    if not kind.startswith("constant"):
        with pytest.raises(InputError, match="--scheduler-args .*nonsense.*do not fit the schedule"): schedule(scheduler_args={"nonsense": 1})


FOLLOWING = ("reduce_lr_on_plateau", "greedy")


@pytest.mark.parametrize("option, message", [(dict(lr_scheduler_type="greedy"), "--lr-scheduler-type greedy: needs evaluation data"),
    (dict(lr_scheduler_type="reduce_lr_on_plateau", warmup_steps=3, validation_split=.2), "--warmup-steps: the schedule reduce_lr_on_plateau has no warm-up"),
    (dict(lr_scheduler_type="constant", warmup_steps=3), "--warmup-steps: the schedule constant has no warm-up; leave it out, or use constant_with_warmup"),
    (dict(lr_scheduler_type="constant", scheduler_args={"power": 2}), "--scheduler-args: the schedule constant takes none")])
def test_options_that_a_schedule_would_ignore(tasks, tmp_path, option, message):
    with pytest.raises(InputError, match=re.escape(message)): check_settings(settings(tasks, tmp_path, **dict(validation_split=0) | option))


@pytest.mark.parametrize("change", [dict(max_steps=8), dict(max_steps=4, lr=5e-4)], ids=str)
def test_a_resumed_run_follows_its_own_schedule_from_its_first_step(tasks, tmp_path, change):
    s = settings(tasks, tmp_path/"r", max_steps=3, save_steps=2, validation_split=0)
    train(s)
    shutil.rmtree(s.output/"final")
    shutil.rmtree(s.output/"checkpoint-3")
    r = train(replace(s, resume_from_checkpoint=True, allow_changes=True, **change))
    lr, n = change.get("lr", 1e-3), change["max_steps"]
    assert learning_rates(r)[2:] == pytest.approx([lr*(n - step)/n for step in range(2, n)])


def test_evaluation_by_steps_and_epochs(tasks, tmp_path):
    at = lambda r: [m["step"] for m in r.metrics if "eval_loss" in m]
    s = settings(tasks, tmp_path/"a", num_epochs=3, eval_steps=2) # 24 rows: 3 steps an epoch
    assert at(train(s)) == [2, 4, 6, 8, 9]
    assert at(train(replace(s, output=tmp_path/"b", eval_strategy=["epoch"]))) == [3, 6, 9]
    assert at(train(replace(s, output=tmp_path/"c", eval_strategy=["steps", "epoch"]))) == [2, 3, 4, 6, 8, 9]


def test_epoch_checkpoints_stay(tasks, tmp_path):
    r = train(settings(tasks, tmp_path/"r", num_epochs=3, save_steps=2, save_total_limit=1, extra_save_by_epoch=True, validation_split=0))
    assert sorted(p.name for p in r.output.glob("*-[0-9]*")) == ["checkpoint-12", "epoch-1", "epoch-2", "epoch-3"]


def test_early_stopping_leaves_the_best(tasks, tmp_path):
    "A learning rate that ruins the model from the second evaluation on"
    r = train(settings(tasks, tmp_path/"r", num_epochs=20, eval_steps=1, lr=.05, max_grad_norm=0, early_stopping_patience=2, save_total_limit=2))
    evaluations = [m["eval_loss"] for m in r.metrics if "eval_loss" in m]
    best = evaluations.index(min(evaluations)) + 1
    assert r.stopped == "early stopping" and r.steps < 60 and r.best.name == f"checkpoint-{best}"
    merged = merge(load_adapter(load_model("tiny-text"), r.best)).state_dict()
    final = load_model(str(r.final)).state_dict()
    assert all(torch.equal(merged[k], final[k]) for k in merged)
    told, shards = (r.output/"metrics.jsonl").read_bytes(), {p.name: p.read_bytes() for p in r.final.glob("*.safetensors")}
    again = train(settings(tasks, r.output, num_epochs=20, eval_steps=1, lr=.05, max_grad_norm=0, early_stopping_patience=2, save_total_limit=2, resume_from_checkpoint=True))
    assert (again.stopped, again.steps, again.best) == (r.stopped, r.steps, r.best), "nothing is left to do"
    assert told == (r.output/"metrics.jsonl").read_bytes() and shards == {p.name: p.read_bytes() for p in r.final.glob("*.safetensors")}


BAD = {
    "no such task in the weights": (dict(task_weights={"sing": 2}), "--task-weights: no task is called .sing"),
    "no such task in the mix": (dict(task_sampling={"sing": 2}), "--task-sampling: no task is called .sing"),
    "coba without evaluation": (dict(loss_mode="coba", validation_split=0), "--loss-mode coba: needs evaluation data"),
    "a group without a share": (dict(validation_group="speaker", validation_split=0), "--validation-group speaker: needs the share to hold out"),
    "patience without evaluation": (dict(early_stopping_patience=1, validation_split=0), "--early-stopping-patience: needs evaluation data"),
    "two evaluations": (dict(eval_dataset=["x"], validation_split=.1), "one of the two"),
    "no such evaluation": (dict(eval_dataset=["nowhere.csv"], validation_split=0), "nowhere.csv"),
    "a floor above the peak": (dict(lr=1e-4, min_lr=1e-3), "--min-lr 0.001: above --lr"),
    "packs of changing number": (dict(packing=True, seq_length=64, task_sampling={"shout": .5}), "--packing: --task-sampling must be whole numbers"),
    "batches of changing number": (dict(batch_size=8, batch_tokens=64, task_sampling={"shout": .5}), "--batch-tokens: --task-sampling must be whole numbers"),
    "a budget and packing": (dict(batch_size=8, batch_tokens=64, packing=True), "--batch-tokens: --packing also decides"),
    "a budget and a number of rows": (dict(batch_size=4, batch_tokens=64), "--batch-tokens: --batch-size also decides"),
    "quantized and full": (dict(tuning="full", quantization="4bit"), "quantization"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings(tasks, tmp_path, case):
    kw, why = BAD[case]
    with pytest.raises(InputError, match=why): train(settings(tasks, tmp_path/"r", **kw))


def test_dry_run_trains_nothing(tasks, tmp_path):
    report = train(settings(tasks, tmp_path/"r", dry_run=True, validation_split=0))
    text = str(report)
    assert "trainable params" in text and "the longest batch: 8 rows" in text and "Nothing was trained" in text
    assert not (tmp_path/"r"/"metrics.jsonl").exists() and not list((tmp_path/"r").glob("checkpoint-*"))
    assert "<" in report._repr_html_()


class TooMuch(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def test_out_of_memory_is_one_message_with_advice(tasks, tmp_path):
    s = settings(tasks, tmp_path/"r", gradient_accumulation_steps=2, batch_size=4, gradient_checkpointing=False)
    with pytest.raises(InputError, match=r"(?s)^out of memory after 0 steps.*--batch-size.*MiB less") as e: train(s, [TooMuch()])
    assert "--gradient-checkpointing true" in str(e.value)
