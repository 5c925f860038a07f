"""Storage that does not answer the driver or the controller for a moment, while the ranks work on."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any, NoReturn

import pytest
from rich.console import Console

from qwenimg_dist.commands import train_display
from qwenimg_dist.commands.train import Training
from qwenimg_dist.commands.train_deaths import Deaths
from qwenimg_dist.commands.train_display import TrainDisplay
from qwenimg_dist.commands.train_rank import LOG_FILE, stop_asked
from qwenimg_dist.compose import load_config
from qwenimg_dist.config import ClusterConfig


def no_answer(*_: Any, **__: Any) -> NoReturn:
    raise OSError(errno.EIO, "Input/output error")


def away(patch: pytest.MonkeyPatch) -> None:
    for name in ("stat", "exists", "touch", "unlink"):
        patch.setattr(Path, name, no_answer)
    patch.setattr(train_display, "open", no_answer, raising=False)


def test_lines_that_cannot_be_read_now_are_shown_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / LOG_FILE
    display = TrainDisplay(Console(), log, num_steps=3)
    display.update()  # no log yet
    log.write_text("step 1/3 loss 1\nstep 2/3 lo")
    with monkeypatch.context() as patch:
        away(patch)
        display.update()
        assert not display.heard
    display.update()
    log.write_text("step 1/3 loss 1\nstep 2/3 loss 2\n")
    display.update()
    assert capsys.readouterr().out.splitlines() == ["step 1/3 loss 1", "step 2/3 loss 2"]


def test_a_stop_that_cannot_be_written_now_is_written_at_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Training(load_config([]), tmp_path) as training:
        training._display.heard = True
        with monkeypatch.context() as patch:
            away(patch)
            training.stop()
        assert not training._stop_file.exists()
        training.stop()
        assert training._stop_file.exists()
        training.stop()
        assert capsys.readouterr().err.count("stopping: the ranks save and end") == 1
        monkeypatch.setattr(Path, "unlink", no_answer)  # at the end: what the run has come to is still told


def test_a_gang_starts_anew_though_the_storage_that_ended_it_is_still_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaths = Deaths(tmp_path, tmp_path / LOG_FILE, tmp_path / ".stop-1", ClusterConfig())
    away(monkeypatch)
    deaths.before_worker_group_start(None)


def test_a_rank_that_cannot_see_whether_it_is_to_stop_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = tmp_path / ".stop-1"
    stop.touch()
    with monkeypatch.context() as patch:
        away(patch)
        assert not stop_asked(stop, None)
        assert stop_asked(stop, lambda: True)  # it is taken away
    assert stop_asked(stop, None)
    assert not stop_asked(tmp_path / ".stop-2", lambda: False)
