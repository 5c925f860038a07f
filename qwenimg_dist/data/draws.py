"""Random draws that are pure functions of integers: the same on every rank, machine and numpy version.

Place in the flow: the ledger's only source of randomness. numpy's `Generator` methods may change between versions
(NEP 19), and a stateful generator must be replayed up to the position wanted; here the n-th draw is hashed from n.
The mixer is splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"). Not for secrets.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_MIX_1: Final = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2: Final = np.uint64(0x94D049BB133111EB)


def draw_key(*parts: int | str) -> int:
    """Key of one kind of draw, for example `draw_key(seed, "dropout", epoch)`: 64 bits of a sha256."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def hashes(key: int, ids: npt.NDArray[Any]) -> Hashes:
    """(n,) uniform uint64, one per id; equal ids give equal hashes."""
    value = ids.astype(np.uint64) * _GOLDEN + np.uint64(key)
    return _mix(_mix(value) ^ np.uint64(key))


def uniform(key: int, ids: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """(n,) uniform in [0, 1), one per id."""
    return (hashes(key, ids) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def hash_keys(keys: npt.NDArray[np.bytes_]) -> Hashes:
    """(n,) uint64 of byte strings; trailing NULs do not count. Held-out rows are those with the smallest."""
    width = keys.dtype.itemsize
    columns = np.ascontiguousarray(keys).view(np.uint8).reshape(len(keys), width) if width else None
    value = np.zeros(len(keys), dtype=np.uint64)
    for column in range(width):
        assert columns is not None
        byte = columns[:, column].astype(np.uint64)
        value = np.where(byte > 0, _mix(value ^ (byte + np.uint64(column << 8))), value)
    return value


def _mix(value: Hashes) -> Hashes:
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))
