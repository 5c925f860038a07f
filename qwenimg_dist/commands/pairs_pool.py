"""The Ray actors of `pairs`: as many as there are producers, each at one prompt at a time.

Place in the flow: `pairs.py` submits prompts and waits for replies. An actor that died or does not answer for
`cluster.unit_timeout_s` is replaced and its prompt done again, at most `cluster.unit_retries` times. Nothing is left to
Ray's own retries. Prompts are safe to repeat: the same files under the same names.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any, Final

import ray
from ray.exceptions import RayError

from producers.deaths import machine_died, why_died
from producers.pool import check_room
from qwenimg_dist.commands.pairs_actor import Job, PairActor, PromptTask, Reply
from qwenimg_dist.config import ClusterConfig

_PLACED_S: Final = 600.0
"""After this long without a single actor running, waiting for one is of no use."""
_LESS_MEMORY: Final = "lower pairs.batch_size or the pictures' size, or run fewer workers (cluster.producers)"


class PairsError(RuntimeError):
    """Pairs cannot be made; the message says why and what to do."""


@dataclass
class _Slot:
    """One actor and what it is at."""

    actor: Any
    pending: Any
    """The reference waited for: of `ready()` or of a prompt; None when idle."""
    since: float
    task: PromptTask | None = None
    is_ready: bool = False


class Pool:
    """See the module's docstring. Raises ValueError if no machine of the cluster could ever hold an actor."""

    def __init__(self, job: Job, cluster: ClusterConfig) -> None:
        check_room(cluster.model_copy(update={"loaders_per_producer": 0}))  # which `pairs` has no use for
        self._job = job
        self._cluster = cluster
        self._retry: deque[PromptTask] = deque()
        self._failures: Counter[str] = Counter()
        self._slots = [self._start() for _ in range(cluster.producers)]

    def num_idle(self) -> int:
        """Idle actors that no repeated prompt waits for."""
        return max(0, sum(slot.pending is None for slot in self._slots) - len(self._retry))

    @property
    def num_busy(self) -> int:
        """Prompts that are being worked on or wait for their next try."""
        return sum(slot.task is not None for slot in self._slots) + len(self._retry)

    def submit(self, task: PromptTask) -> None:
        """Start a prompt on an idle actor."""
        slot = next(slot for slot in self._slots if slot.pending is None)
        slot.task, slot.since = task, time.monotonic()
        slot.pending = slot.actor.run.remote(task)

    def wait(self, timeout_s: float) -> list[tuple[PromptTask, Reply]]:
        """What ended, nothing if nothing did in time. Raises `PairsError` if a prompt was tried too often."""
        while self._retry and any(slot.pending is None for slot in self._slots):
            self.submit(self._retry.popleft())
        busy = {slot.pending: slot for slot in self._slots if slot.pending is not None}
        if not busy:
            return []
        ended, _ = ray.wait(list(busy), num_returns=1, timeout=timeout_s)
        replies = [reply for one in ended if (reply := self._collect(busy[one])) is not None]
        self._end_silent()
        return replies

    def close(self) -> None:
        """End the actors."""
        for slot in self._slots:
            _end(slot)
        self._slots = []

    def _start(self) -> _Slot:
        actor = (
            ray.remote(PairActor)
            .options(
                num_cpus=self._cluster.cpus_per_producer,
                num_gpus=self._cluster.gpus_per_producer,
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=1,
            )
            .remote(self._job)
        )
        return _Slot(actor=actor, pending=actor.ready.remote(), since=time.monotonic())

    def _collect(self, slot: _Slot) -> tuple[PromptTask, Reply] | None:
        task = slot.task
        try:
            reply = ray.get(slot.pending)
        except RayError as error:
            why = why_died(error, who="the worker", less_memory=_LESS_MEMORY)
            self._replace(slot, why, count=not machine_died(error))
            return None
        slot.pending = slot.task = None
        slot.is_ready = True
        if task is None:
            self._failures["start"] = 0
            return None
        assert isinstance(reply, Reply)
        return task, reply

    def _end_silent(self) -> None:
        now = time.monotonic()
        for slot in self._slots:
            if slot.task is not None and now - slot.since > self._cluster.unit_timeout_s:
                self._replace(slot, f"no answer for cluster.unit_timeout_s={self._cluster.unit_timeout_s:g} s")
        if not any(slot.is_ready for slot in self._slots) and now - max(s.since for s in self._slots) > _PLACED_S:
            raise PairsError(
                f"no worker could be placed for {_PLACED_S:g} s: something else holds the CPUs or GPUs of the cluster; "
                "wait for it, or lower cluster.cpus_per_producer or cluster.gpus_per_producer"
            )

    def _replace(self, slot: _Slot, why: str, *, count: bool = True) -> None:
        _end(slot)
        task = slot.task
        what = task.key if task is not None else "start"
        self._failures[what] += count
        if self._failures[what] > self._cluster.unit_retries:
            told = f"prompt {task.text!r}" if task is not None else "a worker's start"
            raise PairsError(
                f"{told} failed {self._failures[what]} times, last: {why}; what is done is kept. Set "
                "cluster.unit_retries to try more often"
            )
        if task is not None:
            self._retry.append(task)
        fresh = self._start()
        slot.actor, slot.pending, slot.since = fresh.actor, fresh.pending, fresh.since
        slot.task, slot.is_ready = None, False


def _end(slot: _Slot) -> None:
    with contextlib.suppress(RayError, ValueError):
        ray.kill(slot.actor, no_restart=True)


def open_pool(job: Job, cluster: ClusterConfig, num_prompts: int) -> Pool:
    """No more workers than prompts: each loads the whole pipeline."""
    few = max(1, min(cluster.producers, num_prompts))
    return Pool(job, cluster.model_copy(update={"producers": few}))
