"""Answers in LaTeX: right ones are found, wrong ones refused, with and without Math-Verify, whatever a model writes."""

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, cases_in, read_rows

import envs
import grading
from envs import MathDataset, MathEnv, same_answer

CASES = read_rows(ROOT / "tests" / "grading.jsonl")


@pytest.fixture
def worker():
    """Runs already: its start is not what is timed."""
    pytest.importorskip("math_verify")
    assert grading.MATH_WORKER.ask("x", "x")
    return grading.MATH_WORKER


@pytest.fixture
def text_only(monkeypatch):
    monkeypatch.setattr(grading.MATH_WORKER, "works", False)


def is_right(number):
    return same_answer(rf"\sqrt{{{4 * number}}}", rf"2\sqrt{{{number}}}")


def test_verdicts_are_those_of_mathematics(worker):
    wrong = [case for case in CASES if same_answer(case["answer"], case["reference"]) != case["right"]]
    told = {line.split(" -> ")[0] for line in cases_in("deviations.txt")}  # and why
    assert {f"{case['reference']} | {case['answer']}" for case in wrong} == told


def test_as_text_no_wrong_answer_is_right(text_only):
    accepted = [case["right"] for case in CASES if same_answer(case["answer"], case["reference"])]
    assert set(accepted) == {True}
    assert same_answer("90", r"90^\circ")


@pytest.mark.parametrize("case", cases_in("spellings.txt"))
def test_spellings_of_one_answer_are_the_same_text(case, text_only):
    first, *others = re.split(" [!=]= ", case)
    for other in others:
        assert same_answer(first, other) == same_answer(other, first) == (" == " in case), other


HOSTILE = {row["name"]: row["parts"] for row in read_rows(ROOT / "tests" / "hostile.jsonl")}  # [text, how often]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_are_wrong_and_quick(name, worker, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    completion = "".join(text * count for text, count in HOSTILE[name])
    for answer in ("72", "some text", r"\sqrt{2}"):
        start = time.perf_counter()
        assert MathEnv([], answer).get_reward(completion) < 1.0
        assert time.perf_counter() - start < 4  # measured: 2.1 s, of which 2 are Math-Verify's where it hangs
    assert is_right(2)
    assert not list(tmp_path.iterdir())


def test_the_worker_evaluates_no_string_and_imports_no_torch(tmp_path):
    pytest.importorskip("math_verify")
    code = "import sys, math_worker as w; assert 'torch' not in sys.modules; w.sympy.sympify(sys.argv[1])"
    for text, returncode in (("5", 0), ("open('hacked', 'w')", 1)):
        run = {"cwd": tmp_path, "env": {"PYTHONPATH": str(ROOT)}, "stdin": subprocess.DEVNULL}
        assert subprocess.run([sys.executable, "-c", code, text], **run).returncode == returncode
        assert not list(tmp_path.iterdir())


def test_a_killed_worker_is_replaced_and_leaves_no_zombie(worker):
    killed = worker.process.pid
    os.kill(killed, signal.SIGKILL)
    is_right(2)  # may be wrong: the worker died
    assert is_right(2)
    with pytest.raises(ChildProcessError):
        os.waitpid(killed, os.WNOHANG)


def test_any_thread_may_ask_and_two_at_once(worker):
    def ask(number):
        return is_right(number), same_answer(rf"\sqrt{{{number}}}", rf"2\sqrt{{{number}}}")

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask, range(2, 42))) == [(True, False)] * 40


def test_a_forked_child_has_a_worker_of_its_own(worker):
    with worker.lock:  # as if another thread were asking
        child = os.fork()
        if child == 0:
            os._exit(0 if is_right(3) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert is_right(3)


@pytest.mark.parametrize("then", ["", "signal.alarm(1); w.ask('x', '9^{9^{9^9}}')"])
def test_the_worker_ends_with_its_parent_in_silence(then, worker):
    code = "import grading, signal; w = grading.MATH_WORKER; w.ask('x', 'x'); print(w.process.pid, flush=True); "
    done = subprocess.run([sys.executable, "-c", code + then], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    state = Path(f"/proc/{int(done.stdout)}/stat")
    deadline = time.monotonic() + 30
    while state.exists() and state.read_text().split()[2] != "Z":  # nobody may be there that buries an orphan
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_start_of_a_run_says_when_answers_are_compared_as_text(monkeypatch):
    latex = [MathEnv([], 1), envs.EnvBase([], "x"), MathEnv([], r"\sqrt{2}")]
    assert (envs.grader_note(latex) == "") == grading.MATH_WORKER.works
    monkeypatch.setattr(grading.MATH_WORKER, "works", False)
    assert envs.grader_note(MathDataset(20)) == ""
    assert "pip install math-verify" in envs.grader_note(latex)
    assert envs.grader_note([MathEnv([], 1)] * 1000 + latex) == ""
