"""What the ranks of a training run tell, on the command's terminal: a bar and their lines.

Place in the flow: rank 0 appends to `RUN/train.log`, wherever it runs; the command reads what is new there. On a
terminal steps move the bar, all else is a line above it; elsewhere all are lines.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qwenimg_dist.patience import patiently


class TrainDisplay:
    """Follows a log from its present end on."""

    def __init__(self, console: Console, log: Path, num_steps: int) -> None:
        self._console = console
        self._log = log
        self._position = patiently(lambda: log.stat().st_size if log.exists() else 0, str(log))
        self.heard = False
        """Whether the ranks have said anything: until then there is nothing to save."""
        self._bar = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("starting the ranks", total=num_steps)

    def start(self) -> None:
        self._bar.start()

    def end(self) -> None:
        self._bar.stop()

    def update(self) -> None:
        """Show what is new."""
        for line in self._new_lines():
            self.heard = True
            words = line.split(maxsplit=2)
            if self._console.is_terminal and words[:1] == ["step"] and "/" in words[1]:
                self._bar.update(self._task, completed=int(words[1].partition("/")[0]), description=words[2])
            else:
                self._console.print(line, highlight=False, markup=False)

    def _new_lines(self) -> Iterator[str]:
        # No log yet, or storage that does not answer for a moment: what is new is shown at a later look.
        with suppress(OSError), open(self._log, encoding="utf-8", errors="replace") as source:
            source.seek(self._position)
            yield from self._whole_lines(source)

    def _whole_lines(self, source: TextIO) -> Iterator[str]:
        while (line := source.readline()).endswith("\n"):
            self._position = source.tell()
            yield line.rstrip("\n")
