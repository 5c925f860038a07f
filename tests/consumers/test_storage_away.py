"""A checkpoint that cannot be seen for a moment is neither missing nor damaged: no earlier one must take its place."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from written_checkpoint import write_bare_checkpoint

from consumers.checkpoint import share_of_faults
from consumers.checkpoint_files import STATE, checkpoints_dir, list_checkpoints, step_name
from consumers.ranks import Ranks
from qwenimg_dist import patience
from qwenimg_dist.patience import StorageAwayError

ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for step in (4, 8):
        write_bare_checkpoint(tmp_path, step, {})
    return tmp_path


def stale(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, word: str, *, times: int) -> None:
    """The first calls of a function on a path with this word in it raise ESTALE; waiting takes no time."""
    real: Callable[..., Any] = getattr(owner, name)
    left = [times]

    def call(path: Any, *args: Any, **options: Any) -> Any:
        if word in str(path) and left[0] > 0:
            left[0] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(owner, name, call)
    monkeypatch.setattr(patience, "PAUSES_S", (0.0,) * 3)


PLACES = [(os, "listdir", "checkpoints"), (Path, "read_text", "manifest"), (Path, "stat", "rank-00000")]


@pytest.mark.parametrize(("owner", "name", "word"), PLACES)
def test_a_moment_is_waited_for(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, word: str
) -> None:
    stale(monkeypatch, owner, name, word, times=3)
    assert [(info.step, info.fault) for info in list_checkpoints(run_dir)] == [(4, None), (8, None)]


@pytest.mark.parametrize(("owner", "name", "word"), PLACES)
def test_what_stays_away_is_no_missing_checkpoint(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, word: str
) -> None:
    stale(monkeypatch, owner, name, word, times=99)
    with pytest.raises(StorageAwayError, match="Stale file handle"):
        list_checkpoints(run_dir)


def test_nor_is_it_a_damaged_one(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = checkpoints_dir(run_dir) / step_name(8)
    assert share_of_faults(newest, ALONE) is None
    stale(monkeypatch, Path, "stat", STATE, times=99)
    with pytest.raises(StorageAwayError):
        share_of_faults(newest, ALONE)


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path) == []
