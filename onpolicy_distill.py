"""On-policy distillation: a student learns from a teacher on the student's own samples.

The student pi writes a completion of each prompt; the frozen teacher q scores the same tokens; minimise

    loss = 1/Z * sum over completions i, positions t of  KL( pi(. | prefix_it) || q(. | prefix_it) )

by one of two estimators:

    full      sum over all tokens v of pi(v) * (log pi(v) - log q(v))
    sampled   log pi(o_it) - log q(o_it), detached, as the negative advantage of a policy gradient

Z is the number of completion tokens of the step, over all processes. Both have the gradient of sum over t of E[KL_t]
with the prefixes held fixed (`sampled` in expectation, Z constant). Minimising the log-ratio itself would be wrong: its
expected gradient is zero.

What differs from the papers (https://arxiv.org/abs/2306.13649, https://arxiv.org/abs/2306.08543):
1. GKD with lambda 1 and the reverse KL: only the student's own samples, no fixed dataset of completions.
2. No credit to later tokens, unlike MiniLLM: a discount of 0, as in "On-Policy Distillation"
   (https://thinkingmachines.ai/blog/on-policy-distillation/), whose estimator `sampled` is.
3. Teacher and student at --temperature, in sampling and in the loss.

Laptop:  python onpolicy_distill.py
GPU:     python onpolicy_distill.py --model Qwen/Qwen2.5-0.5B-Instruct --teacher-model Qwen/Qwen2.5-7B-Instruct
Guide:   training_guide/onpolicy_distillation.md
"""

import functools
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

import chat
import common
import envs


@dataclass
class Args:
    # Model
    model: str = "tiny"
    """hub id, folder, or a bundled model: tiny, tiny-teacher"""
    teacher_model: str = "tiny-teacher"
    """as --model, with the same tokenizer; frozen, and never saved"""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """forward pass (autocast) and frozen models; trained weights are always float32. auto: bf16 on a GPU that has it"""
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

    # Data and rollout
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
    batch_size: int = 64
    """prompts per process and step"""
    max_prompt_length: int | None = None
    """drop prompts with more tokens; None: with more than the context and --max-new-tokens leave"""
    max_new_tokens: int = 256
    """longest completion"""
    temperature: float = 1.0
    """of sampling, and of the distributions in the loss"""
    engine: Literal["hf", "vllm"] = "hf"
    """what samples completions: transformers' models in a loop of our own, or vLLM in the same process"""
    vllm_args: str = "{}"
    """JSON object of arguments for vllm.LLM, such as '{"gpu_memory_utilization": 0.4}'"""
    max_logprob_gap: float = 0.1
    """stop if trainer and engine differ by more nats a token: the weights did not arrive"""

    # Algorithm
    loss: Literal["full", "sampled"] = "full"
    """full: the KL divergence over the vocabulary at each sampled position; sampled: estimated by the sampled token"""

    # Optimization
    num_steps: int = 150
    """rollouts and what is learned from each"""
    learning_rate: float | None = None
    """peak; None: 1e-5, for a bundled model 3e-4; ten times that with --lora-rank"""
    warmup_steps: int = 5
    """steps of linear warm-up"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """after warm-up: constant, or down to zero, one step after the last"""
    weight_decay: float = 0.0
    """AdamW's, on matrices only"""
    max_grad_norm: float = 1.0
    """clip the gradient's norm to this; inf: never"""
    micro_batch_tokens: int | None = None
    """the memory knob: tokens per forward and backward pass, with the same gradient. None: chosen by the device"""

    # Evaluation
    eval_steps: int = 50
    """evaluate (greedily) every so many steps, before the first and at the last; 0: never"""
    eval_samples: int = 512
    """at most this many problems"""

    # Run
    output_dir: str | None = None
    """the run's folder; None: runs/<script>-<model>-<time>"""
    resume: bool = False
    """go on from the newest checkpoint in --output-dir; start afresh if there is none"""
    saving_steps: int = 50
    """save a checkpoint every so many steps, and at the last"""
    logging_steps: int = 1
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


# B sequences (a completion each), T tokens, n trained tokens of a chunk, H hidden size, V tokens of the vocabulary
def reverse_kl_loss(
    student_logits: Tensor, teacher_logits: Tensor, loss_mask: Tensor, *, denominator: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """KL(student || teacher) over the whole vocabulary at each trained position.

    Args:
        student_logits, teacher_logits: (..., V), divided by the temperature; loss_mask: (...), any leading shape. Row t
            is the distribution of token t.
        denominator: of the whole step, over all micro-batches and processes: trained tokens.
    Returns:
        The loss (this call's share of the step's), and detached sums over this call's trained tokens.
    """
    mask = loss_mask.bool()
    student, teacher = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)  # (..., V)
    kl = torch.where(mask, (student.exp() * (student - teacher)).sum(-1), 0).sum()
    with torch.no_grad():
        teacher_entropy = torch.where(mask, -(teacher.exp() * teacher).sum(-1), 0).sum()
    return kl / denominator, {"loss/reverse_kl": kl.detach(), "teacher/entropy": teacher_entropy}


def sampled_kl_loss(
    logprobs: Tensor, teacher_logprobs: Tensor, loss_mask: Tensor, *, denominator: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy gradient whose advantage is, for each sampled token, log q - log pi: the negative of its log-ratio.

    The ratio pi / pi_old is 1, and carries the gradient; the log-ratio is detached. Tensors are of one shape, with a
    value for each token; `denominator` and what is returned are as in `reverse_kl_loss`.
    """
    advantages = (teacher_logprobs - logprobs).detach()
    ratio = (logprobs - logprobs.detach()).exp()
    kl = torch.where(loss_mask.bool(), -ratio * advantages, 0).sum()
    return kl / denominator, {"loss/reverse_kl": kl.detach()}


def loss_of_chunk(
    logits: Tensor, targets: Tensor, teacher_states: Tensor, *, teacher: Any, args: Args, denominator: float
) -> tuple[Tensor, ...]:
    """Of (n, V), (n,), (n, H): the loss, sums of KL and teacher's entropy, and the student's log-probs, (n,)."""
    teacher_logits, mask = teacher.head(teacher_states, args.temperature), torch.ones_like(targets)  # (n, V), (n,)
    if args.loss == "full":
        loss, sums = reverse_kl_loss(logits, teacher_logits, mask, denominator=denominator)
        (logprobs,) = common.logprob_of(logits.detach(), targets)
    else:
        (logprobs,) = common.logprob_of(logits, targets)
        teacher_logprobs, entropy = common.logprob_of(teacher_logits, targets, entropy=True)
        loss, sums = sampled_kl_loss(logprobs, teacher_logprobs, mask, denominator=denominator)
        sums["teacher/entropy"] = entropy.sum()
    return loss, sums["loss/reverse_kl"], sums["teacher/entropy"], logprobs.detach()


def main(args: Args, train_dataset: Any = None, eval_dataset: Any = None) -> None:
    run = common.Run(args, __file__, train_dataset, eval_dataset, bundled_lr=3e-4, real_lr=1e-5)
    if run.finished:
        return
    tokenizer, train_dataset, device, accelerator = run.tokenizer, run.train_dataset, run.device, run.accelerator
    chat.check_same_tokens(tokenizer, chat.load_tokenizer(args.teacher_model, args.chat_template, needs_template=False))
    configs = (run.config, chat.load_config(args.teacher_model))
    prompts = envs.encode_prompts(train_dataset, tokenizer, min(map(chat.context_length, configs)), args, graded=False)
    run.look(prompts)
    policy = common.load_policy(run)
    teacher = common.load_frozen(run, args.teacher_model, "teacher")
    engine = common.make_engine(run)
    evaluator = run.evaluator(engine)
    run.begin()

    if run.step == 0:
        run.log(0, run.evaluate(0, evaluator))
    for step in run.steps():
        # 1. rollout
        started = time.perf_counter()
        rows = run.safely(run.rows, step, prompts)  # B
        asked = [prompts[row] for row in rows]
        engine.sync(run.model)
        sampling = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
        completions = engine.generate(asked, run.seeds(step, len(rows)), **sampling, pause=run.pause)
        texts = [completion.text(tokenizer) for completion in completions]
        rollout_seconds = time.perf_counter() - started

        # 2. reward
        graded = [b for b, row in enumerate(rows) if envs.has_reward(train_dataset[row])]  # none needs a reward
        scores = run.safely(envs.score_all, [train_dataset[rows[b]] for b in graded], [texts[b] for b in graded])
        truncated = torch.tensor([c.finish_reason == "length" for c in completions], device=device)  # (B,)

        # 3. advantages
        # None: the teacher scores every token, in the loss.

        # 4. loss and update
        sequences = [completion.after(prompt) for completion, prompt in zip(completions, asked, strict=True)]
        input_ids, attention_mask, loss_mask, engine_logprobs = common.collate(sequences, device)  # (B, T) each
        denominator = run.sum(loss_mask.sum())
        micro_batches = common.micro_batches(run, input_ids, attention_mask)
        objective = functools.partial(loss_of_chunk, teacher=teacher, args=args, denominator=denominator)
        old_logprobs = torch.zeros_like(engine_logprobs)  # (B, T)
        lr = common.scheduled_lr(step, run.learning_rate, args.warmup_steps, args.num_steps, args.lr_schedule)
        sums: Any = Counter()  # its update() adds
        total_loss = 0.0
        for mb in micro_batches:
            inputs = (input_ids[mb], attention_mask[mb], loss_mask[mb], args.temperature)
            last = mb is micro_batches[-1]  # it synchronises the processes' gradients (DDP decides in forward)
            with nullcontext() if last else accelerator.no_sync(policy):
                with torch.no_grad():
                    teacher_states = teacher.states(*inputs[:3])  # (N, H)
                loss, kl, teacher_entropy, logprobs = policy(*inputs, objective, teacher_states)
                common.backward(run, loss)
            old_logprobs[mb] = common.at_positions(logprobs, loss_mask[mb]).double()
            sums.update({"loss/reverse_kl": kl, "teacher/entropy": teacher_entropy})
            total_loss += loss.item()
        gap = common.check_gap(run, old_logprobs, engine_logprobs, loss_mask)
        grad_norm = common.optimizer_step(run, step, lr, total_loss)
        step_seconds = time.perf_counter() - started

        # 5. log: a pair is a sum and a count of this process
        sampled = sum(len(c.token_ids) for c in completions)
        metrics = gap | {name: (value, sampled) for name, value in sums.items()}
        metrics |= {
            "reward/mean": (sum(scores), len(scores)),
            "completion/length_mean": (sampled, len(rows)),
            "completion/truncated_frac": (truncated.sum(), len(rows)),
            "policy/entropy": (-engine_logprobs.sum(), sampled),
            "optim/lr": lr,
            "optim/grad_norm": grad_norm,
            "time/rollout": rollout_seconds,
            "time/train": step_seconds - rollout_seconds,
            "time/step": step_seconds,
            "perf/tokens_per_second": (sampled, step_seconds / run.processes),
        }
        records = []  # some completions, for completions.jsonl
        reward_of = dict(zip(graded, scores, strict=True))
        for b, (row, text, c) in enumerate(zip(rows[:8], texts, completions, strict=False)):
            prompt = train_dataset[row].prompt[-1]["content"]
            records.append(
                {"prompt": prompt, "completion": text, "reward": reward_of.get(b), "finish_reason": c.finish_reason}
            )

        # 6. evaluate and save
        metrics |= run.evaluate(step, evaluator)
        run.log(step, metrics, records)
        run.save(step)
    run.say_dropped(prompts)
    run.finish()


if __name__ == "__main__":
    common.run(main, tyro.cli(Args))
