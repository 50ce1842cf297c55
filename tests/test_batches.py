"The order of the data, dummy rows, resuming, packing, and what a batch holds"
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from mdl_nbdev.base.errors import InputError
from mdl_nbdev.model import packed_attention
from mdl_nbdev.model.chat import Example
from mdl_nbdev.model.collate import Collator
from mdl_nbdev.model.load import recompute_activations
from mdl_nbdev.model.midasheng_encoder import n_audio_tokens
from mdl_nbdev.model.midashenglm_family import MiDashengLMFamily, tiny_model, tiny_tokenizer
from mdl_nbdev.model.packed_attention import attend_by_sample
from mdl_nbdev.train.batches import StepSampler, pack_rows, padding_waste
from mdl_nbdev.train.losses import loss_weights, weighted_losses

LENGTHS = st.lists(st.integers(1, 1000), min_size=1, max_size=200)


pytestmark = pytest.mark.usefixtures("one_thread")


def rows_of(items): return sorted(int(r) for i in items for r in (i if isinstance(i, tuple) else [i]))


def steps_seen(epoch, batch_size, world_size, accumulation, **kw):
    "What all ranks together see in each step, without dummy rows, and the batches of each rank"
    ranks = []
    for r in range(world_size):
        s = StepSampler(batch_size=batch_size, world_size=world_size, rank=r, accumulation=accumulation, **kw)
        s.set_epoch(epoch)
        ranks.append(list(s))
        assert len(ranks[-1]) == len(s)
    assert len({len(r) for r in ranks}) == 1, "all ranks have equally many batches"
    assert all(0 < len(b.rows) <= batch_size for r in ranks for b in r)
    each = range(0, len(ranks[0]), accumulation)
    real = [[[] if b.dummy else b.rows for b in r] for r in ranks]
    return [rows_of(i for r in real for b in r[at : at + accumulation] for i in b) for at in each], ranks


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(0, 3), st.sampled_from([None, 1000]), st.booleans(), st.integers(1, 3))
def test_steps_are_the_same_however_the_work_is_shared(lengths, epoch, pack, shuffle, b):
    args = dict(lengths=np.array(lengths), seed=7, pack=pack, shuffle=shuffle)
    alone, _ = steps_seen(epoch, 8 * b, 1, 1, **args)
    assert sorted(sum(alone, [])) == list(range(len(lengths))), "every row once"
    for world, accumulation in [(1, 8), (2, 4), (4, 2), (8, 1)]: assert steps_seen(epoch, b, world, accumulation, **args)[0] == alone
    order = StepSampler(batch_size=2 * b, accumulation=4, **args).order(epoch)
    assert [rows_of(s) for s in order] == alone
    assert all(len(s) == 8 * b for s in order[:-1]), "only the last step is short"


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(0, 3), st.sampled_from([1, 700, 5000]), st.lists(st.integers(0, 1), min_size=200, max_size=200))
def test_a_budget_bounds_every_batch(lengths, epoch, budget, tasks):
    "Each row occurs once an epoch; only a row that is longer by itself exceeds the budget; ranks share the batches of a step"
    lengths = np.array(lengths)
    args = dict(lengths=lengths, seed=7, budget=budget, task_ids=np.array(tasks)[:len(lengths)])
    alone = [b.rows for b in StepSampler(batch_size=1, accumulation=4, **args)]
    assert sorted(sum(alone, [])) == list(range(len(lengths)))
    assert all(len(b)*lengths[b].max() <= budget or len(b) == 1 for b in alone)
    assert {frozenset(b.rows) for b in StepSampler(batch_size=1, **args)} == set(map(frozenset, alone))
    for world, accumulation in [(2, 2), (4, 1)]:
        ranks = []
        for r in range(world):
            s = StepSampler(batch_size=1, world_size=world, rank=r, accumulation=accumulation, **args)
            s.set_epoch(epoch)
            ranks.append(list(s))
            assert len(ranks[-1]) == len(s) == len(ranks[0])
        one = StepSampler(batch_size=1, accumulation=4, **args)
        one.set_epoch(epoch)
        expected = [b.rows for b in one]
        assert sorted(b.rows for r in ranks for b in r if not b.dummy) == sorted(expected)
        assert all(len(b.rows) == 1 for r in ranks for b in r if b.dummy)
        each = [sorted(b.rows for r in ranks for b in r[at:at+accumulation] if not b.dummy) for at in range(0, len(ranks[0]), accumulation)]
        assert each == [sorted(expected[at:at+4]) for at in range(0, len(expected), 4)], "steps are the same"


def test_epochs_with_a_budget_have_the_same_batches_in_another_order():
    sampler = StepSampler(np.random.default_rng(0).integers(1, 900, 3000), 1, 0, budget=9000)
    epochs = [[tuple(b) for b in sampler.batches(e)] for e in (0, 1)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1])
    assert padding_waste(sampler.lengths, sampler.batches(0)) < .05


def test_epochs_differ_and_seeds_differ():
    rows = np.random.default_rng(0).integers(1, 900, 3000)
    for pack in (None, 1000):
        seen = {(seed, e): [rows_of(s) for s in StepSampler(rows, 16, seed, pack=pack).order(e)] for seed in (0, 1) for e in (0, 1)}
        assert len({str(s) for s in seen.values()}) == 4


def test_batches_of_a_rank_are_alike_and_all_ranks_work_on_the_longest_together():
    rows = np.random.default_rng(0).integers(1, 3000, 4096)
    ranks = [list(StepSampler(rows, 4, world_size=4, rank=r, accumulation=2)) for r in range(4)]
    longest = np.array([[rows[b.rows].max() for b in r] for r in ranks])
    assert (longest.max(0) - longest.min(0)).max() < 60, "neighbours in a pool of 2048 rows"


@pytest.mark.parametrize("world, accumulation", [(4, 2), (8, 1), (2, 4)])
@pytest.mark.parametrize("pack", [None, 100])
def test_dummy_rows_only_where_rows_are_missing(world, accumulation, pack):
    n = np.full(9, 100)
    steps, ranks = steps_seen(0, 1, world, accumulation, lengths=n, pack=pack)
    assert [len(s) for s in steps] == [8, 1]
    dummies = [b.rows for r in ranks for b in r if b.dummy]
    assert len(dummies) == world - 1 and len({len(r) for r in ranks}) == 1
    assert rows_of(sum(dummies, [])) == steps[-1] * (world - 1)
    assert all(b.packed == bool(pack) for r in ranks for b in r)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.tuples(*[st.sampled_from([0, 0.3, 1, 1.5, 2, 3.99])] * 2))
def test_sampling(tasks, factors):
    tasks, factor = np.array(tasks), dict(enumerate(factors)) | {2: 1}
    s = StepSampler(np.ones(len(tasks)), 4, 3, task_ids=tasks, sampling={0: factors[0], 1: factors[1]})
    want = {k: round(factor[k] * int((tasks == k).sum())) for k in range(3)}
    if not sum(want.values()):
        with pytest.raises(InputError, match="task-sampling"): s.order(0)
        return
    total = np.zeros(len(tasks), int)
    for epoch in range(4):
        count = np.bincount(np.concatenate(s.order(epoch)), minlength=len(tasks))
        total += count
        for k in range(3):
            mine = count[tasks == k]
            assert mine.sum() == want[k]
            if len(mine): assert mine.max() - mine.min() <= 1
        s.set_epoch(epoch)
        assert len(s) == len(list(s)) == -(-sum(want.values()) // 4)
    for k in range(3):
        if (tasks == k).any(): assert np.ptp(total[tasks == k]) <= 1, "over the epochs too, no row is favoured"


def former_order(lengths, size, seed, epoch, pool=64):
    "Batches as they were made before steps were: sorted in pools of 64 batches of one device"
    rng = np.random.default_rng([seed, epoch])
    rows, batches = rng.permutation(len(lengths)), []
    for i in range(0, len(rows), size * pool):
        p = rows[i : i + size * pool]
        batches += np.split(p[np.argsort(lengths[p], kind="stable")], range(size, len(p), size))
    return batches


@pytest.mark.parametrize("size, world, accumulation", [(8, 1, 1), (16, 1, 4), (4, 8, 2), (32, 1, 1), (2, 64, 4)])
@pytest.mark.parametrize("shape", ["even", "heavy tail"])
def test_batches_waste_as_little_as_before(size, world, accumulation, shape):
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 3000, 20_000) if shape == "even" else np.minimum(rng.lognormal(5, 1, 20_000), 8000).astype(int) + 1
    now = padding_waste(lengths, StepSampler(lengths, size, world_size=world, accumulation=accumulation).batches(0))
    assert now < padding_waste(lengths, former_order(lengths, size, 0, 0)) + 0.003


def test_from_the_longest_to_the_shortest():
    order = StepSampler(np.array([3, 9, 4, 8]), 2, shuffle=False).order(0)
    assert [sorted(b.tolist()) for b in order] == [[1, 3], [0, 2]]


class Counting(torch.utils.data.Dataset):
    "Remembers, over all processes, which rows were read"
    def __init__(self, n): self.read = torch.zeros(n, dtype=torch.uint8).share_memory_()
    def __len__(self): return len(self.read)
    def __getitems__(self, batch):
        self.read[rows_of(batch.rows)] = 1
        return batch.rows


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("pack", [None, 1024])
def test_resuming_reads_nothing_before(workers, pack):
    "A million rows, from row 500,000 on"
    n = 1_000_000
    lengths, ds = np.random.default_rng(0).integers(20, 200, n), Counting(n)
    sampler = StepSampler(lengths, 8, accumulation=2, pack=pack)
    order = sampler.order(1)
    sizes = np.cumsum([len(rows_of(s)) for s in order])
    steps = int(np.searchsorted(sizes, 500_000))
    fresh = StepSampler(lengths, 8, accumulation=2, pack=pack)
    began = time.perf_counter()
    fresh.set_epoch(1)
    whole = DataLoader(ds, batch_sampler=fresh, collate_fn=list, num_workers=workers, multiprocessing_context="fork" if workers else None)
    loader = iter(skip_first_batches(whole, 2 * steps + 1))  # in the middle of a step, as the trainer does it
    got = [next(loader) for _ in range(21)]
    assert time.perf_counter() - began < 20
    del loader
    want = [b for s in order[steps : steps + 11] for b in (s[:8], s[8:])][1:]
    assert [rows_of(b) for b in got] == [rows_of(b) for b in want[:21]]
    before = [r for s in order[:steps] for r in rows_of(s)]
    assert len(before) >= 499_000 and not ds.read[before].any()
    assert int(ds.read.sum()) < 30 * 8 * (20 if pack else 1)


def test_a_million_rows_are_ordered_fast():
    lengths = np.random.default_rng(0).integers(20, 2000, 1_000_000)
    began = time.perf_counter()
    StepSampler(lengths, 8, accumulation=4).order(5)
    assert time.perf_counter() - began < 5


@settings(deadline=None)
@given(LENGTHS, st.integers(1000, 3000))
def test_packs(lengths, limit):
    packs = pack_rows(np.array(lengths), limit)
    assert rows_of(map(tuple, packs)) == list(range(len(lengths)))
    full = sorted(sum(lengths[i] for i in p) for p in packs)
    assert full[-1] <= limit
    if len(full) > 1: assert full[0] + full[1] > limit, "no two packs fit into one"


@settings(deadline=None, max_examples=50)
@given(LENGTHS, st.integers(0, 3))
def test_packs_of_the_sampler(lengths, epoch):
    lengths = np.array(lengths)
    s = StepSampler(lengths, 2, seed=1, accumulation=2, pack=1000)
    order = s.order(epoch)
    assert rows_of(p for step in order for p in step) == list(range(len(lengths)))
    assert max(lengths[list(p)].sum() for step in order for p in step) <= 1000
    assert order == StepSampler(lengths, 1, seed=1, world_size=4, rank=3, pack=1000).order(epoch)
    assert sorted(p for step in order for p in step) == sorted(p for step in s.order(epoch + 1) for p in step)
    assert len(s) == len(list(s)) == len(s.batches(epoch))


def test_a_row_longer_than_a_pack_is_refused():
    with pytest.raises(InputError, match="1,200 tokens.*--seq-length"): StepSampler(np.array([3, 1200]), 2, pack=1024)


def test_most_of_a_pack_is_filled():
    lengths = np.random.default_rng(0).integers(20, 500, 20_000)
    assert padding_waste(lengths, StepSampler(lengths, 8, pack=1024).batches(0)) < 0.02


# A batch


def example(n, clips, **kw): return Example(np.arange(n, dtype=np.int32), np.full(n, -100, np.int32), [np.full(c, 7, np.int16) for c in clips], **kw)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side):
    b = Collator(99, MiDashengLMFamily(), side)([example(3, [10], task_id=1), example(5, [4, 20]), example(2, [], task_id=2)])
    ids = [[0, 1, 2, 99, 99], [0, 1, 2, 3, 4], [0, 1, 99, 99, 99]]
    if side == "left": ids = [[99, 99, 0, 1, 2], ids[1], [99, 99, 99, 0, 1]]
    assert b["input_ids"].tolist() == ids and ("attention_mask" in b) == (side == "left")
    if side == "left": assert b["attention_mask"].tolist() == [[int(x != 99) for x in r] for r in ids]
    assert b["sample"].tolist() == [[i if x != 99 else -1 for x in r] for i, r in enumerate(ids)] and b["task"].tolist() == [1, 0, 2]
    assert b["n_samples"].tolist() == [10, 4, 20] and b["audio_length"].tolist() == [3200]*3 and b["input_values"].shape == (3, 3200) and int(b["input_values"].sum()) == 7 * 34
    assert "position_ids" not in b and "input_values" not in Collator(99, MiDashengLMFamily())([example(2, [])])


def test_a_packed_batch():
    one, two, three = example(3, [10], task_id=1), example(1, []), example(2, [5])
    for e in (one, two, three): e.labels[:] = e.input_ids + 10
    b = Collator(99, MiDashengLMFamily())([[one, two], [three]])
    assert {k: v.tolist() for k, v in b.items() if k not in ("input_values", "audio_plan")} == dict(
        input_ids=[[0, 1, 2, 0], [0, 1, 99, 99]], labels=[[-100, 11, 12, -100], [-100, 11, -100, -100]], sample=[[0, 0, 0, 1], [2, 2, -1, -1]],
        position_ids=[[0, 1, 2, 0], [0, 1, 0, 1]], task=[1, 0, 0], audio_length=[3200]*2, n_samples=[10, 5], label_at=[0, 1, 4])


# Packed samples against samples in rows of their own


def text_example(rng, n, task, vocab=89):
    ids = rng.integers(0, vocab, n).astype(np.int32)
    return Example(ids, np.where(np.arange(n) >= n // 2, ids, -100).astype(np.int32), [], task_id=task)


def audio_example(rng, seconds, n, task, tok):
    audio, bos, eos = (tok.convert_tokens_to_ids(t) for t in ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"))
    clips = [(rng.standard_normal(int(s * 16000)) * 3000).astype(np.int16) for s in seconds]
    spans = sum([[bos, *[audio] * n_audio_tokens(len(c)), eos] for c in clips], [])
    e = text_example(rng, n, task)
    return Example(np.array([*spans, *e.input_ids], np.int32), np.array([-100] * len(spans) + e.labels.tolist(), np.int32), clips, task_id=task)


def losses_and_gradients(model, batch, mode):
    weights, = loss_weights([batch], mode, [1.0, 3.0], 2)[0]
    sums = weighted_losses(model, batch.inputs, weights, batch["label_at"])
    model.zero_grad()
    sums[0].backward()
    return sums.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_packing(model, examples, packs, pad, bounds):
    if bounds: assert attend_by_sample(model) and model.config.get_text_config()._attn_implementation == "by_sample"
    collate, at = Collator(pad, MiDashengLMFamily(), bounds=bounds), [i for p in packs for i in p]
    for mode in ("case1", "case2", "case3", "case4"):
        packed, got = losses_and_gradients(model, collate([[examples[i] for i in p] for p in packs]), mode)
        rows, want = losses_and_gradients(model, collate([examples[i] for i in at]), mode)
        assert torch.allclose(packed, rows, rtol=0, atol=1e-6)
        assert got.keys() == want.keys() and len(got) > 10
        for n in want: assert torch.allclose(got[n], want[n], rtol=0, atol=1e-5), n


SMALL = dict(vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128)
TEXT = dict(gpt_neox=lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)), qwen2=lambda: Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, **SMALL)),
            qwen3=lambda: Qwen3ForCausalLM(Qwen3Config(num_key_value_heads=2, head_dim=16, **SMALL)))


@pytest.mark.parametrize("bounds", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", TEXT)
def test_packed_text(name, checkpointing, bounds):
    torch.manual_seed(0)
    model = TEXT[name]().train()
    assert model.config._attn_implementation == "sdpa"
    if checkpointing: assert recompute_activations(model)
    rng = np.random.default_rng(0)
    examples = [text_example(rng, n, i % 2) for i, n in enumerate([12, 30, 2, 7, 25, 1, 18, 40])]
    check_packing(model, examples, [[7, 3, 2], [1, 0, 5], [4, 6]], 96, bounds)


@pytest.mark.parametrize("bounds", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_audio(checkpointing, bounds):
    model, tok = tiny_model().train(), tiny_tokenizer()
    if checkpointing: assert recompute_activations(model)
    rng = np.random.default_rng(0)
    clips = [[1.0], [0.3, 2.2], [], [4.0], [0.7], [1.5]]
    examples = [audio_example(rng, s, n, i % 2, tok) for i, (s, n) in enumerate(zip(clips, [12, 30, 9, 7, 25, 3]))]
    check_packing(model, examples, [[3, 0, 2], [1, 5, 4]], tok.pad_token_id, bounds)


@pytest.mark.parametrize("bounds", [False, True])
def test_a_change_in_a_sample_changes_no_other(bounds):
    torch.manual_seed(0)
    model, rng = TEXT["gpt_neox"](), np.random.default_rng(0)
    assert attend_by_sample(model, bounds) == bounds
    examples = [text_example(rng, n, 0) for n in (20, 9, 14)]
    logits = lambda: model(**{k: v for k, v in b.inputs.items() if k != "labels"}, use_cache=False).logits.detach()
    b = Collator(96, MiDashengLMFamily(), bounds=bounds)([examples])
    before = logits()
    b["input_ids"][0, 22] = (b["input_ids"][0, 22] + 1) % 89
    same = (logits() == before).all(-1)[0]
    assert same[:22].all() and not same[22:29].any() and same[29:].all()


def test_only_what_says_no_more_than_the_bounds_is_left_out_of_a_mask(monkeypatch):
    "Layers with a window keep theirs; padded rows and rows in a cache compute as under sdpa"
    kinds = ["sliding_attention", "full_attention"]
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, use_sliding_window=True, sliding_window=8, layer_types=kinds, **SMALL)).eval()
    rng = np.random.default_rng(0)
    examples = [text_example(rng, n, 0) for n in (20, 9, 14)]
    padded = Collator(96, MiDashengLMFamily(), side="left")(examples)
    def computed(packed):
        with torch.no_grad():
            rows = model(**{k: v for k, v in packed.inputs.items() if k != "labels"}, use_cache=False).logits
            return rows, model.generate(padded["input_ids"], attention_mask=padded["attention_mask"], max_new_tokens=6, do_sample=False)
    want = computed(Collator(96, MiDashengLMFamily())([examples]))
    assert attend_by_sample(model)
    seen, within = [], packed_attention.within_samples
    monkeypatch.setattr(packed_attention, "within_samples", lambda *a: seen.append(a) or within(*a))
    got = computed(Collator(96, MiDashengLMFamily(), bounds=True)([examples]))
    assert len(seen) == kinds.count("full_attention")
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want))


@pytest.mark.parametrize("size, of_value", [(64, 64), (20, 20), (24, 16), (16, 24)])
def test_the_kernel_of_gpus_takes_what_it_is_given(size, of_value):
    "On PyTorch's device without data, which runs its checks of arguments and shapes, forward and backward"
    tensors = [torch.empty(50, 4, n, dtype=torch.bfloat16, device="meta", requires_grad=True) for n in (size, size, of_value)]
    out = packed_attention.within_samples(*tensors, torch.empty(9, dtype=torch.int32, device="meta"), 12)
    assert out.shape == (50, 4, of_value)
    out.sum().backward()
    assert all(t.grad.shape == t.shape for t in tensors)


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    script = Path(__file__).parent.parent / "benchmarks" / "packing.py"
    subprocess.run([sys.executable, script, "--small", "--device", "cpu", "--out", tmp_path / "r"], check=True)
    r = json.loads((tmp_path / "r.json").read_text())
    assert all(row["tokens/s"] > 0 for kind in ("text", "audio") for row in r[kind]["rows"]) and "| packed, 4 x 256 |" in (tmp_path / "r.md").read_text()
