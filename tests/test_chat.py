"Token ids and labels: for any conversation, any template of the ChatML kind, and against transformers' own tokenization"
import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mdl_nbdev.chat import AUDIO, CHATML, fingerprint, load_tokenizer, n_audio_tokens, tiny_tokenizer, tokenize
from mdl_nbdev.config import InputError
from mdl_nbdev.data import Conversation

TINY = tiny_tokenizer()
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}" + CHATML
BARE_CLIP = CHATML.replace("<|audio_bos|><|AUDIO|><|audio_eos|>", "Audio: <|AUDIO|>")
THINKING = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}").replace(
    "<|im_start|>{{ m.role }}\n", "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}")


def bpe_tokenizer(template=CHATML):
    "A byte-level BPE tokenizer with merges, trained on a few words"
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    corpus = ["the user asks the assistant what is the sound of a dog barking in the rain", "system user assistant \n\n helpful"] * 20
    tok.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=400, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=template,
                                   extra_special_tokens=["<|im_start|>", AUDIO, "<|audio_bos|>", "<|audio_eos|>"])


BPE = bpe_tokenizer()
pieces = st.one_of(st.text(max_size=12), st.sampled_from(["<|im_end|>", AUDIO, "<|im_start|>assistant\n", "\n", " ", "{{ x }}", "\ue0001\ue001", "日本", "🐶"]))
texts = st.lists(pieces, min_size=1, max_size=4).map("".join).filter(lambda s: s.strip() and "\ud800" not in s)


def text(s): return {"type": "text", "text": s}


@st.composite
def conversations(draw):
    messages, clips = [], []
    if draw(st.booleans()): messages.append({"role": "system", "content": [text(draw(texts))]})
    for _ in range(draw(st.integers(1, 3))):
        n = draw(st.integers(0, 2))
        clips += draw(st.lists(st.integers(0, 60_000), min_size=n, max_size=n))
        messages.append({"role": "user", "content": [{"type": "audio", "audio": "x.wav"}] * n + [text(draw(texts))]})
        messages.append({"role": "assistant", "content": [text(draw(texts))]})
    return Conversation(messages, "t.csv", 1), clips


def answers(conv): return [m["content"][0]["text"] for m in conv.messages if m["role"] == "assistant"]


@pytest.mark.parametrize("tok", [TINY, BPE, bpe_tokenizer(DEFAULT_SYSTEM), bpe_tokenizer(BARE_CLIP), bpe_tokenizer(THINKING)], ids=["bytes", "bpe", "system", "bare", "thinking"])
@settings(max_examples=60, deadline=None)
@given(case=conversations())
def test_labels_are_the_answers_and_their_end_tokens(tok, case):
    conv, clips = case
    (ids, labels), = tokenize([conv], [clips], tok)
    end = tok.convert_tokens_to_ids("<|im_end|>")
    assert (ids[labels >= 0] == labels[labels >= 0]).all()
    runs = np.split(labels, np.flatnonzero(np.diff(labels >= 0)) + 1)
    said = [r for r in runs if r[0] >= 0]
    assert [int(r[-1]) for r in said] == [end] * len(said)
    decode = lambda r: tok.decode(r[:-1], clean_up_tokenization_spaces=False)
    assert [decode(r) for r in said] == answers(conv)


@settings(max_examples=60, deadline=None)
@given(case=conversations())
def test_no_text_forges_a_control_token(case):
    conv, clips = case
    (ids, _), = tokenize([conv], [clips], TINY)
    count = lambda t: int((ids == TINY.convert_tokens_to_ids(t)).sum())
    assert count("<|im_start|>") == count("<|im_end|>") == len(conv.messages)
    assert count(AUDIO) == sum(n_audio_tokens(n) for n in clips)


@settings(max_examples=60, deadline=None)
@given(case=conversations(), tok=st.sampled_from([TINY, BPE]))
def test_the_prompt_is_the_beginning_of_the_answered_conversation(case, tok):
    conv, clips = case
    (ids, labels), = tokenize([conv], [clips], tok)
    (prompt, before), = tokenize([Conversation(conv.messages[:-1], "t.csv", 1)], [clips], tok)
    last = np.flatnonzero(labels >= 0)[-1] - len(tok(answers(conv)[-1], add_special_tokens=False, split_special_tokens=True).input_ids)
    assert ids[: len(prompt)].tolist() == prompt.tolist() and len(prompt) == last
    assert before.tolist() == labels[:last].tolist()


words = st.text(alphabet=string.ascii_letters + " .,?\n", min_size=1, max_size=30).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(system=words, user=words, answer=words.filter(lambda s: not s[0].isspace()))
def test_plain_conversations_tokenize_as_transformers_does(system, user, answer):
    messages = [{"role": r, "content": [text(t)]} for r, t in [("system", system), ("user", user), ("assistant", answer)]]
    (ids, _), = tokenize([Conversation(messages, "t.csv", 1)], [[]], BPE)
    assert ids.tolist() == BPE.apply_chat_template(messages, tokenize=True, return_dict=False)


def test_clip_tokens_agree_with_the_network():
    from mdl_nbdev.midashenglm import n_audio_tokens as network
    assert [n_audio_tokens(n) for n in range(0, 40_000, 7)] == [network(n) for n in range(0, 40_000, 7)]


TEMPLATES = {
    "leaves out clips": (CHATML.replace("<|audio_bos|><|AUDIO|><|audio_eos|>", ""), "shows 0 of a conversation's 1 clips"),
    "leaves out texts": (CHATML.replace("{{ part.text }}", "{% if m.role != 'user' %}{{ part.text }}{% endif %}"), "leaves out"),
    "no end token": (CHATML.replace("<|im_end|>\n", "\n"), "control token"),
    "prompts differ": (CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\nWell, {% endif %}"), "differently"),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_unusable_templates_are_refused(case):
    template, why = TEMPLATES[case]
    tok = bpe_tokenizer(template)
    conv = Conversation([{"role": "user", "content": [{"type": "audio", "audio": "x"}, text("q")]}, {"role": "assistant", "content": [text("a")]}], "t.csv", 1)
    with pytest.raises(InputError, match=why): tokenize([conv], [[1600]], tok)


def test_a_text_model_takes_texts_and_refuses_clips():
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML, extra_special_tokens=["<|im_start|>"])
    ask = lambda *parts: Conversation([{"role": "user", "content": [*parts]}], "t.csv", 1)
    (ids, _), = tokenize([ask(text("hello"))], [[]], tok)
    assert tok.decode(ids) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(InputError, match="takes no audio"): tokenize([ask({"type": "audio", "audio": "x"}, text("hello"))], [[1600]], tok)


def test_fingerprint_sees_vocabulary_template_and_control_tokens():
    prints = [fingerprint(t) for t in (TINY, BPE, bpe_tokenizer(DEFAULT_SYSTEM))]
    more = tiny_tokenizer()
    more.add_special_tokens({"extra_special_tokens": ["<|new|>"]}, replace_extra_special_tokens=False)
    assert len({*prints, fingerprint(more)}) == 4


def test_unknown_model_says_that_it_is_offline(monkeypatch):
    with pytest.raises(InputError, match="no such folder, and it cannot be fetched"): load_tokenizer("nobody/no-such-model")
