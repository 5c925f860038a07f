"""The pool of Ray actors that do the units' work, and what happens when one of them dies.

Place in the flow: `driver.py` sees it as `Workers`. Ray carries control messages only. Nothing is left to Ray's own
retries (`max_restarts=0`, `max_task_retries=0`): a dead or silent actor is replaced here, its task is tried again on
another, and after `cluster.unit_retries` further tries the error names the unit and the cause. Units are safe to
repeat, also while the first try still runs: only one can commit. A repeated task is a careful one, which finds the
picture that kills its process (`poison.py`); deaths that bring it nearer to that picture are no failures of the unit.

With `cluster.loaders_per_producer` the actors here are loaders, and each producer is an encoder beside them
(`encoder_group.py`). A picture still kills only the loader that opens it. When an encoder dies, the units that its
loaders were at are tried again with another one; since it cannot be known which of them it was, each counts a failure.

The driver's process reserves no GPU, and must not touch CUDA.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import ray
from ray.exceptions import ActorDiedError, RayError

from producers import own_ray
from producers.actor import Job, Reply, UnitActor
from producers.deaths import LESS_MEMORY, end_actors, machine_died, why_died
from producers.encoder_group import EncoderGroup
from producers.messages import Seat
from producers.poison import Trail, read_trail, trail_file
from producers.workers import Outcome, ProduceError, Task
from qwenimg_dist.config import ClusterConfig

_PLACED_S: Final = 600.0
"""After this long without a single actor running, waiting for one is of no use. Not about loading models: an actor
answers before it does."""
_RAY_GONE_S: Final = 10.0
"""So often it is asked whether Ray is alive while no actor runs."""


@contextlib.contextmanager
def ray_session(cluster: ClusterConfig, *, cpus: float | None = None) -> Iterator[None]:
    """Ray, started for this process alone and ended with the block, or joined at `cluster.address`; one that runs is
    used.

    `cpus` are what all actors together reserve; None: the producers.
    Inside a submitted job Ray itself names the address (`RAY_ADDRESS`), and that cluster is joined.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "include_dashboard": False}
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    with contextlib.ExitStack() as stack:
        if address is not None:
            quiet.pop("include_dashboard")
            _join(address, quiet)
        else:
            # More actors than CPUs must still start: the user's figure decides, not the machine's.
            cpus = cluster.producers * cluster.producer_cpus if cpus is None else cpus
            num_cpus = max(os.cpu_count() or 1, math.ceil(cpus))
            stack.enter_context(own_ray.private())
            ray.init(
                address="local",
                num_cpus=num_cpus,
                object_store_memory=cluster.object_store_bytes,  # with larger batches Ray puts some of it on disk
                _node_ip_address=own_ray.ADDRESS,
                **quiet,
            )
        stack.callback(ray.shutdown)
        yield


def _join(address: str, quiet: Mapping[str, Any]) -> None:
    """Raises ValueError where no cluster can be found, as on the machine that jobs are submitted from."""
    try:
        ray.init(address=address, **quiet)
    except ConnectionError as error:
        raise ValueError(
            f"no Ray cluster at {address!r} (cluster.address, or RAY_ADDRESS) can be reached from here: run the "
            "command on a machine of the cluster, or there by `ray job submit ... -- python -m qwenimg_dist ...` "
            "(launch/README.md); cluster.address=null starts a Ray here"
        ) from error


@dataclass
class _Slot:
    """One actor and what it is at."""

    actor: Any
    pending: Any
    """The reference waited for: of `ready()` or of a task; None when idle."""
    since: float
    """When that wait began (monotonic seconds)."""
    task: Task | None = None
    seat: Seat | None = None
    """Known once the actor is ready."""
    group: EncoderGroup | None = None
    """Of a loader."""
    index: int = 0
    """Of the loader in its group."""
    encoder: Any = None
    """That the task was told."""

    @property
    def idle(self) -> bool:
        return self.pending is None


class RayWorkers:
    """`Workers` as Ray actors. Raises ValueError if no machine of the cluster could ever hold one."""

    def __init__(self, job: Job, cluster: ClusterConfig) -> None:
        check_room(cluster)
        self._job = job
        self._cluster = cluster
        self._groups: list[EncoderGroup] = []
        self._slots = self._start_all()
        self._retry: deque[Task] = deque()
        self._failures: Counter[tuple[str, int]] = Counter()
        self._deaths_at_start = 0
        self._ray_asked = time.monotonic()

    @property
    def num_workers(self) -> int:
        return len(self._slots)

    def num_idle(self) -> int:
        """Idle actors that no repeated task waits for."""
        return max(0, sum(slot.idle for slot in self._slots) - len(self._retry))

    def submit(self, task: Task) -> None:
        """Start a task on an idle actor."""
        slot = next(slot for slot in self._slots if slot.idle)
        if self._trail(task) is not None:  # of this run or of one that was ended
            task = replace(task, careful=True)
        slot.task, slot.since = task, time.monotonic()
        slot.encoder = slot.group.encoder if slot.group is not None else None
        slot.pending = slot.actor.run.remote(task, slot.encoder)

    def wait(self, timeout_s: float) -> Sequence[Outcome]:
        """See `Workers.wait`."""
        while self._retry and any(slot.idle for slot in self._slots):
            self.submit(self._retry.popleft())
        busy = {slot.pending: slot for slot in self._slots if not slot.idle}
        if not busy:
            return []
        ended, _ = ray.wait(list(busy), num_returns=1, timeout=timeout_s)
        outcomes = [outcome for one in ended if (outcome := self._collect(busy[one])) is not None]
        self._check_placed()
        self._end_silent()
        return outcomes

    def close(self) -> None:
        """End the actors. What they have not committed is done again another time."""
        _end(self._slots)
        self._slots = []
        for group in self._groups:
            group.close()
        self._groups = []

    def _start_all(self) -> list[_Slot]:
        if not self._cluster.loaders_per_producer:
            return [self._start() for _ in range(self._cluster.producers)]
        self._groups = [EncoderGroup(self._job, self._cluster) for _ in range(self._cluster.producers)]
        # One of each group before the second of any, so that the first tasks have an encoder each.
        return [self._start(group, n) for n in range(self._cluster.loaders_per_producer) for group in self._groups]

    def _start(self, group: EncoderGroup | None = None, index: int = 0) -> _Slot:
        where = {"num_cpus": self._cluster.cpus_per_producer, "num_gpus": self._cluster.gpus_per_producer}
        options = where if group is None else group.loader_options(index)
        actor = (
            ray.remote(UnitActor)
            .options(**options, max_restarts=0, max_task_retries=0, max_concurrency=1)
            .remote(self._job if group is None else group.loader_job)
        )
        return _Slot(actor=actor, pending=actor.ready.remote(), since=time.monotonic(), group=group, index=index)

    def _collect(self, slot: _Slot) -> Outcome | None:
        """The outcome of a slot whose reference is there; None if there is nothing to report yet."""
        task = slot.task
        try:
            reply = ray.get(slot.pending)
        except RayError as error:
            at_start = isinstance(error, ActorDiedError) and error.actor_init_failed
            self._replace(slot, why_died(error), at_start=at_start, careful=not machine_died(error))
            return None
        slot.pending = slot.task = None
        if task is None:
            self._deaths_at_start = 0
            slot.seat = reply
            return None
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
            _end([slot])
            slot.task = task
            self._replace(slot, f"the producer ran out of memory ({reply.failure.message}): {LESS_MEMORY}")
            return None
        if reply.failure.kind == "encoder_gone":
            assert slot.group is not None  # only loaders have an encoder elsewhere
            slot.group.replace(slot.encoder)
        self._again(task, reply.failure.message)
        return None

    def _check_placed(self) -> None:
        """Some actors may wait for room as long as others work; if all do, nothing will ever happen."""
        waited = time.monotonic() - max(slot.since for slot in self._slots)
        if waited > _RAY_GONE_S and all(slot.seat is None for slot in self._slots):
            self._check_ray()
        if waited > _PLACED_S and all(slot.seat is None for slot in self._slots):
            raise ProduceError(
                f"no producer could be placed for {_PLACED_S:g} s: each needs {_show(needs(self._cluster))}, and of "
                f"{_show(ray.cluster_resources())} only {_show(ray.available_resources())} is free: wait for what runs "
                "there (a training holds its GPUs until it ends), or lower cluster.cpus_per_producer or "
                "cluster.gpus_per_producer"
            )

    def _check_ray(self) -> None:
        """Without its daemons Ray would wait for ever for a place."""
        now = time.monotonic()
        if now - self._ray_asked < _RAY_GONE_S:
            return
        self._ray_asked = now
        if not any(node["Alive"] for node in ray.nodes()):
            raise ProduceError(
                "no machine of the Ray cluster is alive any more (its raylet was killed, or lost contact); what is "
                "committed is kept: run the same command again"
            )

    def _end_silent(self) -> None:
        """Replace actors that have not answered for `cluster.unit_timeout_s`."""
        for slot in self._slots:
            if slot.task is not None and time.monotonic() - slot.since > self._cluster.unit_timeout_s:
                _end([slot])
                self._replace(slot, f"no answer for cluster.unit_timeout_s={self._cluster.unit_timeout_s:g} s")

    def _replace(self, slot: _Slot, why: str, *, at_start: bool = False, careful: bool = True) -> None:
        task = slot.task
        if task is None:
            self._deaths_at_start += 1
            if at_start or self._deaths_at_start > self._cluster.unit_retries:
                raise ProduceError(f"a producer cannot start: {why}")
        fresh = self._start(slot.group, slot.index)
        slot.actor, slot.pending, slot.since, slot.task, slot.seat = fresh.actor, fresh.pending, fresh.since, None, None
        if task is not None:
            self._again(task, why, careful=careful)

    def _again(self, task: Task, why: str, *, careful: bool = False) -> None:
        """Try the task once more, or raise if it was tried often enough."""
        trail = self._trail(task)
        # Each such death counts against a picture, and of these only so many are believed.
        if not (task.careful and careful and trail is not None and trail.opening is not None):
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


def machines() -> list[dict[str, float]]:
    """Resources of each machine of the cluster that Ray runs on."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def needs(cluster: ClusterConfig) -> dict[str, float]:
    """Ray resources that one producer reserves, with its loaders."""
    return {"CPU": cluster.producer_cpus, "GPU": cluster.gpus_per_producer}


def check_room(cluster: ClusterConfig) -> None:
    """Raise ValueError unless some machine of the cluster is large enough for one producer, were it free.

    Ray itself would wait for such a machine for ever, without a word.
    """
    need = needs(cluster)
    if not any(all(machine.get(name, 0.0) >= amount for name, amount in need.items()) for machine in machines()):
        there = "; ".join(_show(machine) for machine in machines()) or "no machine"
        raise ValueError(
            f"a producer needs {_show(need)} on one machine (cluster.cpus_per_producer, cluster.gpus_per_producer"
            f"{_of_loaders(cluster)}), "
            f"Ray has {there}: lower these (gpus_per_producer=0 with cluster.device=cpu needs no GPU), or set "
            "cluster.address to a cluster that has them"
        )


def _show(resources: Mapping[str, float]) -> str:
    return f"{resources.get('CPU', 0.0):g} CPUs and {resources.get('GPU', 0.0):g} GPUs"


def _of_loaders(cluster: ClusterConfig) -> str:
    return ", and cluster.loaders_per_producer x cluster.cpus_per_loader" if cluster.loaders_per_producer else ""


def _end(slots: Sequence[_Slot]) -> None:
    end_actors((slot.actor, slot.seat) for slot in slots)
