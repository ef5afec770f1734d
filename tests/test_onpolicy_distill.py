"""Both estimators have the gradient they claim, over a whole small language; teachers that do not fit."""

import itertools
import math

import pytest
import torch
from conftest import fine, mistake, read_metrics, record_of, run_main, write_rows
from safetensors.torch import load_file
from test_grpo import F64
from transformers import AutoTokenizer

import common
from onpolicy_distill import reverse_kl_loss, sampled_kl_loss


def test_what_is_masked_never_counts_and_nothing_trained_stays_finite():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 5, dtype=F64)
    mask = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 1, 1]])
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
    student, teacher = torch.randn(2, 13, 3, dtype=F64).requires_grad_()
    totals = [0.0] * 3
    for a, b, c in itertools.product(range(3), repeat=3):
        rows, ones = [0, 1 + a, 4 + 3 * a + b], torch.ones(3)  # of the prefixes "", a and ab
        p, q = student[rows].log_softmax(-1), teacher[rows].log_softmax(-1)
        logprobs, scores = (t[[0, 1, 2], [a, b, c]] for t in (p, q))
        reach = logprobs.sum().exp().detach()
        losses = [(p.exp() * (p - q)).sum()]
        losses += [reverse_kl_loss(student[rows], teacher[rows], ones, denominator=1)[0]]
        losses += [sampled_kl_loss(logprobs, scores, ones, denominator=1)[0]]
        assert losses[1].item() == pytest.approx(losses[0].item())
        assert losses[2].item() == pytest.approx((logprobs - scores).sum().item())  # its gradient is not that of this
        totals = [total + reach * loss for total, loss in zip(totals, losses, strict=True)]
    assert torch.autograd.grad(totals[1] + totals[2], teacher, retain_graph=True, allow_unused=True) == (None,)
    exact, full, sampled = (torch.autograd.grad(total, student, retain_graph=True)[0] for total in totals)
    torch.testing.assert_close(full, exact, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(sampled, exact, rtol=1e-12, atol=1e-14)
    assert exact.abs().max() > 1e-3


def test_other_tokenizers_are_refused_by_their_first_token(tmp_path):
    other = AutoTokenizer.from_pretrained(common.BUNDLED["tiny"])
    other.add_tokens(["<one more>"])
    other.save_pretrained(tmp_path)  # a tokenizer alone: it is refused before any model is loaded
    flags = ["--num-steps", 1, "--eval-steps", 0, "--output-dir", tmp_path / "run", "--teacher-model", tmp_path]
    told = mistake(run_main("onpolicy_distill.py", *flags))
    assert "different tokenizers: token 299 is None in the student's and '<one more>'" in told


SMALL = ["--num-steps", 2, "--batch-size", 4, "--max-new-tokens", 24, "--output-dir"]


def test_the_script_writes_its_folder_and_never_the_teacher(tmp_path):
    fine(run_main("onpolicy_distill.py", *SMALL, tmp_path / "run", "--eval-samples", 4))
    lines = read_metrics(tmp_path / "run")
    assert all("eval/accuracy" in lines[step] for step in (0, 2))
    assert {"loss/reverse_kl", "teacher/entropy", "policy/entropy", "reward/mean", "optim/grad_norm"} <= set(lines[1])
    assert lines[1]["policy/logprob_gap"] < 1e-4
    record = record_of(tmp_path / "run")
    assert (record["teacher_model"], record["loss"], record["learning_rate"]) == ("tiny-teacher", "full", 3e-4)
    names = load_file(tmp_path / "run" / "step_2" / "model.safetensors").keys()
    assert names | {"lm_head.weight"} == load_file(f"{common.BUNDLED['tiny']}/model.safetensors").keys()  # tied
    moments = load_file(tmp_path / "run" / "step_2" / "optimizer.safetensors")
    assert len({name.split(".")[0] for name in moments}) == len(names)


def test_prompts_need_no_answer_and_no_reward(tmp_path):
    data = write_rows(tmp_path / "prompts.jsonl", *({"prompt": f"What is {i} + 3?"} for i in range(9)))
    done = fine(run_main("onpolicy_distill.py", *SMALL, tmp_path / "run", "--dataset", data, "--loss", "sampled"))
    assert "no evaluation" in done.stdout
    line, _ = read_metrics(tmp_path / "run")
    assert "loss/reverse_kl" in line
    assert not any(name.startswith(("reward/", "eval/")) for name in line)
