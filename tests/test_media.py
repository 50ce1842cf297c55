"""Files that ffmpeg and sox made, from `fixtures/audio/make.py`: each is read as ffmpeg decodes it, or refused with the reason

Equal means the same rate, every sample within 1e-4, or within what `LOOSE` says, and a length that differs by at most what `BLOCKS` says: some
decoders end with a whole block where others end with the recording."""
import os
import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from mdl_nbdev.base.errors import InputError
from mdl_nbdev.data.audio import audio_info, decode, load_audio, open_clip
from mdl_nbdev.data.clips import collected_notes
from mdl_nbdev.data.media import file_contents, mp3_fault
from mdl_nbdev.data.remote import AudioError

folder = Path(__file__).parent/"fixtures"/"audio"
names = sorted(p.name for p in folder.iterdir() if p.suffix not in (".py", ".npz"))
expected = dict(np.load(folder/"expected.npz"))
facts = dict(zip(sorted(set(expected) - {"facts"}), expected.pop("facts").tolist()))
LOOSE = {"ima.wav": 2e-3, "opus": .1, "d_middle_no_tag.mp3": .03} # Another rounding, another decoder, and what is invented for 40 bytes of zeros
BLOCKS = {"id3.mp3": 1152, "opus": 300, "vorbis": 160, "sox.voc": 4} # Frames at the end
if find_spec("av") and int(version("av").split(".")[0]) >= 19: BLOCKS["mp4"] = 1023 # it ends with the recording
VORBIS = ("stereo.ogg", "vorbis8.ogg", "sox.ogg", "ogg_as.wav", "tracks.ogg", "e_late_100.ogg")
SHIFTED = ("opus.webm", "opus.mka", "tracks.mka") # PyAV's FFmpeg leaves 4 ms of what the encoder needed to start
REFUSED = { # The others are read
    "alac.caf": "unsupported encoding", "flac_in.ogg": "not readable", "g726.wav": "Malformed 'fmt ' chunk", "h_empty.wav": "contains no sound", "h_plus_1000.wav": "truncated, its header promises",
    "h_rate_0.wav": "not readable", "h_two_data.wav": "not readable", "e_late_5000.opus": "malformed", "j_wav.wav": "not readable", "j_stereo.flac": "damaged or truncated",
    **{f"j_{name}": "several recordings joined into one file" for name in ("cbr.mp3", "opus.ogg", "stereo.ogg", "m4a.m4a", "webm.webm")},
    "d_html.mp3": "it is an HTML page", "d_json.wav": "it is JSON", "d_lfs.flac": "it is a pointer of Git LFS", "d_gzip.wav": "it is a gzip archive", "d_zip.wav": "it is a zip archive", "d_picture.wav": "it is a PNG picture",
    "d_video.mp4": "without sound", "d_zeros.wav": "not readable", "d_middle_stereo.ogg": "contains no sound|malformed|damaged",
    **{f"d_middle_{name}": "damaged|malformed|truncated" for name in ("stereo.flac", "opus.ogg", "adts.aac", "opus.webm")},
    **{f"d_half_{name}": "truncated|damaged|malformed|not readable" for name in ("h_right.wav", "ima.wav", "stereo.flac", "stereo.ogg", "opus.ogg", "cbr.mp3", "no_tag.mp3", "aac.m4a", "opus.webm", "s16.aiff", "s16.au", "s16.w64", "adts.aac", "wma2.wma")}}


def needs_pyav(name): return file_contents((folder/name).read_bytes()[:200])[1]


@pytest.mark.parametrize("name", names)
def test_as_ffmpeg_decodes_it(name, capfd):
    if needs_pyav(name): pytest.importorskip("av")
    path = folder/name
    try:
        with open_clip(path) as f: rate, x = f.samplerate, np.concatenate(list(decode(f, path, 600.)))
    except InputError as e:
        assert name in REFUSED, str(e)
        with pytest.raises(InputError, match=f"{name}: .*({REFUSED[name]}).*; \\w+"): raise e
    else:
        assert name not in REFUSED and rate == facts[name][0]
        if name in SHIFTED: x = x[len(x) - facts[name][1]:]
        kind = "opus" if "opus" in name or name == "tracks.mka" else "vorbis" if name in VORBIS else "mp4" if re.search("3gp|m4a|mov|mp4", name) else name
        assert abs(len(x) - facts[name][1]) <= BLOCKS.get(kind, 0)
        ours, theirs = x[::7][:len(expected[name])], expected[name][:len(x[::7])]/32767
        assert np.abs(ours - theirs).max() < LOOSE.get(kind, 1e-4) and np.abs(ours - theirs).mean() < .03
    assert not capfd.readouterr().err, "a decoder's own notes"


def test_the_table():
    assert len(names) >= 60 and sum(p.stat().st_size for p in folder.iterdir()) < 900_000
    assert set(REFUSED) <= set(names) and len(set(names) - set(REFUSED)) > 60
    assert [n for n in expected if n not in facts] == []


def length(path):
    with open_clip(path) as f: return sum(map(len, decode(f, path, 600.)))


@pytest.mark.parametrize("name", [n for n in names if n not in REFUSED])
def test_a_second_recording_is_never_lost(tmp_path, name):
    "Copies of a file, one behind the other, are refused, or all of them are read"
    if needs_pyav(name): pytest.importorskip("av")
    (tmp_path/name).write_bytes((folder/name).read_bytes()*4)
    try: all_four, once = length(tmp_path/name), length(folder/name)
    except InputError as e: assert re.search("several recordings joined|damaged|not readable|truncated", str(e))
    else: assert all_four >= 4*once - 900


def test_sound_that_holds_the_beginning_of_a_recording(tmp_path):
    "Only a file that begins in the same way counts"
    sound = np.frombuffer(b".snd\0\0\0\x20" + bytes(8) + b"\x03\0\0RIFF\0\0\0\0WAVEfmt \0\0 ftypNIST_1A\n"*100, np.int16)
    for name in ("a.wav", "a.flac"):
        sf.write(tmp_path/name, sound, 16000, subtype="PCM_16")
        assert length(tmp_path/name) == len(sound)


@pytest.mark.parametrize("name", ["tracks.mka", "tracks.m4a", "tracks.ogg"])
def test_several_tracks_are_noted(name):
    "The first is used, and the clip is counted"
    if needs_pyav(name): pytest.importorskip("av")
    path = folder/name
    with collected_notes("t.csv:2") as notes: load_audio(path)
    assert notes == {"tracks": [1, f"t.csv:2, {path}"]}


def test_a_truncated_avi(tmp_path):
    (tmp_path/"a.avi").write_bytes((folder/"pcm.avi").read_bytes()[:-500])
    with pytest.raises(InputError, match="a.avi: truncated, it is shorter than its header promises; copy"): length(tmp_path/"a.avi")


def test_ffmpeg_opens_no_other_file_or_host(tmp_path):
    "What a file begins with does not decide what FFmpeg takes it for: this one names a host, as a playlist names files"
    pytest.importorskip("av")
    (tmp_path/"a.wv").write_bytes(b"wvpk\nv=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5000 RTP/AVP 0\n")
    with pytest.raises(InputError, match="a.wv: WavPack, not readable .Invalid argument."): load_audio(tmp_path/"a.wv")


def test_a_name_with_a_colon(tmp_path, monkeypatch):
    "It does not begin the protocol of an address"
    pytest.importorskip("av")
    (tmp_path/"12:30.m4a").write_bytes((folder/"aac.m4a").read_bytes())
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(load_audio("12:30.m4a"), load_audio(folder/"aac.m4a"))


def test_without_pyav(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(InputError, match=r'aac.m4a: MP4, M4A or QuickTime, which needs the optional library PyAV; install "mdl_nbdev\[media\]", or convert it'): load_audio(folder/"aac.m4a")


@pytest.mark.skipif(not pytest.importorskip("importlib.util").find_spec("av"), reason="needs PyAV")
def test_a_part_of_a_media_file():
    assert np.array_equal(load_audio(f"{folder/'aac.m4a'}#t=0.05,0.1"), load_audio(folder/"aac.m4a")[800:1600])
    with pytest.raises(InputError, match="the limit is 0.1 s"): load_audio(folder/"aac.m4a", max_seconds=.1)


@pytest.mark.parametrize("name", [name for name in names if name not in REFUSED])
def test_parts_beyond_the_end(name):
    "Refused, whether the length is in the header or known at the end only; a download is kept, since it is intact"
    if needs_pyav(name): pytest.importorskip("av")
    with open_clip(folder/name) as f: seconds = len(np.concatenate(list(decode(f, name, 600.))))/f.samplerate
    for times in ("50", "50,51", f"0.01,{seconds + .2}", f"{seconds + .1}"):
        for read in (load_audio, audio_info):
            with pytest.raises(AudioError, match="outside the clip, which is 0[.]\\d+ s long; correct") as e: read(f"{folder/name}#t={times}")
            assert type(e.value) is AudioError, "and not of the kind that removes a download"
    for read in (load_audio, audio_info): read(f"{folder/name}#t=0.01,{seconds + .05}") # annotations are rounded


def test_mp3_with_tags_and_junk_around(tmp_path):
    data = (folder/"cbr.mp3").read_bytes()
    for before, after in [(b"", b"TAG" + bytes(125)), (b"", bytes(3000)), (b"", b"APETAGEX" + os.urandom(50))]:
        (tmp_path/"a.mp3").write_bytes(before + data + after)
        assert mp3_fault(tmp_path/"a.mp3") is None
    (tmp_path/"a.mp3").write_bytes(data[:600] + bytes(5) + data[600:])
    assert "damaged" in mp3_fault(tmp_path/"a.mp3")
    (tmp_path/"a.mp3").write_bytes(b"ID3")
    assert mp3_fault(tmp_path/"a.mp3") is None
