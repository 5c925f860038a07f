"""Replay: a run that repeats the generations of another one, and with them its order of samples.

Place in the flow: rank 0 takes the lines over before it verifies them (`generations.py`), which compiles their catalogs
from the data set and refuses one whose parts are not those that were pinned. Beyond the last line the run goes on by
itself. Refused: a file that holds no generations, and a run that has begun with others.
"""

from __future__ import annotations

from pathlib import Path

from qwenimg_dist.data.facets import DataError
from qwenimg_dist.data.generation_log import FILE, Generation, append_line, read_lines
from qwenimg_dist.data.takedown import keep_copy, recorded


def read_replay(file: Path) -> list[Generation]:
    """The generations of a `generations.jsonl`. Raises `DataError` if it has none."""
    lines, _ = read_lines(file)
    if not lines:
        there = "has no generation" if file.is_file() else "is not there"
        raise DataError(f"train.replay_generations={file} {there}: give the {FILE} of a run that has begun")
    return lines


def take_over(run: Path, file: Path) -> int:
    """Record the generations of `file`, and the takedown lists that they followed, as the run's own; returns how many.

    A run that has begun with them gets those that it lacks. Raises `DataError` if it has begun with others.
    """
    theirs = read_replay(file)
    mine, _ = read_lines(run / FILE)
    for own, other in zip(mine, theirs, strict=False):
        if own != other:
            raise DataError(
                f"{run / FILE} has another generation {own.generation} than train.replay_generations={file}: replay "
                "into a new run.path, or leave train.replay_generations out to go on with this run's own"
            )
    for digest in {line.takedown for line in theirs} - {""}:
        keep_copy(run, recorded(file.parent, digest))
    for line in theirs[len(mine) :]:
        append_line(run / FILE, line)
    return len(theirs)
