"""What the surroundings of a rank hand in, so that the consumers know neither torchrun nor Ray Train.

Place in the flow: `commands` (or `__main__`) makes `Hooks`, the trainer and all that it calls ask and tell by them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from consumers.ranks import Ranks
from qwenimg_dist.rewards.base import Score


def _never() -> bool:
    return False


def _ignore(*_: object) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What the surroundings (torchrun, Ray Train) hand in, so that the consumers know neither."""

    stop_requested: Callable[[], bool] = _never
    """Asked on every rank before every step; one yes stops all of them, saved."""
    heartbeat: Callable[[int], None] = _ignore
    """Called on every rank after every step with the number of steps done."""
    stage: Callable[[str], None] = _ignore
    """Called on every rank with what it begins: the watchdog names it when nothing follows."""
    log_file: str = ""
    """A file that `say` appends to, for processes beside the rank; empty where `say` is standard error."""
    say: Callable[[str], None] = _ignore
    """One line for a person; called on rank 0, and by any rank for a warning of its own."""
    observe: Callable[[Mapping[str, float]], None] = _ignore
    """What is logged of a step, and `checkpoint/step` once one is saved; called on rank 0 for whatever shows it."""
    score: Score | None = None
    """How pictures are judged; None where the consumers open the config's rewards themselves, in a process beside the
    rank."""
    command_id: str = ""
    """The same for all starts of the gang by one command, so that a restart does not start afresh again."""


class Stopped(Exception):
    """A stop was asked for before the first step or while the run was waiting for data; nothing is lost."""


def say_once(ranks: Ranks, hooks: Hooks, line: str) -> None:
    if ranks.is_first:
        hooks.say(line)
