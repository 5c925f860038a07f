"""Signs of life of this rank, given to a small process beside it that ends the rank when they stop.

Place in the flow: `trainer.train` runs inside `watched`; session and trainer say by `hooks.stage` what the rank begins.
A thread tells the process once per second that the rank lives, and since when it is in its present stage: so nothing
depends on how long loading, compiling, saving or evaluating takes, and a rank that is stopped (SIGSTOP, a frozen
machine) is told from one that works. What is done then stands in `watchdog_process.py`. Works under torchrun, Ray Train
and alone, since it needs neither; there is one process of some 10 MB per rank.

Refuses to fail a run: where the process cannot start, that is said once.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from consumers import watchdog_process
from consumers.hooks import Hooks
from qwenimg_dist.config import Config

NOTE: Final = ".last-death"
_BEAT_S: Final = 1.0
_CLOSE_S: Final = 1.0


@contextlib.contextmanager
def watched(config: Config, hooks: Hooks) -> Iterator[Hooks]:
    """Watch this process until the end of the block. The hooks it yields tell `stage` and `heartbeat` to the watch."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        watch = Watch(
            rank=rank,
            heartbeat_timeout_s=config.train.heartbeat_timeout_s,
            stall_timeout_s=config.train.stall_timeout_s,
            note=Path(config.run.path or ".") / NOTE,
            log=hooks.log_file,
            warn=hooks.say,
        )
    except OSError as error:
        hooks.say(f"warning: the watchdog of rank {rank} does not start ({error}): a rank that hangs goes unnoticed")
        yield hooks
        return

    def heartbeat(step: int) -> None:
        watch.advance(step)
        hooks.heartbeat(step)

    try:
        yield replace(hooks, stage=watch.stage, heartbeat=heartbeat)
    finally:
        watch.close()


class Watch:
    """The rank's end of the pipe, and the thread that writes into it."""

    def __init__(
        self,
        *,
        rank: int,
        heartbeat_timeout_s: float,
        stall_timeout_s: float,
        note: Path,
        log: str,
        warn: Callable[[str], None],
    ) -> None:
        self._step: int | None = None
        self._now = ("starting", time.monotonic())
        self._memory_gb = 0.0
        self._closed = threading.Event()
        self._warn = warn
        self._beat_s = min(_BEAT_S, heartbeat_timeout_s / 5)
        file = Path(watchdog_process.__file__)
        limits = [str(rank), str(heartbeat_timeout_s), str(stall_timeout_s)]
        command = [sys.executable, "-I", "-S", str(file), *limits, str(note), log]
        # A session of its own: what stops the rank's whole terminal or group must not stop the watch.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        assert self._process.stdin is not None
        self._pipe = self._process.stdin.fileno()
        os.set_blocking(self._pipe, False)
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        self._thread.start()

    def advance(self, step: int) -> None:
        """So many steps are done."""
        self._step = step
        self._tell()

    def stage(self, name: str) -> None:
        """This rank begins something. Costs some microseconds, and may be called for every micro-batch."""
        self._now = (name, time.monotonic())
        self._tell()

    def close(self) -> None:
        """The rank ends by itself: whatever its exit code, it has said why."""
        self._closed.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            os.write(self._pipe, watchdog_process.BYE)
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_CLOSE_S)

    def _beat(self) -> None:
        page = resource.getpagesize()
        while True:
            self._memory_gb = int(Path("/proc/self/statm").read_text().split()[1]) * page / 1e9
            if not self._tell():
                self._warn("warning: the watchdog of a rank has ended; a rank that hangs will not be noticed")
                return
            if self._closed.wait(self._beat_s):
                return

    def _tell(self) -> bool:
        """Write one sign; False if nobody is there to read it."""
        (stage, since), step = self._now, self._step
        stage_s = float(time.monotonic() - since)
        sign = {"step": step, "stage": stage, "stage_s": stage_s, "memory_gb": self._memory_gb}
        try:
            os.write(self._pipe, json.dumps(sign).encode() + b"\n")
        except BlockingIOError:
            return True  # the pipe is full of signs that nobody has read yet
        except OSError:
            return False
        return True
