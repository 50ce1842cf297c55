"Runs that are killed, stopped or robbed of a checkpoint, and go on: they end as the undisturbed one, bit for bit"
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from training_runs import finish, history, kill_later, start, wait_until, weights

from mdl_nbdev.base.command_line import from_args
from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.settings import TrainSettings
from mdl_nbdev.data.sounds import make_sounds
from mdl_nbdev.train import resume
from mdl_nbdev.train.checkpoints import check_checkpoint, last_checkpoint
from mdl_nbdev.train.run import train


@pytest.fixture(scope="module")
def csv(tmp_path_factory): return make_sounds(tmp_path_factory.mktemp("sounds"), 40, seed=3)


def arguments(csv, **kw):
    "A run of 20 steps with everything that has a state: dropout, early stopping, a limit, lines of the log between two checkpoints"
    settings = dict(train_dataset=csv, eval_dataset=csv, base_dir=csv.parent, model_name="tiny", lr=2e-3, lora_rank=4, lora_dropout=.2, batch_size=4, num_epochs=2,
                    logging_steps=3, eval_steps=4, save_steps=2, save_total_limit=3, early_stopping_patience=9, warmup_steps=3, lr_scheduler_type="cosine", min_lr=1e-4)
    return [x for k, v in (settings | kw).items() for x in (f"--{k}", v)]


def cheap(csv, **kw):
    "The same with fewer adapters and eight rows to evaluate"
    few = csv.parent/"few.csv"
    few.write_text("".join(csv.read_text().splitlines(keepends=True)[:9]))
    return arguments(csv, **dict(train_target="projector", eval_dataset=few, eval_batch_size=8) | kw)


ALL_SORTS = dict(num_workers=2, gradient_accumulation_steps=3, batch_size=2, num_epochs=3, augment="speed,room,noise,gain,specaugment")
BY_TOKENS = dict(num_workers=2, gradient_accumulation_steps=2, batch_tokens=150, batch_size=8, num_epochs=2)
CASES = [ALL_SORTS, dict(), BY_TOKENS, dict(num_workers=2), dict(gradient_accumulation_steps=3, batch_size=2, num_epochs=3)]


@pytest.mark.parametrize("make, case, kills", [(cheap, ALL_SORTS | dict(num_epochs=2), (0, 2)), (cheap, BY_TOKENS, (0,)), *(pytest.param(arguments, c, range(5), marks=pytest.mark.slow) for c in CASES)])
def test_killed_at_several_moments(csv, tmp_path, make, case, kills):
    args, log, run = make(csv, **case), tmp_path/"log", tmp_path/"run"
    finish(start([*args, "--output", tmp_path/"whole"], log), log)
    again = [*args, "--output", run, "--resume_from_checkpoint", "true"]
    for kill in kills:
        process = start(again, log)
        before = set(run.glob("checkpoint-*"))
        if kill == 2: # inside the write of a checkpoint
            wait_until(lambda: any(run.glob("checkpoint-*.part/*")), process)
            kill_later(process, .01)
        else:
            wait_until(lambda seen=before: set(run.glob("checkpoint-*")) - seen, process)
            kill_later(process, .3)
    finish(start(again, log), log)
    assert history(run) == history(tmp_path/"whole")
    assert weights(run) == weights(tmp_path/"whole")


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_a_signal_saves_once_and_stops(csv, tmp_path, name):
    args, log, run = cheap(csv, save_steps=1000, num_epochs=3), tmp_path/"log", tmp_path/"run"
    process = start([*args, "--output", run], log)
    wait_until(lambda: (run/"metrics.jsonl").exists() and history(run), process)
    number = signal.Signals[name]
    os.kill(process.pid, number)
    text = finish(process, log, 128 + number)
    assert text.count("saving a checkpoint after this step") == 1 and f"Stopped by {name}" in text and "--resume-from-checkpoint true" in text
    assert len(list(run.glob("checkpoint-*"))) == 1 and not (run/"final").exists()
    finish(start([*args, "--output", run, "--resume_from_checkpoint", "true"], log), log)
    finish(start([*args, "--output", tmp_path/"whole"], log), log)
    assert history(run) == history(tmp_path/"whole")
    assert weights(run) == weights(tmp_path/"whole")


@pytest.fixture(scope="module")
def run(csv, tmp_path_factory):
    "A finished run whose checkpoints are there"
    out = tmp_path_factory.mktemp("runs")/"run"
    train(settings(csv, output=out))
    return out


def settings(csv, **kw): return from_args(TrainSettings, [str(a) for a in arguments(csv, **{"eval_steps": 2, "num_epochs": 1} | kw)])


def cut(path): path.write_bytes(path.read_bytes()[:-1])
def flip(path): path.write_bytes(path.read_bytes()[:-9] + bytes([path.read_bytes()[-9] ^ 1]) + path.read_bytes()[-8:])


@pytest.mark.parametrize("damage", [cut, flip, lambda path: path.unlink(), lambda path: shutil.rmtree(path.parent) or path.parent.mkdir()], ids=["truncated", "bit", "missing", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(csv, run, tmp_path, damage, capsys):
    shutil.copytree(run, tmp_path/"run")
    newest = tmp_path/"run"/"checkpoint-10"
    files = sorted(p for p in newest.iterdir() if p.name != "manifest.json")
    damage(random.choice(files))
    train(settings(csv, output=tmp_path/"run", resume_from_checkpoint=True))
    out = capsys.readouterr().out
    assert "checkpoint-10" in out
    assert history(tmp_path/"run") == history(run)
    assert weights(tmp_path/"run") == weights(run)


CHANGES = {
    "learning rate": (dict(lr=1e-3), "--lr"), "seed": (dict(seed=7), "--seed"), "batch": (dict(batch_size=2), "--batch-size"), "rank": (dict(lora_rank=8), "--lora-rank"),
    "epochs": (dict(num_epochs=2), "--num-epochs"), "augmentation": (dict(augment="noise"), "--augment"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_another_runs_checkpoint_is_refused(csv, run, tmp_path, case):
    change, why = CHANGES[case]
    shutil.copytree(run, tmp_path/"run")
    with pytest.raises(InputError, match=f"checkpoint-10: belongs to a run with other data or settings.*{why}"):
        train(settings(csv, output=tmp_path/"run", resume_from_checkpoint=True, **change))


def test_changed_rows_are_refused_unless_allowed(csv, run, tmp_path):
    shutil.copytree(run, tmp_path/"run")
    other = csv.parent/"other.csv"
    lines = csv.read_text().splitlines()
    other.write_text("\n".join([lines[0], *(line + "s" for line in lines[1:])]))
    s = settings(csv, output=tmp_path/"run", train_dataset=other, resume_from_checkpoint=True, num_epochs=2)
    with pytest.raises(InputError, match="training rows"): train(s)
    s.allow_changes = True
    assert train(s).steps == 20


def test_changed_evaluation_data_are_refused_and_may_begin_and_end(csv, tmp_path):
    "The best checkpoint would be chosen by two sets of rows"
    few, other = csv.parent/"dev.csv", csv.parent/"other_dev.csv"
    lines = csv.read_text().splitlines(keepends=True)
    few.write_text("".join(lines[:5]))
    other.write_text("".join([lines[0], *lines[5:8]]))
    s = settings(csv, output=tmp_path/"run", train_target="projector", eval_dataset=few, max_steps=2, save_steps=1, eval_steps=1,
                 early_stopping_patience="null", merge_lora=False)
    train(s)
    def again(**changes): return train(replace(s, resume_from_checkpoint=True, **changes)).steps
    assert again(eval_dataset=[]) == again() == 2
    with pytest.raises(InputError, match="evaluation rows: was .*, is .*add --allow-changes true"): again(eval_dataset=other)
    assert again(eval_dataset=other, allow_changes=True) == 2


@pytest.mark.parametrize("main", [True, False])
def test_only_the_main_process_reads_a_sharded_run(monkeypatch, main):
    "With FSDP the others get their shards from it; without, every rank reads"
    read = []
    monkeypatch.setattr(resume, "load_state", lambda folder, name: read.append(name) or {"a": 1})
    rank = SimpleNamespace(is_fsdp_enabled=True, is_world_process_zero=lambda: main)
    assert resume.RestoredState.read_once(rank, "checkpoint-1", "trained") == ({"a": 1} if main else {}) and read == ["trained"]*main
    rank.is_fsdp_enabled = False
    assert resume.RestoredState.read_once(rank, "checkpoint-1", "trained") == {"a": 1}


@pytest.mark.parametrize("main", [True, False])
def test_only_the_main_process_holds_what_deepspeed_collects(monkeypatch, main):
    "Every rank takes part, one tensor after the other"
    asked, layer = [], torch.nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "deepspeed.utils", SimpleNamespace(safe_get_full_fp32_param=lambda p: asked.append(p) or p))
    rank = SimpleNamespace(model=layer, is_world_process_zero=lambda: main)
    found = resume.GatheredState.deepspeed_tensors(rank)
    assert len(asked) == 1 and list(found) == ["weight"]*main
    if main: assert torch.equal(found["weight"], layer.weight) and found["weight"].data_ptr() != layer.weight.data_ptr()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounts a tmpfs, for which it must be root on Linux")
def test_a_full_disk_leaves_the_last_checkpoint_whole(csv, tmp_path):
    small, log = tmp_path/"small", tmp_path/"log"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", small]).returncode: pytest.skip("no mount here")
    try:
        text = finish(start([*arguments(csv, save_steps=1, save_total_limit=100), "--output", small/"run"], log), log, 2)
        assert "the disk is full" in text and "The last good checkpoint is" in text
        last = last_checkpoint(small/"run")
        assert last and not check_checkpoint(last) and not list((small/"run").glob("*.part"))
        for old in sorted((small/"run").glob("checkpoint-*"))[1:-1]: shutil.rmtree(old)
        subprocess.run(["mount", "-o", "remount,size=100m", small], check=True)
        finish(start([*arguments(csv, save_steps=1, save_total_limit=3), "--output", small/"run", "--resume_from_checkpoint", "true"], log), log)
        finish(start([*arguments(csv, save_steps=1, save_total_limit=3), "--output", tmp_path/"whole"], log), log)
        assert history(small/"run") == history(tmp_path/"whole") and weights(small/"run") == weights(tmp_path/"whole")
    finally: subprocess.run(["umount", small])
