"""What becomes of a gang that failed: a line in the run's log about it, and how often and how long one is started anew.

Place in the flow: `train.py` hands `Deaths` to Ray Train, whose controller calls it. Ray knows which ranks are gone and
whether its own memory monitor ended one; step, stage and the kernel's part are told by the watchdog beside the rank.
Ranks that failed only because another was gone (a collective that lost its peer) are counted, not quoted.

Ray's own limit of restarts is off: it counts over the whole life of a command, and three faults within weeks would end
a run that made progress between them. Here a new checkpoint sets the count back. And where a lost machine is not
replaced Ray would wait for ever, without a word: here it is said what is missing, and the wait ends.

Refuses to count machines that were taken away (preemption) as failures. A stop that is asked for while no gang is there
ends the wait.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import ray
from ray.exceptions import RayActorError, RayError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from producers.deaths import why_died
from qwenimg_dist.config import ClusterConfig
from qwenimg_dist.patience import StorageAwayError, is_seen

_LESS_MEMORY: Final = "run fewer ranks per machine, or lower `micro_batch_tokens` of the phases"
_QUOTED_CHARACTERS: Final = 300
_SHOWN_CAUSE_LINES: Final = 12
_TELL_EVERY_S: Final = 600.0


class GangLostError(RuntimeError):
    """No further gang is started; the message says why."""


class GangStoppedError(RuntimeError):
    """A stop was asked for while no gang was there: nothing was lost."""


class Deaths(WorkerGroupCallback):  # type: ignore[misc]
    """Tells and counts the failures of one command, and the time without a gang. What it raises ends the run.

    Of Ray's developer interface, as its `UserCallback` hears neither of gangs that do not start nor of which gang an
    error is.
    """

    def __init__(self, run_dir: Path, log: Path, stop_file: Path, cluster: ClusterConfig) -> None:
        self._run_dir = run_dir
        self._log = log
        self._stop_file = stop_file
        self._cluster = cluster
        self._failures = 0
        self._told = False
        """Of the present gang: its errors are seen at every look until it is taken down."""
        self._newest = -1
        self._waits_since: float | None = None
        self._missed, self._missed_at = "", 0.0
        """What was told last to be missing, and when."""
        self._had: dict[str, str] = {}

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """Before a gang is placed, and again a minute later for as long as there is no room for it."""
        if is_seen(self._stop_file):
            raise GangStoppedError("stopped while no ranks were there")
        self._told = False
        now = time.monotonic()
        if self._waits_since is None:
            self._waits_since, self._missed = now, ""
            return
        waited_s, limit_s = now - self._waits_since, self._cluster.rank_wait_s
        missing = self._missing(int(worker_group_context.num_workers))
        if limit_s is not None and waited_s >= limit_s:
            line = (
                f"{missing}; waited {_span(waited_s)} (cluster.rank_wait_s={limit_s:g}). The same command goes "
                "on from the newest valid checkpoint, also with fewer ranks"
            )
            self._say(f"not waiting for ranks any longer: {line}")
            raise GangLostError(line)
        if missing != self._missed or now - self._missed_at >= _TELL_EVERY_S:
            self._missed, self._missed_at = missing, now
            until = "for ever (cluster.rank_wait_s)" if limit_s is None else f"up to {_span(limit_s)}"
            self._say(f"waiting for ranks, {_span(waited_s)} so far, {until}: {missing}")

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Every rank's process is there."""
        self._waits_since = None
        self._had = _names()

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """At every look at the ranks, some seconds apart."""
        if self._told or not worker_group_status.errors:
            return
        self._told = True
        causes = {rank: cause_of(error) for rank, error in worker_group_status.errors.items()}
        newest = self._newest_step()
        if newest > self._newest:
            self._newest, self._failures = newest, 0
        taken = any(isinstance(error, RayActorError) and error.preempted for error in causes.values())
        self._failures += not taken
        limit = self._cluster.max_restarts
        what = describe(causes)
        if self._failures > limit:
            line = f"{what}; no restart is left (cluster.max_restarts={limit} without a new checkpoint)"
            self._say(line)
            raise GangLostError("\n  ".join([line, *last_lines(worker_group_status.get_worker_group_error())]))
        start = "a machine was taken away; a restart" if taken else f"restart {self._failures} of {limit}"
        self._say(f"{what}; {start}, from the newest valid checkpoint{f' (step {newest})' if newest >= 0 else ''}")

    def _newest_step(self) -> int:
        """Of the valid checkpoints; -1 without one, or where that cannot be seen."""
        from consumers.checkpoint_files import list_checkpoints

        with contextlib.suppress(OSError, StorageAwayError):
            return max((info.step for info in list_checkpoints(self._run_dir) if info.fault is None), default=-1)
        return -1

    def _missing(self, ranks: int) -> str:
        from qwenimg_dist.commands.train import places

        there = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
        if (room := places(self._cluster, there)) >= ranks:
            return f"there is room for {ranks} ranks, but it is taken, or their processes do not start (see Ray's logs)"
        gone = [name for node, name in self._had.items() if node not in _names()]
        lost = f"; gone: {', '.join(gone)}" if gone else ""
        return f"there is room for {room} of {ranks} ranks on the {len(there)} machines that Ray has{lost}"

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError), open(self._log, "a", encoding="utf-8") as sink:
            sink.write(line + "\n")


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _names() -> dict[str, str]:
    """Node -> name and address of the machines that are there."""
    return {
        node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        for node in ray.nodes()
        if node["Alive"]
    }


def cause_of(error: Exception) -> Exception:
    """Ray wraps the death of a worker process into the health check that noticed it."""
    cause: Exception = getattr(error, "health_check_failure", error)
    return cause


def last_lines(error: BaseException) -> list[str]:
    """Of what the ranks said: Ray nests every rank's whole traceback."""
    return [line for line in str(error).splitlines() if line.strip()][-_SHOWN_CAUSE_LINES:]


def describe(causes: Mapping[int, Exception]) -> str:
    """Which rank failed and why, and how many besides, without a line break."""
    died = {rank: error for rank, error in causes.items() if isinstance(error, RayError)}
    rank, error = min((died or causes).items())
    if isinstance(error, RayError):
        why = why_died(error, who="its process", less_memory=_LESS_MEMORY)
    else:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:_QUOTED_CHARACTERS]
    besides = f", {len(causes) - 1} more failed with it" if len(causes) > 1 else ""
    return f"the gang failed: rank {rank}: {why}{besides}"
