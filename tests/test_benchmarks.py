"""Benchmarks run on this revision; those for a GPU run dry on a CPU, in small shapes, without a failure."""

import json
import runpy
import sys

import pytest
import torch
from conftest import FAST, ROOT, read_metrics

import common


@pytest.fixture
def run(monkeypatch):
    """Runs the script as the program of this process; what it changes for good is put back."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for engine in (common.HFEngine, common.VLLMEngine):
        monkeypatch.setattr(engine, "generate", engine.generate)

    def run(script, *args):
        path = ROOT / "benchmarks" / script
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, args)])
        monkeypatch.syspath_prepend(path.parent)
        runpy.run_path(str(path), run_name="__main__")

    return run


def test_checks_for_a_gpu_pass_on_a_cpu(run, tmp_path):
    with pytest.raises(SystemExit, match="False"):  # none failed
        run("gpu/correct.py", tmp_path)
    results = json.loads((tmp_path / "correct.json").read_text())
    assert sum(result["pass"] is True for result in results) > 15
    assert not any(result["pass"] is False for result in results)


def test_figures_for_a_gpu_run_on_a_cpu(run, tmp_path):
    with pytest.raises(SystemExit, match="False"):
        run("gpu/figures.py", "0.5B", 60, tmp_path)
    rows = json.loads((tmp_path / "figures-0.5B.json").read_text())
    assert {row["name"].split()[0].strip(",") for row in rows} == {"sft", "grpo", "rollout", "distillation"}
    assert all(row["s"] > 0 for row in rows)


def test_completions_of_forced_length_do_not_stop(run, tmp_path):
    run("forced_length.py", "grpo", *FAST, "--output-dir", tmp_path)
    assert [line["completion/length_mean"] for line in read_metrics(tmp_path)] == [24.0, 24.0]
