"""Evaluate a model on a dataset: sample completions, score them with the environment, report accuracy and pass@k.

    accuracy = mean over problems of the share of completions that are solved (reward of at least 1.0)
    pass@k   = mean over problems of 1 - C(n - c, k) / C(n, k)    n completions, c of them solved

pass@k is the unbiased estimate of https://arxiv.org/abs/2107.03374 (section 2.1): that one of k samples solves it.
The interval of the accuracy is Wilson's, which holds near 0 and 1 too; completions of one problem count as fewer.
--compare is paired: the difference of two models on each problem; its bootstrap interval is narrower than theirs.

Laptop:  python evaluate.py --output-dir runs/before
         python evaluate.py --model runs/mine/final --compare runs/before/results.jsonl
GPU:     accelerate launch evaluate.py --model runs/mine/final --dataset gsm8k --num-completions 8 --temperature 1
"""

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import chat
import common
import envs
import sharing

BLOCK = 128  # problems that are scored and written at a time
PART = "results.part.jsonl"  # becomes results.jsonl when it is whole


@dataclass
class Args:
    # Model
    model: str = "tiny"
    """hub id, folder (such as a run's final or step_100), or a bundled model: tiny, tiny-teacher"""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """of the weights and the forward pass. auto: bf16 on a GPU that has it"""
    chat_template: str | None = None
    """a Jinja file to use in place of the model's own chat template"""
    chat_template_args: str = "{}"
    """JSON object passed to the chat template, such as '{"enable_thinking": false}'"""

    # Data: the evaluation split of a dataset, or the rows of a file
    dataset: str = "math"
    """math, gsm8k, a file (.jsonl .json .csv .parquet), a hub id (id:config), reasoning_gym:NAME, file.py:function"""
    split: str | None = None
    """a split or a part of one, such as 'test[:100]'; None: test, else validation, of a file all"""
    num_samples: int = 512
    """at most this many problems, the same ones as the trainers' --eval-samples"""
    min_val: int | None = None
    """math: smallest operand (None: 0)"""
    max_val: int | None = None
    """math: largest operand (None: 50)"""
    operand: Literal["add", "sub", "mult", "div"] | None = None
    """math: the operation (None: add)"""

    # Sampling
    num_completions: int = 1
    """completions per problem"""
    temperature: float = 0.0
    """0: greedy"""
    max_prompt_length: int | None = None
    """drop problems with more tokens; None: with more than the context and --max-new-tokens leave"""
    max_new_tokens: int = 256
    """longest completion"""
    engine: Literal["hf", "vllm"] = "hf"
    """what samples completions: transformers' models in a loop of our own, or vLLM"""
    vllm_args: str = "{}"
    """JSON object of arguments for vllm.LLM, such as '{"tensor_parallel_size": 2}'"""
    micro_batch_tokens: int | None = None
    """the memory knob of hf, as in the trainers: it holds 128 times as many tokens. None: chosen by the device"""

    # Run
    output_dir: str | None = None
    """where results.jsonl and metrics.json go; None: runs/evaluate-<model>-<time>"""
    compare: str | None = None
    """results.jsonl of an earlier evaluation on the same problems: print the difference, with its interval"""
    seed: int = 1
    """of the problems and the sampling"""


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n completions, drawn without replacement, hold at least one of the c solved ones."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def wilson_interval(solved: np.ndarray, num_completions: int) -> tuple[float, float]:
    """95% interval of the mean of each problem's share of solved completions, (P,); Wilson's, of 1927.

    Several completions of a problem count as many independent ones as have that variance of the mean, from one to all.
    In simulation (0.005 to 0.995, 20 to 512 problems, 1 to 16 completions) the interval covers 87% to 98%.
    """
    mean, n, z = float(solved.mean()), float(len(solved)), 1.96
    if num_completions > 1 and 0 < mean < 1:
        variance = max(solved.var(ddof=1) / n, 1e-12) if n > 1 else 1.0
        n = min(max(mean * (1 - mean) / variance, n), n * num_completions)
    middle = (mean + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(mean * (1 - mean) / n + z**2 / (4 * n**2))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def bootstrap_interval(values: np.ndarray, seed: int, resamples: int = 2000) -> tuple[float, float]:
    """95% interval of the mean of one value a problem, by resampling problems with replacement."""
    rng = np.random.default_rng(seed)
    means = [rng.choice(values, len(values)).mean() for _ in range(resamples)]
    return float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5))


def solved_share(records: list[dict[str, Any]], num_completions: int) -> np.ndarray:
    """Share of each problem's completions that are solved, (P,), of `num_completions` records in a row for each."""
    return np.array([r["reward"] >= 1.0 for r in records]).reshape(-1, num_completions).mean(axis=1)


def load_solved_share(path: str, prompts: list[Any]) -> np.ndarray:
    """`solved_share` of an earlier results.jsonl, (P,). Raises a UserError unless its problems are these, in order."""
    try:
        records = [json.loads(line) for line in Path(path).read_text().splitlines()]
        theirs = [record["prompt"] for record in records if record["sample"] == 0]
        solved = solved_share(records, len(records) // max(len(theirs), 1))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise chat.UserError(f"--compare {path}: not the results.jsonl of an evaluation ({error})") from None
    if theirs != prompts:
        raise chat.UserError(f"--compare {path}: other problems: give the same dataset flags and --seed")
    return solved


def summarize(records: list[dict[str, Any]], num_completions: int) -> dict[str, float]:
    """Metrics of one record a completion, `num_completions` in a row for each problem."""
    rewards = np.array([r["reward"] for r in records]).reshape(-1, num_completions)  # (P, G)
    solved = rewards >= 1.0
    low, high = wilson_interval(solved.mean(axis=1), num_completions)
    metrics = {"eval/accuracy": float(solved.mean()), "eval/accuracy_low": low, "eval/accuracy_high": high}
    metrics |= {"eval/reward_mean": float(rewards.mean()), "eval/reward_std": float(rewards.std())}
    metrics["eval/partial_frac"] = float(((rewards > 0) & ~solved).mean())  # some reward, but not solved
    if num_completions > 1:
        for k in sorted({2**i for i in range(num_completions.bit_length())} | {num_completions}):
            passes = [pass_at_k(num_completions, int(c), k) for c in solved.sum(axis=1)]
            metrics[f"eval/pass@{k}"] = float(np.mean(passes))
    metrics["completion/length_mean"] = float(np.mean([r["tokens"] for r in records]))
    metrics["completion/truncated_frac"] = float(np.mean([r["finish_reason"] == "length" for r in records]))
    return metrics


def open_folder(args: Args, data: str) -> tuple[Path, list[dict[str, Any]]]:
    """Makes or reopens the folder; its path, and the records of what an interrupted evaluation has done."""
    folder, records = common.make_folder(args.output_dir, "evaluate", args.model), []
    asked = {"script": "evaluate", **vars(args), "data": data}
    if (folder / PART).exists():
        common.cut_back(folder / PART)
        records = [json.loads(line) for line in (folder / PART).read_text().splitlines()]
    elif any(folder.iterdir()):
        raise chat.UserError(f"{folder} holds other results already: choose another --output-dir")
    if records:
        common.check_same_flags(folder, asked)
    records = records[: len(records) // args.num_completions * args.num_completions]  # whole problems
    common.replace_text(folder / PART, "".join(json.dumps(record) + "\n" for record in records))
    common.replace_text(folder / "args.json", json.dumps(asked, indent=2) + "\n")
    return folder, records


def main(args: Args, dataset: Any = None) -> None:
    args = common.check_args(args, temperature=common.FINITE)
    accelerator = common.join_processes()
    if args.num_completions > 1 and args.temperature == 0:
        raise chat.UserError("--num-completions above 1 needs --temperature above 0: greedy ones are all the same")
    if dataset is None:
        given = {flag: getattr(args, flag) for flag in ("num_samples", "seed", "min_val", "max_val", "operand")}
        dataset = envs.load_dataset(args.dataset, "own", part=args.split, **given)
        if dataset is None:
            raise chat.UserError(f"{args.dataset} has neither a test nor a validation split")
    dataset = envs.as_environments(dataset, "dataset")
    envs.require_rewards(dataset)
    tokenizer = chat.load_tokenizer(args.model, args.chat_template, template_args=args.chat_template_args)
    config = chat.load_config(args.model)
    prompts = envs.encode_prompts(dataset, tokenizer, chat.context_length(config), args)
    rows = prompts.look(len(dataset))
    dataset, ids = [dataset[row] for row in rows], [prompts[row] for row in rows]
    before = None if args.compare is None else load_solved_share(args.compare, [env.prompt for env in dataset])
    folder, records = common.on_main_process(accelerator, open_folder, args, common.digest_of(dataset))

    # Load the model
    console = Console(quiet=not accelerator.is_main_process, highlight=False, soft_wrap=True, markup=False)
    dtype, pass_tokens = common.pick_compute(args, accelerator.device)
    console.print(*chat.check_tokenizer(tokenizer, config, chat.load_generation_config(args.model, config)), sep="\n")
    if args.engine == "vllm":
        engine: Any = common.VLLMEngine(args.model, tokenizer, dtype, args.vllm_args)
    else:
        model = common.load_model(args.model, accelerator.device, dtype=dtype)
        lm = common.ChunkedLM(model, dtype, chat.vocab_size(tokenizer))
        engine = common.HFEngine(lm, tokenizer, pass_tokens)
    console.print(f"model      {args.model}, {dtype}, engine {engine.name}, {accelerator.num_processes} process(es)")

    # Sample and score, block by block: what is done stays, whatever happens
    started, sampled = time.perf_counter(), 0
    sampling = (args.max_new_tokens, args.temperature, args.num_completions, args.seed)
    evaluator = common.Evaluator(engine, tokenizer, dataset, ids, *sampling)
    done = len(records) // args.num_completions
    console.print(f"data       {args.dataset}: {len(dataset)} problems x {args.num_completions}, {done} done before")
    console.print(prompts.report() or "no prompt is too long", envs.grader_note(dataset))
    for first in range(done, len(dataset), BLOCK):
        block = evaluator.evaluate(range(first, min(first + BLOCK, len(dataset))))[1]
        records, sampled = records + block, sampled + sum(record["tokens"] for record in block)
        if accelerator.is_main_process:
            with open(folder / PART, "a") as file:
                file.writelines(json.dumps(record, default=str) + "\n" for record in block)
    seconds = time.perf_counter() - started

    # Report
    if not accelerator.is_main_process:
        return
    metrics = summarize(records, args.num_completions)
    metrics |= {"time/rollout": seconds, "perf/tokens_per_second": sampled / seconds}
    if before is not None:
        differences = solved_share(records, args.num_completions) - before  # (P,)
        low, high = bootstrap_interval(differences, args.seed)
        metrics |= {"compare/accuracy": float(before.mean()), "compare/difference": float(differences.mean())}
        metrics |= {"compare/difference_low": low, "compare/difference_high": high}
        words = f"accuracy {before.mean():.3f} -> {metrics['eval/accuracy']:.3f}, difference {differences.mean():+.3f}"
        console.print(f"compared   {words} (95% interval {low:+.3f} to {high:+.3f})", style="bold")
    os.replace(folder / PART, folder / "results.jsonl")
    about = vars(args) | {"problems": len(dataset), "engine_version": engine.name}
    about |= {"num_processes": accelerator.num_processes, "git_revision": sharing.git_revision()}
    common.replace_text(folder / "metrics.json", json.dumps(about | metrics, indent=2) + "\n")
    table = Table("metric", "value", title=f"{args.model} on {args.dataset}")
    for metric, value in metrics.items():
        table.add_row(metric, f"{value:,.4f}")
    console.print(table)
    console.print(f"saved      {folder}")


if __name__ == "__main__":
    common.run(main, tyro.cli(Args))
