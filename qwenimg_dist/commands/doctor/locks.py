"""Locks on shared storage: what one node holds must be refused to all others, or two runs may write one directory.

Place in the flow: `storage.py` asks here for each path. The first node takes the very lock that `train` and `produce`
take, and while it holds it every node tries to. File systems mounted without locks refuse to give any; others (Lustre
with `localflock`, NFS with `local_lock` or `nolock`) give locks that count on one node alone, unseen later.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from qwenimg_dist.commands.doctor.findings import Context, Finding, failure, ok
from qwenimg_dist.data.errors import LockedError
from qwenimg_dist.data.facets import hold_lock

HELD: Final = "held"
FREE: Final = "free"
_VISIBLE_S: Final = 15.0
_POLL_S: Final = 0.1
_FIX: Final = "mount it with locks that count on all nodes (Lustre: option flock; NFS: without nolock and local_lock)"


def check(context: Context, name: str, folder: str) -> list[Finding]:
    """Of a directory that all nodes see under this path."""
    file = str(Path(folder) / f".qwenimg-dist-doctor-{secrets.token_hex(8)}.lock")
    nodes, limit = context.nodes, context.timeout_s
    with ThreadPoolExecutor(1) as pool:
        holding = pool.submit(nodes.ask_one, nodes.head, hold, file, 2 * limit, timeout_s=3 * limit)
        try:
            tried = nodes.ask(attempt, file, timeout_s=limit + _VISIBLE_S)
        finally:
            nodes.ask_one(nodes.head, release, file, timeout_s=limit)
        held = holding.result()
    nodes.ask_one(nodes.head, remove, file, timeout_s=limit)
    faults = {**tried.faults, **held.faults}
    if faults:
        return [failure(f"{name}: locks on {node}", told, "look at the node") for node, told in faults.items()]
    return judge(name, nodes.head.name, held.values[nodes.head.name], tried.values)


def hold(file: str, limit_s: float) -> str:
    """Hold the lock until `release`; empty, or why it could not be taken. Others are told by `FILE.held`."""
    try:
        with hold_lock(Path(file), "held by another process"):
            Path(f"{file}.held").touch()
            deadline = time.monotonic() + limit_s
            while not Path(f"{file}.released").exists() and time.monotonic() < deadline:
                time.sleep(_POLL_S)
    except (ValueError, OSError) as error:
        with contextlib.suppress(OSError):
            Path(f"{file}.held").touch()
        return str(error)
    return ""


def attempt(file: str) -> str:
    """What becomes of the lock that another process holds: `HELD`, as it should, `FREE`, or an error."""
    deadline = time.monotonic() + _VISIBLE_S
    while not Path(f"{file}.held").exists():
        if time.monotonic() > deadline:
            return f"{file}.held was not seen within {_VISIBLE_S:g} s"
        time.sleep(_POLL_S)
    try:
        with hold_lock(Path(file), "held by another process"):
            return FREE
    except LockedError:
        return HELD
    except (ValueError, OSError) as error:
        return str(error)


def release(file: str) -> None:
    Path(f"{file}.released").touch()


def remove(file: str) -> None:
    for name in (f"{file}.held", f"{file}.released", file):
        with contextlib.suppress(OSError):
            Path(name).unlink()


def judge(name: str, holder: str, refused: str, tried: Mapping[str, str]) -> list[Finding]:
    """`refused`: why the first node got no lock; `tried`: node -> what it met while the first one held it."""
    if refused:
        return [failure(f"{name}: locks on {holder}", refused, _FIX)]
    found = []
    for node, told in tried.items():
        if told == FREE:
            told = f"the lock that {holder} held could be taken: two runs in one directory would not notice each other"
        if told != HELD:
            found.append(failure(f"{name}: locks on {node}", told, _FIX))
    return found or [ok(f"{name}: locks", f"held on {holder}, refused on all {len(tried)} nodes meanwhile")]
