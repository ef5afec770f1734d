"""The two estimators of onpolicy_distill.py on the same completions: time, memory, and variance of the gradient.

    OMP_NUM_THREADS=1 python benchmarks/kl_estimators.py --prompts 8 --repeats 20

For 1, 4 and 16 completions of each prompt, the gradient is computed `repeats` times, each time on fresh completions,
the same for both estimators. Variance: trace of the gradient's covariance over the squared norm of its mean (both
unbiased); 1 means that a step is as much noise as signal. Time and memory are of the gradient alone, without the
sampling; memory is what the resident size of a fresh process grows by.
"""

import functools
import multiprocessing
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import tyro

import chat
import common
import onpolicy_distill
from envs import MathDataset


@dataclass
class Args:
    model: str = "tiny"
    teacher_model: str = "tiny-teacher"
    prompts: int = 8
    """prompts of the batch"""
    repeats: int = 20
    """gradients, each of fresh completions"""
    max_new_tokens: int = 32
    micro_batch_tokens: int = 512


def measure(args: Args, estimator: str, samples: int) -> dict[str, float]:
    """One row of the table, in a process of its own."""
    device, tokenizer = common.join_processes().device, chat.load_tokenizer(args.model)
    size = chat.vocab_size(tokenizer)
    policy, teacher = (
        common.ChunkedLM(common.load_model(name, device), vocab_size=size, attn="auto")
        for name in (args.model, args.teacher_model)
    )
    teacher.requires_grad_(False)
    engine = common.HFEngine(policy, tokenizer, args.micro_batch_tokens)
    run: Any = SimpleNamespace(lm=policy, micro_batch_tokens=args.micro_batch_tokens)
    loss_args: Any = SimpleNamespace(loss=estimator, temperature=1.0)
    dataset = MathDataset(args.prompts)
    prompts = [common.encode_prompt(tokenizer, dataset[i].prompt) for i in range(args.prompts) for _ in range(samples)]

    total, squares, seconds = torch.zeros(sum(p.numel() for p in policy.parameters())), 0.0, 0.0
    drawn = []
    for repeat in range(args.repeats):
        seeds = [common.completion_seed(1, repeat, i) for i in range(len(prompts))]
        drawn.append(engine.generate(prompts, seeds, max_new_tokens=args.max_new_tokens, temperature=1.0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for completions in drawn:
        sequences = [c.after(prompt) for c, prompt in zip(completions, prompts, strict=True)]
        ids, mask, loss_mask, _ = common.collate(sequences, device)
        options = {"teacher": teacher, "args": loss_args, "denominator": float(loss_mask.sum())}
        objective = functools.partial(onpolicy_distill.loss_of_chunk, **options)
        started = time.perf_counter()
        for mb in common.micro_batches(run, ids, mask):
            inputs = (ids[mb], mask[mb], loss_mask[mb])
            with torch.no_grad():
                states = teacher.states(*inputs)
            policy(*inputs, 1.0, objective, states)[0].backward()
        seconds += time.perf_counter() - started
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])
        policy.zero_grad(set_to_none=True)
        total += gradient
        squares += gradient.square().sum().item()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    variance = (squares - total.square().sum().item() / args.repeats) / (args.repeats - 1)
    signal = (total / args.repeats).square().sum().item() - variance / args.repeats
    return {"variance": variance / signal, "seconds": seconds / args.repeats, "memory": memory * 1024 / 1e6}


def main(args: Args) -> None:
    print(f"{args.model} from {args.teacher_model}: {args.prompts} prompts, {args.repeats} gradients a row")
    print("| samples | estimator | gradient variance | seconds | memory, MB |\n|---|---|---|---|---|")
    for samples in (1, 4, 16):
        for estimator in ("full", "sampled"):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                row = pool.apply(measure, (args, estimator, samples))
            numbers = f"{row['variance']:.3f} | {row['seconds']:.3f} | {row['memory']:.0f}"
            print(f"| {samples} | `{estimator}` | {numbers} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
