"""Holds producers back while many bytes of committed units wait to be trained on.

Place in the flow: the driver asks `Hold.room` before each unit that it would have encoded; scans, which write next to
nothing, go on. What training has done is read from the run directory (`qwenimg_dist/data/ahead.py`): producers know no
consumers. **What a run waits for is always made**, so that no bound can bring both sides to a standstill; a run
that has not begun, or stands still for another reason, waits for nothing, and the bound holds. Without sizes to go by
the first unit is made alone, so that many producers do not pass the bound together. A run that does not follow, or is
at its end, holds nobody.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from qwenimg_dist.data.ahead import NOTHING_TRAINED, RunProgress, bytes_ahead, part_bytes, read_progress
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.data.generation_log import FILE as GENERATIONS_FILE
from qwenimg_dist.data.generation_log import read_lines
from qwenimg_dist.schema import ROWS

_LOOK_EVERY_S: Final = 0.5
_WAITING_S: Final = 30.0
"""So long after its last sign a run counts as waiting: one that has died meanwhile waits no more."""
_SAY_EVERY_S: Final = 600.0
_RECENT: Final = 32


class Hold:
    """Whether there is room for one more unit."""

    def __init__(
        self,
        dataset: Dataset,
        facets: Sequence[str],
        run_dir: Path,
        max_ahead_bytes: int,
        *,
        say: Callable[[str], None] = lambda line: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`facets` are those with tars."""
        self._dataset = dataset
        self._facets = tuple(facets)
        self._run_dir = run_dir
        self._bound = max_ahead_bytes
        self._say = say
        self._clock = clock
        self._ready: set[int] = set()
        self._bytes: dict[int, int] = {}
        """Of the ready units; of those that are trained on only where they were asked for before."""
        self._recent: deque[int] = deque(maxlen=_RECENT)
        self._progress = NOTHING_TRAINED
        self._looked = self._changed = self._said = -float("inf")
        self._seen = 0
        self._follows = True
        self.is_holding = False

    def unit_done(self, unit: int) -> None:
        """A unit was committed; it may be one that got a further part."""
        self._ready.add(unit)
        self._recent.append(self._measure(unit))

    def _measure(self, unit: int) -> int:
        parts = [part for facet in self._facets for part in self._dataset.unit_parts(facet, unit)]
        self._bytes[unit] = part_bytes(self._dataset, parts)
        return self._bytes[unit]

    def room(self, unit: int, num_encoding: int) -> bool:
        """Whether this unit may be encoded beside the `num_encoding` that are being."""
        self._look()
        ahead = bytes_ahead(self._progress, self._bytes)
        free = self._is_awaited(unit) or self._is_free(ahead, num_encoding)
        if not free and not self.is_holding and self._clock() - self._said > _SAY_EVERY_S:
            self._said = self._clock()
            self._say(
                f"producers are held back: {ahead:,.0f} bytes are ahead of training in {self._run_dir} "
                f"(cluster.max_ahead_bytes={self._bound}); they go on when it does"
            )
        self.is_holding = not free
        return free

    def _is_free(self, ahead: float, num_encoding: int) -> bool:
        if not self._follows or self._progress.done:
            return True
        if not self._recent:
            return num_encoding == 0
        if ahead == 0 and num_encoding == 0:
            return True  # one unit is larger than the bound
        return ahead + (num_encoding + 1) * max(self._recent) <= self._bound

    def _is_awaited(self, unit: int) -> bool:
        return unit < self._progress.awaited and self._clock() - self._changed < _WAITING_S

    def _look(self) -> None:
        """Read the run's progress, now and then."""
        if self._clock() - self._looked < _LOOK_EVERY_S:
            return
        self._looked = self._clock()
        if (found := read_progress(self._run_dir)) is not None:
            if self._seen and found.written != self._progress.written:
                self._changed = self._clock()
            self._progress = found
            self._seen += 1
        elif not self._seen:
            lines, _ = read_lines(self._run_dir / GENERATIONS_FILE)
            self._follows = not lines or lines[0].phase is not None
        if not self._ready:
            self._ready = set(self._dataset.units(ROWS))
            self._recent.extend(map(self._measure, sorted(self._ready)[-1:]))
        for unit in self._ready - self._bytes.keys():
            # Asked anew each time: a run that resumes from an earlier checkpoint has units to train on again.
            if _may_be_untrained(self._progress, unit):
                self._measure(unit)


def _may_be_untrained(progress: RunProgress, unit: int) -> bool:
    return unit >= progress.num_units or any(one.first <= unit < one.end for one in progress.untrained)
