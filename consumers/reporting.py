"""Has `RUN/report.html` written beside the run: by a process of its own, so that no step waits for it.

Place in the flow: rank 0 calls `begin` after each checkpoint and `left` once the run has left its process group. The
process (`python -m qwenimg_dist.report RUN`) knows neither torch nor the GPU; one at a time, with low priority, and so
seldom that it takes at most a fifth of one core. Refuses to fail a run: what goes wrong is said once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from consumers.errors import TrainingError

_REST: Final = 4.0
"""Times the last report's duration that pass before the next is begun."""
_TIMEOUT_S: Final = 300.0
_ROOT: Final = Path(__file__).resolve().parents[1]


class ReportWriter:
    """Starts the process and looks after it. Only rank 0 has one."""

    def __init__(self, run_dir: Path, say: Callable[[str], None]) -> None:
        self._run_dir = run_dir
        self._say = say
        self._process: subprocess.Popen[bytes] | None = None
        self._began = 0.0
        self._not_before = 0.0
        self._failed = False

    def begin(self) -> None:
        """Write the report in the background, unless one is being written or has just been."""
        self._look()
        if self._process is None and time.monotonic() >= self._not_before and not self._failed:
            self._start()

    def left(self, kind: type[BaseException] | None, *_: object) -> None:
        """The run has ended, as an exit handler is told: `finish`, unless the gang may start anew, which must not wait
        for a report."""
        if kind is None or issubclass(kind, ValueError | TrainingError):
            self.finish()

    def finish(self) -> None:
        """Write the report of the end, and wait for it."""
        self._end(self._process)  # of an earlier state
        self._process = None
        self._failed = False
        self._start()
        if self._process is None:
            return
        try:
            self._process.wait(timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._end(self._process)
        self._look()

    def _start(self) -> None:
        self._began = time.monotonic()
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "qwenimg_dist.report", str(self._run_dir)]
        if nice := shutil.which("nice"):
            command = [nice, "-n", "10", *command]
        try:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,  # torchrun and Ctrl-C signal whole process groups, and a stop wants its report
            )
        except OSError as error:
            self._fail(str(error))

    def _look(self) -> None:
        """Take note of a process that has ended."""
        if self._process is None or self._process.poll() is None:
            return
        now = time.monotonic()
        self._not_before = now + _REST * (now - self._began)
        _, told = self._process.communicate()
        if self._process.returncode:
            lines = told.decode(errors="replace").strip().splitlines() or [f"exit code {self._process.returncode}"]
            self._fail(lines[-1])
        self._process = None

    def _fail(self, why: str) -> None:
        self._failed = True
        self._say(
            f"warning: the report was not written ({why}); `qwenimg-dist report run.path={self._run_dir}` makes it"
        )

    @staticmethod
    def _end(process: subprocess.Popen[bytes] | None) -> None:
        if process is not None and process.poll() is None:
            process.kill()
        if process is not None:
            process.communicate()
