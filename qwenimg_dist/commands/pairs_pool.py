"""The Ray actors of `pairs`: as many as there are producers, each at one prompt at a time.

Place in the flow: `pairs.py` submits prompts and waits for replies. An actor that died, does not answer for
`cluster.unit_timeout_s` (`producers/actor_slots.py`) or says that its process failed is replaced and its prompt done
again, at most `cluster.unit_retries` times. Prompts are safe to repeat: the same files under the same names.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Any, Final

import ray

from producers.actor_slots import ActorSlots, Loss, Slot
from producers.ray_cluster import check_room, needs
from qwenimg_dist.commands.pairs_actor import Job, PairActor, PromptTask, Reply
from qwenimg_dist.config import ClusterConfig

_LESS_MEMORY: Final = "lower pairs.batch_size or the pictures' size, or run fewer workers (cluster.producers)"


class PairsError(RuntimeError):
    """Pairs cannot be made; the message says why and what to do."""


class Pool:
    """See the module's docstring. Raises ValueError if no machine of the cluster could ever hold an actor."""

    def __init__(self, job: Job, cluster: ClusterConfig) -> None:
        cluster = cluster.model_copy(update={"loaders_per_producer": 0})  # which `pairs` has no use for
        check_room(cluster)
        self._job = job
        self._cluster = cluster
        self._retry: deque[PromptTask] = deque()
        self._failures: Counter[str] = Counter()
        self._slots = ActorSlots[PromptTask, None](
            [None] * cluster.producers,
            cluster,
            start=self._start,
            run=_run,
            needs=needs(cluster),
            who="worker",
            less_memory=_LESS_MEMORY,
            error=PairsError,
        )

    def num_idle(self) -> int:
        """Idle actors that no repeated prompt waits for."""
        return max(0, self._slots.num_idle - len(self._retry))

    @property
    def num_busy(self) -> int:
        """Prompts that are being worked on or wait for their next try."""
        return self._slots.num_busy + len(self._retry)

    def submit(self, task: PromptTask) -> None:
        """Start a prompt on an idle actor."""
        self._slots.submit(task)

    def wait(self, timeout_s: float) -> list[tuple[PromptTask, Reply]]:
        """What ended, nothing if nothing did in time. Raises `PairsError` if a prompt was tried too often."""
        while self._retry and self._slots.num_idle:
            self.submit(self._retry.popleft())
        replies = []
        for event in self._slots.wait(timeout_s):
            if isinstance(event, Loss):
                self._again(event.task, event.why, machine=event.machine)
                continue
            reply = event.reply
            assert isinstance(reply, Reply)
            if reply.outcome == "lost":
                # What it holds it may not give back: a broken CUDA context, memory.
                self._slots.renew(event.slot)
                self._again(event.task, _with_way_out(reply.notes[0]), trace=reply.trace)
            else:
                replies.append((event.task, reply))
        return replies

    def close(self) -> None:
        """End the actors."""
        self._slots.close()

    def _start(self, _: None) -> Any:
        return (
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

    def _again(self, task: PromptTask, why: str, *, machine: bool = False, trace: str = "") -> None:
        self._failures[task.key] += not machine
        if (failures := self._failures[task.key]) > self._cluster.unit_retries:
            raise PairsError(
                f"prompt {task.text!r} failed {failures} times, last: {why}; what is done is kept. Set "
                f"cluster.unit_retries to try more often\n{trace}".rstrip()
            )
        self._retry.append(task)


def _with_way_out(why: str) -> str:
    """torch's own error, and Python's."""
    return f"{why}: {_LESS_MEMORY}" if why.startswith(("OutOfMemoryError", "MemoryError")) else why


def _run(slot: Slot[PromptTask, None]) -> Any:
    return slot.actor.run.remote(slot.task)


def open_pool(job: Job, cluster: ClusterConfig, num_prompts: int) -> Pool:
    """No more workers than prompts: each loads the whole pipeline."""
    few = max(1, min(cluster.producers, num_prompts))
    return Pool(job, cluster.model_copy(update={"producers": few}))
