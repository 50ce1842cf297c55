"The recorder in a real JupyterLab, with a microphone that Chromium pretends to have"
import re
import time

import pytest
from test_browser import Notebook, errors, lab, last_look, notebook, until  # fixtures among them

from mdl_nbdev.data.audio import load_audio

assert lab and last_look


@pytest.mark.slow
def test_record_and_ask(browser, lab):
    "What is recorded can be asked about; a second recording is another file; and the saved notebook keeps the last one"
    cell = "from mdl_nbdev.all import *\nmic = Recorder('said')\nmic"
    path = notebook(lab, "record.ipynb", cell, "ask('tiny', mic.clip, 'What is it?', max_new_tokens=4)")
    nb, folder = Notebook(browser, lab, path), lab[1]/"said"
    nb.run_all()
    until(lambda: "nothing is recorded yet: press Record" in nb.text())
    record = lambda: nb.page.locator(".jp-OutputArea button[aria-pressed]").last
    for n in 1, 2:
        record().dblclick() # the second click comes while the browser asks for the microphone
        until(lambda: record().inner_text() == "Stop")
        time.sleep(1.5)
        record().click()
        until(lambda n=n: f"recording-{n}.webm" in nb.page.locator("[role=status]").last.inner_text())
    sounds = [load_audio(str(folder/f"recording-{n}.webm")) for n in (1, 2)]
    assert all(.8*16_000 < len(s) < 30*16_000 and abs(s).max() > .01 for s in sounds)
    nb.page.locator(".jp-CodeCell").last.click()
    nb.page.keyboard.press("Control+Enter")
    until(lambda: re.search(r"confidence \d", nb.text()))
    assert not nb.page.locator(errors).count() and "recording-2.webm" in nb.text()
    until(lambda: "recording-2.webm" in (nb.page.keyboard.press("Control+s") or (lab[1]/path).read_text()))
