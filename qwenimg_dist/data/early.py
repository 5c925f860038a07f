"""A look for the next generation while the present one is still trained on, in a thread of rank 0.

Place in the flow: `generations.py` begins one some steps before the ledger ends, and takes what it found before a later
step: listing units and compiling their catalog then cost no step anything. Nothing is recorded here: a look that a
dying process takes with it never was. A problem is kept to itself, since the run may never need what was looked for:
the step that does meets it again, where it can be raised.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from qwenimg_dist.data.generation_log import Generation

EARLY_STEPS: Final = 16
"""So many steps before its first use a generation is looked for. More would make it of fewer units."""


class EarlyLook:
    """One look at a time. Not for several threads."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="generations")
        self._look: Future[list[Generation]] | None = None

    @property
    def is_busy(self) -> bool:
        """A look was begun, and what it found not taken."""
        return self._look is not None

    def begin(self, look: Callable[[], list[Generation]]) -> None:
        """Start to look; until it is taken, whatever `look` uses belongs to its thread."""
        assert not self.is_busy
        self._look = self._thread.submit(look)

    def take(self, *, wait: bool) -> list[Generation]:
        """What was found; nothing if there was nothing, or a problem, or, unless told to wait, as long as it looks."""
        if self._look is None or not (wait or self._look.done()):
            return []
        look, self._look = self._look, None
        return [] if look.exception() else look.result()

    def close(self) -> None:
        """Wait for a look that is under way: it writes into the run directory, whose lock is about to go."""
        self._thread.shutdown(wait=True, cancel_futures=True)
