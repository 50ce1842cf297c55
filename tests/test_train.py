"Training runs: exact losses, what is trained and what is not, resuming, and what a run leaves behind"
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves
from transformers import Trainer

from mdl_nbdev.base.command_line import from_args
from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.settings import ConvertSettings, TrainSettings, TuneSettings
from mdl_nbdev.base.status import RunStatus
from mdl_nbdev.data.sounds import make_sounds
from mdl_nbdev.model.adapters import adapt
from mdl_nbdev.model.collate import Collator
from mdl_nbdev.model.families import load_chat
from mdl_nbdev.model.load import load_model
from mdl_nbdev.model.midashenglm_family import MiDashengLMFamily, tiny_model, tiny_tokenizer
from mdl_nbdev.model.save import load_adapter, merge
from mdl_nbdev.train import fit as fit_module
from mdl_nbdev.train.callbacks import read_metrics
from mdl_nbdev.train.convert import convert
from mdl_nbdev.train.dataset import AudioDataset
from mdl_nbdev.train.loop import TaskTrainer
from mdl_nbdev.train.prepare import open_mixes
from mdl_nbdev.train.run import train

TOK = tiny_tokenizer()


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def csv(tmp_path_factory): return make_sounds(tmp_path_factory.mktemp("sounds"), 24, seed=5)


def settings(csv, out, **kw):
    return TrainSettings(**dict(train_dataset=csv, base_dir=csv.parent, output=out, model_name="tiny", lr=2e-3, batch_size=8, logging_steps=1, lora_rank=8) | kw)


def rows_of(s): return open_mixes(s, load_chat("tiny"))[0]


def losses(metrics): return [(m["step"], m["loss"], m["grad_norm"]) for m in metrics if "loss" in m]


@pytest.fixture(scope="module")
def run(csv, tmp_path_factory):
    "A short run with an evaluation, whose checkpoints are kept"
    return train(settings(csv, tmp_path_factory.mktemp("runs") / "run", eval_dataset=csv, num_epochs=2.0, eval_steps=3, save_steps=2))


def test_evaluation_is_the_mean_over_all_tokens(csv, run):
    "Against one row at a time, logits of all positions, in float64"
    model, ds = load_model(str(run.final)).double(), rows_of(settings(csv, run.output))
    total = n = 0
    for i in range(len(ds)):
        batch = Collator(TOK.pad_token_id, MiDashengLMFamily())([ds[i]])
        labels = batch.pop("labels")[0, 1:]
        with torch.no_grad(): logits = model(**batch).logits[0, :-1]
        for at in range(len(labels)):
            if labels[at] >= 0:
                total -= float(logits[at].log_softmax(-1)[labels[at]])
                n += 1
    assert run.last("eval_loss") == pytest.approx(total / n, abs=1e-4)


@pytest.mark.parametrize("batch, steps", [(2, 4), (4, 2), (1, 8)])
def test_accumulated_batches_are_one_batch(csv, tmp_path, batch, steps):
    "Eight rows in one optimizer step, however they are cut: same loss, same gradient"
    rows = csv.read_text().splitlines()[:9]
    (tmp_path / "eight.csv").write_text("\n".join(rows))
    args = dict(train_dataset=tmp_path / "eight.csv", base_dir=csv.parent, max_steps=1)
    whole = train(settings(csv, tmp_path / "whole", **args))
    cut = train(settings(csv, tmp_path / "cut", batch_size=batch, gradient_accumulation_steps=steps, **args))
    (_, loss, norm), (_, loss2, norm2) = losses(whole.metrics)[0], losses(cut.metrics)[0]
    assert loss2 == pytest.approx(loss, rel=1e-5) and norm2 == pytest.approx(norm, rel=1e-4)


def test_only_the_adapters_have_changed(run):
    merged, base = load_file(run.final / "model.safetensors"), tiny_model().state_dict()
    assert set(merged) == set(base)
    changed = {k for k in base if not torch.equal(merged[k], base[k])}
    linear = {k for k in base if k.endswith(".weight") and ("blocks" in k or ".net." in k or "layers" in k) and "norm" not in k}
    assert changed == linear


def test_the_run_folder_repeats_the_run(run, tmp_path):
    s = from_args(TrainSettings, ["--config", str(run.output / "config.json"), "--output", str(tmp_path / "again"), "--max-steps", "3"])
    again = train(s)
    assert losses(again.metrics)[:1] == losses(run.metrics)[:1]
    s = replace(s, output=tmp_path / "third")
    assert losses(train(s).metrics) == losses(again.metrics)
    a, b = (load_file(tmp_path / d / "final" / "model.safetensors") for d in ("again", "third"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_resumed_run_ends_as_the_undisturbed_one(run, csv, tmp_path):
    shutil.copytree(run.output, tmp_path / "run")
    for step in (6, 4): shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    s = from_args(TrainSettings, ["--config", str(run.output / "config.json"), "--output", str(tmp_path / "run"), "--resume-from-checkpoint", "true"])
    again = train(s)
    assert losses(again.metrics) == losses(run.metrics)
    assert [m["step"] for m in again.metrics if "eval_loss" in m] == [m["step"] for m in run.metrics if "eval_loss" in m] == [3, 6]
    a, b = (load_file(r.final / "model.safetensors") for r in (run, again))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_adapter_only(csv, tmp_path, run):
    "`--merge-lora false` leaves the adapter; on top of the base model it gives the merged model's logits"
    s = settings(csv, tmp_path / "a", merge_lora=False, max_steps=2, train_target=["decoder", "lm_head"])
    adapter, merged = train(s), train(replace(s, output=tmp_path / "m", merge_lora=True))
    assert (adapter.final / "adapter_model.safetensors").exists() and not (adapter.final / "model.safetensors").exists()
    batch = {k: v for k, v in Collator(TOK.pad_token_id, MiDashengLMFamily())([rows_of(s)[i] for i in range(3)]).items() if k != "labels"}
    with torch.no_grad(): a, b = load_adapter(load_model("tiny"), adapter.final)(**batch).logits, load_model(str(merged.final))(**batch).logits
    assert torch.allclose(a, b, atol=1e-5)
    assert not torch.equal(load_file(merged.final / "model.safetensors")["decoder.lm_head.weight"], tiny_model().state_dict()["decoder.lm_head.weight"])


@pytest.mark.parametrize("bits", ["4bit", pytest.param("8bit", marks=pytest.mark.slow)])
def test_a_quantized_run_goes_on_after_an_evaluation(csv, tmp_path, bits):
    "The same steps with and without an evaluation between them; the result is merged into the float base"
    s = settings(csv, tmp_path / "with", quantization=bits, eval_dataset=csv, eval_steps=1, max_steps=4)
    evaluated, plain = train(s), train(replace(s, output=tmp_path / "without", eval_dataset=None))
    step_losses = lambda run: [loss for _, loss, _ in losses(run.metrics)]
    assert step_losses(evaluated) == pytest.approx(step_losses(plain), rel=1e-3)
    assert load_model(str(evaluated.final)).dtype == torch.float32


def test_checkpoints_and_files(csv, tmp_path):
    r = train(settings(csv, tmp_path / "r", max_steps=5, save_steps=0.2, save_total_limit=2))
    assert sorted(p.name for p in r.output.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    assert r.steps == 5 and json.loads((r.output / "config.json").read_text())["max_steps"] == 5
    card = (r.final / "README.md").read_text()
    assert "| 24 |" in card and "`lora_rank` | `8`" in card and "mdl_infer" in card


def test_a_short_run_tells_its_loss(csv, tmp_path):
    "Fewer steps than --logging-steps; a rerun of a finished run leaves what was told alone"
    s = settings(csv, tmp_path / "r", max_steps=2, logging_steps=10, save_steps=2)
    r = train(s)
    assert [m["step"] for m in r.metrics if "loss" in m] == [1, 2] and "loss" in str(r) and "| loss |" in (r.final / "README.md").read_text()
    assert train(replace(s, resume_from_checkpoint=True)).metrics == r.metrics


def test_how_often_may_change_when_a_run_goes_on(csv, tmp_path):
    s = settings(csv, tmp_path / "r", max_steps=8, logging_steps=1, save_steps=4, eval_dataset=csv, eval_steps=100)
    train(s)
    shutil.rmtree(s.output / "checkpoint-8")
    r = train(replace(s, resume_from_checkpoint=True, save_steps=3, eval_steps=2, logging_steps=2))
    assert [m["step"] for m in r.metrics if "loss" in m] == [1, 2, 3, 4, 6, 8] and [m["step"] for m in r.metrics if "eval_loss" in m] == [6, 8]
    assert sorted(p.name for p in s.output.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]


def test_a_batch_goes_to_the_device_as_it_is(csv, tmp_path):
    "All of its tensors, in their own types; `meta` stands for a GPU"
    ds = AudioDataset(convert(ConvertSettings(input=csv, output=tmp_path / "d", base_dir=csv.parent, model_name="tiny")).path)
    batch = Collator(TOK.pad_token_id, MiDashengLMFamily())([ds[i] for i in range(3)])
    moved = batch.to(torch.device("meta"))
    assert moved["audio_plan"].groups == batch["audio_plan"].groups
    tensors, there = ([x for x in tree_leaves(dict(b)) if isinstance(x, torch.Tensor)] for b in (batch, moved))
    assert len(tensors) == len(batch) + 3
    assert [(t.device.type, t.dtype, t.shape) for t in there] == [("meta", t.dtype, t.shape) for t in tensors]


def test_early_stopping_on_the_very_last_step(csv, tmp_path, monkeypatch):
    "`final/` holds the best checkpoint; report and model card give the figures of that model, not those of the last step"
    evaluations = iter([1.25, 2.25, 3.25])
    monkeypatch.setattr(TaskTrainer, "mean_loss", lambda *args: next(evaluations))
    r = train(settings(csv, tmp_path / "r", eval_dataset=csv, eval_steps=1, max_steps=3, early_stopping_patience=2, sample_answers=0))
    assert (r.steps, r.stopped, r.whole, r.best.name, r.exit_code) == (3, "early stopping", True, "checkpoint-1", 0)
    first = [m["loss"] for m in r.metrics if "loss" in m][0]
    assert (r.loss, r.eval_loss, r.last("eval_loss")) == (first, 1.25, 3.25)
    assert "eval loss 1.2500" in str(r) and f"the model is that of {r.best}" in str(r)
    card = (r.final / "README.md").read_text()
    assert "| eval loss | 1.2500 |" in card and f"| loss | {first:.4f} |" in card
    merged, final = merge(load_adapter(load_model("tiny"), r.best)).state_dict(), load_model(str(r.final)).state_dict()
    assert all(torch.equal(merged[k], final[k]) for k in merged)


def test_gradients_keep_their_own_timeout(monkeypatch):
    "Ranks wait for the main process in a group of their own; the group that carries gradients has torch's timeout"
    asked = []
    monkeypatch.setattr(fit_module, "PartialState", lambda **kwargs: asked.append(kwargs))
    fit_module.join_processes()
    assert [set(kwargs) for kwargs in asked] == [{"cpu"}]


def test_rows_are_converted_before_torch_is_imported(csv, tmp_path):
    "A bad row is reported at once, and a dashboard shows the conversion in its first seconds"
    rows = tmp_path / "rows.csv"
    soundfile.write(tmp_path / "nan.wav", np.full(16000, np.nan, np.float32), 16000, "FLOAT")
    rows.write_text(csv.read_text() + f"{tmp_path / 'nan.wav'},x\n")
    code = f"""import sys
from mdl_nbdev import InputError, TrainSettings, start_training
from mdl_nbdev.base.status import read_status
run = start_training(TrainSettings(train_dataset={str(rows)!r}, base_dir={str(csv.parent)!r}, output={str(tmp_path / "run")!r}, model_name='tiny'))
try: run.wait()
except InputError as e: print(e.rows[0].line, read_status(run.s.output)['during'], *{{'torch', 'peft', 'pandas'}} & set(sys.modules))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | dict(MDL_CACHE=str(tmp_path / "cache")))
    assert done.stdout == "26 converting\n"


def test_phases_of_a_run(csv, tmp_path, monkeypatch):
    phases, set_ = [], RunStatus.set
    monkeypatch.setattr(RunStatus, "set", lambda self, phase, **facts: phases.append(phase) or set_(self, phase, **facts))
    monkeypatch.setenv("MDL_CACHE", str(tmp_path / "cache"))
    train(settings(csv, tmp_path / "run", max_steps=1))
    assert phases == ["starting", "converting", "importing", "loading", "training", "saving", "saving", "finished"]


@pytest.mark.parametrize("wrong", [dict(model_name="./nothing"), dict(adapter="nothing"), dict(lr_scheduler_type="nothing"), dict(report_to="nothing")])
def test_nothing_is_converted_for_wrong_settings(wrong, csv, tmp_path, monkeypatch):
    monkeypatch.setenv("MDL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match="nothing"): train(settings(csv, tmp_path / "run", **wrong))
    assert not (tmp_path / "cache").exists() and not (tmp_path / "run").exists()


def test_operations_are_those_that_transformers_counts():
    trainer, batch = object.__new__(TaskTrainer), dict(input_ids=torch.ones(2, 7))
    trainer.model = adapt(tiny_model(), TuneSettings(lora_rank=2))
    assert trainer.floating_point_ops(SimpleNamespace(batch=batch)) == Trainer.floating_point_ops(trainer, batch) > 14*6*10**6


def test_an_evaluation_changes_the_mode_once(csv, tmp_path, monkeypatch):
    "And training goes on with dropout"
    modes, change = [], torch.nn.Module.train
    monkeypatch.setattr(PeftModel, "train", lambda self, mode=True: modes.append(mode) or change(self, mode))
    train(settings(csv, tmp_path / "r", eval_dataset=csv, eval_batch_size=4, max_steps=2, eval_steps=1, sample_answers=0, merge_lora=False))
    assert [mode for mode, before in zip(modes, [None, *modes]) if mode != before] == [True, False, True, False, True] and modes.count(False) == 2


def test_half_an_epoch(csv, tmp_path): assert train(settings(csv, tmp_path / "r", num_epochs=0.5, batch_size=4)).steps == 3


BAD = {
    "schedule": (dict(lr_scheduler_type="steps"), "--lr-scheduler-type steps: no such schedule"),
    "tracker": (dict(report_to=["nowhere"]), "--report-to"),
    "checkpoint": (dict(resume_from_checkpoint="nowhere/checkpoint-3"), "nowhere/checkpoint-3: there is no such folder"),
    "diverged": (dict(lr=1e8, max_grad_norm=0.0, max_steps=30), "the run has diverged"),
    "target": (dict(lora_target_modules="nothing"), "no module"),
    "dataset": (dict(train_dataset="nowhere.csv"), "nowhere.csv"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_one_message(csv, tmp_path, case):
    kw, why = BAD[case]
    with pytest.raises(InputError, match=why): train(settings(csv, tmp_path / "r", **kw))


def test_a_finished_run_is_not_written_over(run, csv):
    before = {p: p.stat().st_mtime_ns for p in run.output.rglob("*")}
    with pytest.raises(InputError, match="holds a run already"): train(settings(csv, run.output))
    assert before == {p: p.stat().st_mtime_ns for p in run.output.rglob("*")}
    assert read_metrics(run.output / "metrics.jsonl") == run.metrics
