"One run in several processes, on one machine and on two: the same model as in one process"
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import finish, free_port, history, ranks, start

from mdl_nbdev.base.settings import InferSettings
from mdl_nbdev.data.sounds import make_sounds
from mdl_nbdev.infer.run import infer

BIN = Path(sys.executable).parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
LAUNCHERS = {"torchrun": lambda: [*TORCHRUN, "--master-port", free_port()], "accelerate": lambda: [*ACCELERATE, "--main_process_port", free_port()]}


def run(command, code=0, **kw):
    done = subprocess.run([str(c) for c in command], env=ENV, capture_output=True, text=True, timeout=300, **kw)
    assert done.returncode == code, done.stderr[-4000:]
    return done


def together(argv, folder, world=1):
    "mdl_train as so many processes without a launcher; gives what they printed"
    runs = [start(argv, folder/f"log{i}", env=env) for i, env in enumerate(ranks(world) if world > 1 else [{}])]
    return "".join(finish(process, folder/f"log{i}") for i, process in enumerate(runs))


@pytest.fixture(scope="module")
def csv(tmp_path_factory): return make_sounds(tmp_path_factory.mktemp("sounds"), 60, seed=4)


def arguments(csv, **kw):
    "Steps of 8 rows, however they are cut; the last step of an epoch has 4"
    settings = dict(train_dataset=csv, eval_dataset=csv, base_dir=csv.parent, model_name="tiny", lr=2e-3, num_epochs=4, logging_steps=1, eval_steps=8, batch_size=8, save_steps=10)
    return [str(x) for k, v in (settings | kw).items() for x in (f"--{k}", v)]


@pytest.fixture(scope="module")
def whole(csv, tmp_path_factory):
    "The run in one process, and its answers"
    folder = tmp_path_factory.mktemp("whole")
    together([*arguments(csv), "--output", folder/"run"], folder)
    return folder/"run", answers(csv, folder/"run")


def answers(csv, out):
    infer(InferSettings(input=csv, base_dir=csv.parent, model_name=str(out/"final"), output=out/"answers.csv", max_new_tokens=16))
    return (out/"answers.csv").read_text()


def near(a, b, *names):
    for x, y in zip(history(a), history(b), strict=True):
        for name in names:
            if name in x: assert y[name] == pytest.approx(x[name], rel=2e-3), (x, y)


@pytest.mark.parametrize("launcher", ["none", *(pytest.param(name, marks=pytest.mark.slow) for name in LAUNCHERS)])
def test_two_processes_are_one(csv, whole, tmp_path, launcher):
    "Each gets half of every batch; started by a launcher, or with the environment that one sets"
    command = [*arguments(csv, batch_size=4), "--output", tmp_path/"run"]
    printed = together(command, tmp_path, 2) if launcher == "none" else run([*LAUNCHERS[launcher](), BIN/"mdl_train", *command]).stdout
    assert printed.count("the model is in") == 1, "one process speaks for all"
    near(whole[0], tmp_path/"run", "loss", "eval_loss", "grad_norm")
    assert answers(csv, tmp_path/"run") == whole[1]


FSDP = dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP", FSDP_RESHARD_AFTER_FORWARD="true")


@pytest.mark.slow
def test_fsdp_is_one(csv, whole, tmp_path):
    "Sharded weights and optimizer, on the CPU; then again from the middle, bit for bit"
    ENV.update(FSDP)
    script = Path(__file__).parent/"fsdp_on_cpu.py"
    try:
        command = [*LAUNCHERS["torchrun"](), script, *arguments(csv, batch_size=4), "--output", tmp_path/"run"]
        run(command)
        first, model = history(tmp_path/"run"), (tmp_path/"run"/"final"/"model.safetensors").read_bytes()
        for gone in ("final", "checkpoint-32", "checkpoint-30"): shutil.rmtree(tmp_path/"run"/gone)
        run([*command, "--resume_from_checkpoint", "true"])
    finally:
        for name in FSDP: del ENV[name]
    near(whole[0], tmp_path/"run", "loss", "eval_loss")
    a, b = (load_file(f/"final"/"model.safetensors") for f in (whole[0], tmp_path/"run"))
    assert set(a) == set(b) and all(torch.allclose(a[k], b[k], atol=1e-3) for k in a)
    assert history(tmp_path/"run") == first and (tmp_path/"run"/"final"/"model.safetensors").read_bytes() == model
    assert answers(csv, tmp_path/"run") == whole[1]


@pytest.fixture
def two_machines():
    "Two network namespaces with a cable between them; gives a function that runs a command in one of them"
    names, ip = ["mdl-a", "mdl-b"], lambda *args: subprocess.run(["ip", *args], check=True, capture_output=True)
    if not shutil.which("ip") or os.geteuid(): pytest.skip("needs root and iproute2")
    try: ip("netns", "add", names[0])
    except subprocess.CalledProcessError as e: pytest.skip(f"no network namespaces here: {e.stderr.decode()[:200]}")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", "veth-a", "netns", names[0], "type", "veth", "peer", "veth-b", "netns", names[1])
        for n, (name, dev) in enumerate(zip(names, ["veth-a", "veth-b"]), 1):
            for args in (["addr", "add", f"10.77.0.{n}/24", "dev", dev], ["link", "set", dev, "up"], ["link", "set", "lo", "up"]): ip("-n", name, *args)
        yield lambda n, command, **env: subprocess.Popen(["ip", "netns", "exec", names[n], *map(str, command)], env=ENV | {"GLOO_SOCKET_IFNAME": f"veth-{'ab'[n]}"} | env,
                                                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    finally:
        for name in names: subprocess.run(["ip", "netns", "del", name])


def children(pid): return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_two_machines(csv, whole, tmp_path, two_machines):
    "One rank each. One is killed: the other ends and says why. Both go on, and end as one process does"
    def launch(*more):
        for n in (0, 1):
            yield two_machines(n, [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", n, "--master-addr", "10.77.0.1", "--master-port", "29577",
                                   BIN/"mdl_train", *arguments(csv, batch_size=4, num_epochs=4), "--output", tmp_path/"run", *more])
    machines = list(launch())
    end = time.monotonic() + 120
    while not list((tmp_path/"run").glob("checkpoint-*")) and time.monotonic() < end: time.sleep(.05)
    rank, = children(machines[1].pid)
    os.kill(rank, signal.SIGKILL)
    said = [m.communicate(timeout=90)[0] for m in machines]
    assert all(m.returncode for m in machines)
    assert re.search(r"mdl_train: rank 0: another process of this run has ended or cannot be reached", said[0]), said[0][-3000:]
    machines = list(launch("--resume_from_checkpoint", "true"))
    said = [m.communicate(timeout=120)[0] for m in machines]
    assert not any(m.returncode for m in machines), said[0][-3000:]
    near(whole[0], tmp_path/"run", "loss", "eval_loss", "grad_norm")
    assert answers(csv, tmp_path/"run") == whole[1]
