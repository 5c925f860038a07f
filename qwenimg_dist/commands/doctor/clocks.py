"""Do the nodes' clocks agree, and does each know itself by a name that others can use?

Waiting for a node's answer bounds how far its clock can be off: what lies beyond the wait is told. A host name that
resolves to loopback makes gloo bind there, and two nodes of one name cannot be told apart in logs.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from qwenimg_dist.commands.doctor.findings import Context, Finding, failure, ok, warning

_FAR_S = 30.0


def check(context: Context) -> Sequence[Finding]:
    context.nodes.ask(look, timeout_s=context.timeout_s)  # starts the workers, which takes seconds
    begin = time.time()
    answers = context.nodes.ask(look, timeout_s=context.timeout_s)
    end = time.time()
    return [*answers.findings("clock"), *judge(answers.values, begin, end, context.config.doctor.clock_skew_s)]


def look() -> dict[str, Any]:
    """On a node: its clock and name."""
    host, address = socket.gethostname(), ""
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(host)
    return {"now": time.time(), "host": host, "address": address}


def judge(nodes: Mapping[str, Mapping[str, Any]], begin: float, end: float, allowed_s: float) -> list[Finding]:
    """All nodes asked between `begin` and `end` of the driver's clock."""
    found: list[Finding] = []
    for node, there in nodes.items():
        off = max(begin - there["now"], there["now"] - end, 0.0)
        if off > allowed_s:
            say = failure if off > _FAR_S else warning
            told = f"off by {off:.1f} s or more from the driver's"
            found.append(say(f"clock on {node}", told, "chrony or another NTP service on every node"))
        if there["address"].startswith("127.") and len(nodes) > 1:
            told = f"{there['host']} resolves to {there['address']} there, and other nodes are told to call it so"
            fix = f"in /etc/hosts give {there['host']} its network address, or set GLOO_SOCKET_IFNAME"
            found.append(warning(f"host name on {node}", told, fix))
    hosts: dict[str, list[str]] = {}
    for node, there in nodes.items():
        hosts.setdefault(there["host"], []).append(node)
    for host, named in hosts.items():
        if len(named) > 1:
            told = f"{', '.join(named)} are all called {host}: logs cannot tell them apart"
            found.append(warning("host names", told, "give each machine its own name"))
    if not found:
        found.append(ok("clocks", f"{len(nodes)} nodes within {max(allowed_s, end - begin):.1f} s; every name its own"))
    return found
