"""The count of samples that could not be read: its limit, also where fewer are allowed than a checkpoint has had."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from consumers.bad_samples import FILE, _note, next_batch
from consumers.errors import TrainingError
from consumers.hooks import Hooks
from consumers.ranks import AgreedError, Ranks
from consumers.session import Progress
from qwenimg_dist.data.errors import DataError
from qwenimg_dist.metrics import JsonLines
from qwenimg_dist.patience import StorageAwayError
from qwenimg_dist.storage import StorageError


def session(run_dir: Path, allowed: int, known: set[str]) -> Any:
    return SimpleNamespace(
        run_dir=run_dir,
        ranks=Ranks(rank=0, world_size=1, device="cpu"),  # type: ignore[arg-type]
        hooks=Hooks(),
        progress=Progress(step=4, bad_keys=known),
        config=SimpleNamespace(data=SimpleNamespace(max_bad_samples=allowed)),
    )


class Unreadable:
    """A stream whose batches cannot be read."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def get(self, step: int) -> Any:
        raise self._error


@pytest.mark.parametrize(
    ("met", "raised"),
    [
        (DataError("a.tar has 5 bytes, 6 were committed"), AgreedError),
        (OSError(errno.ENOSPC, "No space left on device"), AgreedError),
        (OSError(errno.ESTALE, "Stale file handle"), StorageAwayError),
        (StorageError(errno.EIO, "could not read a.tar after 13 tries", "s3://b/a"), StorageAwayError),
        (StorageAwayError("a.tar: Input/output error"), StorageAwayError),
    ],
)
def test_storage_that_was_away_starts_the_gang_anew_and_counts_no_sample(
    tmp_path: Path, met: Exception, raised: type[Exception]
) -> None:
    run = session(tmp_path, 5, set())
    run.stream = Unreadable(met)
    with pytest.raises(raised, match=re.escape(str(met))) as told:
        next_batch(run)
    assert type(told.value) is raised
    assert not run.progress.bad_keys


def missed(*keys: str) -> list[dict[str, Any]]:
    return [{"key": key, "slot": slot, "problem": f"{key} cannot be read"} for slot, key in enumerate(keys)]


def test_different_samples_are_counted_and_the_first_too_many_is_named(tmp_path: Path) -> None:
    run = session(tmp_path, 2, set())
    _note(run, missed("a", "b"))
    _note(run, missed("b"))
    assert run.progress.bad_keys == {"a", "b"}
    with pytest.raises(
        ValueError, match=r"3 samples .* up to step 5, data.max_bad_samples=2: c cannot be read"
    ) as told:
        _note(run, missed("c"))
    assert str(tmp_path / FILE) in str(told.value)


@pytest.mark.parametrize("again", [("a",), ()])
def test_fewer_are_allowed_than_the_checkpoint_has_had(tmp_path: Path, again: tuple[str, ...]) -> None:
    """A known one comes again, or one is met in a slot that only fills the batch: nothing new, and still too many."""
    with pytest.raises(ValueError, match=r"3 samples could not be read up to step 5, data.max_bad_samples=1"):
        _note(session(tmp_path, 1, {"a", "b", "c"}), missed(*again))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_what_cannot_be_written_down_ends_the_run_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / FILE).symlink_to("/dev/full")
    with pytest.raises(TrainingError, match=r"cannot be written down: .*bad_samples.jsonl: No space left on device"):
        _note(session(tmp_path, 2, set()), missed("a"))


def test_storage_that_is_away_when_it_is_written_down_starts_the_gang_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no room to be made, and a restart finds it back."""

    def stale(*_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(JsonLines, "write", stale)
    with pytest.raises(StorageAwayError, match=r"cannot be written down: .*bad_samples\.jsonl: Stale file handle$"):
        _note(session(tmp_path, 2, set()), missed("a"))
