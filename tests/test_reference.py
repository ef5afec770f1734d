"""A step of the real scripts has the gradient that the papers' formulas have, written out token by token.

Nothing of the project computes the expected side: the model is transformers' own, one sequence at a time, whole logits.
"""

import pytest
import torch
from capture import in_float64, puzzles
from conftest import read_metrics
from safetensors.torch import load_file
from test_grpo import paper
from test_invariance import SMALL, distance, launch
from transformers import AutoModelForCausalLM

import common
from common import completion_seed, encode_prompt

pytestmark = pytest.mark.slow
TEMPERATURE, FLAT = 0.7, [2]
ROLLOUTS = ["--max-new-tokens", 12, "--temperature", TEMPERATURE]


@pytest.fixture
def model():
    return in_float64(AutoModelForCausalLM.from_pretrained(common.BUNDLED["tiny"], dtype=torch.float64))


def in_order_of_the_optimizer(model):
    """Matrices, then vectors; by the step's number."""
    parameters = list(model.parameters())
    return [p for p in parameters if p.ndim >= 2] + [p for p in parameters if p.ndim < 2]


def run(folder, script, *flags, **options):
    """A step of the script in micro-batches: what tests/capture.py records, and the line of metrics."""
    flags = [*SMALL, "--micro-batch-tokens", "150", *map(str, flags)]
    launch([{"name": "run", "script": script, "flags": flags, "float64": True} | options], folder, processes=1)
    (line,) = read_metrics(folder / "run")
    return load_file(folder / "run-0.safetensors"), line


def difference(model, recorded, step):
    """Of the model's gradient and that of the recorded optimizer step."""
    expected = {f"{step}.{i}": p.grad for i, p in enumerate(in_order_of_the_optimizer(model))}
    return distance(expected, {name: tensor for name, tensor in recorded.items() if name.startswith(f"{step}.")})


def logprobs_of(model, prompt, completion, temperature):
    logits = model(torch.tensor([prompt + completion])).logits[0] / temperature
    rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return [row[token] for row, token in zip(rows, completion, strict=True)]


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_two_updates_of_grpo(tmp_path, tokenizer, model, loss_type):
    """Both of --ppo-steps 2: with the KL term, at a temperature, with a group of equal rewards, in micro-batches."""
    flags = ["--batch-size", 4, "--group-size", 4, *ROLLOUTS, "--loss-type", loss_type, "--clip-eps-high", 0.3]
    flags += ["--kl-penalty", 0.1, "--ppo-steps", 2]
    recorded, metrics = run(tmp_path, "grpo", *flags, frozen=True, flat=FLAT)
    drawn, rewards = [], []
    for p, row in enumerate(common.data_order(16, 1, 0, 4)):
        env = puzzles(FLAT)[row]
        prompt = encode_prompt(tokenizer, env.prompt)
        group = [recorded[f"completion.{completion_seed(1, 1, 4 * p + g)}"].tolist() for g in range(4)]
        rewards.append([env.get_reward(tokenizer.decode(ids, skip_special_tokens=True)) for ids in group])
        drawn += [(prompt, ids) for ids in group]
    assert len(set(rewards[FLAT[0]])) == 1

    with torch.no_grad():
        initial = [logprobs_of(model, prompt, ids, TEMPERATURE) for prompt, ids in drawn]
    optimizer = torch.optim.AdamW(in_order_of_the_optimizer(model), lr=1e-3, weight_decay=0.0)
    ratios = []
    for step in (1, 2):
        optimizer.zero_grad()
        sequences = []
        for (prompt, ids), before in zip(drawn, initial, strict=True):
            now = logprobs_of(model, prompt, ids, TEMPERATURE)
            sequences.append([(new, old, old, 1.0) for new, old in zip(now, before, strict=True)])
        paper(sequences, rewards, loss_type=loss_type, beta=0.1, max_new_tokens=12).backward()
        ratios.append([(new - old).exp().item() for tokens in sequences for new, old, *_ in tokens])
        assert difference(model, recorded, step) < (1e-9 if step == 1 else 1e-7)
        optimizer.step()
    assert metrics["policy/ratio_mean"] == pytest.approx(sum(map(sum, ratios)) / 2 / len(ratios[0]), rel=1e-9)
    assert max(ratios[1]) > 1.3  # the second update clips
    assert metrics["policy/clip_frac"] > 0


def test_a_step_of_sft(tmp_path, tokenizer, model):
    recorded, metrics = run(tmp_path, "sft", "--batch-size", 8)
    logprobs = []
    for row in common.data_order(16, 1, 0, 8):
        env = puzzles([])[row]
        answer = tokenizer(env.answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        logprobs += logprobs_of(model, encode_prompt(tokenizer, env.prompt), answer, 1.0)
    loss = -sum(logprobs) / len(logprobs)
    loss.backward()
    assert difference(model, recorded, 1) < 1e-9
    assert metrics["loss/total"] == pytest.approx(loss.item(), rel=1e-9)


@pytest.mark.parametrize("estimator", ["full", "sampled"])
def test_a_step_of_distillation(tmp_path, tokenizer, model, estimator):
    """Student and teacher at a temperature, in micro-batches, against sums over tokens and vocabulary."""
    flags = ["--batch-size", 8, *ROLLOUTS, "--loss", estimator]
    recorded, metrics = run(tmp_path, "onpolicy_distill", *flags, frozen=True)
    teacher = in_float64(AutoModelForCausalLM.from_pretrained(common.BUNDLED["tiny-teacher"], dtype=torch.float64))
    terms, value, entropy = [], 0.0, 0.0
    for b, row in enumerate(common.data_order(16, 1, 0, 8)):
        prompt = encode_prompt(tokenizer, puzzles([])[row].prompt)
        ids = recorded[f"completion.{completion_seed(1, 1, b)}"].tolist()
        whole, last = torch.tensor([prompt + ids]), len(prompt) - 1
        students = (model(whole).logits[0, last:-1] / TEMPERATURE).log_softmax(-1)
        with torch.no_grad():
            teachers = (teacher(whole).logits[0, last:-1] / TEMPERATURE).log_softmax(-1)
        for token, p, q in zip(ids, students, teachers, strict=True):
            ratio = (p[token] - q[token]).item()
            terms.append((p.exp() * (p - q)).sum() if estimator == "full" else ratio * p[token])
            value += terms[-1].item() if estimator == "full" else ratio
            entropy -= (q.exp() * q).sum().item()
    (sum(terms) / len(terms)).backward()
    assert difference(model, recorded, 1) < 1e-9
    assert metrics["loss/reverse_kl"] == pytest.approx(value / len(terms), rel=1e-9)
    assert metrics["teacher/entropy"] == pytest.approx(entropy / len(terms), rel=1e-9)
