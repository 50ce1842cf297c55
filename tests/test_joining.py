"Independent processes that share the rows of one table, whatever becomes of them"
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import training_runs
from waiting import until

import mdl_nbdev.base.claims as claims
import mdl_nbdev.infer.output as output
from mdl_nbdev.base.claims import Claims
from mdl_nbdev.base.command_line import from_args
from mdl_nbdev.base.errors import InputError
from mdl_nbdev.base.files import check_inputs
from mdl_nbdev.base.settings import InferSettings
from mdl_nbdev.data.sounds import make_sounds
from mdl_nbdev.infer.run import infer

ARGS = ["--model-name", "tiny", "--batch-size", "2", "--max-new-tokens", "4", "--num-workers", "1"] # 16 rows a shard


def be_impatient(): claims.BEAT, claims.SILENT = .2, 3


def table(folder, n):
    "Sounds, every eighth of which is missing"
    rows = [line.split(",") for line in make_sounds(folder, n).read_text().splitlines()[1:]]
    (folder/"rows.csv").write_text("audio,number\n" + "".join(f"{'lost.wav' if i % 8 == 5 else audio},{i}\n" for i, (audio, *_) in enumerate(rows)))


def start(folder, output, *args):
    log = folder/f"printed-{len(list(folder.glob('printed-*')))}"
    process = training_runs.start(["rows.csv", "--output", output, *ARGS, *args], log, "mdl_infer", folder, dict(OMP_NUM_THREADS="1"), be_impatient)
    process.log = log
    return process


def holders(folder): return training_runs.claim_holders((folder/"out.csv.part.claims").glob("*"))


def finish_together(folder, rows, world, n_killed):
    "Start processes, kill some and stop one, each in the middle of a shard; the others finish. Then the stopped one wakes up"
    table(folder, rows)
    whole = start(folder, "whole.csv")
    training_runs.finish(whole, whole.log, 2)
    running = [start(folder, "out.csv", "--join", "true") for _ in range(world)]
    def caught(sign):
        found = until(lambda: [p for p in running if p.pid in holders(folder)])[0]
        os.kill(found.pid, sign)
        running.remove(found)
        return found
    stopped = caught(signal.SIGSTOP)
    for _ in range(n_killed): caught(signal.SIGKILL)
    assert stopped.pid in holders(folder)
    codes = [(p.join(200), p.exitcode)[1] for p in running]
    for code, p in zip(codes, running): assert code in (0, 2), p.log.read_text()
    assert codes.count(2) == 1, "the one that put the output together reports the rejects"
    expected = {p.name.removeprefix("whole"): p.read_bytes() for p in folder.glob("whole.csv*")}
    def found(): return {p.name.removeprefix("out"): p.read_bytes() for p in folder.glob("out.csv*") if not p.name.endswith(".lock")}
    assert found() == expected and len(expected) == 2
    assert stopped.is_alive()
    os.kill(stopped.pid, signal.SIGCONT)
    training_runs.finish(stopped, stopped.log)
    assert found() == expected
    assert not list(folder.glob("*.lock")) and not list(folder.glob(".*"))


def test_one_of_three_is_stopped_and_one_killed(tmp_path): finish_together(tmp_path, 64, 3, 1)


@pytest.mark.slow
def test_twelve_processes_of_which_three_are_killed_and_one_is_stopped(tmp_path): finish_together(tmp_path, 960, 12, 3)


def test_a_process_that_joins_later_continues(tmp_path):
    "All are killed, which leaves claims and locks; the next one, which joins nobody, does not wait for them"
    table(tmp_path, 48)
    first = start(tmp_path, "out.csv", "--join", "true")
    until(lambda: [log for log in tmp_path.glob("out.csv.part-*.log") if log.stat().st_size])
    first.kill()
    first.join()
    assert list((tmp_path/"out.csv.part.claims").glob("*.0"))
    begin = time.monotonic()
    second = start(tmp_path, "out.csv", "--join", "true")
    text = training_runs.finish(second, second.log, 2)
    assert "answered before" in text
    assert time.monotonic() - begin < 60
    third = start(tmp_path, "out.csv", "--join", "true")
    assert "the output exists already" in training_runs.finish(third, third.log, 2)


def test_others_finish_while_a_shard_is_being_written(tmp_path, monkeypatch):
    "It has been taken over meanwhile, and the file that it would go into is gone"
    table(tmp_path, 32)
    digest, others = output.clips_digest, []
    def slow_digest(clips):
        if not others:
            others.append(start(tmp_path, "out.csv", "--join", "true"))
            training_runs.finish(others[0], others[0].log, 2)
        return digest(clips)
    monkeypatch.setattr(output, "clips_digest", slow_digest)
    monkeypatch.setattr(claims, "BEAT", 100)
    monkeypatch.chdir(tmp_path)
    infer(from_args(InferSettings, ["rows.csv", "--output", "out.csv", *ARGS, "--join", "true"], "mdl_infer"))
    assert len(others) == 1 and sorted(p.name for p in tmp_path.glob("out.csv*")) == ["out.csv", "out.csv.rejects.csv"]


def test_only_those_that_say_so_join(tmp_path):
    "A second start by accident is refused, whether the first one shares its run or not; and so is a run with other settings"
    table(tmp_path, 48)
    for first, second in [("false", "true"), ("true", "false")]:
        one = start(tmp_path, "out.csv", "--join", first)
        until(lambda pid=one.pid: pid in holders(tmp_path))
        os.kill(one.pid, signal.SIGSTOP)
        two = start(tmp_path, "out.csv", "--join", second)
        assert "another process is writing this" in training_runs.finish(two, two.log, 2)
        if first == "true":
            other = start(tmp_path, "out.csv", "--join", "true", "--seed", "7")
            assert "cannot be continued: --seed was 42 and is 7" in training_runs.finish(other, other.log, 2)
        os.kill(one.pid, signal.SIGCONT)
        training_runs.finish(one, one.log, 2)
        for path in tmp_path.glob("out.csv*"): path.unlink()


def test_files_of_others_vanish_while_inputs_are_checked(tmp_path, monkeypatch):
    stat = os.stat
    def late(path, **options):
        found = stat(path, **options)
        if str(path).endswith(".lock"): Path(path).unlink()
        return found
    for name in ("rows.csv", "out.csv.part.lock"): (tmp_path/name).touch()
    monkeypatch.setattr(os, "stat", late)
    check_inputs(tmp_path/"out.csv", [tmp_path/"rows.csv"], (".part.lock",))
    assert not (tmp_path/"out.csv.part.lock").exists()


@pytest.mark.parametrize("wrong", ["overwrite", "retry_rejects"])
def test_refused_together(wrong):
    with pytest.raises(InputError, match=f"--join: --{wrong.replace('_', '-')} is for one process"):
        InferSettings(input="a.csv", output="b.csv", model_name="tiny", join=True, **{wrong: True})


def test_a_claim_goes_to_one_process(tmp_path):
    "Eight processes at once; each piece is claimed exactly once"
    code = f"import sys; from mdl_nbdev.base.claims import Claims; c = Claims({str(tmp_path)!r}); input(); print(*[n for n in range(300) if c.take(n)]); sys.stdout.flush(); input()"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for p in processes: print(file=p.stdin, flush=True)
    taken = [int(n) for p in processes for n in p.stdout.readline().split()]
    assert sorted(taken) == list(range(300))
    for p in processes: p.communicate("\n", timeout=60)


def test_claims_that_are_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", .05)
    monkeypatch.setattr(claims, "SILENT", .6)
    with Claims(tmp_path) as alive, Claims(tmp_path) as dead, Claims(tmp_path) as other:
        alive.take(0), dead.take(1)
        dead.over.set()
        assert not other.take(0) and not other.take(1)
        time.sleep(.9)
        assert not other.take(0), "it gives signs of life"
        assert other.take(1) and not alive.take(1)
        other.longest = .1 # of its own pieces, so that the one that is held for a second is slow
        assert other.take(0)
        assert Claims(tmp_path/"missing").take(0) is False
        alive.drop(0)
        assert [p.name for p in sorted(tmp_path.iterdir())] == ["0.1", "1.0", "1.1"]
    assert not list(Path(tmp_path).iterdir())
