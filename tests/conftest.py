"""Runs are real: the project's own scripts and bundled models, on a CPU, with no network."""

import contextlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
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


def run_script(script, *flags, cwd=ROOT, **kwargs):
    """Runs `python script flags` and returns the finished process, its output captured as text."""
    command = [sys.executable, str(ROOT / script) if (ROOT / script).exists() else script, *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False, **kwargs)


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


def read_metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
