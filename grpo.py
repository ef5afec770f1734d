"""GRPO: reinforcement learning from verifiable rewards; the baseline is the mean reward of a prompt's own completions.

For each prompt, sample G completions o_1 ... o_G from the policy, score them, and maximise

    J = 1/Z * sum over i, t of  min(ratio * A_i, clip(ratio, 1 - eps, 1 + eps_high) * A_i) - beta * KL_it

    ratio = pi(o_it) / pi_old(o_it)        A_i = (r_i - mean(r)) / (std(r) + 1e-4)        KL_it = ratio * (e^d - d - 1)

with d = log pi_ref(o_it) - log pi(o_it). Z is the number of completion tokens of the step, over all processes.

What differs from the paper (https://arxiv.org/abs/2402.03300):
1. --loss-type dapo (default) divides by all tokens of a step (https://arxiv.org/abs/2503.14476); `grpo` is the paper's
   mean over sequences of means over tokens; `dr_grpo` divides by a constant (https://arxiv.org/abs/2503.20783).
2. Clip-higher: the upper bound is 0.28, not 0.2 (DAPO). It matters from the second of --ppo-steps on.
3. No KL term by default. When on, it is weighted by the live ratio: the gradient of the paper's estimator is not that
   of the KL divergence, this one's is (https://arxiv.org/abs/2512.02556, section 3.1).
4. Groups whose rewards are all equal have no gradient: without a KL term they are counted but not computed.
5. pi_old is the trainer's own detached log-prob in the first of --ppo-steps: no extra forward pass.
6. With vLLM the policy term is weighted by min(pi_old / pi_engine, --is-cap): truncated importance sampling.

Laptop:  python grpo.py
GPU:     accelerate launch grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset gsm8k --batch-size 64
Guide:   training_guide/grpo.md
"""

import json
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro

import common


@dataclass
class Args:
    # Model
    model: str = "tiny"
    """hub id, folder, or a bundled model: tiny, tiny-teacher"""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """forward pass (autocast) and reference; trained weights are always float32. auto: bf16 where a GPU has it"""
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
    batch_size: int = 32
    """prompts per process and step"""
    group_size: int = 8
    """completions per prompt"""
    max_new_tokens: int = 256
    """longest completion"""
    temperature: float = 1.0
    """of sampling; the loss differentiates the same distribution"""
    engine: Literal["hf", "vllm"] = "hf"
    """what samples completions: transformers' generate, or vLLM in the same process"""
    vllm_args: str = "{}"
    """JSON object of arguments for vllm.LLM, such as '{"gpu_memory_utilization": 0.4}'"""
    max_logprob_gap: float = 0.1
    """stop if trainer and engine differ by more nats a token in the first step: the weights did not arrive"""

    # Algorithm
    loss_type: Literal["dapo", "grpo", "dr_grpo"] = "dapo"
    """dapo: divide by the step's tokens; grpo: by each sequence's length, then by sequences; dr_grpo: by a constant"""
    advantage_scale: Literal["group", "none"] = "group"
    """group: divide (reward - group mean) by the group's standard deviation; none: do not"""
    ppo_steps: int = 1
    """optimizer steps on each rollout, each on the whole of it"""
    clip_eps: float = 0.2
    """the ratio is clipped at 1 - clip_eps where that lowers the objective"""
    clip_eps_high: float = 0.28
    """and at 1 + clip_eps_high likewise"""
    kl_penalty: float = 0.0
    """weight of the KL divergence to the initial model; 0: none, and no reference model is loaded"""
    is_correction: Literal["none", "token", "sequence"] | None = None
    """weigh the policy term by pi_trainer / pi_engine of the token or of its completion; None: token with vllm"""
    is_cap: float = 2.0
    """largest weight of --is-correction"""
    mask_truncated: bool = False
    """completions cut at --max-new-tokens do not train (their rewards still count in the group's mean)"""

    # Optimization
    num_steps: int = 170
    """rollouts, each followed by --ppo-steps updates"""
    learning_rate: float | None = None
    """peak; None: 1e-6, for a bundled model 3e-4"""
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


# P prompts, G completions per prompt, B = P * G sequences, T tokens
def group_advantages(rewards: torch.Tensor, scale: str) -> torch.Tensor:
    """Rewards relative to their group's mean, (P, G) -> (P, G). A group of equal rewards gets exact zeros.

    Args:
        scale: `group` divides by the group's sample standard deviation + 1e-4, `none` does not.
    """
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if scale == "group":
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + 1e-4)
    # In float32 the mean of eight 0.1s is not 0.1: compare the rewards themselves.
    equal = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    return torch.where(equal, 0.0, advantages)


def grpo_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    denominator: float,
    clip_eps: float,
    clip_eps_high: float,
    loss_type: str,
    ref_logprobs: torch.Tensor | None = None,
    kl_penalty: float = 0.0,
    importance_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped objective, negated, plus the KL penalty.

    Args:
        logprobs, old_logprobs, ref_logprobs, loss_mask: (B, T); advantages: (B,).
        denominator: of the whole step, over all micro-batches and processes: trained tokens for `dapo`, sequences for
            `grpo`, sequences * max_new_tokens for `dr_grpo`.
        importance_weights: (B, T), multiply the policy term only (truncated importance sampling).
    Returns:
        The loss (this call's share of the step's), and detached sums over this call's trained tokens.
    """
    assert logprobs.shape == old_logprobs.shape == loss_mask.shape
    assert advantages.shape == logprobs.shape[:1]
    mask, advantages = loss_mask.bool(), advantages.to(logprobs.dtype)
    ratio = torch.where(mask, logprobs - old_logprobs, 0).exp()  # (B, T)
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps_high)
    policy_loss = -torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])
    sums = {"loss/policy": policy_loss, "policy/ratio_mean": ratio}
    sums["policy/clip_frac"] = (clipped * advantages[:, None] < ratio * advantages[:, None]).to(ratio.dtype)
    per_token = policy_loss if importance_weights is None else policy_loss * importance_weights
    if ref_logprobs is not None:
        d = torch.where(mask, ref_logprobs - logprobs, 0)
        sums["loss/kl"] = ratio * (d.exp() - d - 1)
        per_token = per_token + kl_penalty * sums["loss/kl"]
    if loss_type == "grpo":  # a mean over each sequence's own tokens
        per_token = per_token / mask.sum(dim=1, keepdim=True).clamp(min=1)
    loss = torch.where(mask, per_token, 0).sum() / denominator
    return loss, {name: torch.where(mask, value.detach(), 0).sum() for name, value in sums.items()}


def importance_weights(log_ratio: torch.Tensor, correction: str, cap: float) -> torch.Tensor:
    """Truncated importance sampling: min(pi_old / pi_engine, cap) of the tokens that the engine sampled. (B, T)

    Args:
        log_ratio: log pi_old - log pi_engine, (B, T), 0 where nothing trains.
        correction: `token` (https://fengyao.notion.site/off-policy-rl), or `sequence`: the product over a completion
            for each of its tokens, unbiased except for the cap, with more variance (https://richardli.xyz/rl-collapse).
    """
    if correction == "sequence":
        log_ratio = log_ratio.sum(dim=1, keepdim=True).expand_as(log_ratio)
    return log_ratio.exp().clamp(max=cap)


def explain_no_gradient(rewards: torch.Tensor, truncated: torch.Tensor) -> str:
    """Why no group of the step has a gradient: rewards (P, G), truncated (P, G)."""
    kinds = {"right": rewards >= 1.0, "wrong": rewards < 1.0, "truncated": truncated.bool()}
    counts = ", ".join(f"{of_sample.all(dim=1).sum()} all {kind}" for kind, of_sample in kinds.items())
    return f"no gradient: of {len(rewards)} groups, {counts}"


def main(args: Args, train_dataset: Any = None, eval_dataset: Any = None) -> None:
    default_learning_rate = 3e-4 if args.model in common.BUNDLED else 1e-6
    learning_rate = default_learning_rate if args.learning_rate is None else args.learning_rate
    is_correction = args.is_correction or {"hf": "none", "vllm": "token"}[args.engine]

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

    common.require_rewards(train_dataset)
    longest_prompt = common.context_length(common.load_config(run.source)) - args.max_new_tokens
    prompts = common.encode_prompts(tokenizer, train_dataset, range(len(train_dataset)), longest_prompt, template_args)

    model = common.load_model(run.source, accelerator.device, attn)
    reference = None
    if args.kl_penalty > 0:
        reference = common.load_model(args.model, accelerator.device, attn, dtype)
        reference = common.ChunkedLM(reference, dtype, common.vocab_size(tokenizer))
        reference.requires_grad_(False)

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
    if eval_dataset is not None:
        evaluator = common.Evaluator(
            engine, tokenizer, eval_dataset, args.max_new_tokens, template_args=template_args, progress=run.progress
        )

    # The correction that was chosen has a name of its own: --resume compares the flag.
    run.begin(compute_dtype=str(dtype), attention=attn, engine_version=engine.name, correction=is_correction)
    local_size = args.batch_size * args.group_size  # B: completions of this process
    total_size = local_size * accelerator.num_processes
    size = f"{total_size // args.group_size} prompts x {args.group_size} completions"
    run.say(f"model      {args.model}: {model.num_parameters() / 1e6:.1f} M float32 weights, batches {model.batches}")
    run.say(compute_line)
    run.say(tokens_line)
    run.say(f"engine     {engine.name}, importance sampling correction {is_correction}")
    held_out = f"{len(eval_dataset)} problems" if evaluator else "off" + " (no held-out split)" * (args.eval_steps > 0)
    run.say(f"data       {args.dataset}: {len(train_dataset)} prompts; evaluation {held_out}")
    run.say(f"batch      {size} a step, at most {total_size * args.max_new_tokens:,} sampled tokens")
    run.say(run.optimizer_line)

    if evaluator is not None and run.step == 0:
        engine.sync(model)
        run.log(0, evaluator.evaluate()[0])
    for step in range(run.step + 1, args.num_steps + 1):
        # 1. rollout
        started = time.perf_counter()
        first = ((step - 1) * accelerator.num_processes + accelerator.process_index) * args.batch_size
        rows = common.data_order(len(train_dataset), args.seed, first, args.batch_size)
        rows = [i for i in rows for _ in range(args.group_size)]  # P prompts -> B = P * G
        offset = accelerator.process_index * local_size
        seeds = [common.completion_seed(args.seed, step, offset + b) for b in range(local_size)]
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
        scores = [common.score(train_dataset[i], text) for i, text in zip(rows, texts, strict=True)]
        rewards = torch.tensor(scores, dtype=torch.float64).view(-1, args.group_size)  # (P, G)
        truncated = torch.tensor([c.finish_reason == "length" for c in completions]).view_as(rewards)  # (P, G)

        # 3. advantages
        advantages = group_advantages(rewards, args.advantage_scale)  # (P, G)
        has_gradient = (advantages != 0).any(dim=1, keepdim=True).expand_as(rewards).flatten()  # (B,)

        # 4. loss and update
        sequences = []  # (token ids, loss mask)
        for i, completion in zip(rows, completions, strict=True):
            trains = int(not (args.mask_truncated and completion.finish_reason == "length"))
            loss_mask = [0] * len(prompts[i]) + [trains] * len(completion.token_ids)
            sequences.append((prompts[i] + completion.token_ids, loss_mask))
        trained = [sum(loss_mask) for _, loss_mask in sequences]  # tokens
        computed = [b for b in range(local_size) if trained[b] and (has_gradient[b] or reference is not None)]
        computed_tokens = common.global_sum(accelerator, sum(trained[b] for b in computed))
        trained_tokens = common.global_sum(accelerator, sum(trained))
        constant = total_size * args.max_new_tokens
        denominator = {"dapo": trained_tokens, "grpo": total_size, "dr_grpo": constant}[args.loss_type]
        lr = common.scheduled_lr(step, learning_rate, args.warmup_steps, args.num_steps, args.lr_schedule)
        batches = common.micro_batches(accelerator, policy, sequences, args.micro_batch_tokens, computed)
        batch_advantages = [batch.take(advantages.flatten().to(accelerator.device)) for batch in batches]
        engine_logprobs = [batch.take_tokens([c.logprobs for c in completions]) for batch in batches]  # (B, T) each
        old_logprobs: list[torch.Tensor] = []
        ref_logprobs: list[torch.Tensor] = []
        log_ratios: list[torch.Tensor] = []  # of pi_old to the engine's
        weights: list[torch.Tensor] = []
        sums: Any = Counter()  # its update() adds
        total_loss, grad_norm = 0.0, 0.0
        for ppo_step in range(args.ppo_steps if batches else 0):
            for n, batch in enumerate(batches):
                with common.sync_gradients(accelerator, policy, last=batch is batches[-1]):
                    inputs = (*batch.inputs, args.temperature)
                    logprobs, _ = common.token_logprobs(policy, *inputs, entropy=False)  # (B, T)
                    if ppo_step == 0:
                        old_logprobs.append(logprobs.detach())
                        log_ratios.append(old_logprobs[n] - engine_logprobs[n])  # (B, T)
                        if is_correction != "none":
                            weights.append(importance_weights(log_ratios[n], is_correction, args.is_cap))
                        if reference is not None:
                            with torch.no_grad():
                                ref_logprobs.append(common.token_logprobs(reference, *inputs, entropy=False)[0])
                    loss, metrics_of_batch = grpo_loss(
                        logprobs,
                        old_logprobs[n],
                        batch_advantages[n],
                        batch.loss_mask,
                        denominator=denominator,
                        clip_eps=args.clip_eps,
                        clip_eps_high=args.clip_eps_high,
                        loss_type=args.loss_type,
                        ref_logprobs=ref_logprobs[n] if ref_logprobs else None,
                        kl_penalty=args.kl_penalty,
                        importance_weights=weights[n] if weights else None,
                    )
                    common.backward(accelerator, loss)
                sums.update(metrics_of_batch)
                total_loss += loss.item()
            grad_norm += common.optimizer_step(accelerator, policy, optimizer, lr, args.max_grad_norm, step, total_loss)
        step_seconds = time.perf_counter() - started

        # 5. log
        if not batches:
            everywhere = [accelerator.gather(part.to(accelerator.device)) for part in (rewards, truncated.float())]
            run.say(f"step {step}: {explain_no_gradient(*everywhere)}")
        metrics: dict[str, float] = {}
        if step == 1 or step % args.logging_steps == 0:
            per_sample = {"reward/mean": rewards.sum(), "reward/std": rewards.std(dim=1).sum() * args.group_size}
            per_sample["reward/zero_std_frac"] = (~has_gradient).sum()
            per_sample["completion/length_mean"] = sum(len(c.token_ids) for c in completions)
            per_sample["completion/truncated_frac"] = truncated.sum()
            metrics = common.reduce_metrics(accelerator, sums, computed_tokens * args.ppo_steps)
            metrics |= common.reduce_metrics(accelerator, {"loss/total": total_loss}, args.ppo_steps)
            if batches:
                metrics |= common.engine_gap(accelerator, log_ratios, computed_tokens)
            metrics |= common.reduce_metrics(accelerator, per_sample, total_size)
            tokens = metrics["completion/length_mean"] * total_size
            entropy = {"policy/entropy": -sum(sum(c.logprobs) for c in completions)}
            metrics |= common.reduce_metrics(accelerator, entropy, tokens)
            metrics |= {"policy/computed_frac": computed_tokens / tokens}
            metrics |= {"optim/lr": lr, "optim/grad_norm": grad_norm / args.ppo_steps}
            metrics |= {"time/rollout": rollout_seconds, "time/train": step_seconds - rollout_seconds}
            metrics |= {"time/step": step_seconds, "perf/tokens_per_second": tokens / step_seconds}
            metrics |= {"perf/peak_memory_gb": common.peak_memory_gb(accelerator.device)}
            prompt = train_dataset[rows[0]].prompt[-1]["content"]  # the step's first group goes to the log
            records = []
            for text, score, advantage, c in zip(texts, scores, advantages[0].tolist(), completions, strict=False):
                record = {"prompt": prompt, "completion": text, "reward": score, "advantage": advantage}
                records.append(record | {"finish_reason": c.finish_reason})
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
