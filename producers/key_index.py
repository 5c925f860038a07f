"""A map from keys of a fixed width to row numbers, for many millions of rows: sorted numpy arrays, no Python objects.

Place in the flow: `listing.py` keeps every sample key in one. Keys are only added, never changed or removed.

Memory: the key's bytes and 4 per row, about twice that for a moment while recent keys are merged in; besides, a dict of
at most 65,536 recent keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

ABSENT: Final = -1
_MERGE_AT: Final = 65_536


class KeyIndex:
    """Key (bytes of one width) -> row."""

    def __init__(self, num_bytes: int) -> None:
        # numpy drops trailing NUL bytes of `S`; since all keys have one width, they still compare and differ rightly.
        self._type: np.dtype[Any] = np.dtype(f"S{num_bytes}")
        self._keys: npt.NDArray[Any] = np.empty(0, dtype=self._type)
        self._rows = np.empty(0, dtype=np.uint32)
        self._recent: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._rows) + len(self._recent)

    def find_many(self, keys: Sequence[bytes]) -> npt.NDArray[np.int64]:
        """Row of each key, `ABSENT` where there is none; one search for all of them."""
        found = np.fromiter((self._recent.get(key, ABSENT) for key in keys), np.int64, len(keys))
        if len(self._keys) and len(keys):
            wanted = np.array(keys, dtype=self._type)
            places = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
            hits = self._keys[places] == wanted
            found[hits] = self._rows[places[hits]]
        return found

    def find(self, key: bytes) -> int:
        """Row of one key, or `ABSENT`."""
        return int(self.find_many([key])[0])

    def add(self, key: bytes, row: int) -> None:
        """Remember a key that is not there yet."""
        if len(key) != self._type.itemsize:
            raise ValueError(f"row {row}: a key has {self._type.itemsize} bytes, not {len(key)}")
        if row >= 2**32:
            raise ValueError(f"row {row}: more rows than an index can number")
        self._recent[key] = row
        if len(self._recent) >= _MERGE_AT:
            self._merge()

    def _merge(self) -> None:
        keys = np.array(list(self._recent), dtype=self._type)
        rows = np.fromiter(self._recent.values(), np.uint32, len(self._recent))
        order = np.argsort(keys)
        keys, rows = keys[order], rows[order]
        # One pass over what is sorted already, where sorting all again would cost more with every merge.
        places = np.searchsorted(self._keys, keys)
        self._keys = np.insert(self._keys, places, keys)
        self._rows = np.insert(self._rows, places, rows)
        self._recent = {}
