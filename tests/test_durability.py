"""Whatever instant a save dies at, the newest valid checkpoint loads, and the next save goes through."""

import contextlib
import errno
import os
import random
import resource
import signal
import sys
import time
import types

import pytest
from accelerate import Accelerator
from conftest import FAST, fine, mistake, run_main

import common

EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")  # of sys.addaudithook


def write_plain(_run, folder, _tensors):
    (folder / "model.safetensors").write_bytes(os.urandom(3000))
    (folder / "config.json").write_text("{}")


@pytest.fixture
def save(tmp_path, monkeypatch):
    """The real save_checkpoint, with small plain files for the model."""
    monkeypatch.setattr(common, "save_model", write_plain)
    monkeypatch.setattr(common, "save_file", lambda state, path: path.write_bytes(b"moments"))
    args = types.SimpleNamespace(shard=False)
    run = types.SimpleNamespace(folder=tmp_path, accelerator=Accelerator(cpu=True), args=args, is_main=True)
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
    outcomes, died = [], True
    while died:
        for path in tmp_path.iterdir():
            common.shutil.rmtree(path)
        for step in (1, 2, 3):
            save(step)
        died = die_at(tmp_path, len(outcomes) + 1, save)
        checkpoint, step = common.newest_checkpoint(tmp_path)
        assert (checkpoint / "model.safetensors").stat().st_size == 3000
        assert step in (3, 4)
        outcomes.append(step)
        save(5)  # the next save goes through, clears what was left over and keeps two
        assert common.newest_checkpoint(tmp_path)[1] == 5
        save(6)
        assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".step_4")) == ["step_5", "step_6"]
    assert len(outcomes) > 20
    assert outcomes == sorted(outcomes)  # once published, it stays
    assert 3 in outcomes[:-1]
    assert 4 in outcomes[:-1]


def test_a_hundred_kills_at_random_moments(tmp_path, save):
    rng = random.Random(0)
    save(1)
    newest, kills = 1, 0
    while kills < 100 or newest <= 20:  # until the children did save
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
        assert step >= newest
        assert sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")) == 3000 + len(b"moments")
        newest = step


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_one_line_and_the_checkpoint_before_it(tmp_path, monkeypatch):
    """From the third checkpoint on, files above 100 kB fail as on a full disk; then there is room again."""
    save_model, saved = common.save_model, []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(run, folder, *rest, **options):
        saved.append(folder)
        if len(saved) > 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        save_model(run, folder, *rest, **options)

    monkeypatch.setattr(common, "save_model", fill)
    flags = [*FAST[:4], "--num-steps", 5, "--saving-steps", 1, "--output-dir", tmp_path / "run"]
    try:
        told = mistake(run_main("sft.py", *flags))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.strerror(errno.EFBIG) in told
    assert "--resume" in told
    assert common.newest_checkpoint(tmp_path / "run")[1] == 2
    assert list((tmp_path / "run").glob(".*")) == []
    monkeypatch.undo()
    fine(run_main("sft.py", *flags, "--resume"))
    assert common.newest_checkpoint(tmp_path / "run")[1] == 5
