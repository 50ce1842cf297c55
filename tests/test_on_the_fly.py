"Clips decoded in the workers of training: the same rows, order, batches and losses as converted data, and what is said of clips that cannot be decoded"
import json
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile as sf
import torch
from torch.utils._pytree import tree_leaves
from training_runs import finish, history, kill_later, start, wait_until, weights

from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.settings import TrainSettings
from mdl_nbdev.data.augment import Augmenter, read_augment
from mdl_nbdev.data.sounds import make_sounds
from mdl_nbdev.model.augmented_rows import AugmentedRows
from mdl_nbdev.model.collate import Collator
from mdl_nbdev.model.families import load_chat
from mdl_nbdev.train.batches import StepSampler
from mdl_nbdev.train.failures import explain_error
from mdl_nbdev.train.loop import EpochLoader
from mdl_nbdev.train.mix import open_mix

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def chat(): return load_chat("tiny")


@pytest.fixture
def table(tmp_path):
    "Clips of several formats, rates and channels, an mp3 whose tag promises a frame too many, parts of a clip, and a text"
    csv = make_sounds(tmp_path, 8, seed=3)
    rng = np.random.default_rng(0)
    for name, rate, shape in [("a.flac", 44_100, (30_011, 2)), ("b.ogg", 48_000, (50_003,)), ("c.mp3", 22_050, (40_001,)), ("e.wav", 11_025, (7_777,))]:
        sf.write(tmp_path/name, rng.uniform(-.2, .2, shape), rate)
    mp3 = bytearray((tmp_path/"c.mp3").read_bytes())
    at = max(mp3.find(b"Info"), mp3.find(b"Xing"))
    mp3[at+8:at+12] = (int.from_bytes(mp3[at+8:at+12], "big") + 1).to_bytes(4, "big")
    (tmp_path/"d.mp3").write_bytes(mp3)
    (tmp_path/"more.csv").write_text("audio,prediction\n" + "".join(f'"{name}",it\n' for name in ["a.flac", "a.flac#t=0.1,0.5&channel=1", "b.ogg", "c.mp3", "d.mp3", "e.wav"]))
    (tmp_path/"talk.jsonl").write_text(json.dumps(dict(prompt="1 + 1 = ?", answer="2")) + "\n" + json.dumps(dict(messages=[
        dict(role="user", content=[dict(type="audio", audio="b.ogg"), dict(type="audio", audio="e.wav"), dict(type="text", text="Which?")]),
        dict(role="assistant", content="both")])) + "\n")
    return csv


def mixes(table, chat):
    paths = [table, table.with_name("more.csv"), table.with_name("talk.jsonl")]
    return [open_mix(paths, chat, table.with_name(f"cache{fly}"), base_dir=table.parent, num_workers=1, on_the_fly=fly) for fly in (False, True)]


def batches(mix, chat, augment=(), num_workers=0, **kw):
    rows = AugmentedRows(mix, chat, Augmenter(read_augment([*augment])), 42, 500) if augment else mix
    lengths = mix.n_tokens if kw.get("pack") else mix.lengths
    loader = EpochLoader(rows, batch_sampler=StepSampler(lengths, 4, 42, task_ids=mix.task_ids, **kw), collate_fn=Collator(chat.pad_id, chat.family), num_workers=num_workers)
    for epoch in range(2):
        loader.set_epoch(epoch)
        yield from (dict(batch.items()) for batch in loader)


@pytest.mark.parametrize("case", [dict(), dict(augment=["speed@1", "noise", "specaugment"]), dict(pack=600), dict(num_workers=2)])
def test_batches_are_those_of_converted_data(table, chat, case):
    converted, fly = mixes(table, chat)
    assert converted.fingerprint() == fly.fingerprint() and str(converted) == str(fly)
    for a, b in zip(batches(converted, chat, **case), batches(fly, chat, **case), strict=True):
        assert a.keys() == b.keys()
        for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True): assert torch.equal(x, y) if torch.is_tensor(x) else x == y


def test_samples_are_not_on_the_disk(table, chat):
    converted, fly = mixes(table, chat)
    sizes = [sum(p.stat().st_size for ds in mix.datasets for p in ds.path.iterdir()) for mix in (converted, fly)]
    assert sizes[0] > converted.n_samples.sum()*2 and sizes[1] < sizes[0]/10


def test_bad_rows_are_reported_as_conversion_does(table, chat):
    table.write_text(table.read_text() + "lost.wav,dog\n")
    (table.with_name("text.wav")).write_text("These are notes")
    table.write_text(table.read_text() + "text.wav,dog\n")
    texts = []
    for fly in (False, True):
        with pytest.raises(InputError) as e: open_mix([table], chat, table.with_name("cache"), base_dir=table.parent, num_workers=1, on_the_fly=fly)
        texts.append(str(e.value))
    assert texts[0] == texts[1] and texts[0].startswith("2 bad rows") and ":10:" in texts[0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_sound_that_is_broken_behind_its_header_ends_the_run_with_its_row(table, chat, num_workers):
    sf.write(table.with_name("nan.wav"), np.float32([0.]*9000 + [np.nan]), 16_000, subtype="FLOAT")
    table.write_text(table.read_text() + "nan.wav,dog\n")
    mix = open_mix([table], chat, table.with_name("cache"), base_dir=table.parent, num_workers=1, on_the_fly=True)
    with pytest.raises(InputError) as e: list(batches(mix, chat, num_workers=num_workers))
    message = str(explain_error(SimpleNamespace(args=SimpleNamespace(world_size=1)), e.value, None) or e.value)
    assert "\n" not in message and message.startswith(f"{table}:10: ") and "nan.wav: contains NaN" in message and "mdl_check" in message


def test_a_clip_that_changes_during_a_run_is_noticed(table, chat):
    mix = open_mix([table], chat, table.with_name("cache"), base_dir=table.parent, num_workers=1, on_the_fly=True)
    clip = mix[0].conversation.clips[0]
    sf.write(clip, np.zeros(len(mix[0].clips[0])), 16_000) # of the same length
    with pytest.raises(InputError, match=rf"{table.name}:2: .* has changed since"): mix[0]
    again = open_mix([table], chat, table.with_name("cache"), base_dir=table.parent, num_workers=1, on_the_fly=True)
    assert again.audio_digest() != mix.audio_digest() and not again[0].clips[0].any()


def test_converted_data_is_refused(table, chat):
    converted, _ = mixes(table, chat)
    with pytest.raises(InputError, match="--on-the-fly: .* is converted already"):
        open_mix([converted.datasets[0].path], chat, table.with_name("cache"), on_the_fly=True)


def test_the_pass_reads_headers_alone(table, chat, monkeypatch):
    from mdl_nbdev.data import audio
    monkeypatch.setattr(audio, "resample", None) # what decoding needs
    mix = open_mix([table, table.with_name("more.csv")], chat, table.with_name("cache"), base_dir=table.parent, num_workers=1, on_the_fly=True)
    assert len(mix) == 14


def arguments(csv, **kw):
    settings = dict(train_dataset=csv, base_dir=csv.parent, model_name="tiny", lr=2e-3, train_target="projector", batch_size=4, num_epochs=3, logging_steps=1, save_steps=2,
                    validation_split=.2, eval_steps=4, num_workers=2, augment="speed,noise", sample_answers=0)
    return [x for k, v in (settings | kw).items() for x in (f"--{k}", v)]


@pytest.mark.slow
def test_losses_are_those_of_a_converted_run_also_after_kills(table, tmp_path):
    log, run = tmp_path/"log", tmp_path/"run"
    env = dict(MDL_CACHE=str(tmp_path/"mdl"))
    finish(start([*arguments(table), "--output", tmp_path/"whole"], log, env=env), log)
    again = [*arguments(table, on_the_fly="true"), "--output", run, "--resume_from_checkpoint", "true"]
    for _ in range(2):
        process = start(again, log, env=env)
        before = set(run.glob("checkpoint-*"))
        wait_until(lambda seen=before: set(run.glob("checkpoint-*")) - seen, process)
        kill_later(process, .3)
    finish(start(again, log, env=env), log)
    assert history(run) == history(tmp_path/"whole") and weights(run) == weights(tmp_path/"whole")


def test_a_run_is_not_resumed_in_the_other_way_without_a_word():
    from mdl_nbdev.train.identity import differences, identity
    runs = [identity(TrainSettings(train_dataset="a.csv", output="run", model_name="tiny", on_the_fly=fly)) for fly in (False, True)]
    assert differences(*runs) == ["--on-the-fly: was false, is true"]
