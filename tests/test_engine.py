"Generation: rows that come and go, and the decoding step as one graph"
import copy
import functools
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForCausalLM, Gemma3TextConfig, MambaConfig, Qwen3Config
from transformers.generation import CompileConfig

import mdl_nbdev.model.decoding as D
import mdl_nbdev.model.engine as E
from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.settings import InferSettings
from mdl_nbdev.data.conversations import Conversation
from mdl_nbdev.model.families import load_chat
from mdl_nbdev.model.midashenglm import CACHE, MiDashengLMModel
from mdl_nbdev.model.midashenglm_family import tiny_config, tiny_model
from mdl_nbdev.model.text_family import tiny_text_model
from mdl_nbdev.model.vllm import load_vllm


def qwen3_model():
    "The tiny model with a Qwen3 decoder"
    config = tiny_config().to_dict()
    config["text_config"] |= dict(model_type="qwen3", head_dim=16)
    return MiDashengLMModel(type(tiny_config())(**config)).eval()


MODELS = dict(midashenglm=("tiny", tiny_model), qwen3=("tiny", qwen3_model), text=("tiny-text", tiny_text_model))


def requests(chat, clips, limits=(9, 5, 12)):
    "Prompts of unequal length, with clips of unequal length if the model hears"
    rng = np.random.default_rng(0)
    for i, limit in enumerate(limits):
        parts = [{"type": "text", "text": "Describe " + "this and that "*(i % 5)}]
        if clips: parts.insert(0, {"type": "audio", "path": f"{i}.wav"})
        sounds = [rng.integers(-9000, 9000, 4000 + 3000*(i % 5)).astype(np.int16)] if clips else []
        prompt = chat.tokenize([Conversation([{"role": "user", "content": parts}])])[0]
        yield E.Request(i, prompt.example(sounds), limit)


@pytest.fixture(params=MODELS)
def parts(request):
    torch.manual_seed(1)
    name, make = MODELS[request.param]
    chat = load_chat(name)
    return make().eval(), chat, list(requests(chat, name == "tiny"))


def test_the_decoding_step_is_one_graph(parts):
    "Nothing in it depends on a number that the device has computed, which CUDA graphs and `torch.compile` rule out"
    model, chat, asked = parts
    engine = E.TransformersEngine(model, chat)
    expected = [c.ids for c in engine.complete(asked)]
    graphs = []
    def backend(module, inputs):
        graphs.append(module)
        return module.forward
    compiled = CompileConfig(backend=backend, fullgraph=True, dynamic=False, mode=None)
    compiled._compile_all_devices = True
    arguments = engine.arguments
    engine.arguments = lambda: arguments() | dict(cache_implementation="static", compile_config=compiled)
    assert [c.ids for c in engine.complete(asked)] == expected
    assert len(graphs) == 1


def test_the_memory_of_recorded_steps_is_known_before_it_is_taken(parts):
    model, chat, asked = parts
    prompts = D.prefill(model, E.TransformersEngine(model, chat).inputs(asked[:2]))
    steps = D.RecordedSteps(model, 2, 96)
    D.regroup([(prompts, [0, 1])], [len(r.example.input_ids) for r in asked[:2]], steps)
    held = sum(t.nbytes for layer in steps.cache.layers for t in (layer.keys, layer.values))
    assert E.cache_bytes(model, 2, 96) == held
    inner = steps.view(1).layers[0].keys
    assert inner.data_ptr() == steps.cache.layers[0].keys.data_ptr() and len(inner) == 1, "fewer rows take no more"


def test_only_a_plain_model_on_a_gpu_is_recorded(parts):
    assert not E.can_record(parts[0])
    assert not E.can_record(torch.nn.Linear(1, 1))


class Replayed(D.RecordedStep):
    "A recorded step on a CPU: it reads and writes what was there when it was recorded, as a CUDA graph does"
    def record(self, arguments):
        self.arguments, self.graph = tree_map_only(torch.Tensor, torch.clone, arguments), self
        self.output = copy.copy(self.model(**self.arguments, **{CACHE: self.cache}))
        for layer in self.cache.layers: layer.cumulative_length.sub_(1)
        recorded.append(len(arguments["input_ids"]))

    def replay(self):
        self.output.logits.copy_(self.model(**self.arguments, **{CACHE: self.cache}).logits)


recorded = [] # numbers of rows


def unequal(chat, clips, rng, n=11, most=16):
    "Requests whose limits differ widely"
    return list(requests(chat, clips, [int(x) for x in np.minimum(rng.geometric(.15, n), most)]))


def outcome(completions):
    "What requests get, in their order"
    return [(c.key, c.ids, c.truncated) for c in sorted(completions, key=lambda c: c.key)]


@pytest.mark.parametrize("steps", ["dynamic", "recorded"])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_rows_leave_and_join_without_a_change_to_any(parts, steps, seed, monkeypatch):
    "The completions and log-probabilities are those of `generate` for each row alone, whatever the size of groups and budgets"
    model, chat, asked = parts
    rng = np.random.default_rng(seed)
    asked = unequal(chat, bool(asked[0].example.clips), rng)
    options = E.GenerationOptions(logprobs=True, repetition_penalty=1. if seed else 1.3)
    engine = E.TransformersEngine(model, chat, options)
    expected = [engine.complete([r])[0] for r in asked]
    engine.stops = engine.stops + [c.ids[len(c.ids)//2] for c in expected[:2] if len(c.ids) > 3] # some end by themselves
    expected = [engine.complete([r])[0] for r in asked]
    if steps == "recorded":
        monkeypatch.setattr(E, "can_record", lambda model: True)
        monkeypatch.setattr(E, "free_memory", lambda device: 2**40)
        monkeypatch.setattr(D, "RecordedStep", Replayed)
        recorded.clear()
    for size, budget in [(4, sys.maxsize), (7, 700), (16, sys.maxsize)]:
        engine.batch_size, engine.budget = size, budget
        found = list(engine.generate(asked))
        assert outcome(found) == outcome(expected)
        alone = {c.key: c.logprobs for c in found}
        for c in found: assert len(c.logprobs) == len(c.ids) + (not c.truncated)
    logprobs = {c.key: c.logprobs for c in E.TransformersEngine(model, chat, options, 1).generate(asked)}
    for key in alone: np.testing.assert_allclose(alone[key][:len(logprobs[key])], logprobs[key][:len(alone[key])], atol=1e-4)
    if steps == "recorded": assert max(recorded) == 11 and sorted(engine.recorded.steps)[:-1] == [n for n in (1, 2, 4, 8) if n in engine.recorded.steps]


def test_finished_rows_cost_nothing(monkeypatch):
    "A pass has few rows more than are needed, and the answers of three hundred rows come in their turn"
    chat, model = load_chat("tiny-text"), tiny_text_model()
    asked = list(requests(chat, False, [40] + [2, 3, 2, 4]*6))
    passes, forward = [], model.forward
    @functools.wraps(forward)
    def counted(*args, **kwargs):
        passes.append(kwargs["input_ids"].shape)
        return forward(*args, **kwargs)
    monkeypatch.setattr(model, "forward", counted)
    engine = E.TransformersEngine(model, chat, batch_size=8)
    order = [c.key for c in engine.generate(asked)]
    steps = [rows for rows, n in passes if n == 1]
    assert len(steps) == 39 and order[-1] == 0
    assert sum(steps) <= 1.3*sum(r.max_new_tokens - 1 for r in asked)


def test_what_rows_have_said_that_left_is_forgotten(monkeypatch):
    "The tokens that are kept are those of the longest row, however many steps the group has lasted"
    asked, widths, step = list(requests(load_chat("tiny-text"), False, [2, 5, 3]*20)), [], D.Rows.step
    def measured(rows):
        widths.append(rows.ids.shape[1] - rows.length)
        step(rows)
    monkeypatch.setattr(D.Rows, "step", measured)
    list(E.TransformersEngine(tiny_text_model(), load_chat("tiny-text"), batch_size=4).generate(asked))
    assert len(widths) > 30 and set(widths) == {1}


@pytest.mark.parametrize("kind", MODELS)
def test_a_row_draws_the_same_in_any_company(kind):
    "It depends on the seed and its key alone: not on its neighbours, the size of groups or memory that ran out"
    torch.manual_seed(1)
    name, make = MODELS[kind]
    model, chat = make().eval(), load_chat(name)
    asked = unequal(chat, name == "tiny", np.random.default_rng(3))
    options = E.GenerationOptions(do_sample=True, temperature=1.3, top_p=.9, repetition_penalty=1.1, seed=5)
    engine = E.TransformersEngine(model, chat, options, 1)
    expected = outcome(engine.generate(asked))
    for size, rows in [(4, asked), (8, asked[::-1]), (3, asked[::2])]:
        engine.batch_size = size
        assert outcome(engine.generate(rows)) == [e for e in expected if e[0] in {r.key for r in rows}]
    engine.options = replace(options, seed=6)
    assert outcome(engine.generate(asked)) != expected
    same = [replace(asked[-1], key=k, seed=9) for k in "ab"]
    one, two = engine.generate([*asked[:3], *same]), list(engine.generate(same[1:]))
    assert {tuple(c.ids) for c in one if c.key in ("a", "b")} == {tuple(two[0].ids)}


def test_tokens_are_drawn_by_their_probabilities():
    rng = np.random.default_rng(0)
    scores = torch.tensor([[1., -1e9, .3, -float("inf"), -2.]]).expand(20_000, -1)
    found = np.bincount(D.draw(scores, torch.tensor(rng.random(len(scores)))).numpy(), minlength=5)/len(scores)
    np.testing.assert_allclose(found, scores[0].softmax(-1), atol=.02)
    assert found[1] == found[3] == 0


@pytest.mark.parametrize("window", [None, 7, 40])
def test_layers_with_a_window(window):
    "Their caches keep fewer positions, and rows leave and join all the same"
    torch.manual_seed(0)
    chat = load_chat("tiny-text")
    size = dict(vocab_size=tiny_text_model().config.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, head_dim=8, max_position_embeddings=512)
    if window: config = Gemma3TextConfig(**size, sliding_window=window, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    else: config = Qwen3Config(**size)
    model = AutoModelForCausalLM.from_config(config).eval()
    engine = E.TransformersEngine(model, chat, batch_size=4)
    asked = unequal(chat, False, np.random.default_rng(1), most=60)
    assert outcome(engine.generate(asked)) == outcome(engine.complete([r])[0] for r in asked)


def test_a_model_that_counts_positions_itself_is_not_regrouped(monkeypatch):
    chat, model = load_chat("tiny-text"), tiny_text_model()
    forward, asked = model.forward, unequal(chat, False, np.random.default_rng(1))
    monkeypatch.setattr(model, "forward", lambda input_ids, attention_mask=None, **kwargs: forward(input_ids, attention_mask, **kwargs))
    engine = E.TransformersEngine(model, chat, batch_size=4)
    assert outcome(engine.generate(asked)) == outcome(engine.complete([r])[0] for r in asked)


def test_a_minimum_of_tokens_is_counted_from_the_prompt(monkeypatch):
    "A checkpoint may ask for one; what counts a row's tokens by the width of a group would be wrong once rows have joined"
    chat, model = load_chat("tiny-text"), tiny_text_model()
    asked = unequal(chat, False, np.random.default_rng(1), 20)
    monkeypatch.setattr(model.generation_config, "min_new_tokens", 6)
    engine = E.TransformersEngine(model, chat, batch_size=4)
    engine.stops = engine.stops + [c.ids[1] for c in map(lambda r: engine.complete([r])[0], asked[:6]) if len(c.ids) > 2]
    assert outcome(engine.generate(asked)) == outcome(engine.complete([r])[0] for r in asked)


def test_other_caches_end_as_a_whole():
    "Nothing is known of how rows leave the states of Mamba"
    torch.manual_seed(0)
    chat = load_chat("tiny-text")
    config = MambaConfig(vocab_size=tiny_text_model().config.vocab_size, hidden_size=32, state_size=8, num_hidden_layers=2)
    engine = E.TransformersEngine(AutoModelForCausalLM.from_config(config).eval(), chat, batch_size=4)
    asked = unequal(chat, False, np.random.default_rng(1), most=12)
    whole = [c for i in range(0, len(asked), 4) for c in engine.complete(asked[i:i + 4])]
    assert outcome(engine.generate(asked)) == outcome(whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, dict(do_sample=True, top_p=.9), dict(repetition_penalty=1.3, logprobs=True)])
def test_a_recorded_step_generates_the_same(parts, options, monkeypatch):
    model, chat, asked = parts
    engine = E.TransformersEngine(model.cuda(), chat, E.GenerationOptions(**options), 4)
    asked = unequal(chat, bool(asked[0].example.clips), np.random.default_rng(0))
    def everything(): return [(o, np.round(c.logprobs or [], 3).tolist()) for o, c in zip(outcome(f), sorted(f, key=lambda c: c.key))] if (f := list(engine.generate(asked))) else []
    recorded = everything()
    assert all(step.graph is not None for step in engine.recorded.steps.values())
    assert everything() == recorded, "the second time, from the same graphs"
    monkeypatch.setattr(E, "can_record", lambda model: False)
    assert everything() == recorded


@pytest.mark.parametrize("most", range(9))
def test_memory_for_some_rows_is_enough(most, monkeypatch):
    "Groups are halved until they fit, and so are those that follow; a row that doesn't fit alone has a reason"
    chat, model = load_chat("tiny-text"), tiny_text_model()
    asked = list(requests(chat, False, limits=(2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2)))
    expected = outcome(E.TransformersEngine(model, chat).generate(asked))
    tried, forward = [], model.forward
    @functools.wraps(forward)
    def limited(*args, **kwargs):
        ids = kwargs["input_ids"]
        if len(ids) > most:
            tried.append(len(ids))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(*args, **kwargs)
    monkeypatch.setattr(model, "forward", limited)
    found = list(E.TransformersEngine(model, chat, batch_size=8).generate(asked))
    if most: assert outcome(found) == expected and not any(c.reason for c in found)
    else: assert [c.key for c in found] == list(range(11)) and all("out of memory with this row alone" in c.reason and not c.text for c in found)
    assert len(tried) <= 4 + (0 if most else 11), "one batch finds the size for those that follow"


def test_an_error_of_the_requests_ends_the_run():
    "Even where it looks like one of the engine's memory: the remaining requests would be lost"
    chat = load_chat("tiny-text")
    def broken():
        yield from requests(chat, False)
        raise MemoryError("the reader's")
    with pytest.raises(MemoryError, match="the reader's"): list(E.TransformersEngine(tiny_text_model(), chat, batch_size=1).generate(broken()))


def test_a_budget_bounds_what_is_admitted(parts, monkeypatch):
    "Rows are grouped by their positions, and requests are read only as they are needed"
    model, chat, asked = parts
    longest = max(len(r.example.input_ids) + r.max_new_tokens for r in asked)
    sizes = []
    for budget in (1, 2*longest + 20, 9*longest):
        monkeypatch.setattr(E, "CPU_BUDGET", budget)
        engine = E.TransformersEngine(model, chat, batch_size="auto")
        sizes.append([len(batch) for batch in iter(functools.partial(engine.admit, [], E.Waiting(asked)), [])])
    assert sizes == [[1, 1, 1], [2, 1], [3]]
    read = []
    stream = (read.append(r.key) or r for r in asked*3)
    engine.batch_size = 2
    engine.admit([], E.Waiting(stream))
    assert len(read) == 2


def test_a_gpu_gets_what_half_of_its_memory_holds(monkeypatch):
    "Beams take the memory of as many rows"
    model, chat = tiny_text_model(), load_chat("tiny-text")
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr(E, "free_memory", lambda device: 2**30)
    c = model.config
    keys_and_values = 2*c.num_hidden_layers*c.hidden_size*4
    budget = E.TransformersEngine(model, chat, batch_size="auto").budget
    assert budget*keys_and_values < 2**29 < 20*budget*keys_and_values
    assert E.TransformersEngine(model, chat, E.GenerationOptions(num_beams=4), "auto").budget == budget//4


@pytest.mark.parametrize("option, value", [("num_beams", 2), ("repetition_penalty", 1.2), ("labels", "auto"), ("quantization", "4bit")])
def test_what_vllm_does_not_have(option, value):
    s = InferSettings(input="a.csv", output="b.csv", model_name="tiny", engine="vllm", **{option: value})
    with pytest.raises(InputError, match=f"--engine vllm: does not have --{option.replace('_', '-')}; leave out one or the other"):
        load_vllm(s)


@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_of_which_a_model_computes_nothing_is_rejected(monkeypatch, sample, bad):
    "From the third token on; drawing would give the number behind the last token, and greedy search some token. The other rows do not change"
    model, chat = tiny_text_model().eval(), load_chat("tiny-text")
    asked = list(requests(chat, False, (9, 6, 9)))
    engine = E.TransformersEngine(model, chat, E.GenerationOptions(do_sample=sample, logprobs=True))
    monkeypatch.setattr(engine, "stops", [])
    expected = outcome(engine.generate(asked))
    forward, passes = model.forward, []
    def broken(*args, **kw):
        out = forward(*args, **kw)
        passes.append(1)
        if len(passes) == 3: out.logits[1, -1, 5:] = bad
        return out
    monkeypatch.setattr(model, "forward", functools.wraps(forward)(broken))
    found = {c.key: c for c in engine.generate(asked)}
    assert (found[1].ids, found[1].failure) == ([], InputError) and found[1].reason.startswith("the model computes NaN or infinity")
    assert [x for x in outcome(found.values()) if x[0] != 1] == [x for x in expected if x[0] != 1]


def test_the_cache_of_a_long_answer_is_released(monkeypatch):
    "Once requests are much shorter; ones that are somewhat shorter use it"
    model, chat = tiny_text_model().eval(), load_chat("tiny-text")
    monkeypatch.setattr(E, "can_record", lambda model: True)
    engine, prompt = E.TransformersEngine(model, chat), next(requests(chat, False))
    def length(most): return engine.recorder([E.OpenRequest(replace(prompt, max_new_tokens=most), 0)]).length
    assert [length(n) for n in (4000, 2500, 1500, 100, 20)] == [8192, 8192, 8192, 256, 256]
