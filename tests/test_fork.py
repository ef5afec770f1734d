"""The fork that training_guide/fork.md shows: the page's diff applies, is RLOO, and trains."""

import difflib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import FAST, ROOT, run_script

PAGE = (ROOT / "training_guide" / "fork.md").read_text()


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """A folder with grpo.py copied and patched by the very commands of the page."""
    folder = tmp_path_factory.mktemp("fork")
    shutil.copy(ROOT / "grpo.py", folder)
    (folder / "training_guide").mkdir()
    shutil.copy(ROOT / "training_guide" / "fork.md", folder / "training_guide")
    commands = re.search(r"```bash\n(   cp grpo.py rloo.py\n.*?)   ```", PAGE, re.DOTALL)
    subprocess.run(["bash", "-ec", commands[1]], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def rloo(fork):
    spec = importlib.util.spec_from_file_location("rloo", fork / "rloo.py")
    module = sys.modules["rloo"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_diff_is_as_short_as_the_page_says(fork):
    old, new = ((fork / name).read_text().splitlines() for name in ("grpo.py", "rloo.py"))
    changes = [line[:2] for line in difflib.ndiff(old, new)]
    assert (changes.count("- "), changes.count("+ ")) == (5, 5)
    assert "Five lines of `grpo.py` change" in PAGE


def test_gradient_is_that_of_reinforce_with_a_leave_one_out_baseline(rloo):
    torch.manual_seed(0)
    rewards = torch.rand(2, 3, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]])
    logprobs = torch.randn(6, 3, dtype=torch.float64).requires_grad_()
    advantages = rloo.group_advantages(rewards, "none").flatten()
    options = {"clip_eps": 0.2, "clip_eps_high": 0.28, "loss_type": rloo.Args().loss_type}
    loss, _ = rloo.grpo_loss(logprobs, logprobs.detach(), advantages, mask, denominator=6, **options)
    ours = torch.autograd.grad(loss, logprobs)[0]
    baseline = torch.stack([(rewards[p].sum() - rewards[p, g]) / 2 for p in range(2) for g in range(3)])
    reinforce = -((rewards.flatten() - baseline) * (logprobs * mask).sum(1)).mean()
    torch.testing.assert_close(ours, torch.autograd.grad(reinforce, logprobs)[0])


def test_the_fork_trains_under_its_own_name(fork, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = run_script(str(fork / "rloo.py"), *FAST, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    (record,) = (tmp_path / "runs").glob("rloo-tiny-*/args.json")
    assert json.loads(record.read_text())["loss_type"] == "rloo"
    assert (record.parent / "final" / "model.safetensors").exists()
