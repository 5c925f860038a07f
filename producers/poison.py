"""Finds the pictures that kill the process that opens them, and records them, so that the rest of a unit is kept.

Place in the flow: when a task's process died (or ran out of memory, or never answered), the pool repeats the task with
`careful`. A careful task opens one picture at a time and writes its row into a small file first, the trail. The trail
survives the process: whoever tries next reads which row was open when it died. A row that was open at two such deaths
is poison, and is left out from then on. Only a process with one open picture is believed, so several decoding threads
cannot put the blame on a neighbour, and one kill from outside condemns nobody. A death counts only where the pool saw
the process alone die (`why`): not where its machine went, nor where the whole run was ended.

The verdict of a careful encode is a further `scan` part, that of a careful scan stands in its first: fault `poison`,
durable, read by every later run until `data repair --lift-poison`. Where more rows than `cluster.max_poison_rows` of
one unit seem to kill, the pictures are not to blame (a broken library, too little memory): nothing is recorded and
`PoisonError` says so. Crashes after the pictures were opened (in the encoders) leave no trail and count as failures of
the unit.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import pyarrow as pa

from producers.commit import commit_part
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.schema import SCAN

POISON: Final = "poison"
_FOLDER: Final = ".suspects"
_DEATHS: Final = 2
"""So many processes must have died with the row as the only open one."""


class PoisonError(RuntimeError):
    """So many pictures of a unit kill their process that it cannot be the pictures."""


@dataclass(frozen=True, kw_only=True)
class Trail:
    """What the careful tries of a unit left."""

    opening: int | None = None
    """Row that is open, or was when the process died."""
    deaths: dict[int, int] = field(default_factory=dict)
    poison: dict[int, str] = field(default_factory=dict)
    """Row -> how it killed."""


def trail_file(root: Path, kind: str, unit: int) -> Path:
    """Where the trail of a unit's scan or encoding lies."""
    return root / _FOLDER / f"{kind}-{unit:06d}.json"


def read_trail(file: Path) -> Trail | None:
    """The trail, or None if there is none, or none that can be read (it is a hint, never data)."""
    try:
        content = json.loads(file.read_text())
        opening, deaths, poison = content["opening"], content["deaths"], content["poison"]
        return Trail(
            opening=None if opening is None else int(opening),
            deaths={int(row): int(count) for row, count in deaths.items()},
            poison={int(row): str(how) for row, how in poison.items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


class Watch:
    """Keeps the trail of one careful try. Use as a context manager around the openings. `why`: how the process before
    died with its task; empty where that says nothing about the row that was open.

    Raises `PoisonError`, and forgets the trail, if the unit has more poison than can be the pictures' fault.
    """

    def __init__(self, root: Path, kind: str, unit: int, *, why: str, limit: int) -> None:
        self._file = trail_file(root, kind, unit)
        before = read_trail(self._file) or Trail()
        self._deaths, self._poison = dict(before.deaths), dict(before.poison)
        if before.opening is not None and why:
            row = before.opening
            self._deaths[row] = self._deaths.get(row, 0) + 1
            if self._deaths[row] >= _DEATHS:
                self._poison[row] = f"{_DEATHS} producers ended while it alone was open, the last so: {why}"
        if len(self._poison) > limit:
            self.forget()
            rows = ", ".join(str(row) for row in sorted(self._poison)[:5])
            raise PoisonError(
                f"unit {unit}: {len(self._poison)} pictures seem to kill the process that opens them (rows {rows}, the "
                f"last: {self._poison[max(self._poison)]}), more than cluster.max_poison_rows={limit}. That is rather "
                "a broken library or too little memory than the pictures: nothing was recorded against them. Mend "
                "that and run the same command again, or raise cluster.max_poison_rows"
            )
        self._write(None)

    @property
    def poison(self) -> dict[int, str]:
        """Rows found so far -> detail for the index."""
        return dict(self._poison)

    def opening(self, row: int) -> None:
        """Say, durably beyond this process, that this row is opened next and the one before it survived."""
        self._write(row)

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Out of memory, the process may live on, but the row counts as if it had not.
        if not isinstance(error, MemoryError):
            self._write(None)

    def forget(self) -> None:
        """Remove the trail: its verdicts are recorded, or not to be."""
        self._file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # other units' trails
            self._file.parent.rmdir()

    def _write(self, row: int | None) -> None:
        """No fsync: it is the death of a process that this must survive, not of the machine."""
        content: dict[str, Any] = {"opening": row, "deaths": self._deaths, "poison": self._poison}
        temporary = self._file.with_name(f".{self._file.name}-{os.getpid()}")
        self._file.parent.mkdir(exist_ok=True)
        temporary.write_text(json.dumps(content))
        os.replace(temporary, self._file)


def record_poison(dataset: Dataset, unit: int, poison: dict[int, str], *, config_hash: str) -> None:
    """Commit the verdicts as a further scan part of the unit; the rows' other facts stay."""
    scan = dataset.read_unit(SCAN, unit)
    assert scan is not None  # pictures are encoded after their scan
    entries = [entry for entry in scan.to_pylist() if entry["row"] in poison]
    rows = [{**entry, "fault": POISON, "detail": poison[entry["row"]]} for entry in entries]
    if rows:
        table = pa.Table.from_pylist(rows, schema=scan.schema.remove_metadata())
        commit_part(dataset, dataset.next_part(SCAN, unit), table, config_hash=config_hash)
