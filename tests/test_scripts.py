"""The scripts run end to end as users run them, and a user's mistake is one line and exit code 2."""

import importlib.util
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import FAST, ROOT, read_metrics, run_main, run_script

import common
import evaluate
import grpo

METRICS = {
    f"{space}/{name}"
    for space, names in {
        "loss": "total policy",
        "reward": "mean std zero_std_frac",
        "policy": "entropy ratio_mean clip_frac logprob_gap computed_frac",
        "completion": "length_mean truncated_frac",
        "optim": "lr grad_norm",
        "time": "rollout train step",
        "perf": "tokens_per_second peak_memory_gb",
    }.items()
    for name in names.split()
}


def test_grpo_writes_its_folder(tmp_path):
    folder = tmp_path / "run"
    flags = ["--num-steps", 2, "--batch-size", 2, "--max-new-tokens", 24, "--eval-samples", 4, "--output-dir", folder]
    options = ["--kl-penalty", 0.1, "--ppo-steps", 2, "--loss-type", "dr_grpo", "--mask-truncated"]
    done = run_script("grpo.py", *flags, *options, "--gradient-checkpointing")
    assert done.returncode == 0, done.stderr
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert METRICS | {"loss/kl"} <= set(lines[1])
    assert lines[1]["policy/logprob_gap"] < 1e-4  # HF generates with the trainer's own weights
    assert "eval/accuracy" in lines[0]
    assert "eval/accuracy" in lines[2]
    record = json.loads((folder / "args.json").read_text())
    assert (record["learning_rate"], record["num_processes"], record["attention"]) == (3e-4, 1, "sdpa")
    assert (record["compute_dtype"], record["resumed_from"]) == ("torch.float32", None)
    completions = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert [c["step"] for c in completions] == [1] * 8 + [2] * 8  # the first prompt's group of each step
    assert set(completions[0]) == {"step", "prompt", "completion", "reward", "advantage", "finish_reason"}
    assert sorted(p.name for p in folder.iterdir()) == [
        *("args.json", "completions.jsonl", "final", "metrics.jsonl", "step_2")
    ]
    assert "before/after eval/accuracy" in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 400


def test_on_policy_ratio_is_one_and_step_one_is_what_the_seed_says(tmp_path):
    runs = []
    for name, budget in (("a", 4096), ("b", 200)):  # cut differently
        flags = [*FAST, "--output-dir", tmp_path / name, "--micro-batch-tokens", budget]
        assert run_main("grpo.py", *flags).returncode == 0
        runs.append(read_metrics(tmp_path / name)[0])
    one, two = runs
    assert one["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    assert one["policy/clip_frac"] == 0
    for name in METRICS - {m for m in METRICS if m.startswith(("time/", "perf/"))}:
        assert one[name] == pytest.approx(two[name], rel=1e-3, abs=1e-5), name


def test_group_of_equal_rewards_everywhere_means_no_update(tmp_path):
    code = "from envs import EnvBase\nclass Same(EnvBase):\n    def get_reward(self, completion):\n        return 0.1\n"
    code += "def make():\n    return [Same([{'role': 'user', 'content': str(i)}]) for i in range(4)]\n"
    (tmp_path / "same.py").write_text(code)
    flags = [*FAST, "--dataset", f"{tmp_path}/same.py:make", "--output-dir", tmp_path / "run", "--num-steps", 6]
    done = run_main("grpo.py", *flags)
    assert done.returncode == 0, done.stderr
    assert "no gradient: of 2 groups, 0 all right, 2 all wrong" in done.stdout
    assert done.stdout.count("warning    most groups teach nothing") == 1  # after five steps in a row, once
    before = common.load_model("tiny", torch.device("cpu"), "sdpa")
    after = common.load_model(str(tmp_path / "run" / "step_6"), torch.device("cpu"), "sdpa")
    assert all(torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True))
    assert read_metrics(tmp_path / "run")[0]["reward/zero_std_frac"] == 1


def test_a_given_chat_template_is_used_and_saved(tmp_path):
    mine = tmp_path / "mine.jinja"
    mine.write_text("{% for m in messages %}{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}assistant>")
    for script in ("sft.py", "grpo.py", "onpolicy_distill.py"):
        flags = [*(FAST if script != "sft.py" else FAST[:-2]), "--chat-template", mine, "--max-val", 9]
        done = run_main(script, *flags, "--output-dir", tmp_path / script)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / script / "final" / "chat_template.jinja").read_text() == mine.read_text()
    flags = ["--model", tmp_path / "grpo.py" / "final", "--num-samples", 2, "--max-new-tokens", 4]
    done = run_main("evaluate.py", *flags, "--output-dir", tmp_path / "out", "--chat-template", mine)
    assert done.returncode == 0, done.stderr
    done = run_main("evaluate.py", *flags, "--output-dir", tmp_path / "out", "--chat-template", tmp_path / "none")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_evaluate_writes_results(tmp_path):
    flags = ["--num-samples", 6, "--num-completions", 3, "--temperature", 1, "--max-new-tokens", 24]
    done = run_main("evaluate.py", *flags, "--output-dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [(r["problem"], r["sample"]) for r in results] == [(i, k) for i in range(6) for k in range(3)]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["eval/accuracy"] == pytest.approx(sum(r["reward"] >= 1 for r in results) / 18)
    assert metrics["eval/accuracy_low"] <= metrics["eval/accuracy"] <= metrics["eval/accuracy_high"]
    assert metrics["eval/pass@1"] == pytest.approx(metrics["eval/accuracy"])
    assert metrics["eval/pass@3"] >= metrics["eval/pass@2"] >= metrics["eval/pass@1"]
    assert "eval/pass@2" in done.stdout


def test_two_evaluations_are_compared_problem_by_problem(tmp_path):
    flags = ["--num-samples", 40, "--max-new-tokens", 24]
    assert run_main("evaluate.py", *flags, "--output-dir", tmp_path / "one").returncode == 0
    results = tmp_path / "one" / "results.jsonl"
    flags = ["--model", "tiny-teacher", "--max-new-tokens", 24, "--compare", results]
    done = run_main("evaluate.py", *flags, "--num-samples", 40, "--output-dir", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    one, two = (
        [json.loads(line)["reward"] >= 1 for line in (tmp_path / name / "results.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert metrics["compare/accuracy"] == pytest.approx(sum(one) / 40)
    assert metrics["compare/difference"] == pytest.approx((sum(two) - sum(one)) / 40)
    assert metrics["compare/difference_low"] <= metrics["compare/difference"] <= metrics["compare/difference_high"]
    paired = metrics["compare/difference_high"] - metrics["compare/difference_low"]
    spread = np.std(np.array(two, float) - np.array(one, float)) / 40**0.5
    assert paired == pytest.approx(2 * 1.96 * spread, rel=0.2)  # the bootstrap's is that of the paired differences
    assert "compared   accuracy" in done.stdout
    for other in (["--num-samples", 39], ["--num-samples", 40, "--seed", 2], ["--num-samples", 40, "--max-val", 9]):
        done = run_main("evaluate.py", *flags, *other, "--output-dir", tmp_path / "three")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "problem" in done.stderr
    done = run_main("evaluate.py", "--compare", tmp_path / "one" / "metrics.json", "--output-dir", tmp_path / "three")
    assert (done.returncode, "not the results.jsonl" in done.stderr) == (2, True)
    assert not (tmp_path / "three").exists()


def test_trainer_and_evaluate_agree_on_the_same_problems(tmp_path):
    flags = ["--batch-size", 2, "--num-steps", 1, "--max-new-tokens", 24, "--eval-samples", 20]
    assert run_main("grpo.py", *flags, "--output-dir", tmp_path / "run").returncode == 0
    flags = ["--num-samples", 20, "--max-new-tokens", 24, "--output-dir", tmp_path / "out"]
    assert run_main("evaluate.py", *flags).returncode == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["eval/accuracy"] == read_metrics(tmp_path / "run")[0]["eval/accuracy"]


@pytest.mark.parametrize(
    ("n", "c", "k", "value"), [(4, 0, 2, 0.0), (4, 4, 1, 1.0), (4, 1, 1, 0.25), (4, 1, 2, 0.5), (4, 2, 2, 5 / 6)]
)
def test_pass_at_k_by_hand(n, c, k, value):
    assert evaluate.pass_at_k(n, c, k) == pytest.approx(value)
    with pytest.raises(ValueError, match="pass@k"):
        evaluate.pass_at_k(n, c, n + 1)


def test_a_copied_script_is_a_script_of_its_own(tmp_path):
    for file in ("grpo.py", "common.py", "envs.py"):
        shutil.copy(ROOT / file, tmp_path / ("mine.py" if file == "grpo.py" else file))
    shutil.copytree(ROOT / "models", tmp_path / "models")
    done = run_script(str(tmp_path / "mine.py"), *FAST, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("mine-tiny-")
    assert json.loads((folder / "args.json").read_text())["script"] == "mine"


def test_main_takes_datasets_from_python(tmp_path, monkeypatch):
    from envs import MathDataset

    args = grpo.Args(num_steps=1, batch_size=2, max_new_tokens=24, output_dir=str(tmp_path / "run"))
    grpo.main(args, MathDataset(3), MathDataset(5, split="eval"))
    assert "eval/accuracy" in read_metrics(tmp_path / "run")[0]


def test_wandb_works_offline_and_its_failure_stops_nothing(tmp_path):
    fake = tmp_path / "wandb.py"
    fake.write_text(
        "import json, pathlib\nlogged = []\n"
        "def init(**options):\n    pathlib.Path('init.json').write_text(json.dumps(options['project']))\n"
        "    import sys\n    return sys.modules['wandb']\n"
        "def log(metrics, step):\n    logged.append(step)\n    if step == 2:\n        raise ConnectionError('gone')\n"
        "def finish():\n    raise AssertionError('off by now')\n"
    )
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]; import grpo, common, tyro; "
    code += "common.run(grpo.main, tyro.cli(grpo.Args))"
    import subprocess

    flags = [*FAST, "--num-steps", "3", "--output-dir", str(tmp_path / "run"), "--enable-wandb"]
    command = [sys.executable, "-c", code, *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "init.json").read_text()) == "grpo"
    assert done.stdout.count("wandb is off from here on") == 1
    assert "ConnectionError: gone" in done.stdout
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3]


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
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "error: trainer and engine differ by 0.2 nats a token, --max-logprob-gap is 0.1: the weights did not arrive, "
        "or they sample from different distributions"
    ]
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
        done = run_main("grpo.py", *FAST, "--num-steps", 1, "--batch-size", 8, *flags)
        assert done.returncode == 0, done.stderr
        assert f"importance sampling correction {correction}" in done.stdout
        norms[correction, cap] = read_metrics(folder)[0]["optim/grad_norm"]
    plain = norms["none", 8]
    assert plain > 0
    assert norms["token", 8] == pytest.approx(2 * plain, rel=1e-4)
    assert norms["token", 1.5] == pytest.approx(1.5 * plain, rel=1e-4)
    assert norms["sequence", 4] == pytest.approx(4 * plain, rel=1e-4)  # of any completion of two tokens or more


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
@pytest.mark.parametrize("script", ["grpo.py", "onpolicy_distill.py", "sft.py", "evaluate.py"])
def test_without_vllm_one_line_says_how_to_install_it(script, tmp_path):
    done = run_main(script, "--engine", "vllm", "--output-dir", tmp_path / "run")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: --engine is vllm: it must be hf, for vLLM is not installed: pip install vllm")
    assert not (tmp_path / "run").exists()


def jsonl(tmp_path, text):
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    return ["--dataset", path]


MISTAKES = {
    "unknown model": (["--model", "no/such-model"], "cannot load"),
    "folder without a model": (["--model", str(ROOT / "tests")], "cannot load"),
    "missing file": (["--dataset", "missing.jsonl"], "no such file"),
    "empty file": ("", "no rows"),
    "malformed file": ('{"prompt": "a"\n', "data.jsonl:1"),
    "no answer": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        "no reward",
    ),
    "long prompt": (json.dumps({"prompt": "a" * 600, "answer": 1}), "the prompt of row 0 has 6"),
    "group of 1": (["--group-size", 1], "--group-size is 1"),
    "temperature 0": (["--temperature", 0], "--temperature is 0.0"),
    "negative steps": (["--num-steps", -3], "--num-steps is -3"),
    "NaN": (["--learning-rate", "nan"], "--learning-rate is nan"),
    "min above max": (["--min-val", 9, "--max-val", 3], "min_val is above max_val"),
    "bad JSON": (["--chat-template-args", "{"], "--chat-template-args"),
    "no object for vLLM": (["--vllm-args", "[1]"], "--vllm-args is [1]: it must be a JSON object"),
    "arguments of another engine": (["--vllm-args", '{"seed": 1}'], "add --engine vllm"),
    "gap of NaN": (["--max-logprob-gap", "nan"], "--max-logprob-gap is nan"),
    "cap of 0": (["--is-cap", 0], "--is-cap is 0.0"),
    "ranges of another dataset": (["--dataset", "gsm8k", "--operand", "add"], "--operand"),
    "folder in the way": (["--output-dir", str(ROOT / "README.md")], "README.md"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_code_2(name, tmp_path, monkeypatch, capsys):
    flags, reason = MISTAKES[name]
    flags = jsonl(tmp_path, flags) if isinstance(flags, str) else flags
    flags = [*FAST, *flags] if "--output-dir" in flags else [*FAST, "--output-dir", tmp_path / "run", *flags]
    import tyro

    with pytest.raises(SystemExit) as exit_:
        common.run(grpo.main, tyro.cli(grpo.Args, args=[str(f) for f in flags]))
    assert exit_.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1, error
    assert error[0].startswith("error: ")
    assert reason in error[0]
    assert not (tmp_path / "run" / "args.json").exists()


def test_mistakes_in_a_real_terminal_leave_no_traceback():
    for script, flags in (
        ("grpo.py", ["--group-size", 1]),
        ("sft.py", ["--dataset", "missing.jsonl"]),
        ("evaluate.py", ["--model", "no/such-model"]),
        ("sft.py", ["--operand", "pow"]),
        ("grpo.py", ["--no-such-flag"]),
    ):
        done = run_script(script, *flags)
        assert done.returncode == 2, (script, flags, done.stderr)
        assert "Traceback" not in done.stdout + done.stderr
