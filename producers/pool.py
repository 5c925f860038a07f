"""The pool of Ray actors that do the units' work, and what becomes of a unit when its actor dies.

Place in the flow: `driver.py` sees it as `Workers`. Ray carries control messages only. A dead or silent actor is
replaced (`actor_slots.py`), its task is tried again on another, and after `cluster.unit_retries` further tries the
error names the unit and the cause. Units are safe to repeat, also while the first try still runs: only one can commit.
A repeated task is a careful one, which finds the picture that kills its process (`poison.py`); deaths that bring it
nearer to that picture are no failures of the unit. Neither are deaths of whole machines, up to a number that is no
chance any more.

With `cluster.loaders_per_producer` the actors here are loaders, and each producer is an encoder beside them
(`encoder_group.py`). A picture still kills only the loader that opens it. When an encoder dies, the units that its
loaders were at are tried again with another one; since it cannot be known which of them it was, each counts a failure.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import ray

from producers.actor import Job, Reply, UnitActor
from producers.actor_slots import ActorSlots, Answer, Loss, Slot
from producers.deaths import LESS_MEMORY
from producers.encoder_group import EncoderGroup
from producers.poison import Trail, read_trail, trail_file
from producers.ray_cluster import check_room, needs
from producers.workers import Outcome, ProduceError, Task
from qwenimg_dist.config import ClusterConfig

_MACHINES_LOST: Final = 20
"""So often a task may lose its machine, with loaders twice at a time: a spot machine's end is nobody's fault, but a
unit that takes every machine with it must end the run."""


@dataclass
class _Place:
    """Where an actor is started; a loader has a group, and what it was told of it."""

    group: EncoderGroup | None = None
    index: int = 0
    """Of the loader in its group."""
    encoder: Any = None
    """That the task was told."""


class RayWorkers:
    """`Workers` as Ray actors. Raises ValueError if no machine of the cluster could ever hold one."""

    def __init__(self, job: Job, cluster: ClusterConfig) -> None:
        check_room(cluster)
        self._job = job
        self._cluster = cluster
        self._groups: list[EncoderGroup] = []
        self._retry: deque[Task] = deque()
        self._failures: Counter[tuple[str, int]] = Counter()
        self._machines_lost: Counter[tuple[str, int]] = Counter()
        self._slots = ActorSlots[Task, _Place](
            self._places(),
            cluster,
            start=self._start,
            run=_run,
            needs=needs(cluster),
            who="producer",
            less_memory=LESS_MEMORY,
            error=ProduceError,
        )

    @property
    def num_workers(self) -> int:
        return len(self._slots)

    def num_idle(self) -> int:
        """Idle actors that no repeated task waits for."""
        return max(0, self._slots.num_idle - len(self._retry))

    def submit(self, task: Task) -> None:
        """Start a task on an idle actor."""
        if self._trail(task) is not None:  # of this run or of one that was ended
            task = replace(task, careful=True)
        self._slots.submit(task)

    def wait(self, timeout_s: float) -> Sequence[Outcome]:
        """See `Workers.wait`."""
        while self._retry and self._slots.num_idle:
            self.submit(self._retry.popleft())
        outcomes = []
        for event in self._slots.wait(timeout_s):
            if isinstance(event, Loss):
                self._again(event.task, event.why, careful=not event.machine, machine=event.machine)
            elif (outcome := self._answered(event)) is not None:
                outcomes.append(outcome)
        return outcomes

    def close(self) -> None:
        """End the actors. What they have not committed is done again another time."""
        self._slots.close()
        for group in self._groups:
            group.close()
        self._groups = []

    def _places(self) -> list[_Place]:
        if not self._cluster.loaders_per_producer:
            return [_Place() for _ in range(self._cluster.producers)]
        self._groups = [EncoderGroup(self._job, self._cluster) for _ in range(self._cluster.producers)]
        # One of each group before the second of any, so that the first tasks have an encoder each.
        return [_Place(group, n) for n in range(self._cluster.loaders_per_producer) for group in self._groups]

    def _start(self, place: _Place) -> Any:
        where = {"num_cpus": self._cluster.cpus_per_producer, "num_gpus": self._cluster.gpus_per_producer}
        options = where if place.group is None else place.group.loader_options(place.index)
        return (
            ray.remote(UnitActor)
            .options(**options, max_restarts=0, max_task_retries=0, max_concurrency=1)
            .remote(self._job if place.group is None else place.group.loader_job)
        )

    def _answered(self, answer: Answer[Task, _Place]) -> Outcome | None:
        """The outcome; None if the task is to be tried again."""
        task, reply = answer.task, answer.reply
        assert isinstance(reply, Reply)
        if reply.failure is None:
            return reply.outcome
        if reply.failure.kind == "full_disk":
            raise ProduceError(
                f"unit {task.unit}: the disk of the data set is full ({reply.failure.message}); what is committed is "
                "kept: make room and run the same command again"
            )
        if reply.failure.kind == "fatal":
            raise ProduceError(f"unit {task.unit}: {task.kind} failed: {reply.failure.message}\n{reply.failure.trace}")
        if reply.failure.kind == "out_of_memory":
            # What it holds it may not give back: a fresh process starts with little.
            self._slots.renew(answer.slot)
            why = f"the producer ran out of memory ({reply.failure.message}): {LESS_MEMORY}"
            self._again(task, why, careful=True)
            return None
        if reply.failure.kind == "encoder_gone":
            place = answer.slot.place
            assert place.group is not None  # only loaders have an encoder elsewhere
            place.group.replace(place.encoder)
        self._again(task, reply.failure.message, machine=reply.failure.machine)
        return None

    def _again(self, task: Task, why: str, *, careful: bool = False, machine: bool = False) -> None:
        """Try the task once more, or raise if it was tried often enough."""
        trail = self._trail(task)
        if machine:
            self._machines_lost[task.kind, task.unit] += 1
            if (lost := self._machines_lost[task.kind, task.unit]) > _MACHINES_LOST:
                raise ProduceError(
                    f"unit {task.unit}: {task.kind} lost its machine {lost} times, last: {why}; what is committed is "
                    "kept. If other units go well, its pictures take more memory than a machine has: "
                    f"{LESS_MEMORY}; else the machines do not last for one unit"
                )
        # Each such death counts against a picture, and of these only so many are believed.
        elif not (task.careful and careful and trail is not None and trail.opening is not None):
            self._failures[task.kind, task.unit] += 1
        failures = self._failures[task.kind, task.unit]
        if failures > self._cluster.unit_retries:
            raise ProduceError(
                f"unit {task.unit}: {task.kind} failed {failures} times, last: {why}; what is committed is kept. Set "
                "cluster.unit_retries to try more often"
            )
        self._retry.append(
            replace(task, careful=task.careful or careful, why=why.partition(" [")[0] if careful else "")
        )

    def _trail(self, task: Task) -> Trail | None:
        return read_trail(trail_file(Path(self._job.data_path), task.kind, task.unit))


def _run(slot: Slot[Task, _Place]) -> Any:
    """Give the actor its task, a loader also the encoder that counts now."""
    place = slot.place
    place.encoder = place.group.encoder if place.group is not None else None
    return slot.actor.run.remote(slot.task, place.encoder)
