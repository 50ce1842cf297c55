"Channels of clips, notes on silent clips and wrong headers in bulk, and hints for files that are missing"
import csv
import json
import os
import shutil
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf

from mdl_nbdev.base.command_line import from_args
from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.settings import CheckSettings, ConvertSettings, InferSettings, TrainSettings
from mdl_nbdev.data.audio import audio_info, load_audio
from mdl_nbdev.data.check import check
from mdl_nbdev.data.clips import collected_notes, missing_hint, names_in, no_clip
from mdl_nbdev.data.rows import to_conversation
from mdl_nbdev.data.sources import open_rows
from mdl_nbdev.infer.run import PromptedRow, Prompter, infer
from mdl_nbdev.model.families import load_chat
from mdl_nbdev.train.convert import conversion_key, convert, plan_shards
from mdl_nbdev.train.dataset import AudioDataset, check_conversion
from mdl_nbdev.train.run import train

pytestmark = pytest.mark.usefixtures("one_thread")
fixtures = Path(__file__).parent/"fixtures"/"audio"
noise = np.random.default_rng(0).uniform(-.3, .3, (1600, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def chat(): return load_chat("tiny")


@pytest.fixture
def sounds(tmp_path):
    sf.write(tmp_path/"opposite.wav", np.stack([noise[:, 0], -noise[:, 0]], 1), 16000)
    sf.write(tmp_path/"left.wav", noise*[1, 0], 16000)
    sf.write(tmp_path/"stereo.wav", noise, 16000)
    sf.write(tmp_path/"mono.wav", noise[:, 0], 16000)
    sf.write(tmp_path/"off.flac", noise[:, 0]*1e-3, 16000)
    return tmp_path


def write_table(path, *rows):
    "Rows of clip and channel in a kind of file"
    table = [{"audio": clip, "prediction": "x", "channel": channel} for clip, channel in rows]
    if path.suffix == ".jsonl": path.write_text("".join(json.dumps(row) + "\n" for row in table))
    elif path.suffix == ".parquet": pq.write_table(pa.table({k: [row[k] if k != "channel" or row[k] is None else str(row[k]) for row in table] for k in table[0]}), path)
    else:
        with open(path, "w", newline="") as f:
            w = csv.DictWriter(f, ["audio", "prediction", "channel"])
            w.writeheader(), w.writerows(table)
    return path


def heard_by_all(chat, path, out, channel="mix"):
    "The clips of a file as conversion and as inference hear them, which must be the same, and as long as the check says"
    shared = dict(input=path, base_dir=path.parent, num_workers=1, channel=channel)
    report = check(CheckSettings(**shared))
    assert not report.bad
    convert(ConvertSettings(**shared, output=out, model_name="tiny", overwrite=True), chat)
    converted = [clip for i in range(report.rows) for clip in AudioDataset(out)[i].clips]
    prompter = Prompter(InferSettings(**shared, output=out/"o", model_name="tiny"), chat, 4096)
    answered = [clip for row in open_rows(path) for clip in prompter.decode(prompter.tokenize(PromptedRow(row)))[1].clips]
    for a, b in zip(converted, answered, strict=True): np.testing.assert_array_equal(a, b)
    assert [len(clip)/16000 for clip in converted] == list(report.seconds)
    return converted


given = {"left": noise[:, 0], "RIGHT": noise[:, 1], 0: noise[:, 0], "1": noise[:, 1], "1.0": noise[:, 1], "mix": noise.mean(1), "": noise.mean(1), None: noise.mean(1)}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_row_names_a_channel(tmp_path, sounds, chat, suffix):
    path = write_table(tmp_path/f"t{suffix}", *[("stereo.wav", channel) for channel in given])
    for clip, expected in zip(heard_by_all(chat, path, tmp_path/"out"), given.values(), strict=True): np.testing.assert_allclose(clip, expected*32768, atol=2)


def test_the_option_is_for_rows_that_name_none(tmp_path, sounds, chat):
    path = write_table(tmp_path/"t.csv", ("stereo.wav", ""), ("stereo.wav", "left"), ("stereo.wav", "mix"), ("stereo.wav#t=0.05,0.1", ""), ("stereo.wav#channel=0", ""))
    clips = heard_by_all(chat, path, tmp_path/"out", channel="right")
    for clip, expected in zip(clips, [noise[:, 1], noise[:, 0], noise.mean(1), noise[800:, 1], noise[:, 0]], strict=True): np.testing.assert_allclose(clip, expected*32768, atol=2)
    assert from_args(TrainSettings, ["--train-dataset", "t.csv", "--output", "o", "--channel", "2"]).channel == 2
    for value in ["-1", "middle", "1.5"]:
        with pytest.raises(InputError, match="--channel: got .*expected"): from_args(CheckSettings, ["t.csv", "--channel", value])


@pytest.mark.parametrize("clip, channel, message", [("stereo.wav", "BBC", "channel is 'BBC'; it must be mix, left, right, or a number"), ("stereo.wav", "-1", "channel is '-1'"),
    ("stereo.wav", "2", "it has 2 channels, and channel 2 is asked for, counting from 0"), ("mono.wav", "right", "it has 1 channel, and channel 1 is asked for"), ("stereo.wav#channel=0", "1", "keep one")])
def test_channels_that_there_are_not(tmp_path, sounds, chat, clip, channel, message):
    path = write_table(tmp_path/"t.csv", (clip, channel))
    shared = dict(input=path, base_dir=tmp_path, num_workers=1)
    for report in [check(CheckSettings(**shared)), check(CheckSettings(**shared, decode=False))]: assert message in report.bad[0].reason
    with pytest.raises(InputError, match="t.csv:2: ") as e: convert(ConvertSettings(**shared, output=tmp_path/"out", model_name="tiny"), chat)
    assert message in str(e.value)
    found = []
    for row in open_rows(path).rows(found.append): found.append(Prompter(InferSettings(**shared, output="o", model_name="tiny"), chat, 4096).tokenize(PromptedRow(row))[0])
    assert message in found[0].reason


def test_another_channel_is_another_conversion(tmp_path, sounds, chat):
    path = write_table(tmp_path/"t.csv", ("stereo.wav", ""))
    def settings(channel): return ConvertSettings(input=path, base_dir=tmp_path, num_workers=1, channel=channel, output=tmp_path/"out", model_name="tiny")
    assert len({conversion_key(plan_shards(settings(channel), chat)) for channel in ("mix", "left", 1)}) == 3
    convert(settings("left"), chat)
    ds = AudioDataset(tmp_path/"out")
    assert check_conversion(ds, chat, dict(channel="left")) is check_conversion(ds, chat, dict(channel="mix")) is ds
    for other in ("right", 0):
        with pytest.raises(InputError, match=f"was converted with --channel 'left'.*convert them again with {other!r}"): check_conversion(ds, chat, dict(channel=other))


def test_records_with_several_clips_name_channels_in_them(tmp_path, sounds):
    (tmp_path/"t.jsonl").write_text(json.dumps({"audio": ["stereo.wav", "mono.wav"], "prediction": "x", "channel": 1}) + "\n")
    with pytest.raises(InputError, match="channel with 2 clips; name the part in each clip"): open_rows(tmp_path/"t.jsonl").count()
    (tmp_path/"t.jsonl").write_text(json.dumps({"audio": ["stereo.wav#channel=1", "mono.wav"], "prediction": "x"}) + "\n")
    row, = open_rows(tmp_path/"t.jsonl")
    assert to_conversation(row, base_dir="d", channel="left").clips == ["d/stereo.wav#channel=1", "d/mono.wav#channel=left"]


# Notes

SILENT = "silent clips (the first: "


def noted_table(folder):
    for name in ("h_plus_44.wav", "h_right.wav"): shutil.copy(fixtures/name, folder)
    return write_table(folder/"t.csv", ("stereo.wav", ""), ("opposite.wav", ""), ("opposite.wav", "left"), ("off.flac", ""), ("left.wav", "right"), ("h_plus_44.wav", ""))


def test_check_and_conversion_count_the_same_clips(tmp_path, sounds, chat):
    path = noted_table(tmp_path)
    shared = dict(input=path, base_dir=tmp_path)
    report = check(CheckSettings(**shared))
    assert {kind: [b.line for b in rows] for kind, rows in report.notes.items()} == dict(silent=[3, 5, 6], header=[7], tracks=[]) and not report.bad
    assert "3 rows with a silent clip\n" in str(report) and "1 row with a clip with a wrong length in the header\n" in str(report)
    s = ConvertSettings(**shared, output=tmp_path/"out", model_name="tiny", num_workers=2)
    one, first = str(convert(s, chat)), AudioDataset(tmp_path/"out").manifest["notes"]
    assert f"3 {SILENT}{path}:3, {tmp_path}/opposite.wav): nothing can be heard" in one and "1 clip with a wrong length in the header (the first" in one
    shards = [p for p in (tmp_path/"out").glob("data-*")]
    (tmp_path/"out.part").mkdir()
    for p in shards: shutil.copy(p, tmp_path/"out.part") # as after a crash: no clip is decoded again
    shutil.rmtree(tmp_path/"out")
    os.utime(tmp_path/"t.csv")
    assert str(convert(s, chat)) == one and AudioDataset(tmp_path/"out").manifest["notes"] == first


def test_many_shards_and_workers(tmp_path, sounds, chat):
    path = write_table(tmp_path/"t.csv", *[("off.flac" if i%10 == 7 else "mono.wav", "") for i in range(200)])
    report = convert(ConvertSettings(input=path, base_dir=tmp_path, output=tmp_path/"out", model_name="tiny", num_workers=2), chat)
    assert len(list((tmp_path/"out").glob("data-*"))) == 4 and report.notes == {"silent": [20, f"{path}:9, {tmp_path}/off.flac"]}


def test_training_says_it_too(tmp_path, sounds, capfd):
    path = noted_table(tmp_path)
    shared = dict(output=tmp_path/"run", base_dir=tmp_path, model_name="tiny", dry_run=True, num_workers=1)
    train(TrainSettings(train_dataset=[path], **shared))
    err = capfd.readouterr().err
    assert err.count(f"3 {SILENT}{path}:3") == 1 and err.count("1 clip with a wrong length") == 1
    convert(ConvertSettings(input=path, base_dir=tmp_path, output=tmp_path/"data", model_name="tiny", num_workers=1))
    capfd.readouterr()
    train(TrainSettings(train_dataset=[tmp_path/"data"], **shared))
    assert capfd.readouterr().err.count(f"3 {SILENT}{path}:3") == 1


def test_inference_counts_them_once(tmp_path, sounds):
    path = noted_table(tmp_path)
    report = infer(InferSettings(input=path, base_dir=tmp_path, output=tmp_path/"o.csv", model_name="tiny", num_workers=2, batch_size=1, max_new_tokens=1))
    assert not report.rejected and report.notes == dict(silent=[3, f"{path}:3, {tmp_path}/opposite.wav"], header=[1, f"{path}:7, {tmp_path}/h_plus_44.wav"])
    assert str(report).count(f"3 {SILENT}") == 1


def test_headers_that_are_noted():
    noted = []
    for path in sorted(fixtures.glob("h_*.wav")):
        with collected_notes(str(path)) as notes:
            try: audio_info(path)
            except InputError: continue
        noted += [path.stem] if "header" in notes else []
    read = {p.stem for p in fixtures.glob("h_*.wav")}
    assert {"h_plus_44", "h_zero"} & read <= set(noted) and "h_right" not in noted


# Missing files

def test_hints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("Clips/Deep").mkdir(parents=True)
    names = ["Clips/Deep/Bell.wav", "Clips/a b.wav", normalize("NFC", "Clips/é.wav"), normalize("NFD", "Clips/ü.wav"), "plain.wav"]
    for name in names: Path(name).write_bytes(b"x")
    hints = {"clips/deep/bell.WAV": (names[0], "case"), "Clips\\Deep\\Bell.wav": (names[0], "backslashes"), " plain.wav ": ("plain.wav", "leading or trailing spaces"), "Clips/a%20b.wav": (names[1], "percent-encoding"),
             normalize("NFD", names[2]): (names[2], "its Unicode form (NFC and NFD)"), normalize("NFC", names[3]): (names[3], "its Unicode form (NFC and NFD)"), "clips\\a%20B.wav ": (names[1], "leading or trailing spaces and backslashes and percent-encoding and case")}
    for wrong, (right, how) in hints.items(): assert missing_hint(wrong) == f"; there is {right}, which differs in {how}"
    for name in ["Clips/none.wav", "none/none.wav", "", "/", "a"*300, "a/"*2000, "clips"]: assert missing_hint(name) == ""
    assert "no such file; there is ./Clips/Deep/Bell.wav, which differs in case; correct" in no_clip("./clips/Deep/bell.wav")
    for url in [f"file://{tmp_path}/plain.wav", f"FILE://localhost{tmp_path}/plain.wav"]: assert f"write it as a path: {tmp_path}/plain.wav" in no_clip(url)
    with pytest.raises(InputError, match="T.csv: No such file or directory; there is t.csv, which differs in case"):
        Path("t.csv").write_text("audio,prediction\n")
        open_rows("T.csv")


def test_a_large_folder_is_listed_once_and_not_to_its_end(tmp_path, monkeypatch):
    (tmp_path/"Bell.wav").write_bytes(b"x")
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: listed.append(folder) or scandir(folder))
    assert [missing_hint(f"{tmp_path}/{i}.wav") for i in range(100)] == [""]*100 and "Bell.wav" in missing_hint(f"{tmp_path}/bell.wav")
    assert listed == [str(tmp_path)]
    names_in.cache_clear()


def test_clips_that_exist_cost_nothing(sounds, monkeypatch):
    monkeypatch.setattr("mdl_nbdev.data.clips.missing_hint", lambda path: pytest.fail("asked for a hint"))
    load_audio(sounds/"mono.wav")
