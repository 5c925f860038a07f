"""The machines of the cluster, and a way to ask each of them the same thing at once.

Place in the flow: checks give a function of their file and its arguments; it runs once per node, as a Ray task bound to
it, which reserves nothing. A node that does not answer in time is a fault of that node, not of the command: the others'
answers count. Refuses retries: what fails once is told.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qwenimg_dist.commands.doctor.findings import Finding, failure

_ENVIRONMENT: Final = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
"""A task that reserves no GPU sees them all the same."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One machine that Ray runs on."""

    node_id: str
    name: str
    """Address, with the host's name where that says more."""
    is_head: bool


@dataclass(frozen=True, kw_only=True)
class Answers:
    """By node name."""

    values: dict[str, Any]
    faults: dict[str, str]

    def findings(self, what: str) -> list[Finding]:
        """One failure per node that did not answer."""
        fix = "look at the node (`ray status`, its logs); is this package installed there, as here?"
        return [failure(f"{what} on {node}", told, fix) for node, told in self.faults.items()]


class Nodes:
    """The nodes that were alive when it was made."""

    def __init__(self) -> None:
        there = ray.nodes()
        alive = [node for node in there if node["Alive"]]
        self.dead = [str(node["NodeManagerAddress"]) for node in there if not node["Alive"]]
        addresses = [str(node["NodeManagerAddress"]) for node in alive]
        self.all = [
            Node(
                node_id=str(node["NodeID"]),
                # Several raylets of one machine (tests, mistakes) have one address.
                name=address if addresses.count(address) == 1 else f"{address}#{str(node['NodeID'])[:6]}",
                is_head="node:__internal_head__" in node["Resources"],
            )
            for node, address in zip(alive, addresses, strict=True)
        ]

    @property
    def head(self) -> Node:
        return next((node for node in self.all if node.is_head), self.all[0])

    def ask(self, function: Callable[..., Any], *given: Any, timeout_s: float) -> Answers:
        """`function(*given)` on every node at once."""
        return self._ask(self.all, function, given, timeout_s)

    def ask_one(self, node: Node, function: Callable[..., Any], *given: Any, timeout_s: float) -> Answers:
        """The same on one node."""
        return self._ask([node], function, given, timeout_s)

    def _ask(
        self, nodes: list[Node], function: Callable[..., Any], given: tuple[Any, ...], timeout_s: float
    ) -> Answers:
        pending = {}
        for node in nodes:
            task = ray.remote(function).options(
                num_cpus=0,
                max_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False),
                runtime_env={"env_vars": _ENVIRONMENT},
            )
            pending[node.name] = task.remote(*given)
        ready, _ = ray.wait(list(pending.values()), num_returns=len(pending), timeout=timeout_s)
        values, faults = {}, {}
        for name, task in pending.items():
            if task not in ready:
                faults[name] = f"no answer within {timeout_s:g} s"
                with contextlib.suppress(RayError, ValueError):
                    ray.cancel(task, force=True)
                continue
            try:
                values[name] = ray.get(task, timeout=1)
            except RayTaskError as error:
                faults[name] = str(error.cause).splitlines()[0][:300]
            except (RayError, GetTimeoutError) as error:
                faults[name] = " ".join(str(error).split())[:300]
        return Answers(values=values, faults=faults)
