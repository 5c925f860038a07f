"""Are the GPUs there that `cluster` asks for, alike, whole, and can those of a node reach each other's memory?

Nothing is allocated on them. On `cluster.device=cpu` there is nothing to look at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from qwenimg_dist.commands.doctor.findings import Context, Finding, failure, ok, warning
from qwenimg_dist.config import ClusterConfig

_GIB: Final = 1024.0**3
_MEMORY_TOLERANCE: Final = 0.05
_BUSY: Final = 0.1


def check(context: Context) -> Sequence[Finding]:
    cluster = context.config.cluster
    if cluster.device == "cpu":
        return [ok("GPUs", "cluster.device=cpu: none are used")]
    answers = context.nodes.ask(look, timeout_s=context.timeout_s)
    return [*answers.findings("GPUs"), *judge(answers.values, cluster)]


def look() -> dict[str, Any]:
    """The GPUs of a node."""
    import torch

    if not torch.cuda.is_available():
        return {"gpus": [], "cuda": torch.version.cuda, "apart": []}
    count = torch.cuda.device_count()
    gpus = []
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        gpus.append({"name": torch.cuda.get_device_name(index), "total": total, "free": free})
    apart = [
        [one, other]
        for one in range(count)
        for other in range(count)
        if one != other and not torch.cuda.can_device_access_peer(one, other)
    ]
    return {"gpus": gpus, "cuda": torch.version.cuda, "apart": apart}


def judge(nodes: Mapping[str, Mapping[str, Any]], cluster: ClusterConfig) -> list[Finding]:
    """All nodes' GPUs against each other and the config."""
    found: list[Finding] = []
    total = 0
    for node, there in nodes.items():
        gpus = there["gpus"]
        total += len(gpus)
        if not gpus:
            if there["cuda"] is None:
                told, fix = "torch is a CPU build", "install torch for the driver's CUDA on this node"
            else:
                told, fix = f"torch (CUDA {there['cuda']}) finds none", "see `nvidia-smi` there: driver, container"
            found.append(warning(f"GPUs on {node}", told, fix))
            continue
        name, gib = gpus[0]["name"], gpus[0]["total"] / _GIB
        found.append(ok(f"GPUs on {node}", f"{len(gpus)} x {name}, {gib:.1f} GiB, CUDA {there['cuda']}"))
        given = cluster.device_memory_gib
        if given is not None and abs(gib / given - 1) > _MEMORY_TOLERANCE:
            fix = f"set cluster.device_memory_gib={gib:.1f}, so that `plan` counts with it"
            found.append(warning(f"GPU memory on {node}", f"{gib:.1f} GiB, the config says {given:g}", fix))
        busy = [str(index) for index, gpu in enumerate(gpus) if gpu["free"] < (1 - _BUSY) * gpu["total"]]
        if busy:
            told = f"GPUs {', '.join(busy)} are in use: less than {1 - _BUSY:.0%} of their memory is free"
            found.append(warning(f"GPU memory on {node}", told, "see `nvidia-smi` for the processes on them"))
        if there["apart"]:
            pairs = ", ".join(f"{one}-{other}" for one, other in there["apart"][:4])
            told = f"{len(there['apart'])} pairs of GPUs cannot reach each other's memory (first {pairs})"
            fix = "NVLink or PCIe peer access: `nvidia-smi topo -m`; ACS off in the BIOS; in a VM its GPU topology"
            found.append(warning(f"peer access on {node}", told, fix))
    names = {gpu["name"] for there in nodes.values() for gpu in there["gpus"]}
    if len(names) > 1:
        told = f"different GPUs: {', '.join(sorted(names))}; a step takes as long as on the slowest"
        found.append(warning("GPUs", told, "leave the slower nodes out, or plan with the smallest memory"))
    if total < cluster.ranks:
        fix = "lower cluster.ranks, or add nodes"
        found.append(failure("GPUs", f"{total} in all, cluster.ranks={cluster.ranks} ranks need one each", fix))
    return found
