"`mdl_check` is the judge: over generated tables, conversion and inference take exactly the rows that it passes, with the same clips and texts"
import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.settings import CheckSettings, ConvertSettings, InferSettings
from mdl_nbdev.data.audio import load_audio, to_int16
from mdl_nbdev.data.check import check
from mdl_nbdev.data.rows import to_conversation
from mdl_nbdev.data.sources import open_rows
from mdl_nbdev.infer.run import PromptedRow, Prompter
from mdl_nbdev.model.families import load_chat
from mdl_nbdev.train.convert import convert
from mdl_nbdev.train.dataset import AudioDataset

pytestmark = pytest.mark.usefixtures("one_thread")
fixtures = Path(__file__).parent/"fixtures"/"audio"
BROKEN = ["d_half_h_right.wav", "d_html.mp3", "j_cbr.mp3", "h_empty.wav"]
clips = st.sampled_from(["a.wav", "a.wav", "b c.flac", "tiny.wav", "missing.wav", "a.wav#t=0.1,0.3", "a.wav#t=5,6", "no_tag.mp3#t=0.1,5", "no_tag.mp3#t=0.1", "stereo.wav", "stereo.wav", "stereo.wav#channel=1", "h_plus_44.wav", "cbr.mp3", "opus.ogg", *BROKEN, ""])
texts = st.sampled_from(["", "Q", "Is it loud?", "<audio>Q", "<audio> or <audio>?", " ", "null", "café", "a\nb", 'say "x"'])
answers = st.sampled_from(["A", "A", "two words", "", "null", "NA", "  "])
times = st.sampled_from([None, None, None, ("0", "0.2"), ("0.1", ""), ("0.4", "0.2"), ("x", "1")])
channels = st.sampled_from([None, None, None, "mix", "left", "RIGHT", "0", "1", "BBC"]) # Of a row
options = st.sampled_from(["mix", "mix", "left", 1]) # Of all rows
table = st.lists(st.tuples(clips, texts, answers, times, channels), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def chat(): return load_chat("tiny")


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sounds")
    noise = np.random.default_rng(0).uniform(-.3, .3, 8000)
    sf.write(folder/"a.wav", noise, 16000)
    sf.write(folder/"stereo.wav", noise.reshape(-1, 2), 16000)
    sf.write(folder/"b c.flac", noise[:4410], 44100)
    sf.write(folder/"tiny.wav", noise[:3], 16000)
    for name in ["h_plus_44.wav", "cbr.mp3", "no_tag.mp3", "opus.ogg", *BROKEN]: shutil.copy(fixtures/name, folder)
    return folder


def write_table(path, rows):
    "The same rows in a kind of file"
    columns = ["audio", "user_prompt", "prediction"]
    if any(t for *_, t, _ in rows): columns += ["start", "end"]
    cells = [[clip, text, answer, *(t or ("", ""))][:len(columns)] for clip, text, answer, t, _ in rows]
    if any(channel for *_, channel in rows):
        columns.append("channel")
        for row, (*_, channel) in zip(cells, rows): row.append(channel or "")
    if path.suffix == ".jsonl": path.write_text("".join(json.dumps({k: v for k, v in zip(columns, row) if v}) + "\n" for row in cells))
    elif path.suffix == ".parquet": pq.write_table(pa.table({name: [row[i] or None for row in cells] for i, name in enumerate(columns)}, pa.schema([(name, pa.string()) for name in columns])), path)
    else:
        with open(path, "w", newline="") as f: csv.writer(f, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([columns, *cells])


def lines(bad): return {b.line for b in bad}


def is_good(path, row, **options):
    "Whether a row passes alone"
    write_table(path, [row])
    return not check(CheckSettings(input=path, **options)).bad


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table, st.sampled_from([".csv", ".tsv", ".jsonl", ".parquet"]), options)
def test_what_check_passes_the_others_take(tmp_path, chat, sounds, rows, suffix, channel):
    "A table with a bad row is not converted; without it, it is, with the clips and texts that were read"
    path, out = tmp_path/f"t{suffix}", tmp_path/"out"
    good = [row for row in rows if is_good(tmp_path/f"one{suffix}", row, base_dir=sounds, num_workers=1, channel=channel)]
    shared = dict(input=path, base_dir=sounds, num_workers=1, channel=channel)
    write_table(path, rows)
    assert len(lines(check(CheckSettings(**shared)).bad)) == len(rows) - len(good)
    if len(good) < len(rows):
        with pytest.raises(InputError): convert(ConvertSettings(**shared, output=out, model_name="tiny", overwrite=True), chat)
        shutil.rmtree(f"{out}.part", ignore_errors=True)
    if good:
        write_table(path, good)
        report = check(CheckSettings(**shared))
        convert(ConvertSettings(**shared, output=out, model_name="tiny", overwrite=True), chat)
        made = AudioDataset(out, chat.fingerprint, "t")
        read = [to_conversation(row, base_dir=sounds, channel=channel) for row in open_rows(path)]
        assert len(made) == report.rows == len(good) and [made[i].conversation.messages for i in range(len(made))] == [c.messages for c in read]
        heard = sorted(len(clip)/16000 for i in range(len(made)) for clip in made[i].clips)
        np.testing.assert_allclose(heard, sorted(report.seconds), atol=1e-4)
        for i, c in enumerate(read): np.testing.assert_array_equal(np.concatenate(made[i].clips or [[]]), np.concatenate([to_int16(load_audio(clip)) for clip in c.clips] or [[]]))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table, st.sampled_from([".csv", ".tsv", ".jsonl", ".parquet"]), options)
def test_what_check_passes_is_answered(tmp_path, chat, sounds, rows, suffix, channel):
    "Inference rejects the rows that `mdl_check --predictions false` reports, and no others"
    path = tmp_path/f"t{suffix}"
    shared = dict(input=path, base_dir=sounds, num_workers=1, channel=channel)
    write_table(path, rows)
    bad, broken = check(CheckSettings(**shared, predictions=False)), []
    prompter = Prompter(InferSettings(**shared, output=tmp_path/"o", model_name="tiny"), chat, 4096)
    for row in open_rows(path, ("audio",)).rows(broken.append):
        pair = prompter.tokenize(PromptedRow(row))
        if pair[1] is not None: pair = prompter.decode(pair)
        assert (pair[0].reason is None) == (row.line not in lines(bad.bad)), (pair[0].reason, bad.bad)
    assert lines(broken) <= lines(bad.bad)
