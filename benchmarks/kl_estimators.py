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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import tyro
from accelerate import Accelerator

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
    micro_batch_tokens: int = common.MICRO_BATCH_TOKENS


def measure(args: Args, estimator: str, samples: int) -> dict[str, float]:
    """One row of the table, in a process of its own."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    device, tokenizer = accelerator.device, common.load_tokenizer(args.model)
    size = common.vocab_size(tokenizer)
    model = common.load_model(args.model, device, "sdpa")
    policy = common.ChunkedLM(model, vocab_size=size)
    teacher = common.ChunkedLM(common.load_model(args.teacher_model, device, "sdpa"), vocab_size=size)
    teacher.requires_grad_(False)
    engine = common.HFEngine(model, tokenizer, args.micro_batch_tokens)
    dataset = MathDataset(args.prompts)
    prompts = [common.encode_prompt(tokenizer, dataset[i].prompt) for i in range(args.prompts) for _ in range(samples)]

    total, squares, seconds = torch.zeros(sum(p.numel() for p in policy.parameters())), 0.0, 0.0
    drawn = []
    for repeat in range(args.repeats):
        seeds = [common.completion_seed(1, repeat, i) for i in range(len(prompts))]
        drawn.append(engine.generate(prompts, seeds, max_new_tokens=args.max_new_tokens, temperature=1.0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for completions in drawn:
        pairs = zip(prompts, completions, strict=True)
        sequences = [(p + c.token_ids, [0] * len(p) + [1] * len(c.token_ids)) for p, c in pairs]
        tokens = float(sum(len(c.token_ids) for c in completions))
        started = time.perf_counter()
        for batch in common.micro_batches(accelerator, policy, sequences, args.micro_batch_tokens):
            inputs = batch.inputs
            with torch.no_grad():
                states = teacher.states(*inputs) if estimator == "full" else None
                scores = None if estimator == "full" else common.token_logprobs(teacher, *inputs)[0]
            if estimator == "full":
                options = {"teacher": teacher, "temperature": 1.0, "denominator": tokens}
                chunk_fn = functools.partial(onpolicy_distill.full_kl_of_chunk, **options)
                loss = policy(*inputs, chunk_fn, states)[0]
            else:
                logprobs, _ = common.token_logprobs(policy, *inputs)
                loss, _ = onpolicy_distill.sampled_kl_loss(logprobs, scores, batch.loss_mask, denominator=tokens)
            loss.backward()
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
