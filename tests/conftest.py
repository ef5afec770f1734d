"""Runs are real: the project's own scripts and bundled models, on a CPU, with no network."""

import contextlib
import functools
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two tests run at a time; threads that wait for each other spin

import pytest
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import chat
import common
import grpo

# With all threads there are. Those that wait sleep: two tests run at a time, and spinning would take the other's cores.
AS_A_USER = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
AS_A_USER |= {"OMP_WAIT_POLICY": "passive"}
FAST = ["--eval-steps", "0", "--batch-size", "2", "--num-steps", "2", "--max-new-tokens", "24"]


@pytest.fixture(scope="session")
def tokenizer():
    return chat.load_tokenizer("tiny")


@pytest.fixture(scope="session")
def tiny():
    """The bundled model in float32. Do not train it: it is shared."""
    return common.load_model("tiny", torch.device("cpu"))


@pytest.fixture(autouse=True)
def no_modules_are_left(monkeypatch):
    """Of files that a test wrote: the next one may write others of the same name."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if "/pytest-of-" in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


@pytest.fixture
def make_run(tmp_path):
    """A real `Run` of grpo.py, as its start-up leaves it."""

    def make(**flags):
        flags = {"output_dir": str(tmp_path / "run"), "eval_steps": 0, "num_samples": 4} | flags
        return common.Run(grpo.Args(**flags), "grpo.py", None, None, bundled_lr=1.0, real_lr=1.0)

    return make


@pytest.fixture
def judge(tmp_path):
    """A copy: a module of its own, whose calls are counted from 1."""
    return f"{shutil.copy(ROOT / 'tests' / 'judge.py', tmp_path / 'mine.py')}:make"


def start_script(script, *flags, launcher=(sys.executable,), start=subprocess.Popen, **options):
    """Starts `python script flags`, its output piped as text."""
    options = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return start([*launcher, str(ROOT / script), *map(str, flags)], **options)


run_script = functools.partial(start_script, start=subprocess.run, timeout=300)  # to its end: the finished process


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def fine(done):
    """It did end with exit code 0; the run itself."""
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def mistake(done):
    """The one line that tells the user's mistake; the exit code is 2."""
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "Loading weights" not in line]
    assert line.startswith("error: ")
    return line


def run_main(script, *flags):
    """The same within this process, which has imported the libraries already: that is most of a short run's time."""
    module, out, err, code = importlib.import_module(script.removesuffix(".py")), io.StringIO(), io.StringIO(), 0
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            common.run(module.main, tyro.cli(module.Args, args=[*map(str, flags)]))
        except SystemExit as ending:
            code = ending.code
        except Exception:
            traceback.print_exc()
            code = 1
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    return subprocess.CompletedProcess(flags, code, out.getvalue(), err.getvalue())


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write_rows(path, *rows):
    """Text as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def read_metrics(folder):
    return read_rows(Path(folder) / "metrics.jsonl")


def record_of(folder):
    return json.loads((Path(folder) / "args.json").read_text())


def cases_in(name):
    """Of a table of cases, tests/name."""
    return (ROOT / "tests" / name).read_text().splitlines()
