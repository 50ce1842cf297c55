"The benchmark scripts run, on a few short clips: figures taken here mean nothing"
import json
import subprocess
import sys
from pathlib import Path

benchmarks = Path(__file__).parent.parent/"benchmarks"


def run(script, *args): subprocess.run([sys.executable, benchmarks/script, *map(str, args)], check=True)


def test_against_mdl_toolkit(tmp_path):
    run("against_mdl_toolkit.py", "--out", tmp_path/"r", "--clips", 8, "--seconds", 0.5, 1, "--repeats", 1, "--epochs", 1, 2)
    runs = json.loads((tmp_path/"r.json").read_text())["runs"]
    assert set(runs) == {"help", "convert", "train short", "train long", "infer"}
    assert all(r["peak_bytes"] > 2**20 for task, of in runs.items() if task != "help" for rs in of.values() for r in rs)
    assert "| conversion, s |" in (tmp_path/"r.md").read_text()


def test_gpu(tmp_path):
    run("gpu.py", "--small", "--out", tmp_path/"r")
    rows = json.loads((tmp_path/"r.json").read_text())
    assert len(rows["training"]) == 4 and all(r["share of peak"] > 0 for r in [*rows["training"], *rows["generation"]])


def test_useful_operations_are_those_counted(monkeypatch):
    "The formulas count what torch counts, but for the half of the decoder's attention that a causal mask hides"
    monkeypatch.syspath_prepend(benchmarks)
    import gpu
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    def counted(f):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter: f()
        return counter.get_total_flops()
    model = gpu.build(True, torch.device("cpu")).eval()
    rows = gpu.batch(model, 2, 12, answer=False)
    shape = 2, 12, rows["input_ids"].shape[1]
    generate = counted(lambda: model.generate(**rows, max_new_tokens=8, min_new_tokens=8, do_sample=False))
    assert 0.9 < gpu.generation_operations(model, *shape, 8) / generate < 1
    model, rows = gpu.adapted(model), gpu.batch(model, 2, 12)
    step = counted(lambda: model(**rows).loss.backward())
    assert 0.9 < gpu.training_operations(model, 2, 12, rows["input_ids"].shape[1], gpu.ANSWER) / step < 1
