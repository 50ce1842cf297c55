"""Train on short samples, padded and packed: how many of their tokens a second?

    python benchmarks/packing.py --out benchmarks/results/packing

README.md explains the figures. `--small` uses a few samples, to see whether the script runs.
"""
import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from mdl_nbdev.model.chat import Example
from mdl_nbdev.model.collate import Collator
from mdl_nbdev.model.midasheng_encoder import n_audio_tokens
from mdl_nbdev.model.midashenglm_family import MiDashengLMFamily, tiny_model, tiny_tokenizer
from mdl_nbdev.model.packed_attention import attend_by_sample
from mdl_nbdev.train.batches import StepSampler, padding_waste
from mdl_nbdev.train.losses import loss_weights, weighted_losses

# Name -> batch size, length of a pack, by length?, a mask over the whole pack?
WAYS = {"8 rows, at random": (8, None, False, False), "8 rows, by length": (8, None, True, False), "32 rows, by length": (32, None, True, False),
        "packed, 1 x 256": (1, 256, True, False), "packed, 4 x 256": (4, 256, True, False), "packed, 1 x 1024": (1, 1024, True, False),
        "packed, 4 x 256, with a mask": (4, 256, True, True), "packed, 1 x 1024, with a mask": (1, 1024, True, True)}
BASE = "8 rows, by length"


def text(n, rng, width):
    "`n` texts of 10 to 250 tokens, most of them short; and a GPT-NeoX"
    lengths = np.clip(rng.lognormal(3.9, 0.6, n), 10, 250).astype(int)
    examples = [Example(ids := rng.integers(0, 500, k).astype(np.int32), np.where(np.arange(k) >= k // 2, ids, -100).astype(np.int32), []) for k in lengths]
    config = GPTNeoXConfig(vocab_size=512, hidden_size=width, intermediate_size=4*width, num_hidden_layers=6, num_attention_heads=4)
    return examples, GPTNeoXForCausalLM(config), 0


def audio(n, rng, _):
    "`n` clips of 0.5 to 3 s with a short answer; and the tiny model"
    tok, out = tiny_tokenizer(), []
    listen, begin, end = (tok.convert_tokens_to_ids(t) for t in ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"))
    for seconds in rng.uniform(0.5, 3, n):
        clip, answer = (rng.standard_normal(int(seconds * 16000)) * 3000).astype(np.int16), rng.integers(0, 250, rng.integers(8, 40))
        ids = np.array([*[65] * 12, begin, *[listen] * n_audio_tokens(len(clip)), end, *answer], np.int32)
        out.append(Example(ids, np.where(np.arange(len(ids)) >= len(ids) - len(answer), ids, -100).astype(np.int32), [clip]))
    return out, tiny_model(), tok.pad_token_id


def clock(device):
    if device.type == "cuda": torch.cuda.synchronize(device)
    return time.perf_counter()


def epoch(model, batches, optimizer):
    "Seconds to learn from all batches once"
    attend_by_sample(model, "cu_seq_lens_q" in batches[0])
    start = clock(model.device)
    for batch in batches:
        batch = batch.to(model.device)
        weights = loss_weights([batch], "tokens", [1.0], 1)[0][0]
        weighted_losses(model, batch.inputs, weights, batch["label_at"])[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return clock(model.device) - start


def prepare(examples, model, pad, size, pack, by_length, masked):
    "The batches of one way, and the share of their positions that is padding"
    lengths = np.array([len(e.input_ids) for e in examples])
    if by_length: groups = StepSampler(lengths, size, pack=pack).batches(0)
    else: groups = np.split(np.random.default_rng(0).permutation(len(lengths)), range(size, len(lengths), size))
    collate = Collator(pad, MiDashengLMFamily(), bounds=not masked and attend_by_sample(model))
    return [collate([[examples[j] for j in i] if pack else examples[i] for i in g]) for g in groups], padding_waste(lengths, groups)


def measure(make, n, width, repeats, device):
    "A row for each way; they take turns, so that a slow minute of the machine meets all"
    torch.manual_seed(0)
    examples, model, pad = make(n, np.random.default_rng(0), width)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ways = {name: prepare(examples, model, pad, *way) for name, way in WAYS.items()}
    for batches, _ in ways.values(): epoch(model, batches[:2], optimizer)
    seconds = {name: [] for name in ways}
    for _ in range(repeats):
        for name, (batches, _) in ways.items(): seconds[name].append(epoch(model, batches, optimizer))
    tokens, base = sum(len(e.input_ids) for e in examples), median(seconds[BASE])
    rows = [{"batches": name, "steps": len(batches), "padding": waste, "samples/s": len(examples) / (s := median(seconds[name])), "tokens/s": tokens / s,
             "times " + BASE: base / s} for name, (batches, waste) in ways.items()]
    return {"samples": len(examples), "mean tokens": tokens / len(examples), "parameters": sum(p.numel() for p in model.parameters()), "rows": rows, "seconds": seconds}


def table(rows):
    keys = list(rows[0])
    show = lambda k, v: v if isinstance(v, str) else f"{v:.1%}" if k == "padding" else f"{v:.3g}" if isinstance(v, float) and v < 1000 else f"{v:,.0f}"
    return "\n".join(["| " + " | ".join(keys) + " |", "|---|" + "---:|" * (len(keys) - 1), *("| " + " | ".join(show(k, r[k]) for k in keys) + " |" for r in rows)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="writes OUT.json and OUT.md")
    parser.add_argument("--small", action="store_true", help="a few samples, once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    load, device = os.getloadavg()[0], torch.device(args.device)
    facts = {"date": datetime.date.today().isoformat(), "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads",
             "load average before": load, "python": platform.python_version(), **{p: importlib.metadata.version(p) for p in ("torch", "transformers")}}
    sizes, rest = ((8, 8), (32, 1)) if args.small else ((800, 240), (256, 3))
    out = {make.__name__: measure(make, n, *rest, device) for make, n in zip((text, audio), sizes)}
    report = "\n".join(f"* {k}: {v}" for k, v in facts.items()) + "\n"
    for name, r in out.items():
        report += f"\n{name.capitalize()}: {r['samples']:,} samples of {r['mean tokens']:.0f} tokens on average, {r['parameters']:,} parameters, all trained, float32\n\n{table(r['rows'])}\n"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(facts | out, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(report)
    print(report)


if __name__ == "__main__": main()
