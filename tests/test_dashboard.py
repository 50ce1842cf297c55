"Dashboards without a browser: what they remember, how they die, and what they cost"
import base64
import contextlib
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from html import escape
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from matplotlib.figure import Figure
from transformers import TrainerCallback
from waiting import until

from mdl_nbdev.base import settings
from mdl_nbdev.base.command_line import from_args, read_config
from mdl_nbdev.base.curves import Curve
from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.options import required_options
from mdl_nbdev.base.settings import CheckSettings, InferSettings, TrainSettings
from mdl_nbdev.base.status import STATUS_BYTES, RunStatus, read_status
from mdl_nbdev.base.status import phase as phase_of_run
from mdl_nbdev.cli.background import warnings_noted
from mdl_nbdev.cli.charts import COLOURS, GREEN, INK, PAPER, RED, Axes, ChartLook, chart
from mdl_nbdev.cli.demo import plot_answer
from mdl_nbdev.cli.form import RUNS, SettingsForm, form_groups
from mdl_nbdev.cli.inference import start_inference
from mdl_nbdev.cli.live import Live
from mdl_nbdev.cli.training import TrainFeed, TrainRun, start_training
from mdl_nbdev.cli.view import Pace, View, marked_answer, small_player
from mdl_nbdev.cli.watch import TrainView, watch
from mdl_nbdev.data.metrics import score
from mdl_nbdev.data.rows import BadRow, bad_rows_error, stored_error
from mdl_nbdev.data.sounds import make_sounds
from mdl_nbdev.infer.run import infer, reference_mark
from mdl_nbdev.train.report import TrainReport
from mdl_nbdev.train.run import train
from mdl_nbdev.train.samples import SampleAnswers, read_samples

root = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def sounds(tmp_path_factory): return make_sounds(tmp_path_factory.mktemp("sounds"), 40, seed=1)


def train_settings(sounds, out, **kwargs):
    given = dict(lr=2e-3, batch_size=4, max_steps=12, eval_dataset=sounds, eval_steps=6, logging_steps=2, save_steps=100, gradient_checkpointing=False) | kwargs
    return TrainSettings(train_dataset=sounds, base_dir=sounds.parent, output=out, model_name="tiny", **given)


def infer_settings(sounds, out, **kwargs):
    return InferSettings(input=sounds, base_dir=sounds.parent, output=out, model_name="tiny", batch_size=1, max_new_tokens=4, **kwargs)


def test_curve_is_bounded_and_loses_no_spike():
    c, start = Curve(), time.process_time()
    for i in range(300_000): c.add(i, 1000. if i == 123_456 else i % 7)
    assert time.process_time() - start < 5
    assert len(c.buckets) < 300 and sum(b.count for b in c.buckets) == 300_000
    assert max(h for _, _, h in c.band) == 1000 and min(low for _, low, _ in c.band) == 0
    assert c.line[0][0] < 2000 and c.line[-1][0] > 297_000
    assert sum(b.total for b in c.buckets) == sum(i % 7 for i in range(300_000)) + 1000 - 123_456 % 7


@pytest.mark.parametrize("n", [0, 1, 2, 149, 150, 299, 300, 301, 1000])
def test_curve_of_any_length(n):
    c = Curve()
    for i in range(n): c.add(i, float(i))
    assert sum(b.count for b in c.buckets) == n
    assert all(a.last < b.first for a, b in zip(c.buckets, c.buckets[1:])), "in order, without overlap"


@pytest.mark.parametrize("ys", [[1.], [0., 0.], [-1., 1.], [1e-12, 1e12], [5., 5., 5.], [math.nan], [math.inf, 2.], [1e300, 1e-300], []])
@pytest.mark.parametrize("log", [False, True])
def test_chart_of_any_values(ys, log):
    c = Curve()
    for i, y in enumerate(ys): c.add(i*10, y)
    page = chart({"eval <loss>": c, "empty": Curve()}, "a & b", log=log)
    assert page.count("<svg") == 1 and "nan" not in page and "inf" not in page and "<loss>" not in page and "a & b" not in page


def test_a_part_of_a_long_curve_is_finer():
    c = Curve()
    for i in range(100_000): c.add(i, 1000. if i == 70_000 else 1.)
    part = c.between(69_500, 70_500)
    assert part.size < c.size/5 and len(part.buckets) > 10 and max(b.high for b in part.buckets) == 1000
    assert sum(b.count for b in c.between(0, math.inf).buckets) == 100_000 and len(c.between(0, math.inf).buckets) <= 300
    assert not c.between(200_000, math.inf).buckets


@pytest.mark.parametrize("n", [1, 2, 7, 300, 5000])
def test_a_smooth_curve_is_a_mean(n):
    c = Curve()
    for i in range(n): c.add(i, float(i))
    smooth = c.smoothed(100)
    assert len(smooth.buckets) == len(c.buckets) and smooth.latest[0] == n - 1
    expected = [i for i in range(n) if i > n - 1 - 100]
    assert smooth.latest[1] == pytest.approx(sum(expected)/len(expected), abs=c.size)


def contrast(a, b):
    "As WCAG defines it"
    def luminance(colour):
        parts = [int(colour[i:i + 2], 16)/255 for i in (1, 3, 5)]
        return sum(w*(p/12.92 if p <= .04045 else ((p + .055)/1.055)**2.4) for w, p in zip((.2126, .7152, .0722), parts))
    dark, light = sorted([luminance(a), luminance(b)])
    return (light + .05)/(dark + .05)


@pytest.mark.parametrize("pages", [PAPER, ("#f8fafc", "#222832")], ids=["JupyterLab", "site"])
def test_colours_are_legible_on_light_and_dark_pages(pages):
    for colour in [INK, RED, *COLOURS]: assert min(map(contrast, colour, pages)) >= 4.5


def made_up_run(steps=300, phase="training"):
    view = TrainView(Path("runs/a"), 1, steps)
    view.phase = phase
    for step in range(1, steps + 1):
        view.add(dict(step=step, time=float(step), epoch=step/steps, loss=2.31 - .0063*step, loss_a=2., learning_rate=1e-4, samples_per_second=9.))
        if step % 100 == 0: view.add(dict(step=step, time=float(step), eval_loss=3 - step/200))
    return view


def test_a_chart_is_described():
    "In its live form and in the notebook's picture, and zoomed in as well"
    view = made_up_run()
    expected = "loss from 2.3037 at step 1 to 0.4200 at step 300; eval loss from 2.5000 at step 100 to 1.5000 at step 300"
    assert f'role="img" aria-label="loss per token in nats, log scale: {expected}' in view.curves() and f"log scale: {expected}" in view._repr_html_()
    assert view._repr_html_().count("<img alt=") == 3 and 'alt="learning rate 0.0001' not in view._repr_html_()
    view.look = ChartLook(log=False, first="step 100", last="1,50")
    assert 'aria-label="loss per token in nats: loss from 1.6800 at step 100 to 1.3650 at step 150; eval loss 2.5000 at step 100' in view.curves()
    view.look.first = "1000"
    assert view.curves().count("<svg") == 0 and "no values at these steps" in view.curves()


def test_a_number_has_one_value():
    "Raw and smoothed ones have different names, and what a chart says stands nowhere else"
    view = made_up_run()
    view.look.smoothing = .1
    page = ''.join(getattr(view, part)() for part in view.parts)
    texts = [t for t in re.findall(r"<(?:div|/span)> ?([^<]*)", page) if t.startswith(("loss", "eval loss"))]
    assert texts == ["loss per token in nats, log scale", "loss 0.4200", "loss, mean of 30 steps 0.5114", "eval loss 1.5000", "loss a 2.0000", "loss a, mean of 30 steps 2.0000"]
    assert ">loss<" not in page and "best eval loss" in page
    view.add(dict(step=301, time=301., loss=.1))
    assert "eval loss 1.5000 at step 300" in view.curves(), "a value that is older than the others says so"


def test_rows_before_torch(sounds, tmp_path):
    "While torch is imported, the dashboard of a fresh process shows what the model will learn from; the curves take its place"
    code = f"""import os, sys
from mdl_nbdev import TrainSettings, start_training
class Look:
    def __getattr__(self, name): return (lambda *_, **__: None) if name.startswith('on_') else object.__getattribute__(self, name)
    def on_rows(self, training):
        page = run.view.curves()
        run.view.add(dict(step=1, loss=2.))
        print(page.count('<audio'), 'carries loss' in page, 'torch' in sys.modules, '<audio' in run.view.curves(), flush=True)
        os._exit(0)
s = TrainSettings(train_dataset={str(sounds)!r}, base_dir={str(sounds.parent)!r}, output='run', model_name='tiny')
run = start_training(s, [Look()])
run.wait()"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | dict(MDL_CACHE=str(tmp_path/"cache")), capture_output=True, text=True)
    assert result.stdout.split() == ["2", "True", "False", "False"], result.stderr


def test_values_under_the_pointer():
    view = made_up_run(20)
    for step in range(1, 21): assert f"step {step}</tspan>" in view.curves() and f"loss {2.31 - .0063*step:.4f}" in view.curves()
    assert "mdl-hover" not in base64.b64decode(re.search("base64,(.*?)\"", view._repr_html_())[1]).decode(), "an image feels no pointer"
    view.look.table = True
    assert "<td" in view.curves() and view.curves().count("<tr>") == 21
    long = made_up_run(3000)
    page = re.sub(r'<tspan class="range">(.*?)</tspan>', r"\1", long.curves()) # narrow pages leave these out
    assert re.search(r"steps [\d,]+ to [\d,]+: mean \(lowest to highest\)</tspan><tspan[^>]*>loss -?[\d.]+ \(-?[\d.]+ to -?[\d.]+\)", page), "the mean and the range of many steps"
    assert page != long.curves()


@pytest.mark.parametrize("last", [5, 97, 1200, 2500, 3000, 10_000, 61_000, 100_000, 1_000_000])
def test_numbers_of_steps_do_not_touch(last):
    "In the large text of narrow pages, whose digits are .58 of its size wide"
    c = Curve()
    for step in (1, last): c.add(step, float(step))
    axes = Axes([c], 440, 190)
    widths = [.58*19.5*len(f"{v:,.0f}") for v in axes.x_ticks]
    centres = [min(axes.x(v), 440 - w/2) for v, w in zip(axes.x_ticks, widths)]
    assert len(centres) > 1 and all(a + v/2 < b - w/2 for a, v, b, w in zip(centres, widths, centres[1:], widths[1:]))


@pytest.mark.parametrize("curve", [lambda i: 3*math.exp(-i/30) + .3, lambda i: 3 - 3*math.exp(-i/30), lambda i: abs(i - 40)/20 + .1], ids=["falling", "rising", "falling, then rising"])
def test_the_box_at_the_pointer_hides_no_curve(curve):
    c = Curve()
    for i in range(80): c.add(i, curve(i))
    page = chart({"loss": c})
    points = [[float(v) for v in p.split(",")] for p in re.search('<polyline points="(.*?)"', page)[1].split()]
    boxes = re.findall(r'<path d="M([\d.]+) [^<]*<rect x="(\d+)" y="(\d+)" style="--full:(\d+);.*?height:([\d.]+)em;(.*?)" class="box"', page)
    assert len(boxes) > 30
    def hidden(left, top, width, height): return [p for p in points if left + 1 < p[0] < left + width - 1 and top < p[1] < top + height]
    for pointer, x, y, chars, em, up in boxes:
        pointer, left, top, height, width = float(pointer), int(x), int(y), 12*float(em), 12*(.54*int(chars) + 1)
        assert left >= pointer or left + width <= pointer, "beside the pointer"
        wide = 10.5*int(chars) + 20 # with the large text of narrow pages
        corners = [(x, y) for x in (pointer + 8, pointer - 8 - wide) for y in (10, 164 - height) if x > 0 and x + wide < 432]
        assert not hidden(left, top - height if up else top, width, height) or all(hidden(*c, wide, height) for c in corners)


@pytest.mark.parametrize("phase, waits", [("converting", True), ("starting", True), ("training", True), ("failed", False), ("stopped", False), ("no longer running", False)])
def test_no_empty_charts(phase, waits):
    view = TrainView(Path("runs/a"), 1)
    view.phase = phase
    assert "<svg" not in view.curves() and ("waiting for the first measurement" in view.curves()) == waits
    view.add(dict(step=1, loss=math.nan))
    assert not view.explorable() and "<svg" not in view.curves()
    view.add(dict(step=2, loss=1.))
    assert view.explorable() and view.curves().count("<svg") == 1, "what is not measured has no chart"


def test_controls_draw_the_charts_again():
    live = Live(made_up_run(phase="finished"))
    live.make_widgets()
    assert live.interactive(), "also after the run"
    controls = {c.description: c for c in live.controls.children}
    assert all(controls), "each has a name"
    controls["log scale"].value = False
    assert "log scale" not in live.boxes["curves"].value
    controls["smoothing"].value = .05
    assert "mean of 15 steps" in live.boxes["curves"].value and "mean of 15 steps" in live._repr_html_(), "what is saved is what was on the screen"
    controls["from step"].value = "200"
    assert "at step 200 to" in live.boxes["curves"].value
    live.view.dead = "ink"
    assert not live.interactive()


def test_a_hundred_thousand_steps_are_cheap():
    view, start = TrainView(Path("runs/long"), 2), time.thread_time()
    for step in range(1, 100_001): view.add(dict(step=step, time=step/10, epoch=step/50_000, loss=1/step, learning_rate=1e-4, samples_per_second=9.))
    assert (time.thread_time() - start)/100_000 < 1e-4, "a tenth of a millisecond a step"
    start = time.thread_time()
    for _ in range(10): page = view._repr_html_()
    assert (time.thread_time() - start)/10 < .05 and len(page) < 60_000
    assert "step 100,000 of 100,000" in page


def test_pace():
    p = Pace()
    assert p.text(10) == "0:00 elapsed" and p.rate == 0
    p.at(50, 100.)
    assert p.text(100) == "0:00 elapsed"
    p.at(60, 3710.)
    assert p.text(100) == "1:00:10 elapsed, 4:00:40 left" and p.text(None) == "1:00:10 elapsed"


commands = [getattr(settings, f"{name}Settings") for name in ("Check", "Convert", "Train", "Infer", "Merge", "Eval", "Demo")]
needed = dict(input="in put.csv", output="o'ut", adapter="a", reference="r.csv", train_dataset="a,b.csv", model_name="tiny")


@pytest.mark.parametrize("cls", commands, ids=lambda c: c.__name__)
def test_form_says_the_same_as_command_and_file(cls, tmp_path):
    names = {f.name for f in fields(cls)}
    form = SettingsForm(cls, **{k: v for k, v in needed.items() if k in names})
    assert not form.missing and not form.faults
    assert from_args(cls, form.argv()) == form.settings
    (tmp_path/"c.yaml").write_text(form.yaml())
    assert cls(**(read_config(tmp_path/"c.yaml", cls) if form.yaml() else {})) == form.settings
    form.widget()
    assert set(form.boxes) == names
    assert {n for n in names if n in required_options(cls)} <= set(next(iter(form_groups(cls).values()))), "what must be given comes first"


values = dict(lr="3e-5", num_epochs="2.5", warmup_steps="0.1", eval_strategy="steps,epoch", task_weights="a=2,b=.5", bf16="false", merge_lora=False, lora_init="pissa",
              quantization="4bit", resume_from_checkpoint="true", eval_dataset="e1.csv", lora_target_modules=r".*\.(q|k)_proj", system_prompt='say "hi"\n$x')


@pytest.mark.parametrize("name", values)
def test_typed_values(name, tmp_path):
    form = SettingsForm(TrainSettings, train_dataset="a.csv", output="o", **{name: values[name]})
    assert not form.faults and name in form.values
    assert from_args(TrainSettings, form.argv()) == form.settings
    (tmp_path/"c.yaml").write_text(form.yaml())
    assert TrainSettings(**read_config(tmp_path/"c.yaml", TrainSettings)) == form.settings
    form.set(name, "")
    assert name not in form.values


@pytest.mark.parametrize("name,value,says", [("lr", "fast", "a number"), ("lora_rank", "0", "at least 1"), ("eval_strategy", "days", "steps|epoch"), ("eval_steps", "1.5", "whole number")])
def test_faults_are_told_while_typing(name, value, says):
    form = SettingsForm(TrainSettings, train_dataset="a.csv", output="o")
    form.widget()
    form.boxes[name].value = value
    assert says in form.faults[name] and says in form.bottom.value and f"<b>Wrong:</b> {escape(form.faults[name])}" in form._repr_html_() and form.button.disabled
    assert form.faults[name].startswith(name), "spelt as Python takes it"
    form.boxes[name].value = ""
    assert not form.faults and "mdl_train --train-dataset a.csv" in form.bottom.value and not form.button.disabled


def test_the_first_group_says_where_things_are():
    names = {cls: list(form_groups(cls)["Data, model and output"]) for cls in commands}
    assert set(names[TrainSettings]) == {"train_dataset", "eval_dataset", "base_dir", "model_name", "adapter", "chat_template", "output"}
    assert set(names[InferSettings]) == {"input", "base_dir", "model_name", "adapter", "chat_template", "output"}
    assert all("output" in names[cls] for cls in commands if cls is not CheckSettings)


def test_a_menu_begins_with_a_valid_choice():
    form = SettingsForm(TrainSettings, train_dataset="a.csv", output="o", lora_init="none", bf16="perhaps")
    form.widget()
    assert form.boxes["lora_init"].value == "default" and form.boxes["bf16"].value is None
    assert form.faults.keys() == {"lora_init", "bf16"} and "perhaps" in form.bottom.value


def test_a_form_reads_command_lines(tmp_path):
    "Those that it writes and those that people paste; what is wrong is said in its field, or where it was pasted"
    form, other = SettingsForm(TrainSettings, lr=1, model_name="tiny"), SettingsForm(TrainSettings, train_dataset="a,b.csv", output="o'ut", eval_strategy="steps,epoch", user_prompt='say "hi"', bf16=False)
    form.widget()
    form.read_command(other.command())
    assert form.settings == other.settings and form.values == other.values, "what the command line leaves out is at its default"
    (tmp_path/"c.yaml").write_text("lr: 0.01\nlora_rank: 0\n")
    form.read_command(f"!CUDA_VISIBLE_DEVICES=0 accelerate launch /bin/mdl_train --config {tmp_path}/c.yaml \\\n --lora-init none --output o")
    form.refresh()
    assert form.values == dict(lr=.01, lora_rank=0, lora_init="none", output=Path("o")) and form.faults.keys() == {"lora_rank", "lora_init"}
    assert form.boxes["lora_rank"].value == "0" and form.boxes["lora_init"].value == "default" and form.boxes["model_name"].value == ""
    for line, says in {"mdl_infer a.csv": "mdl_infer", "python train.py": "python", "--lora-rnak 3": "did you mean --lora-rank", "mdl_train --output 'a": "complete", "mdl_train a.csv": "a.csv"}.items():
        with pytest.raises(InputError, match=says): form.read_command(line)
    assert form.values["lr"] == .01, "a command line that cannot be read changes nothing"


def test_a_form_spells_values_as_python_does():
    f = SettingsForm(TrainSettings, merge_lora="false")
    page = f._repr_html_()
    assert ">None</td>" in page and "<b>False</b>" in page and "None: no limit" in page and not re.search(r"\bnull\b", page)
    assert [label for label, _ in f.menu("bf16")] == ["None", "True", "False"]
    f.set("seq_length", "None")
    assert not f.faults and "seq_length" not in f.values
    assert "max-height" in f.verdict(buttons=True) and "max-height" not in f.verdict() # a saved one shows all of its file


def test_a_saved_dashboard_keeps_its_colors_in_a_viewer_that_drops_light_dark():
    "As JupyterLab does in notebooks that somebody else has run"
    view = View("Training")
    view.phase = "finished"
    view.note("no answer", True)
    page = view.headline("step 3 of 3", 1, {}) + view.remarks() + marked_answer("rain", "rain") + marked_answer("", "rain")
    cleaned = re.sub(r"[a-z]+:light-dark\([^)]*\)", "", page)
    assert [cleaned.count(color.light) for color in (GREEN, RED)] == [3, 2]


def test_a_saved_player_keeps_its_width_in_a_viewer_that_drops_functions(sounds):
    style = re.search('style="([^"]*)', small_player(str(next(sounds.parent.rglob("*.wav")))))[1]
    assert "width:210px" in style and "(" not in style


@pytest.mark.parametrize("width,look", [(390, "block"), (1000, "table-cell")])
def test_the_picture_of_a_form_fits_its_page(browser, width, look):
    page = browser.new_page(viewport=dict(width=width, height=844))
    form = SettingsForm(TrainSettings, train_dataset="clips/train.csv", output="runs/first")
    page.set_content(f"<body style='margin:0'>{form._repr_html_()}")
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("getComputedStyle(document.querySelector('td')).display") == look
    page.close()


def test_a_form_warns(sounds, tmp_path, monkeypatch):
    "Of valid values that cannot be meant; the command may be for another machine, so it is shown all the same"
    monkeypatch.chdir(tmp_path)
    Path("labels.csv").write_text("file,label\na.wav,a\n")
    Path("run/final").mkdir(parents=True)
    Path("run/metrics.jsonl").write_text("")
    form = SettingsForm(TrainSettings, train_dataset=sounds, base_dir=sounds.parent, output="o", model_name="tiny", lr=2e-3)
    assert form.warnings == {}
    wrong = dict(train_dataset={"labels.csv": "rename 'file' to 'audio'", "none.csv": "No such file"}, base_dir={"run": "000", "nowhere": "no such folder"}, lr={.5: "diverge", 1e-12: "learn"}, adapter={"run": "no LoRA adapter"},
                 model_name={"./tiny": "no such folder", "tny": "built-in", "run": "its model is run/final", "owner/name-w4a16-gptq": "cannot be trained"}, output={"run": "resume"}, chat_template={"none.jinja": "No such file"})
    for name, values in wrong.items():
        for value, says in values.items():
            warned = SettingsForm(TrainSettings, **form.values | {name: value})
            assert not warned.faults and any(says in w for w in warned.warnings.values()), (name, value, warned.warnings)
            assert "--" not in "".join(warned.warnings.values()), "spelt as Python takes it"
            assert "<b>Check:</b>" in warned.verdict() and "mdl_train" in warned.verdict()
    assert not SettingsForm(InferSettings, input="labels.csv", output="o", model_name="owner/name-w4a16-gptq").warnings.keys() - {"input"}


def test_the_button_starts_what_the_form_says(monkeypatch):
    started = []
    monkeypatch.setitem(RUNS, TrainSettings, ("Train", lambda s: started.append(s) or SimpleNamespace(running=True)))
    form = SettingsForm(TrainSettings, train_dataset="a.csv")
    form.widget()
    assert form.button.disabled
    form.boxes["output"].value = "o"
    assert not form.button.disabled
    form.button.click()
    form.button.click()
    assert started == [form.settings], "a second click while it is running starts nothing"


def test_a_required_field_is_missed():
    form = SettingsForm(CheckSettings)
    assert form.missing == ["input"] and "input is required" in form.verdict()
    with pytest.raises(InputError): form.set("inputs", "x")


def test_stop_save_and_resume(sounds, tmp_path):
    s = train_settings(sounds, tmp_path/"run", max_steps=400, eval_steps=400)
    run = start_training(s)
    until(lambda: run.view.shown)
    run.save()
    until(lambda: list((tmp_path/"run").glob("checkpoint-*")))
    assert run.running
    run.stop()
    report = run.wait()
    assert not report.whole and report.stopped == "you" and report.checkpoint.is_dir() and run.view.phase == "stopped"
    assert "Stopped by you" in run._repr_html_() and report.checkpoint.name in run._repr_html_()
    again = start_training(replace(s, resume_from_checkpoint=True))
    until(lambda: again.view.pace.now)
    assert again.view.pace.start[0] == report.steps, "the time to go is counted from where it went on"
    assert len(again.view.shown["loss"].buckets) >= report.steps//2, "with the curve so far"
    again.stop()
    assert again.wait().steps > report.steps


def test_training_is_the_same_with_a_dashboard(sounds, tmp_path):
    plain = train(train_settings(sounds, tmp_path/"plain"))
    seen = start_training(train_settings(sounds, tmp_path/"seen")).wait()
    losses = lambda r: [(m["step"], m.get("loss"), m.get("eval_loss")) for m in r.metrics]
    assert losses(plain) == losses(seen)


def test_samples(sounds, tmp_path):
    train(train_settings(sounds, tmp_path/"run", sample_answers=3))
    samples = read_samples(tmp_path/"run"/"samples.jsonl")
    assert [a["step"] for a in samples] == [6]*3 + [12]*3
    rows = sounds.read_text().splitlines()[1:]
    assert all(a["reference"] == rows[a["row"]].split(",")[1] for a in samples)
    assert all((tmp_path/"run"/c).stat().st_size > 1000 for a in samples for c in a["clips"])
    seen = watch(tmp_path/"run")._repr_html_()
    assert "Answers at step 12" in seen and seen.count("<audio") == 3
    assert "peak memory" in seen and "padding" in seen, "all that the run's own dashboard shows"
    train(train_settings(sounds, tmp_path/"none", sample_answers=0))
    assert not (tmp_path/"none"/"samples.jsonl").exists()


def test_samples_of_a_resumed_run(sounds, tmp_path):
    "What was answered after the checkpoint is answered again, once"
    whole = train_settings(sounds, tmp_path/"run", save_steps=6)
    train(whole)
    expected = read_samples(tmp_path/"run"/"samples.jsonl")
    shutil.rmtree(tmp_path/"run"/"final")
    shutil.rmtree(tmp_path/"run"/"checkpoint-12")
    train(replace(whole, resume_from_checkpoint=True))
    assert read_samples(tmp_path/"run"/"samples.jsonl") == expected


def test_a_conversation_of_several_turns(tmp_path):
    view = TrainView(tmp_path, 1)
    turns = [dict(role="user", text="<one>"), dict(role="assistant", text="two")]
    view.samples = [dict(step=3, row=0, task="a", question="three", reference="four", answer="5", clips=[], system="be & short", turns=turns)]
    page = view.answers()
    assert "system: be &amp; short" in page and "user: &lt;one&gt;" in page and "assistant: two" in page and "✘" in page


@pytest.mark.parametrize("prediction, mark", [("cafe\u0301", "✔"), (" caf\u00e9\n", "✔"), ("cafe", "✘"), ("Caf\u00e9", "✘")])
def test_marks_agree_with_the_metrics(prediction, mark, sounds):
    "An accented letter may be one character or two, everywhere"
    reference, ax = "caf\u00e9", Figure().subplots()
    row = SimpleNamespace(reference=reference, prediction=prediction, conversation=SimpleNamespace(clips=[next(sounds.parent.rglob("*.wav"))]))
    assert mark in marked_answer(prediction, reference) and reference_mark(row).startswith(mark)
    plot_answer(ax, row)
    correct = mark == "✔"
    assert ("✓" in ax.get_title()) == correct and score([reference], [prediction]).correct.tolist() == [correct]


@pytest.mark.parametrize("propagates", [True, False])
def test_a_warning_of_transformers_is_noted_once(propagates, monkeypatch):
    logger, view = logging.getLogger("transformers"), View("A run")
    monkeypatch.setattr(logger, "propagate", propagates)
    with warnings_noted(view):
        for _ in range(2): logger.warning("a key is missing")
    assert [text for _, text, _ in view.notes] == ["a key is missing"]*2


def test_a_stopped_demo_says_so(tmp_path, monkeypatch):
    from mdl_nbdev.cli import demo
    monkeypatch.setattr(demo, "answer_clips", lambda s: (None, None))
    monkeypatch.setattr("mdl_nbdev.train.run.train", lambda s: TrainReport(s.output, 3, 1, 2, stopped="SIGTERM", whole=False))
    with pytest.raises(InputError, match="stopped by SIGTERM"): demo.demo(settings.DemoSettings(output=tmp_path/"demo"), clips=2, held_out=2)


class Boom(Exception): pass
def boom(*args, **kwargs): raise Boom("no paper")


@pytest.mark.parametrize("what", ["add", "note", "curves"])
def test_a_dashboard_that_dies_leaves_the_run_alone(what, sounds, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(View if what == "note" else TrainView, what, boom)
    run = start_training(train_settings(sounds, tmp_path/"run"))
    if what == "curves": run.snapshot()
    report = run.wait()
    assert report.whole and report.final.is_dir()
    assert capfd.readouterr().err.count("switched itself off") == 1
    assert "no paper" in run._repr_html_() and str(report.final) in run._repr_html_()


def test_answers_that_fail_leave_the_run_alone(sounds, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(SampleAnswers, "answers", boom)
    run = start_training(train_settings(sounds, tmp_path/"run"))
    assert run.wait().whole and not run.view.dead and "no more sample answers, the run goes on: Boom: no paper" in run._repr_html_()
    assert train(train_settings(sounds, tmp_path/"again")).whole
    assert caplog.text.count("no more sample answers") == 2


def test_an_interrupt_ends_the_waiting_alone(sounds, tmp_path, monkeypatch, capfd):
    run = start_training(train_settings(sounds, tmp_path/"run"))
    def interrupted(*args): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(run.thread, "join", interrupted)
        with pytest.raises(KeyboardInterrupt): run.wait()
    assert run.running and "continues in the background" in capfd.readouterr().err
    assert run.wait().whole


def test_bad_settings_reach_the_notebook(sounds, tmp_path):
    run = start_training(train_settings(tmp_path/"none.csv", tmp_path/"run"))
    with pytest.raises(InputError, match="none.csv"): run.wait()
    assert run.view.phase == "failed" and "none.csv" in run._repr_html_()


def test_watch_shows_bad_rows_as_their_own_notebook_does(sounds, tmp_path, monkeypatch):
    "Each with its line and a player, the first ten of them; clips are found from other folders too"
    (tmp_path/"here").mkdir()
    soundfile.write(tmp_path/"here"/"a.wav", np.zeros(16000), 16000)
    (tmp_path/"rows.csv").write_text("audio,prediction\n" + "a.wav,\n"*12)
    monkeypatch.chdir(tmp_path/"here")
    run = start_training(replace(train_settings(tmp_path/"rows.csv", tmp_path/"run"), base_dir=Path("."), eval_dataset=[]))
    with pytest.raises(InputError): run.wait()
    shown = str(run.view.details)
    assert shown.count("<audio") == 10 and "prediction is empty" in shown and "... and 2 more" in shown
    monkeypatch.chdir("/")
    seen = watch(tmp_path/"run").view
    assert str(seen.details) == shown and [text for _, text, _ in seen.notes] == [text for _, text, _ in run.view.notes][-1:]
    assert seen.notes[0][1].startswith("12 bad rows. ") and "check() checks them" in seen.notes[0][1]


def test_a_status_with_long_bad_rows_has_its_size(tmp_path):
    rows = [BadRow("rows.csv", i, "é"*900, "clip.wav") for i in range(40)]
    with contextlib.suppress(InputError), RunStatus(tmp_path): raise bad_rows_error(rows, note="And more")
    error = stored_error(read_status(tmp_path))
    assert (tmp_path/"status.json").stat().st_size == STATUS_BYTES
    assert 0 < len(error.rows) < 10 and len(error.rows) + error.more == 40 and error.summary == "40 bad rows. And more"


def test_inference_stops_and_goes_on(sounds, tmp_path):
    infer(infer_settings(sounds, tmp_path/"plain.csv"))
    run = start_inference(infer_settings(sounds, tmp_path/"out.csv"))
    run.stop()
    with pytest.raises(InputError, match="stopped after"): run.wait()
    assert run.view.phase == "stopped" and (tmp_path/"out.csv.part").exists() and list(run.actions()) == ["Continue"]
    report = run.resume().wait()
    assert report.rows == 40 and 0 < report.resumed < 40
    assert (tmp_path/"out.csv").read_bytes() == (tmp_path/"plain.csv").read_bytes()
    assert run.view.counts["rows"] == 40 and "40 of 40 rows" in run._repr_html_()


def test_inference_shows_rejects(sounds, tmp_path):
    bad = sounds.parent/"bad.csv"
    bad.write_text(sounds.read_text() + "none.wav,tone\n")
    run = start_inference(infer_settings(bad, tmp_path/"out.csv"))
    run.wait()
    assert run.view.without == 1 and run.view.counts["rows"] == 41 and "none.wav: no such file" in run._repr_html_()
    page = run._repr_html_()
    assert page.count("with base_dir") == 1 and "--base-dir" not in page, "once on the page, spelt as Python takes it"
    assert f"1 row, listed in {tmp_path/'out.csv'}.rejects.csv" in page and "41 rows in" in page


def test_watch_follows_a_file(tmp_path):
    path = tmp_path/"metrics.jsonl"
    line = lambda step: json.dumps(dict(step=step, loss=1/step, epoch=step/10, time=1000.+step)) + "\n"
    with pytest.raises(InputError, match="no such folder"): watch(tmp_path/"none")
    seen = watch(tmp_path)
    def news():
        seen.next_poll = 0
        seen.poll()
    assert seen.running and "waiting" in seen.view.curves()
    path.write_text(line(10) + line(20)[:9])
    (tmp_path/"config.json").write_text(json.dumps(dict(num_epochs=5, max_steps=None)))
    news()
    assert seen.view.last["step"] == 10 and seen.view.steps == 50
    path.write_text(line(10) + line(20))
    news()
    assert [x for x, _ in seen.view.shown["loss"].line] == [10, 20] and "0:10 elapsed, 0:30 left" in seen._repr_html_()
    new = tmp_path/"new"
    new.write_text(line(10) + line(15))
    os.replace(new, path)
    news()
    assert [x for x, _ in seen.view.shown["loss"].line] == [10, 15], "a resumed run has written its lines anew"
    (tmp_path/"final").mkdir()
    news()
    assert not seen.running and seen.view.phase == "finished"


@pytest.mark.parametrize("phase, alive, shown", [("converting", True, "converting"), ("saving", True, "saving"), ("training", False, "no longer running"),
    ("failed", False, "failed"), ("stopped", False, "stopped"), ("finished", False, "finished")])
def test_watch_says_how_a_run_is(tmp_path, phase, alive, shown):
    "A run that ended has said so; one that stopped writing in between was killed. final/ may be older than either"
    (tmp_path/"final").mkdir()
    status = RunStatus(tmp_path)
    status.set(phase, done=3, total=40, reason="rows.csv:7: empty")
    status.write()
    if not alive: os.utime(tmp_path/"status.json", (time.time() - 3600,)*2)
    seen = watch(tmp_path)
    assert seen.view.phase == shown and f"● {shown}" in seen._repr_html_()
    assert seen.running == (shown not in ("failed", "stopped", "finished"))
    if shown == "failed": assert "rows.csv:7: empty" in seen._repr_html_()
    if shown == "no longer running": assert "while training" in seen._repr_html_()


def test_a_silent_run_is_given_ten_seconds(tmp_path, monkeypatch):
    "Clocks of two machines may differ by less than a minute: what counts is whether the file changes"
    status, now = RunStatus(tmp_path), time.monotonic()
    status.write()
    os.utime(tmp_path/"status.json", (time.time() - 40,)*2)
    seen = watch(tmp_path)
    def after(seconds):
        monkeypatch.setattr(time, "monotonic", lambda: now + seconds)
        seen.poll()
        return seen.view.phase
    assert after(5) == "starting" and after(11) == "no longer running"
    status.write()
    assert after(13) == "starting", "its file system was slow"


@pytest.mark.parametrize("end, phase, reason", [(InputError("t.csv:2: empty"), "failed", "t.csv:2: empty"), (KeyError("x"), "failed", "KeyError: 'x'"),
    (KeyboardInterrupt(), "stopped", "it was interrupted"), (None, "finished", None)])
def test_a_run_says_how_it_ended(tmp_path, end, phase, reason):
    with contextlib.suppress(BaseException), RunStatus(tmp_path), phase_of_run("training"):
        if end: raise end
    found = read_status(tmp_path)
    assert (found["phase"], found.get("reason")) == (phase, reason)
    if end: assert found["during"] == "training"


def test_an_attempt_that_is_refused_leaves_the_status(tmp_path):
    "Until it trains"
    with RunStatus(tmp_path), phase_of_run("training"): pass
    os.utime(tmp_path/"status.json", (1000, 1000))
    before = (tmp_path/"status.json").read_bytes()
    with contextlib.suppress(InputError), RunStatus(tmp_path), phase_of_run("converting"): raise InputError("other rows")
    assert (tmp_path/"status.json").read_bytes() == before and read_status(tmp_path)["beat"] == 1000
    with contextlib.suppress(InputError), RunStatus(tmp_path), phase_of_run("training"): raise InputError("diverged")
    assert read_status(tmp_path)["phase"] == "failed"


def test_a_full_disk_can_still_be_told(tmp_path):
    "The file keeps its size, so no block is needed for the last word"
    status = RunStatus(tmp_path)
    status.write()
    size = (tmp_path/"status.json").stat().st_size
    status.set("failed", reason="checkpoint-20: the disk is full" + "\N{MUSICAL SYMBOL G CLEF}"*1900)
    status.write()
    assert (tmp_path/"status.json").stat().st_size == size and read_status(tmp_path)["phase"] == "failed"


def test_watch_a_run_of_an_earlier_version(tmp_path):
    "It has no status"
    assert watch(tmp_path).view.phase == "starting"
    (tmp_path/"metrics.jsonl").write_text(json.dumps(dict(step=10, loss=1., epoch=1., time=time.time())) + "\n")
    assert watch(tmp_path).view.phase == "training"
    (tmp_path/"final").mkdir()
    assert watch(tmp_path).view.phase == "finished"


def test_a_run_that_is_resumed_beside_its_older_result(sounds, tmp_path):
    "The same with a real run, which first finishes and then trains for longer"
    s = train_settings(sounds, tmp_path/"run", max_steps=4, eval_dataset=[], lr_scheduler_type="constant")
    train(s)
    assert watch(s.output).view.phase == "finished"
    seen = []
    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs): seen.append(watch(s.output).view.phase)
    train(replace(s, max_steps=8, resume_from_checkpoint=True, allow_changes=True), [Look()])
    assert seen == ["training"]*4 and watch(s.output).view.phase == "finished"


class Control:
    "What a trainer hands its callbacks; somebody clicks while the first checkpoint is being asked for"
    should_training_stop = False
    def __init__(self, click): self.click, self.saves = click, 0
    @property
    def should_save(self): return self.saves > 0
    @should_save.setter
    def should_save(self, value):
        self.saves += value
        if self.saves == 1: self.click()


def test_no_click_is_lost(sounds, tmp_path):
    run = TrainRun(train_settings(sounds, tmp_path/"run"))
    feed, control = TrainFeed(run), Control(run.save)
    run.save()
    for _ in range(4): feed.fulfil_requests(control)
    assert control.saves == 2, "each click is one checkpoint"
    assert not control.should_training_stop
    run.stop()
    feed.fulfil_requests(control)
    assert control.saves == 3 and control.should_training_stop


def test_dashboards_replace_progress_bars(sounds, tmp_path, capfd):
    start_inference(infer_settings(sounds, tmp_path/"out.csv")).wait()
    start_training(train_settings(sounds, tmp_path/"run", max_steps=2, eval_dataset=[])).wait()
    printed = capfd.readouterr().err
    assert "training:" not in printed and "answering:" not in printed


def test_no_bar_where_there_is_nothing_to_do(capfd):
    from mdl_nbdev.base.progress import progress_bar
    with progress_bar(0, "checking", "clip"): pass
    assert capfd.readouterr().err==""
    with progress_bar(1, "checking", "clip"): pass
    assert "checking" in capfd.readouterr().err


def test_no_ipywidgets_no_problem(sounds, tmp_path):
    code = f"""import sys
sys.modules['ipywidgets'] = None
sys.path.insert(0, 'tests')
from test_dashboard import *
sounds, out = Path({str(sounds)!r}), Path({str(tmp_path)!r})
run = start_training(train_settings(sounds, out/'run', max_steps=2, eval_steps=2))
assert run.wait().whole and 'finished' in run._repr_html_()
few = out/'few.csv'
few.write_text(''.join(sounds.read_text().splitlines(True)[:4]))
assert infer(replace(infer_settings(few, out/'out.csv'), base_dir=sounds.parent)).rows == 3
print('fine', SettingsForm(CheckSettings, input='x').command())"""
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert "fine mdl_check x" in r.stdout, r.stderr[-2000:]


def test_painting_is_rare_enough(monkeypatch):
    "However fast the news come, drawing them takes less than 2 % of a core, at most ten times a second"
    class Busy(Live):
        running = True
    view = TrainView(Path("runs/busy"), 2, 100_000)
    for step in range(1, 3_000): view.add(dict(step=step, time=step/10, epoch=step/50_000, loss=1/step, loss_a=2/step, eval_loss=3/step, learning_rate=1e-4, samples_per_second=9.))
    live, drawn = Busy(view), []
    head = TrainView.head
    monkeypatch.setattr(TrainView, "head", lambda self: (drawn.append(time.monotonic()), head(self))[1])
    live.make_widgets()
    spent = []
    def painting():
        start = time.thread_time()
        live.paint_until_over()
        spent.append(time.thread_time() - start)
    thread = threading.Thread(target=painting)
    thread.start()
    start = time.monotonic()
    while time.monotonic() < start + 4:
        step += 1
        view.add(dict(step=step, time=step/10, epoch=step/50_000, loss=1/step, learning_rate=1e-4, samples_per_second=9.))
        time.sleep(.002)
    Busy.running = False
    thread.join()
    elapsed = time.monotonic() - start
    assert spent[0]/elapsed < .02
    assert 3 < len(drawn) < 10*elapsed + 4
