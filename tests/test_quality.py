"Faults of recordings, copies and labels: what `mdl_check` warns of"
import csv
from collections import Counter

import numpy as np
import pytest
import soundfile as sf
import soxr

from mdl_nbdev.base.command_line import from_args
from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.settings import CheckSettings
from mdl_nbdev.data.audio import load_audio
from mdl_nbdev.data.check import check, histogram_html
from mdl_nbdev.data.copies import BITS, MOST_ERRORS, TIMES, agreement, bit_errors, candidate_pairs, clip_fingerprint
from mdl_nbdev.data.quality import ClipMeter, clip_faults, heard_range, label_faults
from mdl_nbdev.data.sounds import SOUND_LABELS, make_sound


def sound(seed, label=None): return make_sound(label or SOUND_LABELS[seed % 8], np.random.default_rng([5, seed]))


def save(path, w, rate=16_000, **kwargs):
    sf.write(path, soxr.resample(w, 16_000, rate) if rate != 16_000 else w, rate, **kwargs)
    return path.name


def table(folder, name, rows, head=("audio", "prediction")):
    with open(folder/name, "w", newline="") as f: csv.writer(f).writerows([head, *rows])
    return folder/name


@pytest.fixture
def clean(tmp_path):
    "64 different sounds"
    return [(save(tmp_path/f"{i}.wav", sound(i)), SOUND_LABELS[i % 8]) for i in range(64)]


def run(folder, *files, **kwargs): return check(CheckSettings(input=[*files], base_dir=folder, num_workers=2, **kwargs))
def found(report): return {kind: [(f.file.rpartition("/")[2], f.line) for f in rows] for kind, rows in report.findings.items() if rows}


def test_a_clean_set_has_no_findings(tmp_path, clean):
    report = run(tmp_path, table(tmp_path, "a.csv", clean))
    assert not found(report) and not report.failed


def test_copies_and_leakage_are_found(tmp_path, clean):
    "A file of the same samples, resampled and compressed copies, quieter ones, shifted ones; each is compared with the first"
    def copy(i, name, gain=.5, start=0, **kwargs): return save(tmp_path/name, gain*sound(i)[start:], **kwargs), SOUND_LABELS[i % 8]
    train = [*clean, copy(3, "same.flac", 1), copy(10, "low.wav", rate=22_050)]
    test = [copy(8, "phone.wav", rate=8000), copy(20, "small.mp3", 1, rate=44_100), copy(33, "late.wav", .3, 90), copy(46, "web.ogg", rate=44_100),
            copy(62, "mu.wav", rate=8000, subtype="ULAW"), clean[7], (save(tmp_path/"new.wav", sound(999)), "noise")]
    report = run(tmp_path, table(tmp_path, "train.csv", train), table(tmp_path, "test.csv", test), output=tmp_path/"out.csv")
    assert found(report) == dict(copies=[("train.csv", 66), ("train.csv", 67)], leaks=[("test.csv", i) for i in range(2, 8)])
    assert not report.failed, "findings are warnings"
    reasons = [f.reason for f in report.findings["leaks"]]
    assert reasons[0] == f"phone.wav: a copy of 8.wav ({tmp_path}/train.csv:10); keep one of them"
    assert "7.wav: the same clip as" in reasons[5]
    for text in (str(report), report._repr_html_()): assert "6 rows with a clip of another file" in text and "2 rows with a copied clip" in text
    assert report._repr_html_().count("the original of") == 8
    rows = list(csv.DictReader(open(tmp_path/"out.csv")))
    assert [(r["finding"], r["line"]) for r in rows[:6]] == [("clips of another file", str(i)) for i in range(2, 8)] and len(rows) == 8
    with pytest.raises(InputError, match="exists already"): run(tmp_path, tmp_path/"train.csv", output=tmp_path/"out.csv")
    with pytest.raises(InputError, match="replace its own input"): run(tmp_path, tmp_path/"train.csv", output=tmp_path/"train.csv", overwrite=True)


def test_files_are_compared_without_decoding(tmp_path, clean):
    "As far as names of clips go"
    report = run(tmp_path, table(tmp_path, "a.csv", clean), table(tmp_path, "b.csv", [clean[5]]), decode=False)
    assert found(report) == dict(leaks=[("b.csv", 2)])


def test_groups(tmp_path, clean):
    "A speaker in both files, and a clip under two speakers"
    head = ("audio", "prediction", "speaker")
    a = table(tmp_path, "a.csv", [(*r, "ann" if i % 2 else "bob") for i, r in enumerate(clean)], head)
    save(tmp_path/"again.wav", .6*sound(0))
    b = table(tmp_path, "b.csv", [(save(tmp_path/"x.wav", sound(500)), "x", "bob"), (save(tmp_path/"y.wav", sound(501)), "x", "eve"), ("again.wav", "x", "")], head)
    report = run(tmp_path, a, b, group="speaker")
    assert found(report) == dict(shared=[("b.csv", 2)], leaks=[("b.csv", 4)])
    assert "speaker 'bob' has 32 rows in" in report.findings["shared"][0].reason and "1 row with a speaker of another file" in str(report)
    assert ", with another prediction;" in report.findings["leaks"][0].reason
    one = table(tmp_path, "one.csv", [*((*r, "ann") for r in clean), ("again.wav", clean[0][1], "bob")], head)
    report = run(tmp_path, one, group="speaker")
    assert found(report) == dict(groups=[("one.csv", 66)]) and "1 row with a clip of another speaker" in str(report)
    assert "ignored" not in str(report)
    with pytest.raises(InputError, match="--group room: no such column in .*a.csv"): run(tmp_path, a, b, group="room")




def test_faults_of_recordings(tmp_path, clean):
    w = sound(1, "siren")/np.abs(sound(1, "siren")).max()*.9
    silence = np.zeros(9000, np.float32)
    bad = dict(zero=0*w, cut=np.clip(4*w, -.95, .95), lowered=.4*np.clip(3*w, -.9, .9), one_sided=np.minimum(w, .3),
               faint=.005*w, offset=.5*w + .1, before=np.r_[silence, w], after=np.r_[w, silence])
    rows = [(save(tmp_path/f"{name}.wav", w), "siren") for name, w in bad.items()]
    report = run(tmp_path, table(tmp_path, "a.csv", [*clean, *rows]))
    assert {k: [line for _, line in v] for k, v in found(report).items() if k not in ("copies",)} == dict(clipped=[67, 68, 69], quiet=[70], offset=[69, 71], edges=[72, 73])
    assert [r.line for r in report.notes["silent"]] == [66]
    assert "3 rows with a clipped clip" in str(report)
    assert [f.reason for f in report.findings["edges"]] == [f"{end}.wav: nothing is heard in its {where} 0.6 s; trim it"
                                                            for end, where in [("before", "first"), ("after", "last")]]


def test_bars_have_a_width_that_jupyterlab_keeps():
    "It drops min() and other functions from the styles of a notebook that is not trusted, and a bar without a width is not seen"
    assert histogram_html("labels", [("dog", 3), ("cat", 1)]).count("width:240px;") == 2


@pytest.mark.parametrize("hz", [30, 100, 440, 3000])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_U8", "ULAW"])
def test_loud_tones_are_not_clipped(tmp_path, hz, subtype):
    "Whatever the steps of the samples: a sine has its peaks at one height"
    for rate in (8000, 44_100):
        if hz > rate/3: continue
        t = np.arange(rate)/rate
        for gain, expected in [(.97, set()), (.55, set()), (2, {"clipped"})]:
            sf.write(tmp_path/"a.wav", np.clip(gain*np.sin(2*np.pi*hz*t + 1), -.98, .98), rate, subtype=subtype)
            meter = ClipMeter()
            w = load_audio(tmp_path/"a.wav", measure=meter.add)
            assert set(clip_faults(meter, heard_range(w), len(w))) == expected, (rate, gain, meter.clipped)


def test_labels():
    found = label_faults(Counter({"caf\u00e9": 20, "cafe\u0301": 3, "Caf\u00e9 ": 1, "tea": 30, "tae": 1, "milk": 25}))
    assert set(found["spelled"]) == {"cafe\u0301", "Caf\u00e9 "} and set(found["rare"]) == {"tae"}


def test_candidates_are_those_of_all_pairs():
    "Of copies with few wrong bits, nearly all are found, and no pair with many"
    rng = np.random.default_rng(0)
    prints = rng.normal(0, 30, (600, TIMES, BITS)).clip(-127, 127).astype(np.int8)
    copies = (prints[:300] + rng.normal(0, 12, (300, TIMES, BITS))).clip(-127, 127).astype(np.int8)
    everything = np.concatenate([prints, copies])
    errors = bit_errors(everything[:, None], everything)
    near = {(i, j) for i, j in np.argwhere(np.triu(errors <= MOST_ERRORS, 1)).tolist()}
    pairs = {tuple(p) for p in candidate_pairs(everything).tolist()}
    assert pairs <= near and len(pairs) > .97*len(near) > 290


def test_many_equal_clips_take_little_time():
    "Sorting compares only neighbours: 20,000 clips that differ in a few bits are no 200 million pairs"
    rng = np.random.default_rng(0)
    prints = np.repeat(rng.normal(0, 30, (1, TIMES, BITS)).clip(-127, 127).astype(np.int8), 20_000, axis=0)
    assert len(candidate_pairs(prints)) < 50*20_000


def test_takes_of_one_sound_are_no_copies():
    "Two tones of one pitch and length agree in the tone, and not in the noise behind it"
    t = np.arange(16_000)/16_000
    def take(seed): return np.float32(.5*np.sin(2*np.pi*440*t + seed) + np.random.default_rng(seed).normal(0, .01, 16_000))
    assert agreement(take(1), take(2)) < .2 < .9 < agreement(take(1), .3*take(1)[50:])
    assert bit_errors(clip_fingerprint(take(1)), clip_fingerprint(.3*take(1)[50:])) < MOST_ERRORS


def test_several_files_on_the_command_line(tmp_path):
    assert from_args(CheckSettings, ["a.csv", "--base-dir", "d", "b,c.csv"]).input == from_args(CheckSettings, ["a.csv", "b,c.csv"]).input
    assert [p.name for p in from_args(CheckSettings, ["--base-dir", "d", "a.csv", "b,c.csv"]).input] == ["a.csv", "b,c.csv"]
    with pytest.raises(InputError, match="missing: INPUT"): from_args(CheckSettings, ["--base-dir", "d"])
    for path in [[], ["a.csv", "./a.csv"]]:
        table(tmp_path, "a.csv", [("a.wav", "x")])
        with pytest.raises(InputError, match="at least one file|given twice"): check(CheckSettings(input=[tmp_path/p for p in path]))
