"""Rows of a table that cannot be read as rows: a torn line, no picture named, a label that is no label.

Place in the flow: sources make a row of each with `bad_row`, so that one broken line among a million costs itself
alone: it is listed, becomes the fault `bad_row` with file, line and reason, and counts in the funnel. `look_through` is
the first of a source's two passes. Refuses a table of which no row can be used: then it is rather a wrong column name.

The uri of such a row is `line:FILE#DIGEST`, of the line's bytes, so that it keeps its key when lines move. A line that
is corrected later is a new row; the fault stays listed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from producers.sources.base import BAD_ROW, BROKEN_LINE, SourceRow, encode_uri
from producers.sources.urls import NoDrivers
from qwenimg_dist.schema import IMAGE, Kind

_SHOWN = 3


def bad_row(file: str, content: bytes, why: str, kind: Kind = IMAGE) -> SourceRow:
    """The row of a line that is none. `why` names file and line; `content` is the line, or what stands for it."""
    why = why.encode("utf-8", "backslashreplace").decode()  # it quotes what is there, which may be no text
    uri = f"{BROKEN_LINE}{encode_uri(file)}#{hashlib.sha256(content).hexdigest()[:16]}"
    return SourceRow(uri=uri, captions=(), fault=BAD_ROW, fault_detail=why, kind=kind)


@dataclass
class Look:
    """What a pass over the rows saw."""

    num_rows: int = 0
    num_captioned: int = 0
    num_bad: int = 0
    first_bad: list[str] = field(default_factory=list)

    def problems(self) -> list[str]:
        """For `Found.problems`. Raises ValueError if there are rows and all are bad."""
        if not self.num_bad:
            return []
        first = " | ".join(self.first_bad)
        if self.num_bad == self.num_rows:
            raise ValueError(f"{self.first_bad[0]} (none of {self.num_rows} rows can be used)")
        return [f"{self.num_bad} of {self.num_rows} rows cannot be used, and become the fault {BAD_ROW}: {first}"]


def look_through(rows: Iterable[SourceRow], no_drivers: NoDrivers | None = None) -> Look:
    """Count, and remember the first that are bad. Raises ValueError if `no_drivers` hears of too many of the rows."""
    look = Look()
    if no_drivers is not None:
        no_drivers.clear()
    for row in rows:
        look.num_rows += 1
        look.num_captioned += bool(row.captions)
        if row.fault == BAD_ROW:
            look.num_bad += 1
            if len(look.first_bad) < _SHOWN:
                look.first_bad.append(row.fault_detail or "")
    if no_drivers is not None:
        no_drivers.refuse(look.num_rows)
    return look
