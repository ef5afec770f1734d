"""Rollouts by transformers and by vLLM on the same prompts, alternating: seconds, tokens a second, and their ratio.

    python benchmarks/rollouts.py --model SmolLM2-135M-Instruct
    python benchmarks/rollouts.py --model SmolLM2-135M-Instruct --natural

A rollout is what a step of grpo.py does first: `sync`, then `generate`. Without --natural no completion stops before
--max-new-tokens. The first round of each warms up and is not counted. Needs vLLM.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import tyro

import chat
import common
import envs


@dataclass
class Args:
    model: str = "tiny"
    """hub id, folder, or a bundled model"""
    prompts: int = 4
    group_size: int = 8
    """completions of each prompt"""
    max_new_tokens: int = 128
    temperature: float = 1.0
    natural: bool = False
    """completions end where the model ends them"""
    rounds: int = 5
    vllm_args: str = "{}"
    """JSON object of arguments for vllm.LLM"""
    output: str | None = None
    """a file for the raw numbers, JSON"""


def main(args: Args) -> None:
    device = common.join_processes().device
    dtype, tokens = common.pick_compute(SimpleNamespace(dtype="auto", micro_batch_tokens=None), device)
    tokenizer, model = chat.load_tokenizer(args.model), common.load_model(args.model, device)
    lm = common.ChunkedLM(model, dtype, chat.vocab_size(tokenizer), "auto")
    engines: dict[str, Any] = {
        "hf": common.HFEngine(lm, tokenizer, tokens),
        "vllm": common.VLLMEngine(args.model, tokenizer, dtype, args.vllm_args, trains=True),
    }
    dataset = envs.load_dataset("math", "train", num_samples=args.prompts)
    prompts = [common.encode_prompt(tokenizer, dataset[i].prompt) for i in range(args.prompts)]
    prompts = [prompt for prompt in prompts for _ in range(args.group_size)]
    if not args.natural:
        for engine in engines.values():
            engine.stop_ids = []
    rounds: list[dict[str, Any]] = []
    for n in range(args.rounds + 1):
        seeds = [common.completion_seed(n, 1, i) for i in range(len(prompts))]
        for name, engine in engines.items():
            started = time.perf_counter()
            engine.sync(model)
            options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
            completions = engine.generate(prompts, seeds, **options)
            seconds, tokens = time.perf_counter() - started, sum(len(c.token_ids) for c in completions)
            print(f"round {n}: {name} {seconds:.1f} s, {tokens} tokens", flush=True)
            rounds.append({"round": n, "engine": name, "seconds": seconds, "tokens": tokens})
    speeds = {
        e: np.array([r["tokens"] / r["seconds"] for r in rounds if r["engine"] == e and r["round"]]) for e in engines
    }
    ratios = speeds["vllm"] / speeds["hf"]
    print(f"{device.type}, {dtype}, {torch.get_num_threads()} threads, {engines['vllm'].name}")
    ends = "natural ends" if args.natural else f"{args.max_new_tokens} tokens each"
    print(f"{args.model}: {args.prompts} prompts x {args.group_size} completions, {ends}, {args.rounds} rounds")
    for name, values in [*speeds.items(), ("vllm / hf", ratios)]:
        print(f"{name:10} median {np.median(values):8.2f}  smallest {values.min():8.2f}  largest {values.max():8.2f}")
    if args.output:
        Path(args.output).write_text(json.dumps({"args": vars(args), "rounds": rounds}, indent=2) + "\n")


if __name__ == "__main__":
    common.run(main, tyro.cli(Args))
