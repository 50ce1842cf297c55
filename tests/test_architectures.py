"Architectures that transformers builds in small: each is trained, merged, asked and packed, or refused in one message"
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.settings import InferSettings, MergeSettings, TrainSettings
from mdl_nbdev.data.conversations import Conversation, text_message
from mdl_nbdev.infer.run import infer
from mdl_nbdev.model.byte_tokenizer import byte_tokenizer
from mdl_nbdev.model.collate import Collator
from mdl_nbdev.model.families import TEXT, load_chat
from mdl_nbdev.model.load import load_model
from mdl_nbdev.model.probe import check_packing
from mdl_nbdev.model.save import load_adapter, merge_adapter
from mdl_nbdev.train.losses import logits_at
from mdl_nbdev.train.run import train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
             max_position_embeddings=256, sliding_window=64)
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_routed_experts=4, shared_expert_intermediate_size=32)
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"])
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, num_key_value_heads=4)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=16, mamba_expand=2, mamba_chunk_size=16, attn_layer_indices=[1])
KINDS = {kind: {} for kind in """llama mistral qwen2 qwen3 gemma gemma2 gemma3_text cohere cohere2 granite olmo olmo2 olmo3 stablelm starcoder2 phi phi3 gpt2
    gpt_neox gpt_bigcode openai-gpt bloom mpt biogpt persimmon nemotron glm glm4 helium smollm3 arcee seed_oss
    ernie4_5 exaone4 hunyuan_v1_dense diffllama bitnet apertus ministral nanochat mamba falcon_mamba rwkv lfm2""".split()}
KINDS |= {kind: EXPERTS for kind in "mixtral qwen2_moe qwen3_moe olmoe phimoe granitemoe gpt_oss jetmoe glm4_moe".split()}
KINDS |= dict(deepseek_v2=EXPERTS | LATENT, deepseek_v3=EXPERTS | LATENT, qwen3_next=EXPERTS | LINEAR, qwen3_5_text=LINEAR, bamba=MAMBA)
KINDS |= dict(gptj=dict(rotary_dim=4), codegen=dict(rotary_dim=4), recurrent_gemma=dict(block_types=["recurrent", "attention"]),
              jamba=EXPERTS | dict(attn_layer_period=2, attn_layer_offset=1))
KINDS |= dict(gpt_neo=dict(attention_types=[[["global", "local"], 1]]), ctrl=dict(dff=64), opt=dict(ffn_dim=64, word_embed_proj_dim=32), xglm=dict(ffn_dim=64),
              falcon=dict(head_dim=None), mamba2=dict(num_heads=8, n_groups=1, state_size=16, expand=2, chunk_size=16))
tok = byte_tokenizer(eos_token="<|im_end|>", pad_token="<|pad|>", extra_special_tokens=["<|im_start|>"])
tok.chat_template = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def build(kind, folder):
    torch.manual_seed(0)
    shape = {name: value for name, value in (SHAPE | KINDS[kind]).items() if value is not None}
    config = AutoConfig.for_model(kind, **shape, vocab_size=len(tok), bos_token_id=None, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tok.save_pretrained(folder)


@torch.no_grad()
def logits(model, examples, bounds=False):
    batch = Collator(tok.pad_token_id, TEXT, bounds=bounds)(examples)
    return logits_at(model.eval(), {k: v for k, v in batch.inputs.items() if k != "labels"}, torch.arange(batch["labels"].numel()))


def examples(folder):
    chat = load_chat(str(folder))
    pairs = ("what is it", "a long answer"), ("who", "me")
    return chat, [chat.example(Conversation([text_message("user", p), text_message("assistant", a)], "x", 1)) for p, a in pairs]


def check_full(folder, settings):
    "Trained in full, it answers as it was taught, and ends its answers"
    done = train(TrainSettings(**settings, output=folder/"full", tuning="full", train_target=["decoder", "embed_tokens", "lm_head"], lr=1e-2, max_steps=30))
    report = infer(InferSettings(input=settings["train_dataset"][0], output=folder/"out.jsonl", model_name=str(done.final), max_new_tokens=8, num_workers=1))
    answers = [json.loads(line)["prediction"] for line in open(folder/"out.jsonl")]
    assert not report.truncated and not report.rejected, answers
    assert json.loads((done.final/"generation_config.json").read_text())["eos_token_id"]


def check_lora(folder, settings):
    "The adapter and the merged model compute the same, and something else than the base model"
    done = train(TrainSettings(**settings, output=folder/"lora", merge_lora=False, lr=1e-2, max_steps=2, lora_rank=4))
    merge_adapter(MergeSettings(adapter=done.final, output=folder/"merged"))
    _, rows = examples(folder/"base")
    base = logits(load_model(settings["model_name"]), rows)
    adapted = logits(load_adapter(load_model(settings["model_name"]), done.final), rows)
    merged = logits(load_model(str(folder/"merged")), rows)
    assert (adapted - merged).abs().max() < 1e-4*adapted.abs().max()
    assert (adapted - base).abs().max() > 1e-3*adapted.std()


def check_packed(folder, settings):
    "Packed rows compute what they compute alone, or packing is refused"
    model, (chat, rows) = load_model(settings["model_name"]), examples(folder/"base")
    try: bounds = check_packing(model, chat)
    except InputError: return
    packed, alone = logits(model, [rows], bounds), logits(model, rows[1:])
    assert (packed[-len(alone):] - alone).abs().max() < 1e-3*alone.std()


@pytest.mark.parametrize("kind", KINDS)
def test_architecture(kind, tmp_path):
    build(kind, tmp_path/"base")
    rows = tmp_path/"rows.jsonl"
    rows.write_text("".join(json.dumps(dict(user_prompt=p, prediction=a)) + "\n" for p, a in (("A?", "aa"), ("B?", "b"), ("C?", "c c"), ("D?", "d"))))
    settings = dict(model_name=str(tmp_path/"base"), train_dataset=[rows], num_workers=1, batch_size=4, save_steps=1000)
    for check in (check_full, check_lora, check_packed): check(tmp_path, settings)
