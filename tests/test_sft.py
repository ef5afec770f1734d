"""The supervised loss, what of the data it trains on, and its evaluation, which is the same for any cut of a batch."""

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


def test_what_is_masked_never_counts_and_nothing_trained_is_0():
    logprobs = torch.tensor([[math.nan, -2.0, -1.0], [0.0, -3.0, -math.inf]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[0, 1, 0], [0, 1, 0]])
    loss, sums = sft.sft_loss(logprobs, mask, 4)
    loss.backward()
    assert (loss.item(), sums["loss/total"].item()) == (5 / 4, 5)
    assert logprobs.grad.tolist() == [[0, -0.25, 0], [0, -0.25, 0]]
    assert sft.sft_loss(logprobs, torch.zeros_like(mask), 4)[0] == 0


def test_conversations_with_nothing_to_train_are_dropped_and_counted(tokenizer):
    endless, user = copy.deepcopy(tokenizer), [{"role": "user", "content": "a"}]
    endless.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    encode = functools.partial(sft.encode, tokenizer=endless, max_length=512)
    rows = tables.Encoded([EnvBase(user, "b"), EnvBase(user, ""), EnvBase(user)], encode)
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


def test_evaluation_is_a_mean_over_tokens_however_it_is_cut(tiny, tokenizer, make_run):
    run = make_run()
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
