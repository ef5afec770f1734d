"""Data as people have it: rows of many shapes, files of many kinds, and a million of them are read when needed."""

import copy
import functools
import json
import threading

import datasets
import pytest
from conftest import ROOT, fine, mistake, read_metrics, read_rows, run_main, write_rows

import common
import envs
import sft
import tables
from chat import UserError
from envs import load_dataset

ROWS = read_rows(ROOT / "tests" / "rows.jsonl")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Of `datasets`, which keeps tables there."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def refuse():
    raise UserError("no")


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case["shape"])
def test_a_row_is_loaded_and_trains_what_it_should(tmp_path, tokenizer, case):
    row = copy.deepcopy(case["row"])
    assert envs.row_to_env(row).template_args == case.get("template_args", {})
    assert row == case["row"]  # it stays as it was
    table = load_dataset(write_rows(tmp_path / "data.jsonl", row))
    (env,) = table
    assert isinstance(env, envs.MathEnv) == ("answer" in case)
    if "answer" in case:
        assert env.answer == case["answer"] or str(env.answer) == case["answer"]
        assert env.get_reward(rf"\boxed{{{case['answer']}}}") == 1.0
    if "prompt" in case:
        assert " ".join(f"{m['role']}: {m['content']}" for m in env.prompt) == case["prompt"]
    assert env.template_args == case.get("template_args", {})
    assert tables.unread_columns(table) == case.get("unread", [])
    turns = [turn for turn in (*env.prompt, env.answer) if isinstance(turn, dict)]
    calls = [call["function"] for turn in turns for call in turn.get("tool_calls", [])]
    assert calls == case.get("calls", [])
    if case["trained"] is None:
        with pytest.raises(UserError, match=case.get("refused", "no answer to imitate")):
            sft.encode(env, tokenizer, 512)
    else:
        ids, mask = sft.encode(env, tokenizer, 512)
        text = tokenizer.decode([token for token, trains in zip(ids, mask, strict=True) if trains])
        assert text == "".join(f"{turn}<|im_end|>" for turn in case["trained"])


ROW = {"question": "2+2?", "answer": "4", "source": None}


def test_files_of_all_kinds_and_folders_hold_the_same_rows(tmp_path):
    table = datasets.Dataset.from_list([ROW | {"question": f"{n}+0?", "answer": str(n)} for n in range(4)])
    table.to_json(tmp_path / "a.jsonl")
    table.to_json(tmp_path / "a.json", lines=False)
    table.to_csv(tmp_path / "a.csv")
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "splits")
    table.to_json(tmp_path / "folder" / "train.jsonl")
    table.select([0]).to_json(tmp_path / "folder" / "test.jsonl")
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet", "saved", "splits", "folder"):
        rows = load_dataset(str(tmp_path / name))
        assert [env.prompt[0]["content"] for env in rows] == ["0+0?", "1+0?", "2+0?", "3+0?"], name
        assert rows[3].get_reward(r"\boxed{3}") == 1.0
        assert len(load_dataset(str(tmp_path / name), part="train[1:3]")) == 2
        assert len(load_dataset(str(tmp_path / name), part="train[:50%]", num_samples=1)) == 1
    assert len(load_dataset(str(tmp_path / "splits"), "eval")) == len(load_dataset(f"{tmp_path}/folder", "eval")) == 1
    assert load_dataset(str(tmp_path / "a.csv"), "eval") is None
    with pytest.raises(UserError, match="has no split dev, only train, test"):
        load_dataset(str(tmp_path / "splits"), part="dev")
    assert [env.answer for env in envs.as_environments(table, "mine")] == ["0", "1", "2", "3"]


def test_a_pattern_of_files_and_an_error_that_names_file_and_line(tmp_path):
    write_rows(tmp_path / "a.jsonl", ROW, ROW)
    (tmp_path / "b.jsonl").write_text("\n" + json.dumps(ROW) + "\n\n{bad\n")
    with pytest.raises(UserError, match=r"b.jsonl:4: not a line of JSON"):
        load_dataset(str(tmp_path / "*.jsonl"))
    for text, reason in (("", "no rows"), ("[" * 100_000, "not a line of JSON")):
        with pytest.raises(UserError, match=reason):
            load_dataset(write_rows(tmp_path / "b.jsonl", text))
    write_rows(tmp_path / "b.jsonl", ROW, ROW | {"answer": 5})
    assert [env.answer for env in load_dataset(str(tmp_path / "*.jsonl"))] == ["4", "4", "4", 5]  # of two types


def test_datasets_are_mixed_by_weight_and_none_loses_a_row(tmp_path):
    a = write_rows(tmp_path / "a.jsonl", *({"prompt": f"a{n}", "answer": n} for n in range(10)))
    b = write_rows(tmp_path / "b.jsonl", *({"prompt": f"b{n}", "answer": n} for n in range(4)))
    mixed = load_dataset(f"{a}:0.5,{b}:0.5")
    prompts = [mixed[n].prompt[0]["content"] for n in range(len(mixed))]
    assert (len(mixed), len(set(prompts))) == (20, 14)
    assert sum(text.startswith("b") for text in prompts) == 10


def test_rows_that_cannot_be_used_are_left_out_and_others_drawn_in_their_place(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(tables, "LOOK", 3)
    path = write_rows(tmp_path / "a.jsonl", *[{"prompt": "Hi", "completion": f"{n}"} for n in range(4)], {"text": "x"})
    rows = tables.Encoded(load_dataset(path), functools.partial(sft.encode, tokenizer=tokenizer, max_length=512))
    assert rows.look(3) == [0, 1, 2]
    assert rows.find(3) == 3
    assert rows.find(4) == rows.find(4) != 4
    assert rows.report().startswith(f"dropped 1 of 5 rows, the first is row 4: 1 x {path}:5: neither messages")


def test_the_rows_drawn_in_place_of_many_are_many():
    bad = set(range(300, 900))  # a whole file among others
    rows = tables.Encoded(range(1000), lambda row: row if row not in bad else refuse())
    drawn = [rows.find(row) for row in bad]
    assert set(drawn).isdisjoint(bad)
    assert max(map(drawn.count, drawn)) < 10  # not always the same one
    with pytest.raises(UserError, match="no row can be used"):
        tables.Encoded(range(9), lambda row: refuse()).find(0)


def test_rows_are_encoded_when_they_are_needed_by_a_thread_that_is_one_step_ahead():
    done, threads = [], set()

    def work(item):
        threads.add(threading.current_thread())
        done.append(item)
        return item * 10

    results = tables.ahead(work, range(3))
    assert next(results) == 0
    while len(done) < 2:
        pass
    assert done == [0, 1]  # and no more
    assert list(results) == [10, 20]
    assert threading.main_thread() not in threads
    with pytest.raises(ZeroDivisionError):
        list(tables.ahead(lambda item: 1 / item, [1, 0]))


def test_a_long_table_costs_no_memory_and_its_digest_tells_its_rows(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", *({"prompt": f"{n}", "answer": n} for n in range(3000)))
    table = load_dataset(path)
    assert table.rows.cache_files  # on the disk
    before = common.digest_of(table)
    assert common.digest_of(load_dataset(path)) == before
    write_rows(tmp_path / "a.jsonl", *({"prompt": f"{n}", "answer": n + (n == 2999)} for n in range(3000)))
    assert common.digest_of(load_dataset(path)) != before


def test_tables_are_read_as_they_stand(tmp_path, tokenizer):
    """A number is no other one, a bracket no pattern, a gap no argument, messages as JSON text are messages."""
    (tmp_path / "a.csv").write_text("prompt,answer\nx,007\ny,\nz,NA\n")
    assert [env.answer for env in load_dataset(str(tmp_path / "a.csv"))] == ["007", None, "NA"]
    messages = json.dumps([{"role": "user", "content": "Hi"}]).replace('"', '""')
    (tmp_path / "b.csv").write_text(f'messages,ground_truth\n"{messages}",4\n')
    assert load_dataset(str(tmp_path / "b.csv"))[0].prompt == [{"role": "user", "content": "Hi"}]
    write_rows(tmp_path / "a[1].jsonl", ROW | {"answer": 1})
    write_rows(tmp_path / "a1.jsonl", ROW | {"answer": 2})
    assert load_dataset(str(tmp_path / "a[1].jsonl"))[0].answer == 1
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}]
    rows = [{"messages": copy.deepcopy(turns)} for _ in range(2)]
    for row, name in zip(rows, ("city", "unit"), strict=True):
        row["messages"][1]["tool_calls"][0]["arguments"] = {name: "x"}
    env = envs.as_environments(datasets.Dataset.from_list(rows), "mine")[0]
    assert env.answer["tool_calls"][0]["function"]["arguments"] == {"city": "x"}


def test_the_evaluation_set_of_a_mixture_holds_out_what_each_part_does(tmp_path):
    write_rows(tmp_path / "a.jsonl", *[ROW] * 40)
    mixed = load_dataset(f"math:0.5,{tmp_path}/a.jsonl:0.5", "own", num_samples=1000)
    held_out = [env.prompt for env in envs.MathDataset(2000, split="eval")]
    texts = [mixed[n].prompt for n in range(len(mixed))]
    assert all(text in held_out or text[0]["content"] == "2+2?" for text in texts)
    assert load_dataset(f"math:0.5,{tmp_path}/a.jsonl:0.5", "eval") is None


def test_code_of_the_users_that_fails_in_a_late_row_is_one_line_and_costs_no_step(tmp_path):
    code = "from envs import EnvBase\nclass Bad(EnvBase):\n    def get_target(self):\n        return {}[self.answer]\n"
    code += "def make():\n    user = [{'role': 'user', 'content': 'Hi'}]\n"
    code += "    return [EnvBase(user, 'Yes')] * 1000 + [Bad(user, 'No')] * 1000\n"
    (tmp_path / "late.py").write_text(code)
    flags = ["--dataset", f"{tmp_path}/late.py:make", "--batch-size", 1, "--output-dir", tmp_path / "run"]
    told = mistake(run_main("sft.py", *flags, "--num-steps", 20))
    assert "KeyError: 'No'; step" in told
    assert common.newest_checkpoint(tmp_path / "run")[0] is not None


def test_long_prompts_and_rows_without_a_reward_are_dropped_and_counted_where_one_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(envs, "LOOK", 1)
    rows = [{"prompt": "a" * n, "answer": n} for n in (3, 90, 4, 5)]
    data = write_rows(tmp_path / "a.jsonl", *rows, {"prompt": "Hi"})
    flags = ["--dataset", data, "--max-prompt-length", 40, "--max-new-tokens", 8, "--output-dir"]
    trained = ["--eval-dataset", data, "--num-steps", 2, "--batch-size", 5, "--eval-steps", 2]
    for script, count in (("grpo.py", 3), ("onpolicy_distill.py", 1)):  # at the start, of the evaluation, at the end
        done = fine(run_main(script, *flags, tmp_path / script, *trained))
        assert done.stdout.count("1 x a prompt of more than 40 tokens") == 3
        assert done.stdout.count("1 x no reward") == done.stdout.count("dropped 2 of 5 rows, the first is row") == count
        line = read_metrics(tmp_path / script)[-1]
        assert line["step"] == 2
        assert 0 <= line["reward/mean"] <= 1
    fine(run_main("evaluate.py", *flags, tmp_path / "eval"))
    results = read_rows(tmp_path / "eval" / "results.jsonl")
    assert [result["answer"] for result in results] == [3, 4, 5]
