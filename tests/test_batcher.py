"Requests that wait together: each gets the answer that it would get alone, sees it grow, and can leave"
import functools
import threading
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdl_nbdev import InferSettings
from mdl_nbdev.data.conversations import Conversation, text_message
from mdl_nbdev.infer.ask import request_of
from mdl_nbdev.infer.batcher import Batcher, GrowingText, Job, open_end
from mdl_nbdev.model.engine import Completion, load_engine
from mdl_nbdev.model.families import load_chat

pytestmark = pytest.mark.usefixtures("one_thread")
settings = InferSettings(input="requests", output="none", model_name="tiny-text", confidence=True, max_new_tokens=12)
chat = load_chat("tiny-text")


@pytest.fixture(scope="module")
def engine(): return load_engine(settings)


@pytest.fixture
def batcher(engine):
    batcher, before = Batcher(engine), engine.options
    yield batcher
    engine.options = before


def request(engine, text, limit=12): return request_of(engine, Conversation([text_message("user", text)]), replace(settings, max_new_tokens=limit))
def in_order(engine, requests):
    "Completions in the order of their requests"
    found = {c.key: c for c in engine.generate(requests)}
    return [found[r.key] for r in requests]


def job(engine, text, limit=12, options=None, stop=(), **kw): return Job(request(engine, text, limit), options or engine.options, GrowingText(engine.chat, stop), **kw)


def test_a_watched_batch_ends_when_its_requests_do(engine):
    limits, calls = [3, 12, 5], []
    requests = [replace(request(engine, t, n), key=n) for t, n in zip(["Spell dog", "Count to three", "Reverse: abc"], limits)]
    expected = in_order(engine, requests)
    ends = {0: 99, 1: 4, 2: 99}
    def watch(i): return lambda ids: calls.append((i, len(ids))) or len(ids) == ends[i]
    forward, passes = engine.model.forward, []
    engine.model.forward = functools.wraps(forward)(lambda *a, **kw: passes.append(1) or forward(*a, **kw))
    try: found = in_order(engine, [replace(r, watch=watch(i)) for i, r in enumerate(requests)])
    finally: del engine.model.forward
    assert [c.ids for c in found] == [expected[0].ids, expected[1].ids[:4], expected[2].ids]
    assert found[1].truncated and len(passes) == 5, "no pass after the last one that is needed"
    assert calls == [(0, 1), (1, 1), (2, 1), (0, 2), (1, 2), (2, 2), (1, 3), (2, 3), (1, 4), (2, 4)]
    assert found[2].logprobs == pytest.approx(expected[2].logprobs, abs=1e-4)


def test_an_end_behind_the_limit_is_not_seen(engine, monkeypatch):
    "Whatever the limits of the others are"
    short, long = request(engine, "Spell dog", 3), replace(request(engine, "Spell dog", 9), key="long")
    ids = in_order(engine, [long])[0].ids
    at = next(i for i, t in enumerate(ids) if t not in ids[:i] and i > 2)
    monkeypatch.setattr(engine, "stops", [ids[at]])
    short.max_new_tokens = at
    alone, = in_order(engine, [short])
    together, ended = in_order(engine, [short, long])
    assert (alone.ids, alone.truncated, len(alone.logprobs)) == (together.ids, together.truncated, len(together.logprobs)) == (ids[:at], True, at)
    assert not ended.truncated


@given(st.text(st.characters(codec="utf-8"), max_size=12), st.lists(st.text("ab é", min_size=1, max_size=3), max_size=3), st.booleans())
def test_what_is_shown_stays(text, stop, ab):
    "All pieces together are the text before the first stop, however the bytes come"
    if ab: text = "".join("ab é"[ord(c) % 4] for c in text)
    ids, growing = chat.tok(text, add_special_tokens=False).input_ids, GrowingText(chat, stop)
    pieces = [growing.update(ids[:n]) for n in range(1, len(ids) + 1)]
    pieces.append(growing.update(ids, complete=True))
    whole = chat.decode_completion(ids)
    beginnings = [[whole[:n].index(s) for s in stop if s in whole[:n]] for n in range(len(whole) + 1)]
    ends = next(filter(None, beginnings), []) # of what is complete first
    assert "".join(pieces) == growing.text == whole[:min(ends, default=len(whole))]
    assert growing.stopped == bool(ends) and (ends or "".join(pieces[:-1]).startswith(whole[:-3]))


def test_a_seed_is_drawn_in_the_same_way_in_any_company(engine, batcher):
    "Requests with seeds share batches with others; without one, each answer is another"
    sampled = replace(engine.options, do_sample=True, seed=7)
    def submit(seed=None): return batcher.submit(job(engine, "Spell dog", options=replace(sampled, seed=seed or 0), seed=seed))
    first, other, unseeded = submit(7), submit(8), [submit() for _ in range(3)]
    assert len({j.options for j in batcher.jobs}) == 1
    batcher.thread.start()
    texts = [f.result(60).text for f in (first, other, *unseeded)]
    assert len(set(texts)) == 5 and submit(7).result(60).text == texts[0]
    batcher.close()


def test_who_leaves_makes_room(engine, batcher):
    gone, stays, late = (job(engine, t, 12) for t in ("Spell dog", "Spell cat", "Spell cow"))
    seen = []
    gone.request.watch = lambda ids: seen.append(len(ids)) or (len(ids) == 2 and gone.future.cancel()) or gone.watch(ids)
    for j in (gone, stays, late): batcher.submit(j)
    late.future.cancel()
    batcher.thread.start()
    assert stays.future.result(60).tokens == 12
    batcher.close()
    assert seen == [1, 2] and gone.future.cancelled()


def test_an_error_belongs_to_its_batch(engine, batcher, monkeypatch):
    bad, good = job(engine, "Spell dog", options=replace(engine.options, repetition_penalty=1.1)), job(engine, "Spell dog")
    generate = engine.generate
    def fail(requests):
        if engine.options.repetition_penalty > 1: raise MemoryError("too long")
        return generate(requests)
    monkeypatch.setattr(engine, "generate", fail)
    for j in (bad, good): batcher.submit(j)
    batcher.thread.start()
    assert good.future.result(60).tokens == 12
    with pytest.raises(MemoryError, match="too long"): bad.future.result(60)
    batcher.close()
    with pytest.raises(RuntimeError, match="closed"): batcher.submit(job(engine, "late"))


def test_the_end_finishes_what_waits(engine, batcher):
    started = threading.Event()
    running = job(engine, "Spell dog", on_text=lambda new: started.set())
    futures = [batcher.submit(running)]
    batcher.thread.start()
    started.wait(60)
    futures += [batcher.submit(job(engine, t)) for t in ("Spell cat", "Spell cow")]
    batcher.close()
    assert [f.result(0).tokens for f in futures] == [12]*3


def test_a_canceled_job_leaves_the_queue(engine, batcher):
    "At once, so that its clips do not stay in memory until the next batch"
    kept, gone = [job(engine, "Spell dog") for _ in range(2)]
    for j in (kept, gone): batcher.submit(j)
    gone.future.cancel()
    assert batcher.jobs == [kept]


def test_a_long_stop_text_costs_no_more_than_the_answer():
    assert open_end("ab", ["b" + "a"*10**7]) == 1


@pytest.mark.parametrize("again, shown", [("Spell it out", "Spell it out"), ("Spell it", "Spell it"), ("Spoken words", None), ("Spe", None), ("", None)])
@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_memory_interrupts_is_not_joined_of_two(engine, again, shown, stream):
    "It is generated again, in a smaller batch, where it may become another one; what a client has seen cannot be taken back"
    pieces, before, after = [], *(chat.tok(t, add_special_tokens=False).input_ids for t in ("Spell it out", again))
    j = job(engine, "x", stop=["!"], on_text=pieces.append if stream else None)
    for n in range(1, 9): j.watch(before[:n])
    assert "".join(pieces) == ("Spell it" if stream else "")
    for n in range(1, len(after)):
        if j.watch(after[:n]): break
    j.finish(Completion(j.request.key, after, again, False, [-1.]*(len(after) + 1)))
    if not stream: assert j.future.result(0).text == again
    elif shown: assert "".join(pieces) == j.future.result(0).text == shown
    else:
        with pytest.raises(MemoryError, match="became another one; send the request again"): j.future.result(0)
        assert "".join(pieces) == "Spell it"
