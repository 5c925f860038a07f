"""How Ray actors end: why one died, as far as it can be known, and ending one for certain.

Place in the flow: `pool.py` and `encoder_group.py` ask here, and so do the other pools of actors (pairs, rewards).
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from typing import Any, Final

import ray
from ray.exceptions import ActorDiedError, NodeDiedError, OutOfMemoryError, RayActorError, RayError

from producers.messages import Seat, process_mark

LESS_MEMORY: Final = "lower encode.image_batch_pixels or filters.resolution.max_pixels, or run fewer producers"
_END_S: Final = 2.0
"""What an actor that was told to end has for it before it is killed."""


def end_actors(actors: Iterable[tuple[Any, Seat | None]]) -> None:
    """End actors, given with their seat where it is known.

    Ray asks the processes to end themselves, which a hung one does not hear; on this machine it is killed besides. Not
    at once: Ray reports a process that is killed while it ends as one that crashed. Other machines and containers may
    have processes with the same number, under the same host name, and so may this one once the actor is dead: only
    what bears the seat's mark is killed.
    """
    left: set[Seat] = set()
    for actor, seat in actors:
        with contextlib.suppress(RayError, ValueError):
            ray.kill(actor, no_restart=True)
        if seat is not None:
            left.add(seat)
    deadline = time.monotonic() + _END_S
    while (left := {seat for seat in left if _is_here(seat)}) and time.monotonic() < deadline:
        time.sleep(0.02)
    for seat in left:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(seat.pid, signal.SIGKILL)


def _is_here(seat: Seat) -> bool:
    """Whether the process is one of this machine, seen from here, and still the same."""
    return bool(seat.mark) and process_mark(seat.pid) == seat.mark


def why_died(error: RayError, *, who: str = "the producer", less_memory: str = LESS_MEMORY) -> str:
    """What Ray tells about the end of an actor (`who`), as far as it tells.

    Its message for any process that is suddenly gone lists OOM, `ray stop` and SIGSEGV as possible causes: that list is
    cut off, since it says nothing about this case. A kernel OOM kill and another SIGKILL look alike to Ray.
    """
    text = " ".join(str(error).split())
    for guesses in ("Some common causes include", "There are some potential root causes"):
        text = text.partition(guesses)[0]
    if isinstance(error, OutOfMemoryError) or "running low on memory" in text:
        cause = f"Ray ended {who} because its machine ran out of memory: {less_memory}"
    elif isinstance(error, ActorDiedError) and error.preempted:
        cause = "its machine was taken away"
    elif isinstance(error, ActorDiedError) and error.actor_init_failed:
        cause = "its start failed"
    elif machine_died(error):
        cause = "its machine died or lost contact"
    elif isinstance(error, RayActorError):
        cause = f"{who} was killed (SIGKILL, or the kernel for lack of memory) or crashed in native code"
    else:
        cause = "Ray could not run it"
    return f"{cause} [{text[:400]}]"


def machine_died(error: RayError) -> bool:
    """Whether the whole machine went, so that nothing can be laid to the task's charge."""
    text = str(error)
    preempted = isinstance(error, ActorDiedError) and bool(error.preempted)
    return preempted or isinstance(error, NodeDiedError) or "node died" in text or "node has died" in text
