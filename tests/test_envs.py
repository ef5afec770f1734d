"""Grading is exact, bounded in time and never evaluates; splits are disjoint; bad rows are refused in one line."""

import json
import re
import time
from fractions import Fraction

import pytest

import envs
from envs import EnvBase, MathDataset, MathEnv, UserError, last_boxed, load_dataset, parse_number


def reward(answer, completion):
    return MathEnv([], answer).get_reward(completion)


@pytest.mark.parametrize("text", ["72", "72.", "72.00", "$72", r"\$72", "$72$", " 72 ", "+72", r"\text{ 72 }", "144/2"])
def test_forms_of_one_number_are_all_correct(text):
    assert reward("72", rf"so \boxed{{{text}}}") == 1.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,000", Fraction(1000)),
        ("1,234,567.50", Fraction("1234567.5")),
        ("3/4", Fraction(3, 4)),
        ("0.75", Fraction(3, 4)),
        (".75", Fraction(3, 4)),
        ("- 3 / 4", Fraction(-3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac{3}{ 4 }", Fraction(-3, 4)),
        ("-0", Fraction(0)),
        ("\u22125", Fraction(-5)),
        (r"\text{ 5 }", Fraction(5)),
        ("1,00", None),
        ("7 2", None),
        (r"1\frac{1}{2}", None),
        ("3/0", None),
        ("1e3", None),
        ("72 apples", None),
        ("\u0661", None),
        ("nan", None),
        ("", None),
        ("2**3", None),
        ("__import__('os').getpid()", None),
    ],
)
def test_parse_number(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize(
    ("completion", "content"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{5} and \boxed{6", "5"),
        (r"} \boxed{5}", "5"),
        (r"{ \boxed{5}", "5"),
        (r"\boxed {5}", "5"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\{5\}}", r"\{5\}"),
        (r"\boxed{", None),
        ("boxed{5}", None),
        ("72", None),
        ("", None),
    ],
)
def test_last_box_with_balanced_braces_counts(completion, content):
    assert last_boxed(completion) == content


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
    "exponent": r"\boxed{1e999999999}",
    "power": r"\boxed{9**9**9**9}",
    "open boxes": r"\boxed{" * 100_000,
    "nested boxes": r"\boxed{" * 100_000 + "}" * 100_000,
    "braces": "{" * 1_000_000,
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


def test_division_answers_are_fractions():
    answers = [env.answer for env in MathDataset(100, 1, 9, "div")]
    assert all("." not in answer for answer in answers)
    assert any("/" in answer for answer in answers)


def test_math_dataset_is_seeded_and_sized():
    first, again, other = (MathDataset(50, seed=seed) for seed in (3, 3, 4))
    assert [e.prompt for e in first] == [e.prompt for e in again] != [e.prompt for e in other]
    assert len(MathDataset()) == 2000
    assert len(MathDataset(500, split="eval")) == 500  # enough held-out problems in the default range
    assert len(MathDataset(5, 0, 10**9)) == 5  # a huge range costs no memory


@pytest.mark.parametrize(
    "arguments",
    [
        {"operand": "pow"},
        {"min_val": 5, "max_val": 4},
        {"max_val": 10**12},
        {"num_samples": 0},
        {"split": "test"},
        {"min_val": 0, "max_val": 0, "operand": "div"},
    ],
)
def test_impossible_math_datasets_are_refused(arguments):
    with pytest.raises(UserError):
        MathDataset(**arguments)


def test_env_base():
    env = EnvBase([{"role": "user", "content": "hi"}], 3)
    assert env.get_target() == "3"
    with pytest.raises(NotImplementedError):
        env.get_reward("3")
    with pytest.raises(UserError):
        EnvBase([]).get_target()


def test_gsm8k_row():
    row = {"question": "How many?", "answer": "She sold 40+32=<<40+32=72>>72 clips.\n#### 1,072"}
    env = envs.gsm8k_env(row, "row 0")
    assert env.answer == "1,072"
    assert env.get_target() == "She sold 40+32=72 clips.\n\\boxed{1,072}"
    assert env.get_reward(env.get_target()) == 1.0
    assert env.prompt[0]["content"] == f"How many? {envs.BOXED}"
    with pytest.raises(UserError, match="row 0"):
        envs.gsm8k_env({"question": "?", "answer": "no mark"}, "row 0")


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


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{not json", "not a line of JSON"),
        ("[1]", "must be an object"),
        ("[" * 100_000, "not a line of JSON"),
        ('{"prompt": "half \\ud83d", "answer": 1}', "surrogates not allowed"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "rename it to messages, from to role"),
        ({"messages": [{"role": "human", "content": "x"}]}, "role of system, developer, user, assistant, tool"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [1]}]}, "tool_calls"),
        (
            {"messages": [{"role": "assistant", "content": "x", "weight": 1}]},
            "has weight: write it into content, or drop",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "must be text, or a list of text parts"),
        ({"messages": [{"role": "user"}]}, "must be text, or a list of text parts"),
        ({"text": "x"}, "neither messages nor prompt in \\['text'\\]"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant turn"),
        ({"messages": [{"role": "user", "content": None}]}, "must be text"),
        ({"messages": [{"content": "x"}]}, "role"),
        ({"prompt": 3, "answer": 1}, "must be a list"),
        ({"prompt": "x", "answer": [1]}, "must be text or a number"),
        ({"prompt": "x", "answer": float("nan")}, "must be text or a number"),
        ({"prompt": "x", "target": 1}, "must be text"),
    ],
)
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
    for name in ("missing.jsonl", "missing.py:f"):
        with pytest.raises(UserError, match="no such file"):
            load_dataset(str(tmp_path / name))
    with pytest.raises(UserError, match="no rows"):
        load_dataset(write(tmp_path / "empty.jsonl"))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match="a folder"):
        load_dataset(str(tmp_path / "folder.jsonl"))


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


def test_local_folder_by_the_datasets_library(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.jsonl", {"question": "1+1?", "answer": "2"})
    write(folder / "test.jsonl", {"question": "2+2?", "answer": "4"}, {"question": "3+3?", "answer": "6"})
    assert [e.answer for e in load_dataset(str(folder))] == ["2"]
    assert [e.answer for e in load_dataset(str(folder), "eval")] == ["4", "6"]
    with pytest.raises(UserError, match="cannot load dataset"):
        load_dataset("no-such/dataset-anywhere")


def test_columns_of_hub_datasets(tmp_path, monkeypatch):
    """What the library reads: columns of one type, with None where a row lacks a key."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    user, tool = {"role": "user", "content": "hi"}, {"role": "tool", "content": "5", "tool_call_id": "a"}
    turns = [user, {"role": "assistant", "content": "call"}, tool, {"role": "assistant", "content": "yes"}]
    for columns, target in (
        ({"messages": turns, "source": "x"}, "yes"),
        ({"prompt": "hi", "completion": "yes"}, "yes"),
        ({"prompt": [user], "answer": 5}, r"\boxed{5}"),
        ({"question": "hi", "answer": "5"}, r"\boxed{5}"),
    ):
        folder = tmp_path / "-".join(columns)
        folder.mkdir()
        write(folder / "train.jsonl", columns)
        (env,) = load_dataset(str(folder))
        assert env.prompt[0]["content"] == "hi"
        assert env.get_target() == target
    (tmp_path / "other").mkdir()
    write(tmp_path / "other" / "train.jsonl", {"text": "x", "label": 1})
    with pytest.raises(UserError, match=r"other train row 0: neither messages nor prompt in \['text', 'label'\]"):
        load_dataset(str(tmp_path / "other"))


def test_ranges_belong_to_math_alone(tmp_path):
    path = write(tmp_path / "data.jsonl", {"prompt": "x", "answer": 1})
    with pytest.raises(UserError, match="--min-val"):
        load_dataset(path, min_val=3)
