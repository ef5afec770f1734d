"""Numbers are graded exactly; splits are disjoint; bad rows are refused in one line."""

import json
import math
import re
from fractions import Fraction

import pytest
import torch
from conftest import cases_in, write_rows

import common
import envs
import grpo
from envs import EnvBase, MathDataset, MathEnv, UserError, after_thinking, last_boxed, load_dataset, parse_number


def reward(answer, completion):
    return MathEnv([], answer).get_reward(completion)


@pytest.mark.parametrize("case", cases_in("answers.txt"))
def test_numbers_are_read_exactly_and_nothing_else_is(case):
    text, _, value = case.rpartition(" is ")
    assert parse_number(text) == (None if value == "no number" else Fraction(value))


@pytest.mark.parametrize("case", cases_in("boxes.txt"))
def test_the_last_box_with_balanced_braces_after_the_thinking_counts(case):
    completion, _, box = case.rpartition(" -> ")
    assert last_boxed(after_thinking(completion)) == (None if box == "none" else box)
    assert reward("x", completion) == (0.0 if box == "none" else 0.1)
    assert reward(box, completion) == (0.0 if box == "none" else 1.0)


def test_an_empty_box_is_none_and_an_equal_number_is_right():
    assert reward("72", r"\boxed{}") == reward("72", r"\boxed{ }") == 0.0  # an echo of the prompt
    assert reward(0.75, r"\boxed{3/4}") == 1.0


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
    path = write_rows(tmp_path / "data.jsonl", {"prompt": "x", "answer": 1})

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
    assert sizes(mine, None, num_samples=None, max_val=None) == (3, None)  # nor has what the caller of main gives
    assert sizes(mine, mine, num_samples=None, max_val=None) == (3, 3)
    with pytest.raises(UserError, match="--num-samples is for --dataset, not for rows that are given"):
        sizes(mine, mine)


@pytest.mark.parametrize("case", cases_in("malformed_rows.txt"))
def test_malformed_rows_name_file_line_and_reason(tmp_path, case):
    row, _, reason = case.rpartition(" -> ")
    path = write_rows(tmp_path / "data.jsonl", {"prompt": "x", "answer": 1}, row)
    with pytest.raises(UserError, match=re.escape(reason)) as error:
        load_dataset(path)
    assert f"{path}:2:" in str(error.value)


def test_files_as_other_tools_write_them(tmp_path):
    """A byte-order mark, CRLF, blank lines, no newline at the end, a line of 10 MB, content in parts."""
    path, parts = tmp_path / "data.jsonl", [{"type": "text", "text": "é"}, {"type": "text", "text": "🙂"}]
    rows = [{"prompt": [{"role": "user", "content": parts}], "target": "é"}, {"prompt": "x" * 10_000_000, "answer": 2}]
    one, two = (json.dumps(row, ensure_ascii=False).encode() for row in rows)
    path.write_bytes(b"\xef\xbb\xbf" + one + b"\r\n\r\n   \n" + two)
    first, second = load_dataset(str(path))
    assert (first.prompt[0]["content"], first.get_target()) == ("é🙂", "é")
    assert len(second.prompt[0]["content"]) == 10_000_000
