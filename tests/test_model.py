"Building, loading, adapting, saving and merging: what must hold of the weights, and every error a user can meet"
import json
import math
import os
import pickle
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils import logging

from mdl_nbdev import model as M
from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.settings import InferSettings, MergeSettings, TrainSettings, TuneSettings
from mdl_nbdev.model.engine import load_engine
from mdl_nbdev.model.families import load_chat
from mdl_nbdev.model.load import check_trainable, unwrap_model
from mdl_nbdev.model.midasheng_encoder import n_audio_tokens
from mdl_nbdev.model.midashenglm import MiDashengLMModel
from mdl_nbdev.model.midashenglm_family import tiny_tokenizer
from mdl_nbdev.model.targets import is_quantized, trainable_state, unreached_weights
from mdl_nbdev.train.run import train

logging.disable_progress_bar()
tok = tiny_tokenizer()
everything = ["encoder", "projector", "decoder", "embed_tokens", "lm_head"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def adapt(model, targets=everything[:3], rank=4, **kwargs): return M.adapt(model, TuneSettings(train_target=list(targets), lora_rank=rank, **kwargs))


def batch(n_samples=(8000, 20000), seed=0):
    "Two rows of audio, each with an answer"
    rng = np.random.default_rng(seed)
    rows = [[*tok.encode("<|audio_bos|>" + "<|AUDIO|>"*n_audio_tokens(n) + "<|audio_eos|>a question"), *tok.encode("yes<|im_end|>")] for n in n_samples]
    size = max(map(len, rows))
    ids = torch.tensor([r + [tok.pad_token_id]*(size - len(r)) for r in rows])
    labels = torch.tensor([[-100]*(len(r) - 4) + r[-4:] + [-100]*(size - len(r)) for r in rows])
    audio = torch.from_numpy(rng.normal(0, 3000, (len(rows), max(n_samples))).astype(np.int16))
    return dict(input_ids=ids, attention_mask=(ids != tok.pad_token_id).long(), labels=labels, input_values=audio, audio_length=torch.tensor(n_samples))


def text_batch():
    ids = torch.tensor([tok.encode("hello there"), tok.encode("hello world")])
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)


def fit(model, data, steps=3):
    "A few steps with gradient checkpointing"
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(steps):
        model(**data).loss.backward()
        opt.step()
        opt.zero_grad()
    return model.eval()


@torch.no_grad()
def logits(model, data): return model.eval()(**{k: v for k, v in data.items() if k != "labels"}).logits.float()


def close(a, b, tol=1e-5): assert (a - b).abs().max() <= tol*max(1, b.abs().max())


def tied_tiny():
    "The tiny model with one matrix for embeddings and output layer"
    config = M.tiny_config()
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    torch.manual_seed(0)
    return MiDashengLMModel(config).eval()


def text_model(kind="qwen2"):
    torch.manual_seed(0)
    shape = dict(vocab_size=len(tok), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    if kind == "gpt2": model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tok), n_embd=64, n_layer=2, n_head=2, n_positions=64))
    if kind == "neox": model = GPTNeoXForCausalLM(GPTNeoXConfig(**shape))
    if kind == "llama": model = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=1))
    if kind == "qwen2": model = Qwen2ForCausalLM(Qwen2Config(**shape, num_key_value_heads=1, tie_word_embeddings=True))
    return model.eval()


def any_model(kind): return M.tiny_model() if kind == "tiny" else text_model(kind)
def data_of(kind): return batch() if kind == "tiny" else text_batch()


def test_tiny_is_the_same_each_time_and_draws_from_no_shared_state():
    states = lambda: (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    before = states()
    a = M.tiny_model()
    after = states()
    assert torch.equal(before[0], after[0]) and (before[1] == after[1]).all() and before[2] == after[2]
    torch.manual_seed(123)
    b = M.tiny_model()
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert 1.9e6 < sum(p.numel() for p in a.parameters()) < 2.1e6
    assert a.generation_config.eos_token_id == tok.eos_token_id and a.generation_config.pad_token_id == tok.pad_token_id
    assert math.isclose(a.decoder.lm_head.weight.detach().double().sum(), -17.9351, abs_tol=1e-3), "adapters that were trained on tiny need these weights"


def test_tiny_text_is_the_same_each_time():
    before = torch.get_rng_state()
    a = M.tiny_text_model()
    assert torch.equal(before, torch.get_rng_state())
    b = M.load_model("tiny-text", device="cpu")
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert a.name_or_path == b.name_or_path == "tiny-text" and type(a) is GPTNeoXForCausalLM
    assert math.isclose(a.gpt_neox.embed_in.weight.detach().double().sum(), -31.1845, abs_tol=1e-3), "adapters that were trained on tiny-text need these weights"
    text_tok = M.load_processor("tiny-text")
    assert a.config.vocab_size == len(text_tok) and a.generation_config.eos_token_id == a.generation_config.pad_token_id == text_tok.eos_token_id
    assert set(M.linear_layers(a)) == {"decoder"} and len(M.linear_layers(a)["decoder"]) == 4*4
    half = M.load_model("tiny-text", dtype=torch.bfloat16, device="cpu")
    assert half.lm_head.weight.dtype == torch.bfloat16 and half.name_or_path == "tiny-text"


@pytest.mark.parametrize("targets", [everything[:3], everything, ["encoder", "lm_head"], ["decoder", "embed_tokens"]], ids=",".join)
@pytest.mark.parametrize("make", [M.tiny_model, tied_tiny])
def test_adapted_merged_and_reloaded_agree(make, targets, tmp_path):
    data, base = batch(), make()
    frozen = {k: v.clone() for k, v in base.state_dict().items()}
    model = fit(adapt(base, targets), data)
    for name, p in model.named_parameters():
        if "lora_B" in name: assert p.abs().max() > 0, f"{name} learned nothing"
    want = logits(model, data)
    assert (want - logits(make(), data)).abs().max() > 1e-3
    state = {k.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", ""): v for k, v in model.state_dict().items()}
    assert not [k for k, v in frozen.items() if not torch.equal(v, state[k])], "a frozen tensor changed"
    assert {"audio_encoder.init_bn.running_mean", "audio_encoder.init_bn.running_var", "audio_encoder.init_bn.num_batches_tracked"} <= frozen.keys()
    M.save_model(model, M.load_processor("tiny"), tmp_path/"adapter")
    M.save_model(make(), M.load_processor("tiny"), tmp_path/"base")
    close(logits(M.load_adapter(M.load_model(str(tmp_path/"base"), device="cpu"), tmp_path/"adapter"), data), want)
    merged = M.merge(model)
    close(logits(merged, data), want)
    M.save_model(merged, M.load_processor("tiny"), tmp_path/"merged")
    again = M.load_model(str(tmp_path/"merged"), device="cpu")
    close(logits(again, data), want)
    assert type(again) is MiDashengLMModel
    assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight) == (make is tied_tiny)
    s = MergeSettings(adapter=tmp_path/"adapter", output=tmp_path/"out", model_name=str(tmp_path/"base"))
    close(logits(M.load_model(str(M.merge_adapter(s)), device="cpu"), data), want)


@pytest.mark.parametrize("variant", [{}, dict(lora_init="pissa"), dict(train_target=["decoder", "embed_tokens"])], ids=str)
@pytest.mark.parametrize("kind, regex", [("qwen2", ".*(q_proj|lm_head)"), ("qwen2", ".*embed_tokens"), ("gpt2", ".*(c_attn|lm_head)")])
def test_adapters_of_one_side_of_a_shared_matrix(kind, regex, variant, tmp_path):
    "An adapter of the output layer or of the embeddings changes only that one, wherever it is merged or loaded"
    if variant and "embed" in regex: pytest.skip("PiSSA knows linear layers only, and embeddings are adapted or trained in full")
    data, folder = text_batch(), M.save_model(text_model(kind), tok, tmp_path/"base")
    s = TuneSettings(lora_rank=4, lora_target_modules=regex, **variant)
    base = lambda: M.load_model(str(folder), device="cpu")
    model = fit(M.adapt(base(), s), data)
    want = logits(model, data)
    assert (want - logits(base(), data)).abs().max() > 1e-3
    model.save_pretrained(tmp_path/"adapter", state_dict=trainable_state(model))
    close(logits(M.load_adapter(base(), tmp_path/"adapter"), data), want)
    merged = M.merge(model)
    close(logits(merged, data), want)
    close(logits(M.load_model(str(M.save_model(merged, tok, tmp_path/"merged")), device="cpu"), data), want)
    out = M.merge_adapter(MergeSettings(adapter=tmp_path/"adapter", output=tmp_path/"out", model_name=str(folder)))
    close(logits(M.load_model(str(out), device="cpu"), data), want)


@pytest.mark.parametrize("kind", ["qwen2", "tied tiny"])
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_checkpoint_of_a_shared_matrix_that_is_trained(kind, target, tmp_path):
    "A checkpoint gets what is trained under its first names only, as from a sharded run"
    make, data = (tied_tiny, batch()) if kind == "tied tiny" else (text_model, text_batch())
    model = fit(adapt(make(), ["decoder", target]), data, 1)
    model.save_pretrained(tmp_path/"adapter", state_dict=trainable_state(model))
    close(logits(M.load_adapter(make(), tmp_path/"adapter"), data), logits(model, data))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_of_another_base_of_the_same_shape(dtype, tmp_path):
    M.save_model(adapt(M.tiny_text_model(), ["decoder"], rank=2), tok, tmp_path/"adapter")
    M.load_adapter(M.load_model("tiny-text", dtype=dtype, device="cpu"), tmp_path/"adapter")
    for change in ("embed_in.weight", "layers.2.mlp.dense_h_to_4h.weight", "final_layer_norm.bias"):
        other = M.tiny_text_model()
        other.gpt_neox.get_parameter(change).data += .1
        with pytest.raises(InputError, match="trained on another model than tiny-text: their weights differ"): M.load_adapter(other, tmp_path/"adapter")


def test_an_adapter_keeps_the_chat_template_that_it_was_trained_with(tmp_path):
    chat = load_chat("tiny-text")
    own = chat.tok.chat_template.replace("human", "person")
    chat.tok.chat_template = own
    M.save_model(adapt(M.tiny_text_model(), ["decoder"], rank=2), chat.tok, tmp_path/"adapter")
    merged = M.merge_adapter(MergeSettings(adapter=tmp_path/"adapter", output=tmp_path/"merged"))
    assert load_chat(str(merged)).tok.chat_template == own
    s = InferSettings(input="a.csv", output="b.csv", model_name="tiny-text", adapter=tmp_path/"adapter")
    assert load_engine(s).chat.tok.chat_template == own
    (tmp_path/"other.jinja").write_text(own.replace("person", "reader"))
    assert "reader" in load_engine(replace(s, chat_template=tmp_path/"other.jinja")).chat.tok.chat_template


def test_training_goes_on_from_an_adapter(tmp_path):
    "With its own rank and layers; every option that would set them is refused, and so is another base"
    rows = tmp_path/"rows.jsonl"
    rows.write_text("".join(json.dumps(dict(prompt=a, answer=b)) + "\n" for a, b in ("ab", "cd", "ef", "gh")))
    s = TrainSettings(model_name="tiny-text", train_dataset=[rows], output=tmp_path/"a", max_steps=4, batch_size=4, lr=1e-2, lora_rank=2, lora_alpha=6,
                      lora_target_modules=".*dense", merge_lora=False, num_workers=1, logging_steps=1, lr_scheduler_type="constant")
    first = train(s)
    with pytest.raises(InputError, match="--adapter .*leave --lora-rank out"): train(replace(s, adapter=first.final, output=tmp_path/"b"))
    more = replace(s, adapter=first.final, output=tmp_path/"b", lora_rank=32, lora_alpha=32, lora_target_modules=None)
    with pytest.raises(InputError, match="--adapter and --tuning full"): train(replace(more, tuning="full", adapter=first.final))
    dry = train(replace(more, dry_run=True))
    assert dry.trainable.trainable == first.trainable and dry.memory.optimizer == 8*first.trainable
    second = train(more)
    assert second.metrics[0]["loss"] < first.metrics[-1]["loss"] < first.metrics[0]["loss"]
    config = json.loads((second.final/"adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 6, ".*dense")
    both, model = load_file(second.final/"adapter_model.safetensors"), M.load_adapter(M.tiny_text_model(), second.final)
    assert both.keys() == load_file(first.final/"adapter_model.safetensors").keys() and not model.training
    with pytest.raises(InputError, match="trained on another model"):
        other = M.tiny_text_model(seed=1)
        M.save_model(other, load_chat("tiny-text").tok, tmp_path/"other")
        train(replace(more, model_name=str(tmp_path/"other"), output=tmp_path/"c"))


def test_what_is_a_linear_layer():
    "Falcon's own class is one; routers that choose experts are not, and LoRA says that it does not reach them"
    falcon = FalconForCausalLM(FalconConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    assert len(M.linear_layers(falcon)["decoder"]) == 4
    phimoe = PhimoeForCausalLM(PhimoeConfig(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, num_local_experts=4))
    assert not [name for name in M.linear_layers(phimoe)["decoder"] if "router" in name]
    assert "model.layers.*.mlp.router.weight" in unreached_weights(adapt(phimoe, ["decoder"]))


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_an_adapter_of_a_quantized_model_merges_into_the_float_base(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    data = batch()
    model = fit(adapt(M.load_model("tiny", quantization=bits, device="cpu"), [*everything[:3], "lm_head"]), data)
    quantized, half = type(model.get_base_model().decoder.model.layers[0].self_attn.q_proj.base_layer).__name__, logits(model, data)
    assert quantized == {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[bits]
    assert all(p.abs().max() > 0 for n, p in model.named_parameters() if "lora_B" in n)
    M.save_model(model, M.load_processor("tiny"), tmp_path/"adapter")
    want = logits(M.load_adapter(M.tiny_model(), tmp_path/"adapter"), data)
    merged = M.merge(model)
    assert {p.dtype for p in merged.parameters()} == {torch.float32} and not hasattr(merged.config, "quantization_config")
    close(logits(merged, data), want)
    assert torch.nn.functional.cosine_similarity(half.flatten(), want.flatten(), dim=0) > .8
    out = M.merge_adapter(MergeSettings(adapter=tmp_path/"adapter", output=tmp_path/"out"))
    close(logits(M.load_model(str(out), device="cpu"), data), want)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantized_model_answers_almost_as_before(bits):
    pytest.importorskip("bitsandbytes")
    data = batch()
    small, full = M.load_model("tiny", quantization=bits, device="cpu"), M.tiny_model()
    assert torch.nn.functional.cosine_similarity(logits(small, data).flatten(), logits(full, data).flatten(), dim=0) > .8
    assert torch.equal(small.audio_encoder.init_bn.running_var, full.audio_encoder.init_bn.running_var)
    assert small.decoder.lm_head.weight.dtype == torch.float32
    assert M.Trainable(small).total == M.Trainable(full).total
    new = small.generate(input_ids=data["input_ids"][1:], input_values=data["input_values"][1:], audio_length=data["audio_length"][1:], max_new_tokens=3)
    assert new.shape[0] == 1


@pytest.mark.parametrize("bf16, dtype", [(None, torch.float32), (True, torch.bfloat16), (False, torch.float32)])
def test_merge_writes_the_type_that_is_asked_for(bf16, dtype, tmp_path):
    model = fit(adapt(M.tiny_model(), rank=2), batch(), 1)
    M.save_model(model, M.load_processor("tiny"), tmp_path/"adapter")
    out = M.merge_adapter(MergeSettings(adapter=tmp_path/"adapter", output=tmp_path/"out", bf16=bf16))
    merged = M.load_model(str(out), dtype="auto", device="cpu")
    assert merged.decoder.lm_head.weight.dtype == dtype and json.loads((out/"config.json").read_text())["dtype"] == str(dtype)[6:]
    assert merged.audio_encoder.init_bn.running_var.dtype == torch.float32
    assert not list(tmp_path.glob(".out.*"))


def test_saving_an_adapter_asks_no_network(tmp_path, monkeypatch):
    import peft.utils.save_and_load
    def asked(*args, **kwargs): raise AssertionError("asked the hub")
    monkeypatch.setattr(peft.utils.save_and_load, "check_file_exists_on_hf_hub", asked)
    adapt(M.tiny_model(), everything, rank=2).save_pretrained(tmp_path)
    saved = json.loads((tmp_path/"adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "tiny" and len(saved["target_modules"]) < 1500


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_text_only_models(kind, tmp_path):
    base, data = text_model(kind), text_batch()
    M.save_model(base, tok, tmp_path/"base")
    loaded = M.load_model(str(tmp_path/"base"), device="cpu")
    assert type(loaded) is type(base)
    with pytest.raises(InputError, match="no encoder; it has decoder"): adapt(loaded, ["encoder", "decoder"])
    model = fit(adapt(loaded, [*everything[:3], "embed_tokens"], rank=4), data)
    assert set(M.linear_layers(base)) == {"decoder"} and "lm_head" not in str(M.linear_layers(base))
    want = logits(model, data)
    M.save_model(model, tok, tmp_path/"adapter")
    close(logits(M.merge(model), data), want)
    s = MergeSettings(adapter=tmp_path/"adapter", output=tmp_path/"merged")
    close(logits(M.load_model(str(M.merge_adapter(s)), device="cpu"), data), want)


kinds = ["tiny", "gpt2", "neox", "llama", "qwen2"]
variants = {"plain": {}, "rslora": dict(use_rslora=True), "dora": dict(use_dora=True), "pissa": dict(lora_init="pissa"),
            "pissa rslora": dict(lora_init="pissa", use_rslora=True, lora_alpha=7), "pissa dora": dict(lora_init="pissa", use_dora=True),
            "all": dict(lora_init="pissa", use_dora=True, use_rslora=True, lora_dropout=.1)}


@pytest.mark.parametrize("variant", variants)
@pytest.mark.parametrize("kind", kinds)
def test_variants_fit_the_original_base(kind, variant, tmp_path):
    data, before = data_of(kind), logits(any_model(kind), data_of(kind))
    base = M.save_model(any_model(kind), M.load_processor("tiny") if kind == "tiny" else tok, tmp_path/"base")
    torch.manual_seed(1)
    model = adapt(M.load_model(str(base), device="cpu"), **variants[variant])
    close(logits(model, data), before)
    want = logits(fit(model, data), data)
    assert (want - before).abs().max() > 1e-3
    for folder in ("once", "twice"): M.save_model(model, tok, tmp_path/folder)
    assert all((tmp_path/"once"/f).read_bytes() == (tmp_path/"twice"/f).read_bytes() for f in ("adapter_model.safetensors", "adapter_config.json"))
    close(logits(M.load_adapter(M.load_model(str(base), device="cpu"), tmp_path/"once"), data), want)
    merged = M.merge(model)
    close(logits(merged, data), want)
    assert type(merged) is type(any_model(kind)) and not [n for n in merged.state_dict() if "lora" in n]
    M.save_model(merged, tok, tmp_path/"merged")
    close(logits(M.load_model(str(tmp_path/"merged"), device="cpu"), data), want)
    config = json.loads((tmp_path/"once"/"adapter_config.json").read_text())
    pissa, rslora = "pissa" in variant or variant == "all", "rslora" in variant or variant == "all"
    assert config["r"] == (8 if pissa else 4)
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if rslora else config["r"])
    assert math.isclose(scale, variants[variant].get("lora_alpha", 32) / (2 if rslora else 4))


def test_scales_and_magnitudes():
    scale = lambda **kwargs: adapt(text_model(), lora_alpha=8, **kwargs).base_model.model.model.layers[0].mlp.up_proj.scaling["default"]
    assert scale() == 2 and scale(use_rslora=True) == 4
    layer = adapt(text_model(), use_dora=True).base_model.model.model.layers[0].mlp.up_proj
    close(layer.lora_magnitude_vector["default"].weight, layer.base_layer.weight.norm(dim=1))


def test_pissa_takes_the_strongest_directions():
    base = text_model("llama")
    g = torch.Generator().manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(64, 64, generator=g))[0], torch.linalg.qr(torch.randn(64, 64, generator=g))[0]
    weight = u @ torch.diag(.8**torch.arange(64)) @ v
    base.model.layers[0].self_attn.q_proj.weight.data.copy_(weight)
    layer = adapt(base, lora_init="pissa", lora_alpha=2).base_model.model.model.layers[0].self_attn.q_proj
    change = layer.get_delta_weight("default")
    close(layer.base_layer.weight + change, weight)
    close(torch.linalg.svdvals(change)[:4], .8**torch.arange(4), 1e-4)
    assert math.isclose(torch.linalg.svdvals(layer.base_layer.weight)[0], .8**4, rel_tol=1e-3)


@pytest.mark.parametrize("kind", kinds)
def test_pissa_takes_a_model_apart_in_the_same_way_whatever_was_drawn_before(kind):
    def parts(seed):
        torch.manual_seed(seed)
        return adapt(any_model(kind), lora_init="pissa", use_dora=True).state_dict()
    one, two = parts(1), parts(2)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("variant", variants)
def test_what_was_trained_goes_into_a_new_model_bit_for_bit(variant):
    def make():
        torch.manual_seed(3)
        return adapt(M.tiny_model(), ["decoder", "lm_head"], **variants[variant])
    data, model = batch(), fit(make(), batch())
    state = {n: p.clone() for n, p in M.trainable_state(model).items()}
    assert all("lora" in n or "modules_to_save" in n for n in state) and any("modules_to_save" in n for n in state)
    assert sum(p.numel() for p in state.values()) == M.Trainable(model).trainable
    again = make()
    assert not torch.equal(logits(again, data), logits(model, data))
    M.load_trainable_state(again, state)
    assert torch.equal(logits(again, data), logits(model, data))


def test_a_state_that_does_not_fit():
    model = adapt(text_model())
    state = dict(M.trainable_state(model))
    first, *_, last = sorted(state)
    for wrong in ({k: v for k, v in state.items() if k != first}, state | {"a": torch.zeros(1)}, state | {last: state[last][:1]}, state | {last: state[last].bfloat16()}):
        with pytest.raises(InputError, match="do not match this model and these settings: 1 tensors"): M.load_trainable_state(model, wrong)
    with pytest.raises(InputError, match="do not match this model"): M.load_trainable_state(adapt(text_model(), tuning="full"), state)


def part_of(name):
    "The part of a parameter, by hand for these models"
    if any(s in name for s in ("embed_tokens", "embed_in", "wte")): return "embed_tokens"
    return "lm_head" if "lm_head" in name else "encoder" if name.startswith("audio_encoder") else "projector" if name.startswith("audio_projector") else "decoder"


@pytest.mark.parametrize("kind, targets", [*[("tiny", t) for t in (everything, everything[:3], ["encoder"], ["projector"], ["decoder"], ["lm_head"], ["embed_tokens", "encoder"])],
                                           *[(k, t) for k in kinds[1:] for t in (everything, everything[:3], ["lm_head"], ["embed_tokens"])]])
def test_full_tuning_trains_the_parts_that_are_named_and_nothing_else(kind, targets, tmp_path):
    base, data = any_model(kind), data_of(kind)
    wanted = set(targets) | ({"embed_tokens"} if kind in ("gpt2", "qwen2") and "lm_head" in targets else set())
    names = {n for n, _ in base.named_parameters() if part_of(n) in wanted and "init_bn" not in n}
    frozen = {k: v.clone() for k, v in base.state_dict().items()}
    model = adapt(base, targets, tuning="full")
    assert model is base and M.trainable_state(model).keys() == names
    fit(model, data)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, frozen[n])}
    assert changed <= names and len(names - changed) <= .25*len(names), "biases of keys have no gradient, and so on"
    assert {k for k, v in model.state_dict().items() if not torch.equal(v, frozen[k])} - changed <= {"lm_head.weight"}, "a buffer or a tied matrix only"
    assert all(torch.equal(v, frozen[k]) for k, v in model.state_dict().items() if "init_bn" in k)
    assert M.Trainable(model).trainable == sum(frozen[n].numel() for n in names)
    state, again = {n: p.clone() for n, p in M.trainable_state(model).items()}, adapt(any_model(kind), targets, tuning="full")
    M.load_trainable_state(again, state)
    want = logits(model, data)
    assert torch.equal(logits(again, data), want)
    M.save_model(M.merge(model), M.load_processor("tiny") if kind == "tiny" else tok, tmp_path)
    close(logits(M.load_model(str(tmp_path), device="cpu"), data), want)


@pytest.mark.parametrize("targets", [everything, ["encoder"], ["projector"], ["decoder"], ["lm_head"]], ids=",".join)
def test_what_learns_in_full_is_float32_and_saved_as_it_was_loaded(targets, tmp_path):
    base, data = M.load_model("tiny", dtype=torch.bfloat16, device="cpu"), batch()
    types = {n: p.dtype for n, p in base.named_parameters()}
    before = logits(base, data)
    model = adapt(base, targets, tuning="full")
    assert {p.dtype for p in M.trainable_state(model).values()} == {torch.float32}
    assert {n: p.dtype for n, p in model.named_parameters() if not p.requires_grad} == {n: d for n, d in types.items() if n not in M.trainable_state(model)}
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False): # the cache would hold on to weights of the step before
        assert torch.nn.functional.cosine_similarity(logits(model, data).flatten(), before.flatten(), dim=0) > .99
        fit(model, data)
        want = logits(model, data)
    M.save_model(M.merge(model), M.load_processor("tiny"), tmp_path)
    again = M.load_model(str(tmp_path), dtype="auto", device="cpu")
    assert {n: p.dtype for n, p in again.named_parameters()} == types
    assert torch.nn.functional.cosine_similarity(logits(again, data).flatten(), want.flatten(), dim=0) > .99


def test_tunings_that_make_no_sense():
    full = lambda model=None, targets=everything[:3], **kwargs: adapt(model or text_model(), targets, tuning="full", **kwargs)
    with pytest.raises(InputError, match="no projector; it has decoder"): full(targets=["projector"])
    with pytest.raises(InputError, match="nothing to train"): full(targets=[])
    for name, value in dict(lora_init="pissa", use_rslora=True, use_dora=True, loraplus_lr_ratio=4, lora_target_modules=".*").items():
        with pytest.raises(InputError, match=f"--{name.replace('_', '-')} and --tuning full do not go together"): full(**{name: value})
    with pytest.raises(InputError, match=r"--lora-rank 65 with --lora-init pissa: model.layers.0.self_attn.q_proj has only 64"): adapt(text_model("llama"), rank=65, lora_init="pissa", lora_target_modules=".*q_proj")
    adapt(text_model("llama"), rank=64, lora_init="pissa", lora_target_modules=".*q_proj")
    with pytest.raises(InputError, match="pissa: model.embed_tokens is not a linear layer"): adapt(text_model("llama"), lora_init="pissa", lora_target_modules=".*embed_tokens")


@pytest.mark.parametrize("bits, kind", [("4bit", "dora"), ("4bit", "rslora"), ("8bit", "rslora")])
def test_variants_of_a_quantized_model(bits, kind, tmp_path):
    pytest.importorskip("bitsandbytes")
    load = lambda: M.load_model("tiny-text", quantization=bits, device="cpu")
    data, model = text_batch(), adapt(load(), **variants[kind])
    close(logits(model, data), logits(adapt(load()), data))
    fit(model, data)
    assert all(p.abs().max() > 0 for n, p in model.named_parameters() if "lora_B" in n)
    M.save_model(model, tok, tmp_path/"adapter")
    want = logits(M.load_adapter(M.tiny_text_model(), tmp_path/"adapter"), data)
    assert torch.nn.functional.cosine_similarity(logits(model, data).flatten(), want.flatten(), dim=0) > .8
    close(logits(M.merge(model), data), want)
    with pytest.raises(InputError, match="--tuning full and --quantization do not go"): adapt(load(), tuning="full")
    with pytest.raises(InputError, match="--lora-init pissa and --quantization do not go"): adapt(load(), lora_init="pissa")
    if bits == "8bit":
        with pytest.raises(InputError, match="--use-dora and --quantization 8bit do not go"): adapt(load(), use_dora=True)


def test_groups_of_loraplus_are_those_of_peft():
    from peft.optimizers import create_loraplus_optimizer
    model = adapt(M.tiny_model(), use_dora=True)
    names = {id(p): n for n, p in model.named_parameters()}
    rates = lambda groups: {names[id(p)]: g["lr"] for g in groups for p in g["params"] if "magnitude" not in names[id(p)]}
    theirs = rates(create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16).param_groups)
    ours = M.optimizer_groups(model, 1e-3, 16, .1)
    assert rates(ours) == theirs and set(theirs.values()) == {1e-3, 1e-3*16}
    assert rates(torch.optim.AdamW(ours, lr=5.).param_groups) == theirs
    assert {g["lr"] for g in M.optimizer_groups(model, 1e-3)} == {1e-3}


@pytest.mark.parametrize("kind", kinds)
def test_matrices_decay_and_vectors_do_not(kind):
    model = adapt(any_model(kind), everything, tuning="full")
    groups = M.optimizer_groups(model, 1e-3, weight_decay=.1)
    ids = {decay: {id(p) for g in groups for p in g["params"] if g["weight_decay"] == decay} for decay in (0, .1)}
    trained = list(M.trainable_state(model))
    assert sum(len(g["params"]) for g in groups) == len(trained) == len(ids[0]) + len(ids[.1])
    assert all(id(p) in ids[.1 if p.ndim > 1 else 0] for p in model.parameters() if p.requires_grad)


def test_every_linear_layer_of_a_target_is_adapted():
    parts = M.linear_layers(M.tiny_model())
    assert {k: len(v) for k, v in parts.items()} == dict(encoder=4*4, projector=2, decoder=4*7)
    for part, names in parts.items():
        adapted = [n.removeprefix("base_model.model.").removesuffix(".lora_A") for n, _ in adapt(M.tiny_model(), [part], rank=2).named_modules() if n.endswith(".lora_A")]
        assert sorted(adapted) == sorted(names)
    model = adapt(M.tiny_model(), ["lm_head"], rank=2, lora_target_modules=r".*\.(q|k)_proj")
    t = M.Trainable(model)
    assert t.layers == 8 and t.parts["lm_head"][1] == len(tok)*128
    assert "adapted layers" in t._repr_html_() and f"{t.trainable:,}" in str(t)


def test_targets_that_fit_nothing():
    tune = lambda *args, **kwargs: adapt(M.tiny_model(), *args, **kwargs)
    with pytest.raises(InputError, match="at least one of encoder"): tune(["lm_head"])
    with pytest.raises(InputError, match=r"no module of this model .* audio_encoder\.blocks\.0"): tune(lora_target_modules="q_proj")
    with pytest.raises(InputError, match="not a regular expression"): tune(lora_target_modules="(")
    with pytest.raises(InputError, match="--lora-target-modules .*norm"): tune(lora_target_modules=r".*\.norm1")


def fake_cuda(monkeypatch, count, bf16=True):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **kwargs: bf16)


@pytest.mark.parametrize("gpus, rank, device", [(0, None, "cpu"), (0, 1, "cpu"), (1, None, "cuda:0"), (4, None, "cuda:0"), (4, 3, "cuda:3")])
def test_a_process_has_one_device(monkeypatch, gpus, rank, device):
    fake_cuda(monkeypatch, gpus)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None: monkeypatch.setenv("LOCAL_RANK", str(rank))
    assert M.pick_device() == torch.device(device)


def test_more_processes_than_gpus(monkeypatch):
    fake_cuda(monkeypatch, 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="LOCAL_RANK is 2.* 2 GPUs"): M.pick_device()


@pytest.mark.parametrize("bf16, supported, device, dtype", [(None, True, "cuda", torch.bfloat16), (None, False, "cuda", torch.float32), (None, True, "cpu", torch.float32),
                                                            (True, False, "cpu", torch.bfloat16), (False, True, "cuda", torch.float32)])
def test_type_rule(monkeypatch, bf16, supported, device, dtype):
    fake_cuda(monkeypatch, 1, supported)
    assert M.pick_dtype(bf16, torch.device(device)) == dtype


def test_a_bfloat16_model_keeps_its_statistics_in_float32():
    model = M.load_model("tiny", dtype=torch.bfloat16, device="cpu")
    assert model.decoder.lm_head.weight.dtype == torch.bfloat16 and model.audio_encoder.init_bn.running_mean.dtype == torch.float32
    assert logits(model, batch()).isfinite().all() and model.name_or_path == "tiny"


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_code_of_a_folder_is_neither_run_nor_asked_about(where, tmp_path, monkeypatch):
    M.save_model(text_model(), tok, tmp_path/"own")
    path, ran = tmp_path/"own"/where, tmp_path/"RAN"
    (tmp_path/"own"/"code.py").write_text(f"open({str(ran)!r}, 'w')\nclass C: pass")
    config = json.loads(path.read_text()) | dict(auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.C", "AutoTokenizer": ["code.C", "code.C"]})
    path.write_text(json.dumps(config | (dict(model_type="mynet") if where == "config.json" else dict(tokenizer_class="Mine"))))
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("it asked"))
    try: load_chat(str(tmp_path/"own"))
    except InputError as e: assert where == "tokenizer_config.json" and "own" in str(e)
    if where == "config.json":
        message = "own: its architecture, mynet, is not part of transformers: it needs Python code from its folder"
        with pytest.raises(InputError, match=message): M.load_model(str(tmp_path/"own"))
    assert not ran.exists()


def test_models_that_cannot_be_loaded(tmp_path, monkeypatch):
    load = lambda name, **kwargs: M.load_model(str(name), device="cpu", **kwargs)
    with pytest.raises(InputError, match="no/such-model: no such folder.*hub"): load("no/such-model")
    with pytest.raises(InputError, match="nowhere: no such folder; the working directory is"): load(tmp_path/"nowhere")
    with pytest.raises(InputError, match="--model-name runs/a/final: no such folder; the working directory is"): load("runs/a/final")
    with pytest.raises(InputError, match="and ~ is not expanded"): load("~/nowhere")
    with pytest.raises(InputError, match="cannot be loaded"): load(tmp_path)
    M.save_model(adapt(M.tiny_model(), rank=2), M.load_processor("tiny"), tmp_path/"adapter")
    with pytest.raises(InputError, match="LoRA adapter, not a model.*--adapter .*adapter.*mdl_merge"): load(tmp_path/"adapter")
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(InputError, match="pip install 'mdl_nbdev.modelscope.'"): load("some/model", from_modelscope=True)
    monkeypatch.setattr("mdl_nbdev.model.load.find_spec", lambda name: None)
    with pytest.raises(InputError, match="--quantization 4bit .*pip install 'mdl_nbdev.quantization.'"): load("tiny", quantization="4bit")


def test_a_damaged_model_is_an_input_error(tmp_path):
    M.save_model(M.tiny_model(), M.load_processor("tiny"), tmp_path)
    weights = tmp_path/"model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(InputError, match="cannot be loaded"): M.load_model(str(tmp_path), device="cpu")
    kept = {k: v for k, v in M.tiny_model().state_dict().items() if "blocks.1.mlp" not in k}
    save_file(kept, weights, {"format": "pt"})
    with pytest.raises(InputError, match="cannot be loaded: 4 weights are missing, audio_encoder.blocks.1.mlp.fc1.bias"): M.load_model(str(tmp_path), device="cpu")


def edit_config(folder, **changes):
    config = json.loads((folder/"config.json").read_text())
    (folder/"config.json").write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not None}))
    return folder


@pytest.mark.parametrize("changes, message", [
    (dict(model_type="brand_new"), r"its architecture, brand_new, is not supported: transformers [\d.]+ does not know it"),
    (dict(model_type="wav2vec2"), "its architecture, wav2vec2, is not supported: it is not a model that generates text"),
    (dict(model_type=None), "config.json has no model_type"),
    (dict(hidden_size=64), r"weights do not fit config.json: [\w.]+ is \[.*128.*\] in the file, \[.*64.*\] in the model"),
])
def test_the_reason_why_a_model_cannot_be_loaded(changes, message, tmp_path):
    folder = edit_config(M.save_model(M.tiny_text_model(), tok, tmp_path/"base"), **changes)
    with pytest.raises(InputError, match=f"--model-name {folder}: .*{message}") as e: M.load_model(str(folder), device="cpu")
    assert "no such folder" not in str(e.value)


def test_a_damaged_file_is_named(tmp_path):
    M.tiny_text_model().save_pretrained(tmp_path/"base", max_shard_size="1MB")
    damaged = sorted((tmp_path/"base").glob("*.safetensors"))[1]
    damaged.write_bytes(damaged.read_bytes()[:5000])
    with pytest.raises(InputError, match=f"--model-name {tmp_path/'base'}: cannot be loaded: {damaged} is damaged; copy or download it again"):
        M.load_model(str(tmp_path/"base"), device="cpu")
    (tmp_path/"base"/"config.json").write_text("{")
    with pytest.raises(InputError, match="its config.json is damaged"): M.load_model(str(tmp_path/"base"), device="cpu")


def test_a_model_in_the_cache_of_the_hub_is_looked_at_there(tmp_path, monkeypatch):
    "Also where only a part of it was downloaded"
    cached = tmp_path/"models--some--model"/"snapshots"/"abc"
    M.save_model(M.tiny_text_model(), tok, cached)
    (cached.parent.parent/"refs").mkdir()
    (cached.parent.parent/"refs"/"main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert type(M.load_model("some/model", device="cpu")) is GPTNeoXForCausalLM
    weights = cached/"model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(InputError, match=f"--model-name some/model: cannot be loaded: {weights} is damaged"): M.load_model("some/model", device="cpu")
    edit_config(cached, model_type="brand_new")
    with pytest.raises(InputError, match="--model-name some/model: its architecture, brand_new"): M.load_model("some/model", device="cpu")


def test_a_model_that_does_not_fit_in_memory_is_not_damaged(tmp_path, monkeypatch):
    base = M.save_model(M.tiny_text_model(), tok, tmp_path/"base")
    def full(*args, **kwargs): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 130.00 MiB")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(InputError, match="base: does not fit in the memory of cpu; use --quantization 4bit"): M.load_model(str(base))
    with pytest.raises(InputError, match="base: does not fit in the memory of cpu; end other programs, or use a machine with more memory"): M.load_model(str(base), device="cpu") # to be merged


@pytest.mark.parametrize("method", ["fp8", "gptq", "compressed-tensors"])
def test_published_quantized_weights_are_refused_in_training(method, tmp_path, monkeypatch):
    folder = edit_config(M.save_model(M.tiny_model(), M.load_processor("tiny"), tmp_path/"small"), quantization_config=dict(quant_method=method, bits=4, config_groups={}))
    message = rf"--model-name {folder}: its weights are quantized \({method}\) and cannot be trained; .*mispeech/midashenglm-7b-1021-bf16, with --quantization 4bit"
    with pytest.raises(InputError, match=message): check_trainable(str(folder))
    for tuning in ("lora", "full"):
        model = M.tiny_model()
        model.name_or_path, model.config.quantization_config = str(folder), dict(quant_method=method)
        with pytest.raises(InputError, match=message): adapt(model, tuning=tuning)
    monkeypatch.chdir(tmp_path)
    soundfile.write("a.wav", np.zeros(16000), 16000)
    (tmp_path/"in.csv").write_text("audio,prediction\na.wav,dog\n")
    with pytest.raises(InputError, match=message): train(TrainSettings(train_dataset=["in.csv"], output="run", model_name=str(folder)))
    assert not (tmp_path/"run"/"data").exists(), "refused before the data is converted"
    with pytest.raises(InputError, match=rf"quantized already \({method}\); leave out --quantization 4bit"): M.load_model(str(folder), quantization="4bit", device="cpu")
    if method != "fp8": # transformers dequantizes it where it cannot compute with it
        with pytest.raises(InputError, match=rf"small: its weights are quantized \({method}\) and cannot be loaded here: .*pip install.*mispeech/midashenglm-7b-1021-bf16"):
            M.load_model(str(folder), device="cpu")


def test_weights_that_bitsandbytes_stored_can_be_trained(tmp_path):
    pytest.importorskip("bitsandbytes")
    small = M.save_model(M.load_model("tiny", quantization="4bit", device="cpu"), M.load_processor("tiny"), tmp_path/"small")
    check_trainable(str(small)), check_trainable("tiny")
    fit(adapt(M.load_model(str(small), device="cpu")), batch(), 1)
    assert is_quantized(M.load_model(str(small), quantization="4bit", device="cpu"))


class Wrapper(torch.nn.Module):
    "Like DistributedDataParallel"
    def __init__(self, module):
        super().__init__()
        self.module = module


def test_the_model_inside_of_wrappers():
    model = M.tiny_text_model()
    assert unwrap_model(model) is model
    adapted = adapt(model)
    assert unwrap_model(adapted) is model
    assert unwrap_model(Wrapper(torch.compile(Wrapper(adapted)))) is model


COMMANDS = """
import sys
from mdl_nbdev.base.imports import waiting
from mdl_nbdev.cli.commands import mdl_infer, mdl_train
infer, train = ["in.csv", "--output", "out.csv", "--overwrite", "true"], ["--train-dataset", "in.csv", "--output", "run", "--max-steps", "1", "--bf16", "false"]
for command, argv in ((mdl_infer, [*infer, "--model-name", "final"]), (mdl_infer, [*infer, "--model-name", "tiny", "--adapter", "adapter"]), (mdl_train, [*train, "--model-name", "tiny"])):
    try: command(argv)
    except SystemExit as e: assert not e.code, e.code
    print("ran:", *(m for m in ("peft", "bitsandbytes", "datasets", "pandas") if m in sys.modules and m not in waiting))
"""


def test_commands_run_only_the_libraries_that_they_need(tmp_path):
    "One after the other in the same process: a merged model needs no peft, and an unquantized one no bitsandbytes"
    pytest.importorskip("bitsandbytes")
    adapted = adapt(M.tiny_model(), rank=2)
    M.save_model(adapted, M.load_processor("tiny"), tmp_path/"adapter")
    M.save_model(M.merge(adapted), M.load_processor("tiny"), tmp_path/"final")
    soundfile.write(tmp_path/"a.wav", np.random.default_rng(0).normal(0, .1, 12000), 16000)
    (tmp_path/"in.csv").write_text("audio,user_prompt,prediction\na.wav,What?,noise\n")
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")} | dict(PYTHONPATH=str(Path(__file__).parent.parent))
    r = subprocess.run([sys.executable, "-c", COMMANDS], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert r.returncode == 0, r.stderr
    assert [line.split()[1:] for line in r.stdout.splitlines() if line.startswith("ran:")] == [[], ["peft"], ["peft"]]


def test_adapters_that_cannot_be_loaded(tmp_path):
    load = lambda folder: M.load_adapter(M.tiny_model(), folder)
    with pytest.raises(InputError, match="there is no such folder"): load(tmp_path/"nowhere")
    with pytest.raises(InputError, match="there is no adapter_config.json"): load(tmp_path)
    good = M.save_model(adapt(M.tiny_model(), rank=2), M.load_processor("tiny"), tmp_path/"good")
    load(good)
    weights = good/"adapter_model.safetensors"
    saved = weights.read_bytes()
    weights.write_bytes(saved[:1000])
    with pytest.raises(InputError, match="does not fit tiny, or is damaged"): load(good)
    weights.unlink()
    with pytest.raises(InputError, match="good: has no weights in safetensors format"): load(good)
    M.save_model(adapt(text_model(), rank=2), tok, tmp_path/"text")
    with pytest.raises(InputError, match="trained on another model than tiny: their weights differ"): load(tmp_path/"text")
    only = M.save_model(adapt(M.tiny_model(), ["encoder"], rank=2), tok, tmp_path/"only")
    config = json.loads((only/"adapter_config.json").read_text())
    (only/"adapter_config.json").write_text(json.dumps(config | dict(target_modules=".*_proj|.*qkv")))
    with pytest.raises(InputError, match="does not fit tiny"): load(only)
    (only/"adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"): load(only)


def test_merges_that_cannot_be_made(tmp_path, monkeypatch):
    adapter = M.save_model(adapt(M.tiny_model(), rank=2), M.load_processor("tiny"), tmp_path/"adapter")
    (tmp_path/"there").mkdir()
    (tmp_path/"there"/"notes").write_text("mine")
    with pytest.raises(InputError, match="exists already"): M.merge_adapter(MergeSettings(adapter=adapter, output=tmp_path/"there"))
    assert (tmp_path/"there"/"notes").read_text() == "mine"
    with pytest.raises(InputError, match="not replaced: this command writes"): M.merge_adapter(MergeSettings(adapter=adapter, output=tmp_path/"there", overwrite=True))
    with pytest.raises(InputError, match="would replace its own input"): M.merge_adapter(MergeSettings(adapter=adapter, output=adapter, overwrite=True))
    again = MergeSettings(adapter=adapter, output=tmp_path/"out", overwrite=True)
    M.merge_adapter(again)
    (tmp_path/"out"/"old.safetensors").touch()
    M.merge_adapter(again)
    assert (tmp_path/"out"/"config.json").exists() and not (tmp_path/"out"/"old.safetensors").exists()
    def full_disk(model, processor, folder): raise OSError(28, "No space left on device", (folder/"half").touch())
    with monkeypatch.context() as m:
        m.setattr("mdl_nbdev.model.save.save_model", full_disk)
        with pytest.raises(InputError, match="out: cannot write this folder: the disk is full; free some space, or choose another --output"): M.merge_adapter(again)
    assert (tmp_path/"out"/"config.json").exists() and not list(tmp_path.glob(".out.*")), "the old one stays, and nothing of the new one"
    with pytest.raises(InputError, match="no LoRA adapter here"): M.merge_adapter(MergeSettings(adapter=tmp_path/"out", output=tmp_path/"new"))
    config = json.loads((adapter/"adapter_config.json").read_text())
    (adapter/"adapter_config.json").write_text(json.dumps(config | dict(base_model_name_or_path=None)))
    with pytest.raises(InputError, match="give it as --model-name"): M.merge_adapter(MergeSettings(adapter=adapter, output=tmp_path/"new"))
    assert not list(tmp_path.glob("new*"))


def test_a_base_that_is_stored_quantized_is_no_base_to_merge_into(tmp_path):
    pytest.importorskip("bitsandbytes")
    small = M.save_model(M.load_model("tiny", quantization="4bit", device="cpu"), M.load_processor("tiny"), tmp_path/"small")
    adapter = M.save_model(adapt(M.tiny_model(), rank=2), M.load_processor("tiny"), tmp_path/"adapter")
    with pytest.raises(InputError, match="these weights are quantized"): M.merge_adapter(MergeSettings(adapter=adapter, output=tmp_path/"out", model_name=str(small)))


SNIPPET = """
import sys
for name in ("mdl_nbdev", "fastcore", "peft", "soxr"): sys.modules[name] = None  # as if not installed
import torch
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer
model_path, wav = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(model_path, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(model_path)
processor = AutoProcessor.from_pretrained(model_path, trust_remote_code=True)
messages = [
    {"role": "system", "content": [{"type": "text", "text": "System prompt"}]},
    {"role": "user", "content": [{"type": "text", "text": "User prompt"}, {"type": "audio", "path": wav}]},
]
with torch.no_grad():
    model_inputs = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, add_special_tokens=True,
                                                 return_dict=True, return_tensors="pt").to(device=model.device, dtype=model.dtype)
    generation = model.generate(**model_inputs, max_new_tokens=6, do_sample=False)
assert 'transformers_modules' in type(model).__module__
print(generation[0].tolist(), len(tokenizer.batch_decode(generation, skip_special_tokens=True)))
"""


def test_a_saved_model_answers_where_this_package_is_not(tmp_path):
    model = M.merge(fit(adapt(M.tiny_model(), rank=4), batch(), 2))
    folder = M.save_model(model, M.load_processor("tiny"), tmp_path/"final")
    wav = tmp_path/"clip.wav"
    soundfile.write(wav, np.random.default_rng(0).normal(0, .1, 12000), 16000)
    r = subprocess.run([sys.executable, "-I", "-c", SNIPPET, str(folder), str(wav)], cwd=tmp_path, capture_output=True, text=True,
                       env=dict(PATH="", HOME=str(tmp_path), HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path/"hf")))
    assert r.returncode == 0, r.stderr
    ids, n = r.stdout.strip().splitlines()[-1].rsplit(" ", 1)
    processor = M.load_processor(str(folder))
    messages = [{"role": "system", "content": [{"type": "text", "text": "System prompt"}]},
                {"role": "user", "content": [{"type": "text", "text": "User prompt"}, {"type": "audio", "path": str(wav)}]}]
    inputs = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    here = M.load_model(str(folder), device="cpu").generate(**inputs, max_new_tokens=6, do_sample=False)[0].tolist()
    assert json.loads(ids) == here and n == "1"


def test_a_saved_config_says_what_others_look_for(tmp_path):
    M.save_model(M.tiny_model(), M.load_processor("tiny"), tmp_path)
    config = json.loads((tmp_path/"config.json").read_text())
    assert config["architectures"] == ["MiDashengLMModel"] and config["model_type"] == "midashenglm"
    assert config["auto_map"]["AutoModelForCausalLM"] == "midashenglm.MiDashengLMModel" and (tmp_path/"midashenglm.py").exists()
    assert {"audio_encoder_config", "text_config", "audio_token_id", "subsample_factor"} <= config.keys()
    native = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(native) is MiDashengLMModel


class Bomb:
    "Creates a file when it is unpickled"
    def __init__(self, marker): self.marker = marker
    def __reduce__(self): return open, (str(self.marker), "w")


@pytest.fixture(params=["pickle", "torch"])
def bomb(request, tmp_path):
    "`bomb(path)` writes a malicious pickle; none may have gone off by the end"
    marker = tmp_path/"gone-off"
    def place(path): (pickle.dump(Bomb(marker), open(path, "wb")) if request.param == "pickle" else torch.save({"weight": Bomb(marker)}, path))
    place(tmp_path/"proof")
    (lambda p: pickle.load(open(p, "rb")) if request.param == "pickle" else torch.load(p, weights_only=False))(tmp_path/"proof")
    assert marker.exists()
    marker.unlink()
    yield place
    assert not marker.exists()


beside = ["pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "scaler.pt", "model.pt", "model.pth",
          "pytorch_model-00001-of-00001.bin", "consolidated.00.pth", "vocab.pkl", "embeddings.pt"]


def test_pickles_beside_a_model_are_left_alone(bomb, tmp_path):
    base = M.save_model(M.tiny_model(), M.load_processor("tiny"), tmp_path/"base")
    adapter = M.save_model(adapt(M.tiny_model(), rank=2), M.load_processor("tiny"), tmp_path/"adapter")
    for folder in (base, adapter):
        for name in beside: bomb(folder/name)
    (base/"midashenglm.py").write_text(f"open({str(tmp_path/'gone-off')!r}, 'w')")
    (base/"pytorch_model.bin.index.json").write_text(json.dumps(dict(metadata={}, weight_map={"a": "pytorch_model-00001-of-00001.bin"})))
    M.load_adapter(M.load_model(str(base), device="cpu"), adapter)
    M.load_processor(str(base)), M.load_processor(str(adapter))
    M.merge_adapter(MergeSettings(adapter=adapter, model_name=str(base), output=tmp_path/"out"))
    assert not [p for p in (tmp_path/"out").iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "model.pt"])
def test_a_model_in_pickles_is_refused(bomb, tmp_path, name):
    base = M.save_model(M.tiny_text_model(), tok, tmp_path/"base")
    (base/"model.safetensors").unlink()
    bomb(base/name)
    (base/"pytorch_model.bin.index.json").write_text(json.dumps(dict(metadata={}, weight_map={"a": name})))
    with pytest.raises(InputError, match="base: has no weights in safetensors format.*convert"): M.load_model(str(base), device="cpu")


def test_pickles_that_pass_themselves_off_as_weights(bomb, tmp_path):
    def fresh(name):
        base = M.save_model(M.tiny_text_model(), tok, tmp_path/name)
        (base/"model.safetensors").unlink()
        return base
    refused = lambda base: pytest.raises(InputError, match=f"--model-name {base}: ")
    disguised = fresh("disguised")
    bomb(disguised/"model.safetensors")
    with refused(disguised): M.load_model(str(disguised), device="cpu")
    indexed = fresh("indexed")
    bomb(indexed/"pytorch_model.bin")
    (indexed/"model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map={"lm_head.weight": "pytorch_model.bin"})))
    with refused(indexed): M.load_model(str(indexed), device="cpu")
    named = fresh("named")
    bomb(named/"adapter_model.bin")
    config = json.loads((named/"config.json").read_text())
    (named/"config.json").write_text(json.dumps(config | dict(transformers_weights="adapter_model.bin")))
    with refused(named): M.load_model(str(named), device="cpu")
    both = M.save_model(M.tiny_text_model(), tok, tmp_path/"both")
    shutil.copy(M.save_model(adapt(M.tiny_text_model(), rank=2), tok, tmp_path/"adapter")/"adapter_config.json", both)
    bomb(both/"adapter_model.bin")
    with pytest.raises(InputError, match="LoRA adapter, not a model"): M.load_model(str(both), device="cpu")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_an_adapter_in_a_pickle_is_refused(bomb, tmp_path, name):
    adapter = M.save_model(adapt(M.tiny_model(), rank=2), M.load_processor("tiny"), tmp_path/"adapter")
    (adapter/"adapter_model.safetensors").unlink()
    bomb(adapter/name)
    message = "adapter: has no weights in safetensors format.*convert" if name.endswith("bin") else "is damaged"
    with pytest.raises(InputError, match=message): M.load_adapter(M.tiny_model(), adapter)
    with pytest.raises(InputError, match=message): M.merge_adapter(MergeSettings(adapter=adapter, output=tmp_path/"out"))
