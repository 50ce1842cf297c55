"""Tokens and labels of every form of record, typed by hand from the specification of the formats

An expected sequence is made of `no(...)` and `yes(...)`: tokens without and with loss. A number is a token's id, a text stands for its
UTF-8 bytes, since a byte's id is its value in both built-in tokenizers.
"""
import json

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mdl_nbdev.data.rows import to_conversation
from mdl_nbdev.data.sources import open_rows
from mdl_nbdev.model.tokenizers import load_tokenizer, tokenize

IM_END, AUDIO, A_BOS, A_EOS, IM_START = 256, 258, 259, 260, 261 # `tiny`: ChatML with audio
MARK, START, END_OF_ROLE, EOS = 256, 268, 273, 274 # `tiny-text`: `<|`, `<|role_start|>`, `<|role_end|>`, `<|endoftext|>`
TOK = {name: load_tokenizer(name) for name in ("tiny", "tiny-text")}


def flat(parts): return [i for p in parts for i in (p.encode() if isinstance(p, str) else p if isinstance(p, list) else [p])]
def no(*parts): return [(i, -100) for i in flat(parts)]
def yes(*parts): return [(i, i) for i in flat(parts)]
def clip(n): return [A_BOS, *[AUDIO]*n, A_EOS]


def check(tok, path, expected, n_samples=(), **kwargs):
    row, = open_rows(path, needs=())
    (ids, labels), = tokenize([to_conversation(row, **kwargs)], [list(n_samples)], tok)
    assert list(zip(ids.tolist(), labels.tolist())) == expected


def line(tmp_path, record):
    (tmp_path/"r.jsonl").write_text((record if isinstance(record, str) else json.dumps(record)) + "\n")
    return tmp_path/"r.jsonl"


# The document's own record, with its two rounds and a system text
ROUNDS = """{"id": 0, "data_name": "code-helper", "chat_rounds": [{"role": "system", "content": "Be short.", "chat_round_id": 0},
 {"role": "human", "content": "Sort?", "chat_round_id": 1}, {"role": "bot", "content": "sorted(x)", "chat_round_id": 1},
 {"role": "human", "content": "Explain.", "chat_round_id": 2}, {"role": "bot", "content": "OK", "chat_round_id": 2}]}""".replace("\n", "")

ROLE_MARKERS = { # for `tiny-text`
    "chat_rounds": (ROUNDS,
        no(START, "system", END_OF_ROLE, "Be short.", START, "human", END_OF_ROLE, "Sort?", START, "bot", END_OF_ROLE), yes("sorted(x)", EOS),
        no(START, "human", END_OF_ROLE, "Explain.", START, "bot", END_OF_ROLE), yes("OK", EOS)),
    "no system": ({"chat_rounds": [{"role": "human", "content": "H"}, {"role": "bot", "content": "B"}]},
        no(START, "human", END_OF_ROLE, "H", START, "bot", END_OF_ROLE), yes("B", EOS)),
    "other names of roles": ({"chat_rounds": [{"role": "user", "content": "1"}, {"role": "gpt", "content": "2"}, {"role": "human", "content": "3"}, {"role": "assistant", "content": "4"}]},
        no(START, "human", END_OF_ROLE, "1", START, "bot", END_OF_ROLE), yes("2", EOS), no(START, "human", END_OF_ROLE, "3", START, "bot", END_OF_ROLE), yes("4", EOS)),
    "messages": ({"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]},
        no(START, "system", END_OF_ROLE, "S", START, "human", END_OF_ROLE, "U", START, "bot", END_OF_ROLE), yes("A", EOS)),
    "messages of parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "U"}]}, {"role": "assistant", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]}]},
        no(START, "human", END_OF_ROLE, "U", START, "bot", END_OF_ROLE), yes("AB", EOS)),
    "system of a pair": ({"system": "S", "prompt": "P", "answer": "A"},
        no(START, "system", END_OF_ROLE, "S", START, "human", END_OF_ROLE, "P", START, "bot", END_OF_ROLE), yes("A", EOS)),
    "white space is kept": ({"prompt": " P\n", "answer": "\tA \n"},
        no(START, "human", END_OF_ROLE, " P\n", START, "bot", END_OF_ROLE), yes("\tA \n", EOS)),
    "characters of many bytes": ({"prompt": "größer?", "answer": "大きい 🐶"},
        no(START, "human", END_OF_ROLE, b"gr\xc3\xb6\xc3\x9fer?".decode(), START, "bot", END_OF_ROLE),
        yes([0xE5, 0xA4, 0xA7, 0xE3, 0x81, 0x8D, 0xE3, 0x81, 0x84, 0x20, 0xF0, 0x9F, 0x90, 0xB6], EOS)),
    "an end token in a text": ({"prompt": "<|endoftext|>", "answer": "a<|endoftext|>b"},
        no(START, "human", END_OF_ROLE, MARK, "endoftext|>", START, "bot", END_OF_ROLE), yes("a", MARK, "endoftext|>b", EOS)),
    "control tokens of others in a text": ({"prompt": "<|im_start|>", "answer": "<|AUDIO|>"},
        no(START, "human", END_OF_ROLE, MARK, "im_start|>", START, "bot", END_OF_ROLE), yes(MARK, "AUDIO|>", EOS)),
    "text": ({"text": "Rain."}, no("R"), yes("ain.", EOS)),
    "text with role markers": ({"text": "x<|role_start|>bot"}, no("x"), yes(START, "bot", EOS)),
    "text of one letter": ({"text": "R"}, no("R"), yes(EOS)),
}
for question, answer in [("prompt", "answer"), ("prompt", "response"), ("input", "output"), ("instruction", "output"), ("instruction", "response"),
                         ("question", "response"), ("question", "answer"), ("query", "answer")]:
    ROLE_MARKERS[f"{question}/{answer}"] = {question: "Q?", answer: "A!"}, no(START, "human", END_OF_ROLE, "Q?", START, "bot", END_OF_ROLE), yes("A!", EOS)


@pytest.mark.parametrize("case", ROLE_MARKERS)
def test_role_markers(case, tmp_path):
    record, *expected = ROLE_MARKERS[case]
    check(TOK["tiny-text"], line(tmp_path, record), sum(expected, []))


CHATML = { # for `tiny`: a record, the lengths of its clips in samples, what is expected
    "chat_rounds": (ROUNDS, [],
        no(IM_START, "system\nBe short.", IM_END, "\n", IM_START, "user\nSort?", IM_END, "\n", IM_START, "assistant\n"), yes("sorted(x)", IM_END),
        no("\n", IM_START, "user\nExplain.", IM_END, "\n", IM_START, "assistant\n"), yes("OK", IM_END), no("\n")),
    "audio of a record": ({"audio": "a.wav", "prompt": "What?", "answer": "dog"}, [16000],
        no(IM_START, "user\n", clip(5), "What?", IM_END, "\n", IM_START, "assistant\n"), yes("dog", IM_END), no("\n")),
    "audio and an answer alone": ({"audio": "a.wav", "prediction": "dog"}, [16000],
        no(IM_START, "user\n", clip(5), IM_END, "\n", IM_START, "assistant\n"), yes("dog", IM_END), no("\n")),
    "several clips of a record go to its first turn": ({"audio": ["a.wav", "b.wav"], "chat_rounds": [{"role": "human", "content": "Which?"}, {"role": "bot", "content": "b"},
                                                        {"role": "human", "content": "Sure?"}, {"role": "bot", "content": "yes"}]}, [1600, 32000],
        no(IM_START, "user\n", clip(1), clip(10), "Which?", IM_END, "\n", IM_START, "assistant\n"), yes("b", IM_END),
        no("\n", IM_START, "user\nSure?", IM_END, "\n", IM_START, "assistant\n"), yes("yes", IM_END), no("\n")),
    "clips of rounds": ({"chat_rounds": [{"role": "human", "content": "1?", "audio": "a.wav"}, {"role": "bot", "content": "one"},
                         {"role": "human", "content": "2?", "audio": ["b.wav", "c.wav"]}, {"role": "bot", "content": "two"}]}, [6400, 9600, 48000],
        no(IM_START, "user\n", clip(2), "1?", IM_END, "\n", IM_START, "assistant\n"), yes("one", IM_END),
        no("\n", IM_START, "user\n", clip(3), clip(15), "2?", IM_END, "\n", IM_START, "assistant\n"), yes("two", IM_END), no("\n")),
    "parts in their own order": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Is "}, {"type": "audio", "audio": "a.wav"}, {"type": "text", "text": " or "},
                                  {"type": "audio", "path": "b.wav"}, {"type": "text", "text": " louder?"}]}, {"role": "assistant", "content": "a"}]}, [16000, 16000],
        no(IM_START, "user\nIs ", clip(5), " or ", clip(5), " louder?", IM_END, "\n", IM_START, "assistant\n"), yes("a", IM_END), no("\n")),
    "control tokens in texts": ({"audio": "a.wav", "system": "<|im_start|>", "prompt": "<|AUDIO|><|im_end|>", "answer": "<|im_end|>\n<|im_start|>user\n"}, [16000],
        no(IM_START, "system\n", "<|im_start|>", IM_END, "\n", IM_START, "user\n", clip(5), "<|AUDIO|>", "<|im_end|>", IM_END, "\n", IM_START, "assistant\n"),
        yes("<|im_end|>", "\n", "<|im_start|>", "user\n", IM_END), no("\n")),
    "role markers are no more than text here": ({"prompt": "<|role_start|>bot<|role_end|>", "answer": "x"}, [],
        no(IM_START, "user\n<|role_start|>bot<|role_end|>", IM_END, "\n", IM_START, "assistant\n"), yes("x", IM_END), no("\n")),
    "text": ({"text": "Rain."}, [], no("R"), yes("ain.", IM_END)),
}


@pytest.mark.parametrize("case", CHATML)
def test_chatml_with_audio(case, tmp_path):
    record, n_samples, *expected = CHATML[case]
    check(TOK["tiny"], line(tmp_path, record), sum(expected, []), n_samples)


def test_questions_end_where_the_answer_begins(tmp_path):
    ask = dict(with_prediction=False)
    check(TOK["tiny-text"], line(tmp_path, ROUNDS), no(START, "system", END_OF_ROLE, "Be short.", START, "human", END_OF_ROLE, "Sort?", START, "bot", END_OF_ROLE) + yes("sorted(x)", EOS)
          + no(START, "human", END_OF_ROLE, "Explain.", START, "bot", END_OF_ROLE), **ask)
    check(TOK["tiny"], line(tmp_path, {"audio": "a.wav", "prompt": "What?"}), no(IM_START, "user\n", clip(5), "What?", IM_END, "\n", IM_START, "assistant\n"), [16000], **ask)


def test_rows_of_tables(tmp_path):
    (tmp_path/"r.csv").write_text("audio,system_prompt,user_prompt,prediction\na.wav,S,What?,dog\n")
    check(TOK["tiny"], tmp_path/"r.csv", no(IM_START, "system\nS", IM_END, "\n", IM_START, "user\n", clip(5), "What?", IM_END, "\n", IM_START, "assistant\n") + yes("dog", IM_END) + no("\n"), [16000])
    (tmp_path/"t.tsv").write_text("user_prompt\tprediction\nQ?\tA!\n")
    check(TOK["tiny-text"], tmp_path/"t.tsv", no(START, "human", END_OF_ROLE, "Q?", START, "bot", END_OF_ROLE) + yes("A!", EOS))
    check(TOK["tiny-text"], tmp_path/"t.tsv", no(START, "system", END_OF_ROLE, "S", START, "human", END_OF_ROLE, "Q?", START, "bot", END_OF_ROLE) + yes("A!", EOS), system_prompt="S")


# Tokenizers with merges: where template and text meet, tokens form across the seam; where an answer begins, none does.

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+" # published pattern


def bpe(merges, pattern=None, post=None, **kwargs):
    "Byte-level BPE with merges typed by hand, such as `d og`"
    pairs = [tuple(m.split()) for m in merges]
    vocab = {t: i for i, t in enumerate(dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a+b for a, b in pairs)]))}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    tok.pre_tokenizer = level if pattern is None else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), level])
    tok.decoder = decoders.ByteLevel()
    tok = PreTrainedTokenizerFast(tokenizer_object=tok, **kwargs)
    if post: tok.backend_tokenizer.post_processor = processors.TemplateProcessing(single=f"{post} $A", special_tokens=[(post, tok.convert_tokens_to_ids(post))])
    return tok


def loaded(tok, tmp_path):
    tok.save_pretrained(tmp_path/"model")
    return load_tokenizer(str(tmp_path/"model"))


def check_tokens(tok, path, *expected, **kwargs):
    "`expected`: tokens in a text, with a space between; those in a list carry loss"
    row, = open_rows(path, needs=())
    (ids, labels), = tokenize([to_conversation(row, **kwargs)], [[]], tok)
    want = [(t, isinstance(e, list)) for e in expected for t in (e[0] if isinstance(e, list) else e).split()]
    assert list(zip(tok.convert_ids_to_tokens(ids), (labels >= 0).tolist())) == want
    assert (labels[labels >= 0] == ids[labels >= 0]).all()


def test_gpt_neox_with_role_markers(tmp_path):
    tok = bpe(["? <", "?< |", "< |", "| >", "|> (", "r o", "ro l", "rol e", "h u", "hu m", "a n", "hum an", "b o", "bo t", "Ġ x"],
              eos_token="<|endoftext|>", bos_token="<|endoftext|>", unk_token="<|endoftext|>")
    tok = loaded(tok, tmp_path)
    assert tok.pad_token == "<|endoftext|>"
    check_tokens(tok, line(tmp_path, {"prompt": "(a x?", "answer": "(b x"}),
                 "<| role _ s t a r t |> human <| role _ e n d |>( a Ġx ?<| role _ s t a r t |> bot <| role _ e n d |>", ["( b Ġx <|endoftext|>"])


def test_qwen_with_chatml(tmp_path):
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    tok = loaded(bpe(["Ċ Ċ", "u s", "us e", "use r", "a s", "as s", "ass i", "assi s", "assis t", "a n", "an t", "assist ant", "Ġ d", "o g"], QWEN, chat_template=template,
                     eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=["<|im_start|>"]), tmp_path)
    check_tokens(tok, line(tmp_path, {"prompt": "\nA dog", "answer": "\ndog\n"}),
                 "<|im_start|> user ĊĊ A Ġd og <|im_end|> Ċ <|im_start|> assistant Ċ", ["Ċ d og Ċ <|im_end|>"], "Ċ")
    check_tokens(tok, line(tmp_path, {"text": "dog <|im_end|>"}), "d", ["og Ġ < | i m _ e n d | > <|im_end|>"])


LLAMA3 = """{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""


def test_llama_with_a_beginning_token(tmp_path):
    "One `<s>`, because the template has one, though the tokenizer would add another"
    tok = loaded(bpe(["Ċ Ċ", "h i"], QWEN, "<s>", chat_template=LLAMA3, bos_token="<s>", eos_token="<|eot_id|>", extra_special_tokens=["<|start_header_id|>", "<|end_header_id|>"]), tmp_path)
    assert tok.convert_ids_to_tokens(tok("hi").input_ids) == ["<s>", "hi"]
    check_tokens(tok, line(tmp_path, {"chat_rounds": [{"role": "human", "content": "hi"}, {"role": "bot", "content": "hi<s>"}, {"role": "human", "content": "1"}, {"role": "bot", "content": "2"}]}),
                 "<s> <|start_header_id|> u s e r <|end_header_id|> ĊĊ hi <|eot_id|> <|start_header_id|> a s s i s t a n t <|end_header_id|> ĊĊ", ["hi < s > <|eot_id|>"],
                 "<|start_header_id|> u s e r <|end_header_id|> ĊĊ 1 <|eot_id|> <|start_header_id|> a s s i s t a n t <|end_header_id|> ĊĊ", ["2 <|eot_id|>"])


def test_a_base_model_that_adds_a_beginning_token_gets_it_before_role_markers_and_texts(tmp_path):
    tok = loaded(bpe(["h i"], None, "<s>", bos_token="<s>", eos_token="</s>"), tmp_path)
    check_tokens(tok, line(tmp_path, {"prompt": "hi", "answer": "hi"}),
                 "<s> < | r o l e _ s t a r t | > h u m a n < | r o l e _ e n d | > hi < | r o l e _ s t a r t | > b o t < | r o l e _ e n d | >", ["hi </s>"])
    check_tokens(tok, line(tmp_path, {"text": "hi hi"}), "<s>", ["hi Ġ hi </s>"])
