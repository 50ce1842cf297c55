"Changes of clips in training: what they are, by other means; that they depend on seed, epoch and row alone; what is refused"
import math
from dataclasses import replace

import numpy as np
import pytest
import soundfile as sf
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.settings import TrainSettings
from mdl_nbdev.data.augment import (
    Augmenter,
    Change,
    add_noise,
    change_gain,
    change_speed,
    colored_noise,
    draw_masks,
    in_room,
    noise_from,
    read_augment,
    read_sounds,
    room_response,
)
from mdl_nbdev.data.sounds import make_sounds
from mdl_nbdev.model.augmented_rows import AugmentedRows, augment_facts, check_augment, check_augmentable, open_augmenter, with_clips
from mdl_nbdev.model.chat import Example
from mdl_nbdev.model.collate import Collator
from mdl_nbdev.model.families import load_chat
from mdl_nbdev.model.family import Family
from mdl_nbdev.model.load import load_model
from mdl_nbdev.train.batches import StepSampler
from mdl_nbdev.train.loop import EpochLoader
from mdl_nbdev.train.mix import open_mix
from mdl_nbdev.train.prepare import check_settings

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = ["speed@1", "room", "noise", "gain", "specaugment"]
RATE = 16_000


@pytest.fixture(scope="module")
def csv(tmp_path_factory): return make_sounds(tmp_path_factory.mktemp("sounds"), 24, seed=3)


@pytest.fixture(scope="module")
def chat(): return load_chat("tiny")


@pytest.fixture(scope="module")
def mix(csv, chat): return open_mix([csv], chat, csv.parent/"cache", base_dir=csv.parent)


def rng(seed=0): return np.random.default_rng(seed)
def sine(hertz, n=RATE): return np.float32(.3*np.sin(2*np.pi*hertz*np.arange(n)/RATE))
def decibels(ratio): return 10*math.log10(ratio)
def power(x): return (x.astype(float)**2).mean()


@pytest.mark.parametrize("factor", [.8, .9, 1.0371, 1.25])
def test_speed_raises_the_pitch_and_shortens(factor):
    faster = change_speed(sine(1000), factor)
    assert len(faster) == round(RATE/factor) and faster.dtype == np.float32
    spectrum = np.abs(np.fft.rfft(faster*np.hanning(len(faster)), 1 << 20))
    assert spectrum.argmax()*RATE/(1 << 20) == pytest.approx(1000*factor, abs=.5)
    assert power(faster[500:-500]) == pytest.approx(.045, rel=1e-3)


@given(st.floats(-20, 60), st.integers(3, 5000), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_noise_has_the_ratio(ratio, n, seed):
    clip, noise = np.float32(rng(seed).normal(.01, .1, n)), np.float32(rng(seed + 1).laplace(0, 3, n))
    added = add_noise(clip, noise, ratio).astype(float) - clip
    assert decibels(power(clip)/power(added)) == pytest.approx(ratio, abs=.05 + 10**(ratio/20)*1e-5)
    assert np.corrcoef(added, noise)[0, 1] > .99


@pytest.mark.parametrize("exponent", [0, 1, 2])
def test_generated_noise_falls_with_the_frequency(exponent):
    spectrum = np.abs(np.fft.rfft(colored_noise(1 << 17, exponent, rng())))**2
    octaves = [decibels(spectrum[1 << k:2 << k].mean()) for k in range(8, 16)]
    assert np.diff(octaves) == pytest.approx([-exponent*3.01]*7, abs=.5)


def test_gain():
    assert decibels(power(change_gain(sine(100), -6.5))/power(sine(100))) == pytest.approx(-6.5, abs=1e-4)
    assert change_gain(sine(100), 20).max() == pytest.approx(3, abs=1e-3) # nothing is clipped


@pytest.mark.parametrize("seconds", [.2, .8])
def test_echoes_decay_by_60_decibels(seconds):
    "By Schroeder's backward integration, from 5 to 35 dB below the beginning"
    h = room_response(seconds, RATE, rng()).astype(float)
    left = 10*np.log10((h[1:]**2)[::-1].cumsum()[::-1])
    start, end = np.argmax(left < -5), np.argmax(left < -35)
    assert 2*(end - start)/RATE == pytest.approx(seconds, rel=.05)
    assert h[0] == 1 and (h[1:]**2).sum() == pytest.approx(1, abs=1e-4)


def test_a_room_is_a_convolution_of_the_same_power():
    clip, h = np.float32(rng(1).normal(0, .1, 3000)), room_response(.1, RATE, rng())
    whole = np.convolve(clip.astype(float), h)[:3000]
    assert in_room(clip, h) == pytest.approx(whole*math.sqrt(power(clip)/power(whole)), abs=1e-6)
    assert (in_room(np.zeros(50, np.float32), h) == 0).all()


def test_recorded_noise_is_entered_anywhere_and_repeated():
    recording = np.arange(100, dtype=np.int16)
    parts = [noise_from(recording, 30, rng(seed))*32768 for seed in range(1000)]
    assert all((np.diff(p) == 1).all() for p in parts) and {p[0] for p in parts} == set(range(71))
    assert (np.diff(noise_from(recording, 250, rng())*32768) % 100 == 1).all()


@given(st.floats(0, .5), st.floats(0, .5), st.floats(.1, 60), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_masks_are_in_the_clip_and_no_longer_than_asked(low, more, seconds, seed):
    masks = draw_masks(low, low + more, seconds, rng(seed)).astype(float)
    widths = masks[:, 1] - masks[:, 0]
    assert masks.min() >= 0 and masks.max() <= 1 + 1e-6
    assert (widths[:2] >= low - 1e-6).all() and (widths <= low + more + 1e-6).all() and (widths[2:]*seconds <= 1.001).all()


BAD = {"sped": "got 'sped', expected NAME=LOW..HIGH@PROBABILITY", "speed=fast": "got 'speed=fast'", "speed=0.9...1.1": "got", "speed=0.9-1.1": "got", "": "got ''", "speed=": "got", "noise=10..30dB": "got",
       "speed=0.1..1": "expected a factor, from low to high, within 0.5..2", "gain=5..-5": "expected a dB, from low to high", "noise@0": "expected a probability above 0", "noise@1.5": "probability",
       "speed,speed=0.8..1": "speed is there already", "specaugment=0..1.2": "within 0..1"}


@pytest.mark.parametrize("text", BAD)
def test_a_mistake_is_one_message(text):
    s = TrainSettings(train_dataset="x.csv", output="run", augment=text)
    with pytest.raises(InputError) as e: check_settings(s)
    assert BAD[text] in str(e.value) and str(e.value).startswith("--augment") and "\n" not in str(e.value)


def test_what_is_left_out_is_usual():
    assert read_augment(["gain=-6@1", " speed=0.8..1.25", "noise@.3"]) == dict(speed=Change(.8, 1.25, .5), noise=Change(5, 40, .3), gain=Change(-6, -6, 1))
    assert list(read_augment(["specaugment", "gain", "noise", "room", "speed"])) == ["speed", "room", "noise", "gain", "specaugment"]


def test_settings_that_do_not_go_together(tmp_path, chat):
    def s(**kw): return TrainSettings(**dict(train_dataset="x.csv", output="run") | kw)
    (tmp_path/"empty").mkdir()
    for kw, message in [(dict(augment="speed", packing=True), "--augment speed: changes the lengths of rows"), (dict(augment="speed", noise_folder=tmp_path), "is for noise in --augment"),
                        (dict(room_folder=tmp_path), "is for room in --augment"), (dict(augment="noise", noise_folder=tmp_path/"empty"), "no sound files"),
                        (dict(augment="noise", noise_folder=tmp_path/"none"), "no such folder"), (dict(augment="noise", noise_folder=tmp_path/"empty"/"a.wav"), "no such folder")]:
        with pytest.raises(InputError, match=message): check_augment(s(**kw))
    sf.write(tmp_path/"a.wav", sine(50), RATE)
    with pytest.raises(InputError, match="have their own reverberation times"): check_augment(s(augment="room=0.5..1", room_folder=tmp_path))
    check_augment(s(augment="room@0.3,noise=5", room_folder=tmp_path, noise_folder=tmp_path))
    check_augment(s(augment="room,noise", packing=True))
    with pytest.raises(InputError, match="tiny-text takes no audio"): check_augmentable(s(model_name="tiny-text", augment="gain"), load_chat("tiny-text").family)
    check_augmentable(s(model_name="tiny-text"), load_chat("tiny-text").family)
    class Deaf(Family): name, clip_token = "Deaf", "<clip>"
    with pytest.raises(InputError, match="Deaf cannot mask its spectrograms; leave specaugment out"): check_augmentable(s(augment="gain,specaugment"), Deaf())
    check_augmentable(s(augment="gain"), Deaf())


def test_all_damaged_recordings_are_named(tmp_path):
    for name in ("a.wav", "b.flac"): (tmp_path/name).write_bytes(b"RIFF of nothing")
    sf.write(tmp_path/"c.wav", sine(50, 8000), 8000)
    with pytest.raises(InputError, match=r"2 sounds cannot be used:\n.*a\.wav.*\n.*b\.flac"): read_sounds(sorted(tmp_path.iterdir()))
    sound, = read_sounds([tmp_path/"c.wav"])
    assert sound.dtype == np.int16 and len(sound) == RATE # at the model's rate


def test_recordings_are_part_of_the_runs_identity(tmp_path):
    for name, hertz in dict(a=50, b=60).items(): sf.write(tmp_path/f"{name}.wav", sine(hertz), RATE)
    s = TrainSettings(train_dataset="x.csv", output="run", augment="noise", noise_folder=tmp_path)
    facts = augment_facts(open_augmenter(s, RATE))
    assert list(facts) == ["contents of --noise-folder"] and facts == augment_facts(open_augmenter(s, RATE))
    sf.write(tmp_path/"b.wav", sine(61), RATE)
    assert facts != augment_facts(open_augmenter(s, RATE))
    assert open_augmenter(replace(s, augment=[], noise_folder=None), RATE) is None


def test_own_recordings_are_used():
    tone = (sine(440)*32768).astype(np.int16)
    clip = Augmenter(dict(noise=Change(0, 0, 1)), RATE, noises=[tone])(sine(1000), rng())
    spectrum = np.abs(np.fft.rfft(clip))
    assert set(spectrum.argsort()[-2:]) == {440, 1000}
    delayed = np.zeros(500, np.int16)
    delayed[[300, 400]] = 20_000, -10_000 # the direct sound, and one echo
    clip = np.float32(rng().normal(0, .1, 4000))
    echo = Augmenter(dict(room=Change(1, 1, 1)), RATE, rooms=[delayed])(clip, rng())
    expected = clip - .5*np.concatenate([np.zeros(100), clip[:-100]])
    assert np.corrcoef(echo, expected)[0, 1] == pytest.approx(1, abs=1e-6)


def loaded(rows, chat, workers, epoch, skip=0):
    "The batches of an epoch from a number of workers"
    sampler = StepSampler(rows.rows.lengths, 4, seed=42)
    loader = EpochLoader(rows, batch_sampler=sampler, collate_fn=Collator(chat.pad_id, chat.family), num_workers=workers)
    loader.set_epoch(epoch)
    return list(loader)[skip:]


def equal(ours, theirs):
    "Two batches, bit for bit"
    def tensors(batch): return [t for t in tree_leaves(dict(sorted(batch.items()))) if isinstance(t, torch.Tensor)]
    same = all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(tensors(ours), tensors(theirs), strict=True))
    return set(ours) == set(theirs) and same


def test_batches_do_not_depend_on_workers(mix, chat):
    rows = AugmentedRows(mix, chat, Augmenter(read_augment(ALL)), 42, int(mix.n_tokens.max()))
    here = {epoch: loaded(rows, chat, 0, epoch) for epoch in (0, 1)}
    assert any("spec_masks" in b for b in here[0])
    sampler = StepSampler(mix.lengths, 4, seed=42)
    sampler.set_epoch(1)
    first = Collator(chat.pad_id, chat.family)([rows.example(row, 1) for row in next(iter(sampler)).rows])
    assert equal(here[1][0], first)
    for workers in (1, 2):
        for ours, theirs in zip(here[1], loaded(rows, chat, workers, 1), strict=True):
            assert equal(ours, theirs)
    other = AugmentedRows(mix, chat, rows.augmenter, 43, rows.most)
    for row in range(3):
        first, again, later, another = (r.example(row, epoch).clips[0] for r, epoch in ((rows, 0), (rows, 0), (rows, 1), (other, 0)))
        assert np.array_equal(first, again) and not np.array_equal(first, later) and not np.array_equal(first, another)


def test_without_a_draw_a_batch_is_what_it_was(mix, chat):
    "Bit for bit, int16 and all"
    rows = AugmentedRows(mix, chat, Augmenter({name: Change(*c[:2], 0) for name, c in read_augment(ALL).items()}), 42, 100)
    plain = EpochLoader(mix, batch_sampler=StepSampler(mix.lengths, 4, seed=42), collate_fn=Collator(chat.pad_id, chat.family))
    for ours, theirs in zip(loaded(rows, chat, 0, 0), plain, strict=True):
        assert equal(ours, theirs)


def test_every_row_has_the_tokens_of_its_clips(mix, chat):
    "And the same labels and spans as one that is made from clips of these lengths"
    rows = AugmentedRows(mix, chat, Augmenter(dict(speed=Change(.5, 2, 1))), 0, 10_000)
    changed = 0
    for row in range(len(mix)):
        old, new = mix[row], rows.example(row, 0)
        made = chat.tokenize([old.conversation])[0].example(new.clips)
        changed += len(new.input_ids) != len(old.input_ids)
        for name in ("input_ids", "labels", "spans"): assert np.array_equal(getattr(new, name), getattr(made, name))
    assert changed > len(mix)/2


def test_clips_of_several_turns_and_folders_of_tokens_alone(chat):
    clip = chat.clip_id
    e = Example(np.int32([7, clip, clip, 8, clip, 9]), np.int32([-100]*5 + [9]), [np.zeros(6400, np.int16), np.zeros(100, np.int16)])
    new = with_clips(e, [np.zeros(100, np.int16), np.zeros(9600, np.int16)], chat)
    assert new.input_ids.tolist() == [7, clip, 8, clip, clip, clip, 9] and new.labels.tolist() == [-100]*6 + [9] and new.spans is None


def test_a_row_keeps_its_speed_where_it_would_be_too_long(mix, chat, monkeypatch):
    slow = Augmenter(dict(speed=Change(.5, .5, 1)))
    rows = AugmentedRows(mix, chat, slow, 0, int(mix.n_tokens.max()))
    lengths = [len(rows.example(row, 0).input_ids) for row in range(len(mix))]
    assert max(lengths) == mix.n_tokens.max() and sum(lengths) > mix.n_tokens.sum()
    monkeypatch.setattr(type(chat.family), "max_clip_seconds", 2.)
    clips = [AugmentedRows(mix, chat, slow, 0, 10_000).example(row, 0).clips[0] for row in range(len(mix))]
    assert max(map(len, clips)) <= 2*RATE and any(len(c) > n for c, n in zip(clips, mix.n_samples))


def test_the_network_sees_the_masked_spectrogram(mix, chat, monkeypatch):
    from mdl_nbdev.model import midasheng_encoder
    model = load_model("tiny").eval()
    masks = np.float32([[[.25, .5], [0, 0], [.5, 1], [0, 0]]])
    batch = Collator(chat.pad_id, chat.family)([replace(mix[0], masks=masks), mix[1]])
    seen, original = [], midasheng_encoder.mask_spectrogram
    monkeypatch.setattr(midasheng_encoder, "mask_spectrogram", lambda *a: seen.append((a[0], original(*a))) or seen[-1][1])
    with torch.no_grad(): masked, plain = model(**batch.inputs).loss, model(**{k: v for k, v in batch.inputs.items() if k != "spec_masks"}).loss
    (before, after), = seen
    n = 1 + int(batch["n_samples"][0])//160
    expected = before[0].clone()
    expected[16:32, :n] = expected[:, [t for t in range(n) if (t + .5)/n >= .5]] = before[0, :, :n].mean()
    assert torch.allclose(after[0], expected, atol=1e-3) and torch.equal(after[1], before[1]) and masked != plain
