"""Checkpoints are whole or absent, load anywhere, and a killed run goes on bit for bit."""

import json
import random
import signal
import time

import pytest
import torch
from conftest import AS_A_USER, fine, mistake, read_metrics, record_of, run_main, run_script, start_script, wait_for
from safetensors.torch import load_file

import common


def fill(folder, content="x"):
    (folder / "weights").write_text(content)


def test_leftovers_and_broken_checkpoints_are_skipped_and_named(tmp_path, capsys):
    for step in (1, 2, 3, 10):
        common.publish(tmp_path / f"step_{step}", fill, step)
    (tmp_path / "step_10" / "weights").write_text("")  # truncated
    (tmp_path / "step_3" / "state.json").unlink()
    (tmp_path / ".step_11.tmp").mkdir()  # of a killed writer
    (tmp_path / "step_x").mkdir()
    assert common.newest_checkpoint(tmp_path) == (tmp_path / "step_2", 2)
    skipped = capsys.readouterr().err
    assert all(f"step_{step}, not a whole checkpoint" in skipped for step in (3, 10))
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


def test_a_prune_takes_neither_the_new_checkpoint_nor_a_folder_of_the_user(make_run):
    """Broken checkpoints of later steps, from before a resume, must not crowd out the ones that are whole."""
    run = make_run()
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
RUNS["grpo.py with LoRA"] = [*RUNS["grpo.py"], "--lora-rank", 4, "--kl-penalty", 0.01]


def without_timing(lines):
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "perf/"))} for line in lines]


@pytest.fixture(scope="module", params=list(RUNS))
def straight(request, tmp_path_factory):
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    fine(run_script(request.param.split()[0], *RUNS[request.param], "--output-dir", folder, env=AS_A_USER))
    return request.param, folder


def assert_same_run(folder, straight_folder):
    last = common.newest_checkpoint(folder)[0].name
    files = [*folder.glob("final/*.safetensors"), *folder.glob(f"{last}/*.safetensors")]
    assert len(files) == 3
    for file in [path.relative_to(folder) for path in files]:
        one, two = (load_file(f / file) for f in (folder, straight_folder))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert without_timing(read_metrics(folder)) == without_timing(read_metrics(straight_folder))
    steps = [line["step"] for line in read_metrics(folder)]
    assert steps == list(range(len(steps)))


ENDS = [(script, signal.SIGKILL, -signal.SIGKILL) for script in RUNS]
ENDS += [("sft.py", signal.SIGTERM, 143), ("grpo.py", signal.SIGINT, 130)]  # the code is common to all scripts


@pytest.mark.slow
@pytest.mark.parametrize(("straight", "signum", "code"), ENDS, indirect=["straight"])
def test_a_run_that_is_killed_or_stopped_goes_on_bit_for_bit(straight, tmp_path, signum, code):
    (name, straight_folder), script = straight, straight[0].split()[0]
    after = random.randint(3, 10)  # a random moment: this many lines logged, and some way into the next step
    print(f"ended after {after} lines")
    folder, flags = tmp_path / "run", [*RUNS[name], "--output-dir", tmp_path / "run", "--resume"]
    process = start_script(script, *flags, env=AS_A_USER)
    log = folder / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") > after, process)
    time.sleep(random.random() / 5)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in errors) == (code, False)
    assert not (folder / "final").exists()
    saved = common.newest_checkpoint(folder)[1]
    assert saved >= 2
    assert saved == read_metrics(folder)[-1]["step"] or signum == signal.SIGKILL  # the very step it stopped at
    done = fine(run_script(script, *flags, env=AS_A_USER))
    assert record_of(folder)["resumed_from"] == saved
    assert f"\n{saved}/" not in done.stdout  # only the missing steps ran
    assert f"\n{saved + 1}/" in done.stdout
    assert_same_run(folder, straight_folder)
    assert "is done" in fine(run_main(script, *flags)).stdout  # nothing left to do


@pytest.mark.slow
@pytest.mark.parametrize("straight", ["sft.py", "grpo.py"], indirect=True)
def test_resume_refuses_other_flags_and_used_folders(straight):
    script, folder = straight
    flags = [*RUNS[script], "--output-dir", folder]
    assert "is not empty" in mistake(run_main(script, *flags))
    record = (folder / "args.json").read_text()
    (folder / "args.json").write_text(json.dumps(json.loads(record) | {"num_processes": 2}))
    told = mistake(run_main(script, *flags, "--resume", "--learning-rate", 0.5, "--batch-size", 3))
    assert all(change in told for change in ("--batch-size 4 -> 3", "--learning-rate", "--num-processes 2 -> 1"))
    (folder / "args.json").write_text(json.dumps(json.loads(record) | {"data": "the digest of other rows"}))
    longer = [*flags, "--resume", "--saving-steps", 100, "--logging-steps", 2]
    longer += ["--micro-batch-tokens", 300]  # where memory ran out
    steps = RUNS[script][RUNS[script].index("--num-steps") + 1] + 2
    done = fine(run_main(script, *longer, "--num-steps", steps))
    assert "the training data has changed" in done.stdout
    assert read_metrics(folder)[-1]["step"] == common.newest_checkpoint(folder)[1] == steps
