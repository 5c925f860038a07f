"""Do the nodes reach each other, and may a process open enough files?

Every node connects to a listener on the driver's node, on a port that the system chooses: ranks meet on such ports
too, so a firewall between nodes shows here and not as a gang that never starts. The other ways are the all-reduce's.
"""

from __future__ import annotations

import resource
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import ray

from qwenimg_dist.commands.doctor.findings import Context, Finding, failure, ok, warning

_CONNECT_S: Final = 10.0
_FILES: Final = 65_536
_FILES_LEAST: Final = 4096
_FIX: Final = "allow TCP between the nodes on all ports above 1023 (security groups, firewalls, network policies)"


def check(context: Context) -> Sequence[Finding]:
    here = ray.util.get_node_ip_address()
    with listener(here) as port:
        answers = context.nodes.ask(look, here, port, timeout_s=context.timeout_s)
    found = answers.findings("ports")
    for node, there in answers.values.items():
        found += judge(node, there)
    if not found:
        files = min(there["files"] for there in answers.values.values())
        found.append(ok("ports", f"all {len(answers.values)} nodes reach {here}; at least {files:,} open files each"))
    return found


@contextmanager
def listener(address: str) -> Iterator[int]:
    """A port that takes connections while the block lasts."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as server:
        server.bind((address, 0))
        server.listen(128)
        server.settimeout(0.2)
        done = threading.Event()

        def serve() -> None:
            while not done.is_set():
                try:
                    server.accept()[0].close()
                except OSError:
                    continue

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield int(server.getsockname()[1])
        finally:
            done.set()
            thread.join()


def look(address: str, port: int) -> dict[str, Any]:
    """On a node: whether it reaches the listener, and its limit of open files."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        socket.create_connection((address, port), timeout=_CONNECT_S).close()
        problem = ""
    except OSError as error:
        problem = f"cannot reach {address}:{port} ({error})"
    return {"problem": problem, "files": 1 << 30 if files == resource.RLIM_INFINITY else files}


def judge(node: str, there: dict[str, Any]) -> list[Finding]:
    """What is wrong with one node."""
    found = []
    if there["problem"]:
        found.append(failure(f"ports on {node}", there["problem"], _FIX))
    if there["files"] < _FILES:
        told = f"a process may open {there['files']:,} files"
        fix = f"raise it to {_FILES:,}: `ulimit -n`, LimitNOFILE of the service, or the container's --ulimit"
        say = failure if there["files"] < _FILES_LEAST else warning
        found.append(say(f"open files on {node}", told, fix))
    return found
