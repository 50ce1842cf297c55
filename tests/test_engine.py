"Generation: the decoding step as one graph"
import numpy as np
import pytest
import torch
from transformers.generation import CompileConfig

import mdl_nbdev.model.engine as E
from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.settings import InferSettings
from mdl_nbdev.data.conversations import Conversation
from mdl_nbdev.model.families import load_chat
from mdl_nbdev.model.midashenglm import MiDashengLMModel
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
        parts = [{"type": "text", "text": "Describe " + "this and that "*i}]
        if clips: parts.insert(0, {"type": "audio", "path": f"{i}.wav"})
        sounds = [rng.integers(-9000, 9000, 4000 + 3000*i).astype(np.int16)] if clips else []
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
    expected = [c.ids for c in E.TransformersEngine(model, chat).generate(asked)]
    graphs = []
    def backend(module, inputs):
        graphs.append(module)
        return module.forward
    compiled = CompileConfig(backend=backend, fullgraph=True, dynamic=False, mode=None)
    compiled._compile_all_devices = True
    engine = E.TransformersEngine(model, chat)
    arguments = engine.arguments
    engine.arguments = lambda batch: arguments(batch) | dict(cache_implementation="static", compile_config=compiled)
    assert [c.ids for c in engine.generate(asked)] == expected
    assert len(graphs) == 1


def test_the_memory_of_a_recorded_step_is_known_before_it_is_taken(parts):
    model, chat, asked = parts
    step = E.RecordedStep(model, 2, 96)
    inputs = E.Collator(chat.pad_id, chat.family, "left")([r.example for r in asked[:2]]).inputs
    del inputs["labels"]
    model.generate(**inputs, max_new_tokens=2, past_key_values=step.cache)
    held = sum(t.nbytes for layer in step.cache.layers for t in (layer.keys, layer.values))
    assert E.cache_bytes(model, 2, 96) == held


def test_only_a_plain_model_on_a_gpu_is_recorded(parts):
    assert not E.can_record(parts[0])
    assert not E.can_record(torch.nn.Linear(1, 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, dict(do_sample=True, top_p=.9), dict(repetition_penalty=1.3, logprobs=True)])
def test_a_recorded_step_generates_the_same(parts, options, monkeypatch):
    model, chat, asked = parts
    engine = E.TransformersEngine(model.cuda(), chat, E.GenerationOptions(**options), 2)
    def everything(): return [(c.ids, c.text, c.truncated, np.round(c.logprobs or [], 3).tolist()) for c in engine.generate(asked*2)]
    recorded = everything()
    assert engine.step.graph is not None
    assert everything() == recorded, "the second time, from the same graph"
    monkeypatch.setattr(E, "can_record", lambda model: False)
    assert everything() == recorded


@pytest.mark.parametrize("most", range(9))
def test_memory_for_some_rows_is_enough(most, monkeypatch):
    "The batch is halved until it fits, and so are those that follow; a row that doesn't fit alone has a reason"
    chat, model = load_chat("tiny-text"), tiny_text_model()
    asked = list(requests(chat, False, limits=(2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2)))
    expected = [(c.key, c.ids) for c in E.TransformersEngine(model, chat).generate(asked)]
    tried, forward = [], model.forward
    def limited(*args, **kwargs):
        ids = kwargs["input_ids"]
        if ids.shape[1] > 1: tried.append(len(ids)) # prompts
        if len(ids) > most: raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(*args, **kwargs)
    monkeypatch.setattr(model, "forward", limited)
    found = list(E.TransformersEngine(model, chat, batch_size=8).generate(asked))
    if most: assert [(c.key, c.ids) for c in found] == expected and not any(c.reason for c in found)
    else: assert [c.key for c in found] == list(range(11)) and all("out of memory with this row alone" in c.reason and not c.text for c in found)
    assert sum(n > most for n in tried) <= 7 + (0 if most else 11), "one batch finds the size for those that follow"


def test_budgets_and_batches_change_no_completion(parts, monkeypatch):
    "Rows are grouped by their positions; tokens and log-probabilities are the same as alone"
    model, chat, asked = parts
    options = E.GenerationOptions(logprobs=True)
    alone = [c for r in asked for c in E.TransformersEngine(model, chat, options).generate([r])]
    longest = max(len(r.example.input_ids) + r.max_new_tokens for r in asked)
    sizes = []
    for budget in (1, 2*longest + 20, 9*longest):
        monkeypatch.setattr(E, "CPU_BUDGET", budget)
        engine = E.TransformersEngine(model, chat, options, "auto")
        sizes.append([len(b) for b in engine.batches(asked)])
        together = list(engine.generate(asked))
        assert [c.ids for c in together] == [c.ids for c in alone]
        np.testing.assert_allclose(np.concatenate([c.logprobs for c in together]), np.concatenate([c.logprobs for c in alone]), atol=1e-4)
    assert sizes == [[1, 1, 1], [2, 1], [3]]


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
