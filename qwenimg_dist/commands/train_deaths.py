"""What Ray Train tells about a gang that failed, as one line in the run's log before the gang starts anew.

Place in the flow: `train.py` hands `Deaths` to Ray Train, whose controller calls it. Ray knows which ranks are gone and
whether its own memory monitor ended one; step, stage and the kernel's part are told by the watchdog beside the rank.
Ranks that failed only because another was gone (a collective that lost its peer) are counted, not quoted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, Final

from ray.exceptions import RayError
from ray.train import UserCallback

from producers.pool import why_died

_LESS_MEMORY: Final = "run fewer ranks per machine, or lower `micro_batch_tokens` of the phases"
_QUOTED_CHARACTERS: Final = 300


class Deaths(UserCallback):  # type: ignore[misc]
    """Counts the failures of one command and writes a line about each to `log`."""

    def __init__(self, log: str, max_restarts: int) -> None:
        self._log = log
        self._max_restarts = max_restarts
        self._failures = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train once per failure of the gang, with what each failed rank raised."""
        self._failures += 1
        with contextlib.suppress(OSError), open(self._log, "a", encoding="utf-8") as sink:
            sink.write(describe(worker_exceptions, self._failures, self._max_restarts) + "\n")


def describe(failed: Mapping[int, Exception], failures: int, max_restarts: int) -> str:
    """One line: which rank failed and why, how many besides, and what follows."""
    # Ray wraps the death of a worker process into the health check that noticed it.
    causes = {rank: getattr(error, "health_check_failure", error) for rank, error in failed.items()}
    died = {rank: error for rank, error in causes.items() if isinstance(error, RayError)}
    rank, error = min((died or causes).items())
    if isinstance(error, RayError):
        why = why_died(error, who="its process", less_memory=_LESS_MEMORY)
    else:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:_QUOTED_CHARACTERS]
    besides = f", {len(failed) - 1} more failed with it" if len(failed) > 1 else ""
    if failures > max_restarts:
        return f"the gang failed: rank {rank}: {why}{besides}; no restart is left (cluster.max_restarts={max_restarts})"
    return (
        f"the gang failed: rank {rank}: {why}{besides}; restart {failures} of {max_restarts}, from the newest "
        "valid checkpoint"
    )
