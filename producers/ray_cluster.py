"""The Ray that a command uses, started for it or joined, and what its machines have room for.

Place in the flow: every command that has actors or ranks opens a `ray_session` first. Refuses a cluster that cannot be
reached and producers that no machine could ever hold: Ray itself would wait for both without a word. The driver's
process reserves no GPU, and must not touch CUDA.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import ray

from producers import own_ray
from qwenimg_dist.config import ClusterConfig


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
        there = "; ".join(show(machine) for machine in machines()) or "no machine"
        raise ValueError(
            f"a producer needs {show(need)} on one machine (cluster.cpus_per_producer, cluster.gpus_per_producer"
            f"{_of_loaders(cluster)}), "
            f"Ray has {there}: lower these (gpus_per_producer=0 with cluster.device=cpu needs no GPU), or set "
            "cluster.address to a cluster that has them"
        )


def show(resources: Mapping[str, float]) -> str:
    """CPUs and GPUs, for messages."""
    return f"{resources.get('CPU', 0.0):g} CPUs and {resources.get('GPU', 0.0):g} GPUs"


def _of_loaders(cluster: ClusterConfig) -> str:
    return ", and cluster.loaders_per_producer x cluster.cpus_per_loader" if cluster.loaders_per_producer else ""
