"""Reading all of a data set, with a word now and then of how far it is.

Place in the flow: `data verify` and `data repair` go through every committed byte, which for terabytes takes hours.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from qwenimg_dist.report.table import show_bytes, show_time

_LINE_EVERY_S: Final = 15.0


class Reading:
    """Counts what is read, and says a line every quarter of a minute. `say=None` is silent."""

    def __init__(self, say: Callable[[str], None] | None, total_bytes: int) -> None:
        self._say = say
        self._total = total_bytes
        self._read = 0
        self._lock = threading.Lock()
        self._began = self._last = time.monotonic()

    def add(self, num_bytes: int) -> None:
        """From any thread."""
        with self._lock:
            self._read += num_bytes

    def tick(self, what: str = "") -> None:
        """Called often; `what` stands in for the bytes where they are through."""
        now = time.monotonic()
        if self._say is None or now - self._last < _LINE_EVERY_S:
            return
        self._last = now
        if what:
            self._say(what)
            return
        rate = self._read / (now - self._began)
        left = f"about {show_time((self._total - self._read) / rate)} left" if rate else "nothing whole yet"
        self._say(f"read {show_bytes(self._read)} of {show_bytes(self._total)}, {show_bytes(int(rate))}/s, {left}")
