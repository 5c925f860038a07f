"""One round of `produce` after the other: look at the source, list it, bring the units up to date, tell of it.

Place in the flow: `produce.py` makes the driver and calls `rounds`. While following, what a source does not give now
(a line half written, a folder emptied, a bucket that does not answer) is looked for again; damage of the data set ends
the command.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Final

from producers.driver import Driver
from producers.listing import ListingChange
from producers.progress import ProduceProgress
from producers.sources.base import Found, Source, SourceError, SourceRow
from producers.sources.folder import describe
from qwenimg_dist.storage import StorageError

_FOLLOW_POLL_S: Final = 2.0
SETTLED_S: Final = 2.0
"""While following, a file counts as written once it was not touched for this long."""


def rounds(
    driver: Driver,
    source: Source,
    found: Found,
    progress: ProduceProgress,
    stop: threading.Event,
    follow: bool,
    on_listed: Callable[[int], None],
) -> bool:
    """One round, or with `follow` rounds until a stop; False if the last one did not reach its end."""
    said: set[str] = set()
    finished = _round(driver, found, progress, said, first=True, on_listed=on_listed)
    for what, number in sorted(found.dropped.items()):
        progress.say(f"dropped {number} {what}")
    told = ""
    broke_off = False
    while follow and not stop.is_set():
        began = time.monotonic()
        try:
            finished = _round(driver, _look(source), progress, said, every_unit=broke_off)
            told, broke_off = "", False
        except SourceError as error:  # a line half written, a folder emptied: what is there next time counts
            broke_off = True  # what it listed before is no news to the next look
            if str(error) != told:
                told = str(error)
                progress.say(f"looking again: {told.encode('utf-8', 'backslashreplace').decode()}")
        stop.wait(max(_FOLLOW_POLL_S, 5 * (time.monotonic() - began)))
    return finished


def _look(source: Source) -> Found:
    """A further look. Raises `SourceError`, then or from the rows, for what is the source's own: errors of the data set
    end the command, these may pass."""

    def rows(given: Iterable[SourceRow]) -> Iterator[SourceRow]:
        try:
            yield from given
        except (ValueError, StorageError) as error:
            raise SourceError(str(error)) from error

    try:
        found = source.find(min_age_s=SETTLED_S)
    except (ValueError, StorageError) as error:
        raise SourceError(str(error)) from error
    return replace(found, rows=rows(found.rows))


def _round(
    driver: Driver,
    found: Found,
    progress: ProduceProgress,
    said: set[str],
    *,
    first: bool = False,
    every_unit: bool = False,
    on_listed: Callable[[int], None] = lambda num_pending: None,
) -> bool:
    change = driver.list_source(found)
    if first and found.ignored.total():
        progress.say(f"no rows for {describe(found.ignored)}")
    for problem in found.problems:
        if problem not in said:  # once, though `follow` meets it again and again
            said.add(problem)
            progress.say(f"warning: {problem.encode('utf-8', 'backslashreplace').decode()}")  # names may be no text
    pending = driver.pending(None if first or every_unit else change.units)
    if pending or first:
        progress.say(_announce(change, len(pending)))
    on_listed(len(pending))
    return driver.produce(pending, change.num_rows)


def _announce(change: ListingChange, num_pending: int) -> str:
    listed = f"{change.num_rows} rows listed ({change.added} new, {change.recaptioned} changed)"
    return f"{listed}; {num_pending} units to do" if num_pending else f"{listed}; nothing to do"
