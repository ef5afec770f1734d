"""Both estimators have the gradient they claim, by hand, over a whole small language; teachers that do not fit."""

import itertools
import json
import math
import types

import pytest
import torch
from conftest import read_metrics, run_main
from safetensors.torch import load_file
from transformers import AutoTokenizer

import common
import onpolicy_distill
from onpolicy_distill import reverse_kl_loss, sampled_kl_loss

F64 = torch.float64


def tensor(*values):
    return torch.tensor(values, dtype=F64)


# ---- Values and gradients by hand


def test_reverse_kl_value_and_gradient_by_hand():
    """pi = (3/4, 1/4), q = (1/2, 1/2): KL = 3/4 log(3/2) + 1/4 log(1/2), its slope pi_v (log pi_v/q_v - KL)."""
    student = tensor(math.log(3), 0.0).requires_grad_()
    loss, sums = reverse_kl_loss(student, tensor(5.0, 5.0), torch.tensor(1), denominator=4)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert loss.item() == pytest.approx(kl / 4)
    assert sums["loss/reverse_kl"].item() == pytest.approx(kl)
    assert sums["teacher/entropy"].item() == pytest.approx(math.log(2))
    loss.backward()
    expected = tensor(0.75 * (math.log(1.5) - kl), 0.25 * (math.log(0.5) - kl)) / 4
    torch.testing.assert_close(student.grad, expected)


def test_sampled_value_and_gradient_by_hand():
    """The value is the mean log-ratio; the gradient in log pi is the log-ratio itself, not 1."""
    logprobs = tensor([0.0, -1.0, -2.0]).requires_grad_()
    teacher, mask = tensor([0.0, -1.5, -0.5]).requires_grad_(), torch.tensor([[0, 1, 1]])
    loss, sums = sampled_kl_loss(logprobs, teacher[None], mask, denominator=2)
    assert loss.item() == pytest.approx((0.5 - 1.5) / 2)
    assert sums["loss/reverse_kl"].item() == pytest.approx(0.5 - 1.5)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, tensor([0.0, 0.5, -1.5]) / 2)
    assert teacher.grad is None


def random_case(rows=3, width=4, vocab=5):
    torch.manual_seed(0)
    student, teacher = torch.randn(rows, width, vocab, dtype=F64), torch.randn(rows, width, vocab, dtype=F64)
    return student, teacher, torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 1, 1]])


def test_what_is_masked_never_counts_and_nothing_trained_stays_finite():
    student, teacher, mask = random_case()
    broken = student.masked_fill(~mask[..., None].bool(), math.nan)
    one, other = (reverse_kl_loss(logits, teacher, mask, denominator=6)[0] for logits in (student, broken))
    assert torch.equal(one, other)
    nothing = torch.zeros_like(mask)
    for loss, sums in (
        reverse_kl_loss(student.requires_grad_(), teacher, nothing, denominator=6),
        reverse_kl_loss(student[:0, 0], teacher[:0, 0], nothing[:0, 0], denominator=6),
        sampled_kl_loss(student[..., 0], teacher[..., 0], nothing, denominator=6),
    ):
        (gradient,) = torch.autograd.grad(loss, student)
        assert (loss.item(), gradient.abs().max().item()) == (0.0, 0.0)
        assert not any(sums.values())


def test_both_estimators_have_the_gradient_of_the_kl_with_prefixes_held_fixed():
    """Over all completions of a small language: sum over t of E[KL_t], each prefix's probability a constant."""
    torch.manual_seed(3)
    student, teacher = torch.randn(13, 3, dtype=F64, requires_grad=True), torch.randn(13, 3, dtype=F64)
    totals = [0.0] * 4
    for a, b, c in itertools.product(range(3), repeat=3):
        rows, ones = [0, 1 + a, 4 + 3 * a + b], torch.ones(3)  # of the prefixes "", a and ab
        p, q = student[rows].log_softmax(-1), teacher[rows].log_softmax(-1)
        logprobs, scores = (t[[0, 1, 2], [a, b, c]] for t in (p, q))
        reach = logprobs.sum().exp().detach()
        losses = [(p.exp() * (p - q)).sum(), (logprobs - scores).sum()]
        losses += [reverse_kl_loss(student[rows], teacher[rows], ones, denominator=1)[0]]
        losses += [sampled_kl_loss(logprobs, scores, ones, denominator=1)[0]]
        totals = [total + reach * loss for total, loss in zip(totals, losses, strict=True)]
    exact, none, full, sampled = (torch.autograd.grad(total, student, retain_graph=True)[0] for total in totals)
    torch.testing.assert_close(full, exact, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(sampled, exact, rtol=1e-12, atol=1e-14)
    assert exact.abs().max() > 1e-3
    assert none.abs().max() < 1e-15  # the well-known wrong one: the log-ratio differentiated


@pytest.mark.parametrize("loss", ["full", "sampled"])
def test_a_chunk_gives_the_loss_its_sums_and_the_log_probs_at_the_temperature(loss):
    student, teacher, mask = random_case()
    logits, states, targets = student[mask.bool()], teacher[mask.bool()], torch.tensor([4, 0, 1, 2, 2, 3])
    head = types.SimpleNamespace(head=lambda states, temperature=1: states / temperature)
    options = {"teacher": head, "args": onpolicy_distill.Args(loss=loss, temperature=0.7), "denominator": 9.0}
    value, kl, entropy, logprobs = onpolicy_distill.loss_of_chunk(logits, targets, states, **options)
    p, q = logits.log_softmax(-1), (states / 0.7).log_softmax(-1)
    expected = (p.exp() * (p - q)).sum() if loss == "full" else (p - q)[torch.arange(6), targets].sum()
    assert (value.item(), kl.item()) == pytest.approx((expected.item() / 9, expected.item()))
    assert entropy.item() == pytest.approx(-(q.exp() * q).sum().item())
    torch.testing.assert_close(logprobs, p[torch.arange(6), targets])


# ---- The script


def test_other_tokenizers_are_refused_by_their_first_token(tmp_path):
    other = AutoTokenizer.from_pretrained(common.BUNDLED["tiny"])
    other.add_tokens(["<one more>"])
    other.save_pretrained(tmp_path)  # a tokenizer alone: it is refused before any model is loaded
    flags = ["--num-steps", 1, "--eval-steps", 0, "--output-dir", tmp_path / "run", "--teacher-model", tmp_path]
    done = run_main("onpolicy_distill.py", *flags)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1), done.stderr
    assert "different tokenizers: token 299 is None in the student's and '<one more>'" in done.stderr


SMALL = ["--num-steps", 2, "--batch-size", 4, "--max-new-tokens", 24, "--output-dir"]


@pytest.mark.parametrize("loss", ["full", "sampled"])
def test_the_script_writes_its_folder_and_never_the_teacher(tmp_path, loss):
    done = run_main("onpolicy_distill.py", *SMALL, tmp_path / "run", "--eval-samples", 4, "--loss", loss)
    assert done.returncode == 0, done.stderr
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all("eval/accuracy" in lines[step] for step in (0, 2))
    assert {"loss/reverse_kl", "teacher/entropy", "policy/entropy", "reward/mean", "optim/grad_norm"} <= set(lines[1])
    assert lines[1]["policy/logprob_gap"] < 1e-4
    record = json.loads((tmp_path / "run" / "args.json").read_text())
    assert (record["teacher_model"], record["loss"], record["learning_rate"]) == ("tiny-teacher", loss, 3e-4)
    names = load_file(tmp_path / "run" / "step_2" / "model.safetensors").keys()
    assert names | {"lm_head.weight"} == load_file(f"{common.BUNDLED['tiny']}/model.safetensors").keys()  # tied
    moments = load_file(tmp_path / "run" / "step_2" / "optimizer.safetensors")
    assert len({name.split(".")[0] for name in moments}) == len(names)
    records = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1] * 4 + [2] * 4
    assert set(records[0]) == {"step", "prompt", "completion", "finish_reason", "reward"}


def test_prompts_need_no_answer_and_no_reward(tmp_path):
    lines = [json.dumps({"prompt": f"What is {i} + 3?"}) for i in range(9)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    done = run_main("onpolicy_distill.py", *SMALL, tmp_path / "run", "--dataset", tmp_path / "prompts.jsonl")
    assert done.returncode == 0, done.stderr
    assert "no evaluation" in done.stdout
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2]
    assert not any(name.startswith(("reward/", "eval/")) for name in lines[0])
    assert "loss/reverse_kl" in lines[0]
