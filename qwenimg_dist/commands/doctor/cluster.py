"""Ray itself: is every node alive, is there room for what the config asks, and who else can reach the dashboard?

Whoever reaches a dashboard without a token runs code on the cluster (CVE-2023-48022). So it is asked here as a stranger
would: from the head's own addresses, without a token.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

import ray

from producers.ray_cluster import check_room as check_producers
from producers.ray_cluster import machines
from qwenimg_dist.commands.doctor.findings import Context, Finding, failure, ok, warning
from qwenimg_dist.commands.run import room_beside
from qwenimg_dist.commands.train import check_room as check_ranks
from qwenimg_dist.config import ClusterConfig

_REQUEST_S: Final = 5.0
_FIX: Final = "start the head with --dashboard-host 127.0.0.1 and tunnel to it, or set RAY_AUTH_MODE=token on all nodes"


def check(context: Context) -> Sequence[Finding]:
    found = _room(context.config.cluster)
    nodes = context.nodes
    found.append(ok("nodes", f"{len(nodes.all)} alive: {', '.join(node.name for node in nodes.all)}"))
    if nodes.dead:
        told = f"{len(nodes.dead)} dead: {', '.join(nodes.dead[:8])}"
        found.append(warning("nodes", told, "see their logs in the session's folder, or `ray status`"))
    url = dashboard_url()
    if not url:
        return [*found, ok("dashboard", "not running")]
    answers = nodes.ask_one(nodes.head, ask_as_a_stranger, url, timeout_s=context.timeout_s)
    found += answers.findings("dashboard")
    for there in answers.values.values():
        found.append(judge_dashboard(url, there, mode=os.environ.get("RAY_AUTH_MODE", "")))
    return found


def _room(cluster: ClusterConfig) -> list[Finding]:
    looks: dict[str, Callable[[], None]] = {
        "ranks": lambda: check_ranks(cluster, machines()),
        "producers": lambda: check_producers(cluster),
    }
    found = []
    for name, look in looks.items():
        try:
            look()
            found.append(ok(f"room for {name}", f"cluster.{name}={getattr(cluster, name)}"))
        except ValueError as error:
            found.append(failure(f"room for {name}", str(error), "as it says"))
    if not (cluster.address or os.environ.get("RAY_ADDRESS")):
        return found  # a Ray of one's own takes the CPUs that it is told
    if no_room := room_beside(cluster, machines()):
        found.append(warning("room for run", no_room, "as it says; `produce` first and `train` then may have room"))
    else:
        found.append(ok("room for run", "ranks and a producer beside them"))
    return found


def dashboard_url() -> str:
    """HOST:PORT; empty if there is none."""
    told = ray.init(ignore_reinit_error=True, logging_level=logging.ERROR).dashboard_url
    return str(told or "")


def ask_as_a_stranger(url: str) -> dict[str, Any]:
    """On the head: which of its own addresses answer without a token. Address -> status, 0 where nothing listens."""
    parts = urlsplit(url if "://" in url else f"//{url}")
    port = parts.port or 8265
    hosts = dict.fromkeys([parts.hostname or "127.0.0.1", *own_addresses()])
    return {host: status_without_token(host, port) for host in hosts}


def own_addresses() -> list[str]:
    """Addresses of this machine that others may know it by."""
    found: dict[str, None] = {}
    with contextlib.suppress(OSError):
        found |= dict.fromkeys(str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None))
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("10.255.255.255", 1))  # sends nothing: only asks which address would be taken
        found[str(probe.getsockname()[0])] = None
    return list(found)


def status_without_token(host: str, port: int) -> int:
    """HTTP status of the API that submits jobs; 0 where nothing answers."""
    name = f"[{host}]" if ":" in host else host
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{name}:{port}/api/jobs/", timeout=_REQUEST_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def judge_dashboard(url: str, status: dict[str, int], *, mode: str) -> Finding:
    """Open to others without a token is a failure; on loopback alone a token is not needed."""
    open_to = [host for host, code in status.items() if code and code not in (401, 403) and not _is_loopback(host)]
    if open_to:
        told = f"anybody who reaches {', '.join(open_to)} runs code on the cluster: it answers without a token"
        return failure("dashboard", told, _FIX)
    listening = [host for host, code in status.items() if code]
    if any(status[host] in (401, 403) for host in listening):
        return ok("dashboard", f"{url} asks for a token")
    if not listening:
        return warning("dashboard", f"{url} does not answer", "see dashboard.log in the session's folder")
    return ok("dashboard", f"{url} is on loopback only (RAY_AUTH_MODE={mode or 'not set'})")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
