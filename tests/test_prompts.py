"The prompts of a training: counted for every kind of data, stored beside the model, used and compared by inference, shown in the card"
import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.settings import InferSettings, MergeSettings, TrainSettings
from mdl_nbdev.data.jsonl import make_record
from mdl_nbdev.data.rows import Row
from mdl_nbdev.data.sounds import make_sounds
from mdl_nbdev.infer.identity import prompt_notes, with_training_prompts
from mdl_nbdev.infer.run import infer
from mdl_nbdev.model.prompts import EXAMPLES, MOST_COUNTED, PROMPTS_FILE, PromptCounts, TrainingPrompts, read_prompts, save_prompts
from mdl_nbdev.model.save import merge_adapter
from mdl_nbdev.train.report import TrainReport, model_card
from mdl_nbdev.train.run import train

pytestmark = pytest.mark.usefixtures("one_thread")


def row(user=None, system=None): return Row("a.wav", system, user, "a dog", "r.csv", 2, ())
def record(**raw): return make_record(raw, "r.jsonl", 1)
def turns(*texts, **more): return record(messages=[dict(role=role, content=text) for role, text in zip(["user", "assistant"]*9, texts)], **more)


def counted(*rows):
    prompts = TrainingPrompts()
    for r in rows: prompts.add(r)
    return prompts


def as_stored(prompts): return TrainingPrompts(*(PromptCounts.from_dict(c.to_dict()) for c in vars(prompts).values()))


COUNTED = {
    "clips alone": ([row(), row()], {None: 2}, {None: 2}),
    "one prompt": ([row("What?"), row("What?", "Be brief.")], {None: 1, "Be brief.": 1}, {"What?": 2}),
    "some rows without": ([row("What?"), row()], {None: 2}, {"What?": 1, None: 1}),
    "a clip before the text": ([row("<audio>What?"), record(prompt="<audio>What?", audio="a.wav", answer="b"), record(prompt="What?", audio="a.wav", answer="b")], {None: 3}, {"What?": 3}),
    "a clip after the text": ([row("What? <audio>"), record(prompt="What? <audio>", audio="a.wav", answer="b")], {None: 2}, {"What? <audio>": 2}),
    "turns": ([turns("A?", "a", "B?", "b", system="S")], {"S": 1}, {"A?": 1, "B?": 1}),
    "a text without turns": ([record(text="Once upon a time")], {}, {}),
    "a record of a clip": ([record(audio="a.wav", answer="b")], {None: 1}, {None: 1}),
}


@pytest.mark.parametrize("rows, system, user", COUNTED.values(), ids=COUNTED)
def test_what_is_counted(rows, system, user, tmp_path):
    prompts = counted(*rows)
    assert (prompts.system.counts, prompts.user.counts) == (system, user)
    save_prompts(prompts, tmp_path)
    assert read_prompts(tmp_path) == prompts


DEFAULTS = {"none": ([None], None), "one": (["What?"]*3, "What?"), "one, and rows without": (["What?", None], None), "two": (["A?", "B?"], None),
            "a clip inside": (["What? <audio>"], None), "nothing at all": ([], None)}


@pytest.mark.parametrize("texts, default", DEFAULTS.values(), ids=DEFAULTS)
def test_the_only_prompt(texts, default):
    counts = PromptCounts()
    for text in texts: counts.add(text)
    assert counts.default == default and PromptCounts.from_dict(counts.to_dict()).default == default


@pytest.mark.parametrize("distinct, stored, complete", [(10, 10, True), (11, EXAMPLES, False), (3*MOST_COUNTED, EXAMPLES, False)])
def test_many_prompts(distinct, stored, complete):
    counts = PromptCounts()
    for n in [0, 0, *range(distinct)]: counts.add(f"prompt {n}")
    again = PromptCounts.from_dict(counts.to_dict())
    assert (again.total, again.distinct, len(again.counts), again.is_complete) == (distinct + 2, min(distinct, MOST_COUNTED), stored, complete)
    assert again.counts["prompt 0"] == 3 and again.default is None and len(counts.counts) <= MOST_COUNTED


DAMAGED = ["", "[]", "{}", "[" * 9999, '{"version": 2, "system": {}, "user": {}}', '{"version": 1, "system": {"total": 1}, "user": {}}', '{"version": 1, "system": 3, "user": 4}']


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_file(text, tmp_path):
    (tmp_path/PROMPTS_FILE).write_text(text)
    with pytest.raises(InputError, match=f"{PROMPTS_FILE}: cannot be read .*remove it and give the prompts as options"): read_prompts(tmp_path)


ONE, NONE = counted(row("What?"), row("What?")), counted(row())
NOTES = { # training, rows, options -> the user prompt that is used, notes
    "from training": (ONE, [row(), row()], {}, "What?", ["user prompt from training, for 2 rows without one: 'What?'"]),
    "the rows have it": (ONE, [row("What?")], {}, "What?", []),
    "the option has it": (ONE, [row()], dict(user_prompt="What?"), "What?", []),
    "another option": (ONE, [row(), row("What?")], dict(user_prompt="Which?"), "Which?", ["warning: 1 of 2 user prompts not as in training: 'Which?' instead of 'What?'"]),
    "an empty option": (ONE, [row()], dict(user_prompt=""), "", ["warning: 1 of 1 user prompt not as in training: none instead of 'What?'"]),
    "other rows": (ONE, [row("A?"), row("A?"), row("B?"), row("C?"), row()], {}, "What?", ["user prompt from training, for 1 row without one: 'What?'",
        "warning: 4 of 5 user prompts not as in training: 'A?' or 'B?' or 1 other instead of 'What?'"]),
    "a second turn": (ONE, [turns("What?", "a", "And then?")], {}, "What?", ["warning: 1 of 2 user prompts not as in training: 'And then?' instead of 'What?'"]),
    "a system prompt": (ONE, [row("What?")], dict(system_prompt="Be brief."), "What?", ["warning: 1 of 1 system prompt not as in training: 'Be brief.' instead of none"]),
    "trained without": (NONE, [row(), row("What?")], {}, None, ["warning: 1 of 2 user prompts not as in training: 'What?' instead of none"]),
    "trained with several": (counted(row("A?"), row("B?"), row("B?")), [row(), row("A?")], {}, None, ["warning: 1 of 2 user prompts not as in training: none instead of 'B?' or 'A?'"]),
    "trained with many": (as_stored(counted(*(row(str(n)) for n in range(99)))), [row(), row("A?")], {}, None, []),
    "not known": (None, [row(), row("A?")], {}, None, []),
    "long ones": (ONE, [row("x\n"*99)], {}, "What?", ["warning: 1 of 1 user prompt not as in training: '" + repr("x\\n"*19)[1:-1] + "...' instead of 'What?'"]),
}


@pytest.mark.parametrize("trained, rows, options, used, notes", NOTES.values(), ids=NOTES)
def test_what_inference_uses_and_says(trained, rows, options, used, notes):
    s = InferSettings(input="in.csv", output="out.csv", model_name="tiny", **options)
    filled = with_training_prompts(s, trained)
    assert filled.user_prompt == used
    assert prompt_notes(s, filled, counted(*rows), trained) == notes


# --- From training to inference

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "A LoRA run with a prompt in its options, and one with several in a column; `final/` is the adapter"
    folder = tmp_path_factory.mktemp("runs")
    sounds = make_sounds(folder, 8, seed=3)
    rows = list(csv.DictReader(open(sounds)))
    with open(folder/"mixed.csv", "w", newline="") as f:
        csv.writer(f).writerows([("audio", "user_prompt", "prediction"), *((r["audio"], f"Prompt {n % 4 // 3}", r["prediction"]) for n, r in enumerate(rows))])
    s = TrainSettings(train_dataset=sounds, base_dir=folder, output=folder/"one", model_name="tiny", max_steps=1, lora_rank=2, merge_lora=False, user_prompt="What do you hear?")
    train(s)
    train(replace(s, train_dataset=[folder/"mixed.csv", sounds], eval_dataset=[folder/"mixed.csv"], output=folder/"several", system_prompt="Be brief.", user_prompt=None, merge_lora=True))
    return folder


def ask(folder, out, **options):
    s = InferSettings(**dict(input=folder/"sounds.csv", base_dir=folder, output=out, model_name="tiny", adapter=folder/"one/final", max_new_tokens=3) | options)
    report = infer(s)
    return Path(out).read_text(), report


def test_every_result_of_a_run_has_its_prompts(runs, tmp_path):
    stored = [read_prompts(runs/"one"/name).user for name in ("final", "checkpoint-1")]
    assert [c.default for c in stored] == ["What do you hear?"]*2 and stored[0].total == 8
    merge_adapter(MergeSettings(adapter=runs/"one/final", output=tmp_path/"merged"))
    assert read_prompts(tmp_path/"merged").user == stored[0]
    merge_adapter(MergeSettings(adapter=runs/"one/final", output=tmp_path/"merged", overwrite=True))
    several = read_prompts(runs/"several/final")
    assert several.user.counts == {"Prompt 0": 6, "Prompt 1": 2, None: 8} and several.system.default == "Be brief."


def test_inference_asks_as_training_did(runs, tmp_path, capfd):
    stored, report = ask(runs, tmp_path/"a.csv")
    line = "user prompt from training, for 8 rows without one: 'What do you hear?'"
    assert report.prompts == [line] and line in str(report) and capfd.readouterr().err.splitlines().count(line) == 1
    given, report = ask(runs, tmp_path/"b.csv", user_prompt="What do you hear?")
    assert given == stored and not report.prompts
    _, report = ask(runs, tmp_path/"c.csv", user_prompt="Name it.")
    assert report.prompts == ["warning: 8 of 8 user prompts not as in training: 'Name it.' instead of 'What do you hear?'"]


def test_an_unfinished_output_keeps_its_prompts(runs, tmp_path):
    "It continues with the option that says the same, and is refused where the prompts are others"
    def stop(rows, done, total): raise KeyboardInterrupt
    s = InferSettings(input=runs/"sounds.csv", base_dir=runs, output=tmp_path/"out.csv", model_name="tiny", adapter=runs/"one/final", max_new_tokens=3, batch_size=1)
    with pytest.raises(KeyboardInterrupt): infer(s, [stop])
    assert json.loads((tmp_path/"out.csv.part.json").read_text())["settings"]["user_prompt"] == "What do you hear?"
    for other in ("", "Name it."):
        with pytest.raises(InputError, match="unfinished run.*--user-prompt was 'What do you hear\\?'"): infer(replace(s, user_prompt=other))
    shutil.copytree(runs/"one/final", tmp_path/"old")
    (tmp_path/"old"/PROMPTS_FILE).unlink()
    with pytest.raises(InputError, match="--user-prompt was 'What do you hear\\?' and is None"): infer(replace(s, adapter=tmp_path/"old"))
    assert infer(replace(s, user_prompt="What do you hear?")).rows == 8


def test_a_model_without_the_file(runs, tmp_path):
    "As before: the rows are asked as they are, and nothing is said"
    shutil.copytree(runs/"one/final", tmp_path/"old")
    (tmp_path/"old"/PROMPTS_FILE).unlink()
    assert ask(runs, tmp_path/"a.csv", adapter=tmp_path/"old")[1].prompts == []
    assert ask(runs, tmp_path/"b.csv", adapter=None)[1].prompts == []


# --- The model card

def card_of(prompts, **options):
    s = TrainSettings(**dict(train_dataset="a.csv", output="runs/dogs", model_name="tiny") | options)
    return model_card(s, TrainReport(s.output, 1, 1, 1), {}, prompts)


def section(card, name): return card.split(f"## {name}\n\n")[1].split("\n\n## ")[0]


COMMAND = "mdl_infer questions.csv --output answers.csv --model-name "
CARDS = {
    "one": (ONE, {}, f"```\n{COMMAND}path/to/this/folder \\\n    --user-prompt 'What?'\n```", ["| system prompt | (none) | 100.0% |", "| user prompt | `What?` | 100.0% |"]),
    "both": (counted(row("Isn't it?", "S")), {}, f"```\n{COMMAND}path/to/this/folder \\\n    --system-prompt S \\\n    --user-prompt 'Isn'\"'\"'t it?'\n```", ["| system prompt | `S` | 100.0% |"]),
    "few": (counted(row("A?"), row("B?"), row("A?")), {}, f"```\n{COMMAND}path/to/this/folder\n```", ["| user prompt | `A?` | 66.7% |", "| user prompt | `B?` | 33.3% |"]),
    "many": (counted(*(row(f"Q{n}") for n in range(12))), {}, None, ["| user prompts | 12 different; examples: |  |", "| user prompt | `Q4` | 8.3% |"]),
    "very many": (counted(*(row(f"Q{n}") for n in range(1200))), {}, None, ["| user prompts | 1,000 or more different; examples: |  |"]),
    "an adapter": (ONE, dict(merge_lora=False), f"```\n{COMMAND}tiny --adapter path/to/this/folder \\\n    --user-prompt 'What?'\n```", []),
    "not known": (None, {}, f"```\n{COMMAND}path/to/this/folder\n```", ["Not known: the data was converted by an earlier version, or by another tool."]),
    "texts": (counted(record(text="Once")), {}, None, ["None: the data is text without turns."]),
    "characters with a meaning": (counted(row("<b>|```\n# x\n---")), {}, f"````\n{COMMAND}path/to/this/folder \\\n    --user-prompt '<b>|```\n# x\n---'\n````", ["| user prompt | ```` <b>\\|```\\n# x\\n--- ```` | 100.0% |"]),
}


@pytest.mark.parametrize("prompts, options, use, lines", CARDS.values(), ids=CARDS)
def test_prompts_in_the_card(prompts, options, use, lines):
    card = card_of(prompts, **options)
    if use: assert section(card, "Use") == use
    assert not set(lines) - set(section(card, "Prompts").splitlines())


def test_datasets_in_the_card(runs):
    card = (runs/"several/final/README.md").read_text()
    cells = [[c.strip() for c in line.split("|")[1:5]] for line in section(card, "Data").splitlines()[2:]]
    assert cells == [["training", "mixed.csv", "mixed", "8"], ["training", "sounds.csv", "sounds", "8"], ["evaluation", "mixed.csv", "mixed", "8"]]
    assert [line for line in section((runs/"one/final/README.md").read_text(), "Use").splitlines() if "prompt" in line] == ["    --user-prompt 'What do you hear?'"]
