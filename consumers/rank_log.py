"""What every rank does, as JSON lines of its own: for finding the one rank that is slow or odd among many.

    RUN/logs/rank-00007.jsonl        with logger.every_rank=true

Place in the flow: sits between the trainer and the hooks. One line per step with the seconds that each stage took on
this rank's host, one per message, and one for how it ended; each with time, host and process. Off by default: a line
per rank and step is much for a shared file system. Refuses to fail a run: a file that cannot be written is said once.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from consumers.hooks import Hooks
from qwenimg_dist.config import Config

FOLDER: Final = "logs"


class RankLog:
    """The file of one rank, and the stages of the step that is under way."""

    def __init__(self, file: Path, rank: int, hooks: Hooks) -> None:
        """Raises OSError if the file cannot be opened."""
        file.parent.mkdir(parents=True, exist_ok=True)
        self._sink: Any = open(file, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the rank
        self._hooks = hooks
        self._head = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid()}
        self._stages: defaultdict[str, float] = defaultdict(float)
        self._stage, self._since = "starting", time.monotonic()

    def stage(self, name: str) -> None:
        self._turn(name)
        self._hooks.stage(name)

    def heartbeat(self, step: int) -> None:
        self._turn("between steps")
        seconds = {name: round(value, 6) for name, value in self._stages.items()}
        self._stages.clear()
        self.write(step=step, seconds=seconds)
        self._hooks.heartbeat(step)

    def say(self, line: str) -> None:
        self.write(said=line)
        self._hooks.say(line)

    def write(self, **values: Any) -> None:
        if self._sink is None:
            return
        try:
            self._sink.write(json.dumps({"time": time.time(), **self._head, **values}, ensure_ascii=False) + "\n")
            self._sink.flush()
        except OSError as error:
            self._sink = None
            self._hooks.say(f"warning: the log of rank {self._head['rank']} ends here: {error}")

    def close(self) -> None:
        if self._sink is not None:
            with contextlib.suppress(OSError):
                self._sink.close()

    def _turn(self, name: str) -> None:
        now = time.monotonic()
        self._stages[self._stage] += now - self._since
        self._stage, self._since = name, now


@contextlib.contextmanager
def rank_logged(config: Config, hooks: Hooks) -> Iterator[Hooks]:
    """Hooks that also write this rank's log until the end of the block; the same ones where none is asked for."""
    if not config.logger.every_rank:
        yield hooks
        return
    rank = int(os.environ.get("RANK", "0"))
    file = Path(config.run.path or ".") / FOLDER / f"rank-{rank:05d}.jsonl"
    try:
        log = RankLog(file, rank, hooks)
    except OSError as error:
        hooks.say(f"warning: rank {rank} has no log of its own: {error}")
        yield hooks
        return
    try:
        yield replace(hooks, stage=log.stage, heartbeat=log.heartbeat, say=log.say)
    except BaseException as error:
        log.write(ended=f"{type(error).__name__}: {error}")
        raise
    else:
        log.write(ended="")
    finally:
        log.close()
