"MiDashengLM against an independent slow reference, and what must hold of it in batches, training, generation and files"
import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference_midashenglm as reference
import soundfile
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, PreTrainedTokenizerFast, Wav2Vec2FeatureExtractor

from mdl_nbdev.model import label_loss, midasheng_encoder
from mdl_nbdev.model import midashenglm as mdl
from mdl_nbdev.model.midasheng_encoder import n_audio_tokens
from mdl_nbdev.model.midashenglm import CACHE, MiDashengLMConfig, MiDashengLMModel, MiDashengLMProcessor

torch.set_num_threads(1)
AUDIO, PAD = 99, 0
SECONDS = [0.05, 0.2, 1, 10.08, 10.1, 20.19, 33]
qwen2 = dict(model_type="qwen2", rope_theta=1e6)
qwen3 = dict(model_type="qwen3", rope_theta=1e6, head_dim=16, tie_word_embeddings=True)


def small_config(text=qwen2, **audio):
    "Every size is small; `hidden_size` is no multiple of the encoder's, so that nothing fits by accident"
    shape = dict(vocab_size=100, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    return MiDashengLMConfig({**dict(embed_dim=32, depth=2, num_heads=2), **audio}, {**shape, **text}, audio_token_id=AUDIO)


def lively(model, seed=0):
    "Weights large enough that every part of the network matters to the logits, and BatchNorm statistics like real ones"
    g = torch.Generator().manual_seed(seed)
    def noise(p): return torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1: p.copy_(noise(p)*0.1 + (1 if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "layernorm.weight", "init_bn.weight", "gamma")) else 0))
            elif "embed" in name: p.copy_(noise(p)*(0.1 if "patch" in name else 0.5))
            else: p.copy_(noise(p)/p[0].numel()**0.5)
        bn = model.audio_encoder.init_bn
        bn.running_mean.copy_(noise(bn.running_mean)*5 - 20)
        bn.running_var.copy_(noise(bn.running_var)**2*100 + 200)
    return model.eval()


def make_clip(seconds, seed=0):
    "A chirp over noise, louder and softer with time"
    rng, n = np.random.default_rng(seed), int(seconds*16000)
    t = np.arange(n)/16000
    x = 0.3*np.sin(2*np.pi*(300*t + 800*np.sin(t)))*(1 + np.sin(3*t)) + 0.05*rng.standard_normal(n)
    return torch.tensor(x/max(1, np.abs(x).max()), dtype=torch.float32)


def make_row(*clips, seed=0, n_text=6):
    "Token ids: text, then for each clip its audio tokens and some text"
    g = torch.Generator().manual_seed(seed)
    def text(n): return torch.randint(1, 99, (n,), generator=g).tolist()
    ids = text(n_text)
    for c in clips: ids += [AUDIO]*n_audio_tokens(len(c)) + text(n_text)
    return ids


def make_batch(rows, side="right", labels=None):
    "Rows of (ids, clips) to padded inputs; with `labels`, the last so many tokens of each row have one"
    width, clips = max(len(ids) for ids, _ in rows), [c for _, cs in rows for c in cs]
    def pad(xs, fill): return [fill]*(width - len(xs)) + list(xs) if side == "left" else list(xs) + [fill]*(width - len(xs))
    out = dict(input_ids=torch.tensor([pad(ids, PAD) for ids, _ in rows]), attention_mask=torch.tensor([pad([1]*len(ids), 0) for ids, _ in rows]))
    if clips:
        out["input_values"] = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
        out["audio_length"] = torch.tensor([len(c) for c in clips])
    if labels is not None: out["labels"] = torch.tensor([pad([-100]*(len(ids) - labels) + ids[-labels:], -100) for ids, _ in rows])
    return out


@pytest.fixture(scope="module")
def model2(): return lively(MiDashengLMModel(small_config(qwen2)))


@pytest.fixture(scope="module")
def model3(): return lively(MiDashengLMModel(small_config(qwen3, init_values=0.1)))


@pytest.fixture(params=["qwen2", "qwen3-tied-layerscale"])
def model(request, model2, model3): return model2 if request.param == "qwen2" else model3


@pytest.fixture(scope="module")
def rows():
    "One clip a row, two clips, none"
    clips = [make_clip(s, i) for i, s in enumerate(SECONDS)]
    rows = [(make_row(c, seed=i), [c]) for i, c in enumerate(clips)]
    return rows + [(make_row(clips[2], clips[4], seed=70), [clips[2], clips[4]]), (make_row(seed=71), [])]


@pytest.fixture(scope="module")
def expected(model2, model3, rows):
    "The slow reference's logits of every row, for both models"
    def of(m):
        c = m.config
        text = {k: getattr(c.text_config, k) for k in ("num_attention_heads", "num_key_value_heads", "num_hidden_layers", "rope_theta")}
        audio = {k: getattr(c.audio_encoder_config, k) for k in ("depth", "num_heads")}
        sd = {k: v for k, v in m.state_dict().items() if not (c.tie_word_embeddings and k == "decoder.lm_head.weight")}
        with torch.no_grad(): return [reference.logits(sd, audio, text, AUDIO, ids, clips) for ids, clips in rows]
    return {id(model2): of(model2), id(model3): of(model3)}


def row_logits(model, batch):
    "Logits of each row without its padding"
    with torch.no_grad(): out = model(**batch).logits
    return [x[m.bool()] for x, m in zip(out, batch["attention_mask"])]


def test_one_at_a_time_equals_reference(model, rows, expected):
    for row, want in zip(rows, expected[id(model)]):
        got, = row_logits(model, make_batch([row]))
        assert want.std() > 0.3
        torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_mixed_batch_equals_reference(model, rows, expected, side):
    for got, want in zip(row_logits(model, make_batch(rows, side)), expected[id(model)]):
        torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=0)


def test_neighbours_do_not_matter(model2, rows):
    whole = row_logits(model2, make_batch(rows))
    for i, row in enumerate(rows): torch.testing.assert_close(row_logits(model2, make_batch([row]))[0], whole[i], atol=1e-5, rtol=0)
    loud = make_clip(12, 50)*3
    other = row_logits(model2, make_batch([rows[2], (make_row(loud), [loud])]))[0]
    torch.testing.assert_close(other, whole[2], atol=1e-5, rtol=0)


def test_what_lies_beyond_a_clip_is_not_read(model2, rows):
    batch = make_batch([rows[0], rows[2], rows[3]])
    dirty = {**batch, "input_values": batch["input_values"].clone()}
    for x, n in zip(dirty["input_values"], batch["audio_length"]): x[n:] = 9.
    for a, b in zip(row_logits(model2, batch), row_logits(model2, dirty)): torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_any_length(model2):
    "Lengths around every boundary: chunk, token, patch, frame, and the shortest clip"
    lengths = [1, 3199, 3200, 3359, 3360, 161119, 161120, 161279, 161280, 161919, 161920, 164479, 164480, 323039, 323040, 323200]
    clips = [make_clip(21, i)[:n] for i, n in enumerate(lengths)]
    batch = make_batch([(make_row(c), [c]) for c in clips])
    with torch.no_grad():
        together = model2.encode_audio(batch["input_values"], batch["audio_length"]).split([n_audio_tokens(n) for n in lengths])
        for c, got in zip(clips, together): torch.testing.assert_close(model2.encode_audio(c[None]), got, atol=1e-5, rtol=0)
        sd = {k: v.double() for k, v in model2.state_dict().items()}
        for i in (0, 4, 9, 14):
            want = reference.encode_clip(sd, dict(depth=2, num_heads=2), clips[i])
            torch.testing.assert_close(together[i].double(), want, atol=1e-4, rtol=0)


def test_gradients_of_a_mixed_batch_are_the_sum_of_its_rows(rows):
    model = lively(MiDashengLMModel(small_config(init_values=0.5))).double().train()
    def gradients(*rs):
        model.zero_grad()
        model(**make_batch(rs, "left", labels=4), num_items_in_batch=1).loss.backward()
        return {k: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for k, p in model.named_parameters()}
    chosen = [rows[i] for i in (0, 2, 5, 7, 8)]
    together, alone = gradients(*chosen), [gradients(r) for r in chosen]
    for k, g in together.items():
        assert g.isfinite().all(), k
        if "audio_encoder.init_bn" not in k: assert g.abs().max() > 0, k
        torch.testing.assert_close(g, sum(a[k] for a in alone), atol=1e-7, rtol=1e-6)


def test_mel_equals_reference_whatever_the_dtype(model2):
    clips = [make_clip(s, i) for i, s in enumerate([0.2, 1, 3.3])] + [torch.zeros(4000), make_clip(1)*1e-4]
    batch = make_batch([([1], clips)])
    config, n = model2.config.audio_encoder_config, batch["audio_length"]
    want = [reference.log_mel(c) for c in clips]
    half = copy.deepcopy(model2).to(torch.bfloat16)
    seen = {}
    half.audio_encoder.init_bn.register_forward_pre_hook(lambda m, args: seen.update(mel=args[0]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = midasheng_encoder.log_mel(batch["input_values"], n, config)
        half.encode_audio(clips[1][None])
    assert got.dtype == seen["mel"].dtype == torch.float32
    for a, b in zip(got, want): torch.testing.assert_close(a[:, :b.shape[1]].double(), b, atol=2e-3, rtol=0)
    torch.testing.assert_close(seen["mel"][0, :, 0].double(), want[1][:, :100], atol=2e-3, rtol=0)


def test_dtypes(model2, rows):
    batch = make_batch(rows[:4])
    want = row_logits(model2, batch)
    half = row_logits(copy.deepcopy(model2).to(torch.bfloat16), batch)
    with torch.autocast("cpu", torch.bfloat16): cast = row_logits(model2, batch)
    for w, h, c in zip(want, half, cast):
        assert torch.corrcoef(torch.stack([w.flatten(), h.float().flatten()]))[0, 1] > 0.995
        assert torch.corrcoef(torch.stack([w.flatten(), c.float().flatten()]))[0, 1] > 0.995


def test_int16_equals_float(model2, rows):
    batch = make_batch(rows[:4])
    ints = (batch["input_values"]*32767).round().to(torch.int16)
    a = row_logits(model2, {**batch, "input_values": ints})
    b = row_logits(model2, {**batch, "input_values": ints.float()/32768})
    for x, y in zip(a, b): torch.testing.assert_close(x, y, atol=0, rtol=0)


def test_batchnorm_never_moves(rows):
    model = lively(MiDashengLMModel(small_config()))
    before = {k: v.clone() for k, v in model.named_buffers()}
    batch = make_batch(rows[:3], labels=3)
    model.eval()
    quiet = model(**batch).loss
    model.train()
    assert not model.audio_encoder.init_bn.training and model.audio_encoder.blocks[0].training
    torch.testing.assert_close(model(**batch).loss, quiet)
    for k, v in model.named_buffers(): assert torch.equal(v, before[k]), k


def test_dropout_rates():
    model = lively(MiDashengLMModel(small_config(drop_rate=0.5, attn_drop_rate=0.5)))
    x = make_clip(1)[None]
    same = torch.equal(model.encode_audio(x), model.encode_audio(x))
    model.train()
    assert same and not torch.equal(model.encode_audio(x), model.encode_audio(x))


# Loss

def full_loss(model, batch):
    "Mean cross entropy over all logits, the plain way"
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten())


@pytest.mark.parametrize("pieces", [2**25, 700])
def test_loss_equals_loss_of_full_logits(model, rows, pieces, monkeypatch):
    monkeypatch.setattr(label_loss, "LOSS_LOGITS", pieces)
    model = copy.deepcopy(model).train()
    batch, grads = make_batch(rows[:4], labels=6), []
    for loss in (model(**batch).loss, full_loss(model, batch)):
        model.zero_grad()
        loss.backward()
        grads.append((loss.detach(), {k: p.grad.clone() for k, p in model.named_parameters()}))
    (a, ga), (b, gb) = grads
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    for k in ga: torch.testing.assert_close(ga[k], gb[k], atol=1e-5, rtol=1e-4)


def test_loss_in_any_number_of_pieces(model2, rows):
    "Also in more of them than there are labels, as another process may need"
    batch = make_batch(rows[:3], labels=5)
    weights = torch.rand(2, *batch["labels"].shape, generator=torch.Generator().manual_seed(0))
    whole = model2(**batch, loss_weights=weights).loss
    for n in (1, 2, 7, 40): torch.testing.assert_close(model2(**batch, loss_weights=weights, loss_pieces=n).loss, whole, atol=1e-5, rtol=1e-6)


def test_loss_options(model2, rows):
    batch = make_batch(rows[:3], labels=5)
    out = model2(**batch)
    assert out.logits is None and getattr(out, CACHE) is None and out.loss.dtype == torch.float32
    torch.testing.assert_close(model2(**batch, num_items_in_batch=torch.tensor(45)).loss, out.loss*15/45)
    asked = model2(**batch, logits_to_keep=0)
    assert asked.logits.shape == (*batch["input_ids"].shape, 100)
    assert model2(**make_batch(rows[:3]), logits_to_keep=2).logits.shape[1] == 2
    torch.testing.assert_close(model2(**make_batch(rows[:3]), logits_to_keep=torch.tensor([1, 4])).logits, asked.logits[:, [1, 4]], atol=1e-5, rtol=0)
    assert isinstance(model2(**batch, return_dict=False), tuple)
    assert model2.accepts_loss_kwargs


def test_no_label_gives_zero_and_zero_gradients(rows):
    model = lively(MiDashengLMModel(small_config())).train()
    batch = make_batch(rows[:2], labels=3)
    loss = model(**{**batch, "labels": torch.full_like(batch["labels"], -100)}).loss
    loss.backward()
    assert loss == 0
    for k, p in model.named_parameters(): assert p.grad is not None and not p.grad.any(), k


@pytest.mark.parametrize("pieces", [2**25, 700])
def test_weighted_sums_equal_those_of_full_logits(model, rows, pieces, monkeypatch):
    "Two planes of weights, some of them zero, in value and in gradient; through an adapter's wrapper as well"
    monkeypatch.setattr(label_loss, "LOSS_LOGITS", pieces)
    model = copy.deepcopy(model).train()
    batch, g, grads = make_batch(rows[:4], labels=6), torch.Generator().manual_seed(0), []
    weights = torch.rand(2, *batch["labels"].shape, generator=g)
    weights[0, 1] = 0
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    each = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none")
    full = torch.stack([(w[:, 1:].flatten()*each).sum() for w in weights])
    for sums in (model(**batch, loss_weights=weights).loss, full):
        model.zero_grad()
        assert sums.shape == (2,) and sums.dtype == torch.float32
        sums[0].backward()
        grads.append((sums.detach(), {k: p.grad.clone() for k, p in model.named_parameters()}))
    (a, ga), (b, gb) = grads
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-6)
    for k in ga: torch.testing.assert_close(ga[k], gb[k], atol=3e-5, rtol=1e-4)
    torch.testing.assert_close(lora(model)(**batch, loss_weights=weights).loss, b, atol=1e-5, rtol=1e-6)


def test_weights_without_labels_give_zeros_and_zero_gradients(rows):
    model, batch = lively(MiDashengLMModel(small_config())).train(), make_batch(rows[:2], labels=3)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = model(**batch, loss_weights=torch.ones(3, *batch["labels"].shape)).loss
    loss[0].backward()
    assert loss.tolist() == [0, 0, 0]
    for k, p in model.named_parameters(): assert p.grad is not None and not p.grad.any(), k


def test_padding_side_does_not_matter(model, rows):
    model = copy.deepcopy(model).train()
    found = []
    for side in ("left", "right"):
        model.zero_grad()
        loss = model(**make_batch(rows, side, labels=4)).loss
        loss.backward()
        found.append((loss.detach(), {k: p.grad for k, p in model.named_parameters()}))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=0)
    for k, g in found[0][1].items():
        assert g.isfinite().all()
        torch.testing.assert_close(g, found[1][1][k], atol=1e-5, rtol=1e-3)


memory = """
import re, torch, torch.nn.functional as F
from mdl_nbdev.model.label_loss import labelled_loss
torch.set_num_threads(1)
vocabulary = 152064
head, hidden = torch.nn.Linear(16, vocabulary, bias=False), torch.randn(2, 384, 16, requires_grad=True)
ballast = torch.ones(150_000_000) # more than the imports needed at their peak
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])/1024 # getrusage's begins at that of the parent
def ours(labels): return labelled_loss(hidden, labels, head, vocabulary)
planes = torch.rand(8, 2, 384)
def weighted(labels): return labelled_loss(hidden, labels, head, vocabulary, loss_weights=planes)[0]
def full(labels): return F.cross_entropy(head(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
everywhere = torch.randint(0, vocabulary, (2, 384))
answers = everywhere.clone()
answers[:, :352] = -100
hidden.sum().backward()
before = peak()
for loss, labels in (ours, answers), (ours, everywhere), (weighted, everywhere), (full, answers):
    head.zero_grad()
    value = loss(labels)
    value.backward()
    print(peak() - before, value.item())
"""


@pytest.mark.slow
def test_loss_memory_at_a_large_vocabulary():
    "Peak of a process's resident memory in MiB, forward and backward; it can only rise, so the small cases come first"
    r = subprocess.run([sys.executable, "-c", memory], capture_output=True, text=True, check=True)
    (answers, a), (everything, _), (weighted, _), (full, b) = ([float(x) for x in line.split()] for line in r.stdout.splitlines())
    print(f"768 positions, 64 labelled: {answers:.0f} MiB; all labelled: {everything:.0f} MiB; all weighted in eight ways: {weighted:.0f} MiB; full logits: {full:.0f} MiB")
    assert abs(a - b) < 1e-4
    assert answers < full/8 and everything < full/2 and weighted < 1.2*everything


# Clips and their places

def test_mismatch_names_both_numbers(model2, rows):
    ids, clips = rows[2]
    for batch, numbers in [(make_batch([(ids, [])]), (5, 0)), (make_batch([(ids[:-1] + [AUDIO], clips)]), (6, 5)), (make_batch([(rows[8][0], clips)]), (0, 5))]:
        with pytest.raises(ValueError, match=f"{numbers[0]} audio tokens.*{numbers[1]}"): model2(**batch)
    with pytest.raises(ValueError, match="audio_length"): model2(**{**make_batch([rows[2]]), "audio_length": torch.tensor([99999])})
    with pytest.raises(ValueError, match="audio_length"): model2(**{**make_batch([rows[2]]), "audio_length": torch.tensor([9999, 1])})


def test_empty_clip_tensor_is_no_clip(model2, rows):
    batch = make_batch([rows[8]])
    a, b = row_logits(model2, batch)[0], row_logits(model2, {**batch, "input_values": torch.zeros(0, 0), "audio_length": torch.zeros(0).long()})[0]
    assert torch.equal(a, b)


# Training

def lora(model, targets=r".*(qkv|proj|fc1|fc2|net\.0|net\.2|[qkvo]_proj|gate_proj|up_proj|down_proj)"):
    from peft import LoraConfig, get_peft_model
    return get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=targets, exclude_modules=r".*patch_embed.*"))


def test_gradient_checkpointing_changes_no_gradient(rows):
    batch, found = make_batch(rows[:5], labels=4), []
    for on in (False, True):
        model = lively(MiDashengLMModel(small_config(init_values=0.5))).train()
        if on: model.gradient_checkpointing_enable({"use_reentrant": False})
        model.decoder.model.embed_tokens.requires_grad_(False)
        calls = []
        model.audio_encoder.blocks[0].mlp.register_forward_hook(lambda *a, calls=calls: calls.append(1))
        model(**batch).loss.backward()
        assert len(calls) == 1 + on
        found.append({k: p.grad for k, p in model.named_parameters() if p.requires_grad})
    for k in found[0]: torch.testing.assert_close(found[0][k], found[1][k], atol=1e-6, rtol=1e-4)


def test_lora_with_checkpointing_trains_every_target_and_nothing_else(rows):
    torch.manual_seed(0)
    model = lora(lively(MiDashengLMModel(small_config(init_values=0.5))))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    frozen = {k: v.clone() for k, v in model.state_dict().items() if "lora_" not in k}
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch, losses = make_batch([rows[i] for i in (1, 2, 4, 7, 8)], "left", labels=4), []
    for _ in range(5):
        loss = model(**batch).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    b = {k: p for k, p in model.named_parameters() if "lora_B" in k}
    assert len(b) == 2*4 + 2 + 2*7
    for k, p in b.items(): assert p.any(), k
    for k, v in model.state_dict().items():
        if "lora_" not in k: assert torch.equal(v, frozen[k]), k


def test_frozen_encoder_keeps_no_graph(rows):
    model = lively(MiDashengLMModel(small_config()))
    model.audio_encoder.requires_grad_(False)
    model.audio_projector.requires_grad_(False)
    batch = make_batch([rows[2]])
    assert not model.encode_audio(batch["input_values"], batch["audio_length"]).requires_grad


def test_clips_are_encoded_some_at_a_time(model2, monkeypatch):
    "Without gradients, the encoder never sees more samples than it may; its vectors are the same"
    clips = [make_clip(21, i)[:n] for i, n in enumerate([16000, 170000, 3200, 40000, 90000])]
    batch, sizes = make_batch([(make_row(c), [c]) for c in clips]), []
    values, lengths = batch["input_values"], batch["audio_length"]
    forward = model2.audio_encoder.forward
    def noted(waveform, *rest):
        sizes.append(waveform.numel())
        return forward(waveform, *rest)
    monkeypatch.setattr(model2.audio_encoder, "forward", noted)
    with torch.no_grad():
        expected = model2.encode_audio(values, lengths)
        monkeypatch.setitem(mdl.ENCODED_AT_ONCE, "cpu", 2*values.shape[1] + 1)
        torch.testing.assert_close(model2.encode_audio(values, lengths), expected, atol=1e-5, rtol=0)
    assert len(sizes) == 1 + -(-len(values)//2) and max(sizes[1:]) <= 2*values.shape[1]
    model2.encode_audio(values, lengths)
    assert sizes[-1] == sizes[0], "training counts on one call in each rank"



# Generation

def greedy(model, ids, clips, n):
    "Each token by a forward pass over everything before it, with no cache"
    ids, new = list(ids), []
    for _ in range(n):
        new.append(row_logits(model, make_batch([(ids, clips)]))[0][-1].argmax().item())
        ids.append(new[-1])
    return new


def test_generate_equals_greedy_without_cache(model, rows):
    chosen = [rows[i] for i in (0, 2, 4, 7, 8)]
    got = model.generate(**make_batch(chosen, "left"), max_new_tokens=6, do_sample=False, pad_token_id=PAD, eos_token_id=None)
    assert got.shape == (5, 6)
    for row, tokens in zip(chosen, got.tolist()):
        want = greedy(model, *row, 6)
        assert AUDIO not in want, "choose another seed: the comparison needs text"
        assert tokens == want


def test_clips_are_encoded_once_and_prompt_logits_are_of_one_position(model2, rows):
    seen, widths = [], []
    hooks = [model2.audio_encoder.register_forward_hook(lambda *a: seen.append(1)),
             model2.decoder.lm_head.register_forward_hook(lambda m, args, out: widths.append(out.shape[1]))]
    model2.generate(**make_batch(rows[:3], "left"), max_new_tokens=4, num_beams=2, pad_token_id=PAD, eos_token_id=None)
    for h in hooks: h.remove()
    assert len(seen) == 1 and set(widths) == {1}


@pytest.mark.parametrize("options", [dict(num_beams=3, num_return_sequences=2), dict(num_beams=2, length_penalty=0.5), dict(do_sample=True, top_k=1, num_return_sequences=3)])
def test_beams_and_return_sequences(model2, rows, options):
    "Rows with several clips, one and none, each as if it were generated for alone"
    chosen = [rows[i] for i in (7, 2, 8)]
    options = dict(max_new_tokens=5, pad_token_id=PAD, eos_token_id=None, **options)
    k = options.get("num_return_sequences", 1)
    got = model2.generate(**make_batch(chosen, "left"), **options)
    assert got.shape == (3*k, 5)
    for i, row in enumerate(chosen):
        assert torch.equal(got[i*k:i*k+k], model2.generate(**make_batch([row]), **options))


def test_sampling_and_dict_output(model2, rows):
    torch.manual_seed(0)
    out = model2.generate(**make_batch(rows[:2], "left"), max_new_tokens=4, do_sample=True, return_dict_in_generate=True, output_scores=True, pad_token_id=PAD, eos_token_id=None)
    assert out.sequences.shape == (2, 4) and len(out.scores) == 4


def test_own_decoding_loop(model2, rows):
    "forward with a cache, clips given once"
    ids, clips = rows[7]
    out = model2(**make_batch([rows[7]]), use_cache=True, logits_to_keep=1)
    tokens, mask = [], torch.ones(1, len(ids)).long()
    for _ in range(4):
        tokens.append(out.logits[0, -1].argmax().item())
        mask = torch.cat([mask, torch.ones(1, 1).long()], dim=1)
        out = model2(input_ids=torch.tensor([tokens[-1:]]), attention_mask=mask, use_cache=True, **{CACHE: getattr(out, CACHE)})
    assert tokens == greedy(model2, ids, clips, 4)


# Sizes and names

def test_sizes_of_the_7b():
    from peft import LoraConfig, get_peft_model
    with torch.device("meta"): model = MiDashengLMModel(MiDashengLMConfig())
    assert {k: sum(p.numel() for p in m.parameters()) for k, m in model.named_children()} == {
        "audio_encoder": 630_333_568, "audio_projector": 35_789_824, "decoder": 7_615_616_512}
    assert model.num_parameters() == 8_281_739_904
    targets = r"audio_encoder\.blocks\.\d+\.attn\.(qkv|proj)|audio_projector\.net\.[02]|decoder\.model\.layers\.\d+\.mlp\.(gate|up|down)_proj"
    with torch.device("meta"): adapted = get_peft_model(model, LoraConfig(r=32, target_modules=targets))
    assert adapted.get_nb_trainable_parameters() == (68_968_448, 8_350_708_352)


def test_state_dict_keys():
    def keys(model): return set(model.state_dict())
    block = [f"{n}.{p}" for n in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2") for p in ("weight", "bias")]
    layer = ["input_layernorm.weight", "post_attention_layernorm.weight"] + [f"self_attn.{c}_proj.weight" for c in "qkvo"] + [f"mlp.{c}_proj.weight" for c in ("gate", "up", "down")]
    want = {f"audio_encoder.init_bn.{k}" for k in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    want |= {"audio_encoder.time_pos_embed", "audio_encoder.freq_pos_embed", "audio_encoder.norm.weight", "audio_encoder.norm.bias"}
    want |= {f"{n}.{p}" for n in ("audio_encoder.patch_embed.proj", "audio_projector.net.0", "audio_projector.net.2") for p in ("weight", "bias")}
    want |= {f"audio_encoder.blocks.{i}.{k}" for i in range(2) for k in block}
    want |= {f"decoder.model.layers.{i}.{k}" for i in range(2) for k in layer} | {"decoder.model.embed_tokens.weight", "decoder.model.norm.weight", "decoder.lm_head.weight"}
    biases = {f"decoder.model.layers.{i}.self_attn.{c}_proj.bias" for i in range(2) for c in "qkv"}
    norms = {f"decoder.model.layers.{i}.self_attn.{c}_norm.weight" for i in range(2) for c in "qk"}
    scales = {f"audio_encoder.blocks.{i}.ls{j}.gamma" for i in range(2) for j in (1, 2)}
    model = MiDashengLMModel(small_config(qwen2))
    assert keys(model) == want | biases
    assert keys(MiDashengLMModel(small_config(qwen3, init_values=1e-5))) == want | norms | scales
    no_bias = keys(MiDashengLMModel(small_config(qwen2, qkv_bias=False)))
    assert keys(model) - no_bias == {f"audio_encoder.blocks.{i}.attn.qkv.bias" for i in range(2)}
    assert model.state_dict()["audio_encoder.time_pos_embed"].shape == (1, 32, 1, 252)
    assert model.state_dict()["audio_encoder.freq_pos_embed"].shape == (1, 32, 1, 1)


def test_random_initialisation():
    torch.manual_seed(0)
    model = MiDashengLMModel(small_config(init_values=1e-2))
    sd = model.state_dict()
    assert 0.01 < sd["audio_encoder.time_pos_embed"].std() < 0.03 and 0.01 < sd["decoder.lm_head.weight"].std() < 0.03
    assert (sd["audio_encoder.blocks.0.ls1.gamma"] == 1e-2).all() and (sd["audio_encoder.init_bn.running_var"] == 1).all()


# Configuration

published = dict(
    architectures=["MiDashengLMModel"], model_type="midashenglm", audio_token_id=151646, subsample_factor=5, something_new=[1, 2],
    audio_encoder_config=dict(embed_dim=1280, depth=32, num_heads=16, mlp_ratio=4.0, qkv_bias=True, init_values=None, n_mels=64, patch_size=[64, 4],
                              patch_stride=[64, 4], input_channels=1, target_length=1008, win_length=512, n_fft=512, hop_length=160, f_min=0, f_max=8000,
                              sample_rate=16000, center=True, outputdim=527, drop_rate=0.0, attn_drop_rate=0.0, extra=True),
    text_config=dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064,
                     rope_theta=1000000.0, rms_norm_eps=1e-6, tie_word_embeddings=False, rope_scaling=dict(mrope_section=[16, 24, 24], rope_type="default", type="default"),
                     init_std=0.02, use_sliding_window=False, sliding_window=32768, max_window_layers=28, attention_dropout=0.0, other=None))


@pytest.mark.parametrize("kind", [None, "qwen2_5_omni_text", "qwen2", "qwen3"])
def test_published_config(kind, tmp_path):
    text = published["text_config"] | (dict(model_type=kind) if kind else {})
    (tmp_path/"config.json").write_text(json.dumps({**published, "text_config": text}))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is MiDashengLMConfig and config.something_new == [1, 2] and config.audio_encoder_config.extra
    assert config.text_config.model_type == ("qwen3" if kind == "qwen3" else "qwen2")
    assert config.text_config.rope_parameters == dict(rope_theta=1e6, rope_type="default")
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path/"config.json").read_text())
    assert not {k for k in published if k not in saved} and "mrope_section" not in json.dumps(saved)
    assert not {k for k in published["audio_encoder_config"] if k not in saved["audio_encoder_config"]}
    assert saved["text_config"]["rope_theta"] == 1e6 and saved["text_config"]["model_type"] == config.text_config.model_type
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_config_details():
    assert MiDashengLMConfig().text_config.rope_parameters["rope_theta"] == 1e6
    yarn = dict(model_type="qwen3", rope_theta=5e5, rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768), max_position_embeddings=131072)
    assert MiDashengLMConfig(text_config=yarn).text_config.rope_parameters["factor"] == 4.0
    sections = dict(model_type="qwen2", rope_parameters=dict(rope_type="default", rope_theta=5e5, mrope_section=[1, 1, 2]))
    assert MiDashengLMConfig(text_config=sections).text_config.rope_parameters == dict(rope_theta=5e5, rope_type="default")
    with pytest.raises(ValueError, match="llama"): MiDashengLMConfig(text_config=dict(model_type="llama"))
    tied = MiDashengLMConfig(text_config=dict(model_type="qwen3"), tie_word_embeddings=True)
    assert tied.tie_word_embeddings and tied.text_config.tie_word_embeddings
    c = small_config()
    assert MiDashengLMConfig(c.audio_encoder_config, c.text_config, audio_token_id=AUDIO).to_dict() == c.to_dict()


# Files

def test_save_and_load(model, rows, tmp_path):
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is MiDashengLMModel and not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = make_batch(rows[:4])
    for a, b in zip(row_logits(model, batch), row_logits(again, batch)): assert torch.equal(a, b)
    tied = model.config.tie_word_embeddings
    assert (again.decoder.lm_head.weight is again.decoder.model.embed_tokens.weight) == tied
    from safetensors import safe_open
    with safe_open(tmp_path/"model.safetensors", "pt") as f: assert ("decoder.lm_head.weight" in f.keys()) == (not tied)
    saved = json.loads((tmp_path/"config.json").read_text())
    assert saved["architectures"] == ["MiDashengLMModel"]
    assert saved["auto_map"] == dict(AutoConfig="midashenglm.MiDashengLMConfig", AutoModelForCausalLM="midashenglm.MiDashengLMModel")
    for module in (mdl, midasheng_encoder, label_loss):
        path = Path(module.__file__)
        assert (tmp_path/path.name).read_text() == path.read_text()
        imported = {m[1] or "." for m in re.finditer(r"^(?:from|import) (?:(\w+)|\.)", path.read_text(), re.M)}
        assert imported <= {"torch", "transformers", "numpy", ".", "functools", "io", "itertools", "os", "typing", "urllib"}, "it must run where this package is not installed"


def test_load_in_bfloat16_keeps_statistics(model2, rows, tmp_path):
    model2.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    assert half.dtype == torch.bfloat16 and half.audio_encoder.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    for k in ("running_mean", "running_var"):
        a, b = getattr(half.audio_encoder.init_bn, k), getattr(model2.audio_encoder.init_bn, k)
        assert a.dtype == torch.float32 and torch.equal(a, b)
    want, got = (row_logits(m, make_batch(rows[:3]))[2] for m in (model2, half))
    assert (want - got.float()).abs().max() < 0.25


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_loading(rows, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig
    model = lively(MiDashengLMModel(small_config({**qwen2, "hidden_size": 64}, embed_dim=64)))  # 4-bit blocks are 64 wide
    model.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32) if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    small = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32, device_map="cpu")
    assert type(small.audio_encoder.blocks[0].attn.qkv).__name__ == type(small.decoder.model.layers[0].mlp.up_proj).__name__ == ("Linear4bit" if bits == 4 else "Linear8bitLt")
    adapted = lora(small).train()
    adapted(**make_batch(rows[:3], labels=3)).loss.backward()
    assert all(p.grad.isfinite().all() for p in adapted.parameters() if p.requires_grad)
    got, want = row_logits(adapted.eval(), make_batch(rows[:3]))[2], row_logits(model, make_batch(rows[:3]))[2]
    assert torch.corrcoef(torch.stack([got.flatten(), want.flatten()]))[0, 1] > (0.9 if bits == 4 else 0.98)


def test_resize_embeddings(rows):
    model = lively(MiDashengLMModel(small_config(qwen3)))
    before = row_logits(model, make_batch(rows[:2]))[1]
    model.resize_token_embeddings(120)
    assert model.config.text_config.vocab_size == 120 and model.decoder.lm_head.weight is model.decoder.model.embed_tokens.weight
    torch.testing.assert_close(row_logits(model, make_batch(rows[:2]))[1][:, :100], before)


# The processor

template = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{% if p.type == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(scope="module")
def processor():
    "A processor around a byte-level tokenizer"
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = template
    return MiDashengLMProcessor(Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True), tokenizer)


def test_a_processor_is_made_at_once(processor, monkeypatch):
    "transformers looks its parts up in all its modules, one of which imports mistral_common and parses the grammars of its libraries"
    monkeypatch.setattr(MiDashengLMProcessor, "get_possibly_dynamic_module", lambda self, name: pytest.fail(f"{name} was looked up"))
    MiDashengLMProcessor(processor.feature_extractor, processor.tokenizer)


@pytest.mark.parametrize("n_samples, tokens", [(1, 1), (1600, 1), (3199, 1), (3200, 1), (6239, 1), (6240, 2), (16000, 5), (161280, 50), (480000, 150), (528000, 165)])
def test_token_counts(processor, n_samples, tokens):
    assert n_audio_tokens(n_samples) == tokens == max(1, (1 + n_samples//160)//4//5)
    out = processor("<|AUDIO|>", np.zeros(n_samples, np.float32), return_tensors="pt")
    assert processor.tokenizer.decode(out["input_ids"][0]) == "<|audio_bos|>" + "<|AUDIO|>"*tokens + "<|audio_eos|>"
    assert out["audio_length"].tolist() == [n_samples] and out["input_values"].shape == (1, n_samples)


@pytest.mark.parametrize("text", ["a<|AUDIO|>b", "a<|audio_bos|><|AUDIO|><|audio_eos|>b"])
def test_wrapping(processor, text):
    got = processor.expand_audio_tokens([text, text + text], [16000, 3200, 6240])
    a, b, c = ("<|audio_bos|>" + "<|AUDIO|>"*k + "<|audio_eos|>" for k in (5, 1, 2))
    assert got == [f"a{a}b", f"a{b}ba{c}b"]


def test_processor_batches(processor):
    clips = [np.ones(4000, np.float32), torch.ones(16000), np.full(100, 0.5)]
    out = processor(["<|AUDIO|> and <|AUDIO|>", "none", "x<|AUDIO|>"], clips, sampling_rate=16000, return_tensors="pt")
    assert out["input_values"].shape == (3, 16000) and out["audio_length"].tolist() == [4000, 16000, 100]
    assert out["input_values"].dtype == torch.float32 and out["input_values"][2, 100:].sum() == 0
    assert out["attention_mask"][1].tolist() == [0]*(out["input_ids"].shape[1] - 4) + [1]*4
    assert set(processor("text only", return_tensors="pt")) == {"input_ids", "attention_mask"}
    assert set(processor(audio=clips[0], return_tensors="pt")) == {"input_values", "audio_length"}
    with pytest.raises(ValueError, match=r"2 <\|AUDIO\|>.*1 clip"): processor("<|AUDIO|><|AUDIO|>", clips[0])
    with pytest.raises(ValueError, match="8000"): processor("<|AUDIO|>", clips[0], sampling_rate=8000)
    assert processor("ab", padding_side="right", padding="max_length", max_length=5, return_tensors="pt")["attention_mask"].tolist() == [[1, 1, 0, 0, 0]]


@pytest.fixture(scope="module")
def wav(tmp_path_factory):
    path = tmp_path_factory.mktemp("wav")/"a.wav"
    soundfile.write(path, make_clip(1.5).numpy(), 16000)
    return path


def message(path, key="path"): return {"role": "user", "content": [{"type": "text", "text": "Hear:"}, {"type": "audio", key: path}]}
system = {"role": "system", "content": [{"type": "text", "text": "You listen."}]}
options = dict(tokenize=True, add_generation_prompt=True, add_special_tokens=True, return_dict=True, return_tensors="pt")


def test_chat_template(processor, wav):
    one = processor.apply_chat_template([system, message(str(wav))], **options)
    clip = "<|audio_bos|>" + "<|AUDIO|>"*7 + "<|audio_eos|>"
    text = f"<|im_start|>system\nYou listen.<|im_end|>\n<|im_start|>user\nHear:{clip}<|im_end|>\n<|im_start|>assistant\n"
    assert processor.decode(one["input_ids"][0]) == text
    np.testing.assert_allclose(one["input_values"][0], soundfile.read(wav, dtype="float32")[0])
    wave = soundfile.read(wav)[0]
    many = processor.apply_chat_template(conversation=[[system, message(wave, "audio")], [message(wav)], [{"role": "user", "content": "hi"}]], **options)
    assert torch.equal(many["input_ids"][:1], one["input_ids"]) and many["input_values"].shape == (2, 24000)
    assert many["attention_mask"].sum(1).tolist() == [(x != processor.tokenizer.pad_token_id).sum() for x in many["input_ids"]]
    assert processor.apply_chat_template([system, message(str(wav))], add_generation_prompt=True) == text.replace("<|AUDIO|>"*7, "<|AUDIO|>")
    assert torch.equal(processor.apply_chat_template([message(wav)], tokenize=True, return_tensors="pt"), processor.apply_chat_template([message(wav)], **{**options, "add_generation_prompt": False})["input_ids"])
    with pytest.raises(ValueError, match="audio part"): processor.apply_chat_template([{"role": "user", "content": [{"type": "audio"}]}], **options)


@pytest.mark.parametrize("rate, channels", [(8000, 1), (44100, 2), (48000, 1)])
def test_chat_template_resamples(processor, tmp_path, rate, channels):
    t = np.arange(rate)/rate
    soundfile.write(tmp_path/"a.wav", np.stack([0.5*np.sin(2*np.pi*440*t)]*channels, 1), rate)
    out = processor.apply_chat_template([message(tmp_path/"a.wav")], **options)
    x = out["input_values"][0].numpy()
    assert abs(len(x) - 16000) <= 1
    middle = slice(2000, 14000)
    np.testing.assert_allclose(x[middle], 0.5*np.sin(2*np.pi*440*np.arange(len(x))/16000)[middle], atol=2e-3)


def test_processor_save_and_load(processor, wav, tmp_path):
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is MiDashengLMProcessor and again.chat_template == template
    assert json.loads((tmp_path/"processor_config.json").read_text())["auto_map"] == dict(AutoProcessor="midashenglm.MiDashengLMProcessor")
    a, b = (p.apply_chat_template([system, message(str(wav))], **options) for p in (processor, again))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


snippet = """
import sys
for name in ("mdl_nbdev", "fastcore", "torchaudio", "librosa", "torchcodec"): sys.modules[name] = None # as if not installed
import torch
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer
path, clip = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(path)
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
messages = [{"role": "user", "content": [{"type": "text", "text": "Hear:"}, {"type": "audio", "path": clip}]}]
with torch.no_grad():
    inputs = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, add_special_tokens=True, return_dict=True, return_tensors="pt")
    new = model.generate(**inputs, max_new_tokens=5)
print(type(model).__module__, new[0].tolist(), repr(tokenizer.batch_decode(new, skip_special_tokens=True)[0]))
"""


@pytest.mark.slow
def test_saved_folder_runs_without_the_package(processor, wav, tmp_path):
    tokenizer = processor.tokenizer
    text = {**qwen2, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = small_config(text)
    config.audio_token_id = tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    model = lively(MiDashengLMModel(config))
    for part in (model, tokenizer, processor): part.save_pretrained(tmp_path/"final")
    env = {**os.environ, "HF_HOME": str(tmp_path/"hf"), "HF_HUB_OFFLINE": "1"}
    r = subprocess.run([sys.executable, "-c", snippet, tmp_path/"final", wav], capture_output=True, text=True, env=env, stdin=subprocess.DEVNULL, cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    assert "custom code" not in r.stderr, "no question about custom code may be asked"
    want = model.generate(**processor.apply_chat_template([message(str(wav))], **options), max_new_tokens=5)[0].tolist()
    assert r.stdout.startswith("transformers_modules.") and str(want) in r.stdout
