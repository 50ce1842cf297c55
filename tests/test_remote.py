"The cache of remote clips: what changes on a server is noticed, and private hosts stay out of reach where they should"
import http.server
import os
import re
import socket
import threading
from hashlib import sha256
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile as sf

from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.settings import CheckSettings, ConvertSettings, InferSettings
from mdl_nbdev.data import remote
from mdl_nbdev.data.audio import load_audio
from mdl_nbdev.data.check import check
from mdl_nbdev.data.remote import cached_path, clip_record, clip_version, fetch, is_public, refresh_cache
from mdl_nbdev.data.sources import open_rows
from mdl_nbdev.infer.output import InferOutput
from mdl_nbdev.infer.run import infer
from mdl_nbdev.model.families import load_chat
from mdl_nbdev.train.convert import conversion_key, convert, plan_shards
from mdl_nbdev.train.dataset import AudioDataset


class Server(http.server.BaseHTTPRequestHandler):
    protocol_version, kind, files, answers, location = "HTTP/1.1", "etag", {}, [], None
    def do_GET(self):
        body = self.files.get(self.path)
        facts = {"etag": {"ETag": f'"{sha256(body or b"").hexdigest()}"'}, "date": {"Last-Modified": f"Thu, 01 Jan 2026 00:00:{len(body or b'') % 60:02d} GMT"}, "none": {}}[self.kind]
        same = facts and (self.headers["If-None-Match"], self.headers["If-Modified-Since"]) == (facts.get("ETag"), facts.get("Last-Modified"))
        status = 302 if self.path == "/redirect" else 404 if body is None else 304 if same else 200
        self.answers.append(status)
        self.send_response(status)
        for name, value in facts.items(): self.send_header(name, value)
        if status == 302: self.send_header("Location", self.location)
        if status != 304: self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if status == 200: self.wfile.write(body)
    def log_message(self, *args): pass


def sound(tmp_path, frequency, seconds=1.):
    path = tmp_path/f"{frequency}-{seconds}.wav"
    sf.write(path, .5*np.sin(2*np.pi*frequency*np.arange(int(16000*seconds))/16000), 16000)
    return path.read_bytes()


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.setenv("MDL_CACHE", str(tmp_path/"cache"))
    monkeypatch.setenv("MDL_ALLOW_PRIVATE_HOSTS", "true") # restored after the test
    monkeypatch.chdir(tmp_path)
    Server.kind, Server.files, Server.answers, Server.location = "etag", {"/a.wav": sound(tmp_path, 440), "/b.wav": sound(tmp_path, 220)}, [], None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as s:
        s.daemon_threads, s.block_on_close = True, False
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{s.server_port}"
        s.shutdown()


# Refreshing

@pytest.mark.parametrize("kind, unchanged", [("etag", 304), ("date", 304), ("none", 200)])
def test_a_changed_clip_is_downloaded_again_on_request(site, kind, unchanged, tmp_path, capsys):
    Server.kind = kind
    a, b = f"{site}/a.wav", f"{site}/b.wav"
    for url in (a, b): fetch(url)
    Server.answers.clear()
    assert refresh_cache([a, "local.wav", f"{site}/never.wav", b, a], 2) == []
    assert Server.answers == [unchanged]*2
    assert clip_version(a) is None
    Server.files["/a.wav"] = new = sound(tmp_path, 880, 1.5)
    assert fetch(a).read_bytes() != new, "nobody asks without being asked to"
    assert refresh_cache([a, b], 2) == [a]
    assert fetch(a).read_bytes() == new
    assert clip_version(a) == sha256(new).hexdigest()
    assert clip_version(b) is None
    assert refresh_cache([a, b], 1) == [] and clip_version(a) == sha256(new).hexdigest()
    assert f"2 clips in {tmp_path/'cache'/'audio'} asked for again, 1 changed" in capsys.readouterr().err


def test_a_clip_that_cannot_be_asked_for_keeps_its_copy(site, capsys):
    url, old = f"{site}/a.wav", Server.files["/a.wav"]
    fetch(url)
    del Server.files["/a.wav"]
    assert refresh_cache([url], 1) == []
    assert fetch(url).read_bytes() == old
    assert "1 could not be asked for and kept their copies, the first because " in capsys.readouterr().err


def test_what_cannot_be_decoded_is_not_kept_and_counts_as_a_change(site, tmp_path):
    url, old = f"{site}/a.wav", Server.files["/a.wav"]
    load_audio(url)
    Server.files["/a.wav"] = b"<html>moved</html>"
    assert refresh_cache([url], 1) == [url]
    with pytest.raises(InputError, match="HTML"): load_audio(url)
    assert not cached_path(url).exists()
    assert clip_version(url) == sha256(b"<html>moved</html>").hexdigest()
    Server.files["/a.wav"] = new = sound(tmp_path, 880)
    load_audio(url)
    assert clip_version(url) == sha256(new).hexdigest() != sha256(old).hexdigest()


def test_versions_survive_a_kill_between_record_and_file_and_older_caches(site, tmp_path):
    url, old = f"{site}/a.wav", Server.files["/a.wav"]
    path, record = fetch(url), f"{cached_path(url)}.json"
    os.utime(path, ns=(1, 1))
    assert clip_version(url) is None, "the same bytes with another date, as after two downloads at once"
    path.write_bytes(b"another")
    assert clip_version(url) == sha256(b"another").hexdigest(), "the record was written, the file was not"
    path.write_bytes(old)
    os.remove(record) # as in the cache of an earlier version
    assert clip_version(url) is None
    assert refresh_cache([url], 1) == [] and clip_record(path)["sha256"] == sha256(old).hexdigest()
    os.remove(record)
    Server.files["/a.wav"] = sound(tmp_path, 880)
    assert refresh_cache([url], 1) == [url]


def test_a_conversion_notices_a_changed_clip(site, tmp_path, capsys):
    (tmp_path/"rows.csv").write_text(f"audio,prediction\n{site}/a.wav,x\n{site}/b.wav#t=0.5,y\n")
    chat = load_chat("tiny")
    s = lambda **kw: ConvertSettings(input=tmp_path/"rows.csv", output=tmp_path/"out", model_name="tiny", num_workers=1, **kw)
    before = conversion_key(plan_shards(s(), chat))
    convert(s(), chat)
    assert f"downloaded clips are kept in {tmp_path/'cache'/'audio'}" in capsys.readouterr().err
    assert conversion_key(plan_shards(s(), chat)) == before, "that a clip has been downloaded since is no change"
    Server.files["/b.wav"] = sound(tmp_path, 880)
    assert conversion_key(plan_shards(s(), chat)) == before
    assert conversion_key(plan_shards(s(refresh_cache=True), chat)) != before
    old = AudioDataset(tmp_path/"out", chat.fingerprint)[1].clips[0].copy()
    convert(s(overwrite=True), chat)
    new = AudioDataset(tmp_path/"out", chat.fingerprint)[1].clips[0]
    assert len(old) == len(new) == 8000 and not np.array_equal(old, new)


def test_unfinished_answers_to_changed_clips_are_given_again(site, tmp_path, capsys):
    (tmp_path/"rows.csv").write_text(f"audio\n{site}/a.wav\n440-1.0.wav\n{site}/b.wav\n220-1.0.wav\nlost.wav\nlost.wav\n")
    for url in ("a", "b"): fetch(f"{site}/{url}.wav")
    out = InferOutput(tmp_path/"out.csv", open_rows(tmp_path/"rows.csv", ("audio",)), tmp_path)
    out.begin(dict(version=2, settings={}, contents={}))
    part, rows = out.part(), list(out.source.rows())
    part.create(out.header)
    for i in range(3): out.write(part, i, 2*i, [SimpleNamespace(row=r, prediction="x", truncated=False, reason=None, notes={}, scores=None) for r in rows[2*i:2*i+2]])
    assert out.resume(2) == [0, 1, 2]
    Server.files["/b.wav"] = sound(tmp_path, 880)
    assert refresh_cache(out.clips(rows), 1) == [f"{site}/b.wav"]
    assert out.intact_shards(2)[1], "a run that is under way is finished"
    assert out.resume(2) == [0, 2]
    assert "2 rows answered again, since rows or clips have changed" in capsys.readouterr().err
    (tmp_path/"440-1.0.wav").write_bytes(sound(tmp_path, 440, 2.))
    assert out.resume(2) == [2], "files of this machine too"
    (tmp_path/"lost.wav").write_bytes(sound(tmp_path, 440, 2.))
    assert out.resume(2) == [], "and those that are no longer missing"


# Private hosts

@pytest.mark.parametrize("address, public", [("8.8.8.8", True), ("2606:4700:4700::1111", True), ("64:ff9b::8.8.8.8", True), ("::ffff:8.8.8.8", True),
    *((a, False) for a in """127.0.0.1 127.8.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 240.0.0.1 255.255.255.255 192.0.2.1 ::1 :: fe80::1
    fe80::1%eth0 fc00::1 fd12:3456::1 fec0::1 ff02::1 2001:db8::1 ::ffff:127.0.0.1 ::ffff:169.254.169.254 64:ff9b::10.0.0.1 2002:7f00:1:: 2002:a9fe:a9fe::""".split())])
def test_public_addresses(address, public): assert is_public(address) == public


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "0", "127.1", "[::1]", "[::ffff:127.0.0.1]", "10.255.255.1", "169.254.169.254"])
def test_private_hosts_are_refused_before_anything_is_sent(site, host):
    remote.set_host_policy(False)
    url = f"{site.replace('127.0.0.1', host)}/a.wav"
    with pytest.raises(InputError, match=f"{re.escape(url)}: .* is not public, and --allow-private-hosts is false"): fetch(url, timeout=1, retries=0)
    assert not Server.answers


def public_names(monkeypatch, *answers):
    "A host `public.test`, whose address is each of some addresses in sequence; what is public reaches the server of this machine"
    answers, connected = iter(answers), []
    real_lookup, real_connect = socket.getaddrinfo, socket.create_connection
    def lookup(host, port, *args, **kwargs):
        if host != "public.test": return real_lookup(host, port, *args, **kwargs)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in next(answers)]
    def connect(address, *args, **kwargs):
        connected.append(address[0])
        return real_connect(("127.0.0.1", address[1]), *args, **kwargs)
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(socket, "create_connection", connect)
    return connected


def test_a_name_is_looked_up_once(site, monkeypatch):
    "Its owner may give another address the second time"
    connected = public_names(monkeypatch, ["10.0.0.1", "8.8.8.8"], ["127.0.0.1"])
    url = site.replace("127.0.0.1", "public.test")
    remote.set_host_policy(False)
    remote.http_client.cache_clear()
    monkeypatch.setattr(remote, "is_public", lambda a: a == "127.0.0.1" or is_public(a)) # the address of the peer is this machine's
    assert fetch(f"{url}/a.wav", retries=0).read_bytes() == Server.files["/a.wav"]
    assert connected == ["8.8.8.8"], "only the public one of its addresses"
    monkeypatch.setattr(remote, "is_public", is_public)
    remote.http_client.cache_clear() # a new connection
    with pytest.raises(InputError, match=r"public.test \(127.0.0.1\) is not public"): fetch(f"{url}/b.wav", retries=0)
    assert connected == ["8.8.8.8"]
    remote.http_client.cache_clear()


def test_a_public_host_never_redirects_into_a_private_network(site, monkeypatch):
    Server.location = f"{site.replace('127.0.0.1', 'localhost')}/a.wav"
    path = fetch(f"{site}/redirect")
    assert path.read_bytes() == Server.files["/a.wav"], "a private one may"
    assert not clip_record(path)["public"]
    path.unlink()
    answers = [True] # of the peer that redirects
    monkeypatch.setattr(remote, "is_public", lambda address: answers.pop() if answers else is_public(address))
    with pytest.raises(InputError, match=r"/redirect: redirects to localhost \(.*\), which is not public"): fetch(f"{site}/redirect", retries=0)


@pytest.fixture
def proxy(site, monkeypatch):
    "The server of this machine as the proxy of the environment"
    for name in ("http_proxy", "HTTP_PROXY"): monkeypatch.setenv(name, site)
    for name in ("no_proxy", "NO_PROXY"): monkeypatch.delenv(name, raising=False)
    for cached in (remote.http_client, remote.is_private_host): cached.cache_clear()
    monkeypatch.setattr(remote, "_silent", {})
    yield
    for cached in (remote.http_client, remote.is_private_host): cached.cache_clear()


def names(monkeypatch, **addresses):
    "The address of some names; nobody knows the others"
    def lookup(host, port, *args, **kwargs):
        address = host if host[:1].isdigit() else addresses.get(host)
        if address: return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port or 0))]
        raise socket.gaierror(-2, "Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", lookup)


@pytest.mark.parametrize("target", ["169.254.169.254", "localhost", "router"])
@pytest.mark.parametrize("host", ["clips", "nobody"])
def test_a_proxy_is_asked_for_no_private_host_either(proxy, monkeypatch, host, target):
    "After a host that is public, or whose name only the proxy knows"
    names(monkeypatch, clips="8.8.8.8", router="192.168.1.1", localhost="127.0.0.1")
    Server.location, url = f"http://{target}/a.wav", f"http://{host}/redirect"
    Server.files = {f"http://{target}/a.wav": b"secret"}
    monkeypatch.setattr(Server, "do_GET", lambda self, do=Server.do_GET: (setattr(self, "path", self.path.replace(url, "/redirect")), do(self))[1])
    with pytest.raises(InputError, match=f"{url}: redirects to {re.escape(target)}, which is not public; check the address"): fetch(url, retries=0)
    assert Server.answers == [302]


@pytest.mark.parametrize("host, target", [("clips", "store"), ("nobody", "unknown"), ("wiki", "router")])
def test_a_proxy_is_asked_for_other_hosts(proxy, monkeypatch, host, target):
    "A private host may redirect to another one"
    names(monkeypatch, clips="8.8.8.8", store="9.9.9.9", wiki="10.0.0.1", router="192.168.1.1")
    Server.location, url = f"http://{target}/a.wav", f"http://{host}/redirect"
    Server.files = {f"http://{target}/a.wav": Server.files["/a.wav"]}
    monkeypatch.setattr(Server, "do_GET", lambda self, do=Server.do_GET: (setattr(self, "path", self.path.replace(url, "/redirect")), do(self))[1])
    assert fetch(url, retries=0).read_bytes() and Server.answers == [302, 200]
    assert not clip_record(cached_path(url))["public"]


def test_strangers_tables_use_no_proxy(proxy, monkeypatch):
    names(monkeypatch)
    remote.set_host_policy(False)
    with pytest.raises(InputError, match="ConnectError .*Name or service not known; --allow-private-hosts false uses no proxy"): fetch("http://clips/a.wav", retries=0)
    assert not Server.answers


def test_no_proxy_is_no_proxy(site, monkeypatch):
    "A list of hosts that need none names none"
    monkeypatch.setenv("no_proxy", "localhost")
    Server.location = f"{site.replace('127.0.0.1', 'localhost')}/a.wav"
    answers = [True] # of the peer that redirects
    monkeypatch.setattr(remote, "is_public", lambda address: answers.pop() if answers else is_public(address))
    with pytest.raises(InputError, match="redirects to localhost"): fetch(f"{site}/redirect", retries=0)


def damaged_mp3(tmp_path):
    sf.write(tmp_path/"a.mp3", .5*np.sin(np.arange(48000)/9), 16000)
    data = (tmp_path/"a.mp3").read_bytes()
    return data[:len(data)//3] + bytes(3000) + data[len(data)//2:]


@pytest.mark.parametrize("body", ["nothing", "HTML", "half", "damaged mp3", "no frames"])
def test_what_cannot_be_decoded_is_not_kept(site, tmp_path, body):
    "The next attempt gets what the server has by then"
    sf.write(tmp_path/"none.flac", np.zeros(0), 16000)
    good = Server.files["/a.wav"]
    Server.files["/a.wav"] = {"nothing": b"", "HTML": b"<html>log in</html>", "half": good[:3000], "damaged mp3": damaged_mp3(tmp_path), "no frames": (tmp_path/"none.flac").read_bytes()}[body]
    with pytest.raises(InputError, match=f"{site}/a.wav: "): load_audio(f"{site}/a.wav")
    assert not cached_path(f"{site}/a.wav").exists()
    Server.files["/a.wav"] = good
    assert len(load_audio(f"{site}/a.wav")) == 16000


def test_a_clip_in_the_cache_is_as_readable_as_any_file(site, tmp_path):
    before = os.umask(0o027)
    try: path = fetch(f"{site}/a.wav")
    finally: os.umask(before)
    assert [p.stat().st_mode & 0o777 for p in (path, path.with_name(f"{path.name}.json"))] == [0o640]*2


def test_what_came_from_a_private_host_stays_out_of_strangers_tables(site):
    fetch(f"{site}/a.wav")
    remote.set_host_policy(False)
    with pytest.raises(InputError, match="is not public"): fetch(f"{site}/a.wav")


def test_a_row_is_refused_in_every_command(site, tmp_path, capsys):
    (tmp_path/"rows.csv").write_text(f"audio,prediction\n440-1.0.wav,x\n{site}/a.wav,y\n")
    facts = dict(input=tmp_path/"rows.csv", allow_private_hosts=False, num_workers=1)
    reason = "127.0.0.1 is not public, and --allow-private-hosts is false"
    assert [(row.line, reason in row.reason) for row in check(CheckSettings(**facts)).bad] == [(3, True)]
    with pytest.raises(InputError, match=f"rows.csv:3: .*{reason}"): convert(ConvertSettings(**facts, output=tmp_path/"d", model_name="tiny"))
    report = infer(InferSettings(**facts, output=tmp_path/"out.csv", model_name="tiny", max_new_tokens=1))
    assert [(line, reason in why) for _, line, _, why in report.rejected] == [("3", True)]
    assert not Server.answers
    report = infer(InferSettings(**facts | dict(allow_private_hosts=True, retry_rejects=True), output=tmp_path/"out.csv", model_name="tiny", max_new_tokens=1))
    assert not report.rejected and Server.answers, "they may be allowed for the rows that were refused"
