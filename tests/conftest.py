"""Runs are real: the project's own scripts and bundled models, on a CPU, with no network."""

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common

FAST = ["--eval-steps", "0", "--batch-size", "2", "--num-steps", "2", "--max-new-tokens", "24"]


@pytest.fixture(scope="session")
def tokenizer():
    return common.load_tokenizer("tiny")


@pytest.fixture(scope="session")
def tiny():
    """The bundled model in float32. Do not train it: it is shared."""
    return common.load_model("tiny", torch.device("cpu"), "sdpa")


def run_script(script, *flags, cwd=ROOT, **kwargs):
    """Runs `python script flags` and returns the finished process, its output captured as text."""
    command = [sys.executable, str(ROOT / script) if (ROOT / script).exists() else script, *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False, **kwargs)


def read_metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
