"The loss modes against loops that are written out from their formulas, whatever a step is cut into; coba against a slow reference"
import json
import math
import random
from contextlib import nullcontext
from copy import deepcopy
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import training_runs
from peft import LoraConfig, get_peft_model
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.settings import LOSS_MODES, TuneSettings
from mdl_nbdev.model.adapters import adapt
from mdl_nbdev.model.chat import Example
from mdl_nbdev.model.collate import Collator
from mdl_nbdev.model.midashenglm_family import AUDIO, MiDashengLMFamily, tiny_model, tiny_tokenizer
from mdl_nbdev.train.coba import CoBa
from mdl_nbdev.train.losses import loss_weights, weighted_losses

MODES = ["case1", "case2", "case3", "case4"]


pytestmark = pytest.mark.usefixtures("one_thread")


def example(rng, task, n, labelled, vocabulary=50):
    "A sample of `n` tokens whose last `labelled` carry loss"
    ids = np.array([rng.randrange(vocabulary) for _ in range(n)], np.int32)
    labels = np.where(np.arange(n) >= n - labelled, ids, -100).astype(np.int32)
    return Example(ids, labels, [], task_id=task)


def samples(case, seed=0):
    "Eight samples as (task, tokens, labelled tokens)"
    rng = random.Random(seed)
    shapes = {"one task": [(0, 9, 3), (0, 5, 1), (0, 12, 8), (0, 7, 2), (0, 6, 6), (0, 8, 4), (0, 5, 2), (0, 11, 5)],
              "three tasks": [(0, 9, 3), (1, 5, 1), (2, 12, 8), (0, 7, 2), (1, 6, 5), (2, 8, 4), (2, 5, 2), (0, 11, 5)],
              "an absent task": [(0, 9, 3), (2, 5, 1), (2, 12, 8), (0, 7, 2), (0, 6, 5), (2, 8, 4), (2, 5, 2), (0, 11, 5)],
              "a task without labels": [(0, 9, 3), (1, 5, 0), (2, 12, 8), (0, 7, 2), (1, 6, 0), (2, 8, 4), (2, 5, 2), (0, 11, 0)],
              "one token": [(0, 9, 0), (1, 5, 1), (2, 12, 0), (0, 7, 0), (1, 6, 0), (2, 8, 0), (2, 5, 0), (0, 11, 0)],
              "nothing": [(t % 3, 6, 0) for t in range(8)]}
    return [example(rng, *s) for s in shapes[case]]


CASES = ["one task", "three tasks", "an absent task", "a task without labels", "one token", "nothing"]
WEIGHTS = [1., 2.5, .5]


def reference(mode, token_losses, tasks, weights):
    "The formulas, loop by loop; `token_losses` are lists of the losses at each sample's labels"
    per_task = {}
    for losses, task in zip(token_losses, tasks):
        if losses: per_task.setdefault(task, []).append(losses)
    everything = [losses for group in per_task.values() for losses in group]
    if not everything: return 0.
    if mode == "case1": return sum(x for losses in everything for x in losses)/sum(len(losses) for losses in everything)
    if mode == "case2": return sum(sum(losses)/len(losses) for losses in everything)/len(everything)
    total = 0.
    for task, group in per_task.items():
        if mode == "case3": value = sum(x for losses in group for x in losses)/sum(len(losses) for losses in group)
        else: value = sum(sum(losses)/len(losses) for losses in group)/len(group)
        total += weights[task]*value
    return total/sum(weights[task] for task in per_task) if sum(weights[task] for task in per_task) else 0.


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)).eval()


def token_losses(model, examples):
    "The loss at each label, one sample at a time, in float64"
    out = []
    for e in examples:
        with torch.no_grad(): logits = model(torch.from_numpy(e.input_ids).long()[None]).logits[0].double()
        out.append([-float(logits[t-1].log_softmax(-1)[e.labels[t]]) for t in range(1, len(e.labels)) if e.labels[t] != -100])
    return out


def step(model, groups, mode, weights=WEIGHTS, reduce=None):
    "The sums of the weight maps over the micro-batches of a step; the gradient is left in the model"
    collate = Collator(0, MiDashengLMFamily())
    batches = [collate(g) for g in groups]
    maps, tokens = loss_weights(batches, mode, weights, 3, reduce)
    total = torch.zeros(4, dtype=torch.float64)
    for batch, weights in zip(batches, maps):
        sums = weighted_losses(model, batch.inputs, weights, batch["label_at"])
        sums[0].backward()
        total += sums.detach().double()
    return total, tokens


def cut(items, size): return [items[i:i+size] for i in range(0, len(items), size)]


CUTS = {"1x8": lambda s: [s], "2x4": lambda s: cut(s, 4), "4x2": lambda s: cut(s, 2), "8x1": lambda s: cut(s, 1), "packed": lambda s: [[s[:3], s[3:5]], [s[5:]]]}


@pytest.mark.parametrize("way", CUTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_modes_are_their_formulas(model, case, mode, way):
    examples = samples(case)
    total, tokens = step(model, CUTS[way](examples), mode)
    losses, tasks = token_losses(model, examples), [e.task_id for e in examples]
    assert float(total[0]) == pytest.approx(reference(mode, losses, tasks, WEIGHTS), abs=2e-6)
    for task in range(3):
        mine = [x for group, t in zip(losses, tasks) if t == task for x in group]
        assert float(total[1+task]) == pytest.approx(sum(mine)/len(mine) if mine else 0, abs=2e-6) and tokens[task] == len(mine)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_do_not_depend_on_the_cut(model, mode):
    found = []
    for way in CUTS.values():
        model.zero_grad()
        step(model, way(samples("three tasks")), mode)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for other in found[1:]: torch.testing.assert_close(other, found[0], atol=1e-6, rtol=0)


def test_a_weight_of_zero_leaves_a_task_out(model):
    examples = samples("three tasks")
    total, _ = step(model, [examples], "case3", [1., 0., 1.])
    alone = [e for e in examples if e.task_id != 1]
    assert float(total[0]) == pytest.approx(reference("case3", token_losses(model, alone), [e.task_id for e in alone], [1., 1., 1.]), abs=2e-6)


class NoChoice(torch.nn.Module):
    "A model whose output layer is not known, and whose forward takes no `logits_to_keep`"
    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config
    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return self.inner(input_ids, attention_mask=attention_mask, use_cache=use_cache)


def test_text_models_equal_their_full_logits(model):
    batch = Collator(0, MiDashengLMFamily())(samples("three tasks"))
    weights = torch.rand(2, *batch["labels"].shape)
    with torch.no_grad(): logits = model(batch["input_ids"], attention_mask=(batch["sample"] >= 0).long()).logits
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="none")
    want = (weights[:, :, 1:].flatten(1)*each).sum(1)
    for m in (model, NoChoice(model)): torch.testing.assert_close(weighted_losses(m, batch.inputs, weights, batch["label_at"]), want, atol=1e-5, rtol=1e-5)


def test_text_logits_are_only_made_where_they_are_needed(model):
    batch = Collator(0, MiDashengLMFamily())(samples("three tasks"))
    shapes = []
    hook = model.get_output_embeddings().register_forward_hook(lambda m, args, out: shapes.append(tuple(out.shape)))
    weighted_losses(model, batch.inputs, torch.ones(1, *batch["labels"].shape), batch["label_at"])
    hook.remove()
    assert shapes == [(1, int((batch["labels"][:, 1:] != -100).sum()), 50)]


class Wrapped(torch.nn.Module):
    "As DistributedDataParallel wraps a model"
    def __init__(self, module):
        super().__init__()
        self.module = module
    def forward(self, **kwargs): return self.module(**kwargs)


def test_logits_of_wrapped_models_are_only_made_where_they_are_needed(model):
    "Also if the output layer itself is trained, and wrapped by peft; afterwards the model gives all logits again"
    batch = Collator(0, MiDashengLMFamily())(samples("three tasks"))
    weights, shapes = torch.rand(2, *batch["labels"].shape), []
    want = weighted_losses(model, batch.inputs, weights, batch["label_at"])
    lora = get_peft_model(deepcopy(model), LoraConfig(target_modules=["query_key_value"], modules_to_save=["lm_head"]))
    hook = lora.get_base_model().lm_head.register_forward_hook(lambda m, args, out: shapes.append(tuple(out.shape)))
    for net in (lora, Wrapped(lora)): torch.testing.assert_close(weighted_losses(net, batch.inputs, weights, batch["label_at"]), want)
    hook.remove()
    n = int((batch["labels"][:, 1:] != -100).sum())
    assert shapes == [(1, n, 50)]*2
    assert lora(batch["input_ids"]).logits.shape == (*batch["input_ids"].shape, 50)


def test_the_hook_is_removed_when_a_model_fails(model):
    batch = Collator(0, MiDashengLMFamily())(samples("three tasks"))
    with pytest.raises((TypeError, ValueError)): weighted_losses(model, dict(labels=batch["labels"], input_ids=None, attention_mask=3), torch.rand(1, *batch["labels"].shape), batch["label_at"])
    assert not model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("alias, mode", LOSS_MODES.items())
def test_names_of_mftcoder_are_aliases(alias, mode):
    batch = Collator(0, MiDashengLMFamily())(samples("three tasks"))
    (one,), (other,) = (loss_weights([batch], m, WEIGHTS, 3)[0] for m in (alias, mode))
    assert torch.equal(one, other)


def test_what_begins_a_sample_weighs_nothing():
    "Two samples packed into one row, and a label on every token: the first of each is predicted from nothing of its own"
    batch = dict(labels=torch.full((1, 8), 7), sample=torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1]]), task=torch.tensor([0, 1]))
    (maps,), tokens = loss_weights([batch], "case4", [1., 1.], 2)
    assert tokens.tolist() == [2, 3]
    torch.testing.assert_close(maps[0, 0], torch.tensor([0, 1/4, 1/4, 0, 1/6, 1/6, 1/6, 0]))


def test_an_unknown_mode_is_an_error():
    batch = dict(labels=torch.full((1, 3), 7), sample=torch.zeros(1, 3).long(), task=torch.tensor([0]))
    with pytest.raises(KeyError, match="case9"): loss_weights([batch], "case9", [1.], 1)


# Two processes

def audio_samples():
    "Eight samples of three tasks, each about one clip"
    tok, rng, out = tiny_tokenizer(), np.random.default_rng(0), []
    a = tok.convert_tokens_to_ids(AUDIO)
    for i in range(8):
        n, answer = 2 + i % 3, 1 + i*5 % 4
        ids = np.array([65, *[a]*n, 66, *range(70, 70+answer)], np.int32)
        labels = np.where(np.arange(len(ids)) >= len(ids)-answer, ids, -100).astype(np.int32)
        out.append(Example(ids, labels, [rng.normal(0, 3000, 3200*n).astype(np.int16)], task_id=i % 3))
    return out


def text_model():
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)), samples("three tasks")


def audio_model():
    torch.manual_seed(0)
    model = adapt(tiny_model(), TuneSettings(lora_rank=4))
    for k, p in model.named_parameters():
        if "lora_B" in k: torch.nn.init.normal_(p, std=0.05) # at zero, as they begin, they would give lora_A no gradient
    return model, audio_samples()


def write_gradients(rank, world, file):
    "What one process of a run does: gradients of both models in each mode, written by the first"
    torch.set_num_threads(1)
    if world > 1: dist.init_process_group("gloo", init_method=f"file://{file}.store", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    def reduce(t):
        if world > 1: dist.all_reduce(t)
        return t
    for name, make in dict(text=text_model, audio=audio_model).items():
        for mode in MODES:
            model, examples = make()
            run = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
            batches = [Collator(0, MiDashengLMFamily())(g) for g in cut(examples, 2 if world > 1 else 8)[rank::world]]
            maps, _ = loss_weights(batches, mode, WEIGHTS, 3, reduce)
            for i, (b, p) in enumerate(zip(batches, maps)):
                with run.no_sync() if world > 1 and i < len(batches)-1 else nullcontext():
                    (weighted_losses(run, b.inputs, p, b["label_at"])[0]*world).backward()
            if rank == 0: torch.save({k: p.grad for k, p in model.named_parameters() if p.grad is not None}, f"{file}-{name}-{mode}-{world}")


def test_two_processes_give_the_gradient_of_one(tmp_path):
    "The same global batch of eight: in one process at once, and in two with two batches of two each"
    processes = [training_runs.context.Process(target=write_gradients, args=(rank, world, str(tmp_path/"g"))) for rank, world in ((0, 1), (0, 2), (1, 2))]
    for process in processes: process.start()
    for process in processes:
        process.join(200)
        assert process.exitcode == 0
    for name in ("text", "audio"):
        for mode in MODES:
            one, two = (torch.load(f"{tmp_path}/g-{name}-{mode}-{world}", weights_only=True) for world in (1, 2))
            assert one.keys() == two.keys() and sum(g.abs().max() > 1e-4 for g in one.values()) > len(one)/2
            size = max(g.abs().max() for g in one.values())
            for k in one: assert (two[k] - one[k]).abs().max() <= 1e-6*max(1, size), (name, mode, k)


# CoBa

def softmax(values):
    top = max(values)
    e = [math.exp(v - top) for v in values]
    return [x/sum(e) for x in e]


def slope(values):
    "Least squares over evenly spaced values, by the normal equations"
    n = len(values)
    mx, my = sum(range(n))/n, sum(values)/n
    below = sum((i-mx)**2 for i in range(n))
    return sum((i-mx)*(v-my) for i, v in enumerate(values))/below if below else 0.


class SlowCoBa:
    "The formulas of the paper, written out"
    def __init__(self, n, warmup, window, tau):
        self.n, self.warmup, self.window, self.tau = n, warmup, window, tau
        self.losses, self.slopes, self.worst = [], [], []

    def update(self, losses):
        self.losses.append(losses)
        if len(self.losses) <= self.warmup: return [1/self.n]*self.n
        ratios = [[now/first for now, first in zip(row, self.losses[0])] for row in self.losses][-self.window:]
        a = [slope([row[k] for row in ratios]) for k in range(self.n)]
        self.slopes = [*self.slopes, a][-self.window:]
        self.worst.append(slope([max(row) for row in ratios]))
        if not any(a): rcs = [1/self.n]*self.n
        else: rcs = softmax([self.n*x/sum(map(abs, a)) for x in a])
        acs = []
        for k in range(self.n):
            size = sum(abs(s[k]) for s in self.slopes)
            acs.append(-len(self.slopes)*a[k]/size if size else 0.)
        acs, n = softmax(acs), len(self.worst)
        size = sum(map(abs, self.worst))
        df = n*softmax([-self.tau*n*x/size if size else 0. for x in self.worst])[-1]
        return softmax([self.n*(df*r + (1-df)*c) for r, c in zip(rcs, acs)])


def curves(seed, steps=60):
    "Validation losses of three tasks: one that learns, one that learns slowly, one that begins to overfit"
    rng = np.random.default_rng(seed)
    t = np.arange(steps)
    return np.stack([2*np.exp(-t/15) + .5, 3*np.exp(-t/60) + .2, 1.5*np.exp(-t/10) + .3 + .01*np.maximum(t-25, 0)], 1)*(1 + .01*rng.normal(size=(steps, 3)))


@pytest.mark.parametrize("warmup, window, tau", [(5, 10, 5.), (1, 60, 1.), (20, 8, 5.), (3, 4, .5)])
def test_coba_is_the_slow_reference(warmup, window, tau):
    fast, slow = CoBa(3, warmup, window, tau), SlowCoBa(3, warmup, window, tau)
    for losses in curves(0).tolist():
        want = slow.update(losses)
        np.testing.assert_allclose(fast.update(losses), want, atol=1e-9)
        assert sum(want) == pytest.approx(1)


def test_coba_gives_equal_weights_to_equal_losses():
    coba = CoBa(3, 2, 10)
    for x in curves(1)[:, 0]: np.testing.assert_allclose(coba.update([x, 2*x, .1*x]), 1/3, atol=1e-9)
    still = CoBa(3, 2, 10)
    for _ in range(20): np.testing.assert_allclose(still.update([1., 2., 3.]), 1/3, atol=1e-12)


def test_coba_takes_weight_from_a_task_that_overfits():
    coba = CoBa(3, 5, 10)
    weights = [coba.update(row) for row in curves(2).tolist()]
    assert weights[-1][2] < min(weights[-1][:2]) and weights[-1][2] < 1/3


def test_coba_is_at_rest_when_all_tasks_are():
    "Losses that fall and then stay: rounding must not be taken for a slope"
    coba = CoBa(3, 2, 6)
    for t in range(30): w = coba.update([1 + .1*max(0, 8-t), .3 + .07*max(0, 9-t), .7 + .013*max(0, 7-t)])
    assert w.tolist() == [1/3]*3


def test_coba_neither_overflows_nor_gives_nan():
    "Thousands of probes, a sharp temperature, losses of very unlike sizes, and a worst task that stops after a long fall"
    rng, coba = np.random.default_rng(0), CoBa(3, 2, 20, tau=100.)
    for t in range(3000):
        w = coba.update([1e6*math.exp(-t/50) + 1e-9, 1e-6*(1 + .1*rng.random()), 5. + (t > 2000)*t])
        assert np.isfinite(w).all() and (w >= 0).all() and w.sum() == pytest.approx(1)


def test_coba_goes_on_from_its_state():
    whole, first = CoBa(3, 5, 10), CoBa(3, 5, 10)
    rows = curves(3).tolist()
    for row in rows[:23]: first.update(row)
    second = CoBa(3, 5, 10)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for i, row in enumerate(rows):
        w = whole.update(row)
        if i >= 23: assert (second.update(row) == w).all()


def test_coba_keeps_the_last_ratio_of_a_task_that_was_not_measured():
    a, b = CoBa(2, 2, 5), CoBa(2, 2, 5)
    for row in [[2., 1.], [1.8, .9], [1.7, .8]]: a.update(row), b.update(row)
    assert (a.update([1.6, None]) == b.update([1.6, .8])).all()


def test_coba_waits_for_a_task_that_is_not_yet_measured():
    "Its ratio is 1 until it has a first loss, which is then what it is compared with"
    late, same = CoBa(2, 2, 5), CoBa(2, 2, 5)
    for row, other in [((2., None), (2., 4.)), ((1.8, None), (1.8, 4.)), ((1.7, 4.), (1.7, 4.)), ((1.6, 3.), (1.6, 3.))]:
        assert (late.update(row) == same.update(other)).all()


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_coba_refuses_what_is_no_loss(loss):
    coba = CoBa(2, 2, 5)
    coba.update([1., 2.])
    with pytest.raises(InputError, match="task 1"): coba.update([1., loss])


def test_coba_refuses_the_history_of_other_tasks():
    with pytest.raises(InputError, match="3 tasks.*2 now"): CoBa(2, 2, 5).load_state_dict(CoBa(3, 2, 5).state_dict())


def test_a_saved_coba_state_does_not_move_on():
    coba = CoBa(2, 1, 5)
    for row in [[2., 1.], [1.8, .9], [1.7, .8]]: coba.update(row)
    state = coba.state_dict()
    before = json.dumps(state)
    coba.update([1.6, .7])
    assert json.dumps(state) == before
