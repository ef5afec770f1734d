"""The scripts run end to end as users run them, and a user's mistake is one line and exit code 2."""

import importlib.util
import json
import math
import sys
import types

import numpy as np
import pytest
import torch
from conftest import FAST, ROOT, read_metrics, run_main, run_script

import common
import evaluate
import grpo
from envs import MathDataset

METRICS = {"loss/total", "loss/policy", "reward/mean", "reward/std", "reward/zero_std_frac", "policy/entropy"}
METRICS |= {"policy/ratio_mean", "policy/clip_frac", "policy/logprob_gap", "policy/computed_frac"}
METRICS |= {"completion/length_mean", "completion/truncated_frac", "optim/lr", "optim/grad_norm"}
TIMES = {"time/rollout", "time/train", "time/step", "perf/tokens_per_second", "perf/peak_memory_gb"}
SMALL = ["--num-steps", 2, "--batch-size", 2, "--max-new-tokens", 24, "--eval-samples", 4]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_grpo_writes_its_folder_and_says_how_it_goes(tmp_path):
    folder = tmp_path / "run"
    options = ["--kl-penalty", 0.1, "--ppo-steps", 2, "--loss-type", "dr_grpo", "--mask-truncated"]
    done = run_script("grpo.py", *SMALL, *options, "--gradient-checkpointing", "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert METRICS | TIMES | {"loss/kl"} <= set(lines[1])
    assert lines[1]["policy/logprob_gap"] < 1e-4  # HF generates with the trainer's own weights
    record = json.loads((folder / "args.json").read_text())
    assert (record["learning_rate"], record["num_processes"], record["correction"]) == (3e-4, 1, "none")
    assert (record["compute_dtype"], record["resumed_from"]) == ("torch.float32", None)
    assert record["attention"].startswith("packed batches")
    assert record["versions"]["torch"] == torch.__version__
    completions = read(folder / "completions.jsonl")
    assert [c["step"] for c in completions] == [1] * 8 + [2] * 8  # the first prompt's group of each step
    assert set(completions[0]) == {"step", "prompt", "completion", "reward", "finish_reason"}
    names = ["args.json", "completions.jsonl", "final", "metrics.jsonl", "step_2"]
    assert sorted(path.name for path in folder.iterdir()) == names
    told = done.stdout.splitlines()
    assert told[0] == f"run        {folder} · 1 process(es) on cpu"
    (step,) = (line for line in told if line.startswith("1/2"))
    assert f"reward {lines[1]['reward/mean']:.3g}  loss {lines[1]['loss/total']:.3g}" in step
    before, after = (lines[n]["eval/accuracy"] for n in (0, 2))
    for number, accuracy in ((0, before), (2, after)):
        assert any(line.startswith(f"{number}/2  held out: accuracy {accuracy:.4g}") for line in told)
    assert f"before/after eval/accuracy {before:.4f} -> {after:.4f}" in told


def test_pairs_are_divided_once_and_steps_between_log_only_what_was_evaluated(tmp_path):
    args = grpo.Args(output_dir=str(tmp_path / "run"), logging_steps=2, num_samples=4, eval_steps=0)
    run = common.Run(args, "grpo.py", None, None, bundled_lr=1.0, real_lr=1.0)
    run.started = 0.0  # no `begin`: it takes over the signals
    run.log(1, {"reward/mean": (torch.tensor(3.0), 4), "optim/lr": 0.5, "loss/kl": (0.0, 0)}, [{"completion": "a"}])
    run.log(3, {"reward/mean": (1, 2)}, [{"completion": "b"}])
    run.log(5, {"reward/mean": (1, 2), "eval/accuracy": 0.25})
    one, other = read_metrics(run.folder)
    assert (one["step"], one["reward/mean"], one["optim/lr"]) == (1, 0.75, 0.5)
    assert one.get("loss/kl", 0) == 0  # nothing was counted
    assert other == {"step": 5, "eval/accuracy": 0.25}
    assert read(run.folder / "completions.jsonl") == [{"step": 1, "completion": "a"}]


def test_a_tracker_that_fails_turns_itself_off_and_the_log_goes_on(tmp_path, capsys):
    class Broken:
        def log(self, *_, **__):
            raise ConnectionError("no route to host")

    args = grpo.Args(output_dir=str(tmp_path / "run"), num_samples=4, eval_steps=0, learning_rate=0.0)
    run = common.Run(args, "grpo.py", None, None, bundled_lr=1.0, real_lr=1.0)
    run.started, run.wandb = 0.0, Broken()
    for step in (1, 2):
        run.log(step, {"optim/lr": 0.5})
    assert [line["step"] for line in read_metrics(run.folder)] == [1, 2]
    told = capsys.readouterr().out
    assert told.count("wandb is off from here on") == 1
    assert "--learning-rate is 0: nothing will be learned" in told


def test_group_of_equal_rewards_everywhere_means_no_update(tmp_path):
    code = "from envs import EnvBase\nclass Same(EnvBase):\n    def get_reward(self, completion):\n        return 0.1\n"
    code += "def make():\n    return [Same([{'role': 'user', 'content': str(i)}]) for i in range(4)]\n"
    (tmp_path / "same.py").write_text(code)
    done = run_main("grpo.py", *FAST, "--dataset", f"{tmp_path}/same.py:make", "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("warning    most groups teach nothing") == 1
    before, after = (common.load_model(str(n), torch.device("cpu")) for n in ("tiny", tmp_path / "run" / "step_2"))
    assert all(torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True))


def test_a_given_chat_template_is_used_and_saved(tmp_path):
    mine = tmp_path / "mine.jinja"
    mine.write_text("{% for m in messages %}{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}assistant>")
    done = run_main("grpo.py", *FAST, "--chat-template", mine, "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "final" / "chat_template.jinja").read_text() == mine.read_text()


def test_evaluate_writes_results_and_agrees_with_the_trainer_on_the_same_problems(tmp_path):
    flags = ["--num-samples", 6, "--num-completions", 3, "--temperature", 1, "--max-new-tokens", 24]
    done = run_main("evaluate.py", *flags, "--output-dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    results = read(tmp_path / "out" / "results.jsonl")
    assert [(r["problem"], r["sample"]) for r in results] == [(i, k) for i in range(6) for k in range(3)]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["eval/accuracy"] == pytest.approx(sum(r["reward"] >= 1 for r in results) / 18)
    assert metrics["eval/accuracy_low"] <= metrics["eval/accuracy"] <= metrics["eval/accuracy_high"]
    assert metrics["eval/pass@1"] == pytest.approx(metrics["eval/accuracy"])
    assert metrics["eval/pass@3"] >= metrics["eval/pass@2"] >= metrics["eval/pass@1"]
    assert "eval/pass@2" in done.stdout
    assert run_main("grpo.py", *SMALL, "--eval-samples", 20, "--output-dir", tmp_path / "run").returncode == 0
    flags = ["--num-samples", 20, "--max-new-tokens", 24, "--output-dir", tmp_path / "greedy"]
    assert run_main("evaluate.py", *flags).returncode == 0
    metrics = json.loads((tmp_path / "greedy" / "metrics.json").read_text())
    assert metrics["eval/accuracy"] == read_metrics(tmp_path / "run")[0]["eval/accuracy"]


def test_two_evaluations_are_compared_problem_by_problem(tmp_path):
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    flags = ["--max-new-tokens", 24, "--num-samples", 40, "--output-dir"]
    assert run_main("evaluate.py", *flags, one).returncode == 0
    flags = ["--model", "tiny-teacher", "--compare", one / "results.jsonl", *flags]
    done = run_main("evaluate.py", *flags, two)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((two / "metrics.json").read_text())
    before, after = (np.array([r["reward"] >= 1 for r in read(f / "results.jsonl")], float) for f in (one, two))
    assert metrics["compare/accuracy"] == pytest.approx(before.mean())
    assert metrics["compare/difference"] == pytest.approx((after - before).mean())
    width = metrics["compare/difference_high"] - metrics["compare/difference_low"]
    assert width == pytest.approx(2 * 1.96 * np.std(after - before) / 40**0.5, rel=0.2)  # of the paired differences
    assert "compared   accuracy" in done.stdout
    for more in (["--num-samples", 39], ["--seed", 2], ["--max-val", 9], ["--compare", one / "metrics.json"]):
        done = run_main("evaluate.py", *flags, other, *more)
        reason = "not the results.jsonl" if "--compare" in more else "problem"
        assert (done.returncode, done.stderr.count("\n"), reason in done.stderr) == (2, 1, True)
    assert not other.exists()


def test_pass_at_k_by_hand():
    for n, c, k, value in ((4, 0, 2, 0.0), (4, 4, 1, 1.0), (4, 1, 1, 0.25), (4, 1, 2, 0.5), (4, 2, 2, 5 / 6)):
        assert evaluate.pass_at_k(n, c, k) == pytest.approx(value)


def test_main_takes_datasets_from_python_and_wandb_gets_what_the_log_does(tmp_path, monkeypatch):
    started, logged = [], []
    fake = types.SimpleNamespace(init=lambda **options: started.append(options) or fake)
    fake.log = lambda metrics, step: logged.append({"step": step} | metrics)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    args = grpo.Args(num_steps=1, batch_size=2, max_new_tokens=24, output_dir=str(tmp_path / "run"), enable_wandb=True)
    grpo.main(args, MathDataset(3), MathDataset(5, split="eval"))
    assert "eval/accuracy" in logged[0]
    assert logged == read_metrics(tmp_path / "run")
    assert (started[0]["project"], started[0]["name"], started[0]["resume"]) == ("grpo", "run", "allow")


def shift_logprobs(monkeypatch, nats):
    """The engine says that it held each token less likely, by so many nats."""
    generate = common.HFEngine.generate

    def shifted(self, *args, **kwargs):
        completions = generate(self, *args, **kwargs)
        return [common.Completion(c.token_ids, [v - nats for v in c.logprobs], c.finish_reason) for c in completions]

    monkeypatch.setattr(common.HFEngine, "generate", shifted)


@pytest.mark.parametrize("script", ["grpo.py", "onpolicy_distill.py"])
def test_an_engine_that_differs_from_the_trainer_is_measured_and_stops_the_first_step(script, tmp_path, monkeypatch):
    shift_logprobs(monkeypatch, 0.2)
    done = run_main(script, *FAST, "--output-dir", tmp_path / "far")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "trainer and engine differ by 0.2 nats a token, --max-logprob-gap is 0.1" in done.stderr
    assert not (tmp_path / "far" / "metrics.jsonl").exists()
    assert not list(tmp_path.glob("far/step_*"))
    assert run_main(script, *FAST, "--output-dir", tmp_path / "wide", "--max-logprob-gap", 0.21).returncode == 0
    for line in read_metrics(tmp_path / "wide"):
        assert line["policy/logprob_gap"] == pytest.approx(0.2, abs=1e-4)
        assert line["policy/logprob_gap_max"] == pytest.approx(0.2, abs=1e-4)
        assert line["policy/engine_ratio"] == pytest.approx(math.exp(0.2), abs=1e-4)


def test_the_correction_reaches_the_gradient(tmp_path, monkeypatch):
    """Twice as likely for the trainer as for the engine, each token weighs twice: so does the gradient."""
    shift_logprobs(monkeypatch, math.log(2))
    norms = {}
    for correction, cap in (("none", 8), ("token", 8), ("token", 1.5), ("sequence", 4)):
        folder = tmp_path / f"{correction}-{cap}"
        flags = ["--is-correction", correction, "--is-cap", cap, "--max-logprob-gap", "inf", "--output-dir", folder]
        assert run_main("grpo.py", *FAST, "--num-steps", 1, "--batch-size", 8, *flags).returncode == 0
        assert json.loads((folder / "args.json").read_text())["correction"] == correction
        norms[correction, cap] = read_metrics(folder)[0]["optim/grad_norm"]
    plain = norms["none", 8]
    assert plain > 0
    assert norms["token", 8] == pytest.approx(2 * plain, rel=1e-4)
    assert norms["token", 1.5] == pytest.approx(1.5 * plain, rel=1e-4)
    assert norms["sequence", 4] == pytest.approx(4 * plain, rel=1e-4)  # of any completion of two tokens or more


# ---- Mistakes

MISTAKES = {  # flags, or the text of a dataset; and what the line says
    "unknown model": (["--model", "no/such-model"], "cannot load"),
    "folder without a model": (["--model", str(ROOT / "tests")], "cannot load"),
    "no answer": ('{"prompt": "a", "target": "b"}', "row 0 has no reward"),
    "long prompt": (json.dumps({"prompt": "a" * 600, "answer": 1}), "the prompt of row 0 has 6"),
    "group of 1": (["--group-size", 1], "--group-size is 1"),
    "bad JSON": (["--chat-template-args", "{"], "--chat-template-args {"),
    "arguments of another engine": (["--vllm-args", '{"seed": 1}'], "add --engine vllm"),
    "flash-attn on a CPU": (["--attn", "flash_attention_2"], "--attn flash_attention_2 needs a GPU, bf16"),
    "ranges of another dataset": (["--dataset", "gsm8k", "--operand", "add"], "--operand"),
    "folder in the way": (["--output-dir", str(ROOT / "README.md")], "README.md"),
    "resume of nothing": (["--resume", "--output-dir", "None"], "--resume needs --output-dir"),
}
if importlib.util.find_spec("vllm") is None:
    MISTAKES["no vLLM"] = ["--engine", "vllm"], "--engine vllm: not installed: pip install vllm"


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_code_2(name, tmp_path):
    flags, reason = MISTAKES[name]
    if isinstance(flags, str):
        (tmp_path / "data.jsonl").write_text(flags)
        flags = ["--dataset", tmp_path / "data.jsonl"]
    done = run_main("grpo.py", *FAST, "--output-dir", tmp_path / "run", *flags)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "Loading weights" not in line]
    assert line.startswith("error: ")
    assert reason in line
    assert not (tmp_path / "run" / "args.json").exists()


def test_in_a_real_terminal_a_mistake_leaves_no_traceback_and_a_bug_does():
    for script, flags in (("evaluate.py", ["--model", "no/such-model"]), ("sft.py", ["--operand", "pow"])):
        done = run_script(script, *flags)
        assert done.returncode == 2, (script, flags, done.stderr)
        assert "Traceback" not in done.stdout + done.stderr
    with pytest.raises(ZeroDivisionError):
        common.run(lambda args: 1 / args, 0)
