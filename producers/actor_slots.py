"""Ray actors that do one task at a time: who is idle, who answered, who died, who says nothing any more.

Place in the flow: the producers (`pool.py`) and the workers of `pairs` are such actors. One that died or does not
answer for `cluster.unit_timeout_s` is replaced here, and its task handed back: whether it is tried again is for its
owner to say. Nothing is left to Ray's own retries: actors are started with `max_restarts=0` and `max_task_retries=0`,
and answer `ready()` with their `Seat` once they are made. Refuses to wait for what cannot come: a start that fails
before any has come about, or again and again, places that nobody gives back, a cluster without a machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import ray
from ray.exceptions import ActorDiedError, RayError

from producers.deaths import end_actors, machine_died, why_died
from producers.messages import Seat
from producers.ray_cluster import show
from qwenimg_dist.config import ClusterConfig

Task = TypeVar("Task")
Place = TypeVar("Place")

_PLACED_S: Final = 600.0
"""After this long without a single actor running, waiting for one is of no use. Not about loading models: an actor
answers before it does."""
_REST_S: Final = 10.0
"""Before an actor whose start failed is started again, times the failures in a row: a machine that has just joined may
lack its shared storage for a while."""
_RAY_GONE_S: Final = 10.0
"""So often it is asked whether Ray is alive while no actor runs."""


@dataclass
class Slot(Generic[Task, Place]):
    """One actor and what it is at."""

    place: Place
    """What its owner starts it by."""
    actor: Any
    pending: Any
    """The reference waited for: of `ready()` or of a task; None when idle."""
    since: float
    """When that wait began (monotonic seconds)."""
    task: Task | None = None
    seat: Seat | None = None
    """Known once the actor is ready."""
    failed_starts: int = 0
    """Actors in this place, one after the other, that died before they were ready."""


@dataclass(frozen=True, kw_only=True)
class Answer(Generic[Task, Place]):
    """A task's end."""

    slot: Slot[Task, Place]
    task: Task
    reply: Any


@dataclass(frozen=True, kw_only=True)
class Loss(Generic[Task]):
    """A task whose actor is gone, and replaced."""

    task: Task
    why: str
    machine: bool
    """The whole machine went: nothing can be laid to the task's charge."""


class ActorSlots(Generic[Task, Place]):
    """One actor per place."""

    def __init__(
        self,
        places: Sequence[Place],
        cluster: ClusterConfig,
        *,
        start: Callable[[Place], Any],
        run: Callable[[Slot[Task, Place]], Any],
        needs: Mapping[str, float],
        who: str,
        less_memory: str,
        error: type[RuntimeError],
    ) -> None:
        """`start` makes the actor of a place; `run` gives an actor the task of its slot and returns the reference of
        its answer. `needs`: Ray resources of each; `who` it is and `less_memory` are for messages; `error` is raised
        when it is of no use to wait on."""
        self._cluster = cluster
        self._start, self._run = start, run
        self._needs, self._who, self._less_memory, self._error = needs, who, less_memory, error
        self._was_ready = False
        """Some actor of this pool has started well: what all of them need is there."""
        self._resting: list[tuple[float, Slot[Task, Place]]] = []
        """When (monotonic seconds) the actor of which slot is started again."""
        self._ray_asked = time.monotonic()
        self._slots: list[Slot[Task, Place]] = []
        for place in places:
            self._slots.append(self._started(place))

    def __len__(self) -> int:
        return len(self._slots) + len(self._resting)

    @property
    def num_idle(self) -> int:
        return sum(slot.pending is None for slot in self._slots)

    @property
    def num_busy(self) -> int:
        """Actors at a task."""
        return sum(slot.task is not None for slot in self._slots)

    def submit(self, task: Task) -> None:
        """Give it to an idle actor; only while `num_idle > 0`."""
        slot = next(slot for slot in self._slots if slot.pending is None)
        slot.task, slot.since = task, time.monotonic()
        slot.pending = self._run(slot)

    def wait(self, timeout_s: float) -> list[Answer[Task, Place] | Loss[Task]]:
        """What ended, nothing if nothing did in time. Raises `error` where it is of no use to wait on."""
        self._start_rested()
        busy = {slot.pending: slot for slot in self._slots if slot.pending is not None}
        if not busy:
            if self._resting and not self._slots:
                time.sleep(min(timeout_s, 1.0))
            return []
        ended, _ = ray.wait(list(busy), num_returns=1, timeout=timeout_s)
        events = [event for one in ended if (event := self._collect(busy[one])) is not None]
        self._check_placed()
        return [*events, *self._end_silent()]

    def renew(self, slot: Slot[Task, Place]) -> None:
        """End an actor and start another one in its place: what a process holds it may not give back."""
        end_actors([(slot.actor, slot.seat)])
        self._start_in(slot)

    def close(self) -> None:
        """End the actors."""
        end_actors((slot.actor, slot.seat) for slot in self._slots)
        self._slots, self._resting = [], []

    def _start_in(self, slot: Slot[Task, Place]) -> None:
        fresh = self._started(slot.place)
        slot.actor, slot.pending, slot.since, slot.task, slot.seat = fresh.actor, fresh.pending, fresh.since, None, None

    def _started(self, place: Place) -> Slot[Task, Place]:
        actor = self._start(place)
        return Slot(place=place, actor=actor, pending=actor.ready.remote(), since=time.monotonic())

    def _collect(self, slot: Slot[Task, Place]) -> Answer[Task, Place] | Loss[Task] | None:
        """What became of a slot whose reference is there; None if its owner need not know."""
        task = slot.task
        try:
            reply = ray.get(slot.pending)
        except RayError as error:
            return self._lost(slot, error)
        slot.pending = slot.task = None
        if task is None:
            slot.failed_starts, self._was_ready = 0, True
            slot.seat = reply
            return None
        return Answer(slot=slot, task=task, reply=reply)

    def _lost(self, slot: Slot[Task, Place], error: RayError) -> Loss[Task] | None:
        task, machine = slot.task, machine_died(error)
        why = why_died(error, who=f"the {self._who}", less_memory=self._less_memory)
        if task is None:
            init_failed = isinstance(error, ActorDiedError) and error.actor_init_failed
            slot.failed_starts += not machine  # of this place: a machine with many of them fails as often at once
            if (init_failed and not self._was_ready) or slot.failed_starts > self._cluster.unit_retries:
                raise self._error(f"a {self._who} cannot start: {why}")
            if init_failed:
                end_actors([(slot.actor, slot.seat)])
                self._slots.remove(slot)
                self._resting.append((time.monotonic() + _REST_S * slot.failed_starts, slot))
                return None
        self.renew(slot)
        return None if task is None else Loss(task=task, why=why, machine=machine)

    def _start_rested(self) -> None:
        now = time.monotonic()
        due = [slot for at, slot in self._resting if at <= now]
        self._resting = [(at, slot) for at, slot in self._resting if at > now]
        for slot in due:
            self._start_in(slot)
            self._slots.append(slot)

    def _end_silent(self) -> list[Loss[Task]]:
        """Replace actors that have not answered for `cluster.unit_timeout_s`."""
        limit, lost = self._cluster.unit_timeout_s, []
        for slot in self._slots:
            if (task := slot.task) is not None and time.monotonic() - slot.since > limit:
                self.renew(slot)
                lost.append(Loss(task=task, why=f"no answer for cluster.unit_timeout_s={limit:g} s", machine=False))
        return lost

    def _check_placed(self) -> None:
        """Some actors may wait for room as long as others work; if all do, nothing will ever happen."""
        if not self._slots or any(slot.seat is not None for slot in self._slots):
            return
        now = time.monotonic()
        waited = now - max(slot.since for slot in self._slots)
        if waited > _RAY_GONE_S and now - self._ray_asked >= _RAY_GONE_S:
            self._ray_asked = now
            if not any(node["Alive"] for node in ray.nodes()):  # without its daemons Ray would wait for ever
                raise self._error(
                    "no machine of the Ray cluster is alive any more (its raylet was killed, or lost contact); what is "
                    "committed is kept: run the same command again"
                )
        if waited > _PLACED_S:
            raise self._error(
                f"no {self._who} could be placed for {_PLACED_S:g} s: each needs {show(self._needs)}, and of "
                f"{show(ray.cluster_resources())} only {show(ray.available_resources())} is free: wait for what runs "
                "there (a training holds its GPUs until it ends), or lower cluster.cpus_per_producer or "
                "cluster.gpus_per_producer"
            )
