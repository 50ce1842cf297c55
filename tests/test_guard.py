"Who gets through to the server, how much at once, and for how long; without a server"
import asyncio
import json
import time

import pytest

from mdl_nbdev import ServeSettings
from mdl_nbdev.base.errors import InputError
from mdl_nbdev.cli import guard
from mdl_nbdev.cli.guard import Guard, check_headers, server_key
from mdl_nbdev.cli.protocol import RequestError

pytest.importorskip("starlette", reason='no Starlette: pip install "mdl_nbdev[serve]"')
SCOPE = dict(type="http", path="/v1/models", headers=[(b"host", b"localhost:8000")])


def settings(**kw): return ServeSettings(model_name="tiny", **kw)


def test_other_machines_need_a_key(monkeypatch):
    monkeypatch.delenv("MDL_API_KEY", raising=False)
    for host in ("127.0.0.1", "::1", "localhost"): assert server_key(settings(host=host)) is None
    for host in ("0.0.0.0", "::", "192.168.1.2", "host.example", ""):
        with pytest.raises(InputError, match=f"--host {host}: .*--api-key, or in the environment as MDL_API_KEY"): server_key(settings(host=host))
        assert server_key(settings(host=host, api_key="a")) == "a"
    monkeypatch.setenv("MDL_API_KEY", "b")
    assert server_key(settings(host="0.0.0.0")) == server_key(settings()) == "b" and server_key(settings(api_key="a")) == "a"


@pytest.mark.parametrize("headers, status", [
    (dict(host="localhost:8000"), 0), (dict(host="127.0.0.1"), 0), (dict(host="[::1]:8000", origin="http://[::1]:8000"), 0), (dict(host="localhost", origin="https://localhost"), 0),
    (dict(host="evil.example:8000"), 403), (dict(host="127.0.0.1.evil.example"), 403), (dict(host="10.0.0.1"), 403), (dict(host="["), 403), ({}, 403),
    (dict(host="localhost:8000", origin="https://evil.example"), 403), (dict(host="localhost:8000", origin="http://localhost:3000"), 403), (dict(host="localhost:8000", origin="null"), 403)])
def test_pages_of_other_sites_get_nothing(headers, status):
    "Neither by requests to this machine nor by a name that leads here; a server with a key is behind any name"
    try: found = check_headers(headers, "/v1/audio/transcriptions") or 0
    except RequestError as e: found = e.status
    assert found == status
    check_headers(headers | dict(authorization="Bearer sesame"), "/v1/models", "sesame")


@pytest.mark.parametrize("given", [None, "Bearer", "Bearer sesam", "Bearer sesame2", "Basic sesame", "sesame", "Bearer s\xe9same"])
def test_a_wrong_key(given):
    headers = dict(host="localhost") | ({} if given is None else dict(authorization=given))
    with pytest.raises(RequestError, match="Authorization: Bearer KEY") as e: check_headers(headers, "/v1/models", "sesame")
    assert (e.value.status, e.value.code) == (401, "invalid_api_key")
    for path in ("/", "/health"): check_headers(headers, path, "sesame")


async def responses(app, n, bodies, **kw):
    "The status and message of each of several requests side by side, and the guard"
    found, door = [], Guard(app, settings(**kw))
    async def one():
        parts = iter(bodies)
        async def receive(): return dict(type="http.request", body=next(parts, b""), more_body=True)
        async def send(message): found.append(message.get("status") or json.loads(message["body"])["error"]["message"])
        try: await door(SCOPE, receive, send)
        except RequestError as e: found.append(str(e))
    await asyncio.gather(*(one() for _ in range(n)))
    return found, door


def test_bodies_side_by_side_have_a_budget(monkeypatch):
    "Of eleven bodies of the largest size, eight get in; what they held is free in the end"
    there, waits = [], asyncio.Event()
    async def app(scope, receive, send):
        for _ in range(4): await receive()
        there.append(1)
        await waits.wait()
    async def run():
        asyncio.get_running_loop().call_later(.2, waits.set)
        return await responses(app, 11, [bytes(2**18)]*4, max_request_mb=1)
    found, door = asyncio.run(run())
    assert sum(there) == guard.MOST_LARGE == 8 and found == ["large requests are on their way; try again later"]*3
    assert door.held == door.active == 0


def test_a_body_is_refused_before_all_of_it_is_there():
    read = []
    async def app(scope, receive, send):
        while True: read.append(len((await receive())["body"]))
    found, door = asyncio.run(responses(app, 1, [bytes(2**19)]*9, max_request_mb=1))
    assert len(read) == 2 and "larger than 1.0 MiB, the limit of this server (--max-request-mb)" in found[0] and not door.held


def test_a_client_that_does_not_read_is_dropped():
    "Otherwise it would keep its place for ever"
    async def app(scope, receive, send): await send(dict(type="http.response.body", body=b"x"))
    async def run():
        async def never(*_): await asyncio.Event().wait()
        door = Guard(app, settings(timeout=1))
        with pytest.raises(asyncio.TimeoutError): await asyncio.wait_for(door(SCOPE, never, never), 10)
        return door
    start = time.monotonic()
    assert not asyncio.run(run()).active and time.monotonic() - start < 8
