"""Storage that is away is waited for, and told apart from a verdict on a file; what no waiting mends passes at once."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from qwenimg_dist import patience
from qwenimg_dist.patience import StorageAwayError, is_away, is_seen, patiently
from qwenimg_dist.storage import ObjectChangedError, StorageError


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    pauses: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", pauses.append)
    return pauses


def failing(times: int, *, number: int) -> Callable[[], str]:
    left = [times]

    def action() -> str:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(number, os.strerror(number))
        return "read"

    return action


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN])
def test_storage_that_comes_back_within_two_minutes_costs_nothing_but_the_wait(slept: list[float], number: int) -> None:
    again: list[int] = []
    assert patiently(failing(7, number=number), "a.tar", between=lambda: again.append(1)) == "read"
    assert sum(slept) == 120
    assert len(again) == 7


def test_storage_that_stays_away_is_told_as_such(slept: list[float]) -> None:
    with pytest.raises(StorageAwayError, match=r"a\.tar: Stale file handle, in each of 8 tries .* does not answer"):
        patiently(failing(8, number=errno.ESTALE), "a.tar")
    assert sum(slept) == 120


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOSPC, errno.EACCES, errno.EISDIR])
def test_a_verdict_passes_at_once(slept: list[float], number: int) -> None:
    with pytest.raises(OSError, match=os.strerror(number)):
        patiently(failing(1, number=number), "a.tar")
    assert not slept


def test_a_bucket_was_tried_often_enough_already(slept: list[float]) -> None:
    def look() -> None:
        raise StorageError(errno.EIO, "could not look at a.tar after 13 tries (SlowDown)", "s3://b/a")

    with pytest.raises(StorageAwayError, match="SlowDown"):
        patiently(look, "a.tar")
    assert not slept


def test_what_is_away_and_what_is_not() -> None:
    assert is_away(pickle.loads(pickle.dumps(StorageAwayError("a.tar: Stale file handle"))))
    assert not is_away(ObjectChangedError(errno.EBADMSG, "has 4 bytes, 5 were committed", "s3://b/a"))
    assert not is_away(ValueError("a"))
    assert not is_away(None)


def test_what_cannot_be_seen_now_is_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").touch()
    assert (is_seen(tmp_path / "a"), is_seen(tmp_path / "b")) == (True, False)

    def no_answer(_: Path) -> bool:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "exists", no_answer)
    assert not is_seen(tmp_path / "a")
