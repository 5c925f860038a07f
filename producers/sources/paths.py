"""Paths of a million files, kept as bytes and not as Python strings: some 8 bytes each besides their characters.

Place in the flow: `folder.py` gathers what a walk sees in one, and goes through it in order. Also home of the arrays of
64-bit hashes by which paths are compared with each other; a hash alone never decides about a row.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

_BATCH: Final = 4096
_SEARCH: Final = 65_536
_SHORT: Final = 2**31
"""Ends below it take four bytes."""

Hashes = npt.NDArray[np.int64]


class Paths:
    """Append paths, then go through them in the order of their bytes."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._ends = array("i", [0])
        self._order: npt.NDArray[Any] | None = None

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, path: str) -> None:
        self._order = None
        self._data += os.fsencode(path)
        if len(self._data) >= _SHORT and self._ends.typecode == "i":
            self._ends = array("q", self._ends)
        self._ends.append(len(self._data))

    def sorted_batches(self) -> Iterator[list[str]]:
        """All paths, sorted by their bytes, a few thousand at a time. The order is found once: that takes 16 bytes a
        path more than it does itself."""
        stored = self._as_arrow()
        if self._order is None:
            self._order = np.asarray(pc.sort_indices(stored)).astype(np.uint32 if len(self) < 2**32 else np.uint64)
        for start in range(0, len(self._order), _BATCH):
            numbers = pa.array(self._order[start : start + _BATCH])
            yield [os.fsdecode(raw) for raw in stored.take(numbers).to_pylist()]

    def hashes(self, of: Callable[[str], str] = str) -> Hashes:
        """Hash of each path, or of what `of` makes of it, ascending."""
        found = np.empty(len(self), dtype=np.int64)
        stored = self._as_arrow()
        for start in range(0, len(stored), _BATCH):
            texts = (of(os.fsdecode(raw)) for raw in stored[start : start + _BATCH].to_pylist())
            part = np.fromiter(map(hash, texts), np.int64)
            found[start : start + len(part)] = part
        found.sort()
        return found

    def _as_arrow(self) -> Any:
        """A view on the bytes; appending is over then."""
        buffers = [None, pa.py_buffer(self._ends), pa.py_buffer(self._data)]
        kind = pa.binary() if self._ends.typecode == "i" else pa.large_binary()
        return pa.Array.from_buffers(kind, len(self), buffers)


def are_in(hashes: Hashes, ascending: Hashes) -> npt.NDArray[np.bool_]:
    """Whether each hash is in the sorted array; piece by piece, so without large arrays in between."""
    there = np.zeros(len(hashes), dtype=bool)
    if len(ascending):
        for start in range(0, len(hashes), _SEARCH):
            piece = hashes[start : start + _SEARCH]
            places = np.minimum(np.searchsorted(ascending, piece), len(ascending) - 1)
            there[start : start + _SEARCH] = ascending[places] == piece
    return there
