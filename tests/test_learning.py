"Does it learn? Rules of spelling by a text model, in LoRA and in full; sounds by an audio model whose base is in four bits"
import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mdl_nbdev.base.settings import EvalSettings, InferSettings, MergeSettings, TrainSettings
from mdl_nbdev.cli.demo import TINY_LORA
from mdl_nbdev.data.sounds import make_sounds
from mdl_nbdev.infer.evaluate import evaluate
from mdl_nbdev.infer.run import infer
from mdl_nbdev.model.load import load_model
from mdl_nbdev.model.save import merge_adapter
from mdl_nbdev.train.run import train

PACKED = dict(model_name="tiny-text", packing=True, seq_length=128, lr_scheduler_type="cosine", gradient_checkpointing=False)


pytestmark = pytest.mark.usefixtures("one_thread")


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def write_tasks(folder, answers, words, held_out):
    "A folder for each task with a record for each word, and a file with both questions about the words that are held out"
    assert not set(words[:-held_out]) & set(words[-held_out:])
    record = lambda task, w: dict(data_name=task, prompt=f"{task} {w}", answer=answers[task](w))
    for task in answers: write(folder/"tasks"/task/"words.jsonl", [record(task, w) for w in words[:-held_out]])
    write(folder/"test.jsonl", [record(task, w) for w in words[-held_out:] for task in answers])


def exact(path):
    "The share of right answers in each task, counted without the package"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {t: sum(r["prediction"] == r["answer"] for r in rows if r["data_name"] == t) / sum(r["data_name"] == t for r in rows) for t in {r["data_name"] for r in rows}}


def test_two_small_tasks(tmp_path):
    "The first or the last letter of words that were not in the training"
    rng = random.Random(0)
    words = list(dict.fromkeys("".join(rng.choices("abcdefgh", k=4)) for _ in range(900)))[:650]
    write_tasks(tmp_path, dict(first=lambda w: w[0], last=lambda w: w[-1]), words, 50)
    report = train(TrainSettings(train_dataset=tmp_path/"tasks", output=tmp_path/"run", tuning="full", lr=1e-3, batch_size=4, max_steps=140, warmup_steps=.1, **PACKED))
    assert report.last("loss_first") < .2 and report.last("loss_last") < .2
    infer(InferSettings(input=tmp_path/"test.jsonl", output=tmp_path/"answers.jsonl", model_name=str(report.final), max_new_tokens=4, batch_size=50))
    right = exact(tmp_path/"answers.jsonl")
    assert min(right.values()) >= .9, right # one in eight by chance
    assert evaluate(EvalSettings(input=tmp_path/"answers.jsonl", reference=tmp_path/"test.jsonl")).scores.exact == pytest.approx(sum(right.values()) / 2)


@pytest.fixture(scope="module")
def spelling(tmp_path_factory):
    "Words of three to five letters to reverse and to spell; a hundred of them are held out"
    folder, rng = tmp_path_factory.mktemp("spelling"), random.Random(1)
    words = list(dict.fromkeys("".join(rng.choices("aaaeeeiioouubcdfghjklmnpqrstvwxyz", k=rng.randint(3, 5))) for _ in range(5000)))[:4100]
    write_tasks(folder, dict(reverse=lambda w: w[::-1], spell=" ".join), words, 100)
    return folder


def run(folder, line):
    "Run a command line in a folder, on one thread; gives what it printed and the seconds of CPU that it took"
    command, *arguments = line.split()
    spent = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    before, env = spent(), os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    done = subprocess.run([Path(sys.executable).with_name(command), *arguments], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, spent() - before


TUNING = {"lora": "--lr 2e-3 --lora-alpha 64 --max-steps 400", "full": "--tuning full --train-target decoder,embed_tokens,lm_head --lr 1e-3 --max-steps 500"}


@pytest.mark.slow
@pytest.mark.parametrize("tuning", TUNING)
def test_reverse_and_spell(spelling, tuning):
    "From records to answers by command lines alone: at least 95 % exact, in less than four minutes"
    for task in ("reverse", "spell"): assert "bad: 0" in run(spelling, f"mdl_check tasks/{task}/words.jsonl")[0]
    _, seconds = run(spelling, f"mdl_train --train-dataset tasks --validation-split 0.02 --loss-mode case3 --model-name tiny-text --output {tuning} {TUNING[tuning]} --warmup-steps 0.05 --lr-scheduler-type cosine "
                               "--packing true --seq-length 128 --batch-size 8 --eval-batch-size 80 --eval-steps 100 --gradient-checkpointing false")
    run(spelling, f"mdl_infer test.jsonl --output {tuning}.jsonl --model-name {tuning}/final --max-new-tokens 16")
    run(spelling, f"mdl_eval {tuning}.jsonl --reference test.jsonl --output {tuning}.json")
    right, figures = exact(spelling/f"{tuning}.jsonl"), json.loads((spelling/f"{tuning}.json").read_text())
    print(f"{tuning}: {right}, {seconds:.0f} s of CPU")
    assert figures["exact"] == pytest.approx(sum(right.values()) / 2) and figures["rows"] == 200
    assert figures["exact"] >= .95, right
    assert seconds < 240
    if tuning == "lora": # the adapter alone, on top of the base model, says the same
        run(spelling, "mdl_infer test.jsonl --output adapter.jsonl --model-name tiny-text --adapter lora/checkpoint-400 --max-new-tokens 16")
        assert (spelling/"adapter.jsonl").read_bytes() == (spelling/"lora.jsonl").read_bytes()


def sound_score(folder, name, quantization):
    "Train `tiny` on sounds as the demo does; gives the share of held-out clips that the model in `final/` names"
    report = train(TrainSettings(train_dataset=folder/"train.csv", base_dir=folder, output=folder/name, num_epochs=9, quantization=quantization, **TINY_LORA))
    infer(InferSettings(input=folder/"test.csv", base_dir=folder, output=folder/f"{name}.csv", model_name=str(report.final), max_new_tokens=24, batch_size=50))
    return evaluate(EvalSettings(input=folder/f"{name}.csv", reference=folder/"test.csv")).scores.exact


@pytest.mark.slow
def test_sounds_in_four_bits(tmp_path):
    "Within five points of float32; what is saved is the float32 base with the adapter that was trained on the packed one"
    make_sounds(tmp_path, 800, 42, "train.csv")
    make_sounds(tmp_path, 200, 43, "test.csv")
    packed = load_model("tiny", quantization="4bit", device="cpu")
    assert sum(type(m).__name__ == "Linear4bit" for m in packed.modules()) > 20
    plain, four = sound_score(tmp_path, "plain", None), sound_score(tmp_path, "four", "4bit")
    print(f"float32 {plain:.1%}, 4-bit {four:.1%}")
    assert plain >= .95 and four >= plain - .05

    base, final = load_model("tiny").state_dict(), load_model(str(tmp_path/"four"/"final")).state_dict()
    changed = {k for k in base if not torch.equal(base[k], final[k])}
    assert changed and all(base[k].ndim == 2 and base[k].dtype == final[k].dtype == torch.float32 for k in changed)
    for k in changed: assert torch.linalg.matrix_rank(final[k].double() - base[k].double(), rtol=1e-4) <= 32, k # an adapter's update, without the rounding of four bits
    merge_adapter(MergeSettings(adapter=tmp_path/"four"/"checkpoint-450", output=tmp_path/"merged"))
    merged = load_model(str(tmp_path/"merged")).state_dict()
    assert all(torch.equal(merged[k], final[k]) for k in final)
