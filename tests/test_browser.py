"The dashboards in a real JupyterLab, in a real browser, by clicks alone"
import csv
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from functools import partial
from pathlib import Path

import nbformat
import pytest
import waiting
from nbformat.v4 import new_code_cell, new_notebook

from mdl_nbdev import make_sounds, watch
from mdl_nbdev.cli.view import small_player

root = Path(__file__).parent.parent
pytest.importorskip("jupyterlab", reason="no JupyterLab: pip install jupyterlab")

shots = os.environ.get("SCREENSHOTS")  # a folder for pictures of what the tests see
errors = '[data-mime-type="application/vnd.jupyter.error"]'
setup = """import os
from mdl_nbdev.data.sounds import make_sounds
from mdl_nbdev.base.settings import InferSettings, TrainSettings
from mdl_nbdev.cli.inference import start_inference
from mdl_nbdev.cli.training import start_training
csv = make_sounds('sounds', 64, seed=1, csv_name='train.csv')"""
training = """run = start_training(TrainSettings(train_dataset=csv, eval_dataset=csv, base_dir='sounds', output='{name}', model_name='tiny', lr=2e-3, num_epochs=2000, batch_size=4,
    gradient_checkpointing=False, logging_steps=2, eval_steps=20, save_steps=100000))
run"""


until = partial(waiting.until, seconds=120, every=.2) # on a busy machine a click may take a minute, and so may importing torch


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A JupyterLab on a copy of the notebooks: its address with room for a path, and the copy"
    home = tmp_path_factory.mktemp("lab")
    shutil.copytree(root/"nbs", home/"nbs", ignore=shutil.ignore_patterns("free-spoken-digit-dataset", ".ipynb_checkpoints", "runs"))
    settings = home/"settings"/"@jupyterlab"
    for plugin, values in {"notebook-extension/tracker": dict(windowingMode="none"), "apputils-extension/notification": dict(fetchNews="false", checkForUpdates=False)}.items():
        path = settings/f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    token = secrets.token_hex(16)
    own = {f"JUPYTER_{k}_DIR": str(home/k.lower()) for k in ("CONFIG", "DATA", "RUNTIME")} | dict(JUPYTERLAB_SETTINGS_DIR=str(home/"settings"), JUPYTERLAB_WORKSPACES_DIR=str(home/"workspaces"))
    env = os.environ | own | dict(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", HF_HUB_OFFLINE="1", PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={home/'nbs'}"]
    with open(home/"log", "w") as log: server = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=home)
    def answers():
        assert server.poll() is None, (home/"log").read_text()[-3000:]
        try: return urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}", timeout=5).status == 200
        except OSError: return False
    try:
        until(answers)
        yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token={token}&reset", home/"nbs"
    finally:
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()


@pytest.fixture(autouse=True)
def last_look(browser, request):
    "A picture of what every tab shows at a test's end, and an empty browser for the next test"
    yield
    for i, page in enumerate(p for c in browser.contexts for p in c.pages):
        if shots: page.screenshot(path=f"{shots}/end-{request.node.originalname}-{i}.png")
        page.close()


class Notebook:
    "A notebook in a tab of the browser"
    def __init__(self, browser, lab, path):
        self.page = browser.new_page(viewport=dict(width=1280, height=1000))
        self.page.set_default_timeout(120_000) # a kernel or torch takes that long to start on a busy machine
        self.page.goto(lab[0].format(path))
        self.page.locator(".jp-Notebook .jp-Cell").first.wait_for()
        self.page.get_by_text(re.compile(r"\| Idle$")).wait_for() # the kernel, in the status bar
    def run_all(self):
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name=re.compile("^Run All Cells$")).click()
    def prompts(self): return self.page.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts()
    def done(self): return all(re.search(r"\d", p) for p in self.prompts())
    def text(self):
        assert not (wrong := self.page.locator(errors).all_inner_texts()), wrong
        return self.page.locator(".jp-Notebook").inner_text()
    def step(self, word="step"): return int((found := re.findall(rf"{word} ([\d,]+) of", self.text())) and found[-1].replace(",", "") or 0)
    def curve(self): return max((len(p.split()) for p in self.page.eval_on_selector_all(".jp-OutputArea svg polyline", "all => all.map(p => p.getAttribute('points'))")), default=0)
    def click(self, label): self.page.get_by_role("button", name=label, exact=True).last.click()
    def buttons(self): return self.page.locator(".jp-OutputArea button.jupyter-button").all_inner_texts()
    def shot(self, name, code=None):
        if not shots: return
        if code: self.page.locator(".jp-CodeCell").filter(has_text=code).first.evaluate("e => e.scrollIntoView()")
        self.page.screenshot(path=f"{shots}/{name}.png")


def notebook(lab, name, *cells):
    "Write a notebook beside the copies"
    nb = new_notebook(cells=[new_code_cell(c) for c in cells], metadata=dict(kernelspec=dict(display_name="python3", language="python", name="python3")))
    nbformat.write(nb, lab[1]/name)
    return name


def steps_logged(run): return len((run/"metrics.jsonl").read_text().splitlines()) if (run/"metrics.jsonl").exists() else 0


def shorten(path):
    "The tutorial up to the scores, with a third of its training"
    nb = nbformat.read(path, 4)
    end = next(i for i, c in enumerate(nb.cells) if c.source.startswith("## Stop and resume"))
    nb.cells = [c for c in nb.cells[:end] if "assert" not in c.source]
    (settings,) = [c for c in nb.cells if "num_epochs=6" in c.source]
    settings.source = settings.source.replace("num_epochs=6", "num_epochs=2")
    nbformat.write(nb, path)


def test_first_steps(browser, lab):
    shorten(lab[1]/"tutorials"/"00_first_steps.ipynb")
    nb = Notebook(browser, lab, "tutorials/00_first_steps.ipynb")
    until(lambda: nb.page.locator('.jp-OutputArea img[src^="data:image/svg"]').count() > 3) # what is stored is shown, although nobody here has run it
    nb.page.get_by_role("menuitem", name="Edit", exact=True).click()
    nb.page.get_by_role("menuitem", name="Clear Outputs of All Cells").click()
    nb.run_all()
    seen = []
    def look():
        live = nb.page.locator(".jp-OutputArea .widget-html:visible, .jp-OutputArea .jupyter-widgets:visible").count()
        if live and (now := (nb.step(), nb.curve())) not in seen[-1:]: seen.append(now)
        if 20 < nb.step() < 40 and "Save now" in nb.buttons(): nb.shot("training", "start_training(form")
        return nb.done()
    until(look, seconds=600, every=.3)
    steps, points = zip(*[s for s in seen if s[0]])
    assert len(set(steps)) > 8 and list(steps[:8]) == sorted(steps[:8]), "the progress grows while the run goes on"
    assert len(set(points)) > 5, "and so does the curve"
    assert "finished" in nb.text() and "Answers at step 50" in nb.text() and "exact match" in nb.text()
    nb.shot("finished", "start_inference(")


def save_and_stop(nb, run, name):
    "Both buttons, with some steps between the clicks"
    until(lambda: nb.step() > 5)
    nb.click("Save now")
    saved = until(lambda: [p.name for p in run.glob("checkpoint-*")])
    at = nb.step()
    until(lambda: nb.step() > at + 5)
    nb.shot(f"running-{name}")
    nb.click("Stop")
    until(lambda: "Stopped by you" in nb.text())
    assert nb.buttons() == ["Continue"]
    last = max(int(p.name.split("-")[1]) for p in run.glob("checkpoint-*"))
    assert f"checkpoint-{last} has everything so far" in nb.text() and saved != [f"checkpoint-{last}"] and not (run/"final").exists()
    nb.shot(f"stopped-{name}")
    return last


def test_save_and_stop(browser, lab):
    "The buttons work while a cell waits for the run"
    path = notebook(lab, "waiting.ipynb", setup, training.format(name="waiting"), "report = await run\nprint('waited for', report.checkpoint)")
    nb = Notebook(browser, lab, path)
    nb.run_all()
    last = save_and_stop(nb, lab[1]/"waiting", "waiting")
    until(lambda: f"waited for waiting/checkpoint-{last}" in nb.text())


def restart(nb):
    "Restart the kernel by the menu"
    nb.page.get_by_role("menuitem", name="Kernel", exact=True).click()
    nb.page.get_by_role("menuitem", name=re.compile("^Restart Kernel…")).first.click()
    nb.page.get_by_role("button", name="Confirm Kernel Restart").click()


@pytest.mark.slow
def test_a_saved_notebook_shows_the_run(browser, lab):
    "Save, close the tab, restart the kernel, open it again: the picture that was saved is there, with the code that shows the rest, and no dead button"
    bar = "from mdl_nbdev.base.progress import progress_bar\nwith progress_bar(40, 'counting', 'row') as bar: bar.update(40)"
    path = notebook(lab, "saved.ipynb", setup, training.format(name="saved"), bar, "from mdl_nbdev import SettingsForm\nSettingsForm(TrainSettings, output='runs/form')")
    nb, run = Notebook(browser, lab, path), lab[1]/"saved"
    nb.run_all()
    until(lambda: nb.step() > 20)
    assert nb.page.get_by_text("This is how it was at").count() == 0 or not nb.page.get_by_text("This is how it was at").first.is_visible(), "the widgets hide the picture"
    until(lambda: "step 2" in (nb.page.keyboard.press("Control+s") or (lab[1]/path).read_text()))
    restart(nb)
    until(lambda: nb.page.get_by_text("This is how it was at").first.is_visible())
    nb.shot("restarted")
    nb.page.reload()
    until(lambda: nb.page.get_by_text("This is how it was at").first.is_visible())
    text = nb.text()
    assert "Error displaying widget" not in text and "watch('saved') shows how it is now" in text and "Training saved" in text
    assert not [b for b in nb.page.locator(".jp-OutputArea button.jupyter-button").all() if b.is_visible()]
    assert "40 of 40" in text and "runs/form" in text
    nb.shot("reloaded")
    html = subprocess.run([sys.executable, "-m", "nbconvert", "--to", "html", "--stdout", lab[1]/path], capture_output=True, text=True, check=True).stdout
    page = browser.new_page()
    page.set_content(html)
    assert "Training saved" in page.inner_text("body") and "Error displaying widget" not in page.inner_text("body")
    killed = watch(run)
    until(lambda: killed.poll() or killed.view.phase == "no longer running", seconds=15)


@pytest.mark.slow
def test_charts(browser, lab):
    "Values under the pointer while the charts are redrawn; controls by keyboard, also after the run; and what is saved is what was on the screen"
    path = notebook(lab, "charts.ipynb", setup, training.format(name="charts"))
    nb = Notebook(browser, lab, path)
    nb.run_all()
    until(lambda: nb.step() > 40)
    chart = nb.page.locator(".jp-OutputArea svg[role=img]").first
    alt = lambda: chart.get_attribute("aria-label")
    where = """() => {
        const chart = document.querySelector('.jp-OutputArea svg[role=img]');
        chart.scrollIntoView({block: 'center'});
        const r = chart.getBoundingClientRect();
        return [r.x + r.width/2, r.y + r.height*.7];
    }""" # in one step, as the chart is replaced all the time
    nb.page.mouse.move(*nb.page.evaluate(where))
    visible = "all => all.filter(t => getComputedStyle(t).visibility == 'visible').map(t => t.textContent)"
    shown = lambda: nb.page.eval_on_selector_all(".mdl-hover text", visible)
    until(shown)
    at = nb.step()
    until(lambda: nb.step() > at + 10)
    assert until(shown)[0].startswith("step") and "loss" in shown()[0], "still there, although the chart was replaced"
    nb.shot("charts")
    nb.page.get_by_role("checkbox", name="log scale").focus()
    nb.page.keyboard.press("Space")
    until(lambda: "log scale" not in alt())
    focused = "document.activeElement.labels[0].innerText.trim()"
    names = []
    for _ in range(4):
        nb.page.keyboard.press("Tab")
        names.append(nb.page.evaluate(focused))
        if names[-1] == "from step": nb.page.keyboard.type("20")
    assert names == ["smoothing", "from step", "to step", "values as a table"]
    until(lambda: "at step 20 to" in alt())
    nb.click("Stop")
    until(lambda: "Stopped by you" in nb.text())
    nb.page.get_by_label("smoothing").select_option(label="mean of 20 % of the steps")
    until(lambda: ", mean of" in alt())
    expected = alt()
    until(lambda: expected[:60] in (nb.page.keyboard.press("Control+s") or (lab[1]/path).read_text()))
    restart(nb)
    until(lambda: nb.page.locator(f'img[alt="{expected}"]').is_visible() and not chart.is_visible())


@pytest.mark.slow
def test_closed_tab(browser, lab):
    "A run goes on without its tab, and a new tab finds it; its buttons work while the kernel is idle"
    path = notebook(lab, "closed.ipynb", setup, training.format(name="closed"))
    nb, run = Notebook(browser, lab, path), lab[1]/"closed"
    nb.run_all()
    until(lambda: nb.step() > 5)
    nb.page.keyboard.press("Control+s")
    until(lambda: "widget-view" in (lab[1]/path).read_text())
    nb.page.close()
    n = steps_logged(run)
    until(lambda: steps_logged(run) > n + 10)
    nb = Notebook(browser, lab, path)
    until(lambda: nb.step() > 2*n)
    save_and_stop(nb, run, "closed")


def test_inference(browser, lab):
    "Stop, then continue to the end, with every row once; each shard of 8 rows takes at least half a second, so that the clicks come in time"
    rows = """import time
from pathlib import Path
lines = csv.read_text().splitlines()
Path('many.csv').write_text('\\n'.join([lines[0] + ',n', *(f'{lines[1 + i % 64]},{i}' for i in range(120))]) + '\\n')
answering = start_inference(InferSettings(input='many.csv', base_dir='sounds', output='answers.csv', model_name='tiny', batch_size=1, max_new_tokens=4),
                            [lambda rows, done, total: time.sleep(.5)])
answering"""
    nb, out = Notebook(browser, lab, notebook(lab, "inference.ipynb", setup, rows)), lab[1]/"answers.csv"
    nb.run_all()
    done = lambda: int((re.findall(r"([\d,]+) of 120 rows ·", nb.text()) or ["0"])[-1])
    until(lambda: done() > 10)
    nb.shot("answering")
    nb.click("Stop")
    until(lambda: "stopped after" in nb.text())
    stopped = done()
    assert 0 < stopped < 120 and not out.exists() and Path(f"{out}.part").exists()
    nb.click("Continue")
    until(lambda: stopped < done() < 120)
    until(lambda: "120 rows in answers.csv" in nb.text())
    assert not nb.buttons()
    nb.shot("answered")
    with open(out, encoding="utf-8", newline="") as f: assert [row[2] for row in csv.reader(f)] == ["n", *map(str, range(120))]
    assert not list(lab[1].glob("answers.csv.*"))


@pytest.mark.slow
def test_form(browser, lab):
    "It checks while one types, says the command, takes one, and trains; by the keyboard too, and in a narrow window"
    form = "from mdl_nbdev.all import *\nmake_sounds('sounds', 64, seed=1, csv_name='train.csv')\nform = SettingsForm(TrainSettings, train_dataset='a.csv', output='form', model_name='tiny')\nform"
    nb = Notebook(browser, lab, notebook(lab, "form.ipynb", form, "print('rank', form.settings.lora_rank, (await form.run).steps)"))
    page = nb.page
    page.locator(".jp-CodeCell").first.locator(".cm-content").click()
    page.keyboard.press("Control+Enter")
    until(lambda: "mdl_train --train-dataset a.csv --output form" in nb.text())
    assert "a.csv: No such file" in nb.text()
    group = page.get_by_role("button", name=re.compile("What is trained"))
    group.focus()
    page.keyboard.press("Space")
    rank = page.get_by_label("lora_rank", exact=True)
    rank.fill("0")
    until(lambda: "lora_rank: got 0, expected at least 1" in nb.text())
    train = page.get_by_role("button", name="Train", exact=True)
    until(train.is_disabled) # a moment after the text
    assert train.is_disabled()
    nb.shot("form-fault")
    rank.fill("16")
    until(lambda: "--lora-rank 16" in nb.text() and "expected at least" not in nb.text())
    rank.press_sequentially("e")
    until(lambda: "16e" in nb.text())
    assert rank.input_value() == "16e", "what is typed stays"

    page.get_by_label("Command line", exact=True).fill("mdl_train --lora-rnak 8")
    until(lambda: "did you mean --lora-rank?" in nb.text())
    command = "mdl_train --train-dataset sounds/train.csv --base-dir sounds --output form --model-name tiny --lora-rank 16 --max-steps 4"
    page.get_by_label("Command line", exact=True).fill(command + " --gradient-checkpointing false")
    until(lambda: rank.input_value() == "16" and not train.is_disabled())
    assert "Wrong:" not in nb.text() and "Check:" not in nb.text()
    page.context.grant_permissions(["clipboard-read"])
    for button, text in {"Copy Command": "mdl_train --train-dataset sounds/train.csv", "Copy YAML for --config": "train_dataset:"}.items():
        page.get_by_role("button", name=button).click()
        assert page.evaluate("navigator.clipboard.readText()").startswith(text)
    for width, stacks in {1280: False, 800: True}.items():
        page.set_viewport_size(dict(width=width, height=1000))
        label, field = page.locator(".mdl-field label", has_text="lora_rank").bounding_box(), rank.bounding_box()
        assert (label["y"] + label["height"] <= field["y"]) == stacks
        nb.shot(f"form-{width}", "SettingsForm")
    train.focus()
    page.keyboard.press("Space")
    until(lambda: "Training form" in nb.text())
    page.locator(".jp-CodeCell").last.locator(".cm-content").click()
    page.keyboard.press("Control+Enter")
    until(lambda: "rank 16 4" in nb.text())


def test_a_player_goes_on_while_its_table_is_redrawn(browser, tmp_path):
    "In the HTML of a widget, which is replaced as a whole: the player takes the place of its copy, and stays when its row is gone"
    make_sounds(tmp_path, 2, seed=1)
    clips = sorted(tmp_path.rglob("*.wav"))[:2]
    cells = [small_player(str(clip)) for clip in clips]
    page = browser.new_page()
    page.set_content('<div class="widget-html-content"></div>')
    box = page.locator(".widget-html-content")
    draw = lambda html: box.evaluate("(e, html) => { e.innerHTML = html }", html)
    draw(f"<table><tr><td id=a>{cells[0]}</td></tr></table>")
    page.mouse.click(1, 1) # a page may play sound once the user has clicked
    box.locator("audio").evaluate("a => { window.heard = a; a.loop = true; return a.play() }")
    time.sleep(.3)
    for html, where in ((f"<p id=b>{cells[1]}</p><p id=a>{cells[0]}</p>", "#a"), (f"<p>{cells[1]}</p>", ".widget-html-content"), (f"<p id=a>{cells[0]}</p>", "#a")):
        draw(html)
        time.sleep(.3)
        before = page.evaluate("[!heard.paused, heard.isConnected, heard.currentTime]")
        time.sleep(.3)
        assert before[:2] == [True, True] and page.evaluate("heard.currentTime") != before[2]
        assert page.evaluate("where => heard.parentNode.matches(where)", where) and page.locator("audio").count() == len(re.findall("<audio", html)) + (where[0] == ".")
    page.evaluate("heard.pause()")
    draw("nothing left")
    time.sleep(.2)
    assert page.locator("audio").count() == 0
