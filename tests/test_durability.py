"""Whatever instant a save dies at, the newest valid checkpoint loads, and the next save goes through."""

import contextlib
import errno
import itertools
import os
import resource
import signal
import sys
import types

import pytest
from conftest import FAST, fine, mistake, run_main

import common

EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")  # of sys.addaudithook


def write_plain(_run, folder, _tensors):
    (folder / "model.safetensors").write_bytes(os.urandom(3000))
    (folder / "config.json").write_text("{}")


@pytest.fixture
def save(tmp_path, make_run, monkeypatch):
    """The real save_checkpoint, with small plain files for the model."""
    monkeypatch.setattr(common, "save_model", write_plain)
    monkeypatch.setattr(common, "save_file", lambda state, path: path.write_bytes(b"moments"))
    run = make_run(output_dir=str(tmp_path))
    run.optimizer = types.SimpleNamespace(state_dict=lambda: {"state": {}})

    def save(step):
        run.step = step
        common.save_checkpoint(run)

    return save


def die_at(folder, count, save):
    """A forked child saves step 4 and dies just before its `count`-th file operation. True if it got that far."""
    child = os.fork()
    if child == 0:
        seen, fsync = itertools.count(1), os.fsync

        def operation(event, args):
            if event in EVENTS and str(folder) in str(args) and next(seen) == count:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(operation)
        os.fsync = lambda descriptor: (operation("open", folder), fsync(descriptor))
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
    assert {*outcomes[:-1]} == {3, 4}


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_one_line_and_the_checkpoint_before_it(tmp_path, monkeypatch):
    """From the third checkpoint on, files above 100 kB fail as on a full disk; then there is room again."""
    save_model = common.save_model
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(run, folder, *rest, **options):
        if run.step > 2:
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
