"""Supervised fine-tuning: train a model to write the assistant's turns of given conversations.

    loss = - (1 / N) * sum over the assistant tokens t of  log pi(token t | tokens before t)

N is the number of assistant tokens in the step's whole batch, over all micro-batches and processes. The stop token of
each turn trains, so the model learns to end; system, user and template tokens never do.

What differs from the usual Hugging Face recipe:
1. The mask comes from the chat template itself (`chat.encode_chat`), with no template-specific code.
2. The mean is over all tokens of the step, not a mean of means, however the batch is cut.
3. A conversation longer than --max-length is dropped and counted, never cut: a cut would train answers without an end.

Laptop:  python sft.py
GPU:     accelerate launch sft.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset gsm8k --num-steps 500
Guide:   training_guide/sft.md
"""

import functools
import itertools
import math
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.text import Text
from torch import Tensor

import chat
import common
import envs
import tables


@dataclass
class Args:
    # Model
    model: str = "tiny"
    """hub id, folder, or a bundled model: tiny, tiny-teacher"""
    from_scratch: bool = False
    """take only the configuration and the tokenizer of --model; the weights start random"""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """of the forward pass (autocast); the trained weights are float32 always. auto: bf16 on a GPU that has it"""
    attn: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """of packed batches: flash-attn, PyTorch's varlen kernel, or a loop of sdpa; auto: the first that can run"""
    lora_rank: int = 0
    """train adapters of this rank on a frozen model; 0: train all weights"""
    lora_alpha: float = 32
    """what adapters add is multiplied by lora_alpha / lora_rank"""
    shard: bool = False
    """split weights, gradients and moments over the processes (FSDP2); else each of them holds all"""
    gradient_checkpointing: bool = False
    """recompute activations in backward: less memory, about a third more time"""
    chat_template: str | None = None
    """a Jinja file to use in place of the model's own chat template; saved with the model"""
    chat_template_args: str = "{}"
    """JSON object passed to the chat template, such as '{"enable_thinking": false}'"""

    # Data
    dataset: str = "math"
    """math, gsm8k, a file (.jsonl .json .csv .parquet), a hub id (id:config), reasoning_gym:NAME, file.py:function, or
    several with weights: a.jsonl:0.7,b.parquet:0.3"""
    split: str | None = None
    """a split or a part of one, such as 'train[:1000]'; None: train"""
    eval_dataset: str | None = None
    """as --dataset; None: its evaluation split"""
    eval_split: str | None = None
    """as --split; None: test, else validation"""
    num_samples: int | None = None
    """math: how many problems (None: 2000); else keep the first N rows"""
    min_val: int | None = None
    """math: smallest operand (None: 0)"""
    max_val: int | None = None
    """math: largest operand (None: 50)"""
    operand: Literal["add", "sub", "mult", "div"] | None = None
    """math: the operation (None: add)"""
    max_length: int | None = None
    """drop conversations with more tokens; None: the model's context length"""
    inspect: int | None = None
    """print so many encoded conversations, what trains of them in green and between « and », and stop"""

    # Optimization
    num_steps: int = 300
    """optimizer steps, one batch each"""
    batch_size: int = 64
    """conversations per process and step"""
    learning_rate: float | None = None
    """peak; None: 1e-5, for a bundled model 1e-3; ten times that with --lora-rank"""
    warmup_steps: int = 10
    """steps of linear warm-up"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """after warm-up: constant, or down to zero, one step after the last"""
    weight_decay: float = 0.0
    """AdamW's, on matrices only"""
    max_grad_norm: float = 1.0
    """clip the gradient's norm to this; inf: never"""
    micro_batch_tokens: int | None = None
    """the memory knob: tokens per forward and backward pass, with the same gradient. None: chosen by the device"""

    # Evaluation
    eval_steps: int = 100
    """evaluate every so many steps, before the first and at the last; 0: never"""
    eval_samples: int = 512
    """at most this many problems"""
    eval_sample_completions: bool = False
    """also let the model answer the evaluation prompts, greedily, and log the rewards"""
    max_new_tokens: int = 256
    """longest completion for --eval-sample-completions"""
    engine: Literal["hf", "vllm"] = "hf"
    """what samples the evaluation completions: transformers' models in a loop of our own, or vLLM"""
    vllm_args: str = "{}"
    """JSON object of arguments for vllm.LLM, such as '{"gpu_memory_utilization": 0.4}'"""

    # Run
    output_dir: str | None = None
    """the run's folder; None: runs/<script>-<model>-<time>"""
    resume: bool = False
    """go on from the newest checkpoint in --output-dir; start afresh if there is none"""
    saving_steps: int = 100
    """save a checkpoint every so many steps, and at the last"""
    logging_steps: int = 10
    """log every so many steps"""
    seed: int = 1
    """of every random draw"""
    enable_wandb: bool = False
    """log to Weights & Biases as well"""
    enable_trackio: bool = False
    """log to Trackio as well"""
    wandb_project: str | None = None
    """of wandb and Trackio; None: the script's name"""
    wandb_run_name: str | None = None
    """of wandb and Trackio; None: the run folder's name"""
    push_to_hub: str | None = None
    """upload final/ to this repo of the Hugging Face hub, such as me/my-model; a new one is private"""


# B sequences, T tokens. A loss is this call's share of the step's: shares of micro-batches and processes add up.
def sft_loss(logprobs: Tensor, loss_mask: Tensor, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the trained tokens.

    Args:
        logprobs, loss_mask: (B, T).
        denominator: trained tokens of the whole step, over all micro-batches and processes.
    Returns:
        The loss in nats per token (this call's share); and `loss/total`, its detached sum over this call's tokens.
    """
    cross_entropy = -torch.where(loss_mask.bool(), logprobs, 0).sum()
    return cross_entropy / denominator, {"loss/total": cross_entropy.detach()}


def encode(env: envs.EnvBase, tokenizer: Any, max_length: int) -> tuple[list[int], list[int]]:
    """Token ids and loss mask of the conversation of prompt and target. Raises a UserError if it can't be trained."""
    # Of a prompt nothing trains; the assistant turns of a row with messages have a weight of their own.
    prompt = [{"weight": 0} | m if m["role"] == "assistant" else m for m in chat.check_messages(env.prompt)]
    target = env.get_target()
    target = {"role": "assistant", "content": target} if isinstance(target, str) else target
    ids, loss_mask = chat.encode_chat(tokenizer, [*prompt, target], **env.template_args)
    if len(ids) > max_length:
        raise chat.UserError(f"longer than {max_length:,} tokens")
    if not any(loss_mask[1:]):  # nothing predicts token 0
        raise chat.UserError("nothing to train")
    return ids, loss_mask


def show(tokenizer: Any, ids: list[int], loss_mask: list[int]) -> Text:
    """A conversation, what trains of it in green and between « and », the counts and the token that it ends with."""
    text = Text()
    for trains, part in itertools.groupby(zip(ids, loss_mask, strict=True), key=lambda pair: pair[1]):
        words = tokenizer.decode([token for token, _ in part])
        text.append(f"«{words}»" if trains else words, "bold green" if trains else "")
    end = tokenizer.decode([token for token, trains in zip(ids, loss_mask, strict=True) if trains][-1:])
    return text.append(f" [{sum(loss_mask)} of {len(ids)} tokens train, the last is {end!r}]", "dim")


def inspect(args: Args, dataset: Any = None) -> None:
    """Prints the first encoded conversations, as many as --inspect says. Loads no weights and writes nothing."""
    args = common.check_args(args)
    dataset = common.load_splits(args, dataset, None)[0]
    tokenizer = chat.load_tokenizer(args.model, args.chat_template, template_args=args.chat_template_args)
    config = chat.load_config(args.model)
    context = chat.context_length(config)
    how = functools.partial(encode, tokenizer=tokenizer, max_length=min(args.max_length or context, context))
    conversations = tables.Encoded(dataset, how)
    rows, unread = conversations.look(args.inspect), tables.unread_columns(dataset)
    console = Console(highlight=False, soft_wrap=True)
    lines = chat.check_tokenizer(tokenizer, config, chat.load_generation_config(args.model, config))
    lines += [conversations.report(), f"not read   {', '.join(unread)}" if unread else ""]
    console.print(*filter(None, lines), sep="\n", markup=False)
    for row in rows:
        console.print(show(tokenizer, *conversations[row]), end="\n\n")


@torch.no_grad()
def evaluate_loss(run: common.Run, policy: torch.nn.Module, conversations: list) -> dict[str, float]:
    """Cross-entropy in nats per assistant token of the whole set, each token with the same weight; and perplexity."""
    own = conversations[run.accelerator.process_index :: run.processes] or [([0], [0])]
    input_ids, attention_mask, loss_mask = common.collate(own, run.device)  # (B, T) each
    tokens, total = run.sum(loss_mask.sum()), 0.0
    for mb in common.micro_batches(run, input_ids, attention_mask):
        logprobs = common.token_logprobs(policy, input_ids[mb], attention_mask[mb], loss_mask[mb])
        total += sft_loss(logprobs, loss_mask[mb], tokens)[0].item()
    ce_loss = run.sum(total)
    return {"eval/ce_loss": ce_loss, "eval/perplexity": math.exp(min(ce_loss, 700.0))}  # exp(710) overflows


def main(args: Args, train_dataset: Any = None, eval_dataset: Any = None) -> None:
    if args.inspect is not None:
        return inspect(args, train_dataset)
    run = common.Run(args, __file__, train_dataset, eval_dataset, bundled_lr=1e-3, real_lr=1e-5)
    if run.finished:
        return
    context = chat.context_length(run.config)
    how = functools.partial(encode, tokenizer=run.tokenizer, max_length=min(args.max_length or context, context))
    conversations, eval_conversations = tables.Encoded(run.train_dataset, how), []
    run.look(conversations)
    if run.eval_dataset is not None:
        held_out = tables.Encoded(run.eval_dataset, how)
        eval_conversations = [held_out[row] for row in run.look(held_out, "evaluation: ", len(held_out))]
    run.say(Text("example    ") + show(run.tokenizer, *conversations[0]))
    envs.require_rewards((args.eval_sample_completions and run.eval_dataset) or [])
    policy = common.load_policy(run, from_scratch=args.from_scratch and run.checkpoint is None)
    evaluator = run.evaluator(common.make_engine(run)) if args.eval_sample_completions and run.eval_dataset else None
    run.begin()

    def evaluate(step: int) -> dict[str, float]:
        return evaluate_loss(run, policy, eval_conversations) | run.evaluate(step, evaluator)

    if run.step == 0 and eval_conversations:
        run.log(0, evaluate(0))

    def batch(step: int) -> list[tuple[list[int], list[int]]]:
        return [conversations[row] for row in run.rows(step, conversations)]

    batches = tables.ahead(batch, range(run.step + 1, args.num_steps + 1))
    for step in run.steps():
        # 1. batch
        started = time.perf_counter()
        sequences = run.safely(next, batches)
        input_ids, attention_mask, loss_mask = common.collate(sequences, run.device)  # (B, T) each
        tokens = run.sum(loss_mask.sum())

        # 2. loss and update
        micro_batches = common.micro_batches(run, input_ids, attention_mask)
        lr = common.scheduled_lr(step, run.learning_rate, args.warmup_steps, args.num_steps, args.lr_schedule)
        sums: Any = Counter()  # its update() adds
        for mb in micro_batches:
            last = mb is micro_batches[-1]  # it synchronises the processes' gradients (DDP decides in forward)
            with nullcontext() if last else run.accelerator.no_sync(policy):
                logprobs = common.token_logprobs(policy, input_ids[mb], attention_mask[mb], loss_mask[mb])
                loss, sums_of_pass = sft_loss(logprobs, loss_mask[mb], tokens)
                common.backward(run, loss)
            sums.update(sums_of_pass)
        grad_norm = common.optimizer_step(run, step, lr, float(sums["loss/total"]))
        seconds = time.perf_counter() - started

        # 3. log: a pair is a sum and a count of this process
        metrics = {
            "loss/total": (sums["loss/total"], loss_mask.sum()),
            "optim/lr": lr,
            "optim/grad_norm": grad_norm,
            "time/train": seconds,
            "time/step": seconds,
            "perf/tokens_per_second": (attention_mask.sum(), seconds / run.processes),
        }

        # 4. evaluate and save
        if eval_conversations and run.is_due(step, args.eval_steps):
            metrics |= evaluate(step)
        run.log(step, metrics)
        run.save(step)
    run.say_dropped(conversations)
    run.finish()


if __name__ == "__main__":
    common.run(main, tyro.cli(Args))
