"""What a Ray node's Prometheus endpoint says of our own metrics."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Mapping

import ray


def scrape(prefix: str, label: str) -> dict[str, float]:
    """Figures by short name, with one label's value where there is one, of this Ray's first node."""
    port = ray.nodes()[0]["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = {}
    for name, labels, value in re.findall(rf"^ray_{prefix}_(\w+?)(?:_total)?{{(.*)}} (\S+)$", text, re.MULTILINE):
        tag = re.search(rf'{label}="[^"]*"', labels)
        found[f"{name} {tag[0]}" if tag else name] = float(value)
    return found


def await_figures(wanted: Mapping[str, float], prefix: str, label: str, *, timeout_s: float = 90) -> dict[str, float]:
    """Until the endpoint says these; all that it says then."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = scrape(prefix, label)
        if wanted.items() <= found.items():
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.5)
