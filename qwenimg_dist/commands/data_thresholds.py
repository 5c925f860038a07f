"""What the configured filters' thresholds do to a data set's scores: where each lies, how many rows fall on each side.

Place in the flow: `data inspect` draws them. A filter's thresholds are found
by asking it: along one score, its `admit` is asked at many values, and where the verdict changes, the place is found by
bisection and named after the parameter that has this value. So a filter needs to declare nothing, and what is drawn is
what it does. A filter that looks at several scores at once is asked with the others as in a row that it admits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from producers.filters import validate_filters
from producers.filters.base import BoundFilter, Rejection, Value
from qwenimg_dist.config import Config
from qwenimg_dist.data.row_columns import RowColumns
from qwenimg_dist.report.histograms import Histogram, Threshold, histogram
from qwenimg_dist.schema import LABEL_PREFIX, SCORE_PREFIX

_PROBES: Final = 129
_HALVINGS: Final = 80
_TRIED_ROWS: Final = 256

Floats = npt.NDArray[np.float64]


def histograms(config: Config, columns: RowColumns) -> list[Histogram]:
    """One per score of the index, with the thresholds of the filters that are enabled in `config`."""
    if not len(columns.rows):
        return []
    kept = columns.is_word("status", "kept")
    owners = {name: bound for bound in validate_filters(config.filters) for name in bound.filter.scores}
    found = []
    for name in columns.scores:
        values = columns.arrays[SCORE_PREFIX + name]
        bound = owners.get(name)
        lines = thresholds(bound, name, columns) if bound is not None else []
        found.append(histogram(name, values, kept, lines))
    return found


def thresholds(bound: BoundFilter, score: str, columns: RowColumns) -> list[Threshold]:
    """Where the filter's verdict changes along one of its scores, ascending."""
    values = columns.arrays[SCORE_PREFIX + score]
    numbers = np.sort(values[np.isfinite(values)].astype(np.float64))
    others = _admitted_values(bound, columns)
    if not len(numbers) or others is None:
        return []
    probe = _Probe(bound, score, others)
    found = []
    for low, high in probe.changes(numbers):
        one = probe.threshold(low, high, numbers)
        if one is not None:
            found.append(one)
    return found


class _Probe:
    """Asks one filter about values of one score."""

    def __init__(self, bound: BoundFilter, score: str, others: Mapping[str, Value]) -> None:
        self._bound, self._score, self._others = bound, score, others
        self._params = {
            name: float(value)
            for name, value in bound.params.model_dump().items()
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        }

    def verdict(self, value: float) -> str | None:
        """The reason, None for an admitted row."""
        rejection = _ask(self._bound, {**self._others, self._score: value})
        return rejection.reason if rejection is not None else None

    def changes(self, numbers: Floats) -> Iterable[tuple[float, float]]:
        """Neighbouring values between which the verdict changes. The parameters are asked too, so that a threshold
        outside of what was measured is found as well."""
        asked = [*np.linspace(numbers[0], numbers[-1], _PROBES), *np.quantile(numbers, np.linspace(0, 1, _PROBES))]
        asked += [numbers[0] - 1, numbers[0] / 2, numbers[-1] + 1, numbers[-1] * 2]
        for value in self._params.values():
            asked += [v for p in (value, -value, 1 / value if value else 0.0) for v in (*_around(p), p)]
            asked += [value - 1, value + 1]  # counts are compared as whole numbers
        positive = numbers[0] > 0  # where all are, zero or less would be no value of this score
        values = sorted({float(value) for value in asked if not (positive and value <= 0)})
        verdicts = [self.verdict(value) for value in values]
        return [
            (values[i], values[i + 1])
            for i in range(len(values) - 1)
            if (verdicts[i] is None) != (verdicts[i + 1] is None)
        ]

    def threshold(self, low: float, high: float, numbers: Floats) -> Threshold | None:
        """The change between two values, and what lies on each side."""
        rejects_low = self.verdict(low) is not None
        for _ in range(_HALVINGS):
            middle = low + (high - low) / 2
            if not low < middle < high:
                break
            if (self.verdict(middle) is not None) == rejects_low:
                low = middle
            else:
                high = middle
        at, name = self._named(low, high)
        reason = self.verdict(low if rejects_low else high)
        if reason is None:
            return None
        below = int(np.searchsorted(numbers, low, side="right"))  # low is on the lower side, high on the upper
        rejected = below if rejects_low else len(numbers) - below
        return Threshold(
            filter=self._bound.name,
            at=at,
            rejects="below" if rejects_low else "above",
            inclusive=self.verdict(at) is not None,
            reason=reason,
            name=name,
            rejected=rejected,
            admitted=len(numbers) - rejected,
        )

    def _named(self, low: float, high: float) -> tuple[float, str]:
        for name, value in self._params.items():
            for candidate, shown in ((value, name), (1 / value if value else math.inf, f"1/{name}")):
                if math.isclose(candidate, low, rel_tol=1e-9) or math.isclose(candidate, high, rel_tol=1e-9):
                    return candidate, shown
        return (low + high) / 2, ""


def _ask(bound: BoundFilter, values: Mapping[str, Value]) -> Rejection | None:
    """The filter's verdict; values that it cannot reckon with count as admitted, so that no line is drawn there."""
    try:
        return bound.admit(values)
    except (ArithmeticError, ValueError, KeyError):
        return None


def _admitted_values(bound: BoundFilter, columns: RowColumns) -> dict[str, Value] | None:
    """Scores and labels of a row that the filter admits, if there is one, else of any row that it has scored."""
    tried = _scored_rows(bound, columns)
    for values in tried:
        if _ask(bound, values) is None:
            return values
    return tried[0] if tried else None


def _scored_rows(bound: BoundFilter, columns: RowColumns) -> list[dict[str, Value]]:
    """Values of some rows that have all of the filter's scores, evenly spaced."""
    names = [*(SCORE_PREFIX + name for name in bound.filter.scores), *(LABEL_PREFIX + n for n in bound.filter.labels)]
    if any(name not in columns.arrays for name in names):
        return []
    mask = np.ones(len(columns.rows), dtype=np.bool_)
    for name in names:
        if name not in columns.words:  # an empty word is a label too
            mask = mask & np.isfinite(columns.arrays[name])
    rows = np.flatnonzero(mask)
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _TRIED_ROWS)).astype(np.int64))]
    return [{name.partition("_")[2]: _value(columns, name, row) for name in names} for row in rows.tolist()]


def _value(columns: RowColumns, name: str, row: int) -> Value:
    value = columns.arrays[name][row]
    return columns.words[name][int(value)] if name in columns.words else float(value)


def _around(value: float) -> Sequence[float]:
    return math.nextafter(value, -math.inf), math.nextafter(value, math.inf)
