"Clips of many formats, rates and channels against what they were made from; cut and odd files; downloads from a server that misbehaves"
import http.server
import itertools
import re
import struct
import threading
import time
import wave
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile as sf

import mdl_nbdev.data.remote as remote
from mdl_nbdev.base.html import audio_player
from mdl_nbdev.data.audio import audio_info, from_int16, load_audio, to_int16
from mdl_nbdev.data.clips import collected_notes, note_clip, resolve
from mdl_nbdev.data.pictures import spectrogram_html, waveform_html
from mdl_nbdev.data.remote import AudioError, cached_path, clip_record, fetch

rates = [8000, 11025, 16000, 22050, 44100, 48000, 96000]
TONES = [220., 440., 1000., 3000.] # Hz; all below half of the lowest rate


def tones(rate, seconds=0.8, channels=1):
    "The sound of a clip by its formula, [samples, channels]; a channel has tones of its own"
    t = np.arange(round(seconds*rate))/rate
    return np.stack([sum(np.sin(2*np.pi*f*t + c) for f in TONES[c%4:][:2])*.2 for c in range(channels)], 1)


def write_wave(path, x, rate, width=2):
    "Write samples with the standard library"
    scaled = np.rint(x*(2**(8*width-1)-1)).astype(np.int64)
    if width == 1: data = (scaled + 128).astype(np.uint8).tobytes()
    else: data = scaled.astype("<i8").reshape(-1, 1).view(np.uint8)[:, :width].tobytes()
    with wave.open(str(path), "wb") as f:
        f.setnchannels(x.shape[1]), f.setsampwidth(width), f.setframerate(rate)
        f.writeframes(data)
    return scaled/2**(8*width-1)


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_at_16_khz_is_exact(tmp_path, channels, width):
    stored = write_wave(tmp_path/"a.wav", tones(16000, channels=channels), 16000, width)
    np.testing.assert_allclose(load_audio(tmp_path/"a.wav"), stored.mean(1), atol=1e-7)


@pytest.mark.parametrize("rate", rates)
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_rates(tmp_path, rate, channels):
    "A resampled clip is the formula at other times; its two ends lack what comes before and behind"
    write_wave(tmp_path/"a.wav", tones(rate, channels=channels), rate)
    w, expected = load_audio(tmp_path/"a.wav"), tones(16000, channels=channels).mean(1)
    info = audio_info(tmp_path/"a.wav")
    assert (info.frames, info.sample_rate, info.channels) == (round(.8*rate), rate, channels)
    assert w.dtype == np.float32 and len(w) == info.samples == len(expected)
    np.testing.assert_allclose(w[800:-800], expected[800:-800], atol=1e-3)


@pytest.mark.parametrize("rate", rates)
@pytest.mark.parametrize("n", [1, 2, 7, 100, 12345])
def test_length_is_known_beforehand(tmp_path, rate, n):
    sf.write(tmp_path/"a.wav", np.zeros(n), rate)
    expected = int(n*16000/rate + .5)
    if not expected:
        for read in [audio_info, load_audio]:
            with pytest.raises(AudioError, match="less than one sample"): read(tmp_path/"a.wav")
    else: assert len(load_audio(tmp_path/"a.wav")) == audio_info(tmp_path/"a.wav").samples == expected


formats = {"a.wav": ["PCM_16", "PCM_24", "PCM_32", "PCM_U8", "FLOAT", "DOUBLE", "ULAW", "ALAW", "IMA_ADPCM"], "a.flac": ["PCM_16", "PCM_24"], "a.ogg": ["VORBIS", "OPUS"], "a.mp3": ["MPEG_LAYER_III"], "a.aiff": ["PCM_16"], "a.au": ["PCM_16"], "a.w64": ["PCM_16"], "a.caf": ["PCM_16"]}
kinds = [(name, sub, channels, rate) for name, subs in formats.items() for sub in subs for channels, rate in itertools.product([1, 2], [16000, 44100, 48000]) if (sub, rate) != ("OPUS", 44100)]


@pytest.mark.parametrize("name, subtype, channels, rate", kinds)
def test_formats(tmp_path, name, subtype, channels, rate):
    "The strongest frequencies of a decoded clip are those it was made of, and lossless formats give the samples back"
    x = tones(rate, channels=channels)
    sf.write(tmp_path/name, x, rate, subtype)
    w, info = load_audio(tmp_path/name), audio_info(tmp_path/name)
    assert (info.channels, info.sample_rate) == (channels, rate)
    assert abs(len(w) - info.samples) <= (2304 if name == "a.mp3" else 0)
    assert abs(len(w) - .8*16000) <= (2304 if name == "a.mp3" or subtype == "IMA_ADPCM" else 8), "these two come in blocks"
    spectrum = np.abs(np.fft.rfft(w[800:800+8000]*np.hanning(8000))) # bins of 2 Hz
    peaks = {round(2*i/10)*10 for i in range(1, 4000) if spectrum[i] > .2*spectrum.max() and spectrum[i] == spectrum[max(i-5, 0):i+6].max()}
    assert peaks == set(TONES[:2] if channels == 1 else TONES[:3])
    lossless = subtype.startswith("PCM") or subtype in ("FLOAT", "DOUBLE")
    if lossless and rate == 16000: np.testing.assert_allclose(w, x.mean(1), atol=2**-7 if subtype == "PCM_U8" else 2**-15)


@pytest.mark.parametrize("rate", [8000, 24000, 48000])
def test_another_sample_rate(tmp_path, rate):
    "A model may take another rate than 16 kHz; the length is known beforehand there too"
    write_wave(tmp_path/"a.wav", tones(44100), 44100)
    w = load_audio(tmp_path/"a.wav", sample_rate=rate)
    assert len(w) == audio_info(tmp_path/"a.wav").samples_at(rate) == round(.8*rate)
    np.testing.assert_allclose(w[rate//20:-rate//20], tones(rate)[:, 0][rate//20:-rate//20], atol=1e-3)


def test_nothing_is_folded_back(tmp_path):
    "A tone above 8 kHz is gone at 16 kHz, instead of sounding as another"
    t = np.arange(48000)/48000
    sf.write(tmp_path/"a.wav", .9*np.sin(2*np.pi*10_000*t), 48000)
    assert np.abs(load_audio(tmp_path/"a.wav"))[800:-800].max() < 1e-3


def test_long_clips_in_pieces(tmp_path):
    "What is decoded and resampled block by block is the whole: three minutes against the formula"
    t = np.arange(44100*180)/44100
    sf.write(tmp_path/"a.flac", .5*np.sin(2*np.pi*440*t), 44100)
    w = load_audio(tmp_path/"a.flac")
    assert len(w) == 16000*180
    np.testing.assert_allclose(w[800:-800], .5*np.sin(2*np.pi*440*np.arange(len(w))/16000)[800:-800], atol=1e-3)


def test_values_beyond_full_scale(tmp_path):
    sf.write(tmp_path/"a.wav", np.array([1.5, -1.9, .5, 2.]), 16000, "FLOAT")
    assert load_audio(tmp_path/"a.wav").tolist() == [1, -1, .5, 1]
    for value in [2.1, -3e4, np.inf, -np.inf, np.nan]:
        sf.write(tmp_path/"a.wav", np.array([0, value]), 16000, "DOUBLE")
        with pytest.raises(AudioError, match="NaN or infinite|full scale is 1"): load_audio(tmp_path/"a.wav")


def test_int16():
    x = np.array([-2, -1, -1+2**-16, -.5, -2**-17, 0, 2**-17, .5, 1-2**-16, 1, 2], np.float32)
    assert to_int16(x).tolist() == [-32768, -32768, -32768, -16384, 0, 0, 0, 16384, 32767, 32767, 32767]
    every = np.arange(-32768, 32768, dtype=np.int16)
    assert (to_int16(from_int16(every)) == every).all() and from_int16(every).min() == -1


# Files that are cut, or odd

def whole(folder, name, seconds=2, rate=16000, **kwargs):
    sf.write(folder/name, np.random.default_rng(0).uniform(-.3, .3, seconds*rate), rate, **kwargs)
    return (folder/name).read_bytes()


@pytest.mark.parametrize("name, kwargs", [("a.wav", {}), ("a.flac", {}), ("a.ogg", dict(subtype="VORBIS")), ("b.ogg", dict(subtype="OPUS")), ("a.aiff", {}), ("a.w64", {}),
    *((f"a.{fmt.lower()}", dict(format=fmt)) for fmt in ("NIST", "VOC", "SVX", "SDS"))], ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("share", [.1, .5, .9, .999])
def test_a_cut_file_is_no_shorter_clip(tmp_path, name, kwargs, share):
    data = whole(tmp_path, name, **kwargs)
    assert len(load_audio(tmp_path/name)) == 32000
    (tmp_path/name).write_bytes(data[:int(share*len(data))])
    with pytest.raises(AudioError, match="truncated|damaged|not readable"): load_audio(tmp_path/name)


def test_a_header_that_promises_too_little_is_noted(tmp_path):
    data = bytearray(whole(tmp_path, "a.wav"))
    struct.pack_into("<I", data, data.find(b"data") + 4, 8000)
    (tmp_path/"a.wav").write_bytes(data)
    with collected_notes("t.csv") as notes: assert len(load_audio(tmp_path/"a.wav")) == 4000
    assert list(notes) == ["header"]


def test_bytes_in_the_middle_of_a_flac(tmp_path):
    data = whole(tmp_path, "a.flac")
    (tmp_path/"a.flac").write_bytes(data[:20000] + bytes(3000) + data[23000:])
    with pytest.raises(AudioError): load_audio(tmp_path/"a.flac")


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFFFFF])
def test_a_wav_from_a_pipe(tmp_path, size):
    "A recorder that writes to a pipe can't go back and fill in the length"
    data = bytearray(whole(tmp_path, "a.wav"))
    data[4:8] = data[40:44] = struct.pack("<I", size)
    (tmp_path/"b.wav").write_bytes(data)
    assert len(load_audio(tmp_path/"b.wav")) == audio_info(tmp_path/"b.wav").samples == 32000
    assert (load_audio(tmp_path/"b.wav") == load_audio(tmp_path/"a.wav")).all()


@pytest.mark.parametrize("riff, data, frames", [(16036, 0, 8000), (0xFFFFFFFF, 0, 8000), (16036, 16044, 8000)])
def test_wrong_sizes_in_a_wav(tmp_path, riff, data, frames):
    "Recorders that write no data size, or count the header as sound"
    raw = bytearray(whole(tmp_path, "a.wav", seconds=1)[:44 + 2*frames])
    raw[44:48] = b"\0\1\2\3"
    raw[4:8], raw[40:44] = struct.pack("<I", riff), struct.pack("<I", data)
    (tmp_path/"b.wav").write_bytes(raw)
    assert len(load_audio(tmp_path/"b.wav")) == audio_info(tmp_path/"b.wav").samples == frames


@pytest.mark.parametrize("name, kwargs", [("a.mp3", {}), ("a.ogg", {}), ("b.ogg", dict(subtype="OPUS"))], ids=["mp3", "vorbis", "opus"])
def test_recordings_joined_into_one_file(tmp_path, name, kwargs):
    "Decoders hear only the first of them"
    one = whole(tmp_path, name, **kwargs)
    sf.write(tmp_path/f"2{name}", np.zeros(16000), 16000, **kwargs)
    (tmp_path/f"both-{name}").write_bytes(one + (tmp_path/f"2{name}").read_bytes())
    assert len(load_audio(tmp_path/name)) >= 32000
    for read in [audio_info, load_audio]:
        with pytest.raises(AudioError, match="several recordings joined"): read(tmp_path/f"both-{name}")


def test_an_mp3_makes_no_noise_on_stderr(tmp_path, capfd):
    whole(tmp_path, "a.mp3")
    load_audio(tmp_path/"a.mp3"), audio_info(tmp_path/"a.mp3")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("cell", ["data:audio/wav;base64," + "A"*10_000, "UklGRiR9AABXQVZFZm10IBAAAAABAAEAgD4/+"*20 + "=", "SUQz\n"*100])
def test_sound_inside_a_cell(cell):
    with pytest.raises(AudioError, match="the cell contains audio data") as e: load_audio(cell)
    assert len(str(e.value)) < 200


def test_chunks_around_the_sound(tmp_path):
    data = whole(tmp_path, "a.wav")
    tag = b"LIST" + struct.pack("<I", 6) + b"INFO\0\0"
    odd = data[:36] + tag + data[36:] + tag
    (tmp_path/"b.wav").write_bytes(odd[:4] + struct.pack("<I", len(odd)-8) + odd[8:])
    assert (load_audio(tmp_path/"b.wav") == load_audio(tmp_path/"a.wav")).all()


@pytest.mark.parametrize("name, data, message", [
    ("a.raw", bytes(1000), "raw samples without a header"), ("a.wav", b"RIFF\0\0\0\0WAVE", "not readable"), ("a.mp3", b"ID3\x03" + bytes(50), "not readable|damaged|truncated"),
    ("a.flac", b"fLaC" + bytes(100), "not readable|damaged|contains no sound"), ("a.ogg", b"OggS" + bytes(100), "not readable|damaged"), ("a.wav", bytes(10000), "not readable")])
def test_files_that_are_no_sound(tmp_path, name, data, message):
    (tmp_path/name).write_bytes(data)
    for read in [audio_info, load_audio]:
        with pytest.raises(AudioError, match=f"{name}: .*({message}).*; (save|copy) it"): read(tmp_path/name)


def test_a_name_does_not_matter(tmp_path):
    data = whole(tmp_path, "a.flac")
    (tmp_path/"b.mp3").write_bytes(data)
    assert (load_audio(tmp_path/"b.mp3") == load_audio(tmp_path/"a.flac")).all()


def test_the_limit_is_kept(tmp_path):
    for name in ["a.wav", "a.ogg", "a.mp3"]:
        whole(tmp_path, name)
        assert len(load_audio(tmp_path/name, max_seconds=2.2)) >= 32000
        with pytest.raises(AudioError, match="the limit is 1.9 s"): load_audio(tmp_path/name, max_seconds=1.9)


def test_places(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    whole(tmp_path, "a é.wav")
    for place in ["a é.wav", "./a é.wav", "~/a é.wav", str(tmp_path/"a é.wav"), resolve("a é.wav", tmp_path), resolve("a é.wav", "~"), resolve("~/a é.wav", "/elsewhere")]: assert len(load_audio(place)) == 32000


# Displays

def test_displays():
    import base64
    import io
    w = tones(16000, seconds=3)[:, 0].astype(np.float32)
    page = audio_player(w, max_seconds=2)
    sound, rate = sf.read(io.BytesIO(base64.b64decode(page.split("base64,")[1].split('"')[0])))
    assert rate == 16000 and abs(len(sound) - 32000) <= 2304 and "first 2 s of 3.0 s" in page
    assert "first" not in audio_player(to_int16(w)) and len(page) < 60_000
    svg = base64.b64decode(waveform_html(np.array([0, 1, -1, 0], np.float32), width=8, height=10).split("base64,")[1].split('"')[0]).decode()
    assert svg.count("<polygon") == 1 and ",0.0" in svg and ",10.0" in svg


def test_spectrogram():
    "The loudest row of the picture is the pitch of a tone: rows are 8000/64 Hz each, from high to low"
    import base64
    import io

    from PIL import Image
    w = np.sin(2*np.pi*3000*np.arange(16000)/16000)
    for waveform in [w, (w*30000).astype(np.int16)]:
        png = base64.b64decode(spectrogram_html(waveform, width=40).split("base64,")[1].split('"')[0])
        brightness = np.asarray(Image.open(io.BytesIO(png)).convert("L"), float)
        assert brightness.shape == (64, 40) and abs(63 - brightness.mean(1).argmax() - 3000*64/8000) <= 1
    spectrogram_html(w[:10]), spectrogram_html(np.zeros(1000, np.int16))


def test_old_names():
    "Imports written for version 0.1.0"
    from mdl_nbdev.audio import audio_html, duration_text, svg_image
    assert "first 2 s of 3.0 s" in audio_html(np.zeros(48000, np.int16), max_seconds=2.) and duration_text(90) == "1.5 minutes" and "<img" in svg_image("<svg/>")
    from mdl_nbdev.records import JsonlFile, ParquetFile, Record, Source, find_tasks, open_rows

    from mdl_nbdev.data import BadRow, Conversation, CsvFile, Row, clip_html, format_row, read_rows, text_message, to_conversation
    assert all([BadRow, Conversation, CsvFile, Row, clip_html, format_row, read_rows, text_message, to_conversation, JsonlFile, ParquetFile, Record, Source, find_tasks, open_rows])


# Downloads

class Server(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hits, body = {}, b""
    def do_GET(self):
        n = self.hits[self.path] = self.hits.get(self.path, 0) + 1
        kind = self.path.split("/")[1]
        if kind == "busy" and n <= 2: return self.send_error(503 if n == 1 else 429)
        if kind == "gone": return self.send_error(410)
        if kind == "redirect":
            self.send_response(302)
            self.send_header("Location", f"/ok/{n}.wav")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if kind == "loop": return self.send_redirect()
        if kind == "slow": time.sleep(.3)
        self.send_response(200)
        cut = kind == "cut" and n == 1 or kind == "always-cut"
        if kind == "drip": self.close_connection = True
        else: self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        if kind == "drip":
            try:
                for _ in range(100): time.sleep(.1), self.wfile.write(b"x"), self.wfile.flush()
            except OSError: pass
            return
        self.wfile.write(self.body[:len(self.body)//2] if cut else self.body)
        if cut: self.close_connection = True
    def send_redirect(self):
        self.send_response(302)
        self.send_header("Location", self.path)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *args): pass


@pytest.fixture
def site(tmp_path, monkeypatch):
    "The address of a server, with a cache of its own and a fetch of little patience"
    monkeypatch.setenv("MDL_CACHE", str(tmp_path/"cache"))
    monkeypatch.setattr(remote.time, "sleep", lambda s, sleep=time.sleep: sleep(min(s, .3)))
    Server.hits, Server.body = {}, whole(tmp_path, "a.wav", seconds=1)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as s:
        s.daemon_threads, s.block_on_close = True, False
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{s.server_port}"
        s.shutdown()


def cached(tmp_path): return [p for p in (tmp_path/"cache").rglob("*") if p.is_file() and p.suffix != ".json"]


def test_a_clip_is_fetched_once(tmp_path, site):
    for _ in range(3): assert len(load_audio(f"{site}/ok/a.wav")) == 16000
    assert audio_info(f"{site}/ok/a.wav").samples == 16000
    assert Server.hits == {"/ok/a.wav": 1}
    load_audio(f"{site}/ok/a.wav?x=1")
    assert len(cached(tmp_path)) == 2, "another address is another clip"


def test_secrets_of_addresses_are_not_shown(tmp_path, site):
    "Neither in messages, such as those of rejected rows and of notes, nor in the records of the cache"
    where = site.replace("://", "://ann:sesame@")
    with pytest.raises(AudioError) as e: load_audio(f"{where}/gone/a.wav?X-Amz-Signature=sesame==&Expires=12#t=0,1")
    shown = site.replace("://", "://…@")
    assert str(e.value) == f"{shown}/gone/a.wav?X-Amz-Signature=…&Expires=…: the server answered 410 Gone; check the address"
    with pytest.raises(AudioError, match=rf"{re.escape(shown)}/ok/a.wav\?…#t=5: outside the clip"): load_audio(f"{where}/ok/a.wav?sesame#t=5")
    assert clip_record(cached_path(f"{where}/ok/a.wav?sesame"))["sha256"] and not any("sesame" in p.read_text() for p in tmp_path.rglob("*.json"))
    with collected_notes("t.csv:2") as notes: note_clip("silent", f"{where}/a.wav")
    assert notes["silent"][1] == f"t.csv:2, {shown}/a.wav"


def test_a_host_that_is_silent_is_named_without_a_password(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_silent", {"host.example": (3, float("inf"))})
    with pytest.raises(AudioError, match="since host.example did not send"): remote.update("https://ann:sesame@host.example/a.wav", {})


@pytest.mark.parametrize("kind, hits", [("busy", 3), ("cut", 2)])
def test_a_second_attempt(tmp_path, site, kind, hits):
    assert fetch(f"{site}/{kind}/a.wav").read_bytes() == Server.body
    assert Server.hits == {f"/{kind}/a.wav": hits}
    assert len(cached(tmp_path)) == 1


def test_what_is_no_sound_is_not_kept(tmp_path, site):
    "An error page that was sent once is not the clip for ever"
    sound, Server.body = Server.body, b"<html>try again later</html>"
    with pytest.raises(AudioError, match="not readable as audio .*downloads it again"): load_audio(f"{site}/ok/a.wav")
    Server.body = sound
    assert len(load_audio(f"{site}/ok/a.wav")) == 16000


def test_redirects(site): assert fetch(f"{site}/redirect/a.wav").read_bytes() == Server.body


@pytest.mark.parametrize("kind, kwargs, hits, message", [
    ("gone", {}, 1, "the server answered 410 Gone; check the address"), ("always-cut", {}, 3, ".*3 times; try again later"), ("loop", {}, None, "redirects more than 5 times"),
    ("busy", dict(retries=1), 2, "the server answered 429 Too Many Requests, 2 times"), ("drip", dict(deadline=1.), 1, "not complete after 1 s"), ("ok", dict(max_bytes=1000), 1, "larger than the limit of 1,000 bytes")])
def test_nothing_is_kept_of_a_failure(tmp_path, site, kind, kwargs, hits, message):
    start = time.monotonic()
    with pytest.raises(AudioError, match=f"{site}/{kind}/a.wav: {message}"): fetch(f"{site}/{kind}/a.wav", **kwargs)
    assert time.monotonic() - start < 5
    assert hits in (None, Server.hits[f"/{kind}/a.wav"])
    if kind != "drip": assert not cached(tmp_path)
    else: assert not [p for p in cached(tmp_path) if p.suffix != ".part"]


def test_many_at_once(tmp_path, site):
    "Threads that want the same clip all get all of it"
    with ThreadPoolExecutor(8) as pool: paths = list(pool.map(lambda i: fetch(f"{site}/slow/{i%2}.wav"), range(16)))
    assert {p.read_bytes() for p in paths} == {Server.body}
    assert sorted(cached(tmp_path)) == sorted(set(paths)) and len(set(paths)) == 2


def test_a_cache_that_cannot_be_written(tmp_path, site, monkeypatch):
    monkeypatch.setenv("MDL_CACHE", str(tmp_path/"a.wav"/"cache"))
    with pytest.raises(AudioError, match="cannot be stored in .*set MDL_CACHE to a folder with free space"): fetch(f"{site}/ok/a.wav")


@pytest.mark.parametrize("url", ["http://", "http://[::1", "http://host:port/a.wav", "https:///a.wav", "http://exa mple/a.wav"])
def test_addresses_that_are_none(tmp_path, site, url):
    with pytest.raises(AudioError, match="check|try again"): load_audio(url)


@pytest.mark.parametrize("name, kwargs", [("a.wav", {}), ("a.flac", {}), ("a.ogg", {}), ("a.opus", dict(format="OGG", subtype="OPUS")), ("a.mp3", {}), ("a.aiff", {})])
def test_segments_are_exact(tmp_path, name, kwargs):
    rate = 24000 if name == "a.opus" else 22050
    x = np.random.default_rng(0).uniform(-.3, .3, (rate * 9, 2))
    sf.write(tmp_path/name, x, rate, **kwargs)
    whole = load_audio(tmp_path/name, sample_rate=rate)
    for start, end in [(0, 1), (.5, 1.25), (1.00001, 8.5), (7, 9)]:
        part = f"{tmp_path/name}#t={start},{end}"
        first, last = int(start * rate + .5), int(end * rate + .5)
        assert np.array_equal(load_audio(part, sample_rate=rate), whole[first:last])
        assert (audio_info(part).frames, audio_info(part).samples) == (last - first, len(load_audio(part)))
    assert np.array_equal(load_audio(f"{tmp_path/name}#t=8", sample_rate=rate), whole[8 * rate:])
    assert len(load_audio(f"{tmp_path/name}#t=1,2", max_seconds=1.5)) == 16000, "the limit holds for the part"
    with pytest.raises(AudioError, match="8.0 s long, the limit is 3 s"): load_audio(f"{tmp_path/name}#t=1,9", max_seconds=3)
    for wrong in ["9.2", "0,9.2", "20,21"]:
        with pytest.raises(AudioError, match=r"outside the clip, which is 9\.\d+ s long"): load_audio(f"{tmp_path/name}#t={wrong}")
    with pytest.raises(AudioError, match="less than one sample"): load_audio(f"{tmp_path/name}#t=1,1.00001")


def test_segments_of_streams(tmp_path):
    "Files that do not state their length"
    sf.write(tmp_path/"a.wav", np.random.default_rng(0).uniform(-.3, .3, 80_000), 16000)
    whole = load_audio(tmp_path/"a.wav")
    data = bytearray((tmp_path/"a.wav").read_bytes())
    data[4:8] = data[40:44] = bytes(4)
    (tmp_path/"piped.wav").write_bytes(data)
    assert np.array_equal(load_audio(f"{tmp_path/'piped.wav'}#t=1,2"), whole[16000:32000])
    sf.write(tmp_path/"a.mp3", np.random.default_rng(0).uniform(-.3, .3, 80_000), 16000)
    frames = (tmp_path/"a.mp3").read_bytes()
    tag = max(frames.find(b"Xing"), frames.find(b"Info"))
    (tmp_path/"bare.mp3").write_bytes(frames[:tag] + b"\0\0\0\0" + frames[tag+4:])
    assert np.array_equal(load_audio(f"{tmp_path/'bare.mp3'}#t=1,2"), load_audio(tmp_path/"bare.mp3")[16000:32000])
    with pytest.raises(AudioError): load_audio(f"{tmp_path/'bare.mp3'}#t=60,61")
