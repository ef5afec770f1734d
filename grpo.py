"""GRPO: reinforcement learning from verifiable rewards; the baseline is the mean reward of a prompt's own completions.

For each prompt, sample G completions o_1 ... o_G from the policy, score them, and maximise

    J = 1/Z * sum over i, t of  min(ratio * A_i, clip(ratio, 1 - eps, 1 + eps_high) * A_i) - beta * KL_it

    ratio = pi(o_it) / pi_old(o_it)        A_i = (r_i - mean(r)) / (std(r) + 1e-4)        KL_it = ratio * (e^d - d - 1)

with d = log pi_ref(o_it) - log pi(o_it). Z is the number of completion tokens of the step, over all processes
(see 1).

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
    batch_size: int = 32
    """prompts per process and step"""
    group_size: int = 8
    """completions per prompt"""
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
    """rollouts and what is learned from each"""
    learning_rate: float | None = None
    """peak; None: 1e-6, for a bundled model 3e-4; ten times that with --lora-rank"""
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


# P prompts, G completions per prompt, B = P * G sequences, T tokens
def group_advantages(rewards: Tensor, scale: str) -> Tensor:
    """Rewards less their group's mean, (P, G) -> (P, G); `scale` group: over its sample standard deviation + 1e-4.

    A group of equal rewards gets exact zeros.
    """
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if scale == "group":
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + 1e-4)
    # In float32 the mean of eight 0.1s is not 0.1: compare the rewards themselves.
    equal = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    return torch.where(equal, 0.0, advantages)


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    denominator: float,
    clip_eps: float,
    clip_eps_high: float,
    loss_type: str,
    ref_logprobs: Tensor | None = None,
    kl_penalty: float = 0.0,
    importance_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
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


def importance_weights(log_ratio: Tensor, correction: str, cap: float) -> Tensor:
    """Truncated importance sampling: min(pi_old / pi_engine, cap) of the tokens that the engine sampled. (B, T)

    `log_ratio`, (B, T), is 0 where nothing trains. `correction` is token (https://fengyao.notion.site/off-policy-rl) or
    sequence, the product over a completion for each of its tokens: unbiased but for the cap, with more variance
    (https://richardli.xyz/rl-collapse).
    """
    if correction == "sequence":
        log_ratio = log_ratio.sum(dim=1, keepdim=True).expand_as(log_ratio)
    return log_ratio.exp().clamp(max=cap)


def main(args: Args, train_dataset: Any = None, eval_dataset: Any = None) -> None:
    run = common.Run(args, __file__, train_dataset, eval_dataset, bundled_lr=3e-4, real_lr=1e-6)
    if run.finished:
        return
    tokenizer, train_dataset, device, accelerator = run.tokenizer, run.train_dataset, run.device, run.accelerator
    for dataset in (train_dataset, run.eval_dataset or []):
        envs.require_rewards(dataset)
    correction = args.is_correction or {"hf": "none", "vllm": "token"}[args.engine]
    if correction == "none" and args.is_cap != Args.is_cap:
        raise chat.UserError("--is-cap changes nothing without --is-correction")
    prompts = envs.encode_prompts(train_dataset, tokenizer, chat.context_length(run.config), args)
    run.look(prompts)
    policy = common.load_policy(run)
    reference = common.load_reference(run) if args.kl_penalty > 0 else None
    engine = common.make_engine(run)
    evaluator = run.evaluator(engine)
    run.begin(correction=correction)

    if run.step == 0:
        run.log(0, run.evaluate(0, evaluator))
    for step in run.steps():
        # 1. rollout
        started = time.perf_counter()
        rows = run.safely(run.rows, step, prompts, args.group_size)  # B = P * G: each prompt G times in a row
        asked = [prompts[row] for row in rows]
        engine.sync(run.model)
        sampling = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
        completions = engine.generate(asked, run.seeds(step, len(rows)), **sampling, pause=run.pause)
        texts = [completion.text(tokenizer) for completion in completions]
        rollout_seconds = time.perf_counter() - started

        # 2. reward
        scores = run.safely(envs.score_all, [train_dataset[row] for row in rows], texts)
        rewards = torch.tensor(scores, dtype=torch.float64, device=device).view(-1, args.group_size)  # (P, G)
        truncated = torch.tensor([c.finish_reason == "length" for c in completions], device=device)  # (B,)

        # 3. advantages
        advantages = group_advantages(rewards, args.advantage_scale).flatten()  # (B,)
        has_spread = (rewards != rewards[:, :1]).any(dim=1)  # (P,); in the other groups all advantages are 0

        # 4. loss and update
        sequences = [completion.after(prompt) for completion, prompt in zip(completions, asked, strict=True)]
        input_ids, attention_mask, loss_mask, engine_logprobs = common.collate(sequences, device)  # (B, T) each
        if args.mask_truncated:
            loss_mask = loss_mask * ~truncated[:, None]
        total_size = len(rows) * run.processes
        tokens = max(run.sum(loss_mask.sum()), 1)  # none where all are cut and --mask-truncated is on
        denominator = {"dapo": tokens, "grpo": total_size, "dr_grpo": total_size * args.max_new_tokens}[args.loss_type]
        # What has no gradient is not computed; where nothing has, one completion is, for the gap to the engine.
        has_gradient = loss_mask.any(dim=1)  # (B,)
        if reference is None:
            has_gradient &= has_spread.repeat_interleave(args.group_size)
        learns = run.sum(has_gradient.sum()) > 0
        computed = has_gradient.nonzero().flatten().tolist() if learns else [0]
        micro_batches = common.micro_batches(run, input_ids, attention_mask, computed)
        options: Any = {"denominator": denominator, "loss_type": args.loss_type, "kl_penalty": args.kl_penalty}
        options |= {"clip_eps": args.clip_eps, "clip_eps_high": args.clip_eps_high}
        # (B, T) each, in float64: exact, whatever dtype a model computes in
        old_logprobs, ref_logprobs = torch.zeros_like(engine_logprobs), torch.zeros_like(engine_logprobs)
        lr = common.scheduled_lr(step, run.learning_rate, args.warmup_steps, args.num_steps, args.lr_schedule)
        sums: Any = Counter()  # its update() adds
        total_loss, grad_norm = 0.0, 0.0
        sweeps = args.ppo_steps if learns else 1  # over the micro-batches
        for ppo_step in range(sweeps):
            for mb in micro_batches:
                inputs = (input_ids[mb], attention_mask[mb], loss_mask[mb], args.temperature)
                last = mb is micro_batches[-1]  # it synchronises the processes' gradients (DDP decides in forward)
                with nullcontext() if last else accelerator.no_sync(policy):
                    logprobs = common.token_logprobs(policy, *inputs)
                    if ppo_step == 0:
                        old_logprobs[mb] = logprobs.detach().double()
                    if ppo_step == 0 and reference is not None:
                        with torch.no_grad():
                            ref_logprobs[mb] = common.token_logprobs(reference, *inputs).double()
                    weights = None
                    if correction != "none":
                        log_ratio = (old_logprobs[mb] - engine_logprobs[mb]) * loss_mask[mb]
                        weights = importance_weights(log_ratio, correction, args.is_cap)
                    ref = None if reference is None else ref_logprobs[mb]
                    batch = (logprobs, old_logprobs[mb], advantages[mb[0]], loss_mask[mb])
                    loss, sums_of_pass = grpo_loss(*batch, ref_logprobs=ref, importance_weights=weights, **options)
                    common.backward(run, loss)
                sums.update(sums_of_pass)
                total_loss += loss.item()
            if ppo_step == 0:  # before anything is updated
                gap = common.check_gap(run, old_logprobs[computed], engine_logprobs[computed], loss_mask[computed])
            if learns:
                grad_norm += common.optimizer_step(run, step, lr, total_loss) / sweeps
        step_seconds = time.perf_counter() - started

        # 5. log: a pair is a sum and a count of this process
        trained, sampled = loss_mask[computed].sum(), sum(len(c.token_ids) for c in completions)
        metrics = gap | {name: (value, trained * sweeps) for name, value in sums.items()}
        metrics |= {
            "loss/total": (total_loss, sweeps / run.processes),  # each process has a share of it
            "reward/mean": (sum(scores), len(scores)),
            "reward/std": (rewards.std(dim=1).sum(), len(rewards)),
            "reward/zero_std_frac": ((~has_spread).sum(), len(rewards)),
            "completion/length_mean": (sampled, len(rows)),
            "completion/truncated_frac": (truncated.sum(), len(rows)),
            "policy/entropy": (-engine_logprobs.sum(), sampled),
            "policy/computed_frac": (trained, sampled),
            "optim/lr": lr,
            "optim/grad_norm": grad_norm,
            "time/rollout": rollout_seconds,
            "time/train": step_seconds - rollout_seconds,
            "time/step": step_seconds,
            "perf/tokens_per_second": (sampled, step_seconds / run.processes),
        }
        records = []  # some completions, for completions.jsonl
        for b, (row, text, score, c) in enumerate(zip(rows[:8], texts, scores, completions, strict=False)):
            prompt = train_dataset[row].prompt[-1]["content"]
            reason = "equal rewards in its group" if loss_mask[b].any() else "cut, and --mask-truncated is on"
            record = {"prompt": prompt, "completion": text, "reward": score, "advantage": advantages[b].item()}
            record |= {"finish_reason": c.finish_reason, "no_gradient": None if has_gradient[b] else reason}
            records.append(record)

        # 6. evaluate and save
        metrics |= run.evaluate(step, evaluator)
        run.log(step, metrics, records)
        run.save(step)
    run.say_dropped(prompts)
    run.finish()


if __name__ == "__main__":
    common.run(main, tyro.cli(Args))
