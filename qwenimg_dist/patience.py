"""Errors of a file system that are no verdict on a file: tried again for two minutes, and then told apart from one.

Place in the flow: what reads data sets and checkpoints from disks asks here; buckets have a patience of their own
(`storage.py`). A file that is missing, of another size, or on a full disk is found so again by the next try. `Stale
file handle`, `Input/output error` or a lost connection say only that a server was away: on shared storage each of them
comes now and then, on one node of many, and must neither end a run for good nor cost sound samples.

Refuses to wait for what no waiting mends: such errors pass as they are, at once.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from qwenimg_dist.storage import StorageError

PAUSES_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
"""Before the second and further tries."""
_AWAY: Final = frozenset(
    {
        errno.EIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.ENOTCONN,
        errno.ESHUTDOWN,  # Lustre, after it evicted a client
        errno.EREMOTEIO,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
    }
)
_Result = TypeVar("_Result")


class StorageAwayError(RuntimeError):
    """The storage did not answer; a later try may find it back. No OSError: who handles those judges files."""


def is_away(error: BaseException | None) -> bool:
    """Whether an error says that storage was away, and nothing of the file."""
    return isinstance(error, StorageAwayError) or (isinstance(error, OSError) and error.errno in _AWAY)


def is_seen(file: Path) -> bool:
    """Whether a file is there, for who asks again soon: False also where its storage does not answer now."""
    try:
        return file.exists()
    except OSError:
        return False


def patiently(action: Callable[[], _Result], what: str, *, between: Callable[[], None] | None = None) -> _Result:
    """What the action gives, tried again while storage is away; `between` is called before each further try.

    Raises `StorageAwayError`, which names `what`, when it stays away, and any other error as it comes.
    """
    begin = time.monotonic()
    for tries, pause_s in enumerate((*PAUSES_S, None), start=1):
        try:
            return action()
        except OSError as error:
            if not is_away(error):
                raise
            if pause_s is None or isinstance(error, StorageError):  # a bucket was tried often enough already
                raise StorageAwayError(
                    f"{what}: {error.strerror}, in each of {tries} tries within {time.monotonic() - begin:.0f} s: its "
                    "storage does not answer (if all else there can be read, it is this file that is damaged)"
                ) from error
        time.sleep(pause_s)
        if between is not None:
            between()
    raise AssertionError("the last try returns or raises")
