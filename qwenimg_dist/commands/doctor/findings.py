"""What a check found: a line with a state, and what to do about it.

Place in the flow: every check returns these, the command prints them. A failure makes the exit code 1, a warning does
not. Refuses to hold a secret: what is told is shown and stored as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from qwenimg_dist.config import Config

if TYPE_CHECKING:
    from qwenimg_dist.commands.doctor.nodes import Nodes

State = Literal["ok", "warning", "failure"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line."""

    name: str
    """What was looked at, with the node where that matters."""
    state: State
    told: str
    fix: str = ""
    """What to do; empty where it is ok."""
    check: str = ""
    """The check that it is of; set by the command."""

    def json(self) -> dict[str, Any]:
        return asdict(self)


def ok(name: str, told: str) -> Finding:
    return Finding(name=name, state="ok", told=told)


def warning(name: str, told: str, fix: str) -> Finding:
    return Finding(name=name, state="warning", told=told, fix=fix)


def failure(name: str, told: str, fix: str) -> Finding:
    return Finding(name=name, state="failure", told=told, fix=fix)


@dataclass(frozen=True, kw_only=True)
class Context:
    """What checks work with."""

    config: Config
    nodes: Nodes

    @property
    def timeout_s(self) -> float:
        return self.config.doctor.timeout_s


Check = Callable[[Context], Sequence[Finding]]
