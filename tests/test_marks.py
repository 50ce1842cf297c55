"Blocks of rows that are read without the rows before them"
import csv
import io
import json
import os
import random
import sys
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mdl_nbdev.base.errors import InputError
from mdl_nbdev.data.marks import NEWLINES, Marks, mark_rows
from mdl_nbdev.data.sources import open_rows
from mdl_nbdev.data.tables import TextBlock

PIECES = ["a", "é", "日本", "👋", '"', '""', ",", "\t", "\n", "\r\n", "\r", " ", "\u2028", "\ufeff", "\x0b", "null", "\x85", "x"*40]
ENCODINGS = ["utf-8", "utf-8-sig", "gb18030", "utf-16", "utf-16-le", "cp1252", "shift_jis", "utf-7"]


def text_of(rng): return "".join(rng.choices(PIECES, k=rng.randrange(6)))


def table(rng, delimiter):
    "A table whose cells need quotes, with line ends of three kinds and blank lines"
    end = rng.choice(["\n", "\r\n", "\r"])
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter, lineterminator=end, quoting=rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    writer.writerow(["audio", "user_prompt", "note"])
    for i in range(rng.randrange(1, 30)):
        if rng.random() < .2: out.write(end*rng.randrange(1, 3))
        writer.writerow([f"{i}.wav", text_of(rng), text_of(rng)])
    return out.getvalue() + end*rng.randrange(3)


def records(rng):
    "Records, some of them behind blank lines, perhaps without an end of the last line"
    lines = []
    for i in range(rng.randrange(1, 30)):
        blank = rng.choice(["", "", "", "\n", " \r\n"])
        lines.append(blank + json.dumps(dict(audio=f"{i}.wav", prompt=text_of(rng)), ensure_ascii=rng.random() < .5))
    end = rng.choice(["\n", "\r\n"])
    return end.join(lines) + end*rng.randrange(3)


def random_file(rng, folder, encoding):
    kind = rng.choice(["csv", "tsv", "jsonl"])
    text = records(rng) if kind == "jsonl" else table(rng, dict(csv=",", tsv="\t")[kind])
    path = Path(folder, f"rows.{kind}")
    path.write_bytes(text.encode(encoding, "ignore"))
    return path


def source_of(path, encoding): return open_rows(path, ("audio",), "utf-8" if encoding == "utf-8-sig" else encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_blocks_are_the_rows_of_the_file(encoding, tmp_path):
    "With their lines, whatever cells contain; where the middle of a file cannot be read, all of it is"
    rng, in_blocks, read = random.Random(encoding), 0, 0
    for _ in range(150):
        path, every, seen = random_file(rng, tmp_path, encoding), rng.randrange(1, 6), []
        source, bad = source_of(path, encoding), []
        whole = list(source.rows(bad.append))
        if bad: continue # such as a NUL of UTF-16
        marks = mark_rows(source, every, seen.append)
        marks = Marks.from_dict(json.loads(json.dumps(asdict(marks))))
        in_blocks, read = in_blocks + bool(marks.blocks), read + 1
        assert seen == whole and marks.rows == len(whole) and marks.fits(source)
        chunks = [whole[i:i+every] for i in range(0, len(whole), every)]
        wanted = {n for n in range(len(chunks)) if rng.random() < .5}
        assert list(marks.chosen(source, wanted.__contains__)) == [rows for n, rows in enumerate(chunks) if n in wanted]
        assert [[[type(c) for c in getattr(r, "cells", ())] for r in rows] for rows in marks.chosen(source, lambda n: True)] == \
               [[[type(c) for c in getattr(r, "cells", ())] for r in rows] for rows in chunks], "null in quotes is a text"
    assert in_blocks > 100 if encoding not in ("utf-16", "utf-7") else encoding == "utf-7" or in_blocks < read/4


def rows_and_faults(source, block=None):
    "Good and bad rows, in order"
    found = []
    for row in source.rows(found.append, block): found.append(row)
    return found


def test_bad_rows_of_a_block_are_reported_as_those_of_the_file(tmp_path):
    "From the line on which any row starts, broken or not, everything that follows is read as it is in the whole file"
    rng, checked = random.Random(1), 0
    odd = b'",\t\n\xff\xe9{x' + (b"\0" if sys.version_info >= (3, 11) else b"") # which Python 3.10 refuses in any CSV
    for _ in range(300):
        path = random_file(rng, tmp_path, "utf-8")
        data = bytearray(path.read_bytes())
        for _ in range(rng.randrange(4)): data.insert(rng.randrange(len(data)//2, len(data)), rng.choice(odd))
        path.write_bytes(data)
        source = source_of(path, "utf-8")
        whole, newline = rows_and_faults(source), NEWLINES[type(source)]
        lines = list(open(path, encoding="utf-8-sig", errors="surrogateescape", newline=newline))
        for at in rng.sample(range(1, len(whole)), min(3, len(whole) - 1)) if len(whole) > 1 else []:
            before = whole[at].line - 1
            if before: assert rows_and_faults(source, TextBlock(before, lines[before:])) == whole[at:]
            checked += 1
    assert checked > 300


def parquet(path, n, **kw):
    pq.write_table(pa.table(dict(audio=[f"{i}.wav" for i in range(n)], user_prompt=[None if i % 3 else "null" for i in range(n)])), path, **kw)
    return open_rows(path, ("audio",))


@pytest.mark.parametrize("every, size", [(8, 100), (256, 100), (64, 1000), (256, 1), (3, 7)])
def test_parquet(every, size, tmp_path, monkeypatch):
    "Across row groups of any size; what is not wanted is not converted"
    source = parquet(tmp_path/"rows.parquet", 1000, row_group_size=size)
    marks, whole = mark_rows(source, every, lambda row: None), list(source.rows())
    assert marks.rows == 1000 and marks.blocks is None and marks.fits(source)
    converted = []
    row = type(source).row
    monkeypatch.setattr(type(source), "row", lambda self, cells, line: (converted.append(line), row(self, cells, line))[1])
    last, taken = (1000 - 1)//every, []
    def take(n): return n in (1, last) and not taken.append(n)
    assert list(marks.chosen(source, take)) == [whole[every:2*every], whole[last*every:]]
    assert taken == [1, last] and len(converted) <= 4*every
    os.utime(source.path, ns=(1, 1))
    assert not marks.fits(source)


def test_other_files_are_read_from_the_start(tmp_path):
    import tarfile
    with tarfile.open(tmp_path/"rows.tar", "w") as tar:
        for i in range(5):
            data = json.dumps(dict(prompt=str(i))).encode()
            info = tarfile.TarInfo(f"{i}.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    source = open_rows(tmp_path/"rows.tar")
    marks = mark_rows(source, 2, lambda row: None)
    assert marks.blocks is None and marks.rows == 5
    assert [[r.line for r in rows] for rows in marks.chosen(source, [1, 2].__contains__)] == [[3, 4], [5]]


@pytest.mark.parametrize("change", [
    lambda text: text.replace("q3", "q7"), lambda text: text + "x.wav,y\n", lambda text: text + "\n", lambda text: text[:-1],
    lambda text: text.replace("user_prompt", "user_notes "), lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n")])
def test_every_change_is_noticed(change, tmp_path):
    "Also where size and time stay as they were"
    path = tmp_path/"rows.csv"
    text = "audio,user_prompt\n" + "".join(f"{i}.wav,q{i}\n" for i in range(6)) + "\n"
    path.write_text(text)
    source = open_rows(path, ("audio",))
    marks, stat = mark_rows(source, 2, lambda row: None), path.stat()
    path.write_bytes(change(text).encode())
    os.utime(path, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    assert not marks.fits(open_rows(path, ("audio",)))
    path.write_text(text)
    assert marks.fits(source)


def test_a_changed_block_is_not_read(tmp_path):
    path = tmp_path/"rows.jsonl"
    path.write_text('{"prompt": "1"}\n{"prompt": "2"}\n')
    source = open_rows(path)
    marks = mark_rows(source, 1, lambda row: None)
    path.write_text('{"prompt": "1"}\n{"prompt": "3"}\n')
    assert marks.read(source, 0)
    with pytest.raises(InputError, match="rows.jsonl: changed while its rows were read; run the same command again"): marks.read(source, 1)


def test_bad_rows_are_in_one_report(tmp_path):
    path = tmp_path/"rows.csv"
    path.write_text("audio,x\na.wav,1\nb.wav\nc.wav,1,2\n")
    with pytest.raises(InputError, match="2 bad rows:(.|\n)*rows.csv:3: 1 cell(.|\n)*rows.csv:4: 3 cells"):
        mark_rows(open_rows(path, ("audio",)), 1, lambda row: None)
