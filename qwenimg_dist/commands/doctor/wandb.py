"""Can the run log to W&B from wherever rank 0 will be? A key is looked for, never read out."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from qwenimg_dist.commands.doctor.findings import Context, Finding, failure, ok, warning
from qwenimg_dist.config import Config
from qwenimg_dist.wandb_key import key_place, server

_CONNECT_S: Final = 5.0


def check(context: Context) -> Sequence[Finding]:
    mode = context.config.logger.wandb
    if mode == "off":
        return [ok("W&B", "off: metrics.jsonl and the report are all there is")]
    answers = context.nodes.ask(look, timeout_s=context.timeout_s)
    found = answers.findings("W&B")
    for node, there in answers.values.items():
        found.append(judge(node, there, context.config))
    return found


def look() -> dict[str, Any]:
    """On a node: is there a key, of which kind of place, and does the server answer a connection?"""
    url = server()
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
        problem = ""
    except OSError as error:
        problem = str(error)
    mode = os.environ.get("WANDB_MODE", "")
    return {"key": key_place(url), "host": host, "problem": problem, "mode": mode}


def judge(node: str, there: Mapping[str, Any], config: Config) -> Finding:
    """One node."""
    name = f"W&B on {node}"
    if config.logger.wandb == "offline":
        return ok(name, "offline: runs are written into the run directory; `wandb sync` brings them up")
    if there["mode"] in ("offline", "disabled", "dryrun"):
        told = f"WANDB_MODE={there['mode']} is set there, and logger.wandb=online asks otherwise"
        return warning(name, told, "unset it, or take logger=offline")
    if not there["key"]:
        fix = "set WANDB_API_KEY for the ranks (a secret of the cluster, not the config), or logger=offline"
        return failure(name, "logger.wandb=online, and there is no key", fix)
    if there["problem"]:
        fix = "allow the connection (or set HTTPS_PROXY, WANDB_BASE_URL), or take logger=offline"
        return failure(name, f"{there['host']} cannot be reached: {there['problem']}", fix)
    return ok(name, f"a key in {there['key']} (not tried), {there['host']} answers")
