"The benchmark scripts run, on a few short clips: figures taken here mean nothing"
import json
import subprocess
import sys
from pathlib import Path

benchmarks = Path(__file__).parent.parent/"benchmarks"


def run(script, *args): subprocess.run([sys.executable, benchmarks/script, *map(str, args)], check=True)


def test_against_mdl_toolkit(tmp_path):
    run("against_mdl_toolkit.py", "--out", tmp_path/"r", "--clips", 16, "--seconds", 0.5, 1, "--repeats", 1, "--epochs", 0.5, 1)
    runs = json.loads((tmp_path/"r.json").read_text())["runs"]
    assert set(runs) == {"help", "convert", "train short", "train long", "infer"}
    assert all(r["peak_bytes"] > 2**20 for task, of in runs.items() if task != "help" for rs in of.values() for r in rs)
    assert "| conversion, s |" in (tmp_path/"r.md").read_text()


def test_gpu(tmp_path):
    run("gpu.py", "--small", "--out", tmp_path/"r")
    rows = json.loads((tmp_path/"r.json").read_text())
    assert len(rows["training"]) == 4 and all(0 < r["share of peak"] < 1 for r in rows["training"])
    assert rows["generation"]
