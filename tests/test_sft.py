"""The supervised loss has its hand-computed value and gradient, and adds up over any cut of a batch."""

import copy
import json
import math

import pytest
import torch
from conftest import read_metrics, run_main, run_script

import chat
import common
import envs
import sft
from envs import EnvBase, UserError


def test_loss_by_hand():
    logprobs = torch.tensor([[0.0, math.log(0.5), math.log(0.1)], [0.0, math.log(0.2), 0.0]], dtype=torch.float64)
    logprobs.requires_grad_()
    mask = torch.tensor([[0, 1, 0], [0, 1, 0]])
    loss, sums = sft.sft_loss(logprobs, mask, 4)
    loss.backward()
    assert loss.item() == pytest.approx((math.log(2) + math.log(5)) / 4, abs=1e-15)
    assert logprobs.grad.tolist() == [[0, -0.25, 0], [0, -0.25, 0]]
    assert sums["loss/total"].item() == pytest.approx(math.log(10), abs=1e-15)
    assert not sums["loss/total"].requires_grad


def test_parts_add_up_and_inputs_stay_as_they_are():
    torch.manual_seed(0)
    logprobs, mask = -torch.rand(6, 9, dtype=torch.float64), torch.randint(0, 2, (6, 9))
    before = logprobs.clone()
    whole, _ = sft.sft_loss(logprobs, mask, 30)
    parts = sum(sft.sft_loss(logprobs[i : i + 2], mask[i : i + 2], 30)[0] for i in (0, 2, 4))
    assert whole.item() == pytest.approx(parts.item(), abs=1e-15)
    assert torch.equal(logprobs, before)
    assert sft.sft_loss(logprobs, torch.zeros_like(mask), 30)[0] == 0


def test_padding_cannot_reach_the_gradient():
    logprobs = torch.tensor([[math.nan, -1.0]], requires_grad=True)
    sft.sft_loss(logprobs, torch.tensor([[0, 1]]), 1)[0].backward()
    assert logprobs.grad.tolist() == [[0, -1]]


def test_long_and_untrainable_conversations_are_dropped_and_counted(tokenizer):
    def env(user, assistant="b"):
        return EnvBase([{"role": "user", "content": user}], assistant)

    ((_ids, mask),), dropped = sft.encode([env("a"), env("a" * 99), env("a" * 99)], tokenizer, 60)
    assert sum(mask) == 2  # b and its stop token
    assert dropped == ["dropped 2 of 3 rows longer than 60 tokens"]
    endless = copy.deepcopy(tokenizer)
    endless.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    kept, dropped = sft.encode([env("a"), env("a", "")], endless, 60)
    assert len(kept) == 1
    assert dropped == ["dropped 1 of 2 rows with nothing to train"]
    with pytest.raises(UserError, match="no conversation is left: dropped 1 of 1 rows longer than 60 tokens"):
        sft.encode([env("a" * 99)], tokenizer, 60)
    _, dropped = sft.encode([env("a"), EnvBase(env("a").prompt)], tokenizer, 60)
    assert (
        "dropped 1 of 2 rows of which it is not certain what trains; the first, row 1: this environment has"
        in dropped[0]
    )


def test_inspect_shows_what_trains_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [("Say\nyes", "yes 🙂"), ("x" * 600, "no"), ("b", "c")]
    lines = [json.dumps({"prompt": prompt, "target": target}) + "\n" for prompt, target in rows]
    (tmp_path / "data.jsonl").write_text("".join(lines))
    done = run_main("sft.py", "--dataset", tmp_path / "data.jsonl", "--inspect", 2)
    assert (done.returncode, done.stderr) == (0, "")
    assert "<|im_start|>assistant\n«yes 🙂<|im_end|>»\n [9 of " in done.stdout
    assert "tokens train, the last is '<|im_end|>']" in done.stdout
    assert "dropped 1 of 2 rows longer than 512 tokens" in done.stdout
    assert "«c" not in done.stdout  # two rows were asked for
    assert [p.name for p in tmp_path.iterdir()] == ["data.jsonl"]


def test_trained_tokens_are_coloured(tokenizer):
    ids, mask = chat.encode_chat(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    text = sft.show(tokenizer, ids, mask)
    assert [text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style)] == ["«b<|im_end|>»"]


def test_evaluation_is_a_mean_over_tokens_however_it_is_cut(tiny, tokenizer, tmp_path):
    args = sft.Args(output_dir=str(tmp_path / "run"), eval_steps=0, num_samples=4)
    run = common.Run(args, "sft.py", None, None, bundled_lr=0.0, real_lr=0.0)
    policy = common.load_policy(run)
    envs = [EnvBase([{"role": "user", "content": "a" * n}], "b" * (3 * n)) for n in (1, 2, 5)]
    conversations, _ = sft.encode(envs, tokenizer, 512)
    found = []
    for run.micro_batch_tokens in (10_000, 1):
        found.append(sft.evaluate_loss(run, policy, conversations))
    tokens, total = sum(sum(mask) for _, mask in conversations), 0.0
    for ids, mask in conversations:
        logprobs = tiny(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(logprobs[t - 1, ids[t]].item() for t in range(len(ids)) if mask[t])
    for metrics in found:
        assert metrics["eval/ce_loss"] == pytest.approx(total / tokens, rel=1e-5)
        assert metrics["eval/perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)


def test_script_trains_multi_turn_messages_and_logs(tmp_path):
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate("abcd")]
    data, row = tmp_path / "chats.jsonl", json.dumps({"messages": turns}) + "\n"
    data.write_text(row * 4 + row.replace('"c"', '"' + "c" * 600 + '"'))
    flags = ["--dataset", data, "--eval-dataset", data, "--num-steps", 3, "--batch-size", 2, "--logging-steps", 1]
    done = run_script("sft.py", *flags, "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert lines[3]["eval/ce_loss"] < lines[0]["eval/ce_loss"]
    assert "before/after eval/ce_loss" in done.stdout
    dropped = "dropped 1 of 5 rows longer than 512 tokens"
    assert json.loads((tmp_path / "run" / "args.json").read_text())["dropped"] == [dropped, f"evaluation: {dropped}"]
    assert f"\n{dropped}\nevaluation: {dropped}\n" in done.stdout


def test_of_a_prompt_nothing_trains_and_of_messages_every_turn_with_a_weight(tokenizer):
    user, first = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    rows = [{"prompt": [user, first, user], "target": "c"}, {"messages": [user, first, user, first | {"content": "c"}]}]
    rows.append({"messages": [user, first, user, first | {"content": "c", "weight": 0}]})
    encoded, _ = sft.encode([envs.row_to_env(row, "row") for row in rows], tokenizer, 512)
    trained = [tokenizer.decode([i for i, keep in zip(*row, strict=True) if keep]) for row in encoded]
    assert trained == ["c<|im_end|>", "b<|im_end|>c<|im_end|>", "b<|im_end|>"]
