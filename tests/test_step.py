"What a training step asks of the device: nothing that the host has to wait for"
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mdl_nbdev.base.settings import TuneSettings
from mdl_nbdev.model.adapters import adapt
from mdl_nbdev.model.chat import Example
from mdl_nbdev.model.collate import Collator
from mdl_nbdev.model.families import load_chat
from mdl_nbdev.model.midasheng_encoder import n_audio_tokens
from mdl_nbdev.model.midashenglm_family import tiny_model
from mdl_nbdev.model.probe import check_packing
from mdl_nbdev.model.text_family import tiny_text_model
from mdl_nbdev.train.losses import loss_weights, weighted_losses

WAITING = {"nonzero", "_local_scalar_dense", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero", "repeat_interleave"}


class Operators(TorchDispatchMode):
    "Counts operators by name, and those whose result, or its shape, the host has to know"
    def __init__(self):
        super().__init__()
        self.all, self.waiting = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        self.all[name] += 1
        by_mask = name.startswith("index") and any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in (args[1] if isinstance(args[1], (list, tuple)) else []))
        if name in WAITING or by_mask or "device" in (kwargs or {}) and name == "_to_copy": self.waiting[name] += 1
        return func(*args, **(kwargs or {}))


def rows(chat, seconds):
    rng, audio = np.random.default_rng(0), chat.tok.convert_tokens_to_ids("<|AUDIO|>")
    for each in seconds:
        clips = [rng.integers(-9000, 9000, int(s*16000)).astype(np.int16) for s in each]
        heard = [audio for c in clips for _ in range(n_audio_tokens(len(c)))]
        ids = np.array([*rng.integers(5, 90, 1 if clips else rng.integers(1, 30)), *heard, 6, 7, 8, 9], np.int32)
        yield Example(ids, np.where(np.arange(len(ids)) >= len(ids) - 3, ids, -100).astype(np.int32), clips)


CASES = {"tiny": [[.1, 2.], [11.], [3.]], "tiny-text": [[], [], []]}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_step_waits_for_nothing(name, recomputed, packed):
    "From the batch that the workers made to the gradients"
    torch.manual_seed(0)
    chat, model = load_chat(name), tiny_model() if name == "tiny" else tiny_text_model()
    model = adapt(model, TuneSettings(lora_rank=4)).train()
    if recomputed: model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    examples = list(rows(chat, CASES[name]))
    batch = Collator(chat.pad_id, chat.family, bounds=packed and check_packing(model, chat))([examples] if packed else examples)
    assert ("cu_seq_lens_q" in batch) == packed
    (weights,), _ = loss_weights([batch], "tokens", [1.], 1)
    model(**batch.inputs) # makes mel filters, once
    with Operators() as seen:
        weighted_losses(model, batch.inputs, weights, batch["label_at"])[0].backward()
    # for text models without a mask, transformers looks once for packed samples
    assert seen.waiting == ({} if name == "tiny" else {"_local_scalar_dense": 1})
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad)
    print(f"{name}: {sum(seen.all.values())} operators")


def test_what_waits_is_seen():
    "The counter finds each of the ways that this test is about"
    x = torch.arange(4.)
    with Operators() as seen:
        x[x > 1], x.sum().item(), (x > 2).nonzero(), x.masked_select(x > 0), torch.zeros(4).index_put_((x > 1,), x[0]), x.unique()
    assert set(seen.waiting) >= {"index", "_local_scalar_dense", "nonzero", "masked_select", "index_put_", "_unique2"}


@pytest.mark.parametrize("name", CASES)
def test_rows_without_a_mask_are_as_with_one(name):
    "Padding on the right changes nothing for the tokens before it"
    chat, model = load_chat(name), tiny_model() if name == "tiny" else tiny_text_model()
    batch = Collator(chat.pad_id, chat.family)(list(rows(chat, CASES[name]))[::-1] + list(rows(chat, [[]])))
    assert "attention_mask" not in batch and int((batch["sample"] < 0).sum()) > 0
    inputs = {k: v for k, v in batch.inputs.items() if k != "labels"}
    mask = (batch["sample"] >= 0).long()
    with torch.no_grad(): without, with_mask = (model(**inputs, logits_to_keep=0, **more).logits for more in ({}, dict(attention_mask=mask)))
    torch.testing.assert_close(without[mask.bool()], with_mask[mask.bool()], atol=1e-6*float(with_mask.abs().max()), rtol=0)

