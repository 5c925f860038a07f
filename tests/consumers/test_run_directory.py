"""A fresh start in a run directory that has results: all of them go aside, each once; and what is said before one."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from small_run import overrides
from written_checkpoint import write_bare_checkpoint

from consumers import checkpoint_files, run_directory
from consumers.checkpoint import share_of_faults
from consumers.checkpoint_files import STATE, checkpoint_bytes, checkpoints_dir, rank_file, space_fault, step_name
from consumers.ranks import Ranks
from consumers.run_directory import _MOVED_BY_FRESH, check_tracking, move_aside, preflight, run_lock
from qwenimg_dist.commands.train import already_ended
from qwenimg_dist.compose import load_config
from qwenimg_dist.data.errors import DataError, LockedError
from qwenimg_dist.models.safetensors_directory import SafetensorsDirectory


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


def test_a_state_that_cannot_be_read_is_left_to_the_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the size that the manifest lists, so only the resume, which hashes it, goes on from the one before."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    write_bare_checkpoint(tmp_path, 4, {"wandb_id": "abc"})
    state = write_bare_checkpoint(tmp_path, 8, {"wandb_id": "abc"}) / STATE
    state.write_bytes(bytes(state.stat().st_size))
    check_tracking(load_config(["logger=online"]), tmp_path, fresh=False)
    check_tracking(load_config([]), tmp_path, fresh=False)
    ended = load_config(["train.steps=8"])
    assert already_ended(ended, tmp_path) is None
    assert share_of_faults(state.parent, Ranks(rank=0, world_size=1, device=torch.device("cpu")))
    assert already_ended(load_config(["train.steps=4"]), tmp_path) is None
    shutil.rmtree(state.parent)
    assert already_ended(load_config(["train.steps=4"]), tmp_path) is not None


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


def test_what_a_killed_save_has_left_is_no_lack_of_room(
    small_input: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk with room for one checkpoint more: the rank that died half-way through it must not keep the run from
    going on, as the next save removes what it left."""
    (tmp_path / "pipeline").symlink_to(small_input / "pipeline")
    (tmp_path / "data").symlink_to(small_input / "data")
    config = load_config(overrides(tmp_path))
    transformer = SafetensorsDirectory(tmp_path / "pipeline" / "transformer")
    size = checkpoint_bytes(sum(math.prod(transformer.shape(name)) for name in transformer.names), ema=True)
    monkeypatch.setattr(checkpoint_files, "free_bytes", lambda _: size // 2)
    write_bare_checkpoint(tmp_path / "run", 4, {})
    with pytest.raises(ValueError, match=r"the disk is too full: one checkpoint in .* needs"):
        preflight(config)
    torn = checkpoints_dir(tmp_path / "run") / f".tmp-{step_name(8)}-0a1b2c3d"
    torn.mkdir()
    with open(torn / rank_file(0, 1), "wb") as sink:
        sink.truncate(size)  # of a fetch that had just begun: nothing of it is on the disk
    with pytest.raises(ValueError, match="the disk is too full"):
        preflight(config)
    (torn / rank_file(1, 2)).write_bytes(b"w" * (size * 6 // 10))
    preflight(config)
    assert torn.is_dir()  # it writes nothing
    assert space_fault(tmp_path / "run", size, ema=True)  # a save, which has removed what it can, goes by what is free

    aside = move_aside(tmp_path / "run")
    assert aside is not None
    assert [one.name for one in checkpoints_dir(aside).iterdir()] == [step_name(4)]
