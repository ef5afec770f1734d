"""Supervised fine-tuning: train a model to write the assistant's turns of given conversations.

    loss = - (1 / N) * sum over the assistant tokens t of  log pi(token t | tokens before t)

N is the number of assistant tokens in the step's whole batch, over all micro-batches and processes. The stop token of
each turn trains, so the model learns to end; system, user and template tokens never do.

What differs from the usual Hugging Face recipe:
1. The mask comes from the chat template itself (`common.encode_chat`), with no template-specific code.
2. The mean is over all tokens of the step, not a mean of means, however the batch is cut.
3. A conversation longer than --max-length is dropped and counted, never cut: a cut would train answers without an end.

Laptop:  python sft.py
GPU:     accelerate launch sft.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset gsm8k --num-steps 500
Guide:   training_guide/sft.md
"""

import itertools
import json
import math
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from accelerate import Accelerator
from rich.console import Console
from rich.progress import track
from rich.text import Text
from torch import Tensor, nn

import common
from common import UserError


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
    """attention; auto: flash_attention_2 where it is installed and can run, else sdpa"""
    gradient_checkpointing: bool = False
    """recompute activations in backward: less memory, about a third more time"""
    chat_template: str | None = None
    """a Jinja file to use in place of the model's own chat template; saved with the model"""
    chat_template_args: str = "{}"
    """JSON object passed to the chat template, such as '{"enable_thinking": false}'"""

    # Data
    dataset: str = "math"
    """math, gsm8k, a .jsonl file, a hub dataset id (id:config), reasoning_gym:NAME, or file.py:function"""
    eval_dataset: str | None = None
    """as --dataset; None: its evaluation split"""
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
    """peak; None: 1e-5, for a bundled model 1e-3"""
    warmup_steps: int = 10
    """steps of linear warm-up"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """after warm-up: constant, or down to zero at the last step"""
    weight_decay: float = 0.0
    """AdamW's, on matrices only"""
    max_grad_norm: float = 1.0
    """clip the gradient's norm to this; inf: never"""
    micro_batch_tokens: int = common.MICRO_BATCH_TOKENS
    """the memory knob: tokens per forward and backward pass; 4096 on a GPU, 512 on a CPU. The gradient is the same"""

    # Evaluation
    eval_steps: int = 100
    """evaluate every so many steps, and at the first and the last; 0: never"""
    eval_samples: int = 512
    """at most this many problems"""
    eval_sample_completions: bool = False
    """also let the model answer the evaluation prompts, greedily, and log the rewards"""
    max_new_tokens: int = 256
    """longest completion for --eval-sample-completions"""
    engine: Literal["hf", "vllm"] = "hf"
    """what samples the evaluation completions: transformers' generate, or vLLM in the same process"""
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
    wandb_project: str | None = None
    """None: the script's name"""
    wandb_run_name: str | None = None
    """None: the run folder's name"""


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


def encode(
    dataset: Any, tokenizer: Any, max_length: int, template_args: dict, console: Console | None = None
) -> tuple[list[tuple[list[int], list[int]]], list[str]]:
    """(token ids, loss mask) of each conversation of prompt and target, and a line per reason to leave some out."""
    encoded, reasons = [], Counter()
    quiet = console is None or not console.is_terminal
    for i in track(range(len(dataset)), "encoding", console=console, disable=quiet, transient=True):
        try:
            messages = [*dataset[i].prompt, {"role": "assistant", "content": dataset[i].get_target()}]
            ids, loss_mask = common.encode_chat(tokenizer, messages, **template_args)
        except UserError as error:
            raise UserError(f"row {i}: {error}") from None
        if len(ids) > max_length:
            reasons[f"longer than {max_length:,} tokens"] += 1
        elif not any(loss_mask[1:]):  # nothing predicts token 0
            reasons["with nothing to train"] += 1
        else:
            encoded.append((ids, loss_mask))
    dropped = [f"dropped {count:,} of {len(dataset):,} rows {kind}" for kind, count in reasons.items()]
    if not encoded:
        raise UserError(f"no conversation is left: {', '.join(dropped)}")
    return encoded, dropped


def show(tokenizer: Any, ids: list[int], loss_mask: list[int], short: bool = False) -> Text:
    """A conversation, what trains of it in green and between « and », the counts and the token that it ends with."""
    text = Text()
    for trains, run in itertools.groupby(zip(ids, loss_mask, strict=True), key=lambda pair: pair[1]):
        words = tokenizer.decode([token for token, _ in run])
        words = common.shorten(words) if short else words
        text.append(f"«{words}»" if trains else words, "bold green" if trains else "")
    end = tokenizer.decode([token for token, trains in zip(ids, loss_mask, strict=True) if trains][-1:])
    return text.append(f" [{sum(loss_mask)} of {len(ids)} tokens train, the last is {end!r}]", "dim")


def inspect(args: Args, dataset: Any = None) -> None:
    """Prints the first encoded conversations, as many as --inspect says. Loads no weights and writes nothing."""
    common.check_args(args)
    dataset = common.load_datasets(args, dataset, None)[0]
    tokenizer = common.load_tokenizer(args.model, args.chat_template)
    template_args = json.loads(args.chat_template_args)
    context = common.context_length(common.load_config(args.model))
    rows = [dataset[i] for i in range(len(dataset))[: args.inspect]]
    conversations, dropped = encode(rows, tokenizer, min(args.max_length or context, context), template_args)
    console = Console(highlight=False, soft_wrap=True)
    console.print(common.check_tokenizer(tokenizer, args.model, template_args), *dropped, sep="\n", markup=False)
    for conversation in conversations:
        console.print(show(tokenizer, *conversation), end="\n\n")


@torch.no_grad()
def evaluate_loss(accelerator: Accelerator, model: nn.Module, conversations: list, max_tokens: int) -> dict[str, float]:
    """Cross-entropy in nats per assistant token of the whole set, each token with the same weight; and perplexity."""
    mine = conversations[accelerator.process_index :: accelerator.num_processes]
    tokens = common.global_sum(accelerator, sum(sum(loss_mask) for _, loss_mask in mine))
    total = 0.0
    for batch in common.micro_batches(accelerator, model, mine, max_tokens):
        logprobs, _ = common.token_logprobs(model, *batch.inputs, entropy=False)
        total += sft_loss(logprobs, batch.loss_mask, tokens)[0].item()
    ce_loss = common.global_sum(accelerator, total)
    return {"eval/ce_loss": ce_loss, "eval/perplexity": math.exp(min(ce_loss, 700.0))}  # exp(710) overflows


def main(args: Args, train_dataset: Any = None, eval_dataset: Any = None) -> None:
    if args.inspect is not None:
        return inspect(args, train_dataset)
    default_learning_rate = 1e-3 if args.model in common.BUNDLED else 1e-5
    learning_rate = default_learning_rate if args.learning_rate is None else args.learning_rate

    # --- same in sft.py, grpo.py, onpolicy_distill.py ---
    accelerator = common.start(args)
    train_dataset, eval_dataset = common.load_datasets(args, train_dataset, eval_dataset)
    run = common.Run(args, __file__, accelerator, learning_rate)
    if run.finished:
        return
    dtype, attn, compute_line = common.pick_compute(args.dtype, args.attn, accelerator.device)
    tokenizer = common.load_tokenizer(run.source, args.chat_template)
    template_args = json.loads(args.chat_template_args)
    tokens_line = common.check_tokenizer(tokenizer, run.source, template_args)
    # --- end ---

    context = common.context_length(common.load_config(run.source))
    max_length = min(args.max_length or context, context)
    conversations, dropped = encode(train_dataset, tokenizer, max_length, template_args, run.console)
    eval_conversations = []
    if eval_dataset is not None:
        eval_conversations, eval_dropped = encode(eval_dataset, tokenizer, max_length, template_args, run.console)
        dropped += [f"evaluation: {line}" for line in eval_dropped]

    torch.manual_seed(args.seed)  # of --from-scratch; nothing else draws from torch's generator
    from_scratch = args.from_scratch and run.checkpoint is None
    model = common.load_model(run.source, accelerator.device, attn, from_scratch=from_scratch)

    # --- same in sft.py, grpo.py, onpolicy_distill.py ---
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # it works in training mode only; dropout is 0
    policy = accelerator.prepare(common.ChunkedLM(model, dtype, common.vocab_size(tokenizer)))
    optimizer = common.make_optimizer(policy, args.weight_decay)
    common.restore_optimizer(run, optimizer)
    # --- end ---
    evaluator = None
    if args.eval_sample_completions and eval_dataset is not None:
        if args.engine == "vllm":
            engine: Any = common.VLLMEngine(run.source, tokenizer, dtype, args.vllm_args, template_args, trains=True)
        else:
            engine = common.HFEngine(model, tokenizer, args.micro_batch_tokens, dtype, template_args)
        evaluator = common.Evaluator(
            engine, tokenizer, eval_dataset, args.max_new_tokens, template_args=template_args, progress=run.progress
        )

    def evaluate() -> dict[str, float]:
        metrics = evaluate_loss(accelerator, policy, eval_conversations, args.micro_batch_tokens)
        if evaluator is not None:
            evaluator.engine.sync(model)
            metrics |= evaluator.evaluate()[0]
        return metrics

    run.begin(compute_dtype=str(dtype), attention=attn, dropped=dropped)
    weights = f"{model.num_parameters() / 1e6:.1f} M {'random ' if from_scratch else ''}float32 weights"
    run.say(f"model      {args.model}: {weights}, batches {model.batches}")
    run.say(compute_line)
    run.say(tokens_line)
    held_out = len(eval_conversations) or "off" + " (no held-out split)" * (args.eval_steps > 0)
    run.say(f"data       {args.dataset}: {len(conversations)} conversations; evaluation {held_out}")
    for line in dropped:
        run.say(line, "yellow")
    total_size = args.batch_size * accelerator.num_processes
    mean_tokens = total_size * sum(len(ids) for ids, _ in conversations) / len(conversations)
    run.say(f"batch      {total_size} conversations a step, about {mean_tokens:,.0f} tokens")
    run.say(run.optimizer_line)
    run.console.print("example   ", show(tokenizer, *conversations[0], short=True))

    if run.step == 0 and eval_conversations:
        run.log(0, evaluate())
    for step in range(run.step + 1, args.num_steps + 1):
        # 1. batch
        started = time.perf_counter()
        first = ((step - 1) * accelerator.num_processes + accelerator.process_index) * args.batch_size
        sequences = [conversations[i] for i in common.data_order(len(conversations), args.seed, first, args.batch_size)]
        tokens = common.global_sum(accelerator, sum(sum(loss_mask) for _, loss_mask in sequences))

        # 2. loss and update
        sums: Any = Counter()  # its update() adds
        batches = common.micro_batches(accelerator, policy, sequences, args.micro_batch_tokens)
        for batch in batches:
            with common.sync_gradients(accelerator, policy, last=batch is batches[-1]):
                logprobs, _ = common.token_logprobs(policy, *batch.inputs, entropy=False)
                loss, metrics_of_batch = sft_loss(logprobs, batch.loss_mask, tokens)
                common.backward(accelerator, loss)
            sums.update(metrics_of_batch)
        lr = common.scheduled_lr(step, learning_rate, args.warmup_steps, args.num_steps, args.lr_schedule)
        total_loss = float(sums["loss/total"])
        grad_norm = common.optimizer_step(accelerator, policy, optimizer, lr, args.max_grad_norm, step, total_loss)

        # 3. log
        metrics: dict[str, float] = {}
        if step == 1 or step % args.logging_steps == 0:
            seconds = time.perf_counter() - started
            metrics = common.reduce_metrics(accelerator, sums, tokens)
            metrics |= {"optim/lr": lr, "optim/grad_norm": grad_norm, "time/train": seconds, "time/step": seconds}
            total_tokens = common.global_sum(accelerator, sum(len(ids) for ids, _ in sequences))
            metrics["perf/tokens_per_second"] = total_tokens / seconds
            metrics["perf/peak_memory_gb"] = common.peak_memory_gb(accelerator.device)

        # 4. evaluate and save
        if eval_conversations and (step == args.num_steps or step % args.eval_steps == 0):
            metrics |= evaluate()
        # --- same in sft.py, grpo.py, onpolicy_distill.py ---
        run.log(step, metrics)
        stop = common.stop_signal()
        if stop or step == args.num_steps or step % args.saving_steps == 0:
            common.save_checkpoint(run, step, model, tokenizer, optimizer)
        if stop and step < args.num_steps:
            raise SystemExit(128 + stop)
    common.save_final(run, model, tokenizer)
    run.finish(eval_dataset)
    # --- end ---


if __name__ == "__main__":
    common.run(main, tyro.cli(Args))
