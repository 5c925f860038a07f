"""Sampling weights: how often a row comes per epoch, and which of its captions it comes with. Pure functions.

Place in the flow: `order.py` asks here while it builds an epoch; nothing is asked where a config gives no weights, so
that such a run's order is what it always was. A row of weight w has an offset of its own, drawn once from (seed, phase,
resolution, row), and comes floor((e + 1) w + offset) - floor(e w + offset) times in epoch e: 3 is three times in every
epoch, 0.5 every other epoch (half of the rows in each), 0 never, 1 once; over n epochs always n w times, to within one.
Integers throughout, so that every machine counts alike. The samples of an epoch follow from sorted offsets in
O(log rows), of many epochs at once, so a resume that passes many epochs costs no pass over the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qwenimg_dist.data.catalog import Catalog, Ints
from qwenimg_dist.data.draws import hashes
from qwenimg_dist.data.facets import DataError
from qwenimg_dist.data.where import Where, compile_where

_BITS: Final = 24
_ONE: Final = 1 << _BITS
_BUCKET_SHIFT: Final = 40
MAX_WEIGHT: Final = 1000.0
MAX_TIMES: Final = 50_000
"""Of a row per epoch of a mix; the weights in units of 2^-24 must stay below 2^40."""
COPY_BITS: Final = 44
"""The n-th time of a row in an epoch has draws of its own, keyed by row + (n << 44)."""

Rules = Sequence[tuple[Where, float]]


def joined(run: Rules, phase: Mapping[str, float]) -> tuple[tuple[Where, float], ...]:
    """The run's rules and those of a phase; an expression that stands in both counts as in the phase. In one order,
    since products round."""
    rules = {where.expression: (where, weight) for where, weight in run}
    rules |= {expression: (compile_where(expression), weight) for expression, weight in phase.items()}
    return tuple(rules[expression] for expression in sorted(rules))


def row_weights(catalog: Catalog, local: Ints, rules: Rules) -> Ints:
    """(n,) weights in units of 2^-24: the product over all expressions that hold for the row.

    Raises `DataError` if it passes 1000.
    """
    weights = np.ones(len(local), dtype=np.float64)
    for where, weight in rules:
        weights[where.mask(catalog.columns, catalog.num_rows)[local]] *= weight
    if len(weights) and weights.max() > MAX_WEIGHT:
        key = catalog.keys[local[int(weights.argmax())]].decode()
        raise DataError(f"data.weights give row {key} the product {weights.max():g}, more than {MAX_WEIGHT:g}")
    return np.rint(weights * _ONE).astype(np.int64)


def scaled(weights: Ints, times: Fraction, dataset: str) -> Ints:
    """(n,) weights in units of 2^-24, times a factor. Raises `DataError` if a row would come too often, or never."""
    unique, inverse = np.unique(weights, return_inverse=True)
    products = [round(int(weight) * times) for weight in unique]
    if products and products[-1] > MAX_TIMES * _ONE:
        raise DataError(
            f"data.mix.{dataset}: a row of it would come {products[-1] / _ONE:,.0f} times per epoch, more than "
            f"{MAX_TIMES}: give this data set a smaller share, or more rows"
        )
    if times and any(weight and not product for weight, product in zip(unique, products, strict=True)):
        raise DataError(
            f"data.mix.{dataset}: a row of it would come less than once in {_ONE} epochs: give this data set a larger "
            "share, or 0 to leave it out"
        )
    return np.array(products, dtype=np.int64)[inverse]


def offsets(key: int, rows: Ints) -> Ints:
    """(n,) the rows' offsets, 24 bits."""
    return (hashes(key, rows) >> np.uint64(64 - _BITS)).astype(np.int64)


def times_in_epoch(weights: Ints, offset: Ints, epoch: int) -> Ints:
    """(n,) how often each row comes."""
    return ((epoch + 1) * weights + offset) // _ONE - (epoch * weights + offset) // _ONE


class EpochCounts:
    """Samples per bucket in any epoch, without looking at the rows again. 4 bytes per row of fractional weight."""

    def __init__(self, bucket: npt.NDArray[np.int16], weights: Ints, offset: Ints) -> None:
        self._groups: list[tuple[int, int, int, npt.NDArray[np.uint32]]] = []
        of = (bucket.astype(np.int64) << _BUCKET_SHIFT) + weights
        order = np.argsort(of, kind="stable")
        groups, starts = np.unique(of[order], return_index=True)
        for group, start, end in zip(groups.tolist(), starts, np.append(starts, len(of))[1:], strict=True):
            of_bucket, weight = divmod(group, 1 << _BUCKET_SHIFT)
            mine = offset[order[start:end]] if weight % _ONE else offset[:0]
            if weight:
                self._groups.append((of_bucket, weight, int(end - start), np.sort(mine).astype(np.uint32)))

    def __bool__(self) -> bool:
        """Whether any row ever comes."""
        return bool(self._groups)

    def at(self, epoch: int) -> dict[int, int]:
        """Bucket -> samples of an epoch, where there are any."""
        return {bucket: int(num[0]) for bucket, num in self.of(epoch, 1).items() if num[0]}

    def of(self, first: int, num: int) -> dict[int, Ints]:
        """Bucket -> (num,) samples of each of the epochs first, first + 1, ..."""
        edges = np.arange(first, first + num + 1, dtype=np.int64)
        counts: dict[int, Ints] = {}
        for bucket, weight, rows, sorted_offsets in self._groups:
            floors = np.diff(_floors(edges * weight, rows, sorted_offsets))
            counts[bucket] = counts[bucket] + floors if bucket in counts else floors
        return counts


def _floors(positions: Ints, num: int, sorted_offsets: npt.NDArray[np.uint32]) -> Ints:
    """Per position, the sum over the rows of floor(position + offset)."""
    whole, rest = np.divmod(positions, _ONE)
    over = len(sorted_offsets) - np.searchsorted(sorted_offsets, (_ONE - rest).astype(np.uint32))
    counted: Ints = whole * num + np.where(rest > 0, over, 0)
    return counted


def repeat(local: Ints, times: Ints) -> tuple[Ints, Ints]:
    """Every row as often as it comes: (rows, which time it is)."""
    rows = np.repeat(local, times)
    first = np.repeat(np.cumsum(times) - times, times)
    return rows, np.arange(len(rows), dtype=np.int64) - first


def choose_captions(
    catalog: Catalog, local: Ints, draws: npt.NDArray[np.float64], weights: Mapping[str, float]
) -> npt.NDArray[np.int64]:
    """(n,) which of its captions each row comes with, by the weights of the kinds.

    The kinds that a row has share its draw by their weights, captions of one kind share theirs evenly. A row that has
    only kinds of weight 0 draws evenly among what it has. Raises `DataError` for a kind without a weight.
    """
    start = catalog.caption_start[local]
    num = catalog.caption_start[local + 1] - start
    kinds = np.stack([_kind(catalog, start, num, index) for index in range(int(num.max()) if len(num) else 0)] or [num])
    of_kind = np.stack([(kinds == kind).sum(axis=0) for kind in range(len(catalog.caption_kinds))])
    for kind, name in enumerate(catalog.caption_kinds):
        if name not in weights and of_kind[kind].any():
            given = ", ".join(weights) or "none"
            raise DataError(
                f"data.caption_weights has no weight for the caption kind {name!r} that the data has (given: {given}): "
                f"add it, 0 keeps such captions out"
            )
    weight = np.array([weights.get(name, 0.0) for name in catalog.caption_kinds])
    share: npt.NDArray[Any] = weight[:, None] / np.maximum(of_kind, 1)
    even = (share * of_kind).sum(axis=0) == 0
    total = np.zeros(len(local))
    ends = []
    for index in range(len(kinds)):
        inside = index < num
        of_caption = share[np.where(inside, kinds[index], 0), np.arange(len(local))]
        total = total + np.where(inside, np.where(even, 1.0, of_caption), 0.0)
        ends.append(total)
    choice = np.zeros(len(local), dtype=np.int64)
    for end in ends:
        choice += end <= draws * total
    return choice


def _kind(catalog: Catalog, start: Ints, num: Ints, index: int) -> npt.NDArray[np.int64]:
    """(n,) kind of each row's `index`-th caption; -1 where it has none."""
    kind = catalog.caption_kind[start + np.minimum(index, num - 1)].astype(np.int64)
    return np.where(index < num, kind, -1)
