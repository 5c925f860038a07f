"""Producers that cannot be placed are said, not waited for without a word."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

import pytest
import ray

from producers import actor_slots, pool
from producers.actor import Job, Reply
from producers.actor_slots import Answer, Loss
from producers.messages import EncoderGoneError, describe_failure
from producers.pool import RayWorkers
from producers.ray_cluster import ray_session
from producers.workers import ProduceError, Task
from qwenimg_dist.config import ClusterConfig

A = TypeVar("A")
B = TypeVar("B")


@pytest.fixture
def cluster() -> ClusterConfig:
    return ClusterConfig(producers=1, cpus_per_producer=2)


def make_job(root: Path) -> Job:
    return Job(
        config_json="{}",
        data_path=str(root),
        pipeline_dir=str(root),
        text_facet="text-x",
        latents_facets={},
        root=str(root),
        num_threads=1,
    )


def test_producers_without_room_are_refused(
    tmp_path: Path, cluster: ClusterConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with ray_session(cluster):
        too_much = cluster.model_copy(update={"gpus_per_producer": 64})
        with pytest.raises(ValueError, match=r"needs 2 CPUs and 64 GPUs.*gpus_per_producer.*CPUs.*cluster\.address"):
            RayWorkers(make_job(tmp_path), too_much)
        # Something else holds every CPU: large enough, but never free.
        holder = ray.remote(_Holder).options(num_cpus=int(ray.cluster_resources()["CPU"])).remote()
        ray.get(holder.there.remote())
        monkeypatch.setattr(actor_slots, "_PLACED_S", 0.5)
        workers = RayWorkers(make_job(tmp_path), cluster)
        assert workers.num_idle() == 0
        with pytest.raises(ProduceError, match=r"could be placed for 0\.5 s: each needs 2 CPUs.*only 0 CPUs"):
            wait_in_vain(workers)
        workers.close()


def wait_in_vain(workers: RayWorkers) -> None:
    for _ in range(100):
        assert workers.wait(0.2) == []


class _Holder:
    def there(self) -> Task:
        return Task(kind="scan", unit=0)


class _Losing(Generic[A, B]):
    """`ActorSlots` whose one actor is lost, or says what it is told to, at each task."""

    num_idle = 1

    def __init__(self, *args: Any, **options: Any) -> None:
        self.events: list[Any] = []
        self.num_submitted = 0

    def submit(self, task: Task) -> None:
        self.num_submitted += 1

    def wait(self, timeout_s: float) -> list[Any]:
        return [self.events.pop(0)] if self.events else []


def losing(
    monkeypatch: pytest.MonkeyPatch, root: Path, cluster: ClusterConfig
) -> tuple[RayWorkers, _Losing[Task, Any]]:
    monkeypatch.setattr(pool, "ActorSlots", _Losing)
    monkeypatch.setattr(pool, "check_room", lambda cluster: None)
    workers = RayWorkers(make_job(root), cluster)
    assert isinstance(workers._slots, _Losing)
    return workers, workers._slots


def test_dead_machines_are_no_failures_of_the_unit_up_to_a_number(
    tmp_path: Path, cluster: ClusterConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Task(kind="encode", unit=3)
    workers, slots = losing(monkeypatch, tmp_path, cluster)
    machine_gone, killed = (Loss(task=task, why="gone", machine=machine) for machine in (True, False))
    group = SimpleNamespace(replace=lambda seen: None)
    slot = SimpleNamespace(place=SimpleNamespace(group=group, encoder=None))
    failure = describe_failure(EncoderGoneError("its machine died or lost contact", machine=True))
    encoder_gone: Answer[Task, Any] = Answer(slot=slot, task=task, reply=Reply(failure=failure))  # type: ignore[arg-type]
    slots.events = [machine_gone, encoder_gone] * 10 + [killed] * cluster.unit_retries
    tries = len(slots.events)
    for _ in range(tries + 1):
        assert workers.wait(0.0) == []
    assert slots.num_submitted == tries  # each is tried again
    slots.events = [killed]
    with pytest.raises(ProduceError, match=r"unit 3: encode failed 4 times, last: gone.*cluster\.unit_retries"):
        workers.wait(0.0)
    workers, slots = losing(monkeypatch, tmp_path, cluster)
    slots.events = [machine_gone] * 21
    for _ in range(20):
        assert workers.wait(0.0) == []
    with pytest.raises(ProduceError, match="unit 3: encode lost its machine 21 times, last: gone"):
        workers.wait(0.0)
