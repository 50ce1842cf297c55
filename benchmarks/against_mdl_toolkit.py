"""Compare mdl_nbdev with MDL-Toolkit: whole processes, in turns, on the same clips and the same tiny model

    python benchmarks/against_mdl_toolkit.py --peer-python PATH/TO/VENV/bin/python --out benchmarks/results/against_mdl_toolkit

README.md explains the figures. Without `--peer-python` only mdl_nbdev runs.
"""
import argparse
import csv
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import soundfile as sf

from mdl_nbdev.model.load import load_processor
from mdl_nbdev.model.midashenglm_family import tiny_model
from mdl_nbdev.model.save import save_model

LABELS = ["beep", "chord", "noise", "sweep"]
RATES = [8000, 16000, 44100]
QUESTION, ANSWER_TOKENS = "What sound is this?", 32
PEER, OURS, OUR_TARGETS = "MDL-Toolkit", "mdl_nbdev", "mdl_nbdev, its own LoRA targets"
IN_TWOS = "mdl_nbdev, two clips at a time" # The same steps in less memory
# What the peer adapts by default; ours takes it as --lora-target-modules
PEER_TARGETS = "|".join([r"^audio_encoder\.blocks\.\d+\.attn\.(qkv|proj)$", r"^audio_projector\.net\.(0|2)$",
                         r"^decoder\.model\.layers\.\d+\.(self_attn|mlp)\.(up|gate|down)_proj$"])


def make_clips(folder, n, seconds, batch_size, seed=0):
    """Write `n` clips and `clips.csv`; the first of every `batch_size` rows has the longest length

    The peer's `--max-length` counts the prompt, padded to the batch's longest: so all its batches have room for equally long answers.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    with open(folder/"clips.csv", "w", newline="", encoding="utf-8") as f:
        rows = csv.writer(f)
        rows.writerow(["audio", "user_prompt", "prediction"])
        for i in range(n):
            rate, length = RATES[i % len(RATES)], seconds[1] if i % batch_size == 0 else rng.uniform(*seconds)
            t = np.arange(int(length * rate)) / rate
            wave = 0.3 * np.sin(2 * np.pi * rng.uniform(200, 3000) * t) + 0.05 * rng.standard_normal(len(t))
            sf.write(folder/f"{i:04}.wav", wave, rate, subtype="PCM_16")
            rows.writerow([folder/f"{i:04}.wav", QUESTION, LABELS[i % len(LABELS)]])
    return folder/"clips.csv"


@dataclass
class Run:
    "One process from start to end, its children included"
    seconds: float
    cpu_seconds: float
    peak_bytes: int # Of memory: proportional set size (PSS), so a page that two processes share counts once
    disk_bytes: int # Left in its output and its caches


class MemoryWatch(threading.Thread):
    "The highest PSS of a process tree. Its RSS, which is cheap to read, is read at every look; its PSS only where RSS is near its highest"
    def __init__(self, pid, interval=0.1):
        super().__init__(daemon=True)
        self.process, self.interval, self.over, self.highest, self.peak = psutil.Process(pid), interval, threading.Event(), 0, 0

    def run(self):
        while not self.over.wait(self.interval):
            try:
                tree = [self.process, *self.process.children(recursive=True)]
                rss = sum(p.memory_info().rss for p in tree)
                if rss > 0.98 * self.highest: self.peak = max(self.peak, sum(p.memory_full_info().pss for p in tree))
                self.highest = max(self.highest, rss)
            except psutil.Error: pass # a process ended between two looks


def run(command, sandbox):
    "Run `command` in the new folder `sandbox`, which holds its output and its caches"
    for name in ("tmp", "hf", "cache"): (sandbox/name).mkdir(parents=True)
    env = {**os.environ, "TMPDIR": f"{sandbox}/tmp", "HF_HOME": f"{sandbox}/hf", "XDG_CACHE_HOME": f"{sandbox}/cache", "HF_HUB_OFFLINE": "1"}
    log = sandbox.with_suffix(".log")
    before, start = os.times(), time.perf_counter()
    with open(log, "w") as f:
        process = subprocess.Popen(list(map(str, command)), env=env, cwd=sandbox, stdin=subprocess.DEVNULL, stdout=f, stderr=subprocess.STDOUT)
    watch = MemoryWatch(process.pid)
    watch.start()
    code = process.wait()
    seconds, after = time.perf_counter() - start, os.times()
    watch.over.set()
    watch.join()
    if code: raise SystemExit(f"exit code {code}: {' '.join(map(str, command))}\n{log.read_text()[-4000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    disk = sum(p.stat().st_size for p in sandbox.rglob("*") if p.is_file() and not p.is_symlink())
    return Run(seconds, cpu, watch.peak, disk)


def peer_tool(python):
    "MDL-Toolkit's commands. Its `--max-length` counts the prompt"
    program = python.parent/"mdl-toolkit"
    return {"help": [program, "train", "--help"], "convert": [program, "convert-dataset"], "train": [program, "train"], "infer": [program, "inference"],
            "answer": lambda prompt_tokens: ["--max-length", prompt_tokens + ANSWER_TOKENS]}


def our_tool(*train_options, at_once=None):
    "The commands of mdl_nbdev in this interpreter's environment; training computes `at_once` rows of a batch at a time"
    program = Path(sys.executable).parent
    return {"help": [program/"mdl_train", "--help"], "convert": [program/"mdl_convert"], "train": [program/"mdl_train", *train_options],
            "infer": [program/"mdl_infer"], "answer": lambda prompt_tokens: ["--max-new-tokens", ANSWER_TOKENS], "at_once": at_once}


def save_tiny(folder, seconds):
    "Save the tiny model, its remote code beside it, for both tools; the number of tokens of a prompt about a clip of `seconds`"
    processor = load_processor("tiny")
    save_model(tiny_model(), processor, folder)
    clip, text = {"type": "audio", "audio": np.zeros(int(seconds * 16_000))}, {"type": "text", "text": QUESTION}
    return len(processor.apply_chat_template([{"role": "user", "content": [clip, text]}], tokenize=True, add_generation_prompt=True)[0])


def compare(folder, peer_python, n_clips, seconds, epochs, repeats, batch_size=8, infer_batch_size=32):
    "Every run of every task: {task: {tool: [Run]}}"
    tools = {PEER: peer_tool(peer_python)} if peer_python else {}
    tools[OURS] = our_tool("--lora-target-modules", PEER_TARGETS)
    clips = make_clips(folder/"clips", n_clips, seconds, infer_batch_size)
    prompt_tokens = save_tiny(folder/"model", seconds[1])
    model = ["--model-name", folder/"model"]

    def in_turns(task, commands, keep=False):
        runs = {tool: [] for tool in commands}
        for i in range(repeats):
            for n, (tool, command) in enumerate(commands.items()):
                sandbox = folder/f"{task}-{n}-{i}".replace(" ", "-")
                runs[tool].append(run(command, sandbox))
                print(f"{task:<12}{tool:<32}{runs[tool][-1]}", flush=True)
                if not (keep and i == 0): shutil.rmtree(sandbox)
        return runs

    runs = {"help": in_turns("help", {t: c["help"] for t, c in tools.items()})}
    runs["convert"] = in_turns("convert", {t: [*c["convert"], clips, "--output", "out", *model] for t, c in tools.items()}, keep=True)
    runs["infer"] = in_turns("infer", {t: [*c["infer"], clips, "--output", "out.csv", *model, "--batch-size", infer_batch_size, *c["answer"](prompt_tokens)]
                                       for t, c in tools.items()})
    converted = {t: folder/f"convert-{n}-0"/"out" for n, t in enumerate(tools)}
    tools[IN_TWOS] = our_tool("--lora-target-modules", PEER_TARGETS, at_once=2)
    tools[OUR_TARGETS] = our_tool()
    converted |= dict.fromkeys([IN_TWOS, OUR_TARGETS], converted[OURS])

    def size(tool):
        rows = tool.get("at_once")
        return ["--batch-size", rows, "--gradient-accumulation-steps", batch_size//rows] if rows else ["--batch-size", batch_size]

    for task, n in zip(["train short", "train long"], epochs):
        options = ["--output", "out", *model, "--bf16", "false", "--num-epochs", n]
        runs[task] = in_turns(task, {t: [*c["train"], "--train-dataset", converted[t], *options, *size(c)] for t, c in tools.items()})
    return runs


def figures(runs, samples):
    "The medians that are compared: (name, unit, {tool: median}, True where more is better)"
    def medians(task, value): return {tool: median(map(value, rs)) for tool, rs in runs[task].items()}
    pairs = {tool: zip(short, runs["train long"][tool]) for tool, short in runs["train short"].items()}
    rates = {tool: median(samples / (long.seconds - short.seconds) for short, long in p) for tool, p in pairs.items()}
    return [("`--help`", "s", medians("help", lambda r: r.seconds), False),
            ("conversion", "s", medians("convert", lambda r: r.seconds), False),
            ("conversion, left on disk", "MB", medians("convert", lambda r: r.disk_bytes / 1e6), False),
            ("conversion, peak memory", "MB", medians("convert", lambda r: r.peak_bytes / 1e6), False),
            ("training, steady state", "samples/s", rates, True),
            ("training, whole run", "s", medians("train long", lambda r: r.seconds), False),
            ("training, peak memory", "MB", medians("train long", lambda r: r.peak_bytes / 1e6), False),
            ("inference", "s", medians("infer", lambda r: r.seconds), False),
            ("inference, peak memory", "MB", medians("infer", lambda r: r.peak_bytes / 1e6), False)]


def table(rows):
    "A markdown table; `times better` is the advantage of the column before, where both adapt the same modules"
    head = [PEER, OURS, "times better", IN_TWOS, "times better", OUR_TARGETS]
    lines = [f"| | {' | '.join(head)} |", "|---|" + "---:|"*len(head)]
    for name, unit, values, more in rows:
        peer, ours, in_twos, own = (values.get(tool) for tool in (PEER, OURS, IN_TWOS, OUR_TARGETS))
        ratios = [peer and v and (v / peer if more else peer / v) for v in (ours, in_twos)]
        cells = peer, ours, ratios[0], in_twos, ratios[1], own
        lines.append(f"| {name}, {unit} | " + " | ".join("" if v is None else f"{v:.3g}" for v in cells) + " |")
    return "\n".join(lines)


def machine(peer_python):
    "Where and with what this was measured"
    packages = ["torch", "transformers", "datasets", "peft", "accelerate"]
    ask = "import sys, importlib.metadata as m; print(*(f'{p} {m.version(p)}' for p in sys.argv[1:] if [*m.distributions(name=p)]), sep=', ')"
    versions = {tool: subprocess.check_output([python, "-c", ask, package, *packages], text=True).strip()
                for tool, python, package in [(OURS, sys.executable, "mdl_nbdev"), (PEER, peer_python, "mdl-toolkit")] if python}
    model = next((line.split(": ")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    return {**versions, "date": datetime.date.today().isoformat(), "cpu": f"{model}, {os.cpu_count()} cores", "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
            "system": platform.platform(), "python": platform.python_version(),
            "load average before": os.getloadavg()[0]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, help="the interpreter of an environment with mdl-toolkit; without it only mdl_nbdev runs")
    parser.add_argument("--out", type=Path, required=True, help="writes OUT.json (every run) and OUT.md (the medians)")
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument("--seconds", type=float, nargs=2, default=[10, 30], help="shortest and longest clip")
    parser.add_argument("--epochs", type=float, nargs=2, default=[0.5, 1.5], help="of the short and of the long training run")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    where = machine(args.peer_python)
    with tempfile.TemporaryDirectory() as folder:
        runs = compare(Path(folder), args.peer_python, args.clips, args.seconds, args.epochs, args.repeats)
    rows = figures(runs, args.clips * (args.epochs[1] - args.epochs[0]))
    setting = f"{args.clips} clips of {args.seconds[0]:g} to {args.seconds[1]:g} s; medians of {args.repeats} runs each, in turns"
    facts = "\n".join(f"* {k}: {v}" for k, v in where.items())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    every = {task: {tool: [asdict(r) for r in rs] for tool, rs in of.items()} for task, of in runs.items()}
    arguments = {k: v for k, v in vars(args).items() if k not in ("peer_python", "out")}
    args.out.with_suffix(".json").write_text(json.dumps({**where, "arguments": arguments, "runs": every}, indent=1) + "\n")
    report = f"{setting}.\n\n{table(rows)}\n\n{facts}\n"
    args.out.with_suffix(".md").write_text(report)
    print(report)


if __name__ == "__main__": main()
