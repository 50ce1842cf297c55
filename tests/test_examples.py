"Every configuration and every command line in examples/ is one that the commands and launchers accept, and the Slurm scripts do what they say"
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mdl_nbdev.base.command_line import from_args
from mdl_nbdev.base.settings import TrainSettings
from mdl_nbdev.cli import commands as console_scripts
from mdl_nbdev.cli.commands import mdl_infer
from mdl_nbdev.data.sounds import make_sounds

root = Path(__file__).parent.parent
examples = root/"examples"
scripts = sorted(examples.glob("*.sh"))
yamls = {True: [], False: []}
for p in sorted(examples.glob("*.yaml")): yamls["distributed_type:" in p.read_text()].append(p)
names = {"ids": lambda p: p.name}


@pytest.mark.parametrize("path", yamls[False], **names)
def test_configuration(path, monkeypatch):
    monkeypatch.chdir(root)
    from_args(TrainSettings, ["--config", str(path)])


def commands(path):
    "The command lines of a file, comments among them: launcher and command, continued lines as one"
    text = path.read_text().replace("\\\n", " ")
    for name, value in {"$config": "examples/lora_audio.yaml", "$input": "a.csv", "$output": "b.csv", "$model": "tiny", "$first": "node1"}.items(): text = text.replace(name, value)
    text = re.sub(r'"?\$@"?', "", text)
    text = re.sub(r"\$\(\(.*?\)\)|\$\{\w+:-(\d+)\}|\$\w+", lambda m: m[1] or "2", text)
    for line in text.splitlines():
        if re.match(r"[#>]", line.strip()) and path.suffix == ".md": continue
        m = re.search(r"((?:torchrun|accelerate launch) .*?)?\b(mdl_\w+(?: +[\w/$\"-][^&'`|]*))", line)
        if m and not line.startswith("#SBATCH"): yield m[1], m[2].split(" #")[0]


lines = [(p.name, *c) for p in sorted(examples.iterdir()) if p.is_file() and not (p.suffix == ".yaml" and p in yamls[True]) for c in commands(p) if " --" in c[1]]


def test_command_lines_are_found():
    assert len(lines) >= 14
    assert {p.name for p in [*scripts, *yamls[False], examples/"README.md"]} == {name for name, *_ in lines}


@pytest.mark.parametrize("name, launcher, command", lines, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(lines)])
def test_command_line(name, launcher, command, monkeypatch):
    monkeypatch.chdir(root)
    prog, *args = shlex.split(command.replace("...", "examples/lora_audio.yaml"))
    seen = []
    monkeypatch.setattr(console_scripts, "run_command", lambda prog, function, cls, argv: seen.append(from_args(cls, argv, prog)))
    getattr(console_scripts, prog)(args)
    assert len(seen) == 1
    if not launcher: return
    launch = [*shlex.split(launcher), prog, *args]
    if launch[0] == "torchrun":
        from torch.distributed.run import get_args_parser
        parsed = get_args_parser().parse_args(launch[1:])
    else:
        from accelerate.commands.launch import launch_command_parser
        parsed = launch_command_parser().parse_args(launch[2:])
        assert Path(parsed.config_file) in [p.relative_to(root) for p in yamls[True]]
    assert parsed.no_python and [parsed.training_script, *parsed.training_script_args] == [prog, *args]


@pytest.mark.parametrize("path", yamls[True], **names)
def test_launcher_configuration(path, monkeypatch):
    "As accelerate itself reads it, and as it hands it to the processes"
    from accelerate.commands import launch
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)
    c = load_config_from_file(str(path))
    args, *_ = launch._validate_launch_command(launch.launch_command_parser().parse_args(["--config_file", str(path), "--num_processes", "2", "script.py"]))
    kind = path.stem.split("_")[0]
    assert (args.num_processes, args.multi_gpu, args.use_fsdp, args.use_deepspeed) == (2, kind == "ddp", kind == "fsdp", kind == "deepspeed")
    args.deepspeed_fields_from_accelerate_config = ",".join(c.deepspeed_config)
    env = prepare_deepspeed_cmd_env(args)[1] if kind == "deepspeed" else prepare_multi_gpu_env(args)
    if kind == "fsdp": assert (env["FSDP_VERSION"], env["FSDP_AUTO_WRAP_POLICY"], "FSDP_TRANSFORMER_CLS_TO_WRAP" in env) == ("2", "TRANSFORMER_BASED_WRAP", False)
    if kind == "deepspeed":
        stage = path.stem[-1]
        assert (env["ACCELERATE_DEEPSPEED_ZERO_STAGE"], env["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"], env["ACCELERATE_GRADIENT_CLIPPING"]) == (stage, "auto", "auto")


def test_fsdp_wraps_the_blocks():
    "The classes that fsdp.yaml leaves to the model are the transformer blocks, with adapters too"
    from peft import LoraConfig, get_peft_model
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from mdl_nbdev.model.midashenglm_family import tiny_model
    model = tiny_model()
    assert model._no_split_modules == {"MiDashengAudioBlock", "Qwen2DecoderLayer"}
    assert get_peft_model(model, LoraConfig(target_modules=["q_proj"]))._no_split_modules == {"MiDashengAudioBlock", "Qwen2DecoderLayer"}
    text = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    assert set(text._no_split_modules) == {"GPTNeoXLayer"}


@pytest.mark.parametrize("path", scripts, **names)
def test_script(path):
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"): subprocess.run(["shellcheck", path], check=True)
    assert os.access(path, os.X_OK)


# --- Slurm's commands as far as the scripts use them: one machine, one step. Like the real one, this srun ends its tasks on SIGTERM

slurm = {
    "srun": """#!/bin/bash
trap 'kill -KILL $pid' TERM
"$@" & pid=$!
echo $pid > $SLURM/step
wait $pid""",
    "scancel": """#!/bin/bash
[ "$*" = "--signal=TERM 7" ] && kill -TERM $(cat $SLURM/step)""",
    "scontrol": """#!/bin/bash
if [ "$1" = show ]; then echo localhost; else echo "$@" >> $SLURM/queued; fi""",
    "mdl_train": f"""#!{sys.executable}
import os, signal, sys, time
state = os.environ["SLURM"] + "/" + os.environ["RANK"]
def save(*_):
    time.sleep(.5)
    open(state + ".saved", "w").write(" ".join(sys.argv[1:]))
    sys.exit(143)
if os.path.exists(state + ".saved"): sys.exit(0)
signal.signal(signal.SIGTERM, save)
open(state + ".started", "w")
time.sleep(60)""",
}


@pytest.fixture
def job(tmp_path):
    "Starts a script as a job of Slurm"
    for name, text in slurm.items():
        (tmp_path/name).write_text(text + "\n")
        (tmp_path/name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}", "SLURM": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1",
           "SLURM_JOB_NODELIST": "localhost", "SLURM_GPUS_ON_NODE": "2", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    jobs = []
    def start(script, *args):
        p = subprocess.Popen(["bash", examples/script, *map(str, args)], cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        jobs.append(p)
        return p
    yield start
    for p in jobs:
        try: os.killpg(p.pid, signal.SIGKILL)
        except ProcessLookupError: pass


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(.05)


@pytest.mark.parametrize("script", ["slurm_one_node.sh", pytest.param("slurm_many_nodes.sh", marks=pytest.mark.slow)])
def test_time_is_up(script, job, tmp_path):
    "All ranks save, the job is queued again, and its next start runs to the end"
    run = job(script, "examples/lora_audio.yaml", "--seed", "1")
    wait_for(lambda: len(list(tmp_path.glob("*.started"))) == 2)
    os.kill(run.pid, signal.SIGUSR1)
    out, _ = run.communicate(timeout=60)
    assert run.returncode, out
    assert [p.read_text() for p in sorted(tmp_path.glob("*.saved"))] == ["--config examples/lora_audio.yaml --resume-from-checkpoint true --seed 1"]*2
    assert (tmp_path/"queued").read_text() == "requeue 7\n"
    run = job(script, "examples/lora_audio.yaml")
    out, _ = run.communicate(timeout=60)
    assert run.returncode == 0, out
    assert (tmp_path/"queued").read_text() == "requeue 7\n", "a run that is done is not queued again"


@pytest.mark.slow
@pytest.mark.parametrize("script", ["slurm_one_node.sh", "slurm_many_nodes.sh"])
def test_time_is_up_in_training(script, job, tmp_path):
    "The same with the real command: it saves where it is, and goes on from there"
    (tmp_path/"mdl_train").unlink()
    csv = make_sounds(tmp_path, 64)
    (tmp_path/"tiny.yaml").write_text(f"{{model_name: tiny, train_dataset: ['{csv}'], base_dir: '{tmp_path}', output: '{tmp_path}/run', num_epochs: 6, batch_size: 4, logging_steps: 1, num_workers: 1}}")
    run, metrics = job(script, tmp_path/"tiny.yaml"), tmp_path/"run"/"metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 3)
    os.kill(run.pid, signal.SIGUSR1)
    out, _ = run.communicate(timeout=100)
    assert run.returncode, out
    (checkpoint,) = [p for p in (tmp_path/"run").iterdir() if p.name.startswith("checkpoint")]
    run = job(script, tmp_path/"tiny.yaml")
    out, _ = run.communicate(timeout=200)
    assert run.returncode == 0, out
    assert re.search(rf"{checkpoint.name.split('-')[1]}/48 ", out), "goes on from the checkpoint"
    assert (tmp_path/"run"/"final"/"config.json").exists()
    assert (tmp_path/"queued").read_text() == "requeue 7\n"


@pytest.mark.slow
def test_answering_under_slurm(job, tmp_path):
    csv = make_sounds(tmp_path, 24)
    options = ["--base-dir", tmp_path, "--batch-size", "1", "--max-new-tokens", "4"]
    run = job("slurm_infer.sh", csv, tmp_path/"slurm.csv", "tiny", *options)
    out, _ = run.communicate(timeout=100)
    assert run.returncode == 0, out
    with pytest.raises(SystemExit) as e: mdl_infer([str(a) for a in [csv, "--output", tmp_path/"one.csv", "--model-name", "tiny", *options]])
    assert not e.value.code
    assert (tmp_path/"slurm.csv").read_bytes() == (tmp_path/"one.csv").read_bytes()


@pytest.mark.slow
def test_answering_in_an_array(job, tmp_path):
    csv = make_sounds(tmp_path, 24)
    options = [csv, tmp_path/"out.csv", "tiny", "--base-dir", tmp_path, "--batch-size", "1", "--max-new-tokens", "4"]
    runs = [job("slurm_infer_array.sh", *options) for _ in range(2)]
    for run in runs: assert run.wait(timeout=200) == 0, run.communicate()[0]
    assert (tmp_path/"out.csv").read_text().count("\n") == 25
    late = job("slurm_infer_array.sh", *options)
    assert "the others have answered all rows" in late.communicate(timeout=60)[0] and late.returncode == 0
