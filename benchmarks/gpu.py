"""Train and generate with the 7B shape of MiDashengLM, random bfloat16 weights, on one GPU

    python benchmarks/gpu.py --out benchmarks/results/gpu-NAME

What the figures mean is told in README.md. `--small` runs the same code on the CPU with the tiny shape.
"""
import argparse
import datetime
import importlib.metadata
import json
import platform
import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from mdl_nbdev.config import TuneSettings
from mdl_nbdev.midashenglm import MiDashengLMConfig, n_audio_tokens
from mdl_nbdev.model import adapt, tiny_config

RATE = 16_000
PROMPT, ANSWER = 24, 8 # text tokens around a clip, and after it


def build(small, device):
    "A model of the 7B shape with random bfloat16 weights (or of the tiny one, float32), made on `device`"
    config = tiny_config() if small else MiDashengLMConfig() # whose defaults are the 7B shape
    with device: return AutoModelForCausalLM.from_config(config, dtype=torch.float32 if small else torch.bfloat16)


def adapted(model):
    "`model`, LoRA of rank 32 put into every linear layer of its encoder, projector and decoder"
    return adapt(model, TuneSettings(lora_rank=32)).get_base_model()


def batch(model, clips, seconds, answer=True):
    "`clips` rows of one random clip each: prompt, audio tokens and, with `answer`, labelled tokens"
    device, samples = model.device, int(seconds * RATE)
    n = n_audio_tokens(samples)
    ids = torch.randint(0, 256, (clips, PROMPT + n + ANSWER * answer), device=device)
    ids[:, PROMPT//2:PROMPT//2 + n] = model.config.audio_token_id
    out = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "audio_length": torch.full((clips,), samples, device=device),
           "input_values": torch.randint(-20_000, 20_000, (clips, samples), dtype=torch.int16, device=device)}
    if answer: out["labels"] = torch.where(torch.arange(ids.shape[1], device=device) >= ids.shape[1] - ANSWER, ids, -100)
    return out


def weights(module, lora=False):
    "How many weights of linear (and patch) layers a position meets in `module`; with `lora`, those of the adapter alone"
    layers = [(n, m) for n, m in module.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return sum(m.weight.numel() for n, m in layers if not lora or "lora_" in n)


def operations(model, clips, seconds, tokens, labelled):
    "Useful operations of one forward pass of `clips` rows: those of linear layers, of the adapter's, and of attention"
    patches, chunk = int(seconds * RATE) // 640, model.config.audio_encoder_config.target_length // 4
    audio, text = model.config.audio_encoder_config, model.config.text_config
    positions = {"audio_encoder": patches, "audio_projector": n_audio_tokens(int(seconds * RATE)), "decoder.model": tokens, "decoder.lm_head": labelled}
    linear, lora = (2 * clips * sum(n * weights(model.get_submodule(k), only) for k, n in positions.items()) for only in (False, True))
    chunks = [chunk] * (patches // chunk) + [patches % chunk]
    attention = 4 * clips * (audio.depth * audio.embed_dim * sum(t * t for t in chunks)
                             + text.num_hidden_layers * text.hidden_size * tokens * tokens / 2)
    return linear, lora, attention


def training_operations(*args):
    "A step: forward, the gradients of all activations, and of the adapter's weights"
    linear, lora, attention = operations(*args)
    return 2 * linear + lora + 3 * attention


def generation_operations(model, clips, seconds, prompt, new):
    "The prompt, then `new` tokens one by one"
    linear, _, attention = operations(model, clips, seconds, prompt, 1)
    text = model.config.text_config
    each = 2 * (weights(model.decoder.model) + weights(model.decoder.lm_head)) + 4 * text.num_hidden_layers * text.hidden_size * (prompt + new / 2)
    return linear + attention + clips * (new - 1) * each


def clock(device):
    if device.type == "cuda": torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(f, device, repeats, warmup=2):
    "Median seconds of `f()` and the peak of device memory in bytes (0 on a CPU)"
    seconds = []
    if device.type == "cuda": torch.cuda.reset_peak_memory_stats(device)
    for _ in range(warmup + repeats):
        start = clock(device)
        f()
        seconds.append(clock(device) - start)
    return median(seconds[warmup:]), torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def matrix_peak(device, dtype, side):
    "Operations a second of one large matrix product on random data"
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / timed(lambda: a @ b, device, 10, 3)[0]


def train(model, peak, seconds, clips, repeats):
    "One row of the training table"
    rows, device = batch(model, clips, seconds), model.device
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=device.type == "cuda")

    def step():
        model(**rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.train()
    elapsed, memory = timed(step, device, repeats)
    useful = training_operations(model, clips, seconds, rows["input_ids"].shape[1], ANSWER)
    return {"clip s": seconds, "batch": clips, "samples/s": clips / elapsed, "step s": elapsed, "peak GB": memory / 1e9, "share of peak": useful / elapsed / peak}


@torch.inference_mode()
def generate(model, peak, seconds, clips, new, repeats):
    "One row of the generation table"
    rows, device = batch(model, clips, seconds, answer=False), model.device
    model.eval()
    elapsed, memory = timed(lambda: model.generate(**rows, max_new_tokens=new, min_new_tokens=new, do_sample=False), device, repeats, 1)
    useful = generation_operations(model, clips, seconds, rows["input_ids"].shape[1], new)
    return {"clip s": seconds, "batch": clips, "samples/s": clips / elapsed, "new tokens/s": clips * new / elapsed, "peak GB": memory / 1e9,
            "share of peak": useful / elapsed / peak}


def attempt(f, *args, **also):
    "The row of `f`, or a row that says that memory ran out"
    try: return {**also, **f(*args)}
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {**also, "clip s": args[2], "batch": args[3], "out of memory": True}


def sizes(small):
    "Settings of the rows: training (seconds, batch), generation (seconds, batch, new tokens), repeats, side of the matrices"
    if small: return [(1, 2), (2, 2)], [(2, 1, 8), (2, 4, 8)], 1, 512
    return [(10, 8), (30, 8)], [(30, b, 100) for b in (1, 8, 32, 128, 200)], 5, 8192


def measure(small):
    "Every row of both tables"
    device = torch.device("cpu" if small else "cuda")
    training, generation, repeats, side = sizes(small)
    torch.manual_seed(0)
    model = build(small, device)
    peak = matrix_peak(device, model.dtype, side)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    out = {"date": datetime.date.today().isoformat(), "device": name, "python": platform.python_version(),
           **{p: importlib.metadata.version(p) for p in ("torch", "transformers", "peft")},
           "parameters": sum(p.numel() for p in model.parameters()), "matrix peak TFLOP/s": peak / 1e12}
    out["generation"] = [attempt(generate, model, peak, *row, repeats) for row in generation]
    out["training"] = []
    model = adapted(model)
    out["trainable parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for checkpointing in (False, True):
        if checkpointing: model.gradient_checkpointing_enable({"use_reentrant": False})
        out["training"] += [attempt(train, model, peak, *row, repeats, checkpointing=checkpointing) for row in training]
    return out


def table(rows):
    "A markdown table of rows with the same keys, but those where memory ran out"
    keys = list(max(rows, key=len))
    lines = ["| " + " | ".join(keys) + " |", "|" + "---:|" * len(keys)]
    text = lambda v: f"{v:.3g}" if isinstance(v, float) else str(v)
    return "\n".join(lines + ["| " + " | ".join(text(r[k]) if k in r else "out of memory" for k in keys) + " |" for r in rows])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="writes OUT.json and OUT.md")
    parser.add_argument("--small", action="store_true", help="the tiny shape on the CPU: does the script run?")
    args = parser.parse_args()
    if not args.small and not torch.cuda.is_available(): sys.exit("no CUDA device: --small runs on the CPU")
    out = measure(args.small)
    facts = "\n".join(f"* {k}: {v}" for k, v in out.items() if k not in ("training", "generation"))
    report = f"{facts}\n\nTraining\n\n{table(out['training'])}\n\nGeneration\n\n{table(out['generation'])}\n"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(out, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(report)
    print(report)


if __name__ == "__main__": main()
