"""Shows how producing goes: a bar on a terminal, plain lines elsewhere; and as Ray metrics where Ray runs.

Place in the flow: the command hands it to the driver as its `Observer`. Counts come from finished units, so they are
those of the data set. The rate is that of the last minutes: a start that loads models, or a night without work while
following, says nothing about now.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from types import TracebackType
from typing import Final, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from producers.driver import Observer
from producers.unit import UnitReport
from qwenimg_dist.report.table import show_time

_LINE_EVERY_S: Final = 10.0
_RATE_OVER_S: Final = 120.0
_NUM_REASONS: Final = 3


class Gauges(Protocol):
    """Where else the figures go, see `ray_metrics.py` and `tracking.py`."""

    def unit_done(self, report: UnitReport) -> None: ...

    def state(self, *, images_per_s: float, units_left: int, left_s: float) -> None: ...


class ProduceProgress(Observer):
    """Units, images per second, what was not admitted and why, time left."""

    def __init__(self, console: Console, *, bar: bool = True, line_every_s: float = _LINE_EVERY_S) -> None:
        """`bar=False` writes lines on a terminal too, where another display has the bar."""
        self._console = console
        self._has_bar = bar and console.is_terminal
        self._line_every_s = line_every_s
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._total = self._done = 0
        self._reasons: Counter[str] = Counter()
        self._began = self._last_line = time.monotonic()
        self._recent: deque[tuple[float, int]] = deque()
        """When units were finished lately, and how many pictures each had opened."""
        self.gauges: list[Gauges] = []

    def __enter__(self) -> ProduceProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_bar()

    def begin(self, num_units: int) -> None:
        self._end_bar()
        self._total, self._done = num_units, 0
        self._reasons.clear()
        self._began = self._last_line = time.monotonic()
        self._recent = deque([(self._began, 0)])
        if self._has_bar:
            self._bar = Progress(
                TextColumn("units"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rates]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=self._console,
            )
            self._task = self._bar.add_task("units", total=num_units, rates="", left="")
            self._bar.start()

    def unit_done(self, report: UnitReport) -> None:
        now = time.monotonic()
        self._done += 1
        self._reasons.update(report.reasons)
        self._recent.append((now, report.decoded))
        while len(self._recent) > 2 and now - self._recent[0][0] > _RATE_OVER_S:
            self._recent.popleft()
        left = show_time(self._left_s())
        for gauges in self.gauges:
            gauges.unit_done(report)
            units_left = self._total - self._done
            gauges.state(images_per_s=self._rate(), units_left=units_left, left_s=self._left_s())
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rates=self._rates(), left=f"{left} left")
        elif self._done == self._total or now - self._last_line >= self._line_every_s:
            spent = show_time(now - self._began)
            self._line(f"{self._done}/{self._total} units, {self._rates()}, {spent}, about {left} left")

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _rates(self) -> str:
        return f"{self._rate():.1f} images/s, {show_reasons(self._reasons)}"

    def _rate(self) -> float:
        """Pictures opened per second, lately."""
        spent = max(self._recent[-1][0] - self._recent[0][0], 1e-3)
        # The first entry says when the time begins; what it opened came before.
        return sum(opened for _, opened in list(self._recent)[1:]) / spent

    def _left_s(self) -> float:
        """By the units finished lately."""
        spent = self._recent[-1][0] - self._recent[0][0]
        return spent / (len(self._recent) - 1) * (self._total - self._done)

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        self.say(text)

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def show_reasons(reasons: Counter[str]) -> str:
    """How many rows were not admitted, and the most frequent reasons."""
    named = [f"{reason} {count:,}" for reason, count in reasons.most_common(_NUM_REASONS) if count]
    if len(+reasons) > _NUM_REASONS:
        named.append("...")
    return f"{reasons.total():,} not admitted" + (f" ({', '.join(named)})" if named else "")
