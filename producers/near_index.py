"""Which of tens of millions of 64-bit hashes lie within a Hamming distance of given ones. Exact, numpy alone.

Place in the flow: the driver holds one `HammingIndex` of the kept rows; `near.py` asks it once per unit. Multi-index
hashing: the 64 bits are cut into three bands; hashes within the distance agree in at least one band up to a small
radius (pigeonhole), so each band is asked for its value and those a few bits away, and only what lies there is compared
whole. New rows wait in a small buffer that is compared wholly, and are merged in blocks.

Memory: 28 bytes per row (hash, row number, three places) and 32 MB of band tables; during a merge one more copy of the
largest array. Left out: removal, since a settled row stays settled; distances above 12, which ask for too many values.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]

MAX_DISTANCE: Final = 12
NONE: Final = -1
_RECENT: Final = 16_384
"""Rows in the buffer: 512 lookups compare with all of them in about 20 ms."""
_CHUNK: Final = 1 << 21
"""Comparisons at a time; bounds what a lookup holds at some 100 MB."""
_BANDS: Final = ((0, 22), (22, 21), (43, 21))
"""(lowest bit, width)."""


@dataclass(frozen=True, kw_only=True)
class Hits:
    """Pairs within the distance: (number of the asked hash, row found, bits between them)."""

    asked: Ints
    rows: Ints
    distances: Ints

    def of(self, chosen: npt.NDArray[np.bool_]) -> Hits:
        """Some of them."""
        return Hits(asked=self.asked[chosen], rows=self.rows[chosen], distances=self.distances[chosen])


class _Band:
    """Places of all hashes in order of one band's value, and where each value begins."""

    def __init__(self, low: int, width: int, radius: int) -> None:
        self._low, self._mask = np.uint64(low), np.uint64((1 << width) - 1)
        self._flips = _flips(width, radius)
        self._order = np.empty(0, dtype=np.uint32)
        self._begins = np.zeros((1 << width) + 1, dtype=np.uint32)

    @property
    def nbytes(self) -> int:
        return self._order.nbytes + self._begins.nbytes

    def add(self, hashes: Hashes) -> None:
        """Hashes that follow those added before."""
        values = self._values(hashes)
        order = np.argsort(values, kind="stable")
        sorted_values = values[order]
        places = (order + len(self._order)).astype(np.uint32)
        # Behind those of the same value: an insertion costs a copy, not another sort.
        self._order = np.insert(self._order, self._begins[sorted_values + 1].astype(np.int64), places)
        self._begins[1:] += np.cumsum(np.bincount(values, minlength=len(self._begins) - 1)).astype(np.uint32)

    def candidates(self, asked: Hashes) -> tuple[Ints, Ints]:
        """Where what may be near begins in `places`, and how many follow: (asked, values) each."""
        values = self._values(asked)[:, None] ^ self._flips[None]
        begins = self._begins[values].astype(np.int64)
        return begins, self._begins[values + 1].astype(np.int64) - begins

    def places(self, positions: Ints) -> npt.NDArray[np.uint32]:
        return self._order[positions]

    def _values(self, hashes: Hashes) -> Ints:
        return ((hashes >> self._low) & self._mask).astype(np.int64)


class HammingIndex:
    """Kept rows by hash. Raises ValueError for a distance outside 0 to 12."""

    def __init__(self, distance: int) -> None:
        if not 0 <= distance <= MAX_DISTANCE:
            raise ValueError(f"a distance of {distance} bits: choose 0 to {MAX_DISTANCE}")
        self.distance = distance
        self._hashes = np.empty(0, dtype=np.uint64)
        self._rows = np.empty(0, dtype=np.int64)
        self._recent_hashes = np.empty(_RECENT, dtype=np.uint64)
        self._recent_rows = np.empty(_RECENT, dtype=np.int64)
        self._num_recent = 0
        self._bands: list[_Band] = []

    def __len__(self) -> int:
        return len(self._hashes) + self._num_recent

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        own = (self._hashes, self._rows, self._recent_hashes, self._recent_rows)
        return sum(array.nbytes for array in own) + sum(band.nbytes for band in self._bands)

    def add(self, hashes: Hashes, rows: Ints) -> None:
        """Remember kept rows."""
        if self._num_recent + len(hashes) > _RECENT:
            self._merge(hashes, rows)
            return
        there = slice(self._num_recent, self._num_recent + len(hashes))
        self._recent_hashes[there], self._recent_rows[there] = hashes, rows
        self._num_recent += len(hashes)

    def find(self, hashes: Hashes) -> Hits:
        """All pairs within the distance, each once, by asked hash and row."""
        found = [self._find_recent(hashes), *(self._find_in(band, hashes) for band in self._bands)]
        asked, rows, distances = (np.concatenate(columns) for columns in zip(*found))
        order = np.lexsort((rows, asked))
        asked, rows, distances = asked[order], rows[order], distances[order]
        first = np.ones(len(asked), dtype=np.bool_)  # two bands may find the same pair
        first[1:] = (asked[1:] != asked[:-1]) | (rows[1:] != rows[:-1])
        return Hits(asked=asked[first], rows=rows[first], distances=distances[first])

    def _merge(self, hashes: Hashes, rows: Ints) -> None:
        fresh = np.concatenate([self._recent_hashes[: self._num_recent], hashes])
        fresh_rows = np.concatenate([self._recent_rows[: self._num_recent], rows])
        if not self._bands:
            self._bands = [
                _Band(low, width, radius)
                for (low, width), radius in zip(_BANDS, _radii(self.distance), strict=True)
                if radius >= 0
            ]
        for band in self._bands:
            band.add(fresh)
        self._hashes = np.concatenate([self._hashes, fresh])
        self._rows = np.concatenate([self._rows, fresh_rows])
        self._num_recent = 0

    def _find_recent(self, asked: Hashes) -> tuple[Ints, Ints, Ints]:
        recent, rows = self._recent_hashes[: self._num_recent], self._recent_rows[: self._num_recent]
        step = max(1, _CHUNK // max(1, len(recent)))
        found = []
        for begin in range(0, len(asked), step):
            distances = np.bitwise_count(asked[begin : begin + step, None] ^ recent[None])
            which, place = np.nonzero(distances <= self.distance)
            found.append((which + begin, rows[place], distances[which, place].astype(np.int64)))
        return _joined(found)

    def _find_in(self, band: _Band, asked: Hashes) -> tuple[Ints, Ints, Ints]:
        begins, counts = (table.ravel() for table in band.candidates(asked))
        which = np.repeat(np.arange(len(asked)), len(begins) // max(1, len(asked)))
        ends = np.cumsum(counts)
        found = []
        begin = 0
        while begin < len(begins):
            before = int(ends[begin - 1]) if begin else 0
            end = max(begin + 1, int(np.searchsorted(ends, before + _CHUNK)))
            some = slice(begin, end)
            lengths = counts[some]
            starts = ends[some] - lengths - before
            positions = np.repeat(begins[some] - starts, lengths) + np.arange(int(lengths.sum()))
            places = band.places(positions)
            numbers = np.repeat(which[some], lengths)
            distances = np.bitwise_count(self._hashes[places] ^ asked[numbers])
            near = distances <= self.distance
            found.append((numbers[near], self._rows[places[near]], distances[near].astype(np.int64)))
            begin = end
        return _joined(found)


def _joined(found: list[tuple[Ints, Ints, Ints]]) -> tuple[Ints, Ints, Ints]:
    none = np.empty(0, dtype=np.int64)
    asked, rows, distances = (np.concatenate([none, *columns]) for columns in zip(*found or [(none, none, none)]))
    return asked, rows, distances


def _radii(distance: int) -> tuple[int, ...]:
    """Bits to flip in each band, -1: not asked. If every band differed in more, all would in more than `distance`."""
    return tuple((distance + 1 + number) // len(_BANDS) - 1 for number in range(len(_BANDS)))


def _flips(width: int, radius: int) -> Ints:
    """Every value of `width` bits with at most `radius` ones."""
    return np.array(
        [
            sum(1 << bit for bit in bits)
            for ones in range(radius + 1)
            for bits in itertools.combinations(range(width), ones)
        ],
        dtype=np.int64,
    )
