"""Checkpoints are whole or absent, load anywhere, and a killed run goes on bit for bit."""

import json
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import AS_A_USER, ROOT, read_metrics, run_main, run_script
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import sft


def fill(folder, content="x"):
    (folder / "weights").write_text(content)


def test_a_failed_write_leaves_the_checkpoint_before_it(tmp_path):
    common.publish(tmp_path / "step_1", fill, 1)

    def disk_full(folder):
        fill(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        common.publish(tmp_path / "step_2", disk_full, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]
    assert common.newest_checkpoint(tmp_path) == (tmp_path / "step_1", 1)


def test_leftovers_and_broken_checkpoints_are_skipped_and_named(tmp_path, capsys):
    for step in (1, 2, 3, 10):
        common.publish(tmp_path / f"step_{step}", fill, step)
    (tmp_path / "step_10" / "weights").write_text("")  # truncated
    (tmp_path / "step_3" / "state.json").unlink()
    (tmp_path / ".step_11.tmp").mkdir()  # of a killed writer
    (tmp_path / "step_x").mkdir()
    assert common.newest_checkpoint(tmp_path) == (tmp_path / "step_2", 2)
    skipped = capsys.readouterr().err
    assert "step_10, not a whole checkpoint" in skipped
    assert "step_3, not a whole checkpoint" in skipped
    common.publish(tmp_path / "step_10", fill, 10)  # a broken one can be replaced
    assert common.newest_checkpoint(tmp_path)[1] == 10
    assert common.newest_checkpoint(tmp_path / "absent") == (None, 0)


def test_files_reach_the_disk_before_the_manifest_and_that_before_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, rename = common.fsync, common.os.rename
    monkeypatch.setattr(common, "fsync", lambda path: (events.append(path.name), fsync(path)))
    monkeypatch.setattr(common.os, "rename", lambda a, b: (events.append("rename"), rename(a, b)))
    common.publish(tmp_path / "step_1", fill, 1)
    assert events == ["weights", "state.json", ".step_1.tmp", "rename", tmp_path.name]


def test_log_is_cut_back_to_the_checkpoint(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps({"step": step}) + "\n" for step in (0, 1, 2, 3)) + '{"step": 4, "lo')
    common.cut_back(log, 2)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [0, 1, 2]
    common.cut_back(log, 0)
    assert log.read_text() == ""


def test_saved_model_loads_with_transformers_and_keeps_its_settings(tiny, tokenizer, tmp_path):
    run = types.SimpleNamespace(model=tiny, tokenizer=tokenizer)
    common.save_model(run, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded(ids).logits, tiny(ids).logits)
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    chat = [{"role": "user", "content": "a"}]
    assert AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(chat, tokenize=False) == (
        tokenizer.apply_chat_template(chat, tokenize=False)
    )


def test_a_tied_head_is_saved_once_and_weights_are_not_rounded_to_the_dtype_of_the_source(tiny, tokenizer, tmp_path):
    common.save_model(types.SimpleNamespace(model=tiny, tokenizer=tokenizer), tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert 4 * tiny.num_parameters() < size < 4.02 * tiny.num_parameters()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)  # whose own default is what config.json says
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, tiny.lm_head.weight)


def test_a_prune_takes_neither_the_new_checkpoint_nor_a_folder_of_the_user(tmp_path):
    """Broken checkpoints of later steps, from before a resume, must not crowd out the ones that are whole."""
    run = common.Run(
        sft.Args(output_dir=str(tmp_path / "run"), eval_steps=0), "sft.py", None, None, bundled_lr=1e-3, real_lr=1e-5
    )
    common.load_policy(run)
    for step in (10, 12):
        common.publish(run.folder / f"step_{step}", fill, step)
        (run.folder / f"step_{step}" / "weights").write_text("")
    (run.folder / "step_10_best").mkdir()
    for run.step in (2, 4, 6):
        common.save_checkpoint(run)
        assert common.newest_checkpoint(run.folder)[1] == run.step
    assert {path.name for path in run.folder.iterdir()} == {"step_10_best", *(f"step_{n}" for n in (4, 6, 10, 12))}


# ---- Resume of real runs

SMALL = ["--batch-size", 4, "--saving-steps", 2, "--logging-steps", 1, "--eval-samples", 8, "--num-samples", 50]
RUNS = {
    "sft.py": [*SMALL, "--num-steps", 30, "--eval-steps", 7],
    "grpo.py": [*SMALL, "--num-steps", 16, "--eval-steps", 5, "--group-size", 4, "--max-new-tokens", 24],
    "onpolicy_distill.py": [*SMALL, "--num-steps", 16, "--eval-steps", 5, "--max-new-tokens", 24],
}


def start_script(script, *flags):
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=AS_A_USER, text=True, **pipes)


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def without_timing(lines):
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "perf/"))} for line in lines]


@pytest.fixture(scope="module", params=list(RUNS))
def straight(request, tmp_path_factory):
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    done = run_script(request.param, *RUNS[request.param], "--output-dir", folder, env=AS_A_USER)
    assert done.returncode == 0, done.stderr
    return request.param, folder


def assert_same_run(folder, straight_folder):
    last = common.newest_checkpoint(folder)[0].name
    for file in ("final/model.safetensors", f"{last}/model.safetensors", f"{last}/optimizer.safetensors"):
        one, two = (load_file(f / file) for f in (folder, straight_folder))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert without_timing(read_metrics(folder)) == without_timing(read_metrics(straight_folder))
    steps = [line["step"] for line in read_metrics(folder)]
    assert steps == list(range(len(steps)))


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(straight, tmp_path):
    script, straight_folder = straight
    after = random.randint(3, 10)  # a random moment: this many lines logged, and some way into the next step
    print(f"killed after {after} lines")
    folder, flags = tmp_path / "run", [*RUNS[script], "--output-dir", tmp_path / "run", "--resume"]
    process = start_script(script, *flags)
    metrics = folder / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > after, process)
    time.sleep(random.random() / 5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "final").exists()
    done = run_script(script, *flags, env=AS_A_USER)
    assert done.returncode == 0, done.stderr
    resumed_from = json.loads((folder / "args.json").read_text())["resumed_from"]
    assert resumed_from is not None
    assert resumed_from >= 2
    assert f"\n{resumed_from}/" not in done.stdout  # only the missing steps ran
    assert f"\n{resumed_from + 1}/" in done.stdout
    assert_same_run(folder, straight_folder)
    again = run_main(script, *flags)  # nothing left to do
    assert again.returncode == 0
    assert "is done" in again.stdout


@pytest.mark.slow
@pytest.mark.parametrize("straight", ["sft.py", "grpo.py"], indirect=True)  # the code is common to all scripts
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(straight, tmp_path):
    script, straight_folder = straight
    signum, code = {"sft.py": (signal.SIGTERM, 143), "grpo.py": (signal.SIGINT, 130)}[script]
    folder, flags = tmp_path / "run", [*RUNS[script], "--output-dir", tmp_path / "run"]
    process = start_script(script, *flags)
    metrics = folder / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 5, process)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    last = read_metrics(folder)[-1]["step"]
    assert common.newest_checkpoint(folder)[1] == last  # saved at the very step it stopped at
    assert run_script(script, *flags, "--resume", env=AS_A_USER).returncode == 0
    assert_same_run(folder, straight_folder)


@pytest.mark.slow
@pytest.mark.parametrize("straight", ["sft.py", "grpo.py"], indirect=True)  # the code is common to all scripts
def test_resume_refuses_other_flags_and_used_folders(straight):
    script, folder = straight
    flags = [*RUNS[script], "--output-dir", folder]
    used = run_main(script, *flags)
    assert (used.returncode, used.stderr.count("\n")) == (2, 1)
    assert "is not empty" in used.stderr
    other = run_main(script, *flags, "--resume", "--learning-rate", "0.5", "--batch-size", "3")
    assert other.returncode == 2
    assert "--batch-size 4 -> 3" in other.stderr
    assert "--learning-rate" in other.stderr
    assert run_main(script, "--resume").returncode == 2
    record = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(record | {"num_processes": 2}))
    other = run_main(script, *flags, "--resume")
    assert "--num-processes 2 -> 1" in other.stderr
    (folder / "args.json").write_text(json.dumps(record))
    longer = [*flags, "--resume", "--wandb-project", "other", "--saving-steps", 100, "--logging-steps", 2]
    longer += ["--micro-batch-tokens", 300]  # where memory ran out
    steps = RUNS[script][RUNS[script].index("--num-steps") + 1] + 2
    done = run_main(script, *longer, "--num-steps", steps)
    assert done.returncode == 0, done.stderr
    assert read_metrics(folder)[-1]["step"] == steps
    assert Path(folder / f"step_{steps}").exists()
