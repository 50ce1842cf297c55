"The benchmark scripts run, on a few short clips: figures taken here mean nothing"
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from mdl_nbdev.base import settings
from mdl_nbdev.base.command_line import from_args
from mdl_nbdev.cli import commands

benchmarks = Path(__file__).parent.parent/"benchmarks"


def lines(path): return [json.loads(line) for line in path.read_text().splitlines()]


# --- against_mdl_toolkit.py

SMALL = ["--clips", "8", "--seconds", "0.5", "1", "--repeats", "1", "--epochs", "1", "2"]
TASKS = {"help", "convert", "train short", "train long", "infer"}


@pytest.fixture
def comparison(monkeypatch):
    monkeypatch.syspath_prepend(benchmarks)
    import against_mdl_toolkit
    return against_mdl_toolkit


def test_what_is_compared(tmp_path, monkeypatch, comparison):
    "Every command is one that its console script takes; the figures of all runs come into the table"
    seen = []

    def read(command, sandbox):
        program, *args = map(str, command)
        if args != ["--help"]:
            prog = Path(program).name
            s = from_args(getattr(settings, f"{prog[4:].capitalize()}Settings"), args, prog)
            assert s.model_name == str(sandbox.parent/"model") and Path(s.model_name, "config.json").exists()
            data = s.train_dataset[0] if prog == "mdl_train" else s.input
            assert data.exists() or data == sandbox.parent/"convert-0-0"/"out"
            seen.append((prog, s.lora_target_modules, s.batch_size, s.gradient_accumulation_steps) if prog == "mdl_train" else (prog,))
        sandbox.mkdir()
        return comparison.Run(len(seen) + 2., 3., 4_000_000, 5_000_000)
    monkeypatch.setattr(comparison, "run", read)
    monkeypatch.setattr(sys, "argv", ["against_mdl_toolkit.py", "--out", str(tmp_path/"r"), *SMALL])
    comparison.main()
    trainings = [("mdl_train", *how) for how in ((comparison.PEER_TARGETS, 8, 1), (comparison.PEER_TARGETS, 2, 4), (None, 8, 1))]
    assert seen == [("mdl_convert",), ("mdl_infer",), *trainings*2]
    assert set(json.loads((tmp_path/"r.json").read_text())["runs"]) == TASKS
    table = (tmp_path/"r.md").read_text()
    assert "| conversion, s |  | 3 |" in table and "| conversion, left on disk, MB |  | 5 |" in table and "| training, steady state, samples/s |  | 2.67 |  | 2.67 |" in table


def test_a_run_is_measured(tmp_path, comparison):
    child = "import time; x = b'1'*60_000_000; time.sleep(1)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}]); open('out', 'w').write('x'*999)"
    r = comparison.run([sys.executable, "-c", code], tmp_path/"fine")
    assert r.seconds > 1 and 0 < r.cpu_seconds and r.disk_bytes == 999
    assert r.peak_bytes > 60_000_000, "of a child process"
    with pytest.raises(SystemExit, match="exit code 3: .*\n.*says why"): comparison.run([sys.executable, "-c", "print('says why'); exit(3)"], tmp_path/"failed")


@pytest.mark.slow
def test_against_mdl_toolkit(tmp_path):
    subprocess.run([sys.executable, benchmarks/"against_mdl_toolkit.py", "--out", tmp_path/"r", *SMALL], check=True)
    runs = json.loads((tmp_path/"r.json").read_text())["runs"]
    assert set(runs) == TASKS
    assert all(r["peak_bytes"] > 2**20 for task, of in runs.items() if task != "help" for rs in of.values() for r in rs)
    assert "| conversion, s |" in (tmp_path/"r.md").read_text()


# --- gpu.py

@pytest.fixture
def gpu(monkeypatch, one_thread):
    monkeypatch.syspath_prepend(benchmarks)
    import gpu
    return gpu


def command_here(name, arguments, folder, small, seconds):
    "The same command in this process"
    with pytest.MonkeyPatch.context() as m, pytest.raises(SystemExit) as e:
        m.chdir(folder)
        getattr(commands, name)([*map(str, arguments)])
    assert not e.value.code
    return {"s": 1.}


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["one process", "processes"])
def test_gpu(tmp_path, monkeypatch, gpu, whole):
    "All kinds of rows; the commands in this process, or all as processes of their own"
    if whole: subprocess.run([sys.executable, benchmarks/"gpu.py", "--small", "--out", tmp_path/"r"], check=True)
    else:
        monkeypatch.setattr(gpu, "command_row", command_here)
        gpu.main(["--small", "--out", str(tmp_path/"r")])
    rows = lines(tmp_path/"r.jsonl")
    assert not [r for r in rows if "error" in r]
    of = lambda kind: [r for r in rows if r["kind"] == kind]
    assert all(r["share of peak"] > 0 and (r["padding"] > 0) == (r["padded"] and not r.get("packed")) for r in [*of("training"), *of("generation")])
    assert {r["padded"] for r in of("training")} == {r["checkpointing"] for r in of("training")} == {True, False}
    assert {r["packed"] for r in of("training")} == {"", "by sample"}
    assert all(min(r["encoder s"], r["first token s"], r["batch s"]) > 0 for r in of("generation"))
    train, infer = of("commands")
    assert train["last loss"] < train["first loss"] and infer["answered"] >= infer["correct"] > 0
    assert all(f"\n{title}\n" in (tmp_path/"r.md").read_text() for title in ("Device", "Model", "Training", "Generation", "Commands"))


def test_gpu_runs_a_command(tmp_path, gpu):
    "As a process of its own, from a checkout that is not installed"
    assert gpu.command_row("mdl_check", ["--help"], tmp_path, True, 60)["s"] > 0
    with pytest.raises(RuntimeError, match="exit code 2: mdl_check: .*nothing.csv: "): gpu.command_row("mdl_check", ["nothing.csv"], tmp_path, True, 60)


def test_gpu_keeps_finished_rows_when_a_row_fails_or_the_script_dies(tmp_path, monkeypatch, gpu):
    train = ("training", dict(clips=2, seconds=1, padded=True, checkpointing=True))
    generate = ("generation", dict(clips=1, seconds=1, padded=False, new=2, recorded=False))
    monkeypatch.setattr(gpu, "plan", lambda small: [generate, train, train, ("training", {}), train])
    train_row, asked = gpu.train_row, []

    def failing(*args, **kwargs):
        asked.append(kwargs)
        if len(asked) == 1: raise gpu.torch.OutOfMemoryError("as a device says it")
        if not kwargs: raise KeyboardInterrupt
        return train_row(*args, **kwargs)
    monkeypatch.setattr(gpu, "train_row", failing)
    with pytest.raises(KeyboardInterrupt): gpu.main(["--small", "--out", str(tmp_path/"r")])
    rows = lines(tmp_path/"r.jsonl")
    assert [r["kind"] for r in rows] == ["facts", "device", "model", "generation", "training", "training"]
    assert [r.get("error") for r in rows[3:]] == [None, "out of memory", None]
    assert "as a device says it" in rows[4]["traceback"] and rows[5]["step s"] > 0
    assert "out of memory" in (tmp_path/"r.md").read_text()
    with pytest.raises(SystemExit, match="choose another --out"): gpu.main(["--small", "--out", str(tmp_path/"r")])


def test_gpu_begins_no_row_after_its_time(tmp_path, gpu):
    gpu.main(["--small", "--out", str(tmp_path/"r"), "--minutes", "1", "--since", "0"])
    rows = lines(tmp_path/"r.jsonl")
    assert {r["error"] for r in rows[3:]} == {"not begun: the time was up"} and len(rows) == 3 + len(gpu.plan(True))


def test_gpu_trains_as_mdl_train_does(gpu):
    "Frozen bfloat16 weights, float32 adapters, products in bfloat16; generation gets a model without adapters"
    import torch
    model = gpu.Model(True, torch.device("cpu"))
    layer = next(m for n, m in model.trainable(True).named_modules() if n.endswith("q_proj"))
    types, adapter = [], layer.lora_A["default"]
    adapter.register_forward_hook(lambda module, args, out: types.append(out.dtype))
    gpu.train_row(model, 1e12, 1, 2, 1, True, True)
    assert set(types) == {torch.bfloat16} and adapter.weight.dtype == torch.float32
    assert layer.base_layer.weight.dtype == torch.bfloat16 and not layer.base_layer.weight.requires_grad
    assert not [n for n, _ in model.plain().named_modules() if "lora" in n]


def test_gpu_counts_synchronizations(monkeypatch, gpu):
    import torch
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step():
        for _ in range(2): warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
    assert gpu.synchronizations(step, torch.device("cuda")).total() == 2 and modes == ["warn", "default"]
    assert gpu.synchronizations(step, torch.device("cpu")).total() == 0


def test_useful_operations_are_those_counted(gpu):
    "The formulas count what torch counts, but for the half of the decoder's attention that a causal mask hides"
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    def counted(f):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter: f()
        return counter.get_total_flops()

    def arguments(samples, answer):
        inputs = gpu.batch(model.config, samples, answer).inputs
        return inputs if answer else {k: v for k, v in inputs.items() if k != "labels"}
    model, samples = gpu.build(True, torch.device("cpu")).eval(), gpu.lengths(2, 12, False)
    rows = arguments(samples, False)
    generate = counted(lambda: model.generate(**rows, max_new_tokens=8, min_new_tokens=8, do_sample=False))
    assert 0.9 < gpu.generation_operations(model, samples, 8) / generate < 1
    model = gpu.adapted(model).get_base_model()
    rows = arguments(samples, True)
    with torch.autocast("cpu", torch.bfloat16): step = counted(lambda: model(**rows).loss.backward())
    assert 0.9 < gpu.training_operations(model, samples) / step < 1
    one, two = (gpu.training_operations(model, [n]) for n in (16_000, 64_000))
    assert gpu.training_operations(model, [16_000, 64_000]) == one + two # padding is no useful work


def test_wheels_for_a_machine_without_network(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(benchmarks)
    import gpu_wheels
    pins = gpu_wheels.closure({"torch", "numpy"})
    assert {"transformers", "tokenizers", "fastcore", "cffi", "pycparser"} <= set(pins) and not {"torch", "numpy", "sympy"} & set(pins)
    for name in ("torch-0.1", "fastcore-999", "no_such_package-1"): (tmp_path/f"{name}-py3-none-any.whl").touch()
    assert [w.name.split("-")[0] for w in gpu_wheels.lacking(tmp_path)] == ["fastcore", "no_such_package"]


def test_gpu_sh_runs_without_wheels(tmp_path):
    env = {**os.environ, "PYTHON": sys.executable, "WHEELS": str(tmp_path)}
    shown = subprocess.run([benchmarks/"gpu.sh", "--help"], env=env, check=True, capture_output=True, text=True).stdout
    assert "--minutes" in shown
