"""One encoder and the loaders that feed it, kept on one machine, so that pixels never cross the network.

Place in the flow: with `cluster.loaders_per_producer`, `pool.py` makes one group per producer; its slots are the
loaders, and each task of a loader is told the encoder of its group. Ray places a group whole or not at all (a placement
group, STRICT_PACK), and anew, elsewhere, when its machine is gone. A dead or silent encoder is replaced by whoever of
its loaders says so first.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any, Final

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from producers.actor import Job
from producers.deaths import end_actors
from producers.encoder_actor import EncoderActor
from producers.messages import Seat
from qwenimg_dist.config import ClusterConfig

_ENCODER: Final = 0
"""The first bundle; the loaders' follow."""


class EncoderGroup:
    """Owns the places and the encoder; the pool owns the loaders."""

    def __init__(self, job: Job, cluster: ClusterConfig) -> None:
        self._job, self._cluster = job, cluster
        own = {"CPU": cluster.cpus_per_producer, "GPU": cluster.gpus_per_producer}
        bundles = [{name: amount for name, amount in own.items() if amount}]
        bundles += [{"CPU": cluster.cpus_per_loader}] * cluster.loaders_per_producer
        self._places = placement_group(bundles, strategy="STRICT_PACK")
        self._start()

    @property
    def encoder(self) -> Any:
        """Handle of the encoder that counts now."""
        return self._encoder

    @property
    def loader_job(self) -> Job:
        """What its loaders are told."""
        return replace(self._job, is_loader=True, num_threads=max(1, int(self._cluster.cpus_per_loader)))

    def loader_options(self, index: int) -> dict[str, Any]:
        """How Ray is to place loader `index` of the group."""
        return {"num_cpus": self._cluster.cpus_per_loader, **self._place(1 + index)}

    def replace(self, seen: Any) -> None:
        """Another encoder in the place of `seen`, unless there is one already."""
        if seen is self._encoder:
            self._end()
            self._start()

    def close(self) -> None:
        """End the encoder and give the places back; the loaders are ended before."""
        self._end()
        remove_placement_group(self._places)

    def _start(self) -> None:
        options = {
            "num_cpus": self._cluster.cpus_per_producer,
            "num_gpus": self._cluster.gpus_per_producer,
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": 1,
            **self._place(_ENCODER),
        }
        self._encoder = ray.remote(EncoderActor).options(**options).remote(self._job)
        self._ready = self._encoder.ready.remote()

    def _end(self) -> None:
        end_actors([(self._encoder, self._seat())])

    def _seat(self) -> Seat | None:
        """Known once the encoder has said it, also when it does not answer any more."""
        with contextlib.suppress(RayError):
            if ray.wait([self._ready], timeout=0)[0]:
                seat: Seat = ray.get(self._ready)
                return seat
        return None

    def _place(self, bundle: int) -> dict[str, Any]:
        places = PlacementGroupSchedulingStrategy(self._places, placement_group_bundle_index=bundle)
        return {"scheduling_strategy": places}
