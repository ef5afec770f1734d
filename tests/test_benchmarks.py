"""Benchmarks run on this revision; those for a GPU run dry on a CPU, in small shapes, without a failure."""

import json
import os

from conftest import FAST, fine, read_metrics, run_script

ON_CPU = os.environ | {"CUDA_VISIBLE_DEVICES": ""}


def test_checks_for_a_gpu_pass_on_a_cpu(tmp_path):
    done = fine(run_script("benchmarks/gpu/correct.py", tmp_path, env=ON_CPU))
    results = json.loads((tmp_path / "correct.json").read_text())
    assert sum(result["pass"] is True for result in results) > 15
    assert "FAIL" not in done.stdout


def test_figures_for_a_gpu_run_on_a_cpu(tmp_path):
    fine(run_script("benchmarks/gpu/figures.py", "0.5B", 60, tmp_path, env=ON_CPU))
    rows = json.loads((tmp_path / "figures-0.5B.json").read_text())
    assert {row["name"].split()[0].strip(",") for row in rows} == {"sft", "grpo", "rollout", "distillation"}
    assert all(row["s"] > 0 for row in rows)


def test_completions_of_forced_length_do_not_stop(tmp_path):
    fine(run_script("benchmarks/forced_length.py", "grpo", *FAST, "--output-dir", tmp_path))
    assert [line["completion/length_mean"] for line in read_metrics(tmp_path)] == [24.0, 24.0]
