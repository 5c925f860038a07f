"""Producers that cannot be placed are said, not waited for without a word."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from producers import actor_slots
from producers.actor import Job
from producers.pool import RayWorkers
from producers.ray_cluster import ray_session
from producers.workers import ProduceError, Task
from qwenimg_dist.config import ClusterConfig


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
