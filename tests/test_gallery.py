"Clips and batches to look at: `show_clips`, the pictures in the report of a check, and `show_batch`"
import json
import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf

from mdl_nbdev import CheckSettings, ConvertSettings, InputError, TrainSettings, check, convert, show_batch, show_clips
from mdl_nbdev.cli.background import Run
from mdl_nbdev.cli.view import View
from mdl_nbdev.data.gallery import RowSample
from mdl_nbdev.data.rows import BadRow, Row, bad_rows_error, rows_html
from mdl_nbdev.model.families import load_chat
from mdl_nbdev.train.dataset import AudioDataset
from mdl_nbdev.train.mix import open_mix


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    "Eight short clips, `0.wav` to `7.wav`; a stereo one, a long one, and a file that is no sound"
    folder = tmp_path_factory.mktemp("clips")
    for i in range(8): sf.write(folder/f"{i}.wav", .5*np.sin(np.arange(1600)*(i + 1)/10), 16000)
    sf.write(folder/"stereo.wav", np.stack([np.zeros(1600), .5*np.sin(np.arange(1600)/9)], axis=1), 16000)
    sf.write(folder/"long.wav", .1*np.sin(np.arange(320_000)/9), 16000)
    (folder/"text.wav").write_text("no sound")
    return folder


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def titles(page): return re.findall(r"<b>([^<]*)</b><div", page)


def test_all_kinds_of_files(tmp_path, clips):
    rows = [(f"{i}.wav", "<even>" if i % 2 == 0 else "odd") for i in range(8)]
    csv = write(tmp_path/"rows.csv", "audio,prediction\n" + "".join(f"{a},{p}\n" for a, p in rows))
    tsv = write(tmp_path/"rows.tsv", "audio\tprediction\n" + "".join(f"{a}\t{p}\n" for a, p in rows))
    jsonl = write(tmp_path/"rows.jsonl", "".join(json.dumps(dict(audio=a, prompt="What?", answer=p)) + "\n" for a, p in rows))
    pq.write_table(pa.table(dict(zip(("audio", "prediction"), map(list, zip(*rows))))), tmp_path/"rows.parquet")
    for path in [csv, tsv, jsonl, tmp_path/"rows.parquet"]:
        page = show_clips(path, base_dir=clips, per_label=2)
        assert titles(page) == ["&lt;even&gt; (4 rows)", "odd (4 rows)"] and "<even>" not in page
        assert page.count("<audio") == page.count("<img") == 4 and "4 of 8 rows, 2 labels; another seed draws others" in page
    assert len({show_clips(csv, base_dir=clips, per_label=1, seed=seed) for seed in (0, 0, 1, 2, 3)}) > 2 > len({show_clips(csv, base_dir=clips) for _ in range(2)})
    assert show_clips(CheckSettings(input=csv, base_dir=clips)) == show_clips(TrainSettings(train_dataset=csv, base_dir=clips, output="x")) == show_clips(csv, base_dir=clips)
    folder = tmp_path/"task"
    folder.mkdir()
    for name in ("a.csv", "b.csv"): (folder/name).write_bytes(csv.read_bytes())
    page = show_clips(folder, base_dir=clips, per_label=8)
    assert "<b>task</b>: 16 rows, 2 labels<" in page and "a.csv:2" in page and "b.csv:9" in page
    unlabeled = write(tmp_path/"unlabeled.csv", csv.read_text() + "0.wav,\n")
    assert "9 rows, 2 labels<" in show_clips(unlabeled, base_dir=clips, per_label=4), "a row without an answer has no label"


def test_parts_of_clips_and_what_cannot_be_read(tmp_path, clips):
    path = write(tmp_path/"rows.csv", "audio,start,end,channel,prediction\nlong.wav,1,1.5,,a\nstereo.wav,0,0.05,1,b\nstereo.wav,0,0.05,0,c\n")
    page = show_clips(path, base_dir=clips)
    assert "long.wav#t=1,1.5" in page.replace("1.000000", "1").replace("1.500000", "1.5") and "0.50 s" in page
    assert page.count("0.05 s") == 2 and page.count("nothing can be heard") == 1, "channel 0 is silent, channel 1 is not"
    path = write(tmp_path/"bad.csv", "audio,prediction\ntext.wav,a\nnone<b>.wav,b\nlong.wav,c\n,d\n0.wav,e,f\n1.wav,\n")
    page = show_clips(path, base_dir=clips, max_audio_seconds=10)
    assert page.count("border-left:3px solid") == 3 and page.count("<audio") == 1
    for text in ["not readable as audio", "none&lt;b&gt;.wav: no such file", "with base_dir", "the limit is 10 s", "1 row without a clip", "1 broken row", "(no answer)"]: assert text in page, text
    (clips/"beside.csv").write_text("audio,prediction\n0.wav,a\n1.wav,a\n")
    assert f"missing clips that base_dir {clips} would find: 2" in show_clips(clips/"beside.csv")


def test_rows_without_labels(tmp_path, clips):
    page = show_clips(write(tmp_path/"bare.csv", "audio\n" + "".join(f"{i}.wav\n" for i in range(8))), base_dir=clips)
    assert titles(page) == [""] and page.count("<audio") == 8 and ": 8 rows<" in page
    page = show_clips(write(tmp_path/"texts.csv", "audio,prediction\n" + "".join(f"{i}.wav,All of {i} & <more>\n" for i in range(8))), base_dir=clips)
    assert titles(page) == [""] and page.count("&amp; &lt;more&gt;") == 8
    turns = [dict(role="user", content="Which?", audio=["0.wav", "1.wav"]), dict(role="assistant", content="first"), dict(role="user", content="Sure?"), dict(role="assistant", content="yes")]
    path = write(tmp_path/"chats.jsonl", (json.dumps(dict(messages=turns)) + "\n")*3 + json.dumps(dict(prompt="1 + 1 = ?", answer="2")) + "\n")
    page = show_clips(path, base_dir=clips)
    assert page.count("<audio") == 6 and "clip 2 of 2" in page and titles(page) == ["yes (3 rows)"] and "first" not in page and "1 row without a clip" in page
    page = show_clips(write(tmp_path/"text.csv", "user_prompt,prediction\na,b\n"))
    assert "no clips; 1 row without a clip" in page and "<img" not in page


def test_the_page_stays_small(tmp_path, clips):
    "Whatever the number of labels, of rows and of clips in a row"
    lines = "".join(f"long.wav,label {i % 300}\n" for i in range(3000))
    page = show_clips(write(tmp_path/"many.csv", "audio,prediction\n" + lines), base_dir=clips)
    assert "24 of 3,000 rows, 8 of 300 labels; another seed draws others" in page and page.count("<audio") == 24 and len(page) < 1_000_000
    assert "first 5 s of 20.0 s" in page
    record = json.dumps(dict(audio=["long.wav"]*60, prompt="What?", answer="noise"))
    page = show_clips(write(tmp_path/"many.jsonl", f"{record}\n"*30), base_dir=clips, per_label=4)
    assert page.count("<audio") == 4*4 and "clip 4 of 60" in page and len(page) < 1_000_000


def test_rows_are_drawn_fairly():
    def row(line): return Row("a.wav", None, None, f"{line % 40}" if line < 400 else "rare", "rows.csv", line, ())
    labels, lines = Counter(), Counter()
    for seed in range(300):
        sample = RowSample(2, 4, seed)
        for line in range(401): sample.add(row(line))
        assert sample.counts.total() == 401 and len(sample.counts) == 41 and len(sample.drawn) == 4
        assert all(len(rows) == (1 if label == "rare" else 2) for label, rows in sample.drawn.items())
        labels.update(sample.drawn.keys())
        lines.update(r.line//40 for rows in sample.drawn.values() for _, r in rows)
    assert len(labels) == 41 and max(labels.values()) < 60 and labels["rare"] > 10, "300*4/41 = 29 of each"
    assert max(lines[i] for i in range(10)) < 1.4*min(lines[i] for i in range(10)), "early and late rows alike"


def test_the_report_of_a_check_plays_what_can_be_played(tmp_path, clips):
    path = write(tmp_path/"rows.csv", "audio,prediction\n0.wav,a\n1.wav,a\n2.wav,b\n3.wav,b\n4.wav,\ntext.wav,b\nlong.wav,b\nnone.wav,<b>\n5.wav,a,x\nstereo.wav,c\n")
    report = check(CheckSettings(input=path, base_dir=clips, max_audio_seconds=10))
    assert [(b.line, bool(b.clip)) for b in report.bad] == [(6, True), (7, True), (8, True), (9, True), (10, False)]
    page = report._repr_html_()
    some, tables = page.split("</details>")
    line, padding = float(re.search(r"font:13px/([\d.]+)", some)[1]), int(re.search(r"<summary style='padding:(\d+)px", some)[1])
    assert 13*line + 2*padding >= 24, "what is clicked has the 24 pixels that WCAG asks for"
    assert some.count("<audio") in (5, 6) and "text.wav" not in some, "of rows that can be used, and of the one without an answer"
    assert tables.count("<audio") == 2 and "first 10 s" in tables, "of the row without an answer, and the beginning of the clip that is too long"
    assert "max_audio_seconds" in tables and "--max" not in page and "<b>.wav" not in page and "--max-audio-seconds" in str(report)
    assert "0.wav, 0.10 s" in report.show_clips() and report.settings.data_options == dict(base_dir=clips, max_audio_seconds=10)
    assert len(page) < 400_000


def test_a_report_downloads_nothing(monkeypatch):
    monkeypatch.setattr("mdl_nbdev.data.clips.fetch", lambda url: pytest.fail("a download"))
    page = rows_html([BadRow("rows.csv", 2, "the server answered 404", "https://example.org/a.wav#t=0,1")])
    assert "404" in page and "<audio" not in page


def test_bad_rows_in_a_notebook(tmp_path, clips, monkeypatch):
    "The exception shows a table with players, once"
    import IPython.display
    shown = []
    monkeypatch.setattr(IPython.display, "display", shown.append)
    path = write(tmp_path/"rows.csv", "audio,prediction\n0.wav,\n1.wav,a,b\n")
    with pytest.raises(InputError, match="2 bad rows:\n.*rows.csv:2: .*\n.*rows.csv:3: .*\nThe clips have not been checked") as e:
        convert(ConvertSettings(input=path, base_dir=clips, output=tmp_path/"out", model_name="tiny"))
    assert e.value._render_traceback_()[0].count("rows.csv:") == 2 and not shown, "in a terminal"
    monkeypatch.setattr("mdl_nbdev.data.rows.in_kernel", lambda: True)
    assert e.value._render_traceback_()[0].startswith("2 bad rows. The clips have") and shown[0].count("<audio") == 1 and shown[0].count("<tr>") == 3
    e.value.is_shown = True
    assert e.value._render_traceback_() and len(shown) == 1
    assert str(bad_rows_error([BadRow("a.csv", 2, "why")])) == "a.csv:2: why"


def test_bad_rows_on_a_dashboard(clips):
    "The table is there until the run starts again, and a long list stays short"
    class Failing(Run):
        bad = [BadRow("rows.csv", i, f"reason <{i}>", str(clips/"long.wav")) for i in range(2, 42)]
        def work(self):
            if self.bad: raise bad_rows_error(self.bad)
            return "fine"
    class Remarks(View): parts = ("remarks",)
    run = Failing(Remarks("Training")).start()
    with pytest.raises(InputError, match="40 bad rows:"): run.wait()
    page = run._repr_html_()
    assert page.count("<audio") == 10 and "reason &lt;2&gt;" in page and "and 30 more" in page and len(page) < 300_000 and not run.error.is_shown
    run.bad = []
    assert run.start().wait() == "fine" and "<audio" not in run._repr_html_()


def test_a_batch(tmp_path, clips):
    path = write(tmp_path/"rows.csv", "audio,user_prompt,prediction\n" + "".join(f"{i}.wav,Is <it> {i}?,answer {i}\n" for i in range(8)))
    settings = dict(model_name="tiny", base_dir=clips)
    page = show_batch(path, 3, **settings)
    assert page.count("<audio") == page.count("<img") == page.count("<pre") == 3 and "3 of 8 rows; another seed" in page and "<it>" not in page
    learned = re.findall(r'<span style="background:#b7e4c7[^>]*>([^<]*)</span>', page)
    assert learned[0] == " carries loss " and len(re.findall(r"answer \d", "".join(learned))) == 3
    assert show_batch(TrainSettings(train_dataset=path, output="x", **settings), 3) == page != show_batch(path, 3, seed=1, **settings)
    folder = convert(ConvertSettings(input=path, output=tmp_path/"out", num_workers=1, **settings)).path
    page = AudioDataset(folder).show_batch(8)
    assert open_mix([folder], load_chat("tiny"), tmp_path).show_batch(8) == page
    assert page.count("<audio") == 8 and "rows.csv:9, " in page and all(f"{i}" in page for i in range(8))
    for source in [folder, tmp_path]:
        with pytest.raises(InputError, match="converted dataset|holds data itself"): show_clips(source)
    with pytest.raises(InputError, match="no such file"): show_batch(write(tmp_path/"lost.csv", "audio,prediction\nlost.wav,a\n"), **settings)


def test_a_long_example_is_folded(tmp_path):
    path = write(tmp_path/"rows.csv", "user_prompt,prediction\n" + f"{'word '*1000},the end\n")
    page = show_batch(path, model_name="tiny-text")
    assert len(page) < 80_000 and re.search(r"… [\d,]+ more …", page) and "carries loss" in page and page.count("#b7e4c7") > 2, "the answer at the end is shown"
