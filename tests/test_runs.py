"""What goes wrong around a run is told in one line, and costs nothing that was done."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import FAST, ROOT, read_metrics, run_main, run_script
from safetensors.torch import load_file, save_file
from test_architectures import tiny_model

import common
import envs
import evaluate
import grpo
import sft
from envs import MathDataset

NEVER = ["--eval-steps", 0]
REWARD = """import itertools, os
from envs import EnvBase
calls = itertools.count(1)

class Judge(EnvBase):
    def get_reward(self, completion):
        if os.environ.get("FAILS_AT") and next(calls) >= int(os.environ["FAILS_AT"]):
            raise KeyError("the judge is ill")
        return float(len(completion) % 2)

def make():
    return [Judge([{"role": "user", "content": f"What is {a} + 1?"}], a + 1) for a in range(20)]
"""


@pytest.fixture
def judge(tmp_path):
    (tmp_path / "judge.py").write_text(REWARD)
    return f"{tmp_path / 'judge.py'}:make"


def everything(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- What is saved


def test_final_is_the_model_that_was_evaluated_last_also_of_a_bf16_source(tmp_path, tokenizer):
    """At 1e-6 an update is smaller than a step of bf16."""
    common.load_model("tiny", torch.device("cpu"), dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    flags = ["--model", tmp_path / "source", "--num-steps", 2, "--batch-size", 4, "--max-new-tokens", 24]
    flags += ["--eval-samples", 8, "--learning-rate", 1e-6, "--warmup-steps", 0]
    assert run_main("grpo.py", *flags, "--output-dir", tmp_path / "run").returncode == 0
    files = [tmp_path / "run" / name / "model.safetensors" for name in ("step_2", "final")]
    trained, final = map(load_file, files)
    assert all(torch.equal(trained[name], final[name]) and final[name].dtype == torch.float32 for name in final)
    assert any((final[name] != final[name].bfloat16()).any() for name in final)
    assert json.loads((tmp_path / "run" / "final" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("when", ["reward", "evaluation"])
def test_a_reward_that_fails_costs_no_step_that_is_done(tmp_path, judge, monkeypatch, when):
    monkeypatch.setenv("FAILS_AT", "17" if when == "reward" else "33")  # 8 a step, 16 an evaluation
    flags = ["--batch-size", 1, "--num-steps", 3, "--max-new-tokens", 24, "--saving-steps", 100, "--logging-steps", 1]
    flags += NEVER if when == "reward" else ["--eval-dataset", judge, "--eval-samples", 16, "--eval-steps", 2]
    done = run_main("grpo.py", *flags, "--dataset", judge, "--output-dir", tmp_path / "run")
    assert done.returncode == 2
    told = "error: Judge.get_reward raised KeyError: 'the judge is ill' for the completion"
    assert (done.stderr.count("\n"), told in done.stderr) == (1, True)
    assert done.stderr.endswith("; step 2 is saved\n")
    assert common.newest_checkpoint(tmp_path / "run")[1] == 2
    monkeypatch.delenv("FAILS_AT")
    done = run_main("grpo.py", *flags, "--dataset", judge, "--output-dir", tmp_path / "run", "--resume")
    assert (done.returncode, common.newest_checkpoint(tmp_path / "run")[1]) == (0, 3)


def test_resume_where_nothing_is_whole_touches_nothing(tmp_path):
    flags = [*FAST, "--output-dir", tmp_path / "run"]
    assert run_main("sft.py", *FAST[:6], "--output-dir", tmp_path / "run").returncode == 0
    for part in ("step_2/model.safetensors", "args.json"):
        whole = (tmp_path / "run" / part).read_bytes()
        (tmp_path / "run" / part).write_bytes(b"")
        before = everything(tmp_path / "run")
        done = run_main("sft.py", *FAST[:6], *flags[-2:], "--resume")
        assert (done.returncode, done.stdout.count("\n")) == (2, 0)
        assert ("no whole checkpoint" if "step" in part else "args.json") in done.stderr.splitlines()[-1]
        assert everything(tmp_path / "run") == before
        (tmp_path / "run" / part).write_bytes(whole)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    (tmp_path / "run" / ".step_9.tmp").mkdir()
    done = run_main("sft.py", *FAST[:4], "--num-steps", 3, *flags[-2:], "--resume")
    assert (done.returncode, done.stderr.count("\n"), "metrics.jsonl" in done.stderr) == (2, 1, True)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    done = run_main("sft.py", *FAST[:4], "--num-steps", 3, *flags[-2:], "--resume")
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "run" / ".step_9.tmp").exists()


def test_data_that_was_edited_since_is_told(tmp_path):
    for answer in (1, 2):
        (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "a", "answer": answer}) + "\n")
        flags = [*NEVER, "--batch-size", 1, "--num-steps", answer, "--dataset", tmp_path / "data.jsonl", "--resume"]
        done = run_main("sft.py", *flags, "--output-dir", tmp_path / "run")
        assert (done.returncode, "the training data has changed" in done.stdout) == (0, answer == 2)


# ---- Folders


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "20260101-000000")
    one, two = (common.make_folder(None, "grpo", "runs/mine/final") for _ in range(2))
    assert one.name == "grpo-mine-final-20260101-000000"  # final alone would say nothing
    assert two.is_dir()
    assert two != one
    monkeypatch.setenv("HOME", str(tmp_path))
    assert common.make_folder("~/x", "grpo", "tiny") == tmp_path / "x"
    for script in ("grpo.py", "evaluate.py"):
        done = run_main(script, "--output-dir", "")
        assert (done.returncode, '--output-dir is ""' in done.stderr) == (2, True)
    assert "--resume needs --output-dir" in run_main("grpo.py", "--resume", "--output-dir", "").stderr


def test_an_evaluation_that_was_stopped_goes_on(tmp_path, judge, monkeypatch):
    monkeypatch.setattr(evaluate, "BLOCK", 3)
    flags = ["--dataset", judge, "--num-completions", 2, "--temperature", 1, "--max-new-tokens", 24, "--output-dir"]
    assert run_main("evaluate.py", *flags, tmp_path / "whole").returncode == 0
    monkeypatch.setenv("FAILS_AT", "15")  # in the third block of 6
    done = run_main("evaluate.py", *flags, tmp_path / "part")
    assert (done.returncode, "the judge is ill" in done.stderr) == (2, True)
    part = tmp_path / "part" / evaluate.PART
    assert len(part.read_text().splitlines()) == 12
    # A kill in the middle of a problem, and of a line.
    part.write_text(part.read_text() + json.dumps({"problem": 6, "sample": 0, "reward": 1}) + '\n{"problem": 6, "sam')
    monkeypatch.delenv("FAILS_AT")
    done = run_main("evaluate.py", *flags, tmp_path / "part", "--seed", 2)
    assert (done.returncode, "--seed 1 -> 2" in done.stderr) == (2, True)
    done = run_main("evaluate.py", *flags, tmp_path / "part")
    assert done.returncode == 0, done.stderr
    assert "6 done before" in done.stdout
    whole, part = ((tmp_path / name / "results.jsonl").read_text() for name in ("whole", "part"))
    assert whole == part


def test_an_evaluation_mixes_with_nothing_else(tmp_path, monkeypatch):
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps({"prompt": f"{i} + 1?", "answer": i + 1}) + "\n" for i in range(4)))
    flags = ["--dataset", data, "--max-new-tokens", 8, "--output-dir"]
    assert run_main("evaluate.py", "--model", tmp_path / "absent", *flags, out).returncode == 2
    assert run_main("evaluate.py", *flags, out).returncode == 0  # of the first try nothing is left
    lines = (out / "results.jsonl").read_text().splitlines(keepends=True)
    (out / "results.jsonl").rename(out / evaluate.PART)
    (out / evaluate.PART).write_text("".join(lines[:2]))
    data.write_text(json.dumps({"prompt": "other?", "answer": 1}) + "\n")
    done = run_main("evaluate.py", *flags, out)
    assert (done.returncode, "was started with other flags: --data" in done.stderr) == (2, True)
    assert run_main("sft.py", *FAST[:6], "--output-dir", tmp_path / "run").returncode == 0
    before = everything(tmp_path / "run")
    done = run_main("evaluate.py", *flags, tmp_path / "run")
    assert (done.returncode, "holds other results already" in done.stderr) == (2, True)
    assert everything(tmp_path / "run") == before


# ---- Numbers


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


def test_numbers_of_numpy_and_small_ones_are_answers(tmp_path):
    answers = (np.float32(0.1), np.int64(3), 1e-05, torch.tensor(0.1), torch.tensor(0.1, dtype=torch.bfloat16))
    rows = [envs.MathEnv([{"role": "user", "content": "a"}], answer) for answer in answers]
    assert [type(env.answer) for env in rows] == [float, int, float, float, float]
    boxes = [r"\boxed{0.1}", r"\boxed{3}", r"\boxed{0.00001}", r"\boxed{0.1}", r"\boxed{0.1}"]
    assert [env.get_target() for env in rows] == boxes
    assert [env.get_reward(env.get_target()) for env in rows] == [1.0] * 5
    with pytest.raises(envs.UserError, match="answer must be text or a number"):
        envs.MathEnv([], np.array([3]))
    evaluate.main(evaluate.Args(max_new_tokens=8, output_dir=str(tmp_path / "out")), rows)
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 5


def test_reasoning_gym_trains_nothing_that_is_held_out_and_its_targets_are_right(monkeypatch):
    class Task(list):
        def score_answer(self, answer, entry):
            return float(answer == entry["answer"])

    def create_dataset(name, size, seed):  # as the package draws: problem i from seed + i
        return Task({"question": str((seed + i) % 3000), "answer": str((seed + i) % 3000)} for i in range(size))

    monkeypatch.setitem(
        sys.modules, "reasoning_gym", type("fake", (), {"create_dataset": staticmethod(create_dataset)})
    )
    load = {
        (seed, split): envs.load_dataset("reasoning_gym:x", split, num_samples=100, seed=seed)
        for seed in (1, 2)
        for split in ("train", "eval")
    }
    asked = {key: {env.prompt[0]["content"] for env in data} for key, data in load.items()}
    assert all(len(data) == 100 for data in load.values())
    for seed in (1, 2):
        assert not asked[1, "train"] & asked[seed, "eval"]
    assert asked[1, "train"] != asked[2, "train"]
    assert all(env.get_reward(env.get_target()) == 1.0 for data in load.values() for env in data)


# ---- Models


def test_what_no_token_reaches_is_frozen_and_told(tmp_path, tokenizer):
    model = tiny_model("ernie4_5_moe", 1.0)
    model.resize_token_embeddings(299)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = ["--model", tmp_path / "model", *NEVER, "--num-steps", 1, "--num-samples", 8, "--learning-rate", 0.01]
    done = run_main("sft.py", *flags, "--batch-size", 4, "--output-dir", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    assert "parameters that no token reaches, the first model.layers" in done.stdout
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "sft.py", *map(str, flags)]
    two += ["--batch-size", "2", "--output-dir", str(tmp_path / "two")]
    done = subprocess.run(two, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    one, two = (read_metrics(tmp_path / name)[0]["optim/grad_norm"] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-5)


def test_gradient_checkpointing_puts_nothing_else_into_training_mode(tmp_path):
    args = sft.Args(gradient_checkpointing=True, output_dir=str(tmp_path / "run"), eval_steps=0)
    run = common.Run(args, "sft.py", None, None, bundled_lr=1e-3, real_lr=1e-5)
    common.load_policy(run)
    training = [module for module in run.model.modules() if module.training]
    assert len(training) >= run.model.config.num_hidden_layers
    assert all(module.gradient_checkpointing for module in training)


# ---- Python, terminals, signals


def test_a_file_is_a_module_with_neighbours_and_processes(tmp_path):
    (tmp_path / "neighbour.py").write_text("def half(x):\n    return x / 2\n")
    (tmp_path / "pooled.py").write_text("""from concurrent.futures import ProcessPoolExecutor
from envs import EnvBase
from neighbour import half
import multiprocessing
class Env(EnvBase):
    pass
def work(x):
    return half(x)
def make():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return [Env([{"role": "user", "content": str(x)}], x) for x in pool.map(work, [2, 4])]
""")
    code = f"import envs; print([env.answer for env in envs.load_dataset({str(tmp_path / 'pooled.py:make')!r})])"
    code = f"if __name__ == '__main__':\n    {code}\n"
    (tmp_path / "main.py").write_text(code)
    done = run_script(str(tmp_path / "main.py"), env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stdout == "[1.0, 2.0]\n", done.stderr


@pytest.mark.parametrize("name", ["common.py", "random.py", "yaml.py", "fine.py"])
def test_a_file_whose_name_is_taken_is_refused(tmp_path, name):
    (tmp_path / name).write_text("def make():\n    return [] + 1\n")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "fine.py").write_text(REWARD)
    envs.load_dataset(f"{tmp_path / 'one' / 'fine.py'}:make")
    with pytest.raises(envs.UserError, match=rf"there is a module {name[:-3]} already: rename the file"):
        envs.load_dataset(f"{tmp_path / name}:make")


def test_an_error_in_the_users_file_is_one_line_with_its_place(tmp_path):
    (tmp_path / "wrong.py").write_text("def make():\n    return [] + 1\n")
    with pytest.raises(envs.UserError, match=r"wrong.py:make raised TypeError: can only .* \(.*wrong.py:2\)"):
        envs.load_dataset(f"{tmp_path / 'wrong.py'}:make")


def test_main_takes_rows_and_paths_and_leaves_signals_as_they_were(tmp_path):
    rows = datasets.Dataset.from_list([{"prompt": "2+2?", "answer": "4"}, {"prompt": "3+3?", "answer": "6"}])
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    args = {"num_steps": 1, "batch_size": 2, "max_new_tokens": 8, "eval_steps": 0}
    grpo.main(grpo.Args(**args, output_dir=tmp_path / "one"), rows)  # ty: ignore
    thread = threading.Thread(
        target=grpo.main, args=(grpo.Args(**args, output_dir=str(tmp_path / "two")), MathDataset(4))
    )
    thread.start()
    thread.join()
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    assert [common.newest_checkpoint(tmp_path / name)[1] for name in ("one", "two")] == [1, 1]
    with pytest.raises(envs.UserError, match="train_dataset must be a sequence of at least one EnvBase, or of rows"):
        grpo.main(grpo.Args(**args, output_dir=str(tmp_path / "three")), [1, 2])


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_tables_are_data(tmp_path, suffix):
    rows = datasets.Dataset.from_list([{"question": "2+2?", "answer": "2+2=<<2+2=4>>4\n#### 4"}])
    getattr(rows, f"to_{suffix}")(tmp_path / f"data.{suffix}")
    (env,) = envs.load_dataset(str(tmp_path / f"data.{suffix}"))
    assert (env.answer, env.get_target()) == ("4", "2+2=4\n\\boxed{4}")
    assert envs.load_dataset(str(tmp_path / f"data.{suffix}"), "eval") is None  # a file has one split


def test_a_terminal_that_is_gone_ends_nothing(tmp_path, monkeypatch):
    class Gone:
        encoding = "utf-8"

        def write(self, _):
            raise OSError(5, "Input/output error")

        flush = write

    silenced = []
    monkeypatch.setattr(common, "print_nothing", silenced.append)
    args = sft.Args(output_dir=str(tmp_path / "run"), eval_steps=0, num_samples=4)
    run = common.Run(args, "sft.py", None, None, bundled_lr=1e-3, real_lr=1e-5)
    run.console.file = Gone()
    run.say("hello")
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "stderr", Gone())
    run.on_signal(signal.SIGTERM, None)
    signal.signal(signal.SIGTERM, before)
    assert (silenced, run.received_signal) == ([run.console], signal.SIGTERM)


BROKEN = {  # a file of a model's folder -> what is made of it
    "tokenizer.json": (None, "cannot load the tokenizer"),
    "model.safetensors": (b"garbage", "cannot load the model"),
    "generation_config.json": (b'{"eos', "generation_config.json"),
    "config.json": (b'{"model_type": "qwen2", "hidden_size": 7}', "cannot load the model"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_folder_is_one_line(tmp_path, name):
    shutil.copytree(common.BUNDLED["tiny"], tmp_path / "model")
    content, told = BROKEN[name]
    (tmp_path / "model" / name).unlink()
    if content is not None:
        (tmp_path / "model" / name).write_bytes(content)
    done = run_main("sft.py", *FAST[:6], "--model", tmp_path / "model", "--output-dir", tmp_path / "run")
    assert (done.returncode, done.stderr.count("\n"), told in done.stderr) == (2, 1, True), done.stderr


def test_weights_that_are_missing_are_told(tmp_path):
    shutil.copytree(common.BUNDLED["tiny"], tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    del weights["model.layers.0.input_layernorm.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(envs.UserError, match=r"its weights lack model.layers.0.input_layernorm.weight"):
        common.load_model(str(tmp_path / "model"), torch.device("cpu"))


@pytest.mark.slow
def test_a_run_survives_its_terminal(tmp_path):
    flags = [*map(str, FAST), "--output-dir", str(tmp_path / "run")]
    command = [sys.executable, str(ROOT / "grpo.py"), *flags]
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        run.stdout.readline()
        run.stdout.close()  # as `| head -1` does
        errors = run.stderr.read()
    assert (run.returncode, errors) == (0, b"")
    assert common.step_of(tmp_path / "run" / "final") == 2
    done = run_script("grpo.py", env=os.environ | {"LOCAL_RANK": "0"})
    assert (done.returncode, done.stderr.count("\n"), "unset them" in done.stderr) == (2, 1, True)
    flags = [*map(str, FAST), "--num-steps", "500", "--output-dir", str(tmp_path / "hung")]
    with subprocess.Popen([sys.executable, str(ROOT / "grpo.py"), *flags], cwd=ROOT, stdout=subprocess.PIPE) as run:
        while not (tmp_path / "hung" / "metrics.jsonl").exists():
            time.sleep(0.1)
        run.send_signal(signal.SIGHUP)
        run.stdout.read()
    assert run.returncode == 129
    assert common.newest_checkpoint(tmp_path / "hung")[1] == read_metrics(tmp_path / "hung")[-1]["step"]
    assert Path(tmp_path / "hung").exists()
