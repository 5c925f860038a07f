"""Keeps the workers of an interrupted `produce` apart from those of the next one.

A driver that is killed leaves its workers alive for a moment. They may still commit a part whose tars the next driver
has just removed as strays. So each worker holds a shared lock for as long as it lives, and strays are removed only when
nobody holds it. The operating system drops the lock with the process. A mark says whether there can be strays at all,
so that a start does not read a large data set for nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

from qwenimg_dist.data.errors import LockedError
from qwenimg_dist.data.facets import DataError, Dataset, take_lock

_POLL_S: Final = 0.1
_MARK: Final = ".writing"


def enter(root: Path) -> IO[str]:
    """Take the shared lock of a worker; it is held until the returned file is closed or the process ends."""
    handle = open(root / ".workers.lock", "a")  # noqa: SIM115 (lives as long as the worker)
    fcntl.flock(handle, fcntl.LOCK_SH)
    return handle


@contextlib.contextmanager
def alone(root: Path, *, timeout_s: float) -> Iterator[None]:
    """While no worker lives. Raises `DataError` if one is still there after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    with open(root / ".workers.lock", "a") as handle:
        while True:
            try:
                take_lock(handle, "workers of an earlier `produce` hold it")
                break
            except LockedError as error:
                if time.monotonic() > deadline:
                    raise DataError(
                        f"workers of an earlier `produce` still write to {root} after {timeout_s:.0f} s: end them "
                        "(`ray stop` on their machines), then run the same command again"
                    ) from error
                time.sleep(_POLL_S)
        yield


def mark(root: Path) -> None:
    """Say that workers begin to write."""
    (root / _MARK).touch()


def sweep(dataset: Dataset, *, timeout_s: float) -> None:
    """Remove what killed workers left, once they are gone. Raises `DataError` if they stay."""
    if (dataset.root / _MARK).exists():
        with alone(dataset.root, timeout_s=timeout_s):
            dataset.clean()
            (dataset.root / _MARK).unlink(missing_ok=True)
