"The server as its clients see it: the official client, many at once, ones that leave, ones that send nonsense, and the end"
import asyncio
import base64
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from waiting import until

from mdl_nbdev import InferSettings, ServeSettings, ask, infer
from mdl_nbdev.base.errors import InputError
from mdl_nbdev.cli import guard, protocol, serve
from mdl_nbdev.cli.protocol import RequestError, read_chat
from mdl_nbdev.data.sounds import make_sounds
from mdl_nbdev.infer.ask import request_of
from mdl_nbdev.model.engine import GenerationOptions

openai = pytest.importorskip("openai", reason='no client: pip install "mdl_nbdev[dev]"')
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sounds")
    make_sounds(folder, 8, seed=5)
    return sorted((folder/"sounds").glob("*.wav"))


@pytest.fixture(scope="module")
def server():
    with serve.ModelServer(ServeSettings(model_name="tiny", port=0, max_new_tokens=8, max_request_mb=4, timeout=60)) as server: yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client: yield client


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=60) as client: yield client


def audio(path): return {"type": "input_audio", "input_audio": {"data": base64.b64encode(Path(path).read_bytes()).decode(), "format": "wav"}}
def text(words): return {"type": "text", "text": words}
def asked(clip, words="What is it?"): return [{"role": "user", "content": [audio(clip), text(words)]}]
def chat(client, messages, **kw): return client.chat.completions.create(model="tiny", messages=messages, **kw)
def idle(server): return not server.batcher.jobs and not server.guard.active


def test_answers_are_those_of_infer(client, sounds, tmp_path):
    "Of one clip, of several clips and turns with a system prompt, and of a text"
    a, b = map(str, sounds[:2])
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "audio", "audio": a}, text("One"), {"type": "audio", "audio": b}]},
             {"role": "assistant", "content": "siren"}, {"role": "user", "content": [text("And "), text("this: "), {"type": "audio", "audio": b}]}]
    records = [[{"role": "user", "content": [{"type": "audio", "audio": a}, text("What is it?")]}], turns, [{"role": "user", "content": "Hello"}]]
    (tmp_path/"in.jsonl").write_text("".join(json.dumps({"messages": r}) + "\n" for r in records))
    infer(InferSettings(input=tmp_path/"in.jsonl", output=tmp_path/"out.csv.jsonl", model_name="tiny", max_new_tokens=8, confidence=True))
    expected = [json.loads(line) for line in (tmp_path/"out.csv.jsonl").read_text().splitlines()]
    def sent(m): return m | {"content": m["content"] if isinstance(m["content"], str) else [audio(p["audio"]) if p["type"] == "audio" else p for p in m["content"]]}
    for record, row in zip(records, expected):
        found = chat(client, list(map(sent, record)))
        assert found.choices[0].message.content == row["prediction"]
        assert found.choices[0].model_extra["confidence"] == pytest.approx(math.exp(row["confidence"]), abs=1e-4)
    assert found.usage.completion_tokens <= 8 and found.model == "tiny"
    said = chat(client, asked(a)).choices[0]
    alone = ask("tiny", a, "What is it?", max_new_tokens=8)
    assert (said.message.content, said.finish_reason) == (alone.text, "length" if alone.truncated else "stop")


def test_a_stream_is_the_answer_in_pieces(client, sounds):
    whole = chat(client, asked(sounds[0]), max_tokens=12)
    chunks = list(chat(client, asked(sounds[0]), max_completion_tokens=12, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [c.choices[0].delta.content or "" for c in chunks[:-1]]
    assert "".join(pieces) == whole.choices[0].message.content and len(list(filter(None, pieces))) > 3
    end = chunks[-2].choices[0]
    assert end.finish_reason == whole.choices[0].finish_reason and chunks[-1].usage == whole.usage
    assert end.model_extra["confidence"] == pytest.approx(whole.choices[0].model_extra["confidence"])


def test_transcriptions(client, sounds):
    expected = ask("tiny", str(sounds[1]), max_new_tokens=8)
    with sounds[1].open("rb") as f: found = client.audio.transcriptions.create(model="tiny", file=f)
    assert found.text == expected.text and found.model_extra["confidence"] == pytest.approx(expected.confidence, abs=1e-4)
    with sounds[1].open("rb") as f: words = client.audio.transcriptions.create(model="tiny", file=f, prompt="What is it?", response_format="text", temperature=0)
    assert words == ask("tiny", str(sounds[1]), "What is it?", max_new_tokens=8).text
    for name, value in dict(language="en", response_format="srt", timestamp_granularities=["word"], stream=True, temperature=3).items():
        with sounds[1].open("rb") as f, pytest.raises(openai.BadRequestError) as e: client.audio.transcriptions.create(model="tiny", file=f, **{name: value})
        assert e.value.param.removesuffix("[]") == name


def test_models(client):
    assert [m.id for m in client.models.list()] == ["tiny"] == [client.models.retrieve("tiny").id]
    with pytest.raises(openai.NotFoundError, match="'tiny'"): client.models.retrieve("gpt-4o")
    with pytest.raises(openai.NotFoundError, match="model: 'gpt-4o' is not served here; use 'tiny'"): client.chat.completions.create(model="gpt-4o", messages=[])


def test_options_of_generation(client, sounds):
    first = chat(client, asked(sounds[0]), max_tokens=12).choices[0]
    assert chat(client, asked(sounds[0]), max_tokens=12, temperature=0).choices[0].message.content == first.message.content
    stop = first.message.content[3:5]
    ended = chat(client, asked(sounds[0]), max_tokens=12, stop=[stop, "never said"]).choices[0]
    assert (ended.message.content, ended.finish_reason) == (first.message.content.partition(stop)[0], "stop")
    drawn = [chat(client, asked(sounds[0]), max_tokens=12, temperature=1.5, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    free = {chat(client, asked(sounds[0]), max_tokens=12, temperature=1.5).choices[0].message.content for _ in range(3)}
    assert len(free) > 1, "without a seed each answer is drawn anew"


hello = [{"role": "user", "content": "Hello"}]
REFUSED = [
    (dict(n=2), "n", "send the request several times"), (dict(logprobs=True), "logprobs", "confidence"), (dict(tools=[{"type": "function"}]), "tools", "not supported"),
    (dict(response_format={"type": "json_object"}), "response_format", "in the prompt"), (dict(presence_penalty=.5), "presence_penalty", "leave it out"), (dict(best_of=2), "best_of", "unknown field"),
    (dict(max_token=2), "max_token", "did you mean max_tokens"), (dict(temperature=3), "temperature", "from 0 to 2"), (dict(temperature="hot"), "temperature", "expected a number"), (dict(temperature=True), "temperature", "expected"),
    (dict(top_p=0), "top_p", "expected a number"), (dict(max_tokens=0), "max_tokens", "from 1 to 1048576"), (dict(max_completion_tokens=2**20 + 1), "max_completion_tokens", "from 1 to 1048576"), (dict(max_tokens=1.5), "max_tokens", "whole number"), (dict(max_tokens=1, max_completion_tokens=2), "max_tokens", "keep one"),
    (dict(max_tokens=math.inf), "max_tokens", "whole number"), (dict(temperature=math.nan), "temperature", "expected a number"), (dict(temperature=10**400), "temperature", "expected a number"),
    (dict(messages=[{"role": [], "content": "x"}]), "messages[0].role", "system, user and assistant"), (dict(stop="a"*1000), "stop", "longer than 256"),
    (dict(seed=.5), "seed", "whole number"), (dict(stop=[""]), "stop", "not empty"), (dict(stop=list("abcde")), "stop", "up to 4"), (dict(stream="yes"), "stream", "true or false"), (dict(stream_options=[1]), "stream_options", "a list"),
    (dict(messages=[]), "messages", "is empty"), (dict(messages="Hello"), "messages", "is text"), (dict(messages=None), "messages", "null"), (dict(messages=[1]), "messages[0]", "a number"),
    (dict(messages=[{"role": "tool", "content": "x"}]), "messages[0].role", "system, user and assistant"), (dict(messages=[*hello, *hello]), "messages", "messages[1] is from the user"),
    (dict(messages=[*hello, {"role": "assistant", "content": "Hi"}]), "messages", "from the user"), (dict(messages=[{"role": "user", "content": [text(3)]}]), "messages[0].content[0].text", "is a number"),
    (dict(messages=[{"role": "user", "content": ""}]), "messages", "messages[0] is empty"), (dict(messages=[{"role": "user", "content": "a\ud800"}]), "messages[0].content", "surrogate"),
    (dict(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "messages[0].content[0].type", "text and input_audio"),
    (dict(messages=[{"role": "user", "content": [{"type": "audio_url", "audio_url": {"url": "file:///etc/passwd"}}]}]), "messages[0].content[0].type", "audio_url"),
    (dict(messages=[{"role": "user", "content": [{"type": "audio", "audio": "/etc/passwd"}]}]), "messages[0].content[0].type", "text and input_audio"),
    (dict(messages=[{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "data:audio/wav;base64,AAAA"}}]}]), "messages[0].content[0].input_audio.data", "before the comma"),
    (dict(messages=[{"role": "user", "content": [{"type": "input_audio"}]}]), "messages[0].content[0].input_audio.data", "null"),
    (dict(messages=[{"role": "user", "content": "x", "name": "Ann"}]), "messages[0].name", "not supported")]


@pytest.mark.parametrize("fields, param, message", REFUSED)
def test_what_cannot_be_done_is_refused_by_name(fields, param, message, tmp_path):
    s = InferSettings(input="requests", output="none", model_name="tiny")
    with pytest.raises(RequestError, match=re.escape(message)) as e: read_chat({"messages": hello, **fields}, s, tmp_path, 2**20)
    error = e.value.body()["error"]
    assert error["param"] == param and error["type"] == "invalid_request_error" and (param is None or error["message"].startswith(f"{param}: "))


json_values = st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=9), lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "input_audio", "data", "user"]), v, max_size=3), max_leaves=8)


@given(st.dictionaries(st.sampled_from(sorted(protocol.CHAT_FIELDS | set(protocol.NOT_SUPPORTED))), json_values | st.just(hello), max_size=5))
def test_no_request_is_a_fault_of_the_server(tmp_path_factory, body):
    s = InferSettings(input="requests", output="none", model_name="tiny")
    try: read_chat(body, s, tmp_path_factory.getbasetemp())
    except InputError as e: assert str(e)


def test_greedy_requests_share_a_batch(tmp_path):
    "Whatever they say of what is not drawn; a temperature that would overflow draws nothing"
    s = InferSettings(input="requests", output="none", model_name="tiny")
    def settings(**fields): return read_chat({"messages": hello, **fields}, s, tmp_path).s
    assert settings(temperature=0, seed=7, top_p=.9) == settings(temperature=1e-40) == settings(seed=3) == settings()
    assert settings(temperature=1, seed=7) != settings()


def test_fields_that_ask_for_nothing(client, sounds):
    "Some clients send every field with the value that it has when it is left out"
    plain = chat(client, asked(sounds[0])).choices[0].message.content
    nothing = dict(n=1, logprobs=False, tools=[], tool_choice="none", presence_penalty=0, frequency_penalty=0., logit_bias={}, user="ann", metadata={"a": "b"}, response_format={"type": "text"}, stop=None, seed=None)
    assert chat(client, asked(sounds[0]), **nothing).choices[0].message.content == plain


def test_faults_name_the_field(client, http, sounds):
    broken = asked(sounds[0])
    whole = sounds[0].read_bytes()
    for data, words in ((whole[:3000], "truncated"), (b"<html>", "an HTML page"), (b"", "null|empty|base64")):
        broken[0]["content"][0]["input_audio"]["data"] = base64.b64encode(data).decode()
        with pytest.raises(openai.BadRequestError, match=words) as e: chat(client, broken)
        assert e.value.param == "messages[0].content[0].input_audio.data"
    wrapped = asked(sounds[0])
    wrapped[0]["content"][0]["input_audio"]["data"] = base64.encodebytes(whole).decode()
    assert chat(client, wrapped).choices[0].message.content == chat(client, asked(sounds[0])).choices[0].message.content
    def post(path="/v1/chat/completions", **kw): return http.post(path, **kw)
    responses = {415: post(data={"a": "b"}), 400: post(content=b'{"messages', headers={"Content-Type": "application/json"}), 404: post("/v1/completions", json={}), 405: http.get("/v1/chat/completions"), 413: post(json={"user": "x"*5_000_000})}
    for status, r in responses.items():
        assert r.status_code == status and set(r.json()["error"]) == {"message", "type", "param", "code"}, r.text
    deep = post(content=b"["*100_000, headers={"Content-Type": "application/json"})
    assert deep.status_code == 400 and "not JSON" in deep.json()["error"]["message"]
    def parts(): # without a length
        for _ in range(50): yield b" "*100_000
    assert post(content=parts(), headers={"Content-Type": "application/json"}).status_code == 413
    missing = http.post("/v1/audio/transcriptions", files={"clip": ("a.wav", b"x")})
    assert missing.status_code == 400 and missing.json()["error"]["param"] in ("clip", "file"), missing.text


def test_many_at_once(client, server, sounds, monkeypatch):
    expected = [chat(client, asked(s)).choices[0] for s in sounds]
    batches, answer = [], server.batcher.answer
    monkeypatch.setattr(server.batcher, "answer", lambda batch: (batches.append(len(batch)), answer(batch)))
    with ThreadPoolExecutor(32) as pool: found = list(pool.map(lambda i: chat(client, asked(sounds[i % 8])).choices[0], range(32)))
    assert [c.message.content for c in found] == [expected[i % 8].message.content for i in range(32)]
    assert sum(batches) == 32 and len(batches) < 25, batches


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves(server, http, sounds, stream):
    "Ends the answer that is being generated, and one that waits"
    until(lambda: idle(server))
    body = dict(messages=asked(sounds[0]), max_tokens=400, stream=stream, temperature=1., seed=0) # alone in its batch
    def leave(url):
        with httpx.Client(timeout=60) as own, pytest.raises(httpx.ReadTimeout): own.post(url, json=body, timeout=httpx.Timeout(60, read=.5)) if not stream else drop(own, url)
    def drop(own, url):
        with own.stream("POST", url, json=body) as r:
            [line for _, line in zip(range(3), r.iter_lines())]
        raise httpx.ReadTimeout("left")
    threads = [threading.Thread(target=leave, args=[f"{server.url}/v1/chat/completions"]) for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    reply = http.post("/v1/chat/completions", json=dict(messages=hello, max_tokens=2))
    assert reply.status_code == 200
    until(lambda: idle(server), 5)


def test_limits_of_time_and_number(server, http, sounds, monkeypatch):
    monkeypatch.setattr(server, "s", replace(server.s, timeout=1))
    assert http.get("/health").json() == {"status": "ok"}
    slow, answer = threading.Event(), server.batcher.answer
    monkeypatch.setattr(server.batcher, "answer", lambda batch: (slow.wait(20), answer(batch)))
    late = http.post("/v1/chat/completions", json=dict(messages=hello))
    streamed = http.post("/v1/chat/completions", json=dict(messages=hello, stream=True))
    assert late.status_code == 504 and "no answer within 1.0 s (--timeout)" in late.json()["error"]["message"]
    assert json.loads(streamed.text.split("\n\n")[-2].removeprefix("data: "))["error"]["message"] == late.json()["error"]["message"]
    slow.set()
    read = threading.Event()
    with monkeypatch.context() as m:
        m.setattr(server, "prepare", lambda _: read.wait(20))
        undecoded = http.post("/v1/chat/completions", json=dict(messages=hello))
        read.set()
    assert undecoded.status_code == 504 and "not decoded within 1.0 s (--timeout)" in undecoded.json()["error"]["message"]
    monkeypatch.setattr(guard, "MOST_REQUESTS", 0)
    busy = http.get("/v1/models")
    assert busy.status_code == 503 and busy.json()["error"]["type"] == "server_error"


def test_a_fault_of_the_engine_is_said(server, client, http, monkeypatch):
    def fail(requests): raise MemoryError("out of memory")
    with monkeypatch.context() as m:
        m.setattr(server.batcher.engine, "generate", fail)
        with pytest.raises(openai.InternalServerError, match="MemoryError: out of memory"): chat(client, hello)
        with pytest.raises(openai.APIError, match="MemoryError: out of memory"): list(chat(client, hello, stream=True))
        def fail(requests): raise OSError("/home/ann/model: no such file")
        m.setattr(server.batcher.engine, "generate", fail)
        with pytest.raises(openai.InternalServerError) as e: chat(client, hello)
        assert "the server failed (OSError); its log says more" in str(e.value) and "ann" not in str(e.value)
    assert chat(client, hello).choices


def test_a_gpu_that_has_failed(server, client, http, monkeypatch):
    "After an illegal memory access nothing is computed in the process any more; here the device is one that is not there"
    def fail(requests): raise RuntimeError("CUDA error: an illegal memory access was encountered")
    with monkeypatch.context() as m:
        m.setattr(server.batcher.engine, "generate", fail)
        assert http.post("/v1/chat/completions", json=dict(messages=hello)).status_code == 500
        assert http.get("/health").status_code == 200, "an error alone says nothing of the device"
        m.setattr(type(server.batcher.engine.model), "device", torch.device("cuda"))
        lost = http.post("/v1/chat/completions", json=dict(messages=hello))
    try:
        for r in (lost, http.get("/health"), http.post("/v1/chat/completions", json=dict(messages=hello))):
            assert r.status_code == 503 and "the GPU has failed" in r.json()["error"]["message"]
        with pytest.raises(openai.APIError, match="the GPU has failed"): list(chat(client, hello, stream=True))
    finally: server.batcher.lost = None
    assert chat(client, hello).choices


def test_who_leaves_before_a_stream_begins(server):
    "Its answer is not generated for nobody"
    jobs, submit = [], server.submit
    async def ask():
        body, left = json.dumps(dict(messages=hello, stream=True, max_tokens=10**4)).encode(), []
        async def receive():
            if not left: return left.append(1) or dict(type="http.request", body=body)
            return dict(type="http.disconnect")
        async def send(message): pass
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        await server.guard(dict(type="http", method="POST", path="/v1/chat/completions", query_string=b"", headers=headers, asgi=dict(spec_version="2.3")), receive, send)
    server.submit = lambda *args: jobs.append(submit(*args)) or jobs[0]
    try: asyncio.run(ask())
    finally: del server.submit
    assert jobs[0].future.cancelled()
    until(lambda: idle(server))


def test_a_key_keeps_others_out(monkeypatch):
    "As the official client sends it; the page is for everyone, since it asks for the key"
    monkeypatch.setenv("MDL_API_KEY", "sesame")
    with serve.ModelServer(ServeSettings(model_name="tiny", port=0, max_new_tokens=2)) as own:
        def client(key): return openai.OpenAI(base_url=f"{own.url}/v1", api_key=key, max_retries=0)
        assert chat(client("sesame"), hello).choices
        with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"): chat(client("Sesame"), hello)
        assert [httpx.get(f"{own.url}{path}").status_code for path in ("/", "/health", "/v1/models")] == [200, 200, 401]


def test_the_length_of_the_model_bounds_an_answer(server, client):
    with pytest.raises(openai.BadRequestError, match="max_tokens: got 32769, expected a whole number from 1 to 32768"): chat(client, hello, max_tokens=32769)


def test_a_model_in_a_folder_is_called_by_the_end_of_its_path():
    for path, name in {"/home/ann/runs/digits/final": "digits/final", "/final": "final", "runs/digits/final": "runs/digits/final"}.items():
        s = InferSettings(input="requests", output="none", model_name="tiny", adapter=path)
        assert protocol.served_name(s) == name
        for known in (name, path, None): protocol.check_model(known, s)
        with pytest.raises(RequestError, match=f"use '{name}'"): protocol.check_model("tiny", s)


def test_prompts_of_the_server(sounds, server):
    s = replace(server.infer, user_prompt="Which sound?", system_prompt="Be brief.")
    clip = protocol.conversation_of([{"role": "user", "content": [audio(sounds[0])]}], s, sounds[0].parent)
    assert [m["role"] for m in clip.messages] == ["system", "user"] and clip.prompt_text() == "Which sound?"
    own = protocol.conversation_of([{"role": "system", "content": ""}, *asked(sounds[0])], s, sounds[0].parent)
    assert [m["role"] for m in own.messages] == ["user"] and own.prompt_text() == "What is it?", "an empty system prompt is for none"
    assert len(request_of(server.batcher.engine, clip, s).example.clips) == 1 and GenerationOptions.of(s).logprobs


def test_an_address_that_is_taken(server):
    port = int(server.url.rpartition(":")[2])
    with pytest.raises(InputError, match=f"--host 127.0.0.1 --port {port}: cannot listen there .*in use.*0 for a free one"): serve.ModelServer(replace(server.s, port=port))


# --- The command, in a process of its own

def started(*args):
    "The process of a server with `tiny`, and its address"
    p = subprocess.Popen([sys.executable, "-c", "from mdl_nbdev.cli.commands import mdl_serve; mdl_serve()", "--model-name", "tiny", "--port", "0", *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    lines = []
    for line in p.stdout:
        lines.append(line)
        if found := re.search(r"page (http://\S+), API", line): return p, found[1], lines
    raise AssertionError("".join(lines))


def test_any_second_signal_ends_a_server_immediately(monkeypatch):
    "Also one of the other kind"
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    class Server:
        started, answered, url = time.time(), 0, ""
        def __init__(self, s): self.infer, self.thread = InferSettings(input="requests", output="none", model_name="tiny"), threading.current_thread()
        def start(self, level): signal.raise_signal(signal.SIGTERM)
        def stop(self): self.during = {n: signal.getsignal(n) for n in handlers}
    found = []
    monkeypatch.setattr(serve, "ModelServer", lambda s: found.append(Server(s)) or found[0])
    serve.serve(ServeSettings(model_name="tiny"))
    assert set(found[0].during.values()) == {signal.SIG_DFL} and {n: signal.getsignal(n) for n in handlers} == handlers


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_what_runs(sounds, number):
    p, url, _ = started()
    body, statuses = dict(messages=asked(sounds[0]), max_tokens=300, temperature=1), []
    def post(stream):
        r = httpx.post(f"{url}/v1/chat/completions", json=body | dict(stream=stream, seed=int(stream)), timeout=120)
        statuses.append((r.status_code, r.text.strip().endswith("data: [DONE]") if stream else r.json()["usage"]["completion_tokens"] > 0))
    threads = [threading.Thread(target=post, args=[i % 2 == 1]) for i in range(4)]
    for t in threads: t.start()
    time.sleep(1.5)
    p.send_signal(number)
    for t in threads: t.join()
    out = p.communicate(timeout=60)[0]
    assert statuses == [(200, True)]*4 and p.returncode == 0, (statuses, out)
    assert "finishing what runs" in out and "stopped after 4 answers" in out
    with pytest.raises(httpx.ConnectError): httpx.get(url)


@pytest.mark.slow
def test_memory_stays_as_it_is(sounds, record_property):
    "Over 1,000 requests with clips, of which some are broken and some clients leave, and a request of 200 MB"
    p, url, _ = started("--max-new-tokens", "4")
    threading.Thread(target=p.stdout.read, daemon=True).start()
    rss, process = [], psutil.Process(p.pid)
    body = [dict(messages=asked(s), stream=i % 2 == 0) for i, s in enumerate(sounds)]
    broken = dict(messages=asked(sounds[0]))
    broken["messages"][0]["content"][0]["input_audio"]["data"] = "AAAA"
    def one(i):
        with httpx.Client(base_url=url, timeout=60) as c:
            if i % 10 == 3: return c.post("/v1/chat/completions", json=broken).status_code
            if i % 10 == 7: return c.post("/v1/audio/transcriptions", files={"file": ("a.wav", sounds[i % 8].read_bytes())}).status_code
            if i % 10 == 9:
                with c.stream("POST", "/v1/chat/completions", json=body[0]): return 200 # and leave
            return c.post("/v1/chat/completions", json=body[i % 8]).status_code
    try:
        with ThreadPoolExecutor(16) as pool:
            for _ in range(5):
                statuses = list(pool.map(one, range(200)))
                assert sorted(set(statuses)) == [200, 400] and statuses.count(400) == 20
                rss.append(process.memory_info().rss/2**20)
        def peak():
            while not done.wait(.01): rss.append(process.memory_info().rss/2**20)
        for kind in ("length", "chunks", "form"):
            done, watch = threading.Event(), len(rss)
            thread = threading.Thread(target=peak)
            thread.start()
            parts = (bytes(2**20) for _ in range(200))
            if kind == "form": r = httpx.post(f"{url}/v1/audio/transcriptions", content=parts, headers={"Content-Type": "multipart/form-data; boundary=x", "Content-Length": str(200*2**20)}, timeout=120)
            else: r = httpx.post(f"{url}/v1/chat/completions", content=parts, headers={"Content-Type": "application/json"} | ({"Content-Length": str(200*2**20)} if kind == "length" else {}), timeout=120)
            done.set()
            thread.join()
            assert r.status_code == 413
            if kind == "length": assert max(rss[watch:]) - rss[watch - 1] < 20
        record_property("summary", f"memory of the server in MiB, after each 200 of 1,000 requests: {', '.join(f'{m:.0f}' for m in rss[:5])}; at most {max(rss):.0f} under 200 MiB uploads")
        assert rss[4] - rss[1] < 25, rss[:5]
        assert max(rss) - rss[4] < 2*64 + 30, "what is over the limit of 64 MiB is not kept"
    finally:
        p.terminate()
        p.wait(60)
