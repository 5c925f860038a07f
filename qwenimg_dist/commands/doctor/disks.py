"""Each node's own memory disks: /dev/shm (NCCL, Ray's object store, gloo) and where Ray spills and keeps its logs.

A container's default /dev/shm of 64 MB makes NCCL fail at its first collective, and Ray stops placing work on a node
whose spill disk is 95 % full.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from qwenimg_dist.commands.doctor.findings import Context, Finding, failure, ok, warning

SHM: Final = "/dev/shm"  # noqa: S108 - the memory disk itself
_SHM_LEAST: Final = 512 * 1024**2
_SHM_ENOUGH: Final = 8 * 1024**3
_SHM_FREE: Final = 256 * 1024**2
_SPILL_LEAST: Final = 2e9
_SPILL_ENOUGH: Final = 20e9
_SPILL_FULL: Final = 0.95
"""Of a disk: above it Ray refuses to place tasks and objects there."""


def check(context: Context) -> Sequence[Finding]:
    answers = context.nodes.ask(look, SHM, timeout_s=context.timeout_s)
    found = answers.findings("disks")
    on_gpu = context.config.cluster.device == "cuda"
    for node, there in answers.values.items():
        found += judge(node, there, on_gpu=on_gpu)
    return found


def look(shm: str, spill: str | None = None) -> dict[str, Any]:
    """Sizes on a node; `spill` is Ray's folder there unless given."""
    folder = spill or os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    return {"shm": _usage(shm), "spill": _usage(folder), "folder": folder}


def _usage(folder: str) -> dict[str, int] | None:
    if not Path(folder).is_dir():
        return None
    usage = shutil.disk_usage(folder)
    return {"total": usage.total, "free": usage.free}


def judge(node: str, there: Mapping[str, Any], *, on_gpu: bool) -> list[Finding]:
    """One node's disks."""
    found, shm, spill = [], there["shm"], there["spill"]
    name, grow = f"{SHM} on {node}", "docker run --shm-size=16g; on Kubernetes an emptyDir of medium Memory there"
    if shm is None:
        found.append(failure(name, "is not there", grow))
    elif shm["total"] < _SHM_LEAST or shm["free"] < _SHM_FREE:
        told = f"{shm['free'] / 1e9:.2f} of {shm['total'] / 1e9:.2f} GB are free"
        found.append(failure(name, told, f"{grow}; remove what dead processes left there"))
    elif on_gpu and shm["total"] < _SHM_ENOUGH:
        found.append(warning(name, f"{shm['total'] / 1e9:.1f} GB: little for several GPUs", grow))
    else:
        found.append(ok(name, f"{shm['free'] / 1e9:.1f} GB free"))
    name = f"Ray's disk on {node}"
    if spill is None:
        found.append(failure(name, f"{there['folder']} is not there", "make it, or set RAY_TMPDIR for `ray start`"))
        return found
    used, free = 1 - spill["free"] / max(1, spill["total"]), spill["free"]
    told = f"{there['folder']}: {free / 1e9:.1f} GB free, {used:.0%} used"
    fix = "make room, or `ray start --temp-dir` on a larger disk"
    if free < _SPILL_LEAST or used > _SPILL_FULL:
        found.append(failure(name, f"{told}; Ray stops using a node above {_SPILL_FULL:.0%}", fix))
    elif free < _SPILL_ENOUGH:
        found.append(warning(name, told, fix))
    else:
        found.append(ok(name, told))
    return found
