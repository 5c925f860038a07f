"""`RUN/generations.jsonl`: one line per generation, appended and fsynced before the generation is used.

Place in the flow: `generations.py` decides what a line says and what follows from it; here lines are only read and
written. A last line without newline was torn by a dying process, was never used, and is ignored and overwritten.
Refuses lines damaged in any other way.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from qwenimg_dist.data.facets import DataError
from qwenimg_dist.debug import fault_point
from qwenimg_dist.files import fsync_dir

FILE: Final = "generations.jsonl"


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One line of `generations.jsonl`."""

    generation: int
    phase: int | None
    """The phase it belongs to; None serves every phase and epoch (a run without `follow`)."""
    first_step: int
    """The step it was made for; a record only, the order does not depend on it."""
    epoch: int
    first_unit: int
    units: int
    """It covers the units [first_unit, units)."""
    last: bool
    """Closes its epoch."""
    rows_parts: dict[str, int]
    """Unit -> number of rows parts pinned, where it is not 1."""
    facets: dict[str, str]
    """`text`, and each resolution, -> facet."""
    index: str | None
    """Folder of its catalog under `RUN/index`; several generations may share one. None: it has no units."""
    num_rows: int
    num_texts: int
    digest: str
    """sha256 over all pinned parts, and the takedown list if there is one."""
    held_out_below: int
    """The run's held-out threshold, see `held_out.py`."""
    takedown: str = ""
    """Digest of the takedown list that was followed; empty: none."""
    dataset: str = ""
    """Which of several data sets it is of; empty in a run with one."""


def read_lines(file: Path) -> tuple[list[Generation], int]:
    """All whole lines, and the number of bytes they take. A last line without newline is ignored."""
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        return [], 0
    whole = raw[: raw.rfind(b"\n") + 1]
    lines = []
    for number, text in enumerate(whole.splitlines()):
        try:
            line = Generation(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise DataError(f"{file} line {number + 1} is damaged ({error}): restore it, or start a new run") from error
        if line.generation != number:
            raise DataError(f"{file} line {number + 1} has generation {line.generation}: restore the file")
        lines.append(line)
    return lines, len(whole)


def append_line(file: Path, line: Generation) -> None:
    """Append durably, over a torn line if there is one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    _, end = read_lines(file)
    fault_point("generation_write")
    is_new = not file.exists()
    with open(file, "xb" if is_new else "r+b") as sink:
        sink.truncate(end)
        sink.seek(end)
        sink.write(json.dumps(asdict(line), sort_keys=True).encode() + b"\n")
        sink.flush()
        os.fsync(sink.fileno())
    if is_new:
        fsync_dir(file.parent)
