"The memory that a step is estimated to need, beside what PyTorch keeps and allocates on the CPU; the advice; errors that mean out of memory"
import dataclasses
import gc
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mdl_nbdev.base.command_line import from_args
from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.processes import available_memory
from mdl_nbdev.base.settings import TrainSettings
from mdl_nbdev.model.adapters import adapt, without_input_casts
from mdl_nbdev.model.collate import Batch
from mdl_nbdev.model.load import is_out_of_memory, load_model, recompute_activations
from mdl_nbdev.model.midasheng_encoder import n_audio_tokens
from mdl_nbdev.model.midashenglm import QWEN2_7B, MiDashengLMConfig, MiDashengLMModel
from mdl_nbdev.model.midashenglm_family import tiny_model
from mdl_nbdev.model.targets import Trainable
from mdl_nbdev.train import memory as M
from mdl_nbdev.train import preview
from mdl_nbdev.train.fit import load_adapted
from mdl_nbdev.train.losses import weighted_losses

rows, tokens, seconds = 4, 256, 20
everything = "encoder,projector,decoder,embed_tokens,lm_head"
SHAPE = dict(vocab_size=500, hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=6)


def settings(**kwargs): return TrainSettings(**dict(train_dataset="x", output="y", bf16=False, lora_rank=4) | kwargs)


def plain(kind, **changes):
    shape = SHAPE | changes
    torch.manual_seed(0)
    if kind == "neox": return GPTNeoXForCausalLM(GPTNeoXConfig(**shape))
    if kind == "gpt2": return GPT2LMHeadModel(GPT2Config(vocab_size=500, bos_token_id=0, eos_token_id=0, n_embd=96, n_layer=4, n_head=6, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    if kind == "qwen2": return Qwen2ForCausalLM(Qwen2Config(**shape, num_key_value_heads=2))
    if kind == "qwen3": return Qwen3ForCausalLM(Qwen3Config(**shape, num_key_value_heads=2, head_dim=32))
    if kind == "mixtral": return MixtralForCausalLM(MixtralConfig(**shape, num_key_value_heads=2, num_local_experts=4))
    if kind == "qwen2-audio":
        audio = dict(d_model=64, encoder_layers=3, encoder_attention_heads=4, encoder_ffn_dim=128, num_mel_bins=32, max_source_positions=150)
        text = dict(model_type="qwen2", num_key_value_heads=2, **shape)
        return Qwen2AudioForConditionalGeneration(Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_id=5))
    if kind == "llama": return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=6))
    text = dict(model_type="qwen2", num_key_value_heads=2, tie_word_embeddings=False, **shape)
    return MiDashengLMModel(MiDashengLMConfig(audio_encoder_config=dict(embed_dim=96, depth=shape["num_hidden_layers"], num_heads=4), text_config=text, audio_token_id=5))


def ready(kind, s):
    "A model as a run trains it"
    m = plain(kind)
    dtype = torch.bfloat16 if s.bf16 else torch.float32
    if s.quantization:
        with TemporaryDirectory() as folder:
            m.save_pretrained(folder)
            m = load_model(folder, quantization=s.quantization, dtype=dtype, device="cpu")
    elif s.bf16: m = type(m)._from_config(m.config, dtype=dtype)
    m = adapt(m, s).train()
    if s.gradient_checkpointing: recompute_activations(m)
    return m


def batch(kind, pad, rows=rows, tokens=tokens, seconds=seconds, audio_id=5):
    ids = torch.randint(6, 250, (rows, tokens))
    labels, extra, clips = ids.clone(), {}, []
    if kind == "audio":
        n = n_audio_tokens(seconds*16000)
        ids[:, 1:1 + n], labels[:, :1 + n] = audio_id, -100
        clips = [seconds*16000]*rows
        extra = dict(input_values=torch.randint(-3000, 3000, (rows, seconds*16000), dtype=torch.int16), audio_length=torch.tensor(clips))
    if kind == "qwen2-audio": # three seconds: 300 frames, 75 tokens
        ids[:, 1:76], labels[:, :76] = 5, -100
        clips = [48000]*rows
        extra = dict(input_features=torch.randn(rows, 32, 300), feature_attention_mask=torch.ones(rows, 300, dtype=torch.int64))
    mask = torch.ones_like(ids)
    if pad: mask[0, -5:] = 0
    label_at = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1)).flatten().nonzero()[:, 0]
    described = dict(label_at=label_at, sample=torch.arange(rows)[:, None].expand_as(ids), task=torch.zeros(rows, dtype=torch.int64), n_samples=torch.tensor(clips))
    return Batch(dict(input_ids=ids, labels=labels, attention_mask=mask, **extra, **described))


def kept(model, forward):
    "Bytes of all storages that are kept for the backward pass, weights left out"
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    found = {}
    def pack(t):
        s = t.untyped_storage()
        if s.data_ptr() not in own: found[s.data_ptr()] = s
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): forward()
    return sum(s.nbytes() for s in found.values())


def peak(f):
    "The most bytes that were allocated at a time beyond those at the start"
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: f()
    events = sorted((e.start_ns(), e.nbytes()) for e in p.profiler.kineto_results.events() if e.name() == "[memory]")
    now = most = 0
    for _, n in events:
        now += n
        most = max(most, now)
    return most


def measure(kind, pad=True, accumulated=True, **kwargs):
    "The estimate; what is kept from the forward to the backward pass; the peak; the gradients at the end"
    s = settings(gradient_accumulation_steps=1 + accumulated, **kwargs)
    m, x = ready(kind, s), batch(kind, pad)
    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=s.bf16): return weighted_losses(m, x.inputs, torch.ones(2, rows, tokens), x["label_at"])[0]
    with without_input_casts(m, s.bf16):
        forward().backward() # gradients are there, as from the second batch of a step on
        gradients = sum(p.grad.nbytes for p in m.parameters() if p.grad is not None)
        e = M.estimate_memory(plain(kind), x, s)
        if accumulated: assert gradients == e.gradients
        else: m.zero_grad()
        return e, kept(m, forward), peak(lambda: forward().backward())


lora = [dict(), dict(bf16=True)]
full = [dict(tuning="full", train_target=everything), dict(tuning="full", train_target=everything, bf16=True)]
for_text = [dict(k, train_target="decoder,embed_tokens,lm_head") if "tuning" in k else k for k in lora + full]
cases = [*[(kind, k) for kind in ("qwen2", "qwen3", "neox", "llama", "gpt2", "qwen2-audio") for k in for_text], *[("audio", k) for k in lora + full],
         *[("audio", dict(k, train_target=t)) for k in lora for t in ("decoder", "projector", "encoder")],
         *[("qwen2", dict(k, **v)) for k in lora for v in (dict(use_dora=True), dict(lora_dropout=0.1), dict(pad=False), dict(train_target="decoder,embed_tokens,lm_head"))],
         ("audio", dict(tuning="full", train_target="decoder")), ("audio", dict(tuning="full", train_target="decoder", bf16=True)),
         *[("mixtral", dict(k, tuning="full", train_target="decoder")) for k in lora],
         ("audio", dict(lora_target_modules=r".*(attn\.(qkv|proj)|net\.[02]|mlp\.(gate|up|down)_proj)"))]


def slow_but(cases, *fast):
    "All cases, marked slow but for some"
    assert all(c in cases for c in fast)
    return [c if c in fast else pytest.param(*(c if isinstance(c, tuple) else [c]), marks=pytest.mark.slow) for c in cases]


@pytest.mark.parametrize("kind, k", slow_but(cases, ("audio", lora[0]), ("qwen2", dict(use_dora=True)), ("neox", lora[1]), ("qwen2", for_text[2]), ("mixtral", dict(tuning="full", train_target="decoder"))), ids=str)
def test_all_kept(kind, k):
    e, found, most = measure(kind, gradient_checkpointing=False, **k)
    assert 0.9 < e.activations/found < 1.2, (e.activations, found)
    assert 0.97 < (e.activations + e.working)/most < 1.03, (e.activations + e.working, most)


recomputed = [(kind, k) for kind in ("qwen2", "neox", "qwen2-audio") for k in for_text] + [("audio", k) for k in lora + full]


@pytest.mark.parametrize("kind, k", slow_but(recomputed, ("qwen2-audio", lora[0]), ("neox", for_text[2])), ids=str)
def test_computed_anew(kind, k):
    e, _, most = measure(kind, gradient_checkpointing=True, **k)
    assert 0.97 < (e.activations + e.working)/most < 1.03, (e.activations + e.working, most)


@pytest.mark.parametrize("kind, quantization, checkpointing", slow_but([*[("audio", q, c) for q in ("4bit", "8bit") for c in (False, True)], ("qwen2", "4bit", False)], ("qwen2", "4bit", False)))
def test_quantized(kind, quantization, checkpointing):
    e, _, most = measure(kind, quantization=quantization, gradient_checkpointing=checkpointing, bf16=True)
    assert 0.95 < (e.activations + e.working)/most < 1.06, (e.activations + e.working, most)


@pytest.mark.parametrize("kind, k", slow_but([("audio", lora[0]), ("qwen2", for_text[2]), ("qwen2", for_text[3])], ("audio", lora[0])), ids=str)
def test_gradients_that_appear_during_the_step(kind, k):
    e, _, most = measure(kind, accumulated=False, gradient_checkpointing=True, **k)
    assert 0.97 < (e.gradients + e.activations + e.working)/most < 1.03, (e, most)


@pytest.mark.parametrize("kind, k", slow_but([(kind, k) for kind in ("qwen2", "audio") for k in lora + full], ("audio", lora[0]), ("qwen2", full[1])), ids=str)
def test_what_lasts(kind, k):
    "Weights, gradients and moments, to the byte"
    s = settings(**k | ({} if kind == "audio" or "tuning" not in k else dict(train_target="decoder,embed_tokens,lm_head")))
    m, x = ready(kind, s), batch(kind, True)
    opt = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad])
    with torch.autocast("cpu", torch.bfloat16, enabled=s.bf16): m(**x.inputs).loss.backward()
    opt.step()
    e = M.estimate_memory(m, x, s)
    tensors = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*m.parameters(), *m.buffers()]}
    assert sum(e.weights.values()) == sum(tensors.values())
    moments = [t for state in opt.state.values() for k, t in state.items() if k != "step"]
    assert e.optimizer == sum(t.nbytes for t in moments)


def test_by_hand():
    "A layer of the published decoder and one of its encoder on a GPU, LoRA on all of it, bfloat16"
    def activations(depth=2, layers=3):
        config = MiDashengLMConfig(audio_encoder_config=dict(depth=depth), text_config=QWEN2_7B | dict(num_hidden_layers=layers))
        with torch.device("meta"): m = MiDashengLMModel(config)
        x = batch("audio", False, 1, 128, 10, config.audio_token_id)
        return M.estimate_memory(m, x, settings(bf16=True, lora_rank=32, gradient_checkpointing=False), "cuda").activations
    activations() # constants, such as the window of spectrograms, are made once
    fewer = activations()
    norms, heads = 2*(3584*4 + 4), 28*4
    attention = (3584 + 512 + 512 + 3584)*2
    mlp = 3*18944*2
    adapters = (3584 + 3584 + 18944 + 7*32)*2 # what q, k and v get, what gate and up get, what down gets; what o gets is attention's
    casts = 2*32*(2*(3584 + 3584) + 2*(3584 + 512) + 3*(3584 + 18944)) # the adapters' weights in bfloat16
    assert activations(layers=4) - fewer == 128*(norms + heads + attention + mlp + adapters) + casts
    norms, heads, attention, mlp = 2*(1280*4 + 8), 16*4, 4*1280*2, 5120*2
    adapters = (1280 + 1280 + 5120 + 4*32)*2
    casts = 2*32*(1280 + 3840 + 2*1280 + 2*(1280 + 5120)) + 4*4*1280 # and those of the norms in float32
    assert activations(depth=3) - fewer == 250*(norms + heads + attention + mlp + adapters) + casts


@pytest.mark.parametrize("kind", slow_but(["4bit", "8bit"], "4bit"))
def test_packed_weights(kind):
    "What is estimated for a model before it is quantized is what it then needs"
    s = settings(quantization=kind, train_target="decoder")
    x = batch("audio", True, 1, 50, 1, tiny_model().config.audio_token_id)
    e = M.estimate_memory(tiny_model(), x, s)
    m = load_model("tiny", quantization=kind, dtype=torch.float32, device="cpu")
    scales = [p.SCB for p in m.parameters() if getattr(p, "SCB", None) is not None]
    m = adapt(m, s)
    states = [p.quant_state for p in m.parameters() if hasattr(p, "quant_state")]
    packed = [*m.parameters(), *m.buffers(), *scales, *(t for q in states for t in (q.absmax, q.offset, q.code, q.state2.absmax, q.state2.code))]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in packed}
    assert sum(e.weights.values()) == pytest.approx(sum(storages.values()), rel=0.002)
    assert f"{kind[0]} bits" in e.weights
    stored = M.estimate_memory(m, x, dataclasses.replace(s, quantization=None))
    assert stored.weights == pytest.approx(e.weights, rel=0.002), "a model that is stored in bits is estimated in bits"


@pytest.mark.parametrize("layers", slow_but([1, 4], 1))
def test_all_grows_with_the_batch(layers):
    m = plain("audio", hidden_size=384, intermediate_size=1536, num_hidden_layers=layers)
    e = lambda rows, tokens, seconds, **k: M.estimate_memory(m, batch("audio", True, rows, tokens, seconds), settings(bf16=True, **k)).total
    assert e(1, 150, 10) < e(2, 150, 10) < e(2, 300, 10) < e(2, 300, 20)
    if layers > 1: assert e(8, 150, 10) < e(8, 150, 10, gradient_checkpointing=False)
    assert e(1, 150, 1, quantization="4bit") < e(1, 150, 1, quantization="8bit") < e(1, 150, 1)
    if layers > 1: assert e(1, 3100, 600) > e(1, 3100, 60), "ten minutes of audio"


class Rows:
    "Stands for a mix of rows: tokens, and seconds of audio"
    def __init__(self, n_tokens, seconds):
        self.n_tokens, self.lengths = np.array(n_tokens), np.array(n_tokens) + 25*np.array(seconds)
        self.task_ids = np.zeros(len(n_tokens), int)
    def __getitem__(self, i): return i


def test_longest_batch():
    ds, as_list = Rows([10, 50, 20, 90, 40], [0, 8, 2, 0, 1]), lambda items: items
    assert M.longest_batch(ds, settings(batch_size=2), as_list) == [1, 3], "audio costs more than text"
    assert M.longest_batch(ds, settings(batch_size=2, seq_length=40), as_list) == [2, 4]
    packs = M.longest_batch(ds, settings(batch_size=1, packing=True, seq_length=100), as_list)
    assert list(map(sorted, packs)) == [[1, 4]]
    short = Rows([60]*8 + [40]*8, [0]*16)
    packs = M.longest_batch(short, settings(batch_size=4, packing=True, seq_length=100), as_list)
    assert [sum(short.n_tokens[pack]) for pack in packs] == [100]*4, "long rows are filled up with short ones, as in training"
    assert M.longest_batch(ds, settings(batch_tokens=90), as_list) == [1] and sorted(M.longest_batch(ds, settings(batch_tokens=100), as_list)) == [1, 4]
    with pytest.raises(InputError, match="--seq-length 5"): M.longest_batch(ds, settings(seq_length=5), as_list)


def test_no_estimate_where_shapes_depend_on_numbers():
    "Experts that are run one after another, each on the tokens that chose it"
    config = MixtralConfig(**SHAPE, num_key_value_heads=2, num_local_experts=4)
    config._experts_implementation = "eager"
    with pytest.raises(InputError, match="no estimate of the memory"): M.estimate_memory(MixtralForCausalLM(config), batch("text", True), settings())


def test_no_estimate_of_dora_in_bits():
    x = batch("audio", True, 1, 50, 1, tiny_model().config.audio_token_id)
    with pytest.raises(InputError, match="DoRA"): M.estimate_memory(tiny_model(), x, settings(use_dora=True, quantization="4bit"))


def test_nothing_stays_behind():
    "After an estimate the model, autocast and the constants that a model keeps are as before"
    m = tiny_model()
    x = batch("audio", True, 2, 100, 2, m.config.audio_token_id)
    before = m(**x.inputs).loss
    M.estimate_memory(m, x, settings(bf16=True), "cuda")
    assert not torch.is_autocast_enabled("cuda") and not torch.is_autocast_enabled("cpu")
    assert all(type(p) is torch.nn.Parameter and p.grad is None for p in m.parameters())
    assert torch.equal(m(**x.inputs).loss, before)


# Advice

def advised(text): return [line.strip() for line in text.splitlines() if line.startswith("  --")]


def estimator(seconds=10, tokens=100, model=None):
    "From settings to an estimate, made once: rows of one length, of half of it where `seq_length` leaves those out"
    model, known = model or plain("audio", num_hidden_layers=1), {}
    def estimate(s):
        part, key = 2 if s.seq_length else 1, str(s)
        if key not in known:
            x = batch("audio", True, s.batch_size, tokens//part, seconds//part, model.config.audio_token_id)
            known[key] = M.estimate_memory(model, x, s)
        return known[key]
    return estimate


def test_advice_is_what_the_options_do():
    "Each piece of advice, taken: the estimate of that run is what was promised"
    base = dict(bf16=False, gradient_checkpointing=False, lora_rank=32, train_target=everything, batch_size=12)
    s, estimate = settings(**base), estimator(4, 40, plain("audio", vocab_size=8000, num_hidden_layers=1))
    e = estimate(s)
    text = M.memory_advice(s, estimate)
    assert str(e) in text
    lines = advised(text)
    assert [re.match(r"--[\w-]+", line)[0] for line in lines].count("--batch-size") == 2
    assert {re.match(r"--[\w-]+", line)[0] for line in lines} == {"--batch-size", "--gradient-checkpointing", "--seq-length", "--quantization", "--lora-rank", "--train-target"}
    assert any("about half as much time again" in line for line in lines if line.startswith("--gradient-checkpointing"))
    argv = ["--train-dataset", "x", "--output", "y", *(x for k, v in base.items() for x in (f"--{k}", str(v).lower() if isinstance(v, bool) else str(v)))]
    mib = lambda text: float(text.split()[0].replace(",", ""))*{"KiB": 2**-10, "MiB": 1, "GiB": 2**10}[text.split()[1]]
    for line in lines:
        options, saves, then = re.match(r"(--.*?)  +([\d.,]+ .iB) less, +([\d.,]+ .iB) in all", line).groups()
        words = options.split()
        kept = [x for a, b in zip(argv[::2], argv[1::2]) if a.replace("_", "-") not in words for x in (a, b)]
        new = from_args(TrainSettings, kept + words)
        assert new.batch_size*new.gradient_accumulation_steps == 12, "a step has as many rows as before"
        e2 = estimate(new)
        assert e2.total/2**20 == pytest.approx(mib(then), rel=0.02), line
        assert mib(saves) + mib(then) == pytest.approx(e.total/2**20, rel=0.01)
    order = [mib(re.search(r"([\d.,]+ .iB) less", line)[1]) for line in lines]
    assert order == sorted(order, reverse=True)


idle = [(dict(batch_size=1), 1, ["--batch-size"]), (dict(quantization="4bit", train_target="decoder"), 4, ["--quantization", "--train-target"]),
        (dict(tuning="full"), 4, ["--quantization", "--lora-rank"]), (dict(gradient_checkpointing=True), 4, ["--gradient-checkpointing"])]


@pytest.mark.parametrize("kwargs, rows, absent", slow_but(idle, idle[0], idle[2]))
def test_no_idle_advice(kwargs, rows, absent):
    s = settings(**dict(gradient_checkpointing=False, batch_size=rows) | kwargs)
    found = advised(M.memory_advice(s, estimator()))
    assert found and not [a for a in absent if any(line.startswith(a) for line in found)]


def test_batch_of_a_prime_number():
    s = settings(batch_size=7, gradient_accumulation_steps=3)
    found = [a for a in advised(M.memory_advice(s, estimator())) if a.startswith("--batch-size")]
    assert len(found) == 1 and found[0].startswith("--batch-size 1 --gradient-accumulation-steps 21 ")


def test_advice_in_a_notebook(monkeypatch):
    "Is spelt as Python takes it, in straight columns"
    monkeypatch.setattr("mdl_nbdev.base.progress.in_kernel", lambda: True)
    lines = M.memory_advice(settings(gradient_checkpointing=False), estimator()).partition("by itself:\n")[2].splitlines()
    assert any(line.startswith("  batch_size=1 gradient_accumulation_steps=") for line in lines)
    assert len({line.index(" less, ") for line in lines}) == 1 < len(lines)


def test_what_fits_is_said():
    s, estimate = settings(gradient_checkpointing=False), estimator()
    e = estimate(s)
    text = M.memory_advice(s, lambda s: dataclasses.replace(estimate(s), capacity=int(e.total*0.8)))
    assert " on this device" in text and any("which fits" in line for line in advised(text))
    assert "which fits" not in M.memory_advice(s, estimate)
    assert "style=" in e._repr_html_() and repr(e) == str(e)


def test_settings_that_do_not_go_together_are_not_advised():
    def estimate(s):
        if s.quantization: raise InputError("not this one")
        return SimpleNamespace(total=100 - (s.batch_size < 8)*50, tokens=10, capacity=None)
    assert [line.split()[0] for line in advised(M.memory_advice(settings(), estimate))] == ["--batch-size"]*2


# Errors

def raised(f):
    try: f()
    except BaseException as e: return e


def chained():
    try: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    except RuntimeError as e: raise ValueError("a step failed") from e


def in_passing():
    try: raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    finally: raise KeyError("x")


out = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: out of memory"), raised(lambda: torch.empty(2**50)), raised(chained), raised(in_passing),
       RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Error code 12 (Cannot allocate memory)"),
       RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), OSError(12, "Cannot allocate memory")]
other = [None, RuntimeError("The size of tensor a (3) must match"), ValueError("out of memory is no reason to panic"), OSError(28, "No space left on device"), KeyboardInterrupt(),
         RuntimeError("CUDA error: device-side assert triggered")]


@pytest.mark.parametrize("e", out, ids=lambda e: str(e)[:30])
def test_out_of_memory(e): assert is_out_of_memory(e)


@pytest.mark.parametrize("e", other, ids=lambda e: str(e)[:30])
def test_something_else(e): assert not is_out_of_memory(e)


# What does not fit is refused before it is made

def a_machine(root, group="/", **files):
    "A folder that looks like a Linux machine with 8 GB free, 1 GB of swap, and these files of control groups"
    (root/"proc"/"self").mkdir(parents=True)
    (root/"proc"/"meminfo").write_text("MemTotal:  16000000 kB\nMemFree:  1000000 kB\nMemAvailable:  8000000 kB\nSwapFree:  1000000 kB\n")
    (root/"proc"/"self"/"cgroup").write_text(f"4:memory:/x\n0::{group}\n")
    for name, text in files.items():
        path = root/"sys"/"fs"/"cgroup"/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MACHINES = {"a machine": ("/", {}, 9_000_000*1024), "no limit": ("/", {"memory.max": "max\n"}, 9_000_000*1024),
    "a container": ("/", {"memory.max": "4000000000\n", "memory.current": "3000000000\n", "memory.stat": "anon 5\nfile 500000000\nfile_mapped 7\n"}, 1_500_000_000),
    "a job in a group": ("/slurm/job_1", {"slurm/memory.max": "2000000000", "slurm/job_1/memory.max": "max", "memory.max": "3000000000"}, 2_000_000_000),
    "a kernel that remembers files": ("/", {"memory.max": "4000", "memory.current": "3000", "memory.stat": "file 500\nslab 900\nslab_reclaimable 700\n"}, 2200),
    "full": ("/", {"memory.max": "1000", "memory.current": "2000"}, 0)}

@pytest.mark.parametrize("name", MACHINES)
def test_memory_that_is_left(tmp_path, name):
    group, files, expected = MACHINES[name]
    assert available_memory(a_machine(tmp_path, group, **files)) == expected


def test_no_memory_is_known_where_there_is_no_proc(tmp_path): assert available_memory(tmp_path) is None


TRAINED = {"--lora-rank 100000: the adapters, gradients and AdamW's moments need 30.5 GiB, and 8.0 GiB of memory are free on cpu; use a lower rank": dict(lora_rank=100000),
    "--lora-rank 1000000: the adapters need 76.": dict(lora_rank=10**6, dry_run=True), "--tuning full: gradients and AdamW's moments need": dict(tuning="full", free=2**20)}

@pytest.mark.parametrize("message", TRAINED)
def test_what_is_trained_must_fit(monkeypatch, message):
    given = dict(TRAINED[message])
    monkeypatch.setattr("mdl_nbdev.model.load.available_memory", lambda: given.get("free", 2**33))
    s = settings(**{k: v for k, v in given.items() if k != "free"})
    with pytest.raises(InputError, match=re.escape(message)): load_adapted(dataclasses.replace(s, model_name="tiny"))


def test_estimates_of_what_must_fit_change_no_result(monkeypatch):
    "What is trained starts from the same random numbers"
    s = dataclasses.replace(settings(lora_rank=4), model_name="tiny")
    torch.manual_seed(1)
    model = load_adapted(s)
    torch.manual_seed(1)
    expected = adapt(load_model("tiny"), s)
    for (name, p), (_, q) in zip(model.named_parameters(), expected.named_parameters(), strict=True): assert torch.equal(p, q), name


@pytest.mark.parametrize("stored, dtype, quantization, need, remedy", [("bfloat16", torch.float32, None, "28.4 GiB", "use --bf16 true, --q"), ("float32", torch.bfloat16, None, "14.2 GiB", "use --q"), (None, torch.bfloat16, None, "14.2 GiB", "use --q"),
    ("bfloat16", torch.bfloat16, "8bit", "7.1 GiB", "use --q"), ("bfloat16", torch.float32, "4bit", "3.5 GiB", "use --q")])
def test_the_weights_of_a_model_must_fit(tmp_path, monkeypatch, stored, dtype, quantization, need, remedy):
    "The configuration alone decides, as there are no weights in this folder; None: a configuration without a type"
    Qwen2Config(**QWEN2_7B, dtype=stored, architectures=["Qwen2ForCausalLM"]).save_pretrained(tmp_path)
    monkeypatch.setattr("mdl_nbdev.model.load.available_memory", lambda: 2**31)
    monkeypatch.setattr("mdl_nbdev.model.load.quantization_config", lambda *args: None)
    with pytest.raises(InputError, match=f"--model-name .*: its weights need {need}, and 2.0 GiB of memory are free on cpu; {remedy}"):
        load_model(str(tmp_path), dtype=dtype, quantization=quantization)
    with pytest.raises(InputError, match="safetensors|no file"): load_model(str(tmp_path), dtype=dtype, device="cpu") # at the end of a run nothing is refused


@pytest.mark.parametrize("stored, dtype", [("bfloat16", torch.bfloat16), ("float32", torch.float32), ("bfloat16", "auto"), (None, "auto")])
def test_weights_in_the_type_of_their_files_take_no_memory(tmp_path, monkeypatch, stored, dtype):
    "They are memory-mapped, so more of them than the memory holds are not refused"
    Qwen2Config(**QWEN2_7B, dtype=stored, architectures=["Qwen2ForCausalLM"]).save_pretrained(tmp_path)
    monkeypatch.setattr("mdl_nbdev.model.load.available_memory", lambda: 2**31)
    with pytest.raises(InputError, match="safetensors|no file"): load_model(str(tmp_path), dtype=dtype)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux says what is memory-mapped")
def test_weights_are_memory_mapped(tmp_path):
    "What is not of a file grows by the weights in another type alone; this is why the others need not fit"
    def own(): return 1024*int(re.search(r"^Anonymous:\s+(\d+)", Path("/proc/self/smaps_rollup").read_text(), re.M)[1])
    config = Qwen2Config(vocab_size=2**16, hidden_size=512, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path) # 64 MiB
    grown = {}
    for dtype in (torch.bfloat16, torch.float32):
        gc.collect()
        before = own()
        model = load_model(str(tmp_path), dtype=dtype)
        grown[dtype] = (own() - before)/2**20
        assert model.dtype==dtype
    assert grown[torch.bfloat16] < 32 < 96 < grown[torch.float32], grown


def test_a_rank_that_no_matrix_can_have_is_noted():
    assert not Trainable(adapt(tiny_model(), dataclasses.replace(settings(), lora_rank=128))).note
    assert "--lora-rank 129: no adapted matrix can be of a higher rank than 128" in Trainable(adapt(tiny_model(), dataclasses.replace(settings(), lora_rank=129))).note


def keeps(given, capacity, free, need, monkeypatch, weights=100, tokens=10):
    "Whether a run computes activations again, where the estimate would be `need`"
    def estimate(model, batch, s):
        assert s.gradient_checkpointing is False
        if need is None: raise InputError("no estimate")
        return SimpleNamespace(total=need, weights=dict(float32=8, bfloat16=2), capacity=capacity)
    monkeypatch.setattr(preview, "estimate_memory", estimate)
    monkeypatch.setattr(preview, "available_memory", lambda: free)
    monkeypatch.setattr(preview, "longest_batch", lambda *a: dict(labels=torch.zeros(2, tokens//2)))
    model = SimpleNamespace(device=torch.device("cuda" if capacity else "cpu"))
    return preview.recomputes(SimpleNamespace(s=settings(gradient_checkpointing=given), model=model, train_dataset=None, data_collator=None, size=SimpleNamespace(total=weights)))


@pytest.mark.parametrize("given, capacity, free, need, expected", [
    ("auto", 80., 0, 71.9, False), ("auto", 80., 0, 72.1, True), ("auto", 80., 100, None, True), ("auto", None, 100, None, True),
    ("auto", None, 100, 59.9, False), ("auto", None, 100, 60.1, True), ("auto", None, None, 11., True),
    (True, None, 100, 11., True), (False, 80., 0, 100., False)])
def test_activations_are_kept_where_memory_has_room_for_them(given, capacity, free, need, expected, monkeypatch):
    "The longest batch has to fit into nine tenths of a GPU, or what it adds to the weights into half of what a CPU has free; without an estimate they are computed twice"
    assert keeps(given, capacity, free, need, monkeypatch) is expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2") # two ranks need twice as much of one machine, and each has its own GPU
    assert keeps(given, capacity, free, need, monkeypatch) is (expected or given == "auto" and not capacity)


def test_small_models_on_a_cpu_need_no_estimate(monkeypatch):
    "Four bytes for each weight and token are less than half of what is free: 4 x 100 x 10 bytes"
    assert keeps("auto", None, 8001, None, monkeypatch) is False
    assert keeps("auto", None, 7999, None, monkeypatch) is True
    assert keeps("auto", 80., 8001, None, monkeypatch) is True


@pytest.mark.parametrize("kind", ["neox", "gpt2", "qwen2", "qwen3", "mixtral", "qwen2-audio", "audio"])
def test_a_step_stays_far_below_the_bound_that_replaces_its_estimate(kind):
    "Also with all weights trained and no layer computed again"
    s = settings(gradient_checkpointing=False, tuning="full", train_target=everything.split(","))
    model, x = plain(kind), batch(kind, False, rows=2)
    need = M.estimate_memory(model, x, s)
    bound = 4*sum(p.numel() for p in model.parameters())*x["labels"].numel()
    assert need.total - sum(need.weights.values()) < bound/4
