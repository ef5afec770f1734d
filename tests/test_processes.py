"""Several processes end, fail and stop together, and share the work without losing or repeating any."""

import functools
import os
import re
import signal
import sys
import time

import pytest
from conftest import AS_A_USER, FAST, ROOT, fine, read_metrics, record_of, run_main, run_script, start_script, wait_for
from safetensors.torch import load_file

import common

pytestmark = pytest.mark.slow

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
run_two = functools.partial(run_script, launcher=TORCHRUN)


def grpo_with(path, code):
    """A script that runs grpo.py after some code of the test."""
    before = f"import os, signal, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport common, grpo, tyro\n"
    path.write_text(before + code + "\ncommon.run(grpo.main, tyro.cli(grpo.Args))\n")
    return path


@pytest.mark.parametrize(("problems", "launcher"), [(7, ACCELERATE), (1, TORCHRUN)])
def test_evaluation_is_shared_without_a_problem_lost_or_repeated(tmp_path, problems, launcher):
    """With 1 problem the second process has none. Without a GPU --multi_gpu starts gloo processes on the CPU."""
    flags = ["--num-samples", problems, "--max-new-tokens", 24, "--num-completions", 2, "--temperature", 1]
    done = fine(run_script("evaluate.py", *flags, "--output-dir", tmp_path / "two", launcher=launcher))
    assert "2 process(es)" in done.stdout
    fine(run_main("evaluate.py", *flags, "--output-dir", tmp_path / "one"))
    two, one = ((tmp_path / name / "results.jsonl").read_text() for name in ("two", "one"))
    assert two == one
    assert len(one.splitlines()) == 2 * problems


ENDS = {"make": "the judge is ill", "missing": "not mounted", "different": "have different data"}


@pytest.mark.parametrize(("function", "message"), ENDS.items())
def test_an_error_of_one_process_ends_all_with_its_message(tmp_path, judge, function, message):
    flags = [*FAST, "--dataset", judge.removesuffix("make") + function, "--output-dir", tmp_path / "run"]
    started, done = time.monotonic(), run_two("grpo.py", *flags, env=os.environ | {"FAILS_AT": "1"})
    assert done.returncode != 0
    assert message in done.stderr
    assert time.monotonic() - started < 60


POISON = """
loss, calls = grpo.grpo_loss, 0

def poisoned(*args, **options):
    global calls
    calls += 1
    value, metrics = loss(*args, **options)
    return (value * float("nan") if os.environ["RANK"] == "1" and calls > 3 else value), metrics

grpo.grpo_loss = poisoned
"""


def test_nan_on_one_process_stops_all_before_the_update(tmp_path):
    script = grpo_with(tmp_path / "poison.py", POISON)
    flags = ["--eval-steps", 0, "--batch-size", 4, "--num-steps", 9, "--saving-steps", 99, "--max-new-tokens", 24]
    done = run_two(script, *flags, "--output-dir", tmp_path / "run")
    assert done.returncode != 0
    assert record_of(tmp_path / "run")["num_processes"] == 2
    (step, *_) = re.findall(r"step (\d+): .*nan.*process 1\b", done.stderr)
    checkpoint, saved = common.newest_checkpoint(tmp_path / "run")
    assert saved == int(step) - 1
    assert checkpoint is not None
    assert all(t.isfinite().all() for t in load_file(checkpoint / "model.safetensors").values())
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, int(step)))


SHIFT = """
generate, shifts = common.HFEngine.generate, iter((0.0, 0.3, 1.0))

def shifted(self, *args, **options):  # wrong from the second rollout on, on one process
    by = next(shifts) if os.environ["RANK"] == "1" else 0.0
    completions = generate(self, *args, **options)
    return [common.Completion(c.token_ids, [v - by for v in c.logprobs], c.finish_reason) for c in completions]

common.HFEngine.generate = shifted
"""


def test_the_gap_of_one_process_is_measured_by_all_and_stops_all_at_that_step(tmp_path):
    """An engine whose weights no longer arrive is seen before the weights change; the last step is saved."""
    script = grpo_with(tmp_path / "shift.py", SHIFT)
    flags = [*FAST, "--batch-size", 4, "--num-steps", 4, "--saving-steps", 99]
    options = ["--max-logprob-gap", 0.29, "--output-dir", tmp_path / "run"]
    err = run_two(script, *flags, *options).stderr
    one, two = read_metrics(tmp_path / "run")  # the second goes on: the mean over all is smaller than 0.29
    assert one["policy/logprob_gap"] < 1e-3
    assert two["policy/logprob_gap_max"] == pytest.approx(0.3, abs=1e-3)
    assert 0.05 < two["policy/logprob_gap"] < 0.25
    assert re.search(r"error: trainer and engine differ by 0\.[3-7]", err)
    assert common.newest_checkpoint(tmp_path / "run")[1] == 2


SIGNAL_ITSELF = """
who, when, out = (sys.argv.pop(1) for _ in range(3))
rank = os.environ.get("RANK", who)  # a single process is the one that is meant
generate, decode, calls = common.HFEngine.generate, common.HFEngine.decode, -1  # its own check comes first

def one_by_one(self, *args, **options):
    self.max_tokens = 1
    return generate(self, *args, **options)

def counted(self, *args):
    global calls
    calls += 1
    with open(f"{out}-{rank}", "a") as file:
        file.write("x" * (calls > 0))
    if rank == who and calls == int(when):
        os.kill(os.getpid(), signal.SIGTERM)
    return decode(self, *args)

common.HFEngine.generate, common.HFEngine.decode = one_by_one, counted
"""
# One completion a generation batch: 8 batches a rollout, 4 an evaluation of 8 problems shared by two processes.
ONE_BY_ONE = ["--batch-size", 2, "--group-size", 4, "--max-new-tokens", 24, "--num-steps", 4, "--saving-steps", 100]
ONE_BY_ONE += ["--eval-samples", 8, "--eval-steps"]


PLACES = {  # which process gets it, --eval-steps, in which batch; the batches that are drawn, and the steps in the log
    "rollout": (1, 0, 8 + 8 + 3, 8 + 8 + 3, [1, 2]),
    "training": (0, 0, 8 + 8, 8 + 8, [1, 2]),  # nothing stops after the last batch of a rollout: its step is done
    "evaluation": (1, 2, 4 + 16 + 2, 4 + 16 + 4, [0, 1, 2]),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_signal_to_one_stops_all_after_the_step_or_between_two_batches_of_a_rollout(tmp_path, place):
    """In the rollout of step 3, in step 2, or in the evaluation after it, which ends first: step 2 is saved."""
    rank, eval_steps, at, batches, logged = PLACES[place]
    script = grpo_with(tmp_path / "itself.py", SIGNAL_ITSELF)
    flags = [*ONE_BY_ONE, eval_steps, "--output-dir", tmp_path / "run"]
    err = run_two(script, rank, at, tmp_path / "calls", *flags).stderr
    assert re.search(r"exitcode *: 143", err), err  # as the launcher reports it
    assert record_of(tmp_path / "run")["num_processes"] == 2
    assert [len((tmp_path / f"calls-{rank}").read_text()) for rank in (0, 1)] == [batches, batches]
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == logged
    assert ("eval/accuracy" in lines[-1]) == (place == "evaluation")
    assert common.newest_checkpoint(tmp_path / "run")[1] == 2


def test_a_run_stopped_in_a_rollout_goes_on_bit_for_bit(tmp_path):
    """From the last step that is done, or from before the first."""
    script, runs = grpo_with(tmp_path / "itself.py", SIGNAL_ITSELF), []
    for at in (10**6, 3, 8 + 3):  # the first is not stopped
        flags = [tmp_path / "calls", *ONE_BY_ONE, 0, "--output-dir", tmp_path / str(at), "--resume"]
        stopped = run_script(script, 0, at, *flags, env=AS_A_USER)
        assert (stopped.returncode, "Traceback" in stopped.stderr) == (143 if at < 100 else 0, False), stopped.stderr
        assert common.newest_checkpoint(tmp_path / str(at))[1] == (at // 8 if at < 100 else 4)
        fine(run_script(script, 0, 10**6, *flags, env=AS_A_USER))
        runs.append(load_file(tmp_path / str(at) / "final" / "model.safetensors"))
    assert all((runs[0][name] == run[name]).all() for run in runs[1:] for name in runs[0])


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_a_second_signal_stops_at_once(tmp_path, judge, signum, code):
    """In the middle of a step that would take for ever. (A shell reports a process ended by SIGTERM as 143.)"""
    judging = tmp_path / "judging"
    flags, env = ["--dataset", judge, "--output-dir", tmp_path / "run"], os.environ | {"SLEEPS_AFTER": str(judging)}
    process = start_script("grpo.py", *FAST, *flags, env=env)
    wait_for(judging.exists, process)
    process.send_signal(signum)
    assert "again stops at once" in process.stderr.readline() + process.stderr.readline()
    time.sleep(0.3)
    assert process.poll() is None  # the first one waits for the step
    process.send_signal(signum)
    _, err = process.communicate(timeout=10)
    assert process.returncode == code
    assert "Traceback" not in err
