"""Environments: a prompt, an optional answer, and a reward. Datasets of them, and the grader for math answers.

An environment is the whole task: `prompt` is what the model sees, `get_reward` scores what it wrote, `get_target` is
what supervised fine-tuning imitates. A dataset is anything with `len` and `[]` that gives environments.
"""

import contextlib
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
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from chat import Message, UserError, check_messages, loading, shorten

BOXED = r"Put the final answer in \boxed{}."  # the one sentence that asks for the form the grader reads


@dataclass
class EnvBase:
    """One task. Subclass it and write `get_reward` to bring your own."""

    prompt: list[Message]  # chat messages: {"role": ..., "content": ...}
    answer: str | int | float | None = None

    def __post_init__(self) -> None:
        number: Any = self.answer
        if getattr(number, "ndim", None) == 0:  # of numpy or torch: with the digits that it has
            digits = {"float64": 17, "float32": 7}.get(str(number.dtype).rpartition(".")[2], 3)
            self.answer = float(f"{number.item():.{digits}g}") if isinstance(number.item(), float) else number.item()

    def get_reward(self, completion: str) -> float:
        """Score of a completion (its text, without the stop token). At least 1.0 counts as solved."""
        raise NotImplementedError(f"{type(self).__name__} has no get_reward")

    def get_target(self) -> str:
        """The assistant turn that supervised fine-tuning trains."""
        if self.answer is None:
            raise UserError("this environment has no answer to imitate: give it one, or write its get_target")
        return as_text(self.answer)


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


def rows_without_reward(dataset: Any) -> list[int]:
    return [i for i in range(len(dataset)) if type(dataset[i]).get_reward is EnvBase.get_reward]


def require_rewards(dataset: Any) -> None:
    if bare := rows_without_reward(dataset):
        raise UserError(f"row {bare[0]} has no reward: give the row an answer, or its environment a get_reward")


@dataclass
class MathEnv(EnvBase):
    r"""1.0 for the right answer in the last `\boxed{}`, 0.1 for a wrong one in it, 0.0 for no box or an empty one."""

    target: str | None = None  # a worked answer; None: the boxed answer alone

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.answer, (str, int, float)) or self.answer != self.answer:
            raise UserError(f"answer must be text or a number, not {self.answer!r}")
        if isinstance(self.answer, str) and "####" in self.answer:  # `... <<40+32=72>>72 clips in all.\n#### 72`
            solution, _, self.answer = (part.strip() for part in self.answer.rpartition("####"))
            worked = re.sub(r"<<.*?>>", "", solution)  # GSM8K's notes of a calculator
            self.target = self.target or f"{worked}\n\\boxed{{{self.answer}}}"

    def get_reward(self, completion: str) -> float:
        candidate = last_boxed(completion)
        if not (candidate and candidate.strip()):  # prompts say \boxed{}: an echo of that is no answer
            return 0.0
        return 1.0 if same_answer(candidate, as_text(self.answer)) else 0.1

    def get_target(self) -> str:
        return self.target if self.target is not None else f"\\boxed{{{as_text(self.answer)}}}"


# Grading: parsed, never evaluated, in time linear in the length of the text

BRACES = re.compile(r"\\boxed\s*\{|\\.|\{|\}", re.DOTALL)
DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
NUMBER = re.compile(rf"([+-]?)\s*({DECIMAL})(?:[eE]([+-]?\d{{1,3}})|\s*/\s*({DECIMAL}))?\s*%?\.?", re.ASCII)
LATEX_FRACTION = re.compile(r"([+-]?)\s*\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
LATEX_TEXT = re.compile(r"\\(?:text|mathrm|mathbf)\s*\{([^{}]*)\}")
UNIT = re.compile(r"\\(?:text|mathrm|mathbf)\s*\{[^{}\d]*\}(\^\{?\d\}?)?")
DRESS = [("\u2212", "-"), (r"\%", "%"), ("{,}", ","), (r"\dfrac", r"\frac"), (r"\tfrac", r"\frac")]
DRESS += [(r"\$", ""), ("$", ""), (r"\!", ""), (r"\,", " "), (r"\ ", " ")]
MAX_ANSWER_CHARS = 200  # int() of a long digit string takes quadratic time; no real answer is longer


def as_text(answer: Any) -> str:
    """A float with all its digits, as people write it: 0.00001, which `str` makes 1e-05."""
    return format(Decimal(str(answer)), "f") if isinstance(answer, float) else str(answer)


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
    r"""An answer without its LaTeX dress: `$`, `\$`, `\text{...}`, thin spaces, outer braces, the typographic minus."""
    answer = LATEX_TEXT.sub(r"\1", answer)
    for old, new in DRESS:
        answer = answer.replace(old, new)
    braces = re.fullmatch(r"\s*\{([^{}]*)\}\s*", answer)
    return (braces[1] if braces else answer).strip()


def parse_number(answer: str) -> Fraction | None:
    r"""Exact value of `72`, `72.`, `1,000`, `3/4`, `0.75`, `\frac{3}{4}`, `$72`; None if it is not one plain number."""
    if len(answer) > MAX_ANSWER_CHARS:
        return None
    answer = plain(UNIT.sub("", answer))
    if fraction := LATEX_FRACTION.fullmatch(answer):  # fullmatch: 1\frac{1}{2} must not become 11/2
        answer = f"{fraction[1]}{fraction[2].strip()}/{fraction[3].strip()}"
    match = NUMBER.fullmatch(answer)
    if match is None:
        return None
    numerator, denominator = (Fraction(digits.replace(",", "")) for digits in (match[2], match[4] or "1"))
    if denominator == 0:
        return None
    return numerator / denominator * Fraction(10) ** int(match[3] or 0) * (-1 if match[1] == "-" else 1)


def same_answer(candidate: str, answer: str) -> bool:
    """Equal as exact numbers if the reference answer is a number, else equal as text."""
    number = parse_number(answer)
    if number is not None:
        return parse_number(candidate) == number
    return "".join(plain(candidate).split()) == "".join(plain(answer).split())


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
    return is_held_out(f"{a} {b}")


def is_held_out(problem: str) -> bool:
    digest = hashlib.sha256(problem.encode()).digest()
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
        envs = load_reasoning_gym(name.removeprefix("reasoning_gym:"), split, num_samples or 200, seed)
    else:
        envs = load_hub("openai/gsm8k:main" if name == "gsm8k" else name, split)
    if envs is not None and not len(envs):
        raise UserError(f"{name}: no rows")
    return envs if envs is None or num_samples is None else [envs[i] for i in range(min(num_samples, len(envs)))]


def is_file(name: str) -> bool:
    """Whether the dataset is a file of the user's: it has one split."""
    return name.endswith((".jsonl", ".json", ".csv", ".parquet")) or ".py:" in name


def as_environments(dataset: Any, where: str) -> Any:
    """A sequence of environments as it is, rows as environments. Raises a UserError for anything else."""
    kinds, rows = set(), []
    with contextlib.suppress(Exception):  # of what is no sequence
        rows = [dataset[i] for i in range(len(dataset))]
        kinds = {next((kind for kind in (dict, EnvBase) if isinstance(row, kind)), None) for row in rows}
    if kinds not in ({dict}, {EnvBase}):
        raise UserError(f"{where} must be a sequence of at least one EnvBase, or of rows")
    return dataset if kinds == {EnvBase} else [row_to_env(row, f"{where}, row {i}") for i, row in enumerate(rows)]


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
    row = {name: value for name, value in row.items() if value is not None}  # a table fills its gaps with None
    answer, target = row.get("answer"), row.get("target", row.get("completion"))
    prompt = row.get("messages", row.get("prompt", row.get("question")))
    if prompt is None:
        share_gpt = ": rename it to messages, from to role (human: user, gpt: assistant) and value to content"
        raise UserError(f"{where}: neither messages nor prompt in {list(row)}" + share_gpt * ("conversations" in row))
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    prompt = check_messages(prompt, f"{where}: ")
    if "messages" in row and (answer is None or prompt[-1]["role"] == "assistant"):
        prompt = [m | {"weight": m.get("weight", 1)} if m["role"] == "assistant" else m for m in prompt]
        while prompt and not prompt[-1].get("weight"):  # nothing after the last turn that trains
            prompt.pop()
        if not prompt:
            raise UserError(f"{where}: messages has no assistant turn that trains")
        target = prompt.pop()["content"]
    if target is not None and not isinstance(target, str):
        raise UserError(f"{where}: target must be text, not {target!r}")
    try:
        return EnvBase(prompt, target) if answer is None else MathEnv(prompt, answer, target)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def load_hub(name: str, split: str) -> list[EnvBase] | None:
    import datasets  # here, not above: a second of start-up that most runs do not need

    path, _, config = name.partition(":")
    hint = " (a file is file.py:function, or file.jsonl)" if path.endswith(".py") else ""
    with loading(f"dataset {name}{hint}"):
        if is_file(path):
            splits: Any = datasets.load_dataset(Path(path).suffix[1:], data_files=path)
        else:
            splits = datasets.load_dataset(path, config or None)
    found = next((s for s in (["train"] if split == "train" else ["test", "validation"]) if s in splits), None)
    if found is None and split == "eval":
        return None
    if found is None:
        raise UserError(f"{name} has no train split, only {', '.join(map(str, splits))}")
    rows: Any = splits[found]
    if path == "openai/gsm8k":
        rows = [{"prompt": f"{row['question']} {BOXED}", "answer": row["answer"]} for row in rows]
    return [row_to_env(row, f"{name} {found} row {i}") for i, row in enumerate(rows)]


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
