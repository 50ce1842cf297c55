"Token ids and labels: for any conversation, templates and tokenizers of many kinds, and against transformers' own tokenization"
import copy
import itertools
import json
import pickle
import re
import string
import unicodedata
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.settings import ConvertSettings
from mdl_nbdev.data.conversations import Conversation
from mdl_nbdev.model.byte_tokenizer import byte_tokenizer
from mdl_nbdev.model.chat import Chat, Example
from mdl_nbdev.model.families import load_chat
from mdl_nbdev.model.family import Family
from mdl_nbdev.model.label_view import LabelView
from mdl_nbdev.model.midasheng_encoder import n_audio_tokens
from mdl_nbdev.model.midashenglm_family import AUDIO, CHATML, tiny_tokenizer
from mdl_nbdev.model.template import find_premises, render, render_shape
from mdl_nbdev.model.text_family import ROLE_MARKERS, TextFamily, tiny_text_tokenizer
from mdl_nbdev.model.tokenizers import decode_answer, encode, fingerprint, load_tokenizer, tokenize
from mdl_nbdev.train.convert import convert
from mdl_nbdev.train.dataset import AudioDataset

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
CORPUS = ["the user asks the assistant what is the sound of a dog barking in the rain", "system user assistant \n\n helpful    human bot <|role_start|>human<|role_end|>"] * 20


def trained(tok, bos=None, specials=(), **kwargs):
    "A transformers tokenizer from an untrained one of `tokenizers`, with `bos` added before every text"
    tok.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()) if kwargs.pop("byte_level", True) else [],
                                                        special_tokens=list(specials), show_progress=False))
    tok = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token=bos, **kwargs)
    if bos: tok.backend_tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tok.convert_tokens_to_ids(bos))])
    return tok


def neox(template=ROLE_MARKERS, prefix=False, **kwargs):
    "In the style of GPT-NeoX: byte-level BPE, runs of spaces as tokens that are not control tokens, one token for beginning, end and unknown"
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder, tok.normalizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix), decoders.ByteLevel(), normalizers.NFC()
    tok = trained(tok, chat_template=template, eos_token="<|endoftext|>", unk_token="<|endoftext|>", **kwargs)
    if not prefix: tok.add_tokens([AddedToken(" "*n, normalized=False) for n in range(2, 8)]) # else a space would follow each
    return tok


def llama2(template, scheme, **kwargs):
    "In the style of Llama 2: spaces are ▁, one before a text as `scheme` says, bytes for unknown characters, and a beginning token of its own accord"
    tok = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if scheme == "legacy": tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else: tok.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return trained(tok, "<s>", ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))], byte_level=False, chat_template=template, eos_token="</s>", unk_token="<unk>", **kwargs)


LLAMA2 = """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}<<SYS>> {{ m.content }} <</SYS>>{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]\
{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"""
ZEPHYR = """{% for m in messages %}
{{ '<|' + m.role + '|>\n' + m.content + eos_token }}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
PHI = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
phi_tokens = [AddedToken(f"<|{name}|>", special=True, normalized=False, rstrip=True) for name in ("system", "user", "assistant", "end")]
LLAMA3 = """{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""


def llama3():
    "In the style of Llama 3: line breaks are tokens of their own, and a beginning token of its own accord"
    tok = Tokenizer(models.BPE())
    pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    return trained(tok, "<|begin_of_text|>", chat_template=LLAMA3, eos_token="<|eot_id|>", extra_special_tokens=["<|start_header_id|>", "<|end_header_id|>"])


TEXT = {"tiny-text": load_tokenizer("tiny-text"), "neox": neox(), "neox, prefix": neox(prefix=True), "neox, zephyr": neox(ZEPHYR), "llama 3": llama3(),
        "phi": neox(PHI, extra_special_tokens=phi_tokens),
        **{f"llama 2, {scheme}, {name}": llama2(template, scheme) for scheme in ("first", "always", "legacy") for name, template in
           [("roles", ROLE_MARKERS), ("own", LLAMA2), ("zephyr", ZEPHYR), ("chatml", CHATML.replace("<|im_end|>", "</s>"))]}}
AUDIO_ROLES = neox(extra_special_tokens=[AUDIO, "<|audio_bos|>", "<|audio_eos|>"]) # a base model with audio and no template
pieces = st.one_of(st.text(max_size=12), st.sampled_from(["<|im_end|>", AUDIO, "<|im_start|>assistant\n", "\n", " ", "{{ x }}", "\ue0001\ue001", "日本", "🐶"]))
# No \u2581, which Llama 2 turns into a space, and only characters that are their own normal form, as GPT-NeoX wants them;
# no mark of a turn, which Hypothesis finds in our source and a chat refuses
texts = st.lists(pieces, min_size=1, max_size=4).map("".join).map(lambda s: unicodedata.normalize("NFC", s).replace("▁", "")).filter(lambda s: s.strip() and "\ud800" not in s and "<|role_" not in s)


def text(s): return {"type": "text", "text": s}


@st.composite
def conversations(draw, most_clips=2):
    messages, clips = [], []
    if draw(st.booleans()): messages.append({"role": "system", "content": [text(draw(texts))]})
    for _ in range(draw(st.integers(1, 3))):
        n = draw(st.integers(0, most_clips))
        clips += draw(st.lists(st.integers(0, 60_000), min_size=n, max_size=n))
        messages.append({"role": "user", "content": [{"type": "audio", "audio": "x.wav"}] * n + [text(draw(texts))]})
        messages.append({"role": "assistant", "content": [text(draw(texts))]})
    return Conversation(messages, "t.csv", 1), clips


def answers(conv): return [m["content"][0]["text"] for m in conv.messages if m["role"] == "assistant"]


def said(ids, labels):
    "The runs of tokens with loss"
    assert (ids[labels >= 0] == labels[labels >= 0]).all() and labels[0] == -100
    return [r for r in np.split(labels, np.flatnonzero(np.diff(labels >= 0)) + 1) if r[0] >= 0]


@pytest.mark.parametrize("tok", [TINY, BPE, bpe_tokenizer(DEFAULT_SYSTEM), bpe_tokenizer(BARE_CLIP), bpe_tokenizer(THINKING), AUDIO_ROLES], ids=["bytes", "bpe", "system", "bare", "thinking", "roles"])
@settings(max_examples=60, deadline=None)
@given(case=conversations())
def test_labels_are_the_answers_and_their_end_tokens(tok, case):
    conv, clips = case
    (ids, labels), = tokenize([conv], [clips], tok)
    runs, learned = said(ids, labels), answers(conv)[-1:] if tok.chat_template == THINKING else answers(conv)
    assert [int(r[-1]) for r in runs] == [tok.eos_token_id] * len(runs)
    assert [tok.decode(r[:-1], clean_up_tokenization_spaces=False) for r in runs] == learned
    assert [decode_answer(r, tok) for r in runs] == learned
    assert int((ids == tok.convert_tokens_to_ids(AUDIO)).sum()) == sum(n_audio_tokens(n) for n in clips)


@pytest.mark.parametrize("name", TEXT)
@settings(max_examples=40, deadline=None)
@given(case=conversations(most_clips=0))
def test_labels_of_text_models(name, case):
    conv, tok = case[0], TEXT[name]
    (ids, labels), = tokenize([conv], [[]], tok)
    runs, end = said(ids, labels), tok.convert_tokens_to_ids("<|end|>") if name == "phi" else tok.eos_token_id
    assert [int(r[-1]) for r in runs] == [end] * len(runs)
    assert [decode_answer(r, tok) for r in runs] == [a.strip() if "| trim" in tok.chat_template else a for a in answers(conv)]
    assert tok.bos_token in (None, tok.eos_token) or int((ids == tok.bos_token_id).sum()) == tok.chat_template.count("bos_token")


@pytest.mark.parametrize("name", TEXT)
@settings(max_examples=30, deadline=None)
@given(case=conversations(most_clips=0))
def test_prompts_of_text_models(name, case):
    conv, tok = case[0], TEXT[name]
    (ids, labels), = tokenize([conv], [[]], tok)
    (prompt, _), = tokenize([Conversation(conv.messages[:-1], "t.csv", 1)], [[]], tok)
    assert ids[:len(prompt)].tolist() == prompt.tolist()
    assert labels[len(prompt)] >= 0 and len(said(ids, labels)[-1]) == (labels[len(prompt):] >= 0).sum()


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


@pytest.mark.parametrize("name", TEXT)
@settings(max_examples=30, deadline=None)
@given(said=st.lists(words.map(str.strip), min_size=3, max_size=7))
def test_text_models_see_what_transformers_shows_them(name, said):
    tok, n = TEXT[name], (len(said)-1)//2*2
    messages = [{"role": "system", "content": [text(said[0])]}, *({"role": r, "content": [text(t)]} for r, t in zip(["user", "assistant"]*3, said[1:n+1]))]
    plain = [{"role": m["role"], "content": m["content"][0]["text"]} for m in messages]
    (ids, _), (prompt, _) = tokenize([Conversation(messages, "t.csv", 1), Conversation(messages[:-1], "t.csv", 1)], [[], []], tok)
    show = lambda **kw: tok.apply_chat_template(plain if not kw else plain[:-1], tokenize=True, return_dict=False, **kw)
    assert tok.convert_ids_to_tokens(ids) == tok.convert_ids_to_tokens(show())
    assert prompt.tolist() == show(add_generation_prompt=True)


def turns(*texts): return [{"role": role, "content": [text(t)]} for role, t in zip(["user", "assistant"]*3, texts)]


TRIMS = CHATML.replace("{{ part.text }}", "{{ part.text | trim }}")
LSTRIPS = CHATML.replace("{{ part.text }}", "{{ part.text.lstrip('\\n') if m.role == 'assistant' else part.text }}")
THOUGHTS = CHATML.replace("{{ part.text }}", "{{ part.text.split('</think>')[-1] if m.role == 'assistant' and m != messages[-1] else part.text }}")


@pytest.mark.parametrize("template", [TRIMS, LSTRIPS, THOUGHTS], ids=["trims", "lstrips", "drops earlier thoughts"])
@settings(max_examples=40, deadline=None)
@given(said=st.lists(st.text(" \n\tab.*[(\\", min_size=1, max_size=8).filter(str.strip), min_size=2, max_size=4))
def test_texts_are_trained_as_the_template_shows_them(template, said):
    tok = bpe_tokenizer(template)
    messages = turns(*said[:len(said)//2*2])
    (ids, labels), = tokenize([Conversation(messages, "t.csv", 1)], [[]], tok)
    assert tok.decode(ids) == tok.apply_chat_template(messages, tokenize=False)
    (prompt, _), = tokenize([Conversation(messages[:-1], "t.csv", 1)], [[]], tok)
    assert ids[:len(prompt)].tolist() == prompt.tolist()


@pytest.mark.parametrize("change", ["part.text.split('</think>')[-1]", "part.text | upper", "part.text[:5]", "part.text ~ part.text if '<' in part.text else part.text"])
def test_texts_that_the_template_changes_are_refused(change):
    tok = bpe_tokenizer(CHATML.replace("part.text }}", "(part.text if '\ue000' in part.text or m.role == 'user' else (" + change + ")) }}"))
    conv = Conversation(turns("2+2?", "<think>\nhm\n</think>\n\n4"), "t.csv", 7)
    with pytest.raises(InputError, match=r"t.csv:7: the chat template does not show the text '<think>.* as it is.*--chat-template"): tokenize([conv], [[]], tok)


@pytest.mark.parametrize("expression, proven", [
    ("m.content", True), ("m.content | trim", True), ("m.content.lstrip('\n')", True), ("' ' + m.content + 'a'", True), ("m.content if m.content else '-'", True),
    ("m.content + ('!' if m.content == 'a' or m.content in ['b', '</think>'] else '')", True), ("m.content + ('!' if m.content.startswith('a') or '</think>' in m.content else '')", True),
    ("m.content if m.content is string and m.content is not none else '-'", True), ("m.content | default('-', true)", True), ("(m.content | trim) + ('b' if m.role == 'user' else '')", True),
    ("m.content | upper", False), ("m.content[:5]", False), ("m.content if m.content | length else 'b'", False), ("m.content if m.content | int == 0 else 'b'", False),
    ("m.content ~ ''", False), ("m.content if {'a': 'b'}[m.content] is undefined else 'b'", False), ("m.content + ('b' if messages[0].content == m.content else '')", False), ("'%s' % m.content", False),
    ("m.content.split('a') | join('a')", False), ("(' ' + m.content) | trim", False), ("m.content + (m | tojson)", False), ("m.content if m.content is lower else 'b'", False),
    ("m.content.strip('a')", False), ("m.content.removeprefix('a')", False), ("[m.content] | join", False)])
def test_a_proof_that_a_template_prints_texts_as_they_are(expression, proven):
    tok = PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(BPE.backend_tokenizer), eos_token="<|im_end|>")
    tok.chat_template = "{% for m in messages %}{{ " + expression + " }}{{ eos_token }}{% endfor %}"
    shape, family = (("user", ("text",)), ("assistant", ("text",))), TextFamily()
    rendered = render_shape(tok, family, shape)
    premises = find_premises(tok, family, shape, False, rendered)
    assert (premises is not None) == proven
    held = 0
    for said in itertools.product(["", "a", "b", " a", "b\n", "</think>", "0", "c a", "&"], repeat=2):
        if not premises or not premises.hold(list(said)): continue
        held += 1
        shown = re.sub("\ue000(.)\ue001", lambda found, said=said: said[int(found[1])], rendered)
        assert shown == render(tok, family, [{"role": role, "content": [text(t)]} for (role, _), t in zip(shape, said)]), said
    assert bool(held) == proven


@pytest.mark.parametrize("statements", ["{% set x %}{{ m.content }}{% endset %}{{ x | upper }}", "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(m.content) | upper }}",
                                        "{% filter upper %}{{ m.content }}{% endfilter %}", "{% autoescape true %}{{ m.content }}{% endautoescape %}"])
def test_what_is_printed_into_a_variable_proves_nothing(statements):
    tok = copy.deepcopy(BPE)
    tok.chat_template = "{% for m in messages %}" + statements + "{{ eos_token }}{% endfor %}"
    shape = (("user", ("text",)), ("assistant", ("text",)))
    assert find_premises(tok, TextFamily(), shape, False, render_shape(tok, TextFamily(), shape)) is None


def test_earlier_answers_that_are_not_learned_are_what_the_template_makes_of_them():
    tok, said_twice = bpe_tokenizer(THOUGHTS), turns("2+2?", "<think>hm</think>4", "Sure?", "<think>hm</think>yes")
    def show(messages, **options): return tok.apply_chat_template(messages, tokenize=False, **options)
    with pytest.raises(InputError, match="does not show the text '<think>hm</think>4'"): tokenize([Conversation(said_twice, "t.csv", 1)], [[]], tok)
    conv = Conversation(said_twice, "t.csv", 1).learning_last()
    (ids, labels), (prompt, _) = tokenize([conv, Conversation(said_twice[:-1], "t.csv", 1)], [[], []], tok)
    assert tok.decode(ids) == show(said_twice) and "<think>hm</think>4" not in tok.decode(ids)
    assert tok.decode(prompt) == show(said_twice[:-1], add_generation_prompt=True)
    assert [tok.decode(r) for r in said(ids, labels)] == ["<think>hm</think>yes<|im_end|>"]


# As Qwen3's: an empty thought ends a prompt, a thought is shown with the last answer only, and with those after the last question
QWEN3 = """{% set last = namespace(query=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set last.query = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' and loop.index0 > last.query %}
{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in m.content else '' %}
{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}{{ m.content.split('</think>')[-1].lstrip('\\n') if m.role == 'assistant' else m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""
LAST_SYSTEM = """{% for m in messages %}{% if m.role == 'user' %}[INST] {{ messages[0].content + ' ' if loop.index0 >= messages | length - 2 and messages[0].role == 'system' }}{{ m.content }}[/INST]
{%- elif m.role == 'assistant' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"""


@pytest.mark.parametrize("template, system, learned", [(QWEN3, [], ["4"]), (QWEN3, [("system", "S")], ["4"]), (LAST_SYSTEM, [], ["3", "4"]), (LAST_SYSTEM, [("system", "S")], ["4"])],
    ids=["thoughts", "thoughts and system", "system last, none", "system last"])
def test_an_answer_is_learned_only_after_the_prompt_that_the_model_gets(template, system, learned):
    tok = PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(BPE.backend_tokenizer), eos_token="<|im_end|>", chat_template=template)
    chat = Chat(tok, TextFamily())
    messages = [{"role": r, "content": [text(t)]} for r, t in [*system, ("user", "1+2?"), ("assistant", "3"), ("user", "2+2?"), ("assistant", "4")]]
    e = chat.tokenize([Conversation(messages, "t.csv", 1)])[0].example([])
    assert [tok.decode(r) for r in said(e.input_ids, e.labels)] == [f"{a}<|im_end|>" for a in learned]
    for turn in chat.learned_turns(messages): # what comes before each learned answer is the prompt at that turn
        prompt = chat.tokenize([Conversation(messages[:turn], "t.csv", 1)])[0].example([]).input_ids
        assert e.input_ids[:len(prompt)].tolist() == prompt.tolist() and e.labels[len(prompt)] >= 0
    plain = [{"role": m["role"], "content": m["content"][0]["text"]} for m in messages]
    assert tok.decode(e.input_ids) == tok.apply_chat_template(plain, tokenize=False, enable_thinking=False)


def test_answers_that_are_not_learned_are_counted(tmp_path, capsys):
    rows = [dict(messages=[dict(role=r, content=t) for r, t in zip(["user", "assistant"]*n, ["a", "<think>hm</think>b"]*(n - 1) + ["a", "b"])]) for n in (1, 2, 3)]
    (tmp_path/"rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    chat = Chat(PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(BPE.backend_tokenizer), eos_token="<|im_end|>", chat_template=QWEN3), TextFamily())
    s = ConvertSettings(input=tmp_path/"rows.jsonl", output=tmp_path/"out", model_name="tiny-text", num_workers=1)
    convert(s, chat)
    assert "rows.jsonl: 3 answers not learned: in a whole conversation, the chat template changes the prompt of earlier answers" in capsys.readouterr().err
    data = AudioDataset(tmp_path/"out", chat.fingerprint)
    for e in (data[i] for i in range(3)): assert chat.tok.decode(e.labels[e.labels >= 0]) == "b<|im_end|>"
    convert(replace(s, learn_answers="last", overwrite=True), chat)
    assert "not learned" not in capsys.readouterr().err, "nobody asked for more"
    rows[1]["messages"][-1]["weight"] = 0
    (tmp_path/"rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(InputError, match="rows.jsonl:2: none of its answers can be learned: in a whole conversation"): convert(replace(s, overwrite=True), chat)


def test_the_last_answer_alone_is_learned():
    conv = Conversation(turns("a", "b", "a", "b"), "t.csv", 3)
    assert [m.get("learn") for m in conv.learning_last().messages] == [None, False, None, None]
    assert conv.learning_last().learning_last() == conv.learning_last() != conv
    conv.messages[-1]["learn"] = False
    with pytest.raises(InputError, match="t.csv:3: the last answer has the weight 0"): conv.learning_last()


def test_answers_that_are_not_to_be_learned():
    messages = turns("2+2?", "five", "Sure?", "four")
    messages[1]["learn"] = False
    (ids, labels), (whole, _) = tokenize([Conversation(messages, "t.csv", 1), Conversation(turns("2+2?", "five", "Sure?", "four"), "t.csv", 1)], [[], []], BPE)
    assert ids.tolist() == whole.tolist()
    assert [BPE.decode(r) for r in said(ids, labels)] == ["four<|im_end|>"]


def test_a_begin_token_where_the_tokenizer_adds_one(tmp_path):
    "Without a chat template, and in texts without turns"
    llama2(None, "first").save_pretrained(tmp_path)
    chat = load_chat(str(tmp_path))
    for messages in (turns("hi", "the dog"), [{"role": "text", "content": [text("the dog")]}]):
        e = chat.example(Conversation(messages, "t.csv", 1))
        assert (e.input_ids == chat.tok.bos_token_id).tolist() == [True] + [False]*(len(e.input_ids) - 1)
        assert said(e.input_ids, e.labels)[-1][-1] == chat.tok.eos_token_id


@pytest.mark.parametrize("name, ends", [("phi", ["<|end|>", "<|endoftext|>"]), ("llama 3", ["<|eot_id|>"]), ("neox, zephyr", ["<|endoftext|>"])])
def test_the_end_token_of_the_template_ends_completions(name, ends):
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))
    chat = Chat(TEXT[name], TextFamily())
    assert set(chat.tok.convert_ids_to_tokens(chat.stop_ids(model))) == set(ends)
    model.generation_config.eos_token_id = [0, 1]
    assert {0, 1} < set(chat.stop_ids(model))


def test_a_tokenizer_in_python_is_refused():
    tok = copy.deepcopy(BPE)
    slow = type("Slow", (type(tok),), {"is_fast": property(lambda self: False)})
    tok.__class__ = slow
    with pytest.raises(InputError, match="the tokenizer, Slow, is Python code, not a tokenizer.json; choose another --model-name"): Chat(tok, TextFamily())


def test_clip_tokens_agree_with_the_network():
    from mdl_nbdev.model.midasheng_encoder import n_audio_tokens as network
    assert [n_audio_tokens(n) for n in range(0, 40_000, 7)] == [network(n) for n in range(0, 40_000, 7)]


TEMPLATES = {
    "leaves out clips": (CHATML.replace("<|audio_bos|><|AUDIO|><|audio_eos|>", ""), "shows 0 of a conversation's 1 clips"),
    "leaves out texts": (CHATML.replace("{{ part.text }}", "{% if m.role != 'user' %}{{ part.text }}{% endif %}"), "the chat template, line 2: leaves out the user's text in turns of user, assistant"),
    "leaves out answers": (CHATML.replace("{{ part.text }}", "{% if m.role == 'user' %}{{ part.text }}{% endif %}"), "line 2: leaves out the assistant's text"),
    "repeats texts": (CHATML.replace("{{ part.text }}", "{{ part.text }}{{ part.text }}"), "line 2: repeats the user's text"),
    "turns around": (CHATML.replace("in messages", "in messages | reverse"), "reorders"),
    "no end token": (CHATML.replace("<|im_end|>\n", "\n"), "control token"),
    "text after the answer": (CHATML.replace("<|im_end|>\n", ".<|im_end|>\n"), "control token"),
    "prompts differ": (CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\nWell, {% endif %}"), "differently"),
    "raises": ("{% if messages[0].role == 'user' %}\n{{ raise_exception('who are you?') }}{% endif %}" + CHATML, "t.csv:1: the chat template, line 2: fails on turns of user, assistant: who are you"),
    "adds text to a list": (CHATML.replace("{% if m.content is string %}", "{% set x = '' + m.content %}{% if m.content is string %}"), "the chat template, line 2: .*can only concatenate"),
    "is no Jinja": (CHATML.replace("{% endfor %}{% if add", "{% endfor %}}{% if"), "the chat template, line 3: "),
    "knows no such filter": (CHATML.replace("part.text", "part.text | shout"), "the chat template, line 2: .*shout"),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_unusable_templates_are_refused(case):
    template, why = TEMPLATES[case]
    tok = bpe_tokenizer(template)
    conv = Conversation([{"role": "user", "content": [{"type": "audio", "audio": "x"}, text("q")]}, {"role": "assistant", "content": [text("a")]}], "t.csv", 1)
    with pytest.raises(InputError, match=why): tokenize([conv], [[1600]], tok)


FILES = { # what is in a template file, and what is said of it, after the file's path
    "syntax": ("{% for m in messages %}\n{{ m.content }\n{% endfor %}", r":2: .*unexpected '}'"),
    "never ends": ("{% for m in messages %}\n{{ m.content }}", ":2: .*end of template"),
    "unknown name": ("{% for m in messages %}\n\n{{ speaker.name }}{{ m.content }}{% endfor %}", ":3: .*'speaker' is undefined"),
    "leaves out": ("{% for m in messages %}\n<{{ m.role }}>{{ m.content if m.role == 'user' }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}", ":2: leaves out the assistant"),
    "repeats": ("{% for m in messages %}{{ m.role }}:\n{{ m.content }}{% if m.role == 'user' %}\n{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}",
                ":2,3: .*repeats the user's text"),
    "no end": ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}", ":1: .*does not end an answer"),
    "empty": (" \n", ": this file is empty"),
    "not text": (b"\xff\xfe\x00", ": this file cannot be read as UTF-8"),
    "missing": (None, ": this file cannot be read.*No such file"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_template_file_that_is_wrong_is_told_with_file_and_line(case, tmp_path):
    content, why = FILES[case]
    path = tmp_path/"mine.jinja"
    if content is not None: path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=r"mine\.jinja" + why): load_tokenizer("tiny-text", chat_template=path)


def test_a_template_file_replaces_the_models_own(tmp_path):
    path = tmp_path/"mine.jinja"
    path.write_text("{% for m in messages %}\n{{ m.role|upper }}: {{ m.content }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}\nASSISTANT: {% endif %}\n")
    tok = load_tokenizer("tiny-text", chat_template=path)
    ask = lambda tok: tok.decode(tokenize([Conversation([{"role": "user", "content": [text("q")]}], "t.csv", 1)], [[]], tok)[0][0])
    assert ask(tok) == "USER: q<|endoftext|>\nASSISTANT: "
    assert fingerprint(tok) != fingerprint(load_tokenizer("tiny-text"))
    tok.save_pretrained(tmp_path/"model")
    again = load_tokenizer(str(tmp_path/"model"))
    assert ask(again) == ask(tok) and fingerprint(again) == fingerprint(tok)
    assert pickle.loads(pickle.dumps(tok)).chat_template_file == str(path) # as worker processes get it


def test_a_template_file_that_fails_later_names_row_file_and_line(tmp_path):
    path = tmp_path/"mine.jinja"
    path.write_text("{% for m in messages %}\n{% if m.role == 'system' %}\n{{ raise_exception('no system, please') }}{% endif %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n"
                    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}\n")
    tok = load_tokenizer("tiny-text", chat_template=path)
    messages = [{"role": r, "content": [text("x")]} for r in ("system", "user", "assistant")]
    with pytest.raises(InputError, match=r"rows.jsonl:7: .*mine.jinja:3: .*system, user.*no system, please"): tokenize([Conversation(messages, "rows.jsonl", 7)], [[]], tok)


def test_a_template_may_move_a_system_text():
    "Before the first answer the model gets another prompt than this, so that answer is not learned"
    tok = neox("{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages if m.role != 'system' %}"
               "[{{ m.role }}]{{ messages[0].content + '/' if m == messages[ns.last] }}{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}")
    messages = [{"role": r, "content": [text(t)]} for r, t in zip(["system", "user", "assistant", "user", "assistant"], "SQAqa")]
    (ids, labels), = tokenize([Conversation(messages, "t", 1)], [[]], tok)
    assert str(LabelView(Example(ids, labels, []), tok)).splitlines()[0] == "[user]Q<|endoftext|>[assistant]A<|endoftext|>[user]S/q<|endoftext|>[assistant]⟦a<|endoftext|>⟧"


def test_every_day_is_the_same_day():
    "As Llama 3's template has it"
    dated = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}|" + CHATML
    (ids, _), = tokenize([Conversation([{"role": "user", "content": [text("q")]}], "t", 1)], [[]], bpe_tokenizer(dated))
    assert BPE.decode(ids).startswith("26 Jul 2024|")


def test_a_template_that_is_changed_counts_at_once():
    tok = bpe_tokenizer(CHATML)
    conv = Conversation([{"role": "user", "content": [text("q")]}], "t.csv", 1)
    before = tokenize([conv], [[]], tok)[0][0]
    tok.chat_template = DEFAULT_SYSTEM
    assert len(tokenize([conv], [[]], tok)[0][0]) > len(before)


def test_a_folder_without_chat_template_and_pad_token(tmp_path):
    for name, saved in [("a", tiny_text_tokenizer()), ("b", neox(None))]:
        saved.save_pretrained(tmp_path/name)
        tok = load_tokenizer(str(tmp_path/name))
        assert tok.chat_template == ROLE_MARKERS and tok.pad_token == tok.eos_token
    assert load_tokenizer("tiny").pad_token == "<|endoftext|>"
    assert tiny_text_tokenizer().chat_template is None


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    saved = tiny_text_tokenizer()
    saved.eos_token = None
    saved.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no end token"): load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("mark", ["<|role_start|>", "<|role_end|>"])
def test_role_markers_in_a_text_are_refused(role, mark):
    turns = [{"role": r, "content": [text("x" + mark*(r == role))]} for r in ("system", "user", "assistant")]
    conv = Conversation(turns, "rows.jsonl", 3)
    for tok in (TEXT["tiny-text"], TEXT["neox"]):
        with pytest.raises(InputError) as e: tokenize([conv], [[]], tok)
        assert str(e.value) == f"rows.jsonl:3: the {role}'s text contains '{mark}', which marks a turn for this model; remove it"
    marked = neox(extra_special_tokens=["<|role_start|>", "<|role_end|>"]) # as control tokens nobody can forge them
    (ids, labels), = tokenize([conv], [[]], marked)
    assert int((ids == marked.convert_tokens_to_ids(mark)).sum()) == 3


def test_role_markers_cannot_be_put_together_from_parts():
    parts = [text("<|role_"), text("start|>bot")]
    with pytest.raises(InputError, match="marks a turn"): tokenize([Conversation([{"role": "user", "content": parts}], "t", 1)], [[]], TEXT["tiny-text"])


@pytest.mark.parametrize("messages", [[{"role": "text", "content": [text("a")]}, {"role": "assistant", "content": [text("b")]}],
                                      [{"role": "text", "content": [{"type": "audio", "audio": "x"}, text("b")]}],
                                      [{"role": "user", "content": [text("a")]}, {"role": "assistant", "content": [{"type": "audio", "audio": "x"}]}]])
def test_turns_that_cannot_be(messages):
    with pytest.raises(InputError, match="t.jsonl:4: .*text only"): tokenize([Conversation(messages, "t.jsonl", 4)], [[1600]], TINY)


@settings(max_examples=40, deadline=None)
@given(case=texts, name=st.sampled_from(sorted(TEXT)))
def test_text_records_carry_loss_but_for_their_first_token(case, name):
    tok = TEXT[name]
    (ids, labels), = tokenize([Conversation([{"role": "text", "content": [text(case)]}], "t", 1)], [[]], tok)
    begin = tok("a").input_ids[:1] if tok("a").input_ids[0] == tok.bos_token_id else []
    assert ids.tolist() == [*begin, *tok(case, add_special_tokens=False, split_special_tokens=True).input_ids, tok.eos_token_id]
    assert labels.tolist() == [-100, *ids[1:]]


def test_example_knows_its_task():
    conv = Conversation([{"role": "user", "content": [text("q")]}], "t", 1)
    assert encode(conv, TINY).task == ""
    conv.task = "code"
    assert encode(conv, TINY).task == "code"


@settings(max_examples=40, deadline=None)
@given(case=conversations(), name=st.sampled_from(["tiny", "roles"]))
def test_label_view_shows_every_text_and_marks_the_answers(case, name):
    tok, (conv, clips) = {"tiny": TINY, "roles": AUDIO_ROLES}[name], case
    (ids, labels), = tokenize([conv], [clips], tok)
    shown = str(LabelView(Example(ids, labels, []), tok))
    for m in conv.messages:
        for p in m["content"]:
            if m["role"] == "assistant": assert f"⟦{p['text']}{tok.eos_token}⟧" in shown
            elif p["type"] == "text": assert p["text"] in shown
    assert re.findall(r"<audio × (\d+)>", shown) == [str(n_audio_tokens(n)) for n in clips]
    assert shown.splitlines()[-1] == f"{len(ids)} tokens, {int((labels >= 0).sum())} with loss"


def test_label_view_numbers_clips_that_stand_side_by_side():
    class Bare(Family):
        name, clip_token = "bare", "<sound>"
        def clip_tokens(self, n_samples): return n_samples
    template = "{% for m in messages %}{% for p in m.content %}{{ '<sound>' if p.type == 'audio' else p.text }}{% endfor %}{{ eos_token }}{% endfor %}"
    chat = Chat(byte_tokenizer(eos_token="<|end|>", extra_special_tokens=["<sound>"], chat_template=template), Bare())
    clips = [{"type": "audio", "audio": ""}]
    conv = Conversation([{"role": "user", "content": [*clips, *clips, text("louder than"), *clips]}, {"role": "assistant", "content": [text("no")]}], "t", 1)
    view = LabelView(chat.tokenize([conv])[0].example([np.zeros(n, np.int16) for n in (2, 5, 3)]), chat)
    assert str(view).startswith("<audio × 2><audio × 5>louder than<audio × 3>")
    assert re.findall(r"🔊(\d) × (\d)", view._repr_html_()) == [("1", "2"), ("2", "5"), ("3", "3")]


@pytest.mark.parametrize("name", TEXT)
def test_label_view_of_text_models(name):
    tok = TEXT[name]
    messages = [{"role": r, "content": [text(t)]} for r, t in [("user", "the dog  barking 日本"), ("assistant", "größer than\nthe 🐶")]]
    (ids, labels), = tokenize([Conversation(messages, "t", 1)], [[]], tok)
    view = LabelView(Example(ids, labels, []), tok)
    shown = str(view)
    assert "the dog  barking 日本" in shown and "größer than\nthe 🐶" in shown.split("⟦")[1].split("⟧")[0]
    assert f"{int((labels >= 0).sum())} with loss" in view._repr_html_()


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


def test_fingerprint_of_a_text_model_sees_its_end_token():
    "Text records and role markers end with it"
    a, b = neox(), neox()
    assert fingerprint(a) == fingerprint(b)
    b.eos_token = "the"
    assert fingerprint(a) != fingerprint(b)


def test_unknown_model_says_that_it_is_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True) # else the hub client tries for a minute
    with pytest.raises(InputError, match="no such folder, and it cannot be fetched") as e: load_tokenizer("nobody/no-such-model")
    assert str(e.value).endswith(".") # the hub's own words end with a sentence


def test_shapes_are_forgotten_once_they_are_too_many():
    "A server meets conversations of new shapes for as long as it runs; texts are tokenized alike before and after"
    chat = Chat(copy.deepcopy(TINY), load_chat("tiny").family)
    first = Conversation([{"role": "user", "content": [text("a")]}])
    before = chat.tokenize([first])[0].ids
    for n in range(600, 700): chat.tokenize([Conversation([{"role": "user", "content": [text("b")]*n}])])
    assert 0 < len(chat.plans) < 60 and 0 < len(chat.renderings) < 60
    assert chat.tokenize([first])[0].ids == before
