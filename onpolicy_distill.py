"""On-policy distillation: a student learns from a teacher on the student's own samples.

The student pi writes a completion of each prompt; the frozen teacher q scores the same tokens; the loss is the reverse
KL divergence at each position, where the student really goes:

    loss = 1/N * sum over completions i, positions t of  KL( pi(. | prefix_it) || q(. | prefix_it) )

N is the number of completion tokens of the step, over all processes. `--loss` chooses the estimator:

    full      KL_it over the whole vocabulary: sum over tokens v of pi(v) * (log pi(v) - log q(v))
    sampled   log pi(o_it) - log q(o_it) of the sampled token, detached, as the negative advantage of a policy gradient

Both have the gradient of  sum over t of E[KL_t]  with the prefixes held fixed: a token gets no credit for the positions
after it, and the dependence of the prefixes on pi is not differentiated. (For `full` exactly, for `sampled` in
expectation and with N constant.) Minimising the log-ratio itself would be wrong: its expected gradient is zero.

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
import json
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro

import common
from common import UserError


@dataclass
class Args:
    # Model
    model: str = "tiny"
    """the student: hub id, folder, or a bundled model: tiny, tiny-teacher"""
    teacher_model: str = "tiny-teacher"
    """the teacher, as --model, with the student's tokenizer; frozen, and never saved"""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """forward pass (autocast) and teacher; trained weights are always float32. auto: bf16 where a GPU has it"""
    attn: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """attention; auto: flash_attention_2 where it is installed and can run, else sdpa"""
    gradient_checkpointing: bool = False
    """recompute activations in backward: less memory, about a third more time"""
    chat_template: str | None = None
    """a Jinja file to use in place of the model's own chat template; saved with the model"""
    chat_template_args: str = "{}"
    """JSON object passed to the chat template, such as '{"enable_thinking": false}'"""

    # Data and rollout
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
    batch_size: int = 64
    """prompts per process and step, one completion each"""
    max_new_tokens: int = 256
    """longest completion"""
    temperature: float = 1.0
    """of sampling; in the loss it divides the logits of student and teacher alike"""
    engine: Literal["hf", "vllm"] = "hf"
    """what samples completions: transformers' generate, or vLLM in the same process"""
    vllm_args: str = "{}"
    """JSON object of arguments for vllm.LLM, such as '{"gpu_memory_utilization": 0.4}'"""
    max_logprob_gap: float = 0.1
    """stop if trainer and engine differ by more nats a token in the first step: the weights did not arrive"""

    # Algorithm
    loss: Literal["full", "sampled"] = "full"
    """full: the KL divergence over the vocabulary at each sampled position; sampled: estimated by the sampled token"""

    # Optimization
    num_steps: int = 150
    """rollouts, each followed by an update"""
    learning_rate: float | None = None
    """peak; None: 1e-5, for a bundled model 3e-4"""
    warmup_steps: int = 5
    """steps of linear warm-up"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """after warm-up: constant, or down to zero at the last step"""
    weight_decay: float = 0.0
    """AdamW's, on matrices only"""
    max_grad_norm: float = 1.0
    """clip the gradient's norm to this; inf: never"""
    micro_batch_tokens: int = common.MICRO_BATCH_TOKENS
    """the memory knob: tokens per forward and backward pass; 4096 on a GPU, 512 on a CPU. The gradient is the same"""

    # Evaluation
    eval_steps: int = 50
    """evaluate (greedily) every so many steps, and at the first and the last; 0: never"""
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
    wandb_project: str | None = None
    """None: the script's name"""
    wandb_run_name: str | None = None
    """None: the run folder's name"""


# B sequences (a completion each), T tokens, N trained tokens of a chunk, V tokens of the vocabulary
def reverse_kl_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, loss_mask: torch.Tensor, *, denominator: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """KL(student || teacher) over the whole vocabulary at each trained position.

    Args:
        student_logits, teacher_logits: (..., V), divided by the temperature; loss_mask: (...), any leading shape. Row t
            is the distribution of token t.
        denominator: trained tokens of the whole step, over all micro-batches and processes.
    Returns:
        The loss in nats per token (this call's share of the step's), and detached sums over this call's trained tokens.
    """
    mask = loss_mask.bool()
    student, teacher = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)  # (..., V)
    kl = torch.where(mask, (student.exp() * (student - teacher)).sum(-1), 0).sum()
    with torch.no_grad():
        teacher_entropy = torch.where(mask, -(teacher.exp() * teacher).sum(-1), 0).sum()
    return kl / denominator, {"loss/reverse_kl": kl.detach(), "teacher/entropy": teacher_entropy}


def sampled_kl_loss(
    logprobs: torch.Tensor, teacher_logprobs: torch.Tensor, loss_mask: torch.Tensor, *, denominator: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Policy gradient whose advantage is, for each sampled token, log q - log pi: the negative of its log-ratio.

    The ratio pi / pi_old is 1, and carries the gradient; the log-ratio is detached: differentiating it instead would
    give E[grad log pi] = 0.

    Args:
        logprobs, teacher_logprobs, loss_mask: (B, T).
        denominator: as in `reverse_kl_loss`.
    Returns:
        The loss, whose value is the KL's estimate in nats per token (this call's share), and detached sums.
    """
    mask = loss_mask.bool()
    advantages = (teacher_logprobs - logprobs).detach()  # (B, T)
    ratio = (logprobs - logprobs.detach()).exp()
    kl = torch.where(mask, -ratio * advantages, 0).sum()
    return kl / denominator, {"loss/reverse_kl": kl.detach()}


def full_kl_of_chunk(
    student_logits: torch.Tensor,
    targets: torch.Tensor,
    teacher_states: torch.Tensor,
    *,
    teacher: common.ChunkedLM,
    temperature: float,
    denominator: float,
) -> tuple[torch.Tensor, ...]:
    """`reverse_kl_loss` of a chunk, (N, V), (N,), (N, H): the loss, its sums, and log-probs of the targets, (N,)."""
    student_logits = common.scaled(student_logits, temperature)  # (N, V)
    teacher_logits = common.scaled(teacher.head(teacher_states), temperature)  # (N, V)
    loss, metrics = reverse_kl_loss(student_logits, teacher_logits, torch.ones_like(targets), denominator=denominator)
    with torch.no_grad():
        logprobs = student_logits.gather(-1, targets[:, None])[:, 0] - student_logits.logsumexp(-1)
    return loss, *metrics.values(), logprobs


def check_tokenizers(student: Any, teacher: Any) -> None:
    """Raises a UserError that names the first token id at which two tokenizers differ."""
    ours, theirs = ({i: token for token, i in t.get_vocab().items()} for t in (student, teacher))
    for i in sorted(ours.keys() | theirs.keys()):
        if ours.get(i) != theirs.get(i):
            words = f"token {i} is {ours.get(i)!r} in the student's and {theirs.get(i)!r} in --teacher-model's"
            raise UserError(f"student and teacher have different tokenizers: {words}; choose models of one family")


def main(args: Args, train_dataset: Any = None, eval_dataset: Any = None) -> None:
    default_learning_rate = 3e-4 if args.model in common.BUNDLED else 1e-5
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

    check_tokenizers(tokenizer, common.load_tokenizer(args.teacher_model, args.chat_template, needs_template=False))
    contexts = [common.context_length(common.load_config(name)) for name in (run.source, args.teacher_model)]
    longest_prompt = min(contexts) - args.max_new_tokens
    prompts = common.encode_prompts(tokenizer, train_dataset, range(len(train_dataset)), longest_prompt, template_args)

    model = common.load_model(run.source, accelerator.device, attn)
    teacher = common.load_model(args.teacher_model, accelerator.device, attn, dtype)
    teacher = common.ChunkedLM(teacher, dtype, common.vocab_size(tokenizer))
    teacher.requires_grad_(False)

    # --- same in sft.py, grpo.py, onpolicy_distill.py ---
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # it works in training mode only; dropout is 0
    policy = accelerator.prepare(common.ChunkedLM(model, dtype, common.vocab_size(tokenizer)))
    optimizer = common.make_optimizer(policy, args.weight_decay)
    common.restore_optimizer(run, optimizer)
    # --- end ---
    # --- same in grpo.py, onpolicy_distill.py ---
    if args.engine == "vllm":
        engine: Any = common.VLLMEngine(run.source, tokenizer, dtype, args.vllm_args, template_args, trains=True)
    else:
        engine = common.HFEngine(model, tokenizer, args.micro_batch_tokens, dtype, template_args)
    # --- end ---
    evaluator = None
    if eval_dataset is not None and not common.rows_without_reward(eval_dataset):
        evaluator = common.Evaluator(
            engine, tokenizer, eval_dataset, args.max_new_tokens, template_args=template_args, progress=run.progress
        )

    run.begin(compute_dtype=str(dtype), attention=attn, engine_version=engine.name)
    total_size = args.batch_size * accelerator.num_processes
    rewarded = not common.rows_without_reward(train_dataset)  # no reward is needed, but it shows where there is one
    run.say(f"model      {args.model}: {model.num_parameters() / 1e6:.1f} M float32 weights, batches {model.batches}")
    run.say(f"teacher    {args.teacher_model}: {teacher.model.num_parameters() / 1e6:.1f} M weights, frozen, {dtype}")
    run.say(compute_line)
    run.say(tokens_line)
    run.say(f"engine     {engine.name}")
    held_out = (
        f"{len(eval_dataset)} problems" if evaluator else "off" + " (no held-out rewards)" * (args.eval_steps > 0)
    )
    run.say(f"data       {args.dataset}: {len(train_dataset)} prompts; evaluation {held_out}")
    run.say(f"batch      {total_size} completions a step, at most {total_size * args.max_new_tokens:,} sampled tokens")
    run.say(run.optimizer_line)

    if evaluator is not None and run.step == 0:
        engine.sync(model)
        run.log(0, evaluator.evaluate()[0])
    for step in range(run.step + 1, args.num_steps + 1):
        # 1. rollout
        started = time.perf_counter()
        first = ((step - 1) * accelerator.num_processes + accelerator.process_index) * args.batch_size
        rows = common.data_order(len(train_dataset), args.seed, first, args.batch_size)
        offset = accelerator.process_index * args.batch_size
        seeds = [common.completion_seed(args.seed, step, offset + b) for b in range(args.batch_size)]
        # --- same in grpo.py, onpolicy_distill.py ---
        engine.sync(model)
        completions = engine.generate(
            [prompts[i] for i in rows], seeds, max_new_tokens=args.max_new_tokens, temperature=args.temperature
        )
        if stop := common.stop_signal():  # the completions may be missing: this step will be done by whoever resumes
            common.save_checkpoint(run, step - 1, model, tokenizer, optimizer)
            raise SystemExit(128 + stop)
        texts = [completion.text(tokenizer) for completion in completions]
        rollout_seconds = time.perf_counter() - started
        if step == run.step + 1:  # the first of this process: weights that did not arrive show at once
            common.check_engine(accelerator, policy, args, [prompts[i] for i in rows], completions)
        # --- end ---

        # 2. reward
        rewards = [common.score(train_dataset[i], text) for i, text in zip(rows, texts, strict=True) if rewarded]

        # 3. advantages
        # None: the teacher scores every token, in the loss.

        # 4. loss and update
        sequences = []  # (token ids, loss mask)
        for i, completion in zip(rows, completions, strict=True):
            loss_mask = [0] * len(prompts[i]) + [1] * len(completion.token_ids)
            sequences.append((prompts[i] + completion.token_ids, loss_mask))
        trained_tokens = common.global_sum(accelerator, sum(len(c.token_ids) for c in completions))
        batches = common.micro_batches(accelerator, policy, sequences, args.micro_batch_tokens)
        chunk_options = {"teacher": teacher, "temperature": args.temperature, "denominator": trained_tokens}
        chunk_fn = functools.partial(full_kl_of_chunk, **chunk_options)
        log_ratios = []  # of the student's probabilities to the engine's, (N,) each
        sums: Any = Counter()  # its update() adds
        total_loss = 0.0
        for batch in batches:
            engine_logprobs = batch.take_tokens([c.logprobs for c in completions])[batch.loss_mask.bool()]  # (N,)
            inputs = batch.inputs
            with common.sync_gradients(accelerator, policy, last=batch is batches[-1]):
                if args.loss == "full":
                    with torch.no_grad():
                        teacher_states = teacher.states(*inputs)  # (N, H)
                    loss, kl, entropy, logprobs = policy(*inputs, chunk_fn, teacher_states)  # logprobs: (N,)
                    sums.update({"loss/reverse_kl": kl, "teacher/entropy": entropy})
                else:
                    student_logprobs, _ = common.token_logprobs(policy, *inputs, args.temperature, entropy=False)
                    with torch.no_grad():
                        teacher_logprobs, entropy = common.token_logprobs(teacher, *inputs, args.temperature)
                    loss, metrics_of_batch = sampled_kl_loss(
                        student_logprobs, teacher_logprobs, batch.loss_mask, denominator=trained_tokens
                    )
                    sums.update(metrics_of_batch | {"teacher/entropy": entropy.sum()})
                    logprobs = student_logprobs.detach()[batch.loss_mask.bool()]  # (N,)
                common.backward(accelerator, loss)
            log_ratios.append(logprobs - engine_logprobs)
            total_loss += loss.item()
        lr = common.scheduled_lr(step, learning_rate, args.warmup_steps, args.num_steps, args.lr_schedule)
        grad_norm = common.optimizer_step(accelerator, policy, optimizer, lr, args.max_grad_norm, step, total_loss)
        step_seconds = time.perf_counter() - started

        # 5. log
        metrics: dict[str, float] = {}
        if step == 1 or step % args.logging_steps == 0:
            per_sample = {"reward/mean": sum(rewards)} if rewarded else {}
            per_sample["completion/length_mean"] = sum(len(c.token_ids) for c in completions)
            per_sample["completion/truncated_frac"] = sum(c.finish_reason == "length" for c in completions)
            entropy = {"policy/entropy": -sum(sum(c.logprobs) for c in completions)}
            metrics = common.reduce_metrics(accelerator, {**sums, **entropy}, trained_tokens)
            metrics |= common.engine_gap(accelerator, log_ratios, trained_tokens)
            metrics |= common.reduce_metrics(accelerator, per_sample, total_size)
            metrics |= {"optim/lr": lr, "optim/grad_norm": grad_norm}
            metrics |= {"time/rollout": rollout_seconds, "time/train": step_seconds - rollout_seconds}
            metrics |= {"time/step": step_seconds, "perf/tokens_per_second": trained_tokens / step_seconds}
            metrics |= {"perf/peak_memory_gb": common.peak_memory_gb(accelerator.device)}
            records = []  # the step's first completions go to the log
            for i, text, completion in zip(rows[:8], texts, completions, strict=False):
                record = {"prompt": train_dataset[i].prompt[-1]["content"], "completion": text}
                records.append(record | {"finish_reason": completion.finish_reason})
            for record, reward in zip(records, rewards, strict=False):
                record["reward"] = reward
            at_evaluation = args.eval_steps > 0 and step % args.eval_steps == 0
            run.log_completions(step, records, show=step in (1, args.num_steps) or at_evaluation)

        # 6. evaluate and save
        # --- same in grpo.py, onpolicy_distill.py ---
        if evaluator is not None and (step == args.num_steps or step % args.eval_steps == 0):
            engine.sync(model)
            metrics |= evaluator.evaluate()[0]
        # --- end ---
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
