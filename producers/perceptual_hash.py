"""A 64-bit hash of how a picture looks: near copies differ in few bits, other pictures in about 32.

Place in the flow: the scan makes it from the bytes that it has read anyway; `near.py` settles near duplicates by it.
The bits say which of the 8x8 lowest DCT frequencies of the upright luma are above their median: pHash, but taken from
the reduced decode directly, without a resize in between. `tests/bench/near_duplicates.py` measures it beside
`imagehash`.

Refuses (no hash, never a fault): what does not decode, pictures under 16 px, those of which one level covers most
(plain shapes, drawings, pages of text), and those that are hardly more than a slope. Their few low frequencies are
alike though they show different things, and a kept near copy costs less than a lost picture. Another hash one day would
be another column: hashes compare only with their own kind.
"""

from __future__ import annotations

import functools
from typing import Final

import numpy as np
import numpy.typing as npt

from producers.load import ImageFault, OpenFile, load_small_grey, open_file

_SIDE: Final = 128
"""px; the decode is reduced as far as the shorter side stays this long."""
_FREQUENCIES: Final = 8
_MIN_SIDE: Final = 16
_BACKGROUND_LEVELS: Final = 5
"""Of 255, next to each other: JPEG moves an even background by a level or two."""
_MAX_BACKGROUND: Final = 0.65
"""Share of the pixels. Seen: photographs up to 0.63 (one in a black frame), plain shapes from 0.66, text from 0.79."""
_MIN_CONTRAST: Final = 0.05
"""Levels; median of the frequencies' amplitudes. Seen: photographs from 0.1. Below it noise decides most bits."""


def perceptual_hash(data: bytes) -> int | None:
    """The hash of a file's bytes as a signed 64-bit number; None where the picture has none."""
    try:
        return hash_file(open_file(data))
    except ImageFault:
        return None


def hash_file(file: OpenFile) -> int | None:
    """The same of a file whose header was read. Its picture cannot be decoded a second time."""
    try:
        grey = load_small_grey(file, _SIDE)
    except ImageFault:
        return None
    return hash_grey(grey)


def hash_grey(grey: npt.NDArray[np.uint8]) -> int | None:
    """Hash of (h, w) luma; None if it is too small or too plain."""
    if min(grey.shape) < _MIN_SIDE or _background_share(grey) > _MAX_BACKGROUND:
        return None
    height, width = grey.shape
    coefficients = _dct(height) @ grey.astype(np.float32) @ _dct(width).T
    lowest = coefficients[:_FREQUENCIES, :_FREQUENCIES].copy()
    lowest[0, 0] = coefficients[0, _FREQUENCIES]  # the mean would give the same bit for every picture
    if _median(np.abs(lowest)) < _MIN_CONTRAST:
        return None
    bits = np.packbits(lowest > _median(lowest))
    return int.from_bytes(bits.tobytes(), "big", signed=True)


def _median(values: npt.NDArray[np.float32]) -> np.float32:
    """As `np.median` of an even number of them, in a tenth of its time."""
    ordered = np.sort(values, axis=None)
    middle = len(ordered) // 2
    median: np.float32 = (ordered[middle - 1] + ordered[middle]) / np.float32(2)
    return median


def _background_share(grey: npt.NDArray[np.uint8]) -> float:
    """Share of the pixels within the few neighbouring levels that most of them have."""
    counts = np.cumsum(np.bincount(grey.ravel(), minlength=256))
    within = counts[_BACKGROUND_LEVELS:] - counts[:-_BACKGROUND_LEVELS]
    return float(max(counts[_BACKGROUND_LEVELS - 1], within.max())) / grey.size


@functools.lru_cache(maxsize=1024)
def _dct(side: int) -> npt.NDArray[np.float32]:
    """(9, side): the lowest rows of the DCT-II, scaled by 1 / side so that pictures of all sizes compare."""
    frequency, position = np.arange(_FREQUENCIES + 1)[:, None], np.arange(side)[None]
    rows: npt.NDArray[np.float32] = (np.cos(np.pi * (2 * position + 1) * frequency / (2 * side)) / side).astype(
        np.float32
    )
    return rows
