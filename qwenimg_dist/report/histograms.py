"""Histograms of the scores of all rows, and the thresholds that are drawn into them.

Place in the flow: `data inspect` bins the index's columns here and asks the filters for their thresholds; the contact
sheet draws both. Numbers of very uneven size (bytes, pixels) get logarithmic bins. What is not a finite number is
counted apart, never put into a bin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

NUM_BINS: Final = 48
_UNEVEN: Final = 50.0
"""Bins are logarithmic where the 99 % quantile is this many times the median or the median this many times the 1 %."""
_OUTSIDE: Final = 0.25
"""How far the axis goes beyond the 1 % and 99 % quantiles, as a share of what lies between them."""
_FEW: Final = 24
"""Whole numbers of at most so many different values get a bin each."""
_EXACT: Final = 2.0**50
"""Beyond it there are no halves between whole numbers."""


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Where a filter's verdict changes along one score."""

    filter: str
    at: float
    rejects: Literal["below", "above"]
    inclusive: bool
    """Whether a row exactly at `at` is rejected."""
    reason: str
    name: str
    """Of the parameter, where its value is the threshold; else empty."""
    rejected: int
    """Rows on the rejected side, whatever other filters say of them."""
    admitted: int
    """Measured rows on the other side."""


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """One score over all rows."""

    name: str
    edges: tuple[float, ...]
    kept: tuple[int, ...]
    others: tuple[int, ...]
    """Per bin: rejected rows and faults."""
    logarithmic: bool
    discrete: bool
    """Bins are whole numbers, each in the middle of its bin."""
    cut: tuple[bool, bool]
    """Whether the first and the last bin hold all that lies beyond them too."""
    measured: int
    missing: int
    """Rows without this score: decided before it was asked for."""
    thresholds: tuple[Threshold, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For the page's script."""
        return asdict(self)


def histogram(
    name: str, values: npt.NDArray[Any], kept: npt.NDArray[np.bool_], thresholds: Sequence[Threshold] = ()
) -> Histogram:
    """Bin (rows,) `values`; `kept` tells which rows are admitted."""
    finite = np.isfinite(values)
    numbers = values[finite].astype(np.float64)
    edges, logarithmic, discrete = _edges(numbers, [one.at for one in thresholds])
    cut = (bool((numbers < edges[0]).any()), bool((numbers > edges[-1]).any()))
    inside = np.clip(numbers, edges[0], edges[-1])
    of_kept, _ = np.histogram(inside[kept[finite]], edges)
    of_all, _ = np.histogram(inside, edges)
    return Histogram(
        name=name,
        edges=tuple(edges.tolist()),
        kept=tuple(of_kept.tolist()),
        others=tuple((of_all - of_kept).tolist()),
        logarithmic=logarithmic,
        discrete=discrete,
        cut=cut,
        measured=int(finite.sum()),
        missing=int((~finite).sum()),
        thresholds=tuple(thresholds),
    )


def _edges(numbers: npt.NDArray[np.float64], lines: Sequence[float]) -> tuple[npt.NDArray[np.float64], bool, bool]:
    """(edges, logarithmic, discrete)."""
    if not len(numbers):
        return np.array([0.0, 1.0]), False, False
    low, first, middle, last, high = np.percentile(numbers, (0, 1, 50, 99, 100)).tolist()
    if high - low < _FEW and max(-low, high) < _EXACT and (numbers == np.round(numbers)).all():
        return np.arange(low - 0.5, high + 1.0), False, True
    if low > 0 and (last > _UNEVEN * middle or middle > _UNEVEN * first):
        edges = np.geomspace(low, high, NUM_BINS + 1)
        edges[0], edges[-1] = low, high  # not a rounding error inside of them
        return edges, True, False
    low, high = _without_outliers(low, first, last, high, lines)
    if low == high:
        half = max(0.5, abs(low) / 2)  # half a unit is nothing beside a very large number
        return np.array([low - half, low + half]), False, False
    return np.linspace(low, high, NUM_BINS + 1), False, False


def _without_outliers(
    low: float, first: float, last: float, high: float, lines: Sequence[float]
) -> tuple[float, float]:
    """Ends of the axis: a few values far away must not squeeze all others into one bin; thresholds stay in sight."""
    wide = last - first
    measured = [line for line in lines if low <= line <= high]
    if wide > 0:
        low = max(low, min([first - _OUTSIDE * wide, *(line - _OUTSIDE * wide for line in measured)]))
        high = min(high, max([last + _OUTSIDE * wide, *(line + _OUTSIDE * wide for line in measured)]))
    return low, high
