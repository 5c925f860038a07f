"""Whether the filters on pixels admit a row: what must be known of a first copy before it may cost the ones after it.

Place in the flow: `near.py` and `dedup.py` ask for the rows that a later row is a copy of, and for no others. The
driver knows the answer where the row's unit is ready; else a task of its own opens just those pictures, so that no unit
waits for another to be encoded. The verdict is of the row's picture and captions alone: not of duplicates, nor of
resolution classes. So it may be asked at any time and as often as one likes, and need not be kept. A picture that
cannot be opened at the moment counts as admitted, as where no filter looks at pixels: once it can be, its copies would
all be kept beside it.

Costs one decode more (and the filters' models once more) for each first copy whose unit is not ready when a copy of it
is settled; units are settled a few ahead of those that are encoded. Where the scores are in the index already, nothing
is opened.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from producers.captions import judge
from producers.decide import Assessment, assess_pixels
from producers.dedup import ADMITTED, REJECTED, UNKNOWN
from producers.filters.base import Scorers
from producers.near_index import Ints
from producers.plan import Plan
from producers.scan import PASSING
from producers.state import Decision, read_record, read_state
from producers.unit import opened_rows
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.schema import DUPLICATE, NEAR_DUPLICATE, ROWS, TOO_SMALL

States = npt.NDArray[np.int8]

_NOT_OF_PIXELS: Final = frozenset({DUPLICATE, NEAR_DUPLICATE, TOO_SMALL})
"""Reasons that say nothing of the filters on pixels."""


@dataclass
class Verdicts:
    """What the driver knows, one byte per row. It reads a unit's decisions once, when first asked about its rows."""

    dataset: Dataset
    plan: Plan
    _states: States = field(default_factory=lambda: np.zeros(0, dtype=np.int8))
    _read: set[int] = field(default_factory=set)

    def of(self, rows: Ints) -> States:
        """`UNKNOWN`, `ADMITTED` or `REJECTED` of each row."""
        if not len(rows):
            return np.zeros(0, dtype=np.int8)
        self._reach(int(rows.max()))
        unknown = rows[self._states[rows] == UNKNOWN]
        for unit in np.unique(unknown // self.dataset.unit_size).tolist():
            self._read_unit(unit)
        return self._states[rows]

    def learn(self, verdicts: Mapping[int, bool]) -> None:
        """Answers of a task."""
        for row, admitted in verdicts.items():
            self._reach(row)
            self._states[row] = ADMITTED if admitted else REJECTED

    def tasks(self, rows: Iterable[int]) -> dict[int, tuple[int, ...]]:
        """Unit -> its rows among these: what a worker is asked for at a time."""
        found: dict[int, list[int]] = {}
        for row in sorted(rows):
            found.setdefault(row // self.dataset.unit_size, []).append(row)
        return {unit: tuple(of_unit) for unit, of_unit in found.items()}

    def _reach(self, row: int) -> None:
        if row >= len(self._states):
            more = max(row + 1 - len(self._states), len(self._states) // 4, 4096)
            self._states = np.concatenate([self._states, np.zeros(more, dtype=np.int8)])

    def _read_unit(self, unit: int) -> None:
        """Decisions of a unit that is ready by this very plan."""
        if unit in self._read or read_record(self.dataset, unit).get("plan") != self.plan.digest:
            return
        self._read.add(unit)
        table = self.dataset.read_unit(ROWS, unit, ["row", "status", "reason"])
        assert table is not None  # it has a record
        for row, status, reason in zip(*(table[name].to_pylist() for name in ("row", "status", "reason")), strict=True):
            self._reach(row)
            if self._states[row] == UNKNOWN and reason not in _NOT_OF_PIXELS:
                self._states[row] = ADMITTED if status == "kept" or reason in PASSING else REJECTED


def rows_to_judge(dataset: Dataset, unit: int, rows: Sequence[int], plan: Plan, scorers: Scorers) -> list[Assessment]:
    """What is known of these rows of the unit; those without a decision must be opened. They are settled, so they have
    a scan; rows that this look has just appended to their unit may not have one yet."""
    state = read_state(dataset, unit, plan, only=frozenset(rows))
    return [assess_pixels(one, state, plan) for one in judge(state.rows, plan, scorers)]


def judge_rows(
    known: Sequence[Assessment], *, plan: Plan, root: str, scorers: Scorers, num_threads: int = 1
) -> dict[int, bool]:
    """Row -> whether the filters on pixels admit it; opens what must be opened."""
    verdicts = {one.row.row: _admitted(one.decision) for one in known if one.decision is not None}
    to_open = [one for one in known if one.decision is None]
    for opened in opened_rows(to_open, plan, root, scorers, num_threads):
        verdicts[opened.assessment.row.row] = _admitted(opened.decision)
    return verdicts


def _admitted(decision: Decision) -> bool:
    return decision.kept or decision.reason in PASSING
