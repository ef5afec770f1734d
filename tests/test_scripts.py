"""The scripts run end to end as users run them, and a user's mistake is one line and exit code 2."""

import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import sys
import types
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import FAST, ROOT, cases_in, fine, mistake, read_metrics, read_rows, record_of, run_main, run_script

import common
import evaluate

METRICS = common.SHOWN.keys() - {"loss/reverse_kl"} | {"loss/policy", "policy/ratio_mean", "policy/clip_frac"}
METRICS |= {"reward/std", "policy/computed_frac", "perf/tokens_per_second", "perf/peak_memory_gb"}


def test_grpo_writes_its_folder_and_says_how_it_goes(tmp_path):
    folder = tmp_path / "run"
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}assistant>")
    options = ["--kl-penalty", 0.1, "--ppo-steps", 2, "--loss-type", "dr_grpo", "--mask-truncated"]
    options += ["--gradient-checkpointing", "--chat-template", template, "--eval-steps", 2, "--eval-samples", 4]
    done = fine(run_main("grpo.py", *FAST, *options, "--output-dir", folder))
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[1].keys() >= METRICS
    assert lines[1]["policy/logprob_gap"] < 1e-4  # HF generates with the trainer's own weights
    record = record_of(folder)
    assert (record["learning_rate"], record["num_processes"], record["correction"]) == (3e-4, 1, "none")
    assert (record["compute_dtype"], record["resumed_from"]) == ("torch.float32", None)
    assert record["attention"].startswith("packed batches")
    assert record["versions"]["torch"] == torch.__version__
    completions = read_rows(folder / "completions.jsonl")
    assert [c["step"] for c in completions] == [1] * 8 + [2] * 8  # the first prompt's group of each step
    assert [*completions[0]][1:] == ["prompt", "completion", "reward", "advantage", "finish_reason", "no_gradient"]
    names = ["args.json", "completions.jsonl", "final", "metrics.jsonl", "step_2"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert (folder / "final" / "chat_template.jinja").read_text() == template.read_text()
    before, after = (lines[n]["eval/accuracy"] for n in (0, 2))
    first = f"reward {lines[1]['reward/mean']:.3g}  loss {lines[1]['loss/total']:.3g}"
    assert re.search(rf"^1/2  \d+ min left  {re.escape(first)}", done.stdout, re.MULTILINE)
    assert f"before/after eval/accuracy {before:.4f} -> {after:.4f}" in done.stdout


def test_the_log_divides_pairs_once_and_goes_on_without_wandb(make_run, monkeypatch, capsys):
    """A tracker gets what the log does until it fails. Steps between two of --logging-steps log what was evaluated."""
    started, logged = [], []

    def log(metrics, step):
        if step > 1:
            raise ConnectionError("no route to host")
        logged.append({"step": step} | metrics)

    fake = types.SimpleNamespace(init=lambda **options: started.append(options) or fake, log=log, Table=dict)
    fake.config, fake.__spec__ = types.SimpleNamespace(update=lambda *_, **__: None), "it is installed"
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = make_run(enable_wandb=True, logging_steps=2)
    run.begin()
    run.log(1, {"reward/mean": (torch.tensor(3.0), 4), "optim/lr": 0.5, "loss/kl": (0.0, 0)}, [{"completion": "a"}])
    run.log(3, {"reward/mean": (1, 2)}, [{"completion": "b"}])
    run.log(5, {"reward/mean": (1, 2), "eval/accuracy": 0.25})
    run.log(7, {"eval/accuracy": 0.5})
    one, *others = read_metrics(run.folder)
    assert (one["step"], one["reward/mean"], one["optim/lr"]) == (1, 0.75, 0.5)
    assert one.get("loss/kl", 0) == 0  # nothing was counted
    assert others == [{"step": 5, "eval/accuracy": 0.25}, {"step": 7, "eval/accuracy": 0.5}]
    assert read_rows(run.folder / "completions.jsonl") == [{"step": 1, "completion": "a"}]
    assert (started[0]["project"], started[0]["name"], started[0]["resume"]) == ("grpo", "run", "allow")
    one["completions"] = {"columns": ["step", "completion"], "data": [[1, "a"]], "allow_mixed_types": True}
    assert (logged, capsys.readouterr().out.count("wandb is off from here on")) == ([one], 1)


def test_runs_that_differ_in_their_seed_are_one_line_of_a_plot(make_run, tmp_path):
    """Their problems differ, too: math draws them by the seed."""
    for seed in 1, 2:
        run = make_run(seed=seed, output_dir=str(tmp_path / f"seed{seed}"))
        run.begin()
        run.log(0, {"eval/accuracy": 0.5})
    done = fine(run_script("training_guide/plot.py", *tmp_path.glob("seed*"), "--output", tmp_path / "curves.png"))
    assert done.stdout.endswith(": 2 of 2 folders, 1 lines\n")


def test_evaluate_writes_results_and_what_they_come_to(tmp_path):
    flags = ["--num-samples", 6, "--num-completions", 3, "--temperature", 1, "--max-new-tokens", 24]
    done = fine(run_main("evaluate.py", *flags, "--output-dir", tmp_path / "out"))
    results = read_rows(tmp_path / "out" / "results.jsonl")
    assert [(r["problem"], r["sample"]) for r in results] == [(i, k) for i in range(6) for k in range(3)]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["eval/accuracy"] == pytest.approx(sum(r["reward"] >= 1 for r in results) / 18)
    assert metrics["eval/accuracy_low"] <= metrics["eval/accuracy"] <= metrics["eval/accuracy_high"]
    assert metrics["eval/pass@1"] == pytest.approx(metrics["eval/accuracy"])
    assert metrics["eval/pass@3"] >= metrics["eval/pass@2"] >= metrics["eval/pass@1"]
    assert "eval/pass@2" in done.stdout


def test_two_evaluations_are_compared_problem_by_problem_and_one_agrees_with_the_trainers(tmp_path):
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    flags = ["--max-new-tokens", 24, "--num-samples", 40, "--output-dir"]
    fine(run_main("evaluate.py", *flags, one))
    flags = ["--model", "tiny-teacher", "--compare", one / "results.jsonl", *flags]
    done = fine(run_main("evaluate.py", *flags, two))
    metrics = json.loads((two / "metrics.json").read_text())
    before, after = (np.array([r["reward"] >= 1 for r in read_rows(f / "results.jsonl")], float) for f in (one, two))
    assert metrics["compare/accuracy"] == pytest.approx(before.mean())
    fine(run_main("grpo.py", *FAST, "--eval-steps", 2, "--eval-samples", 40, "--output-dir", tmp_path / "run"))
    assert metrics["compare/accuracy"] == read_metrics(tmp_path / "run")[0]["eval/accuracy"]
    assert metrics["compare/difference"] == pytest.approx((after - before).mean())
    width = metrics["compare/difference_high"] - metrics["compare/difference_low"]
    assert width == pytest.approx(2 * 1.96 * np.std(after - before) / 40**0.5, rel=0.2)  # of the paired differences
    assert "compared   accuracy" in done.stdout
    for more in (["--num-samples", 39], ["--seed", 2], ["--max-val", 9]):
        assert "problem" in mistake(run_main("evaluate.py", *flags, other, *more))
    told = mistake(run_main("evaluate.py", *flags, other, "--compare", one / "metrics.json"))
    assert "not the results.jsonl" in told
    assert not other.exists()


def test_pass_at_k_by_hand():
    for n, c, k, value in ((4, 0, 2, 0.0), (4, 4, 1, 1.0), (4, 1, 1, 0.25), (4, 1, 2, 0.5), (4, 2, 2, 5 / 6)):
        assert evaluate.pass_at_k(n, c, k) == pytest.approx(value)


def shift_logprobs(monkeypatch, nats):
    """The engine says that it held each token less likely, by so many nats."""
    generate = common.HFEngine.generate

    def shifted(self, *args, **kwargs):
        completions = generate(self, *args, **kwargs)
        return [common.Completion(c.token_ids, [v - nats for v in c.logprobs], c.finish_reason) for c in completions]

    monkeypatch.setattr(common.HFEngine, "generate", shifted)


@pytest.mark.parametrize("script", ["grpo.py", "onpolicy_distill.py"])
def test_an_engine_that_differs_from_the_trainer_stops_the_first_step(script, tmp_path, monkeypatch):
    shift_logprobs(monkeypatch, 0.2)
    told = mistake(run_main(script, *FAST, "--output-dir", tmp_path / "far"))
    assert "trainer and engine differ by 0.2 nats a token, --max-logprob-gap is 0.1" in told
    assert not (tmp_path / "far" / "metrics.jsonl").exists()
    assert not list(tmp_path.glob("far/step_*"))


def test_the_gap_is_measured_and_the_correction_reaches_the_gradient(tmp_path, monkeypatch):
    """Twice as likely for the trainer as for the engine, each token weighs twice: so does the gradient."""
    shift_logprobs(monkeypatch, math.log(2))
    norms = {}
    for correction, cap in (("none", 2), ("token", 8), ("token", 1.5), ("sequence", 4)):
        folder = tmp_path / f"{correction}-{cap}"
        flags = ["--is-correction", correction, "--is-cap", cap, "--max-logprob-gap", "inf", "--output-dir", folder]
        fine(run_main("grpo.py", *FAST, "--num-steps", 1, "--batch-size", 4, *flags))
        assert record_of(folder)["correction"] == correction
        (line,) = read_metrics(folder)
        gap, largest = line["policy/logprob_gap"], line["policy/logprob_gap_max"]
        assert (gap, largest, line["policy/engine_ratio"]) == pytest.approx((math.log(2), math.log(2), 2), abs=1e-4)
        norms[correction, cap] = line["optim/grad_norm"]
    plain = norms["none", 2]
    assert plain > 0
    assert norms["token", 8] == pytest.approx(2 * plain, rel=1e-4)
    assert norms["token", 1.5] == pytest.approx(1.5 * plain, rel=1e-4)
    assert norms["sequence", 4] == pytest.approx(4 * plain, rel=1e-4)  # of any completion of two tokens or more


@pytest.mark.parametrize("case", cases_in("mistakes.txt"))
def test_a_mistake_is_one_line_and_code_2(case, tmp_path, monkeypatch):
    flags, _, reason = case.rpartition(" -> ")
    if flags.startswith("--engine vllm") and importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is there")
    monkeypatch.chdir(ROOT)
    assert reason in mistake(run_main("grpo.py", *FAST, "--output-dir", tmp_path / "run", *shlex.split(flags)))
    assert not (tmp_path / "run" / "args.json").exists()


@pytest.mark.parametrize("case", cases_in("broken_models.txt"))
def test_a_broken_model_folder_is_one_line(tmp_path, case):
    """A file has another text or, where there is none, is missing; or config.json has other settings."""
    name, text, told = re.fullmatch(r"(\S+): (.*) -> (.*)", case).groups()
    path = shutil.copytree(common.BUNDLED["tiny"], tmp_path / "model") / name
    if name == "config.json":
        text = json.dumps(json.loads(path.read_text()) | json.loads(text))
    path.write_text(text)
    if not text:
        path.unlink()
    done = run_main("sft.py", *FAST[:6], "--model", tmp_path / "model", "--output-dir", tmp_path / "run")
    assert told in mistake(done)


def test_in_a_real_terminal_a_mistake_leaves_no_traceback_and_a_bug_does():
    assert "unset them" in mistake(run_script("grpo.py", env=os.environ | {"LOCAL_RANK": "0"}))  # of a launcher
    done = run_main("sft.py", "--operand", "pow")
    assert (done.returncode, "Traceback" in done.stdout + done.stderr) == (2, False)
    with pytest.raises(ZeroDivisionError):
        common.run(lambda args: 1 / args, 0)


@pytest.mark.parametrize("full", [lambda *_: torch.empty(10**14), Mock(side_effect=torch.OutOfMemoryError("of 4 GB"))])
def test_running_out_of_memory_names_the_one_knob(tmp_path, monkeypatch, full):
    monkeypatch.setattr(common, "backward", full)
    told = mistake(run_main("sft.py", *FAST[:6], "--output-dir", tmp_path / "run"))
    assert re.search(r"(allocate 4\d+ bytes|of 4 GB).* lower --micro-batch-tokens", told)
