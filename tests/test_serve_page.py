"The page of the server in a real browser, with a microphone that Chromium pretends to have"
import base64
import io
import os
import re

import pytest
import soundfile as sf

from mdl_nbdev import ServeSettings, ask
from mdl_nbdev.cli.serve import ModelServer
from mdl_nbdev.data.sounds import make_sounds

pytest.importorskip("starlette", reason='no Starlette: pip install "mdl_nbdev[serve]"')
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def server():
    with ModelServer(ServeSettings(model_name="tiny", port=0, max_new_tokens=24)) as server: yield server


@pytest.fixture
def page(server, browser):
    context = browser.new_context(viewport=dict(width=390, height=844))
    page, faults = context.new_page(), []
    page.set_default_timeout(60_000)
    page.on("pageerror", lambda e: faults.append(str(e)))
    page.on("request", lambda r: r.url.startswith((server.url, "blob:", "data:")) or faults.append(r.url))
    page.goto(server.url)
    page.get_by_role("heading", name="Ask tiny").wait_for()
    yield page
    assert not faults, "an error in the page, or a request to another server"
    context.close()


@pytest.fixture
def clip(tmp_path):
    make_sounds(tmp_path, 1, seed=2)
    return tmp_path/"sounds"/"0000.wav"


def answer(page):
    page.locator("#answer[aria-busy=false]").wait_for()
    page.locator("#facts").filter(has_text="tokens").wait_for()
    return page.locator("#answer").text_content()


def test_a_file_that_is_chosen(page, clip):
    page.get_by_label("Choose a file").set_input_files(clip)
    assert page.get_by_role("status").inner_text() == "0000.wav" and page.get_by_label("The clip").is_visible()
    page.get_by_label("Question").fill("What is it?")
    page.get_by_role("button", name="Ask", exact=True).click()
    expected = ask("tiny", str(clip), "What is it?", max_new_tokens=24)
    assert answer(page) == expected.text
    assert page.locator("#percent").inner_text() == f"confidence {expected.confidence:.1%}".replace("%", " %")
    assert abs(float(page.locator("#meter").evaluate("e => e.value")) - expected.confidence) < 1e-4
    page.get_by_role("button", name="Remove").click()
    assert page.get_by_label("The clip").is_hidden()


def test_a_file_that_is_dropped(page, clip):
    data = page.evaluate_handle("bytes => { const d = new DataTransfer(); d.items.add(new File([new Uint8Array(bytes)], 'dropped.wav')); return d }", list(clip.read_bytes()))
    page.dispatch_event("main", "drop", dict(dataTransfer=data))
    assert page.get_by_role("status").inner_text() == "dropped.wav"
    page.get_by_label("Question").focus()
    page.keyboard.press("Control+Enter")
    assert answer(page) == ask("tiny", str(clip), max_new_tokens=24).text


def test_a_recording(page, server):
    "What the microphone hears arrives as a wav of that length, with sound in it"
    page.get_by_role("button", name="Record", exact=True).click()
    stop = page.get_by_role("button", name="Stop recording")
    stop.wait_for()
    page.wait_for_timeout(1500)
    with page.expect_request("**/v1/chat/completions") as sent:
        stop.click()
        page.get_by_role("status").filter(has_text="recording, ").wait_for()
        page.get_by_role("button", name="Ask", exact=True).click()
    samples, rate = sf.read(io.BytesIO(base64.b64decode(sent.value.post_data_json["messages"][0]["content"][0]["input_audio"]["data"])))
    seconds = float(re.search(r"[\d.]+", page.get_by_role("status").inner_text())[0])
    assert rate == 16_000 and .5 < len(samples)/rate < 30 and abs(len(samples)/rate - seconds) < .1 and abs(samples).max() > .01
    assert answer(page) and page.locator("#percent").is_visible()


def test_a_double_click_records_once(page):
    "The second click comes while the browser asks for the microphone, and starts no second recording, which nothing would end"
    page.evaluate("() => { window.asked = 0; const ask = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices); navigator.mediaDevices.getUserMedia = o => { window.asked++; return ask(o) } }")
    page.evaluate("() => { const b = document.getElementById('record'); b.click(); b.click() }")
    stop = page.get_by_role("button", name="Stop recording")
    stop.wait_for()
    assert page.evaluate("asked") == 1
    page.wait_for_timeout(500)
    stop.click()
    page.get_by_role("status").filter(has_text="recording, ").wait_for()


def test_a_key_is_asked_for(page, server, monkeypatch):
    monkeypatch.setattr(server.guard, "key", "sesame")
    page.reload()
    page.get_by_role("status").filter(has_text="the API key is missing").wait_for()
    page.get_by_label("API key").fill("sesame")
    page.get_by_label("Question").fill("Hello")
    page.get_by_role("heading", name="Ask tiny").wait_for()
    assert page.get_by_role("status").inner_text().startswith("or drop a file here")
    page.get_by_role("button", name="Ask", exact=True).click()
    assert answer(page)


def test_faults_are_shown(page, tmp_path):
    page.get_by_role("button", name="Ask", exact=True).click()
    assert page.get_by_role("alert").inner_text() == "Record or choose a clip, or write a question"
    (tmp_path/"page.wav").write_text("<html>")
    page.get_by_label("Choose a file").set_input_files(tmp_path/"page.wav")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_role("alert").filter(has_text="an HTML page").wait_for()
    assert page.get_by_role("button", name="Ask", exact=True).is_enabled()


def test_stop_ends_the_answer(page, server):
    page.route("**/v1/chat/completions", lambda route: route.continue_(post_data=route.request.post_data.replace('"stream":true', '"stream":true,"max_tokens":2000,"temperature":1,"seed":1')))
    page.get_by_label("Question").fill("Tell me everything")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.wait_for_function("document.getElementById('answer').textContent.length > 3")
    page.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_role("alert").filter(has_text="stopped").wait_for()
    for _ in range(200):
        if not server.guard.active: break
        page.wait_for_timeout(50)
    assert not server.guard.active


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_looks(page, scheme, clip):
    "Nothing is wider than a telephone, controls can be hit, texts have contrast, in both themes"
    page.emulate_media(color_scheme=scheme)
    page.get_by_label("Choose a file").set_input_files(clip)
    page.get_by_label("Question").fill("What is it? " * 30)
    page.get_by_role("button", name="Ask", exact=True).click()
    answer(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert all(h >= 44 for h in page.eval_on_selector_all("button:not([hidden]), .button", "all => all.map(e => e.getBoundingClientRect().height)"))
    unnamed = "all => all.filter(e => !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels && e.labels.length)).map(e => e.id)"
    assert page.eval_on_selector_all("button, input, textarea, audio, meter", unnamed) == []
    contrast = """all => all.filter(e => e.offsetParent && e.textContent.trim()).map(e => {
      const lum = c => { const d = document.createElement('canvas').getContext('2d'); d.fillStyle = c; d.fillRect(0,0,1,1);
        return [...d.getImageData(0,0,1,1).data].slice(0,3).map(v => (v/=255) <= .03928 ? v/12.92 : ((v+.055)/1.055)**2.4).reduce((s,v,i) => s + v*[.2126,.7152,.0722][i], 0) };
      const back = e.classList.contains('main') ? getComputedStyle(e).backgroundColor : getComputedStyle(document.body).backgroundColor;
      const [a, b] = [lum(getComputedStyle(e).color), lum(back)].sort((x, y) => y - x);
      return [e.id || e.tagName, (a + .05)/(b + .05)] }).filter(([_, c]) => c < 4.5)"""
    assert page.eval_on_selector_all("h1, h2, p, label, legend, small, span, button", contrast) == []
    if folder := os.environ.get("SCREENSHOTS"): page.screenshot(path=f"{folder}/serve-{scheme}.png", full_page=True)
