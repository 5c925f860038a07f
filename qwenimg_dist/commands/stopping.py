"""SIGTERM and SIGINT as a wish to stop: what is at work ends cleanly, and a second Ctrl-C does not wait for it.

Place in the flow: `produce`, `train` and `run` do their work inside `stop_signals` and look at the event. Ray installs
handlers of its own when it starts, so `catch_signals` is called again after that. Outside the main thread nothing is
installed: Python allows handlers there only.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_signals(stop: threading.Event) -> Iterator[None]:
    """Both signals set `stop` until the end of the block; what was there before comes back afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    catch_signals(stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def catch_signals(stop: threading.Event) -> None:
    """Install the handlers, here and now. A second SIGINT raises KeyboardInterrupt."""

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice
        stop.set()

    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            signal.signal(number, ask)
