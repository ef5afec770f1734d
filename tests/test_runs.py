"""What goes wrong around a run is told in one line, and costs nothing that was done."""

import itertools
import json
import os
import signal
import sys
import threading
import types

import datasets
import numpy as np
import pytest
import torch
from conftest import FAST, fine, mistake, read_metrics, run_main, start_script, wait_for, write_rows
from safetensors.torch import load_file
from test_architectures import tiny_model
from test_processes import run_two
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import envs
import evaluate
import grpo
from envs import MathDataset

NEVER = ["--eval-steps", 0]


def everything(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_final_is_the_model_that_was_evaluated_last_also_of_a_bf16_source(tmp_path, tokenizer):
    """At 1e-6 an update is smaller than a step of bf16. As transformers loads it: float32, its head saved once."""
    common.load_model("tiny", torch.device("cpu"), dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    flags = ["--model", tmp_path / "source", "--num-steps", 2, "--batch-size", 4, "--max-new-tokens", 24]
    flags += ["--eval-samples", 8, "--learning-rate", 1e-6, "--warmup-steps", 0]
    fine(run_main("grpo.py", *flags, "--output-dir", tmp_path / "run"))
    files = [tmp_path / "run" / name / "model.safetensors" for name in ("step_2", "final")]
    trained, final = map(load_file, files)
    assert all(torch.equal(trained[name], final[name]) and final[name].dtype == torch.float32 for name in final)
    assert any((final[name] != final[name].bfloat16()).any() for name in final)
    loaded, theirs = (
        kind.from_pretrained(tmp_path / "run" / "final") for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    assert all(torch.equal(loaded.state_dict()[name], final[name]) for name in final)
    assert {*loaded.state_dict()} - {*final} == {"lm_head.weight"}
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    assert theirs.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("when", ["reward", "evaluation"])
def test_a_reward_that_fails_costs_no_step_that_is_done(tmp_path, judge, monkeypatch, when):
    monkeypatch.setenv("FAILS_AT", "17" if when == "reward" else "33")  # 8 a step, 16 an evaluation
    flags = ["--batch-size", 1, "--num-steps", 3, "--max-new-tokens", 24, "--saving-steps", 100, "--logging-steps", 1]
    flags += NEVER if when == "reward" else ["--eval-dataset", judge, "--eval-samples", 16, "--eval-steps", 2]
    flags += ["--dataset", judge, "--output-dir", tmp_path / "run"]
    told = mistake(run_main("grpo.py", *flags))
    assert "Judge.get_reward raised KeyError: 'the judge is ill' for the completion" in told
    assert told.endswith("; step 2 is saved")
    assert common.newest_checkpoint(tmp_path / "run")[1] == 2
    monkeypatch.delenv("FAILS_AT")
    done = run_main("grpo.py", *flags, "--resume")
    assert (done.returncode, common.newest_checkpoint(tmp_path / "run")[1]) == (0, 3)


def test_resume_touches_nothing_where_nothing_is_whole_and_clears_what_a_kill_left(tmp_path):
    run, flags = tmp_path / "run", [*FAST[:6], "--output-dir", tmp_path / "run"]
    fine(run_main("sft.py", *flags))
    files = {"step_2/model.safetensors": "", "args.json": "", "metrics.jsonl": '{"step": 1}\nnonsense\n{"step": 2}\n'}
    for name, broken in files.items():
        whole = (run / name).read_bytes()
        (run / name).write_text(broken)
        before = everything(run)
        done = run_main("sft.py", *flags, "--resume")
        assert (done.returncode, done.stdout) == (2, "")
        assert ("no whole checkpoint" if "step" in name else name) in done.stderr.splitlines()[-1]
        assert everything(run) == before
        (run / name).write_bytes(whole)
    (run / ".step_9.tmp").mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    done = run_main("sft.py", *flags, "--num-steps", 3, "--resume")
    assert (done.returncode, done.stderr) == (0, "")
    assert not (run / ".step_9.tmp").exists()
    assert [line["step"] for line in read_metrics(run)] == [1, 2]  # and the next would be 10


def test_an_evaluation_that_was_stopped_goes_on(tmp_path, judge, monkeypatch):
    monkeypatch.setattr(evaluate, "BLOCK", 3)
    flags = ["--dataset", judge, "--num-completions", 2, "--temperature", 1, "--max-new-tokens", 24, "--output-dir"]
    fine(run_main("evaluate.py", *flags, tmp_path / "whole"))
    monkeypatch.setenv("FAILS_AT", "15")  # in the third block of 6
    assert "the judge is ill" in mistake(run_main("evaluate.py", *flags, tmp_path / "part"))
    part = tmp_path / "part" / evaluate.PART
    assert len(part.read_text().splitlines()) == 12
    # A kill in the middle of a problem, and of a line.
    part.write_text(part.read_text() + json.dumps({"problem": 6, "sample": 0, "reward": 1}) + '\n{"problem": 6, "sam')
    monkeypatch.delenv("FAILS_AT")
    assert "--seed 1 -> 2" in mistake(run_main("evaluate.py", *flags, tmp_path / "part", "--seed", 2))
    done = fine(run_main("evaluate.py", *flags, tmp_path / "part"))
    assert "6 done before" in done.stdout
    whole, part = ((tmp_path / name / "results.jsonl").read_text() for name in ("whole", "part"))
    assert whole == part


def test_an_evaluation_mixes_with_nothing_else(tmp_path, monkeypatch):
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    write_rows(data, *({"prompt": f"{i} + 1?", "answer": i + 1} for i in range(4)))
    flags = ["--dataset", data, "--max-new-tokens", 8, "--output-dir"]
    assert run_main("evaluate.py", "--model", tmp_path / "absent", *flags, out).returncode == 2
    fine(run_main("evaluate.py", *flags, out))  # of the first try nothing is left
    lines = (out / "results.jsonl").read_text().splitlines(keepends=True)
    (out / "results.jsonl").rename(out / evaluate.PART)
    (out / evaluate.PART).write_text("".join(lines[:2]))
    write_rows(data, {"prompt": "other?", "answer": 1})
    assert "was started with other flags: --data" in mistake(run_main("evaluate.py", *flags, out))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert "holds other results already" in mistake(run_main("evaluate.py", *flags, tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("solved", "of", "low", "high"), [(0, 200, 0, 0.0188), (10, 20, 0.2993, 0.7007), (9, 9, 0.7009, 1)]
)
def test_the_interval_of_one_completion_a_problem_is_wilsons(solved, of, low, high):
    share = np.array([1.0] * solved + [0.0] * (of - solved))
    assert evaluate.wilson_interval(share, 1) == pytest.approx((low, high), abs=1e-4)
    assert evaluate.wilson_interval(share, 8) == pytest.approx((low, high), abs=0.02)  # eight alike count as one


@pytest.mark.parametrize(("p", "spread"), [(0.005, 0.0), (0.1, 0.3), (0.5, 0.9), (0.98, 0.3)])
def test_the_interval_of_several_completions_covers(p, spread):
    rng, covered = np.random.default_rng(0), []
    for _ in range(400):
        chance = rng.beta(p * (1 - spread) / spread, (1 - p) * (1 - spread) / spread, 200) if spread else p
        low, high = evaluate.wilson_interval(rng.binomial(4, chance, 200) / 4, 4)
        covered.append(low <= p <= high)
    assert 0.87 < np.mean(covered) < 0.99


def test_numbers_of_numpy_and_small_ones_are_answers():
    answers = (np.float32(0.1), np.int64(3), 1e-05, torch.tensor(0.1), torch.tensor(0.1, dtype=torch.bfloat16))
    rows = [envs.MathEnv([{"role": "user", "content": "a"}], answer) for answer in answers]
    assert [type(env.answer) for env in rows] == [float, int, float, float, float]
    boxes = [r"\boxed{0.1}", r"\boxed{3}", r"\boxed{0.00001}", r"\boxed{0.1}", r"\boxed{0.1}"]
    assert [env.get_target() for env in rows] == boxes
    assert [env.get_reward(env.get_target()) for env in rows] == [1.0] * 5
    with pytest.raises(envs.UserError, match="answer must be text or a number"):
        envs.MathEnv([], np.array([3]))


class Task(list):
    def score_answer(self, answer, entry):
        return float(answer == entry["answer"])


def test_reasoning_gym_trains_nothing_that_is_held_out_and_its_targets_are_right(monkeypatch):
    def create_dataset(name, size, seed):  # as the package draws: problem i from seed + i
        return Task({"question": str((seed + i) % 3000), "answer": str((seed + i) % 3000)} for i in range(size))

    monkeypatch.setitem(sys.modules, "reasoning_gym", types.SimpleNamespace(create_dataset=create_dataset))
    asked = {}
    for seed, split in itertools.product((1, 2), ("train", "eval")):
        data = envs.load_dataset("reasoning_gym:x", split, num_samples=100, seed=seed)
        assert all(env.get_reward(env.get_target()) == 1.0 for env in data)
        asked[seed, split] = {env.prompt[0]["content"] for env in data}
        assert len(data) == 100
    assert not asked[1, "train"] & (asked[1, "eval"] | asked[2, "eval"])
    assert asked[1, "train"] != asked[2, "train"]


def test_what_no_token_reaches_is_frozen_and_told(tmp_path, tokenizer):
    model = tiny_model("ernie4_5_moe", 1.0)
    model.resize_token_embeddings(299)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = ["--model", tmp_path / "model", *NEVER, "--num-steps", 1, "--num-samples", 8, "--learning-rate", 0.01]
    norms = []
    for processes, run in ((1, run_main), (2, run_two)):
        folder = tmp_path / str(processes)
        done = fine(run("sft.py", *flags, "--batch-size", 4 // processes, "--output-dir", folder))
        assert "parameters that no token reaches, the first model.layers" in done.stdout
        assert json.loads((folder / "args.json").read_text())["num_processes"] == processes
        norms.append(read_metrics(folder)[0]["optim/grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_a_file_is_a_module_with_neighbours_and_processes(tmp_path):
    (tmp_path / "neighbour.py").write_text("def half(x):\n    return x / 2\n")
    (tmp_path / "pooled.py").write_text("""from concurrent.futures import ProcessPoolExecutor
from envs import EnvBase
from neighbour import half
import multiprocessing
def work(x):
    return half(x)
def make():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return [EnvBase([{"role": "user", "content": str(x)}], x) for x in pool.map(work, [2, 4])]
""")
    done = fine(run_main("sft.py", "--dataset", f"{tmp_path / 'pooled.py'}:make", "--inspect", 2))
    assert all(f"«{answer}<|im_end|>»" in done.stdout for answer in (1.0, 2.0))


@pytest.mark.parametrize("name", ["common", "random", "yaml", "mine", "wrong"])
def test_a_file_whose_name_is_taken_or_that_fails_is_one_line(tmp_path, judge, name):
    envs.load_dataset(judge)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / f"{name}.py").write_text("def make():\n    return [] + 1\n")
    told = f"there is a module {name} already: rename the file"
    if name == "wrong":
        told = r"wrong.py:make raised TypeError: can only .* \(.*wrong.py:2\)"
    with pytest.raises(envs.UserError, match=told):
        envs.load_dataset(f"{tmp_path / 'other' / name}.py:make")


def test_main_takes_rows_and_paths_and_leaves_signals_as_they_were(tmp_path):
    rows = datasets.Dataset.from_list([{"prompt": "2+2?", "answer": "4"}, {"prompt": "3+3?", "answer": "6"}])
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    args = {"num_steps": 1, "batch_size": 2, "max_new_tokens": 8}
    grpo.main(grpo.Args(**args, output_dir=tmp_path / "one"), rows, rows)  # ty: ignore
    two = (grpo.Args(**args, output_dir=str(tmp_path / "two")), MathDataset(4))
    thread = threading.Thread(target=grpo.main, args=two)
    thread.start()
    thread.join()
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    assert [common.newest_checkpoint(tmp_path / name)[1] for name in ("one", "two")] == [1, 1]
    what = "train_dataset must be a sequence of at least one EnvBase, or of rows"
    for wrong, told in (([1, 2], what), (rows.remove_columns("answer"), "none of the rows has a reward")):
        with pytest.raises(envs.UserError, match=told):
            grpo.main(grpo.Args(**args, output_dir=str(tmp_path / "three")), wrong)


@pytest.mark.slow
def test_a_run_survives_its_terminal(tmp_path):
    flags, env = [*FAST, "--output-dir", tmp_path / "run"], os.environ | {"PYTHONIOENCODING": "ascii"}
    run = start_script("grpo.py", *flags, env=env)
    run.stdout.readline()
    run.stdout.close()  # as `| head -1` does
    assert (run.stderr.read(), run.wait()) == ("", 0)
    assert common.step_of(tmp_path / "run" / "final") == 2
    hung = start_script("grpo.py", *FAST, "--num-steps", 500, "--output-dir", tmp_path / "hung")
    wait_for((tmp_path / "hung" / "metrics.jsonl").exists, hung)
    hung.stdout.close()
    hung.stderr.close()
    hung.send_signal(signal.SIGHUP)
    assert hung.wait(60) == 129
    assert common.newest_checkpoint(tmp_path / "hung")[1] == read_metrics(tmp_path / "hung")[-1]["step"]
