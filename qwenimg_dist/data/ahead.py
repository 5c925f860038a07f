"""How far producers are ahead of training: what a run that follows tells of itself, and the bytes of a unit.

Place in the flow: rank 0 keeps `RUN/progress.json` up to date while the run follows (`generations.py`), and producers
that are to be held back read it (`producers/hold.py`). It says which units are not, or only in part, trained on, and
which ones the run waits for. It is a help, not a record: nothing is lost with it, and the order of samples does not
depend on it. A thread writes it, since replacing a file waits for the disk, which no step should.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from qwenimg_dist.data.facets import Dataset, Part
from qwenimg_dist.files import temporary_name

FILE: Final = "progress.json"


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """The units [first, end)."""

    first: int
    end: int
    share: float
    """Of their batches: used (of a generation), or not yet trained on (of a run)."""


@dataclass(frozen=True, kw_only=True)
class RunProgress:
    """What a run says of itself."""

    step: int
    num_units: int
    """Units of its newest generations; all beyond are not trained on."""
    untrained: tuple[Stretch, ...]
    """Of those units, what is not trained on; ascending."""
    awaited: int
    """It stands still until the units [0, awaited) are ready; 0: it does not."""
    done: bool
    """It is at its last step: nothing further will be trained on."""
    written: float
    """Unix time. Only whether it changes counts: clocks differ."""


NOTHING_TRAINED: Final = RunProgress(step=0, num_units=0, untrained=(), awaited=0, done=False, written=0.0)


def untrained(used: Iterable[Stretch]) -> tuple[int, tuple[Stretch, ...]]:
    """(number of units, what of them is untrained), given the used share of every generation.

    A generation's batches are shuffled over its units, so that of a half used one each unit is half trained on; what
    several generations cover (phases, epochs) is untrained as far as none of them has come to it.
    """
    generations = list(used)
    num_units = max((one.end for one in generations), default=0)
    left = np.ones(num_units)
    for one in generations:
        left[one.first : one.end] *= 1.0 - one.share
    if not num_units:
        return 0, ()
    starts = np.concatenate([[0], np.flatnonzero(np.diff(left)) + 1])
    ends = np.append(starts[1:], num_units)
    return num_units, tuple(
        Stretch(first=int(first), end=int(end), share=float(left[first]))
        for first, end in zip(starts, ends, strict=True)
        if left[first] > 0
    )


class ProgressWriter:
    """Writes a run's progress in a thread: always the newest, and not each one where the disk is slow."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="progress")
        self._lock = threading.Lock()
        self._newest: dict[str, Any] | None = None
        self._writing: Future[None] | None = None

    def tell(self, step: int, used: Iterable[Stretch], *, awaited: int, done: bool) -> None:
        """`used` is the used share of every generation; the rest as in `RunProgress`. Returns at once. Raises what the
        write before raised."""
        newest = {"step": step, "used": tuple(used), "awaited": awaited, "done": done}
        with self._lock:
            self._newest = newest
            if self._writing is not None and self._writing.done():
                self._writing.result()
            if self._writing is None:
                self._writing = self._thread.submit(self._write)

    def flush(self) -> None:
        """Return when what was told is written. Raises what writing raised."""
        with self._lock:
            writing = self._writing
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Write what was told last, and end the thread."""
        self._thread.shutdown(wait=True)

    def _write(self) -> None:
        while True:
            with self._lock:
                newest, self._newest = self._newest, None
                if newest is None:
                    self._writing = None
                    return
            write_progress(self._run, **newest)


def write_progress(run: Path, step: int, used: Iterable[Stretch], *, awaited: int, done: bool) -> None:
    """Replace the file at once. A disk without room for it must not end a run: producers keep to what they know."""
    num_units, stretches = untrained(used)
    told = {
        "step": step,
        "num_units": num_units,
        "untrained": [[one.first, one.end, one.share] for one in stretches],
        "awaited": awaited,
        "done": done,
        "written": time.time(),
    }
    file = run / FILE
    temporary = temporary_name(file)
    with contextlib.suppress(OSError):
        run.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(json.dumps(told) + "\n", encoding="utf-8")
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)


def read_progress(run: Path) -> RunProgress | None:
    """None where there is none, or none that can be read just now."""
    try:
        told = json.loads((run / FILE).read_text(encoding="utf-8"))
        return RunProgress(
            step=int(told["step"]),
            num_units=int(told["num_units"]),
            untrained=tuple(Stretch(first=a, end=b, share=share) for a, b, share in told["untrained"]),
            awaited=int(told["awaited"]),
            done=bool(told["done"]),
            written=float(told["written"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def bytes_ahead(progress: RunProgress, unit_bytes: Mapping[int, int]) -> float:
    """Bytes of the units in `unit_bytes` that are not trained on."""
    ahead = sum(float(size) for unit, size in unit_bytes.items() if unit >= progress.num_units)
    for stretch in progress.untrained:
        ahead += stretch.share * sum(unit_bytes.get(unit, 0) for unit in range(stretch.first, stretch.end))
    return ahead


def part_bytes(dataset: Dataset, parts: Iterable[Part]) -> int:
    """Size of the parts' tars, as committed. Reads one commit record per part."""
    return sum(tar.size_bytes for part in parts for tar in dataset.tars(part))
