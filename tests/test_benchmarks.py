"""Benchmarks run on this revision; those for a GPU run dry on a CPU, in small shapes, without a failure."""

import json
import runpy
import sys

import pytest
import torch
from conftest import FAST, ROOT, read_metrics

import common


def run(monkeypatch, script, *args):
    """As the program of this process, without a GPU; what it changes for good is put back."""
    for engine in (common.HFEngine, common.VLLMEngine):
        monkeypatch.setattr(engine, "generate", engine.generate)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "gpu")
    runpy.run_path(f"{ROOT}/benchmarks/{script}", run_name="__main__")


def test_checks_for_a_gpu_pass_on_a_cpu(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="False"):  # none failed
        run(monkeypatch, "gpu/correct.py", tmp_path)
    results = json.loads((tmp_path / "correct.json").read_text())
    assert sum(result["pass"] is True for result in results) > 15
    assert not any(result["pass"] is False for result in results)


def test_figures_for_a_gpu_run_on_a_cpu(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="False"):
        run(monkeypatch, "gpu/figures.py", "0.5B", 60, tmp_path)
    rows = json.loads((tmp_path / "figures-0.5B.json").read_text())
    assert {row["name"].split()[0].strip(",") for row in rows} == {"sft", "grpo", "rollout", "distillation"}
    assert all(row["s"] > 0 for row in rows)


def test_completions_of_forced_length_do_not_stop(monkeypatch, tmp_path):
    run(monkeypatch, "forced_length.py", "grpo", *FAST, "--output-dir", tmp_path)
    assert [line["completion/length_mean"] for line in read_metrics(tmp_path)] == [24.0, 24.0]
