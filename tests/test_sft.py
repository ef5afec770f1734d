"""The supervised loss has its hand-computed value and gradient, and adds up over any cut of a batch."""

import copy
import functools
import math

import pytest
import torch
from conftest import fine, read_metrics, record_of, run_main, write_rows

import common
import sft
import tables
from envs import EnvBase


@pytest.mark.parametrize("parts", [[slice(0, 2)], [slice(0, 1), slice(1, 2)]], ids=["whole", "in parts"])
def test_value_and_gradient_by_hand(parts):
    """The parts of a batch add up; what is masked may be anything."""
    rows = [[math.nan, math.log(0.5), math.log(0.1)], [0.0, math.log(0.2), -math.inf]]
    logprobs = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[0, 1, 0], [0, 1, 0]])
    losses, sums = zip(*(sft.sft_loss(logprobs[part], mask[part], 4) for part in parts), strict=True)
    sum(losses).backward()
    assert sum(losses).item() == pytest.approx(math.log(10) / 4, abs=1e-15)
    assert logprobs.grad.tolist() == [[0, -0.25, 0], [0, -0.25, 0]]
    assert sum(named["loss/total"].item() for named in sums) == pytest.approx(math.log(10))
    assert sft.sft_loss(logprobs, torch.zeros_like(mask), 4)[0] == 0


def encoded(rows, tokenizer, max_length=512):
    return tables.Encoded(rows, functools.partial(sft.encode, tokenizer=tokenizer, max_length=max_length))


def test_conversations_too_long_or_with_nothing_to_train_are_dropped_and_counted(tokenizer):
    def env(user, assistant="b"):
        return EnvBase([{"role": "user", "content": user}], assistant)

    rows = encoded([env("a"), env("a" * 99), env("a"), env("a" * 99)], tokenizer, 60)
    assert rows.look(4) == [0, 2]
    assert sum(rows[0][1]) == 2  # b and its stop token
    assert rows.report() == "dropped 2 of 4 rows, the first is row 1: 2 x longer than 60 tokens"
    endless = copy.deepcopy(tokenizer)
    endless.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    rows = encoded([env("a"), env("a", ""), EnvBase(env("a").prompt)], endless)
    assert rows.look(3) == [0]
    assert "1 x nothing to train; 1 x this environment has no answer to imitate" in rows.report()


def test_inspect_shows_what_trains_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [("Say\nyes", "yes 🙂"), ("x" * 600, "no"), ("b", "c")]
    data = write_rows(tmp_path / "data.jsonl", *({"prompt": prompt, "target": target} for prompt, target in rows))
    done = run_main("sft.py", "--dataset", data, "--inspect", 2)
    assert (done.returncode, done.stderr) == (0, "")
    assert "<|im_start|>assistant\n«yes 🙂<|im_end|>»\n [9 of " in done.stdout
    assert "tokens train, the last is '<|im_end|>']" in done.stdout
    assert "dropped 1 of 2 rows, the first is row 1: 1 x longer than 512 tokens" in done.stdout
    assert "«c" not in done.stdout  # two rows were asked for
    assert [p.name for p in tmp_path.iterdir()] == ["data.jsonl"]


def test_evaluation_is_a_mean_over_tokens_however_it_is_cut(tiny, tokenizer, tmp_path):
    args = sft.Args(output_dir=str(tmp_path / "run"), eval_steps=0, num_samples=4)
    run = common.Run(args, "sft.py", None, None, bundled_lr=0.0, real_lr=0.0)
    policy = common.load_policy(run)
    envs = [EnvBase([{"role": "user", "content": "a" * n}], "b" * (3 * n)) for n in (1, 2, 5)]
    conversations = [sft.encode(env, tokenizer, 512) for env in envs]
    tokens, total = sum(sum(mask) for _, mask in conversations), 0.0
    for ids, mask in conversations:
        logprobs = tiny(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(logprobs[t - 1, ids[t]].item() for t in range(len(ids)) if mask[t])
    for run.micro_batch_tokens in (10_000, 1):
        metrics = sft.evaluate_loss(run, policy, conversations)
        assert metrics["eval/ce_loss"] == pytest.approx(total / tokens, rel=1e-5)
        assert metrics["eval/perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)


def test_script_trains_multi_turn_messages_and_logs(tmp_path):
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate("abcd")]
    long = {"messages": [*turns[:2], turns[2] | {"content": "c" * 600}, turns[3]]}
    data = write_rows(tmp_path / "chats.jsonl", *[{"messages": turns}] * 4, long)
    flags = ["--dataset", data, "--eval-dataset", data, "--num-steps", 3, "--batch-size", 2, "--logging-steps", 1]
    fine(run_main("sft.py", *flags, "--output-dir", tmp_path / "run"))
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert lines[3]["eval/ce_loss"] < lines[0]["eval/ce_loss"]
    dropped = "dropped 1 of 5 rows, the first is row 4: 1 x longer than 512 tokens"
    assert record_of(tmp_path / "run")["dropped"] == [dropped, f"evaluation: {dropped}"]
