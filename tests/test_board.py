"The review board in a real browser: 5,000 rows, by clicks and by keyboard alone"
import csv
import json
import re
import time

import pytest
from test_browser import Notebook, errors, lab, last_look, notebook, shots, until  # fixtures among them

from mdl_nbdev import ReviewBoard
from mdl_nbdev.base.errors import InputError
from mdl_nbdev.data.sounds import make_sounds
from mdl_nbdev.infer.corrections import Corrections

assert lab and last_look
EVIL = "<script>document.body.remove()</script>"
many = f"""import csv, os
from mdl_nbdev.all import *
from mdl_nbdev.data.sounds import make_sounds
os.makedirs('board', exist_ok=True)
os.chdir('board')
rows = [r.split(',') for r in make_sounds('.', 40, seed=1).read_text().splitlines()[1:]]
with open('labels.csv', 'w') as f, open('answers.csv', 'w') as g:
    labels, answers = csv.writer(f), csv.writer(g)
    labels.writerow(['audio', 'prediction', 'speaker'])
    answers.writerow(['audio', 'prediction', 'speaker', 'probability'])
    for i in range(5000):
        audio, label = rows[i % 40]
        labels.writerow([audio, 'siren' if i==7 else label, 'ann' if i % 3 else {EVIL!r}])
        answers.writerow([audio, label, '', round(.5 + i/10000, 4)])
training = TrainSettings(train_dataset='labels.csv', output='run', model_name='tiny', max_steps=2, gradient_checkpointing=False)
board = ReviewBoard('labels.csv', 'answers.csv', training=training)"""


def contrast(page, selector):
    "The least contrast between text and its background"
    code = """all => Math.min(...all.filter(e => e.innerText.trim() && e.checkVisibility()).map(e => {
      const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently:true});
      const drawn = layers => {canvas.clearRect(0, 0, 1, 1); for (const c of layers) {canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1)}
        return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => (v /= 255) <= .03928 ? v/12.92 : ((v + .055)/1.055)**2.4)};
      const layers = []; for (let p = e; p; p = p.parentElement) layers.unshift(getComputedStyle(p).backgroundColor);
      const light = c => .2126*c[0] + .7152*c[1] + .0722*c[2], back = light(drawn(layers)), text = light(drawn([...layers, getComputedStyle(e).color]));
      return (Math.max(back, text) + .05)/(Math.min(back, text) + .05)}))"""
    return page.locator(selector).evaluate_all(code)


def test_board(browser, lab):
    path = notebook(lab, "board.ipynb", many, "board")
    nb = Notebook(browser, lab, path)
    nb.page.set_viewport_size(dict(width=800, height=1000))
    nb.page.keyboard.press("Control+b") # the list of files
    nb.run_all()
    page, folder = nb.page, lab[1]/"board"
    live = page.locator(".jupyter-widgets.mdl-board")
    until(lambda: live.locator("tr[data-do]").count() == 10)
    status = lambda: live.locator("[role=status]").inner_text()
    lines = lambda: [row.split()[0] for row in live.locator("tr[data-do]").all_inner_texts()]
    assert "row 1 of 5,000, page 1 of 500" in status() and "lowest confidence" in status() and lines()[0] == "2"
    assert not live.locator("audio").count(), "no clip is loaded before it is played"
    assert live.evaluate("e => e.scrollWidth <= e.clientWidth + 1"), "800 pixels are enough"

    # sort and filter
    start = time.monotonic()
    live.get_by_label("sort by").select_option("order of the file")
    until(lambda: "order of the file" in status())
    live.get_by_role("button", name=re.compile("^siren answered as (?!siren).*: 1$")).click()
    until(lambda: "row 1 of 1," in status())
    assert lines() == ["9"] and time.monotonic() - start < 60
    live.get_by_role("button", name=re.compile("^siren answered as (?!siren).*: 1$")).click()
    until(lambda: "row 1 of 5,000" in status())
    live.get_by_label("column").select_option("speaker")
    until(lambda: "column: speaker" in status() and "ann" in status())
    live.get_by_label("value").select_option(index=1)
    until(lambda: "of 1,667" in status())
    assert page.locator("body").count() and EVIL[:8] in status()
    live.get_by_label("column").select_option("all rows")
    until(lambda: "all rows" in status())

    # play, accept, correct, undo, save, by keyboard
    keys = live.locator(".mdl-keys")
    keys.focus()
    page.keyboard.press("Space")
    until(lambda: live.locator("tr[aria-current] audio[src^='data:audio']").count() == 1 and live.locator("audio").count() == 1)
    until(lambda: live.locator("audio").evaluate("a => a.currentTime > 0 || a.ended"))
    page.keyboard.press("a")
    until(lambda: "1 decision, 0 labels corrected" in status() and "row 2 of" in status())
    for at in range(3, 9):
        page.keyboard.press("n")
        until(lambda at=at: f"row {at} of" in status())
    page.keyboard.press("c")
    page.keyboard.type("a new <b>label</b>")
    page.keyboard.press("Enter")
    until(lambda: "2 decisions, 1 label corrected" in status())
    page.keyboard.press("u")
    until(lambda: "1 decision, 0 labels corrected" in status() and "row 8 of" in status())
    page.keyboard.press("c")
    page.keyboard.type("noise & <b>hiss</b>")
    page.keyboard.press("Enter")
    until(lambda: "2 decisions, 1 label corrected" in status())
    assert "→ noise & <b>hiss</b>" in live.locator("tr[data-do]").nth(7).inner_text()
    before = (folder/"labels.csv").read_bytes()
    page.keyboard.press("s")
    until(lambda: "saved: labels-corrected.csv" in status())
    if shots: page.screenshot(path=f"{shots}/board-light.png")
    rows = list(csv.DictReader((folder/"labels-corrected.csv").open()))
    assert (folder/"labels.csv").read_bytes() == before and len(rows) == 5000
    assert (rows[7]["prediction"], rows[7]["old_label"], rows[7]["new_label"]) == ("noise & <b>hiss</b>", "siren", "noise & <b>hiss</b>")
    assert rows[0]["old_label"] == rows[0]["new_label"] == rows[0]["prediction"] and rows[0]["decided_at"] and not rows[1]["decided_at"]
    assert page.locator(".jp-Notebook .jp-CodeCell").count() == 2, "keys do nothing to the notebook"

    # both themes
    texts = ".jupyter-widgets.mdl-board :is(td, th, button, kbd, [role=status] b, td span, .mdl-keys)"
    assert contrast(page, texts) >= 4.5
    page.get_by_role("menuitem", name="View", exact=True).click()
    page.get_by_role("menuitem", name=re.compile("^Activate Command Palette")).click()
    page.keyboard.type("JupyterLab Dark")
    page.locator(".lm-CommandPalette-item", has_text="JupyterLab Dark").first.wait_for()
    page.keyboard.press("Enter")
    until(lambda: page.locator("body[data-jp-theme-light=false]").count())
    time.sleep(2) # for the style sheet
    if shots: page.screenshot(path=f"{shots}/board-dark.png")
    assert contrast(page, texts) >= 4.5

    # train again
    nb.click("Train again")
    until(lambda: (folder/"run-2"/"final").exists(), seconds=300)
    assert json.loads((folder/"run-2"/"config.json").read_text())["train_dataset"] == ["labels-corrected.csv"]
    until(lambda: "Training run-2" in nb.text())

    # what is saved
    until(lambda: "ReviewBoard of labels.csv" in (page.keyboard.press("Control+s") or (lab[1]/path).read_text()) and "2 decisions" in (lab[1]/path).read_text())
    stored = [o["data"]["text/html"] for c in json.loads((lab[1]/path).read_text())["cells"] for o in c["outputs"] if "text/html" in o.get("data", {})]
    shown = "".join(next("".join(h) for h in stored if "mdl-rows" in "".join(h)))
    assert shown.count("<audio") == 10 and "siren answered as" in shown and EVIL not in shown
    other = browser.new_page()
    other.set_content(f"<body>{shown}</body>")
    assert other.locator("tr").count() > 10 and "noise & <b>hiss</b>" in other.inner_text("body")
    assert not page.locator(errors).count()


# --- Without a browser

@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answers = make_sounds(".", 24)
    lines = answers.read_text().splitlines()
    lines[5] = lines[5].split(",")[0] + ",siren"
    (tmp_path/"labels.csv").write_text("\n".join(lines) + "\n")
    return "labels.csv", answers


def test_decisions_are_continued(made):
    first = Corrections(*made)
    for n, label in [(4, "noise"), (1, first.label(1)), (4, "chord")]: first.decide(n, label)
    assert (first.undo(), first.label(4), first.corrected(), first.unsaved) == (4, "noise", 1, 4)
    path = first.save()
    again = Corrections(*made)
    assert again.decisions == first.decisions and again.path == path and not again.unsaved
    assert [again.undo(), again.history] == [None, []]
    path.write_text(path.read_text().replace("siren", "other"))
    with pytest.raises(InputError, match="not a corrected"): Corrections(*made)
    with pytest.raises(InputError, match="replace its own input"): Corrections(*made, output=made[0])


def test_answers_of_a_review(made, tmp_path):
    rows = list(csv.DictReader(open("labels.csv")))
    with open("review.csv", "w") as f:
        out = csv.writer(f)
        out.writerow("rank line audio label probability suggestion suggestion_probability doubtful".split())
        for i, r in enumerate(rows): out.writerow([24 - i, i + 2, r["audio"], r["prediction"], .01, "noise", .9, "true"])
    board = ReviewBoard("labels.csv", "review.csv")
    assert board.order == "most doubtful label" and board.shown == list(range(23, -1, -1))
    assert board.rows.rows[0].loss == pytest.approx(4.605, abs=.001) and board.rows.rows[0].answer == "noise"
    board.act("take")
    assert board.rows.label(23) == "noise" and board.at == 1
    board.act("undo")
    board.act("undo")
    assert board.note == "nothing to undo" and board.at == 0
    board.act("correct  ")
    assert "cannot be empty" in board.note
    board.act("train")
    assert "run folder of the last training" in board.note
    text = (tmp_path/"labels.csv").read_text()
    (tmp_path/"labels.csv").write_text(text.replace(rows[3]["prediction"], "changed"))
    with pytest.raises(InputError, match="another label now; review it again"): ReviewBoard("labels.csv", "review.csv")


def test_a_saved_board_is_in_color_and_has_no_buttons(made):
    "JupyterLab drops other colors than these and style sheets from notebooks that somebody else has run, and nothing would take a click"
    board = ReviewBoard(*made)
    shown = board._repr_html_()
    assert "<button" not in shown and "background:rgba(44,160,44,0.4" in shown and "light-dark" not in shown.partition("<tr data-do")[0]
    assert "<button data-do" in board.picture()
    assert all("text-align:left" in cell for cell in re.findall("<t[dh][^>]*>", board.table(3.)))


def test_only_columns_with_values_are_shown(made):
    def head(board): return re.findall("<th[^>]*>(.*?)</th>", board.table())
    assert head(ReviewBoard("labels.csv")) == ["line", "clip", "label", "decision"]
    assert head(ReviewBoard(*made)) == ["line", "clip", "label", "answer", "edits", "decision"]


def test_other_files(made):
    "Without answers, of texts, and with clips that are not there"
    board = ReviewBoard("labels.csv")
    assert board.rows.orders() == ["order of the file"] and not board.picture() and "<table" in board._repr_html_()
    with open("texts.jsonl", "w") as f:
        for i in range(30): f.write(json.dumps(dict(question=f"Is it <i>{i}</i>?", answer=f"<b>{i % 3}</b>", audio="gone.wav" if i==3 else [])) + "\n")
    board = ReviewBoard("texts.jsonl")
    shown = board._repr_html_()
    assert "<b>0</b>" not in shown and "&lt;b&gt;0" in shown and "no such file" in shown
    board.act("correct yes")
    board.act("save")
    saved = [json.loads(line) for line in open("texts-corrected.jsonl")]
    assert len(saved) == 30 and saved[0]["new_label"] == "yes" and Corrections("texts.jsonl").label(0) == "yes"
