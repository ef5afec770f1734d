"""Grading is exact, bounded in time and never evaluates; splits are disjoint; bad rows are refused in one line."""

import json
import math
import re
import time
from fractions import Fraction

import pytest
import torch

import common
import envs
import grpo
from envs import EnvBase, MathDataset, MathEnv, UserError, last_boxed, load_dataset, parse_number


def reward(answer, completion):
    return MathEnv([], answer).get_reward(completion)


NUMBERS = r"1e3 is 1000; 7.2e1 is 72; 1e-05 is 1/100000; {72} is 72; 50\% is 50; 10{,}000 is 10000; "
NUMBERS += r"72\text{ cm} is 72; 72\ \text{cm}^2 is 72; 1,000 is 1000; 1,234,567.50 is 1234567.5; "
NUMBERS += r"3/4 is 3/4; 0.75 is 3/4; .75 is 3/4; - 3 / 4 is -3/4; -0 is 0"
NUMBERS += r"; \frac{3}{4} is 3/4; -\dfrac{3}{ 4 } is -3/4; \text{ 5 } is 5; 72. is 72; 72.00 is 72;  72  is 72"
NUMBERS += r"; $72 is 72; \$72 is 72; $72$ is 72; 144/2 is 72; +72 is 72; " + "\u22125 is -5"
NO_NUMBERS = r"1,00; 7 2; 1\frac{1}{2}; 3/0; 1e; 72 apples; nan; 2**3; __import__('os'); " + "\u0661; "


@pytest.mark.parametrize("case", f"{NUMBERS}; {NO_NUMBERS}".split("; "))
def test_numbers_are_read_exactly_and_nothing_else_is(case):
    text, is_number, value = case.partition(" is ")
    assert parse_number(text) == (Fraction(value) if is_number else None)


BOXES = {r"\boxed{1} then \boxed{2}": "2", r"\boxed{\frac{1}{2}}": r"\frac{1}{2}", r"\boxed{5} and \boxed{6": "5"}
BOXES |= {r"} \boxed{5}": "5", r"{ \boxed{5}": "5", r"\boxed {5}": "5", r"\boxed{\boxed{5}}": "5"}
BOXES |= {r"\boxed{\{5\}}": r"\{5\}", r"\boxed{": None, "boxed{5}": None, "72": None, "": None}


@pytest.mark.parametrize("completion", BOXES)
def test_last_box_with_balanced_braces_counts(completion):
    assert last_boxed(completion) == BOXES[completion]


def test_reward_levels():
    assert reward("72", r"\boxed{72}") == 1.0
    assert reward("72", r"\boxed{71}") == 0.1
    assert reward("72", r"\boxed{}") == reward("72", r"\boxed{ }") == 0.0  # an echo of the prompt
    assert reward("72", "72") == 0.0
    assert reward(0.75, r"\boxed{3/4}") == 1.0
    assert reward("Paris", r"\boxed{ \text{Paris} }") == 1.0
    assert reward("Paris", r"\boxed{London}") == 0.1


HOSTILE = {
    "digits": r"\boxed{" + "9" * 1_000_000 + "}",
    "powers": r"\boxed{9**9**9**9} \boxed{1e999999999}",
    "open boxes": r"\boxed{" * 100_000,
    "nested boxes": r"\boxed{" * 100_000 + "}" * 100_000,
    "spaces": r"\boxed" + " " * 1_000_000,
    "text": r"\boxed{" + r"\text{" * 100_000 + "}" * 100_001,
    "fractions": r"\boxed{" + r"\frac{1}{2}" * 100_000 + "}",
    "code": r"\boxed{__import__('os').system('touch hacked')}",
    "nul": "\\boxed{\x00\ud800}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_are_wrong_and_quick(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.perf_counter()
    assert reward("72", HOSTILE[name]) < 1.0
    assert reward("some text", HOSTILE[name]) < 1.0
    assert time.perf_counter() - start < 5  # measured: 0.6 s on one core at worst
    assert not list(tmp_path.iterdir())


def operands(env):
    """a, sign and b of a problem, read from its worked answer."""
    return re.match(r"(-?\d+) ([-+*/]) \(?(-?\d+)\)? = \\boxed", env.get_target()).groups()


@pytest.mark.parametrize("operand", ["add", "sub", "mult", "div"])
def test_math_targets_are_right_and_splits_share_no_problem(operand):
    train, evaluation = (MathDataset(5000, -5, 15, operand, split=split) for split in ("train", "eval"))

    def problems(dataset):
        pairs = [(int(a), int(b)) for a, _, b in map(operands, dataset)]
        return {pair if operand in ("sub", "div") else tuple(sorted(pair)) for pair in pairs}

    assert not problems(train) & problems(evaluation)
    assert len(train) + len(evaluation) == (21 * 20 if operand == "div" else 21 * 21)  # nothing lost, nothing twice
    assert 0.1 < len(evaluation) / (len(train) + len(evaluation)) < 0.3
    for env in [train[i] for i in range(50)]:
        a, sign, b = operands(env)
        exact = {"+": lambda x, y: x + y, "-": lambda x, y: x - y, "*": lambda x, y: x * y, "/": lambda x, y: x / y}
        assert Fraction(env.answer) == exact[sign](Fraction(a), Fraction(b))
        assert env.get_reward(env.get_target()) == 1.0
        assert env.prompt[0]["content"].startswith(f"What is {env.get_target().split(' =')[0]}?")
        assert "boxed" in env.prompt[0]["content"]


def test_math_dataset_is_seeded_and_sized():
    first, again, other = (MathDataset(50, seed=seed) for seed in (3, 3, 4))
    assert [e.prompt for e in first] == [e.prompt for e in again] != [e.prompt for e in other]
    assert len(MathDataset()) == 2000
    assert len(MathDataset(500, split="eval")) == 500  # enough held-out problems in the default range
    assert len(MathDataset(5, 0, 10**9)) == 5  # a huge range costs no memory


IMPOSSIBLE = [{"operand": "pow"}, {"min_val": 5, "max_val": 4}, {"max_val": 10**12}, {"num_samples": 0}]
IMPOSSIBLE += [{"split": "test"}, {"min_val": 0, "max_val": 0, "operand": "div"}]


@pytest.mark.parametrize("arguments", IMPOSSIBLE)
def test_impossible_math_datasets_are_refused(arguments):
    with pytest.raises(UserError):
        MathDataset(**arguments)


class Gives(EnvBase):
    """A reward of the test's choosing."""

    def get_reward(self, completion):
        return self.answer(completion) if callable(self.answer) else self.answer


@pytest.mark.parametrize("reward", [math.nan, math.inf, None, "1.0", [1.0], {"score": 1}, 1j, torch.ones(2)])
def test_a_reward_that_is_no_number_or_raises_stops_with_the_completion(reward):
    told = rf"Gives.get_reward gave {re.escape(repr(reward))} for the completion 'hello'"
    with pytest.raises(UserError, match=told):
        envs.score(Gives([], reward), "hello")
    with pytest.raises(UserError, match=r"Gives.get_reward raised ValueError: .* for the completion 'hel") as error:
        envs.score(Gives([], float), "hello")
    assert isinstance(error.value.__cause__, ValueError)


@pytest.mark.parametrize("reward", [1, True, 0.5, torch.tensor(0.5), Fraction(1, 2)])
def test_numbers_of_any_kind_are_rewards(reward):
    assert envs.score(Gives([], reward), "hello") == float(reward)


def test_data_order_is_a_permutation_an_epoch_and_a_function_of_the_position():
    whole = common.data_order(7, 1, 0, 21)
    assert all(sorted(whole[e : e + 7]) == list(range(7)) for e in (0, 7, 14))
    assert whole[:7] != whole[7:14]
    assert common.data_order(7, 1, 5, 6) == whole[5:11]  # across the end of an epoch
    assert common.data_order(7, 2, 0, 21) != whole


def test_the_evaluation_set_is_the_datasets_own_split_or_the_rows_of_a_file(tmp_path):
    path = write(tmp_path / "data.jsonl", {"prompt": "x", "answer": 1})

    def sizes(*given, **flags):
        args = grpo.Args(**{"num_samples": 30, "eval_samples": 20, "max_val": 9} | flags)
        return tuple(None if data is None else len(data) for data in common.load_splits(args, *(given or (None, None))))

    assert sizes() == (30, 20)
    assert sizes(eval_steps=0) == (30, None)
    own = {"dataset": path, "max_val": None}
    assert sizes(**own) == (1, None)  # a file has no evaluation split
    assert sizes(**own, eval_dataset=path) == (1, 1)
    assert sizes(**own, eval_dataset="math") == (1, 20)
    assert sizes(max_val=9, eval_dataset=path) == (30, 1)
    mine = [MathEnv([], 1)] * 3
    assert sizes(mine, None) == (3, None)  # nor has what the caller of main gives
    assert sizes(mine, mine) == (3, 3)


def test_gsm8k_row():
    row = {"question": "How many?", "answer": "She sold 40+32=<<40+32=72>>72 clips.\n#### 1,072"}
    env = envs.row_to_env(row, "row 0")  # wherever it comes from
    assert env.answer == "1,072"
    assert env.get_target() == "She sold 40+32=72 clips.\n\\boxed{1,072}"
    assert env.get_reward(env.get_target()) == 1.0


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_jsonl_rows(tmp_path):
    turns = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    path = write(
        tmp_path / "data.jsonl",
        {"prompt": "2+2?", "answer": 4},
        "",
        {"prompt": [{"role": "user", "content": "Capital?"}], "answer": "Paris", "target": "It is \\boxed{Paris}."},
        {"prompt": "Say hi", "completion": "hi"},
        {"messages": turns},
    )
    number, text, imitated, chat = load_dataset(path)
    assert number.prompt == [{"role": "user", "content": "2+2?"}]
    assert number.get_target() == r"\boxed{4}"
    assert number.get_reward(r"\boxed{4.0}") == 1.0
    assert text.get_target() == r"It is \boxed{Paris}."
    assert imitated.get_target() == "hi"
    assert (chat.prompt, chat.get_target()) == (turns[:1], "b")
    assert len(load_dataset(path, num_samples=2)) == 2
    assert load_dataset(path, "eval") is None


def turn(role, content, **more):
    return {"role": role, "content": content} | more


MALFORMED = [  # row, reason
    *[("{not json", "not a line of JSON"), ("[1]", "must be an object"), ("[" * 100_000, "not a line of JSON")],
    ('{"prompt": "half \\ud83d", "answer": 1}', "surrogates not allowed"),
    ({"conversations": [{"from": "human", "value": "x"}]}, "rename it to messages, from to role"),
    ({"messages": [turn("human", "x")]}, "role of system, developer, user, assistant, tool"),
    ({"messages": [turn("user", "x"), {"role": "assistant", "tool_calls": [1]}]}, "tool_calls"),
    *[
        ({"messages": [turn("assistant", "x", train=wrong)]}, "must be 0, 1, false or true")
        for wrong in (0.5, "no", [1])
    ],
    ({"messages": [turn("user", "x", weight=1), turn("assistant", "x")]}, "only the assistant's do"),
    ({"messages": [turn("user", "x"), turn("assistant", "x", loss=False)]}, "no assistant turn that trains"),
    *[({"messages": [turn("user", wrong)]}, "must be text, or a list of") for wrong in ([{"type": "image"}], None)],
    *[({"messages": [{"role": "user"}]}, "must be text, or a list of"), ({"messages": [{"content": "x"}]}, "role")],
    *[({"messages": []}, "at least one message"), ({"messages": [turn("user", "x")]}, "no assistant turn")],
    *[({"text": "x"}, r"neither messages nor prompt in \['text'\]"), ({"prompt": 3, "answer": 1}, "must be a list")],
    *[({"prompt": "x", "answer": wrong}, "must be text or a number") for wrong in ([1], math.nan)],
    ({"prompt": "x", "target": 1}, "must be text"),
]


@pytest.mark.parametrize(("row", "reason"), MALFORMED)
def test_malformed_rows_name_file_line_and_reason(tmp_path, row, reason):
    path = write(tmp_path / "data.jsonl", {"prompt": "x", "answer": 1}, row)
    with pytest.raises(UserError, match=reason) as error:
        load_dataset(path)
    assert f"{path}:2:" in str(error.value)


def test_files_as_other_tools_write_them(tmp_path):
    """A byte-order mark, CRLF, blank lines, no newline at the end, a line of 10 MB, content in parts."""
    path, parts = tmp_path / "data.jsonl", [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]
    rows = [{"prompt": "é🙂", "answer": 1}, {"prompt": "x" * 10_000_000, "answer": 2}]
    rows += [{"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": parts}]}]
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    path.write_bytes(b"\xef\xbb\xbf" + lines[0] + b"\r\n\r\n   \n" + lines[1] + b"\r\n" + lines[2])
    one, two, three = load_dataset(str(path))
    assert one.prompt == [{"role": "user", "content": "é🙂"}]
    assert len(two.prompt[0]["content"]) == 10_000_000
    assert (three.prompt, three.get_target()) == ([{"role": "user", "content": "Why?"}], "Why?")


def test_missing_and_empty_files(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    write(tmp_path / "empty.jsonl")
    cases = ("missing.jsonl", "no such file"), ("missing.py:f", "no such file"), ("empty.jsonl", "no rows")
    for name, reason in (*cases, ("folder.jsonl", "a folder")):
        with pytest.raises(UserError, match=reason):
            load_dataset(str(tmp_path / name))


def test_function_of_a_file(tmp_path):
    code = "from dataclasses import dataclass\nfrom envs import EnvBase\n@dataclass\nclass Echo(EnvBase):\n"
    code += "    def get_reward(self, completion):\n        return float(completion == self.answer)\n"
    code += "def make():\n    return [Echo([{'role': 'user', 'content': 'x'}], 'x')]\ndef nothing():\n    return []\n"
    (tmp_path / "mine.py").write_text(code)
    (env,) = load_dataset(f"{tmp_path}/mine.py:make")
    assert env.get_reward("x") == 1.0
    for name in ("absent", "nothing"):
        with pytest.raises(UserError):
            load_dataset(f"{tmp_path}/mine.py:{name}")


def test_folders_and_columns_of_the_datasets_library(tmp_path, monkeypatch):
    """Columns have one type, with None where a row lacks a key."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    roles = ("user", "assistant", "tool", "assistant")
    chat = [turn(role, text) for role, text in zip(roles, ("hi", "call", "5", "yes"), strict=True)]
    chat[2]["tool_call_id"] = "a"
    rows = [({"messages": chat, "source": "x"}, "yes"), ({"prompt": "hi", "completion": "yes"}, "yes")]
    rows += [({"question": "hi", "answer": "2"}, r"\boxed{2}"), ({"prompt": chat[:1], "answer": 5}, r"\boxed{5}")]
    for number, (row, target) in enumerate(rows):
        (tmp_path / str(number)).mkdir()
        write(tmp_path / str(number) / "train.jsonl", row)
        write(tmp_path / str(number) / "test.jsonl", row, row)
        (env,) = load_dataset(f"{tmp_path}/{number}")
        assert (env.prompt[0]["content"], env.get_target()) == ("hi", target)
        assert [e.answer for e in load_dataset(f"{tmp_path}/{number}", "eval")] == [env.answer] * 2
    (tmp_path / "text").mkdir()
    write(tmp_path / "text" / "train.jsonl", {"text": "x", "label": 1})
    with pytest.raises(UserError, match=r"train row 0: neither messages nor prompt in \['text', 'label'\]"):
        load_dataset(f"{tmp_path}/text")
    with pytest.raises(UserError, match="cannot load dataset"):
        load_dataset("no-such/dataset-anywhere")
