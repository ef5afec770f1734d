"""Environments: a prompt, an optional answer, and a reward. Datasets of them, and the grader for math answers.

An environment is the whole task: `prompt` is what the model sees, `get_reward` scores what it wrote, `get_target` is
what supervised fine-tuning imitates. A dataset is anything with `len` and `[]` that gives environments.
"""

import functools
import hashlib
import inspect
import json
import math
import random
import re
import runpy
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

Message = dict[str, str]
ROLES = ("system", "developer", "user", "assistant", "tool")
BOXED = r"Put the final answer in \boxed{}."  # the one sentence that asks for the form the grader reads


class UserError(Exception):
    """The user's mistake: `common.run` prints it as one line and exits with code 2."""


@dataclass
class EnvBase:
    """One task. Subclass it and write `get_reward` to bring your own."""

    prompt: list[Message]  # chat messages: {"role": ..., "content": ...}
    answer: str | int | float | None = None

    def get_reward(self, completion: str) -> float:
        """Score of a completion (its text, without the stop token). At least 1.0 counts as solved."""
        raise NotImplementedError(f"{type(self).__name__} has no get_reward")

    def get_target(self) -> str:
        """The assistant turn that supervised fine-tuning trains."""
        if self.answer is None:
            raise UserError("this environment has no answer to imitate: give it one, or write its get_target")
        return str(self.answer)


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


def shorten(text: str, limit: int = 200) -> str:
    text = text.replace("\n", "\\n")
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


def rows_without_reward(dataset: Any) -> list[int]:
    return [i for i in range(len(dataset)) if type(dataset[i]).get_reward is EnvBase.get_reward]


def require_rewards(dataset: Any) -> None:
    if bare := rows_without_reward(dataset):
        raise UserError(f"row {bare[0]} has no reward: give the row an answer, or its environment a get_reward")


@dataclass
class MathEnv(EnvBase):
    r"""1.0 for the right answer in the last `\boxed{}`, 0.1 for a wrong one in it, 0.0 for no box or an empty one."""

    target: str | None = None  # a worked answer; None: the boxed answer alone

    def get_reward(self, completion: str) -> float:
        candidate = last_boxed(completion)
        if not (candidate and candidate.strip()):  # prompts say \boxed{}: an echo of that is no answer
            return 0.0
        return 1.0 if same_answer(candidate, str(self.answer)) else 0.1

    def get_target(self) -> str:
        return self.target if self.target is not None else f"\\boxed{{{self.answer}}}"


# Grading: parsed, never evaluated, in time linear in the length of the text

BRACES = re.compile(r"\\boxed\s*\{|\\.|\{|\}", re.DOTALL)
DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
NUMBER = re.compile(rf"([+-]?)\s*({DECIMAL})(?:\s*/\s*({DECIMAL}))?\.?", re.ASCII)
LATEX_FRACTION = re.compile(r"([+-]?)\s*\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
LATEX_TEXT = re.compile(r"\\(?:text|mathrm|mathbf)\s*\{([^{}]*)\}")
MAX_ANSWER_CHARS = 200  # int() of a long digit string takes quadratic time; no real answer is longer


def last_boxed(text: str) -> str | None:
    r"""Contents of the `\boxed{...}` that starts last and whose braces balance; None if there is none."""
    stack: list[tuple[bool, int]] = []  # (is a box, where its contents start) of the braces still open
    last = None
    for match in BRACES.finditer(text):
        token = match.group()
        if token == "}":
            if stack:
                is_box, start = stack.pop()
                if is_box and (last is None or start > last[0]):
                    last = (start, match.start())
        elif token[-1] == "{" and token != r"\{":
            stack.append((token != "{", match.end()))
    return None if last is None else text[last[0] : last[1]]


def plain(answer: str) -> str:
    r"""An answer without its LaTeX dress: `$`, `\$`, `\text{...}`, thin spaces, the typographic minus."""
    answer = LATEX_TEXT.sub(r"\1", answer)
    for old, new in ((r"\$", ""), ("$", ""), (r"\!", ""), (r"\,", " "), (r"\ ", " "), ("\u2212", "-")):
        answer = answer.replace(old, new)
    return answer.strip()


def parse_number(answer: str) -> Fraction | None:
    r"""Exact value of `72`, `72.`, `1,000`, `3/4`, `0.75`, `\frac{3}{4}`, `$72`; None if it is not one plain number."""
    if len(answer) > MAX_ANSWER_CHARS:
        return None
    answer = plain(answer)
    if fraction := LATEX_FRACTION.fullmatch(answer):  # fullmatch: 1\frac{1}{2} must not become 11/2
        answer = f"{fraction[1]}{fraction[2].strip()}/{fraction[3].strip()}"
    match = NUMBER.fullmatch(answer)
    if match is None:
        return None
    numerator, denominator = (Fraction(digits.replace(",", "")) for digits in (match[2], match[3] or "1"))
    if denominator == 0:
        return None
    return numerator / denominator * (-1 if match[1] == "-" else 1)


def same_answer(candidate: str, answer: str) -> bool:
    """Equal as exact numbers if the reference answer is a number, else equal as text."""
    number = parse_number(answer)
    return plain(candidate) == plain(answer) if number is None else parse_number(candidate) == number


OPERANDS = {"add": "+", "sub": "-", "mult": "*", "div": "/"}
EVAL_FRACTION = 5  # one problem in five belongs to the evaluation split


class MathDataset(torch.utils.data.Dataset):
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
        for pair in pairs:
            a, b = min_val + pair // width, min_val + pair % width
            if is_eval_problem(a, b, operand) == (split == "eval") and not (operand == "div" and b == 0):
                self.envs.append(math_problem(a, b, operand))
                if len(self.envs) == num_samples:
                    break
        if not self.envs:
            raise UserError(f"no {operand} problem of the {split} split from {min_val} to {max_val}: widen the range")

    def __len__(self) -> int:
        return len(self.envs)

    def __getitem__(self, index: int) -> MathEnv:
        return self.envs[index]


def is_eval_problem(a: int, b: int, operand: str) -> bool:
    if operand in ("add", "mult"):
        a, b = min(a, b), max(a, b)
    digest = hashlib.sha256(f"{a} {b}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % EVAL_FRACTION == 0


def math_problem(a: int, b: int, operand: str) -> MathEnv:
    answer = {"add": a + b, "sub": a - b, "mult": a * b, "div": Fraction(a, b or 1)}[operand]
    problem = f"{a} {OPERANDS[operand]} {b}" if b >= 0 else f"{a} {OPERANDS[operand]} ({b})"
    prompt = [{"role": "user", "content": f"What is {problem}? {BOXED}"}]
    return MathEnv(prompt, str(answer), target=f"{problem} = \\boxed{{{answer}}}")


def load_dataset(
    name: str, split: str = "train", *, num_samples: int | None = None, seed: int = 0, **ranges: int | str | None
) -> Any:
    """A sequence of `EnvBase` by name: `math`, `gsm8k`, a `.jsonl` path, `file.py:function`, `reasoning_gym:NAME`, a
    hub id (`id:config` names a configuration) or a local folder that `datasets` can read.

    `split` is train or eval; None comes back where there is no eval split, as in files. `num_samples` keeps the first
    rows (`math`, `reasoning_gym`: that many are made). `ranges`: min_val, max_val, operand of `math`.
    Raises a UserError for what is missing, malformed or empty, in one line that says where.
    """
    given: dict[str, Any] = {key: value for key, value in ranges.items() if value is not None}
    if name == "math":
        size = {} if num_samples is None else {"num_samples": num_samples}
        return MathDataset(**given, **size, seed=seed, split=split)
    if given:
        raise UserError(f"--min-val, --max-val and --operand are for --dataset math alone, not for {name}")
    if split == "eval" and is_file(name):
        return None
    if name.endswith(".jsonl"):
        envs = load_jsonl(Path(name))
    elif ".py:" in name:
        envs = load_python(name)
    elif name.startswith("reasoning_gym:"):
        return load_reasoning_gym(name.removeprefix("reasoning_gym:"), num_samples or 200, seed + (split == "eval"))
    else:
        envs = load_hub("openai/gsm8k:main" if name == "gsm8k" else name, split)
    if envs is not None and not len(envs):
        raise UserError(f"{name}: no rows")
    return envs if envs is None or num_samples is None else [envs[i] for i in range(min(num_samples, len(envs)))]


def load_splits(args: Any, train_dataset: Any, eval_dataset: Any) -> tuple[Any, Any]:
    """The datasets that the flags name, where the caller of `main` gave none. No evaluation: None."""
    ranges = {"min_val": args.min_val, "max_val": args.max_val, "operand": args.operand}
    if args.eval_steps > 0 and eval_dataset is None and (args.eval_dataset or train_dataset is None):
        name = args.eval_dataset or args.dataset
        # A file has one split: named as the evaluation set, its rows are the evaluation set.
        split = "train" if args.eval_dataset and is_file(name) else "eval"
        own = ranges if name in ("math", args.dataset) else {}
        eval_dataset = load_dataset(name, split, num_samples=args.eval_samples, seed=args.seed, **own)
        if eval_dataset is None and args.eval_dataset:
            raise UserError(f"--eval-dataset {name} has neither a test nor a validation split")
    if train_dataset is None:
        train_dataset = load_dataset(args.dataset, num_samples=args.num_samples, seed=args.seed, **ranges)
    return train_dataset, eval_dataset if args.eval_steps > 0 else None


@functools.lru_cache(maxsize=2)
def permutation(size: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed} {epoch}").sample(range(size), size)


def data_order(size: int, seed: int, start: int, count: int) -> list[int]:
    """Rows at `count` positions from `start` in the endless sequence of seeded permutations of a dataset; no state."""
    return [permutation(size, seed, position // size)[position % size] for position in range(start, start + count)]


def is_file(name: str) -> bool:
    """Whether the dataset is a file of the user's: it has one split."""
    return name.endswith(".jsonl") or ".py:" in name


def load_jsonl(path: Path) -> list[EnvBase]:
    if not path.is_file():
        raise UserError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    envs = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line.decode("utf-8-sig"))
                json.dumps(row, ensure_ascii=False).encode()  # fails for half of a surrogate pair
            except (ValueError, RecursionError) as error:  # bad JSON and bad UTF-8 alike
                raise UserError(f"{path}:{number}: not a line of JSON ({error})") from None
            envs.append(row_to_env(row, f"{path}:{number}"))
    return envs


def row_to_env(row: Any, where: str) -> EnvBase:
    """One row with `messages`, or a prompt (`prompt` or `question`) with `answer` (graded) or `target` (imitated)."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be an object with messages, or prompt and answer")
    if "messages" in row:
        messages = check_messages(row["messages"], where)
        while messages and messages[-1]["role"] != "assistant":  # nothing after the last assistant turn trains
            messages.pop()
        if not messages:
            raise UserError(f"{where}: messages has no assistant turn")
        return EnvBase(messages[:-1], messages[-1]["content"])
    prompt = row.get("prompt", row.get("question"))
    if prompt is None:
        share_gpt = ": rename it to messages, from to role (human: user, gpt: assistant) and value to content"
        raise UserError(f"{where}: neither messages nor prompt in {list(row)}" + share_gpt * ("conversations" in row))
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    prompt = check_messages(prompt, where)
    answer, target = row.get("answer"), row.get("target", row.get("completion"))
    if answer is not None and (not isinstance(answer, (str, int, float)) or answer != answer):
        raise UserError(f"{where}: answer must be text or a number, not {answer!r}")
    if target is not None and not isinstance(target, str):
        raise UserError(f"{where}: target must be text, not {target!r}")
    return EnvBase(prompt, target) if answer is None else MathEnv(prompt, answer, target)


def check_messages(messages: Any, where: str) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: messages must be a list with at least one message")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise UserError(f"{where}: each message must be an object with content and a role of {', '.join(ROLES)}")
        more = [key for key, value in message.items() if value and key not in ("role", "content", "name")]
        if message["role"] == "assistant" and more:
            raise UserError(f"{where}: an assistant message has {', '.join(more)}: write it into content, or drop it")
    try:
        return with_text_content(messages)
    except (TypeError, KeyError):
        raise UserError(f"{where}: the content of each message must be text, or a list of text parts") from None


def with_text_content(messages: list[dict[str, Any]]) -> list[Message]:
    """Contents that are lists of parts, `{"type": "text", "text": ...}`, as one text. Raises TypeError or KeyError."""
    whole = [m["content"] if isinstance(m["content"], list) else [{"text": m["content"]}] for m in messages]
    return [m | {"content": "".join([p["text"] for p in parts])} for m, parts in zip(messages, whole, strict=True)]


def load_hub(name: str, split: str) -> list[EnvBase] | None:
    import datasets  # here, not above: a second of start-up that most runs do not need

    path, _, config = name.partition(":")
    try:
        splits = datasets.load_dataset(path, config or None)
    except Exception as error:  # the library raises a dozen types, the network's and the parsers' among them
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        hint = "; a file is file.py:function, or file.jsonl" * (Path(path).suffix in (".py", ".json"))
        raise UserError(f"cannot load dataset {name}: {reason}{hint}") from None
    found = next((s for s in (["train"] if split == "train" else ["test", "validation"]) if s in splits), None)
    if found is None and split == "eval":
        return None
    if found is None:
        raise UserError(f"{name} has no train split, only {', '.join(map(str, splits))}")
    make = gsm8k_env if path == "openai/gsm8k" else row_to_env
    return [make(row, f"{name} {found} row {i}") for i, row in enumerate(splits[found])]


def gsm8k_env(row: Any, where: str) -> MathEnv:
    """`... <<40+32=72>>72 clips in all.\n#### 72`: the answer stands after ####, the <<...>> are calculator notes."""
    solution, mark, answer = row["answer"].rpartition("####")
    if not mark:
        raise UserError(f"{where}: no #### before the answer")
    worked = re.sub(r"<<.*?>>", "", solution).strip()
    prompt = [{"role": "user", "content": f"{row['question']} {BOXED}"}]
    return MathEnv(prompt, answer.strip(), target=f"{worked}\n\\boxed{{{answer.strip()}}}")


def load_python(name: str) -> Any:
    """Calls `function()` of `file.py`; it returns a dataset of environments."""
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    make = runpy.run_path(path).get(function)
    envs = make() if callable(make) else None
    if not (hasattr(envs, "__len__") and len(envs) and isinstance(envs[0], EnvBase)):
        raise UserError(f"{name} must be a function that returns a sequence of at least one EnvBase")
    return envs


@dataclass
class ReasoningGymEnv(EnvBase):
    """A procedural task of the `reasoning-gym` package, scored by its own grader, from 0 to 1."""

    task: Any = None  # the package's dataset
    entry: Any = None  # and one of its entries

    def get_reward(self, completion: str) -> float:
        return float(self.task.score_answer(last_boxed(completion), self.entry))


def load_reasoning_gym(name: str, size: int, seed: int) -> list[EnvBase]:
    try:
        import reasoning_gym  # ty: ignore

        task = reasoning_gym.create_dataset(name, size=size, seed=seed)
    except ImportError:
        raise UserError("reasoning_gym:NAME needs the package: pip install reasoning-gym") from None
    except ValueError as error:
        raise UserError(f"reasoning_gym:{name}: {error}") from None
    # Some graders run the model's answer as Python code. A completion must never be executed.
    source = Path(inspect.getfile(type(task))).read_text() if "score_answer" in vars(type(task)) else ""
    if re.search(r"\b(eval|exec|parse_expr|sympify)\(", source):
        raise UserError(f"reasoning_gym:{name} is refused: its grader may evaluate the model's answer as code")
    prompts = [[{"role": "user", "content": f"{entry['question']}\n{BOXED}"}] for entry in task]
    return [ReasoningGymEnv(p, entry["answer"], task, entry) for p, entry in zip(prompts, task, strict=True)]
