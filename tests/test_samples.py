"What a sample answer shows: texts of the conversation, never text that was parsed out of tokens"
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mdl_nbdev.model.families import load_chat
from mdl_nbdev.train.mix import open_mix
from mdl_nbdev.train.samples import sample_request

CHAT = load_chat("tiny-text")
ROUNDS = [("human", "user\nis a role, and so is <|im_start|>"), ("bot", "first"), ("human", "second?"), ("bot", " two  words ")]
ROWS = {
    "one turn": (dict(prompt="dog", answer="d o g"), dict(question="dog", reference="d o g")),
    "a system prompt": (dict(system="Be terse.", prompt="dog", answer="god"), dict(question="dog", reference="god", system="Be terse.")),
    "several turns": (dict(chat_rounds=[dict(role=r, content=c) for r, c in ROUNDS]),
                      dict(question="second?", reference="two  words", turns=[dict(role="user", text=ROUNDS[0][1]), dict(role="assistant", text="first")])),
}


@pytest.fixture
def ask(tmp_path):
    "The request and the facts of the only row of a file"
    def asked(record):
        (tmp_path/"rows.jsonl").write_text(json.dumps(record) + "\n")
        mix = open_mix([tmp_path/"rows.jsonl"], CHAT, tmp_path/"data", model_name="tiny-text")
        return mix, *sample_request(mix, 0, CHAT, tmp_path)
    return asked


@pytest.mark.parametrize("case", ROWS)
def test_facts(ask, case):
    record, expected = ROWS[case]
    mix, request, facts = ask(record)
    assert facts == dict(row=0, task="rows", clips=[], **expected)
    completion = mix[0].input_ids[len(request.example.input_ids):]
    assert CHAT.decode_completion(completion).strip() == expected["reference"], "the prompt ends where the last answer begins"


def test_a_row_whose_last_turn_was_cut_off(ask):
    "The answer that is left is the one that is asked for"
    mix, _, _ = ask(ROWS["several turns"][0])
    example = mix[0]
    n = int(example.spans[2, 0])
    class Cut:
        sample_rate = 16_000
        def __getitem__(self, i): return replace(example, input_ids=example.input_ids[:n], labels=example.labels[:n], spans=np.minimum(example.spans, n))
    facts = sample_request(Cut(), 0, CHAT, Path())[1]
    assert (facts["question"], facts["reference"]) == (ROUNDS[0][1], "first") and "turns" not in facts


def test_a_dataset_without_conversations(ask):
    "Folders that earlier versions converted: the prompt is shown as one text"
    mix, _, _ = ask(ROWS["a system prompt"][0])
    example = mix[0]
    class Old:
        sample_rate = 16_000
        def __getitem__(self, i): return replace(example, conversation=None, spans=None)
    facts = sample_request(Old(), 0, CHAT, Path())[1]
    assert "Be terse." in facts["question"] and "dog" in facts["question"] and facts["reference"] == "god"
    assert not {"system", "turns"} & set(facts)
