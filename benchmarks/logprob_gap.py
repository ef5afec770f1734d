"""How far vLLM and the trainer are apart in nats a token, as policy/logprob_gap, if the trainer's temperature differed.

    python benchmarks/logprob_gap.py --model SmolLM2-135M-Instruct --dtype bf16

vLLM samples at temperature 1. Shows what --max-logprob-gap tells apart. Needs vLLM.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import tyro

import chat
import common
import envs


@dataclass
class Args:
    model: str = "tiny"
    """hub id, folder, or a bundled model"""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """of the engine, and of the trainer's autocast"""
    prompts: int = 32
    max_new_tokens: int = 64
    vllm_args: str = "{}"
    """JSON object of arguments for vllm.LLM"""


def main(args: Args) -> None:
    device = common.join_processes().device
    dtype, tokens = common.pick_compute(SimpleNamespace(dtype=args.dtype, micro_batch_tokens=None), device)
    tokenizer, model = chat.load_tokenizer(args.model), common.load_model(args.model, device)
    policy = common.ChunkedLM(model, dtype, chat.vocab_size(tokenizer), "auto")
    run: Any = SimpleNamespace(lm=policy, micro_batch_tokens=tokens, sum=float)
    run.args = SimpleNamespace(max_logprob_gap=math.inf)
    engine = common.VLLMEngine(args.model, tokenizer, dtype, args.vllm_args, trains=True)
    dataset = envs.load_dataset("math", "eval", num_samples=args.prompts)
    prompts = [common.encode_prompt(tokenizer, dataset[i].prompt) for i in range(args.prompts)]
    seeds = [common.completion_seed(1, 1, i) for i in range(args.prompts)]
    print(f"{args.model}, {engine.name}, {dtype} on {device.type}")
    for words, temperatures in (("random weights", [1.0]), ("", [1.0, 0.9, 0.8, 0.7, 0.5])):
        if not words:
            engine.sync(model)
        completions = engine.generate(prompts, seeds, max_new_tokens=args.max_new_tokens, temperature=1.0)
        sequences = [c.after(prompt) for c, prompt in zip(completions, prompts, strict=True)]
        ids, mask, sampled, engine_logprobs = common.collate(sequences, device)
        for temperature in temperatures:
            logprobs = torch.zeros_like(engine_logprobs)
            with torch.no_grad():
                for mb in common.micro_batches(run, ids, mask):
                    logprobs[mb] = common.token_logprobs(policy, ids[mb], mask[mb], sampled[mb], temperature).double()
            gap = common.check_gap(run, logprobs, engine_logprobs, sampled)
            mean, largest = gap["policy/logprob_gap"], gap["policy/logprob_gap_max"]
            print(f"trainer's temperature {temperature} {words}: mean {mean:.2g}, largest {largest:.2g}")


if __name__ == "__main__":
    common.run(main, tyro.cli(Args))
