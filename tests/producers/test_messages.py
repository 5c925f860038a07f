"""What went wrong in an actor is told by its kind."""

from __future__ import annotations

import errno

from producers.messages import describe_failure
from qwenimg_dist.patience import StorageAwayError


def test_a_lack_of_memory_is_told_from_a_bug() -> None:
    lacks = [MemoryError(), RuntimeError("could not create a primitive"), OSError(errno.ENOMEM, "no memory")]
    lacks.append(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"))
    assert {describe_failure(error).kind for error in lacks} == {"out_of_memory"}
    assert describe_failure(OSError(errno.ENOSPC, "full")).kind == "full_disk"
    assert describe_failure(RuntimeError("shape mismatch")).kind == "fatal"


def test_storage_that_is_away_is_of_the_moment() -> None:
    away = [OSError(errno.ESTALE, "Stale file handle"), StorageAwayError("unit 3: in each of 8 tries")]
    assert {describe_failure(error).kind for error in away} == {"try_again"}
