"""A small all-reduce on all ranks of the cluster, as training will do it: NCCL on GPUs, gloo on CPUs.

The ranks are the config's, with its resources, on the machines that Ray gives them. A rank that hangs ends in a
time-out that names those without an answer; one that fails is named with its error. Rates are a hint (64 MB, a few
repeats), no benchmark.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final

from qwenimg_dist.commands.doctor.findings import Context, Finding, failure, ok
from qwenimg_dist.commands.rank_actors import RanksError, rank_actors
from qwenimg_dist.debug import fault_point

_ELEMENTS: Final = 1 << 24
_REPEATS: Final = 3
_FIX_START: Final = "free the resources that cluster.ranks needs (`ray status`), or lower cluster.ranks"
_FIX: Final = (
    "NCCL_DEBUG=INFO tells more (GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the interface between nodes); look at "
    "the node of a rank that does not answer"
)


def check(context: Context) -> Sequence[Finding]:
    cluster, limit = context.config.cluster, context.timeout_s
    name = f"all-reduce on {cluster.ranks} ranks"
    try:
        with rank_actors(cluster, start_timeout_s=2 * limit) as ranks:
            try:
                ranks.call(prepare, timeout_s=2 * limit)
                # Ranks give up waiting for another before the command does, so that only the one that hangs is silent.
                answers = ranks.call(all_reduce, cluster.device, limit / 3, timeout_s=limit)
            except RanksError as error:
                return [failure(name, str(error), _FIX)]
            hosts = {seat.ip for seat in ranks.seats}
    except RanksError as error:
        return [failure(name, f"the ranks did not start: {error}", _FIX_START)]
    wrong = [str(rank) for rank, answer in enumerate(answers) if answer["sum"] != answer["expected"]]
    if wrong:
        return [failure(name, f"ranks {', '.join(wrong)} have a wrong sum", _FIX)]
    slowest = max(answer["seconds"] for answer in answers)
    size = answers[0]["bytes"]
    told = f"{answers[0]['backend']}, {len(hosts)} nodes, {size / 1e6:.0f} MB in {1e3 * slowest:.0f} ms"
    return [ok(name, told)]


def prepare() -> None:
    """On a rank: what takes seconds and has nothing to do with the network."""
    import torch.distributed  # noqa: F401


def all_reduce(device: str, timeout_s: float) -> dict[str, Any]:
    """On a rank, in torchrun's environment: sums and how long one took."""
    import torch
    import torch.distributed as dist

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "nccl" if device == "cuda" else "gloo"
    where = torch.device("cpu")
    if device == "cuda":
        where = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(where)
    fault_point("doctor_rank")
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        values = torch.empty(_ELEMENTS if device == "cuda" else _ELEMENTS // 16, device=where)
        times = []
        for _ in range(_REPEATS):
            values.fill_(float(rank))
            begin = time.perf_counter()
            dist.all_reduce(values)
            total = float(values[-1])  # waits for the device
            times.append(time.perf_counter() - begin)
    finally:
        dist.destroy_process_group()
    return {
        "sum": total,
        "expected": size * (size - 1) / 2,
        "seconds": statistics.median(times),
        "bytes": values.numel() * values.element_size(),
        "backend": backend,
    }
