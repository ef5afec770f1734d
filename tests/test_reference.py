"""A step of the real scripts has the gradient that the papers' formulas have, written out token by token.

Nothing of the project computes the expected side: the model is transformers' own, one sequence at a time, whole logits.
"""

import pytest
import torch
from capture import in_float64, puzzles
from conftest import read_metrics
from safetensors.torch import load_file
from test_invariance import SMALL, distance, launch
from transformers import AutoModelForCausalLM

import common
from common import completion_seed, encode_prompt

pytestmark = pytest.mark.slow
PROMPTS, GROUP, TEMPERATURE, BETA, FLAT = 4, 4, 0.7, 0.1, [2]


@pytest.fixture
def model():
    return in_float64(AutoModelForCausalLM.from_pretrained(common.BUNDLED["tiny"], dtype=torch.float64))


def in_order_of_the_optimizer(model):
    """Matrices, then vectors; by the step's number."""
    parameters = list(model.parameters())
    return [p for p in parameters if p.ndim >= 2] + [p for p in parameters if p.ndim < 2]


def recorded(folder, step):
    tensors = load_file(folder / "run-0.safetensors")
    return {k.removeprefix(f"{step}."): t for k, t in tensors.items() if k.startswith(f"{step}.")}


def gradients(model):
    return {str(i): p.grad for i, p in enumerate(in_order_of_the_optimizer(model))}


def logprobs_of(model, prompt, completion, temperature):
    logits = model(torch.tensor([prompt + completion])).logits[0] / temperature
    rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return [row[token] for row, token in zip(rows, completion, strict=True)]


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_two_updates_of_grpo(tmp_path, tokenizer, model, loss_type):
    """Both of --ppo-steps 2: with the KL term, at a temperature, with a group of equal rewards, in micro-batches."""
    flags = [*SMALL, "--batch-size", PROMPTS, "--group-size", GROUP, "--max-new-tokens", 12]
    flags += ["--temperature", TEMPERATURE]
    flags += ["--kl-penalty", BETA, "--ppo-steps", 2, "--loss-type", loss_type, "--micro-batch-tokens", 150]
    case = {"name": "run", "script": "grpo", "flags": [*map(str, flags)], "frozen": True, "float64": True, "flat": FLAT}
    launch([case], tmp_path, processes=1)

    drawn = load_file(tmp_path / "run-0.safetensors")
    rows, sequences = common.data_order(16, 1, 0, PROMPTS), []
    for p, row in enumerate(rows):
        env = puzzles(FLAT)[row]
        prompt = encode_prompt(tokenizer, env.prompt)
        group = [drawn[f"completion.{completion_seed(1, 1, p * GROUP + g)}"].tolist() for g in range(GROUP)]
        rewards = [env.get_reward(tokenizer.decode(ids, skip_special_tokens=True)) for ids in group]
        mean = sum(rewards) / GROUP
        deviation = (sum((r - mean) ** 2 for r in rewards) / (GROUP - 1)) ** 0.5
        for ids, reward in zip(group, rewards, strict=True):
            sequences.append((prompt, ids, (reward - mean) / (deviation + 1e-4)))
    tokens = sum(len(ids) for _, ids, _ in sequences)

    with torch.no_grad():
        initial = [[lp.item() for lp in logprobs_of(model, p, ids, TEMPERATURE)] for p, ids, _ in sequences]
    optimizer = torch.optim.AdamW(in_order_of_the_optimizer(model), lr=1e-3, weight_decay=0.0)
    ratios = []
    for step in (1, 2):
        optimizer.zero_grad()
        for (prompt, ids, advantage), before in zip(sequences, initial, strict=True):
            terms = []
            for new, old in zip(logprobs_of(model, prompt, ids, TEMPERATURE), before, strict=True):
                ratio = (new - old).exp()
                ratios.append(ratio.item())
                surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
                terms.append(surrogate - BETA * ratio * ((old - new).exp() - (old - new) - 1))
            whole = {"dapo": tokens, "grpo": len(ids) * len(sequences), "dr_grpo": len(sequences) * 12}[loss_type]
            (-sum(terms) / whole).backward()
        assert distance(gradients(model), recorded(tmp_path, step)) < (1e-9 if step == 1 else 1e-7)
        optimizer.step()
    (line,) = read_metrics(tmp_path / "run")
    assert line["policy/ratio_mean"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-9)
    assert max(ratios[tokens:]) > 1.28  # the second update clips
    assert line["policy/clip_frac"] > 0


def test_a_step_of_sft(tmp_path, tokenizer, model):
    flags = [*SMALL, "--batch-size", "8", "--micro-batch-tokens", "150"]
    launch([{"name": "run", "script": "sft", "flags": flags, "float64": True}], tmp_path, processes=1)
    logprobs = []
    for row in common.data_order(16, 1, 0, 8):
        env = puzzles([])[row]
        answer = tokenizer(env.answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        logprobs += logprobs_of(model, encode_prompt(tokenizer, env.prompt), answer, 1.0)
    loss = -sum(logprobs) / len(logprobs)
    loss.backward()
    assert distance(gradients(model), recorded(tmp_path, 1)) < 1e-9
    assert read_metrics(tmp_path / "run")[0]["loss/total"] == pytest.approx(loss.item(), rel=1e-9)


@pytest.mark.parametrize("estimator", ["full", "sampled"])
def test_a_step_of_distillation(tmp_path, tokenizer, model, estimator):
    """Student and teacher at a temperature, in micro-batches, against sums over tokens and vocabulary."""
    flags = [*SMALL, "--batch-size", 8, "--max-new-tokens", 12, "--temperature", TEMPERATURE, "--loss", estimator]
    flags = [*map(str, flags), "--micro-batch-tokens", "150"]
    case = {"name": "run", "script": "onpolicy_distill", "flags": flags, "frozen": True, "float64": True}
    launch([case], tmp_path, processes=1)
    teacher = AutoModelForCausalLM.from_pretrained(common.BUNDLED["tiny-teacher"], dtype=torch.float64)
    teacher = in_float64(teacher)
    drawn, terms, value = load_file(tmp_path / "run-0.safetensors"), [], 0.0
    for b, row in enumerate(common.data_order(16, 1, 0, 8)):
        prompt = encode_prompt(tokenizer, puzzles([])[row].prompt)
        ids = drawn[f"completion.{completion_seed(1, 1, b)}"].tolist()
        whole, last = torch.tensor([prompt + ids]), len(prompt) - 1
        students = (model(whole).logits[0, last:-1] / TEMPERATURE).log_softmax(-1)
        with torch.no_grad():
            teachers = (teacher(whole).logits[0, last:-1] / TEMPERATURE).log_softmax(-1)
        for token, p, q in zip(ids, students, teachers, strict=True):
            ratio = (p[token] - q[token]).item()
            terms.append((p.exp() * (p - q)).sum() if estimator == "full" else ratio * p[token])
            value += terms[-1].item() if estimator == "full" else ratio
    (sum(terms) / len(terms)).backward()
    assert distance(gradients(model), recorded(tmp_path, 1)) < 1e-9
    assert read_metrics(tmp_path / "run")[0]["loss/reverse_kl"] == pytest.approx(value / len(terms), rel=1e-9)
