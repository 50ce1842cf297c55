"Answers of the vLLM engine are those of transformers; runs as `make test-vllm`, in an environment of its own"
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from mdl_nbdev.base.settings import TrainSettings
from mdl_nbdev.data.sounds import make_sounds
from mdl_nbdev.model.families import load_chat
from mdl_nbdev.model.load import load_model
from mdl_nbdev.model.midashenglm import MiDashengLMConfig
from mdl_nbdev.model.midashenglm_family import tiny_config, tiny_model
from mdl_nbdev.model.save import save_model

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here: make test-vllm makes an environment with it")
pytestmark = pytest.mark.slow
KILLS = 10
ROWS = 200
root = Path(__file__).parent.parent
command = [sys.executable, "-c", "import sys; from mdl_nbdev.cli.commands import mdl_infer; mdl_infer(sys.argv[1:])"]


def start(args, folder, **env):
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", **env}
    return subprocess.Popen([*command, *map(str, args)], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def run(*args, folder, code=0, **env):
    "What a command printed"
    process = start(args, folder, **env)
    text = process.communicate(timeout=900)[0]
    assert process.returncode == code, text[-3000:]
    return text


def base_model(folder, kind):
    "A tiny model with random weights, in one of the shapes that vLLM has to tell apart"
    model, chat = tiny_model(), load_chat("tiny")
    if kind != "theta 1e4":
        text = dict(tiny_config().text_config.to_dict(), rope_parameters=dict(rope_theta=1e6, rope_type="default"))
        for name in ("rope_theta", "rotary_emb_base"): text.pop(name, None)
        if kind == "qwen3": text |= dict(model_type="qwen3", head_dim=32)
        config = MiDashengLMConfig(audio_encoder_config=tiny_config().audio_encoder_config, text_config=text, audio_token_id=tiny_config().audio_token_id)
        other = type(model)(config).eval()
        other.load_state_dict(model.state_dict(), strict=kind != "qwen3")
        model = other
        assert model.config.text_config.rope_parameters["rope_theta"] == 1e6
    model.generation_config.eos_token_id = chat.tok.eos_token_id
    return save_model(model, chat.family.processor(chat.tok), folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "Models trained on sounds, or on texts"
    from mdl_nbdev import train
    folder = tmp_path_factory.mktemp("models")
    sounds = make_sounds(folder/"sounds", 160, seed=1)
    made = {}
    options = dict(batch_size=8, max_steps=60, lr=1e-3, num_workers=1, gradient_checkpointing=False)
    for kind in ("theta 1e4", "theta 1e6", "qwen3"):
        name = str(base_model(folder/f"base {kind}", kind))
        train(TrainSettings(model_name=name, train_dataset=[sounds], base_dir=sounds.parent, output=folder/f"run {kind}", **options))
        made[kind] = folder/f"run {kind}"/"final"
    name = str(base_model(folder/"base adapter", "theta 1e4"))
    train(TrainSettings(model_name=name, train_dataset=[sounds], base_dir=sounds.parent, output=folder/"run adapter", train_target=["decoder"], merge_lora=False, **options))
    made["adapter"] = folder/"run adapter"/"final"
    words = "cat dog house tree spell count one two three".split()
    texts = [random.Random(i).choices(words, k=1 + i % 9) for i in range(200)]
    rows = [json.dumps(dict(prompt=f"Reverse: {' '.join(t)}", prediction=" ".join(t[::-1]))) for t in texts]
    (folder/"texts.jsonl").write_text("\n".join(rows) + "\n")
    train(TrainSettings(model_name="tiny-text", train_dataset=[folder/"texts.jsonl"], output=folder/"run text", **options))
    made["text"] = folder/"run text"/"final"
    return made


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    "Rows with one clip or two of 0.3 to 33 s, and some that are rejected"
    folder, random = tmp_path_factory.mktemp("calls"), np.random.default_rng(0)
    seconds = np.exp(random.uniform(np.log(.3), np.log(33), 60))
    for i, n in enumerate(seconds):
        tone = np.sin(2*np.pi*random.uniform(100, 3000)*np.arange(int(16000*n))/16000)*np.interp(np.arange(int(16000*n)), [0, 8000*n, 16000*n], random.uniform(0, .5, 3))
        sf.write(folder/f"{i}.wav", tone + .01*random.standard_normal(len(tone)), 16000)
    sf.write(folder/"long.wav", np.zeros(16000*41), 16000)
    (folder/"broken.wav").write_bytes(b"RIFF")
    rows = []
    for i in range(ROWS):
        clips = [f"{c}.wav" for c in random.integers(0, 60, 1 + (i % 4 == 0))]
        if i % 50 == 17: clips = [["missing.wav"], ["broken.wav"], ["long.wav"], ["0.wav", "broken.wav"]][i//50]
        parts = [dict(type="audio", audio=clip) for clip in clips]
        rows.append(dict(messages=[dict(role="user", content=[*parts, dict(type="text", text=["What is it?", "", "Describe the sound."][i % 3])])]))
    (folder/"calls.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder/"calls.jsonl"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder, words = tmp_path_factory.mktemp("texts"), "cat dog house tree <|endoftext|> count one two three".split()
    prompts = [f"Reverse: {' '.join(random.Random(1000 + i).choices(words, k=1 + i % 40))}" for i in range(ROWS)]
    (folder/"texts.jsonl").write_text("".join(json.dumps(dict(prompt=p)) + "\n" for p in prompts))
    return folder/"texts.jsonl"


def answer(engine, model, input, folder, code=0, name=None, **options):
    "The answers of an engine, from a process of its own"
    output = folder/f"{name or engine}.jsonl"
    settings = dict(model_name=model, base_dir=input.parent, output=output, max_new_tokens=16, max_audio_seconds=40, num_workers=1, engine=engine, confidence="true") | options
    run(input, *(part for option, value in settings.items() for part in (f"--{option.replace('_', '-')}", value)), folder=folder, code=code)
    return [json.loads(line) for line in output.read_text().splitlines()]


def rejects(folder, engine):
    "The rejected rows; `run` identifies the settings, which name the engine"
    with open(folder/f"{engine}.jsonl.rejects.csv", newline="") as f: return [{k: v for k, v in r.items() if k != "run"} for r in csv.DictReader(f)]


def gap(model, input, row, texts):
    "How far apart the log-probabilities of the two best tokens are where two answers to a row part"
    from mdl_nbdev.data.rows import to_conversation
    from mdl_nbdev.data.sources import open_rows
    from mdl_nbdev.model.collate import Collator
    chat, network = load_chat(str(model)), load_model(str(model), dtype=torch.float32)
    prompt = to_conversation([*open_rows(input, ("audio",), "utf-8").rows()][row], None, None, input.parent, False, "mix")
    a, b = (chat.tok(t, add_special_tokens=False).input_ids + [chat.tok.eos_token_id] for t in texts)
    same = next(i for i, pair in enumerate(zip(a, b)) if pair[0] != pair[1])
    example = chat.example(prompt)
    ids = np.concatenate([example.input_ids, np.array(a[:same], np.int32)])
    example.input_ids, example.labels = ids, np.full_like(ids, -100)
    inputs = Collator(chat.pad_id, chat.family, "left")([example]).inputs
    inputs.pop("labels")
    with torch.no_grad(): best = network(**inputs).logits[0, -1].log_softmax(-1).topk(2).values
    return float(best[0] - best[1])


def compare(ours, theirs, model, input):
    "Both engines give the same answers and confidences, but where the two best tokens are almost equally likely"
    assert len(ours) == len(theirs) == ROWS
    different = [i for i, (a, b) in enumerate(zip(ours, theirs)) if a["prediction"] != b["prediction"]]
    gaps = {i: gap(model, input, i, [rows[i]["prediction"] for rows in (ours, theirs)]) for i in different}
    print(f"\n{ROWS - len(different)} of {ROWS} answers are equal", *(f"row {i}: the two best tokens are {g:.1e} apart" for i, g in gaps.items()), sep="\n")
    assert all(g < 1e-3 for g in gaps.values())
    assert len({r["prediction"] for r in ours}) > 5, "the answers differ from row to row"
    far = [abs(a["confidence"] - b["confidence"]) for i, (a, b) in enumerate(zip(ours, theirs)) if i not in gaps and a.get("confidence") is not None]
    assert max(far) < 1e-3


@needs_vllm
@pytest.mark.parametrize("kind", ["theta 1e4", "theta 1e6", "qwen3"])
def test_answers_to_clips(models, calls, tmp_path, kind):
    ours, theirs = (answer(engine, models[kind], calls, tmp_path, code=2) for engine in ("transformers", "vllm"))
    compare(ours, theirs, models[kind], calls)
    assert rejects(tmp_path, "vllm") == rejects(tmp_path, "transformers") and len(rejects(tmp_path, "vllm")) == 4


@needs_vllm
def test_answers_to_texts(models, texts, tmp_path):
    ours, theirs = (answer(engine, models["text"], texts, tmp_path) for engine in ("transformers", "vllm"))
    compare(ours, theirs, models["text"], texts)


@needs_vllm
def test_an_unmerged_adapter(models, calls, tmp_path):
    base = models["adapter"].parent.parent/"base adapter"
    ours, theirs = (answer(engine, base, calls, tmp_path, code=2, adapter=models["adapter"]) for engine in ("transformers", "vllm"))
    compare(ours, theirs, base, calls)
    plain = answer("vllm", base, calls, tmp_path, code=2, name="without")
    assert [r["prediction"] for r in plain] != [r["prediction"] for r in theirs]


PLAIN = """
import json, sys
from mdl_nbdev.model.families import load_chat
from mdl_nbdev.model.vllm import single_clip_tokens
from mdl_nbdev.data.rows import to_conversation
from mdl_nbdev.data.sources import open_rows
from mdl_nbdev.data.audio import from_int16
from pathlib import Path
model, table = sys.argv[1:]
chat, conversations = load_chat(model), []
for row in open_rows(table, ('audio',), 'utf-8').rows(): conversations.append(to_conversation(row, None, None, Path(table).parent, False, 'mix'))
import vllm
from vllm import LLM, SamplingParams
llm = LLM(model, trust_remote_code=True, dtype='float32', enforce_eager=True, max_num_seqs=1, max_num_batched_tokens=8192)
answers = []
for c in conversations:
    example = chat.example(c)
    prompt = dict(prompt_token_ids=single_clip_tokens(example, chat), multi_modal_data=dict(audio=[(from_int16(x), 16000) for x in example.clips]))
    out = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=16, stop_token_ids=[chat.tok.eos_token_id]), use_tqdm=False)[0].outputs[0]
    ids = [i for i in out.token_ids if i != chat.tok.eos_token_id]
    answers.append(chat.decode_completion(ids))
print('ANSWERS' + json.dumps(answers))
"""


@needs_vllm
@pytest.mark.parametrize("kind", ["theta 1e4", "theta 1e6"])
def test_a_saved_folder_works_in_plain_vllm(models, calls, tmp_path, kind):
    "vLLM without the plugin, one clip at a time"
    good = [line for line in calls.read_text().splitlines() if line.count('"audio": ') == 1 and not any(b in line for b in ("missing", "broken", "long"))][:40]
    few = calls.parent/"few.jsonl"
    few.write_text("\n".join(good) + "\n")
    ours = [r["prediction"] for r in answer("transformers", models[kind], few, tmp_path, confidence="false")]
    r = subprocess.run([sys.executable, "-c", PLAIN, str(models[kind]), str(few)], capture_output=True, text=True, cwd=tmp_path,
                       env={**os.environ, "VLLM_PLUGINS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"})
    assert "ANSWERS" in r.stdout, r.stderr[-3000:]
    theirs = json.loads(r.stdout.split("ANSWERS")[1])
    different = [i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b]
    print(f"\n{len(ours) - len(different)} of {len(ours)} answers of plain vLLM are equal")
    assert all(gap(models[kind], few, i, (ours[i], theirs[i])) < 1e-3 for i in different)


@needs_vllm
def test_killed_at_ten_moments(models, calls, tmp_path):
    options = dict(batch_size=2, model_name=models["theta 1e4"], base_dir=calls.parent, max_new_tokens=16, max_audio_seconds=40, num_workers=1, engine="vllm")
    many = calls.parent/"many.jsonl" # so many that a run is not finished by what it writes between two kills
    many.write_text(3*calls.read_text())
    def args(output): return [many, *(p for o, v in dict(options, output=output).items() for p in (f"--{o.replace('_', '-')}", v))]
    run(*args(tmp_path/"whole.jsonl"), folder=tmp_path, code=2)
    output, written = tmp_path/"killed.jsonl", 0
    part = tmp_path/"killed.jsonl.part"
    for kill in range(KILLS):
        process, begun = start(args(output), tmp_path), time.monotonic()
        def size(): return part.stat().st_size if part.exists() else 0
        while process.poll() is None and size() <= written: # every third one dies while it starts, the others once they have written more
            if kill % 3 == 0 and time.monotonic() - begun > 3 + kill: break
            time.sleep(.02)
        time.sleep(random.Random(kill).uniform(0, .1))
        assert process.poll() is None, process.communicate()[0][-3000:]
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        written = size()
    text = run(*args(output), folder=tmp_path, code=2)
    assert "answered before" in text
    assert output.read_bytes() == (tmp_path/"whole.jsonl").read_bytes()
    assert (tmp_path/"killed.jsonl.rejects.csv").read_bytes() == (tmp_path/"whole.jsonl.rejects.csv").read_bytes()


@needs_vllm
def test_two_processes(models, calls, tmp_path):
    "Each has an engine, and the file is that of one process"
    few = calls.parent/"some.jsonl"
    few.write_text("\n".join(calls.read_text().splitlines()[:64]) + "\n")
    options = dict(batch_size=2, model_name=models["qwen3"], base_dir=calls.parent, max_new_tokens=8, max_audio_seconds=40, num_workers=1, engine="vllm")
    def args(output): return [few, *(p for o, v in dict(options, output=output).items() for p in (f"--{o.replace('_', '-')}", v))]
    run(*args(tmp_path/"one.jsonl"), folder=tmp_path, code=2)
    import training_runs
    processes = [start(args(tmp_path/"two.jsonl"), tmp_path, **env, VLLM_CPU_OMP_THREADS_BIND="nobind") for env in training_runs.ranks(2)]
    printed = [p.communicate(timeout=600)[0] for p in processes]
    assert processes[0].returncode == 2, "\n".join(printed)[-4000:]
    assert (tmp_path/"two.jsonl").read_bytes() == (tmp_path/"one.jsonl").read_bytes()


