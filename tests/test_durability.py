"""Whatever instant a save dies at, the newest valid checkpoint loads, and the next save goes through."""

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from accelerate import Accelerator
from conftest import FAST, run_main

import common

EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")  # of sys.addaudithook


def write_plain(_run, folder):
    (folder / "model.safetensors").write_bytes(os.urandom(3000))
    (folder / "config.json").write_text("{}")


@pytest.fixture
def save(tmp_path, monkeypatch):
    """The real save_checkpoint, with small plain files for the model."""
    monkeypatch.setattr(common, "save_model", write_plain)
    monkeypatch.setattr(common, "save_file", lambda state, path: path.write_bytes(b"moments"))
    run = types.SimpleNamespace(folder=tmp_path, accelerator=Accelerator(cpu=True))
    run.optimizer = types.SimpleNamespace(state_dict=lambda: {"state": {}})

    def save(step):
        run.step = step
        common.save_checkpoint(run)

    return save


def die_at(folder, count, save):
    """A forked child saves step 4 and dies just before its `count`-th file operation. True if it got that far."""
    child = os.fork()
    if child == 0:
        seen, fsync = 0, os.fsync

        def operation():
            nonlocal seen
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

        def audit(event, args):
            if event in EVENTS and str(folder) in str(args):
                operation()

        sys.addaudithook(audit)
        os.fsync = lambda descriptor: (operation(), fsync(descriptor))
        with contextlib.suppress(BaseException):
            save(4)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_save_can_die_at_any_file_operation(tmp_path, save):
    for step in (1, 2, 3):
        save(step)
    outcomes = []
    for count in range(1, 200):
        died = die_at(tmp_path, count, save)
        checkpoint, step = common.newest_checkpoint(tmp_path)
        assert checkpoint is not None
        assert (checkpoint / "model.safetensors").stat().st_size == 3000
        assert step in (3, 4)
        outcomes.append(step)
        save(5)  # the next save goes through, clears what was left over and keeps two
        assert common.newest_checkpoint(tmp_path)[1] == 5
        save(6)
        assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".step_4")) == ["step_5", "step_6"]
        for path in tmp_path.iterdir():
            common.shutil.rmtree(path)
        for step in (1, 2, 3):
            save(step)
        if not died:
            break
    assert not died
    assert len(outcomes) > 20
    assert outcomes == sorted(outcomes)  # once published, it stays
    assert 3 in outcomes[:-1]
    assert 4 in outcomes[:-1]


def test_a_hundred_kills_at_random_moments(tmp_path, save):
    rng = random.Random(0)
    save(1)
    newest, steps, kills = 1, set(), 0
    while kills < 100 or len(steps) <= 20:  # until the children did save
        kills += 1
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                for step in range(newest + 1, 10**6):
                    save(step)
            os._exit(1)
        time.sleep(rng.uniform(0.0005, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        checkpoint, step = common.newest_checkpoint(tmp_path)
        assert checkpoint is not None
        assert step >= newest
        assert sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")) == 3000 + len(b"moments")
        newest = step
        steps.add(step)


def test_a_prune_that_fails_is_not_fatal(tmp_path, save, monkeypatch):
    for step in (1, 2):
        save(step)

    def refused(*_args, **_options):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "unlink", refused)
    save(3)
    assert common.newest_checkpoint(tmp_path)[1] == 3


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 30 MB: two checkpoints of `tiny` fit, a third does not."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting is refused here: the next test's writer stands in")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_disk_that_is_really_full_and_then_has_room_again(small_disk):
    flags = [*FAST[:2], "--batch-size", 2, "--max-new-tokens", 24, "--num-steps", 5, "--saving-steps", 1]
    flags += ["--output-dir", small_disk / "run"]
    done = run_main("grpo.py", *flags)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "No space left on device" in done.stderr
    assert common.newest_checkpoint(small_disk / "run")[1] == 2
    subprocess.run(["mount", "-o", "remount,size=90m", str(small_disk)], check=True)
    done = run_main("grpo.py", *flags, "--resume")
    assert done.returncode == 0, done.stderr
    assert common.newest_checkpoint(small_disk / "run")[1] == 5


@pytest.mark.slow
@pytest.mark.parametrize("script", ["sft.py", "grpo.py"])
def test_a_full_disk_ends_the_run_with_one_line_and_the_checkpoint_before_it(tmp_path, script, monkeypatch):
    """The disk is full from the third checkpoint on: every file above 100 kB fails, as the limit of a real one does."""
    save_file, saved = common.save_file, 0

    def full(state, path):
        nonlocal saved
        saved += 1
        if saved > 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save_file(state, path)

    monkeypatch.setattr(common, "save_file", full)
    flags = [*FAST[:2], "--batch-size", 2, "--num-steps", 5, "--saving-steps", 1]
    flags += ["--max-new-tokens", 24] if script == "grpo.py" else []
    done = run_main(script, *flags, "--output-dir", tmp_path / "run")
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "No space left on device" in done.stderr
    assert "--resume" in done.stderr
    assert common.newest_checkpoint(tmp_path / "run")[1] == 2
    assert sorted(p.name for p in Path(tmp_path / "run").glob(".*")) == []
