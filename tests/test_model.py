"Building, loading, adapting, saving and merging: what must hold of the weights, and every error a user can meet"
import json
import math
import random
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from mdl_nbdev import model as M
from mdl_nbdev.chat import n_audio_tokens, tiny_tokenizer
from mdl_nbdev.config import InputError, MergeSettings
from mdl_nbdev.midashenglm import MiDashengLMModel

logging.disable_progress_bar()
tok = tiny_tokenizer()
everything = ["encoder", "projector", "decoder", "embed_tokens", "lm_head"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


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
    if kind == "gpt2": return GPT2LMHeadModel(GPT2Config(vocab_size=len(tok), n_embd=64, n_layer=2, n_head=2, n_positions=64)).eval()
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tok), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)).eval()


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


@pytest.mark.parametrize("targets", [everything[:3], everything, ["encoder", "lm_head"], ["decoder", "embed_tokens"]], ids=",".join)
@pytest.mark.parametrize("make", [M.tiny_model, tied_tiny])
def test_adapted_merged_and_reloaded_agree(make, targets, tmp_path):
    data, base = batch(), make()
    frozen = {k: v.clone() for k, v in base.state_dict().items()}
    model = fit(M.adapt(base, targets, rank=4), data)
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


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_an_adapter_of_a_quantised_model_merges_into_the_float_base(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    data = batch()
    model = fit(M.adapt(M.load_model("tiny", quantization=bits, device="cpu"), [*everything[:3], "lm_head"], rank=4), data)
    quantised, half = type(model.get_base_model().decoder.model.layers[0].self_attn.q_proj.base_layer).__name__, logits(model, data)
    assert quantised == {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[bits]
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
def test_a_quantised_model_answers_almost_as_before(bits):
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
    model = fit(M.adapt(M.tiny_model(), rank=2), batch(), 1)
    M.save_model(model, M.load_processor("tiny"), tmp_path/"adapter")
    out = M.merge_adapter(MergeSettings(adapter=tmp_path/"adapter", output=tmp_path/"out", bf16=bf16))
    merged = M.load_model(str(out), dtype="auto", device="cpu")
    assert merged.decoder.lm_head.weight.dtype == dtype and json.loads((out/"config.json").read_text())["dtype"] == str(dtype)[6:]
    assert merged.audio_encoder.init_bn.running_var.dtype == torch.float32
    assert not (tmp_path/"out.part").exists()


def test_saving_an_adapter_asks_no_network(tmp_path, monkeypatch):
    import peft.utils.save_and_load
    def asked(*args, **kwargs): raise AssertionError("asked the hub")
    monkeypatch.setattr(peft.utils.save_and_load, "check_file_exists_on_hf_hub", asked)
    M.adapt(M.tiny_model(), everything, rank=2).save_pretrained(tmp_path)
    saved = json.loads((tmp_path/"adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "tiny" and len(saved["target_modules"]) < 1500


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_text_only_models(kind, tmp_path):
    base, data = text_model(kind), text_batch()
    M.save_model(base, tok, tmp_path/"base")
    loaded = M.load_model(str(tmp_path/"base"), device="cpu")
    assert type(loaded) is type(base)
    with pytest.raises(InputError, match="no encoder; it has decoder"): M.adapt(loaded, ["encoder", "decoder"])
    model = fit(M.adapt(loaded, [*everything[:3], "embed_tokens"], rank=4), data)
    assert set(M.linear_layers(base)) == {"decoder"} and "lm_head" not in str(M.linear_layers(base))
    want = logits(model, data)
    M.save_model(model, tok, tmp_path/"adapter")
    close(logits(M.merge(model), data), want)
    s = MergeSettings(adapter=tmp_path/"adapter", output=tmp_path/"merged")
    close(logits(M.load_model(str(M.merge_adapter(s)), device="cpu"), data), want)


def test_every_linear_layer_of_a_target_is_adapted():
    parts = M.linear_layers(M.tiny_model())
    assert {k: len(v) for k, v in parts.items()} == dict(encoder=4*4, projector=2, decoder=4*7)
    for part, names in parts.items():
        adapted = [n.removeprefix("base_model.model.").removesuffix(".lora_A") for n, _ in M.adapt(M.tiny_model(), [part], rank=2).named_modules() if n.endswith(".lora_A")]
        assert sorted(adapted) == sorted(names)
    model = M.adapt(M.tiny_model(), ["lm_head"], rank=2, lora_target_modules=r".*\.(q|k)_proj")
    t = M.Trainable(model)
    assert t.layers == 8 and t.parts["lm_head"][1] == len(tok)*128
    assert "adapted layers" in t._repr_html_() and f"{t.trainable:,}" in str(t)


def test_targets_that_fit_nothing():
    adapt = lambda *args, **kwargs: M.adapt(M.tiny_model(), *args, **kwargs)
    with pytest.raises(InputError, match="at least one of encoder"): adapt(["lm_head"])
    with pytest.raises(InputError, match=r"no module of this model .* audio_encoder\.blocks\.0"): adapt(lora_target_modules="q_proj")
    with pytest.raises(InputError, match="not a regular expression"): adapt(lora_target_modules="(")
    with pytest.raises(InputError, match="--lora-target-modules .*norm"): adapt(lora_target_modules=r".*\.norm1")


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


def test_models_that_cannot_be_loaded(tmp_path, monkeypatch):
    load = lambda name, **kwargs: M.load_model(str(name), device="cpu", **kwargs)
    with pytest.raises(InputError, match="no/such-model: no such folder.*hub"): load("no/such-model")
    with pytest.raises(InputError, match="no such folder"): load(tmp_path/"nowhere")
    with pytest.raises(InputError, match="cannot be loaded"): load(tmp_path)
    M.save_model(M.adapt(M.tiny_model(), rank=2), M.load_processor("tiny"), tmp_path/"adapter")
    with pytest.raises(InputError, match="LoRA adapter, not a model.*mdl_merge"): load(tmp_path/"adapter")
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(InputError, match="pip install 'mdl_nbdev.modelscope.'"): load("some/model", from_modelscope=True)
    monkeypatch.setattr(M, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--quantization 4bit .*pip install 'mdl_nbdev.quantization.'"): load("tiny", quantization="4bit")


def test_a_damaged_model_is_an_input_error(tmp_path):
    M.save_model(M.tiny_model(), M.load_processor("tiny"), tmp_path)
    weights = tmp_path/"model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(InputError, match="cannot be loaded"): M.load_model(str(tmp_path), device="cpu")
    kept = {k: v for k, v in M.tiny_model().state_dict().items() if "blocks.1.mlp" not in k}
    save_file(kept, weights, {"format": "pt"})
    with pytest.raises(InputError, match="cannot be loaded: 4 weights are missing, audio_encoder.blocks.1.mlp.fc1.bias"): M.load_model(str(tmp_path), device="cpu")


def test_adapters_that_cannot_be_loaded(tmp_path):
    load = lambda folder: M.load_adapter(M.tiny_model(), folder)
    with pytest.raises(InputError, match="there is no such folder"): load(tmp_path/"nowhere")
    with pytest.raises(InputError, match="there is no adapter_config.json"): load(tmp_path)
    good = M.save_model(M.adapt(M.tiny_model(), rank=2), M.load_processor("tiny"), tmp_path/"good")
    load(good)
    weights = good/"adapter_model.safetensors"
    saved = weights.read_bytes()
    weights.write_bytes(saved[:1000])
    with pytest.raises(InputError, match="does not fit tiny, or is damaged"): load(good)
    weights.unlink()
    with pytest.raises(InputError, match="does not fit tiny, or is damaged"): load(good)
    M.save_model(M.adapt(text_model(), rank=2), tok, tmp_path/"text")
    with pytest.raises(InputError, match="does not fit tiny"): load(tmp_path/"text")
    only = M.save_model(M.adapt(M.tiny_model(), ["encoder"], rank=2), tok, tmp_path/"only")
    config = json.loads((only/"adapter_config.json").read_text())
    (only/"adapter_config.json").write_text(json.dumps(config | dict(target_modules=".*_proj|.*qkv")))
    with pytest.raises(InputError, match="does not fit tiny"): load(only)
    (only/"adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"): load(only)


def test_merges_that_cannot_be_made(tmp_path):
    adapter = M.save_model(M.adapt(M.tiny_model(), rank=2), M.load_processor("tiny"), tmp_path/"adapter")
    (tmp_path/"there").mkdir()
    (tmp_path/"there"/"notes").write_text("mine")
    with pytest.raises(InputError, match="exists already"): M.merge_adapter(MergeSettings(adapter=adapter, output=tmp_path/"there"))
    assert (tmp_path/"there"/"notes").read_text() == "mine"
    with pytest.raises(InputError, match="is not replaced"): M.merge_adapter(MergeSettings(adapter=adapter, output=tmp_path/"there", overwrite=True))
    with pytest.raises(InputError, match="is an input"): M.merge_adapter(MergeSettings(adapter=adapter, output=adapter, overwrite=True))
    again = MergeSettings(adapter=adapter, output=tmp_path/"out", overwrite=True)
    M.merge_adapter(again)
    (tmp_path/"out"/"old").touch()
    M.merge_adapter(again)
    assert (tmp_path/"out"/"config.json").exists() and not (tmp_path/"out"/"old").exists()
    with pytest.raises(InputError, match="no LoRA adapter here"): M.merge_adapter(MergeSettings(adapter=tmp_path/"out", output=tmp_path/"new"))
    config = json.loads((adapter/"adapter_config.json").read_text())
    (adapter/"adapter_config.json").write_text(json.dumps(config | dict(base_model_name_or_path=None)))
    with pytest.raises(InputError, match="give it as --model-name"): M.merge_adapter(MergeSettings(adapter=adapter, output=tmp_path/"new"))
    assert not list(tmp_path.glob("new*"))


def test_a_base_that_is_stored_quantised_is_no_base_to_merge_into(tmp_path):
    pytest.importorskip("bitsandbytes")
    small = M.save_model(M.load_model("tiny", quantization="4bit", device="cpu"), M.load_processor("tiny"), tmp_path/"small")
    adapter = M.save_model(M.adapt(M.tiny_model(), rank=2), M.load_processor("tiny"), tmp_path/"adapter")
    with pytest.raises(InputError, match="these weights are quantised"): M.merge_adapter(MergeSettings(adapter=adapter, output=tmp_path/"out", model_name=str(small)))


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
    model = M.merge(fit(M.adapt(M.tiny_model(), rank=4), batch(), 2))
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
