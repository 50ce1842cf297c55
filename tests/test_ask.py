"One clip, one answer: the confidence is that of a full pass, and the model is loaded once"
import math

import numpy as np
import pytest
import soundfile as sf

from mdl_nbdev import InferSettings, ask, infer
from mdl_nbdev.base.errors import InputError
from mdl_nbdev.data.sounds import make_sounds
from mdl_nbdev.data.sources import open_rows
from mdl_nbdev.infer.ask import LOADED, Answer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def sounds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_sounds(".", 4)


def test_answers_are_those_of_infer(sounds, monkeypatch):
    from mdl_nbdev.model import engine
    loads, load = [], engine.load_engine
    monkeypatch.setattr(engine, "load_engine", lambda s: loads.append(s.model_name) or load(s))
    LOADED.clear()
    rows = list(open_rows(sounds).rows())
    found = [ask("tiny", r.audio, "What is it?", max_new_tokens=9) for r in rows]
    assert loads == ["tiny"] and len(LOADED) == 1, "the model stays loaded"
    infer(InferSettings(input=sounds, output="out.csv", model_name="tiny", user_prompt="What is it?", max_new_tokens=9, confidence=True))
    f = open_rows("out.csv")
    for answer, row in zip(found, f.rows()):
        assert answer.text == (row.prediction or "")
        assert math.log(answer.confidence) == pytest.approx(float(f.values(row)["confidence"]), abs=1e-4)


def test_confidence_by_a_full_pass(sounds):
    import torch

    from mdl_nbdev.data.conversations import Conversation, text_message
    from mdl_nbdev.model.collate import Collator
    from mdl_nbdev.model.families import load_chat
    from mdl_nbdev.model.load import load_model
    answer = ask("tiny", "sounds/0000.wav", max_new_tokens=3)
    assert answer.truncated
    chat, model = load_chat("tiny"), load_model("tiny", dtype=torch.float32).eval()
    conversation = Conversation([{"role": "user", "content": [{"type": "audio", "audio": "sounds/0000.wav"}]}, text_message("assistant", answer.text)])
    example = chat.tokenize([conversation])[0].example(chat.load_clips(conversation))
    inputs = Collator(chat.pad_id, chat.family)([example]).inputs
    labels = inputs.pop("labels")[0]
    at = (labels >= 0).nonzero()[:, 0][:3] # without what ends the answer
    logs = model(**inputs).logits[0].float().log_softmax(-1)
    expected = logs[at - 1, labels[at]].mean().exp()
    if len(labels[labels >= 0]) - 1 == 3: assert answer.confidence == pytest.approx(float(expected), abs=1e-4)


def test_recordings(sounds):
    "An array in memory, of any rate, is the clip that it would be in a file"
    waveform, rate = sf.read("sounds/0000.wav", dtype="int16")
    file = ask("tiny", "sounds/0000.wav", max_new_tokens=5)
    array = ask("tiny", waveform, rate=rate, max_new_tokens=5)
    assert (array.text, array.confidence) == (file.text, file.confidence) and array.name == "recording"
    assert np.array_equal(array.waveform, file.waveform)
    low = ask("tiny", waveform[::2], rate=rate//2, max_new_tokens=5)
    assert len(low.waveform) == pytest.approx(len(file.waveform), abs=2)


def test_a_clip_that_does_not_fit_into_memory(sounds, monkeypatch):
    def fail(*_, **__): raise MemoryError
    monkeypatch.setattr("mdl_nbdev.model.engine.prefill", fail)
    with pytest.raises(MemoryError, match="out of memory with this row alone"): ask("tiny", "sounds/0000.wav")


def test_refused_and_shown(sounds):
    for clip, message in {"gone.wav": "no such file", "sounds.csv": "sounds.csv"}.items():
        with pytest.raises(InputError, match=message): ask("tiny", clip)
    with pytest.raises(InputError, match="--labels: ask generates"): ask("tiny", "sounds/0000.wav", labels="auto")
    with pytest.raises(InputError, match="--confidence"): ask("tiny", "sounds/0000.wav", num_beams=2)
    evil = "<script>alert(1)</script>"
    shown = Answer(evil, .5, evil, np.zeros(1600, np.float32), evil, True)._repr_html_()
    assert "<script" not in shown and shown.count("&lt;script") == 3 and "<audio" in shown and "confidence 50.0%" in shown
    assert "<div>confidence 50.0%, truncated at the token limit</div>" in shown, "the waveform comes below, not beside it"
