"""Shows how producing goes: a bar on a terminal, plain lines elsewhere.

Place in the flow: the command hands it to the driver as its `Observer`. Counts come from finished units, so they are
those of the data set.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from producers.driver import Observer
from producers.unit import UnitReport

_LINE_EVERY_S: Final = 10.0


class ProduceProgress(Observer):
    """Units, images per second, rejects, time left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._total = self._done = self._opened = self._lost = 0
        self._began = self._last_line = time.monotonic()

    def __enter__(self) -> ProduceProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_bar()

    def begin(self, num_units: int) -> None:
        self._end_bar()
        self._total, self._done, self._opened, self._lost = num_units, 0, 0, 0
        self._began = self._last_line = time.monotonic()
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("units"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rates]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("units", total=num_units, rates="")
            self._bar.start()

    def unit_done(self, report: UnitReport) -> None:
        self._done += 1
        self._opened += report.decoded
        self._lost += report.num_rows - report.num_kept
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rates=self._rates())
        elif self._done == self._total or time.monotonic() - self._last_line >= _LINE_EVERY_S:
            spent = time.monotonic() - self._began
            left = spent / self._done * (self._total - self._done)
            self._line(f"{self._done}/{self._total} units, {self._rates()}, {spent:.0f} s, about {left:.0f} s left")

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _rates(self) -> str:
        spent = max(time.monotonic() - self._began, 1e-3)
        return f"{self._opened / spent:.1f} images/s, {self._lost} not admitted"

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        self.say(text)

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
