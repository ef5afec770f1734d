"""training_guide/plot.py: runs that differ in their seed are one line and its spread, others have their own."""

import json
import sys

import matplotlib.image
import numpy as np
import pytest
from conftest import ROOT, run_script

sys.path.insert(0, str(ROOT / "training_guide"))

import plot


@pytest.fixture
def folder(tmp_path):
    def make(name, values, **flags):
        (tmp_path / name).mkdir()
        flags = {"script": "grpo", "batch_size": 2, "num_processes": 3, "group_size": 4} | flags
        (tmp_path / name / "args.json").write_text(json.dumps(flags))
        lines = [{"step": step, "eval/accuracy": value} for step, value in values.items()]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return tmp_path / name

    return make


def test_runs_are_grouped_by_all_but_the_seed_and_named_by_what_differs(folder):
    for seed in (1, 2):
        folder(f"a{seed}", {0: 0.0}, seed=seed, lr=1, output_dir=f"a{seed}")
    folder("b", {0: 0.0}, seed=1, lr=2)
    for model in ("x", "y"):
        one = folder(f"c{model}", {0: 0.0}, seed=1, script="sft", model=f"runs/{model}/final")
    groups = plot.group([plot.load(path) for path in sorted(one.parent.iterdir())])
    sizes = {"grpo lr 1 (2 seeds)": 2, "grpo lr 2": 1, "sft model runs/x/final": 1, "sft model runs/y/final": 1}
    assert {label: len(runs) for label, runs in groups.items()} == sizes


def test_a_line_is_the_mean_in_a_band_of_all_runs(folder):
    runs = [plot.load(folder(str(n), values)) for n, values in enumerate(({0: 1.0, 5: 3.0, 7: 9.0}, {0: 2.0, 5: 6.0}))]
    at, mean, smallest, largest = plot.curve(runs, "eval/accuracy", "step", 1)
    assert at.tolist() == [0, 5]  # where every run has a value
    assert (mean.tolist(), smallest.tolist(), largest.tolist()) == ([1.5, 4.5], [1.0, 3.0], [2.0, 6.0])
    at, *_ = plot.curve(runs, "eval/accuracy", "samples", 1)
    assert at.tolist() == [0, 5 * 2 * 4 * 3]


def test_smoothing_is_a_mean_of_the_steps_before_and_leaves_evaluations_alone(folder):
    run = plot.load(folder("a", {1: 1.0, 2: 3.0, 3: 5.0}))
    assert plot.curve([run], "eval/accuracy", "step", 2)[1].tolist() == [1.0, 3.0, 5.0]
    run.lines = [{"step": line["step"], "reward/mean": line["eval/accuracy"]} for line in run.lines]
    assert plot.curve([run], "reward/mean", "step", 2)[1].tolist() == [1.0, 2.0, 4.0]


def test_a_picture_of_a_run_that_goes_on_is_drawn_and_a_wrong_folder_or_metric_is_one_line(folder, tmp_path):
    run, picture = folder("a", {0: 0.5, 5: 0.75}), tmp_path / "curves.png"
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 10, "eval/acc')
    done = run_script("training_guide/plot.py", run, tmp_path, "--output", picture)  # the second is left out
    assert done.returncode == 0, done.stderr
    assert "1 of 2 folders" in done.stdout
    assert np.asarray(matplotlib.image.imread(picture)).std() > 0.01  # not a blank page
    for flags, reason in (([tmp_path / "none"], "is the folder of a run"), ([run, "--metrics", "a"], "no run has a")):
        done = run_script("training_guide/plot.py", *flags, "--output", picture)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")
        assert reason in line
