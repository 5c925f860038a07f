"""What actors tell about themselves: where they run, and what went wrong, as a small message with a kind.

Place in the flow: `actor.py` and `encoder_actor.py` answer with a `Failure`, never with a pickled exception; `pool.py`
decides by its kind what becomes of the task. Knows no Ray.
"""

from __future__ import annotations

import errno
import os
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from producers.commit import UnitConflictError
from producers.sources.base import SourceGoneError
from qwenimg_dist.patience import StorageAwayError

FailureKind = Literal["full_disk", "out_of_memory", "try_again", "encoder_gone", "fatal"]
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# torch has no class of its own for this: its allocator, oneDNN and the standard library, in this order.
_NO_MEMORY: Final = ("can't allocate memory", "could not create a primitive", "bad_alloc")


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Where an actor runs."""

    pid: int
    mark: str
    """See `process_mark`."""


def own_seat() -> Seat:
    """Of the process that asks."""
    return Seat(pid=os.getpid(), mark=process_mark(os.getpid()))


def process_mark(pid: int) -> str:
    """What no other process has, of any machine, container or time: its machine's boot, pid namespace and start. Empty
    where this process sees none with this number (or is not on Linux)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name before may hold spaces
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {fields[19]}"
    except (OSError, IndexError):
        return ""


@dataclass(frozen=True, kw_only=True)
class Failure:
    kind: FailureKind
    message: str
    trace: str
    machine: bool = False
    """A whole machine went, and that is all: nothing can be laid to the task's charge."""


class EncoderGoneError(RuntimeError):
    """The encoder that a loader feeds died, or does not answer. Nothing is wrong with the loader, nor with its unit."""

    def __init__(self, message: str, *, machine: bool = False) -> None:
        super().__init__(message)
        self.machine = machine
        """It went with its whole machine."""


class EncoderFailedError(RuntimeError):
    """The encoder lives and says that it could not do what it was asked."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def describe_failure(error: Exception) -> Failure:
    """Which kind it is: a full disk ends everything, a process out of memory is replaced, what the moment brought is
    tried again, the rest is a bug or unusable input."""
    if isinstance(error, EncoderFailedError):
        # It is the encoder's process that has no memory left: that one is replaced, not the loader's.
        gone = error.failure.kind == "out_of_memory"
        return replace(error.failure, kind="encoder_gone") if gone else error.failure
    kind: FailureKind = "fatal"
    if (isinstance(error, OSError) and error.errno in _FULL) or "No space left on device" in str(error):
        kind = "full_disk"
    elif isinstance(error, EncoderGoneError):
        return Failure(kind="encoder_gone", message=str(error), trace="", machine=error.machine)
    elif _is_out_of_memory(error):
        kind = "out_of_memory"
    elif isinstance(error, UnitConflictError | SourceGoneError | StorageAwayError | OSError):
        kind = "try_again"
    message = " ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])  # they name row and file
    return Failure(kind=kind, message=message, trace=traceback.format_exc())


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    )
