"""Is this environment fit for a run? Looks at every node of the cluster, and says what to do about what is not.

    qwenimg-dist doctor model=qwen_image_2512 cluster=nodes_8x8 run.path=RUN data.path=DATA [CHECK ...] [--json]

Give the overrides of the run that is meant. Each line is ok, a warning or a failure with its fix; the exit code is 1 if
anything failed. Names of checks run these alone (`qwenimg-dist doctor storage hub ...`); all are: versions, gpus,
disks, storage, cluster, ports, gang, wandb, hub, clocks. Joins the Ray at cluster.address (or RAY_ADDRESS, as in a
job), else starts one on 127.0.0.1 for the while. What it writes into run.path and data.path it removes again.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from rich.console import Console

from qwenimg_dist.commands.doctor.findings import Check, Context, Finding, State, failure
from qwenimg_dist.compose import did_you_mean, load_config
from qwenimg_dist.config import Config

SUMMARY: Final = "GPUs, versions, disks, shared storage, network, Ray, W&B, hub and clocks of all nodes, with fixes"
_MARKS: Final[Mapping[State, tuple[str, str]]] = {
    "ok": ("ok     ", "green"),
    "warning": ("warning", "yellow"),
    "failure": ("FAILURE", "red"),
}
NAMES: Final = ("versions", "gpus", "disks", "storage", "cluster", "ports", "gang", "wandb", "hub", "clocks")


def checks() -> dict[str, Check]:
    """Name -> check, in the order in which they are told."""
    from qwenimg_dist.commands.doctor import (
        clocks,
        cluster,
        disks,
        gang,
        gpus,
        hub,
        ports,
        storage,
        versions,
        wandb,
    )

    modules = (versions, gpus, disks, storage, cluster, ports, gang, wandb, hub, clocks)
    return {name: module.check for name, module in zip(NAMES, modules, strict=True)}


def run(args: list[str]) -> int:
    """Run the checks. Returns 1 if one failed."""
    as_json = "--json" in args
    overrides = [word for word in args if "=" in word or word.startswith("~")]
    chosen = [word for word in args if word not in overrides and word != "--json"]
    for word in chosen:
        if word not in NAMES:
            raise ValueError(f"no check {word!r}{did_you_mean(word, NAMES)}; there is: {', '.join(NAMES)}")
    config = load_config(overrides)
    # Ray reports deaths on standard output, where JSON must stand alone.
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        findings = examine(config, chosen or NAMES, on_finding=None if as_json else _show)
    failed = sum(one.state == "failure" for one in findings)
    warned = sum(one.state == "warning" for one in findings)
    if as_json:
        print(json.dumps({"ok": not failed, "findings": [one.json() for one in findings]}, indent=1))
    else:
        print(f"{len(findings)} lines: {failed} failures, {warned} warnings", file=sys.stderr)
    return 1 if failed else 0


def examine(
    config: Config, names: Sequence[str] = NAMES, *, on_finding: Callable[[Finding], None] | None = None
) -> list[Finding]:
    """All findings of these checks; each is told to `on_finding` as it comes."""
    from producers.ray_cluster import ray_session  # Ray takes seconds: only when the config is sound
    from qwenimg_dist.commands.doctor.nodes import Nodes

    found: list[Finding] = []
    cluster = config.cluster
    with ray_session(cluster, cpus=cluster.ranks * cluster.cpus_per_rank):
        context = Context(config=config, nodes=Nodes())
        for name in names:
            try:
                made = list(checks()[name](context))
            except Exception as error:  # a check that breaks must not hide the others
                told = f"{type(error).__name__}: {error}"
                made = [failure(name, f"the check itself failed: {told}", "report it with this line")]
            for one in made:
                found.append(replace(one, check=name))
                if on_finding is not None:
                    on_finding(found[-1])
    return found


def _show(finding: Finding) -> None:
    console = Console(soft_wrap=True)
    mark, colour = _MARKS[finding.state]
    console.print(f"[{colour}]{mark}[/]", end=" ")
    fix = f"\n          -> {finding.fix}" if finding.fix else ""
    console.print(f"{finding.check}: {finding.name}: {finding.told}{fix}", highlight=False, markup=False)
