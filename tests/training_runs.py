"Commands as processes of their own, for tests that kill, stop and compare them"
import json
import multiprocessing
import os
import random
import socket
from pathlib import Path

from waiting import until

context = multiprocessing.get_context("forkserver") # forks of a process that has imported everything: a run starts in a second
context.set_forkserver_preload(["mdl_nbdev.train.fit", "mdl_nbdev.infer.run"])


def _run(command, argv, log, folder, env, prepare):
    import sys

    import torch

    from mdl_nbdev.cli import commands
    sys.stdout = sys.stderr = open(log, "a", buffering=1)
    os.environ.update(env)
    os.chdir(folder)
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True) # a command's own workers start as they would without this server
    if prepare: prepare()
    getattr(commands, command)(argv)


def start(argv, log, command="mdl_train", folder=".", env=(), prepare=None):
    "A command with some arguments, in a folder and with variables of its environment, after a call of `prepare`; what it prints goes to the file `log`"
    Path(log).touch() # a run that is killed at once has printed nothing
    process = context.Process(target=_run, args=(command, [str(a) for a in argv], log, folder, dict(env), prepare))
    process.start()
    return process


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def ranks(world):
    "The environment of each process of one run, as a launcher sets it"
    together = dict(WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    return [dict(RANK=str(r), LOCAL_RANK=str(r), **together) for r in range(world)]


def finish(process, log, code=0):
    "Wait for a run and see that it ended as it should; gives what it printed"
    process.join(600)
    text = Path(log).read_text()
    assert process.exitcode == code, text[-3000:]
    assert "Traceback" not in text, text[-3000:]
    return text


def wait_until(condition, process, seconds=300):
    "Wait until something holds, or the process has ended"
    until(lambda: not process.is_alive() or condition(), seconds, .001)


def claim_holders(files):
    "The processes that hold these claims"
    pids = set()
    for path in files:
        try: pids.add(int(path.read_text().split()[1]))
        except (OSError, IndexError): pass
    return pids


def kill_later(process, most):
    "Kill -9 within some seconds"
    process.join(random.Random(os.urandom(8)).uniform(0, most))
    process.kill()
    process.join()


def history(run):
    "What the run's metrics say, without what depends on the clock"
    clock = ("time", "samples_per_second", "runtime", "steps_per_second", "peak_memory_gib")
    lines = [json.loads(line) for line in (run/"metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in m.items() if not k.endswith(clock)} for m in lines if "train_loss" not in m]


def weights(run): return {p.name: p.read_bytes() for p in sorted((run/"final").glob("*.safetensors"))}
