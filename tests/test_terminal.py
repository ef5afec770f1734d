"""What a person sees: the start, the lines of the steps, warnings that save days, the ending; and the model card."""

import argparse
import json
import shlex

import pytest
from accelerate import Accelerator
from conftest import FAST, read_metrics, run_main
from transformers import AutoModelForCausalLM

import common
import evaluate
import grpo
import onpolicy_distill
import sft


@pytest.fixture
def run(tmp_path, capsys):
    args = grpo.Args(output_dir=str(tmp_path / "run"), max_new_tokens=7, num_steps=100)
    return common.Run(args, "grpo.py", Accelerator(cpu=True), 1e-3)


def log(run, capsys, *values, metric="reward/zero_std_frac", first=1):
    for step, value in enumerate(values, start=first):
        run.log(step, {metric: value})
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]


def test_numbers_stand_under_their_headings(run, capsys):
    metrics = dict.fromkeys(common.STEP_LINE, 0.5)
    for step in range(1, 22):
        run.log(step, metrics)
    lines = capsys.readouterr().out.splitlines()
    assert [n for n, line in enumerate(lines) if line.startswith("step")] == [0, 21]  # again after twenty steps
    assert {len(line) for line in lines} == {len(lines[0])}
    for heading in lines[0].split()[1:]:
        end = lines[0].index(heading) + len(heading)
        assert lines[1][end - 1] != " ", heading
        assert lines[1][end : end + 1] in (" ", ""), heading


def test_a_metric_that_a_step_lacks_leaves_its_column_empty(run, capsys):
    run.log(1, {"reward/mean": 0.5, "loss/kl": 0.25, "optim/grad_norm": 3.0})
    run.log(2, {"reward/mean": 0.5, "optim/grad_norm": 3.0})
    full, lacking = capsys.readouterr().out.splitlines()[1:]
    assert lacking[3:] == full[3:].replace("0.2500", "      ")


def test_most_groups_without_spread_warn_after_five_steps_in_a_row_and_again_after_a_hundred(run, capsys):
    assert log(run, capsys, 0.9, 0.9, 0.9, 0.9, 0.8, 0.9, 0.9, 0.9, 0.9) == []  # 80% is no more than 80%
    (line,) = log(run, capsys, *[0.9] * 100, first=10)
    assert "most groups teach nothing" in line
    assert len(log(run, capsys, 0.9, first=110)) == 1
    assert log(run, capsys, *[0.1] * 200, first=111) == []


def test_cut_completions_and_a_stop_token_that_never_comes_warn(run, capsys):
    (line,) = log(run, capsys, *[0.51] * 5, metric="completion/truncated_frac")
    assert "--max-new-tokens 7" in line
    never = log(run, capsys, 0.1, *[1.0] * 5, metric="completion/truncated_frac", first=200)
    assert len(never) == 2
    assert "tiny never writes a stop token" in never[1]


def test_a_learning_rate_of_zero_warns(tmp_path):
    done = run_main("grpo.py", *FAST, "--learning-rate", 0, "--output-dir", tmp_path / "run")
    assert "warning    --learning-rate is 0" in done.stdout
    done = run_main("grpo.py", *FAST, "--output-dir", tmp_path / "other")
    assert "warning" not in done.stdout


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("sft.py", "batch      2 conversations a step, about "),
        ("grpo.py", "batch      2 prompts x 8 completions a step, at most 384 sampled tokens"),
        ("onpolicy_distill.py", "batch      2 completions a step, at most 48 sampled tokens"),
    ],
)
def test_the_start_is_ten_lines_at_most_and_names_folder_choices_and_batch(script, words, tmp_path):
    done = run_main(script, *FAST, "--output-dir", tmp_path / "run")
    start = done.stdout[: done.stdout.index("\nstep")].splitlines()
    start = start[: next((n for n, line in enumerate(start) if not line.strip()), None)]  # the table follows
    assert len(start) <= 10
    assert start[0] == f"run        {tmp_path / 'run'} · 1 process(es) on cpu"
    assert any(line.startswith(words) for line in start)
    assert any("(default for bundled models)" in line for line in start)


def test_completions_stand_in_a_table_under_their_prompt(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    done = run_main("grpo.py", *FAST, "--output-dir", tmp_path / "run")
    lines = [line.split() for line in done.stdout.splitlines()]
    at = lines.index(["reward", "advantage", "end", "completion"])
    records = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()][:8]
    assert lines[at + 2][:2] == records[0]["prompt"].split()[:2]
    for record, shown in zip(records, lines[at + 3 :], strict=False):
        assert shown[:3] == [f"{record['reward']:.2f}", f"{record['advantage']:.2f}", record["finish_reason"]]


def test_the_next_command_evaluates_what_was_trained_on_the_same_problems(tmp_path):
    flags = ["--num-steps", 2, "--batch-size", 2, "--max-new-tokens", 24, "--eval-samples", 12, "--max-val", 20]
    done = run_main("grpo.py", *flags, "--seed", 3, "--output-dir", tmp_path / "my run")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("next ")]
    program, script, *words = shlex.split(line.removeprefix("next"))
    assert (program, script) == ("python", "evaluate.py")
    assert "--dataset" not in words  # math anyway
    assert common.EVALUATE.items() <= vars(evaluate.Args()).items()
    evaluated = run_main(script, *words, "--output-dir", tmp_path / "evaluation")
    assert evaluated.returncode == 0, evaluated.stderr
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    last = read_metrics(tmp_path / "my run")[-1]
    assert metrics["eval/accuracy"] == last["eval/accuracy"]
    assert metrics["eval/reward_mean"] == pytest.approx(last["eval/reward_mean"])


@pytest.mark.parametrize("script", ["sft.py", "onpolicy_distill.py"])
def test_without_rewards_the_next_command_draws_a_curve(script, tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = {"messages": messages} if script == "sft.py" else {"prompt": "a"}
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    data = ["--dataset", tmp_path / "data.jsonl"]
    done = run_main(script, *FAST, *data, "--output-dir", tmp_path / "run")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("next ")]
    assert line.split()[1:4] == ["python", "training_guide/plot.py", str(tmp_path / "run")]
    assert line.split()[-1] in read_metrics(tmp_path / "run")[0]


def test_final_holds_a_model_card(tmp_path):
    flags = ["--num-steps", 1, "--batch-size", 2, "--max-new-tokens", 24, "--eval-samples", 4, "--mask-truncated"]
    assert run_main("grpo.py", *flags, "--output-dir", tmp_path / "run").returncode == 0
    final = tmp_path / "run" / "final"
    card = (final / "README.md").read_text()
    command = "python grpo.py --batch-size 2 --max-new-tokens 24 --mask-truncated --num-steps 1 --eval-samples 4"
    assert f"```bash\n{command}\n```" in card
    lines = read_metrics(tmp_path / "run")
    for name in ("eval/accuracy", "eval/reward_mean"):
        assert f"| {name} | {lines[0][name]:.4f} | {lines[-1][name]:.4f} |" in card
    assert "base_model" not in card  # tiny is not on the hub
    record = json.loads(card[card.index("```json\n") + 8 : card.rindex("```")])
    assert record == json.loads((tmp_path / "run" / "args.json").read_text())
    assert record["versions"]["torch"]
    AutoModelForCausalLM.from_pretrained(final)


def test_a_card_names_the_base_model_of_the_hub(run):
    run.args.model = "org/name"
    record = {"script": "grpo", "model": "org/name", "dataset": "gsm8k", "num_steps": 1, "num_processes": 1}
    (run.folder / "args.json").write_text(json.dumps(record | {"device": "cpu"}))
    (run.folder / "metrics.jsonl").write_text("")
    front = common.model_card(run).split("---")[1]
    assert "\nbase_model: org/name\n" in front


@pytest.mark.parametrize("module", [sft, grpo, onpolicy_distill])
def test_flags_become_the_command_line_that_makes_them(module):
    import tyro

    given = module.Args(num_steps=3, resume=True, eval_steps=0, learning_rate=1e-5, chat_template_args='{"a": 1}')
    changed = {n: v for n, v in vars(given).items() if v != getattr(module.Args(), n)}
    assert tyro.cli(module.Args, args=common.flags_of(changed)) == given
    assert common.flags_of(vars(argparse.Namespace(a=None, b=False, c=0))) == ["--c", "0"]
