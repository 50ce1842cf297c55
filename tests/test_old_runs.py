"A run folder of version 0.1.0, killed after step 4 of 6 with a checkpoint of step 2: it resumes, `watch` shows it, `--config` reads it"
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mdl_nbdev import watch
from mdl_nbdev.base.command_line import from_args
from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.settings import TrainSettings
from mdl_nbdev.train.checkpoints import check_checkpoint
from mdl_nbdev.train.run import train
from mdl_nbdev.train.samples import read_samples

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def old(tmp_path, monkeypatch):
    "A copy of the folder, as the working directory"
    shutil.copytree(Path(__file__).parent/"fixtures"/"run-0.1.0", tmp_path/"old")
    monkeypatch.chdir(tmp_path/"old")
    return tmp_path/"old"


def settings(*more): return from_args(TrainSettings, ["--config", "run/config.json", "--resume-from-checkpoint", "true", *more])


def figures(path):
    "What the metrics say, without what depends on the clock"
    names = ("step", "epoch", "loss", "eval_loss", "grad_norm", "learning_rate", "padding")
    return [{k: m[k] for k in names if k in m} for m in map(json.loads, Path(path).read_text().splitlines())]


def trained(checkpoint): return load_file(Path(checkpoint)/"trained.safetensors")


def test_its_configuration_is_read(old):
    s = settings()
    assert (s.loss_mode, s.train_target, s.lora_rank, s.num_epochs) == ("tasks", ["projector"], 1, 2.0)


def test_it_resumes(old):
    "As that version would have continued; to the last bit the same when it is stopped and resumed once more"
    assert check_checkpoint("run/checkpoint-2") is None
    report = train(settings())
    expected, first = trained("expected"), trained("run/checkpoint-6")
    assert report.steps == 6 and report.final.is_dir()
    for got, want in zip(figures("run/metrics.jsonl"), figures("expected/metrics.jsonl"), strict=True): assert got == pytest.approx(want, rel=1e-4)
    assert all(abs(first[k] - expected[k]).max() < 1e-5 for k in expected), "another processor may round differently"
    assert [a["step"] for a in read_samples("run/samples.jsonl")] == [2, 4, 6]
    metrics = figures("run/metrics.jsonl")
    for gone in ("final", "checkpoint-6", "checkpoint-5", "checkpoint-4"): shutil.rmtree(Path("run")/gone)
    train(settings())
    again = trained("run/checkpoint-6")
    assert figures("run/metrics.jsonl") == metrics and all((again[k] == first[k]).all() for k in first)


def test_real_changes_are_still_refused(old):
    with pytest.raises(InputError, match="checkpoint-2: belongs to a run with other data or settings .*--loss-mode: was .tasks., is .samples."):
        train(replace(settings(), loss_mode="case2"))


def test_watch_shows_it(old):
    shown = watch(old/"run")._repr_html_()
    assert "Answers at step 6" in shown and "rising" in shown
