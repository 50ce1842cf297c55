"""Train and generate with the 7B shape of MiDashengLM, random bfloat16 weights, on one GPU

    python benchmarks/gpu.py --out benchmarks/results/gpu-NAME

README.md explains the figures, and how to run this on a machine without a network. `--small` runs the same code on the
CPU with the tiny shape.
"""
import argparse
import configparser
import csv
import datetime
import gc
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from mdl_nbdev.base.files import append_text, json_lines, read_json_lines, write_text
from mdl_nbdev.base.settings import TuneSettings
from mdl_nbdev.data.sounds import make_sounds
from mdl_nbdev.model.adapters import adapt, without_input_casts
from mdl_nbdev.model.chat import Example
from mdl_nbdev.model.collate import Collator
from mdl_nbdev.model.decoding import RecordedSteps, prefill, regroup
from mdl_nbdev.model.load import recompute_activations
from mdl_nbdev.model.midasheng_encoder import n_audio_tokens
from mdl_nbdev.model.midashenglm import MiDashengLMConfig
from mdl_nbdev.model.midashenglm_family import MiDashengLMFamily, tiny_config
from mdl_nbdev.model.packed_attention import attend_by_sample
from mdl_nbdev.train.losses import loss_weights, weighted_losses

ROOT = Path(__file__).resolve().parent.parent
RATE = 16_000
PROMPT, ANSWER = 24, 8 # text tokens around a clip, and after it
PROFILED = 8 # decoded tokens whose kernels are recorded
DETAILS = {"kind", "runs s", "synchronization sites", "slowest kernels ms", "traceback"} # in OUT.jsonl, but not in the tables


# The model

def build(small, device):
    "A model of the 7B shape, or of the tiny one, with random bfloat16 weights made on `device`"
    config = tiny_config() if small else MiDashengLMConfig() # whose defaults are the 7B shape
    with device: return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def adapted(model):
    "`model` with float32 LoRA adapters of rank 32 on every linear layer of its encoder, projector and decoder"
    return adapt(model, TuneSettings(lora_rank=32))


class Model:
    "The model of all rows. It is built when first needed, and its adapters are added and removed as the rows require"
    def __init__(self, small, device): self.small, self.device, self.base, self.peft = small, device, None, None

    def plain(self):
        "The model without adapters, for generation"
        if self.base is None: self.base = build(self.small, self.device)
        if self.peft is not None: self.base, self.peft = self.peft.unload(), None
        return self.base.eval()

    def trainable(self, checkpointing):
        "The model with adapters, as `mdl_train` trains it"
        if self.peft is None: self.peft = adapted(self.plain())
        if checkpointing: recompute_activations(self.peft)
        else: self.peft.get_base_model().gradient_checkpointing_disable()
        return self.peft.train()


# Batches

def lengths(clips, seconds, padded):
    "Samples of each clip: all `seconds` long, or from 40 % to 100 % of that"
    return [int(seconds * share * RATE) for share in np.linspace(1, 0.4 if padded else 1, clips)]


def example(samples, config, rng, answer):
    "A prompt with one random clip and, with `answer`, labelled tokens after it"
    n = n_audio_tokens(samples)
    ids = rng.integers(0, 256, PROMPT + n + ANSWER * answer)
    ids[PROMPT//2:PROMPT//2 + n] = config.audio_token_id
    labels = np.where(np.arange(len(ids)) < PROMPT + n, -100, ids)
    return Example(ids, labels, [rng.integers(-20_000, 20_000, samples).astype(np.int16)])


def batch(config, samples, answer=True, packed=False, bounds=False):
    "Rows of one random clip each on the CPU, padded as in training or, without `answer`, as in inference; `packed`: all in one row"
    rng = np.random.default_rng(0)
    examples = [example(n, config, rng, answer) for n in samples]
    return Collator(0, MiDashengLMFamily(), "right" if answer else "left", bounds=bounds)([examples] if packed else examples)


# Useful operations

def weights(module, lora=False):
    "How many weights of linear (and patch) layers a position meets in `module`; with `lora`, those of the adapters alone"
    layers = [(n, m) for n, m in module.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return sum(m.weight.numel() for n, m in layers if not lora or "lora_" in n)


def operations(model, samples, text, labelled):
    """One forward pass over rows with clips of these `samples`, `text` other tokens in each row, and logits at `labelled`
    positions of each: operations of linear layers, of the adapters among them, and of attention. Padding does not count"""
    audio, decoder = model.config.audio_encoder_config, model.config.text_config
    chunk, patches = audio.target_length // 4, [n // 640 for n in samples]
    audio_tokens = [n_audio_tokens(n) for n in samples]
    tokens = [text + n for n in audio_tokens]
    positions = {"audio_encoder": sum(patches), "audio_projector": sum(audio_tokens), "decoder.model": sum(tokens),
                 "decoder.lm_head": labelled * len(samples)}
    count = lambda lora: 2 * sum(n * weights(model.get_submodule(part), lora) for part, n in positions.items())
    chunks = sum(p // chunk * chunk**2 + (p % chunk)**2 for p in patches)
    in_encoder = audio.depth * audio.embed_dim * chunks
    in_decoder = decoder.num_hidden_layers * decoder.hidden_size * sum(t * t for t in tokens) / 2
    return count(False), count(True), 4 * (in_encoder + in_decoder)


def training_operations(model, samples):
    "A step: forward, the gradients of all activations, and those of the adapters' weights"
    linear, lora, attention = operations(model, samples, PROMPT + ANSWER, ANSWER)
    return 2 * linear + lora + 3 * attention


def generation_operations(model, samples, new):
    "The prompts, then `new` tokens one by one"
    linear, _, attention = operations(model, samples, PROMPT, 1)
    text = model.config.text_config
    a_token = 2 * (weights(model.decoder.model) + weights(model.decoder.lm_head))
    seen = sum(PROMPT + n_audio_tokens(n) + new / 2 for n in samples) # keys that each new token of a row attends to
    each = len(samples) * a_token + 4 * text.num_hidden_layers * text.hidden_size * seen
    return linear + attention + (new - 1) * each


# Timing

def clock(device):
    if device.type == "cuda": torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(f, device, repeats, warmup=2):
    "Seconds of each run of `f()` after the warm-up, and the peak of device memory in bytes (0 on a CPU)"
    seconds = []
    if device.type == "cuda": torch.cuda.reset_peak_memory_stats(device)
    for _ in range(warmup + repeats):
        start = clock(device)
        f()
        seconds.append(clock(device) - start)
    return seconds[warmup:], torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def synchronizations(f, device):
    "The places where one run of `f()` makes the host wait for the device, and how often (none on a CPU)"
    if device.type != "cuda": return Counter()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            f()
    finally: torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{Path(w.filename).name}:{w.lineno}" for w in seen if "called a synchronizing" in str(w.message))


def kernels(f, device):
    "What runs on the device in one run of `f()`: (name, start, end) in seconds, in order (nothing on a CPU)"
    if device.type != "cuda": return []
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        f()
        torch.cuda.synchronize(device)
    found = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sorted(((e.name, e.time_range.start / 1e6, e.time_range.end / 1e6) for e in found), key=lambda e: e[1])


def busy(events):
    "Seconds in which at least one of these `kernels` runs"
    total, until = 0.0, -math.inf
    for _, start, end in events:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def slowest(events, count=15):
    "Milliseconds of the kernels, or copies, that take the most time together, and how often they run"
    spent, times = Counter(), Counter(name for name, _, _ in events)
    for name, start, end in events: spent[name] += 1e3 * (end - start)
    return {name[:120]: [round(ms, 3), times[name]] for name, ms in spent.most_common(count)}


# Rows

def device_row(device, side, repeats):
    "What one large matrix product and one large copy reach on this device"
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = median(timed(lambda: a @ b, device, repeats, 3)[0])
    big = torch.empty(8 * side * side, dtype=torch.uint8, device=device)
    copy = median(timed(big.clone, device, repeats, 3)[0])
    return {"matrix side": side, "matrix peak TFLOP/s": 2 * side**3 / product / 1e12, "copied MB": len(big) / 1e6,
            "copy GB/s": 2 * len(big) / copy / 1e9}


def model_row(model):
    "Build the model and its adapters"
    start = clock(model.device)
    model.plain()
    built = clock(model.device)
    parameters = list(model.trainable(True).parameters())
    count, trainable = (sum(p.numel() for p in parameters if p.requires_grad or not only) for only in (False, True))
    return {"parameters": count, "trainable": trainable, "build s": built - start, "adapt s": clock(model.device) - built}


def train_row(model, peak, repeats, clips, seconds, padded, checkpointing, packed=""):
    """Steps of training as `mdl_train` makes them: the batch to the device, forward under autocast, backward, clip, AdamW

    `packed`: all clips in one row, whose attention is computed `by sample`, or `with a mask`"""
    samples, device, net = lengths(clips, seconds, padded), model.device, model.trainable(checkpointing)
    by_sample = attend_by_sample(net, packed == "by sample")
    if packed and by_sample != (packed == "by sample"): raise RuntimeError("no kernel for attention within samples")
    rows = batch(net.config, samples, packed=bool(packed), bounds=by_sample)
    if device.type == "cuda": rows = rows.pin_memory()
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=device.type == "cuda")

    def step():
        (shares,), _ = loss_weights([rows], "tasks", np.ones(1), 1)
        batched, shares = rows.to(device), shares.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16): loss = weighted_losses(net, batched.inputs, shares, batched["label_at"])[0]
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    try:
        with without_input_casts(net, True):
            runs, memory = timed(step, device, repeats)
            waits, ran = synchronizations(step, device), kernels(step, device)
    finally:
        optimizer.zero_grad()
        attend_by_sample(net, False)
    useful, elapsed = training_operations(net.get_base_model(), samples), median(runs)
    return {"padding": padding(rows), "step s": elapsed, "samples/s": clips / elapsed, "peak GB": memory / 1e9,
            **share_of(peak, useful / elapsed), "kernels": len(ran), "GPU busy": busy(ran) / elapsed, "synchronizations": waits.total(),
            "synchronization sites": dict(waits), "slowest kernels ms": slowest(ran), "runs s": runs}


@torch.no_grad()
def generate_row(model, peak, repeats, clips, seconds, padded, new, recorded):
    "Greedy answers of `new` tokens; prompts are padded on the left"
    samples, device, net = lengths(clips, seconds, padded), model.device, model.plain()
    rows = batch(net.config, samples, answer=False)
    inputs = {k: v for k, v in rows.to(device).inputs.items() if k != "labels"}
    positions = inputs["attention_mask"].sum(1).tolist()
    recorded = RecordedSteps(net, clips, inputs["input_ids"].shape[1] + new) if recorded and device.type == "cuda" else None

    def answer(n):
        group = prefill(net, inputs, do_sample=False)
        group.add(group.scores().argmax(-1))
        if recorded: group = regroup([(group, [*range(clips)])], positions, recorded)
        for _ in range(n - 1):
            group.step()
            group.add(group.scores().argmax(-1))
            group.ids[:, -1].tolist() # an engine looks for the end of each row
    encode = lambda: net.encode_audio(inputs["input_values"], inputs["audio_length"], audio_plan=inputs["audio_plan"])
    encoder = median(timed(encode, device, repeats, 1)[0])
    first = median(timed(lambda: answer(1), device, repeats, 1)[0])
    runs, memory = timed(lambda: answer(new), device, repeats, 1)
    short, long = (kernels(lambda n=n: answer(n), device) for n in (1, 1 + PROFILED))
    useful, elapsed = generation_operations(net, samples, new), median(runs)
    token = (elapsed - first) / (new - 1)
    return {"padding": padding(rows), "batch s": elapsed, "samples/s": clips / elapsed, "new tokens/s": clips * new / elapsed,
            "peak GB": memory / 1e9, **share_of(peak, useful / elapsed), "encoder s": encoder, "first token s": first,
            "decode s/token": token, "kernels/token": (len(long) - len(short)) / PROFILED,
            "GPU busy": (busy(long) - busy(short)) / PROFILED / token, "slowest kernels ms": slowest(long), "runs s": runs}


def padding(rows):
    "The share of positions that belong to no sample"
    return float((rows["sample"] < 0).float().mean())


def share_of(peak, speed):
    "The column that compares a speed with the matrix peak, if that is known"
    return {"share of peak": speed / peak} if peak else {}


def command_row(name, arguments, folder, small, seconds):
    "One of the package's commands as a process of its own"
    config = configparser.ConfigParser()
    config.read(ROOT/"settings.ini")
    scripts = dict(line.split("=") for line in config["DEFAULT"]["console_scripts"].split())
    module, function = scripts[name].split(":")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    if small: env["CUDA_VISIBLE_DEVICES"] = ""
    start = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", f"from {module} import {function}; {function}()", *map(str, arguments)],
                         cwd=folder, env=env, capture_output=True, text=True, timeout=max(1, seconds))
    if run.returncode: raise RuntimeError(f"exit code {run.returncode}: {(run.stdout + run.stderr)[-1500:]}")
    return {"s": time.perf_counter() - start}


def mdl_train_row(folder, clips, small, seconds):
    "`mdl_train` with the built-in tiny model on `clips` made sounds"
    make_sounds(folder, clips, csv_name="sounds.csv")
    files = ["--train-dataset", "sounds.csv", "--base-dir", ".", "--output", "run", "--model-name", "tiny"]
    options = ["--batch-size", 16, "--num-epochs", 16, "--lr", 2e-3, "--logging-steps", 1]
    row = command_row("mdl_train", [*files, *options], folder, small, seconds)
    logged = read_json_lines(folder/"run"/"metrics.jsonl")
    losses = [line["loss"] for line in logged if "loss" in line]
    speeds = [line["samples_per_second"] for line in logged if "samples_per_second" in line]
    return {**row, "samples/s": median(speeds), "first loss": losses[0], "last loss": losses[-1]}


def mdl_infer_row(folder, clips, small, seconds):
    "`mdl_infer` with the model that `mdl_train` made, on the same `clips` sounds"
    files = ["sounds.csv", "--base-dir", ".", "--output", "answers.csv", "--model-name", "run/final"]
    row = command_row("mdl_infer", [*files, "--max-new-tokens", 24, "--batch-size", clips], folder, small, seconds)
    answers, references = ([r["prediction"] for r in read_csv(folder/name)] for name in ("answers.csv", "sounds.csv"))
    return {**row, "answered": sum(map(bool, answers)), "correct": sum(a == r for a, r in zip(answers, references))}


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as f: return list(csv.DictReader(f))


# The run

def plan(small):
    "Kind and settings of each row, the most important ones first"
    def row(kind, clips, seconds, padded, **more): return kind, dict(clips=clips, seconds=seconds, padded=padded, **more)
    def train(*shape, packed=""): return row("training", *shape[:3], checkpointing=shape[3], packed=packed)
    def generate(*shape): return row("generation", *shape[:3], new=shape[3], recorded=shape[4])
    commands = [("commands", dict(command=name, rows=16 if small else 64)) for name in ("mdl_train", "mdl_infer")]
    if small: # the same kinds of rows, in seconds
        return [train(2, 2, True, True), generate(2, 2, True, 8, True), *commands, train(2, 1, False, False), train(2, 1, True, False, packed="by sample"),
                generate(1, 2, False, 8, False)]
    return [train(8, 30, True, True), train(8, 30, True, False), train(8, 10, True, False), train(32, 10, True, False),
            generate(32, 30, True, 100, True), generate(32, 30, False, 100, True), generate(1, 30, False, 100, True), *commands,
            train(32, 10, True, False, packed="by sample"), train(32, 10, True, False, packed="with a mask"),
            train(8, 30, False, True), train(8, 30, False, False), train(8, 10, True, True), train(8, 10, False, True), train(8, 10, False, False),
            generate(8, 30, False, 100, True), generate(128, 30, False, 100, True), generate(200, 30, False, 100, True), generate(32, 30, True, 100, False),
            generate(1, 30, False, 100, False), generate(128, 30, False, 100, False), train(32, 30, True, True)]


def free(device):
    "Give memory that nothing uses back to the device"
    gc.collect()
    if device.type == "cuda": torch.cuda.empty_cache()


def attempt(f):
    "What `f()` measured, or what went wrong"
    start = time.perf_counter()
    try: row = f()
    except Exception as e:
        message = "out of memory" if isinstance(e, torch.OutOfMemoryError) else f"{type(e).__name__}: {e}"
        row = {"error": " ".join(message.split())[:300], "traceback": traceback.format_exc()[-4000:]}
    return {**row, "took s": time.perf_counter() - start}


class Results:
    "OUT.jsonl, to which each row is added as it comes, and OUT.md, which is then written anew"
    def __init__(self, out, facts):
        self.jsonl, self.md, self.facts, self.rows = Path(f"{out}.jsonl"), Path(f"{out}.md"), facts, []
        self.jsonl.parent.mkdir(parents=True, exist_ok=True)
        self._write({"kind": "facts", **facts})

    def add(self, kind, **row):
        self.rows.append({"kind": kind, **row})
        self._write(self.rows[-1])

    def _write(self, line):
        append_text(self.jsonl, json_lines([line]))
        write_text(self.md, self.report())
        print(json.dumps({k: v for k, v in line.items() if k not in DETAILS - {"kind"}}), flush=True)

    def report(self):
        "All results as markdown"
        text = "\n".join(f"* {k}: {v}" for k, v in self.facts.items()) + "\n"
        for kind in dict.fromkeys(r["kind"] for r in self.rows):
            text += f"\n{kind.capitalize()}\n\n{table([r for r in self.rows if r['kind'] == kind])}\n"
        return text


def table(rows):
    "A markdown table of rows, which may lack some of the keys; errors come last"
    keys = [k for k in dict.fromkeys(k for r in rows for k in r) if k not in DETAILS | {"error"}]
    if any("error" in r for r in rows): keys.append("error")
    lines = ["| " + " | ".join(keys) + " |", "|" + "---:|" * len(keys)]
    return "\n".join(lines + ["| " + " | ".join(cell(r.get(k, "")) for k in keys) + " |" for r in rows])


def cell(value):
    "A value as a cell of a markdown table shows it"
    if isinstance(value, bool): return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def facts(device):
    "The machine and the versions"
    found = {"date": datetime.date.today().isoformat(), "device": platform.processor() or platform.machine()}
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        found |= {"device": torch.cuda.get_device_name(device), "device memory GB": round(memory / 1e9, 1), "CUDA": torch.version.cuda}
    found["python"] = platform.python_version()
    return found | {p: importlib.metadata.version(p) for p in ("torch", "transformers", "peft", "accelerate")}


def measure(out, small, end):
    "Every row that can begin before `end`, in seconds since the epoch"
    device = torch.device("cpu" if small else "cuda")
    left = lambda: end - time.time()
    torch.manual_seed(0)
    model, results = Model(small, device), Results(out, facts(device))
    side, repeats, answers = (512, 1, 1) if small else (8192, 5, 3)
    first = attempt(lambda: device_row(device, side, 2 * repeats))
    results.add("device", **first)
    peak = first.get("matrix peak TFLOP/s", 0) * 1e12
    results.add("model", **attempt(lambda: model_row(model)))
    with TemporaryDirectory() as folder:
        commands = {"mdl_train": mdl_train_row, "mdl_infer": mdl_infer_row}
        kinds = {"training": lambda **asked: train_row(model, peak, repeats, **asked),
                 "generation": lambda **asked: generate_row(model, peak, answers, **asked),
                 "commands": lambda command, rows: commands[command](Path(folder), rows, small, left())}
        for kind, asked in plan(small):
            free(device)
            if left() > 0: found = attempt(lambda k=kind, a=asked: kinds[k](**a))
            else: found = {"error": "not begun: the time was up"}
            results.add(kind, **asked, **found)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="writes OUT.jsonl and OUT.md, row by row")
    parser.add_argument("--small", action="store_true", help="use the tiny shape on the CPU, to see whether the script runs")
    parser.add_argument("--minutes", type=float, default=9, help="begin no new row after so many minutes; default 9")
    parser.add_argument("--since", type=float, default=time.time(), help="when they began, in seconds since the epoch; default now")
    args = parser.parse_args(argv)
    if not args.small and not torch.cuda.is_available(): sys.exit("no CUDA device: --small runs on the CPU")
    if Path(f"{args.out}.jsonl").exists(): sys.exit(f"{args.out}.jsonl exists: choose another --out, or remove it")
    measure(args.out, args.small, args.since + 60 * args.minutes)
    print(Path(f"{args.out}.md").read_text(encoding="utf-8"))


if __name__ == "__main__": main()
