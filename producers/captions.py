"""The verdict of the caption filters on a unit's rows: which captions are left, and what they score.

Place in the flow: `unit.py` asks for all rows of a unit at once (a tokenizer likes batches), before `decide.py`
assesses them. From here on a row has only the captions that are left; the faults of the others are recorded beside the
listed captions, so that the catalog leaves them out. Captions are text that is at hand: they are judged anew by each
run of a unit, so that other thresholds need no memory of scores per caption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from producers.filters.base import BoundFilter, Facts, Rejection, Scorers, Value, Values
from producers.plan import Plan
from producers.state import Row


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A row after the caption filters."""

    row: Row
    """With the captions that are left; all of them where none is, since the row is then rejected."""
    faults: tuple[str, ...] = ()
    """Beside the listed captions: why one is left out, or the empty word. No entries where all are fit."""
    values: Values
    """Scores and labels of the row, those per caption being the first left caption's."""
    rejected: Mapping[str, Rejection]
    """Filter that left the row no caption -> the fault of the first one it took."""


@dataclass
class _Open:
    """A row while it is judged: beside each caption its values and its fault."""

    row: Row
    values: list[dict[str, Value]]
    faults: list[Rejection | None]
    of_row: dict[str, Value]
    rejected: dict[str, Rejection]

    @property
    def left(self) -> list[int]:
        return [index for index, fault in enumerate(self.faults) if fault is None]


def judge(rows: Sequence[Row], plan: Plan, scorers: Scorers) -> list[Judged]:
    """Each row after the plan's caption filters, in order; rows without captions pass through."""
    opened = [
        _Open(row=row, values=[{} for _ in row.captions], faults=[None] * len(row.captions), of_row={}, rejected={})
        for row in rows
    ]
    for one in plan.filters:
        if one.filter.looks_at == "captions":
            (_per_caption if one.filter.per_caption else _per_row)(one, opened, scorers)
    return [_judged(one) for one in opened]


def caption_rejection(judged: Judged, plan: Plan) -> Rejection | None:
    """By the first caption filter that does not admit the row; reconstructions have none that could be judged."""
    if not judged.row.captions:
        return None
    for one in plan.filters:
        if one.filter.looks_at == "captions":
            rejection = judged.rejected.get(one.name) if one.filter.per_caption else one.admit(judged.values)
            if rejection is not None:
                return rejection
    return None


def _per_caption(one: BoundFilter, opened: Sequence[_Open], scorers: Scorers) -> None:
    asked = [(of, index) for of in opened for index in of.left]
    facts = [_facts(of.row, (of.row.captions[index],)) for of, index in asked]
    for (of, index), values in zip(asked, _score(one, facts, scorers), strict=True):
        of.values[index] |= values
        of.faults[index] = one.admit(values)
    for of in {id(of): of for of, _ in asked}.values():
        if not of.left:
            of.rejected[one.name] = _first_taken(of, one)


def _first_taken(of: _Open, one: BoundFilter) -> Rejection:
    """The first fault that this filter found; captions taken earlier were not asked about."""
    faults = (f for v, f in zip(of.values, of.faults, strict=True) if f is not None and one.scored(v))
    first = next(faults)
    number = len(of.faults)
    return first if number == 1 else replace(first, detail=f"{first.detail}; none of {number} captions is left")


def _per_row(one: BoundFilter, opened: Sequence[_Open], scorers: Scorers) -> None:
    asked = [of for of in opened if of.left]
    facts = [_facts(of.row, tuple(of.row.captions[index] for index in of.left)) for of in asked]
    for of, values in zip(asked, _score(one, facts, scorers), strict=True):
        of.of_row |= values


def _score(one: BoundFilter, facts: Sequence[Facts], scorers: Scorers) -> list[dict[str, Value]]:
    if one.filter.load is None:
        return [one.score(each) for each in facts]
    return scorers.score(one, facts) if facts else []


def _facts(row: Row, captions: tuple[str, ...]) -> Facts:
    return Facts(
        num_bytes=row.num_bytes,
        width=row.width,
        height=row.height,
        orientation=row.orientation,
        captions=captions,
    )


def _judged(of: _Open) -> Judged:
    left = of.left
    values = of.values[left[0] if left else 0] if of.values else {}
    return Judged(
        row=replace(of.row, captions=tuple(of.row.captions[index] for index in left)) if left else of.row,
        faults=tuple("" if f is None else f.reason for f in of.faults) if len(left) < len(of.faults) else (),
        values={**values, **of.of_row},
        rejected=of.rejected,
    )
