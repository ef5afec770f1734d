"""Environments: a prompt, an optional answer, and a reward. Datasets of them, from rows as people have them.

An environment is the whole task: `prompt` is what the model sees, `get_reward` scores what it wrote, `get_target` is
what supervised fine-tuning imitates. A dataset is anything with `len` and `[]` that gives environments.
"""

import contextlib
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import random
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Dataset, Subset

from chat import Message, UserError, check_messages, check_tools, encode_prompt, from_json, has_parts, loading, shorten
from grading import MATH_WORKER, after_thinking, as_text, last_boxed, parse_number, same_answer
from tables import LOOK, Encoded, Rows, load_files, row_of, undecoded, without_none

BOXED = r"Put the final answer in \boxed{}."  # the one sentence that asks for the form the grader reads


@dataclass
class EnvBase:
    """One task. Subclass it and write `get_reward` to bring your own."""

    prompt: list[Message]  # chat messages: {"role": ..., "content": ...}
    answer: Any = None  # text, a number, or the assistant's message to imitate
    template_args: dict[str, Any] = field(default_factory=dict, kw_only=True)  # of the chat template: tools, ...

    def __post_init__(self) -> None:
        number: Any = self.answer
        if getattr(number, "ndim", None) == 0:  # of numpy or torch: with the digits that it has
            digits = {"float64": 17, "float32": 7}.get(str(number.dtype).rpartition(".")[2], 3)
            self.answer = float(f"{number.item():.{digits}g}") if isinstance(number.item(), float) else number.item()

    def get_reward(self, completion: str) -> float:
        """Score of a completion (its text, without the stop token). At least 1.0 counts as solved."""
        raise NotImplementedError(f"{type(self).__name__} has no get_reward")

    def get_target(self) -> str | Message:
        """The assistant turn that supervised fine-tuning trains: its text, or a message."""
        if self.answer is None:
            raise UserError("this environment has no answer to imitate: give it one, or write its get_target")
        return self.answer if isinstance(self.answer, dict) else as_text(self.answer)


def score(env: EnvBase, text: str) -> float:
    """The reward of a completion. Raises a UserError that names both, if it fails or is no finite number."""
    name, where = f"{type(env).__name__}.get_reward", f"for the completion {shorten(text)!r}"
    try:
        reward = env.get_reward(text)
    except BaseException as error:  # also of what would end the process, such as SystemExit
        if isinstance(error, KeyboardInterrupt):
            raise
        raise UserError(f"{name} raised {type(error).__name__}: {shorten(str(error))} {where}") from error
    if inspect.iscoroutine(reward):
        reward.close()
    with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):
        if not isinstance(reward, (str, bytes, complex)) and math.isfinite(number := float(reward)):
            return number
    raise UserError(f"{name} gave {shorten(repr(reward))} {where}: it must be a finite number")


def score_all(environments: Sequence[EnvBase], texts: Sequence[str]) -> list[float]:
    return [score(env, text) for env, text in zip(environments, texts, strict=True)]


def has_reward(env: EnvBase) -> bool:
    return type(env).get_reward is not EnvBase.get_reward


def some_rewards(dataset: Any) -> bool:
    """Whether one of the rows that are looked at has a reward."""
    return any(has_reward(dataset[i]) for i in range(min(len(dataset), LOOK)))


def require_rewards(dataset: Any) -> None:
    if len(dataset) and not some_rewards(dataset):
        raise UserError("none of the rows has a reward: give rows an answer, or their environments a get_reward")


def encode_prompts(dataset: Any, tokenizer: Any, context: int, args: Any, graded: bool = True) -> Encoded:
    """Prompts of at most --max-prompt-length tokens, or what a context, or vLLM's, leaves beside --max-new-tokens.

    Others are left out, and with `graded` those of environments without a reward.
    """
    asked = json.loads(args.vllm_args).get("max_model_len")
    context = min(context, asked) if isinstance(asked, int) and asked > 0 else context
    longest = min(context - args.max_new_tokens, getattr(args, "max_prompt_length", None) or context)
    if longest < 1:
        raise UserError(f"--max-new-tokens {args.max_new_tokens} leaves nothing of a context of {context:,} tokens")

    def encode(env: EnvBase) -> list[int]:
        ids = encode_prompt(tokenizer, env.prompt, **env.template_args)
        if len(ids) > longest:
            raise UserError(f"a prompt of more than {longest:,} tokens")
        if graded and not has_reward(env):
            raise UserError("no reward, for want of an answer")
        return ids

    return Encoded(dataset, encode)


@dataclass
class MathEnv(EnvBase):
    r"""1.0 for the right answer in the last `\boxed{}` after the thinking, 0.1 for a wrong one, 0.0 for none there."""

    target: str | Message | None = None  # a worked answer; None: the boxed answer alone

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.answer, (str, int, float)) or self.answer != self.answer:
            raise UserError(f"answer must be text or a number, not {self.answer!r}")
        if isinstance(self.answer, str) and "####" in self.answer:  # `... <<40+32=72>>72 clips in all.\n#### 72`
            solution, _, self.answer = (part.strip() for part in self.answer.rpartition("####"))
            worked = re.sub(r"<<.*?>>", "", solution)  # GSM8K's notes of a calculator
            self.target = self.target or f"{worked}\n\\boxed{{{self.answer}}}"
        if isinstance(self.answer, str) and (boxed := last_boxed(self.answer)):  # a worked solution
            self.answer, self.target = boxed, self.target or self.answer

    def get_reward(self, completion: str) -> float:
        candidate = last_boxed(after_thinking(completion))
        if not (candidate and candidate.strip()):  # prompts say \boxed{}: an echo of that is no answer
            return 0.0
        return 1.0 if same_answer(candidate, as_text(self.answer)) else 0.1

    def get_target(self) -> str | Message:
        return self.target if self.target is not None else f"\\boxed{{{as_text(self.answer)}}}"


def grader_note(dataset: Any) -> str:
    """A line for the start of a run that has answers in LaTeX, or others that are no numbers, but no Math-Verify."""
    envs = (dataset[i] for i in range(min(LOOK, len(dataset))))
    text = any(isinstance(env, MathEnv) and parse_number(as_text(env.answer)) is None for env in envs)
    note = "answers that are no numbers are compared as text: pip install math-verify compares them as mathematics"
    return note if text and not MATH_WORKER.ask("x", "x") else ""


OPERANDS = {"add": "+", "sub": "-", "mult": "*", "div": "/"}


class MathDataset(Dataset):
    """Distinct problems `a + b`, at most `num_samples`, both operands from `min_val` to `max_val`, ends included.

    `operand` is add, sub, mult or div, whose answers are fractions in lowest terms: `7/3`. Train and eval share no
    problem: a hash of the operands decides, the same for a + b and b + a, whatever the seed and the range.
    Raises a UserError for values that leave no problem.
    """

    def __init__(
        self,
        num_samples: int = 2000,
        min_val: int = 0,
        max_val: int = 50,
        operand: str = "add",
        seed: int = 0,
        split: str = "train",
    ):
        if operand not in OPERANDS:
            raise UserError(f"unknown operand {operand!r}: choose one of {', '.join(OPERANDS)}")
        if split not in ("train", "eval"):
            raise UserError(f"unknown split {split!r}: choose train or eval")
        if num_samples < 1:
            raise UserError(f"num_samples is {num_samples}: it must be at least 1")
        if not 0 <= max_val - min_val < 3 * 10**9:  # the pairs of operands are numbered in 64 bits
            raise UserError(f"operands from {min_val} to {max_val}: min_val is above max_val, or the range too wide")
        width = max_val - min_val + 1
        # A sample of a range needs no memory for the range. Only one pair in five is an eval problem: draw with room.
        pairs = random.Random(seed).sample(range(width**2), min(width**2, 10 * num_samples + 200))
        self.envs: list[MathEnv] = []
        for a, b in ((min_val + pair // width, min_val + pair % width) for pair in pairs):
            problem = f"{min(a, b)} {max(a, b)}" if operand in ("add", "mult") else f"{a} {b}"
            own = is_held_out(problem) == (split == "eval") and not (operand == "div" and b == 0)
            if own and len(self.envs) < num_samples:
                self.envs.append(math_problem(a, b, operand))
        if not self.envs:
            raise UserError(f"no {operand} problem of the {split} split from {min_val} to {max_val}: widen the range")

    def __len__(self) -> int:
        return len(self.envs)

    def __getitem__(self, index: int) -> MathEnv:
        return self.envs[index]


def is_held_out(problem: str) -> bool:
    return int.from_bytes(hashlib.sha256(problem.encode()).digest()[:8], "big") % 5 == 0  # one in five


def math_problem(a: int, b: int, operand: str) -> MathEnv:
    answer = {"add": a + b, "sub": a - b, "mult": a * b, "div": Fraction(a, b or 1)}[operand]
    problem = f"{a} {OPERANDS[operand]} {b}" if b >= 0 else f"{a} {OPERANDS[operand]} ({b})"
    prompt = [{"role": "user", "content": f"What is {problem}? {BOXED}"}]
    return MathEnv(prompt, str(answer), target=f"{problem} = \\boxed{{{answer}}}")


# Datasets by name


def load_dataset(
    name: str,
    split: str = "train",
    *,
    part: str | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    **ranges: int | str | None,
) -> Any:
    """A sequence of `EnvBase` by name: `math`, `gsm8k`, files (.jsonl, .json, .csv, .parquet, or a pattern of them),
    `file.py:function`, `reasoning_gym:NAME`, a hub id (`id:config` names a configuration), a local folder that
    `datasets` can read, or several with their weights: `a.jsonl:0.7,b.parquet:0.3`.

    `split` is train or eval; None comes back where there is no eval split, as in files; own: eval, but all of a file.
    `part` names one as `datasets` does: `train[:1000]`. `num_samples` keeps the first rows (`math`, `reasoning_gym`:
    that many are made). `ranges`: min_val, max_val, operand of `math`.
    Raises a UserError for what is missing, malformed or empty, in one line that says where.
    """
    given: dict[str, Any] = {key: value for key, value in ranges.items() if value is not None}
    if given and name != "math":
        raise UserError(f"--min-val, --max-val and --operand are for --dataset math alone, not for {name}")
    if part and (name == "math" or name.startswith("reasoning_gym:")):
        raise UserError(f"{part} is no split of {name}, which makes its own")
    if name == "math":
        split = "eval" if split == "own" else split
        size = {} if num_samples is None else {"num_samples": num_samples}
        return MathDataset(**given, **size, seed=seed, split=split)
    weighted = [re.fullmatch(r"\s*(.+):(\d*\.?\d+)\s*", piece) for piece in name.split(",")]
    if len(weighted) > 1 and all(weighted):
        names, weights = zip(*(match.groups() for match in weighted if match), strict=True)
        parts = [load_dataset(each, split, part=part, seed=seed) for each in names]
        if None in parts:
            return None
        mixed = mix(parts, [float(weight) for weight in weights])
        return mixed if num_samples is None else Subset(mixed, range(len(mixed))[:num_samples])
    if split == "own":
        split = "train" if is_file(name) else "eval"
    elif split == "eval" and part is None and is_file(name):
        return None
    wanted, read = ["train"] if split == "train" else ["test", "validation"], None
    if ".py:" in name:
        splits = {"train": load_python(name)}
    elif is_file(name):
        splits = {"train": load_files(name, row_to_env)}
    elif name.startswith("reasoning_gym:"):
        splits = {wanted[0]: load_reasoning_gym(name.removeprefix("reasoning_gym:"), split, num_samples or 200, seed)}
    else:
        splits, read = load_hub("openai/gsm8k:main" if name == "gsm8k" else name)
    if part:
        wanted = [part.partition("[")[0]]
    found = next((each for each in wanted if each in splits), None)
    if found is None and part is None and split == "eval":
        return None
    if found is None:
        raise UserError(f"{name} has no split {wanted[0]}, only {', '.join(map(str, splits))}")
    envs: Any = splits[found]
    if read:
        envs = Rows(envs, row_to_env, functools.partial(row_of, f"{name} {found}"), read)
    rows = np.arange(len(envs))
    if part and "[" in part:
        import datasets  # here, not above: a second of start-up that most runs do not need

        with loading(f"the split {part}"):
            pieces = datasets.ReadInstruction.from_spec(part).to_absolute({found: len(envs)})
            rows = np.concatenate([rows[piece.from_ : piece.to] for piece in pieces])
    kept: Any = rows[:num_samples]
    if not len(kept):
        raise UserError(f"{name}: no rows")
    return envs if len(kept) == len(envs) else Subset(envs, kept)


def is_file(name: str) -> bool:
    """Whether the dataset is a file of the user's, or several: it has one split."""
    return name.endswith((".jsonl", ".json", ".csv", ".parquet")) or ".py:" in name


def mix(parts: list[Any], weights: list[float]) -> Any:
    """Several datasets as one. Each is in it whole, and more than once where its weight asks for more rows."""
    if min(weights) <= 0 or sum(weights) > 1e6 * min(weights):
        raise UserError(f"weights of datasets must be above 0, and not a million times another: {weights}")
    size = max(len(part) / weight for part, weight in zip(parts, weights, strict=True))
    counts = [max(round(size * weight), len(part)) for part, weight in zip(parts, weights, strict=True)]
    repeated = []
    for part, count in zip(parts, counts, strict=True):
        rows: Any = np.arange(count) % len(part)
        repeated.append(Subset(part, rows))
    return ConcatDataset(repeated)


def as_environments(dataset: Any, where: str) -> Any:
    """A sequence of environments as it is, rows as environments. Raises a UserError for anything else."""
    kinds: Any = set()
    try:
        first = [dataset[i] for i in range(min(len(dataset), LOOK))]
        kinds = {next((kind for kind in (dict, EnvBase) if isinstance(row, kind)), None) for row in first}
    except UserError:
        raise
    except Exception:  # it is no sequence
        kinds = set()
    if kinds not in ({dict}, {EnvBase}):
        raise UserError(f"{where} must be a sequence of at least one EnvBase, or of rows")
    read = without_none if hasattr(dataset, "features") else None  # Arrow fills gaps, also in what it is given
    return dataset if kinds == {EnvBase} else Rows(dataset, row_to_env, functools.partial(row_of, where), read)


SHARE_GPT = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}


def from_share_gpt(message: Any) -> Any:
    """{"from", "value"} as {"role", "content"}."""
    if not isinstance(message, dict) or not isinstance(message.get("from"), str):
        return message
    sender, key = message["from"], "tool_calls" if message["from"] == "function_call" else "content"
    more = {name: value for name, value in message.items() if name not in ("from", "value")}
    return more | {"role": SHARE_GPT.get(sender, sender), key: message.get("value")}


def row_to_env(row: Any, unread: set[str] | None = None) -> EnvBase:
    """The environment of a row: a conversation, or a prompt with what is graded, imitated, or both.

    `unread` gets the names of columns that nothing reads. Raises a UserError for what is malformed.
    """
    if not isinstance(row, dict):
        raise UserError("a row must be an object with messages, or prompt and answer")
    row, columns = {name: value for name, value in row.items() if value is not None}, list(row)

    def take(*names: str) -> Any:
        return next((row.pop(name) for name in names if name in row), None)

    messages = from_json(take("messages", "conversations"))
    if isinstance(messages, str):
        raise UserError(f"messages must be a list, not {shorten(messages)!r}")
    prompt = take("prompt", "question", "problem", "instruction", "input") if messages is None else messages
    system, tools, template_args = take("system"), take("tools"), from_json(take("chat_template_kwargs") or {})
    if not isinstance(template_args, dict) or template_args.keys() & {"messages", "conversation", "tokenize"}:
        raise UserError(f"chat_template_kwargs must be an object of arguments, not {template_args!r}")
    template_args = dict(template_args)  # the row stays as it is
    tools = tools or template_args.pop("tools", None)
    if prompt is None:
        raise UserError(f"neither messages nor prompt, question, problem or instruction in {columns}")
    listed = from_json(prompt)  # a table may keep messages as JSON text
    if isinstance(listed, list) and all(isinstance(message, dict) for message in listed):
        prompt = listed
    if isinstance(prompt, str):
        more = take("input", "context")  # of an instruction
        prompt = [{"role": "user", "content": f"{prompt}\n\n{more}" if more else prompt}]
    if isinstance(prompt, list):
        prompt = [from_share_gpt(message) for message in prompt]
    prompt = check_messages([{"role": "system", "content": system}, *prompt] if system else prompt)
    answer = from_json(row.pop("reward_model")) if "reward_model" in row else take("answer", "ground_truth", "solution")
    given = answer is not None
    if isinstance(answer, dict):
        answer = answer.get("ground_truth")
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if given and answer in (None, ""):
        raise UserError("the answer is empty")
    target = take("target", "completion", "response", "output", "solution")
    if unread is not None:
        unread.update(row)
    if isinstance(target, list):  # messages; of the prompt's nothing trains
        prompt = [{"weight": 0} | message if message["role"] == "assistant" else message for message in prompt]
        messages = prompt = prompt + check_messages(target)
    if messages and (answer is None or prompt[-1]["role"] == "assistant"):
        prompt = [{"weight": 1} | message if message["role"] == "assistant" else message for message in prompt]
        while prompt and not prompt[-1].get("weight"):  # nothing after the last turn that trains
            prompt.pop()
        if not prompt:
            raise UserError("messages has no assistant turn that trains")
        target = prompt.pop()
        target = target if has_parts(target) else target["content"]
    if not isinstance(target, (str, dict, type(None))):
        raise UserError(f"target must be text, not {target!r}")
    template_args |= {"tools": check_tools(tools)} if tools else {}
    if answer is None:
        return EnvBase(prompt, target, template_args=template_args)
    return MathEnv(prompt, answer, target, template_args=template_args)


def load_hub(name: str) -> tuple[dict[str, Any], Any]:
    """The splits of a dataset of the hub, or of a folder, as tables; and what makes a row of one of theirs."""
    import datasets

    path, _, config = name.partition(":")
    hint = " (a file is file.py:function, or file.jsonl)" if path.endswith(".py") else ""
    with loading(f"dataset {name}{hint}"):
        saved = any((Path(path) / file).exists() for file in ("dataset_info.json", "dataset_dict.json"))
        splits: Any = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, config or None)
    splits = splits if isinstance(splits, dict) else {"train": splits}
    splits = {split: undecoded(table) for split, table in splits.items()}
    return splits, gsm8k_row if path == "openai/gsm8k" else without_none


def gsm8k_row(row: dict[str, str]) -> dict[str, str]:
    return {"prompt": f"{row['question']} {BOXED}", "answer": row["answer"]}


def load_python(name: str) -> Any:
    """Calls `function()` of `file.py`, a module like any other; it returns a dataset of environments, or rows."""
    path, _, function = name.rpartition(":")
    file = Path(path).resolve()
    if not file.is_file() or "." in file.stem:
        raise UserError(f"{path}: no such file, or a dot in its name, which a module can't have")
    for own in file.parent.glob("*.py"):  # it and its neighbours, which it may import
        taken: Any = sys.modules.get(own.stem) or (importlib.util.find_spec(own.stem) if own == file else None)
        if taken and Path(getattr(taken, "__file__", getattr(taken, "origin", None)) or "").resolve() != own:
            raise UserError(f"{own}: there is a module {own.stem} already: rename the file")
    try:
        sys.path.insert(0, str(file.parent))
        dataset = getattr(importlib.import_module(file.stem), function)()
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        words = f"{type(error).__name__}: {shorten(str(error))} ({line.filename}:{line.lineno})"
        raise UserError(f"{name} raised {words}") from error
    return as_environments(dataset, f"what {name} returns")


@dataclass
class ReasoningGymEnv(EnvBase):
    """A procedural task of the `reasoning-gym` package, scored by its own grader, from 0 to 1."""

    task: Any = None  # the package's dataset
    entry: Any = None  # and one of its entries

    def get_reward(self, completion: str) -> float:
        return float(self.task.score_answer(last_boxed(completion), self.entry))

    def get_target(self) -> str:
        return f"\\boxed{{{self.answer}}}"


def load_reasoning_gym(name: str, split: str, size: int, seed: int) -> list[EnvBase]:
    """Problems of that split: as in `math` a hash decides, here of the question, whatever the seed."""
    with loading(f"reasoning_gym:{name} (pip install reasoning-gym)"):
        import reasoning_gym  # ty: ignore

        # The package draws problem i from seed + i.
        task = reasoning_gym.create_dataset(name, size=10 * size + 200, seed=seed * 10**7)
    # Some graders run the model's answer as Python code. A completion must never be executed.
    source = Path(inspect.getfile(type(task))).read_text() if "score_answer" in vars(type(task)) else ""
    if re.search(r"\b(eval|exec|parse_expr|sympify)\(", source):
        raise UserError(f"reasoning_gym:{name} is refused: its grader may evaluate the model's answer as code")
    entries = (task[i] for i in range(len(task)))
    own = itertools.islice((e for e in entries if is_held_out(e["question"]) == (split == "eval")), size)
    made = [([{"role": "user", "content": f"{e['question']}\n{BOXED}"}], e) for e in own]
    return [ReasoningGymEnv(prompt, entry["answer"], task, entry) for prompt, entry in made]
