"""A fresh start in a run directory that has results: all of them go aside, each once; and what is said before one."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest
from written_checkpoint import write_bare_checkpoint

from consumers import run_directory
from consumers.checkpoint_files import checkpoints_dir, step_name
from consumers.run_directory import _MOVED_BY_FRESH, check_tracking, move_aside, run_lock
from qwenimg_dist.compose import load_config
from qwenimg_dist.data.errors import DataError, LockedError


def test_everything_of_an_earlier_run_is_moved_aside_and_kept(tmp_path: Path) -> None:
    assert move_aside(tmp_path) is None
    for number in (1, 2):
        for name in _MOVED_BY_FRESH:
            (tmp_path / name).write_text(f"{name} of run {number}")
        (tmp_path / "train.log").touch()  # the command is reading it
        aside = move_aside(tmp_path)
        assert aside == tmp_path / f"previous-{number:03d}"
        assert {file.name for file in aside.iterdir()} == set(_MOVED_BY_FRESH)
        assert (aside / "tables.jsonl").read_text() == f"tables.jsonl of run {number}"
        left = {file.name for file in tmp_path.iterdir()} - {f"previous-{n:03d}" for n in range(1, number + 1)}
        assert left == {"train.log"}


def test_only_a_run_that_was_tracked_before_may_go_on_without_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    online, off = load_config(["logger=online"]), load_config([])
    with pytest.raises(ValueError, match="no W&B key"):
        check_tracking(online, tmp_path, fresh=False)
    write_bare_checkpoint(tmp_path, 4, {"wandb_id": None})
    with pytest.raises(ValueError, match="no W&B key"):
        check_tracking(online, tmp_path, fresh=False)
    write_bare_checkpoint(tmp_path, 8, {"wandb_id": "abc"})
    check_tracking(online, tmp_path, fresh=False)
    with pytest.raises(ValueError, match="no W&B key"):
        check_tracking(online, tmp_path, fresh=True)
    check_tracking(off, tmp_path, fresh=True)
    (checkpoints_dir(tmp_path) / step_name(12)).mkdir()  # torn: the one before counts
    check_tracking(online, tmp_path, fresh=False)


def test_who_holds_the_directory_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank of a killed gang lives some seconds longer."""
    held, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with run_lock(tmp_path):
            held.set()
            leave.wait(10)

    other = threading.Thread(target=hold)
    other.start()
    assert held.wait(10)
    monkeypatch.setattr(run_directory, "_LOCK_WAIT_S", 0.0)
    with pytest.raises(LockedError, match="another `train` is working on"), run_lock(tmp_path):
        pass
    monkeypatch.setattr(run_directory, "_LOCK_WAIT_S", 10.0)
    threading.Timer(0.2, leave.set).start()
    with run_lock(tmp_path):
        other.join(10)
        assert not other.is_alive()


def test_a_file_system_without_locks_is_told_at_once_and_accuses_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(run_directory.time, "sleep", lambda _: pytest.fail("waited"))
    with pytest.raises(DataError, match=r"gives no locks \(No locks available\).*Lustre: option flock") as told:
        run_lock(tmp_path).__enter__()
    assert "another `train`" not in str(told.value)
