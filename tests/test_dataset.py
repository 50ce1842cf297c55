"Converted datasets: what lies on disk, workers, crashes, batches, and folders of MDL-Toolkit"
import os
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile as sf
from hypothesis import given
from hypothesis import strategies as st

from mdl_nbdev.audio import load_audio, to_int16
from mdl_nbdev.chat import Example, fingerprint, tiny_tokenizer
from mdl_nbdev.config import ConvertSettings, InputError
from mdl_nbdev.data import read_rows
from mdl_nbdev.dataset import AudioDataset, Collator, LengthBatchSampler, convert, open_dataset, padding_waste
from mdl_nbdev.sounds import make_sounds

TOK = tiny_tokenizer()


@pytest.fixture(scope="module")
def csv(tmp_path_factory): return make_sounds(tmp_path_factory.mktemp("sounds"), 150, seed=3)


def settings(csv, out, **kw): return ConvertSettings(input=csv, base_dir=csv.parent, output=out, model_name="tiny", num_workers=kw.pop("num_workers", 1), **kw)


def files(folder): return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_rows_hold_the_clips_and_the_texts(csv, tmp_path, dtype):
    ds = AudioDataset(convert(settings(csv, tmp_path / "d", audio_dtype=dtype, user_prompt="What?")).path)
    plain = datasets.load_from_disk(str(tmp_path / "d"))
    for i, row in enumerate(read_rows(csv)):
        wave = load_audio(csv.parent / row.audio)
        assert np.array_equal(ds[i].clips[0], to_int16(wave) if dtype == "int16" else wave)
        assert TOK.decode(ds[i].labels[ds[i].labels >= 0]) == row.prediction + "<|im_end|>"
        assert ds[i].line == row.line == plain[i]["line"] and plain[i]["input_ids"] == ds[i].input_ids.tolist()
        if i == 5: assert plain[i]["audio"] == pytest.approx(ds[i].clips[0].tolist())


def test_any_number_of_workers_writes_the_same_bytes(csv, tmp_path):
    one, three = (convert(settings(csv, tmp_path / str(n), num_workers=n)).path for n in (1, 3))
    a, b = files(one), files(three)
    assert a == b and len([n for n in a if n.endswith(".arrow")]) == 3


def test_all_bad_rows_in_one_report_and_finished_shards_kept(csv, tmp_path):
    broken = tmp_path / "broken.csv"
    lines = csv.read_text().splitlines()
    good = lines[70]
    lines[70], lines[75] = "lost.wav,x", good.split(",")[0] + ","
    broken.write_text("\n".join(lines) + "\n")
    s = replace(settings(csv, tmp_path / "d"), input=broken)
    with pytest.raises(InputError, match=r"broken.csv:76: the prediction is empty"): convert(s)
    lines[75] = good
    broken.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=r"broken.csv:71: .*lost.wav: no such file"): convert(s)
    kept = {p.name: os.stat(p).st_mtime_ns for p in Path(f"{s.output}.part").glob("data-*.arrow")}
    assert len(kept) == 2
    lines[70] = good
    broken.write_text("\n".join(lines) + "\n")
    out = convert(s).path
    assert all(os.stat(out / n).st_mtime_ns == t for n, t in kept.items())
    assert len(AudioDataset(out)) == 150 and not Path(f"{s.output}.part").exists()


def test_a_changed_clip_is_converted_again(tmp_path):
    csv = make_sounds(tmp_path / "s", 5, seed=1)
    out = dict(model_name="tiny", base_dir=csv.parent)
    before = open_dataset(csv, TOK, tmp_path / "run", **out)[0].clips[0].copy()
    first = next(read_rows(csv)).audio
    sf.write(csv.parent / first, np.zeros(8000, np.float32), 16000)
    after = open_dataset(csv, TOK, tmp_path / "run", **out)[0].clips[0]
    assert len(after) == 8000 and not after.any() and before.any()


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=200), st.integers(1, 9), st.integers(0, 3))
def test_an_epoch_has_every_row_once_in_an_order_of_its_own(lengths, size, epoch):
    s = LengthBatchSampler(lengths, size, seed=7, pool=4)
    batches = s.order(epoch)
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    assert len(batches) == len(s) and max(map(len, batches)) <= size
    s.set_epoch(epoch)
    assert [b.tolist() for b in LengthBatchSampler(lengths, size, seed=7, pool=4).order(epoch)] == list(s)


def test_batches_of_like_lengths_waste_little():
    lengths = np.random.default_rng(0).integers(1, 3000, 5000)
    s = LengthBatchSampler(lengths, 16)
    assert padding_waste(lengths, s.order(0)) < 0.02 < 0.3 < padding_waste(lengths, np.split(np.arange(5000), range(16, 5000, 16)))
    assert [b.tolist() for b in s.order(0)] != [b.tolist() for b in s.order(1)]


def example(n, clips): return Example(np.arange(n, dtype=np.int32), np.full(n, -100, np.int32), [np.full(c, 7, np.int16) for c in clips])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side):
    b = Collator(99, side)([example(3, [10]), example(5, [4, 20]), example(2, [])])
    ids = [[0, 1, 2, 99, 99], [0, 1, 2, 3, 4], [0, 1, 99, 99, 99]]
    if side == "left": ids = [[99, 99, 0, 1, 2], ids[1], [99, 99, 99, 0, 1]]
    assert b["input_ids"].tolist() == ids and b["attention_mask"].tolist() == [[int(x != 99) for x in r] for r in ids]
    assert b["audio_length"].tolist() == [10, 4, 20] and b["input_values"].shape == (3, 20) and int(b["input_values"].sum()) == 7 * 34
    assert "input_values" not in Collator(99)([example(2, [])])


def test_a_folder_of_mdl_toolkit_opens(tmp_path):
    "Its rows are padded to their conversion batch: on the left with masked tokens, on the right with silence"
    wave = np.linspace(-1, 1, 4000, dtype=np.float32)
    datasets.Dataset.from_dict({
        "input_ids": [[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]], "attention_mask": [[0, 0, 1, 1, 1], [1] * 5], "labels": [[-100, -100, -100, 6, 7], [-100] * 3 + [4, 5]],
        "input_values": [np.pad(wave[:3300], (0, 700)).tolist(), wave.tolist()], "audio_length": [3300, 4000]}).save_to_disk(tmp_path / "peer")
    ds = AudioDataset(tmp_path / "peer", fingerprint(TOK))
    assert ds[0].input_ids.tolist() == [5, 6, 7] and ds[0].labels.tolist() == [-100, 6, 7] and np.array_equal(ds[0].clips[0], wave[:3300])
    assert ds.n_tokens.tolist() == [3, 5] and ds.n_samples.tolist() == [3300, 4000]


@pytest.mark.parametrize("what", ["nothing", "a file of another kind", "an empty folder", "missing columns"])
def test_what_is_no_dataset_is_refused(tmp_path, what):
    path = tmp_path / "x"
    if what == "a file of another kind": path.write_text("hello")
    if what == "an empty folder": path.mkdir()
    if what == "missing columns": datasets.Dataset.from_dict({"input_ids": [[1]], "labels": [[1]]}).save_to_disk(path)
    with pytest.raises(InputError, match="x: "): AudioDataset(path)
