"""Advantages and the GRPO loss have the values and gradients of the papers."""

import math
from collections import Counter

import pytest
import torch

import grpo
from grpo import group_advantages, grpo_loss

F64 = torch.float64
CLIP = {"clip_eps": 0.2, "clip_eps_high": 0.3}


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_advantages_are_differences_and_equal_rewards_give_exactly_zero(dtype):
    """Scaled ones are below, in the paper's loss."""
    assert group_advantages(tensor([0.0, 1.0], [1.0, 4.0]), "none").tolist() == [[-0.5, 0.5], [-1.5, 1.5]]
    rewards = torch.full((2, 8), 0.1, dtype=dtype)
    assert dtype == F64 or rewards[0].std() != 0  # the trap: the std of eight 0.1s is not 0 in float32
    assert not any(group_advantages(rewards, scale).any() for scale in ("group", "none"))


def tensor(*rows):
    return torch.tensor(rows, dtype=F64)


def test_expected_kl_gradient_is_that_of_the_kl_divergence():
    """Enumerated over a vocabulary: the plain k3 estimator fails this, ours does not."""
    torch.manual_seed(0)
    logits, ref = torch.randn(5, dtype=F64, requires_grad=True), torch.randn(5, dtype=F64).log_softmax(-1)
    logp = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)
    rows, mask = logp[:, None].expand(5, 2), torch.tensor([[0, 1]] * 5)
    options = CLIP | {"loss_type": "dapo", "denominator": 1, "kl_penalty": 1.0}
    per_token = []
    for i in range(5):
        inputs = (rows[i : i + 1], rows[i : i + 1].detach(), tensor(0.0), mask[:1])
        per_token.append(grpo_loss(*inputs, ref_logprobs=ref[i].expand(1, 2), **options)[0])
    expected = sum(p * loss for p, loss in zip(logp.exp().detach(), per_token, strict=True))
    torch.testing.assert_close(torch.autograd.grad(expected, logits)[0], exact)


@pytest.mark.parametrize("cap", [2.0, math.inf])
def test_importance_weights_by_hand(cap):
    """Trainer over engine, so likelier for the trainer weighs more; a small ratio stays small, a large one is cut."""
    ratios = tensor([1.5, 3.0, 1.0], [0.5, 0.25, 1.0])  # the third token of both rows does not train
    products = tensor([4.5, 4.5, 4.5], [0.125, 0.125, 0.125])
    for correction, wanted in {"token": ratios, "sequence": products}.items():
        weights = grpo.importance_weights(ratios.log(), correction, cap)
        torch.testing.assert_close(weights, wanted.clamp(max=cap))


def paper(sequences, rewards, *, loss_type, beta, max_new_tokens):
    """The loss as the papers write it. Each sequence: of each token its log-probs, new, old and reference, and weight.

    GRPO: https://arxiv.org/abs/2402.03300, equation 3; DAPO: https://arxiv.org/abs/2503.14476, equation 8;
    Dr. GRPO: https://arxiv.org/abs/2503.20783, figure 1.
    """
    advantages = []
    for group in rewards:
        mean = sum(group) / len(group)
        deviation = math.sqrt(sum((reward - mean) ** 2 for reward in group) / (len(group) - 1))
        advantages += [(reward - mean) / (deviation + 1e-4) for reward in group]
    objectives = []
    for tokens, advantage in zip(sequences, advantages, strict=True):
        objectives.append([])
        for new, old, ref, weight in tokens:
            ratio, gap = (new - old).exp(), ref - new
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage)
            objectives[-1].append(weight * surrogate - beta * ratio * (gap.exp() - gap - 1))
    if loss_type == "grpo":
        return -sum(sum(terms) / max(len(terms), 1) for terms in objectives) / len(sequences)
    count = sum(map(len, sequences)) if loss_type == "dapo" else len(sequences) * max_new_tokens
    return -sum(map(sum, objectives)) / count


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_value_and_gradient_are_those_of_the_paper(loss_type, beta, weighted):
    """With clipping on both sides and a completion of which nothing trains, added up over micro-batches."""
    torch.manual_seed(1)
    logprobs, old, ref = -torch.rand(3, 6, 7, dtype=F64)
    mask = torch.randint(0, 2, (6, 7))
    mask[5] = 0
    logprobs[mask == 0], old[mask == 0] = math.nan, -math.inf  # what is masked may be anything
    rewards = tensor([0.0, 1.0, 0.1], [1.0, 0.1, 0.1])
    weights = 2 * torch.rand_like(logprobs) if weighted else torch.ones_like(logprobs)
    denominator = {"dapo": mask.sum().item(), "grpo": 6, "dr_grpo": 6 * 9}[loss_type]
    options = CLIP | {"denominator": denominator, "loss_type": loss_type, "kl_penalty": beta}
    advantages, per_row = group_advantages(rewards, "group").flatten(), {}
    per_row |= {"ref_logprobs": ref} if beta else {}
    per_row |= {"importance_weights": weights} if weighted else {}
    value, sums, gradient = 0.0, Counter(), torch.empty_like(logprobs)
    for part in (slice(0, 1), slice(1, 5), slice(5, 6)):
        rows = {name: tensor[part] for name, tensor in per_row.items()}
        now = logprobs[part].clone().requires_grad_()
        loss, named = grpo_loss(now, old[part], advantages[part], mask[part], **rows, **options)
        (gradient[part],) = torch.autograd.grad(loss, now)
        value += loss.item()
        sums.update(named)

    new = logprobs.clone().requires_grad_()
    columns = [[tensor[i][mask[i] == 1] for tensor in (new, old, ref, weights)] for i in range(6)]
    sequences = [list(zip(*column, strict=True)) for column in columns]
    expected = paper(sequences, rewards.tolist(), loss_type=loss_type, beta=beta, max_new_tokens=9)
    expected.backward()
    assert value == pytest.approx(expected.item(), rel=1e-12)
    terms = [(new - old).exp() * ((ref - new).exp() - (ref - new) - 1) for row in sequences for new, old, ref, _ in row]
    assert sums["loss/kl"] == pytest.approx(sum(terms).item() if beta else 0, rel=1e-12)
    torch.testing.assert_close(gradient, new.grad, rtol=1e-12, atol=1e-14)
    if loss_type == "dapo" and not weighted:
        assert sums["loss/policy"].item() == pytest.approx(value * denominator - beta * sums["loss/kl"])
    ratios = [(new - old).exp().item() for tokens in sequences for new, old, *_ in tokens]
    rises = [advantage > 0 for advantage, tokens in zip(advantages, sequences, strict=True) for _ in tokens]
    clipped = [ratio > 1.3 if rising else ratio < 0.8 for ratio, rising in zip(ratios, rises, strict=True)]
    assert sums["policy/ratio_mean"].item() == pytest.approx(sum(ratios))
    assert sums["policy/clip_frac"].item() == sum(clipped) > 0
