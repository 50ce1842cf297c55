"Scores of a closed set of labels: those of one full pass for each label and row, at the cost of two passes for all of them"
import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from audio_families import KINDS
from test_engine import MODELS

from mdl_nbdev import InferSettings, infer
from mdl_nbdev.base.errors import InputError
from mdl_nbdev.data.conversations import Conversation, text_message
from mdl_nbdev.data.sounds import make_sounds
from mdl_nbdev.infer import identity
from mdl_nbdev.model import label_scores
from mdl_nbdev.model.collate import Collator
from mdl_nbdev.model.engine import Request
from mdl_nbdev.model.families import load_chat
from mdl_nbdev.model.label_scores import LabelEngine, LabelSet
from mdl_nbdev.model.load import load_model

pytestmark = pytest.mark.usefixtures("one_thread")
LABELS = ["dog", "do", "dog barking", "猫", "a very long label, much longer than the others", "d"]


def conversations(chat):
    "Prompts of unequal length and shape, with no, one and two clips if the model hears"
    def turn(text, clips): return {"role": "user", "content": [{"type": "audio", "audio": f"{c}.wav"} for c in clips] + text_message("user", text)["content"]}
    hears = chat.clip_id is not None
    first = Conversation([turn("What is it?", [0] if hears else [])])
    history = Conversation([text_message("system", "Be brief."), turn("And this? " * 9, [1] if hears else []), text_message("assistant", "cat"), turn("And now?", [2, 3] if hears else [])])
    return [first, history, Conversation([text_message("user", "Say something.")]), Conversation([turn("Once more: what is it?", [4] if hears else [])])]


def sounds(conversation):
    "Clips of unequal lengths, the same ones each time"
    return [np.random.default_rng(n).integers(-9000, 9000, 4000 + 3000*n).astype(np.int16) for n in (int(c.split(".")[0]) for c in conversation.clips)]


def model_and_prompts(name, make_folder):
    "A small model with random weights, its chat, and the prompts of `conversations`"
    torch.manual_seed(1)
    if name == "qwen2_audio":
        folder = str(KINDS["qwen2-audio"].save(make_folder("qwen")))
        model, chat = load_model(folder, dtype=torch.float32), load_chat(folder)
    else:
        base, make = MODELS[name]
        model, chat = make(), load_chat(base)
    return model.eval(), chat, [t.example(sounds(t.conversation)) for t in chat.tokenize(conversations(chat))]


@pytest.fixture(scope="module", params=[*MODELS, "qwen2_audio"])
def parts(request, tmp_path_factory): return model_and_prompts(request.param, tmp_path_factory.mktemp)


def slow(model, chat, conversation, label):
    "The log-probability of a label, from one pass over the row as training renders it"
    example = chat.tokenize([Conversation([*conversation.messages, text_message("assistant", label)])])[0].example(sounds(conversation))
    prompt, completion = example.split_completion()
    inputs = Collator(chat.pad_id, chat.family)([example]).inputs
    del inputs["labels"]
    with torch.no_grad(): logprobs = model(**inputs).logits[0].log_softmax(-1)
    return sum(float(logprobs[i, t]) for i, t in enumerate(completion.tolist(), len(prompt.input_ids) - 1))


def test_scores_are_those_of_a_pass_for_each_label_and_row(parts, monkeypatch):
    model, chat, prompts = parts
    expected = np.array([[slow(model, chat, e.conversation, label) for label in LABELS] for e in prompts])
    engine = LabelEngine(model, chat, LABELS)
    together = engine.log_probs(prompts)
    np.testing.assert_allclose(together, expected, atol=1e-4)
    np.testing.assert_allclose(np.concatenate([engine.log_probs([e]) for e in prompts]), expected, atol=1e-4)
    monkeypatch.setattr(label_scores, "GROUP_POSITIONS_CPU", 1) # one label in each pass
    np.testing.assert_allclose(engine.log_probs(prompts), expected, atol=1e-4)


def test_completions_come_as_from_another_engine(parts):
    model, chat, prompts = parts
    engine = LabelEngine(model, chat, LABELS, batch_size=3)
    for c, e in zip(engine.generate(Request(n, e, 64) for n, e in enumerate(prompts)), prompts):
        assert c.text == c.scores.best == chat.decode_completion(c.ids) and not c.truncated
        assert c.scores.probabilities.sum() == pytest.approx(1)
        others = np.delete(c.scores.probabilities, LABELS.index(c.text))
        assert c.scores.margin == pytest.approx(c.scores.probability - others.max())
        assert prompts[c.key] is e


def test_a_prompt_is_computed_once(parts):
    "However many labels there are, a clip is encoded once and the decoder runs twice"
    model, chat, prompts = parts
    calls = []
    handles = [m.register_forward_hook(lambda m, i, o, name=name: calls.append(name)) for name, m in model.named_modules()
               if name.endswith(("audio_encoder", "audio_tower")) or name.endswith("layers.0") and "audio" not in name]
    LabelEngine(model, chat, LABELS).log_probs(prompts)
    for h in handles: h.remove()
    encoder = [c for c in calls if "audio" in c]
    assert len(encoder) == (chat.clip_id is not None) and len(calls) - len(encoder) == 2


@pytest.mark.parametrize("labels, fault", [([], "at least two labels, not 0"), (["a"], "at least two labels, not 1"), (["a", " "], "an empty text"), (["a", "b", "a"], "'a' occurs twice"),
                                           (["a", "b\nc"], "contains a line break")])
def test_sets_that_cannot_be(labels, fault):
    with pytest.raises(InputError) as e: LabelSet(load_chat("tiny"), labels)
    assert fault in str(e.value)


def test_labels_that_the_model_cannot_tell_apart():
    chat = load_chat("tiny-text")
    chat.tok.chat_template = chat.tok.chat_template.replace("{{ m.content }}", "{{ m.content | trim }}")
    with pytest.raises(InputError, match="'dog' and 'dog ' are the same tokens"): LabelSet(chat, ["dog", "cat", "dog "])


def test_an_adapter_that_is_not_merged(parts):
    from peft import LoraConfig, get_peft_model
    model, chat, prompts = parts
    expected = LabelEngine(model, chat, LABELS).log_probs(prompts[:1])
    names = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name.endswith(("q_proj", "query_key_value")) and "audio" not in name]
    adapted = get_peft_model(model, LoraConfig(target_modules=names))
    np.testing.assert_allclose(LabelEngine(adapted.eval(), chat, LABELS).log_probs(prompts[:1]), expected, atol=1e-4)
    adapted.unload()


@pytest.fixture
def here(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)


def settings(**kwargs): return InferSettings(**dict(input="in.csv", output="out.csv", model_name="tiny", batch_size=1, num_workers=1, labels="labels.txt") | kwargs)


def test_answers_from_a_set_resume_and_are_mended(here):
    make_sounds(Path(), 10, seed=1)
    rows = [r["audio"] for r in csv.DictReader(open("sounds.csv"))]
    Path("in.csv").write_text("audio,margin,note\n" + "".join(f"{a},x,n{i}\n" for i, a in enumerate([*rows[:3], "lost.wav", *rows[3:]])))
    Path("labels.txt").write_text("\ufeffsiren\r\n\r\ntone \r\nnoise\r\n", encoding="utf-8")
    infer(settings(output="whole.csv"))
    found = list(csv.DictReader(open("whole.csv")))
    assert list(found[0]) == ["audio", "margin", "note", "prediction", "probability"], "a column that was there stays in its place"
    assert (found[3]["prediction"], found[3]["probability"], found[3]["margin"]) == ("", "", "")
    good = [r for r in found if r["audio"] != "lost.wav"]
    assert {r["prediction"] for r in good} <= {"siren", "tone", "noise"}
    assert all(1/3 <= float(r["probability"]) <= 1 and 0 <= float(r["margin"]) <= float(r["probability"]) for r in good)
    def stop(rows, done, total): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): infer(settings(), [stop])
    Path("labels.txt").write_text("siren\ntone\nnoise\nbeeps\n")
    with pytest.raises(InputError, match="the contents of --labels have changed"): infer(settings())
    Path("labels.txt").write_text("siren\ntone\nnoise\n")
    report = infer(settings())
    assert report.resumed == 8 and Path("out.csv").read_bytes() == Path("whole.csv").read_bytes()
    Path("lost.wav").write_bytes(Path(rows[0]).read_bytes())
    assert not infer(settings(retry_rejects=True)).failed
    mended = list(csv.DictReader(open("out.csv")))
    assert mended[3]["prediction"] == mended[0]["prediction"] and [r for r in mended if r["audio"] != "lost.wav"] == good


def test_records_and_the_labels_of_the_input(here, monkeypatch):
    records = [dict(prompt=f"Question {i}", prediction=answer) for i, answer in enumerate(["yes", "no", "yes", ""])]
    Path("in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    s = settings(input="in.jsonl", output="out.jsonl", model_name="tiny-text", labels="auto")
    infer(s)
    out = [json.loads(line) for line in open("out.jsonl")]
    assert [list(r) for r in out] == [["prompt", "prediction", "probability", "margin"]]*4
    assert {r["prediction"] for r in out} <= {"yes", "no"} and all(.5 <= r["probability"] <= 1 for r in out)
    monkeypatch.setattr(identity, "MOST_LABELS", 1)
    with pytest.raises(InputError, match="more than 1 different predictions"): infer(replace(s, output="other.jsonl"))
    Path("in.jsonl").write_text("".join(json.dumps(dict(prompt=r["prompt"])) + "\n" for r in records))
    with pytest.raises(InputError, match="has no predictions to take labels from"): infer(replace(s, output="other.jsonl"))


@pytest.mark.parametrize("text, fault", [("", "the file is empty"), ("a\n\n", "at least two labels, not 1"), ("a\nb\na\n", "'a' occurs twice"), ("a\nb\u2028c\n", "contains a line break")])
def test_files_that_are_no_set(here, text, fault):
    Path("labels.txt").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=f"^--labels labels.txt: .*{fault}"): identity.read_labels(settings(), None)


@pytest.mark.parametrize("data, fault", [(None, "labels.txt: No such file or directory; there is .*LABELS.txt, which differs in case"), ("狗叫声\n猫叫声音\n鸟鸣声\n".encode("gb18030"), "labels.txt:1: byte 0x.. is not UTF-8; .*save"),
    ("siren\ncafé\n".encode("latin-1"), "labels.txt:2: byte 0xe9 is not UTF-8; .*save (it|the file) as UTF-8")])
def test_files_of_labels_that_cannot_be_read(here, data, fault):
    if data is None: Path("LABELS.txt").write_text("a\nb\n")
    else: Path("labels.txt").write_bytes(data)
    with pytest.raises(InputError, match=f"^--labels {fault}") as e: identity.read_labels(settings(), None)
    assert "--encoding" not in str(e.value)


def test_options_of_generation_make_no_sense_with_labels():
    with pytest.raises(InputError, match="leave out --max-new-tokens, --temperature$"): settings(temperature=.5, max_new_tokens=4)
