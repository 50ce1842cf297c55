"Qwen2-Audio, built small at random from transformers' own classes: the same ids, logits and losses as theirs, every part trains, and the result needs no package of ours"
import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile as sf
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_launchers import near, together
from transformers import AutoProcessor, Qwen2AudioConfig, Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor, WhisperFeatureExtractor

from mdl_nbdev import InferSettings, TrainSettings, infer, train
from mdl_nbdev.base.settings import TuneSettings
from mdl_nbdev.data.conversations import Conversation
from mdl_nbdev.model.adapters import adapt
from mdl_nbdev.model.byte_tokenizer import byte_tokenizer
from mdl_nbdev.model.collate import Collator
from mdl_nbdev.model.families import load_chat
from mdl_nbdev.model.load import load_model
from mdl_nbdev.model.qwen2_audio import Qwen2AudioFamily
from mdl_nbdev.train.losses import loss_weights, weighted_losses

pytestmark = pytest.mark.usefixtures("one_thread")
SECONDS = 2 # of the encoder's window; the published one has 30


def build(folder):
    "A random Qwen2-Audio of a few hundred thousand weights, with its processor, in a folder"
    tok = byte_tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=["<|im_start|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"])
    processor = Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=128, chunk_length=SECONDS), tok)
    text = dict(model_type="qwen2", vocab_size=len(tok), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                tie_word_embeddings=False, bos_token_id=None, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)
    audio = dict(model_type="qwen2_audio_encoder", num_mel_bins=128, max_source_positions=SECONDS * 50, d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64)
    model = Qwen2AudioForConditionalGeneration(Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=tok.convert_tokens_to_ids("<|AUDIO|>")))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 and "embed_positions" not in name: p.normal_(0, (2 if "lm_head" in name else 1) / p[0].numel()**.5, generator=g)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return build(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def chat(folder): return load_chat(str(folder))


@pytest.fixture(scope="module")
def model(folder): return load_model(str(folder), dtype=torch.float32)


@pytest.fixture(scope="module")
def processor(folder): return AutoProcessor.from_pretrained(folder)


def noise(n, seed=0): return np.float32(np.random.default_rng([n, seed]).normal(0, .1, n))
def turn(role, text, *clips): return {"role": role, "content": [*({"type": "audio", "audio": c} for c in clips), {"type": "text", "text": text}]}


TALKS = {
    "one clip": [turn("user", "What is it?", noise(9000)), turn("assistant", "A hum.")],
    "two clips, system": [turn("system", "Be brief."), turn("user", "Which?", noise(20000), noise(4000)), turn("assistant", "The first.")],
    "turns": [turn("user", "One?", noise(5000)), turn("assistant", "Yes."), turn("user", "Two?", noise(7000)), turn("assistant", "No.")],
    "text": [turn("user", "2+2?"), turn("assistant", "4")],
}


def clips_of(messages): return [p["audio"] for m in messages for p in m["content"] if p["type"] == "audio"]
def example(chat, messages): return chat.tokenize([Conversation(messages)])[0].example(clips_of(messages))
def theirs(processor, messages, **kw): return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **kw)


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_ids_are_those_of_its_processor(chat, processor, data):
    text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Co"]), min_size=1, max_size=12).filter(str.strip)
    clip = st.integers(961, SECONDS * 16000).map(noise)
    messages = [turn("system", data.draw(text))] if data.draw(st.booleans()) else []
    for _ in range(data.draw(st.integers(1, 3))):
        messages += [turn("user", data.draw(text), *data.draw(st.lists(clip, max_size=2))), turn("assistant", data.draw(text))]
    if data.draw(st.booleans()): messages.pop()
    asked = messages[-1]["role"] == "user"
    assert example(chat, messages).input_ids.tolist() == theirs(processor, messages, add_generation_prompt=asked)["input_ids"][0].tolist()


def test_limits(chat):
    assert type(chat.family) is Qwen2AudioFamily and chat.family.max_clip_seconds == SECONDS
    short = chat.family.clip_tensors([noise(100)])["feature_attention_mask"].sum()
    assert chat.family.clip_tokens(100) == chat.family.clip_tokens(961) == 2 and short == 7


@pytest.mark.parametrize("talk", TALKS)
def test_logits_and_loss_are_those_of_transformers(chat, model, processor, talk):
    e, own = example(chat, TALKS[talk]), theirs(processor, TALKS[talk])
    batch = Collator(chat.pad_id, chat.family)([e])
    inputs = {k: v for k, v in batch.inputs.items() if k != "labels"}
    with torch.no_grad(): ours, reference = model(**inputs).logits, model(**own, labels=batch["labels"])
    assert torch.allclose(ours, reference.logits, atol=1e-5)
    weights, _ = loss_weights([batch], "tokens", [1.], 1)
    assert torch.allclose(weighted_losses(model, batch.inputs, weights[0])[0], reference.loss, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_neighbours_do_not_matter(chat, model, side):
    examples = [example(chat, t) for t in TALKS.values()]
    together, pad = Collator(chat.pad_id, chat.family, side)(examples), Collator(chat.pad_id, chat.family, side)
    def logits(batch): return model(**{k: v for k, v in batch.inputs.items() if k != "labels"}).logits
    with torch.no_grad():
        rows = logits(together)
        for i, e in enumerate(examples):
            assert torch.allclose(rows[i][together["sample"][i] >= 0], logits(pad([e]))[0], atol=5e-5), list(TALKS)[i]


@pytest.mark.parametrize("part", ["encoder", "projector", "decoder"])
def test_lora_trains_every_layer_of_a_part(folder, chat, part):
    model = adapt(load_model(str(folder), dtype=torch.float32), TuneSettings(train_target=[part], lora_rank=4)).train()
    batch = Collator(chat.pad_id, chat.family)([example(chat, t) for t in TALKS.values()])
    weights, _ = loss_weights([batch], "tokens", [1.], 1)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        weighted_losses(model, batch.inputs, weights[0])[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {n: p.abs().max().item() for n, p in model.named_parameters() if ".lora_B." in n}
    assert moved and min(moved.values()) > 1e-3, {n: v for n, v in moved.items() if v <= 1e-3}
    assert {chat.family.part_of(n) for n in moved} == {part}
    assert all(torch.equal(frozen[n], p) for n, p in model.named_parameters() if n in frozen)


LOAD = """
import json, sys, numpy as np, torch
from transformers import AutoModelForMultimodalLM, AutoProcessor
model, processor = AutoModelForMultimodalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval(), AutoProcessor.from_pretrained(sys.argv[1])
import soundfile as sf
out = []
for path in sys.argv[2:]:
    messages = [{"role": "user", "content": [{"type": "audio", "audio": sf.read(path, dtype="float32")[0]}, {"type": "text", "text": "What is it?"}]}]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1]:]
    out.append(processor.tokenizer.decode(ids, skip_special_tokens=True))
assert not any(m.startswith("mdl_nbdev") for m in sys.modules)
print(json.dumps(out))
"""


def test_the_result_needs_transformers_alone(folder, tmp_path):
    "Trained by the command's own function, merged, loaded by transformers in a process of its own: the same answers as mdl_infer's"
    with open(tmp_path / "rows.csv", "w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["audio", "user_prompt", "prediction"])
        for i in range(16):
            t = np.arange(8000) / 16000
            sf.write(tmp_path / f"{i}.wav", .3 * np.sin(2 * np.pi * (300, 2500)[i % 2] * t), 16000)
            rows.writerow([f"{i}.wav", "What is it?", ("low", "high")[i % 2]])
    run = train(TrainSettings(train_dataset=tmp_path / "rows.csv", base_dir=tmp_path, output=tmp_path / "run", model_name=str(folder), lr=5e-3, num_epochs=12, batch_size=8, bf16=False))
    assert run.last("loss") < .1
    answers = infer(InferSettings(input=tmp_path / "rows.csv", base_dir=tmp_path, output=tmp_path / "answers.csv", model_name=str(run.final), max_new_tokens=8, bf16=False))
    ours = [r["prediction"] for r in csv.DictReader(open(answers.output))]
    r = subprocess.run([sys.executable, "-c", LOAD, str(run.final), *(str(tmp_path / f"{i}.wav") for i in range(4))], capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    assert json.loads(r.stdout.splitlines()[-1]) == ours[:4] == ["low", "high"] * 2


@pytest.mark.parametrize("name", ["qwen2-audio", pytest.param("tiny", marks=pytest.mark.slow)])
def test_processes_that_have_no_clips(folder, tmp_path, name):
    "Of two processes, one often has only texts: it goes through the encoder like the other, and the run is that of one process"
    rng = np.random.default_rng(0)
    for i in range(6): sf.write(tmp_path / f"{i}.wav", rng.normal(0, .1, 8000), 16000)
    rows = [{"audio": f"{tmp_path}/{i}.wav", "prompt": "what", "answer": "noise"} for i in range(6)] + [{"prompt": f"say {i}", "answer": f"{i}" * 20} for i in range(18)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    command = ["--train-dataset", tmp_path / "rows.jsonl", "--model-name", folder if name == "qwen2-audio" else name, "--train-target", "encoder,projector,decoder",
               "--lr", 1e-4, "--max-steps", 8, "--logging-steps", 1, "--sample-answers", 0]
    together([*command, "--batch-size", 2, "--output", tmp_path / "one"], tmp_path)
    together([*command, "--batch-size", 1, "--output", tmp_path / "two"], tmp_path, 2)
    near(tmp_path / "one", tmp_path / "two", "loss", "grad_norm")
