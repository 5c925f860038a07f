"""A fresh start in a run directory that has results: all of them go aside, each once; and what is said before one."""

from __future__ import annotations

from pathlib import Path

import pytest
from written_checkpoint import write_bare_checkpoint

from consumers.checkpoint_files import checkpoints_dir, step_name
from consumers.run_directory import _MOVED_BY_FRESH, check_tracking, move_aside
from qwenimg_dist.compose import load_config


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
