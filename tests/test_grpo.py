"""Advantages and the GRPO loss have their hand-computed values and gradients."""

import math

import pytest
import torch

import grpo
from grpo import group_advantages, grpo_loss

F64 = torch.float64
CLIP = {"clip_eps": 0.2, "clip_eps_high": 0.3}


# ---- Advantages


def test_advantages_by_hand():
    rewards = torch.tensor([[0.0, 1.0], [1.0, 4.0]], dtype=F64)
    std = math.sqrt(0.5)  # sample standard deviation of 0 and 1: Bessel's correction
    expected = [[-0.5 / (std + 1e-4), 0.5 / (std + 1e-4)], [-1.5 / (3 * std + 1e-4), 1.5 / (3 * std + 1e-4)]]
    torch.testing.assert_close(group_advantages(rewards, "group"), torch.tensor(expected, dtype=F64))
    assert group_advantages(rewards, "none").tolist() == [[-0.5, 0.5], [-1.5, 1.5]]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("scale", ["group", "none"])
def test_equal_rewards_give_exactly_zero(dtype, scale):
    rewards = torch.full((2, 8), 0.1, dtype=dtype)
    assert dtype == F64 or rewards[0].std() != 0  # the trap: the std of eight 0.1s is not 0 in float32
    assert not group_advantages(rewards, scale).any()


# ---- The loss


def tensor(*rows):
    return torch.tensor(rows, dtype=F64)


def loss_and_gradient(logprobs, old, advantages, mask, **options):
    logprobs = logprobs.clone().requires_grad_()
    loss, sums = grpo_loss(logprobs, old, advantages, mask, **(CLIP | {"loss_type": "dapo"} | options))
    loss.backward()
    return loss.item(), logprobs.grad, sums


def test_on_policy_loss_and_gradient_by_hand():
    old = tensor([0.0, -1.0, -2.0], [0.0, -0.5, -9.0])
    mask = torch.tensor([[0, 1, 1], [0, 1, 0]])
    loss, gradient, sums = loss_and_gradient(old, old, tensor(2.0, -1.0), mask, denominator=3)
    assert loss == pytest.approx(-(2 + 2 - 1) / 3)
    torch.testing.assert_close(gradient, tensor([0, -2, -2], [0, 1, 0]) / 3)
    expected = {"loss/policy": -3.0, "policy/ratio_mean": 3.0, "policy/clip_frac": 0.0}
    assert {name: value.item() for name, value in sums.items()} == expected


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "slope"),
    [
        (1.1, 1.0, 1.1, 1.1),
        (1.5, 1.0, 1.3, 0.0),  # clipped above
        (0.5, 1.0, 0.5, 0.5),  # not clipped: lowering further would not help
        (0.5, -1.0, -0.8, 0.0),  # clipped below
        (1.5, -1.0, -1.5, -1.5),  # not clipped
    ],
)
def test_clipping_by_hand(ratio, advantage, objective, slope):
    logprobs, old, mask = tensor([0.0, math.log(ratio)]), tensor([0.0, 0.0]), torch.tensor([[0, 1]])
    loss, gradient, sums = loss_and_gradient(logprobs, old, tensor(advantage), mask, denominator=1)
    assert loss == pytest.approx(-objective)
    assert gradient[0, 1].item() == pytest.approx(-slope)
    assert sums["policy/clip_frac"].item() == float(slope == 0)
    assert sums["policy/ratio_mean"].item() == pytest.approx(ratio)


def test_kl_value_and_gradient_by_hand():
    logprobs, old, ref = (tensor([0.0, math.log(p)]) for p in (0.5, 0.4, 0.2))
    ratio, d = 0.5 / 0.4, math.log(0.2 / 0.5)
    k3 = math.exp(d) - d - 1
    inputs = (logprobs, old, tensor(0.0), torch.tensor([[0, 1]]))
    loss, gradient, sums = loss_and_gradient(*inputs, denominator=1, ref_logprobs=ref, kl_penalty=0.3)
    assert loss == pytest.approx(0.3 * ratio * k3)
    assert sums["loss/kl"].item() == pytest.approx(ratio * k3)
    # d/dlogprob of ratio * (e^d - d - 1): the ratio is live, and dd/dlogprob = -1
    assert gradient[0, 1].item() == pytest.approx(0.3 * (ratio * k3 + ratio * (1 - math.exp(d))))


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


@pytest.mark.parametrize(
    ("correction", "cap", "weights"),
    [
        ("token", 2.0, [[1.5, 2.0, 1.0], [0.5, 0.25, 1.0]]),  # 3 is cut to 2; a small ratio stays small
        ("sequence", 2.0, [[2.0, 2.0, 2.0], [0.125, 0.125, 0.125]]),  # 1.5 * 3 is cut; 0.5 * 0.25
        ("token", math.inf, [[1.5, 3.0, 1.0], [0.5, 0.25, 1.0]]),
        ("sequence", math.inf, [[4.5, 4.5, 4.5], [0.125, 0.125, 0.125]]),
    ],
)
def test_importance_weights_by_hand(correction, cap, weights):
    """Trainer over engine, so likelier for the trainer weighs more; the third token of both rows does not train."""
    log_ratio = tensor([1.5, 3.0, 1.0], [0.5, 0.25, 1.0]).log()
    torch.testing.assert_close(grpo.importance_weights(log_ratio, correction, cap), tensor(*weights))


def random_case(rows=6, width=7):
    torch.manual_seed(1)
    logprobs, old, ref = (-torch.rand(rows, width, dtype=F64) for _ in range(3))
    mask = torch.randint(0, 2, (rows, width))
    mask[:, 1] = 1
    return logprobs, old, torch.randn(rows, dtype=F64), mask, ref


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_parts_add_up_in_value_gradient_and_metrics(loss_type):
    logprobs, old, advantages, mask, ref = random_case()
    options = {"loss_type": loss_type, "denominator": 11.0, "kl_penalty": 0.1}
    loss, gradient, sums = loss_and_gradient(logprobs, old, advantages, mask, ref_logprobs=ref, **options)
    cuts = [slice(0, 1), slice(1, 4), slice(4, 6)]
    parts = [
        loss_and_gradient(logprobs[c], old[c], advantages[c], mask[c], ref_logprobs=ref[c], **options) for c in cuts
    ]
    assert loss == pytest.approx(sum(p[0] for p in parts), abs=1e-14)
    torch.testing.assert_close(gradient, torch.cat([p[1] for p in parts]), rtol=1e-12, atol=1e-14)
    for name, value in sums.items():
        torch.testing.assert_close(value, sum(p[2][name] for p in parts), rtol=1e-12, atol=1e-14)


def paper(logprobs, old, ref, rewards, mask, weights, *, loss_type, beta, max_new_tokens):
    """The objective as the papers write it, sequence by sequence and token by token, in Python's own floats.

    GRPO: https://arxiv.org/abs/2402.03300, equation 3; DAPO: https://arxiv.org/abs/2503.14476, equation 8;
    Dr. GRPO: https://arxiv.org/abs/2503.20783, figure 1.
    """
    sequences = []
    for group in range(len(rewards)):
        mean = sum(rewards[group]) / len(rewards[group])
        variance = sum((r - mean) ** 2 for r in rewards[group]) / (len(rewards[group]) - 1)
        for member, reward in enumerate(rewards[group]):
            i = group * len(rewards[group]) + member
            advantage, terms = (reward - mean) / (math.sqrt(variance) + 1e-4), []
            for t in range(len(mask[i])):
                if mask[i][t]:
                    ratio = math.exp(logprobs[i][t] - old[i][t])
                    clipped = min(max(ratio, 0.8), 1.3)
                    gap = ref[i][t] - logprobs[i][t]
                    kl = ratio * (math.exp(gap) - gap - 1)
                    terms.append(weights[i][t] * min(ratio * advantage, clipped * advantage) - beta * kl)
            sequences.append(terms)
    if loss_type == "grpo":
        return -sum(sum(terms) / len(terms) for terms in sequences) / len(sequences)
    tokens = sum(map(len, sequences)) if loss_type == "dapo" else len(sequences) * max_new_tokens
    return -sum(map(sum, sequences)) / tokens


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_value_and_gradient_are_those_of_the_paper(loss_type, beta, weighted):
    logprobs, old, _, mask, ref = random_case()
    rewards = tensor([0.0, 1.0, 0.1], [1.0, 0.1, 0.1])
    weights = 2 * torch.rand_like(logprobs) if weighted else torch.ones_like(logprobs)
    denominator = {"dapo": mask.sum().item(), "grpo": 6, "dr_grpo": 6 * 9}[loss_type]
    options = {"ref_logprobs": ref if beta else None, "importance_weights": weights if weighted else None}
    options |= {"denominator": denominator, "loss_type": loss_type, "kl_penalty": beta}
    advantages = group_advantages(rewards, "group").flatten()
    loss, gradient, _ = loss_and_gradient(logprobs, old, advantages, mask, **options)

    def naive(x):
        columns = (x.tolist(), old.tolist(), ref.tolist(), rewards.tolist(), mask.tolist(), weights.tolist())
        return paper(*columns, loss_type=loss_type, beta=beta, max_new_tokens=9)

    assert loss == pytest.approx(naive(logprobs), rel=1e-12)
    step = 1e-6
    for i, t in mask.nonzero().tolist():
        high, low = logprobs.clone(), logprobs.clone()
        high[i, t] += step
        low[i, t] -= step
        assert gradient[i, t].item() == pytest.approx((naive(high) - naive(low)) / (2 * step), rel=1e-5, abs=1e-8)
    assert not gradient[mask == 0].any()


def test_nothing_trained_is_finite_and_inputs_stay_as_they_are():
    logprobs, old, advantages, mask, _ = random_case()
    copies = [t.clone() for t in (logprobs, old, advantages, mask)]
    for loss_type in ("dapo", "grpo", "dr_grpo"):
        options = {"loss_type": loss_type, "denominator": 1}
        loss, gradient, sums = loss_and_gradient(logprobs, old, advantages, torch.zeros_like(mask), **options)
        assert loss == 0
        assert not gradient.any()
        assert all(value == 0 for value in sums.values())
    assert all(torch.equal(a, b) for a, b in zip((logprobs, old, advantages, mask), copies, strict=True))


def test_padding_cannot_reach_the_gradient():
    logprobs, ref = tensor([math.nan, -1.0]), tensor([math.inf, -1.0])
    inputs = (logprobs, logprobs, tensor(1.0), torch.tensor([[0, 1]]))
    _, gradient, _ = loss_and_gradient(*inputs, denominator=1, ref_logprobs=ref, kl_penalty=0.1)
    assert gradient.tolist() == [[0, -1]]
