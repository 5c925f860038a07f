"""Ranks as plain Ray actors, for what takes seconds: the probe of `plan`, the all-reduce of `doctor`.

Place in the flow: training itself runs under Ray Train, which restarts its gang. Here nothing is restarted: an actor
that finds no place, dies or hangs ends in an error that names its rank and host. Ranks are numbered by host, and each
has torchrun's environment, so that `consumers.engine.start_distributed` works as in a run.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Final

import ray
from ray.exceptions import RayError, RayTaskError

from producers.deaths import end_actors, why_died
from producers.messages import Seat as Process
from producers.messages import own_seat
from qwenimg_dist.config import ClusterConfig

_ENVIRONMENT: Final = {"TOKENIZERS_PARALLELISM": "false", "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
"""Every rank sees all GPUs of its node, and takes its own by LOCAL_RANK, as under torchrun."""


class RanksError(RuntimeError):
    """Some ranks did not do what they were asked; the message names them."""


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Where an actor runs."""

    host: str
    ip: str
    process: Process
    gpu: int | None


class _RankActor:
    """One rank's process."""

    def seat(self) -> Seat:
        gpus = ray.get_gpu_ids()
        return Seat(
            host=socket.gethostname(),
            ip=ray.util.get_node_ip_address(),
            process=own_seat(),
            gpu=int(gpus[0]) if gpus else None,
        )

    def free_port(self) -> int:
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    def call(self, environment: Mapping[str, str], function: Callable[..., Any], *given: Any) -> Any:
        os.environ.update(environment)
        return function(*given)


class RankActors:
    """The ranks of a cluster; made by `rank_actors`."""

    def __init__(self, actors: Sequence[Any], seats: Sequence[Seat], port: int) -> None:
        self._actors = actors
        self.seats = tuple(seats)
        """By rank."""
        self._port = port

    def call(self, function: Callable[..., Any], *given: Any, timeout_s: float) -> list[Any]:
        """`function(*given)` on every rank at once; answers by rank. Raises `RanksError`."""
        size = len(self._actors)
        on_host = Counter(seat.ip for seat in self.seats)
        seen: Counter[str] = Counter()
        pending = []
        for rank, (actor, seat) in enumerate(zip(self._actors, self.seats, strict=True)):
            environment = {
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_RANK": str(seen[seat.ip] if seat.gpu is None else seat.gpu),
                "LOCAL_WORLD_SIZE": str(on_host[seat.ip]),
                "MASTER_ADDR": self.seats[0].ip,
                "MASTER_PORT": str(self._port),
            }
            seen[seat.ip] += 1
            pending.append(actor.call.remote(environment, function, *given))
        names = [f"rank {rank} on {seat.host} (pid {seat.process.pid})" for rank, seat in enumerate(self.seats)]
        return _answers(pending, names, timeout_s)


@contextlib.contextmanager
def rank_actors(cluster: ClusterConfig, *, start_timeout_s: float) -> Iterator[RankActors]:
    """`cluster.ranks` actors, ended with the block. Ray must be there. Raises `RanksError` if they do not all start."""
    threads = str(max(1, int(cluster.cpus_per_rank)))
    options = {
        "num_cpus": cluster.cpus_per_rank,
        "num_gpus": 1 if cluster.device == "cuda" else 0,
        "max_restarts": 0,
        "max_task_retries": 0,
        "runtime_env": {"env_vars": {**_ENVIRONMENT, "OMP_NUM_THREADS": threads}},
    }
    actors = [ray.remote(_RankActor).options(**options).remote() for _ in range(cluster.ranks)]
    seats: list[Seat] = []
    try:
        names = [f"actor {number}" for number in range(cluster.ranks)]
        seats = _answers([actor.seat.remote() for actor in actors], names, start_timeout_s)
        # By host, so that neighbours are neighbours; the first is asked for a port.
        order = sorted(range(len(actors)), key=lambda at: (seats[at].ip, seats[at].gpu or 0, at))
        actors = [actors[at] for at in order]
        (port,) = _answers([actors[0].free_port.remote()], ["rank 0"], start_timeout_s)
        yield RankActors(actors, [seats[at] for at in order], port)
    finally:
        end_actors(zip_longest(actors, (seat.process for seat in seats)))  # which is whose does not matter


def _answers(pending: Sequence[Any], names: Sequence[str], timeout_s: float) -> list[Any]:
    """What each task returned, in order. Those that hang are told before those that failed because of them."""
    ready, _ = ray.wait(list(pending), num_returns=len(pending), timeout=timeout_s)
    found, faults = [], []
    for task, name in zip(pending, names, strict=True):
        if task not in ready:
            continue
        try:
            found.append(ray.get(task))
        except RayTaskError as error:
            faults.append(f"{name}: {str(error.cause).splitlines()[0][:300]}")
        except RayError as error:
            faults.append(f"{name}: {why_died(error, who='the rank', less_memory='run fewer ranks per node')}")
    if missing := [name for task, name in zip(pending, names, strict=True) if task not in ready]:
        faults.insert(0, f"no answer within {timeout_s:g} s from {', '.join(missing)}")
    if faults:
        raise RanksError("; ".join(faults))
    return found
