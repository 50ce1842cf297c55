"The memory that a step is said to need, beside what PyTorch keeps and allocates on the CPU; the advice; errors that mean out of memory"
import dataclasses
import re

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from mdl_nbdev import memory as M
from mdl_nbdev.base.command_line import from_args
from mdl_nbdev.base.settings import TrainSettings
from mdl_nbdev.model.adapters import adapt
from mdl_nbdev.model.load import load_model
from mdl_nbdev.model.midasheng_encoder import n_audio_tokens
from mdl_nbdev.model.midashenglm import MiDashengLMConfig, MiDashengLMModel
from mdl_nbdev.model.midashenglm_family import tiny_model

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
    if kind == "llama": return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=6))
    text = dict(model_type="qwen2", num_key_value_heads=2, tie_word_embeddings=False, **shape)
    return MiDashengLMModel(MiDashengLMConfig(audio_encoder_config=dict(embed_dim=96, depth=4, num_heads=4), text_config=text, audio_token_id=5))


def ready(kind, s):
    "A model as a run trains it"
    m = plain(kind)
    if s.bf16 and s.tuning == "lora": m = m.to(torch.bfloat16)
    m = adapt(m, s).train()
    if s.gradient_checkpointing: M._base(m).activation_checkpointing_enable({"use_reentrant": False})
    return m


def batch(kind, pad):
    ids = torch.randint(6, 500, (rows, tokens))
    labels, extra = ids.clone(), {}
    if kind == "audio":
        n = n_audio_tokens(seconds*16000)
        ids[:, 1:1 + n], labels[:, :1 + n] = 5, -100
        extra = dict(input_values=torch.randint(-3000, 3000, (rows, seconds*16000), dtype=torch.int16), audio_length=torch.full((rows,), seconds*16000))
    mask = torch.ones_like(ids)
    if pad: mask[0, -5:] = 0
    return dict(input_ids=ids, labels=labels, attention_mask=mask, use_cache=False, **extra)


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


def measure(kind, pad=True, **kwargs):
    s = settings(**kwargs)
    m, x = ready(kind, s), batch(kind, pad)
    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=s.bf16): return m(**x).loss
    forward().backward() # gradients are there, as from the second batch of a step on
    assert sum(p.grad.nbytes for p in m.parameters() if p.grad is not None) == M.estimate_memory(m, rows, tokens, 0, s).gradients
    e = M.estimate_memory(m, rows, tokens, seconds*(kind == "audio"), s, labels=int((x["labels"] != -100).sum())//rows)
    return dataclasses.replace(e, masked=pad), kept(m, forward), peak(lambda: forward().backward())


lora = [dict(), dict(bf16=True)]
full = [dict(tuning="full", train_target=everything), dict(tuning="full", train_target=everything, bf16=True)]
for_text = [dict(k, train_target="decoder,embed_tokens,lm_head") if "tuning" in k else k for k in lora + full]
cases = [*[(kind, k) for kind in ("qwen2", "qwen3", "neox", "llama", "gpt2") for k in for_text], *[("audio", k) for k in lora + full],
         *[("audio", dict(k, train_target=t)) for k in lora for t in ("decoder", "projector", "encoder")],
         *[("qwen2", dict(k, **v)) for k in lora for v in (dict(use_dora=True), dict(lora_dropout=0.1), dict(pad=False), dict(train_target="decoder,embed_tokens,lm_head"))],
         ("audio", dict(tuning="full", train_target="decoder")), ("audio", dict(tuning="full", train_target="decoder", bf16=True)),
         ("audio", dict(lora_target_modules=r".*(attn\.(qkv|proj)|net\.[02]|mlp\.(gate|up|down)_proj)"))]
name = lambda c: f"{c[0]}-" + "-".join(f"{k}={v}" for k, v in c[1].items()) if isinstance(c, tuple) else str(c)


slowly = [pytest.param(c, marks=pytest.mark.slow) if c[0] in ("qwen3", "llama", "gpt2") else c for c in cases]


@pytest.mark.parametrize("case", slowly, ids=name)
def test_all_kept(case):
    e, found, most = measure(case[0], gradient_checkpointing=False, **case[1])
    told = e.activations + e.logit/3*e.rows*e.labels # a third of what the logits take is kept
    assert 0.9 < told/found < 1.2, (told, found)
    assert 0.9 < (e.activations + e.working)/most < 1.2, (e.activations + e.working, most)


@pytest.mark.parametrize("case", [(kind, k) for kind in ("qwen2", "neox") for k in for_text] + [("audio", k) for k in lora + full], ids=name)
def test_computed_anew(case):
    e, _, most = measure(case[0], gradient_checkpointing=True, **case[1])
    assert 0.9 < (e.activations + e.working)/most < 1.35, (e.activations + e.working, most)


@pytest.mark.parametrize("kind", ["qwen2", "audio"])
@pytest.mark.parametrize("k", [*lora, *full], ids=str)
def test_what_lasts(kind, k):
    "Weights, gradients and moments, to the byte"
    s = settings(**k | ({} if kind == "audio" or "tuning" not in k else dict(train_target="decoder,embed_tokens,lm_head")))
    m, x = ready(kind, s), batch(kind, True)
    opt = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad])
    with torch.autocast("cpu", torch.bfloat16, enabled=s.bf16): m(**x).loss.backward()
    opt.step()
    e = M.estimate_memory(m, rows, tokens, seconds, s)
    tensors = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*m.parameters(), *m.buffers()]}
    assert sum(e.weights.values()) == sum(tensors.values())
    moments = [t for state in opt.state.values() for k, t in state.items() if k != "step"]
    assert e.optimizer == sum(t.nbytes for t in moments)


def test_by_hand():
    "A layer of the published decoder, LoRA on all of it, bfloat16: 3584 features, 18944 inside, 28 heads of 128, 4 of them for keys and values"
    s = settings(bf16=True, lora_rank=32)
    with torch.device("meta"): m = adapt(MiDashengLMModel(MiDashengLMConfig()).to(torch.bfloat16), s)
    encoder, decoder = M.estimate_memory(m, 1, 150, 10, s).stacks
    norms, heads = 2*3584*4, 28*4
    attention = (3584 + 512 + 512 + 3584)*2
    mlp = 3*18944*2
    adapters = (3*3584 + 3584 + 2*3584 + 18944 + 7*32)*2
    assert decoder.inside == norms + heads + attention + mlp + adapters
    assert (decoder.layers, decoder.input, decoder.masked, decoder.mask) == (28, 3584*2, 2*(3584 - 512)*2, 2)
    norms, heads, attention, mlp = 2*1280*4, 16*4, 4*1280*2, 5120*2
    adapters = (1280 + 1280 + 1280 + 5120 + 4*32)*2
    assert encoder.inside == norms + heads + attention + mlp + adapters
    assert (encoder.layers, encoder.input) == (32, 1280*2)


def test_packed_weights():
    "What is told of a model before it is quantised is what it then is"
    for kind in ("4bit", "8bit"):
        s = settings(quantization=kind, train_target="decoder")
        before = M.estimate_memory(adapt(tiny_model(), s), 1, 50, 1, s)
        after = M.estimate_memory(adapt(load_model("tiny", quantization=kind, dtype=torch.float32, device="cpu"), s), 1, 50, 1, s)
        assert sum(before.weights.values()) == pytest.approx(sum(after.weights.values()), rel=0.05)
        assert set(before.weights) == set(after.weights) and f"{kind[0]} bits" in before.weights


def test_all_grows_with_the_batch():
    s = settings(bf16=True)
    with torch.device("meta"): m = adapt(MiDashengLMModel(MiDashengLMConfig()).to(torch.bfloat16), s)
    e = lambda *a, **k: M.estimate_memory(m, *a, settings(bf16=True, **k)).total
    assert e(1, 150, 10) < e(2, 150, 10) < e(2, 300, 10) < e(2, 300, 20)
    assert e(8, 150, 10) < e(8, 150, 10, gradient_checkpointing=False)
    assert e(8, 150, 10, quantization="4bit") < e(8, 150, 10, quantization="8bit") < e(8, 150, 10)
    long = dict(gradient_checkpointing=True)
    assert e(1, 3100, 600, **long) > e(1, 3100, 0, **long), "ten minutes of audio"


def test_packs_of_audio():
    "A pack is full of whatever the rows hold: up to a fifth of a second of audio a token"
    m = tiny_model()
    e = M.estimate_memory(adapt(m, s := settings(packing=True, seq_length=1000)), 2, 1000, 3, s)
    assert e.seconds == 200 and e.masked


# Advice

def advised(text): return [line.strip() for line in text.splitlines() if line.startswith("  --")]


def test_advice_is_what_the_options_do():
    "Each piece of advice, taken: the estimate of that run is what was promised"
    base = dict(bf16=False, gradient_checkpointing=False, lora_rank=32, train_target=everything, batch_size=12)
    s = settings(**base)
    model = lambda s: adapt(plain("audio", vocab_size=8000), s)
    e = M.estimate_memory(model(s), 12, 40, 4, s)
    text = M.memory_advice(s, e)
    assert str(e) in text
    lines = advised(text)
    assert [re.match(r"--[\w-]+", line)[0] for line in lines].count("--batch-size") == 2
    assert {re.match(r"--[\w-]+", line)[0] for line in lines} == {"--batch-size", "--gradient-checkpointing", "--seq-length", "--quantization", "--lora-rank", "--train-target"}
    argv = ["--train-dataset", "x", "--output", "y", *(x for k, v in base.items() for x in (f"--{k}", str(v).lower() if isinstance(v, bool) else str(v)))]
    mib = lambda text: float(text.replace(",", ""))
    for line in lines:
        options, saves, then = re.match(r"(--.*?)  +([\d.,]+) MiB less, +([\d.,]+) MiB in all", line).groups()
        words = options.split()
        kept = [x for a, b in zip(argv[::2], argv[1::2]) if a.replace("_", "-") not in words for x in (a, b)]
        new = from_args(TrainSettings, kept + words)
        assert new.batch_size*new.gradient_accumulation_steps == 12, "a step has as many rows as before"
        short = new.seq_length is not None
        e2 = M.estimate_memory(model(new), new.batch_size, new.seq_length or 40, 2 if short else 4, new, labels=e.labels//2 if short else None)
        assert e2.total/2**20 == pytest.approx(mib(then), rel=0.02), line
        assert mib(saves) + mib(then) == pytest.approx(e.total/2**20, rel=0.01)
    order = [mib(re.search(r"([\d.,]+) MiB less", line)[1]) for line in lines]
    assert order == sorted(order, reverse=True)


@pytest.mark.parametrize("kwargs, rows, absent", [
    (dict(batch_size=1), 1, ["--batch-size"]), (dict(quantization="4bit", train_target="decoder"), 4, ["--quantization", "--train-target"]),
    (dict(tuning="full"), 4, ["--quantization", "--lora-rank"]), (dict(gradient_checkpointing=True), 4, ["--gradient-checkpointing"])])
def test_no_idle_advice(kwargs, rows, absent):
    s = settings(**dict(gradient_checkpointing=False) | kwargs)
    found = advised(M.memory_advice(s, M.estimate_memory(adapt(tiny_model(), s), rows, 100, 10, s)))
    assert found and not [a for a in absent if any(line.startswith(a) for line in found)]


def test_batch_of_a_prime_number():
    s = settings(batch_size=7, gradient_accumulation_steps=3)
    found = [a for a in advised(M.memory_advice(s, M.estimate_memory(adapt(tiny_model(), s), 7, 100, 10, s))) if a.startswith("--batch-size")]
    assert len(found) == 1 and found[0].startswith("--batch-size 1 --gradient-accumulation-steps 21 ")


def test_what_fits_is_said():
    s = settings(gradient_checkpointing=False)
    e = M.estimate_memory(adapt(tiny_model(), s), 8, 200, 30, s)
    text = M.memory_advice(s, dataclasses.replace(e, capacity=int(e.total*0.8)))
    assert " on this device" in text and any("which fits" in line for line in advised(text))
    assert "which fits" not in M.memory_advice(s, e)
    assert "style=" in e._repr_html_() and repr(e) == str(e)


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
def test_out_of_memory(e): assert M.is_out_of_memory(e)


@pytest.mark.parametrize("e", other, ids=lambda e: str(e)[:30])
def test_something_else(e): assert not M.is_out_of_memory(e)
