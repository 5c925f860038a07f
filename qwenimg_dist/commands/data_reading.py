"""Reading all of a data set: a few files at a time, in order, and with a word now and then of how far it is.

Place in the flow: `data verify` and `data repair` go through every committed byte by this, which for terabytes takes
hours. Threads are enough: reading waits for the storage, and hashing lets the others run.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final, TypeVar

from qwenimg_dist.report.table import show_bytes, show_time

THREADS: Final = 8
_AHEAD: Final = 2
"""Items begun per thread before the first of them is taken."""
_POLL_S: Final = 1.0
_LINE_EVERY_S: Final = 15.0

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


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


def in_turn(
    action: Callable[[_Item], _Result], items: Iterable[_Item], tick: Callable[[], None], *, threads: int = THREADS
) -> Iterator[_Result]:
    """`map` over threads, in order, with a bounded number of results waiting. `tick` is called about once a second."""
    waiting: deque[Future[_Result]] = deque()

    def first() -> _Result:
        while not waiting[0].done():
            tick()
            wait([waiting[0]], timeout=_POLL_S)
        tick()
        return waiting.popleft().result()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
    try:
        for item in items:
            waiting.append(pool.submit(action, item))
            if len(waiting) >= _AHEAD * threads:
                yield first()
        while waiting:
            yield first()
    finally:
        pool.shutdown(cancel_futures=True)
