"""Several processes end, fail and stop together, and share the work without losing or repeating any."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import AS_A_USER, FAST, ROOT, read_metrics, run_main, run_script
from safetensors.torch import load_file
from test_invariance import GRPO, launch

import common

pytestmark = pytest.mark.slow

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]


def start_two(script, *flags, launcher=TORCHRUN):
    command = [*launcher, str(script), *map(str, flags)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def world_size(folder):
    return json.loads((folder / "args.json").read_text())["num_processes"]


def test_accelerate_launch_starts_two(tmp_path):
    """By Accelerate's own launcher; without a GPU --multi_gpu starts gloo processes on the CPU. Others: by torchrun."""
    flags = [*FAST[2:6], "--eval-samples", 4, "--max-new-tokens", 24, "--logging-steps", 1, "--saving-steps", 1]
    done = start_two(ROOT / "grpo.py", *flags, "--output-dir", tmp_path / "run", launcher=ACCELERATE)
    _, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    assert world_size(tmp_path / "run") == 2
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [0, 1, 2]
    assert common.newest_checkpoint(tmp_path / "run")[1] == 2


def test_completions_of_two_processes_are_those_of_one_with_twice_the_batch(tmp_path):
    drawn = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        flags = [*GRPO, "--batch-size", str(8 // processes), "--max-new-tokens", "24"]
        launch([{"name": "run", "script": "grpo", "flags": flags}], folder, processes=processes)
        parts = [load_file(folder / f"run-{rank}.safetensors") for rank in range(processes)]
        drawn[processes] = {k: t.tolist() for part in parts for k, t in part.items() if k.startswith("completion")}
    assert len(drawn[1]) == 32
    assert drawn[1] == drawn[2]


@pytest.mark.parametrize("problems", [7, 1])
def test_evaluation_is_shared_without_a_problem_lost_or_repeated(tmp_path, problems):
    """With 1 problem the second process has none."""
    flags = ["--num-samples", problems, "--max-new-tokens", 24, "--num-completions", 2, "--temperature", 1]
    done = start_two(ROOT / "evaluate.py", *flags, "--output-dir", tmp_path / "two")
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    assert "2 process(es)" in out
    assert run_main("evaluate.py", *flags, "--output-dir", tmp_path / "one").returncode == 0
    two, one = ((tmp_path / name / "results.jsonl").read_text() for name in ("two", "one"))
    assert two == one
    assert len(one.splitlines()) == 2 * problems


BROKEN = """
import os
from dataclasses import dataclass
from envs import EnvBase

@dataclass
class Broken(EnvBase):
    def get_reward(self, completion):
        if os.environ["RANK"] == "1":
            raise RuntimeError("the judge of rank 1 is ill")
        return float(len(completion) % 2)

def make():
    return [Broken([{"role": "user", "content": f"What is {a} + 1?"}], answer=a + 1) for a in range(20)]

def missing():
    if os.environ["RANK"] == "1":
        from envs import UserError
        raise UserError("the disk of rank 1 is not mounted")
    return make()

def different():
    return make()[int(os.environ["RANK"]) :]
"""


ENDS = {"make": "the judge of rank 1 is ill", "missing": "not mounted", "different": "have different data"}


@pytest.mark.parametrize(("function", "message"), ENDS.items())
def test_an_error_of_one_process_ends_all_with_its_message(tmp_path, function, message):
    (tmp_path / "mine.py").write_text(BROKEN)
    started = time.monotonic()
    flags = [*FAST, "--dataset", f"{tmp_path / 'mine.py'}:{function}", "--output-dir", tmp_path / "run"]
    done = start_two(ROOT / "grpo.py", *flags)
    _, err = done.communicate(timeout=120)
    assert done.returncode != 0
    assert message in err
    assert time.monotonic() - started < 60


def test_a_mistake_of_the_user_is_told_once(tmp_path):
    done = start_two(ROOT / "grpo.py", "--group-size", 1)
    _, err = done.communicate(timeout=120)
    assert done.returncode != 0
    assert err.count("error: --group-size is 1") == 1
    assert 'grpo.py", line' not in err  # torchrun adds a traceback of its own, the script none


POISON = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import common, grpo, tyro
loss = grpo.grpo_loss
calls = 0

def poisoned(*args, **options):
    global calls
    calls += 1
    value, metrics = loss(*args, **options)
    return (value * float("nan") if os.environ["RANK"] == "1" and calls > 3 else value), metrics

grpo.grpo_loss = poisoned
common.run(grpo.main, tyro.cli(grpo.Args))
"""


def test_nan_on_one_process_stops_all_before_the_update(tmp_path):
    (tmp_path / "poison.py").write_text(POISON)
    flags = ["--eval-steps", 0, "--batch-size", 4, "--num-steps", 9, "--saving-steps", 99, "--max-new-tokens", 24]
    done = start_two(tmp_path / "poison.py", *flags, "--output-dir", tmp_path / "run")
    _, err = done.communicate(timeout=120)
    assert done.returncode != 0
    assert world_size(tmp_path / "run") == 2
    (step, *_) = re.findall(r"step (\d+): .*nan.*process 1\b", err)
    checkpoint, saved = common.newest_checkpoint(tmp_path / "run")
    assert saved == int(step) - 1
    assert checkpoint is not None
    assert all(t.isfinite().all() for t in load_file(checkpoint / "model.safetensors").values())
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, int(step)))


SHIFT = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import common, grpo, tyro
generate, ends, shifts = common.HFEngine.generate, sys.argv.pop(1), iter((0.0, 0.3, 1.0))

def shifted(self, *args, **options):  # wrong from the second rollout on, on one process
    by = next(shifts) if os.environ["RANK"] == "1" else 0.0
    completions = generate(self, *args, **options)
    return [common.Completion(c.token_ids, [v - by for v in c.logprobs], c.finish_reason) for c in completions]

def main(args):
    try:
        grpo.main(args)
    except common.UserError as error:
        open(f"{{ends}}-{{os.environ['RANK']}}", "w").write(str(error))
        raise

common.HFEngine.generate = shifted
common.run(main, tyro.cli(grpo.Args))
"""


def test_the_gap_of_one_process_is_measured_by_all_and_stops_all_at_that_step(tmp_path):
    """An engine whose weights no longer arrive is seen at any step, before the weights change."""
    (tmp_path / "shift.py").write_text(SHIFT)
    flags = [*FAST, "--batch-size", 4, "--num-steps", 4, "--saving-steps", 1]
    options = ["--max-logprob-gap", 0.29, "--output-dir", tmp_path / "run"]
    _, err = start_two(tmp_path / "shift.py", tmp_path / "end", *flags, *options).communicate(timeout=120)
    one, two = read_metrics(tmp_path / "run")  # the second goes on: the mean over all is smaller than 0.29
    assert one["policy/logprob_gap"] < 1e-3
    assert two["policy/logprob_gap_max"] == pytest.approx(0.3, abs=1e-3)
    assert 0.05 < two["policy/logprob_gap"] < 0.25
    assert re.search(r"error: trainer and engine differ by 0\.[3-7]", err)
    assert (tmp_path / "end-0").read_text() == (tmp_path / "end-1").read_text() in err
    assert common.newest_checkpoint(tmp_path / "run")[1] == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_stops_all_after_the_step_is_saved(tmp_path, rank):
    run = tmp_path / "run"
    flags = ["--eval-steps", 0, "--batch-size", 2, "--num-steps", 500, "--saving-steps", 500, "--max-new-tokens", 24]
    launcher = start_two(ROOT / "grpo.py", *flags, "--output-dir", run)
    while not (run / "metrics.jsonl").exists() or len(read_metrics(run)) < 2:
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True, check=True)
    workers = {}
    for pid in map(int, children.stdout.split()):
        with open(f"/proc/{pid}/environ", "rb") as file:
            variables = dict(pair.split(b"=", 1) for pair in file.read().split(b"\0") if b"=" in pair)
        workers[int(variables[b"RANK"])] = pid
    os.kill(workers[rank], signal.SIGTERM)
    launcher.communicate(timeout=60)
    assert world_size(run) == 2
    steps = [line["step"] for line in read_metrics(run)]
    assert len(steps) < 500
    assert common.newest_checkpoint(run)[1] == steps[-1]


SIGNAL_ITSELF = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import common, grpo, tyro
when, out = int(sys.argv.pop(1)), sys.argv.pop(1)
rank = int(os.environ.get("RANK", 1))  # a single process is the one that is meant
generate, decode, calls = common.HFEngine.generate, common.HFEngine.decode, -1  # its own check comes first

def one_by_one(self, *args, **options):
    self.max_tokens = 1
    return generate(self, *args, **options)

def counted(self, *args):
    global calls
    calls += 1
    with open(f"{{out}}-{{rank}}", "a") as file:
        file.write("x" * (calls > 0))
    if rank == 1 and calls == when:
        os.kill(os.getpid(), signal.SIGTERM)
    return decode(self, *args)

common.HFEngine.generate, common.HFEngine.decode = one_by_one, counted
common.run(grpo.main, tyro.cli(grpo.Args))
"""
# One completion a generation batch: 8 batches a rollout, 4 an evaluation of 8 problems shared by two processes.
ONE_BY_ONE = ["--batch-size", 2, "--group-size", 4, "--max-new-tokens", 24, "--num-steps", 4, "--saving-steps", 100]
ONE_BY_ONE += ["--eval-samples", 8, "--eval-steps"]


@pytest.mark.parametrize(
    ("place", "eval_steps", "at", "batches", "logged"),
    [("rollout", 0, 8 + 8 + 3, 8 + 8 + 3, [1, 2]), ("evaluation", 2, 4 + 16 + 2, 4 + 16 + 4, [0, 1, 2])],
)
def test_a_signal_to_one_stops_all_between_two_batches_of_a_rollout(tmp_path, place, eval_steps, at, batches, logged):
    """In the rollout of step 3, or in the evaluation after step 2, which ends first: step 2 is saved, and no more."""
    (tmp_path / "itself.py").write_text(SIGNAL_ITSELF)
    flags = [*ONE_BY_ONE, eval_steps, "--output-dir", tmp_path / "run"]
    done = start_two(tmp_path / "itself.py", at, tmp_path / "calls", *flags)
    _, err = done.communicate(timeout=120)
    assert re.search(r"exitcode *: 143", err), err  # as the launcher reports it
    assert world_size(tmp_path / "run") == 2
    assert [len((tmp_path / f"calls-{rank}").read_text()) for rank in (0, 1)] == [batches, batches]
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == logged
    assert ("eval/accuracy" in lines[-1]) == (place == "evaluation")
    assert common.newest_checkpoint(tmp_path / "run")[1] == 2


def test_a_run_stopped_in_a_rollout_goes_on_bit_for_bit(tmp_path):
    """From the last step that is done, or from before the first."""
    (tmp_path / "itself.py").write_text(SIGNAL_ITSELF)

    def run(name, batch, *more):
        flags = [batch, tmp_path / "calls", *ONE_BY_ONE, 0, "--output-dir", tmp_path / name, *more]
        done = run_script(str(tmp_path / "itself.py"), *flags, env=AS_A_USER)
        assert "Traceback" not in done.stderr
        assert done.returncode == (143 if batch < 100 else 0), done.stderr
        return common.newest_checkpoint(tmp_path / name)[1]

    assert run("straight", 10**6) == 4
    for step in (0, 1):
        assert run(f"stopped-{step}", 8 * step + 3) == step
        assert run(f"stopped-{step}", 10**6, "--resume") == 4
        files = (tmp_path / name / "final" / "model.safetensors" for name in ("straight", f"stopped-{step}"))
        one, two = map(load_file, files)
        assert all((one[name] == two[name]).all() for name in one)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_a_second_signal_stops_at_once(tmp_path, signum, code):
    """In the middle of a step that would take for ever. (A shell reports a process ended by SIGTERM as 143.)"""
    (tmp_path / "slow.py").write_text("""
import pathlib, time
from envs import EnvBase

class Slow(EnvBase):
    def get_reward(self, completion):
        pathlib.Path(__file__).with_name("judging").touch()
        time.sleep(600)
        return float(len(completion) % 2)

def make():
    return [Slow([{"role": "user", "content": f"What is {a} + 1?"}], answer=1) for a in range(4)]
""")
    flags = [*FAST, "--dataset", f"{tmp_path / 'slow.py'}:make", "--output-dir", str(tmp_path / "run")]
    command = [sys.executable, str(ROOT / "grpo.py"), *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "judging").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signum)
    assert "again stops at once" in process.stderr.readline() + process.stderr.readline()
    time.sleep(0.3)
    assert process.poll() is None  # the first one waits for the step
    process.send_signal(signum)
    _, err = process.communicate(timeout=10)
    assert process.returncode == code
    assert "Traceback" not in err


def test_running_out_of_memory_names_the_one_knob(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(common, "backward", full)
    done = run_main("sft.py", *FAST[:6], "--output-dir", tmp_path / "run")
    assert done.returncode == 2, done.stderr
    line = done.stderr.strip()
    assert re.fullmatch(r"error: .*2\.00 GiB\.\W.*lower --micro-batch-tokens.*gradient stays the same", line)
